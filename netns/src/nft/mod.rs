//! nftables as values: rules are lists of the kernel's expressions, sets are maps of bytes, and a [`Table`] is what the kernel has to have.
//!
//! We speak netlink to nf_tables (`linux/netfilter/nf_tables.h`) and need no `nft` program: a change of one element is one message, its cost does
//! not depend on the size of the table, and every change is one transaction (docs/decisions/0005-service-rules.md).

mod encode;
mod expression;
mod set;
mod table;

#[cfg(test)]
pub(crate) mod tests;

pub(crate) use encode::{delete_table, purge, table_exists};
pub(crate) use expression::{
    BaseChain, CmpOp, CtKey, Expr, FibResult, Hook, MetaKey, NatKind, PayloadBase, R, Reg, Reject, Rule, Verdict,
};
pub(crate) use set::{Element, Field, SetData, SetSpec, Value};
pub(crate) use table::{Chain, Table};
