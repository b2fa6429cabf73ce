//! openraft's state machine: entries → the pure machines → one atomic write to `state/` each, with the applied marker.
//!
//! `state/` has no WAL: after a crash it is older than the log, and openraft applies the difference again. What apply
//! writes depends only on the entries and on the group's own state, so that applying again gives the same.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use openraft::alias::{SnapshotMetaOf, SnapshotOf, StoredMembershipOf};
use openraft::storage::{EntryResponder, RaftStateMachine};
use openraft::{EntryPayload, OptionalSend, RaftSnapshotBuilder};
use parking_lot::Mutex;
use prost::Message;
use tokio::sync::Notify;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::catalog::{MetaObserver, changes, everything, forgotten};
use super::codec;
use super::load;
use super::log_store::GroupLog;
use super::purge::PurgeHold;
use super::recording::{Recording, Touched, shard_of};
use super::shard::{Positions, RecentBudget, ShardDirectory, ShardShared};
use super::snapshot::{Content, GroupSnapshot, Pin};
use super::types::{Applied, LogId, Mainstem, StoredMembership};
use crate::base::blocking::{run_blocking, runs_in_place};
use crate::base::metric_names as names;
use crate::machine::{self, GroupOutcome, ShardMachine};
use crate::model::{GroupId, LogIndex, ShardId, Term};
use crate::storage::{StateBatch, StateDb, StorageError};
use crate::wire::internal as pb;

type SnapshotMeta = SnapshotMetaOf<Mainstem>;
type Snapshot = SnapshotOf<Mainstem, GroupSnapshot>;

fn io_error(e: StorageError) -> io::Error {
    io::Error::other(e)
}

async fn flush(state: &StateDb) -> io::Result<()> {
    let state = state.clone();
    run_blocking(move || state.flush())
        .await
        .map_err(io::Error::other)?
        .map_err(io_error)
}

/// Writes that may take a while, or wait for a flush, must not hold up the other tasks of this thread.
const BLOCKING_BYTES: usize = 64 << 10;

fn write(state: &StateDb, batch: StateBatch) -> io::Result<()> {
    if batch.bytes() < BLOCKING_BYTES || runs_in_place() {
        state.write(batch)
    } else {
        tokio::task::block_in_place(|| state.write(batch))
    }
    .map_err(io_error)
}

fn machine_error(group: GroupId, id: &LogId, e: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{group}: entry {id}: {e}"))
}

/// How often a replica that waits for another one's seal looks without being woken.
const SEAL_LOOK: Duration = Duration::from_secs(1);

/// What a group needs from its node.
#[derive(Clone)]
pub struct GroupContext {
    pub state: StateDb,
    pub directory: Arc<ShardDirectory>,
    pub recent: Arc<RecentBudget>,
    /// Only called by the meta group.
    pub observer: Arc<dyn MetaObserver>,
    /// Woken when a replica here has applied a seal, or taken a snapshot over: what another one waits for may be there.
    pub seals: Arc<Notify>,
    /// Ends waits that would otherwise not end with their replica.
    pub token: CancellationToken,
}

