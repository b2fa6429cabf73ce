//! Ascending lists of small numbers (postings, holes, rejected records), in the shorter of two forms: gaps, or runs.
//!
//! Layout: form (1 byte), then varints. Form 0: each number as its gap to the one before (the first to -1), less one.
//! Form 1: pairs of gap and run length less one. A stream with one subject has one run per batch.

use super::record::{put_varint, take_varint};
use crate::model::Sequence;

const GAPS: u8 = 0;
const RUNS: u8 = 1;

/// Appends the list.
pub fn encode(out: &mut Vec<u8>, list: &[u32]) {
    let runs = count_runs(list);
    if runs * 2 < list.len() {
        out.push(RUNS);
        let mut next = 0u64;
        let mut i = 0;
        while i < list.len() {
            let start = i;
            while i + 1 < list.len() && u64::from(list[i + 1]) == u64::from(list[i]) + 1 {
                i += 1;
            }
            put_varint(out, u64::from(list[start]) - next);
            put_varint(out, (i - start) as u64);
            next = u64::from(list[i]) + 1;
            i += 1;
        }
    } else {
        out.push(GAPS);
        let mut next = 0u64;
        for &n in list {
            put_varint(out, u64::from(n) - next);
            next = u64::from(n) + 1;
        }
    }
}

fn count_runs(list: &[u32]) -> usize {
    let breaks = list
        .windows(2)
        .filter(|w| u64::from(w[1]) != u64::from(w[0]) + 1)
        .count();
    breaks + usize::from(!list.is_empty())
}

/// Reads a list that takes all of `bytes`. No list holds more than `max` numbers.
pub fn decode(mut bytes: &[u8], max: usize) -> Option<Vec<u32>> {
    let (&form, rest) = bytes.split_first()?;
    bytes = rest;
    let mut list = Vec::new();
    let mut next = 0u64;
    while !bytes.is_empty() {
        let gap = take_varint(&mut bytes)?;
        let run = match form {
            GAPS => 0,
            RUNS => take_varint(&mut bytes)?,
            _ => return None,
        };
        let first = next.checked_add(gap)?;
        let end = first.checked_add(run)?;
        if end > u64::from(u32::MAX) || run >= max as u64 || list.len() + run as usize + 1 > max {
            return None;
        }
        list.extend(first as u32..=end as u32);
        next = end + 1;
    }
    Some(list)
}

/// The sequence after the last of a list that counts from `base`.
pub fn end(base: Sequence, list: &[u32]) -> Sequence {
    list.last().map_or(base, |last| base.plus(u64::from(*last) + 1))
}

/// No batch has more records (`docs/reference/batch.md`), with room for later formats.
pub const OFFSETS_MAX: usize = 1 << 20;
