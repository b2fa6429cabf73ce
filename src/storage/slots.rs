//! A small record that is overwritten all the time, in two slots in turn: one of them is whole whatever happens to the
//! other. The witness and the clock file are made of these.
//!
//! Every slot, little endian: magic (8), version (1), zero (3), CRC of all the rest (4), and then what the record has to
//! say. The slots begin at 0 and at [`STRIDE`].

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;

/// Of one slot from the other.
pub const STRIDE: u64 = 4096;
const VERSION: u8 = 1;

fn crc_of(slot: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&slot[..12]);
    hasher.update(&slot[16..]);
    hasher.finalize()
}

/// A slot's bytes, whose content from byte 16 on `fill` puts in.
pub fn encode<const N: usize>(magic: &[u8; 8], fill: impl FnOnce(&mut [u8; N])) -> [u8; N] {
    let mut slot = [0; N];
    fill(&mut slot);
    slot[..8].copy_from_slice(magic);
    slot[8] = VERSION;
    let crc = crc_of(&slot);
    slot[12..16].copy_from_slice(&crc.to_le_bytes());
    slot
}

/// Eight bytes of a slot as a number.
pub fn number<const N: usize>(slot: &[u8; N], at: usize) -> u64 {
    u64::from_le_bytes(slot[at..at + 8].try_into().expect("eight bytes"))
}

fn is_good<const N: usize>(slot: &[u8; N], magic: &[u8; 8]) -> bool {
    let crc = u32::from_le_bytes(slot[12..16].try_into().expect("four bytes"));
    &slot[..8] == magic && slot[8] == VERSION && crc == crc_of(slot)
}

/// Both slots of a file; `None` for one that is not there whole, or not as it was written.
pub fn read<const N: usize>(file: &File, magic: &[u8; 8]) -> std::io::Result<[Option<[u8; N]>; 2]> {
    let read = |at: u64| {
        let mut slot = [0; N];
        match file.read_exact_at(&mut slot, at) {
            Ok(()) => Ok(is_good(&slot, magic).then_some(slot)),
            Err(e) if e.kind() == ErrorKind::UnexpectedEof => Ok(None),
            Err(e) => Err(e),
        }
    };
    Ok([read(0)?, read(STRIDE)?])
}
