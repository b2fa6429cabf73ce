//! The network: byte streams between nodes, with delay, loss (what is lost comes later, as TCP has it), cuts in one
//! direction or both, resets, and nodes that fall silent.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf as _, Bytes};
use futures_util::FutureExt as _;
use futures_util::future::BoxFuture;
use mainstem::raft::transport::{Dial, PeerStream};
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::rng::Rng;

/// Nodes by their number, from 1.
pub type NodeNo = usize;

pub const MS: u64 = 1_000_000;
/// What a writer may be ahead of its reader.
const BUFFER_BYTES: usize = 256 << 10;
/// Until a lost segment is sent again.
const RESEND_NS: u64 = 200 * MS;
/// Until a connection is asked for again.
const REDIAL_NS: u64 = 1_000 * MS;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    /// A connection is asked for.
    Ask(u64),
    /// It is answered.
    Answer(u64, bool),
    /// Something arrives at the side.
    Arrive(u64, usize),
    Reset(u64, usize),
}

/// What travels to one side of a connection.
#[derive(Default)]
struct Lane {
    /// Not there yet: when, and what; nothing: the end.
    travelling: VecDeque<(u64, Option<Bytes>)>,
    arrived: VecDeque<Bytes>,
    bytes: usize,
    last_at: u64,
    ended: bool,
    reset: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

struct Conn {
    /// Who asked for it, and who was asked.
    ends: [NodeNo; 2],
    /// To each side.
    lanes: [Lane; 2],
    answered: Option<bool>,
    dialer: Option<Waker>,
    /// Sides whose socket is gone.
    closed: [bool; 2],
}

#[derive(Default)]
struct Listener {
    waiting: VecDeque<u64>,
    waker: Option<Waker>,
}

struct Inner {
    now: u64,
    rng: Rng,
    events: BinaryHeap<Reverse<(u64, u64, Event)>>,
    next: u64,
    conns: BTreeMap<u64, Conn>,
    listeners: BTreeMap<NodeNo, Listener>,
    cut: BTreeSet<(NodeNo, NodeNo)>,
    dark: BTreeSet<NodeNo>,
    /// Nodes that something has come to.
    ready: BTreeSet<NodeNo>,
    /// One in so many segments is lost at first; 0: none.
    lost_one_in: u64,
    delivered: u64,
    delivered_bytes: u64,
    /// What is sent, if it is to be told.
    told: Option<Vec<String>>,
}

impl Inner {
    fn at(&mut self, at: u64, event: Event) {
        self.next += 1;
        self.events.push(Reverse((at, self.next, event)));
    }

    fn delay(&mut self) -> u64 {
        let usual = self.rng.range(100_000, 2 * MS);
        if self.lost_one_in > 0 && self.rng.one_in(self.lost_one_in) {
            usual + RESEND_NS
        } else if self.rng.one_in(50) {
            usual + self.rng.range(0, 60) * MS
        } else {
            usual
        }
    }

    fn passes(&self, from: NodeNo, to: NodeNo) -> bool {
        !self.cut.contains(&(from, to)) && !self.dark.contains(&from) && !self.dark.contains(&to)
    }

    /// Puts something on its way to a side.
    fn send(&mut self, id: u64, to_side: usize, what: Option<Bytes>) {
        let delay = self.delay();
        let now = self.now;
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let lane = &mut conn.lanes[to_side];
        let at = lane.last_at.max(now + delay);
        lane.last_at = at;
        if let Some(told) = &mut self.told {
            let bytes = what.as_ref().map_or(0, Bytes::len);
            told.push(format!("{bytes} bytes on {id} to n{}", conn.ends[to_side]));
        }
        lane.bytes += what.as_ref().map_or(0, Bytes::len);
        lane.travelling.push_back((at, what));
        self.at(at, Event::Arrive(id, to_side));
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Ask(id) => self.ask(id),
            Event::Answer(id, yes) => self.answer(id, yes),
            Event::Arrive(id, side) => self.arrive(id, side),
            Event::Reset(id, side) => {
                let Some(conn) = self.conns.get_mut(&id) else { return };
                let lane = &mut conn.lanes[side];
                lane.reset = true;
                wake(&mut lane.reader);
                // Who writes there waits in the other lane.
                wake(&mut conn.lanes[1 - side].writer);
                let node = conn.ends[side];
                self.ready.insert(node);
            }
        }
    }

    fn ask(&mut self, id: u64) {
        let Some(conn) = self.conns.get(&id) else { return };
        let [from, to] = conn.ends;
        if conn.closed[0] {
            return;
        }
        if !self.passes(from, to) {
            let at = self.now + REDIAL_NS;
            return self.at(at, Event::Ask(id));
        }
        let there = match self.listeners.get_mut(&to) {
            None => false,
            Some(listener) => {
                listener.waiting.push_back(id);
                wake(&mut listener.waker);
                self.ready.insert(to);
                true
            }
        };
        let at = self.now + self.delay();
        self.at(at, Event::Answer(id, there));
    }

