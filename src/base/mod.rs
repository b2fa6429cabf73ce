//! What every layer may use: tasks and drain, bounded mailboxes, byte budgets, the clock, alarms, retry classes,
//! metric names, the principal of a request, errors with their causes, work that blocks.

pub mod alarms;
pub mod blocking;
pub mod budget;
pub mod clock;
mod error_chain;
pub mod mailbox;
pub mod metric_names;
pub mod net;
pub mod principal;
pub mod retry;
pub mod tasks;

pub use alarms::{Alarm, AlarmKind, Alarms};
pub use budget::{ByteBudget, BytePermit};
pub use clock::{Clock, ManualClock};
pub use error_chain::error_chain;
pub use mailbox::mailbox;
pub use principal::Principal;
pub use retry::RetryClass;
pub use tasks::Tasks;
