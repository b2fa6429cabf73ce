//! Newtypes, subjects and filters, specs and limits, batches. No IO.

pub mod batch;
pub mod ids;
pub mod limits;
pub mod partition;
pub mod stored;
pub mod subject;

pub use batch::{BatchBuilder, BatchError, BatchView, Codec, RecordView};
pub use ids::{Epoch, GroupId, LogIndex, NodeId, ReplicaId, Revision, Sequence, ShardId, StreamId, Term, TimeUs};
pub use partition::{Partitioning, ShardMap, Slot};
pub use stored::StoredBatch;
pub use subject::{Filter, FilterSet, Subject};
