//! `ImageService`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures::stream;
use serde_json::json;
use tonic::Status;

use super::{api, seen};
use crate::grpc::Router;
use crate::images::registry::Keyring;
use crate::images::{Image, ImageError, ImageStore, NoProgress, Reference};
use crate::supervisor::container::now;

/// Images of one message of `StreamImages`.
const STREAMED_AT_ONCE: usize = 500;

/// The images of this node over the interface.
#[derive(Clone)]
pub(super) struct Images {
    pub(super) store: Arc<ImageStore>,
    /// Folder of the store.
    pub(super) folder: PathBuf,
}

/// An error of the store in the codes of gRPC.
pub(super) fn failed(error: ImageError) -> Status {
    let text = error.to_string();
    match error {
        ImageError::Reference { .. } | ImageError::Ambiguous { .. } => Status::invalid_argument(text),
        ImageError::NotFound { .. } => Status::not_found(text),
        ImageError::InUse { .. } => Status::failed_precondition(text),
        ImageError::DiskFull { .. } => Status::resource_exhausted(text),
        ImageError::Unauthorized { .. } => Status::permission_denied(text),
        ImageError::Transport { .. } => Status::unavailable(text),
        ImageError::Registry { status: 404, .. } => Status::not_found(text),
        _ => Status::unknown(text),
    }
}

fn name(spec: Option<api::ImageSpec>) -> Result<String, Status> {
    let name = spec.map(|spec| spec.image).unwrap_or_default();
    if name.is_empty() { Err(Status::invalid_argument("no image is named")) } else { Ok(name) }
}

/// What a client gives to open a registry with.
fn keyring(auth: Option<api::AuthConfig>, reference: &Reference) -> Result<Keyring, Status> {
    let mut keyring = Keyring::default();
    let Some(auth) = auth else { return Ok(keyring) };
    if !auth.registry_token.is_empty() {
        return Err(Status::unimplemented(
            "a registry_token is not supported: give username and password, or identity_token",
        ));
    }
    let server = if auth.server_address.is_empty() { reference.registry.clone() } else { auth.server_address };
    let entry = json!({
        "username": auth.username, "password": auth.password, "auth": auth.auth, "identitytoken": auth.identity_token,
    });
    let config = json!({"auths": BTreeMap::from([(server, entry)])});
    keyring.add_docker_config_json(config.to_string().as_bytes()).map_err(failed)?;
    Ok(keyring)
}

impl Images {
    /// The image that a name or id means.
    pub(super) fn resolve(&self, name: &str) -> Result<Option<Arc<Image>>, Status> {
        self.store.resolve(name).map_err(failed)
    }

    fn list(&self, filter: Option<api::ImageFilter>) -> Result<Vec<api::Image>, Status> {
        match filter.and_then(|filter| filter.image).map(|spec| spec.image).filter(|name| !name.is_empty()) {
            Some(name) => Ok(self.resolve(&name)?.iter().map(|image| seen::stored_image(image)).collect()),
            None => Ok(self.store.list().map_err(failed)?.iter().map(|image| seen::stored_image(image)).collect()),
        }
    }

    fn status(&self, request: api::ImageStatusRequest) -> Result<api::ImageStatusResponse, Status> {
        let Some(image) = self.resolve(&name(request.image)?)? else { return Ok(Default::default()) };
        let mut info = BTreeMap::new();
        if request.verbose {
            let spec = json!({"chainID": image.layers.last(), "imageSpec": image.config});
            info.insert("info".to_owned(), spec.to_string());
        }
        Ok(api::ImageStatusResponse { image: Some(seen::stored_image(&image)), info })
    }

    async fn pull(&self, request: api::PullImageRequest) -> Result<api::PullImageResponse, Status> {
        let name = name(request.image)?;
        let reference: Reference = name.parse().map_err(failed)?;
        let keyring = keyring(request.auth, &reference)?;
        let image = self.store.pull(&name, &keyring, Arc::new(NoProgress)).await.map_err(failed)?;
        Ok(api::PullImageResponse { image_ref: image.id.clone() })
    }

    /// Removes an image with all of its names.
    async fn remove(&self, request: api::RemoveImageRequest) -> Result<api::RemoveImageResponse, Status> {
        let Some(image) = self.resolve(&name(request.image)?)? else { return Ok(Default::default()) };
        match self.store.remove(&image.id).await {
            Ok(_) | Err(ImageError::NotFound { .. }) => Ok(Default::default()),
            Err(error) => Err(failed(error)),
        }
    }

    async fn fs_info(&self) -> Result<api::ImageFsInfoResponse, Status> {
        let usage = self.store.usage().await.map_err(failed)?;
        let of = |used_bytes: u64, inodes_used: u64| api::FilesystemUsage {
            timestamp: now(),
            fs_id: Some(api::FilesystemIdentifier { mountpoint: self.folder.to_string_lossy().into_owned() }),
            used_bytes: Some(api::UInt64Value { value: used_bytes }),
            inodes_used: Some(api::UInt64Value { value: inodes_used }),
        };
        let folder = self.folder.join("snapshots");
        let writable = tokio::task::spawn_blocking(move || crate::images::disk_usage(&folder)).await;
        let (bytes, inodes) = writable.map_err(|error| Status::internal(error.to_string()))?.map_err(failed)?;
        Ok(api::ImageFsInfoResponse {
            image_filesystems: vec![of(usage.used_bytes, usage.inodes_used)],
            container_filesystems: vec![of(bytes, inodes)],
        })
    }

    /// The calls.
    pub(super) fn routes(&self, router: Router) -> Router {
        macro_rules! unary {
            ($router:expr, $name:literal, |$this:ident, $request:ident: $of:ty| $answer:expr) => {{
                let this = self.clone();
                $router.unary(concat!("/runtime.v1.ImageService/", $name), move |$request: $of| {
                    let $this = this.clone();
                    async move { $answer }
                })
            }};
        }
        let router = unary!(router, "ListImages", |this, request: api::ListImagesRequest| {
            Ok(api::ListImagesResponse { images: this.list(request.filter)? })
        });
        let router = unary!(router, "ImageStatus", |this, request: api::ImageStatusRequest| this.status(request));
        let router = unary!(router, "PullImage", |this, request: api::PullImageRequest| this.pull(request).await);
        let router = unary!(router, "RemoveImage", |this, request: api::RemoveImageRequest| this.remove(request).await);
        let router = unary!(router, "ImageFsInfo", |this, _request: api::ImageFsInfoRequest| this.fs_info().await);
        let this = self.clone();
        router.streaming("/runtime.v1.ImageService/StreamImages", move |request: api::StreamImagesRequest| {
            let this = this.clone();
            async move {
                let images = this.list(request.filter)?;
                let parts: Vec<_> = images
                    .chunks(STREAMED_AT_ONCE)
                    .map(|images| Ok(api::StreamImagesResponse { images: images.to_vec() }))
                    .collect();
                Ok(stream::iter(parts))
            }
        })
    }
}
