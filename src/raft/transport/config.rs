//! Settings of the transport, and who this node is.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tonic::transport::ClientTlsConfig;

use crate::model::NodeId;

/// Who a node is. Sent to every peer, and checked by it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    pub cluster_id: String,
    pub node: NodeId,
    /// Made with the data directory: tells an emptied disk from the one before.
    pub store_id: u128,
    /// Raised at each start: tells an older copy of a disk.
    pub incarnation: u64,
    /// A random number for each start, this one's last: tells an older copy that was started as often since.
    pub starts: Vec<u64>,
}

/// A connection to a peer.
pub trait PeerStream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<S: AsyncRead + AsyncWrite + Send + Unpin> PeerStream for S {}

/// Makes connections to peers by another way than TCP.
pub trait Dial: std::fmt::Debug + Send + Sync {
    /// Connects to an address as the [`PeerMap`](super::PeerMap) has it.
    fn dial(&self, address: &str) -> BoxFuture<'static, io::Result<Box<dyn PeerStream>>>;
}

/// Settings of the transport.
#[derive(Debug, Clone)]
pub struct PeerConfig {
    pub identity: PeerIdentity,
    /// The cluster's secret. Never sent.
    pub token: Vec<u8>,
    /// Whether the token may be empty: anyone who reaches the listener and knows the cluster's id is then let in.
    pub allow_empty_token: bool,
    /// Certificates to speak with peers by; `None`: without TLS.
    pub tls: Option<ClientTlsConfig>,
    /// The way to the peers; `None`: TCP.
    pub dial: Option<Arc<dyn Dial>>,
    /// A connection that is not made in this time has failed.
    pub connect_timeout: Duration,
    /// A handshake that is not done in this time has failed.
    pub handshake_timeout: Duration,
    /// A connection on which nothing comes for so long is asked whether it lives …
    pub keepalive_interval: Duration,
    /// … and given up when it has not answered after this.
    pub keepalive_timeout: Duration,
    /// An append stream with unanswered requests is given up when no answer comes for so long. Longer than a disk takes
    /// to sync when it is slow, because what is given up is sent again.
    pub append_timeout: Duration,
    /// A follower that there is nothing else to send to is told so much later what is committed: while messages come one
    /// after the other, the next one tells it.
    pub commit_hold: Duration,
    /// Between two attempts to connect: this at first, …
    pub reconnect_min: Duration,
    /// … doubling up to this, each with up to a half more by chance.
    pub reconnect_max: Duration,
    /// After the peer refused this node: trying again changes nothing soon.
    pub refused_retry: Duration,
    /// Most bytes that a peer may leave unanswered, of all its groups; a single larger request still goes alone.
    pub inflight_bytes_max: usize,
    /// Of these, most bytes of one append stream.
    pub stream_bytes_max: usize,
    /// Messages are gathered into frames up to this size; a single larger message still goes alone. What is urgent
    /// waits at most for the frame that is being sent.
    pub frame_bytes_max: usize,
    /// Sessions and transfers that may be open to this node at a time.
    pub sessions_max: usize,
    /// Most bytes of snapshots sent per second, of all transfers together, and as many received; 0: as fast as it goes.
    pub snapshot_bytes_per_second: u64,
    /// A transfer is given up when nothing moves for so long.
    pub snapshot_stall_timeout: Duration,
    /// Transfers that are received at a time.
    pub snapshots_received_max: usize,
}

/// Why a [`PeerConfig`] is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerConfigError {
    #[error(
        "the cluster's token is empty: give every node of the cluster the same secret, or allow an empty token \
         explicitly where the network is trusted"
    )]
    EmptyToken,
    #[error("this node has no cluster yet: found or join one before peers are spoken with")]
    NoCluster,
}

impl PeerConfig {
    /// The defaults for a node.
    pub fn new(identity: PeerIdentity, token: impl Into<Vec<u8>>) -> Self {
        Self {
            identity,
            token: token.into(),
            allow_empty_token: false,
            tls: None,
            dial: None,
            connect_timeout: Duration::from_secs(2),
            handshake_timeout: Duration::from_secs(5),
            keepalive_interval: Duration::from_secs(2),
            keepalive_timeout: Duration::from_secs(3),
            append_timeout: Duration::from_secs(5),
            commit_hold: Duration::from_millis(1),
            reconnect_min: Duration::from_millis(50),
            reconnect_max: Duration::from_secs(1),
            refused_retry: Duration::from_secs(15),
            inflight_bytes_max: 32 << 20,
            stream_bytes_max: 8 << 20,
            frame_bytes_max: 1 << 20,
            sessions_max: 4_096,
            snapshot_bytes_per_second: 128 << 20,
            snapshot_stall_timeout: Duration::from_secs(30),
            snapshots_received_max: 2,
        }
    }

    /// Whether it can be used.
    pub fn check(&self) -> Result<(), PeerConfigError> {
        if self.token.is_empty() && !self.allow_empty_token {
            return Err(PeerConfigError::EmptyToken);
        }
        if self.identity.cluster_id.is_empty() {
            return Err(PeerConfigError::NoCluster);
        }
        Ok(())
    }
}
