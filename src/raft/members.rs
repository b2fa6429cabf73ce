//! Who is in a group, where they are, and changes of that.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use openraft::async_runtime::watch::WatchReceiver as _;
use openraft::errors::{ChangeMembershipError, ClientWriteError, RaftError};
use openraft::impls::EmptyNode;
use openraft::{ChangeMembers, Instant as _, RaftMetrics};
use tokio::sync::watch;

use super::group::{Group, GroupStatus};
use super::purge::Others;
use super::trail::LogLag;
use super::types::{Mainstem, RaftInstant};
use crate::base::RetryClass;
use crate::model::{GroupId, LogIndex, ReplicaId, Term};

/// A replica that has missed so many heartbeats, and was silent for so long, is not made a leader.
const SILENT_BEATS: u32 = 4;
const SILENT_MIN: Duration = Duration::from_millis(600);

type Metrics = RaftMetrics<Mainstem>;
type WriteError = RaftError<Mainstem, ClientWriteError<Mainstem>>;

/// Who is in a group, as of the last entry this replica has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Members {
    /// While a change is under way, those of before and after.
    pub voters: BTreeSet<ReplicaId>,
    pub learners: BTreeSet<ReplicaId>,
    /// A change of voters is under way.
    pub joint: bool,
    /// Whether it is committed.
    pub committed: bool,
    /// Of the entry that says so.
    pub index: LogIndex,
}

impl Members {
    /// Whether the replica is one of them.
    pub fn contains(&self, replica: ReplicaId) -> bool {
        self.voters.contains(&replica) || self.learners.contains(&replica)
    }
}

/// One replica, as the leader sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaReport {
    pub replica: ReplicaId,
    pub voter: bool,
    /// Everything up to here is synced there.
    pub matched: Option<LogIndex>,
    /// Entries it has yet to get.
    pub lag: u64,
    /// How much that is, and for how long it has lacked the first of them.
    pub lacks: LogLag,
    /// How long ago it answered last; `None`: not since this leader leads.
    pub last_ack: Option<Duration>,
}

/// Who leads, and since when this node knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeaderView {
    pub term: Term,
    pub leader: Option<ReplicaId>,
    pub since: SystemTime,
}

/// Everything a group says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupReport {
    pub status: GroupStatus,
    pub members: Members,
    pub leader: LeaderView,
    /// Only on the leader: how long ago a quorum answered last.
    pub last_quorum_ack: Option<Duration>,
    /// Only on the leader: all others, and itself.
    pub replicas: Vec<ReplicaReport>,
    /// The log begins behind this.
    pub purged: Option<LogIndex>,
}

/// How recent a replica is, as far as it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Freshness {
    /// How long ago it heard from the leader that it follows, or, where it leads, a quorum answered it. A replica that
    /// was cut off together with its leader hears from that one all the same. `None`: not since it started.
    pub heard: Option<Duration>,
    /// Entries that it has and has not applied.
    pub unapplied: u64,
}

/// Why a change of a group was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ChangeError {
    #[error("this replica of {group} does not lead it{}", leader.map(|l| format!("; replica {l} does")).unwrap_or_default())]
    NotLeader { group: GroupId, leader: Option<ReplicaId> },
    #[error("another change of {group}'s members is under way; wait for it to end: {reason}")]
    InProgress { group: GroupId, reason: String },
    #[error("{group} cannot be changed like that: {reason}")]
    Refused { group: GroupId, reason: String },
    #[error("{group} has not got there within {patience:?}: {reason}")]
    TimedOut {
        group: GroupId,
        patience: Duration,
        reason: String,
    },
    #[error("{group} has stopped: {reason}")]
    Stopped { group: GroupId, reason: String },
    #[error("leadership of {group} was lost while the change was under way")]
    Unknown { group: GroupId },
}

impl ChangeError {
    /// Whether the change could have been made. Changes of members may be asked for again: the same one is no change.
    pub fn retry_class(&self) -> RetryClass {
        match self {
            ChangeError::NotLeader { .. } | ChangeError::InProgress { .. } => RetryClass::DidNotHappen,
            ChangeError::Refused { .. } => RetryClass::CannotWork,
            ChangeError::TimedOut { .. } | ChangeError::Stopped { .. } | ChangeError::Unknown { .. } => {
                RetryClass::MayHaveHappened
            }
        }
    }
}

