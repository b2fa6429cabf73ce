//! The simulation itself: what happens next, and to whom.
//!
//! There is one thread. Time stands still while anything can run; then it goes on to the next thing that is due: a timer
//! of a node, something that arrives, a write that is done, a fault, a client. Nodes that are due at the same moment run
//! in an order that the seed says.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BTreeSet, BinaryHeap};
use std::path::PathBuf;
use std::time::Duration;

use mainstem::machine::GroupOutcome;
use mainstem::model::{GroupId, NodeId, ReplicaId, ShardId};
use mainstem::raft::{Applied, LogKeep, Origin};
use tokio::runtime::Runtime;

use super::ask::{self, Answers, Ask, Told};
use super::changes::Swap;
use super::host;
use super::invariants::{Invariants, Verdict, Violation, broken};
use super::load::{Client, Kind, Next, create_shard};
use super::moves::Catalog;
use super::net::{MS, Net, NodeNo};
use super::node::{Node, Wanted, founders, replica};
use super::rng::Rng;
use super::trace::Trace;

/// What is simulated.
#[derive(Debug, Clone)]
pub struct Scene {
    pub nodes: usize,
    /// Groups with the nodes of their first voters.
    pub groups: Vec<(GroupId, Vec<NodeNo>)>,
    pub keep: LogKeep,
    /// How long faults last.
    pub chaos: Duration,
    pub planted: Option<Planted>,
    /// Members come and go.
    pub changes: bool,
    /// Shards go from group to group.
    pub moves: bool,
}

/// Bugs that must be caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Planted {
    SkippedSync,
    LearnersCount,
    EarlyAck,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Due {
    WriteDone(NodeNo, u64),
    Start(NodeNo),
    Resume(NodeNo),
    Flush(NodeNo),
    Client(usize),
    /// An ask was not answered in time.
    Late(u64),
    Make(GroupId),
    Fault,
    Change,
    Move,
}

/// Who waits for an answer.
#[derive(Debug, Clone)]
pub enum Asker {
    Client(usize),
    Shard(ShardId, GroupId),
    Change(String),
    /// What a removed replica has left there is removed.
    Emptied(ReplicaId),
    /// The step of a shard's move of this number.
    Move(ShardId, u64),
    /// A seal for a move that was given up.
    LateSeal(ShardId, u64),
    /// Whether this node has applied and flushed the seal of that move.
    Flush(ShardId, u64, NodeNo),
}

pub struct World {
    pub scene: Scene,
    pub now: u64,
    pub rng: Rng,
    pub net: Net,
    pub nodes: Vec<Node>,
    pub places: BTreeMap<ReplicaId, NodeNo>,
    pub due: BinaryHeap<Reverse<(u64, u64, Due)>>,
    pub trace: Trace,
    pub invariants: Invariants,
    pub clients: Vec<Client>,
    pub tokens: u64,
    /// Clients begin nothing new.
    pub quiet: bool,
    answers: Answers,
    asked: BTreeMap<u64, (NodeNo, Asker)>,
    numbers: u64,
    pub slices: u64,
    /// Replicas that were brought up to date by a snapshot.
    pub snapshots: u64,
    /// Shards that are there.
    pub made: BTreeSet<ShardId>,
    pub catalog: Catalog,
    pub swaps: BTreeMap<GroupId, Swap>,
    /// Until when a group is left alone.
    pub busy: BTreeMap<GroupId, u64>,
    /// Replicas that have left their groups, and whose nodes have not confirmed that they are empty.
    pub former: BTreeMap<ReplicaId, (GroupId, NodeNo)>,
    /// Replicas that were given to groups after the first.
    pub given: usize,
    /// Does what blocks and is no node's own matter of time: one thread, which is waited for.
    pub aside: Runtime,
}

pub fn shard_of(group: GroupId) -> ShardId {
    ShardId::new(group.get() * 10 + 3)
}

