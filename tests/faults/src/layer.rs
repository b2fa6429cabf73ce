//! What a file has been given since it was last synced, and what a power failure makes of it. Pure: no system calls.
//!
//! A *layer* is what was written between two syncs: the ranges touched, and the old content of every page that had
//! synced (or earlier) content. A sync closes the open layer; when it succeeds, that layer and all before it are
//! durable and forgotten. A power failure goes through the layers from the newest to the oldest and puts back the old
//! content of some of their blocks. A page of the page cache goes to disk whole and whenever the kernel likes, so any
//! block may independently be new or old; bytes that were synced are never touched.

use std::collections::BTreeMap;

use crate::rng::Rng;

pub const PAGE: u64 = 4096;
const SECTOR: u64 = 512;

/// Disjoint, ascending half-open ranges.
#[derive(Default, Clone, Debug, PartialEq, Eq)]
pub struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    pub fn add(&mut self, mut from: u64, mut to: u64) {
        if from >= to {
            return;
        }
        while let Some((&f, &t)) = self.0.range(..=to).next_back() {
            if t < from {
                break;
            }
            self.0.remove(&f);
            from = from.min(f);
            to = to.max(t);
        }
        self.0.insert(from, to);
    }

    pub fn remove(&mut self, from: u64, to: u64) {
        while let Some((&f, &t)) = self.0.range(..to).next_back() {
            if t <= from {
                break;
            }
            self.0.remove(&f);
            if f < from {
                self.0.insert(f, from);
            }
            if t > to {
                self.0.insert(to, t);
            }
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|(&f, &t)| (f, t))
    }

    pub fn bytes(&self) -> u64 {
        self.iter().map(|(f, t)| t - f).sum()
    }
}

struct Layer {
    id: u64,
    /// Size of the file when the layer was opened.
    size_before: u64,
    dirty: Ranges,
    /// Old content by page number, of pages that begin below `size_before`; shorter than a page at the old end.
    old: BTreeMap<u64, Vec<u8>>,
    /// Its sync failed: the kernel has dropped the pages, and no later sync makes them durable.
    failed: bool,
}

impl Layer {
    /// The old bytes of a block, padded with zeros.
    fn old_block(&self, from: u64, to: u64) -> Vec<u8> {
        let mut out = vec![0; (to - from) as usize];
        if let Some(page) = self.old.get(&(from / PAGE)) {
            let start = (from % PAGE) as usize;
            if start < page.len() {
                let n = out.len().min(page.len() - start);
                out[..n].copy_from_slice(&page[start..start + n]);
            }
        }
        out
    }
}

/// One thing to do to a file to bring it to its state after the accident, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum Fix {
    Write(u64, Vec<u8>),
    Size(u64),
}

/// How a file came out of a power failure.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    pub what: &'static str,
    pub blocks: u64,
    pub blocks_lost: u64,
    pub size: u64,
    pub fixes: Vec<Fix>,
}

#[derive(Default)]
pub struct Journal {
    layers: Vec<Layer>,
    /// The last layer takes writes; otherwise the next write opens one.
    open: bool,
    next_id: u64,
    /// Size when a sync last succeeded while a failed layer was below it.
    durable_size: u64,
}

impl Journal {
    pub fn is_clean(&self) -> bool {
        self.layers.is_empty()
    }

    pub fn unsynced_bytes(&self) -> u64 {
        self.layers.iter().map(|l| l.dirty.bytes()).sum()
    }

    /// To be called before bytes in `from..to` change, with the file's present size. `read` fills the buffer with what
    /// is at an offset and tells how much there was.
    pub fn touch(&mut self, size: u64, from: u64, to: u64, mut read: impl FnMut(u64, &mut [u8]) -> usize) {
        if !self.open {
            self.next_id += 1;
            self.layers.push(Layer {
                id: self.next_id,
                size_before: size,
                dirty: Ranges::default(),
                old: BTreeMap::new(),
                failed: false,
            });
            self.open = true;
        }
        let Some(layer) = self.layers.last_mut() else {
            return;
        };
        // What lies between the end of the file and the write becomes a hole: it changes too.
        let from = from.min(size);
        // Pages go to disk whole: what lies beside the write in the same page is put back with it.
        let first = from / PAGE;
        let end = to.next_multiple_of(PAGE).min(layer.size_before);
        if first * PAGE < end {
            for page in first..=(end - 1) / PAGE {
                layer.old.entry(page).or_insert_with(|| {
                    let mut bytes = vec![0; (layer.size_before - page * PAGE).min(PAGE) as usize];
                    let n = read(page * PAGE, &mut bytes);
                    // Cut off and grown again within the layer: what was cut had its old content saved then.
                    bytes.truncate(n);
                    bytes
                });
            }
        }
        layer.dirty.add(from, to);
    }

    /// A sync begins: what is written from now on is not covered by it.
    pub fn begin_sync(&mut self) -> u64 {
        self.open = false;
        self.next_id
    }

