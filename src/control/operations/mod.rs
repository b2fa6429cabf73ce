//! What operators ask of a cluster, at any node: reports, events, and the few orders they give.
//!
//! | file | what |
//! |------|------|
//! | `mod.rs` | what it is made of; looking nodes, groups and shards up |
//! | `look.rs` | the cluster, its nodes, its groups and shards, what is wrong |
//! | `orders.rs` | hand over, move, drain, remove; what the planner would do |
//! | `error.rs` | why something was not done |

mod error;
mod look;
mod orders;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::reports::service::{METHODS, ReportService};
use super::reports::{Gathered, Gatherer, Picture, Reporter, meta_record};
use super::view::{StreamView, View};
use super::{Control, news};
use crate::base::alarms::Alarms;
use crate::base::clock::Clock;
use crate::base::tasks::Tasks;
use crate::model::{GroupId, NodeId};
use crate::raft::Groups;
use crate::storage::Store;
use crate::wire::{internal as pb, v1};

pub use error::OrderError;
pub use look::ReportQuery;
pub use orders::Target;

/// How long a report waits for nodes unless it is told.
pub const PATIENCE: Duration = Duration::from_secs(2);
/// And at most.
pub const PATIENCE_MAX: Duration = Duration::from_secs(30);
/// How long the figures of a stream wait for the nodes that have them.
const STREAM_PATIENCE: Duration = Duration::from_secs(1);

/// See the module.
pub struct Operations {
    control: Arc<Control>,
    reporter: Arc<Reporter>,
    gatherer: Arc<Gatherer>,
}

/// The names of the nodes.
struct Names(HashMap<NodeId, String>);

impl Names {
    fn of(&self, node: NodeId) -> String {
        self.0.get(&node).cloned().unwrap_or_else(|| node.to_string())
    }
}

impl Operations {
    /// With peers, also serves their calls, and looks from time to time whether they are there.
    pub fn start(
        control: Arc<Control>,
        groups: Arc<Groups>,
        store: Arc<Store>,
        clock: Clock,
        alarms: Alarms,
        tasks: &Tasks,
    ) -> Arc<Self> {
        let identity = store.identity();
        let reporter = Arc::new(Reporter {
            node: identity.node_id,
            incarnation: identity.incarnation,
            view: control.view().clone(),
            groups,
            store,
            alarms,
            clock,
        });
        let gatherer = Arc::new(Gatherer::new(reporter.clone()));
        if let Some(peers) = reporter.groups.peers() {
            peers.serve_calls(METHODS, Arc::new(ReportService(reporter.clone())));
            tasks.spawn_vital("look for nodes", gatherer.clone().look(tasks.token()));
            let tell = news::tell(reporter.groups.clone(), reporter.view.clone(), tasks.token());
            tasks.spawn("news", tell);
        }
        Arc::new(Self {
            control,
            reporter,
            gatherer,
        })
    }

    /// The control plane of the node.
    pub fn control(&self) -> &Arc<Control> {
        &self.control
    }

    /// The replicas on the node.
    pub fn groups(&self) -> &Arc<Groups> {
        &self.reporter.groups
    }

    fn view(&self) -> &Arc<View> {
        &self.reporter.view
    }

    /// This node.
    pub fn node(&self) -> NodeId {
        self.reporter.node
    }

    fn names(&self) -> Names {
        let nodes = self.view().nodes();
        Names(nodes.into_iter().map(|n| (NodeId::new(n.node_id), n.name)).collect())
    }

    fn meta_record(&self) -> pb::GroupRecord {
        let cluster = self.view().cluster().unwrap_or_default();
        meta_record(&cluster, &self.view().nodes())
    }

    /// The record of a group; that of the meta group is made up.
    fn group_record(&self, group: GroupId) -> Result<Arc<pb::GroupRecord>, OrderError> {
        if group == GroupId::META {
            return Ok(Arc::new(self.meta_record()));
        }
        self.view()
            .group_record(group)
            .ok_or(OrderError::GroupNotFound { group })
    }

    /// A node by its name, or else by its id ("n2" or "2"); of one name there may be removed nodes besides.
    fn find_node(&self, asked: &str) -> Result<pb::NodeRecord, OrderError> {
        let nodes = self.view().nodes();
        let present = |node: &&pb::NodeRecord| node.state() != pb::NodeState::Removed;
        let by_name = nodes
            .iter()
            .filter(present)
            .chain(&nodes)
            .find(|node| node.name == asked);
        let id: Option<u64> = asked.strip_prefix('n').unwrap_or(asked).parse().ok();
        let by_id = || nodes.iter().find(|node| Some(node.node_id) == id);
        by_name.or_else(by_id).cloned().ok_or_else(|| OrderError::NodeNotFound {
            asked: asked.to_owned(),
            known: nodes
                .iter()
                .filter(present)
                .map(|node| format!("{} (n{})", node.name, node.node_id))
                .collect::<Vec<_>>()
                .join(", "),
        })
    }

    async fn find_stream(&self, namespace: &str, name: &str) -> Result<Arc<StreamView>, OrderError> {
        let namespace = if namespace.is_empty() { "default" } else { namespace };
        Ok(self.control.find(namespace, name).await?)
    }

    async fn find_shard(&self, address: &v1::ShardAddress) -> Result<GroupId, OrderError> {
        let stream = self.find_stream(&address.namespace, &address.stream).await?;
        let place = stream.shards.get(address.index as usize);
        place.map(|place| place.group).ok_or(OrderError::NoSuchShard {
            stream: address.stream.clone(),
            shards: stream.shards.len(),
            index: address.index,
        })
    }

    /// What is known of these groups and their shards: as told by their leaders, or by whoever answers soon.
    pub async fn gather_groups(&self, groups: &BTreeSet<GroupId>) -> Gathered {
        let nodes: BTreeSet<NodeId> = groups
            .iter()
            .filter_map(|group| self.view().group_record(*group))
            .flat_map(|record| {
                record
                    .replicas
                    .iter()
                    .map(|r| NodeId::new(r.node_id))
                    .collect::<Vec<_>>()
            })
            .collect();
        let call = pb::NodeReportCall {
            groups: groups.iter().map(|group| group.get()).collect(),
            shards: true,
            ..pb::NodeReportCall::default()
        };
        let enough = |gathered: &Gathered| {
            let picture = Picture::of(gathered);
            groups.iter().all(|group| picture.leader(*group).is_some())
        };
        self.gatherer
            .ask(nodes.into_iter().collect(), &call, STREAM_PATIENCE, enough)
            .await
    }

    /// How a group stands, by what was gathered; nothing if the catalog does not know it.
    pub fn group_report(&self, picture: &Picture<'_>, group: GroupId) -> Option<v1::GroupReport> {
        let record = self.view().group_record(group)?;
        let names = self.names();
        let heard = |node| self.gatherer.heard_us(node);
        Some(picture.group(&record, &|node| names.of(node), &heard))
    }
}
