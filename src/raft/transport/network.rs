//! openraft's network over the peers of this node.

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use openraft::base::{BoxFuture, BoxStream};
use openraft::errors::{RPCError, ReplicationClosed, StreamingError, Unreachable};
use openraft::impls::EmptyNode;
use openraft::network::{
    Backoff, NetBackoff, NetSnapshot, NetStreamAppend, NetTransferLeader, NetVote, RPCOption, RaftNetworkFactory,
};
use openraft::raft::{
    AppendEntriesRequest, SnapshotResponse, StreamAppendError, StreamAppendResult, TransferLeaderRequest,
    TransferLeaderResponse, VoteRequest, VoteResponse,
};
use openraft::{OptionalSend, Snapshot};
use rand::Rng as _;

use super::append::{append, unreachable};
use super::convert;
use super::link::Peers;
use super::session::Session;
use crate::model::{GroupId, ReplicaId};
use crate::raft::codec::{log_id_to_pb, vote_from_pb, vote_to_pb};
use crate::raft::purge::PurgeHold;
use crate::raft::snapshot::GroupSnapshot;
use crate::raft::types::{LeaderId, Mainstem, Vote};
use crate::wire::internal as pb;

type RpcError = RPCError<Mainstem>;
type CallResult = pb::call_answer::Result;

/// Pauses between attempts to reach a replica whose node is down. Ended early when its node is connected again.
const RETRY_MIN: Duration = Duration::from_millis(100);
const RETRY_MAX: Duration = Duration::from_secs(2);
/// The first pause, doubling, before a vote is asked for again that could not be given.
const INSIST_MIN: Duration = Duration::from_millis(2);

/// Makes the connections of one group. Without peers, every other replica is unreachable: a group with one voter never
/// asks.
#[derive(Debug, Clone)]
pub(in crate::raft) struct PeerNetwork {
    peers: Option<Peers>,
    group: GroupId,
    hold: Arc<PurgeHold>,
}

impl PeerNetwork {
    pub fn new(peers: Option<Peers>, group: GroupId, hold: Arc<PurgeHold>) -> Self {
        Self { peers, group, hold }
    }

    fn connection(&self, target: u64, heartbeats: bool) -> PeerConnection {
        PeerConnection {
            peers: self.peers.clone(),
            group: self.group,
            to: ReplicaId::new(target),
            heartbeats,
            hold: self.hold.clone(),
        }
    }
}

impl RaftNetworkFactory<Mainstem> for PeerNetwork {
    type Network = PeerConnection;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> PeerConnection {
        self.connection(target, false)
    }

    async fn new_heartbeat_client(&mut self, target: u64, _node: &EmptyNode) -> PeerConnection {
        self.connection(target, true)
    }
}

/// A group's way to one of its other replicas. Which node that is on is looked up at each use.
#[derive(Debug)]
pub(in crate::raft) struct PeerConnection {
    peers: Option<Peers>,
    pub(super) group: GroupId,
    pub(super) to: ReplicaId,
    /// What the group's log must keep.
    pub(super) hold: Arc<PurgeHold>,
    /// Its append streams have one request without entries each, and go ahead of bulk.
    heartbeats: bool,
}

impl PeerConnection {
    pub(super) fn peers(&self) -> Result<&Peers, String> {
        self.peers
            .as_ref()
            .ok_or_else(|| format!("replica {} is on another node, and this node has no peers", self.to))
    }

    async fn session(&self, option: &RPCOption) -> Result<Arc<Session>, RpcError> {
        let peers = self.peers().map_err(unreachable)?;
        peers.session(self.to, option.soft_ttl()).await.map_err(unreachable)
    }

    async fn call(
        &self,
        option: &RPCOption,
        make: impl Fn(u64) -> pb::peer_message::Kind,
    ) -> Result<CallResult, RpcError> {
        let work = async {
            let session = self.session(option).await?;
            session.call(&make).await.map_err(unreachable)
        };
        self.in_time(option, work).await
    }

