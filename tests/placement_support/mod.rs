//! A cluster made of the real catalog, the real planner, and the simplest thing that could stand for Raft groups: who votes,
//! who leads, who is up. It does what it is told and watches that nothing it is told does harm.
#![allow(dead_code, clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod rest;
pub mod story;

use std::collections::{BTreeMap, BTreeSet};

use mainstem::control::placement::{Action, GroupReport, LIVE_FOR_US, NodeReport, Reports, Step, plan};
use mainstem::machine::placement::MoveShape;
use mainstem::machine::{MetaMachine, MetaOutcome, MetaRefusal};
use mainstem::model::{GroupId, LogIndex, NodeId, ReplicaId, StreamId, TimeUs};
use mainstem::wire::internal::v1::{self as pb, NodeState, ReplicaRole, meta_command::Op};
use mainstem::wire::spec::normalise;
use mainstem::wire::v1::{Placement, StreamSpec};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::machine_support::Store;

pub const SECOND: u64 = 1_000_000;
pub const REPLACE_AFTER_S: u64 = 20;

/// What a group of real replicas would be.
#[derive(Debug, Clone, Default)]
pub struct Raft {
    pub voters: BTreeSet<u64>,
    pub leader: Option<u64>,
    pub index: u64,
}

pub type Change = fn(&World, &mut Vec<Action>);

pub struct World {
    pub machine: MetaMachine,
    pub store: Store,
    pub now: u64,
    pub rng: StdRng,
    pub up: BTreeMap<NodeId, bool>,
    pub seen: BTreeMap<NodeId, u64>,
    pub damaged: BTreeSet<ReplicaId>,
    pub rafts: BTreeMap<GroupId, Raft>,
    pub meta_voters: BTreeSet<u64>,
    pub meta_leader: Option<u64>,
    purged: BTreeMap<(NodeId, GroupId), u64>,
    /// A bug that is planted between the planner and those who do what it says.
    pub bug: Option<Change>,
    /// Changes and hand-overs since the last event from outside.
    pub done: BTreeMap<String, u32>,
    next_stream: u128,
}

impl World {
    pub fn new(seed: u64) -> Self {
        let mut world = Self {
            machine: MetaMachine::new(),
            store: Store::new(false),
            now: 1_000 * SECOND,
            rng: StdRng::seed_from_u64(seed),
            up: BTreeMap::new(),
            seen: BTreeMap::new(),
            damaged: BTreeSet::new(),
            rafts: BTreeMap::new(),
            meta_voters: BTreeSet::from([1]),
            meta_leader: Some(1),
            purged: BTreeMap::new(),
            bug: None,
            done: BTreeMap::new(),
            next_stream: 1,
        };
        world.apply(Op::InitCluster(pb::InitCluster {
            cluster_id: "c".into(),
            cluster_name: "test".into(),
            pool_groups: 3,
        }));
        world.apply(Op::UpdateSettings(pb::UpdateSettings {
            replace_after_us: Some(REPLACE_AFTER_S * SECOND),
            ..pb::UpdateSettings::default()
        }));
        world
    }

    pub fn apply(&mut self, op: Op) -> MetaOutcome {
        let command = pb::MetaCommand {
            time_us: self.now,
            request_id: String::new(),
            op: Some(op),
        };
        let outcome = self.machine.apply(&mut self.store, &command).unwrap();
        self.store.0.borrow_mut().writes.clear();
        outcome
    }

    fn must(&mut self, op: Op) {
        let text = format!("{op:?}");
        if let MetaOutcome::Refused(refusal) = self.apply(op) {
            panic!("{text}: {refusal}");
        }
    }

    pub fn join(&mut self, id: u64, zone: &str) -> MetaOutcome {
        let outcome = self.apply(Op::JoinNode(pb::JoinNode {
            node_id: id,
            name: format!("node-{id}"),
            store_id: format!("{id:032x}"),
            incarnation: 1,
            zone: zone.into(),
            ..pb::JoinNode::default()
        }));
        if !matches!(outcome, MetaOutcome::Refused(_)) {
            self.up.insert(NodeId::new(id), true);
            self.seen.insert(NodeId::new(id), self.now);
        }
        outcome
    }

