//! The controllers of workloads on a whole control plane: a real API server in process, and a stand-in for the nodes.

mod autoscalers;
mod budgets;
mod cron_jobs;
mod daemon_sets;
mod faults;
mod jobs;
mod simulation;
mod stateful_sets;
mod support;

#[path = "../support/mod.rs"]
mod control_plane;
