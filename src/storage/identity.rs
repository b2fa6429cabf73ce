//! Who owns a data directory: two small text files, `FORMAT` and `IDENTITY`, each with a CRC on its last line.
//!
//! `FORMAT` tells the version of everything beside it and is looked at first. `IDENTITY` is written last when a
//! directory is made: a directory without it never acknowledged anything.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use super::error::OpenError;
use crate::model::NodeId;

/// The version of the directory as a whole.
pub const FORMAT_VERSION: u32 = 1;
/// Name of the version file.
pub const FORMAT_FILE: &str = "FORMAT";
/// Name of the identity file.
pub const IDENTITY_FILE: &str = "IDENTITY";

/// Which store this is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Random, made with the directory: tells an emptied disk from the one before.
    pub store_id: u128,
    /// Known once the node has founded or joined a cluster.
    pub cluster_id: Option<String>,
    pub node_id: NodeId,
    /// Raised and synced at each open, by this store only: tells an older copy of a disk.
    pub incarnation: u64,
    /// A random number for each open, this one's last: tells an older copy that was opened as often since. At most
    /// [`STARTS_MAX`].
    pub starts: Vec<u64>,
}

/// Opens that are remembered one by one.
pub const STARTS_MAX: usize = 64;

/// Why a file could not be understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TextFault {
    /// Damaged, or not ours.
    Bad(String),
    /// Of a later version.
    Newer(u32),
}

/// The text of `FORMAT`.
pub fn format_text() -> String {
    seal(format!("mainstem-data {FORMAT_VERSION}\n"))
}

/// Reads `FORMAT`.
pub fn parse_format(text: &str) -> Result<u32, TextFault> {
    let body = unseal(text)?;
    let version = body
        .strip_prefix("mainstem-data ")
        .and_then(|v| v.trim_end().parse::<u32>().ok())
        .ok_or_else(|| TextFault::Bad("it does not name a data format".into()))?;
    if version > FORMAT_VERSION {
        return Err(TextFault::Newer(version));
    }
    Ok(version)
}

impl Identity {
    /// The text of `IDENTITY`.
    pub fn to_text(&self) -> String {
        let mut text = format!(
            "mainstem-identity 1\nstore {:032x}\ncluster {}\nnode {}\nincarnation {}\n",
            self.store_id,
            self.cluster_id.as_deref().unwrap_or("-"),
            self.node_id.get(),
            self.incarnation
        );
        if !self.starts.is_empty() {
            let starts: Vec<String> = self.starts.iter().map(|start| format!("{start:016x}")).collect();
            text.push_str(&format!("starts {}\n", starts.join(" ")));
        }
        seal(text)
    }

    /// The store is opened once more, under this number.
    pub fn open_again(&mut self, start: u64) {
        self.incarnation += 1;
        self.starts.push(start);
        let over = self.starts.len().saturating_sub(STARTS_MAX);
        self.starts.drain(..over);
    }

    /// Reads `IDENTITY`.
    pub fn parse(text: &str) -> Result<Identity, TextFault> {
        let body = unseal(text)?;
        let bad = || TextFault::Bad("its lines are not those of an identity".into());
        let mut lines = body.lines();
        let mut next = |name: &str| -> Result<&str, TextFault> {
            lines
                .next()
                .and_then(|l| l.strip_prefix(name))
                .and_then(|l| l.strip_prefix(' '))
                .ok_or_else(bad)
        };
        let version: u32 = next("mainstem-identity")?.parse().map_err(|_| bad())?;
        if version > 1 {
            return Err(TextFault::Newer(version));
        }
        let store_id = u128::from_str_radix(next("store")?, 16).map_err(|_| bad())?;
        let cluster = next("cluster")?;
        let node: u64 = next("node")?.parse().map_err(|_| bad())?;
        let incarnation = next("incarnation")?.parse().map_err(|_| bad())?;
        // Absent from what was written before there were any.
        let starts = match lines.next() {
            None => Vec::new(),
            Some(line) => {
                let all = line.strip_prefix("starts ").ok_or_else(bad)?;
                let all: Result<Vec<u64>, _> = all.split(' ').map(|start| u64::from_str_radix(start, 16)).collect();
                all.map_err(|_| bad())?
            }
        };
        Ok(Identity {
            store_id,
            cluster_id: (cluster != "-").then(|| cluster.to_string()),
            node_id: NodeId::new(node),
            incarnation,
            starts,
        })
    }
}

/// Appends a line with the CRC of what is before it.
pub fn seal(mut body: String) -> String {
    let crc = crc32fast::hash(body.as_bytes());
    body.push_str(&format!("crc {crc:08x}\n"));
    body
}

/// Checks and takes off the line that [`seal`] appended.
pub fn unseal(text: &str) -> Result<&str, TextFault> {
    let cut = text
        .strip_suffix('\n')
        .and_then(|t| t.rfind('\n'))
        .ok_or_else(|| TextFault::Bad("it is cut short".into()))?;
    let (body, crc) = text.split_at(cut + 1);
    if crc != format!("crc {:08x}\n", crc32fast::hash(body.as_bytes())) {
        return Err(TextFault::Bad("its CRC does not match".into()));
    }
    Ok(body)
}

/// Writes a small file so that after a crash either the old or the new content is there, whole.
pub fn write_atomically(dir: &Path, name: &str, text: &str) -> std::io::Result<()> {
    let tmp = dir.join(format!("{name}.tmp"));
    let mut file = File::create(&tmp)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    drop(file);
    fs::rename(&tmp, dir.join(name))?;
    sync_dir(dir)
}

/// Makes the names in a directory durable.
pub fn sync_dir(dir: &Path) -> std::io::Result<()> {
    File::open(dir)?.sync_all()
}

/// Reads a small text file; `None` if it is not there. Bytes that are not text come back as damage.
pub fn read_text(dir: &Path, name: &str) -> Result<Option<Result<String, TextFault>>, OpenError> {
    match fs::read(dir.join(name)) {
        Ok(bytes) => Ok(Some(
            String::from_utf8(bytes).map_err(|_| TextFault::Bad("it is not text".into())),
        )),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(OpenError::Io {
            dir: dir.to_path_buf(),
            what: "reading the identity",
            detail: e.to_string(),
        }),
    }
}
