//! The catalog of a cluster of several nodes: who may join, leave and come back, one change of a group at a time, a shard
//! from group to group.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod catalog_support;
mod machine_support;

use catalog_support::{Catalog, change, membership, node, voters};
use mainstem::machine::{MetaOutcome, MetaRefusal};
use mainstem::model::GroupId;
use mainstem::wire::internal::v1::{self as pb, MoveStep, NodeState, ReplicaRole, meta_command::Op};

#[test]
fn a_node_comes_and_comes_back() {
    let mut catalog = Catalog::new(3);
    let ids: Vec<u64> = (1..=3).map(|id| catalog.node(id).meta_replica_id).collect();
    assert_eq!(ids[0], 1, "the founder's replica");
    let meta = catalog.machine.cluster().unwrap().meta.clone().unwrap();
    assert_eq!((meta.voters, meta.learners), (vec![ids[0]], ids[1..].to_vec()));
    // A restart.
    let restarted = catalog.done(Op::JoinNode(pb::JoinNode {
        incarnation: 2,
        client_address: "10.0.0.9:1".into(),
        ..node(2)
    }));
    let MetaOutcome::NodeRegistered { node: record, changed } = restarted else {
        panic!("{restarted:?}");
    };
    assert!(changed && record.restarted_us > record.registered_us);
    assert_eq!(
        (record.meta_replica_id, record.client_address.as_str()),
        (ids[1], "10.0.0.9:1")
    );
    // Refused, each with what is wrong.
    assert_eq!(
        catalog.refused(Op::JoinNode(node(2))),
        MetaRefusal::StaleIncarnation { node_id: 2, known: 2 }
    );
    let emptied = pb::JoinNode {
        store_id: "other".into(),
        incarnation: 3,
        ..node(2)
    };
    let refusal = catalog.refused(Op::JoinNode(emptied));
    assert!(matches!(refusal, MetaRefusal::OtherStore { node_id: 2, .. }));
    assert!(refusal.to_string().contains("store-2") && refusal.to_string().contains("other"));
    let copied = pb::JoinNode {
        store_id: "store-2".into(),
        ..node(4)
    };
    assert!(matches!(
        catalog.refused(Op::JoinNode(copied)),
        MetaRefusal::StoreTaken { node_id: 2, .. }
    ));
    let named = pb::JoinNode {
        name: "node-2".into(),
        ..node(4)
    };
    assert!(matches!(
        catalog.refused(Op::JoinNode(named)),
        MetaRefusal::NodeNameTaken { node_id: 2, .. }
    ));
    let zone = pb::JoinNode {
        zone: "a b".into(),
        ..node(4)
    };
    assert!(matches!(
        catalog.refused(Op::JoinNode(zone)),
        MetaRefusal::BadNode { .. }
    ));
    // A version that tells nothing of itself changes nothing that is known.
    catalog.done(Op::RegisterNode(pb::RegisterNode {
        node_id: 2,
        name: "node-2".into(),
        incarnation: 3,
        client_address: "x:1".into(),
    }));
    assert_eq!(catalog.node(2).store_id, "store-2");
    assert_eq!(catalog.node(2).peer_address, "10.0.0.2:7422");
    assert_eq!(catalog.node(2).zone, "a");
}

