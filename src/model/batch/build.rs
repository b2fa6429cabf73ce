//! Encoding a batch.

use bytes::Bytes;

use super::{
    BATCH_BYTES_MAX, BATCH_RECORDS_MAX, Codec, FLAG_EVENT_TIME, FLAG_HEADERS, FLAG_KEY, FLAG_MESSAGE_ID, HEADER_BYTES,
    HEADER_NAME_BYTES_MAX, HEADERS_MAX, KEY_BYTES_MAX, MESSAGE_BYTES_MAX, MESSAGE_ID_BYTES_MAX, RECORD_PREFIX_BYTES,
    RecordError, seal,
};
use crate::model::TimeUs;
use crate::model::subject::validate_subject;

/// Light and quick; what a producer gains from more is little, and it waits for it.
const ZSTD_LEVEL: i32 = 1;

/// What a message consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RecordFields<'a> {
    /// 1–255 bytes, tokens separated by dots.
    pub subject: &'a str,
    /// 1–1,024 bytes.
    pub key: Option<&'a [u8]>,
    /// 1–255 bytes.
    pub message_id: Option<&'a str>,
    /// The client's own time.
    pub event_time: Option<TimeUs>,
    /// At most 64, names of 1–255 bytes.
    pub headers: &'a [(&'a str, &'a [u8])],
    /// The message itself.
    pub payload: &'a [u8],
}

/// Why a record was not taken. The builder is as it was before.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BuildError {
    /// The record can be in no batch.
    #[error(transparent)]
    Record(#[from] RecordError),
    /// There is no room: build this batch and begin another.
    #[error("the batch is full: {records} records, {bytes} bytes")]
    Full { records: u32, bytes: usize },
}

/// The message size of a record: the bytes of its content.
pub fn content_bytes(fields: &RecordFields<'_>) -> usize {
    let key = fields.key.map_or(0, |key| 2 + key.len());
    let id = fields.message_id.map_or(0, |id| 1 + id.len());
    let time = fields.event_time.map_or(0, |_| 8);
    let headers: usize = match fields.headers {
        [] => 0,
        headers => {
            2 + headers
                .iter()
                .map(|(name, value)| 5 + name.len() + value.len())
                .sum::<usize>()
        }
    };
    1 + 1 + fields.subject.len() + key + id + time + headers + fields.payload.len()
}

/// Gathers records and encodes them. Bounded by the limits of a batch, whatever the codec.
#[derive(Debug)]
pub struct BatchBuilder {
    /// Room for the header, then the body.
    encoded: Vec<u8>,
    count: u32,
    bytes_max: usize,
}

impl Default for BatchBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl BatchBuilder {
    /// Up to the limits of a batch.
    pub fn new() -> Self {
        Self::with_bytes_max(BATCH_BYTES_MAX)
    }

    /// Full when the batch would be larger than this before compression (but one record always fits). At most
    /// `batch_bytes_max`.
    pub fn with_bytes_max(bytes_max: usize) -> Self {
        Self {
            encoded: vec![0; HEADER_BYTES],
            count: 0,
            bytes_max: bytes_max.min(BATCH_BYTES_MAX),
        }
    }

    /// Bytes of the batch so far, before compression.
    pub fn bytes(&self) -> usize {
        self.encoded.len()
    }

    /// Records so far.
    pub fn len(&self) -> u32 {
        self.count
    }

    /// Whether nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes a record. Answers its message size.
    pub fn push(&mut self, fields: &RecordFields<'_>) -> Result<u32, BuildError> {
        validate_subject(fields.subject).map_err(RecordError::Subject)?;
        if let Some(key) = fields.key
            && (key.is_empty() || key.len() > KEY_BYTES_MAX)
        {
            return Err(RecordError::Key { bytes: key.len() }.into());
        }
        if let Some(id) = fields.message_id
            && (id.is_empty() || id.len() > MESSAGE_ID_BYTES_MAX)
        {
            return Err(RecordError::MessageId { bytes: id.len() }.into());
        }
        if fields.headers.len() > HEADERS_MAX {
            let count = fields.headers.len();
            return Err(RecordError::HeaderCount { count }.into());
        }
        for (name, _) in fields.headers {
            if name.is_empty() || name.len() > HEADER_NAME_BYTES_MAX {
                return Err(RecordError::HeaderName { bytes: name.len() }.into());
            }
        }
        let size = content_bytes(fields);
        if size > MESSAGE_BYTES_MAX {
            return Err(RecordError::TooLarge { bytes: size }.into());
        }
        let after = self.encoded.len() + RECORD_PREFIX_BYTES + size;
        let bytes_max = match self.count {
            0 => BATCH_BYTES_MAX,
            _ => self.bytes_max,
        };
        if after > bytes_max || self.count as usize == BATCH_RECORDS_MAX {
            return Err(BuildError::Full {
                records: self.count,
                bytes: self.encoded.len(),
            });
        }
        self.append(fields, size);
        Ok(size as u32)
    }

