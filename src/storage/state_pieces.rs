//! The export of a group, cut into pieces. Where it is cut follows from the records next to the cut alone, so that two
//! replicas that hold the same records somewhere have the same pieces there, whatever differs before and behind. Pieces
//! are told apart by their digests: what was received in an earlier attempt, or is in the replica's own state, need not
//! travel if it is equal.
//!
//! A record: family (1 byte: 0 index, 1 batches), length of the key and of the value (LEB128), key, value.

use bytes::{Buf as _, Bytes};
use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::record::{put_varint, take_varint};

/// A piece has about this many bytes, …
pub const PIECE_BYTES: usize = 512 << 10;
/// … and, but for a single larger record, at most this many.
pub const PIECE_BYTES_MAX: usize = 2 << 20;

/// A family of `state/`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Family {
    Index = 0,
    Batches = 1,
}

impl Family {
    pub const ALL: [Family; 2] = [Family::Index, Family::Batches];

    pub fn name(self) -> &'static str {
        match self {
            Family::Index => "index",
            Family::Batches => "batches",
        }
    }

    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|family| *family as u8 == byte)
    }
}

/// A place in an export. They sort as the export runs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    pub(super) family: Family,
    pub(super) key: Bytes,
}

impl Place {
    pub(super) fn new(family: Family, key: impl Into<Bytes>) -> Self {
        Self {
            family,
            key: key.into(),
        }
    }

    /// Before everything.
    pub fn start() -> Self {
        Self::new(Family::Index, Bytes::new())
    }

    /// The next place behind this one.
    pub(super) fn after(&self) -> Self {
        let mut key = self.key.to_vec();
        key.push(0);
        Self::new(self.family, key)
    }

    /// As it travels.
    pub fn encode(&self) -> Bytes {
        let mut out = vec![self.family as u8];
        out.extend_from_slice(&self.key);
        out.into()
    }

    /// Takes apart what [`encode`](Self::encode) made; `None` for anything else.
    pub fn decode(raw: &Bytes) -> Option<Self> {
        let family = Family::from_byte(*raw.first()?)?;
        Some(Self::new(family, raw.slice(1..)))
    }
}

/// A part of an export: from inclusive; to exclusive, or the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stretch {
    pub from: Place,
    pub to: Option<Place>,
}

impl Stretch {
    /// All of it.
    pub fn everything() -> Self {
        Self {
            from: Place::start(),
            to: None,
        }
    }

    fn ends_before(&self, place: &Place) -> bool {
        self.to.as_ref().is_some_and(|to| to < place)
    }
}

/// Ascending stretches that do not touch, covering the same.
pub fn united(mut stretches: Vec<Stretch>) -> Vec<Stretch> {
    stretches.sort_by(|a, b| a.from.cmp(&b.from));
    let mut out: Vec<Stretch> = Vec::new();
    for next in stretches {
        match out.last_mut() {
            Some(last) if !last.ends_before(&next.from) => {
                if let (Some(to), further) = (&last.to, &next.to)
                    && further.as_ref().is_none_or(|further| further > to)
                {
                    last.to = next.to;
                }
            }
            _ => out.push(next),
        }
    }
    out
}

/// What is in both. Each must be united.
pub fn common(a: &[Stretch], b: &[Stretch]) -> Vec<Stretch> {
    let earlier = |a: &Option<Place>, b: &Option<Place>| match (a, b) {
        (Some(a), Some(b)) => Some(a.min(b).clone()),
        (one, None) | (None, one) => one.clone(),
    };
    let mut out = Vec::new();
    for a in a {
        for b in b {
            let from = (&a.from).max(&b.from).clone();
            let to = earlier(&a.to, &b.to);
            if to.as_ref().is_none_or(|to| from < *to) {
                out.push(Stretch { from, to });
            }
        }
    }
    out
}

/// Tells pieces apart. Of a piece's bytes; not against an adversary, who would have to be one of the cluster's nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest(u128);

impl Digest {
    pub fn of(bytes: &[u8]) -> Self {
        Self(xxh3_128(bytes))
    }

    pub fn to_bytes(self) -> Bytes {
        Bytes::copy_from_slice(&self.0.to_be_bytes())
    }

    pub fn from_bytes(raw: &[u8]) -> Option<Self> {
        Some(Self(u128::from_be_bytes(raw.try_into().ok()?)))
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl std::str::FromStr for Digest {
    type Err = std::num::ParseIntError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        u128::from_str_radix(text, 16).map(Self)
    }
}

/// A piece of an export, without its bytes. It reaches up to the next one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Of its first record.
    pub from: Place,
    pub bytes: u64,
    pub digest: Digest,
}

/// Appends a record as it travels.
pub(super) fn put_record(out: &mut Vec<u8>, family: Family, key: &[u8], value: &[u8]) {
    out.push(family as u8);
    put_varint(out, key.len() as u64);
    put_varint(out, value.len() as u64);
    out.extend_from_slice(key);
    out.extend_from_slice(value);
}

/// Takes a record off the front.
pub(super) fn take_record(chunk: &mut Bytes) -> Option<(Family, Bytes, Bytes)> {
    let mut rest = &chunk[..];
    let (&family, after) = rest.split_first()?;
    rest = after;
    let family = Family::from_byte(family)?;
    let key = usize::try_from(take_varint(&mut rest)?).ok()?;
    let value = usize::try_from(take_varint(&mut rest)?).ok()?;
    if rest.len() < key.checked_add(value)? {
        return None;
    }
    chunk.advance(chunk.len() - rest.len());
    Some((family, chunk.split_to(key), chunk.split_to(value)))
}

