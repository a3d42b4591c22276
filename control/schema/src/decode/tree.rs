//! JSON and YAML text to a value, with bounds on depth and size, noticing duplicate fields.

use std::collections::HashMap;
use std::fmt;

use serde::de::{Deserialize, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{DecodeError, Decoded, warn};
use crate::gofmt;

/// Deepest nesting of objects and lists.
pub const MAX_DEPTH: usize = 100;
/// Most values in one JSON or protobuf document.
pub const MAX_NODES: usize = 1_000_000;
/// Most values in one YAML document, aliases expanded.
const MAX_YAML_NODES: usize = 200_000;
/// Most bytes of text in one document, aliases expanded.
const MAX_TEXT_BYTES: usize = 32 << 20;

pub(super) fn json(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    // Invalid UTF-8 in strings is replaced, as Go's decoder does.
    let text = String::from_utf8_lossy(bytes);
    let mut tree = Tree::new(MAX_NODES);
    let mut reader = serde_json::Deserializer::from_str(&text);
    let value = Node(&mut tree).deserialize(&mut reader).and_then(|value| reader.end().map(|()| value));
    let value =
        value.map_err(|error| DecodeError::Syntax(tree.breach.map_or_else(|| go_words(&text, &error), Into::into)))?;
    Ok(Decoded { value, warnings: tree.warnings })
}

pub(super) fn yaml(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    let text = String::from_utf8_lossy(bytes);
    let mut tree = Tree::new(MAX_YAML_NODES);
    tree.yaml = true;
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_depth: MAX_DEPTH,
            max_nodes: MAX_YAML_NODES,
            flow_nesting_limit: MAX_DEPTH,
        },
        duplicate_keys: serde_saphyr::options::DuplicateKeyPolicy::PassThrough,
        legacy_octal_numbers: true,
    };
    let value = serde_saphyr::with_deserializer_from_str_with_options(&text, options, |reader| {
        Node(&mut tree).deserialize(reader)
    });
    let value = value.map_err(|error| {
        let words =
            tree.breach.map_or_else(|| error.to_string().lines().next().unwrap_or_default().to_owned(), Into::into);
        DecodeError::Syntax(format!("error converting YAML to JSON: yaml: {words}"))
    })?;
    // Repeated keys of YAML are one complaint of its parser.
    let warnings = if tree.repeated.is_empty() {
        Vec::new()
    } else {
        vec![format!("yaml: unmarshal errors:\n  {}", tree.repeated.join("\n  "))]
    };
    Ok(Decoded { value, warnings })
}

/// Sorts warnings about a JSON document by where in it their fields stand.
pub(super) fn sort_by_place(bytes: &[u8], warnings: &mut [String]) {
    let text = String::from_utf8_lossy(bytes);
    let mut tree = Tree::new(MAX_NODES);
    tree.places = warnings.iter().map(|warning| (warning.clone(), usize::MAX)).collect();
    // The document was read before, so this reads it again.
    let _ = Node(&mut tree).deserialize(&mut serde_json::Deserializer::from_str(&text));
    warnings.sort_by_key(|warning| tree.places.get(warning).copied());
}

/// serde_json's complaint in the words of Go's scanner.
fn go_words(text: &str, error: &serde_json::Error) -> String {
    if error.is_eof() {
        return "unexpected end of JSON input".into();
    }
    let words = error.to_string();
    let line_start: usize = text.split_inclusive('\n').take(error.line().saturating_sub(1)).map(str::len).sum();
    let at = line_start + error.column().saturating_sub(1);
    let rest = text.as_bytes().get(at..).and_then(|rest| std::str::from_utf8(rest).ok()).unwrap_or("");
    let Some(found) = rest.chars().next() else {
        return "unexpected end of JSON input".into();
    };
    let context = [
        ("expected `,` or `}`", "after object key:value pair"),
        ("expected `,` or `]`", "after array element"),
        ("expected `:`", "after object key"),
        ("key must be a string", "looking for beginning of object key string"),
        ("trailing characters", "after top-level value"),
        ("control character", "in string literal"),
        ("invalid escape", "in string escape code"),
        ("invalid number", "in numeric literal"),
        ("recursion limit", ""),
    ];
    let context =
        context.iter().find(|(theirs, _)| words.starts_with(theirs)).map_or("looking for beginning of value", |c| c.1);
    if context.is_empty() {
        return "exceeded max depth".into();
    }
    let found = match found {
        '\'' => r"'\''".to_owned(),
        '"' => "'\"'".to_owned(),
        c => format!("'{}'", gofmt::quote(&c.to_string()).trim_matches('"')),
    };
    format!("invalid character {found} {context}")
}

