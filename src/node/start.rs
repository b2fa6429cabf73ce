//! Starts what stands between the store and the API. The one place that knows every layer.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;

use super::anew;
use super::cluster::{self, ClusterNode};
use super::config::{Addresses, Config};
use super::engine::{Context, Engine, StartError};
use crate::api::{self, Bounds, Edge, ServerFacts};
use crate::base::{AlarmKind, Alarms, Clock, Tasks};
use crate::broker::Broker;
use crate::control::operations::Operations;
use crate::control::view::View;
use crate::control::{Control, MetaStart, NodeFacts};
use crate::monitor::StatusSource;
use crate::monitor::status::{DataStatus, SpaceStatus};
use crate::raft::transport::{PeerServer, Peers};
use crate::raft::{Groups, GroupsOptions, LogKeep, RaftTimings};
use crate::storage::{ClockFile, Identity, OpenError, Store, StoreOptions};

/// Memory for the batches that tailing readers get without a read from disk.
const RECENT_BYTES: usize = 32 << 20;
/// How often the store is asked whether it is well.
pub(super) const WATCH_EVERY: Duration = Duration::from_millis(250);
/// How often the time is noted.
const NOTE_EVERY: Duration = Duration::from_secs(10);
/// How long a node that stops may take to hand over what it leads.
pub(super) const HAND_OVER_MAX: Duration = Duration::from_secs(2);
/// How long replicas may take to end.
const TASKS_MAX: Duration = Duration::from_secs(5);

/// Opens the store and starts raft, control, broker and API on it.
pub fn start(context: Context) -> BoxFuture<'static, Result<Arc<dyn Engine>, StartError>> {
    Box::pin(async move {
        let engine = Running::start(context).await?;
        Ok(engine as Arc<dyn Engine>)
    })
}

fn store_options(config: &Config) -> StoreOptions {
    let storage = &config.storage;
    StoreOptions {
        dir: config.node.data_dir.clone(),
        log_write_buffer_bytes: storage.log_write_buffer.as_usize(),
        state_write_buffer_bytes: storage.state_write_buffer.as_usize(),
        block_cache_bytes: storage.block_cache.as_usize(),
        flush_interval: storage.flush_interval,
        flush_min_bytes: storage.flush_min.as_usize(),
        min_free_bytes: storage.min_free.0,
        commit_batch_bytes_max: storage.commit_batch_max.as_usize(),
        commit_on_caller: tokio::runtime::Handle::current().metrics().num_workers() > 1,
        threads: true,
        min_blob_bytes: storage.min_blob.0,
        blob_file_bytes: storage.blob_file.0,
        space_interval: storage.space_interval,
        reclaim_interval: storage.reclaim_interval,
        garbage_ratio_max: storage.garbage_ratio_max,
        garbage_min_bytes: storage.garbage_min.0,
    }
}

async fn open_store(options: StoreOptions) -> Result<Arc<Store>, (StartError, Found)> {
    let opened = tokio::task::spawn_blocking(move || Store::open(options, None))
        .await
        .map_err(|e| (StartError::Failed(e.to_string()), Found::Nothing))?;
    opened.map_err(|e: OpenError| match e.is_damage() {
        true if e.is_missing() => (StartError::Damaged(e.to_string()), Found::Nothing),
        true => (StartError::Damaged(e.to_string()), Found::Opening),
        false => (StartError::Failed(e.to_string()), Found::Nothing),
    })
}

/// When damage was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// When the store was opened: nothing runs yet.
    Opening,
    /// When the groups were started.
    Running,
    /// It is none, or not one that this node could be made anew for.
    Nothing,
}

