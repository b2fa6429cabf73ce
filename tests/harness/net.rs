//! TCP proxies in front of the nodes' peer listeners: connections that stand still, break, are slow or lossy, in one
//! direction or in both.
//!
//! A node advertises its proxy's address and listens elsewhere. Who connects to a proxy is found out by the owner of the
//! other end of the connection (`/proc`), so that nothing here knows the product's protocol, and what lies between two
//! nodes can be told apart from what lies between any others.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    Open,
    /// Bytes stay where they are, and go on when it opens again: what a cut route does to TCP for a while.
    Held,
    /// Connections end, and none is made: what a firewall that rejects, or a long cut, does.
    Broken,
}

/// What happens to the bytes that go from one node to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Link {
    pub flow: Flow,
    pub delay: Duration,
    /// Of a piece of up to 64 KiB: how likely it has to be sent again, which takes [`AGAIN`].
    pub loss: f64,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            flow: Flow::Open,
            delay: Duration::ZERO,
            loss: 0.0,
        }
    }
}

impl From<Flow> for Link {
    fn from(flow: Flow) -> Self {
        Self {
            flow,
            ..Self::default()
        }
    }
}

/// What a lost packet costs: TCP's least timeout before it sends again.
pub const AGAIN: Duration = Duration::from_millis(200);
const PIECE: usize = 64 << 10;
/// Pieces under way in one direction of one connection.
const PIECES: usize = 64;

/// The two directions of a connection: from who made it, and back.
#[derive(Clone)]
struct Pair {
    there: watch::Receiver<Link>,
    back: watch::Receiver<Link>,
}

/// One proxy, whoever connects.
pub struct Proxy {
    pub address: String,
    pub connections: Arc<AtomicU64>,
    link: watch::Sender<Link>,
    /// 0: there is nothing behind it.
    pid: Arc<AtomicU32>,
}

impl Proxy {
    pub async fn new(target: String) -> Self {
        let link = watch::Sender::new(Link::default());
        let pair = Pair {
            there: link.subscribe(),
            back: link.subscribe(),
        };
        let connections = Arc::default();
        let pid = Arc::new(AtomicU32::new(1));
        let address = serve(target, pid.clone(), Arc::clone(&connections), move |_, _| {
            Some(pair.clone())
        })
        .await;
        Self {
            address,
            connections,
            link,
            pid,
        }
    }

    /// Its connections end and it refuses others, as when the process behind it has ended.
    pub fn go(&self) {
        self.pid.store(0, Ordering::Release);
        self.link.send_replace(Flow::Broken.into());
    }

    /// It accepts, and reads nothing any more.
    pub fn stall(&self, stalled: bool) {
        self.link
            .send_replace(if stalled { Flow::Held } else { Flow::Open }.into());
    }
}

/// An address of this machine that nobody else uses, so that a node which comes back finds it free: each process of
/// tests has a loopback address of its own.
pub fn own_address() -> String {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let pid = std::process::id();
    let port = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("127.{}.{}.{}:{port}", 64 + (pid >> 16 & 63), pid >> 8 & 255, pid & 255)
}

/// How often it is looked whether the process is there.
const LOOK: Duration = Duration::from_millis(5);

/// Accepts on a port of its own for as long as the runtime runs, and passes on to `target`. While there is no process
/// behind it (`pid` is 0), connections are refused, as they would be without a proxy. Returns the address.
async fn serve(
    target: String,
    pid: Arc<AtomicU32>,
    connections: Arc<AtomicU64>,
    pair_of: impl Fn(SocketAddr, SocketAddr) -> Option<Pair> + Send + Sync + 'static,
) -> String {
    let mut listener = Some(TcpListener::bind(own_address()).await.unwrap());
    let own = listener.as_ref().expect("bound").local_addr().unwrap();
    let pair_of = Arc::new(pair_of);
    tokio::spawn(async move {
        loop {
            if pid.load(Ordering::Acquire) == 0 {
                listener = None;
            } else if listener.is_none() {
                listener = TcpListener::bind(own).await.ok();
            }
            let Some(open) = &listener else {
                tokio::time::sleep(LOOK).await;
                continue;
            };
            let accepted = tokio::time::timeout(LOOK, open.accept()).await;
            let Ok(Ok((inside, from))) = accepted else {
                continue;
            };
            connections.fetch_add(1, Ordering::Relaxed);
            let (target, pair_of) = (target.clone(), pair_of.clone());
            tokio::spawn(async move {
                // Looking it up blocks a little.
                let pair = tokio::task::spawn_blocking(move || pair_of(from, own)).await;
                if let Ok(Some(pair)) = pair {
                    pass(inside, target, pair).await;
                }
            });
        }
    });
    own.to_string()
}

