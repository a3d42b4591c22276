//! JSON in the very bytes that Go's `encoding/json` writes: clients of ours compare such bytes (kubectl compares the data of a
//! ControllerRevision with a template that it encodes itself).

use std::io::{self, Write};

use serde::Serialize;
use serde_json::ser::{Formatter, Serializer};

/// Writes text as Go does: safe to stand within HTML and JavaScript.
struct GoText;

impl Formatter for GoText {
    fn write_string_fragment<W: ?Sized + Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        // The line separators U+2028 and U+2029 begin with this byte in UTF-8.
        const LEAD: u8 = 0xE2;
        let mut plain = 0;
        for (at, byte) in fragment.bytes().enumerate() {
            if !matches!(byte, b'<' | b'>' | b'&' | LEAD) {
                continue;
            }
            let Some(found) = fragment[at..]
                .chars()
                .next()
                .filter(|found| *found < '\u{80}' || matches!(found, '\u{2028}' | '\u{2029}'))
            else {
                continue;
            };
            writer.write_all(&fragment.as_bytes()[plain..at])?;
            write!(writer, "\\u{:04x}", u32::from(found))?;
            plain = at + found.len_utf8();
        }
        writer.write_all(&fragment.as_bytes()[plain..])
    }
}

/// Appends a value as Go would write it.
///
/// # Errors
/// When the value has no JSON form.
pub fn append(json: &mut Vec<u8>, value: &(impl Serialize + ?Sized)) -> Result<(), serde_json::Error> {
    value.serialize(&mut Serializer::with_formatter(json, GoText))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_escaped_as_go_does() {
        let text = "a<b>&c\u{2028}\u{2029} \"€…\" \u{1}\n</a>";
        let mut json = Vec::new();
        append(&mut json, &serde_json::json!({ "k<": text, "n": [1, null, true] })).expect("JSON");
        let written = String::from_utf8(json).expect("UTF-8");
        let wanted = "{\"k\\u003c\":\"a\\u003cb\\u003e\\u0026c\\u2028\\u2029 \\\"€…\\\" \\u0001\\n\\u003c/a\\u003e\",\"n\":[1,null,true]}";
        assert_eq!(written, wanted);
        assert_eq!(serde_json::from_str::<serde_json::Value>(&written).expect("JSON")["k<"], text);
    }
}
