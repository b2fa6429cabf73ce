//! Groups of several replicas: real stores, real sockets on loopback, the real transport, in one process.
#![allow(clippy::unwrap_used)]

mod calls;
mod failover;
mod lab;
mod many;
mod members;
mod peers;
mod proxy;
mod relay;
mod snapshots;
