//! One node of Mainstem: the real server as a process, on a directory of its own.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::lab::Lab;
use crate::process::{Ended, Process};

const START_TIME_MAX: Duration = Duration::from_secs(60);
const STOP_TIME_MAX: Duration = Duration::from_secs(60);

/// A server process, or the place of one between two lives.
pub struct Node {
    process: Option<Process>,
    ports: Option<Ports>,
    binary: PathBuf,
    flags: Vec<String>,
    /// The preload library and the milliseconds it adds to each sync.
    slow_sync: Option<(PathBuf, u64)>,
    // After the process, so that it is dead when its directory goes.
    dir: TempDir,
}

struct Ports {
    client: String,
    prometheus: Option<String>,
}

impl Node {
    /// A node on an empty directory, not started yet. `flags` come last.
    pub fn new(lab: &Lab, flags: Vec<String>, sync_ms: Option<u64>) -> Result<Self> {
        ensure!(
            lab.mainstem.exists(),
            "no server at {}: build it first",
            lab.mainstem.display()
        );
        if sync_ms.is_some() {
            ensure!(
                lab.faults.exists(),
                "no preload library at {}: build it first",
                lab.faults.display()
            );
        }
        Ok(Self {
            process: None,
            ports: None,
            binary: lab.mainstem.clone(),
            flags,
            slow_sync: sync_ms.map(|ms| (lab.faults.clone(), ms)),
            dir: lab.dir()?,
        })
    }

    fn ports_file(&self) -> PathBuf {
        self.dir.path().join("ports.json")
    }

    /// Starts the process and does not wait for it.
    pub fn launch(&mut self) -> Result<()> {
        // What a killed server left is not to be taken for the new one's.
        match std::fs::remove_file(self.ports_file()) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(e.into()),
        }
        let mut command = Command::new(&self.binary);
        // Nothing from around us is to change its defaults.
        for (name, _) in std::env::vars_os() {
            if name.to_string_lossy().starts_with("MAINSTEM_") {
                command.env_remove(name);
            }
        }
        command
            .arg("server")
            .arg("--data-dir")
            .arg(self.data_dir())
            .arg("--ports-file")
            .arg(self.ports_file());
        for flag in ["--listen", "--monitor-listen", "--prometheus-listen-on"] {
            if !self.flags.iter().any(|own| own == flag) {
                command.arg(flag).arg("127.0.0.1:0");
            }
        }
        command.args(&self.flags);
        if let Some((library, sync_ms)) = &self.slow_sync {
            command
                .env("LD_PRELOAD", library)
                .env("MAINSTEM_FAULTS_SYNC_MS", sync_ms.to_string());
        }
        self.process = Some(Process::start(command, self.dir.path())?);
        Ok(())
    }

    /// Waits until it serves.
    pub async fn ready(&mut self) -> Result<()> {
        let file = self.ports_file();
        let process = self.process.as_mut().context("a node that was not started")?;
        let ports = process
            .ready(START_TIME_MAX, || ports_in(&file))
            .await
            .context("the server")?;
        self.ports = Some(ports);
        Ok(())
    }

    /// Of one that was started.
    pub fn process(&self) -> &Process {
        self.process.as_ref().expect("a node that was started")
    }

    /// kill -9.
    pub fn kill(&mut self) -> Result<()> {
        self.process.as_mut().context("a node that was not started")?.kill()
    }

    pub async fn terminate(&mut self) -> Result<Ended> {
        let process = self.process.as_mut().context("a node that was not started")?;
        process.terminate(STOP_TIME_MAX).await
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// Where clients reach it, if it was ever ready.
    pub fn client_address(&self) -> Option<&str> {
        self.ports.as_ref().map(|ports| ports.client.as_str())
    }

    /// A metric's sum over all its labels, if the server tells its metrics.
    pub async fn metric(&self, name: &str) -> Option<f64> {
        let address = self.ports.as_ref()?.prometheus.as_ref()?;
        let mut connection = tokio::net::TcpStream::connect(address).await.ok()?;
        connection
            .write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            .await
            .ok()?;
        let mut text = String::new();
        connection.read_to_string(&mut text).await.ok()?;
        let values = text.lines().filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            rest.starts_with([' ', '{'])
                .then(|| rest.rsplit_once(' ')?.1.parse::<f64>().ok())?
        });
        values.reduce(|a, b| a + b)
    }
}

fn ports_in(file: &Path) -> Option<Ports> {
    let ports: serde_json::Value = serde_json::from_slice(&std::fs::read(file).ok()?).ok()?;
    let address = |name| Some(ports.get(name)?.as_str()?.to_owned());
    Some(Ports {
        client: address("client")?,
        prometheus: address("prometheus"),
    })
}
