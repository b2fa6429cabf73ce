//! openraft's state machine: entries → the pure machines → one atomic write to `state/` each, with the applied marker.
//!
//! `state/` has no WAL: after a crash it is older than the log, and openraft applies the difference again. What apply
//! writes depends only on the entries and on the group's own state, so that applying again gives the same.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::alias::{SnapshotMetaOf, SnapshotOf, StoredMembershipOf};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use parking_lot::Mutex;
use prost::Message;

use super::catalog::{MetaChange, MetaObserver, changes, everything, forgotten};
use super::codec;
use super::load;
use super::log_store::GroupLog;
use super::purge::PurgeHold;
use super::shard::{Positions, RecentBudget, ShardDirectory, ShardShared};
use super::snapshot::{Content, GroupSnapshot, Pin};
use super::types::{Applied, LogId, Mainstem, StoredMembership};
use crate::base::metric_names as names;
use crate::machine::port::{MetaKind, ShardSink};
use crate::machine::{self, GroupOutcome, ShardMachine};
use crate::model::{GroupId, LogIndex, Sequence, ShardId, StoredBatch, Term};
use crate::storage::{StateBatch, StateDb, StorageError};
use crate::wire::internal as pb;

type SnapshotMeta = SnapshotMetaOf<Mainstem>;
type Snapshot = SnapshotOf<Mainstem, GroupSnapshot>;

fn io_error(e: StorageError) -> io::Error {
    io::Error::other(e)
}

async fn flush(state: &StateDb) -> io::Result<()> {
    let state = state.clone();
    tokio::task::spawn_blocking(move || state.flush())
        .await
        .map_err(io::Error::other)?
        .map_err(io_error)
}

/// Writes that may take a while, or wait for a flush, must not hold up the other tasks of this thread.
const BLOCKING_BYTES: usize = 64 << 10;

fn write(state: &StateDb, batch: StateBatch) -> io::Result<()> {
    if batch.bytes() < BLOCKING_BYTES {
        state.write(batch)
    } else {
        tokio::task::block_in_place(|| state.write(batch))
    }
    .map_err(io_error)
}

fn machine_error(group: GroupId, id: &LogId, e: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{group}: entry {id}: {e}"))
}

/// What a group needs from its node.
#[derive(Clone)]
pub struct GroupContext {
    pub state: StateDb,
    pub directory: Arc<ShardDirectory>,
    pub recent: Arc<RecentBudget>,
    /// Only called by the meta group.
    pub observer: Arc<dyn MetaObserver>,
}

/// The applied state of one group on this node.
pub struct GroupMachine {
    group: GroupId,
    context: GroupContext,
    log: GroupLog,
    machine: machine::GroupMachine,
    /// The public face of each shard of `machine`.
    shared: HashMap<ShardId, Arc<ShardShared>>,
    /// True position of `state/`. Entries at or below are skipped.
    applied: Option<LogId>,
    membership: StoredMembership,
    /// The snapshot that the state was last installed from. The log begins behind it.
    installed: Option<LogId>,
    /// What the log must keep for other replicas.
    hold: Arc<PurgeHold>,
    /// The snapshot openraft may purge up to.
    snapshot: Arc<Mutex<Option<SnapshotMeta>>>,
    apply_duration: metrics::Histogram,
}

impl GroupMachine {
    /// Loads what `state/` holds of the group.
    pub fn open(group: GroupId, context: GroupContext, log: GroupLog) -> io::Result<Self> {
        let state = &context.state;
        let marker = match state.applied(group).map_err(io_error)? {
            None => codec::Marker {
                applied: None,
                membership: StoredMembership::default(),
                installed: None,
            },
            Some((_, raw)) => codec::Marker::decode(&raw)?,
        };
        let (applied, membership) = (marker.applied, marker.membership);
        let machine = load::machine(group, state)?;
        let term = applied.map_or(Term::new(0), |a| Term::new(a.leader_id.term));
        let mut shared = HashMap::new();
        for shard in machine.shards() {
            let face = ShardShared::new(shard.shard(), group, context.recent.clone());
            face.publish(positions(shard, term));
            context.directory.insert(face.clone());
            shared.insert(shard.shard(), face);
        }
        if let Some(meta) = machine.meta() {
            context.observer.changed(&everything(meta));
        }
        // Once the log is purged openraft must find a snapshot; what `state/` held at the start is durable.
        let reported = reported(applied, marker.installed, &log);
        let snapshot = log.purged().and(reported).map(|id| SnapshotMeta {
            last_log_id: Some(id),
            last_membership: membership.clone(),
        });
        Ok(Self {
            group,
            context,
            log,
            machine,
            shared,
            applied,
            membership,
            installed: marker.installed,
            hold: Arc::default(),
            snapshot: Arc::new(Mutex::new(snapshot)),
            apply_duration: metrics::histogram!(names::RAFT_APPLY_DURATION_SECONDS),
        })
    }

