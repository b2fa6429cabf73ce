//! The storage limit: a bare pair of RocksDB instances that is given the bytes, and nothing else.
//!
//! The same shape of writes as a node's: batches, several of them in one synced write of the log-like instance (WAL
//! on), then one unsynced write of the state-like one (WAL off, large values in blob files); the log is dropped up to
//! what the state has flushed. No network, no encoding, no check sums of ours, no indexes, no Raft, and everything in
//! this process. Against several replicas: as many pairs side by side, each of which is given all the bytes.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use rocksdb::{BlockBasedOptions, DB, DBCompressionType, FlushOptions, Options, WriteBatch, WriteOptions};

use crate::contest::{PublishLoad, Publishes, Turn};
use crate::lab::Lab;
use crate::payload::Payloads;
use crate::process::own_written_bytes;

// The options of the server's own store (src/storage: options.rs, engine.rs) as far as they bear on plain writing, so
// that what differs is what the server does besides.
const LOG_WRITE_BUFFER_BYTES: usize = 128 << 20;
const STATE_WRITE_BUFFER_BYTES: usize = 32 << 20;
const STATE_MIN_BLOB_BYTES: u64 = 1 << 10;
const STATE_BLOB_FILE_BYTES: u64 = 64 << 20;

/// Header of an encoded batch, and what a record adds to its subject and payload.
const BATCH_HEADER_BYTES: usize = 24;
const RECORD_EXTRA_BYTES: usize = 10;

pub struct Limit;

/// What is written.
struct Shape {
    batch_bytes: usize,
    batch_messages: u64,
    /// Batches in one synced write.
    group: u64,
}

impl Shape {
    fn of(load: &PublishLoad) -> Self {
        let subject_bytes = "s.0".len();
        let record = RECORD_EXTRA_BYTES + subject_bytes + load.message_bytes;
        let messages = (load.batch_bytes.saturating_sub(BATCH_HEADER_BYTES) / record).max(1);
        Self {
            batch_bytes: BATCH_HEADER_BYTES + messages * record,
            batch_messages: messages as u64,
            group: load.sync_bytes().div_ceil(load.batch_bytes as u64).max(1),
        }
    }
}

/// Batches `first ..= last`, which one write of the log holds.
#[derive(Clone, Copy)]
struct Group {
    first: u64,
    last: u64,
}

impl Publishes for Limit {
    fn name(&self) -> &'static str {
        "storage-limit"
    }

    fn publish<'a>(&'a self, lab: &'a Lab, load: &'a PublishLoad) -> BoxFuture<'a, Result<Turn>> {
        Box::pin(async move {
            let dirs = (0..load.replicas).map(|_| lab.dir()).collect::<Result<Vec<_>>>()?;
            let pairs = dirs.iter().map(|dir| {
                let (dir, load) = (dir.path().to_path_buf(), load.clone());
                async move { tokio::task::spawn_blocking(move || run(&dir, &load)).await? }
            });
            let mut turns: Vec<Turn> = futures_util::future::try_join_all(pairs).await?;
            let rate = turns.iter().map(|turn| turn.rate).sum::<f64>() / turns.len() as f64;
            let told = turns.pop().context("a pair")?.told;
            Ok(Turn { rate, told })
        })
    }
}

/// Threads and the two instances; ends when time is up.
fn run(dir: &Path, load: &PublishLoad) -> Result<Turn> {
    let shape = Shape::of(load);
    let batches = Payloads::new(shape.batch_bytes, 0);
    let log = DB::open(&log_options(), dir.join("log")).context("opening the log")?;
    let state = DB::open(&state_options(), dir.join("state")).context("opening the state")?;
    let stored = AtomicU64::new(0);
    let stop = AtomicBool::new(false);
    let (to_log, from_source) = sync_channel::<(Group, WriteBatch)>(2);
    let (to_state, from_log) = sync_channel::<Group>(8);
    let (to_purge, from_state) = sync_channel::<u64>(1);
    let written_before = own_written_bytes()?;

    let (rate, messages) = std::thread::scope(|scope| {
        let (log, state, batches, shape, stored, stop) = (&log, &state, &batches, &shape, &stored, &stop);
        let threads = [
            scope.spawn(move || {
                source(batches, shape, stop, &to_log);
                Ok(())
            }),
            scope.spawn(move || write_log(log, &from_source, &to_state)),
            scope.spawn(move || write_state(state, batches, shape, stored, &from_log, &to_purge)),
            scope.spawn(move || purge(log, state, &from_state)),
        ];
        std::thread::sleep(load.warmup);
        let (begin, before) = (Instant::now(), stored.load(Ordering::Relaxed));
        std::thread::sleep(load.measure);
        let (elapsed, after) = (begin.elapsed(), stored.load(Ordering::Relaxed));
        stop.store(true, Ordering::Relaxed);
        for thread in threads {
            thread
                .join()
                .map_err(|_| anyhow!("a thread of the storage limit panicked"))??;
        }
        let messages = (after - before) * shape.batch_messages;
        anyhow::Ok((messages as f64 / elapsed.as_secs_f64(), messages))
    })?;

    state.flush_opt(&flush_and_wait())?;
    // What is written is counted for the whole process: for all pairs.
    let published =
        stored.load(Ordering::Relaxed) * shape.batch_messages * load.message_bytes as u64 * u64::from(load.replicas);
    let written = own_written_bytes()? - written_before;
    let mut told = BTreeMap::new();
    let mut tell = |name: &str, value: String| told.insert(name.to_owned(), value);
    tell(
        "batch",
        format!("{} bytes, {} messages", shape.batch_bytes, shape.batch_messages),
    );
    tell("batches_in_sync", shape.group.to_string());
    tell(
        "sync",
        "of every write of the log, before its batches are put into the state".to_owned(),
    );
    tell("indexes", "none".to_owned());
    tell("measured_messages", messages.to_string());
    tell(
        "written_per_byte",
        format!("{:.2}", written as f64 / published.max(1) as f64),
    );
    Ok(Turn { rate, told })
}

