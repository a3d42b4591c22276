//! gRPC over unix sockets: what the Container Runtime Interface, CSI drivers and plugins of the node speak.
//!
//! Messages are written down in [`proto!`], in the words of protobuf itself; neither a compiler for it nor generated code is
//! needed. [`Router`] serves, [`Client`] calls.

mod client;
mod proto;
mod server;

pub use client::Client;
pub(crate) use proto::{proto, proto_item, proto_message};
pub use server::{Router, bind, serve};

/// Bytes of the largest message taken or sent: two outputs of `ExecSync` and their frame.
pub const MESSAGE_LIMIT_BYTES: usize = (32 << 20) + (64 << 10);
