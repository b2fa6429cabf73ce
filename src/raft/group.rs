//! One replica of one Raft group: the handle that the layers above hold.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use openraft::errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError};
use openraft::impls::{EmptyNode, ProgressResponder};
use openraft::raft::ClientWriteResult;
use openraft::{Config, Raft, ReadPolicy, SnapshotPolicy};

use super::log_store::GroupLog;
use super::network::NoPeers;
use super::state_machine::GroupMachine;
use super::types::{Applied, Mainstem, Proposal};
use crate::base::RetryClass;
use crate::base::metric_names as names;
use crate::model::{GroupId, LogIndex, ReplicaId, Term};

/// Why a proposal has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ProposeError {
    /// This replica does not lead. Nothing was proposed.
    #[error("this replica of {group} does not lead it{}", leader.map(|l| format!("; replica {l} does")).unwrap_or_default())]
    NotLeader { group: GroupId, leader: Option<ReplicaId> },
    /// The group has stopped before the proposal entered its log.
    #[error("{group} has stopped: {reason}")]
    Stopped { group: GroupId, reason: String },
    /// The group stopped, or leadership was lost, while the proposal was under way.
    #[error("{group} stopped while the proposal was under way")]
    Unknown { group: GroupId },
}

impl ProposeError {
    /// Whether the proposal could have taken effect.
    pub fn retry_class(&self) -> RetryClass {
        match self {
            ProposeError::NotLeader { .. } | ProposeError::Stopped { .. } => RetryClass::DidNotHappen,
            ProposeError::Unknown { .. } => RetryClass::MayHaveHappened,
        }
    }
}

/// Why a linearizable read cannot be served here.
#[derive(Debug, Clone, thiserror::Error)]
pub enum BarrierError {
    #[error("this replica of {group} does not lead it{}", leader.map(|l| format!("; replica {l} does")).unwrap_or_default())]
    NotLeader { group: GroupId, leader: Option<ReplicaId> },
    #[error("{group} has no quorum: {reason}")]
    NoQuorum { group: GroupId, reason: String },
    #[error("{group} has stopped: {reason}")]
    Stopped { group: GroupId, reason: String },
}

type Receiver = openraft::alias::OneshotReceiverOf<Mainstem, ClientWriteResult<Mainstem>>;

/// A proposal that is in the log's queue and not yet applied.
pub struct Pending {
    group: GroupId,
    answer: Receiver,
}

impl Pending {
    /// Waits until the entry is applied. May be cancelled and called again, but not after it has returned.
    pub async fn wait(&mut self) -> Result<(LogIndex, Term, Applied), ProposeError> {
        let group = self.group;
        match (&mut self.answer).await {
            Ok(Ok(response)) => Ok((
                LogIndex::new(response.log_id.index),
                Term::new(response.log_id.leader_id.term),
                response.data,
            )),
            Ok(Err(ClientWriteError::ForwardToLeader(forward))) => Err(ProposeError::NotLeader {
                group,
                leader: forward.leader_id.map(ReplicaId::new),
            }),
            Ok(Err(other)) => Err(ProposeError::Stopped {
                group,
                reason: other.to_string(),
            }),
            Err(_) => Err(ProposeError::Unknown { group }),
        }
    }
}

/// What a group says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupStatus {
    pub term: Term,
    pub leader: Option<ReplicaId>,
    pub is_leader: bool,
    pub last_applied: Option<LogIndex>,
    pub last_log: Option<LogIndex>,
}

/// A running replica.
#[derive(Clone)]
pub struct Group {
    pub id: GroupId,
    pub replica: ReplicaId,
    raft: Raft<Mainstem, GroupMachine>,
    log: GroupLog,
    proposals: metrics::Counter,
}

/// openraft's settings. Snapshots and purges are triggered by us: see `registry`.
fn raft_config(group: GroupId) -> Config {
    Config {
        cluster_name: group.to_string(),
        heartbeat_interval: 500,
        election_timeout_min: 1_500,
        election_timeout_max: 3_000,
        max_payload_entries: 64,
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: 0,
        purge_batch_size: 1,
        api_channel_size: Some(1_024),
        api_batch_capacity: 256,
        notification_channel_size: Some(1_024),
        state_machine_channel_size: Some(256),
        enable_pre_vote: Some(true),
        ..Config::default()
    }
}

