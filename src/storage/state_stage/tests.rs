//! Receiving in several attempts, on top of what is there: whatever comes between, the result is the sender's state.
#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::super::state_compare::Compared;
use super::super::state_install::tests::{GROUP, INSTALL_STEPS, chunks, crash_in_install, open, shards_of};
use super::super::state_pieces::{Family, Piece};
use super::super::store::Store;
use super::*;
use crate::machine::port::ShardSink as _;
use crate::model::{LogIndex, Sequence, ShardId, StoredBatch, Term, TimeUs};

/// What an entry does to a group.
#[derive(Debug, Clone, Copy)]
enum Op {
    Create(u64),
    Drop(u64),
    Publish {
        shard: u64,
        base: u64,
        bytes: usize,
        noise: u64,
    },
    Trim {
        shard: u64,
        to: u64,
    },
    Holes {
        shard: u64,
        base: u64,
    },
    Producer {
        shard: u64,
        record: u64,
    },
}

/// A history of a group: any two replicas that applied the same prefix hold the same.
struct History {
    ops: Vec<Op>,
    /// Of each shard: base of the next batch, and floor.
    shards: BTreeMap<u64, (u64, u64)>,
    next_shard: u64,
}

impl History {
    fn new() -> Self {
        Self {
            ops: Vec::new(),
            shards: BTreeMap::new(),
            next_shard: 1,
        }
    }

    fn go_on(&mut self, rng: &mut StdRng, count: usize, bytes_max: usize) {
        for _ in 0..count {
            let some = self
                .shards
                .keys()
                .nth(rng.random_range(0..self.shards.len().max(1)))
                .copied();
            let op = match (rng.random_range(0..100), some) {
                (0..2, _) | (_, None) => {
                    self.next_shard += 1;
                    self.shards.insert(self.next_shard, (1, 1));
                    Op::Create(self.next_shard)
                }
                (2, Some(shard)) if self.shards.len() > 2 => {
                    self.shards.remove(&shard);
                    Op::Drop(shard)
                }
                (2..6, Some(shard)) => {
                    let (next, floor) = self.shards.get_mut(&shard).unwrap();
                    *floor += (*next - *floor) / rng.random_range(2..20);
                    Op::Trim { shard, to: *floor }
                }
                (6..16, Some(shard)) => {
                    let (next, floor) = self.shards[&shard];
                    let base = rng.random_range(floor..=next);
                    Op::Holes { shard, base }
                }
                (16..24, Some(shard)) => Op::Producer {
                    shard,
                    record: rng.random(),
                },
                (_, Some(shard)) => {
                    let (next, _) = self.shards.get_mut(&shard).unwrap();
                    let base = *next;
                    *next += 10;
                    Op::Publish {
                        shard,
                        base,
                        bytes: rng.random_range(1..bytes_max),
                        noise: rng.random(),
                    }
                }
            };
            self.ops.push(op);
        }
    }

    /// Applies the entries `from..to` (the first has index 1).
    fn apply(&self, store: &Store, from: usize, to: usize) {
        for (at, op) in self.ops[from..to].iter().enumerate() {
            let mut batch = store.state().batch();
            let index = LogIndex::new((from + at) as u64 + 1);
            match *op {
                Op::Create(shard) => batch.put_shard(ShardId::new(shard), GROUP, b"made"),
                Op::Drop(shard) => batch.drop_shard(ShardId::new(shard)),
                Op::Publish {
                    shard,
                    base,
                    bytes,
                    noise,
                } => {
                    let (shard, base) = (ShardId::new(shard), Sequence::new(base));
                    let payload: Vec<u8> = (0..bytes as u64)
                        .map(|n| (n.wrapping_mul(noise | 1) >> 24) as u8)
                        .collect();
                    batch.put_batch(
                        shard,
                        &StoredBatch {
                            base,
                            append_time: TimeUs::new(noise >> 8),
                            term: Term::new(1),
                            record_count: 10,
                            rejected: vec![],
                            batch: payload.into(),
                        },
                    );
                    batch.put_posting(shard, ["a", "b.c", "d"][noise as usize % 3], base, &[0, 3, 9]);
                    batch.put_ids(shard, base, &noise.to_le_bytes());
                    batch.put_shard(shard, GROUP, &noise.to_le_bytes());
                }
                Op::Trim { shard, to } => {
                    batch.drop_batches(ShardId::new(shard), Sequence::new(0), Sequence::new(to));
                    batch.drop_ids(ShardId::new(shard), Sequence::new(to));
                }
                Op::Holes { shard, base } => batch.put_holes(ShardId::new(shard), Sequence::new(base), &[1]),
                Op::Producer { shard, record } => {
                    batch.put_producer(ShardId::new(shard), record % 5, &record.to_le_bytes());
                }
            }
            batch.set_applied(GROUP, index, b"marker");
            store.state().write(batch).unwrap();
        }
    }
}

