//! `StreamService` and `ServerService`.

use std::collections::HashMap;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::Edge;
use super::status::Refusal;
use crate::broker::namespace_or_default;
use crate::control::PurgeUpto;
use crate::control::reports::Picture;
use crate::control::view::StreamView;
use crate::model::limits::REQUEST_ID_BYTES_MAX;
use crate::model::{GroupId, Sequence, StreamId};
use crate::wire::v1;
use crate::wire::v1::server_service_server::ServerService;
use crate::wire::v1::stream_service_server::StreamService;

const PAGE: u32 = 100;
const PAGE_MAX: u32 = 1_000;

/// Stream administration.
pub struct Streams {
    pub(super) edge: Arc<Edge>,
}

/// What the server says of itself.
pub struct Server {
    pub(super) edge: Arc<Edge>,
}

impl Streams {
    /// A stream with the figures of its shards.
    async fn describe(&self, stream: &StreamView) -> v1::Stream {
        let described = self.describe_all(&[stream]).await;
        described.into_iter().next().unwrap_or_default()
    }

    /// Streams with the figures of their shards: as their leaders tell them, or else whoever answers soon.
    async fn describe_all(&self, streams: &[&StreamView]) -> Vec<v1::Stream> {
        let operations = &self.edge.operations;
        let groups = streams.iter().flat_map(|s| s.shards.iter().map(|p| p.group)).collect();
        let gathered = operations.gather_groups(&groups).await;
        let picture = Picture::of(&gathered);
        let reports: HashMap<GroupId, v1::GroupReport> = groups
            .iter()
            .filter_map(|group| Some((*group, operations.group_report(&picture, *group)?)))
            .collect();
        streams.iter().map(|s| stream_of(s, &picture, &reports)).collect()
    }
}

fn stream_of(stream: &StreamView, picture: &Picture<'_>, groups: &HashMap<GroupId, v1::GroupReport>) -> v1::Stream {
    let shards = stream.shards.iter().map(|place| {
        let mut shard = v1::Shard {
            index: place.index,
            shard_id: place.shard.get(),
            group_id: place.group.get(),
            floor: 1,
            tail: 1,
            ..v1::Shard::default()
        };
        if let Some(at) = picture.shard(place.group, place.shard.get()) {
            shard.floor = at.floor;
            shard.tail = at.tail;
            shard.messages = at.messages;
            shard.bytes = at.bytes;
            shard.first_time_us = at.first_time_us;
            shard.last_time_us = at.last_time_us;
        }
        if let Some(group) = groups.get(&place.group) {
            shard.leader_node = group.leader_node;
            shard.term = group.term;
            shard.replicas = group.replicas.iter().map(replica_of).collect();
        }
        shard
    });
    v1::Stream {
        spec: Some(stream.spec.clone()),
        stream_id: stream.id.to_string(),
        epoch: stream.epoch.get(),
        revision: stream.revision.get(),
        created_us: stream.created.get(),
        state: stream.state.into(),
        removed_until_us: (stream.state == v1::StreamState::Removed).then(|| stream.removed_until.get()),
        map: Some(v1::ShardMap::from(&stream.map)),
        shards: shards.collect(),
    }
}

fn replica_of(replica: &v1::ReplicaReport) -> v1::Replica {
    let state = match replica.state() {
        v1::ReplicaState::Current => "current",
        v1::ReplicaState::Lagging => "lagging",
        v1::ReplicaState::Offline => "offline",
        v1::ReplicaState::Damaged => "damaged",
        v1::ReplicaState::NotRunning => "starting",
        v1::ReplicaState::Waiting => "waiting",
        v1::ReplicaState::Unspecified => "unknown",
    };
    v1::Replica {
        replica_id: replica.replica_id,
        node_id: replica.node_id,
        leader: replica.leader,
        state: state.to_owned(),
        lag_entries: replica.lag_entries.unwrap_or(0),
        lag_bytes: replica.lag_bytes.unwrap_or(0),
        lag_us: replica.lag_us.unwrap_or(0),
        node_name: replica.node_name.clone(),
        learner: !replica.voter,
    }
}

