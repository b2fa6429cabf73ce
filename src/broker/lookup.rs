//! Single reads: by sequence, last by subject, first at a time; and where a reader begins.

use prost::Message;

use super::error::{ReadError, StreamError};
use super::reader::{Delivery, OwnedRecord, ShardReader, Step, damaged, storage};
use super::{Broker, ShardAccess};
use crate::control::view::StreamView;
use crate::machine::port::ShardView;
use crate::model::subject::{FilterSet, validate_subject};
use crate::model::{Sequence, TimeUs};
use crate::wire::internal as pb;

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
    pub async fn barrier(&self, access: &ShardAccess) -> Result<(), ReadError> {
        access.group.read_barrier().await.map_err(|source| ReadError::Barrier {
            group: access.place.group,
            source,
        })
    }

    /// A reader of one shard.
    pub fn reader(&self, access: &ShardAccess, next: Sequence, filters: Option<FilterSet>) -> ShardReader {
        ShardReader::new(access.shared.clone(), self.groups().state().clone(), next, filters)
    }

    /// The first sequence of a start position.
    pub async fn start_of(&self, access: &ShardAccess, start: Start) -> Result<Sequence, ReadError> {
        let at = access.shared.positions();
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
        let at = access.shared.positions();
        if at.last_time < Some(time) || at.floor == at.tail {
            return Ok(None);
        }
        let state = self.groups().state().clone();
        let shard = access.place.shard;
        let found = tokio::task::spawn_blocking(move || state.first_batch_at_time(shard, time))
            .await
            .map_err(|e| ReadError::Storage(e.to_string()))?
            .map_err(storage)?;
        Ok(found.map(|batch| batch.base.max(at.floor)))
    }

    /// Exactly this message.
    pub async fn get_by_sequence(
        &self,
        stream: &StreamView,
        shard: u32,
        sequence: Sequence,
    ) -> Result<Found, ReadError> {
        let access = self.shard(stream, shard)?;
        self.barrier(&access).await?;
        let at = access.shared.positions();
        if sequence < at.floor || sequence >= at.tail {
            return Err(ReadError::NotRetained {
                sequence,
                floor: at.floor,
                tail: at.tail,
            });
        }
        match self.next_message(&access, sequence).await? {
            Some(found) if found.sequence == sequence => Ok(found),
            Some(_) | None => Err(ReadError::Deleted(sequence)),
        }
    }

    /// The newest retained message of a subject.
    pub async fn get_last_by_subject(&self, stream: &StreamView, subject: &str) -> Result<Found, ReadError> {
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
        let access = self.shard(stream, stream.map.shard(slot))?;
        self.barrier(&access).await?;
        let none = || ReadError::NoMessage(format!("with subject {subject:?} in stream {:?}", stream.spec.name));
        let state = self.groups().state();
        let id = access.place.shard;
        let floor = access.shared.positions().floor;
        let mut posting = state.last_posting(id, subject).map_err(damaged)?;
        while let Some((base, offsets)) = posting {
            for offset in offsets.iter().rev() {
                let sequence = base.plus(u64::from(*offset));
                if sequence < floor {
                    return Err(none());
                }
                if let Some(found) = self.next_message(&access, sequence).await?
                    && found.sequence == sequence
                {
                    return Ok(found);
                }
            }
            posting = state.posting_before(id, subject, base).map_err(damaged)?;
        }
        Err(none())
    }

    /// The first message appended at or after a time.
    pub async fn get_first_at(&self, stream: &StreamView, shard: u32, time: TimeUs) -> Result<Found, ReadError> {
        let access = self.shard(stream, shard)?;
        self.barrier(&access).await?;
        let none = || {
            ReadError::NoMessage(format!(
                "at or after {} µs in shard {shard} of stream {:?}",
                time.get(),
                stream.spec.name
            ))
        };
        let from = self.first_at(&access, time).await?.ok_or_else(none)?;
        self.next_message(&access, from).await?.ok_or_else(none)
    }

    /// The first message at or after a sequence that was not deleted.
    async fn next_message(&self, access: &ShardAccess, from: Sequence) -> Result<Option<Found>, ReadError> {
        let mut reader = self.reader(access, from, None);
        loop {
            match reader.step(1, 1).await.map_err(|e| self.noted(e))? {
                Step::Deliver(delivery) => {
                    let append_time = delivery.append_time;
                    if let Some((sequence, record)) = first(&delivery)? {
                        return Ok(Some(Found {
                            shard: access.place.index,
                            sequence,
                            append_time,
                            record,
                        }));
                    }
                }
                Step::Skipped | Step::Truncated { .. } => {}
                Step::AtTail(_) => return Ok(None),
            }
        }
    }

    /// The last sequence that a producer's epoch has used up in a shard.
    pub fn last_producer_sequence(
        &self,
        access: &ShardAccess,
        producer: u64,
        epoch: u64,
    ) -> Result<Option<u64>, ReadError> {
        let records = self.groups().state().producers(access.place.shard).map_err(storage)?;
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

fn first(delivery: &Delivery) -> Result<Option<(Sequence, OwnedRecord)>, ReadError> {
    Ok(delivery.records()?.into_iter().next())
}
