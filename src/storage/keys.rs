//! Every key that is ever written, in one table. Numbers are big endian, so that keys sort as numbers do.
//!
//! | area  | family  | tag  | key after the tag              | value (inside the frame of `record.rs`) |
//! |-------|---------|------|--------------------------------|------------------------------------------|
//! | state | index   | 0x01 | group                          | applied marker: log index, marker bytes |
//! | state | index   | 0x02 | shard                          | shard record: group, record bytes |
//! | state | index   | 0x03 | shard, producer                | producer record |
//! | state | index   | 0x04 | shard, sequence                | id block |
//! | state | index   | 0x05 | shard, base                    | holes: ascending offsets |
//! | state | index   | 0x06 | shard, subject, 0x00, base     | posting: ascending offsets |
//! | state | index   | 0x07 | shard                          | batch floor: base of the first batch kept |
//! | state | index   | 0x08 | shard                          | id floor: sequence of the first id block kept |
//! | state | index   | 0x09 | kind (1 byte), key             | record of the meta group |
//! | state | index   | 0x0A |                                | flush generation |
//! | state | batches | 0x10 | shard, base                    | batch envelope (`envelope.rs`) |
//! | log   | default | 0x21 | group, log index               | entry |
//! | log   | default | 0x22 | group                          | vote |
//! | log   | default | 0x23 | group                          | committed log id, a hint |
//! | log   | default | 0x24 | group                          | purge marker: log index, log id |
//! | log   | default | 0x25 | group                          | index of the first entry ever, until something is purged |
//! | log   | default | 0x26 | group                          | quarantine: the group was set aside |
//! | log   | default | 0x27 | group                          | owner: the id of the replica whose log this is |
//! | log   | default | 0x28 | group                          | retired: no replica with this id or a lower one runs here again |
//! | log   | default | 0x2F |                                | batch record: number and digest of the committer's last write |
//!
//! Families: `index` is state/'s default one. The table is disk format: a tag is never given another meaning.

use crate::model::{GroupId, LogIndex, Sequence, ShardId};

const APPLIED: u8 = 0x01;
const SHARD: u8 = 0x02;
const PRODUCER: u8 = 0x03;
const IDS: u8 = 0x04;
const HOLES: u8 = 0x05;
const POSTING: u8 = 0x06;
const BATCH_FLOOR: u8 = 0x07;
const ID_FLOOR: u8 = 0x08;
const META: u8 = 0x09;
const FLUSH: u8 = 0x0A;
const BATCH: u8 = 0x10;
const ENTRY: u8 = 0x21;
const VOTE: u8 = 0x22;
const COMMITTED: u8 = 0x23;
const PURGED: u8 = 0x24;
const FIRST: u8 = 0x25;
const QUARANTINE: u8 = 0x26;
const OWNER: u8 = 0x27;
const RETIRED: u8 = 0x28;
const BATCH_RECORD: u8 = 0x2F;

