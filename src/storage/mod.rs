//! Storage: the only user of RocksDB. Two databases per node, `log/` and `state/`, written to twice and synced once.
//!
//! | file | what |
//! |------|------|
//! | `store.rs` | opening, checking, closing a data directory |
//! | `lock.rs`, `identity.rs` | one process per directory; which store and format it is |
//! | `renewal.rs` | damage that was noted, and a store that begins anew |
//! | `engine.rs` | every RocksDB option and why |
//! | `keys.rs`, `record.rs`, `envelope.rs`, `offsets.rs` | the disk format |
//! | `queue.rs`, `committer.rs` | the one writer of log/: many groups, one sync |
//! | `witness.rs`, `wal_check.rs`, `log_open.rs` | a log that lost something knows it |
//! | `manifest_check.rs` | a damaged manifest that RocksDB would read for ever |
//! | `log.rs` | Raft entries, votes, purge markers |
//! | `state.rs`, `state_batch.rs`, `state_read.rs` | applied state: writing, flushing, reading |
//! | `state_export.rs`, `state_pieces.rs` | the state of one group, for another node |
//! | `state_stage.rs`, `staged_file.rs`, `state_compare.rs`, `state_install.rs` | the same from another node: receiving it, what need not travel, the switch |
//! | `floors.rs`, `reclaim.rs` | trims, and giving their space back |
//! | `upkeep.rs`, `space.rs` | background threads, free space |
//!
//! A data directory: `LOCK`, `FORMAT`, `IDENTITY`, `witness`, `clock`, `cluster`, `log/`, `state/`, `incoming/` for snapshots that
//! are being received, and `aside/` for bytes that were cut off or set aside and are kept for inspection; `DAMAGED` where damage
//! was found, `RENEWAL` and `damaged-*/` where the node began anew for it.

mod clock_file;
mod cluster_file;
mod committer;
mod crc32c;
mod engine;
mod envelope;
mod error;
mod floors;
#[cfg(test)]
mod golden;
mod identity;
pub mod keys;
mod lock;
mod log;
mod log_open;
mod manifest_check;
pub mod metric_names;
mod offsets;
mod options;
mod queue;
mod reclaim;
mod record;
mod renewal;
mod shared;
mod slots;
mod space;
mod staged_file;
mod state;
mod state_batch;
mod state_compare;
mod state_export;
mod state_install;
mod state_pieces;
mod state_read;
mod state_stage;
mod store;
mod upkeep;
mod wal_check;
mod witness;

pub use clock_file::{ClockFile, last_time_us};
pub use cluster_file::{ClusterHints, HintsError, PeerHint, SeenStore};
pub use error::{Area, OpenError, Poison, StorageError};
pub use floors::Floors;
pub use identity::{Identity, STARTS_MAX};
pub use log::{LogDb, LogMeta};
pub use options::StoreOptions;
pub use queue::Done;
pub use renewal::{Renewal, note_damage, noted_damage};
pub use shared::DamageNote;
pub use space::{Space, held_and_free};
pub use state::StateDb;
pub use state_batch::StateBatch;
pub use state_compare::Compared;
pub use state_export::{Exported, ExportedShards, GroupView};
pub use state_pieces::{Digest, PIECE_BYTES, Piece, Place, Stretch, united};
pub use state_read::BatchScan;
pub use state_stage::{Finish, Received, StageError, StagedGroup, Staging};
pub use store::Store;
