//! A replica id has one owner, for ever: the store on which it ran first. Once it was removed from there it runs nowhere.

use std::collections::{BTreeMap, BTreeSet};

use mainstem::model::ReplicaId;

use super::{Verdict, broken};

const NAME: &str = "one owner of a replica id";

#[derive(Default)]
pub struct OneOwner {
    owners: BTreeMap<ReplicaId, u128>,
    gone: BTreeSet<ReplicaId>,
}

impl OneOwner {
    /// A replica runs on a store.
    pub fn runs(&mut self, replica: ReplicaId, store: u128) -> Verdict {
        if self.gone.contains(&replica) {
            return Err(broken(
                NAME,
                format!("{replica} was removed, and runs again on {store:032x}"),
            ));
        }
        let first = *self.owners.entry(replica).or_insert(store);
        if first == store {
            return Ok(());
        }
        Err(broken(
            NAME,
            format!("{replica} ran on store {first:032x} and runs on {store:032x}"),
        ))
    }

    /// What a replica had was removed, and with it what it promised.
    pub fn emptied(&mut self, replica: ReplicaId) {
        self.gone.insert(replica);
    }
}

#[test]
fn a_replica_id_that_runs_elsewhere_or_again_is_told() {
    let (a, b) = (ReplicaId::new(701), ReplicaId::new(702));
    let mut owners = OneOwner::default();
    assert_eq!(owners.runs(a, 1), Ok(()));
    assert_eq!(owners.runs(a, 1), Ok(()));
    assert_eq!(owners.runs(b, 1), Ok(()));
    assert!(owners.runs(a, 2).is_err(), "on another store");
    owners.emptied(b);
    assert!(owners.runs(b, 1).is_err(), "after it was removed");
}
