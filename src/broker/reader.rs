//! Reading one shard: from memory where the batch is recent, from `state/` otherwise; whole batches as the producer
//! encoded them, or cut to what was asked for. Waiting for new messages is waiting for the next apply; nothing polls.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use tokio::sync::watch;

use super::error::ReadError;
use super::lookup::left;
use super::remote::RemoteShard;
use super::{Broker, Face};
use crate::machine::port::ShardView;
use crate::model::batch::{BatchView, Codec, RecordView};
use crate::model::subject::FilterSet;
use crate::model::{Sequence, ShardId, StoredBatch, Term, TimeUs};
use crate::raft::{Groups, Positions, ShardShared};
use crate::storage::StorageError;

/// One fill from memory or disk reads about this much …
pub const FILL_BYTES: usize = 2 << 20;
/// … or this much, where many shards are read at a time.
const FILL_BYTES_MIN: usize = 64 << 10;
/// Batches looked at in one step when none of them has anything to deliver, before the reader yields.
const SCAN_BATCHES: usize = 256;

/// What a step found.
#[derive(Debug)]
pub enum Step {
    /// Something to deliver. The reader stands behind it.
    Deliver(Delivery),
    /// Nothing to deliver in what was looked at, but there is more; `next` moved on.
    Skipped,
    /// [from, to) is no longer retained; the reader stands at `to`.
    Truncated { from: Sequence, to: Sequence },
    /// Everything up to the tail was read.
    AtTail(Sequence),
}

/// A batch to deliver.
#[derive(Debug, Clone)]
pub struct Delivery {
    /// Sequence of the first record that has one.
    pub base: Sequence,
    pub append_time: TimeUs,
    pub term: Term,
    /// As stored, or cut.
    pub batch: Bytes,
    /// For a batch as stored: positions without a sequence.
    pub absent: Vec<u32>,
    /// For a cut batch: each record's sequence as an offset from `base`. Empty for a batch as stored.
    pub offsets: Vec<u32>,
    /// Records below are not for this reader.
    pub skip_below: Option<Sequence>,
    /// Messages delivered.
    pub messages: u64,
}

impl Delivery {
    /// The delivered records with their sequences.
    pub fn records(&self) -> Result<Vec<(Sequence, OwnedRecord)>, ReadError> {
        let view = BatchView::trusted(self.batch.clone()).map_err(damaged)?;
        let mut out = Vec::new();
        let mut absent = self.absent.iter().copied().peekable();
        let mut next = 0u32;
        for record in view.records() {
            let record = record.map_err(damaged)?;
            let offset = if self.offsets.is_empty() {
                if absent.next_if_eq(&record.position).is_some() {
                    continue;
                }
                next += 1;
                next - 1
            } else {
                match self.offsets.get(record.position as usize) {
                    Some(offset) => *offset,
                    None => return Err(ReadError::Damaged("a cut batch has more records than offsets".into())),
                }
            };
            let sequence = self.base.plus(u64::from(offset));
            if self.skip_below.is_none_or(|floor| sequence >= floor) {
                out.push((sequence, OwnedRecord::of(&record)));
            }
        }
        Ok(out)
    }
}

/// A record on its own, for the simple calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OwnedRecord {
    pub subject: String,
    pub key: Option<Bytes>,
    pub message_id: Option<String>,
    pub event_time: Option<TimeUs>,
    pub headers: Vec<(String, Bytes)>,
    pub payload: Bytes,
}

impl OwnedRecord {
    fn of(record: &RecordView<'_>) -> Self {
        Self {
            subject: record.subject.to_owned(),
            key: record.key.map(Bytes::copy_from_slice),
            message_id: record.message_id.map(str::to_owned),
            event_time: record.event_time,
            headers: record
                .headers
                .into_iter()
                .map(|(name, value)| (name.to_owned(), Bytes::copy_from_slice(value)))
                .collect(),
            payload: Bytes::copy_from_slice(record.payload),
        }
    }
}

pub(super) fn damaged(e: impl std::fmt::Display) -> ReadError {
    ReadError::Damaged(e.to_string())
}

pub(super) fn storage(e: StorageError) -> ReadError {
    if matches!(e, StorageError::Corrupt { .. }) {
        ReadError::Damaged(e.to_string())
    } else {
        ReadError::Storage(e.to_string())
    }
}

/// Where a reader's batches come from.
enum Source {
    /// The replica here.
    Here {
        shared: Arc<ShardShared>,
        groups: Arc<Groups>,
    },
    /// A replica on another node.
    There(Arc<RemoteShard>),
}

impl Source {
    fn of(face: Face, groups: &Arc<Groups>) -> (Self, watch::Receiver<Positions>) {
        match face {
            Face::Here { shared, .. } => {
                let (positions, groups) = (shared.watch(), groups.clone());
                (Source::Here { shared, groups }, positions)
            }
            Face::There(remote) => {
                let positions = remote.watch();
                (Source::There(remote), positions)
            }
        }
    }

    fn shard(&self) -> ShardId {
        match self {
            Source::Here { shared, .. } => shared.shard,
            Source::There(remote) => remote.shard,
        }
    }
}

