//! The servers as processes: started, watched through /proc, killed with us, reaped with their account of IO.

use std::fs::{self, File};
use std::net::TcpListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use rand::Rng;

/// A child. Dropped: killed and reaped.
pub struct Process {
    pid: libc::pid_t,
    reaped: bool,
    output: PathBuf,
}

/// What a child that ended has used, with all its threads.
#[derive(Debug, Clone, Copy)]
pub struct Ended {
    pub status: ExitStatus,
    /// Bytes that it made dirty in files, as the kernel counts for `write_bytes` in /proc/PID/io.
    pub written_bytes: u64,
}

impl Process {
    /// Starts `command` with its output in a file in `dir`. Call it on a thread that lives as long as the child may:
    /// the kernel kills the child when that thread ends.
    pub fn start(mut command: Command, dir: &Path) -> Result<Self> {
        let name = Path::new(command.get_program())
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        let output = dir.join(format!("{name}.out"));
        let file = File::options()
            .create(true)
            .append(true)
            .open(&output)
            .with_context(|| format!("creating {}", output.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        die_with_parent(&mut command);
        let child = command
            .spawn()
            .with_context(|| format!("starting {:?}", command.get_program()))?;
        let pid = libc::pid_t::try_from(child.id()).context("a pid")?;
        Ok(Self {
            pid,
            reaped: false,
            output,
        })
    }

    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// Waits until `ready` says something; fails when the child ends or `limit` passes first.
    pub async fn ready<T>(&mut self, limit: Duration, mut ready: impl FnMut() -> Option<T>) -> Result<T> {
        let begin = Instant::now();
        loop {
            if let Some(it) = ready() {
                return Ok(it);
            }
            if let Some(ended) = self.try_reap()? {
                bail!(
                    "ended with {} before it was ready:\n{}",
                    ended.status,
                    self.output_tail()
                );
            }
            if begin.elapsed() > limit {
                bail!("not ready within {limit:?}:\n{}", self.output_tail());
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// SIGTERM, then waits for the end.
    pub async fn terminate(&mut self, limit: Duration) -> Result<Ended> {
        self.signal(libc::SIGTERM);
        let begin = Instant::now();
        loop {
            if let Some(ended) = self.try_reap()? {
                return Ok(ended);
            }
            if begin.elapsed() > limit {
                bail!("did not end within {limit:?} of SIGTERM:\n{}", self.output_tail());
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    /// SIGKILL, and the end.
    pub fn kill(&mut self) -> Result<()> {
        self.signal(libc::SIGKILL);
        self.wait(0).map(drop)
    }

    /// Resident memory now, in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        let status = self.proc_file("status")?;
        let kib = field(&status, "VmRSS:")?;
        Ok(kib * 1024)
    }

    /// Bytes made dirty in files so far.
    pub fn written_bytes(&self) -> Result<u64> {
        field(&self.proc_file("io")?, "write_bytes:")
    }

    /// Processor time used so far, of all threads.
    pub fn cpu(&self) -> Result<Duration> {
        cpu_of(&self.proc_file("stat")?)
    }

    /// The last lines that it printed.
    pub fn output_tail(&self) -> String {
        let text = fs::read_to_string(&self.output).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    fn proc_file(&self, name: &str) -> Result<String> {
        let path = format!("/proc/{}/{name}", self.pid);
        fs::read_to_string(&path).with_context(|| path)
    }

    fn signal(&self, signal: libc::c_int) {
        if !self.reaped {
            // SAFETY: plain system call; the pid is ours, since an unreaped child keeps it.
            #[allow(unsafe_code)]
            unsafe {
                libc::kill(self.pid, signal);
            }
        }
    }

    fn try_reap(&mut self) -> Result<Option<Ended>> {
        self.wait(libc::WNOHANG)
    }

    fn wait(&mut self, options: libc::c_int) -> Result<Option<Ended>> {
        if self.reaped {
            bail!("the process has ended already");
        }
        let mut status = 0;
        // SAFETY: wait4 fills both out-parameters, which live on this stack; rusage is plain data.
        #[allow(unsafe_code)]
        let (done, usage) = unsafe {
            let mut usage: libc::rusage = std::mem::zeroed();
            (libc::wait4(self.pid, &mut status, options, &mut usage), usage)
        };
        if done == 0 {
            return Ok(None);
        }
        if done != self.pid {
            return Err(anyhow!(std::io::Error::last_os_error()).context("wait4"));
        }
        self.reaped = true;
        Ok(Some(Ended {
            status: ExitStatus::from_raw(status),
            written_bytes: u64::try_from(usage.ru_oublock).unwrap_or(0) * 512,
        }))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            self.signal(libc::SIGKILL);
            let _ = self.wait(0);
        }
    }
}

/// The child gets SIGKILL when we die, however we die.
fn die_with_parent(command: &mut Command) {
    // SAFETY: prctl is async-signal-safe and touches nothing of ours between fork and exec.
    #[allow(unsafe_code)]
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            Ok(())
        });
    }
}

/// Ports of the loopback interface that are free now, for servers that must know each other's before they start, or keep
/// theirs over a restart. Below those that the system gives to connections: none of these can sit on one meanwhile.
pub fn free_ports(count: usize) -> Result<Vec<u16>> {
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let given_from: u16 = range
        .split_whitespace()
        .next()
        .and_then(|first| first.parse().ok())
        .context("ip_local_port_range")?;
    let candidates = 10_000..given_from.max(20_000);
    // Held until all are found, so that none is taken twice.
    let mut held = Vec::new();
    for _ in 0..10_000 {
        if held.len() == count {
            break;
        }
        let port = rand::rng().random_range(candidates.clone());
        held.extend(TcpListener::bind(("127.0.0.1", port)));
    }
    let ports = held.iter().map(|listener| Ok(listener.local_addr()?.port()));
    let ports: Vec<u16> = ports.collect::<Result<_>>()?;
    if ports.len() < count {
        bail!("no {count} free ports in {candidates:?}");
    }
    Ok(ports)
}

/// Bytes that this process made dirty in files so far.
pub fn own_written_bytes() -> Result<u64> {
    field(&fs::read_to_string("/proc/self/io")?, "write_bytes:")
}

/// Starts write-back of everything in the file system of `path` and waits for it, so that one contestant's dirty
/// pages are not written in the next one's time.
pub fn settle_disk(path: &Path) -> Result<()> {
    use std::os::fd::AsRawFd;
    let dir = File::open(path)?;
    // SAFETY: the descriptor is open for the whole call.
    #[allow(unsafe_code)]
    let failed = unsafe { libc::syncfs(dir.as_raw_fd()) } != 0;
    if failed {
        return Err(std::io::Error::last_os_error().into());
    }
    Ok(())
}

/// Bytes of disk held by everything under `path`.
pub fn disk_held_bytes(path: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut held = 0;
    let mut todo = vec![path.to_path_buf()];
    while let Some(dir) = todo.pop() {
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            // Files come and go while a server runs.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
            Err(e) => return Err(e).with_context(|| dir.display().to_string()),
        };
        for entry in entries {
            let entry = entry?;
            match entry.metadata() {
                Ok(meta) if meta.is_dir() => todo.push(entry.path()),
                Ok(meta) => held += meta.blocks() * 512,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
    Ok(held)
}

fn field(text: &str, name: &str) -> Result<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(name))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse().ok())
        .with_context(|| format!("no {name} in /proc"))
}

fn cpu_of(stat: &str) -> Result<Duration> {
    // The command's name may hold anything; the fields begin after its closing parenthesis.
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .context("/proc stat")?
        .1
        .split_whitespace()
        .collect();
    let ticks = |n: usize| fields.get(n).and_then(|f| f.parse::<u64>().ok()).context("/proc stat");
    // utime and stime, in ticks of 10 ms (USER_HZ is 100 on every Linux that this runs on).
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[tokio::test]
    async fn a_child_accounts_for_its_writes_and_is_reaped() {
        let here = std::env::current_exe().unwrap();
        let dir = tempfile::tempdir_in(here.parent().unwrap()).unwrap();
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg("dd if=/dev/zero of=file bs=1M count=3 conv=fsync 2>/dev/null; trap 'exit 7' TERM; touch up; while :; do sleep 0.01; done")
            .current_dir(dir.path());
        let mut process = Process::start(command, dir.path()).unwrap();
        let up = dir.path().join("up");
        process
            .ready(Duration::from_secs(10), || up.exists().then_some(()))
            .await
            .unwrap();
        assert!(process.resident_bytes().unwrap() > 0);
        assert!(disk_held_bytes(dir.path()).unwrap() >= 3 << 20);
        let pid = process.pid();
        let ended = process.terminate(Duration::from_secs(10)).await.unwrap();
        assert_eq!(ended.status.code(), Some(7));
        assert!(ended.written_bytes >= 3 << 20, "{}", ended.written_bytes);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn ports_are_free_and_different() {
        let ports = free_ports(20).unwrap();
        let different: std::collections::BTreeSet<_> = ports.iter().collect();
        assert_eq!(different.len(), 20);
        for port in ports {
            TcpListener::bind(("127.0.0.1", port)).unwrap();
        }
    }

    #[tokio::test]
    async fn a_child_that_ends_early_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let mut command = Command::new("sh");
        command.arg("-c").arg("echo why it died; exit 3");
        let mut process = Process::start(command, dir.path()).unwrap();
        let error = process.ready(Duration::from_secs(10), || None::<()>).await.unwrap_err();
        assert!(error.to_string().contains("why it died"), "{error}");
    }
}