fn pieces(store: &Store) -> Vec<Piece> {
    let mut all = Vec::new();
    let sink = |piece| {
        all.push(piece);
        true
    };
    assert!(store.state().view_group(GROUP, |view| view.pieces(sink)).unwrap());
    all
}

fn wanted_chunks(store: &Store, wanted: &[Stretch]) -> Vec<(u32, Bytes)> {
    let mut all = Vec::new();
    let sink = |data: Bytes| {
        all.push((crc32fast::hash(&data), data));
        true
    };
    let done = store
        .state()
        .view_group(GROUP, |view| view.export(wanted, sink))
        .unwrap();
    assert_eq!(
        done.unwrap().bytes,
        all.iter().map(|(_, data)| data.len() as u64).sum::<u64>()
    );
    all
}

fn compare(staging: &mut Staging, from: &Store) -> Compared {
    let mut all = pieces(from).into_iter();
    staging.compare(|| Ok(all.next())).unwrap()
}

fn begin(to: &Store, from: &Store) -> Staging {
    Staging::open(to.state(), GROUP, shards_of(from)).unwrap()
}

fn receive(staging: &mut Staging, from: &Store, wanted: &[Stretch]) -> Received {
    let mut all = wanted_chunks(from, wanted).into_iter();
    staging.receive(wanted, || Ok(all.next())).unwrap()
}

fn complete(staging: Staging) -> StagedGroup {
    match staging.finish().unwrap() {
        Finish::Complete(staged) => staged,
        Finish::Again(_, again) => panic!("damaged: {again:?}"),
    }
}

fn install(to: &Store, staged: StagedGroup, applied: usize) {
    let index = LogIndex::new(applied as u64);
    to.state()
        .install_group(staged, &BTreeSet::new(), index, b"marker")
        .unwrap();
}

fn total(store: &Store) -> u64 {
    pieces(store).iter().map(|p| p.bytes).sum()
}

/// Two stores: the first has applied everything, the second what came before `behind` entries.
fn pair(dirs: &[tempfile::TempDir; 2], seed: u64, behind: usize) -> (History, Arc<Store>, Arc<Store>) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut history = History::new();
    history.go_on(&mut rng, 400, 100_000);
    let (from, to) = (open(dirs[0].path()), open(dirs[1].path()));
    history.apply(&from, 0, history.ops.len());
    history.apply(&to, 0, history.ops.len() - behind);
    (history, from, to)
}

fn dirs() -> [tempfile::TempDir; 2] {
    [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()]
}

#[test]
fn a_replica_that_is_a_little_behind_gets_little() {
    let dirs = dirs();
    let (history, from, to) = pair(&dirs, 11, 5);
    let mut staging = begin(&to, &from);
    assert!(staging.has_something());
    let compared = compare(&mut staging, &from);
    assert_eq!(compared.wanted_bytes + compared.reused_bytes, total(&from));
    assert!(compared.wanted_bytes < total(&from) / 3, "{compared:?}");
    assert!(!staging.kept.is_empty(), "batches stay where they are");
    let received = receive(&mut staging, &from, &compared.wanted);
    assert_eq!(received.again, []);
    install(&to, complete(staging), history.ops.len());
    assert!(chunks(&to) == chunks(&from));
    to.compact_all_for_test();
    assert!(chunks(&to) == chunks(&from));
}

#[test]
fn the_same_state_costs_nothing() {
    let dirs = dirs();
    let (history, from, to) = pair(&dirs, 12, 0);
    let mut staging = begin(&to, &from);
    let compared = compare(&mut staging, &from);
    assert_eq!((compared.wanted_bytes, &compared.wanted[..]), (0, &[][..]));
    assert_eq!(receive(&mut staging, &from, &[]).records, 0);
    install(&to, complete(staging), history.ops.len());
    assert!(chunks(&to) == chunks(&from));
}

