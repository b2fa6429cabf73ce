//! Reading a batch: validating it, and walking its records in place.

use std::cell::RefCell;

use bytes::Bytes;

use super::{
    BATCH_BYTES_MAX, BatchBuilder, BatchError, BatchHeader, CONTENT_BYTES_MIN, Codec, HEADER_BYTES, MESSAGE_BYTES_MAX,
    RECORD_PREFIX_BYTES, RecordBrief, RecordError, RecordView, batch_crc, record,
};
use crate::model::subject::validate_subject;

/// A batch whose records can be walked. Holds the encoded bytes and, if they are compressed, the body.
#[derive(Debug, Clone)]
pub struct BatchView {
    encoded: Bytes,
    body: Bytes,
    header: BatchHeader,
}

impl BatchView {
    /// Validates everything the format says: for bytes that come from a client.
    pub fn parse(encoded: Bytes) -> Result<Self, BatchError> {
        let header = BatchHeader::peek(&encoded)?;
        let crc = batch_crc(&encoded);
        if crc != header.crc {
            return Err(BatchError::Crc {
                told: header.crc,
                found: crc,
            });
        }
        let view = Self::open(encoded, header)?;
        view.check_records()?;
        Ok(view)
    }

    /// For bytes that were validated before they got here. CRCs are not computed and subjects not checked again; damage
    /// shows as an error of this or of an iterator, never as a panic or a read past the end.
    pub fn trusted(encoded: Bytes) -> Result<Self, BatchError> {
        let header = BatchHeader::peek(&encoded)?;
        Self::open(encoded, header)
    }

    fn open(encoded: Bytes, header: BatchHeader) -> Result<Self, BatchError> {
        let body = match header.codec {
            Codec::None => encoded.slice(HEADER_BYTES..),
            Codec::Lz4 => decompress_lz4(&encoded[HEADER_BYTES..], header.body_bytes)?,
            Codec::Zstd => decompress_zstd(&encoded[HEADER_BYTES..], header.body_bytes)?,
        };
        Ok(Self { encoded, body, header })
    }

    fn check_records(&self) -> Result<(), BatchError> {
        let mut last_subject: &[u8] = b"";
        for raw in self.raws() {
            let (position, raw) = raw?;
            let fail = |error| BatchError::Record { position, error };
            let content = &raw[RECORD_PREFIX_BYTES..];
            let told = u32::from_le_bytes([raw[4], raw[5], raw[6], raw[7]]);
            let found = crc32fast::hash(content);
            if told != found {
                return Err(fail(RecordError::Crc { told, found }));
            }
            let fields = record::decode(content).map_err(fail)?;
            // Neighbours often share their subject.
            if fields.subject != last_subject {
                let subject =
                    std::str::from_utf8(fields.subject).map_err(|_| fail(RecordError::NotUtf8 { field: "subject" }))?;
                validate_subject(subject).map_err(|error| fail(error.into()))?;
                last_subject = fields.subject;
            } else if fields.subject.is_empty() {
                return Err(fail(RecordError::Subject(crate::model::subject::SubjectError::Empty)));
            }
            if let Some(id) = fields.message_id
                && std::str::from_utf8(id).is_err()
            {
                return Err(fail(RecordError::NotUtf8 { field: "message id" }));
            }
        }
        Ok(())
    }

    /// The batch as it was encoded.
    pub fn encoded(&self) -> &Bytes {
        &self.encoded
    }

    /// Number of records.
    pub fn len(&self) -> u32 {
        self.header.count
    }

    /// Never: a batch has at least one record.
    pub fn is_empty(&self) -> bool {
        self.header.count == 0
    }

    /// How it is compressed.
    pub fn codec(&self) -> Codec {
        self.header.codec
    }

    /// Bytes of the decompressed body.
    pub fn body_bytes(&self) -> usize {
        self.body.len()
    }

    /// The sizes of all messages together.
    pub fn message_bytes(&self) -> u64 {
        self.header.message_bytes()
    }

    /// The records, in order. After [`BatchView::parse`] none is an error. After an error there are no more.
    pub fn records(&self) -> Records<'_> {
        Records { raws: self.raws() }
    }

    /// What an apply needs of each record, in order.
    pub fn briefs(&self) -> Briefs<'_> {
        Briefs { raws: self.raws() }
    }

    fn raws(&self) -> Raws<'_> {
        Raws {
            rest: &self.body,
            position: 0,
            count: self.header.count,
        }
    }

    /// A batch of the records at these positions, ascending, for filtered or cut reads: the records' own bytes, CRCs
    /// included. `None` if no position is named. An error if they do not fit a batch: a compressed batch can hold more
    /// than an uncompressed one, so choose by the length of [`RecordView::raw`].
    pub fn select(&self, positions: impl IntoIterator<Item = u32>, codec: Codec) -> Result<Option<Bytes>, BatchError> {
        let mut chosen = BatchBuilder::new();
        let mut raws = self.raws();
        let mut next = 0;
        for wanted in positions {
            let fewer = BatchError::Fewer {
                told: wanted,
                found: self.header.count,
            };
            let skip = wanted.checked_sub(next).ok_or(fewer.clone())?;
            let (_, raw) = raws.nth(skip as usize).ok_or(fewer)??;
            next = wanted + 1;
            if chosen.bytes() + raw.len() > BATCH_BYTES_MAX {
                return Err(BatchError::TooLarge {
                    bytes: chosen.bytes() + raw.len(),
                });
            }
            chosen.push_raw(raw);
        }
        Ok(chosen.build(codec))
    }
}

