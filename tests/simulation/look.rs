//! What is seen of the nodes from outside, held against what must hold.

use std::collections::BTreeMap;

use futures_util::FutureExt as _;
use mainstem::model::{GroupId, LogIndex, ReplicaId, Sequence, ShardId};
use mainstem::raft::Group;
use mainstem::storage::Store;
use mainstem::wire::internal as pb;
use openraft::{EntryPayload, RaftLogReader as _};
use prost::Message as _;

use super::invariants::acked_stays::PURGED;
use super::invariants::log_matching::Entry;
use super::invariants::{Verdict, broken};
use super::load::token_of;
use super::net::NodeNo;
use super::node::Seen;
use super::world::{Planted, World};

impl World {
    /// Looks at every replica of a node.
    pub fn look(&mut self, no: NodeNo) -> Verdict {
        let Some(run) = self.nodes[no - 1].run.as_mut() else {
            return Ok(());
        };
        let mut notes = Vec::new();
        if let Some(fault) = run.groups.faults().first() {
            return Err(broken("a replica goes on", format!("node {no}: {fault:?}")));
        }
        let store_id = run.store.identity().store_id;
        for group in run.groups.all() {
            self.invariants.one_owner.runs(group.replica, store_id)?;
            let status = group.status();
            let now = Seen {
                term: status.term,
                leader: status.leader,
                leads: status.is_leader,
                applied: status.last_applied.map_or(0, |i| i.get()),
                last: status.last_log,
            };
            let before = run.seen.get(&group.id).cloned().unwrap_or_default();
            if now == before {
                continue;
            }
            if (before.term, before.leader, before.leads) != (now.term, now.leader, now.leads) {
                let leads = if now.leads { " leads" } else { "" };
                let leader = now.leader.map_or(0, |l| l.get());
                notes.push(format!(
                    "n{no} {} {} {}: {leader}{leads}",
                    group.id, group.replica, now.term
                ));
            }
            let term_of = |index: u64| match group.log().id_at(index) {
                Ok(id) => Some((id.leader_id.term, id.leader_id.node_id)),
                Err(_) if group.log().purged().is_some_and(|p| p.index >= index) => Some(PURGED),
                Err(_) => None,
            };
            if now.leads {
                let id = (now.term, now.leader.unwrap_or_default());
                self.invariants.one_leader.leads(group.id, id, group.replica)?;
                if (before.term, before.leads) != (now.term, true) {
                    let stays = &self.invariants.acked_stays;
                    let in_term = (now.term.get(), group.replica.get());
                    stays.leads(group.id, group.replica, in_term, term_of)?;
                }
            }
            if now.applied > before.applied {
                notes.push(format!("n{no} {} {} applied #{}", group.id, group.replica, now.applied));
                for index in before.applied + 1..=now.applied {
                    if let Some(term) = term_of(index).filter(|t| *t != PURGED) {
                        self.invariants
                            .log_matching
                            .applied(group.id, index, term, group.replica)?;
                    }
                }
            }
            run.seen.insert(group.id, now);
        }
        let state = run.store.state();
        let mut changed = false;
        for group in run.groups.all() {
            // Of the state itself: it is ahead of what the replica says of itself.
            let applied = state.applied_index(group.id).unwrap_or_default();
            let known = run.applied.insert(group.id, applied);
            let before = known.unwrap_or_default();
            if applied <= before {
                continue;
            }
            // A log is never purged beyond what is applied: it came otherwise.
            if known.is_some() && group.log().purged().is_some_and(|id| id.index > before.get()) {
                notes.push(format!("n{no} {} {} has a snapshot", group.id, group.replica));
                self.snapshots += 1;
            }
            changed = true;
            let own = |id| state.applied_index(id).map_or(0, LogIndex::get);
            for (index, command) in commands(&group, before.next(), applied) {
                let held = &mut self.invariants.seal_before_adopt;
                held.applied(group.id, index, &command, group.replica, own)?;
            }
        }
        if changed {
            let shards = state
                .shards()
                .map_err(|e| broken("state can be read", format!("node {no}: {e}")))?;
            for (shard, group, record) in shards {
                let record = pb::ShardRecord::decode(record).expect("a record can be read");
                let applied = state.applied_index(group).map_or(0, LogIndex::get);
                let held = &mut self.invariants.seal_before_adopt;
                held.holds(shard, group, &record, &format!("node {no}"), applied)?;
            }
        }
        let mut shared = run.groups.directory().all();
        shared.sort_by_key(|s| s.shard);
        for shard in shared {
            let positions = shard.positions();
            let next = run.next.entry(shard.shard).or_insert(Sequence::FIRST);
            if positions.tail <= *next {
                continue;
            }
            let Some(group) = run.groups.get(shard.group()) else {
                continue;
            };
            let found = run
                .store
                .state()
                .read_batches(shard.shard, *next, usize::MAX)
                .map_err(|e| broken("state can be read", format!("node {no}: {e}")))?;
            for batch in found {
                self.invariants.dense.shows(shard.shard, *next, &batch, group.replica)?;
                *next = batch.end();
            }
            if *next < positions.tail {
                return Err(broken(
                    "sequences are dense",
                    format!(
                        "node {no} has the tail {} of {}, but batches up to {next}",
                        positions.tail, shard.shard
                    ),
                ));
            }
        }
        for note in notes {
            self.note(format_args!("{note}"));
        }
        Ok(())
    }

