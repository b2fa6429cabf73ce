//! Mainstem: a Raft-replicated, persistent stream store.
//!
//! The modules are layers; a module imports only from layers below it (`tests/tidy.rs` holds that).
//!
//! | layer | module      | what |
//! |-------|-------------|------|
//! | side  | [`cli`]     | the command line; uses [`client`] only |
//! | side  | [`client`]  | the Rust client |
//! | L7    | [`node`]    | composition: config → start → drain |
//! | L6    | [`api`]     | gRPC edge |
//! | L6    | [`monitor`] | HTTP edge: metrics, health |
//! | L5    | [`broker`]  | data plane: router, ingest, reader |
//! | L5    | [`control`] | control plane: view, placement, reconciler |
//! | L4    | [`raft`]    | the only user of openraft |
//! | L3    | [`storage`] | the only user of rocksdb |
//! | L2    | [`machine`] | pure state machines |
//! | L1    | [`wire`]    | generated code and conversions |
//! | L1    | [`model`]   | newtypes, subjects, specs and limits, batches |
//! | L0    | [`base`]    | tasks, budgets, clock, retry classes, metric names |

pub mod api;
pub mod base;
pub mod broker;
pub mod cli;
pub mod client;
pub mod control;
pub mod machine;
pub mod model;
pub mod monitor;
pub mod node;
pub mod raft;
pub mod storage;
pub mod wire;
