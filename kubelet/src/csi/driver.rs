//! The calls of one driver's node service.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use prost::Message;

use super::api::{self, Capability};
use crate::grpc::Client;
use crate::volumes::VolumeError;

/// For a call that works on a volume, as a kubelet waits.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);
/// For a question that a driver knows the answer to.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(10);

/// A driver on this node.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) name: String,
    pub(crate) endpoint: PathBuf,
    client: Client,
    capabilities: Vec<i32>,
}

impl Driver {
    /// Connects to a driver and asks what it can do and how it knows this node.
    pub(super) async fn connect(name: &str, endpoint: &Path) -> Result<(Self, api::NodeGetInfoResponse), VolumeError> {
        let client = Client::connect(endpoint).await.map_err(|status| failed(name, "connect", &status))?;
        let mut driver =
            Self { name: name.to_owned(), endpoint: endpoint.to_owned(), client, capabilities: Vec::new() };
        let info = driver.ask("/csi.v1.Node/NodeGetInfo", api::NodeGetInfoRequest {}, QUESTION_TIMEOUT).await?;
        let question = api::NodeGetCapabilitiesRequest {};
        let answer: api::NodeGetCapabilitiesResponse =
            driver.ask("/csi.v1.Node/NodeGetCapabilities", question, QUESTION_TIMEOUT).await?;
        driver.capabilities =
            answer.capabilities.into_iter().filter_map(|capability| Some(capability.rpc?.r#type)).collect();
        Ok((driver, info))
    }

    pub(super) fn can(&self, capability: Capability) -> bool {
        self.capabilities.contains(&(capability as i32))
    }

    async fn ask<Q, A>(&self, method: &'static str, question: Q, limit: Duration) -> Result<A, VolumeError>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        self.client.call(method, question, limit).await.map_err(|status| failed(&self.name, method, &status))
    }

    pub(super) async fn stage(&self, request: api::NodeStageVolumeRequest) -> Result<(), VolumeError> {
        self.ask::<_, api::NodeStageVolumeResponse>("/csi.v1.Node/NodeStageVolume", request, CALL_TIMEOUT)
            .await
            .map(drop)
    }

    pub(super) async fn unstage(&self, volume: &str, staging: &Path) -> Result<(), VolumeError> {
        let request =
            api::NodeUnstageVolumeRequest { volume_id: volume.to_owned(), staging_target_path: text(staging) };
        self.ask::<_, api::NodeUnstageVolumeResponse>("/csi.v1.Node/NodeUnstageVolume", request, CALL_TIMEOUT)
            .await
            .map(drop)
    }

    pub(super) async fn publish(&self, request: api::NodePublishVolumeRequest) -> Result<(), VolumeError> {
        self.ask::<_, api::NodePublishVolumeResponse>("/csi.v1.Node/NodePublishVolume", request, CALL_TIMEOUT)
            .await
            .map(drop)
    }

    pub(super) async fn unpublish(&self, volume: &str, target: &Path) -> Result<(), VolumeError> {
        let request = api::NodeUnpublishVolumeRequest { volume_id: volume.to_owned(), target_path: text(target) };
        self.ask::<_, api::NodeUnpublishVolumeResponse>("/csi.v1.Node/NodeUnpublishVolume", request, CALL_TIMEOUT)
            .await
            .map(drop)
    }

    pub(super) async fn expand(&self, request: api::NodeExpandVolumeRequest) -> Result<(), VolumeError> {
        self.ask::<_, api::NodeExpandVolumeResponse>("/csi.v1.Node/NodeExpandVolume", request, CALL_TIMEOUT)
            .await
            .map(drop)
    }

    pub(super) async fn stats(
        &self,
        request: api::NodeGetVolumeStatsRequest,
    ) -> Result<api::NodeGetVolumeStatsResponse, VolumeError> {
        self.ask("/csi.v1.Node/NodeGetVolumeStats", request, QUESTION_TIMEOUT).await
    }

    /// How a volume is accessed, in the words of the specification. Of several modes of a volume the first counts.
    pub(super) fn access_mode(&self, modes: &[String]) -> api::Mode {
        let tells_apart = self.can(Capability::SingleNodeMultiWriter);
        match modes.first().map(String::as_str) {
            Some("ReadOnlyMany") => api::Mode::MultiNodeReaderOnly,
            Some("ReadWriteMany") => api::Mode::MultiNodeMultiWriter,
            Some("ReadWriteOncePod") if tells_apart => api::Mode::SingleNodeSingleWriter,
            Some("ReadWriteOnce") | None if tells_apart => api::Mode::SingleNodeMultiWriter,
            _ => api::Mode::SingleNodeWriter,
        }
    }
}

fn failed(driver: &str, method: &str, status: &tonic::Status) -> VolumeError {
    VolumeError::Driver {
        driver: driver.to_owned(),
        call: method.rsplit('/').next().unwrap_or(method).to_owned(),
        message: format!("{:?}: {}", status.code(), status.message()),
    }
}

/// A path as messages carry it; ours are made of names that the API checked.
pub(super) fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// An ordered map, as messages hold them.
pub(crate) type Words = BTreeMap<String, String>;
