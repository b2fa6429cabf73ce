//! The state of one group, received from another node.
//!
//! What is received goes into table files in `incoming/`, beside the databases: it is not visible, and at the next
//! start it is gone. The switch is quick, because the engine takes the files over as they are:
//!
//! 1. `INSTALL` is written beside the files and synced: from here on the switch will be finished, now or at the next
//!    start; whatever the group had is void;
//! 2. what the group had is removed, and that is flushed;
//! 3. the engine takes links to the files over;
//! 4. the floors and the applied marker are written and flushed, and `INSTALL` and the files go.
//!
//! Each step can be done again. Nobody reads or applies the group's state meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use rocksdb::{DBCompressionType, IngestExternalFileOptions, Options, SstFileWriter};

use super::error::{Area, StorageError};
use super::floors::Floors;
use super::identity;
use super::keys::Key;
use super::record::{take_u64, unframe};
use super::state::StateDb;
use super::state_export::{Family, take_record};
use crate::machine::port::ShardSink as _;
use crate::model::{GroupId, LogIndex, Sequence, ShardId};

const INCOMING_DIR: &str = "incoming";
const INSTALL_FILE: &str = "INSTALL";
/// A file is closed at this size.
const FILE_BYTES: u64 = 64 << 20;

static NEXT: AtomicU64 = AtomicU64::new(1);

/// Why nothing was staged. Nothing of the store has changed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StageError {
    /// What was received is not an export of this format, or damaged.
    #[error("what was received is refused: {0}")]
    Refused(String),
    /// The source ended early.
    #[error("{0}")]
    Ended(String),
    #[error("cannot write what was received: {0}")]
    Io(String),
}

/// What `INSTALL` says.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Manifest {
    group: GroupId,
    applied: LogIndex,
    marker: Vec<u8>,
    floors: BTreeMap<ShardId, Floors>,
    files: Vec<(Family, String)>,
}

/// A received group, complete and on disk, but not visible. Gone when dropped, unless it is installed.
#[derive(Debug)]
pub struct StagedGroup {
    group: GroupId,
    dir: PathBuf,
    floors: BTreeMap<ShardId, Floors>,
    files: Vec<(Family, String)>,
    /// Records received.
    pub records: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Drop for StagedGroup {
    fn drop(&mut self) {
        // An `INSTALL` that is still there stands for a switch that did not end: the next start finishes it.
        if !self.dir.join(INSTALL_FILE).exists() {
            remove_dir(&self.dir);
        }
    }
}

fn remove_dir(dir: &Path) {
    if let Err(error) = fs::remove_dir_all(dir)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(dir = %dir.display(), %error, "cannot remove what was received; the next start tries again");
    }
}

/// Writes one family's files.
struct Tables {
    dir: PathBuf,
    files: Vec<(Family, String)>,
    last: Option<(Family, Bytes)>,
}

impl Tables {
    fn fill<'o>(
        &mut self,
        options: &'o [Options; 2],
        open: &mut Option<(Family, SstFileWriter<'o>)>,
        family: Family,
        key: &Bytes,
        value: &Bytes,
    ) -> Result<(), StageError> {
        if self.last.as_ref().is_some_and(|(f, k)| (*f, k) >= (family, key)) {
            return Err(StageError::Refused("its records are out of order".into()));
        }
        self.last = Some((family, key.clone()));
        if let Some((of, writer)) = open
            && (*of != family || writer.file_size() >= FILE_BYTES)
        {
            writer.finish().map_err(io_error)?;
            *open = None;
        }
        if open.is_none() {
            let name = format!("{:06}.sst", self.files.len());
            let writer = SstFileWriter::create(&options[family as usize]);
            *open = Some((family, writer));
            if let Some((_, writer)) = open {
                open_at(writer, &self.dir.join(&name))?;
            }
            self.files.push((family, name));
        }
        match open {
            Some((_, writer)) => writer.put(key, value).map_err(io_error),
            None => Ok(()),
        }
    }
}

fn open_at(writer: &SstFileWriter<'_>, path: &Path) -> Result<(), StageError> {
    writer.open(path).map_err(io_error)
}

fn io_error(e: impl std::fmt::Display) -> StageError {
    StageError::Io(e.to_string())
}

impl StateDb {
    fn incoming(&self) -> PathBuf {
        let state = self.0.db.path();
        state.parent().unwrap_or(state).join(INCOMING_DIR)
    }

