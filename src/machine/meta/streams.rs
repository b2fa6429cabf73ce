//! The life of a stream: created, active, updated, removed, back again or forgotten.

use std::sync::Arc;

use super::{MetaMachine, MetaOutcome, MetaRefusal, filters_of, id_of, is_live, spec_of};
use crate::machine::placement::wanted_replicas;
use crate::machine::port::{MetaKind, ShardSink};
use crate::model::limits::STREAMS_MAX;
use crate::model::{GroupId, Revision, ShardMap, StreamId};
use crate::wire::internal::v1 as pb;
use crate::wire::spec;
use crate::wire::v1::{StreamSpec, StreamState};

type Outcome = Result<MetaOutcome, MetaRefusal>;

impl MetaMachine {
    pub(super) fn create_stream(
        &mut self,
        sink: &mut dyn ShardSink,
        time_us: u64,
        create: &pb::CreateStream,
    ) -> Outcome {
        let bad = |why: &str| MetaRefusal::BadSpec { why: why.to_string() };
        let mut cluster = pb::ClusterRecord::clone(self.cluster.as_ref().ok_or(MetaRefusal::NotInitialised)?);
        let spec = create.spec.as_ref().ok_or_else(|| bad("there is none"))?;
        if let Some(stream) = self.stream_by_name(&spec.namespace, &spec.name) {
            return match spec::difference(spec_of(stream), spec) {
                None => Ok(MetaOutcome::StreamExisted(stream.clone())),
                Some(difference) => Err(MetaRefusal::Differs {
                    name: spec.name.clone(),
                    difference,
                }),
            };
        }
        let id = StreamId::parse(&create.stream_id).ok_or_else(|| bad("its id is not 32 hex digits"))?;
        if self.streams.contains_key(&id) {
            return Err(bad("its id is taken"));
        }
        if self.streams.len() >= STREAMS_MAX {
            return Err(MetaRefusal::TooMany {
                what: "streams",
                max: STREAMS_MAX as u64,
            });
        }
        self.check_overlap(spec, None)?;
        let map = ShardMap::even(spec.shards).map_err(|error| bad(&error.to_string()))?;
        if spec.replicas == 0 {
            return Err(bad("it has no replicas"));
        }
        let shards = self.place_shards(sink, &mut cluster, spec, &create.unreachable_nodes)?;
        let stream = self.put_stream(
            sink,
            pb::StreamRecord {
                // As parsed and printed: one spelling.
                stream_id: id.to_string(),
                epoch: 1,
                revision: 1,
                created_us: time_us,
                state: StreamState::Creating as i32,
                removed_until_us: 0,
                spec: Some(spec.clone()),
                map: Some((&map).into()),
                shards,
                removed_us: None,
                doomed: false,
            },
        );
        self.put_cluster(sink, cluster);
        Ok(MetaOutcome::StreamCreated(stream))
    }

    pub(super) fn activate_stream(&mut self, sink: &mut dyn ShardSink, activate: &pb::ActivateStream) -> Outcome {
        let stream = self.by_id(&activate.stream_id)?;
        match stream.state() {
            StreamState::Active => return Ok(MetaOutcome::StreamActivated(stream)),
            StreamState::Creating => {}
            StreamState::Removed | StreamState::Unspecified => return Err(wrong_state(&stream)),
        }
        let stream = self.put_stream(
            sink,
            pb::StreamRecord {
                state: StreamState::Active as i32,
                ..pb::StreamRecord::clone(&stream)
            },
        );
        self.raise_revision(sink);
        Ok(MetaOutcome::StreamActivated(stream))
    }