    /// The snapshot that the state was last installed from. The log must begin behind it before anything is started.
    pub fn installed(&self) -> Option<LogId> {
        self.installed
    }

    /// What the log must keep for other replicas; shared with the one who knows of them.
    pub fn hold(&self) -> Arc<PurgeHold> {
        self.hold.clone()
    }

    fn reported(&self) -> Option<LogId> {
        reported(self.applied, self.installed, &self.log)
    }

    /// After `state/` was replaced: everything that was read from it is read again, and told.
    fn reload(&mut self) -> io::Result<()> {
        let before = std::mem::replace(&mut self.machine, load::machine(self.group, &self.context.state)?);
        let gone: Vec<_> = (self.shared.keys().copied())
            .filter(|shard| self.machine.shard(*shard).is_none())
            .collect();
        for shard in gone {
            self.retire(shard);
        }
        let term = self.applied.map_or(Term::new(0), |a| Term::new(a.leader_id.term));
        for machine in self.machine.shards() {
            let shard = machine.shard();
            let face = (self.shared.entry(shard))
                .or_insert_with(|| ShardShared::new(shard, self.group, self.context.recent.clone()));
            face.clear_recent();
            face.publish(positions(machine, term));
            self.context.directory.insert(face.clone());
        }
        if let (Some(before), Some(meta)) = (before.meta(), self.machine.meta()) {
            let mut changes = forgotten(before, meta);
            changes.extend(everything(meta));
            self.context.observer.changed(&changes);
        }
        Ok(())
    }

    /// A shard is not here any more.
    fn retire(&mut self, shard: ShardId) {
        if let Some(face) = self.shared.remove(&shard) {
            let mut last = face.positions();
            last.removed = true;
            face.clear_recent();
            face.publish(last);
            self.context.directory.remove(shard);
        }
    }

    fn apply_command(&mut self, id: &LogId, raw: Bytes, batch: &mut StateBatch) -> io::Result<(Applied, Touched)> {
        let term = Term::new(id.leader_id.term);
        let command = pb::GroupCommand::decode(raw).map_err(|e| machine_error(self.group, id, e))?;
        let mut touched = Touched {
            term,
            shard: command.op.as_ref().and_then(shard_of),
            ..Touched::default()
        };
        let mut sink = Recording {
            inner: batch,
            batches: &mut touched.batches,
            holes: &mut touched.holes,
        };
        let outcome = self
            .machine
            .apply(&self.context.state, &mut sink, term, &command)
            .map_err(|e| machine_error(self.group, id, e))?;
        if let GroupOutcome::Meta(outcome) = &outcome
            && let Some(meta) = self.machine.meta()
        {
            touched.meta = changes(meta, outcome);
        }
        Ok((Applied::Command(outcome), touched))
    }

    /// After the write: what others may now see.
    fn publish(&mut self, touched: Touched) {
        if let Some(shard) = touched.shard {
            match self.machine.shard(shard) {
                None => self.retire(shard),
                Some(machine) => {
                    let new = !self.shared.contains_key(&shard);
                    let face = self
                        .shared
                        .entry(shard)
                        .or_insert_with(|| ShardShared::new(shard, self.group, self.context.recent.clone()));
                    if touched.holes {
                        face.clear_recent();
                    }
                    for batch in touched.batches {
                        face.push_recent(batch);
                    }
                    face.publish(positions(machine, touched.term));
                    if new {
                        self.context.directory.insert(face.clone());
                    }
                }
            }
        }
        if !touched.meta.is_empty() {
            self.context.observer.changed(&touched.meta);
        }
    }

    fn marker(&self) -> Bytes {
        codec::encode_marker(self.applied.as_ref(), &self.membership, self.installed.as_ref())
    }
}

/// What is applied, so far as the log has it. `state/` may be ahead of what the log kept through a power failure
/// (trap C). Reporting more than the log holds would make openraft purge up to there; entries that are applied already
/// are skipped in apply. A log that does not begin behind the installed snapshot yet says nothing about it.
fn reported(applied: Option<LogId>, installed: Option<LogId>, log: &GroupLog) -> Option<LogId> {
    if log.reaches_back() && installed <= log.purged() {
        applied.min(log.last())
    } else {
        applied
    }
}

