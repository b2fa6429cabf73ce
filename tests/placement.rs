//! The planner over random clusters and random misfortune: it comes to rest, never goes below a quorum, spreads, does not
//! go to and fro, empties drained nodes, and says the same for the same. Bugs that are planted must be found.
//!
//! A failure prints its input; `PLACEMENT_CASES=n` runs more.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod machine_support;
mod placement_support;

use mainstem::control::placement::{Action, GroupReport, NodeReport, Reports, Step, plan};
use mainstem::machine::placement::{ClusterShape, NodeShape, Nodes, Request, place};
use mainstem::machine::{MetaOutcome, MetaRefusal};
use mainstem::model::{GroupId, NodeId, ReplicaId, TimeUs};
use mainstem::wire::internal::v1::{self as pb, ChangeReason, NodeState, meta_command::Op};
use placement_support::story::{ZONES, live, story};
use placement_support::{Change, World};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::FileFailurePersistence;

fn cases(default: u32) -> u32 {
    std::env::var("PLACEMENT_CASES").map_or(default, |text| text.parse().expect("a number"))
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(150),
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        max_shrink_iters: 2_000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn comes_to_rest_and_does_no_harm(story in story()) {
        if let Err(what) = live(&story, None) {
            prop_assert!(false, "seed {}: {what}", story.seed);
        }
    }
}

/// Whether some of many stories finds the bug. The same stories each time.
#[track_caller]
fn must_be_found(what: &str, bug: Change) {
    let config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let rng = proptest::test_runner::TestRng::deterministic_rng(proptest::test_runner::RngAlgorithm::ChaCha);
    let mut runner = proptest::test_runner::TestRunner::new_with_rng(config, rng);
    for round in 0..256 {
        let story = story().new_tree(&mut runner).unwrap().current();
        // What harms nothing at all may be found by a panic of the world, too.
        let lived = std::panic::catch_unwind(|| live(&story, Some(bug)));
        if let Ok(Ok(())) = lived {
            continue;
        }
        println!("{what}: found by story {round}, seed {}: {lived:?}", story.seed);
        return;
    }
    panic!("{what}: nobody noticed");
}

#[test]
fn planted_removed_before_its_successor_votes() {
    must_be_found("a replica is removed before its successor votes", |_, actions| {
        for action in actions {
            if let Step::ChangeReplicas { add, remove, .. } = &mut action.step
                && !remove.is_empty()
            {
                add.clear();
            }
        }
    });
}

#[test]
fn planted_the_leader_is_removed() {
    must_be_found("the leader is removed", |world, actions| {
        for action in actions {
            let Step::TransferLeader { group, from, .. } = &action.step else {
                continue;
            };
            let Some(record) = world.machine.group(*group).filter(|record| record.change.is_none()) else {
                continue;
            };
            action.step = Step::ChangeReplicas {
                group: *group,
                epoch: record.epoch,
                add: vec![],
                remove: vec![*from],
                reason: ChangeReason::Drain,
                why: String::new(),
            };
        }
    });
}

#[test]
fn planted_zones_are_not_looked_at() {
    must_be_found("replicas go to the lowest free node", |world, actions| {
        for action in actions {
            if let Step::ChangeReplicas { group, add, .. } = &mut action.step {
                let record = world.machine.group(*group).unwrap();
                let holds = |id: u64| record.replicas.iter().chain(&record.removed).any(|r| r.node_id == id);
                let free = world.machine.present_nodes().filter(|node| {
                    node.state() == NodeState::Active && world.is_up(node.node_id) && !holds(node.node_id)
                });
                let free: Vec<NodeId> = free.map(|node| NodeId::new(node.node_id)).take(add.len()).collect();
                if free.len() == add.len() {
                    *add = free;
                }
            }
        }
    });
}

