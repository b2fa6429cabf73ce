//! Calls that find a server, and try again where that is safe.
//!
//! A client begins with the addresses that it was given, and learns those of the cluster's other nodes from the first
//! node that answers. Any node takes any request, so one address is used for everything until it fails; what an answer
//! tells of a stream's leader is followed for that stream, if that address answers.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use rand::Rng as _;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use super::config::ClientConfig;
use super::error::{ClientError, RetryClass, reason};
use crate::wire::v1;
use crate::wire::v1::server_service_client::ServerServiceClient;

/// Addresses that are kept, those of nodes that left long ago too.
const ADDRESSES_MAX: usize = 256;
/// Streams whose leader is kept in mind; when there are more, all are forgotten and learned again.
const LEADERS_MAX: usize = 4_096;
/// An address that failed is not chosen for its own sake for so long.
const AVOID_FOR: Duration = Duration::from_secs(30);
/// The list of nodes is asked for this often at the most, while the client works …
const LEARN_EVERY: Duration = Duration::from_secs(60);
/// … and after an address failed, when something answers again.
const LEARN_AGAIN: Duration = Duration::from_secs(1);
/// How long a look at a node may take that nothing waits for but the wish to know.
const LOOK: Duration = Duration::from_secs(2);

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
    /// Only grows, so that an index stays good.
    addresses: RwLock<Vec<Arc<Address>>>,
    /// Index of the address that answered last.
    current: AtomicUsize,
    /// Where the leaders of streams take clients.
    leaders: Mutex<HashMap<String, usize>>,
    learned: Mutex<Learned>,
}

/// When the list of nodes was asked for last.
#[derive(Debug, Default)]
struct Learned {
    at: Option<Instant>,
    /// An address has failed since.
    stale: bool,
}

#[derive(Debug)]
struct Address {
    name: String,
    /// One that the client was given; or else of a node that the cluster has.
    wanted: AtomicBool,
    failed: Mutex<Option<Instant>>,
    channel: Mutex<Option<Channel>>,
}

impl Address {
    fn new(name: &str) -> Arc<Self> {
        Arc::new(Address {
            name: name.to_owned(),
            wanted: AtomicBool::new(true),
            failed: Mutex::new(None),
            channel: Mutex::new(None),
        })
    }

    fn is_wanted(&self) -> bool {
        self.wanted.load(Ordering::Relaxed)
    }

    fn has_failed(&self) -> bool {
        self.failed.lock().is_some_and(|at| at.elapsed() < AVOID_FOR)
    }
}

impl Connection {
    pub(crate) fn new(config: ClientConfig) -> Result<Arc<Self>, ClientError> {
        config.check()?;
        let addresses = config.addresses.iter().map(|name| Address::new(name)).collect();
        Ok(Arc::new(Connection {
            config,
            addresses: RwLock::new(addresses),
            current: AtomicUsize::new(0),
            leaders: Mutex::default(),
            learned: Mutex::default(),
        }))
    }

    fn address(&self, index: usize) -> Arc<Address> {
        let addresses = self.addresses.read();
        // There is one at least, and none ever goes.
        Arc::clone(&addresses[index.min(addresses.len() - 1)])
    }

    /// How many addresses are worth trying in turn.
    pub(crate) fn choices(&self) -> usize {
        self.addresses.read().iter().filter(|a| a.is_wanted()).count().max(1)
    }

    /// Where to go with something about this stream, or about none.
    fn choose(&self, stream: Option<&str>) -> usize {
        let leader = stream.and_then(|stream| self.leaders.lock().get(stream).copied());
        leader.unwrap_or_else(|| self.current.load(Ordering::Relaxed))
    }

    /// Unary calls share one connection per address.
    fn shared_channel(&self, index: usize) -> Result<Channel, ClientError> {
        let address = self.address(index);
        let mut slot = address.channel.lock();
        if let Some(channel) = &*slot {
            return Ok(channel.clone());
        }
        let channel = self.config.channel(&address.name)?;
        *slot = Some(channel.clone());
        Ok(channel)
    }

    /// A connection for one session alone, so that bulk does not queue in front of other calls.
    pub(crate) fn session_channel(&self, stream: &str) -> Result<(usize, Channel), ClientError> {
        let index = self.choose(Some(stream));
        Ok((index, self.config.channel(&self.address(index).name)?))
    }

    /// The index of an address that a node told; `None`: it is none, or there are too many.
    fn index_of(&self, name: &str) -> Option<usize> {
        if let Some(index) = self.addresses.read().iter().position(|a| a.name == name) {
            return Some(index);
        }
        if !self.config.learn_nodes || self.config.channel(name).is_err() {
            return None;
        }
        let mut addresses = self.addresses.write();
        if let Some(index) = addresses.iter().position(|a| a.name == name) {
            return Some(index);
        }
        if addresses.len() >= ADDRESSES_MAX {
            return None;
        }
        addresses.push(Address::new(name));
        Some(addresses.len() - 1)
    }