#[tonic::async_trait]
impl StreamService for Streams {
    async fn create_stream(
        &self,
        request: Request<v1::CreateStreamRequest>,
    ) -> Result<Response<v1::CreateStreamResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        let spec = request
            .spec
            .ok_or_else(|| Refusal::bad_request("BAD_SPEC", "a stream needs a spec with at least a name"))?;
        let (stream, existed) = self
            .edge
            .control
            .create_stream(spec, known_as(request.request_id)?)
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(v1::CreateStreamResponse {
            stream: Some(self.describe(&stream).await),
            existed,
        }))
    }

    async fn get_stream(
        &self,
        request: Request<v1::GetStreamRequest>,
    ) -> Result<Response<v1::GetStreamResponse>, Status> {
        let request = request.into_inner();
        let stream = self
            .edge
            .control
            .find(namespace_or_default(&request.namespace), &request.name)
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(v1::GetStreamResponse {
            stream: Some(self.describe(&stream).await),
        }))
    }

    async fn list_streams(
        &self,
        request: Request<v1::ListStreamsRequest>,
    ) -> Result<Response<v1::ListStreamsResponse>, Status> {
        let request = request.into_inner();
        let size = match request.page_size {
            0 => PAGE,
            n if n <= PAGE_MAX => n,
            n => {
                return Err(Refusal::bad_request(
                    "BAD_REQUEST",
                    format!("page_size is 1 to {PAGE_MAX} (0 means {PAGE}), not {n}"),
                )
                .into());
            }
        } as usize;
        let namespace = namespace_or_default(&request.namespace);
        let view = self.edge.broker.view();
        if request.include_removed {
            // Removed streams have no name index: there are few, and they are listed in one order with the others.
            let mut all: Vec<_> = view
                .all_streams()
                .into_iter()
                .filter(|s| s.spec.namespace == namespace && s.spec.name.starts_with(&request.name_prefix))
                .collect();
            all.sort_by_key(|s| (s.spec.name.clone(), s.id));
            let mut page: Vec<_> = all
                .into_iter()
                .skip_while(|s| !request.page_token.is_empty() && page_key(s) <= request.page_token)
                .take(size + 1)
                .collect();
            let more = page.len() > size;
            page.truncate(size);
            return Ok(Response::new(v1::ListStreamsResponse {
                next_page_token: next_token(more, page.last(), page_key),
                streams: self.describe_all(&page.iter().map(|s| &**s).collect::<Vec<_>>()).await,
            }));
        }
        let after = (!request.page_token.is_empty()).then_some(request.page_token.as_str());
        let mut page = view.list(namespace, &request.name_prefix, after, size + 1);
        let more = page.len() > size;
        page.truncate(size);
        Ok(Response::new(v1::ListStreamsResponse {
            next_page_token: next_token(more, page.last(), |s| s.spec.name.clone()),
            streams: self.describe_all(&page.iter().map(|s| &**s).collect::<Vec<_>>()).await,
        }))
    }

    async fn update_stream(
        &self,
        request: Request<v1::UpdateStreamRequest>,
    ) -> Result<Response<v1::UpdateStreamResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        let spec = request
            .spec
            .ok_or_else(|| Refusal::bad_request("BAD_SPEC", "an update needs a spec with the stream's name"))?;
        let paths = request.update_mask.map(|m| m.paths).unwrap_or_default();
        let stream = self
            .edge
            .control
            .update_stream(spec, &paths, request.expected_revision, known_as(request.request_id)?)
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(v1::UpdateStreamResponse {
            stream: Some(self.describe(&stream).await),
        }))
    }

    async fn delete_stream(
        &self,
        request: Request<v1::DeleteStreamRequest>,
    ) -> Result<Response<v1::DeleteStreamResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        let stream = self
            .edge
            .control
            .remove_stream(
                namespace_or_default(&request.namespace),
                &request.name,
                request.grace_us,
                request.expected_revision,
                known_as(request.request_id)?,
            )
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(v1::DeleteStreamResponse {
            stream: Some(self.describe(&stream).await),
        }))
    }

    async fn undelete_stream(
        &self,
        request: Request<v1::UndeleteStreamRequest>,
    ) -> Result<Response<v1::UndeleteStreamResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        if let Some(id) = &request.stream_id
            && StreamId::parse(id).is_none()
        {
            return Err(Refusal::bad_request("BAD_REQUEST", format!("{id:?} is no stream id: 32 hex digits")).into());
        }
        let stream = self
            .edge
            .control
            .undelete_stream(
                namespace_or_default(&request.namespace),
                &request.name,
                request.stream_id,
                known_as(request.request_id)?,
            )
            .await
            .map_err(Refusal::from)?;
        Ok(Response::new(v1::UndeleteStreamResponse {
            stream: Some(self.describe(&stream).await),
        }))
    }

    async fn purge_stream(
        &self,
        request: Request<v1::PurgeStreamRequest>,
    ) -> Result<Response<v1::PurgeStreamResponse>, Status> {
        self.edge.accepting()?;
        let request = request.into_inner();
        let upto = match request.upto {
            None => PurgeUpto::Everything,
            Some(v1::purge_stream_request::Upto::BeforeSequence(n)) => PurgeUpto::Before(Sequence::new(n)),
            Some(v1::purge_stream_request::Upto::Keep(n)) => PurgeUpto::Keep(n),
        };
        let stream = self.edge.stream(&request.namespace, &request.name).await?;
        let shards = self
            .edge
            .broker
            .shards_of(&stream, &request.shards)
            .map_err(Refusal::from)?;
        let mut purged = 0;
        for access in shards {
            let leader = access
                .replica()
                .filter(|group| group.leads() || self.edge.broker.is_alone());
            purged += match leader {
                Some(group) => {
                    let purging = self
                        .edge
                        .control
                        .purge_shard(group, access.place.shard, upto, &request.filter);
                    purging.await.map_err(Refusal::from)?
                }
                None => {
                    let purge = upto
                        .of_shard(access.place.shard, &request.filter)
                        .map_err(Refusal::from)?;
                    let purging = self.edge.broker.purge_at_leader(&access, purge);
                    purging.await.map_err(Refusal::from)?
                }
            };
        }
        Ok(Response::new(v1::PurgeStreamResponse {
            purged_messages: purged,
        }))
    }
}

