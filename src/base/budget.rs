//! Byte budgets. Memory that requests may hold is taken as permits before anything is read or copied, so that
//! overload is refused early and nothing grows without bound.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::base::metric_names as names;

/// More was asked for than the whole budget: waiting would never end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{asked} bytes are more than the whole budget of {limit} bytes")]
pub struct OverBudget {
    /// Bytes asked for.
    pub asked: usize,
    /// Bytes there are.
    pub limit: usize,
}

/// A bounded number of bytes. Clones share it.
#[derive(Clone)]
pub struct ByteBudget {
    inner: Arc<Inner>,
}

struct Inner {
    name: &'static str,
    limit: usize,
    bytes: Arc<Semaphore>,
    refused: AtomicU64,
    waiting: AtomicUsize,
    used_gauge: metrics::Gauge,
    refused_counter: metrics::Counter,
}

impl ByteBudget {
    /// A budget of `limit` bytes (at most 4 GiB less one). Its use is reported under `name`; install the metrics
    /// recorder before.
    pub fn new(name: &'static str, limit: usize) -> Self {
        let limit = limit.min(u32::MAX as usize);
        metrics::gauge!(names::BASE_BUDGET_LIMIT_BYTES, "budget" => name).set(limit as f64);
        Self {
            inner: Arc::new(Inner {
                name,
                limit,
                bytes: Arc::new(Semaphore::new(limit)),
                refused: AtomicU64::new(0),
                waiting: AtomicUsize::new(0),
                used_gauge: metrics::gauge!(names::BASE_BUDGET_USED_BYTES, "budget" => name),
                refused_counter: metrics::counter!(names::BASE_BUDGET_REFUSALS_TOTAL, "budget" => name),
            }),
        }
    }

    /// `bytes` of the budget, or nothing at once. Refuses also while others wait for what is free.
    pub fn try_acquire(&self, bytes: usize) -> Option<BytePermit> {
        let permit = u32::try_from(bytes)
            .ok()
            .and_then(|count| Arc::clone(&self.inner.bytes).try_acquire_many_owned(count).ok());
        if permit.is_none() {
            self.inner.refused.fetch_add(1, Ordering::Relaxed);
            self.inner.refused_counter.increment(1);
        }
        permit.map(|permit| self.permit(permit))
    }

    /// Waits, first come first served, until `bytes` are free. Only for those who hold nothing of this budget while
    /// they wait. May be cancelled without loss.
    pub async fn acquire(&self, bytes: usize) -> Result<BytePermit, OverBudget> {
        let over = OverBudget {
            asked: bytes,
            limit: self.inner.limit,
        };
        if bytes > self.inner.limit {
            return Err(over);
        }
        let count = u32::try_from(bytes).map_err(|_| over)?;
        let _waiting = Waiting::new(&self.inner.waiting);
        let permit = Arc::clone(&self.inner.bytes).acquire_many_owned(count).await;
        Ok(self.permit(permit.expect("the semaphore of a budget is never closed")))
    }

    /// The name under which use is reported.
    pub fn name(&self) -> &'static str {
        self.inner.name
    }

    /// Bytes in all.
    pub fn limit(&self) -> usize {
        self.inner.limit
    }

    /// Bytes taken.
    pub fn used(&self) -> usize {
        self.inner.limit - self.inner.bytes.available_permits()
    }

    /// Bytes that are free; those that are gathered for who waits are not.
    pub fn free(&self) -> usize {
        self.inner.bytes.available_permits()
    }

    /// How many wait in [`ByteBudget::acquire`].
    pub fn waiting(&self) -> usize {
        self.inner.waiting.load(Ordering::Relaxed)
    }

    /// How often [`ByteBudget::try_acquire`] refused.
    pub fn refusals(&self) -> u64 {
        self.inner.refused.load(Ordering::Relaxed)
    }

    fn permit(&self, permit: OwnedSemaphorePermit) -> BytePermit {
        self.inner.used_gauge.increment(permit.num_permits() as f64);
        BytePermit {
            permit,
            budget: Arc::clone(&self.inner),
        }
    }
}

impl fmt::Debug for ByteBudget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ByteBudget")
            .field("name", &self.inner.name)
            .field("used", &self.used())
            .field("limit", &self.inner.limit)
            .finish()
    }
}

