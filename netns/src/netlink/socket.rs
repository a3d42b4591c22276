//! A netlink socket that sends a batch and reads what became of each message.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send, setsockopt, socket,
    sockopt,
};
use nix::sys::time::TimeVal;

use super::message::{Batch, messages};

/// Longest wait for an answer of the kernel, which answers while it takes the request.
const ANSWER_TIMEOUT_S: i64 = 10;
/// Bytes read at once; the kernel's dumps are at most this long a datagram.
const READ_BYTES: usize = 64 * 1024;
/// Largest batch: ten thousand services with a hundred endpoints each fit.
const BATCH_MAX_BYTES: usize = 512 * 1024 * 1024;
/// Receive buffer, for the answers of a batch.
const RECEIVE_BUFFER_BYTES: usize = 4 * 1024 * 1024;
/// Send buffers are grown in steps of this factor of what is needed, as the kernel counts its own overhead too.
const SEND_BUFFER_FACTOR: usize = 2;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;

/// What went wrong between us and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// The kernel refused a message.
    #[error("cannot {step}: {}", errno.desc())]
    Refused { step: &'static str, errno: Errno },
    /// A socket call failed.
    #[error("netlink: cannot {call}: {}", errno.desc())]
    Socket { call: &'static str, errno: Errno },
    /// More than [`BATCH_MAX_BYTES`] were to be changed at once.
    #[error("netlink: a change of {bytes} bytes is larger than {BATCH_MAX_BYTES}")]
    TooLarge { bytes: usize },
}

impl NetlinkError {
    /// Whether the kernel refused with this errno.
    pub(crate) fn is(&self, wanted: Errno) -> bool {
        matches!(self, Self::Refused { errno, .. } if *errno == wanted)
    }
}

/// A socket in the network namespace of the thread that opened it, usable from any thread.
pub(crate) struct Socket {
    fd: OwnedFd,
    send_buffer: usize,
    buffer: Vec<u8>,
}

impl Socket {
    /// A socket for links, addresses and routes.
    pub(crate) fn route() -> Result<Self, NetlinkError> {
        Self::open(SockProtocol::NetlinkRoute)
    }

    /// A socket for netfilter.
    pub(crate) fn netfilter() -> Result<Self, NetlinkError> {
        Self::open(SockProtocol::NetlinkNetFilter)
    }

    /// A socket for the parts of the kernel that have no netlink of their own.
    pub(crate) fn generic() -> Result<Self, NetlinkError> {
        Self::open(SockProtocol::NetlinkGeneric)
    }

    fn open(protocol: SockProtocol) -> Result<Self, NetlinkError> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)
            .map_err(|errno| NetlinkError::Socket { call: "open a socket", errno })?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0)).map_err(|errno| NetlinkError::Socket { call: "bind", errno })?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(ANSWER_TIMEOUT_S, 0))
            .map_err(|errno| NetlinkError::Socket { call: "set the time-out", errno })?;
        setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES).map_err(|errno| NetlinkError::Socket {
            call: "grow the receive buffer (CAP_NET_ADMIN is needed)",
            errno,
        })?;
        Ok(Self { fd, send_buffer: 0, buffer: vec![0; READ_BYTES] })
    }

    /// Sends all messages at once and reads the answers; every message must ask for an acknowledgement, or the last one with all being one
    /// transaction. The first refusal is the error; messages after it may have been carried out.
    pub(crate) fn execute(&mut self, batch: &Batch) -> Result<(), NetlinkError> {
        self.execute_until(batch, batch.steps.len())
    }

    /// The same for a batch whose last message is answered by nothing.
    pub(crate) fn execute_transaction(
        &mut self,
        mut batch: Batch,
        end: impl FnOnce(&mut Batch),
    ) -> Result<(), NetlinkError> {
        let answered = batch.steps.len();
        end(&mut batch);
        self.execute_until(&batch, answered)
    }

    /// Waits for the answer to the last of the first `answered` messages.
    fn execute_until(&mut self, batch: &Batch, answered: usize) -> Result<(), NetlinkError> {
        let Some(last) = answered.checked_sub(1) else { return Ok(()) };
        self.send(batch)?;
        let last = u32::try_from(last).expect("a batch has fewer than 2^32 messages");
        let mut refused = None;
        loop {
            let len = self.receive()?;
            let mut done = false;
            for message in messages(&self.buffer[..len]).filter(|message| message.kind == NLMSG_ERROR) {
                if let Some(errno) = error_of(message.payload).filter(|_| refused.is_none()) {
                    let index = usize::try_from(message.sequence).unwrap_or(usize::MAX);
                    refused = Some(NetlinkError::Refused {
                        step: batch.steps.get(index).copied().unwrap_or("change the network"),
                        errno,
                    });
                }
                done |= message.sequence == last;
            }
            // A refused batch header is the only answer there is.
            if done || refused.is_some() {
                break;
            }
        }
        self.drain()?;
        refused.map_or(Ok(()), Err)
    }

    /// Sends a batch of one request and hands each answer to `each`.
    pub(crate) fn request(&mut self, batch: &Batch, mut each: impl FnMut(u16, &[u8])) -> Result<(), NetlinkError> {
        self.send(batch)?;
        let refused = loop {
            let len = self.receive()?;
            let mut end = None;
            for message in messages(&self.buffer[..len]) {
                match message.kind {
                    NLMSG_DONE => end = Some(None),
                    NLMSG_ERROR => end = Some(error_of(message.payload)),
                    kind => each(kind, message.payload),
                }
            }
            if let Some(end) = end {
                break end;
            }
        };
        self.drain()?;
        refused.map_or(Ok(()), |errno| {
            Err(NetlinkError::Refused { step: batch.steps.first().copied().unwrap_or("ask"), errno })
        })
    }

    fn send(&mut self, batch: &Batch) -> Result<(), NetlinkError> {
        let needed = batch.bytes.len() * SEND_BUFFER_FACTOR;
        if batch.bytes.len() > BATCH_MAX_BYTES {
            return Err(NetlinkError::TooLarge { bytes: batch.bytes.len() });
        }
        if needed > self.send_buffer {
            setsockopt(&self.fd, sockopt::SndBufForce, &needed)
                .map_err(|errno| NetlinkError::Socket { call: "grow the send buffer", errno })?;
            self.send_buffer = needed;
        }
        send(self.fd.as_raw_fd(), &batch.bytes, MsgFlags::empty())
            .map_err(|errno| NetlinkError::Socket { call: "send", errno })?;
        Ok(())
    }

    fn receive(&mut self) -> Result<usize, NetlinkError> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::empty()) {
                Ok(len) => return Ok(len),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(NetlinkError::Socket { call: "receive", errno }),
            }
        }
    }

    /// Throws away what is left of an answer, so that the next one is not taken for it.
    fn drain(&mut self) -> Result<(), NetlinkError> {
        loop {
            match recv(self.fd.as_raw_fd(), &mut self.buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(()),
                Err(errno) => return Err(NetlinkError::Socket { call: "receive", errno }),
            }
        }
    }
}

