//! Volumes: what a pod's `spec.volumes` become on disk, how they follow their sources, and how containers see them.
//!
//! Files lie where a kubelet puts them: `<data>/pods/<uid>/volumes/kubernetes.io~<type>/<name>`. Everything here is
//! idempotent, so a restarted daemon simply sets its pods' volumes up again.
//!
//! One file per type of volume, each a [`plugin::Plugin`]; the table of types is in [`plugin`].

pub(crate) mod error;
mod objects;
mod quantity;

mod claim;
mod config_map;
mod csi;
mod downward;
mod empty_dir;
mod host_path;
mod image;
mod nfs;
mod payload;
mod plugin;
mod projected;
mod secret;
mod token;
mod writer;

mod env_file;
mod environment;
mod live;
mod manager;
mod mounts;
mod ownership;
mod subpath;

pub use downward::{Allocatable, field_ref, resource_field_ref};
pub use environment::{EnvironmentError, expand, service_environment};
pub use error::VolumeError;
pub use manager::{MountedVolume, PodVolumes, VolumeUsage, Volumes, VolumesConfig};
pub(crate) use mounts::{ensure_layers, ensure_shared, unmount_all};
pub use objects::{ObjectCache, ObjectData, ObjectKey, ObjectKind};
pub use quantity::Quantity;
