//! The file `RENEWAL`: a node whose data is damaged begins anew as another one. It says which store is given up and which
//! one takes its place, so that a start that is cut short anywhere goes on where it was. It is written when the members of
//! the cluster have agreed, and not before. Nothing is deleted: what was there is set aside in a folder beside it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::cluster_file::ClusterHints;
use super::identity::{self, IDENTITY_FILE, Identity};
use super::lock::{DirLock, LOCK_FILE};
use crate::model::NodeId;

/// Name of the file.
pub(super) const RENEWAL_FILE: &str = "RENEWAL";
/// Name of the file that says which damage was found in what the directory holds.
const DAMAGED_FILE: &str = "DAMAGED";
/// What the folders begin with that hold what was set aside.
pub(super) const ASIDE: &str = "damaged-";

/// Which store takes the place of which.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Renewal {
    /// The new one.
    pub store_id: u128,
    pub former_store_id: u128,
    pub former_node: NodeId,
    pub cluster_id: String,
    /// Folder that the former data goes to, in the data directory.
    pub aside: String,
    /// Where peers of the former node were.
    pub peers: Vec<String>,
}

impl Renewal {
    /// The one that is under way in a data directory, if any.
    pub fn load(dir: &Path) -> io::Result<Option<Self>> {
        let text = match identity::read_text(dir, RENEWAL_FILE) {
            Ok(None) => return Ok(None),
            Ok(Some(text)) => text,
            Err(e) => return Err(io::Error::other(e.to_string())),
        };
        let bad = || {
            io::Error::other(format!(
                "{} is damaged: a node that begins anew has left it; remove the whole data directory and let the node join \
                 again",
                dir.join(RENEWAL_FILE).display()
            ))
        };
        let text = text.map_err(|_| bad())?;
        Self::parse(&text).ok_or_else(bad).map(Some)
    }

    /// What would take the place of what a data directory holds; nothing is changed. `None`: nobody else can have the data,
    /// as the directory is in no cluster with peers, or does not say in which.
    pub fn of(dir: &Path, now_s: u64) -> Option<Self> {
        let former = read_identity(dir)?;
        let (Some(cluster_id), Ok(Some(hints))) = (former.cluster_id, ClusterHints::load(dir)) else {
            return None;
        };
        let peers = hints.peers.iter().filter(|peer| peer.node != former.node_id);
        Some(Self {
            store_id: successor(former.store_id),
            former_store_id: former.store_id,
            former_node: former.node_id,
            cluster_id,
            aside: format!("{ASIDE}{now_s}"),
            peers: peers
                .map(|peer| peer.address.clone())
                .filter(|address| !address.is_empty())
                .collect(),
        })
    }

    /// There is no way back from here: the members have agreed. Blocks.
    pub fn begin(&self, dir: &Path) -> io::Result<()> {
        identity::write_atomically(dir, RENEWAL_FILE, &self.to_text())
    }

    /// Whether the directory still has what is given up, or a part of it.
    pub fn is_to_be_set_aside(&self, dir: &Path) -> bool {
        read_identity(dir).is_some_and(|identity| identity.store_id == self.former_store_id)
    }

    /// Moves everything out of the way. The identity goes last: until then this is done again. Blocks.
    pub fn set_aside(&self, dir: &Path) -> io::Result<PathBuf> {
        let _lock = DirLock::take(dir).map_err(|e| io::Error::other(e.to_string()))?;
        let aside = dir.join(&self.aside);
        fs::create_dir_all(&aside)?;
        for entry in fs::read_dir(dir)? {
            let name = entry?.file_name();
            let text = name.to_string_lossy();
            let stays = [LOCK_FILE, RENEWAL_FILE, IDENTITY_FILE, "lost+found"].contains(&&*text);
            if !stays && !text.starts_with(ASIDE) {
                fs::rename(dir.join(&name), aside.join(&name))?;
            }
        }
        identity::sync_dir(dir)?;
        identity::sync_dir(&aside)?;
        fs::rename(dir.join(IDENTITY_FILE), aside.join(IDENTITY_FILE))?;
        identity::sync_dir(dir)?;
        Ok(aside)
    }

    /// The new store is a member.
    pub fn finish(dir: &Path) -> io::Result<()> {
        match fs::remove_file(dir.join(RENEWAL_FILE)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            Ok(()) | Err(_) => identity::sync_dir(dir),
        }
    }

    fn to_text(&self) -> String {
        let mut text = format!(
            "mainstem-renewal 1\nstore {:032x}\nformer-store {:032x}\nformer-node {}\ncluster {}\naside {}\n",
            self.store_id,
            self.former_store_id,
            self.former_node.get(),
            self.cluster_id,
            self.aside
        );
        for peer in &self.peers {
            text.push_str(&format!("peer {peer}\n"));
        }
        identity::seal(text)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = identity::unseal(text).ok()?.lines();
        let mut next = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
        if next("mainstem-renewal")? != "1" {
            return None;
        }
        let hex = |text: &str| u128::from_str_radix(text, 16).ok();
        let (store, former) = (hex(next("store")?)?, hex(next("former-store")?)?);
        let node: u64 = next("former-node")?.parse().ok()?;
        let (cluster, aside) = (next("cluster")?.to_owned(), next("aside")?.to_owned());
        let peers: Option<Vec<String>> = lines.map(|line| Some(line.strip_prefix("peer ")?.to_owned())).collect();
        let is_plain = aside.starts_with(ASIDE) && !aside.contains(['/', '\\']);
        is_plain.then_some(Self {
            store_id: store,
            former_store_id: former,
            former_node: NodeId::new(node),
            cluster_id: cluster,
            aside,
            peers: peers?,
        })
    }
}

