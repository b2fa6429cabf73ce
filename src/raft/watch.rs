//! One watcher per replica: tells who leads, and stops a replica that sees that it was removed.

use std::sync::Weak;
use std::time::SystemTime;

use openraft::async_runtime::watch::WatchReceiver as _;
use tokio::sync::broadcast;

use super::group::Group;
use super::members::LeaderView;
use super::registry::Groups;
use super::types::StoredMembership;
use crate::base::metric_names as names;
use crate::model::{GroupId, ReplicaId, Term};

/// Something happened to a replica on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GroupEvent {
    /// Another replica leads, or nobody does.
    Leader {
        group: GroupId,
        term: Term,
        leader: Option<ReplicaId>,
    },
    /// The replica here is no member any more and was stopped.
    Removed { group: GroupId, replica: ReplicaId },
    /// The replica here has ended: it was told to, or met an error that the log names.
    Stopped { group: GroupId, replica: ReplicaId },
}

/// Runs until the replica ends.
pub(super) async fn watch(groups: Weak<Groups>, group: Group, events: broadcast::Sender<GroupEvent>) {
    // Nobody may be listening.
    let tell = |event| drop(events.send(event));
    let mut metrics = group.raft().server_metrics();
    let (id, replica) = (group.id, group.replica);
    let changes = metrics::counter!(names::RAFT_LEADER_CHANGES_TOTAL);
    // Whether a leader was known before: the first one is no change.
    let mut was_led = false;
    let mut was_member = false;
    loop {
        let now = metrics.borrow_watched().clone();
        let (term, leader) = (
            Term::new(now.vote.leader_id.term),
            now.current_leader.map(ReplicaId::new),
        );
        let changed = group.leader.send_if_modified(|view| {
            let changed = view.leader != leader || (leader.is_some() && view.term != term);
            if changed {
                *view = LeaderView {
                    term,
                    leader,
                    since: SystemTime::now(),
                };
            }
            changed
        });
        if changed {
            if let (Some(leader), Some(groups)) = (leader, groups.upgrade())
                && let Some(peers) = groups.peers()
            {
                peers.keep_up_with(leader);
            }
            if leader.is_some() && was_led {
                changes.increment(1);
            }
            was_led |= leader.is_some();
            tell(GroupEvent::Leader {
                group: id,
                term,
                leader,
            });
        }
        let names = |config: &StoredMembership| config.nodes().any(|(n, _)| *n == replica.get());
        // What a leader has proposed may be taken back by the next one: only what is committed makes a member of it.
        was_member |= names(&now.committed_membership_config);
        let committed = now.membership_config.log_id() == now.committed_membership_config.log_id();
        // A replica that catches up meets members of long ago, before it was one. One that leads still has to tell the
        // others that its removal is committed; openraft ends its leadership then.
        if was_member && !names(&now.membership_config) && committed && !now.state.is_leader() {
            tracing::info!(group = %id, %replica, "this replica was removed from its group");
            if let Some(groups) = groups.upgrade() {
                groups.stop(id).await;
            }
            tell(GroupEvent::Removed { group: id, replica });
            return;
        }
        if metrics.changed().await.is_err() {
            group.has_ended();
            if let Some(groups) = groups.upgrade() {
                groups.nudge(id);
            }
            tell(GroupEvent::Stopped { group: id, replica });
            return;
        }
    }
}
