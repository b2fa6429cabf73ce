//! A replica that the log cannot catch up any more gets the state itself.

use std::time::Duration;

use mainstem::raft::transport::{PeerConfig, SnapshotPhase, SnapshotProgress, SnapshotWay};
use mainstem::raft::{LogKeep, Origin};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use super::lab::*;

/// Keeps nothing for those who are behind.
pub fn forgetful() -> Settings {
    Settings {
        keep: LogKeep {
            leader_bytes: 0,
            follower_bytes: 0,
        },
        ..Settings::default()
    }
}

/// Flushes and waits until every running replica has purged its log up to about now.
pub async fn purge(lab: &Lab) {
    let leader = lab.leader(GROUP).await;
    let goal = lab.node(leader).group(GROUP).status().last_applied;
    for node in lab.running().filter(|n| n.groups.get(GROUP).is_some()) {
        let group = node.group(GROUP);
        until("applied", || group.status().last_applied >= goal).await;
        node.flush().await;
        until("the log is purged", || group.report().purged >= goal).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_behind_the_purged_log_gets_a_snapshot() {
    let mut lab = Lab::new(3, forgetful()).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..30, 1_000).await;
    lab.converge(GROUP).await;
    let behind = (lab.leader(GROUP).await + 1) % 3;
    lab.kill(behind).await;
    lab.publish(GROUP, 30..120, 3_000).await;
    // Trimmed on the others only: what the replica that is behind still has must go.
    lab.propose(GROUP, purge_before(SHARD_OF(GROUP), 21)).await;
    purge(&lab).await;
    lab.publish(GROUP, 120..130, 1_000).await;

    lab.restart(behind, GROUP).await;
    lab.converge(GROUP).await;
    lab.holds(behind, GROUP, 20..130);
    let group = lab.node(behind).group(GROUP);
    assert!(group.report().purged.is_some(), "its log begins behind the snapshot");
    drop(group);
    // What was installed survives a crash of the replica, and so does what was applied on top of it.
    lab.publish(GROUP, 130..140, 1_000).await;
    lab.converge(GROUP).await;
    lab.kill(behind).await;
    lab.publish(GROUP, 140..150, 1_000).await;
    lab.restart(behind, GROUP).await;
    lab.converge(GROUP).await;
    lab.holds(behind, GROUP, 20..150);
    // And it can lead.
    let leader = lab.leader(GROUP).await;
    if leader != behind {
        let to = replica(GROUP, behind as u64 + 1);
        lab.node(leader)
            .group(GROUP)
            .transfer_leader(to, PATIENCE)
            .await
            .unwrap();
    }
    lab.publish(GROUP, 150..160, 1_000).await;
    lab.converge(GROUP).await;
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_replica_begins_with_a_snapshot() {
    let mut lab = Lab::new(3, forgetful()).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..50, 20_000).await;
    purge(&lab).await;
    let new = lab.add().await;
    let fourth = replica(GROUP, 4);
    lab.node(new)
        .groups
        .start_as(GROUP, fourth, Origin::Join)
        .await
        .unwrap();
    let leader = lab.leader(GROUP).await;
    let group = lab.node(leader).group(GROUP);
    group.add_learner(fourth).await.unwrap();
    group.wait_caught_up(fourth, PATIENCE).await.unwrap();
    lab.converge(GROUP).await;
    lab.holds(new, GROUP, 0..50);
    drop(group);
    lab.end().await;
}

/// Trap F: while a snapshot travels, the leader goes on, flushes and would purge; the replica must be able to follow from
/// the snapshot by the log, or it would need the next one for ever.
#[tokio::test(flavor = "multi_thread")]
async fn trap_f_the_log_is_kept_while_a_snapshot_travels() {
    let mut settings = forgetful();
    settings.tune = |config| config.snapshot_bytes_per_second = 1 << 20;
    let mut lab = Lab::new(3, settings).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..5, 1_000).await;
    lab.converge(GROUP).await;
    let behind = (lab.leader(GROUP).await + 1) % 3;
    lab.kill(behind).await;
    lab.publish(GROUP, 5..65, 50_000).await;
    purge(&lab).await;
    lab.restart(behind, GROUP).await;
    let leader = lab.leader(GROUP).await;
    until("a transfer runs", || {
        lab.running().any(|n| n.peers.transfers().iter().any(|t| t.bytes > 0))
    })
    .await;
    let purged = lab.node(leader).group(GROUP).report().purged;
    for n in 0..5 {
        lab.publish(GROUP, 65 + n * 2..67 + n * 2, 1_000).await;
        lab.node(leader).flush().await;
    }
    let running = lab.node(leader).peers.transfers();
    if !running.is_empty() {
        let now = lab.node(leader).group(GROUP).report().purged;
        assert_eq!(now, purged, "purged under a snapshot that travels: {running:?}");
    }
    lab.converge(GROUP).await;
    lab.holds(behind, GROUP, 0..75);
    lab.end().await;
}

