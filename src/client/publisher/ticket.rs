//! The fate of one batch, waited for by the futures of its messages. One allocation per batch, none per message.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;

use crate::client::error::{ClientError, RetryClass, reason};
use crate::wire::v1;

/// Where and how durably one message was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PubAck {
    /// The stream's immutable id, 32 hex digits.
    pub stream_id: Arc<str>,
    /// The stream's epoch.
    pub epoch: u64,
    /// Index of the shard in the stream.
    pub shard: u32,
    /// The message's place in the shard. Absent for a duplicate, and for a message that had been stored before the
    /// connection broke and whose place the server no longer tells.
    pub sequence: Option<u64>,
    /// A message with this id had been stored before: this one was not.
    pub duplicate: bool,
    /// Next sequence of the shard when the batch was stored.
    pub tail: u64,
    /// Raft term.
    pub term: u64,
    /// When it was appended, in microseconds since the Unix epoch.
    pub append_time_us: u64,
    /// What the ack promises.
    pub durability: v1::Durability,
}

/// Where and how durably one batch was stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchReceipt {
    /// The stream's immutable id, 32 hex digits.
    pub stream_id: Arc<str>,
    /// The stream's epoch.
    pub epoch: u64,
    /// Index of the shard in the stream.
    pub shard: u32,
    /// First sequence stored, inclusive. Absent when every message was a duplicate, or when the place is not known
    /// any more (see [`PubAck::sequence`]).
    pub first: Option<u64>,
    /// Last sequence stored, inclusive.
    pub last: Option<u64>,
    /// Next sequence of the shard.
    pub tail: u64,
    /// Raft term.
    pub term: u64,
    /// Microseconds since the Unix epoch.
    pub append_time_us: u64,
    /// Positions in the batch of messages whose id had been stored before. Ascending.
    pub duplicates: Vec<u32>,
    /// The batch had been applied before the connection broke; this answers its repetition.
    pub repeated: bool,
    /// What the ack promises.
    pub durability: v1::Durability,
}

impl BatchReceipt {
    pub(crate) fn from_ack(ack: v1::BatchAck, stream_id: &Arc<str>, epoch: u64) -> Self {
        BatchReceipt {
            stream_id: Arc::clone(stream_id),
            epoch,
            shard: ack.shard,
            first: ack.first,
            last: ack.last,
            tail: ack.tail,
            term: ack.term,
            append_time_us: ack.append_time_us,
            durability: ack.durability(),
            repeated: ack.duplicate,
            duplicates: ack.duplicates,
        }
    }

    /// The ack of the message at `position` of the batch.
    fn of(&self, position: u32) -> PubAck {
        let (duplicate, before) = match self.duplicates.binary_search(&position) {
            Ok(_) => (true, 0),
            Err(before) => (false, before as u64),
        };
        let sequence = match self.first {
            Some(first) if !duplicate => Some(first + u64::from(position) - before),
            Some(_) | None => None,
        };
        PubAck {
            stream_id: Arc::clone(&self.stream_id),
            epoch: self.epoch,
            shard: self.shard,
            sequence,
            duplicate,
            tail: self.tail,
            term: self.term,
            append_time_us: self.append_time_us,
            durability: self.durability,
        }
    }
}

pub(super) type Outcome = Result<Arc<BatchReceipt>, Arc<ClientError>>;

/// Set once, by the session; read by any number of waiters.
#[derive(Debug, Default)]
pub(super) struct Ticket {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    outcome: Option<Outcome>,
    /// In the order in which they came, so that acks wake in the order of the messages.
    wakers: Vec<Waker>,
}

