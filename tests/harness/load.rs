//! Publishers and readers that keep a node busy while things happen to it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use mainstem::wire::v1;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use v1::publish_session_response::Frame;

use super::api::{Api, Event, Failure};
use super::batch::{self, Record};
pub use super::messages::Shape;
use super::messages::{message_of, random_codec, random_records, subjects};
use super::{History, PATIENCE};

/// How a load behaves towards the server.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Batches that may be unanswered.
    pub window: usize,
    /// Between two batches.
    pub pace: Duration,
    /// A server that says nothing for so long is given up.
    pub patience: Duration,
    /// There are other nodes, which send again among themselves.
    pub cluster: bool,
}

impl Default for Manner {
    fn default() -> Self {
        Self {
            window: 64,
            pace: Duration::ZERO,
            patience: PATIENCE,
            cluster: false,
        }
    }
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            records_max: 20,
            payload_max: 600,
        }
    }
}

struct Sent {
    number: u64,
    sequence: u64,
    batch: bytes::Bytes,
    /// It was sent in an earlier session already.
    again: bool,
}

/// A publish session that fills its window.
pub struct Producer {
    history: Arc<History>,
    stream: String,
    subjects: Vec<Vec<String>>,
    rng: StdRng,
    shape: Shape,
    pub manner: Manner,
    /// After a break it goes on under its producer id and sends again what has no answer; otherwise it begins anew.
    resumes: bool,
    id: Option<u64>,
    line: u64,
    next: Vec<u64>,
    /// The last number that was acknowledged.
    done: Vec<u64>,
    waiting: Vec<VecDeque<Sent>>,
}

impl Producer {
    /// In a cluster, at the end of everything: what has no answer will never have one.
    pub fn give_up(&mut self) {
        self.begin_anew();
    }

    pub fn new(history: Arc<History>, stream: &v1::Stream, seed: u64, resumes: bool, shape: Shape) -> Self {
        let subjects = subjects(stream);
        let shards = subjects.len();
        Self {
            line: history.producer(),
            history,
            stream: stream.spec.as_ref().unwrap().name.clone(),
            subjects,
            rng: StdRng::seed_from_u64(seed),
            shape,
            manner: Manner::default(),
            resumes,
            id: None,
            next: vec![1; shards],
            done: vec![0; shards],
            waiting: (0..shards).map(|_| VecDeque::new()).collect(),
        }
    }

    /// Publishes until told to stop (then waits for the answers that are due), or until something breaks.
    /// Returns whether the server said `go_away` before the end.
    pub async fn run(&mut self, addr: &str, stop: CancellationToken) -> (bool, Result<(), Failure>) {
        let mut away = false;
        let result = match tokio::time::timeout(self.manner.patience, Api::connect(addr)).await {
            Ok(Ok(api)) => self.session(&api, &stop, &mut away).await,
            Ok(Err(_)) | Err(_) => Ok(()),
        };
        if !self.resumes {
            self.begin_anew();
        }
        (away, result)
    }

    fn begin_anew(&mut self) {
        for sent in self.waiting.iter_mut().flat_map(std::mem::take) {
            self.history.gave_up(sent.number);
        }
        self.id = None;
        self.line = self.history.producer();
        self.next.fill(1);
        self.done.fill(0);
    }

