//! A planted bug: one replica counts the learners of its group among the voters.

use mainstem::model::{GroupId, LogIndex, ReplicaId};
use mainstem::wire::internal as pb;
use prost::Message as _;

use super::ask::Ask;
use super::invariants::Verdict;
use super::net::{MS, NodeNo};
use super::node::replica;
use super::world::{Asker, World};

/// The node that believes so.
const CARELESS: NodeNo = 1;

impl World {
    /// The voters of a group, as most replicas have them.
    pub fn voters_of(&self, group: GroupId) -> Vec<ReplicaId> {
        let all = self.nodes.iter().filter_map(|node| Some(node.group(group)?.members()));
        let least = all.filter(|m| !m.voters.is_empty()).min_by_key(|m| m.voters.len());
        least.map(|m| m.voters.into_iter().collect()).unwrap_or_default()
    }

    /// Makes the nodes without a voter learners, and then rewrites what one voter's log says of the members.
    pub fn plant_voters(&mut self) -> Verdict {
        let groups: Vec<GroupId> = self.scene.groups.iter().map(|(group, _)| *group).collect();
        for group in groups {
            let (voters, leader) = (self.voters_of(group), self.leader(group));
            for no in 1..=self.scene.nodes {
                let new = replica(group, no);
                if let Some(leader) = leader.filter(|_| !voters.contains(&new)) {
                    self.ask(
                        leader,
                        group,
                        Ask::AddLearner(new),
                        Asker::Change(format!("{new} is to learn")),
                    )?;
                    self.run_until(self.now + 200 * MS)?;
                }
            }
            self.crash(CARELESS, false)?;
            self.rewrite(group);
            self.note(format_args!("n{CARELESS} takes the learners of {group} for voters"));
            self.start(CARELESS)?;
        }
        Ok(())
    }

    fn rewrite(&mut self, group: GroupId) {
        let store = self.node(CARELESS).open().expect("the store is whole");
        let log = store.log();
        let meta = log.meta(group).expect("the log can be read");
        let first = meta.first.expect("the log has entries");
        let end = meta.last.map_or(first, LogIndex::next);
        let entries = log.read(group, first, end, usize::MAX).expect("the log can be read");
        let entries = entries.into_iter().map(|(index, raw)| {
            let mut entry = pb::LogEntry::decode(raw).expect("what the log holds can be read");
            if let Some(pb::log_entry::Payload::Membership(members)) = &mut entry.payload {
                for config in &mut members.configs {
                    config.replicas = members.replicas.clone();
                }
            }
            (index, entry.encode_to_vec().into())
        });
        let entries = entries.collect();
        log.truncate_after(group, None, Box::new(|result| result.expect("the log can be written")));
        store.commit_waiting();
        log.append(
            group,
            entries,
            Box::new(|result| result.expect("the log can be written")),
        );
        store.commit_waiting();
    }
}
