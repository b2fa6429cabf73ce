//! What may happen to a cluster, and what must hold when it has.

use std::collections::BTreeSet;

use mainstem::machine::MetaOutcome;
use mainstem::model::{NodeId, ReplicaId};
use mainstem::wire::internal::v1::{self as pb, NodeState, meta_command::Op};
use proptest::prelude::*;

use super::{Change, World};

#[derive(Debug, Clone)]
pub enum Event {
    Kill(u64),
    Revive(u64),
    Drain(u64),
    Undrain(u64),
    Remove {
        node: u64,
        force: bool,
    },
    Join {
        zone: usize,
    },
    Create {
        replicas: u32,
        shards: u32,
        dedicated: bool,
    },
    Replicas {
        stream: u8,
        replicas: u32,
    },
    Zones {
        stream: u8,
        zones: Vec<usize>,
    },
    Damage {
        group: u8,
        replica: u8,
    },
    Wait(u8),
}

#[derive(Debug, Clone)]
pub struct Story {
    pub seed: u64,
    pub zones: usize,
    pub nodes: u64,
    pub events: Vec<Event>,
}

pub const ZONES: [&str; 3] = ["a", "b", "c"];

fn event() -> impl Strategy<Value = Event> {
    let node = || 1u64..8;
    let replicas = || prop::sample::select(vec![1u32, 2, 3, 3, 3, 5]);
    prop_oneof![
        3 => node().prop_map(Event::Kill),
        3 => node().prop_map(Event::Revive),
        2 => node().prop_map(Event::Drain),
        1 => node().prop_map(Event::Undrain),
        1 => (node(), any::<bool>()).prop_map(|(node, force)| Event::Remove { node, force }),
        1 => (0usize..3).prop_map(|zone| Event::Join { zone }),
        4 => (replicas(), 1u32..4, any::<bool>())
            .prop_map(|(replicas, shards, dedicated)| Event::Create { replicas, shards, dedicated }),
        3 => (1u8..6, replicas()).prop_map(|(stream, replicas)| Event::Replicas { stream, replicas }),
        1 => (1u8..6, prop::collection::vec(0usize..3, 0..3)).prop_map(|(stream, zones)| Event::Zones { stream, zones }),
        1 => (0u8..8, 0u8..3).prop_map(|(group, replica)| Event::Damage { group, replica }),
        4 => (1u8..60).prop_map(Event::Wait),
    ]
}

pub fn story() -> impl Strategy<Value = Story> {
    (any::<u64>(), 1usize..4, 3u64..7, prop::collection::vec(event(), 1..30)).prop_map(
        |(seed, zones, nodes, events)| Story {
            seed,
            zones,
            nodes,
            events,
        },
    )
}

/// Lives through a story. `Err`: something that must not be.
pub fn live(story: &Story, bug: Option<Change>) -> Result<(), String> {
    let mut world = World::new(story.seed);
    for id in 1..=story.nodes {
        world.join(id, ZONES[id as usize % story.zones]);
    }
    world.create(3, 2, true);
    world.create(1, 2, false);
    world.settle()?;
    world.check_rest()?;
    world.bug = bug;
    let mut next = story.nodes + 1;
    for event in &story.events {
        happen(&mut world, event, story, &mut next)?;
    }
    world.settle()?;
    world.check_rest()?;
    // To and fro would show here: what one event asks for is done in a few steps.
    for (what, times) in &world.done {
        if *times > 24 {
            return Err(format!("{what}: {times} times"));
        }
    }
    Ok(())
}

fn happen(world: &mut World, event: &Event, story: &Story, next: &mut u64) -> Result<(), String> {
    let known = |world: &World, id: u64| {
        let node = world.machine.node(NodeId::new(id));
        node.is_some_and(|node| node.state() != NodeState::Removed)
    };
    match event {
        Event::Kill(id) if known(world, *id) => {
            // Of the meta group a majority stays up: without it nobody would plan.
            let voters = |down: u64| {
                let nodes = world.machine.present_nodes();
                nodes
                    .filter(|node| world.meta_voters.contains(&node.meta_replica_id))
                    .filter(|node| node.node_id != down && world.is_up(node.node_id))
                    .count()
            };
            if voters(*id) > world.meta_voters.len() / 2 {
                world.up.insert(NodeId::new(*id), false);
            }
        }
        Event::Revive(id) if known(world, *id) => drop(world.up.insert(NodeId::new(*id), true)),
        Event::Drain(id) => drop(world.apply(Op::DrainNode(pb::DrainNode { node_id: *id }))),
        Event::Undrain(id) => drop(world.apply(Op::UndrainNode(pb::UndrainNode { node_id: *id }))),
        Event::Remove { node, force } => {
            let outcome = world.apply(Op::RemoveNode(pb::RemoveNode {
                node_id: *node,
                force: *force,
                accept_loss: false,
                unreachable_nodes: world.unreachable(),
                weak_groups: Vec::new(),
            }));
            if matches!(outcome, MetaOutcome::NodeChanged(_)) {
                world.up.insert(NodeId::new(*node), false);
            }
        }
        Event::Join { zone } => {
            world.join(*next, ZONES[*zone % story.zones]);
            *next += 1;
        }
        Event::Create {
            replicas,
            shards,
            dedicated,
        } => drop(world.create(*replicas, *shards, *dedicated)),
        Event::Replicas { stream, replicas } => {
            drop(world.update(&format!("s{stream}"), |spec| spec.replicas = *replicas))
        }
        Event::Zones { stream, zones } => {
            let zones: Vec<&str> = zones.iter().map(|zone| ZONES[*zone]).collect();
            drop(world.update(&format!("s{stream}"), |spec| spec.placement = World::zones(&zones)));
        }
        Event::Damage { group, replica } => {
            let groups: Vec<_> = world.machine.groups().cloned().collect();
            let group = &groups[usize::from(*group) % groups.len()];
            let voters: BTreeSet<u64> = group.replicas.iter().map(|r| r.replica_id).collect();
            // Never the last one that is whole: that is for people.
            if let Some(replica) = group.replicas.get(usize::from(*replica))
                && world.live(group, &voters) > voters.len() / 2 + 1
            {
                world.damaged.insert(ReplicaId::new(replica.replica_id));
            }
        }
        Event::Wait(seconds) => {
            for _ in 0..*seconds {
                world.tick()?;
            }
        }
        Event::Kill(_) | Event::Revive(_) => {}
    }
    world.tick().map(drop)
}
