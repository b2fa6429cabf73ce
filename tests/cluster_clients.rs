//! What the clients of a cluster see of it, over real processes: publishes go to the leader's node, and ride through the
//! end of any node as a delay; reads are linearizable or say how old they are.
#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::{Cluster, Node, Options, PATIENCE, cli, until};
use mainstem::client::proto::{Consistency, StreamSpec, get_request::By};
use mainstem::client::{Client, ClientConfig, Message, Publisher, ReadEvent, Start, Target, proto};

/// A client that was given these addresses and no more.
fn client(addresses: &[String]) -> Client {
    Client::new(ClientConfig::new(addresses.iter().cloned())).unwrap()
}

fn shard(stream: &str) -> Target {
    Target::Shard {
        stream: stream.into(),
        index: 0,
    }
}

async fn create(client: &Client, name: &str, replicas: u32) {
    let spec = StreamSpec {
        name: name.into(),
        replicas,
        ..StreamSpec::default()
    };
    client.create_stream(spec).await.unwrap();
}

/// The place of the node that leads the stream's only shard, as all but `not` see it.
async fn leader(cluster: &Cluster, stream: &str, not: &[usize]) -> usize {
    let asked: Vec<_> = (0..cluster.nodes.len()).filter(|at| !not.contains(at)).collect();
    let mut found = None;
    until("the shard is led by a node that is there", async || {
        for at in &asked {
            let client = client(&[cluster[*at].client_addr()]);
            let Ok(report) = client.cluster_report(Some(stream), Vec::new()).await else {
                continue;
            };
            let named = report.groups.iter().flat_map(|g| &g.replicas).find(|r| r.leader);
            found = named.and_then(|r| r.node_name.strip_prefix("node-")?.parse::<usize>().ok());
            if found.is_some_and(|number| !not.contains(&(number - 1))) {
                return true;
            }
        }
        false
    })
    .await;
    found.unwrap() - 1
}

/// Publishes one message after the other; every one must be acknowledged.
struct Loop {
    stop: Arc<AtomicBool>,
    acked: Arc<AtomicU64>,
    slowest_ms: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<Publisher>,
}

impl Loop {
    fn start(publisher: Publisher, stream: &'static str) -> Self {
        let (stop, acked, slowest_ms) = <(Arc<AtomicBool>, Arc<AtomicU64>, Arc<AtomicU64>)>::default();
        let shared = (stop.clone(), acked.clone(), slowest_ms.clone());
        let task = tokio::spawn(async move {
            let (stop, acked, slowest_ms) = shared;
            while !stop.load(Ordering::Relaxed) {
                let message = Message::new(stream, acked.load(Ordering::Relaxed).to_string());
                let begun = Instant::now();
                let ack = publisher.publish(&message).await.expect("there is room");
                ack.await.expect("a delay, and no error");
                slowest_ms.fetch_max(begun.elapsed().as_millis() as u64, Ordering::Relaxed);
                acked.fetch_add(1, Ordering::Relaxed);
            }
            publisher
        });
        Self {
            stop,
            acked,
            slowest_ms,
            task,
        }
    }

    /// Waits until so many more are acknowledged.
    async fn more(&self, messages: u64) {
        let goal = self.acked.load(Ordering::Relaxed) + messages;
        until("publishes go on", async || {
            assert!(!self.task.is_finished(), "a publish has failed");
            self.acked.load(Ordering::Relaxed) >= goal
        })
        .await;
    }

    /// Ends it; gives how many were acknowledged.
    async fn end(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap().close().await.unwrap();
        self.acked.load(Ordering::Relaxed)
    }
}

/// Makes another node lead the stream's only shard. The planner may think again, so that who leads is to be looked up.
async fn hand_over(cluster: &Cluster, stream: &str) {
    let client = client(&cluster.addresses());
    until("the shard is handed over", async || {
        client.step_down(shard(stream), "").await.is_ok()
    })
    .await;
}

