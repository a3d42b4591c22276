//! Cluster addresses. An address is taken by making its `IPAddress` object: of several servers on one store only one can,
//! and what a crash leaves behind is given back by the controller of these objects.

use std::collections::HashSet;
use std::net::IpAddr;

use coracle_schema::FieldError;
use serde_json::{Value, json};

use super::family::{V4, V6};
use super::range::Range;
use super::{Reserved, addresses, refuse};
use crate::context::Context;
use crate::kinds::edit::{child, list, put, text};
use crate::kinds::ipaddress;
use crate::status::Status;

/// Addresses that are tried before all that are taken are read.
const PROBES: usize = 8;
/// Addresses that are looked at before a range counts as full.
const SCAN_MAX: usize = 1 << 20;

/// The ranges that the cluster is configured with, the default family's first; with those of `ServiceCIDR` objects that
/// are not going.
pub(super) async fn ranges(ctx: &Context) -> Result<Vec<Range>, Status> {
    let mut out: Vec<Range> = ctx.api.config.service_cidr.split(',').filter_map(Range::parse).collect();
    let Some(kind) = ctx.api.kind("networking.k8s.io", "v1", "servicecidrs") else { return Ok(out) };
    for object in ctx.api.list(&kind, "").await? {
        if object.pointer("/metadata/deletionTimestamp").is_some() {
            continue;
        }
        let cidrs = object.pointer("/spec/cidrs").and_then(Value::as_array).into_iter().flatten();
        for range in cidrs.filter_map(Value::as_str).filter_map(Range::parse) {
            if !out.contains(&range) {
                out.push(range);
            }
        }
    }
    Ok(out)
}

/// The families that the cluster is configured for, the default one first.
pub(super) fn configured(ctx: &Context) -> Vec<&'static str> {
    let mut out = Vec::new();
    for range in ctx.api.config.service_cidr.split(',').filter_map(Range::parse) {
        let family = if range.is_v6() { V6 } else { V4 };
        if !out.contains(&family) {
            out.push(family);
        }
    }
    out
}

/// Gives a service one address of each of its families: those that it asks for, and any where it does not. `mine` are those
/// that it has already.
pub(super) async fn assign(
    ctx: &Context,
    new: &mut Value,
    mine: &[IpAddr],
    reserved: &mut Reserved,
) -> Result<(), Status> {
    let name = crate::object::name(new).to_owned();
    let spec = child(new, "spec");
    if text(spec, "clusterIP") == "None" {
        put(spec, "clusterIPs", json!(["None"]));
        return Ok(());
    }
    let asked = addresses(spec);
    if asked.len() < list(spec, "clusterIPs").len() {
        // Something that is no address: validation finds the words.
        return Ok(());
    }
    let given = list(spec, "clusterIPs").to_vec();
    let families: Vec<String> = list(spec, "ipFamilies").iter().filter_map(Value::as_str).map(Into::into).collect();
    let mut ips = given.clone();
    let ranges = if asked.len() == families.len() && asked.iter().all(|ip| mine.contains(ip)) {
        Vec::new()
    } else {
        ranges(ctx).await?
    };
    for (i, family) in families.iter().enumerate() {
        let ranges = ranges.iter().filter(|range| range.is_v6() == (family == V6));
        match asked.get(i) {
            Some(ip) if mine.contains(ip) => {}
            Some(ip) => {
                let ranges: Vec<_> = ranges.collect();
                let failed = if !ranges.iter().any(|range| range.contains(*ip)) {
                    let range = ctx.api.config.service_cidr.as_str();
                    Some(format!("the provided IP ({ip}) is not in the valid range. The range of valid IPs is {range}"))
                } else if !take(ctx, &name, *ip, reserved).await? {
                    Some("provided IP is already allocated".to_owned())
                } else {
                    None
                };
                if let Some(why) = failed {
                    let why = format!("failed to allocate IP {ip}: {why}");
                    return Err(refuse(ctx, &name, FieldError::invalid("spec.clusterIPs", json!(given), why)));
                }
            }
            None => {
                let Some(ip) = any(ctx, &name, ranges.copied(), reserved).await? else {
                    return Err(Status::internal("failed to allocate a serviceIP: range is full"));
                };
                ips.push(json!(ip.to_string()));
            }
        }
    }
    if let Some(first) = ips.first() {
        put(spec, "clusterIP", first.clone());
    }
    put(spec, "clusterIPs", json!(ips));
    Ok(())
}

/// Takes any free address of the ranges.
async fn any(
    ctx: &Context,
    name: &str,
    ranges: impl Iterator<Item = Range>,
    reserved: &mut Reserved,
) -> Result<Option<IpAddr>, Status> {
    for range in ranges {
        let mut taken: Option<HashSet<IpAddr>> = None;
        for (tries, ip) in range.addresses(rand::random()).take(SCAN_MAX).enumerate() {
            if tries == PROBES {
                taken = Some(ipaddress::all(&ctx.api).await?);
            }
            if ctx.api.config.dns_ips.contains(&ip) || taken.as_ref().is_some_and(|taken| taken.contains(&ip)) {
                continue;
            }
            if take(ctx, name, ip, reserved).await? {
                return Ok(Some(ip));
            }
        }
    }
    Ok(None)
}

/// Takes one address; `false`: another has it.
async fn take(ctx: &Context, name: &str, ip: IpAddr, reserved: &mut Reserved) -> Result<bool, Status> {
    if ctx.dry_run {
        return ipaddress::is_free(&ctx.api, ip).await;
    }
    let ours = ipaddress::claim(&ctx.api, ip, &ctx.namespace, name).await?;
    if ours {
        reserved.ips.push(ip);
    }
    Ok(ours)
}
