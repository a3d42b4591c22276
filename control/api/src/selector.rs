//! Label and field selectors, parsed with the words of `k8s.io/apimachinery/pkg/labels` and `…/fields`.

use serde_json::Value;

use crate::kinds::FieldLabel;
use crate::status::Status;

/// A label selector: all requirements must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LabelSelector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Equals,
    NotEquals,
    Exists,
    DoesNotExist,
    Greater,
    Less,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Token {
    End,
    Comma,
    Open,
    Close,
    Not,
    Equals,
    DoubleEquals,
    NotEquals,
    Greater,
    Less,
    In,
    NotIn,
    Word,
}

/// Where keywords (`in`, `notin`) are words.
#[derive(Clone, Copy, PartialEq)]
enum As {
    KeyAndOperator,
    Values,
}

struct Lexer<'a> {
    text: &'a str,
    at: usize,
}

const SPECIAL: [char; 7] = ['=', '!', '(', ')', ',', '>', '<'];

impl<'a> Lexer<'a> {
    fn look(&self, context: As) -> (Token, &'a str) {
        Lexer { text: self.text, at: self.at }.take(context)
    }

    fn take(&mut self, context: As) -> (Token, &'a str) {
        let rest = &self.text[self.at..];
        let trimmed = rest.trim_start_matches([' ', '\t', '\r', '\n']);
        self.at += rest.len() - trimmed.len();
        let (token, length) = match trimmed.chars().next() {
            None => (Token::End, 0),
            Some(first) if SPECIAL.contains(&first) => {
                let two = trimmed.get(..2).unwrap_or_default();
                match (two, first) {
                    ("==", _) => (Token::DoubleEquals, 2),
                    ("!=", _) => (Token::NotEquals, 2),
                    (_, '=') => (Token::Equals, 1),
                    (_, '!') => (Token::Not, 1),
                    (_, '(') => (Token::Open, 1),
                    (_, ')') => (Token::Close, 1),
                    (_, '>') => (Token::Greater, 1),
                    (_, '<') => (Token::Less, 1),
                    _ => (Token::Comma, 1),
                }
            }
            Some(_) => {
                let ends = |c: char| SPECIAL.contains(&c) || matches!(c, ' ' | '\t' | '\r' | '\n');
                let length = trimmed.find(ends).unwrap_or(trimmed.len());
                match &trimmed[..length] {
                    "in" if context == As::KeyAndOperator => (Token::In, length),
                    "notin" if context == As::KeyAndOperator => (Token::NotIn, length),
                    _ => (Token::Word, length),
                }
            }
        };
        self.at += length;
        (token, &trimmed[..length])
    }
}

impl LabelSelector {
    /// Parses a selector such as `app=web,tier in (a, b),!old`.
    pub fn parse(text: &str) -> Result<Self, Status> {
        parse_labels(text).map_err(Status::bad_request)
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it matches a set of labels, given by look-up.
    pub fn matches<'v>(&self, label: impl Fn(&str) -> Option<&'v str>) -> bool {
        self.0.iter().all(|requirement| {
            let value = label(&requirement.key);
            let among = || value.is_some_and(|value| requirement.values.iter().any(|v| v == value));
            let compare = |wanted: std::cmp::Ordering| {
                let numbers = value
                    .and_then(|v| v.parse::<i64>().ok())
                    .zip(requirement.values.first().and_then(|v| v.parse().ok()));
                numbers.is_some_and(|(have, limit): (i64, i64)| have.cmp(&limit) == wanted)
            };
            match requirement.operator {
                Operator::In | Operator::Equals => among(),
                Operator::NotIn | Operator::NotEquals => !among(),
                Operator::Exists => value.is_some(),
                Operator::DoesNotExist => value.is_none(),
                Operator::Greater => compare(std::cmp::Ordering::Greater),
                Operator::Less => compare(std::cmp::Ordering::Less),
            }
        })
    }

