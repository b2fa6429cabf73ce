//! How the control plane of a node begins: alone, as the founder of a cluster, or as one of its nodes.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::executor::{self, Liveness, Orders};
use super::view::View;
use super::{AdminError, Control, meta, reconcile, version};
use crate::base::alarms::Alarms;
use crate::base::clock::Clock;
use crate::base::tasks::Tasks;
use crate::machine::MetaOutcome;
use crate::machine::placement::voters_of;
use crate::model::{GroupId, LogIndex, NodeId, ReplicaId};
use crate::raft::transport::Peers;
use crate::raft::{Groups, Origin, ProposeError};
use crate::wire::internal as pb;

/// How long a node waits for a group at its start.
pub(super) const START: Duration = Duration::from_secs(30);
/// How long a node with peers waits until it has heard of the leaders of its groups: it serves without, but not well.
const LEADERS: Duration = Duration::from_secs(3);
/// Between two attempts to tell the cluster of this start.
const REGISTER_EVERY: Duration = Duration::from_millis(250);
/// After the cluster has said no.
const REFUSED_EVERY: Duration = Duration::from_secs(15);
/// The newest cluster version that this binary knows.
const CLUSTER_VERSION_MAX: u32 = 1;

/// What a node brings when it starts.
#[derive(Debug, Clone)]
pub struct NodeFacts {
    pub node: NodeId,
    pub name: String,
    pub incarnation: u64,
    pub client_address: String,
    pub cluster_name: String,
    /// Groups shared by ordinary streams; fixed when the cluster is made.
    pub pool_groups: u32,
    /// The rest matters to nodes with peers.
    pub store_id: u128,
    pub peer_address: String,
    pub zone: String,
    pub tags: BTreeMap<String, String>,
    /// Fixed when the cluster is founded.
    pub replace_after: Duration,
}

impl NodeFacts {
    /// As the cluster is told.
    pub fn join_node(&self) -> pb::JoinNode {
        pb::JoinNode {
            node_id: self.node.get(),
            name: self.name.clone(),
            store_id: format!("{:032x}", self.store_id),
            incarnation: self.incarnation,
            peer_address: self.peer_address.clone(),
            client_address: self.client_address.clone(),
            zone: self.zone.clone(),
            tags: self.tags.clone(),
            cluster_version_max: CLUSTER_VERSION_MAX,
            binary_version: env!("CARGO_PKG_VERSION").to_owned(),
            ..pb::JoinNode::default()
        }
    }

    fn is_told(&self, known: &pb::NodeRecord) -> bool {
        known.incarnation == self.incarnation
            && known.store_id == format!("{:032x}", self.store_id)
            && known.peer_address == self.peer_address
            && known.client_address == self.client_address
            && known.zone == self.zone
            && known.tags == self.tags
            && known.cluster_version_max == CLUSTER_VERSION_MAX
            && known.name == self.name
    }
}

/// How the meta group of a node with peers begins.
#[derive(Debug, Clone)]
pub struct MetaStart {
    pub peers: Peers,
    pub cluster_id: String,
    pub replica: ReplicaId,
    /// The cluster begins, or has begun, with this node.
    pub founder: bool,
}

impl Control {
    /// The control plane of a node, which does nothing before it is [started](Self::start).
    pub fn new(
        view: Arc<View>,
        groups: Arc<Groups>,
        clock: Clock,
        alarms: Alarms,
        facts: NodeFacts,
        peers: Option<Peers>,
    ) -> Arc<Self> {
        Arc::new(Self {
            view,
            groups,
            clock,
            alarms,
            facts,
            peers,
            liveness: Liveness::default(),
            orders: Orders::default(),
            stopping: Default::default(),
        })
    }

