//! One session per peer, made when it is first needed and made again whenever it ends, with backoff.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::TryFutureExt as _;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rand::Rng as _;
use tokio::net::TcpStream;
use tokio::sync::{broadcast, watch};
use tonic::transport::{Channel, Endpoint};

use super::book::{KnownPeer, NoMemory, PeerBook, PeerMemory};
use super::config::{PeerConfig, PeerConfigError};
use super::counts::Up;
use super::handshake::{Caller, Refusal, refused};
use super::map::PeerMap;
use super::outbox::Outbox;
use super::service::Services;
use super::session::Session;
use super::snapshot_progress::{SnapshotProgress, SnapshotWay, Transfers};
use crate::base::{Tasks, error_chain};
use crate::model::limits::GRPC_MESSAGE_BYTES_MAX;
use crate::model::{NodeId, ReplicaId};
use crate::wire::internal as pb;
use pb::peer_client::PeerClient;

/// Room for a frame with one entry of the largest size.
pub(super) const FRAME_BYTES_LIMIT: usize = GRPC_MESSAGE_BYTES_MAX + (4 << 20);
/// What may be on its way on one stream, unread by the other side.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;
/// A session that lived for so long was a good one: the next attempt is made at once.
const GOOD_SESSION: Duration = Duration::from_secs(5);
/// Pauses before each look whether a node whose session has ended still listens.
const PROBES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(5), Duration::from_millis(15)];
/// Ends of nodes that a slow listener may be behind by.
const ENDED_MAX: usize = 64;

/// Where a link is.
#[derive(Clone)]
enum LinkState {
    /// The first attempt, or the first after a good session.
    Connecting,
    Up(Arc<Session>),
    Down(Arc<str>),
}

/// What a link is to an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkReport {
    pub node: NodeId,
    pub up: bool,
    /// Why it is not up.
    pub reason: Option<String>,
    /// Bytes of requests that the peer has not answered.
    pub unanswered_bytes: usize,
}

pub(super) struct PeersInner {
    pub config: PeerConfig,
    pub map: Arc<PeerMap>,
    pub book: PeerBook,
    pub transfers: Transfers,
    pub services: Arc<Services>,
    pub tasks: Tasks,
    links: Mutex<HashMap<NodeId, watch::Sender<LinkState>>>,
    /// The node to which a session was made last, and how many were made.
    connected: watch::Sender<(u64, NodeId)>,
    /// Nodes whose process has ended.
    ended: broadcast::Sender<NodeId>,
}

/// The peers of this node: the calling side. Clones are the same.
#[derive(Clone)]
pub struct Peers(pub(super) Arc<PeersInner>);

impl std::fmt::Debug for Peers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Peers").field("links", &self.links()).finish()
    }
}

impl Peers {
    /// Speaks with the nodes of `map`. What it remembers of them ends with the process: see
    /// [`with_memory`](Self::with_memory).
    pub fn new(config: PeerConfig, map: Arc<PeerMap>) -> Result<Self, PeerConfigError> {
        Self::with_memory(config, map, Arc::new(NoMemory))
    }

    /// As [`new`](Self::new), with a memory that outlives the process.
    pub fn with_memory(
        config: PeerConfig,
        map: Arc<PeerMap>,
        memory: Arc<dyn PeerMemory>,
    ) -> Result<Self, PeerConfigError> {
        config.check()?;
        Ok(Self(Arc::new(PeersInner {
            transfers: Transfers::new(config.snapshot_bytes_per_second),
            config,
            map,
            book: PeerBook::new(memory),
            services: Arc::default(),
            tasks: Tasks::new("peers"),
            links: Mutex::default(),
            connected: watch::Sender::new((0, NodeId::new(0))),
            ended: broadcast::Sender::new(ENDED_MAX),
        })))
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.0.config.identity.node
    }

    /// Where replicas live.
    pub fn map(&self) -> &Arc<PeerMap> {
        &self.0.map
    }

    /// Everything remembered of peers.
    pub fn known(&self) -> Vec<KnownPeer> {
        self.0.book.all()
    }

