//! The way to the meta group: proposals and barriers go to its leader, wherever that is; and the leader's side of it.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use prost::Message;

use super::encode::{outcome_from_pb, outcome_to_pb};
use super::{AdminError, Control, odd_answer};
use crate::base::RetryClass;
use crate::machine::{GroupOutcome, MetaOutcome};
use crate::model::{GroupId, LogIndex, NodeId};
use crate::raft::transport::{CallError, CallFailure, PeerMethod, PeerService, Peers};
use crate::raft::{Applied, BarrierError, ProposeError};
use crate::wire::internal as pb;

/// How long a call waits for a leader to be elected before it says that there is none.
const LEADER: Duration = Duration::from_millis(1_500);
/// Between two looks for a leader.
const AGAIN: Duration = Duration::from_millis(30);
/// A leader that no quorum has answered for so long takes nothing.
pub(super) const QUORUM_AGE: Duration = Duration::from_millis(1_000);
/// How long another node may take with a proposal.
const PROPOSE: Duration = Duration::from_secs(5);
/// How long a proposal that may have been made is made again, where its request id tells a repetition.
const REPEAT: Duration = Duration::from_secs(8);
/// How long this node's copy may be behind the leader's before its answer is given all the same.
const CATCH_UP: Duration = Duration::from_secs(3);

/// Who can be asked.
enum Leader {
    Here,
    At(NodeId),
    Nobody,
}