fn change_error(group: GroupId, error: WriteError) -> ChangeError {
    match error {
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => ChangeError::NotLeader {
            group,
            leader: forward.leader_id.map(ReplicaId::new),
        },
        RaftError::APIError(ClientWriteError::ChangeMembershipError(
            e @ (ChangeMembershipError::InProgress(_) | ChangeMembershipError::UncommittedLeaderLog(_)),
        )) => ChangeError::InProgress {
            group,
            reason: e.to_string(),
        },
        RaftError::APIError(ClientWriteError::LogEntryDiscarded(_)) => ChangeError::Unknown { group },
        RaftError::APIError(
            e @ (ClientWriteError::ChangeMembershipError(_) | ClientWriteError::PreconditionFailed(_)),
        ) => ChangeError::Refused {
            group,
            reason: e.to_string(),
        },
        RaftError::Fatal(e) => ChangeError::Stopped {
            group,
            reason: e.to_string(),
        },
    }
}

pub(super) fn members_of(metrics: &Metrics) -> Members {
    let membership = &metrics.membership_config;
    let inner = membership.membership();
    Members {
        voters: inner.voter_ids().map(ReplicaId::new).collect(),
        learners: inner.learner_ids().map(ReplicaId::new).collect(),
        joint: inner.get_joint_config().len() > 1,
        committed: metrics.committed_membership_config.log_id() == membership.log_id(),
        index: LogIndex::new(membership.log_id().as_ref().map_or(0, |id| id.index)),
    }
}

/// A group of one voter is its own quorum.
fn is_alone(metrics: &Metrics) -> bool {
    metrics.membership_config.membership().voter_ids().count() <= 1
}

impl Group {
    pub(super) fn metrics(&self) -> Metrics {
        self.raft().metrics().borrow_watched().clone()
    }

    /// As of the last entry this replica has.
    pub fn members(&self) -> Members {
        members_of(&self.metrics())
    }

    /// Wakes when another replica leads, or nobody does.
    pub fn watch_leader(&self) -> watch::Receiver<LeaderView> {
        self.leader.subscribe()
    }

    /// Everything, as of now.
    pub fn report(&self) -> GroupReport {
        let metrics = self.metrics();
        let members = members_of(&metrics);
        let last = metrics.last_log_index.unwrap_or(0);
        let acks = metrics.heartbeat.clone().unwrap_or_default();
        let replicas = metrics.replication.iter().flatten().map(|(id, matched)| {
            let replica = ReplicaId::new(*id);
            let own = replica == self.replica;
            let matched = matched.map(|m| m.index);
            ReplicaReport {
                replica,
                voter: members.voters.contains(&replica),
                matched: matched.map(LogIndex::new),
                lag: matched.map_or(last + 1, |m| last.saturating_sub(m)),
                lacks: self.log().lag(matched.map(LogIndex::new)),
                last_ack: if own {
                    Some(Duration::ZERO)
                } else {
                    acks.get(id).copied().flatten().map(|at| at.elapsed())
                },
            }
        });
        GroupReport {
            status: GroupStatus::of(&metrics),
            replicas: replicas.collect(),
            leader: *self.leader.borrow(),
            last_quorum_ack: metrics.last_quorum_acked.map(|at| at.elapsed()),
            purged: metrics.purged.map(|p| LogIndex::new(p.index)),
            members,
        }
    }

    /// How recent what this replica has applied is.
    pub fn freshness(&self) -> Freshness {
        let metrics = self.metrics();
        let heard = match (metrics.state.is_leader(), is_alone(&metrics)) {
            (true, true) => Some(Duration::ZERO),
            (true, false) => metrics.last_quorum_acked.map(|at| at.elapsed()),
            (false, _) => self.heard.lock().map(|at| at.elapsed()),
        };
        let applied = metrics.last_applied.map_or(0, |id| id.index);
        Freshness {
            heard,
            unapplied: metrics.last_log_index.map_or(0, |last| last.saturating_sub(applied)),
        }
    }

    /// Where the others are, for the purge of the log.
    pub(super) fn others(&self) -> Others {
        let metrics = self.metrics();
        let members = members_of(&metrics);
        if members.voters.len() + members.learners.len() <= 1 {
            return Others::None;
        }
        match &metrics.replication {
            Some(replication) if metrics.state.is_leader() => {
                let own = self.replica.get();
                let matched = replication.iter().filter(|(id, _)| **id != own);
                Others::Behind(matched.map(|(_, m)| m.map_or(0, |m| m.index)).min().unwrap_or(0))
            }
            Some(_) | None => Others::Unknown,
        }
    }

