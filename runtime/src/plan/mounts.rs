//! Mounts: options into attributes, sources into what the kernel's descriptor interface takes.

use super::{Namespaces, UserNamespace, c_path, c_string, container_path};
use crate::error::{Error, Result};
use crate::idmap::{self, Maps};
use coracle_sys::mount::{
    Attributes, MOUNT_ATTR__ATIME, MOUNT_ATTR_NOATIME, MOUNT_ATTR_NODEV, MOUNT_ATTR_NODIRATIME, MOUNT_ATTR_NOEXEC,
    MOUNT_ATTR_NOSUID, MOUNT_ATTR_NOSYMFOLLOW, MOUNT_ATTR_RDONLY, MOUNT_ATTR_RELATIME, MOUNT_ATTR_STRICTATIME,
};
use oci_spec::runtime::Mount;
use std::ffi::{CStr, CString};
use std::path::Path;

/// The kernel takes no longer value of one option through the descriptor interface.
const MAX_OPTION_BYTES: usize = 255;

/// Where a mount comes from.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    /// A copy of an existing mount. One within the container's root is found there, also when an earlier mount brings it.
    Bind { path: CString, within_root: Option<CString>, recursive: bool },
    /// A new instance of a file system with its options.
    New { filesystem: CString, options: Vec<(CString, Option<CString>)> },
}

/// Maps of an id-mapped mount.
#[derive(Clone, Debug)]
pub(crate) struct IdMap {
    pub maps: Maps,
    pub recursive: bool,
}

/// One mount of the container.
#[derive(Clone, Debug)]
pub(crate) struct MountStep {
    /// Absolute, clean path within the container.
    pub target: CString,
    pub source: Source,
    /// For the mount itself.
    pub attributes: Attributes,
    /// For it and all below it.
    pub recursive_attributes: Attributes,
    /// `MS_*` and whether for all below it, too; in order.
    pub propagation: Vec<(u64, bool)>,
    pub copy_up: bool,
    pub id_map: Option<IdMap>,
    /// Becomes read-only only when everything inside it is made.
    pub readonly_late: bool,
}

