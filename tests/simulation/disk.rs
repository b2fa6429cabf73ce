//! The disk: real files of a real store, of which a crash takes what was not synced.
//!
//! A write of the committer is synced on the simulation's thread, where [`host`](super::host) sees which bytes of which
//! file the sync covers. A power failure cuts the write-ahead log anywhere behind these, and gives the witness's slots,
//! which are never synced while the store runs, as they were some writes ago. `state/` has no write-ahead log: what no
//! flush has written is gone with the process. A write that was under way may be on disk in full, in part, or not at all.

use std::path::{Path, PathBuf};

use mainstem::storage::Store;

use super::host;
use super::rng::Rng;

/// One slot of the witness from the other.
const STRIDE: usize = 4096;
/// Versions of the witness that a power failure may bring back, beside the synced one.
const VERSIONS_MAX: usize = 8;

/// What of a node is on disk.
pub struct Disk {
    dir: PathBuf,
    /// The witness after each of the last writes.
    versions: Vec<Vec<u8>>,
}

/// How much was on disk at some moment.
pub struct Mark {
    wal: PathBuf,
    len: u64,
    synced: u64,
    witness: Vec<u8>,
}

impl Disk {
    pub fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            versions: Vec::new(),
        }
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn witness_file(&self) -> PathBuf {
        self.dir.join("witness")
    }

    fn witness(&self) -> Vec<u8> {
        std::fs::read(self.witness_file()).expect("a store has a witness")
    }

    /// The log that is being written.
    fn wal(&self) -> PathBuf {
        let files = std::fs::read_dir(self.dir.join("log")).expect("a store has a log");
        let paths = files.map(|f| f.expect("the folder can be read").path());
        paths
            .filter(|p| p.extension().is_some_and(|e| e == "log"))
            .max()
            .expect("log/ has a write-ahead log")
    }

    /// The store was opened: everything there is, is on disk.
    pub fn opened(&mut self) {
        self.versions.clear();
        let wal = self.wal();
        let len = len(&wal);
        host::note_synced(&wal, host::Synced { len, content: None });
        let content = Some(self.witness());
        host::note_synced(&self.witness_file(), host::Synced { len: 0, content });
    }

    /// Lets the committer write what waits.
    pub fn commit(&mut self, store: &Store) {
        store.commit_waiting();
        self.versions.push(self.witness());
        if self.versions.len() > VERSIONS_MAX {
            self.versions.remove(0);
        }
    }

    /// Before the write that a crash meets half way.
    pub fn mark(&self) -> Mark {
        let wal = self.wal();
        Mark {
            len: len(&wal),
            synced: host::synced(&wal).len,
            wal,
            witness: self.witness(),
        }
    }

    /// The store is closed. The write since the mark, if any, ends anywhere; after a power failure so does what was not
    /// synced before.
    pub fn crash(&mut self, mark: &Mark, power: bool, rng: &mut Rng) -> String {
        let now = len(&mark.wal);
        let from = match power {
            true => mark.synced.min(mark.len),
            false => mark.len,
        };
        let keep = match rng.range(0, 4) {
            0 => from,
            1 => now,
            _ => rng.range(from, now + 1),
        };
        if keep < now {
            let file = std::fs::OpenOptions::new()
                .write(true)
                .open(&mark.wal)
                .expect("the log is there");
            file.set_len(keep).expect("the log can be cut");
        }
        let mut witness = mark.witness.clone();
        if power {
            let synced = host::synced(&self.witness_file()).content.unwrap_or_default();
            self.versions.push(synced);
            for slot in 0..witness.len().div_ceil(STRIDE) {
                let version = rng.pick(&self.versions);
                let part = slot * STRIDE..witness.len().min((slot + 1) * STRIDE);
                if version.len() == witness.len() && rng.one_in(2) {
                    witness[part.clone()].copy_from_slice(&version[part]);
                }
            }
        }
        host::overwrite(&self.witness_file(), &witness).expect("the witness can be written");
        format!("{keep} of {now} bytes of the log, {} synced", mark.synced)
    }
}

fn len(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |m| m.len())
}
