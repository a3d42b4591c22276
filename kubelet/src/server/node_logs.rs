//! `/logs/`: files of the node's `/var/log`, read through descriptors so that no link leads out of it.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path as FsPath;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Path, State};
use axum::response::{Html, IntoResponse, Response};
use http::header;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use tokio_util::io::ReaderStream;

use super::containers::Refused;
use super::router::Node;

/// Entries listed of one folder.
const MAX_ENTRIES: usize = 10_000;

/// `GET /logs/`
pub(super) async fn root(state: State<Arc<Node>>) -> Result<Response, Refused> {
    file(state, Path(String::new())).await
}

/// `GET /logs/{path}`
pub(super) async fn file(State(node): State<Arc<Node>>, Path(path): Path<String>) -> Result<Response, Refused> {
    let folder = node.log_folder.clone();
    let opened = tokio::task::spawn_blocking(move || open(&folder, &path)).await.map_err(Refused::internal)??;
    match opened {
        Opened::File(file) => {
            let body = Body::from_stream(ReaderStream::new(tokio::fs::File::from_std(file)));
            Ok(([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], body).into_response())
        }
        Opened::Folder(names) => {
            let escape =
                |text: &str| text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&#34;");
            let lines: String =
                names.iter().map(|name| escape(name)).map(|name| format!("<a href=\"{name}\">{name}</a>\n")).collect();
            Ok(Html(format!("<!doctype html>\n<pre>\n{lines}</pre>\n")).into_response())
        }
    }
}

enum Opened {
    File(File),
    Folder(Vec<String>),
}

fn open(folder: &FsPath, path: &str) -> Result<Opened, Refused> {
    let missing = |error: &dyn std::fmt::Display| Refused::not_found(format!("cannot open {path:?}: {error}"));
    let base = File::open(folder).map_err(|error| missing(&error))?;
    let wanted = path.trim_matches('/');
    let wanted = if wanted.is_empty() { "." } else { wanted };
    // Non-blocking, lest a named pipe hold us up.
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    let file = File::from(openat2(&base, wanted, how).map_err(|errno| missing(&errno))?);
    let meta = file.metadata().map_err(Refused::internal)?;
    if meta.is_file() {
        return Ok(Opened::File(file));
    }
    if !meta.is_dir() {
        return Err(missing(&"it is neither file nor folder"));
    }
    let mut listing = nix::dir::Dir::from_fd(file.into()).map_err(Refused::internal)?;
    let mut names = Vec::new();
    for entry in listing.iter().take(MAX_ENTRIES) {
        let entry = entry.map_err(Refused::internal)?;
        let name =
            String::from_utf8_lossy(std::ffi::OsStr::from_bytes(entry.file_name().to_bytes()).as_encoded_bytes())
                .into_owned();
        if name != "." && name != ".." {
            let slash = if entry.file_type() == Some(nix::dir::Type::Directory) { "/" } else { "" };
            names.push(format!("{name}{slash}"));
        }
    }
    names.sort();
    Ok(Opened::Folder(names))
}