    fn answer(&mut self, id: u64, yes: bool) {
        let Some(conn) = self.conns.get(&id) else { return };
        let [from, to] = conn.ends;
        if !self.passes(to, from) {
            let at = self.now + REDIAL_NS;
            return self.at(at, Event::Answer(id, yes));
        }
        if let Some(conn) = self.conns.get_mut(&id) {
            conn.answered = Some(yes);
            wake(&mut conn.dialer);
            self.ready.insert(from);
        }
    }

    fn arrive(&mut self, id: u64, side: usize) {
        let now = self.now;
        let Some(conn) = self.conns.get(&id) else { return };
        let (to, from) = (conn.ends[side], conn.ends[1 - side]);
        if !self.passes(from, to) {
            if !conn.lanes[side].travelling.is_empty() {
                self.at(now + RESEND_NS, Event::Arrive(id, side));
            }
            return;
        }
        let Some(conn) = self.conns.get_mut(&id) else { return };
        let lane = &mut conn.lanes[side];
        let mut any = false;
        while lane.travelling.front().is_some_and(|(at, _)| *at <= now) {
            any = true;
            match lane.travelling.pop_front() {
                Some((_, Some(bytes))) => {
                    self.delivered += 1;
                    self.delivered_bytes += bytes.len() as u64;
                    lane.arrived.push_back(bytes);
                }
                Some((_, None)) => lane.ended = true,
                None => {}
            }
        }
        if any {
            wake(&mut lane.reader);
            self.ready.insert(to);
        }
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

/// The network of a simulation.
#[derive(Clone)]
pub struct Net(Arc<Mutex<Inner>>);

impl std::fmt::Debug for Net {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Net")
    }
}

impl Net {
    pub fn new(rng: Rng) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            now: 0,
            rng,
            events: BinaryHeap::new(),
            next: 0,
            conns: BTreeMap::new(),
            listeners: BTreeMap::new(),
            cut: BTreeSet::new(),
            dark: BTreeSet::new(),
            ready: BTreeSet::new(),
            lost_one_in: 0,
            delivered: 0,
            delivered_bytes: 0,
            told: None,
        })))
    }

    /// When something happens next.
    pub fn next_at(&self) -> Option<u64> {
        self.0.lock().events.peek().map(|Reverse((at, ..))| *at)
    }

    /// Lets happen what is due.
    pub fn advance(&self, now: u64) {
        let mut inner = self.0.lock();
        inner.now = now;
        while let Some(Reverse((at, _, event))) = inner.events.peek().copied() {
            if at > now {
                return;
            }
            inner.events.pop();
            inner.happen(event);
        }
    }

    /// The nodes that something has come to since this was asked last.
    pub fn take_ready(&self) -> BTreeSet<NodeNo> {
        std::mem::take(&mut self.0.lock().ready)
    }

    /// Segments and bytes delivered so far.
    pub fn delivered(&self) -> (u64, u64) {
        let inner = self.0.lock();
        (inner.delivered, inner.delivered_bytes)
    }

    /// From now on tells what is sent.
    pub fn tell(&self) {
        self.0.lock().told = Some(Vec::new());
    }

    pub fn take_told(&self) -> Vec<String> {
        self.0.lock().told.as_mut().map(std::mem::take).unwrap_or_default()
    }

    pub fn lose_one_in(&self, n: u64) {
        self.0.lock().lost_one_in = n;
    }

    /// Nothing passes from the one to the other any more; what travels is sent again until it does.
    pub fn cut(&self, from: NodeNo, to: NodeNo) {
        self.0.lock().cut.insert((from, to));
    }

    pub fn heal(&self) {
        self.0.lock().cut.clear();
    }

    /// Every connection between the two breaks, and both sides see it.
    pub fn reset(&self, a: NodeNo, b: NodeNo) {
        let mut inner = self.0.lock();
        let hit: Vec<u64> = (inner.conns.iter())
            .filter(|(_, c)| c.ends == [a, b] || c.ends == [b, a])
            .map(|(id, _)| *id)
            .collect();
        for id in hit {
            let now = inner.now;
            inner.at(now, Event::Reset(id, 0));
            inner.at(now, Event::Reset(id, 1));
        }
    }

    /// The node's power is gone: its peers hear nothing, not even that.
    pub fn darken(&self, node: NodeNo) {
        self.0.lock().dark.insert(node);
    }

    /// The node has left: nobody listens there.
    pub fn leave(&self, node: NodeNo) {
        let mut inner = self.0.lock();
        let listener = inner.listeners.remove(&node).unwrap_or_default();
        for conn in listener.waiting {
            let at = inner.now;
            inner.at(at, Event::Reset(conn, 0));
        }
    }

    /// The node starts, and knows of no connection.
    pub fn listen(&self, node: NodeNo) -> Incoming {
        let mut inner = self.0.lock();
        inner.dark.remove(&node);
        inner.listeners.insert(node, Listener::default());
        let old: Vec<(u64, usize)> = (inner.conns.iter())
            .filter_map(|(id, c)| c.ends.iter().position(|e| *e == node).map(|side| (*id, 1 - side)))
            .collect();
        for (id, side) in old {
            let at = inner.now + inner.delay();
            inner.at(at, Event::Reset(id, side));
        }
        Incoming {
            net: self.clone(),
            node,
        }
    }
}

