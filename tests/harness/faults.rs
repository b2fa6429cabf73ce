//! The preload library: where it is, and how a running server is told what to suffer.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

/// The library as it is now, built if need be. `MAINSTEM_FAULTS_LIB` names another.
pub fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        if let Some(path) = std::env::var_os("MAINSTEM_FAULTS_LIB") {
            return path.into();
        }
        let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
        let built = Command::new(cargo)
            .args(["build", "--quiet", "--release", "-p", "mainstem-faults"])
            .status()
            .expect("cargo can be run");
        assert!(built.success(), "the preload library does not build");
        Path::new(env!("CARGO_BIN_EXE_mainstem")).with_file_name("libmainstem_faults.so")
    })
}

/// A line to the control socket of a server under the library (`tests/faults/src/lib.rs` lists them), and its answer.
/// `None`: the server died before it answered.
pub fn command(socket: &Path, line: &str) -> Option<Result<String, String>> {
    // The process may have been started just now: the library listens before anything else happens in it.
    let begun = Instant::now();
    let mut stream = loop {
        match UnixStream::connect(socket) {
            Ok(stream) => break stream,
            Err(_) if begun.elapsed() > Duration::from_secs(5) => return None,
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    writeln!(stream, "{line}").ok()?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).ok()?;
    let answer = answer.trim_end();
    match answer.split_once(' ').unwrap_or((answer, "")) {
        ("ok", text) => Some(Ok(text.to_string())),
        ("error", text) => Some(Err(text.to_string())),
        _ => None,
    }
}
