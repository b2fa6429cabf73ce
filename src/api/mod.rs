//! The gRPC edge: turns requests into calls of the layers below, and their answers into frames. Admission happens
//! here: draining, session counts, memory, disk space.

mod admin;
mod cluster;
mod outgoing;
mod publish;
mod publish_session;
mod read;
mod read_session;
pub mod status;

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::Stream;
use tokio::sync::watch;

use crate::base::alarms::Alarms;
use crate::base::budget::ByteBudget;
use crate::base::metric_names::API_OPEN_SESSIONS;
use crate::base::tasks::Tasks;
use crate::broker::error::{ReadError, StreamError};
use crate::broker::{Broker, ShardAccess};
use crate::control::Control;
use crate::control::operations::Operations;
use crate::control::view::{ShardPlace, StreamView};
use crate::model::NodeId;
use crate::model::limits::GRPC_MESSAGE_BYTES_MAX;
use crate::wire::{internal as pb, v1};

use status::Refusal;

/// How long a session may take to send its first frame.
pub(crate) const OPEN_PATIENCE: Duration = Duration::from_secs(10);

/// Returns once the node is on its way down.
pub(crate) async fn drained(draining: &mut watch::Receiver<bool>) {
    // The sender lives as long as the node; an error means that it is gone already.
    let _ = draining.wait_for(|d| *d).await;
}

/// What `GetServerInfo` tells.
#[derive(Debug, Clone)]
pub struct ServerFacts {
    pub node_name: String,
    pub node_id: u64,
    pub incarnation: u64,
    pub started_us: u64,
}

/// What bounds the sessions and answers of a node.
pub struct Bounds {
    pub sessions_max: usize,
    /// Messages read for clients and not yet sent.
    pub read_memory: ByteBudget,
}

/// What every service needs.
pub struct Edge {
    pub broker: Arc<Broker>,
    pub control: Arc<Control>,
    pub operations: Arc<Operations>,
    pub alarms: Alarms,
    /// Sessions are tasks of this group; they end when it is drained.
    pub tasks: Tasks,
    /// True once the node is on its way down: clients are told to go away.
    pub draining: watch::Receiver<bool>,
    pub sessions_max: usize,
    /// Messages read for clients and not yet sent.
    pub read_memory: ByteBudget,
    pub facts: ServerFacts,
    sessions: Arc<AtomicUsize>,
}

/// What a session is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SessionKind {
    Publish,
    Read,
    Watch,
}

impl SessionKind {
    fn label(self) -> &'static str {
        match self {
            SessionKind::Publish => "publish",
            SessionKind::Read => "read",
            SessionKind::Watch => "watch",
        }
    }
}

/// A place among the open sessions; given back when dropped.
pub struct SessionPlace {
    sessions: Arc<AtomicUsize>,
    open: metrics::Gauge,
}

impl SessionPlace {
    #[cfg(test)]
    fn for_test() -> Self {
        Self {
            sessions: Arc::new(AtomicUsize::new(1)),
            open: metrics::Gauge::noop(),
        }
    }
}

impl Drop for SessionPlace {
    fn drop(&mut self) {
        self.sessions.fetch_sub(1, Ordering::AcqRel);
        self.open.decrement(1.0);
    }
}

/// The answers of a session, with its place: what a client has not taken of a session that has ended counts as one.
pub struct Placed<S> {
    answers: S,
    _place: SessionPlace,
}

impl<S: Stream + Unpin> Stream for Placed<S> {
    type Item = S::Item;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<S::Item>> {
        Pin::new(&mut self.answers).poll_next(cx)
    }
}

impl Edge {
    /// See the fields.
    pub fn new(
        broker: Arc<Broker>,
        operations: Arc<Operations>,
        alarms: Alarms,
        tasks: Tasks,
        draining: watch::Receiver<bool>,
        bounds: Bounds,
        facts: ServerFacts,
    ) -> Arc<Self> {
        Arc::new(Self {
            broker,
            control: operations.control().clone(),
            operations,
            alarms,
            tasks,
            draining,
            sessions_max: bounds.sessions_max,
            read_memory: bounds.read_memory,
            facts,
            sessions: Arc::default(),
        })
    }

    /// Refuses new work once the node is on its way down.
    fn accepting(&self) -> Result<(), Refusal> {
        if *self.draining.borrow() {
            return Err(Refusal::stopping());
        }
        Ok(())
    }

    /// A stream that can be used. That there is none is said only when this node has all of the catalog.
    async fn stream(&self, namespace: &str, name: &str) -> Result<Arc<StreamView>, Refusal> {
        match self.broker.stream(namespace, name) {
            Err(StreamError::NotFound { .. }) => self.control.catch_up().await?,
            found => return Ok(found?),
        }
        Ok(self.broker.stream(namespace, name)?)
    }

