//! The client listener: gRPC over HTTP/2, with or without TLS, health and reflection beside the services.

use std::convert::Infallible;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::{Connected, TcpConnectInfo};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::config::{Config, LimitsSection};
use super::edge::Edge;
use super::tls;
use crate::base::error_chain;
use crate::base::metric_names as names;
use crate::base::net::{BoundedListener, Connection};
use crate::wire::DESCRIPTOR_SET;

/// A frame may carry this much: fewer headers and calls for large batches.
const FRAME_BYTES_MAX: u32 = 1 << 20;
/// A connection on which nothing comes for so long is asked whether it lives …
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
/// … and closed when it has not answered after this.
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(20);
/// Of a request's headers.
const HEADER_BYTES_MAX: u32 = 64 << 10;

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        TcpConnectInfo {
            local_addr: self.local_addr(),
            remote_addr: self.peer_addr(),
        }
    }
}

/// A client listener that has its address and does not yet serve.
pub struct ClientListener {
    listener: BoundedListener,
    server: Server<tower::layer::util::Stack<Edge, tower::layer::util::Identity>>,
    health: HealthReporter,
}

impl ClientListener {
    /// Listens, and reads the certificates. The text of an error names what is wrong.
    pub async fn bind(config: &Config) -> Result<Self, String> {
        let mut server = tune(Server::builder(), &config.limits);
        if let Some(tls) = tls::load(&config.tls)? {
            server = server
                .tls_config(tls)
                .map_err(|error| format!("tls: {}", error_chain(&error)))?;
        }
        let address = config.listen.client;
        let connections_max = usize::try_from(config.limits.connections_max).unwrap_or(usize::MAX);
        let listener = BoundedListener::bind(address, connections_max)
            .await
            .map_err(|error| cannot_listen("client", "--listen", address, &error))?
            .metrics(
                metrics::gauge!(names::NODE_CLIENT_CONNECTIONS),
                metrics::counter!(names::NODE_CONNECTION_REFUSALS_TOTAL),
            );
        Ok(Self {
            listener,
            server: server.layer(Edge::new(DESCRIPTOR_SET)),
            health: HealthReporter::new(),
        })
    }

    /// The address in use.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// What the gRPC health service says.
    pub fn health(&self) -> Health {
        Health {
            reporter: self.health.clone(),
        }
    }

    /// Serves `routes` until `stop` completes; then asks the clients to leave (GOAWAY), accepts nothing new and
    /// returns when the requests under way have ended.
    pub async fn serve(mut self, routes: Routes, stop: impl Future<Output = ()>) -> Result<(), String> {
        let health = tonic_health::pb::health_server::HealthServer::new(
            tonic_health::server::HealthService::from_health_reporter(self.health.clone()),
        );
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let invalid = |error| format!("the protocol's own descriptors are invalid: {error}");
        let routes = routes
            .add_service(health)
            .add_service(reflection().build_v1().map_err(invalid)?)
            .add_service(reflection().build_v1alpha().map_err(invalid)?);
        let listener = Arc::new(self.listener);
        let incoming = stream::unfold(listener, |listener| async move {
            let (connection, _) = listener.accept().await;
            Some((Ok::<_, Infallible>(connection), listener))
        });
        self.server
            .add_routes(routes)
            .serve_with_incoming_shutdown(incoming, stop)
            .await
            .map_err(|error| format!("the client listener ended: {}", error_chain(&error)))
    }
}

/// What the gRPC health service says of the node.
#[derive(Clone)]
pub struct Health {
    reporter: HealthReporter,
}

impl Health {
    /// Of the node as a whole (the empty service name) and of each service.
    pub async fn set(&self, serving: bool) {
        let status = if serving {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        };
        for service in SERVICES {
            self.reporter.set_service_status(service, status).await;
        }
    }

    /// Ends the watches, so that who watches the health of a node that stops does not keep it from stopping.
    pub async fn end_watches(&self) {
        let mut reporter = self.reporter.clone();
        for service in SERVICES {
            reporter.clear_service_status(service).await;
        }
    }
}

/// What health is told of.
const SERVICES: &[&str] = &[
    "",
    "mainstem.v1.PublishService",
    "mainstem.v1.ReadService",
    "mainstem.v1.StreamService",
    "mainstem.v1.ServerService",
];

fn tune(server: Server, limits: &LimitsSection) -> Server {
    let window = |bytes: u64| Some(u32::try_from(bytes).unwrap_or(u32::MAX).min(i32::MAX as u32));
    server
        .initial_stream_window_size(window(limits.stream_window.0))
        .initial_connection_window_size(window(limits.connection_window.0))
        .max_frame_size(Some(FRAME_BYTES_MAX))
        .max_concurrent_streams(Some(limits.connection_requests_max))
        .http2_max_header_list_size(Some(HEADER_BYTES_MAX))
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// What to say when an address cannot be used.
pub fn cannot_listen(what: &str, flag: &str, address: SocketAddr, error: &std::io::Error) -> String {
    let kind = error.kind();
    let hint = if kind == ErrorKind::AddrInUse {
        format!("another process has it; stop that one, or choose another address with {flag} (port 0: any free one)")
    } else if kind == ErrorKind::AddrNotAvailable {
        format!("this machine has no such address; choose one with {flag}")
    } else if kind == ErrorKind::PermissionDenied {
        format!("ports below 1024 need a privilege; choose another with {flag}")
    } else {
        error.to_string()
    };
    format!("cannot listen on {address} ({what}): {hint}")
}
