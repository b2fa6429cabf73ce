//! A leader whose process has ended is replaced without waiting for its lease to end.
//!
//! A follower refuses votes until it has heard nothing of its leader for a while, because a leader that merely seems to be
//! gone would be disturbed for nothing. Where the session to the leader's node has ended and its peer listener refuses
//! connections there is nothing left to disturb: the follower gives up the lease, and asks the others, in turn, whether
//! they would vote for it. They would only if they have found the same: one broken link deposes nobody.
//!
//! Nothing rests on this being right. It is an election like any other, only an earlier one: terms, logs and votes are
//! looked at as always, and no read rests on a lease. See docs/decisions/0045.

use std::time::Duration;

use openraft::raft::TransferLeaderRequest;

use super::group::Group;
use super::members::members_of;
use crate::model::ReplicaId;

/// Before the first asks, so that the others have found out, too.
const BEGIN: Duration = Duration::from_millis(10);
/// Until it is the next one's turn: long enough for two rounds of votes with a sync each. Two at once could each vote for
/// itself; and the first may have less of the log than the second.
const TURN: Duration = Duration::from_millis(40);
/// How often each asks. Then, elections come as always, by time.
const ATTEMPTS: usize = 5;
/// No replica has this id.
const NOBODY: u64 = 0;

/// Finds a successor of the leader `dead`, whose process has ended.
pub(super) async fn succeed(group: Group, dead: ReplicaId) {
    let metrics = group.metrics();
    let voters = members_of(&metrics).voters;
    if metrics.current_leader != Some(dead.get()) || !voters.contains(&group.replica) {
        return;
    }
    let former = metrics.vote;
    // What a leader tells its followers when it hands over to one of them: its lease is over. Names nobody, so that
    // nobody is made a candidate by it.
    let over = TransferLeaderRequest::new(former, NOBODY, None);
    if group.raft().handle_transfer_leader(over).await.is_err() {
        // The replica has ended.
        return;
    }
    let heirs: Vec<ReplicaId> = voters.into_iter().filter(|id| *id != dead).collect();
    let Some(turn) = turn_of(&heirs, group.replica, group.id.get()) else {
        return;
    };
    tokio::time::sleep(BEGIN + TURN * turn).await;
    let round = TURN * u32::try_from(heirs.len()).unwrap_or(u32::MAX);
    for _ in 0..ATTEMPTS {
        // Somebody asks for votes, or leads, in a later term.
        if group.metrics().vote != former {
            return;
        }
        if group.raft().trigger().elect(true).await.is_err() {
            return;
        }
        tokio::time::sleep(round).await;
    }
}

/// When it is whose turn: another one is first from group to group, so that not all of them go to one node.
fn turn_of(heirs: &[ReplicaId], own: ReplicaId, group: u64) -> Option<u32> {
    let place = heirs.iter().position(|id| *id == own)?;
    let first = usize::try_from(group).unwrap_or(0) % heirs.len();
    u32::try_from((place + heirs.len() - first) % heirs.len()).ok()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_heir_has_a_turn_of_its_own() {
        for heirs in 1..6u64 {
            let ids: Vec<ReplicaId> = (1..=heirs).map(|n| ReplicaId::new(10 * n)).collect();
            let mut first = std::collections::BTreeSet::new();
            for group in 0..heirs {
                let mut turns: Vec<u32> = ids.iter().map(|id| turn_of(&ids, *id, group).unwrap()).collect();
                first.insert(turns.iter().position(|turn| *turn == 0).unwrap());
                turns.sort_unstable();
                let all: Vec<u32> = (0..u32::try_from(heirs).unwrap()).collect();
                assert_eq!(turns, all);
            }
            assert_eq!(first.len() as u64, heirs);
        }
        assert_eq!(turn_of(&[], ReplicaId::new(1), 3), None);
        assert_eq!(turn_of(&[ReplicaId::new(2)], ReplicaId::new(1), 3), None);
    }
}
