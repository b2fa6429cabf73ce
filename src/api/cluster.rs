//! `ClusterService`.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::admin::known_as;
use super::status::Refusal;
use super::{Edge, Placed, SessionKind, drained};
use crate::broker::namespace_or_default;
use crate::control::operations::{PATIENCE, PATIENCE_MAX, ReportQuery, Target};
use crate::control::reports::Watcher;
use crate::model::GroupId;
use crate::wire::v1;
use crate::wire::v1::cluster_service_server::ClusterService;

const PAGE: u32 = 1_000;
const PAGE_MAX: u32 = 10_000;
/// Events that a client has not taken.
const EVENTS_MAX: usize = 256;
const INTERVAL: Duration = Duration::from_secs(1);
const INTERVAL_MIN: Duration = Duration::from_millis(100);
const INTERVAL_MAX: Duration = Duration::from_secs(60);
/// What changes here is looked at when it has come to rest for a moment, so that an election is one event.
const SETTLE: Duration = Duration::from_millis(30);

/// The cluster, for its operators.
pub struct Cluster {
    pub(super) edge: Arc<Edge>,
}

fn bad(message: impl Into<String>) -> Refusal {
    Refusal::bad_request("BAD_REQUEST", message)
}

fn patience(asked: Option<u64>) -> Result<Duration, Refusal> {
    match asked.map(Duration::from_micros) {
        None => Ok(PATIENCE),
        Some(asked) if asked <= PATIENCE_MAX => Ok(asked),
        Some(asked) => Err(bad(format!(
            "patience_us is at most {} s, not {} s",
            PATIENCE_MAX.as_secs(),
            asked.as_secs()
        ))),
    }
}

fn node_named(node: &str) -> Result<(), Refusal> {
    if node.is_empty() {
        return Err(bad(
            "name a node, by its name or its id: `mainstem cluster nodes` lists them",
        ));
    }
    Ok(())
}

fn no_target() -> Refusal {
    bad("name a shard (stream and index) or a group")
}

/// Looks again and again, and tells what is new, until the client or the node goes.
async fn watch(edge: Arc<Edge>, interval: Duration, output: mpsc::Sender<Result<v1::ClusterEvent, Status>>) {
    let mut draining = edge.draining.clone();
    let mut changes = edge.broker.view().watch();
    let mut local = edge.operations.groups().events();
    let mut watcher = Watcher::default();
    let looked = async {
        edge.operations.events(&mut watcher, interval.min(PATIENCE)).await;
        let first = v1::ClusterEvent {
            time_us: edge.broker.clock().now_us(),
            text: "watching".to_owned(),
            kind: Some(v1::cluster_event::Kind::Watching(v1::Watching {
                revision: edge.broker.view().cluster().map_or(0, |c| c.revision),
            })),
        };
        if output.send(Ok(first)).await.is_err() {
            return;
        }
        loop {
            tokio::select! {
                () = output.closed() => return,
                () = tokio::time::sleep(interval) => {}
                changed = changes.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    tokio::time::sleep(SETTLE).await;
                }
                event = local.recv() => {
                    if matches!(event, Err(broadcast::error::RecvError::Closed)) {
                        return;
                    }
                    tokio::time::sleep(SETTLE).await;
                }
            }
            changes.borrow_and_update();
            local = local.resubscribe();
            for event in edge.operations.events(&mut watcher, interval.min(PATIENCE)).await {
                if output.send(Ok(event)).await.is_err() {
                    return;
                }
            }
        }
    };
    tokio::select! {
        () = looked => {}
        () = drained(&mut draining) => {
            // It may be gone, or not be reading.
            let _ = output.try_send(Err(Refusal::stopping().into_status()));
        }
    }
}

#[tonic::async_trait]
impl ClusterService for Cluster {
    type WatchEventsStream = Placed<ReceiverStream<Result<v1::ClusterEvent, Status>>>;

    async fn get_cluster(
        &self,
        _request: Request<v1::GetClusterRequest>,
    ) -> Result<Response<v1::GetClusterResponse>, Status> {
        Ok(Response::new(self.edge.operations.cluster().await))
    }

    async fn list_nodes(
        &self,
        request: Request<v1::ListNodesRequest>,
    ) -> Result<Response<v1::ListNodesResponse>, Status> {
        let request = request.into_inner();
        let patience = patience(request.patience_us)?;
        let nodes = self.edge.operations.nodes(request.include_removed, patience).await;
        Ok(Response::new(v1::ListNodesResponse { nodes }))
    }