#[test]
fn a_node_goes_for_good() {
    let mut catalog = Catalog::new(4);
    let (_, _, group) = catalog.stream("s", 3, true);
    let holder = catalog.group(group).replicas[0].node_id;
    let remove = |node_id| pb::RemoveNode {
        node_id,
        ..pb::RemoveNode::default()
    };
    let held = catalog.refused(Op::RemoveNode(remove(holder)));
    assert!(matches!(held, MetaRefusal::NodeHoldsReplicas { .. }), "{held}");
    // By force, so long as the groups have a quorum without it.
    let others: Vec<u64> = catalog.group(group).replicas[1..].iter().map(|r| r.node_id).collect();
    let forced = |unreachable: &[u64], accept_loss| {
        Op::RemoveNode(pb::RemoveNode {
            node_id: holder,
            force: true,
            accept_loss,
            unreachable_nodes: unreachable.to_vec(),
            weak_groups: Vec::new(),
        })
    };
    let voters: Vec<u64> = (1..=4)
        .map(|id| catalog.node(id).meta_replica_id)
        .filter(|id| *id != 0)
        .collect();
    let epoch = catalog.machine.cluster().unwrap().meta.as_ref().unwrap().epoch;
    catalog.done(Op::SetMetaVoters(pb::SetMetaVoters {
        base_epoch: epoch,
        voters: voters[..3].to_vec(),
    }));
    let broken = catalog.refused(forced(&others[..1], false));
    assert!(matches!(broken, MetaRefusal::WouldBreakQuorum { .. }), "{broken}");
    // All nodes answer, and too few replicas have everything.
    let weak = catalog.refused(Op::RemoveNode(pb::RemoveNode {
        node_id: holder,
        force: true,
        weak_groups: vec![group],
        ..pb::RemoveNode::default()
    }));
    assert!(matches!(weak, MetaRefusal::InFlight { .. }), "{weak}");
    catalog.done(forced(&[], false));
    assert_eq!(catalog.node(holder).state(), NodeState::Removed);
    assert_eq!(catalog.group(group).replicas.len(), 3, "the planner replaces it");
    let back = pb::JoinNode {
        incarnation: 9,
        ..node(holder)
    };
    assert!(matches!(
        catalog.refused(Op::JoinNode(back)),
        MetaRefusal::NodeRemoved { .. }
    ));
    // Its name is free again, its id is not.
    catalog.done(Op::JoinNode(pb::JoinNode {
        name: format!("node-{holder}"),
        ..node(9)
    }));
    assert!(matches!(
        catalog.refused(Op::DrainNode(pb::DrainNode { node_id: holder })),
        MetaRefusal::NodeRemoved { .. }
    ));
    // Once more is no error.
    catalog.done(Op::RemoveNode(remove(holder)));
}

#[test]
fn the_meta_group_keeps_its_quorum() {
    let mut catalog = Catalog::new(3);
    let replica = |catalog: &Catalog, id: u64| catalog.node(id).meta_replica_id;
    let all: Vec<u64> = (1..=3).map(|id| replica(&catalog, id)).collect();
    let set = |epoch, voters: &[u64]| {
        Op::SetMetaVoters(pb::SetMetaVoters {
            base_epoch: epoch,
            voters: voters.to_vec(),
        })
    };
    let epoch = |catalog: &Catalog| catalog.machine.cluster().unwrap().meta.as_ref().unwrap().epoch;
    let now = epoch(&catalog);
    catalog.done(set(now, &all));
    assert!(matches!(
        catalog.refused(set(now, &all[..1])),
        MetaRefusal::StaleEpoch { .. }
    ));
    let now = epoch(&catalog);
    assert!(matches!(catalog.refused(set(now, &[])), MetaRefusal::BadChange { .. }));
    assert!(matches!(
        catalog.refused(set(now, &[99])),
        MetaRefusal::BadChange { .. }
    ));
    // Two of three are down: none of the others may go.
    let remove = |node_id, unreachable: &[u64]| {
        Op::RemoveNode(pb::RemoveNode {
            node_id,
            force: true,
            accept_loss: true,
            unreachable_nodes: unreachable.to_vec(),
            weak_groups: Vec::new(),
        })
    };
    let refusal = catalog.refused(remove(2, &[3]));
    assert_eq!(
        refusal,
        MetaRefusal::WouldBreakQuorum {
            what: "the meta group".into(),
            live: 1,
            needed: 2
        }
    );
    catalog.done(remove(3, &[3]));
    assert_eq!(
        catalog.machine.cluster().unwrap().meta.clone().unwrap().voters,
        all[..2]
    );
    // A damaged replica gets a successor with another id, which learns first.
    let renewed = catalog.done(Op::RenewMetaReplica(pb::RenewMetaReplica {
        node_id: 2,
        replica_id: all[1],
    }));
    let MetaOutcome::NodeChanged(node) = renewed else {
        panic!("{renewed:?}")
    };
    assert!(node.meta_replica_id > *all.iter().max().unwrap());
    let meta = catalog.machine.cluster().unwrap().meta.clone().unwrap();
    assert_eq!((meta.voters, meta.learners), (vec![all[0]], vec![node.meta_replica_id]));
    catalog.done(remove(2, &[]));
    let last = catalog.refused(remove(1, &[]));
    assert!(matches!(last, MetaRefusal::WouldBreakQuorum { .. }), "{last}");
}

