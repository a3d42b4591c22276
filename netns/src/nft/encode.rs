//! From values to nf_tables' netlink messages (`linux/netfilter/nf_tables.h`).

use nix::errno::Errno;

use super::expression::{BaseChain, Expr, Reg, Reject, Verdict};
use super::set::{Element, SetData, SetSpec, Value};
use crate::Family;
use crate::netlink::{Attributes, Batch, NetlinkError, Socket, attributes, find};

const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const DELETE_CHAIN: u16 = 5;
const NEW_RULE: u16 = 6;
const DELETE_RULE: u16 = 8;
const NEW_SET: u16 = 9;
const DELETE_SET: u16 = 11;
const NEW_ELEMENTS: u16 = 12;
const GET_ELEMENTS: u16 = 13;
const DELETE_ELEMENTS: u16 = 14;

const REQUEST: u16 = 1;
const ACK: u16 = 4;
const DUMP: u16 = 0x300;
const CREATE: u16 = 0x400;
const APPEND: u16 = 0x800;

/// A list of elements is one attribute, of at most 64 KiB; an element of ours takes less than 256 bytes.
const ELEMENTS_MAX_BYTES: usize = 60 * 1024;
/// `NFT_SET_*` flags.
const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_TIMEOUT: u32 = 0x10;
const SET_EVAL: u32 = 0x20;
const SET_CONCAT: u32 = 0x80;
/// `NFT_DATA_VERDICT`, and libnftables' verdict type.
const DATA_VERDICT: u32 = 0xffff_ff00;
/// Bits of a type in libnftables' concatenated types.
const TYPE_BITS: u32 = 6;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const RANDOM_FULLY: u32 = 1 << 4;

/// A change of one table, carried out whole or not at all.
pub(crate) struct Transaction {
    batch: Batch,
    family: Family,
    table: String,
    last: usize,
}

impl Transaction {
    /// An empty change of the table `name`.
    pub(crate) fn new(family: Family, name: &str) -> Self {
        let mut batch = Batch::default();
        batch.push(
            "begin a rule change (CAP_NET_ADMIN and CONFIG_NF_TABLES are needed)",
            BATCH_BEGIN,
            REQUEST,
            &header(0, SUBSYSTEM),
            |_| (),
        );
        Self { batch, family, table: name.into(), last: 0 }
    }

