#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use clap::{Args, Command, FromArgMatches};

use super::*;

fn args(list: &[&str]) -> ServerArgs {
    let command = ServerArgs::augment_args(Command::new("server"));
    let matches = command
        .try_get_matches_from(std::iter::once(&"server").chain(list))
        .unwrap();
    ServerArgs::from_arg_matches(&matches).unwrap()
}

fn load(list: &[&str], env: &[(&str, &str)]) -> Result<Effective, ConfigError> {
    let env: BTreeMap<String, String> = env.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    Effective::load(&args(list), &|name| env.get(name).cloned(), &[])
}

fn file(dir: &Path, content: &str) -> String {
    let path = dir.join("mainstem.toml");
    std::fs::write(&path, content).unwrap();
    path.to_str().unwrap().to_owned()
}

fn origin(effective: &Effective, key: &str) -> String {
    let (section, field) = key.split_once('.').unwrap();
    effective.origin(table::find(section, field).unwrap()).to_string()
}

#[test]
fn flags_win_over_the_environment_which_wins_over_the_file_which_wins_over_defaults() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(
        dir.path(),
        "[node]\nname = \"from-file\"\n[listen]\nclient = \"127.0.0.1:1\"\nmonitor = \"127.0.0.1:2\"\n[limits]\nsessions_max = 7\n",
    );
    let effective = load(
        &["--config", &path, "--listen", "127.0.0.1:3"],
        &[
            ("MAINSTEM_LISTEN", "127.0.0.1:4"),
            ("MAINSTEM_MONITOR_LISTEN", "127.0.0.1:5"),
        ],
    )
    .unwrap();
    let config = &effective.config;
    assert_eq!(config.listen.client.port(), 3);
    assert_eq!(config.listen.monitor.port(), 5);
    assert_eq!(config.node.name, "from-file");
    assert_eq!(config.limits.sessions_max, 7);
    assert_eq!(config.raft.pool_groups, 4);
    assert_eq!(origin(&effective, "listen.client"), "flag --listen");
    assert_eq!(
        origin(&effective, "listen.monitor"),
        "environment MAINSTEM_MONITOR_LISTEN"
    );
    assert_eq!(origin(&effective, "node.name"), format!("{path}:2"));
    assert_eq!(origin(&effective, "limits.sessions_max"), format!("{path}:7"));
    assert_eq!(origin(&effective, "raft.pool_groups"), "default");
}

#[test]
fn a_command_s_presets_are_below_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "[log]\nlevel = \"debug\"\n");
    let preset = |section, field, text: &str| (table::find(section, field).unwrap(), text.to_owned(), "dev");
    let presets = [preset("log", "level", "warn"), preset("node", "data_dir", "./here")];
    let effective = Effective::load(&args(&["--config", &path]), &|_| None, &presets).unwrap();
    assert_eq!(effective.config.log.level, LogFilter("debug".into()));
    assert_eq!(effective.config.node.data_dir, Path::new("./here"));
    assert_eq!(origin(&effective, "node.data_dir"), "mainstem dev");
}

#[test]
fn the_config_file_may_come_from_the_environment() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "[cluster]\nname = \"west\"\n");
    assert_eq!(
        load(&[], &[("MAINSTEM_CONFIG", &path)]).unwrap().config.cluster.name,
        "west"
    );
    let error = load(&["--config", "/nowhere/x.toml"], &[]).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot read the configuration file /nowhere/x.toml:"),
        "{error}"
    );
}

#[test]
fn everything_wrong_is_told_at_once_each_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let path = file(dir.path(), "[node]\ndata_dirr = \"x\"\n");
    let error = load(
        &["--config", &path, "--listen", "nowhere"],
        &[("MAINSTEM_PUBLISH_MEMORY", "12 cows"), ("MAINSTEM_READ_MEMORY", "1MiB")],
    )
    .unwrap_err();
    let [file, publish, read, flag] = &error.0[..] else {
        panic!("{error}")
    };
    assert_eq!(
        *file,
        format!("{path}:2: unknown key \"data_dirr\" in [node]; did you mean \"data_dir\"?")
    );
    assert!(
        publish.starts_with("environment MAINSTEM_PUBLISH_MEMORY: limits.publish_memory: \"12 cows\""),
        "{publish}"
    );
    assert!(publish.contains("allowed: bytes"), "{publish}");
    assert_eq!(
        *read,
        "environment MAINSTEM_READ_MEMORY: limits.read_memory: \"1MiB\" is out of range; allowed: 16MiB to 3GiB"
    );
    assert!(
        flag.starts_with("flag --listen: listen.client: \"nowhere\" cannot be used here; allowed: an address"),
        "{flag}"
    );
}

#[test]
fn what_is_printed_gives_the_same_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let given: &[&[&str]] = &[
        &[],
        &["--data-dir", "/var/lib/main\"stem\\ü"],
        &[
            "--data-dir=d",
            "--insecure",
            "--listen=0.0.0.0:0",
            "--prometheus-listen-on=[::1]:9",
            "--ports-file=p",
            "--tls-cert=c",
            "--tls-key=k",
            "--tls-client-ca=a",
            "--tls-client-auth=required",
            "--publish-memory=100000000",
            "--drain-timeout=1m 30s",
            "--storage-garbage-ratio-max=1",
            "--log-level=info,mainstem::raft=debug",
            "--log-format=json",
        ],
    ];
    for list in given {
        let effective = load(list, &[]).unwrap();
        let printed = effective.print();
        let path = file(dir.path(), &printed);
        let again = load(&["--config", &path], &[]).unwrap();
        assert_eq!(again.config, effective.config, "{printed}");
        for setting in table::SETTINGS {
            assert!(printed.contains(setting.field), "{} is missing", setting.key());
        }
    }
}