/// A lab in which one replica has missed `missed` messages of 60 kB that the logs of the others have no more.
async fn fallen_behind(bytes_per_second: fn(&mut PeerConfig), had: u64, missed: u64) -> (Lab, usize) {
    let mut settings = forgetful();
    settings.tune = bytes_per_second;
    let mut lab = Lab::new(3, settings).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..had, 60_000).await;
    lab.converge(GROUP).await;
    let behind = (lab.leader(GROUP).await + 1) % 3;
    lab.node(behind).flush().await;
    lab.kill(behind).await;
    lab.publish(GROUP, had..had + missed, 60_000).await;
    purge(&lab).await;
    (lab, behind)
}

fn slow(config: &mut PeerConfig) {
    config.snapshot_bytes_per_second = 2 << 20;
}

/// The snapshot that a node receives, if one is under way.
fn received(lab: &Lab, at: usize) -> Option<SnapshotProgress> {
    let all = lab.node(at).groups.snapshots();
    all.into_iter().find(|s| s.way == SnapshotWay::Received)
}

async fn incoming_is_empty(lab: &Lab, at: usize) {
    let incoming = lab.node(at).store.options().dir.join("incoming");
    until("what was received is removed", || {
        std::fs::read_dir(&incoming).map_or(0, Iterator::count) == 0
    })
    .await;
}

/// A sender that dies in the middle: another one goes on where it was.
#[tokio::test(flavor = "multi_thread")]
async fn another_sender_goes_on_where_one_broke_off() {
    let (mut lab, behind) = fallen_behind(slow, 1, 120).await;
    lab.restart(behind, GROUP).await;
    let leader = lab.leader(GROUP).await;
    until("half of it is there", || {
        received(&lab, behind).is_some_and(|s| s.bytes > 3_500_000)
    })
    .await;
    lab.kill(leader).await;
    let mut seen = None;
    until("it goes on", || {
        seen = received(&lab, behind).filter(|s| s.phase > SnapshotPhase::Comparing && s.reused_bytes > 0);
        seen.is_some()
    })
    .await;
    let seen = seen.unwrap();
    // What was on its way, and what differs between two leaders' terms, comes again.
    assert!(seen.reused_bytes > 2_000_000, "{seen:?}");
    assert!(
        seen.total_bytes < 5_500_000 && seen.left_bytes() <= seen.total_bytes,
        "{seen:?}"
    );
    tokio::time::timeout(PATIENCE, lab.converge(GROUP)).await.unwrap();
    lab.holds(behind, GROUP, 0..121);
    incoming_is_empty(&lab, behind).await;
    lab.restart(leader, GROUP).await;
    lab.converge(GROUP).await;
    tokio::time::timeout(Duration::from_secs(60), lab.end()).await.unwrap();
}

/// The same after the receiver was restarted.
#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_was_restarted_goes_on_where_it_was() {
    let (mut lab, behind) = fallen_behind(slow, 1, 120).await;
    lab.restart(behind, GROUP).await;
    until("half of it is there", || {
        received(&lab, behind).is_some_and(|s| s.bytes > 3_500_000)
    })
    .await;
    lab.kill(behind).await;
    lab.publish(GROUP, 121..123, 60_000).await;
    lab.restart(behind, GROUP).await;
    until("it goes on", || {
        received(&lab, behind).is_some_and(|s| s.phase > SnapshotPhase::Comparing && s.reused_bytes > 2_000_000)
    })
    .await;
    tokio::time::timeout(PATIENCE, lab.converge(GROUP)).await.unwrap();
    lab.holds(behind, GROUP, 0..123);
    incoming_is_empty(&lab, behind).await;
    lab.end().await;
}

