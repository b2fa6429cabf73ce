//! The calling side of a session: calls that wait for their answer, append streams that wait for theirs, and the
//! budget of bytes that the peer may leave unanswered.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prost::Message as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::append::REQUESTS_MAX;
use super::config::PeerConfig;
use super::counts::CallCounts;
use super::outbox::{Lane, Outbox};
use crate::model::{GroupId, NodeId, ReplicaId};
use crate::wire::internal as pb;

/// Calls that wait for an answer at a time; there is at most a handful per group.
const CALLS_MAX: usize = 16_384;

type CallResult = pb::call_answer::Result;

/// A call that waits for its answer, and what it holds until that is here, whether or not anyone looks.
struct Waiting {
    answer: oneshot::Sender<CallResult>,
    _places: Option<Places>,
}

/// The places of a call of a service in a session's bounds.
pub(super) struct Places {
    _call: OwnedSemaphorePermit,
    _share: OwnedSemaphorePermit,
    _budget: OwnedSemaphorePermit,
}

/// Of these, calls of services.
pub(super) const SERVICE_CALLS_MAX: usize = 4_096;

/// What a session's owner needs to know of a peer's silence.
pub(super) struct Session {
    pub node: NodeId,
    outbox: Outbox,
    pub budget: Arc<Semaphore>,
    pub budget_bytes: usize,
    pub stream_bytes_max: usize,
    pub append_timeout: Duration,
    commit_hold: Duration,
    /// The part of the budget that calls of services may take: never all of it, because what a call waits for at the
    /// peer may itself need appends.
    service_bytes: Arc<Semaphore>,
    service_bytes_max: usize,
    service_calls: Arc<Semaphore>,
    calls: Mutex<HashMap<u64, Waiting>>,
    streams: Mutex<HashMap<u64, mpsc::Sender<Option<pb::appended::Result>>>>,
    next: AtomicU64,
    counts: CallCounts,
    ended: CancellationToken,
    reason: OnceLock<String>,
}

impl Session {
    pub fn new(node: NodeId, config: &PeerConfig, outbox: Outbox) -> Arc<Self> {
        let budget_bytes = config.inflight_bytes_max.clamp(1, u32::MAX as usize >> 4);
        Arc::new(Self {
            node,
            outbox,
            budget: Arc::new(Semaphore::new(budget_bytes)),
            budget_bytes,
            stream_bytes_max: config.stream_bytes_max,
            append_timeout: config.append_timeout,
            commit_hold: config.commit_hold,
            service_bytes: Arc::new(Semaphore::new((budget_bytes / 2).max(1))),
            service_bytes_max: (budget_bytes / 2).max(1),
            service_calls: Arc::new(Semaphore::new(SERVICE_CALLS_MAX)),
            calls: Mutex::default(),
            streams: Mutex::default(),
            next: AtomicU64::new(1),
            counts: CallCounts::new(),
            ended: CancellationToken::new(),
            reason: OnceLock::new(),
        })
    }

    /// Cancelled when the session has ended.
    pub fn ended(&self) -> &CancellationToken {
        &self.ended
    }

    /// Why it ended.
    pub fn reason(&self) -> String {
        self.reason.get().cloned().unwrap_or_else(|| "the session ended".into())
    }

    /// Bytes that the peer has not answered.
    pub fn unanswered_bytes(&self) -> usize {
        self.budget_bytes.saturating_sub(self.budget.available_permits())
    }

    /// Ends the session: whoever waits for an answer is told.
    pub fn end(&self, reason: impl Into<String>) {
        // The first reason stays.
        let _ = self.reason.set(reason.into());
        self.ended.cancel();
        self.outbox.abandon();
        self.calls.lock().clear();
        self.streams.lock().clear();
    }