impl World {
    pub fn new(seed: u64, scene: Scene, dir: &std::path::Path) -> Self {
        let mut nodes = Vec::new();
        let mut places = BTreeMap::new();
        for no in 1..=scene.nodes {
            let path: PathBuf = dir.join(format!("node-{no}"));
            let mut node = Node::new(no, path);
            for (group, voters) in &scene.groups {
                let replica = replica(*group, no);
                let origin = if voters.contains(&no) {
                    Origin::Found(founders(*group, voters))
                } else if scene.planted == Some(Planted::LearnersCount) {
                    Origin::Join
                } else {
                    continue;
                };
                places.insert(replica, no);
                node.wanted.push(Wanted {
                    group: *group,
                    replica,
                    origin,
                    gone: false,
                });
            }
            nodes.push(node);
        }
        let mut clients = Vec::new();
        for (group, _) in &scene.groups {
            let shard = shard_of(*group);
            for n in 0..2 {
                clients.push(Client::new(Kind::Producer(group.get() * 10 + n), shard, *group));
            }
            clients.push(Client::new(Kind::Plain, shard, *group));
            clients.push(Client::new(Kind::Reader, shard, *group));
        }
        Self {
            scene,
            now: 0,
            rng: Rng::new(seed, 1),
            net: Net::new(Rng::new(seed, 2)),
            nodes,
            places,
            due: BinaryHeap::new(),
            trace: Trace::default(),
            invariants: Invariants::default(),
            clients,
            tokens: 0,
            quiet: false,
            answers: Answers::default(),
            asked: BTreeMap::new(),
            numbers: 0,
            slices: 0,
            snapshots: 0,
            made: BTreeSet::new(),
            catalog: Catalog::default(),
            swaps: BTreeMap::new(),
            busy: BTreeMap::new(),
            former: BTreeMap::new(),
            given: 0,
            aside: tokio::runtime::Builder::new_current_thread()
                .max_blocking_threads(1)
                .build()
                .expect("a runtime can be made"),
        }
    }

    pub fn note(&mut self, what: std::fmt::Arguments<'_>) {
        self.trace.note(self.now, what);
    }

    pub fn at(&mut self, at: u64, due: Due) {
        self.numbers += 1;
        self.due.push(Reverse((at.max(self.now), self.numbers, due)));
    }

    pub fn node(&mut self, no: NodeNo) -> &mut Node {
        &mut self.nodes[no - 1]
    }

    /// Starts a node.
    pub fn start(&mut self, no: NodeNo) -> Verdict {
        let (nodes, keep) = (self.scene.nodes, self.scene.keep);
        let node = &mut self.nodes[no - 1];
        if node.run.is_some() {
            return Ok(());
        }
        node.start(&self.net, nodes, &self.places, keep, &self.catalog.floors)
            .map_err(|e| broken("a crash is not damage", format!("node {no}: {e}")))?;
        let boot = node.boot;
        let mut flush = self.rng.range(300, 3_000) * MS;
        if self.scene.planted == Some(Planted::LearnersCount) {
            // What is planted is in the log, and must be read from there.
            flush += 5_000 * MS;
        }
        self.at(self.now + flush, Due::Flush(no));
        self.note(format_args!("n{no} starts, boot {boot}"));
        self.slice(no)
    }

    /// Ends a node at once; with `power`, what was not synced may be gone.
    pub fn crash(&mut self, no: NodeNo, power: bool) -> Verdict {
        if self.nodes[no - 1].run.is_none() {
            return Ok(());
        }
        if power {
            self.net.darken(no);
        }
        self.net.leave(no);
        if let Some(run) = self.nodes[no - 1].run.take() {
            let node = &mut self.nodes[no - 1];
            let mark = node.disk.mark();
            let half = run.writing && self.rng.one_in(2);
            let store = run.end();
            if half {
                // Nobody is told of it, and the witness has not seen it.
                store.commit_waiting();
            }
            let Some(store) = std::sync::Arc::into_inner(store) else {
                return Err(broken("a node that ended lets go of its store", format!("node {no}")));
            };
            drop(store);
            let what = node.disk.crash(&mark, power, &mut self.rng);
            let how = if power { "loses power" } else { "is killed" };
            let cut = if half { ", a write cut short" } else { "" };
            self.note(format_args!("n{no} {how}{cut}: {what}"));
        }
        let lost: Vec<u64> = (self.asked.iter())
            .filter(|(_, (at, _))| *at == no)
            .map(|(id, _)| *id)
            .collect();
        for id in lost {
            self.told(id, Told::Lost)?;
        }
        Ok(())
    }

