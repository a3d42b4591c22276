//! Node ports. A port is taken by making its claim ([`claims`]) before the service is written.

use std::collections::{HashMap, HashSet};

use coracle_schema::FieldError;
use serde_json::Value;

use super::{Reserved, claims, refuse};
use crate::context::Context;
use crate::kinds::edit::{child, int, list, put, text};
use crate::status::Status;

/// Ports that are tried before all that are taken are read.
const PROBES: usize = 8;

/// The node ports that a service has.
pub(super) fn ports(spec: &Value) -> Vec<u16> {
    list(spec, "ports")
        .iter()
        .filter_map(|p| int(p, "nodePort"))
        .chain(int(spec, "healthCheckNodePort"))
        .filter_map(|n| u16::try_from(n).ok())
        .filter(|n| *n != 0)
        .collect()
}

/// One choice of ports for one service.
struct Choice<'a> {
    ctx: &'a Context,
    name: &'a str,
    /// What the service has already.
    mine: Vec<u16>,
    /// What it was given so far.
    chosen: HashSet<u16>,
    reserved: &'a mut Reserved,
}

impl Choice<'_> {
    async fn take(&mut self, number: u16) -> Result<bool, Status> {
        let store = self.ctx.api.store.as_ref();
        if self.chosen.contains(&number) {
            return Ok(false);
        }
        let ours = if self.ctx.dry_run {
            claims::is_free(store, number).await?
        } else {
            claims::take(store, number, &self.ctx.namespace, self.name).await?
        };
        if ours {
            self.chosen.insert(number);
            self.reserved.ports.extend((!self.ctx.dry_run).then_some(number));
        }
        Ok(ours)
    }

    /// Sets the port aside that somebody asks for, or any free one.
    async fn number(&mut self, asked: i64, path: &str) -> Result<u16, Status> {
        let (first, last) = self.ctx.api.config.node_ports;
        let refused = |why: &str| Err(refuse(self.ctx, self.name, FieldError::invalid(path, asked, why)));
        if asked == 0 {
            let full = || FieldError::internal(path, "failed to allocate a nodePort: range is full");
            return self.any().await?.ok_or_else(|| refuse(self.ctx, self.name, full()));
        }
        let number = u16::try_from(asked).ok();
        if let Some(number) = number.filter(|number| self.mine.contains(number)) {
            return Ok(number);
        }
        match number.filter(|number| (first..=last).contains(number)) {
            None => {
                refused(&format!("provided port is not in the valid range. The range of valid ports is {first}-{last}"))
            }
            Some(number) if self.take(number).await? => Ok(number),
            Some(_) => {
                Err(refuse(self.ctx, self.name, FieldError::invalid(path, asked, "provided port is already allocated")))
            }
        }
    }

    async fn any(&mut self) -> Result<Option<u16>, Status> {
        let mut taken: Option<HashMap<u16, u64>> = None;
        for (tries, number) in places(self.ctx.api.config.node_ports).enumerate() {
            if tries == PROBES {
                taken = Some(claims::all(self.ctx.api.store.as_ref()).await?);
            }
            let is_known = taken.as_ref().is_some_and(|taken| taken.contains_key(&number));
            if !is_known && !self.mine.contains(&number) && self.take(number).await? {
                return Ok(Some(number));
            }
        }
        Ok(None)
    }
}

/// Gives a service the node ports that its type needs.
pub(super) async fn assign(
    ctx: &Context,
    new: &mut Value,
    old: Option<&Value>,
    reserved: &mut Reserved,
) -> Result<(), Status> {
    let name = crate::object::name(new).to_owned();
    let spec = child(new, "spec");
    let kind = text(spec, "type").to_owned();
    if !matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        return Ok(());
    }
    let balanced = kind == "LoadBalancer";
    let wants = !balanced || spec.get("allocateLoadBalancerNodePorts").is_none_or(|wanted| wanted != false);
    let mine = old.and_then(|old| old.get("spec")).map(ports).unwrap_or_default();
    let mut choice = Choice { ctx, name: &name, mine, chosen: HashSet::new(), reserved };
    // One number may be given twice, for two protocols.
    let mut own: Vec<(u16, String)> = Vec::new();
    let asked: Vec<(i64, String)> = list(spec, "ports")
        .iter()
        .map(|port| (int(port, "nodePort").unwrap_or(0), text(port, "protocol").to_owned()))
        .collect();
    for (at, (asked, protocol)) in asked.into_iter().enumerate() {
        let shared = own.iter().any(|(number, by)| i64::from(*number) == asked && *by != protocol);
        if shared || (asked == 0 && !wants) {
            continue;
        }
        let number = choice.number(asked, &format!("spec.ports[{at}].nodePort")).await?;
        if let Some(port) = spec.pointer_mut(&format!("/ports/{at}")) {
            put(port, "nodePort", number);
        }
        own.push((number, protocol));
    }
    if balanced && text(spec, "externalTrafficPolicy") == "Local" {
        let asked = int(spec, "healthCheckNodePort").unwrap_or(0);
        put(spec, "healthCheckNodePort", choice.number(asked, "spec.healthCheckNodePort").await?);
    }
    Ok(())
}

/// All ports of a range from a random place on; the first ones, which people ask for by number, last (KEP-3668).
fn places((first, last): (u16, u16)) -> impl Iterator<Item = u16> {
    let size = u32::from(last.saturating_sub(first)) + 1;
    let low = (size / 32).min(128);
    let start = rand::random_range(0..(size - low).max(1));
    let upper = (0..size - low).map(move |place| low + (start + place) % (size - low));
    upper.chain(0..low).filter_map(move |offset| u16::try_from(u32::from(first) + offset).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_port_is_offered_once(size in 1_u16..300) {
            let mut all: Vec<u16> = places((30_000, 30_000 + size - 1)).collect();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(30_000..30_000 + size));
        }
    }
}
