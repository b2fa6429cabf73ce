//! A replica that the log cannot catch up any more gets the state itself.

use std::time::Duration;

use mainstem::raft::{LogKeep, Origin};

use super::lab::*;

/// Keeps nothing for those who are behind.
fn forgetful() -> Settings {
    Settings {
        keep: LogKeep {
            leader_bytes: 0,
            follower_bytes: 0,
        },
        ..Settings::default()
    }
}

/// Flushes and waits until every running replica has purged its log up to about now.
async fn purge(lab: &Lab) {
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

/// A sender that dies in the middle: what was received so far is gone, and another one sends it all.
#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_that_breaks_off_leaves_nothing() {
    let mut settings = forgetful();
    settings.tune = |config| config.snapshot_bytes_per_second = 2 << 20;
    let mut lab = Lab::new(3, settings).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..5, 1_000).await;
    lab.converge(GROUP).await;
    let behind = (lab.leader(GROUP).await + 1) % 3;
    lab.kill(behind).await;
    lab.publish(GROUP, 5..105, 60_000).await;
    purge(&lab).await;
    lab.restart(behind, GROUP).await;
    let leader = lab.leader(GROUP).await;
    until("a transfer runs", || {
        lab.node(leader).peers.transfers().iter().any(|t| t.bytes > 600_000)
    })
    .await;
    lab.kill(leader).await;
    tokio::time::timeout(PATIENCE, lab.converge(GROUP)).await.unwrap();
    lab.holds(behind, GROUP, 0..105);
    lab.restart(leader, GROUP).await;
    lab.converge(GROUP).await;
    let incoming = lab.node(behind).store.options().dir.join("incoming");
    until("what was received is removed", || {
        std::fs::read_dir(&incoming).map_or(0, Iterator::count) == 0
    })
    .await;
    tokio::time::timeout(Duration::from_secs(60), lab.end()).await.unwrap();
}
