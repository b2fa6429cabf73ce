//! How replicas on different nodes speak with each other.
//!
//! | file | what |
//! |------|------|
//! | `config.rs` | settings, and who this node is |
//! | `map.rs` | replica → node → address, kept up to date by the layers above |
//! | `handshake.rs`, `book.rs` | proving the cluster's token both ways; remembering who was seen |
//! | `convert.rs` | openraft's messages ⇄ `peer.proto` |
//! | `outbox.rs` | what waits to be sent: two lanes, coalesced into frames |
//! | `session.rs`, `append.rs` | the calling side of a session: calls, pipelined append streams, flow control |
//! | `link.rs` | one session per peer, reconnected with backoff |
//! | `server.rs`, `dispatch.rs` | the called side: handshake, routing to the replicas here, answers |
//! | `service.rs` | calls of the layers above, over the same sessions |
//! | `counts.rs` | what is counted of sessions |
//! | `network.rs` | openraft's network traits over all that |
//! | `snapshot_send.rs`, `snapshot_receive.rs` | the state of a group for a replica that fell behind |
//! | `snapshot_progress.rs` | the snapshots that travel, and the rates they share |
//!
//! Of every ordered pair of nodes one gRPC stream carries the requests of all groups. What a peer has not answered yet
//! is bounded in bytes per append stream and per peer, on both sides by the same number, because a request holds its
//! place until its answer is here: a peer that does not read costs that much memory and no more. An append stream that
//! is not answered for `append_timeout` is given up, so that it does not hold back the leader's purge.

mod append;
mod book;
mod config;
mod convert;
mod counts;
mod dispatch;
mod handshake;
mod link;
mod map;
mod network;
mod outbox;
mod server;
mod service;
mod session;
mod snapshot_progress;
mod snapshot_receive;
mod snapshot_send;

pub use book::{KnownPeer, NoMemory, PeerMemory};
pub use config::{Dial, PeerConfig, PeerConfigError, PeerIdentity, PeerStream};
pub use handshake::Refusal;
pub use link::{LinkReport, Peers};
pub use map::PeerMap;
pub use server::PeerServer;
pub use service::{CallError, CallFailure, CallUnderWay, PeerMethod, PeerService};
pub use snapshot_progress::{SnapshotPhase, SnapshotProgress, SnapshotWay};

pub(super) use dispatch::{RaftHandle, Replicas};
pub(super) use network::PeerNetwork;
