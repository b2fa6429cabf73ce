//! The cluster's version rises by itself as soon as every node knows the next one. What is new in a version is written
//! only once it is in force; a node that does not know the version in force is not taken in.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Control;
use crate::model::GroupId;
use crate::wire::internal as pb;

/// After a proposal that did not get through.
const AGAIN: Duration = Duration::from_secs(5);

/// What a node told; one that did not tell knows what was there before there were versions.
pub(super) fn knows(node: &pb::NodeRecord) -> u32 {
    node.cluster_version_max.max(1)
}

/// The newest version that every node knows, and the newest that any knows.
pub(super) fn known(nodes: &[pb::NodeRecord]) -> (u32, u32) {
    let present = || nodes.iter().filter(|node| node.state() != pb::NodeState::Removed);
    let all = present().map(knows).min().unwrap_or(1);
    let any = present().map(knows).max().unwrap_or(1);
    (all, any)
}

/// Runs until cancelled; does something while this node leads the meta group.
pub(super) async fn raise(control: Arc<Control>, token: CancellationToken) {
    let mut changes = control.view.watch();
    loop {
        changes.borrow_and_update();
        let leads = control.groups.get(GroupId::META).is_some_and(|meta| meta.leads());
        let now = control.view.cluster().map(|cluster| cluster.cluster_version.max(1));
        let (all, _) = known(&control.view.nodes());
        if leads && now.is_some_and(|now| all > now) {
            let op = pb::meta_command::Op::SetClusterVersion(pb::SetClusterVersion { version: all });
            if control.tell_catalog("raising the cluster version", op).await {
                tracing::info!(version = all, "every node knows this cluster version: it is in force");
            }
        }
        // Nodes come and go by changes of the catalog; who leads it changes without one.
        let wait = tokio::time::timeout(AGAIN, changes.changed());
        if token.run_until_cancelled(wait).await.is_none() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_node_counts() {
        let node = |version, removed| pb::NodeRecord {
            cluster_version_max: version,
            state: match removed {
                true => pb::NodeState::Removed,
                false => pb::NodeState::Active,
            }
            .into(),
            ..pb::NodeRecord::default()
        };
        assert_eq!(known(&[]), (1, 1));
        assert_eq!(known(&[node(0, false), node(3, false)]), (1, 3));
        assert_eq!(known(&[node(2, false), node(3, false), node(1, true)]), (2, 3));
    }
}
