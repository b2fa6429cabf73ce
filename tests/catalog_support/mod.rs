//! A catalog that is applied to twice: by the machine that runs on, and by one that is loaded anew before each command.
#![allow(dead_code, clippy::unwrap_used)]

use mainstem::machine::{MetaMachine, MetaOutcome, MetaRefusal};
use mainstem::model::{GroupId, NodeId, StreamId};
use mainstem::wire::internal::v1::{self as pb, ReplicaRole, meta_command::Op};
use mainstem::wire::spec::normalise;
use mainstem::wire::v1::StreamSpec;

use crate::machine_support::Store;

pub struct Catalog {
    pub machine: MetaMachine,
    pub store: Store,
    pub time_us: u64,
}

impl Catalog {
    /// So many nodes.
    pub fn new(nodes: u64) -> Self {
        let mut catalog = Self {
            machine: MetaMachine::new(),
            store: Store::new(false),
            time_us: 1_000,
        };
        catalog.done(Op::InitCluster(pb::InitCluster {
            cluster_id: "c".into(),
            cluster_name: "test".into(),
            pool_groups: 2,
        }));
        for id in 1..=nodes {
            catalog.done(Op::JoinNode(node(id)));
        }
        catalog
    }

    /// Applies to the machine, and to one loaded from what was written before.
    pub fn apply(&mut self, op: Op) -> MetaOutcome {
        self.request("", op)
    }

    pub fn request(&mut self, request_id: &str, op: Op) -> MetaOutcome {
        self.time_us += 1;
        let command = pb::MetaCommand {
            time_us: self.time_us,
            request_id: request_id.into(),
            op: Some(op),
        };
        let copy = Store::new(false);
        copy.0.borrow_mut().meta = self.store.0.borrow().meta.clone();
        let again = load(&self.store).apply(&mut copy.clone(), &command).unwrap();
        let revision = self.machine.revision();
        let outcome = self.machine.apply(&mut self.store, &command).unwrap();
        assert_eq!(outcome, again);
        assert_eq!(copy.0.borrow().meta, self.store.0.borrow().meta);
        if matches!(outcome, MetaOutcome::Refused(_)) {
            assert_eq!(self.machine.revision(), revision, "what is refused changes nothing");
        }
        outcome
    }

    pub fn done(&mut self, op: Op) -> MetaOutcome {
        let text = format!("{op:?}");
        let outcome = self.apply(op);
        assert!(!matches!(outcome, MetaOutcome::Refused(_)), "{text}: {outcome:?}");
        outcome
    }

    pub fn refused(&mut self, op: Op) -> MetaRefusal {
        match self.apply(op) {
            MetaOutcome::Refused(refusal) => refusal,
            other => panic!("{other:?}"),
        }
    }

    pub fn node(&self, id: u64) -> pb::NodeRecord {
        pb::NodeRecord::clone(self.machine.node(NodeId::new(id)).unwrap())
    }

    pub fn group(&self, id: u64) -> pb::GroupRecord {
        pb::GroupRecord::clone(self.machine.group(GroupId::new(id)).unwrap())
    }

    /// A stream with one group of its own, formed.
    pub fn stream(&mut self, name: &str, replicas: u32, dedicated: bool) -> (String, u64, u64) {
        let id = self.time_us as u128;
        let spec = normalise(&StreamSpec {
            name: name.into(),
            replicas,
            dedicated,
            ..StreamSpec::default()
        });
        let created = self.done(Op::CreateStream(pb::CreateStream {
            stream_id: StreamId::new(id).to_string(),
            spec: Some(spec.unwrap()),
            unreachable_nodes: vec![],
        }));
        let MetaOutcome::StreamCreated(stream) = created else {
            panic!("{created:?}");
        };
        let stream_id = stream.stream_id.clone();
        self.done(Op::ActivateStream(pb::ActivateStream {
            stream_id: stream_id.clone(),
        }));
        let (group, shard) = (stream.shards[0].group_id, stream.shards[0].shard_id);
        if !self.group(group).formed {
            self.form(group);
        }
        (stream_id, shard, group)
    }

    pub fn form(&mut self, group: u64) {
        let voters = voters(&self.group(group));
        self.done(Op::GroupFormed(pb::GroupFormed {
            group_id: group,
            membership: membership(&voters, 1),
        }));
    }
}

pub fn load(store: &Store) -> MetaMachine {
    let state = store.0.borrow();
    let records = state
        .meta
        .iter()
        .map(|((kind, key), record)| (*kind, key.as_slice(), record.as_slice()));
    MetaMachine::load(records).unwrap()
}

pub fn node(id: u64) -> pb::JoinNode {
    pb::JoinNode {
        node_id: id,
        name: format!("node-{id}"),
        store_id: format!("store-{id}"),
        incarnation: 1,
        peer_address: format!("10.0.0.{id}:7422"),
        client_address: format!("10.0.0.{id}:7421"),
        zone: "a".into(),
        ..pb::JoinNode::default()
    }
}

pub fn voters(group: &pb::GroupRecord) -> Vec<u64> {
    let voters = group
        .replicas
        .iter()
        .filter(|replica| replica.role() == ReplicaRole::Voter);
    voters.map(|replica| replica.replica_id).collect()
}

pub fn membership(voters: &[u64], index: u64) -> Option<pb::GroupMembership> {
    Some(pb::GroupMembership {
        voters: voters.to_vec(),
        learners: vec![],
        index,
    })
}

pub fn change(group: &pb::GroupRecord, add: &[u64], remove: &[u64]) -> Op {
    Op::PlanReplicaChange(pb::PlanReplicaChange {
        group_id: group.group_id,
        base_epoch: group.epoch,
        add_nodes: add.to_vec(),
        remove_replicas: remove.to_vec(),
        ..pb::PlanReplicaChange::default()
    })
}