struct Tree {
    path: String,
    depth: usize,
    nodes: usize,
    max_nodes: usize,
    text_bytes: usize,
    warnings: Vec<String>,
    /// YAML: keys carry their line; complaints about repeated ones.
    yaml: bool,
    repeated: Vec<String>,
    /// Warnings whose places in the document are looked for.
    places: HashMap<String, usize>,
    /// Which bound was broken.
    breach: Option<&'static str>,
}

impl Tree {
    fn new(max_nodes: usize) -> Self {
        Self {
            path: String::new(),
            depth: 0,
            nodes: 0,
            max_nodes,
            text_bytes: 0,
            warnings: Vec::new(),
            yaml: false,
            repeated: Vec::new(),
            places: HashMap::new(),
            breach: None,
        }
    }

    fn count<E: serde::de::Error>(&mut self, text_bytes: usize) -> Result<(), E> {
        self.nodes += 1;
        self.text_bytes += text_bytes;
        if self.nodes > self.max_nodes || self.text_bytes > MAX_TEXT_BYTES {
            return self.fail("document contains excessive aliasing or too many values");
        }
        Ok(())
    }

    /// Notes where the field at the path stands, if something is said about it.
    fn find_place(&mut self, repeated: bool) {
        let words = if repeated { "duplicate" } else { "unknown" };
        let text = format!("{words} field {}", gofmt::quote(&self.path));
        if let Some(place) = self.places.get_mut(&text) {
            *place = (*place).min(self.nodes);
        }
    }

    fn enter<E: serde::de::Error>(&mut self) -> Result<(), E> {
        self.depth += 1;
        if self.depth > MAX_DEPTH { self.fail("exceeded max depth") } else { Ok(()) }
    }

    fn fail<E: serde::de::Error>(&mut self, words: &'static str) -> Result<(), E> {
        self.breach = Some(words);
        Err(E::custom(words))
    }
}

