//! The member's side of joining.

use std::pin::Pin;
use std::sync::{Arc, Weak};

use futures_util::{Stream, stream};
use prost::Message;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::{Request, Response, Status, Streaming};

use super::proof::{self, Role, Said};
use super::{PROTOCOL, STEP_MAX};
use crate::control::{AdminError, Control, odd_answer};
use crate::machine::{MetaOutcome, MetaRefusal};
use crate::wire::internal as pb;
use pb::join_frame::Step;

/// Nodes that join at a time.
const JOINS_MAX: usize = 32;
/// A request is small.
const FRAME_BYTES_MAX: usize = 64 << 10;
/// Ids are tried again when another node took the one chosen.
const ATTEMPTS_MAX: usize = 16;

/// Lets nodes join. Clones are the same.
#[derive(Clone)]
pub struct JoinServer(Arc<Inner>);

struct Inner {
    control: Weak<Control>,
    cluster_id: String,
    cluster_name: String,
    token: Vec<u8>,
    places: Arc<Semaphore>,
}

/// Where an exchange is.
enum At {
    Hello,
    Request(pb::JoinHello, pb::JoinChallenge),
    Over,
}

struct Exchange {
    inner: Arc<Inner>,
    inbound: Streaming<pb::JoinFrame>,
    at: At,
    _place: OwnedSemaphorePermit,
}

fn refused(text: impl Into<String>, retry: bool) -> Step {
    Step::Refused(pb::JoinRefused {
        text: text.into(),
        retry,
    })
}

impl JoinServer {
    pub fn new(control: &Arc<Control>, cluster_id: String, cluster_name: String, token: Vec<u8>) -> Self {
        Self(Arc::new(Inner {
            control: Arc::downgrade(control),
            cluster_id,
            cluster_name,
            token,
            places: Arc::new(Semaphore::new(JOINS_MAX)),
        }))
    }

    /// To be added to the routes of the peer listener.
    pub fn service(&self) -> pb::joining_server::JoiningServer<JoinServer> {
        pb::joining_server::JoiningServer::new(self.clone()).max_decoding_message_size(FRAME_BYTES_MAX)
    }
}

#[tonic::async_trait]
impl pb::joining_server::Joining for JoinServer {
    type JoinStream = Pin<Box<dyn Stream<Item = Result<pb::JoinFrame, Status>> + Send>>;

    async fn join(&self, request: Request<Streaming<pb::JoinFrame>>) -> Result<Response<Self::JoinStream>, Status> {
        let place = self.0.places.clone().try_acquire_owned();
        let exchange = Exchange {
            inner: self.0.clone(),
            inbound: request.into_inner(),
            at: At::Hello,
            _place: place.map_err(|_| Status::resource_exhausted("as many nodes as allowed join now; try again"))?,
        };
        // Each frame that is asked for takes the exchange a step further.
        let frames = stream::unfold(exchange, |mut exchange| async move {
            let step = exchange.step().await?;
            Some((Ok(pb::JoinFrame { step: Some(step) }), exchange))
        });
        Ok(Response::new(Box::pin(frames)))
    }
}

impl Exchange {
    async fn step(&mut self) -> Option<Step> {
        let at = std::mem::replace(&mut self.at, At::Over);
        if matches!(at, At::Over) {
            return None;
        }
        let frame = tokio::time::timeout(STEP_MAX, self.inbound.message()).await.ok()?;
        match (at, frame.ok()??.step?) {
            (At::Hello, Step::Hello(hello)) => Some(self.hello(hello)),
            (At::Request(hello, challenge), Step::Request(request)) => {
                Some(self.inner.request(&hello, &challenge, &request).await)
            }
            (_, Step::Refused(theirs)) => {
                let text: String = theirs.text.chars().take(500).collect();
                tracing::warn!(text, "a node that wanted to join has left");
                None
            }
            (
                At::Hello | At::Request(..) | At::Over,
                Step::Hello(_) | Step::Challenge(_) | Step::Request(_) | Step::Answer(_),
            ) => Some(refused("that is not a step of joining", false)),
        }
    }

    fn hello(&mut self, hello: pb::JoinHello) -> Step {
        let inner = &self.inner;
        if hello.protocol != PROTOCOL || hello.nonce.len() != proof::NONCE_BYTES || hello.store_id.len() != 16 {
            return refused(
                format!(
                    "this node speaks version {PROTOCOL} of joining, the one that asks version {}: upgrade the older one \
                     first",
                    hello.protocol
                ),
                false,
            );
        }
        if hello.cluster_name != inner.cluster_name {
            let given: String = hello.cluster_name.chars().take(100).collect();
            return refused(
                format!(
                    "this is a node of cluster {:?}, not of {given:?}: correct --join or --cluster-name",
                    inner.cluster_name
                ),
                false,
            );
        }
        let mut challenge = pb::JoinChallenge {
            cluster_id: inner.cluster_id.clone(),
            nonce: proof::nonce(),
            proof: bytes::Bytes::new(),
        };
        let said = Said {
            hello: &hello,
            challenge: &challenge,
            node: b"",
            accepted: b"",
        };
        challenge.proof = proof::prove(&inner.token, Role::Challenge, said);
        self.at = At::Request(hello, challenge.clone());
        Step::Challenge(challenge)
    }
}