    /// Whether this replica leads and a quorum has answered it within `age`. A group of one voter is its own quorum.
    pub fn leads_quorum(&self, age: Duration) -> bool {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        metrics.state.is_leader() && self.silence(&metrics).is_none_or(|silence| silence <= age)
    }

    /// On a leader of several voters: how long no quorum has answered it, since it leads if none has yet.
    ///
    /// openraft tells when the last request was *sent* that a quorum has answered. Under load that can be long ago though
    /// answers come all the time: so long as it goes on, there is no silence.
    pub fn quorum_silence(&self) -> Option<Duration> {
        let metrics = self.raft().metrics();
        let metrics = metrics.borrow_watched();
        metrics.state.is_leader().then(|| self.silence(&metrics)).flatten()
    }

    /// As [`quorum_silence`](Self::quorum_silence), of a leader. Asked for each entry: looks without a copy.
    fn silence(&self, metrics: &Metrics) -> Option<Duration> {
        if is_alone(metrics) {
            return None;
        }
        let Some(acked) = metrics.last_quorum_acked else {
            return Some(self.leader.borrow().since.elapsed().unwrap_or_default());
        };
        let (sent, now) = (*acked, RaftInstant::now());
        let mut seen = self.quorum_seen.lock();
        let since = match *seen {
            Some((known, since)) if known == sent => since,
            // Seen for the first time: it has come since the last look, or was there already at the first.
            Some(_) => now,
            None => sent,
        };
        *seen = Some((sent, since));
        drop(seen);
        Some(sent.max(since).elapsed())
    }

    /// Somebody has had it hand over.
    pub fn note_order(&self) {
        *self.ordered.lock() = Some(std::time::Instant::now());
    }

    /// Whether somebody has had the replica here hand over, so long ago at the most.
    pub fn was_ordered(&self, within: Duration) -> bool {
        self.ordered.lock().is_some_and(|at| at.elapsed() <= within)
    }

