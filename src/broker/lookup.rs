//! Single reads: by sequence, last by subject, first at a time; and where a reader begins.

use std::sync::Arc;

use prost::Message;

use super::error::{ReadError, StreamError};
use super::reader::{Delivery, OwnedRecord, ShardReader, Step, damaged, storage};
use super::route::READ_PATIENCE;
use super::{Broker, Face, ShardAccess};
use crate::control::view::StreamView;
use crate::machine::port::ShardView;
use crate::model::subject::{FilterSet, validate_subject};
use crate::model::{LogIndex, NodeId, Sequence, TimeUs};
use crate::raft::{BarrierError, Freshness, Group, ShardShared};
use crate::wire::internal as pb;

/// Looks for the last message of a subject while messages are removed.
const LAST_ATTEMPTS: usize = 5;
/// Groups that a shard may go through during one barrier.
const HOPS: usize = 4;
/// A single read reads ahead as little as one of many.
const SINGLE: usize = 32;

/// What a read may show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Consistency {
    /// Everything acknowledged before it began.
    Linearizable,
    /// What a replica has applied.
    Local,
}

/// A message, found.
#[derive(Debug, Clone)]
pub struct Found {
    pub shard: u32,
    pub sequence: Sequence,
    pub append_time: TimeUs,
    pub record: OwnedRecord,
}

/// Where a reader is to begin, per shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Start {
    Beginning,
    New,
    Sequence(Sequence),
    Time(TimeUs),
    Last(u64),
}

impl Broker {
    /// After this, what the shard's replica here has applied includes every message acknowledged before the call.
    ///
    /// A replica that does not lead asks the leader for its read index and waits until it has applied as much; without a
    /// replica here, one elsewhere does.
    pub async fn barrier(&self, access: &ShardAccess) -> Result<(), ReadError> {
        let (shared, replica) = match &access.face {
            Face::There(remote) => return remote.barrier().await,
            Face::Here { shared, group } => (shared, group),
        };
        let mut asked = replica.clone();
        for _ in 0..HOPS {
            self.barrier_of(shared, &asked).await?;
            // Where the shard has gone on, by what the former group has applied or the replica here has, another group has the
            // last word.
            let Some(next) = shared.went_on_from(asked.id) else {
                return Ok(());
            };
            asked = self.groups().get(next).ok_or_else(left)?;
        }
        Err(ReadError::Unreachable("the shard goes from group to group".into()))
    }

    async fn barrier_of(&self, shared: &ShardShared, replica: &Group) -> Result<(), ReadError> {
        let group = replica.id;
        if self.router().peers.is_none() || replica.leads() {
            match replica.read_barrier().await {
                Ok(()) => return Ok(()),
                // Another one leads by now.
                Err(BarrierError::NotLeader { .. }) if self.router().peers.is_some() => {}
                Err(source) => return Err(ReadError::Barrier { group, source }),
            }
        }
        let read = self.router().read_index(group, shared.shard).await?;
        if replica.wait_applied(LogIndex::new(read.applied), READ_PATIENCE).await {
            return Ok(());
        }
        let behind = format!("its replica here has not caught up within {READ_PATIENCE:?}");
        Err(ReadError::Unreachable(behind))
    }

    /// Makes a shard ready for a read: after a barrier, or as far as a replica is.
    pub async fn ready(&self, access: &ShardAccess, consistency: Consistency) -> Result<(), ReadError> {
        match (consistency, &access.face) {
            (Consistency::Linearizable, _) => self.barrier(access).await,
            (Consistency::Local, Face::Here { .. }) => Ok(()),
            (Consistency::Local, Face::There(remote)) => remote.look().await,
        }
    }

    /// The node whose replica of the shard is read here, and how recent that is.
    pub fn freshness(&self, access: &ShardAccess) -> Option<(NodeId, Freshness)> {
        match &access.face {
            Face::Here { group, .. } => Some((self.node(), group.freshness())),
            Face::There(remote) => remote.freshness(),
        }
    }

    /// A reader of one shard.
    pub fn reader(&self, access: &ShardAccess, next: Sequence, filters: Option<FilterSet>) -> ShardReader {
        ShardReader::new(self, access.face.clone(), next, filters)
    }

    /// What was not found in the replica here counts only while it is here.
    fn still_here(&self, shared: &ShardShared) -> Result<(), ReadError> {
        match self.groups().holds(shared.group()) {
            true => Ok(()),
            false => Err(left()),
        }
    }

