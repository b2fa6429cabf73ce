//! Groups of several replicas: real stores, real sockets on loopback, the real transport, in one process.
#![allow(clippy::unwrap_used)]

mod calls;
mod failover;
mod lab;
mod many;
mod members;
mod moves;
#[allow(dead_code)]
#[path = "../harness/net.rs"]
mod net;
mod peers;
mod rebuild;
mod relay;
mod snapshots;