    /// The sync that began with this ticket succeeded.
    pub fn end_sync(&mut self, ticket: u64, size: u64) {
        let (done, mut left): (Vec<_>, Vec<_>) = std::mem::take(&mut self.layers)
            .into_iter()
            .partition(|l| l.id <= ticket && !l.failed);
        for lost in left.iter_mut().filter(|l| l.failed && l.id <= ticket) {
            // Blocks written again since then, and synced, are durable.
            for (from, to) in done.iter().filter(|d| d.id > lost.id).flat_map(|d| d.dirty.iter()) {
                lost.dirty.remove(from, to);
            }
            self.durable_size = size;
        }
        left.retain(|l| !(l.failed && l.dirty.0.is_empty()));
        self.layers = left;
        if self.layers.is_empty() {
            self.open = false;
            self.durable_size = 0;
        }
    }

    /// The sync that began with this ticket failed.
    pub fn fail_sync(&mut self, ticket: u64) {
        for layer in self.layers.iter_mut().filter(|l| l.id <= ticket) {
            layer.failed = true;
        }
    }

    /// The file after a power failure.
    pub fn power_failure(&self, size: u64, rng: &mut Rng) -> Outcome {
        let Some(base) = self.layers.first().map(|l| l.size_before.max(self.durable_size)) else {
            return Outcome {
                what: "synced",
                blocks: 0,
                blocks_lost: 0,
                size,
                fixes: Vec::new(),
            };
        };
        let block = if rng.chance(50) { SECTOR } else { PAGE };
        let cut = base + rng.below(size.saturating_sub(base) + 1);
        let keep_percent = 5 + rng.below(91);
        let fate = rng.below(100);
        let what = match fate {
            0..25 => "lost whole",
            25..40 => "kept whole",
            40..70 => "kept up to a point",
            _ => "kept in parts",
        };
        let mut keep = |from: u64| match fate {
            0..25 => false,
            25..40 => true,
            40..70 if from >= base || from + block > base => from < cut,
            _ => rng.chance(keep_percent),
        };
        // From the newest layer to the oldest: a block that is kept in one is kept with all that came before it.
        let mut kept_end = 0;
        let mut decided: BTreeMap<u64, Option<Vec<u8>>> = BTreeMap::new();
        for layer in self.layers.iter().rev() {
            for (from, to) in layer.dirty.iter() {
                for index in from / block..=(to - 1) / block {
                    if matches!(decided.get(&index), Some(None)) {
                        continue;
                    }
                    let at = index * block;
                    if keep(at) && !(layer.failed && fate >= 40) {
                        decided.entry(index).or_insert(None);
                        kept_end = kept_end.max(at + block);
                    } else {
                        decided.insert(index, Some(layer.old_block(at, at + block)));
                    }
                }
            }
        }
        let mut fixes = Vec::new();
        let mut blocks_lost = 0;
        let top = size.max(self.layers.iter().map(|l| l.size_before).max().unwrap_or(0));
        for (index, fate) in &decided {
            let Some(bytes) = fate else { continue };
            blocks_lost += 1;
            let at = index * block;
            if at < top {
                push_write(&mut fixes, at, &bytes[..((top - at).min(block)) as usize]);
            }
        }
        let after = if fate < 25 {
            base
        } else if blocks_lost == 0 {
            size
        } else if size < base {
            // A truncation: it took place or it did not.
            if rng.chance(50) { base } else { size }
        } else {
            let shortest = base.max(kept_end.min(size));
            match rng.below(3) {
                0 => size,
                1 if fate < 70 => cut,
                _ => shortest,
            }
        };
        fixes.push(Fix::Size(after));
        Outcome {
            what,
            blocks: decided.len() as u64,
            blocks_lost,
            size: after,
            fixes,
        }
    }
}

