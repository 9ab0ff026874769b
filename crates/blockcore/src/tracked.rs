// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tracked requests: which changes of a node are in flight, and which of them must not overlap. `QEMU: BdrvTrackedRequest`.
//!
//! Changes of the same bytes may run at the same time; what stays is one or the other. A read-modify-write may not: between its read
//! and its write no other change of the same bytes may land, or it would write old bytes over new ones. So it is *serialising*: it
//! waits for every overlapping change that came before it, and every overlapping change that comes later waits for it.
//!
//! Who waits for whom follows the order of arrival, so nobody ever waits in a circle. A guard takes its entry out when it is dropped,
//! also with its future.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tokio::sync::Notify;

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    start: u64,
    end: u64,
    serialising: bool,
}

#[derive(Debug, Default)]
struct Shared {
    /// In order of arrival.
    entries: Mutex<Vec<Entry>>,
    next_id: AtomicU64,
    /// Told when an entry goes that somebody may wait for.
    gone: Notify,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Entry>> {
        self.entries
            .lock()
            .expect("no code panics while it holds this lock")
    }
}

/// The changes in flight on one node.
#[derive(Debug, Default)]
pub struct TrackedRequests {
    shared: Arc<Shared>,
}

/// One change in flight. Dropping it ends the change.
#[derive(Debug)]
pub struct TrackedRequest {
    shared: Arc<Shared>,
    entry: Entry,
}

impl TrackedRequests {
    /// Enters a change of `start..end`, which has its place in the order of arrival from now on. It may begin after its [`turn`](TrackedRequest::turn).
    pub fn enter(&self, start: u64, end: u64, serialising: bool) -> TrackedRequest {
        let mut entries = self.shared.lock();
        let id = self.shared.next_id.fetch_add(1, Ordering::Relaxed);
        let entry = Entry {
            id,
            start,
            end,
            serialising,
        };
        entries.push(entry);
        drop(entries);
        TrackedRequest {
            shared: self.shared.clone(),
            entry,
        }
    }

    /// Waits until every change of `start..end` that has been entered is over, without entering one: nobody waits for the caller.
    pub async fn settled(&self, start: u64, end: u64) {
        let until = self.shared.next_id.load(Ordering::Relaxed);
        loop {
            let mut gone = std::pin::pin!(self.shared.gone.notified());
            gone.as_mut().enable();
            let overlaps = |e: &Entry| e.id < until && e.start < end && start < e.end;
            if !self.shared.lock().iter().any(overlaps) {
                return;
            }
            gone.await;
        }
    }

    /// Enters a change of `start..end` and waits until no other change stands in its way.
    ///
    /// Dropping the future takes the entry out again.
    pub async fn begin(&self, start: u64, end: u64, serialising: bool) -> TrackedRequest {
        let request = self.enter(start, end, serialising);
        request.turn().await;
        request
    }
}

impl TrackedRequest {
    /// Waits until no change that came before stands in the way.
    pub async fn turn(&self) {
        let Entry {
            id,
            start,
            end,
            serialising,
        } = self.entry;
        loop {
            let mut gone = std::pin::pin!(self.shared.gone.notified());
            // Listening starts before the look, so that an entry that goes in between is not missed.
            gone.as_mut().enable();
            // INV REQ-SER-1
            let blocked = self
                .shared
                .lock()
                .iter()
                .take_while(|e| e.id < id)
                .any(|e| (serialising || e.serialising) && e.start < end && start < e.end);
            if !blocked {
                return;
            }
            gone.await;
        }
    }
}

impl Drop for TrackedRequest {
    fn drop(&mut self) {
        let mut entries = self.shared.lock();
        if let Some(at) = entries.iter().position(|e| e.id == self.entry.id) {
            entries.remove(at);
            drop(entries);
            self.shared.gone.notify_waiters();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    // INV REQ-SER-1: nothing that overlaps runs at the same time as a serialising request.
    #[tokio::test]
    async fn a_serialising_request_waits_for_earlier_overlaps_and_holds_up_later_ones() {
        let tracked = TrackedRequests::default();
        let write = tracked.begin(0, 10, false).await;
        assert!(
            tracked.begin(5, 15, false).now_or_never().is_some(),
            "plain changes may overlap"
        );
        let mut rmw = Box::pin(tracked.begin(8, 20, true));
        assert!(rmw.as_mut().now_or_never().is_none(), "waits for the write");
        let mut later = Box::pin(tracked.begin(19, 30, false));
        assert!(
            later.as_mut().now_or_never().is_none(),
            "came after the serialising one"
        );
        assert!(
            tracked.begin(20, 30, false).now_or_never().is_some(),
            "does not overlap"
        );
        drop(write);
        let held = rmw.await;
        assert!(later.as_mut().now_or_never().is_none());
        drop(held);
        later.await;
    }

    #[tokio::test]
    async fn a_dropped_waiter_blocks_nobody() {
        let tracked = TrackedRequests::default();
        let write = tracked.begin(0, 10, false).await;
        let mut rmw = Box::pin(tracked.begin(0, 10, true));
        assert!(rmw.as_mut().now_or_never().is_none());
        drop(rmw);
        assert!(tracked.begin(0, 10, false).now_or_never().is_some());
        drop(write);
        assert!(tracked.shared.lock().is_empty());
    }
}
