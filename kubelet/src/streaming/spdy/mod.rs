//! SPDY/3.1, the server's side of what Kubernetes uses of it: streams with headers, data, half-close, reset, ping, goaway.
//!
//! There is no flow control: the clients (Go's spdystream) neither send window updates nor heed them, so the connection's
//! own back-pressure is the only one. Source: "SPDY Protocol - Draft 3.1".

mod connection;
mod frame;
mod headers;

pub use connection::{Connection, Incoming, StreamHandle};
pub use frame::{Frame, FrameError, parse_frame};
pub use headers::HeaderCodec;
