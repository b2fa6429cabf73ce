//! The Rust client against a real server that is killed, drained and cut off.
#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use harness::{Node, Options};
use mainstem::client::proto::{Limits, StreamSpec};
use mainstem::client::{Client, ClientConfig, Expect, Message, Purge, RetryClass, Start};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

/// One address for a server that comes back on another port; and connections that can be cut.
struct Proxy {
    address: SocketAddr,
    target: Arc<Mutex<String>>,
    cut: Arc<Mutex<CancellationToken>>,
    _tasks: JoinSet<()>,
}

impl Proxy {
    async fn to(node: &Node) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let target = Arc::new(Mutex::new(node.client_addr()));
        let cut = Arc::new(Mutex::new(CancellationToken::new()));
        let (to, token) = (Arc::clone(&target), Arc::clone(&cut));
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut near, _)) = listener.accept().await {
                let (to, token) = (to.lock().unwrap().clone(), token.lock().unwrap().clone());
                connections.spawn(async move {
                    // Nobody there: the connection is closed at once.
                    let Ok(mut far) = TcpStream::connect(to).await else {
                        return;
                    };
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        () = token.cancelled() => {}
                    }
                });
            }
        });
        Proxy {
            address,
            target,
            cut,
            _tasks: tasks,
        }
    }

    fn moved(&self, node: &Node) {
        *self.target.lock().unwrap() = node.client_addr();
    }

    fn cut(&self) {
        std::mem::take(&mut *self.cut.lock().unwrap()).cancel();
    }

    fn client(&self) -> Client {
        Client::new(ClientConfig::new([self.address.to_string()])).unwrap()
    }
}

async fn create(client: &Client, name: &str, shards: u32) {
    client
        .create_stream(StreamSpec {
            name: name.into(),
            shards,
            ..StreamSpec::default()
        })
        .await
        .unwrap();
}

fn message(n: u64) -> Message {
    Message::new(format!("s.{}", n % 31), n.to_string())
}

/// Everything is stored once, in the order of each shard, where its ack says.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_lost_repeated_or_reordered_by_accidents() {
    let mut rng = StdRng::seed_from_u64(harness::seed("accidents"));
    let mut node = Node::start(Options::plain()).await;
    let proxy = Proxy::to(&node).await;
    let client = proxy.client();
    create(&client, "s", 3).await;
    let publisher = Arc::new(client.publisher("s").batch_messages(500).open().await.unwrap());
    let stop = CancellationToken::new();
    let feeding = tokio::spawn({
        let (publisher, stop) = (Arc::clone(&publisher), stop.clone());
        async move {
            let mut acks = Vec::new();
            let mut n = 0;
            while !stop.is_cancelled() {
                if n % 100 == 0 {
                    acks.push((n, publisher.publish(&message(n)).await.unwrap()));
                } else {
                    publisher.send(&message(n).subject, &message(n).payload).await.unwrap();
                }
                n += 1;
                if n % 500 == 0 {
                    // A steady flow: what waits while the server is away must not fill the memory.
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            }
            (n, acks)
        }
    });
    for _ in 0..6 {
        let before = publisher.taken();
        harness::until("publishing goes on", async || publisher.taken() > before + 2_000).await;
        match rng.random_range(0..3) {
            0 => {
                node.kill9().await;
                node.restart().await;
                proxy.moved(&node);
            }
            1 => {
                node.term();
                assert!(node.wait_exit().await.success(), "{}", node.log());
                node.restart().await;
                proxy.moved(&node);
            }
            _ => proxy.cut(),
        }
    }
    stop.cancel();
    let (count, acks) = feeding.await.unwrap();
    publisher.flush().await.unwrap();

    let mut stored: HashMap<u32, Vec<u64>> = HashMap::new();
    let mut reader = client.reader("s").stop_at_tail().open().await.unwrap();
    while let Some(batch) = reader.next_batch().await.unwrap() {
        let of = stored.entry(batch.shard).or_default();
        for (sequence, record) in &batch {
            assert_eq!(sequence, of.len() as u64 + 1, "dense");
            of.push(std::str::from_utf8(record.payload).unwrap().parse().unwrap());
        }
    }
    for (n, ack) in acks {
        let ack = ack.await.unwrap();
        assert_eq!(
            stored[&ack.shard][ack.sequence.unwrap() as usize - 1],
            n,
            "where the ack says"
        );
    }
    assert!(stored.values().all(|of| of.is_sorted_by(|a, b| a < b)), "in order");
    let mut all: Vec<u64> = stored.into_values().flatten().collect();
    all.sort_unstable();
    assert!(
        all.iter().copied().eq(0..count),
        "{count} messages were published, {} are stored",
        all.len()
    );
}

