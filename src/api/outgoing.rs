//! What a read session has on its way to its client. Every frame with messages holds a permit of the node's read memory
//! from before it is read until the transport asks for the one behind it: only then have its bytes left for the client.
//! So a client that does not read holds what was sent it before it stopped, and no more.
//!
//! Memory is given first come, first served, and less at a time the shorter it is ([`Step`]), so that those who do not
//! read leave room for those who do. A session that takes nothing for [`STALLED`] while others wait loses its memory, and
//! ends; what it leaves in the transport, one frame, is bounded by the number of sessions, among which it counts until
//! its client is gone.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use futures_util::Stream;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::SessionPlace;
use crate::base::budget::{ByteBudget, BytePermit};

/// Frames waiting to be sent to one client.
const FRAMES: usize = 4;
/// Bytes of frames on their way to one client: a frame is begun while half of this is free, or, when memory is short,
/// all of it.
const SESSION_BYTES: u32 = 2 << 20;
const SESSION_STEP: u32 = SESSION_BYTES / 2;

/// How much a frame may take: beyond that a stored batch is cut, though never a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The largest batch, while this stays within half of the memory.
    Large = 9 << 20,
    /// Within three quarters; one frame on its way.
    Small = 1 << 20,
    /// Beyond; one frame on its way.
    Least = 64 << 10,
}

impl Step {
    fn of(memory: &ByteBudget) -> Self {
        let (used, limit) = (memory.used(), memory.limit());
        if used + Step::Large.bytes() <= limit / 2 {
            Step::Large
        } else if used + Step::Small.bytes() <= limit / 4 * 3 {
            Step::Small
        } else {
            Step::Least
        }
    }

    /// With what a frame has besides its batch.
    fn bytes(self) -> usize {
        self as usize + FRAME_OVERHEAD
    }
}
/// What a frame has besides its batch: a cursor, mostly.
const FRAME_OVERHEAD: usize = 64 << 10;
/// How long a client may take nothing while others wait for memory.
pub(super) const STALLED: Duration = Duration::from_secs(30);

/// Memory for a frame that is about to be read.
pub(super) struct Room {
    node: BytePermit,
    own: OwnedSemaphorePermit,
}

impl Room {
    /// Bytes that a batch may have. A single message may have more: see [`Sender::fit`].
    pub(super) fn bytes(&self) -> u64 {
        self.node.bytes().saturating_sub(FRAME_OVERHEAD) as u64
    }
}

struct State<T> {
    queue: VecDeque<(T, Option<Room>)>,
    /// Of the frame that the transport took last.
    sending: Option<Room>,
    /// When the transport last took a frame, or the first one came to an empty queue.
    taken: Instant,
    /// No frame will follow.
    ended: bool,
    /// Nobody will take one.
    gone: bool,
    waker: Option<Waker>,
}

struct Shared<T> {
    state: Mutex<State<T>>,
    taken: Notify,
    gone: Notify,
}

/// The session's side. One task has it.
pub(super) struct Sender<T> {
    shared: Arc<Shared<T>>,
    memory: ByteBudget,
    own: Arc<Semaphore>,
}

/// The client's side: the body of the response. It keeps the session's place, because what it holds is bounded only by
/// the number of these.
pub(super) struct Frames<T> {
    shared: Arc<Shared<T>>,
    _place: SessionPlace,
}

/// The client is gone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

pub(super) fn outgoing<T>(memory: ByteBudget, place: SessionPlace) -> (Sender<T>, Frames<T>) {
    let shared = Arc::new(Shared {
        state: Mutex::new(State {
            queue: VecDeque::new(),
            sending: None,
            taken: Instant::now(),
            ended: false,
            gone: false,
            waker: None,
        }),
        taken: Notify::new(),
        gone: Notify::new(),
    });
    let sender = Sender {
        shared: shared.clone(),
        memory,
        own: Arc::new(Semaphore::new(SESSION_BYTES as usize)),
    };
    (sender, Frames { shared, _place: place })
}

impl<T> Sender<T> {
    /// Waits until the session's frames before have left and the node has memory for another. May be cancelled.
    /// A frame sent with its room finds a place in the queue.
    pub(super) async fn room(&self) -> Result<Room, Gone> {
        let wait = async {
            while self.shared.state.lock().queue.len() >= FRAMES {
                self.shared.taken.notified().await;
            }
            let mut own = self.share(SESSION_STEP).await;
            if Step::of(&self.memory) != Step::Large {
                own.merge(self.share(SESSION_BYTES - SESSION_STEP).await);
            }
            let step = Step::of(&self.memory);
            // Nothing is free while others wait.
            if self.memory.free() >= step.bytes()
                && let Some(node) = self.memory.try_acquire(step.bytes())
            {
                return Room { node, own };
            }
            Room {
                node: self.take(Step::Least.bytes()).await,
                own,
            }
        };
        tokio::select! {
            biased;
            () = self.closed() => Err(Gone),
            room = wait => Ok(room),
        }
    }

