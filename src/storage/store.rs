//! A node's store: both databases, the threads that serve them, and what is known about their health.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex, RwLock};
use rocksdb::Cache;
use tokio::sync::watch;

use super::committer::Committer;
use super::engine::{self, OpenFault};
use super::error::{Area, OpenError, Poison, StorageError};
use super::floors::DurableFloors;
use super::identity::{self, FORMAT_FILE, FORMAT_VERSION, IDENTITY_FILE, Identity, TextFault};
use super::lock::{DirLock, LOCK_FILE};
use super::log::{LogDb, LogInner};
use super::log_open;
use super::options::StoreOptions;
use super::queue::Queue;
use super::reclaim::Reclaim;
use super::renewal::{ASIDE, RENEWAL_FILE, Renewal};
use super::shared::{DamageNote, Shared};
use super::space::{Space, SpaceMeter};
use super::state::{FlushSignal, StateDb, StateInner};
use super::upkeep::{self, Upkeep};
use super::witness::{Mark, WITNESS_FILE, Witness};
use crate::model::NodeId;

/// Marks a directory that is being made: nothing in it was ever acknowledged.
const INIT_FILE: &str = "INIT";
/// Where bytes go that are cut off or set aside.
pub(super) const ASIDE_DIR: &str = "aside";

/// An open data directory.
pub struct Store {
    identity: Mutex<Identity>,
    log: LogDb,
    state: StateDb,
    shared: Arc<Shared>,
    meter: Arc<SpaceMeter>,
    opts: StoreOptions,
    threads: Mutex<Vec<JoinHandle<()>>>,
    /// Of a store without threads.
    committer: OnceLock<Arc<Mutex<Committer>>>,
    upkeep: Arc<Upkeep>,
}

impl Store {
    /// Opens a data directory, or makes one where there is none or an empty one. Everything that can be checked
    /// without reading all batches is checked first; damage changes nothing.
    pub fn open(opts: StoreOptions, expected_node: Option<NodeId>) -> Result<Arc<Store>, OpenError> {
        let io = |what, e: std::io::Error| OpenError::Io {
            dir: opts.dir.clone(),
            what,
            detail: e.to_string(),
        };
        make_dir(&opts.dir).map_err(|e| io("making the directory", e))?;
        let lock = Arc::new(DirLock::take(&opts.dir)?);
        super::manifest_check::check(&opts.dir)?;
        let cache = Cache::new_lru_cache(opts.block_cache_bytes);
        let mut identity = match read_identity(&opts.dir)? {
            Some(identity) => identity,
            None => create(&opts, expected_node.unwrap_or(NodeId::new(1)), &cache)?,
        };
        if let Some(expected) = expected_node
            && expected != identity.node_id
        {
            return Err(OpenError::OtherNode {
                dir: opts.dir.clone(),
                expected,
                found: identity.node_id,
            });
        }
        let shared = Arc::new(Shared::new());
        let (mut witness, testimony) =
            Witness::open(&opts.dir, identity.store_id).map_err(|fault| OpenError::LogDamaged {
                what: fault.to_string(),
                file: opts.dir.join(WITNESS_FILE),
            })?;
        if testimony.one_slot_bad {
            // The other one has all that is needed: a power failure tears a slot while it is written.
            tracing::warn!("one of the two slots of the witness is unreadable; it is written anew");
        }
        let opened = log_open::open(&opts, &cache, testimony.mark)?;
        let state = open_state(&opts, &cache, &shared, &lock)?;
        check_state(&state, &opened.groups, &opts)?;
        witness.settle(opened.mark).map_err(|e| io("writing the witness", e))?;
        identity.open_again(rand::random());
        identity::write_atomically(&opts.dir, IDENTITY_FILE, &identity.to_text())
            .map_err(|e| io("raising the incarnation", e))?;

        let log = LogDb(Arc::new(LogInner {
            committer: OnceLock::new(),
            db: Arc::new(opened.db),
            queue: Arc::new(Queue::default()),
            groups: Arc::new(Mutex::new(opened.groups)),
            shared: shared.clone(),
            written: Arc::new(AtomicU64::new(0)),
            _lock: lock,
        }));
        let meter = Arc::new(SpaceMeter::default());
        meter
            .measure(&opts.dir, &shared)
            .map_err(|e| io("measuring free space", e))?;
        let store = Arc::new(Store {
            identity: Mutex::new(identity),
            log,
            state,
            shared,
            meter,
            opts,
            threads: Mutex::new(Vec::new()),
            committer: OnceLock::new(),
            upkeep: Arc::new(Upkeep::default()),
        });
        store.start_threads(witness, opened.mark)?;
        Ok(store)
    }

