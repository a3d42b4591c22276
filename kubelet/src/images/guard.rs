//! Bounds on what a layer may unpack to, checked while it flows.

use std::cell::Cell;
use std::io::{self, Read};
use std::rc::Rc;

/// What an honest layer stays below.
#[derive(Clone, Copy, Debug)]
pub struct LayerLimits {
    /// Uncompressed size of one layer.
    pub bytes: u64,
    /// Entries in one layer.
    pub entries: u64,
    /// Uncompressed bytes for each compressed byte, looked at once [`RATIO_FREE_BYTES`] have been unpacked.
    pub ratio: u64,
}

impl Default for LayerLimits {
    fn default() -> Self {
        Self { bytes: 64 << 30, entries: 4_000_000, ratio: 400 }
    }
}

/// Below this size a high ratio is harmless: empty disk images and logs compress very well.
pub(super) const RATIO_FREE_BYTES: u64 = 256 << 20;

/// The names, extended attributes and sparse maps before one entry.
const MAX_ENTRY_HEADERS_BYTES: u64 = 2 << 20;

/// Shared between the guarded readers and the unpacker.
#[derive(Clone)]
pub(super) struct Guard(Rc<State>);

struct State {
    limits: LayerLimits,
    compressed: Cell<u64>,
    unpacked: Cell<u64>,
    header_budget: Cell<Option<u64>>,
    verdict: Cell<Option<&'static str>>,
}

impl Guard {
    pub(super) fn new(limits: LayerLimits) -> Self {
        Self(Rc::new(State {
            limits,
            compressed: Cell::new(0),
            unpacked: Cell::new(0),
            header_budget: Cell::new(None),
            verdict: Cell::new(None),
        }))
    }

    /// Counts compressed bytes.
    pub(super) fn compressed<R>(&self, inner: R) -> CountCompressed<R> {
        CountCompressed { inner, guard: self.clone() }
    }

    /// Counts uncompressed bytes and ends the stream when a limit is passed.
    pub(super) fn unpacked<R>(&self, inner: R) -> Guarded<R> {
        Guarded { inner, guard: self.clone() }
    }

    /// From here until [`Guard::body`], only headers are read, which have a small bound of their own: an archive
    /// library holds them in memory.
    pub(super) fn headers(&self) {
        self.0.header_budget.set(Some(MAX_ENTRY_HEADERS_BYTES));
    }

    /// From here the content of an entry is read.
    pub(super) fn body(&self) {
        self.0.header_budget.set(None);
    }

    /// Why the stream was ended, if it was.
    pub(super) fn verdict(&self) -> Option<&'static str> {
        self.0.verdict.get()
    }

    /// Bytes that came out of decompression so far.
    pub(super) fn unpacked_bytes(&self) -> u64 {
        self.0.unpacked.get()
    }

    /// Checks the count of entries.
    pub(super) fn entry(&self, count: u64) -> io::Result<()> {
        if count > self.0.limits.entries { Err(self.refuse("too many entries")) } else { Ok(()) }
    }

    fn refuse(&self, why: &'static str) -> io::Error {
        self.0.verdict.set(Some(why));
        io::Error::other(why)
    }
}

pub(super) struct CountCompressed<R> {
    inner: R,
    guard: Guard,
}

impl<R: Read> Read for CountCompressed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let state = &self.guard.0;
        state.compressed.set(state.compressed.get() + count as u64);
        Ok(count)
    }
}

pub(super) struct Guarded<R> {
    inner: R,
    guard: Guard,
}

impl<R: Read> Read for Guarded<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        let state = &self.guard.0;
        let total = state.unpacked.get() + count as u64;
        state.unpacked.set(total);
        if total > state.limits.bytes {
            return Err(self.guard.refuse("it unpacks to more than the limit of a layer"));
        }
        // Decoders read ahead, so the count of compressed bytes is never behind what came out of them.
        if total > RATIO_FREE_BYTES && total / state.compressed.get().max(1) > state.limits.ratio {
            return Err(self.guard.refuse("it unpacks to far more than its compressed size"));
        }
        if let Some(budget) = state.header_budget.get() {
            match budget.checked_sub(count as u64) {
                Some(rest) => state.header_budget.set(Some(rest)),
                None => return Err(self.guard.refuse("the headers of one entry exceed 2 MiB")),
            }
        }
        Ok(count)
    }
}
