//! The control plane: the meta group, the view of it, and the reconciler that makes what the meta group says true on
//! this node.

mod encode;
mod error;
mod executor;
pub mod membership;
mod meta;
mod news;
pub mod operations;
mod peers;
pub mod placement;
mod reconcile;
pub mod reports;
mod start;
mod version;
pub mod view;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use prost::Message;

use crate::base::alarms::Alarms;
use crate::base::clock::Clock;
use crate::machine::meta::remembered;
use crate::machine::port::MetaKind;
use crate::machine::{GroupOutcome, MetaOutcome, MetaRefusal};
use crate::model::{GroupId, LogIndex, Revision, Sequence, ShardId};
use crate::raft::transport::Peers;
use crate::raft::{Applied, Group, Groups, ProposeError};
use crate::wire::{internal as pb, spec, v1};

pub use error::AdminError;
use executor::{Liveness, Orders};
pub use peers::HintsKeeper;
pub use start::{MetaStart, NodeFacts};
use view::{StreamView, View};

/// How long the answer to a proposal of a shard's settings may take.
const PROPOSE_MAX: Duration = Duration::from_secs(2);
/// How long an admin call waits for its effect to be in place everywhere it must be.
const SETTLE: Duration = Duration::from_secs(10);
/// Hand-overs side by side when a node stops.
const HAND_OVERS: usize = 32;
/// How long a removed stream is kept unless the call says otherwise.
pub const GRACE_DEFAULT_US: u64 = 3_600_000_000;

/// What a purge removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PurgeUpto {
    Everything,
    Before(Sequence),
    Keep(u64),
}

impl PurgeUpto {
    /// The first purge to be proposed for a shard.
    pub fn of_shard(self, shard: ShardId, filter: &str) -> Result<pb::Purge, AdminError> {
        if !filter.is_empty() {
            crate::model::subject::Filter::parse(filter).map_err(|e| AdminError::Invalid(e.to_string()))?;
        }
        let (before_sequence, keep) = match self {
            PurgeUpto::Everything => (None, None),
            PurgeUpto::Before(sequence) => (Some(sequence.get()), None),
            PurgeUpto::Keep(n) => (None, Some(n)),
        };
        Ok(pb::Purge {
            shard_id: shard.get(),
            before_sequence,
            keep,
            filter: filter.to_owned(),
            ..pb::Purge::default()
        })
    }
}

fn odd_answer() -> AdminError {
    AdminError::NotReady("the meta group answered a command with something else".into())
}

/// The stream that an outcome tells.
fn stream_of(outcome: MetaOutcome) -> Result<Arc<pb::StreamRecord>, Option<MetaRefusal>> {
    match outcome {
        MetaOutcome::StreamCreated(stream)
        | MetaOutcome::StreamExisted(stream)
        | MetaOutcome::StreamActivated(stream)
        | MetaOutcome::StreamUpdated(stream)
        | MetaOutcome::StreamRemoved(stream)
        | MetaOutcome::StreamUndeleted(stream)
        | MetaOutcome::StreamDoomed(stream)
        | MetaOutcome::StreamForgotten(stream)
        | MetaOutcome::ShardMoving(stream)
        | MetaOutcome::ShardMoved { stream, .. } => Ok(stream),
        MetaOutcome::Refused(refusal) => Err(Some(refusal)),
        MetaOutcome::ClusterInitialised { .. }
        | MetaOutcome::NodeRegistered { .. }
        | MetaOutcome::NodeChanged(_)
        | MetaOutcome::ClusterChanged(_)
        | MetaOutcome::GroupChanged(_) => Err(None),
    }
}

/// The control plane of a node.
pub struct Control {
    view: Arc<View>,
    groups: Arc<Groups>,
    clock: Clock,
    alarms: Alarms,
    facts: NodeFacts,
    /// Without them this node is the cluster.
    peers: Option<Peers>,
    liveness: Liveness,
    orders: Orders,
    stopping: AtomicBool,
}

impl Control {
    /// The cluster's streams.
    pub fn view(&self) -> &Arc<View> {
        &self.view
    }

