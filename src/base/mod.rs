//! What every layer may use: tasks and drain, bounded mailboxes, byte budgets, the clock, alarms, retry classes,
//! metric names, the principal of a request.

pub mod alarms;
pub mod budget;
pub mod clock;
pub mod mailbox;
pub mod metric_names;
pub mod net;
pub mod principal;
pub mod retry;
pub mod tasks;

pub use alarms::{Alarm, AlarmKind, Alarms};
pub use budget::{ByteBudget, BytePermit};
pub use clock::{Clock, ManualClock};
pub use mailbox::mailbox;
pub use principal::Principal;
pub use retry::RetryClass;
pub use tasks::Tasks;