    pub(super) fn update_stream(&mut self, sink: &mut dyn ShardSink, update: &pb::UpdateStream) -> Outcome {
        let stream = self.by_name(&update.namespace, &update.name)?;
        let name = || update.name.clone();
        if stream.revision != update.base_revision {
            return Err(MetaRefusal::RevisionMismatch {
                name: name(),
                actual: Revision::new(stream.revision),
            });
        }
        let new = update.spec.as_ref().ok_or_else(|| MetaRefusal::BadSpec {
            why: "there is none".into(),
        })?;
        let old = spec_of(&stream);
        if let Some(fields) = spec::fixed_difference(old, new) {
            return Err(MetaRefusal::Fixed { name: name(), fields });
        }
        if spec::difference(old, new).is_none() {
            return Ok(MetaOutcome::StreamUpdated(stream));
        }
        self.check_overlap(new, Some(id_of(&stream)))?;
        if new.replicas == 0 {
            return Err(MetaRefusal::BadSpec {
                why: "it has no replicas".into(),
            });
        }
        if new.replicas > old.replicas || new.placement != old.placement {
            self.check_nodes(new, &update.unreachable_nodes)?;
        }
        self.retarget_groups(sink, &stream, new);
        let stream = self.put_stream(
            sink,
            pb::StreamRecord {
                revision: stream.revision + 1,
                spec: Some(new.clone()),
                ..pb::StreamRecord::clone(&stream)
            },
        );
        self.raise_revision(sink);
        Ok(MetaOutcome::StreamUpdated(stream))
    }

    /// The stream's own groups shall have what it wants now. Its shards in pooled groups are split out by the planner.
    fn retarget_groups(&mut self, sink: &mut dyn ShardSink, stream: &pb::StreamRecord, spec: &StreamSpec) {
        for place in &stream.shards {
            let group_id = place.moving.as_ref().map_or(place.group_id, |moving| moving.to_group);
            let Some(group) = self.groups.get(&GroupId::new(group_id)) else {
                continue;
            };
            let differs = wanted_replicas(group) != spec.replicas || group.placement != spec.placement;
            if group.pooled || !differs {
                continue;
            }
            let group = pb::GroupRecord {
                replica_count: spec.replicas,
                placement: spec.placement.clone(),
                ..pb::GroupRecord::clone(group)
            };
            self.put_group(sink, group);
        }
    }

    pub(super) fn remove_stream(
        &mut self,
        sink: &mut dyn ShardSink,
        time_us: u64,
        remove: &pb::RemoveStream,
    ) -> Outcome {
        let stream = self.by_name(&remove.namespace, &remove.name)?;
        if let Some(expected) = remove.expected_revision
            && expected != stream.revision
        {
            return Err(MetaRefusal::RevisionMismatch {
                name: remove.name.clone(),
                actual: Revision::new(stream.revision),
            });
        }
        let stream = self.put_stream(
            sink,
            pb::StreamRecord {
                revision: stream.revision + 1,
                state: StreamState::Removed as i32,
                removed_us: Some(time_us),
                removed_until_us: time_us.saturating_add(remove.grace_us),
                doomed: remove.grace_us == 0,
                ..pb::StreamRecord::clone(&stream)
            },
        );
        self.raise_revision(sink);
        Ok(MetaOutcome::StreamRemoved(stream))
    }

    pub(super) fn undelete_stream(
        &mut self,
        sink: &mut dyn ShardSink,
        time_us: u64,
        undelete: &pb::UndeleteStream,
    ) -> Outcome {
        let stream = self.find_removed(undelete)?;
        let name = || undelete.name.clone();
        if stream.doomed || stream.removed_until_us <= time_us {
            return Err(MetaRefusal::GraceEnded { name: name() });
        }
        if self.stream_by_name(&undelete.namespace, &undelete.name).is_some() {
            return Err(MetaRefusal::NameTaken { name: name() });
        }
        self.check_overlap(spec_of(&stream), None)?;
        // It may have been removed before its shards were all there: the proposer finds out and activates it.
        let stream = self.put_stream(
            sink,
            pb::StreamRecord {
                revision: stream.revision + 1,
                state: StreamState::Creating as i32,
                removed_us: None,
                removed_until_us: 0,
                ..pb::StreamRecord::clone(&stream)
            },
        );
        self.raise_revision(sink);
        Ok(MetaOutcome::StreamUndeleted(stream))
    }