    pub fn unreachable(&self) -> Vec<u64> {
        let down = self.up.iter().filter(|(_, up)| !**up);
        down.map(|(id, _)| id.get()).collect()
    }

    pub fn create(&mut self, replicas: u32, shards: u32, dedicated: bool) -> MetaOutcome {
        let id = self.next_stream;
        self.next_stream += 1;
        let spec = normalise(&StreamSpec {
            name: format!("s{id}"),
            replicas,
            shards,
            dedicated,
            ..StreamSpec::default()
        });
        let outcome = self.apply(Op::CreateStream(pb::CreateStream {
            stream_id: StreamId::new(id).to_string(),
            spec: Some(spec.unwrap()),
            unreachable_nodes: self.unreachable(),
        }));
        if let MetaOutcome::StreamCreated(stream) = &outcome {
            let stream_id = stream.stream_id.clone();
            self.must(Op::ActivateStream(pb::ActivateStream { stream_id }));
        }
        outcome
    }

    pub fn update(&mut self, name: &str, change: impl FnOnce(&mut StreamSpec)) -> MetaOutcome {
        let Some(stream) = self.machine.stream_by_name("default", name).cloned() else {
            return MetaOutcome::Refused(MetaRefusal::NotFound { name: name.into() });
        };
        let mut spec = stream.spec.clone().unwrap();
        change(&mut spec);
        self.apply(Op::UpdateStream(pb::UpdateStream {
            namespace: "default".into(),
            name: name.into(),
            spec: Some(normalise(&spec).unwrap()),
            base_revision: stream.revision,
            unreachable_nodes: self.unreachable(),
        }))
    }

    pub fn zones(zones: &[&str]) -> Option<Placement> {
        Some(Placement {
            zones: zones.iter().map(|zone| zone.to_string()).collect(),
            ..Placement::default()
        })
    }

    pub fn is_up(&self, node: u64) -> bool {
        self.up.get(&NodeId::new(node)).copied().unwrap_or(false)
    }

    fn node_of(&self, group: &pb::GroupRecord, replica: u64) -> Option<u64> {
        let all = group.replicas.iter().chain(&group.removed);
        all.filter(|r| r.replica_id == replica).map(|r| r.node_id).next()
    }

    fn runs(&self, group: &pb::GroupRecord, replica: u64) -> bool {
        let node = self.node_of(group, replica);
        node.is_some_and(|node| self.is_up(node)) && !self.damaged.contains(&ReplicaId::new(replica))
    }

    /// Whether a replica can say that it has applied a seal, or will never say anything again.
    fn can_seal(&self, replica: &pb::ReplicaRecord) -> bool {
        let node = self.machine.node(NodeId::new(replica.node_id));
        let removed = node.is_none_or(|node| node.state() == NodeState::Removed);
        removed || (self.is_up(replica.node_id) && !self.damaged.contains(&ReplicaId::new(replica.replica_id)))
    }

    pub fn live(&self, group: &pb::GroupRecord, voters: &BTreeSet<u64>) -> usize {
        voters.iter().filter(|id| self.runs(group, **id)).count()
    }

    pub fn has_quorum(&self, group: &pb::GroupRecord, voters: &BTreeSet<u64>) -> bool {
        self.live(group, voters) > voters.len() / 2
    }

    pub fn reports(&self) -> Reports {
        let mut reports = Reports {
            since: TimeUs::new(1_000 * SECOND),
            ..Reports::default()
        };
        for (id, seen) in &self.seen {
            let report = NodeReport {
                last_seen: TimeUs::new(*seen),
                damaged: match self.is_up(id.get()) {
                    true => self.damaged.clone(),
                    false => BTreeSet::new(),
                },
                purged: self
                    .purged
                    .iter()
                    .filter(|((node, _), _)| node == id)
                    .map(|((_, group), index)| (*group, LogIndex::new(*index)))
                    .collect(),
                ..NodeReport::default()
            };
            reports.nodes.insert(*id, report);
        }
        for group in self.machine.groups() {
            let id = GroupId::new(group.group_id);
            let Some(raft) = self.rafts.get(&id) else { continue };
            let Some(leader) = raft.leader else { continue };
            let current = raft.voters.iter().filter(|voter| self.runs(group, **voter));
            reports.groups.insert(
                id,
                GroupReport {
                    leader: ReplicaId::new(leader),
                    current: current.map(|id| ReplicaId::new(*id)).collect(),
                },
            );
        }
        reports.meta.leader = self.meta_leader.map(ReplicaId::new);
        reports.meta.voters = self.meta_voters.iter().map(|id| ReplicaId::new(*id)).collect();
        reports.meta.current = reports.meta.voters.clone();
        reports
    }

