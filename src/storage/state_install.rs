//! The switch from the state that a group has to the one that was received for it (`state_stage.rs`). Quick, because the
//! engine takes the files over as they are, and batches that both states have stay where they are:
//!
//! 1. if anything stays, `state/` is flushed, so that no crash can take it back (sealed shards stay as well, 0048);
//! 2. `INSTALL` is written beside the files and synced: from here on the switch will be finished, now or at the next
//!    start; whatever else the group had is void;
//! 3. what the group had, but for what stays, is removed, and that is flushed;
//! 4. the engine takes links to the files over;
//! 5. the floors and the applied marker are written and flushed, and `INSTALL` and the files go.
//!
//! Each step can be done again. Nobody reads or applies the group's state meanwhile.
//!
//! Why batches may stay: they were compared whole, and are never changed once they are written. Entries that were
//! applied since can only have added batches behind, which the sender has as well, or raised a floor, which the sender's
//! is at least as high as. What applies could change, the index, is copied when it is compared.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use rocksdb::IngestExternalFileOptions;

use super::error::{Area, StorageError};
use super::floors::Floors;
use super::identity;
use super::keys::KeyRange;
use super::staged_file::{hex, unhex};
use super::state::StateDb;
use super::state_export::ExportedShards;
use super::state_pieces::{Family, Place, Stretch};
use super::state_stage::{INSTALL_FILE, StagedGroup, remove_dir};
use crate::machine::port::ShardSink as _;
use crate::model::{GroupId, LogIndex, Sequence, ShardId};

/// What `INSTALL` says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Manifest {
    group: GroupId,
    applied: LogIndex,
    marker: Vec<u8>,
    shards: ExportedShards,
    files: Vec<(Family, String)>,
    /// Batches that stay, and what was applied when that was decided: `state/` must not be older. Ascending.
    kept: Vec<KeyRange>,
    base: Option<LogIndex>,
    /// Shards that stay whole.
    sealed: BTreeSet<ShardId>,
}

impl StateDb {
    /// Puts a received group in the place of what there is of it, with the applied marker. Durable when it returns. Shards of
    /// `sealed` that are not received stay as they are: their next group adopts them from here. The caller sees to it that nobody reads or applies the group meanwhile. Blocks, but not for long.
    ///
    /// An error has stopped the store: the next start finishes what was begun.
    pub fn install_group(
        &self,
        staged: StagedGroup,
        sealed: &BTreeSet<ShardId>,
        applied: LogIndex,
        marker: &[u8],
    ) -> Result<(), StorageError> {
        self.0.shared.check()?;
        let base = self.0.applied.lock().get(&staged.place.group).copied();
        let manifest = Manifest::of(&staged, sealed, applied, marker, base);
        if manifest.keeps() {
            self.still_owns(&staged)?;
            self.flush()?;
        }
        let dir = &staged.place.dir;
        let poison = |what, e: &dyn std::fmt::Display| StorageError::from(self.0.shared.poison(what, e));
        identity::write_atomically(dir, INSTALL_FILE, &manifest.to_text())
            .and_then(|()| identity::sync_dir(&self.incoming()))
            .map_err(|e| poison("preparing to install a group", &e))?;
        self.finish_install(dir, &manifest)
    }

    /// Batches stay only in shards that were the group's own all the while.
    fn still_owns(&self, staged: &StagedGroup) -> Result<(), StorageError> {
        let mut needed: BTreeSet<ShardId> = staged.kept_of.clone();
        for (shard, owner, _) in self.shards()? {
            if owner == staged.place.group {
                needed.remove(&shard);
            }
        }
        match needed.first() {
            None => Ok(()),
            Some(shard) => Err(StorageError::Engine {
                what: "installing a group",
                detail: format!("{shard} left the group after a part of it was to stay; it is received again"),
            }),
        }
    }