/// Waits until the publisher's session is on the node that leads, and nowhere else; gives its place.
async fn session_follows(cluster: &Cluster, stream: &str) -> usize {
    let mut found = None;
    until("the session is on the leader's node", async || {
        let at = leader(cluster, stream, &[]).await;
        found = Some(at);
        for (i, node) in cluster.nodes.iter().enumerate() {
            if sessions(node).await != f64::from(u8::from(i == at)) {
                return false;
            }
        }
        true
    })
    .await;
    found.unwrap()
}

async fn sessions(node: &Node) -> f64 {
    node.metric("api_open_sessions{kind=\"publish\"}").await
}

/// Waits until every replica of the stream answers its leader.
async fn all_there(client: &Client, stream: &str) {
    until("all replicas are there", async || {
        let report = client.cluster_report(Some(stream), Vec::new()).await;
        report.is_ok_and(|r| r.groups[0].quorum_have == 3)
    })
    .await;
}

/// Waits until every node knows where every other takes clients, and so has told its sessions.
async fn all_known(cluster: &Cluster) {
    let all = cluster.addresses();
    until("every node knows all addresses", async || {
        for node in &cluster.nodes {
            let info = client(&[node.client_addr()]).server_info().await.unwrap();
            if !all.iter().all(|a| info.nodes.iter().any(|n| n.client_address == *a)) {
                return false;
            }
        }
        true
    })
    .await;
}

/// Everything that was acknowledged is there, once and in order.
async fn holds_exactly(client: &Client, stream: &str, count: u64) {
    let mut reader = client
        .reader(stream)
        .from(Start::Beginning)
        .stop_at_tail()
        .open()
        .await
        .unwrap();
    let mut next = 0;
    while let Some(message) = reader.next().await.unwrap() {
        assert_eq!(
            String::from_utf8_lossy(&message.payload),
            next.to_string(),
            "at {}",
            message.sequence
        );
        next += 1;
    }
    assert_eq!(next, count);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_publisher_goes_to_the_leader_and_survives_any_node() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    // One address is all that it knows.
    let client = client(&[cluster[0].client_addr()]);
    create(&client, "s", 3).await;
    let publishing = Loop::start(client.publisher("s").open().await.unwrap(), "s");
    publishing.more(10).await;
    session_follows(&cluster, "s").await;

    // Another one leads: the session follows.
    for _ in 0..2 {
        hand_over(&cluster, "s").await;
        publishing.more(10).await;
        session_follows(&cluster, "s").await;
    }
    println!(
        "slowest publish while the leader was handed over twice: {} ms",
        publishing.slowest_ms.load(Ordering::Relaxed)
    );

    // The node that leads, and to which the client is connected, is gone.
    let at = session_follows(&cluster, "s").await;
    cluster[at].kill9().await;
    publishing.more(100).await;
    println!(
        "slowest publish when the leader's node was killed: {} ms",
        publishing.slowest_ms.load(Ordering::Relaxed)
    );
    // It comes back at another address; then those go, one after the other, that the client knew from the beginning.
    cluster[at].restart().await;
    for other in (0..3).filter(|i| *i != at) {
        all_there(&client, "s").await;
        all_known(&cluster).await;
        // Now all addresses are others than those it was given and first learned: its session was told.
        cluster[other].kill9().await;
        publishing.more(100).await;
        cluster[other].restart().await;
    }
    all_there(&client, "s").await;
    let acked = publishing.end().await;
    println!("{acked} messages");
    holds_exactly(&client, "s", acked).await;
    // New sessions and calls find their way, too.
    create(&client, "later", 1).await;
}