    /// A group's log on a node's disk, by index.
    fn log_of(&self, no: NodeNo, group: GroupId) -> Option<BTreeMap<u64, Entry>> {
        let store = &self.nodes[no - 1].run.as_ref()?.store;
        let meta = store.log().meta(group).ok()?;
        let (first, last) = (meta.first?, meta.last?);
        let entries = store.log().read(group, first, last.next(), usize::MAX).ok()?;
        let digest = |raw: &[u8]| {
            raw.iter().fold(0xCBF2_9CE4_8422_2325u64, |h, b| {
                (h ^ u64::from(*b)).wrapping_mul(0x0100_0000_01B3)
            })
        };
        let parsed = entries.into_iter().map(|(index, raw)| {
            let entry = pb::LogEntry::decode(&raw[..]).expect("what the log holds can be read");
            let term = entry.id.map_or((0, 0), |id| (id.term, id.leader));
            (index.get(), (term, digest(&raw)))
        });
        Some(parsed.collect())
    }

    /// Holds the logs of all running replicas of each group against each other.
    pub fn compare_logs(&self) -> Verdict {
        // The planted bug begins with such a difference; what it leads to is to be found.
        if self.scene.planted == Some(Planted::LearnersCount) {
            return Ok(());
        }
        for (group, _) in &self.scene.groups {
            let logs: Vec<(ReplicaId, BTreeMap<u64, Entry>)> = (1..=self.scene.nodes)
                .filter_map(|no| Some((self.nodes[no - 1].group(*group)?.replica, self.log_of(no, *group)?)))
                .collect();
            for (at, a) in logs.iter().enumerate() {
                for b in &logs[at + 1..] {
                    self.invariants.log_matching.compare(*group, (a.0, &a.1), (b.0, &b.1))?;
                }
            }
        }
        Ok(())
    }

    /// Whether every running member of each group has applied all that its leader has.
    pub fn is_settled(&self) -> bool {
        if !self.catalog.moving.is_empty() || !self.former.is_empty() {
            return false;
        }
        self.scene.groups.iter().all(|(group, _)| {
            let Some(leader) = self.leader(*group).and_then(|no| self.nodes[no - 1].group(*group)) else {
                return false;
            };
            let (goal, members) = (leader.status(), leader.members());
            goal.last_applied == goal.last_log
                && !members.joint
                && members.voters.iter().chain(&members.learners).all(|replica| {
                    let found = self.places.get(replica).and_then(|no| self.nodes[no - 1].group(*group));
                    found.is_some_and(|found| {
                        let status = found.status();
                        found.replica == *replica
                            && status.last_applied == goal.last_applied
                            && status.term == goal.term
                    })
                })
        })
    }

    /// What every member holds in the end.
    pub fn compare_states(&self) -> Verdict {
        for (group, _) in &self.scene.groups {
            let Some(leader) = self.leader(*group).and_then(|no| self.nodes[no - 1].group(*group)) else {
                return Err(broken("a group has a leader in the end", group.to_string()));
            };
            let members = leader.members();
            let mut first: Option<(ReplicaId, Vec<u8>)> = None;
            for replica in members.voters.iter().chain(&members.learners) {
                let Some(run) = self.places.get(replica).and_then(|no| self.nodes[no - 1].run.as_ref()) else {
                    continue;
                };
                let export = export(&run.store, *group);
                match &first {
                    None => first = Some((*replica, export)),
                    Some((other, bytes)) if *bytes != export => {
                        let what = format!(
                            "{other} and {replica} of {group}: {} and {} bytes",
                            bytes.len(),
                            export.len()
                        );
                        return Err(broken("replicas hold the same bytes", what));
                    }
                    Some(_) => {}
                }
                for shared in run.groups.directory().all().into_iter().filter(|s| s.group() == *group) {
                    let found = tokens(&run.store, shared.shard);
                    self.invariants.acked_stays.holds(shared.shard, *replica, &found)?;
                }
            }
        }
        Ok(())
    }
}

/// The commands that a replica's log has between these two, both inclusive: also those that it has not synced yet.
fn commands(group: &Group, from: LogIndex, to: LogIndex) -> Vec<(u64, pb::GroupCommand)> {
    let mut log = group.log().clone();
    let entries = log.try_get_log_entries(from.get()..to.get() + 1).now_or_never();
    let entries = entries.expect("it reads at once").expect("the log can be read");
    let mut found = Vec::new();
    for entry in entries {
        if let EntryPayload::Normal(proposal) = entry.payload {
            let command = pb::GroupCommand::decode(proposal.0).expect("a command can be read");
            found.push((entry.log_id.index, command));
        }
    }
    found
}

/// Everything a group's state holds.
fn export(store: &Store, group: GroupId) -> Vec<u8> {
    let mut out = Vec::new();
    let sink = |chunk: bytes::Bytes| {
        out.extend_from_slice(&chunk);
        true
    };
    store.state().export_group(group, sink).expect("state can be read");
    out
}

/// Where each message is.
fn tokens(store: &Store, shard: ShardId) -> BTreeMap<u64, Vec<Sequence>> {
    let mut found: BTreeMap<u64, Vec<Sequence>> = BTreeMap::new();
    for batch in store.state().batches(shard, Sequence::FIRST) {
        let batch = batch.expect("state can be read");
        if let Some(token) = token_of(&batch.batch) {
            found.entry(token).or_default().push(batch.base);
        }
    }
    found
}