    fn finish_install(&self, dir: &Path, manifest: &Manifest) -> Result<(), StorageError> {
        self.remove_replaced(manifest)?;
        for family in Family::ALL {
            self.take_files_over(dir, manifest, family)?;
        }
        self.set_installed(manifest)?;
        let poison = |e: &dyn std::fmt::Display| StorageError::from(self.0.shared.poison("installing a group", e));
        fs::remove_file(dir.join(INSTALL_FILE))
            .and_then(|()| identity::sync_dir(dir))
            .map_err(|e| poison(&e))?;
        remove_dir(dir);
        Ok(())
    }

    /// Removes what the group has, but for what stays.
    fn remove_replaced(&self, manifest: &Manifest) -> Result<(), StorageError> {
        let mut replaced: BTreeSet<ShardId> = manifest.shards.keys().copied().collect();
        let of_group = self
            .shards()?
            .into_iter()
            .filter(|(shard, owner, _)| *owner == manifest.group && !manifest.sealed.contains(shard));
        replaced.extend(of_group.map(|(shard, _, _)| shard));
        let mut batch = self.batch();
        for shard in replaced {
            batch.drop_shard_but(shard, &manifest.kept);
        }
        if manifest.group == GroupId::META {
            batch.drop_all_meta();
        }
        self.write(batch)?;
        self.flush()
    }

    fn take_files_over(&self, dir: &Path, manifest: &Manifest, family: Family) -> Result<(), StorageError> {
        let poison = |e: &dyn std::fmt::Display| StorageError::from(self.0.shared.poison("installing a group", e));
        let mut links = Vec::new();
        for (_, name) in manifest.files.iter().filter(|(f, _)| *f == family) {
            let link = dir.join(format!("{name}.link"));
            match fs::remove_file(&link) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(poison(&e)),
                Ok(()) | Err(_) => {}
            }
            fs::hard_link(dir.join(name), &link).map_err(|e| poison(&e))?;
            links.push(link);
        }
        if links.is_empty() {
            return Ok(());
        }
        let mut options = IngestExternalFileOptions::default();
        options.set_move_files(true);
        let handle = match family {
            Family::Index => self.0.index(),
            Family::Batches => self.0.batches(),
        };
        self.0
            .db
            .ingest_external_file_cf_opts(&handle, &options, links)
            .map_err(|e| poison(&e))
    }

    fn set_installed(&self, manifest: &Manifest) -> Result<(), StorageError> {
        let mut batch = self.batch();
        for (shard, floors) in &manifest.shards {
            // The same values are in the files; written again so that what is in memory follows.
            batch.drop_batches(*shard, Sequence::new(0), floors.batches);
            batch.drop_ids(*shard, floors.ids);
        }
        batch.set_applied(manifest.group, manifest.applied, &manifest.marker);
        self.write(batch)?;
        self.flush()
    }

    /// At start: finishes the switches that were begun. What was not received to its end stays, to be gone on with.
    pub(super) fn recover_incoming(&self) -> Result<(), StorageError> {
        let io = |e: io::Error| StorageError::Engine {
            what: "looking through incoming/",
            detail: e.to_string(),
        };
        let dir = self.incoming();
        let entries = match fs::read_dir(&dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(io(e)),
        };
        for entry in entries {
            let path = entry.map_err(io)?.path();
            match fs::read_to_string(path.join(INSTALL_FILE)) {
                Ok(text) => {
                    let bad = |detail: &str| StorageError::Corrupt {
                        area: Area::State,
                        kind: "install file",
                        key: path.display().to_string(),
                        detail: detail.into(),
                    };
                    let manifest = Manifest::parse(&text).ok_or_else(|| bad("it is not what was written"))?;
                    let here = self.0.applied.lock().get(&manifest.group).copied();
                    if manifest.keeps() && here != manifest.base && here != Some(manifest.applied) {
                        return Err(bad("the state is not the one that a part of was to stay"));
                    }
                    tracing::info!(group = %manifest.group, applied = %manifest.applied, "finishing a snapshot's install");
                    self.finish_install(&path, &manifest)?;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {
                    tracing::info!(dir = %path.display(), "a part of a snapshot was received before the last stop");
                }
                Err(e) if e.kind() == io::ErrorKind::NotADirectory => {}
                Err(e) => return Err(io(e)),
            }
        }
        Ok(())
    }
}

