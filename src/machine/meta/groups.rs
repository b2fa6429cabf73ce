//! Groups: formed, and their replicas changed. One change at a time: learners come, catch up, one joint change makes
//! them voters and removes others. See docs/decisions/0004.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::{MetaMachine, MetaOutcome, MetaRefusal};
use crate::machine::placement::voters_of;
use crate::machine::port::ShardSink;
use crate::model::limits::REPLICAS_MAX;
use crate::model::{GroupId, NodeId};
use crate::wire::internal::v1::{self as pb, ChangeReason, NodeState, ReplicaRole};

type Outcome = Result<MetaOutcome, MetaRefusal>;

fn bad(why: impl Into<String>) -> MetaRefusal {
    MetaRefusal::BadChange { why: why.into() }
}

fn set(ids: &[u64]) -> BTreeSet<u64> {
    ids.iter().copied().collect()
}

fn voters(group: &pb::GroupRecord) -> BTreeSet<u64> {
    voters_of(group).map(|replica| replica.replica_id).collect()
}

fn text(ids: &BTreeSet<u64>) -> String {
    let ids: Vec<String> = ids.iter().map(|id| format!("r{id}")).collect();
    ids.join(" ")
}

impl MetaMachine {
    pub(super) fn known_group(&self, group_id: u64) -> Result<pb::GroupRecord, MetaRefusal> {
        match self.groups.get(&GroupId::new(group_id)) {
            Some(group) => Ok(pb::GroupRecord::clone(group)),
            None => Err(MetaRefusal::GroupNotFound { group_id }),
        }
    }

    fn changed_group(&mut self, sink: &mut dyn ShardSink, group: pb::GroupRecord) -> MetaOutcome {
        let id = GroupId::new(group.group_id);
        self.put_group(sink, group);
        self.raise_revision(sink);
        MetaOutcome::GroupChanged(self.groups[&id].clone())
    }

    pub(super) fn group_formed(&mut self, sink: &mut dyn ShardSink, formed: &pb::GroupFormed) -> Outcome {
        let mut group = self.known_group(formed.group_id)?;
        let membership = formed
            .membership
            .as_ref()
            .ok_or_else(|| bad("there is no membership"))?;
        if group.formed {
            return Ok(MetaOutcome::GroupChanged(Arc::new(group)));
        }
        let (found, expected) = (set(&membership.voters), voters(&group));
        if found != expected || expected.is_empty() {
            return Err(bad(format!(
                "its voters are {}, and should be {}",
                text(&found),
                text(&expected)
            )));
        }
        group.formed = true;
        group.membership_index = membership.index;
        Ok(self.changed_group(sink, group))
    }

    pub(super) fn plan_replica_change(
        &mut self,
        sink: &mut dyn ShardSink,
        time_us: u64,
        plan: &pb::PlanReplicaChange,
    ) -> Outcome {
        let mut group = self.known_group(plan.group_id)?;
        let Some(cluster) = &self.cluster else {
            return Err(MetaRefusal::NotInitialised);
        };
        let mut cluster = pb::ClusterRecord::clone(cluster);
        let id = plan.group_id;
        if group.epoch != plan.base_epoch {
            return Err(stale(&group));
        }
        if let Some(change) = &group.change {
            return Err(MetaRefusal::InFlight {
                what: format!("group {id} has a change under way (epoch {})", change.epoch),
            });
        }
        if !group.formed {
            return Err(MetaRefusal::InFlight {
                what: format!("group {id} is not formed yet"),
            });
        }
        if let Some(shard) = self.move_of(GroupId::new(id)) {
            return Err(MetaRefusal::InFlight {
                what: format!("shard {shard} is moved from or to group {id}"),
            });
        }
        let remove = set(&plan.remove_replicas);
        let add: BTreeSet<u64> = set(&plan.add_nodes);
        let now = voters(&group);
        if let Some(unknown) = remove.difference(&now).next() {
            return Err(bad(format!("r{unknown} is no voter of group {id}")));
        }
        let after = now.len() - remove.len() + add.len();
        if (add.is_empty() && remove.is_empty()) || after == 0 || after > REPLICAS_MAX as usize {
            return Err(bad(format!(
                "group {id} would have {after} voters, {} more and {} less",
                add.len(),
                remove.len()
            )));
        }
        for node in &add {
            self.may_hold(&group, *node, &remove, plan.reason())?;
        }
        let mut added = Vec::new();
        for node_id in add {
            let replica_id = cluster.next_replica_id;
            cluster.next_replica_id += 1;
            added.push(replica_id);
            group.replicas.push(pb::ReplicaRecord {
                replica_id,
                node_id,
                role: ReplicaRole::Learner as i32,
                ..pb::ReplicaRecord::default()
            });
        }
        group.epoch += 1;
        group.change = Some(pb::ReplicaChange {
            epoch: group.epoch,
            reason: plan.reason,
            why: plan.why.clone(),
            ready: added.is_empty(),
            add: added,
            remove: remove.into_iter().collect(),
            started_us: time_us,
        });
        let id = GroupId::new(group.group_id);
        self.put_group(sink, group);
        self.put_cluster(sink, cluster);
        Ok(MetaOutcome::GroupChanged(self.groups[&id].clone()))
    }

