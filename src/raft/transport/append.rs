//! A pipelined append stream: requests are sent as they come, up to a window; answers are given in order. Whoever
//! polls the answers drives the sending, so that no task is needed per stream.

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
use crate::raft::types::Mainstem;
use crate::wire::internal as pb;

/// Unanswered requests of a stream.
pub(super) const REQUESTS_MAX: usize = 64;

type Answer = Result<StreamAppendResult<Mainstem>, RPCError<Mainstem>>;
type Place = Result<OwnedSemaphorePermit, AcquireError>;

pub(super) fn unreachable(text: impl ToString) -> RPCError<Mainstem> {
    RPCError::Unreachable(Unreachable::from_string(text))
}

/// A request that is sent and not answered. Holds its place in the peer's budget.
struct Flight {
    bytes: usize,
    _place: OwnedSemaphorePermit,
}

/// A request that waits for its place in the peer's budget.
struct Waiting {
    append: pb::Append,
    bytes: usize,
    place: Pin<Box<dyn Future<Output = Place> + Send>>,
}

struct Appending<S> {
    stream: AppendStream,
    /// Goes before the input.
    first: Option<AppendEntriesRequest<Mainstem>>,
    input: S,
    input_ended: bool,
    waiting: Option<Waiting>,
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
            && !self.input_ended
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
                    return Some(match convert::appended_from_pb(result) {
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
                request = self.input.next(), if has_room => {
                    let Some(request) = request else {
                        self.input_ended = true;
                        continue;
                    };
                    if let Err(reason) = self.take(&request) {
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

    /// A request from the input: sent at once if the peer's budget has a place for it.
    fn take(&mut self, request: &AppendEntriesRequest<Mainstem>) -> Result<(), String> {
        if self.idle() {
            self.quiet_since = Instant::now();
        }
        let (append, bytes) = convert::append_to_pb(self.stream.id, self.stream.open.take(), request);
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
        self.flight.push_back(Flight { bytes, _place: place });
        Ok(())
    }
}

/// The place of the request that waits. The future stays where it is, so that its turn is kept.
async fn place_of(waiting: &mut Option<Waiting>) -> Place {
    match waiting {
        Some(waiting) => waiting.place.as_mut().await,
        None => std::future::pending().await,
    }
}