    pub fn plan(&self) -> Vec<Action> {
        let shape = self.machine.shape();
        let (reports, now) = (self.reports(), TimeUs::new(self.now));
        let actions = plan(&shape, &reports, now);
        assert_eq!(actions, plan(&shape, &reports, now), "the same in, the same out");
        actions
    }

    /// A second passes: nodes report, groups elect and go on with what they are told, the planner plans.
    /// Returns how many actions could be done.
    pub fn tick(&mut self) -> Result<usize, String> {
        self.now += SECOND;
        for (node, up) in &self.up {
            if *up {
                self.seen.insert(*node, self.now);
            }
        }
        self.run_groups()?;
        self.run_meta()?;
        let mut actions = self.plan();
        if let Some(bug) = self.bug {
            bug(self, &mut actions);
        }
        for action in actions.iter().filter(|action| action.blocked.is_some()) {
            self.give_up(action);
        }
        let ready: Vec<Action> = actions.into_iter().filter(|action| action.blocked.is_none()).collect();
        for action in &ready {
            self.act(action)?;
        }
        Ok(ready.len())
    }

    /// A move that waits for a node that does not answer is given up in time, by the leader of the group.
    fn give_up(&mut self, action: &Action) {
        let Step::SealShard {
            stream,
            shard,
            move_id,
            from,
            ..
        } = &action.step
        else {
            return;
        };
        let planned = |m: &MoveShape| m.shard == *shard && m.step() == pb::MoveStep::Planned;
        if self.led(*from) && self.machine.shape().moves.iter().any(planned) && self.rng.random_bool(0.1) {
            let (shard_id, stream_id, move_id) = (shard.get(), stream.to_string(), *move_id);
            self.must(Op::GiveUpShardMove(pb::GiveUpShardMove {
                shard_id,
                stream_id: stream_id.clone(),
                move_id,
                why: "a node does not answer".into(),
            }));
            self.must(Op::AbortShardMove(pb::AbortShardMove {
                shard_id,
                stream_id,
                move_id,
                why: "it is unsealed".into(),
            }));
        }
    }

    fn count(&mut self, what: String) {
        *self.done.entry(what).or_default() += 1;
    }

    fn act(&mut self, action: &Action) -> Result<(), String> {
        match &action.step {
            Step::TransferLeader { group, to, .. } if *group == GroupId::META => self.meta_leader = Some(to.get()),
            Step::TransferLeader { group, from, to } => {
                self.count(format!("lead {group}"));
                let record = self.machine.group(*group).unwrap().clone();
                let up = self.runs(&record, to.get());
                let raft = self.rafts.get_mut(group).unwrap();
                if raft.leader == Some(from.get()) && raft.voters.contains(&to.get()) && up {
                    raft.leader = Some(to.get());
                }
            }
            Step::SealShard {
                stream,
                shard,
                move_id,
                from,
                ..
            } => {
                let record = self.machine.group(*from).unwrap();
                if let Some(away) = record.replicas.iter().find(|replica| !self.can_seal(replica)) {
                    // Its death is not noticed yet: it is asked, and does not answer.
                    let seen = self.seen.get(&NodeId::new(away.node_id)).copied().unwrap_or(0);
                    return match self.now - seen <= LIVE_FOR_US {
                        true => Ok(()),
                        false => Err(format!("{action}: r{} cannot seal", away.replica_id)),
                    };
                }
                let raft = self.rafts.get_mut(from).unwrap();
                raft.index += 10;
                let index = raft.index;
                self.must(Op::ShardSealed(pb::ShardSealed {
                    shard_id: shard.get(),
                    stream_id: stream.to_string(),
                    move_id: *move_id,
                    seal: Some(pb::Seal {
                        index,
                        tail: 7,
                        digest: 9,
                    }),
                }));
            }
            Step::AdoptShard {
                stream,
                shard,
                move_id,
                to,
                ..
            } => {
                let raft = self.rafts.get_mut(to).unwrap();
                raft.index += 10;
                let index = raft.index;
                self.must(Op::ShardAdopted(pb::ShardAdopted {
                    shard_id: shard.get(),
                    stream_id: stream.to_string(),
                    move_id: *move_id,
                    index,
                }));
            }
            step => {
                if let Step::ChangeReplicas { group, add, remove, .. } = step {
                    self.count(format!("change {group}"));
                    let raft = self.rafts.get(group);
                    let leader = raft.and_then(|raft| raft.leader);
                    // The only voter is replaced by the change itself.
                    let alone = raft.is_some_and(|raft| raft.voters.len() == 1) && !add.is_empty();
                    if !alone && remove.iter().any(|id| Some(id.get()) == leader) {
                        return Err(format!("{action}: that is its leader"));
                    }
                }
                let Some(op) = step.command() else {
                    return Err(format!("{step} is ready and nobody can do it"));
                };
                if let MetaOutcome::Refused(refusal) = self.apply(op) {
                    // A node that has not yet put its former replica aside is seen by nobody but the catalog.
                    if !matches!(refusal, MetaRefusal::InFlight { .. }) {
                        return Err(format!("{action}: refused: {refusal}"));
                    }
                }
            }
        }
        Ok(())
    }