    /// Forgets a node that has left the cluster for good. Its id must never come back.
    pub fn forget(&self, node: NodeId) {
        self.0.book.forget(node);
    }

    /// Wakes with the node whenever a session was made.
    pub fn connected(&self) -> watch::Receiver<(u64, NodeId)> {
        self.0.connected.subscribe()
    }

    /// Tells of nodes to which the session has ended and that refuse connections since: whose process is gone, as far as
    /// can be seen from here.
    pub(in crate::raft) fn ended(&self) -> broadcast::Receiver<NodeId> {
        self.0.ended.subscribe()
    }

    /// Keeps a session with the node of a replica, so that its end is heard of.
    pub(in crate::raft) fn keep_up_with(&self, replica: ReplicaId) {
        if let Some(node) = self.0.map.node_of(replica).filter(|node| *node != self.node()) {
            // It fails only while this node stops.
            drop(self.link(node));
        }
    }

    /// The state of every link that was needed so far.
    pub fn links(&self) -> Vec<LinkReport> {
        let mut reports: Vec<_> = self
            .0
            .links
            .lock()
            .iter()
            .map(|(node, state)| {
                let state = state.borrow();
                let (up, reason, unanswered_bytes) = match &*state {
                    LinkState::Connecting => (false, Some("connecting".into()), 0),
                    LinkState::Up(session) => (true, None, session.unanswered_bytes()),
                    LinkState::Down(reason) => (false, Some(reason.to_string()), 0),
                };
                LinkReport {
                    node: *node,
                    up,
                    reason,
                    unanswered_bytes,
                }
            })
            .collect();
        reports.sort_by_key(|r| r.node);
        reports
    }

    /// The transfers of snapshots from this node that run.
    pub fn transfers(&self) -> Vec<SnapshotProgress> {
        let mut all = self.snapshots();
        all.retain(|snapshot| snapshot.way == SnapshotWay::Sent);
        all
    }

    /// The snapshots that travel from and to this node.
    pub fn snapshots(&self) -> Vec<SnapshotProgress> {
        self.0.transfers.all()
    }

    /// Ends every session and what serves them.
    pub async fn shutdown(&self, patience: Duration) {
        self.0.services.clear();
        for state in self.0.links.lock().values() {
            if let LinkState::Up(session) = &*state.borrow() {
                session.end("this node is stopping");
            }
        }
        if let Err(e) = self.0.tasks.drain(patience).await {
            tracing::warn!(error = %e, "tasks of the peers had to be aborted");
        }
    }

    /// The session to the node of a replica. Waits for one that is being made, up to `patience`; when the peer is down
    /// it says so at once.
    pub(super) async fn session(&self, replica: ReplicaId, patience: Duration) -> Result<Arc<Session>, String> {
        let Some(node) = self.0.map.node_of(replica) else {
            return Err(format!("it is not known which node hosts {replica}"));
        };
        self.session_with(node, patience).await
    }

    /// The session to a node, as [`session`](Self::session).
    pub(super) async fn session_with(&self, node: NodeId, patience: Duration) -> Result<Arc<Session>, String> {
        let mut state = self.link(node)?;
        let settled = state.wait_for(|s| !matches!(s, LinkState::Connecting));
        match tokio::time::timeout(patience, settled).await {
            Ok(Ok(state)) => match &*state {
                LinkState::Up(session) => Ok(session.clone()),
                LinkState::Down(reason) => Err(format!("node {node} is down: {reason}")),
                LinkState::Connecting => Err(format!("node {node} is not connected yet")),
            },
            Ok(Err(_)) => Err(format!("node {node} has left")),
            Err(_) => Err(format!("node {node} is not connected yet")),
        }
    }