fn log_key(index: u64) -> [u8; 16] {
    key(1, index)
}

fn key(area: u64, number: u64) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&area.to_be_bytes());
    key[8..].copy_from_slice(&number.to_be_bytes());
    key
}

/// Prepares the log's writes, ahead of it.
fn source(batches: &Payloads, shape: &Shape, stop: &AtomicBool, to_log: &SyncSender<(Group, WriteBatch)>) {
    let mut next = 0;
    while !stop.load(Ordering::Relaxed) {
        let group = Group {
            first: next,
            last: next + shape.group - 1,
        };
        next = group.last + 1;
        let mut write = WriteBatch::with_capacity_bytes((shape.batch_bytes + 64) * shape.group as usize);
        for index in group.first..=group.last {
            let batch: Bytes = batches.nth(index);
            write.put(log_key(index), batch);
        }
        if to_log.send((group, write)).is_err() {
            return;
        }
    }
}

/// One write and one sync for each group.
fn write_log(log: &DB, from_source: &Receiver<(Group, WriteBatch)>, to_state: &SyncSender<Group>) -> Result<()> {
    let mut synced = WriteOptions::default();
    synced.set_sync(true);
    while let Ok((group, write)) = from_source.recv() {
        log.write_opt(write, &synced)?;
        if to_state.send(group).is_err() {
            break;
        }
    }
    Ok(())
}

/// The batches once more, as applied, with the applied marker, in one write.
fn write_state(
    state: &DB,
    batches: &Payloads,
    shape: &Shape,
    stored: &AtomicU64,
    from_log: &Receiver<Group>,
    to_purge: &SyncSender<u64>,
) -> Result<()> {
    let mut unlogged = WriteOptions::default();
    unlogged.disable_wal(true);
    let mut since_flush = 0;
    while let Ok(group) = from_log.recv() {
        let mut write = WriteBatch::with_capacity_bytes((shape.batch_bytes + 64) * shape.group as usize);
        for index in group.first..=group.last {
            write.put(key(2, index * shape.batch_messages), batches.nth(index));
        }
        write.put(b"applied", group.last.to_be_bytes());
        state.write_opt(write, &unlogged)?;
        stored.fetch_add(shape.group, Ordering::Relaxed);
        since_flush += shape.group * shape.batch_bytes as u64;
        // Busy with the last flush: this one is told with the next write.
        if since_flush >= STATE_WRITE_BUFFER_BYTES as u64 && to_purge.try_send(group.last).is_ok() {
            since_flush = 0;
        }
    }
    Ok(())
}

/// Makes the state durable up to a batch, then drops the log up to it.
fn purge(log: &DB, state: &DB, from_state: &Receiver<u64>) -> Result<()> {
    while let Ok(applied) = from_state.recv() {
        state.flush_opt(&flush_and_wait())?;
        let mut write = WriteBatch::default();
        write.delete_range(log_key(0), log_key(applied + 1));
        log.write(write)?;
    }
    Ok(())
}

fn flush_and_wait() -> FlushOptions {
    let mut options = FlushOptions::default();
    options.set_wait(true);
    options
}

/// What both have in common.
fn options() -> Options {
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_max_background_jobs(2);
    options.set_max_write_buffer_number(2);
    options.set_compression_type(DBCompressionType::None);
    options.set_num_levels(5);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options.set_level_zero_slowdown_writes_trigger(1 << 20);
    options.set_level_zero_stop_writes_trigger(1 << 20);
    options.set_soft_pending_compaction_bytes_limit(0);
    options.set_hard_pending_compaction_bytes_limit(0);
    let mut table = BlockBasedOptions::default();
    table.set_format_version(6);
    table.set_block_size(16 << 10);
    options.set_block_based_table_factory(&table);
    options
}

fn log_options() -> Options {
    let mut options = options();
    options.set_write_buffer_size(LOG_WRITE_BUFFER_BYTES);
    options.set_allow_concurrent_memtable_write(false);
    options.set_enable_pipelined_write(false);
    options
}

fn state_options() -> Options {
    let mut options = options();
    options.set_write_buffer_size(STATE_WRITE_BUFFER_BYTES);
    options.set_bytes_per_sync(1 << 20);
    options.set_enable_blob_files(true);
    options.set_min_blob_size(STATE_MIN_BLOB_BYTES);
    options.set_blob_file_size(STATE_BLOB_FILE_BYTES);
    options.set_blob_compression_type(DBCompressionType::None);
    options.set_enable_blob_gc(false);
    options
}