    fn run_groups(&mut self) -> Result<(), String> {
        let groups: Vec<pb::GroupRecord> = self.machine.groups().map(|g| pb::GroupRecord::clone(g)).collect();
        for group in groups {
            let id = GroupId::new(group.group_id);
            if group.replicas.is_empty() {
                continue;
            }
            self.elect(id, &group);
            self.go_on(id, &group)?;
            for replica in &group.removed {
                if self.is_up(replica.node_id) && self.rng.random_bool(0.5) {
                    self.must(Op::ReplicaGone(pb::ReplicaGone {
                        group_id: group.group_id,
                        replica_id: replica.replica_id,
                    }));
                }
            }
            for replica in &group.replicas {
                if self.is_up(replica.node_id) && self.rng.random_bool(0.5) {
                    self.purged.insert((NodeId::new(replica.node_id), id), group.log_floor);
                }
            }
        }
        Ok(())
    }

    fn elect(&mut self, id: GroupId, group: &pb::GroupRecord) {
        let mut raft = self.rafts.remove(&id).unwrap_or_else(|| Raft {
            voters: group.replicas.iter().map(|replica| replica.replica_id).collect(),
            ..Raft::default()
        });
        let leads = raft
            .leader
            .is_some_and(|leader| raft.voters.contains(&leader) && self.runs(group, leader));
        if !self.has_quorum(group, &raft.voters) {
            raft.leader = None;
        } else if !leads {
            let live: Vec<u64> = raft
                .voters
                .iter()
                .copied()
                .filter(|voter| self.runs(group, *voter))
                .collect();
            raft.leader = Some(live[self.rng.random_range(0..live.len())]);
        }
        let formed = raft.leader.is_some() && !group.formed;
        raft.index += 1;
        let membership = membership(&raft);
        self.rafts.insert(id, raft);
        if formed {
            self.must(Op::GroupFormed(pb::GroupFormed {
                group_id: group.group_id,
                membership: Some(membership),
            }));
        }
    }

