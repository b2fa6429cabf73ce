//! A pipelined append stream: requests are sent as they come, up to a window; answers are given in order. Whoever
//! polls the answers drives the sending, so that no task is needed per stream.
//!
//! A request that only tells what is committed waits a moment for entries that tell it as well.

use std::collections::VecDeque;
use std::pin::Pin;
use std::time::Duration;

use futures_util::{Stream, StreamExt};
use openraft::errors::{RPCError, Unreachable};
use openraft::raft::{AppendEntriesRequest, StreamAppendResult};
use tokio::sync::{AcquireError, OwnedSemaphorePermit};
use tokio::time::Instant;

use super::convert;
use super::session::AppendStream;
use crate::raft::types::{LogId, Mainstem};
use crate::wire::internal as pb;

/// Unanswered requests of a stream.
pub(super) const REQUESTS_MAX: usize = 64;

/// What a replica answered in less than this it answered to the leader that it still has: it votes for no other one so soon after.
const RECENT: Duration = Duration::from_millis(50);

type Answer = Result<StreamAppendResult<Mainstem>, RPCError<Mainstem>>;
type Place = Result<OwnedSemaphorePermit, AcquireError>;

pub(super) fn unreachable(text: impl ToString) -> RPCError<Mainstem> {
    RPCError::Unreachable(Unreachable::from_string(text))
}

/// A request that is sent and not answered. Holds its place in the peer's budget.
struct Flight {
    bytes: usize,
    at: Instant,
    /// What its answer shows that the replica has.
    last: Option<LogId>,
    /// What a later request told to be committed that adds no entries: the answer to this one would count as one to that too.
    followed: Option<Option<LogId>>,
    _place: OwnedSemaphorePermit,
}

impl Flight {
    /// openraft takes an answer for one to every request that adds nothing to what it shows, also to those made since, and by
    /// the last one's time for the proof that this leader led then. An answer may be older than that, and than the next
    /// leader: so none is passed on that a later one is to follow, unless it is known to be recent and something may wait
    /// for it to be committed. The later answer shows the same.
    fn is_no_answer_to_the_next(&self, last: &Option<LogId>) -> bool {
        let Some(commit) = &self.followed else { return false };
        *last >= self.last && (commit >= last || self.at.elapsed() >= RECENT)
    }
}

/// A request that waits for its place in the peer's budget.
struct Waiting {
    append: pb::Append,
    bytes: usize,
    place: Pin<Box<dyn Future<Output = Place> + Send>>,
}

/// A request that [may wait](Appending::may_wait). The next one takes its place and tells what it tells; that its answer is
/// missing then does not matter, because a later answer is one for everything before.
struct Held {
    request: AppendEntriesRequest<Mainstem>,
    /// When it goes, if no other does before.
    until: Instant,
}

struct Appending<S> {
    stream: AppendStream,
    /// Goes before the input.
    first: Option<AppendEntriesRequest<Mainstem>>,
    input: S,
    input_ended: bool,
    waiting: Option<Waiting>,
    held: Option<Held>,
    /// The last entry that was sent, or that was before the first; `None`: nothing was sent.
    sent: Option<Option<LogId>>,
    flight: VecDeque<Flight>,
    flight_bytes: usize,
    /// When the last answer came, or the first unanswered request went out.
    quiet_since: Instant,
}

/// The answers to `first` and then `input`, in order. Ends with the input, after an answer that ends the stream, or after
/// an error.
pub(super) fn append<S>(
    stream: AppendStream,
    first: AppendEntriesRequest<Mainstem>,
    input: S,
) -> impl Stream<Item = Answer> + Send
where
    S: Stream<Item = AppendEntriesRequest<Mainstem>> + Send + Unpin + 'static,
{
    let state = Appending {
        stream,
        first: Some(first),
        input,
        input_ended: false,
        waiting: None,
        held: None,
        sent: None,
        flight: VecDeque::new(),
        flight_bytes: 0,
        quiet_since: Instant::now(),
    };
    futures_util::stream::unfold(Some(state), |state| async move { state?.next().await })
}