/// Single calls are told who leads, and repeated where an id makes that safe.
#[tokio::test(flavor = "multi_thread")]
async fn single_calls_follow_the_leader_and_survive_it() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    let client = client(&[cluster[0].client_addr()]);
    create(&client, "s", 3).await;
    let publish = async |n: u64| {
        let message = Message::new("s", n.to_string()).with_message_id(n.to_string());
        let begun = Instant::now();
        client
            .publish("s", vec![message], None)
            .await
            .expect("a delay, and no error");
        begun.elapsed()
    };
    let calls = async |node: &Node| {
        let name = "api_requests_total{method=\"PublishService/Publish\",code=\"OK\"}";
        node.metric(name).await
    };
    hand_over(&cluster, "s").await;
    let mut n = 0;
    let mut at = 0;
    until("the leader's node takes the calls", async || {
        at = leader(&cluster, "s", &[]).await;
        let before = calls(&cluster[at]).await;
        publish(n).await;
        publish(n + 1).await;
        n += 2;
        calls(&cluster[at]).await == before + 2.0
    })
    .await;
    cluster[at].kill9().await;
    let mut slowest = Duration::ZERO;
    for _ in 0..50 {
        slowest = slowest.max(publish(n).await);
        n += 1;
    }
    println!("slowest single publish when the leader's node was killed: {slowest:?}");
    holds_exactly(&client, "s", n).await;
    cluster[at].restart().await;
}

/// Orders, reads and lists at a node that has just been started again see what was there before.
#[tokio::test(flavor = "multi_thread")]
async fn every_client_learns_every_node() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    for node in &cluster.nodes {
        let info = client(&[node.client_addr()]).server_info().await.unwrap();
        let told: BTreeMap<_, _> = info
            .nodes
            .iter()
            .map(|n| (n.name.clone(), n.client_address.clone()))
            .collect();
        let is = (1..).map(|i| format!("node-{i}")).zip(cluster.addresses()).collect();
        assert_eq!(told, is);
        assert_eq!(info.cluster_version, 1);
    }
    // Only what was given is used, if that is wanted.
    let mut config = ClientConfig::new([cluster[0].client_addr()]);
    config.learn_nodes = false;
    config.retry_for = Duration::from_millis(200);
    let narrow = Client::new(config).unwrap();
    let wide = client(&[cluster[0].client_addr()]);
    narrow.list_streams("").await.unwrap();
    wide.list_streams("").await.unwrap();
    cluster[0].kill9().await;
    assert!(narrow.list_streams("").await.unwrap_err().is_unavailable());
    wide.list_streams("").await.unwrap();
}

async fn get(
    client: &Client,
    stream: &str,
) -> Result<(String, Option<proto::Freshness>), mainstem::client::ClientError> {
    let by = By::LastBySubject(proto::GetLastBySubject { subject: stream.into() });
    let (message, fresh) = client.get(stream, by).await?;
    Ok((String::from_utf8_lossy(&message.payload).into_owned(), fresh))
}

async fn put(client: &Client, stream: &str, text: &str) {
    let message = Message::new(stream, text.to_owned()).with_message_id(text);
    client.publish(stream, vec![message], None).await.unwrap();
}

fn run(server: &str, line: &str) -> (Option<i32>, String, String) {
    let out = cli(server, env!("CARGO_TARGET_TMPDIR"), line).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (out.status.code(), text(out.stdout), text(out.stderr))
}

