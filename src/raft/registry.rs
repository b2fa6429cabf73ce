//! The replicas that run on this node, and the upkeep they share.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::RwLock;
use tokio::sync::{broadcast, oneshot};
use tokio_util::sync::CancellationToken;

use super::catalog::MetaObserver;
use super::group::{Group, Origin, ProposeError, RaftTimings};
use super::log_store::GroupLog;
use super::purge::LogKeep;
use super::shard::{RecentBudget, ShardDirectory};
use super::state_machine::{GroupContext, GroupMachine, GroupMap};
use super::succession;
use super::transport::{Peers, RaftHandle, Replicas, SnapshotProgress};
use super::watch::{self, GroupEvent};
use crate::base::Tasks;
use crate::base::metric_names as names;
use crate::machine::ShardMachine;
use crate::model::{GroupId, LogIndex, ReplicaId, ShardId};
use crate::storage::{Done, LogDb, StateDb, StorageError, Store};

/// How often idle shards give back the memory of their recent batches.
const SWEEP_INTERVAL: Duration = Duration::from_secs(10);

/// How often replicas, leaders and what is on its way between nodes are counted.
const COUNT_INTERVAL: Duration = Duration::from_secs(1);

/// Counts groups and leaders, and what waits between nodes.
struct Census {
    held: metrics::Gauge,
    led: metrics::Gauge,
    unanswered: metrics::Gauge,
}

impl Census {
    fn new() -> Self {
        Self {
            held: metrics::gauge!(names::RAFT_HELD_GROUPS),
            led: metrics::gauge!(names::RAFT_LED_GROUPS),
            unanswered: metrics::gauge!(names::RAFT_PEER_UNANSWERED_BYTES),
        }
    }

    fn take(&self, groups: &[Group], peers: Option<&Peers>) {
        let led = groups.iter().filter(|group| group.status().is_leader).count();
        self.held.set(groups.len() as f64);
        self.led.set(led as f64);
        if let Some(peers) = peers {
            let unanswered: usize = peers.links().iter().map(|link| link.unanswered_bytes).sum();
            self.unanswered.set(unanswered as f64);
        }
    }
}