    /// As [`call`](Self::call), made again while the other node says that it cannot be served: the replica of a group
    /// that is being formed may be about to start there.
    async fn insist(
        &self,
        option: &RPCOption,
        make: impl Fn(u64) -> pb::peer_message::Kind,
    ) -> Result<CallResult, RpcError> {
        let work = async {
            let mut pause = INSIST_MIN;
            loop {
                let session = self.session(option).await?;
                match session.call(&make).await.map_err(unreachable)? {
                    CallResult::Error(_) => tokio::time::sleep(pause).await,
                    answer @ (CallResult::Vote(_)
                    | CallResult::Heartbeat(_)
                    | CallResult::Transfer(_)
                    | CallResult::Service(_)) => return Ok(answer),
                }
                pause *= 2;
            }
        };
        self.in_time(option, work).await
    }

    async fn in_time(
        &self,
        option: &RPCOption,
        work: impl Future<Output = Result<CallResult, RpcError>>,
    ) -> Result<CallResult, RpcError> {
        match tokio::time::timeout(option.hard_ttl(), work).await {
            Ok(Ok(CallResult::Error(text))) => Err(unreachable(text)),
            Ok(result) => result,
            Err(_) => Err(unreachable(format!(
                "replica {} has not answered for {:?}",
                self.to,
                option.hard_ttl()
            ))),
        }
    }

    async fn vote_call(
        &self,
        rpc: VoteRequest<Mainstem>,
        option: &RPCOption,
        pre_vote: bool,
    ) -> Result<VoteResponse<Mainstem>, RpcError> {
        let answer = self
            .insist(option, |call| {
                pb::peer_message::Kind::Vote(pb::VoteCall {
                    call,
                    group_id: self.group.get(),
                    to_replica: self.to.get(),
                    vote: Some(vote_to_pb(&rpc.vote)),
                    last: rpc.last_log_id.as_ref().map(log_id_to_pb),
                    leadership_transfer: rpc.leadership_transfer,
                    pre_vote,
                })
            })
            .await?;
        match answer {
            CallResult::Vote(answer) => convert::vote_answer_from_pb(&answer).map_err(unreachable),
            CallResult::Heartbeat(_) | CallResult::Transfer(_) | CallResult::Service(_) | CallResult::Error(_) => {
                Err(wrong_answer())
            }
        }
    }

    async fn heartbeat(
        &self,
        rpc: AppendEntriesRequest<Mainstem>,
        option: &RPCOption,
    ) -> Result<StreamAppendResult<Mainstem>, RpcError> {
        let answer = self
            .call(option, |call| {
                pb::peer_message::Kind::Heartbeat(pb::Heartbeat {
                    call,
                    group_id: self.group.get(),
                    to_replica: self.to.get(),
                    vote: Some(vote_to_pb(&rpc.vote)),
                    prev: rpc.prev_log_id.as_ref().map(log_id_to_pb),
                    commit: rpc.leader_commit.as_ref().map(log_id_to_pb),
                })
            })
            .await?;
        let CallResult::Heartbeat(answer) = answer else {
            return Err(wrong_answer());
        };
        match (answer.result, rpc.prev_log_id) {
            (Some(pb::heartbeat_answer::Result::Success(_)), prev) => Ok(Ok(prev)),
            (Some(pb::heartbeat_answer::Result::HigherVote(vote)), _) => {
                Ok(Err(StreamAppendError::HigherVote(vote_from_pb(&vote))))
            }
            (Some(pb::heartbeat_answer::Result::Conflict(_)), Some(prev)) => Ok(Err(StreamAppendError::Conflict(prev))),
            // Before the first entry nothing can be in conflict.
            (Some(pb::heartbeat_answer::Result::Conflict(_)), None) | (None, _) => Err(wrong_answer()),
        }
    }
}

fn wrong_answer() -> RpcError {
    unreachable("an answer of another kind than the call")
}

impl NetBackoff<Mainstem> for PeerConnection {
    fn backoff(&self) -> Option<Backoff> {
        let mut pause = RETRY_MIN;
        Some(Backoff::new(std::iter::from_fn(move || {
            let jitter = rand::rng().random_range(0.75..1.25);
            let this = pause.mul_f64(jitter);
            pause = (pause * 2).min(RETRY_MAX);
            Some(this)
        })))
    }
}

