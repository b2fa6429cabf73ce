//! The opaque cursor: where a reader stands in each shard of one stream.

use bytes::Bytes;

use crate::model::{Epoch, Sequence, StreamId};

const VERSION: u8 = 1;

/// Next sequence per shard, for one incarnation of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor {
    pub stream: StreamId,
    pub epoch: Epoch,
    /// Shard index and the next sequence to be read there. Ascending by index.
    pub next: Vec<(u32, Sequence)>,
}

impl Cursor {
    /// version, stream id, epoch, count, then (shard, sequence) each; CRC last. Little endian.
    pub fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(31 + self.next.len() * 12);
        out.push(VERSION);
        out.extend_from_slice(&self.stream.get().to_le_bytes());
        out.extend_from_slice(&self.epoch.get().to_le_bytes());
        out.extend_from_slice(&u16::try_from(self.next.len()).unwrap_or(u16::MAX).to_le_bytes());
        for (shard, sequence) in &self.next {
            out.extend_from_slice(&shard.to_le_bytes());
            out.extend_from_slice(&sequence.get().to_le_bytes());
        }
        let crc = crc32fast::hash(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out.into()
    }

    /// The inverse of [`Cursor::encode`]. The error says what is wrong.
    pub fn decode(raw: &[u8]) -> Result<Self, &'static str> {
        let Some((body, crc)) = raw.split_last_chunk::<4>() else {
            return Err("it is too short");
        };
        if crc32fast::hash(body) != u32::from_le_bytes(*crc) {
            return Err("its check sum does not match");
        }
        let mut rest = body;
        let [version] = take(&mut rest)?;
        if version != VERSION {
            return Err("it is of a version this server does not know");
        }
        let stream = StreamId::new(u128::from_le_bytes(take(&mut rest)?));
        let epoch = Epoch::new(u64::from_le_bytes(take(&mut rest)?));
        let count = u16::from_le_bytes(take(&mut rest)?);
        let mut next = Vec::with_capacity(usize::from(count));
        for _ in 0..count {
            let shard = u32::from_le_bytes(take(&mut rest)?);
            next.push((shard, Sequence::new(u64::from_le_bytes(take(&mut rest)?))));
        }
        if !rest.is_empty() {
            return Err("bytes are left over");
        }
        Ok(Self { stream, epoch, next })
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], &'static str> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or("it is too short")?;
    *rest = tail;
    Ok(*head)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_cursor_survives_and_any_flipped_bit_is_found() {
        let cursor = Cursor {
            stream: StreamId::new(7 << 70),
            epoch: Epoch::new(3),
            next: vec![(0, Sequence::new(9)), (5, Sequence::new(1 << 40))],
        };
        let raw = cursor.encode();
        assert_eq!(Cursor::decode(&raw).unwrap(), cursor);
        for bit in 0..raw.len() * 8 {
            let mut bad = raw.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Cursor::decode(&bad).is_err(), "bit {bit}");
        }
        for len in 0..raw.len() {
            assert!(Cursor::decode(&raw[..len]).is_err(), "length {len}");
        }
    }
}
