//! Clusters of real processes: they form, their nodes come, go and come back, and the catalog goes on while most of them
//! are there.
#![allow(clippy::unwrap_used)]

mod harness;

use std::time::{Duration, Instant};

use harness::{Cluster, Failure, Node, Options, until};
use mainstem::wire::v1;
use tonic::Code;

fn spec(name: &str, replicas: u32, shards: u32) -> v1::StreamSpec {
    v1::StreamSpec {
        name: name.into(),
        replicas,
        shards,
        ..v1::StreamSpec::default()
    }
}

/// Creates a stream through a node; what did not happen is tried again.
async fn create(node: &Node, name: &str, replicas: u32) -> v1::Stream {
    let begun = Instant::now();
    loop {
        match node.api().await.create(spec(name, replicas, 1)).await {
            Ok(stream) => return stream,
            Err(failure) => {
                let again = failure.retry != "cannot_work" && begun.elapsed() < harness::PATIENCE;
                assert!(again, "{name}: {failure:?}\n{}", node.log());
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn refused(node: &Node, spec: v1::StreamSpec) -> Failure {
    node.api().await.create(spec).await.expect_err("refused")
}

fn write(node: &Node, name: &str, text: &str) -> String {
    let path = node.place().join(name);
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_form_a_cluster_and_hold_a_stream() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    let stream = create(&cluster[1], "three", 3).await;
    assert_eq!(stream.shards[0].replicas.len(), 3, "{stream:?}");
    // Every node has its own replica of the group, and knows who leads it.
    for node in &cluster.nodes {
        until("the group runs on every node", async || {
            let stream = node.api().await.stream("three").await.expect("found");
            let shard = &stream.shards[0];
            shard.leader_node.is_some() && shard.replicas.iter().any(|replica| replica.state == "current")
        })
        .await;
    }
    // What is not there is not there on any node.
    for node in &cluster.nodes {
        let failure = node.api().await.stream("nothing").await.expect_err("not there");
        assert_eq!(failure.code, Code::NotFound, "{failure:?}");
    }
    // Each one restarts; the cluster goes on meanwhile and afterwards.
    for at in 0..3 {
        cluster[at].term();
        cluster[at].wait_exit().await;
        let other = (at + 1) % 3;
        create(&cluster[other], &format!("without-{at}"), 1).await;
        cluster[at].restart().await;
        create(&cluster[at], &format!("with-{at}"), 3).await;
        cluster[at]
            .api()
            .await
            .stream("three")
            .await
            .expect("found after a restart");
    }
    let all = cluster[0]
        .api()
        .await
        .streams()
        .list_streams(v1::ListStreamsRequest::default())
        .await
        .unwrap();
    assert_eq!(all.into_inner().streams.len(), 7);
    // All at once: nobody is there to ask.
    for node in &mut cluster.nodes {
        node.kill9().await;
    }
    for node in &mut cluster.nodes {
        node.launch();
    }
    for node in &mut cluster.nodes {
        node.ready().await;
    }
    create(&cluster[2], "again", 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_leader_is_replaced_and_a_lost_quorum_is_told() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    create(&cluster[0], "before", 3).await;
    // The founder leads the meta group until it goes.
    cluster[0].kill9().await;
    let begun = Instant::now();
    create(&cluster[1], "after", 1).await;
    println!("admin calls work again after {:?}", begun.elapsed());
    let failure = refused(&cluster[2], spec("too-many", 3, 1)).await;
    assert_eq!(failure.reason, "NOT_ENOUGH_NODES", "{failure:?}");
    assert!(
        failure.message.contains("the cluster has 3, 2 of them live"),
        "{failure:?}"
    );
    cluster[1].kill9().await;
    // A leader that is left alone notices it after a while, and what it had begun until then is not known.
    until("the quorum is known to be lost", async || {
        refused(&cluster[2], spec("alone", 1, 1)).await.reason == "NO_QUORUM"
    })
    .await;
    let begun = Instant::now();
    let failure = refused(&cluster[2], spec("still-alone", 1, 1)).await;
    let took = begun.elapsed();
    println!("refused after {took:?}: {}", failure.message);
    assert_eq!(
        (failure.reason.as_str(), failure.retry.as_str()),
        ("NO_QUORUM", "did_not_happen")
    );
    assert!(took < Duration::from_secs(10), "{took:?}");
    for at in [0, 1] {
        cluster[at].restart().await;
    }
    create(&cluster[0], "all-again", 3).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_joins_while_the_one_it_asks_restarts() {
    let mut cluster = Cluster::found(Options::plain()).await;
    create(&cluster[0], "one", 1).await;
    let mut joiner = cluster.joiner(0);
    cluster[0].kill9().await;
    joiner.launch();
    until("the joiner has tried", async || joiner.has_logged(&["not joined yet"])).await;
    cluster[0].restart().await;
    joiner.ready().await;
    joiner
        .api()
        .await
        .stream("one")
        .await
        .expect("the joiner knows the cluster's streams");
    create(&joiner, "two", 2).await;
    // Asked to found or join again, it just starts.
    joiner.kill9().await;
    joiner.restart().await;
    joiner.api().await.stream("two").await.expect("found");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_belong_is_refused_with_the_reason() {
    let first = Node::new("tokens", Options::plain());
    let (right, wrong) = (
        write(&first, "right", "the cluster's own token\n"),
        write(&first, "wrong", "some other token\n"),
    );
    let mut cluster = Cluster::found(Options::plain().flag("--token-file", &right)).await;
    let refused = async |mut node: Node, words: &[&str]| {
        node.launch();
        let status = node.try_ready().await.expect_err("refused");
        assert_eq!(status.code(), Some(1), "{}", node.log());
        assert!(node.has_logged(words), "{words:?}\n{}", node.log());
    };
    let with = |cluster: &Cluster, flag: &str, value: &str| {
        let mut node = cluster.joiner(0);
        // The last one of a flag would be an error: replace it.
        let flags = &mut node.options.flags;
        match flags.iter().position(|known| known == flag) {
            Some(at) => flags[at + 1] = value.into(),
            None => flags.extend([flag.into(), value.into()]),
        }
        node
    };
    refused(with(&cluster, "--token-file", &wrong), &["the tokens differ"]).await;
    refused(
        with(&cluster, "--cluster-name", "other"),
        &["a node of cluster \"mainstem\""],
    )
    .await;
    refused(with(&cluster, "--name", "node-1"), &["is called \"node-1\" already"]).await;
    let mut lost = Node::new("lost", Options::plain());
    lost.set_peer_listen("127.0.0.1:0");
    refused(lost, &["--bootstrap", "--join"]).await;
    cluster.join().await;
    // Its data directory is of this cluster: not for a node without peers.
    let mut node = cluster.nodes.pop().unwrap();
    node.kill9().await;
    let mut alone = Node::new("alone", Options::plain());
    alone.set_data(node.data());
    refused(alone, &["--peer-listen"]).await;
}
