//! Work that blocks, awaited.

use std::cell::Cell;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;

use tokio::task::JoinError;

thread_local! {
    static IN_PLACE: Cell<bool> = const { Cell::new(false) };
}

/// From now on, what this thread asks to be run elsewhere it runs itself, at once. For a simulation: with a second thread
/// it would not repeat itself exactly.
pub fn run_in_place_on_this_thread() {
    IN_PLACE.set(true);
}

/// Whether this thread runs such work itself.
pub fn runs_in_place() -> bool {
    IN_PLACE.get()
}

/// Runs `work` on a thread where blocking is allowed. It is not ended when the caller goes. The error is a panic.
pub async fn run_blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, JoinError> {
    if runs_in_place() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}

/// Awaits what a thread that may block is about to do. Where such work is run in place, nothing else is done meanwhile: the
/// other thread's pace is then no part of what happens.
pub async fn settled<F: Future>(work: F) -> F::Output {
    if !runs_in_place() {
        return work.await;
    }
    let mut work = pin!(tokio::task::unconstrained(work));
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match work.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}
