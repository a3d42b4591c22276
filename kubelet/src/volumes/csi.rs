//! Volumes of CSI drivers: what a pod's own volume or a persistent one asks of its driver. The driver's part is in `csi`.

use std::collections::BTreeMap;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::{
    CSIPersistentVolumeSource, PersistentVolume, PersistentVolumeClaim, Secret, SecretReference,
    ServiceAccountTokenProjection,
};
use k8s_openapi::api::storage::v1::{CSIDriver, CSIDriverSpec, VolumeAttachment};
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use tokio::time::Instant;

use super::error::VolumeError;
use super::ownership;
use super::plugin::{Context, Plugin, Ready};
use super::quantity::Quantity;
use crate::csi::{Csi, Wanted, Words};

/// How often a driver that wants to be is asked to publish again (`requiresRepublish`).
const REPUBLISH: Duration = Duration::from_secs(60);
/// How often a claim is looked at that may have grown; a node may not watch claims.
const LOOK_FOR_GROWTH: Duration = Duration::from_secs(15);
/// First and longest pause between looks at an attachment, which a node may not watch either.
const ATTACHMENT_LOOKS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// After this time the pod is told that its volume is not attached; the worker tries again.
const ATTACHMENT_PATIENCE: Duration = Duration::from_secs(10);

/// A volume that lives with its pod (`spec.volumes[].csi`).
pub(super) struct CsiVolume;

#[async_trait]
impl Plugin for CsiVolume {
    fn folder(&self) -> &'static str {
        "kubernetes.io~csi"
    }

    async fn setup(&self, context: &Context<'_>) -> Result<Ready, VolumeError> {
        let Some(source) = &context.volume.csi else { return Err(context.invalid("it is no csi volume")) };
        let rules = Rules::of(context, &source.driver, "Ephemeral").await?;
        let secrets = match &source.node_publish_secret_ref {
            Some(reference) => secret(context, context.namespace, &reference.name).await?,
            None => Words::new(),
        };
        let wanted = Wanted {
            name: context.volume.name.clone(),
            driver: source.driver.clone(),
            read_only: source.read_only.unwrap_or(false),
            fs_type: source.fs_type.clone().unwrap_or_default(),
            context: source.volume_attributes.clone().unwrap_or_default(),
            publish_secrets: secrets,
            ..Wanted::default()
        };
        publish(context, &rules, wanted, true, None).await
    }
}

/// A persistent volume of a driver.
pub(super) async fn persistent(
    context: &Context<'_>,
    claim: &PersistentVolumeClaim,
    volume: &PersistentVolume,
    source: &CSIPersistentVolumeSource,
    read_only: bool,
) -> Result<Ready, VolumeError> {
    let rules = Rules::of(context, &source.driver, "Persistent").await?;
    let spec = volume.spec.clone().unwrap_or_default();
    let mut wanted = Wanted {
        name: volume.metadata.name.clone().unwrap_or_default(),
        driver: source.driver.clone(),
        handle: Some(source.volume_handle.clone()),
        block: spec.volume_mode.as_deref() == Some("Block"),
        read_only: read_only || source.read_only.unwrap_or(false),
        fs_type: source.fs_type.clone().unwrap_or_default(),
        mount_options: spec.mount_options.clone().unwrap_or_default(),
        access_modes: spec.access_modes.clone().unwrap_or_default(),
        context: source.volume_attributes.clone().unwrap_or_default(),
        stage_secrets: secret_of(context, source.node_stage_secret_ref.as_ref()).await?,
        publish_secrets: secret_of(context, source.node_publish_secret_ref.as_ref()).await?,
        ..Wanted::default()
    };
    if rules.attach {
        let name = csi(context).attachment(&wanted);
        wanted.attached = Some(attached(context, &name).await?);
    }
    let once = ["ReadWriteOnce", "ReadWriteOncePod"];
    let is_of_one = wanted.access_modes.iter().any(|mode| once.contains(&mode.as_str()));
    publish(context, &rules, wanted, is_of_one, Some((claim, volume, source))).await
}

fn csi<'a>(context: &Context<'a>) -> &'a Csi {
    &context.manager.config.csi
}

/// What a driver's CSIDriver object asks of the node.
struct Rules {
    spec: CSIDriverSpec,
    attach: bool,
}

