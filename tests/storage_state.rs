//! Applied state: batches, indexes, floors, durability, trims and the space they give back.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstem::machine::port::{MetaKind, ShardSink, ShardView};
use mainstem::model::{GroupId, LogIndex, Sequence, ShardId, StoredBatch, Term, TimeUs};
use mainstem::storage::{StateDb, Store, StoreOptions};
use proptest::prelude::*;

fn options(dir: &std::path::Path) -> StoreOptions {
    StoreOptions {
        log_write_buffer_bytes: 4 << 20,
        state_write_buffer_bytes: 1 << 20,
        block_cache_bytes: 4 << 20,
        min_free_bytes: 0,
        // Only what a test asks for happens.
        flush_interval: Duration::from_secs(3600),
        reclaim_interval: Duration::from_secs(3600),
        garbage_min_bytes: 0,
        ..StoreOptions::new(dir)
    }
}

fn open(dir: &std::path::Path) -> Arc<Store> {
    Store::open(options(dir), None).unwrap()
}

fn s(n: u64) -> ShardId {
    ShardId::new(n)
}

fn q(n: u64) -> Sequence {
    Sequence::new(n)
}

fn g(n: u64) -> GroupId {
    GroupId::new(n)
}

fn batch(base: u64, records: u32, rejected: &[u32], bytes: usize) -> StoredBatch {
    let mut rng = base.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let content: Vec<u8> = (0..bytes)
        .map(|_| {
            rng ^= rng << 13;
            rng ^= rng >> 7;
            rng ^= rng << 17;
            rng as u8
        })
        .collect();
    StoredBatch {
        base: q(base),
        append_time: TimeUs::new(1000 + base),
        term: Term::new(3),
        record_count: records,
        rejected: rejected.to_vec(),
        batch: Bytes::from(content),
    }
}

fn write(state: &StateDb, fill: impl FnOnce(&mut mainstem::storage::StateBatch)) {
    let mut b = state.batch();
    fill(&mut b);
    state.write(b).unwrap();
}

