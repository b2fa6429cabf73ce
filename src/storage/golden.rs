//! The disk format, byte for byte, and round trips of everything in it. A failure here means that directories written
//! before could not be read any more: raise a version instead.

use bytes::Bytes;
use proptest::prelude::*;

use super::committer::{decode_batch_record, encode_batch_record, next_digest};
use super::envelope;
use super::error::Area;
use super::identity::{FORMAT_VERSION, Identity, TextFault, format_text, parse_format};
use super::keys::{self, Key};
use super::offsets;
use super::record::{frame, put_varint, take_varint, unframe};
use super::witness::{Mark, encode_slot};
use crate::model::{GroupId, LogIndex, NodeId, Sequence, ShardId, StoredBatch, Term, TimeUs};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn keys_byte_for_byte() {
    let (g, s, q) = (GroupId::new(0x0102), ShardId::new(0x0304), Sequence::new(0x0506));
    let table: Vec<(Key<'_>, &str)> = vec![
        (Key::Applied(g), "010000000000000102"),
        (Key::Shard(s), "020000000000000304"),
        (Key::Producer(s, 9), "0300000000000003040000000000000009"),
        (Key::Ids(s, q), "0400000000000003040000000000000506"),
        (Key::Holes(s, q), "0500000000000003040000000000000506"),
        (Key::Posting(s, b"a.b", q), "060000000000000304612e62000000000000000506"),
        (Key::BatchFloor(s), "070000000000000304"),
        (Key::IdFloor(s), "080000000000000304"),
        (Key::Meta(4, b"k"), "09046b"),
        (Key::Flush, "0a"),
        (Key::Batch(s, q), "1000000000000003040000000000000506"),
        (Key::Entry(g, LogIndex::new(7)), "2100000000000001020000000000000007"),
        (Key::Vote(g), "220000000000000102"),
        (Key::Committed(g), "230000000000000102"),
        (Key::Purged(g), "240000000000000102"),
        (Key::First(g), "250000000000000102"),
        (Key::Quarantine(g), "260000000000000102"),
        (Key::Owner(g), "270000000000000102"),
        (Key::Retired(g), "280000000000000102"),
        (Key::BatchRecord, "2f"),
    ];
    for (key, bytes) in &table {
        assert_eq!(hex(&key.encode()), *bytes, "{}", key.kind());
        assert_eq!(Key::decode(&key.encode()).as_ref(), Some(key));
    }
}

#[test]
fn values_byte_for_byte() {
    let key = Key::Vote(GroupId::new(1)).encode();
    let value = frame(&key, 2, |out| out.extend_from_slice(b"hi"));
    assert_eq!(hex(&value), GOLDEN_VOTE);
    let batch = StoredBatch {
        base: Sequence::new(10),
        append_time: TimeUs::new(1_700_000_000_000_000),
        term: Term::new(3),
        record_count: 5,
        rejected: vec![1, 4],
        batch: Bytes::from_static(b"producer"),
    };
    let key = envelope::key(ShardId::new(2), batch.base);
    let mut value = Vec::new();
    envelope::encode_into(&mut value, &key, &batch);
    assert_eq!(hex(&value), GOLDEN_BATCH);
    assert_eq!(envelope::decode(&key, &value).expect("good"), batch);
    let mark = Mark { number: 7, digest: 8 };
    assert_eq!(hex(&encode_slot(0x0A0B, mark)), GOLDEN_SLOT);
    let key = Key::BatchRecord.encode();
    assert_eq!(hex(&encode_batch_record(&key, mark)), GOLDEN_RECORD);
    assert_eq!(next_digest(1, b"records"), GOLDEN_DIGEST);
    for (list, bytes) in [
        (vec![], "00"),
        (vec![0], "0000"),
        (vec![0, 1, 2, 3, 4], "010004"),
        // 3, then next to it, then 4 left out, then 290 left out.
        (vec![3, 4, 9, 300], "00030004a202"),
    ] {
        let mut out = Vec::new();
        offsets::encode(&mut out, &list);
        assert_eq!(hex(&out), bytes, "{list:?}");
    }
}