#[test]
fn the_cluster_version_only_rises_when_all_know_it() {
    let mut catalog = Catalog::new(2);
    let set = |version| Op::SetClusterVersion(pb::SetClusterVersion { version });
    let refusal = catalog.refused(set(2));
    assert!(refusal.to_string().contains("node-1, node-2"), "{refusal}");
    for id in [1, 2] {
        catalog.done(Op::JoinNode(pb::JoinNode {
            incarnation: 2,
            cluster_version_max: 3,
            ..node(id)
        }));
    }
    catalog.done(set(2));
    assert_eq!(catalog.machine.cluster_version(), 2);
    assert_eq!(catalog.refused(set(1)), MetaRefusal::VersionDown { asked: 1, now: 2 });
    assert!(matches!(catalog.refused(set(4)), MetaRefusal::VersionNotKnown { .. }));
    assert!(matches!(
        catalog.refused(Op::JoinNode(node(3))),
        MetaRefusal::NodeTooOld { .. }
    ));
    for (update, ok) in [
        (
            pb::UpdateSettings {
                meta_voters_max: Some(4),
                ..Default::default()
            },
            false,
        ),
        (
            pb::UpdateSettings {
                meta_voters_max: Some(7),
                ..Default::default()
            },
            false,
        ),
        (
            pb::UpdateSettings {
                replace_after_us: Some(1),
                ..Default::default()
            },
            false,
        ),
        (
            pb::UpdateSettings {
                moves_per_node_max: Some(0),
                ..Default::default()
            },
            false,
        ),
        (
            pb::UpdateSettings {
                meta_voters_max: Some(3),
                ..Default::default()
            },
            true,
        ),
    ] {
        let outcome = catalog.apply(Op::UpdateSettings(update));
        assert_eq!(matches!(outcome, MetaOutcome::ClusterChanged(_)), ok, "{outcome:?}");
    }
    assert_eq!(catalog.machine.shape().settings.meta_voters_max, 3);
}