async fn pass(inside: TcpStream, target: String, pair: Pair) {
    let Pair { there, back } = pair;
    let (mut cut_there, mut cut_back) = (there.clone(), back.clone());
    let work = async {
        let Ok(outside) = TcpStream::connect(target).await else {
            return;
        };
        let _ = (inside.set_nodelay(true), outside.set_nodelay(true));
        let (from_inside, to_inside) = inside.into_split();
        let (from_outside, to_outside) = outside.into_split();
        tokio::join!(
            pump(from_inside, to_outside, there),
            pump(from_outside, to_inside, back)
        );
    };
    // Dropping both ends them.
    tokio::select! {
        () = work => {}
        _ = cut_there.wait_for(|link| link.flow == Flow::Broken) => {}
        _ = cut_back.wait_for(|link| link.flow == Flow::Broken) => {}
    }
}

/// One direction: what is read is due after the link's delay, and written when it is due and the link is open.
async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, link: watch::Receiver<Link>) {
    let (pieces, mut due) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let mut gate = link.clone();
    let take = async move {
        let mut buffer = vec![0; PIECE];
        let mut last = Instant::now();
        while let Ok(n) = from.read(&mut buffer).await {
            if n == 0 {
                break;
            }
            let now = *link.borrow();
            let again = rand::random_bool(now.loss.clamp(0.0, 1.0));
            let at = Instant::now() + now.delay + if again { AGAIN } else { Duration::ZERO };
            // TCP keeps the order: what comes after a lost piece waits for it.
            last = last.max(at);
            if pieces.send((last, buffer[..n].to_vec())).await.is_err() {
                break;
            }
        }
    };
    let give = async move {
        while let Some((at, piece)) = due.recv().await {
            tokio::time::sleep_until(at).await;
            if gate.wait_for(|link| link.flow != Flow::Held).await.is_err() || to.write_all(&piece).await.is_err() {
                return;
            }
        }
        // The end travels like everything else.
        let _ = gate.wait_for(|link| link.flow != Flow::Held).await;
    };
    tokio::join!(take, give);
}

/// The links between the nodes of a cluster. Clones share it.
#[derive(Clone, Default)]
pub struct Net {
    inner: Arc<Inner>,
}

#[derive(Default)]
struct Inner {
    /// By sender and receiver.
    links: Mutex<HashMap<(usize, usize), watch::Sender<Link>>>,
    /// The process of each node; 0: none.
    pids: Mutex<Vec<Arc<AtomicU32>>>,
}

impl Net {
    /// One more node, that listens for its peers at `target`; `pid` will hold its process. Returns the address to be
    /// advertised.
    pub async fn add(&self, target: String, pid: Arc<AtomicU32>) -> String {
        let number = {
            let mut pids = self.inner.pids.lock().unwrap();
            pids.push(pid.clone());
            pids.len() - 1
        };
        let net = self.clone();
        let serving = serve(target, pid, Arc::default(), move |from, own| {
            let who = net.who(from, own)?;
            Some(Pair {
                there: net.link(who, number).subscribe(),
                back: net.link(number, who).subscribe(),
            })
        });
        serving.await
    }

    fn link(&self, from: usize, to: usize) -> watch::Sender<Link> {
        let mut links = self.inner.links.lock().unwrap();
        links.entry((from, to)).or_default().clone()
    }

    /// What happens from now on to what `from` sends to `to`.
    pub fn set(&self, from: usize, to: usize, link: impl Into<Link>) {
        self.link(from, to).send_replace(link.into());
    }

    /// All links are open and quick again.
    pub fn heal(&self) {
        for link in self.inner.links.lock().unwrap().values() {
            link.send_replace(Link::default());
        }
    }

    /// The node that has the other end of a connection.
    fn who(&self, from: SocketAddr, own: SocketAddr) -> Option<usize> {
        let inode = socket_inode(from, own)?;
        let wanted = format!("socket:[{inode}]");
        let pids: Vec<u32> = {
            let pids = self.inner.pids.lock().unwrap();
            pids.iter().map(|pid| pid.load(Ordering::Acquire)).collect()
        };
        pids.iter().position(|pid| {
            *pid > 0
                && std::fs::read_dir(format!("/proc/{pid}/fd"))
                    .into_iter()
                    .flatten()
                    .flatten()
                    .any(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to.as_os_str() == wanted.as_str()))
        })
    }
}

/// The inode of the socket with these addresses (both IPv4), seen from its own side.
fn socket_inode(local: SocketAddr, remote: SocketAddr) -> Option<String> {
    let hex = |address: SocketAddr| match address {
        SocketAddr::V4(v4) => format!("{:08X}:{:04X}", u32::from_ne_bytes(v4.ip().octets()), v4.port()),
        SocketAddr::V6(_) => unreachable!("the proxies listen on an IPv4 address"),
    };
    let (local, remote) = (hex(local), hex(remote));
    let table = std::fs::read_to_string("/proc/net/tcp").ok()?;
    let line = table.lines().find_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words.get(1) == Some(&local.as_str()) && words.get(2) == Some(&remote.as_str())).then_some(words)
    });
    line?.get(9).map(ToString::to_string)
}