const GOLDEN_VOTE: &str = "0109b6ebaf6869";
const GOLDEN_BATCH: &str =
    "0161c484c80a0000000000000000401e18240a06000300000000000000050000000300000000010270726f6475636572";
const GOLDEN_SLOT: &str = "4d535749544e45530100000000b02a1b0b0a00000000000000000000000000000700000000000000080000000000000000000000000000000000000000000000";
const GOLDEN_RECORD: &str = "0196fb986507000000000000000800000000000000";
const GOLDEN_DIGEST: u64 = 354_506_267_425_228_083;

#[test]
fn texts_word_for_word() {
    assert_eq!(FORMAT_VERSION, 1);
    assert_eq!(format_text(), GOLDEN_FORMAT);
    assert_eq!(parse_format(GOLDEN_FORMAT), Ok(1));
    assert!(matches!(
        parse_format(&GOLDEN_FORMAT.replace('1', "2")),
        Err(TextFault::Bad(_))
    ));
    let identity = Identity {
        store_id: 0xABCD,
        cluster_id: Some("c-1".into()),
        node_id: NodeId::new(3),
        incarnation: 12,
        starts: Vec::new(),
    };
    assert_eq!(identity.to_text(), GOLDEN_IDENTITY);
    assert_eq!(Identity::parse(GOLDEN_IDENTITY), Ok(identity.clone()));
    let mut opened = identity;
    for start in 1..=100 {
        opened.open_again(start);
        assert_eq!(Identity::parse(&opened.to_text()), Ok(opened.clone()));
    }
    assert_eq!(opened.incarnation, 112);
    assert_eq!(opened.starts, (37..=100).collect::<Vec<u64>>());
}

const GOLDEN_FORMAT: &str = "mainstem-data 1\ncrc 3909da1e\n";
const GOLDEN_IDENTITY: &str =
    "mainstem-identity 1\nstore 0000000000000000000000000000abcd\ncluster c-1\nnode 3\nincarnation 12\ncrc 44aef2d1\n";

fn any_key() -> impl Strategy<Value = (u8, u64, u64, Vec<u8>)> {
    (
        0u8..20,
        any::<u64>(),
        any::<u64>(),
        proptest::collection::vec(any::<u8>(), 0..40),
    )
}

fn build<'a>(kind: u8, a: u64, b: u64, bytes: &'a [u8]) -> Key<'a> {
    let (g, s, q) = (GroupId::new(a), ShardId::new(a), Sequence::new(b));
    match kind {
        0 => Key::Applied(g),
        1 => Key::Shard(s),
        2 => Key::Producer(s, b),
        3 => Key::Ids(s, q),
        4 => Key::Holes(s, q),
        5 => Key::Posting(s, bytes, q),
        6 => Key::BatchFloor(s),
        7 => Key::IdFloor(s),
        8 => Key::Meta(b as u8, bytes),
        9 => Key::Flush,
        10 => Key::Batch(s, q),
        11 => Key::Entry(g, LogIndex::new(b)),
        12 => Key::Vote(g),
        13 => Key::Committed(g),
        14 => Key::Purged(g),
        15 => Key::First(g),
        16 => Key::Quarantine(g),
        17 => Key::Owner(g),
        18 => Key::Retired(g),
        _ => Key::BatchRecord,
    }
}

