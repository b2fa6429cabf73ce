//! Where a publisher's session should be: at the node that leads most of the stream's shards.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::wire::v1;

/// Between two moves to a leader's node.
const MOVE_EVERY: Duration = Duration::from_secs(3);

/// Who leads the stream's shards, as far as the server has told.
#[derive(Debug, Default)]
pub(super) struct Leaders {
    /// The node that serves the session.
    here: u64,
    by_shard: BTreeMap<u32, v1::ShardLeader>,
    /// Something was told, and the session is not known to be where it should be.
    unsettled: bool,
    /// When a move was last thought of.
    thought: Option<Instant>,
}

impl Leaders {
    pub(super) fn opened(&mut self, opened: &v1::PublishOpened) {
        self.here = opened.node_id;
        self.told(opened.leaders.clone());
    }

    pub(super) fn told(&mut self, leaders: Vec<v1::ShardLeader>) {
        self.unsettled |= !leaders.is_empty();
        self.by_shard.extend(leaders.into_iter().map(|l| (l.shard, l)));
    }

    /// The address of the node that leads most shards, if it leads more than the one that serves the session, and is
    /// worth a move now.
    pub(super) fn elsewhere(&mut self, now: Instant) -> Option<&str> {
        // An older server does not say which node it is. The common case is that there is nothing to do.
        if !self.unsettled || self.here == 0 {
            return None;
        }
        if self
            .thought
            .is_some_and(|at| now.saturating_duration_since(at) < MOVE_EVERY)
        {
            return None;
        }
        let mut counts: BTreeMap<u64, usize> = BTreeMap::new();
        for leader in self.by_shard.values() {
            *counts.entry(leader.node_id).or_default() += 1;
        }
        let led_here = counts.get(&self.here).copied().unwrap_or(0);
        let (node, count) = counts.into_iter().max_by_key(|(_, count)| *count)?;
        if count <= led_here {
            self.unsettled = false;
            return None;
        }
        self.thought = Some(now);
        let leader = self.by_shard.values().find(|l| l.node_id == node)?;
        Some(&leader.address)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(leaders: &mut Leaders, shards: &[(u32, u64)]) {
        let told = shards.iter().map(|&(shard, node_id)| v1::ShardLeader {
            shard,
            node_id,
            address: format!("n{node_id}"),
        });
        leaders.told(told.collect());
    }

    #[test]
    fn a_session_moves_to_the_node_that_leads_most_and_not_too_often() {
        let now = Instant::now();
        let mut leaders = Leaders::default();
        told(&mut leaders, &[(0, 2), (1, 2)]);
        assert_eq!(
            leaders.elsewhere(now),
            None,
            "an older server does not say which node it is"
        );
        leaders.opened(&v1::PublishOpened {
            node_id: 1,
            ..v1::PublishOpened::default()
        });
        assert_eq!(leaders.elsewhere(now), Some("n2"));
        assert_eq!(
            leaders.elsewhere(now + MOVE_EVERY / 2),
            None,
            "it was thought of just now"
        );
        // As many here as there: it stays, and thinks of it again when something new is told.
        told(&mut leaders, &[(1, 1)]);
        assert_eq!(leaders.elsewhere(now + MOVE_EVERY), None);
        told(&mut leaders, &[(2, 3), (3, 3)]);
        assert_eq!(leaders.elsewhere(now + MOVE_EVERY), Some("n3"));
    }
}
