//! The data plane over several nodes: every node takes publishes and serves reads, whether it leads the shard, follows,
//! or holds no replica of it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use mainstem::base::{Alarms, ByteBudget, Clock, RetryClass, Tasks};
use mainstem::broker::error::{PublishError, ReadError};
use mainstem::broker::ingest::{Item, Outcome, ReplyTo};
use mainstem::broker::lookup::{Consistency, Start};
use mainstem::broker::reader::Step;
use mainstem::broker::{Broker, ShardAccess};
use mainstem::control::view::{StreamView, View};
use mainstem::machine::{ItemOutcome, Refusal};
use mainstem::model::batch::{BatchBuilder, Codec, RecordFields};
use mainstem::model::{Sequence, ShardMap};
use mainstem::raft::{MetaChange, MetaObserver};
use mainstem::wire::{internal as pb, v1};
use tokio::sync::mpsc;

use super::lab::*;

/// Nodes with a replica; one more has none.
const VOTERS: u64 = 3;
const OUTSIDER: usize = 3;

/// The data plane of one node.
struct Plane {
    broker: Arc<Broker>,
    tasks: Tasks,
}

fn catalog() -> Vec<MetaChange> {
    let group = pb::GroupRecord {
        group_id: GROUP.get(),
        replicas: (1..=VOTERS)
            .map(|n| pb::ReplicaRecord {
                replica_id: replica(GROUP, n).get(),
                node_id: n,
                ..pb::ReplicaRecord::default()
            })
            .collect(),
        ..pb::GroupRecord::default()
    };
    let stream = pb::StreamRecord {
        stream_id: format!("{:032x}", SHARD_OF(GROUP).get()),
        epoch: 1,
        revision: 1,
        state: v1::StreamState::Active.into(),
        spec: Some(v1::StreamSpec {
            namespace: "default".into(),
            name: "s".into(),
            subjects: vec![">".into()],
            shards: 1,
            ..v1::StreamSpec::default()
        }),
        map: Some(v1::ShardMap::from(&ShardMap::even(1).unwrap())),
        shards: vec![pb::ShardPlacement {
            index: 0,
            shard_id: SHARD_OF(GROUP).get(),
            group_id: GROUP.get(),
            ..pb::ShardPlacement::default()
        }],
        ..pb::StreamRecord::default()
    };
    vec![MetaChange::Group(Arc::new(group)), MetaChange::Stream(Arc::new(stream))]
}

impl Plane {
    fn start(node: &Node) -> Plane {
        let view = Arc::new(View::default());
        view.changed(&catalog());
        let tasks = Tasks::new("plane");
        let clock = Clock::system();
        let broker = Broker::start(
            view,
            node.groups.clone(),
            node.store.clone(),
            clock.clone(),
            Alarms::new(clock),
            tasks.clone(),
            ByteBudget::new("test_publishes", 64 << 20),
            Some(node.peers.clone()),
        );
        Plane { broker, tasks }
    }

    async fn stop(self) {
        self.tasks.cancel();
        // What is under way at a dead node's peers may take its time.
        let _ = self.tasks.drain(Duration::from_secs(30)).await;
    }

    fn stream(&self) -> Arc<StreamView> {
        self.broker.stream("", "s").unwrap()
    }

    fn access(&self) -> ShardAccess {
        self.broker.shard(&self.stream(), 0).unwrap()
    }

    fn item(&self, batch: Bytes, tag: u64, channel: mpsc::Sender<(u64, Outcome)>) -> Item {
        Item {
            permit: self.broker.publish_memory().try_acquire(batch.len()).unwrap(),
            batch,
            producer: None,
            expect: None,
            relayed: false,
            reply: ReplyTo {
                tag,
                submitted: Instant::now(),
                channel,
            },
        }
    }

    /// Publishes one message without a producer's number, once.
    async fn publish_once(&self, n: u64, expect: Option<v1::Expectation>) -> Outcome {
        let (tx, mut rx) = mpsc::channel(1);
        let mut item = self.item(batch(n), n, tx);
        item.expect = expect;
        self.broker.submit(&self.access(), item);
        let answer = tokio::time::timeout(PATIENCE, rx.recv()).await;
        answer.expect("an outcome in time").expect("an outcome").1
    }

