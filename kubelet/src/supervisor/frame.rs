//! The line format of CRI logs: `<RFC 3339 time with nanoseconds> <stdout|stderr> <F|P> <text>\n`.
//!
//! `F` marks the end of a line of the program, `P` a piece of a longer one. Source: `k8s.io/design-proposals`,
//! "CRI: dockershim … logging"; the limit of a piece is containerd's.

/// Most bytes of the program's text in one log line.
pub const LINE_LIMIT_BYTES: usize = 16 << 10;

/// Which stream a line came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or the terminal.
    Stdout,
    /// Standard error.
    Stderr,
}

impl Stream {
    fn word(self) -> &'static [u8] {
        match self {
            Self::Stdout => b" stdout ",
            Self::Stderr => b" stderr ",
        }
    }
}

/// Appends to `out` the log lines of what is complete in `input` and returns how many bytes of it that was.
///
/// Complete is a line with its newline, or [`LINE_LIMIT_BYTES`] without one; at the end of the stream (`ended`) also what is
/// left, as a piece whose line never ended. The caller keeps the rest and gives it again with more behind it.
pub fn frame(input: &[u8], stream: Stream, time: &str, ended: bool, out: &mut Vec<u8>) -> usize {
    let mut done = 0;
    while done < input.len() {
        let rest = &input[done..];
        let window = &rest[..rest.len().min(LINE_LIMIT_BYTES + 1)];
        let (text, tag, taken) = match memchr::memchr(b'\n', window) {
            Some(end) => (&rest[..end], b"F ", end + 1),
            None if rest.len() > LINE_LIMIT_BYTES => (&rest[..LINE_LIMIT_BYTES], b"P ", LINE_LIMIT_BYTES),
            None if ended => (rest, b"P ", rest.len()),
            None => break,
        };
        out.extend_from_slice(time.as_bytes());
        out.extend_from_slice(stream.word());
        out.extend_from_slice(tag);
        out.extend_from_slice(text);
        out.push(b'\n');
        done += taken;
    }
    done
}

/// The program's text in log lines that [`frame`] wrote, newlines of full lines included. `None` if they are not whole.
///
/// Used after a crash to tell whether text that is still in the pipe was already written.
pub fn text_of(log: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(log.len());
    for line in log.split_inclusive(|b| *b == b'\n') {
        let line = line.strip_suffix(b"\n")?;
        let mut fields = line.splitn(4, |b| *b == b' ');
        let (_time, _stream, tag, rest) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        text.extend_from_slice(rest);
        if tag == b"F" {
            text.push(b'\n');
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TIME: &str = "2016-10-06T00:17:09.669794202Z";

    #[test]
    fn lines_look_as_documented() {
        let mut out = Vec::new();
        assert_eq!(frame(b"line\nrest", Stream::Stdout, TIME, false, &mut out), 5);
        assert_eq!(out, b"2016-10-06T00:17:09.669794202Z stdout F line\n");
        out.clear();
        assert_eq!(frame(b"rest", Stream::Stderr, TIME, true, &mut out), 4);
        assert_eq!(out, b"2016-10-06T00:17:09.669794202Z stderr P rest\n");
    }

    #[test]
    fn a_line_of_exactly_the_limit_is_one_line() {
        let mut line = vec![b'x'; LINE_LIMIT_BYTES];
        let mut out = Vec::new();
        assert_eq!(frame(&line, Stream::Stdout, TIME, false, &mut out), 0);
        line.push(b'\n');
        assert_eq!(frame(&line, Stream::Stdout, TIME, false, &mut out), LINE_LIMIT_BYTES + 1);
        assert!(out.windows(9).any(|w| w == b" stdout F"));
        out.clear();
        line[LINE_LIMIT_BYTES] = b'x';
        assert_eq!(frame(&line, Stream::Stdout, TIME, false, &mut out), LINE_LIMIT_BYTES);
        assert!(out.windows(9).any(|w| w == b" stdout P"));
    }

    proptest! {
        /// However the bytes arrive, the text in the log is the text that was written.
        #[test]
        fn nothing_is_lost_or_added(
            lines in prop::collection::vec(prop_oneof![Just(3usize), Just(0), 1usize..200, LINE_LIMIT_BYTES - 2..3 * LINE_LIMIT_BYTES], 0..8),
            cuts in prop::collection::vec(1usize..20_000, 1..12),
        ) {
            let mut input = Vec::new();
            for (n, length) in lines.iter().enumerate() {
                input.extend(std::iter::repeat_n(b'a' + (n % 26) as u8, *length));
                input.push(b'\n');
            }
            let (mut kept, mut out, mut at, mut cut) = (Vec::new(), Vec::new(), 0, cuts.iter().cycle());
            while at < input.len() {
                let next = (at + cut.next().expect("cycle")).min(input.len());
                kept.extend_from_slice(&input[at..next]);
                at = next;
                let done = frame(&kept, Stream::Stdout, TIME, at == input.len(), &mut out);
                kept.drain(..done);
                prop_assert!(kept.len() <= LINE_LIMIT_BYTES);
            }
            prop_assert_eq!(text_of(&out).expect("whole lines"), input);
        }
    }
}
