//! Shards from group to group: the next step of each that is on its way, and those that must be split out of a pooled
//! group because their stream wants other replicas.

use super::{Planner, Step};
use crate::machine::placement::{GroupShape, MoveShape, ReplicaShape};
use crate::model::{GroupId, LogIndex};
use crate::wire::internal::v1::{ChangeReason, MoveStep, NodeState};

/// Shards on their way at a time: each keeps two groups from changing.
const MOVES_MAX: usize = 8;

impl Planner<'_> {
    pub(super) fn plan_moves(&mut self) {
        let view = self.view;
        for moving in &view.moves {
            let why = match moving.record.reason() == ChangeReason::Scale {
                true => "its stream wants other replicas than its group has".to_string(),
                false => format!("on its way from {} to {}", moving.from, moving.to),
            };
            let (step, blocked) = self.next_step(moving);
            match blocked {
                Some(blocked) => self.blocked(step, why, blocked),
                None => self.act(step, why),
            }
        }
    }

    fn next_step(&self, moving: &MoveShape) -> (Step, Option<String>) {
        let (stream, shard, move_id) = (moving.stream, moving.shard, moving.record.move_id);
        let (from, to) = (moving.from, moving.to);
        match (moving.step(), &moving.record.seal) {
            (MoveStep::Sealed, Some(seal)) => {
                let step = Step::AdoptShard {
                    stream,
                    shard,
                    move_id,
                    from,
                    to,
                    seal: *seal,
                };
                (step, self.no_leader(to))
            }
            (MoveStep::Adopted, _) => {
                let step = Step::FinishMove { stream, shard, move_id };
                (step, self.reaches_back(from).or_else(|| self.reaches_back(to)))
            }
            (MoveStep::GivenUp, _) => {
                let step = Step::UnsealShard {
                    stream,
                    shard,
                    move_id,
                    group: from,
                };
                (step, self.no_leader(from))
            }
            (MoveStep::Planned | MoveStep::Sealed | MoveStep::Unspecified, _) => {
                let step = Step::SealShard {
                    stream,
                    shard,
                    move_id,
                    from,
                    to,
                };
                // The shard takes nothing between the seal and the adoption: the heir must be ready.
                let formed = self.view.groups.get(&to).is_some_and(|group| group.formed);
                let blocked = (!formed).then(|| format!("{to} is not formed yet"));
                let blocked = blocked.or_else(|| self.no_leader(to)).or_else(|| self.no_leader(from));
                let blocked = blocked.or_else(|| self.one_away(self.view.groups.get(&from)?));
                (step, blocked)
            }
        }
    }

    /// A replica that cannot say now that it has applied the seal. All must, but those of nodes that never come back.
    fn one_away(&self, group: &GroupShape) -> Option<String> {
        let told = self.reports.groups.get(&group.id);
        let away = |replica: &&ReplicaShape| {
            let runs = self.is_live(replica.node) && !self.reports.is_damaged(replica.node, replica.id);
            let current = told.is_some_and(|told| told.current.contains(&replica.id));
            self.state(replica.node) != NodeState::Removed && !(runs && current)
        };
        let away = group.replicas.iter().find(away)?;
        Some(format!(
            "a shard leaves {} while every replica of it is there, and that on {} is not, or is behind: start \
             the node, or remove it if it never comes back",
            group.id,
            self.name(away.node)
        ))
    }

    fn no_leader(&self, group: GroupId) -> Option<String> {
        let led = self.reports.groups.contains_key(&group);
        (!led).then(|| format!("{group} has no leader"))
    }

    /// A live replica of the group whose log still holds the seal or the adoption.
    fn reaches_back(&self, group: GroupId) -> Option<String> {
        let group = self.view.groups.get(&group)?;
        let floor = LogIndex::new(group.log_floor);
        let late = group.replicas.iter().find(|replica| {
            let report = self.reports.nodes.get(&replica.node);
            let purged = report.and_then(|report| report.purged.get(&group.id));
            self.is_live(replica.node) && purged.is_none_or(|purged| *purged < floor)
        })?;
        Some(format!(
            "the log of {} on {} is to be purged up to {floor}",
            group.id,
            self.name(late.node)
        ))
    }

    pub(super) fn plan_splits(&mut self) {
        let view = self.view;
        let mut under_way = view.moves.len();
        for split in &view.splits {
            let Some(group) = view.groups.get(&split.group) else {
                continue;
            };
            let step = Step::SplitShard {
                stream: split.stream,
                shard: split.shard,
                from: split.group,
            };
            let why = format!(
                "stream {} wants {} replicas ({}), its pooled group has {} ({})",
                split.name,
                split.wanted,
                crate::wire::spec::placement_text(split.placement.as_ref()),
                group.wanted,
                crate::wire::spec::placement_text(group.placement.as_ref()),
            );
            let changing = group.change.is_some()
                || self.actions.iter().any(|action| {
                    matches!(action.step, Step::ChangeReplicas { .. }) && action.step.group() == Some(group.id)
                });
            let blocked = if changing {
                Some(format!("{} has a change of its replicas under way", group.id))
            } else if under_way >= MOVES_MAX {
                Some(format!("{under_way} shards are on their way already"))
            } else {
                self.standing(group).obstacle().or_else(|| self.one_away(group))
            };
            match blocked {
                Some(blocked) => self.blocked(step, why, blocked),
                None => {
                    under_way += 1;
                    self.restless = true;
                    self.busy.insert(group.id);
                    self.act(step, why);
                }
            }
        }
    }
}
