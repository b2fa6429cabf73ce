//! Messages that have no producer sequence yet: one open batch per shard, and batches that are full. Pushing a message
//! takes one short lock and copies it straight into its batch; it meets no channel and allocates nothing.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::flight::Encoded;
use super::split::Splitter;
use super::ticket::{Ticket, closed_error};
use crate::client::error::{ClientError, RetryClass, reason};
use crate::client::message::Message;
use crate::model::batch::{BuildError, RECORD_PREFIX_BYTES, RecordFields, content_bytes};
use crate::model::{BatchBuilder, Codec};
use crate::wire::v1;

/// What decides when a batch is full.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sizes {
    pub(super) batch_bytes: usize,
    pub(super) batch_messages: u32,
    pub(super) memory_bytes: usize,
    pub(super) linger: Duration,
    pub(super) track_ordinals: bool,
}

const TIDY_TICKETS: usize = 1_024;

/// Shared by the callers and the session.
#[derive(Debug)]
pub(super) struct Queue {
    inner: Mutex<Inner>,
    /// Wakes the session: there is something new for it.
    pub(super) work: Notify,
    /// Wakes callers that wait for memory.
    pub(super) space: Notify,
}

#[derive(Debug)]
struct Inner {
    sizes: Sizes,
    splitter: Splitter,
    open: Vec<Option<Open>>,
    /// Shards with an open batch, oldest first, with the batch's number: an entry whose number is not that of the
    /// shard's open batch is out of date.
    by_age: VecDeque<(u32, u64)>,
    full: VecDeque<Open>,
    next_batch: u64,
    next_ordinal: u64,
    memory: usize,
    /// Tickets of batches that are not answered, and some that are, oldest first.
    unanswered: VecDeque<Arc<Ticket>>,
    /// How many tickets are kept before the answered ones are taken out.
    tidy_at: usize,
    /// Open batches below this number are to be sent without waiting for more.
    flush_below: u64,
    /// No more messages are taken, for this reason.
    closed: Option<ClientError>,
    /// The first failure since somebody last asked.
    failure: Option<ClientError>,
}

/// A batch that still takes messages, or waits for its turn.
#[derive(Debug)]
pub(super) struct Open {
    number: u64,
    shard: u32,
    builder: BatchBuilder,
    ticket: Arc<Ticket>,
    expect: Option<v1::Expectation>,
    ordinals: Vec<(u64, u64)>,
    memory: usize,
    since: Instant,
    sent_off: bool,
}

/// Where a message was put.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) ticket: Arc<Ticket>,
    /// Position in its batch.
    pub(super) position: u32,
}

impl Queue {
    pub(super) fn new(sizes: Sizes, splitter: Splitter) -> Self {
        let mut open = Vec::new();
        open.resize_with(splitter.shards(), || None);
        Queue {
            inner: Mutex::new(Inner {
                sizes,
                splitter,
                open,
                by_age: VecDeque::new(),
                full: VecDeque::new(),
                next_batch: 0,
                next_ordinal: 0,
                memory: 0,
                unanswered: VecDeque::new(),
                tidy_at: TIDY_TICKETS,
                flush_below: 0,
                closed: None,
                failure: None,
            }),
            work: Notify::new(),
            space: Notify::new(),
        }
    }

    /// Takes a message; `None` if there is no memory for it now. `place` says whether the caller wants to know where.
    pub(super) fn push(
        &self,
        fields: &RecordFields<'_>,
        expect: Option<&v1::Expectation>,
        place: bool,
    ) -> Result<Option<Option<Place>>, ClientError> {
        let mut wake = false;
        let answer = self.inner.lock().push(fields, expect, place, &mut wake);
        if wake {
            self.work.notify_one();
        }
        answer
    }

    /// Takes as many of the messages, from the first on, as there is memory for, under one lock; tells how many.
    pub(super) fn push_many(&self, messages: &[Message]) -> Result<usize, ClientError> {
        let mut wake = false;
        let mut taken = 0;
        let mut inner = self.inner.lock();
        let result = loop {
            let Some(message) = messages.get(taken) else {
                break Ok(taken);
            };
            match message.with_fields(|fields| inner.push(fields, None, false, &mut wake)) {
                Ok(Some(_)) => taken += 1,
                Ok(None) => break Ok(taken),
                Err(e) => break Err(e),
            }
        };
        drop(inner);
        if wake {
            self.work.notify_one();
        }
        result
    }

    /// Waits until there may be memory again.
    pub(super) async fn wait_for_space(&self, bytes: usize) {
        let freed = self.space.notified();
        tokio::pin!(freed);
        freed.as_mut().enable();
        // The memory may have been freed before we were listening.
        if !self.inner.lock().has_memory(bytes) {
            freed.await;
        }
    }

    /// The next batch to be sent, encoded: a full one, or an open one that need not wait. `shard_open` tells whether a
    /// shard takes new batches, `shard_idle` whether it has nothing on its way.
    pub(super) fn take(
        &self,
        now: Instant,
        codec: Codec,
        shard_open: impl Fn(u32) -> bool,
        shard_idle: impl Fn(u32) -> bool,
    ) -> Option<Encoded> {
        let open = self.inner.lock().take(now, shard_open, shard_idle)?;
        Some(open.encode(codec))
    }

