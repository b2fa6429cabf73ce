//! Loading a group's machines from `state/`: at start, and again after a snapshot was installed; and what of the log is
//! applied again before a replica runs.

use std::io;

use bytes::Bytes;
use openraft::EntryPayload;
use prost::Message;

use super::log_store::GroupLog;
use super::shard::ShardDirectory;
use super::types::LogId;
use crate::machine::port::MetaKind;
use crate::machine::{self, MetaMachine, ShardMachine};
use crate::model::{GroupId, ShardId};
use crate::storage::{StateDb, StorageError};
use crate::wire::internal as pb;

fn io_error(e: StorageError) -> io::Error {
    io::Error::other(e)
}

fn invalid(e: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e.to_string())
}

/// The machines of a group as `state/` has them.
pub(super) fn machine(
    group: GroupId,
    state: &StateDb,
    directory: &ShardDirectory,
) -> io::Result<machine::GroupMachine> {
    if group == GroupId::META {
        let mut records = Vec::new();
        for kind in [
            MetaKind::Cluster,
            MetaKind::Node,
            MetaKind::Group,
            MetaKind::Stream,
            MetaKind::Request,
        ] {
            for (key, raw) in state.meta_records(kind).map_err(io_error)? {
                records.push((kind, key, raw));
            }
        }
        let records = records
            .iter()
            .map(|(kind, key, raw)| (*kind, key.as_ref(), raw.as_ref()));
        let meta = MetaMachine::load(records).map_err(invalid)?;
        return Ok(machine::GroupMachine::meta_group(meta));
    }
    let mut shards = Vec::new();
    let of_the_group = |(_, owner, _): &(ShardId, GroupId, Bytes)| *owner == group;
    for (shard, ..) in state.shards().map_err(io_error)?.into_iter().filter(of_the_group) {
        // What is read of a shard is of one moment: another group's replica may be adopting it.
        let _applying = directory.applying(shard);
        let record = state.shard_record(shard).map_err(io_error)?;
        let Some((_, raw)) = record.filter(|(owner, _)| *owner == group) else {
            continue;
        };
        let producers = state.producers(shard).map_err(io_error)?;
        let id_blocks = state.id_blocks(shard).map_err(io_error)?;
        let machine = ShardMachine::load(
            shard,
            group,
            &raw,
            producers.iter().map(|(id, raw)| (*id, raw.as_ref())),
            id_blocks.iter().map(|(at, raw)| (*at, raw.as_ref())),
        )
        .map_err(invalid)?;
        shards.push(machine);
    }
    Ok(machine::GroupMachine::data(group, shards))
}

/// Another group, whose replica here must apply more before this is applied; none, if what the command builds on is here.
pub(super) fn waits_for(command: &pb::GroupCommand, state: &StateDb) -> io::Result<Option<GroupId>> {
    let Some((group, index)) = machine::waits_for(command) else {
        return Ok(None);
    };
    if state.applied_index(group) >= Some(index) || machine::is_adoptable(command, state).map_err(invalid)? {
        return Ok(None);
    }
    Ok(Some(group))
}

/// Entries are looked through in pieces of about so many bytes.
const LOOK_BYTES: usize = 1 << 20;

/// The first entry behind `applied` that is known to be committed and builds on what another group's replica here has not
/// applied. While a replica starts, openraft applies what is committed, and no other replica starts: the wait would not end.
pub(super) fn first_that_waits(log: &GroupLog, applied: Option<LogId>, state: &StateDb) -> io::Result<Option<u64>> {
    let end = log.committed().map_or(0, |id| id.index + 1);
    let mut next = applied.map_or(0, |id| id.index + 1);
    while next < end {
        let entries = log.read_range(next, end, LOOK_BYTES)?;
        let Some(last) = entries.last().map(|entry| entry.log_id.index) else {
            break;
        };
        for entry in entries {
            let EntryPayload::Normal(proposal) = entry.payload else {
                continue;
            };
            // One that cannot be read is a matter for apply.
            let Ok(command) = pb::GroupCommand::decode(proposal.0) else {
                continue;
            };
            if waits_for(&command, state)?.is_some() {
                return Ok(Some(entry.log_id.index));
            }
        }
        next = last + 1;
    }
    Ok(None)
}
