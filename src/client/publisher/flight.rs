//! Batches on their way: which to send, which to send again, and in what order their fates are told. No IO and no
//! clock, so that every turn of it can be tested.
//!
//! Per shard, entries are in the order of their producer sequences, and fates are told in that order. A batch that was
//! refused without having happened makes those behind it out of order, so that all of them come back: when none is left
//! unanswered, they are sent again from the first. The server knows a repeated batch by its producer sequence.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::ticket::{BatchReceipt, Ticket, closed_error};
use crate::client::error::{ClientError, RetryClass, reason};
use crate::wire::v1;

/// A batch that has a producer sequence.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) batch: Encoded,
    sequence: u64,
    state: State,
    /// It may have been applied, for all this side knows.
    uncertain: bool,
    /// The session that it was last sent in; 0 before the first.
    session: u64,
    /// It was sent in more than one session.
    travelled: bool,
}

/// An encoded batch and who waits for it.
#[derive(Debug)]
pub(super) struct Encoded {
    pub(super) shard: u32,
    pub(super) bytes: Bytes,
    pub(super) expect: Option<v1::Expectation>,
    pub(super) ticket: Arc<Ticket>,
    pub(super) messages: u32,
    /// Ordinals of its messages as inclusive ranges, if somebody wants to know.
    pub(super) ordinals: Vec<(u64, u64)>,
    /// What it counts in the publisher's memory.
    pub(super) memory: usize,
    /// When its first message came.
    pub(super) since: Instant,
}

#[derive(Debug)]
enum State {
    /// To be sent.
    Waiting,
    /// Sent in this session, not yet answered.
    Sent,
    /// To be sent again.
    Refused(ClientError),
    /// Its fate is known and will be told after those before it.
    Done(Result<BatchReceipt, ClientError>),
}

/// A batch whose fate is known.
#[derive(Debug)]
pub(super) struct Landed {
    pub(super) batch: Encoded,
    pub(super) outcome: Result<BatchReceipt, ClientError>,
}

#[derive(Debug, Default)]
struct Lane {
    entries: VecDeque<Entry>,
    /// Sequence of the last entry admitted.
    last_sequence: u64,
    /// How many entries are `Sent`.
    sent: usize,
    /// How many entries are `Waiting`.
    waiting: usize,
    /// Some entry is `Refused`.
    refused: bool,
    /// When the refused are sent again, once none is unanswered.
    resend_at: Option<Instant>,
    /// When a fate was last told, or the first entry came to an empty lane.
    told: Option<Instant>,
    /// Consecutive refusals, for growing pauses.
    strikes: u32,
}

/// What the answers so far ask for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Need {
    Nothing,
    /// The server has forgotten this producer: begin again under the next epoch.
    NewEpoch,
}

#[derive(Debug)]
pub(super) struct Flight {
    lanes: Vec<Lane>,
    window: v1::PublishWindow,
    /// This session's number, from 1.
    session: u64,
    sent_batches: usize,
    sent_bytes: u64,
    /// The lane that `next_to_send` looks at first, so that all get their turn.
    turn: usize,
}

const RESEND_FIRST: Duration = Duration::from_millis(5);
const RESEND_MAX: Duration = Duration::from_millis(1_000);

impl Flight {
    pub(super) fn new() -> Self {
        Flight {
            lanes: Vec::new(),
            window: v1::PublishWindow::default(),
            session: 0,
            sent_batches: 0,
            sent_bytes: 0,
            turn: 0,
        }
    }

    /// A session was opened on a stream with this many shards.
    pub(super) fn opened(&mut self, shards: usize, window: v1::PublishWindow) {
        self.session += 1;
        if self.lanes.len() < shards {
            self.lanes.resize_with(shards, Lane::default);
        }
        self.set_window(window);
    }

    pub(super) fn set_window(&mut self, window: v1::PublishWindow) {
        self.window = window;
    }

    /// No batch is here.
    pub(super) fn is_empty(&self) -> bool {
        self.lanes.iter().all(|l| l.entries.is_empty())
    }

    /// Nothing is sent and unanswered.
    pub(super) fn is_quiet(&self) -> bool {
        self.sent_batches == 0
    }

    /// This shard has nothing on its way.
    pub(super) fn shard_is_idle(&self, shard: u32) -> bool {
        self.lanes.get(shard as usize).is_some_and(|l| l.entries.is_empty())
    }

