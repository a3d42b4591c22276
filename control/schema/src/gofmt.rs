//! Values printed as the API server's messages print them: Go's `%q`, `%v` and `encoding/json`.

use std::fmt::Write as _;

use serde_json::Value;

/// Appends `text` quoted as Go's `%q` does.
pub fn quote_into(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{b}' => out.push_str("\\v"),
            c if (c as u32) < 0x20 || c as u32 == 0x7f => push_fmt(out, format_args!("\\x{:02x}", c as u32)),
            c if c.is_control() || (c.is_whitespace() && c != ' ') => push_escape(out, c),
            c => out.push(c),
        }
    }
    out.push('"');
}

/// `text` as Go's `%q` prints it.
pub fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    quote_into(&mut out, text);
    out
}

/// Appends a bad value as field errors show it: simple values plain, strings quoted, the rest as JSON.
pub fn value_into(out: &mut String, value: &Value) {
    match value {
        Value::String(text) => quote_into(out, text),
        Value::Number(number) => number_into(out, number),
        other => json_into(out, other),
    }
}

/// Appends `value` as Go's `encoding/json` writes it: compact, `<`, `>`, `&` escaped.
pub fn json_into(out: &mut String, value: &Value) {
    match value {
        Value::Null => out.push_str("null"),
        Value::Bool(flag) => out.push_str(if *flag { "true" } else { "false" }),
        Value::Number(number) => number_into(out, number),
        Value::String(text) => json_string_into(out, text),
        Value::Array(items) => {
            out.push('[');
            for (i, item) in items.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                json_into(out, item);
            }
            out.push(']');
        }
        Value::Object(fields) => {
            out.push('{');
            for (i, (name, field)) in fields.iter().enumerate() {
                if i > 0 {
                    out.push(',');
                }
                json_string_into(out, name);
                out.push(':');
                json_into(out, field);
            }
            out.push('}');
        }
    }
}

/// `value` as Go's `encoding/json` writes it.
pub fn json(value: &Value) -> String {
    let mut out = String::new();
    json_into(&mut out, value);
    out
}

fn json_string_into(out: &mut String, text: &str) {
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '<' | '>' | '&' | '\u{2028}' | '\u{2029}' => push_escape(out, c),
            c if (c as u32) < 0x20 => push_escape(out, c),
            c => out.push(c),
        }
    }
    out.push('"');
}

fn number_into(out: &mut String, number: &serde_json::Number) {
    match number.as_f64() {
        Some(float) if number.is_f64() => float_into(out, float),
        _ => push_fmt(out, format_args!("{number}")),
    }
}

/// Appends a float as Go's `%v`: shortest digits, an exponent below 1e-4 and from 1e21 on.
pub fn float_into(out: &mut String, float: f64) {
    let size = float.abs();
    if float == 0.0 || (1e-4..1e21).contains(&size) || !float.is_finite() {
        return push_fmt(out, format_args!("{float}"));
    }
    let text = format!("{float:e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |rest| ('-', rest));
    push_fmt(out, format_args!("{digits}e{sign}{exponent:0>2}"));
}

fn push_escape(out: &mut String, c: char) {
    let code = c as u32;
    if code <= 0xffff {
        push_fmt(out, format_args!("\\u{code:04x}"));
    } else {
        push_fmt(out, format_args!("\\U{code:08x}"));
    }
}

fn push_fmt(out: &mut String, args: std::fmt::Arguments<'_>) {
    out.write_fmt(args).expect("writing to a String cannot fail");
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn prints_like_go() {
        assert_eq!(quote("a\"b\n\u{1}é"), "\"a\\\"b\\n\\x01é\"");
        let mut out = String::new();
        for float in [1.0, 1.5, 1e21, 1e-5, 123_456_789.0] {
            float_into(&mut out, float);
            out.push(' ');
        }
        assert_eq!(out, "1 1.5 1e+21 1e-05 123456789 ");
        assert_eq!(json(&json!({"a": ["<", 1, null, true]})), r#"{"a":["\u003c",1,null,true]}"#);
    }
}
