// SPDX-License-Identifier: MIT OR Apache-2.0
//! Epochs: when the last request that may still look at a freed cluster is over.
//!
//! A request looks up where its bytes lie and then reads or writes there, without any lock. Meanwhile the cluster may be freed. It must not be
//! handed out again until every request that was under way at that time is over (INV QCOW2-ORD-4). So requests *enter* the current epoch;
//! what is freed is stamped with it; the epoch moves on only when nobody is left in the one before the current; and two epochs later nobody can
//! hold the cluster any more.
//!
//! A request that is never polled again holds up the reuse of clusters, and nothing else: no flush and no request waits for an epoch.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// The epoch counter and how many requests are in the current epoch and the one before.
#[derive(Debug, Default)]
pub(crate) struct Epochs {
    current: AtomicU64,
    active: [AtomicUsize; 2],
}

/// A request under way. Leaves its epoch when dropped.
#[derive(Debug)]
pub(crate) struct EpochGuard<'a> {
    epochs: &'a Epochs,
    parity: usize,
}

impl Epochs {
    /// Enters the current epoch.
    pub fn enter(&self) -> EpochGuard<'_> {
        loop {
            let epoch = self.current.load(Ordering::SeqCst);
            let parity = (epoch & 1) as usize;
            self.active[parity].fetch_add(1, Ordering::SeqCst);
            // The epoch may have moved on between the two lines; then the count went to a stranger's slot.
            if self.current.load(Ordering::SeqCst) == epoch {
                return EpochGuard {
                    epochs: self,
                    parity,
                };
            }
            self.active[parity].fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The stamp for what is freed now.
    pub fn stamp(&self) -> u64 {
        self.current.load(Ordering::SeqCst)
    }

    /// Moves on as far as possible, and says whether everybody who was there at `stamp` is gone. One caller at a time.
    pub fn has_passed(&self, stamp: u64) -> bool {
        for _ in 0..2 {
            let epoch = self.current.load(Ordering::SeqCst);
            if epoch >= stamp + 2 {
                return true;
            }
            // Whoever is in the other slot entered before the current epoch began.
            if self.active[((epoch + 1) & 1) as usize].load(Ordering::SeqCst) != 0 {
                return false;
            }
            self.current.store(epoch + 1, Ordering::SeqCst);
        }
        self.current.load(Ordering::SeqCst) >= stamp + 2
    }
}

impl Drop for EpochGuard<'_> {
    fn drop(&mut self) {
        self.epochs.active[self.parity].fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // INV QCOW2-ORD-4: a cluster freed while a request is under way is not handed out until that request is over.
    #[test]
    fn a_stamp_passes_only_when_everybody_who_was_there_is_gone() {
        let epochs = Epochs::default();
        let early = epochs.enter();
        let stamp = epochs.stamp();
        assert!(!epochs.has_passed(stamp));
        let late = epochs.enter();
        assert!(!epochs.has_passed(stamp), "the early one is still there");
        drop(early);
        assert!(
            epochs.has_passed(stamp),
            "the late one came after the stamp and can't know the cluster"
        );
        drop(late);
    }

    #[test]
    fn without_requests_a_stamp_passes_at_once() {
        let epochs = Epochs::default();
        for _ in 0..5 {
            assert!(epochs.has_passed(epochs.stamp()));
        }
    }
}
