// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tracked requests: which changes of a node are in flight, and which of them must not overlap. `QEMU: BdrvTrackedRequest`.
//!
//! Changes of the same bytes may run at the same time; what stays is one or the other. A read-modify-write may not: between its read
//! and its write no other change of the same bytes may land, or it would write old bytes over new ones. So it is *serialising*: it
//! waits for every overlapping change that came before it, and every overlapping change that comes later waits for it.
//!
//! Who waits for whom follows the order of arrival, so nobody ever waits in a circle. A guard takes its entry out when it is dropped,
//! also with its future.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Notify;

#[derive(Clone, Copy, Debug)]
struct Entry {
    id: u64,
    start: u64,
    end: u64,
    serialising: bool,
}

/// The changes in flight on one node.
#[derive(Debug, Default)]
pub struct TrackedRequests {
    /// In order of arrival.
    entries: Mutex<Vec<Entry>>,
    next_id: AtomicU64,
    /// Told when an entry goes that somebody may wait for.
    gone: Notify,
}

/// One change in flight. Dropping it ends the change.
#[derive(Debug)]
pub struct TrackedRequest<'a> {
    owner: &'a TrackedRequests,
    id: u64,
}

impl TrackedRequests {
    /// Enters a change of `start..end` and waits until no other change stands in its way.
    ///
    /// Dropping the future takes the entry out again.
    pub async fn begin(&self, start: u64, end: u64, serialising: bool) -> TrackedRequest<'_> {
        let id = {
            let mut entries = self.lock();
            let id = self.next_id.fetch_add(1, Ordering::Relaxed);
            entries.push(Entry {
                id,
                start,
                end,
                serialising,
            });
            id
        };
        let guard = TrackedRequest { owner: self, id };
        loop {
            let gone = self.gone.notified();
            let mut gone = std::pin::pin!(gone);
            // Listening starts before the look, so that an entry that goes in between is not missed.
            gone.as_mut().enable();
            // INV REQ-SER-1
            let blocked = self
                .lock()
                .iter()
                .take_while(|e| e.id < id)
                .any(|e| (serialising || e.serialising) && e.start < end && start < e.end);
            if !blocked {
                return guard;
            }
            gone.await;
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<Entry>> {
        self.entries
            .lock()
            .expect("no code panics while it holds this lock")
    }
}

impl Drop for TrackedRequest<'_> {
    fn drop(&mut self) {
        let mut entries = self.owner.lock();
        if let Some(at) = entries.iter().position(|e| e.id == self.id) {
            let gone = entries.remove(at);
            let watched = gone.serialising || entries.iter().any(|e| e.serialising);
            drop(entries);
            if watched {
                self.owner.gone.notify_waiters();
            }
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
        assert!(tracked.lock().is_empty());
    }
}
