//! Links of a web server behind the proxy: a path that is absolute there stands below one of ours here. `Location` headers and the
//! links of HTML pages are moved, as clients of `…/proxy/` expect; all other bytes of a page stay as they are.

use std::ops::Range;

use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};

/// What is taken for one tag; a longer one is none.
const TAG_MAX_BYTES: usize = 64 * 1024;
/// Attributes that hold a link, and the tags they do so on (HTML 4.01, index of attributes, and the HTML living standard).
const LINKS: [(&str, &[&str]); 14] = [
    ("href", &["a", "area", "base", "link"]),
    ("src", &["audio", "embed", "frame", "iframe", "img", "input", "script", "source", "video"]),
    ("cite", &["blockquote", "del", "ins", "q"]),
    ("action", &["form"]),
    ("formaction", &["button", "input"]),
    ("background", &["body"]),
    ("codebase", &["applet", "object"]),
    ("longdesc", &["frame", "iframe", "img"]),
    ("usemap", &["img", "input", "object"]),
    ("poster", &["video"]),
    ("data", &["object"]),
    ("classid", &["object"]),
    ("manifest", &["html"]),
    ("profile", &["head"]),
];
/// Elements whose content is no markup.
const RAW: [&str; 4] = ["script", "style", "textarea", "title"];

/// Where the other end's paths appear.
#[derive(Clone, Debug)]
pub(super) struct Links {
    /// Path of this server, without a slash at its end.
    pub(super) base: String,
    /// `host:port` of the other end.
    pub(super) backend: String,
    /// `host:port` that the client asked.
    pub(super) asked: String,
}

impl Links {
    /// A link as it is seen from here; `None` if it stays: relative, to another host, or moved already.
    pub(super) fn moved(&self, link: &str) -> Option<String> {
        let scheme = |text: &str| {
            text.is_empty() || text.strip_suffix(':').is_some_and(|s| s.bytes().all(|b| b.is_ascii_alphanumeric()))
        };
        let (origin, path) = match link.find("//").filter(|at| scheme(&link[..*at])) {
            Some(at) => {
                let end = link[at + 2..].find(['/', '?', '#']).map_or(link.len(), |end| at + 2 + end);
                let host = &link[at + 2..end];
                match host {
                    host if host == self.asked => link.split_at(end),
                    host if host == self.backend => ("", &link[end..]),
                    _ => return None,
                }
            }
            None => ("", link),
        };
        let stays = !path.starts_with('/') || path.starts_with(&self.base);
        (!stays).then(|| format!("{origin}{}{path}", self.base))
    }

    /// A page with its links moved.
    pub(super) fn page<E>(
        self,
        body: impl Stream<Item = Result<Bytes, E>> + Unpin,
    ) -> impl Stream<Item = Result<Bytes, E>> {
        let page = Page { links: self, held: Vec::new(), raw: None };
        stream::unfold(Some((page, body)), async |state| {
            let (mut page, mut body) = state?;
            Some(match body.next().await {
                Some(Ok(chunk)) => (Ok(page.take(&chunk).into()), Some((page, body))),
                Some(Err(error)) => (Err(error), None),
                None => (Ok(page.held.into()), None),
            })
        })
    }
}

/// Where in some bytes links stand that are replaced, and by what.
type Moved = Vec<(Range<usize>, String)>;

/// A page as far as it has come.
struct Page {
    links: Links,
    /// The beginning of a tag whose end has not come.
    held: Vec<u8>,
    /// Inside of this element no tag but its own end is one.
    raw: Option<&'static str>,
}

/// A tag with its bytes up to `end`.
struct Tag {
    name: String,
    end: usize,
    /// Links to replace.
    moved: Moved,
}

impl Page {
    /// What can be passed on now that `chunk` has come.
    fn take(&mut self, chunk: &[u8]) -> Vec<u8> {
        self.held.extend_from_slice(chunk);
        let bytes = std::mem::take(&mut self.held);
        let mut out = Vec::with_capacity(bytes.len());
        let mut rest = bytes.as_slice();
        while let Some(start) = rest.iter().position(|byte| *byte == b'<') {
            out.extend_from_slice(&rest[..start]);
            rest = &rest[start..];
            match self.markup(rest) {
                Some((end, moved)) => {
                    let mut copied = 0;
                    for (range, link) in moved {
                        out.extend_from_slice(&rest[copied..range.start]);
                        out.extend_from_slice(link.as_bytes());
                        copied = range.end;
                    }
                    out.extend_from_slice(&rest[copied..end]);
                    rest = &rest[end..];
                }
                None if rest.len() < TAG_MAX_BYTES => {
                    self.held = rest.to_vec();
                    return out;
                }
                None => {
                    out.push(b'<');
                    rest = &rest[1..];
                }
            }
        }
        out.extend_from_slice(rest);
        out
    }

