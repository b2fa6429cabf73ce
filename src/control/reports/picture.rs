//! What the catalog says there shall be, held against what nodes say there is. Pure.

use std::collections::{BTreeMap, HashMap};

use super::{ACK_FRESH, CURRENT_LAG_MAX, Gathered, micros};
use crate::model::{GroupId, NodeId, ReplicaId};
use crate::wire::internal::{self as pb, ReplicaRole};
use crate::wire::v1;

/// How long a transfer must have run before its rate means something.
const RATE_AFTER_US: u64 = 200_000;

/// The reports, by group.
pub struct Picture<'a> {
    gathered: &'a Gathered,
    /// Every replica of each group that answered, and where it runs.
    groups: HashMap<GroupId, Vec<(NodeId, &'a pb::GroupState)>>,
    /// Snapshots on their way, by the replica that gets them.
    transfers: HashMap<u64, &'a pb::TransferState>,
}

/// The catalog's own group, in the form of the others.
pub fn meta_record(cluster: &pb::ClusterRecord, nodes: &[pb::NodeRecord]) -> pb::GroupRecord {
    let meta = cluster.meta.clone().unwrap_or_default();
    let known = !meta.voters.is_empty();
    let replicas: Vec<_> = nodes
        .iter()
        .filter(|node| node.state() != pb::NodeState::Removed)
        // A cluster from before there could be several nodes has one replica of it, the first.
        .map(|node| (node, if known { node.meta_replica_id } else { 1 }))
        .filter(|(_, replica)| *replica != 0)
        .map(|(node, replica)| pb::ReplicaRecord {
            replica_id: replica,
            node_id: node.node_id,
            role: match !known || meta.voters.contains(&replica) {
                true => ReplicaRole::Voter,
                false => ReplicaRole::Learner,
            }
            .into(),
            ..pb::ReplicaRecord::default()
        })
        .collect();
    pb::GroupRecord {
        group_id: GroupId::META.get(),
        formed: true,
        epoch: meta.epoch,
        replica_count: if known { meta.voters.len() as u32 } else { 1 },
        replicas,
        ..pb::GroupRecord::default()
    }
}

impl<'a> Picture<'a> {
    /// Sorts the reports.
    pub fn of(gathered: &'a Gathered) -> Self {
        let mut groups: HashMap<GroupId, Vec<_>> = HashMap::new();
        let mut transfers = HashMap::new();
        for (node, report) in &gathered.reports {
            for state in &report.groups {
                groups
                    .entry(GroupId::new(state.group_id))
                    .or_default()
                    .push((*node, state));
            }
            transfers.extend(report.transfers.iter().map(|t| (t.to_replica, t)));
        }
        Self {
            gathered,
            groups,
            transfers,
        }
    }

    /// Replicas of a group that answered.
    fn states(&self, group: GroupId) -> &[(NodeId, &'a pb::GroupState)] {
        self.groups.get(&group).map_or(&[], Vec::as_slice)
    }

    /// Who leads a group. Of two that think so, the one of the later vote does: the other was cut off, or slept. Votes of
    /// one term are ordered by the replica that stood for it.
    pub fn leader(&self, group: GroupId) -> Option<(NodeId, &'a pb::GroupState)> {
        let leading = self.states(group).iter().filter(|(_, state)| state.is_leader);
        leading.max_by_key(|(_, state)| (state.term, state.replica_id)).copied()
    }

    /// Every group that is led, with what its leader says.
    pub fn leaders(&self) -> BTreeMap<GroupId, &'a pb::GroupState> {
        let led = self.groups.keys();
        led.filter_map(|id| Some((*id, self.leader(*id)?.1))).collect()
    }

