//! The connection to the daemon: messages out, with a bounded queue, and messages in.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use coracle_sys::packet;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::{FdKind, MESSAGE_LIMIT_BYTES};

/// Messages waiting for a daemon that does not read; beyond it the connection is dropped and a new daemon starts afresh.
const QUEUE_LIMIT_MESSAGES: usize = 8192;

/// One end of the connection.
#[derive(Debug)]
pub struct Link {
    socket: OwnedFd,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

impl Link {
    /// A connection on this socket.
    pub fn new(socket: OwnedFd) -> Self {
        Self { socket, queue: VecDeque::new() }
    }

    /// The socket.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether messages wait for room.
    pub fn has_queue(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Sends a message, or queues it while the other side does not read.
    ///
    /// # Errors
    /// When the other side is gone or has not read for too long.
    pub fn send(&mut self, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let bytes = serde_json::to_vec(message)?;
        if bytes.len() > MESSAGE_LIMIT_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "message too long for the supervisor's socket"));
        }
        self.flush()?;
        if self.queue.is_empty() {
            match packet::send(self.socket.as_fd(), &bytes, fds) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done,
            }
        }
        if self.queue.len() >= QUEUE_LIMIT_MESSAGES {
            return Err(io::Error::new(io::ErrorKind::TimedOut, "the daemon does not read"));
        }
        let fds = fds.iter().map(|fd| fd.try_clone_to_owned()).collect::<io::Result<_>>()?;
        self.queue.push_back((bytes, fds));
        Ok(())
    }

    /// Sends what is queued as far as it goes.
    ///
    /// # Errors
    /// When the other side is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        while let Some((bytes, fds)) = self.queue.front() {
            let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
            match packet::send(self.socket.as_fd(), bytes, &borrowed) {
                Ok(()) => drop(self.queue.pop_front()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What came in.
#[derive(Debug)]
pub enum Received<T> {
    /// A message and its descriptors.
    Message(T, Vec<OwnedFd>),
    /// Nothing now.
    Nothing,
    /// The other side is gone.
    Closed,
}

/// Receives one message; never waits.
///
/// # Errors
/// When the socket fails or the message is not one.
pub fn receive<T: DeserializeOwned>(socket: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> io::Result<Received<T>> {
    buffer.resize(MESSAGE_LIMIT_BYTES, 0);
    match packet::receive(socket, buffer) {
        Ok((0, _)) => Ok(Received::Closed),
        Ok((length, fds)) => Ok(Received::Message(serde_json::from_slice(&buffer[..length])?, fds)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Received::Nothing),
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(Received::Closed),
        Err(error) => Err(error),
    }
}

/// The descriptors of a message by what they are; a kind that is not there is `None`.
#[derive(Debug, Default)]
pub struct Fds(Vec<(FdKind, OwnedFd)>);

impl Fds {
    /// Pairs kinds and descriptors.
    pub fn new(kinds: Vec<FdKind>, fds: Vec<OwnedFd>) -> Self {
        Self(kinds.into_iter().zip(fds).collect())
    }

    /// Takes the descriptor of this kind out.
    pub fn take(&mut self, kind: FdKind) -> Option<OwnedFd> {
        let at = self.0.iter().position(|(k, _)| *k == kind)?;
        Some(self.0.swap_remove(at).1)
    }
}