impl Manifest {
    fn of(
        staged: &StagedGroup,
        sealed: &BTreeSet<ShardId>,
        applied: LogIndex,
        marker: &[u8],
        base: Option<LogIndex>,
    ) -> Self {
        let received = |shard: &ShardId| staged.shards.contains_key(shard);
        Self {
            group: staged.place.group,
            applied,
            marker: marker.to_vec(),
            shards: staged.shards.clone(),
            files: staged.files.iter().map(|f| (f.family, f.name.clone())).collect(),
            kept: staged.kept.iter().map(batches_in).collect(),
            base,
            sealed: sealed.iter().filter(|shard| !received(shard)).copied().collect(),
        }
    }

    /// Whether anything of what there was stays.
    fn keeps(&self) -> bool {
        !self.kept.is_empty() || !self.sealed.is_empty()
    }

    fn to_text(&self) -> String {
        let mut text = format!(
            "mainstem-install 3\ngroup {}\napplied {}\nmarker {}\n",
            self.group.get(),
            self.applied.get(),
            hex(&self.marker)
        );
        // Writing to a string cannot fail.
        for (shard, f) in &self.shards {
            let _ = writeln!(text, "shard {} {} {}", shard.get(), f.batches.get(), f.ids.get());
        }
        for (family, name) in &self.files {
            let _ = writeln!(text, "file {} {name}", family.name());
        }
        if let Some(base) = self.base {
            let _ = writeln!(text, "base {}", base.get());
        }
        for (from, to) in &self.kept {
            let _ = writeln!(text, "kept {} {}", hex(from), hex(to));
        }
        for shard in &self.sealed {
            let _ = writeln!(text, "sealed {}", shard.get());
        }
        identity::seal(text)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = identity::unseal(text).ok()?.lines();
        // The first version knew nothing that stays, the second no shards that do.
        if !["mainstem-install 1", "mainstem-install 2", "mainstem-install 3"].contains(&lines.next()?) {
            return None;
        }
        let mut manifest = Self {
            group: GroupId::new(lines.next()?.strip_prefix("group ")?.parse().ok()?),
            applied: LogIndex::new(lines.next()?.strip_prefix("applied ")?.parse().ok()?),
            marker: unhex(lines.next()?.strip_prefix("marker ")?)?,
            shards: BTreeMap::new(),
            files: Vec::new(),
            kept: Vec::new(),
            base: None,
            sealed: BTreeSet::new(),
        };
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["shard", shard, batches, ids] => {
                    let number = |s: &str| s.parse().ok().map(Sequence::new);
                    let f = Floors {
                        batches: number(batches)?,
                        ids: number(ids)?,
                    };
                    manifest.shards.insert(ShardId::new(shard.parse().ok()?), f);
                }
                ["file", "index", name] => manifest.files.push((Family::Index, name.to_string())),
                ["file", "batches", name] => manifest.files.push((Family::Batches, name.to_string())),
                ["base", index] => manifest.base = Some(LogIndex::new(index.parse().ok()?)),
                ["sealed", shard] => drop(manifest.sealed.insert(ShardId::new(shard.parse().ok()?))),
                ["kept", from, to] => manifest.kept.push((unhex(from)?, unhex(to)?)),
                _ => return None,
            }
        }
        Some(manifest)
    }
}

/// A stretch that begins in the batches, as a range of keys.
fn batches_in(stretch: &Stretch) -> KeyRange {
    let end = |place: &Place| place.key.to_vec();
    // No key of a batch is that large.
    let to = stretch.to.as_ref().map_or_else(|| vec![u8::MAX; 32], end);
    (stretch.from.key.to_vec(), to)
}

#[cfg(test)]
pub(super) mod tests;
