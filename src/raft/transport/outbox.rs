//! What waits to be sent on one stream. Two lanes: what is urgent (votes, heartbeats, their answers) goes before what
//! is bulk (appends). Many messages go into one frame; a frame is made when the connection asks for one, so that
//! under load frames grow by themselves and an idle connection sends at once.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use futures_util::Stream;
use parking_lot::Mutex;

use super::counts::sent_bytes;
use crate::wire::internal as pb;

/// Messages of a lane; a peer for which this many wait reads nothing.
const LANE_MAX: usize = 65_536;
/// Messages in a frame.
const FRAME_MESSAGES_MAX: usize = 4_096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lane {
    Urgent,
    Bulk,
}

/// Too much waits, or the stream has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rejected;

#[derive(Default)]
struct Queue {
    /// Sent before everything else, each alone.
    handshake: VecDeque<pb::Handshake>,
    urgent: VecDeque<(pb::PeerMessage, usize)>,
    bulk: VecDeque<(pb::PeerMessage, usize)>,
    closed: bool,
    reader: Option<Waker>,
}

/// The writing end. Clones are the same queue.
#[derive(Clone)]
pub(super) struct Outbox {
    queue: Arc<Mutex<Queue>>,
}

impl Outbox {
    /// A queue, and the frames made of it.
    pub fn new(frame_bytes_max: usize) -> (Self, Frames) {
        let queue = Arc::new(Mutex::new(Queue::default()));
        let frames = Frames {
            queue: queue.clone(),
            frame_bytes_max,
            sent: sent_bytes(),
        };
        (Self { queue }, frames)
    }

    fn change(&self, change: impl FnOnce(&mut Queue) -> Result<(), Rejected>) -> Result<(), Rejected> {
        let waker = {
            let mut queue = self.queue.lock();
            if queue.closed {
                return Err(Rejected);
            }
            change(&mut queue)?;
            queue.reader.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// Queues a step of the handshake.
    pub fn handshake(&self, step: pb::Handshake) -> Result<(), Rejected> {
        self.change(|q| {
            q.handshake.push_back(step);
            Ok(())
        })
    }

    /// Queues a message of about so many bytes.
    pub fn push(&self, lane: Lane, kind: pb::peer_message::Kind, bytes: usize) -> Result<(), Rejected> {
        let message = pb::PeerMessage { kind: Some(kind) };
        self.change(|q| {
            let lane = match lane {
                Lane::Urgent => &mut q.urgent,
                Lane::Bulk => &mut q.bulk,
            };
            if lane.len() >= LANE_MAX {
                return Err(Rejected);
            }
            lane.push_back((message, bytes));
            Ok(())
        })
    }

    /// Takes back the requests of an append stream that was given up: they hold no place in the budget any more.
    pub fn take_back(&self, stream: u64) {
        self.queue.lock().bulk.retain(|(message, _)| match &message.kind {
            Some(pb::peer_message::Kind::Append(append)) => append.stream != stream,
            Some(_) | None => true,
        });
    }

    /// Nothing more is taken; what is queued still goes out, then the stream ends.
    pub fn close(&self) {
        let waker = {
            let mut queue = self.queue.lock();
            queue.closed = true;
            queue.reader.take()
        };
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// As [`close`](Self::close), and forgets what is queued.
    pub fn abandon(&self) {
        {
            let mut queue = self.queue.lock();
            queue.urgent.clear();
            queue.bulk.clear();
        }
        self.close();
    }

    /// Messages that wait.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        let queue = self.queue.lock();
        queue.urgent.len() + queue.bulk.len()
    }
}

/// The reading end: what the connection sends.
pub(super) struct Frames {
    queue: Arc<Mutex<Queue>>,
    frame_bytes_max: usize,
    sent: metrics::Counter,
}

impl Frames {
    fn take(&self, cx: &Context<'_>) -> Poll<Option<pb::PeerFrame>> {
        let mut queue = self.queue.lock();
        if let Some(step) = queue.handshake.pop_front() {
            return Poll::Ready(Some(pb::PeerFrame {
                handshake: Some(step),
                messages: Vec::new(),
            }));
        }
        let mut messages = Vec::new();
        let mut bytes = 0;
        loop {
            let lane = if queue.urgent.is_empty() {
                &mut queue.bulk
            } else {
                &mut queue.urgent
            };
            let fits = lane
                .front()
                .is_some_and(|(_, size)| messages.is_empty() || bytes + size <= self.frame_bytes_max);
            if !fits || messages.len() >= FRAME_MESSAGES_MAX {
                break;
            }
            if let Some((message, size)) = lane.pop_front() {
                bytes += size;
                messages.push(message);
            }
        }
        if !messages.is_empty() {
            self.sent.increment(bytes as u64);
            return Poll::Ready(Some(pb::PeerFrame {
                handshake: None,
                messages,
            }));
        }
        if queue.closed {
            return Poll::Ready(None);
        }
        queue.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl Stream for Frames {
    type Item = pb::PeerFrame;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.take(cx)
    }
}

impl Drop for Frames {
    /// The connection is gone: what is queued goes nowhere.
    fn drop(&mut self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        queue.urgent = VecDeque::new();
        queue.bulk = VecDeque::new();
        queue.handshake = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use futures_util::StreamExt;

    fn end(stream: u64) -> pb::peer_message::Kind {
        pb::peer_message::Kind::AppendEnd(pb::AppendEnd { stream })
    }

    fn streams(frame: &pb::PeerFrame) -> Vec<u64> {
        frame
            .messages
            .iter()
            .filter_map(|m| match &m.kind {
                Some(pb::peer_message::Kind::AppendEnd(e)) => Some(e.stream),
                Some(_) | None => None,
            })
            .collect()
    }

    #[tokio::test]
    async fn messages_are_gathered_into_frames_and_urgent_ones_go_first() {
        let (outbox, mut frames) = Outbox::new(100);
        for n in 1..=4 {
            outbox.push(Lane::Bulk, end(n), 40).unwrap();
        }
        outbox.push(Lane::Urgent, end(9), 10).unwrap();
        outbox.push(Lane::Bulk, end(5), 400).unwrap();
        outbox.push(Lane::Bulk, end(6), 400).unwrap();
        outbox.close();
        assert_eq!(outbox.push(Lane::Bulk, end(7), 1), Err(Rejected));
        let mut all = Vec::new();
        while let Some(frame) = frames.next().await {
            all.push(streams(&frame));
        }
        assert_eq!(all, [vec![9, 1, 2], vec![3, 4], vec![5], vec![6]]);
    }

    #[tokio::test]
    async fn a_connection_that_is_gone_takes_what_was_queued_with_it() {
        let (outbox, frames) = Outbox::new(100);
        outbox.push(Lane::Bulk, end(1), 40).unwrap();
        drop(frames);
        assert_eq!(outbox.push(Lane::Urgent, end(2), 1), Err(Rejected));
        assert_eq!(outbox.waiting(), 0);
    }
}