/// What an option changes.
#[derive(Clone, Copy)]
enum Effect {
    /// Attributes to set and to clear.
    Attribute(u64, u64),
    Propagation(u64),
    /// A flag of the file system itself, by its name there.
    Super(&'static str),
    Bind,
    CopyUp,
    IdMap,
    Nothing,
}

use Effect::{Attribute, Bind, CopyUp, Nothing, Propagation, Super};

/// All options that mean something to the runtime. With `r` before an attribute, a propagation, `bind` or `idmap`, it
/// holds for the mounts below, too.
const OPTIONS: &[(&str, Effect)] = &[
    ("ro", Attribute(MOUNT_ATTR_RDONLY, 0)),
    ("rw", Attribute(0, MOUNT_ATTR_RDONLY)),
    ("nosuid", Attribute(MOUNT_ATTR_NOSUID, 0)),
    ("suid", Attribute(0, MOUNT_ATTR_NOSUID)),
    ("nodev", Attribute(MOUNT_ATTR_NODEV, 0)),
    ("dev", Attribute(0, MOUNT_ATTR_NODEV)),
    ("noexec", Attribute(MOUNT_ATTR_NOEXEC, 0)),
    ("exec", Attribute(0, MOUNT_ATTR_NOEXEC)),
    ("nodiratime", Attribute(MOUNT_ATTR_NODIRATIME, 0)),
    ("diratime", Attribute(0, MOUNT_ATTR_NODIRATIME)),
    ("relatime", Attribute(MOUNT_ATTR_RELATIME, MOUNT_ATTR__ATIME)),
    ("norelatime", Attribute(MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME)),
    ("noatime", Attribute(MOUNT_ATTR_NOATIME, MOUNT_ATTR__ATIME)),
    ("atime", Attribute(MOUNT_ATTR_RELATIME, MOUNT_ATTR__ATIME)),
    ("strictatime", Attribute(MOUNT_ATTR_STRICTATIME, MOUNT_ATTR__ATIME)),
    ("nostrictatime", Attribute(MOUNT_ATTR_RELATIME, MOUNT_ATTR__ATIME)),
    ("nosymfollow", Attribute(MOUNT_ATTR_NOSYMFOLLOW, 0)),
    ("symfollow", Attribute(0, MOUNT_ATTR_NOSYMFOLLOW)),
    ("private", Propagation(libc::MS_PRIVATE)),
    ("shared", Propagation(libc::MS_SHARED)),
    ("slave", Propagation(libc::MS_SLAVE)),
    ("unbindable", Propagation(libc::MS_UNBINDABLE)),
    ("bind", Bind),
    ("idmap", Effect::IdMap),
    ("tmpcopyup", CopyUp),
    ("sync", Super("sync")),
    ("dirsync", Super("dirsync")),
    ("lazytime", Super("lazytime")),
    ("mand", Super("mand")),
    ("async", Nothing),
    ("nolazytime", Nothing),
    ("nomand", Nothing),
    ("loud", Nothing),
    ("silent", Nothing),
    ("iversion", Nothing),
    ("noiversion", Nothing),
    ("acl", Nothing),
    ("noacl", Nothing),
    ("defaults", Nothing),
    ("remount", Nothing),
];

/// Names of all options, for `features`.
pub(crate) fn option_names() -> Vec<String> {
    let mut names: Vec<String> = Vec::new();
    for (name, effect) in OPTIONS {
        names.push((*name).to_string());
        if matches!(effect, Attribute(..) | Propagation(_) | Bind | Effect::IdMap) {
            names.push(format!("r{name}"));
        }
    }
    names.sort();
    names
}

fn effect(option: &str) -> Option<(Effect, bool)> {
    let find = |name: &str| OPTIONS.iter().find(|(known, _)| *known == name).map(|(_, effect)| *effect);
    if let Some(effect) = find(option) {
        return Some((effect, false));
    }
    let effect = find(option.strip_prefix('r')?)?;
    matches!(effect, Attribute(..) | Propagation(_) | Bind | Effect::IdMap).then_some((effect, true))
}

fn change(attributes: &mut Attributes, set: u64, clear: u64) {
    // A later option overrules an earlier one.
    attributes.set = attributes.set & !clear | set;
    attributes.clear = attributes.clear & !(set & !MOUNT_ATTR__ATIME) | clear;
}

/// The propagation of the container's root and whether it was asked for.
pub(super) fn root_propagation(wanted: Option<&str>) -> Result<(u64, bool)> {
    match wanted.unwrap_or_default() {
        "" => Ok((libc::MS_SLAVE, false)),
        name => match effect(name) {
            Some((Propagation(flag), _)) => Ok((flag, true)),
            _ => Err(Error::config("linux.rootfsPropagation", format!("{name:?} is not a propagation"))),
        },
    }
}

impl MountStep {
    /// Whether mounts made below it are to show where it comes from.
    pub(crate) fn is_shared(&self) -> bool {
        self.propagation.iter().any(|(flag, _)| *flag == libc::MS_SHARED)
    }

    pub(super) fn compile(
        mount: &Mount,
        (bundle, root): (&Path, &Path),
        root_propagation: (u64, bool),
        namespaces: &Namespaces,
    ) -> Result<Self> {
        let field = format!("mounts[{}]", mount.destination().display());
        let mut step = Self {
            // Relative destinations are read from the root, and so are those that name the root on the host, as with runc.
            target: container_path(&field, mount.destination().strip_prefix(root).unwrap_or(mount.destination()))?,
            source: Source::New { filesystem: CString::default(), options: Vec::new() },
            attributes: Attributes::default(),
            recursive_attributes: Attributes::default(),
            propagation: Vec::new(),
            copy_up: false,
            id_map: None,
            readonly_late: false,
        };
        let mut bind = None;
        let mut id_map = None;
        let mut data: Vec<(CString, Option<CString>)> = Vec::new();
        for option in mount.options().iter().flatten() {
            match effect(option) {
                Some((Attribute(set, clear), false)) => change(&mut step.attributes, set, clear),
                Some((Attribute(set, clear), true)) => change(&mut step.recursive_attributes, set, clear),
                Some((Propagation(flag), recursive)) => step.propagation.push((flag, recursive)),
                Some((Bind, recursive)) => bind = Some(recursive),
                Some((Effect::IdMap, recursive)) => id_map = Some(recursive),
                Some((CopyUp, _)) => step.copy_up = true,
                Some((Super(name), _)) => data.push((c_string(&field, name)?, None)),
                Some((Nothing, _)) => {}
                None => {
                    let (key, value) = match option.split_once('=') {
                        Some((key, value)) => (key, Some(c_string(&field, value)?)),
                        None => (option.as_str(), None),
                    };
                    if value.as_ref().is_some_and(|value| value.count_bytes() > MAX_OPTION_BYTES) {
                        return Err(Error::config(
                            field,
                            format!("option {key} is longer than {MAX_OPTION_BYTES} bytes"),
                        ));
                    }
                    data.push((c_string(&field, key)?, value));
                }
            }
        }
        let kind = mount.typ().as_deref().unwrap_or_default();
        let source = mount.source().as_deref().unwrap_or(Path::new(""));
        if bind.is_none() && (kind == "bind" || kind == "rbind") {
            bind = Some(kind == "rbind");
        }
        if let Some(recursive) = bind {
            if source.as_os_str().is_empty() {
                return Err(Error::config(field, "a bind mount needs a source"));
            }
            let source = bundle.join(source);
            let within_root = source
                .strip_prefix(root)
                .ok()
                .filter(|below| {
                    namespaces.has_own(libc::CLONE_NEWNS)
                        && below.components().all(|part| matches!(part, std::path::Component::Normal(_)))
                        && !below.as_os_str().is_empty()
                })
                .map(|below| c_path(&field, below))
                .transpose()?;
            step.source = Source::Bind { path: c_path(&field, &source)?, within_root, recursive };
            // Without a word on propagation a bind mount follows the container's root, as the copy of a mount does.
            if step.propagation.is_empty() {
                step.propagation.push((root_propagation.0, true));
            }
        } else {
            if kind.is_empty() {
                return Err(Error::config(field, "has neither a type nor the option bind"));
            }
            step.source = Self::filesystem(&field, kind, source, data)?;
            step.readonly_late =
                step.attributes.set & MOUNT_ATTR_RDONLY != 0 && (kind == "tmpfs" || step.target.as_c_str() == c"/dev");
            if step.readonly_late {
                step.attributes.set &= !MOUNT_ATTR_RDONLY;
            }
        }
        if step.copy_up && kind != "tmpfs" {
            return Err(Error::config(field, "tmpcopyup goes with tmpfs only"));
        }
        step.id_map = Self::id_map(&field, mount, id_map, namespaces)?;
        if step.id_map.is_some() && bind.is_none() {
            return Err(Error::unsupported(field, "ids are mapped on bind mounts only"));
        }
        Ok(step)
    }