impl Inner {
    async fn request(&self, hello: &pb::JoinHello, challenge: &pb::JoinChallenge, request: &pb::JoinRequest) -> Step {
        let said = Said {
            hello,
            challenge,
            node: &request.node,
            accepted: b"",
        };
        if !proof::holds(&self.token, Role::Request, said, &request.proof) {
            tracing::warn!("a node that wanted to join holds another token");
            return refused(
                "the tokens differ: all nodes of a cluster have the same; give this node the cluster's with --token-file",
                false,
            );
        }
        let Ok(node) = pb::JoinNode::decode(request.node.clone()) else {
            return refused("what the node tells of itself cannot be read", false);
        };
        if node.store_id != hex(&hello.store_id) {
            return refused("the node tells two store ids", false);
        }
        let Some(control) = self.control.upgrade() else {
            return refused("the node asked is stopping", true);
        };
        let former = (node.former_node_id, node.former_store_id.clone());
        let admitted = async {
            control.give_up(former.0, &former.1, &node.store_id).await?;
            control.let_in(node).await
        };
        match admitted.await {
            Ok(accepted) => {
                let accepted = accepted.encode_to_vec();
                let said = Said {
                    accepted: &accepted,
                    ..said
                };
                Step::Answer(pb::JoinAnswer {
                    proof: proof::prove(&self.token, Role::Answer, said),
                    accepted: accepted.into(),
                })
            }
            // Other nodes may come back.
            Err(AdminError::Refused(
                refusal @ (MetaRefusal::WouldBreakQuorum { .. } | MetaRefusal::InFlight { .. }),
            )) => refused(
                format!(
                    "what its former self held cannot be given up while {refusal}; start the nodes that are missing, if any are. If that \
                     data is the only copy, restore it from a backup, or give it up: mainstem node remove n{} --force \
                     --accept-loss",
                    former.0
                ),
                true,
            ),
            Err(AdminError::Refused(refusal)) => refused(refusal.to_string(), false),
            Err(error) => refused(error.to_string(), true),
        }
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Control {
    /// Removes what a node was until its data was found damaged: its replicas must not vote again, and others take their
    /// place. As with any removal, no group may lose its quorum by it.
    async fn give_up(&self, node_id: u64, store_id: &str, successor: &str) -> Result<(), AdminError> {
        if node_id == 0 {
            return Ok(());
        }
        self.barrier().await?;
        let nodes = self.view.nodes();
        let known = nodes
            .iter()
            .find(|node| node.node_id == node_id && node.store_id == store_id);
        let Some(former) = known.filter(|node| node.state() != pb::NodeState::Removed) else {
            return Ok(());
        };
        if successor == store_id {
            return Err(AdminError::NotReady("a store cannot succeed itself".into()));
        }
        let links = self.peers.as_ref().map(|peers| peers.links()).unwrap_or_default();
        let down = links.iter().filter(|link| !link.up).map(|link| link.node.get());
        let remove = pb::RemoveNode {
            node_id,
            force: true,
            accept_loss: false,
            unreachable_nodes: down.collect(),
            // Told by the meta group's leader.
            weak_groups: Vec::new(),
        };
        let op = pb::meta_command::Op::RemoveNode(remove);
        let outcome = self.propose_meta(String::new(), op).await?;
        if let MetaOutcome::Refused(refused) = outcome {
            return Err(AdminError::Refused(refused));
        }
        if !matches!(outcome, MetaOutcome::NodeChanged(_)) {
            return Err(odd_answer());
        }
        tracing::warn!(
            node = former.name,
            "a node has found its data damaged: what it held is made anew from the others, and it joins as a new node"
        );
        Ok(())
    }

    /// Enters a node into the catalog: under the id that its store has already, or a new one.
    async fn let_in(&self, mut join: pb::JoinNode) -> Result<pb::JoinAccepted, AdminError> {
        let mut refusal = None;
        for _ in 0..ATTEMPTS_MAX {
            self.barrier().await?;
            let nodes = self.view.nodes();
            let own = nodes.iter().find(|node| node.store_id == join.store_id);
            let highest = nodes.iter().map(|node| node.node_id).max().unwrap_or(0);
            join.node_id = own.map_or(highest + 1, |node| node.node_id);
            let op = pb::meta_command::Op::JoinNode(join.clone());
            let outcome = self.propose_meta(String::new(), op).await?;
            if let MetaOutcome::NodeRegistered { node, .. } = outcome {
                return Ok(self.accepted(&node));
            }
            let MetaOutcome::Refused(refused) = outcome else {
                return Err(odd_answer());
            };
            // Another node was given the id in the meantime, or this one was entered through another member.
            if !matches!(refused, MetaRefusal::OtherStore { .. } | MetaRefusal::StoreTaken { .. }) {
                return Err(AdminError::Refused(refused));
            }
            refusal = Some(refused);
        }
        Err(refusal.map_or_else(odd_answer, AdminError::Refused))
    }

    fn accepted(&self, node: &pb::NodeRecord) -> pb::JoinAccepted {
        let peers = self
            .view
            .nodes()
            .into_iter()
            .filter(|other| other.node_id != node.node_id && other.state() != pb::NodeState::Removed)
            .map(|other| pb::JoinPeer {
                node_id: other.node_id,
                peer_address: other.peer_address,
                meta_replica_id: other.meta_replica_id,
            });
        pb::JoinAccepted {
            cluster_id: self
                .view
                .cluster()
                .map(|cluster| cluster.cluster_id)
                .unwrap_or_default(),
            node_id: node.node_id,
            meta_replica_id: node.meta_replica_id,
            peers: peers.collect(),
        }
    }
}
