//! `mainstem dev --nodes N`: real processes, one for each node, that form a cluster, are watched, and end together.
#![allow(clippy::unwrap_used)]

mod harness;

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::{Duration, Instant};

use harness::cli;
use mainstem::client::proto::StreamSpec;
use mainstem::client::{Client, Message, Target};

/// Lines that a test may be behind by.
const LINES_MAX: usize = 10_000;

struct Dev {
    child: Child,
    lines: Receiver<String>,
    /// Name, client address and process of each node.
    nodes: BTreeMap<String, (String, u32)>,
    /// What it proposes to type.
    tour: Vec<String>,
}

/// What a stream says, line by line.
fn lines(from: impl std::io::Read + Send + 'static, to: std::sync::mpsc::SyncSender<String>) {
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            eprintln!("dev: {line}");
            if to.send(line).is_err() {
                return;
            }
        }
    });
}

impl Dev {
    fn start(nodes: u32, dir: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mainstem"))
            .args(["dev", "--nodes", &nodes.to_string(), "--listen", "127.0.0.1:0"])
            .arg("--data-dir")
            .arg(dir)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, receiver) = sync_channel(LINES_MAX);
        lines(child.stdout.take().unwrap(), sender.clone());
        lines(child.stderr.take().unwrap(), sender);
        let mut dev = Self {
            child,
            lines: receiver,
            nodes: BTreeMap::new(),
            tour: Vec::new(),
        };
        // The tour: "  n1   clients 127.0.0.1:…   status …   process 17   log …", and at its end how to stop it.
        loop {
            let line = dev.line();
            let words: Vec<_> = line.split_whitespace().collect();
            if let [name, "clients", address, "status", _, "process", pid, ..] = words.as_slice() {
                dev.nodes
                    .insert(name.to_string(), (address.to_string(), pid.parse().unwrap()));
            }
            let typed = line.split(" # ").next().unwrap_or_default().trim();
            if let Some(command) = typed.strip_prefix("mainstem ") {
                dev.tour.push(command.to_owned());
            }
            if line.starts_with("Ctrl-C") {
                return dev;
            }
        }
    }

    fn line(&self) -> String {
        let patience = harness::PATIENCE * 2;
        self.lines.recv_timeout(patience).expect("it says what it does")
    }

    /// Waits for a line that contains this.
    fn until(&self, text: &str) {
        while !self.line().contains(text) {}
    }

    fn addresses(&self) -> String {
        let all: Vec<_> = self.nodes.values().map(|(address, _)| address.as_str()).collect();
        all.join(",")
    }

    fn cli(&self, line: &str) -> Output {
        cli(&self.addresses(), env!("CARGO_TARGET_TMPDIR"), line)
            .output()
            .unwrap()
    }

    #[track_caller]
    fn ok(&self, line: &str) -> String {
        let out = self.cli(line);
        assert!(out.status.success(), "{line}: {out:?}");
        String::from_utf8(out.stdout).unwrap()
    }

    /// Tells it to stop, and waits until it has, and every node with it.
    fn stop(mut self) {
        signal(self.child.id(), libc::SIGINT);
        let begun = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(begun.elapsed() < harness::PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        assert!(status.success(), "{status}");
        for (name, (_, pid)) in &self.nodes {
            assert!(
                !PathBuf::from(format!("/proc/{pid}")).exists(),
                "{name} has outlived it"
            );
        }
    }
}

