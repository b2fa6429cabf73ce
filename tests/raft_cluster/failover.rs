//! Leaders come and go, replicas stop and come back; nothing that was acknowledged is lost, and all hold the same.

use std::time::{Duration, Instant};

use mainstem::raft::{GroupEvent, RaftTimings};

use super::lab::*;
use super::net::Proxy;

#[tokio::test(flavor = "multi_thread")]
async fn three_replicas_apply_the_same_and_outlive_their_leader() {
    let mut lab = Lab::new(3, Settings::default()).await;
    lab.found(GROUP, 3).await;
    let mut events = lab.node(0).groups.events();
    lab.publish(GROUP, 0..60, 500).await;
    lab.propose(GROUP, purge_before(SHARD_OF(GROUP), 6)).await;
    let export = lab.converge(GROUP).await;
    assert!(export.len() > 30_000);

    let first = lab.leader(GROUP).await;
    lab.kill(first).await;
    lab.publish(GROUP, 60..80, 500).await;
    let second = lab.leader(GROUP).await;
    assert_ne!(second, first);

    lab.restart(first, GROUP).await;
    lab.publish(GROUP, 80..90, 500).await;
    lab.converge(GROUP).await;
    for at in 0..3 {
        lab.holds(at, GROUP, 5..90);
    }
    if first != 0 {
        let mut seen = Vec::new();
        while let Ok(event) = events.try_recv() {
            seen.push(event);
        }
        let told = seen.iter().any(
            |e| matches!(e, GroupEvent::Leader { leader: Some(l), .. } if *l == replica(GROUP, second as u64 + 1)),
        );
        assert!(told, "nobody was told of the new leader: {seen:?}");
    }
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_is_acknowledged_and_nothing_is_lost() {
    let mut lab = Lab::new(3, Settings::default()).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..10, 100).await;
    lab.converge(GROUP).await;
    let leader = lab.leader(GROUP).await;
    let others: Vec<usize> = (0..3).filter(|at| *at != leader).collect();
    for at in &others {
        lab.kill(*at).await;
    }
    let group = lab.node(leader).group(GROUP);
    let alone = tokio::time::timeout(
        Duration::from_secs(3),
        propose_once(&group, publish(SHARD_OF(GROUP), 10, 100)),
    );
    assert!(!matches!(alone.await, Ok(Ok(_))), "acknowledged by one of three");
    assert!(group.read_barrier().await.is_err());
    drop(group);
    lab.restart(others[0], GROUP).await;
    lab.publish(GROUP, 11..20, 100).await;
    lab.restart(others[1], GROUP).await;
    lab.converge(GROUP).await;
    for at in 0..3 {
        lab.holds(at, GROUP, 0..10);
        lab.holds(at, GROUP, 11..20);
    }
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn all_replicas_stop_at_once_and_come_back() {
    let mut lab = Lab::new(3, Settings::default()).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..30, 1_000).await;
    for at in 0..3 {
        lab.kill(at).await;
    }
    for at in 0..3 {
        lab.restart(at, GROUP).await;
    }
    lab.publish(GROUP, 30..40, 1_000).await;
    lab.converge(GROUP).await;
    for at in 0..3 {
        lab.holds(at, GROUP, 0..40);
    }
    lab.end().await;
}

/// With the timings that are shipped: how long a group is without a leader. Printed; the bound is for broken ones only.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_leader_is_replaced_soon() {
    let settings = Settings {
        timings: RaftTimings::default(),
        ..Settings::default()
    };
    let mut lab = Lab::new(3, settings).await;
    lab.found(GROUP, 3).await;
    let mut taken = Vec::new();
    for round in 0..5 {
        lab.publish(GROUP, round * 10..round * 10 + 10, 200).await;
        lab.converge(GROUP).await;
        let leader = lab.leader(GROUP).await;
        let node = lab.nodes[leader].take().unwrap();
        let begun = Instant::now();
        // The session ends first, as with a process that is killed.
        let killing = tokio::spawn(node.kill());
        lab.publish(GROUP, 1_000 + round..1_001 + round, 200).await;
        taken.push(begun.elapsed());
        killing.await.unwrap();
        lab.restart(leader, GROUP).await;
    }
    taken.sort();
    println!("from a leader's death to the next acknowledged publish: {taken:?}");
    assert!(taken[2] < Duration::from_secs(20), "{taken:?}");
    lab.end().await;
}

/// A follower that finds its leader's address dead gives up the leader's lease and asks for votes. While the others hear
/// the leader nobody votes for it, and nothing changes.
#[tokio::test(flavor = "multi_thread")]
async fn one_broken_link_deposes_nobody() {
    let mut lab = Lab::new(3, Settings::default()).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..5, 100).await;
    let leader = lab.leader(GROUP).await;
    let follower = (leader + 1) % 3;
    let proxy = Proxy::new(lab.node(leader).address.clone()).await;
    let to = lab.node(leader).id;
    let before = lab.node(leader).group(GROUP).status();
    lab.node(follower).map.set_node(to, proxy.address.clone());
    let link = |lab: &Lab| lab.node(follower).peers.links().into_iter().find(|l| l.node == to);
    until("the follower reaches its leader through the proxy", || {
        proxy.connections.load(std::sync::atomic::Ordering::Relaxed) > 0 && link(&lab).is_some_and(|link| link.up)
    })
    .await;
    proxy.go();
    until("the follower finds nobody there", || {
        link(&lab).is_some_and(|link| link.reason.is_some_and(|reason| reason.contains("refused")))
    })
    .await;
    // Longer than the follower tries.
    let begun = Instant::now();
    let mut next = 5;
    while begun.elapsed() < Duration::from_secs(2) {
        lab.publish(GROUP, next..next + 1, 100).await;
        next += 1;
    }
    for node in lab.running() {
        let now = node.group(GROUP).status();
        assert_eq!((now.term, now.leader), (before.term, before.leader), "node {}", node.id);
    }
    lab.converge(GROUP).await;
    lab.end().await;
}
