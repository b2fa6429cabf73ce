//! The catalog's answers on their way from its leader to another node, without loss.

use std::sync::Arc;

use crate::machine::{MetaOutcome, MetaRefusal};
use crate::model::{GroupId, Revision};
use crate::wire::internal as pb;
use pb::meta_result::Outcome;

/// For the wire.
pub(super) fn outcome_to_pb(outcome: &MetaOutcome) -> pb::MetaResult {
    let stream = |record: &Arc<pb::StreamRecord>| pb::StreamRecord::clone(record);
    let outcome = match outcome {
        MetaOutcome::ClusterInitialised {
            cluster,
            existed: false,
        } => Outcome::Initialised(pb::ClusterRecord::clone(cluster)),
        MetaOutcome::ClusterInitialised { cluster, existed: true } => {
            Outcome::InitialisedBefore(pb::ClusterRecord::clone(cluster))
        }
        MetaOutcome::NodeRegistered { node, changed: true } => Outcome::NodeRegistered(pb::NodeRecord::clone(node)),
        MetaOutcome::NodeRegistered { node, changed: false } => Outcome::NodeUnchanged(pb::NodeRecord::clone(node)),
        MetaOutcome::StreamCreated(record) => Outcome::StreamCreated(stream(record)),
        MetaOutcome::StreamExisted(record) => Outcome::StreamExisted(stream(record)),
        MetaOutcome::StreamActivated(record) => Outcome::StreamActivated(stream(record)),
        MetaOutcome::StreamUpdated(record) => Outcome::StreamUpdated(stream(record)),
        MetaOutcome::StreamRemoved(record) => Outcome::StreamRemoved(stream(record)),
        MetaOutcome::StreamUndeleted(record) => Outcome::StreamUndeleted(stream(record)),
        MetaOutcome::StreamDoomed(record) => Outcome::StreamDoomed(stream(record)),
        MetaOutcome::StreamForgotten(record) => Outcome::StreamForgotten(stream(record)),
        MetaOutcome::NodeChanged(node) => Outcome::NodeChanged(pb::NodeRecord::clone(node)),
        MetaOutcome::ClusterChanged(cluster) => Outcome::ClusterChanged(pb::ClusterRecord::clone(cluster)),
        MetaOutcome::GroupChanged(group) => Outcome::GroupChanged(pb::GroupRecord::clone(group)),
        MetaOutcome::ShardMoving(record) => Outcome::ShardMoving(stream(record)),
        MetaOutcome::ShardMoved {
            stream: record,
            from,
            to,
        } => Outcome::ShardMoved(pb::MetaShardMoved {
            stream: Some(stream(record)),
            from_group: from.get(),
            to_group: to.get(),
        }),
        MetaOutcome::Refused(refusal) => Outcome::Refused(refusal_to_pb(refusal)),
    };
    pb::MetaResult { outcome: Some(outcome) }
}

/// From the wire; `None`: of a later version.
pub(super) fn outcome_from_pb(result: pb::MetaResult) -> Option<MetaOutcome> {
    Some(match result.outcome? {
        Outcome::Initialised(cluster) => MetaOutcome::ClusterInitialised {
            cluster: Arc::new(cluster),
            existed: false,
        },
        Outcome::InitialisedBefore(cluster) => MetaOutcome::ClusterInitialised {
            cluster: Arc::new(cluster),
            existed: true,
        },
        Outcome::NodeRegistered(node) => MetaOutcome::NodeRegistered {
            node: Arc::new(node),
            changed: true,
        },
        Outcome::NodeUnchanged(node) => MetaOutcome::NodeRegistered {
            node: Arc::new(node),
            changed: false,
        },
        Outcome::StreamCreated(stream) => MetaOutcome::StreamCreated(Arc::new(stream)),
        Outcome::StreamExisted(stream) => MetaOutcome::StreamExisted(Arc::new(stream)),
        Outcome::StreamActivated(stream) => MetaOutcome::StreamActivated(Arc::new(stream)),
        Outcome::StreamUpdated(stream) => MetaOutcome::StreamUpdated(Arc::new(stream)),
        Outcome::StreamRemoved(stream) => MetaOutcome::StreamRemoved(Arc::new(stream)),
        Outcome::StreamUndeleted(stream) => MetaOutcome::StreamUndeleted(Arc::new(stream)),
        Outcome::StreamDoomed(stream) => MetaOutcome::StreamDoomed(Arc::new(stream)),
        Outcome::StreamForgotten(stream) => MetaOutcome::StreamForgotten(Arc::new(stream)),
        Outcome::NodeChanged(node) => MetaOutcome::NodeChanged(Arc::new(node)),
        Outcome::ClusterChanged(cluster) => MetaOutcome::ClusterChanged(Arc::new(cluster)),
        Outcome::GroupChanged(group) => MetaOutcome::GroupChanged(Arc::new(group)),
        Outcome::ShardMoving(stream) => MetaOutcome::ShardMoving(Arc::new(stream)),
        Outcome::ShardMoved(moved) => MetaOutcome::ShardMoved {
            stream: Arc::new(moved.stream?),
            from: GroupId::new(moved.from_group),
            to: GroupId::new(moved.to_group),
        },
        Outcome::Refused(refused) => MetaOutcome::Refused(refusal_from_pb(refused)?),
    })
}

/// A field of a refusal.
trait Field: Sized {
    fn put(&self, out: &mut pb::MetaRefused);
    fn take(from: &mut Fields) -> Option<Self>;
}

struct Fields {
    texts: std::vec::IntoIter<String>,
    numbers: std::vec::IntoIter<u64>,
}

