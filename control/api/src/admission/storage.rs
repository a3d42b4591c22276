//! Plugins about classes and volumes: DefaultStorageClass, DefaultIngressClass, StorageObjectInUseProtection.

use serde_json::Value;

use crate::admission::plugin::{Plugin, creates, forbid, look_all};
use crate::context::{Context, Operation};
use crate::kinds::edit::{child, list, put, text};
use crate::status::Status;

pub static IN_USE: Plugin = Plugin {
    name: "StorageObjectInUseProtection",
    handles: |ctx| creates(ctx, "", "persistentvolumes") || creates(ctx, "", "persistentvolumeclaims"),
    admit: Some(|ctx, o, _| {
        Box::pin(async move {
            let finalizer = if ctx.kind.resource == "persistentvolumes" {
                "kubernetes.io/pv-protection"
            } else {
                "kubernetes.io/pvc-protection"
            };
            let meta = child(o, "metadata");
            let mut all = list(meta, "finalizers").to_vec();
            if !all.iter().any(|f| f == finalizer) {
                all.push(finalizer.into());
                put(meta, "finalizers", all);
            }
            Ok(())
        })
    }),
    validate: None,
};

fn marked(o: &Value, annotation: &str) -> bool {
    o.pointer("/metadata/annotations").is_some_and(|a| text(a, annotation) == "true")
}

/// The newest of the objects marked as default; of equally old ones the first by name.
fn newest(all: Vec<Value>, annotations: &[&str]) -> Option<Value> {
    let mut marked: Vec<Value> = all.into_iter().filter(|o| annotations.iter().any(|a| marked(o, a))).collect();
    marked.sort_by_cached_key(|o| {
        (
            std::cmp::Reverse(crate::object::text(o, "/metadata/creationTimestamp").to_owned()),
            crate::object::name(o).to_owned(),
        )
    });
    marked.into_iter().next()
}

pub static STORAGE_CLASS: Plugin = Plugin {
    name: "DefaultStorageClass",
    handles: |ctx| creates(ctx, "", "persistentvolumeclaims"),
    admit: Some(|ctx, o, _| Box::pin(async move { storage_class(ctx, o).await })),
    validate: None,
};

async fn storage_class(ctx: &Context, claim: &mut Value) -> Result<(), Status> {
    let given = claim.pointer("/spec/storageClassName").is_some_and(|v| !v.is_null())
        || claim
            .pointer("/metadata/annotations")
            .is_some_and(|a| a.get("volume.beta.kubernetes.io/storage-class").is_some());
    if given {
        return Ok(());
    }
    let all = look_all(ctx, "storage.k8s.io", "storageclasses", "").await?;
    const MARKS: [&str; 2] =
        ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"];
    if let Some(class) = newest(all, &MARKS) {
        put(child(claim, "spec"), "storageClassName", crate::object::name(&class));
    }
    Ok(())
}

pub static INGRESS_CLASS: Plugin = Plugin {
    name: "DefaultIngressClass",
    handles: |ctx| ctx.operation == Operation::Create && ctx.is_object_of("networking.k8s.io", "ingresses"),
    admit: Some(|ctx, o, _| Box::pin(async move { ingress_class(ctx, o).await })),
    validate: None,
};

async fn ingress_class(ctx: &Context, ingress: &mut Value) -> Result<(), Status> {
    let given = ingress.pointer("/spec/ingressClassName").is_some_and(|v| !v.is_null())
        || ingress.pointer("/metadata/annotations").is_some_and(|a| a.get("kubernetes.io/ingress.class").is_some());
    if given {
        return Ok(());
    }
    let all = look_all(ctx, "networking.k8s.io", "ingressclasses", "").await?;
    if let Some(class) = newest(all, &["ingressclass.kubernetes.io/is-default-class"]) {
        put(child(ingress, "spec"), "ingressClassName", crate::object::name(&class));
    }
    Ok(())
}

/// PersistentVolumeClaimResize: a claim may grow when its class allows it.
pub static RESIZE: Plugin = Plugin {
    name: "PersistentVolumeClaimResize",
    handles: |ctx| ctx.operation == Operation::Update && ctx.is_object_of("", "persistentvolumeclaims"),
    admit: None,
    validate: Some(|ctx, new, old| Box::pin(async move { resize(ctx, new, old).await })),
};

async fn resize(ctx: &Context, new: &Value, old: Option<&Value>) -> Result<(), Status> {
    use crate::kinds::quantity::Quantity;
    let asked = |o: &Value| o.pointer("/spec/resources/requests/storage").and_then(Quantity::from_value);
    let (Some(want), Some(had)) = (asked(new), old.and_then(asked)) else { return Ok(()) };
    if want <= had {
        return Ok(());
    }
    if crate::object::text(new, "/status/phase") != "Bound" {
        return Err(forbid(ctx, new, "only bound persistent volume claims can be expanded"));
    }
    let class = crate::object::text(new, "/spec/storageClassName");
    let allows = !class.is_empty()
        && crate::admission::plugin::look(ctx, "storage.k8s.io", "storageclasses", "", class)
            .await?
            .is_some_and(|c| c.get("allowVolumeExpansion").and_then(Value::as_bool).unwrap_or(false));
    if allows {
        return Ok(());
    }
    Err(forbid(
        ctx,
        new,
        "only dynamically provisioned pvc can be resized and the storageclass that provisions the pvc must support resize",
    ))
}
