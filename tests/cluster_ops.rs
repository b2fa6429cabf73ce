//! What the operators of a cluster see and do, over real processes: reports of what lags and what is on its way, health,
//! metrics, zones and tags, certificates between nodes, addresses, and the log.
#![allow(clippy::unwrap_used)]

mod harness;

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

use harness::{Cluster, Node, Options, cli, until};
use mainstem::client::proto::{NodeState, Placement, ReplicaState, StreamSpec};
use mainstem::client::{Client, ClientConfig, Message};
use mainstem::control::membership::{JoinFacts, Joining};
use mainstem::wire::internal as pb;

fn client(addresses: &[String]) -> Client {
    Client::new(ClientConfig::new(addresses.iter().cloned())).unwrap()
}

fn run(server: &str, line: &str) -> Output {
    cli(server, env!("CARGO_TARGET_TMPDIR"), line).output().unwrap()
}

#[track_caller]
fn ok(server: &str, line: &str) -> String {
    let out = run(server, line);
    assert!(out.status.success(), "{line}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// A node that has just joined may not be counted yet.
async fn create(client: &Client, spec: StreamSpec) {
    until("the stream is created", async || {
        match client.create_stream(spec.clone()).await {
            Ok(_) => true,
            Err(e) => {
                assert_eq!(e.reason, "NOT_ENOUGH_NODES", "{e}");
                false
            }
        }
    })
    .await;
}

/// The same by the command line.
async fn create_by(server: &str, line: &str) {
    until("the stream is created", async || run(server, line).status.success()).await;
}

fn spec(name: &str, replicas: u32) -> StreamSpec {
    StreamSpec {
        name: name.into(),
        replicas,
        ..StreamSpec::default()
    }
}

/// A replica that sleeps is told with what it lacks, in entries, bytes and time; health says so, and when it is over.
#[tokio::test(flavor = "multi_thread")]
async fn what_lags_is_told_in_entries_bytes_and_time() {
    let cluster = Cluster::start(3, Options::plain()).await;
    let all = client(&cluster.addresses());
    create(&all, spec("s", 3)).await;
    ok(
        &cluster.addresses().join(","),
        "cluster health --exit-when-healthy --nodes 3 --within 60s",
    );
    let report = all.cluster_report(Some("s"), Vec::new()).await.unwrap();
    let sleeper = report.groups[0].replicas.iter().find(|r| !r.leader).unwrap();
    let at = sleeper
        .node_name
        .strip_prefix("node-")
        .unwrap()
        .parse::<usize>()
        .unwrap()
        - 1;
    cluster[at].pause();
    let awake = (0..3).find(|i| *i != at).unwrap();
    let server = cluster[awake].client_addr();
    let here = client(std::slice::from_ref(&server));
    let (messages, size) = (300, 10_000);
    for n in 0..messages {
        let message = Message::new("s", vec![b'x'; size]).with_message_id(n.to_string());
        here.publish("s", vec![message], None).await.unwrap();
    }
    let replica = async || {
        let report = here.cluster_report(Some("s"), Vec::new()).await.unwrap();
        let found = report.groups[0]
            .replicas
            .iter()
            .find(|r| r.replica_id == sleeper.replica_id);
        found.unwrap().clone()
    };
    let told = replica().await;
    let (entries, bytes, us) = (told.lag_entries.unwrap(), told.lag_bytes.unwrap(), told.lag_us.unwrap());
    let told_all = format!("{told:?}");
    assert_eq!(told.state(), ReplicaState::Offline, "{told_all}");
    // A few may be on their way to it, taken by its kernel.
    let least = (messages - 64) as u64;
    assert!(entries >= least && entries <= 2 * messages as u64, "{told_all}");
    assert!(
        bytes >= least * size as u64 && bytes <= 2 * (messages * size) as u64,
        "{told_all}"
    );
    assert!(us > 0 && told.last_ack_us.is_some(), "{told_all}");
    let later = replica().await;
    assert!(later.lag_us.unwrap() > us, "time goes on: {told_all} {later:?}");

    let out = run(&server, "cluster health");
    let said = String::from_utf8(out.stdout).unwrap();
    assert_eq!(out.status.code(), Some(10), "{said}");
    assert!(
        said.contains("unhealthy: 2 of 3 nodes answer") && said.contains("(s/0)"),
        "{said}"
    );
    let page = ok(&server, "cluster report");
    assert!(
        page.contains("offline") && page.contains("MiB") && page.contains("behind"),
        "{page}"
    );
    let (leader, marked) = (page.contains("*, "), page.contains(&format!("node-{}!", at + 1)));
    assert!(leader && marked, "{page}");
    let json: serde_json::Value = serde_json::from_str(&ok(&server, "cluster report --format json")).unwrap();
    let groups = json["groups"].as_array().unwrap();
    let of_stream = groups.iter().find(|g| g["shards"] == 1).unwrap();
    assert!(
        json["planned"].is_array() && of_stream["replicas"][0]["lag_us"].is_number(),
        "{json}"
    );
    let info = ok(&server, "stream info s");
    assert!(info.contains('!') && info.contains("offline"), "{info}");

    cluster[at].resume();
    ok(&server, "cluster health --exit-when-healthy --nodes 3 --within 60s");
    until("it has everything again", async || {
        let now = replica().await;
        now.state() == ReplicaState::Current && now.lag_bytes == Some(0) && now.lag_us == Some(0)
    })
    .await;
}

/// What nodes say to each other is counted.
#[tokio::test(flavor = "multi_thread")]
async fn peers_are_counted() {
    let mut cluster = Cluster::start(3, Options::plain()).await;
    let all = client(&cluster.addresses());
    create(&all, spec("s", 3)).await;
    for node in &cluster.nodes {
        until("a session to each of the others", async || {
            node.metric("raft_peer_sessions").await == 2.0
        })
        .await;
        assert!(node.metric("raft_peer_sent_bytes_total").await > 0.0);
        assert!(node.metric("raft_peer_received_bytes_total").await > 0.0);
        until("calls are answered", async || {
            node.metric("raft_peer_calls_total{outcome=\"answered\"}").await > 0.0
        })
        .await;
    }
    until("the round trip is measured", async || {
        let mut measured = 0.0;
        for node in &cluster.nodes {
            measured += node.metric("raft_peer_round_trip_seconds_count").await;
        }
        measured > 0.0
    })
    .await;
    // Everything that this one led is led by another one.
    let meta = all.cluster().await.unwrap().meta.unwrap();
    let at = meta.leader_node.unwrap() as usize - 1;
    let other = (at + 1) % 3;
    let before = cluster[other].metric("raft_leader_changes_total").await;
    cluster[at].kill9().await;
    until("it is counted when it happens", async || {
        cluster[other].metric("raft_leader_changes_total").await > before
    })
    .await;
    until("the session is gone", async || {
        cluster[other].metric("raft_peer_sessions").await == 1.0
    })
    .await;
    cluster[at].restart().await;
}

/// Replicas are where zones and tags say.
#[tokio::test(flavor = "multi_thread")]
async fn zones_and_tags_are_honoured() {
    // The flags of a node are those of all, and its own.
    let mut cluster = Cluster::found(Options::plain().flag("--zone", "a").flag("--tags", "disk=ssd")).await;
    for (zone, disk) in [("b", "ssd"), ("c", "hdd"), ("d", "ssd")] {
        let mut node = cluster.joiner(0);
        let flags = &mut node.options.flags;
        for (flag, value) in [("--zone", zone.to_owned()), ("--tags", format!("disk={disk}"))] {
            let at = flags.iter().position(|known| known == flag).unwrap();
            flags[at + 1] = value;
        }
        node.launch();
        node.ready().await;
        cluster.nodes.push(node);
    }
    let all = client(&cluster.addresses());
    let nodes = all.nodes(false).await.unwrap();
    let told: Vec<_> = nodes
        .iter()
        .map(|n| (n.zone.as_str(), n.tags["disk"].as_str()))
        .collect();
    assert_eq!(told, [("a", "ssd"), ("b", "ssd"), ("c", "hdd"), ("d", "ssd")]);
    let server = cluster.addresses().join(",");
    let nodes_of = async |stream: &str| {
        let report = all.cluster_report(Some(stream), Vec::new()).await.unwrap();
        let mut nodes: Vec<_> = report.groups[0].replicas.iter().map(|r| r.node_name.clone()).collect();
        nodes.sort();
        nodes
    };
    create_by(&server, "stream create abc --replicas 3 --placement zone=a,b,c").await;
    assert_eq!(nodes_of("abc").await, ["node-1", "node-2", "node-3"]);
    create_by(&server, "stream create bcd --replicas 3 --placement zone=b,c,d").await;
    assert_eq!(nodes_of("bcd").await, ["node-2", "node-3", "node-4"]);
    create_by(&server, "stream create fast --replicas 3 --placement tag:disk=ssd").await;
    assert_eq!(nodes_of("fast").await, ["node-1", "node-2", "node-4"]);
    let placed = spec("too-many", 3);
    let placement = Placement {
        zones: vec!["a".into(), "b".into()],
        ..Placement::default()
    };
    let refused = all
        .create_stream(StreamSpec {
            placement: Some(placement),
            ..placed
        })
        .await
        .unwrap_err();
    assert_eq!(refused.reason, "NOT_ENOUGH_NODES", "{refused}");
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A node is joined through any of several addresses, and found where it says, which need not be where it listens.
#[tokio::test(flavor = "multi_thread")]
async fn addresses_to_join_and_to_be_found_at() {
    let first = free_port();
    let advertised = format!("localhost:{first}");
    let options = Options::plain()
        .flag("--name", "node-1")
        .flag("--advertise-client", &advertised);
    let mut member = Node::new("member", options);
    member.options.flags.push("--bootstrap".into());
    member.set_peer_listen("127.0.0.1:0");
    member.launch();
    member.ready().await;
    let info = client(&[member.client_addr()]).server_info().await.unwrap();
    assert_eq!(info.nodes[0].client_address, advertised);
    let dead = free_port();
    let peers = format!("127.0.0.1:{dead},{}", member.peer_addr());
    let mut joiner = Node::new(
        "joiner",
        Options::plain().flag("--name", "node-2").flag("--join", &peers),
    );
    let port = free_port();
    joiner.set_peer_listen(&format!("127.0.0.1:{port}"));
    joiner.options = joiner
        .options
        .clone()
        .flag("--advertise-peer", &format!("localhost:{port}"));
    joiner.launch();
    joiner.ready().await;
    assert!(
        joiner.has_logged(&["not joined yet", &format!("127.0.0.1:{dead}")]),
        "{}",
        joiner.log()
    );
    let here = client(&[member.client_addr()]);
    let nodes = here.nodes(false).await.unwrap();
    assert_eq!(nodes[1].peer_address, format!("localhost:{port}"));
    create(&here, spec("s", 2)).await;
    until("both serve it", async || {
        let report = here.cluster_report(Some("s"), Vec::new()).await.unwrap();
        report.groups[0].quorum_have == 2
    })
    .await;
    // Where others can reach it, neither is done in silence.
    for (flag, value, word) in [
        ("--listen", "0.0.0.0:0", "--insecure"),
        ("--peer-listen", "0.0.0.0:0", "--insecure"),
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_mainstem"))
            .args(["server", "--data-dir"])
            .arg(member.place().join("never"))
            .args([flag, value])
            .output()
            .unwrap();
        let said = String::from_utf8(out.stderr).unwrap();
        assert!(!out.status.success() && said.contains(word), "{flag}: {said}");
    }
    member.term();
    assert!(member.wait_exit().await.success());
}

/// An authority.
struct Authority(rcgen::CertifiedIssuer<'static, rcgen::KeyPair>);

impl Authority {
    fn new(name: &str) -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let key = rcgen::KeyPair::generate().unwrap();
        Self(rcgen::CertifiedIssuer::self_signed(params, key).unwrap())
    }

    /// The flags of a node with a certificate of this authority that trusts `trusted`.
    fn flags(&self, trusted: &Authority, dir: &Path) -> Vec<String> {
        std::fs::create_dir_all(dir).unwrap();
        let write = |name: &str, pem: String| {
            let path = dir.join(name);
            std::fs::write(&path, pem).unwrap();
            path.to_str().unwrap().to_owned()
        };
        let key = rcgen::KeyPair::generate().unwrap();
        let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
        let params = rcgen::CertificateParams::new(names).unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap().pem();
        let files = [
            ("--tls-cert", write("cert.pem", certificate)),
            ("--tls-key", write("key.pem", key.serialize_pem())),
            ("--tls-peer-ca", write("ca.pem", trusted.0.pem())),
        ];
        files
            .into_iter()
            .flat_map(|(flag, path)| [flag.to_owned(), path])
            .collect()
    }
}

/// Nodes speak TLS to each other, and only with those that their authority has signed.
#[tokio::test(flavor = "multi_thread")]
async fn nodes_show_each_other_certificates() {
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let place = tempfile::tempdir().unwrap();
    let node = |name: &str, more: &[&str], tls: Vec<String>| {
        let mut node = Node::new(name, Options::plain().flag("--name", name));
        node.options.flags.extend(more.iter().map(|flag| (*flag).to_owned()));
        node.options.flags.extend(tls);
        node.set_peer_listen("127.0.0.1:0");
        node
    };
    let good = |name: &str| ours.flags(&ours, &place.path().join(name));
    let mut first = node("node-1", &["--bootstrap"], good("1"));
    first.launch();
    first.ready().await;
    let join = first.peer_addr();
    let mut members = Vec::new();
    for name in ["node-2", "node-3"] {
        let mut member = node(name, &["--join", &join], good(name));
        member.launch();
        member.ready().await;
        members.push(member);
    }
    let tls = mainstem::client::TlsConfig {
        ca_pem: Some(ours.0.pem().into_bytes()),
        ..Default::default()
    };
    let mut config = ClientConfig::new([first.client_addr()]);
    config.tls = Some(tls);
    let here = Client::new(config).unwrap();
    create(&here, spec("s", 3)).await;
    until("all three replicas answer", async || {
        let report = here.cluster_report(Some("s"), Vec::new()).await.unwrap();
        report.groups[0].quorum_have == 3
    })
    .await;
    here.publish("s", vec![Message::new("s", "x")], None).await.unwrap();

    // One with a certificate of another authority; one that trusts another; one without any.
    for (name, flags, words) in [
        (
            "signed-by-another",
            other.flags(&ours, &place.path().join("4")),
            "certificate",
        ),
        (
            "trusts-another",
            ours.flags(&other, &place.path().join("5")),
            "certificate",
        ),
        ("plain", Vec::new(), "speak TLS"),
    ] {
        let mut stranger = node(name, &["--join", &join], flags);
        stranger.launch();
        until("it is told why", async || {
            stranger.has_logged(&["not joined yet", words])
        })
        .await;
        println!("{}", stranger.log());
        stranger.term();
        stranger.wait_exit().await;
    }
    assert_eq!(here.nodes(false).await.unwrap().len(), 3, "none of them was let in");
}

/// What the next version waits for is told.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_knows_more_waits_for_the_others() {
    let cluster = Cluster::found(Options::plain()).await;
    let here = client(&cluster.addresses());
    let before = here.cluster().await.unwrap();
    assert_eq!((before.cluster_version, before.cluster_version_known), (1, 1));
    assert!(before.held_back_by.is_empty());
    // A later version of the program, so far as the cluster can tell.
    let joining = Joining {
        addresses: vec![cluster[0].peer_addr()],
        token: Vec::new(),
        tls: None,
        facts: JoinFacts {
            cluster_name: "mainstem".into(),
            cluster_id: None,
            store_id: 77,
            node: pb::JoinNode {
                name: "later".into(),
                incarnation: 1,
                peer_address: format!("127.0.0.1:{}", free_port()),
                cluster_version_max: 3,
                ..pb::JoinNode::default()
            },
        },
    };
    let joined = joining.run(&Default::default()).await.unwrap();
    let now = here.cluster().await.unwrap();
    assert_eq!((now.cluster_version, now.cluster_version_known), (1, 3));
    assert_eq!(now.held_back_by, [1]);
    let info = ok(&cluster[0].client_addr(), "cluster info");
    assert!(info.contains("cluster version 1; 3 is held back by n1"), "{info}");
    let nodes = here.nodes(false).await.unwrap();
    let later = nodes.iter().find(|n| n.node_id == joined.node.get()).unwrap();
    assert_eq!((later.state(), later.cluster_version_max), (NodeState::Active, 3));
}
