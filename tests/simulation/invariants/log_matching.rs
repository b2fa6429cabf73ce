//! Two logs with an entry of one index and term are the same up to there, and what one replica has applied at an index no
//! other applies otherwise.

use std::collections::BTreeMap;

use mainstem::model::{GroupId, ReplicaId};

use super::{Verdict, broken};

/// A term, as Raft has it: openraft's leader id.
pub type Leader = (u64, u64);

/// An entry: by which leader, and a digest of all of it.
pub type Entry = (Leader, u64);

#[derive(Default)]
pub struct LogMatching {
    applied: BTreeMap<(GroupId, u64), (Leader, ReplicaId)>,
}

impl LogMatching {
    /// A replica has applied the entry of that index and term.
    pub fn applied(&mut self, group: GroupId, index: u64, term: Leader, by: ReplicaId) -> Verdict {
        let (first, first_by) = *self.applied.entry((group, index)).or_insert((term, by));
        if first == term {
            return Ok(());
        }
        Err(broken(
            "one entry is applied at an index",
            format!("{group} #{index}: {first_by} applied that of term {first:?}, {by} that of term {term:?}"),
        ))
    }

    /// Two logs as they are on disk, by index.
    pub fn compare(
        &self,
        group: GroupId,
        a: (ReplicaId, &BTreeMap<u64, Entry>),
        b: (ReplicaId, &BTreeMap<u64, Entry>),
    ) -> Verdict {
        let common: Vec<(u64, Entry, Entry)> =
            a.1.iter()
                .filter_map(|(index, x)| Some((*index, *x, *b.1.get(index)?)))
                .collect();
        let Some(agree) = common.iter().rposition(|(_, x, y)| x.0 == y.0) else {
            return Ok(());
        };
        match common[..=agree].iter().find(|(_, x, y)| x != y) {
            None => Ok(()),
            Some((index, x, y)) => Err(broken(
                "log matching",
                format!(
                    "{group}: {} and {} agree at #{} but not at #{index}: terms {:?} and {:?}, digests {:x} and {:x}",
                    a.0, b.0, common[agree].0, x.0, y.0, x.1, y.1
                ),
            )),
        }
    }
}