    /// Where a message is, if it is stored.
    async fn find(&self, n: u64) -> Option<Sequence> {
        let access = self.access();
        steady(|| self.broker.barrier(&access)).await.unwrap();
        let stored = access.positions().tail.get() - 1;
        let all = self.read(Start::Beginning, stored as usize).await;
        let found = all.into_iter().find(|(_, payload)| *payload == text(n));
        found.map(|(sequence, _)| Sequence::new(sequence))
    }

    /// As `publish_once`, again as long as it did not happen.
    async fn publish(&self, n: u64) -> Sequence {
        let begun = Instant::now();
        loop {
            match self.publish_once(n, None).await {
                Ok(ItemOutcome::Stored(stored)) => {
                    assert_eq!(stored.first, stored.last);
                    return stored.first;
                }
                Ok(other) => panic!("not stored: {other:?}"),
                Err(e) => {
                    assert_ne!(e.retry_class(), RetryClass::CannotWork, "{e}");
                    assert!(begun.elapsed() < PATIENCE, "{e}");
                    // An election fell into it. What is not there behind a barrier never will be: the leader that took
                    // it is deposed, or it is in the log.
                    if e.retry_class() == RetryClass::MayHaveHappened
                        && let Some(sequence) = self.find(n).await
                    {
                        return sequence;
                    }
                }
            }
        }
    }

    /// Messages from a sequence on, as (sequence, payload), until `count` have come.
    async fn read(&self, from: Start, count: usize) -> Vec<(u64, String)> {
        let access = self.access();
        let begun = Instant::now();
        while let Err(e) = self.broker.barrier(&access).await {
            assert!(begun.elapsed() < PATIENCE, "{e}");
        }
        let next = self.broker.start_of(&access, from).await.unwrap();
        let mut reader = self.broker.reader(&access, next, None);
        let mut messages = Vec::new();
        while messages.len() < count {
            match reader.step(1_000, 1 << 20).await {
                Ok(Step::Deliver(delivery)) => {
                    for (sequence, record) in delivery.records().unwrap() {
                        let payload = String::from_utf8(record.payload.to_vec()).unwrap();
                        messages.push((sequence.get(), payload));
                    }
                }
                Ok(Step::Skipped) => {}
                Ok(Step::Truncated { from, to }) => panic!("truncated from {from} to {to}"),
                Ok(Step::AtTail(_)) => {
                    let news = tokio::time::timeout(PATIENCE, reader.changed()).await;
                    assert!(news.is_ok(), "only {} of {count} messages came", messages.len());
                }
                Err(e) => {
                    assert_eq!(e.retry_class(), RetryClass::DidNotHappen, "{e}");
                    assert!(begun.elapsed() < PATIENCE, "{e}");
                }
            }
        }
        messages
    }
}

/// Repeats a read for as long as it certainly did not happen, as a client does: elections fall where they like.
async fn steady<T, F>(mut read: impl FnMut() -> F) -> Result<T, ReadError>
where
    F: Future<Output = Result<T, ReadError>>,
{
    let begun = Instant::now();
    loop {
        match read().await {
            Err(e) if e.retry_class() == RetryClass::DidNotHappen => assert!(begun.elapsed() < PATIENCE, "{e}"),
            result => return result,
        }
    }
}

fn batch(n: u64) -> Bytes {
    let mut builder = BatchBuilder::new();
    builder
        .push(&RecordFields {
            subject: ["a.b", "a.c", "d"][(n % 3) as usize],
            key: None,
            message_id: None,
            event_time: None,
            headers: &[],
            payload: text(n).as_bytes(),
        })
        .unwrap();
    builder.build(Codec::None).unwrap()
}

/// Three nodes with a replica each and one without.
async fn lab() -> (Lab, Vec<Option<Plane>>) {
    let mut lab = Lab::new(VOTERS as usize + 1, Settings::default()).await;
    lab.found(GROUP, VOTERS).await;
    let planes = lab.running().map(|node| Some(Plane::start(node))).collect();
    (lab, planes)
}

