//! The cluster, its nodes, its groups and shards, and what is wrong with them.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use super::{Names, Operations, OrderError, PATIENCE};
use crate::control::reports::events::Look;
use crate::control::reports::problems::problems;
use crate::control::reports::{Gathered, Picture, Watcher};
use crate::control::version;
use crate::control::view::StreamView;
use crate::machine::placement::Settings;
use crate::model::{GroupId, NodeId, StreamId};
use crate::wire::{internal as pb, v1};

/// Which shards are asked about.
#[derive(Debug, Clone, Default)]
pub struct ReportQuery {
    /// Namespace and name.
    pub stream: Option<(String, String)>,
    /// By index; empty: all.
    pub shards: Vec<u32>,
    pub page_size: usize,
    /// Where the page before ended.
    pub after: String,
    pub patience: Duration,
}

/// A shard in the order of reports.
struct Listed {
    key: String,
    stream: Arc<StreamView>,
    index: usize,
}

/// Namespace, name, id and index, in the order of reports. Names have no blanks.
fn key(stream: &StreamView, index: u32) -> String {
    format!(
        "{} {} {} {index:06}",
        stream.spec.namespace, stream.spec.name, stream.id
    )
}

fn is_live(stream: &StreamView) -> bool {
    matches!(stream.state, v1::StreamState::Creating | v1::StreamState::Active)
}

impl Operations {
    async fn gather_all(&self, shards: bool, patience: Duration) -> Gathered {
        let call = pb::NodeReportCall {
            shards,
            ..pb::NodeReportCall::default()
        };
        self.gatherer.all(&call, patience).await
    }

    fn reports(&self, picture: &Picture<'_>, names: &Names) -> Vec<v1::GroupReport> {
        let heard = |node| self.gatherer.heard_us(node);
        let name = |node| names.of(node);
        let records = self.view().group_records();
        records
            .iter()
            .map(|record| picture.group(record, &name, &heard))
            .collect()
    }

    fn meta_report(&self, picture: &Picture<'_>, names: &Names) -> v1::GroupReport {
        let heard = |node| self.gatherer.heard_us(node);
        picture.group(&self.meta_record(), &|node| names.of(node), &heard)
    }

    /// Who the cluster is, and who leads its catalog.
    pub async fn cluster(&self) -> v1::GetClusterResponse {
        let call = pb::NodeReportCall {
            groups: vec![GroupId::META.get()],
            ..pb::NodeReportCall::default()
        };
        let gathered = self.gatherer.all(&call, PATIENCE).await;
        let picture = Picture::of(&gathered);
        let record = self.view().cluster().unwrap_or_default();
        let settings = Settings::of(&record);
        let nodes = self.view().nodes();
        let present = nodes.iter().filter(|n| n.state() != pb::NodeState::Removed).count();
        let (_, newest) = version::known(&nodes);
        let held_back = nodes
            .iter()
            .filter(|n| n.state() != pb::NodeState::Removed && version::knows(n) < newest);
        let streams = self.view().all_streams();
        let streams: Vec<_> = streams.iter().filter(|s| is_live(s)).collect();
        v1::GetClusterResponse {
            cluster_id: record.cluster_id,
            name: record.cluster_name,
            version: env!("CARGO_PKG_VERSION").to_owned(),
            cluster_version: record.cluster_version.max(1),
            cluster_version_known: newest,
            held_back_by: held_back.map(|n| n.node_id).collect(),
            revision: record.revision,
            meta: Some(self.meta_report(&picture, &self.names())),
            nodes: present as u32,
            live_nodes: gathered.reports.len() as u32,
            streams: streams.len() as u64,
            shards: streams.iter().map(|s| s.shards.len() as u64).sum(),
            groups: self.view().group_records().len() as u64,
            answered_by: self.node().get(),
            settings: Some(v1::ClusterSettings {
                meta_voters_max: settings.meta_voters_max,
                replace_after_us: settings.replace_after_us,
                moves_per_node_max: settings.moves_per_node_max,
            }),
        }
    }