/// A reader that follows gets each message once while the server goes and comes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_follows_through_restarts() {
    let mut node = Node::start(Options::plain()).await;
    let proxy = Proxy::to(&node).await;
    let client = proxy.client();
    create(&client, "s", 1).await;
    let publisher = client.publisher("s").open().await.unwrap();
    publisher
        .publish(&Message::new("s", "before"))
        .await
        .unwrap()
        .await
        .unwrap();
    let mut reader = client.reader("s").from(Start::New).open().await.unwrap();
    for round in 0..4u64 {
        for n in 0..100 {
            publisher
                .send("s", (round * 100 + n).to_string().as_bytes())
                .await
                .unwrap();
        }
        publisher.flush().await.unwrap();
        for n in 0..100 {
            let m = tokio::time::timeout(harness::PATIENCE, reader.next())
                .await
                .unwrap()
                .unwrap()
                .unwrap();
            assert_eq!(
                (m.payload, m.sequence),
                ((round * 100 + n).to_string().into(), 2 + round * 100 + n)
            );
        }
        if round % 2 == 0 {
            node.kill9().await;
            node.restart().await;
            proxy.moved(&node);
        } else {
            proxy.cut();
        }
    }
}

#[tokio::test]
async fn streams_are_administered() {
    let node = Node::start(Options::plain()).await;
    let client = Client::connect(&node.client_addr()).await.unwrap();
    let spec = StreamSpec {
        name: "orders".into(),
        subjects: vec!["orders.>".into()],
        ..StreamSpec::default()
    };
    let (stream, existed) = client.create_stream(spec.clone()).await.unwrap();
    assert!(!existed);
    let (again, existed) = client.create_stream(spec.clone()).await.unwrap();
    assert!(existed && again.stream_id == stream.stream_id);
    let other = StreamSpec {
        description: "other".into(),
        ..spec.clone()
    };
    assert_eq!(
        client.create_stream(other).await.unwrap_err().code,
        tonic::Code::AlreadyExists
    );

    let limits = Some(Limits {
        max_messages: Some(5),
        ..Limits::default()
    });
    let change = StreamSpec {
        name: "orders".into(),
        limits,
        ..StreamSpec::default()
    };
    let paths = vec!["limits.max_messages".to_owned()];
    let edited = client
        .update_stream(change.clone(), paths.clone(), Some(stream.revision))
        .await
        .unwrap();
    assert_eq!(edited.spec.unwrap().limits.unwrap().max_messages, Some(5));
    let stale = client
        .update_stream(change, paths, Some(stream.revision))
        .await
        .unwrap_err();
    assert_eq!(
        (stale.reason.as_str(), stale.retry),
        ("REVISION_MISMATCH", RetryClass::CannotWork)
    );

    let messages: Vec<_> = (0..5).map(|n| Message::new("orders.a", n.to_string())).collect();
    let acks = client.publish("orders", messages, None).await.unwrap();
    assert!(acks.iter().map(|a| a.sequence).eq((1..=5).map(Some)));
    let got = client.get_by_sequence("orders", 0, 3).await.unwrap();
    assert_eq!((got.payload, got.subject.as_str()), ("2".into(), "orders.a"));
    assert_eq!(
        client.get_last_by_subject("orders", "orders.a").await.unwrap().sequence,
        5
    );
    let page = client.fetch("orders", Start::Sequence(2), vec![], 2).await.unwrap();
    assert_eq!(page.messages.iter().map(|m| m.sequence).collect::<Vec<_>>(), [2, 3]);
    let page = client
        .fetch("orders", Start::Cursor(page.cursor), vec![], 100)
        .await
        .unwrap();
    assert!(page.caught_up && page.messages.len() == 2);
    assert_eq!(
        client
            .purge_stream(
                "orders",
                Purge {
                    keep: Some(1),
                    ..Purge::default()
                }
            )
            .await
            .unwrap(),
        4
    );

    assert_eq!(client.list_streams("ord").await.unwrap().len(), 1);
    client.delete_stream("orders", None).await.unwrap();
    assert!(client.list_streams("").await.unwrap().is_empty());
    assert!(client.get_stream("orders").await.is_err());
    let back = client.undelete_stream("orders", None).await.unwrap();
    assert_eq!(back.stream_id, stream.stream_id);
    assert_eq!(
        client.get_last_by_subject("orders", "orders.a").await.unwrap().payload,
        "4"
    );
}

