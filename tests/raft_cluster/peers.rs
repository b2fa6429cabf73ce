//! Peers that must not be let in, and peers that do not read.

use std::time::Duration;

use mainstem::model::NodeId;
use mainstem::raft::LogKeep;
use mainstem::raft::transport::PeerConfig;

use super::lab::*;
use super::net::Proxy;

const REQUESTS_BYTES: usize = 4 << 20;

fn impatient(config: &mut PeerConfig) {
    config.inflight_bytes_max = REQUESTS_BYTES;
    config.stream_bytes_max = 2 << 20;
    config.append_timeout = Duration::from_secs(2);
    config.handshake_timeout = Duration::from_secs(2);
    // Only the append timeout may help.
    config.keepalive_interval = Duration::from_secs(3_600);
    config.keepalive_timeout = Duration::from_secs(3_600);
}

/// Trap G: a peer that accepts and never reads. The group goes on, memory stays bounded, the leader's purge is not held
/// back for ever, and when the peer reads again it catches up.
#[tokio::test(flavor = "multi_thread")]
async fn trap_g_a_peer_that_stalls_is_timed_out_and_costs_bounded_memory() {
    let settings = Settings {
        keep: LogKeep {
            leader_bytes: 0,
            follower_bytes: 0,
        },
        tune: impatient,
        ..Settings::default()
    };
    let mut lab = Lab::new(3, settings).await;
    lab.found(GROUP, 3).await;
    lab.publish(GROUP, 0..5, 1_000).await;
    let leader = lab.leader(GROUP).await;
    let stalled = (leader + 1) % 3;
    let proxy = Proxy::new(lab.node(stalled).address.clone()).await;
    let stalled_id = lab.node(stalled).id;
    lab.node(leader).map.set_node(stalled_id, proxy.address.clone());
    let connected = || {
        let links = lab.node(leader).peers.links();
        links.iter().any(|l| l.node == stalled_id && l.up)
            && proxy.connections.load(std::sync::atomic::Ordering::Relaxed) > 0
    };
    until("connected through the proxy", connected).await;
    lab.publish(GROUP, 5..10, 1_000).await;
    proxy.stall(true);
    let before = lab.node(leader).group(GROUP).status().last_applied;
    let mut most = 0;
    for n in 10..200 {
        lab.publish(GROUP, n..n + 1, 100_000).await;
        for link in lab.node(leader).peers.links() {
            most = most.max(link.unanswered_bytes);
        }
    }
    println!("most bytes unanswered: {most}");
    assert!(
        most <= REQUESTS_BYTES + (1 << 20),
        "{most} bytes wait for a peer that does not read"
    );
    if lab.leader(GROUP).await == leader {
        lab.node(leader).flush().await;
        let group = lab.node(leader).group(GROUP);
        until("the leader purges in spite of the hung stream", || {
            !group.status().is_leader || group.report().purged > before
        })
        .await;
    }
    proxy.stall(false);
    lab.converge(GROUP).await;
    lab.holds(stalled, GROUP, 0..200);
    lab.end().await;
}

/// A peer that accepts connections and never answers is not waited for.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_never_answers_is_unreachable() {
    let settings = Settings {
        tune: impatient,
        ..Settings::default()
    };
    let mut lab = Lab::new(1, settings).await;
    lab.found(GROUP, 1).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let first = lab.node(0);
    first
        .map
        .set_node(NodeId::new(2), listener.local_addr().unwrap().to_string());
    first.map.set_replica(replica(GROUP, 2), NodeId::new(2));
    first.group(GROUP).add_learner(replica(GROUP, 2)).await.unwrap();
    until("the link is given up", || {
        let links = first.peers.links();
        links
            .iter()
            .any(|l| !l.up && l.reason.as_deref().is_some_and(|r| r != "connecting"))
    })
    .await;
    lab.publish(GROUP, 0..10, 100).await;
    lab.end().await;
    drop(listener);
}

async fn reason(lab: &Lab, at: usize, of: u64) -> String {
    let mut reason = String::new();
    until("the link says why", || {
        let links = lab.node(at).peers.links();
        let found = links.into_iter().find(|l| l.node == NodeId::new(of));
        reason = found.and_then(|l| l.reason).unwrap_or_default();
        reason.contains("token")
            || reason.contains("cluster")
            || reason.contains("incarnation")
            || reason.contains("store")
    })
    .await;
    reason
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_with_another_token_is_refused() {
    let mut lab = Lab::new(1, Settings::default()).await;
    lab.settings.tune = |config| config.token = b"another".to_vec();
    lab.add().await;
    lab.introduce();
    lab.found(GROUP, 1).await;
    let first = lab.node(0);
    first.map.set_replica(replica(GROUP, 2), NodeId::new(2));
    first.group(GROUP).add_learner(replica(GROUP, 2)).await.unwrap();
    let reason = reason(&lab, 0, 2).await;
    assert!(reason.contains("token"), "{reason}");
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_peer_of_another_cluster_is_refused() {
    let mut lab = Lab::new(1, Settings::default()).await;
    lab.settings.tune = |config| config.identity.cluster_id = "elsewhere".into();
    lab.add().await;
    lab.introduce();
    lab.found(GROUP, 1).await;
    let first = lab.node(0);
    first.group(GROUP).add_learner(replica(GROUP, 2)).await.unwrap();
    let reason = reason(&lab, 0, 2).await;
    assert!(reason.contains("cluster"), "{reason}");
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_emptied_disk_and_an_older_incarnation_are_refused() {
    let mut lab = Lab::new(2, Settings::default()).await;
    lab.found(GROUP, 2).await;
    lab.publish(GROUP, 0..3, 100).await;
    // A new process pretends to be an earlier start of the same store. Its own start has raised the number by one.
    lab.kill(1).await;
    lab.settings.tune = |config| config.identity.incarnation -= 2;
    lab.start(1).await;
    let refused = reason(&lab, 0, 2).await;
    assert!(refused.contains("incarnation"), "{refused}");
    lab.kill(1).await;
    // The same node id with another disk.
    lab.settings.tune = |config| config.identity.store_id ^= 1;
    lab.start(1).await;
    let mut refused = String::new();
    until("the other store is refused", || {
        let links = lab.node(0).peers.links();
        refused = links.into_iter().find_map(|l| l.reason).unwrap_or_default();
        refused.contains("store")
    })
    .await;
    assert!(refused.contains("emptied or replaced"), "{refused}");
    lab.kill(1).await;
    // The one that is right is let in again.
    lab.settings.tune = |_| {};
    lab.restart(1, GROUP).await;
    lab.publish(GROUP, 3..6, 100).await;
    lab.converge(GROUP).await;
    lab.end().await;
}
