//! The message ids of the de-duplication window.
//!
//! What is in memory is always exactly what is on disk with `time + window > clock`: so a machine that is loaded anew
//! goes on as the one that was not. Forgotten ids stay on disk until an expiry (or a change of the window) drops them,
//! because dropping them with each publish would cost a range delete each.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};

use prost::Message;
use prost::encoding::{WireType, encode_key, encode_varint, encoded_len_varint, key_len};
use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};

use crate::machine::LoadError;
use crate::model::{Sequence, TimeUs};
use crate::wire::internal::v1 as pb;

/// The ids of one applied publish, one text after the other.
#[derive(Debug)]
struct Block {
    at: Sequence,
    time: TimeUs,
    text: String,
    entries: Vec<Remembered>,
}

#[derive(Debug, Clone, Copy)]
struct Remembered {
    hash: u64,
    /// Where its text ends.
    end: u32,
    sequence: Sequence,
}

impl Block {
    fn new(at: Sequence, time: TimeUs) -> Self {
        Self {
            at,
            time,
            text: String::new(),
            entries: Vec::new(),
        }
    }

    fn push(&mut self, hash: u64, id: &str, sequence: Sequence) {
        self.text.push_str(id);
        self.entries.push(Remembered {
            hash,
            end: self.text.len() as u32,
            sequence,
        });
    }

    fn begin(&self, index: usize) -> usize {
        index
            .checked_sub(1)
            .map_or(0, |before| self.entries[before].end as usize)
    }

    fn id(&self, index: usize) -> &str {
        &self.text[self.begin(index)..self.entries[index].end as usize]
    }
}

/// Where an id is: in which block (counted from the first ever, wrapping), and which of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Place {
    block: u32,
    index: u32,
}

/// The keys are hashes already.
#[derive(Debug, Default)]
struct Hashed(u64);