#[test]
fn everything_put_is_read_back_small_and_large_flushed_or_not() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let state = store.state();
    let batches = [
        batch(1, 10, &[], 100),
        batch(11, 10, &[0, 3, 9], 5000),
        batch(18, 1, &[], 70_000),
        batch(19, 3, &[1], 1023),
    ];
    for flushed in [false, true] {
        if !flushed {
            write(state, |b| {
                for stored in &batches {
                    b.put_batch(s(1), stored);
                    b.put_batch(s(2), stored);
                }
                b.put_posting(s(1), "a.b", q(1), &[0, 1, 2, 3]);
                b.put_posting(s(1), "a.b", q(11), &[0, 5]);
                b.put_posting(s(1), "a.bc", q(18), &[0]);
                b.put_posting(s(1), "a", q(19), &[0, 1]);
                b.put_holes(s(1), q(11), &[2, 4]);
                b.put_ids(s(1), q(1), b"ids1");
                b.put_ids(s(1), q(11), b"ids11");
                b.put_producer(s(1), 9, b"p9");
                b.put_producer(s(1), 10, b"p10");
                b.drop_producer(s(1), 9);
                b.put_shard(s(1), g(4), b"shard1");
                b.put_shard(s(2), g(5), b"shard2");
                b.put_meta(MetaKind::Stream, b"k1", b"v1");
                b.put_meta(MetaKind::Node, b"k2", b"v2");
                b.set_applied(g(4), LogIndex::new(77), b"marker");
            });
        } else {
            state.flush().unwrap();
        }
        for stored in &batches {
            assert_eq!(
                state.batch_at_or_before(s(1), stored.base).unwrap().as_ref(),
                Some(stored)
            );
            assert_eq!(
                state.batch_at_or_after(s(1), stored.base).unwrap().as_ref(),
                Some(stored)
            );
        }
        assert_eq!(state.batch_at_or_before(s(1), q(17)).unwrap().unwrap().base, q(11));
        assert_eq!(state.batch_at_or_after(s(1), q(12)).unwrap().unwrap().base, q(18));
        assert_eq!(state.batch_at_or_before(s(1), q(0)).unwrap(), None);
        assert_eq!(state.batch_at_or_after(s(1), q(20)).unwrap(), None);
        assert_eq!(state.batch_at_or_before(s(3), q(100)).unwrap(), None);
        let scan = |from| -> Vec<u64> { state.batches(s(1), q(from)).map(|b| b.unwrap().base.get()).collect() };
        assert_eq!(scan(0), [1, 11, 18, 19]);
        assert_eq!(scan(10), [1, 11, 18, 19]);
        assert_eq!(scan(17), [11, 18, 19]);
        assert_eq!(scan(18), [18, 19]);
        assert_eq!(scan(20), [19]);
        assert!(scan(21).is_empty());
        let at = |t| {
            state
                .first_batch_at_time(s(1), TimeUs::new(t))
                .unwrap()
                .map(|b| b.base.get())
        };
        assert_eq!(
            [at(0), at(1001), at(1002), at(1018), at(1019), at(1020)],
            [Some(1), Some(1), Some(11), Some(18), Some(19), None]
        );
        assert_eq!(state.last_posting(s(1), "a.b").unwrap(), Some((q(11), vec![0, 5])));
        assert_eq!(
            state.posting_before(s(1), "a.b", q(11)).unwrap(),
            Some((q(1), vec![0, 1, 2, 3]))
        );
        assert_eq!(state.posting_before(s(1), "a.b", q(1)).unwrap(), None);
        assert_eq!(state.last_posting(s(1), "a").unwrap(), Some((q(19), vec![0, 1])));
        assert_eq!(state.last_posting(s(1), "b").unwrap(), None);
        let mut found = Vec::new();
        state
            .postings(s(1), "a.b", |subject, base, list| {
                found.push((subject.to_string(), base.get(), list.len()));
                true
            })
            .unwrap();
        assert_eq!(
            found,
            [("a.b".into(), 1, 4), ("a.b".into(), 11, 2), ("a.bc".into(), 18, 1)]
        );
        assert_eq!(state.holes(s(1), q(11)).unwrap(), [2, 4]);
        assert!(state.holes(s(1), q(1)).unwrap().is_empty());
        assert_eq!(state.id_blocks(s(1)).unwrap().len(), 2);
        assert_eq!(state.producers(s(1)).unwrap(), [(10, Bytes::from_static(b"p10"))]);
        assert_eq!(
            state.shards().unwrap(),
            [
                (s(1), g(4), Bytes::from_static(b"shard1")),
                (s(2), g(5), Bytes::from_static(b"shard2"))
            ]
        );
        let streams = state.meta_records(MetaKind::Stream).unwrap();
        assert_eq!(streams, [(Bytes::from_static(b"k1"), Bytes::from_static(b"v1"))]);
        assert_eq!(
            state.applied(g(4)).unwrap(),
            Some((LogIndex::new(77), Bytes::from_static(b"marker")))
        );
        assert_eq!(state.durable_applied(g(4)), flushed.then_some(LogIndex::new(77)));
    }
}

#[test]
fn what_is_not_flushed_is_lost_whole_and_what_is_flushed_stays_whole() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        let state = store.state();
        let generation = state.flush_generation();
        write(state, |b| {
            b.put_batch(s(1), &batch(1, 10, &[], 5000));
            b.put_posting(s(1), "x", q(1), &[0]);
            b.set_applied(g(2), LogIndex::new(1), b"m1");
        });
        state.flush().unwrap();
        assert!(generation.has_changed().unwrap());
        write(state, |b| {
            b.put_batch(s(1), &batch(11, 10, &[], 5000));
            b.put_posting(s(1), "x", q(11), &[0]);
            b.set_applied(g(2), LogIndex::new(2), b"m2");
        });
        assert_eq!(state.durable_applied(g(2)), Some(LogIndex::new(1)));
        assert_eq!(state.applied(g(2)).unwrap().unwrap().0, LogIndex::new(2));
    }
    for _ in 0..2 {
        // Applying the lost entry again gives the same, however often.
        let store = open(dir.path());
        let state = store.state();
        assert_eq!(state.applied(g(2)).unwrap().unwrap().0, LogIndex::new(1));
        assert_eq!(state.durable_applied(g(2)), Some(LogIndex::new(1)));
        assert_eq!(state.batches(s(1), q(0)).count(), 1);
        assert_eq!(state.last_posting(s(1), "x").unwrap(), Some((q(1), vec![0])));
        write(state, |b| {
            b.put_batch(s(1), &batch(11, 10, &[], 5000));
            b.put_posting(s(1), "x", q(11), &[0]);
            b.set_applied(g(2), LogIndex::new(2), b"m2");
        });
        assert_eq!(state.batches(s(1), q(0)).count(), 2);
    }
    let store = open(dir.path());
    write(store.state(), |b| b.set_applied(g(2), LogIndex::new(2), b"m2"));
    store.close().unwrap();
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.state().applied(g(2)).unwrap().unwrap().0, LogIndex::new(2));
}

