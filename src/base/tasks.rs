//! Owned tasks. Every task has a name and a group; a group is told to stop and is waited for; a task that panics is
//! logged and reported, never lost.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use parking_lot::Mutex;
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::base::metric_names as names;

/// A task that ended as it must not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskFailure {
    /// The group's name and the task's: "broker/ingest".
    pub task: String,
    /// The panic's message, or that it ended.
    pub reason: String,
}

/// Tasks that did not end in time and were aborted (or, if they are blocking ones, left behind).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not ended in time: {}", names.join(", "))]
pub struct Unfinished {
    /// Their names.
    pub names: Vec<String>,
}

/// A group of tasks. Clones are the same group; when the last one goes, the tasks are told to stop.
#[derive(Clone)]
pub struct Tasks {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    token: CancellationToken,
    tracker: TaskTracker,
    live: Arc<Live>,
    /// Shared by all groups of a tree.
    failures: watch::Sender<Option<TaskFailure>>,
}

/// The tasks that run. Apart from `Inner`, so that a running task does not keep its own group alive.
#[derive(Default)]
struct Live {
    next: AtomicU64,
    tasks: Mutex<BTreeMap<u64, (String, Option<AbortHandle>)>>,
}

/// What a task's end means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    Free,
    Vital,
}

impl Tasks {
    /// A group of its own.
    pub fn new(name: impl Into<String>) -> Self {
        Self::with(name.into(), CancellationToken::new(), watch::Sender::new(None))
    }

    /// A group within this one: stopped with it (but drained apart), its failures reported to the same watch.
    pub fn child(&self, name: &str) -> Self {
        let name = format!("{}/{name}", self.inner.name);
        Self::with(name, self.inner.token.child_token(), self.inner.failures.clone())
    }

    fn with(name: String, token: CancellationToken, failures: watch::Sender<Option<TaskFailure>>) -> Self {
        let inner = Inner {
            name,
            token,
            tracker: TaskTracker::new(),
            live: Arc::default(),
            failures,
        };
        Self { inner: Arc::new(inner) }
    }

    /// Starts a task that may end when it is done. A panic is logged and reported.
    pub fn spawn<F>(&self, name: impl Into<Cow<'static, str>>, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.start(name.into(), Ending::Free, task);
    }

    /// Starts a task that must run until the group is cancelled; its end before that is reported like a panic.
    pub fn spawn_vital<F>(&self, name: impl Into<Cow<'static, str>>, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.start(name.into(), Ending::Vital, task);
    }

    fn start<F>(&self, name: Cow<'static, str>, ending: Ending, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let inner = &*self.inner;
        let entry = Entry::new(&inner.live, format!("{}/{name}", inner.name));
        let (id, token, failures) = (entry.id, inner.token.clone(), inner.failures.clone());
        let handle = inner.tracker.spawn(async move {
            let reason = match AssertUnwindSafe(task).catch_unwind().await {
                Ok(()) if ending == Ending::Vital && !token.is_cancelled() => Some("ended by itself".to_owned()),
                Ok(()) => None,
                Err(panic) => Some(format!("panicked: {}", panic_text(&*panic))),
            };
            if let Some(reason) = reason {
                report(&failures, &entry.name, reason);
            }
            drop(entry);
        });
        if let Some((_, abort)) = inner.live.tasks.lock().get_mut(&id) {
            *abort = Some(handle.abort_handle());
        }
    }

    /// Runs `work` on a thread where blocking is allowed, and gives its result; none if it panicked, which is logged
    /// and reported. It cannot be aborted: drain waits for it, up to the deadline.
    pub async fn run_blocking<T, F>(&self, name: impl Into<Cow<'static, str>>, work: F) -> Option<T>
    where
        F: FnOnce() -> T + Send + 'static,
        T: Send + 'static,
    {
        let inner = &*self.inner;
        let entry = Entry::new(&inner.live, format!("{}/{}", inner.name, name.into()));
        let failures = inner.failures.clone();
        let handle = inner.tracker.spawn_blocking(move || {
            let result = std::panic::catch_unwind(AssertUnwindSafe(work));
            let name = entry.name.clone();
            drop(entry);
            match result {
                Ok(value) => Some(value),
                Err(panic) => {
                    report(&failures, &name, format!("panicked: {}", panic_text(&*panic)));
                    None
                }
            }
        });
        handle.await.ok().flatten()
    }

    /// Cancelled when the group is to stop. Long tasks select on it.
    pub fn token(&self) -> CancellationToken {
        self.inner.token.clone()
    }

    /// Tells the tasks to stop, and does not wait.
    pub fn cancel(&self) {
        self.inner.token.cancel();
    }

    /// Whether the group was told to stop.
    pub fn is_cancelled(&self) -> bool {
        self.inner.token.is_cancelled()
    }

    /// Tells the tasks to stop and waits for them; those that have not ended after `patience` are aborted and named.
    pub async fn drain(&self, patience: Duration) -> Result<(), Unfinished> {
        self.cancel();
        self.finish(patience).await
    }

    /// Waits for the tasks without telling them to stop; those that have not ended after `patience` are aborted and
    /// named.
    pub async fn finish(&self, patience: Duration) -> Result<(), Unfinished> {
        let inner = &*self.inner;
        inner.tracker.close();
        if tokio::time::timeout(patience, inner.tracker.wait()).await.is_ok() {
            return Ok(());
        }
        let names: Vec<String> = {
            let live = inner.live.tasks.lock();
            for abort in live.values().filter_map(|(_, abort)| abort.as_ref()) {
                abort.abort();
            }
            live.values().map(|(name, _)| name.clone()).collect()
        };
        if names.is_empty() {
            return Ok(());
        }
        tracing::warn!(group = inner.name, tasks = ?names, "tasks did not end in time; aborted");
        Err(Unfinished { names })
    }

    /// The names of the tasks that run, in the order they were started.
    pub fn names(&self) -> Vec<String> {
        self.inner
            .live
            .tasks
            .lock()
            .values()
            .map(|(name, _)| name.clone())
            .collect()
    }

    /// The first failure of any task in this tree of groups.
    pub fn failures(&self) -> watch::Receiver<Option<TaskFailure>> {
        self.inner.failures.subscribe()
    }

    /// Completes at the first failure of any task in this tree of groups; never if there is none.
    pub async fn failed(&self) -> TaskFailure {
        let mut failures = self.failures();
        let failure = failures
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|failure| failure.clone());
        match failure {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.token.cancel();
        self.tracker.close();
    }
}

impl fmt::Debug for Tasks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tasks")
            .field("name", &self.inner.name)
            .field("live", &self.names())
            .finish()
    }
}

