//! The HTTP edge: health, readiness, metrics, reports. Plain HTTP, read only, for machines and curious people.
//!
//! `/healthz`: 200 while the process can do its work, 503 with the reason when only a restart or a repair can help.
//! `/readyz`: 200 while the node serves, 503 with the reason when it is starting, draining or unhealthy.
//! `/metrics`: the Prometheus text format. `/v1/status`: a JSON report.

pub mod recorder;
pub mod status;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use parking_lot::RwLock;
use tokio::sync::watch;

use crate::base::metric_names as names;
use crate::base::net::{BoundedListener, Connection};
use crate::base::{Alarms, Clock};
pub use recorder::Recorder;
use status::{AlarmReport, ClockReport};
pub use status::{DataStatus, Report, SpaceStatus, StatusSource};

/// Connections a monitor listener keeps at a time.
pub const CONNECTIONS_MAX: usize = 64;
/// A connection on which nothing moves for so long is closed.
pub const SILENCE_MAX: Duration = Duration::from_secs(30);

/// How far the node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Opening its data, not yet serving.
    Starting,
    Serving,
    /// Told to stop; sends its clients away.
    Draining,
}

/// What the routes report. Clones share it.
#[derive(Clone)]
pub struct Monitor {
    inner: Arc<Inner>,
}

struct Inner {
    cluster: String,
    node: String,
    clock: Clock,
    alarms: Alarms,
    recorder: Recorder,
    phase: watch::Sender<Phase>,
    started_us: u64,
    started_monotonic_us: u64,
    source: RwLock<Option<Arc<dyn StatusSource>>>,
}

