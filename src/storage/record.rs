//! The frame around every persisted value: a version byte, a CRC-32 over key, version and payload, the payload.
//! The key is under the CRC so that a value never passes for that of another key.

use super::error::{Area, StorageError};
use super::keys::Key;

/// The only version there is.
pub const VERSION: u8 = 1;
/// Bytes before the payload.
pub const FRAME_BYTES: usize = 5;

/// Wraps a payload. `payload` is called with the buffer after the frame.
pub fn frame(key: &[u8], payload_bytes: usize, payload: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = Vec::with_capacity(FRAME_BYTES + payload_bytes);
    frame_into(&mut out, key, payload);
    out
}

/// As [`frame`], into a buffer that is used again.
pub fn frame_into(out: &mut Vec<u8>, key: &[u8], payload: impl FnOnce(&mut Vec<u8>)) {
    out.clear();
    out.push(VERSION);
    out.extend_from_slice(&[0; 4]);
    payload(out);
    let crc = checksum(key, VERSION, &out[FRAME_BYTES..]);
    out[1..FRAME_BYTES].copy_from_slice(&crc.to_le_bytes());
}

fn checksum(key: &[u8], version: u8, payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(key);
    hasher.update(&[version]);
    hasher.update(payload);
    hasher.finalize()
}

/// Checks a value and returns its payload.
pub fn unframe<'v>(area: Area, key: &[u8], value: &'v [u8]) -> Result<&'v [u8], StorageError> {
    let Some((head, payload)) = value.split_at_checked(FRAME_BYTES) else {
        return Err(corrupt(area, key, format!("{} bytes are too few", value.len())));
    };
    if head[0] != VERSION {
        return Err(corrupt(
            area,
            key,
            format!("version {} is unknown, {VERSION} is known", head[0]),
        ));
    }
    let stored = u32::from_le_bytes([head[1], head[2], head[3], head[4]]);
    let computed = checksum(key, head[0], payload);
    if stored != computed {
        return Err(corrupt(
            area,
            key,
            format!("CRC {computed:08x} instead of {stored:08x}"),
        ));
    }
    Ok(payload)
}

/// An error that names the key's kind.
pub fn corrupt(area: Area, key: &[u8], detail: impl Into<String>) -> StorageError {
    let detail = detail.into();
    match Key::decode(key) {
        Some(known) => StorageError::Corrupt {
            area,
            kind: known.kind(),
            key: known.to_string(),
            detail,
        },
        None => StorageError::Corrupt {
            area,
            kind: "unknown key",
            key: key.escape_ascii().to_string(),
            detail,
        },
    }
}

/// Appends a LEB128 number.
pub fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push((n as u8 & 0x7F) | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Takes a LEB128 number off the front.
pub fn take_varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut n = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = bytes.split_first()?;
        *bytes = rest;
        if shift == 63 && byte > 1 {
            return None;
        }
        n |= u64::from(byte & 0x7F) << shift;
        if byte < 0x80 {
            return Some(n);
        }
    }
    None
}

/// Takes a little-endian number off the front.
pub fn take_u64(bytes: &mut &[u8]) -> Option<u64> {
    let (head, rest) = bytes.split_first_chunk::<8>()?;
    *bytes = rest;
    Some(u64::from_le_bytes(*head))
}

/// Takes a little-endian number off the front.
pub fn take_u32(bytes: &mut &[u8]) -> Option<u32> {
    let (head, rest) = bytes.split_first_chunk::<4>()?;
    *bytes = rest;
    Some(u32::from_le_bytes(*head))
}
