//! Clients of a cluster: they publish to and read from any node, go on elsewhere when one does not answer, and check
//! what they are told as it comes.
//!
//! Per stream: a producer that resumes under its number, one that begins anew, a unary publisher with message ids, and a
//! follower per shard. Per node: a reader whose reads must be linearizable. On streams that are named for it, and that
//! nobody else publishes to: contenders, whose publishes expect what they last saw.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstem::wire::v1;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::api::{Api, Event, Failure};
use super::history::Expect;
use super::load::{Manner, Producer, Unary};
use super::messages::{Shape, message_of, random_records, subjects};
use super::{History, PATIENCE};

/// A stream of this name is contended for.
pub const CONTENDED: &str = "contended";
const CONTENDERS: u64 = 2;
/// Before a client that was turned away tries elsewhere.
const PAUSE: Duration = Duration::from_millis(60);

/// How often something happened.
#[derive(Clone, Default)]
pub struct Counts(Arc<Mutex<BTreeMap<String, u64>>>);

impl Counts {
    pub fn add(&self, what: impl Into<String>) {
        *self.0.lock().unwrap().entry(what.into()).or_default() += 1;
    }

    fn failed(&self, who: &str, failure: &Failure) {
        let reason = match failure.reason.as_str() {
            "" => format!("{:?}", failure.code),
            reason => reason.to_string(),
        };
        self.add(format!("{who}: {reason}, {}", failure.retry));
    }

    pub fn of(&self, what: &str) -> u64 {
        self.0.lock().unwrap().get(what).copied().unwrap_or(0)
    }
}

impl std::fmt::Display for Counts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let counts = self.0.lock().unwrap();
        let all: Vec<String> = counts.iter().map(|(what, n)| format!("{n} × {what}")).collect();
        f.write_str(&all.join(" · "))
    }
}

/// What every client needs.
#[derive(Clone)]
struct Client {
    history: Arc<History>,
    addresses: Vec<String>,
    stop: CancellationToken,
    counts: Counts,
    manner: Manner,
}

impl Client {
    /// Waits a moment before the next attempt; false when it is time to end.
    async fn again(&self) -> bool {
        tokio::select! {
            () = self.stop.cancelled() => false,
            () = tokio::time::sleep(PAUSE) => true,
        }
    }

    /// A session that is told to end after so long, and when everybody is.
    async fn turn<S: Future>(&self, length: Duration, session: impl FnOnce(CancellationToken) -> S) -> S::Output {
        let turn = self.stop.child_token();
        let turn_over = async {
            tokio::time::sleep(length).await;
            turn.cancel();
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = session(turn.clone()) => ended,
            () = turn_over => unreachable!("it never ends"),
        }
    }

    fn anywhere(&self, rng: &mut StdRng) -> &str {
        &self.addresses[rng.random_range(0..self.addresses.len())]
    }

    fn manner(&self, rng: &mut StdRng) -> Manner {
        // Some give up before the cluster has done what it can, some only when it has given up itself.
        let patience = Duration::from_millis(rng.random_range(800..12_000));
        Manner {
            patience,
            ..self.manner
        }
    }
}

pub struct Crowd {
    pub counts: Counts,
    stop: CancellationToken,
    tasks: Vec<JoinHandle<()>>,
}

