//! A batch is checked here, once, before it enters the log: what passes can be applied and read without surprise.

use bytes::Bytes;

use super::error::PublishError;
use crate::control::view::StreamView;
use crate::model::batch::{BatchError, BatchHeader, BatchView, RecordError};
use crate::model::limits::MESSAGE_BYTES_MAX;
use crate::model::partition::Partitioning;
use crate::model::subject::{SubjectError, validate_subject};
use crate::wire::v1;

/// The largest message a stream takes.
pub fn message_bytes_max(stream: &StreamView) -> u64 {
    let own = stream.spec.limits.as_ref().and_then(|l| l.max_message_bytes);
    u64::from(own.unwrap_or(u32::MAX)).min(MESSAGE_BYTES_MAX as u64)
}

/// A batch whose form is right but whose message is not allowed is told apart from one that is malformed.
fn unreadable(batch: &Bytes, e: BatchError) -> PublishError {
    if let BatchError::Record { error, .. } = &e {
        // A length that not even the whole body has is a lie, not a large message.
        let body = BatchHeader::peek(batch).map_or(0, |header| header.body_bytes as usize);
        if let RecordError::TooLarge { bytes } = error
            && *bytes <= body
        {
            return PublishError::MessageTooLarge {
                size: *bytes as u64,
                max: MESSAGE_BYTES_MAX as u64,
            };
        }
        // A subject without a length of 1-255 breaks the format itself.
        if matches!(error, RecordError::Subject(subject) if *subject != SubjectError::Empty) {
            return PublishError::BadMessage(e.to_string());
        }
    }
    PublishError::BadBatch(e.to_string())
}

/// Checks every record of a batch for a shard of a stream. Returns the number of records.
pub fn validate_batch(stream: &StreamView, shard: u32, map_epoch: u64, batch: &Bytes) -> Result<u32, PublishError> {
    if map_epoch != stream.map.epoch() {
        return Err(PublishError::MapChanged {
            got: map_epoch,
            current: stream.map.epoch(),
        });
    }
    let view = BatchView::parse(batch.clone()).map_err(|e| unreadable(batch, e))?;
    let max = message_bytes_max(stream);
    let by_key = matches!(stream.partitioning, Partitioning::Key);
    let sharded = stream.shards.len() > 1;
    // Runs of one subject are the rule; a checked subject is not checked again.
    let mut checked = "";
    for record in view.records() {
        let record = record.map_err(|e| unreadable(batch, e))?;
        let size = u64::from(record.size);
        if size > max {
            return Err(PublishError::MessageTooLarge { size, max });
        }
        if record.subject != checked {
            check_subject(stream, record.subject)?;
            checked = record.subject;
        }
        if by_key && record.key.is_none() {
            return Err(PublishError::BadMessage(format!(
                "record {}: stream {:?} is partitioned by key, so every message needs a key",
                record.position, stream.spec.name
            )));
        }
        if sharded {
            let slot = stream
                .partitioning
                .slot(record.subject, record.key)
                .map_err(|e| PublishError::BadMessage(e.to_string()))?;
            let expected = stream.map.shard(slot);
            if expected != shard {
                return Err(PublishError::WrongShard {
                    position: record.position,
                    subject: record.subject.to_owned(),
                    expected,
                    shard,
                    epoch: stream.map.epoch(),
                });
            }
        }
    }
    Ok(view.len())
}

/// A subject must be well formed and belong to the stream.
pub fn check_subject(stream: &StreamView, subject: &str) -> Result<(), PublishError> {
    validate_subject(subject).map_err(|e| PublishError::BadMessage(e.to_string()))?;
    if !stream.subjects.matches(subject) {
        return Err(PublishError::SubjectNotInStream {
            subject: subject.to_owned(),
            stream: stream.spec.name.clone(),
            subjects: stream.spec.subjects.join(", "),
        });
    }
    Ok(())
}

/// An expectation that makes sense for the stream. One that names a subject needs a subject's messages in one shard.
pub fn check_expectation(stream: &StreamView, shard: u32, expect: &v1::Expectation) -> Result<(), PublishError> {
    if let Some(subject) = &expect.subject {
        if !stream.partitioning.keeps_subject_together() {
            return Err(PublishError::BadExpectation(format!(
                "stream {:?} is partitioned by key, so a subject has no single last sequence; expect the shard's last sequence instead",
                stream.spec.name
            )));
        }
        check_subject(stream, &subject.subject)?;
        let slot = stream
            .partitioning
            .slot(&subject.subject, None)
            .map_err(|e| PublishError::BadExpectation(e.to_string()))?;
        let home = stream.map.shard(slot);
        if home != shard {
            return Err(PublishError::BadExpectation(format!(
                "subject {:?} lives in shard {home}, the batch is for shard {shard}",
                subject.subject
            )));
        }
    }
    Ok(())
}
