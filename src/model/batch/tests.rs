use std::time::Instant;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::model::{Sequence, StoredBatch, Term, TimeUs};

/// What a record was made of, owned.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    subject: String,
    key: Option<Vec<u8>>,
    message_id: Option<String>,
    event_time: Option<u64>,
    headers: Vec<(String, Vec<u8>)>,
    payload: Vec<u8>,
}

fn messages() -> impl Strategy<Value = Vec<Message>> {
    let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
    let message = (
        "[a-zé]{1,8}(\\.[a-z0-9]{1,5}){0,3}",
        prop::option::of(prop::collection::vec(any::<u8>(), 1..20)),
        prop::option::of("[\\PC]{1,20}"),
        prop::option::of(any::<u64>()),
        prop::collection::vec(("[a-z-]{1,10}", bytes(30)), 0..4),
        bytes(300),
    )
        .prop_map(|(subject, key, message_id, event_time, headers, payload)| Message {
            subject,
            key,
            message_id,
            event_time,
            headers,
            payload,
        });
    prop::collection::vec(message, 1..40)
}

fn push(builder: &mut BatchBuilder, message: &Message) -> Result<u32, BuildError> {
    let headers: Vec<(&str, &[u8])> = message
        .headers
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_slice()))
        .collect();
    let fields = RecordFields {
        subject: &message.subject,
        key: message.key.as_deref(),
        message_id: message.message_id.as_deref(),
        event_time: message.event_time.map(TimeUs::new),
        headers: &headers,
        payload: &message.payload,
    };
    let expected = content_bytes(&fields);
    let size = builder.push(&fields)?;
    assert_eq!(size as usize, expected);
    Ok(size)
}

fn encode(messages: &[Message], codec: Codec) -> Bytes {
    let mut builder = BatchBuilder::new();
    for message in messages {
        push(&mut builder, message).expect("valid message");
    }
    builder.build(codec).expect("records")
}

fn owned(record: &RecordView<'_>) -> Message {
    Message {
        subject: record.subject.to_string(),
        key: record.key.map(<[u8]>::to_vec),
        message_id: record.message_id.map(str::to_string),
        event_time: record.event_time.map(TimeUs::get),
        headers: record
            .headers
            .into_iter()
            .map(|(name, value)| (name.to_string(), value.to_vec()))
            .collect(),
        payload: record.payload.to_vec(),
    }
}

fn decode(view: &BatchView) -> Vec<Message> {
    view.records()
        .map(|record| owned(&record.expect("valid record")))
        .collect()
}

/// Walks a view in every way there is. Must never panic.
fn walk(view: &BatchView) -> usize {
    let mut bytes = 0;
    for record in view.records().flatten() {
        bytes += record.payload.len() + record.headers.into_iter().count();
    }
    bytes + view.briefs().flatten().count()
}

fn simple(count: usize, bytes: usize) -> Vec<Message> {
    (0..count)
        .map(|i| Message {
            subject: format!("orders.{}", i % 10),
            key: None,
            message_id: None,
            event_time: None,
            headers: vec![],
            payload: vec![i as u8; bytes],
        })
        .collect()
}

#[test]
fn golden_bytes() {
    let message = Message {
        subject: "a.b".into(),
        key: Some(b"k".to_vec()),
        message_id: Some("id".into()),
        event_time: Some(0x0102_0304_0506_0708),
        headers: vec![("h".into(), b"v".to_vec())],
        payload: b"payload".to_vec(),
    };
    let plain = Message {
        subject: "x".into(),
        key: None,
        message_id: None,
        event_time: None,
        headers: vec![],
        payload: vec![],
    };
    let encoded = encode(&[message, plain], Codec::None);
    let hex: String = encoded.iter().map(|byte| format!("{byte:02x}")).collect();
    // Written down once; the format is for ever.
    assert_eq!(hex, include_str!("golden.hex").trim());
}

#[test]
fn every_bit_counts() {
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let encoded = encode(&simple(5, 40), codec);
        assert!(BatchView::parse(encoded.clone()).is_ok());
        for bit in 0..encoded.len() * 8 {
            let mut flipped = encoded.to_vec();
            flipped[bit / 8] ^= 1 << (bit % 8);
            let flipped = Bytes::from(flipped);
            assert!(BatchView::parse(flipped.clone()).is_err(), "{codec:?} bit {bit}");
            if let Ok(view) = BatchView::trusted(flipped) {
                walk(&view);
            }
        }
        for length in 0..encoded.len() {
            assert!(BatchView::parse(encoded.slice(..length)).is_err());
            assert!(BatchView::trusted(encoded.slice(..length)).is_err());
        }
        let mut longer = encoded.to_vec();
        longer.push(0);
        assert!(BatchView::parse(longer.into()).is_err());
    }
}