    /// Whether a node may take a new replica of the group.
    fn may_hold(
        &self,
        group: &pb::GroupRecord,
        node_id: u64,
        remove: &BTreeSet<u64>,
        reason: ChangeReason,
    ) -> Result<(), MetaRefusal> {
        let id = group.group_id;
        match self.nodes.get(&NodeId::new(node_id)) {
            None => return Err(MetaRefusal::NodeNotFound { node_id }),
            Some(node) if node.state() != NodeState::Active => {
                return Err(bad(format!("node {} is not active", node.name)));
            }
            Some(_) => {}
        }
        let holder = group.replicas.iter().find(|replica| replica.node_id == node_id);
        if let Some(replica) = holder {
            // One that is damaged never runs again: its successor may be on the same node, over the data set aside.
            let succeeds = reason == ChangeReason::Heal && remove.contains(&replica.replica_id);
            if !succeeds {
                return Err(bad(format!(
                    "n{node_id} holds r{} of group {id} already",
                    replica.replica_id
                )));
            }
        }
        // Its data is under the same keys as the new one's would be.
        if let Some(replica) = group.removed.iter().find(|replica| replica.node_id == node_id) {
            return Err(MetaRefusal::InFlight {
                what: format!(
                    "n{node_id} has not yet set aside its former replica r{} of group {id}",
                    replica.replica_id
                ),
            });
        }
        Ok(())
    }

    pub(super) fn replica_caught_up(&mut self, sink: &mut dyn ShardSink, report: &pb::ReplicaCaughtUp) -> Outcome {
        let mut group = self.known_group(report.group_id)?;
        let change = match &group.change {
            Some(change) if change.epoch == report.epoch => change.clone(),
            Some(_) | None => return Err(stale(&group)),
        };
        let replica = group
            .replicas
            .iter_mut()
            .find(|replica| replica.replica_id == report.replica_id && change.add.contains(&replica.replica_id))
            .ok_or_else(|| bad(format!("r{} is not part of the change", report.replica_id)))?;
        if replica.caught_up {
            return Ok(MetaOutcome::GroupChanged(Arc::new(group)));
        }
        replica.caught_up = true;
        let ready = group
            .replicas
            .iter()
            .filter(|replica| change.add.contains(&replica.replica_id))
            .all(|replica| replica.caught_up);
        group.change = Some(pb::ReplicaChange { ready, ..change });
        Ok(self.changed_group(sink, group))
    }