    /// Receives a group. `next` gives the chunks of an export, in order, and `None` at its end; its error ends the
    /// staging. Blocks; use a thread that may.
    pub fn stage_group(
        &self,
        group: GroupId,
        mut next: impl FnMut() -> Result<Option<Bytes>, String>,
    ) -> Result<StagedGroup, StageError> {
        let n = NEXT.fetch_add(1, Ordering::Relaxed);
        let dir = self.incoming().join(format!("{group}-{n}"));
        fs::create_dir_all(&dir).map_err(io_error)?;
        let mut staged = StagedGroup {
            group,
            dir: dir.clone(),
            floors: BTreeMap::new(),
            files: Vec::new(),
            records: 0,
            bytes: 0,
        };
        let mut index = Options::default();
        index.set_compression_type(DBCompressionType::Lz4);
        let mut batches = Options::default();
        batches.set_compression_type(DBCompressionType::None);
        let options = [index, batches];
        let mut tables = Tables {
            dir: dir.clone(),
            files: Vec::new(),
            last: None,
        };
        let mut open = None;
        let mut shards = BTreeSet::new();
        while let Some(mut chunk) = next().map_err(StageError::Ended)? {
            staged.bytes += chunk.len() as u64;
            while !chunk.is_empty() {
                let (family, key, value) =
                    take_record(&mut chunk).ok_or_else(|| StageError::Refused("a record is cut short".into()))?;
                check(group, family, &key, &value, &mut shards, &mut staged.floors)?;
                tables.fill(&options, &mut open, family, &key, &value)?;
                staged.records += 1;
            }
        }
        if let Some((_, writer)) = &mut open {
            writer.finish().map_err(io_error)?;
        }
        staged.files = tables.files;
        identity::sync_dir(&dir).map_err(io_error)?;
        Ok(staged)
    }

    /// Puts a received group in the place of what there is of it, with the applied marker. Durable when it returns. The
    /// caller sees to it that nobody reads or applies the group meanwhile. Blocks, but not for long.
    ///
    /// An error has stopped the store: the next start finishes what was begun.
    pub fn install_group(&self, staged: StagedGroup, applied: LogIndex, marker: &[u8]) -> Result<(), StorageError> {
        self.0.shared.check()?;
        let manifest = Manifest {
            group: staged.group,
            applied,
            marker: marker.to_vec(),
            floors: staged.floors.clone(),
            files: staged.files.clone(),
        };
        let poison = |what, e: &dyn std::fmt::Display| StorageError::from(self.0.shared.poison(what, e));
        identity::write_atomically(&staged.dir, INSTALL_FILE, &manifest.to_text())
            .and_then(|()| identity::sync_dir(&self.incoming()))
            .map_err(|e| poison("preparing to install a group", &e))?;
        self.finish_install(&staged.dir, &manifest)
    }

    fn finish_install(&self, dir: &Path, manifest: &Manifest) -> Result<(), StorageError> {
        let group = manifest.group;
        let mut dropped: BTreeSet<ShardId> = manifest.floors.keys().copied().collect();
        dropped.extend(
            self.shards()?
                .into_iter()
                .filter(|(_, owner, _)| *owner == group)
                .map(|(shard, _, _)| shard),
        );
        let mut batch = self.batch();
        for shard in dropped {
            batch.drop_shard(shard);
        }
        if group == GroupId::META {
            batch.drop_all_meta();
        }
        self.write(batch)?;
        self.flush()?;
        let poison = |e: &dyn std::fmt::Display| StorageError::from(self.0.shared.poison("installing a group", e));
        for family in [Family::Index, Family::Batches] {
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
                continue;
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
                .map_err(|e| poison(&e))?;
        }
        let mut batch = self.batch();
        for (shard, floors) in &manifest.floors {
            // The same values are in the files; written again so that what is in memory follows.
            batch.drop_batches(*shard, Sequence::new(0), floors.batches);
            batch.drop_ids(*shard, floors.ids);
        }
        batch.set_applied(group, manifest.applied, &manifest.marker);
        self.write(batch)?;
        self.flush()?;
        fs::remove_file(dir.join(INSTALL_FILE))
            .and_then(|()| identity::sync_dir(dir))
            .map_err(|e| poison(&e))?;
        remove_dir(dir);
        Ok(())
    }

