//! Choosing nodes for the replicas of a group.

use std::collections::BTreeMap;
use std::fmt;

use super::shape::{NodeShape, Nodes};
use crate::model::NodeId;
use crate::wire::internal::v1::NodeState;
use crate::wire::v1::Placement;

/// What is asked for.
#[derive(Debug, Clone, Default)]
pub struct Request<'a> {
    /// So many nodes are to be chosen.
    pub replicas: u32,
    /// Nodes that hold a replica of the group and keep it: never chosen, but counted for the spread.
    pub holding: Vec<NodeId>,
    /// Which nodes are allowed; `None`: any.
    pub placement: Option<&'a Placement>,
    /// Nodes that must not be chosen, each with the reason.
    pub exclude: BTreeMap<NodeId, String>,
}

/// What was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// In the order in which they were chosen; fewer than asked for if there are not more.
    pub nodes: Vec<NodeId>,
    /// So many could not be found.
    pub missing: u32,
    /// One for each node, by id.
    pub verdicts: Vec<Verdict>,
}

/// Why a node was chosen or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// Which node.
    pub node: NodeId,
    /// Its name.
    pub name: String,
    /// Chosen, or why not.
    pub kind: VerdictKind,
}

/// Chosen, or why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VerdictKind {
    /// As the `order`-th, from 1; its zone held `in_zone` replicas of the group and the node `replicas` of any.
    Chosen { order: u32, in_zone: u32, replicas: u32 },
    /// It holds a replica of the group.
    Holds,
    /// It was removed from the cluster.
    Removed,
    /// It is being drained.
    Draining,
    /// It cannot be reached.
    NotLive,
    /// The placement names other zones.
    OtherZone { zone: String },
    /// The placement asks for a tag that it does not have so.
    OtherTag {
        key: String,
        wanted: String,
        has: Option<String>,
    },
    /// The request excludes it.
    Excluded { why: String },
    /// It would do, but its zone holds more replicas of the group than another that would do.
    ZoneTaken { zone: String, in_zone: u32 },
    /// It would do, but others have less to do.
    Busier { replicas: u32 },
}

impl fmt::Display for VerdictKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            VerdictKind::Chosen {
                order,
                in_zone,
                replicas,
            } => write!(
                f,
                "chosen {order}.: {in_zone} replicas of the group in its zone, {replicas} replicas on it"
            ),
            VerdictKind::Holds => f.write_str("holds a replica already"),
            VerdictKind::Removed => f.write_str("not: removed from the cluster"),
            VerdictKind::Draining => f.write_str("not: being drained"),
            VerdictKind::NotLive => f.write_str("not: cannot be reached"),
            VerdictKind::OtherZone { zone } if zone.is_empty() => f.write_str("not: it is in no zone"),
            VerdictKind::OtherZone { zone } => write!(f, "not: zone {zone} is not allowed"),
            VerdictKind::OtherTag {
                key,
                wanted,
                has: Some(has),
            } => write!(f, "not: tag {key} is {has}, not {wanted}"),
            VerdictKind::OtherTag { key, wanted, has: None } => write!(f, "not: it has no tag {key}={wanted}"),
            VerdictKind::Excluded { why } => write!(f, "not: {why}"),
            VerdictKind::ZoneTaken { zone, in_zone } => {
                write!(
                    f,
                    "not needed: zone {zone:?} holds {in_zone} replicas of the group already"
                )
            }
            VerdictKind::Busier { replicas } => write!(f, "not needed: it has more to do ({replicas} replicas)"),
        }
    }
}

impl fmt::Display for Choice {
    /// One line for each node.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for verdict in &self.verdicts {
            writeln!(f, "{} ({}): {}", verdict.node, verdict.name, verdict.kind)?;
        }
        if self.missing > 0 {
            writeln!(f, "{} more are needed and there are none", self.missing)?;
        }
        Ok(())
    }
}

