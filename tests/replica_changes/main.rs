//! Replicas come, go and move while streams are published to and read: nothing that was acknowledged is lost, repeated or
//! reordered, publishers see latency and no errors, and readers at the tail go on in the same session.
#![allow(clippy::unwrap_used)]

mod flow;
#[path = "../harness/mod.rs"]
mod harness;

use std::collections::BTreeMap;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use flow::{Flow, Seen, client, publish};
use harness::{Cluster, Node, Options, PATIENCE, cli, until};
use mainstem::client::proto::{GetReportResponse, NodeState, ReplicaState, StreamSpec};
use mainstem::client::{Client, Target};
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;

fn command(node: &Node, line: &str) -> Command {
    cli(&node.client_addr(), node.place(), line)
}

/// Runs the command line beside everything else.
async fn run(node: &Node, line: &str) -> Output {
    let mut command = command(node, line);
    tokio::task::spawn_blocking(move || command.output().unwrap())
        .await
        .unwrap()
}

/// Runs a command that must work; gives what it said.
async fn well(node: &Node, line: &str) -> String {
    let begun = Instant::now();
    let out = run(node, line).await;
    let said = String::from_utf8(out.stderr).unwrap();
    assert!(out.status.success(), "{line}: {said}");
    println!("$ mainstem {line}   ({:.1} s)", begun.elapsed().as_secs_f64());
    said.lines().for_each(|line| println!("  {line}"));
    said
}

