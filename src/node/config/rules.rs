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
    windows(config, &mut wrong);
    storage(config, &mut wrong);
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
