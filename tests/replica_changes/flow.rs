//! A publisher and a reader that go on while replicas come and go, and what must be found afterwards.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstem::client::{Client, ClientConfig, Message};
use mainstem::wire::v1;
use parking_lot::Mutex;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::harness::api::{Event, Read};
use super::harness::{Api, Cluster, Node, PATIENCE, until};

/// Between two messages of a flow.
const PACE: Duration = Duration::from_millis(4);

pub fn client(cluster: &Cluster) -> Client {
    Client::new(ClientConfig::new(cluster.addresses())).unwrap()
}

/// What a flow has seen.
#[derive(Default)]
pub struct Seen {
    /// Message number → shard and sequence.
    pub acked: BTreeMap<u64, (u32, u64)>,
    pub longest: Duration,
    /// Messages that the reader has seen.
    read: u64,
    pub failures: Vec<String>,
}

/// One publisher that goes on whatever happens, and one reader at the tail that stays in one session.
pub struct Flow {
    pub stream: String,
    stop: CancellationToken,
    seen: Arc<Mutex<Seen>>,
    publishing: JoinHandle<()>,
    /// By shard: the sequences that were read, and what each held.
    reading: JoinHandle<BTreeMap<(u32, u64), Vec<u8>>>,
    stop_reading: CancellationToken,
}

pub async fn publish(client: Client, stream: String, stop: CancellationToken, seen: Arc<Mutex<Seen>>) {
    let publisher = client.publisher(&stream).open().await.unwrap();
    let (tx, mut pending) = mpsc::channel::<(u64, Instant, mainstem::client::PendingAck)>(4_096);
    let acks = tokio::spawn({
        let seen = seen.clone();
        async move {
            while let Some((n, sent, ack)) = pending.recv().await {
                let ack = ack.await;
                let mut seen = seen.lock();
                seen.longest = seen.longest.max(sent.elapsed());
                match ack {
                    Ok(ack) => drop(seen.acked.insert(n, (ack.shard, ack.sequence.expect("no duplicate")))),
                    Err(e) => seen
                        .failures
                        .push(format!("message {n} after {:?}: {e}", sent.elapsed())),
                }
            }
        }
    });
    let mut n = 0;
    while !stop.is_cancelled() {
        let message = Message::new(format!("{stream}.{}", n % 16), format!("message {n}"));
        match publisher.publish(&message).await {
            Ok(ack) => tx.send((n, Instant::now(), ack)).await.unwrap(),
            Err(e) => seen.lock().failures.push(format!("message {n} was not taken: {e}")),
        }
        n += 1;
        tokio::time::sleep(PACE).await;
    }
    drop(tx);
    publisher.close().await.unwrap();
    acks.await.unwrap();
}

/// Reads from the beginning, in one session, until told to stop.
async fn read(
    addr: String,
    stream: String,
    stop: CancellationToken,
    seen: Arc<Mutex<Seen>>,
) -> BTreeMap<(u32, u64), Vec<u8>> {
    let api = Api::connect(&addr).await.unwrap();
    let open = v1::ReadOpen {
        stream: stream.clone(),
        ..v1::ReadOpen::default()
    };
    let mut reader = api.read(open).await.unwrap();
    let mut read = BTreeMap::new();
    let mut next: BTreeMap<u32, u64> = BTreeMap::new();
    loop {
        let event = tokio::select! {
            event = reader.next() => event,
            () = stop.cancelled() => return read,
        };
        match event {
            Ok(Some(Event::Messages(messages))) => {
                for m in messages {
                    let expected = next.entry(m.shard).or_insert(1);
                    if m.sequence != *expected {
                        let text = format!("{stream}: read {} of shard {}, not {expected}", m.sequence, m.shard);
                        seen.lock().failures.push(text);
                    }
                    *expected = m.sequence + 1;
                    read.insert((m.shard, m.sequence), m.record.payload);
                    seen.lock().read += 1;
                }
            }
            Ok(Some(_)) => {}
            other => {
                seen.lock()
                    .failures
                    .push(format!("{stream}: the reader's session ended: {other:?}"));
                return read;
            }
        }
    }
}

impl Flow {
    /// `reader`: the node whose session reads.
    pub fn start(cluster: &Cluster, stream: &str, reader: usize) -> Self {
        Self::start_with(client(cluster), cluster, stream, reader)
    }

