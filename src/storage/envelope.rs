//! A batch as a value of state/: where and when it was put, then the producer's bytes, unchanged.
//!
//! Payload of the frame, little endian: base (8), append time (8), term (8), record count (4), length of the list of
//! rejected records (4), that list (`offsets.rs`), the batch. The frame's CRC covers all of it.

use bytes::Bytes;

use super::error::{Area, StorageError};
use super::keys::Key;
use super::offsets;
use super::record::{FRAME_BYTES, corrupt, frame_into, take_u32, take_u64, unframe};
use crate::model::{Sequence, ShardId, StoredBatch, Term, TimeUs};

const HEAD_BYTES: usize = 32;

/// Encodes a batch for its key into a buffer that is used again.
pub fn encode_into(out: &mut Vec<u8>, key: &[u8], batch: &StoredBatch) {
    out.reserve(FRAME_BYTES + HEAD_BYTES + batch.rejected.len() + batch.batch.len() + 8);
    frame_into(out, key, |out| {
        out.extend_from_slice(&batch.base.get().to_le_bytes());
        out.extend_from_slice(&batch.append_time.get().to_le_bytes());
        out.extend_from_slice(&batch.term.get().to_le_bytes());
        out.extend_from_slice(&batch.record_count.to_le_bytes());
        let at = out.len();
        out.extend_from_slice(&[0; 4]);
        if !batch.rejected.is_empty() {
            offsets::encode(out, &batch.rejected);
        }
        let list = (out.len() - at - 4) as u32;
        out[at..at + 4].copy_from_slice(&list.to_le_bytes());
        out.extend_from_slice(&batch.batch);
    });
}

/// Checks and decodes a value. The one copy is from the engine's buffer; the batch is a slice of it.
pub fn decode(key: &[u8], value: &[u8]) -> Result<StoredBatch, StorageError> {
    let payload = unframe(Area::State, key, value)?;
    let bad = |detail: &str| corrupt(Area::State, key, detail);
    let mut rest = payload;
    let (base, append_time, term, record_count, list) = (
        take_u64(&mut rest).ok_or_else(|| bad("too short"))?,
        take_u64(&mut rest).ok_or_else(|| bad("too short"))?,
        take_u64(&mut rest).ok_or_else(|| bad("too short"))?,
        take_u32(&mut rest).ok_or_else(|| bad("too short"))?,
        take_u32(&mut rest).ok_or_else(|| bad("too short"))?,
    );
    let (list, batch) = rest.split_at_checked(list as usize).ok_or_else(|| bad("too short"))?;
    let rejected = if list.is_empty() {
        Vec::new()
    } else {
        offsets::decode(list, offsets::OFFSETS_MAX).ok_or_else(|| bad("bad list of rejected records"))?
    };
    if rejected.len() as u64 > u64::from(record_count) || rejected.last().is_some_and(|&last| last >= record_count) {
        return Err(bad("rejects records it does not have"));
    }
    match Key::decode(key) {
        Some(Key::Batch(_, at)) if at.get() == base => {}
        _ => return Err(bad("its base is not that of its key")),
    }
    Ok(StoredBatch {
        base: Sequence::new(base),
        append_time: TimeUs::new(append_time),
        term: Term::new(term),
        record_count,
        rejected,
        batch: Bytes::copy_from_slice(batch),
    })
}

/// The key of a batch.
pub fn key(shard: ShardId, base: Sequence) -> Vec<u8> {
    Key::Batch(shard, base).encode()
}
