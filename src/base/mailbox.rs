//! Bounded mailboxes: the only way from one task to another. A full one refuses; nobody queues without bound.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::mpsc;
use tokio::sync::mpsc::error::{TryRecvError, TrySendError};

use crate::base::metric_names as names;

/// A mailbox for `capacity` items (at least 1). Its depth is reported under `name`; mailboxes of one name add up.
pub fn mailbox<T>(name: &'static str, capacity: usize) -> (Sender<T>, Receiver<T>) {
    let (tx, rx) = mpsc::channel(capacity.max(1));
    let shared = Arc::new(Shared {
        name,
        depth: AtomicUsize::new(0),
        depth_gauge: metrics::gauge!(names::BASE_MAILBOX_DEPTH_ITEMS, "mailbox" => name),
        refused_counter: metrics::counter!(names::BASE_MAILBOX_REFUSALS_TOTAL, "mailbox" => name),
    });
    (
        Sender {
            tx,
            shared: Arc::clone(&shared),
        },
        Receiver {
            rx,
            shared,
            batch: Vec::new(),
        },
    )
}

/// Why an item was not taken. The item comes back.
#[derive(Debug, PartialEq, Eq)]
pub enum SendError<T> {
    /// No room: refuse the work early.
    Full(T),
    /// The receiver is gone.
    Closed(T),
}

impl<T> SendError<T> {
    /// The item.
    pub fn into_inner(self) -> T {
        match self {
            SendError::Full(item) | SendError::Closed(item) => item,
        }
    }
}

impl<T> fmt::Display for SendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SendError::Full(_) => f.write_str("the mailbox is full"),
            SendError::Closed(_) => f.write_str("the mailbox is closed"),
        }
    }
}

impl<T: fmt::Debug> std::error::Error for SendError<T> {}

/// The receiver is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the mailbox is closed")]
pub struct Closed;

struct Shared {
    name: &'static str,
    depth: AtomicUsize,
    depth_gauge: metrics::Gauge,
    refused_counter: metrics::Counter,
}

/// An item on its way. The depth counts it from before it is sent until it is taken out or lost with the mailbox.
struct Counted<T> {
    item: T,
    _guard: Guard,
}

struct Guard(Arc<Shared>);

impl Guard {
    fn new(shared: &Arc<Shared>) -> Self {
        shared.depth.fetch_add(1, Ordering::Relaxed);
        shared.depth_gauge.increment(1.0);
        Guard(Arc::clone(shared))
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.0.depth.fetch_sub(1, Ordering::Relaxed);
        self.0.depth_gauge.decrement(1.0);
    }
}

/// The sending side. Clones send into the same mailbox.
pub struct Sender<T> {
    tx: mpsc::Sender<Counted<T>>,
    shared: Arc<Shared>,
}

impl<T> Sender<T> {
    /// Sends at once or not at all.
    pub fn try_send(&self, item: T) -> Result<(), SendError<T>> {
        match self.tx.try_send(Counted {
            item,
            _guard: Guard::new(&self.shared),
        }) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(counted)) => {
                self.shared.refused_counter.increment(1);
                Err(SendError::Full(counted.item))
            }
            Err(TrySendError::Closed(counted)) => Err(SendError::Closed(counted.item)),
        }
    }

    /// Waits for room. Only where the one who waits is itself bounded.
    pub async fn send(&self, item: T) -> Result<(), SendError<T>> {
        match self.tx.reserve().await {
            Ok(slot) => {
                slot.send(Counted {
                    item,
                    _guard: Guard::new(&self.shared),
                });
                Ok(())
            }
            Err(_) => Err(SendError::Closed(item)),
        }
    }

    /// Takes a place at once, to be filled later without fail; none if there is no room.
    pub fn try_reserve(&self) -> Result<Slot<'_, T>, SendError<()>> {
        match self.tx.try_reserve() {
            Ok(slot) => Ok(Slot {
                slot,
                shared: &self.shared,
            }),
            Err(TrySendError::Full(())) => {
                self.shared.refused_counter.increment(1);
                Err(SendError::Full(()))
            }
            Err(TrySendError::Closed(())) => Err(SendError::Closed(())),
        }
    }

    /// Waits for a place.
    pub async fn reserve(&self) -> Result<Slot<'_, T>, Closed> {
        let slot = self.tx.reserve().await.map_err(|_| Closed)?;
        Ok(Slot {
            slot,
            shared: &self.shared,
        })
    }

    /// Items inside.
    pub fn depth(&self) -> usize {
        self.shared.depth.load(Ordering::Relaxed)
    }

    /// Room in all.
    pub fn capacity(&self) -> usize {
        self.tx.max_capacity()
    }

    /// Whether the receiver is gone.
    pub fn is_closed(&self) -> bool {
        self.tx.is_closed()
    }

    /// Completes when the receiver is gone.
    pub async fn closed(&self) {
        self.tx.closed().await;
    }

    /// The name under which the depth is reported.
    pub fn name(&self) -> &'static str {
        self.shared.name
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self {
            tx: self.tx.clone(),
            shared: Arc::clone(&self.shared),
        }
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "mailbox::Sender({:?}, {} of {})",
            self.shared.name,
            self.depth(),
            self.capacity()
        )
    }
}

