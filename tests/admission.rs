//! What a server takes in hand, and what it refuses: all of a publish or nothing of it, and no more memory than told.
#![allow(clippy::unwrap_used)]

mod harness;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::api::{Api, Event};
use harness::batch::{Codec, Record, encode};
use harness::{Node, Options, until};
use mainstem::wire::v1;
use tonic::Code;

fn message(subject: &str, payload: Vec<u8>) -> v1::Message {
    v1::Message {
        subject: subject.into(),
        payload: payload.into(),
        ..Default::default()
    }
}

/// A subject of each of the two shards of stream `s`.
async fn a_subject_in_each(api: &Api) -> [String; 2] {
    let mut found = [None, None];
    for n in 0.. {
        let subject = format!("s.{n}");
        let ack = api.publish("s", vec![message(&subject, vec![0])]).await.unwrap().acks[0];
        found[ack.shard as usize].get_or_insert(subject);
        if let [Some(first), Some(second)] = &found {
            return [first.clone(), second.clone()];
        }
    }
    unreachable!("some subject hashes to each shard")
}

/// A publish over two shards for whose second part there is no memory is refused as not processed, and the first part
/// is not stored either.
#[tokio::test(flavor = "multi_thread")]
async fn a_publish_over_shards_is_refused_before_any_shard_has_it() {
    const PUBLISH_USED: &str = "base_budget_used_bytes{budget=\"publish\"}";
    let node = Node::start(Options::faulty().flag("--publish-memory", "16MiB")).await;
    let api = node.api().await;
    api.create_simple("s", 2).await;
    let subjects = a_subject_in_each(&api).await;
    until("nothing is in hand", async || node.metric(PUBLISH_USED).await == 0.0).await;
    let before = api.read_all("s").await.unwrap().len();
    // While the disk is busy a session's batch holds half of the memory.
    node.faults("sync-delay-us 10000000");
    let mut session = api.session_on("s").await.unwrap();
    let shard = api.stream("s").await.unwrap().shards[0].index;
    let records: Vec<_> = (0..2)
        .map(|_| Record::new(&subjects[shard as usize], vec![7; 4_000_000]))
        .collect();
    let batch = v1::PublishBatch {
        shard,
        map_epoch: session.map_epoch(),
        producer_sequence: 1,
        batch: encode(&records, Codec::None),
        expect: None,
    };
    assert!(session.send(batch).await);
    until("the batch is in hand", async || node.metric(PUBLISH_USED).await > 8e6).await;
    // Either part would fit, both do not.
    let parts = |payload: &[u8]| -> Vec<v1::Message> {
        let messages = subjects.iter().flat_map(|s| [s, s]);
        messages.map(|s| message(s, payload.to_vec())).collect()
    };
    let refusal = api.publish("s", parts(&vec![9; 2_500_000])).await.unwrap_err();
    assert_eq!(
        (refusal.code, refusal.reason.as_str(), refusal.retry.as_str()),
        (Code::ResourceExhausted, "OVERLOADED", "did_not_happen"),
        "{refusal:?}"
    );
    node.faults("sync-delay-us 0");
    match session.next().await.unwrap() {
        Some(v1::publish_session_response::Frame::Ack(_)) => {}
        other => panic!("{other:?}"),
    }
    let stored = api.read_all("s").await.unwrap();
    assert_eq!(stored.len(), before + 2, "only the session's batch was stored");
    assert!(stored.iter().all(|m| m.record.payload.first() != Some(&9)));
    // With room again, the same publish is stored whole.
    until("the memory is back", async || node.metric(PUBLISH_USED).await == 0.0).await;
    let acks = api.publish("s", parts(&vec![9; 2_500_000])).await.unwrap().acks;
    assert_eq!(acks.len(), 4);
    assert_eq!(api.read_all("s").await.unwrap().len(), before + 6);
}

/// 300 MiB in stream `s`, in batches of the largest size.
async fn fill(api: &Api) -> u64 {
    const BATCHES: u64 = 38;
    let mut session = api.session_on("s").await.unwrap();
    for sequence in 1..=BATCHES {
        let records: Vec<_> = (0..8)
            .map(|n| Record::new("s", vec![(sequence * 8 + n) as u8; 1_040_000]))
            .collect();
        session.ask(sequence, encode(&records, Codec::None)).await.unwrap();
    }
    BATCHES * 8
}

fn greedy(stream: &str) -> v1::ReadSessionRequest {
    let open = v1::ReadOpen {
        stream: stream.into(),
        start: Some(v1::StartPosition {
            at: Some(v1::start_position::At::Beginning(v1::Beginning {})),
        }),
        credit: Some(v1::ReadCredit {
            messages: u64::MAX,
            bytes: u64::MAX,
        }),
        ..Default::default()
    };
    v1::ReadSessionRequest {
        frame: Some(v1::read_session_request::Frame::Open(open)),
    }
}