impl Hasher for Hashed {
    fn write(&mut self, _: &[u8]) {
        unreachable!("only whole hashes are keys");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[derive(Debug)]
pub(super) struct IdWindow {
    /// By hash; finding that an id is new, the common case, does not touch any text.
    known: HashMap<u64, Place, BuildHasherDefault<Hashed>>,
    /// Ids whose hash another one has. Nobody has ever seen one; without this such an id would be lost.
    collided: BTreeMap<String, Place>,
    /// Oldest first.
    blocks: VecDeque<Block>,
    /// Number of the first of them.
    first_block: u32,
    /// Ids of the publish being applied.
    fresh: Block,
    /// Blocks below this key are forgotten but still on disk, and the time of the first of them.
    undropped: Option<(Sequence, TimeUs)>,
    /// Ids that all fall into one place would make this slow, and they are the clients' to choose. It decides nothing
    /// that is written.
    seed: u64,
}

impl Default for IdWindow {
    fn default() -> Self {
        Self {
            known: HashMap::default(),
            collided: BTreeMap::new(),
            blocks: VecDeque::new(),
            first_block: 0,
            fresh: Block::new(Sequence::new(0), TimeUs::new(0)),
            undropped: None,
            seed: RandomState::new().hash_one(0u8),
        }
    }
}

impl IdWindow {
    /// Of the blocks found on disk, ascending by key.
    pub fn load<'a>(
        blocks: impl IntoIterator<Item = (Sequence, &'a [u8])>,
        clock: TimeUs,
        window_us: u64,
    ) -> Result<Self, LoadError> {
        let mut window = Self::default();
        for (at, bytes) in blocks {
            let fail = |why: String| LoadError::new(format!("message ids at {at}"), why);
            let block = pb::IdBlock::decode(bytes).map_err(|error| fail(error.to_string()))?;
            let before = window.blocks.back().map(|last| last.at.plus(1));
            if before
                .max(window.undropped.map(|(below, _)| below))
                .is_some_and(|least| at < least)
            {
                return Err(fail("not in ascending order".into()));
            }
            let time = TimeUs::new(block.time_us);
            if time.plus_us(window_us) <= clock {
                window.mark_undropped(at, time);
                continue;
            }
            for entry in block.ids {
                if window.insert(&entry.id, Sequence::new(entry.sequence)).is_err() {
                    return Err(fail(format!("{:?} is there twice", entry.id)));
                }
            }
            window.keep_fresh(at, time);
        }
        Ok(window)
    }

    fn mark_undropped(&mut self, at: Sequence, time: TimeUs) {
        let first = self.undropped.map_or(time, |(_, first)| first);
        self.undropped = Some((at.plus(1), first));
    }

    /// How many ids are remembered.
    pub fn len(&self) -> usize {
        self.known.len() + self.collided.len()
    }

    /// Adds each id that is remembered.
    pub fn digest(&self, hash: &mut Xxh3) {
        for block in &self.blocks {
            hash.update(&block.at.get().to_le_bytes());
            hash.update(&block.time.get().to_le_bytes());
            hash.update(block.text.as_bytes());
            for entry in &block.entries {
                hash.update(&entry.sequence.get().to_le_bytes());
            }
        }
    }

    fn block(&self, place: Place) -> &Block {
        let index = place.block.wrapping_sub(self.first_block) as usize;
        self.blocks.get(index).unwrap_or(&self.fresh)
    }

    /// Remembers an id of the publish being applied; `Err` with the sequence of the one that was there.
    pub fn insert(&mut self, id: &str, sequence: Sequence) -> Result<(), Sequence> {
        let hash = xxh3_64_with_seed(id.as_bytes(), self.seed);
        self.insert_hashed(hash, id, sequence)
    }

    fn insert_hashed(&mut self, hash: u64, id: &str, sequence: Sequence) -> Result<(), Sequence> {
        let here = Place {
            block: self.first_block.wrapping_add(self.blocks.len() as u32),
            index: self.fresh.entries.len() as u32,
        };
        if let Some(place) = self.collided.get(id) {
            return Err(self.block(*place).entries[place.index as usize].sequence);
        }
        match self.known.entry(hash) {
            Entry::Vacant(vacant) => {
                vacant.insert(here);
            }
            Entry::Occupied(occupied) => {
                let place = *occupied.get();
                let block = self.block(place);
                if block.id(place.index as usize) == id {
                    return Err(block.entries[place.index as usize].sequence);
                }
                self.collided.insert(id.to_string(), here);
            }
        }
        self.fresh.push(hash, id, sequence);
        Ok(())
    }

    /// How many ids the publish being applied has brought so far.
    pub fn fresh(&self) -> usize {
        self.fresh.entries.len()
    }

    /// Takes back what was inserted since there were `fresh` of them: their item is refused.
    pub fn roll_back(&mut self, fresh: usize) {
        let number = self.first_block.wrapping_add(self.blocks.len() as u32);
        for index in fresh..self.fresh.entries.len() {
            let place = Place {
                block: number,
                index: index as u32,
            };
            unlink(&mut self.known, &mut self.collided, &self.fresh, place);
        }
        let end = self.fresh.begin(fresh);
        self.fresh.entries.truncate(fresh);
        self.fresh.text.truncate(end);
    }

    /// Makes a block of the ids inserted since the last one; its encoding, if there were any.
    pub fn close_block(&mut self, at: Sequence, time: TimeUs) -> Option<Vec<u8>> {
        if self.fresh.entries.is_empty() {
            return None;
        }
        self.keep_fresh(at, time);
        self.blocks.back().map(encode_block)
    }

    fn keep_fresh(&mut self, at: Sequence, time: TimeUs) {
        let mut block = std::mem::replace(&mut self.fresh, Block::new(at, time));
        (block.at, block.time) = (at, time);
        block.text.shrink_to_fit();
        block.entries.shrink_to_fit();
        self.blocks.push_back(block);
    }

    /// Forgets what is out of the window.
    pub fn forget(&mut self, clock: TimeUs, window_us: u64) {
        while let Some(block) = self.blocks.front() {
            if block.time.plus_us(window_us) > clock {
                break;
            }
            let block = self.blocks.pop_front().expect("there is a front");
            for index in 0..block.entries.len() {
                let place = Place {
                    block: self.first_block,
                    index: index as u32,
                };
                unlink(&mut self.known, &mut self.collided, &block, place);
            }
            self.first_block = self.first_block.wrapping_add(1);
            self.mark_undropped(block.at, block.time);
        }
        // A burst must not be paid for with memory for ever.
        if self.known.capacity() > 4_096 && self.known.len() < self.known.capacity() / 8 {
            self.known.shrink_to(self.known.len() * 2);
        }
    }

    /// The key below which blocks must be dropped from the disk now; the caller does it.
    pub fn take_undropped(&mut self) -> Option<Sequence> {
        self.undropped.take().map(|(below, _)| below)
    }

    /// Time of the oldest block that is on disk, forgotten or not.
    pub fn oldest(&self) -> Option<TimeUs> {
        match (self.undropped, self.blocks.front()) {
            (Some((_, time)), _) => Some(time),
            (None, Some(block)) => Some(block.time),
            (None, None) => None,
        }
    }
}

/// An id is no longer known. Only the entry that points at this very place: another id may have the hash.
fn unlink(
    known: &mut HashMap<u64, Place, BuildHasherDefault<Hashed>>,
    collided: &mut BTreeMap<String, Place>,
    block: &Block,
    place: Place,
) {
    let index = place.index as usize;
    if let Entry::Occupied(occupied) = known.entry(block.entries[index].hash)
        && *occupied.get() == place
    {
        occupied.remove();
        return;
    }
    collided.remove(block.id(index));
}

/// As prost would encode an `IdBlock`, without an owned copy of each id.
fn encode_block(block: &Block) -> Vec<u8> {
    let mut out = Vec::with_capacity(16 + block.text.len() + block.entries.len() * 12);
    if block.time.get() != 0 {
        encode_key(1, WireType::Varint, &mut out);
        encode_varint(block.time.get(), &mut out);
    }
    for (index, entry) in block.entries.iter().enumerate() {
        let id = block.id(index);
        let sequence = entry.sequence.get();
        let length =
            key_len(1) + encoded_len_varint(id.len() as u64) + id.len() + key_len(2) + encoded_len_varint(sequence);
        encode_key(2, WireType::LengthDelimited, &mut out);
        encode_varint(length as u64, &mut out);
        encode_key(1, WireType::LengthDelimited, &mut out);
        encode_varint(id.len() as u64, &mut out);
        out.extend_from_slice(id.as_bytes());
        encode_key(2, WireType::Varint, &mut out);
        encode_varint(sequence, &mut out);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_what_prost_reads() {
        let mut window = IdWindow::default();
        for (id, sequence) in [("a", 7), ("long-id-é", 300)] {
            assert_eq!(window.insert(id, Sequence::new(sequence)), Ok(()));
        }
        assert_eq!(window.insert("a", Sequence::new(9)), Err(Sequence::new(7)));
        let encoded = window.close_block(Sequence::new(7), TimeUs::new(1 << 50)).expect("ids");
        assert_eq!(window.insert("long-id-é", Sequence::new(400)), Err(Sequence::new(300)));
        let block = pb::IdBlock::decode(encoded.as_slice()).expect("decodes");
        assert_eq!(block.encode_to_vec(), encoded);
        assert_eq!(block.ids.len(), 2);
        assert_eq!((block.time_us, block.ids[1].sequence), (1 << 50, 300));
    }

    #[test]
    fn forgotten_when_the_window_has_passed_and_not_before() {
        let mut window = IdWindow::default();
        window.insert("a", Sequence::new(1)).expect("new");
        window.close_block(Sequence::new(1), TimeUs::new(100));
        window.forget(TimeUs::new(149), 50);
        assert_eq!(window.insert("a", Sequence::new(2)), Err(Sequence::new(1)));
        window.forget(TimeUs::new(150), 50);
        assert_eq!(window.len(), 0);
        assert_eq!(window.take_undropped(), Some(Sequence::new(2)));
        assert_eq!(window.take_undropped(), None);
        window.insert("a", Sequence::new(2)).expect("new again");
    }

    /// With one hash for all, ids are still told apart: when found, rolled back and forgotten.
    #[test]
    fn ids_with_one_hash_are_told_apart() {
        let mut window = IdWindow::default();
        let sequence = Sequence::new;
        let insert = |window: &mut IdWindow, id, n| window.insert_hashed(42, id, sequence(n));
        insert(&mut window, "a", 1).expect("new");
        insert(&mut window, "b", 2).expect("new");
        window.close_block(sequence(1), TimeUs::new(0));
        insert(&mut window, "c", 3).expect("new");
        insert(&mut window, "d", 4).expect("new");
        window.roll_back(1);
        insert(&mut window, "e", 4).expect("new");
        window.close_block(sequence(3), TimeUs::new(10));
        for (id, n) in [("a", 1), ("b", 2), ("c", 3), ("e", 4)] {
            assert_eq!(insert(&mut window, id, 9), Err(sequence(n)));
        }
        assert_eq!(window.len(), 4);
        window.forget(TimeUs::new(50), 50);
        assert_eq!(window.len(), 2);
        insert(&mut window, "a", 5).expect("new again");
        for (id, n) in [("a", 5), ("c", 3), ("e", 4)] {
            assert_eq!(insert(&mut window, id, 9), Err(sequence(n)));
        }
        window.roll_back(0);
        insert(&mut window, "b", 5).expect("new again");
        window.close_block(sequence(5), TimeUs::new(20));
        window.forget(TimeUs::new(500), 50);
        assert_eq!((window.len(), window.known.len(), window.collided.len()), (0, 0, 0));
    }
}
