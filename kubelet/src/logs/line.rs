//! One line of a CRI log: `2016-10-06T00:17:09.669794202Z stdout F the text`. Source: kubernetes `design-proposals`,
//! kubelet-cri-logging; containerd writes the same.

/// Where a line was written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// A parsed line, borrowing from the file's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogLine<'a> {
    /// RFC 3339 with nanoseconds, as written.
    pub time: &'a str,
    /// Its stream.
    pub stream: Stream,
    /// Whether the program's line goes on in the next log line.
    pub partial: bool,
    /// The text, without the newline.
    pub text: &'a [u8],
}

impl LogLine<'_> {
    /// The time as a point in time; `None` if it is malformed.
    pub fn timestamp(&self) -> Option<jiff::Timestamp> {
        self.time.parse().ok()
    }
}

/// Parses a line without its newline; `None` if it is not of the form.
pub fn parse(line: &[u8]) -> Option<LogLine<'_>> {
    let mut fields = line.splitn(4, |byte| *byte == b' ');
    let time = std::str::from_utf8(fields.next()?).ok()?;
    // Cheap test of form; the full parse happens only where the time matters.
    if time.len() < 20 || !time.as_bytes()[0].is_ascii_digit() {
        return None;
    }
    let stream = match fields.next()? {
        b"stdout" => Stream::Stdout,
        b"stderr" => Stream::Stderr,
        _ => return None,
    };
    // Tags are separated by colons; the first says whether the line is partial.
    let partial = match fields.next()?.split(|byte| *byte == b':').next()? {
        b"F" => false,
        b"P" => true,
        _ => return None,
    };
    Some(LogLine { time, stream, partial, text: fields.next().unwrap_or_default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn lines_are_parsed() {
        let line = parse(b"2016-10-06T00:17:09.669794202Z stdout F a b  c").expect("valid");
        assert_eq!((line.stream, line.partial, line.text), (Stream::Stdout, false, b"a b  c".as_slice()));
        assert!(parse(b"2016-10-06T00:17:09.669794202Z stderr P:x y").expect("valid").partial);
        assert_eq!(parse(b"2016-10-06T00:17:09.669794202Z stdout F ").expect("empty text").text, b"");
        for bad in [
            b"".as_slice(),
            b"x",
            b"2016-10-06T00:17:09.669794202Z other F x",
            b"2016-10-06T00:17:09.669794202Z stdout X y",
        ] {
            assert_eq!(parse(bad), None);
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(text in prop::collection::vec(any::<u8>().prop_filter("newline", |b| *b != b'\n'), 0..100), partial: bool, err: bool) {
            let mut line = format!("2026-01-31T01:02:03.000000001Z {} {} ", if err { "stderr" } else { "stdout" }, if partial { "P" } else { "F" }).into_bytes();
            line.extend(&text);
            let parsed = parse(&line).expect("valid");
            prop_assert_eq!(parsed.text, text.as_slice());
            prop_assert_eq!(parsed.partial, partial);
            prop_assert!(parsed.timestamp().is_some());
        }

        #[test]
        fn parsing_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(line) = parse(&bytes) {
                let _time = line.timestamp();
            }
        }
    }
}