/// A client process that is stopped while it reads: its socket stays open, and nobody reads from it.
struct Stopped(std::process::Child);

impl Stopped {
    #[allow(unsafe_code)]
    async fn start(node: &Node) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_mainstem"))
            .args(["sub", "s", "--raw", "--server", &node.client_addr()])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut stopped = Self(child);
        // It has begun to read when it has written something.
        let mut out = stopped.0.stdout.take().unwrap();
        let out = tokio::task::spawn_blocking(move || {
            std::io::Read::read_exact(&mut out, &mut [0; 1000]).unwrap();
            out
        });
        stopped.0.stdout = Some(out.await.unwrap());
        // SAFETY: takes numbers only; the child has not been waited for, so its number is its own.
        assert_eq!(unsafe { libc::kill(stopped.0.id() as i32, libc::SIGSTOP) }, 0);
        stopped
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

type Idle = (
    tokio::sync::mpsc::Sender<v1::ReadSessionRequest>,
    tonic::Streaming<v1::ReadSessionResponse>,
);

/// Sessions that may be sent all of stream `s` and are not read from. A connection each, so that they do not share a
/// window.
async fn idle_readers(node: &Node, count: usize) -> Vec<Idle> {
    let mut idle = Vec::new();
    for _ in 0..count {
        let api = node.api().await;
        let (to, from) = tokio::sync::mpsc::channel(4);
        to.send(greedy("s")).await.unwrap();
        let requests = tokio_stream::wrappers::ReceiverStream::new(from);
        idle.push((to, api.reader().read_session(requests).await.unwrap().into_inner()));
    }
    idle
}

/// Reads all messages of stream `s`, and tells how long it took.
async fn read_whole(node: &Node, messages: u64) -> Duration {
    let begun = Instant::now();
    let api = node.api().await;
    let open = v1::ReadOpen {
        stream: "s".into(),
        stop_at_tail: true,
        ..Default::default()
    };
    let mut reader = api.read(open).await.unwrap();
    let mut seen = 0;
    while let Some(event) = reader.next().await.unwrap() {
        if let Event::Messages(messages) = event {
            for m in messages {
                seen += 1;
                assert_eq!(m.sequence, seen);
            }
        }
    }
    assert_eq!(seen, messages);
    begun.elapsed()
}

/// Two dozen clients ask for 300 MiB each and read none of it; others publish and never look at their acks. The server's
/// memory stays within its budget, other clients go on, and when the idle ones are gone so is what they held.
///
/// The bound: the budgets for reads (64 MiB) and publishes (64 MiB), the session windows, one encoded frame in the
/// transport for each session (9 MiB at most, 1 MiB while memory is short), and slack for the allocator. Without the
/// budget each of these sessions holds some 50 MiB, 1.2 GiB together.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_read_do_not_take_the_servers_memory() {
    const READ_USED: &str = "base_budget_used_bytes{budget=\"read\"}";
    const READERS: usize = 24;
    const GROWTH_MAX: u64 = 400 << 20;
    let options = Options::plain()
        .flag("--storage-log-write-buffer", "16MiB")
        .flag("--storage-state-write-buffer", "8MiB")
        .flag("--storage-block-cache", "8MiB");
    let node = Node::start(options).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    api.create_simple("other", 1).await;
    let messages = fill(&api).await;
    let alone = read_whole(&node, messages).await;
    let (_, before) = node.memory();
    let idle = idle_readers(&node, READERS).await;
    let stopped = Stopped::start(&node).await;
    // Publishers that never take an ack: their sessions stop reading in turn. They have a runtime of their own, so that
    // their sockets close when they are dropped.
    let deaf = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .unwrap();
    let sent = Arc::new(AtomicU64::new(0));
    for _ in 0..4 {
        let (address, sent) = (node.client_addr(), sent.clone());
        deaf.spawn(async move {
            let api = Api::connect(&address).await.unwrap();
            let session = api.session_on("other").await.unwrap();
            let map_epoch = session.map_epoch();
            let batch = encode(&[Record::new("other", vec![1; 100])], Codec::None);
            for producer_sequence in 1.. {
                let batch = v1::PublishBatch {
                    shard: 0,
                    map_epoch,
                    producer_sequence,
                    batch: batch.clone(),
                    expect: None,
                };
                if !session.send(batch).await {
                    return;
                }
                sent.fetch_add(1, Ordering::Relaxed);
            }
        });
    }
    until("the deaf publishers publish", async || {
        sent.load(Ordering::Relaxed) > 1_000
    })
    .await;
    until("the idle sessions hold memory", async || {
        node.metric(READ_USED).await > 8e6
    })
    .await;

