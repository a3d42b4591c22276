//! Where measurements come from: the APIs `metrics.k8s.io`, `custom.metrics.k8s.io` and `external.metrics.k8s.io`, whoever
//! serves them.

use std::collections::HashMap;

use coracle_api::kinds::quantity::Quantity;
use k8s_openapi::api::autoscaling::v2::MetricIdentifier;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::Value;

use super::replicas::Sample;

/// The window of a measurement that does not name one: what the metrics API itself is read at.
const WINDOW: SignedDuration = SignedDuration::from_secs(60);

/// Reads the metrics APIs of one namespace.
pub(super) struct Metrics<'a> {
    pub(super) client: &'a kube::Client,
    pub(super) namespace: &'a str,
}

/// Thousandths of a quantity, rounded up.
pub(super) fn milli(quantity: &str) -> Option<i64> {
    i64::try_from(Quantity::parse(quantity)?.millis()).ok()
}

fn text<'v>(value: &'v Value, pointer: &str) -> &'v str {
    value.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn items(list: &Value) -> impl Iterator<Item = &Value> {
    list["items"].as_array().into_iter().flatten()
}

/// A label selector in the form of queries.
fn written(selector: Option<&LabelSelector>) -> String {
    let Some(selector) = selector else { return String::new() };
    let equal = selector.match_labels.iter().flatten().map(|(key, value)| format!("{key}={value}"));
    let rest = selector.match_expressions.iter().flatten().map(|wanted| {
        let values = wanted.values.iter().flatten().map(String::as_str).collect::<Vec<_>>().join(",");
        match wanted.operator.as_str() {
            "In" => format!("{} in ({values})", wanted.key),
            "NotIn" => format!("{} notin ({values})", wanted.key),
            "DoesNotExist" => format!("!{}", wanted.key),
            _ => wanted.key.clone(),
        }
    });
    equal.chain(rest).collect::<Vec<_>>().join(",")
}

