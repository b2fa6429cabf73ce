//! `docs/reference/cli.md` says what the program says. `UPDATE=1 cargo test --test cli_reference` writes it.
#![allow(clippy::unwrap_used)]

use std::process::Command;

fn reference() -> String {
    let out = Command::new(env!("CARGO_BIN_EXE_mainstem"))
        .arg("help-markdown")
        .output()
        .unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn the_page_is_what_the_program_says() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/reference/cli.md");
    if std::env::var_os("UPDATE").is_some() {
        std::fs::write(page, reference()).unwrap();
    }
    let written = std::fs::read_to_string(page).unwrap_or_default();
    for (at, (written, said)) in (1..).zip(written.lines().zip(reference().lines())) {
        assert_eq!(
            written, said,
            "line {at}; `UPDATE=1 cargo test --test cli_reference` writes the page anew"
        );
    }
    assert_eq!(
        written.len(),
        reference().len(),
        "one of them goes on; UPDATE=1 writes the page anew"
    );
}

#[test]
fn every_shell_gets_its_completions() {
    for shell in ["bash", "zsh", "fish"] {
        let out = Command::new(env!("CARGO_BIN_EXE_mainstem"))
            .args(["completions", shell])
            .output()
            .unwrap();
        assert!(out.status.success());
        assert!(String::from_utf8(out.stdout).unwrap().contains("purge"), "{shell}");
    }
}

/// Every kind of bad call is refused as such, before anything is asked of a server.
#[test]
fn bad_calls_exit_with_2() {
    for line in [
        "stream",
        "stream create",
        "stream create x --max-age never",
        "stream create x --partition-by nothing",
        "stream edit x",
        "stream get x",
        "stream view x --count 0",
        "pub x --delimiter \\q",
        "pub x --codec gzip",
        "pub x y --header nothing",
        "sub x --from yesterday",
        "sub x --raw --jsonl",
        "bench pub --size 3",
        "bench pub --count 0",
        "context add ../x --server a:1",
        "info --server nowhere",
        "nonsense",
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_mainstem"))
            .args(line.split(' '))
            .env_remove("MAINSTEM_SERVER")
            .env_remove("MAINSTEM_CONTEXT")
            .env("XDG_CONFIG_HOME", env!("CARGO_TARGET_TMPDIR"))
            .output()
            .unwrap();
        assert_eq!(
            out.status.code(),
            Some(2),
            "{line}: {}",
            String::from_utf8_lossy(&out.stderr)
        );
        assert!(out.stdout.is_empty() && !out.stderr.is_empty(), "{line}");
    }
}

/// A port where nobody listens.
#[test]
fn nobody_there_exits_with_4_and_says_what_to_do() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    drop(listener);
    for line in [
        "info",
        "stream ls",
        "stream info x",
        "pub x y",
        "sub x",
        "bench sub --stream x",
    ] {
        let out = Command::new(env!("CARGO_BIN_EXE_mainstem"))
            .args(line.split(' '))
            .args(["--server", &address])
            .env_remove("MAINSTEM_CONTEXT")
            .env("XDG_CONFIG_HOME", env!("CARGO_TARGET_TMPDIR"))
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&out.stderr);
        assert_eq!(out.status.code(), Some(4), "{line}: {said}");
        assert!(
            said.contains(&address) && said.contains("mainstem dev"),
            "{line}: {said}"
        );
        assert!(said.contains("nothing was changed"), "{line}: {said}");
    }
}