/// A running task's place in the list; leaves it when dropped, also when the task is aborted.
struct Entry {
    id: u64,
    name: String,
    live: Arc<Live>,
}

impl Entry {
    fn new(live: &Arc<Live>, name: String) -> Self {
        let id = live.next.fetch_add(1, Ordering::Relaxed);
        live.tasks.lock().insert(id, (name.clone(), None));
        Self {
            id,
            name,
            live: Arc::clone(live),
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.live.tasks.lock().remove(&self.id);
    }
}

fn report(failures: &watch::Sender<Option<TaskFailure>>, task: &str, reason: String) {
    tracing::error!(task, reason, "task failed");
    metrics::counter!(names::BASE_TASK_FAILURES_TOTAL).increment(1);
    failures.send_if_modified(|first| {
        let is_first = first.is_none();
        if is_first {
            *first = Some(TaskFailure {
                task: task.to_owned(),
                reason,
            });
        }
        is_first
    });
}

fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("(no message)")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tokio::sync::oneshot;

    #[tokio::test]
    async fn a_panic_is_reported_to_the_whole_tree_and_the_others_go_on() {
        let root = Tasks::new("node");
        let child = root.child("broker");
        let (done_tx, done_rx) = oneshot::channel();
        child.spawn("bad", async { panic!("a bug: {}", 7) });
        let failure = root.failed().await;
        assert_eq!(
            failure,
            TaskFailure {
                task: "node/broker/bad".into(),
                reason: "panicked: a bug: 7".into()
            }
        );
        child.spawn("good", async move { done_tx.send(()).unwrap() });
        done_rx.await.unwrap();
        root.drain(Duration::from_secs(5)).await.unwrap();
    }

    #[tokio::test]
    async fn a_vital_task_may_end_only_when_told_to() {
        let tasks = Tasks::new("node");
        let token = tasks.token();
        tasks.spawn_vital("obedient", async move { token.cancelled().await });
        tasks.drain(Duration::from_secs(5)).await.unwrap();
        assert_eq!(*tasks.failures().borrow(), None);

        let tasks = Tasks::new("node");
        tasks.spawn("errand", async {});
        tasks.spawn_vital("quitter", async {});
        let failure = tasks.failed().await;
        assert_eq!(
            (failure.task.as_str(), failure.reason.as_str()),
            ("node/quitter", "ended by itself")
        );
    }

    #[tokio::test]
    async fn drain_names_and_aborts_what_does_not_end() {
        struct Told(Option<oneshot::Sender<()>>);
        impl Drop for Told {
            fn drop(&mut self) {
                let _ = self.0.take().unwrap().send(());
            }
        }
        let tasks = Tasks::new("node");
        let (tx, rx) = oneshot::channel();
        let told = Told(Some(tx));
        tasks.spawn("stubborn", async move {
            let _told = told;
            std::future::pending::<()>().await;
        });
        let token = tasks.token();
        tasks.spawn("good", async move { token.cancelled().await });
        let unfinished = tasks.drain(Duration::from_millis(50)).await.unwrap_err();
        assert_eq!(unfinished.names, ["node/stubborn"]);
        rx.await.unwrap();
        tasks.finish(Duration::from_secs(1)).await.unwrap();
        assert!(tasks.names().is_empty());
    }

    #[tokio::test]
    async fn dropping_the_group_tells_its_tasks_to_stop() {
        let tasks = Tasks::new("node");
        let (tx, rx) = oneshot::channel();
        let token = tasks.token();
        tasks.spawn("task", async move {
            token.cancelled().await;
            tx.send(()).unwrap();
        });
        drop(tasks);
        rx.await.unwrap();
    }

    #[tokio::test]
    async fn a_child_stops_with_its_parent_but_not_the_other_way_round() {
        let root = Tasks::new("node");
        let one = root.child("one");
        let two = root.child("two");
        one.drain(Duration::from_secs(1)).await.unwrap();
        assert!(!two.is_cancelled() && !root.is_cancelled());
        root.cancel();
        assert!(two.is_cancelled());
    }

    #[tokio::test]
    async fn blocking_work_gives_its_result_or_is_reported() {
        let tasks = Tasks::new("node");
        assert_eq!(tasks.run_blocking("sum", || 1 + 1).await, Some(2));
        let none: Option<()> = tasks.run_blocking("bad", || panic!("disk on fire")).await;
        assert_eq!(none, None);
        assert_eq!(tasks.failed().await.reason, "panicked: disk on fire");
    }
}
