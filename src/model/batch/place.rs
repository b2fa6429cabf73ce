//! Which record of a stored batch has which sequence.

use crate::model::{Sequence, StoredBatch};

impl StoredBatch {
    /// The sequence of the record at `position`; `None` if it was rejected as a duplicate or is not there.
    pub fn sequence_of(&self, position: u32) -> Option<Sequence> {
        if position >= self.record_count {
            return None;
        }
        match self.rejected.binary_search(&position) {
            Ok(_) => None,
            Err(rejected_before) => Some(self.base.plus(u64::from(position) - rejected_before as u64)),
        }
    }

    /// The position of the record with this sequence; `None` if it is not in this batch.
    pub fn position_of(&self, sequence: Sequence) -> Option<u32> {
        if sequence < self.base || sequence >= self.end() {
            return None;
        }
        // Each rejected record at or before the place moves it on by one.
        let mut position = sequence.since(self.base) as u32;
        for &rejected in &self.rejected {
            if rejected > position {
                break;
            }
            position += 1;
        }
        Some(position)
    }
}
