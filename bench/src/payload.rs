//! Random payloads that cost nothing to make: slices at scattered places of one random pool.
//!
//! No compressor finds anything in them: two slices overlap at most by chance, and then at another alignment. A
//! payload follows from its number alone, so a reader can check what it gets without anything being kept.

use bytes::Bytes;
use rand::{RngCore, SeedableRng, rngs::SmallRng};

const POOL_BYTES: usize = 16 << 20;

/// Payload number → bytes.
#[derive(Clone)]
pub struct Payloads {
    pool: Bytes,
    size: usize,
    salt: u64,
}

impl Payloads {
    /// `size`: bytes of each payload. Payloads of different `salt`s differ, their pool is the same.
    pub fn new(size: usize, salt: u64) -> Self {
        assert!(size < POOL_BYTES, "payload of {size} bytes");
        let mut pool = vec![0; POOL_BYTES];
        SmallRng::seed_from_u64(0x6d61_696e_7374_656d).fill_bytes(&mut pool);
        Self {
            pool: pool.into(),
            size,
            salt,
        }
    }

    pub fn nth(&self, number: u64) -> Bytes {
        let at = (mix(number ^ self.salt.rotate_left(32)) % (POOL_BYTES - self.size) as u64) as usize;
        self.pool.slice(at..at + self.size)
    }

    pub fn is_nth(&self, number: u64, payload: &[u8]) -> bool {
        self.nth(number) == payload
    }
}

/// Subjects `PREFIX.0` … in a scattered order, or always the first where there is one only.
#[derive(Clone)]
pub struct Subjects(Vec<String>);

impl Subjects {
    pub fn new(prefix: &str, count: usize) -> Self {
        Self((0..count.max(1)).map(|n| format!("{prefix}.{n}")).collect())
    }

    pub fn nth(&self, number: u64) -> &str {
        &self.0[(mix(number) % self.0.len() as u64) as usize]
    }
}

/// splitmix64's finisher.
fn mix(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_follows_from_its_number() {
        let a = Payloads::new(128, 1);
        let b = Payloads::new(128, 1);
        let other = Payloads::new(128, 2);
        for n in 0..1_000 {
            assert!(b.is_nth(n, &a.nth(n)));
            assert!(!b.is_nth(n + 1, &a.nth(n)));
            assert!(!other.is_nth(n, &a.nth(n)));
        }
    }

    #[test]
    fn subjects_are_all_used() {
        let subjects = Subjects::new("s", 1_000);
        let seen: std::collections::HashSet<_> = (0..20_000).map(|n| subjects.nth(n).to_owned()).collect();
        assert_eq!(seen.len(), 1_000);
    }
}
