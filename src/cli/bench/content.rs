//! Messages whose content can be verified: who published it, its number, when, and bytes that follow from those.

use std::time::{SystemTime, UNIX_EPOCH};

use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};

/// Publisher, number and time.
pub(super) const PAYLOAD_BYTES_MIN: usize = 16;

/// Numbers of messages fit this; the publisher is above.
const NUMBER_BITS: u32 = 40;

/// Random bytes that payloads are cut from: too many for a codec to find them again.
const POOL_BYTES: usize = 8 << 20;

/// Makes payloads of one size and checks them.
#[derive(Debug)]
pub(super) struct Content {
    size: usize,
    pool: Vec<u8>,
}

/// What a payload says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) publisher: u32,
    pub(super) number: u64,
    /// Microseconds since the Unix epoch.
    pub(super) time_us: u64,
}

pub(super) fn now_us() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map(|d| d.as_micros() as u64)
        .unwrap_or(0)
}

impl Content {
    pub(super) fn new(size: usize) -> Self {
        let mut pool = vec![0; POOL_BYTES + size];
        // Always the same bytes, so that a later run can verify what an earlier one left.
        StdRng::seed_from_u64(0x6d61_696e_7374_656d).fill_bytes(&mut pool);
        Content { size, pool }
    }

    fn filler(&self, id: u64, size: usize) -> &[u8] {
        let at = (id.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20) as usize % POOL_BYTES;
        &self.pool[at..at + size.min(self.pool.len() - at)]
    }

    /// Writes a payload into the buffer.
    pub(super) fn write(&self, mark: Mark, payload: &mut Vec<u8>) {
        let id = u64::from(mark.publisher) << NUMBER_BITS | mark.number;
        payload.clear();
        payload.extend_from_slice(&id.to_le_bytes());
        payload.extend_from_slice(&mark.time_us.to_le_bytes());
        payload.extend_from_slice(self.filler(id, self.size - PAYLOAD_BYTES_MIN));
    }

    /// Reads a payload; `None` if it is not what was written.
    pub(super) fn read(&self, payload: &[u8]) -> Option<Mark> {
        let (id, rest) = payload.split_first_chunk::<8>()?;
        let (time, filler) = rest.split_first_chunk::<8>()?;
        let id = u64::from_le_bytes(*id);
        if filler != self.filler(id, filler.len()) {
            return None;
        }
        Some(Mark {
            publisher: (id >> NUMBER_BITS) as u32,
            number: id & ((1 << NUMBER_BITS) - 1),
            time_us: u64::from_le_bytes(*time),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_is_read_back_and_damage_is_seen() {
        for size in [16, 17, 128, 4_096] {
            let content = Content::new(size);
            let mut payload = Vec::new();
            for number in [0, 1, 77, 1 << 39] {
                let mark = Mark {
                    publisher: 3,
                    number,
                    time_us: 5,
                };
                content.write(mark, &mut payload);
                assert_eq!((payload.len(), content.read(&payload)), (size, Some(mark)));
                if size > 16 {
                    payload[16] ^= 1;
                    assert_eq!(content.read(&payload), None);
                }
            }
        }
        assert_eq!(Content::new(16).read(&[0; 15]), None);
    }
}