    /// Runs until then.
    pub fn run_until(&mut self, end: u64) -> Verdict {
        loop {
            let timers = self.nodes.iter().filter_map(|node| {
                let run = node.run.as_ref()?;
                Some(run.deadline?.max(run.paused_until))
            });
            let due = self.due.peek().map(|Reverse((at, ..))| *at);
            let next = timers.chain(due).chain(self.net.next_at()).min();
            let Some(next) = next.filter(|next| *next <= end) else {
                self.now = self.now.max(end);
                host::set_now(self.now);
                return Ok(());
            };
            self.now = self.now.max(next);
            host::set_now(self.now);
            self.step()?;
        }
    }

    fn step(&mut self) -> Verdict {
        self.net.advance(self.now);
        while let Some(Reverse((at, _, due))) = self.due.peek().copied() {
            if at > self.now {
                break;
            }
            self.due.pop();
            self.happen(due)?;
        }
        let now = self.now;
        let timers = self.nodes.iter().filter(|node| {
            let run = node.run.as_ref();
            run.is_some_and(|run| run.deadline.is_some_and(|at| at.max(run.paused_until) <= now))
        });
        let mut ready: BTreeSet<NodeNo> = timers.map(|node| node.no).collect();
        ready.extend(self.net.take_ready());
        let mut rounds = 0;
        while !ready.is_empty() {
            rounds += 1;
            if rounds > 10_000 {
                return Err(broken("a moment ends", format!("nodes {ready:?} go on and on")));
            }
            let mut order: Vec<NodeNo> = std::mem::take(&mut ready).into_iter().collect();
            self.rng.shuffle(&mut order);
            for no in order {
                self.slice(no)?;
            }
            ready.extend(self.net.take_ready());
        }
        Ok(())
    }

    /// Lets a node run as far as it can now, and looks at it.
    pub fn slice(&mut self, no: NodeNo) -> Verdict {
        let now = self.now;
        let Some(run) = self.nodes[no - 1].run.as_mut() else {
            return Ok(());
        };
        if run.paused_until > now {
            return Ok(());
        }
        run.slice();
        self.slices += 1;
        if self.trace.deep {
            let (deadline, drawn) = (run.deadline.unwrap_or(0), host::drawn());
            self.trace.note(
                now,
                format_args!("  n{no} until {deadline}, {drawn} random bytes so far"),
            );
            for what in self.net.take_told() {
                self.trace.note(now, format_args!("  {what}"));
            }
        }
        let failures = std::mem::take(&mut *run.failures.lock());
        if let Some(failure) = failures.first() {
            return Err(broken("a replica starts", format!("node {no}: {failure}")));
        }
        if let Some(poison) = run.store.poisoned().borrow().as_ref() {
            return Err(broken("a store is not poisoned", format!("node {no}: {poison:?}")));
        }
        if !run.writing && run.store.has_waiting() {
            run.writing = true;
            let slow = run.slow_until > now;
            let takes = match self.rng.range(0, 30) {
                _ if slow => self.rng.range(50, 400) * MS,
                0 => self.rng.range(5, 30) * MS,
                _ => self.rng.range(50, 500) * 1_000,
            };
            let boot = self.nodes[no - 1].boot;
            self.at(now + takes, Due::WriteDone(no, boot));
        }
        self.look(no)?;
        let answers = std::mem::take(&mut *self.answers.lock());
        for (id, told) in answers {
            self.told(id, told)?;
        }
        Ok(())
    }