    async fn share(&self, bytes: u32) -> OwnedSemaphorePermit {
        let share = Arc::clone(&self.own).acquire_many_owned(bytes).await;
        share.expect("the semaphore of a session is never closed")
    }

    async fn take(&self, bytes: usize) -> BytePermit {
        let bytes = bytes.min(self.memory.limit());
        let permit = self.memory.acquire(bytes).await;
        permit.expect("no more than there is was asked for")
    }

    /// Makes the room as large as the frame that was read: usually smaller. A larger one, of a single large message,
    /// waits for its memory.
    pub(super) async fn fit(&self, room: Room, bytes: usize) -> Result<Room, Gone> {
        let Room { mut node, mut own } = room;
        let size = u32::try_from(bytes).unwrap_or(u32::MAX).min(SESSION_BYTES);
        let held = u32::try_from(own.num_permits()).unwrap_or(u32::MAX);
        if size < held {
            drop(own.split((held - size) as usize));
        } else if let Ok(more) = Arc::clone(&self.own).try_acquire_many_owned(size - held) {
            own.merge(more);
        }
        if bytes <= node.bytes() {
            node.shrink_to(bytes);
            return Ok(Room { node, own });
        }
        // Who waits holds nothing.
        drop(node);
        tokio::select! {
            node = self.take(bytes) => Ok(Room { node, own }),
            () = self.closed() => Err(Gone),
        }
    }

    /// Puts a frame into the queue, when there is a place.
    pub(super) async fn send(&self, frame: T, room: Option<Room>) -> Result<(), Gone> {
        loop {
            {
                let mut state = self.shared.state.lock();
                if state.gone {
                    return Err(Gone);
                }
                if state.queue.len() < FRAMES {
                    if state.queue.is_empty() {
                        state.taken = Instant::now();
                    }
                    state.queue.push_back((frame, room));
                    wake(state);
                    return Ok(());
                }
            }
            self.shared.taken.notified().await;
        }
    }

    /// Whether [`send`](Self::send) finds a place at once.
    pub(super) fn has_place(&self) -> bool {
        self.shared.state.lock().queue.len() < FRAMES
    }

    /// Puts the last frame into the queue, whether or not there is a place.
    pub(super) fn send_last(&self, frame: T) {
        let mut state = self.shared.state.lock();
        state.queue.push_back((frame, None));
        state.ended = true;
        wake(state);
    }

    /// Whether the client has taken nothing for [`STALLED`], while others wait for the memory that it holds.
    pub(super) fn is_stalled(&self) -> bool {
        let state = self.shared.state.lock();
        let holds = state.sending.is_some() || state.queue.iter().any(|(_, room)| room.is_some());
        holds && state.taken.elapsed() >= STALLED && self.memory.waiting() > 0
    }

    /// Takes back everything that the transport has not taken, and all memory.
    pub(super) fn clear(&self) {
        let mut state = self.shared.state.lock();
        let left = (std::mem::take(&mut state.queue), state.sending.take());
        drop(state);
        drop(left);
    }

    /// Completes when the client is gone.
    pub(super) async fn closed(&self) {
        while !self.shared.state.lock().gone {
            self.shared.gone.notified().await;
        }
    }
}

fn wake<T>(mut state: parking_lot::MutexGuard<'_, State<T>>) {
    let waker = state.waker.take();
    drop(state);
    if let Some(waker) = waker {
        waker.wake();
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.shared.state.lock();
        state.ended = true;
        wake(state);
    }
}

impl<T> Stream for Frames<T> {
    type Item = T;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        let mut state = self.shared.state.lock();
        // Who asks for another frame has sent the one before, but for what still fits the client's window.
        let sent = state.sending.take();
        let polled = match state.queue.pop_front() {
            Some((frame, room)) => {
                state.sending = room;
                state.taken = Instant::now();
                Poll::Ready(Some(frame))
            }
            None if state.ended => Poll::Ready(None),
            None => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        };
        drop(state);
        drop(sent);
        self.shared.taken.notify_one();
        polled
    }
}

impl<T> Drop for Frames<T> {
    fn drop(&mut self) {
        let left = {
            let mut state = self.shared.state.lock();
            state.gone = true;
            (std::mem::take(&mut state.queue), state.sending.take())
        };
        drop(left);
        self.shared.taken.notify_one();
        self.shared.gone.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt};

    use super::*;

    const MIB: usize = 1 << 20;

    fn open(memory: &ByteBudget) -> (Sender<u32>, Frames<u32>) {
        outgoing(memory.clone(), SessionPlace::for_test())
    }

    async fn push(to: &Sender<u32>, frame: u32, bytes: usize) {
        let room = to.room().await.expect("open");
        let room = to.fit(room, bytes).await.expect("open");
        to.send(frame, Some(room)).await.expect("open");
    }

