//! Guards of privileges: NodeRestriction, the certificate plugins, OwnerReferencesPermissionEnforcement, and the escalation
//! checks of RBAC.

use serde_json::Value;

use crate::admission::plugin::{Plugin, forbid, look};
use crate::authz::node::node_of;
use crate::authz::rbac::{self, Rule};
use crate::authz::{Attributes, Decision};
use crate::context::{Context, Operation};
use crate::kinds::edit::{list, text};
use crate::status::Status;

const CERTS: &str = "certificates.k8s.io";
const RBAC: &str = "rbac.authorization.k8s.io";
/// Signers of the cluster itself, which only `system:masters` may be approved for without a grant.
const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client";

fn may(ctx: &Context, verb: &str, group: &str, resource: &str, subresource: &str, name: &str, namespace: &str) -> bool {
    let request = Attributes {
        user: &ctx.user,
        verb,
        is_resource: true,
        group,
        version: "*",
        resource,
        subresource,
        namespace,
        name,
        path: "",
    };
    matches!(ctx.api.authorizer().authorize(&request), Decision::Allow(_))
}

fn writes(ctx: &Context) -> bool {
    matches!(ctx.operation, Operation::Create | Operation::Update)
}

pub static NODES: Plugin = Plugin {
    name: "NodeRestriction",
    handles: |ctx| {
        node_of(&ctx.user).is_some()
            && matches!(
                (ctx.kind.group.as_str(), ctx.kind.resource.as_str()),
                ("", "pods" | "nodes" | "persistentvolumeclaims" | "serviceaccounts")
                    | ("coordination.k8s.io", "leases")
                    | ("storage.k8s.io", "csinodes")
            )
    },
    admit: None,
    validate: Some(|ctx, o, old| Box::pin(async move { node(ctx, o, old).await })),
};