    /// A shard as the leader of its group has it, or else the replica that is furthest.
    pub fn shard(&self, group: GroupId, shard: u64) -> Option<&'a pb::ShardState> {
        let find = |state: &'a pb::GroupState| state.shards.iter().find(|s| s.shard_id == shard);
        if let Some(found) = self.leader(group).and_then(|(_, state)| find(state)) {
            return Some(found);
        }
        let known = self.states(group).iter().filter_map(|(_, state)| find(state));
        known.max_by_key(|s| s.tail)
    }

    /// When the node of a report answered, so long ago by that node's own measure.
    fn at(&self, node: NodeId, ago_us: u64) -> Option<u64> {
        let report = self.gathered.reports.get(&node)?;
        Some(report.time_us.saturating_sub(ago_us))
    }

    /// How a group stands. `name` and `heard` tell what is known of a node.
    pub fn group(
        &self,
        record: &pb::GroupRecord,
        name: &dyn Fn(NodeId) -> String,
        heard: &dyn Fn(NodeId) -> Option<u64>,
    ) -> v1::GroupReport {
        let id = GroupId::new(record.group_id);
        let leader = self.leader(id);
        let states = self.states(id);
        let mut report = v1::GroupReport {
            group_id: record.group_id,
            pooled: record.pooled,
            shards: record.shards,
            leader_node: leader.map(|(node, _)| node.get()),
            leader_replica: leader.map(|(_, state)| state.replica_id),
            term: states.iter().map(|(_, state)| state.term).max().unwrap_or(0),
            leader_since_us: leader.map(|(_, state)| state.leader_since_us),
            leaderless: leader.is_none() && !record.replicas.is_empty(),
            replicas_wanted: match record.replica_count {
                0 => record.replicas.len() as u32,
                count => count,
            },
            formed: record.formed,
            epoch: record.epoch,
            last_quorum_ack_us: leader.and_then(|(node, state)| self.at(node, state.quorum_ack_ago_us?)),
            bytes: leader.map_or(0, |(_, state)| state.shards.iter().map(|s| s.bytes).sum()),
            ..v1::GroupReport::default()
        };
        let mut current = 0;
        for replica in &record.replicas {
            let told = self.replica(record, replica, leader, name, heard);
            if told.voter {
                report.voters += 1;
                current += u32::from(told.state() == v1::ReplicaState::Current);
                report.quorum_have += u32::from(self.counts(&told, leader.is_some()));
            } else {
                report.learners += 1;
            }
            report.replicas.push(told);
        }
        report
            .replicas
            .sort_by_key(|replica| (!replica.leader, replica.node_id));
        report.quorum_need = report.voters / 2 + 1;
        report.under_replicated = !record.replicas.is_empty() && current < report.replicas_wanted;
        report.change = record
            .change
            .as_ref()
            .map(|change| self.change(record, change, &report, name));
        report
    }

    /// Whether a voter counts for the quorum there is.
    fn counts(&self, replica: &v1::ReplicaReport, led: bool) -> bool {
        match replica.state() {
            v1::ReplicaState::Current | v1::ReplicaState::Waiting => true,
            v1::ReplicaState::Lagging => {
                let fresh = self.gathered.time_us.saturating_sub(micros(ACK_FRESH));
                !led || replica.last_ack_us.is_some_and(|at| at >= fresh)
            }
            v1::ReplicaState::Unspecified
            | v1::ReplicaState::Offline
            | v1::ReplicaState::Damaged
            | v1::ReplicaState::NotRunning => false,
        }
    }

    fn replica(
        &self,
        record: &pb::GroupRecord,
        replica: &pb::ReplicaRecord,
        leader: Option<(NodeId, &pb::GroupState)>,
        name: &dyn Fn(NodeId) -> String,
        heard: &dyn Fn(NodeId) -> Option<u64>,
    ) -> v1::ReplicaReport {
        let node = NodeId::new(replica.node_id);
        let follower = leader.and_then(|(at, state)| {
            let found = state.followers.iter().find(|f| f.replica_id == replica.replica_id)?;
            Some((at, found))
        });
        let leads = leader.is_some_and(|(_, state)| state.replica_id == replica.replica_id);
        let mut told = v1::ReplicaReport {
            replica_id: replica.replica_id,
            node_id: replica.node_id,
            node_name: name(node),
            leader: leads,
            voter: match leader {
                Some((_, state)) => state.voters.contains(&replica.replica_id),
                None => replica.role() == ReplicaRole::Voter,
            },
            lag_entries: follower.map(|(_, f)| f.lag),
            last_ack_us: follower.and_then(|(at, f)| self.at(at, f.ack_ago_us?)),
            lag_bytes: follower.map(|(_, f)| f.lag_bytes),
            lag_us: follower.map(|(_, f)| f.lag_us),
            ..v1::ReplicaReport::default()
        };
        if let Some(transfer) = self.transfers.get(&replica.replica_id) {
            told.snapshot_bytes = Some(transfer.sent_bytes);
            // An estimate: what is sent beyond it is not less than nothing.
            told.snapshot_total_bytes = Some(transfer.total_bytes)
                .filter(|total| *total > 0)
                .map(|total| total.max(transfer.sent_bytes));
            told.snapshot_bytes_per_second = rate(transfer.sent_bytes, transfer.running_us);
        }
        let fresh = |ago: Option<u64>| ago.is_some_and(|ago| ago <= micros(ACK_FRESH));
        let state = match self.gathered.reports.get(&node) {
            // Not asked: its leader knows.
            None if self.gathered.partial && !self.gathered.silent.contains_key(&node) => match follower {
                Some((_, f)) if fresh(f.ack_ago_us) => lag_state(f.lag),
                Some(_) => v1::ReplicaState::Offline,
                None => v1::ReplicaState::Unspecified,
            },
            None => v1::ReplicaState::Offline,
            Some(report) if report.alarms.iter().any(|alarm| alarm == "damaged") => v1::ReplicaState::Damaged,
            Some(report) => {
                let runs = |state: &&pb::GroupState| {
                    state.group_id == record.group_id && state.replica_id == replica.replica_id
                };
                match (report.groups.iter().find(runs), follower) {
                    (None, _) => v1::ReplicaState::NotRunning,
                    (Some(_), _) if leads => v1::ReplicaState::Current,
                    (Some(_), Some((_, f))) if fresh(f.ack_ago_us) => lag_state(f.lag),
                    (Some(_), _) if leader.is_some() => v1::ReplicaState::Lagging,
                    (Some(_), _) => v1::ReplicaState::Waiting,
                }
            }
        };
        told.set_state(state);
        if state == v1::ReplicaState::Offline {
            told.offline_since_us = heard(node);
        }
        told
    }

    fn change(
        &self,
        record: &pb::GroupRecord,
        change: &pb::ReplicaChange,
        report: &v1::GroupReport,
        name: &dyn Fn(NodeId) -> String,
    ) -> v1::ReplicaChangeReport {
        let node_of = |id: &u64| {
            let known = record.replicas.iter().chain(&record.removed);
            known.filter(|r| r.replica_id == *id).map(|r| r.node_id).next()
        };
        let mut waits = Vec::new();
        let added = || report.replicas.iter().filter(|r| change.add.contains(&r.replica_id));
        let left: Option<Vec<u64>> = added().map(bytes_left).collect();
        let speeds: Vec<u64> = added().filter_map(|r| r.snapshot_bytes_per_second).collect();
        if report.leaderless {
            waits.push("the group has no leader".to_owned());
        } else if report.quorum_have < report.quorum_need {
            waits.push(format!(
                "{} of {} voters answer",
                report.quorum_have, report.quorum_need
            ));
        }
        for replica in added() {
            let at = format!("{} on {}", ReplicaId::new(replica.replica_id), replica.node_name);
            match (replica.state(), replica.lag_entries) {
                (v1::ReplicaState::Current, _) => {}
                (v1::ReplicaState::Lagging | v1::ReplicaState::Waiting, _) if replica.snapshot_bytes.is_some() => {
                    waits.push(format!("{at} is getting a snapshot"));
                }
                (v1::ReplicaState::Lagging, Some(lag)) => waits.push(format!("{at} is {lag} entries behind")),
                (v1::ReplicaState::Lagging | v1::ReplicaState::Waiting | v1::ReplicaState::Unspecified, _) => {
                    waits.push(format!("{at} has not answered the leader yet"));
                }
                (v1::ReplicaState::Offline, _) => waits.push(format!(
                    "{at}: node {} does not answer",
                    name(NodeId::new(replica.node_id))
                )),
                (v1::ReplicaState::Damaged, _) => waits.push(format!("{at} is damaged")),
                (v1::ReplicaState::NotRunning, _) => waits.push(format!("{at} has not started yet")),
            }
        }
        v1::ReplicaChangeReport {
            reason: change_reason(change.reason()).into(),
            why: change.why.clone(),
            started_us: change.started_us,
            add_nodes: change.add.iter().filter_map(node_of).collect(),
            remove_nodes: change.remove.iter().filter_map(node_of).collect(),
            waiting_for: waits.join("; "),
            ready: change.ready,
            bytes_left: left.map(|left| left.iter().sum()),
            bytes_per_second: (!speeds.is_empty()).then(|| speeds.iter().sum()),
        }
    }
}

