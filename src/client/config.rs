//! Where the servers are and how to talk to them.

use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use super::error::{ClientError, reason};

/// The address a server listens on when nothing else is told.
pub const DEFAULT_ADDRESS: &str = "127.0.0.1:7411";

/// Largest gRPC message either side accepts, in bytes: an encoded batch (8 MiB) fits with room to spare.
pub(crate) const GRPC_MESSAGE_BYTES_MAX: usize = 16 << 20;

/// HTTP/2 flow control windows, in bytes. They bound what the peer may send unread; with the 64 KiB that HTTP/2
/// starts from, a reader waits for a round trip every few hundred messages.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 frames that this side accepts, in bytes.
const FRAME_BYTES: u32 = 1 << 20;

/// How to reach a cluster.
///
/// ```no_run
/// use std::time::Duration;
/// use mainstem::client::{Client, ClientConfig};
///
/// # fn example() -> Result<(), mainstem::client::ClientError> {
/// let mut config = ClientConfig::new(["10.0.0.1:7411", "10.0.0.2:7411"]);
/// config.call_timeout = Duration::from_secs(5);
/// let client = Client::new(config)?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// `host:port` of any number of the cluster's nodes. They are tried in turn.
    pub addresses: Vec<String>,
    /// Also use the other nodes of the cluster, at the addresses that they advertise. Default: yes.
    pub learn_nodes: bool,
    /// Namespace of every stream named by this client. Empty: `default`.
    pub namespace: String,
    /// Speak TLS.
    pub tls: Option<TlsConfig>,
    /// How long one attempt to connect may take.
    pub connect_timeout: Duration,
    /// How long one call that waits for an answer may take.
    pub call_timeout: Duration,
    /// How long a call that certainly did not happen, or that can be repeated safely, is tried again.
    pub retry_for: Duration,
}

/// Certificates, all as PEM.
#[derive(Clone, Default)]
pub struct TlsConfig {
    /// Certificate authorities that vouch for the server.
    pub ca_pem: Option<Vec<u8>>,
    /// This client's certificate chain and private key, where the server asks for one.
    pub identity_pem: Option<(Vec<u8>, Vec<u8>)>,
    /// The name in the server's certificate, if it is not the host in the address.
    pub server_name: Option<String>,
}

impl std::fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TlsConfig")
            .field("ca", &self.ca_pem.is_some())
            .field("identity", &self.identity_pem.is_some())
            .field("server_name", &self.server_name)
            .finish()
    }
}

impl ClientConfig {
    /// A configuration with the defaults: no TLS, 5 s to connect, 30 s for a call, 10 s of retries.
    pub fn new<I, A>(addresses: I) -> Self
    where
        I: IntoIterator<Item = A>,
        A: Into<String>,
    {
        ClientConfig {
            addresses: addresses.into_iter().map(Into::into).collect(),
            learn_nodes: true,
            namespace: String::new(),
            tls: None,
            connect_timeout: Duration::from_secs(5),
            call_timeout: Duration::from_secs(30),
            retry_for: Duration::from_secs(10),
        }
    }

    /// Checks the addresses and certificates.
    pub(crate) fn check(&self) -> Result<(), ClientError> {
        if self.addresses.is_empty() {
            return Err(ClientError::invalid(reason::BAD_CONFIG, "no server address is given"));
        }
        self.addresses.iter().try_for_each(|a| self.endpoint(a).map(drop))
    }

    fn endpoint(&self, address: &str) -> Result<Endpoint, ClientError> {
        let bad = |why: String| {
            ClientError::invalid(
                reason::BAD_CONFIG,
                format!("`{address}` is not a usable server address: {why}; write host:port, e.g. {DEFAULT_ADDRESS}"),
            )
        };
        let bare = address
            .strip_prefix("http://")
            .or_else(|| address.strip_prefix("https://"))
            .unwrap_or(address)
            .trim_end_matches('/');
        if !bare
            .rsplit_once(':')
            .is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        {
            return Err(bad("there is no port".to_owned()));
        }
        let scheme = if self.tls.is_some() || address.starts_with("https://") {
            "https"
        } else {
            "http"
        };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{bare}"))
            .map_err(|e| bad(e.to_string()))?
            .connect_timeout(self.connect_timeout)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_frame_size(FRAME_BYTES)
            .http2_adaptive_window(false)
            .tcp_nodelay(true)
            .tcp_keepalive(Some(Duration::from_secs(30)))
            // A peer that is gone without a word (power, cable) is found out within 7 s: longer than a leader's
            // node may stand still for a moment, as with a machine that is moved.
            .http2_keep_alive_interval(Duration::from_secs(4))
            .keep_alive_timeout(Duration::from_secs(3))
            .user_agent(concat!("mainstem-rust/", env!("CARGO_PKG_VERSION")))
            .map_err(|e| bad(e.to_string()))?;
        if scheme == "https" {
            let given = self.tls.clone().unwrap_or_default();
            let mut tls = ClientTlsConfig::new();
            if let Some(ca) = &given.ca_pem {
                tls = tls.ca_certificate(Certificate::from_pem(ca));
            }
            if let Some((certificate, key)) = &given.identity_pem {
                tls = tls.identity(Identity::from_pem(certificate, key));
            }
            if let Some(name) = &given.server_name {
                tls = tls.domain_name(name);
            }
            endpoint = endpoint
                .tls_config(tls)
                .map_err(|e| ClientError::invalid(reason::BAD_CONFIG, format!("the TLS settings do not work: {e}")))?;
        }
        Ok(endpoint)
    }

    /// A connection of its own, made at first use and made again when it broke. Needs a tokio runtime.
    pub(crate) fn channel(&self, address: &str) -> Result<Channel, ClientError> {
        Ok(self.endpoint(address)?.connect_lazy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_checked_before_use() {
        for good in [
            "127.0.0.1:7411",
            "http://localhost:1",
            "https://a.example:443/",
            "[::1]:7411",
        ] {
            ClientConfig::new([good]).check().expect(good);
        }
        for bad in ["", "localhost", "localhost:", "host:port", ":7411", "host:70000"] {
            let e = ClientConfig::new([bad]).check().expect_err(bad);
            assert!(e.message.contains("host:port"), "{e}");
        }
        assert!(ClientConfig::new([""; 0]).check().is_err());
    }
}