    /// Whether this node is being stopped.
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Hands over what this node leads, and takes nothing more to lead: it is being stopped. Returns when others lead all of
    /// it, or when the time is over: how many groups it still leads then. Those that are here alone are not counted.
    pub async fn hand_over(&self, patience: Duration) -> usize {
        self.stopping.store(true, Ordering::Release);
        let begun = tokio::time::Instant::now();
        let led = || -> Vec<Group> {
            let others = |group: &Group| group.members().voters.len() > 1;
            let all = self.groups.all().into_iter();
            all.filter(|group| group.status().is_leader && others(group)).collect()
        };
        loop {
            let (groups, left) = (led(), patience.saturating_sub(begun.elapsed()));
            if groups.is_empty() || left.is_zero() {
                return groups.len();
            }
            // The catalog's last: the others may want to tell it something.
            let (meta, data): (Vec<_>, Vec<_>) = groups.into_iter().partition(|group| group.id == GroupId::META);
            for part in [data, meta] {
                let steps = part.into_iter().map(|group| async move {
                    if let Err(error) = group.step_down(left).await {
                        tracing::debug!(group = %group.id, %error, "not handed over");
                    }
                });
                let all = futures_util::StreamExt::buffer_unordered(futures_util::stream::iter(steps), HAND_OVERS);
                futures_util::StreamExt::for_each(all, |()| std::future::ready(())).await;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn meta(&self) -> Result<Group, AdminError> {
        self.groups
            .get(GroupId::META)
            .ok_or_else(|| AdminError::NotReady("the meta group does not run here".into()))
    }

    async fn propose_shard(&self, group: &Group, op: pb::group_command::Op) -> Result<Applied, ProposeError> {
        let proposed = self.propose_indexed(group, op);
        if self.peers.is_none() {
            return Ok(proposed.await?.1);
        }
        match tokio::time::timeout(PROPOSE_MAX, proposed).await {
            Ok(done) => Ok(done?.1),
            // Without a quorum it would not be answered before there is one again, and what else is to be done here would wait.
            Err(_) => Err(ProposeError::Unknown { group: group.id }),
        }
    }

    async fn propose_indexed(
        &self,
        group: &Group,
        op: pb::group_command::Op,
    ) -> Result<(LogIndex, Applied), ProposeError> {
        let command = pb::GroupCommand {
            feature_level: self.view.feature_level(),
            op: Some(op),
        };
        let (index, _, applied) = group.propose(command.encode_to_vec().into()).await?.wait().await?;
        Ok((index, applied))
    }

    fn refused(namespace: &str, name: &str, refusal: MetaRefusal) -> AdminError {
        if matches!(refusal, MetaRefusal::NotFound { .. }) {
            return AdminError::NotFound {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
            };
        }
        AdminError::Refused(refusal)
    }

    /// Creates a stream and waits until its shards take publishes. True if it was there already.
    pub async fn create_stream(
        &self,
        asked: v1::StreamSpec,
        request_id: String,
    ) -> Result<(Arc<StreamView>, bool), AdminError> {
        let spec = spec::normalise(&asked).map_err(|e| AdminError::Invalid(e.to_string()))?;
        let (namespace, name) = (spec.namespace.clone(), spec.name.clone());
        let outcome = self
            .propose_meta(
                request_id,
                pb::meta_command::Op::CreateStream(pb::CreateStream {
                    stream_id: uuid::Uuid::now_v7().simple().to_string(),
                    spec: Some(spec),
                    ..pb::CreateStream::default()
                }),
            )
            .await?;
        let existed = matches!(outcome, MetaOutcome::StreamExisted(_));
        let stream = self
            .changed(&namespace, &name, outcome, |s| s.state != v1::StreamState::Creating)
            .await?;
        Ok((stream, existed))
    }

    /// Waits until this node's view and shards have what a change asked for. A change that others followed is told as
    /// it was.
    async fn settled(
        &self,
        record: &pb::StreamRecord,
        done: impl Fn(&StreamView) -> bool,
    ) -> Result<Arc<StreamView>, AdminError> {
        let then = StreamView::compile(record).map_err(AdminError::NotReady)?;
        let id = then.id;
        if self.view.stream_by_id(id).is_none() {
            self.barrier().await?;
            if self.view.stream_by_id(id).is_none() {
                // Forgotten since: an answer that was remembered longer than its stream.
                return Ok(Arc::new(then));
            }
        }
        let mut changes = self.view.watch();
        let wait = async {
            loop {
                if let Some(stream) = self.view.stream_by_id(id)
                    && stream.revision >= Revision::new(record.revision)
                    && done(&stream)
                {
                    return stream;
                }
                if changes.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
        };
        let now = tokio::time::timeout(SETTLE, wait).await.map_err(|_| {
            AdminError::Timeout(format!(
                "the change is committed, but it did not take effect within {} s; `mainstem stream info` shows its state",
                SETTLE.as_secs()
            ))
        })?;
        if now.revision == then.revision {
            return Ok(now);
        }
        Ok(Arc::new(StreamView {
            state: now.state,
            removed_until: now.removed_until,
            ..then
        }))
    }

    /// After this, the view has everything that was committed before the call.
    pub async fn catch_up(&self) -> Result<(), AdminError> {
        self.barrier().await
    }

    /// A stream by name, after a barrier: what is not found does not exist.
    pub async fn find(&self, namespace: &str, name: &str) -> Result<Arc<StreamView>, AdminError> {
        if let Some(stream) = self.view.stream(namespace, name) {
            return Ok(stream);
        }
        self.barrier().await?;
        self.view.stream(namespace, name).ok_or_else(|| AdminError::NotFound {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }

    /// Changes the fields that `paths` name.
    pub async fn update_stream(
        &self,
        asked: v1::StreamSpec,
        paths: &[String],
        expected_revision: Option<u64>,
        request_id: String,
    ) -> Result<Arc<StreamView>, AdminError> {
        let namespace = if asked.namespace.is_empty() {
            "default".to_owned()
        } else {
            asked.namespace.clone()
        };
        let name = asked.name.clone();
        let planned = self.plan_update(&namespace, &asked, paths, expected_revision).await;
        let outcome = match planned {
            Ok(update) => {
                self.propose_meta(request_id, pb::meta_command::Op::UpdateStream(update))
                    .await?
            }
            // What it was checked against may have been changed by this very request, sent before. An effect that the
            // view shows is in the state together with its answer.
            Err(refused) => self.answered(&request_id, &namespace, &name)?.ok_or(refused)?,
        };
        self.changed(&namespace, &name, outcome, |_| true).await
    }

    /// The update that a request asks for, checked against the stream as it is.
    async fn plan_update(
        &self,
        namespace: &str,
        asked: &v1::StreamSpec,
        paths: &[String],
        expected_revision: Option<u64>,
    ) -> Result<pb::UpdateStream, AdminError> {
        let current = self.find(namespace, &asked.name).await?;
        if expected_revision.is_some_and(|expected| expected != current.revision.get()) {
            return Err(AdminError::Refused(MetaRefusal::RevisionMismatch {
                name: asked.name.clone(),
                actual: current.revision,
            }));
        }
        let spec = spec::apply_mask(&current.spec, asked, paths).map_err(|e| AdminError::Invalid(e.to_string()))?;
        Ok(pb::UpdateStream {
            namespace: namespace.to_owned(),
            name: asked.name.clone(),
            spec: Some(spec),
            base_revision: current.revision.get(),
            ..pb::UpdateStream::default()
        })
    }

    /// The answer that was given to an update with this request id before.
    fn answered(&self, request_id: &str, namespace: &str, name: &str) -> Result<Option<MetaOutcome>, AdminError> {
        if request_id.is_empty() {
            return Ok(None);
        }
        let unreadable = |e: &dyn std::fmt::Display| AdminError::NotReady(format!("the answer to the request: {e}"));
        let stored = self
            .groups
            .state()
            .meta_record(MetaKind::Request, request_id.as_bytes());
        let Some(record) = stored.map_err(|e| unreadable(&e))? else {
            return Ok(None);
        };
        let update = pb::UpdateStream {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            ..pb::UpdateStream::default()
        };
        let op = pb::meta_command::Op::UpdateStream(update);
        remembered(&record, &op, self.clock.now_us()).map_err(|e| unreadable(&e))
    }

    async fn changed(
        &self,
        namespace: &str,
        name: &str,
        outcome: MetaOutcome,
        done: impl Fn(&StreamView) -> bool,
    ) -> Result<Arc<StreamView>, AdminError> {
        let record = stream_of(outcome).map_err(|refusal| match refusal {
            Some(refusal) => Self::refused(namespace, name, refusal),
            None => odd_answer(),
        })?;
        self.settled(&record, done).await
    }

    /// Removes a stream. Its data stays for the grace period.
    pub async fn remove_stream(
        &self,
        namespace: &str,
        name: &str,
        grace_us: Option<u64>,
        expected_revision: Option<u64>,
        request_id: String,
    ) -> Result<Arc<StreamView>, AdminError> {
        let outcome = self
            .propose_meta(
                request_id,
                pb::meta_command::Op::RemoveStream(pb::RemoveStream {
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                    grace_us: grace_us.unwrap_or(GRACE_DEFAULT_US),
                    expected_revision,
                }),
            )
            .await?;
        let record = stream_of(outcome).map_err(|refusal| match refusal {
            Some(refusal) => Self::refused(namespace, name, refusal),
            None => odd_answer(),
        })?;
        // The reconciler may have forgotten it before the view is looked at here: what was removed is told as it was.
        StreamView::compile(&record).map(Arc::new).map_err(AdminError::NotReady)
    }

    /// Brings a removed stream back.
    pub async fn undelete_stream(
        &self,
        namespace: &str,
        name: &str,
        stream_id: Option<String>,
        request_id: String,
    ) -> Result<Arc<StreamView>, AdminError> {
        let outcome = self
            .propose_meta(
                request_id,
                pb::meta_command::Op::UndeleteStream(pb::UndeleteStream {
                    namespace: namespace.to_owned(),
                    name: name.to_owned(),
                    stream_id,
                }),
            )
            .await?;
        self.changed(namespace, name, outcome, |s| s.state != v1::StreamState::Creating)
            .await
    }

    /// Removes messages of a shard. Returns how many.
    pub async fn purge_shard(
        &self,
        group: &Group,
        shard: ShardId,
        upto: PurgeUpto,
        filter: &str,
    ) -> Result<u64, AdminError> {
        let mut purged = 0;
        let mut next = upto.of_shard(shard, filter)?;
        loop {
            let applied = self.propose_shard(group, pb::group_command::Op::Purge(next)).await?;
            match applied {
                Applied::Command(GroupOutcome::Purged(outcome)) => {
                    let outcome = outcome.map_err(|e| AdminError::Invalid(e.to_string()))?;
                    purged += outcome.messages;
                    match outcome.next {
                        None => return Ok(purged),
                        Some(more) => next = more,
                    }
                }
                Applied::Command(_) | Applied::Done => {
                    return Err(AdminError::NotReady("the shard was removed".into()));
                }
            }
        }
    }
}