/// A replica that has most of it already: batches that it has stay where they are.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_a_little_behind_gets_what_differs() {
    let (mut lab, behind) = fallen_behind(slow, 120, 8).await;
    // Also below its tail: the first ones go, one in the middle is removed.
    lab.propose(GROUP, purge_before(SHARD_OF(GROUP), 15)).await;
    purge(&lab).await;
    lab.restart(behind, GROUP).await;
    let mut seen = None;
    until("it is compared", || {
        seen = received(&lab, behind).filter(|s| s.phase > SnapshotPhase::Comparing);
        seen.is_some()
    })
    .await;
    let seen = seen.unwrap();
    assert!(seen.reused_bytes > 4_000_000, "{seen:?}");
    assert!(seen.total_bytes < 2_500_000, "{seen:?}");
    lab.converge(GROUP).await;
    lab.holds(behind, GROUP, 14..128);
    // What stayed is as durable as what came.
    lab.kill(behind).await;
    lab.restart(behind, GROUP).await;
    lab.converge(GROUP).await;
    lab.holds(behind, GROUP, 14..128);
    lab.end().await;
}

/// Either side, or both, end anywhere between the first word and the switch; messages are published all the while.
#[tokio::test(flavor = "multi_thread")]
async fn either_side_may_end_at_any_moment() {
    let seed = std::env::var("SNAPSHOT_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("seed {seed} (SNAPSHOT_SEED={seed} does it again)");
    let mut rng = StdRng::seed_from_u64(seed);
    let fast = |config: &mut PeerConfig| config.snapshot_bytes_per_second = 16 << 20;
    let (mut lab, behind) = fallen_behind(fast, 20, 100).await;
    let mut next = 120;
    lab.restart(behind, GROUP).await;
    for _ in 0..8 {
        let after = Duration::from_millis(rng.random_range(0..900));
        let begun = std::time::Instant::now();
        // A moment counted from the first word, or from the last: then it may be the switch.
        if rng.random_bool(0.5) {
            until("it is received, or it is done", || {
                received(&lab, behind).is_some() || begun.elapsed() > Duration::from_secs(2)
            })
            .await;
            tokio::time::timeout(after, lab.publish(GROUP, next..next + 1, 60_000))
                .await
                .ok();
        } else {
            until("it is installed, or it is done", || {
                received(&lab, behind).is_some_and(|s| s.phase == SnapshotPhase::Installing)
                    || begun.elapsed() > Duration::from_secs(2)
            })
            .await;
        }
        let leader = lab.leader(GROUP).await;
        let ends = if rng.random_bool(0.5) || leader == behind {
            behind
        } else {
            leader
        };
        lab.kill(ends).await;
        next += 1;
        // Two of three are there: it may have been stored before, or is now; once more does no harm.
        lab.publish(GROUP, next..next + 3, 60_000).await;
        next += 3;
        if ends != behind && rng.random_bool(0.5) {
            purge(&lab).await;
        }
        lab.restart(ends, GROUP).await;
    }
    tokio::time::timeout(PATIENCE, lab.converge(GROUP)).await.unwrap();
    lab.holds(behind, GROUP, 0..120);
    lab.holds(behind, GROUP, next - 3..next);
    // The log may have caught it up after a part was received: that goes when it was not needed for a while.
    lab.node(behind).store.state().sweep_incoming(Duration::ZERO);
    incoming_is_empty(&lab, behind).await;
    lab.end().await;
}

/// A file that is damaged after it was received is found before the switch, and only what is in it comes again.
#[tokio::test(flavor = "multi_thread")]
async fn damage_in_incoming_is_found_and_made_good() {
    let (mut lab, behind) = fallen_behind(slow, 1, 120).await;
    lab.restart(behind, GROUP).await;
    until("a part of it is there", || {
        received(&lab, behind).is_some_and(|s| s.bytes > 2_000_000)
    })
    .await;
    let total = received(&lab, behind).unwrap().total_bytes;
    let dir = lab
        .node(behind)
        .store
        .options()
        .dir
        .join("incoming")
        .join(GROUP.to_string());
    let mut notes = std::fs::read_dir(&dir).unwrap().map(|file| file.unwrap().path());
    let note = notes.find(|path| path.extension().is_some_and(|e| e == "toc")).unwrap();
    let file = note.with_extension("");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(&file, bytes).unwrap();
    let mut most = 0;
    until("it is installed", || {
        let now = received(&lab, behind);
        most = most.max(now.as_ref().map_or(0, |s| s.bytes));
        now.is_none()
    })
    .await;
    assert!(most < total + 1_500_000, "{most} bytes came of {total}: too much again");
    lab.converge(GROUP).await;
    lab.holds(behind, GROUP, 0..121);
    incoming_is_empty(&lab, behind).await;
    lab.end().await;
}
