//! Proposes expiry for the shards that this node leads, when it would do something, and only while the clocks agree:
//! a clock that jumped must not empty a stream.

use std::sync::Arc;
use std::time::Duration;

use prost::Message;
use tokio_util::sync::CancellationToken;

use super::Broker;
use crate::machine::GroupOutcome;
use crate::model::{ShardId, TimeUs};
use crate::raft::{Applied, Group};
use crate::wire::internal as pb;

/// How often deadlines are looked at: messages go at most this much after their age limit.
const EVERY: Duration = Duration::from_millis(250);

pub(super) async fn run(broker: Arc<Broker>, token: CancellationToken) {
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = token.cancelled() => return,
            _ = tick.tick() => {}
        }
        let Some(now) = broker.clock.expiry_now_us() else {
            continue;
        };
        for shard in broker.groups.directory().all() {
            if token.is_cancelled() {
                return;
            }
            let due = shard.positions().next_expiry.is_some_and(|at| at <= TimeUs::new(now)) && shard.heir().is_none();
            let leader = || broker.groups.get(shard.group()).filter(Group::leads);
            let Some(group) = due.then(leader).flatten() else {
                continue;
            };
            // One at a time, so that expiry never takes the log from publishes; as many as are needed to be done.
            broker.metrics.expiry_runs.increment(1);
            while expire(&group, shard.shard, now, broker.view.feature_level()).await && !token.is_cancelled() {}
        }
    }
}

/// Proposes one expiry. True if there is more to remove than one entry may.
async fn expire(group: &Group, shard: ShardId, now: u64, feature_level: u32) -> bool {
    let command = pb::GroupCommand {
        feature_level,
        op: Some(pb::group_command::Op::Expire(pb::Expire {
            shard_id: shard.get(),
            time_us: now,
        })),
    };
    let outcome = match group.propose(command.encode_to_vec().into()).await {
        Ok(mut pending) => pending.wait().await,
        Err(e) => Err(e),
    };
    match outcome {
        Ok((_, _, Applied::Command(GroupOutcome::Expired(expired)))) => expired.more,
        Ok(_) => false,
        Err(e) => {
            tracing::debug!(%shard, error = %e, "expiry was not proposed");
            false
        }
    }
}
