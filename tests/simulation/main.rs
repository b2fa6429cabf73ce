//! A whole cluster in one process, from a seed: the product's store, replicas and transport on simulated time, network
//! and disk (docs/decisions/0030).
//!
//! `make torture` runs many seeds, `make test` a few. A seed is run again with
//! `SEED=n cargo test --release --workspace --test simulation`; with `LOUD=1` it tells what happens as it happens, with
//! `DIGESTS=1` a digest of what happened, to be compared with that of another run.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod ask;
mod changes;
mod disk;
mod faults;
mod host;
mod invariants;
mod load;
mod look;
mod moves;
mod net;
mod node;
mod planted;
mod rng;
mod run;
mod trace;
mod world;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use mainstem::model::GroupId;
use mainstem::raft::LogKeep;
use parking_lot::Mutex;
use run::simulate;
use world::{Planted, Scene};

/// What is simulated, by name.
fn scene(name: &str) -> Scene {
    // Three replicas of one group.
    let one_group = Scene {
        nodes: 3,
        groups: vec![(GroupId::new(7), vec![1, 2, 3])],
        keep: LogKeep::default(),
        chaos: Duration::from_secs(15),
        planted: None,
        changes: false,
        moves: false,
    };
    let planted = |planted| Scene {
        planted: Some(planted),
        ..one_group.clone()
    };
    match name {
        "one_group" => one_group,
        // Two groups on five nodes, whose replicas come and go.
        "changing_groups" => Scene {
            nodes: 5,
            groups: vec![(GroupId::new(7), vec![1, 2, 3]), (GroupId::new(8), vec![3, 4, 5])],
            changes: true,
            ..one_group
        },
        // Two groups on three nodes, between which shards move.
        "moving_shards" => Scene {
            groups: vec![(GroupId::new(7), vec![1, 2, 3]), (GroupId::new(8), vec![1, 2, 3])],
            moves: true,
            ..one_group
        },
        // The same, with logs that are purged as soon as may be: who was away for a moment needs a snapshot.
        "short_logs" => Scene {
            groups: vec![(GroupId::new(7), vec![1, 2, 3]), (GroupId::new(8), vec![1, 2, 3])],
            moves: true,
            keep: LogKeep {
                leader_bytes: 1,
                follower_bytes: 1,
            },
            ..one_group
        },
        // The same on four nodes, where replicas come and go as well.
        "moving_everything" => Scene {
            nodes: 4,
            groups: vec![(GroupId::new(7), vec![1, 2, 3]), (GroupId::new(8), vec![1, 2, 3])],
            changes: true,
            moves: true,
            chaos: Duration::from_secs(25),
            ..one_group
        },
        "skipped_sync" => planted(Planted::SkippedSync),
        "learners_count" => Scene {
            nodes: 5,
            ..planted(Planted::LearnersCount)
        },
        "early_ack" => planted(Planted::EarlyAck),
        other => panic!("there is no scene {other:?}"),
    }
}

#[test]
fn the_child_process() {
    run::child(scene);
}

/// The seeds of a scene: `SEED`, or the first `SEEDS`, or as many as usual.
fn seeds(usual: u64) -> Vec<u64> {
    if let Ok(seed) = std::env::var("SEED") {
        return vec![seed.parse().expect("SEED is a number")];
    }
    let count = std::env::var("SEEDS").map_or(usual, |n| n.parse().expect("SEEDS is a number"));
    (1..=count).collect()
}

fn end_of(trace: &str) -> String {
    let lines: Vec<&str> = trace.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

/// Runs the seeds, as many at a time as there are processors, and expects all to end well.
fn expect_good(scene: &'static str, seeds: &[u64]) {
    let begun = Instant::now();
    let (next, totals) = (AtomicUsize::new(0), Mutex::new([0; 5]));
    let at_a_time = std::thread::available_parallelism().map_or(1, |n| n.get());
    std::thread::scope(|threads| {
        for _ in 0..at_a_time {
            threads.spawn(|| {
                while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let ended = simulate(*seed, scene);
                    if std::env::var_os("DIGESTS").is_some() {
                        println!("{scene} {seed} {:016x}", trace::digest(&ended.trace));
                    }
                    if let Some(broken) = &ended.broken {
                        let repeats = match first_difference(&ended.trace, &simulate(*seed, scene).trace) {
                            None => "it repeats".to_owned(),
                            Some(at) => format!("another run of it differs from line {at} on"),
                        };
                        panic!(
                            "{scene}, seed {seed}: {broken}\n{repeats}; again: SEED={seed} cargo test --release --workspace --test \
                             simulation {scene}\nthe end of its trace:\n{}",
                            end_of(&ended.trace)
                        );
                    }
                    let all = [
                        ended.acked,
                        ended.seconds,
                        ended.delivered,
                        ended.adoptions,
                        ended.snapshots,
                    ];
                    (totals.lock().iter_mut().zip(all)).for_each(|(total, one)| *total += one);
                }
            });
        }
    });
    let [acked, seconds, delivered, adoptions, snapshots] = *totals.lock();
    println!(
        "{scene}: {} seeds in {:.1} s; {seconds} simulated seconds, {delivered} segments delivered, {acked} messages \
         acknowledged, {adoptions} shards moved, {snapshots} snapshots taken over",
        seeds.len(),
        begun.elapsed().as_secs_f64()
    );
}

/// The first line in which two traces differ.
fn first_difference(a: &str, b: &str) -> Option<usize> {
    let differ = a.lines().zip(b.lines()).position(|(a, b)| a != b);
    differ.or_else(|| (a != b).then(|| a.lines().count().min(b.lines().count())))
}

#[test]
fn one_group() {
    expect_good("one_group", &seeds(10));
}

#[test]
fn changing_groups() {
    expect_good("changing_groups", &seeds(10));
}

#[test]
fn moving_shards() {
    expect_good("moving_shards", &seeds(4));
}

#[test]
fn short_logs() {
    expect_good("short_logs", &seeds(4));
}

#[test]
fn moving_everything() {
    expect_good("moving_everything", &seeds(4));
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    for scene in ["one_group", "changing_groups", "moving_everything"] {
        for seed in seeds(1) {
            let (a, b) = (simulate(seed, scene), simulate(seed, scene));
            if let Some(at) = first_difference(&a.trace, &b.trace) {
                let around = |text: &str| {
                    text.lines()
                        .skip(at.saturating_sub(12))
                        .take(16)
                        .collect::<Vec<_>>()
                        .join("\n")
                };
                panic!(
                    "{scene}, seed {seed}: line {at} differs\n{}\n---\n{}",
                    around(&a.trace),
                    around(&b.trace)
                );
            }
            println!(
                "{scene}, seed {seed}: {} lines, twice the same",
                a.trace.lines().count()
            );
        }
    }
}

/// How many seeds it may take until a planted bug is caught.
const CAUGHT_WITHIN: u64 = 40;

fn expect_caught(scene: &'static str) {
    for seed in 1..=CAUGHT_WITHIN {
        if let Some(broken) = simulate(seed, scene).broken {
            println!("{scene} is caught by seed {seed}: {broken}");
            return;
        }
    }
    panic!("{scene} was not caught by {CAUGHT_WITHIN} seeds");
}

#[test]
fn a_skipped_sync_is_caught() {
    expect_caught("skipped_sync");
}

#[test]
fn learners_that_count_as_voters_are_caught() {
    expect_caught("learners_count");
}

#[test]
fn an_early_ack_is_caught() {
    expect_caught("early_ack");
}
