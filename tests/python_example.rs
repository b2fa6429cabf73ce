//! The Python program of the examples, against a real server. Needs python3 with venv, and a package index for grpcio;
//! without them the test says so and passes.
#![allow(clippy::unwrap_used)]

mod harness;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use harness::{Cluster, Node, Options, until};
use mainstem::client::Client;
use mainstem::client::proto::StreamSpec;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/examples/python");

/// A Python with grpcio, made once; or why there is none.
fn python() -> Result<PathBuf, String> {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python-example");
    let python = venv.join("bin/python");
    let ready = venv.join("ready");
    if !ready.exists() {
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&venv))?;
        let requirements = format!("{EXAMPLE}/requirements.txt");
        run(Command::new(&python).args(["-m", "pip", "install", "--quiet", "--requirement", &requirements]))?;
        std::fs::write(ready, "").unwrap();
    }
    Ok(python)
}

fn run(command: &mut Command) -> Result<String, String> {
    let out = command.output().map_err(|e| format!("{command:?}: {e}"))?;
    if out.status.success() {
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    } else {
        Err(format!("{command:?}: {}", String::from_utf8_lossy(&out.stderr)))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_python_example_works() {
    let python = match python() {
        Ok(python) => python,
        Err(why) => {
            println!("skipped: no Python with grpcio: {why}");
            return;
        }
    };
    let node = Node::start(Options::plain()).await;
    let said = run(Command::new(python)
        .arg(format!("{EXAMPLE}/example.py"))
        .arg(node.client_addr()))
    .unwrap();
    println!("{said}");
    assert!(said.contains("read 2010 messages back"), "{said}");
}

/// The program that publishes in a loop sees a delay, and no error, when the node that leads and the node that it is
/// connected to are killed.
#[tokio::test(flavor = "multi_thread")]
async fn the_python_loop_survives_its_nodes() {
    let python = match python() {
        Ok(python) => python,
        Err(why) => {
            println!("skipped: no Python with grpcio: {why}");
            return;
        }
    };
    let mut cluster = Cluster::start(3, Options::plain()).await;
    let admin = Client::connect(&cluster.addresses().join(",")).await.unwrap();
    let spec = StreamSpec {
        name: "rides".into(),
        replicas: 3,
        ..StreamSpec::default()
    };
    admin.create_stream(spec).await.unwrap();
    // It knows the first node alone.
    let mut program = Command::new(python)
        .arg(format!("{EXAMPLE}/failover.py"))
        .args([&cluster[0].client_addr(), "rides", "25"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut said = BufReader::new(program.stdout.take().unwrap()).lines();
    let first = said.next().unwrap().unwrap();
    assert!(first.contains("publishing to rides"), "{first}");
    let tail = async || admin.get_stream("rides").await.map_or(0, |s| s.shards[0].tail);
    let goes_on = async || {
        let before = tail().await;
        until("publishes go on", async || tail().await > before + 20).await;
    };
    goes_on().await;
    let mut leader = None;
    until("a node leads", async || {
        let report = admin.cluster_report(Some("rides"), Vec::new()).await.unwrap();
        leader = report.groups[0].leader_node;
        leader.is_some()
    })
    .await;
    let leader = leader.unwrap() as usize - 1;
    cluster[leader].kill9().await;
    goes_on().await;
    cluster[leader].restart().await;
    until("all three are there", async || {
        let report = admin.cluster_report(Some("rides"), Vec::new()).await;
        report.is_ok_and(|r| r.groups[0].quorum_have == 3)
    })
    .await;
    // One that the program has known from the beginning.
    let other = usize::from(leader == 0);
    cluster[other].kill9().await;
    goes_on().await;
    let rest: Vec<String> = said.map(|line| line.unwrap()).collect();
    println!("{}", rest.join("\n"));
    assert!(program.wait().unwrap().success(), "{rest:?}");
    assert!(
        rest[0].contains("without an error") && rest[1].contains("each once, in order"),
        "{rest:?}"
    );
}