    /// Whether it matches an object's labels.
    pub fn matches_object(&self, object: &Value) -> bool {
        self.is_empty() || {
            let labels = object.pointer("/metadata/labels");
            self.matches(|key| labels?.get(key)?.as_str())
        }
    }
}

fn parse_labels(text: &str) -> Result<LabelSelector, String> {
    let mut lexer = Lexer { text, at: 0 };
    let mut requirements = Vec::new();
    loop {
        match lexer.look(As::Values) {
            (Token::Word | Token::Not, _) => {
                let requirement = requirement(&mut lexer).map_err(|e| format!("unable to parse requirement: {e}"))?;
                requirements.push(requirement);
                match lexer.take(As::Values) {
                    (Token::End, _) => break,
                    (Token::Comma, _) => {
                        let (next, word) = lexer.look(As::Values);
                        if !matches!(next, Token::Word | Token::Not) {
                            return Err(format!("found '{word}', expected: identifier after ','"));
                        }
                    }
                    (_, word) => return Err(format!("found '{word}', expected: ',' or 'end of string'")),
                }
            }
            (Token::End, _) => break,
            (_, word) => return Err(format!("found '{word}', expected: !, identifier, or 'end of string'")),
        }
    }
    Ok(LabelSelector(requirements))
}

fn requirement(lexer: &mut Lexer<'_>) -> Result<Requirement, String> {
    let (mut token, mut word) = lexer.take(As::Values);
    let negated = token == Token::Not;
    if negated {
        (token, word) = lexer.take(As::Values);
    }
    if token != Token::Word {
        return Err(format!("found '{word}', expected: identifier"));
    }
    let key = word.to_owned();
    check_key(&key)?;
    if negated {
        return Ok(Requirement { key, operator: Operator::DoesNotExist, values: Vec::new() });
    }
    if matches!(lexer.look(As::Values).0, Token::End | Token::Comma) {
        return Ok(Requirement { key, operator: Operator::Exists, values: Vec::new() });
    }
    let operator = match lexer.take(As::KeyAndOperator) {
        (Token::In, _) => Operator::In,
        (Token::NotIn, _) => Operator::NotIn,
        (Token::Equals | Token::DoubleEquals, _) => Operator::Equals,
        (Token::NotEquals, _) => Operator::NotEquals,
        (Token::Greater, _) => Operator::Greater,
        (Token::Less, _) => Operator::Less,
        (_, word) => return Err(format!("found '{word}', expected: in, notin, =, ==, !=, gt, lt")),
    };
    let values = match operator {
        Operator::In | Operator::NotIn => set(lexer)?,
        _ => vec![exact(lexer)?],
    };
    if matches!(operator, Operator::Greater | Operator::Less) && values[0].parse::<i64>().is_err() {
        return Err(format!(
            "values[0][{key}]: Invalid value: {:?}: for 'Gt', 'Lt' operators, the value must be an integer",
            values[0]
        ));
    }
    Ok(Requirement { key, operator, values })
}

fn exact(lexer: &mut Lexer<'_>) -> Result<String, String> {
    match lexer.look(As::Values) {
        (Token::End | Token::Comma, _) => Ok(String::new()),
        _ => match lexer.take(As::Values) {
            (Token::Word, word) => Ok(word.to_owned()),
            (_, word) => Err(format!("found '{word}', expected: identifier")),
        },
    }
}

fn set(lexer: &mut Lexer<'_>) -> Result<Vec<String>, String> {
    match lexer.take(As::Values) {
        (Token::Open, _) => {}
        (_, word) => return Err(format!("found '{word}' expected: '('")),
    }
    let mut values = Vec::new();
    if lexer.look(As::Values).0 == Token::Close {
        lexer.take(As::Values);
        return Ok(vec![String::new()]);
    }
    loop {
        match lexer.take(As::Values) {
            (Token::Word, word) => {
                values.push(word.to_owned());
                match lexer.take(As::Values) {
                    (Token::Comma, _) => {}
                    (Token::Close, _) => return Ok(values),
                    (_, word) => return Err(format!("found '{word}', expected: ',' or ')'")),
                }
            }
            (Token::Comma, _) => values.push(String::new()),
            (Token::Close, _) => {
                values.push(String::new());
                return Ok(values);
            }
            (_, word) => return Err(format!("found '{word}', expected: ',', or identifier")),
        }
    }
}

