//! What operators tell a cluster to do.

use std::time::Duration;

use prost::Message;
use tokio::time::Instant;

use super::{Operations, OrderError, PATIENCE};
use crate::base::RetryClass;
use crate::control::AdminError;
use crate::control::placement::plan;
use crate::control::reports::service::{HAND_OVER_MAX, hand_over};
use crate::control::reports::{Gathered, Picture};
use crate::machine::MetaOutcome;
use crate::model::{GroupId, NodeId, ReplicaId, TimeUs};
use crate::raft::transport::PeerMethod;
use crate::wire::{internal as pb, v1};
use pb::meta_command::Op;

/// How long a hand-over may take.
const HAND_OVER: Duration = Duration::from_secs(10);
/// How often the leader is looked for again, when it has changed meanwhile.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(100);

const _: () = assert!(HAND_OVER.as_micros() <= HAND_OVER_MAX.as_micros());

/// What an order is about: a shard or a group.
#[derive(Debug, Clone)]
pub enum Target {
    Shard(v1::ShardAddress),
    Group(GroupId),
}

impl Operations {
    async fn group_of(&self, target: &Target) -> Result<GroupId, OrderError> {
        match target {
            Target::Shard(address) => self.find_shard(address).await,
            Target::Group(group) => Ok(*group),
        }
    }

    /// Who leads a group, and the reports that say so.
    async fn find_leader(&self, record: &pb::GroupRecord) -> Result<NodeId, OrderError> {
        let group = GroupId::new(record.group_id);
        if self.groups().get(group).is_some_and(|g| g.status().is_leader) {
            return Ok(self.node());
        }
        let call = pb::NodeReportCall {
            groups: vec![record.group_id],
            ..pb::NodeReportCall::default()
        };
        let nodes = record.replicas.iter().map(|r| NodeId::new(r.node_id)).collect();
        let led = |gathered: &Gathered| Picture::of(gathered).leader(group).is_some();
        let gathered = self.gatherer.ask(nodes, &call, PATIENCE, led).await;
        let picture = Picture::of(&gathered);
        if let Some((node, _)) = picture.leader(group) {
            return Ok(node);
        }
        let names = self.names();
        let report = picture.group(record, &|n| names.of(n), &|_| None);
        Err(OrderError::Leaderless {
            group,
            have: report.quorum_have,
            voters: report.voters,
            need: report.quorum_need,
        })
    }