/// A key, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Key<'a> {
    Applied(GroupId),
    Shard(ShardId),
    Producer(ShardId, u64),
    Ids(ShardId, Sequence),
    Holes(ShardId, Sequence),
    Posting(ShardId, &'a [u8], Sequence),
    BatchFloor(ShardId),
    IdFloor(ShardId),
    Meta(u8, &'a [u8]),
    Flush,
    Batch(ShardId, Sequence),
    Entry(GroupId, LogIndex),
    Vote(GroupId),
    Committed(GroupId),
    Purged(GroupId),
    First(GroupId),
    Quarantine(GroupId),
    Owner(GroupId),
    Retired(GroupId),
    BatchRecord,
}

impl<'a> Key<'a> {
    /// The bytes on disk.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(18);
        self.encode_into(&mut out);
        out
    }

    /// Appends the bytes on disk.
    pub fn encode_into(&self, out: &mut Vec<u8>) {
        match *self {
            Key::Applied(g) => one(out, APPLIED, g.get()),
            Key::Shard(s) => one(out, SHARD, s.get()),
            Key::Producer(s, p) => two(out, PRODUCER, s.get(), p),
            Key::Ids(s, q) => two(out, IDS, s.get(), q.get()),
            Key::Holes(s, q) => two(out, HOLES, s.get(), q.get()),
            Key::Posting(s, subject, base) => {
                one(out, POSTING, s.get());
                out.extend_from_slice(subject);
                out.push(0);
                out.extend_from_slice(&base.get().to_be_bytes());
            }
            Key::BatchFloor(s) => one(out, BATCH_FLOOR, s.get()),
            Key::IdFloor(s) => one(out, ID_FLOOR, s.get()),
            Key::Meta(kind, key) => {
                out.extend_from_slice(&[META, kind]);
                out.extend_from_slice(key);
            }
            Key::Flush => out.push(FLUSH),
            Key::Batch(s, q) => two(out, BATCH, s.get(), q.get()),
            Key::Entry(g, i) => two(out, ENTRY, g.get(), i.get()),
            Key::Vote(g) => one(out, VOTE, g.get()),
            Key::Committed(g) => one(out, COMMITTED, g.get()),
            Key::Purged(g) => one(out, PURGED, g.get()),
            Key::First(g) => one(out, FIRST, g.get()),
            Key::Quarantine(g) => one(out, QUARANTINE, g.get()),
            Key::Owner(g) => one(out, OWNER, g.get()),
            Key::Retired(g) => one(out, RETIRED, g.get()),
            Key::BatchRecord => out.push(BATCH_RECORD),
        }
    }

    /// Takes a key apart. `None` for anything that no version of this table wrote.
    pub fn decode(bytes: &'a [u8]) -> Option<Key<'a>> {
        let (&tag, rest) = bytes.split_first()?;
        Some(match tag {
            APPLIED => Key::Applied(GroupId::new(last(rest)?)),
            SHARD => Key::Shard(ShardId::new(last(rest)?)),
            PRODUCER => {
                let (s, p) = pair(rest)?;
                Key::Producer(ShardId::new(s), p)
            }
            IDS => {
                let (s, q) = pair(rest)?;
                Key::Ids(ShardId::new(s), Sequence::new(q))
            }
            HOLES => {
                let (s, q) = pair(rest)?;
                Key::Holes(ShardId::new(s), Sequence::new(q))
            }
            POSTING => {
                let (s, rest) = number(rest)?;
                let cut = rest.len().checked_sub(9)?;
                let (subject, tail) = rest.split_at(cut);
                let (&zero, base) = tail.split_first()?;
                if zero != 0 {
                    return None;
                }
                Key::Posting(ShardId::new(s), subject, Sequence::new(last(base)?))
            }
            BATCH_FLOOR => Key::BatchFloor(ShardId::new(last(rest)?)),
            ID_FLOOR => Key::IdFloor(ShardId::new(last(rest)?)),
            META => {
                let (&kind, key) = rest.split_first()?;
                Key::Meta(kind, key)
            }
            FLUSH if rest.is_empty() => Key::Flush,
            BATCH => {
                let (s, q) = pair(rest)?;
                Key::Batch(ShardId::new(s), Sequence::new(q))
            }
            ENTRY => {
                let (g, i) = pair(rest)?;
                Key::Entry(GroupId::new(g), LogIndex::new(i))
            }
            VOTE => Key::Vote(GroupId::new(last(rest)?)),
            COMMITTED => Key::Committed(GroupId::new(last(rest)?)),
            PURGED => Key::Purged(GroupId::new(last(rest)?)),
            FIRST => Key::First(GroupId::new(last(rest)?)),
            QUARANTINE => Key::Quarantine(GroupId::new(last(rest)?)),
            OWNER => Key::Owner(GroupId::new(last(rest)?)),
            RETIRED => Key::Retired(GroupId::new(last(rest)?)),
            BATCH_RECORD if rest.is_empty() => Key::BatchRecord,
            _ => return None,
        })
    }

    /// The kind's name, for errors.
    pub fn kind(&self) -> &'static str {
        match self {
            Key::Applied(_) => "applied marker",
            Key::Shard(_) => "shard record",
            Key::Producer(..) => "producer record",
            Key::Ids(..) => "id block",
            Key::Holes(..) => "holes",
            Key::Posting(..) => "posting",
            Key::BatchFloor(_) => "batch floor",
            Key::IdFloor(_) => "id floor",
            Key::Meta(..) => "meta record",
            Key::Flush => "flush generation",
            Key::Batch(..) => "batch",
            Key::Entry(..) => "entry",
            Key::Vote(_) => "vote",
            Key::Committed(_) => "committed hint",
            Key::Purged(_) => "purge marker",
            Key::First(_) => "first index",
            Key::Quarantine(_) => "quarantine mark",
            Key::Owner(_) => "owner",
            Key::Retired(_) => "retired mark",
            Key::BatchRecord => "batch record",
        }
    }
}

impl std::fmt::Display for Key<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Key::Applied(g)
            | Key::Vote(g)
            | Key::Committed(g)
            | Key::Purged(g)
            | Key::First(g)
            | Key::Quarantine(g)
            | Key::Owner(g)
            | Key::Retired(g) => write!(f, "{g}"),
            Key::Shard(s) | Key::BatchFloor(s) | Key::IdFloor(s) => write!(f, "{s}"),
            Key::Producer(s, p) => write!(f, "{s}/{p}"),
            Key::Ids(s, q) | Key::Holes(s, q) | Key::Batch(s, q) => write!(f, "{s}/{q}"),
            Key::Posting(s, subject, q) => write!(f, "{s}/{}/{q}", String::from_utf8_lossy(subject)),
            Key::Meta(kind, key) => write!(f, "{kind}/{}", key.escape_ascii()),
            Key::Flush | Key::BatchRecord => Ok(()),
            Key::Entry(g, i) => write!(f, "{g}/{i}"),
        }
    }
}