/// One who waits; counted for as long as it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A permit that travels with an answer, among the extensions of its response, and is given back when the answer has
/// been sent or was given up.
#[derive(Debug, Clone)]
pub struct Held(Arc<BytePermit>);

impl From<BytePermit> for Held {
    fn from(permit: BytePermit) -> Self {
        Self(Arc::new(permit))
    }
}

impl Held {
    /// How many bytes it holds.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

/// Bytes of a budget, given back when dropped.
pub struct BytePermit {
    permit: OwnedSemaphorePermit,
    budget: Arc<Inner>,
}

impl BytePermit {
    /// How many bytes this permit holds.
    pub fn bytes(&self) -> usize {
        self.permit.num_permits()
    }

    /// Takes `bytes` out of this permit; nothing if it holds fewer.
    pub fn split(&mut self, bytes: usize) -> Option<BytePermit> {
        let permit = self.permit.split(bytes)?;
        Some(BytePermit {
            permit,
            budget: Arc::clone(&self.budget),
        })
    }

    /// Adds the bytes of another permit of the same budget.
    ///
    /// # Panics
    /// If the other permit is of another budget: a programmer's error.
    pub fn merge(&mut self, mut other: BytePermit) {
        assert!(
            Arc::ptr_eq(&self.budget, &other.budget),
            "permits of two budgets cannot be merged"
        );
        let all = other.permit.num_permits();
        if let Some(taken) = other.permit.split(all) {
            self.permit.merge(taken);
        }
    }

    /// Gives back all but `bytes`; does nothing if it holds no more.
    pub fn shrink_to(&mut self, bytes: usize) {
        let spare = self.bytes().saturating_sub(bytes);
        drop(self.split(spare));
    }
}

impl Drop for BytePermit {
    fn drop(&mut self) {
        self.budget.used_gauge.decrement(self.permit.num_permits() as f64);
    }
}

impl fmt::Debug for BytePermit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BytePermit({} of {:?})", self.bytes(), self.budget.name)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn gives_exactly_the_limit_and_refuses_one_byte_more() {
        let budget = ByteBudget::new("test", 100);
        let whole = budget.try_acquire(100).unwrap();
        assert_eq!((budget.used(), whole.bytes()), (100, 100));
        assert!(budget.try_acquire(1).is_none());
        assert!(budget.try_acquire(0).is_some(), "nothing is always free");
        assert_eq!(budget.refusals(), 1);
        drop(whole);
        assert_eq!(budget.used(), 0);
        assert!(budget.try_acquire(101).is_none());
        assert!(budget.try_acquire(usize::MAX).is_none());
        assert!(budget.try_acquire(100).is_some());
    }

    #[test]
    fn splitting_merging_and_shrinking_lose_no_byte() {
        let budget = ByteBudget::new("test", 100);
        let mut first = budget.try_acquire(60).unwrap();
        assert!(first.split(61).is_none());
        let part = first.split(20).unwrap();
        assert_eq!((first.bytes(), part.bytes(), budget.used()), (40, 20, 60));
        drop(first);
        assert_eq!(budget.used(), 20);
        let mut other = budget.try_acquire(10).unwrap();
        other.merge(part);
        assert_eq!((other.bytes(), budget.used()), (30, 30));
        other.shrink_to(5);
        assert_eq!((other.bytes(), budget.used()), (5, 5));
        other.shrink_to(50);
        assert_eq!(other.bytes(), 5);
        drop(other);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    #[should_panic(expected = "two budgets")]
    fn permits_of_two_budgets_do_not_mix() {
        let mut one = ByteBudget::new("one", 10).try_acquire(1).unwrap();
        one.merge(ByteBudget::new("two", 10).try_acquire(1).unwrap());
    }

    #[tokio::test]
    async fn waits_for_room_but_not_for_the_impossible() {
        let budget = ByteBudget::new("test", 10);
        assert_eq!(
            budget.acquire(11).await.unwrap_err(),
            OverBudget { asked: 11, limit: 10 }
        );
        let held = budget.acquire(8).await.unwrap();
        let waiting = budget.acquire(5);
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        assert_eq!((budget.waiting(), budget.free()), (1, 0), "what is free is his already");
        drop(held);
        assert_eq!(waiting.await.unwrap().bytes(), 5);
        assert_eq!(budget.waiting(), 0);
        assert_eq!(budget.used(), 0);
    }
}