#[test]
fn planted_leaders_go_to_and_fro() {
    must_be_found("a leader moves at each round", |world, actions| {
        let Some((id, raft)) = world
            .rafts
            .iter()
            .find(|(_, raft)| raft.leader.is_some() && raft.voters.len() > 1)
        else {
            return;
        };
        let leader = raft.leader.unwrap();
        let other = raft.voters.iter().find(|voter| **voter != leader).unwrap();
        actions.push(Action {
            step: Step::TransferLeader {
                group: *id,
                from: ReplicaId::new(leader),
                to: ReplicaId::new(*other),
            },
            why: String::new(),
            blocked: None,
        });
    });
}

#[test]
fn planted_drained_nodes_are_forgotten() {
    must_be_found("drained nodes keep what they have", |_, actions| {
        actions.retain(|action| match &action.step {
            Step::ChangeReplicas { reason, .. } => *reason != ChangeReason::Drain,
            _ => true,
        });
    });
}

fn node(id: u64, zone: &str, replicas: u32) -> NodeShape {
    let mut node = NodeShape::of(&pb::NodeRecord {
        node_id: id,
        name: format!("node-{id}"),
        zone: zone.into(),
        ..pb::NodeRecord::default()
    });
    node.replicas = replicas;
    node
}

fn nodes(list: impl IntoIterator<Item = NodeShape>) -> Nodes {
    list.into_iter().map(|node| (node.id, node)).collect()
}

#[test]
fn a_choice_tells_its_reasons() {
    let mut all = nodes([
        node(1, "a", 4),
        node(2, "a", 0),
        node(3, "b", 9),
        node(4, "b", 9),
        node(5, "c", 0),
        node(6, "c", 0),
        node(7, "d", 0),
        node(8, "c", 3),
    ]);
    all.get_mut(&NodeId::new(5)).unwrap().live = false;
    all.get_mut(&NodeId::new(6)).unwrap().state = NodeState::Draining;
    let placement = World::zones(&["a", "b", "c"]);
    let choice = place(
        &all,
        &Request {
            replicas: 3,
            placement: placement.as_ref(),
            exclude: [(NodeId::new(8), "asked for".to_string())].into(),
            ..Request::default()
        },
    );
    let text = choice.to_string();
    println!("{text}");
    assert_eq!(
        text,
        "n1 (node-1): chosen 3.: 1 replicas of the group in its zone, 4 replicas on it\n\
         n2 (node-2): chosen 1.: 0 replicas of the group in its zone, 0 replicas on it\n\
         n3 (node-3): chosen 2.: 0 replicas of the group in its zone, 9 replicas on it\n\
         n4 (node-4): not needed: it has more to do (9 replicas)\n\
         n5 (node-5): not: cannot be reached\n\
         n6 (node-6): not: being drained\n\
         n7 (node-7): not: zone d is not allowed\n\
         n8 (node-8): not: asked for\n"
    );
    let more = place(
        &all,
        &Request {
            replicas: 6,
            placement: placement.as_ref(),
            ..Request::default()
        },
    );
    assert_eq!((more.nodes.len(), more.missing), (5, 1));
    assert!(more.to_string().ends_with("1 more are needed and there are none\n"));
}

#[test]
fn what_is_held_counts_for_the_spread() {
    let all = nodes([node(1, "a", 0), node(2, "a", 0), node(3, "b", 5), node(4, "c", 9)]);
    let choice = place(
        &all,
        &Request {
            replicas: 2,
            holding: vec![NodeId::new(1)],
            ..Request::default()
        },
    );
    assert_eq!(choice.nodes, [NodeId::new(3), NodeId::new(4)]);
    assert!(
        choice
            .to_string()
            .contains("n2 (node-2): not needed: zone \"a\" holds 1 replicas")
    );
}

