//! `mainstem dev --nodes N`: a cluster on this machine, one process for each node, to try things on.

use std::fmt::Write as _;
use std::fs::File;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use futures_util::future::{join_all, select_all};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use super::config::{DevArgs, ServerArgs};
use super::run::Exit;
use crate::wire::v1;
use v1::cluster_service_client::ClusterServiceClient;

/// Where the first node listens for clients, if that is free. The next ones listen ten ports further on each.
const FIRST_PORT: u16 = 7411;
const PORTS_APART: u16 = 10;
/// How long all nodes may take to be ready and to form a healthy cluster.
const START_MAX: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a node may take to stop. Its own drain is shorter.
const STOP_MAX: Duration = Duration::from_secs(30);
/// Of the log of a node that ended, so many lines are shown.
const LOG_LINES: usize = 8;

/// Flags that each node gets for itself.
const OWN_FLAGS: [&str; 10] = [
    "data-dir",
    "name",
    "zone",
    "listen",
    "monitor-listen",
    "peer-listen",
    "bootstrap",
    "join",
    "ports-file",
    "prometheus-listen-on",
];

/// Where a node listens; port 0: anywhere.
#[derive(Debug, Clone, Copy, serde::Serialize, serde::Deserialize)]
struct Place {
    client: SocketAddr,
    monitor: SocketAddr,
    peer: SocketAddr,
}

/// What a node has told of itself when it was ready.
#[derive(Debug, serde::Deserialize)]
struct Told {
    client: SocketAddr,
    monitor: SocketAddr,
    peer: Option<SocketAddr>,
    pid: u32,
}

struct Member {
    name: String,
    dir: PathBuf,
    log: PathBuf,
    ports_file: PathBuf,
    args: Vec<String>,
    child: Option<Child>,
    told: Option<Told>,
}

/// The flag that was given, if it was.
fn given<'a>(args: &'a ServerArgs, flag: &str) -> Option<&'a str> {
    let found = args.settings.iter().find(|(setting, _)| setting.flag == flag);
    found.map(|(_, text)| text.as_str())
}

