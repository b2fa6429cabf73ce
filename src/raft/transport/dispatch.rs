//! The called side of a session after its handshake: requests go to the replicas here, answers come back in order per
//! append stream. One task per session: replicas that are slow keep their requests in their own queues, which the
//! caller's windows bound, and hold up nobody else.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use futures_util::future::BoxFuture;
use futures_util::stream::{BoxStream, FuturesUnordered, SelectAll};
use futures_util::{FutureExt, Stream, StreamExt};
use openraft::Raft;
use openraft::raft::{AppendEntriesRequest, AppendEntriesResponse, TransferLeaderRequest};
use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::Semaphore;

use super::append::REQUESTS_MAX;
use super::convert;
use super::counts::received_bytes;
use super::outbox::{Lane, Outbox};
use super::service::Services;
use super::session::SERVICE_CALLS_MAX;
use crate::model::{GroupId, NodeId, ReplicaId};
use crate::raft::codec::{log_id_from_pb, vote_from_pb, vote_to_pb};
use crate::raft::state_machine::GroupMachine;
use crate::raft::types::Mainstem;
use crate::wire::internal as pb;

/// Append streams of a session.
const STREAMS_MAX: usize = 65_536;
/// Calls of a session that are under way.
const CALLS_MAX: usize = 16_384;
/// A larger answer is not worth the place of a heartbeat.
const URGENT_BYTES_MAX: usize = 16 << 10;

pub(in crate::raft) type RaftHandle = Raft<Mainstem, GroupMachine>;

/// Finds the replicas of this node.
pub(in crate::raft) trait Replicas: Send + Sync + 'static {
    /// The replica, if it runs here. The text of an error is for the caller's log.
    fn find(&self, group: GroupId, replica: ReplicaId) -> Result<RaftHandle, String>;

    /// The replica of a group here has taken a heartbeat of the leader.
    fn heard_leader(&self, group: GroupId);
    /// Whether the replica here must not begin with the entries from this one on: it waits for a snapshot.
    fn refuses(&self, group: GroupId, from: u64) -> bool;
}

/// Requests of one stream on their way to the replica.
#[derive(Default)]
struct Requests {
    waiting: VecDeque<AppendEntriesRequest<Mainstem>>,
    closed: bool,
    reader: Option<Waker>,
}

#[derive(Clone, Default)]
struct RequestQueue(Arc<Mutex<Requests>>);