impl Control {
    /// Has a command applied by the meta group, wherever its leader is; when this returns, this node's view has it (or is
    /// well behind). Time and unreachable nodes are the leader's to fill in.
    pub(super) async fn propose_meta(
        &self,
        request_id: String,
        op: pb::meta_command::Op,
    ) -> Result<MetaOutcome, AdminError> {
        let mut command = pb::MetaCommand {
            time_us: 0,
            request_id,
            op: Some(op),
        };
        if self.peers.is_none() {
            return Ok(self.propose_here(command).await?.1);
        }
        let repeats = make_repeatable(&mut command);
        let (begun, mut may_have_happened) = (Instant::now(), false);
        loop {
            let error = match self.propose_once(&command).await {
                Ok(outcome) => return Ok(outcome),
                Err(error) => error,
            };
            let patience = match error.retry_class() {
                RetryClass::CannotWork => return Err(error),
                RetryClass::MayHaveHappened => {
                    may_have_happened = true;
                    if repeats { REPEAT } else { Duration::ZERO }
                }
                RetryClass::DidNotHappen => LEADER,
            };
            if begun.elapsed() >= patience {
                return Err(match may_have_happened {
                    true => AdminError::Propose(ProposeError::Unknown { group: GroupId::META }),
                    false => self.without_quorum(error),
                });
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn propose_once(&self, command: &pb::MetaCommand) -> Result<MetaOutcome, AdminError> {
        match self.meta_leader()? {
            Leader::Here => Ok(self.propose_here(command.clone()).await?.1),
            Leader::Nobody => Err(AdminError::NoQuorum("its group has no leader".into())),
            Leader::At(node) => {
                let proposal = pb::MetaProposal {
                    command: Some(command.clone()),
                };
                let answer = self
                    .call(node, PeerMethod::MetaPropose, proposal.encode_to_vec(), PROPOSE)
                    .await?;
                let unreadable = || AdminError::Peer {
                    message: format!("node {node} answered a proposal in a way that this version does not know"),
                    retry: RetryClass::MayHaveHappened,
                };
                let answer = pb::MetaAnswer::decode(answer).map_err(|_| unreadable())?;
                let outcome = answer.result.and_then(outcome_from_pb).ok_or_else(unreadable)?;
                let index = LogIndex::new(answer.index);
                if !self.meta()?.wait_applied(index, CATCH_UP).await {
                    tracing::warn!(%index, "this node's copy of the catalog is behind");
                }
                Ok(outcome)
            }
        }
    }

    async fn call(
        &self,
        node: NodeId,
        method: PeerMethod,
        payload: Vec<u8>,
        patience: Duration,
    ) -> Result<Bytes, AdminError> {
        let Some(peers) = &self.peers else {
            return Err(AdminError::NotReady("this node has no peers".into()));
        };
        let called = peers.call(node, method, payload.into(), patience).await;
        called.map_err(|CallError { message, retry, .. }| AdminError::Peer { message, retry })
    }

    fn meta_leader(&self) -> Result<Leader, AdminError> {
        let status = self.meta()?.status();
        if status.is_leader {
            return Ok(Leader::Here);
        }
        let known = status.leader.and_then(|leader| {
            let hinted = || self.peers.as_ref().and_then(|peers| peers.map().node_of(leader));
            self.view.meta_node(leader).or_else(hinted)
        });
        Ok(known
            .filter(|node| *node != self.facts.node)
            .map_or(Leader::Nobody, Leader::At))
    }

    /// Whether this node speaks for the meta group; one without peers always does.
    pub(super) fn leads_meta(&self) -> bool {
        let meta = self.groups.get(GroupId::META);
        self.peers.is_none() || meta.is_some_and(|meta| meta.leads_quorum(QUORUM_AGE))
    }

    /// Whether this node hears the meta group's leader, and has applied everything that it has been sent.
    pub(super) fn hears_meta(&self) -> bool {
        let status = self.groups.get(GroupId::META).map(|meta| meta.status());
        status.is_some_and(|status| status.leader.is_some() && status.last_applied == status.last_log)
    }

    /// What to say when no leader was found in time.
    fn without_quorum(&self, error: AdminError) -> AdminError {
        let (Some(peers), Some(cluster)) = (&self.peers, self.view.cluster()) else {
            return error;
        };
        let voters = cluster.meta.unwrap_or_default().voters;
        let up: Vec<NodeId> = peers
            .links()
            .into_iter()
            .filter(|link| link.up)
            .map(|link| link.node)
            .collect();
        let reached = self
            .view
            .nodes()
            .into_iter()
            .filter(|node| voters.contains(&node.meta_replica_id))
            .filter(|node| node.node_id == self.facts.node.get() || up.contains(&NodeId::new(node.node_id)))
            .count();
        AdminError::NoQuorum(format!(
            "this node reaches {reached} of its {} voters, {} are needed ({error})",
            voters.len(),
            voters.len() / 2 + 1
        ))
    }

    /// Proposes on this node, which must lead.
    async fn propose_here(&self, mut command: pb::MetaCommand) -> Result<(LogIndex, MetaOutcome), AdminError> {
        let group = self.meta()?;
        command.time_us = self.clock.now_us();
        if self.peers.is_some() {
            self.stamp(&mut command);
            if group.status().is_leader && !group.leads_quorum(QUORUM_AGE) {
                return Err(AdminError::NoQuorum("a majority of its voters does not answer".into()));
            }
        }
        let command = pb::GroupCommand {
            feature_level: self.view.feature_level(),
            op: Some(pb::group_command::Op::Meta(command)),
        };
        let mut pending = group.propose(command.encode_to_vec().into()).await?;
        let (index, _, applied) = if self.peers.is_some() {
            let mut looks = tokio::time::interval(Duration::from_millis(100));
            loop {
                tokio::select! {
                    answer = pending.wait() => break answer?,
                    _ = looks.tick() => {
                        // Its entry stays in the log: whoever leads next may commit it.
                        if group.status().is_leader && !group.leads_quorum(LEADER) {
                            return Err(AdminError::Propose(ProposeError::Unknown { group: GroupId::META }));
                        }
                    }
                }
            }
        } else {
            pending.wait().await?
        };
        match applied {
            Applied::Command(GroupOutcome::Meta(outcome)) => Ok((index, outcome)),
            Applied::Command(_) | Applied::Done => Err(odd_answer()),
        }
    }

    /// What the proposer knows and the log does not: which nodes cannot be reached.
    fn stamp(&self, command: &mut pb::MetaCommand) {
        use pb::meta_command::Op;
        match &mut command.op {
            Some(Op::CreateStream(create)) => create.unreachable_nodes = self.unreachable_nodes(),
            Some(Op::UpdateStream(update)) => update.unreachable_nodes = self.unreachable_nodes(),
            Some(Op::RemoveNode(remove)) => {
                remove.unreachable_nodes = self.unreachable_nodes();
                remove.weak_groups = self.weak_without(NodeId::new(remove.node_id));
            }
            Some(_) | None => {}
        }
    }

    /// Afterwards this node's view has everything that was committed before the call.
    pub(super) async fn barrier(&self) -> Result<(), AdminError> {
        if self.peers.is_none() {
            let barrier = self.meta()?.read_barrier().await;
            return barrier.map_err(|e| AdminError::NotReady(e.to_string()));
        }
        let begun = Instant::now();
        loop {
            let error = match self.barrier_once().await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            // It changes nothing: whatever happened, it may be asked again.
            if begun.elapsed() >= LEADER {
                return Err(self.without_quorum(error));
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn barrier_once(&self) -> Result<(), AdminError> {
        let index = match self.meta_leader()? {
            Leader::Here => return self.barrier_here().await.map(drop),
            Leader::Nobody => return Err(AdminError::NoQuorum("its group has no leader".into())),
            Leader::At(node) => {
                let asked = pb::MetaBarrier {}.encode_to_vec();
                let answer = self.call(node, PeerMethod::MetaBarrier, asked, LEADER).await?;
                let done = pb::MetaBarrierDone::decode(answer).map_err(|_| odd_answer())?;
                LogIndex::new(done.index)
            }
        };
        match self.meta()?.wait_applied(index, CATCH_UP).await {
            true => Ok(()),
            false => Err(AdminError::NotReady(
                "its copy of the catalog is behind the leader's".into(),
            )),
        }
    }

    /// On the leader: the index up to which everything is.
    async fn barrier_here(&self) -> Result<LogIndex, AdminError> {
        let group = self.meta()?;
        let barrier = tokio::time::timeout(LEADER, group.read_barrier()).await;
        match barrier {
            Err(_) => Err(AdminError::NoQuorum("a majority of its voters does not answer".into())),
            Ok(Err(e @ (BarrierError::NoQuorum { .. } | BarrierError::NotLeader { .. }))) => {
                Err(AdminError::NoQuorum(e.to_string()))
            }
            Ok(Err(e @ BarrierError::Stopped { .. })) => Err(AdminError::NotReady(e.to_string())),
            Ok(Ok(())) => Ok(group.status().last_applied.unwrap_or_default()),
        }
    }
}

/// Gives a command that would do something twice an id by which its repetition is known. False: it has none, and is not to
/// be repeated here.
fn make_repeatable(command: &mut pb::MetaCommand) -> bool {
    use pb::meta_command::Op;
    let by_people = matches!(
        command.op,
        Some(
            Op::CreateStream(_)
                | Op::UpdateStream(_)
                | Op::RemoveStream(_)
                | Op::UndeleteStream(_)
                | Op::DrainNode(_)
                | Op::UndrainNode(_)
                | Op::RemoveNode(_)
                | Op::UpdateSettings(_)
        )
    );
    if command.request_id.is_empty() && by_people {
        command.request_id = uuid::Uuid::now_v7().simple().to_string();
    }
    !command.request_id.is_empty()
}

/// Lets peers propose through this node, and hear of it.
pub(super) fn serve(control: &Arc<Control>, peers: &Peers) {
    let methods = [PeerMethod::MetaPropose, PeerMethod::MetaBarrier, PeerMethod::NodePing];
    peers.serve_calls(methods, Arc::new(Service(Arc::downgrade(control))));
}

struct Service(Weak<Control>);

impl PeerService for Service {
    fn call(
        &self,
        _from: NodeId,
        method: PeerMethod,
        payload: Bytes,
    ) -> BoxFuture<'static, Result<Bytes, CallFailure>> {
        let control = self.0.upgrade();
        async move {
            let Some(control) = control else {
                return Err(CallFailure {
                    message: "the node is stopping".into(),
                    retry: RetryClass::DidNotHappen,
                });
            };
            control.serve(method, payload).await.map_err(|error| CallFailure {
                retry: error.retry_class(),
                message: error.to_string(),
            })
        }
        .boxed()
    }
}

impl Control {
    async fn serve(&self, method: PeerMethod, payload: Bytes) -> Result<Bytes, AdminError> {
        let unreadable = |e: prost::DecodeError| AdminError::Invalid(format!("the call cannot be read: {e}"));
        let answer = match method {
            PeerMethod::MetaPropose => {
                let proposal = pb::MetaProposal::decode(payload).map_err(unreadable)?;
                let command = proposal.command.ok_or_else(odd_answer)?;
                // No further: whoever asked looks for the leader itself.
                let (index, outcome) = self.propose_here(command).await?;
                let answer = pb::MetaAnswer {
                    index: index.get(),
                    result: Some(outcome_to_pb(&outcome)),
                };
                answer.encode_to_vec()
            }
            PeerMethod::MetaBarrier => {
                let index = self.barrier_here().await?.get();
                pb::MetaBarrierDone { index }.encode_to_vec()
            }
            PeerMethod::NodePing => {
                let ping = pb::NodePing::decode(payload).map_err(unreadable)?;
                self.pong(&ping).await.encode_to_vec()
            }
            PeerMethod::Unspecified
            | PeerMethod::NodeReport
            | PeerMethod::GroupAdmin
            | PeerMethod::Publish
            | PeerMethod::Positions
            | PeerMethod::Fetch
            | PeerMethod::Barrier
            | PeerMethod::Lookup
            | PeerMethod::Purge => return Err(AdminError::Invalid("it is a call of another service".into())),
        };
        Ok(answer.into())
    }
}