    /// As [`stream`](Self::stream), by a subject that it takes.
    async fn stream_by_subject(&self, namespace: &str, subject: &str) -> Result<Arc<StreamView>, Refusal> {
        match self.broker.stream_by_subject(namespace, subject) {
            Err(StreamError::NoStreamForSubject { .. }) => self.control.catch_up().await?,
            found => return Ok(found?),
        }
        Ok(self.broker.stream_by_subject(namespace, subject)?)
    }

    /// Every node that was not removed.
    fn nodes(&self) -> Vec<v1::ServerNode> {
        let nodes = self.broker.view().nodes().into_iter();
        nodes
            .filter(|node| node.state() != pb::NodeState::Removed)
            .map(|node| v1::ServerNode {
                node_id: node.node_id,
                name: node.name,
                client_address: node.client_address,
                zone: node.zone,
            })
            .collect()
    }

    /// Who leads a shard, and where that node takes clients; `None`: it is not known.
    fn leader_of(&self, place: &ShardPlace) -> Option<v1::ShardLeader> {
        let node = self.broker.leader_of(place.group)?;
        Some(v1::ShardLeader {
            shard: place.index,
            node_id: node.get(),
            address: self.broker.view().client_address(node)?,
        })
    }

    /// Who leads a shard, if that is another node.
    fn other_leader_of(&self, place: &ShardPlace) -> Option<v1::ShardLeader> {
        let node = self.broker.leader_of(place.group)?;
        if node.get() == self.facts.node_id {
            return None;
        }
        self.leader_of(place)
    }

    /// Where the other nodes take clients, those first that lead the most of these shards.
    fn other_addresses(&self, places: &[ShardPlace]) -> Vec<String> {
        let view = self.broker.view();
        let nodes = view.nodes().into_iter().filter(|node| {
            let present = node.state() != pb::NodeState::Removed && !node.client_address.is_empty();
            present && node.node_id != self.facts.node_id
        });
        let leaders: Vec<u64> = places
            .iter()
            .filter_map(|place| self.broker.leader_of(place.group))
            .map(NodeId::get)
            .collect();
        let mut nodes: Vec<_> = nodes.collect();
        nodes.sort_by_key(|node| std::cmp::Reverse(leaders.iter().filter(|id| **id == node.node_id).count()));
        nodes.into_iter().map(|node| node.client_address).collect()
    }

    /// How recent what is read of a shard is, for a local read.
    fn freshness(&self, access: &ShardAccess) -> Option<v1::Freshness> {
        let (node, fresh) = self.broker.freshness(access)?;
        Some(v1::Freshness {
            shard: access.place.index,
            node_id: node.get(),
            tail: access.positions().tail.get(),
            heard_ago_us: fresh
                .heard
                .map(|ago| u64::try_from(ago.as_micros()).unwrap_or(u64::MAX)),
            unapplied_entries: fresh.unapplied,
        })
    }

    fn open_session(&self, kind: SessionKind) -> Result<SessionPlace, Refusal> {
        self.accepting()?;
        let open = metrics::gauge!(API_OPEN_SESSIONS, "kind" => kind.label());
        open.increment(1.0);
        let before = self.sessions.fetch_add(1, Ordering::AcqRel);
        let place = SessionPlace {
            sessions: self.sessions.clone(),
            open,
        };
        if before >= self.sessions_max {
            return Err(ReadError::Overloaded { max: self.sessions_max }.into());
        }
        Ok(place)
    }
}

/// The services, with their message limits, to be added to a tonic server.
pub fn routes(edge: Arc<Edge>) -> tonic::service::Routes {
    let max = GRPC_MESSAGE_BYTES_MAX;
    tonic::service::Routes::new(
        v1::publish_service_server::PublishServiceServer::new(publish::Publish { edge: edge.clone() })
            .max_decoding_message_size(max)
            .max_encoding_message_size(max),
    )
    .add_service(
        v1::read_service_server::ReadServiceServer::new(read::Read { edge: edge.clone() })
            .max_decoding_message_size(max)
            .max_encoding_message_size(max),
    )
    .add_service(
        v1::stream_service_server::StreamServiceServer::new(admin::Streams { edge: edge.clone() })
            .max_decoding_message_size(max)
            .max_encoding_message_size(max),
    )
    .add_service(
        v1::cluster_service_server::ClusterServiceServer::new(cluster::Cluster { edge: edge.clone() })
            .max_decoding_message_size(max)
            .max_encoding_message_size(max),
    )
    .add_service(v1::server_service_server::ServerServiceServer::new(admin::Server {
        edge,
    }))
}
