//! Who leads what, in the log: what happens to the replicas here within a moment is one line, however much it is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::broadcast::error::RecvError;
use tokio_util::sync::CancellationToken;

use super::view::View;
use crate::model::{GroupId, ReplicaId};
use crate::raft::{GroupEvent, Groups};

/// What happens within this time is told together.
const GATHER: Duration = Duration::from_secs(1);
/// Groups that a line names.
const NAMED_MAX: usize = 8;

/// Runs until cancelled.
pub(super) async fn tell(groups: Arc<Groups>, view: Arc<View>, token: CancellationToken) {
    let mut events = groups.events();
    let mut news = BTreeMap::new();
    loop {
        let Some(first) = token.run_until_cancelled(events.recv()).await else {
            return;
        };
        if !take(&mut news, first) {
            return;
        }
        let gathered = tokio::time::timeout(GATHER, async { while take(&mut news, events.recv().await) {} });
        if token.run_until_cancelled(gathered).await.is_none() {
            return;
        }
        say(&std::mem::take(&mut news), &view);
    }
}

/// False: nothing comes any more.
fn take(news: &mut BTreeMap<GroupId, Option<ReplicaId>>, event: Result<GroupEvent, RecvError>) -> bool {
    match event {
        Ok(GroupEvent::Leader { group, leader, .. }) => drop(news.insert(group, leader)),
        // Told where it happens.
        Ok(GroupEvent::Removed { .. } | GroupEvent::Stopped { .. }) => {}
        // So many at a time that some were missed: the newest of each group are those that count.
        Err(RecvError::Lagged(_)) => {}
        Err(RecvError::Closed) => return false,
    }
    true
}

fn say(news: &BTreeMap<GroupId, Option<ReplicaId>>, view: &View) {
    let name = |group: GroupId, replica: ReplicaId| {
        let place = view.group(group);
        let found = place.iter().flat_map(|p| &p.replicas).find(|(r, _)| *r == replica);
        let node = found.map(|(_, node)| *node).or_else(|| view.meta_node(replica));
        let named = node.and_then(|node| view.node(node)).map(|node| node.name);
        named.unwrap_or_else(|| replica.to_string())
    };
    let called = |group: GroupId| match group {
        GroupId::META => "the meta group".to_owned(),
        group => group.to_string(),
    };
    let led: Vec<_> = news
        .iter()
        .filter_map(|(group, leader)| Some(format!("{} by {}", called(*group), name(*group, (*leader)?))))
        .collect();
    let unled: Vec<_> = news
        .iter()
        .filter(|(_, l)| l.is_none())
        .map(|(g, _)| called(*g))
        .collect();
    if !led.is_empty() {
        tracing::info!("led now: {}", some_of(&led));
    }
    if !unled.is_empty() {
        tracing::warn!("no leader known: {}", some_of(&unled));
    }
}

fn some_of(all: &[String]) -> String {
    match all.get(..NAMED_MAX) {
        Some(some) if all.len() > NAMED_MAX => format!("{} and {} more", some.join(", "), all.len() - NAMED_MAX),
        Some(_) | None => all.join(", "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_are_counted() {
        let all: Vec<_> = (1..=10).map(|n| format!("g{n}")).collect();
        assert_eq!(some_of(&all[..2]), "g1, g2");
        assert_eq!(some_of(&all), "g1, g2, g3, g4, g5, g6, g7, g8 and 2 more");
    }
}
