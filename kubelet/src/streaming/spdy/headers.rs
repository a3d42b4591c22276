//! Header blocks: name/value pairs, compressed with a dictionary over the life of a connection: §2.6.10 of the draft.

use std::sync::LazyLock;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

/// Pairs of one block.
const MAX_PAIRS: u32 = 256;
/// Bytes of one block, uncompressed.
const MAX_BLOCK_BYTES: usize = 64 << 10;

/// The dictionary's first part: words, each with its length before it.
const WORDS: &str = "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age \
    allow authorization cache-control connection content-base content-encoding content-language content-length \
    content-location content-md5 content-range content-type date etag expect expires from host if-match if-modified-since \
    if-none-match if-range if-unmodified-since last-modified location max-forwards pragma proxy-authenticate \
    proxy-authorization range referer retry-after server te trailer transfer-encoding upgrade user-agent vary via warning \
    www-authenticate method get status 200_OK version HTTP/1.1 url public set-cookie keep-alive origin";
/// The second part, as it is.
const TAIL: &str = concat!(
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505",
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized",
    "403 Forbidden404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable",
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT",
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,",
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0.",
);

static DICTIONARY: LazyLock<Vec<u8>> = LazyLock::new(|| {
    let mut bytes = Vec::new();
    for word in WORDS.split_whitespace() {
        let word = word.replace('_', " ");
        bytes.put_u32(word.len() as u32);
        bytes.put_slice(word.as_bytes());
    }
    bytes.put_slice(TAIL.as_bytes());
    bytes
});

/// Compresses and decompresses the header blocks of one connection, in order.
pub struct HeaderCodec {
    inflate: Decompress,
    deflate: Compress,
    dictionary_set: bool,
}

impl Default for HeaderCodec {
    fn default() -> Self {
        let mut deflate = Compress::new(Compression::default(), true);
        // Fails only on a stream that has begun.
        let set = deflate.set_dictionary(&DICTIONARY).is_ok();
        debug_assert!(set);
        Self { inflate: Decompress::new(true), deflate, dictionary_set: false }
    }
}

impl HeaderCodec {
    /// Reads a block; `None` if it is malformed, after which the connection cannot go on.
    pub fn decode(&mut self, block: &[u8]) -> Option<Vec<(String, String)>> {
        let mut plain = Vec::with_capacity(1024);
        let mut input = block;
        loop {
            if plain.len() > MAX_BLOCK_BYTES {
                return None;
            }
            plain.reserve(1024);
            let (read, written) = (self.inflate.total_in(), self.inflate.total_out());
            let outcome = self.inflate.decompress_vec(input, &mut plain, FlushDecompress::Sync);
            let consumed = usize::try_from(self.inflate.total_in() - read).ok()?;
            input = &input[consumed..];
            match outcome {
                Ok(Status::StreamEnd) => break,
                Ok(_) => {
                    let progress = consumed > 0 || self.inflate.total_out() > written;
                    if input.is_empty() && plain.len() < plain.capacity() || !progress {
                        break;
                    }
                }
                Err(error) if error.needs_dictionary().is_some() && !self.dictionary_set => {
                    self.inflate.set_dictionary(&DICTIONARY).ok()?;
                    self.dictionary_set = true;
                }
                Err(_) => return None,
            }
        }
        parse(Bytes::from(plain))
    }

    /// Writes a block; names are lower-case, as the draft wants.
    pub fn encode(&mut self, headers: &[(&str, &str)]) -> Bytes {
        let mut plain = BytesMut::new();
        plain.put_u32(headers.len() as u32);
        for (name, value) in headers {
            for text in [name.to_ascii_lowercase().as_str(), value] {
                plain.put_u32(text.len() as u32);
                plain.put_slice(text.as_bytes());
            }
        }
        let mut block = Vec::with_capacity(plain.len() + 128);
        let mut input = plain.as_ref();
        loop {
            let read = self.deflate.total_in();
            // Deflating cannot fail for want of anything but room, which it gets.
            let outcome = self.deflate.compress_vec(input, &mut block, FlushCompress::Sync);
            debug_assert!(outcome.is_ok());
            let consumed = usize::try_from(self.deflate.total_in() - read).unwrap_or(input.len());
            input = &input[consumed.min(input.len())..];
            if outcome.is_err() || input.is_empty() && block.len() < block.capacity() {
                return block.into();
            }
            block.reserve(256);
        }
    }
}

/// Count, then length and text of each name and value.
fn parse(mut plain: Bytes) -> Option<Vec<(String, String)>> {
    let count = plain.try_get_u32().ok()?;
    if count > MAX_PAIRS {
        return None;
    }
    let mut text = || {
        let length = usize::try_from(plain.try_get_u32().ok()?).ok()?;
        if length > plain.len() {
            return None;
        }
        String::from_utf8(plain.split_to(length).to_vec()).ok()
    };
    (0..count).map(|_| Some((text()?.to_ascii_lowercase(), text()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The dictionary's checksum stands in every stream that uses it, so this is what peers compare.
    #[test]
    fn the_dictionary_is_the_drafts() {
        assert_eq!(DICTIONARY.len(), 1423);
        let (mut a, mut b) = (1u32, 0u32);
        for byte in DICTIONARY.iter() {
            a = (a + u32::from(*byte)) % 65521;
            b = (b + a) % 65521;
        }
        assert_eq!(b << 16 | a, 0xe3c6_a7c2);
    }

    proptest! {
        #[test]
        fn blocks_survive_in_sequence(blocks in prop::collection::vec(prop::collection::vec(("[a-z]{1,10}", "\\PC{0,40}"), 0..6), 1..6)) {
            let (mut writer, mut reader) = (HeaderCodec::default(), HeaderCodec::default());
            for block in blocks {
                let pairs: Vec<(&str, &str)> = block.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
                let wire = writer.encode(&pairs);
                prop_assert_eq!(reader.decode(&wire), Some(block.clone()));
            }
        }

        #[test]
        fn reading_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            HeaderCodec::default().decode(&bytes);
            parse(bytes.into());
        }
    }
}
