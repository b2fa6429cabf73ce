//! What nodes say of themselves and their replicas, and what that tells of the cluster.
//!
//! | file | what |
//! |------|------|
//! | `mod.rs` | a node's own report |
//! | `service.rs` | serving it to peers, and what they may tell the groups here to do |
//! | `gather.rs` | the reports of all nodes, as far as they answer |
//! | `picture.rs` | what the catalog and those reports together say of groups and shards |
//! | `problems.rs` | what is wrong |
//! | `events.rs` | the difference between two pictures |

pub(super) mod events;
mod gather;
mod picture;
pub(super) mod problems;
pub(super) mod service;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::view::View;
use crate::base::alarms::Alarms;
use crate::base::clock::Clock;
use crate::model::{GroupId, NodeId};
use crate::raft::{Group, Groups};
use crate::storage::Store;
use crate::wire::internal as pb;

pub use events::Watcher;
pub use gather::{Gathered, Gatherer, LOOK_EVERY};
pub use picture::{Picture, meta_record};

/// A replica that lacks no more entries than this has nearly everything.
pub const CURRENT_LAG_MAX: u64 = 256;
/// Who has answered a leader within this time counts for its quorum.
pub const ACK_FRESH: Duration = Duration::from_secs(3);

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// What this node knows of itself.
pub struct Reporter {
    pub(super) node: NodeId,
    pub(super) incarnation: u64,
    pub(super) groups: Arc<Groups>,
    pub(super) view: Arc<View>,
    pub(super) store: Arc<Store>,
    pub(super) alarms: Alarms,
    pub(super) clock: Clock,
}

impl Reporter {
    /// What it can tell now.
    pub fn report(&self, call: &pb::NodeReportCall) -> pb::NodeReport {
        let space = self.store.space();
        let mut report = pb::NodeReport {
            node_id: self.node.get(),
            incarnation: self.incarnation,
            time_us: self.clock.now_us(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            free_bytes: space.free,
            used_bytes: space.held,
            alarms: self.alarms.names().into_iter().map(str::to_owned).collect(),
            revision: self.view.cluster().map_or(0, |cluster| cluster.revision),
            ..pb::NodeReport::default()
        };
        if call.no_groups {
            return report;
        }
        let wanted: HashSet<u64> = call.groups.iter().copied().collect();
        let is_wanted = |group: u64| wanted.is_empty() || wanted.contains(&group);
        let mut shards: HashMap<u64, Vec<pb::ShardState>> = HashMap::new();
        let mut group_bytes: HashMap<GroupId, u64> = HashMap::new();
        for shard in self.groups.directory().all() {
            let at = shard.positions();
            report.bytes += at.bytes;
            *group_bytes.entry(shard.group()).or_default() += at.bytes;
            if call.shards && is_wanted(shard.group().get()) && !at.removed {
                shards.entry(shard.group().get()).or_default().push(pb::ShardState {
                    shard_id: shard.shard.get(),
                    floor: at.floor.get(),
                    tail: at.tail.get(),
                    messages: at.messages,
                    bytes: at.bytes,
                    first_time_us: at.first_time.map(|t| t.get()),
                    last_time_us: at.last_time.map(|t| t.get()),
                    revision: at.revision.get(),
                });
            }
        }
        for group in self.groups.all().iter().filter(|group| is_wanted(group.id.get())) {
            let mut state = state_of(group);
            state.shards = shards.remove(&group.id.get()).unwrap_or_default();
            report.groups.push(state);
        }
        if let Some(peers) = self.groups.peers() {
            report.transfers = peers
                .transfers()
                .iter()
                .map(|transfer| pb::TransferState {
                    group_id: transfer.group.get(),
                    to_replica: transfer.to.get(),
                    sent_bytes: transfer.bytes,
                    running_us: micros(transfer.running_for),
                    // Until the receiver has compared: what is sent is the batches, and little else.
                    total_bytes: match transfer.total_bytes {
                        0 => group_bytes.get(&transfer.group).copied().unwrap_or(0),
                        known => known,
                    },
                })
                .collect();
        }
        report
    }
}

fn state_of(group: &Group) -> pb::GroupState {
    let report = group.report();
    let since = report.leader.since.duration_since(UNIX_EPOCH);
    pb::GroupState {
        group_id: group.id.get(),
        replica_id: group.replica.get(),
        term: report.status.term.get(),
        is_leader: report.status.is_leader,
        leader_replica: report.status.leader.map(|r| r.get()),
        leader_since_us: since.map_or(0, micros),
        voters: report.members.voters.iter().map(|r| r.get()).collect(),
        learners: report.members.learners.iter().map(|r| r.get()).collect(),
        joint: report.members.joint,
        last_log: report.status.last_log.map(|i| i.get()),
        last_applied: report.status.last_applied.map(|i| i.get()),
        purged: report.purged.map(|i| i.get()),
        quorum_ack_ago_us: report.last_quorum_ack.map(micros),
        followers: report
            .replicas
            .iter()
            .map(|replica| pb::FollowerState {
                replica_id: replica.replica.get(),
                voter: replica.voter,
                lag: replica.lag,
                lag_bytes: replica.lacks.bytes,
                lag_us: micros(replica.lacks.time),
                ack_ago_us: replica.last_ack.map(micros),
                matched: replica.matched.map(|i| i.get()),
            })
            .collect(),
        shards: Vec::new(),
    }
}

/// The wall clock, for what only people read.
fn wall_us() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, micros)
}
