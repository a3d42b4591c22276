//! Strings, regular expressions, formats, JSON patch keys.

use std::cell::RefCell;
use std::collections::HashMap;

use cel::common::ast::operators as op;
use regex::Regex;

use super::{Outcome, fail, int};
use crate::cel::value::Val;
use crate::gofmt;
use crate::validate::format as formats;

/// Most compiled patterns that a thread keeps.
const MAX_PATTERNS: usize = 256;
/// Most bytes that one text operation may make.
const MAX_TEXT_BYTES: usize = 4 << 20;

thread_local! {
    static PATTERNS: RefCell<HashMap<String, Regex>> = RefCell::new(HashMap::new());
}

fn with_regex<T>(pattern: &str, run: impl FnOnce(&Regex) -> T) -> Result<T, String> {
    PATTERNS.with_borrow_mut(|patterns| {
        if !patterns.contains_key(pattern) {
            let regex = Regex::new(pattern).map_err(|error| format!("error parsing regexp: {error}"))?;
            if patterns.len() >= MAX_PATTERNS {
                patterns.clear();
            }
            patterns.insert(pattern.to_owned(), regex);
        }
        patterns.get(pattern).map(run).ok_or_else(|| "error parsing regexp".to_owned())
    })
}

pub(super) fn call<'a>(name: &str, args: &[Val<'a>]) -> Option<Outcome<'a>> {
    Some(match (name, args) {
        (op::ADD, [Val::Text(a), Val::Text(b)]) => bounded(a.len() + b.len(), || format!("{a}{b}")),
        (op::ADD, [Val::Bytes(a), Val::Bytes(b)]) => Ok(Val::Bytes(a.iter().chain(b.iter()).copied().collect())),
        ("contains", [Val::Text(text), Val::Text(part)]) => Ok(Val::Bool(text.contains(part.as_ref()))),
        ("startsWith", [Val::Text(text), Val::Text(part)]) => Ok(Val::Bool(text.starts_with(part.as_ref()))),
        ("endsWith", [Val::Text(text), Val::Text(part)]) => Ok(Val::Bool(text.ends_with(part.as_ref()))),
        ("matches", [Val::Text(text), Val::Text(pattern)]) => {
            with_regex(pattern, |regex| regex.is_match(text)).map_or_else(fail, |hit| Ok(Val::Bool(hit)))
        }
        ("find", [Val::Text(text), Val::Text(pattern)]) => {
            let found = with_regex(pattern, |regex| regex.find(text).map_or("", |hit| hit.as_str()).to_owned());
            found.map_or_else(fail, |hit| Ok(Val::text(hit)))
        }
        ("findAll", [Val::Text(text), Val::Text(pattern), rest @ ..]) => {
            let limit = match rest {
                [] => usize::MAX,
                [Val::Int(limit)] => usize::try_from(*limit).unwrap_or(usize::MAX),
                _ => return None,
            };
            let found = with_regex(pattern, |regex| {
                regex.find_iter(text).take(limit).map(|hit| Val::text(hit.as_str().to_owned())).collect()
            });
            found.map_or_else(fail, |hits| Ok(Val::list(hits)))
        }
        ("charAt", [Val::Text(text), Val::Int(at)]) => {
            let at = usize::try_from(*at).unwrap_or(usize::MAX);
            match text.chars().nth(at) {
                Some(c) => Ok(Val::text(c.to_string())),
                None if at == text.chars().count() => Ok(Val::text("")),
                None => fail(format!("index out of range: {at}")),
            }
        }
        ("indexOf" | "lastIndexOf", [Val::Text(text), Val::Text(part), rest @ ..]) => position(name, text, part, rest)?,
        ("lowerAscii", [Val::Text(text)]) => Ok(Val::text(text.to_ascii_lowercase())),
        ("upperAscii", [Val::Text(text)]) => Ok(Val::text(text.to_ascii_uppercase())),
        ("trim", [Val::Text(text)]) => Ok(Val::text(text.trim().to_owned())),
        ("reverse", [Val::Text(text)]) => Ok(Val::text(text.chars().rev().collect::<String>())),
        ("quote" | "strings.quote", [Val::Text(text)]) => Ok(Val::text(gofmt::quote(text))),
        ("replace", [Val::Text(text), Val::Text(from), Val::Text(to), rest @ ..]) => {
            let limit = match rest {
                [] => -1,
                [Val::Int(limit)] => *limit,
                _ => return None,
            };
            let hits = if from.is_empty() { text.chars().count() + 1 } else { text.matches(from.as_ref()).count() };
            let hits = usize::try_from(limit).map_or(hits, |limit| hits.min(limit));
            bounded(text.len() + hits.saturating_mul(to.len()), || text.replacen(from.as_ref(), to, hits))
        }
        ("split", [Val::Text(text), Val::Text(by), rest @ ..]) => {
            let limit = match rest {
                [] => -1,
                [Val::Int(limit)] => *limit,
                _ => return None,
            };
            Ok(Val::list(split(text, by, limit).into_iter().map(Val::text).collect()))
        }
        ("substring", [Val::Text(text), Val::Int(from), rest @ ..]) => {
            let length = text.chars().count();
            let to = match rest {
                [] => int(length),
                [Val::Int(to)] => *to,
                _ => return None,
            };
            match (usize::try_from(*from), usize::try_from(to)) {
                (Ok(from), Ok(to)) if from <= to && to <= length => {
                    Ok(Val::text(text.chars().skip(from).take(to - from).collect::<String>()))
                }
                _ => fail(format!("index out of range: {from}")),
            }
        }
        ("join", [list, rest @ ..]) if list.items().is_some() => {
            let by = match rest {
                [] => "",
                [Val::Text(by)] => by.as_ref(),
                _ => return None,
            };
            let mut parts = Vec::new();
            for item in list.items()? {
                let Val::Text(part) = item else { return None };
                parts.push(part);
            }
            bounded(parts.iter().map(|part| part.len() + by.len()).sum(), || parts.join(by))
        }
        ("format", [Val::Text(template), list]) => format(template, &list.items()?),
        ("jsonpatch.escapeKey", [Val::Text(text)]) => Ok(Val::text(text.replace('~', "~0").replace('/', "~1"))),
        ("format.named", [Val::Text(name)]) => {
            Ok(named(name).map_or(Val::Optional(None), |name| Val::some(Val::Format(name))))
        }
        ("validate", [Val::Format(name), Val::Text(text)]) => {
            let errors = problems(name, text);
            Ok(if errors.is_empty() {
                Val::Optional(None)
            } else {
                Val::some(Val::list(errors.into_iter().map(Val::text).collect()))
            })
        }
        (name, []) => Ok(Val::Format(named(name.strip_prefix("format.")?)?)),
        _ => return None,
    })
}