    fn link(&self, node: NodeId) -> Result<watch::Receiver<LinkState>, String> {
        let mut links = self.0.links.lock();
        if let Some(state) = links.get(&node) {
            return Ok(state.subscribe());
        }
        if self.0.tasks.is_cancelled() {
            return Err("this node is stopping".into());
        }
        let state = watch::Sender::new(LinkState::Connecting);
        let receiver = state.subscribe();
        links.insert(node, state.clone());
        let inner = self.0.clone();
        self.0.tasks.spawn(format!("link-{node}"), async move {
            let token = inner.tasks.token();
            let end = token.run_until_cancelled(inner.keep(node, &state)).await;
            state.send_replace(LinkState::Down("this node is stopping".into()));
            if end.is_some() {
                inner.links.lock().remove(&node);
            }
        });
        Ok(receiver)
    }
}

impl PeersInner {
    /// Keeps a session to a node until the node is gone from the map.
    async fn keep(&self, node: NodeId, state: &watch::Sender<LinkState>) {
        let mut pause = self.config.reconnect_min;
        loop {
            let Some(address) = self.map.address(node) else {
                state.send_replace(LinkState::Down("its address is not known".into()));
                return;
            };
            let refused = match self.connect(node, &address).await {
                Ok((session, serving)) => {
                    tracing::info!(%node, address, "connected to a peer");
                    self.book.no_refusal(node, "calls");
                    state.send_replace(LinkState::Up(session.clone()));
                    self.connected.send_modify(|(n, last)| {
                        *n += 1;
                        *last = node;
                    });
                    let begun = Instant::now();
                    let _up = Up::new();
                    let reason = self.serve(node, &address, &session, serving).await;
                    session.end(reason.clone());
                    tracing::info!(%node, address, reason, "the session with a peer ended");
                    if self.refuses(&address).await {
                        // Nobody may be listening.
                        let _ = self.ended.send(node);
                    }
                    if begun.elapsed() >= GOOD_SESSION {
                        pause = self.config.reconnect_min;
                        state.send_replace(LinkState::Connecting);
                        continue;
                    }
                    state.send_replace(LinkState::Down(reason.into()));
                    false
                }
                Err(ConnectError::Refused(refusal)) => {
                    let text = refusal.to_string();
                    if self.book.is_news(node, "calls", &text) {
                        tracing::error!(%node, address, error = text, "a peer and this node do not speak");
                    }
                    state.send_replace(LinkState::Down(text.into()));
                    true
                }
                Err(ConnectError::Failed(text)) => {
                    if self.book.is_news(node, "calls", &text) {
                        tracing::warn!(%node, address, error = text, "a peer cannot be reached");
                    }
                    state.send_replace(LinkState::Down(text.into()));
                    false
                }
            };
            let wait = if refused { self.config.refused_retry } else { pause };
            pause = (pause * 2).min(self.config.reconnect_max);
            let jitter = rand::rng().random_range(0.0..0.5);
            let mut changes = self.map.watch();
            tokio::select! {
                () = tokio::time::sleep(wait.mul_f64(1.0 + jitter)) => {}
                () = address_changes(&self.map, &mut changes, node, &address) => {}
            }
        }
    }

    /// Passes answers on until the session ends; tells why.
    async fn serve(
        &self,
        node: NodeId,
        address: &str,
        session: &Session,
        mut inbound: tonic::Streaming<pb::PeerFrame>,
    ) -> String {
        let mut changes = self.map.watch();
        let moved = address_changes(&self.map, &mut changes, node, address);
        tokio::pin!(moved);
        loop {
            tokio::select! {
                frame = inbound.message() => match frame {
                    Ok(Some(frame)) => {
                        if let Err(what) = session.answers(frame) {
                            return format!("it does not keep to the protocol: {what}");
                        }
                    }
                    Ok(None) => return "it ended the session".into(),
                    Err(status) => return describe(&status),
                },
                () = &mut moved => return "its address changed".into(),
                () = session.ended().cancelled() => return session.reason(),
            }
        }
    }

    /// Whether nobody listens at an address any more. A process that is being killed may take a moment to let go of it.
    async fn refuses(&self, address: &str) -> bool {
        for pause in PROBES {
            tokio::time::sleep(pause).await;
            let attempt = tokio::time::timeout(self.config.connect_timeout, self.probe(address));
            match attempt.await {
                Ok(Err(e)) => return e.kind() == std::io::ErrorKind::ConnectionRefused,
                Ok(Ok(_)) => {}
                Err(_) => return false,
            }
        }
        false
    }