/// Whether a node may hold replicas under this placement at all, whatever its state; else why not.
pub(super) fn allows(placement: Option<&Placement>, node: &NodeShape) -> Result<(), VerdictKind> {
    let Some(placement) = placement else { return Ok(()) };
    if !placement.zones.is_empty() && !placement.zones.contains(&node.zone) {
        return Err(VerdictKind::OtherZone {
            zone: node.zone.clone(),
        });
    }
    for (key, wanted) in &placement.tags {
        let has = node.tags.get(key);
        if has != Some(wanted) {
            return Err(VerdictKind::OtherTag {
                key: key.clone(),
                wanted: wanted.clone(),
                has: has.cloned(),
            });
        }
    }
    Ok(())
}

fn eligible(request: &Request<'_>, node: &NodeShape) -> Result<(), VerdictKind> {
    match node.state {
        NodeState::Removed => return Err(VerdictKind::Removed),
        NodeState::Active | NodeState::Draining => {}
    }
    if request.holding.contains(&node.id) {
        return Err(VerdictKind::Holds);
    }
    if node.state == NodeState::Draining {
        return Err(VerdictKind::Draining);
    }
    if !node.live {
        return Err(VerdictKind::NotLive);
    }
    if let Some(why) = request.exclude.get(&node.id) {
        return Err(VerdictKind::Excluded { why: why.clone() });
    }
    allows(request.placement, node)
}

/// Chooses nodes: only those that are live, active, not excluded and allowed by the placement; from the zone with the
/// fewest replicas of the group; then the one with the fewest replicas, leaders, bytes; then the lowest id. One choice
/// after the other, so that what is chosen first does not depend on how many are asked for.
pub fn place(nodes: &Nodes, request: &Request<'_>) -> Choice {
    let mut kinds: BTreeMap<NodeId, VerdictKind> = BTreeMap::new();
    let mut free: Vec<&NodeShape> = Vec::new();
    for node in nodes.values() {
        match eligible(request, node) {
            Ok(()) => free.push(node),
            Err(kind) => drop(kinds.insert(node.id, kind)),
        }
    }
    let mut in_zone: BTreeMap<&str, u32> = BTreeMap::new();
    for node in request.holding.iter().filter_map(|id| nodes.get(id)) {
        *in_zone.entry(&node.zone).or_default() += 1;
    }
    let mut chosen = Vec::new();
    // How full the last choice's zone was before it.
    let mut last: Option<(u32, &str)> = None;
    while (chosen.len() as u32) < request.replicas {
        let taken = |node: &NodeShape| in_zone.get(node.zone.as_str()).copied().unwrap_or(0);
        let best = free
            .iter()
            .enumerate()
            .min_by_key(|(_, node)| (taken(node), node.replicas, node.leaders, node.bytes, node.id))
            .map(|(at, _)| at);
        let Some(at) = best else { break };
        let node = free.swap_remove(at);
        let taken = in_zone.entry(node.zone.as_str()).or_default();
        let kind = VerdictKind::Chosen {
            order: chosen.len() as u32 + 1,
            in_zone: *taken,
            replicas: node.replicas,
        };
        kinds.insert(node.id, kind);
        last = Some((*taken, node.zone.as_str()));
        *taken += 1;
        chosen.push(node.id);
    }
    for node in free {
        // As it was at the last choice.
        let in_zone = in_zone.get(node.zone.as_str()).copied().unwrap_or(0);
        let kind = match last {
            Some((least, zone)) if in_zone - u32::from(node.zone == zone) > least => VerdictKind::ZoneTaken {
                zone: node.zone.clone(),
                in_zone,
            },
            Some(_) | None => VerdictKind::Busier {
                replicas: node.replicas,
            },
        };
        kinds.insert(node.id, kind);
    }
    let missing = request.replicas - chosen.len() as u32;
    let verdicts = kinds
        .into_iter()
        .filter_map(|(node, kind)| {
            let name = nodes.get(&node)?.name.clone();
            Some(Verdict { node, name, kind })
        })
        .collect();
    Choice {
        nodes: chosen,
        missing,
        verdicts,
    }
}