impl Drop for Dev {
    fn drop(&mut self) {
        // Its nodes end with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[allow(unsafe_code)]
fn signal(pid: u32, signal: i32) {
    // SAFETY: takes numbers only.
    let r = unsafe { libc::kill(pid as i32, signal) };
    assert_eq!(r, 0, "{}", std::io::Error::last_os_error());
}

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_form_a_cluster_survive_one_and_come_back() {
    let place = tempfile::tempdir().unwrap();
    let dev = Dev::start(3, place.path());
    assert_eq!(dev.nodes.len(), 3);
    dev.ok("cluster health --exit-when-healthy --nodes 3 --within 60s");

    // Everything works at any node.
    let client = Client::connect(&dev.addresses()).await.unwrap();
    let spec = StreamSpec {
        name: "orders".into(),
        replicas: 3,
        ..StreamSpec::default()
    };
    client.create_stream(spec).await.unwrap();
    for (address, _) in dev.nodes.values() {
        let one = Client::connect(address).await.unwrap();
        let acks = one
            .publish("orders", vec![Message::new("orders", "x")], None)
            .await
            .unwrap();
        assert_eq!(acks.len(), 1);
        let nodes = one.nodes(false).await.unwrap();
        assert!(nodes.iter().all(|n| n.live), "{nodes:?}");
        let report = one.cluster_report(Some("orders"), Vec::new()).await.unwrap();
        let group = &report.groups[0];
        assert_eq!((group.voters, group.quorum_have, group.quorum_need), (3, 3, 2));
        assert_eq!(report.shards[0].leader_node, group.leader_node);
    }
    assert_eq!(client.get_stream("orders").await.unwrap().shards[0].tail, 4);

    // The leader hands over, to the one named, whoever is asked.
    let report = client.cluster_report(Some("orders"), Vec::new()).await.unwrap();
    let group = &report.groups[0];
    let follower = group.replicas.iter().find(|r| !r.leader).unwrap();
    for (address, _) in dev.nodes.values() {
        let one = Client::connect(address).await.unwrap();
        let target = Target::Shard {
            stream: "orders".into(),
            index: 0,
        };
        let done = one.step_down(target, &follower.node_name).await.unwrap();
        assert_eq!(done.to_node, follower.node_id);
    }

    // One is killed: it is told, the cluster goes on, and says what is wrong.
    let victim = dev.nodes["n3"].1;
    signal(victim, libc::SIGKILL);
    dev.until("n3 has ended by itself");
    let report = dev.cli("cluster health");
    assert_eq!(report.status.code(), Some(10), "{report:?}");
    let said = String::from_utf8(report.stdout).unwrap();
    assert!(said.contains("2 of 3 nodes answer") && said.contains("n3"), "{said}");
    let left = Client::connect(&dev.nodes["n1"].0).await.unwrap();
    harness::until("a publish is acknowledged without n3", async || {
        let message = Message::new("orders", "y").with_message_id("one");
        left.publish("orders", vec![message], None).await.is_ok()
    })
    .await;
    dev.stop();

    // All of it is there when it starts again.
    let dev = Dev::start(3, place.path());
    dev.ok("cluster health --exit-when-healthy --nodes 3 --within 60s");
    let client = Client::connect(&dev.addresses()).await.unwrap();
    assert_eq!(client.get_stream("orders").await.unwrap().shards[0].tail, 5);
    dev.stop();
}

/// Every line of the tour does what it says.
#[tokio::test(flavor = "multi_thread")]
async fn the_tour_can_be_typed() {
    let place = tempfile::tempdir().unwrap();
    let dev = Dev::start(3, place.path());
    let mut tour = dev.tour.clone();
    assert_eq!(tour.pop().as_deref(), Some("cluster health"), "after one was killed");
    for line in &tour {
        let line = match line.as_str() {
            // Fewer, for a test; and events go on for ever.
            bench if bench.starts_with("bench") => format!("{bench} -n 20k"),
            "cluster events" => format!("{line} --count 1"),
            line => line.to_owned(),
        };
        let said = dev.ok(&line);
        println!("$ mainstem {line}\n{said}");
        if line.starts_with("shard ls") {
            assert!(said.contains("n1") && said.contains("3 of 3"), "{said}");
        }
    }
    assert!(tour.len() >= 6, "{tour:?}");
    // Its nodes have the numbers of their names, and their logs are a page that can be read.
    let client = Client::connect(&dev.addresses()).await.unwrap();
    for node in client.nodes(false).await.unwrap() {
        assert_eq!(node.name, format!("n{}", node.node_id));
        let log = std::fs::read_to_string(place.path().join(format!("{}.log", node.name))).unwrap();
        let errors = log.lines().filter(|line| line.contains("ERROR")).count();
        assert!(errors == 0 && log.lines().count() < 60, "{}: {log}", node.name);
    }
    signal(dev.nodes["n3"].1, libc::SIGKILL);
    dev.until("n3 has ended by itself");
    assert_eq!(dev.cli("cluster health").status.code(), Some(10));
    dev.stop();
}

#[test]
fn a_number_of_nodes_that_makes_no_sense_is_refused() {
    for nodes in ["0", "8", "some"] {
        let out = Command::new(env!("CARGO_BIN_EXE_mainstem"))
            .args(["dev", "--nodes", nodes])
            .output()
            .unwrap();
        assert_eq!(out.status.code(), Some(2), "{nodes}");
    }
}