impl<S> Appending<S>
where
    S: Stream<Item = AppendEntriesRequest<Mainstem>> + Send + Unpin + 'static,
{
    fn idle(&self) -> bool {
        self.flight.is_empty() && self.waiting.is_none()
    }

    fn timeout(&self) -> Duration {
        self.stream.session.append_timeout
    }

    fn has_room(&self) -> bool {
        self.waiting.is_none()
            && self.flight.len() < REQUESTS_MAX
            && (self.flight.is_empty() || self.flight_bytes < self.stream.session.stream_bytes_max)
    }

    async fn next(mut self) -> Option<(Answer, Option<Self>)> {
        if let Some(first) = self.first.take()
            && let Err(reason) = self.take(&first)
        {
            return Some((Err(unreachable(reason)), None));
        }
        loop {
            if self.input_ended && self.idle() {
                return None;
            }
            let deadline = self.quiet_since + self.timeout();
            let has_room = self.has_room();
            let busy = !self.idle();
            tokio::select! {
                biased;
                answer = self.stream.answers.recv() => {
                    let Some(result) = answer else {
                        return Some((Err(unreachable(self.stream.session.reason())), None));
                    };
                    self.quiet_since = Instant::now();
                    let Some(done) = self.flight.pop_front() else {
                        return Some((Err(unreachable("an answer to nothing")), None));
                    };
                    self.flight_bytes -= done.bytes;
                    let result = convert::appended_from_pb(result);
                    if let Ok(Ok(last)) = &result
                        && done.is_no_answer_to_the_next(last)
                    {
                        if self.idle()
                            && let Some(held) = self.held.as_mut().filter(|held| held.request.leader_commit < *last)
                        {
                            held.until = self.quiet_since;
                        }
                        continue;
                    }
                    return Some(match result {
                        Ok(Ok(last)) => (Ok(Ok(last)), Some(self)),
                        Ok(Err(stop)) => (Ok(Err(stop)), None),
                        Err(text) => (Err(unreachable(text)), None),
                    });
                }
                place = place_of(&mut self.waiting), if self.waiting.is_some() => {
                    if let (Some(waiting), Ok(place)) = (self.waiting.take(), place)
                        && let Err(reason) = self.send(waiting.append, waiting.bytes, place)
                    {
                        return Some((Err(unreachable(reason)), None));
                    }
                }
                request = self.input.next(), if has_room && !self.input_ended => {
                    self.input_ended = request.is_none();
                    if let Some(request) = &request {
                        self.note_followed(request);
                    }
                    let next = match (request, self.held.take()) {
                        (Some(request), held) if self.may_wait(&request) => {
                            let until = held.map_or_else(|| Instant::now() + self.stream.commit_hold, |held| held.until);
                            self.held = Some(Held { request, until });
                            None
                        }
                        (request, held) => request.or_else(|| held.map(|held| held.request)),
                    };
                    if let Some(request) = next
                        && let Err(reason) = self.take(&request)
                    {
                        return Some((Err(unreachable(reason)), None));
                    }
                }
                () = due(self.held.as_ref()), if has_room => {
                    if let Some(Held { request, .. }) = self.held.take()
                        && let Err(reason) = self.take(&request)
                    {
                        return Some((Err(unreachable(reason)), None));
                    }
                }
                () = tokio::time::sleep_until(deadline), if busy => {
                    let text = format!(
                        "node {} has not answered {} append requests for {:?}",
                        self.stream.session.node,
                        self.flight.len(),
                        self.timeout(),
                    );
                    return Some((Err(unreachable(text)), None));
                }
            }
        }
    }

    fn note_followed(&mut self, request: &AppendEntriesRequest<Mainstem>) {
        if request.entries.is_empty() {
            let before = self.flight.iter_mut().rev();
            before
                .take_while(|flight| flight.last == request.prev_log_id)
                .for_each(|flight| flight.followed = Some(request.leader_commit));
        }
    }

    /// Whether a request tells nothing but what is committed, to a replica that answers for all entries before it anyway.
    fn may_wait(&self, request: &AppendEntriesRequest<Mainstem>) -> bool {
        request.entries.is_empty() && self.sent == Some(request.prev_log_id) && !self.stream.commit_hold.is_zero()
    }

    /// A request from the input: sent at once if the peer's budget has a place for it.
    fn take(&mut self, request: &AppendEntriesRequest<Mainstem>) -> Result<(), String> {
        if self.idle() {
            self.quiet_since = Instant::now();
        }
        let (append, bytes) = convert::append_to_pb(self.stream.id, self.stream.open.take(), request);
        self.sent = Some(request.entries.last().map(|entry| entry.log_id).or(request.prev_log_id));
        let session = &self.stream.session;
        let places = u32::try_from(bytes.min(session.budget_bytes)).unwrap_or(u32::MAX);
        match session.budget.clone().try_acquire_many_owned(places) {
            Ok(place) => self.send(append, bytes, place),
            Err(_) => {
                let place = Box::pin(session.budget.clone().acquire_many_owned(places));
                self.waiting = Some(Waiting { append, bytes, place });
                Ok(())
            }
        }
    }

    fn send(&mut self, append: pb::Append, bytes: usize, place: OwnedSemaphorePermit) -> Result<(), String> {
        self.stream.send(append, bytes)?;
        self.flight_bytes += bytes;
        self.flight.push_back(Flight {
            bytes,
            at: Instant::now(),
            last: self.sent.flatten(),
            followed: None,
            _place: place,
        });
        Ok(())
    }
}

/// Returns when what is held is to go.
async fn due(held: Option<&Held>) {
    match held {
        Some(held) => tokio::time::sleep_until(held.until).await,
        None => std::future::pending().await,
    }
}

/// The place of the request that waits. The future stays where it is, so that its turn is kept.
async fn place_of(waiting: &mut Option<Waiting>) -> Place {
    match waiting {
        Some(waiting) => waiting.place.as_mut().await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests;
