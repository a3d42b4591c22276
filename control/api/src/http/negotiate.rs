//! Which media type and shape an answer has.

use http::HeaderMap;
use http::header::ACCEPT;

use super::query::Query;
use crate::status::Status;

/// Encoding of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// `application/json`
    Json,
    /// `application/yaml`
    Yaml,
    /// `application/vnd.kubernetes.protobuf`
    Protobuf,
}

/// What an object is turned into before it is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// As it is.
    Plain,
    /// `meta.k8s.io` Table.
    Table,
    /// `meta.k8s.io` PartialObjectMetadata.
    Partial,
    /// `meta.k8s.io` PartialObjectMetadataList.
    PartialList,
}

/// `includeObject` of a Table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Include {
    /// The metadata.
    Metadata,
    /// The whole object.
    Object,
    /// Nothing.
    None,
}

/// The negotiated form of an answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Media {
    /// Encoding.
    pub(crate) format: Format,
    /// Shape.
    pub(crate) shape: Shape,
    /// The version of `meta.k8s.io` that Tables and bare metadata are of.
    pub(crate) meta: &'static str,
    /// What rows of a Table carry.
    pub(crate) include: Include,
    /// Indented JSON.
    pub(crate) pretty: bool,
}

/// What Tables and bare metadata are of, unless the older version is asked for.
const META: &str = "meta.k8s.io/v1";

/// Media types that every kind is served in.
pub(crate) const SERVED: [&str; 3] = ["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];
/// Those of kinds without protobuf (CRDs).
pub(crate) const SERVED_CUSTOM: [&str; 2] = ["application/json", "application/yaml"];

impl Media {
    /// Plain JSON.
    pub(crate) const JSON: Self =
        Self { format: Format::Json, shape: Shape::Plain, meta: META, include: Include::Metadata, pretty: false };

    /// Chooses by the `Accept` header, the first acceptable of the client's list in order of its weights.
    /// `protobuf` tells whether the kind has a protobuf encoding.
    pub(crate) fn negotiate(headers: &HeaderMap, query: &Query, protobuf: bool) -> Result<Self, Status> {
        let include = match query.get("includeObject") {
            Some("Object") => Include::Object,
            Some("None") => Include::None,
            _ => Include::Metadata,
        };
        let pretty = match query.get("pretty") {
            Some(value) => !matches!(value, "0" | "false"),
            None => headers
                .get(http::header::USER_AGENT)
                .and_then(|agent| agent.to_str().ok())
                .is_some_and(|agent| ["curl", "Wget", "Mozilla/5.0"].iter().any(|name| agent.starts_with(name))),
        };
        let accept = headers.get(ACCEPT).and_then(|value| value.to_str().ok()).unwrap_or_default();
        if accept.is_empty() || accept == "application/json" {
            return Ok(Self { include, pretty, ..Self::JSON });
        }
        let mut choices: Vec<(u32, &str)> = accept.split(',').map(|clause| (weight(clause), clause.trim())).collect();
        choices.sort_by_key(|&(weight, _)| std::cmp::Reverse(weight));
        for (_, clause) in choices {
            if let Some((format, shape, meta)) = clause_media(clause, protobuf) {
                return Ok(Self { format, shape, meta, include, pretty });
            }
        }
        Err(Status::not_acceptable(if protobuf { &SERVED } else { &SERVED_CUSTOM }))
    }

    /// Content type of the answer.
    pub(crate) fn content_type(self) -> &'static str {
        match self.format {
            Format::Json => "application/json",
            Format::Yaml => "application/yaml",
            Format::Protobuf => "application/vnd.kubernetes.protobuf",
        }
    }
}

/// `q` of a clause in thousandths.
fn weight(clause: &str) -> u32 {
    clause.split(';').find_map(|part| part.trim().strip_prefix("q=")).and_then(|q| q.parse::<f64>().ok()).map_or(
        1000,
        |q| {
            if q <= 0.0 {
                0
            } else if q >= 1.0 {
                1000
            } else {
                (q * 1000.0) as u32
            }
        },
    )
}

fn clause_media(clause: &str, protobuf: bool) -> Option<(Format, Shape, &'static str)> {
    let mut parts = clause.split(';').map(str::trim);
    let format = match parts.next()? {
        "application/json" | "*/*" | "application/*" => Format::Json,
        "application/yaml" => Format::Yaml,
        "application/vnd.kubernetes.protobuf" => Format::Protobuf,
        _ => return None,
    };
    let (mut shape, mut group, mut version) = (None, "", "");
    for part in parts {
        match part.split_once('=') {
            Some(("as", value)) => shape = Some(value),
            Some(("g", value)) => group = value,
            Some(("v", value)) => version = value,
            _ => {}
        }
    }
    let meta = match (group, version) {
        ("meta.k8s.io", "v1") => META,
        ("meta.k8s.io", "v1beta1") => "meta.k8s.io/v1beta1",
        _ if shape.is_some() => return None,
        _ => META,
    };
    let shape = match shape {
        None => Shape::Plain,
        Some("Table") => Shape::Table,
        Some("PartialObjectMetadata") => Shape::Partial,
        Some("PartialObjectMetadataList") => Shape::PartialList,
        Some(_) => return None,
    };
    // Metadata has a protobuf form whatever the object is.
    let encodes = protobuf || format != Format::Protobuf || matches!(shape, Shape::Partial | Shape::PartialList);
    encodes.then_some((format, shape, meta))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn follows_the_client() {
        let negotiate = |accept: &'static str, protobuf| {
            let headers = HeaderMap::from_iter([(ACCEPT, http::HeaderValue::from_static(accept))]);
            Media::negotiate(&headers, &Query::default(), protobuf).map(|m| (m.format, m.shape)).map_err(|s| s.code)
        };
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(negotiate(table, true), Ok((Format::Json, Shape::Table)));
        let proto = "application/vnd.kubernetes.protobuf,application/json";
        assert_eq!(negotiate(proto, true), Ok((Format::Protobuf, Shape::Plain)));
        assert_eq!(negotiate(proto, false), Ok((Format::Json, Shape::Plain)));
        let metadata = "application/vnd.kubernetes.protobuf;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";
        assert_eq!(negotiate(metadata, false), Ok((Format::Protobuf, Shape::Partial)));
        assert_eq!(negotiate("application/yaml;q=0.5, application/json", true), Ok((Format::Json, Shape::Plain)));
        assert_eq!(negotiate("text/html", true), Err(406));
        let older = "application/json;as=Table;v=v1beta1;g=meta.k8s.io";
        assert_eq!(negotiate(older, true), Ok((Format::Json, Shape::Table)));
        assert_eq!(negotiate("application/json;as=Table;v=v1alpha1;g=meta.k8s.io", true), Err(406));
        let headers = HeaderMap::from_iter([(ACCEPT, http::HeaderValue::from_static(older))]);
        assert_eq!(
            Media::negotiate(&headers, &Query::default(), true).map(|m| m.meta).ok(),
            Some("meta.k8s.io/v1beta1")
        );
    }
}