#[test]
fn state_is_flushed_by_size_and_by_time() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(
        StoreOptions {
            flush_interval: Duration::from_millis(20),
            flush_min_bytes: 0,
            ..options(dir.path())
        },
        None,
    )
    .unwrap();
    let mut generation = store.state().flush_generation();
    write(store.state(), |b| b.set_applied(g(1), LogIndex::new(1), b""));
    wait_for(&mut generation, || {
        store.state().durable_applied(g(1)) == Some(LogIndex::new(1))
    });
    drop(store);

    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let mut generation = store.state().flush_generation();
    write(store.state(), |b| {
        b.put_batch(s(1), &batch(1, 1, &[], (1 << 20) + 1));
        b.set_applied(g(1), LogIndex::new(1), b"");
    });
    wait_for(&mut generation, || {
        store.state().durable_applied(g(1)) == Some(LogIndex::new(1))
    });
}

fn wait_for(generation: &mut tokio::sync::watch::Receiver<u64>, until: impl Fn() -> bool) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    runtime.block_on(async {
        while !until() {
            tokio::time::timeout(Duration::from_secs(20), generation.changed())
                .await
                .expect("a flush was due")
                .unwrap();
        }
    });
}

/// Fills `shards` alternately; returns how many batches each got.
fn fill(state: &StateDb, shards: &[u64], batches: u64, bytes: usize) {
    for n in 0..batches {
        write(state, |b| {
            for &shard in shards {
                b.put_batch(s(shard), &batch(n * 10 + 1, 10, &[], bytes));
                b.put_posting(s(shard), "sub", q(n * 10 + 1), &[0, 1, 2]);
                b.put_ids(s(shard), q(n * 10 + 1), b"ids");
            }
            b.set_applied(g(1), LogIndex::new(n), b"");
        });
    }
}

#[test]
fn a_trim_hides_at_once_but_removes_only_when_it_is_durable() {
    let dir = tempfile::tempdir().unwrap();
    {
        let store = open(dir.path());
        let state = store.state();
        fill(state, &[1], 20, 2000);
        state.flush().unwrap();
        write(state, |b| {
            b.drop_batches(s(1), q(0), q(101));
            b.drop_ids(s(1), q(101));
            b.set_applied(g(1), LogIndex::new(20), b"");
        });
        assert_eq!(state.batches(s(1), q(0)).count(), 10);
        assert_eq!(state.batch_at_or_before(s(1), q(100)).unwrap(), None);
        assert_eq!(state.posting_before(s(1), "sub", q(101)).unwrap(), None);
        assert_eq!(state.id_blocks(s(1)).unwrap().len(), 10);
        assert_eq!((state.batch_floor(s(1)), state.durable_floor(s(1))), (q(101), q(0)));
    }
    let store = open(dir.path());
    let state = store.state();
    assert_eq!(state.batch_floor(s(1)), q(0), "the trim was lost with the write buffer");
    assert_eq!(state.batches(s(1), q(0)).count(), 20);
    assert_eq!(
        state.posting_before(s(1), "sub", q(101)).unwrap(),
        Some((q(91), vec![0, 1, 2]))
    );
    assert_eq!(state.id_blocks(s(1)).unwrap().len(), 20);

    write(state, |b| {
        b.drop_batches(s(1), q(0), q(101));
        b.drop_ids(s(1), q(51));
    });
    // The compaction sees a floor that is not known to be durable: it must remove nothing.
    store.compact_all_for_test();
    assert_eq!(store.raw_counts_for_test(s(1)), (20, 20, 20));
    state.flush().unwrap();
    assert_eq!(state.durable_floor(s(1)), q(101));
    store.compact_all_for_test();
    store.reclaim_now().unwrap();
    let (postings, ids, batches) = store.raw_counts_for_test(s(1));
    assert_eq!((postings, ids, batches), (10, 15, 10));
    assert_eq!(state.batches(s(1), q(0)).count(), 10);
}

