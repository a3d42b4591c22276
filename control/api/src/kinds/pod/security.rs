//! Validation of security contexts, host namespaces and the fields that an operating system does not have.

use crate::kinds::at::{At, Errs};
use crate::kinds::names;

const ID_RANGE: &str = "must be between 0 and 2147483647, inclusive";
const LOCALHOST: &str = "must be set when seccomp type is Localhost";

fn id(at: &At<'_>, e: &mut Errs) {
    if at.is_set() && !(0..=i64::from(i32::MAX)).contains(&at.int()) {
        e.invalid(at, ID_RANGE);
    }
}

/// The pod's security context and host namespaces.
pub fn pod(spec: &At<'_>, e: &mut Errs) {
    let c = spec.at("securityContext");
    for f in ["fsGroup", "runAsUser", "runAsGroup"] {
        id(&c.at(f), e);
    }
    for g in c.at("supplementalGroups").items() {
        id(&g, e);
    }
    if spec.at("shareProcessNamespace").bool() && spec.at("hostPID").bool() {
        e.invalid(&spec.at("shareProcessNamespace"), "ShareProcessNamespace and HostPID cannot both be enabled");
    }
    let mut seen: Vec<&str> = Vec::new();
    for s in c.at("sysctls").items() {
        let name = s.at("name");
        if name.is_zero() {
            e.required(&name, "");
        } else if !is_sysctl(name.str()) {
            e.invalid(
                &name,
                format!("must have at most {} characters and match regex {SYSCTL}", names::SUBDOMAIN_MAX_BYTES),
            );
        } else if seen.contains(&name.str()) {
            e.duplicate(&name);
        }
        seen.push(name.str());
        let n = name.str();
        if (spec.at("hostNetwork").bool() && n.starts_with("net."))
            || (spec.at("hostIPC").bool()
                && (n.starts_with("fs.mqueue.")
                    || n.starts_with("kernel.shm")
                    || n.starts_with("kernel.msg")
                    || n == "kernel.sem"))
        {
            let which = if n.starts_with("net.") { "hostNetwork" } else { "hostIPC" };
            e.invalid(&name, format!("may not be specified when '{which}' is true"));
        }
    }
    if c.at("fsGroupChangePolicy").is_set() {
        e.one_of(&c.at("fsGroupChangePolicy"), &["Always", "OnRootMismatch"]);
    }
    if c.at("supplementalGroupsPolicy").is_set() {
        e.one_of(&c.at("supplementalGroupsPolicy"), &["Merge", "Strict"]);
    }
    profiles(&c, e);
    windows(&c, e);
    if spec.at("hostUsers").is_set() && !spec.at("hostUsers").bool() {
        for (f, shown) in [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
            if spec.at(f).bool() {
                e.forbidden(&spec.named(shown), "when `pod.Spec.HostUsers` is false");
            }
        }
    }
}

const SYSCTL: &str = "^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";

fn is_sysctl(s: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    s.len() <= names::SUBDOMAIN_MAX_BYTES
        && s.split(['.', '/']).all(|p| {
            let b = p.as_bytes();
            matches!((b.first(), b.last()), (Some(f), Some(l)) if edge(*f) && edge(*l))
                && b.iter().all(|c| edge(*c) || matches!(c, b'-' | b'_'))
        })
}

fn profiles(c: &At<'_>, e: &mut Errs) {
    for (f, words) in
        [("seccompProfile", LOCALHOST), ("appArmorProfile", "must be set when AppArmor type is Localhost")]
    {
        let p = c.at(f);
        if !p.is_set() {
            continue;
        }
        let (kind, local) = (p.at("type"), p.at("localhostProfile"));
        if kind.is_zero() {
            e.required(
                &kind,
                if f == "seccompProfile" {
                    "type is required when seccompProfile is set"
                } else {
                    "type is required when appArmorProfile is set"
                },
            );
            continue;
        }
        e.one_of(&kind, &["Localhost", "RuntimeDefault", "Unconfined"]);
        if kind.str() == "Localhost" {
            if local.is_zero() {
                e.required(&local, words);
            } else if f == "seccompProfile"
                && (local.str().starts_with('/') || local.str().split('/').any(|p| p == ".."))
            {
                e.invalid(&local, "must be a relative path");
            }
        } else if local.is_set() {
            e.invalid(
                &local,
                if f == "seccompProfile" {
                    "can only be set when seccomp type is Localhost"
                } else {
                    "can only be set when AppArmor type is Localhost"
                },
            );
        }
    }
}

fn windows(c: &At<'_>, e: &mut Errs) {
    let w = c.at("windowsOptions");
    let spec = w.at("gmsaCredentialSpecName");
    if spec.is_set() {
        e.check(&spec, names::dns1123_subdomain);
    }
    if w.at("runAsUserName").is_set() && w.at("runAsUserName").is_zero() {
        e.invalid(&w.at("runAsUserName"), "runAsUserName cannot be an empty string");
    }
}

/// A container's security context.
pub fn container(c: &At<'_>, host_users: bool, e: &mut Errs) {
    if !c.is_set() {
        return;
    }
    id(&c.at("runAsUser"), e);
    id(&c.at("runAsGroup"), e);
    if c.at("procMount").is_set() {
        e.one_of(&c.at("procMount"), &["Default", "Unmasked"]);
        if host_users && c.at("procMount").str() == "Unmasked" {
            e.invalid(&c.at("procMount"), "`hostUsers` must be false to use `Unmasked`");
        }
    }
    profiles(c, e);
    let escalates = c.at("allowPrivilegeEscalation");
    if escalates.is_set() && !escalates.bool() {
        if c.at("privileged").bool() {
            e.invalid_value(c, c.v.clone(), "cannot set `allowPrivilegeEscalation` to false and `privileged` to true");
        }
        for cap in c.at("capabilities").at("add").items() {
            if cap.str() == "CAP_SYS_ADMIN" {
                e.invalid_value(
                    c,
                    c.v.clone(),
                    "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN",
                );
            }
        }
    }
    windows(c, e);
}

/// Fields that a pod for one operating system must leave out.
pub fn os(spec: &At<'_>, name: &str, e: &mut Errs) {
    const LINUX_ONLY: [&str; 7] = [
        "appArmorProfile",
        "seLinuxOptions",
        "seccompProfile",
        "fsGroup",
        "runAsUser",
        "runAsGroup",
        "supplementalGroups",
    ];
    let forbid = |c: At<'_>, fields: &[&'static str], words: &str, e: &mut Errs| {
        for f in fields {
            if c.at(f).is_set() {
                e.forbidden(&c.at(f), words);
            }
        }
    };
    match name {
        "linux" => {
            let words = "windows options cannot be set for a linux pod";
            forbid(spec.at("securityContext"), &["windowsOptions"], words, e);
            for c in spec.at("containers").items() {
                forbid(c.at("securityContext"), &["windowsOptions"], words, e);
            }
        }
        "windows" => {
            let words = "cannot be set for a windows pod";
            forbid(spec.at("securityContext"), &LINUX_ONLY, words, e);
            for c in spec.at("containers").items() {
                forbid(c.at("securityContext"), &LINUX_ONLY[..3], words, e);
            }
            for f in ["hostNetwork", "hostPID", "hostIPC"] {
                if spec.at(f).bool() {
                    e.forbidden(&spec.at(f), words);
                }
            }
        }
        _ => {}
    }
}
