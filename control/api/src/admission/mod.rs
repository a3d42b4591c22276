//! Admission: the chain of plugins that every write passes.

pub mod call;
pub mod guards;
pub mod lifecycle;
pub mod limits;
pub mod matching;
pub mod plugin;
pub mod pod_security;
pub mod pods;
pub mod policy;
pub mod quota;
pub mod service_account;
pub mod storage;
pub mod typecheck;
pub mod webhook;

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

use crate::admission::plugin::{Plugin, Rowed};
use crate::context::Context;
use crate::server::ApiServer;
use crate::status::Status;

/// An admission plugin. On delete `object` is `Null` and `old` the object that goes; on connect `object` is the options.
#[async_trait]
pub trait Admission: Send + Sync + 'static {
    /// Name as in `--enable-admission-plugins`.
    fn name(&self) -> &'static str;

    /// Whether the plugin looks at this request at all; asked before either phase, so that idle plugins cost nothing.
    fn handles(&self, ctx: &Context) -> bool;

    /// Mutating phase.
    async fn admit(&self, _ctx: &Context, _object: &mut Value, _old: Option<&Value>) -> Result<(), Status> {
        Ok(())
    }

    /// Validating phase, after the strategy's validation; the object is as it will be stored.
    async fn validate(&self, _ctx: &Context, _object: &Value, _old: Option<&Value>) -> Result<(), Status> {
        Ok(())
    }
}

/// All plugins in the order of a real server; quota comes last, so that only what nobody refuses is charged.
static PLUGINS: [&Plugin; 22] = [
    &lifecycle::PLUGIN,
    &limits::PLUGIN,
    &service_account::PLUGIN,
    &guards::NODES,
    &pods::TAINT_NODES,
    &pod_security::PLUGIN,
    &pods::PRIORITY,
    &pods::TOLERATIONS,
    &storage::IN_USE,
    &storage::RESIZE,
    &pods::RUNTIME_CLASS,
    &guards::CERTIFICATES,
    &guards::CERTIFICATE_SUBJECT,
    &guards::OWNERS,
    &guards::ESCALATION,
    &storage::INGRESS_CLASS,
    &storage::STORAGE_CLASS,
    &policy::MUTATING,
    &webhook::MUTATING,
    &policy::VALIDATING,
    &webhook::VALIDATING,
    &quota::PLUGIN,
];

/// The plugins of a server, in the order in which they run.
pub fn chain(api: &Arc<ApiServer>) -> Vec<Arc<dyn Admission>> {
    let disabled = &api.config.disabled_admission;
    let runs = |p: &&&'static Plugin| !disabled.iter().any(|d| d == p.name);
    PLUGINS.iter().filter(runs).map(|p| Arc::new(Rowed(p)) as Arc<dyn Admission>).collect()
}
