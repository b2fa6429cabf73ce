//! Where replicas go: the cluster as far as that needs it ([`ClusterShape`]), and [`place`], a pure function that chooses
//! nodes and tells its reasons. The catalog places new groups with it; the planner of the control plane everything else.

mod choose;
mod shape;

pub use choose::{Choice, Request, Verdict, VerdictKind, place};
pub(in crate::machine) use shape::wanted_replicas;
pub use shape::{
    ChangeShape, ClusterShape, GroupShape, MetaShape, MoveShape, NodeShape, Nodes, ReplicaShape, Settings, SplitShape,
    is_lost, voters_of,
};
