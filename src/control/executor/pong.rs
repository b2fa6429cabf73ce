//! What a node tells the meta group's leader, and the orders it takes from it.

use std::collections::BTreeSet;
use std::time::Duration;

use crate::control::Control;
use crate::control::meta::QUORUM_AGE;
use crate::model::{GroupId, ReplicaId, ShardId};
use crate::wire::internal as pb;

use super::duties;

/// How long the leaders are not balanced against an order.
const ORDER_HOLDS: Duration = Duration::from_secs(600);

impl Control {
    /// The answer to a ping; its orders are begun.
    pub(in crate::control) async fn pong(&self, ping: &pb::NodePing) -> pb::NodePong {
        if let Some(order) = &ping.flush {
            return pb::NodePong {
                flushed: self.flush(order).await,
                ..pb::NodePong::default()
            };
        }
        for order in &ping.orders {
            self.obey(order);
        }
        if !ping.orders.is_empty() {
            return pb::NodePong::default();
        }
        let faults = self.groups.faults();
        let mut pong = pb::NodePong {
            damaged: faults.iter().map(|(_, replica, _)| replica.get()).collect(),
            stopping: self.is_stopping(),
            ..pb::NodePong::default()
        };
        let directory = self.groups.directory();
        pong.bytes = directory.all().iter().map(|shard| shard.positions().bytes).sum();
        for group in self.groups.all() {
            if group.was_ordered(ORDER_HOLDS) {
                pong.handed_over.push(group.id.get());
            }
            let report = group.report();
            let leads = group.leads_quorum(QUORUM_AGE);
            pong.groups.push(pb::GroupPong {
                group_id: group.id.get(),
                replica_id: group.replica.get(),
                purged: report.purged.map(|index| index.get()),
                current: match leads {
                    true => duties::current(&group).into_iter().map(ReplicaId::get).collect(),
                    false => Vec::new(),
                },
                leads,
            });
        }
        // A leader that is new may not have applied yet what it will be asked for.
        let asked: BTreeSet<GroupId> = ping.shards.iter().map(|place| GroupId::new(place.group_id)).collect();
        let mut sure = BTreeSet::new();
        for id in asked {
            if let Some(group) = self.groups.get(id).filter(|group| group.leads_quorum(QUORUM_AGE))
                && group.read_barrier().await.is_ok()
            {
                sure.insert(id);
            }
        }
        for place in &ping.shards {
            if !sure.contains(&GroupId::new(place.group_id)) {
                continue;
            }
            let shard = directory.get(ShardId::new(place.shard_id));
            match shard.is_some_and(|shard| shard.group().get() == place.group_id && !shard.positions().removed) {
                true => pong.shards_here.push(place.shard_id),
                false => pong.shards_gone.push(place.shard_id),
            }
        }
        pong
    }

    /// Begins an order, if the group is led here. What fails is ordered again.
    fn obey(&self, order: &pb::LeaderOrder) {
        let Some(group) = self.groups.get(GroupId::new(order.group_id)) else {
            return;
        };
        if !group.status().is_leader {
            return;
        }
        self.orders.transfer(group.id, ReplicaId::new(order.transfer_to));
    }
}