fn push_write(fixes: &mut Vec<Fix>, at: u64, bytes: &[u8]) {
    if let Some(Fix::Write(from, already)) = fixes.last_mut()
        && *from + already.len() as u64 == at
    {
        already.extend_from_slice(bytes);
        return;
    }
    fixes.push(Fix::Write(at, bytes.to_vec()));
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file kept twice: as it is, and as of its last sync.
    #[derive(Default)]
    struct Model {
        now: Vec<u8>,
        synced: Vec<u8>,
        journal: Journal,
    }

    impl Model {
        fn write(&mut self, at: usize, bytes: &[u8]) {
            let before = self.now.clone();
            self.journal
                .touch(before.len() as u64, at as u64, (at + bytes.len()) as u64, |off, out| {
                    let off = off as usize;
                    let n = out.len().min(before.len().saturating_sub(off));
                    out[..n].copy_from_slice(&before[off..off + n]);
                    n
                });
            if self.now.len() < at + bytes.len() {
                self.now.resize(at + bytes.len(), 0);
            }
            self.now[at..at + bytes.len()].copy_from_slice(bytes);
        }

        fn cut(&mut self, to: usize) {
            let before = self.now.clone();
            self.journal
                .touch(before.len() as u64, to as u64, before.len() as u64, |off, out| {
                    let off = off as usize;
                    let n = out.len().min(before.len().saturating_sub(off));
                    out[..n].copy_from_slice(&before[off..off + n]);
                    n
                });
            self.now.truncate(to);
        }

        fn after_power_failure(&self, rng: &mut Rng) -> (Vec<u8>, Outcome) {
            let outcome = self.journal.power_failure(self.now.len() as u64, rng);
            let mut file = self.now.clone();
            for fix in &outcome.fixes {
                match fix {
                    Fix::Write(at, bytes) => {
                        let at = *at as usize;
                        if file.len() < at + bytes.len() {
                            file.resize(at + bytes.len(), 0);
                        }
                        file[at..at + bytes.len()].copy_from_slice(bytes);
                    }
                    Fix::Size(n) => file.resize(*n as usize, 0),
                }
            }
            (file, outcome)
        }
    }

    #[test]
    fn appended_bytes_may_go_and_synced_ones_stay() {
        let (mut lost, mut kept, mut between) = (0, 0, 0);
        for seed in 0..2_000 {
            let mut rng = Rng::new(seed);
            let mut m = Model::default();
            for round in 0..1 + rng.below(4) {
                let n = 1 + rng.below(20_000) as usize;
                let at = m.now.len();
                m.write(at, &vec![round as u8 + 1; n]);
                let ticket = m.journal.begin_sync();
                m.journal.end_sync(ticket, m.now.len() as u64);
                m.synced = m.now.clone();
            }
            assert!(m.journal.is_clean());
            for _ in 0..1 + rng.below(5) {
                let n = 1 + rng.below(9_000) as usize;
                let at = m.now.len();
                m.write(at, &vec![0xaa; n]);
            }
            let (file, outcome) = m.after_power_failure(&mut rng);
            assert_eq!(file[..m.synced.len()], m.synced[..], "seed {seed}: {}", outcome.what);
            assert!(file.len() <= m.now.len(), "seed {seed}");
            assert!(
                file[m.synced.len()..].iter().all(|b| [0, 0xaa].contains(b)),
                "seed {seed}"
            );
            match file == m.now {
                true => kept += 1,
                false if file.len() == m.synced.len() => lost += 1,
                false => between += 1,
            }
        }
        assert!(lost > 300 && kept > 100 && between > 300, "{lost} {kept} {between}");
    }

    #[test]
    fn overwritten_blocks_are_old_or_new_and_a_lost_file_is_the_synced_one() {
        let mut lost_whole = 0;
        for seed in 0..2_000 {
            let mut rng = Rng::new(seed);
            let mut m = Model::default();
            m.write(0, &(0..30_000u32).map(|i| (i % 251) as u8).collect::<Vec<_>>());
            let ticket = m.journal.begin_sync();
            m.journal.end_sync(ticket, m.now.len() as u64);
            m.synced = m.now.clone();
            for i in 0..6 {
                let at = rng.below(32_000) as usize;
                let n = 1 + rng.below(5_000) as usize;
                m.write(at, &vec![252 + (i % 4) as u8; n]);
                if rng.chance(20) {
                    let to = rng.below(m.now.len() as u64) as usize;
                    m.cut(to);
                }
                if rng.chance(30) {
                    // A sync that is still under way protects nothing.
                    m.journal.begin_sync();
                }
            }
            let (file, outcome) = m.after_power_failure(&mut rng);
            if outcome.what == "lost whole" {
                lost_whole += 1;
                assert!(file == m.synced, "seed {seed}");
            }
            if outcome.what == "kept whole" {
                assert!(file == m.now, "seed {seed}");
            }
            for (i, b) in file.iter().enumerate().take(m.synced.len()) {
                assert!(
                    *b == m.synced[i] || *b >= 252 || *b == 0,
                    "seed {seed}: byte {i} is {b}"
                );
            }
        }
        assert!(lost_whole > 300, "{lost_whole}");
    }

    #[test]
    fn a_failed_sync_is_not_made_good_by_the_next_one() {
        for seed in 0..500 {
            let mut rng = Rng::new(seed);
            let mut m = Model::default();
            m.write(0, &[1; 8192]);
            let ticket = m.journal.begin_sync();
            m.journal.fail_sync(ticket);
            m.write(8192, &[2; 8192]);
            let ticket = m.journal.begin_sync();
            m.journal.end_sync(ticket, m.now.len() as u64);
            assert!(!m.journal.is_clean());
            let (file, outcome) = m.after_power_failure(&mut rng);
            if outcome.what != "kept whole" {
                assert!(file[..8192] == [0; 8192], "seed {seed}");
            }
            assert!(file[8192..] == [2; 8192], "seed {seed}: synced later");
        }
    }

    #[test]
    fn ranges_merge_and_split() {
        let mut r = Ranges::default();
        for (f, t) in [(10, 20), (30, 40), (20, 30), (50, 60), (5, 11)] {
            r.add(f, t);
        }
        assert_eq!(r.iter().collect::<Vec<_>>(), [(5, 40), (50, 60)]);
        r.remove(7, 55);
        assert_eq!(r.iter().collect::<Vec<_>>(), [(5, 7), (55, 60)]);
        assert_eq!(r.bytes(), 7);
    }
}
