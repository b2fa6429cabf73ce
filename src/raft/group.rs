//! One replica of one Raft group: the handle that the layers above hold.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use openraft::errors::{ClientWriteError, InitializeError, LinearizableReadError, RaftError};
use openraft::impls::{EmptyNode, ProgressResponder};
use openraft::raft::ClientWriteResult;
use openraft::{Config, Raft, ReadPolicy, SnapshotPolicy};
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::log_store::GroupLog;
use super::members::LeaderView;
use super::purge::{LogKeep, Others, PurgeHold};
use super::registry::GroupsOptions;
use super::state_machine::GroupMachine;
use super::transport::PeerNetwork;
use super::types::{Applied, Mainstem, Proposal, RaftInstant};
use crate::base::RetryClass;
use crate::base::metric_names as names;
use crate::model::{GroupId, LogIndex, ReplicaId, Term};

/// How long a state machine may take to end: as long as one write.
const END: Duration = Duration::from_secs(10);

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
            // The entry was in the log, and another leader's log has replaced it here: others may still commit it.
            Ok(Err(ClientWriteError::LogEntryDiscarded(_))) => Err(ProposeError::Unknown { group }),
            Ok(Err(other @ (ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)))) => {
                Err(ProposeError::Stopped {
                    group,
                    reason: other.to_string(),
                })
            }
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

impl GroupStatus {
    pub(super) fn of(metrics: &openraft::RaftMetrics<Mainstem>) -> Self {
        Self {
            term: Term::new(metrics.current_term),
            leader: metrics.current_leader.map(ReplicaId::new),
            is_leader: metrics.state.is_leader(),
            last_applied: metrics.last_applied.map(|l| LogIndex::new(l.index)),
            last_log: metrics.last_log_index.map(LogIndex::new),
        }
    }
}

/// Where a replica comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The group is new, and these are its voters. Every one of them may be started like this, with the same set: one of
    /// them writes the first entry and asks for votes, the others wait for it, and do it themselves if nothing comes.
    /// Without effect on a replica that has a log.
    Found(BTreeSet<ReplicaId>),
    /// The group is there: wait for its leader, which has been told of this replica or will be.
    Join,
    /// It ran here before: a replica without a log is refused.
    Restart,
}

/// Which of its first voters founds a group: another one from group to group, so that not all are led by one node. Two
/// founders would get in each other's way: the first entry of each is another one, and the one that is first to ask for
/// votes may be the one whose log counts for less.
fn founder(group: GroupId, members: &BTreeSet<ReplicaId>) -> Option<ReplicaId> {
    let turn = usize::try_from(group.get()).unwrap_or(0) % members.len().max(1);
    members.iter().nth(turn).copied()
}

/// How often a leader is heard of, and how long its silence is borne.
///
/// A follower votes for another one when it has heard nothing for `election_max` (the lease) and then for a time
/// between `election_min` and `election_max`. With the defaults that is 450 to 600 ms after the last heartbeat; of two
/// followers the earlier one counts, and the last heartbeat is 50 ms old on average: a new leader after about 450 ms, in
/// the median, and some ten ms for two rounds of votes with a sync. Six heartbeats in a row must be late before anyone
/// asks for votes; a pre-vote that only one follower asks for changes nothing, because the others still hear the leader.
/// Heartbeats go ahead of bulk and are renewed when they arrive, not when they are synced, so that a slow disk does not
/// end a lease. The price is the tick: a fifth of the heartbeat, about 1 ms of CPU per replica and second.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RaftTimings {
    pub heartbeat: Duration,
    pub election_min: Duration,
    pub election_max: Duration,
}

impl Default for RaftTimings {
    fn default() -> Self {
        Self {
            heartbeat: Duration::from_millis(100),
            election_min: Duration::from_millis(150),
            election_max: Duration::from_millis(300),
        }
    }
}

impl RaftTimings {
    /// For a node without peers: its groups have one voter each and nothing to hear.
    pub const fn alone() -> Self {
        Self {
            heartbeat: Duration::from_millis(500),
            election_min: Duration::from_millis(1_500),
            election_max: Duration::from_millis(3_000),
        }
    }
}

