//! The replicas that run on this node, and the upkeep they share.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::broadcast;
use tokio_util::sync::CancellationToken;

use super::catalog::MetaObserver;
use super::group::{Group, Origin, ProposeError, RaftTimings};
use super::log_store::GroupLog;
use super::purge::LogKeep;
use super::shard::{RecentBudget, ShardDirectory};
use super::state_machine::{GroupContext, GroupMachine, GroupMap};
use super::transport::{Peers, RaftHandle, Replicas};
use super::watch::{self, GroupEvent};
use crate::base::Tasks;
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
/// Events that a slow listener may be behind by; it then misses the oldest.
const EVENTS_MAX: usize = 1_024;
/// How long the end of the watchers may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Every replica on this node.
pub struct Groups {
    context: GroupContext,
    log: LogDb,
    groups: RwLock<GroupMap>,
    options: GroupsOptions,
    tasks: Tasks,
    events: broadcast::Sender<GroupEvent>,
    /// One start or stop at a time.
    changing: tokio::sync::Mutex<()>,
    this: Weak<Groups>,
}

/// How the replicas of a node run.
#[derive(Debug, Clone)]
pub struct GroupsOptions {
    /// Bounds the recent batches kept for tailing readers.
    pub recent_bytes: usize,
    pub timings: RaftTimings,
    pub keep: LogKeep,
    /// Without peers, a node has groups of one voter only.
    pub peers: Option<Peers>,
}

impl Groups {
    /// For a node without peers. `recent_bytes` bounds the recent batches kept for tailing readers.
    pub fn new(store: &Store, recent_bytes: usize, observer: Arc<dyn MetaObserver>) -> Arc<Self> {
        let options = GroupsOptions {
            recent_bytes,
            timings: RaftTimings::alone(),
            keep: LogKeep::default(),
            peers: None,
        };
        Self::with_options(store, options, observer)
    }

    /// The replicas of a node.
    pub fn with_options(store: &Store, options: GroupsOptions, observer: Arc<dyn MetaObserver>) -> Arc<Self> {
        let groups = Arc::new_cyclic(|this| Self {
            context: GroupContext {
                state: store.state().clone(),
                directory: Arc::new(ShardDirectory::default()),
                recent: RecentBudget::new(options.recent_bytes),
                observer,
            },
            log: store.log().clone(),
            groups: RwLock::default(),
            options: options.clone(),
            tasks: Tasks::new("raft"),
            events: broadcast::Sender::new(EVENTS_MAX),
            changing: tokio::sync::Mutex::default(),
            this: this.clone(),
        });
        if let Some(peers) = options.peers {
            groups.tasks.spawn(
                "reconnects",
                follow_connections(peers, groups.this.clone(), groups.tasks.token()),
            );
        }
        groups
    }

    /// Starts the only replica of a group, or returns the one that runs.
    pub async fn start(&self, id: GroupId, replica: ReplicaId) -> Result<Group, ProposeError> {
        self.start_as(id, replica, Origin::Found(BTreeSet::from([replica])))
            .await
    }

    /// Starts a replica, or returns the one that runs.
    pub async fn start_as(&self, id: GroupId, replica: ReplicaId, origin: Origin) -> Result<Group, ProposeError> {
        let stopped = |reason: String| ProposeError::Stopped { group: id, reason };
        let _changing = self.changing.lock().await;
        if let Some(group) = self.get(id) {
            if group.replica != replica {
                let runs = group.replica;
                return Err(stopped(format!(
                    "replica {runs} of it runs here, {replica} cannot as well"
                )));
            }
            return Ok(group);
        }
        if let Origin::Found(members) = &origin
            && !members.contains(&replica)
        {
            return Err(stopped(format!("replica {replica} is not among its first members")));
        }
        let log = GroupLog::open(self.log.clone(), id).map_err(|e| stopped(e.to_string()))?;
        let machine = GroupMachine::open(id, self.context.clone(), log.clone()).map_err(|e| stopped(e.to_string()))?;
        let group = Group::start(id, replica, origin, &self.options, log, machine).await?;
        self.groups.write().insert(id, group.clone());
        let watcher = watch::watch(self.this.clone(), group.clone(), self.events.clone());
        self.tasks.spawn(format!("watch-{id}"), watcher);
        Ok(group)
    }