impl Field for String {
    fn put(&self, out: &mut pb::MetaRefused) {
        out.texts.push(self.clone());
    }

    fn take(from: &mut Fields) -> Option<Self> {
        from.texts.next()
    }
}

/// Words that refusals name things by.
const WORDS: &[&str] = &[
    "nodes",
    "nodes, removed ones counted,",
    "streams",
    "in no known state",
    "still being created",
    "active",
    "removed",
];

impl Field for &'static str {
    fn put(&self, out: &mut pb::MetaRefused) {
        out.texts.push((*self).to_owned());
    }

    fn take(from: &mut Fields) -> Option<Self> {
        let text = from.texts.next()?;
        WORDS.iter().copied().find(|word| *word == text)
    }
}

impl Field for u64 {
    fn put(&self, out: &mut pb::MetaRefused) {
        out.numbers.push(*self);
    }

    fn take(from: &mut Fields) -> Option<Self> {
        from.numbers.next()
    }
}

impl Field for u32 {
    fn put(&self, out: &mut pb::MetaRefused) {
        out.numbers.push(u64::from(*self));
    }

    fn take(from: &mut Fields) -> Option<Self> {
        u32::try_from(from.numbers.next()?).ok()
    }
}

impl Field for Revision {
    fn put(&self, out: &mut pb::MetaRefused) {
        out.numbers.push(self.get());
    }

    fn take(from: &mut Fields) -> Option<Self> {
        from.numbers.next().map(Revision::new)
    }
}

macro_rules! refusals {
    ($($name:ident { $($field:ident),* })*) => {
        fn refusal_to_pb(refusal: &MetaRefusal) -> pb::MetaRefused {
            let mut out = pb::MetaRefused::default();
            match refusal {
                $(MetaRefusal::$name { $($field),* } => {
                    out.kind = stringify!($name).to_owned();
                    $($field.put(&mut out);)*
                })*
            }
            out
        }

        fn refusal_from_pb(from: pb::MetaRefused) -> Option<MetaRefusal> {
            let kind = from.kind;
            let mut fields = Fields {
                texts: from.texts.into_iter(),
                numbers: from.numbers.into_iter(),
            };
            $(if kind == stringify!($name) {
                $(let $field = Field::take(&mut fields)?;)*
                return Some(MetaRefusal::$name { $($field),* });
            })*
            let _ = &mut fields;
            None
        }
    };
}

refusals! {
    NotInitialised {}
    OtherCluster { cluster_id }
    NodeNameTaken { name, node_id }
    StaleIncarnation { node_id, known }
    OtherStore { node_id, known, found }
    StoreTaken { store_id, node_id }
    NodeRemoved { name, node_id }
    NodeTooOld { name, knows, now }
    NodeNotFound { node_id }
    BadNode { why }
    NodeHoldsReplicas { name, groups }
    WouldBreakQuorum { what, live, needed }
    VersionDown { asked, now }
    VersionNotKnown { asked, nodes }
    BadSettings { why }
    GroupNotFound { group_id }
    StaleEpoch { what, actual }
    InFlight { what }
    BadChange { why }
    TooMany { what, max }
    Differs { name, difference }
    SubjectsOverlap { ours, theirs, stream }
    NotEnoughNodes { wanted, nodes, live, usable }
    NotFound { name }
    RevisionMismatch { name, actual }
    Fixed { name, fields }
    NameTaken { name }
    GraceEnded { name }
    GraceNotEnded { name, removed_until_us }
    WrongState { name, state }
    BadSpec { why }
    RequestIdReused { request_id }
    RequestsFull {}
}

#[cfg(test)]
mod tests {
    use super::*;

    fn there_and_back(outcome: MetaOutcome) {
        let back = outcome_from_pb(outcome_to_pb(&outcome));
        assert_eq!(back, Some(outcome));
    }

    #[test]
    fn outcomes_and_refusals_come_back_as_they_were() {
        let stream = || {
            Arc::new(pb::StreamRecord {
                stream_id: "ab".into(),
                revision: 7,
                ..pb::StreamRecord::default()
            })
        };
        there_and_back(MetaOutcome::StreamCreated(stream()));
        there_and_back(MetaOutcome::StreamForgotten(stream()));
        there_and_back(MetaOutcome::ShardMoved {
            stream: stream(),
            from: GroupId::new(3),
            to: GroupId::new(4),
        });
        for existed in [true, false] {
            there_and_back(MetaOutcome::ClusterInitialised {
                cluster: Arc::default(),
                existed,
            });
            there_and_back(MetaOutcome::NodeRegistered {
                node: Arc::default(),
                changed: existed,
            });
        }
        let refusals = [
            MetaRefusal::NotInitialised,
            MetaRefusal::RequestsFull,
            MetaRefusal::SubjectsOverlap {
                ours: "a".into(),
                theirs: "b".into(),
                stream: "c".into(),
            },
            MetaRefusal::NotEnoughNodes {
                wanted: 3,
                nodes: 2,
                live: 1,
                usable: 0,
            },
            MetaRefusal::TooMany {
                what: "nodes",
                max: 1_000,
            },
            MetaRefusal::WrongState {
                name: "x".into(),
                state: "active",
            },
            MetaRefusal::RevisionMismatch {
                name: "x".into(),
                actual: Revision::new(9),
            },
        ];
        for refusal in refusals {
            there_and_back(MetaOutcome::Refused(refusal));
        }
        let newer = pb::MetaRefused {
            kind: "Unheard".into(),
            ..pb::MetaRefused::default()
        };
        assert_eq!(refusal_from_pb(newer), None);
    }
}