async fn create(client: &Client, name: &str, shards: u32, replicas: u32, dedicated: bool) {
    let spec = StreamSpec {
        name: name.into(),
        shards,
        replicas,
        dedicated,
        ..StreamSpec::default()
    };
    let begun = Instant::now();
    while let Err(e) = client.create_stream(spec.clone()).await {
        assert!(begun.elapsed() < PATIENCE && e.is_unavailable(), "{name}: {e}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whether each shard of the stream has so many voters, all current, on so many nodes.
fn has_replicas(report: &GetReportResponse, replicas: u32) -> bool {
    report.shards.iter().all(|shard| {
        let group = report.groups.iter().find(|g| g.group_id == shard.group_id).unwrap();
        let current = |r: &&mainstem::client::proto::ReplicaReport| r.voter && r.state() == ReplicaState::Current;
        let nodes: std::collections::BTreeSet<u64> = group.replicas.iter().filter(current).map(|r| r.node_id).collect();
        group.voters == replicas && group.learners == 0 && nodes.len() == replicas as usize && group.change.is_none()
    })
}

async fn edited(cluster: &Cluster, client: &Client, flow: &Flow, replicas: u32) {
    let said = well(
        &cluster[0],
        &format!("stream edit {} --replicas {replicas} --within 120s", flow.stream),
    )
    .await;
    assert!(said.contains("replicas are in place"), "{said}");
    let report = client.cluster_report(Some(&flow.stream), Vec::new()).await.unwrap();
    assert!(has_replicas(&report, replicas), "{report:#?}");
    flow.goes_on(50).await;
    println!(
        "  {} with {replicas} replicas; longest publish so far {:?}",
        flow.stream,
        flow.longest()
    );
}

/// One, three, five, one: of a stream that shares its groups with others, and of one that has its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_streams_replicas_are_changed_while_it_is_published_to() {
    let cluster = Cluster::start(5, Options::plain()).await;
    let client = client(&cluster);
    create(&client, "pooled", 2, 1, false).await;
    create(&client, "own", 1, 1, true).await;
    create(&client, "beside", 1, 1, false).await;
    let refused = run(&cluster[0], "stream edit own --replicas 6").await;
    let said = String::from_utf8(refused.stderr).unwrap();
    assert!(
        !refused.status.success() && said.contains("6 replicas need 6 nodes"),
        "{said}"
    );
    let flows = [
        Flow::start(&cluster, "pooled", 0),
        Flow::start(&cluster, "own", 1),
        Flow::start(&cluster, "beside", 2),
    ];
    for flow in &flows {
        flow.goes_on(50).await;
    }
    for replicas in [3, 5, 1] {
        tokio::join!(
            edited(&cluster, &client, &flows[0], replicas),
            edited(&cluster, &client, &flows[1], replicas),
        );
    }
    // It has groups of its own now, and its neighbour is where it was.
    let report = client.cluster_report(Some("pooled"), Vec::new()).await.unwrap();
    assert!(report.groups.iter().all(|g| !g.pooled && g.shards == 1), "{report:#?}");
    let report = client.cluster_report(Some("beside"), Vec::new()).await.unwrap();
    assert!(report.groups[0].pooled && report.groups[0].voters == 1, "{report:#?}");
    for flow in flows {
        flow.end(&cluster[3]).await;
    }
    // What the nodes have given up is gone from them: nothing is kept aside, nothing is under way.
    until("every removed replica is confirmed and the plan is empty", async || {
        let plan = client.plan().await.unwrap();
        plan.actions.is_empty()
    })
    .await;
    for node in &cluster.nodes {
        assert!(!node.has_logged(&["that no stream names"]), "{}", node.log());
    }
}

/// A shard leaves its group only while every replica is there to seal it. One that falls silent before is noticed, the move is
/// given up, and goes its way when the node is back; nobody who publishes waits for any of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_does_not_move_while_a_node_is_away() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    let client = client(&cluster);
    create(&client, "pooled", 1, 3, false).await;
    // Leaders of new groups are spread over the nodes first.
    let (mut leader, mut since) = (None, Instant::now());
    until("it has a leader, who stays", async || {
        let report = client.cluster_report(Some("pooled"), Vec::new()).await.unwrap();
        if std::mem::replace(&mut leader, report.groups[0].leader_node) != leader {
            since = Instant::now();
        }
        leader.is_some() && since.elapsed() > Duration::from_secs(2) && client.plan().await.unwrap().actions.is_empty()
    })
    .await;
    let led_by = leader.unwrap();
    // Who is connected to the silent node itself notices that later than those beside it.
    let flow = Flow::start_at(&cluster, "pooled", led_by as usize - 1);
    flow.goes_on(50).await;
    let silent = (0..3).rev().find(|i| *i as u64 + 1 != led_by).unwrap();
    let asked = (0..3).find(|i| *i != silent).unwrap();
    cluster.pause(silent);
    let out = run(&cluster[asked], "stream edit pooled --replicas 1 --within 1s").await;
    assert!(!out.status.success(), "a replica is silent");
    until("the move is given up", async || {
        cluster
            .nodes
            .iter()
            .any(|node| node.has_logged(&["the shard does not move"]))
    })
    .await;
    until("the plan tells what it waits for", async || {
        let plan = client.plan().await.unwrap();
        let blocked: Vec<_> = plan.actions.iter().map(|action| action.blocked_by.clone()).collect();
        blocked
            .iter()
            .any(|why| why.contains("while every replica of it is there"))
    })
    .await;
    flow.goes_on(50).await;
    let longest = flow.longest();
    assert!(longest < Duration::from_secs(3), "a publish took {longest:?}");
    cluster.resume(silent);
    let said = well(&cluster[asked], "stream edit pooled --replicas 1 --within 120s").await;
    assert!(said.contains("replicas are in place"), "{said}");
    flow.goes_on(50).await;
    flow.end(&cluster[asked]).await;
}

/// A node that gave a replica away may get one of the same group again, under another id.
#[tokio::test(flavor = "multi_thread")]
async fn a_shard_goes_to_another_node_and_back() {
    let cluster = Cluster::start(3, Options::plain()).await;
    let client = client(&cluster);
    create(&client, "there", 1, 1, true).await;
    let flow = Flow::start(&cluster, "there", 0);
    flow.goes_on(50).await;
    let place = async || {
        let report = client.cluster_report(Some("there"), Vec::new()).await.unwrap();
        let group = report.groups[0].clone();
        let replica = group
            .replicas
            .iter()
            .find(|r| r.voter)
            .map(|r| (r.node_name.clone(), r.replica_id));
        (replica.unwrap(), has_replicas(&report, 1))
    };
    let mut ids = Vec::new();
    let ((first, id), _) = place().await;
    ids.push(id);
    let mut at = first.clone();
    let names: Vec<String> = client.nodes(false).await.unwrap().into_iter().map(|n| n.name).collect();
    let other = names.iter().find(|name| **name != first).unwrap().clone();
    for to in [&other, &first, &other, &first] {
        let shard = Target::Shard {
            stream: "there".into(),
            index: 0,
        };
        let begun = Instant::now();
        // Right after a move the node may not have cleared out yet what it had.
        let moved = async || client.move_replica(shard.clone(), &at, to, false).await;
        until("the move has begun", async || match moved().await {
            Ok(_) => true,
            Err(e) => {
                assert_ne!(e.retry, mainstem::client::RetryClass::CannotWork, "{e}");
                false
            }
        })
        .await;
        let to = to.clone();
        until("the replica is there alone", async || {
            let ((name, _), alone) = place().await;
            alone && name == to
        })
        .await;
        flow.goes_on(20).await;
        println!(
            "{at} → {to} in {:?}, longest publish {:?}",
            begun.elapsed(),
            flow.longest()
        );
        let ((_, id), _) = place().await;
        assert!(!ids.contains(&id), "replica ids are not given twice: {ids:?}, {id}");
        ids.push(id);
        at = to;
    }
    flow.end(&cluster[1]).await;
}

/// A node is drained, removed, and its name taken by another one, which gets another id.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_drained_and_removed() {
    let mut cluster = Cluster::start(4, Options::plain()).await;
    let client = client(&cluster);
    create(&client, "pooled", 2, 3, false).await;
    create(&client, "own", 1, 3, true).await;
    create(&client, "single", 1, 1, true).await;
    let flows = [
        Flow::start(&cluster, "pooled", 0),
        Flow::start(&cluster, "own", 0),
        Flow::start(&cluster, "single", 0),
    ];
    for flow in &flows {
        flow.goes_on(50).await;
    }
    let said = String::from_utf8(run(&cluster[0], "node remove node-4 --yes").await.stderr).unwrap();
    assert!(said.contains("still holds"), "refused with numbers: {said}");
    let said = well(&cluster[0], "node drain node-4 --within 120s").await;
    assert!(said.contains("it is empty"), "{said}");
    for flow in &flows {
        flow.goes_on(50).await;
        println!("{}: longest publish {:?}", flow.stream, flow.longest());
    }
    let drained = client
        .nodes(false)
        .await
        .unwrap()
        .into_iter()
        .find(|n| n.name == "node-4")
        .unwrap();
    assert_eq!((drained.replicas, drained.leaders), (0, 0), "{drained:?}");
    // Of three nodes left, none can go without breaking a group of three.
    well(&cluster[0], "node remove node-4 --yes").await;
    cluster[3].term();
    cluster[3].wait_exit().await;
    let mut again = cluster.joiner(0);
    let at = again.options.flags.iter().position(|f| f == "--name").unwrap();
    again.options.flags[at + 1] = "node-4".into();
    again.launch();
    again.ready().await;
    cluster.nodes.push(again);
    let new = client
        .nodes(false)
        .await
        .unwrap()
        .into_iter()
        .find(|n| n.name == "node-4")
        .unwrap();
    assert!(new.node_id > drained.node_id, "{new:?}");
    let removed = client
        .nodes(true)
        .await
        .unwrap()
        .into_iter()
        .find(|n| n.node_id == drained.node_id)
        .unwrap();
    assert_eq!(removed.state(), NodeState::Removed);
    for flow in flows {
        flow.goes_on(20).await;
        flow.end(&cluster[1]).await;
    }
}

