//! The life of a node, from its configuration to its end.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use tokio::sync::{oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::anew;
use super::cluster::{PEER_CONNECTIONS_MAX, PeerListener};
use super::config::Config;
use super::engine::{Context, Engine, StartError};
use super::listener::{ClientListener, Health, cannot_listen};
use super::ports::{Ports, PortsFile};
use crate::base::net::BoundedListener;
use crate::base::{AlarmKind, Alarms, ByteBudget, Clock, Tasks, clock};
use crate::monitor::{self, Monitor, Phase, Recorder, recorder};
use crate::storage::last_time_us;

/// How long a node that must stop, because it cannot go on, waits for its clients.
const BROKEN_DRAIN_MAX: Duration = Duration::from_secs(3);
/// How long the store may take to flush and close. What was acknowledged does not depend on it.
const CLOSE_MAX: Duration = Duration::from_secs(60);
/// How long tasks may take to end when all work is done.
const TASKS_MAX: Duration = Duration::from_secs(5);

/// How a node ended. The numbers are the exit codes of the command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// It was told to stop, and did.
    Done = 0,
    /// It could not start, or could not go on. A supervisor may restart it.
    Failed = 1,
    /// The configuration is wrong. A restart does not help.
    Usage = 2,
    /// Stored data is damaged. A restart does not help.
    Damaged = 6,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Starts an engine.
pub type Start = fn(Context) -> BoxFuture<'static, Result<Arc<dyn Engine>, StartError>>;

/// Runs a node until `stop` is cancelled or it cannot go on. `ready` is called when it serves. The configuration was
/// checked. Logging is up to the caller.
pub async fn run(
    config: Config,
    start: impl FnOnce(Context) -> BoxFuture<'static, Result<Arc<dyn Engine>, StartError>>,
    stop: CancellationToken,
    ready: impl FnOnce(&Ports),
) -> Exit {
    match Node::prepare(config).await {
        Ok((node, client)) => node.live(client, start, stop, ready).await,
        Err(error) => {
            tell(&error);
            Exit::Failed
        }
    }
}

/// What ended the serving.
enum End {
    Told,
    /// Its data is damaged, and it is to begin anew.
    GivenUp,
    Broken(String),
}

struct Node {
    config: Arc<Config>,
    clock: Clock,
    alarms: Alarms,
    monitor: Monitor,
    /// The engine's, and the listener's.
    tasks: Tasks,
    /// Last to go: the monitor, the clock.
    edge: Tasks,
    health: Health,
    ports: Ports,
    /// The peer listener, until the engine takes it.
    peer: Option<(PeerListener, SocketAddr)>,
}

impl Node {
    /// Binds every address before the store is touched, and serves the monitor, so that a start can be watched.
    async fn prepare(config: Config) -> Result<(Self, ClientListener), String> {
        tracing::info!(
            version = env!("CARGO_PKG_VERSION"),
            name = config.node.name,
            data = %config.node.data_dir.display(),
            "starting"
        );
        let recorder = Recorder::install();
        let clock = node_clock(&config);
        let alarms = Alarms::new(clock.clone());
        let monitor = Monitor::new(
            &config.cluster.name,
            &config.node.name,
            clock.clone(),
            alarms.clone(),
            recorder.clone(),
        );
        if let Some(path) = &config.listen.ports_file {
            PortsFile::clear(path)?;
        }
        let client = ClientListener::bind(&config).await?;
        let told = |what, flag, address| move |error: std::io::Error| cannot_listen(what, flag, address, &error);
        let address = config.listen.monitor;
        let told_monitor = told("monitor", "--monitor-listen", address);
        let monitor_listener = monitor::bind(address).await.map_err(&told_monitor)?;
        let mut prometheus = None;
        if let Some(address) = config.listen.prometheus {
            let told = told("metrics", "--prometheus-listen-on", address);
            let listener = monitor::bind(address).await.map_err(&told)?;
            prometheus = Some((listener.local_addr().map_err(&told)?, listener));
        }
        let mut peer = None;
        if let Some(address) = config.listen.peer {
            let told = told("peers", "--peer-listen", address);
            let listener = BoundedListener::bind(address, PEER_CONNECTIONS_MAX)
                .await
                .map_err(&told)?;
            let address = listener.local_addr().map_err(&told)?;
            peer = Some((Arc::new(Mutex::new(Some(listener))), address));
        }
        let ports = Ports {
            client: client.local_addr().map_err(|error| error.to_string())?,
            monitor: monitor_listener.local_addr().map_err(&told_monitor)?,
            peer: peer.as_ref().map(|(_, address)| *address),
            prometheus: prometheus.as_ref().map(|(address, _)| *address),
            pid: std::process::id(),
        };

        let edge = Tasks::new("edge");
        let routes = monitor.routes(prometheus.is_none());
        edge.spawn(
            "monitor",
            monitor::serve(monitor_listener, routes, edge.token().cancelled_owned()),
        );
        if let Some((_, listener)) = prometheus {
            let routes = monitor.metrics_routes();
            edge.spawn(
                "prometheus",
                monitor::serve(listener, routes, edge.token().cancelled_owned()),
            );
        }
        edge.spawn("clock", watch_clock(clock.clone(), alarms.clone(), edge.token()));
        edge.spawn("recorder", tend(recorder, edge.token()));
        let health = client.health();
        health.set(false).await;
        let tasks = Tasks::new("node");
        let config = Arc::new(config);
        Ok((
            Self {
                config,
                clock,
                alarms,
                monitor,
                tasks,
                edge,
                health,
                ports,
                peer,
            },
            client,
        ))
    }