/// Cuts ascending records of one family into pieces.
#[derive(Debug, Default)]
pub(super) struct Cutter {
    data: Vec<u8>,
    from: Option<Place>,
    records: u64,
}

/// A piece with its bytes.
#[derive(Debug, Clone)]
pub(super) struct Cut {
    pub from: Place,
    pub data: Bytes,
    pub records: u64,
}

impl Cutter {
    /// Takes a record; the pieces that ended with it or before it.
    pub fn push(&mut self, family: Family, key: &[u8], value: &[u8]) -> [Option<Cut>; 2] {
        let bytes = key.len() + value.len() + 8;
        let before = (self.data.len() + bytes > PIECE_BYTES_MAX)
            .then(|| self.take())
            .flatten();
        if self.from.is_none() {
            self.from = Some(Place::new(family, key.to_vec()));
        }
        put_record(&mut self.data, family, key, value);
        self.records += 1;
        let after = ends_piece(key, bytes).then(|| self.take()).flatten();
        [before, after]
    }

    /// What was gathered so far.
    pub fn take(&mut self) -> Option<Cut> {
        let from = self.from.take()?;
        let data = std::mem::replace(&mut self.data, Vec::with_capacity(PIECE_BYTES + (PIECE_BYTES >> 1)));
        Some(Cut {
            from,
            data: data.into(),
            records: std::mem::take(&mut self.records),
        })
    }
}

/// A record ends a piece with a chance in proportion to its size, as its key decides.
fn ends_piece(key: &[u8], bytes: usize) -> bool {
    let chance = (bytes as u64).saturating_mul(u64::MAX / PIECE_BYTES as u64);
    xxh3_64(key) <= chance
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn cut(records: &[(Vec<u8>, Vec<u8>)]) -> Vec<Cut> {
        let mut cutter = Cutter::default();
        let mut out = Vec::new();
        for (key, value) in records {
            out.extend(cutter.push(Family::Batches, key, value).into_iter().flatten());
        }
        out.extend(cutter.take());
        out
    }

    fn records(count: u64, bytes: usize) -> Vec<(Vec<u8>, Vec<u8>)> {
        let record = |n: u64| (n.to_be_bytes().to_vec(), vec![n as u8; bytes]);
        (0..count).map(record).collect()
    }

    #[test]
    fn pieces_have_about_the_size_that_is_wanted() {
        for (count, bytes) in [(200_000, 100), (3_000, 10_000), (400, 100_000), (20, 3 << 20)] {
            let all = records(count, bytes);
            let pieces = cut(&all);
            let total: usize = pieces.iter().map(|p| p.data.len()).sum();
            let mean = total / pieces.len();
            assert!(
                (PIECE_BYTES / 3..=PIECE_BYTES.max(bytes) * 2).contains(&mean),
                "{bytes}: {mean}"
            );
            assert!(pieces.iter().all(|p| p.data.len() <= PIECE_BYTES_MAX.max(bytes + 16)));
            assert_eq!(pieces.iter().map(|p| p.records).sum::<u64>(), count);
            let mut back = Vec::new();
            for mut piece in pieces {
                let from = piece.from.clone();
                let before = back.len();
                while let Some((_, key, value)) = take_record(&mut piece.data) {
                    back.push((key.to_vec(), value.to_vec()));
                }
                assert_eq!(from.key, back[before].0);
            }
            assert!(back == all);
        }
    }

    #[test]
    fn a_change_spoils_only_the_pieces_around_it() {
        let all = records(50_000, 1_000);
        let digests = |records: &[(Vec<u8>, Vec<u8>)]| -> std::collections::BTreeSet<Digest> {
            cut(records).iter().map(|p| Digest::of(&p.data)).collect()
        };
        let before = digests(&all);
        let mut changed = all.clone();
        changed.remove(20_000);
        changed[30_000].1[7] ^= 1;
        changed.push((99_999u64.to_be_bytes().to_vec(), vec![1; 50]));
        let after = digests(&changed[5_000..]);
        let new = after.difference(&before).count();
        assert!(new <= 8, "{new} of {} pieces are others", after.len());
    }

    #[test]
    fn stretches_unite_and_meet() {
        let place = |n: u8| Place::new(Family::Index, vec![n]);
        let stretch = |from: u8, to: u8| Stretch {
            from: place(from),
            to: (to > 0).then(|| place(to)),
        };
        let many = vec![
            stretch(5, 7),
            stretch(1, 2),
            stretch(2, 3),
            stretch(6, 6),
            stretch(9, 0),
            stretch(10, 12),
        ];
        let one = united(many);
        assert_eq!(one, [stretch(1, 3), stretch(5, 7), stretch(9, 0)]);
        assert_eq!(common(&one, &[stretch(2, 6)]), [stretch(2, 3), stretch(5, 6)]);
        assert_eq!(common(&one, &[Stretch::everything()]), one);
        assert_eq!(common(&one, &[stretch(3, 5)]), []);
    }

    #[test]
    fn places_travel() {
        for place in [Place::start(), Place::new(Family::Batches, vec![1, 2]).after()] {
            assert_eq!(Place::decode(&place.encode()), Some(place));
        }
        assert_eq!(Place::decode(&Bytes::from_static(&[2, 1])), None);
        assert_eq!(Place::decode(&Bytes::new()), None);
        let digest = Digest::of(b"some");
        assert_eq!(Digest::from_bytes(&digest.to_bytes()), Some(digest));
        assert_eq!(digest.to_string().parse(), Ok(digest));
    }
}