    /// Lets the leader of a group hand over.
    pub async fn step_down(&self, target: &Target, to: &str) -> Result<v1::StepDownResponse, OrderError> {
        let group = self.group_of(target).await?;
        let to = match to {
            "" => None,
            name => Some(self.find_node(name)?),
        };
        let begun = Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            let record = self.group_record(group)?;
            let to_replica = match &to {
                None => None,
                Some(node) => Some(replica_on(&record, node)?),
            };
            match self.hand_over_once(&record, to_replica, to.as_ref()).await {
                Ok(mut response) => {
                    response.took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                    return Ok(response);
                }
                // It does not lead any more, or nobody does yet.
                Err(e) if e.retry_class() == RetryClass::DidNotHappen && tries < TRIES => {
                    tokio::time::sleep(PAUSE).await;
                }
                Err(e) => return Err(e),
            }
        }
    }

    async fn hand_over_once(
        &self,
        record: &pb::GroupRecord,
        to_replica: Option<u64>,
        to: Option<&pb::NodeRecord>,
    ) -> Result<v1::StepDownResponse, OrderError> {
        let group = GroupId::new(record.group_id);
        let leader = self.find_leader(record).await?;
        if to.is_some_and(|to| to.node_id == leader.get()) {
            return Ok(v1::StepDownResponse {
                group_id: record.group_id,
                from_node: leader.get(),
                to_node: leader.get(),
                ..v1::StepDownResponse::default()
            });
        }
        let transfer = pb::TransferLeader {
            to_replica,
            patience_us: HAND_OVER.as_micros() as u64,
        };
        let answer = match self.groups().peers().filter(|_| leader != self.node()) {
            None => hand_over(self.groups(), group, &transfer).await?,
            Some(peers) => {
                let call = pb::GroupAdminCall {
                    group_id: record.group_id,
                    op: Some(pb::group_admin_call::Op::TransferLeader(transfer)),
                };
                let payload = call.encode_to_vec().into();
                let answer = peers
                    .call(leader, PeerMethod::GroupAdmin, payload, HAND_OVER + PATIENCE)
                    .await?;
                pb::GroupAdminAnswer::decode(answer).map_err(|e| OrderError::HandOver {
                    message: format!("the leader's answer is malformed: {e}"),
                    retry: RetryClass::MayHaveHappened,
                })?
            }
        };
        let node = |replica: u64| {
            record
                .replicas
                .iter()
                .find(|r| r.replica_id == replica)
                .map(|r| r.node_id)
        };
        Ok(v1::StepDownResponse {
            group_id: record.group_id,
            from_node: leader.get(),
            to_node: answer.leader_replica.and_then(node).unwrap_or_default(),
            term: answer.term,
            took_us: 0,
        })
    }

    /// Replaces one replica of a group by one on another node. Returns when the change is planned.
    pub async fn move_replica(
        &self,
        target: &Target,
        from: &str,
        to: &str,
        whole_group: bool,
        request_id: String,
    ) -> Result<v1::MoveReplicaResponse, OrderError> {
        let group = self.group_of(target).await?;
        if group == GroupId::META {
            return Err(OrderError::Invalid(
                "every node has a replica of the meta group: it cannot be moved; `mainstem shard leader step-down \
                 --group 1` lets another node lead it"
                    .into(),
            ));
        }
        let (from, to) = (self.find_node(from)?, self.find_node(to)?);
        let record = self.group_record(group)?;
        let replica = replica_on(&record, &from)?;
        if record.replicas.iter().any(|r| r.node_id == to.node_id) {
            return Err(OrderError::ReplicaThere { group, node: to.name });
        }
        if to.state() != pb::NodeState::Active {
            return Err(OrderError::Invalid(format!(
                "node {} is not active: it takes no replicas",
                to.name
            )));
        }
        if record.pooled && record.shards > 1 && !whole_group && matches!(target, Target::Shard(_)) {
            return Err(OrderError::Shared {
                group,
                shards: record.shards,
            });
        }
        let outcome = self
            .control
            .propose_meta(
                request_id,
                Op::PlanReplicaChange(pb::PlanReplicaChange {
                    group_id: record.group_id,
                    base_epoch: record.epoch,
                    add_nodes: vec![to.node_id],
                    remove_replicas: vec![replica],
                    reason: pb::ChangeReason::Move.into(),
                    why: format!("asked to move from {} to {}", from.name, to.name),
                }),
            )
            .await?;
        let MetaOutcome::GroupChanged(record) = outcome else {
            return Err(refused(outcome));
        };
        let gathered = Gathered::default();
        let names = self.names();
        let report = Picture::of(&gathered).group(&record, &|n| names.of(n), &|_| None);
        Ok(v1::MoveReplicaResponse {
            group_id: record.group_id,
            // What it waits for is not known before it has begun.
            change: report.change.map(|change| v1::ReplicaChangeReport {
                waiting_for: String::new(),
                ..change
            }),
        })
    }

    async fn change_node(&self, request_id: String, op: Op) -> Result<v1::Node, OrderError> {
        let outcome = self.control.propose_meta(request_id, op).await?;
        let MetaOutcome::NodeChanged(record) = outcome else {
            return Err(refused(outcome));
        };
        let gathered = self.gatherer.all(&pb::NodeReportCall::default(), PATIENCE).await;
        let mut nodes = self.nodes_of(&gathered, true);
        let at = nodes.iter().position(|node| node.node_id == record.node_id);
        let mut node = at.map(|at| nodes.swap_remove(at)).unwrap_or_default();
        // This node's view may be a little behind what was committed.
        node.node_id = record.node_id;
        node.name = record.name.clone();
        node.set_state(match record.state() {
            pb::NodeState::Active => v1::NodeState::Active,
            pb::NodeState::Draining => v1::NodeState::Draining,
            pb::NodeState::Removed => v1::NodeState::Removed,
        });
        Ok(node)
    }

    /// The node gives away what it has, and takes nothing new.
    pub async fn drain_node(&self, node: &str, request_id: String) -> Result<v1::Node, OrderError> {
        let node_id = self.find_node(node)?.node_id;
        self.change_node(request_id, Op::DrainNode(pb::DrainNode { node_id }))
            .await
    }

    /// The node takes leaders and replicas again.
    pub async fn undrain_node(&self, node: &str, request_id: String) -> Result<v1::Node, OrderError> {
        let node_id = self.find_node(node)?.node_id;
        self.change_node(request_id, Op::UndrainNode(pb::UndrainNode { node_id }))
            .await
    }

    /// Takes a node out for good.
    pub async fn remove_node(
        &self,
        node: &str,
        force: bool,
        accept_loss: bool,
        request_id: String,
    ) -> Result<v1::Node, OrderError> {
        let node_id = self.find_node(node)?.node_id;
        let call = pb::NodeReportCall {
            no_groups: true,
            ..pb::NodeReportCall::default()
        };
        let gathered = self.gatherer.all(&call, PATIENCE).await;
        let remove = pb::RemoveNode {
            node_id,
            force,
            accept_loss,
            unreachable_nodes: gathered.silent.keys().map(|node| node.get()).collect(),
            // Told by the meta group's leader.
            weak_groups: Vec::new(),
        };
        self.change_node(request_id, Op::RemoveNode(remove)).await
    }

    /// What the planner would do now, by what nodes tell this one.
    pub async fn plan(&self) -> v1::PlanResponse {
        let gathered = self.gatherer.all(&pb::NodeReportCall::default(), PATIENCE).await;
        let now = self.reporter.clock.monotonic_us();
        let reports = self.gatherer.for_planner(&gathered, now);
        let shape = self.view().shape().unwrap_or_default();
        let actions = plan(&shape, &reports, TimeUs::new(now));
        v1::PlanResponse {
            actions: actions
                .into_iter()
                .map(|action| v1::PlannedAction {
                    action: action.step.to_string(),
                    why: action.why,
                    blocked_by: action.blocked.unwrap_or_default(),
                    group_id: action.step.group().map(|g| g.get()),
                })
                .collect(),
            silent_nodes: self.silent(&gathered, &self.names()),
        }
    }
}

fn replica_on(record: &pb::GroupRecord, node: &pb::NodeRecord) -> Result<u64, OrderError> {
    let replica = record.replicas.iter().find(|r| r.node_id == node.node_id);
    replica
        .map(|replica| ReplicaId::new(replica.replica_id).get())
        .ok_or_else(|| OrderError::NoReplicaThere {
            group: GroupId::new(record.group_id),
            node: node.name.clone(),
        })
}

/// An answer that is not the one to the command.
fn refused(outcome: MetaOutcome) -> OrderError {
    if let MetaOutcome::Refused(refusal) = outcome {
        return OrderError::Admin(AdminError::Refused(refusal));
    }
    OrderError::Admin(AdminError::NotReady(
        "the meta group answered a command with something else".into(),
    ))
}