/// A running replica.
#[derive(Clone)]
pub struct Group {
    pub id: GroupId,
    pub replica: ReplicaId,
    raft: Raft<Mainstem, GroupMachine>,
    log: GroupLog,
    proposals: metrics::Counter,
    hold: Arc<PurgeHold>,
    keep: LogKeep,
    /// When a leader was heard of last.
    pub(super) heard: Arc<Mutex<Option<Instant>>>,
    /// The last time of which a quorum was heard to have answered, and when that was first seen.
    pub(super) quorum_seen: Arc<Mutex<Option<(RaftInstant, RaftInstant)>>>,
    /// When somebody had the replica here hand over.
    pub(super) ordered: Arc<Mutex<Option<Instant>>>,
    /// No replica of the group comes into being from log entries up to here; 0: there are none.
    floor: Arc<AtomicU64>,
    /// Ends what the state machine waits for; and tells when it writes nothing any more.
    stop: CancellationToken,
    ended: CancellationToken,
    /// Why the replica has ended by itself and does not go on: what it has is damaged, or does not fit.
    fault: Arc<OnceLock<String>>,
    /// Kept by the registry's watcher.
    pub(super) leader: watch::Sender<LeaderView>,
}

/// openraft's settings. Snapshots and purges are triggered by us: see `registry`.
///
/// With peers a replica that led when it stopped has to be elected again, in a later term. It may have lost the end of
/// its log, which its followers have and which was acknowledged on the strength of their syncs: in its old term it would
/// give those indexes to other entries under the same log ids, which nobody could tell apart, and take for committed
/// only what its own hint says. Docs: decisions/0025.
fn raft_config(group: GroupId, timings: RaftTimings, peers: bool) -> Config {
    let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    Config {
        cluster_name: group.to_string(),
        heartbeat_interval: ms(timings.heartbeat),
        election_timeout_min: ms(timings.election_min),
        election_timeout_max: ms(timings.election_max),
        max_payload_entries: 64,
        snapshot_policy: SnapshotPolicy::Never,
        max_in_snapshot_log_to_keep: 0,
        purge_batch_size: 1,
        api_channel_size: Some(1_024),
        api_batch_capacity: 256,
        notification_channel_size: Some(1_024),
        state_machine_channel_size: Some(256),
        enable_pre_vote: Some(true),
        enable_leader_restore: Some(!peers),
        ..Config::default()
    }
}

impl Group {
    /// Starts a replica on what its log and state hold.
    pub async fn start(
        id: GroupId,
        replica: ReplicaId,
        origin: Origin,
        options: &GroupsOptions,
        mut log: GroupLog,
        machine: GroupMachine,
    ) -> Result<Self, ProposeError> {
        let stopped = |reason: String| ProposeError::Stopped { group: id, reason };
        if let Some(snapshot) = machine.installed() {
            log.begin_behind(snapshot).await.map_err(|e| stopped(e.to_string()))?;
        }
        log.belongs_to(replica, machine.membership());
        machine.wait_for_nobody().map_err(|e| stopped(e.to_string()))?;
        if origin == Origin::Restart && log.last().is_none() {
            return Err(stopped(
                "there is no log of it here: it can only join, or be founded".into(),
            ));
        }
        let config = raft_config(id, options.timings, options.peers.is_some())
            .validate()
            .map_err(|e| stopped(e.to_string()))?;
        let (hold, stop, ended) = (machine.hold(), machine.stop(), machine.ended());
        let network = PeerNetwork::new(options.peers.clone(), id, hold.clone());
        let raft = Raft::new(replica.get(), Arc::new(config), network, log.clone(), machine)
            .await
            .map_err(|e| stopped(e.to_string()))?;
        let leader = watch::Sender::new(LeaderView {
            term: Term::new(0),
            leader: None,
            since: SystemTime::now(),
        });
        let group = Self {
            id,
            replica,
            raft,
            log,
            proposals: metrics::counter!(names::RAFT_PROPOSALS_TOTAL),
            hold,
            keep: options.keep,
            heard: Arc::default(),
            quorum_seen: Arc::default(),
            ordered: Arc::default(),
            floor: Arc::default(),
            stop,
            ended,
            fault: Arc::default(),
            leader,
        };
        if let Origin::Found(members) = origin
            && founder(id, &members) == Some(replica)
        {
            group.found(&members).await?;
        }
        Ok(group)
    }

    /// Writes the first entry of a group that has none here, and asks for votes at once: nobody leads it who could be
    /// disturbed. Without effect on a replica that has a log, or has voted.
    pub(super) async fn found(&self, members: &BTreeSet<ReplicaId>) -> Result<(), ProposeError> {
        let stopped = |reason: String| ProposeError::Stopped { group: self.id, reason };
        if self.raft.is_initialized().await.map_err(|e| stopped(e.to_string()))? {
            return Ok(());
        }
        let members: BTreeMap<u64, EmptyNode> = members.iter().map(|m| (m.get(), EmptyNode::new())).collect();
        // It asks for votes by itself.
        match self.raft.initialize(members).await {
            Ok(()) => Ok(()),
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => Ok(()),
            Err(e) => Err(stopped(e.to_string())),
        }
    }