/// A node that is gone for longer than it may be is replaced, and what it held is made anew on another one.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_node_held_is_made_anew() {
    let mut cluster = Cluster::start(4, Options::plain().flag("--replace-after", "4s")).await;
    let client = client(&cluster);
    create(&client, "pooled", 2, 3, false).await;
    create(&client, "own", 1, 3, true).await;
    let flows = [Flow::start(&cluster, "pooled", 0), Flow::start(&cluster, "own", 0)];
    for flow in &flows {
        flow.goes_on(50).await;
    }
    let report = client.cluster_report(None, Vec::new()).await.unwrap();
    let held = report.groups.iter().filter(|g| g.voters == 3).flat_map(|g| &g.replicas);
    let mut count: BTreeMap<u64, u32> = BTreeMap::new();
    held.for_each(|r| *count.entry(r.node_id).or_default() += 1);
    // Not the one that the readers are at.
    let lost = *count
        .iter()
        .filter(|(id, _)| **id > 1)
        .max_by_key(|(_, n)| **n)
        .unwrap()
        .0;
    let begun = Instant::now();
    cluster[lost as usize - 1].kill9().await;
    until("every group has three replicas on nodes that are there", async || {
        let Ok(report) = client.cluster_report(None, Vec::new()).await else {
            return false;
        };
        report
            .groups
            .iter()
            .filter(|g| g.replicas_wanted == 3 && g.shards > 0)
            .all(|g| {
                let current =
                    |r: &&mainstem::client::proto::ReplicaReport| r.voter && r.state() == ReplicaState::Current;
                g.voters == 3 && g.change.is_none() && g.replicas.iter().filter(current).count() == 3
            })
    })
    .await;
    println!(
        "n{lost} held {} replicas of three; all are made anew after {:?}",
        count[&lost],
        begun.elapsed()
    );
    for flow in &flows {
        flow.goes_on(50).await;
        println!("{}: longest publish {:?}", flow.stream, flow.longest());
    }
    // It comes back with what it had, which nobody wants any more.
    cluster[lost as usize - 1].restart().await;
    until("what it has left is removed", async || {
        cluster[lost as usize - 1].has_logged(&["what a removed replica had left here is removed"])
    })
    .await;
    for flow in flows {
        flow.end(&cluster[0]).await;
    }
}