#[test]
fn what_differs_below_the_tail_is_corrected() {
    let dirs = dirs();
    let (history, from, to) = pair(&dirs, 13, 10);
    // Not what any replica would do: a batch with other content, one that is missing, one too many, holes of its own.
    let (shard, (next, floor)) = history
        .shards
        .iter()
        .max_by_key(|(_, (next, floor))| next - floor)
        .unwrap();
    let shard = ShardId::new(*shard);
    let mut wrong = to.state().batch();
    for (at, fill) in [(floor + 20, 1u8), (next + 500, 2)] {
        let at = at - (at - 1) % 10;
        let batch = StoredBatch {
            base: Sequence::new(at),
            append_time: TimeUs::new(1),
            term: Term::new(9),
            record_count: 10,
            rejected: vec![],
            batch: vec![fill; 2_000].into(),
        };
        wrong.put_batch(shard, &batch);
        wrong.put_holes(shard, Sequence::new(at), &[4, 5]);
    }
    wrong.put_producer(shard, 77, b"unknown there");
    to.state().write(wrong).unwrap();
    let mut staging = begin(&to, &from);
    let compared = compare(&mut staging, &from);
    assert!(compared.reused_bytes > 0);
    receive(&mut staging, &from, &compared.wanted);
    install(&to, complete(staging), history.ops.len());
    assert!(chunks(&to) == chunks(&from));
}

#[test]
fn a_transfer_goes_on_where_it_broke_off() {
    let dirs = dirs();
    let (mut history, from, to) = pair(&dirs, 14, 399);
    let all = wanted_chunks(&from, &[Stretch::everything()]);
    let mut staging = begin(&to, &from);
    let half = all.len() / 2;
    let mut some = all[..half].iter().cloned();
    let ended = staging.receive(&[Stretch::everything()], || {
        some.next().map(Some).ok_or("it broke off".into())
    });
    assert!(matches!(ended, Err(StageError::Ended(_))), "{ended:?}");
    let there: usize = all[..half].iter().map(|(_, data)| data.len()).sum();
    assert_eq!(staging.bytes(), there as u64, "everything received is kept");
    drop((staging, to));
    // Meanwhile the sender goes on, and the receiver was restarted.
    let mut rng = StdRng::seed_from_u64(15);
    let before = history.ops.len();
    history.go_on(&mut rng, 3, 60_000);
    history.apply(&from, before, history.ops.len());
    let to = open(dirs[1].path());
    let mut staging = begin(&to, &from);
    let compared = compare(&mut staging, &from);
    assert!(compared.reused_bytes as usize > there / 3, "{compared:?} of {there}");
    receive(&mut staging, &from, &compared.wanted);
    install(&to, complete(staging), history.ops.len());
    assert!(chunks(&to) == chunks(&from));
}

#[test]
fn only_what_was_damaged_on_the_way_comes_again() {
    let dirs = dirs();
    let (history, from, to) = pair(&dirs, 16, 400);
    let mut staging = begin(&to, &from);
    assert!(!staging.has_something());
    let everything = [Stretch::everything()];
    let mut all = wanted_chunks(&from, &everything);
    let count = all.len();
    assert!(count > 12);
    let damaged = [0, 5, 6, count - 1];
    let mut bytes = 0;
    for at in damaged {
        let mut data = all[at].1.to_vec();
        bytes += data.len();
        let middle = data.len() / 2;
        data[middle] ^= 0x10;
        all[at].1 = data.into();
    }
    let mut all = all.into_iter();
    let received = staging.receive(&everything, || Ok(all.next())).unwrap();
    assert_eq!(received.again.len(), 3, "two of them are side by side");
    let again = wanted_chunks(&from, &received.again);
    assert_eq!(again.iter().map(|(_, data)| data.len()).sum::<usize>(), bytes);
    assert_eq!(receive(&mut staging, &from, &received.again).again, []);
    install(&to, complete(staging), history.ops.len());
    assert!(chunks(&to) == chunks(&from));
}

#[test]
fn a_file_that_was_damaged_in_incoming_comes_again() {
    for restarted in [false, true] {
        let dirs = dirs();
        let (history, from, mut to) = pair(&dirs, 17, 400);
        let mut staging = begin(&to, &from);
        receive(&mut staging, &from, &[Stretch::everything()]);
        let file = staging
            .files
            .iter()
            .find(|f| f.family == Family::Index)
            .unwrap()
            .clone();
        let path = staging.place.dir.join(&file.name);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(&path, bytes).unwrap();
        let wanted = if restarted {
            drop((staging, to));
            to = open(dirs[1].path());
            staging = begin(&to, &from);
            assert!(!path.exists(), "found at once");
            compare(&mut staging, &from).wanted
        } else {
            match staging.finish().unwrap() {
                Finish::Complete(_) => panic!("the damage was not found"),
                Finish::Again(back, again) => {
                    staging = back;
                    again
                }
            }
        };
        let bytes: usize = wanted_chunks(&from, &wanted).iter().map(|(_, data)| data.len()).sum();
        assert_eq!(bytes as u64, file.bytes, "restarted: {restarted}");
        receive(&mut staging, &from, &wanted);
        install(&to, complete(staging), history.ops.len());
        assert!(chunks(&to) == chunks(&from));
    }
}

