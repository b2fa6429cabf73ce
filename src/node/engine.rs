//! The seam between the composition and what it composes: everything between the store and the API.

use std::net::SocketAddr;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::cluster::PeerListener;
use super::config::Config;
use crate::base::{Alarms, ByteBudget, Clock, Tasks};
use crate::monitor::StatusSource;

/// What an engine is started with.
#[derive(Clone)]
pub struct Context {
    pub config: Arc<Config>,
    pub clock: Clock,
    /// Raise `Poisoned` when the store is, and the node stops; `Damaged`, `DiskLow` and others are only shown.
    pub alarms: Alarms,
    /// The engine's tasks belong in here, or in a child. A panic, or the end of a vital task, stops the node. They are
    /// told to stop after [`Engine::close`].
    pub tasks: Tasks,
    /// Becomes true when the node was told to stop: sessions then tell their clients to go away, answer what they have
    /// accepted, and end.
    pub draining: watch::Receiver<bool>,
    /// Bytes of publishes in the node.
    pub publish_memory: ByteBudget,
    /// Bytes of messages read and not yet sent.
    pub read_memory: ByteBudget,
    /// When the node started, in microseconds since the Unix epoch.
    pub started_us: u64,
    /// Where clients reach this node.
    pub client_address: SocketAddr,
    /// Of a node with peers: its listener, to be taken, and the address in use.
    pub peer_listener: Option<(PeerListener, SocketAddr)>,
    /// Cancelled when the node is told to stop, also while it starts.
    pub stop: CancellationToken,
}

/// Why a node did not start.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StartError {
    /// Stored data is damaged: exit code 6. The text says what to do.
    #[error("{0}")]
    Damaged(String),
    /// Anything else: exit code 1.
    #[error("{0}")]
    Failed(String),
}

/// A started store with everything on it.
pub trait Engine: Send + Sync + 'static {
    /// The gRPC services.
    fn routes(&self) -> Routes;

    /// Who tells about the data.
    fn status(&self) -> Arc<dyn StatusSource>;

    /// Hands over what this node leads to others, within a bounded time. Called when the node was told to stop, before its
    /// clients are told to go: they see no election.
    fn hand_over(&self) -> BoxFuture<'_, ()>;

    /// Completes if the node is to end and start again: its data was found damaged, and the others of its cluster have agreed
    /// to make it anew.
    fn given_up(&self) -> BoxFuture<'_, ()>;

    /// Completes when every publish that was accepted is answered. Called when no request can come any more; given up
    /// when the drain timeout is over.
    fn drain(&self) -> BoxFuture<'_, ()>;

    /// Stops groups and flushes and closes the store. Called once, last. The text of an error is logged; then the node
    /// exits with 1, and what was acknowledged is in the log all the same.
    fn close(&self) -> BoxFuture<'_, Result<(), String>>;
}