    fn filesystem(
        field: &str,
        kind: &str,
        source: &Path,
        mut options: Vec<(CString, Option<CString>)>,
    ) -> Result<Source> {
        // The one cgroup file system of this runtime is version 2, whatever name the specification gives it; options of
        // version 1 name hierarchies that version 2 does not have.
        let filesystem = match kind {
            "cgroup" | "cgroup2" => {
                options.clear();
                "cgroup2"
            }
            other => other,
        };
        if !source.as_os_str().is_empty() && filesystem != "cgroup2" {
            let source = c_path(field, source)?;
            if source.count_bytes() <= MAX_OPTION_BYTES {
                options.insert(0, (c"source".into(), Some(source)));
            }
        }
        Ok(Source::New { filesystem: c_string(field, filesystem)?, options })
    }

    fn id_map(field: &str, mount: &Mount, option: Option<bool>, namespaces: &Namespaces) -> Result<Option<IdMap>> {
        let uid = mount.uid_mappings().as_deref().unwrap_or_default();
        let gid = mount.gid_mappings().as_deref().unwrap_or_default();
        if option.is_none() && uid.is_empty() && gid.is_empty() {
            return Ok(None);
        }
        let recursive = option.unwrap_or(false);
        // Without maps of its own, the mount uses those of the container's user namespace.
        let (uid, gid) = match &namespaces.user {
            _ if !uid.is_empty() || !gid.is_empty() => (uid, gid),
            UserNamespace::Joined(file) => return Ok(Some(IdMap { maps: Maps::OfNamespace(file.clone()), recursive })),
            _ => (&namespaces.uid_mappings[..], &namespaces.gid_mappings[..]),
        };
        let maps = Maps::Listed {
            uid_map: idmap::text(&format!("{field}.uidMappings"), uid)?,
            gid_map: idmap::text(&format!("{field}.gidMappings"), gid)?,
        };
        Ok(Some(IdMap { maps, recursive }))
    }

    /// The source below the root, if it is one that an earlier mount brings.
    pub(crate) fn brought_by(&self, earlier: &[Self]) -> Option<&CStr> {
        let Source::Bind { within_root: Some(below), .. } = &self.source else { return None };
        let covers = |step: &Self| {
            let rest = below.to_bytes().strip_prefix(super::below_root(&step.target).to_bytes());
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(b"/"))
        };
        earlier.iter().any(covers).then_some(below)
    }

    pub(crate) fn is_bind(&self) -> bool {
        matches!(self.source, Source::Bind { .. })
    }

    pub(crate) fn is_filesystem(&self, name: &[u8]) -> bool {
        matches!(&self.source, Source::New { filesystem, .. } if filesystem.to_bytes() == name)
    }
}