    /// The first sequence of a start position.
    pub async fn start_of(&self, access: &ShardAccess, start: Start) -> Result<Sequence, ReadError> {
        let at = access.positions();
        Ok(match start {
            Start::Beginning => at.floor,
            Start::New => at.tail,
            Start::Sequence(sequence) => sequence.max(Sequence::FIRST),
            Start::Last(n) => Sequence::new(at.tail.get().saturating_sub(n)).max(at.floor),
            Start::Time(time) => self.first_at(access, time).await?.unwrap_or(at.tail),
        })
    }

    /// The first retained sequence whose batch was appended at or after `time`.
    async fn first_at(&self, access: &ShardAccess, time: TimeUs) -> Result<Option<Sequence>, ReadError> {
        match &access.face {
            Face::Here { shared, .. } => self.first_at_here(shared, time).await,
            Face::There(remote) => {
                let found = remote.look_up(pb::relay_lookup::What::FirstAtUs(time.get())).await?;
                Ok(found.map(Sequence::new))
            }
        }
    }

    /// As [`first_at`](Self::first_at), of the replica here.
    pub(super) async fn first_at_here(
        &self,
        shared: &ShardShared,
        time: TimeUs,
    ) -> Result<Option<Sequence>, ReadError> {
        let at = shared.positions();
        if at.last_time < Some(time) || at.floor == at.tail {
            self.still_here(shared)?;
            return Ok(None);
        }
        let state = self.groups().state().clone();
        let shard = shared.shard;
        let found = tokio::task::spawn_blocking(move || state.first_batch_at_time(shard, time))
            .await
            .map_err(|e| ReadError::Storage(e.to_string()))?
            .map_err(storage)?;
        self.still_here(shared)?;
        Ok(found.map(|batch| batch.base.max(at.floor)))
    }

    /// Exactly this message.
    pub async fn get_by_sequence(
        &self,
        access: &ShardAccess,
        sequence: Sequence,
        consistency: Consistency,
    ) -> Result<Found, ReadError> {
        self.ready(access, consistency).await?;
        let at = access.positions();
        if sequence < at.floor || sequence >= at.tail {
            if let Face::Here { shared, .. } = &access.face {
                self.still_here(shared)?;
            }
            return Err(ReadError::NotRetained {
                sequence,
                floor: at.floor,
                tail: at.tail,
            });
        }
        match self.next_message(access, sequence).await? {
            Some(found) if found.sequence == sequence => Ok(found),
            Some(_) | None => Err(ReadError::Deleted(sequence)),
        }
    }

    /// The newest retained message of a subject.
    pub async fn get_last_by_subject(
        &self,
        stream: &StreamView,
        access: &ShardAccess,
        subject: &str,
        consistency: Consistency,
    ) -> Result<Found, ReadError> {
        self.ready(access, consistency).await?;
        let none = || ReadError::NoMessage(format!("with subject {subject:?} in stream {:?}", stream.spec.name));
        // Messages may be removed between the two looks; then there is another last one.
        for _ in 0..LAST_ATTEMPTS {
            let last = match &access.face {
                Face::Here { shared, .. } => self.last_by_subject_here(shared, subject).await?,
                Face::There(remote) => {
                    let what = pb::relay_lookup::What::LastBySubject(subject.to_owned());
                    remote.look_up(what).await?.map(Sequence::new)
                }
            };
            let sequence = last.ok_or_else(none)?;
            if let Some(found) = self.next_message(access, sequence).await?
                && found.sequence == sequence
            {
                return Ok(found);
            }
        }
        Err(none())
    }

    /// The shard that holds a subject's messages.
    pub fn shard_of_subject(&self, stream: &StreamView, subject: &str) -> Result<ShardAccess, ReadError> {
        validate_subject(subject).map_err(|e| ReadError::BadRequest(e.to_string()))?;
        if !stream.partitioning.keeps_subject_together() {
            return Err(ReadError::BadRequest(format!(
                "stream {:?} is partitioned by key, so a subject has no single last message; read by sequence or with a filter",
                stream.spec.name
            )));
        }
        let slot = stream
            .partitioning
            .slot(subject, None)
            .map_err(|e| ReadError::BadRequest(e.to_string()))?;
        Ok(self.shard(stream, stream.map.shard(slot))?)
    }

