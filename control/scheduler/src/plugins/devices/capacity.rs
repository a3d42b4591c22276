//! What a request takes of the capacities of a device (KEP-5075): of one that several may have at a time, the part that they
//! ask for, as the device's policy allows it; the others are had whole.

use std::collections::BTreeMap;

use k8s_openapi::api::resource::v1::{CapacityRequestPolicy, Device};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::device::qualified;
use crate::state::millis;

/// Amounts by name of the capacity.
pub(super) type Portions = BTreeMap<String, Quantity>;

pub(super) fn is_shared(device: &Device) -> bool {
    device.allow_multiple_allocations == Some(true)
}

/// What a request takes of each capacity of a device that is shared, nothing of another; `None` if the device has not what
/// is asked for.
pub(super) fn portions(device: &Device, driver: &str, asked: Option<&Portions>) -> Option<Portions> {
    let all = || device.capacity.iter().flatten();
    let same = |one: &str, other: &str| qualified(one, driver) == qualified(other, driver);
    if !asked.iter().copied().flatten().all(|(name, _)| all().any(|(own, _)| same(own, name))) {
        return None;
    }
    let mut portions = Portions::new();
    for (name, capacity) in all() {
        let wanted = asked.iter().copied().flatten().find(|(asked, _)| same(asked, name)).map(|(_, amount)| amount);
        let portion = match &capacity.request_policy {
            Some(policy) if is_shared(device) => adjusted(policy, wanted).or_else(|| {
                // Who asks for nothing, where no default is named, gets all.
                wanted.is_none().then(|| capacity.value.clone())
            })?,
            _ => wanted.unwrap_or(&capacity.value).clone(),
        };
        if millis(&portion) > millis(&capacity.value) {
            return None;
        }
        if is_shared(device) {
            portions.insert(name.clone(), portion);
        }
    }
    Some(portions)
}

/// The least amount that a policy allows and that is enough.
fn adjusted(policy: &CapacityRequestPolicy, wanted: Option<&Quantity>) -> Option<Quantity> {
    let Some(wanted) = wanted else { return policy.default.clone() };
    let amount = millis(wanted);
    if let Some(range) = &policy.valid_range {
        let least = millis(&range.min);
        let step = range.step.as_ref().map_or(0, millis);
        let over = (amount - least).max(0);
        let steps = if step > 0 { (over + step - 1) / step * step } else { over };
        let adjusted = least + steps;
        let fits = range.max.as_ref().is_none_or(|most| adjusted <= millis(most));
        return fits.then(|| if adjusted == amount { wanted.clone() } else { of_millis(adjusted) });
    }
    match &policy.valid_values {
        Some(values) if !values.is_empty() => {
            values.iter().filter(|value| millis(value) >= amount).min_by_key(|value| millis(value)).cloned()
        }
        _ => Some(wanted.clone()),
    }
}

fn of_millis(amount: i64) -> Quantity {
    Quantity(if amount % 1000 == 0 { (amount / 1000).to_string() } else { format!("{amount}m") })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn device(shared: bool, policy: Value) -> Device {
        let capacity = json!({"memory": {"value": "10Gi", "requestPolicy": policy}, "cores": {"value": "8"}});
        serde_json::from_value(json!({"name": "d", "allowMultipleAllocations": shared, "capacity": capacity}))
            .expect("a device")
    }

    fn taken(device: &Device, asked: Value) -> Option<Value> {
        let asked: Portions = serde_json::from_value(asked).expect("amounts");
        portions(device, "driver", Some(&asked)).map(|portions| json!(portions))
    }

    #[test]
    fn parts_are_what_the_policy_allows() {
        let free = device(true, Value::Null);
        assert_eq!(taken(&free, json!({})), Some(json!({"memory": "10Gi", "cores": "8"})), "all of it");
        assert_eq!(taken(&free, json!({"memory": "1Gi"})), Some(json!({"memory": "1Gi", "cores": "8"})));
        assert_eq!(taken(&free, json!({"driver/cores": "9"})), None, "more than there is");
        assert_eq!(taken(&free, json!({"other/cores": "1"})), None, "nobody has that");
        let range = device(true, json!({"default": "2Gi", "validRange": {"min": "1Gi", "max": "4Gi", "step": "1Gi"}}));
        let memory =
            |asked: &str| taken(&range, json!({"memory": asked, "cores": "1"})).map(|all| all["memory"].clone());
        assert_eq!(taken(&range, json!({"cores": "1"})).map(|all| all["memory"].clone()), Some(json!("2Gi")));
        assert_eq!(memory("1"), Some(json!("1073741824")));
        assert_eq!(memory("3Gi"), Some(json!("3Gi")));
        assert_eq!(memory("2049Mi"), Some(json!("3221225472")));
        assert_eq!(memory("5Gi"), None);
        let values = device(true, json!({"default": "2Gi", "validValues": ["2Gi", "4Gi", "8Gi"]}));
        assert_eq!(
            taken(&values, json!({"memory": "3Gi", "cores": "1"})),
            Some(json!({"memory": "4Gi", "cores": "1"}))
        );
        assert_eq!(taken(&values, json!({"memory": "9Gi"})), None);
    }

    #[test]
    fn a_device_of_its_own_only_needs_to_be_large_enough() {
        let own = device(false, Value::Null);
        assert_eq!(taken(&own, json!({"memory": "1Gi"})), Some(json!({})));
        assert_eq!(taken(&own, json!({"memory": "11Gi"})), None);
    }
}
