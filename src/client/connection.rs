//! Calls that find a server, and try again where that is safe.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rand::Rng as _;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::config::ClientConfig;
use super::error::{ClientError, RetryClass, reason};

/// Whether a call whose outcome is unknown may be sent again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// It changes nothing, or carries what lets the server recognise it.
    Safe,
    /// It might be done twice.
    Unsafe,
}

/// Shared by everything made from one client.
#[derive(Debug)]
pub(crate) struct Connection {
    pub(crate) config: ClientConfig,
    addresses: Vec<Address>,
    /// Index of the address that answered last.
    current: AtomicUsize,
}

#[derive(Debug)]
struct Address {
    name: String,
    channel: Mutex<Option<Channel>>,
}

impl Connection {
    pub(crate) fn new(config: ClientConfig) -> Result<Arc<Self>, ClientError> {
        config.check()?;
        let addresses = config
            .addresses
            .iter()
            .map(|name| Address {
                name: name.clone(),
                channel: Mutex::new(None),
            })
            .collect();
        Ok(Arc::new(Connection {
            config,
            addresses,
            current: AtomicUsize::new(0),
        }))
    }

    /// Unary calls share one connection per address.
    fn shared_channel(&self, index: usize) -> Result<Channel, ClientError> {
        let address = &self.addresses[index];
        let mut slot = address.channel.lock();
        if let Some(channel) = &*slot {
            return Ok(channel.clone());
        }
        let channel = self.config.channel(&address.name)?;
        *slot = Some(channel.clone());
        Ok(channel)
    }

    /// A connection for one session alone, so that bulk does not queue in front of other calls.
    pub(crate) fn session_channel(&self) -> Result<(usize, Channel), ClientError> {
        let index = self.current.load(Ordering::Relaxed);
        Ok((index, self.config.channel(&self.addresses[index].name)?))
    }

    /// Notes that the address at `index` failed: the next attempt goes to the leader named, or to the next in line.
    pub(crate) fn move_on(&self, index: usize, leader: Option<&str>) {
        let next = leader
            .and_then(|l| self.addresses.iter().position(|a| a.name == l))
            .unwrap_or((index + 1) % self.addresses.len());
        // Only if nobody moved on before: two callers that fail together must not skip an address.
        let _ = self
            .current
            .compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// All addresses, for messages to people.
    pub(crate) fn names(&self) -> String {
        self.addresses
            .iter()
            .map(|a| a.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Makes a call, again where that is safe, until it succeeds or `retry_for` is over. Every address is tried once
    /// at least.
    pub(crate) async fn call<T, F, Fut>(&self, repeat: Repeat, mut f: F) -> Result<T, ClientError>
    where
        F: FnMut(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let begun = Instant::now();
        let mut backoff = Backoff::new();
        let mut failed_here = 0;
        loop {
            let index = self.current.load(Ordering::Relaxed);
            let error = match f(self.shared_channel(index)?).await {
                Ok(answer) => return Ok(answer.into_inner()),
                Err(status) => self.explain(ClientError::from(status)),
            };
            if !may_repeat(&error, repeat) {
                return Err(error);
            }
            failed_here += 1;
            self.move_on(index, error.leader.as_deref());
            if failed_here < self.addresses.len() {
                continue;
            }
            let pause = backoff.next();
            if begun.elapsed() + pause >= self.config.retry_for {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// Says which servers could not be reached.
    pub(crate) fn explain(&self, mut error: ClientError) -> ClientError {
        if error.reason == reason::UNREACHABLE {
            error.message = format!("no server answers at {}: {}", self.names(), error.message);
        }
        error
    }
}

/// Whether to send a failed call again without asking anybody.
pub(crate) fn may_repeat(error: &ClientError, repeat: Repeat) -> bool {
    match error.retry {
        RetryClass::CannotWork => false,
        RetryClass::DidNotHappen => {
            matches!(error.code, Code::Unavailable | Code::ResourceExhausted) && error.reason != reason::STREAM_FULL
        }
        RetryClass::MayHaveHappened => repeat == Repeat::Safe && error.code == Code::Unavailable,
    }
}

/// Growing pauses with a random part, so that clients do not return together.
#[derive(Debug)]
pub(crate) struct Backoff {
    next: Duration,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(10);
    const MAX: Duration = Duration::from_secs(1);

    pub(crate) fn new() -> Self {
        Backoff { next: Self::FIRST }
    }

    /// The pause to make now: between half of the step and the step.
    pub(crate) fn next(&mut self) -> Duration {
        let step = self.next;
        self.next = (step * 2).min(Self::MAX);
        step.mul_f64(rand::rng().random_range(0.5..1.0))
    }

    pub(crate) fn reset(&mut self) {
        self.next = Self::FIRST;
    }
}