#[test]
fn a_dropped_shard_is_gone_and_may_come_back_with_less() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let state = store.state();
    fill(state, &[1, 2], 10, 2000);
    write(state, |b| {
        b.put_shard(s(1), g(1), b"r");
        b.put_producer(s(1), 1, b"p");
        b.drop_batches(s(1), q(0), q(51));
        b.drop_ids(s(1), q(51));
    });
    state.flush().unwrap();
    write(state, |b| {
        b.drop_shard(s(1));
        b.put_batch(s(1), &batch(11, 10, &[], 2000));
        b.put_posting(s(1), "again", q(11), &[0]);
    });
    state.flush().unwrap();
    store.compact_all_for_test();
    store.reclaim_now().unwrap();
    assert_eq!(
        state
            .batches(s(1), q(0))
            .map(|b| b.unwrap().base.get())
            .collect::<Vec<_>>(),
        [11]
    );
    assert_eq!(state.last_posting(s(1), "again").unwrap(), Some((q(11), vec![0])));
    assert_eq!(state.last_posting(s(1), "sub").unwrap(), None);
    assert!(state.id_blocks(s(1)).unwrap().is_empty());
    assert!(state.producers(s(1)).unwrap().is_empty());
    assert_eq!(state.batches(s(2), q(0)).count(), 10);
    drop(store);
    let store = open(dir.path());
    assert_eq!(store.state().batches(s(1), q(0)).count(), 1);
    assert_eq!(store.state().batch_floor(s(1)), q(0));
}

fn state_bytes(dir: &std::path::Path) -> u64 {
    let mut sum = 0;
    for entry in std::fs::read_dir(dir.join("state")).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if name.ends_with(".sst") || name.ends_with(".blob") {
            // It may be removed while we look.
            sum += entry.metadata().map_or(0, |m| m.len());
        }
    }
    sum
}

#[test]
fn space_comes_back_when_one_blob_file_mixes_retentions() {
    for bytes in [20_000, 700] {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path());
        let state = store.state();
        let count = 8_000_000 / bytes as u64 / 4;
        // Four shards share every file; three of them are trimmed to a tenth, one keeps everything.
        fill(state, &[1, 2, 3, 4], count, bytes);
        state.flush().unwrap();
        let before = state_bytes(dir.path());
        let floor = count * 9 / 10 * 10 + 1;
        write(state, |b| {
            for shard in 1..=3 {
                b.drop_batches(s(shard), q(0), q(floor));
                b.drop_ids(s(shard), q(floor));
            }
        });
        state.flush().unwrap();
        store.reclaim_now().unwrap();
        let live = (count + 3 * (count / 10)) * (bytes as u64 + 60);
        let after = state_bytes(dir.path());
        println!("{bytes}: before {before}, after {after}, live {live}");
        assert!(before > live * 2);
        assert!(after as f64 <= live as f64 * 1.3, "{bytes}: {after} of {live} live");
        for shard in 1..=4 {
            let expect = if shard == 4 { count } else { count - count * 9 / 10 };
            let mut seen = 0;
            for stored in state.batches(s(shard), q(0)) {
                let stored = stored.unwrap();
                assert_eq!(stored, batch(stored.base.get(), 10, &[], bytes));
                seen += 1;
            }
            assert_eq!(seen, expect);
        }
        store.close().unwrap();
        drop(store);
        let store = open(dir.path());
        assert_eq!(store.state().batches(s(4), q(0)).count() as u64, count);
    }
}

#[test]
fn files_of_one_retention_go_whole_without_rewriting() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(dir.path());
    let state = store.state();
    fill(state, &[1, 2], 400, 20_000);
    state.flush().unwrap();
    let before: Vec<_> = blob_names(dir.path());
    assert!(before.len() > 8);
    write(state, |b| {
        for shard in [1, 2] {
            b.drop_batches(s(shard), q(0), q(3001));
        }
    });
    state.flush().unwrap();
    store.reclaim_now().unwrap();
    let after = blob_names(dir.path());
    // A quarter is live; the file at each end of it, and one where a flush by time cut it, may hold some of both.
    assert!(
        after.len() <= before.len() / 4 + 3,
        "{} of {}",
        after.len(),
        before.len()
    );
    assert!(after.iter().all(|f| before.contains(f)), "nothing was rewritten");
}

