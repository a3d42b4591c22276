//! What the new process and its parent say to each other: messages of one fixed size.

use crate::error::{Step, injected};
use coracle_sys::{Errno, channel};
use std::ffi::CStr;
use std::os::fd::{BorrowedFd, OwnedFd};

/// Small enough for a failure to be handed up by value.
pub(crate) const MESSAGE_BYTES: usize = 112;
const HEADER_BYTES: usize = 8;
const TEXT_BYTES: usize = MESSAGE_BYTES - HEADER_BYTES;

/// What the new process tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Note {
    /// It waits for its id maps.
    NeedsIdMaps = 1,
    /// Its namespaces exist, nothing is mounted: the moment of `prestart` and `createRuntime` hooks.
    NamespacesMade,
    /// Its root is built, but not entered: the moment of `createContainer` hooks.
    MountsMade,
    /// All is set up, it waits for the word to start.
    Created,
    /// It failed.
    Failed,
    /// Carries the master side of its terminal.
    Terminal,
    /// Carries the seccomp notification descriptor.
    SeccompListener,
    /// The usher tells the id of the process that it made.
    Pid,
    /// It waits for the source of a mount that only the parent can give, by its place in the plan.
    NeedsSource,
}

impl Note {
    fn from_byte(byte: u8) -> Option<Self> {
        use Note::{
            Created, Failed, MountsMade, NamespacesMade, NeedsIdMaps, NeedsSource, Pid, SeccompListener, Terminal,
        };
        [NeedsIdMaps, NamespacesMade, MountsMade, Created, Failed, Terminal, SeccompListener, Pid, NeedsSource]
            .into_iter()
            .find(|note| *note as u8 == byte)
    }
}

/// What the parent answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Word {
    Go = 0x47,
    Start = 0x53,
}

/// A failed step in the new process.
#[derive(Clone, Copy)]
pub(crate) struct Failure {
    step: Step,
    errno: i32,
    text: [u8; TEXT_BYTES],
    length: usize,
}

impl Failure {
    pub(crate) fn new(step: Step, subject: &CStr, errno: Errno) -> Self {
        let bytes = subject.to_bytes();
        // The end of a long path says more than its beginning.
        let length = bytes.len().min(TEXT_BYTES);
        let mut text = [0; TEXT_BYTES];
        text[..length].copy_from_slice(&bytes[bytes.len() - length..]);
        Self { step, errno: errno as i32, text, length }
    }
}

/// Attaches a step to a bare errno.
pub(super) trait At<T> {
    fn at(self, step: Step) -> Result<T, Failure>;
    fn on(self, step: Step, subject: &CStr) -> Result<T, Failure>;
}

impl<T> At<T> for coracle_sys::Result<T> {
    fn at(self, step: Step) -> Result<T, Failure> {
        self.on(step, c"")
    }

    fn on(self, step: Step, subject: &CStr) -> Result<T, Failure> {
        match self {
            Ok(_) if injected(step) => Err(Failure::new(step, subject, Errno::EIO)),
            Ok(value) => Ok(value),
            Err(errno) => Err(Failure::new(step, subject, errno)),
        }
    }
}

/// One message as the parent reads it.
pub(crate) struct Message {
    pub note: Note,
    /// The step that failed.
    pub step: u16,
    /// The errno, the process id of [`Note::Pid`], or the place of [`Note::NeedsSource`].
    pub number: i32,
    text: [u8; TEXT_BYTES],
    length: usize,
}

impl Message {
    pub(super) fn needs_source(place: usize) -> Self {
        Self { number: place as i32, ..Self::note(Note::NeedsSource) }
    }

    pub(crate) fn note(note: Note) -> Self {
        Self { note, step: 0, number: 0, text: [0; TEXT_BYTES], length: 0 }
    }

    pub(crate) fn pid(pid: i32) -> Self {
        Self { number: pid, ..Self::note(Note::Pid) }
    }

    pub(crate) fn failed(failure: &Failure) -> Self {
        Self {
            note: Note::Failed,
            step: failure.step as u16,
            number: failure.errno,
            text: failure.text,
            length: failure.length,
        }
    }

    pub(crate) fn encode(&self) -> [u8; MESSAGE_BYTES] {
        let mut bytes = [0; MESSAGE_BYTES];
        bytes[0] = self.note as u8;
        bytes[1] = self.length as u8;
        bytes[2..4].copy_from_slice(&self.step.to_ne_bytes());
        bytes[4..8].copy_from_slice(&self.number.to_ne_bytes());
        bytes[HEADER_BYTES..].copy_from_slice(&self.text);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; MESSAGE_BYTES] = bytes.try_into().ok()?;
        let mut text = [0; TEXT_BYTES];
        text.copy_from_slice(&bytes[HEADER_BYTES..]);
        Some(Self {
            note: Note::from_byte(bytes[0])?,
            length: usize::from(bytes[1]),
            step: u16::from_ne_bytes([bytes[2], bytes[3]]),
            number: i32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
            text,
        })
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.text[..self.length]).into_owned()
    }
}

/// Waits for a word and what may come with it; the end of the channel means that the parent is gone.
pub(super) fn listen(channel: BorrowedFd<'_>, wanted: Word) -> Result<Option<OwnedFd>, Failure> {
    let mut byte = [0_u8; 1];
    let (length, fd) = channel::receive(channel, &mut byte, true).at(Step::Synchronize)?;
    match (length, byte[0]) {
        (1, word) if word == wanted as u8 => Ok(fd),
        (0, _) => Err(Failure::new(Step::Synchronize, c"(it is gone)", Errno::EPIPE)),
        _ => Err(Failure::new(Step::Synchronize, c"(an unexpected word)", Errno::EPROTO)),
    }
}
