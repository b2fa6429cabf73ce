//! Makes what the meta group says true on this node: groups run, shards exist and have their stream's settings, streams
//! whose shards are in place become active, removed ones go when their grace ends. It looks at the whole view after
//! every change, so nothing is lost when it is interrupted: every step is idempotent and is seen again.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::Control;
use super::meta::QUORUM_AGE;
use super::view::{ShardPlace, StreamView};
use crate::model::{GroupId, LogIndex, ReplicaId, Revision, ShardId};
use crate::raft::{Group, ProposeError, ShardShared};
use crate::wire::spec::shard_config;
use crate::wire::{internal as pb, v1};

/// Also without a change, for graces that end and steps that failed.
const AT_LEAST_EVERY: Duration = Duration::from_secs(1);
/// While streams wait for a leader here that no quorum has answered yet.
const SOON: Duration = Duration::from_millis(5);

/// Whether what is to be done has been done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Done {
    /// Or it is others' to do, or found by looking now and then.
    Enough,
    /// It can be done in a moment.
    NotYet,
}

pub(super) async fn run(control: Arc<Control>, token: CancellationToken) {
    let mut changes = control.view.watch();
    let mut events = control.groups.events();
    loop {
        changes.borrow_and_update();
        // Every step is found again: none needs to be waited for when the node stops.
        let pause = match token.run_until_cancelled(round(&control)).await {
            None => return,
            Some(Ok(Done::Enough)) => AT_LEAST_EVERY,
            Some(Ok(Done::NotYet)) => SOON,
            Some(Err(e)) => {
                tracing::warn!(error = %e, "reconciling stopped short; it is tried again");
                AT_LEAST_EVERY
            }
        };
        tokio::select! {
            () = token.cancelled() => return,
            _ = changes.changed() => {}
            // A new leader has work of its own. Missed events are made up for by looking.
            _ = events.recv() => {}
            () = tokio::time::sleep(pause) => {}
        }
    }
}

async fn round(control: &Control) -> Result<Done, ProposeError> {
    if control.peers.is_some() {
        control.start_meta_again().await?;
        clear_out(control).await;
        drop_left(control).await;
    }
    control.start_groups(false).await?;
    if control.peers.is_some() {
        purge_to_floors(control).await;
    }
    let mut all = Done::Enough;
    for stream in control.view.all_streams() {
        let done = match stream.state {
            v1::StreamState::Creating => create(control, &stream).await.map(|done| {
                if done == Done::NotYet {
                    all = done;
                }
            }),
            v1::StreamState::Active => update(control, &stream).await,
            v1::StreamState::Removed => forget(control, &stream).await,
            v1::StreamState::Unspecified => Ok(()),
        };
        match done {
            // Leaders come and go: whoever leads the group next sees it.
            Err(error) if control.peers.is_some() => {
                tracing::debug!(stream = %stream.spec.name, %error, "not done; it is looked at again");
            }
            done => done?,
        }
    }
    quarantine(control);
    Ok(all)
}

fn config_of(stream: &StreamView, place: &ShardPlace) -> pb::ShardConfig {
    shard_config(&stream.spec, &stream.id.to_string(), stream.epoch.get(), place.index)
}

fn revision_here(control: &Control, shard: ShardId) -> Option<Revision> {
    control.groups.directory().get(shard).map(|s| s.positions().revision)
}

async fn create(control: &Control, stream: &StreamView) -> Result<Done, ProposeError> {
    let mut all_here = true;
    let mut done = Done::Enough;
    for place in &stream.shards {
        if revision_here(control, place.shard).is_some() {
            let led = control
                .groups
                .get(place.group)
                .is_some_and(|group| is_ours(control, &group));
            all_here &= led;
            continue;
        }
        let Some(group) = control.groups.get(place.group) else {
            // Its group starts in this round or the next, here or on other nodes; those of the other shards may be here.
            all_here = false;
            continue;
        };
        if control.peers.is_none() {
            group.wait_ready(super::start::START).await?;
        } else if !group.leads_quorum(QUORUM_AGE) {
            all_here = false;
            if leads_since_now(&group) {
                done = Done::NotYet;
            }
            continue;
        }
        let created = control
            .propose_shard(
                &group,
                pb::group_command::Op::CreateShard(pb::CreateShard {
                    shard_id: place.shard.get(),
                    config: Some(config_of(stream, place)),
                }),
            )
            .await;
        match created {
            // Nor does a leader take anything before a quorum has answered its first entry.
            Err(ProposeError::NotLeader { .. }) if leads_since_now(&group) => {
                all_here = false;
                done = Done::NotYet;
            }
            created => drop(created?),
        }
    }
    // Otherwise the meta group's leader hears of them all.
    if all_here {
        control.activate(stream.id).await;
    }
    Ok(done)
}