impl Rules {
    /// The rules of a driver that may be used in this way; one without an object has those of an empty one.
    async fn of(context: &Context<'_>, driver: &str, mode: &str) -> Result<Self, VolumeError> {
        let api: Api<CSIDriver> = Api::all(context.manager.objects.client().clone());
        let found = api.get_opt(driver).await.map_err(|error| failed("csidriver", driver, error))?;
        let spec = found.map(|object| object.spec).unwrap_or_default();
        let usual = ["Persistent".to_owned()];
        let modes = spec.volume_lifecycle_modes.as_deref().unwrap_or(&usual);
        if !modes.iter().any(|known| known == mode) {
            return Err(context.invalid(format!("CSI driver {driver} does not support volumes that are {mode}")));
        }
        Ok(Self { attach: spec.attach_required.unwrap_or(true), spec })
    }

    /// Whether the node gives the volume's files their group.
    fn sets_group(&self, wanted: &Wanted, is_of_one: bool) -> bool {
        match self.spec.fs_group_policy.as_deref() {
            Some("None") => false,
            Some("File") => true,
            _ => !wanted.fs_type.is_empty() && is_of_one,
        }
    }

    /// What drivers are told of the pod, if they ask.
    fn pod_info(&self, context: &Context<'_>, is_persistent: bool) -> Words {
        if self.spec.pod_info_on_mount != Some(true) {
            return Words::new();
        }
        let meta = &context.pod.metadata;
        let account = context.pod.spec.as_ref().and_then(|spec| spec.service_account_name.clone());
        let info = [
            ("pod.name", meta.name.clone().unwrap_or_default()),
            ("pod.namespace", context.namespace.to_owned()),
            ("pod.uid", context.uid.to_owned()),
            ("serviceAccount.name", account.unwrap_or_default()),
            ("ephemeral", (!is_persistent).to_string()),
        ];
        info.map(|(name, value)| (format!("csi.storage.k8s.io/{name}"), value)).into()
    }
}

/// Tokens of the pod's account for the audiences that the driver names, as JSON, and when they are to be renewed.
async fn tokens(context: &Context<'_>, rules: &Rules) -> Result<Option<(String, Instant)>, VolumeError> {
    let mut all = BTreeMap::new();
    let mut renew_at = None::<Instant>;
    for wanted in rules.spec.token_requests.iter().flatten() {
        let source = ServiceAccountTokenProjection {
            audience: Some(wanted.audience.clone()),
            expiration_seconds: wanted.expiration_seconds,
            path: format!("csi:{}", wanted.audience),
        };
        let token = context.manager.tokens.get(context, &source).await?;
        renew_at = Some(renew_at.map_or(token.renew_at, |known| known.min(token.renew_at)));
        let entry = json!({"token": token.token, "expirationTimestamp": token.expires_at.to_string()});
        all.insert(wanted.audience.clone(), entry);
    }
    Ok(renew_at.map(|renew_at| (json!(all).to_string(), renew_at)))
}

type Persistent<'a> = (&'a PersistentVolumeClaim, &'a PersistentVolume, &'a CSIPersistentVolumeSource);

async fn publish(
    context: &Context<'_>,
    rules: &Rules,
    mut wanted: Wanted,
    is_of_one: bool,
    persistent: Option<Persistent<'_>>,
) -> Result<Ready, VolumeError> {
    wanted.pod_volume.clone_from(&context.volume.name);
    wanted.group = context.fs_group().filter(|_| !wanted.block);
    wanted.again = rules.spec.requires_republish == Some(true);
    wanted.context.extend(rules.pod_info(context, persistent.is_some()));
    let mut refresh_at = wanted.again.then(|| Instant::now() + REPUBLISH);
    if let Some((tokens, renew_at)) = tokens(context, rules).await? {
        let secret = rules.spec.service_account_token_in_secrets == Some(true);
        let place = if secret { &mut wanted.publish_secrets } else { &mut wanted.context };
        place.insert("csi.storage.k8s.io/serviceAccount.tokens".into(), tokens);
        // A driver hears of new tokens only if it wants to be asked again.
        refresh_at = refresh_at.map(|known| known.min(renew_at));
    }
    let published = csi(context).publish(context.uid, wanted.clone()).await?;
    if let Some(group) = wanted.group.filter(|_| published.is_new && !wanted.read_only && !published.driver_sets_group)
        && rules.sets_group(&wanted, is_of_one)
    {
        ownership::apply(&published.path, group, false, ownership::policy(context.pod)).await?;
    }
    if let Some((claim, volume, source)) = persistent {
        refresh_at = Some(refresh_at.unwrap_or_else(|| Instant::now() + LOOK_FOR_GROWTH));
        if let Some(bytes) = growth(claim, volume) {
            let secrets = secret_of(context, source.node_expand_secret_ref.as_ref()).await?;
            if csi(context).expand(&published, &wanted, bytes, secrets).await? {
                grown(context, claim, volume).await?;
            }
        }
    }
    let (block, read_only) = (wanted.block, wanted.read_only);
    let path = csi(context).ready(published)?;
    Ok(Ready { refresh_at, read_only, block, ..Ready::at(path) })
}