impl NetStreamAppend<Mainstem> for PeerConnection {
    fn stream_append<'s, S>(
        &'s mut self,
        mut input: S,
        option: RPCOption,
    ) -> BoxFuture<'s, Result<BoxStream<'s, Result<StreamAppendResult<Mainstem>, RpcError>>, RpcError>>
    where
        S: futures_util::Stream<Item = AppendEntriesRequest<Mainstem>> + OptionalSend + Unpin + 'static,
    {
        Box::pin(async move {
            if self.heartbeats {
                let Some(request) = input.next().await else {
                    let none: BoxStream<'s, _> = Box::pin(futures_util::stream::empty());
                    return Ok(none);
                };
                let result = self.heartbeat(request, &option).await?;
                let one: BoxStream<'s, _> = Box::pin(futures_util::stream::iter([Ok(result)]));
                return Ok(one);
            }
            // The first request is taken before anything is looked for: openraft's pause after an error is within it.
            let begin = async move {
                let first = input.next().await?;
                let opened = match self.session(&option).await {
                    Ok(session) => session.open(self.group, self.to).map_err(unreachable),
                    Err(e) => Err(e),
                };
                Some(match opened {
                    Ok(stream) => append(stream, first, input).left_stream(),
                    Err(e) => futures_util::stream::iter([Err(e)]).right_stream(),
                })
            };
            let answers: BoxStream<'s, _> = Box::pin(
                futures_util::stream::once(begin)
                    .filter_map(std::future::ready)
                    .flatten(),
            );
            Ok(answers)
        })
    }
}

impl NetVote<Mainstem> for PeerConnection {
    async fn vote(
        &mut self,
        rpc: VoteRequest<Mainstem>,
        option: RPCOption,
    ) -> Result<VoteResponse<Mainstem>, RpcError> {
        self.vote_call(rpc, &option, false).await
    }

    async fn pre_vote(
        &mut self,
        rpc: VoteRequest<Mainstem>,
        option: RPCOption,
    ) -> Result<VoteResponse<Mainstem>, RpcError> {
        self.vote_call(rpc, &option, true).await
    }
}

impl NetTransferLeader<Mainstem> for PeerConnection {
    async fn transfer_leader(
        &mut self,
        req: TransferLeaderRequest<Mainstem>,
        option: RPCOption,
    ) -> Result<TransferLeaderResponse<Mainstem>, RpcError> {
        let answer = self
            .call(&option, |call| {
                pb::peer_message::Kind::Transfer(pb::TransferCall {
                    call,
                    group_id: self.group.get(),
                    to_replica: self.to.get(),
                    from_leader: Some(vote_to_pb(req.from_leader())),
                    to_leader: *req.to_node_id(),
                    last: req.last_log_id().map(log_id_to_pb),
                })
            })
            .await?;
        match answer {
            CallResult::Transfer(pb::TransferAnswer { rejected: None }) => Ok(Ok(())),
            CallResult::Transfer(pb::TransferAnswer { rejected: Some(text) }) => Err(unreachable(text)),
            CallResult::Vote(_) | CallResult::Heartbeat(_) | CallResult::Service(_) | CallResult::Error(_) => {
                Err(wrong_answer())
            }
        }
    }
}

impl NetSnapshot<Mainstem> for PeerConnection {
    type SnapshotData = GroupSnapshot;

    async fn full_snapshot(
        &mut self,
        vote: Vote,
        snapshot: Snapshot<LeaderId, u64, EmptyNode, GroupSnapshot>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<Mainstem>, StreamingError<Mainstem>> {
        tokio::select! {
            sent = self.send_snapshot(vote, snapshot) => match sent {
                Ok(vote) => Ok(SnapshotResponse::new(vote)),
                Err(text) => {
                    tracing::warn!(group = %self.group, replica = %self.to, error = text, "a snapshot was not transferred");
                    Err(StreamingError::Unreachable(Unreachable::from_string(text)))
                }
            },
            closed = cancel => Err(StreamingError::Closed(closed)),
        }
    }
}