impl Crowd {
    /// `addresses` are the nodes', which must stay over restarts.
    pub fn start(history: &Arc<History>, addresses: &[String], streams: &[v1::Stream], seed: u64) -> Self {
        let stop = CancellationToken::new();
        let counts = Counts::default();
        let client = Client {
            history: history.clone(),
            addresses: addresses.to_vec(),
            stop: stop.clone(),
            counts: counts.clone(),
            manner: Manner {
                window: 8,
                pace: Duration::from_millis(5),
                patience: PATIENCE,
                cluster: true,
            },
        };
        let mut rng = StdRng::seed_from_u64(seed);
        let mut tasks = Vec::new();
        let mut shards = Vec::new();
        for stream in streams {
            let name = &stream.spec.as_ref().unwrap().name;
            for shard in 0..stream.shards.len() as u32 {
                shards.push((name.clone(), shard));
                tasks.push(tokio::spawn(follow(client.clone(), name.clone(), shard, rng.random())));
            }
            if name == CONTENDED {
                for _ in 0..CONTENDERS {
                    tasks.push(tokio::spawn(contend(client.clone(), stream.clone(), rng.random())));
                }
                continue;
            }
            for resumes in [true, false] {
                let produced = produce(client.clone(), stream.clone(), rng.random(), resumes);
                tasks.push(tokio::spawn(produced));
            }
            tasks.push(tokio::spawn(publish_one_by_one(
                client.clone(),
                stream.clone(),
                rng.random(),
            )));
        }
        for (node, address) in addresses.iter().enumerate() {
            let who = format!("node {node}");
            let reading = read_everything(client.clone(), who, address.clone(), shards.clone(), rng.random());
            tasks.push(tokio::spawn(reading));
        }
        Self { counts, stop, tasks }
    }

    /// Everybody takes the answers that are due, and goes.
    pub async fn stop(self) -> Counts {
        self.stop.cancel();
        for task in self.tasks {
            timeout(PATIENCE, task)
                .await
                .expect("a client does not end")
                .expect("a client panicked");
        }
        self.counts
    }
}

async fn produce(client: Client, stream: v1::Stream, seed: u64, resumes: bool) {
    let mut rng = StdRng::seed_from_u64(seed);
    let who = if resumes { "producer" } else { "producer without memory" };
    let mut producer = Producer::new(client.history.clone(), &stream, rng.random(), resumes, Shape::default());
    loop {
        producer.manner = client.manner(&mut rng);
        let address = client.anywhere(&mut rng).to_string();
        // Not every session is for ever: others see what it has left.
        let length = Duration::from_millis(rng.random_range(300..8_000));
        let (_, result) = client.turn(length, |turn| producer.run(&address, turn)).await;
        if let Err(failure) = result {
            client.counts.failed(who, &failure);
        }
        if !client.again().await {
            return producer.give_up();
        }
    }
}

async fn publish_one_by_one(client: Client, stream: v1::Stream, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut publisher = Unary::new(client.history.clone(), &stream, rng.random(), Shape::default());
    loop {
        publisher.manner = client.manner(&mut rng);
        let address = client.anywhere(&mut rng).to_string();
        let length = Duration::from_millis(rng.random_range(100..3_000));
        let result = client.turn(length, |turn| publisher.run(&address, turn)).await;
        if let Err(failure) = result {
            client.counts.failed("unary publisher", &failure);
        }
        if !client.again().await {
            return publisher.give_up();
        }
    }
}

/// Publishes one message after the other, each only if nobody else was quicker.
async fn contend(client: Client, stream: v1::Stream, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let name = stream.spec.as_ref().unwrap().name.clone();
    let subject = subjects(&stream)[0][..1].to_vec();
    let mut last = 0;
    loop {
        let address = client.anywhere(&mut rng).to_string();
        let patience = client.manner(&mut rng).patience;
        if let Ok(Ok(api)) = timeout(patience, Api::connect(&address)).await {
            for _ in 0..rng.random_range(1..20) {
                if client.stop.is_cancelled()
                    || !attempt(&client, &mut rng, &api, &name, &subject, &mut last, patience).await
                {
                    break;
                }
                tokio::time::sleep(client.manner.pace).await;
            }
        }
        if !client.again().await {
            return;
        }
    }
}

