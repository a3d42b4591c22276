//! Exec, attach and port-forward: bytes between a client's connection and a container.
//!
//! Clients come by WebSocket (`v5.channel.k8s.io` and its elders, or SPDY tunnelled in it) or by SPDY/3.1. Both become the
//! same pair of channels ([`session::Remote`]), behind which [`session`] joins them with a container's streams.

mod fd;
mod job;
mod session;
mod status;

mod reader;
pub mod spdy;
mod tunnel;
mod upgrade;
mod websocket;

mod forward;

pub(crate) use fd::register;
pub use forward::connect_in;
pub(crate) use forward::{serve_spdy as forward_spdy, serve_websocket as forward_websocket};
pub(crate) use job::{attach, ended, exec};
pub(crate) use reader::serve as serve_reader;
pub(crate) use upgrade::{Kind, Request, serve};
