//! A term has at most one leader.
//!
//! What Raft calls a term is openraft's leader id here: a number and, within it, the replica, and of two of one number the
//! greater replica supersedes the other (`leader_id_adv`). So the replica that leads by an id must be the one in it.

use std::collections::BTreeMap;

use mainstem::model::{GroupId, ReplicaId, Term};

use super::{Verdict, broken};

#[derive(Default)]
pub struct OneLeader(BTreeMap<(GroupId, (Term, ReplicaId)), ReplicaId>);

impl OneLeader {
    /// A replica says that it leads, by a leader id of this number and replica.
    pub fn leads(&mut self, group: GroupId, id: (Term, ReplicaId), replica: ReplicaId) -> Verdict {
        let first = *self.0.entry((group, id)).or_insert(id.1);
        if first == replica {
            return Ok(());
        }
        Err(broken(
            "one leader per term",
            format!("{replica} leads {group} in {} of {first}", id.0),
        ))
    }
}
