//! The etcd store: what several servers share.
//!
//! Reads and writes go to etcd, linearizable. One watch of everything feeds the same log that the embedded store has,
//! from which all local watchers read; so etcd sees one watcher per server, whatever the number of clients.
//!
//! A value in etcd is one byte for the format, the offset of the revision (four bytes, little endian), and the JSON
//! with nothing at this offset: the revision that belongs there is etcd's own `mod_revision`.

mod mirror;
mod proto;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::{BufMut as _, Bytes, BytesMut};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Code, Status};

use crate::hub::{Bounds, Ledger};
use crate::object::splice;
use crate::{
    Deleted, Draft, Entry, Error, ListOptions, Listing, OpenError, Precondition, Store, Watch, check_draft, check_key,
};
use proto::{
    Client, Compare, CompareResult, CompareTarget, DeleteRangeRequest, KeyValue, Operand, Operation, Outcome,
    PutRequest, RangeRequest, RequestOp, TxnRequest, TxnResponse,
};

/// Before every key, so that an etcd which also serves others is no harm.
const ROOT: &str = "/coracle";

/// The first byte of every value.
const FORMAT: u8 = 1;

/// Bytes before the JSON of a value.
const VALUE_HEADER_BYTES: usize = 5;

/// Objects of one answer of etcd; longer lists take several at the same revision.
const PAGE_OBJECTS: usize = 1000;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(5);

/// Where etcd is and how to talk to it.
#[derive(Clone, Debug)]
pub struct EtcdOptions {
    /// Such as `https://10.0.0.1:2379`.
    pub endpoints: Vec<String>,
    /// The certificate authority that signed the servers' certificates (PEM); needed for `https`.
    pub ca_file: Option<PathBuf>,
    /// Our own certificate (PEM), if etcd asks for one.
    pub cert_file: Option<PathBuf>,
    /// The key of this certificate.
    pub key_file: Option<PathBuf>,
    /// How long the past is kept. Every server compacts etcd to this.
    pub history: Duration,
    /// Most changes of the past to keep in memory.
    pub history_events: usize,
    /// Most bytes of superseded versions to keep in memory.
    pub history_bytes: usize,
}

impl EtcdOptions {
    /// Plain options for these endpoints.
    pub fn new(endpoints: Vec<String>) -> EtcdOptions {
        EtcdOptions {
            endpoints,
            ca_file: None,
            cert_file: None,
            key_file: None,
            history: crate::HISTORY,
            history_events: crate::HISTORY_EVENTS,
            history_bytes: crate::HISTORY_BYTES,
        }
    }

    fn channel(&self) -> Result<Channel, OpenError> {
        let read = |path: &PathBuf| std::fs::read(path).map_err(OpenError::io("read", path));
        let mut tls = ClientTlsConfig::new();
        if let Some(path) = &self.ca_file {
            tls = tls.ca_certificate(Certificate::from_pem(read(path)?));
        }
        match (&self.cert_file, &self.key_file) {
            (Some(cert), Some(key)) => tls = tls.identity(Identity::from_pem(read(cert)?, read(key)?)),
            (None, None) => {}
            _ => return Err(OpenError::Etcd("a certificate and its key are given together or not at all".to_owned())),
        }
        let mut endpoints = Vec::new();
        for address in &self.endpoints {
            let invalid = |error: tonic::transport::Error| OpenError::Etcd(format!("endpoint {address}: {error}"));
            let mut endpoint = Endpoint::from_shared(address.clone())
                .map_err(invalid)?
                .connect_timeout(CONNECT_TIMEOUT)
                .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
                .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
                .keep_alive_while_idle(true);
            if address.starts_with("https://") {
                if self.ca_file.is_none() {
                    return Err(OpenError::Etcd(format!(
                        "endpoint {address}: https needs a certificate authority file"
                    )));
                }
                endpoint = endpoint.tls_config(tls.clone()).map_err(invalid)?;
            }
            endpoints.push(endpoint);
        }
        match endpoints.len() {
            0 => Err(OpenError::Etcd("no endpoint is given".to_owned())),
            1 => Ok(endpoints.remove(0).connect_lazy()),
            _ => Ok(Channel::balance_list(endpoints.into_iter())),
        }
    }
}

/// A store in an etcd cluster.
#[derive(Debug)]
pub struct Etcd {
    client: Client,
    ledger: Arc<Ledger>,
    mirror: tokio::task::JoinHandle<()>,
}

impl Etcd {
    /// Connects, and begins to follow what happens there.
    ///
    /// # Errors
    /// When the options are wrong or etcd does not answer.
    pub async fn connect(options: EtcdOptions) -> Result<Etcd, OpenError> {
        let client = Client::new(options.channel()?);
        let bounds = Bounds { events: options.history_events, bytes: options.history_bytes };
        let (ledger, mirror) = mirror::start(client.clone(), bounds, options.history).await?;
        Ok(Etcd { client, ledger, mirror })
    }