/// Not a figure, a bound: the planner runs every second.
#[test]
fn ten_thousand_groups() {
    let nodes: Vec<pb::NodeRecord> = (1..=10)
        .map(|node_id| pb::NodeRecord {
            node_id,
            name: format!("node-{node_id}"),
            zone: ZONES[node_id as usize % 3].into(),
            meta_replica_id: node_id,
            ..pb::NodeRecord::default()
        })
        .collect();
    let groups: Vec<pb::GroupRecord> = (0..10_000u64)
        .map(|n| pb::GroupRecord {
            group_id: n + 2,
            formed: true,
            replica_count: 3,
            shards: 1,
            replicas: (0..3)
                .map(|k| pb::ReplicaRecord {
                    replica_id: n * 3 + k + 100,
                    node_id: (n + k) % 9 + 1,
                    ..pb::ReplicaRecord::default()
                })
                .collect(),
            ..pb::GroupRecord::default()
        })
        .collect();
    let cluster = pb::ClusterRecord {
        meta: Some(pb::MetaMembership {
            voters: vec![1],
            learners: (2..=10).collect(),
            epoch: 10,
        }),
        ..pb::ClusterRecord::default()
    };
    let now = TimeUs::new(1_000_000);
    let mut reports = Reports::default();
    for id in 1..=10 {
        let report = NodeReport {
            last_seen: now,
            ..NodeReport::default()
        };
        reports.nodes.insert(NodeId::new(id), report);
    }
    for group in &groups {
        let ids = group.replicas.iter().map(|replica| ReplicaId::new(replica.replica_id));
        // All of the first tenth are led from one place.
        let leader = match group.group_id < 1_000 {
            true => group.replicas.iter().max_by_key(|replica| replica.node_id).unwrap(),
            false => &group.replicas[0],
        };
        let report = GroupReport {
            leader: ReplicaId::new(leader.replica_id),
            current: ids.collect(),
        };
        reports.groups.insert(GroupId::new(group.group_id), report);
    }
    reports.meta.leader = Some(ReplicaId::new(1));
    reports.meta.voters = [ReplicaId::new(1)].into();
    let begun = std::time::Instant::now();
    let shape = ClusterShape::of(&cluster, &nodes, &groups, []);
    let actions = plan(&shape, &reports, now);
    println!("{} actions in {:?}", actions.len(), begun.elapsed());
    assert!(
        actions
            .iter()
            .any(|action| matches!(action.step, Step::SetMetaVoters { .. }))
    );
    assert!(
        actions
            .iter()
            .any(|action| matches!(action.step, Step::TransferLeader { .. }))
    );
    assert!(
        actions
            .iter()
            .any(|action| matches!(&action.step, Step::ChangeReplicas { add, .. } if add == &[NodeId::new(10)])),
        "the empty node gets something"
    );
    assert!(begun.elapsed().as_secs() < 5);
    // What somebody has just had handed over stays where it is.
    for report in reports.nodes.values_mut() {
        report.handed_over = groups.iter().map(|group| GroupId::new(group.group_id)).collect();
    }
    let held = plan(&shape, &reports, now);
    assert!(
        !held
            .iter()
            .any(|action| matches!(action.step, Step::TransferLeader { .. }))
    );
}

fn three() -> World {
    let mut world = World::new(1);
    for (id, zone) in [(1, "a"), (2, "b"), (3, "c")] {
        world.join(id, zone);
    }
    world.settle().unwrap();
    world
}

#[test]
fn three_nodes_make_three_meta_voters_and_a_fourth_none() {
    let mut world = three();
    assert_eq!(world.meta_voters.len(), 3);
    world.join(4, "a");
    world.settle().unwrap();
    assert_eq!(world.meta_voters.len(), 3);
    let node = |world: &World, id| world.machine.node(NodeId::new(id)).unwrap().meta_replica_id;
    assert!(!world.meta_voters.contains(&node(&world, 4)));
    // A dead voter is replaced, not before its time is over.
    let dead = node(&world, 2);
    world.up.insert(NodeId::new(2), false);
    for _ in 0..placement_support::REPLACE_AFTER_S - 2 {
        world.tick().unwrap();
    }
    assert!(world.meta_voters.contains(&dead));
    world.settle().unwrap();
    assert!(!world.meta_voters.contains(&dead) && world.meta_voters.contains(&node(&world, 4)));
    world.join(5, "b");
    world.join(6, "b");
    world.settle().unwrap();
    assert_eq!(world.meta_voters.len(), 5, "five that live, of six");
    // Without a spare node a dead voter stays: fewer voters are no better.
    let mut world = three();
    world.up.insert(NodeId::new(3), false);
    world.settle().unwrap();
    assert_eq!(world.meta_voters.len(), 3);
}