/// Without a quorum nothing linearizable is read; what a replica has is, and it says how old that may be.
#[tokio::test(flavor = "multi_thread")]
async fn local_reads_need_nobody_and_tell_their_age() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    let all = client(&cluster.addresses());
    create(&all, "s", 3).await;
    create(&all, "one", 1).await;
    put(&all, "s", "first").await;
    put(&all, "one", "only").await;
    for node in &cluster.nodes {
        let local = client(&[node.client_addr()]).with_consistency(Consistency::Local);
        let info = local.server_info().await.unwrap();
        // A node whose replica does not run yet asks another one.
        until("every replica has it", async || {
            let got = get(&local, "s").await;
            got.is_ok_and(|(text, fresh)| text == "first" && fresh.is_some_and(|fresh| fresh.node_id == info.node_id))
        })
        .await;
        let (_, fresh) = get(&local, "s").await.unwrap();
        let fresh = fresh.expect("a local read tells its age");
        assert_eq!((fresh.tail, fresh.unapplied_entries), (2, 0), "{fresh:?}");
        assert_eq!(fresh.node_id, info.node_id, "of the replica on the node that was asked");
        until("it hears from the leader", async || {
            let fresh = get(&local, "s").await.unwrap().1.unwrap();
            fresh.heard_ago_us.is_some_and(|ago| ago < 5_000_000)
        })
        .await;
        // A stream that has no replica on most nodes.
        let (text, fresh) = get(&local, "one").await.unwrap();
        assert_eq!((text.as_str(), fresh.unwrap().tail), ("only", 2));
        // Linearizable is what nobody asks for.
        let (text, fresh) = get(&client(&[node.client_addr()]), "s").await.unwrap();
        assert_eq!((text.as_str(), fresh), ("first", None));
    }

    cluster[1].kill9().await;
    cluster[2].kill9().await;
    let mut config = ClientConfig::new([cluster[0].client_addr()]);
    config.retry_for = Duration::from_millis(100);
    config.learn_nodes = false;
    let alone = Client::new(config).unwrap();
    let error = get(&alone, "s").await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    let error = alone.fetch("s", Start::Beginning, Vec::new(), 10).await.unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    let local = alone.clone().with_consistency(Consistency::Local);
    let mut before = 0;
    until("the silence of the others is told", async || {
        let (text, fresh) = get(&local, "s").await.unwrap();
        assert_eq!(text, "first");
        let ago = fresh.unwrap().heard_ago_us.expect("it has heard before");
        let grows = ago > before;
        before = ago;
        grows && ago > 1_000_000
    })
    .await;
    let page = local.fetch("s", Start::Beginning, Vec::new(), 10).await.unwrap();
    assert_eq!(
        (page.messages.len(), page.freshness.len(), page.caught_up),
        (1, 1, true)
    );
    let mut reader = local.reader("s").stop_at_tail().open().await.unwrap();
    let mut caught_up = None;
    while let Some(event) = reader.next_event().await.unwrap() {
        if let ReadEvent::CaughtUp { freshness, .. } = event {
            caught_up = Some(freshness);
        }
    }
    assert_eq!(caught_up.expect("it has an end").len(), 1);

    // The same by the command line.
    let server = cluster[0].client_addr();
    let (code, out, told) = run(&server, "stream get s 1 --consistency local --no-learn");
    assert_eq!((code, out.trim_end()), (Some(0), "first"), "{told}");
    assert!(told.contains("up to sequence 1, in touch with the leader"), "{told}");
    let (code, out, told) = run(&server, "sub s --consistency local --no-learn");
    assert!(
        code == Some(0) && out.contains("first") && told.contains("in touch"),
        "{out}{told}"
    );
    let (code, _, told) = run(&server, "stream view s --consistency local --no-learn");
    assert!(code == Some(0) && told.contains("in touch"), "{told}");
    let (code, _, told) = run(&server, "stream get s 1 --no-learn");
    assert_eq!(code, Some(4), "{told}");
    cluster[1].restart().await;
}