/// One publish with an expectation; false when it is better to go on elsewhere. All messages have one subject, so that
/// its last sequence is the shard's.
async fn attempt(
    client: &Client,
    rng: &mut StdRng,
    api: &Api,
    stream: &str,
    subject: &[String],
    last: &mut u64,
    patience: Duration,
) -> bool {
    let history = &client.history;
    let mut records = random_records(rng, subject, Shape::default());
    records.truncate(1);
    let number = history.sending(stream, 0, 0, &mut records);
    let mut expect = v1::Expectation::default();
    if rng.random_bool(0.5) {
        expect.last_sequence = Some(*last);
        history.expects(number, Expect::Last(*last));
    } else {
        expect.subject = Some(v1::SubjectExpectation {
            subject: subject[0].clone(),
            last_sequence: *last,
        });
        let (subject, last) = (subject[0].clone(), *last);
        history.expects(number, Expect::OfSubject { subject, last });
    }
    let before = history.tail(stream, 0);
    let request = v1::PublishRequest {
        namespace: String::new(),
        stream: stream.into(),
        messages: vec![message_of(&records[0])],
        expect: Some(expect),
    };
    let mut publisher = api.publisher();
    let answer = match timeout(patience, publisher.publish(request)).await {
        Ok(answer) => answer.map_err(Failure::from),
        Err(_) => {
            history.gave_up(number);
            return false;
        }
    };
    match answer {
        Ok(answer) => {
            let ack = &answer.get_ref().acks[0];
            history.acked(number, ack.shard, ack.sequence, ack.sequence);
            *last = ack.sequence;
            client.counts.add("expectation held");
            true
        }
        Err(failure) if failure.reason == "EXPECTATION_FAILED" => {
            let actual = failure.metadata.get("actual").and_then(|text| text.parse().ok());
            match actual {
                Some(actual) => {
                    history.expectation_failed(number, actual, before);
                    *last = actual;
                }
                None => history.violated(format!("a failed expectation without the actual value: {failure:?}")),
            }
            client.counts.add("expectation failed");
            true
        }
        Err(failure) => {
            client.counts.failed("contender", &failure);
            match failure.retry.as_str() {
                "did_not_happen" | "cannot_work" => history.refused(number),
                _ => history.gave_up(number),
            }
            false
        }
    }
}

/// Reads a shard from its beginning, now here, now there: nothing may be missing in between.
async fn follow(client: Client, stream: String, shard: u32, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut next = 1;
    loop {
        let address = client.anywhere(&mut rng).to_string();
        let length = Duration::from_millis(rng.random_range(200..6_000));
        let session = follow_at(&client, &address, &stream, shard, &mut next);
        if let Ok(Err(failure)) = timeout(length, session).await {
            client.counts.failed("follower", &failure);
        }
        if !client.again().await {
            return;
        }
    }
}

async fn follow_at(client: &Client, address: &str, stream: &str, shard: u32, next: &mut u64) -> Result<(), Failure> {
    let Ok(api) = Api::connect(address).await else {
        return Ok(());
    };
    let at = v1::start_position::At::Sequence(*next);
    let open = v1::ReadOpen {
        stream: stream.into(),
        shards: vec![shard],
        start: Some(v1::StartPosition { at: Some(at) }),
        ..Default::default()
    };
    let mut reader = api.read(open).await?;
    loop {
        let event = tokio::select! {
            () = client.stop.cancelled() => return Ok(()),
            event = reader.next() => event?,
        };
        match event {
            Some(Event::Messages(messages)) => {
                for m in &messages {
                    if m.sequence != *next {
                        client.history.violated(format!(
                            "{stream} shard {shard}: a follower at {address} was given {}, after {}",
                            m.sequence,
                            *next - 1
                        ));
                    }
                    *next = m.sequence + 1;
                }
                client.history.saw(stream, &messages);
            }
            Some(Event::Truncated(t)) => {
                client
                    .history
                    .violated(format!("{stream} shard {shard}: told that messages are gone: {t:?}"));
            }
            Some(_) => {}
            None => return Ok(()),
        }
    }
}