fn positions(machine: &ShardMachine, term: Term) -> Positions {
    Positions {
        floor: machine.floor(),
        tail: machine.tail(),
        term,
        messages: machine.messages(),
        bytes: machine.bytes(),
        first_time: machine.first_time(),
        last_time: machine.last_time(),
        revision: machine.revision(),
        next_expiry: machine.next_expiry(),
        removed: false,
    }
}

/// The shard that a command is about.
fn shard_of(op: &pb::group_command::Op) -> Option<ShardId> {
    use pb::group_command::Op;
    let raw = match op {
        Op::CreateShard(c) => c.shard_id,
        Op::UpdateShard(c) => c.shard_id,
        Op::RemoveShard(c) => c.shard_id,
        Op::Publish(c) => c.shard_id,
        Op::Expire(c) => c.shard_id,
        Op::Purge(c) => c.shard_id,
        Op::SealShard(c) => c.shard_id,
        Op::AdoptShard(c) => c.shard_id,
        Op::Meta(_) => return None,
    };
    Some(ShardId::new(raw))
}

/// What an entry changed, to be made visible once it is written.
#[derive(Default)]
struct Touched {
    term: Term,
    shard: Option<ShardId>,
    holes: bool,
    batches: Vec<StoredBatch>,
    meta: Vec<MetaChange>,
}

/// Passes everything on, and keeps the batches for the recent tail.
struct Recording<'a> {
    inner: &'a mut StateBatch,
    batches: &'a mut Vec<StoredBatch>,
    holes: &'a mut bool,
}

impl ShardSink for Recording<'_> {
    fn put_batch(&mut self, shard: ShardId, batch: &StoredBatch) {
        self.inner.put_batch(shard, batch);
        self.batches.push(batch.clone());
    }
    fn put_posting(&mut self, shard: ShardId, subject: &str, base: Sequence, offsets: &[u32]) {
        self.inner.put_posting(shard, subject, base, offsets);
    }
    fn put_holes(&mut self, shard: ShardId, base: Sequence, offsets: &[u32]) {
        *self.holes = true;
        self.inner.put_holes(shard, base, offsets);
    }
    fn put_ids(&mut self, shard: ShardId, at: Sequence, block: &[u8]) {
        self.inner.put_ids(shard, at, block);
    }
    fn drop_ids(&mut self, shard: ShardId, below: Sequence) {
        self.inner.drop_ids(shard, below);
    }
    fn put_producer(&mut self, shard: ShardId, producer: u64, record: &[u8]) {
        self.inner.put_producer(shard, producer, record);
    }
    fn drop_producer(&mut self, shard: ShardId, producer: u64) {
        self.inner.drop_producer(shard, producer);
    }
    fn put_shard(&mut self, shard: ShardId, group: GroupId, record: &[u8]) {
        self.inner.put_shard(shard, group, record);
    }
    fn drop_batches(&mut self, shard: ShardId, from: Sequence, to: Sequence) {
        self.inner.drop_batches(shard, from, to);
    }
    fn drop_shard(&mut self, shard: ShardId) {
        self.inner.drop_shard(shard);
    }
    fn put_meta(&mut self, kind: MetaKind, key: &[u8], record: &[u8]) {
        self.inner.put_meta(kind, key, record);
    }
    fn drop_meta(&mut self, kind: MetaKind, key: &[u8]) {
        self.inner.drop_meta(kind, key);
    }
}

impl RaftStateMachine<Mainstem> for GroupMachine {
    type SnapshotData = GroupSnapshot;
    type SnapshotBuilder = Builder;

    async fn applied_state(&mut self) -> Result<(Option<LogId>, StoredMembershipOf<Mainstem>), io::Error> {
        Ok((self.reported(), self.membership.clone()))
    }

