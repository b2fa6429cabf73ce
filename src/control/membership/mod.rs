//! How a node becomes one of a cluster's: it and a member prove to each other that they hold the cluster's token, the
//! member has it entered into the catalog, and tells it who it is from then on.

mod client;
mod proof;
mod server;

pub use client::{JoinError, JoinFacts, Joined, Joining};
pub use server::JoinServer;

/// The version of the exchange.
const PROTOCOL: u32 = 1;
/// How long either side waits for the other's next step.
const STEP_MAX: std::time::Duration = std::time::Duration::from_secs(15);
