//! How long it takes to build a replica from scratch, and what it costs the publishers beside it. Not a test of a bar:
//! run by hand, `cargo test --release --workspace --test raft_cluster -- --ignored --nocapture rebuild`.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mainstem::raft::Origin;

use super::lab::*;

const MIB: f64 = 1_048_576.0;
/// Of one batch.
const BATCH_BYTES: usize = 64 << 10;
const UNDER_WAY: usize = 64;

/// Bytes to be there, from the environment in MiB.
fn total_bytes() -> u64 {
    let mib = std::env::var("REBUILD_MIB").map_or(1_024, |text| text.parse().unwrap());
    mib << 20
}

/// Publishes batches, many at a time, from `from` until `go` says no; gives the number after the last.
async fn flood(lab: &Lab, from: u64, done: &AtomicU64, go: impl Fn(u64) -> bool) -> u64 {
    let leader = lab.leader(GROUP).await;
    let group = lab.node(leader).group(GROUP);
    let mut waiting = std::collections::VecDeque::new();
    let mut n = from;
    loop {
        while waiting.len() < UNDER_WAY && go(n) {
            waiting.push_back(group.propose(publish(SHARD_OF(GROUP), n, BATCH_BYTES)).await.unwrap());
            n += 1;
        }
        match waiting.pop_front() {
            Some(mut pending) => drop(pending.wait().await.unwrap()),
            None => return n,
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
}

/// Adds a fourth replica on a new node and waits until it has caught up; tells the seconds that took.
async fn rebuild(lab: &mut Lab) -> f64 {
    let new = lab.add().await;
    let fourth = replica(GROUP, new as u64 + 1);
    lab.node(new)
        .groups
        .start_as(GROUP, fourth, Origin::Join)
        .await
        .unwrap();
    let leader = lab.leader(GROUP).await;
    let group = lab.node(leader).group(GROUP);
    let begun = std::time::Instant::now();
    group.add_learner(fourth).await.unwrap();
    group.wait_caught_up(fourth, PATIENCE).await.unwrap();
    begun.elapsed().as_secs_f64()
}

async fn filled(tune: fn(&mut mainstem::raft::transport::PeerConfig)) -> (Lab, u64) {
    let mut settings = super::snapshots::forgetful();
    settings.tune = tune;
    let mut lab = Lab::new(3, settings).await;
    lab.found(GROUP, 3).await;
    let count = total_bytes() / BATCH_BYTES as u64;
    let next = flood(&lab, 0, &AtomicU64::new(0), |n| n < count).await;
    super::snapshots::purge(&lab).await;
    (lab, next)
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn rebuild_idle() {
    let (mut lab, _) = filled(|config| config.snapshot_bytes_per_second = 0).await;
    let seconds = rebuild(&mut lab).await;
    println!(
        "rebuilt {:.0} MiB in {seconds:.2} s: {:.0} MiB/s",
        total_bytes() as f64 / MIB,
        total_bytes() as f64 / MIB / seconds
    );
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a measurement"]
async fn rebuild_under_load() {
    let (mut lab, next) = filled(|_| {}).await;
    let done = AtomicU64::new(0);
    let go = AtomicBool::new(true);
    let rate = async |lab: &Lab, from: u64, seconds: u64| {
        let before = done.load(Ordering::Relaxed);
        let begun = std::time::Instant::now();
        let next = flood(lab, from, &done, |_| begun.elapsed().as_secs() < seconds).await;
        let rate = (done.load(Ordering::Relaxed) - before) as f64 / begun.elapsed().as_secs_f64();
        (next, rate)
    };
    let (next, alone) = rate(&lab, next, 5).await;
    super::snapshots::purge(&lab).await;
    // The fourth is made here, so that the publishers' borrow and this one do not meet.
    let new = lab.add().await;
    let fourth = replica(GROUP, new as u64 + 1);
    let started = lab.node(new).groups.start_as(GROUP, fourth, Origin::Join).await;
    started.unwrap();
    let leader = lab.leader(GROUP).await;
    let group = lab.node(leader).group(GROUP);
    let begun = std::time::Instant::now();
    let before = done.load(Ordering::Relaxed);
    let load = flood(&lab, next, &done, |_| go.load(Ordering::Relaxed));
    let transfer = async {
        group.add_learner(fourth).await.unwrap();
        until("a transfer runs", || !lab.node(leader).peers.transfers().is_empty()).await;
        until("it has ended", || lab.node(leader).peers.transfers().is_empty()).await;
        let seconds = begun.elapsed().as_secs_f64();
        let beside = (done.load(Ordering::Relaxed) - before) as f64 / seconds;
        go.store(false, Ordering::Relaxed);
        (seconds, beside)
    };
    let (_, (seconds, beside)) = tokio::join!(load, transfer);
    let mib = BATCH_BYTES as f64 / MIB;
    println!(
        "under load: {seconds:.2} s; published {:.0} MiB/s alone, {:.0} MiB/s beside it: {:.0} % lost",
        alone * mib,
        beside * mib,
        (1.0 - beside / alone) * 100.0
    );
    lab.end().await;
}