/// A batch read ahead.
struct Ahead {
    batch: StoredBatch,
    /// Offsets of records deleted since, of a batch from elsewhere; those of a batch here are looked up when it is
    /// delivered.
    holes: Option<Vec<u32>>,
}

impl From<StoredBatch> for Ahead {
    fn from(batch: StoredBatch) -> Self {
        Self { batch, holes: None }
    }
}

/// A reader's place in one shard.
pub struct ShardReader {
    source: Source,
    /// Knows where to go on when the replica that is read leaves this node.
    broker: Weak<Broker>,
    positions: watch::Receiver<Positions>,
    /// Next sequence to look at. Advanced by this reader.
    next: Sequence,
    filters: Option<FilterSet>,
    /// Batches read ahead, beginning with the one that holds `next`.
    ahead: VecDeque<Ahead>,
    fill_bytes: usize,
    /// Read no more at a time than is needed.
    frugal: bool,
}

impl ShardReader {
    /// A reader that stands at `next`. Without filters everything is delivered.
    pub(super) fn new(broker: &Broker, face: Face, next: Sequence, filters: Option<FilterSet>) -> Self {
        let (source, positions) = Source::of(face, broker.groups());
        Self {
            source,
            broker: broker.this.clone(),
            positions,
            next,
            filters,
            ahead: VecDeque::new(),
            fill_bytes: FILL_BYTES,
            frugal: false,
        }
    }

    /// The shard that is read.
    pub fn shard(&self) -> ShardId {
        self.source.shard()
    }

    /// Reads ahead as one of so many that are read together.
    pub fn among(mut self, readers: usize) -> Self {
        self.fill_bytes = (FILL_BYTES / readers.max(1)).max(FILL_BYTES_MIN);
        self
    }

    /// Bytes of the batches read ahead.
    pub fn ahead_bytes(&self) -> usize {
        self.ahead.iter().map(|a| a.batch.batch.len()).sum()
    }

    /// Gives the batches read ahead back; they are read again when they are wanted.
    pub fn forget_ahead(&mut self) {
        self.ahead = VecDeque::new();
    }

    /// From now on reads ahead, or not: who cannot keep what he reads would read it again and again.
    pub fn set_frugal(&mut self, frugal: bool) {
        self.frugal = frugal;
    }

    /// Whether a step would do anything but find the tail.
    pub fn has_more(&self) -> bool {
        let at = self.positions();
        at.removed || self.next < at.floor || self.next < at.tail || self.is_orphan()
    }

    /// Whether the replica that is read has left this node: nothing new comes from it.
    fn is_orphan(&self) -> bool {
        match &self.source {
            Source::Here { shared, groups } => !groups.holds(shared.group()),
            Source::There(_) => false,
        }
    }

    /// Next sequence to be looked at.
    pub fn next(&self) -> Sequence {
        self.next
    }

    /// As of the last apply.
    pub fn positions(&self) -> Positions {
        *self.positions.borrow()
    }

    /// Returns when the shard has changed since the last call of `step`.
    pub async fn changed(&mut self) {
        // The sender lives in the source, which this reader holds.
        let _ = self.positions.changed().await;
    }

    /// Takes one step. `messages` and `bytes` bound what is delivered, except that one message is always delivered
    /// whole.
    pub async fn step(&mut self, messages: u64, bytes: u64) -> Result<Step, ReadError> {
        if self.is_orphan() {
            self.go_elsewhere().await?;
        }
        let at = *self.positions.borrow_and_update();
        if at.removed {
            return Err(ReadError::Removed);
        }
        if self.next < at.floor {
            let from = self.next;
            self.next = at.floor;
            self.ahead.clear();
            return Ok(Step::Truncated { from, to: at.floor });
        }
        if self.next >= at.tail {
            // Who waits now is not woken by a replica that left a moment ago.
            return match self.is_orphan() {
                true => Ok(Step::Skipped),
                false => Ok(Step::AtTail(at.tail)),
            };
        }
        for _ in 0..SCAN_BATCHES {
            if self.next >= at.tail {
                return Ok(Step::Skipped);
            }
            self.fill().await?;
            if self.ahead.is_empty() && self.is_orphan() {
                // What is not there is not gone: its replica is.
                return Ok(Step::Skipped);
            }
            let Some(ahead) = self.ahead.front() else {
                // Trimmed, or every batch up to the tail was deleted, between the look at the positions and the read.
                let now = *self.positions.borrow();
                self.next = if now.floor > self.next { now.floor } else { at.tail };
                return Ok(Step::Skipped);
            };
            let delivery = self.cut(ahead, at.floor, messages.max(1), bytes)?;
            let end = ahead.batch.end();
            if self.is_orphan() {
                // What was deleted of the batch may have been forgotten before it was asked for.
                return Ok(Step::Skipped);
            }
            match delivery {
                None => {
                    self.next = end;
                    self.ahead.pop_front();
                }
                Some((delivery, next)) => {
                    self.next = next;
                    if next >= end {
                        self.ahead.pop_front();
                    }
                    return Ok(Step::Deliver(delivery));
                }
            }
        }
        Ok(Step::Skipped)
    }