    /// An address that was told and is worth going to.
    fn usable(&self, name: &str) -> Option<usize> {
        let index = self.index_of(name)?;
        (!self.address(index).has_failed()).then_some(index)
    }

    /// Notes that the address at `index` failed like this: the next attempt goes to the node that the error names, or to
    /// the next in line.
    pub(crate) fn move_on(&self, index: usize, error: &ClientError) {
        let is_gone = matches!(
            error.reason.as_str(),
            reason::UNREACHABLE | reason::CONNECTION_LOST | reason::TIMED_OUT | reason::GO_AWAY | reason::STOPPING
        );
        if is_gone {
            *self.address(index).failed.lock() = Some(Instant::now());
            self.learned.lock().stale = true;
        }
        self.leaders.lock().retain(|_, leader| *leader != index);
        let next = error.leader.as_deref().and_then(|leader| self.usable(leader));
        let next = next.unwrap_or_else(|| self.next_after(index));
        // Only if nobody moved on before: two callers that fail together must not skip an address.
        let _ = self
            .current
            .compare_exchange(index, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    /// The next in line, those first that have not failed of late.
    fn next_after(&self, index: usize) -> usize {
        let addresses = self.addresses.read();
        let count = addresses.len();
        let line = || (1..=count).map(|step| (index + step) % count);
        let good = line().find(|i| addresses[*i].is_wanted() && !addresses[*i].has_failed());
        let wanted = || line().find(|i| addresses[*i].is_wanted());
        good.or_else(wanted).unwrap_or(0)
    }

    /// The address at `index` has answered.
    pub(crate) fn answered(&self, index: usize) {
        let address = self.address(index);
        let mut failed = address.failed.lock();
        if failed.is_some() {
            *failed = None;
        }
    }

    /// Takes note of who leads a stream, for the next time.
    pub(crate) fn follow(&self, stream: &str, leader: &v1::ShardLeader) {
        let Some(index) = self.usable(&leader.address) else {
            return;
        };
        self.prefer(stream, index);
    }

    /// Goes to the address at `index` with everything about this stream, until it fails.
    pub(crate) fn prefer(&self, stream: &str, index: usize) {
        let mut leaders = self.leaders.lock();
        if leaders.len() >= LEADERS_MAX && !leaders.contains_key(stream) {
            leaders.clear();
        }
        leaders.insert(stream.to_owned(), index);
    }

    /// The index of an address, if a server answers there; else it is avoided for a while.
    pub(crate) async fn probe(&self, name: &str) -> Option<usize> {
        let index = self.usable(name)?;
        let look = async {
            let mut client = ServerServiceClient::new(self.shared_channel(index).ok()?);
            client.get_server_info(v1::GetServerInfoRequest {}).await.ok()
        };
        match tokio::time::timeout(LOOK, look).await {
            Ok(Some(_)) => Some(index),
            Ok(None) | Err(_) => {
                *self.address(index).failed.lock() = Some(Instant::now());
                None
            }
        }
    }

    /// Asks which nodes there are, if that was not done of late.
    pub(crate) async fn learn(&self, channel: Channel) {
        if !self.config.learn_nodes {
            return;
        }
        {
            let mut learned = self.learned.lock();
            let wait = if learned.stale { LEARN_AGAIN } else { LEARN_EVERY };
            if learned.at.is_some_and(|at| at.elapsed() < wait) {
                return;
            }
            // One asks, the others go on.
            *learned = Learned {
                at: Some(Instant::now()),
                stale: false,
            };
        }
        let mut client = ServerServiceClient::new(channel);
        let asked = client.get_server_info(v1::GetServerInfoRequest {});
        // What is known is good enough if it fails.
        if let Ok(Ok(answer)) = tokio::time::timeout(LOOK, asked).await {
            self.take_nodes(&answer.into_inner().nodes);
        }
    }

    /// Takes a list of all nodes.
    pub(crate) fn take_nodes(&self, nodes: &[v1::ServerNode]) {
        if nodes.is_empty() || !self.config.learn_nodes {
            return;
        }
        let told: Vec<usize> = nodes.iter().filter_map(|n| self.index_of(&n.client_address)).collect();
        let given = self.config.addresses.len();
        for (index, address) in self.addresses.read().iter().enumerate() {
            // What was given stays: it may be a way in that no node knows of, such as a load balancer.
            address
                .wanted
                .store(index < given || told.contains(&index), Ordering::Relaxed);
        }
    }

    /// The addresses that are tried, for messages to people.
    pub(crate) fn names(&self) -> String {
        let addresses = self.addresses.read();
        let wanted = addresses.iter().filter(|a| a.is_wanted());
        wanted.map(|a| a.name.as_str()).collect::<Vec<_>>().join(", ")
    }

    /// Makes a call, again where that is safe, until it succeeds or `retry_for` is over. Every address is tried once
    /// at least.
    pub(crate) async fn call<T, F, Fut>(&self, repeat: Repeat, f: F) -> Result<T, ClientError>
    where
        F: FnMut(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_about(None, repeat, f).await
    }

    /// As [`call`](Self::call), about a stream: where its leader is, if that is known.
    pub(crate) async fn call_about<T, F, Fut>(
        &self,
        stream: Option<&str>,
        repeat: Repeat,
        mut f: F,
    ) -> Result<T, ClientError>
    where
        F: FnMut(Channel) -> Fut,
        Fut: Future<Output = Result<Response<T>, Status>>,
    {
        let begun = Instant::now();
        let mut backoff = Backoff::new();
        let mut failed_here = 0;
        loop {
            let index = self.choose(stream);
            let channel = self.shared_channel(index)?;
            let error = match f(channel.clone()).await {
                Ok(answer) => {
                    self.answered(index);
                    self.learn(channel).await;
                    return Ok(answer.into_inner());
                }
                Err(status) => self.explain(ClientError::from(status)),
            };
            if !may_repeat(&error, repeat) {
                return Err(error);
            }
            failed_here += 1;
            self.move_on(index, &error);
            if failed_here < self.choices() {
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
        // Also what a server does not know the outcome of, such as a publish whose leader went.
        RetryClass::MayHaveHappened => {
            repeat == Repeat::Safe && matches!(error.code, Code::Unavailable | Code::ResourceExhausted | Code::Unknown)
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn connection(addresses: &[&str]) -> Arc<Connection> {
        Connection::new(ClientConfig::new(addresses.iter().copied())).expect("good addresses")
    }

    fn node(address: &str) -> v1::ServerNode {
        v1::ServerNode {
            client_address: address.to_owned(),
            ..v1::ServerNode::default()
        }
    }

    fn gone() -> ClientError {
        ClientError::local(Code::Unavailable, reason::UNREACHABLE, "gone")
    }

    fn chosen(connection: &Connection, stream: Option<&str>) -> String {
        connection.address(connection.choose(stream)).name.clone()
    }

    #[tokio::test]
    async fn nodes_are_learned_and_tried_in_turn() {
        let c = connection(&["a:1"]);
        c.take_nodes(&[node("a:1"), node("b:1"), node("nonsense"), node("")]);
        assert_eq!((c.names().as_str(), c.choices()), ("a:1, b:1", 2));
        c.move_on(0, &gone());
        assert_eq!(chosen(&c, None), "b:1");
        // A second one that failed with the same address does not skip the next.
        c.move_on(0, &gone());
        assert_eq!(chosen(&c, None), "b:1");
        // One that left is not tried any more; what was given always is.
        c.take_nodes(&[node("c:1")]);
        assert_eq!(c.names(), "a:1, c:1");
        c.move_on(1, &gone());
        assert_eq!(chosen(&c, None), "c:1", "the one that failed last comes last");
    }

    #[tokio::test]
    async fn leaders_are_followed_for_their_stream_until_they_fail() {
        let c = connection(&["a:1", "b:1"]);
        let leader = |address: &str| v1::ShardLeader {
            address: address.to_owned(),
            ..v1::ShardLeader::default()
        };
        c.follow("s", &leader("c:1"));
        assert_eq!(
            (chosen(&c, Some("s")), chosen(&c, Some("t"))),
            ("c:1".into(), "a:1".into())
        );
        c.move_on(2, &gone());
        assert_eq!(chosen(&c, Some("s")), "a:1");
        c.follow("s", &leader("c:1"));
        assert_eq!(chosen(&c, Some("s")), "a:1", "it failed just now");
        c.answered(2);
        c.follow("s", &leader("c:1"));
        assert_eq!(chosen(&c, Some("s")), "c:1");
        // An error that names another node is followed at once.
        let mut error = ClientError::local(Code::Unavailable, "NOT_LEADER", "elsewhere");
        error.leader = Some("b:1".to_owned());
        c.move_on(0, &error);
        assert_eq!(chosen(&c, None), "b:1");
    }

    #[tokio::test]
    async fn only_what_was_given_is_used_if_that_is_wanted() {
        let mut config = ClientConfig::new(["a:1"]);
        config.learn_nodes = false;
        let c = Connection::new(config).expect("a good address");
        c.take_nodes(&[node("a:1"), node("b:1")]);
        assert_eq!(c.names(), "a:1");
    }
}
