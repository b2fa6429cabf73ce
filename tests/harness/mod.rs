//! Real `mainstem` processes for tests: started on ports of their own in directories of their own, killed, paused,
//! robbed of power and started again; spoken to by the generated gRPC code alone, so that nothing of the product
//! checks itself; and a history that says what must be found afterwards.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

pub mod api;
pub mod batch;
pub mod cli;
pub mod cluster;
pub mod crowd;
pub mod damage;
pub mod faults;
pub mod history;
pub mod load;
pub mod messages;
pub mod net;
pub mod node;

pub use api::{Api, Failure};
pub use cli::cli;
pub use cluster::Cluster;
pub use crowd::Crowd;
pub use history::History;
pub use load::{Load, Producer, Unary};
pub use node::{Node, Options};

use std::path::{Path, PathBuf};
use std::time::Duration;

/// How long anything may take before a test gives up. Generous: the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A number from the environment, or the default.
pub fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

/// The seed of a random test: `SEED`, or the time. Printed, so that a failure can be run again.
pub fn seed(test: &str) -> u64 {
    let now = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .unwrap();
    let seed = setting("SEED", now.as_micros() as u64 % 1_000_000_000);
    println!("{test}: SEED={seed}");
    seed
}

/// Waits until a condition holds; says what did not happen if it never does.
pub async fn until(what: &str, mut condition: impl AsyncFnMut() -> bool) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition().await {
        assert!(
            tokio::time::Instant::now() < deadline,
            "waited {PATIENCE:?} in vain: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Every regular file below a directory, sorted.
pub fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut todo = vec![dir.to_path_buf()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).unwrap().flatten() {
            let path = entry.path();
            if entry.file_type().unwrap().is_dir() {
                todo.push(path);
            } else {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// A copy of a directory, so that it can be damaged.
pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().flatten() {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_dir(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}