    // Others go on meanwhile: the whole stream is read, several times over, and publishes are answered. Had they to wait
    // for the idle ones to be given up, it would take half a minute each time.
    let mut peak = 0;
    for round in 0..4 {
        let took = read_whole(&node, messages + round).await;
        println!("300 MiB were read in {took:?}; with nobody else there, in {alone:?}");
        assert!(
            took < alone * 8 + Duration::from_secs(10),
            "{took:?} instead of {alone:?}"
        );
        api.publish("s", vec![message("s", vec![round as u8])]).await.unwrap();
        peak = peak.max(node.memory().1);
    }
    let used = node.metric(READ_USED).await;
    println!(
        "resident: {} MiB before, {} MiB at most; read memory in use: {} MiB",
        before >> 20,
        peak >> 20,
        used as u64 >> 20
    );
    assert!(used > 0.0 && used <= 64.0 * 1_048_576.0, "{used}");
    assert!(
        peak <= before + GROWTH_MAX,
        "{} MiB grew to {} MiB",
        before >> 20,
        peak >> 20
    );

    // They can be dropped, and what they held is free again.
    drop(idle);
    drop(stopped);
    deaf.shutdown_background();
    until("the memory is back", async || node.metric(READ_USED).await == 0.0).await;
    for kind in ["read", "publish"] {
        let open = format!("api_open_sessions{{kind=\"{kind}\"}}");
        until("the sessions are gone", async || node.metric(&open).await == 0.0).await;
    }
}

/// Single reads hold memory as well, until their answer is sent, and are refused where there is none.
#[tokio::test(flavor = "multi_thread")]
async fn answers_that_nobody_reads_are_bounded() {
    const READ_USED: &str = "base_budget_used_bytes{budget=\"read\"}";
    let node = Node::start(Options::plain().flag("--read-memory", "16MiB")).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    for _ in 0..8 {
        api.publish("s", vec![message("s", vec![5; 4_000_000])]).await.unwrap();
    }
    let get = async || api.get("s", 0, 1).await;
    get().await.unwrap();
    until("an answer that was read holds nothing", async || {
        node.metric(READ_USED).await == 0.0
    })
    .await;
    let stopped = idle_readers(&node, 24).await;
    let refusal = async || match get().await {
        Ok(_) => None,
        Err(e) => Some((e.code, e.reason, e.retry)),
    };
    let expected = (
        Code::ResourceExhausted,
        "OVERLOADED".to_string(),
        "did_not_happen".to_string(),
    );
    until("a get finds no memory", async || {
        refusal().await == Some(expected.clone())
    })
    .await;
    let fetch = v1::FetchRequest {
        stream: "s".into(),
        max_bytes: 8 << 20,
        ..Default::default()
    };
    let e: harness::Failure = api.reader().fetch(fetch).await.unwrap_err().into();
    assert_eq!((e.code, e.reason, e.retry), expected);
    drop(stopped);
    until("a get is answered again", async || get().await.is_ok()).await;
}

/// Where idle clients hold all of the memory, those who have waited for half a minute get theirs.
#[tokio::test(flavor = "multi_thread")]
async fn idle_clients_are_ended_when_others_wait() {
    let node = Node::start(Options::plain().flag("--read-memory", "16MiB")).await;
    let api = node.api().await;
    api.create_simple("s", 1).await;
    for _ in 0..30 {
        api.publish("s", vec![message("s", vec![5; 4_000_000])]).await.unwrap();
    }
    let mut idle = idle_readers(&node, 6).await;
    let took = read_whole(&node, 30).await;
    println!("read after {took:?}");
    // Whoever is ended is told when it reads again; at the latest now all can go on.
    let mut ended = 0;
    for (to, answers) in &mut idle {
        let mut bytes = 0;
        loop {
            match answers.message().await {
                Ok(Some(v1::ReadSessionResponse {
                    frame: Some(v1::read_session_response::Frame::Batch(batch)),
                })) => bytes += batch.batch.len(),
                Ok(Some(v1::ReadSessionResponse {
                    frame: Some(v1::read_session_response::Frame::CaughtUp(_)),
                })) => {
                    assert!(bytes > 30 * 4_000_000);
                    break;
                }
                Ok(Some(_)) => {}
                Ok(None) => panic!("a session must say why it ends"),
                Err(status) => {
                    let e = harness::Failure::from(status);
                    assert_eq!(
                        (e.code, e.reason.as_str()),
                        (Code::ResourceExhausted, "OVERLOADED"),
                        "{e:?}"
                    );
                    ended += 1;
                    break;
                }
            }
        }
        let _ = to;
    }
    println!("{ended} of {} idle sessions were ended", idle.len());
    assert!(ended > 0);
}