async fn node(ctx: &Context, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    let me = node_of(&ctx.user).unwrap_or_default();
    let no = |why: String| Err(forbid(ctx, object, why));
    match ctx.kind.resource.as_str() {
        "pods" => {
            let own = |p: &Value| crate::object::text(p, "/spec/nodeName") == me;
            match (ctx.operation, ctx.subresource.as_str()) {
                (Operation::Create, "") => {
                    let mirror = object
                        .pointer("/metadata/annotations")
                        .is_some_and(|a| a.get("kubernetes.io/config.mirror").is_some());
                    if !mirror {
                        return no(format!(
                            "pod does not have \"kubernetes.io/config.mirror\" annotation, node {me:?} can only create mirror pods"
                        ));
                    }
                    if !own(object) {
                        return no(format!("node {me:?} can only create pods with spec.nodeName set to itself"));
                    }
                    Ok(())
                }
                (Operation::Delete, _) => match old {
                    Some(p) if !own(p) => {
                        no(format!("node {me:?} can only delete pods with spec.nodeName set to itself"))
                    }
                    _ => Ok(()),
                },
                (Operation::Update, "status") => match old {
                    Some(p) if !own(p) => {
                        no(format!("node {me:?} can only update pod status for pods with spec.nodeName set to itself"))
                    }
                    Some(p) if p.pointer("/metadata/labels") != object.pointer("/metadata/labels") => {
                        no(format!("node {me:?} cannot update labels through pod status"))
                    }
                    _ => Ok(()),
                },
                (Operation::Create, "eviction") => {
                    let pod = look(ctx, "", "pods", &ctx.namespace, &ctx.name).await?;
                    match pod {
                        Some(p) if !own(&p) => {
                            no(format!("node {me:?} can only evict pods with spec.nodeName set to itself"))
                        }
                        _ => Ok(()),
                    }
                }
                (Operation::Update | Operation::Create, sub) => {
                    no(format!("unexpected pod subresource {sub:?}, only 'status' and 'eviction' are allowed"))
                }
                _ => Ok(()),
            }
        }
        "nodes" => {
            let name = if ctx.name.is_empty() { crate::object::name(object) } else { ctx.name.as_str() };
            if ctx.operation == Operation::Connect {
                return Ok(());
            }
            if name != me {
                return no(format!("node {me:?} is not allowed to modify node {name:?}"));
            }
            let Some(old) = old else { return Ok(()) };
            if ctx.operation == Operation::Update && old.pointer("/spec/taints") != object.pointer("/spec/taints") {
                return no(format!("node {me:?} is not allowed to modify taints"));
            }
            let mut changed: Vec<&str> = Vec::new();
            let none = Value::Null;
            let (a, b) =
                (object.pointer("/metadata/labels").unwrap_or(&none), old.pointer("/metadata/labels").unwrap_or(&none));
            for k in a.as_object().into_iter().chain(b.as_object()).flat_map(|m| m.keys()) {
                if a.get(k) != b.get(k)
                    && k.split('/').next().is_some_and(|d| d.ends_with("node-restriction.kubernetes.io"))
                    && !changed.contains(&k.as_str())
                {
                    changed.push(k);
                }
            }
            if !changed.is_empty() {
                return no(format!("is not allowed to modify labels: {}", changed.join(", ")));
            }
            Ok(())
        }
        "leases" => {
            let name = if ctx.name.is_empty() { crate::object::name(object) } else { ctx.name.as_str() };
            if ctx.namespace != "kube-node-lease" {
                return no("can only access leases in the \"kube-node-lease\" system namespace".to_owned());
            }
            if name != me {
                return no("can only access node lease with the same name as the requesting node".to_owned());
            }
            Ok(())
        }
        "csinodes" => {
            let name = if ctx.name.is_empty() { crate::object::name(object) } else { ctx.name.as_str() };
            if name != me {
                return no("can only access CSINode with the same name as the requesting node".to_owned());
            }
            Ok(())
        }
        "serviceaccounts" if ctx.subresource == "token" => {
            let bound = object.pointer("/spec/boundObjectRef").cloned().unwrap_or_default();
            if text(&bound, "kind") != "Pod" || text(&bound, "name").is_empty() {
                return no("node requested token not bound to a pod".to_owned());
            }
            let pod = look(ctx, "", "pods", &ctx.namespace, text(&bound, "name")).await?;
            let Some(pod) = pod else {
                return no(format!("pod {:?} not found", text(&bound, "name")));
            };
            if text(&bound, "uid") != crate::object::uid(&pod) {
                return no(format!(
                    "the UID in the bound object reference ({}) does not match the UID in record. The object might have been deleted and then recreated",
                    text(&bound, "uid")
                ));
            }
            if crate::object::text(&pod, "/spec/nodeName") != me {
                return no("node requested token bound to a pod scheduled on a different node".to_owned());
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

pub static CERTIFICATES: Plugin = Plugin {
    name: "CertificateApproval",
    handles: |ctx| {
        ctx.kind.is(CERTS, "certificatesigningrequests")
            && ctx.operation == Operation::Update
            && matches!(ctx.subresource.as_str(), "approval" | "status")
    },
    admit: None,
    validate: Some(|ctx, o, old| {
        Box::pin(async move {
            let signer = old.map(|o| crate::object::text(o, "/spec/signerName")).unwrap_or_default();
            let domain = signer.split('/').next().unwrap_or_default();
            let verb = if ctx.subresource == "approval" { "approve" } else { "sign" };
            // Only a status with another certificate or condition is signing.
            if verb == "sign"
                && old.is_some_and(|p| {
                    p.pointer("/status/certificate") == o.pointer("/status/certificate")
                        && p.pointer("/status/conditions") == o.pointer("/status/conditions")
                })
            {
                return Ok(());
            }
            let any = format!("{domain}/*");
            if may(ctx, verb, CERTS, "signers", "", signer, "") || may(ctx, verb, CERTS, "signers", "", &any, "") {
                return Ok(());
            }
            Err(forbid(ctx, o, format!("user not permitted to {verb} requests with signerName {signer:?}")))
        })
    }),
};

pub static CERTIFICATE_SUBJECT: Plugin = Plugin {
    name: "CertificateSubjectRestriction",
    handles: |ctx| ctx.operation == Operation::Create && ctx.is_object_of(CERTS, "certificatesigningrequests"),
    admit: None,
    validate: Some(|ctx, o, _| {
        Box::pin(async move {
            use base64::Engine as _;
            use x509_parser::prelude::FromDer as _;
            if crate::object::text(o, "/spec/signerName") != CLIENT_SIGNER {
                return Ok(());
            }
            let pem = base64::engine::general_purpose::STANDARD
                .decode(crate::object::text(o, "/spec/request"))
                .unwrap_or_default();
            let Ok((_, block)) = x509_parser::pem::parse_x509_pem(&pem) else { return Ok(()) };
            let Ok((_, csr)) = x509_parser::certification_request::X509CertificationRequest::from_der(&block.contents)
            else {
                return Ok(());
            };
            let masters = csr
                .certification_request_info
                .subject
                .iter_organization()
                .any(|a| a.as_str().is_ok_and(|s| s == crate::user::SYSTEM_MASTERS));
            if masters {
                return Err(forbid(
                    ctx,
                    o,
                    format!("use of {CLIENT_SIGNER} signer with system:masters group is not allowed"),
                ));
            }
            Ok(())
        })
    }),
};

pub static OWNERS: Plugin = Plugin {
    name: "OwnerReferencesPermissionEnforcement",
    handles: |ctx| writes(ctx) && ctx.subresource.is_empty() && !ctx.user.is_in(crate::user::SYSTEM_MASTERS),
    admit: None,
    validate: Some(|ctx, o, old| {
        Box::pin(async move {
            let none = Value::Null;
            let meta = |v: &Value| v.get("metadata").cloned().unwrap_or_default();
            let (new, before) = (meta(o), old.map(meta).unwrap_or(none));
            let blocking = |m: &Value| -> Vec<(String, String, String, String)> {
                list(m, "ownerReferences")
                    .iter()
                    .filter(|r| crate::kinds::edit::flag(r, "blockOwnerDeletion"))
                    .map(|r| {
                        (
                            text(r, "apiVersion").to_owned(),
                            text(r, "kind").to_owned(),
                            text(r, "name").to_owned(),
                            text(r, "uid").to_owned(),
                        )
                    })
                    .collect()
            };
            let had = blocking(&before);
            for (version, kind, name, uid) in blocking(&new).into_iter().filter(|b| !had.contains(b)) {
                let (group, version) = version.split_once('/').map_or(("", version.as_str()), |(g, v)| (g, v));
                let resource = crate::kinds::builtin()
                    .iter()
                    .find(|k| k.group == group && k.version == version && k.kind == kind)
                    .map(|k| k.resource.clone());
                // Kinds of CRDs: the plural is what the kind says in lower case and an s, which covers what is in use.
                let resource = resource.unwrap_or_else(|| format!("{}s", kind.to_lowercase()));
                if !may(ctx, "update", group, &resource, "finalizers", &name, &ctx.namespace) {
                    let _ = uid;
                    return Err(forbid(
                        ctx,
                        o,
                        "cannot set blockOwnerDeletion if an ownerReference refers to a resource you can't set finalizers on: ",
                    ));
                }
            }
            Ok(())
        })
    }),
};

/// Nobody grants more than they hold, unless they may `escalate` or `bind`.
pub static ESCALATION: Plugin = Plugin {
    name: "RBACEscalation",
    handles: |ctx| {
        writes(ctx)
            && ctx.kind.group == RBAC
            && ctx.subresource.is_empty()
            && !ctx.user.is_in(crate::user::SYSTEM_MASTERS)
    },
    admit: None,
    validate: Some(|ctx, o, old| Box::pin(async move { escalation(ctx, o, old).await })),
};

async fn escalation(ctx: &Context, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    let resource = ctx.kind.resource.as_str();
    let wanted: Vec<Rule> = if resource.ends_with("bindings") {
        let subjects = |v: &Value| v.get("subjects").cloned().unwrap_or_default();
        if old.is_some_and(|p| subjects(p) == subjects(object)) {
            return Ok(());
        }
        let (kind, name) = (crate::object::text(object, "/roleRef/kind"), crate::object::text(object, "/roleRef/name"));
        let plural = if kind == "Role" { "roles" } else { "clusterroles" };
        if may(ctx, "bind", RBAC, plural, "", name, &ctx.namespace) {
            return Ok(());
        }
        let at = if kind == "Role" { ctx.namespace.as_str() } else { "" };
        match look(ctx, RBAC, plural, at, name).await? {
            Some(role) => Rule::parse_all(&role),
            None => {
                return Err(match ctx.api.kind(RBAC, "v1", plural) {
                    Some(kind) => Status::not_found(&kind, name),
                    None => Status::no_such_resource(),
                });
            }
        }
    } else {
        if old.is_some_and(|p| {
            p.get("rules") == object.get("rules") && p.get("aggregationRule") == object.get("aggregationRule")
        }) {
            return Ok(());
        }
        let name = crate::object::name(object);
        if may(ctx, "escalate", RBAC, resource, "", name, &ctx.namespace) {
            return Ok(());
        }
        if object.get("aggregationRule").is_some_and(|a| !a.is_null()) {
            // What will be aggregated is not known, so it takes everything.
            let all = |urls: bool| Rule {
                verbs: vec!["*".into()],
                groups: if urls { vec![] } else { vec!["*".into()] },
                resources: if urls { vec![] } else { vec!["*".into()] },
                urls: if urls { vec!["*".into()] } else { vec![] },
                names: vec![],
            };
            let mut rules = Rule::parse_all(object);
            rules.extend([all(false), all(true)]);
            rules
        } else {
            Rule::parse_all(object)
        }
    };
    let held = ctx.api.authorizer().rules_for(&ctx.user, &ctx.namespace);
    let missing = rbac::missing(&held, &wanted);
    if missing.is_empty() {
        return Ok(());
    }
    let groups: Vec<String> = ctx.user.groups.iter().map(|g| format!("{g:?}")).collect();
    Err(forbid(
        ctx,
        object,
        format!(
            "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
            ctx.user.name,
            groups.join(" "),
            missing.join("\n")
        ),
    ))
}
