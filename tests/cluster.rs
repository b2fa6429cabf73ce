//! The cluster as its operators see it, by the API and by the command line. A cluster of one has everything that a
//! larger one has, except others.
#![allow(clippy::unwrap_used)]

mod harness;

use std::process::Output;

use harness::{Node, Options, cli};
use mainstem::client::proto::{self, ProblemKind, ReplicaState, StreamSpec};
use mainstem::client::{Client, ClientError, Target};

async fn client(node: &Node) -> Client {
    Client::connect(&node.client_addr()).await.unwrap()
}

fn spec(name: &str, shards: u32) -> StreamSpec {
    StreamSpec {
        name: name.into(),
        shards,
        ..StreamSpec::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_node_is_a_cluster() {
    let node = Node::start(Options::plain()).await;
    let client = client(&node).await;
    let cluster = client.cluster().await.unwrap();
    let info = client.server_info().await.unwrap();
    assert_eq!((cluster.cluster_id, cluster.name), (info.cluster_id, info.cluster));
    assert_eq!((cluster.nodes, cluster.live_nodes), (1, 1));
    let meta = cluster.meta.unwrap();
    assert_eq!((meta.group_id, meta.leader_node), (1, Some(info.node_id)));
    assert_eq!((meta.voters, meta.quorum_have, meta.quorum_need), (1, 1, 1));
    assert!(meta.term > 0 && meta.leader_since_us.is_some(), "{meta:?}");

    let nodes = client.nodes(true).await.unwrap();
    assert_eq!(nodes.len(), 1);
    assert!(
        nodes[0].live && nodes[0].state() == proto::NodeState::Active,
        "{nodes:?}"
    );
    assert_eq!(
        (nodes[0].name.as_str(), nodes[0].meta_role.as_str()),
        (info.node_name.as_str(), "leader")
    );
    assert_eq!(
        nodes[0].replicas, nodes[0].leaders,
        "it leads every group it has: {nodes:?}"
    );
    assert!(nodes[0].leaders > 0 && nodes[0].free_bytes.unwrap() > 0, "{nodes:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_tells_every_shard() {
    let node = Node::start(Options::plain()).await;
    let client = client(&node).await;
    client.create_stream(spec("ORDERS", 3)).await.unwrap();
    client.create_stream(spec("a", 1)).await.unwrap();
    for i in 0..5 {
        let message = mainstem::client::Message::new("a.b", format!("{i}"));
        client.publish("a", vec![message], None).await.unwrap();
    }
    let report = client.cluster_report(None, Vec::new()).await.unwrap();
    let names: Vec<_> = report.shards.iter().map(|s| (s.stream.as_str(), s.index)).collect();
    assert_eq!(names, [("ORDERS", 0), ("ORDERS", 1), ("ORDERS", 2), ("a", 0)]);
    let a = &report.shards[3];
    assert_eq!((a.tail, a.messages, a.floor), (Some(6), Some(5), Some(1)));
    assert!(!a.leaderless && !a.under_replicated && a.leader_node.is_some(), "{a:?}");
    let summary = report.summary.unwrap();
    assert_eq!((summary.shards, summary.leaderless_shards), (4, 0));
    assert_eq!((summary.nodes, summary.live_nodes, summary.no_quorum_groups), (1, 1, 0));
    assert!(report.problems.is_empty(), "{:?}", report.problems);
    for shard in &report.shards {
        let group = report.groups.iter().find(|g| g.group_id == shard.group_id).unwrap();
        assert_eq!((group.quorum_have, group.quorum_need, group.voters), (1, 1, 1));
        assert_eq!(group.replicas.len(), 1);
        let replica = &group.replicas[0];
        assert!(replica.leader && replica.voter && replica.state() == ReplicaState::Current);
        assert_eq!(replica.lag_entries, Some(0));
    }

    // One stream, and some of its shards.
    let report = client.cluster_report(Some("ORDERS"), vec![1]).await.unwrap();
    assert_eq!(report.shards.len(), 1);
    assert_eq!(report.groups.len(), 1);
    assert_eq!(report.summary.unwrap().shards, 1);
    let error = client.cluster_report(Some("ORDERS"), vec![3]).await.unwrap_err();
    assert_eq!(error.reason, "NO_SUCH_SHARD");
    let error = client.cluster_report(Some("none"), Vec::new()).await.unwrap_err();
    assert_eq!(error.reason, "STREAM_NOT_FOUND");
}

/// Pages are in order and complete, whatever is asked for at a time.
#[tokio::test(flavor = "multi_thread")]
async fn reports_come_in_pages() {
    use proto::cluster_service_client::ClusterServiceClient;
    let node = Node::start(Options::plain()).await;
    let client = client(&node).await;
    for (name, shards) in [("b", 2), ("a-b", 1), ("a", 3), ("c", 1)] {
        client.create_stream(spec(name, shards)).await.unwrap();
    }
    let mut raw = ClusterServiceClient::connect(format!("http://{}", node.client_addr()))
        .await
        .unwrap();
    let whole = client.cluster_report(None, Vec::new()).await.unwrap();
    for page_size in [1, 2, 6, 7, 8] {
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let request = proto::GetReportRequest {
                page_size,
                page_token: token,
                ..proto::GetReportRequest::default()
            };
            let page = raw.get_report(request).await.unwrap().into_inner();
            assert!(page.shards.len() <= page_size as usize);
            for shard in &page.shards {
                assert!(page.groups.iter().any(|g| g.group_id == shard.group_id));
            }
            assert_eq!(page.summary.unwrap().shards, 7, "figures are of everything");
            seen.extend(page.shards.into_iter().map(|s| s.shard_id));
            token = page.next_page_token;
            if token.is_empty() {
                break;
            }
        }
        let all: Vec<_> = whole.shards.iter().map(|s| s.shard_id).collect();
        assert_eq!(seen, all, "{page_size} at a time");
    }
    for request in [
        proto::GetReportRequest {
            page_size: 10_001,
            ..proto::GetReportRequest::default()
        },
        proto::GetReportRequest {
            shards: vec![0],
            ..proto::GetReportRequest::default()
        },
        proto::GetReportRequest {
            patience_us: Some(31_000_000),
            ..proto::GetReportRequest::default()
        },
    ] {
        let status = raw.get_report(request).await.unwrap_err();
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{status}");
    }
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, ClientError>, reason: &str) -> ClientError {
    let error = result.expect_err("it cannot be done");
    assert_eq!(error.reason, reason, "{error}");
    error
}

/// Every order that a cluster of one cannot follow is refused, with the reason, and changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn orders_that_make_no_sense_are_refused() {
    let node = Node::start(Options::plain()).await;
    let client = client(&node).await;
    client.create_stream(spec("s", 1)).await.unwrap();
    let name = client.nodes(false).await.unwrap()[0].name.clone();
    let shard = || Target::Shard {
        stream: "s".into(),
        index: 0,
    };
    refused(client.step_down(shard(), "").await, "HAND_OVER_FAILED");
    // It leads already.
    let done = client.step_down(shard(), &name).await.unwrap();
    assert_eq!(done.from_node, done.to_node);
    let error = refused(client.step_down(shard(), "elsewhere").await, "NODE_NOT_FOUND");
    assert!(error.message.contains(&name), "it says which there are: {error}");
    refused(client.step_down(Target::Group(999), "").await, "GROUP_NOT_FOUND");
    refused(
        client.move_replica(Target::Group(1), &name, &name, false).await,
        "BAD_REQUEST",
    );
    refused(client.move_replica(shard(), &name, &name, false).await, "REPLICA_THERE");
    refused(client.move_replica(shard(), "", &name, false).await, "BAD_REQUEST");
    refused(client.drain_node("nobody").await, "NODE_NOT_FOUND");
    refused(client.remove_node(&name, false, false).await, "WOULD_BREAK_QUORUM");
    let four = StreamSpec {
        replicas: 4,
        ..spec("four", 1)
    };
    let error = refused(client.create_stream(four).await, "NOT_ENOUGH_NODES");
    assert!(error.message.contains("4 replicas need 4 nodes"), "{error}");
    let report = client.cluster_report(None, Vec::new()).await.unwrap();
    assert!(report.problems.is_empty() && report.summary.unwrap().changes == 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_drained_and_comes_back() {
    let node = Node::start(Options::plain()).await;
    let client = client(&node).await;
    let name = client.nodes(false).await.unwrap()[0].name.clone();
    let mut events = client.watch_cluster(Some(100_000)).await.unwrap();
    let first = events.next().await.unwrap().unwrap();
    assert!(
        matches!(first.kind, Some(proto::cluster_event::Kind::Watching(_))),
        "{first:?}"
    );
    // By name and by id.
    let drained = client.drain_node(&name).await.unwrap();
    assert_eq!(drained.state(), proto::NodeState::Draining);
    let back = client.undrain_node(&format!("n{}", drained.node_id)).await.unwrap();
    assert_eq!(back.state(), proto::NodeState::Active);
    // Both may be seen together; then nothing has changed.
    client.drain_node(&name).await.unwrap();
    let told = async {
        loop {
            let event = events.next().await.unwrap().unwrap();
            if let Some(proto::cluster_event::Kind::NodeState(state)) = event.kind
                && state.state() == proto::NodeState::Draining
            {
                return state;
            }
        }
    };
    let told = tokio::time::timeout(harness::PATIENCE, told).await.expect("it is told");
    assert_eq!(told.name, name);
    client.undrain_node(&name).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn events_end_when_the_node_does() {
    let mut node = Node::start(Options::plain()).await;
    let client = client(&node).await;
    let mut events = client.watch_cluster(None).await.unwrap();
    assert!(events.next().await.unwrap().is_some());
    node.term();
    let end = async {
        loop {
            match events.next().await {
                Ok(Some(_)) => {}
                Ok(None) => return None,
                Err(e) => return Some(e),
            }
        }
    };
    let end = tokio::time::timeout(harness::PATIENCE, end).await.expect("it ends");
    assert!(
        end.as_ref()
            .is_none_or(|e| e.retry == mainstem::client::RetryClass::DidNotHappen),
        "{end:?}"
    );
    assert!(node.wait_exit().await.success());
}

/// The plan of a cluster of one asks for nothing.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_planned_where_all_is_well() {
    let node = Node::start(Options::plain()).await;
    let client = client(&node).await;
    client.create_stream(spec("s", 4)).await.unwrap();
    let plan = client.plan().await.unwrap();
    let now: Vec<_> = plan.actions.iter().filter(|a| a.blocked_by.is_empty()).collect();
    assert!(now.is_empty(), "{now:?}");
    assert!(plan.silent_nodes.is_empty());
}

// ---- The command line

fn run(node: &Node, line: &str) -> Output {
    cli(&node.client_addr(), node.place(), line).output().unwrap()
}

#[track_caller]
fn text(node: &Node, line: &str) -> String {
    let out = run(node, line);
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[track_caller]
fn json(node: &Node, line: &str) -> serde_json::Value {
    serde_json::from_str(&text(node, &format!("{line} --format json"))).unwrap()
}

#[track_caller]
fn fails(node: &Node, code: i32, line: &str) -> String {
    let out = run(node, line);
    let said = String::from_utf8(out.stderr).unwrap();
    assert_eq!(out.status.code(), Some(code), "{line}: {said}");
    said
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_shows_the_cluster() {
    let node = Node::start(Options::plain().flag("--name", "alpha")).await;
    text(&node, "stream create ORDERS --shards 2");
    let info = text(&node, "cluster info");
    assert!(
        info.contains("1 of 1 answer") && info.contains("alpha*"),
        "leader and nodes: {info}"
    );
    assert_eq!(json(&node, "cluster info")["meta"]["leader_node"], 1);
    assert!(text(&node, "cluster nodes").contains("alpha"));
    assert_eq!(json(&node, "cluster nodes")[0]["live"], true);
    let report = text(&node, "cluster report");
    assert!(
        report.contains("ORDERS/0") && report.contains("ORDERS/1") && report.contains("alpha*"),
        "{report}"
    );
    assert!(!text(&node, "cluster report --problems").contains("ORDERS/0"));
    assert!(text(&node, "cluster report --groups").contains("group without shards"));
    assert_eq!(json(&node, "cluster report")["summary"]["shards"], 2);
    assert!(text(&node, "shard ls").contains("1 of 1"));
    assert_eq!(json(&node, "shard ls ORDERS")["shards"].as_array().unwrap().len(), 2);
    assert!(text(&node, "stream report ORDERS").contains("ORDERS/1"));
    assert_eq!(json(&node, "stream report ORDERS")["groups"][0]["leaderless"], false);
    assert!(text(&node, "cluster health").starts_with("healthy: 1 of 1 nodes"));
    assert_eq!(json(&node, "cluster health")["healthy"], true);
    text(&node, "cluster health --exit-when-healthy --nodes 1");
    let watched = text(&node, "cluster events --count 1 --format json");
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&watched).unwrap()["kind"],
        "watching"
    );
    text(&node, "cluster balance --dry-run");
    assert!(json(&node, "cluster balance --dry-run")["actions"].is_array());

    // What cannot be done says what to do instead.
    let said = fails(&node, 1, "shard leader step-down ORDERS/0");
    assert!(said.contains("next: "), "{said}");
    let said = fails(&node, 3, "node drain nobody");
    assert!(
        said.contains("alpha (n1)") && said.contains("mainstem cluster nodes"),
        "{said}"
    );
    let said = fails(&node, 1, "node remove alpha --yes");
    assert!(said.contains("mainstem cluster health"), "{said}");
    let said = fails(&node, 1, "stream create MANY --replicas 3");
    assert!(said.contains("mainstem cluster nodes"), "{said}");
    let said = fails(&node, 1, "stream create HERE --placement zone=nowhere");
    assert!(said.contains("mainstem cluster nodes"), "{said}");
    fails(&node, 2, "shard leader step-down");
    fails(&node, 2, "stream create x --placement nowhere");
    fails(&node, 2, "cluster balance");
    let said = fails(
        &node,
        10,
        "cluster health --exit-when-healthy --nodes 2 --within 1s --interval 100ms",
    );
    assert!(said.contains("not healthy"), "{said}");
}

/// A stream that nothing but an alarm is wrong with is reported as such.
#[tokio::test(flavor = "multi_thread")]
async fn health_tells_alarms_and_exits_with_10() {
    let node = Node::start(Options::plain().flag("--storage-min-free", "1TiB")).await;
    let said = fails(&node, 10, "cluster health");
    assert!(said.contains("not healthy"), "{said}");
    let out = String::from_utf8(run(&node, "cluster health").stdout).unwrap();
    assert!(out.starts_with("unhealthy: ") && out.contains("disk_low"), "{out}");
    let report = client(&node).await.cluster_report(None, Vec::new()).await.unwrap();
    assert_eq!(report.problems[0].kind(), ProblemKind::Alarm);
}