/// A text that is made only when it is not too long.
fn bounded<'a>(bytes: usize, make: impl FnOnce() -> String) -> Outcome<'a> {
    if bytes > MAX_TEXT_BYTES { fail("string is too long") } else { Ok(Val::text(make())) }
}

fn position<'a>(name: &str, text: &str, part: &str, rest: &[Val<'a>]) -> Option<Outcome<'a>> {
    let chars: Vec<char> = text.chars().collect();
    let part: Vec<char> = part.chars().collect();
    let from = match rest {
        [] => None,
        [Val::Int(from)] => match usize::try_from(*from) {
            Ok(from) if from <= chars.len() => Some(from),
            _ => return Some(fail(format!("index out of range: {from}"))),
        },
        _ => return None,
    };
    let matches = |at: usize| chars.get(at..at + part.len()).is_some_and(|window| window == part);
    let last = chars.len().saturating_sub(part.len());
    let found = if name == "indexOf" {
        (from.unwrap_or(0)..=last).find(|at| matches(*at))
    } else {
        (0..=from.unwrap_or(last).min(last)).rev().find(|at| matches(*at))
    };
    Some(Ok(Val::Int(found.map_or(-1, int))))
}

/// As Go's `SplitN`: an empty separator splits between characters.
fn split(text: &str, by: &str, limit: i64) -> Vec<String> {
    let limit = match limit {
        0 => return Vec::new(),
        negative if negative < 0 => usize::MAX,
        limit => usize::try_from(limit).unwrap_or(usize::MAX),
    };
    if by.is_empty() {
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        if parts.len() > limit {
            let rest = parts.split_off(limit - 1).concat();
            parts.push(rest);
        }
        return parts;
    }
    text.splitn(limit, by).map(str::to_owned).collect()
}

