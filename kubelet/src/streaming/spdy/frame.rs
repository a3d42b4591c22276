//! Frames: §2.2 of the draft.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// The version in control frames.
const VERSION: u16 = 3;
/// Bytes before a frame's content.
pub(super) const HEADER_BYTES: usize = 8;
/// Content of one frame that is taken; spdystream writes at most 16 MiB, and its callers 32 KiB.
const MAX_FRAME_BYTES: usize = 16 << 20;
/// The last frame of a stream in this direction.
pub(super) const FLAG_FIN: u8 = 1;

/// A frame. Header blocks are still compressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A new stream.
    SynStream { stream: u32, fin: bool, block: Bytes },
    /// Its acceptance.
    SynReply { stream: u32, fin: bool, block: Bytes },
    /// Its sudden end.
    Reset { stream: u32, status: u32 },
    /// Settings, which mean nothing here.
    Settings,
    /// To be answered by the same.
    Ping { id: u32 },
    /// No new streams from now on.
    GoAway { last: u32, status: u32 },
    /// Further headers.
    Headers { stream: u32, fin: bool, block: Bytes },
    /// Flow control, which nobody keeps.
    WindowUpdate,
    /// Content.
    Data { stream: u32, fin: bool, bytes: Bytes },
}

/// What is wrong with a peer's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Not version 3.
    #[error("SPDY version {0} is not supported")]
    Version(u16),
    /// A control frame of unknown type.
    #[error("unknown SPDY control frame {0}")]
    Type(u16),
    /// Too long.
    #[error("SPDY frame of {0} bytes")]
    TooLong(usize),
    /// Shorter than its type needs.
    #[error("SPDY frame of type {0} is cut short")]
    Short(u16),
}

/// Takes the first whole frame from `buffer`; `None` if more bytes are needed.
///
/// # Errors
/// When the bytes are no SPDY.
pub fn parse_frame(buffer: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
    if buffer.len() < HEADER_BYTES {
        return Ok(None);
    }
    let mut head = &buffer[..HEADER_BYTES];
    let first = head.get_u32();
    let rest = head.get_u32();
    let flags = (rest >> 24) as u8;
    let length = (rest & 0x00ff_ffff) as usize;
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong(length));
    }
    let control = first & 0x8000_0000 != 0;
    let kind = (first & 0xffff) as u16;
    if control {
        let version = (first >> 16 & 0x7fff) as u16;
        if version != VERSION {
            return Err(FrameError::Version(version));
        }
    }
    if buffer.len() < HEADER_BYTES + length {
        return Ok(None);
    }
    let mut content = buffer.split_to(HEADER_BYTES + length).freeze();
    content.advance(HEADER_BYTES);
    let fin = flags & FLAG_FIN != 0;
    if !control {
        return Ok(Some(Frame::Data { stream: first, fin, bytes: content }));
    }
    let need = |bytes: usize| if content.len() < bytes { Err(FrameError::Short(kind)) } else { Ok(()) };
    let frame = match kind {
        1 => {
            need(10)?;
            let stream = content.get_u32() & 0x7fff_ffff;
            content.advance(6);
            Frame::SynStream { stream, fin, block: content }
        }
        2 => {
            need(4)?;
            Frame::SynReply { stream: content.get_u32() & 0x7fff_ffff, fin, block: content }
        }
        3 => {
            need(8)?;
            Frame::Reset { stream: content.get_u32() & 0x7fff_ffff, status: content.get_u32() }
        }
        4 => Frame::Settings,
        6 => {
            need(4)?;
            Frame::Ping { id: content.get_u32() }
        }
        7 => {
            need(4)?;
            let last = content.get_u32() & 0x7fff_ffff;
            Frame::GoAway { last, status: if content.len() >= 4 { content.get_u32() } else { 0 } }
        }
        8 => {
            need(4)?;
            Frame::Headers { stream: content.get_u32() & 0x7fff_ffff, fin, block: content }
        }
        9 => Frame::WindowUpdate,
        other => return Err(FrameError::Type(other)),
    };
    Ok(Some(frame))
}

impl Frame {
    /// Appends the frame's bytes.
    pub fn write(&self, out: &mut BytesMut) {
        let control = |out: &mut BytesMut, kind: u16, fin: bool, length: usize| {
            out.put_u16(0x8000 | VERSION);
            out.put_u16(kind);
            put_length(out, fin, length);
        };
        match self {
            Self::SynStream { stream, fin, block } => {
                control(out, 1, *fin, 10 + block.len());
                out.put_u32(*stream);
                out.put_u32(0);
                out.put_u16(0);
                out.put_slice(block);
            }
            Self::SynReply { stream, fin, block } => {
                control(out, 2, *fin, 4 + block.len());
                out.put_u32(*stream);
                out.put_slice(block);
            }
            Self::Reset { stream, status } => {
                control(out, 3, false, 8);
                out.put_u32(*stream);
                out.put_u32(*status);
            }
            Self::Settings => {
                control(out, 4, false, 4);
                out.put_u32(0);
            }
            Self::Ping { id } => {
                control(out, 6, false, 4);
                out.put_u32(*id);
            }
            Self::GoAway { last, status } => {
                control(out, 7, false, 8);
                out.put_u32(*last);
                out.put_u32(*status);
            }
            Self::Headers { stream, fin, block } => {
                control(out, 8, *fin, 4 + block.len());
                out.put_u32(*stream);
                out.put_slice(block);
            }
            Self::WindowUpdate => {
                control(out, 9, false, 8);
                out.put_u64(0);
            }
            Self::Data { stream, fin, bytes } => {
                out.put_u32(*stream & 0x7fff_ffff);
                put_length(out, *fin, bytes.len());
                out.put_slice(bytes);
            }
        }
    }
}

fn put_length(out: &mut BytesMut, fin: bool, length: usize) {
    let flags = if fin { u32::from(FLAG_FIN) << 24 } else { 0 };
    // Lengths are bounded far below 24 bits by whoever makes frames.
    out.put_u32(flags | (length as u32 & 0x00ff_ffff));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> impl Strategy<Value = Frame> {
        let bytes = prop::collection::vec(any::<u8>(), 0..64).prop_map(Bytes::from);
        (0u8..7, 0u32..0x7fff_ffff, any::<bool>(), any::<u32>(), bytes).prop_map(
            |(kind, stream, fin, number, bytes)| match kind {
                0 => Frame::SynStream { stream, fin, block: bytes },
                1 => Frame::SynReply { stream, fin, block: bytes },
                2 => Frame::Reset { stream, status: number },
                3 => Frame::Ping { id: number },
                4 => Frame::GoAway { last: stream, status: number },
                5 => Frame::Headers { stream, fin, block: bytes },
                _ => Frame::Data { stream, fin, bytes },
            },
        )
    }

    proptest! {
        #[test]
        fn frames_survive_however_they_are_cut(list in prop::collection::vec(frames(), 0..8), cut in 1usize..20) {
            let mut wire = BytesMut::new();
            for frame in &list {
                frame.write(&mut wire);
            }
            let (mut buffer, mut read) = (BytesMut::new(), Vec::new());
            for piece in wire.chunks(cut) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = parse_frame(&mut buffer).expect("own frames") {
                    read.push(frame);
                }
            }
            prop_assert_eq!(read, list);
        }

        #[test]
        fn parsing_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut buffer = BytesMut::from(bytes.as_slice());
            while let Ok(Some(_)) = parse_frame(&mut buffer) {}
        }
    }
}