#[test]
fn print_says_where_each_value_came_from() {
    let printed = load(&["--insecure"], &[("MAINSTEM_NAME", "n1")]).unwrap().print();
    for line in [
        "name = \"n1\" # environment MAINSTEM_NAME",
        "insecure = true # flag --insecure",
        "publish_memory = \"64MiB\" # default",
        "# prometheus is not set (default)",
        "pool_groups = 4 # default",
    ] {
        assert!(
            printed.lines().any(|found| found == line),
            "{line:?} is missing in\n{printed}"
        );
    }
}

#[test]
fn switches_can_be_given_bare_and_taken_back() {
    assert!(load(&["--insecure"], &[]).unwrap().config.listen.insecure);
    assert!(
        !load(&["--insecure=false"], &[("MAINSTEM_INSECURE", "true")])
            .unwrap()
            .config
            .listen
            .insecure
    );
    let with = &[("MAINSTEM_PROMETHEUS_LISTEN_ON", "127.0.0.1:9")];
    assert!(load(&[], with).unwrap().config.listen.prometheus.is_some());
    assert!(
        load(&["--prometheus-listen-on=none"], with)
            .unwrap()
            .config
            .listen
            .prometheus
            .is_none()
    );
}

#[test]
fn misspelt_variables_are_noted_and_strangers_left_alone() {
    let mut effective = load(&[], &[]).unwrap();
    let names = [
        "MAINSTEM_LISTNE",
        "MAINSTEM_CONTEXT",
        "MAINSTEM_LISTEN",
        "MAINSTEM_CONFIG",
        "HOME",
        "LISTNE",
    ];
    effective.note_misspelt(names.into_iter().map(str::to_owned));
    assert_eq!(
        effective.warnings,
        ["the environment variable MAINSTEM_LISTNE is not known; did you mean MAINSTEM_LISTEN?"]
    );
}

/// What [`Effective::check`] says, joined; empty: all is well.
fn check(list: &[&str]) -> String {
    let with_dir: Vec<&str> = ["--data-dir", "d"].iter().chain(list).copied().collect();
    load(&with_dir, &[])
        .unwrap()
        .check()
        .err()
        .map(|error| error.to_string())
        .unwrap_or_default()
}

#[test]
fn only_this_machine_is_served_without_tls() {
    for fine in [
        &[][..],
        &["--listen=127.0.0.1:0"],
        &["--listen=127.8.9.1:7411"],
        &["--listen=[::1]:7411"],
        &["--listen=[::ffff:127.0.0.1]:7411"],
        &["--listen=0.0.0.0:7411", "--insecure"],
        &["--listen=0.0.0.0:7411", "--tls-cert=c", "--tls-key=k"],
        &["--monitor-listen=0.0.0.0:7413", "--insecure"],
    ] {
        assert_eq!(check(fine), "", "{fine:?}");
    }
    for refused in [
        "0.0.0.0:7411",
        "10.0.0.1:7411",
        "[::]:7411",
        "[::ffff:10.0.0.1]:0",
        "[2001:db8::1]:7411",
    ] {
        let error = check(&["--listen", refused]);
        assert!(
            error.starts_with("listen.client is ") && error.contains("which others can reach"),
            "{error}"
        );
        assert!(error.contains("--tls-cert") && error.contains("--insecure"), "{error}");
    }
    // TLS is for the client listener alone.
    for flag in ["--monitor-listen=0.0.0.0:1", "--prometheus-listen-on=0.0.0.0:1"] {
        let error = check(&[flag, "--tls-cert=c", "--tls-key=k"]);
        assert!(error.contains("plain HTTP"), "{error}");
    }
}

#[test]
fn settings_that_contradict_each_other_are_refused() {
    let cases: &[(&[&str], &str)] = &[
        (&["--tls-cert=c"], "tls.key is not"),
        (&["--tls-key=k"], "tls.cert is not"),
        (&["--tls-client-ca=a"], "need TLS"),
        (&["--tls-client-auth=required"], "tls.client_ca is not set"),
        (
            &["--listen=127.0.0.1:5", "--monitor-listen=127.0.0.1:5"],
            "same address",
        ),
        (
            &["--storage-log-write-buffer=16MiB", "--storage-state-write-buffer=32MiB"],
            "smaller than storage.state_write_buffer",
        ),
        (&["--connection-window=1MiB"], "smaller than limits.stream_window"),
        (&["--name=a b"], "node.name"),
    ];
    for (list, part) in cases {
        let error = check(list);
        assert!(error.contains(part) && error.lines().count() == 1, "{list:?}: {error}");
    }
    assert_eq!(
        check(&["--listen=127.0.0.1:0", "--monitor-listen=127.0.0.1:0"]),
        "",
        "port 0 is any free one"
    );
    let error = load(&[], &[]).unwrap().check().unwrap_err().to_string();
    assert!(error.contains("--data-dir DIR, MAINSTEM_DATA_DIR"), "{error}");
}

#[test]
fn the_rate_of_snapshots_has_its_edges() {
    let refused = |rate: &str| check(&["--raft-snapshot-rate", rate]);
    assert_eq!(Config::default().raft.snapshot_rate, ByteSize::mib(128));
    for (rate, bytes) in [("0", 0), ("1MiB", 1 << 20), ("1TiB", 1 << 40)] {
        let loaded = load(&["--raft-snapshot-rate", rate], &[]).unwrap();
        assert_eq!(loaded.config.raft.snapshot_rate, ByteSize(bytes));
        assert_eq!(refused(rate), "", "{rate}");
    }
    assert!(refused("1048575").contains("at least 1MiB"));
    assert!(refused("1").contains("0 for as fast as it goes"));
    assert!(load(&["--raft-snapshot-rate", "2TiB"], &[]).is_err());
}