    /// The publisher is connected to this node, whoever leads.
    pub fn start_at(cluster: &Cluster, stream: &str, at: usize) -> Self {
        let mut config = ClientConfig::new([cluster[at].client_addr()]);
        config.learn_nodes = false;
        Self::start_with(Client::new(config).unwrap(), cluster, stream, at)
    }

    fn start_with(client: Client, cluster: &Cluster, stream: &str, reader: usize) -> Self {
        let (stop, stop_reading) = (CancellationToken::new(), CancellationToken::new());
        let seen = Arc::new(Mutex::new(Seen::default()));
        let publishing = publish(client, stream.into(), stop.clone(), seen.clone());
        let addr = cluster[reader].client_addr();
        let reading = read(addr, stream.into(), stop_reading.clone(), seen.clone());
        Self {
            stream: stream.into(),
            publishing: tokio::spawn(publishing),
            reading: tokio::spawn(reading),
            stop,
            stop_reading,
            seen,
        }
    }

    fn acked(&self) -> usize {
        self.seen.lock().acked.len()
    }

    /// Waits until so many more are acknowledged: it goes on.
    pub async fn goes_on(&self, more: usize) {
        let before = self.acked();
        until("publishing goes on", async || {
            let seen = self.seen.lock();
            assert!(seen.failures.is_empty(), "{}: {:#?}", self.stream, seen.failures);
            seen.acked.len() >= before + more
        })
        .await;
    }

    /// The longest wait for an acknowledgement since the last call.
    pub fn longest(&self) -> Duration {
        std::mem::take(&mut self.seen.lock().longest)
    }

    /// Ends it and checks everything: each message is there once, where its acknowledgement says, in order.
    pub async fn end(self, node: &Node) {
        self.stop.cancel();
        tokio::time::timeout(PATIENCE, self.publishing)
            .await
            .expect("the publisher ends")
            .unwrap();
        // A replica may be leaving the node in this moment.
        let begun = Instant::now();
        let stored: Vec<Read> = loop {
            match node.api().await.read_all(&self.stream).await {
                Ok(stored) => break stored,
                Err(failure) if failure.retry == "did_not_happen" && begun.elapsed() < PATIENCE => {
                    println!("read again: {failure:?}");
                }
                Err(failure) => panic!("not everything is read: {failure:?}"),
            }
        };
        let total = stored.len() as u64;
        until("the reader has everything", async || self.seen.lock().read >= total).await;
        self.stop_reading.cancel();
        let read = tokio::time::timeout(PATIENCE, self.reading)
            .await
            .expect("the reader ends")
            .unwrap();
        let seen = self.seen.lock();
        assert!(seen.failures.is_empty(), "{}: {:#?}", self.stream, seen.failures);
        let mut next: BTreeMap<u32, u64> = BTreeMap::new();
        let mut last: BTreeMap<(u32, String), u64> = BTreeMap::new();
        let mut found: BTreeMap<u64, (u32, u64)> = BTreeMap::new();
        for m in &stored {
            let expected = next.entry(m.shard).or_insert(1);
            assert_eq!(m.sequence, *expected, "{}: shard {} has a hole", self.stream, m.shard);
            *expected += 1;
            let text = String::from_utf8(m.record.payload.clone()).unwrap();
            let n: u64 = text.strip_prefix("message ").unwrap().parse().unwrap();
            assert!(
                found.insert(n, (m.shard, m.sequence)).is_none(),
                "{}: {text} is there twice",
                self.stream
            );
            let before = last.insert((m.shard, m.record.subject.clone()), n);
            assert!(
                before.is_none_or(|before| before < n),
                "{}: {text} is out of order",
                self.stream
            );
            if let Some(payload) = read.get(&(m.shard, m.sequence)) {
                assert_eq!(
                    payload, &m.record.payload,
                    "{}: the reader saw something else",
                    self.stream
                );
            }
        }
        assert_eq!(
            found, seen.acked,
            "{}: what is stored is what was acknowledged",
            self.stream
        );
        println!(
            "{}: {} messages stored, {} seen by the reader in its one session",
            self.stream,
            stored.len(),
            read.len()
        );
    }
}