/// The connections that come to a node.
pub struct Incoming {
    net: Net,
    node: NodeNo,
}

impl futures_util::Stream for Incoming {
    type Item = io::Result<Socket>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let mut inner = self.net.0.lock();
        let Some(listener) = inner.listeners.get_mut(&self.node) else {
            return Poll::Ready(None);
        };
        match listener.waiting.pop_front() {
            Some(conn) => Poll::Ready(Some(Ok(Socket {
                net: self.net.clone(),
                conn,
                side: 1,
            }))),
            None => {
                listener.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

/// One end of a connection.
pub struct Socket {
    net: Net,
    conn: u64,
    side: usize,
}

impl tonic::transport::server::Connected for Socket {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut inner = self.net.0.lock();
        let inner = &mut *inner;
        let Some(conn) = inner.conns.get_mut(&self.conn) else {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        };
        let writer = conn.ends[1 - self.side];
        let lane = &mut conn.lanes[self.side];
        if lane.reset {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let Some(front) = lane.arrived.front_mut() else {
            if lane.ended {
                return Poll::Ready(Ok(()));
            }
            lane.reader = Some(cx.waker().clone());
            return Poll::Pending;
        };
        let n = front.len().min(out.remaining());
        out.put_slice(&front[..n]);
        front.advance(n);
        if front.is_empty() {
            lane.arrived.pop_front();
        }
        lane.bytes -= n;
        if lane.bytes < BUFFER_BYTES && lane.writer.is_some() {
            wake(&mut lane.writer);
            inner.ready.insert(writer);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let mut inner = self.net.0.lock();
        let Some(conn) = inner.conns.get_mut(&self.conn) else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        if conn.lanes[self.side].reset {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let lane = &mut conn.lanes[1 - self.side];
        if lane.bytes >= BUFFER_BYTES {
            lane.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        inner.send(self.conn, 1 - self.side, Some(Bytes::copy_from_slice(data)));
        Poll::Ready(Ok(data.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.net.0.lock().send(self.conn, 1 - self.side, None);
        Poll::Ready(Ok(()))
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        let mut inner = self.net.0.lock();
        let Some(conn) = inner.conns.get_mut(&self.conn) else {
            return;
        };
        conn.closed[self.side] = true;
        if conn.closed[1 - self.side] {
            inner.conns.remove(&self.conn);
        } else {
            inner.send(self.conn, 1 - self.side, None);
        }
    }
}

/// A node's way to the others.
#[derive(Debug)]
pub struct Dialer {
    pub net: Net,
    pub from: NodeNo,
}

/// The address of a node, as the map has it.
pub fn address(node: NodeNo) -> String {
    format!("node-{node}:1")
}

impl Dial for Dialer {
    fn dial(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn PeerStream>>> {
        let to = address
            .strip_prefix("node-")
            .and_then(|a| a.strip_suffix(":1")?.parse().ok());
        let Some(to) = to else {
            let text = format!("{address:?} is no address of the simulation");
            return std::future::ready(Err(io::Error::other(text))).boxed();
        };
        let conn = {
            let mut inner = self.net.0.lock();
            inner.next += 1;
            let id = inner.next;
            inner.conns.insert(
                id,
                Conn {
                    ends: [self.from, to],
                    lanes: [Lane::default(), Lane::default()],
                    answered: None,
                    dialer: None,
                    closed: [false; 2],
                },
            );
            let at = inner.now + inner.delay();
            inner.at(at, Event::Ask(id));
            id
        };
        // Dropped before it is answered, it closes its end.
        let socket = Socket {
            net: self.net.clone(),
            conn,
            side: 0,
        };
        async move {
            let answered = std::future::poll_fn(|cx| {
                let mut inner = socket.net.0.lock();
                let Some(conn) = inner.conns.get_mut(&socket.conn) else {
                    return Poll::Ready(false);
                };
                match conn.answered {
                    Some(yes) => Poll::Ready(yes),
                    None => {
                        conn.dialer = Some(cx.waker().clone());
                        Poll::Pending
                    }
                }
            });
            if answered.await {
                let stream: Box<dyn PeerStream> = Box::new(socket);
                Ok(stream)
            } else {
                Err(io::ErrorKind::ConnectionRefused.into())
            }
        }
        .boxed()
    }
}