/// Reads at one node, again and again; whatever was acknowledged before a read began must be in it.
async fn read_everything(client: Client, who: String, address: String, shards: Vec<(String, u32)>, seed: u64) {
    let mut rng = StdRng::seed_from_u64(seed);
    loop {
        let patience = Duration::from_secs(rng.random_range(2..9));
        let reading = async {
            let Ok(api) = Api::connect(&address).await else {
                return Ok(());
            };
            for _ in 0..20 {
                let (stream, shard) = &shards[rng.random_range(0..shards.len())];
                let before = client.history.tail(stream, *shard);
                if rng.random_bool(0.5) {
                    read_tail(&client, &who, &api, stream, *shard, before).await?;
                } else if before > 1 {
                    get_last(&client, &who, &api, stream, *shard, before).await?;
                }
                if !client.again().await {
                    break;
                }
            }
            Ok(())
        };
        match timeout(patience, reading).await {
            Ok(Err(failure)) => client.counts.failed("reader", &failure),
            Ok(Ok(())) => {}
            Err(_) => client.counts.add("reader: no answer"),
        }
        if !client.again().await {
            return;
        }
    }
}

/// The last messages, up to the tail.
async fn read_tail(
    client: &Client,
    who: &str,
    api: &Api,
    stream: &str,
    shard: u32,
    before: u64,
) -> Result<(), Failure> {
    let at = v1::start_position::At::Sequence(before.saturating_sub(5).max(1));
    let open = v1::ReadOpen {
        stream: stream.into(),
        shards: vec![shard],
        start: Some(v1::StartPosition { at: Some(at) }),
        stop_at_tail: true,
        ..Default::default()
    };
    let mut reader = api.read(open).await?;
    let mut tail = None;
    let mut seen = Vec::new();
    while let Some(event) = reader.next().await? {
        match event {
            Event::Messages(messages) => seen.extend(messages),
            Event::CaughtUp(caught_up) => {
                tail = caught_up.tails.iter().find(|t| t.shard == shard).map(|t| t.sequence);
            }
            Event::GoAway(_) => return Ok(()),
            Event::Opened(_) | Event::Truncated(_) | Event::Heartbeat(_) => {}
        }
    }
    client.history.saw(stream, &seen);
    match (tail, seen.last()) {
        (Some(tail), Some(last)) if last.sequence + 1 != tail => client.history.violated(format!(
            "{stream} shard {shard}: a read at {who} ended with {}, and says its tail is {tail}",
            last.sequence
        )),
        (Some(tail), None) if tail > 1 => client.history.violated(format!(
            "{stream} shard {shard}: a read at {who} of the last messages had none, and says its tail is {tail}"
        )),
        (Some(tail), _) => {
            client.history.read_to(who, stream, shard, before, tail);
            client.counts.add("read to the tail");
        }
        (None, _) => client.history.violated(format!(
            "{stream} shard {shard}: a read at {who} ended before it was caught up"
        )),
    }
    Ok(())
}

/// The message that was acknowledged, or read, last.
async fn get_last(client: &Client, who: &str, api: &Api, stream: &str, shard: u32, before: u64) -> Result<(), Failure> {
    match api.get(stream, shard, before - 1).await {
        Ok(message) if message.sequence == before - 1 => {
            client.counts.add("last message read");
            Ok(())
        }
        Ok(message) => {
            client.history.violated(format!(
                "{stream} shard {shard}: {} was asked for at {who}, {} came",
                before - 1,
                message.sequence
            ));
            Ok(())
        }
        Err(failure) if ["NOT_RETAINED", "DELETED", "NO_MESSAGE"].contains(&failure.reason.as_str()) => {
            client.history.violated(format!(
                "{stream} shard {shard}: {} was known before a read at {who}, which says: {}",
                before - 1,
                failure.message
            ));
            Ok(())
        }
        Err(failure) => Err(failure),
    }
}