    async fn session(&mut self, api: &Api, stop: &CancellationToken, away: &mut bool) -> Result<(), Failure> {
        let open = v1::PublishOpen {
            stream: self.stream.clone(),
            producer_id: self.id,
            ..Default::default()
        };
        let Ok(opened) = tokio::time::timeout(self.manner.patience, api.session(open)).await else {
            return Ok(());
        };
        let mut session = opened?;
        if self.id.is_some() {
            self.is_remembered(&session.opened);
        }
        self.id = Some(session.opened.producer_id);
        let window = session.opened.window.expect("the window is advertised").batches as usize;
        let window = window.clamp(1, self.manner.window);
        let epoch = session.map_epoch();
        for (shard, waiting) in self.waiting.iter_mut().enumerate() {
            for sent in waiting.iter_mut() {
                sent.again = true;
                let frame = publish(shard, epoch, sent);
                if !session.send(frame).await {
                    break;
                }
            }
        }
        let mut sending = true;
        loop {
            let due: usize = self.waiting.iter().map(VecDeque::len).sum();
            if due == 0 && !sending {
                return Ok(());
            }
            if sending && due < window {
                if stop.is_cancelled() || *away {
                    sending = false;
                    continue;
                }
                let shard = self.rng.random_range(0..self.subjects.len());
                let mut records = random_records(&mut self.rng, &self.subjects[shard], self.shape);
                let number = self
                    .history
                    .sending(&self.stream, shard as u32, self.line, &mut records);
                let batch = batch::encode(&records, random_codec(&mut self.rng));
                let sent = Sent {
                    number,
                    sequence: self.next[shard],
                    batch,
                    again: false,
                };
                self.next[shard] += 1;
                let frame = publish(shard, epoch, &sent);
                self.waiting[shard].push_back(sent);
                if !session.send(frame).await {
                    sending = false;
                }
                if !self.manner.pace.is_zero() {
                    tokio::time::sleep(self.manner.pace).await;
                }
                // Take what has come without waiting for it, so that the window fills.
                if due + 1 < window && self.rng.random_bool(0.7) {
                    continue;
                }
            }
            let frame = tokio::select! {
                frame = session.next() => frame?,
                () = stop.cancelled(), if sending => { sending = false; continue }
                () = tokio::time::sleep(self.manner.patience) => return Ok(()),
            };
            match frame {
                None => return Ok(()),
                Some(Frame::Ack(ack)) => self.take(ack),
                Some(Frame::Error(e)) => return self.refused(e, &mut session).await,
                Some(Frame::GoAway(_)) => *away = true,
                Some(Frame::Window(_) | Frame::Map(_) | Frame::Opened(_) | Frame::Leaders(_) | Frame::Nodes(_)) => {}
            }
        }
    }

    /// Whoever resumes is told of what was acknowledged to it.
    fn is_remembered(&self, opened: &v1::PublishOpened) {
        for (shard, done) in (0..).zip(&self.done) {
            let told = opened.last_producer_sequence.get(&shard).copied().unwrap_or(0);
            if told < *done {
                self.history.violated(format!(
                    "{} shard {shard}: producer {:?} had {done} acknowledged, and is told {told}",
                    self.stream, self.id
                ));
            }
        }
    }

    fn take(&mut self, ack: v1::BatchAck) {
        let Some(sent) = self.waiting[ack.shard as usize].pop_front() else {
            return self.history.violated(format!("an ack for nothing: {ack:?}"));
        };
        if ack.producer_sequence != sent.sequence {
            self.history
                .violated(format!("an ack out of order: {ack:?} instead of {}", sent.sequence));
        }
        self.done[ack.shard as usize] = sent.sequence;
        if ack.duplicate && !sent.again && !self.manner.cluster {
            self.history
                .violated(format!("sent once and called a duplicate: {ack:?}"));
        }
        if ack.durability() != v1::Durability::QuorumSynced {
            self.history
                .violated(format!("acknowledged without its durability: {ack:?}"));
        }
        match (ack.first, ack.last) {
            (Some(first), Some(last)) => {
                if ack.tail <= last {
                    self.history
                        .violated(format!("a tail that is not behind the batch: {ack:?}"));
                }
                self.history.acked(sent.number, ack.shard, first, last);
            }
            _ => self.history.violated(format!("an ack without sequences: {ack:?}")),
        }
    }

    /// A batch was refused: those behind it have no place any more. Their answers are taken, then all begins anew.
    ///
    /// One that resumes, in a cluster, sends it again instead, under the same number, if that can help.
    async fn refused(&mut self, first: v1::BatchError, session: &mut super::api::Session) -> Result<(), Failure> {
        let failure = Failure::from(first.clone());
        let forgotten = ["UNKNOWN_PRODUCER", "ANSWER_FORGOTTEN"].contains(&failure.reason.as_str());
        if self.resumes && self.manner.cluster && failure.retry != "cannot_work" && !forgotten {
            return Err(failure);
        }
        let mut next = Some(first);
        while let Some(e) = next.take() {
            let waiting = &mut self.waiting[e.shard as usize];
            if let Some(i) = waiting.iter().position(|s| s.sequence == e.producer_sequence) {
                let sent = waiting.remove(i).expect("is there");
                match Failure::from(e).retry.as_str() {
                    "did_not_happen" | "cannot_work" if !sent.again => self.history.refused(sent.number),
                    _ => self.history.gave_up(sent.number),
                }
            }
            while self.waiting.iter().any(|w| !w.is_empty()) {
                let answer = tokio::time::timeout(self.manner.patience, session.next()).await;
                let answer = match answer {
                    Err(_) if self.manner.cluster => break,
                    answer => answer.expect("every batch is answered"),
                };
                match answer {
                    Ok(Some(Frame::Ack(ack))) => self.take(ack),
                    Ok(Some(Frame::Error(e))) => {
                        next = Some(e);
                        break;
                    }
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break,
                }
            }
        }
        self.begin_anew();
        Err(failure)
    }
}

