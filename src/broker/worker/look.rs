//! What is under way and does not get on: who is told that, and when.

use std::collections::VecDeque;

use super::{InFlight, NO_QUORUM, RELAY_PATIENCE, Waiting, Worker};
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
                // The leader there knows whether it has a quorum, and says so, unless it stands still.
                Some(node) => self.router.is_apart(node) || self.router.is_silent(group),
            };
        let lost_looks = if lost { self.lost_looks + 1 } else { 0 };
        // However slow the disks of a quorum are, nobody waits for ever who need not.
        let is_over = |f: &InFlight| f.since.elapsed() >= RELAY_PATIENCE;
        let is_late = is_over(front);
        self.lost_looks = lost_looks;
        match (lost_looks >= 2, is_late) {
            (true, true) => {}
            (true, false) | (false, true) => return self.tell_the_late(),
            (false, false) => return,
        }
        for waiting in std::mem::take(&mut self.failed) {
            self.refuse(waiting);
        }
        while self.in_flight.front().is_some_and(is_over) {
            let Some(front) = self.in_flight.pop_front() else { break };
            if let Some(node) = front.to {
                self.router.lost(group, node);
            }
            for mut waiting in front.waiting {
                waiting.uncertain |= front.left;
                self.refuse(waiting);
            }
        }
        while let Some(waiting) = self.next() {
            self.refuse(waiting);
        }
    }

    /// Tells those that have waited for as long as is promised. What is under way stays so: its place in the order of entries
    /// is taken.
    fn tell_the_late(&mut self) {
        let is_late = |waiting: &Waiting| waiting.submitted.elapsed() >= NO_QUORUM;
        while let Ok(Some(item)) = self.inbox.try_recv() {
            self.again.push_back(item.into());
        }
        let (mut late, failed): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.failed).into_iter().partition(is_late);
        self.failed = failed;
        for entry in self.in_flight.iter_mut().filter(|f| f.since.elapsed() >= NO_QUORUM) {
            late.extend(entry.take_out(|_| true));
        }
        let (queued, again): (VecDeque<_>, VecDeque<_>) =
            std::mem::take(&mut self.again).into_iter().partition(is_late);
        self.again = again;
        for waiting in late.into_iter().chain(queued) {
            self.refuse(waiting);
        }
    }

    /// What a producer has under way behind a batch that ended as unknown ends with it: it may be answered at any moment, and
    /// that one only after it was sent again.
    pub(super) fn end_behind(&mut self, stamp: &pb::ProducerStamp) {
        let is_behind = |waiting: &Waiting| {
            waiting.stamp().is_some_and(|of| {
                (of.producer_id, of.epoch) == (stamp.producer_id, stamp.epoch) && of.sequence > stamp.sequence
            })
        };
        let mut behind = Vec::new();
        for entry in &mut self.in_flight {
            behind.extend(entry.take_out(is_behind));
        }
        for waiting in behind {
            self.refuse_behind(waiting);
        }
    }
}

impl InFlight {
    /// Takes out who is to be told now; the batches stay under way.
    fn take_out(&mut self, which: impl Fn(&Waiting) -> bool) -> Vec<Waiting> {
        let mut taken = Vec::new();
        for waiting in self.waiting.iter_mut().filter(|waiting| which(waiting)) {
            let Some(reply) = waiting.reply.take() else { continue };
            taken.push(Waiting {
                item: pb::PublishItem {
                    producer: waiting.item.producer,
                    ..pb::PublishItem::default()
                },
                submitted: waiting.submitted,
                reply: Some(reply),
                relayed: waiting.relayed,
                uncertain: waiting.uncertain || self.left,
            });
        }
        taken
    }
}
