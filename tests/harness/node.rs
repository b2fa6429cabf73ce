//! One server process and its directory.

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use super::api::Api;
use super::{PATIENCE, faults};

/// How a node is started.
#[derive(Clone, Default)]
pub struct Options {
    /// Run under the preload library.
    pub faults: bool,
    /// With power failures (costs some speed).
    pub power: bool,
    /// Commands of the preload library to begin with.
    pub run: Vec<String>,
    /// More flags of `mainstem server`.
    pub flags: Vec<String>,
    pub env: Vec<(String, String)>,
    /// The network namespace to run in.
    pub namespace: Option<String>,
}

impl Options {
    pub fn plain() -> Self {
        Self::default()
    }

    /// Under the preload library: slow, full and failing disks, clock jumps.
    pub fn faulty() -> Self {
        Self {
            faults: true,
            ..Self::default()
        }
    }

    /// Under the preload library, with power failures.
    pub fn powered() -> Self {
        Self {
            faults: true,
            power: true,
            ..Self::default()
        }
    }

    pub fn flag(mut self, flag: &str, value: &str) -> Self {
        self.flags.extend([flag.to_string(), value.to_string()]);
        self
    }

    pub fn run(mut self, command: &str) -> Self {
        self.run.push(command.to_string());
        self
    }
}

/// A server process, or the place of one between two lives.
pub struct Node {
    pub options: Options,
    name: String,
    place: TempDir,
    data: PathBuf,
    /// Of a node with peers: where it listens for them. Once known, it stays.
    peer: Option<String>,
    /// Where it listens for clients, if that is to stay.
    client: Option<String>,
    /// The process; 0: none. Shared with who has to know.
    pid: Arc<AtomicU32>,
    paused: AtomicBool,
    /// It is never started again.
    retired: bool,
    child: Option<Child>,
    lives: u32,
    ports: Option<Ports>,
    /// How long the last start took until the node was ready.
    pub ready_in: Duration,
}

#[derive(Clone)]
struct Ports {
    client: String,
    monitor: String,
}

impl Node {
    /// A node with an empty directory, ready to serve.
    pub async fn start(options: Options) -> Self {
        let mut node = Self::new("node", options);
        node.launch();
        node.ready().await;
        node
    }

    /// A node that was not started yet.
    pub fn new(name: &str, options: Options) -> Self {
        let place = tempfile::Builder::new().prefix("mainstem-test-").tempdir().unwrap();
        let data = place.path().canonicalize().unwrap().join("data");
        Self {
            options,
            name: name.into(),
            place,
            data,
            peer: None,
            client: None,
            pid: Arc::default(),
            paused: AtomicBool::new(false),
            retired: false,
            child: None,
            lives: 0,
            ports: None,
            ready_in: Duration::ZERO,
        }
    }

    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Uses another data directory from the next start on.
    pub fn set_data(&mut self, data: &Path) {
        self.data = data.to_path_buf();
    }

    pub fn place(&self) -> &Path {
        self.place.path()
    }

    fn ports_file(&self) -> PathBuf {
        self.place.path().join("ports.json")
    }

    fn socket(&self) -> PathBuf {
        self.place.path().join("faults.sock")
    }

    fn log_file(&self) -> PathBuf {
        self.place.path().join(format!("log-{}", self.lives))
    }

