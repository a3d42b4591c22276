//! Validation of volumes, those of pods and those of persistent volumes.

use crate::kinds::at::{At, Errs};
use crate::kinds::names;
use crate::kinds::pod::containers::{field_ref, resource_ref};
use crate::kinds::quantity::Quantity;

/// Names of volumes that mounts may refer to.
#[derive(Default)]
pub struct Volumes<'a> {
    pub names: Vec<&'a str>,
}

/// All volume sources.
pub const SOURCES: [&str; 31] = [
    "emptyDir",
    "hostPath",
    "gitRepo",
    "gcePersistentDisk",
    "awsElasticBlockStore",
    "secret",
    "nfs",
    "iscsi",
    "glusterfs",
    "flocker",
    "persistentVolumeClaim",
    "rbd",
    "cinder",
    "cephfs",
    "quobyte",
    "downwardAPI",
    "fc",
    "flexVolume",
    "configMap",
    "azureFile",
    "vsphereVolume",
    "azureDisk",
    "photonPersistentDisk",
    "projected",
    "portworxVolume",
    "scaleIO",
    "storageos",
    "csi",
    "ephemeral",
    "image",
    "local",
];
const FILE_MODE: &str = "must be a number between 0 and 0777 (octal), both inclusive";
const VOLUME_FIELDS: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
const HOST_PATH_TYPES: [&str; 8] =
    ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];

/// Volumes of a pod; gives back their names.
pub fn check<'a>(at: &At<'a>, e: &mut Errs) -> Volumes<'a> {
    let mut out = Volumes::default();
    for v in at.items() {
        check_source(&v, false, e);
        let name = v.at("name");
        let before = e.0.len();
        e.required_check(&name, names::dns1123_label);
        if out.names.contains(&name.str()) {
            e.duplicate(&name);
        }
        if e.0.len() == before {
            out.names.push(name.str());
        }
    }
    out
}

/// Exactly one source, and that one well formed. Persistent volumes hold the sources in their spec.
pub fn check_source(v: &At<'_>, persistent: bool, e: &mut Errs) {
    let mut n = 0;
    for kind in SOURCES {
        let s = v.at(kind);
        if !s.is_set() {
            continue;
        }
        n += 1;
        if n > 1 {
            e.forbidden(&s, "may not specify more than 1 volume type");
            continue;
        }
        source(kind, &s, persistent, e);
    }
    if n == 0 {
        e.required(v, "must specify a volume type");
    }
}

fn required(s: &At<'_>, fields: &[&'static str], e: &mut Errs) {
    for f in fields {
        if s.at(f).is_zero() {
            e.required(&s.at(f), "");
        }
    }
}

fn source(kind: &str, s: &At<'_>, persistent: bool, e: &mut Errs) {
    match kind {
        "emptyDir" if Quantity::from_value(s.at("sizeLimit").v).is_some_and(Quantity::is_negative) => {
            e.forbidden(&s.at("sizeLimit"), "SizeLimit field must be a valid resource quantity");
        }
        "hostPath" => {
            let path = s.at("path");
            if path.is_zero() {
                return e.required(&path, "");
            }
            no_dots(&path, e);
            if s.at("type").is_set() {
                e.one_of(&s.at("type"), &HOST_PATH_TYPES);
            }
        }
        "secret" => {
            required(s, &["secretName"], e);
            mode(&s.at("defaultMode"), e);
            items(&s.at("items"), e);
        }
        "configMap" => {
            required(s, &["name"], e);
            mode(&s.at("defaultMode"), e);
            items(&s.at("items"), e);
        }
        "downwardAPI" => {
            mode(&s.at("defaultMode"), e);
            downward(&s.at("items"), e);
        }
        "projected" => projected(s, e),
        "persistentVolumeClaim" => required(s, &["claimName"], e),
        "nfs" => {
            required(s, &["server", "path"], e);
            if !s.at("path").is_zero() && !s.at("path").str().starts_with('/') {
                e.invalid(&s.at("path"), "must be an absolute path");
            }
        }
        "csi" => {
            required(s, &["driver"], e);
            if persistent {
                required(s, &["volumeHandle"], e);
            }
        }
        "local" => {
            if s.at("path").is_zero() {
                return e.required(&s.at("path"), "");
            }
            no_dots(&s.at("path"), e);
        }
        "ephemeral" => {
            let t = s.at("volumeClaimTemplate");
            if t.is_set() {
                crate::kinds::storage::check_claim_spec(&t.at("spec"), e);
            } else {
                e.required(&t, "");
            }
        }
        "image" => {
            required(s, &["reference"], e);
            e.one_of(&s.at("pullPolicy"), &["Always", "IfNotPresent", "Never"]);
        }
        "gitRepo" => required(s, &["repository"], e),
        "iscsi" => required(s, &["targetPortal", "iqn"], e),
        "rbd" => required(s, &["monitors", "image"], e),
        "gcePersistentDisk" => required(s, &["pdName"], e),
        "awsElasticBlockStore" | "cinder" => required(s, &["volumeID"], e),
        "glusterfs" => required(s, &["endpoints", "path"], e),
        "cephfs" => required(s, &["monitors"], e),
        "flexVolume" => required(s, &["driver"], e),
        "azureFile" => required(s, &["secretName", "shareName"], e),
        "azureDisk" => required(s, &["diskName", "diskURI"], e),
        "vsphereVolume" => required(s, &["volumePath"], e),
        _ => {}
    }
}