    fn message(&mut self, step: &'static str, kind: u16, flags: u16, fill: impl FnOnce(&mut Attributes<'_>)) {
        self.last = self.batch.len();
        let table = &self.table;
        self.batch.push(
            step,
            (SUBSYSTEM << 8) | kind,
            REQUEST | flags,
            &header(protocol_family(self.family), 0),
            |a| {
                a.text(1, table);
                fill(a);
            },
        );
    }

    /// Makes the table if it is missing.
    pub(crate) fn add_table(&mut self) {
        self.message("make the nftables table", NEW_TABLE, CREATE, |_| ());
    }

    /// Deletes the table and all that is in it; it must exist.
    pub(crate) fn delete_table(&mut self) {
        self.message("delete the nftables table", DELETE_TABLE, 0, |_| ());
    }

    pub(crate) fn add_chain(&mut self, name: &str, base: Option<BaseChain>) {
        self.message("add a chain", NEW_CHAIN, CREATE, |a| {
            a.text(3, name);
            if let Some(base) = base {
                a.nest(4, |a| {
                    a.be32(1, base.hook as u32).be32(2, base.priority.cast_unsigned());
                });
                a.be32(5, 1).text(7, base.kind);
            }
        });
    }

    pub(crate) fn delete_chain(&mut self, name: &str) {
        self.message("delete a chain", DELETE_CHAIN, 0, |a| {
            a.text(3, name);
        });
    }

    /// Deletes all rules of a chain.
    pub(crate) fn flush_chain(&mut self, name: &str) {
        self.message("flush a chain", DELETE_RULE, 0, |a| {
            a.text(2, name);
        });
    }

    pub(crate) fn add_rule(&mut self, chain: &str, rule: &[Expr]) {
        let family = self.family;
        self.message("add a rule", NEW_RULE, CREATE | APPEND, |a| {
            a.text(2, chain).nest(4, |a| {
                for expression in rule {
                    a.nest(1, |a| encode_expression(a, family, expression));
                }
            });
        });
    }

    pub(crate) fn add_set(&mut self, name: &str, id: u32, spec: &SetSpec) {
        self.message("add a set", NEW_SET, CREATE, |a| {
            let concat = spec.key.len() > 1;
            let mut flags = 0;
            flags |= if spec.interval { SET_INTERVAL } else { 0 };
            flags |= if concat { SET_CONCAT } else { 0 };
            flags |= if spec.data == SetData::None { 0 } else { SET_MAP };
            flags |= if spec.dynamic.is_some() { SET_EVAL | SET_TIMEOUT } else { 0 };
            let kind =
                |fields: &[super::Field]| fields.iter().fold(0, |kind, field| (kind << TYPE_BITS) | field.datatype());
            let len = |fields: &[super::Field]| match fields {
                [one] => one.len(),
                all => all.iter().map(|field| field.padded()).sum(),
            };
            a.text(2, name).be32(3, flags).be32(4, kind(&spec.key)).be32(5, size(len(&spec.key)));
            match &spec.data {
                SetData::None => {}
                SetData::Verdict => {
                    a.be32(6, DATA_VERDICT).be32(7, 0);
                }
                SetData::Fields(fields) => {
                    a.be32(6, kind(fields)).be32(7, size(len(fields)));
                }
            }
            if spec.dynamic.is_some() || concat {
                a.nest(9, |a| {
                    if let Some(max) = spec.dynamic {
                        a.be32(1, max);
                    }
                    if concat {
                        a.nest(2, |a| {
                            for field in &spec.key {
                                a.nest(1, |a| {
                                    a.be32(1, size(field.len()));
                                });
                            }
                        });
                    }
                });
            }
            a.be32(10, id);
        });
    }

    pub(crate) fn delete_set(&mut self, name: &str) {
        self.message("delete a set", DELETE_SET, 0, |a| {
            a.text(2, name);
        });
    }

    /// Adds elements that are not in the set.
    pub(crate) fn add_elements<'a>(&mut self, set: &str, elements: impl IntoIterator<Item = (&'a Element, &'a Value)>) {
        self.elements("add elements to a set", NEW_ELEMENTS, CREATE, set, elements);
    }

    /// Deletes elements that are in the set.
    pub(crate) fn delete_elements<'a>(&mut self, set: &str, elements: impl IntoIterator<Item = &'a Element>) {
        self.elements(
            "delete elements of a set",
            DELETE_ELEMENTS,
            0,
            set,
            elements.into_iter().map(|element| (element, &Value::None)),
        );
    }

    fn elements<'a>(
        &mut self,
        step: &'static str,
        kind: u16,
        flags: u16,
        set: &str,
        elements: impl IntoIterator<Item = (&'a Element, &'a Value)>,
    ) {
        let mut elements = elements.into_iter().peekable();
        while elements.peek().is_some() {
            self.message(step, kind, flags, |a| {
                a.text(2, set).nest(3, |a| {
                    let start = a.written();
                    while a.written() - start < ELEMENTS_MAX_BYTES
                        && let Some((element, value)) = elements.next()
                    {
                        a.nest(1, |a| {
                            a.nest(1, |a| {
                                a.bytes(1, &element.key);
                            });
                            if let Some(end) = &element.end {
                                a.nest(10, |a| {
                                    a.bytes(1, end);
                                });
                            }
                            match value {
                                Value::None => {}
                                Value::Verdict(verdict) => {
                                    a.nest(2, |a| encode_verdict(a, verdict));
                                }
                                Value::Data(data) => {
                                    a.nest(2, |a| {
                                        a.bytes(1, data);
                                    });
                                }
                            }
                        });
                    }
                });
            });
        }
    }

    /// Whether nothing is to be done.
    pub(crate) fn is_empty(&self) -> bool {
        self.batch.count() == 1
    }

    /// Carries the change out: when this returns `Ok`, the next packet sees all of it.
    pub(crate) fn commit(mut self, socket: &mut Socket) -> Result<(), NetlinkError> {
        if self.is_empty() {
            return Ok(());
        }
        self.batch.add_flags_to_last(self.last, ACK);
        socket.execute_transaction(self.batch, |batch| {
            batch.push("end a rule change", BATCH_END, REQUEST, &header(0, SUBSYSTEM), |_| ());
        })
    }
}