    /// Every node.
    pub async fn nodes(&self, include_removed: bool, patience: Duration) -> Vec<v1::Node> {
        let gathered = self.gather_all(false, patience).await;
        self.nodes_of(&gathered, include_removed)
    }

    pub(super) fn nodes_of(&self, gathered: &Gathered, include_removed: bool) -> Vec<v1::Node> {
        let nodes = self.view().nodes();
        let told = nodes
            .iter()
            .filter(|node| include_removed || node.state() != pb::NodeState::Removed);
        let picture = Picture::of(gathered);
        let records = self.view().group_records();
        let meta = self.meta_report(&picture, &self.names());
        told.map(|node| self.node_of(node, gathered, &picture, &records, &meta))
            .collect()
    }

    fn node_of(
        &self,
        node: &pb::NodeRecord,
        gathered: &Gathered,
        picture: &Picture<'_>,
        records: &[Arc<pb::GroupRecord>],
        meta: &v1::GroupReport,
    ) -> v1::Node {
        let id = NodeId::new(node.node_id);
        let report = gathered.reports.get(&id);
        let mut told = v1::Node {
            node_id: node.node_id,
            name: node.name.clone(),
            zone: node.zone.clone(),
            tags: node.tags.clone(),
            state: match node.state() {
                pb::NodeState::Active => v1::NodeState::Active,
                pb::NodeState::Draining => v1::NodeState::Draining,
                pb::NodeState::Removed => v1::NodeState::Removed,
            }
            .into(),
            live: report.is_some(),
            incarnation: node.incarnation,
            client_address: node.client_address.clone(),
            peer_address: node.peer_address.clone(),
            version: report.map_or_else(|| node.binary_version.clone(), |r| r.version.clone()),
            bytes: report.map(|r| r.bytes),
            free_bytes: report.map(|r| r.free_bytes),
            used_bytes: report.map(|r| r.used_bytes),
            alarms: report.map(|r| r.alarms.clone()).unwrap_or_default(),
            registered_us: node.registered_us,
            restarted_us: node.restarted_us,
            cluster_version_max: version::knows(node),
            ..v1::Node::default()
        };
        if report.is_none() && node.state() != pb::NodeState::Removed {
            told.silence = gathered.silent.get(&id).cloned().unwrap_or_default();
            told.last_heard_us = self.gatherer.heard_us(id);
        }
        for record in records {
            let Some(replica) = record.replicas.iter().find(|r| r.node_id == node.node_id) else {
                continue;
            };
            told.replicas += 1;
            let leader = picture.leader(GroupId::new(record.group_id));
            told.leaders += u32::from(leader.is_some_and(|(at, _)| at == id));
            if let Some(change) = &record.change {
                told.replicas_coming += u32::from(change.add.contains(&replica.replica_id));
                told.replicas_leaving += u32::from(change.remove.contains(&replica.replica_id));
            }
        }
        let role = meta.replicas.iter().find(|r| r.node_id == node.node_id).map(|r| {
            if r.leader {
                "leader"
            } else if r.voter {
                "voter"
            } else {
                "learner"
            }
        });
        told.meta_role = role.unwrap_or_default().to_owned();
        told
    }

    fn listed(&self, streams: &[Arc<StreamView>], shards: &[u32]) -> Vec<Listed> {
        let mut listed: Vec<_> = streams
            .iter()
            .filter(|stream| is_live(stream))
            .flat_map(|stream| {
                let wanted = stream.shards.iter().enumerate();
                let wanted = wanted.filter(|(_, place)| shards.is_empty() || shards.contains(&place.index));
                wanted.map(|(index, place)| Listed {
                    key: key(stream, place.index),
                    stream: stream.clone(),
                    index,
                })
            })
            .collect();
        listed.sort_by(|a, b| a.key.cmp(&b.key));
        listed
    }

