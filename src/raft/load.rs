//! Loading a group's machines from `state/`: at start, and again after a snapshot was installed.

use std::io;

use crate::machine::port::MetaKind;
use crate::machine::{self, MetaMachine, ShardMachine};
use crate::model::GroupId;
use crate::storage::{StateDb, StorageError};

fn io_error(e: StorageError) -> io::Error {
    io::Error::other(e)
}

fn invalid(e: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, e.to_string())
}

/// The machines of a group as `state/` has them.
pub(super) fn machine(group: GroupId, state: &StateDb) -> io::Result<machine::GroupMachine> {
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
    for (shard, owner, raw) in state.shards().map_err(io_error)? {
        if owner != group {
            continue;
        }
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