/// A place in a mailbox, given back when dropped unfilled.
pub struct Slot<'a, T> {
    slot: mpsc::Permit<'a, Counted<T>>,
    shared: &'a Arc<Shared>,
}

impl<T> Slot<'_, T> {
    /// Fills the place.
    pub fn send(self, item: T) {
        self.slot.send(Counted {
            item,
            _guard: Guard::new(self.shared),
        });
    }
}

/// The receiving side.
pub struct Receiver<T> {
    rx: mpsc::Receiver<Counted<T>>,
    shared: Arc<Shared>,
    /// Kept between calls of [`Receiver::recv_many`], so that a busy mailbox does not allocate.
    batch: Vec<Counted<T>>,
}

impl<T> Receiver<T> {
    /// The next item; none when every sender is gone (or [`Receiver::close`] was called) and the mailbox is empty.
    pub async fn recv(&mut self) -> Option<T> {
        self.rx.recv().await.map(|counted| counted.item)
    }

    /// The next item if there is one now. `Ok(None)`: empty.
    pub fn try_recv(&mut self) -> Result<Option<T>, Closed> {
        match self.rx.try_recv() {
            Ok(counted) => Ok(Some(counted.item)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Closed),
        }
    }

    /// Waits for at least one item and takes up to `limit`, appending to `into`; 0 when no more will come.
    /// May be cancelled without losing an item.
    pub async fn recv_many(&mut self, into: &mut Vec<T>, limit: usize) -> usize {
        let count = self.rx.recv_many(&mut self.batch, limit).await;
        into.extend(self.batch.drain(..).map(|counted| counted.item));
        count
    }

    /// Refuses new items; those inside can still be taken.
    pub fn close(&mut self) {
        self.rx.close();
    }

    /// Items inside.
    pub fn depth(&self) -> usize {
        self.shared.depth.load(Ordering::Relaxed)
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mailbox::Receiver({:?}, {})", self.shared.name, self.depth())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn refuses_when_full_and_gives_the_item_back() {
        let (tx, mut rx) = mailbox("test", 2);
        tx.try_send(1).unwrap();
        let slot = tx.try_reserve().unwrap();
        assert_eq!(tx.try_send(3), Err(SendError::Full(3)), "a reserved place counts");
        slot.send(2);
        assert_eq!(tx.try_send(3), Err(SendError::Full(3)));
        assert!(matches!(tx.try_reserve(), Err(SendError::Full(()))));
        assert_eq!((tx.depth(), tx.capacity()), (2, 2));
        assert_eq!(rx.recv().await, Some(1));
        assert_eq!(tx.depth(), 1);
        tx.try_send(3).unwrap();
        let mut all = Vec::new();
        assert_eq!(rx.recv_many(&mut all, 10).await, 2);
        assert_eq!((all, tx.depth()), (vec![2, 3], 0));
        assert_eq!(rx.try_recv(), Ok(None));
        drop(tx);
        assert_eq!(rx.try_recv(), Err(Closed));
        assert_eq!(rx.recv().await, None);
    }

    #[tokio::test]
    async fn waits_for_room_in_order() {
        let (tx, mut rx) = mailbox("test", 1);
        tx.send(1).await.unwrap();
        let second = tx.send(2);
        tokio::pin!(second);
        assert!(futures_util::poll!(&mut second).is_pending());
        assert_eq!(tx.depth(), 1, "who waits is not inside");
        assert_eq!(rx.recv().await, Some(1));
        second.await.unwrap();
        assert_eq!(rx.recv().await, Some(2));
    }

    #[tokio::test]
    async fn what_is_lost_with_the_mailbox_is_not_counted_for_ever() {
        let (tx, mut rx) = mailbox("test", 4);
        tx.try_send(1).unwrap();
        tx.try_send(2).unwrap();
        rx.close();
        assert_eq!(tx.try_send(3), Err(SendError::Closed(3)));
        assert_eq!(rx.recv().await, Some(1), "what was inside can still be taken");
        drop(rx);
        assert_eq!(tx.depth(), 0);
        assert_eq!(tx.send(4).await, Err(SendError::Closed(4)));
        assert!(tx.reserve().await.is_err());
        assert!(tx.is_closed());
    }

    #[tokio::test]
    async fn a_reservation_not_used_gives_its_place_back() {
        let (tx, _rx) = mailbox("test", 1);
        drop(tx.try_reserve().unwrap());
        tx.try_send(1).unwrap();
    }
}
