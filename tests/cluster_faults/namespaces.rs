//! A cluster over real networks: each node in a network namespace of its own, with one wire to its peers and one to its
//! clients. What is cut here is cut in the kernel: packets vanish, and nobody is told.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use super::harness::cluster::Place;
use super::harness::{Cluster, Crowd, History, Node, Options, seed};
use super::random::{name_of, streams};
use super::verify;

fn ip(line: &str) -> Result<(), String> {
    let out = Command::new("ip")
        .args(line.split(' '))
        .output()
        .map_err(|e| format!("ip: {e}"))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(format!("ip {line}: {}", String::from_utf8_lossy(&out.stderr).trim())),
    }
}

/// Namespaces and bridges, taken down in the end.
struct Networks {
    /// Part of every name.
    id: u32,
    nodes: usize,
}

impl Networks {
    /// Why not, where it is not allowed.
    fn new(nodes: usize) -> Result<Self, String> {
        let id = std::process::id() % 10_000;
        // What an earlier run with the same number has left is taken down by dropping this.
        drop(Self { id, nodes });
        let networks = Self { id, nodes };
        networks.make().map(|()| networks)
    }

    fn make(&self) -> Result<(), String> {
        let id = self.id;
        // The peers' bridge has a namespace of its own: what this machine's firewall forwards (nothing between bridge
        // ports, where a container engine has set it up) does not count there.
        let hub = self.hub();
        ip(&format!("netns add {hub}"))?;
        ip(&format!("-n {hub} link add msp{id} type bridge"))?;
        ip(&format!("-n {hub} link set msp{id} up"))?;
        ip(&format!("link add msc{id} type bridge"))?;
        ip(&format!("addr add {}/24 dev msc{id}", self.address("client", 253)))?;
        ip(&format!("link set msc{id} up"))?;
        for i in 0..self.nodes {
            let namespace = self.namespace(i);
            ip(&format!("netns add {namespace}"))?;
            ip(&format!("-n {namespace} link set lo up"))?;
            for (wire, bridge) in [("peer", "msp"), ("client", "msc")] {
                let outside = format!("{bridge}{id}n{i}");
                ip(&format!(
                    "link add {outside} type veth peer name {wire} netns {namespace}"
                ))?;
                if wire == "peer" {
                    ip(&format!("link set {outside} netns {hub}"))?;
                    ip(&format!("-n {hub} link set {outside} master {bridge}{id} up"))?;
                } else {
                    ip(&format!("link set {outside} master {bridge}{id} up"))?;
                }
                ip(&format!(
                    "-n {namespace} addr add {}/24 dev {wire}",
                    self.address(wire, i)
                ))?;
                ip(&format!("-n {namespace} link set {wire} up"))?;
            }
        }
        Ok(())
    }

    fn hub(&self) -> String {
        format!("ms{}hub", self.id)
    }

    fn namespace(&self, i: usize) -> String {
        format!("ms{}n{i}", self.id)
    }

    fn address(&self, wire: &str, i: usize) -> String {
        let net = if wire == "peer" { 213 } else { 214 };
        format!("10.{net}.{}.{}", self.id % 250, i + 1)
    }

    fn places(&self) -> Vec<Place> {
        let place = |i| Place {
            namespace: self.namespace(i),
            client: format!("{}:7411", self.address("client", i)),
            peer: format!("{}:7412", self.address("peer", i)),
        };
        (0..self.nodes).map(place).collect()
    }

    /// The wire to the peers is unplugged, or plugged in again. The node itself does not see it: it is the other end.
    fn plug(&self, i: usize, up: bool) {
        let state = if up { "up" } else { "down" };
        ip(&format!("-n {} link set msp{}n{i} {state}", self.hub(), self.id)).unwrap();
    }

    /// Packets from one node to another go nowhere, or are sent again.
    fn route(&self, from: usize, to: usize, open: bool) {
        let what = if open { "del" } else { "add" };
        let (namespace, to) = (self.namespace(from), self.address("peer", to));
        ip(&format!("-n {namespace} route {what} blackhole {to}/32")).unwrap();
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        for i in 0..self.nodes {
            let _ = ip(&format!("netns del {}", self.namespace(i)));
        }
        let _ = ip(&format!("netns del {}", self.hub()));
        let _ = ip(&format!("link del msc{}", self.id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn cut_networks_lose_nothing() {
    let seed = seed("cut_networks_lose_nothing");
    let networks = match Networks::new(3) {
        Ok(networks) => networks,
        Err(why) => {
            eprintln!("SKIPPED cut_networks_lose_nothing: network namespaces cannot be made here: {why}");
            return;
        }
    };
    let token = Node::new("token", Options::plain());
    let file = token.place().join("token");
    std::fs::write(&file, "a token of the test's own\n").unwrap();
    let mut options = Options::plain().flag("--token-file", file.to_str().unwrap());
    options.flags.push("--insecure".into());
    let mut cluster = Cluster::placed(networks.places(), options).await;
    let streams = streams(&cluster, true).await;
    let names: Vec<String> = streams.iter().map(name_of).collect();
    let history = Arc::new(History::default());
    let crowd = Crowd::start(&history, &cluster.addresses(), &streams, seed);
    let more = async || history.wait_acked(history.acked_batches() + 200).await;
    more().await;
    for round in 0..2 {
        // The leader's wire is unplugged: the others go on, and it comes back.
        let leader = cluster.wait().leader("own").await;
        networks.plug(leader, false);
        tokio::time::sleep(Duration::from_secs(2)).await;
        more().await;
        println!(
            "round {round}: {} acked with node {leader} unplugged",
            history.acked_batches()
        );
        networks.plug(leader, true);
        // What one node sends to another is lost; the third one reaches both.
        let leader = cluster.wait().leader("own").await;
        let other = (leader + 1) % 3;
        networks.route(leader, other, false);
        tokio::time::sleep(Duration::from_secs(2)).await;
        more().await;
        println!(
            "round {round}: {} acked without a route from {leader} to {other}",
            history.acked_batches()
        );
        networks.route(leader, other, true);
        more().await;
    }
    // All apart: nothing can be acknowledged; and together again.
    (0..3).for_each(|i| networks.plug(i, false));
    tokio::time::sleep(Duration::from_secs(2)).await;
    (0..3).for_each(|i| networks.plug(i, true));
    more().await;
    cluster.wait().healthy().await;
    let counts = crowd.stop().await;
    let tally = verify::at_every_node(&cluster, &history, &names).await;
    let tally = tally.unwrap_or_else(|wrong| panic!("SEED={seed}: {wrong:#?}\n{counts}"));
    println!("{tally:?}\n{counts}");
}
