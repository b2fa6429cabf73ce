#![allow(clippy::unwrap_used)]

use futures_util::StreamExt;
use openraft::EntryPayload;
use tokio::sync::mpsc;

use super::super::config::{PeerConfig, PeerIdentity};
use super::super::outbox::{Frames, Outbox};
use super::super::session::Session;
use super::*;
use crate::model::{GroupId, NodeId, ReplicaId};
use crate::raft::types::{Entry, LeaderId, Vote};

const GROUP: GroupId = GroupId::new(7);

fn id(index: u64) -> LogId {
    LogId::new(LeaderId { term: 1, node_id: 1 }, index)
}

/// What follows entry `prev`, up to `last`; with what is committed.
fn request(prev: u64, last: u64, commit: u64) -> AppendEntriesRequest<Mainstem> {
    AppendEntriesRequest {
        vote: Vote::new_committed(1, 1),
        prev_log_id: Some(id(prev)),
        entries: (prev + 1..=last)
            .map(|index| Entry {
                log_id: id(index),
                payload: EntryPayload::Blank,
            })
            .collect(),
        leader_commit: Some(id(commit)),
    }
}

/// The leader's side of a stream, and what leaves the node.
struct Sender {
    /// `None`: there is nothing more to send.
    input: Option<mpsc::UnboundedSender<AppendEntriesRequest<Mainstem>>>,
    session: std::sync::Arc<Session>,
    frames: Frames,
    answers: tokio::task::JoinHandle<Vec<Option<LogId>>>,
    stream: u64,
}

impl Sender {
    /// The first request carries entry 1.
    async fn new(group: GroupId) -> Self {
        let identity = PeerIdentity {
            cluster_id: "one".into(),
            node: NodeId::new(1),
            store_id: 1,
            incarnation: 1,
            starts: Vec::new(),
        };
        let (outbox, frames) = Outbox::new(1 << 20);
        let session = Session::new(NodeId::new(2), &PeerConfig::new(identity, "secret"), outbox);
        let stream = session.open(group, ReplicaId::new(2)).unwrap();
        let (input, requests) = mpsc::unbounded_channel();
        let requests = futures_util::stream::unfold(requests, |mut requests| async {
            let request = requests.recv().await?;
            Some((request, requests))
        });
        let id = stream.id;
        let answers = append(stream, request(0, 1, 0), requests.boxed());
        let answers = answers.map(|answer| answer.unwrap().unwrap()).collect();
        let mut sender = Self {
            input: Some(input),
            session,
            frames,
            answers: tokio::spawn(answers),
            stream: id,
        };
        assert_eq!(sender.sent().await, (1, 0));
        sender
    }

    fn send(&self, request: AppendEntriesRequest<Mainstem>) {
        self.input.as_ref().unwrap().send(request).unwrap();
    }

    /// Of the next request that leaves: how many entries it has, and what it says is committed.
    async fn sent(&mut self) -> (usize, u64) {
        let frame = self.frames.next().await.unwrap();
        let [message] = frame.messages.as_slice() else {
            panic!("more than one message: {frame:?}")
        };
        match message.kind.clone() {
            Some(pb::peer_message::Kind::Append(append)) => (append.entries.len(), append.commit.unwrap().index),
            other => panic!("not a request: {other:?}"),
        }
    }

    /// The replica answers that it has everything up to there.
    fn answer(&self, upto: u64) {
        let appended = pb::Appended {
            stream: self.stream,
            result: Some(convert::appended_to_pb(&Ok(Some(id(upto))))),
        };
        let message = pb::PeerMessage {
            kind: Some(pb::peer_message::Kind::Appended(appended)),
        };
        let frame = pb::PeerFrame {
            handshake: None,
            messages: vec![message],
        };
        self.session.answers(frame).unwrap();
    }

    /// What the leader was answered, once nothing more comes.
    async fn end(self) -> Vec<Option<LogId>> {
        drop(self.input);
        self.answers.await.unwrap()
    }
}