/// The name part of a label key.
fn check_key(key: &str) -> Result<(), String> {
    let name = key.rsplit_once('/').map_or(key, |(_, name)| name);
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    let inner = name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'));
    if inner && edge(name.chars().next()) && edge(name.chars().last()) && name.len() <= 63 {
        return Ok(());
    }
    Err(format!(
        "key: Invalid value: {key:?}: name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an \
         alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is \
         '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
    ))
}

/// A field selector: `(label, JSON pointer, value, equal)`, all must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FieldSelector(Vec<Term>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Term {
    label: String,
    pointer: String,
    value: String,
    equal: bool,
}

impl FieldSelector {
    /// Parses a selector such as `spec.nodeName=a,status.phase!=Running` for a kind with these field labels.
    pub fn parse(text: &str, labels: &[FieldLabel], custom: &[String]) -> Result<Self, Status> {
        let mut terms = Vec::new();
        for part in split(text, ',') {
            if part.is_empty() {
                continue;
            }
            let (label, value, equal) = term(&part)
                .ok_or_else(|| Status::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'")))?;
            let pointer = match label.as_str() {
                "metadata.name" => "/metadata/name".to_owned(),
                "metadata.namespace" => "/metadata/namespace".to_owned(),
                other => match labels.iter().find(|(known, _)| *known == other) {
                    Some((_, pointer)) => (*pointer).to_owned(),
                    None if custom.iter().any(|known| known == other) => format!("/{}", other.replace('.', "/")),
                    None if labels.is_empty() && custom.is_empty() => {
                        return Err(Status::bad_request(format!(
                            "{other:?} is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
                        )));
                    }
                    None => return Err(Status::bad_request(format!("field label not supported: {other}"))),
                },
            };
            terms.push(Term { label, pointer, value, equal });
        }
        Ok(Self(terms))
    }

    /// Whether it matches everything.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Value that a label must equal, when the selector says so.
    pub fn exact(&self, label: &str) -> Option<&str> {
        self.0.iter().find(|term| term.equal && term.label == label).map(|term| term.value.as_str())
    }

    /// The selector without the terms that the key of an object already answers.
    #[must_use]
    pub fn without(mut self, label: &str) -> Self {
        self.0.retain(|term| !(term.equal && term.label == label));
        self
    }

    /// Whether it may match the object of this JSON, as far as a look at the bytes tells: the values that it asks for are in there.
    pub(crate) fn may_match(&self, json: &[u8]) -> bool {
        // What absent fields stand for is not, and some characters may be written otherwise.
        let told = |value: &str| {
            let plain = |c: char| c.is_ascii_graphic() && !matches!(c, '"' | '\\' | '<' | '>' | '&');
            !matches!(value, "" | "false" | "0") && value.chars().all(plain)
        };
        let asked = self.0.iter().filter(|term| term.equal && told(&term.value));
        asked.into_iter().all(|term| memchr::memmem::find(json, term.value.as_bytes()).is_some())
    }

    /// Whether it matches an object.
    pub fn matches_object(&self, object: &Value) -> bool {
        self.0.iter().all(|term| {
            let text;
            let have = match object.pointer(&term.pointer) {
                Some(Value::String(value)) => value.as_str(),
                Some(Value::Null) | None => match term.pointer.as_str() {
                    // Absent booleans and counts have a value all the same.
                    "/spec/unschedulable" | "/spec/hostNetwork" => "false",
                    "/status/replicas" => "0",
                    // Events of today name only who reports them.
                    "/source/component" => crate::object::text(object, "/reportingComponent"),
                    _ => "",
                },
                Some(other) => {
                    text = other.to_string();
                    &text
                }
            };
            (have == term.value) == term.equal
        })
    }
}

/// Splits at a separator that no backslash escapes; escapes stay.
fn split(text: &str, separator: char) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut escaped = false;
    for c in text.chars() {
        if c == separator && !escaped {
            parts.push(String::new());
            continue;
        }
        escaped = c == '\\' && !escaped;
        parts.last_mut().expect("starts with one part").push(c);
    }
    parts
}