/// Whether the replica here has just become the leader of its group.
fn leads_since_now(group: &Group) -> bool {
    let since = group.watch_leader().borrow().since;
    group.leads() && since.elapsed().is_ok_and(|led| led < AT_LEAST_EVERY)
}

async fn update(control: &Control, stream: &StreamView) -> Result<(), ProposeError> {
    for place in &stream.shards {
        let Some(here) = revision_here(control, place.shard) else {
            continue;
        };
        if here >= stream.revision {
            continue;
        }
        let Some(group) = control.groups.get(place.group).filter(|group| is_ours(control, group)) else {
            continue;
        };
        control
            .propose_shard(
                &group,
                pb::group_command::Op::UpdateShard(pb::UpdateShard {
                    shard_id: place.shard.get(),
                    config: Some(config_of(stream, place)),
                    revision: stream.revision.get(),
                }),
            )
            .await?;
    }
    Ok(())
}

async fn forget(control: &Control, stream: &StreamView) -> Result<(), ProposeError> {
    if !stream.doomed {
        // A clock that jumped must not end a grace early.
        let Some(now) = control.clock.expiry_now_us() else {
            return Ok(());
        };
        if now >= stream.removed_until.get() && control.leads_meta() {
            propose_forget(control, stream, false).await;
        }
        // The rest is done when the view has it: from there on there is no way back.
        return Ok(());
    }
    // With peers, the meta group's leader hears of them all.
    let mut all_dropped = control.peers.is_none();
    for place in &stream.shards {
        if revision_here(control, place.shard).is_none() {
            continue;
        }
        let Some(group) = control.groups.get(place.group).filter(|group| is_ours(control, group)) else {
            // Its leader does it.
            all_dropped = false;
            continue;
        };
        control
            .propose_shard(
                &group,
                pb::group_command::Op::RemoveShard(pb::RemoveShard {
                    shard_id: place.shard.get(),
                }),
            )
            .await?;
    }
    if all_dropped {
        propose_forget(control, stream, true).await;
    }
    Ok(())
}

async fn propose_forget(control: &Control, stream: &StreamView, dropped: bool) {
    let outcome = control
        .propose_meta(
            String::new(),
            pb::meta_command::Op::ForgetStream(pb::ForgetStream {
                stream_id: stream.id.to_string(),
                dropped,
            }),
        )
        .await;
    if let Err(e) = outcome {
        tracing::warn!(stream = %stream.spec.name, error = %e, "a removed stream could not be forgotten; it is tried again");
    }
}

/// Whether this node proposes for the group: one without peers always does.
fn is_ours(control: &Control, group: &Group) -> bool {
    control.peers.is_none() || group.leads_quorum(QUORUM_AGE)
}

/// Replicas that were removed from their groups are stopped and what they have left here is removed; then the catalog is
/// told, and the node may get another replica of the group. Only what the catalog says was removed: what it merely does
/// not know is left as it is.
async fn clear_out(control: &Control) {
    for (group, owner) in control.groups.left_here() {
        if group == GroupId::META || !is_removed(control, group, owner) {
            continue;
        }
        let replica = owner.map(ReplicaId::get);
        match control.groups.clear_out(group).await {
            Ok(()) => tracing::info!(%group, replica, "what a removed replica had left here is removed"),
            Err(error) => tracing::warn!(%group, replica, %error, "what a removed replica has left is not removed yet"),
        }
    }
    let left = control.groups.left_here();
    for record in control.view.group_records() {
        let group = GroupId::new(record.group_id);
        for gone in record.removed.iter().filter(|replica| is_here(control, replica)) {
            let of_it = |owner: &Option<ReplicaId>| owner.is_none_or(|owner| owner.get() == gone.replica_id);
            if !left.iter().any(|(id, owner)| *id == group && of_it(owner)) {
                let op = pb::meta_command::Op::ReplicaGone(pb::ReplicaGone {
                    group_id: record.group_id,
                    replica_id: gone.replica_id,
                });
                control.tell_catalog("a replica that is gone", op).await;
            }
        }
    }
}

