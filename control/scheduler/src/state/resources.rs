//! Amounts of resources: CPU in thousandths, the rest in whole units (bytes, pods, devices).

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// What a container without a CPU request counts as when nodes are scored (thousandths).
const DEFAULT_CPU_MILLIS: i64 = 100;
/// What a container without a memory request counts as when nodes are scored (bytes).
const DEFAULT_MEMORY_BYTES: i64 = 200 * 1024 * 1024;

/// Amounts by resource.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Resources {
    pub(crate) cpu_millis: i64,
    pub(crate) memory_bytes: i64,
    pub(crate) ephemeral_bytes: i64,
    /// Huge pages and extended resources.
    pub(crate) others: BTreeMap<Arc<str>, i64>,
}

/// A quantity in thousandths (`scale` 1000) or units (`scale` 1), rounded up; `None` if it is malformed.
pub(crate) fn quantity(quantity: &Quantity, scale: i128) -> Option<i64> {
    let text = quantity.0.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit() && !"+-.".contains(c)).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if (whole.is_empty() && fraction.is_empty()) || number.contains(['-', '+']) {
        return None;
    }
    // Value as digits / 10^places × multiplier, all in integers.
    let mut value: i128 = format!("{whole}{fraction}").parse().ok()?;
    let mut divisor: i128 = 10_i128.checked_pow(u32::try_from(fraction.len()).ok()?)?;
    let binary = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"].iter().position(|known| *known == suffix);
    let decimal = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"].iter().position(|known| *known == suffix);
    if let Some(power) = binary {
        value = value.checked_mul(1024_i128.checked_pow(u32::try_from(power).ok()? + 1)?)?;
    } else if let Some(power) = decimal {
        match u32::try_from(power).ok()?.checked_sub(3) {
            Some(power) => value = value.checked_mul(1000_i128.checked_pow(power)?)?,
            None => divisor = divisor.checked_mul(1000_i128.checked_pow(3 - u32::try_from(power).ok()?)?)?,
        }
    } else {
        let exponent: i32 = suffix.strip_prefix(['e', 'E'])?.parse().ok()?;
        let factor = 10_i128.checked_pow(exponent.unsigned_abs())?;
        if exponent >= 0 { value = value.checked_mul(factor)? } else { divisor = divisor.checked_mul(factor)? }
    }
    let scaled = value.checked_mul(scale)?;
    let rounded = scaled.checked_div(divisor)? + i128::from(scaled % divisor != 0);
    i64::try_from(if negative { -rounded } else { rounded }).ok()
}

impl Resources {
    /// Amounts from a list of quantities; malformed ones, which validation never lets in, count as nothing.
    pub(crate) fn from_list(list: Option<&BTreeMap<String, Quantity>>) -> Self {
        let mut resources = Self::default();
        for (name, amount) in list.into_iter().flatten() {
            let units = || quantity(amount, 1).unwrap_or_default();
            match name.as_str() {
                "cpu" => resources.cpu_millis = quantity(amount, 1000).unwrap_or_default(),
                "memory" => resources.memory_bytes = units(),
                "ephemeral-storage" => resources.ephemeral_bytes = units(),
                "pods" => {}
                _ => {
                    resources.others.insert(name.as_str().into(), units());
                }
            }
        }
        resources
    }

    /// Adds `times` × the other amounts; -1 takes them away.
    pub(crate) fn add(&mut self, other: &Self, times: i64) {
        self.cpu_millis += times * other.cpu_millis;
        self.memory_bytes += times * other.memory_bytes;
        self.ephemeral_bytes += times * other.ephemeral_bytes;
        for (name, amount) in &other.others {
            *self.others.entry(name.clone()).or_default() += times * amount;
        }
    }

    /// Raises each amount to the other's where that is larger.
    fn raise(&mut self, other: &Self) {
        self.cpu_millis = self.cpu_millis.max(other.cpu_millis);
        self.memory_bytes = self.memory_bytes.max(other.memory_bytes);
        self.ephemeral_bytes = self.ephemeral_bytes.max(other.ephemeral_bytes);
        for (name, amount) in &other.others {
            let own = self.others.entry(name.clone()).or_default();
            *own = (*own).max(*amount);
        }
    }

    /// What a pod asks for (component-helpers `PodRequests`): the sum of its containers and sidecars, or what an init
    /// container needs beside the sidecars started before it, whichever is larger; pod-level requests take the place of
    /// the sum; plus overhead. With `defaults`, containers without requests count as small ones.
    pub(crate) fn of_pod(spec: &PodSpec, defaults: bool) -> Self {
        let request = |container: &Container| {
            let list = container.resources.as_ref().and_then(|resources| resources.requests.as_ref());
            let mut amounts = Self::from_list(list);
            if defaults {
                if !list.is_some_and(|list| list.contains_key("cpu")) {
                    amounts.cpu_millis = DEFAULT_CPU_MILLIS;
                }
                if !list.is_some_and(|list| list.contains_key("memory")) {
                    amounts.memory_bytes = DEFAULT_MEMORY_BYTES;
                }
            }
            amounts
        };
        let mut total = Self::default();
        for container in &spec.containers {
            total.add(&request(container), 1);
        }
        let mut sidecars = Self::default();
        let mut peak = Self::default();
        for container in spec.init_containers.iter().flatten() {
            let amounts = request(container);
            if container.restart_policy.as_deref() == Some("Always") {
                sidecars.add(&amounts, 1);
                total.add(&amounts, 1);
                peak.raise(&sidecars);
            } else {
                let mut beside = sidecars.clone();
                beside.add(&amounts, 1);
                peak.raise(&beside);
            }
        }
        total.raise(&peak);
        if let Some(list) = spec.resources.as_ref().and_then(|resources| resources.requests.as_ref()) {
            let pod = Self::from_list(Some(list));
            if list.contains_key("cpu") {
                total.cpu_millis = pod.cpu_millis;
            }
            if list.contains_key("memory") {
                total.memory_bytes = pod.memory_bytes;
            }
            for (name, amount) in pod.others {
                total.others.insert(name, amount);
            }
        }
        total.add(&Self::from_list(spec.overhead.as_ref()), 1);
        total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_are_read_exactly_and_rounded_up() {
        let read = |text: &str, scale| quantity(&Quantity(text.into()), scale);
        for (text, scale, wanted) in [
            ("100m", 1000, 100),
            ("0.1", 1000, 100),
            ("1", 1000, 1000),
            ("1500u", 1000, 2),
            ("1Gi", 1, 1 << 30),
            ("1.5Gi", 1, 3 << 29),
            ("1e3", 1, 1000),
            ("128974848", 1, 128_974_848),
            ("129M", 1, 129_000_000),
            ("1m", 1, 1),
            ("-5", 1, -5),
        ] {
            assert_eq!(read(text, scale), Some(wanted), "{text}");
        }
        // The last is beyond 64 bits.
        for text in ["", "m", "1x", "1.2.3", "--1", "12E"] {
            assert_eq!(read(text, 1), None, "{text}");
        }
    }

    #[test]
    fn init_containers_count_by_their_peak() {
        let spec: PodSpec = serde_json::from_value(serde_json::json!({
            "containers": [{"name": "a", "resources": {"requests": {"cpu": "1"}}}],
            "initContainers": [
                {"name": "i1", "resources": {"requests": {"cpu": "500m"}}},
                {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "200m"}}},
                {"name": "i2", "resources": {"requests": {"cpu": "1500m"}}},
            ],
            "overhead": {"cpu": "10m"},
        }))
        .expect("a spec");
        assert_eq!(Resources::of_pod(&spec, false).cpu_millis, 1710);
    }
}