fn no_dots(at: &At<'_>, e: &mut Errs) {
    if at.str().split('/').any(|p| p == "..") {
        e.invalid(at, "must not contain '..'");
    }
}

fn mode(at: &At<'_>, e: &mut Errs) {
    if at.is_set() && !(0..=0o777).contains(&at.int()) {
        e.invalid(at, FILE_MODE);
    }
}

/// A path inside a volume: relative, without `..`, not starting with two dots.
fn inner_path(at: &At<'_>, e: &mut Errs) {
    if at.is_zero() {
        return e.required(at, "");
    }
    if at.str().starts_with('/') {
        e.invalid(at, "must be a relative path");
    }
    no_dots(at, e);
    if at.str().starts_with("..") && !at.str().starts_with("../") {
        e.invalid(at, "must not start with '..'");
    }
}

fn items(at: &At<'_>, e: &mut Errs) {
    for i in at.items() {
        if i.at("key").is_zero() {
            e.required(&i.at("key"), "");
        }
        inner_path(&i.at("path"), e);
        mode(&i.at("mode"), e);
    }
}

fn downward(at: &At<'_>, e: &mut Errs) {
    for i in at.items() {
        inner_path(&i.at("path"), e);
        let (field, resource) = (i.at("fieldRef"), i.at("resourceFieldRef"));
        match (field.is_set(), resource.is_set()) {
            (true, both) => {
                field_ref(&field, &VOLUME_FIELDS, e);
                if both {
                    e.invalid_value(
                        at,
                        "resource",
                        "fieldRef and resourceFieldRef can not be specified simultaneously",
                    );
                }
            }
            (false, true) => resource_ref(&resource, true, e),
            (false, false) => e.required(at, "one of fieldRef and resourceFieldRef is required"),
        }
        mode(&i.at("mode"), e);
    }
}

fn projected(s: &At<'_>, e: &mut Errs) {
    mode(&s.at("defaultMode"), e);
    let mut paths: Vec<String> = Vec::new();
    let unique = |at: &At<'_>, paths: &mut Vec<String>, e: &mut Errs| {
        if !at.is_zero() {
            if paths.iter().any(|p| p == at.str()) {
                e.invalid(at, "conflicting duplicate paths");
            }
            paths.push(at.str().to_owned());
        }
    };
    for x in s.at("sources").items() {
        let mut n = 0;
        for kind in
            ["secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"]
        {
            let p = x.at(kind);
            if !p.is_set() {
                continue;
            }
            n += 1;
            if n > 1 {
                e.forbidden(&p, "may not specify more than 1 volume type");
                continue;
            }
            match kind {
                "secret" | "configMap" => {
                    required(&p, &["name"], e);
                    items(&p.at("items"), e);
                    for i in p.at("items").items() {
                        unique(&i.at("path"), &mut paths, e);
                    }
                }
                "downwardAPI" => {
                    downward(&p.at("items"), e);
                    for i in p.at("items").items() {
                        unique(&i.at("path"), &mut paths, e);
                    }
                }
                "serviceAccountToken" => {
                    let t = p.at("expirationSeconds");
                    if t.int() < 600 {
                        e.invalid(&t, "may not specify a duration less than 10 minutes");
                    }
                    if t.int() > 1 << 32 {
                        e.invalid(&t, "may not specify a duration larger than 2^32 seconds");
                    }
                    inner_path(&p.at("path"), e);
                    unique(&p.at("path"), &mut paths, e);
                }
                _ => {}
            }
        }
        if n == 0 {
            e.required(&x, "must specify a volume type");
        }
    }
}