async fn end(lab: Lab, planes: Vec<Option<Plane>>) {
    for plane in planes.into_iter().flatten() {
        plane.stop().await;
    }
    lab.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_node_publishes_and_sees_at_once_what_was_acknowledged_elsewhere() {
    let (lab, planes) = lab().await;
    let planes_ref: Vec<&Plane> = planes.iter().flatten().collect();
    let mut last = 0;
    for n in 0..24 {
        let at = n as usize % planes_ref.len();
        let sequence = planes_ref[at].publish(n).await;
        assert!(sequence.get() > last, "message {n} got {sequence} after {last}");
        last = sequence.get();
        // Acknowledged here, seen there: by sequence, as the last of its subject, and as the first of its time.
        let reader = planes_ref[(n as usize + 1 + n as usize / 4) % planes_ref.len()];
        let stream = reader.stream();
        let access = reader.broker.shard(&stream, 0).unwrap();
        let now = Consistency::Linearizable;
        let found = steady(|| reader.broker.get_by_sequence(&access, sequence, now))
            .await
            .unwrap();
        assert_eq!(found.record.payload, text(n));
        let subject = ["a.b", "a.c", "d"][(n % 3) as usize];
        let newest = steady(|| reader.broker.get_last_by_subject(&stream, &access, subject, now))
            .await
            .unwrap();
        assert_eq!((newest.sequence, newest.record.payload), (sequence, text(n).into()));
        let timed = steady(|| reader.broker.get_first_at(&stream, &access, found.append_time, now))
            .await
            .unwrap();
        assert!(timed.sequence <= sequence);
        let beyond = steady(|| reader.broker.get_by_sequence(&access, sequence.plus(1), now)).await;
        assert_eq!(beyond.unwrap_err().reason(), "NOT_RETAINED");
    }
    assert_eq!(last, 24);
    for (at, plane) in planes_ref.iter().enumerate() {
        let all = plane.read(Start::Beginning, 24).await;
        let expected: Vec<_> = (0..24).map(|n| (n + 1, text(n))).collect();
        assert_eq!(all, expected, "node {}", at + 1);
        let tail = plane.read(Start::Last(3), 3).await;
        assert_eq!(tail, expected[21..], "node {}", at + 1);
    }
    // What a refusal says does not depend on the node.
    for plane in &planes_ref {
        let expect = v1::Expectation {
            last_sequence: Some(7),
            subject: None,
        };
        let refused = plane.publish_once(99, Some(expect)).await.unwrap();
        let actual = Sequence::new(24);
        assert_eq!(refused, ItemOutcome::Refused(Refusal::LastSequence { actual }));
    }
    end(lab, planes).await;
}

/// A producer's session: numbers from 1, a window of them under way; what is answered as not stored is sent again, from
/// there on, as the client does. Gives each number's sequence, and checks that errors come only after a long wait.
async fn session(plane: &Plane, producer: u64, count: u64) -> Vec<u64> {
    const WINDOW: u64 = 64;
    let mut sequences: Vec<u64> = Vec::new();
    let begun = Instant::now();
    while (sequences.len() as u64) < count {
        assert!(
            begun.elapsed() < PATIENCE,
            "producer {producer} got {} acks",
            sequences.len()
        );
        let (tx, mut rx) = mpsc::channel(WINDOW as usize);
        let first = sequences.len() as u64 + 1;
        let (mut sent, mut answered, mut broken) = (first, first, None);
        while answered < sent || (broken.is_none() && answered <= count) {
            while broken.is_none() && sent <= count && sent - answered < WINDOW {
                let mut item = plane.item(batch(producer * 10_000 + sent), sent, tx.clone());
                item.producer = Some(pb::ProducerStamp {
                    producer_id: producer,
                    epoch: 1,
                    sequence: sent,
                });
                plane.broker.submit(&plane.access(), item);
                sent += 1;
                // Slow enough that the leader's end falls into it.
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            let answer = tokio::time::timeout(PATIENCE, rx.recv()).await;
            let (tag, outcome) = answer.expect("an outcome in time").expect("an outcome");
            assert_eq!(tag, answered, "answers come in order");
            answered += 1;
            match outcome {
                Ok(ItemOutcome::Stored(stored)) if broken.is_none() => sequences.push(stored.first.get()),
                Ok(ItemOutcome::Refused(Refusal::OutOfOrder { .. } | Refusal::UnknownProducer)) if broken.is_some() => {
                }
                Err(e) => {
                    println!("producer {producer}, number {tag}: {e}");
                    assert_ne!(e.retry_class(), RetryClass::CannotWork, "{e}");
                    broken.get_or_insert(tag);
                }
                Ok(other) => panic!("producer {producer}, number {tag}: {other:?} after {broken:?}"),
            }
        }
        if let Some(tag) = broken {
            let took = begun.elapsed();
            assert!(
                took > Duration::from_secs(2),
                "number {tag} was given up after {took:?}"
            );
        }
    }
    sequences
}

#[tokio::test(flavor = "multi_thread")]
async fn producers_elsewhere_outlive_the_leader_in_order_and_exactly_once() {
    const COUNT: u64 = 600;
    let (mut lab, mut planes) = lab().await;
    let leader = lab.leader(GROUP).await;
    let follower = (leader + 1) % VOTERS as usize;
    let other = (leader + 2) % VOTERS as usize;
    let victim = planes[leader].take().unwrap();
    let at = |at: usize| planes[at].as_ref().unwrap();
    let publishing = async {
        tokio::join!(
            session(at(follower), 1, COUNT),
            session(at(OUTSIDER), 2, COUNT),
            session(at(other), 3, COUNT),
        )
    };
    let reading = async {
        let all = 3 * COUNT as usize;
        tokio::join!(
            at(OUTSIDER).read(Start::Beginning, all),
            at(follower).read(Start::Beginning, all),
        )
    };
    let killing = async {
        tokio::time::sleep(Duration::from_millis(700)).await;
        victim.stop().await;
        lab.kill(leader).await;
    };
    let (published, (outside, beside), ()) = tokio::join!(publishing, reading, killing);
    assert_eq!(
        outside.len(),
        3 * COUNT as usize,
        "as many as were published, once each"
    );
    assert_eq!(outside, beside);
    for ((sequence, _), n) in outside.iter().zip(1..) {
        assert_eq!(*sequence, n, "sequences are dense");
    }
    for (sequences, producer) in [published.0, published.1, published.2].iter().zip(1..) {
        for (sequence, n) in sequences.iter().zip(1..) {
            let (found, payload) = &outside[*sequence as usize - 1];
            assert_eq!((*found, payload), (*sequence, &text(producer * 10_000 + n)));
        }
        assert!(sequences.is_sorted(), "producer {producer} lost its order");
    }
    end(lab, planes).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_a_publish_is_refused_as_not_processed_at_every_node() {
    let (mut lab, mut planes) = lab().await;
    for at in [0, OUTSIDER] {
        planes[at].as_ref().unwrap().publish(at as u64).await;
    }
    let leader = lab.leader(GROUP).await;
    let survivor = (leader + 1) % VOTERS as usize;
    for at in [leader, (leader + 2) % VOTERS as usize] {
        planes[at].take().unwrap().stop().await;
        lab.kill(at).await;
    }
    for at in [survivor, OUTSIDER] {
        let plane = planes[at].as_ref().unwrap();
        let begun = Instant::now();
        loop {
            let error = plane.publish_once(7, None).await.unwrap_err();
            // One may still have been on its way to the leader that ended.
            if error.retry_class() == RetryClass::DidNotHappen
                && let PublishError::NoQuorum { reach, .. } = error
            {
                assert_eq!((reach.live, reach.needed, reach.replicas), (1, 2, 3));
                break;
            }
            assert!(begun.elapsed() < PATIENCE, "{error}");
        }
        let access = plane.broker.shard(&plane.stream(), 0).unwrap();
        let read = plane
            .broker
            .get_by_sequence(&access, Sequence::FIRST, Consistency::Linearizable)
            .await;
        assert_eq!(read.unwrap_err().retry_class(), RetryClass::DidNotHappen);
    }
    // One comes back, and everything goes on.
    lab.restart(leader, GROUP).await;
    planes[leader] = Some(Plane::start(lab.node(leader)));
    for at in [survivor, OUTSIDER, leader] {
        planes[at].as_ref().unwrap().publish(50 + at as u64).await;
    }
    let all = planes[OUTSIDER].as_ref().unwrap().read(Start::Beginning, 5).await;
    assert_eq!(all.len(), 5, "{all:?}");
    end(lab, planes).await;
}
