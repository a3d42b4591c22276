//! Writing and reading netlink messages. Reading is bounded by the bytes given and never fails: what is cut short ends the iteration.

/// Netlink and its attributes are aligned to this many bytes.
const ALIGN: usize = 4;
/// Bytes of `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// Bytes of `struct nlattr`.
const ATTRIBUTE_LEN: usize = 4;
/// `NLA_F_NESTED`.
const NESTED: u16 = 1 << 15;
/// The bits of an attribute's type that are its number (`NLA_TYPE_MASK`).
const TYPE_MASK: u16 = 0x3fff;

/// Messages to be sent as one, each with a word for what it does.
#[derive(Default)]
pub(crate) struct Batch {
    pub(super) bytes: Vec<u8>,
    /// What each message does, for errors; the sequence number of a message is its place here.
    pub(super) steps: Vec<&'static str>,
}

impl Batch {
    /// Appends a message: `header` is the fixed part of its family, `fill` writes its attributes.
    pub(crate) fn push(
        &mut self,
        step: &'static str,
        kind: u16,
        flags: u16,
        header: &[u8],
        fill: impl FnOnce(&mut Attributes<'_>),
    ) -> &mut Self {
        let start = self.bytes.len();
        let sequence = u32::try_from(self.steps.len()).expect("a batch has fewer than 2^32 messages");
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(&flags.to_ne_bytes());
        self.bytes.extend_from_slice(&sequence.to_ne_bytes());
        self.bytes.extend_from_slice(&[0; 4]);
        self.bytes.extend_from_slice(header);
        pad(&mut self.bytes);
        fill(&mut Attributes(&mut self.bytes));
        let len = u32::try_from(self.bytes.len() - start).expect("a message is smaller than 4 GiB");
        self.bytes[start..start + 4].copy_from_slice(&len.to_ne_bytes());
        self.steps.push(step);
        self
    }

    /// Sets flags of the message pushed last.
    pub(crate) fn add_flags_to_last(&mut self, last_start: usize, flags: u16) {
        let at = last_start + 6;
        let old = u16::from_ne_bytes([self.bytes[at], self.bytes[at + 1]]);
        self.bytes[at..at + 2].copy_from_slice(&(old | flags).to_ne_bytes());
    }

    /// Bytes written so far.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Messages written so far.
    pub(crate) fn count(&self) -> usize {
        self.steps.len()
    }
}

fn pad(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
}

/// Writes attributes at the end of a message.
pub(crate) struct Attributes<'a>(&'a mut Vec<u8>);

impl Attributes<'_> {
    /// An attribute of raw bytes.
    pub(crate) fn bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        let len = u16::try_from(ATTRIBUTE_LEN + value.len()).expect("an attribute is smaller than 64 KiB");
        self.0.extend_from_slice(&len.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        pad(self.0);
        self
    }

    /// An attribute that holds attributes that are written already.
    pub(crate) fn nest_bytes(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.bytes(kind | NESTED, value)
    }

    /// A string with its final NUL.
    pub(crate) fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = Vec::with_capacity(value.len() + 1);
        bytes.extend_from_slice(value.as_bytes());
        bytes.push(0);
        self.bytes(kind, &bytes)
    }

    /// A number in the host's order.
    pub(crate) fn u32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// A number in network order.
    pub(crate) fn be32(&mut self, kind: u16, value: u32) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// A number in network order.
    pub(crate) fn be64(&mut self, kind: u16, value: u64) -> &mut Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Bytes of the message so far.
    pub(crate) fn written(&self) -> usize {
        self.0.len()
    }

    /// An attribute that holds attributes.
    pub(crate) fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Attributes<'_>)) -> &mut Self {
        self.wrap(kind | NESTED, &[], fill)
    }

    /// An attribute that holds a fixed header and attributes.
    pub(crate) fn wrap(&mut self, kind: u16, header: &[u8], fill: impl FnOnce(&mut Attributes<'_>)) -> &mut Self {
        let start = self.0.len();
        self.0.extend_from_slice(&[0; 2]);
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(header);
        pad(self.0);
        fill(&mut Attributes(self.0));
        let len = u16::try_from(self.0.len() - start).expect("an attribute is smaller than 64 KiB");
        self.0[start..start + 2].copy_from_slice(&len.to_ne_bytes());
        self
    }
}

/// A message as received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Received<'a> {
    pub(crate) kind: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram.
pub(crate) fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.get(..HEADER_LEN)?;
        let number = |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let len = usize::try_from(number(0)).ok()?;
        let payload = bytes.get(HEADER_LEN..len)?;
        let message = Received { kind: u16::from_ne_bytes([header[4], header[5]]), sequence: number(8), payload };
        bytes = bytes.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`: number and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let header = bytes.get(..ATTRIBUTE_LEN)?;
        let len = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let value = bytes.get(ATTRIBUTE_LEN..len)?;
        let kind = u16::from_ne_bytes([header[2], header[3]]) & TYPE_MASK;
        bytes = bytes.get(len.next_multiple_of(ALIGN)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of a number.
pub(crate) fn find(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(number, _)| *number == kind).map(|(_, value)| value)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_written_is_read_back() {
        let mut batch = Batch::default();
        batch.push("one", 16, 5, &[1, 2, 3], |a| {
            a.text(3, "lo").nest(18, |a| {
                a.u32(1, 7);
            });
        });
        batch.push("two", 17, 0, &[], |_| ());
        let all: Vec<_> = messages(&batch.bytes).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].kind, all[0].sequence, all[1].kind, all[1].sequence), (16, 0, 17, 1));
        let inside = &all[0].payload[4..];
        assert_eq!(find(inside, 3), Some(&b"lo\0"[..]));
        assert_eq!(find(find(inside, 18).unwrap(), 1), Some(&7u32.to_ne_bytes()[..]));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_within_bounds(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let mut seen = 0;
            for message in messages(&bytes) {
                seen += HEADER_LEN + message.payload.len();
                let inside: usize = attributes(message.payload).map(|(_, value)| ATTRIBUTE_LEN + value.len()).sum();
                prop_assert!(inside <= message.payload.len());
            }
            prop_assert!(seen <= bytes.len());
        }
    }
}