#[test]
fn a_group_is_received_once_at_a_time() {
    let dirs = dirs();
    let (_, from, to) = pair(&dirs, 18, 400);
    let first = begin(&to, &from);
    let second = Staging::open(to.state(), GROUP, shards_of(&from));
    assert!(matches!(second, Err(StageError::Busy(GROUP))), "{second:?}");
    drop(first);
    begin(&to, &from);
}

/// Attempts that break off anywhere, from a sender that goes on; restarts, also in the middle of the switch; entries
/// that are applied between comparing and the switch; trims that are made durable and reclaimed.
#[test]
fn whatever_comes_between_the_result_is_the_senders_state() {
    let seeds = match std::env::var("SNAPSHOT_SEED") {
        Ok(seed) => vec![seed.parse().unwrap()],
        Err(_) => (0..8).map(|_| rand::random::<u32>().into()).collect::<Vec<u64>>(),
    };
    for seed in seeds {
        println!("seed {seed} (SNAPSHOT_SEED={seed} does it again)");
        let mut rng = StdRng::seed_from_u64(seed);
        let dirs = dirs();
        let behind = rng.random_range(1..400);
        let (mut history, from, mut to) = pair(&dirs, seed, behind);
        let mut applied = 400 - behind;
        loop {
            if rng.random_bool(0.3) {
                to.state().flush().unwrap();
                to.reclaim_now().unwrap();
                from.state().flush().unwrap();
                from.reclaim_now().unwrap();
            }
            let mut staging = begin(&to, &from);
            let mut wanted = vec![Stretch::everything()];
            if staging.has_something() {
                wanted = compare(&mut staging, &from).wanted;
            }
            let mut left = if rng.random_bool(0.5) {
                usize::MAX
            } else {
                rng.random_range(0..40)
            };
            let mut chunks_of = wanted_chunks(&from, &wanted).into_iter();
            let received = staging.receive(&wanted, || {
                left = left.checked_sub(1).ok_or("it broke off")?;
                Ok(chunks_of.next())
            });
            if received.is_err() {
                drop(staging);
                if rng.random_bool(0.5) {
                    // What was not flushed is lost, and applied again.
                    drop(to);
                    to = open(dirs[1].path());
                    let index = to.state().applied(GROUP).unwrap().map_or(0, |(i, _)| i.get() as usize);
                    history.apply(&to, index, applied);
                }
                let before = history.ops.len();
                history.go_on(&mut rng, 5, 60_000);
                history.apply(&from, before, history.ops.len());
                continue;
            }
            let staged = complete(staging);
            let later = rng.random_range(applied..=history.ops.len() - 1);
            if rng.random_bool(0.3) {
                history.apply(&to, applied, later);
                applied = later;
            }
            let all = history.ops.len();
            if rng.random_bool(0.5) {
                install(&to, staged, all);
            } else {
                let steps = rng.random_range(0..=INSTALL_STEPS);
                crash_in_install(to, staged, &BTreeSet::new(), LogIndex::new(all as u64), steps);
                to = open(dirs[1].path());
                if steps == 0 {
                    let index = to.state().applied(GROUP).unwrap().map_or(0, |(i, _)| i.get() as usize);
                    history.apply(&to, index, applied);
                    continue;
                }
            }
            break;
        }
        assert!(chunks(&to) == chunks(&from), "seed {seed}");
        // It goes on from there, as the sender does.
        let before = history.ops.len();
        history.go_on(&mut rng, 50, 60_000);
        for store in [&from, &to] {
            history.apply(store, before, history.ops.len());
            store.state().flush().unwrap();
            store.reclaim_now().unwrap();
        }
        assert!(chunks(&to) == chunks(&from), "seed {seed}, later");
        drop(to);
        assert!(chunks(&open(dirs[1].path())) == chunks(&from), "seed {seed}, restarted");
    }
}
