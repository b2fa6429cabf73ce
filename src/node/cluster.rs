//! How a node finds its cluster: as one without peers, as the founder, as a joiner, or as the one it was before; and the
//! listener that its peers come to.

use std::sync::Arc;

use futures_util::stream;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

use super::config::Config;
use super::config::rules::is_private;
use super::tls;
use crate::base::Tasks;
use crate::base::net::BoundedListener;
use crate::control::membership::{JoinFacts, JoinServer, Joining};
use crate::control::{HintsKeeper, NodeFacts};
use crate::model::{NodeId, ReplicaId};
use crate::raft::transport::{PeerConfig, PeerIdentity, PeerMap, PeerServer, Peers};
use crate::storage::{ClusterHints, PeerHint, Renewal, Store};
use crate::wire::internal::JoinNode;

/// Connections of peers at a time: two for each, and those that come back before the old ones are gone.
pub const PEER_CONNECTIONS_MAX: usize = 4_096;

/// A bound peer listener; taken once.
pub type PeerListener = Arc<Mutex<Option<BoundedListener>>>;

/// What a node with peers has.
pub struct ClusterNode {
    pub peers: Peers,
    pub keeper: Arc<HintsKeeper>,
    pub cluster_id: String,
    pub meta_replica: ReplicaId,
    pub founder: bool,
    token: Vec<u8>,
    server_tls: Option<ServerTlsConfig>,
}

/// The cluster's token: what the file holds, without white space around it.
fn token(config: &Config) -> Result<Vec<u8>, String> {
    let Some(path) = &config.cluster.token_file else {
        return Ok(Vec::new());
    };
    let told = |what: String| format!("cluster.token_file: {} {what}", path.display());
    let bytes = std::fs::read(path).map_err(|error| told(format!("cannot be read: {error}")))?;
    let token = bytes.trim_ascii();
    if token.len() < 8 {
        return Err(told(format!(
            "holds {} bytes; allowed: at least 8, best 32 random ones, such as `openssl rand -hex 32` writes",
            token.len()
        )));
    }
    Ok(token.to_vec())
}

type Tls = (Option<ServerTlsConfig>, Option<ClientTlsConfig>);

/// TLS between nodes: both sides show the node's certificate.
fn peer_tls(config: &Config) -> Result<Tls, String> {
    let (Some(ca), Some(cert), Some(key)) = (&config.tls.peer_ca, &config.tls.cert, &config.tls.key) else {
        return Ok((None, None));
    };
    tls::install_provider();
    let ca = Certificate::from_pem(tls::read("tls.peer_ca", ca)?);
    let identity = Identity::from_pem(tls::read("tls.cert", cert)?, tls::read("tls.key", key)?);
    let server = ServerTlsConfig::new()
        .identity(identity.clone())
        .client_ca_root(ca.clone());
    let client = ClientTlsConfig::new().identity(identity).ca_certificate(ca);
    Ok((Some(server), Some(client)))
}

/// What a node without peers must not be started on.
pub fn may_be_alone(store: &Store) -> Result<(), String> {
    match ClusterHints::load(&store.options().dir) {
        Ok(None) => Ok(()),
        Ok(Some(_)) => Err(
            "this data directory is that of a node with peers: start it with --peer-listen ADDR, so that the others of \
             its cluster can reach it"
                .into(),
        ),
        Err(error) => Err(error.to_string()),
    }
}

impl ClusterNode {
    /// Finds the cluster, joining it if need be: then this waits until a member answers, or `stop`.
    pub async fn find(
        config: &Config,
        store: &Arc<Store>,
        facts: &mut NodeFacts,
        stop: &CancellationToken,
    ) -> Result<Self, String> {
        let token = token(config)?;
        let (server_tls, client_tls) = peer_tls(config)?;
        let dir = store.options().dir.clone();
        let identity = store.identity();
        let renewal = Renewal::load(&dir).map_err(|e| e.to_string())?;
        let hints = match &identity.cluster_id {
            Some(_) => {
                let hints = ClusterHints::load(&dir).map_err(|e| e.to_string())?;
                // One that was without peers so far: it has founded its cluster.
                hints.unwrap_or(ClusterHints {
                    founder: true,
                    meta_replica: ReplicaId::new(crate::machine::meta::FIRST_META_REPLICA),
                    peers: Vec::new(),
                })
            }
            None if config.cluster.bootstrap && renewal.is_none() => {
                let hints = ClusterHints {
                    founder: true,
                    meta_replica: ReplicaId::new(crate::machine::meta::FIRST_META_REPLICA),
                    peers: Vec::new(),
                };
                let cluster_id = uuid::Uuid::now_v7().simple().to_string();
                note(store, hints.clone(), cluster_id, identity.node_id).await?;
                hints
            }
            None => {
                let addresses = ways_in(config, renewal.as_ref());
                if addresses.is_empty() {
                    return Err(
                        "this data directory is in no cluster yet: found one with --bootstrap, or join one with --join \
                         HOST:PORT (the peer address of any of its nodes)"
                            .into(),
                    );
                }
                let joining = Joining {
                    addresses,
                    token: token.clone(),
                    tls: client_tls.clone(),
                    facts: JoinFacts {
                        cluster_name: config.cluster.name.clone(),
                        cluster_id: renewal.as_ref().map(|renewal| renewal.cluster_id.clone()),
                        store_id: identity.store_id,
                        node: facts.join_node(),
                    },
                };
                let joined = joining.run(stop).await.map_err(|e| e.to_string())?;
                let peers = joined.peers.into_iter().map(|(node, address, meta_replica)| PeerHint {
                    node,
                    address,
                    meta_replica,
                    seen: None,
                });
                let mut hints = ClusterHints {
                    founder: false,
                    meta_replica: joined.meta_replica,
                    peers: peers.collect(),
                };
                hints.peers.sort_by_key(|peer| peer.node);
                note(store, hints.clone(), joined.cluster_id, joined.node).await?;
                tracing::info!(node = %joined.node, "joined the cluster");
                hints
            }
        };
        if renewal.is_some() {
            Renewal::finish(&dir).map_err(|e| format!("the file RENEWAL cannot be removed: {e}"))?;
        }
        let identity = store.identity();
        facts.node = identity.node_id;
        let cluster_id = identity.cluster_id.unwrap_or_default();
        let mut peer_config = PeerConfig::new(
            PeerIdentity {
                cluster_id: cluster_id.clone(),
                node: identity.node_id,
                store_id: identity.store_id,
                incarnation: identity.incarnation,
                starts: identity.starts,
            },
            token.clone(),
        );
        // The configuration allows it on loopback alone.
        peer_config.allow_empty_token = config.listen.peer.is_some_and(is_private);
        peer_config.tls = client_tls;
        peer_config.snapshot_bytes_per_second = config.raft.snapshot_rate.0;
        let (meta_replica, founder) = (hints.meta_replica, hints.founder);
        let keeper = HintsKeeper::new(dir, hints);
        let map = Arc::new(PeerMap::default());
        keeper.tell(&map);
        map.set_replica(meta_replica, identity.node_id);
        let peers = Peers::with_memory(peer_config, map, keeper.clone()).map_err(|e| e.to_string())?;
        Ok(Self {
            peers,
            keeper,
            cluster_id,
            meta_replica,
            founder,
            token,
            server_tls,
        })
    }

