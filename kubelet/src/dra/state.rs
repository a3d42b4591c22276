//! Which claims are prepared, by which drivers, for which pods; kept on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Write as _};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::api;
use crate::names::Layout;

/// What is known of one claim.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Claim {
    namespace: String,
    name: String,
    /// By pod: the names that it has for the claim.
    pods: BTreeMap<String, BTreeSet<String>>,
    /// By driver: the devices, once it has prepared them.
    drivers: BTreeMap<String, Option<Vec<api::Device>>>,
}

/// A device as a container uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Prepared {
    pub(crate) namespace: String,
    pub(crate) claim: String,
    pub(crate) driver: String,
    pub(crate) pool: String,
    pub(crate) device: String,
    pub(crate) cdi: Vec<String>,
}

/// All claims of the node, by UID.
#[derive(Debug)]
pub(super) struct State {
    path: PathBuf,
    claims: BTreeMap<String, Claim>,
}

impl State {
    pub(super) fn load(layout: &Layout) -> io::Result<Self> {
        let path = layout.kubelet.join("dra_manager_state");
        let claims = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| {
                io::Error::other(format!("{}: {error} (remove it to start without)", path.display()))
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(error),
        };
        Ok(Self { path, claims })
    }

    fn save(&self) -> io::Result<()> {
        let new = self.path.with_extension("new");
        let mut file = fs::File::create(&new)?;
        file.write_all(&serde_json::to_vec(&self.claims)?)?;
        file.sync_all()?;
        fs::rename(&new, &self.path)
    }

    /// A pod is about to use a claim.
    pub(super) fn begin(&mut self, claim: &api::Claim, pod: &str, entry: &str, drivers: &[String]) -> io::Result<()> {
        let held = self.claims.entry(claim.uid.clone()).or_default();
        (held.namespace, held.name) = (claim.namespace.clone(), claim.name.clone());
        held.pods.entry(pod.to_owned()).or_default().insert(entry.to_owned());
        for driver in drivers {
            held.drivers.entry(driver.clone()).or_default();
        }
        self.save()
    }

    pub(super) fn is_ready(&self, claim: &str, driver: &str) -> bool {
        self.claims.get(claim).and_then(|held| held.drivers.get(driver)).is_some_and(Option::is_some)
    }

    pub(super) fn ready(&mut self, claim: &str, driver: &str, devices: Vec<api::Device>) -> io::Result<()> {
        if let Some(held) = self.claims.get_mut(claim) {
            held.drivers.insert(driver.to_owned(), Some(devices));
        }
        self.save()
    }

    /// The devices that a pod's claim (by the pod's name for it) brings, of all its requests or of one.
    pub(super) fn devices(&self, pod: &str, entry: &str, request: Option<&str>) -> Vec<Prepared> {
        let own = self.claims.values().filter(|held| held.pods.get(pod).is_some_and(|names| names.contains(entry)));
        let mut found = Vec::new();
        for held in own {
            for (driver, devices) in &held.drivers {
                for device in devices.iter().flatten() {
                    let serves = |name: &String| {
                        request.is_none_or(|request| name == request || name.split('/').next() == Some(request))
                    };
                    if device.request_names.is_empty() || device.request_names.iter().any(serves) {
                        found.push(Prepared {
                            namespace: held.namespace.clone(),
                            claim: held.name.clone(),
                            driver: driver.clone(),
                            pool: device.pool_name.clone(),
                            device: device.device_name.clone(),
                            cdi: device.cdi_device_ids.clone(),
                        });
                    }
                }
            }
        }
        found
    }

    pub(super) fn uses(&self, pod: &str) -> bool {
        self.claims.values().any(|held| held.pods.contains_key(pod))
    }

    pub(super) fn pods(&self) -> Vec<String> {
        self.claims.values().flat_map(|held| held.pods.keys().cloned()).collect()
    }

    /// Claims that this pod is the last to use, with their drivers; of the others it is taken off.
    pub(super) fn leave(&mut self, pod: &str) -> io::Result<Vec<(api::Claim, Vec<String>)>> {
        let mut last = Vec::new();
        for (uid, held) in &mut self.claims {
            if !held.pods.contains_key(pod) {
                continue;
            }
            if held.pods.len() > 1 {
                held.pods.remove(pod);
                continue;
            }
            let claim = api::Claim { namespace: held.namespace.clone(), uid: uid.clone(), name: held.name.clone() };
            last.push((claim, held.drivers.keys().cloned().collect()));
        }
        self.save()?;
        Ok(last)
    }

    pub(super) fn forget(&mut self, claim: &str) -> io::Result<()> {
        self.claims.remove(claim);
        self.save()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_shared_and_survive() {
        let root = tempfile::tempdir().expect("a folder");
        let layout = Layout::below(root.path());
        fs::create_dir_all(&layout.kubelet).expect("a folder");
        let mut state = State::load(&layout).expect("nothing yet");
        let claim = api::Claim { namespace: "ns".into(), uid: "c".into(), name: "claim".into() };
        let device = |request: &str, name: &str| api::Device {
            request_names: vec![request.into()],
            device_name: name.into(),
            cdi_device_ids: vec![format!("v/c={name}")],
            ..api::Device::default()
        };
        for pod in ["p", "q"] {
            state.begin(&claim, pod, "mine", &["d".to_owned()]).expect("written");
        }
        assert!(!state.is_ready("c", "d"));
        state.ready("c", "d", vec![device("one", "a"), device("two/big", "b")]).expect("written");
        let mut state = State::load(&layout).expect("read");
        let names = |state: &State, pod: &str, request: Option<&str>| -> Vec<String> {
            state.devices(pod, "mine", request).into_iter().map(|device| device.device).collect()
        };
        assert_eq!(names(&state, "p", None), ["a", "b"]);
        assert_eq!(names(&state, "p", Some("two")), ["b"]);
        assert!(names(&state, "r", None).is_empty());
        assert!(state.leave("p").expect("written").is_empty(), "another pod uses it");
        assert_eq!(state.leave("q").expect("written"), [(claim, vec!["d".to_owned()])]);
        assert!(state.uses("q"), "until it is forgotten");
        state.forget("c").expect("written");
        assert!(!State::load(&layout).expect("read").uses("q"));
    }
}