/// Everything on one store. Clones share it.
#[derive(Clone)]
struct Running {
    store: Arc<Store>,
    groups: Arc<Groups>,
    control: Arc<Control>,
    /// Of a node with peers.
    peers: Option<Peers>,
    view: Arc<View>,
    edge: Arc<Edge>,
    /// Sessions: they end by themselves once the node drains.
    sessions: Tasks,
    /// Ingest, expiry, reconciler, upkeep.
    work: Tasks,
    /// Its tasks are the parent of `sessions` and `work`: a group of tasks is cancelled when its last handle goes.
    context: Context,
    /// Damage that an earlier run of the node has found.
    known_damage: Option<String>,
}

impl Running {
    async fn start(context: Context) -> Result<Arc<Self>, StartError> {
        let known_damage = anew::go_on(&context).await?;
        let (error, found) = match Self::start_once(&context).await {
            Ok(running) => {
                return Ok(Arc::new(Self {
                    known_damage,
                    ..running
                }));
            }
            Err(failed) => failed,
        };
        let StartError::Damaged(why) = &error else {
            return Err(error);
        };
        match found {
            Found::Opening => {
                anew::agree(&context, why).await?;
                anew::complete(&context).await?;
                let running = Self::start_once(&context).await.map_err(|(error, _)| error)?;
                Ok(Arc::new(running))
            }
            Found::Running => {
                let _ = context.tasks.drain(TASKS_MAX).await;
                anew::agree(&context, why).await?;
                Err(StartError::Failed(anew::again()))
            }
            Found::Nothing => Err(error),
        }
    }

    async fn start_once(context: &Context) -> Result<Self, (StartError, Found)> {
        let store = open_store(store_options(&context.config)).await?;
        let begun = std::time::Instant::now();
        match Self::start_on(store.clone(), context).await {
            Ok(running) => {
                tracing::info!(took = ?begun.elapsed(), groups = running.groups.all().len(), "groups started");
                Ok(running)
            }
            Err(e) => {
                // What a group finds wrong with stored records is damage, not a failed start.
                let error = match store.first_damage() {
                    Some(note) => (
                        StartError::Damaged(format!(
                            "{}: {}; restore the directory from a backup, or replace this replica if others hold the data",
                            e, note.what
                        )),
                        Found::Running,
                    ),
                    None => (StartError::Failed(e), Found::Nothing),
                };
                let _ = tokio::task::spawn_blocking(move || store.close()).await;
                Err(error)
            }
        }
    }

