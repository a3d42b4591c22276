//! Service addresses and node ports.
//!
//! What is taken is read from the stored services themselves, so that nothing can leak and a crash needs no repair. Between a
//! choice and the store's answer the choice is held in memory, so that two creations never get the same one. Every cluster
//! address is also published as an `IPAddress` object, as clients expect.

use std::collections::HashSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use async_trait::async_trait;
use coracle_schema::FieldError;
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::context::{Context, Operation};
use crate::kinds::Finish;
use crate::kinds::edit::{child, each, int, list, put, text};
use crate::server::ApiServer;
use crate::status::Status;

/// What is set aside by requests that have not been answered yet.
static HELD: Mutex<Option<Held>> = Mutex::new(None);
/// Most addresses that are tried one after the other before the range counts as full.
const SCAN_MAX: u32 = 1 << 20;

#[derive(Default)]
struct Held {
    ips: HashSet<(usize, String)>,
    ports: HashSet<(usize, u16)>,
}

/// Gives back what a request had set aside, whatever became of it: a stored object holds its own.
struct Release {
    server: usize,
    ips: Vec<String>,
    ports: Vec<u16>,
    publish: Option<Publish>,
}

struct Publish {
    api: Arc<ApiServer>,
    namespace: String,
    name: String,
    add: Vec<String>,
    remove: Vec<String>,
}

impl Drop for Release {
    fn drop(&mut self) {
        let mut held = HELD.lock();
        let held = held.get_or_insert_with(Held::default);
        for ip in self.ips.drain(..) {
            held.ips.remove(&(self.server, ip));
        }
        for port in self.ports.drain(..) {
            held.ports.remove(&(self.server, port));
        }
    }
}

#[async_trait]
impl Finish for Release {
    async fn done(mut self: Box<Self>, stored: bool) {
        if let (true, Some(p)) = (stored, self.publish.take()) {
            for ip in &p.remove {
                super::ipaddress::remove(&p.api, ip).await;
            }
            for ip in &p.add {
                super::ipaddress::publish(&p.api, ip, &p.namespace, &p.name).await;
            }
        }
    }
}

/// A range of addresses, such as `10.43.0.0/16`: first usable address and how many.
#[derive(Clone, Copy, Debug)]
struct Range {
    base: u32,
    size: u32,
}

impl Range {
    fn parse(cidr: &str) -> Option<Self> {
        let (ip, len) = cidr.split_once('/')?;
        let (ip, len): (Ipv4Addr, u32) = (ip.parse().ok()?, len.parse().ok()?);
        if !(8..=30).contains(&len) {
            return None;
        }
        let size = 1u32 << (32 - len);
        // Network and broadcast addresses are not given out.
        Some(Range { base: (u32::from(ip) & !(size - 1)) + 1, size: size - 2 })
    }

    fn contains(self, ip: Ipv4Addr) -> bool {
        let n = u32::from(ip);
        n >= self.base && n < self.base + self.size
    }

    /// The lower part is kept for addresses that people choose: between 16 and 256 of them.
    fn reserved(self) -> u32 {
        (self.size / 16).clamp(16.min(self.size), 256)
    }
}

fn server_id(api: &Arc<ApiServer>) -> usize {
    Arc::as_ptr(api).addr()
}

/// Sets addresses and ports aside for a service that is created or changed.
pub async fn begin_service(
    ctx: &Context,
    new: &mut Value,
    old: Option<&Value>,
) -> Result<Option<Box<dyn Finish>>, Status> {
    if !ctx.subresource.is_empty() || !matches!(ctx.operation, Operation::Create | Operation::Update) {
        return Ok(None);
    }
    let name = crate::object::name(new).to_owned();
    let ranges = ranges(ctx).await?;
    let taken = taken(ctx, &name).await?;
    let id = server_id(&ctx.api);
    let mut release = Release { server: id, ips: vec![], ports: vec![], publish: None };
    let old_ips: Vec<String> = old.and_then(|o| o.get("spec")).map(addresses).unwrap_or_default();
    if text(child(new, "spec"), "type") != "ExternalName" {
        // What the old object has and the new one leaves out stays as it is.
        if let Some(before) = old.and_then(|o| o.get("spec"))
            && text(before, "type") != "ExternalName"
        {
            let spec = child(new, "spec");
            if text(spec, "clusterIP").is_empty() && list(spec, "clusterIPs").is_empty() {
                for f in ["clusterIP", "clusterIPs"] {
                    if let Some(v) = before.get(f) {
                        put(spec, f, v.clone());
                    }
                }
            }
        }
        families(ctx, new, &ranges)?;
        assign_ip(ctx, new, &ranges, &taken, &old_ips, &mut release)?;
    }
    assign_ports(ctx, new, old, &taken, &mut release)?;
    let now = addresses(child(new, "spec"));
    if !ctx.dry_run {
        release.publish = Some(Publish {
            api: Arc::clone(&ctx.api),
            namespace: ctx.namespace.clone(),
            name,
            add: now.iter().filter(|i| !old_ips.contains(i)).cloned().collect(),
            remove: old_ips.iter().filter(|i| !now.contains(i)).cloned().collect(),
        });
    }
    Ok(Some(Box::new(release)))
}

