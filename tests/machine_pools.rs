//! Which groups streams share: by replicas and placement; and what becomes of a pool when nodes are lost.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm)]

mod catalog_support;
mod machine_support;

use catalog_support::Catalog;
use mainstem::machine::MetaRefusal;
use mainstem::model::{GroupId, StreamId};
use mainstem::wire::internal::v1::{self as pb, meta_command::Op};
use mainstem::wire::spec::normalise;
use mainstem::wire::v1::StreamSpec;

/// Pooled groups whose nodes are gone are made anew when they hold nothing, or hold nothing any more.
#[test]
fn a_lost_pool_is_made_anew() {
    let mut catalog = Catalog::new(4);
    let (stream, _, full) = catalog.stream("one", 1, false);
    let (_, _, three) = catalog.stream("three", 3, false);
    let pool = |catalog: &Catalog| -> Vec<(u64, u64)> {
        let single = catalog.machine.groups().filter(|g| g.pooled && g.replicas.len() == 1);
        single.map(|g| (g.group_id, g.replicas[0].node_id)).collect()
    };
    let before = pool(&catalog);
    assert!(
        before.len() == 2 && before.iter().all(|(_, node)| *node == 1),
        "{before:?}"
    );
    let epoch = catalog.machine.cluster().unwrap().meta.as_ref().unwrap().epoch;
    catalog.done(Op::SetMetaVoters(pb::SetMetaVoters {
        base_epoch: epoch,
        voters: (2..=4).map(|id| catalog.node(id).meta_replica_id).collect(),
    }));
    let remove = |accept_loss| {
        Op::RemoveNode(pb::RemoveNode {
            node_id: 1,
            force: true,
            accept_loss,
            unreachable_nodes: vec![2],
            weak_groups: Vec::new(),
        })
    };
    let refusal = catalog.refused(remove(false));
    assert!(matches!(refusal, MetaRefusal::WouldBreakQuorum { .. }), "{refusal}");
    catalog.done(remove(true));
    // The one that was empty has a successor on a node that lives; the other one holds what was lost.
    let after = pool(&catalog);
    assert_eq!(after.len(), 2);
    assert!(after.contains(&(full, 1)), "{after:?}");
    let (successor, at) = after.iter().find(|(id, _)| *id != full).unwrap();
    assert!(
        before.iter().all(|(id, _)| id != successor) && [3, 4].contains(at),
        "{after:?}"
    );
    assert!(catalog.machine.group(GroupId::new(three)).is_some(), "it has a quorum");
    // With its last stream it goes, too.
    catalog.done(Op::RemoveStream(pb::RemoveStream {
        namespace: "default".into(),
        name: "one".into(),
        grace_us: 0,
        expected_revision: None,
    }));
    for dropped in [false, true] {
        catalog.done(Op::ForgetStream(pb::ForgetStream {
            stream_id: stream.clone(),
            dropped,
        }));
    }
    let last = pool(&catalog);
    assert!(last.len() == 2 && last.iter().all(|(_, node)| *node != 1), "{last:?}");
    let listed = &catalog.machine.cluster().unwrap().pool_groups;
    assert!(last.iter().all(|(id, _)| listed.contains(id)) && !listed.contains(&full));
}

#[test]
fn pools_are_by_replicas_and_placement() {
    let mut catalog = Catalog::new(3);
    let (_, _, three) = catalog.stream("three", 3, false);
    let (_, _, again) = catalog.stream("again", 3, false);
    let (_, _, one) = catalog.stream("one", 1, false);
    assert!(catalog.group(three).pooled && catalog.group(one).pooled);
    assert_ne!(three, one);
    assert_eq!(catalog.group(again).replicas.len(), 3);
    let spec = normalise(&StreamSpec {
        name: "placed".into(),
        replicas: 3,
        placement: Some(mainstem::wire::v1::Placement {
            zones: vec!["b".into()],
            ..Default::default()
        }),
        ..StreamSpec::default()
    })
    .unwrap();
    let create = |spec: &StreamSpec, unreachable: &[u64]| {
        Op::CreateStream(pb::CreateStream {
            stream_id: StreamId::new(9_999).to_string(),
            spec: Some(spec.clone()),
            unreachable_nodes: unreachable.to_vec(),
        })
    };
    let refusal = catalog.refused(create(&spec, &[]));
    assert_eq!(
        refusal.to_string(),
        "3 replicas need 3 nodes: the cluster has 3, 3 of them live, 0 of those active and allowed by the placement; \
         add nodes, or ask for fewer replicas"
    );
    let any = StreamSpec {
        placement: None,
        ..spec
    };
    assert!(matches!(
        catalog.refused(create(&any, &[2])),
        MetaRefusal::NotEnoughNodes { live: 2, usable: 2, .. }
    ));
    catalog.done(create(&any, &[]));
}