    /// Whether the window has room for a batch of this size. An empty window takes any one batch.
    fn has_room(&self, bytes: usize) -> bool {
        self.sent_batches == 0
            || (self.sent_batches < self.window.batches as usize
                && self.sent_bytes.saturating_add(bytes as u64) <= self.window.bytes)
    }

    /// Whether there is room for a new batch. If it turns out larger than the room, it is the only one that waits.
    pub(super) fn wants_more(&self) -> bool {
        self.has_room(1) && self.lanes.iter().all(|l| l.waiting == 0 || l.refused)
    }

    /// Whether this shard takes new batches: not while it is being sent again.
    pub(super) fn shard_is_open(&self, shard: u32) -> bool {
        self.lanes.get(shard as usize).is_some_and(|l| !l.refused)
    }

    /// Gives the batch its producer sequence. It is sent when its turn comes.
    pub(super) fn admit(&mut self, batch: Encoded, now: Instant) {
        let lane = &mut self.lanes[batch.shard as usize];
        if lane.entries.is_empty() {
            lane.told = Some(now);
        }
        lane.last_sequence += 1;
        lane.waiting += 1;
        lane.entries.push_back(Entry {
            sequence: lane.last_sequence,
            batch,
            state: State::Waiting,
            uncertain: false,
            session: 0,
            travelled: false,
        });
    }

    /// Whether `next_to_send` would return something.
    pub(super) fn can_send(&self) -> bool {
        self.lanes
            .iter()
            .filter(|l| !l.refused)
            .filter_map(|l| l.first_waiting().map(|index| &l.entries[index]))
            .any(|e| self.has_room(e.batch.bytes.len()))
    }

    /// The next batch for the wire, now counted as sent.
    pub(super) fn next_to_send(&mut self, map_epoch: u64) -> Option<v1::PublishBatch> {
        let lanes = self.lanes.len();
        for step in 0..lanes {
            let at = (self.turn + step) % lanes;
            let lane = &self.lanes[at];
            let Some(index) = lane.first_waiting().filter(|_| !lane.refused) else {
                continue;
            };
            let bytes = lane.entries[index].batch.bytes.len();
            if !self.has_room(bytes) {
                return None;
            }
            let lane = &mut self.lanes[at];
            let entry = &mut lane.entries[index];
            entry.state = State::Sent;
            entry.travelled |= entry.session != 0 && entry.session != self.session;
            entry.session = self.session;
            lane.waiting -= 1;
            lane.sent += 1;
            self.sent_batches += 1;
            self.sent_bytes += bytes as u64;
            self.turn = at + 1;
            return Some(v1::PublishBatch {
                shard: at as u32,
                map_epoch,
                producer_sequence: entry.sequence,
                batch: entry.batch.bytes.clone(),
                expect: entry.batch.expect.clone(),
            });
        }
        None
    }

    /// Takes an ack. Returns what is now known, in order.
    pub(super) fn acked(
        &mut self,
        receipt: BatchReceipt,
        sequence: u64,
        now: Instant,
    ) -> Result<(Vec<Landed>, Need), ClientError> {
        let shard = receipt.shard;
        let lane = self.answered(shard, sequence, State::Done(Ok(receipt)), false)?;
        lane.strikes = 0;
        Ok(lane.settle(now))
    }

    /// Takes a refusal. What can be sent again, will be; the rest is returned when its turn has come.
    pub(super) fn refused(&mut self, error: &v1::BatchError, now: Instant) -> Result<(Vec<Landed>, Need), ClientError> {
        let found = ClientError::from_batch_error(error);
        // A producer that is not known: what was sent just now did not happen. What was sent in an earlier session and
        // never answered is marked as uncertain already.
        let uncertain = found.retry == RetryClass::MayHaveHappened && found.reason != reason::UNKNOWN_PRODUCER;
        let state = match found.retry {
            RetryClass::CannotWork => State::Done(Err(found)),
            RetryClass::DidNotHappen | RetryClass::MayHaveHappened => State::Refused(found),
        };
        let lane = self.answered(error.shard, error.producer_sequence, state, uncertain)?;
        Ok(lane.settle(now))
    }

