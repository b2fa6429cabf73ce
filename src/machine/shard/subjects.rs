//! Gathers the records of one applied publish by subject, for one posting each. On the path of every record: tables are
//! kept between publishes and no record allocates.

use std::hash::{BuildHasher, RandomState};

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What is kept between publishes at most; a burst of subjects must not be paid for with memory for ever.
const GROUPS_KEPT: usize = 4_096;
const OFFSETS_KEPT: usize = 1_024;

#[derive(Debug, Default)]
struct Group {
    hash: u64,
    subject: String,
    offsets: Vec<u32>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    hash: u64,
    /// Index of the group and one; 0: free.
    group: u32,
}

/// A table by subject, filled and emptied with each publish.
#[derive(Debug)]
pub(super) struct Subjects {
    /// Open addressing; a power of two, at most half full.
    slots: Vec<Slot>,
    groups: Vec<Group>,
    used: usize,
    /// Groups in the order of their subjects, made by `sorted`.
    order: Vec<u32>,
    /// Subjects that all fall into one place would make this slow, and they are the clients' to choose. It decides
    /// nothing that is written: groups are walked in the order of their subjects.
    seed: u64,
}

impl Default for Subjects {
    fn default() -> Self {
        Self {
            slots: vec![Slot::default(); 64],
            groups: Vec::new(),
            used: 0,
            order: Vec::new(),
            seed: RandomState::new().hash_one(0u8),
        }
    }
}

impl Subjects {
    /// The group of a subject, made if need be. `Err` if the subject is not UTF-8.
    #[inline]
    pub fn group(&mut self, subject: &[u8]) -> Result<u32, std::str::Utf8Error> {
        let hash = xxh3_64_with_seed(subject, self.seed);
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot.group == 0 {
                return self.add(subject, hash, at);
            }
            if slot.hash == hash && self.groups[slot.group as usize - 1].subject.as_bytes() == subject {
                return Ok(slot.group - 1);
            }
            at = (at + 1) & mask;
        }
    }

    #[cold]
    fn add(&mut self, subject: &[u8], hash: u64, at: usize) -> Result<u32, std::str::Utf8Error> {
        let subject = std::str::from_utf8(subject)?;
        let index = self.used;
        if index == self.groups.len() {
            self.groups.push(Group::default());
        }
        let group = &mut self.groups[index];
        group.hash = hash;
        group.subject.clear();
        group.subject.push_str(subject);
        self.used += 1;
        self.slots[at] = Slot {
            hash,
            group: self.used as u32,
        };
        if self.used * 2 > self.slots.len() {
            self.grow();
        }
        Ok(index as u32)
    }

    fn grow(&mut self) {
        let mask = self.slots.len() * 2 - 1;
        self.slots.clear();
        self.slots.resize(mask + 1, Slot::default());
        for (index, group) in self.groups[..self.used].iter().enumerate() {
            let mut at = group.hash as usize & mask;
            while self.slots[at].group != 0 {
                at = (at + 1) & mask;
            }
            self.slots[at] = Slot {
                hash: group.hash,
                group: index as u32 + 1,
            };
        }
    }

    /// A record of this group, at this offset; ascending.
    #[inline]
    pub fn push(&mut self, group: u32, offset: u32) {
        self.groups[group as usize].offsets.push(offset);
    }

    /// The last offset of a subject.
    pub fn last(&self, subject: &str) -> Option<u32> {
        let hash = xxh3_64_with_seed(subject.as_bytes(), self.seed);
        let mask = self.slots.len() - 1;
        let mut at = hash as usize & mask;
        loop {
            let slot = self.slots[at];
            if slot.group == 0 {
                return None;
            }
            let group = &self.groups[slot.group as usize - 1];
            if slot.hash == hash && group.subject == subject {
                return group.offsets.last().copied();
            }
            at = (at + 1) & mask;
        }
    }

    /// Each subject with its offsets, in the order of the subjects, which is that of the keys they are written under: a
    /// sorted table takes a thousand of them in order several times faster than in any other. Those of refused items
    /// have none.
    pub fn sorted(&mut self) -> impl Iterator<Item = (&str, &[u32])> {
        let groups = &self.groups[..self.used];
        self.order.clear();
        self.order
            .extend((0..self.used as u32).filter(|index| !groups[*index as usize].offsets.is_empty()));
        self.order
            .sort_unstable_by(|a, b| groups[*a as usize].subject.cmp(&groups[*b as usize].subject));
        self.order.iter().map(|index| {
            let group = &groups[*index as usize];
            (group.subject.as_str(), group.offsets.as_slice())
        })
    }

    /// Empties it for the next publish.
    pub fn clear(&mut self) {
        if self.used > GROUPS_KEPT {
            *self = Self {
                seed: self.seed,
                ..Self::default()
            };
            return;
        }
        // With few subjects in a large table, finding each is cheaper than wiping it all.
        let mask = self.slots.len() - 1;
        if self.used * 8 < self.slots.len() {
            for group in &self.groups[..self.used] {
                let mut at = group.hash as usize & mask;
                while self.slots[at].group != 0 {
                    self.slots[at] = Slot::default();
                    at = (at + 1) & mask;
                }
            }
        } else {
            self.slots.fill(Slot::default());
        }
        for group in &mut self.groups[..self.used] {
            group.offsets.clear();
            group.offsets.shrink_to(OFFSETS_KEPT);
        }
        self.used = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_by_subject_again_and_again() {
        let mut subjects = Subjects::default();
        for round in 0..4 {
            let count = [10usize, 10_000, 3, 200][round];
            for i in 0..count * 3 {
                let group = subjects.group(format!("s.{}", i % count).as_bytes()).expect("text");
                assert_eq!(group as usize, i % count);
                subjects.push(group, i as u32);
            }
            assert_eq!(subjects.last("s.1"), Some(count as u32 * 2 + 1));
            assert_eq!(subjects.last("none"), None);
            let found: Vec<_> = subjects.sorted().map(|(s, o)| (s.to_string(), o.to_vec())).collect();
            assert_eq!(found.len(), count);
            assert!(found.is_sorted_by_key(|(subject, _)| subject.clone()));
            for (subject, offsets) in &found {
                let i: u32 = subject.trim_start_matches("s.").parse().expect("a number");
                assert_eq!(offsets, &[i, i + count as u32, i + 2 * count as u32]);
            }
            subjects.clear();
            assert_eq!(subjects.last("s.1"), None);
            assert!(subjects.slots.iter().all(|slot| slot.group == 0), "round {round}");
        }
        assert!(subjects.group(&[0xff]).is_err());
    }
}