/// Makes the header and record CRCs right again, so that what is tested lies behind them.
fn reseal(encoded: &[u8]) -> Bytes {
    let mut body = encoded[HEADER_BYTES..].to_vec();
    let mut at = 0;
    while at + RECORD_PREFIX_BYTES <= body.len() {
        let length = u32::from_le_bytes([body[at], body[at + 1], body[at + 2], body[at + 3]]) as usize;
        let Some(content) = body.get(at + 8..(at + 8).saturating_add(length)) else {
            break;
        };
        let crc = crc32fast::hash(content);
        body[at + 4..at + 8].copy_from_slice(&crc.to_le_bytes());
        at += 8 + length;
    }
    let mut out = encoded[..HEADER_BYTES].to_vec();
    out.extend_from_slice(&body);
    let crc = batch_crc(&out);
    out[20..24].copy_from_slice(&crc.to_le_bytes());
    out.into()
}

#[test]
fn refusals_are_precise() {
    let good = encode(&simple(3, 4), Codec::None);
    let change = |f: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = good.to_vec();
        f(&mut bytes);
        BatchView::parse(reseal(&bytes)).map(|view| view.len())
    };
    assert_eq!(change(&|_| ()), Ok(3));
    assert_eq!(change(&|b| b[0] = b'X'), Err(BatchError::Magic { found: *b"XB" }));
    assert_eq!(change(&|b| b[2] = 2), Err(BatchError::Version { found: 2 }));
    assert_eq!(change(&|b| b[3] = 3), Err(BatchError::Codec { found: 3 }));
    assert_eq!(change(&|b| b[16] = 1), Err(BatchError::Flags { found: 1 }));
    assert_eq!(change(&|b| b[4] = 0), Err(BatchError::Count { count: 0 }));
    assert_eq!(change(&|b| b[6] = 2), Err(BatchError::Count { count: 131_075 }));
    assert_eq!(change(&|b| b[4] = 4), Err(BatchError::Fewer { told: 4, found: 3 }));
    assert_eq!(change(&|b| b[4] = 2), Err(BatchError::LeftOver { bytes: 22, count: 2 }));
    assert_eq!(
        change(&|b| b[12] ^= 1),
        Err(BatchError::DecompressedLength { told: 67, found: 66 })
    );
    assert_eq!(
        change(&|b| b[15] = 2),
        Err(BatchError::BodyTooLarge { bytes: (2 << 24) + 66 })
    );
    let record = |error| Err(BatchError::Record { position: 0, error });
    assert_eq!(
        change(&|b| b[24] = 200),
        record(RecordError::PastEnd { field: "content" })
    );
    assert_eq!(
        change(&|b| b[27] = 200),
        record(RecordError::TooLarge {
            bytes: 14 + (200 << 24)
        })
    );
    assert_eq!(change(&|b| b[32] = 16), record(RecordError::Flags { found: 16 }));
    assert_eq!(
        change(&|b| b[33] = 100),
        record(RecordError::PastEnd { field: "subject" })
    );
    assert_eq!(
        change(&|b| b[33] = 0),
        record(RecordError::Subject(SubjectError::Empty))
    );
    assert!(matches!(
        change(&|b| b[34] = b'*'),
        Err(BatchError::Record {
            error: RecordError::Subject(SubjectError::Wildcard { at: 0, .. }),
            ..
        })
    ));
    assert!(matches!(
        change(&|b| b[34] = 0xff),
        Err(BatchError::Record {
            error: RecordError::NotUtf8 { .. },
            ..
        })
    ));
    // Flags that say of a field that is not there.
    assert!(matches!(
        change(&|b| b[32] = 1),
        Err(BatchError::Record {
            error: RecordError::Key { .. },
            ..
        })
    ));
    assert!(matches!(change(&|b| b[32] = 2), Err(BatchError::Record { .. })));
    assert!(matches!(
        change(&|b| b[32] = 4),
        Err(BatchError::Record {
            error: RecordError::PastEnd { .. },
            ..
        })
    ));
    // A CRC of one record that does not match, under a header CRC that does.
    let mut bytes = good.to_vec();
    bytes[28] ^= 1;
    let crc = batch_crc(&bytes);
    bytes[20..24].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(
        BatchView::parse(bytes.into()),
        Err(BatchError::Record {
            position: 0,
            error: RecordError::Crc { .. }
        })
    ));
}

