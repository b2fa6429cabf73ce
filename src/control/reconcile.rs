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
use crate::model::{GroupId, Revision, ShardId};
use crate::raft::{Group, ProposeError};
use crate::wire::spec::shard_config;
use crate::wire::{internal as pb, v1};

/// Also without a change, for graces that end and steps that failed.
const AT_LEAST_EVERY: Duration = Duration::from_secs(1);

pub(super) async fn run(control: Arc<Control>, token: CancellationToken) {
    let mut changes = control.view.watch();
    loop {
        changes.borrow_and_update();
        // Every step is found again: none needs to be waited for when the node stops.
        match token.run_until_cancelled(round(&control)).await {
            None => return,
            Some(Ok(())) => {}
            Some(Err(e)) => tracing::warn!(error = %e, "reconciling stopped short; it is tried again"),
        }
        tokio::select! {
            () = token.cancelled() => return,
            _ = changes.changed() => {}
            () = tokio::time::sleep(AT_LEAST_EVERY) => {}
        }
    }
}

async fn round(control: &Control) -> Result<(), ProposeError> {
    if control.peers.is_some() {
        control.start_meta_again().await?;
        set_aside(control).await;
    }
    control.start_groups().await?;
    for stream in control.view.all_streams() {
        let done = match stream.state {
            v1::StreamState::Creating => create(control, &stream).await,
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
    Ok(())
}

fn config_of(stream: &StreamView, place: &ShardPlace) -> pb::ShardConfig {
    shard_config(&stream.spec, &stream.id.to_string(), stream.epoch.get(), place.index)
}

fn revision_here(control: &Control, shard: ShardId) -> Option<Revision> {
    control.groups.directory().get(shard).map(|s| s.positions().revision)
}

async fn create(control: &Control, stream: &StreamView) -> Result<(), ProposeError> {
    let mut all_here = true;
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
            // Its group starts in this round or the next, here or on other nodes.
            return Ok(());
        };
        if control.peers.is_none() {
            group.wait_ready(super::start::START).await?;
        } else if !group.leads_quorum(QUORUM_AGE) {
            all_here = false;
            continue;
        }
        control
            .propose_shard(
                &group,
                pb::group_command::Op::CreateShard(pb::CreateShard {
                    shard_id: place.shard.get(),
                    config: Some(config_of(stream, place)),
                }),
            )
            .await?;
    }
    // Otherwise the meta group's leader hears of them all.
    if all_here {
        control.activate(stream.id).await;
    }
    Ok(())
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

/// Replicas that were removed from their groups are stopped, and their logs set aside. Only what the catalog says was
/// removed: what it merely does not know is left as it is.
async fn set_aside(control: &Control) {
    for record in control.view.group_records() {
        let group = GroupId::new(record.group_id);
        let own = |replica: &&pb::ReplicaRecord| replica.node_id == control.facts.node.get();
        let Some(removed) = record.removed.iter().find(own) else {
            continue;
        };
        if record.replicas.iter().any(|replica| own(&replica)) || control.groups.is_aside(group) {
            continue;
        }
        let runs = control.groups.get(group);
        if runs.is_some_and(|runs| runs.replica.get() != removed.replica_id) {
            continue;
        }
        tracing::info!(%group, replica = removed.replica_id, "a replica that was removed is set aside");
        control.groups.set_aside(group).await;
    }
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