    pub(super) fn change_committed(
        &mut self,
        sink: &mut dyn ShardSink,
        time_us: u64,
        report: &pb::ChangeCommitted,
    ) -> Outcome {
        let mut group = self.known_group(report.group_id)?;
        let change = match group.change.take() {
            Some(change) if change.epoch == report.epoch => change,
            Some(_) | None => return Err(stale(&group)),
        };
        let membership = report
            .membership
            .as_ref()
            .ok_or_else(|| bad("there is no membership"))?;
        if !change.ready {
            return Err(bad("not every new replica has caught up"));
        }
        fresh(&group, membership)?;
        let mut expected = voters(&group);
        expected.extend(&change.add);
        expected.retain(|id| !change.remove.contains(id));
        let found = set(&membership.voters);
        if found != expected {
            return Err(bad(format!(
                "its voters are {}, and should be {}",
                text(&found),
                text(&expected)
            )));
        }
        for replica in &mut group.replicas {
            if change.add.contains(&replica.replica_id) {
                replica.role = ReplicaRole::Voter as i32;
                replica.caught_up = false;
            }
        }
        group.membership_index = membership.index;
        self.bury(&mut group, &change.remove, time_us);
        group.epoch += 1;
        Ok(self.changed_group(sink, group))
    }

    pub(super) fn abort_change(&mut self, sink: &mut dyn ShardSink, time_us: u64, abort: &pb::AbortChange) -> Outcome {
        let mut group = self.known_group(abort.group_id)?;
        let change = match group.change.take() {
            Some(change) if change.epoch == abort.epoch => change,
            Some(_) | None => return Err(stale(&group)),
        };
        if change.ready {
            let Some(membership) = &abort.membership else {
                return Err(MetaRefusal::InFlight {
                    what: format!(
                        "group {} may have committed its joint change: only its leader can tell",
                        group.group_id
                    ),
                });
            };
            fresh(&group, membership)?;
            // An entry later than any joint change that an earlier leader may have left behind; and without the learners no
            // leader, however late, can make voters of them.
            let unchanged = set(&membership.voters) == voters(&group);
            let learners_gone = !membership.learners.iter().any(|id| change.add.contains(id));
            if !unchanged || !learners_gone {
                return Err(bad(
                    "the membership told does not show that the change cannot happen any more",
                ));
            }
            group.membership_index = membership.index;
        }
        self.bury(&mut group, &change.add, time_us);
        group.epoch += 1;
        Ok(self.changed_group(sink, group))
    }

    /// Replicas go, and are remembered until their nodes confirm it.
    fn bury(&self, group: &mut pb::GroupRecord, ids: &[u64], time_us: u64) {
        let (gone, kept) = std::mem::take(&mut group.replicas)
            .into_iter()
            .partition(|replica: &pb::ReplicaRecord| ids.contains(&replica.replica_id));
        group.replicas = kept;
        for mut replica in gone {
            let node = self.nodes.get(&NodeId::new(replica.node_id));
            // A node that was removed from the cluster will never confirm.
            if node.is_some_and(|node| node.state() != NodeState::Removed) {
                replica.removed_us = time_us;
                group.removed.push(replica);
            }
        }
    }

    pub(super) fn replica_gone(&mut self, sink: &mut dyn ShardSink, gone: &pb::ReplicaGone) -> Outcome {
        let mut group = self.known_group(gone.group_id)?;
        if group
            .replicas
            .iter()
            .any(|replica| replica.replica_id == gone.replica_id)
        {
            return Err(bad(format!("r{} is not removed", gone.replica_id)));
        }
        let before = group.removed.len();
        group.removed.retain(|replica| replica.replica_id != gone.replica_id);
        if group.removed.len() == before {
            return Ok(MetaOutcome::GroupChanged(Arc::new(group)));
        }
        Ok(self.changed_group(sink, group))
    }
}

fn stale(group: &pb::GroupRecord) -> MetaRefusal {
    MetaRefusal::StaleEpoch {
        what: format!("group {}", group.group_id),
        actual: group.epoch,
    }
}

/// A report must be newer than what is known.
fn fresh(group: &pb::GroupRecord, membership: &pb::GroupMembership) -> Result<(), MetaRefusal> {
    if membership.index <= group.membership_index {
        return Err(bad(format!(
            "the membership of log index {} is older than the one known ({})",
            membership.index, group.membership_index
        )));
    }
    Ok(())
}
