//! The batch format, version 1: docs/reference/batch.md. Encoding, full validation, and zero-copy reading. The hottest
//! code of the product: everything a producer sends and a reader gets passes here.

mod build;
mod place;
mod record;
mod view;

use bytes::Bytes;

use super::limits::{
    BATCH_BODY_BYTES_MAX, BATCH_BYTES_MAX, BATCH_RECORDS_MAX, HEADER_NAME_BYTES_MAX, HEADERS_MAX, KEY_BYTES_MAX,
    MESSAGE_BYTES_MAX, MESSAGE_ID_BYTES_MAX,
};
use super::subject::SubjectError;

pub use build::{BatchBuilder, BuildError, RecordFields, content_bytes};
pub use record::{Headers, RecordBrief, RecordView};
pub use view::{BatchView, Briefs, Records};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 24;
/// Bytes before each record's content: its length and its CRC.
pub const RECORD_PREFIX_BYTES: usize = 8;
/// The least content: flags, and a subject of one byte with its length.
pub const CONTENT_BYTES_MIN: usize = 3;

const MAGIC: [u8; 2] = *b"MB";
const VERSION: u8 = 1;

const FLAG_KEY: u8 = 1;
const FLAG_MESSAGE_ID: u8 = 2;
const FLAG_EVENT_TIME: u8 = 4;
const FLAG_HEADERS: u8 = 8;
const FLAGS_KNOWN: u8 = FLAG_KEY | FLAG_MESSAGE_ID | FLAG_EVENT_TIME | FLAG_HEADERS;

/// How a body is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Codec {
    /// Not.
    #[default]
    None,
    /// lz4 block format, without a size prefix.
    Lz4,
    /// One zstd frame.
    Zstd,
}

impl Codec {
    fn code(self) -> u8 {
        match self {
            Codec::None => 0,
            Codec::Lz4 => 1,
            Codec::Zstd => 2,
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Codec::None),
            1 => Some(Codec::Lz4),
            2 => Some(Codec::Zstd),
            _ => None,
        }
    }

    /// The word for it: `none`, `lz4`, `zstd`.
    pub fn as_str(self) -> &'static str {
        match self {
            Codec::None => "none",
            Codec::Lz4 => "lz4",
            Codec::Zstd => "zstd",
        }
    }

    /// The inverse of [`Codec::as_str`].
    pub fn parse(word: &str) -> Option<Self> {
        match word {
            "none" => Some(Codec::None),
            "lz4" => Some(Codec::Lz4),
            "zstd" => Some(Codec::Zstd),
            _ => None,
        }
    }
}

/// Why bytes are not a batch. Nothing of it is stored (`BAD_BATCH`, cannot work).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BatchError {
    /// Shorter than the header.
    #[error("the batch has {bytes} bytes; a batch has at least {HEADER_BYTES}")]
    TooShort { bytes: usize },
    /// Longer than a batch may be.
    #[error("the batch has {bytes} bytes; at most {BATCH_BYTES_MAX} are allowed")]
    TooLarge { bytes: usize },
    /// It does not begin with "MB".
    #[error("this is not a batch: it begins with {found:02x?} instead of \"MB\"")]
    Magic { found: [u8; 2] },
    /// From a newer (or no) version.
    #[error("the batch has version {found}; this server knows version {VERSION}")]
    Version { found: u8 },
    /// Not 0, 1 or 2.
    #[error("the batch has codec {found}; known are 0 (none), 1 (lz4) and 2 (zstd)")]
    Codec { found: u8 },
    /// Batch flags must be 0.
    #[error("the batch has flags {found:#x}; none are known")]
    Flags { found: u32 },
    /// Not 1–100,000 records.
    #[error("the batch says that it has {count} records; 1-{BATCH_RECORDS_MAX} are allowed")]
    Count { count: u32 },
    /// What follows the header is not what the header says.
    #[error("the header says that {told} bytes follow, {found} do")]
    BodyLength { told: u32, found: usize },
    /// The decompressed body would be larger than allowed.
    #[error("the body would have {bytes} bytes when decompressed; at most {BATCH_BODY_BYTES_MAX} are allowed")]
    BodyTooLarge { bytes: u32 },
    /// The batch was damaged.
    #[error("the batch's CRC is {found:08x}, it says {told:08x}")]
    Crc { told: u32, found: u32 },
    /// The body does not decompress.
    #[error("the body does not decompress as {}: {detail}", codec.as_str())]
    Decompress { codec: Codec, detail: String },
    /// The body decompresses to another length, or for codec none the two lengths differ.
    #[error("the body has {found} bytes when decompressed, the header says {told}")]
    DecompressedLength { told: u32, found: usize },
    /// More records than told.
    #[error("{bytes} bytes are left over after the {count} records that the batch says it has")]
    LeftOver { bytes: usize, count: u32 },
    /// Fewer records than told.
    #[error("the body ends after {found} records, the batch says it has {told}")]
    Fewer { told: u32, found: u32 },
    /// A record is wrong.
    #[error("record {position}: {error}")]
    Record { position: u32, error: RecordError },
}

