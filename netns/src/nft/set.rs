//! Sets and maps: what their keys are made of and what they hold.

use super::expression::Verdict;
use crate::Family;

/// A part of a key or of a value. In the kernel each part is padded to whole 32-bit registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Field {
    Address(Family),
    Protocol,
    Port,
    /// A number in the host's byte order.
    Integer,
}

impl Field {
    /// Bytes without padding.
    pub(crate) fn len(self) -> usize {
        match self {
            Self::Address(family) => family.address_len(),
            Self::Protocol => 1,
            Self::Port => 2,
            Self::Integer => 4,
        }
    }

    /// Bytes in a concatenation.
    pub(crate) fn padded(self) -> usize {
        self.len().next_multiple_of(4)
    }

    /// The number that the `nft` program knows the type by (`enum datatypes` of libnftables); the kernel does not look at it.
    pub(crate) fn datatype(self) -> u32 {
        match self {
            // A packet mark: the only number of four bytes that it can show inside of a concatenation.
            Self::Integer => 19,
            Self::Address(Family::V4) => 7,
            Self::Address(Family::V6) => 8,
            Self::Protocol => 12,
            Self::Port => 13,
        }
    }
}

/// What a set maps its keys to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SetData {
    /// Nothing: a plain set.
    None,
    Verdict,
    Fields(Vec<Field>),
}

/// A set or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SetSpec {
    pub(crate) key: Vec<Field>,
    pub(crate) data: SetData,
    /// Keys are ranges.
    pub(crate) interval: bool,
    /// Rules write elements, at most so many, which time out.
    pub(crate) dynamic: Option<u32>,
}

impl SetSpec {
    /// A set or map of single keys.
    pub(crate) fn new(key: Vec<Field>, data: SetData) -> Self {
        Self { key, data, interval: false, dynamic: None }
    }
}

/// An element's key: bytes as the kernel compares them, and the end (inside) of a range.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Element {
    pub(crate) key: Box<[u8]>,
    pub(crate) end: Option<Box<[u8]>>,
}

/// What an element holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    None,
    Verdict(Verdict),
    Data(Box<[u8]>),
}
