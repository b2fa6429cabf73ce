//! The only user of openraft: type config, log store, state machine, group handle, registry.

mod codec;
mod group;
mod log_store;
mod network;
mod registry;
mod shard;
mod state_machine;
mod types;

#[cfg(test)]
mod tests;

pub use group::{BarrierError, Group, GroupStatus, Pending, ProposeError};
pub use registry::Groups;
pub use shard::{Positions, ShardDirectory, ShardShared};
pub use state_machine::{MetaChange, MetaObserver};
pub use types::Applied;
