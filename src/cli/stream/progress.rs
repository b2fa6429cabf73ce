//! How far a change of a stream's replicas is, told until it is over.

use std::time::{Duration, Instant};

use crate::cli::failure::{Exit, Failure};
use crate::cli::output;
use crate::client::Client;
use crate::client::proto::{GetReportResponse, GroupReport, PlanResponse, ReplicaState, ShardReport};

/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// What was seen.
#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    in_place: u32,
    wanted: u32,
    surplus: u32,
    waits: Vec<String>,
}

impl Progress {
    fn is_done(&self) -> bool {
        self.in_place == self.wanted && self.surplus == 0 && self.waits.is_empty()
    }

    fn of(report: &GetReportResponse, plan: &PlanResponse) -> Self {
        let mut progress = Self::default();
        for shard in &report.shards {
            let group = report.groups.iter().find(|g| g.group_id == shard.group_id);
            progress.add(shard, group, report, plan);
        }
        progress.waits.dedup();
        progress
    }

    fn add(
        &mut self,
        shard: &ShardReport,
        group: Option<&GroupReport>,
        report: &GetReportResponse,
        plan: &PlanResponse,
    ) {
        let wanted = shard.replicas_wanted;
        self.wanted += wanted;
        let Some(group) = group else {
            self.waits
                .push(format!("shard {}: nobody tells of its group", shard.index));
            return;
        };
        let current = |r: &&crate::client::proto::ReplicaReport| r.voter && r.state() == ReplicaState::Current;
        let current = group.replicas.iter().filter(current).count();
        self.in_place += wanted.min(u32::try_from(current).unwrap_or(u32::MAX));
        self.surplus += group.voters.saturating_sub(wanted);
        let of = format!("shard {} (g{})", shard.index, group.group_id);
        if let Some(on) = report.moves.iter().find(|m| m.shard_id == shard.shard_id) {
            let text = match on.step.as_str() {
                "planned" => "its new group is being formed",
                "sealed" => "it changes groups",
                _ => "the logs of both its groups are being shortened",
            };
            self.waits
                .push(format!("{of} gets a group of its own (g{}): {text}", on.to_group));
            return;
        }
        if let Some(change) = &group.change {
            let text = match (change.waiting_for.as_str(), change.ready) {
                ("", true) => "its voters are being changed",
                ("", false) => "new replicas are catching up",
                (text, _) => text,
            };
            self.waits.push(format!("{of}: {text}"));
            return;
        }
        // Who leads is no part of it.
        let planned = |a: &&crate::client::proto::PlannedAction| {
            a.group_id == Some(group.group_id) && !a.action.contains("hand leadership")
        };
        if let Some(action) = plan.actions.iter().find(planned) {
            let blocked = match action.blocked_by.as_str() {
                "" => String::new(),
                text => format!(", which waits: {text}"),
            };
            self.waits.push(format!("{of}: next is {}{blocked}", action.action));
        } else if group.replicas_wanted != wanted {
            self.waits.push(format!("{of} is to get a group of its own"));
        }
    }

    fn text(&self) -> String {
        let mut text = format!("{} of {} replicas are in place", self.in_place, self.wanted);
        if self.surplus > 0 {
            text.push_str(&format!(", {} more are to go", self.surplus));
        }
        match self.waits.as_slice() {
            [] => {}
            [one] => text.push_str(&format!("; {one}")),
            [first, rest @ ..] => text.push_str(&format!("; {first}; and {} more", rest.len())),
        }
        text
    }
}

/// Waits until a stream has the replicas that it wants, where it wants them.
pub(super) async fn wait(client: &Client, name: &str, within: Option<Duration>) -> Result<(), Failure> {
    let begun = Instant::now();
    let mut said = String::new();
    loop {
        let looked = look(client, name).await;
        let (done, text) = match looked {
            Ok(progress) => (progress.is_done(), progress.text()),
            // Between two leaders nobody can tell; it goes on all the same.
            Err(e) if e.is_unavailable() => (false, format!("waiting for the cluster: {}", e.message)),
            Err(e) => return Err(e.into()),
        };
        // Each news once.
        if text != said {
            output::status(&text);
            said = text;
        }
        if done {
            return Ok(());
        }
        if within.is_some_and(|within| begun.elapsed() >= within) {
            return Err(Failure::new(Exit::Failed, format!("not done yet: {said}")).hint(
                "the change goes on; `mainstem stream report NAME` and `mainstem cluster balance --dry-run` show how far it is",
            ));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

async fn look(client: &Client, name: &str) -> Result<Progress, crate::client::ClientError> {
    let report = client.cluster_report(Some(name), Vec::new()).await?;
    let plan = client.plan().await?;
    Ok(Progress::of(&report, &plan))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::proto::{PlannedAction, ReplicaReport, ShardMoveReport};

    fn group(voters: u32, wanted: u32) -> GroupReport {
        let replica = |n: u32| ReplicaReport {
            node_id: u64::from(n),
            voter: true,
            state: ReplicaState::Current.into(),
            ..ReplicaReport::default()
        };
        GroupReport {
            group_id: 7,
            voters,
            replicas_wanted: wanted,
            replicas: (1..=voters).map(replica).collect(),
            ..GroupReport::default()
        }
    }

    fn report(group: GroupReport) -> GetReportResponse {
        let shard = ShardReport {
            group_id: 7,
            shard_id: 4,
            replicas_wanted: 3,
            ..ShardReport::default()
        };
        GetReportResponse {
            shards: vec![shard],
            groups: vec![group],
            ..GetReportResponse::default()
        }
    }

    #[test]
    fn a_change_is_told_from_its_begin_to_its_end() {
        let none = PlanResponse::default();
        let mut first = report(group(1, 1));
        let told = Progress::of(&first, &none);
        assert!(!told.is_done());
        assert_eq!(
            told.text(),
            "1 of 3 replicas are in place; shard 0 (g7) is to get a group of its own"
        );
        first.moves.push(ShardMoveReport {
            shard_id: 4,
            to_group: 9,
            step: "sealed".into(),
            ..ShardMoveReport::default()
        });
        let told = Progress::of(&first, &none).text();
        assert!(
            told.ends_with("gets a group of its own (g9): it changes groups"),
            "{told}"
        );
        let plan = PlanResponse {
            actions: vec![PlannedAction {
                action: "g7: add a replica on n2".into(),
                blocked_by: "g7 has no leader".into(),
                group_id: Some(7),
                ..PlannedAction::default()
            }],
            ..PlanResponse::default()
        };
        let told = Progress::of(&report(group(1, 3)), &plan).text();
        assert!(
            told.contains("next is g7: add a replica on n2, which waits: g7 has no leader"),
            "{told}"
        );
        let told = Progress::of(&report(group(5, 3)), &none);
        assert_eq!(told.text(), "3 of 3 replicas are in place, 2 more are to go");
        assert!(!told.is_done());
        let done = Progress::of(&report(group(3, 3)), &none);
        assert!(done.is_done(), "{done:?}");
    }
}