/// A socket that hears of changes of links, for an async runtime.
pub(crate) struct LinkEvents(UnixDatagram);

impl LinkEvents {
    /// Listens in the network namespace of the calling thread.
    pub(crate) fn open() -> Result<Self, NetlinkError> {
        const RTMGRP_LINK: u32 = 1;
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, SockProtocol::NetlinkRoute)
            .map_err(|errno| NetlinkError::Socket { call: "open a socket", errno })?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, RTMGRP_LINK))
            .map_err(|errno| NetlinkError::Socket { call: "bind", errno })?;
        // A datagram socket is received from in the same way whatever its family; the runtime has a type for this one.
        Ok(Self(UnixDatagram::from(fd)))
    }

    /// The socket for the runtime that this is called in.
    pub(crate) fn start(self) -> io::Result<LinkEventStream> {
        Ok(LinkEventStream { socket: tokio::net::UnixDatagram::from_std(self.0)?, buffer: vec![0; READ_BYTES] })
    }
}

/// [`LinkEvents`] in a runtime.
pub(crate) struct LinkEventStream {
    socket: tokio::net::UnixDatagram,
    buffer: Vec<u8>,
}

impl LinkEventStream {
    /// The messages that come next.
    pub(crate) async fn next(&mut self) -> io::Result<&[u8]> {
        loop {
            match self.socket.recv(&mut self.buffer).await {
                Ok(len) => return Ok(&self.buffer[..len]),
                // More came than we read; what is read next tells enough.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// The errno of an NLMSG_ERROR; `None` for an acknowledgement.
fn error_of(payload: &[u8]) -> Option<Errno> {
    /// What parts of the kernel answer instead of EOPNOTSUPP; it has no name in user space.
    const ENOTSUPP: i32 = 524;
    match payload.first_chunk::<4>().map_or(libc::EBADMSG, |bytes| i32::from_ne_bytes(*bytes).saturating_neg()) {
        0 => None,
        ENOTSUPP => Some(Errno::EOPNOTSUPP),
        raw => Some(match Errno::from_raw(raw) {
            Errno::UnknownErrno => Errno::EIO,
            errno => errno,
        }),
    }
}