fn publish(shard: usize, map_epoch: u64, sent: &Sent) -> v1::PublishBatch {
    v1::PublishBatch {
        shard: shard as u32,
        map_epoch,
        producer_sequence: sent.sequence,
        batch: sent.batch.clone(),
        expect: None,
    }
}

/// Publishes one message at a time with a message id, and sends it again, with the same id, until it is answered.
pub struct Unary {
    history: Arc<History>,
    stream: String,
    subjects: Vec<Vec<String>>,
    rng: StdRng,
    shape: Shape,
    pub manner: Manner,
    waiting: Option<(u64, u32, v1::Message)>,
}

impl Unary {
    pub fn new(history: Arc<History>, stream: &v1::Stream, seed: u64, shape: Shape) -> Self {
        Self {
            history,
            stream: stream.spec.as_ref().unwrap().name.clone(),
            subjects: subjects(stream),
            rng: StdRng::seed_from_u64(seed),
            shape,
            manner: Manner::default(),
            waiting: None,
        }
    }

    pub async fn run(&mut self, addr: &str, stop: CancellationToken) -> Result<(), Failure> {
        let Ok(Ok(api)) = tokio::time::timeout(self.manner.patience, Api::connect(addr)).await else {
            return Ok(());
        };
        while !stop.is_cancelled() {
            let (number, shard, message) = self.waiting.take().unwrap_or_else(|| self.make());
            self.waiting = Some((number, shard, message.clone()));
            let asked = api.publish(&self.stream, vec![message]);
            let Ok(answer) = tokio::time::timeout(self.manner.patience, asked).await else {
                return Ok(());
            };
            let answer = answer?;
            let ack = &answer.acks[0];
            if ack.sequence == 0 {
                self.history.violated(format!("a duplicate that is nowhere: {ack:?}"));
            }
            self.history.acked(number, ack.shard, ack.sequence, ack.sequence);
            self.waiting = None;
            if !self.manner.pace.is_zero() {
                tokio::time::sleep(self.manner.pace).await;
            }
        }
        Ok(())
    }

    /// What is not answered will never be.
    pub fn give_up(&mut self) {
        if let Some((number, _, _)) = self.waiting.take() {
            self.history.gave_up(number);
        }
    }

    fn make(&mut self) -> (u64, u32, v1::Message) {
        let shard = self.rng.random_range(0..self.subjects.len());
        let mut records = random_records(&mut self.rng, &self.subjects[shard], self.shape);
        records.truncate(1);
        let id = format!("id-{:016x}", self.rng.random::<u64>());
        records[0].message_id = Some(id.clone());
        let number = self.history.sending(&self.stream, shard as u32, 0, &mut records);
        let r = &records[0];
        (number, shard as u32, message_of(r))
    }
}

/// Reads a stream from its end, and remembers what it saw.
async fn follow(history: Arc<History>, stream: String, addr: String, stop: CancellationToken) {
    let Ok(api) = Api::connect(&addr).await else { return };
    let start = v1::StartPosition {
        at: Some(v1::start_position::At::New(v1::New {})),
    };
    let open = v1::ReadOpen {
        stream: stream.clone(),
        start: Some(start),
        ..Default::default()
    };
    let Ok(mut reader) = api.read(open).await else { return };
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            event = reader.next() => match event {
                Ok(Some(Event::Messages(messages))) => history.saw(&stream, &messages),
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return,
            }
        }
    }
}