    fn start_threads(&self, witness: Witness, mark: Mark) -> Result<(), OpenError> {
        let committer = Committer::new(&self.log.0, witness, mark, self.opts.commit_batch_bytes_max);
        let committer = Arc::new(Mutex::new(committer));
        if !self.opts.threads {
            // Set once: a store is started once.
            let _ = self.committer.set(committer);
            return Ok(());
        }
        if self.opts.commit_on_caller {
            // Set once: a store starts its threads once.
            let _ = self.log.0.committer.set(committer.clone());
        }
        let queue = self.log.0.queue.clone();
        let reclaim = Reclaim::new(
            self.log.clone(),
            self.state.clone(),
            self.opts.clone(),
            self.upkeep.clone(),
        );
        let meter = self.meter.clone();
        let (space_meter, shared, opts, space_upkeep) = (
            self.meter.clone(),
            self.shared.clone(),
            self.opts.clone(),
            self.upkeep.clone(),
        );
        let (state, flush_interval, flush_min) =
            (self.state.clone(), self.opts.flush_interval, self.opts.flush_min_bytes);
        let mut threads = self.threads.lock();
        let mut spawn = |name: &str, run: Box<dyn FnOnce() + Send>| -> Result<(), OpenError> {
            let thread = std::thread::Builder::new()
                .name(name.into())
                .spawn(run)
                .map_err(|e| OpenError::Io {
                    dir: self.opts.dir.clone(),
                    what: "starting a thread",
                    detail: e.to_string(),
                })?;
            threads.push(thread);
            Ok(())
        };
        spawn("log-committer", Box::new(move || Committer::run(&committer, &queue)))?;
        spawn(
            "state-flusher",
            Box::new(move || upkeep::run_flusher(&state, flush_interval, flush_min)),
        )?;
        spawn("reclaim", Box::new(move || reclaim.run(&meter)))?;
        spawn(
            "space",
            Box::new(move || upkeep::run_space(&space_meter, &shared, &opts, &space_upkeep)),
        )
    }

    /// Who this store is. The incarnation is that of this run.
    pub fn identity(&self) -> Identity {
        self.identity.lock().clone()
    }