    /// At start: finishes the switches that were begun, and removes what was not received to its end.
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
                    let manifest = Manifest::parse(&text).ok_or_else(|| StorageError::Corrupt {
                        area: Area::State,
                        kind: "install file",
                        key: path.display().to_string(),
                        detail: "it is not what was written".into(),
                    })?;
                    tracing::info!(group = %manifest.group, applied = %manifest.applied, "finishing a snapshot's install");
                    self.finish_install(&path, &manifest)?;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound || e.kind() == io::ErrorKind::NotADirectory => {
                    tracing::info!(dir = %path.display(), "removing a snapshot that was not received to its end");
                    if path.is_dir() {
                        remove_dir(&path);
                    }
                }
                Err(e) => return Err(io(e)),
            }
        }
        Ok(())
    }
}

/// Whether a record may be part of an export of this group; takes note of shards and floors.
fn check(
    group: GroupId,
    family: Family,
    key: &[u8],
    value: &[u8],
    shards: &mut BTreeSet<ShardId>,
    floors: &mut BTreeMap<ShardId, Floors>,
) -> Result<(), StageError> {
    let refused = |what: String| Err(StageError::Refused(what));
    let mut payload = unframe(Area::State, key, value).map_err(|e| StageError::Refused(e.to_string()))?;
    let Some(key) = Key::decode(key) else {
        return refused("a key of no kind this version knows".into());
    };
    let of = match key {
        Key::Shard(shard) => {
            if take_u64(&mut payload) != Some(group.get()) {
                return refused(format!("{shard} is of another group"));
            }
            shards.insert(shard);
            floors.entry(shard).or_default();
            shard
        }
        Key::BatchFloor(shard) | Key::IdFloor(shard) => {
            let Some(at) = take_u64(&mut payload).map(Sequence::new) else {
                return refused(format!("a floor of {shard} is too short"));
            };
            let floors = floors.entry(shard).or_default();
            if matches!(key, Key::BatchFloor(_)) {
                floors.batches = at;
            } else {
                floors.ids = at;
            }
            shard
        }
        Key::Producer(shard, _) | Key::Ids(shard, _) | Key::Holes(shard, _) | Key::Posting(shard, ..) => shard,
        Key::Batch(shard, _) if family == Family::Batches => shard,
        Key::Meta(..) if group == GroupId::META && family == Family::Index => return Ok(()),
        Key::Batch(..)
        | Key::Meta(..)
        | Key::Applied(_)
        | Key::Flush
        | Key::Entry(..)
        | Key::Vote(_)
        | Key::Committed(_)
        | Key::Purged(_)
        | Key::First(_)
        | Key::Quarantine(_)
        | Key::BatchRecord => return refused(format!("a {} is not part of it", key.kind())),
    };
    let right_family = (family == Family::Batches) == matches!(key, Key::Batch(..));
    if !right_family || !shards.contains(&of) {
        return refused(format!("a {} of {of} where it does not belong", key.kind()));
    }
    Ok(())
}

impl Manifest {
    fn to_text(&self) -> String {
        let mut text = format!(
            "mainstem-install 1\ngroup {}\napplied {}\nmarker ",
            self.group.get(),
            self.applied.get()
        );
        for byte in &self.marker {
            // Writing to a string cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        text.push('\n');
        for (shard, f) in &self.floors {
            let _ = writeln!(text, "shard {} {} {}", shard.get(), f.batches.get(), f.ids.get());
        }
        for (family, name) in &self.files {
            let _ = writeln!(text, "file {} {name}", family.name());
        }
        identity::seal(text)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = identity::unseal(text).ok()?.lines();
        if lines.next()? != "mainstem-install 1" {
            return None;
        }
        let group = GroupId::new(lines.next()?.strip_prefix("group ")?.parse().ok()?);
        let applied = LogIndex::new(lines.next()?.strip_prefix("applied ")?.parse().ok()?);
        let hex = lines.next()?.strip_prefix("marker ")?.as_bytes();
        let marker = hex
            .chunks(2)
            .map(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok())
            .collect::<Option<_>>()?;
        let (mut floors, mut files) = (BTreeMap::new(), Vec::new());
        for line in lines {
            let words: Vec<&str> = line.split(' ').collect();
            match words[..] {
                ["shard", shard, batches, ids] => {
                    let number = |s: &str| s.parse().ok().map(Sequence::new);
                    let f = Floors {
                        batches: number(batches)?,
                        ids: number(ids)?,
                    };
                    floors.insert(ShardId::new(shard.parse().ok()?), f);
                }
                ["file", "index", name] => files.push((Family::Index, name.to_string())),
                ["file", "batches", name] => files.push((Family::Batches, name.to_string())),
                _ => return None,
            }
        }
        Some(Self {
            group,
            applied,
            marker,
            floors,
            files,
        })
    }
}

#[cfg(test)]
mod tests;
