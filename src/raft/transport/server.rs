//! The called side: a gRPC service for the peer listener.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::Arc;

use futures_util::{Stream, StreamExt};
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status, Streaming};

use super::book::KnownPeer;
use super::dispatch::{Dispatch, Replicas};
use super::handshake::{Called, Refusal, refused};
use super::link::{FRAME_BYTES_LIMIT, Peers, PeersInner, describe};
use super::outbox::Outbox;
use crate::model::{GroupId, NodeId};
use crate::raft::Groups;
use crate::wire::internal as pb;

/// The peer service of a node. Clones are the same.
#[derive(Clone)]
pub struct PeerServer(pub(super) Arc<ServerInner>);

pub(super) struct ServerInner {
    pub peers: Arc<PeersInner>,
    pub groups: Arc<Groups>,
    sessions: Arc<Semaphore>,
    pub transfers: Arc<Semaphore>,
    /// The groups for which a snapshot is being received.
    pub receiving: Mutex<HashSet<GroupId>>,
}

impl PeerServer {
    /// Lets the peers reach the replicas of `groups`.
    pub fn new(peers: &Peers, groups: &Arc<Groups>) -> Self {
        let config = &peers.0.config;
        Self(Arc::new(ServerInner {
            groups: groups.clone(),
            sessions: Arc::new(Semaphore::new(config.sessions_max.min(Semaphore::MAX_PERMITS))),
            transfers: Arc::new(Semaphore::new(
                config.snapshots_received_max.min(Semaphore::MAX_PERMITS),
            )),
            receiving: Mutex::default(),
            peers: peers.0.clone(),
        }))
    }

    /// To be added to the routes of the peer listener.
    pub fn service(&self) -> pb::peer_server::PeerServer<PeerServer> {
        pb::peer_server::PeerServer::new(self.clone())
            .max_decoding_message_size(FRAME_BYTES_LIMIT)
            .max_encoding_message_size(FRAME_BYTES_LIMIT)
    }

    /// A server with the windows and timeouts that peers expect of each other; TLS is the caller's.
    pub fn tuned(&self) -> tonic::transport::Server {
        let config = &self.0.peers.config;
        tonic::transport::Server::builder()
            .tcp_nodelay(true)
            .initial_stream_window_size(4 << 20)
            .initial_connection_window_size(8 << 20)
            .max_frame_size(1 << 20)
            .http2_keepalive_interval(Some(config.keepalive_interval))
            .http2_keepalive_timeout(Some(config.keepalive_timeout))
    }

    fn permit(&self) -> Result<OwnedSemaphorePermit, Status> {
        self.0
            .sessions
            .clone()
            .try_acquire_owned()
            .map_err(|_| Status::resource_exhausted(Refusal::Busy.to_string()))
    }
}

type FrameStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl pb::peer_server::Peer for PeerServer {
    type SessionStream = FrameStream<pb::PeerFrame>;
    type SnapshotStream = FrameStream<pb::SnapshotFrame>;

    async fn session(
        &self,
        request: Request<Streaming<pb::PeerFrame>>,
    ) -> Result<Response<Self::SessionStream>, Status> {
        let permit = self.permit()?;
        let (outbox, frames) = Outbox::new(self.0.peers.config.frame_bytes_max);
        let inbound = request.into_inner();
        let inner = self.0.clone();
        self.0.peers.tasks.spawn("session", async move {
            let _permit = permit;
            let token = inner.peers.tasks.token();
            token.run_until_cancelled(inner.serve(inbound, &outbox)).await;
            outbox.close();
        });
        Ok(Response::new(Box::pin(frames.map(Ok))))
    }

    async fn snapshot(
        &self,
        request: Request<Streaming<pb::SnapshotFrame>>,
    ) -> Result<Response<Self::SnapshotStream>, Status> {
        let permit = self.permit()?;
        let answers = self.receive_snapshot(request.into_inner(), permit);
        Ok(Response::new(Box::pin(answers)))
    }
}

impl ServerInner {
    async fn serve(&self, mut inbound: Streaming<pb::PeerFrame>, outbox: &Outbox) {
        let config = &self.peers.config;
        let hands = self.shake_hands(&mut inbound, outbox);
        let peer = match tokio::time::timeout(config.handshake_timeout, hands).await {
            Ok(Some(peer)) => peer,
            Ok(None) | Err(_) => return,
        };
        tracing::debug!(node = %peer.node, incarnation = peer.incarnation, "a peer opened a session");
        let reason = self.dispatch(peer, &mut inbound, outbox).await;
        tracing::debug!(node = %peer.node, reason, "the session of a peer ended");
    }

    async fn dispatch(&self, peer: KnownPeer, inbound: &mut Streaming<pb::PeerFrame>, outbox: &Outbox) -> String {
        let replicas: Arc<dyn Replicas> = self.groups.clone();
        let mut dispatch = Dispatch::new(peer.node, replicas, self.peers.services.clone(), outbox.clone());
        loop {
            tokio::select! {
                frame = inbound.message() => match frame {
                    Ok(Some(frame)) => {
                        if !self.peers.book.is_current(peer) {
                            return "a later start of this node was seen".into();
                        }
                        if let Err(what) = dispatch.requests(frame) {
                            tracing::warn!(node = %peer.node, what, "a peer does not keep to the protocol");
                            return what.into();
                        }
                    }
                    Ok(None) => return "it ended the session".into(),
                    Err(status) => return describe(&status),
                },
                () = dispatch.answer() => return "it reads no answers".into(),
            }
        }
    }

    async fn shake_hands(&self, inbound: &mut Streaming<pb::PeerFrame>, outbox: &Outbox) -> Option<KnownPeer> {
        let mut node = None;
        let result = async {
            let config = &self.peers.config;
            let first = inbound.message().await.ok().flatten().and_then(|f| f.handshake);
            let (called, welcome) = Called::hello(config, first)?;
            node = Some(called.node());
            let gone = |_| Refusal::Malformed("the connection ended");
            outbox.handshake(welcome).map_err(gone)?;
            let answer = inbound.message().await.ok().flatten().and_then(|f| f.handshake);
            let (peer, accepted) = called.proof(config, &self.peers.book, answer)?;
            outbox.handshake(accepted).map_err(gone)?;
            Ok(peer)
        };
        match result.await {
            Ok(peer) => {
                self.peers.book.no_refusal(peer.node, "called");
                Some(peer)
            }
            Err(refusal) => {
                self.refuse(node, &refusal);
                // It may be gone already.
                let _ = outbox.handshake(refused(&refusal));
                None
            }
        }
    }

    /// Logs a refusal, once.
    pub fn refuse(&self, node: Option<NodeId>, refusal: &Refusal) {
        let text = refusal.to_string();
        if self.peers.book.is_news(node.unwrap_or(NodeId::new(0)), "called", &text) {
            tracing::error!(error = text, "refused a peer");
        }
    }
}
