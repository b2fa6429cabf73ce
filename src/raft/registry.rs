//! The replicas that run on this node, and the upkeep they share.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;

use super::group::{Group, ProposeError};
use super::log_store::GroupLog;
use super::shard::{RecentBudget, ShardDirectory};
use super::state_machine::{GroupContext, GroupMachine, GroupMap, MetaObserver};
use crate::base::metric_names as names;
use crate::model::{GroupId, ReplicaId, Term};
use crate::storage::{LogDb, StateDb, Store};

/// How often idle shards give back the memory of their recent batches.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// How often leaders are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);

/// Counts groups and leaders.
struct Census {
    held: metrics::Gauge,
    led: metrics::Gauge,
    changes: metrics::Counter,
    /// Term and leader of each group when it was last looked at.
    seen: HashMap<GroupId, (Term, Option<ReplicaId>)>,
}

impl Census {
    fn new() -> Self {
        Self {
            held: metrics::gauge!(names::RAFT_HELD_GROUPS),
            led: metrics::gauge!(names::RAFT_LED_GROUPS),
            changes: metrics::counter!(names::RAFT_LEADER_CHANGES_TOTAL),
            seen: HashMap::new(),
        }
    }

    fn take(&mut self, groups: &[Group]) {
        let mut led = 0u32;
        let mut seen = HashMap::with_capacity(groups.len());
        for group in groups {
            let status = group.status();
            led += u32::from(status.is_leader);
            let now = (status.term, status.leader);
            if self.seen.get(&group.id).is_some_and(|before| *before != now) {
                self.changes.increment(1);
            }
            seen.insert(group.id, now);
        }
        self.seen = seen;
        self.held.set(groups.len() as f64);
        self.led.set(f64::from(led));
    }
}

/// Every replica on this node.
pub struct Groups {
    context: GroupContext,
    log: LogDb,
    groups: RwLock<GroupMap>,
}

impl Groups {
    /// `recent_bytes` bounds the recent batches kept for tailing readers.
    pub fn new(store: &Store, recent_bytes: usize, observer: Arc<dyn MetaObserver>) -> Arc<Self> {
        Arc::new(Self {
            context: GroupContext {
                state: store.state().clone(),
                directory: Arc::new(ShardDirectory::default()),
                recent: RecentBudget::new(recent_bytes),
                observer,
            },
            log: store.log().clone(),
            groups: RwLock::default(),
        })
    }

    /// Starts a replica, or returns the one that runs.
    pub async fn start(&self, id: GroupId, replica: ReplicaId) -> Result<Group, ProposeError> {
        if let Some(group) = self.get(id) {
            return Ok(group);
        }
        let stopped = |e: std::io::Error| ProposeError::Stopped {
            group: id,
            reason: e.to_string(),
        };
        let log = GroupLog::open(self.log.clone(), id).map_err(stopped)?;
        let machine = GroupMachine::open(id, self.context.clone(), log.clone()).map_err(stopped)?;
        let group = Group::start(id, replica, log, machine).await?;
        self.groups.write().insert(id, group.clone());
        Ok(group)
    }

    pub fn get(&self, id: GroupId) -> Option<Group> {
        self.groups.read().get(&id).cloned()
    }

    pub fn all(&self) -> Vec<Group> {
        self.groups.read().values().cloned().collect()
    }

    /// The shards that have a replica here.
    pub fn directory(&self) -> &Arc<ShardDirectory> {
        &self.context.directory
    }

    /// The state that the replicas apply to.
    pub fn state(&self) -> &StateDb {
        &self.context.state
    }

    /// Runs until cancelled: counts leaders; after each flush of `state/` lets every log drop what is now durable there, and takes the
    /// memory of recent batches back from idle shards.
    pub async fn upkeep(self: Arc<Self>, token: CancellationToken) {
        let mut flushed = self.context.state.flush_generation();
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        let mut count = tokio::time::interval(COUNT_INTERVAL);
        count.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let mut census = Census::new();
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                _ = count.tick() => census.take(&self.all()),
                _ = sweep.tick() => {
                    for shard in self.context.directory.all() {
                        shard.sweep_recent();
                    }
                }
                changed = flushed.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    for group in self.all() {
                        let durable = self.context.state.durable_applied(group.id).map(|index| index.get());
                        if durable <= group.log().purged().map(|id| id.index) {
                            continue;
                        }
                        if let Err(e) = group.purge_durable().await {
                            tracing::warn!(group = %group.id, error = %e, "the log could not be purged");
                        }
                    }
                }
            }
        }
    }

    /// Ends every replica.
    pub async fn shutdown(&self) {
        let groups = std::mem::take(&mut *self.groups.write());
        for group in groups.into_values() {
            group.shutdown().await;
        }
    }
}
