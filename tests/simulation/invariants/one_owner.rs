//! A replica id has one owner, for ever: the store on which it ran first.

use std::collections::BTreeMap;

use mainstem::model::ReplicaId;

use super::{Verdict, broken};

#[derive(Default)]
pub struct OneOwner(BTreeMap<ReplicaId, u128>);

impl OneOwner {
    /// A replica runs on a store.
    pub fn runs(&mut self, replica: ReplicaId, store: u128) -> Verdict {
        let first = *self.0.entry(replica).or_insert(store);
        if first == store {
            return Ok(());
        }
        Err(broken(
            "one owner of a replica id",
            format!("{replica} ran on store {first:032x} and runs on {store:032x}"),
        ))
    }
}
