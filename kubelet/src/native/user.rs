//! Who a container's process runs as: numbers and names resolved in the image's own passwd and group files.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::path::Path;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;

use crate::cri::{RuntimeError, SecurityContext};

/// Longest passwd or group file that is read, in lines.
const MAX_LINES: usize = 100_000;

/// Ids of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Groups besides.
    pub groups: Vec<u32>,
    /// `HOME` of the user, `/` when nothing says otherwise.
    pub home: String,
}

/// Resolves the security context (or else the image's `User`, `user[:group]`) below `root`.
///
/// # Errors
/// When a name is not in the image.
pub fn resolve(root: &Path, security: &SecurityContext, image_user: &str) -> Result<User, RuntimeError> {
    let spec = if security.run_as_username.is_empty() { image_user } else { &security.run_as_username };
    let (user_word, group_word) = match (security.run_as_user, spec.split_once(':')) {
        (Some(uid), _) => (uid.to_string(), None),
        (None, Some((user, group))) => (user.to_owned(), Some(group.to_owned())),
        (None, None) => (spec.to_owned(), None),
    };
    let user_word = if user_word.is_empty() { "0".to_owned() } else { user_word };
    let passwd = read(root, "etc/passwd").map_err(RuntimeError::io("read", root.join("etc/passwd")))?;
    let by_id = user_word.parse::<u32>().ok();
    let entry = passwd.iter().find(|fields| match by_id {
        Some(uid) => fields.get(2).and_then(|f| f.parse().ok()) == Some(uid),
        None => fields[0] == user_word,
    });
    let number = |index: usize| entry.and_then(|fields| fields.get(index)).and_then(|f| f.parse::<u32>().ok());
    let uid = by_id.or_else(|| number(2)).ok_or_else(|| {
        RuntimeError::Invalid(format!("unable to find user {user_word}: no matching entries in passwd file"))
    })?;
    let groups_file = read(root, "etc/group").map_err(RuntimeError::io("read", root.join("etc/group")))?;
    let gid = match (security.run_as_group, group_word) {
        (Some(gid), _) => gid,
        (None, None) => number(3).unwrap_or(0),
        (None, Some(word)) => word
            .parse()
            .ok()
            .or_else(|| groups_file.iter().find(|f| f[0] == word).and_then(|f| f.get(2)?.parse().ok()))
            .ok_or_else(|| {
                RuntimeError::Invalid(format!("unable to find group {word}: no matching entries in group file"))
            })?,
    };
    let mut groups = security.supplemental_groups.clone();
    if !security.supplemental_groups_strict
        && let Some(name) = entry.map(|fields| fields[0].as_str())
    {
        let member = |fields: &&Vec<String>| fields.get(3).is_some_and(|list| list.split(',').any(|m| m == name));
        groups.extend(groups_file.iter().filter(member).filter_map(|f| f.get(2)?.parse::<u32>().ok()));
    }
    groups.push(gid);
    groups.sort_unstable();
    groups.dedup();
    let home = entry.and_then(|f| f.get(5)).filter(|h| !h.is_empty()).cloned().unwrap_or_else(|| "/".into());
    Ok(User { uid, gid, groups, home })
}

/// The lines of a colon-separated file below `root`, without following links out of it; none if there is no file.
fn read(root: &Path, path: &str) -> io::Result<Vec<Vec<String>>> {
    let root = File::open(root)?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)
        .mode(Mode::empty())
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file: OwnedFd = match openat2(&root, path, how) {
        Ok(file) => file,
        Err(nix::errno::Errno::ENOENT | nix::errno::Errno::ENOTDIR) => return Ok(Vec::new()),
        Err(errno) => return Err(errno.into()),
    };
    let file = File::from(file);
    if !file.metadata()?.is_file() {
        return Ok(Vec::new());
    }
    let mut lines = Vec::new();
    for line in BufReader::new(file).lines().take(MAX_LINES) {
        let line = line?;
        let line = line.trim();
        if !line.is_empty() && !line.starts_with('#') {
            lines.push(line.split(':').map(str::to_owned).collect());
        }
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_come_from_the_image() {
        let root = tempfile::tempdir().expect("folder");
        std::fs::create_dir(root.path().join("etc")).expect("etc");
        std::fs::write(root.path().join("etc/passwd"), "root:x:0:0::/root:/bin/sh\nweb:x:33:34::/srv:/bin/sh\n")
            .expect("write");
        std::fs::write(root.path().join("etc/group"), "root:x:0:\nweb:x:34:\nssl:x:99:web\n").expect("write");
        let context = |uid: Option<u32>| SecurityContext { run_as_user: uid, ..SecurityContext::default() };
        let user = |uid, gid, groups: &[u32], home: &str| User { uid, gid, groups: groups.to_vec(), home: home.into() };
        for (context, image, wanted) in [
            (context(None), "", user(0, 0, &[0], "/root")),
            (context(None), "web", user(33, 34, &[34, 99], "/srv")),
            (context(None), "web:ssl", user(33, 99, &[99], "/srv")),
            (context(None), "1000:2000", user(1000, 2000, &[2000], "/")),
            (context(Some(33)), "root", user(33, 34, &[34, 99], "/srv")),
            (
                SecurityContext {
                    run_as_group: Some(7),
                    supplemental_groups: vec![5],
                    supplemental_groups_strict: true,
                    ..context(Some(33))
                },
                "",
                user(33, 7, &[5, 7], "/srv"),
            ),
        ] {
            assert_eq!(resolve(root.path(), &context, image).expect("resolve"), wanted, "{image}");
        }
        assert!(resolve(root.path(), &context(None), "nobody").is_err());
    }
}