#[test]
fn one_change_at_a_time_and_no_late_report() {
    let mut catalog = Catalog::new(4);
    let (_, _, id) = catalog.stream("s", 3, true);
    let before = catalog.group(id);
    let free = (1..=4)
        .find(|node| before.replicas.iter().all(|r| r.node_id != *node))
        .unwrap();
    let old = before.replicas[0];
    // Refused: a holder, an unknown one, from another epoch.
    assert!(matches!(
        catalog.refused(change(&before, &[old.node_id], &[])),
        MetaRefusal::BadChange { .. }
    ));
    assert!(matches!(
        catalog.refused(change(&before, &[77], &[])),
        MetaRefusal::NodeNotFound { .. }
    ));
    let other = pb::GroupRecord {
        epoch: before.epoch + 1,
        ..before.clone()
    };
    assert!(matches!(
        catalog.refused(change(&other, &[free], &[])),
        MetaRefusal::StaleEpoch { .. }
    ));
    catalog.done(change(&before, &[free], &[old.replica_id]));
    let planned = catalog.group(id);
    let added = *planned.replicas.last().unwrap();
    assert_eq!((added.role(), planned.epoch), (ReplicaRole::Learner, before.epoch + 1));
    assert!(matches!(
        catalog.refused(change(&planned, &[], &[old.replica_id])),
        MetaRefusal::InFlight { .. }
    ));
    let mut after: Vec<u64> = voters(&before)[1..].to_vec();
    after.push(added.replica_id);
    let committed = |epoch, voters: &[u64], index| {
        Op::ChangeCommitted(pb::ChangeCommitted {
            group_id: id,
            epoch,
            membership: membership(voters, index),
        })
    };
    assert!(matches!(
        catalog.refused(committed(planned.epoch, &after, 9)),
        MetaRefusal::BadChange { .. }
    ));
    let caught_up = |epoch| {
        Op::ReplicaCaughtUp(pb::ReplicaCaughtUp {
            group_id: id,
            epoch,
            replica_id: added.replica_id,
        })
    };
    assert!(matches!(
        catalog.refused(caught_up(before.epoch)),
        MetaRefusal::StaleEpoch { .. }
    ));
    catalog.done(caught_up(planned.epoch));
    assert!(catalog.group(id).change.unwrap().ready);
    // From here on only the leader can tell that it did not happen.
    let abort = |epoch, membership| {
        Op::AbortChange(pb::AbortChange {
            group_id: id,
            epoch,
            membership,
            why: String::new(),
        })
    };
    assert!(matches!(
        catalog.refused(abort(planned.epoch, None)),
        MetaRefusal::InFlight { .. }
    ));
    let still_learning = Some(pb::GroupMembership {
        voters: voters(&before),
        learners: vec![added.replica_id],
        index: 9,
    });
    assert!(matches!(
        catalog.refused(abort(planned.epoch, still_learning)),
        MetaRefusal::BadChange { .. }
    ));
    assert!(matches!(
        catalog.refused(committed(planned.epoch, &voters(&before), 9)),
        MetaRefusal::BadChange { .. }
    ));
    assert!(matches!(
        catalog.refused(committed(planned.epoch, &after, 1)),
        MetaRefusal::BadChange { .. }
    ));
    catalog.done(committed(planned.epoch, &after, 9));
    let done = catalog.group(id);
    assert_eq!(voters(&done), after);
    assert_eq!(
        done.removed.iter().map(|r| r.replica_id).collect::<Vec<_>>(),
        [old.replica_id]
    );
    assert!(matches!(
        catalog.refused(committed(planned.epoch, &after, 10)),
        MetaRefusal::StaleEpoch { .. }
    ));
    // The former replica's data is in the way of a new one.
    assert!(matches!(
        catalog.refused(change(&done, &[old.node_id], &[])),
        MetaRefusal::InFlight { .. }
    ));
    let gone = |replica_id| {
        Op::ReplicaGone(pb::ReplicaGone {
            group_id: id,
            replica_id,
        })
    };
    assert!(matches!(catalog.refused(gone(after[0])), MetaRefusal::BadChange { .. }));
    catalog.done(gone(old.replica_id));
    catalog.done(gone(old.replica_id));
    // Given up in time: the learner goes, and its id is not given again.
    catalog.done(change(&done, &[old.node_id], &[]));
    let planned = catalog.group(id);
    let second = planned.replicas.last().unwrap().replica_id;
    assert!(second > added.replica_id);
    catalog.done(abort(planned.epoch, None));
    let aborted = catalog.group(id);
    assert_eq!((aborted.change, aborted.removed.len()), (None, 1));
    catalog.done(gone(second));
    let now = catalog.group(id);
    catalog.done(change(&now, &[old.node_id], &[]));
    assert!(catalog.group(id).replicas.last().unwrap().replica_id > second);
    // While it is ready, with the membership that shows that it cannot happen any more.
    let now = catalog.group(id);
    let third = now.replicas.last().unwrap().replica_id;
    catalog.done(Op::ReplicaCaughtUp(pb::ReplicaCaughtUp {
        group_id: id,
        epoch: now.epoch,
        replica_id: third,
    }));
    catalog.done(abort(now.epoch, membership(&after, 12)));
    assert_eq!(catalog.group(id).membership_index, 12);
}