/// Runs the cluster until it is told to stop, or none of its nodes is left. `dir` holds everything; with `kept` it was
/// there before, or will be needed again.
pub(super) async fn run(args: &DevArgs, dir: &Path, kept: bool) -> Exit {
    match start(args, dir, kept).await {
        Ok(members) => live(members, dir, kept).await,
        Err((members, text)) => {
            eprintln!("mainstem: {text}");
            stop(members).await;
            Exit::Failed
        }
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

/// Where the nodes listen: as the last time; or else at the usual ports, if all of them are free; or else anywhere.
fn places(args: &DevArgs, dir: &Path) -> Result<Vec<Place>, String> {
    let nodes = u16::from(args.nodes);
    let saved = places_file(dir);
    if let Ok(text) = std::fs::read(&saved) {
        let places: Vec<Place> = serde_json::from_slice(&text).map_err(|e| {
            format!(
                "{} cannot be read: {e}; remove it, or take another directory",
                saved.display()
            )
        })?;
        if places.len() != usize::from(nodes) {
            return Err(format!(
                "{} holds a cluster of {count} nodes: start it with --nodes {count}, or take another directory",
                dir.display(),
                count = places.len()
            ));
        }
        return Ok(places);
    }
    let first = match given(&args.server, "listen") {
        None => loopback(FIRST_PORT),
        Some(text) => text
            .parse()
            .map_err(|_| format!("--listen {text} is not ADDRESS:PORT, e.g. 127.0.0.1:7411"))?,
    };
    let anywhere = vec![
        Place {
            client: SocketAddr::new(first.ip(), 0),
            monitor: loopback(0),
            peer: loopback(0),
        };
        usize::from(nodes)
    ];
    if first.port() == 0 {
        return Ok(anywhere);
    }
    let usual: Option<Vec<Place>> = (0..nodes)
        .map(|i| {
            let port = first.port().checked_add(i * PORTS_APART)?;
            Some(Place {
                client: SocketAddr::new(first.ip(), port),
                peer: loopback(port.checked_add(1)?),
                monitor: loopback(port.checked_add(2)?),
            })
        })
        .collect();
    let free = |place: &Place| {
        let all = [place.client, place.monitor, place.peer];
        all.iter().all(|address| TcpListener::bind(address).is_ok())
    };
    Ok(usual.filter(|places| places.iter().all(free)).unwrap_or(anywhere))
}

fn places_file(dir: &Path) -> PathBuf {
    dir.join("dev-cluster.json")
}

type Started = Result<Vec<Member>, (Vec<Member>, String)>;

async fn start(args: &DevArgs, dir: &Path, kept: bool) -> Started {
    let mut members = Vec::new();
    let places = match places(args, dir) {
        Ok(places) => places,
        Err(text) => return Err((members, text)),
    };
    let again = places_file(dir).exists();
    for (i, place) in places.iter().enumerate() {
        let member = Member::new(i, dir, *place, args);
        members.push(member);
    }
    let begun = Instant::now();
    // A new cluster has one node first; the others join it. One that was there before starts as a whole.
    let first_peer = places.first().map(|place| place.peer).filter(|peer| peer.port() != 0);
    for i in 0..members.len() {
        let role = match (i, first_peer, members[0].told.as_ref().and_then(|told| told.peer)) {
            (0, _, _) => vec!["--bootstrap".to_owned()],
            (_, Some(peer), _) | (_, None, Some(peer)) => vec!["--join".to_owned(), peer.to_string()],
            (_, None, None) => {
                return Err((
                    members,
                    "the first node does not tell where its peers reach it".to_owned(),
                ));
            }
        };
        members[i].args.extend(role);
        if let Err(error) = members[i].launch() {
            let text = format!("{} cannot be started: {error}", members[i].name);
            return Err((members, text));
        }
        // One after the other, so that the first has the first id, and so on.
        if !again && let Err(text) = members[i].ready(begun).await {
            return Err((members, text));
        }
    }
    for i in 0..members.len() {
        if let Err(text) = members[i].ready(begun).await {
            return Err((members, text));
        }
    }
    if kept && let Err(text) = save(&members, dir) {
        return Err((members, text));
    }
    if let Err(text) = healthy(&members, begun).await {
        eprintln!("mainstem: the nodes run, but the cluster is not healthy yet: {text}");
    }
    Ok(members)
}

/// Keeps the addresses: nodes find each other by them.
fn save(members: &[Member], dir: &Path) -> Result<(), String> {
    let told = members.iter().filter_map(|member| {
        let told = member.told.as_ref()?;
        Some(Place {
            client: told.client,
            monitor: told.monitor,
            peer: told.peer?,
        })
    });
    let path = places_file(dir);
    let text = serde_json::to_vec_pretty(&told.collect::<Vec<_>>()).map_err(|e| e.to_string())?;
    std::fs::write(&path, text).map_err(|e| format!("{} cannot be written: {e}", path.display()))
}

impl Member {
    fn new(index: usize, dir: &Path, place: Place, args: &DevArgs) -> Self {
        let name = format!("n{}", index + 1);
        let data = dir.join(&name);
        let ports_file = dir.join(format!("{name}.ports.json"));
        let zone = char::from(b'a' + index as u8).to_string();
        let mut flags = vec!["server".to_owned()];
        for (flag, value) in [
            ("--data-dir", data.display().to_string()),
            ("--name", name.clone()),
            ("--zone", zone),
            ("--listen", place.client.to_string()),
            ("--monitor-listen", place.monitor.to_string()),
            ("--peer-listen", place.peer.to_string()),
            ("--ports-file", ports_file.display().to_string()),
        ] {
            flags.extend([flag.to_owned(), value]);
        }
        if given(&args.server, "drain-timeout").is_none() {
            flags.extend(["--drain-timeout".to_owned(), "3s".to_owned()]);
        }
        if let Some(config) = &args.server.config {
            flags.extend(["--config".to_owned(), config.display().to_string()]);
        }
        for (setting, value) in &args.server.settings {
            if !OWN_FLAGS.contains(&setting.flag) {
                flags.push(format!("--{}={value}", setting.flag));
            }
        }
        Self {
            log: dir.join(format!("{name}.log")),
            dir: data,
            name,
            ports_file,
            args: flags,
            child: None,
            told: None,
        }
    }

    fn launch(&mut self) -> std::io::Result<()> {
        // What an earlier process left there is not ours.
        match std::fs::remove_file(&self.ports_file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
        let log = File::options().create(true).append(true).open(&self.log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            // Ctrl-C is for this process, which passes it on once.
            .process_group(0)
            .kill_on_drop(true);
        end_with_parent(&mut command);
        self.child = Some(command.spawn()?);
        Ok(())
    }

    /// Waits until it has told where it listens.
    async fn ready(&mut self, begun: Instant) -> Result<(), String> {
        loop {
            if let Ok(text) = std::fs::read(&self.ports_file) {
                let told = serde_json::from_slice(&text)
                    .map_err(|e| format!("{} cannot be read: {e}", self.ports_file.display()))?;
                self.told = Some(told);
                return Ok(());
            }
            if let Some(child) = &mut self.child
                && let Ok(Some(status)) = child.try_wait()
            {
                self.child = None;
                return Err(self.ended(&status.to_string()));
            }
            if begun.elapsed() > START_MAX {
                return Err(format!(
                    "{} is not ready after {START_MAX:?}:\n{}",
                    self.name,
                    self.last_lines()
                ));
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn ended(&self, how: &str) -> String {
        format!(
            "{} has ended by itself ({how}); the end of {}:\n{}",
            self.name,
            self.log.display(),
            self.last_lines()
        )
    }

    fn last_lines(&self) -> String {
        let text = std::fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().collect();
        let from = lines.len().saturating_sub(LOG_LINES);
        lines[from..]
            .iter()
            .fold(String::new(), |all, line| all + "    " + line + "\n")
    }

    /// What a shell takes to start it again.
    fn command_line(&self) -> String {
        let quoted = self.args.iter().map(|arg| {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,%".contains(c);
            if arg.chars().all(plain) && !arg.is_empty() {
                arg.clone()
            } else {
                format!("'{}'", arg.replace('\'', r"'\''"))
            }
        });
        format!("mainstem {}", quoted.collect::<Vec<_>>().join(" "))
    }
}

/// A node must not outlive the process that watches it, however that ends.
// There is no safe wrapper in `std`.
#[allow(unsafe_code)]
fn end_with_parent(command: &mut Command) {
    let parent = std::process::id();
    // SAFETY: between fork and exec only two system calls are made, which are safe there.
    unsafe {
        command.pre_exec(move || {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGTERM) != 0 {
                return Err(std::io::Error::last_os_error());
            }
            // It may be gone already.
            if libc::getppid() as u32 != parent {
                return Err(std::io::Error::other("the process that started it has ended"));
            }
            Ok(())
        });
    }
}

/// The meta group's voters of so many nodes: an odd number, up to five.
fn meta_voters(nodes: usize) -> u32 {
    match nodes {
        0..=2 => 1,
        3 | 4 => 3,
        _ => 5,
    }
}

/// Waits until every node is there, the catalog has its voters, and nothing is wrong.
async fn healthy(members: &[Member], begun: Instant) -> Result<(), String> {
    let address = match members.first().and_then(|member| member.told.as_ref()) {
        Some(told) => told.client,
        None => return Err("no node has told where it listens".to_owned()),
    };
    loop {
        let wrong = match look(address).await {
            Ok(report) => {
                let live = report.summary.map_or(0, |summary| summary.live_nodes) as usize;
                let voters = report.meta.as_ref().map_or(0, |meta| meta.voters);
                match report.problems.first() {
                    Some(problem) => problem.text.clone(),
                    None if live < members.len() => format!("{live} of {} nodes are there", members.len()),
                    None if voters < meta_voters(members.len()) => format!("the meta group has {voters} voters so far"),
                    None => return Ok(()),
                }
            }
            Err(error) => error,
        };
        if begun.elapsed() > START_MAX {
            return Err(wrong);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn look(address: SocketAddr) -> Result<v1::GetReportResponse, String> {
    let look = async {
        let mut client = ClusterServiceClient::connect(format!("http://{address}"))
            .await
            .map_err(|e| e.to_string())?;
        let report = client.get_report(v1::GetReportRequest::default()).await;
        report
            .map(tonic::Response::into_inner)
            .map_err(|status| status.message().to_owned())
    };
    let late = |_| format!("{address} does not answer");
    tokio::time::timeout(Duration::from_secs(5), look).await.map_err(late)?
}

/// Watches the nodes until a signal comes, or none is left.
async fn live(mut members: Vec<Member>, dir: &Path, kept: bool) -> Exit {
    let (mut term, mut int) = match (signal(SignalKind::terminate()), signal(SignalKind::interrupt())) {
        (Ok(term), Ok(int)) => (term, int),
        (Err(error), _) | (_, Err(error)) => {
            eprintln!("mainstem: cannot watch for signals: {error}");
            stop(members).await;
            return Exit::Failed;
        }
    };
    println!("{}", tour(&members, dir, kept));
    loop {
        let running: Vec<_> = members
            .iter_mut()
            .enumerate()
            .filter_map(|(i, member)| Some((i, member.child.as_mut()?)))
            .map(|(i, child)| child.wait().map(move |status| (i, status)).boxed())
            .collect();
        if running.is_empty() {
            eprintln!("mainstem: no node is left");
            return Exit::Failed;
        }
        let (i, status) = tokio::select! {
            _ = term.recv() => break,
            _ = int.recv() => break,
            (ended, _, _) = select_all(running) => ended,
        };
        members[i].child = None;
        let how = status.map_or_else(|e| e.to_string(), |status| status.to_string());
        eprintln!(
            "mainstem: {}  start it again with:\n    {}",
            members[i].ended(&how),
            members[i].command_line()
        );
    }
    eprintln!("mainstem: stopping {} nodes", members.len());
    tokio::select! {
        () = stop(members) => Exit::Done,
        _ = term.recv() => Exit::Failed,
        _ = int.recv() => {
            eprintln!("mainstem: told twice to stop: ending at once");
            Exit::Failed
        }
    }
}

/// Lets every node drain, and waits. What has not ended then is killed with its handle.
// There is no safe wrapper in `std`.
#[allow(unsafe_code)]
async fn stop(members: Vec<Member>) {
    let waits = members.into_iter().filter_map(|member| {
        let mut child = member.child?;
        let pid = i32::try_from(child.id()?).ok()?;
        // SAFETY: takes numbers only; the child was not waited for, so the number is its own.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        Some(async move {
            if tokio::time::timeout(STOP_MAX, child.wait()).await.is_err() {
                eprintln!(
                    "mainstem: {} does not stop within {STOP_MAX:?}: it is killed",
                    member.name
                );
            }
        })
    });
    // All are told before any is waited for.
    let waits: Vec<_> = waits.collect();
    join_all(waits).await;
}

/// What is printed when the cluster is ready.
fn tour(members: &[Member], dir: &Path, kept: bool) -> String {
    let mut text = format!(
        "Mainstem {}: a cluster of {} nodes is ready.\n\n",
        env!("CARGO_PKG_VERSION"),
        members.len()
    );
    let mut servers = Vec::new();
    let mut victim = 0;
    for member in members {
        if let Some(told) = &member.told {
            // A string takes everything.
            let _ = writeln!(
                text,
                "  {}   clients {}   status http://{}/v1/status   process {}   log {}",
                member.name,
                told.client,
                told.monitor,
                told.pid,
                member.log.display()
            );
            servers.push(told.client.to_string());
            victim = told.pid;
        }
    }
    let kept = if kept { "" } else { " (removed when this ends)" };
    let servers = servers.join(",");
    let replicas = members.len().min(3);
    let last = members.last().map_or_else(String::new, |member| {
        format!("{} (its data is in {})", member.name, member.dir.display())
    });
    let _ = write!(
        text,
        "\n  data in {}{kept}\n\nType next, in another terminal:\n\n",
        dir.display()
    );
    let lines = [
        (format!("export MAINSTEM_SERVER={servers}"), String::new()),
        ("mainstem cluster nodes".into(), String::new()),
        (
            format!("mainstem stream create orders --replicas {replicas} --shards 4"),
            String::new(),
        ),
        ("mainstem bench pub --stream orders --subjects 50".into(), String::new()),
        (
            "mainstem shard ls orders".into(),
            "n1* leads, n3! is not current".into(),
        ),
        (
            "mainstem shard leader step-down orders/0".into(),
            "another one leads".into(),
        ),
        (
            "mainstem cluster events".into(),
            "in a terminal of its own, then:".into(),
        ),
        (format!("kill -9 {victim}"), format!("{last} is gone")),
        (
            "mainstem cluster health".into(),
            "says what is wrong, and exits with 10".into(),
        ),
    ];
    for (line, about) in lines {
        let _ = match about.as_str() {
            "" => writeln!(text, "  {line}"),
            about => writeln!(text, "  {line:42}  # {about}"),
        };
    }
    text.push_str("\nCtrl-C stops all nodes; what was acknowledged is on the disks of a quorum.");
    text
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn voters_are_odd() {
        let voters: Vec<_> = (1..=7).map(meta_voters).collect();
        assert_eq!(voters, [1, 1, 3, 3, 5, 5, 5]);
    }

    #[test]
    fn ports_are_kept_and_another_number_of_nodes_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let args = |nodes| DevArgs {
            nodes,
            ..DevArgs::default()
        };
        let place = |port| Place {
            client: loopback(port),
            monitor: loopback(port + 1),
            peer: loopback(port + 2),
        };
        let text = serde_json::to_vec(&[place(1000), place(2000), place(3000)]).unwrap();
        std::fs::write(places_file(dir.path()), text).unwrap();
        let told = places(&args(3), dir.path()).unwrap();
        assert_eq!((told.len(), told[2].peer.port()), (3, 3002));
        let refused = places(&args(4), dir.path()).unwrap_err();
        assert!(refused.contains("--nodes 3"), "{refused}");
    }
}