    async fn transact(
        &self,
        step: &'static str,
        key: &str,
        precondition: Precondition,
        operation: Operation,
    ) -> Result<TxnResponse, Error> {
        let compare = |result: CompareResult, target: CompareTarget, operand| Compare {
            result: result.into(),
            target: target.into(),
            key: etcd_key(key),
            operand: Some(operand),
        };
        let exists = compare(CompareResult::Greater, CompareTarget::Create, Operand::CreateRevision(0));
        let mut compares = match precondition {
            Precondition::Absent => {
                vec![compare(CompareResult::Equal, CompareTarget::Create, Operand::CreateRevision(0))]
            }
            // A missing key has modification revision 0.
            Precondition::Revision(revision) => {
                let revision = Operand::ModRevision(to_etcd(revision));
                vec![exists.clone(), compare(CompareResult::Equal, CompareTarget::Mod, revision)]
            }
            Precondition::Any => Vec::new(),
        };
        if matches!(operation, Operation::Delete(_)) {
            compares.push(exists);
        }
        let look = RangeRequest { key: etcd_key(key), ..RangeRequest::default() };
        let request = TxnRequest {
            compare: compares,
            success: vec![RequestOp { request: Some(operation) }],
            failure: vec![RequestOp { request: Some(Operation::Range(look)) }],
        };
        let mut answer = self.client.txn(request).await.map_err(|status| self.error(step, key, 0, &status))?;
        if !answer.succeeded {
            let current = match answer.responses.pop().and_then(|response| response.response) {
                Some(Outcome::Range(range)) => range.kvs.first().map(entry).transpose()?,
                _ => return Err(malformed(step)),
            };
            return Err(Error::Conflict { key: key.to_owned(), current });
        }
        Ok(answer)
    }

    fn error(&self, step: &'static str, key: &str, requested: u64, status: &Status) -> Error {
        let message = status.message();
        if message.contains("revision has been compacted") {
            return Error::Compacted { requested, oldest: self.ledger.past().oldest.max(requested + 1) };
        }
        if message.contains("future revision") {
            return Error::Future { requested, newest: self.ledger.past().newest.min(requested.saturating_sub(1)) };
        }
        if message.contains("space exceeded") {
            return Error::NoSpace { path: "etcd".into() };
        }
        if message.contains("request is too large") || message.contains("trying to send message larger than max") {
            return Error::Refused { key: key.to_owned(), problem: "it is larger than etcd takes" };
        }
        let reason =
            if status.code() == Code::Unknown || message.is_empty() { status.to_string() } else { message.to_owned() };
        Error::Unavailable { step, reason }
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.mirror.abort();
        self.ledger.end(Error::Closed);
    }
}

fn malformed(step: &'static str) -> Error {
    Error::Unavailable { step, reason: "the answer is not what the request asks for".to_owned() }
}

fn etcd_key(key: &str) -> Bytes {
    [ROOT, key].concat().into()
}

/// The first key after all keys of `scope`.
fn scope_end(scope: &str) -> Bytes {
    let mut end = [ROOT, scope].concat().into_bytes();
    // A slash or the last byte of a key: never the greatest byte.
    match end.last_mut() {
        Some(last) if scope.ends_with('/') => *last += 1,
        _ => end.push(0),
    }
    end.into()
}

fn to_etcd(revision: u64) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

fn from_etcd(revision: i64) -> u64 {
    u64::try_from(revision).unwrap_or(0)
}

fn etcd_value(draft: &Draft) -> Bytes {
    let mut value = BytesMut::with_capacity(VALUE_HEADER_BYTES + draft.json.len());
    value.put_u8(FORMAT);
    value.put_u32_le(u32::try_from(draft.splice).expect("drafts are checked to be short"));
    value.put_slice(&draft.json);
    value.freeze()
}

/// The object in a pair that etcd gave.
fn entry(pair: &KeyValue) -> Result<Entry, Error> {
    let wrong = |problem: &str| Error::Unavailable {
        step: "read",
        reason: format!("{} is no object of this program: {problem}", String::from_utf8_lossy(&pair.key)),
    };
    let key = std::str::from_utf8(&pair.key).ok().and_then(|key| key.strip_prefix(ROOT));
    let key = key.ok_or_else(|| wrong("its key is of another kind"))?;
    let (header, json) =
        pair.value.split_first_chunk::<VALUE_HEADER_BYTES>().ok_or_else(|| wrong("its value is too short"))?;
    let [format, offset @ ..] = *header;
    let offset = u32::from_le_bytes(offset);
    if format != FORMAT || offset as usize > json.len() {
        return Err(wrong("its value is of another format"));
    }
    let revision = from_etcd(pair.mod_revision);
    let (head, tail) = json.split_at(offset as usize);
    Ok(Entry {
        key: key.into(),
        revision,
        create_revision: from_etcd(pair.create_revision),
        value: splice(head, revision, tail),
        splice: offset,
    })
}