    fn happen(&mut self, due: Due) -> Verdict {
        match due {
            Due::WriteDone(no, boot) => self.write_done(no, boot),
            Due::Start(no) => self.start(no),
            Due::Resume(no) => self.slice(no),
            Due::Flush(no) => {
                let node = &self.nodes[no - 1];
                if let Some(run) = &node.run {
                    let entered = run.runtime.enter();
                    run.store
                        .state()
                        .flush()
                        .map_err(|e| broken("state is flushed", e.to_string()))?;
                    drop(entered);
                    self.note(format_args!("n{no} has flushed"));
                    let at = self.now + self.rng.range(500, 4_000) * MS;
                    self.at(at, Due::Flush(no));
                    return self.slice(no);
                }
                Ok(())
            }
            Due::Client(at) => self.client(at),
            Due::Late(id) => self.told(id, Told::Lost),
            Due::Make(group) => self.make_shard(group),
            Due::Fault => self.fault(),
            Due::Change => self.change(),
            Due::Move => self.move_shards(),
        }
    }

    fn write_done(&mut self, no: NodeNo, boot: u64) -> Verdict {
        let now = self.now;
        let node = &mut self.nodes[no - 1];
        if node.boot != boot {
            return Ok(());
        }
        let Some(run) = node.run.as_mut() else { return Ok(()) };
        if run.paused_until > now {
            let at = run.paused_until;
            self.at(at, Due::WriteDone(no, boot));
            return Ok(());
        }
        run.writing = false;
        let entered = run.runtime.enter();
        node.disk.commit(&run.store);
        drop(entered);
        self.slice(no)
    }

    /// Asks a node; false: it does not run, or has no replica of the group.
    pub fn ask(&mut self, no: NodeNo, group: GroupId, ask: Ask, asker: Asker) -> Result<Option<u64>, Violation> {
        let node = &self.nodes[no - 1];
        let (Some(run), Some(found)) = (&node.run, node.group(group)) else {
            return Ok(None);
        };
        self.numbers += 1;
        let id = self.numbers;
        let careless = self.scene.planted == Some(Planted::EarlyAck);
        let ask = match ask {
            Ask::Propose(command) if careless && matches!(asker, Asker::Client(_)) => Ask::ProposeCarelessly(command),
            other => other,
        };
        run.runtime
            .spawn(ask::serve(id, found, run.groups.clone(), ask, self.answers.clone()));
        self.asked.insert(id, (no, asker));
        self.at(self.now + 3_000 * MS, Due::Late(id));
        self.slice(no)?;
        Ok(Some(id))
    }

    /// Asks a node to remove what a removed replica has left there.
    pub fn clear_out(&mut self, no: NodeNo, group: GroupId, old: ReplicaId) -> Verdict {
        let Some(run) = &self.nodes[no - 1].run else {
            return Ok(());
        };
        self.numbers += 1;
        let id = self.numbers;
        let (groups, aside) = (run.groups.clone(), self.aside.handle().clone());
        run.runtime
            .spawn(ask::clear_out(id, groups, group, aside, self.answers.clone()));
        self.asked.insert(id, (no, Asker::Emptied(old)));
        self.slice(no)
    }

    /// Whether a node works on that.
    pub fn is_clearing(&self, old: ReplicaId) -> bool {
        let of = |asker: &Asker| matches!(asker, Asker::Emptied(replica) if *replica == old);
        self.asked.values().any(|(_, asker)| of(asker))
    }