/// Why a record is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    /// A length runs past the end.
    #[error("its {field} runs past its end")]
    PastEnd { field: &'static str },
    /// The record was damaged.
    #[error("its CRC is {found:08x}, it says {told:08x}")]
    Crc { told: u32, found: u32 },
    /// Unknown flags.
    #[error("it has flags {found:#x}; known are 1, 2, 4 and 8")]
    Flags { found: u8 },
    /// The subject is not allowed.
    #[error(transparent)]
    Subject(#[from] SubjectError),
    /// Not 1–1,024 bytes.
    #[error("its key has {bytes} bytes; 1-{KEY_BYTES_MAX} are allowed")]
    Key { bytes: usize },
    /// Not 1–255 bytes.
    #[error("its message id has {bytes} bytes; 1-{MESSAGE_ID_BYTES_MAX} are allowed")]
    MessageId { bytes: usize },
    /// Not 1–64 headers.
    #[error("it says that it has {count} headers; 1-{HEADERS_MAX} are allowed where there are any")]
    HeaderCount { count: usize },
    /// Not 1–255 bytes.
    #[error("a header's name has {bytes} bytes; 1-{HEADER_NAME_BYTES_MAX} are allowed")]
    HeaderName { bytes: usize },
    /// Text that is not UTF-8.
    #[error("its {field} is not UTF-8")]
    NotUtf8 { field: &'static str },
    /// Larger than any message may be.
    #[error("its size is {bytes} bytes; at most {MESSAGE_BYTES_MAX} are allowed")]
    TooLarge { bytes: usize },
}

/// The header's fields, checked for what needs no look at the body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BatchHeader {
    /// How the body is compressed.
    pub codec: Codec,
    /// Records, 1–100,000.
    pub count: u32,
    /// Bytes of the body when decompressed.
    pub body_bytes: u32,
    crc: u32,
}

impl BatchHeader {
    /// Reads the header of an encoded batch. Checks lengths and known values, not the CRC: enough to say how much work
    /// and memory the batch asks for.
    pub fn peek(encoded: &[u8]) -> Result<Self, BatchError> {
        let Some((header, body)) = encoded.split_first_chunk::<HEADER_BYTES>() else {
            return Err(BatchError::TooShort { bytes: encoded.len() });
        };
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        if encoded.len() > BATCH_BYTES_MAX {
            return Err(BatchError::TooLarge { bytes: encoded.len() });
        }
        if header[..2] != MAGIC {
            return Err(BatchError::Magic {
                found: [header[0], header[1]],
            });
        }
        if header[2] != VERSION {
            return Err(BatchError::Version { found: header[2] });
        }
        let codec = Codec::from_code(header[3]).ok_or(BatchError::Codec { found: header[3] })?;
        let (count, stored, body_bytes, flags) = (word(4), word(8), word(12), word(16));
        if flags != 0 {
            return Err(BatchError::Flags { found: flags });
        }
        if count == 0 || count as usize > BATCH_RECORDS_MAX {
            return Err(BatchError::Count { count });
        }
        if stored as usize != body.len() {
            return Err(BatchError::BodyLength {
                told: stored,
                found: body.len(),
            });
        }
        if body_bytes as usize > BATCH_BODY_BYTES_MAX {
            return Err(BatchError::BodyTooLarge { bytes: body_bytes });
        }
        if codec == Codec::None && body_bytes != stored {
            return Err(BatchError::DecompressedLength {
                told: body_bytes,
                found: body.len(),
            });
        }
        Ok(Self {
            codec,
            count,
            body_bytes,
            crc: word(20),
        })
    }

    /// The sizes of all messages together: the body less what is before each record.
    pub fn message_bytes(&self) -> u64 {
        u64::from(self.body_bytes).saturating_sub(u64::from(self.count) * RECORD_PREFIX_BYTES as u64)
    }
}

/// The CRC of a batch: the header up to the CRC, and the body as stored.
fn batch_crc(encoded: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&encoded[..20]);
    crc.update(&encoded[HEADER_BYTES..]);
    crc.finalize()
}

/// Puts the header before a body that was written after [`HEADER_BYTES`] of room.
fn seal(mut encoded: Vec<u8>, codec: Codec, count: u32, body_bytes: usize) -> Bytes {
    let stored = (encoded.len() - HEADER_BYTES) as u32;
    encoded[..2].copy_from_slice(&MAGIC);
    encoded[2] = VERSION;
    encoded[3] = codec.code();
    encoded[4..8].copy_from_slice(&count.to_le_bytes());
    encoded[8..12].copy_from_slice(&stored.to_le_bytes());
    encoded[12..16].copy_from_slice(&(body_bytes as u32).to_le_bytes());
    encoded[16..20].copy_from_slice(&0u32.to_le_bytes());
    let crc = batch_crc(&encoded);
    encoded[20..24].copy_from_slice(&crc.to_le_bytes());
    Bytes::from(encoded)
}

#[cfg(test)]
mod tests;