    /// Notes the cluster this node has founded or joined; durable on return. It is set once: another one is refused.
    pub fn set_cluster(&self, cluster_id: &str) -> std::io::Result<()> {
        let invalid = |m: &str| Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, m.to_string()));
        if cluster_id.is_empty() || cluster_id == "-" || cluster_id.contains(char::is_whitespace) {
            return invalid("a cluster id is not empty and has no spaces");
        }
        let mut identity = self.identity.lock();
        match &identity.cluster_id {
            Some(id) if id == cluster_id => return Ok(()),
            Some(id) => return invalid(&format!("this store belongs to cluster {id} already")),
            None => {}
        }
        let mut changed = identity.clone();
        changed.cluster_id = Some(cluster_id.to_string());
        identity::write_atomically(&self.opts.dir, IDENTITY_FILE, &changed.to_text())?;
        *identity = changed;
        Ok(())
    }

    /// Notes the cluster this node has joined and the id it was given there; durable on return. Before, the node has
    /// said its id to nobody. Refused once a cluster is noted.
    pub fn join_cluster(&self, cluster_id: &str, node: NodeId) -> std::io::Result<()> {
        let before = {
            let mut identity = self.identity.lock();
            if identity.cluster_id.is_some() && identity.node_id != node {
                return Err(std::io::Error::new(
                    std::io::ErrorKind::InvalidInput,
                    format!("this store is that of node {} already", identity.node_id),
                ));
            }
            std::mem::replace(&mut identity.node_id, node)
        };
        // One write has both.
        self.set_cluster(cluster_id)
            .inspect_err(|_| self.identity.lock().node_id = before)
    }

    /// Raft logs.
    pub fn log(&self) -> &LogDb {
        &self.log
    }

    /// Applied state.
    pub fn state(&self) -> &StateDb {
        &self.state
    }

    /// Becomes `Some` when the store has stopped for good.
    pub fn poisoned(&self) -> watch::Receiver<Option<Poison>> {
        self.shared.poisoned()
    }

    /// The first damage found while working, if any. Cheap where there is none.
    pub fn first_damage(&self) -> Option<DamageNote> {
        self.shared.first_damage()
    }

    /// Room on the disk. Cheap; to be asked before accepting a publish.
    pub fn space(&self) -> Space {
        self.meter.read(self.opts.min_free_bytes, &self.shared)
    }

    /// The settings it was opened with.
    pub fn options(&self) -> &StoreOptions {
        &self.opts
    }

    /// Writes what was asked for, flushes state/, joins the threads. Blocks; requests made later fail as closed.
    pub fn close(&self) -> Result<(), StorageError> {
        self.stop_threads();
        let flushed = self.state.flush();
        self.log
            .0
            .db
            .flush_wal(true)
            .map_err(|e| self.shared.poison("syncing the log", e))?;
        flushed
    }

    /// Whether requests for the log wait to be committed.
    pub fn has_waiting(&self) -> bool {
        self.log.0.queue.has_work()
    }

    /// Commits what waits for the log, as one synced write, and answers it. Only does something on a store without
    /// threads of its own (`StoreOptions::threads`).
    pub fn commit_waiting(&self) {
        if let Some(committer) = self.committer.get() {
            committer.lock().commit_waiting();
        }
    }

    /// Does at once what the reclaim task does every `reclaim_interval`: gives back the space of trims that are
    /// durable. Blocks for as long as the compaction takes.
    pub fn reclaim_now(&self) -> Result<(), StorageError> {
        Reclaim::new(
            self.log.clone(),
            self.state.clone(),
            self.opts.clone(),
            self.upkeep.clone(),
        )
        .step()
    }

    /// Compacts everything in state/, so that a test sees what compaction may drop.
    #[doc(hidden)]
    pub fn compact_all_for_test(&self) {
        let state = &self.state.0;
        state.db.compact_range(None::<&[u8]>, None::<&[u8]>);
        state.db.compact_range_cf(state.batches(), None::<&[u8]>, None::<&[u8]>);
    }

    /// How many postings, id blocks and batches of a shard are physically there.
    #[doc(hidden)]
    pub fn raw_counts_for_test(&self, shard: crate::model::ShardId) -> (usize, usize, usize) {
        let state = &self.state.0;
        let count = |family: &rocksdb::ColumnFamily, (from, to): super::keys::KeyRange| {
            let mut options = rocksdb::ReadOptions::default();
            options.set_iterate_upper_bound(to);
            let mut iter = state.db.raw_iterator_cf_opt(family, options);
            iter.seek(from);
            let mut n = 0;
            while iter.valid() {
                n += 1;
                iter.next();
            }
            n
        };
        (
            count(state.index(), super::keys::postings_of(shard, b"")),
            count(state.index(), super::keys::ids_of(shard)),
            count(state.batches(), super::keys::batches_of(shard)),
        )
    }

    fn stop_threads(&self) {
        self.log.0.queue.close();
        {
            let mut signal = self.state.0.flush_signal.lock();
            signal.closing = true;
        }
        self.state.0.flush_wanted.notify_all();
        self.upkeep.close();
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            if thread.join().is_err() {
                tracing::error!("a storage thread panicked");
            }
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

fn text_damage(dir: &Path, name: &str, why: &str) -> OpenError {
    OpenError::LogDamaged {
        what: format!("{name}: {why}"),
        file: dir.join(name),
    }
}

/// `None`: there is no store yet, one may be made.
fn read_identity(dir: &Path) -> Result<Option<Identity>, OpenError> {
    let newer = |found| OpenError::NewerFormat {
        dir: dir.to_path_buf(),
        found,
        known: FORMAT_VERSION,
    };
    let format = identity::read_text(dir, FORMAT_FILE)?;
    let identity = identity::read_text(dir, IDENTITY_FILE)?;
    match (format, identity) {
        (Some(format), Some(text)) => {
            match format.and_then(|t| identity::parse_format(&t)) {
                Ok(_) => {}
                Err(TextFault::Newer(found)) => return Err(newer(found)),
                Err(TextFault::Bad(why)) => return Err(text_damage(dir, FORMAT_FILE, &why)),
            }
            match text.and_then(|t| Identity::parse(&t)) {
                Ok(identity) => Ok(Some(identity)),
                Err(TextFault::Newer(found)) => Err(newer(found)),
                Err(TextFault::Bad(why)) => Err(text_damage(dir, IDENTITY_FILE, &why)),
            }
        }
        (None, Some(_)) => Err(text_damage(dir, FORMAT_FILE, "it is missing")),
        (format, None) => {
            if let Some(Err(TextFault::Newer(found))) = format
                .as_ref()
                .map(|f| f.clone().and_then(|t| identity::parse_format(&t)))
            {
                return Err(newer(found));
            }
            may_create(dir, format.is_some())
        }
    }
}

fn may_create(dir: &Path, has_format: bool) -> Result<Option<Identity>, OpenError> {
    let io = |e: std::io::Error| OpenError::Io {
        dir: dir.to_path_buf(),
        what: "listing the directory",
        detail: e.to_string(),
    };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(io)? {
        names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
    }
    if names.iter().any(|n| n == INIT_FILE) {
        return Ok(None);
    }
    if has_format {
        return Err(text_damage(dir, IDENTITY_FILE, "it is missing"));
    }
    // A node that begins anew has its former data beside it.
    names.retain(|n| n != LOCK_FILE && n != "lost+found" && n != RENEWAL_FILE && !n.starts_with(ASIDE));
    match names.first() {
        None => Ok(None),
        Some(name) => Err(OpenError::NotADataDir {
            dir: dir.to_path_buf(),
            why: format!("it has {name:?} in it, but no {FORMAT_FILE}"),
        }),
    }
}

/// Makes a store. Until its identity is written, everything in the directory may be made again from nothing.
fn create(opts: &StoreOptions, node_id: NodeId, cache: &Cache) -> Result<Identity, OpenError> {
    let dir = &opts.dir;
    let io = |e: std::io::Error| OpenError::Io {
        dir: dir.clone(),
        what: "making a new store",
        detail: e.to_string(),
    };
    let engine_error = |e: rocksdb::Error| OpenError::Io {
        dir: dir.clone(),
        what: "making a new store",
        detail: e.to_string(),
    };
    identity::write_atomically(dir, INIT_FILE, "being made\n").map_err(io)?;
    for area in [Area::Log, Area::State] {
        let path = dir.join(area.as_str());
        if path.exists() {
            fs::remove_dir_all(&path).map_err(io)?;
        }
    }
    identity::write_atomically(dir, FORMAT_FILE, &identity::format_text()).map_err(io)?;
    let renewal = Renewal::load(dir).map_err(io)?;
    let identity = Identity {
        store_id: renewal.map_or_else(rand::random, |renewal| renewal.store_id),
        cluster_id: None,
        node_id,
        incarnation: 0,
        starts: Vec::new(),
    };
    drop(engine::open_log(&dir.join(Area::Log.as_str()), opts, cache, true).map_err(engine_error)?);
    let floors = Arc::new(DurableFloors::default());
    drop(engine::open_state(&dir.join(Area::State.as_str()), opts, cache, &floors, true).map_err(engine_error)?);
    Witness::create(dir, identity.store_id).map_err(io)?;
    identity::write_atomically(dir, IDENTITY_FILE, &identity.to_text()).map_err(io)?;
    fs::remove_file(dir.join(INIT_FILE)).map_err(io)?;
    identity::sync_dir(dir).map_err(io)?;
    Ok(identity)
}

fn open_state(
    opts: &StoreOptions,
    cache: &Cache,
    shared: &Arc<Shared>,
    lock: &Arc<DirLock>,
) -> Result<StateDb, OpenError> {
    let dir = opts.dir.join(Area::State.as_str());
    let damaged = |what: String| OpenError::StateDamaged {
        what,
        file: dir.clone(),
        groups: Vec::new(),
    };
    if !dir.is_dir() {
        return Err(damaged(super::error::FOLDER_MISSING.into()));
    }
    let durable_floors = Arc::new(DurableFloors::default());
    let failed = |what: &'static str, detail: String| OpenError::Io {
        dir: opts.dir.clone(),
        what,
        detail,
    };
    let opened = engine::open_state(&dir, opts, cache, &durable_floors, false);
    let db = opened.map_err(|e| match engine::open_fault(&e) {
        OpenFault::Damage => damaged(e.to_string()),
        OpenFault::System => failed("opening state/", e.to_string()),
    })?;
    let state = StateDb(Arc::new(StateInner {
        db,
        shared: shared.clone(),
        floors: RwLock::default(),
        durable_floors,
        applied: Mutex::default(),
        durable_applied: RwLock::default(),
        dirty_bytes: AtomicUsize::new(0),
        flush_at_bytes: opts.state_write_buffer_bytes,
        flushing: Mutex::new(0),
        generation: watch::Sender::new(0),
        flush_signal: Mutex::new(FlushSignal::default()),
        flush_wanted: Condvar::new(),
        shard_gate: RwLock::new(()),
        removed: Mutex::default(),
        exports: AtomicUsize::new(0),
        receiving: Mutex::default(),
        _lock: lock.clone(),
    }));
    let loaded = state.load().and_then(|()| state.recover_incoming());
    loaded.map_err(|e| {
        let passing = matches!(&e, StorageError::Engine { detail, .. } if engine::is_system(detail));
        match passing {
            true => failed("reading state/", e.to_string()),
            false => damaged(e.to_string()),
        }
    })?;
    Ok(state)
}