impl Metrics<'_> {
    async fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, String> {
        let query: String = form_urlencoded::Serializer::new(String::new())
            .extend_pairs(query.iter().filter(|(_, value)| !value.is_empty()))
            .finish();
        let uri = if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") };
        let request = http::Request::get(uri).body(Vec::new()).map_err(|error| error.to_string())?;
        self.client.request(request).await.map_err(|error| match error {
            kube::Error::Api(status) => status.message,
            other => other.to_string(),
        })
    }

    /// What the selected pods, or one container of each, use of a resource. A pod that is not measured whole is left out.
    pub(super) async fn resource(
        &self,
        resource: &str,
        container: Option<&str>,
        selector: &str,
    ) -> Result<HashMap<String, Sample>, String> {
        let path = format!("/apis/metrics.k8s.io/v1beta1/namespaces/{}/pods", self.namespace);
        let list = self.get(&path, &[("labelSelector", selector)]).await;
        let list = list.map_err(|error| format!("unable to fetch metrics from resource metrics API: {error}"))?;
        let mut samples = HashMap::new();
        for pod in items(&list) {
            let name = text(pod, "/metadata/name");
            let all = pod["containers"].as_array().into_iter().flatten();
            let mut used: Vec<&Value> = all.filter(|one| container.is_none_or(|name| one["name"] == name)).collect();
            if let (Some(container), true) = (container, used.is_empty()) {
                return Err(format!("container {container} not present in metrics for pod {}/{name}", self.namespace));
            }
            let amounts: Option<Vec<i64>> = used.drain(..).map(|one| milli(one["usage"][resource].as_str()?)).collect();
            if let Some(amounts) = amounts.filter(|amounts| !amounts.is_empty()) {
                samples.insert(name.to_owned(), sample(pod, amounts.iter().sum(), pod["window"].as_str()));
            }
        }
        if samples.is_empty() {
            return Err("no metrics returned from resource metrics API".into());
        }
        Ok(samples)
    }

    /// A metric of the selected pods.
    pub(super) async fn pods(
        &self,
        metric: &MetricIdentifier,
        selector: &str,
    ) -> Result<HashMap<String, Sample>, String> {
        let list = self.custom(&format!("pods/*/{}", metric.name), selector, metric).await?;
        let mut samples = HashMap::new();
        for value in items(&list) {
            let window = value["windowSeconds"].as_i64().map(|seconds| format!("{seconds}s"));
            if let Some(amount) = value["value"].as_str().and_then(milli) {
                let name = text(value, "/describedObject/name").to_owned();
                samples.insert(name, sample(value, amount, window.as_deref()));
            }
        }
        if samples.is_empty() {
            return Err("no metrics returned from custom metrics API".into());
        }
        Ok(samples)
    }

    /// A metric of one object: `resource` as paths have it (`services`, `ingresses.networking.k8s.io`).
    pub(super) async fn object(&self, resource: &str, name: &str, metric: &MetricIdentifier) -> Result<i64, String> {
        let of = if resource == "namespaces" { "metrics".into() } else { format!("{resource}/{name}") };
        let list = self.custom(&format!("{of}/{}", metric.name), "", metric).await?;
        let value = items(&list).find_map(|value| milli(value["value"].as_str()?));
        value.ok_or_else(|| "no metrics returned from custom metrics API".into())
    }

    async fn custom(&self, path: &str, selector: &str, metric: &MetricIdentifier) -> Result<Value, String> {
        let fail = |error| format!("unable to fetch metrics from custom metrics API: {error}");
        let group = self.get("/apis/custom.metrics.k8s.io", &[]).await.map_err(fail)?;
        let version = text(&group, "/preferredVersion/version");
        let path = format!("/apis/custom.metrics.k8s.io/{version}/namespaces/{}/{path}", self.namespace);
        let of = written(metric.selector.as_ref());
        self.get(&path, &[("labelSelector", selector), ("metricLabelSelector", &of)]).await.map_err(fail)
    }

    /// The sum of all values of a metric that is of nothing in the cluster.
    pub(super) async fn external(&self, metric: &MetricIdentifier) -> Result<i64, String> {
        let path = format!("/apis/external.metrics.k8s.io/v1beta1/namespaces/{}/{}", self.namespace, metric.name);
        let list = self.get(&path, &[("labelSelector", &written(metric.selector.as_ref()))]).await;
        let list = list.map_err(|error| format!("unable to fetch metrics from external metrics API: {error}"))?;
        let values: Vec<i64> = items(&list).filter_map(|value| milli(value["value"].as_str()?)).collect();
        if values.is_empty() {
            return Err("no metrics returned from external metrics API".into());
        }
        Ok(values.iter().sum())
    }
}

fn sample(value: &Value, milli: i64, window: Option<&str>) -> Sample {
    // A measurement without a time is as new as it can be.
    let at = value["timestamp"].as_str().and_then(|time| time.parse().ok()).unwrap_or_else(Timestamp::now);
    let window = window.and_then(|window| window.parse().ok()).unwrap_or(WINDOW);
    Sample { milli, at, window }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_are_written_as_queries_read_them() {
        let selector: LabelSelector = serde_json::from_value(serde_json::json!({
            "matchLabels": {"a": "b"}, "matchExpressions": [{"key": "t", "operator": "In", "values": ["x", "y"]},
                {"key": "gone", "operator": "DoesNotExist"}, {"key": "there", "operator": "Exists"}],
        }))
        .expect("a selector");
        let text = written(Some(&selector));
        assert_eq!(text, "a=b,t in (x,y),!gone,there");
        coracle_api::selector::LabelSelector::parse(&text).expect("it is read");
    }

    #[test]
    fn windows_are_durations_of_go() {
        assert_eq!("1m0s".parse::<SignedDuration>().ok(), Some(SignedDuration::from_secs(60)));
        assert_eq!("10s".parse::<SignedDuration>().ok(), Some(SignedDuration::from_secs(10)));
    }
}