/// Withdraws the published addresses of a service that is gone.
pub async fn service_deleted(ctx: &Context, service: &Value) {
    if ctx.dry_run {
        return;
    }
    for ip in service.get("spec").map(addresses).unwrap_or_default() {
        super::ipaddress::remove(&ctx.api, &ip).await;
    }
}

fn addresses(spec: &Value) -> Vec<String> {
    let mut out: Vec<String> = list(spec, "clusterIPs").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let first = text(spec, "clusterIP");
    if out.is_empty() && !first.is_empty() {
        out.push(first.to_owned());
    }
    out.retain(|ip| ip.parse::<IpAddr>().is_ok());
    out
}

/// The configured range and those of `ServiceCIDR` objects that are ready.
async fn ranges(ctx: &Context) -> Result<Vec<Range>, Status> {
    let mut out: Vec<Range> = ctx.api.config.service_cidr.split(',').filter_map(Range::parse).collect();
    if let Some(kind) = ctx.api.kind("networking.k8s.io", "v1", "servicecidrs") {
        for o in ctx.api.list(&kind, "").await? {
            if o.pointer("/metadata/deletionTimestamp").is_some() {
                continue;
            }
            for c in o.pointer("/spec/cidrs").and_then(Value::as_array).into_iter().flatten() {
                if let Some(r) = c.as_str().and_then(Range::parse)
                    && !out.iter().any(|x| x.base == r.base && x.size == r.size)
                {
                    out.push(r);
                }
            }
        }
    }
    Ok(out)
}

struct Taken {
    ips: HashSet<String>,
    ports: HashSet<u16>,
}

/// Addresses and ports of all other services.
async fn taken(ctx: &Context, own: &str) -> Result<Taken, Status> {
    let mut out = Taken { ips: HashSet::new(), ports: HashSet::new() };
    for o in ctx.api.list(&ctx.kind, "").await? {
        if crate::object::name(&o) == own && crate::object::namespace(&o) == ctx.namespace {
            continue;
        }
        let Some(spec) = o.get("spec") else { continue };
        out.ips.extend(addresses(spec));
        out.ports.extend(ports(spec));
    }
    Ok(out)
}

fn ports(spec: &Value) -> Vec<u16> {
    list(spec, "ports")
        .iter()
        .filter_map(|p| int(p, "nodePort"))
        .chain(int(spec, "healthCheckNodePort"))
        .filter_map(|n| u16::try_from(n).ok())
        .filter(|n| *n != 0)
        .collect()
}

fn refuse(ctx: &Context, name: &str, error: FieldError) -> Status {
    Status::invalid(&ctx.kind, name, &[error])
}

/// Families: one family clusters get that one, and may not require two.
fn families(ctx: &Context, new: &mut Value, _ranges: &[Range]) -> Result<(), Status> {
    let name = crate::object::name(new).to_owned();
    let spec = child(new, "spec");
    let headless = text(spec, "clusterIP") == "None";
    let selectorless = spec.get("selector").is_none_or(|s| s.as_object().is_some_and(serde_json::Map::is_empty));
    let policy = text(spec, "ipFamilyPolicy").to_owned();
    if policy == "RequireDualStack" && !(headless && selectorless) {
        return Err(refuse(
            ctx,
            &name,
            FieldError::invalid(
                "spec.ipFamilyPolicy",
                "RequireDualStack",
                "this cluster is not configured for dual-stack services",
            ),
        ));
    }
    if list(spec, "ipFamilies").iter().any(|f| f == "IPv6") && !(headless && selectorless) {
        let at = list(spec, "ipFamilies").iter().position(|f| f == "IPv6").unwrap_or_default();
        return Err(refuse(
            ctx,
            &name,
            FieldError::invalid(format!("spec.ipFamilies[{at}]"), "IPv6", "not configured on this cluster"),
        ));
    }
    if policy.is_empty() {
        let both = headless && selectorless && list(spec, "ipFamilies").len() == 2;
        put(spec, "ipFamilyPolicy", if headless && selectorless && both { "RequireDualStack" } else { "SingleStack" });
    }
    if list(spec, "ipFamilies").is_empty() {
        let first = list(spec, "clusterIPs").first().and_then(Value::as_str).unwrap_or_default();
        put(spec, "ipFamilies", json!([if first.contains(':') { "IPv6" } else { "IPv4" }]));
    }
    Ok(())
}