/// A request id, within its limit: it is kept in the catalog for a while.
pub(super) fn known_as(request_id: String) -> Result<String, Refusal> {
    if request_id.len() > REQUEST_ID_BYTES_MAX {
        return Err(Refusal::bad_request(
            "BAD_REQUEST",
            format!(
                "a request id has at most {REQUEST_ID_BYTES_MAX} bytes, not {}: a UUID will do",
                request_id.len()
            ),
        ));
    }
    Ok(request_id)
}

fn page_key(stream: &StreamView) -> String {
    format!("{} {}", stream.spec.name, stream.id)
}

fn next_token(more: bool, last: Option<&Arc<StreamView>>, key: impl Fn(&StreamView) -> String) -> String {
    match last {
        Some(last) if more => key(last),
        Some(_) | None => String::new(),
    }
}

#[tonic::async_trait]
impl ServerService for Server {
    async fn get_server_info(
        &self,
        _request: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        let cluster = self.edge.broker.view().cluster().unwrap_or_default();
        let facts = &self.edge.facts;
        Ok(Response::new(v1::GetServerInfoResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cluster: cluster.cluster_name,
            cluster_id: cluster.cluster_id,
            node_id: facts.node_id,
            node_name: facts.node_name.clone(),
            incarnation: facts.incarnation,
            started_us: facts.started_us,
            time_us: self.edge.broker.clock().now_us(),
            features: FEATURES.iter().map(|f| (*f).to_owned()).collect(),
            limits: crate::model::limits::LIMITS
                .iter()
                .map(|l| (l.name.to_owned(), l.value))
                .collect(),
            alarms: self.edge.alarms.names().into_iter().map(str::to_owned).collect(),
            nodes: self.edge.nodes(),
            cluster_version: cluster.cluster_version.max(1),
        }))
    }
}

/// What a client may use.
const FEATURES: &[&str] = &[
    "publish",
    "publish-session",
    "get",
    "fetch",
    "read-session",
    "streams",
    "purge-by-subject",
    "undelete",
    "cluster",
    "local-reads",
    "leader-hints",
];
