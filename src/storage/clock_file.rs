//! The last time the node stamped, in a file beside the witness: a restart under a wall clock that is far off is found
//! out by it. Not synced: after a power failure it may be some seconds older, which is as good.
//!
//! Slot, 40 bytes, at 0 and at 4096, in turn, little endian: magic "MSCLOCK\0" (8), version (1), zero (3), CRC of all the
//! rest (4), number of the note (8), microseconds since the Unix epoch (8), zero (8). The good slot of the higher number
//! counts; the time may go back, when an operator has vouched for a clock that does.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::slots;

/// Name of the file.
pub const CLOCK_FILE: &str = "clock";

const MAGIC: &[u8; 8] = b"MSCLOCK\0";
const SLOT_BYTES: usize = 40;

/// What a slot says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Note {
    number: u64,
    time_us: u64,
}

fn encode(note: Note) -> [u8; SLOT_BYTES] {
    slots::encode(MAGIC, |slot| {
        slot[16..24].copy_from_slice(&note.number.to_le_bytes());
        slot[24..32].copy_from_slice(&note.time_us.to_le_bytes());
    })
}

/// The good notes of a file, by slot.
fn notes(file: &File) -> std::io::Result<[Option<Note>; 2]> {
    let note = |slot: [u8; SLOT_BYTES]| Note {
        number: slots::number(&slot, 16),
        time_us: slots::number(&slot, 24),
    };
    Ok(slots::read(file, MAGIC)?.map(|slot| slot.map(note)))
}

/// When the node of this data directory last ran, in microseconds since the Unix epoch. `None` where nobody knows: a new
/// directory, one of a version before this file, or a damaged file, which is logged. Looks only; needs no lock.
pub fn last_time_us(dir: &Path) -> Option<u64> {
    let file = match File::open(dir.join(CLOCK_FILE)) {
        Ok(file) => file,
        Err(e) if e.kind() == ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(%error, "the clock file cannot be opened: the wall clock is believed");
            return None;
        }
    };
    let found = notes(&file).ok().and_then(|notes| notes.into_iter().flatten().max());
    if found.is_none() {
        tracing::warn!("the clock file cannot be read: the wall clock is believed");
    }
    found.map(|note| note.time_us)
}

/// The file, open for notes. The directory's lock must be held.
#[derive(Debug)]
pub struct ClockFile {
    file: File,
    number: u64,
    slot: u64,
}

impl ClockFile {
    /// Opens it, or makes it.
    pub fn open(dir: &Path) -> std::io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(dir.join(CLOCK_FILE))?;
        let [first, second] = notes(&file)?;
        Ok(Self {
            file,
            number: first.max(second).map_or(0, |note| note.number),
            slot: u64::from(first >= second),
        })
    }

    /// Notes the time. Blocks as a small write does.
    pub fn note(&mut self, time_us: u64) -> std::io::Result<()> {
        self.number += 1;
        let slot = encode(Note {
            number: self.number,
            time_us,
        });
        self.file.write_all_at(&slot, self.slot * slots::STRIDE)?;
        self.slot = 1 - self.slot;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_note_counts_and_a_torn_one_leaves_the_one_before() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(last_time_us(dir.path()), None);
        let path = dir.path().join(CLOCK_FILE);
        for start in [0, 10] {
            let mut file = ClockFile::open(dir.path()).expect("opened");
            for n in 1..=3 {
                file.note(start + n).expect("written");
                assert_eq!(last_time_us(dir.path()), Some(start + n));
            }
        }
        // Back, too.
        ClockFile::open(dir.path()).expect("opened").note(5).expect("written");
        assert_eq!(last_time_us(dir.path()), Some(5));
        let good = std::fs::read(&path).expect("there");
        let newest = if good[24] == 5 { 0 } else { slots::STRIDE as usize };
        for at in 0..SLOT_BYTES {
            let mut torn = good.clone();
            torn[newest + at] ^= 1;
            std::fs::write(&path, torn).expect("written");
            assert_eq!(last_time_us(dir.path()), Some(13), "byte {at}");
        }
        std::fs::write(&path, &good[..20]).expect("written");
        assert_eq!(last_time_us(dir.path()), None);
        let mut file = ClockFile::open(dir.path()).expect("it is made good again");
        file.note(20).expect("written");
        assert_eq!(last_time_us(dir.path()), Some(20));
    }
}
