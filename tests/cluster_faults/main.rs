//! Clusters of real processes to which things happen while clients are at work, and what must hold all the same.
#![allow(clippy::unwrap_used)]

#[path = "../harness/mod.rs"]
mod harness;

mod checker;
mod disks;
mod namespaces;
mod quorum;
mod random;
mod replace;
mod schedule;
mod verify;