impl Monitor {
    /// Of a node that is starting.
    pub fn new(cluster: &str, node: &str, clock: Clock, alarms: Alarms, recorder: Recorder) -> Self {
        let (started_us, started_monotonic_us) = (clock.now_us(), clock.monotonic_us());
        metrics::gauge!(names::NODE_START_TIME_SECONDS).set(started_us as f64 / 1e6);
        let inner = Inner {
            cluster: cluster.to_owned(),
            node: node.to_owned(),
            clock,
            alarms,
            recorder,
            phase: watch::Sender::new(Phase::Starting),
            started_us,
            started_monotonic_us,
            source: RwLock::new(None),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Who tells about the data, from now on.
    pub fn set_source(&self, source: Arc<dyn StatusSource>) {
        *self.inner.source.write() = Some(source);
    }

    /// How far the node is, from now on.
    pub fn set_phase(&self, phase: Phase) {
        self.inner.phase.send_replace(phase);
    }

    /// How far the node is.
    pub fn phase(&self) -> Phase {
        *self.inner.phase.borrow()
    }

    /// When the node started, in microseconds since the Unix epoch.
    pub fn started_us(&self) -> u64 {
        self.inner.started_us
    }

    /// Why the node is unhealthy; none: it is healthy.
    pub fn unhealthy(&self) -> Option<String> {
        self.inner.alarms.fatal().map(|alarm| {
            let subject = if alarm.subject.is_empty() {
                String::new()
            } else {
                format!(" ({})", alarm.subject)
            };
            format!("{}{subject}: {}", alarm.kind, alarm.reason)
        })
    }

    /// Why the node does not serve; none: it is ready.
    pub fn unready(&self) -> Option<String> {
        self.unhealthy().or_else(|| match self.phase() {
            Phase::Starting => Some("starting: the store is being opened".into()),
            Phase::Serving => None,
            Phase::Draining => Some("draining: the node was told to stop".into()),
        })
    }

    /// The report of `/v1/status`.
    pub fn report(&self) -> Report {
        let inner = &*self.inner;
        let state = inner.clock.check();
        let uptime_us = inner.clock.monotonic_us().saturating_sub(inner.started_monotonic_us);
        Report {
            version: env!("CARGO_PKG_VERSION"),
            cluster: inner.cluster.clone(),
            node: inner.node.clone(),
            pid: std::process::id(),
            healthy: self.unhealthy().is_none(),
            ready: self.unready().is_none(),
            draining: self.phase() == Phase::Draining,
            started_us: inner.started_us,
            time_us: inner.clock.now_us(),
            uptime_seconds: uptime_us / 1_000_000,
            clock: ClockReport {
                agrees: state.agrees(),
                wall_ahead_us: state.behind_us(),
            },
            alarms: inner
                .alarms
                .active()
                .into_iter()
                .map(|alarm| AlarmReport {
                    name: alarm.kind.as_str(),
                    subject: alarm.subject,
                    reason: alarm.reason,
                    since_us: alarm.since_us,
                })
                .collect(),
            data: self.data(),
        }
    }

    fn data(&self) -> Option<DataStatus> {
        let source = self.inner.source.read().clone();
        source.map(|source| source.data())
    }

    /// The metrics, in the Prometheus text format.
    pub fn metrics(&self) -> String {
        let state = self.inner.clock.check();
        metrics::gauge!(names::NODE_CLOCK_DISAGREEMENT_SECONDS).set(state.behind_us() as f64 / 1e6);
        metrics::gauge!(names::NODE_READY_STATE).set(if self.unready().is_none() { 1.0 } else { 0.0 });
        if let Some(data) = self.data() {
            metrics::gauge!(names::NODE_STORED_STREAMS).set(data.streams as f64);
            metrics::gauge!(names::NODE_STORED_MESSAGES).set(data.messages as f64);
            metrics::gauge!(names::NODE_STORED_BYTES).set(data.bytes as f64);
            metrics::gauge!(names::NODE_DISK_USED_BYTES).set(data.space.used_bytes as f64);
            metrics::gauge!(names::NODE_DISK_FREE_BYTES).set(data.space.free_bytes as f64);
        }
        self.inner.recorder.render()
    }

    /// The routes of the monitor listener; with `/metrics` where no other listener serves them.
    pub fn routes(&self, with_metrics: bool) -> Router {
        let mut router = Router::new()
            .route("/healthz", get(healthz))
            .route("/readyz", get(readyz))
            .route("/v1/status", get(report));
        if with_metrics {
            router = router.route("/metrics", get(metrics_text));
        }
        router.fallback(not_found).with_state(self.clone())
    }

    /// The routes of the Prometheus listener.
    pub fn metrics_routes(&self) -> Router {
        Router::new()
            .route("/metrics", get(metrics_text))
            .fallback(not_found)
            .with_state(self.clone())
    }
}

async fn healthz(State(monitor): State<Monitor>) -> Response {
    verdict(monitor.unhealthy())
}

async fn readyz(State(monitor): State<Monitor>) -> Response {
    verdict(monitor.unready())
}

fn verdict(trouble: Option<String>) -> Response {
    match trouble {
        None => (StatusCode::OK, "ok\n").into_response(),
        Some(reason) => (StatusCode::SERVICE_UNAVAILABLE, reason + "\n").into_response(),
    }
}

async fn report(State(monitor): State<Monitor>) -> Response {
    axum::Json(monitor.report()).into_response()
}

async fn metrics_text(State(monitor): State<Monitor>) -> Response {
    (
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        monitor.metrics(),
    )
        .into_response()
}

async fn not_found() -> Response {
    (
        StatusCode::NOT_FOUND,
        "there are /healthz, /readyz, /metrics and /v1/status\n",
    )
        .into_response()
}

/// Listens for HTTP.
pub async fn bind(address: SocketAddr) -> std::io::Result<BoundedListener> {
    Ok(BoundedListener::bind(address, CONNECTIONS_MAX)
        .await?
        .silence_max(SILENCE_MAX))
}

/// Serves `routes` until `stop` completes. Requests under way are answered.
pub async fn serve(listener: BoundedListener, routes: Router, stop: impl Future<Output = ()> + Send + 'static) {
    let served = axum::serve(HttpListener(listener), routes)
        .with_graceful_shutdown(stop)
        .await;
    if let Err(error) = served {
        tracing::error!(%error, "the monitor listener ended");
    }
}

struct HttpListener(BoundedListener);

impl axum::serve::Listener for HttpListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        self.0.accept().await
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}