    async fn get_report(
        &self,
        request: Request<v1::GetReportRequest>,
    ) -> Result<Response<v1::GetReportResponse>, Status> {
        let request = request.into_inner();
        if request.stream.is_empty() && !request.shards.is_empty() {
            return Err(bad("shards are numbered within a stream: name it").into());
        }
        let query = ReportQuery {
            stream: (!request.stream.is_empty())
                .then(|| (namespace_or_default(&request.namespace).to_owned(), request.stream)),
            shards: request.shards,
            page_size: match request.page_size {
                0 => PAGE,
                n if n <= PAGE_MAX => n,
                n => return Err(bad(format!("page_size is 1 to {PAGE_MAX} (0 means {PAGE}), not {n}")).into()),
            } as usize,
            after: request.page_token,
            patience: patience(request.patience_us)?,
        };
        let report = self.edge.operations.report(&query).await.map_err(Refusal::from)?;
        Ok(Response::new(report))
    }

    async fn watch_events(
        &self,
        request: Request<v1::WatchEventsRequest>,
    ) -> Result<Response<Self::WatchEventsStream>, Status> {
        let interval = request.into_inner().interval_us.map_or(INTERVAL, Duration::from_micros);
        if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
            return Err(bad(format!(
                "interval_us is {} ms to {} s, not {} ms",
                INTERVAL_MIN.as_millis(),
                INTERVAL_MAX.as_secs(),
                interval.as_millis()
            ))
            .into());
        }
        let place = self.edge.open_session(SessionKind::Watch)?;
        let (output, events) = mpsc::channel(EVENTS_MAX);
        self.edge
            .tasks
            .spawn("watch", watch(self.edge.clone(), interval, output));
        Ok(Response::new(Placed {
            answers: ReceiverStream::new(events),
            _place: place,
        }))
    }

    async fn step_down(&self, request: Request<v1::StepDownRequest>) -> Result<Response<v1::StepDownResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        let target = match request.target.ok_or_else(no_target)? {
            v1::step_down_request::Target::Shard(shard) => Target::Shard(shard),
            v1::step_down_request::Target::GroupId(group) => Target::Group(GroupId::new(group)),
        };
        let done = self.edge.operations.step_down(&target, &request.to_node).await;
        Ok(Response::new(done.map_err(Refusal::from)?))
    }

    async fn move_replica(
        &self,
        request: Request<v1::MoveReplicaRequest>,
    ) -> Result<Response<v1::MoveReplicaResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        let target = match request.target.ok_or_else(no_target)? {
            v1::move_replica_request::Target::Shard(shard) => Target::Shard(shard),
            v1::move_replica_request::Target::GroupId(group) => Target::Group(GroupId::new(group)),
        };
        node_named(&request.from_node)?;
        node_named(&request.to_node)?;
        let done = self
            .edge
            .operations
            .move_replica(
                &target,
                &request.from_node,
                &request.to_node,
                request.whole_group,
                known_as(request.request_id)?,
            )
            .await;
        Ok(Response::new(done.map_err(Refusal::from)?))
    }

    async fn drain_node(
        &self,
        request: Request<v1::DrainNodeRequest>,
    ) -> Result<Response<v1::DrainNodeResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        node_named(&request.node)?;
        let id = known_as(request.request_id)?;
        let node = self.edge.operations.drain_node(&request.node, id).await;
        Ok(Response::new(v1::DrainNodeResponse {
            node: Some(node.map_err(Refusal::from)?),
        }))
    }

    async fn undrain_node(
        &self,
        request: Request<v1::UndrainNodeRequest>,
    ) -> Result<Response<v1::UndrainNodeResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        node_named(&request.node)?;
        let id = known_as(request.request_id)?;
        let node = self.edge.operations.undrain_node(&request.node, id).await;
        Ok(Response::new(v1::UndrainNodeResponse {
            node: Some(node.map_err(Refusal::from)?),
        }))
    }

    async fn remove_node(
        &self,
        request: Request<v1::RemoveNodeRequest>,
    ) -> Result<Response<v1::RemoveNodeResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        node_named(&request.node)?;
        let id = known_as(request.request_id)?;
        let node = self
            .edge
            .operations
            .remove_node(&request.node, request.force, request.accept_loss, id)
            .await;
        Ok(Response::new(v1::RemoveNodeResponse {
            node: Some(node.map_err(Refusal::from)?),
        }))
    }

    async fn plan(&self, _request: Request<v1::PlanRequest>) -> Result<Response<v1::PlanResponse>, Status> {
        Ok(Response::new(self.edge.operations.plan().await))
    }
}