#[test]
fn compressed_bodies_are_bounded() {
    let good = encode(&simple(100, 100), Codec::Zstd);
    assert_eq!(BatchHeader::peek(&good).expect("header").codec, Codec::Zstd);
    // A frame and then another: not one frame.
    let mut two = good.to_vec();
    two.extend_from_slice(&good[HEADER_BYTES..]);
    let stored = (two.len() - HEADER_BYTES) as u32;
    two[8..12].copy_from_slice(&stored.to_le_bytes());
    let crc = batch_crc(&two);
    two[20..24].copy_from_slice(&crc.to_le_bytes());
    assert!(matches!(
        BatchView::parse(two.into()),
        Err(BatchError::Decompress { codec: Codec::Zstd, .. })
    ));
    for codec in [Codec::Lz4, Codec::Zstd] {
        // More or less in the body than told.
        for told in [10u32, 20_000] {
            let mut lies = encode(&simple(100, 100), codec).to_vec();
            lies[12..16].copy_from_slice(&told.to_le_bytes());
            let crc = batch_crc(&lies);
            lies[20..24].copy_from_slice(&crc.to_le_bytes());
            assert!(BatchView::parse(lies.into()).is_err(), "{codec:?} {told}");
        }
    }
}

#[test]
fn builder_refuses_and_stays_usable() {
    let mut builder = BatchBuilder::with_bytes_max(200);
    let good = &simple(1, 100)[0];
    let bad = |change: &dyn Fn(&mut Message)| {
        let mut message = good.clone();
        change(&mut message);
        message
    };
    for message in [
        bad(&|m| m.subject = "a..b".into()),
        bad(&|m| m.key = Some(vec![])),
        bad(&|m| m.key = Some(vec![0; 1_025])),
        bad(&|m| m.message_id = Some(String::new())),
        bad(&|m| m.message_id = Some("x".repeat(256))),
        bad(&|m| m.headers = vec![(String::new(), vec![])]),
        bad(&|m| m.headers = vec![("h".into(), vec![]); 65]),
        bad(&|m| m.payload = vec![0; MESSAGE_BYTES_MAX]),
    ] {
        assert!(matches!(push(&mut builder, &message), Err(BuildError::Record(_))));
    }
    assert!(builder.build(Codec::None).is_none());
    push(&mut builder, good).expect("fits");
    assert!(matches!(
        push(&mut builder, good),
        Err(BuildError::Full { records: 1, .. })
    ));
    let batch = builder.build(Codec::None).expect("one record");
    assert_eq!(decode(&BatchView::parse(batch).expect("valid")), vec![good.clone()]);
    // A message larger than the chosen size is taken alone.
    let large = bad(&|m| m.payload = vec![1; MESSAGE_BYTES_MAX - 10]);
    push(&mut builder, &large).expect("taken alone");
    assert!(BatchView::parse(builder.build(Codec::Lz4).expect("one")).is_ok());
}

