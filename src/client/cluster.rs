//! The cluster for its operators: reports, events, orders.

use tonic::transport::Channel;
use tonic::{Request, Streaming};

use super::Client;
use super::admin::{request_id, required};
use super::config::GRPC_MESSAGE_BYTES_MAX;
use super::connection::Repeat;
use super::error::ClientError;
use crate::wire::v1;
use crate::wire::v1::cluster_service_client::ClusterServiceClient;

fn cluster(channel: Channel) -> ClusterServiceClient<Channel> {
    ClusterServiceClient::new(channel).max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX)
}

/// What an order is about.
///
/// ```
/// use mainstem::client::Target;
///
/// let shard = Target::Shard { stream: "ORDERS".into(), index: 0 };
/// assert_ne!(shard, Target::Group(7));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A shard, and with it the group that holds it.
    Shard {
        /// Its stream.
        stream: String,
        /// Its index there, from 0.
        index: u32,
    },
    /// A group; 1 is the meta group.
    Group(u64),
}

/// The events of a cluster, from [`Client::watch_cluster`].
#[derive(Debug)]
pub struct ClusterEvents {
    inner: Streaming<v1::ClusterEvent>,
}

impl ClusterEvents {
    /// The next one; `None` when the server has ended the stream.
    pub async fn next(&mut self) -> Result<Option<v1::ClusterEvent>, ClientError> {
        self.inner.message().await.map_err(ClientError::from)
    }
}

impl Client {
    fn address(&self, stream: String, index: u32) -> v1::ShardAddress {
        v1::ShardAddress {
            namespace: self.namespace(),
            stream,
            index,
        }
    }

    /// Who the cluster is, and who leads its catalog.
    pub async fn cluster(&self) -> Result<v1::GetClusterResponse, ClientError> {
        let call = async |c| cluster(c).get_cluster(self.request(v1::GetClusterRequest {})).await;
        self.connection.call(Repeat::Safe, call).await
    }

    /// Every node; with `include_removed` also those that were taken out.
    pub async fn nodes(&self, include_removed: bool) -> Result<Vec<v1::Node>, ClientError> {
        let request = v1::ListNodesRequest {
            include_removed,
            patience_us: None,
        };
        let call = async |c| cluster(c).list_nodes(self.request(request)).await;
        Ok(self.connection.call(Repeat::Safe, call).await?.nodes)
    }

    /// How groups and shards stand: of one stream, or (`None`) of all. All pages are joined; figures, problems and
    /// silent nodes are those of the first.
    pub async fn cluster_report(
        &self,
        stream: Option<&str>,
        shards: Vec<u32>,
    ) -> Result<v1::GetReportResponse, ClientError> {
        let mut request = v1::GetReportRequest {
            namespace: self.namespace(),
            stream: stream.unwrap_or_default().to_owned(),
            shards,
            ..v1::GetReportRequest::default()
        };
        let mut whole: Option<v1::GetReportResponse> = None;
        loop {
            let call = async |c| cluster(c).get_report(self.request(request.clone())).await;
            let page = self.connection.call(Repeat::Safe, call).await?;
            request.page_token.clone_from(&page.next_page_token);
            let report = match whole.as_mut() {
                None => whole.insert(page),
                Some(report) => {
                    report.shards.extend(page.shards);
                    for group in page.groups {
                        if !report.groups.iter().any(|g| g.group_id == group.group_id) {
                            report.groups.push(group);
                        }
                    }
                    report
                }
            };
            if request.page_token.is_empty() {
                report.next_page_token.clear();
                return Ok(std::mem::take(report));
            }
        }
    }

    /// What happens from now on, looked at once in `interval_us` microseconds (absent: a second).
    pub async fn watch_cluster(&self, interval_us: Option<u64>) -> Result<ClusterEvents, ClientError> {
        let request = v1::WatchEventsRequest { interval_us };
        // No timeout: it goes on for as long as it is wanted.
        let call = async |c| cluster(c).watch_events(Request::new(request)).await;
        let inner = self.connection.call(Repeat::Safe, call).await?;
        Ok(ClusterEvents { inner })
    }

    /// Lets the leader of a group hand over to the node with this name or id, or (empty) to the voter least behind.
    pub async fn step_down(&self, target: Target, to_node: &str) -> Result<v1::StepDownResponse, ClientError> {
        use v1::step_down_request::Target as T;
        let request = v1::StepDownRequest {
            target: Some(match target {
                Target::Shard { stream, index } => T::Shard(self.address(stream, index)),
                Target::Group(group) => T::GroupId(group),
            }),
            to_node: to_node.to_owned(),
        };
        // Without a name, a second one would hand over once more.
        let repeat = if to_node.is_empty() {
            Repeat::Unsafe
        } else {
            Repeat::Safe
        };
        let call = async |c| cluster(c).step_down(self.request(request.clone())).await;
        self.connection.call(repeat, call).await
    }

    /// Replaces the replica on one node by one on another. With `whole_group` also where other streams share the group.
    pub async fn move_replica(
        &self,
        target: Target,
        from_node: &str,
        to_node: &str,
        whole_group: bool,
    ) -> Result<v1::MoveReplicaResponse, ClientError> {
        use v1::move_replica_request::Target as T;
        let request = v1::MoveReplicaRequest {
            target: Some(match target {
                Target::Shard { stream, index } => T::Shard(self.address(stream, index)),
                Target::Group(group) => T::GroupId(group),
            }),
            from_node: from_node.to_owned(),
            to_node: to_node.to_owned(),
            whole_group,
            request_id: request_id(),
        };
        let call = async |c| cluster(c).move_replica(self.request(request.clone())).await;
        self.connection.call(Repeat::Safe, call).await
    }

    /// Lets a node give away what it has; it takes nothing new.
    pub async fn drain_node(&self, node: &str) -> Result<v1::Node, ClientError> {
        let request = v1::DrainNodeRequest {
            node: node.to_owned(),
            request_id: request_id(),
        };
        let call = async |c| cluster(c).drain_node(self.request(request.clone())).await;
        required(self.connection.call(Repeat::Safe, call).await?.node)
    }

    /// Lets a node take leaders and replicas again.
    pub async fn undrain_node(&self, node: &str) -> Result<v1::Node, ClientError> {
        let request = v1::UndrainNodeRequest {
            node: node.to_owned(),
            request_id: request_id(),
        };
        let call = async |c| cluster(c).undrain_node(self.request(request.clone())).await;
        required(self.connection.call(Repeat::Safe, call).await?.node)
    }

    /// Takes a node out for good; see [`v1::RemoveNodeRequest`] for the two ways to insist.
    pub async fn remove_node(&self, node: &str, force: bool, accept_loss: bool) -> Result<v1::Node, ClientError> {
        let request = v1::RemoveNodeRequest {
            node: node.to_owned(),
            force,
            accept_loss,
            request_id: request_id(),
        };
        let call = async |c| cluster(c).remove_node(self.request(request.clone())).await;
        required(self.connection.call(Repeat::Safe, call).await?.node)
    }

    /// What the planner would do now, and why.
    pub async fn plan(&self) -> Result<v1::PlanResponse, ClientError> {
        let call = async |c| cluster(c).plan(self.request(v1::PlanRequest {})).await;
        self.connection.call(Repeat::Safe, call).await
    }
}
