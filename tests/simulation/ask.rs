//! What is asked of a node, by those who are not in it: proposals, reads, changes of members. Runs as a task of the node
//! and puts its answer where the simulation finds it.

use std::collections::BTreeSet;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstem::base::RetryClass;
use mainstem::model::{GroupId, LogIndex, ReplicaId, Sequence, ShardId};
use mainstem::raft::{Applied, Group, Groups, ProposeError};
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::invariants::log_matching::Leader;

#[derive(Debug, Clone)]
pub enum Ask {
    Propose(Bytes),
    /// As `Propose`, but answered when the entry is in the leader's hands: a planted bug.
    ProposeCarelessly(Bytes),
    Read(ShardId),
    AddLearner(ReplicaId),
    Change(BTreeSet<ReplicaId>),
    HandOver(ReplicaId),
    /// Apply so much, and flush.
    Flush(LogIndex),
}

#[derive(Debug, Clone, PartialEq)]
pub enum Told {
    /// Index and leader of the entry, and what applying it answered.
    Applied(u64, Leader, Applied),
    /// It is said to be done; nobody knows where.
    Early,
    Tail(Sequence),
    Done,
    Failed(RetryClass, Option<ReplicaId>, String),
    /// The node ended first, or did not answer in time.
    Lost,
}

pub type Answers = Arc<Mutex<Vec<(u64, Told)>>>;

/// How long a change of leaders may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Begins to work on it. Answered in `answers` under this id.
pub async fn serve(id: u64, group: Group, groups: Arc<Groups>, ask: Ask, answers: Answers) {
    let told = answer(&group, &groups, ask).await;
    answers.lock().push((id, told));
}

async fn answer(group: &Group, groups: &Groups, ask: Ask) -> Told {
    match ask {
        Ask::Propose(command) => match propose(group, command).await {
            Ok((index, term, applied)) => Told::Applied(index, term, applied),
            Err(e) => {
                let leader = match &e {
                    ProposeError::NotLeader { leader, .. } => *leader,
                    ProposeError::Stopped { .. } | ProposeError::Unknown { .. } => None,
                };
                Told::Failed(e.retry_class(), leader, e.to_string())
            }
        },
        Ask::ProposeCarelessly(command) => {
            if !group.status().is_leader {
                return Told::Failed(RetryClass::DidNotHappen, group.status().leader, "does not lead".into());
            }
            match group.propose(command).await {
                Ok(_) => Told::Early,
                Err(e) => Told::Failed(e.retry_class(), None, e.to_string()),
            }
        }
        Ask::Read(shard) => read(group, groups, shard).await.unwrap_or_else(failed),
        Ask::AddLearner(replica) => done(group.add_learner(replica).await),
        Ask::Change(voters) => done(group.change_membership(voters).await),
        Ask::Flush(index) => flush(group, groups, index).await,
        Ask::HandOver(to) => done(group.transfer_leader(to, PATIENCE).await),
    }
}

/// As the control plane does it (`control/executor/moves`).
async fn flush(group: &Group, groups: &Groups, index: LogIndex) -> Told {
    if !group.wait_applied(index, PATIENCE).await {
        return failed("it has not applied so much");
    }
    match groups.state().flush() {
        Ok(()) if groups.state().durable_applied(group.id) >= Some(index) => Told::Done,
        Ok(()) => failed("not flushed so far"),
        Err(e) => failed(e),
    }
}

/// Removes what a removed replica has left. Its part that blocks is done on a thread of `aside`, which has one: nothing else
/// is done meanwhile, so that the thread's pace is no part of what happens.
pub async fn clear_out(id: u64, groups: Arc<Groups>, group: GroupId, aside: Handle, answers: Answers) {
    let told = {
        let mut work = pin!(groups.clear_out(group));
        let mut awaited = false;
        let done = std::future::poll_fn(|cx| {
            loop {
                // From here on the next that it waits for is the thread; before, it is timers and the log.
                let blocks = groups.is_aside(group) && !awaited;
                let entered = blocks.then(|| aside.enter());
                let polled = work.as_mut().poll(cx);
                drop(entered);
                if !blocks || polled.is_ready() {
                    return polled;
                }
                awaited = true;
                let (tx, rx) = std::sync::mpsc::channel();
                // In line behind it.
                aside.spawn_blocking(move || tx.send(()));
                rx.recv().expect("the thread goes on");
            }
        });
        match done.await {
            Ok(()) => Told::Done,
            Err(e) => failed(e),
        }
    };
    answers.lock().push((id, told));
}

/// As the broker does it (`broker/lookup`), but that whoever asks has come to the node that leads.
async fn read(group: &Group, groups: &Groups, shard: ShardId) -> Result<Told, String> {
    let shared = groups.directory().get(shard).ok_or("there is no such shard here")?;
    let mut group = group.clone();
    if shared.came_from(group.id) {
        group = groups.get(shared.group()).ok_or("its group has no replica here")?;
    }
    for _ in 0..4 {
        group.read_barrier().await.map_err(|e| e.to_string())?;
        // What the former group has applied, or the replica here has, shows that the shard went on: then the new one has the
        // last word.
        let Some(next) = shared.went_on_from(group.id) else {
            return Ok(Told::Tail(shared.positions().tail));
        };
        group = groups.get(next).ok_or("the next group has no replica here")?;
    }
    Err("the shard goes from group to group".into())
}

async fn propose(group: &Group, command: Bytes) -> Result<(u64, Leader, Applied), ProposeError> {
    let (index, term, applied) = group.propose(command).await?.wait().await?;
    let by = group.log().id_at(index.get()).map_or(0, |id| id.leader_id.node_id);
    Ok((index.get(), (term.get(), by), applied))
}

fn failed(why: impl ToString) -> Told {
    Told::Failed(RetryClass::MayHaveHappened, None, why.to_string())
}

fn done<T>(result: Result<T, mainstem::raft::ChangeError>) -> Told {
    match result {
        Ok(_) => Told::Done,
        Err(e) => Told::Failed(e.retry_class(), None, e.to_string()),
    }
}
