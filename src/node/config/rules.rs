//! Rules over several settings.

use std::net::SocketAddr;

use super::Config;

/// Everything that is wrong, a sentence each, with what to do.
pub fn check(config: &Config) -> Vec<String> {
    let mut wrong = Vec::new();
    if config.node.data_dir.as_os_str().is_empty() {
        wrong.push(
            "node.data_dir is not set: say where the data is with --data-dir DIR, MAINSTEM_DATA_DIR or data_dir in [node]"
                .into(),
        );
    }
    tls(config, &mut wrong);
    listeners(config, &mut wrong);
    names(config, &mut wrong);
    cluster(config, &mut wrong);
    windows(config, &mut wrong);
    storage(config, &mut wrong);
    raft(config, &mut wrong);
    wrong
}

fn tls(config: &Config, wrong: &mut Vec<String>) {
    let tls = &config.tls;
    match (&tls.cert, &tls.key) {
        (Some(_), None) => wrong.push("tls.cert is set but tls.key is not: TLS needs both".into()),
        (None, Some(_)) => wrong.push("tls.key is set but tls.cert is not: TLS needs both".into()),
        (None, None) if tls.client_ca.is_some() => {
            wrong.push("tls.client_ca is set but tls.cert and tls.key are not: client certificates need TLS".into());
        }
        (None, None) | (Some(_), Some(_)) => {}
    }
    if tls.client_ca.is_none() && tls.client_auth == super::ClientAuth::Required {
        wrong.push(
            "tls.client_auth is \"required\" but tls.client_ca is not set: say which authority signs client certificates"
                .into(),
        );
    }
}

fn listeners(config: &Config, wrong: &mut Vec<String>) {
    let listen = &config.listen;
    let has_tls = config.tls.cert.is_some();
    if !listen.insecure && !has_tls && !is_private(listen.client) {
        wrong.push(format!(
            "listen.client is {}, which others can reach, and TLS is not configured: give --tls-cert and --tls-key, or \
             listen on 127.0.0.1, or allow it with --insecure",
            listen.client
        ));
    }
    let plain = [
        ("listen.monitor", Some(listen.monitor)),
        ("listen.prometheus", listen.prometheus),
    ];
    for (key, address) in plain {
        let Some(address) = address.filter(|address| !is_private(*address)) else {
            continue;
        };
        if !listen.insecure {
            wrong.push(format!(
                "{key} is {address}, which others can reach, and it serves plain HTTP (TLS is for the client listener): \
                 listen on 127.0.0.1, or allow it with --insecure"
            ));
        }
    }
    let all = [
        ("listen.client", Some(listen.client)),
        ("listen.monitor", Some(listen.monitor)),
        ("listen.prometheus", listen.prometheus),
        ("listen.peer", listen.peer),
    ];
    for (index, (key, address)) in all.iter().enumerate() {
        for (other, taken) in &all[..index] {
            if address.is_some() && address == taken && address.is_some_and(|address| address.port() != 0) {
                wrong.push(format!(
                    "{key} and {other} are the same address: each listener needs its own"
                ));
            }
        }
    }
}