/// Each node in turn is stopped and started again, and nobody waits longer than a second.
#[tokio::test(flavor = "multi_thread")]
async fn a_rolling_restart_is_hardly_noticed() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    let client = client(&cluster);
    create(&client, "pooled", 3, 3, false).await;
    create(&client, "own", 1, 3, true).await;
    let publish_only = |stream: &str| {
        let (stop, seen) = (CancellationToken::new(), Arc::new(Mutex::new(Seen::default())));
        let task = tokio::spawn(publish(client.clone(), stream.into(), stop.clone(), seen.clone()));
        (stop, seen, task)
    };
    let flows = [publish_only("pooled"), publish_only("own")];
    let goes_on = async || {
        for (_, seen, _) in &flows {
            let before = seen.lock().acked.len();
            until("publishing goes on", async || {
                assert!(seen.lock().failures.is_empty(), "{:#?}", seen.lock().failures);
                seen.lock().acked.len() > before + 100
            })
            .await;
        }
    };
    goes_on().await;
    let mut longest = Duration::ZERO;
    for at in 0..3 {
        for (_, seen, _) in &flows {
            seen.lock().longest = Duration::ZERO;
        }
        // It comes back where clients know it.
        let client_addr = cluster[at].client_addr();
        cluster[at].set_client_listen(&client_addr);
        let begun = Instant::now();
        cluster[at].term();
        assert!(cluster[at].wait_exit().await.success());
        let stopped = begun.elapsed();
        goes_on().await;
        cluster[at].restart().await;
        until("all replicas are current again", async || {
            let Ok(report) = client.cluster_report(None, Vec::new()).await else {
                return false;
            };
            report.problems.is_empty() && report.groups.iter().all(|g| !g.under_replicated && !g.leaderless)
        })
        .await;
        goes_on().await;
        let stall = flows.iter().map(|(_, seen, _)| seen.lock().longest).max().unwrap();
        println!("node {at}: stopped in {stopped:?}, longest publish meanwhile {stall:?}");
        longest = longest.max(stall);
    }
    println!("longest publish of the rolling restart: {longest:?}");
    for ((stop, seen, task), stream) in flows.into_iter().zip(["pooled", "own"]) {
        stop.cancel();
        tokio::time::timeout(PATIENCE, task)
            .await
            .expect("the publisher ends")
            .unwrap();
        let stored = cluster[0].api().await.read_all(stream).await.unwrap();
        let seen = seen.lock();
        assert!(seen.failures.is_empty(), "{:#?}", seen.failures);
        let mut found = BTreeMap::new();
        for m in &stored {
            let text = String::from_utf8(m.record.payload.clone()).unwrap();
            let n: u64 = text.strip_prefix("message ").unwrap().parse().unwrap();
            assert!(
                found.insert(n, (m.shard, m.sequence)).is_none(),
                "{text} is there twice"
            );
        }
        assert_eq!(found, seen.acked);
    }
    assert!(longest < Duration::from_secs(1), "{longest:?}");
}