    async fn live(
        self,
        client: ClientListener,
        start: impl FnOnce(Context) -> BoxFuture<'static, Result<Arc<dyn Engine>, StartError>>,
        stop: CancellationToken,
        ready: impl FnOnce(&Ports),
    ) -> Exit {
        let draining = watch::Sender::new(false);
        let limits = &self.config.limits;
        let context = Context {
            config: Arc::clone(&self.config),
            clock: self.clock.clone(),
            alarms: self.alarms.clone(),
            tasks: self.tasks.child("engine"),
            draining: draining.subscribe(),
            publish_memory: ByteBudget::new("publish", limits.publish_memory.as_usize()),
            read_memory: ByteBudget::new("read", limits.read_memory.as_usize()),
            started_us: self.monitor.started_us(),
            client_address: self.ports.client,
            peer_listener: self.peer.clone(),
            stop: stop.clone(),
        };
        let engine = match start(context).await {
            Ok(engine) => engine,
            Err(error) => {
                tell(&error.to_string());
                self.end_tasks().await;
                return match error {
                    StartError::Damaged(_) => Exit::Damaged,
                    StartError::Failed(_) => Exit::Failed,
                };
            }
        };
        self.monitor.set_source(engine.status());

        // The answer comes when the last request has ended; or the sender goes, when the listener panicked.
        let (served_tx, mut served) = oneshot::channel();
        let (leave, cut) = (CancellationToken::new(), CancellationToken::new());
        let serving = client.serve(engine.routes(), leave.clone().cancelled_owned());
        let patience_over = cut.clone();
        self.tasks.spawn("listener", async move {
            tokio::select! {
                result = serving => {
                    let _ = served_tx.send(result);
                }
                () = patience_over.cancelled() => {}
            }
        });
        let ports_file = match self
            .config
            .listen
            .ports_file
            .as_deref()
            .map(|path| PortsFile::write(path, self.ports))
        {
            None => Ok(None),
            Some(written) => written.map(Some),
        };
        let mut served_early = None;
        let end = match &ports_file {
            Err(error) => End::Broken(error.clone()),
            Ok(_) => {
                self.health.set(true).await;
                self.monitor.set_phase(Phase::Serving);
                let peer = self
                    .ports
                    .peer
                    .map_or_else(|| "none".to_owned(), |address| address.to_string());
                tracing::info!(client = %self.ports.client, peer, monitor = %self.ports.monitor, "ready");
                ready(&self.ports);
                let mut alarms = self.alarms.watch();
                tokio::select! {
                    () = stop.cancelled() => End::Told,
                    alarm = alarms.any_of(&[AlarmKind::Poisoned]) => End::Broken(alarm.reason),
                    () = engine.given_up() => End::GivenUp,
                    failure = self.tasks.failed() => End::Broken(format!("{} {}", failure.task, failure.reason)),
                    result = &mut served => {
                        let reason = served_reason(result);
                        served_early = Some(());
                        End::Broken(reason)
                    }
                }
            }
        };
        let (patience, exit) = match &end {
            End::Told => {
                tracing::info!("told to stop: draining");
                (self.config.node.drain_timeout, Exit::Done)
            }
            End::GivenUp => {
                tracing::warn!("the others make this node anew: it ends, and starts again");
                (self.config.node.drain_timeout.min(BROKEN_DRAIN_MAX), Exit::Failed)
            }
            End::Broken(reason) => {
                if !self.alarms.is_on(AlarmKind::Poisoned) {
                    self.alarms.raise(AlarmKind::TaskFailed, reason.clone());
                }
                tell(&format!(
                    "the node cannot go on: {reason}; it stops, and may be restarted"
                ));
                (self.config.node.drain_timeout.min(BROKEN_DRAIN_MAX), Exit::Failed)
            }
        };

        // Not ready from here on; the sessions tell their clients to go away, the listener asks the others.
        drop(ports_file);
        self.monitor.set_phase(Phase::Draining);
        self.health.set(false).await;
        if matches!(end, End::Told | End::GivenUp) {
            engine.hand_over().await;
        }
        draining.send_replace(true);
        leave.cancel();
        self.health.end_watches().await;
        let deadline = Instant::now() + patience;
        if served_early.is_none() {
            match timeout_at(deadline, &mut served).await {
                Ok(Ok(Ok(()))) => tracing::info!("every client has left"),
                Ok(result) => tracing::warn!(reason = served_reason(result), "the listener failed while draining"),
                Err(_) => tracing::warn!(?patience, "clients did not leave in time; their connections are cut"),
            }
        }
        cut.cancel();
        if timeout_at(deadline, engine.drain()).await.is_err() {
            tracing::warn!(
                ?patience,
                "some publishes were not acknowledged in time; their outcome is unknown to their clients"
            );
        }
        let closed = match timeout(CLOSE_MAX, engine.close()).await {
            Ok(closed) => closed,
            Err(_) => Err(format!("the store did not close within {CLOSE_MAX:?}")),
        };
        self.end_tasks().await;
        // What is damaged may also be found by a write, which ends the store for good: the next start asks the others.
        let is_damaged = self.peer.is_some() && self.alarms.is_on(AlarmKind::Damaged);
        let anew = matches!(end, End::GivenUp) || (is_damaged && matches!(end, End::Broken(_)));
        // Who was told to stop in the meantime stops: the next start goes on.
        if anew && !stop.is_cancelled() {
            if let Err(error) = closed {
                tracing::warn!(error, "closing failed");
            }
            tell(&anew::again());
            return Exit::Failed;
        }
        match closed {
            Ok(()) => {
                tracing::info!("stopped");
                exit
            }
            Err(error) => {
                tell(&format!(
                    "closing failed: {error}; what was acknowledged is on disk and is checked at the next start"
                ));
                Exit::Failed
            }
        }
    }

