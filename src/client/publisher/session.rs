//! The task that owns a publisher's connection: sends batches, takes answers, reconnects, sends again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Streaming};

use super::flight::{Flight, Landed, Need};
use super::leaders::Leaders;
use super::queue::Queue;
use super::ticket::BatchReceipt;
use super::{BatchReport, PublisherConfig};
use crate::client::config::GRPC_MESSAGE_BYTES_MAX;
use crate::client::connection::{Backoff, Connection, Repeat, may_repeat};
use crate::client::error::{ClientError, RetryClass, reason};
use crate::wire::v1::publish_service_client::PublishServiceClient;
use crate::wire::v1::{self, publish_session_request as request, publish_session_response as response};

/// Requests between this task and the connection. Few, since each holds a batch and the window bounds them anyway.
const OUTBOX: usize = 4;
/// How long answers are waited for after the server asked to go away.
const GO_AWAY_PATIENCE: Duration = Duration::from_secs(10);

/// An open connection.
pub(super) struct Line {
    outbox: mpsc::Sender<v1::PublishSessionRequest>,
    inbox: Streaming<v1::PublishSessionResponse>,
    /// Index of the address it goes to.
    address: usize,
}

/// Who publishes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Producer {
    pub(super) id: u64,
    pub(super) epoch: u64,
}

/// What a publisher knows for as long as it lives.
#[derive(Debug, Clone)]
pub(super) struct Identity {
    pub(super) stream_id: Arc<str>,
    pub(super) stream_epoch: u64,
    pub(super) producer: Producer,
}

pub(super) struct Session {
    pub(super) connection: Arc<Connection>,
    pub(super) config: PublisherConfig,
    pub(super) queue: Arc<Queue>,
    pub(super) flight: Flight,
    pub(super) identity: Identity,
    pub(super) map_epoch: u64,
    /// Since when messages have waited without a session.
    pub(super) waiting_since: Option<Instant>,
    pub(super) leaders: Leaders,
}

/// Why a connection is over.
enum End {
    /// Everything is answered and the publisher is closed.
    Done,
    /// It broke, or the server asked to go: make another.
    Again(ClientError),
    /// The producer begins again under the next epoch.
    NewEpoch,
    /// The node at this address leads: make the next one there.
    Move(usize),
    /// It makes no sense to go on.
    Fatal(ClientError),
}

/// Opens a session, once.
pub(super) async fn open(
    connection: &Connection,
    stream: &str,
    producer: Option<Producer>,
) -> Result<(Line, v1::PublishOpened), ClientError> {
    let (address, channel) = connection.session_channel(stream)?;
    let learning = channel.clone();
    let opening = async {
        let (outbox, requests) = mpsc::channel(OUTBOX);
        let open = v1::PublishOpen {
            namespace: connection.config.namespace.clone(),
            stream: stream.to_owned(),
            producer_id: producer.map(|p| p.id),
            producer_epoch: producer.map(|p| p.epoch),
        };
        let first = v1::PublishSessionRequest {
            frame: Some(request::Frame::Open(open)),
        };
        outbox.try_send(first).expect("the channel is empty");
        let mut client = PublishServiceClient::new(channel)
            .max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(GRPC_MESSAGE_BYTES_MAX);
        let mut inbox = client
            .publish_session(ReceiverStream::new(requests))
            .await?
            .into_inner();
        match inbox.message().await?.and_then(|r| r.frame) {
            Some(response::Frame::Opened(opened)) => Ok((Line { outbox, inbox, address }, opened)),
            Some(response::Frame::GoAway(away)) => Err(away_error(&away)),
            Some(
                response::Frame::Ack(_)
                | response::Frame::Error(_)
                | response::Frame::Window(_)
                | response::Frame::Map(_)
                | response::Frame::Leaders(_)
                | response::Frame::Nodes(_),
            ) => Err(ClientError::bad_answer("the session did not begin with `opened`")),
            None => Err(lost("the server ended the session before it began")),
        }
    };
    let opened = match tokio::time::timeout(connection.config.call_timeout, opening).await {
        Ok(opened) => opened,
        Err(_) => Err(ClientError::local(
            Code::Unavailable,
            reason::TIMED_OUT,
            "the server did not open the session",
        )),
    };
    match opened {
        Ok(opened) => {
            connection.answered(address);
            connection.learn(learning).await;
            Ok(opened)
        }
        Err(e) => {
            connection.move_on(address, &e);
            Err(connection.explain(e))
        }
    }
}