    /// Marks a sent batch as answered.
    fn answered(&mut self, shard: u32, sequence: u64, state: State, uncertain: bool) -> Result<&mut Lane, ClientError> {
        let stray = || {
            ClientError::bad_answer(format!(
                "the server answered batch {sequence} of shard {shard}, which was not sent"
            ))
            .with_retry(RetryClass::MayHaveHappened)
        };
        let lane = self.lanes.get_mut(shard as usize).ok_or_else(stray)?;
        let first = lane.entries.front().map_or(u64::MAX, |e| e.sequence);
        let index = sequence.checked_sub(first).ok_or_else(stray)? as usize;
        let entry = lane
            .entries
            .get_mut(index)
            .filter(|e| matches!(e.state, State::Sent))
            .ok_or_else(stray)?;
        lane.refused |= matches!(state, State::Refused(_));
        entry.state = state;
        entry.uncertain |= uncertain;
        lane.sent -= 1;
        self.sent_batches -= 1;
        self.sent_bytes -= entry.batch.bytes.len() as u64;
        Ok(lane)
    }

    /// When some refused batches are to be sent again.
    pub(super) fn resend_at(&self) -> Option<Instant> {
        self.lanes.iter().filter_map(|l| l.resend_at).min()
    }

    /// Makes refused batches whose pause is over ready to be sent.
    pub(super) fn rewind_due(&mut self, now: Instant) {
        for lane in &mut self.lanes {
            if lane.resend_at.is_some_and(|at| at <= now) {
                lane.rewind();
            }
        }
    }

    /// The session is over: whatever was not answered will be sent again in the next.
    pub(super) fn disconnected(&mut self) {
        self.sent_batches = 0;
        self.sent_bytes = 0;
        for lane in &mut self.lanes {
            for entry in &mut lane.entries {
                if matches!(entry.state, State::Sent) {
                    entry.state = State::Waiting;
                    entry.uncertain = true;
                }
            }
            lane.rewind();
        }
    }

    /// Takes up the sequences of a producer that was there before. Only before the first batch.
    pub(super) fn start_after(&mut self, last_applied: impl Fn(u32) -> u64) {
        for (lane, shard) in self.lanes.iter_mut().zip(0..) {
            debug_assert!(
                lane.entries.is_empty(),
                "the first session is opened before the first batch"
            );
            lane.last_sequence = last_applied(shard);
        }
    }

    /// Whether what the server remembers of this producer fits what was sent. If it has forgotten some, everything can
    /// begin again under a new epoch, but only if nothing unanswered could have been stored.
    pub(super) fn resume(&self, last_applied: impl Fn(u32) -> u64) -> Result<Need, ClientError> {
        let mut forgotten = false;
        for (lane, shard) in self.lanes.iter().zip(0..) {
            let answered_up_to = lane.last_sequence - lane.entries.len() as u64;
            let applied = last_applied(shard);
            forgotten |= applied < answered_up_to;
            if applied > lane.last_sequence {
                return Err(ClientError::local(
                    tonic::Code::FailedPrecondition,
                    "PRODUCER_IN_USE",
                    format!("another publisher uses this producer id: shard {shard} has batch {applied} of it"),
                ));
            }
        }
        if forgotten {
            self.check_renumberable().map(|()| Need::NewEpoch)
        } else {
            Ok(Need::Nothing)
        }
    }

    fn check_renumberable(&self) -> Result<(), ClientError> {
        if self
            .lanes
            .iter()
            .flat_map(|l| &l.entries)
            .any(|e| e.uncertain || matches!(e.state, State::Done(_)))
        {
            return Err(ClientError::local(
                tonic::Code::Aborted,
                "PRODUCER_FORGOTTEN",
                "the server has forgotten this producer while batches were unanswered: whether they were stored is unknown",
            )
            .with_retry(RetryClass::MayHaveHappened));
        }
        Ok(())
    }

    /// Numbers everything from 1 again, for a new producer epoch.
    pub(super) fn renumber(&mut self) -> Result<(), ClientError> {
        self.check_renumberable()?;
        for lane in &mut self.lanes {
            lane.last_sequence = lane.entries.len() as u64;
            for (entry, sequence) in lane.entries.iter_mut().zip(1..) {
                entry.sequence = sequence;
            }
        }
        Ok(())
    }

    /// Since when the shard that has waited longest has been told nothing. None when nothing is on its way.
    pub(super) fn stuck_since(&self) -> Option<Instant> {
        self.lanes
            .iter()
            .filter(|l| !l.entries.is_empty())
            .filter_map(|l| l.told)
            .min()
    }

