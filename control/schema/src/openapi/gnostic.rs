//! The protobuf form of an OpenAPI v2 document: messages of gnostic's package `openapi.v2`, which client-go asks for.
//!
//! Fields are numbered in the order in which gnostic's `OpenAPIv2.proto` declares them, so a message is the list of its fields'
//! JSON names. Members that the format does not know have no place in it and are left out.

use serde_json::Value;

use crate::protobuf::wire;

/// Media types that clients ask for it by; the answer bears the second.
pub const MEDIA_TYPES: [&str; 2] = [
    "application/com.github.proto-openapi.spec.v2@v1.0+protobuf",
    "application/com.github.proto-openapi.spec.v2.v1.0+protobuf",
];

/// A message: JSON names and shapes of its fields, numbered from one.
type Message = [(&'static str, Shape)];

/// In place of a name: members that begin with `x-`.
const EXTENSIONS: &str = "x-";
/// In place of a name: all members but extensions.
const REST: &str = "*";

/// How a JSON value is written.
#[derive(Clone, Copy)]
enum Shape {
    Text,
    Flag,
    Integer,
    Number,
    /// Any value, as YAML (which JSON is).
    Any,
    Message(&'static Message),
    /// A map: a message of one name and one value for each member.
    Map(&'static Shape),
    /// One field for each item; a value that is no array is its own only item.
    Each(&'static Shape),
    /// A message whose only field, of this number, has the value.
    In(u32, &'static Shape),
    /// Depends on the value.
    Choice(fn(&Value) -> Shape),
}

use Shape::{Any, Choice, Each, Flag, In, Integer, Map, Number, Text};

const TEXTS: Shape = Each(&Text);
const ANY_MAP: Shape = Map(&Any);
static SCHEMA_SHAPE: Shape = Shape::Message(&SCHEMA);
const PARAMETERS: Shape = Each(&Choice(parameter));
const OPERATION_SHAPE: Shape = Shape::Message(OPERATION);
/// Messages that hold themselves are statics: constants cannot.
static ITEMS: Shape = Shape::Message(&PRIMITIVE_FIELDS);

const DOCUMENT: &Message = &[
    ("swagger", Text),
    ("info", Shape::Message(INFO)),
    ("host", Text),
    ("basePath", Text),
    ("schemes", TEXTS),
    ("consumes", TEXTS),
    ("produces", TEXTS),
    ("paths", Shape::Message(&[(EXTENSIONS, ANY_MAP), (REST, Map(&Shape::Message(PATH_ITEM)))])),
    ("definitions", Shape::Message(&[(REST, Map(&SCHEMA_SHAPE))])),
    ("parameters", Shape::Message(&[(REST, Map(&Choice(direct_parameter)))])),
    ("responses", Shape::Message(&[(REST, Map(&Shape::Message(RESPONSE)))])),
    ("security", SECURITY),
    ("securityDefinitions", Shape::Message(&[(REST, Map(&Choice(security_definition)))])),
    (
        "tags",
        Each(&Shape::Message(&[("name", Text), ("description", Text), ("externalDocs", DOCS), (EXTENSIONS, ANY_MAP)])),
    ),
    ("externalDocs", DOCS),
    (EXTENSIONS, ANY_MAP),
];
const INFO: &Message = &[
    ("title", Text),
    ("version", Text),
    ("description", Text),
    ("termsOfService", Text),
    ("contact", Shape::Message(&[("name", Text), ("url", Text), ("email", Text), (EXTENSIONS, ANY_MAP)])),
    ("license", Shape::Message(&[("name", Text), ("url", Text), (EXTENSIONS, ANY_MAP)])),
    (EXTENSIONS, ANY_MAP),
];
const DOCS: Shape = Shape::Message(&[("description", Text), ("url", Text), (EXTENSIONS, ANY_MAP)]);
const SECURITY: Shape = Each(&Shape::Message(&[(REST, Map(&Shape::Message(&[("", TEXTS)])))]));
const PATH_ITEM: &Message = &[
    ("$ref", Text),
    ("get", OPERATION_SHAPE),
    ("put", OPERATION_SHAPE),
    ("post", OPERATION_SHAPE),
    ("delete", OPERATION_SHAPE),
    ("options", OPERATION_SHAPE),
    ("head", OPERATION_SHAPE),
    ("patch", OPERATION_SHAPE),
    ("parameters", PARAMETERS),
    (EXTENSIONS, ANY_MAP),
];
const OPERATION: &Message = &[
    ("tags", TEXTS),
    ("summary", Text),
    ("description", Text),
    ("externalDocs", DOCS),
    ("operationId", Text),
    ("produces", TEXTS),
    ("consumes", TEXTS),
    ("parameters", PARAMETERS),
    ("responses", Shape::Message(&[(REST, Map(&Choice(response))), (EXTENSIONS, ANY_MAP)])),
    ("schemes", TEXTS),
    ("deprecated", Flag),
    ("security", SECURITY),
    (EXTENSIONS, ANY_MAP),
];
const REFERENCE: &Message = &[("$ref", Text), ("description", Text)];
const BODY: &Message = &[
    ("description", Text),
    ("name", Text),
    ("in", Text),
    ("required", Flag),
    ("schema", Each(&SCHEMA_SHAPE)),
    (EXTENSIONS, ANY_MAP),
];
const RESPONSE: &Message = &[
    ("description", Text),
    ("schema", In(1, &SCHEMA_SHAPE)),
    ("headers", Shape::Message(&[(REST, Map(&Shape::Message(HEADER)))])),
    ("examples", Shape::Message(&[(REST, ANY_MAP)])),
    (EXTENSIONS, ANY_MAP),
];
static SCHEMA: [(&str, Shape); 31] = [
    ("$ref", Text),
    ("format", Text),
    ("title", Text),
    ("description", Text),
    ("default", Any),
    ("multipleOf", Number),
    ("maximum", Number),
    ("exclusiveMaximum", Flag),
    ("minimum", Number),
    ("exclusiveMinimum", Flag),
    ("maxLength", Integer),
    ("minLength", Integer),
    ("pattern", Text),
    ("maxItems", Integer),
    ("minItems", Integer),
    ("uniqueItems", Flag),
    ("maxProperties", Integer),
    ("minProperties", Integer),
    ("required", TEXTS),
    ("enum", Each(&Any)),
    ("additionalProperties", Choice(|value| if value.is_boolean() { In(2, &Flag) } else { In(1, &SCHEMA_SHAPE) })),
    ("type", Shape::Message(&[("", TEXTS)])),
    ("items", Shape::Message(&[("", Each(&SCHEMA_SHAPE))])),
    ("allOf", Each(&SCHEMA_SHAPE)),
    ("properties", Shape::Message(&[(REST, Map(&SCHEMA_SHAPE))])),
    ("discriminator", Text),
    ("readOnly", Flag),
    (
        "xml",
        Shape::Message(&[
            ("name", Text),
            ("namespace", Text),
            ("prefix", Text),
            ("attribute", Flag),
            ("wrapped", Flag),
            (EXTENSIONS, ANY_MAP),
        ]),
    ),
    ("externalDocs", DOCS),
    ("example", Any),
    (EXTENSIONS, ANY_MAP),
];

/// The messages of simple values: what comes first, the fields that all share, what comes last.
macro_rules! simple {
    ([$($first:expr),*], [$($last:expr),*]) => {
        &[
            $($first,)*
            ("type", Text),
            ("format", Text),
            ("items", Each(&ITEMS)),
            ("collectionFormat", Text),
            ("default", Any),
            ("maximum", Number),
            ("exclusiveMaximum", Flag),
            ("minimum", Number),
            ("exclusiveMinimum", Flag),
            ("maxLength", Integer),
            ("minLength", Integer),
            ("pattern", Text),
            ("maxItems", Integer),
            ("minItems", Integer),
            ("uniqueItems", Flag),
            ("enum", Each(&Any)),
            ("multipleOf", Number),
            $($last,)*
            (EXTENSIONS, ANY_MAP),
        ]
    };
}
static PRIMITIVE_FIELDS: [(&str, Shape); 18] = *simple!([], []);
const HEADER: &Message = simple!([], [("description", Text)]);
/// Of a path or a header.
const PARAMETER: &Message = simple!([("required", Flag), ("in", Text), ("description", Text), ("name", Text)], []);
/// Of a query or a form, where a value may be empty.
const EMPTY_PARAMETER: &Message =
    simple!([("required", Flag), ("in", Text), ("description", Text), ("name", Text), ("allowEmptyValue", Flag)], []);

fn parameter(value: &Value) -> Shape {
    if value.get("$ref").is_some() { In(2, &Shape::Message(REFERENCE)) } else { In(1, &Choice(direct_parameter)) }
}

fn direct_parameter(value: &Value) -> Shape {
    match value.get("in").and_then(Value::as_str) {
        Some("body") => In(1, &Shape::Message(BODY)),
        Some("header") => In(2, &In(1, &Shape::Message(PARAMETER))),
        Some("formData") => In(2, &In(2, &Shape::Message(EMPTY_PARAMETER))),
        Some("query") => In(2, &In(3, &Shape::Message(EMPTY_PARAMETER))),
        _ => In(2, &In(4, &Shape::Message(PARAMETER))),
    }
}

fn response(value: &Value) -> Shape {
    if value.get("$ref").is_some() { In(2, &Shape::Message(REFERENCE)) } else { In(1, &Shape::Message(RESPONSE)) }
}

fn security_definition(value: &Value) -> Shape {
    const BASIC: Shape = Shape::Message(&[("type", Text), ("description", Text), (EXTENSIONS, ANY_MAP)]);
    const KEY: Shape =
        Shape::Message(&[("type", Text), ("name", Text), ("in", Text), ("description", Text), (EXTENSIONS, ANY_MAP)]);
    if value.get("type").and_then(Value::as_str) == Some("basic") { In(1, &BASIC) } else { In(2, &KEY) }
}

/// The message `openapi.v2.Document` of a document.
pub fn encode(document: &Value) -> Vec<u8> {
    let mut out = Vec::new();
    message(&mut out, document, DOCUMENT);
    out
}

fn message(out: &mut Vec<u8>, value: &Value, fields: &Message) {
    for (number, (name, shape)) in (1..).zip(fields) {
        match (*name, shape) {
            ("", shape) => field(out, number, value, shape),
            (EXTENSIONS | REST, Shape::Map(inner)) => {
                let members = value.as_object().into_iter().flatten();
                for (name, value) in members.filter(|(key, _)| key.starts_with("x-") == (*name == EXTENSIONS)) {
                    entry(out, number, name, value, inner);
                }
            }
            (name, shape) => {
                if let Some(value) = value.get(name) {
                    field(out, number, value, shape);
                }
            }
        }
    }
}

fn entry(out: &mut Vec<u8>, number: u32, name: &str, value: &Value, shape: &Shape) {
    wire::nested(out, number, |out| {
        wire::bytes(out, 1, name.as_bytes());
        field(out, 2, value, shape);
    });
}

fn field(out: &mut Vec<u8>, number: u32, value: &Value, shape: &Shape) {
    match shape {
        Text => wire::bytes(out, number, value.as_str().unwrap_or_default().as_bytes()),
        Flag => wire::int(out, number, value.as_bool().unwrap_or_default().into()),
        Integer => wire::int(out, number, value.as_i64().unwrap_or_default()),
        Number => wire::double(out, number, value.as_f64().unwrap_or_default()),
        Any => wire::nested(out, number, |out| wire::bytes(out, 2, value.to_string().as_bytes())),
        Shape::Message(fields) => wire::nested(out, number, |out| message(out, value, fields)),
        Map(inner) => {
            value.as_object().into_iter().flatten().for_each(|(name, value)| entry(out, number, name, value, inner))
        }
        Each(inner) => match value {
            Value::Array(items) => items.iter().for_each(|item| field(out, number, item, inner)),
            only => field(out, number, only, inner),
        },
        In(inside, inner) => wire::nested(out, number, |out| field(out, *inside, value, inner)),
        Choice(choose) => field(out, number, value, &choose(value)),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::protobuf::wire::{Content, each};

    /// The contents of a field, reached by field numbers from the outside in.
    fn find<'a>(bytes: &'a [u8], path: &[u32]) -> Vec<Content<'a>> {
        let [number, rest @ ..] = path else { return Vec::new() };
        let mut found = Vec::new();
        each(bytes, |n, content| {
            if n == *number {
                found.extend(if rest.is_empty() { vec![content] } else { find(content.bytes()?, rest) });
            }
            Ok(())
        })
        .expect("a message");
        found
    }

    /// Numbers as `OpenAPIv2.proto` of gnostic declares them.
    #[test]
    fn fields_have_their_numbers() {
        let bytes = encode(&json!({
            "swagger": "2.0",
            "paths": {"/a": {
                "get": {
                    "operationId": "a",
                    "x-kubernetes-action": "get",
                    "parameters": [
                        {"in": "body", "name": "body", "schema": {"$ref": "#/b"}},
                        {"in": "query", "name": "q", "type": "integer", "uniqueItems": true},
                        {"in": "path", "name": "p", "type": "string", "uniqueItems": true},
                        {"$ref": "#/parameters/r"},
                    ],
                    "responses": {"200": {"description": "OK", "schema": {"$ref": "#/c"}}},
                },
            }},
            "definitions": {"D": {
                "type": "object",
                "properties": {"a": {"type": "array", "items": {"type": "string", "maxLength": 300}}},
                "additionalProperties": {"type": "string"},
                "x-kubernetes-group-version-kind": [{"kind": "D"}],
            }},
            "securityDefinitions": {"B": {"type": "apiKey", "name": "authorization", "in": "header"}},
            "security": [{"B": []}],
        }));
        let text = |path: &[u32]| match find(&bytes, path).as_slice() {
            [one] => one.text().expect("text").to_owned(),
            other => panic!("{path:?} is there {} times", other.len()),
        };
        let number = |path: &[u32]| find(&bytes, path).first().map(|one| one.int().expect("a number"));
        assert_eq!(text(&[1]), "2.0");
        assert_eq!(text(&[8, 2, 1]), "/a");
        let get = [8, 2, 2, 2];
        let in_get = |path: &[u32]| text(&[&get, path].concat());
        assert_eq!(in_get(&[5]), "a");
        assert_eq!((in_get(&[13, 1]), in_get(&[13, 2, 2])), ("x-kubernetes-action".into(), "\"get\"".into()));
        assert_eq!(in_get(&[8, 1, 1, 5, 1]), "#/b");
        assert_eq!((in_get(&[8, 1, 2, 3, 4]), in_get(&[8, 1, 2, 3, 6])), ("q".into(), "integer".into()));
        assert_eq!(number(&[&get[..], &[8, 1, 2, 3, 20]].concat()), Some(1));
        assert_eq!(number(&[&get[..], &[8, 1, 2, 4, 19]].concat()), Some(1));
        assert_eq!(in_get(&[8, 2, 1]), "#/parameters/r");
        assert_eq!((in_get(&[9, 1, 1]), in_get(&[9, 1, 2, 1, 2, 1, 1])), ("200".into(), "#/c".into()));
        assert_eq!((text(&[9, 1, 1]), text(&[9, 1, 2, 22, 1])), ("D".into(), "object".into()));
        assert_eq!(text(&[9, 1, 2, 25, 1, 2, 23, 1, 22, 1]), "string");
        assert_eq!(number(&[9, 1, 2, 25, 1, 2, 23, 1, 11]), Some(300));
        assert_eq!(text(&[9, 1, 2, 21, 1, 22, 1]), "string");
        assert_eq!(text(&[9, 1, 2, 31, 2, 2]), r#"[{"kind":"D"}]"#);
        assert_eq!((text(&[12, 1, 1]), text(&[13, 1, 2, 2, 2])), ("B".into(), "authorization".into()));
    }
}