/// The applied state of one group on this node.
pub struct GroupMachine {
    group: GroupId,
    context: GroupContext,
    log: GroupLog,
    machine: machine::GroupMachine,
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
    /// Cancelled by whoever ends the replica.
    stop: CancellationToken,
    /// Cancelled when nothing of this replica writes any more.
    ended: CancellationToken,
    _ended: DropGuard,
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
        let machine = load::machine(group, state, &context.directory)?;
        let (stop, ended) = (context.token.child_token(), CancellationToken::new());
        if let Some(meta) = machine.meta() {
            context.observer.changed(&everything(meta));
        }
        // Once the log is purged openraft must find a snapshot; what `state/` held at the start is durable.
        let reported = reported(applied, marker.installed, &log);
        let snapshot = log.purged().and(reported).map(|id| SnapshotMeta {
            last_log_id: Some(id),
            last_membership: membership.clone(),
        });
        let opened = Self {
            group,
            context,
            log,
            machine,
            applied,
            membership,
            installed: marker.installed,
            hold: Arc::default(),
            snapshot: Arc::new(Mutex::new(snapshot)),
            apply_duration: metrics::histogram!(names::RAFT_APPLY_DURATION_SECONDS),
            stop,
            _ended: ended.clone().drop_guard(),
            ended,
        };
        opened.show_all()?;
        Ok(opened)
    }

    /// Cancelled by whoever ends the replica: it waits for nothing any more.
    pub fn stop(&self) -> CancellationToken {
        self.stop.clone()
    }

    /// Cancelled when nothing of this replica writes to the state any more.
    pub fn ended(&self) -> CancellationToken {
        self.ended.clone()
    }

    /// The snapshot that the state was last installed from. The log must begin behind it before anything is started.
    pub fn installed(&self) -> Option<LogId> {
        self.installed
    }

    /// The members of the group, as applied.
    pub fn membership(&self) -> &StoredMembership {
        &self.membership
    }

    /// What the log must keep for other replicas; shared with the one who knows of them.
    pub fn hold(&self) -> Arc<PurgeHold> {
        self.hold.clone()
    }

    /// Sees to it that the replica can start though others here, which it must wait for, have not yet.
    pub fn wait_for_nobody(&self) -> io::Result<()> {
        match load::first_that_waits(&self.log, self.applied, &self.context.state)? {
            Some(index) => self.log.forget_committed(index),
            None => Ok(()),
        }
    }

    fn reported(&self) -> Option<LogId> {
        reported(self.applied, self.installed, &self.log)
    }

    /// After `state/` was replaced: everything that was read from it is read again, and told.
    fn reload(&mut self) -> io::Result<()> {
        let loaded = load::machine(self.group, &self.context.state, &self.context.directory)?;
        let before = std::mem::replace(&mut self.machine, loaded);
        for shard in before.shards().map(ShardMachine::shard) {
            if self.machine.shard(shard).is_none() {
                let _applying = self.context.directory.applying(shard);
                self.retire(shard);
            }
        }
        self.show_all()?;
        self.context.directory.end_arrivals(self.group);
        if let (Some(before), Some(meta)) = (before.meta(), self.machine.meta()) {
            let mut changes = forgotten(before, meta);
            changes.extend(everything(meta));
            self.context.observer.changed(&changes);
        }
        Ok(())
    }

    /// Shows every shard that `state/` has as this group's.
    fn show_all(&self) -> io::Result<()> {
        let term = self.applied.map_or(Term::new(0), |a| Term::new(a.leader_id.term));
        for machine in self.machine.shards() {
            let shard = machine.shard();
            let _applying = self.context.directory.applying(shard);
            // Another group's replica may have adopted it since it was loaded.
            if self.context.state.owner_of(shard).map_err(io_error)? != Some(self.group) {
                continue;
            }
            let at = positions(machine, term);
            let face = self.face(shard, machine, at);
            face.clear_recent();
            face.publish(at);
        }
        Ok(())
    }

    fn face(&self, shard: ShardId, machine: &ShardMachine, at: Positions) -> Arc<ShardShared> {
        let context = &self.context;
        let heir = machine.seal().map(|seal| GroupId::new(seal.to_group));
        context.directory.face(shard, (self.group, heir), &context.recent, at)
    }

    /// A shard is not here any more. One that went to another group is not gone.
    fn retire(&self, shard: ShardId) {
        let directory = &self.context.directory;
        if let Some(face) = directory.get(shard).filter(|face| face.group() == self.group) {
            let mut last = face.positions();
            last.removed = true;
            face.clear_recent();
            face.publish(last);
            directory.remove(shard);
        }
    }

    /// Waits until this node's own replica of another group has applied what the command builds on.
    async fn wait_for_others(&self, command: &pb::GroupCommand) -> io::Result<()> {
        loop {
            let mut woken = std::pin::pin!(self.context.seals.notified());
            woken.as_mut().enable();
            let Some(group) = load::waits_for(command, &self.context.state)? else {
                return Ok(());
            };
            tokio::select! {
                () = woken => {}
                () = tokio::time::sleep(SEAL_LOOK) => {}
                () = self.stop.cancelled() => {
                    return Err(io::Error::other(format!("{}: ended while it waited for {group}", self.group)));
                }
            }
        }
    }

    /// A shard goes to another group only after every replica of this one has applied its seal (0048): whoever finds another
    /// one in its place must not go on.
    fn must_own(&self, id: &LogId, shard: ShardId) -> io::Result<()> {
        let owner = self.context.directory.owner(shard);
        let elsewhere = owner.is_some_and(|owner| owner != self.group);
        let open = |machine: &ShardMachine| machine.seal().is_none();
        if elsewhere && self.machine.shard(shard).is_some_and(open) {
            let why = format!("another group has {shard}, which was not sealed here");
            return Err(machine_error(self.group, id, why));
        }
        Ok(())
    }

    /// Applies a command and writes what it does, with the applied marker, which is set already.
    fn apply_command(&mut self, id: &LogId, command: &pb::GroupCommand, mut batch: StateBatch) -> io::Result<Applied> {
        let shard = command.op.as_ref().and_then(shard_of);
        let directory = self.context.directory.clone();
        let _applying = shard.map(|shard| directory.applying(shard));
        if let Some(shard) = shard {
            self.must_own(id, shard)?;
        }
        let (applied, touched) = self.run_command(id, command, shard, &mut batch)?;
        self.write_applied(id, batch)?;
        self.publish(touched);
        if matches!(applied, Applied::Command(GroupOutcome::Sealed { .. })) {
            self.context.seals.notify_waiters();
        }
        Ok(applied)
    }

    fn write_applied(&mut self, id: &LogId, mut batch: StateBatch) -> io::Result<()> {
        self.applied = Some(*id);
        batch.set_applied(self.group, LogIndex::new(id.index), &self.marker());
        write(&self.context.state, batch)
    }

    fn run_command(
        &mut self,
        id: &LogId,
        command: &pb::GroupCommand,
        shard: Option<ShardId>,
        batch: &mut StateBatch,
    ) -> io::Result<(Applied, Touched)> {
        let term = Term::new(id.leader_id.term);
        let mut touched = Touched {
            term,
            shard,
            ..Touched::default()
        };
        let mut sink = Recording {
            inner: batch,
            batches: &mut touched.batches,
            holes: &mut touched.holes,
        };
        let outcome = self
            .machine
            .apply(&self.context.state, &mut sink, term, command)
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
                    if let Some(seal) = machine.seal() {
                        // Nothing of it changes here any more; another group's replica may have its face by now.
                        let face = self.context.directory.get(shard);
                        if let Some(face) = face.filter(|face| face.group() == self.group) {
                            face.leave_to(GroupId::new(seal.to_group));
                        }
                        return;
                    }
                    let at = positions(machine, touched.term);
                    let face = self.face(shard, machine, at);
                    if touched.holes {
                        face.clear_recent();
                    }
                    for batch in touched.batches {
                        face.push_recent(batch);
                    }
                    face.publish(at);
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
            let batch = self.context.state.batch();
            let applied = match entry.payload {
                EntryPayload::Blank => {
                    self.write_applied(&id, batch)?;
                    Applied::Done
                }
                EntryPayload::Membership(membership) => {
                    self.membership = StoredMembership::new(Some(id), membership);
                    self.write_applied(&id, batch)?;
                    Applied::Done
                }
                EntryPayload::Normal(proposal) => {
                    let command =
                        pb::GroupCommand::decode(proposal.0).map_err(|e| machine_error(self.group, &id, e))?;
                    self.wait_for_others(&command).await?;
                    self.apply_command(&id, &command, batch)?
                }
            };
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
                shards: self.machine.shards().len(),
                snapshot: self.snapshot.clone(),
                flush: None,
            });
        }
        Some(Builder {
            meta: SnapshotMeta {
                last_log_id: self.applied,
                last_membership: self.membership.clone(),
            },
            shards: self.machine.shards().len(),
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
            if let Content::Received(staged) = snapshot.content {
                staged.discard();
            }
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
        // What is sealed here and not there was adopted there. Its other group's replica here may be behind: it finds it here.
        let sealed = self.machine.shards().filter(|shard| shard.seal().is_some());
        let sealed: BTreeSet<ShardId> = sealed.map(ShardMachine::shard).collect();
        // From here on no other group's replica here applies to them.
        for shard in staged.shard_ids() {
            let _applying = self.context.directory.applying(shard);
            self.context.directory.begin_arrival(shard, self.group);
        }
        let (state, marker) = (self.context.state.clone(), self.marker());
        let switch = run_blocking(move || state.install_group(staged, &sealed, index, &marker));
        switch.await.map_err(io::Error::other)?.map_err(io_error)?;
        self.reload()?;
        *self.snapshot.lock() = Some(meta.clone());
        self.log.set_applied(index.get());
        self.context.seals.notify_waiters();
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
                shards: self.machine.shards().len(),
                bytes: self.machine.shards().map(ShardMachine::bytes).sum(),
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