/// The bytes of a volume that its claim does not know to be so large yet.
fn growth(claim: &PersistentVolumeClaim, volume: &PersistentVolume) -> Option<i64> {
    let bytes = |capacity: Option<&BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>>| {
        let quantity: Quantity = capacity?.get("storage")?.0.parse().ok()?;
        i64::try_from(quantity.ceil()).ok()
    };
    let has = bytes(volume.spec.as_ref()?.capacity.as_ref())?;
    let known = bytes(claim.status.as_ref()?.capacity.as_ref())?;
    (has > known).then_some(has)
}

/// What the attachment of a volume to this node says, as soon as it is one.
async fn attached(context: &Context<'_>, name: &str) -> Result<Words, VolumeError> {
    let api: Api<VolumeAttachment> = Api::all(context.manager.objects.client().clone());
    let (mut pause, longest) = ATTACHMENT_LOOKS;
    let deadline = Instant::now() + ATTACHMENT_PATIENCE;
    loop {
        let found = match api.get_opt(name).await {
            // Until it is there, it is none of this node's.
            Err(kube::Error::Api(answer)) if answer.code == 403 => None,
            other => other.map_err(|error| failed("volumeattachment", name, error))?,
        };
        let status = found.and_then(|attachment| attachment.status).unwrap_or_default();
        if status.attached {
            return Ok(status.attachment_metadata.unwrap_or_default());
        }
        if Instant::now() >= deadline {
            let why = status.attach_error.and_then(|error| error.message).unwrap_or_default();
            let why = if why.is_empty() { "its driver has not attached it yet".to_owned() } else { why };
            return Err(context.invalid(format!("it is not attached to this node: {why}")));
        }
        tokio::time::sleep(pause).await;
        pause = (2 * pause).min(longest);
    }
}

async fn secret_of(context: &Context<'_>, reference: Option<&SecretReference>) -> Result<Words, VolumeError> {
    let Some(reference) = reference else { return Ok(Words::new()) };
    let namespace = reference.namespace.as_deref().unwrap_or(context.namespace);
    secret(context, namespace, reference.name.as_deref().unwrap_or_default()).await
}

async fn secret(context: &Context<'_>, namespace: &str, name: &str) -> Result<Words, VolumeError> {
    let api: Api<Secret> = Api::namespaced(context.manager.objects.client().clone(), namespace);
    let found = api.get_opt(name).await.map_err(|error| failed("secret", name, error))?;
    let found = found.ok_or_else(|| VolumeError::NotFound { kind: "secret", name: name.to_owned() })?;
    let word = |(key, value): (String, k8s_openapi::ByteString)| {
        let text = String::from_utf8(value.0);
        text.map(|text| (key.clone(), text)).map_err(|_| context.invalid(format!("key {key} of its secret is no text")))
    };
    found.data.unwrap_or_default().into_iter().map(word).collect()
}

fn failed(kind: &'static str, name: &str, error: kube::Error) -> VolumeError {
    VolumeError::Api { kind, name: name.to_owned(), reason: error.to_string() }
}

/// Tells in a claim's status that its volume has grown.
async fn grown(
    context: &Context<'_>,
    claim: &PersistentVolumeClaim,
    volume: &PersistentVolume,
) -> Result<(), VolumeError> {
    let over = ["Resizing", "FileSystemResizePending", "ControllerResizeError", "NodeResizeError"];
    let conditions = claim.status.iter().flat_map(|status| status.conditions.iter().flatten());
    let conditions: Vec<_> = conditions.filter(|condition| !over.contains(&condition.type_.as_str())).collect();
    let capacity = volume.spec.as_ref().and_then(|spec| spec.capacity.as_ref()?.get("storage"));
    let patch = json!({"status": {
        "capacity": {"storage": capacity}, "conditions": conditions, "allocatedResourceStatuses": null,
    }});
    let name = claim.metadata.name.clone().unwrap_or_default();
    let api: Api<PersistentVolumeClaim> = Api::namespaced(context.manager.objects.client().clone(), context.namespace);
    let written = api.patch_status(&name, &PatchParams::default(), &Patch::Merge(patch)).await;
    written.map(drop).map_err(|error| failed("persistentvolumeclaim", &name, error))
}