/// Notes in a data directory that damage was found while its node ran: the next start would not find it by itself. Goes
/// with what is set aside. Blocks.
pub fn note_damage(dir: &Path, what: &str) -> io::Result<()> {
    identity::write_atomically(dir, DAMAGED_FILE, what)
}

/// The damage that is noted in a data directory that nobody uses now.
pub fn noted_damage(dir: &Path) -> Option<String> {
    let what = fs::read(dir.join(DAMAGED_FILE)).ok()?;
    let _lock = DirLock::take(dir).ok()?;
    Some(String::from_utf8_lossy(&what).into_owned())
}

/// The store that follows a given up one: always the same, so that members that have let it in know it again when whoever
/// asked them did not hear it.
fn successor(store_id: u128) -> u128 {
    let digest = Sha256::new()
        .chain_update(b"mainstem renewal")
        .chain_update(store_id.to_be_bytes())
        .finalize();
    digest.iter().take(16).fold(0, |id, byte| id << 8 | u128::from(*byte))
}

fn read_identity(dir: &Path) -> Option<Identity> {
    let text = identity::read_text(dir, IDENTITY_FILE).ok()??.ok()?;
    Identity::parse(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ReplicaId;
    use crate::storage::{PeerHint, Store, StoreOptions};

    fn options(dir: &Path) -> StoreOptions {
        let mut options = StoreOptions::new(dir);
        options.min_free_bytes = 0;
        options
    }

    /// A data directory of a node of a cluster.
    fn member() -> (tempfile::TempDir, Identity) {
        let dir = tempfile::tempdir().expect("a directory");
        let store = Store::open(options(dir.path()), None).expect("a new store");
        let hints = ClusterHints {
            founder: false,
            meta_replica: ReplicaId::new(7),
            peers: vec![PeerHint {
                node: NodeId::new(9),
                address: "there:1".into(),
                meta_replica: None,
                seen: None,
            }],
        };
        hints.store(dir.path()).expect("hints");
        store.join_cluster("abc", NodeId::new(3)).expect("noted");
        let identity = store.identity();
        store.close().expect("closed");
        (dir, identity)
    }

    #[test]
    fn what_is_given_up_is_set_aside_and_the_new_store_is_the_one_that_was_named() {
        let (dir, former) = member();
        let dir = dir.path();
        let renewal = Renewal::of(dir, 5).expect("it is in a cluster");
        assert_eq!(Renewal::load(dir).expect("read"), None, "nothing is changed yet");
        assert_ne!(renewal.store_id, former.store_id);
        assert_eq!(
            (renewal.former_store_id, renewal.former_node),
            (former.store_id, former.node_id)
        );
        assert_eq!(
            (renewal.peers.as_slice(), renewal.aside.as_str()),
            (&["there:1".to_owned()][..], "damaged-5")
        );
        assert_eq!(Renewal::of(dir, 6).map(|again| again.store_id), Some(renewal.store_id));
        renewal.begin(dir).expect("written");
        assert_eq!(Renewal::load(dir).expect("read"), Some(renewal.clone()));
        assert!(renewal.is_to_be_set_aside(dir));
        // Cut short in the middle: the identity was still there.
        fs::create_dir_all(dir.join("damaged-5")).expect("a folder");
        fs::rename(dir.join("log"), dir.join("damaged-5/log")).expect("moved");
        assert!(renewal.is_to_be_set_aside(dir));
        let aside = renewal.set_aside(dir).expect("set aside");
        assert!(!renewal.is_to_be_set_aside(dir));
        assert_eq!(read_identity(&aside), Some(former));
        assert!(aside.join("log").is_dir() && aside.join("state").is_dir());
        let store = Store::open(options(dir), None).expect("a new store");
        assert_eq!(store.identity().store_id, renewal.store_id);
        assert_eq!(store.identity().cluster_id, None);
        store.close().expect("closed");
        drop(store);
        Renewal::finish(dir).expect("removed");
        assert_eq!(Renewal::load(dir).expect("read"), None);
        let again = Store::open(options(dir), None).expect("opens");
        assert_eq!(again.identity().store_id, renewal.store_id);
    }

    #[test]
    fn without_a_cluster_nobody_else_has_the_data() {
        let dir = tempfile::tempdir().expect("a directory");
        Store::open(options(dir.path()), None)
            .expect("a new store")
            .close()
            .expect("closed");
        assert_eq!(Renewal::of(dir.path(), 5), None);
    }

    #[test]
    fn a_damaged_file_is_told() {
        let (dir, _) = member();
        let renewal = Renewal::of(dir.path(), 5).expect("it is in a cluster");
        renewal.begin(dir.path()).expect("written");
        let path = dir.path().join(RENEWAL_FILE);
        let text = fs::read_to_string(&path)
            .expect("text")
            .replace("damaged-5", "../../../x");
        fs::write(&path, text).expect("written");
        let error = Renewal::load(dir.path()).expect_err("its CRC is wrong");
        assert!(error.to_string().contains("is damaged"), "{error}");
    }
}