/// Opens a session, again and again where that can help.
pub(super) async fn open_retrying(
    connection: &Connection,
    stream: &str,
    producer: Option<Producer>,
    retry_for: Duration,
) -> Result<(Line, v1::PublishOpened), ClientError> {
    let begun = Instant::now();
    let mut backoff = Backoff::new();
    let mut tried = 0;
    loop {
        let error = match open(connection, stream, producer).await {
            Ok(opened) => return Ok(opened),
            Err(e) => e,
        };
        tried += 1;
        if !may_repeat(&error, Repeat::Safe) {
            return Err(error);
        }
        if tried < connection.choices() {
            continue;
        }
        let pause = backoff.next();
        if begun.elapsed() + pause >= retry_for {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
    }
}

fn away_error(away: &v1::PublishGoAway) -> ClientError {
    ClientError {
        leader: away.addresses.first().cloned(),
        ..ClientError::local(
            Code::Unavailable,
            reason::GO_AWAY,
            format!("the server asks to reconnect: {}", away.reason),
        )
    }
}

fn lost(what: &str) -> ClientError {
    ClientError::local(Code::Unavailable, reason::CONNECTION_LOST, what).with_retry(RetryClass::MayHaveHappened)
}

impl Session {
    /// Runs until everything is answered and the publisher is closed, or something fails that no repetition helps.
    pub(super) async fn run(mut self, line: Line) {
        let mut line = Some(line);
        let mut backoff = Backoff::new();
        loop {
            let end = match line.take() {
                Some(line) => {
                    let (end, progress) = self.serve(line).await;
                    if progress {
                        backoff.reset();
                    }
                    end
                }
                None => match self.reopen().await {
                    Ok(reopened) => {
                        line = Some(reopened);
                        continue;
                    }
                    Err(end) => end,
                },
            };
            self.flight.disconnected();
            let error = match end {
                End::Done => return,
                End::NewEpoch => match self.flight.renumber() {
                    Ok(()) => {
                        self.identity.producer.epoch += 1;
                        continue;
                    }
                    Err(e) => return self.fail(e),
                },
                End::Move(index) => {
                    self.connection.prefer(&self.config.stream, index);
                    continue;
                }
                End::Fatal(e) => return self.fail(e),
                End::Again(e) => e,
            };
            if let Err(e) = self.pause(error, backoff.next()).await {
                return self.fail(e);
            }
            if self.is_done() {
                return;
            }
        }
    }

    fn is_done(&self) -> bool {
        self.queue.is_closed() && self.flight.is_empty() && self.queue.is_empty()
    }

    /// Waits between two connections; with nothing to send, until there is something. An error if nothing has come
    /// forward for too long.
    async fn pause(&mut self, error: ClientError, pause: Duration) -> Result<(), ClientError> {
        tokio::time::sleep(pause).await;
        let mut idle = false;
        while self.flight.is_empty() && self.queue.is_empty() {
            idle = true;
            self.waiting_since = None;
            if self.queue.is_closed() {
                return Ok(());
            }
            self.queue.work.notified().await;
        }
        let now = Instant::now();
        self.waiting_since.get_or_insert(now);
        if idle {
            // What has come since was not tried yet.
            return Ok(());
        }
        self.check_patience(now, &error)
    }

    fn check_patience(&self, now: Instant, error: &ClientError) -> Result<(), ClientError> {
        let stuck = match self.flight.stuck_since().into_iter().chain(self.waiting_since).min() {
            Some(since) => now.saturating_duration_since(since),
            None => return Ok(()),
        };
        if stuck < self.config.retry_for {
            return Ok(());
        }
        let message = format!(
            "gave up after {:.1} s without progress: {}",
            stuck.as_secs_f64(),
            error.message
        );
        Err(ClientError {
            message,
            ..error.clone()
        })
    }

    /// Connects again as the same producer.
    async fn reopen(&mut self) -> Result<Line, End> {
        let opened = open(&self.connection, &self.config.stream, Some(self.identity.producer)).await;
        let (line, opened) = match opened {
            Ok(opened) => opened,
            Err(e) if may_repeat(&e, Repeat::Safe) => return Err(End::Again(e)),
            Err(e) => return Err(End::Fatal(e)),
        };
        if *opened.stream_id != *self.identity.stream_id || opened.epoch != self.identity.stream_epoch {
            return Err(End::Fatal(ClientError::local(
                Code::FailedPrecondition,
                "STREAM_REPLACED",
                format!(
                    "the stream is not the one that was published to: it was {} (epoch {}), it is {} (epoch {})",
                    self.identity.stream_id, self.identity.stream_epoch, opened.stream_id, opened.epoch
                ),
            )));
        }
        self.leaders.opened(&opened);
        self.take_map(opened.map.as_ref())?;
        let last: &BTreeMap<u32, u64> = &opened.last_producer_sequence;
        let need = self
            .flight
            .resume(|shard| last.get(&shard).copied().unwrap_or(0))
            .map_err(End::Fatal)?;
        if need == Need::NewEpoch {
            return Err(End::NewEpoch);
        }
        self.flight
            .opened(self.queue.splitter().shards(), opened.window.unwrap_or_default());
        Ok(line)
    }

    /// Follows a change of the stream's map. Batches were split by the old one, so only a change of its epoch alone can
    /// be followed while there are any.
    fn take_map(&mut self, map: Option<&v1::ShardMap>) -> Result<(), End> {
        let Some(map) = map else { return Ok(()) };
        if map.epoch == self.map_epoch {
            return Ok(());
        }
        let old = self.queue.splitter();
        let new = old.with_map(map).map_err(End::Fatal)?;
        let busy = !self.flight.is_empty() || !self.queue.is_empty();
        if busy && !new.places_like(&old) {
            return Err(End::Fatal(ClientError::local(
                Code::Aborted,
                reason::MAP_CHANGED,
                "the stream's shards have changed while messages were on their way: open a new publisher",
            )));
        }
        self.map_epoch = new.epoch();
        self.queue.set_splitter(new);
        Ok(())
    }

    /// Uses a connection until it ends. Also tells whether anything was answered.
    async fn serve(&mut self, mut line: Line) -> (End, bool) {
        let mut progress = false;
        let mut going: Option<(Instant, End)> = None;
        let mut probe: Option<BoxFuture<'static, Option<usize>>> = None;
        self.waiting_since = None;
        loop {
            let now = Instant::now();
            self.flight.rewind_due(now);
            if self.is_done() {
                return (End::Done, progress);
            }
            if going.is_none()
                && probe.is_none()
                && let Some(address) = self.leaders.elsewhere(now)
            {
                let (connection, address) = (Arc::clone(&self.connection), address.to_owned());
                probe = Some(async move { connection.probe(&address).await }.boxed());
            }
            let mut wake_at = self.flight.resend_at();
            let mut can_send = false;
            match going.take() {
                Some((until, end)) => {
                    if self.flight.is_quiet() || now >= until {
                        return (end, progress);
                    }
                    wake_at = Some(until);
                    going = Some((until, end));
                }
                None => {
                    can_send = self.flight.can_send();
                    if !can_send && self.flight.wants_more() {
                        let flight = &self.flight;
                        let (ready, later) =
                            self.queue
                                .ready(now, |s| flight.shard_is_open(s), |s| flight.shard_is_idle(s));
                        can_send = ready;
                        wake_at = wake_at.into_iter().chain(later).min();
                    }
                }
            }
            if let Some(since) = self.flight.stuck_since() {
                let silence =
                    ClientError::local(Code::DeadlineExceeded, reason::TIMED_OUT, "the server does not answer");
                // Without retries the one attempt still has its time to be answered.
                let patience = match self.config.retry_for {
                    Duration::ZERO => self.connection.config.call_timeout,
                    retry_for => retry_for,
                };
                if now.saturating_duration_since(since) >= patience
                    && let Err(e) = self.check_patience(now, &silence)
                {
                    return (End::Fatal(e), progress);
                }
                wake_at = wake_at.into_iter().chain([since + patience]).min();
            }
            let timer = async {
                match wake_at {
                    Some(at) => tokio::time::sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let probed = async {
                match &mut probe {
                    Some(probe) => probe.await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                answer = line.inbox.message() => {
                    let frame = match answer {
                        Ok(Some(answer)) => answer.frame,
                        Ok(None) => return (End::Again(lost("the server ended the session")), progress),
                        Err(status) => return (self.broken(status, line.address), progress),
                    };
                    let now = Instant::now();
                    match self.take(frame, now) {
                        Ok(None) => progress = true,
                        Ok(Some(wish)) => {
                            progress = true;
                            if let End::Again(error) = &wish {
                                self.connection.move_on(line.address, error);
                            }
                            // What was sent is answered first.
                            going.get_or_insert((now + GO_AWAY_PATIENCE, wish));
                        }
                        Err(end) => return (end, progress),
                    }
                }
                permit = line.outbox.reserve(), if can_send => {
                    // A closed outbox means that the connection is gone; the inbox tells why.
                    let Ok(permit) = permit else {
                        let end = match line.inbox.message().await {
                            Err(status) => self.broken(status, line.address),
                            Ok(_) => End::Again(lost("the connection was closed")),
                        };
                        return (end, progress);
                    };
                    if let Some(batch) = self.next_batch(Instant::now()) {
                        permit.send(v1::PublishSessionRequest { frame: Some(request::Frame::Batch(batch)) });
                    }
                }
                () = self.queue.work.notified() => {}
                () = timer => {}
                found = probed => {
                    probe = None;
                    if let Some(index) = found.filter(|index| *index != line.address) {
                        // What was sent is answered first, so that order and outcomes are plain.
                        going.get_or_insert((Instant::now() + GO_AWAY_PATIENCE, End::Move(index)));
                    }
                }
            }
        }
    }

    fn broken(&self, status: tonic::Status, address: usize) -> End {
        let error = ClientError::from(status);
        self.connection.move_on(address, &error);
        // Batches have numbers, so that a session can always be made again unless the server says that it is no use.
        if error.retry != RetryClass::CannotWork {
            End::Again(error)
        } else {
            End::Fatal(error)
        }
    }

    fn next_batch(&mut self, now: Instant) -> Option<v1::PublishBatch> {
        if let Some(batch) = self.flight.next_to_send(self.map_epoch) {
            return Some(batch);
        }
        let flight = &self.flight;
        let batch = self.queue.take(
            now,
            self.config.codec,
            |s| flight.shard_is_open(s),
            |s| flight.shard_is_idle(s),
        )?;
        self.flight.admit(batch, now);
        self.flight.next_to_send(self.map_epoch)
    }

    /// Takes a frame. Returns how the session is to end when everything that was sent is answered, if it is to.
    fn take(&mut self, frame: Option<response::Frame>, now: Instant) -> Result<Option<End>, End> {
        let (landed, need) = match frame {
            Some(response::Frame::Ack(ack)) => {
                let sequence = ack.producer_sequence;
                let receipt = BatchReceipt::from_ack(ack, &self.identity.stream_id, self.identity.stream_epoch);
                self.flight.acked(receipt, sequence, now).map_err(End::Fatal)?
            }
            Some(response::Frame::Error(error)) => {
                let (landed, need) = self.flight.refused(&error, now).map_err(End::Fatal)?;
                self.tell(landed);
                let error = ClientError::from_batch_error(&error);
                if error.retry != RetryClass::CannotWork {
                    tracing::debug!(reason = %error.reason, "a batch was refused: {}", error.message);
                    self.check_patience(now, &error).map_err(End::Fatal)?;
                }
                (Vec::new(), need)
            }
            Some(response::Frame::GoAway(away)) => return Ok(Some(End::Again(away_error(&away)))),
            Some(response::Frame::Window(window)) => {
                self.flight.set_window(window);
                return Ok(None);
            }
            Some(response::Frame::Map(map)) => {
                self.take_map(Some(&map))?;
                return Ok(None);
            }
            Some(response::Frame::Leaders(leaders)) => {
                self.leaders.told(leaders.leaders);
                return Ok(None);
            }
            Some(response::Frame::Nodes(nodes)) => {
                self.connection.take_nodes(&nodes.nodes);
                return Ok(None);
            }
            Some(response::Frame::Opened(_)) => {
                return Err(End::Fatal(ClientError::bad_answer(
                    "the server opened the session twice",
                )));
            }
            // A frame of a newer version.
            None => return Ok(None),
        };
        self.tell(landed);
        match need {
            Need::Nothing => Ok(None),
            Need::NewEpoch => Ok(Some(End::NewEpoch)),
        }
    }

    /// Tells the fates of batches, in order.
    fn tell(&self, landed: Vec<Landed>) {
        for Landed { batch, outcome } in landed {
            let outcome = outcome.map(Arc::new).map_err(Arc::new);
            if let Some(hook) = &self.config.on_batch {
                hook(&BatchReport {
                    messages: batch.messages,
                    bytes: batch.bytes.len(),
                    ordinals: &batch.ordinals,
                    since: batch.since,
                    outcome: outcome.as_deref().map_err(|e| &**e),
                });
            }
            let memory = batch.memory;
            let failure = outcome.as_ref().err().cloned();
            batch.ticket.resolve(outcome);
            self.queue.release(memory, failure.as_deref());
        }
    }

    /// Nothing more can be done: everybody is told.
    fn fail(&mut self, error: ClientError) {
        tracing::debug!(reason = %error.reason, "the publisher stops: {}", error.message);
        self.queue.close(error.clone());
        let landed = self.flight.give_up(&error);
        self.tell(landed);
        for open in self.queue.drain() {
            let memory = open.give_up(&error);
            self.queue.release(memory, Some(&error));
        }
    }
}
