//! PodSecurity: the three levels of the Pod Security Standards, as namespaces ask for them by label.
//!
//! Source: the Pod Security Standards and `k8s.io/pod-security-admission`.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::admission::plugin::{Plugin, forbid, look};
use crate::context::{Context, Operation};
use crate::kinds::edit::{flag, list, text};
use crate::status::Status;

/// How strict, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Privileged,
    Baseline,
    Restricted,
}

impl Level {
    fn parse(s: &str) -> Level {
        match s {
            "baseline" => Level::Baseline,
            "restricted" => Level::Restricted,
            _ => Level::Privileged,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Level::Privileged => "privileged",
            Level::Baseline => "baseline",
            Level::Restricted => "restricted",
        }
    }
}

pub static PLUGIN: Plugin = Plugin {
    name: "PodSecurity",
    handles: |ctx| {
        let writes = matches!(ctx.operation, Operation::Create | Operation::Update);
        let pod = ctx.kind.is("", "pods") && matches!(ctx.subresource.as_str(), "" | "ephemeralcontainers");
        writes && (pod || (ctx.subresource.is_empty() && template(ctx).is_some()))
    },
    admit: None,
    validate: Some(|ctx, o, old| Box::pin(async move { check(ctx, o, old).await })),
};

/// Where a workload keeps its pod template.
fn template(ctx: &Context) -> Option<&'static str> {
    match (ctx.kind.group.as_str(), ctx.kind.resource.as_str()) {
        ("apps", "deployments" | "replicasets" | "statefulsets" | "daemonsets")
        | ("", "replicationcontrollers")
        | ("batch", "jobs") => Some("/spec/template"),
        ("batch", "cronjobs") => Some("/spec/jobTemplate/spec/template"),
        ("", "podtemplates") => Some("/template"),
        _ => None,
    }
}

async fn check(ctx: &Context, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    let Some(ns) = look(ctx, "", "namespaces", "", &ctx.namespace).await? else { return Ok(()) };
    let none = Value::Null;
    let labels = ns.pointer("/metadata/labels").unwrap_or(&none);
    let wanted = |mode: &str| {
        let level = Level::parse(text(labels, &format!("pod-security.kubernetes.io/{mode}")));
        let version = match text(labels, &format!("pod-security.kubernetes.io/{mode}-version")) {
            "" => "latest".to_owned(),
            v => v.to_owned(),
        };
        (level, version)
    };
    let pod = match template(ctx) {
        None => object,
        Some(p) => match object.pointer(p) {
            Some(t) => t,
            None => return Ok(()),
        },
    };
    // An update that changes nothing that counts is not looked at again.
    if ctx.kind.is("", "pods")
        && ctx.operation == Operation::Update
        && let Some(old) = old
        && old.get("spec") == object.get("spec")
    {
        return Ok(());
    }
    if ctx.kind.is("", "pods") {
        let (level, version) = wanted("enforce");
        let found = violations(pod, level);
        if !found.is_empty() {
            let level = level.name();
            return Err(forbid(
                ctx,
                object,
                format!("violates PodSecurity \"{level}:{version}\": {}", found.join(", ")),
            ));
        }
        ctx.annotations
            .lock()
            .push(("pod-security.kubernetes.io/enforce-policy".into(), format!("{}:{version}", level.name())));
    }
    let (level, version) = wanted("warn");
    let found = violations(pod, level);
    if !found.is_empty() {
        ctx.warn(format!("would violate PodSecurity \"{}:{version}\": {}", level.name(), found.join(", ")));
    }
    let (level, version) = wanted("audit");
    let found = violations(pod, level);
    if !found.is_empty() {
        ctx.annotations.lock().push((
            "pod-security.kubernetes.io/audit-violations".into(),
            format!("would violate PodSecurity \"{}:{version}\": {}", level.name(), found.join(", ")),
        ));
    }
    Ok(())
}

fn containers(spec: &Value) -> impl Iterator<Item = &Value> {
    ["initContainers", "containers", "ephemeralContainers"].into_iter().flat_map(|f| list(spec, f))
}