    /// The replica that was read has left this node: goes on with another one, where this reader stands.
    async fn go_elsewhere(&mut self) -> Result<(), ReadError> {
        let face = {
            let broker = self.broker.upgrade().ok_or_else(left)?;
            broker.face_now(self.source.shard()).ok_or_else(left)?
        };
        let Source::Here { groups, .. } = &self.source else {
            return Ok(());
        };
        if let Face::There(remote) = &face {
            // So that its tail is known before it is told.
            remote.barrier().await?;
        }
        (self.source, self.positions) = Source::of(face, &groups.clone());
        self.ahead.clear();
        Ok(())
    }

    async fn fill(&mut self) -> Result<(), ReadError> {
        while self.ahead.front().is_some_and(|a| a.batch.end() <= self.next) {
            self.ahead.pop_front();
        }
        if !self.ahead.is_empty() {
            return Ok(());
        }
        let fill_bytes = if self.frugal { FILL_BYTES_MIN } else { self.fill_bytes };
        match &self.source {
            Source::Here { shared, groups } => {
                if let Some(recent) = shared.recent_from(self.next, fill_bytes) {
                    self.ahead = recent.into_iter().map(Ahead::from).collect();
                    return Ok(());
                }
                let state = groups.state().clone();
                let (shard, from, bytes) = (shared.shard, self.next, fill_bytes);
                let read = tokio::task::spawn_blocking(move || state.read_batches(shard, from, bytes))
                    .await
                    .map_err(|e| ReadError::Storage(e.to_string()))?
                    .map_err(storage)?;
                self.ahead = read.into_iter().map(Ahead::from).collect();
            }
            Source::There(remote) => {
                let fetched = remote.fetch(self.next, fill_bytes).await?;
                let ahead = fetched.into_iter().map(|(batch, holes)| Ahead {
                    batch,
                    holes: Some(holes),
                });
                self.ahead = ahead.collect();
            }
        }
        Ok(())
    }

    fn holes(&self, ahead: &Ahead) -> Result<Vec<u32>, ReadError> {
        match (&self.source, &ahead.holes) {
            (_, Some(holes)) => Ok(holes.clone()),
            (Source::Here { shared, groups }, None) => {
                let holes = groups.state().holes(shared.shard, ahead.batch.base);
                holes.map_err(damaged)
            }
            (Source::There(_), None) => Ok(Vec::new()),
        }
    }

    /// What of a batch is delivered, and where the reader stands behind it. `None`: nothing of it.
    fn cut(
        &self,
        ahead: &Ahead,
        floor: Sequence,
        messages: u64,
        bytes: u64,
    ) -> Result<Option<(Delivery, Sequence)>, ReadError> {
        let batch = &ahead.batch;
        let from = self.next.max(floor).max(batch.base);
        let holes = self.holes(ahead)?;
        let wanted = batch.end().since(from);
        let whole =
            self.filters.is_none() && holes.is_empty() && wanted <= messages && batch.batch.len() as u64 <= bytes;
        let delivery = Delivery {
            base: batch.base,
            append_time: batch.append_time,
            term: batch.term,
            batch: batch.batch.clone(),
            absent: batch.rejected.clone(),
            offsets: Vec::new(),
            skip_below: (from > batch.base).then_some(from),
            messages: wanted,
        };
        if whole {
            return Ok(Some((delivery, batch.end())));
        }
        let view = BatchView::trusted(batch.batch.clone()).map_err(damaged)?;
        let mut rejected = batch.rejected.iter().copied().peekable();
        let mut offset = 0u32;
        let mut chosen = Vec::new();
        let mut offsets = Vec::new();
        let mut room = bytes;
        let mut next = batch.end();
        for record in view.records() {
            let record = record.map_err(damaged)?;
            if rejected.next_if_eq(&record.position).is_some() {
                continue;
            }
            let sequence = batch.base.plus(u64::from(offset));
            offset += 1;
            if sequence < from
                || holes.binary_search(&(offset - 1)).is_ok()
                || self.filters.as_ref().is_some_and(|f| !f.matches(record.subject))
            {
                continue;
            }
            let size = record.raw.len() as u64;
            if !chosen.is_empty() && (chosen.len() as u64 >= messages || size > room) {
                next = sequence;
                break;
            }
            room = room.saturating_sub(size);
            chosen.push(record.position);
            offsets.push(offset - 1);
        }
        if chosen.is_empty() {
            return Ok(None);
        }
        // Everything was chosen after all: the producer's own bytes go out.
        if chosen.len() == view.len() as usize {
            return Ok(Some((delivery, batch.end())));
        }
        let messages = chosen.len() as u64;
        let cut = view
            .select(chosen, Codec::None)
            .map_err(damaged)?
            .ok_or_else(|| ReadError::Damaged("a batch of chosen records is empty".into()))?;
        Ok(Some((
            Delivery {
                batch: cut,
                absent: Vec::new(),
                offsets,
                skip_below: None,
                messages,
                ..delivery
            },
            next,
        )))
    }
}