    /// The length of the markup that `bytes` begin with, and the links in it to replace; `None` if its end is missing.
    fn markup(&mut self, bytes: &[u8]) -> Option<(usize, Moved)> {
        const COMMENT: (&[u8], &[u8]) = (b"<!--", b"-->");
        let one = Some((1, Moved::new()));
        if let Some(element) = self.raw {
            let end = bytes.get(..element.len() + 2)?;
            if end[1] == b'/' && end[2..].eq_ignore_ascii_case(element.as_bytes()) {
                self.raw = None;
            }
            return one;
        }
        if bytes.starts_with(COMMENT.0) {
            let end = bytes.windows(COMMENT.1.len()).position(|window| window == COMMENT.1)?;
            return Some((end + COMMENT.1.len(), Vec::new()));
        }
        if COMMENT.0.starts_with(bytes) {
            return None;
        }
        if !bytes[1].is_ascii_alphabetic() {
            return one;
        }
        let tag = self.tag(bytes)?;
        self.raw = RAW.into_iter().find(|raw| *raw == tag.name);
        Some((tag.end, tag.moved))
    }

    fn tag(&self, bytes: &[u8]) -> Option<Tag> {
        let until = |from: usize, stop: &dyn Fn(u8) -> bool| {
            bytes[from..].iter().position(|byte| stop(*byte)).map(|length| from + length)
        };
        let lower = |range: Range<usize>| String::from_utf8_lossy(&bytes[range]).to_ascii_lowercase();
        let space = |byte: u8| byte.is_ascii_whitespace();
        let mut at = until(1, &|byte| space(byte) || matches!(byte, b'/' | b'>'))?;
        let mut tag = Tag { name: lower(1..at), end: 0, moved: Vec::new() };
        loop {
            at = until(at, &|byte| !space(byte) && byte != b'/')?;
            if bytes[at] == b'>' {
                tag.end = at + 1;
                return Some(tag);
            }
            let start = at;
            at = until(start + 1, &|byte| space(byte) || matches!(byte, b'/' | b'>' | b'='))?;
            let name = lower(start..at);
            at = until(at, &|byte| !space(byte))?;
            if bytes[at] != b'=' {
                continue;
            }
            at = until(at + 1, &|byte| !space(byte))?;
            let quote = bytes[at];
            let value = if matches!(quote, b'"' | b'\'') {
                let end = until(at + 1, &|byte| byte == quote)?;
                std::mem::replace(&mut at, end + 1) + 1..end
            } else {
                let end = until(at, &|byte| space(byte) || byte == b'>')?;
                std::mem::replace(&mut at, end)..end
            };
            let is_link = LINKS.iter().any(|(link, tags)| *link == name && tags.contains(&tag.name.as_str()));
            let link = std::str::from_utf8(&bytes[value.clone()]).ok().filter(|_| is_link);
            tag.moved.extend(link.and_then(|link| self.links.moved(link)).map(|link| (value, link)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn links() -> Links {
        Links { base: "/base/proxy".into(), backend: "10.42.0.5:80".into(), asked: "api:6443".into() }
    }

    #[test]
    fn links_of_the_other_end_are_moved_and_others_stay() {
        for (link, moved) in [
            ("/a/b?c#d", Some("/base/proxy/a/b?c#d")),
            ("http://10.42.0.5:80/a/", Some("/base/proxy/a/")),
            ("https://api:6443/a", Some("https://api:6443/base/proxy/a")),
            ("//10.42.0.5:80/a", Some("/base/proxy/a")),
            ("/base/proxy/a", None),
            ("http://elsewhere.example/a", None),
            ("//elsewhere.example/a", None),
            ("a/b", None),
            ("#here", None),
            ("mailto:me", None),
        ] {
            assert_eq!(links().moved(link).as_deref(), moved, "{link}");
        }
    }

    #[test]
    fn a_page_is_moved_wherever_it_is_cut() {
        let page = concat!(
            "<!DOCTYPE html>1 < 2<A class=x HREF='/one'>a</a><img alt='>' src=/two/><div href=\"/no\">",
            "<!-- <a href='/no'> --><script src = \"/three\">if (a<b) '<a href=\"/no\">'</script>",
            "<form action=\"relative\"><a href='/four' hidden>ü</a><a href=\"/",
        );
        let wanted = concat!(
            "<!DOCTYPE html>1 < 2<A class=x HREF='/base/proxy/one'>a</a><img alt='>' src=/base/proxy/two/><div href=\"/no\">",
            "<!-- <a href='/no'> --><script src = \"/base/proxy/three\">if (a<b) '<a href=\"/no\">'</script>",
            "<form action=\"relative\"><a href='/base/proxy/four' hidden>ü</a><a href=\"/",
        );
        for cut in 0..=page.len() {
            let (first, last) = page.as_bytes().split_at(cut);
            let chunks = [first, last].map(|chunk| Ok::<_, ()>(Bytes::copy_from_slice(chunk)));
            let moved = futures::executor::block_on_stream(Box::pin(links().page(stream::iter(chunks))));
            let moved: Vec<u8> = moved.flat_map(|chunk| chunk.expect("no error")).collect();
            assert_eq!(String::from_utf8(moved).expect("UTF-8"), wanted, "cut at {cut}");
        }
    }

    #[test]
    fn what_never_ends_is_no_tag() {
        let mut page = Page { links: links(), held: Vec::new(), raw: None };
        let text = [b"<a ".as_slice(), &vec![b'x'; TAG_MAX_BYTES]].concat();
        assert_eq!(page.take(&text), text);
    }
}