/// One value, read into a [`Value`].
struct Node<'a>(&'a mut Tree);

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<Value, E> {
        self.0.count(0)?;
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<Value, E> {
        self.0.count(0)?;
        Ok(Value::Number(value.into()))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Value, E> {
        self.0.count(0)?;
        Ok(Value::Number(value.into()))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        self.0.count(0)?;
        let number =
            Number::from_f64(value).ok_or_else(|| E::custom("json: unsupported value: not a finite number"))?;
        Ok(Value::Number(number))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Value, E> {
        self.0.count(value.len())?;
        Ok(Value::String(value.to_owned()))
    }

    fn visit_string<E: serde::de::Error>(self, value: String) -> Result<Value, E> {
        self.0.count(value.len())?;
        Ok(Value::String(value))
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<Value, E> {
        self.0.count(0)?;
        Ok(Value::Null)
    }

    fn visit_none<E: serde::de::Error>(self) -> Result<Value, E> {
        self.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut reader: A) -> Result<Value, A::Error> {
        let tree = self.0;
        tree.count(0)?;
        tree.enter()?;
        let mut items = Vec::new();
        let base = tree.path.len();
        loop {
            push_index(&mut tree.path, items.len());
            let item = reader.next_element_seed(Node(tree))?;
            tree.path.truncate(base);
            match item {
                Some(item) => items.push(item),
                None => break,
            }
        }
        tree.depth -= 1;
        Ok(Value::Array(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut reader: A) -> Result<Value, A::Error> {
        let tree = self.0;
        tree.count(0)?;
        tree.enter()?;
        let mut map = Map::new();
        let base = tree.path.len();
        while let Some((key, line)) = reader.next_key_seed(Key { yaml: tree.yaml })? {
            tree.count(key.len())?;
            push_name(&mut tree.path, &key);
            if !tree.places.is_empty() {
                tree.find_place(map.contains_key(&key));
            } else if map.contains_key(&key) {
                if tree.yaml {
                    warn(&mut tree.repeated, || format!("line {line}: key {} already set in map", gofmt::quote(&key)));
                } else {
                    let path = gofmt::quote(&tree.path);
                    warn(&mut tree.warnings, || format!("duplicate field {path}"));
                }
            }
            let value = reader.next_value_seed(Node(tree))?;
            tree.path.truncate(base);
            map.insert(key, value);
        }
        tree.depth -= 1;
        Ok(Value::Object(map))
    }
}

pub(super) fn push_name(path: &mut String, name: &str) {
    if !path.is_empty() {
        path.push('.');
    }
    path.push_str(name);
}

pub(super) fn push_index(path: &mut String, index: usize) {
    use fmt::Write as _;
    write!(path, "[{index}]").expect("writing to a String cannot fail");
}

/// A map's key and, in YAML, its line.
struct Key {
    yaml: bool,
}

impl<'de> DeserializeSeed<'de> for Key {
    type Value = (String, u64);

    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<(String, u64), D::Error> {
        if !self.yaml {
            return Ok((reader.deserialize_any(KeyText)?, 0));
        }
        let key = serde_saphyr::Spanned::<AnyKey>::deserialize(reader)?;
        Ok((key.value.0, key.referenced.line()))
    }
}

/// The text of a key of any type.
struct AnyKey(String);

impl<'de> Deserialize<'de> for AnyKey {
    fn deserialize<D: Deserializer<'de>>(reader: D) -> Result<Self, D::Error> {
        reader.deserialize_any(KeyText).map(Self)
    }
}

/// YAML's numbers and booleans become text.
struct KeyText;

impl Visitor<'_> for KeyText {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<String, E> {
        Ok(value.to_owned())
    }

    fn visit_string<E: serde::de::Error>(self, value: String) -> Result<String, E> {
        Ok(value)
    }

    fn visit_bool<E: serde::de::Error>(self, value: bool) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_i64<E: serde::de::Error>(self, value: i64) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<String, E> {
        Ok(value.to_string())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<String, E> {
        let mut text = String::new();
        gofmt::float_into(&mut text, value);
        Ok(text)
    }

    fn visit_unit<E: serde::de::Error>(self) -> Result<String, E> {
        Ok("null".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn syntax_errors_are_gos() {
        let words = |text: &str| json(text.as_bytes()).expect_err("bad").to_string();
        assert_eq!(words("{\"kind\":"), "unexpected end of JSON input");
        assert_eq!(words("{\"a\" 1}"), "invalid character '1' after object key");
        assert_eq!(words("[1 2]"), "invalid character '2' after array element");
        assert_eq!(words("{} x"), "invalid character 'x' after top-level value");
        assert_eq!(words("<html>"), "invalid character '<' looking for beginning of value");
    }

    #[test]
    fn duplicates_are_reported_and_the_last_wins() {
        let decoded = json(br#"{"spec":{"a":1,"l":[{"x":1,"x":2}],"a":3}}"#).expect("decodes");
        assert_eq!(decoded.value, json!({"spec": {"a": 3, "l": [{"x": 2}]}}));
        assert_eq!(decoded.warnings, ["duplicate field \"spec.l[0].x\"", "duplicate field \"spec.a\""]);
        let decoded = yaml(b"a: 1\nmode: 0644\nyes: on\na: 2\n").expect("decodes");
        assert_eq!(decoded.value, json!({"a": 2, "mode": 420, "true": true}));
        assert_eq!(decoded.warnings, ["yaml: unmarshal errors:\n  line 4: key \"a\" already set in map"]);
    }

    #[test]
    fn bombs_are_bounded() {
        let deep = "[".repeat(100_000);
        assert!(json(deep.as_bytes()).is_err());
        assert!(yaml(deep.as_bytes()).is_err());
        let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x]\n");
        for (name, from) in
            ["b", "c", "d", "e", "f", "g", "h", "i"].iter().zip(["a", "b", "c", "d", "e", "f", "g", "h"])
        {
            bomb.push_str(&format!("{name}: &{name} [{}]\n", vec![format!("*{from}"); 9].join(",")));
        }
        assert!(yaml(bomb.as_bytes()).is_err());
    }
}