/// What the log has purged must be in the state, or nobody here has it any more.
fn check_state(
    state: &StateDb,
    groups: &BTreeMap<crate::model::GroupId, super::log::GroupLog>,
    opts: &StoreOptions,
) -> Result<(), OpenError> {
    let applied: BTreeMap<_, _> = state.applied_groups().into_iter().collect();
    let behind: Vec<_> = groups
        .iter()
        .filter(|(_, log)| !log.quarantined)
        .filter_map(|(group, log)| log.purged.as_ref().map(|(purged, _)| (*group, *purged)))
        .filter(|(group, purged)| applied.get(group).is_none_or(|a| a < purged))
        .collect();
    match behind.first() {
        None => Ok(()),
        Some((group, purged)) => Err(OpenError::StateDamaged {
            what: format!(
                "{group} is applied up to {}, but its log is purged up to {purged}",
                applied.get(group).map_or("nothing".into(), ToString::to_string)
            ),
            file: opts.dir.join(Area::State.as_str()),
            groups: behind.iter().map(|(g, _)| *g).collect(),
        }),
    }
}

/// Makes a directory and those above it that are missing, and syncs the name of each in its parent: a store whose own
/// name is lost with the power has lost everything that was acknowledged.
fn make_dir(dir: &Path) -> std::io::Result<()> {
    let parent = match dir.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    match fs::create_dir(dir) {
        Ok(()) => {}
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && dir.is_dir() => {}
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            make_dir(parent)?;
            fs::create_dir(dir)?;
        }
        Err(e) => return Err(e),
    }
    // Also when it was there: whoever made it, a moment ago perhaps, may not have synced it. A parent that may not be
    // read was not made by us.
    match super::identity::sync_dir(parent) {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        synced => synced,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use bytes::Bytes;

    use super::*;
    use crate::model::{GroupId, LogIndex};

    #[test]
    fn a_poisoned_store_writes_nothing_more_and_opens_again() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut opts = StoreOptions::new(dir.path());
        opts.min_free_bytes = 0;
        let store = Store::open(opts.clone(), None).expect("new");
        let append = |index: u64| {
            let (tx, rx) = mpsc::channel();
            let entries = vec![(LogIndex::new(index), Bytes::from_static(b"e"))];
            let done = Box::new(move |r| tx.send(r).expect("waited for"));
            store.log().append(GroupId::new(1), entries, done);
            rx.recv().expect("an answer")
        };
        append(0).expect("well");
        let poisoned = store.poisoned();
        store.shared.poison("flushing state/", "no space");
        store.shared.poison("something else", "later");
        assert_eq!(poisoned.borrow().as_ref().map(|p| p.what), Some("flushing state/"));
        assert!(matches!(append(1), Err(StorageError::Poisoned(_))));
        // A request that slipped into the queue before is not written either.
        let (tx, rx) = mpsc::channel();
        let op = super::super::queue::Op::Vote(Bytes::new());
        let done = Box::new(move |r| tx.send(r).expect("waited for"));
        store.log.0.queue.push(GroupId::new(1), op, done);
        assert!(matches!(rx.recv().expect("an answer"), Err(StorageError::Poisoned(_))));
        let mut batch = store.state().batch();
        batch.set_applied(GroupId::new(1), LogIndex::new(0), b"");
        assert!(store.state().write(batch).is_err());
        assert!(store.state().flush().is_err());
        assert!(store.close().is_err());
        drop(store);
        let store = Store::open(opts, None).expect("a restart checks everything again");
        assert_eq!(
            store.log().meta(GroupId::new(1)).expect("read").last,
            Some(LogIndex::new(0))
        );
    }
}