#[test]
fn a_shard_goes_from_group_to_group_in_steps() {
    let mut catalog = Catalog::new(3);
    let (stream_id, shard_id, from) = catalog.stream("s", 3, false);
    let plan = |to_group| {
        Op::PlanShardMove(pb::PlanShardMove {
            shard_id,
            stream_id: stream_id.clone(),
            to_group,
            ..pb::PlanShardMove::default()
        })
    };
    assert!(matches!(
        catalog.refused(plan(Some(from))),
        MetaRefusal::BadChange { .. }
    ));
    catalog.done(plan(None));
    assert!(matches!(catalog.refused(plan(None)), MetaRefusal::InFlight { .. }));
    let place = |catalog: &Catalog| {
        let stream = catalog.machine.stream_by_name("default", "s").unwrap();
        stream.shards[0]
    };
    let moving = place(&catalog).moving.unwrap();
    let (to, move_id) = (moving.to_group, moving.move_id);
    let nodes = |group: &pb::GroupRecord| {
        group
            .replicas
            .iter()
            .map(|r| r.node_id)
            .collect::<std::collections::BTreeSet<_>>()
    };
    assert_eq!(nodes(&catalog.group(from)), nodes(&catalog.group(to)));
    catalog.form(to);
    // No member of either may change now.
    for id in [from, to] {
        let group = catalog.group(id);
        let first = group.replicas[0].replica_id;
        assert!(matches!(
            catalog.refused(change(&group, &[], &[first])),
            MetaRefusal::InFlight { .. }
        ));
    }
    let adopted = |move_id| {
        Op::ShardAdopted(pb::ShardAdopted {
            shard_id,
            stream_id: stream_id.clone(),
            move_id,
            index: 4,
        })
    };
    let early = catalog.refused(adopted(move_id));
    assert!(early.to_string().contains("seal before adopt"), "{early}");
    let done = Op::ShardMoveDone(pb::ShardMoveDone {
        shard_id,
        stream_id: stream_id.clone(),
        move_id,
    });
    assert!(matches!(catalog.refused(done.clone()), MetaRefusal::BadChange { .. }));
    let sealed = |tail| {
        Op::ShardSealed(pb::ShardSealed {
            shard_id,
            stream_id: stream_id.clone(),
            move_id,
            seal: Some(pb::Seal {
                index: 30,
                tail,
                digest: 1,
            }),
        })
    };
    catalog.done(sealed(5));
    catalog.done(sealed(5));
    assert!(matches!(catalog.refused(sealed(6)), MetaRefusal::BadChange { .. }));
    assert_eq!((place(&catalog).group_id, catalog.group(from).log_floor), (from, 30));
    assert!(matches!(
        catalog.refused(adopted(move_id + 1)),
        MetaRefusal::StaleEpoch { .. }
    ));
    catalog.done(adopted(move_id));
    assert_eq!((place(&catalog).group_id, catalog.group(to).log_floor), (to, 4));
    assert_eq!((catalog.group(from).shards, catalog.group(to).shards), (0, 1));
    // Another leader has adopted it once more, which is in the log: no replica begins with that either.
    catalog.done(Op::ShardAdopted(pb::ShardAdopted {
        shard_id,
        stream_id: stream_id.clone(),
        move_id,
        index: 9,
    }));
    catalog.done(adopted(move_id));
    assert_eq!(catalog.group(to).log_floor, 9);
    assert_eq!(place(&catalog).moving.unwrap().step(), MoveStep::Adopted);
    // A stream is not forgotten while a shard of it is on its way.
    catalog.done(Op::RemoveStream(pb::RemoveStream {
        namespace: "default".into(),
        name: "s".into(),
        grace_us: 0,
        expected_revision: None,
    }));
    let forget = Op::ForgetStream(pb::ForgetStream {
        stream_id: stream_id.clone(),
        dropped: true,
    });
    assert!(matches!(catalog.refused(forget.clone()), MetaRefusal::InFlight { .. }));
    let outcome = catalog.done(done);
    assert!(matches!(outcome, MetaOutcome::ShardMoved { .. }));
    catalog.done(forget);
    assert!(catalog.machine.group(GroupId::new(to)).is_none());
}

#[test]
fn a_repeated_request_of_an_operator_gets_its_first_answer() {
    let mut catalog = Catalog::new(2);
    let drain = || Op::DrainNode(pb::DrainNode { node_id: 2 });
    let first = catalog.request("r", drain());
    catalog.apply(Op::UndrainNode(pb::UndrainNode { node_id: 2 }));
    assert_eq!(catalog.request("r", drain()), first);
    assert_eq!(catalog.node(2).state(), NodeState::Active);
    let reused = catalog.request("r", Op::DrainNode(pb::DrainNode { node_id: 1 }));
    assert!(matches!(
        reused,
        MetaOutcome::Refused(MetaRefusal::RequestIdReused { .. })
    ));
}