#[tokio::test]
async fn conditions_and_ids_hold() {
    let node = Node::start(Options::plain()).await;
    let client = Client::connect(&node.client_addr()).await.unwrap();
    create(&client, "s", 1).await;
    let publisher = client.publisher("s").open().await.unwrap();
    let first = publisher
        .publish_expecting(&message(0), Expect::last_sequence(0))
        .await
        .unwrap()
        .await
        .unwrap();
    assert_eq!(first.sequence, Some(1));
    let refused = publisher
        .publish_expecting(&message(1), Expect::last_sequence(0))
        .await
        .unwrap()
        .await
        .unwrap_err();
    assert!(refused.is_expectation_failed());
    assert_eq!((refused.actual, refused.retry), (Some(1), RetryClass::CannotWork));
    // What is behind it goes on.
    let once = message(2).with_message_id("once");
    let ack = publisher.publish(&once).await.unwrap().await.unwrap();
    assert_eq!((ack.sequence, ack.duplicate), (Some(2), false));
    assert!(publisher.publish(&once).await.unwrap().await.unwrap().duplicate);
    let e = publisher
        .publish(&Message::new("elsewhere", "x"))
        .await
        .unwrap()
        .await
        .unwrap_err();
    assert_eq!(
        (e.reason.as_str(), e.retry),
        ("SUBJECT_NOT_IN_STREAM", RetryClass::CannotWork)
    );
    assert_eq!(
        publisher.publish(&message(3)).await.unwrap().await.unwrap().sequence,
        Some(3)
    );
    let e = client.publisher("nowhere").open().await.unwrap_err();
    assert!(e.is_not_found(), "{e}");
}

/// The reader's memory is bounded by its credit even if it does not read, and nothing is lost by that.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_gets_everything() {
    let node = Node::start(Options::plain()).await;
    let client = Client::connect(&node.client_addr()).await.unwrap();
    create(&client, "s", 2).await;
    let publisher = client.publisher("s").batch_bytes(10_000).open().await.unwrap();
    for n in 0..20_000u64 {
        publisher.send(&message(n).subject, &message(n).payload).await.unwrap();
    }
    publisher.flush().await.unwrap();
    let mut reader = client
        .reader("s")
        .credit(100, 4_000)
        .stop_at_tail()
        .open()
        .await
        .unwrap();
    let mut count = 0;
    while let Some(batch) = reader.next_batch().await.unwrap() {
        count += batch.len();
        if count % 1_000 < batch.len() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    assert_eq!(count, 20_000);
}