    /// Starts the process and does not wait for it.
    pub fn launch(&mut self) {
        assert!(self.child.is_none(), "{} runs already", self.name);
        self.lives += 1;
        let _ = std::fs::remove_file(self.ports_file());
        self.ports = None;
        let log = File::create(self.log_file()).unwrap();
        // `MAINSTEM_BIN` names another one.
        let program = std::env::var_os("MAINSTEM_BIN").unwrap_or_else(|| env!("CARGO_BIN_EXE_mainstem").into());
        let mut c = match &self.options.namespace {
            None => Command::new(program),
            Some(namespace) => {
                // It becomes the program: the process stays the same.
                let mut c = Command::new("ip");
                c.args(["netns", "exec", namespace]).arg(program);
                c
            }
        };
        c.arg("server")
            .arg("--data-dir")
            .arg(&self.data)
            .args(["--listen", self.client.as_deref().unwrap_or("127.0.0.1:0")])
            .args(["--monitor-listen", "127.0.0.1:0", "--ports-file"])
            .arg(self.ports_file())
            .args(self.peer.iter().flat_map(|peer| ["--peer-listen", peer]))
            .args(&self.options.flags)
            .envs(self.options.env.iter().map(|(k, v)| (k, v)))
            .env("RUST_BACKTRACE", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        if self.options.faults {
            c.env("LD_PRELOAD", faults::library())
                .env("MAINSTEM_FAULTS_DIR", &self.data)
                .env("MAINSTEM_FAULTS_SIDE", self.place.path().join("side"))
                .env("MAINSTEM_FAULTS_SOCKET", self.socket())
                .env("MAINSTEM_FAULTS_POWER", if self.options.power { "1" } else { "0" })
                .env("MAINSTEM_FAULTS_RUN", self.options.run.join(";"));
        }
        let child = c.spawn().unwrap();
        self.pid.store(child.id(), Ordering::Release);
        self.child = Some(child);
        self.paused.store(false, Ordering::Relaxed);
    }

    /// Waits until the node serves. Panics, with the log, if it ends or takes too long.
    pub async fn ready(&mut self) {
        if let Err(status) = self.try_ready().await {
            panic!("{} ended before it was ready: {status}\n{}", self.name, self.log());
        }
    }

    /// Waits until the node serves, or has ended.
    pub async fn try_ready(&mut self) -> Result<(), ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some((ports, peer)) = self.told_ports() {
                self.ports = Some(ports);
                if self.peer.is_some() {
                    self.peer = Some(peer.expect("an address"));
                }
                self.ready_in = start.elapsed();
                return Ok(());
            }
            if let Some(status) = self.child.as_mut().expect("launched").try_wait().unwrap() {
                self.gone();
                return Err(status);
            }
            assert!(
                start.elapsed() < PATIENCE,
                "{} is not ready after {PATIENCE:?}\n{}",
                self.name,
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// Starts the process again after it has ended, and waits until it serves.
    pub async fn restart(&mut self) {
        self.launch();
        self.ready().await;
    }

    fn gone(&mut self) {
        self.child = None;
        self.pid.store(0, Ordering::Release);
    }

    pub fn pid(&self) -> u32 {
        self.child.as_ref().expect("runs").id()
    }

    /// Holds the process's number while there is one, 0 otherwise.
    pub fn pid_cell(&self) -> Arc<AtomicU32> {
        self.pid.clone()
    }

    /// Gives it an address for clients that stays over restarts.
    pub fn set_client_listen(&mut self, address: &str) {
        self.client = Some(address.into());
    }

    pub fn client_addr(&self) -> String {
        match &self.client {
            Some(fixed) => fixed.clone(),
            None => self.ports_now().client,
        }
    }

    /// Where it listens now: a node that is made anew starts itself again, at other ports.
    fn ports_now(&self) -> Ports {
        let known = self.ports.as_ref().expect("ready");
        self.told_ports().map_or_else(|| known.clone(), |(ports, _)| ports)
    }

    /// What it has written of itself when it became ready; the second is its address for peers.
    fn told_ports(&self) -> Option<(Ports, Option<String>)> {
        let text = std::fs::read_to_string(self.ports_file()).ok()?;
        let told: serde_json::Value = serde_json::from_str(&text).expect("the ports file is written at once");
        if let Some(child) = &self.child {
            assert_eq!(
                told["pid"].as_u64(),
                Some(u64::from(child.id())),
                "the ports file names the process"
            );
        }
        let of = |name: &str| told[name].as_str().map(str::to_owned);
        let ports = Ports {
            client: of("client").expect("an address"),
            monitor: of("monitor").expect("an address"),
        };
        Some((ports, of("peer")))
    }

    /// Gives it a listener for peers from the next start on.
    pub fn set_peer_listen(&mut self, address: &str) {
        self.peer = Some(address.into());
    }

    pub fn peer_addr(&self) -> String {
        self.peer.clone().expect("a node with peers")
    }

    /// Whether a line of this life's log has all of these.
    pub fn has_logged(&self, words: &[&str]) -> bool {
        let text = std::fs::read(self.log_file()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        text.lines().any(|line| words.iter().all(|word| line.contains(word)))
    }

    pub fn monitor_addr(&self) -> String {
        self.ports_now().monitor
    }

    /// A connection of its own.
    pub async fn api(&self) -> Api {
        Api::connect(&self.client_addr())
            .await
            .expect("a ready node takes connections")
    }

    #[allow(unsafe_code)]
    fn signal(&self, signal: i32) {
        // SAFETY: takes numbers only; the child has not been waited for, so its number is its own.
        let r = unsafe { libc::kill(self.pid() as i32, signal) };
        assert_eq!(r, 0, "{}: {}", self.name, std::io::Error::last_os_error());
    }

    /// kill -9, and waits for the end.
    pub async fn kill9(&mut self) {
        self.signal(libc::SIGKILL);
        let status = self.wait_exit().await;
        assert!(status.signal() == Some(libc::SIGKILL) || !status.success(), "{status}");
    }

    /// Asks for an orderly end.
    pub fn term(&self) {
        self.signal(libc::SIGTERM);
    }

    pub fn pause(&self) {
        self.signal(libc::SIGSTOP);
        self.paused.store(true, Ordering::Relaxed);
    }

    pub fn resume(&self) {
        self.signal(libc::SIGCONT);
        self.paused.store(false, Ordering::Relaxed);
    }

    pub fn is_paused(&self) -> bool {
        self.paused.load(Ordering::Relaxed)
    }

    /// Waits for the end of the process.
    pub async fn wait_exit(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.as_mut().expect("runs").try_wait().unwrap() {
                self.gone();
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "{} does not end\n{}", self.name, self.log());
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// How it ended, if it did so by itself since it was started.
    pub async fn ended(&mut self) -> Option<ExitStatus> {
        match self.was_launched() && !self.runs() {
            true => Some(self.wait_exit().await),
            false => None,
        }
    }

    /// It is never started again.
    pub fn retire(&mut self) {
        assert!(!self.runs(), "{} runs", self.name);
        self.retired = true;
    }

    pub fn is_retired(&self) -> bool {
        self.retired
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The last error in this life's log.
    pub fn last_words(&self) -> String {
        let text = std::fs::read(self.log_file()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let error = text.lines().rfind(|line| line.contains("ERROR"));
        error.or(text.lines().last()).unwrap_or_default().to_string()
    }

    /// Whether it was started and nobody has waited for its end.
    pub fn was_launched(&self) -> bool {
        self.child.is_some()
    }

    /// Whether the process runs (as far as is known without waiting).
    pub fn runs(&mut self) -> bool {
        match &mut self.child {
            None => false,
            Some(child) => child.try_wait().unwrap().is_none(),
        }
    }

    /// A command to the preload library; panics if it is refused.
    pub fn faults(&self, line: &str) -> String {
        match faults::command(&self.socket(), line) {
            Some(Ok(answer)) => answer,
            Some(Err(e)) => panic!("{line}: {e}"),
            None => panic!("{line}: no answer\n{}", self.log()),
        }
    }

    /// The power fails now; unsynced writes are lost as the seed says.
    pub async fn power_fail(&mut self, seed: u64) {
        self.power_off(seed);
        self.powered_off().await;
    }

    /// Lets the power fail and does not wait for the end: for several at once. A paused node goes with the others.
    pub fn power_off(&mut self, seed: u64) {
        let socket = self.socket();
        // No answer is the answer.
        std::thread::spawn(move || faults::command(&socket, &format!("power-fail {seed}")));
        if self.is_paused() {
            self.resume();
        }
    }

    /// Waits for the end after a power failure.
    pub async fn powered_off(&mut self) {
        let status = self.wait_exit().await;
        assert_eq!(status.signal(), Some(libc::SIGKILL), "{status}\n{}", self.log());
    }

    /// What the process has printed in this life.
    pub fn log(&self) -> String {
        let text = std::fs::read(self.log_file()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let from = lines.len().saturating_sub(200);
        format!(
            "--- {} (life {}), last {} lines ---\n{}\n",
            self.name,
            self.lives,
            lines.len() - from,
            lines[from..].join("\n")
        )
    }

    /// A page of the monitor listener, over plain HTTP.
    pub async fn monitor(&self, path: &str) -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(self.monitor_addr()).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer.split_once("\r\n\r\n").expect("a head and a body").1.to_string()
    }

    /// A metric by its name and labels as they are written (`base_budget_used_bytes{budget="read"}`); 0 if it is not
    /// there yet.
    pub async fn metric(&self, name: &str) -> f64 {
        let page = self.monitor("/metrics").await;
        let line = page.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0.0, |value| value.trim().parse().unwrap())
    }

    /// Peak and present resident memory in bytes.
    pub fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let of = |name: &str| {
            let line = status.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
        };
        (of("VmHWM:"), of("VmRSS:"))
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("{}", self.log());
            if std::env::var_os("MAINSTEM_KEEP").is_some() {
                self.place.disable_cleanup(true);
                eprintln!("kept: {}", self.place.path().display());
            } else {
                eprintln!("(MAINSTEM_KEEP=1 keeps the directory)");
            }
        }
    }
}
