//! What a change of the meta group's state is to those who keep a view of it.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::machine::{MetaMachine, MetaOutcome};
use crate::model::{GroupId, StreamId};
use crate::wire::internal as pb;

/// A change of the meta group's state.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaChange {
    Cluster(Arc<pb::ClusterRecord>),
    Node(Arc<pb::NodeRecord>),
    Group(Arc<pb::GroupRecord>),
    GroupForgotten(GroupId),
    /// There are these groups and no others.
    Groups(BTreeSet<GroupId>),
    Stream(Arc<pb::StreamRecord>),
    StreamForgotten(StreamId),
}

/// Told of every change of the meta group's state after it is applied, in order.
pub trait MetaObserver: Send + Sync + 'static {
    /// Called once at start with everything, then with each change. Must be quick and must not block.
    fn changed(&self, changes: &[MetaChange]);
}

/// The whole catalog, as changes.
pub(super) fn everything(meta: &MetaMachine) -> Vec<MetaChange> {
    let cluster = meta.cluster().cloned().map(MetaChange::Cluster);
    cluster
        .into_iter()
        .chain(meta.nodes().cloned().map(MetaChange::Node))
        .chain(meta.groups().cloned().map(MetaChange::Group))
        .chain(meta.streams().cloned().map(MetaChange::Stream))
        .collect()
}

/// What was in one catalog and is not in the other.
pub(super) fn forgotten(before: &MetaMachine, now: &MetaMachine) -> Vec<MetaChange> {
    let groups = before.groups().map(|g| GroupId::new(g.group_id));
    let streams = before.streams().filter_map(|s| StreamId::parse(&s.stream_id));
    groups
        .filter(|g| now.group(*g).is_none())
        .map(MetaChange::GroupForgotten)
        .chain(
            streams
                .filter(|s| now.stream(*s).is_none())
                .map(MetaChange::StreamForgotten),
        )
        .collect()
}

/// What a meta command changed, so far as its outcome tells. Saying more than has changed does no harm.
pub(super) fn changes(meta: &MetaMachine, outcome: &MetaOutcome) -> Vec<MetaChange> {
    let mut out: Vec<MetaChange> = meta.cluster().cloned().map(MetaChange::Cluster).into_iter().collect();
    let stream = match outcome {
        MetaOutcome::Refused(_) | MetaOutcome::StreamExisted(_) => return Vec::new(),
        MetaOutcome::ClusterInitialised { .. } | MetaOutcome::NodeRegistered { .. } | MetaOutcome::NodeChanged(_) => {
            let mut all = everything(meta);
            // Groups that were lost with a node.
            all.push(MetaChange::Groups(
                meta.groups().map(|g| GroupId::new(g.group_id)).collect(),
            ));
            return all;
        }
        MetaOutcome::ClusterChanged(_) => return out,
        MetaOutcome::GroupChanged(group) => {
            let id = GroupId::new(group.group_id);
            out.push(group_change(meta, id));
            return out;
        }
        MetaOutcome::ShardMoved { stream, from, to } => {
            out.extend([*from, *to].map(|id| group_change(meta, id)));
            stream
        }
        MetaOutcome::ShardMoving(stream)
        | MetaOutcome::StreamCreated(stream)
        | MetaOutcome::StreamActivated(stream)
        | MetaOutcome::StreamUpdated(stream)
        | MetaOutcome::StreamRemoved(stream)
        | MetaOutcome::StreamUndeleted(stream)
        | MetaOutcome::StreamDoomed(stream)
        | MetaOutcome::StreamForgotten(stream) => stream,
    };
    for shard in &stream.shards {
        let moving = shard.moving.iter().flat_map(|m| [m.from_group, m.to_group]);
        for id in moving.chain([shard.group_id]) {
            out.push(group_change(meta, GroupId::new(id)));
        }
    }
    if matches!(outcome, MetaOutcome::StreamForgotten(_)) {
        // Groups that were lost, and held nothing else, have successors: the newest there are.
        let newest = meta.groups().rev().take(stream.shards.len());
        out.extend(newest.cloned().map(MetaChange::Group));
    }
    // A remembered answer tells the stream as it was then: what it is now counts.
    if let Some(id) = StreamId::parse(&stream.stream_id) {
        out.push(match meta.stream(id) {
            Some(now) => MetaChange::Stream(now.clone()),
            None => MetaChange::StreamForgotten(id),
        });
    }
    out
}

fn group_change(meta: &MetaMachine, id: GroupId) -> MetaChange {
    match meta.group(id) {
        Some(group) => MetaChange::Group(group.clone()),
        None => MetaChange::GroupForgotten(id),
    }
}