/// `"%s is %d".format([…])`
fn format<'a>(template: &str, args: &[Val<'a>]) -> Outcome<'a> {
    let mut out = String::new();
    let mut args = args.iter();
    let mut chars = template.chars().peekable();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        if chars.next_if_eq(&'%').is_some() {
            out.push('%');
            continue;
        }
        let mut precision = None;
        if chars.next_if_eq(&'.').is_some() {
            let mut digits = 0_usize;
            while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
                digits = (digits * 10 + digit as usize).min(100);
                chars.next();
            }
            precision = Some(digits);
        }
        let (Some(verb), Some(arg)) = (chars.next(), args.next()) else { return fail("index out of range in format") };
        match (verb, arg) {
            ('s', arg) => out.push_str(&shown(arg)),
            ('d', Val::Int(int)) => out.push_str(&int.to_string()),
            ('d', Val::Uint(int)) => out.push_str(&int.to_string()),
            ('f', Val::Double(float)) => out.push_str(&format!("{float:.*}", precision.unwrap_or(6))),
            ('e', Val::Double(float)) => out.push_str(&format!("{float:.*e}", precision.unwrap_or(6))),
            ('b', Val::Int(int)) => out.push_str(&format!("{int:b}")),
            ('b', Val::Bool(flag)) => out.push(if *flag { '1' } else { '0' }),
            ('o', Val::Int(int)) => out.push_str(&format!("{int:o}")),
            ('x', Val::Int(int)) => out.push_str(&format!("{int:x}")),
            ('X', Val::Int(int)) => out.push_str(&format!("{int:X}")),
            ('x', Val::Text(text)) => text.bytes().for_each(|byte| out.push_str(&format!("{byte:02x}"))),
            (verb, _) => {
                return fail(format!("could not parse formatting clause: unrecognized formatting clause \"{verb}\""));
            }
        }
        if out.len() > MAX_TEXT_BYTES {
            return fail("string is too long");
        }
    }
    Ok(Val::text(out))
}

fn shown(value: &Val<'_>) -> String {
    if let Some(items) = value.items() {
        let items: Vec<String> = items.iter().map(shown).collect();
        return format!("[{}]", items.join(", "));
    }
    if let Some(entries) = value.entries() {
        let mut entries: Vec<String> =
            entries.iter().map(|(key, value)| format!("{}: {}", shown(key), shown(value))).collect();
        entries.sort();
        return format!("{{{}}}", entries.join(", "));
    }
    match value {
        Val::Duration(nanos) => {
            let mut text = String::new();
            gofmt::float_into(&mut text, *nanos as f64 / 1e9);
            text + "s"
        }
        Val::Double(float) => {
            let mut text = String::new();
            gofmt::float_into(&mut text, *float);
            text
        }
        other => match other.to_json() {
            Some(serde_json::Value::String(text)) => text,
            Some(json) => json.to_string(),
            None => other.type_name().to_owned(),
        },
    }
}

const NAMED: [&str; 13] = [
    "dns1123Label",
    "dns1123Subdomain",
    "dns1035Label",
    "qualifiedName",
    "dns1123LabelPrefix",
    "dns1123SubdomainPrefix",
    "dns1035LabelPrefix",
    "labelValue",
    "uri",
    "uuid",
    "byte",
    "date",
    "datetime",
];

fn named(name: &str) -> Option<&'static str> {
    NAMED.iter().find(|own| **own == name).copied()
}

/// What is wrong with a text of a named format.
fn problems(name: &str, text: &str) -> Vec<String> {
    let label = |text: &str| text.len() <= 63 && formats::fits("k8s-short-name", text);
    let starts_with_letter = text.starts_with(|c: char| c.is_ascii_lowercase());
    let base = text.strip_suffix('-').unwrap_or(text);
    let good = match name {
        "dns1123Label" => label(text),
        "dns1123Subdomain" => formats::fits("k8s-long-name", text),
        "dns1035Label" => label(text) && starts_with_letter,
        "dns1123LabelPrefix" => label(base),
        "dns1123SubdomainPrefix" => formats::fits("k8s-long-name", base),
        "dns1035LabelPrefix" => label(base) && starts_with_letter,
        "labelValue" => is_label_value(text),
        "qualifiedName" => is_qualified_name(text),
        "datetime" => formats::fits("date-time", text),
        other => formats::fits(other, text),
    };
    if good { Vec::new() } else { vec![format!("must be a valid {name}")] }
}

fn is_label_value(text: &str) -> bool {
    let ends = |c: Option<char>| c.is_none_or(|c| c.is_ascii_alphanumeric());
    text.len() <= 63
        && ends(text.chars().next())
        && ends(text.chars().last())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
}

fn is_qualified_name(text: &str) -> bool {
    let (prefix, name) = text.split_once('/').map_or((None, text), |(prefix, name)| (Some(prefix), name));
    !name.is_empty()
        && is_label_value(name)
        && prefix.is_none_or(|prefix| formats::fits("k8s-long-name", prefix) && !prefix.is_empty())
}