fn term(part: &str) -> Option<(String, String, bool)> {
    let bytes = part.as_bytes();
    for at in 0..bytes.len() {
        if at > 0 && bytes[at - 1] == b'\\' {
            continue;
        }
        let (length, equal) = match (bytes[at], bytes.get(at + 1)) {
            (b'!', Some(b'=')) => (2, false),
            (b'=', Some(b'=')) => (2, true),
            (b'=', _) => (1, true),
            _ => continue,
        };
        return Some((part[..at].trim().to_owned(), unescape(&part[at + length..])?, equal));
    }
    None
}

/// Undoes `\,`, `\=` and `\\`; anything else after a backslash is wrong.
fn unescape(value: &str) -> Option<String> {
    let mut out = String::with_capacity(value.len());
    let mut chars = value.chars();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next()? {
                c @ ('\\' | ',' | '=') => out.push(c),
                _ => return None,
            },
            '=' | ',' => return None,
            c => out.push(c),
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn label_selectors_match() {
        let object = json!({"metadata": {"labels": {"app": "web", "n": "5"}}});
        for (selector, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,n=5", true),
            ("app!=web", false),
            ("none!=web", true),
            ("app in (a, web)", true),
            ("app notin (a,b)", true),
            ("app", true),
            ("!app", false),
            ("!x", true),
            ("n>4", true),
            ("n<5", false),
            ("in=x", false),
        ] {
            let parsed = LabelSelector::parse(selector).unwrap_or_else(|e| panic!("{selector}: {e}"));
            assert_eq!(parsed.matches_object(&object), expected, "{selector}");
        }
    }

    #[test]
    fn label_errors_are_worded_as_usual() {
        let message = |text| LabelSelector::parse(text).expect_err("it is wrong").message;
        assert_eq!(message("a in (b"), "unable to parse requirement: found '', expected: ',' or ')'");
        assert_eq!(message("a,"), "found '', expected: identifier after ','");
        assert_eq!(message("a b"), "unable to parse requirement: found 'b', expected: in, notin, =, ==, !=, gt, lt");
    }

    #[test]
    fn field_selectors() {
        let labels: &[FieldLabel] = &[("spec.nodeName", "/spec/nodeName")];
        let object = json!({"metadata": {"name": "x"}, "spec": {}});
        let selector = FieldSelector::parse("metadata.name=x,spec.nodeName!=a", labels, &[]).expect("it parses");
        assert!(selector.matches_object(&object));
        let event = json!({"reportingComponent": "kubelet", "source": {}});
        let source: &[FieldLabel] = &[("source", "/source/component")];
        assert!(FieldSelector::parse("source=kubelet", source, &[]).expect("it parses").matches_object(&event));
        assert!(FieldSelector::parse("spec.nodeName=", labels, &[]).expect("it parses").matches_object(&object));
        assert_eq!(
            FieldSelector::parse("spec.x=y", &[], &[]).expect_err("unknown").message,
            "\"spec.x\" is not a known field selector: only \"metadata.name\", \"metadata.namespace\""
        );
        assert!(FieldSelector::parse("nonsense", labels, &[]).is_err());
        let may = |text: &str, json: &str| {
            let labels: &[FieldLabel] = &[("a", "/a"), ("b", "/b")];
            FieldSelector::parse(text, labels, &[]).expect("it parses").may_match(json.as_bytes())
        };
        assert!(may("a=node-1,b!=x", "{\"a\":\"node-1\"}"));
        assert!(!may("a=node-2", "{\"a\":\"node-1\"}"));
        assert!(may("a=x<y", "{\"a\":\"x\\u003cy\"}"));
        assert!(may("a=false", "{}") && may("a=\"", "{\"a\":\"\\\"\"}") && may("a=", "{}"));
    }
}