#[test]
fn a_lost_replica_waits_for_a_node_and_says_so() {
    let mut world = three();
    world.create(3, 1, true);
    world.settle().unwrap();
    world.up.insert(NodeId::new(3), false);
    world.settle().unwrap();
    let plan = world.plan();
    let held: Vec<&Action> = plan.iter().filter(|action| action.blocked.is_some()).collect();
    let text: String = held.iter().map(|action| action.to_string()).collect();
    assert!(
        text.contains("lost: ") && text.contains("no node can take it"),
        "{text}"
    );
    assert!(text.contains("n1 (node-1): holds a replica already"), "{text}");
    world.join(4, "a");
    world.settle().unwrap();
    world.check_rest().unwrap();
}

#[test]
fn a_pooled_stream_is_split_out_and_scaled() {
    let mut world = three();
    world.create(1, 2, false);
    world.create(1, 1, false);
    world.settle().unwrap();
    let groups = |world: &World, name: &str| -> Vec<u64> {
        let stream = world.machine.stream_by_name("default", name).unwrap();
        stream.shards.iter().map(|shard| shard.group_id).collect()
    };
    let (before, other) = (groups(&world, "s1"), groups(&world, "s2"));
    assert!(matches!(
        world.update("s1", |spec| spec.replicas = 3),
        MetaOutcome::StreamUpdated(_)
    ));
    world.settle().unwrap();
    world.check_rest().unwrap();
    let after = groups(&world, "s1");
    assert!(after.iter().all(|group| !before.contains(group)));
    for group in after {
        let group = world.machine.group(GroupId::new(group)).unwrap();
        assert_eq!((group.replicas.len(), group.shards, group.pooled), (3, 1, false));
        assert!(
            group.log_floor > 0,
            "no replica is born from the log that holds the adoption"
        );
    }
    assert_eq!(groups(&world, "s2"), other);
    world.update("s1", |spec| spec.replicas = 1);
    world.settle().unwrap();
    world.check_rest().unwrap();
    let refused = world.update("s1", |spec| spec.replicas = 5);
    let MetaOutcome::Refused(MetaRefusal::NotEnoughNodes {
        wanted,
        nodes,
        live,
        usable,
    }) = refused
    else {
        panic!("{refused:?}");
    };
    assert_eq!((wanted, nodes, live, usable), (5, 3, 3, 3));
}

#[test]
fn a_drained_node_gives_its_leaders_away_first() {
    let mut world = three();
    world.join(4, "a");
    for _ in 0..4 {
        world.create(3, 1, true);
    }
    world.settle().unwrap();
    world.apply(Op::DrainNode(pb::DrainNode { node_id: 1 }));
    let plan = world.plan();
    assert!(
        plan.iter()
            .any(|action| matches!(action.step, Step::TransferLeader { .. }))
    );
    world.settle().unwrap();
    world.check_rest().unwrap();
    assert!(
        world
            .machine
            .groups()
            .flat_map(|group| &group.replicas)
            .all(|replica| replica.node_id != 1)
    );
    let removed = world.apply(Op::RemoveNode(pb::RemoveNode {
        node_id: 1,
        ..pb::RemoveNode::default()
    }));
    assert!(matches!(removed, MetaOutcome::NodeChanged(_)), "{removed:?}");
}