fn assign_ip(
    ctx: &Context,
    new: &mut Value,
    ranges: &[Range],
    taken: &Taken,
    mine: &[String],
    release: &mut Release,
) -> Result<(), Status> {
    let name = crate::object::name(new).to_owned();
    let spec = child(new, "spec");
    if text(spec, "clusterIP") == "None" {
        put(spec, "clusterIPs", json!(["None"]));
        return Ok(());
    }
    let server = release.server;
    let mut guard = HELD.lock();
    let held = guard.get_or_insert_with(Held::default);
    let asked = addresses(spec);
    if asked.is_empty() && !list(spec, "clusterIPs").is_empty() {
        // Something that is no address: validation finds the words.
        return Ok(());
    }
    if let Some(ip) = asked.first() {
        if mine.contains(ip) {
            return Ok(());
        }
        let at = "spec.clusterIPs";
        let Ok(v4) = ip.parse::<Ipv4Addr>() else { return Ok(()) };
        if !ranges.iter().any(|r| r.contains(v4)) {
            let range = ctx.api.config.service_cidr.as_str();
            return Err(refuse(
                ctx,
                &name,
                FieldError::invalid(
                    at,
                    json!([ip]),
                    format!(
                        "failed to allocate IP {ip}: the provided IP ({ip}) is not in the valid range. The range of valid IPs is {range}"
                    ),
                ),
            ));
        }
        if taken.ips.contains(ip) || !held.ips.insert((server, ip.clone())) {
            return Err(refuse(
                ctx,
                &name,
                FieldError::invalid(
                    at,
                    json!([ip]),
                    format!("failed to allocate IP {ip}: provided IP is already allocated"),
                ),
            ));
        }
        release.ips.push(ip.clone());
        put(spec, "clusterIPs", json!([ip]));
        return Ok(());
    }
    // The upper part of a range first, at a random place; the lower part is for those who ask by number.
    let dns = ctx.api.config.dns_ip.to_string();
    for r in ranges {
        let low = r.reserved();
        let start = rand::random_range(0..r.size - low);
        let upper = (0..r.size - low).map(|i| low + (start + i) % (r.size - low));
        for offset in upper.chain(0..low).take(SCAN_MAX as usize) {
            let ip = Ipv4Addr::from(r.base + offset).to_string();
            let free = ip != dns && !taken.ips.contains(&ip);
            if free && held.ips.insert((server, ip.clone())) {
                release.ips.push(ip.clone());
                put(spec, "clusterIP", ip.clone());
                put(spec, "clusterIPs", json!([ip]));
                return Ok(());
            }
        }
    }
    Err(Status::internal("failed to allocate a serviceIP: range is full"))
}