    async fn end_tasks(&self) {
        // What does not end is named in the log.
        let _ = self.tasks.drain(TASKS_MAX).await;
        let _ = self.edge.drain(TASKS_MAX).await;
    }
}

fn served_reason(result: Result<Result<(), String>, oneshot::error::RecvError>) -> String {
    match result {
        Ok(Ok(())) => "the client listener ended by itself".into(),
        Ok(Err(error)) => error,
        Err(_) => "the client listener was dropped".into(),
    }
}

/// The clock, going on from when the node last ran.
fn node_clock(config: &Config) -> Clock {
    match last_time_us(&config.node.data_dir) {
        Some(last_us) if !config.clock.accept => Clock::system_after(last_us, config.clock.max_offline),
        Some(_) | None => Clock::system(),
    }
}

/// Keeps the alarm about the clock.
async fn watch_clock(clock: Clock, alarms: Alarms, stop: CancellationToken) {
    let mut ticks = interval(clock::CHECK_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => {}
        }
        match clock.check().reason() {
            // The amount changes every second when a clock runs at another speed; the alarm tells how it began.
            Some(reason) if !alarms.is_on(AlarmKind::ClockJump) => alarms.raise(AlarmKind::ClockJump, reason),
            Some(_) => {}
            None => alarms.clear(AlarmKind::ClockJump),
        }
    }
}

async fn tend(recorder: Recorder, stop: CancellationToken) {
    let mut ticks = interval(recorder::TEND_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = ticks.tick() => recorder.tend(),
        }
    }
}

/// To the log; and where the log is off, to standard error all the same: it is why the process ends.
fn tell(error: &str) {
    if tracing::enabled!(tracing::Level::ERROR) {
        tracing::error!("{error}");
    } else {
        eprintln!("mainstem: {error}");
    }
}