impl RequestQueue {
    /// False: more than the protocol allows.
    fn push(&self, request: AppendEntriesRequest<Mainstem>) -> bool {
        let waker = {
            let mut requests = self.0.lock();
            if requests.waiting.len() >= REQUESTS_MAX {
                return false;
            }
            requests.waiting.push_back(request);
            requests.reader.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        true
    }

    /// Ends the stream and forgets what has not reached the replica: nobody waits for it any more.
    fn close(&self) {
        let waker = {
            let mut requests = self.0.lock();
            requests.closed = true;
            requests.waiting = VecDeque::new();
            requests.reader.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl Stream for RequestQueue {
    type Item = AppendEntriesRequest<Mainstem>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut requests = self.0.lock();
        if let Some(request) = requests.waiting.pop_front() {
            return Poll::Ready(Some(request));
        }
        if requests.closed {
            return Poll::Ready(None);
        }
        requests.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

type Answers = BoxStream<'static, (u64, pb::appended::Result)>;

/// The requests of one session that are under way.
pub(super) struct Dispatch {
    from: NodeId,
    replicas: Arc<dyn Replicas>,
    services: Arc<Services>,
    /// Calls of services that may be under way.
    service_calls: Arc<Semaphore>,
    outbox: Outbox,
    received: metrics::Counter,
    streams: HashMap<u64, (GroupId, RequestQueue)>,
    answers: SelectAll<Answers>,
    calls: FuturesUnordered<BoxFuture<'static, pb::CallAnswer>>,
}

impl Dispatch {
    pub fn new(from: NodeId, replicas: Arc<dyn Replicas>, services: Arc<Services>, outbox: Outbox) -> Self {
        Self {
            from,
            replicas,
            services,
            service_calls: Arc::new(Semaphore::new(SERVICE_CALLS_MAX)),
            outbox,
            received: received_bytes(),
            streams: HashMap::new(),
            answers: SelectAll::new(),
            calls: FuturesUnordered::new(),
        }
    }

    /// Sends the answers that are ready. Returns when the caller reads no more; otherwise it goes on for ever. May be
    /// cancelled.
    pub async fn answer(&mut self) {
        loop {
            tokio::select! {
                Some((stream, result)) = self.answers.next(), if !self.answers.is_empty() => {
                    if !matches!(result, pb::appended::Result::Matched(_)) {
                        self.close(stream);
                    }
                    if !self.appended(stream, result) {
                        return;
                    }
                }
                Some(answer) = self.calls.next(), if !self.calls.is_empty() => {
                    let bytes = answer_bytes(&answer);
                    let lane = if bytes > URGENT_BYTES_MAX { Lane::Bulk } else { Lane::Urgent };
                    if self.outbox.push(lane, pb::peer_message::Kind::Answer(answer), bytes).is_err() {
                        return;
                    }
                }
                else => return std::future::pending().await,
            }
        }
    }

    fn appended(&self, stream: u64, result: pb::appended::Result) -> bool {
        let appended = pb::Appended {
            stream,
            result: Some(result),
        };
        let kind = pb::peer_message::Kind::Appended(appended);
        self.outbox.push(Lane::Bulk, kind, 64).is_ok()
    }

    fn close(&mut self, stream: u64) {
        if let Some((_, queue)) = self.streams.remove(&stream) {
            queue.close();
        }
    }

    /// Takes requests. `Err`: the caller does not keep to the protocol, or reads no more.
    pub fn requests(&mut self, frame: pb::PeerFrame) -> Result<(), &'static str> {
        if frame.handshake.is_some() {
            return Err("a handshake in the middle of a session");
        }
        self.received.increment(frame.encoded_len() as u64);
        for message in frame.messages {
            match message.kind {
                Some(pb::peer_message::Kind::Append(append)) => self.append(append)?,
                Some(pb::peer_message::Kind::AppendEnd(end)) => self.close(end.stream),
                Some(pb::peer_message::Kind::Heartbeat(call)) => {
                    let replica = self.find(call.group_id, call.to_replica);
                    let replicas = self.replicas.clone();
                    let work = async move {
                        let answer = heartbeat(replica?, &call).await?;
                        if matches!(answer.result, Some(pb::heartbeat_answer::Result::Success(_))) {
                            replicas.heard_leader(GroupId::new(call.group_id));
                        }
                        Ok(pb::call_answer::Result::Heartbeat(answer))
                    };
                    self.call(call.call, work.boxed())?;
                }
                Some(pb::peer_message::Kind::Vote(call)) => {
                    let replica = self.find(call.group_id, call.to_replica);
                    self.call(call.call, async move { vote(replica?, &call).await }.boxed())?;
                }
                Some(pb::peer_message::Kind::Transfer(call)) => {
                    let replica = self.find(call.group_id, call.to_replica);
                    self.call(call.call, async move { transfer(replica?, &call).await }.boxed())?;
                }
                Some(pb::peer_message::Kind::Service(call)) => {
                    let work = match self.service_calls.clone().try_acquire_owned() {
                        Ok(place) => {
                            let work = self
                                .services
                                .serve(self.from, call.method, call.payload, call.patience_ms);
                            async move {
                                let _place = place;
                                work.await
                            }
                            .boxed()
                        }
                        Err(_) => std::future::ready(Services::overloaded()).boxed(),
                    };
                    let work = work.map(|answer| Ok(pb::call_answer::Result::Service(answer)));
                    self.call(call.call, work.boxed())?;
                }
                Some(pb::peer_message::Kind::Appended(_) | pb::peer_message::Kind::Answer(_)) => {
                    return Err("an answer where requests are expected");
                }
                None => return Err("a request of a kind this version does not know"),
            }
        }
        Ok(())
    }

    fn find(&self, group: u64, replica: u64) -> Result<RaftHandle, String> {
        self.replicas.find(GroupId::new(group), ReplicaId::new(replica))
    }

    fn call(
        &mut self,
        call: u64,
        work: BoxFuture<'static, Result<pb::call_answer::Result, String>>,
    ) -> Result<(), &'static str> {
        if self.calls.len() >= CALLS_MAX {
            return Err("more calls than allowed");
        }
        let answer = work.map(move |result| pb::CallAnswer {
            call,
            result: Some(result.unwrap_or_else(pb::call_answer::Result::Error)),
        });
        self.calls.push(answer.boxed());
        Ok(())
    }

    fn append(&mut self, mut append: pb::Append) -> Result<(), &'static str> {
        let id = append.stream;
        if let Some(open) = append.open.take() {
            if self.streams.len() >= STREAMS_MAX || self.streams.contains_key(&id) {
                return Err("more append streams than allowed, or one twice");
            }
            match self.find(open.group_id, open.to_replica) {
                Ok(raft) => {
                    let queue = RequestQueue::default();
                    self.streams.insert(id, (GroupId::new(open.group_id), queue.clone()));
                    let answers = raft.stream_append(queue).map(move |result| match result {
                        Ok(result) => (id, convert::appended_to_pb(&result)),
                        Err(fatal) => (id, pb::appended::Result::Error(fatal.to_string())),
                    });
                    self.answers.push(answers.boxed());
                }
                Err(text) => {
                    return self
                        .appended(id, pb::appended::Result::Error(text))
                        .then_some(())
                        .ok_or("it reads no answers");
                }
            }
        }
        // One that has ended here: the caller knows by now, or soon.
        let Some((group, queue)) = self.streams.get(&id) else {
            return Ok(());
        };
        let request = convert::append_from_pb(append).map_err(|e| e.to_string());
        let request = request.and_then(|request| match begins_a_log(&request) {
            Some(from) if self.replicas.refuses(*group, from) => Err(format!(
                "{group}: the replica here is empty, and takes a snapshot, not entry {from}"
            )),
            Some(_) | None => Ok(request),
        });
        match request {
            Ok(request) => queue
                .push(request)
                .then_some(())
                .ok_or("more requests than the window allows"),
            Err(text) => {
                self.close(id);
                self.appended(id, pb::appended::Result::Error(text))
                    .then_some(())
                    .ok_or("it reads no answers")
            }
        }
    }
}

/// The first entry of a request that has nothing before it.
fn begins_a_log(request: &AppendEntriesRequest<Mainstem>) -> Option<u64> {
    let first = request.entries.first()?;
    request.prev_log_id.is_none().then_some(first.log_id.index)
}

/// About what an answer takes on the wire.
fn answer_bytes(answer: &pb::CallAnswer) -> usize {
    match &answer.result {
        Some(pb::call_answer::Result::Service(pb::ServiceAnswer {
            result: Some(pb::service_answer::Result::Payload(payload)),
        })) => 128 + payload.len(),
        Some(_) | None => 128,
    }
}

impl Drop for Dispatch {
    fn drop(&mut self) {
        for (_, queue) in self.streams.values() {
            queue.close();
        }
    }
}

async fn heartbeat(raft: RaftHandle, call: &pb::Heartbeat) -> Result<pb::HeartbeatAnswer, String> {
    let request = convert::heartbeat_from_pb(call).map_err(|e| e.to_string())?;
    let answer = raft.append_entries(request).await.map_err(|e| e.to_string())?;
    let result = match answer {
        AppendEntriesResponse::Success | AppendEntriesResponse::PartialSuccess(_) => {
            pb::heartbeat_answer::Result::Success(pb::Blank {})
        }
        AppendEntriesResponse::Conflict => pb::heartbeat_answer::Result::Conflict(pb::Blank {}),
        AppendEntriesResponse::HigherVote(vote) => pb::heartbeat_answer::Result::HigherVote(vote_to_pb(&vote)),
    };
    Ok(pb::HeartbeatAnswer { result: Some(result) })
}

async fn vote(raft: RaftHandle, call: &pb::VoteCall) -> Result<pb::call_answer::Result, String> {
    let request = convert::vote_request_from_pb(call).map_err(|e| e.to_string())?;
    let answer = if call.pre_vote {
        raft.pre_vote(request).await
    } else {
        raft.vote(request).await
    };
    let answer = answer.map_err(|e| e.to_string())?;
    Ok(pb::call_answer::Result::Vote(convert::vote_answer_to_pb(&answer)))
}

async fn transfer(raft: RaftHandle, call: &pb::TransferCall) -> Result<pb::call_answer::Result, String> {
    let from = call
        .from_leader
        .as_ref()
        .map(vote_from_pb)
        .ok_or("a transfer without a vote")?;
    let last = call.last.as_ref().map(log_id_from_pb);
    let request = TransferLeaderRequest::new(from, call.to_leader, last);
    let answer = raft.handle_transfer_leader(request).await.map_err(|e| e.to_string())?;
    Ok(pb::call_answer::Result::Transfer(pb::TransferAnswer {
        rejected: answer.err().map(|e| e.to_string()),
    }))
}