/// A leader that slept while another took its place wakes up and believes that it leads. Whatever it is asked then, it
/// does not answer from the past.
#[tokio::test(flavor = "multi_thread")]
async fn a_leader_that_slept_shows_nothing_old() {
    let cluster = Cluster::start(3, Options::plain()).await;
    let all = client(&cluster.addresses());
    create(&all, "s", 3).await;
    put(&all, "s", "0").await;
    for round in 1..=4u64 {
        let old = leader(&cluster, "s", &[]).await;
        let sleeper = client(&[cluster[old].client_addr()]);
        let mut config = ClientConfig::new([cluster[old].client_addr()]);
        config.learn_nodes = false;
        let narrow = Client::new(config).unwrap();
        // Connections are made before, so that nothing lies between its waking and the questions.
        sleeper.server_info().await.unwrap();
        narrow.server_info().await.unwrap();
        cluster[old].pause();
        let others: Vec<_> = cluster
            .addresses()
            .into_iter()
            .enumerate()
            .filter(|(at, _)| *at != old)
            .collect();
        let rest = client(&others.into_iter().map(|(_, address)| address).collect::<Vec<_>>());
        let value = round.to_string();
        let begun = Instant::now();
        loop {
            let message = Message::new("s", value.clone()).with_message_id(value.clone());
            match rest.publish("s", vec![message], None).await {
                Ok(_) => break,
                Err(e) => assert!(begun.elapsed() < PATIENCE, "{e}"),
            }
        }
        // All kinds of reads at once wait for it when it wakes.
        let last = {
            let narrow = narrow.clone();
            tokio::spawn(async move { get(&narrow, "s").await.map(|(text, _)| text) })
        };
        let by_sequence = {
            let narrow = narrow.clone();
            tokio::spawn(async move { narrow.get_by_sequence("s", 0, round + 1).await })
        };
        let page = {
            let narrow = narrow.clone();
            tokio::spawn(async move { narrow.fetch("s", Start::Last(1), Vec::new(), 10).await })
        };
        let session = {
            let narrow = narrow.clone();
            tokio::spawn(async move {
                let mut reader = narrow.reader("s").stop_at_tail().open().await?;
                let mut newest = String::new();
                while let Some(message) = reader.next().await? {
                    newest = String::from_utf8_lossy(&message.payload).into_owned();
                }
                Ok::<_, mainstem::client::ClientError>(newest)
            })
        };
        // A process that sleeps cannot tell that it has been asked; whether all questions came before it wakes, or some
        // right after, it must not matter.
        tokio::task::yield_now().await;
        cluster[old].resume();
        assert_eq!(last.await.unwrap().unwrap(), value, "last by subject");
        assert_eq!(by_sequence.await.unwrap().unwrap().sequence, round + 1);
        let page = page.await.unwrap().unwrap();
        let told: Vec<_> = page
            .messages
            .iter()
            .map(|m| String::from_utf8_lossy(&m.payload).into_owned())
            .collect();
        assert_eq!(told, [value.as_str()], "the last of a page");
        assert_eq!(session.await.unwrap().unwrap(), value, "a session's end");
        until("it follows", async || {
            client(&cluster.addresses())
                .cluster_report(Some("s"), Vec::new())
                .await
                .is_ok_and(|r| r.groups[0].quorum_have == 3)
        })
        .await;
    }
}

/// A reader that follows a stream through the sleep of the leader that it reads from is not told that it has everything
/// while it has not.
#[tokio::test(flavor = "multi_thread")]
async fn nobody_has_caught_up_with_a_leader_that_slept() {
    let cluster = Cluster::start(3, Options::plain()).await;
    let all = client(&cluster.addresses());
    create(&all, "s", 3).await;
    put(&all, "s", "0").await;
    let old = leader(&cluster, "s", &[]).await;
    let mut config = ClientConfig::new([cluster[old].client_addr()]);
    config.learn_nodes = false;
    let narrow = Client::new(config).unwrap();
    let mut reader = narrow.reader("s").open().await.unwrap();
    let caught_up = async |reader: &mut mainstem::client::Reader| loop {
        if let Some(ReadEvent::CaughtUp { tails, .. }) = reader.next_event().await.unwrap() {
            return tails;
        }
    };
    assert_eq!(caught_up(&mut reader).await, [(0, 2)]);
    cluster[old].pause();
    let rest: Vec<_> = (0..3)
        .filter(|at| *at != old)
        .map(|at| cluster[at].client_addr())
        .collect();
    put(&client(&rest), "s", "1").await;
    cluster[old].resume();
    // The next time that it is told, both are there.
    let tails = tokio::time::timeout(PATIENCE, caught_up(&mut reader))
        .await
        .expect("it catches up");
    assert_eq!(tails, [(0, 3)]);
    assert_eq!(reader.positions().get(&0), Some(&3));
}
