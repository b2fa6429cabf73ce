//! The only user of openraft: type config, log store, state machine, group handle, registry, and the transport between
//! nodes.

mod catalog;
mod codec;
mod group;
mod load;
mod log_store;
mod members;
mod purge;
mod recording;
mod registry;
mod shard;
mod snapshot;
mod state_machine;
mod succession;
mod trail;
pub mod transport;
mod types;
mod watch;

#[cfg(test)]
mod tests;

pub use catalog::{MetaChange, MetaObserver};
pub use group::{BarrierError, Group, GroupStatus, Origin, Pending, ProposeError, RaftTimings};
pub use members::{ChangeError, Freshness, GroupReport, LeaderView, Members, ReplicaReport};
pub use purge::LogKeep;
pub use registry::{Groups, GroupsOptions};
pub use shard::{Positions, ShardDirectory, ShardShared};
pub use trail::LogLag;
pub use types::Applied;
pub use watch::GroupEvent;
