//! A batch as a reader gets it: the producer's bytes, and which of its records count.

use bytes::Bytes;

use crate::client::error::ClientError;
use crate::client::message::StoredMessage;
use crate::model::BatchView;
use crate::model::batch::{RecordView, Records};
use crate::wire::v1;

/// Messages of one shard, in order. Holds the batch as it came; iterating copies nothing.
#[derive(Debug, Clone)]
pub struct MessageBatch {
    /// Index of the shard in the stream.
    pub shard: u32,
    /// When the batch was appended, in microseconds since the Unix epoch.
    pub append_time_us: u64,
    /// Raft term.
    pub term: u64,
    /// Where reading goes on after this batch: [`Start::Cursor`](super::Start::Cursor).
    pub cursor: Bytes,
    view: BatchView,
    base: u64,
    places: Places,
    /// Messages below this sequence were not asked for.
    skip_below: u64,
    /// How many messages it delivers.
    messages: u32,
}

/// Which sequence a record has.
#[derive(Debug, Clone)]
enum Places {
    /// They count up from the base, but these positions have none. Ascending.
    DenseBut(Vec<u32>),
    /// Offset from the base of each record. Ascending.
    Offsets(Vec<u32>),
}

impl MessageBatch {
    /// Checks a frame: the batch and its checksums, and that the places are possible.
    pub(super) fn parse(frame: v1::ReadBatch) -> Result<Self, ClientError> {
        let at = (frame.shard, frame.base_sequence);
        let bad =
            |what: String| ClientError::bad_answer(format!("the batch at sequence {} of shard {} {what}", at.1, at.0));
        let view = BatchView::parse(frame.batch).map_err(|e| bad(format!("is damaged: {e}")))?;
        let ascending = |list: &[u32]| list.windows(2).all(|w| w[0] < w[1]);
        let places = if frame.sequence_offsets.is_empty() {
            if !ascending(&frame.absent) || frame.absent.last().is_some_and(|&p| p >= view.len()) {
                return Err(bad("names absent records that it does not have".to_owned()));
            }
            Places::DenseBut(frame.absent)
        } else {
            if !ascending(&frame.sequence_offsets) || frame.sequence_offsets.len() != view.len() as usize {
                return Err(bad("does not tell the sequence of each record".to_owned()));
            }
            Places::Offsets(frame.sequence_offsets)
        };
        let mut batch = MessageBatch {
            shard: frame.shard,
            append_time_us: frame.append_time_us,
            term: frame.term,
            cursor: frame.cursor,
            view,
            base: frame.base_sequence,
            places,
            skip_below: 0,
            messages: 0,
        };
        batch.skip_below(frame.skip_below.unwrap_or(0));
        if batch.messages != frame.messages {
            return Err(bad(format!(
                "should deliver {} messages, but has {}",
                frame.messages, batch.messages
            )));
        }
        Ok(batch)
    }

    /// Also leaves out messages below this sequence.
    pub(super) fn skip_below(&mut self, sequence: u64) {
        self.skip_below = self.skip_below.max(sequence);
        let wanted_from = self.skip_below.saturating_sub(self.base);
        self.messages = match &self.places {
            Places::DenseBut(absent) => {
                let placed = u64::from(self.view.len()) - absent.len() as u64;
                placed.saturating_sub(wanted_from) as u32
            }
            Places::Offsets(offsets) => {
                (offsets.len() - offsets.partition_point(|&o| u64::from(o) < wanted_from)) as u32
            }
        };
    }

    /// How many messages it delivers.
    pub fn len(&self) -> u32 {
        self.messages
    }

    /// Whether it delivers none.
    pub fn is_empty(&self) -> bool {
        self.messages == 0
    }

    /// Encoded size, in bytes.
    pub fn encoded_bytes(&self) -> usize {
        self.view.encoded().len()
    }

    /// Sequence after the last record of the batch.
    pub(super) fn end(&self) -> u64 {
        match &self.places {
            Places::DenseBut(absent) => self.base + u64::from(self.view.len()) - absent.len() as u64,
            Places::Offsets(offsets) => self.base + offsets.last().map_or(0, |&o| u64::from(o) + 1),
        }
    }

    /// The messages with their sequences, borrowed from the batch.
    pub fn iter(&self) -> Messages<'_> {
        Messages {
            batch: self,
            records: self.view.records(),
            next: self.base,
            absent: 0,
        }
    }

    /// A message that outlives the batch; its payload shares the batch's memory if the batch is not compressed.
    pub fn to_owned_message(&self, sequence: u64, record: &RecordView<'_>) -> StoredMessage {
        StoredMessage {
            shard: self.shard,
            sequence,
            append_time_us: self.append_time_us,
            subject: record.subject.to_owned(),
            payload: self.share(record.payload),
            key: record.key.map(|k| self.share(k)),
            message_id: record.message_id.map(str::to_owned),
            event_time_us: record.event_time.map(|t| t.get()),
            headers: record
                .headers
                .into_iter()
                .map(|(n, v)| (n.to_owned(), self.share(v)))
                .collect(),
        }
    }

    fn share(&self, part: &[u8]) -> Bytes {
        let encoded = self.view.encoded();
        let (whole, inner) = (encoded.as_ptr_range(), part.as_ptr_range());
        if whole.start <= inner.start && inner.end <= whole.end {
            encoded.slice_ref(part)
        } else {
            // It points into the decompressed body.
            Bytes::copy_from_slice(part)
        }
    }
}