    /// How groups and shards stand.
    pub async fn report(&self, query: &ReportQuery) -> Result<v1::GetReportResponse, OrderError> {
        let streams = match &query.stream {
            Some((namespace, name)) => vec![self.find_stream(namespace, name).await?],
            None => self.view().all_streams(),
        };
        if let [stream] = streams.as_slice()
            && query.stream.is_some()
            && let Some(index) = query.shards.iter().find(|i| **i as usize >= stream.shards.len())
        {
            return Err(OrderError::NoSuchShard {
                stream: stream.spec.name.clone(),
                shards: stream.shards.len(),
                index: *index,
            });
        }
        let gathered = self.gather_all(true, query.patience).await;
        let picture = Picture::of(&gathered);
        let names = self.names();
        let listed = self.listed(&streams, &query.shards);
        let all = self.reports(&picture, &names);
        let by_group: HashMap<u64, &v1::GroupReport> = all.iter().map(|g| (g.group_id, g)).collect();
        // With a stream named, only what holds it matters.
        let asked: Option<HashSet<u64>> = query.stream.is_some().then(|| {
            let places = listed.iter().map(|l| l.stream.shards[l.index].group.get());
            places.collect()
        });
        let matters = |group: &&v1::GroupReport| asked.as_ref().is_none_or(|asked| asked.contains(&group.group_id));
        let moving = self.moves(&streams);
        let moving_ids: HashSet<u64> = moving.iter().map(|m| m.shard_id).collect();
        let told: Vec<_> = listed
            .iter()
            .map(|l| shard_report(l, &by_group, &picture, &moving_ids))
            .collect();
        let meta = self.meta_report(&picture, &names);
        let mut relevant: Vec<_> = all.iter().filter(matters).cloned().collect();
        let summary = summary(&told, &relevant, moving.len(), &gathered);
        let first_page = query.after.is_empty();
        let begin = listed.partition_point(|l| l.key.as_str() <= query.after.as_str());
        let begin = if first_page { 0 } else { begin };
        let end = listed.len().min(begin + query.page_size.max(1));
        let page = &told[begin..end];
        let on_page: HashSet<u64> = page.iter().map(|s| s.group_id).collect();
        let mut wrong = relevant.clone();
        wrong.push(meta.clone());
        let problems = problems(&gathered, &wrong, &shard_names(&self.view().all_streams()), &|n| {
            names.of(n)
        });
        relevant.retain(|g| on_page.contains(&g.group_id) || (first_page && asked.is_none() && g.shards == 0));
        Ok(v1::GetReportResponse {
            shards: page.to_vec(),
            groups: relevant,
            summary: Some(summary),
            problems,
            silent_nodes: self.silent(&gathered, &names),
            time_us: gathered.time_us,
            revision: self.view().cluster().map_or(0, |c| c.revision),
            next_page_token: match listed.get(end) {
                Some(_) => listed[end - 1].key.clone(),
                None => String::new(),
            },
            moves: if first_page { moving } else { Vec::new() },
            meta: first_page.then_some(meta),
            answered_by: self.node().get(),
        })
    }

    pub(super) fn silent(&self, gathered: &Gathered, names: &Names) -> Vec<v1::SilentNode> {
        let silent = gathered.silent.iter();
        silent
            .map(|(node, reason)| v1::SilentNode {
                node_id: node.get(),
                name: names.of(*node),
                reason: reason.clone(),
                last_heard_us: self.gatherer.heard_us(*node),
            })
            .collect()
    }

    fn moves(&self, streams: &[Arc<StreamView>]) -> Vec<v1::ShardMoveReport> {
        let by_id: HashMap<StreamId, &Arc<StreamView>> = streams.iter().map(|s| (s.id, s)).collect();
        let told = |m: &crate::machine::placement::MoveShape| {
            let stream = by_id.get(&m.stream)?;
            Some(v1::ShardMoveReport {
                shard_id: m.shard.get(),
                namespace: stream.spec.namespace.clone(),
                stream: stream.spec.name.clone(),
                index: stream.shards.iter().find(|p| p.shard == m.shard).map_or(0, |p| p.index),
                from_group: m.from.get(),
                to_group: m.to.get(),
                step: match m.step() {
                    pb::MoveStep::Unspecified => "",
                    pb::MoveStep::Planned => "planned",
                    pb::MoveStep::Sealed => "sealed",
                    pb::MoveStep::Adopted => "adopted",
                    pb::MoveStep::GivenUp => "given up",
                }
                .to_owned(),
                started_us: m.record.started_us,
            })
        };
        let shape = self.view().shape().unwrap_or_default();
        shape.moves.iter().filter_map(told).collect()
    }

