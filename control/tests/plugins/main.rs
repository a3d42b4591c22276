//! Plugins of a node, each a process of its own that speaks gRPC on a unix socket, end to end: volumes of a CSI driver, devices of a
//! device plugin and of a driver of claimed ones.
#![forbid(unsafe_code)]

#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "each file of tests uses a part of it")]
mod support;

mod csi;
mod csi_driver;
mod devices;
mod process;