impl<'a> IntoIterator for &'a MessageBatch {
    type Item = (u64, RecordView<'a>);
    type IntoIter = Messages<'a>;

    fn into_iter(self) -> Messages<'a> {
        self.iter()
    }
}

/// The messages of a batch with their sequences.
#[derive(Debug, Clone)]
pub struct Messages<'a> {
    batch: &'a MessageBatch,
    records: Records<'a>,
    /// Sequence of the next record that has one.
    next: u64,
    /// How many absent positions were passed.
    absent: usize,
}

impl<'a> Iterator for Messages<'a> {
    type Item = (u64, RecordView<'a>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let record = self.records.next()?.expect("the batch was checked when it came");
            let sequence = match &self.batch.places {
                Places::DenseBut(absent) => {
                    if absent.get(self.absent) == Some(&record.position) {
                        self.absent += 1;
                        continue;
                    }
                    self.next += 1;
                    self.next - 1
                }
                Places::Offsets(offsets) => self.batch.base + u64::from(offsets[record.position as usize]),
            };
            if sequence >= self.batch.skip_below {
                return Some((sequence, record));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::batch::RecordFields;
    use crate::model::{BatchBuilder, Codec};

    fn encoded(n: u32, codec: Codec) -> Bytes {
        let mut builder = BatchBuilder::new();
        for i in 0..n {
            let payload = format!("payload payload payload {i}");
            let fields = RecordFields {
                subject: "a.b",
                payload: payload.as_bytes(),
                headers: &[("h", b"v")],
                key: Some(b"k"),
                ..RecordFields::default()
            };
            builder.push(&fields).expect("room");
        }
        builder.build(codec).expect("records")
    }

    fn frame(n: u32, messages: u32) -> v1::ReadBatch {
        v1::ReadBatch {
            base_sequence: 100,
            batch: encoded(n, Codec::None),
            messages,
            ..v1::ReadBatch::default()
        }
    }

    fn sequences(batch: &MessageBatch) -> Vec<(u64, u32)> {
        batch.iter().map(|(s, r)| (s, r.position)).collect()
    }

    #[test]
    fn absent_records_have_no_sequence() {
        let batch = MessageBatch::parse(v1::ReadBatch {
            absent: vec![0, 2],
            ..frame(5, 3)
        })
        .expect("valid");
        assert_eq!(sequences(&batch), [(100, 1), (101, 3), (102, 4)]);
        assert_eq!(batch.end(), 103);
    }

    #[test]
    fn a_reader_can_begin_within_a_batch() {
        let mut batch = MessageBatch::parse(v1::ReadBatch {
            skip_below: Some(103),
            ..frame(5, 2)
        })
        .expect("valid");
        assert_eq!(sequences(&batch), [(103, 3), (104, 4)]);
        batch.skip_below(104);
        assert_eq!((batch.len(), sequences(&batch)), (1, vec![(104, 4)]));
        batch.skip_below(200);
        assert!(batch.is_empty() && sequences(&batch).is_empty());
    }

    #[test]
    fn filtered_batches_tell_each_sequence() {
        let offsets = vec![3, 7, 9];
        let batch = MessageBatch::parse(v1::ReadBatch {
            sequence_offsets: offsets,
            skip_below: Some(104),
            ..frame(3, 2)
        })
        .expect("valid");
        assert_eq!(sequences(&batch), [(107, 1), (109, 2)]);
        assert_eq!(batch.end(), 110);
    }

    #[test]
    fn frames_that_cannot_be_are_refused() {
        for bad in [
            frame(3, 2),
            v1::ReadBatch {
                absent: vec![3],
                ..frame(3, 2)
            },
            v1::ReadBatch {
                absent: vec![1, 1],
                ..frame(3, 1)
            },
            v1::ReadBatch {
                sequence_offsets: vec![1, 2],
                ..frame(3, 3)
            },
            v1::ReadBatch {
                sequence_offsets: vec![1, 3, 2],
                ..frame(3, 3)
            },
        ] {
            assert_eq!(MessageBatch::parse(bad).expect_err("bad").reason, "BAD_ANSWER");
        }
    }

    #[test]
    fn a_flipped_bit_is_found() {
        let good = frame(3, 3);
        for at in 0..good.batch.len() {
            let mut bytes = good.batch.to_vec();
            bytes[at] ^= 0x10;
            assert!(
                MessageBatch::parse(v1::ReadBatch {
                    batch: bytes.into(),
                    ..good.clone()
                })
                .is_err(),
                "byte {at}"
            );
        }
    }

    #[test]
    fn owned_messages_are_whole_with_every_codec() {
        for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
            let batch = MessageBatch::parse(v1::ReadBatch {
                batch: encoded(9, codec),
                ..frame(9, 9)
            })
            .expect("valid");
            for (i, (sequence, record)) in batch.iter().enumerate() {
                let message = batch.to_owned_message(sequence, &record);
                assert_eq!(message.payload, format!("payload payload payload {i}"));
                assert_eq!(message.headers, [("h".to_owned(), Bytes::from_static(b"v"))]);
                assert_eq!(message.key.as_deref(), Some(&b"k"[..]));
            }
        }
    }
}