/// What concerns the other nodes.
fn cluster(config: &Config, wrong: &mut Vec<String>) {
    let (cluster, listen, tls) = (&config.cluster, &config.listen, &config.tls);
    if tls.peer_ca.is_some() && tls.cert.is_none() {
        wrong.push("tls.peer_ca is set but tls.cert and tls.key are not: nodes show each other a certificate".into());
    }
    if cluster.bootstrap && cluster.join.is_some() {
        wrong.push(
            "cluster.bootstrap and cluster.join are both set: the first node of a cluster founds it with --bootstrap, \
             every other one joins it with --join"
                .into(),
        );
    }
    for (key, told) in [
        ("listen.advertise_client", &listen.advertise_client),
        ("listen.advertise_peer", &listen.advertise_peer),
    ] {
        if told.as_ref().is_some_and(|told| told.0.len() != 1) {
            wrong.push(format!("{key} names several addresses; allowed: one HOST:PORT"));
        }
    }
    timings(config, wrong);
    let Some(peer) = listen.peer else {
        for (key, set) in [
            ("cluster.bootstrap", cluster.bootstrap),
            ("cluster.join", cluster.join.is_some()),
            ("listen.advertise_peer", listen.advertise_peer.is_some()),
        ] {
            if set {
                wrong.push(format!(
                    "{key} is set but listen.peer is not: say where the other nodes reach this one with --peer-listen ADDR"
                ));
            }
        }
        return;
    };
    if !is_private(peer) && tls.peer_ca.is_none() && !listen.insecure {
        wrong.push(format!(
            "listen.peer is {peer}, which others can reach, and TLS between nodes is not configured: give --tls-cert, \
             --tls-key and --tls-peer-ca, or listen on 127.0.0.1, or allow it with --insecure"
        ));
    }
    if cluster.token_file.is_none() {
        let far = |address: &&String| {
            let host = address.rsplit_once(':').map_or("", |(host, _)| host);
            !(host == "localhost" || address.parse().is_ok_and(is_private))
        };
        let others = cluster.join.iter().flat_map(|join| &join.0);
        let far_away = others
            .chain(listen.advertise_peer.iter().flat_map(|told| &told.0))
            .find(far);
        if !is_private(peer) || far_away.is_some() {
            wrong.push(
                "cluster.token_file is not set: nodes that others can reach prove to each other that they hold the \
                 cluster's token; write the same secret to a file on every node and give it with --token-file (only \
                 nodes that all listen on 127.0.0.1 may go without)"
                    .into(),
            );
        }
    }
    if peer.ip().is_unspecified() && listen.advertise_peer.is_none() {
        wrong.push(format!(
            "listen.peer is {peer}, which is no address that others can connect to: say where they find this node with \
             --advertise-peer HOST:PORT"
        ));
    }
    if listen.client.ip().is_unspecified() && listen.advertise_client.is_none() {
        wrong.push(format!(
            "listen.client is {}, which is no address that others can connect to: in a cluster, say where clients find \
             this node with --advertise-client HOST:PORT",
            listen.client
        ));
    }
}

fn timings(config: &Config, wrong: &mut Vec<String>) {
    let raft = &config.raft;
    if raft.election_min <= raft.heartbeat || raft.election_max <= raft.election_min {
        wrong.push(format!(
            "raft.heartbeat, raft.election_min and raft.election_max are {:?}, {:?} and {:?}; allowed: each longer than \
             the one before, best by half or more",
            raft.heartbeat, raft.election_min, raft.election_max
        ));
    }
}

/// Whether only this machine can reach the address.
pub fn is_private(address: SocketAddr) -> bool {
    match address {
        SocketAddr::V4(v4) => v4.ip().is_loopback(),
        SocketAddr::V6(v6) => v6.ip().is_loopback() || v6.ip().to_ipv4_mapped().is_some_and(|v4| v4.is_loopback()),
    }
}

fn names(config: &Config, wrong: &mut Vec<String>) {
    for (key, name) in [("node.name", &config.node.name), ("cluster.name", &config.cluster.name)] {
        if name.len() > 63 || name.chars().any(|c| c.is_control() || c.is_whitespace()) {
            wrong.push(format!(
                "{key} is {name:?}; allowed: 1 to 63 bytes without spaces or control characters"
            ));
        }
    }
}

fn windows(config: &Config, wrong: &mut Vec<String>) {
    let limits = &config.limits;
    if limits.connection_window < limits.stream_window {
        wrong.push("limits.connection_window is smaller than limits.stream_window; allowed: at least as large".into());
    }
}

/// A piece of a snapshot has up to 2 MiB: a slower one looks as if it had stopped.
const SNAPSHOT_RATE_MIN: u64 = 1 << 20;

fn raft(config: &Config, wrong: &mut Vec<String>) {
    let rate = config.raft.snapshot_rate.0;
    if rate > 0 && rate < SNAPSHOT_RATE_MIN {
        wrong.push(format!(
            "raft.snapshot_rate is {rate} bytes a second: a replica would hardly ever be rebuilt; give at least 1MiB, or 0 \
             for as fast as it goes"
        ));
    }
}

fn storage(config: &Config, wrong: &mut Vec<String>) {
    let storage = &config.storage;
    if storage.log_write_buffer < storage.state_write_buffer {
        wrong.push(
            "storage.log_write_buffer is smaller than storage.state_write_buffer: then every entry is written to disk \
             twice; allowed: at least as large, best four times"
                .into(),
        );
    }
    if storage.blob_file < storage.min_blob {
        wrong.push("storage.blob_file is smaller than storage.min_blob; allowed: at least as large".into());
    }
}
