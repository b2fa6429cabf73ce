//! CRC-32C (Castagnoli), which RocksDB puts on each record of its write-ahead log. Used to check that log before
//! RocksDB opens it.

const POLYNOMIAL: u32 = 0x82F6_3B78;

const fn tables() -> [[u32; 256]; 8] {
    let mut t = [[0u32; 256]; 8];
    let mut i = 0;
    while i < 256 {
        let mut crc = i as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                (crc >> 1) ^ POLYNOMIAL
            } else {
                crc >> 1
            };
            bit += 1;
        }
        t[0][i] = crc;
        i += 1;
    }
    let mut i = 0;
    while i < 256 {
        let mut k = 1;
        while k < 8 {
            t[k][i] = (t[k - 1][i] >> 8) ^ t[0][(t[k - 1][i] & 0xFF) as usize];
            k += 1;
        }
        i += 1;
    }
    t
}

static TABLES: [[u32; 256]; 8] = tables();

/// The checksum of `bytes`.
pub fn crc32c(bytes: &[u8]) -> u32 {
    #[cfg(target_arch = "x86_64")]
    if std::arch::is_x86_feature_detected!("sse4.2") {
        // The one instruction the table version stands in for; its presence was just asked.
        #[allow(unsafe_code)]
        return unsafe { by_instruction(bytes) };
    }
    by_table(bytes)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "sse4.2")]
fn by_instruction(bytes: &[u8]) -> u32 {
    use std::arch::x86_64::{_mm_crc32_u8, _mm_crc32_u64};
    let mut crc = u64::from(!0u32);
    let (words, tail) = bytes.as_chunks::<8>();
    for word in words {
        crc = _mm_crc32_u64(crc, u64::from_le_bytes(*word));
    }
    let mut crc = crc as u32;
    for &byte in tail {
        crc = _mm_crc32_u8(crc, byte);
    }
    !crc
}

fn by_table(bytes: &[u8]) -> u32 {
    let t = &TABLES;
    let mut crc = !0u32;
    let (words, tail) = bytes.as_chunks::<8>();
    for word in words {
        let w = u64::from_le_bytes(*word) ^ u64::from(crc);
        crc = t[7][(w & 0xFF) as usize]
            ^ t[6][(w >> 8 & 0xFF) as usize]
            ^ t[5][(w >> 16 & 0xFF) as usize]
            ^ t[4][(w >> 24 & 0xFF) as usize]
            ^ t[3][(w >> 32 & 0xFF) as usize]
            ^ t[2][(w >> 40 & 0xFF) as usize]
            ^ t[1][(w >> 48 & 0xFF) as usize]
            ^ t[0][(w >> 56) as usize];
    }
    for &byte in tail {
        crc = (crc >> 8) ^ t[0][((crc ^ u32::from(byte)) & 0xFF) as usize];
    }
    !crc
}

/// Undoes the mask RocksDB stores checksums under.
pub fn unmask(masked: u32) -> u32 {
    masked.wrapping_sub(0xA282_EAD8).rotate_right(17)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_values_by_both_ways() {
        for (bytes, want) in [
            (&b"123456789"[..], 0xE306_9283u32),
            (&[0; 32][..], 0x8A91_36AA),
            (&[0xFF; 32][..], 0x62A8_AB43),
            (&b""[..], 0),
        ] {
            assert_eq!(crc32c(bytes), want);
            assert_eq!(by_table(bytes), want);
        }
        let long: Vec<u8> = (0..100_003u32).map(|i| ((i * 31) >> 3) as u8).collect();
        assert_eq!(crc32c(&long), by_table(&long));
    }

    #[test]
    fn unmask_undoes_the_mask() {
        let crc = 0x1234_5678u32;
        let masked = crc.rotate_right(15).wrapping_add(0xA282_EAD8);
        assert_eq!(unmask(masked), crc);
    }
}
