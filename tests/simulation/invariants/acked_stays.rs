//! What was acknowledged stays: every later leader has its entry, every read that begins later sees it, and in the end
//! every replica holds it, once, where the ack said. What was said not to have happened has not.

use std::collections::{BTreeMap, BTreeSet};

use mainstem::model::{GroupId, ReplicaId, Sequence, ShardId};

use super::log_matching::Leader;
use super::{Verdict, broken};

const NAME: &str = "what was acknowledged stays";

/// Stands for the term of an entry that was applied and purged.
pub const PURGED: Leader = (u64::MAX, u64::MAX);

/// An acknowledged message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ack {
    pub group: GroupId,
    pub shard: ShardId,
    /// Nothing: the ack did not say.
    pub sequence: Option<Sequence>,
    /// Index in the group's log, and term, of the entry that the ack names: that of the answer.
    pub entry: Option<(u64, Leader)>,
}

#[derive(Default)]
pub struct AckedStays {
    acks: BTreeMap<u64, Ack>,
    never: BTreeSet<u64>,
    tails: BTreeMap<ShardId, Sequence>,
}

impl AckedStays {
    /// A message was acknowledged.
    pub fn acked(&mut self, token: u64, ack: Ack) {
        if let Some(sequence) = ack.sequence {
            let tail = self.tails.entry(ack.shard).or_default();
            *tail = (*tail).max(sequence.plus(1));
        }
        self.acks.insert(token, ack);
    }

    /// A message was answered as not processed, and was not sent again.
    pub fn did_not_happen(&mut self, token: u64) {
        self.never.insert(token);
    }

    pub fn count(&self) -> usize {
        self.acks.len()
    }

    /// The tail that a linearizable read of the shard which begins now must see, at least.
    pub fn tail(&self, shard: ShardId) -> Sequence {
        self.tails.get(&shard).copied().unwrap_or(Sequence::FIRST)
    }

    /// A linearizable read has seen a tail.
    pub fn read(&self, shard: ShardId, at_least: Sequence, seen: Sequence) -> Verdict {
        if seen >= at_least {
            return Ok(());
        }
        Err(broken(
            "reads are linearizable",
            format!("{shard}: messages below {at_least} were acknowledged before, the read saw them below {seen}"),
        ))
    }

    /// A replica leads; `term_of` gives the term of its entry at an index ([`PURGED`]: it has applied and dropped it;
    /// nothing: it has none there).
    pub fn leads(
        &self,
        group: GroupId,
        replica: ReplicaId,
        in_term: Leader,
        mut term_of: impl FnMut(u64) -> Option<Leader>,
    ) -> Verdict {
        for (token, ack) in &self.acks {
            let Some((index, term)) = ack.entry.filter(|_| ack.group == group) else {
                continue;
            };
            if term > in_term {
                continue;
            }
            let found = term_of(index);
            if found != Some(term) && found != Some(PURGED) {
                return Err(broken(
                    NAME,
                    format!(
                        "{replica} leads {group} in term {in_term:?} without message {token}, acknowledged as #{index} of term \
                         {term:?}: it has {found:?} there"
                    ),
                ));
            }
        }
        Ok(())
    }

    /// What a replica holds of a shard in the end: sequence of each message.
    pub fn holds(&self, shard: ShardId, replica: ReplicaId, found: &BTreeMap<u64, Vec<Sequence>>) -> Verdict {
        let all = |token: &u64| found.get(token).map_or(&[][..], Vec::as_slice);
        for (token, ack) in self.acks.iter().filter(|(_, ack)| ack.shard == shard) {
            let at = all(token);
            if at.is_empty() || ack.sequence.is_some_and(|s| !at.contains(&s)) {
                return Err(broken(
                    NAME,
                    format!(
                        "message {token} was acknowledged at {:?} of {shard}, {replica} has it at {at:?}",
                        ack.sequence
                    ),
                ));
            }
        }
        if let Some((token, at)) = found.iter().find(|(_, at)| at.len() > 1) {
            return Err(broken(
                "a message is stored once",
                format!("{replica} holds message {token} of {shard} at {at:?}"),
            ));
        }
        match self.never.iter().find(|token| found.contains_key(token)) {
            None => Ok(()),
            Some(token) => Err(broken(
                "what did not happen has not",
                format!(
                    "message {token} of {shard} was answered as not processed, {replica} has it at {:?}",
                    all(token)
                ),
            )),
        }
    }
}
