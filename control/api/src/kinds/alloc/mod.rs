//! What a service is given out of what the cluster has: families, cluster addresses, node ports.

mod address;
pub(crate) mod claims;
mod family;
mod port;
mod range;

use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use coracle_schema::FieldError;
use serde_json::Value;

use crate::context::{Context, Operation};
use crate::kinds::edit::{child, list, text};
use crate::kinds::{Finish, ipaddress, service};
use crate::server::ApiServer;
use crate::status::Status;

/// What one request has set aside.
struct Reserved {
    api: Arc<ApiServer>,
    /// Addresses that were taken for the new object.
    ips: Vec<IpAddr>,
    /// Addresses of the old object that the new one has no longer.
    freed: Vec<IpAddr>,
    /// Node ports that were taken for the new object.
    ports: Vec<u16>,
    /// Node ports of the old object that the new one has no longer.
    freed_ports: Vec<u16>,
    namespace: String,
    name: String,
}

impl Reserved {
    /// Whether the object was written although its writer heard otherwise, as when an answer of etcd is lost. Who cannot tell keeps what
    /// was taken: it is given back when it proves to be nobody's.
    async fn is_stored(&self) -> bool {
        if self.ips.is_empty() && self.ports.is_empty() {
            return false;
        }
        match claims::held(&self.api, &self.namespace, &self.name).await {
            Ok(spec) => {
                addresses(&spec).iter().any(|ip| self.ips.contains(ip))
                    || port::ports(&spec).iter().any(|port| self.ports.contains(port))
            }
            Err(_) => true,
        }
    }
}

#[async_trait]
impl Finish for Reserved {
    async fn done(self: Box<Self>, stored: bool) {
        if !stored && self.is_stored().await {
            return;
        }
        for ip in if stored { &self.freed } else { &self.ips } {
            ipaddress::remove(&self.api, *ip).await;
        }
        for port in if stored { &self.freed_ports } else { &self.ports } {
            claims::free(self.api.store.as_ref(), *port).await;
        }
    }
}

/// Sets aside what a service needs that is created or changed.
pub async fn begin_service(
    ctx: &Context,
    new: &mut Value,
    old: Option<&Value>,
) -> Result<Option<Box<dyn Finish>>, Status> {
    if !ctx.subresource.is_empty() || !matches!(ctx.operation, Operation::Create | Operation::Update) {
        return Ok(None);
    }
    let mut reserved = Reserved {
        api: Arc::clone(&ctx.api),
        ips: Vec::new(),
        freed: Vec::new(),
        ports: Vec::new(),
        freed_ports: Vec::new(),
        namespace: ctx.namespace.clone(),
        name: crate::object::name(new).to_owned(),
    };
    let result = reserve(ctx, new, old, &mut reserved).await;
    let reserved = Box::new(reserved);
    match result {
        Ok(()) => Ok(Some(reserved)),
        Err(status) => {
            reserved.done(false).await;
            Err(status)
        }
    }
}

async fn reserve(ctx: &Context, new: &mut Value, old: Option<&Value>, reserved: &mut Reserved) -> Result<(), Status> {
    let before = old.and_then(|old| old.get("spec"));
    let mine = before.map(addresses).unwrap_or_default();
    let before_ports = before.map(port::ports).unwrap_or_default();
    if text(child(new, "spec"), "type") != "ExternalName" {
        if let Some(old) = old {
            service::keep_addresses(new, old);
        }
        let name = crate::object::name(new).to_owned();
        let errors = service::address_errors(new);
        if !errors.is_empty() {
            return Err(Status::invalid(&ctx.kind, &name, &errors));
        }
        let before = before.filter(|before| text(before, "type") != "ExternalName");
        family::settle(child(new, "spec"), before, &address::configured(ctx))
            .map_err(|errors| Status::invalid(&ctx.kind, &name, &errors))?;
        address::assign(ctx, new, &mine, reserved).await?;
    }
    port::assign(ctx, new, old, reserved).await?;
    let spec = child(new, "spec");
    let now = if text(spec, "type") == "ExternalName" { Vec::new() } else { addresses(spec) };
    reserved.freed = mine.into_iter().filter(|ip| !now.contains(ip)).collect();
    // Ports that the type does not have are dropped before the object is written.
    let has_ports = matches!(text(spec, "type"), "NodePort" | "LoadBalancer");
    let now = if has_ports { port::ports(spec) } else { Vec::new() };
    reserved.freed_ports = before_ports.into_iter().filter(|port| !now.contains(port)).collect();
    Ok(())
}

/// Withdraws the addresses of a service that is gone.
pub async fn service_deleted(ctx: &Context, service: &Value) {
    if ctx.dry_run {
        return;
    }
    for ip in service.get("spec").map(addresses).unwrap_or_default() {
        ipaddress::remove(&ctx.api, ip).await;
    }
    for port in service.get("spec").map(port::ports).unwrap_or_default() {
        claims::free(ctx.api.store.as_ref(), port).await;
    }
}

fn addresses(spec: &Value) -> Vec<IpAddr> {
    list(spec, "clusterIPs").iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect()
}

fn refuse(ctx: &Context, name: &str, error: FieldError) -> Status {
    Status::invalid(&ctx.kind, name, &[error])
}
