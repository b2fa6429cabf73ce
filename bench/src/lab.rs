//! Where a run happens: its binaries, its scratch directory, its measure of the disk.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tempfile::TempDir;

use crate::nats::NatsBinary;
use crate::report::median;

/// What every figure is given.
pub struct Lab {
    pub rounds: usize,
    pub warmup: Duration,
    pub measure: Duration,
    /// Smaller amounts everywhere: to see that it runs, not to be quoted.
    pub quick: bool,
    /// Only these contestants take part; empty: all.
    only: Vec<String>,
    pub nats: Option<NatsBinary>,
    /// The server's binary.
    pub mainstem: PathBuf,
    /// The preload library for slow syncs.
    pub faults: PathBuf,
    /// Median of a bare fdatasync after a 4 KiB append, in this directory.
    pub sync: Duration,
    /// Seconds since the Unix epoch.
    pub run: u64,
    scratch: PathBuf,
}

pub struct Settings {
    pub rounds: Option<usize>,
    pub seconds: Option<f64>,
    pub quick: bool,
    pub only: Vec<String>,
    pub nats: Option<PathBuf>,
    pub mainstem: Option<PathBuf>,
    pub faults: Option<PathBuf>,
    pub scratch: Option<PathBuf>,
}

impl Lab {
    pub fn new(settings: Settings) -> Result<Self> {
        let binaries = binaries_dir()?;
        let scratch = settings.scratch.unwrap_or_else(|| binaries.join("bench-data"));
        std::fs::create_dir_all(&scratch).with_context(|| scratch.display().to_string())?;
        let seconds = settings.seconds.unwrap_or(if settings.quick { 1.0 } else { 6.0 });
        Ok(Self {
            rounds: settings.rounds.unwrap_or(if settings.quick { 1 } else { 5 }).max(1),
            warmup: Duration::from_secs_f64(seconds / 4.0),
            measure: Duration::from_secs_f64(seconds),
            quick: settings.quick,
            only: settings.only,
            nats: NatsBinary::find(settings.nats)?,
            mainstem: settings.mainstem.unwrap_or_else(|| binaries.join("mainstem")),
            faults: settings
                .faults
                .unwrap_or_else(|| binaries.join("libmainstem_faults.so")),
            sync: sync_latency(&scratch)?,
            run: SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs(),
            scratch,
        })
    }

    /// An empty directory that goes when dropped.
    pub fn dir(&self) -> Result<TempDir> {
        tempfile::tempdir_in(&self.scratch).context("a scratch directory")
    }

    pub fn scratch(&self) -> &Path {
        &self.scratch
    }

    pub fn takes_part(&self, contestant: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|name| name == contestant)
    }

    /// What is the same for every figure of this run.
    pub fn conditions(&self) -> BTreeMap<String, String> {
        let mut conditions = BTreeMap::new();
        let mut put = |name: &str, value: String| conditions.insert(name.to_owned(), value);
        put("replicas", "1".to_owned());
        put(
            "sync_latency",
            format!("{:.3} ms (median of a bare fdatasync)", millis(self.sync)),
        );
        put(
            "processors",
            std::thread::available_parallelism().map_or(0, usize::from).to_string(),
        );
        put("rounds", self.rounds.to_string());
        if self.quick {
            put("quick", "yes: small amounts, not to be quoted".to_owned());
        }
        if let Some(nats) = &self.nats {
            put("nats-server", nats.version.to_string());
        }
        conditions
    }

    /// The same measure of the disk under the preload library.
    pub fn sync_latency_preloaded(&self, sync_ms: u64) -> Result<Duration> {
        let dir = self.dir()?;
        let output = Command::new(std::env::current_exe()?)
            .arg("--sync-latency-of")
            .arg(dir.path())
            .env("LD_PRELOAD", &self.faults)
            .env("MAINSTEM_FAULTS_SYNC_MS", sync_ms.to_string())
            .output()?;
        if !output.status.success() {
            bail!(
                "measuring sync under the preload library: {}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        let micros: f64 = String::from_utf8_lossy(&output.stdout)
            .trim()
            .parse()
            .context("the measure of sync")?;
        Ok(Duration::from_secs_f64(micros / 1e6))
    }
}

pub fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

/// Where the binaries of this build are.
pub fn binaries_dir() -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    Ok(exe.parent().context("a directory of binaries")?.to_path_buf())
}

/// Median time of fdatasync after appending 4 KiB to a file.
pub fn sync_latency(dir: &Path) -> Result<Duration> {
    let mut file = tempfile::tempfile_in(dir)?;
    file.write_all(&vec![0x5a; 4 << 20])?;
    file.sync_all()?;
    let mut times = Vec::new();
    for n in 0..200u64 {
        file.write_all_at(&[0xa5; 4096], (4 << 20) + n * 4096)?;
        let begin = Instant::now();
        file.sync_data()?;
        times.push(begin.elapsed().as_secs_f64());
    }
    Ok(Duration::from_secs_f64(median(&times).context("200 syncs")?))
}