/// Sealed shards that nobody will adopt here are removed: while one is there its group's state cannot be sent (0048).
async fn drop_left(control: &Control) {
    let directory = control.groups.directory();
    let left = |face: &ShardShared| face.heir().is_some() && is_left(control, face.shard, face.group());
    let found: Vec<_> = directory.all().into_iter().filter(|face| left(face)).collect();
    // Not by a view that is behind.
    if found.is_empty() || control.barrier().await.is_err() {
        return;
    }
    for face in found.iter().filter(|face| left(face)) {
        let (shard, group) = (face.shard, face.group());
        match control.groups.drop_sealed(group, shard).await {
            Ok(()) => {
                tracing::info!(%shard, %group, "the shard has gone on to other nodes; what was sealed here is removed")
            }
            Err(error) => tracing::warn!(%shard, %group, %error, "what was sealed here is not removed yet"),
        }
    }
}

/// Whether a shard that is sealed in a group here went on elsewhere, or was removed for good. Ids are given once, in order.
fn is_left(control: &Control, shard: ShardId, group: GroupId) -> bool {
    let view = &control.view;
    let given = |cluster: pb::ClusterRecord| shard.get() < cluster.next_shard_id;
    match view.owner_of(shard) {
        None => view.cluster().is_some_and(given),
        Some(owner) => {
            let here = |record: Arc<pb::GroupRecord>| record.replicas.iter().any(|replica| is_here(control, replica));
            owner != group
                && !view.moves_of(group).iter().any(|on| on.shard == shard)
                && !view.group_record(owner).is_some_and(here)
                && control.groups.get(owner).is_none()
        }
    }
}

fn is_here(control: &Control, replica: &pb::ReplicaRecord) -> bool {
    replica.node_id == control.facts.node.get()
}

/// Whether the catalog, as far as it is known here, says that this replica of a group was removed. Ids are given once, in
/// order: one that is below the next to be given, and of which the group's record knows nothing, was there before.
fn is_removed(control: &Control, group: GroupId, owner: Option<ReplicaId>) -> bool {
    let Some(cluster) = control.view.cluster() else {
        return false;
    };
    let Some(record) = control.view.group_record(group) else {
        return group.get() < cluster.next_group_id;
    };
    match owner {
        // It cannot go on, and its successor comes to this node.
        Some(owner) if is_succeeded(control, &record, owner) => true,
        Some(owner) => {
            owner.get() < cluster.next_replica_id && !record.replicas.iter().any(|r| r.replica_id == owner.get())
        }
        // Set aside by a version that did not note whose it was: it did that to removed ones alone.
        None => control.groups.is_aside(group),
    }
}

/// Whether a replica here that cannot go on is being replaced by another one on this node.
fn is_succeeded(control: &Control, record: &pb::GroupRecord, owner: ReplicaId) -> bool {
    let faulty = control.groups.faults().iter().any(|(_, replica, _)| *replica == owner);
    let Some(change) = record
        .change
        .as_ref()
        .filter(|change| change.remove.contains(&owner.get()))
    else {
        return false;
    };
    let here = |id: &u64| {
        record
            .replicas
            .iter()
            .any(|r| r.replica_id == *id && is_here(control, r))
    };
    faulty && change.add.iter().any(here)
}

/// Logs whose groups sealed or adopted shards are purged up to there, so that no replica begins with them.
async fn purge_to_floors(control: &Control) {
    for group in control.groups.all() {
        if let Some(record) = control.view.group_record(group.id) {
            group.set_floor(LogIndex::new(record.log_floor));
        }
    }
    control.groups.purge_to_floors().await;
}

/// Shards that no stream names are reported, never removed.
fn quarantine(control: &Control) {
    // A view that is behind would call new shards unknown.
    if control.peers.is_some() && !control.leads_meta() && !control.hears_meta() {
        return;
    }
    let known: HashSet<ShardId> = control
        .view
        .all_streams()
        .iter()
        .flat_map(|s| s.shards.iter().map(|p| p.shard))
        .collect();
    let unknown: Vec<String> = control
        .groups
        .directory()
        .all()
        .iter()
        .filter(|s| !known.contains(&s.shard))
        .map(|s| s.shard.to_string())
        .collect();
    if unknown.is_empty() {
        control.alarms.clear(crate::base::alarms::AlarmKind::Quarantine);
    } else {
        control.alarms.raise(
            crate::base::alarms::AlarmKind::Quarantine,
            format!("shards that no stream names are kept aside: {}", unknown.join(", ")),
        );
    }
}