    /// Where the newest retained message of a subject is, in the replica here.
    pub(super) async fn last_by_subject_here(
        &self,
        shared: &Arc<ShardShared>,
        subject: &str,
    ) -> Result<Option<Sequence>, ReadError> {
        let state = self.groups().state();
        let id = shared.shard;
        let floor = shared.positions().floor;
        let mut posting = state.last_posting(id, subject).map_err(damaged)?;
        while let Some((base, offsets)) = posting {
            for offset in offsets.iter().rev() {
                let sequence = base.plus(u64::from(*offset));
                if sequence < floor {
                    self.still_here(shared)?;
                    return Ok(None);
                }
                let Some(group) = self.groups().get(shared.group()) else {
                    self.still_here(shared)?;
                    return Ok(None);
                };
                let shared = shared.clone();
                let reader = ShardReader::new(self, Face::Here { shared, group }, sequence, None);
                if let Some((found, _, _)) = self.next_of(reader).await?
                    && found == sequence
                {
                    return Ok(Some(sequence));
                }
            }
            posting = state.posting_before(id, subject, base).map_err(damaged)?;
        }
        self.still_here(shared)?;
        Ok(None)
    }

    /// The first message appended at or after a time.
    pub async fn get_first_at(
        &self,
        stream: &StreamView,
        access: &ShardAccess,
        time: TimeUs,
        consistency: Consistency,
    ) -> Result<Found, ReadError> {
        self.ready(access, consistency).await?;
        let none = || {
            ReadError::NoMessage(format!(
                "at or after {} µs in shard {} of stream {:?}",
                time.get(),
                access.place.index,
                stream.spec.name
            ))
        };
        let from = self.first_at(access, time).await?.ok_or_else(none)?;
        self.next_message(access, from).await?.ok_or_else(none)
    }

    /// The first message at or after a sequence that was not deleted.
    async fn next_message(&self, access: &ShardAccess, from: Sequence) -> Result<Option<Found>, ReadError> {
        let reader = self.reader(access, from, None).among(SINGLE);
        let found = self.next_of(reader).await?;
        Ok(found.map(|(sequence, append_time, record)| Found {
            shard: access.place.index,
            sequence,
            append_time,
            record,
        }))
    }

    /// The next message of a reader.
    async fn next_of(&self, mut reader: ShardReader) -> Result<Option<(Sequence, TimeUs, OwnedRecord)>, ReadError> {
        let shard = reader.shard();
        loop {
            match reader.step(1, 1).await.map_err(|e| self.noted(shard, e))? {
                Step::Deliver(delivery) => {
                    let append_time = delivery.append_time;
                    if let Some((sequence, record)) = first(&delivery)? {
                        return Ok(Some((sequence, append_time, record)));
                    }
                }
                Step::Skipped | Step::Truncated { .. } => {}
                Step::AtTail(_) => return Ok(None),
            }
        }
    }

    /// The last sequence that a producer's epoch has used up in a shard.
    pub async fn last_producer_sequence(
        &self,
        access: &ShardAccess,
        producer: u64,
        epoch: u64,
    ) -> Result<Option<u64>, ReadError> {
        match &access.face {
            Face::Here { shared, .. } => self.producer_here(shared, producer, epoch),
            Face::There(remote) => {
                let producer = pb::RelayProducer {
                    producer_id: producer,
                    epoch,
                };
                remote.look_up(pb::relay_lookup::What::Producer(producer)).await
            }
        }
    }

    /// As [`last_producer_sequence`](Self::last_producer_sequence), of the replica here.
    pub(super) fn producer_here(
        &self,
        shared: &ShardShared,
        producer: u64,
        epoch: u64,
    ) -> Result<Option<u64>, ReadError> {
        let records = self.groups().state().producers(shared.shard).map_err(storage)?;
        self.still_here(shared)?;
        let Some((_, raw)) = records.into_iter().find(|(id, _)| *id == producer) else {
            return Ok(None);
        };
        let record = pb::ProducerRecord::decode(raw).map_err(damaged)?;
        Ok((record.epoch == epoch).then_some(record.sequence))
    }

    /// The shards a request names, or all.
    pub fn shards_of(&self, stream: &StreamView, named: &[u32]) -> Result<Vec<ShardAccess>, StreamError> {
        let mut indexes: Vec<u32> = if named.is_empty() {
            stream.shards.iter().map(|s| s.index).collect()
        } else {
            named.to_vec()
        };
        indexes.sort_unstable();
        indexes.dedup();
        indexes.into_iter().map(|index| self.shard(stream, index)).collect()
    }
}

pub(super) fn left() -> ReadError {
    ReadError::Unreachable("its replica has left this node".into())
}

fn first(delivery: &Delivery) -> Result<Option<(Sequence, OwnedRecord)>, ReadError> {
    Ok(delivery.records()?.into_iter().next())
}