    async fn start_on(store: Arc<Store>, context: &Context) -> Result<Self, String> {
        let config = &context.config;
        let view = Arc::new(View::default());
        let mut facts = facts(context, &store.identity());
        let cluster = match &context.peer_listener {
            Some(_) => Some(ClusterNode::find(config, &store, &mut facts, &context.stop).await?),
            None => {
                cluster::may_be_alone(&store)?;
                None
            }
        };
        let groups = match &cluster {
            Some(cluster) => {
                let options = GroupsOptions {
                    recent_bytes: RECENT_BYTES,
                    timings: RaftTimings {
                        heartbeat: config.raft.heartbeat,
                        election_min: config.raft.election_min,
                        election_max: config.raft.election_max,
                    },
                    keep: LogKeep::default(),
                    peers: Some(cluster.peers.clone()),
                };
                Groups::with_options(&store, options, view.clone())
            }
            None => Groups::new(&store, RECENT_BYTES, view.clone()),
        };
        let work = context.tasks.child("work");
        let sessions = context.tasks.child("sessions");
        work.spawn_vital(
            "store watch",
            watch(store.clone(), context.alarms.clone(), work.token()),
        );
        work.spawn_vital("clock file", note_time(&store, context.clock.clone(), work.token())?);
        work.spawn_vital("upkeep", groups.clone().upkeep(work.token()));
        // Before the groups run: peers may call as soon as one leads here.
        let broker = Broker::start(
            view.clone(),
            groups.clone(),
            store.clone(),
            context.clock.clone(),
            context.alarms.clone(),
            work.clone(),
            context.publish_memory.clone(),
            cluster.as_ref().map(|cluster| cluster.peers.clone()),
        );
        let meta_start = cluster.as_ref().map(|cluster| MetaStart {
            peers: cluster.peers.clone(),
            cluster_id: cluster.cluster_id.clone(),
            replica: cluster.meta_replica,
            founder: cluster.founder,
        });
        let control = Control::new(
            view.clone(),
            groups.clone(),
            context.clock.clone(),
            context.alarms.clone(),
            facts,
            meta_start.as_ref().map(|start| start.peers.clone()),
        );
        if let (Some(cluster), Some((listener, _))) = (&cluster, &context.peer_listener) {
            let listener = listener.lock().take().ok_or("the peer listener is in use")?;
            let server = PeerServer::new(&cluster.peers, &groups);
            cluster.serve(listener, &server, &cluster.join_server(&control, config), &work)?;
            let follow = cluster.keeper.clone();
            let map = cluster.peers.map().clone();
            work.spawn_vital("hints", follow.run(view.clone(), map, work.token()));
        }
        control.start(meta_start, &work).await.map_err(|e| e.to_string())?;
        let identity = store.identity();
        if identity.cluster_id.is_none()
            && let Some(cluster) = view.cluster()
        {
            store
                .set_cluster(&cluster.cluster_id)
                .map_err(|e| format!("the cluster id could not be noted: {e}"))?;
        }
        let operations = Operations::start(
            control.clone(),
            groups.clone(),
            store.clone(),
            context.clock.clone(),
            context.alarms.clone(),
            &work,
        );
        let edge = Edge::new(
            broker,
            operations,
            context.alarms.clone(),
            sessions.clone(),
            context.draining.clone(),
            Bounds {
                sessions_max: config.limits.sessions_max as usize,
                read_memory: context.read_memory.clone(),
            },
            ServerFacts {
                node_name: config.node.name.clone(),
                node_id: identity.node_id.get(),
                incarnation: identity.incarnation,
                started_us: context.started_us,
            },
        );
        Ok(Self {
            store,
            groups,
            control,
            peers: cluster.map(|cluster| cluster.peers),
            view,
            edge,
            sessions,
            work,
            context: context.clone(),
            known_damage: None,
        })
    }

    async fn end(&self) -> Result<(), String> {
        let work = self.work.drain(TASKS_MAX).await.map_err(|e| e.to_string());
        if let Some(peers) = &self.peers {
            peers.shutdown(TASKS_MAX).await;
        }
        self.groups.shutdown().await;
        let store = self.store.clone();
        if let Some(damage) = store.first_damage().filter(|_| self.peers.is_some()) {
            anew::note(&self.context, damage.what)
                .await
                .unwrap_or_else(|error| tracing::warn!(error));
        }
        tokio::task::spawn_blocking(move || store.close())
            .await
            .map_err(|e| e.to_string())?
            .map_err(|e| e.to_string())?;
        work
    }
}

/// What this node tells of itself.
pub(super) fn facts(context: &Context, identity: &Identity) -> NodeFacts {
    let config = &context.config;
    let told = |advertised: &Option<Addresses>, used: SocketAddr| {
        advertised
            .as_ref()
            .map_or(used.to_string(), |told| told.first().to_owned())
    };
    let listen = &config.listen;
    let peer_address = context.peer_listener.as_ref().map(|(_, address)| *address);
    NodeFacts {
        node: identity.node_id,
        name: config.node.name.clone(),
        incarnation: identity.incarnation,
        client_address: match peer_address {
            None => listen.client.to_string(),
            Some(_) => told(&listen.advertise_client, context.client_address),
        },
        cluster_name: config.cluster.name.clone(),
        pool_groups: config.raft.pool_groups,
        store_id: identity.store_id,
        peer_address: peer_address.map_or_else(String::new, |used| told(&listen.advertise_peer, used)),
        zone: config.node.zone.clone().unwrap_or_default(),
        tags: config.node.tags.clone().unwrap_or_default().0,
        replace_after: config.cluster.replace_after,
    }
}