    fn append(&mut self, fields: &RecordFields<'_>, size: usize) {
        let out = &mut self.encoded;
        let begin = out.len();
        out.reserve(RECORD_PREFIX_BYTES + size);
        out.extend_from_slice(&(size as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        let flag = |on: bool, flag: u8| if on { flag } else { 0 };
        out.push(
            flag(fields.key.is_some(), FLAG_KEY)
                | flag(fields.message_id.is_some(), FLAG_MESSAGE_ID)
                | flag(fields.event_time.is_some(), FLAG_EVENT_TIME)
                | flag(!fields.headers.is_empty(), FLAG_HEADERS),
        );
        out.push(fields.subject.len() as u8);
        out.extend_from_slice(fields.subject.as_bytes());
        if let Some(key) = fields.key {
            out.extend_from_slice(&(key.len() as u16).to_le_bytes());
            out.extend_from_slice(key);
        }
        if let Some(id) = fields.message_id {
            out.push(id.len() as u8);
            out.extend_from_slice(id.as_bytes());
        }
        if let Some(time) = fields.event_time {
            out.extend_from_slice(&time.get().to_le_bytes());
        }
        if !fields.headers.is_empty() {
            out.extend_from_slice(&(fields.headers.len() as u16).to_le_bytes());
            for (name, value) in fields.headers {
                out.push(name.len() as u8);
                out.extend_from_slice(name.as_bytes());
                out.extend_from_slice(&(value.len() as u32).to_le_bytes());
                out.extend_from_slice(value);
            }
        }
        out.extend_from_slice(fields.payload);
        let content = begin + RECORD_PREFIX_BYTES;
        debug_assert_eq!(out.len() - content, size);
        let crc = crc32fast::hash(&out[content..]);
        out[begin + 4..content].copy_from_slice(&crc.to_le_bytes());
        self.count += 1;
    }

    /// Takes a record as another batch holds it, with its length and CRC.
    pub(super) fn push_raw(&mut self, raw: &[u8]) {
        self.encoded.extend_from_slice(raw);
        self.count += 1;
    }

    /// Encodes the batch and leaves the builder empty. A body that does not get smaller is not compressed. `None` if
    /// there are no records.
    pub fn build(&mut self, codec: Codec) -> Option<Bytes> {
        if self.count == 0 {
            return None;
        }
        let count = std::mem::take(&mut self.count);
        let encoded = std::mem::replace(&mut self.encoded, vec![0; HEADER_BYTES]);
        let body_bytes = encoded.len() - HEADER_BYTES;
        let smaller = match codec {
            Codec::None => None,
            Codec::Lz4 => compress_lz4(&encoded[HEADER_BYTES..]),
            Codec::Zstd => compress_zstd(&encoded[HEADER_BYTES..]),
        };
        Some(match smaller {
            Some(compressed) => seal(compressed, codec, count, body_bytes),
            None => seal(encoded, Codec::None, count, body_bytes),
        })
    }
}

/// With room for the header; `None` if it is not smaller.
fn compress_lz4(body: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; HEADER_BYTES + lz4_flex::block::get_maximum_output_size(body.len())];
    let bytes = lz4_flex::block::compress_into(body, &mut out[HEADER_BYTES..]).ok()?;
    out.truncate(HEADER_BYTES + bytes);
    (bytes < body.len()).then_some(out)
}

/// With room for the header; `None` if it is not smaller.
fn compress_zstd(body: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![0; HEADER_BYTES + zstd::zstd_safe::compress_bound(body.len())];
    let bytes = zstd::bulk::compress_to_buffer(body, &mut out[HEADER_BYTES..], ZSTD_LEVEL).ok()?;
    out.truncate(HEADER_BYTES + bytes);
    (bytes < body.len()).then_some(out)
}