    /// Whether `take` would return something, and if not, when it will without anything else happening.
    pub(super) fn ready(
        &self,
        now: Instant,
        shard_open: impl Fn(u32) -> bool,
        shard_idle: impl Fn(u32) -> bool,
    ) -> (bool, Option<Instant>) {
        let mut inner = self.inner.lock();
        inner.forget_stale();
        if inner.full.iter().any(|b| shard_open(b.shard)) {
            return (true, None);
        }
        if inner.due(now, &shard_open, &shard_idle).is_some() {
            return (true, None);
        }
        let linger = inner.sizes.linger;
        (false, inner.oldest_open(shard_open).map(|since| since + linger))
    }

    /// A batch was answered: its memory is free.
    pub(super) fn release(&self, memory: usize, failure: Option<&ClientError>) {
        let mut inner = self.inner.lock();
        inner.memory -= memory;
        if let Some(failure) = failure {
            inner.failure.get_or_insert_with(|| failure.clone());
        }
        inner.forget_answered();
        drop(inner);
        self.space.notify_waiters();
    }

    /// Lets open batches go, and returns what to wait for so that everything pushed before is answered.
    pub(super) fn flush(&self) -> Vec<Arc<Ticket>> {
        let mut inner = self.inner.lock();
        inner.flush_below = inner.next_batch;
        let waiting = inner.unanswered.iter().filter(|t| !t.is_resolved()).cloned().collect();
        drop(inner);
        self.work.notify_one();
        waiting
    }

    /// The first failure since this was last asked.
    pub(super) fn take_failure(&self) -> Option<ClientError> {
        self.inner.lock().failure.take()
    }

    /// Takes no more messages.
    pub(super) fn close(&self, why: ClientError) {
        self.inner.lock().closed.get_or_insert(why);
        self.work.notify_one();
        self.space.notify_waiters();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.inner.lock().closed.is_some()
    }

    /// Whether no message is here.
    pub(super) fn is_empty(&self) -> bool {
        let inner = self.inner.lock();
        inner.full.is_empty() && inner.open.iter().all(Option::is_none)
    }

    /// Takes everything out, unsent.
    pub(super) fn drain(&self) -> Vec<Open> {
        let mut inner = self.inner.lock();
        let mut all: Vec<_> = inner.full.drain(..).collect();
        all.extend(inner.open.iter_mut().filter_map(Option::take));
        inner.by_age.clear();
        all
    }

    /// Messages are split by this map from now on.
    pub(super) fn set_splitter(&self, splitter: Splitter) {
        let mut inner = self.inner.lock();
        if inner.open.len() < splitter.shards() {
            inner.open.resize_with(splitter.shards(), || None);
        }
        inner.splitter = splitter;
    }

    pub(super) fn splitter(&self) -> Splitter {
        self.inner.lock().splitter.clone()
    }

    /// How many messages were taken.
    pub(super) fn taken(&self) -> u64 {
        self.inner.lock().next_ordinal
    }
}

impl Inner {
    fn has_memory(&self, bytes: usize) -> bool {
        // Closed queues say so; an empty one takes any one message.
        self.closed.is_some() || self.memory == 0 || self.memory + bytes <= self.sizes.memory_bytes
    }

    /// Answers the message's place; sets `wake` if the session has to be woken.
    fn push(
        &mut self,
        fields: &RecordFields<'_>,
        expect: Option<&v1::Expectation>,
        place: bool,
        wake: &mut bool,
    ) -> Result<Option<Option<Place>>, ClientError> {
        if let Some(why) = &self.closed {
            return Err(why.clone());
        }
        let bytes = RECORD_PREFIX_BYTES + content_bytes(fields);
        if !self.has_memory(bytes) {
            // The session may be waiting for a batch to fill that never will.
            self.flush_below = self.next_batch;
            *wake = true;
            return Ok(None);
        }
        let shard = self.splitter.shard_of(fields)?;
        let is_full = |b: &Open, sizes: &Sizes| {
            b.builder.len() >= sizes.batch_messages || b.builder.bytes() + bytes > sizes.batch_bytes
        };
        let slot = &mut self.open[shard as usize];
        if let Some(open) = slot.take_if(|b| expect.is_some() || is_full(b, &self.sizes)) {
            self.full.push_back(open);
            *wake = true;
        }
        let open = match slot {
            Some(open) => open,
            None => {
                let number = self.next_batch;
                let open = Open {
                    number,
                    shard,
                    builder: BatchBuilder::with_bytes_max(self.sizes.batch_bytes),
                    ticket: Ticket::new(),
                    expect: expect.cloned(),
                    ordinals: Vec::new(),
                    memory: 0,
                    since: Instant::now(),
                    sent_off: false,
                };
                slot.insert(open)
            }
        };
        if let Err(e) = open.builder.push(fields) {
            let fresh = open.builder.is_empty();
            let full = match e {
                BuildError::Record(e) => {
                    if fresh {
                        *slot = None;
                    }
                    return Err(ClientError::invalid(
                        reason::BAD_MESSAGE,
                        format!("the message cannot be sent: {e}"),
                    ));
                }
                BuildError::Full { .. } => format!("a message of {bytes} bytes fits no batch"),
            };
            if fresh {
                *slot = None;
            }
            return Err(ClientError::invalid(reason::BAD_MESSAGE, full));
        }
        let position = open.builder.len() - 1;
        if position == 0 {
            self.by_age.push_back((shard, open.number));
            self.unanswered.push_back(Arc::clone(&open.ticket));
            self.next_batch += 1;
            *wake = true;
        }
        open.memory += bytes;
        self.memory += bytes;
        if self.sizes.track_ordinals {
            match open.ordinals.last_mut() {
                Some((_, last)) if *last + 1 == self.next_ordinal => *last += 1,
                Some(_) | None => open.ordinals.push((self.next_ordinal, self.next_ordinal)),
            }
        }
        self.next_ordinal += 1;
        let answer = place.then(|| Place {
            ticket: Arc::clone(&open.ticket),
            position,
        });
        if expect.is_some() || is_full(open, &self.sizes) {
            // A condition is about one message; nothing may be added to its batch.
            self.full.extend(slot.take());
            *wake = true;
        }
        Ok(Some(answer))
    }