    async fn probe(&self, address: &str) -> std::io::Result<()> {
        match &self.config.dial {
            None => TcpStream::connect(address).await.map(drop),
            Some(dial) => dial.dial(address).await.map(drop),
        }
    }

    /// Connects without calling anything.
    pub async fn channel(&self, address: &str) -> Result<Channel, String> {
        let scheme = if self.config.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
            .map_err(|e| format!("{address:?} is no address: {e}"))?
            .connect_timeout(self.config.connect_timeout)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(self.config.keepalive_interval)
            .keep_alive_timeout(self.config.keepalive_timeout)
            .keep_alive_while_idle(true);
        if let Some(tls) = &self.config.tls {
            endpoint = endpoint.tls_config(tls.clone()).map_err(|e| error_chain(&e))?;
        }
        let connected = match self.config.dial.clone() {
            None => endpoint.connect().await,
            Some(dial) => {
                let address = address.to_owned();
                let connector = tower::service_fn(move |_| dial.dial(&address).map_ok(TokioIo::new));
                endpoint.connect_with_connector(connector).await
            }
        };
        connected.map_err(|e| error_chain(&e))
    }

    async fn connect(
        &self,
        node: NodeId,
        address: &str,
    ) -> Result<(Arc<Session>, tonic::Streaming<pb::PeerFrame>), ConnectError> {
        let patience = self.config.connect_timeout + self.config.handshake_timeout;
        match tokio::time::timeout(patience, self.shake_hands(node, address)).await {
            Ok(result) => result,
            Err(_) => Err(ConnectError::Failed(format!(
                "it did not answer the handshake within {patience:?}"
            ))),
        }
    }

    async fn shake_hands(
        &self,
        node: NodeId,
        address: &str,
    ) -> Result<(Arc<Session>, tonic::Streaming<pb::PeerFrame>), ConnectError> {
        let failed = |status: tonic::Status| ConnectError::Failed(describe(&status));
        let channel = self.channel(address).await.map_err(ConnectError::Failed)?;
        let mut client = PeerClient::new(channel)
            .max_decoding_message_size(FRAME_BYTES_LIMIT)
            .max_encoding_message_size(FRAME_BYTES_LIMIT);
        let (outbox, frames) = Outbox::new(self.config.frame_bytes_max);
        let gone = || ConnectError::Failed("the connection ended during the handshake".into());
        let (caller, first) = Caller::begin(&self.config, node);
        outbox.handshake(first).map_err(|_| gone())?;
        let mut inbound = client.session(frames).await.map_err(failed)?.into_inner();
        let welcome = inbound.message().await.map_err(failed)?.and_then(|f| f.handshake);
        let proof = match caller.welcome(&self.config, &self.book, welcome) {
            Ok((_, proof)) => proof,
            Err(refusal) => {
                // The other side learns why; it may be gone already.
                let _ = outbox.handshake(refused(&refusal));
                outbox.close();
                return Err(ConnectError::Refused(refusal));
            }
        };
        outbox.handshake(proof).map_err(|_| gone())?;
        let last = inbound.message().await.map_err(failed)?.and_then(|f| f.handshake);
        Caller::accepted(last).map_err(ConnectError::Refused)?;
        Ok((Session::new(node, &self.config, outbox), inbound))
    }
}

pub(super) enum ConnectError {
    Refused(Refusal),
    Failed(String),
}

/// Returns when the node's address is not this one any more.
async fn address_changes(map: &PeerMap, changes: &mut watch::Receiver<u64>, node: NodeId, address: &str) {
    while map.address(node).as_deref() == Some(address) {
        if changes.changed().await.is_err() {
            return std::future::pending().await;
        }
    }
}

/// A status as a reason.
pub(super) fn describe(status: &tonic::Status) -> String {
    use std::error::Error as _;
    match status.source() {
        Some(source) => {
            let (text, chain) = (status.message(), error_chain(source));
            if chain.starts_with(text) {
                chain
            } else {
                format!("{text}: {chain}")
            }
        }
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}