    /// Serves peers, and those that want to become some, until `tasks` end.
    pub fn serve(
        &self,
        listener: BoundedListener,
        server: &PeerServer,
        join: &JoinServer,
        tasks: &Tasks,
    ) -> Result<(), String> {
        let mut builder = server.tuned();
        if let Some(tls) = &self.server_tls {
            builder = builder
                .tls_config(tls.clone())
                .map_err(|e| format!("tls between nodes: {e}"))?;
        }
        let listener = Arc::new(listener);
        let incoming = stream::unfold(listener, |listener| async move {
            let (connection, _) = listener.accept().await;
            Some((Ok::<_, std::convert::Infallible>(connection), listener))
        });
        let serving = builder
            .add_service(server.service())
            .add_service(join.service())
            .serve_with_incoming(incoming);
        let token = tasks.token();
        tasks.spawn_vital("peer listener", async move {
            // Sessions of peers do not end by themselves: they are cut, and the peers see it.
            if let Some(Err(error)) = token.run_until_cancelled(serving).await {
                tracing::error!(%error, "the peer listener failed");
            }
        });
        Ok(())
    }

    /// The join service of this node.
    pub fn join_server(&self, control: &Arc<crate::control::Control>, config: &Config) -> JoinServer {
        JoinServer::new(
            control,
            self.cluster_id.clone(),
            config.cluster.name.clone(),
            self.token.clone(),
        )
    }
}

/// Where a node that is in no cluster may ask to be let in.
fn ways_in(config: &Config, renewal: Option<&Renewal>) -> Vec<String> {
    let told = config.cluster.join.iter().flat_map(|join| join.0.iter());
    let known = renewal.iter().flat_map(|renewal| renewal.peers.iter());
    let mut all: Vec<String> = Vec::new();
    for address in known.chain(told) {
        if !all.contains(address) {
            all.push(address.clone());
        }
    }
    all
}

/// Gives up a node whose data is damaged: the cluster removes it, and enters `node` in its place. Waits until a member
/// answers that it may be, or `stop`.
pub async fn give_up(
    config: &Config,
    renewal: &Renewal,
    node: JoinNode,
    stop: &CancellationToken,
) -> Result<(), String> {
    let addresses = ways_in(config, Some(renewal));
    if addresses.is_empty() {
        return Err("it knows no other node of its cluster; name one with --join HOST:PORT".into());
    }
    let (_, tls) = peer_tls(config)?;
    let joining = Joining {
        addresses,
        token: token(config)?,
        tls,
        facts: JoinFacts {
            cluster_name: config.cluster.name.clone(),
            cluster_id: Some(renewal.cluster_id.clone()),
            store_id: renewal.store_id,
            node: JoinNode {
                former_node_id: renewal.former_node.get(),
                former_store_id: format!("{:032x}", renewal.former_store_id),
                ..node
            },
        },
    };
    joining.run(stop).await.map_err(|e| e.to_string())?;
    Ok(())
}

/// Notes the cluster on disk: the hints first, so that a directory which says that it is in a cluster has them.
async fn note(store: &Arc<Store>, hints: ClusterHints, cluster_id: String, node: NodeId) -> Result<(), String> {
    let store = store.clone();
    let noted = tokio::task::spawn_blocking(move || {
        hints.store(&store.options().dir)?;
        store.join_cluster(&cluster_id, node)
    });
    let noted = noted.await.map_err(|e| e.to_string())?;
    noted.map_err(|e| format!("the cluster could not be noted: {e}"))
}