    pub(super) fn raft(&self) -> &Raft<Mainstem, GroupMachine> {
        &self.raft
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
        self.read_index().await.map(|_| ())
    }

    /// As [`read_barrier`](Self::read_barrier), and tells the index in the log that any replica must have applied to
    /// answer such a read.
    pub async fn read_index(&self) -> Result<LogIndex, BarrierError> {
        match self.raft.ensure_linearizable(ReadPolicy::ReadIndex).await {
            Ok(read) => Ok(LogIndex::new(read.log_id().index)),
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

    /// Waits until this replica has applied the log up to there. False: not within `patience`, or it has ended.
    pub async fn wait_applied(&self, index: LogIndex, patience: Duration) -> bool {
        let wait = self.raft.wait(Some(patience));
        wait.applied_index_at_least(Some(index.get()), "applied").await.is_ok()
    }

    /// Whether this replica leads, as far as its watcher knows. Cheap.
    pub fn leads(&self) -> bool {
        self.leader.borrow().leader == Some(self.replica)
    }

    /// As of now.
    pub fn status(&self) -> GroupStatus {
        GroupStatus::of(&self.metrics())
    }

    /// Lets the log drop what `state/` holds durably, up to `durable`, and nobody else needs. The machine's snapshot
    /// builder decides up to where.
    pub async fn purge_durable(&self, durable: LogIndex) -> Result<(), ProposeError> {
        // Entries at or below the floor are kept for nobody: whoever lacks them takes a snapshot.
        let others = match self.is_below_floor() && durable >= self.floor() {
            true => Others::None,
            false => self.others(),
        };
        self.hold
            .update(durable.get(), self.log.appended_bytes(), others, self.keep);
        let stopped = |e: openraft::errors::Fatal<Mainstem>| ProposeError::Stopped {
            group: self.id,
            reason: e.to_string(),
        };
        self.raft.trigger().snapshot().await.map_err(stopped)?;
        // After a start what `state/` holds is the newest snapshot, however far back the log reaches: of a group to which
        // nothing is written no newer one is made, whose making would purge it. Without effect on what is purged already.
        let last = self.log.last().map_or(0, |last| last.index);
        match self.hold.limit(durable.get()).filter(|upto| *upto <= last) {
            Some(upto) => self.raft.trigger().purge_log(upto).await.map_err(stopped),
            None => Ok(()),
        }
    }

    /// No replica comes into being from log entries up to this one.
    pub fn floor(&self) -> LogIndex {
        LogIndex::new(self.floor.load(Ordering::Acquire))
    }

    /// Raises the floor, as the catalog tells it.
    pub fn set_floor(&self, floor: LogIndex) {
        self.floor.fetch_max(floor.get(), Ordering::AcqRel);
    }

    /// Whether the log still holds entries that it shall not.
    pub fn is_below_floor(&self) -> bool {
        self.log.purged().map_or(0, |id| id.index) < self.floor().get()
    }

    /// Whether entries from this one on are refused: this replica is empty, and must not begin with them.
    pub(super) fn refuses(&self, from: u64) -> bool {
        from <= self.floor().get() && self.floor().get() > 0 && self.log.last().is_none()
    }

    /// Why the replica cannot go on, if so. It leads, votes and acknowledges no more.
    pub fn fault(&self) -> Option<&str> {
        self.fault.get().map(String::as_str)
    }

    /// The replica has ended. Unless it was told to, that is a fault.
    pub(super) fn has_ended(&self) {
        if !self.stop.is_cancelled() {
            let state = self.metrics().running_state;
            let why = state
                .err()
                .map_or_else(|| "it has ended by itself".into(), |e| e.to_string());
            tracing::error!(group = %self.id, replica = %self.replica, why, "the replica cannot go on");
            let _ = self.fault.set(why);
        }
    }

    /// The group's log.
    pub fn log(&self) -> &GroupLog {
        &self.log
    }

    /// Ends the replica's tasks. Afterwards nothing of it writes any more.
    pub async fn shutdown(&self) {
        self.stop.cancel();
        if let Err(e) = self.raft.shutdown().await {
            tracing::warn!(group = %self.id, error = %e, "a task of the group did not end cleanly");
        }
        if tokio::time::timeout(END, self.ended.cancelled()).await.is_err() {
            tracing::warn!(group = %self.id, "the group's state machine has not ended within {END:?}");
        }
    }
}