fn blob_names(dir: &std::path::Path) -> Vec<String> {
    std::fs::read_dir(dir.join("state"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .filter(|n| n.ends_with(".blob"))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Random writes, trims, flushes, crashes: the state is always that after some prefix of the writes, never older
    /// than the last flush, and what is read is what a plain map says.
    #[test]
    fn a_crash_leaves_a_prefix_no_older_than_the_last_flush(
        steps in proptest::collection::vec((0u8..10, 1u64..4, 1usize..3000), 1..60)
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut store = open(dir.path());
        // After each write: per shard (floor, bases).
        let mut history: Vec<Vec<(u64, Vec<u64>)>> = vec![vec![(0, vec![]); 4]];
        let mut flushed = 0usize;
        for (kind, shard, bytes) in steps {
            match kind {
                0..=5 => {
                    let mut now = history.last().unwrap().clone();
                    let (floor, bases) = &mut now[shard as usize];
                    let base = bases.last().map_or((*floor).max(1), |b| b + 10);
                    bases.push(base);
                    let index = LogIndex::new(history.len() as u64);
                    write(store.state(), |b| {
                        b.put_batch(s(shard), &batch(base, 10, &[], bytes));
                        b.set_applied(g(1), index, b"");
                    });
                    history.push(now);
                }
                6 => {
                    let mut now = history.last().unwrap().clone();
                    let (floor, bases) = &mut now[shard as usize];
                    if let Some(&to) = bases.get(bases.len() / 2) {
                        *floor = to;
                        bases.retain(|b| *b >= to);
                        let index = LogIndex::new(history.len() as u64);
                        write(store.state(), |b| {
                            b.drop_batches(s(shard), q(0), q(to));
                            b.set_applied(g(1), index, b"");
                        });
                        history.push(now);
                    }
                }
                7 => {
                    store.state().flush().unwrap();
                    flushed = history.len() - 1;
                }
                8 => store.reclaim_now().unwrap(),
                _ => {
                    drop(store);
                    store = open(dir.path());
                    let at = store.state().applied(g(1)).unwrap().map_or(0, |(i, _)| i.get() as usize);
                    prop_assert!(at >= flushed && at < history.len(), "at {at}, flushed {flushed}");
                    history.truncate(at + 1);
                    flushed = at;
                }
            }
            let now = history.last().unwrap();
            for shard in 1..4u64 {
                let found: Vec<u64> = store
                    .state()
                    .batches(s(shard), q(0))
                    .map(|b| b.unwrap().base.get())
                    .collect();
                prop_assert_eq!(&found, &now[shard as usize].1);
            }
        }
    }
}

#[test]
fn trims_give_their_space_back_by_themselves() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(
        StoreOptions {
            reclaim_interval: Duration::from_millis(50),
            ..options(dir.path())
        },
        None,
    )
    .unwrap();
    fill(store.state(), &[1, 2], 200, 20_000);
    store.state().flush().unwrap();
    let before = state_bytes(dir.path());
    // Nothing else is written, so no flush is due for an hour.
    write(store.state(), |b| b.drop_batches(s(1), q(0), q(1991)));
    let deadline = std::time::Instant::now() + Duration::from_secs(30);
    while state_bytes(dir.path()) as f64 > before as f64 * 0.6 {
        assert!(std::time::Instant::now() < deadline, "the space is still held");
        std::thread::yield_now();
    }
    assert_eq!(store.state().batches(s(1), q(0)).count(), 1);
    assert_eq!(store.state().batches(s(2), q(0)).count(), 200);
}

#[test]
fn little_space_is_told_before_it_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let free = open(dir.path()).space().free;
    assert!(free > 0);
    let dir = tempfile::tempdir().unwrap();
    let margin = 64 << 20;
    let store = Store::open(
        StoreOptions {
            min_free_bytes: free.saturating_sub(margin).max(1),
            // Only what is accepted counts from here on, not what others do on this disk.
            space_interval: Duration::from_secs(3600),
            ..options(dir.path())
        },
        None,
    )
    .unwrap();
    if store.space().low {
        // Someone else filled the disk by that much in between; nothing can be said then.
        return;
    }
    let mut accepted = 0u64;
    while !store.space().low {
        assert!(
            accepted < 2 * margin,
            "what was accepted is counted before it is measured"
        );
        write(store.state(), |b| b.put_meta(MetaKind::Node, b"k", &[0; 1 << 20]));
        accepted += 1 << 20;
    }
    assert!(accepted > 0);
}