impl Group {
    /// Starts a replica on what its log and state hold. A group that was never started gets this replica as its only
    /// voter.
    pub async fn start(
        id: GroupId,
        replica: ReplicaId,
        log: GroupLog,
        machine: GroupMachine,
    ) -> Result<Self, ProposeError> {
        let stopped = |reason: String| ProposeError::Stopped { group: id, reason };
        let config = raft_config(id).validate().map_err(|e| stopped(e.to_string()))?;
        let raft = Raft::new(replica.get(), Arc::new(config), NoPeers, log.clone(), machine)
            .await
            .map_err(|e| stopped(e.to_string()))?;
        if !raft.is_initialized().await.map_err(|e| stopped(e.to_string()))? {
            let members = BTreeMap::from([(replica.get(), EmptyNode::new())]);
            match raft.initialize(members).await {
                Ok(()) | Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {}
                Err(e) => return Err(stopped(e.to_string())),
            }
        }
        Ok(Self {
            id,
            replica,
            raft,
            log,
            proposals: metrics::counter!(names::RAFT_PROPOSALS_TOTAL),
        })
    }

    /// Waits until this replica leads and has applied everything its log held at the start.
    pub async fn wait_ready(&self, patience: Duration) -> Result<(), ProposeError> {
        let last = self.log.last().map(|l| l.index);
        self.raft
            .wait(Some(patience))
            .metrics(
                |m| m.state.is_leader() && m.last_applied.map(|l| l.index) >= last,
                "leads and has applied its log",
            )
            .await
            .map(|_| ())
            .map_err(|e| ProposeError::Stopped {
                group: self.id,
                reason: e.to_string(),
            })
    }

    /// Puts an encoded `GroupCommand` into the log's queue. Answers come in the order of proposals.
    pub async fn propose(&self, command: Bytes) -> Result<Pending, ProposeError> {
        self.proposals.increment(1);
        let (responder, answer) = ProgressResponder::complete_only();
        self.raft
            .client_write_ff(Proposal(command), Some(responder))
            .await
            .map_err(|e| ProposeError::Stopped {
                group: self.id,
                reason: e.to_string(),
            })?;
        Ok(Pending { group: self.id, answer })
    }

    /// Returns when everything committed before the call is applied here and this replica led after the call began.
    pub async fn read_barrier(&self) -> Result<(), BarrierError> {
        match self.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
            Ok(_) => Ok(()),
            Err(RaftError::APIError(LinearizableReadError::ForwardToLeader(forward))) => Err(BarrierError::NotLeader {
                group: self.id,
                leader: forward.leader_id.map(ReplicaId::new),
            }),
            Err(RaftError::APIError(LinearizableReadError::QuorumNotEnough(e))) => Err(BarrierError::NoQuorum {
                group: self.id,
                reason: e.to_string(),
            }),
            Err(RaftError::Fatal(e)) => Err(BarrierError::Stopped {
                group: self.id,
                reason: e.to_string(),
            }),
        }
    }

    /// As of now.
    pub fn status(&self) -> GroupStatus {
        let metrics = openraft::async_runtime::watch::WatchReceiver::borrow_watched(&self.raft.metrics()).clone();
        GroupStatus {
            term: Term::new(metrics.current_term),
            leader: metrics.current_leader.map(ReplicaId::new),
            is_leader: metrics.state.is_leader(),
            last_applied: metrics.last_applied.map(|l| LogIndex::new(l.index)),
            last_log: metrics.last_log_index.map(LogIndex::new),
        }
    }

    /// Lets the log drop what `state/` holds durably. The machine's snapshot builder decides up to where.
    pub async fn purge_durable(&self) -> Result<(), ProposeError> {
        self.raft.trigger().snapshot().await.map_err(|e| ProposeError::Stopped {
            group: self.id,
            reason: e.to_string(),
        })
    }

    /// The group's log.
    pub fn log(&self) -> &GroupLog {
        &self.log
    }

    /// Ends the replica's tasks.
    pub async fn shutdown(&self) {
        if let Err(e) = self.raft.shutdown().await {
            tracing::warn!(group = %self.id, error = %e, "a task of the group did not end cleanly");
        }
    }
}