    /// Gives everything up with this error; each batch is told whether it may have been stored.
    pub(super) fn give_up(&mut self, error: &ClientError) -> Vec<Landed> {
        self.sent_batches = 0;
        self.sent_bytes = 0;
        let mut landed = Vec::new();
        for lane in &mut self.lanes {
            for entry in lane.entries.drain(..) {
                let uncertain = entry.uncertain || matches!(entry.state, State::Sent);
                let outcome = match entry.state {
                    State::Done(outcome) => outcome,
                    State::Waiting | State::Sent | State::Refused(_) if uncertain => {
                        Err(error.clone().with_retry(RetryClass::MayHaveHappened))
                    }
                    State::Waiting | State::Sent | State::Refused(_) => Err(ClientError {
                        // What cannot work for the session did not happen for the batch.
                        retry: match error.retry {
                            RetryClass::MayHaveHappened => RetryClass::DidNotHappen,
                            RetryClass::DidNotHappen | RetryClass::CannotWork => error.retry,
                        },
                        ..error.clone()
                    }),
                };
                landed.push(Landed {
                    batch: entry.batch,
                    outcome,
                });
            }
            *lane = Lane {
                last_sequence: lane.last_sequence,
                ..Lane::default()
            };
        }
        landed
    }
}

impl Lane {
    /// Takes those whose fate is known off the front.
    fn land(&mut self) -> Vec<Landed> {
        let mut landed = Vec::new();
        while self.entries.front().is_some_and(|e| matches!(e.state, State::Done(_))) {
            if let Some(Entry {
                batch,
                state: State::Done(outcome),
                ..
            }) = self.entries.pop_front()
            {
                landed.push(Landed { batch, outcome });
            }
        }
        landed
    }

    fn first_waiting(&self) -> Option<usize> {
        if self.waiting == 0 {
            return None;
        }
        self.entries.iter().position(|e| matches!(e.state, State::Waiting))
    }

    /// Takes off what is known; when everything is answered and something was refused, decides what becomes of it.
    fn settle(&mut self, now: Instant) -> (Vec<Landed>, Need) {
        let mut landed = self.land();
        if !landed.is_empty() {
            self.told = Some(now);
        }
        if self.sent > 0 || !self.refused {
            return (landed, Need::Nothing);
        }
        self.drop_unwanted(&mut landed);
        if let Some(Entry {
            state: State::Refused(why),
            ..
        }) = self.entries.front()
            && matches!(why.reason.as_str(), reason::OUT_OF_ORDER | reason::UNKNOWN_PRODUCER)
        {
            // Everything before the first was answered, so the server should have known it.
            return (landed, Need::NewEpoch);
        }
        self.pause(now);
        (landed, Need::Nothing)
    }

    fn pause(&mut self, now: Instant) {
        if self.refused {
            let pause = RESEND_FIRST.saturating_mul(1 << self.strikes.min(8)).min(RESEND_MAX);
            self.strikes += 1;
            self.resend_at = Some(now + pause);
        }
    }

    /// A full stream that keeps its old messages does not want these. They did not happen, so the next batch takes
    /// their number; but only if no copy of them is left in an earlier session's pipeline.
    fn drop_unwanted(&mut self, landed: &mut Vec<Landed>) {
        let unwanted = |e: &Entry| matches!(&e.state, State::Refused(why) if why.reason == reason::STREAM_FULL);
        let renumberable =
            |e: &Entry| !e.travelled && !e.uncertain && matches!(e.state, State::Refused(_) | State::Waiting);
        if !self.entries.front().is_some_and(unwanted) || !self.entries.iter().all(renumberable) {
            return;
        }
        let mut sequence = self.entries.front().map_or(0, |e| e.sequence);
        while self.entries.front().is_some_and(unwanted) {
            if let Some(Entry {
                batch,
                state: State::Refused(why),
                ..
            }) = self.entries.pop_front()
            {
                landed.push(Landed {
                    batch,
                    outcome: Err(why),
                });
            }
        }
        for entry in &mut self.entries {
            entry.sequence = sequence;
            sequence += 1;
        }
        self.last_sequence = sequence - 1;
        self.refused = self.entries.iter().any(|e| matches!(e.state, State::Refused(_)));
    }

    /// The refused are to be sent again. Those behind them whose fate is known keep it: they used up their number.
    fn rewind(&mut self) {
        self.resend_at = None;
        self.refused = false;
        self.sent = 0;
        for entry in &mut self.entries {
            if matches!(entry.state, State::Refused(_)) {
                entry.state = State::Waiting;
            }
        }
        self.waiting = self
            .entries
            .iter()
            .filter(|e| matches!(e.state, State::Waiting))
            .count();
    }
}

impl Drop for Encoded {
    fn drop(&mut self) {
        // Nobody waits for ever for a batch that is gone.
        if !self.ticket.is_resolved() {
            self.ticket.resolve(Err(Arc::new(closed_error(true))));
        }
    }
}