fn context(v: &Value) -> &Value {
    static NONE: Value = Value::Null;
    v.get("securityContext").unwrap_or(&NONE)
}

/// `container "a"` or `containers "a", "b"`.
fn named(names: &[&str]) -> String {
    let list: Vec<String> = names.iter().map(|n| format!("{n:?}")).collect();
    format!("{} {}", if names.len() == 1 { "container" } else { "containers" }, list.join(", "))
}

fn which(spec: &Value, bad: impl Fn(&Value) -> bool) -> Vec<&str> {
    containers(spec).filter(|c| bad(c)).map(|c| text(c, "name")).collect()
}

const BASELINE_CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];
const SAFE_SYSCTLS: [&str; 10] = [
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
];
const RESTRICTED_VOLUMES: [&str; 9] = [
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
];
const SELINUX_TYPES: [&str; 5] = ["", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"];

/// What a pod (or template) breaks of a level, in the words of the admission plugin and in its order.
pub fn violations(pod: &Value, level: Level) -> Vec<String> {
    let mut out = Vec::new();
    let none = Value::Null;
    let spec = pod.get("spec").unwrap_or(&none);
    if level == Level::Privileged {
        return out;
    }
    let pod_context = context(spec);
    let restricted = level == Level::Restricted;
    let windows = spec.pointer("/os/name").and_then(Value::as_str) == Some("windows");
    // The same order as the checks have by name of their identifiers.
    if restricted && !windows {
        let bad = which(spec, |c| context(c).get("allowPrivilegeEscalation") != Some(&Value::Bool(false)));
        if !bad.is_empty() {
            out.push(format!(
                "allowPrivilegeEscalation != false ({} must set securityContext.allowPrivilegeEscalation=false)",
                named(&bad)
            ));
        }
    }
    let forbidden = |c: &Value| -> Vec<String> {
        let added = c.pointer("/securityContext/capabilities/add").and_then(Value::as_array);
        added
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .filter(|a| !BASELINE_CAPABILITIES.contains(a))
            .map(str::to_owned)
            .collect()
    };
    if restricted && !windows {
        let undropped = which(spec, |c| {
            let drop = c.pointer("/securityContext/capabilities/drop").and_then(Value::as_array);
            !drop.into_iter().flatten().any(|d| d == "ALL")
        });
        let adding: Vec<(&str, Vec<&str>)> = containers(spec)
            .filter_map(|c| {
                let added = c.pointer("/securityContext/capabilities/add").and_then(Value::as_array)?;
                let bad: Vec<&str> =
                    added.iter().filter_map(Value::as_str).filter(|a| *a != "NET_BIND_SERVICE").collect();
                (!bad.is_empty()).then(|| (text(c, "name"), bad))
            })
            .collect();
        let mut parts = Vec::new();
        if !undropped.is_empty() {
            parts.push(format!("{} must set securityContext.capabilities.drop=[\"ALL\"]", named(&undropped)));
        }
        if !adding.is_empty() {
            let names: Vec<&str> = adding.iter().map(|(n, _)| *n).collect();
            let caps: BTreeSet<&str> = adding.iter().flat_map(|(_, c)| c.iter().copied()).collect();
            let caps: Vec<String> = caps.iter().map(|c| format!("{c:?}")).collect();
            parts.push(format!(
                "{} must not include {} in securityContext.capabilities.add",
                named(&names),
                caps.join(", ")
            ));
        }
        if !parts.is_empty() {
            out.push(format!("unrestricted capabilities ({})", parts.join("; ")));
        }
    } else {
        let bad = which(spec, |c| !forbidden(c).is_empty());
        if !bad.is_empty() {
            let caps: BTreeSet<String> = containers(spec).flat_map(forbidden).collect();
            let caps: Vec<String> = caps.iter().map(|c| format!("{c:?}")).collect();
            out.push(format!(
                "non-default capabilities ({} must not include {} in securityContext.capabilities.add)",
                named(&bad),
                caps.join(", ")
            ));
        }
    }
    let host: Vec<String> =
        ["hostNetwork", "hostPID", "hostIPC"].iter().filter(|f| flag(spec, f)).map(|f| format!("{f}=true")).collect();
    if !host.is_empty() {
        out.push(format!("host namespaces ({})", host.join(", ")));
    }
    let paths: Vec<&str> =
        list(spec, "volumes").iter().filter(|v| v.get("hostPath").is_some()).map(|v| text(v, "name")).collect();
    if !paths.is_empty() && !restricted {
        out.push(format!("hostPath volumes ({})", volumes(&paths)));
    }
    let ports: BTreeSet<i64> = containers(spec)
        .flat_map(|c| list(c, "ports"))
        .filter_map(|p| p.get("hostPort").and_then(Value::as_i64))
        .filter(|p| *p != 0)
        .collect();
    if !ports.is_empty() {
        let bad = which(spec, |c| {
            list(c, "ports").iter().any(|p| p.get("hostPort").and_then(Value::as_i64).unwrap_or(0) != 0)
        });
        let list: Vec<String> = ports.iter().map(ToString::to_string).collect();
        let word = if list.len() == 1 { "hostPort" } else { "hostPorts" };
        let uses = if bad.len() == 1 { "uses" } else { "use" };
        out.push(format!("hostPort ({} {uses} {word} {})", named(&bad), list.join(", ")));
    }
    let privileged = which(spec, |c| flag(context(c), "privileged"));
    if !privileged.is_empty() {
        out.push(format!("privileged ({} must not set securityContext.privileged=true)", named(&privileged)));
    }
    let unmasked = which(spec, |c| !matches!(text(context(c), "procMount"), "" | "Default"));
    if !unmasked.is_empty() && spec.get("hostUsers") != Some(&Value::Bool(false)) {
        out.push(format!("procMount ({} must not set securityContext.procMount to \"Unmasked\")", named(&unmasked)));
    }
    if restricted && !windows {
        let bad: Vec<&str> = list(spec, "volumes")
            .iter()
            .filter(|v| !RESTRICTED_VOLUMES.iter().any(|k| v.get(*k).is_some()))
            .map(|v| text(v, "name"))
            .collect();
        if !bad.is_empty() {
            let kinds: BTreeSet<&str> = list(spec, "volumes")
                .iter()
                .filter(|v| bad.contains(&text(v, "name")))
                .flat_map(|v| v.as_object().into_iter().flatten().map(|(k, _)| k.as_str()).filter(|k| *k != "name"))
                .collect();
            let kinds: Vec<String> = kinds.iter().map(|k| format!("{k:?}")).collect();
            let uses = if bad.len() == 1 { "uses restricted volume type" } else { "use restricted volume types" };
            out.push(format!("restricted volume types ({} {uses} {})", volumes(&bad), kinds.join(", ")));
        }
        let root = |v: &Value| v.get("runAsNonRoot").and_then(Value::as_bool);
        let default = root(pod_context);
        let explicit = which(spec, |c| root(context(c)) == Some(false));
        let unset = which(spec, |c| root(context(c)).is_none());
        if default == Some(false) || !explicit.is_empty() {
            let mut who = Vec::new();
            if default == Some(false) {
                who.push("pod".to_owned());
            }
            if !explicit.is_empty() {
                who.push(named(&explicit));
            }
            out.push(format!(
                "runAsNonRoot != true ({} must not set securityContext.runAsNonRoot=false)",
                who.join(" and ")
            ));
        } else if default != Some(true) && !unset.is_empty() {
            out.push(format!(
                "runAsNonRoot != true (pod or {} must set securityContext.runAsNonRoot=true)",
                named(&unset)
            ));
        }
        let zero = |v: &Value| v.get("runAsUser").and_then(Value::as_i64) == Some(0);
        let roots = which(spec, |c| zero(context(c)));
        if zero(pod_context) || !roots.is_empty() {
            let mut who = Vec::new();
            if zero(pod_context) {
                who.push("pod".to_owned());
            }
            if !roots.is_empty() {
                who.push(named(&roots));
            }
            out.push(format!("runAsUser=0 ({} must not set runAsUser=0)", who.join(" and ")));
        }
    }
    let selinux = |v: &Value| {
        v.get("seLinuxOptions").is_some_and(|o| {
            !SELINUX_TYPES.contains(&text(o, "type")) || !text(o, "user").is_empty() || !text(o, "role").is_empty()
        })
    };
    let bad = which(spec, |c| selinux(context(c)));
    if selinux(pod_context) || !bad.is_empty() {
        let mut who = Vec::new();
        if selinux(pod_context) {
            who.push("pod".to_owned());
        }
        if !bad.is_empty() {
            who.push(named(&bad));
        }
        out.push(format!("seLinuxOptions ({} set forbidden securityContext.seLinuxOptions)", who.join(" and ")));
    }
    seccomp(spec, pod_context, restricted && !windows, &mut out);
    let sysctls: Vec<&str> = pod_context
        .get("sysctls")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
        .map(|s| text(s, "name"))
        .filter(|n| !SAFE_SYSCTLS.contains(n))
        .collect();
    if !sysctls.is_empty() {
        out.push(format!("forbidden sysctls ({})", sysctls.join(", ")));
    }
    let process = |v: &Value| v.pointer("/windowsOptions/hostProcess") == Some(&Value::Bool(true));
    let bad = which(spec, |c| process(context(c)));
    if process(pod_context) || !bad.is_empty() {
        out.push("hostProcess (pod must not set securityContext.windowsOptions.hostProcess=true)".to_owned());
    }
    out
}

fn volumes(names: &[&str]) -> String {
    let list: Vec<String> = names.iter().map(|n| format!("{n:?}")).collect();
    format!("{} {}", if names.len() == 1 { "volume" } else { "volumes" }, list.join(", "))
}

fn seccomp(spec: &Value, pod_context: &Value, restricted: bool, out: &mut Vec<String>) {
    let kind = |v: &Value| v.pointer("/seccompProfile/type").and_then(Value::as_str).map(str::to_owned);
    let fine = |k: &str| matches!(k, "RuntimeDefault" | "Localhost");
    let default = kind(pod_context);
    let bad = which(spec, |c| kind(context(c)).is_some_and(|k| !fine(&k)));
    let pod_bad = default.as_deref().is_some_and(|k| !fine(k));
    if pod_bad || !bad.is_empty() {
        let mut who = Vec::new();
        if pod_bad {
            who.push("pod".to_owned());
        }
        if !bad.is_empty() {
            who.push(named(&bad));
        }
        out.push(format!(
            "seccompProfile ({} must not set securityContext.seccompProfile.type to \"Unconfined\")",
            who.join(" and ")
        ));
    } else if restricted && default.is_none() {
        let unset = which(spec, |c| kind(context(c)).is_none());
        if !unset.is_empty() {
            out.push(format!("seccompProfile (pod or {} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\")", named(&unset)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn words_of_the_levels() {
        let plain = json!({"spec": {"containers": [{"name": "c"}]}});
        assert!(violations(&plain, Level::Baseline).is_empty());
        assert_eq!(
            violations(&plain, Level::Restricted).join(", "),
            "allowPrivilegeEscalation != false (container \"c\" must set securityContext.allowPrivilegeEscalation=false), unrestricted capabilities (container \"c\" must set securityContext.capabilities.drop=[\"ALL\"]), runAsNonRoot != true (pod or container \"c\" must set securityContext.runAsNonRoot=true), seccompProfile (pod or container \"c\" must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\")"
        );
        let host = json!({"spec": {"hostNetwork": true, "containers": [{"name": "c", "securityContext": {"privileged": true}}],
            "volumes": [{"name": "h", "hostPath": {"path": "/"}}]}});
        assert_eq!(
            violations(&host, Level::Baseline),
            [
                "host namespaces (hostNetwork=true)",
                "hostPath volumes (volume \"h\")",
                "privileged (container \"c\" must not set securityContext.privileged=true)"
            ]
        );
        assert!(violations(&host, Level::Privileged).is_empty());
    }

    #[test]
    fn restricted_can_be_met() {
        let pod = json!({"spec": {"securityContext": {"runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "securityContext": {"allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}}}],
            "volumes": [{"name": "t", "projected": {}}]}});
        assert!(violations(&pod, Level::Restricted).is_empty());
    }
}
