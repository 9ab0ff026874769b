// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Orphans`] counts changes whose future was dropped and that are still going on (INV REQ-DROP-1). As long as there are none, which is nearly always, who
//! would have to wait for them looks at nothing but this count. Used by nodes, and by drivers that work in tasks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

const RUNNING: u8 = 0;
const ORPHANED: u8 = 1;
const DONE: u8 = 2;

/// How many orphans there are.
#[derive(Debug, Default)]
pub struct Orphans {
    count: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Change {
    state: AtomicU8,
    count: Arc<AtomicUsize>,
}

/// What the change holds. Dropping it says that the change is over.
#[derive(Debug)]
pub struct DoneOnDrop(Arc<Change>);

/// What the waiting future holds. Dropping it makes the change an orphan, if it isn't over.
#[derive(Debug)]
pub struct OrphanOnDrop(Arc<Change>);

impl Orphans {
    /// Watches a change: one guard for the change, one for who waits for it.
    pub fn watch(&self) -> (DoneOnDrop, OrphanOnDrop) {
        let change = Arc::new(Change {
            state: AtomicU8::new(RUNNING),
            count: self.count.clone(),
        });
        (DoneOnDrop(change.clone()), OrphanOnDrop(change))
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.count.load(Ordering::SeqCst) != 0
    }
}

impl Drop for OrphanOnDrop {
    fn drop(&mut self) {
        // Counted first and taken back if the change is over: no moment at which it is neither awaited nor counted.
        self.0.count.fetch_add(1, Ordering::SeqCst);
        let still =
            self.0
                .state
                .compare_exchange(RUNNING, ORPHANED, Ordering::SeqCst, Ordering::SeqCst);
        if still.is_err() {
            self.0.count.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

impl Drop for DoneOnDrop {
    fn drop(&mut self) {
        if self.0.state.swap(DONE, Ordering::SeqCst) == ORPHANED {
            self.0.count.fetch_sub(1, Ordering::SeqCst);
        }
    }
}
