//! Measures, does not judge: `cargo test --release --test storage_rate -- --ignored --nocapture`.
//!
//! Publishes through the log and the state as the raft layer does (append, sync, apply, purge what is durable), and
//! prints the rate, bytes written to disk per byte published, the longest wait for a sync, and memory.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mainstem::machine::port::ShardSink;
use mainstem::model::{GroupId, LogIndex, Sequence, ShardId, StoredBatch, Term, TimeUs};
use mainstem::storage::{Store, StoreOptions};
use rand::{Rng, SeedableRng};

fn env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn disk_written() -> u64 {
    let io = std::fs::read_to_string("/proc/self/io").unwrap();
    let line = io.lines().find(|l| l.starts_with("write_bytes")).unwrap();
    line.split(' ').nth(1).unwrap().parse().unwrap()
}

fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[test]
#[ignore = "a measurement"]
fn ingest() {
    let (mib, batch_bytes, groups) = (env("MIB", 2048), env("BATCH_BYTES", 65536), env("GROUPS", 4));
    let (subjects, in_flight) = (env("SUBJECTS", 1) as usize, env("IN_FLIGHT", 8) as usize);
    let dir = tempfile::tempdir_in(std::env::var("DIR").unwrap_or_else(|_| "target".into()))
        .unwrap_or_else(|_| tempfile::tempdir().unwrap());
    let options = StoreOptions {
        log_write_buffer_bytes: (env("LOG_MIB", 128) << 20) as usize,
        state_write_buffer_bytes: (env("STATE_MIB", 32) << 20) as usize,
        min_free_bytes: 0,
        ..StoreOptions::new(dir.path())
    };
    let store = Store::open(options, None).unwrap();
    let per_group = mib * (1 << 20) / batch_bytes / groups;
    let written = disk_written();
    let begun = Instant::now();
    let longest: Duration = std::thread::scope(|scope| {
        let threads: Vec<_> = (1..=groups)
            .map(|group| {
                let store = Arc::clone(&store);
                scope.spawn(move || publish(&store, group, per_group, batch_bytes as usize, subjects, in_flight))
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).max().unwrap()
    });
    let seconds = begun.elapsed().as_secs_f64();
    store.close().unwrap();
    let published = (per_group * groups * batch_bytes) as f64;
    println!(
        "{:.0} MiB in {seconds:.1} s: {:.0} MiB/s; {:.2} bytes to disk per byte; longest wait {longest:?}; peak {} MiB",
        published / 1048576.0,
        published / 1048576.0 / seconds,
        (disk_written() - written) as f64 / published,
        resident_mib(),
    );
    println!("{:?}", store.space());
    drop(store);
    let begun = Instant::now();
    let store = Store::open(StoreOptions::new(dir.path()), None).unwrap();
    println!("opened in {:?}, {} groups", begun.elapsed(), store.log().groups().len());
}

fn publish(store: &Store, group: u64, count: u64, bytes: usize, subjects: usize, in_flight: usize) -> Duration {
    let mut rng = rand::rngs::StdRng::seed_from_u64(group);
    let mut content = vec![0; bytes];
    rng.fill(&mut content[..]);
    let content = Bytes::from(content);
    let (tx, rx) = mpsc::channel();
    let (group, shard) = (GroupId::new(group + 1), ShardId::new(group));
    let mut longest = Duration::ZERO;
    let mut purged = 0;
    let mut applied = 0;
    let mut apply = |n: u64, asked: Instant| {
        longest = longest.max(asked.elapsed());
        let records = (bytes / 1024).max(1) as u32;
        let mut b = store.state().batch();
        let base = Sequence::new(n * u64::from(records) + 1);
        b.put_batch(
            shard,
            &StoredBatch {
                base,
                append_time: TimeUs::new(n),
                term: Term::new(1),
                record_count: records,
                rejected: vec![],
                batch: content.clone(),
            },
        );
        for subject in 0..subjects {
            let list: Vec<u32> = (0..records).filter(|r| *r as usize % subjects == subject).collect();
            if !list.is_empty() {
                b.put_posting(shard, &format!("subject.number.{subject}"), base, &list);
            }
        }
        b.put_shard(shard, group, &[7; 100]);
        b.set_applied(group, LogIndex::new(n), &[1; 40]);
        store.state().write(b).unwrap();
        if let Some(durable) = store.state().durable_applied(group)
            && durable.get() > purged
        {
            purged = durable.get();
            store
                .log()
                .purge(group, durable, Bytes::from_static(b"id"), Box::new(|r| r.unwrap()));
        }
    };
    for n in 0..count {
        let (tx, asked) = (tx.clone(), Instant::now());
        store.log().append(
            group,
            vec![(LogIndex::new(n), content.clone())],
            Box::new(move |r| {
                r.unwrap();
                tx.send((n, asked)).unwrap();
            }),
        );
        while (n + 1 - applied) as usize >= in_flight {
            let (n, asked) = rx.recv().unwrap();
            apply(n, asked);
            applied += 1;
        }
    }
    while applied < count {
        let (n, asked) = rx.recv().unwrap();
        apply(n, asked);
        applied += 1;
    }
    longest
}
