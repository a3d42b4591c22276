//! Admission: the chain of plugins that every write passes.

use std::sync::Arc;

use async_trait::async_trait;
use serde_json::Value;

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

/// The plugins of a server, in the order in which they run.
pub fn chain(_api: &Arc<ApiServer>) -> Vec<Arc<dyn Admission>> {
    Vec::new()
}
