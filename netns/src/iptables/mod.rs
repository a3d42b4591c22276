//! The iptables back end, for hosts without nftables: the same state as the nftables tables hold, as chains of iptables.
//!
//! [`compile`] is a function of the state; [`kernel`] hands its chains to `iptables-restore`, all of them each time, as one change a
//! table. Chains and rules that are not ours stay.

mod compile;
mod kernel;
mod rule;

#[cfg(test)]
mod tests;

pub(crate) use compile::compile;
pub(crate) use kernel::{apply, is_there, remove};
#[cfg(test)]
pub(crate) use tests::walk;