    /// Takes answers. `Err`: the peer does not keep to the protocol.
    pub fn answers(&self, frame: pb::PeerFrame) -> Result<(), &'static str> {
        if frame.handshake.is_some() {
            return Err("a handshake in the middle of a session");
        }
        self.counts.received(frame.encoded_len());
        for message in frame.messages {
            match message.kind {
                Some(pb::peer_message::Kind::Appended(appended)) => {
                    let streams = self.streams.lock();
                    // One that is not there was given up: its answers come late.
                    if let Some(stream) = streams.get(&appended.stream) {
                        stream.try_send(appended.result).or_else(|e| match e {
                            mpsc::error::TrySendError::Closed(_) => Ok(()),
                            mpsc::error::TrySendError::Full(_) => Err("more answers than requests"),
                        })?;
                    }
                }
                Some(pb::peer_message::Kind::Answer(answer)) => {
                    let call = self.calls.lock().remove(&answer.call);
                    if let (Some(call), Some(result)) = (call, answer.result) {
                        // Who asked may have stopped waiting.
                        let _ = call.answer.send(result);
                    }
                }
                Some(
                    pb::peer_message::Kind::Append(_)
                    | pb::peer_message::Kind::AppendEnd(_)
                    | pb::peer_message::Kind::Heartbeat(_)
                    | pb::peer_message::Kind::Vote(_)
                    | pb::peer_message::Kind::Transfer(_)
                    | pb::peer_message::Kind::Service(_),
                ) => return Err("a request where answers are expected"),
                // Of a later version.
                None => {}
            }
        }
        Ok(())
    }

    /// Sends a call ahead of everything that is bulk and waits for its answer. May be cancelled.
    pub async fn call(
        self: &Arc<Self>,
        make: impl FnOnce(u64) -> pb::peer_message::Kind,
    ) -> Result<CallResult, String> {
        let begun = Instant::now();
        let answer = self.begin(Lane::Urgent, 128, None, make)?.answer().await?;
        self.counts.round_trip(begun.elapsed());
        Ok(answer)
    }

    /// Queues a call of about so many bytes. `Err`: it is not sent and never will be.
    pub fn begin(
        self: &Arc<Self>,
        lane: Lane,
        bytes: usize,
        places: Option<Places>,
        make: impl FnOnce(u64) -> pb::peer_message::Kind,
    ) -> Result<Asked, String> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (tx, answer) = oneshot::channel();
        let waiting = Waiting {
            answer: tx,
            _places: places,
        };
        {
            let mut calls = self.calls.lock();
            if calls.len() >= CALLS_MAX {
                return Err(format!("{CALLS_MAX} calls wait for an answer of this peer"));
            }
            calls.insert(id, waiting);
        }
        let asked = Asked {
            session: self.clone(),
            id,
            answer,
            ended: None,
        };
        self.outbox.push(lane, make(id), bytes).map_err(|_| self.reason())?;
        // After it is listed: an end that came in between has cleared the list.
        if self.ended.is_cancelled() {
            self.calls.lock().remove(&id);
        }
        Ok(asked)
    }

    /// Waits for the places of a service's call, in the order of asking. `None`: the session ended.
    pub async fn places(self: &Arc<Self>, bytes: usize) -> Option<Places> {
        let bytes = u32::try_from(bytes.clamp(1, self.service_bytes_max)).unwrap_or(u32::MAX);
        let take = async {
            Some(Places {
                _call: self.service_calls.clone().acquire_owned().await.ok()?,
                _share: self.service_bytes.clone().acquire_many_owned(bytes).await.ok()?,
                _budget: self.budget.clone().acquire_many_owned(bytes).await.ok()?,
            })
        };
        self.ended.run_until_cancelled(take).await.flatten()
    }

    /// A new append stream to a replica.
    pub fn open(self: &Arc<Self>, group: GroupId, to: ReplicaId) -> Result<AppendStream, String> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (tx, answers) = mpsc::channel(REQUESTS_MAX + 1);
        self.streams.lock().insert(id, tx);
        let stream = AppendStream {
            session: self.clone(),
            id,
            // Nodes act on what the catalog tells: they learn it at once.
            commit_hold: match group {
                GroupId::META => Duration::ZERO,
                _ => self.commit_hold,
            },
            open: Some(pb::AppendOpen {
                group_id: group.get(),
                to_replica: to.get(),
            }),
            answers,
        };
        // After it is listed: an end that came in between has cleared the list.
        if self.ended.is_cancelled() {
            return Err(self.reason());
        }
        Ok(stream)
    }
}

/// A call that is sent, or about to be. Dropped, it is forgotten: its answer goes nowhere.
pub(super) struct Asked {
    session: Arc<Session>,
    id: u64,
    answer: oneshot::Receiver<CallResult>,
    /// Whether it was answered, once that is known.
    ended: Option<bool>,
}

impl Asked {
    /// Waits for the answer. `Err`: the session ended, and the call may or may not have been entered.
    pub async fn answer(mut self) -> Result<CallResult, String> {
        let answer = (&mut self.answer).await;
        self.ended = Some(answer.is_ok());
        answer.map_err(|_| self.session.reason())
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.session.counts.ended(self.ended);
        self.session.calls.lock().remove(&self.id);
    }
}

/// One append stream: requests go out in order, answers come in the same order.
pub(super) struct AppendStream {
    pub session: Arc<Session>,
    pub id: u64,
    /// How long what is committed may wait for entries to be told with.
    pub commit_hold: Duration,
    /// To be sent with the first request.
    pub open: Option<pb::AppendOpen>,
    pub answers: mpsc::Receiver<Option<pb::appended::Result>>,
}

impl AppendStream {
    /// Queues a request. Its bytes have a place in the budget already.
    pub fn send(&self, append: pb::Append, bytes: usize) -> Result<(), String> {
        self.session
            .outbox
            .push(Lane::Bulk, pb::peer_message::Kind::Append(append), bytes)
            .map_err(|_| self.session.reason())
    }
}

impl Drop for AppendStream {
    fn drop(&mut self) {
        self.session.streams.lock().remove(&self.id);
        if self.open.is_none() {
            self.session.outbox.take_back(self.id);
            let end = pb::peer_message::Kind::AppendEnd(pb::AppendEnd { stream: self.id });
            // The session may be over: then so is the stream.
            let _ = self.session.outbox.push(Lane::Bulk, end, 16);
        }
    }
}