impl Ticket {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Ticket::default())
    }

    /// Decides the batch's fate. Only the first call counts; tells whether this was it.
    pub(super) fn resolve(&self, outcome: Outcome) -> bool {
        let wakers = {
            let mut state = self.state.lock();
            if state.outcome.is_some() {
                return false;
            }
            state.outcome = Some(outcome);
            std::mem::take(&mut state.wakers)
        };
        wakers.into_iter().for_each(Waker::wake);
        true
    }

    pub(super) fn is_resolved(&self) -> bool {
        self.state.lock().outcome.is_some()
    }

    fn poll(&self, slot: &mut Option<usize>, cx: &Context<'_>) -> Poll<Outcome> {
        let mut state = self.state.lock();
        if let Some(outcome) = &state.outcome {
            return Poll::Ready(outcome.clone());
        }
        match slot.and_then(|s| state.wakers.get_mut(s)) {
            Some(waker) => waker.clone_from(cx.waker()),
            None => {
                *slot = Some(state.wakers.len());
                state.wakers.push(cx.waker().clone());
            }
        }
        Poll::Pending
    }

    /// Waits for the batch's fate.
    pub(super) fn wait(self: &Arc<Self>) -> Fate {
        Fate {
            ticket: Arc::clone(self),
            slot: None,
        }
    }
}

/// What a batch says when it is dropped without an answer.
pub(super) fn closed_error(sent: bool) -> ClientError {
    let (retry, what) = if sent {
        (
            RetryClass::MayHaveHappened,
            "the publisher was closed before the server answered",
        )
    } else {
        (
            RetryClass::DidNotHappen,
            "the publisher was closed before the message was sent",
        )
    };
    ClientError::local(tonic::Code::Cancelled, reason::CLOSED, what).with_retry(retry)
}

/// A batch's fate, in the future.
#[derive(Debug)]
pub(super) struct Fate {
    ticket: Arc<Ticket>,
    slot: Option<usize>,
}

impl Future for Fate {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let Fate { ticket, slot } = &mut *self;
        ticket.poll(slot, cx)
    }
}

/// A message on its way: a future of its [`PubAck`]. Dropping it does not take the message back.
#[derive(Debug)]
#[must_use = "an ack that nobody waits for tells nobody that the message was lost"]
pub struct PendingAck {
    pub(super) fate: Fate,
    pub(super) position: u32,
}

impl Future for PendingAck {
    type Output = Result<PubAck, ClientError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let position = self.position;
        Pin::new(&mut self.fate).poll(cx).map(|outcome| match outcome {
            Ok(receipt) => Ok(receipt.of(position)),
            Err(e) => Err(ClientError::clone(&e)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn receipt(first: Option<u64>, duplicates: Vec<u32>) -> BatchReceipt {
        BatchReceipt {
            stream_id: "0".into(),
            epoch: 1,
            shard: 0,
            first,
            last: None,
            tail: 0,
            term: 1,
            append_time_us: 0,
            duplicates,
            repeated: false,
            durability: v1::Durability::QuorumSynced,
        }
    }

    #[test]
    fn sequences_skip_the_duplicates_of_the_batch() {
        let r = receipt(Some(10), vec![1, 2, 5]);
        let got: Vec<_> = (0..7).map(|i| (r.of(i).sequence, r.of(i).duplicate)).collect();
        assert_eq!(
            got,
            [
                (Some(10), false),
                (None, true),
                (None, true),
                (Some(11), false),
                (Some(12), false),
                (None, true),
                (Some(13), false)
            ]
        );
        assert_eq!(receipt(None, vec![0]).of(0).sequence, None);
    }

    #[tokio::test]
    async fn the_first_outcome_counts_and_every_waiter_gets_it() {
        let ticket = Ticket::new();
        let waiting = tokio::spawn(ticket.wait());
        tokio::task::yield_now().await;
        assert!(!ticket.is_resolved());
        assert!(ticket.resolve(Ok(Arc::new(receipt(Some(3), vec![])))));
        assert!(!ticket.resolve(Err(Arc::new(closed_error(true)))));
        assert_eq!(waiting.await.expect("task").expect("stored").first, Some(3));
        assert_eq!(
            PendingAck {
                fate: ticket.wait(),
                position: 2
            }
            .await
            .expect("stored")
            .sequence,
            Some(5)
        );
    }
}
