//! The witness: a file outside `log/` that knows how far the log was synced.
//!
//! After each sync the committer writes the number and digest of that write, unsynced, into one of two slots in turn.
//! A kill leaves it exact (the page cache survives the process); after a power failure it may lag behind, and then
//! says less, never something wrong. A log behind its witness, or with another digest at its number, lost something.
//!
//! What remains: a power failure that takes the newest witness writes, and in the same moment damage to the very last
//! synced write of the log. Damage to any earlier write is seen without the witness, because a later one follows it.
//!
//! Slot, 64 bytes, at 0 and at 4096, little endian: magic "MSWITNES" (8), version (1), zero (3), CRC of all the rest
//! (4), store id (16), number (8), digest (8), zero (16).

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::identity::sync_dir;
use super::slots;

/// Name of the file.
pub const WITNESS_FILE: &str = "witness";

const MAGIC: &[u8; 8] = b"MSWITNES";
const SLOT_BYTES: usize = 64;

/// A point that the log must have reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mark {
    /// Number of the committer's write; the first is 1, 0 before it.
    pub number: u64,
    /// Rolling digest up to it.
    pub digest: u64,
}

/// What the file said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Testimony {
    /// The later of the good slots.
    pub mark: Mark,
    /// A slot was unreadable: torn by a power failure, or damaged. The other one is at most one write older.
    pub one_slot_bad: bool,
}

/// Why it could not be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WitnessFault {
    Missing,
    /// Neither slot is good.
    Bad,
    /// It belongs to another store.
    OtherStore,
    Io(String),
}

impl std::fmt::Display for WitnessFault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            WitnessFault::Missing => f.write_str("the witness file is missing"),
            WitnessFault::Bad => f.write_str("the witness file is damaged in both slots"),
            WitnessFault::OtherStore => f.write_str("the witness file belongs to another store"),
            WitnessFault::Io(e) => write!(f, "the witness file cannot be read: {e}"),
        }
    }
}

/// The open file.
#[derive(Debug)]
pub struct Witness {
    file: File,
    store_id: u128,
    next_slot: u64,
}

/// One slot's bytes.
pub fn encode_slot(store_id: u128, mark: Mark) -> [u8; SLOT_BYTES] {
    slots::encode(MAGIC, |slot| {
        slot[16..32].copy_from_slice(&store_id.to_le_bytes());
        slot[32..40].copy_from_slice(&mark.number.to_le_bytes());
        slot[40..48].copy_from_slice(&mark.digest.to_le_bytes());
    })
}

fn decode_slot(slot: &[u8; SLOT_BYTES]) -> (u128, Mark) {
    let store_id = u128::from_le_bytes(slot[16..32].try_into().expect("sixteen bytes"));
    let mark = Mark {
        number: slots::number(slot, 32),
        digest: slots::number(slot, 40),
    };
    (store_id, mark)
}

impl Witness {
    /// Makes the file for a new store, durable.
    pub fn create(dir: &Path, store_id: u128) -> std::io::Result<()> {
        let file = File::create(dir.join(WITNESS_FILE))?;
        let slot = encode_slot(store_id, Mark::default());
        file.write_all_at(&slot, 0)?;
        file.write_all_at(&slot, slots::STRIDE)?;
        file.sync_all()?;
        sync_dir(dir)
    }

    /// Opens it and reads what it says.
    pub fn open(dir: &Path, store_id: u128) -> Result<(Witness, Testimony), WitnessFault> {
        let file = match OpenOptions::new().read(true).write(true).open(dir.join(WITNESS_FILE)) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(WitnessFault::Missing),
            Err(e) => return Err(WitnessFault::Io(e.to_string())),
        };
        let slots = slots::read(&file, MAGIC).map_err(|e| WitnessFault::Io(e.to_string()))?;
        let slots = slots.map(|slot| slot.as_ref().map(decode_slot));
        let (store, mark) = slots
            .iter()
            .flatten()
            .max_by_key(|(_, mark)| mark.number)
            .copied()
            .ok_or(WitnessFault::Bad)?;
        if slots.iter().flatten().any(|(id, _)| *id != store_id) || store != store_id {
            return Err(WitnessFault::OtherStore);
        }
        let one_slot_bad = slots.iter().any(Option::is_none);
        let newest_is_first = slots[0].is_some_and(|(_, m)| m == mark);
        let witness = Witness {
            file,
            store_id,
            next_slot: if newest_is_first { 1 } else { 0 },
        };
        Ok((witness, Testimony { mark, one_slot_bad }))
    }

    /// Notes a write that was synced. Not synced itself.
    pub fn note(&mut self, mark: Mark) -> std::io::Result<()> {
        let slot = encode_slot(self.store_id, mark);
        self.file.write_all_at(&slot, self.next_slot * slots::STRIDE)?;
        self.next_slot = 1 - self.next_slot;
        Ok(())
    }

    /// Makes what was noted durable, both slots alike. At open and close only.
    pub fn settle(&mut self, mark: Mark) -> std::io::Result<()> {
        self.note(mark)?;
        self.file.sync_data()?;
        self.note(mark)?;
        self.file.sync_data()
    }
}