    /// Takes an answer to where it is waited for, unless it is late.
    fn told(&mut self, id: u64, told: Told) -> Verdict {
        let Some((no, asker)) = self.asked.remove(&id) else {
            return Ok(());
        };
        match asker {
            Asker::Client(at) => {
                let places = &self.places;
                let client = &mut self.clients[at];
                let before = self.invariants.acked_stays.count();
                let nodes = self.scene.nodes;
                let place = |r: ReplicaId| places.get(&r).copied();
                let next = client.told(&told, place, nodes, &mut self.rng, &mut self.invariants)?;
                if self.invariants.acked_stays.count() > before {
                    self.note(format_args!("c{at} acked by n{no}: {}", brief(&told)));
                }
                let wait = match next {
                    Next::Wait(wait) => wait,
                    Next::LookUp(wait) => {
                        let client = &mut self.clients[at];
                        let owner = self.catalog.owners.get(&client.shard).copied();
                        if let Some(owner) = owner.filter(|owner| *owner != client.group) {
                            client.group = owner;
                            self.note(format_args!("c{at} follows its shard to {owner}"));
                        }
                        wait
                    }
                };
                self.at(self.now + wait, Due::Client(at));
            }
            Asker::Shard(shard, group) => {
                if matches!(
                    told,
                    Told::Applied(_, _, Applied::Command(GroupOutcome::Created { .. }))
                ) {
                    self.made.insert(shard);
                    self.catalog.owners.entry(shard).or_insert(group);
                    self.note(format_args!("{shard} is there"));
                } else {
                    self.at(self.now + 20 * MS, Due::Make(group));
                }
            }
            Asker::Emptied(replica) => self.emptied(replica, &told),
            Asker::Move(shard, id) => self.move_told(shard, id, &told)?,
            Asker::LateSeal(shard, id) => self.late_told(shard, id, &told)?,
            Asker::Flush(shard, id, no) => self.flush_told(shard, id, no, &told),
            Asker::Change(what) => self.note(format_args!("{what}: {}", brief(&told))),
        }
        Ok(())
    }

    fn client(&mut self, at: usize) -> Verdict {
        let now_us = 1_750_000_000_000_000 + self.now / 1_000;
        let begin = !self.quiet;
        let client = &mut self.clients[at];
        if client.waiting.is_some() {
            return Ok(());
        }
        let asked = client.ask(&mut self.tokens, &mut self.rng, &self.invariants, now_us, begin);
        let (target, group) = (client.target, client.group);
        let Some(ask) = asked else {
            self.at(self.now + 100 * MS, Due::Client(at));
            return Ok(());
        };
        // So that an answer that comes at once finds it.
        self.clients[at].waiting = Some(0);
        if self.ask(target, group, ask, Asker::Client(at))?.is_none() {
            self.clients[at].waiting = None;
            self.clients[at].target = self.rng.range(1, self.scene.nodes as u64 + 1) as NodeNo;
            let wait = self.rng.range(1, 30) * MS;
            self.at(self.now + wait, Due::Client(at));
        }
        Ok(())
    }

    /// Sees to it that a shard comes to be.
    fn make_shard(&mut self, group: GroupId) -> Verdict {
        let shard = shard_of(group);
        let leader = self.leader(group);
        let target = leader.unwrap_or_else(|| self.rng.range(1, self.scene.nodes as u64 + 1) as NodeNo);
        let ask = Ask::Propose(create_shard(shard));
        if self.ask(target, group, ask, Asker::Shard(shard, group))?.is_none() {
            self.at(self.now + 20 * MS, Due::Make(group));
        }
        Ok(())
    }

    /// A node that says it leads, of the latest term.
    pub fn leader(&self, group: GroupId) -> Option<NodeNo> {
        let claims = self.nodes.iter().filter_map(|node| {
            let status = node.group(group)?.status();
            status.is_leader.then_some((status.term, node.no))
        });
        claims.max().map(|(_, no)| no)
    }

    /// Tells every running node where a replica is.
    pub fn place(&mut self, replica: ReplicaId, no: NodeNo) {
        self.places.insert(replica, no);
        for node in &self.nodes {
            if let Some(run) = &node.run {
                run.map.set_replica(replica, NodeId::new(no as u64));
            }
        }
    }
}

fn brief(told: &Told) -> String {
    match told {
        Told::Applied(index, term, Applied::Command(GroupOutcome::Published(items))) => {
            format!("#{index} of term {}, {} items", term.0, items.len())
        }
        other => format!("{other:?}"),
    }
}
