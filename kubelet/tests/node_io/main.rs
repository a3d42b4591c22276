//! Images, volumes and the node's HTTPS API on the real thing: overlay mounts in private mount namespaces, Debian's
//! docker-registry on loopback, archives made by skopeo and umoci, WebSocket and SPDY clients.

mod fake_api;
mod fake_runtime;
mod host;
mod images;
mod kubectl;
mod registry;
mod streaming;
mod volumes;