fn size(len: usize) -> u32 {
    u32::try_from(len).expect("keys are a few bytes long")
}

/// `struct nfgenmsg`.
fn header(family: u8, resource: u16) -> [u8; 4] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

fn protocol_family(family: Family) -> u8 {
    match family {
        Family::V4 => 2,
        Family::V6 => 10,
    }
}

/// Whether a table exists.
pub(crate) fn table_exists(socket: &mut Socket, family: Family, name: &str) -> Result<bool, NetlinkError> {
    let mut batch = Batch::default();
    batch.push(
        "look for the nftables table",
        (SUBSYSTEM << 8) | GET_TABLE,
        REQUEST | ACK,
        &header(protocol_family(family), 0),
        |a| {
            a.text(1, name);
        },
    );
    match socket.execute(&batch) {
        Ok(()) => Ok(true),
        Err(error) if error.is(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Deletes the elements that rules wrote into a map and that `doomed` points out by key and value.
pub(crate) fn purge(
    socket: &mut Socket,
    family: Family,
    table: &str,
    map: &str,
    doomed: impl Fn(&[u8], &[u8]) -> bool,
) -> Result<(), NetlinkError> {
    let mut batch = Batch::default();
    let kind = |message: u16| (SUBSYSTEM << 8) | message;
    batch.push("list a map", kind(GET_ELEMENTS), REQUEST | DUMP, &header(protocol_family(family), 0), |a| {
        a.text(1, table).text(2, map);
    });
    let mut found = Vec::new();
    socket.request(&batch, |_, payload| {
        let elements = payload.get(4..).and_then(|attributes| find(attributes, 3)).unwrap_or_default();
        for (_, element) in attributes(elements) {
            let bytes = |kind| find(element, kind).and_then(|data| find(data, 1));
            if let (Some(key), Some(value)) = (bytes(1), bytes(2))
                && doomed(key, value)
            {
                found.push(Element { key: key.into(), end: None });
            }
        }
    })?;
    for element in &found {
        let mut transaction = Transaction::new(family, table);
        transaction.delete_elements(map, [element]);
        match transaction.commit(socket) {
            // Its time was over before we came.
            Err(error) if error.is(Errno::ENOENT) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Deletes a table whether it exists or not.
pub(crate) fn delete_table(socket: &mut Socket, family: Family, name: &str) -> Result<(), NetlinkError> {
    let mut transaction = Transaction::new(family, name);
    transaction.add_table();
    transaction.delete_table();
    transaction.commit(socket)
}

fn encode_verdict(a: &mut Attributes<'_>, verdict: &Verdict) {
    let (code, chain): (i32, _) = match verdict {
        Verdict::Drop => (0, None),
        Verdict::Accept => (1, None),
        Verdict::Jump(chain) => (-3, Some(chain)),
        Verdict::Goto(chain) => (-4, Some(chain)),
        Verdict::Return => (-5, None),
    };
    a.nest(2, |a| {
        a.be32(1, code.cast_unsigned());
        if let Some(chain) = chain {
            a.text(2, chain);
        }
    });
}

/// `NFT_REG32_00` and following.
fn register(reg: Reg) -> u32 {
    8 + u32::from(reg.0)
}

fn value(a: &mut Attributes<'_>, kind: u16, bytes: &[u8]) {
    a.nest(kind, |a| {
        a.bytes(1, bytes);
    });
}

fn encode_expression(a: &mut Attributes<'_>, family: Family, expression: &Expr) {
    let mut put = |name: &str, fill: &dyn Fn(&mut Attributes<'_>)| {
        a.text(1, name).nest(2, |a| fill(a));
    };
    match expression {
        Expr::Meta { key, to } => put("meta", &|a| {
            a.be32(1, register(*to)).be32(2, *key as u32);
        }),
        Expr::SetMark { from } => put("meta", &|a| {
            a.be32(2, super::MetaKey::Mark as u32).be32(3, register(*from));
        }),
        Expr::Payload { base, offset, len, to } => put("payload", &|a| {
            a.be32(1, register(*to)).be32(2, *base as u32).be32(3, *offset).be32(4, *len);
        }),
        Expr::Cmp { reg, op, value: bytes } => put("cmp", &|a| {
            a.be32(1, register(*reg)).be32(2, *op as u32);
            value(a, 3, bytes);
        }),
        Expr::Bitwise { from, to, mask, xor } => put("bitwise", &|a| {
            a.be32(1, register(*from)).be32(2, register(*to)).be32(3, size(mask.len()));
            value(a, 4, mask);
            value(a, 5, xor);
        }),
        Expr::Load { to, value: bytes } => put("immediate", &|a| {
            a.be32(1, register(*to));
            value(a, 2, bytes);
        }),
        Expr::Verdict(verdict) => put("immediate", &|a| {
            a.be32(1, 0).nest(2, |a| encode_verdict(a, verdict));
        }),
        Expr::InSet { set, key, invert } => put("lookup", &|a| lookup(a, set, *key, None, *invert)),
        Expr::InNamedSet { set, key, invert } => put("lookup", &|a| lookup(a, set, *key, None, *invert)),
        Expr::Map { map, key, to } => put("lookup", &|a| lookup(a, map, *key, Some(register(*to)), false)),
        Expr::VerdictMap { map, key } => put("lookup", &|a| lookup(a, map, *key, Some(0), false)),
        Expr::Update { map, key, data, timeout_ms } => put("dynset", &|a| {
            a.text(1, map).be32(3, 1).be32(4, register(*key)).be32(5, register(*data)).be64(6, *timeout_ms);
        }),
        Expr::Random { modulus, offset, to } => put("numgen", &|a| {
            a.be32(1, register(*to)).be32(2, *modulus).be32(3, 1).be32(4, *offset);
        }),
        Expr::Fib { result, source, to } => put("fib", &|a| {
            const SOURCE_AND_LINK: u32 = 1 | 8;
            const DESTINATION: u32 = 2;
            a.be32(1, register(*to))
                .be32(2, *result as u32)
                .be32(3, if *source { SOURCE_AND_LINK } else { DESTINATION });
        }),
        Expr::Ct { key, to } => put("ct", &|a| {
            a.be32(1, register(*to)).be32(2, *key as u32);
        }),
        Expr::Nat { kind, address, port } => put("nat", &|a| {
            a.be32(1, *kind as u32).be32(2, u32::from(protocol_family(family))).be32(3, register(*address));
            if let Some(port) = port {
                a.be32(5, register(*port));
            }
        }),
        Expr::Masquerade => put("masq", &|a| {
            a.be32(1, RANDOM_FULLY);
        }),
        Expr::Reject(reject) => put("reject", &|a| {
            let code = match (reject, family) {
                (Reject::TcpReset, _) => {
                    a.be32(1, 1);
                    return;
                }
                (Reject::PortUnreachable, Family::V4) => 3,
                (Reject::PortUnreachable, Family::V6) => 4,
            };
            a.be32(1, 0).bytes(2, &[code]);
        }),
        Expr::NoTrack => put("notrack", &|_| ()),
    }
}

fn lookup(a: &mut Attributes<'_>, set: &str, key: Reg, to: Option<u32>, invert: bool) {
    a.text(1, set).be32(2, register(key));
    if let Some(to) = to {
        a.be32(3, to);
    }
    if invert {
        a.be32(5, 1);
    }
}
