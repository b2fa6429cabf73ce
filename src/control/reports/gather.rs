//! The reports of all nodes: asked for at once, taken as far as they come in time.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use parking_lot::Mutex;
use prost::Message;
use tokio_util::sync::CancellationToken;

use super::{Reporter, micros, wall_us};
use crate::model::NodeId;
use crate::raft::transport::PeerMethod;
use crate::wire::internal as pb;
use pb::NodeState;

/// How often a node looks whether the others are there, so that it can tell since when one is not.
pub const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What nodes answered.
#[derive(Debug, Clone, Default)]
pub struct Gathered {
    /// When it was complete, by this node's clock.
    pub time_us: u64,
    /// The node that asked.
    pub by: NodeId,
    pub reports: BTreeMap<NodeId, pb::NodeReport>,
    /// Nodes that did not answer, and why.
    pub silent: BTreeMap<NodeId, String>,
    /// Nodes that were not asked.
    pub partial: bool,
}

/// Asks nodes for their reports, and remembers when each was heard of last.
pub struct Gatherer {
    reporter: Arc<Reporter>,
    heard: Mutex<HashMap<NodeId, u64>>,
}

impl Gatherer {
    pub(in crate::control) fn new(reporter: Arc<Reporter>) -> Self {
        Self {
            reporter,
            heard: Mutex::default(),
        }
    }

    /// When a node was heard of last by this one, in microseconds since the Unix epoch.
    pub fn heard_us(&self, node: NodeId) -> Option<u64> {
        self.heard.lock().get(&node).copied()
    }

    /// Every node that was not removed.
    fn present(&self) -> Vec<NodeId> {
        let nodes = self.reporter.view.nodes();
        nodes
            .iter()
            .filter(|node| node.state() != NodeState::Removed)
            .map(|node| NodeId::new(node.node_id))
            .collect()
    }

    /// Asks every node, and waits for all that answer within `patience`.
    pub async fn all(&self, call: &pb::NodeReportCall, patience: Duration) -> Gathered {
        self.ask(self.present(), call, patience, |_| false).await
    }

    /// Asks these nodes, until `enough` of what has come, or all have answered, or `patience` is over.
    pub async fn ask(
        &self,
        nodes: Vec<NodeId>,
        call: &pb::NodeReportCall,
        patience: Duration,
        enough: impl Fn(&Gathered) -> bool,
    ) -> Gathered {
        let own = self.reporter.node;
        let mut gathered = Gathered {
            by: own,
            partial: nodes.len() < self.present().len(),
            ..Gathered::default()
        };
        if nodes.contains(&own) || nodes.is_empty() {
            gathered.reports.insert(own, self.reporter.report(call));
        }
        let payload: bytes::Bytes = call.encode_to_vec().into();
        let mut calls: FuturesUnordered<_> = nodes
            .into_iter()
            .filter(|node| *node != own)
            .map(|node| {
                let payload = payload.clone();
                async move { (node, self.one(node, payload, patience).await) }
            })
            .collect();
        while !enough(&gathered) {
            match calls.next().await {
                None => break,
                Some((node, Ok(report))) => {
                    self.heard.lock().insert(node, wall_us());
                    gathered.reports.insert(node, report);
                }
                Some((node, Err(reason))) => {
                    gathered.silent.insert(node, reason);
                }
            }
        }
        gathered.partial |= !calls.is_empty();
        gathered.time_us = self.reporter.clock.now_us();
        gathered
    }

    async fn one(&self, node: NodeId, payload: bytes::Bytes, patience: Duration) -> Result<pb::NodeReport, String> {
        let Some(peers) = self.reporter.groups.peers() else {
            return Err("this node has no peer listener, so it knows no other node".into());
        };
        let answer = peers
            .call(node, PeerMethod::NodeReport, payload, patience)
            .await
            .map_err(|e| match e.message.strip_prefix(&format!("node {node} is down: ")) {
                // Which node it is, whoever reads this knows.
                Some(reason) => reason.to_owned(),
                None => e.message,
            })?;
        let report = pb::NodeReport::decode(answer).map_err(|e| format!("its report is malformed: {e}"))?;
        if report.node_id != node.get() {
            return Err(format!("it says that it is n{}", report.node_id));
        }
        Ok(report)
    }

    /// Looks from time to time whether the other nodes are there, until cancelled.
    pub async fn look(self: Arc<Self>, token: CancellationToken) {
        let call = pb::NodeReportCall {
            no_groups: true,
            ..pb::NodeReportCall::default()
        };
        loop {
            // In a large cluster less often: everyone asks everyone.
            let pause = LOOK_EVERY.max(Duration::from_millis(50) * self.present().len() as u32);
            tokio::select! {
                () = token.cancelled() => return,
                () = tokio::time::sleep(pause) => {}
            }
            let looked = self.all(&call, LOOK_EVERY);
            if token.run_until_cancelled(looked).await.is_none() {
                return;
            }
        }
    }

    /// The reports as the planner wants them, up to `now_us` of the monotonic clock.
    pub fn for_planner(&self, gathered: &Gathered, now_us: u64) -> crate::control::placement::Reports {
        use crate::control::placement::{GroupReport, MetaReport, NodeReport, Reports};
        use crate::model::{GroupId, LogIndex, ReplicaId, TimeUs};
        let mut reports = Reports {
            since: TimeUs::new(now_us),
            ..Reports::default()
        };
        let wall = wall_us();
        for (node, report) in &gathered.reports {
            reports.nodes.insert(
                *node,
                NodeReport {
                    last_seen: TimeUs::new(now_us),
                    bytes: report.bytes,
                    purged: report
                        .groups
                        .iter()
                        .filter_map(|g| Some((GroupId::new(g.group_id), LogIndex::new(g.purged?))))
                        .collect(),
                    ..NodeReport::default()
                },
            );
        }
        for node in gathered.silent.keys() {
            // Never heard of: since this node asks, at least. Silent is what has not answered, however lately it was heard.
            let ago = self.heard_us(*node).map(|heard| wall.saturating_sub(heard));
            if let Some(ago) = ago {
                let silent_us = ago.max(crate::control::placement::LIVE_FOR_US + 1);
                let seen = TimeUs::new(now_us.saturating_sub(silent_us));
                reports.since = reports.since.min(seen);
                reports.nodes.insert(
                    *node,
                    NodeReport {
                        last_seen: seen,
                        ..NodeReport::default()
                    },
                );
            }
        }
        let picture = super::Picture::of(gathered);
        for (group, leader) in picture.leaders() {
            let fresh = micros(super::ACK_FRESH);
            let current = leader
                .followers
                .iter()
                .filter(|f| f.lag <= super::CURRENT_LAG_MAX && f.ack_ago_us.is_some_and(|ago| ago <= fresh))
                .map(|f| ReplicaId::new(f.replica_id))
                .collect();
            let id = ReplicaId::new(leader.replica_id);
            if group == GroupId::META {
                reports.meta = MetaReport {
                    leader: Some(id),
                    voters: leader.voters.iter().map(|r| ReplicaId::new(*r)).collect(),
                    current,
                };
            } else {
                reports.groups.insert(group, GroupReport { leader: id, current });
            }
        }
        reports
    }
}