    fn forget_answered(&mut self) {
        while self.unanswered.front().is_some_and(|t| t.is_resolved()) {
            self.unanswered.pop_front();
        }
        // One shard that waits must not let the tickets of the others pile up behind its own.
        if self.unanswered.len() >= self.tidy_at {
            self.unanswered.retain(|t| !t.is_resolved());
            self.tidy_at = TIDY_TICKETS.max(2 * self.unanswered.len());
        }
    }

    fn is_current(&self, (shard, number): (u32, u64)) -> bool {
        self.open[shard as usize].as_ref().is_some_and(|b| b.number == number)
    }

    fn forget_stale(&mut self) {
        while self.by_age.front().is_some_and(|&f| !self.is_current(f)) {
            self.by_age.pop_front();
        }
        // Busy shards leave stale entries behind an idle one.
        if self.by_age.len() > 2 * self.open.len() + 16 {
            let mut by_age = std::mem::take(&mut self.by_age);
            by_age.retain(|&f| self.is_current(f));
            self.by_age = by_age;
        }
    }

    /// Index in `by_age` of the oldest open batch that need not wait for more messages.
    fn due(&self, now: Instant, shard_open: &impl Fn(u32) -> bool, shard_idle: &impl Fn(u32) -> bool) -> Option<usize> {
        self.by_age.iter().position(|&(shard, number)| {
            self.open[shard as usize].as_ref().is_some_and(|b| {
                b.number == number
                    && shard_open(shard)
                    && (shard_idle(shard) || number < self.flush_below || now >= b.since + self.sizes.linger)
            })
        })
    }

    fn oldest_open(&self, shard_open: impl Fn(u32) -> bool) -> Option<Instant> {
        self.by_age
            .iter()
            .filter(|&&(shard, _)| shard_open(shard))
            .filter(|&&f| self.is_current(f))
            .find_map(|&(shard, _)| self.open[shard as usize].as_ref())
            .map(|b| b.since)
    }

    fn take(
        &mut self,
        now: Instant,
        shard_open: impl Fn(u32) -> bool,
        shard_idle: impl Fn(u32) -> bool,
    ) -> Option<Open> {
        if let Some(index) = self.full.iter().position(|b| shard_open(b.shard)) {
            return self.full.remove(index);
        }
        self.forget_stale();
        let index = self.due(now, &shard_open, &shard_idle)?;
        let (shard, _) = self.by_age.remove(index)?;
        self.open[shard as usize].take()
    }
}

impl Open {
    fn encode(mut self, codec: Codec) -> Encoded {
        let messages = self.builder.len();
        let bytes = self
            .builder
            .build(codec)
            .expect("a batch is opened by its first message");
        self.sent_off = true;
        Encoded {
            shard: self.shard,
            bytes,
            expect: self.expect.take(),
            ticket: Arc::clone(&self.ticket),
            messages,
            ordinals: std::mem::take(&mut self.ordinals),
            memory: self.memory,
            since: self.since,
        }
    }

    /// Gives an unsent batch up. Returns what it counted in memory.
    pub(super) fn give_up(self, error: &ClientError) -> usize {
        let retry = match error.retry {
            RetryClass::MayHaveHappened => RetryClass::DidNotHappen,
            RetryClass::DidNotHappen | RetryClass::CannotWork => error.retry,
        };
        self.ticket.resolve(Err(Arc::new(error.clone().with_retry(retry))));
        self.memory
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if !self.sent_off && !self.builder.is_empty() && !self.ticket.is_resolved() {
            self.ticket.resolve(Err(Arc::new(closed_error(false))));
        }
    }
}