    /// What has happened since `watcher` looked last.
    pub async fn events(&self, watcher: &mut Watcher, patience: Duration) -> Vec<v1::ClusterEvent> {
        let gathered = self.gather_all(false, patience).await;
        let picture = Picture::of(&gathered);
        let names = self.names();
        let mut groups = self.reports(&picture, &names);
        groups.push(self.meta_report(&picture, &names));
        let problems = problems(&gathered, &groups, &shard_names(&self.view().all_streams()), &|n| {
            names.of(n)
        });
        watcher.see(&Look {
            time_us: gathered.time_us,
            nodes: self.nodes_of(&gathered, true),
            groups,
            problems,
        })
    }
}

fn shard_report(
    listed: &Listed,
    groups: &HashMap<u64, &v1::GroupReport>,
    picture: &Picture<'_>,
    moving: &HashSet<u64>,
) -> v1::ShardReport {
    let place = listed.stream.shards[listed.index];
    let group = groups.get(&place.group.get());
    let at = picture.shard(place.group, place.shard.get());
    v1::ShardReport {
        namespace: listed.stream.spec.namespace.clone(),
        stream: listed.stream.spec.name.clone(),
        stream_id: listed.stream.id.to_string(),
        index: place.index,
        shard_id: place.shard.get(),
        group_id: place.group.get(),
        leader_node: group.and_then(|g| g.leader_node),
        floor: at.map(|s| s.floor),
        tail: at.map(|s| s.tail),
        messages: at.map(|s| s.messages),
        bytes: at.map(|s| s.bytes),
        last_time_us: at.and_then(|s| s.last_time_us),
        leaderless: group.is_none_or(|g| g.leaderless),
        under_replicated: group.is_none_or(|g| g.under_replicated),
        replicas_wanted: listed.stream.spec.replicas,
        moving: moving.contains(&place.shard.get()),
    }
}

fn summary(
    shards: &[v1::ShardReport],
    groups: &[v1::GroupReport],
    moves: usize,
    gathered: &Gathered,
) -> v1::ReportSummary {
    let count = |is: &dyn Fn(&v1::GroupReport) -> bool| groups.iter().filter(|g| is(g)).count() as u64;
    v1::ReportSummary {
        shards: shards.len() as u64,
        groups: groups.len() as u64,
        leaderless_shards: shards.iter().filter(|s| s.leaderless).count() as u64,
        under_replicated_shards: shards.iter().filter(|s| s.under_replicated).count() as u64,
        leaderless_groups: count(&|g| g.leaderless),
        under_replicated_groups: count(&|g| g.under_replicated),
        no_quorum_groups: count(&|g| g.leaderless || (g.voters > 0 && g.quorum_have < g.quorum_need)),
        changes: count(&|g| g.change.is_some()),
        moves: moves as u64,
        nodes: (gathered.reports.len() + gathered.silent.len()) as u32,
        live_nodes: gathered.reports.len() as u32,
    }
}

/// The shards of each group, as people name them.
fn shard_names(streams: &[Arc<StreamView>]) -> BTreeMap<u64, Vec<String>> {
    let mut names: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    for stream in streams.iter().filter(|s| is_live(s)) {
        for place in &stream.shards {
            names
                .entry(place.group.get())
                .or_default()
                .push(format!("{}/{}", stream.spec.name, place.index));
        }
    }
    for list in names.values_mut() {
        list.sort_unstable();
    }
    names
}