#[test]
fn random_bytes_are_never_worth_compressing() {
    let mut state = 1u64;
    let mut noise = simple(1, 5_000);
    for byte in &mut noise[0].payload {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    for codec in [Codec::Lz4, Codec::Zstd] {
        let encoded = encode(&noise, codec);
        assert_eq!(BatchHeader::peek(&encoded).expect("header").codec, Codec::None);
    }
}

#[test]
fn places_in_a_stored_batch() {
    let stored = StoredBatch {
        base: Sequence::new(100),
        append_time: TimeUs::new(0),
        term: Term::new(1),
        record_count: 8,
        rejected: vec![0, 3, 4, 7],
        batch: Bytes::new(),
    };
    let found: Vec<_> = (0..9).map(|p| stored.sequence_of(p).map(Sequence::get)).collect();
    let none = None;
    assert_eq!(
        found,
        [none, Some(100), Some(101), none, none, Some(102), Some(103), none, none]
    );
    for position in 0..8 {
        if let Some(sequence) = stored.sequence_of(position) {
            assert_eq!(stored.position_of(sequence), Some(position));
        }
    }
    assert_eq!(stored.position_of(Sequence::new(99)), None);
    assert_eq!(stored.position_of(Sequence::new(104)), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn round_trip(messages in messages(), codec in prop::sample::select(vec![Codec::None, Codec::Lz4, Codec::Zstd])) {
        let encoded = encode(&messages, codec);
        let view = BatchView::parse(encoded.clone()).expect("valid");
        prop_assert_eq!(view.len() as usize, messages.len());
        prop_assert_eq!(&decode(&view), &messages);
        let trusted = BatchView::trusted(encoded).expect("valid");
        prop_assert_eq!(&decode(&trusted), &messages);
        let mut total = 0;
        for (brief, message) in trusted.briefs().zip(&messages) {
            let brief = brief.expect("valid");
            prop_assert_eq!(brief.subject, message.subject.as_bytes());
            prop_assert_eq!(brief.message_id, message.message_id.as_deref().map(str::as_bytes));
            total += u64::from(brief.size);
        }
        prop_assert_eq!(view.message_bytes(), total);
    }

    #[test]
    fn selecting(messages in messages(), chosen in prop::collection::btree_set(0u32..40, 0..40)) {
        let view = BatchView::parse(encode(&messages, Codec::Lz4)).expect("valid");
        let chosen: Vec<u32> = chosen.into_iter().filter(|p| (*p as usize) < messages.len()).collect();
        let expected: Vec<_> = chosen.iter().map(|p| messages[*p as usize].clone()).collect();
        match view.select(chosen.iter().copied(), Codec::None).expect("fits") {
            None => prop_assert!(expected.is_empty()),
            Some(batch) => prop_assert_eq!(decode(&BatchView::parse(batch).expect("valid")), expected),
        }
        prop_assert!(view.select([messages.len() as u32], Codec::None).is_err());
        prop_assert!(view.select([0, 0], Codec::None).is_err());
    }

    #[test]
    fn mutations_never_panic(
        messages in messages(),
        codec in prop::sample::select(vec![Codec::None, Codec::Lz4, Codec::Zstd]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in prop::option::of(any::<prop::sample::Index>()),
    ) {
        let mut bytes = encode(&messages, codec).to_vec();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()).max(HEADER_BYTES));
            let stored = (bytes.len() - HEADER_BYTES) as u32;
            bytes[8..12].copy_from_slice(&stored.to_le_bytes());
        }
        // As it is, with CRCs made right for an uncompressed body, and with only the header's made right.
        let mut header_only = bytes.clone();
        let crc = batch_crc(&header_only);
        header_only[20..24].copy_from_slice(&crc.to_le_bytes());
        for bytes in [Bytes::from(bytes.clone()), reseal(&bytes), header_only.into()] {
            if let Ok(view) = BatchView::parse(bytes.clone()) {
                // What passed can be walked to its end without an error.
                prop_assert_eq!(view.records().filter(Result::is_ok).count(), view.len() as usize);
                prop_assert_eq!(view.records().count(), view.len() as usize);
            }
            if let Ok(view) = BatchView::trusted(bytes) {
                walk(&view);
                let _ = view.select(0..view.len(), Codec::None);
            }
        }
    }
}

/// `cargo test --release --lib model::batch -- --ignored --nocapture`
#[test]
#[ignore = "prints how long it takes"]
fn how_fast() {
    for (bytes, count) in [(128, 1_000), (128, 10_000), (1_024, 1_000)] {
        for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
            let messages = simple(count, bytes);
            let rounds = 20_000_000 / (count * bytes) + 1;
            let per_record = |begun: Instant| begun.elapsed().as_nanos() / (rounds * count) as u128;
            let begun = Instant::now();
            for _ in 0..rounds {
                std::hint::black_box(encode(&messages, codec));
            }
            let encoding = per_record(begun);
            let encoded = encode(&messages, codec);
            let begun = Instant::now();
            for _ in 0..rounds {
                std::hint::black_box(BatchView::parse(encoded.clone()).expect("valid"));
            }
            let parsing = per_record(begun);
            let view = BatchView::trusted(encoded.clone()).expect("valid");
            let begun = Instant::now();
            for _ in 0..rounds {
                std::hint::black_box(walk(&view));
            }
            println!(
                "{count} x {bytes} B, {}: encode {encoding}, parse {parsing}, walk twice {} ns/record",
                codec.as_str(),
                per_record(begun)
            );
        }
    }
}