    /// Starts the meta group and every group that has a replica here. Without peers, it makes the cluster on the first
    /// start, and returns when all groups lead and have applied their logs. With peers, it returns when the node knows
    /// of its cluster; data groups do not wait for the meta group's quorum.
    pub async fn start(self: &Arc<Self>, meta_start: Option<MetaStart>, tasks: &Tasks) -> Result<(), AdminError> {
        match meta_start {
            None => self.start_alone().await?,
            Some(start) => self.start_with_peers(start, tasks).await?,
        }
        tasks.spawn_vital("reconciler", reconcile::run(self.clone(), tasks.token()));
        Ok(())
    }

    async fn start_alone(&self) -> Result<(), AdminError> {
        // The meta group's replica on a node that founds a cluster is always replica 1.
        let meta = self.groups.start(GroupId::META, ReplicaId::new(1)).await?;
        meta.wait_ready(START).await?;
        self.found_cluster(uuid::Uuid::now_v7().simple().to_string()).await?;
        self.register_alone().await?;
        self.start_groups(true).await?;
        for group in self.groups.all() {
            group.wait_ready(START).await?;
        }
        Ok(())
    }

    async fn start_with_peers(self: &Arc<Self>, start: MetaStart, tasks: &Tasks) -> Result<(), AdminError> {
        meta::serve(self, &start.peers);
        let origin = match start.founder {
            true => Origin::Found([start.replica].into()),
            // Without effect on what its log holds.
            false => Origin::Join,
        };
        let meta = self.groups.start_as(GroupId::META, start.replica, origin).await?;
        if start.founder && self.view.cluster().is_none() {
            meta.wait_ready(START).await?;
            self.found_cluster(start.cluster_id).await?;
            let settings = pb::UpdateSettings {
                replace_after_us: Some(u64::try_from(self.facts.replace_after.as_micros()).unwrap_or(u64::MAX)),
                ..pb::UpdateSettings::default()
            };
            let op = pb::meta_command::Op::UpdateSettings(settings);
            if let MetaOutcome::Refused(refusal) = self.propose_meta(String::new(), op).await? {
                return Err(AdminError::Refused(refusal));
            }
            let op = pb::meta_command::Op::JoinNode(self.facts.join_node());
            if let MetaOutcome::Refused(refusal) = self.propose_meta(String::new(), op).await? {
                return Err(AdminError::Refused(refusal));
            }
        }
        tasks.spawn("registration", register(self.clone(), tasks.token()));
        let mut changes = self.view.watch();
        let known = async {
            while self.view.cluster().is_none() {
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        if tokio::time::timeout(START, known).await.is_err() {
            tracing::warn!("this node has heard nothing of its cluster yet: it serves nothing until it does");
        }
        self.start_groups(true).await?;
        let all = self.groups.all();
        let heard = futures_util::future::join_all(all.iter().map(|group| async move {
            let mut leader = group.watch_leader();
            // A replica that ends is told of elsewhere.
            let _ = leader.wait_for(|view| view.leader.is_some()).await;
        }));
        if tokio::time::timeout(LEADERS, heard).await.is_err() {
            tracing::warn!("not every group that has a replica here has a leader yet");
        }
        tasks.spawn_vital("cluster version", version::raise(self.clone(), tasks.token()));
        tasks.spawn_vital("executor", executor::lead(self.clone(), tasks.token()));
        tasks.spawn_vital("group duties", executor::serve_groups(self.clone(), tasks.token()));
        Ok(())
    }

    async fn found_cluster(&self, cluster_id: String) -> Result<(), AdminError> {
        if self.view.cluster().is_some() {
            return Ok(());
        }
        self.propose_meta(
            String::new(),
            pb::meta_command::Op::InitCluster(pb::InitCluster {
                cluster_id,
                cluster_name: self.facts.cluster_name.clone(),
                pool_groups: self.facts.pool_groups,
            }),
        )
        .await?;
        Ok(())
    }

    async fn register_alone(&self) -> Result<(), AdminError> {
        self.propose_meta(
            String::new(),
            pb::meta_command::Op::RegisterNode(pb::RegisterNode {
                node_id: self.facts.node.get(),
                name: self.facts.name.clone(),
                incarnation: self.facts.incarnation,
                client_address: self.facts.client_address.clone(),
            }),
        )
        .await?;
        Ok(())
    }

    /// A replica of the meta group that lost its vote has left it for a moment, and stopped; it is to come back as a
    /// learner.
    pub(super) async fn start_meta_again(&self) -> Result<(), ProposeError> {
        if self.groups.get(GroupId::META).is_some() {
            return Ok(());
        }
        let known = self.view.node(self.facts.node).filter(|node| node.meta_replica_id != 0);
        if let Some(node) = known {
            let replica = ReplicaId::new(node.meta_replica_id);
            self.groups.start_as(GroupId::META, replica, Origin::Join).await?;
        }
        Ok(())
    }

    /// Starts every group that has a replica on this node and does not run yet.
    /// What a start of the node finds damaged ends it.
    pub(super) async fn start_groups(&self, start: bool) -> Result<(), ProposeError> {
        for place in self.view.groups() {
            for (replica, node) in &place.replicas {
                if *node != self.facts.node || self.groups.get(place.group).is_some() {
                    continue;
                }
                if self.peers.is_none() {
                    self.groups.start(place.group, *replica).await?;
                } else if self.groups.is_other(place.group, *replica) {
                    // The reconciler removes what the former one has left, as soon as it is known to be removed.
                    tracing::debug!(group = %place.group, %replica, "a former replica's data is in the way yet");
                } else {
                    let origin = self.origin(place.group, *replica);
                    let floor = self.view.group_record(place.group).map_or(0, |record| record.log_floor);
                    let damage = self.groups.damage_found();
                    let started = self
                        .groups
                        .start_at(place.group, *replica, origin, LogIndex::new(floor))
                        .await;
                    if let Err(error) = started {
                        if start && self.groups.damage_found() > damage {
                            return Err(error);
                        }
                        // The others go on.
                        tracing::error!(group = %place.group, %replica, %error, "a replica could not be started");
                    }
                }
            }
        }
        Ok(())
    }

    /// A group that was never formed is founded by all of its first voters; to one that was, a new replica comes empty.
    fn origin(&self, group: GroupId, replica: ReplicaId) -> Origin {
        let Some(record) = self.view.group_record(group) else {
            return Origin::Join;
        };
        let voters = voters_of(&record).map(|replica| ReplicaId::new(replica.replica_id));
        let voters: std::collections::BTreeSet<_> = voters.collect();
        match !record.formed && record.change.is_none() && voters.contains(&replica) {
            true => Origin::Found(voters),
            false => Origin::Join,
        }
    }
}

/// Tells the cluster of this start of the node: where it listens now, and its incarnation.
async fn register(control: Arc<Control>, token: CancellationToken) {
    let mut last = String::new();
    loop {
        let known = control.view.node(control.facts.node);
        if known.is_some_and(|known| control.facts.is_told(&known)) {
            return;
        }
        let op = pb::meta_command::Op::JoinNode(control.facts.join_node());
        let asked = token.run_until_cancelled(control.propose_meta(String::new(), op)).await;
        let pause = match asked {
            None => return,
            Some(Ok(MetaOutcome::NodeRegistered { .. })) => return,
            Some(Ok(MetaOutcome::Refused(refusal))) => {
                tracing::error!(%refusal, "the cluster does not take this node back");
                REFUSED_EVERY
            }
            Some(Ok(_)) => REFUSED_EVERY,
            Some(Err(error)) => {
                let text = error.to_string();
                if text != last {
                    tracing::warn!(
                        error = text,
                        "the cluster cannot be told of this start yet; it is tried again"
                    );
                    last = text;
                }
                REGISTER_EVERY
            }
        };
        if token.run_until_cancelled(tokio::time::sleep(pause)).await.is_none() {
            return;
        }
    }
}