    async fn apply<Strm>(&mut self, mut entries: Strm) -> Result<(), io::Error>
    where
        Strm: Stream<Item = Result<EntryResponder<Mainstem>, io::Error>> + Unpin + OptionalSend,
    {
        let begun = Instant::now();
        while let Some(next) = entries.next().await {
            let (entry, responder) = next?;
            let id = entry.log_id;
            if self.applied >= Some(id) {
                if let Some(responder) = responder {
                    responder.send(Applied::Done);
                }
                continue;
            }
            let mut batch = self.context.state.batch();
            let (applied, touched) = match entry.payload {
                EntryPayload::Blank => (Applied::Done, Touched::default()),
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(id), membership);
                    (Applied::Done, Touched::default())
                }
                EntryPayload::Normal(proposal) => self.apply_command(&id, proposal.0, &mut batch)?,
            };
            self.applied = Some(id);
            batch.set_applied(self.group, LogIndex::new(id.index), &self.marker());
            write(&self.context.state, batch)?;
            self.publish(touched);
            self.log.set_applied(id.index);
            if let Some(responder) = responder {
                responder.send(applied);
            }
        }
        self.apply_duration.record(begun.elapsed().as_secs_f64());
        Ok(())
    }

    async fn try_create_snapshot_builder(&mut self, force: bool) -> Option<Builder> {
        if !force {
            // Triggered by us after a flush: up to what that flush made durable, nothing to write.
            let index = self.hold.limit(self.context.state.durable_applied(self.group)?.get())?;
            let current = self
                .snapshot
                .lock()
                .as_ref()
                .and_then(|m| m.last_log_id)
                .map(|l| l.index);
            if current >= Some(index) {
                return None;
            }
            if self.membership.log_id().is_some_and(|id| id.index > index) {
                // The membership as of that point is not at hand any more; the next flush will do.
                return None;
            }
            let last_log_id = match self.log.id_at(index) {
                Ok(id) => Some(id),
                Err(e) => {
                    tracing::warn!(group = %self.group, error = %e, "the log cannot be purged up to the flushed state");
                    return None;
                }
            };
            return Some(Builder {
                meta: SnapshotMeta {
                    last_log_id,
                    last_membership: self.membership.clone(),
                },
                shards: self.shared.len(),
                snapshot: self.snapshot.clone(),
                flush: None,
            });
        }
        Some(Builder {
            meta: SnapshotMeta {
                last_log_id: self.applied,
                last_membership: self.membership.clone(),
            },
            shards: self.shared.len(),
            snapshot: self.snapshot.clone(),
            flush: Some(self.context.state.clone()),
        })
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        self.try_create_snapshot_builder(true)
            .await
            .expect("a forced builder is always made")
    }

    async fn install_snapshot(&mut self, meta: &SnapshotMeta, snapshot: GroupSnapshot) -> Result<(), io::Error> {
        if self.applied >= meta.last_log_id {
            return Ok(());
        }
        let staged = match snapshot.content {
            Content::Received(staged) => staged,
            Content::Pinned(pin) => pin.copy_to(&self.context.state).await?,
            Content::Local => {
                let what = format!("{}: a snapshot without its data cannot be installed", self.group);
                return Err(io::Error::new(io::ErrorKind::Unsupported, what));
            }
        };
        self.applied = meta.last_log_id;
        self.membership = meta.last_membership.clone();
        self.installed = meta.last_log_id;
        let index = LogIndex::new(meta.last_log_id.map_or(0, |l| l.index));
        let (state, marker) = (self.context.state.clone(), self.marker());
        let switch = tokio::task::spawn_blocking(move || state.install_group(staged, index, &marker));
        switch.await.map_err(io::Error::other)?.map_err(io_error)?;
        self.reload()?;
        *self.snapshot.lock() = Some(meta.clone());
        self.log.set_applied(index.get());
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot>, io::Error> {
        if self.snapshot.lock().is_none() {
            return Ok(None);
        }
        // What is sent is the state of now: nothing is applied while this runs.
        let Some(pin) = Pin::new(&self.context.state, self.group).await? else {
            return Ok(None);
        };
        Ok(Some(Snapshot {
            meta: SnapshotMeta {
                last_log_id: self.reported(),
                last_membership: self.membership.clone(),
            },
            snapshot: GroupSnapshot {
                shards: self.shared.len(),
                content: Content::Pinned(pin),
            },
        }))
    }
}

/// Makes a snapshot: a durable point of `state/`.
pub struct Builder {
    meta: SnapshotMeta,
    shards: usize,
    snapshot: Arc<Mutex<Option<SnapshotMeta>>>,
    /// Present if the point is not durable yet.
    flush: Option<StateDb>,
}

impl RaftSnapshotBuilder<Mainstem> for Builder {
    type SnapshotData = GroupSnapshot;

    async fn build_snapshot(&mut self) -> Result<Snapshot, io::Error> {
        if let Some(state) = &self.flush {
            flush(state).await?;
        }
        let mut current = self.snapshot.lock();
        if current.as_ref().and_then(|m| m.last_log_id) < self.meta.last_log_id {
            *current = Some(self.meta.clone());
        }
        Ok(Snapshot {
            meta: self.meta.clone(),
            snapshot: GroupSnapshot::local(self.shards),
        })
    }
}

/// Groups by id, for the registry.
pub(super) type GroupMap = BTreeMap<GroupId, super::group::Group>;