/// Bytes in a second; nothing is told of the first moments.
fn rate(bytes: u64, running_us: u64) -> Option<u64> {
    let rate = u128::from(bytes) * 1_000_000 / u128::from(running_us.max(1));
    (running_us >= RATE_AFTER_US).then(|| u64::try_from(rate).unwrap_or(u64::MAX))
}

/// What a replica has yet to get; `None`: not known.
fn bytes_left(replica: &v1::ReplicaReport) -> Option<u64> {
    match replica.snapshot_bytes {
        Some(sent) => Some(replica.snapshot_total_bytes?.saturating_sub(sent)),
        None => replica.lag_bytes,
    }
}

fn lag_state(lag: u64) -> v1::ReplicaState {
    if lag <= CURRENT_LAG_MAX {
        v1::ReplicaState::Current
    } else {
        v1::ReplicaState::Lagging
    }
}

fn change_reason(reason: pb::ChangeReason) -> v1::ReplicaChangeReason {
    match reason {
        pb::ChangeReason::Unspecified => v1::ReplicaChangeReason::Unspecified,
        pb::ChangeReason::Heal => v1::ReplicaChangeReason::Heal,
        pb::ChangeReason::Scale => v1::ReplicaChangeReason::Scale,
        pb::ChangeReason::Drain => v1::ReplicaChangeReason::Drain,
        pb::ChangeReason::Move => v1::ReplicaChangeReason::Move,
        pb::ChangeReason::Balance => v1::ReplicaChangeReason::Balance,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use v1::ReplicaState as State;

    /// Three voters on n1, n2, n3; n1 leads.
    fn group() -> pb::GroupRecord {
        let replica = |id: u64| pb::ReplicaRecord {
            replica_id: 10 + id,
            node_id: id,
            ..pb::ReplicaRecord::default()
        };
        pb::GroupRecord {
            group_id: 7,
            formed: true,
            replica_count: 3,
            shards: 1,
            replicas: (1..=3).map(replica).collect(),
            ..pb::GroupRecord::default()
        }
    }

    fn state(replica: u64, term: u64, leads: bool, followers: &[(u64, u64, Option<u64>)]) -> pb::GroupState {
        pb::GroupState {
            group_id: 7,
            replica_id: replica,
            term,
            is_leader: leads,
            voters: vec![11, 12, 13],
            quorum_ack_ago_us: leads.then_some(5_000),
            followers: followers
                .iter()
                .map(|(id, lag, ack)| pb::FollowerState {
                    replica_id: *id,
                    voter: true,
                    lag: *lag,
                    ack_ago_us: *ack,
                    lag_bytes: 100 * lag,
                    lag_us: 1_000 * lag,
                    ..pb::FollowerState::default()
                })
                .collect(),
            ..pb::GroupState::default()
        }
    }

    fn gathered(states: Vec<(u64, Option<pb::GroupState>)>, silent: &[u64]) -> Gathered {
        let report = |(node, state): (u64, Option<pb::GroupState>)| {
            let report = pb::NodeReport {
                node_id: node,
                time_us: 1_000_000_000,
                groups: state.into_iter().collect(),
                ..pb::NodeReport::default()
            };
            (NodeId::new(node), report)
        };
        Gathered {
            time_us: 1_000_000_000,
            by: NodeId::new(1),
            reports: states.into_iter().map(report).collect(),
            silent: silent.iter().map(|n| (NodeId::new(*n), "down".into())).collect(),
            partial: false,
        }
    }

    fn told(record: &pb::GroupRecord, gathered: &Gathered) -> v1::GroupReport {
        let name = |node: NodeId| format!("{node}");
        Picture::of(gathered).group(record, &name, &|_| Some(42))
    }

    fn states(report: &v1::GroupReport) -> Vec<(u64, State)> {
        report.replicas.iter().map(|r| (r.node_id, r.state())).collect()
    }

    #[test]
    fn all_is_well() {
        let leader = state(11, 3, true, &[(11, 0, Some(0)), (12, 2, Some(9)), (13, 0, Some(9))]);
        let all = gathered(
            vec![
                (1, Some(leader)),
                (2, Some(state(12, 3, false, &[]))),
                (3, Some(state(13, 3, false, &[]))),
            ],
            &[],
        );
        let report = told(&group(), &all);
        assert_eq!(
            states(&report),
            [(1, State::Current), (2, State::Current), (3, State::Current)]
        );
        assert_eq!((report.leader_node, report.term), (Some(1), 3));
        assert_eq!((report.quorum_have, report.quorum_need), (3, 2));
        assert_eq!(report.last_quorum_ack_us, Some(999_995_000));
        assert!(!report.leaderless && !report.under_replicated);
    }

    #[test]
    fn one_is_gone_and_one_lags() {
        let followers = [(11, 0, Some(0)), (12, 9_000, Some(9)), (13, 70_000, Some(60_000_000))];
        let all = gathered(
            vec![
                (1, Some(state(11, 3, true, &followers))),
                (2, Some(state(12, 3, false, &[]))),
            ],
            &[3],
        );
        let report = told(&group(), &all);
        assert_eq!(
            states(&report),
            [(1, State::Current), (2, State::Lagging), (3, State::Offline)]
        );
        // One that lags answers all the same.
        assert_eq!((report.quorum_have, report.quorum_need), (2, 2));
        assert_eq!(report.replicas[2].offline_since_us, Some(42));
        let lag = &report.replicas[1];
        assert_eq!(
            (lag.lag_entries, lag.lag_bytes, lag.lag_us),
            (Some(9_000), Some(900_000), Some(9_000_000))
        );
        assert!(report.under_replicated && !report.leaderless);
    }

    #[test]
    fn nobody_leads() {
        let all = gathered(vec![(2, Some(state(12, 4, false, &[]))), (3, None)], &[1]);
        let report = told(&group(), &all);
        assert_eq!(
            states(&report),
            [(1, State::Offline), (2, State::Waiting), (3, State::NotRunning)]
        );
        assert_eq!((report.quorum_have, report.quorum_need), (1, 2));
        assert!(report.leaderless && report.leader_node.is_none());
    }

    /// One that was cut off does not know that another leads.
    #[test]
    fn the_later_term_counts() {
        let all = gathered(
            vec![
                (1, Some(state(11, 3, true, &[(11, 0, Some(0))]))),
                (2, Some(state(12, 5, true, &[(12, 0, Some(0)), (13, 0, Some(1))]))),
                (3, Some(state(13, 5, false, &[]))),
            ],
            &[],
        );
        let report = told(&group(), &all);
        assert_eq!(report.leader_node, Some(2));
        assert_eq!(report.replicas[0].node_id, 2, "the leader comes first");
        assert_eq!((report.quorum_have, report.term), (2, 5));
        let of_one_term = gathered(
            vec![
                (1, Some(state(11, 5, true, &[(11, 0, Some(0))]))),
                (2, Some(state(12, 5, true, &[(12, 0, Some(0)), (13, 0, Some(1))]))),
                (3, Some(state(13, 5, false, &[]))),
            ],
            &[],
        );
        assert_eq!(told(&group(), &of_one_term).leader_node, Some(2));
    }

    #[test]
    fn the_catalogs_group_of_one_node() {
        let node = pb::NodeRecord {
            node_id: 1,
            ..pb::NodeRecord::default()
        };
        let record = meta_record(&pb::ClusterRecord::default(), &[node]);
        assert_eq!(record.replicas.len(), 1);
        assert_eq!((record.replicas[0].replica_id, record.replica_count), (1, 1));
    }

    #[test]
    fn a_change_says_what_it_waits_for() {
        let mut record = group();
        record.replicas.push(pb::ReplicaRecord {
            replica_id: 14,
            node_id: 4,
            role: ReplicaRole::Learner.into(),
            ..pb::ReplicaRecord::default()
        });
        record.change = Some(pb::ReplicaChange {
            reason: pb::ChangeReason::Drain.into(),
            add: vec![14],
            remove: vec![13],
            ..pb::ReplicaChange::default()
        });
        let followers = [
            (11, 0, Some(0)),
            (12, 0, Some(9)),
            (13, 0, Some(9)),
            (14, 5_000, Some(9)),
        ];
        let all = gathered(
            vec![
                (1, Some(state(11, 3, true, &followers))),
                (2, Some(state(12, 3, false, &[]))),
                (3, Some(state(13, 3, false, &[]))),
                (4, Some(state(14, 3, false, &[]))),
            ],
            &[],
        );
        let report = told(&record, &all);
        let change = report.change.unwrap();
        assert_eq!(change.waiting_for, "r14 on n4 is 5000 entries behind");
        assert_eq!((change.add_nodes, change.remove_nodes), (vec![4], vec![3]));
        assert_eq!((change.bytes_left, change.bytes_per_second), (Some(500_000), None));
        // What is on its way as a snapshot is told by that.
        let mut all = all;
        let transfer = pb::TransferState {
            group_id: 7,
            to_replica: 14,
            sent_bytes: 30 << 20,
            running_us: 2_000_000,
            total_bytes: 100 << 20,
        };
        all.reports.get_mut(&NodeId::new(1)).unwrap().transfers = vec![transfer];
        let report = told(&record, &all);
        let change = report.change.unwrap();
        assert_eq!(change.waiting_for, "r14 on n4 is getting a snapshot");
        assert_eq!(
            (change.bytes_left, change.bytes_per_second),
            (Some(70 << 20), Some(15 << 20))
        );
        assert_eq!((report.voters, report.learners), (3, 1));
    }
}
