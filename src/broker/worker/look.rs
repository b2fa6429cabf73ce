//! What is under way and does not get on: who is told that, and when.

use super::{InFlight, NO_QUORUM, RELAY_PATIENCE, Waiting, Worker};
use crate::raft::ProposeError;
use crate::wire::internal as pb;

impl Worker {
    /// Looks at entries that do not get on: where there is no quorum, or no way to the leader's node, they end as unknown in
    /// time, and what waits behind them is refused. Twice in a row, as a node that stood still for a moment has heard of
    /// nobody either.
    pub(super) fn look(&mut self) {
        let group = self.group();
        let Some(front) = self.in_flight.front() else {
            return;
        };
        let lost = front.since.elapsed() >= NO_QUORUM
            && match front.to {
                None => self.router.without_quorum(group).is_some(),
                // The leader there knows whether it has a quorum, and says so.
                Some(node) => self.router.is_apart(node),
            };
        let lost_looks = if lost { self.lost_looks + 1 } else { 0 };
        let no_leader = || Err(ProposeError::NotLeader { group, leader: None }.into());
        // However slow the disks of a quorum are, nobody waits for ever who need not.
        let is_over = |f: &InFlight| f.since.elapsed() >= RELAY_PATIENCE;
        let is_late = is_over(front);
        self.lost_looks = lost_looks;
        match (lost_looks >= 2, is_late) {
            (true, true) => {}
            (true, false) | (false, true) => return self.tell_the_lone(),
            (false, false) => return,
        }
        for waiting in std::mem::take(&mut self.again) {
            self.conclude(waiting, no_leader());
        }
        while let Ok(Some(item)) = self.inbox.try_recv() {
            self.conclude(item.into(), no_leader());
        }
        while self.in_flight.front().is_some_and(is_over) {
            let Some(front) = self.in_flight.pop_front() else { break };
            if let Some(node) = front.to {
                self.router.lost(group, node);
            }
            for mut waiting in front.waiting {
                waiting.uncertain = true;
                self.conclude(waiting, no_leader());
            }
        }
    }

    /// Those without a producer's number are told at once: for them nothing is sent again. The others stay in their order,
    /// as an answer of theirs must not overtake one before it.
    fn tell_the_lone(&mut self) {
        let group = self.group();
        let no_leader = || Err(ProposeError::NotLeader { group, leader: None }.into());
        while let Ok(Some(item)) = self.inbox.try_recv() {
            self.again.push_back(item.into());
        }
        let queued = std::mem::take(&mut self.again);
        for waiting in queued {
            let is_late = waiting.submitted.elapsed() >= NO_QUORUM;
            match waiting.producer().is_none() && is_late {
                true => self.conclude(waiting, no_leader()),
                false => self.again.push_back(waiting),
            }
        }
        let mut told = Vec::new();
        for entry in self.in_flight.iter_mut().filter(|f| f.since.elapsed() >= NO_QUORUM) {
            for waiting in entry.waiting.iter_mut().filter(|w| w.producer().is_none()) {
                if let Some(reply) = waiting.reply.take() {
                    told.push(Waiting {
                        item: pb::PublishItem::default(),
                        submitted: waiting.submitted,
                        reply: Some(reply),
                        relayed: waiting.relayed,
                        uncertain: true,
                    });
                }
            }
        }
        for waiting in told {
            self.conclude(waiting, no_leader());
        }
    }
}