/// Lets the other tasks run for as long as they can without the time going on.
async fn pass() {
    for _ in 0..20 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_committed_is_told_with_the_next_entries_or_soon() {
    let mut sender = Sender::new(GROUP).await;
    // Before the replica has answered for the entry and after.
    sender.send(request(1, 1, 0));
    pass().await;
    sender.answer(1);
    sender.send(request(1, 1, 1));
    pass().await;
    let begun = Instant::now();
    sender.send(request(1, 2, 1));
    assert_eq!(sender.sent().await, (1, 1), "one message tells both");
    assert_eq!(begun.elapsed(), Duration::ZERO);
    sender.answer(2);
    sender.send(request(2, 2, 2));
    assert_eq!(sender.sent().await, (0, 2), "there is nothing to wait for");
    let took = begun.elapsed();
    assert!(
        (Duration::from_millis(1)..Duration::from_millis(3)).contains(&took),
        "{took:?}"
    );
    sender.answer(2);
    // It does not wait for longer because others like it come.
    let begun = Instant::now();
    sender.send(request(2, 2, 2));
    pass().await;
    tokio::time::advance(Duration::from_micros(700)).await;
    sender.send(request(2, 2, 2));
    sender.sent().await;
    assert!(begun.elapsed() < Duration::from_millis(3), "{:?}", begun.elapsed());
    sender.answer(2);
    let answers = sender.end().await;
    assert_eq!(answers, [1, 2, 2, 2].map(|index| Some(id(index))));
}

#[tokio::test(start_paused = true)]
async fn what_a_replica_must_answer_does_not_wait() {
    let mut sender = Sender::new(GROUP).await;
    let begun = Instant::now();
    // Whether it has an entry that was not sent on this stream.
    sender.send(request(5, 5, 1));
    assert_eq!(sender.sent().await, (0, 1));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    sender.answer(1);
    sender.answer(5);
    // The stream ends: what waits goes first, and is answered.
    sender.send(request(5, 5, 5));
    pass().await;
    sender.input = None;
    assert_eq!(sender.sent().await, (0, 5));
    sender.answer(5);
    assert_eq!(begun.elapsed(), Duration::ZERO);
    assert_eq!(sender.end().await, [1, 5, 5].map(|index| Some(id(index))));
}

/// A leader that was paused must not take what it was answered before for a proof that it still leads.
#[tokio::test(start_paused = true)]
async fn an_answer_to_an_entry_is_none_to_what_came_after_it() {
    let mut sender = Sender::new(GROUP).await;
    // Another replica has it too: it is committed. Nobody needs this one's answer, that to the next request will do.
    sender.send(request(1, 1, 1));
    pass().await;
    sender.answer(1);
    assert_eq!(sender.sent().await, (0, 1));
    sender.answer(1);
    pass().await;
    // Somebody may wait for this one: a recent answer is passed on, one from long ago is not.
    for (entry, pause) in [(2, 0), (3, 100)] {
        sender.send(request(entry - 1, entry, entry - 1));
        assert_eq!(sender.sent().await, (1, entry - 1));
        tokio::time::advance(Duration::from_millis(pause)).await;
        sender.send(request(entry, entry, entry - 1));
        pass().await;
        sender.answer(entry);
        pass().await;
        assert_eq!(sender.sent().await, (0, entry - 1));
        sender.answer(entry);
        pass().await;
    }
    assert_eq!(sender.end().await, [1, 2, 2, 3].map(|index| Some(id(index))));
}

#[tokio::test(start_paused = true)]
async fn the_catalog_does_not_wait() {
    let mut sender = Sender::new(GroupId::META).await;
    let begun = Instant::now();
    sender.answer(1);
    sender.send(request(1, 1, 1));
    assert_eq!(sender.sent().await, (0, 1));
    assert_eq!(begun.elapsed(), Duration::ZERO);
    sender.answer(1);
    assert_eq!(sender.end().await, [1, 1].map(|index| Some(id(index))));
}
