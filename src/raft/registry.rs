//! The replicas that run on this node, and the upkeep they share.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use tokio_util::sync::CancellationToken;

use super::group::{Group, ProposeError};
use super::log_store::GroupLog;
use super::shard::{RecentBudget, ShardDirectory};
use super::state_machine::{GroupContext, GroupMachine, GroupMap, MetaObserver};
use crate::model::{GroupId, ReplicaId};
use crate::storage::{LogDb, StateDb, Store};

/// How often idle shards give back the memory of their recent batches.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

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

    /// Runs until cancelled: after each flush of `state/` lets every log drop what is now durable there, and takes the
    /// memory of recent batches back from idle shards.
    pub async fn upkeep(self: Arc<Self>, token: CancellationToken) {
        let mut flushed = self.context.state.flush_generation();
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        loop {
            tokio::select! {
                () = token.cancelled() => return,
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
