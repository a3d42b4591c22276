//! A small CSI driver: a volume is a tmpfs, staged by mounting it and published by a bind mount; a block volume is the null
//! device. What it is asked with stands in the file `asked` of the volume.

use std::fs;
use std::path::Path;

use coracle_kubelet::csi::api;
use coracle_kubelet::grpc::Router;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::json;
use tonic::Status;

use crate::process::{self, Journal};

pub(crate) const NAME: &str = "volumes.test.example";
/// A topology of one.
pub(crate) const ZONE: &str = "topology.test.example/node";

fn failed(what: &str) -> impl FnOnce(nix::errno::Errno) -> Status {
    let what = what.to_owned();
    move |errno| Status::internal(format!("{what}: {errno}"))
}

fn is_mounted(path: &str) -> bool {
    let table = fs::read_to_string("/proc/self/mountinfo").expect("the mounts");
    table.lines().any(|line| line.split(' ').nth(4) == Some(path))
}

fn unmount(path: &str) -> Result<(), Status> {
    if is_mounted(path) {
        umount2(path, MntFlags::empty()).map_err(failed("unmount"))?;
    }
    Ok(())
}

pub(crate) async fn run(kubelet: &Path, journal: Journal) {
    let note = move |call: &'static str| {
        let journal = journal.clone();
        move |what: serde_json::Value| journal.note(call, what)
    };
    let [stage, publish, unpublish, unstage, expand] =
        ["stage", "publish", "unpublish", "unstage", "expand"].map(&note);
    let capabilities = [
        api::Capability::StageUnstageVolume,
        api::Capability::GetVolumeStats,
        api::Capability::ExpandVolume,
        api::Capability::SingleNodeMultiWriter,
    ];
    let router = Router::default()
        .unary("/csi.v1.Node/NodeGetInfo", |_: api::NodeGetInfoRequest| async {
            Ok(api::NodeGetInfoResponse {
                node_id: "node-of-test".into(),
                max_volumes_per_node: 7,
                accessible_topology: Some(api::Topology { segments: [(ZONE.to_owned(), "here".to_owned())].into() }),
            })
        })
        .unary("/csi.v1.Node/NodeGetCapabilities", move |_: api::NodeGetCapabilitiesRequest| async move {
            let of = |kind: api::Capability| api::NodeServiceCapability { rpc: Some(api::Rpc { r#type: kind as i32 }) };
            Ok(api::NodeGetCapabilitiesResponse { capabilities: capabilities.map(of).into() })
        })
        .unary("/csi.v1.Node/NodeStageVolume", move |asked: api::NodeStageVolumeRequest| {
            let stage = stage.clone();
            async move {
                stage(json!({"volume": asked.volume_id, "secrets": asked.secrets, "attached": asked.publish_context}));
                let is_folder = asked.volume_capability.is_some_and(|capability| capability.mount.is_some());
                if is_folder && !is_mounted(&asked.staging_target_path) {
                    let (path, kind) = (asked.staging_target_path.as_str(), Some("tmpfs"));
                    mount(kind, path, kind, MsFlags::empty(), Some("size=1m")).map_err(failed("mount tmpfs"))?;
                }
                Ok(api::NodeStageVolumeResponse {})
            }
        })
        .unary("/csi.v1.Node/NodePublishVolume", move |asked: api::NodePublishVolumeRequest| {
            let publish = publish.clone();
            async move { published(&asked, &publish) }
        })
        .unary("/csi.v1.Node/NodeUnpublishVolume", move |asked: api::NodeUnpublishVolumeRequest| {
            let unpublish = unpublish.clone();
            async move {
                unpublish(json!({"volume": asked.volume_id}));
                unmount(&asked.target_path)?;
                let _ = fs::remove_dir(&asked.target_path).or_else(|_| fs::remove_file(&asked.target_path));
                Ok(api::NodeUnpublishVolumeResponse {})
            }
        })
        .unary("/csi.v1.Node/NodeUnstageVolume", move |asked: api::NodeUnstageVolumeRequest| {
            let unstage = unstage.clone();
            async move {
                unstage(json!({"volume": asked.volume_id}));
                unmount(&asked.staging_target_path)?;
                Ok(api::NodeUnstageVolumeResponse {})
            }
        })
        .unary("/csi.v1.Node/NodeExpandVolume", move |asked: api::NodeExpandVolumeRequest| {
            let expand = expand.clone();
            async move {
                let bytes = asked.capacity_range.map_or(0, |range| range.required_bytes);
                expand(json!({"volume": asked.volume_id, "bytes": bytes}));
                Ok(api::NodeExpandVolumeResponse { capacity_bytes: bytes })
            }
        })
        .unary("/csi.v1.Node/NodeGetVolumeStats", |_: api::NodeGetVolumeStatsRequest| async {
            let bytes = api::VolumeUsage { available: 1, total: 4242, used: 4241, unit: api::Unit::Bytes as i32 };
            Ok(api::NodeGetVolumeStatsResponse { usage: vec![bytes], volume_condition: None })
        });
    process::run(kubelet, "CSIPlugin", NAME, "1.0.0", router).await;
}

fn published(
    asked: &api::NodePublishVolumeRequest,
    note: &impl Fn(serde_json::Value),
) -> Result<api::NodePublishVolumeResponse, Status> {
    let capability = asked.volume_capability.clone().unwrap_or_default();
    let what = json!({
        "volume": asked.volume_id, "secrets": asked.secrets, "context": asked.volume_context,
        "readonly": asked.readonly, "mode": capability.access_mode.map(|access| access.mode),
        "flags": capability.mount.as_ref().map(|mount| &mount.mount_flags),
    });
    note(what.clone());
    if is_mounted(&asked.target_path) {
        return Ok(api::NodePublishVolumeResponse {});
    }
    let bind = |from: &str| {
        let (none, flags) = (None::<&str>, MsFlags::MS_BIND);
        mount(Some(from), asked.target_path.as_str(), none, flags, none).map_err(failed("bind"))
    };
    if capability.block.is_some() {
        fs::File::create(&asked.target_path)?;
        bind("/dev/null")?;
        return Ok(api::NodePublishVolumeResponse {});
    }
    fs::create_dir_all(&asked.target_path)?;
    if asked.staging_target_path.is_empty() {
        let kind = Some("tmpfs");
        mount(kind, asked.target_path.as_str(), kind, MsFlags::empty(), Some("size=1m")).map_err(failed("mount"))?;
    } else {
        bind(&asked.staging_target_path)?;
    }
    fs::write(format!("{}/asked", asked.target_path), what.to_string())?;
    Ok(api::NodePublishVolumeResponse {})
}