/// How long the first voters of a group wait for the one that founds it.
const FOUNDER: Duration = Duration::from_secs(2);

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
        let tasks = Tasks::new("raft");
        let groups = Arc::new_cyclic(|this| Self {
            context: GroupContext {
                state: store.state().clone(),
                directory: Arc::new(ShardDirectory::default()),
                recent: RecentBudget::new(options.recent_bytes),
                observer,
                seals: Arc::default(),
                token: tasks.token(),
            },
            log: store.log().clone(),
            groups: RwLock::default(),
            options: options.clone(),
            tasks,
            events: broadcast::Sender::new(EVENTS_MAX),
            changing: tokio::sync::Mutex::default(),
            this: this.clone(),
        });
        if let Some(peers) = options.peers {
            groups.tasks.spawn(
                "reconnects",
                follow_connections(peers.clone(), groups.this.clone(), groups.tasks.token()),
            );
            groups.tasks.spawn(
                "successions",
                follow_ends(peers, groups.this.clone(), groups.tasks.token()),
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
        self.start_at(id, replica, origin, LogIndex::new(0)).await
    }

    /// As [`start_as`](Self::start_as); if it is empty, it takes no entries at or below the floor, but a snapshot.
    pub async fn start_at(
        &self,
        id: GroupId,
        replica: ReplicaId,
        origin: Origin,
        floor: LogIndex,
    ) -> Result<Group, ProposeError> {
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
        // A log is a replica's promises: no other one takes them over.
        let meta = self.log.meta(id).map_err(|e| stopped(e.to_string()))?;
        if let Some(retired) = meta.retired.filter(|retired| replica <= *retired) {
            // Its promises went with its log. A copy of the catalog that is behind may still name it.
            return Err(stopped(format!(
                "replica {retired} was removed from here: {replica} does not come back"
            )));
        }
        match meta.owner.filter(|owner| *owner != replica) {
            Some(owner) => {
                return Err(stopped(format!(
                    "the log here is that of replica {owner}, not of {replica}"
                )));
            }
            None if meta.quarantined => return Err(stopped("what a former replica has left here is set aside".into())),
            None if meta.owner.is_none() => {
                let owned = self.ask_log(|done| self.log.own(id, replica, done)).await;
                owned.map_err(|e| stopped(e.to_string()))?;
            }
            None => {}
        }
        let log = GroupLog::open(self.log.clone(), id).map_err(|e| stopped(e.to_string()))?;
        let machine = GroupMachine::open(id, self.context.clone(), log.clone()).map_err(|e| stopped(e.to_string()))?;
        let founders = match &origin {
            Origin::Found(members) if members.len() > 1 => Some(members.clone()),
            Origin::Found(_) | Origin::Join | Origin::Restart => None,
        };
        let group = Group::start(id, replica, origin, &self.options, log, machine).await?;
        group.set_floor(floor);
        self.groups.write().insert(id, group.clone());
        if let Some(members) = founders {
            let founding = found_late(group.clone(), members, self.tasks.token());
            self.tasks.spawn(format!("found-{id}"), founding);
        }
        let watcher = watch::watch(self.this.clone(), group.clone(), self.events.clone());
        self.tasks.spawn(format!("watch-{id}"), watcher);
        Ok(group)
    }

    /// Ends a replica that was removed from its group, and removes what it has left here. What is not yet removed after a
    /// crash is set aside, and removed by the next call. Afterwards the group may have another replica here.
    pub async fn clear_out(&self, id: GroupId) -> Result<(), StorageError> {
        let _changing = self.changing.lock().await;
        self.end(id).await;
        for shard in self.directory().all() {
            self.directory().abandon(shard.shard, id);
        }
        // In this order: a log whose purged part is nowhere would be damage.
        if !self.log.meta(id)?.quarantined {
            self.ask_log(|done| self.log.set_aside(id, done)).await?;
        }
        let (state, directory, here) = (self.context.state.clone(), self.directory().clone(), self.log.groups());
        let dropped = tokio::task::spawn_blocking(move || {
            // A sealed shard stays for the replica that will adopt it, whose log may be behind.
            let goes = |record: &[u8]| !ShardMachine::heir_in(record).is_some_and(|heir| here.contains(&heir));
            for (shard, ..) in state.shards()?.iter().filter(|(_, owner, _)| *owner == id) {
                let _applying = directory.applying(*shard);
                state.drop_shard_of(id, *shard, goes)?;
            }
            state.drop_group(id)
        });
        dropped.await.map_err(|_| StorageError::Closed)??;
        let meta = self.log.meta(id)?;
        let retired = meta.owner.max(meta.retired);
        self.ask_log(|done| self.log.clear(id, retired, done)).await
    }

    /// Removes a shard that is sealed in a group and that nobody will adopt here. The group's replica here ends; it is to be
    /// started again.
    pub async fn drop_sealed(&self, id: GroupId, shard: ShardId) -> Result<(), StorageError> {
        let _changing = self.changing.lock().await;
        self.end(id).await;
        self.directory().abandon(shard, id);
        let (state, directory) = (self.context.state.clone(), self.directory().clone());
        let dropped = tokio::task::spawn_blocking(move || {
            let applying = directory.applying(shard);
            state.drop_shard_of(id, shard, |record| ShardMachine::heir_in(record).is_some())?;
            drop(applying);
            state.flush()
        });
        dropped.await.map_err(|_| StorageError::Closed)?
    }

    async fn ask_log(&self, ask: impl FnOnce(Done)) -> Result<(), StorageError> {
        let (tx, rx) = oneshot::channel();
        // Who asks may have been cancelled.
        ask(Box::new(move |result| drop(tx.send(result))));
        rx.await.map_err(|_| StorageError::Closed)?
    }

    /// The replicas that have left something here, running or not, and those of which it is not known whose it is.
    pub fn left_here(&self) -> Vec<(GroupId, Option<ReplicaId>)> {
        let mut groups: BTreeSet<GroupId> = self.log.groups().into_iter().chain(self.log.quarantined()).collect();
        groups.extend(self.context.state.applied_groups().into_iter().map(|(group, _)| group));
        let owner = |group: &GroupId| {
            let running = self.get(*group).map(|group| group.replica);
            running.or_else(|| self.log.meta(*group).ok()?.owner)
        };
        groups.iter().map(|group| (*group, owner(group))).collect()
    }

    /// Whether what there is of the group here is of another replica.
    pub fn is_other(&self, id: GroupId, replica: ReplicaId) -> bool {
        let meta = self.log.meta(id).unwrap_or_default();
        meta.quarantined || meta.owner.is_some_and(|owner| owner != replica) || meta.retired >= Some(replica)
    }

    /// Whether what there is of the group here is set aside, and not yet removed.
    pub fn is_aside(&self, id: GroupId) -> bool {
        self.log.meta(id).is_ok_and(|meta| meta.quarantined)
    }

    /// Ends a replica; its data stays. True if there was one.
    pub async fn stop(&self, id: GroupId) -> bool {
        let _changing = self.changing.lock().await;
        self.end(id).await
    }

    async fn end(&self, id: GroupId) -> bool {
        let group = self.groups.write().remove(&id);
        match group {
            Some(group) => {
                group.shutdown().await;
                // Who reads its shards here must look elsewhere.
                self.nudge(id);
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

    /// How often damaged records were met with.
    pub fn damage_found(&self) -> u64 {
        self.state().damage_found()
    }

    /// The replicas here that cannot go on, and why. A store that has stopped as a whole is another matter: it is checked at
    /// the next start.
    pub fn faults(&self) -> Vec<(GroupId, ReplicaId, String)> {
        let groups = self.groups.read();
        let faulty = groups.values().filter(|group| self.log.meta(group.id).is_ok());
        faulty
            .filter_map(|group| Some((group.id, group.replica, group.fault()?.to_owned())))
            .collect()
    }

    /// Whether a replica of the group runs here, and goes on. One that cannot shows what it has where nobody else has it.
    pub fn holds(&self, id: GroupId) -> bool {
        self.groups.read().get(&id).is_some_and(|group| self.goes_on(group))
    }

    /// The replica of the group here, if it goes on.
    pub fn serving(&self, id: GroupId) -> Option<Group> {
        let groups = self.groups.read();
        groups.get(&id).filter(|group| self.goes_on(group)).cloned()
    }

    fn goes_on(&self, group: &Group) -> bool {
        group.fault().is_none() || self.options.peers.is_none()
    }

    /// Who reads the shards of a group here looks whether they still can.
    pub(super) fn nudge(&self, id: GroupId) {
        let all = self.directory().all();
        all.iter()
            .filter(|shard| shard.group() == id)
            .for_each(|shard| shard.nudge());
    }

    pub fn all(&self) -> Vec<Group> {
        self.groups.read().values().cloned().collect()
    }

    /// The other nodes; `None`: there are none.
    pub fn peers(&self) -> Option<&Peers> {
        self.options.peers.as_ref()
    }

    /// The snapshots that travel from and to this node, the oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotProgress> {
        self.peers().map(Peers::snapshots).unwrap_or_default()
    }

    /// The shards that have a replica here.
    pub fn directory(&self) -> &Arc<ShardDirectory> {
        &self.context.directory
    }

    /// The state that the replicas apply to.
    pub fn state(&self) -> &StateDb {
        &self.context.state
    }

    /// Runs until cancelled: counts leaders; after each flush of `state/` lets every log drop what is now durable there,
    /// and takes the memory of recent batches back from idle shards.
    pub async fn upkeep(self: Arc<Self>, token: CancellationToken) {
        let mut flushed = self.context.state.flush_generation();
        let mut sweep = tokio::time::interval(SWEEP_INTERVAL);
        let mut count = tokio::time::interval(COUNT_INTERVAL);
        count.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        let census = Census::new();
        loop {
            tokio::select! {
                () = token.cancelled() => return,
                _ = count.tick() => census.take(&self.all(), self.peers()),
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

    /// Lets logs drop what is at or below their floor, though little was written and no flush is due.
    pub async fn purge_to_floors(&self) {
        let reached =
            |group: &Group| group.is_below_floor() && self.context.state.applied_index(group.id) >= Some(group.floor());
        let below: Vec<Group> = self.all().into_iter().filter(reached).collect();
        let durable = |group: &Group| self.context.state.durable_applied(group.id) >= Some(group.floor());
        if below.is_empty() {
            return;
        }
        if !below.iter().all(durable) {
            let state = self.context.state.clone();
            // A failed flush has poisoned the store, which ends the node.
            if !matches!(tokio::task::spawn_blocking(move || state.flush()).await, Ok(Ok(()))) {
                return;
            }
        }
        self.purge_durable().await;
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
    fn heard_leader(&self, group: GroupId) {
        if let Some(group) = self.groups.read().get(&group) {
            *group.heard.lock() = Some(std::time::Instant::now());
        }
    }

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

    fn refuses(&self, group: GroupId, from: u64) -> bool {
        self.get(group).is_some_and(|found| found.refuses(from))
    }
}

/// A group whose founder does not come is founded by another of its first voters.
async fn found_late(group: Group, members: BTreeSet<ReplicaId>, token: CancellationToken) {
    if token.run_until_cancelled(tokio::time::sleep(FOUNDER)).await.is_none() {
        return;
    }
    if let Err(error) = group.found(&members).await {
        tracing::warn!(group = %group.id, %error, "the group was not founded here");
    }
}

/// Replaces the leaders on nodes whose process has ended.
async fn follow_ends(peers: Peers, groups: Weak<Groups>, token: CancellationToken) {
    let mut ended = peers.ended();
    loop {
        let node = match token.run_until_cancelled(ended.recv()).await {
            Some(Ok(node)) => node,
            // Those that were missed are replaced when their leases end.
            Some(Err(broadcast::error::RecvError::Lagged(_))) => continue,
            Some(Err(broadcast::error::RecvError::Closed)) | None => return,
        };
        let Some(groups) = groups.upgrade() else { return };
        let mut led_there = 0;
        for group in groups.all() {
            let leader = group.status().leader;
            if let Some(dead) = leader.filter(|leader| peers.map().node_of(*leader) == Some(node)) {
                led_there += 1;
                let succession = succession::succeed(group.clone(), dead);
                let token = groups.tasks.token();
                groups.tasks.spawn(format!("succeed-{}", group.id), async move {
                    token.run_until_cancelled(succession).await;
                });
            }
        }
        tracing::info!(%node, led_there, "the process of a node has ended: its groups get other leaders");
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
