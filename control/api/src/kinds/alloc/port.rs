//! Node ports. Which are taken is read from the services themselves, so that nothing can leak and a crash needs no repair;
//! between a choice and the store's answer it is held in memory, so that two requests never choose the same one.

use std::collections::HashSet;
use std::sync::Arc;

use coracle_schema::FieldError;
use parking_lot::Mutex;
use serde_json::Value;

use super::{Reserved, refuse};
use crate::context::Context;
use crate::kinds::edit::{child, each, int, list, put, text};
use crate::status::Status;

/// Ports that are set aside by requests which have not been answered yet; bounded by these.
#[derive(Debug, Default)]
pub(crate) struct HeldPorts(Mutex<HashSet<u16>>);

/// One port that is set aside, until this is dropped: a stored service holds its own.
pub(super) struct HeldPort {
    ports: Arc<HeldPorts>,
    number: u16,
}

impl HeldPorts {
    fn hold(self: &Arc<Self>, number: u16) -> Option<HeldPort> {
        self.0.lock().insert(number).then(|| HeldPort { ports: self.clone(), number })
    }
}

impl Drop for HeldPort {
    fn drop(&mut self) {
        self.ports.0.lock().remove(&self.number);
    }
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

/// The ports that others have or are about to have.
async fn taken(ctx: &Context, own: &str) -> Result<HashSet<u16>, Status> {
    // In this order: what is held no more when it is looked at has been stored, and is listed.
    let mut out = ctx.api.held_ports.0.lock().clone();
    for object in ctx.api.list(&ctx.kind, "").await? {
        if crate::object::name(&object) != own || crate::object::namespace(&object) != ctx.namespace {
            out.extend(object.get("spec").map(ports).unwrap_or_default());
        }
    }
    Ok(out)
}

/// One choice of ports for one service.
struct Choice<'a> {
    held: Arc<HeldPorts>,
    /// First and last of the range.
    range: (u16, u16),
    taken: HashSet<u16>,
    /// What the service has already.
    mine: Vec<u16>,
    reserved: &'a mut Reserved,
}

impl Choice<'_> {
    fn hold(&mut self, number: u16) -> bool {
        if self.taken.contains(&number) {
            return false;
        }
        let held = self.held.hold(number);
        let is_ours = held.is_some();
        self.reserved.ports.extend(held);
        is_ours
    }

    /// Sets the port aside that somebody asks for.
    fn exactly(&mut self, asked: i64) -> Result<u16, String> {
        let (first, last) = self.range;
        let number = u16::try_from(asked).ok();
        if let Some(number) = number.filter(|number| self.mine.contains(number)) {
            return Ok(number);
        }
        let number = number.filter(|number| (first..=last).contains(number)).ok_or_else(|| {
            format!("provided port is not in the valid range. The range of valid ports is {first}-{last}")
        })?;
        if self.hold(number) { Ok(number) } else { Err("provided port is already allocated".into()) }
    }

    /// Sets any free port aside.
    fn any(&mut self) -> Option<u16> {
        let mine = self.mine.clone();
        places(self.range).find(|number| !mine.contains(number) && self.hold(*number))
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
    let mut choice = Choice {
        held: ctx.api.held_ports.clone(),
        range: ctx.api.config.node_ports,
        taken: taken(ctx, &name).await?,
        mine: old.and_then(|old| old.get("spec")).map(ports).unwrap_or_default(),
        reserved,
    };
    // One number may be given twice, for two protocols.
    let mut own: Vec<(u16, String)> = Vec::new();
    let mut failure = None;
    let mut at = 0;
    each(spec, "ports", |port| {
        let path = format!("spec.ports[{at}].nodePort");
        at += 1;
        let protocol = text(port, "protocol").to_owned();
        let asked = int(port, "nodePort").unwrap_or(0);
        let shared = own.iter().any(|(number, by)| i64::from(*number) == asked && *by != protocol);
        if shared || failure.is_some() || (asked == 0 && !wants) {
            return;
        }
        let number = if asked == 0 {
            choice.any().ok_or_else(|| FieldError::internal(path, "failed to allocate a nodePort: range is full"))
        } else {
            choice.exactly(asked).map_err(|why| FieldError::invalid(path, asked, why))
        };
        match number {
            Ok(number) => {
                put(port, "nodePort", number);
                own.push((number, protocol));
            }
            Err(error) => failure = Some(error),
        }
    });
    if let Some(error) = failure {
        return Err(refuse(ctx, &name, error));
    }
    if balanced && text(spec, "externalTrafficPolicy") == "Local" {
        let path = "spec.healthCheckNodePort";
        let number = match int(spec, "healthCheckNodePort").unwrap_or(0) {
            0 => choice.any().ok_or_else(|| FieldError::internal(path, "failed to allocate a nodePort: range is full")),
            asked => choice.exactly(asked).map_err(|why| FieldError::invalid(path, asked, why)),
        };
        put(spec, "healthCheckNodePort", number.map_err(|error| refuse(ctx, &name, error))?);
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

    #[test]
    fn a_port_is_held_by_one() {
        let held = Arc::new(HeldPorts::default());
        let one = held.hold(30_000);
        assert!(one.is_some() && held.hold(30_000).is_none() && held.hold(30_001).is_some());
        drop(one);
        assert!(held.hold(30_000).is_some());
    }

    proptest! {
        #[test]
        fn every_port_is_offered_once(size in 1_u16..300) {
            let mut all: Vec<u16> = places((30_000, 30_000 + size - 1)).collect();
            all.sort_unstable();
            prop_assert!(all.into_iter().eq(30_000..30_000 + size));
        }
    }
}
