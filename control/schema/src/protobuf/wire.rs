//! The wire format itself: varints, tags, lengths.

use super::ProtobufError;

/// Appends a varint.
pub(crate) fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

/// Appends a varint field; negative numbers take ten bytes, as proto2 has it.
pub(crate) fn int(out: &mut Vec<u8>, number: u32, value: i64) {
    varint(out, u64::from(number) << 3);
    varint(out, u64::from_ne_bytes(value.to_ne_bytes()));
}

/// Appends a 64-bit float field.
pub(crate) fn double(out: &mut Vec<u8>, number: u32, value: f64) {
    varint(out, u64::from(number) << 3 | 1);
    out.extend_from_slice(&value.to_le_bytes());
}

/// Appends a length-delimited field.
pub(crate) fn bytes(out: &mut Vec<u8>, number: u32, content: &[u8]) {
    open(out, number, content.len());
    out.extend_from_slice(content);
}

/// Appends the start of a length-delimited field of so many bytes.
pub(crate) fn open(out: &mut Vec<u8>, number: u32, length: usize) {
    varint(out, u64::from(number) << 3 | 2);
    varint(out, length as u64);
}

/// Appends a length-delimited field with what `write` appends; the length is put before it afterwards.
pub(crate) fn nested(out: &mut Vec<u8>, number: u32, write: impl FnOnce(&mut Vec<u8>)) {
    varint(out, u64::from(number) << 3 | 2);
    let start = out.len();
    write(out);
    let length = (out.len() - start) as u64;
    let mut prefix = Vec::with_capacity(4);
    varint(&mut prefix, length);
    out.splice(start..start, prefix);
}

/// The content of one field on the wire.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Content<'a> {
    Varint(u64),
    Fixed64(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
}

impl<'a> Content<'a> {
    pub(crate) const fn bytes(self) -> Result<&'a [u8], ProtobufError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(ProtobufError::Malformed("wrong wireType for a length-delimited field")),
        }
    }

    pub(crate) fn text(self) -> Result<&'a str, ProtobufError> {
        std::str::from_utf8(self.bytes()?).map_err(|_| ProtobufError::Malformed("string field contains invalid UTF-8"))
    }

    pub(crate) const fn int(self) -> Result<i64, ProtobufError> {
        match self {
            Self::Varint(value) => Ok(i64::from_ne_bytes(value.to_ne_bytes())),
            _ => Err(ProtobufError::Malformed("wrong wireType for a varint field")),
        }
    }
}

/// Calls `field` with the number and content of each field of a message.
pub(crate) fn each<'a>(
    mut body: &'a [u8],
    mut field: impl FnMut(u32, Content<'a>) -> Result<(), ProtobufError>,
) -> Result<(), ProtobufError> {
    while !body.is_empty() {
        let tag = take_varint(&mut body)?;
        let number = u32::try_from(tag >> 3).map_err(|_| ProtobufError::Malformed("illegal tag"))?;
        if number == 0 {
            return Err(ProtobufError::Malformed("illegal tag 0"));
        }
        let content = match tag & 7 {
            0 => Content::Varint(take_varint(&mut body)?),
            1 => Content::Fixed64(u64::from_le_bytes(take(&mut body, 8)?.try_into().unwrap_or_default())),
            2 => {
                let length = take_varint(&mut body)?;
                let length = usize::try_from(length)
                    .map_err(|_| ProtobufError::Malformed("negative length found during unmarshaling"))?;
                Content::Bytes(take(&mut body, length)?)
            }
            5 => Content::Fixed32(u32::from_le_bytes(take(&mut body, 4)?.try_into().unwrap_or_default())),
            _ => return Err(ProtobufError::Malformed("illegal wireType")),
        };
        field(number, content)?;
    }
    Ok(())
}

fn take<'a>(body: &mut &'a [u8], length: usize) -> Result<&'a [u8], ProtobufError> {
    let (head, rest) = body.split_at_checked(length).ok_or(ProtobufError::Malformed("unexpected EOF"))?;
    *body = rest;
    Ok(head)
}

pub(crate) fn take_varint(body: &mut &[u8]) -> Result<u64, ProtobufError> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = take(body, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(ProtobufError::Malformed("integer overflow"))
}