/// Producers, some that resume and some that do not, unary publishers and followers, on some streams.
pub struct Load {
    pub history: Arc<History>,
    streams: Vec<String>,
    producers: Vec<Producer>,
    unary: Vec<Unary>,
}

/// How the load ended.
#[derive(Default, Debug)]
pub struct Ends {
    /// Producers that were told to go away.
    pub away: usize,
    pub failures: Vec<Failure>,
}

/// The producer, whether it was told to go away, and why it ended.
type ProducerEnd = (Producer, bool, Result<(), Failure>);

pub struct Running {
    stop: CancellationToken,
    history: Arc<History>,
    streams: Vec<String>,
    producers: Vec<JoinHandle<ProducerEnd>>,
    unary: Vec<JoinHandle<(Unary, Result<(), Failure>)>>,
    followers: Vec<JoinHandle<()>>,
}

impl Load {
    pub fn new(history: Arc<History>, streams: &[v1::Stream], seed: u64, shape: Shape) -> Self {
        let mut producers = Vec::new();
        let mut unary = Vec::new();
        for (stream, n) in streams.iter().zip(0..) {
            for (resumes, m) in [(true, 0), (false, 1)] {
                producers.push(Producer::new(
                    history.clone(),
                    stream,
                    seed + 10 * n + m,
                    resumes,
                    shape,
                ));
            }
            unary.push(Unary::new(history.clone(), stream, seed + 10 * n + 5, shape));
        }
        let streams = streams.iter().map(|s| s.spec.as_ref().unwrap().name.clone()).collect();
        Self {
            history,
            streams,
            producers,
            unary,
        }
    }

    /// Changes the size of the messages from now on.
    pub fn shape(&mut self, shape: Shape) {
        self.producers.iter_mut().for_each(|p| p.shape = shape);
    }

    pub fn start(self, addr: &str) -> Running {
        let stop = CancellationToken::new();
        let producers = self.producers.into_iter().map(|mut p| {
            let (addr, stop) = (addr.to_string(), stop.clone());
            tokio::spawn(async move {
                let (away, result) = p.run(&addr, stop).await;
                (p, away, result)
            })
        });
        let producers = producers.collect();
        let unary = self.unary.into_iter().map(|mut u| {
            let (addr, stop) = (addr.to_string(), stop.clone());
            tokio::spawn(async move {
                let result = u.run(&addr, stop).await;
                (u, result)
            })
        });
        let unary = unary.collect();
        let followers = self
            .streams
            .iter()
            .map(|s| tokio::spawn(follow(self.history.clone(), s.clone(), addr.to_string(), stop.clone())));
        let followers = followers.collect();
        Running {
            stop,
            history: self.history,
            streams: self.streams,
            producers,
            unary,
            followers,
        }
    }
}

impl Running {
    pub fn history(&self) -> &History {
        &self.history
    }

    /// No new batches; waits for the answers that are due, or for the connections to break.
    pub async fn stop(self) -> (Load, Ends) {
        self.stop.cancel();
        self.join().await
    }

    /// Waits until everything has ended by itself, as it does when the server is gone.
    pub async fn join(self) -> (Load, Ends) {
        let mut ends = Ends::default();
        let mut load = Load {
            history: self.history,
            streams: self.streams,
            producers: Vec::new(),
            unary: Vec::new(),
        };
        let patience = || tokio::time::sleep(PATIENCE);
        for task in self.producers {
            let (producer, away, result) = tokio::select! {
                done = task => done.expect("a producer panicked"),
                () = patience() => panic!("a producer does not end"),
            };
            load.producers.push(producer);
            ends.away += usize::from(away);
            ends.failures.extend(result.err());
        }
        self.stop.cancel();
        for task in self.unary {
            let (unary, result) = tokio::select! {
                done = task => done.expect("a unary publisher panicked"),
                () = patience() => panic!("a unary publisher does not end"),
            };
            load.unary.push(unary);
            ends.failures.extend(result.err());
        }
        for task in self.followers {
            tokio::select! {
                done = task => done.expect("a follower panicked"),
                () = patience() => panic!("a follower does not end"),
            }
        }
        (load, ends)
    }

    /// The load ends where it is, unanswered.
    pub fn history_handle(&self) -> Arc<History> {
        self.history.clone()
    }
}