/// Notes the time once, and returns what notes it from now on: so that a restart under a wall clock that is far off is
/// found out.
fn note_time(
    store: &Store,
    clock: Clock,
    token: CancellationToken,
) -> Result<impl Future<Output = ()> + Send + 'static, String> {
    let unwritten = |e: std::io::Error| format!("the time cannot be noted in the clock file: {e}");
    let mut file = ClockFile::open(&store.options().dir).map_err(unwritten)?;
    file.note(clock.now_us()).map_err(unwritten)?;
    Ok(async move {
        let mut tick = tokio::time::interval(NOTE_EVERY);
        loop {
            tokio::select! {
                () = token.cancelled() => break,
                _ = tick.tick() => {}
            }
            let time_us = clock.now_us();
            let noted = tokio::task::spawn_blocking(move || {
                let result = file.note(time_us);
                (file, result)
            });
            match noted.await {
                Ok((back, result)) => {
                    file = back;
                    if let Err(error) = result {
                        tracing::warn!(%error, "the time cannot be noted in the clock file");
                    }
                }
                // The runtime is going down.
                Err(_) => return,
            }
        }
        let _ = file.note(clock.now_us());
    })
}

/// Turns what the store finds out into alarms.
async fn watch(store: Arc<Store>, alarms: Alarms, token: CancellationToken) {
    let mut poisoned = store.poisoned();
    let mut tick = tokio::time::interval(WATCH_EVERY);
    loop {
        tokio::select! {
            () = token.cancelled() => return,
            _ = tick.tick() => {}
            _ = poisoned.changed() => {}
        }
        if let Some(poison) = poisoned.borrow_and_update().as_ref() {
            alarms.raise(AlarmKind::Poisoned, poison.to_string());
        }
        if let Some(note) = store.first_damage() {
            alarms.raise(AlarmKind::Damaged, note.what);
        }
        let space = store.space();
        if space.low {
            alarms.raise(
                AlarmKind::DiskLow,
                format!(
                    "{} bytes are free, {} must stay free: publishes are refused until there is more",
                    space.free,
                    store.options().min_free_bytes
                ),
            );
        } else {
            alarms.clear(AlarmKind::DiskLow);
        }
    }
}

impl StatusSource for Running {
    fn data(&self) -> DataStatus {
        let identity = self.store.identity();
        let space = self.store.space();
        let mut status = DataStatus {
            cluster_id: self.view.cluster().map(|c| c.cluster_id).unwrap_or_default(),
            node_id: identity.node_id.get(),
            incarnation: identity.incarnation,
            streams: self.view.live_streams() as u64,
            space: SpaceStatus {
                used_bytes: space.held,
                free_bytes: space.free,
                low: space.low,
            },
            ..DataStatus::default()
        };
        for shard in self.groups.directory().all() {
            let at = shard.positions();
            status.messages += at.messages;
            status.bytes += at.bytes;
        }
        status
    }
}

impl Engine for Running {
    fn routes(&self) -> Routes {
        api::routes(self.edge.clone())
    }

    fn status(&self) -> Arc<dyn StatusSource> {
        Arc::new(self.clone())
    }

    fn hand_over(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            let begun = std::time::Instant::now();
            match self.control.hand_over(HAND_OVER_MAX).await {
                0 => tracing::info!(took = ?begun.elapsed(), "leads nothing that others can lead"),
                left => tracing::warn!(
                    left,
                    "groups were not handed over within {HAND_OVER_MAX:?}: others elect a leader"
                ),
            }
        })
    }

    fn given_up(&self) -> BoxFuture<'_, ()> {
        Box::pin(anew::given_up(
            &self.context,
            &self.store,
            &self.control,
            self.known_damage.clone(),
        ))
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            // Sessions end by themselves; unary publishes are answered when no batch holds memory any more.
            let _ = self.sessions.finish(Duration::from_secs(3600)).await;
            while self.context.publish_memory.used() > 0 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
    }

    fn close(&self) -> BoxFuture<'_, Result<(), String>> {
        Box::pin(self.end())
    }
}