    /// The removed stream that is meant: the one with this id, or the one of this name that was removed last.
    fn find_removed(&self, undelete: &pb::UndeleteStream) -> Result<Arc<pb::StreamRecord>, MetaRefusal> {
        let not_found = || MetaRefusal::NotFound {
            name: undelete.name.clone(),
        };
        let is_meant = |stream: &&Arc<pb::StreamRecord>| {
            let spec = spec_of(stream);
            spec.namespace == undelete.namespace && spec.name == undelete.name
        };
        let stream = match &undelete.stream_id {
            Some(id) => self.by_id(id).ok().filter(|stream| is_meant(&stream)),
            None => self
                .streams
                .values()
                .filter(|stream| !is_live(stream))
                .filter(is_meant)
                .max_by_key(|stream| (stream.removed_us, stream.created_us))
                .cloned(),
        };
        let stream = stream.ok_or_else(not_found)?;
        if is_live(&stream) {
            return Err(wrong_state(&stream));
        }
        Ok(stream)
    }

    pub(super) fn forget_stream(
        &mut self,
        sink: &mut dyn ShardSink,
        time_us: u64,
        forget: &pb::ForgetStream,
    ) -> Outcome {
        let stream = self.by_id(&forget.stream_id)?;
        if is_live(&stream) {
            return Err(wrong_state(&stream));
        }
        if !stream.doomed && (forget.dropped || stream.removed_until_us > time_us) {
            return Err(MetaRefusal::GraceNotEnded {
                name: spec_of(&stream).name.clone(),
                removed_until_us: stream.removed_until_us,
            });
        }
        if !forget.dropped {
            if stream.doomed {
                return Ok(MetaOutcome::StreamDoomed(stream));
            }
            let stream = self.put_stream(
                sink,
                pb::StreamRecord {
                    doomed: true,
                    ..pb::StreamRecord::clone(&stream)
                },
            );
            self.raise_revision(sink);
            return Ok(MetaOutcome::StreamDoomed(stream));
        }
        if let Some(shard) = self.moving_shard(&stream) {
            return Err(MetaRefusal::InFlight {
                what: format!("shard {shard} is on its way to another group"),
            });
        }
        let id = id_of(&stream);
        self.streams.remove(&id);
        sink.drop_meta(MetaKind::Stream, &id.get().to_be_bytes());
        self.release_shards(sink, &stream.shards);
        if let Some(cluster) = &self.cluster {
            // The last shards of groups that were lost with their nodes may have been these.
            let mut cluster = pb::ClusterRecord::clone(cluster);
            self.renew_lost_pool(sink, &mut cluster, &[], Some(&stream.shards));
            self.put_cluster(sink, cluster);
        }
        Ok(MetaOutcome::StreamForgotten(stream))
    }

    fn by_name(&self, namespace: &str, name: &str) -> Result<Arc<pb::StreamRecord>, MetaRefusal> {
        let stream = self.stream_by_name(namespace, name).cloned();
        stream.ok_or_else(|| MetaRefusal::NotFound { name: name.to_string() })
    }

    fn by_id(&self, id: &str) -> Result<Arc<pb::StreamRecord>, MetaRefusal> {
        let stream = StreamId::parse(id).and_then(|id| self.streams.get(&id)).cloned();
        stream.ok_or_else(|| MetaRefusal::NotFound { name: id.to_string() })
    }

    /// No subject may belong to two live streams of a namespace.
    fn check_overlap(&self, spec: &StreamSpec, except: Option<StreamId>) -> Result<(), MetaRefusal> {
        let filters = filters_of(spec)?;
        let Some(index) = self.subjects.get(&spec.namespace) else {
            return Ok(());
        };
        for ours in &filters {
            let Some(id) = index.find_overlap(ours, except) else {
                continue;
            };
            let other = spec_of(&self.streams[&id]);
            let theirs = filters_of(other)?.into_iter().find(|theirs| theirs.overlaps(ours));
            return Err(MetaRefusal::SubjectsOverlap {
                ours: ours.to_string(),
                theirs: theirs.map(|theirs| theirs.to_string()).unwrap_or_default(),
                stream: other.name.clone(),
            });
        }
        Ok(())
    }
}

fn wrong_state(stream: &pb::StreamRecord) -> MetaRefusal {
    MetaRefusal::WrongState {
        name: spec_of(stream).name.clone(),
        state: match stream.state() {
            StreamState::Unspecified => "in no known state",
            StreamState::Creating => "still being created",
            StreamState::Active => "active",
            StreamState::Removed => "removed",
        },
    }
}