fn assign_ports(
    ctx: &Context,
    new: &mut Value,
    old: Option<&Value>,
    taken: &Taken,
    release: &mut Release,
) -> Result<(), Status> {
    let name = crate::object::name(new).to_owned();
    let spec = child(new, "spec");
    let kind = text(spec, "type").to_owned();
    let balanced = kind == "LoadBalancer";
    let wants =
        kind == "NodePort" || (balanced && spec.get("allocateLoadBalancerNodePorts").is_none_or(|v| v != false));
    let mine: Vec<u16> = old.and_then(|o| o.get("spec")).map(ports).unwrap_or_default();
    if let Some(before) =
        old.and_then(|o| o.get("spec")).filter(|_| matches!(kind.as_str(), "NodePort" | "LoadBalancer"))
    {
        let old_ports = list(before, "ports").to_vec();
        let used: Vec<i64> = list(spec, "ports").iter().filter_map(|p| int(p, "nodePort")).collect();
        each(spec, "ports", |p| {
            let same = |o: &&Value| int(o, "port") == int(p, "port") && text(o, "protocol") == text(p, "protocol");
            let n = old_ports.iter().find(same).and_then(|o| int(o, "nodePort"));
            if int(p, "nodePort").unwrap_or(0) == 0
                && let Some(n) = n
                && !used.contains(&n)
            {
                put(p, "nodePort", n);
            }
        });
    }
    let (first, last) = ctx.api.config.node_ports;
    let server = release.server;
    let mut guard = HELD.lock();
    let held = guard.get_or_insert_with(Held::default);
    // One port may be given twice, for two protocols.
    let mut own: Vec<(u16, String)> = Vec::new();
    let mut failure = None;
    if !matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        return Ok(());
    }
    let mut i = 0;
    each(spec, "ports", |p| {
        let at = format!("spec.ports[{i}].nodePort");
        i += 1;
        let protocol = text(p, "protocol").to_owned();
        let asked = int(p, "nodePort").unwrap_or(0);
        if asked != 0 {
            let Ok(n) = u16::try_from(asked) else {
                failure = Some(FieldError::invalid(
                    at,
                    asked,
                    format!("provided port is not in the valid range. The range of valid ports is {first}-{last}"),
                ));
                return;
            };
            let shared = own.iter().any(|(m, proto)| *m == n && *proto != protocol);
            if mine.contains(&n) || shared {
                own.push((n, protocol));
                return;
            }
            if !(first..=last).contains(&n) {
                failure = Some(FieldError::invalid(
                    at,
                    asked,
                    format!("provided port is not in the valid range. The range of valid ports is {first}-{last}"),
                ));
            } else if taken.ports.contains(&n) || !held.ports.insert((server, n)) {
                failure = Some(FieldError::invalid(at, asked, "provided port is already allocated"));
            } else {
                release.ports.push(n);
                own.push((n, protocol));
            }
        } else if wants && failure.is_none() {
            match free_port(first, last, |n| {
                !taken.ports.contains(&n) && !mine.contains(&n) && held.ports.insert((server, n))
            }) {
                Some(n) => {
                    release.ports.push(n);
                    own.push((n, protocol));
                    put(p, "nodePort", n);
                }
                None => failure = Some(FieldError::internal(at, "failed to allocate a nodePort: range is full")),
            }
        }
    });
    if let Some(error) = failure {
        return Err(refuse(ctx, &name, error));
    }
    if balanced && text(spec, "externalTrafficPolicy") == "Local" {
        let asked = int(spec, "healthCheckNodePort").and_then(|n| u16::try_from(n).ok()).unwrap_or(0);
        if asked == 0 {
            let kept = old.and_then(|o| o.get("spec")).and_then(|s| int(s, "healthCheckNodePort")).filter(|n| *n != 0);
            if let Some(n) = kept {
                put(spec, "healthCheckNodePort", n);
            } else if let Some(n) = free_port(first, last, |n| {
                !taken.ports.contains(&n) && !mine.contains(&n) && held.ports.insert((server, n))
            }) {
                release.ports.push(n);
                put(spec, "healthCheckNodePort", n);
            }
        } else if !mine.contains(&asked) && !taken.ports.contains(&asked) && held.ports.insert((server, asked)) {
            release.ports.push(asked);
        } else if !mine.contains(&asked) {
            return Err(refuse(
                ctx,
                &name,
                FieldError::invalid("spec.healthCheckNodePort", asked, "provided port is already allocated"),
            ));
        }
    }
    Ok(())
}

/// A free port, from a random place on; the first ports of the range are for those who ask by number.
fn free_port(first: u16, last: u16, mut take: impl FnMut(u16) -> bool) -> Option<u16> {
    let size = u32::from(last.saturating_sub(first)) + 1;
    let low = (size / 32).clamp(0, 128);
    let start = rand::random_range(0..(size - low).max(1));
    let upper = (0..size - low).map(|i| low + (start + i) % (size - low));
    upper.chain(0..low).filter_map(|o| u16::try_from(u32::from(first) + o).ok()).find(|n| take(*n))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_leave_network_and_broadcast_out() {
        let r = Range::parse("10.43.0.0/16").expect("a range");
        assert!(!r.contains("10.43.0.0".parse().expect("ip")) && !r.contains("10.43.255.255".parse().expect("ip")));
        assert!(r.contains("10.43.0.1".parse().expect("ip")) && r.contains("10.43.255.254".parse().expect("ip")));
        assert_eq!(r.reserved(), 256);
        assert!(Range::parse("10.0.0.0/33").is_none() && Range::parse("x").is_none());
    }

    proptest! {
        #[test]
        fn ports_are_found_while_any_is_free(used in proptest::collection::hash_set(30000u16..30040, 0..40)) {
            let found = free_port(30000, 30039, |n| !used.contains(&n));
            prop_assert_eq!(found.is_some(), used.len() < 40);
            prop_assert!(found.is_none_or(|n| !used.contains(&n)));
        }
    }
}