    /// Between two heartbeats.
    pub fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.raft().config().heartbeat_interval)
    }

    /// On a leader: how many of the voters have answered within `age`, itself included.
    pub fn answering(&self, age: Duration) -> usize {
        let metrics = self.metrics();
        let voters = members_of(&metrics).voters;
        let acks = metrics.heartbeat.iter().flatten();
        let others = acks.filter(|(id, at)| {
            let recent = at.is_some_and(|at| at.elapsed() <= age);
            recent && **id != self.replica.get() && voters.contains(&ReplicaId::new(**id))
        });
        others.count() + usize::from(voters.contains(&self.replica))
    }

    /// Adds a replica that gets the log and does not vote. It must have been started as one that joins. Returns when
    /// the change is committed; the replica may be behind then (see [`wait_caught_up`](Self::wait_caught_up)).
    pub async fn add_learner(&self, replica: ReplicaId) -> Result<LogIndex, ChangeError> {
        let node = EmptyNode::new();
        let result = self.raft().add_learner(replica.get(), node, false).await;
        let written = result.map_err(|e| change_error(self.id, e))?;
        Ok(LogIndex::new(written.log_id.index))
    }

    /// Removes a replica that does not vote.
    pub async fn remove_learner(&self, replica: ReplicaId) -> Result<LogIndex, ChangeError> {
        let change = ChangeMembers::RemoveNodes(BTreeSet::from([replica.get()]));
        let result = self.raft().change_membership(change, false).await;
        let written = result.map_err(|e| change_error(self.id, e))?;
        Ok(LogIndex::new(written.log_id.index))
    }

    /// Makes exactly these replicas the voters, in one joint change: new ones must be learners; those that are not
    /// among them leave the group. Returns when the change is committed by old and new.
    pub async fn change_membership(&self, voters: BTreeSet<ReplicaId>) -> Result<LogIndex, ChangeError> {
        let voters: BTreeSet<u64> = voters.into_iter().map(ReplicaId::get).collect();
        let result = self.raft().change_membership(voters, false).await;
        let written = result.map_err(|e| change_error(self.id, e))?;
        Ok(LogIndex::new(written.log_id.index))
    }

    fn timed_out(&self, patience: Duration, reason: impl ToString) -> ChangeError {
        ChangeError::TimedOut {
            group: self.id,
            patience,
            reason: reason.to_string(),
        }
    }

    fn must_lead(&self, metrics: &Metrics) -> Result<(), ChangeError> {
        if metrics.state.is_leader() {
            return Ok(());
        }
        Err(ChangeError::NotLeader {
            group: self.id,
            leader: metrics.current_leader.map(ReplicaId::new),
        })
    }

    /// Waits on the leader until the replica has everything that the log held at the call.
    pub async fn wait_caught_up(&self, replica: ReplicaId, patience: Duration) -> Result<LogIndex, ChangeError> {
        let goal = self.log().last().map_or(0, |l| l.index);
        let caught_up = |m: &Metrics| {
            let matched = m
                .replication
                .as_ref()
                .and_then(|r| r.get(&replica.get()).copied().flatten());
            !m.state.is_leader() || matched.is_some_and(|m| m.index >= goal)
        };
        let wait = self.raft().wait(Some(patience));
        let metrics = wait
            .metrics(caught_up, "the replica has caught up")
            .await
            .map_err(|e| self.timed_out(patience, format!("replica {replica} is still behind: {e}")))?;
        self.must_lead(&metrics)?;
        Ok(LogIndex::new(goal))
    }

    /// Hands leadership to a voter that has caught up. Nothing that was proposed is lost; proposals are refused for as
    /// long as it takes: less than 100 ms, if the other one is well.
    pub async fn transfer_leader(&self, to: ReplicaId, patience: Duration) -> Result<(), ChangeError> {
        let begun = tokio::time::Instant::now();
        let metrics = self.metrics();
        self.must_lead(&metrics)?;
        if to == self.replica {
            return Ok(());
        }
        if !members_of(&metrics).voters.contains(&to) {
            return Err(ChangeError::Refused {
                group: self.id,
                reason: format!("replica {to} is no voter: only voters lead"),
            });
        }
        // One that died a moment ago may have everything, and would leave the group without a leader.
        let silence = metrics
            .heartbeat
            .as_ref()
            .and_then(|acks| acks.get(&to.get()).copied().flatten());
        let patient = SILENT_BEATS * Duration::from_millis(self.raft().config().heartbeat_interval);
        if silence.is_none_or(|at| at.elapsed() > patient.max(SILENT_MIN)) {
            return Err(ChangeError::Refused {
                group: self.id,
                reason: format!("replica {to} does not answer now: it would not lead"),
            });
        }
        self.wait_caught_up(to, patience).await?;
        let stopped = |e: &dyn std::fmt::Display| ChangeError::Stopped {
            group: self.id,
            reason: e.to_string(),
        };
        self.raft()
            .trigger()
            .transfer_leader(to.get())
            .await
            .map_err(|e| stopped(&e))?;
        let led_by = |m: &Metrics| m.current_leader.is_some_and(|l| l != self.replica.get());
        let left = patience.saturating_sub(begun.elapsed());
        let metrics = self
            .raft()
            .wait(Some(left))
            .metrics(led_by, "another replica leads")
            .await
            .map_err(|e| self.timed_out(patience, e))?;
        if metrics.current_leader == Some(to.get()) {
            return Ok(());
        }
        Err(ChangeError::NotLeader {
            group: self.id,
            leader: metrics.current_leader.map(ReplicaId::new),
        })
    }

    /// Hands leadership to the voter that is least behind and has answered of late. On one that does not lead, nothing
    /// is done.
    pub async fn step_down(&self, patience: Duration) -> Result<(), ChangeError> {
        let report = self.report();
        if !report.status.is_leader {
            return Ok(());
        }
        let others = report
            .replicas
            .iter()
            .filter(|r| r.voter && r.replica != self.replica && r.last_ack.is_some());
        // Who has not answered for seconds may be down, however little it is behind.
        let best = others.min_by_key(|r| (r.last_ack.map(|a| a.as_secs()), r.lag));
        match best {
            Some(best) => self.transfer_leader(best.replica, patience).await,
            None => Err(ChangeError::Refused {
                group: self.id,
                reason: "no other voter has answered: there is nobody to lead it".into(),
            }),
        }
    }
}
