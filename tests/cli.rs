//! The command line against a real server.
#![allow(clippy::unwrap_used)]

mod harness;

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use harness::{Node, Options};

struct Cli<'a> {
    node: &'a Node,
}

impl Cli<'_> {
    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mainstem"));
        command
            .args(args)
            .env("MAINSTEM_SERVER", self.node.client_addr())
            .env_remove("MAINSTEM_CONTEXT")
            .env("XDG_CONFIG_HOME", self.node.place())
            .current_dir(self.node.place());
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    /// Runs a command that must succeed; returns what it wrote to the standard output.
    #[track_caller]
    fn ok(&self, args: &[&str]) -> Vec<u8> {
        let out = self.run(args);
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        out.stdout
    }

    #[track_caller]
    fn text(&self, args: &[&str]) -> String {
        String::from_utf8(self.ok(args)).unwrap()
    }

    #[track_caller]
    fn json(&self, args: &[&str]) -> serde_json::Value {
        serde_json::from_slice(&self.ok(args)).unwrap()
    }

    #[track_caller]
    fn fails(&self, code: i32, args: &[&str]) -> String {
        let out = self.run(args);
        let said = String::from_utf8(out.stderr).unwrap();
        assert_eq!(out.status.code(), Some(code), "{args:?}: {said}");
        assert!(said.starts_with("error: "), "{said}");
        said
    }

    #[track_caller]
    fn piped(&self, args: &[&str], input: &[u8]) -> Output {
        let mut child = self
            .command(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child.stdin.take().unwrap().write_all(input).unwrap();
        let out = child.wait_with_output().unwrap();
        assert!(
            out.status.success(),
            "{args:?}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        out
    }

    fn write(&self, name: &str, content: &[u8]) -> String {
        let path = self.node.place().join(name);
        std::fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

#[tokio::test]
async fn a_stream_from_its_making_to_its_end() {
    let node = Node::start(Options::plain()).await;
    let cli = Cli { node: &node };
    cli.ok(&["stream", "create", "orders", "--max-age", "7days", "--shards", "2"]);
    assert!(
        String::from_utf8(
            cli.run(&["stream", "create", "orders", "--max-age", "7days", "--shards", "2"])
                .stderr
        )
        .unwrap()
        .contains("was there before")
    );
    cli.fails(1, &["stream", "create", "orders"]);
    assert!(cli.text(&["stream", "ls"]).contains("orders.>"));
    let info = cli.json(&["stream", "info", "orders", "--format", "json"]);
    assert_eq!(info["limits"]["max_age_us"], 604_800_000_000u64);
    assert_eq!(info["shards"].as_array().unwrap().len(), 2);
    let edited = cli.json(&["stream", "edit", "orders", "--max-age", "none", "--format", "json"]);
    assert!(edited["limits"]["max_age_us"].is_null());
    cli.ok(&["pub", "orders", "hello", "--subject", "orders.eu"]);
    let page = cli.json(&["stream", "view", "orders", "--format", "json"]);
    assert_eq!(page["messages"][0]["payload"], "hello");
    assert_eq!(
        cli.ok(&["stream", "get", "orders", "--last-by-subject", "orders.eu"]),
        b"hello"
    );
    assert!(cli.fails(3, &["stream", "get", "orders", "99"]).contains("stream info"));
    cli.ok(&["stream", "purge", "orders"]);
    assert!(cli.ok(&["sub", "orders"]).is_empty());
    cli.ok(&["stream", "rm", "orders"]);
    assert!(cli.fails(3, &["stream", "info", "orders"]).contains("stream ls"));
    cli.ok(&["stream", "undelete", "orders"]);
    cli.ok(&["stream", "info", "orders"]);
    cli.ok(&["stream", "rm", "orders", "--now", "--yes"]);
    cli.fails(3, &["stream", "undelete", "orders"]);
}

#[tokio::test]
async fn what_is_published_comes_back_byte_for_byte() {
    let node = Node::start(Options::plain()).await;
    let cli = Cli { node: &node };
    for name in ["lines", "records", "odd", "json", "copy", "pipe"] {
        cli.ok(&["stream", "create", name]);
    }
    let lines: String = (0..50_000)
        .map(|n| format!("line {n}\n\t{}\n", "é".repeat(n % 40)))
        .collect();
    let file = cli.write("lines.txt", lines.as_bytes());
    cli.ok(&["pub", "lines", "--file", &file, "--codec", "zstd", "--acks", "acks"]);
    assert!(cli.ok(&["sub", "lines", "--raw"]) == lines.as_bytes());
    // The acks tell of every line once, with its sequence: one shard, so line n has sequence n + 1.
    let acks = std::fs::read_to_string(node.place().join("acks")).unwrap();
    let mut next = 0;
    for ack in acks
        .lines()
        .map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap())
    {
        assert_eq!(ack["inputs"].as_array().unwrap().len(), 1);
        assert_eq!(ack["inputs"][0][0], next);
        assert_eq!(ack["first"], next + 1);
        next = ack["inputs"][0][1].as_u64().unwrap() + 1;
        assert_eq!(ack["last"], next);
    }
    assert_eq!(next, 100_000);

    let records = "Package: a\nVersion: 1\n\nPackage: b\nDescription: x\n y\n\n";
    let file = cli.write("records.txt", records.as_bytes());
    cli.ok(&["pub", "records", "--file", &file, "--record-separator", "blank-line"]);
    assert_eq!(cli.text(&["sub", "records", "--raw", "--delimiter", "\\n\\n"]), records);
    assert_eq!(
        cli.text(&["sub", "records", "--raw", "--count", "1"]),
        "Package: a\nVersion: 1\n"
    );

    let odd: Vec<u8> = (0..=255).collect();
    cli.piped(&["pub", "odd", "--delimiter", "", "-q"], &odd);
    assert_eq!(cli.ok(&["sub", "odd", "--raw", "--delimiter", ""]), odd);
    assert!(cli.text(&["sub", "odd"]).contains("\\xff"), "shown without harm");

    let json = "{\"subject\":\"json.a\",\"payload\":\"x\",\"key\":\"k\",\"headers\":{\"h\":\"v\"},\"event_time_us\":7}\n\
                {\"payload_base64\":\"/wA=\",\"message_id\":\"i\"}\n";
    cli.piped(&["pub", "json", "--jsonl"], json.as_bytes());
    let out = cli.text(&["sub", "json", "--jsonl"]);
    let first: serde_json::Value = serde_json::from_str(out.lines().next().unwrap()).unwrap();
    assert_eq!(
        (&first["subject"], &first["key"], &first["headers"][0]["value"]),
        (&"json.a".into(), &"k".into(), &"v".into())
    );
    cli.piped(
        &["pub", "copy", "--jsonl", "--subject", "copy"],
        out.replace("json", "copy").as_bytes(),
    );
    let strip = |text: String| -> Vec<serde_json::Value> {
        text.lines()
            .map(|l| {
                let mut v: serde_json::Value = serde_json::from_str(l).unwrap();
                v.as_object_mut().unwrap().remove("time_us");
                v
            })
            .collect()
    };
    assert_eq!(
        strip(cli.text(&["sub", "copy", "--jsonl"])),
        strip(out.replace("json", "copy"))
    );

    let said = String::from_utf8(cli.piped(&["pub", "pipe"], b"a\nb\nc").stderr).unwrap();
    assert!(said.contains("acknowledged 3 messages"), "{said}");
    assert_eq!(cli.text(&["sub", "pipe", "--raw", "--from", "last-2"]), "b\nc\n");
    assert_eq!(
        cli.text(&["sub", "pipe", "--raw", "--from", "2", "--count", "1"]),
        "b\n"
    );
}

#[tokio::test]
async fn publishing_keeps_its_conditions() {
    let node = Node::start(Options::plain()).await;
    let cli = Cli { node: &node };
    cli.ok(&["stream", "create", "s"]);
    cli.ok(&["pub", "s", "one", "--expect-last-sequence", "0"]);
    let said = cli.fails(5, &["pub", "s", "two", "--expect-last-sequence", "0"]);
    assert!(said.contains("the last sequence is 1"), "{said}");
    cli.ok(&["pub", "s", "two", "--expect-last-subject-sequence", "1"]);
    cli.ok(&["pub", "s", "x", "--msg-id", "i", "--subject", "s.ids"]);
    let again = cli.run(&["pub", "s", "x", "--msg-id", "i", "--subject", "s.ids"]);
    assert!(String::from_utf8(again.stderr).unwrap().contains("duplicate"), "told");
    assert_eq!(cli.text(&["sub", "s", "--raw", "--filter", "s.*"]), "x\n");
    cli.fails(2, &["pub", "s", "x", "--subject", "s..x"]);
    cli.fails(3, &["pub", "nowhere", "x"]);
    let file = cli.write("bad.jsonl", b"{\"payload\":\"good\"}\n{\"paylod\":\"bad\"}\n");
    let said = cli.fails(2, &["pub", "s", "--jsonl", "--file", &file, "-q"]);
    assert!(said.contains("record 2") && said.contains("paylod"), "{said}");
    assert!(
        cli.text(&["sub", "s", "--raw", "--from", "last-1"]).contains("good"),
        "what was good before it is stored"
    );
}

/// Not to try again is not the same as not to try.
#[tokio::test]
async fn publishing_without_retries_publishes() {
    let mut node = Node::start(Options::plain()).await;
    let cli = Cli { node: &node };
    cli.ok(&["stream", "create", "orders"]);
    let lines: String = (0..10_000).map(|n| format!("message {n}\n")).collect();
    cli.piped(&["pub", "orders", "--retry-for", "0s"], lines.as_bytes());
    assert!(cli.ok(&["sub", "orders", "--raw"]) == lines.as_bytes(), "all is stored");
    let address = node.client_addr();
    node.kill9().await;
    let out = Command::new(env!("CARGO_BIN_EXE_mainstem"))
        .args([
            "pub",
            "orders",
            "--retry-for",
            "0s",
            "--server",
            &address,
            "-f",
            "/dev/null",
        ])
        .output()
        .unwrap();
    assert!(!out.status.success(), "nobody is there");
}

#[tokio::test]
async fn contexts_name_servers() {
    let node = Node::start(Options::plain()).await;
    let cli = Cli { node: &node };
    let address = node.client_addr();
    let without = |args: &[&str]| cli.command(args).env_remove("MAINSTEM_SERVER").output().unwrap();
    assert!(
        without(&["context", "add", "here", "--server", &address])
            .status
            .success()
    );
    assert!(
        without(&["context", "add", "gone", "--server", "127.0.0.1:1"])
            .status
            .success()
    );
    assert!(without(&["info"]).status.success(), "the first one is used");
    assert_eq!(without(&["info", "--context", "gone"]).status.code(), Some(4));
    assert_eq!(without(&["--context", "gone", "info"]).status.code(), Some(4));
    assert!(
        without(&["info", "--context", "gone", "--server", &address])
            .status
            .success()
    );
    assert!(
        without(&["--server", &address, "info", "--context", "gone"])
            .status
            .success()
    );
    assert_eq!(without(&["info", "--context", "nothing"]).status.code(), Some(3));
    assert!(without(&["context", "use", "gone"]).status.success());
    assert_eq!(without(&["stream", "ls"]).status.code(), Some(4));
    // Of two addresses the one that answers serves.
    let both = format!("127.0.0.1:1,{address}");
    assert!(without(&["stream", "ls", "--server", &both]).status.success());
    assert!(Path::new(node.place()).join("mainstem/contexts/here.toml").exists());
}

#[tokio::test]
async fn benches_verify_what_they_measure() {
    let node = Node::start(Options::plain()).await;
    let cli = Cli { node: &node };
    for (args, halves) in [
        (
            vec![
                "bench",
                "pub",
                "--shards",
                "3",
                "--subjects",
                "50",
                "--publishers",
                "2",
                "--codec",
                "lz4",
            ],
            (true, false),
        ),
        (vec!["bench", "pub", "--sync", "--msg-ids", "-n", "20"], (true, false)),
        (vec!["bench", "sub", "--size", "1KiB"], (false, true)),
        (vec!["bench", "pubsub", "--size", "16"], (true, true)),
    ] {
        let mut args = args;
        if !args.contains(&"-n") {
            args.extend(["-n", "20k"]);
        }
        args.push("--json");
        let result = cli.json(&args);
        assert_eq!(result["verified"], true, "{args:?}");
        assert_eq!(
            (result["published"].is_object(), result["read"].is_object()),
            halves,
            "{args:?}"
        );
    }
    let left = cli.json(&["stream", "ls", "--format", "json"]);
    assert_eq!(left, serde_json::json!([]), "what was made for the bench is gone");
}

#[tokio::test]
async fn tls_by_flags_and_by_context() {
    let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, pem: String| {
        let path = dir.path().join(name);
        std::fs::write(&path, pem).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let sign = |name: &str| {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        let certificate = params.signed_by(&key, &ca).unwrap().pem();
        (
            write(&format!("{name}.pem"), certificate),
            write(&format!("{name}.key"), key.serialize_pem()),
        )
    };
    let ca_file = write("ca.pem", ca.pem());
    let (cert, key) = sign("localhost");
    let (own_cert, own_key) = sign("client");
    let options = Options::plain()
        .flag("--tls-cert", &cert)
        .flag("--tls-key", &key)
        .flag("--tls-client-ca", &ca_file)
        .flag("--tls-client-auth", "required");
    let node = Node::start(options).await;
    let cli = Cli { node: &node };
    let tls = ["--tls-ca", &ca_file, "--tls-server-name", "localhost"];
    let own = ["--tls-cert", &own_cert, "--tls-key", &own_key];
    cli.ok(&[&["stream", "create", "s"][..], &tls, &own].concat());
    cli.ok(&[&["pub", "s", "secret"][..], &tls, &own].concat());
    assert!(
        !cli.run(&[&["info"][..], &tls].concat()).status.success(),
        "no certificate"
    );
    assert!(!cli.run(&["info"]).status.success(), "no TLS");
    let address = node.client_addr();
    cli.ok(&[&["context", "add", "safe", "--server", &address][..], &tls, &own].concat());
    assert_eq!(cli.text(&["sub", "s", "--raw", "--context", "safe"]), "secret\n");
}