/// Walks the records' raw bytes: length, CRC and content. Checks lengths and the count, nothing else.
#[derive(Debug, Clone)]
struct Raws<'a> {
    rest: &'a [u8],
    position: u32,
    count: u32,
}

impl<'a> Raws<'a> {
    #[cold]
    fn stop(&mut self, error: BatchError) -> Option<Result<(u32, &'a [u8]), BatchError>> {
        self.rest = &[];
        self.position = self.count;
        Some(Err(error))
    }
}

impl<'a> Iterator for Raws<'a> {
    type Item = Result<(u32, &'a [u8]), BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let position = self.position;
        if position == self.count {
            if self.rest.is_empty() {
                return None;
            }
            let (bytes, count) = (self.rest.len(), self.count);
            return self.stop(BatchError::LeftOver { bytes, count });
        }
        let Some((length, _)) = self.rest.split_first_chunk::<4>() else {
            let (told, found) = (self.count, position);
            return self.stop(match self.rest {
                [] => BatchError::Fewer { told, found },
                _ => BatchError::Record {
                    position,
                    error: RecordError::PastEnd { field: "length" },
                },
            });
        };
        let length = u32::from_le_bytes(*length) as usize;
        if !(CONTENT_BYTES_MIN..=MESSAGE_BYTES_MAX).contains(&length) {
            let error = match length {
                0..CONTENT_BYTES_MIN => RecordError::PastEnd { field: "subject" },
                _ => RecordError::TooLarge { bytes: length },
            };
            return self.stop(BatchError::Record { position, error });
        }
        let Some((raw, rest)) = self.rest.split_at_checked(RECORD_PREFIX_BYTES + length) else {
            return self.stop(BatchError::Record {
                position,
                error: RecordError::PastEnd { field: "content" },
            });
        };
        self.rest = rest;
        self.position += 1;
        Some(Ok((position, raw)))
    }
}

/// The records of a batch.
#[derive(Debug, Clone)]
pub struct Records<'a> {
    raws: Raws<'a>,
}

impl<'a> Iterator for Records<'a> {
    type Item = Result<RecordView<'a>, BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (position, raw) = match self.raws.next()? {
            Ok(found) => found,
            Err(error) => return Some(Err(error)),
        };
        match record::view(position, raw, &raw[RECORD_PREFIX_BYTES..]) {
            Ok(view) => Some(Ok(view)),
            Err(error) => {
                self.raws.rest = &[];
                self.raws.position = self.raws.count;
                Some(Err(BatchError::Record { position, error }))
            }
        }
    }
}

/// What an apply needs of the records of a batch.
#[derive(Debug, Clone)]
pub struct Briefs<'a> {
    raws: Raws<'a>,
}

impl<'a> Iterator for Briefs<'a> {
    type Item = Result<RecordBrief<'a>, BatchError>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        let (position, raw) = match self.raws.next()? {
            Ok(found) => found,
            Err(error) => return Some(Err(error)),
        };
        let content = &raw[RECORD_PREFIX_BYTES..];
        match record::decode_brief(content) {
            Ok((subject, message_id)) => Some(Ok(RecordBrief {
                position,
                size: content.len() as u32,
                subject,
                message_id,
            })),
            Err(error) => {
                self.raws.rest = &[];
                self.raws.position = self.raws.count;
                Some(Err(BatchError::Record { position, error }))
            }
        }
    }
}

fn decompress_lz4(stored: &[u8], body_bytes: u32) -> Result<Bytes, BatchError> {
    let mut body = vec![0; body_bytes as usize];
    let bytes = lz4_flex::block::decompress_into(stored, &mut body).map_err(|error| BatchError::Decompress {
        codec: Codec::Lz4,
        detail: error.to_string(),
    })?;
    exact(body, bytes, body_bytes)
}

thread_local! {
    /// A context is some 150 KiB; made once per thread instead of once per batch.
    static ZSTD: RefCell<Option<zstd::bulk::Decompressor<'static>>> = const { RefCell::new(None) };
}

fn decompress_zstd(stored: &[u8], body_bytes: u32) -> Result<Bytes, BatchError> {
    let fail = |detail: String| BatchError::Decompress {
        codec: Codec::Zstd,
        detail,
    };
    // One frame and nothing after it.
    match zstd::zstd_safe::find_frame_compressed_size(stored) {
        Ok(bytes) if bytes == stored.len() => {}
        Ok(bytes) => {
            return Err(fail(format!("{} bytes after the frame", stored.len() - bytes)));
        }
        Err(_) => return Err(fail("not one whole frame".into())),
    }
    let mut body = vec![0; body_bytes as usize];
    let bytes = ZSTD
        .with_borrow_mut(|context| {
            let context = match context {
                Some(context) => context,
                None => context.insert(zstd::bulk::Decompressor::new()?),
            };
            context.decompress_to_buffer(stored, body.as_mut_slice())
        })
        .map_err(|error: std::io::Error| fail(error.to_string()))?;
    exact(body, bytes, body_bytes)
}

fn exact(body: Vec<u8>, found: usize, told: u32) -> Result<Bytes, BatchError> {
    if found != told as usize {
        return Err(BatchError::DecompressedLength { told, found });
    }
    Ok(Bytes::from(body))
}