    #[tokio::test]
    async fn a_frame_holds_its_memory_until_the_one_behind_it_is_asked_for() {
        let memory = ByteBudget::new("test", 64 * MIB);
        let (to, mut from) = open(&memory);
        push(&to, 1, 300_000).await;
        push(&to, 2, 500_000).await;
        assert_eq!(memory.used(), 800_000);
        assert_eq!(from.next().await, Some(1));
        assert_eq!(memory.used(), 800_000, "the transport has it, the client may not");
        assert_eq!(from.next().await, Some(2));
        assert_eq!(memory.used(), 500_000);
        assert_eq!(from.next().now_or_never(), None);
        assert_eq!(memory.used(), 0);
        push(&to, 3, 10).await;
        drop(to);
        assert_eq!(from.next().await, Some(3));
        assert_eq!(from.next().await, None);
        assert_eq!(memory.used(), 0);
    }

    #[tokio::test]
    async fn one_client_that_does_not_read_holds_little() {
        let memory = ByteBudget::new("test", 64 * MIB);
        for bytes in [100_000, 300_000, 700_000, 8 * MIB] {
            let (to, from) = open(&memory);
            let mut frame = 0;
            while push(&to, frame, bytes).now_or_never().is_some() {
                frame += 1;
            }
            let most = bytes.max(SESSION_BYTES as usize);
            assert!(memory.used() > 0 && memory.used() <= most, "{bytes}: {}", memory.used());
            drop(from);
            assert_eq!(memory.used(), 0);
            assert_eq!(to.room().await.err(), Some(Gone));
            assert_eq!(to.send(9, None).await, Err(Gone));
        }
    }

    #[tokio::test]
    async fn when_memory_is_short_frames_are_small_and_then_wait_their_turn() {
        let memory = ByteBudget::new("test", 32 * MIB);
        let (to, _from) = open(&memory);
        assert_eq!(to.room().await.expect("open").bytes(), Step::Large as u64);
        let half = memory.try_acquire(16 * MIB).expect("free");
        let small = to.room().await.expect("open");
        assert_eq!(small.bytes(), Step::Small as u64);
        let small = to.fit(small, 1_000).await.expect("open");
        to.send(1, Some(small)).await.expect("open");
        assert!(to.room().now_or_never().is_none(), "one frame on its way");
        let (to, _from) = open(&memory);
        let most = memory.try_acquire(10 * MIB).expect("free");
        assert_eq!(to.room().await.expect("open").bytes(), Step::Least as u64);
        let rest = memory.try_acquire(memory.free()).expect("free");
        let mut waiting = Box::pin(to.room());
        assert!(futures_util::poll!(&mut waiting).is_pending());
        assert_eq!(memory.waiting(), 1);
        drop(rest);
        assert!(waiting.await.is_ok());
        // A message larger than its room waits without holding any.
        let room = to.room().await.expect("open");
        let rest = memory.try_acquire(memory.free()).expect("free");
        let mut fitting = Box::pin(to.fit(room, 3 * MIB));
        assert!(futures_util::poll!(&mut fitting).is_pending());
        drop((half, most, rest));
        assert_eq!(fitting.await.expect("open").node.bytes(), 3 * MIB);
    }

    #[tokio::test(start_paused = true)]
    async fn who_takes_nothing_while_others_wait_is_stalled() {
        let memory = ByteBudget::new("test", 32 * MIB);
        let (to, mut from) = open(&memory);
        push(&to, 1, 1_000).await;
        push(&to, 2, 1_000).await;
        assert_eq!(from.next().await, Some(1));
        tokio::time::advance(STALLED * 2).await;
        assert!(!to.is_stalled(), "nobody waits");
        let rest = memory.try_acquire(memory.free()).expect("free");
        let mut other = Box::pin(memory.acquire(1_500));
        assert!(futures_util::poll!(&mut other).is_pending());
        assert!(to.is_stalled());
        to.clear();
        to.send_last(7);
        assert!(!to.is_stalled(), "it holds nothing but the last word");
        assert!(other.await.is_ok(), "its memory was enough");
        drop(rest);
        assert_eq!(from.next().await, Some(7));
        assert_eq!(from.next().await, None);
        assert_eq!(memory.used(), 0);
        // Who has waited long for messages is not one who takes none.
        let (to, mut from) = open(&memory);
        assert_eq!(from.next().now_or_never(), None);
        tokio::time::advance(STALLED * 2).await;
        push(&to, 1, 1_000).await;
        let rest = memory.try_acquire(memory.free()).expect("free");
        let mut other = Box::pin(memory.acquire(1_500));
        assert!(futures_util::poll!(&mut other).is_pending());
        assert!(!to.is_stalled());
        drop(rest);
    }
}
