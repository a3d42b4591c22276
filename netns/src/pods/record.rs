//! What is on record of each pod: one small file, written before the kernel is touched and removed after the last of the pod is gone, so that a
//! daemon killed in between knows what to finish.

use std::fs;
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::pod::{PodKey, PodNet};
use crate::error::{Error, PathExt};

/// A pod's network on record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) key: PodKey,
    pub(crate) net: PodNet,
    /// The pod's addresses, the primary family first.
    pub(crate) ips: Vec<IpAddr>,
    /// The network was made completely.
    pub(crate) made: bool,
    /// By CNI plugins.
    #[serde(default)]
    pub(crate) cni: Option<crate::cni::Made>,
}

/// The folder of records. It lies on a tmpfs, as the kernel's objects do not survive a boot either; no fsync is needed.
pub(crate) struct Records {
    folder: PathBuf,
}

impl Records {
    /// Opens the folder, which must exist.
    pub(crate) fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// Reads all records; unreadable ones (a write cut short by a crash never is) are reported and removed.
    pub(crate) fn load(&self) -> Result<Vec<Record>, Error> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder).at("list", &self.folder)? {
            let path = entry.at("list", &self.folder)?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                fs::remove_file(&path).at("remove", &path)?;
                continue;
            }
            let bytes = fs::read(&path).at("read", &path)?;
            match serde_json::from_slice::<Record>(&bytes) {
                Ok(record) => all.push(record),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "removed an unreadable pod record");
                    fs::remove_file(&path).at("remove", &path)?;
                }
            }
        }
        Ok(all)
    }

    /// Writes a record, whole or not at all.
    pub(crate) fn save(&self, record: &Record) -> Result<(), Error> {
        let path = self.path(&record.key.uid);
        let temporary = self.folder.join(format!("{}.new", record.key.uid));
        let bytes = serde_json::to_vec(record).map_err(io::Error::other).at("encode", &path)?;
        let mut file = fs::File::create(&temporary).at("create", &temporary)?;
        file.write_all(&bytes).at("write", &temporary)?;
        fs::rename(&temporary, &path).at("write", &path)
    }

    /// Removes a record; none is no error.
    pub(crate) fn remove(&self, uid: &str) -> Result<(), Error> {
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result.at("remove", &path),
        }
    }

    /// The folder itself.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.folder.join(format!("{uid}.json"))
    }
}
