//! Looks through a database's manifest before RocksDB opens it, for what it would never come back from.
//!
//! RocksDB (11.8) reads the header of a record before its checksum. Where it says that the record is of the kind that is
//! written into recycled files, and the file did not begin with one, it takes the record for a bad one without going on behind
//! it, and reads it again, for ever: one flipped bit is enough (1: whole, 5: whole in a recycled file). We recycle no
//! files, so that such a kind is always damage. Everything else that may be wrong RocksDB finds itself; the WAL of log/,
//! which has the same format, is read whole by `wal_check`.

use std::fs;
use std::path::{Path, PathBuf};

use super::error::{Area, OpenError};
use super::wal_check::{BLOCK, HEADER};

/// What is written into recycled files.
const RECYCLED: [u8; 6] = [5, 6, 7, 8, 11, 131];

/// Before either database is opened.
pub(super) fn check(dir: &Path) -> Result<(), OpenError> {
    if let Some((file, what)) = find(&dir.join(Area::Log.as_str())) {
        return Err(OpenError::LogDamaged { what, file });
    }
    match find(&dir.join(Area::State.as_str())) {
        None => Ok(()),
        Some((file, what)) => Err(OpenError::StateDamaged {
            what,
            file,
            groups: Vec::new(),
        }),
    }
}

/// The manifest that must not be opened, and why.
fn find(dir: &Path) -> Option<(PathBuf, String)> {
    // Whatever else is not as it should be, RocksDB says so.
    let current = fs::read_to_string(dir.join("CURRENT")).ok()?;
    let path = dir.join(current.trim_end());
    let at = recycled_record(&fs::read(&path).ok()?)?;
    Some((path, format!("a record of a kind that is never written, at byte {at}")))
}

/// Where a record that claims to be in a recycled file begins. What cannot be read on from is passed over as RocksDB does:
/// the rest of its block.
fn recycled_record(bytes: &[u8]) -> Option<usize> {
    for (number, block) in bytes.chunks(BLOCK).enumerate() {
        let mut at = 0;
        while let Some(header) = block.get(at..at + HEADER) {
            if RECYCLED.contains(&header[6]) {
                return Some(number * BLOCK + at);
            }
            let length = usize::from(u16::from_le_bytes([header[4], header[5]]));
            if header[6] == 0 && length == 0 {
                break;
            }
            at += HEADER + length;
        }
    }
    None
}