    /// The leader's part of a change.
    fn go_on(&mut self, id: GroupId, group: &pb::GroupRecord) -> Result<(), String> {
        let raft = self.rafts[&id].clone();
        let (Some(change), Some(_)) = (&group.change, raft.leader) else {
            return Ok(());
        };
        if !change.ready {
            for replica in group
                .replicas
                .iter()
                .filter(|r| r.role() == ReplicaRole::Learner && !r.caught_up)
            {
                if self.is_up(replica.node_id) && self.rng.random_bool(0.5) {
                    self.must(Op::ReplicaCaughtUp(pb::ReplicaCaughtUp {
                        group_id: group.group_id,
                        epoch: change.epoch,
                        replica_id: replica.replica_id,
                    }));
                }
            }
            return Ok(());
        }
        let mut after = raft.voters.clone();
        after.extend(&change.add);
        after.retain(|id| !change.remove.contains(id));
        // A joint change needs both majorities, and whoever has died since it caught up is no help: the leader gives up,
        // and shows that it has.
        let died = change.add.iter().any(|id| !self.runs(group, *id));
        if died || !self.has_quorum(group, &after) {
            let raft = self.rafts.get_mut(&id).unwrap();
            raft.index += 1;
            let membership = membership(raft);
            self.must(Op::AbortChange(pb::AbortChange {
                group_id: group.group_id,
                epoch: change.epoch,
                membership: Some(membership),
                why: "the new voters cannot be reached".into(),
            }));
            return Ok(());
        }
        // One that was elected after the change was planned hands over by itself.
        if raft.leader.is_some_and(|leader| change.remove.contains(&leader)) {
            let alone = raft.voters.len() == 1;
            let heir = after
                .iter()
                .copied()
                .find(|id| self.runs(group, *id) && (alone || raft.voters.contains(id)));
            let Some(heir) = heir else { return Ok(()) };
            self.rafts.get_mut(&id).unwrap().leader = Some(heir);
        }
        let (before, wanted) = (raft.voters.len(), (group.replica_count as usize).max(1));
        let fewer = change.reason() == pb::ChangeReason::Scale && change.add.is_empty();
        if !fewer && after.len() < before.min(wanted) {
            return Err(format!(
                "{id}: {before} voters become {} of {wanted} by {change:?}",
                after.len()
            ));
        }
        let raft = self.rafts.get_mut(&id).unwrap();
        raft.voters = after;
        raft.index += 1;
        let membership = membership(raft);
        self.must(Op::ChangeCommitted(pb::ChangeCommitted {
            group_id: group.group_id,
            epoch: change.epoch,
            membership: Some(membership),
        }));
        Ok(())
    }

    fn run_meta(&mut self) -> Result<(), String> {
        let meta = self.machine.cluster().unwrap().meta.clone().unwrap();
        let desired: BTreeSet<u64> = meta.voters.iter().copied().collect();
        let up = |world: &Self, ids: &BTreeSet<u64>| {
            let nodes = world.machine.present_nodes();
            nodes
                .filter(|node| ids.contains(&node.meta_replica_id) && world.is_up(node.node_id))
                .count()
        };
        if desired != self.meta_voters
            && up(self, &desired) > desired.len() / 2
            && up(self, &self.meta_voters) > self.meta_voters.len() / 2
        {
            self.meta_voters = desired;
        }
        let node = |id: u64| {
            let found = self.machine.present_nodes().find(|node| node.meta_replica_id == id);
            found.map(|node| node.node_id)
        };
        let leads = |id: &u64| self.meta_voters.contains(id) && node(*id).is_some_and(|node| self.is_up(node));
        if !self.meta_leader.is_some_and(|id| leads(&id)) {
            self.meta_leader = self.meta_voters.iter().copied().find(leads);
        }
        Ok(())
    }

    /// Goes on until nothing is left to be done, and stays so.
    pub fn settle(&mut self) -> Result<(), String> {
        self.done.clear();
        let mut quiet = 0;
        for _ in 0..600 {
            let ready = self.tick()?;
            let under_way = self.machine.groups().any(|group| {
                group.change.is_some()
                    && self
                        .rafts
                        .get(&GroupId::new(group.group_id))
                        .is_some_and(|r| r.leader.is_some())
            });
            let moving = self
                .machine
                .shape()
                .moves
                .iter()
                .any(|moving| self.led(moving.from) && self.led(moving.to));
            quiet = if ready == 0 && !under_way && !moving {
                quiet + 1
            } else {
                0
            };
            // Longer than a node may be silent: nothing comes later either.
            if quiet > REPLACE_AFTER_S as usize + 5 {
                return Ok(());
            }
        }
        let left: Vec<String> = self.plan().iter().map(|action| action.to_string()).collect();
        Err(format!(
            "not settled after 600 s: {}\ndone: {:?}",
            left.join("\n"),
            self.done
        ))
    }

    fn led(&self, group: GroupId) -> bool {
        self.rafts.get(&group).is_some_and(|raft| raft.leader.is_some())
    }
}

fn membership(raft: &Raft) -> pb::GroupMembership {
    pb::GroupMembership {
        voters: raft.voters.iter().copied().collect(),
        learners: vec![],
        index: raft.index,
    }
}