fn one(out: &mut Vec<u8>, tag: u8, a: u64) {
    out.push(tag);
    out.extend_from_slice(&a.to_be_bytes());
}

fn two(out: &mut Vec<u8>, tag: u8, a: u64, b: u64) {
    one(out, tag, a);
    out.extend_from_slice(&b.to_be_bytes());
}

fn number(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let (head, rest) = bytes.split_first_chunk::<8>()?;
    Some((u64::from_be_bytes(*head), rest))
}

fn last(bytes: &[u8]) -> Option<u64> {
    let (n, rest) = number(bytes)?;
    rest.is_empty().then_some(n)
}

fn pair(bytes: &[u8]) -> Option<(u64, u64)> {
    let (a, rest) = number(bytes)?;
    Some((a, last(rest)?))
}

/// A range of keys: from inclusive, to exclusive.
pub type KeyRange = (Vec<u8>, Vec<u8>);

/// The range of every key that begins with `prefix`.
pub fn prefix_range(prefix: Vec<u8>) -> KeyRange {
    let mut end = prefix.clone();
    while let Some(byte) = end.pop() {
        if byte < u8::MAX {
            end.push(byte + 1);
            return (prefix, end);
        }
    }
    // Only a prefix of 0xFF bytes has no successor, and no tag is 0xFF.
    (prefix, vec![u8::MAX; 32])
}

fn shard_prefix(tag: u8, shard: ShardId) -> KeyRange {
    let mut prefix = Vec::with_capacity(9);
    one(&mut prefix, tag, shard.get());
    prefix_range(prefix)
}

/// All batches of a shard.
pub fn batches_of(shard: ShardId) -> KeyRange {
    shard_prefix(BATCH, shard)
}

/// All id blocks of a shard.
pub fn ids_of(shard: ShardId) -> KeyRange {
    shard_prefix(IDS, shard)
}

/// All producers of a shard.
pub fn producers_of(shard: ShardId) -> KeyRange {
    shard_prefix(PRODUCER, shard)
}

/// All holes of a shard.
pub fn holes_of(shard: ShardId) -> KeyRange {
    shard_prefix(HOLES, shard)
}

/// All postings of a shard whose subject begins with `subject_prefix`.
pub fn postings_of(shard: ShardId, subject_prefix: &[u8]) -> KeyRange {
    let mut prefix = Vec::with_capacity(9 + subject_prefix.len());
    one(&mut prefix, POSTING, shard.get());
    prefix.extend_from_slice(subject_prefix);
    prefix_range(prefix)
}

/// All postings of exactly this subject, provided that no subject contains a zero byte.
pub fn postings_of_subject(shard: ShardId, subject: &[u8]) -> KeyRange {
    let mut prefix = Vec::with_capacity(10 + subject.len());
    one(&mut prefix, POSTING, shard.get());
    prefix.extend_from_slice(subject);
    prefix.push(0);
    prefix_range(prefix)
}

/// All applied markers.
pub fn all_applied() -> KeyRange {
    prefix_range(vec![APPLIED])
}

/// All shard records.
pub fn all_shards() -> KeyRange {
    prefix_range(vec![SHARD])
}

/// All batch floors.
pub fn all_batch_floors() -> KeyRange {
    prefix_range(vec![BATCH_FLOOR])
}

/// All id floors.
pub fn all_id_floors() -> KeyRange {
    prefix_range(vec![ID_FLOOR])
}

/// All meta records.
pub fn all_meta() -> KeyRange {
    prefix_range(vec![META])
}

/// All meta records of a kind.
pub fn meta_of(kind: u8) -> KeyRange {
    prefix_range(vec![META, kind])
}

/// The entries of a group with an index in [from, to).
pub fn entries_of(group: GroupId, from: LogIndex, to_exclusive: Option<LogIndex>) -> KeyRange {
    let end = match to_exclusive {
        Some(to) => Key::Entry(group, to).encode(),
        None => {
            let mut prefix = Vec::with_capacity(9);
            one(&mut prefix, ENTRY, group.get());
            prefix_range(prefix).1
        }
    };
    (Key::Entry(group, from).encode(), end)
}

/// All entries of all groups.
pub fn all_entries() -> KeyRange {
    prefix_range(vec![ENTRY])
}