    /// Whether a replica of the group has run here: its log is not empty.
    pub fn has_log(&self, id: GroupId) -> bool {
        self.log.meta(id).is_ok_and(|meta| meta.last.is_some())
    }

    /// Ends a replica that was removed from its group for good and sets its log aside: nothing of it is listed or written
    /// any more, and nothing is removed. The group cannot come back to this node.
    pub async fn set_aside(&self, id: GroupId) {
        self.stop(id).await;
        if !self.is_aside(id) {
            self.log.drop_group(id);
        }
        for shard in self.directory().all() {
            if shard.group == id {
                self.directory().remove(shard.shard);
            }
        }
    }

    /// Whether the group's log was set aside.
    pub fn is_aside(&self, id: GroupId) -> bool {
        self.log.meta(id).is_ok_and(|meta| meta.quarantined)
    }

    /// Ends a replica; its data stays. True if there was one.
    pub async fn stop(&self, id: GroupId) -> bool {
        let _changing = self.changing.lock().await;
        let group = self.groups.write().remove(&id);
        match group {
            Some(group) => {
                group.shutdown().await;
                true
            }
            None => false,
        }
    }

    /// What happens to the replicas here: leaders, removals, ends.
    pub fn events(&self) -> broadcast::Receiver<GroupEvent> {
        self.events.subscribe()
    }

    pub fn get(&self, id: GroupId) -> Option<Group> {
        self.groups.read().get(&id).cloned()
    }

    /// Whether a replica of the group runs here.
    pub fn holds(&self, id: GroupId) -> bool {
        self.groups.read().contains_key(&id)
    }

    pub fn all(&self) -> Vec<Group> {
        self.groups.read().values().cloned().collect()
    }

    /// The other nodes; `None`: there are none.
    pub fn peers(&self) -> Option<&Peers> {
        self.options.peers.as_ref()
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
                    // What others needed before may be needed no more; and what is asked of a group while it is at it
                    // already is not done.
                    self.purge_durable().await;
                }
                changed = flushed.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.purge_durable().await;
                }
            }
        }
    }

    /// Lets every log drop what is durable in `state/` and nobody else needs.
    async fn purge_durable(&self) {
        for group in self.all() {
            let durable = self.context.state.durable_applied(group.id);
            let Some(durable) = durable.filter(|d| Some(d.get()) > group.log().purged().map(|id| id.index)) else {
                continue;
            };
            if let Err(e) = group.purge_durable(durable).await {
                tracing::warn!(group = %group.id, error = %e, "the log could not be purged");
            }
        }
    }

    /// Ends every replica.
    pub async fn shutdown(&self) {
        let groups = std::mem::take(&mut *self.groups.write());
        for group in groups.into_values() {
            group.shutdown().await;
        }
        if let Err(e) = self.tasks.drain(PATIENCE).await {
            tracing::warn!(error = %e, "tasks of the replicas had to be aborted");
        }
    }
}

impl Replicas for Groups {
    fn find(&self, group: GroupId, replica: ReplicaId) -> Result<RaftHandle, String> {
        match self.get(group) {
            Some(found) if found.replica == replica => Ok(found.raft().clone()),
            Some(found) => Err(format!(
                "this node hosts replica {} of {group}, not {replica}",
                found.replica
            )),
            None => Err(format!("this node hosts no replica of {group}")),
        }
    }
}

/// When a peer is there again, the groups led here do not wait for their next attempt.
async fn follow_connections(peers: Peers, groups: Weak<Groups>, token: CancellationToken) {
    let mut connected = peers.connected();
    while let Some(Ok(())) = token.run_until_cancelled(connected.changed()).await {
        let Some(groups) = groups.upgrade() else { return };
        for group in groups.all() {
            if group.status().is_leader
                && let Err(e) = group.raft().trigger().reset_backoff([]).await
            {
                tracing::debug!(group = %group.id, error = %e, "the group has ended");
            }
        }
    }
}