proptest! {
    #[test]
    fn every_key_comes_back((kind, a, b, bytes) in any_key()) {
        let key = build(kind, a, b, &bytes);
        let encoded = key.encode();
        prop_assert_eq!(Key::decode(&encoded), Some(key));
    }

    #[test]
    fn any_bytes_are_a_key_or_not_but_never_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        if let Some(key) = Key::decode(&bytes) {
            prop_assert_eq!(key.encode(), bytes);
        }
    }

    #[test]
    fn a_prefix_range_holds_exactly_its_prefix(
        prefix in proptest::collection::vec(any::<u8>(), 1..12),
        other in proptest::collection::vec(any::<u8>(), 0..16),
    ) {
        prop_assume!(prefix[0] != 0xFF);
        let (from, to) = keys::prefix_range(prefix.clone());
        let within = other >= from && other < to;
        prop_assert_eq!(within, other.starts_with(&prefix));
    }

    #[test]
    fn keys_sort_as_their_numbers(a in any::<(u64, u64)>(), b in any::<(u64, u64)>()) {
        let key = |(s, q)| Key::Batch(ShardId::new(s), Sequence::new(q)).encode();
        prop_assert_eq!(key(a).cmp(&key(b)), a.cmp(&b));
    }

    #[test]
    fn offsets_come_back(set in proptest::collection::btree_set(0u32..5000, 0..300), dense in 0u32..300) {
        for list in [set.into_iter().collect::<Vec<_>>(), (7..7 + dense).collect()] {
            let mut out = Vec::new();
            offsets::encode(&mut out, &list);
            prop_assert_eq!(offsets::decode(&out, offsets::OFFSETS_MAX), Some(list));
        }
    }

    #[test]
    fn offsets_of_any_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..64)) {
        if let Some(list) = offsets::decode(&bytes, 1000) {
            prop_assert!(list.len() <= 1000);
            prop_assert!(list.windows(2).all(|w| w[0] < w[1]));
        }
    }

    #[test]
    fn varints_come_back(n in any::<u64>()) {
        let mut out = Vec::new();
        put_varint(&mut out, n);
        let mut rest = &out[..];
        prop_assert_eq!(take_varint(&mut rest), Some(n));
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn one_flipped_bit_anywhere_is_found(
        payload in proptest::collection::vec(any::<u8>(), 0..200), bit in any::<prop::sample::Index>()
    ) {
        let key = Key::Entry(GroupId::new(1), LogIndex::new(2)).encode();
        let mut value = frame(&key, payload.len(), |out| out.extend_from_slice(&payload));
        prop_assert_eq!(unframe(Area::Log, &key, &value).expect("good"), &payload[..]);
        let other = Key::Entry(GroupId::new(1), LogIndex::new(3)).encode();
        prop_assert!(unframe(Area::Log, &other, &value).is_err(), "a value is good for its own key only");
        let bit = bit.index(value.len() * 8);
        value[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(unframe(Area::Log, &key, &value).is_err());
    }

    #[test]
    fn batches_come_back_and_damage_in_them_is_found(
        base in 1u64..1 << 40, count in 1u32..2000, step in 1usize..9,
        bytes in proptest::collection::vec(any::<u8>(), 0..300), bit in any::<prop::sample::Index>()
    ) {
        let batch = StoredBatch {
            base: Sequence::new(base),
            append_time: TimeUs::new(base * 3),
            term: Term::new(base ^ 5),
            record_count: count,
            rejected: (0..count).step_by(step).collect(),
            batch: Bytes::from(bytes),
        };
        let key = envelope::key(ShardId::new(4), batch.base);
        let mut value = Vec::new();
        envelope::encode_into(&mut value, &key, &batch);
        prop_assert_eq!(envelope::decode(&key, &value).expect("good"), batch);
        let bit = bit.index(value.len() * 8);
        value[bit / 8] ^= 1 << (bit % 8);
        prop_assert!(envelope::decode(&key, &value).is_err());
        value.truncate(bit / 8);
        prop_assert!(envelope::decode(&key, &value).is_err());
    }
}

#[test]
fn batch_records_come_back() {
    let mark = Mark {
        number: u64::MAX,
        digest: 3,
    };
    let key = Key::BatchRecord.encode();
    let value = encode_batch_record(&key, mark);
    let payload = unframe(Area::Log, &key, &value).expect("good");
    assert_eq!(decode_batch_record(payload), Some(mark));
}
