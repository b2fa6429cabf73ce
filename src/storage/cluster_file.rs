//! The file `cluster`: what a node must know of its cluster before it can hear of it: its own replica of the meta group,
//! and where other nodes were. Hints only, but for the replica: what is true is in the meta group.

use std::path::{Path, PathBuf};

use super::identity::{self, TextFault};
use crate::model::{NodeId, ReplicaId};

const NAME: &str = "cluster";

/// What was seen of another node's store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeenStore {
    pub store_id: u128,
    /// The highest seen.
    pub incarnation: u64,
    /// The random number of that start; 0: not known.
    pub start: u64,
}

/// Another node, or this one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerHint {
    pub node: NodeId,
    /// `HOST:PORT` of its peer listener; empty: not known.
    pub address: String,
    /// Its replica of the meta group.
    pub meta_replica: Option<ReplicaId>,
    /// What was seen of it.
    pub seen: Option<SeenStore>,
}

/// What the file holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClusterHints {
    /// This node has founded the cluster: its meta group begins here.
    pub founder: bool,
    pub meta_replica: ReplicaId,
    /// Ascending by node.
    pub peers: Vec<PeerHint>,
}

/// Why the file cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {what}", file.display())]
pub struct HintsError {
    pub file: PathBuf,
    pub what: String,
}

impl ClusterHints {
    /// The file of a data directory; `None` if there is none: the node was never told of others.
    pub fn load(dir: &Path) -> Result<Option<Self>, HintsError> {
        let error = |what: String| HintsError {
            file: dir.join(NAME),
            what,
        };
        let read = identity::read_text(dir, NAME).map_err(|e| error(e.to_string()))?;
        let Some(text) = read else { return Ok(None) };
        let parsed = text.and_then(|text| Self::parse(&text));
        parsed.map(Some).map_err(|fault| match fault {
            TextFault::Bad(why) => error(format!("it is damaged: {why}")),
            TextFault::Newer(version) => {
                error(format!("it is of a later version ({version}); install a newer version"))
            }
        })
    }

    /// Writes the file: after a crash the old or the new one is there, whole. Blocks.
    pub fn store(&self, dir: &Path) -> std::io::Result<()> {
        identity::write_atomically(dir, NAME, &self.to_text())
    }

    fn to_text(&self) -> String {
        let mut text = format!(
            "mainstem-cluster 1\nfounder {}\nmeta {}\n",
            u8::from(self.founder),
            self.meta_replica.get()
        );
        for peer in &self.peers {
            let (store, incarnation, start) = peer
                .seen
                .map_or((0, 0, 0), |seen| (seen.store_id, seen.incarnation, seen.start));
            let address = if peer.address.is_empty() { "-" } else { &peer.address };
            text.push_str(&format!(
                "peer {} {} {store:032x} {incarnation} {address} {start:016x}\n",
                peer.node.get(),
                peer.meta_replica.map_or(0, ReplicaId::get),
            ));
        }
        identity::seal(text)
    }

    fn parse(text: &str) -> Result<Self, TextFault> {
        let body = identity::unseal(text)?;
        let bad = || TextFault::Bad("its lines are not those of such a file".into());
        let mut lines = body.lines();
        let mut next = |name: &str| {
            let line = lines.next().and_then(|line| line.strip_prefix(name));
            line.and_then(|line| line.strip_prefix(' ')).ok_or_else(bad)
        };
        let version: u32 = next("mainstem-cluster")?.parse().map_err(|_| bad())?;
        if version > 1 {
            return Err(TextFault::Newer(version));
        }
        let founder = next("founder")? == "1";
        let meta_replica = ReplicaId::new(next("meta")?.parse().map_err(|_| bad())?);
        let peer = |line: &str| {
            let mut words = line.strip_prefix("peer ")?.split(' ');
            let mut number = || words.next()?.parse::<u64>().ok();
            let (node, meta) = (NodeId::new(number()?), number()?);
            let store = u128::from_str_radix(words.next()?, 16).ok()?;
            let incarnation = words.next()?.parse().ok()?;
            let address = words.next().filter(|address| *address != "-").unwrap_or_default();
            // Absent from what was written before it was remembered.
            let start = words
                .next()
                .map_or(Some(0), |start| u64::from_str_radix(start, 16).ok())?;
            Some(PeerHint {
                node,
                address: address.to_owned(),
                meta_replica: (meta != 0).then(|| ReplicaId::new(meta)),
                seen: (store != 0).then_some(SeenStore {
                    store_id: store,
                    incarnation,
                    start,
                }),
            })
        };
        let peers: Option<Vec<PeerHint>> = lines.map(peer).collect();
        Ok(Self {
            founder,
            meta_replica,
            peers: peers.ok_or_else(bad)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_damage_is_seen() {
        let dir = tempfile::tempdir().expect("a directory");
        assert_eq!(ClusterHints::load(dir.path()), Ok(None));
        let hints = ClusterHints {
            founder: true,
            meta_replica: ReplicaId::new(7),
            peers: vec![
                PeerHint {
                    node: NodeId::new(1),
                    address: "a.example:7412".into(),
                    meta_replica: Some(ReplicaId::new(7)),
                    seen: Some(SeenStore {
                        store_id: u128::MAX,
                        incarnation: 3,
                        start: u64::MAX - 7,
                    }),
                },
                PeerHint {
                    node: NodeId::new(2),
                    address: String::new(),
                    meta_replica: None,
                    seen: None,
                },
            ],
        };
        hints.store(dir.path()).expect("written");
        assert_eq!(ClusterHints::load(dir.path()), Ok(Some(hints)));
        let file = dir.path().join(NAME);
        let text = std::fs::read_to_string(&file).expect("there");
        std::fs::write(&file, text.replace("7412", "7413")).expect("written");
        let error = ClusterHints::load(dir.path()).expect_err("damaged");
        assert!(error.to_string().contains("damaged"), "{error}");
    }
}