#[async_trait]
impl Store for Etcd {
    async fn get(&self, key: &str) -> Result<Option<Entry>, Error> {
        let request = RangeRequest { key: etcd_key(key), ..RangeRequest::default() };
        let answer = self.client.range(request).await.map_err(|status| self.error("get", key, 0, &status))?;
        answer.kvs.first().map(entry).transpose()
    }

    async fn put(&self, key: &str, draft: Draft, precondition: Precondition) -> Result<Entry, Error> {
        check_key(key)?;
        check_draft(key, &draft)?;
        let write = PutRequest { key: etcd_key(key), value: etcd_value(&draft), prev_kv: true };
        let mut answer = self.transact("put", key, precondition, Operation::Put(write)).await?;
        let revision = answer.header.map_or(0, |header| from_etcd(header.revision));
        let Some(Outcome::Put(put)) = answer.responses.pop().and_then(|response| response.response) else {
            return Err(malformed("put"));
        };
        Ok(Entry {
            key: key.into(),
            revision,
            create_revision: put.prev_kv.map_or(revision, |prev| from_etcd(prev.create_revision)),
            value: draft.finish(revision),
            splice: u32::try_from(draft.splice).expect("drafts are checked to be short"),
        })
    }

    async fn delete(&self, key: &str, precondition: Precondition) -> Result<Deleted, Error> {
        check_key(key)?;
        let delete = DeleteRangeRequest { key: etcd_key(key), prev_kv: true };
        let mut answer = self.transact("delete", key, precondition, Operation::Delete(delete)).await?;
        let revision = answer.header.map_or(0, |header| from_etcd(header.revision));
        match answer.responses.pop().and_then(|response| response.response) {
            Some(Outcome::Delete(deleted)) if !deleted.prev_kvs.is_empty() => {
                Ok(Deleted { prev: entry(&deleted.prev_kvs[0])?, revision })
            }
            _ => Err(malformed("delete")),
        }
    }

    async fn list(&self, scope: &str, options: ListOptions) -> Result<Listing, Error> {
        let mut revision = options.revision.unwrap_or(0);
        let mut start = match options.start_after.as_deref() {
            Some(after) if after >= scope => scope_end_of_key(after),
            _ => etcd_key(scope),
        };
        let limit = if options.limit == 0 { usize::MAX } else { options.limit };
        let end = scope_end(scope);
        let mut entries: Vec<Entry> = Vec::new();
        loop {
            let page = PAGE_OBJECTS.min(limit - entries.len());
            // A start behind the scope finds nothing, but the revision still has to be one that exists.
            let nothing = start >= end;
            let request = RangeRequest {
                key: if nothing { etcd_key(scope) } else { start.clone() },
                range_end: if nothing { Bytes::new() } else { end.clone() },
                limit: to_etcd(page as u64),
                revision: to_etcd(revision),
                count_only: nothing,
            };
            let answer = self.client.range(request).await.map_err(|s| self.error("list", scope, revision, &s))?;
            if revision == 0 {
                revision = answer.header.map_or(0, |header| from_etcd(header.revision));
            }
            for pair in &answer.kvs {
                entries.push(entry(pair)?);
            }
            let count = if nothing { 0 } else { from_etcd(answer.count) };
            let remaining = count.saturating_sub(answer.kvs.len() as u64);
            if remaining == 0 || entries.len() >= limit {
                return Ok(Listing { entries, revision, more: remaining > 0, remaining });
            }
            if let Some(last) = entries.last() {
                start = scope_end_of_key(&last.key);
            }
        }
    }

    async fn watch(&self, scope: &str, after: u64) -> Result<Watch, Error> {
        self.ledger.watch(scope, after)
    }

    async fn revision(&self) -> Result<u64, Error> {
        let request = RangeRequest { key: etcd_key("/"), count_only: true, ..RangeRequest::default() };
        let answer =
            self.client.range(request).await.map_err(|status| self.error("get the revision", "/", 0, &status))?;
        Ok(answer.header.map_or(0, |header| from_etcd(header.revision)))
    }

    async fn compacted(&self) -> Result<u64, Error> {
        Ok(self.ledger.past().oldest)
    }

    async fn compact(&self, revision: u64) -> Result<(), Error> {
        match self.client.compact(to_etcd(revision)).await.map_err(|s| self.error("compact", "", revision, &s)) {
            Ok(()) | Err(Error::Compacted { .. }) => {}
            Err(error) => return Err(error),
        }
        self.ledger.forget_slowly(revision).await;
        Ok(())
    }
}

/// The first key after `key`.
fn scope_end_of_key(key: &str) -> Bytes {
    [ROOT.as_bytes(), key.as_bytes(), &[0]].concat().into()
}
