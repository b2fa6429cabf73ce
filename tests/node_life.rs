//! A node's life, over a small engine: what it says while it starts, serves, drains and fails; TLS end to end.

#![allow(clippy::unwrap_used)]

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use mainstem::base::{AlarmKind, Principal};
use mainstem::monitor::{DataStatus, StatusSource};
use mainstem::node::{Config, Context, Engine, Exit, StartError, run};
use mainstem::wire::v1;
use mainstem::wire::v1::server_service_client::ServerServiceClient;
use mainstem::wire::v1::server_service_server::{ServerService, ServerServiceServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic::{Request, Response, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

const PATIENCE: Duration = Duration::from_secs(20);

/// Answers with the principal; holds its answers back while told to.
struct TestEngine {
    context: Context,
    hold: watch::Receiver<bool>,
    arrived: mpsc::Sender<()>,
    closed: Arc<AtomicBool>,
}

#[derive(Clone)]
struct Service {
    hold: watch::Receiver<bool>,
    arrived: mpsc::Sender<()>,
}

#[tonic::async_trait]
impl ServerService for Service {
    async fn get_server_info(
        &self,
        request: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::GetServerInfoResponse>, Status> {
        self.arrived.send(()).await.unwrap();
        self.hold.clone().wait_for(|hold| !hold).await.unwrap();
        let principal = request
            .extensions()
            .get::<Principal>()
            .expect("every request has a principal");
        Ok(Response::new(v1::GetServerInfoResponse {
            node_name: principal.to_string(),
            ..Default::default()
        }))
    }
}

struct Data;

impl StatusSource for Data {
    fn data(&self) -> DataStatus {
        DataStatus {
            streams: 3,
            messages: 1_234,
            bytes: 5_678,
            ..Default::default()
        }
    }
}

impl Engine for TestEngine {
    fn routes(&self) -> Routes {
        let service = Service {
            hold: self.hold.clone(),
            arrived: self.arrived.clone(),
        };
        Routes::new(ServerServiceServer::new(service))
    }

    fn status(&self) -> Arc<dyn StatusSource> {
        Arc::new(Data)
    }

    fn hand_over(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn given_up(&self) -> BoxFuture<'_, ()> {
        Box::pin(std::future::pending())
    }

    fn drain(&self) -> BoxFuture<'_, ()> {
        assert!(*self.context.draining.borrow(), "the sessions are told first");
        async {}.boxed()
    }

    fn close(&self) -> BoxFuture<'_, Result<(), String>> {
        self.closed.store(true, Ordering::SeqCst);
        async { Ok(()) }.boxed()
    }
}

/// A node that serves.
struct Node {
    client: SocketAddr,
    monitor: SocketAddr,
    prometheus: Option<SocketAddr>,
    context: Context,
    hold: watch::Sender<bool>,
    arrived: mpsc::Receiver<()>,
    closed: Arc<AtomicBool>,
    stop: CancellationToken,
    end: tokio::task::JoinHandle<Exit>,
    ports_file: PathBuf,
    _dir: tempfile::TempDir,
}

fn config() -> Config {
    let mut config = Config::default();
    config.node.name = "n1".into();
    config.node.data_dir = "unused".into();
    config.listen.client = "127.0.0.1:0".parse().unwrap();
    config.listen.monitor = "127.0.0.1:0".parse().unwrap();
    config
}

async fn start(mut config: Config) -> Node {
    let dir = tempfile::tempdir().unwrap();
    let ports_file = dir.path().join("ports.json");
    std::fs::write(&ports_file, "of an earlier node").unwrap();
    config.listen.ports_file = Some(ports_file.clone());
    let (hold_tx, hold) = watch::channel(false);
    let (arrived_tx, arrived) = mpsc::channel(16);
    let (context_tx, context_rx) = oneshot::channel();
    let (ports_tx, ports_rx) = oneshot::channel();
    let closed = Arc::new(AtomicBool::new(false));
    let stop = CancellationToken::new();
    let (told, is_closed, path) = (stop.clone(), Arc::clone(&closed), ports_file.clone());
    let end = tokio::spawn(async move {
        let start = move |context: Context| {
            async move {
                assert!(!path.exists(), "the old ports file is gone before the node is ready");
                assert!(context_tx.send(context.clone()).is_ok());
                let engine = TestEngine {
                    context,
                    hold,
                    arrived: arrived_tx,
                    closed: is_closed,
                };
                Ok(Arc::new(engine) as Arc<dyn Engine>)
            }
            .boxed()
        };
        run(config, start, told, move |ports| ports_tx.send(*ports).unwrap()).await
    });
    let ports = tokio::time::timeout(PATIENCE, ports_rx).await.unwrap().unwrap();
    Node {
        client: ports.client,
        monitor: ports.monitor,
        prometheus: ports.prometheus,
        context: context_rx.await.unwrap(),
        hold: hold_tx,
        arrived,
        closed,
        stop,
        end,
        ports_file,
        _dir: dir,
    }
}

impl Node {
    async fn end(self) -> Exit {
        let exit = tokio::time::timeout(PATIENCE, self.end).await.unwrap().unwrap();
        assert!(self.closed.load(Ordering::SeqCst), "the store was closed");
        assert!(!self.ports_file.exists(), "the ports file is gone");
        exit
    }

    async fn channel(&self) -> Channel {
        Endpoint::from_shared(format!("http://{}", self.client))
            .unwrap()
            .connect()
            .await
            .unwrap()
    }
}

async fn http(address: SocketAddr, path: &str) -> (u16, String) {
    let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (code, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn serves_reports_and_stops_when_told() {
    let node = start(config()).await;
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&node.ports_file).unwrap()).unwrap();
    assert_eq!(written["client"], node.client.to_string());
    assert_eq!(written["monitor"], node.monitor.to_string());
    assert_eq!(written["pid"], std::process::id());

    let channel = node.channel().await;
    let info = ServerServiceClient::new(channel.clone())
        .get_server_info(v1::GetServerInfoRequest {})
        .await
        .unwrap();
    assert_eq!(info.into_inner().node_name, "anonymous");
    let health = HealthClient::new(channel)
        .check(HealthCheckRequest { service: String::new() })
        .await
        .unwrap();
    assert_eq!(health.into_inner().status(), ServingStatus::Serving);

    assert_eq!(http(node.monitor, "/healthz").await, (200, "ok\n".into()));
    assert_eq!(http(node.monitor, "/readyz").await, (200, "ok\n".into()));
    assert_eq!(http(node.monitor, "/nothing").await.0, 404);
    let (code, report) = http(node.monitor, "/v1/status").await;
    let report: serde_json::Value = serde_json::from_str(&report).unwrap();
    assert_eq!(code, 200);
    assert_eq!((&report["node"], &report["ready"]), (&"n1".into(), &true.into()));
    assert_eq!(report["data"]["messages"], 1_234);
    let (code, metrics) = http(node.monitor, "/metrics").await;
    assert_eq!(code, 200);
    for line in [
        "node_stored_streams 3",
        "node_ready_state 1",
        "base_budget_limit_bytes{budget=\"publish\"} 67108864",
        "api_requests_total{method=\"ServerService/GetServerInfo\",code=\"OK\"}",
        "# HELP node_alarm_state",
        "node_alarm_state{alarm=\"disk_low\"} 0",
        "api_request_duration_seconds_bucket{method=\"ServerService/GetServerInfo\",le=\"0.01\"}",
    ] {
        assert!(metrics.contains(line), "{line} is missing in\n{metrics}");
    }
    node.stop.cancel();
    assert_eq!(node.end().await, Exit::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn metrics_have_a_listener_of_their_own_where_told() {
    let mut config = config();
    config.listen.prometheus = Some("127.0.0.1:0".parse().unwrap());
    let node = start(config).await;
    let prometheus = node.prometheus.unwrap();
    assert_eq!(http(prometheus, "/metrics").await.0, 200);
    assert_eq!(http(prometheus, "/healthz").await.0, 404);
    assert_eq!(http(node.monitor, "/metrics").await.0, 404);
    node.stop.cancel();
    assert_eq!(node.end().await, Exit::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_drain_answers_what_it_has_accepted_and_accepts_no_more() {
    let mut node = start(config()).await;
    node.hold.send_replace(true);
    let channel = node.channel().await;
    let mut watch = HealthClient::new(channel.clone())
        .watch(HealthCheckRequest { service: String::new() })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status(), ServingStatus::Serving);
    let mut client = ServerServiceClient::new(channel);
    let pending = tokio::spawn(async move { client.get_server_info(v1::GetServerInfoRequest {}).await });
    node.arrived.recv().await.unwrap();

    node.stop.cancel();
    node.context
        .draining
        .clone()
        .wait_for(|draining| *draining)
        .await
        .unwrap();
    // The health service says so, and then ends its watches, which would keep the connection open for ever.
    let mut seen = Vec::new();
    while let Ok(Some(update)) = watch.message().await {
        seen.push(update.status());
    }
    assert!(
        seen.iter().all(|status| *status == ServingStatus::NotServing),
        "{seen:?}"
    );
    let (code, reason) = http(node.monitor, "/readyz").await;
    assert_eq!((code, reason.as_str()), (503, "draining: the node was told to stop\n"));
    assert_eq!(
        http(node.monitor, "/healthz").await.0,
        200,
        "a node that drains is healthy"
    );
    assert!(!node.ports_file.exists(), "nobody is sent to a node that drains");
    // The listener's socket goes soon after; then nobody gets in.
    let refused = async {
        while tokio::net::TcpStream::connect(node.client).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();
    assert!(!pending.is_finished());
    node.hold.send_replace(false);
    pending.await.unwrap().expect("what was accepted is answered");
    assert_eq!(node.end().await, Exit::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_does_not_leave_does_not_hold_up_the_end() {
    let mut config = config();
    config.node.drain_timeout = Duration::from_millis(100);
    let mut node = start(config).await;
    node.hold.send_replace(true);
    let mut client = ServerServiceClient::new(node.channel().await);
    let pending = tokio::spawn(async move { client.get_server_info(v1::GetServerInfoRequest {}).await });
    node.arrived.recv().await.unwrap();
    node.stop.cancel();
    assert_eq!(
        tokio::time::timeout(PATIENCE, &mut node.end).await.unwrap().unwrap(),
        Exit::Done
    );
    assert!(node.closed.load(Ordering::SeqCst));
    pending.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_poisoned_store_ends_the_node_as_failed() {
    let mut config = config();
    config.node.drain_timeout = Duration::from_secs(3_600);
    let mut node = start(config).await;
    node.hold.send_replace(true);
    let mut client = ServerServiceClient::new(node.channel().await);
    let pending = tokio::spawn(async move { client.get_server_info(v1::GetServerInfoRequest {}).await });
    node.arrived.recv().await.unwrap();
    node.context
        .alarms
        .raise(AlarmKind::Poisoned, "sync failed: input/output error");
    node.context
        .draining
        .clone()
        .wait_for(|draining| *draining)
        .await
        .unwrap();
    let (code, reason) = http(node.monitor, "/healthz").await;
    assert_eq!(
        (code, reason.as_str()),
        (503, "poisoned: sync failed: input/output error\n")
    );
    assert_eq!(http(node.monitor, "/readyz").await.0, 503);
    // The hour is for a node that can go on; this one waits for seconds.
    assert_eq!(node.end().await, Exit::Failed);
    pending.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_is_reported_and_the_rest_is_served() {
    let node = start(config()).await;
    node.context
        .alarms
        .raise_for(AlarmKind::Damaged, "group g3", "checksum of batch 17");
    let (code, reason) = http(node.monitor, "/healthz").await;
    assert_eq!(
        (code, reason.as_str()),
        (503, "damaged (group g3): checksum of batch 17\n")
    );
    let mut client = ServerServiceClient::new(node.channel().await);
    client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap();
    node.stop.cancel();
    assert_eq!(node.end().await, Exit::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_task_that_panics_ends_the_node_as_failed() {
    let node = start(config()).await;
    node.context.tasks.spawn("ingest", async { panic!("a bug") });
    assert_eq!(node.end().await, Exit::Failed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_start_that_fails_says_how() {
    for (error, exit) in [
        (StartError::Damaged("the log is damaged".into()), Exit::Damaged),
        (StartError::Failed("in use by process 7".into()), Exit::Failed),
    ] {
        let start = move |_: Context| async move { Err(error) }.boxed();
        let ready = |_: &mainstem::node::Ports| panic!("it is never ready");
        assert_eq!(run(config(), start, CancellationToken::new(), ready).await, exit);
    }
    assert_eq!(Exit::Damaged as u8, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_address_in_use_is_found_before_the_store_is_touched() {
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    for the_client_s in [true, false] {
        let mut config = config();
        let address = if the_client_s {
            &mut config.listen.client
        } else {
            &mut config.listen.monitor
        };
        *address = taken.local_addr().unwrap();
        let start = |_: Context| panic!("the store is not touched");
        assert_eq!(run(config, start, CancellationToken::new(), |_| {}).await, Exit::Failed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_limit_are_closed_at_once() {
    let mut config = config();
    config.limits.connections_max = 1;
    let node = start(config).await;
    let mut client = ServerServiceClient::new(node.channel().await);
    client.get_server_info(v1::GetServerInfoRequest {}).await.unwrap();
    let mut second = tokio::net::TcpStream::connect(node.client).await.unwrap();
    let end = tokio::time::timeout(PATIENCE, second.read(&mut [0; 64])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    client
        .get_server_info(v1::GetServerInfoRequest {})
        .await
        .expect("the first one is not disturbed");
    node.stop.cancel();
    assert_eq!(node.end().await, Exit::Done);
}

/// An authority and what it signed, as PEM.
struct Pki {
    ca: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Pki {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params
            .distinguished_name
            .push(rcgen::DnType::CommonName, "test authority");
        let ca = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
        Self { ca }
    }

    /// (certificate, key)
    fn sign(&self, common_name: Option<&str>, names: &[&str]) -> (String, String) {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let mut params = rcgen::CertificateParams::new(names).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        if let Some(name) = common_name {
            params.distinguished_name.push(rcgen::DnType::CommonName, name);
        }
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.ca).unwrap();
        (certificate.pem(), key.serialize_pem())
    }
}

async fn start_tls(pki: &Pki, dir: &Path, client_auth: Option<mainstem::node::config::ClientAuth>) -> Node {
    let (certificate, key) = pki.sign(Some("server"), &["localhost"]);
    let write = |name: &str, pem: &str| {
        let path = dir.join(name);
        std::fs::write(&path, pem).unwrap();
        Some(path)
    };
    let mut config = config();
    config.tls.cert = write("cert.pem", &certificate);
    config.tls.key = write("key.pem", &key);
    if let Some(client_auth) = client_auth {
        config.tls.client_ca = write("ca.pem", &pki.ca.pem());
        config.tls.client_auth = client_auth;
    }
    start(config).await
}

async fn connect_tls(node: &Node, ca: &Pki, own: Option<(String, String)>) -> Result<Channel, tonic::transport::Error> {
    let mut tls = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(ca.ca.pem()))
        .domain_name("localhost");
    if let Some((certificate, key)) = own {
        tls = tls.identity(Identity::from_pem(certificate, key));
    }
    Endpoint::from_shared(format!("https://{}", node.client))
        .unwrap()
        .tls_config(tls)?
        .connect()
        .await
}

async fn who_am_i(channel: Channel) -> Result<String, Status> {
    let answer = ServerServiceClient::new(channel)
        .get_server_info(v1::GetServerInfoRequest {})
        .await?;
    Ok(answer.into_inner().node_name)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_with_optional_client_certificates() {
    let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
    let node = start_tls(&pki, dir.path(), Some(mainstem::node::config::ClientAuth::Optional)).await;

    let channel = connect_tls(&node, &pki, None).await.unwrap();
    let health = HealthClient::new(channel.clone())
        .check(HealthCheckRequest { service: String::new() })
        .await
        .unwrap();
    assert_eq!(health.into_inner().status(), ServingStatus::Serving);
    assert_eq!(who_am_i(channel).await.unwrap(), "anonymous");

    let named = connect_tls(
        &node,
        &pki,
        Some(pki.sign(Some("orders-service"), &["orders.internal"])),
    )
    .await
    .unwrap();
    assert_eq!(who_am_i(named).await.unwrap(), "certificate:orders-service");
    let by_name = connect_tls(&node, &pki, Some(pki.sign(None, &["billing.internal"])))
        .await
        .unwrap();
    assert_eq!(who_am_i(by_name).await.unwrap(), "certificate:billing.internal");
    let nobody = connect_tls(&node, &pki, Some(pki.sign(None, &[]))).await.unwrap();
    let refused = who_am_i(nobody).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::Unauthenticated, "{refused}");

    // Signed by somebody else: the handshake fails, at the latest when the connection is used.
    let stranger = Pki::new();
    let used = match connect_tls(&node, &pki, Some(stranger.sign(Some("orders-service"), &[]))).await {
        Ok(channel) => who_am_i(channel).await.map_err(|_| ()),
        Err(_) => Err(()),
    };
    assert_eq!(used, Err(()), "a stranger's certificate names nobody here");
    assert!(
        connect_tls(&node, &stranger, None).await.is_err(),
        "the client checks the server's certificate"
    );
    let plain = Endpoint::from_shared(format!("http://{}", node.client))
        .unwrap()
        .connect()
        .await;
    let plain = match plain {
        Ok(channel) => who_am_i(channel).await.map_err(|_| ()),
        Err(_) => Err(()),
    };
    assert_eq!(plain, Err(()), "nothing is served without TLS");
    node.stop.cancel();
    assert_eq!(node.end().await, Exit::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tls_with_required_client_certificates() {
    let (pki, dir) = (Pki::new(), tempfile::tempdir().unwrap());
    let node = start_tls(&pki, dir.path(), Some(mainstem::node::config::ClientAuth::Required)).await;
    let named = connect_tls(&node, &pki, Some(pki.sign(Some("ops"), &[])))
        .await
        .unwrap();
    assert_eq!(who_am_i(named).await.unwrap(), "certificate:ops");
    let without = match connect_tls(&node, &pki, None).await {
        Ok(channel) => who_am_i(channel).await.map_err(|_| ()),
        Err(_) => Err(()),
    };
    assert_eq!(without, Err(()));
    node.stop.cancel();
    assert_eq!(node.end().await, Exit::Done);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_tls_files_are_told_before_the_store_is_touched() {
    let dir = tempfile::tempdir().unwrap();
    let (pki, text) = (Pki::new(), dir.path().join("text"));
    std::fs::write(&text, "no PEM").unwrap();
    let (certificate, _) = pki.sign(Some("server"), &["localhost"]);
    let (_, other_key) = pki.sign(Some("other"), &["localhost"]);
    let (cert, key) = (dir.path().join("cert"), dir.path().join("key"));
    std::fs::write(&cert, certificate).unwrap();
    std::fs::write(&key, other_key).unwrap();
    for (cert, key) in [(&text, &text), (&dir.path().join("missing"), &key), (&cert, &key)] {
        let mut config = config();
        config.tls.cert = Some(cert.clone());
        config.tls.key = Some(key.clone());
        let start = |_: Context| panic!("the store is not touched");
        assert_eq!(run(config, start, CancellationToken::new(), |_| {}).await, Exit::Failed);
    }
}
