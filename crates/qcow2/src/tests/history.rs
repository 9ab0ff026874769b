// SPDX-License-Identifier: MIT OR Apache-2.0
//! What each sector of a disk, or each of the parts that a plan goes by, may read as: now, or after a power cut at any place in the log of the disk below. A sector is uniform: all its
//! bytes are the same value. The disk's length is looked at in the same way, as one more place that has a value.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard};

/// The bytes of a sector.
pub(crate) const SECTOR: usize = 512;
/// The place at which a length (in sectors) is noted.
const LENGTH: usize = usize::MAX - 1;
/// The places of the VM state area begin here. Places before are those of the disk.
pub(crate) const STATE: usize = 1 << 40;
/// The value of a place that may hold anything.
pub(crate) const ANYTHING: u64 = 256;

/// A change or a flush, with the times of call and end, and the places in the disk's log at those times.
#[derive(Clone, Debug)]
struct Event {
    /// Sectors, `LENGTH` for a resize; empty for a flush.
    places: Range<usize>,
    value: u64,
    /// It may also have changed nothing, in each sector: a discard, and what failed or was dropped.
    optional: bool,
    /// It is durable once it has ended, without a flush.
    durable: bool,
    called: u64,
    ended: u64,
    log_called: usize,
    log_ended: usize,
}

#[derive(Debug, Default)]
struct Events {
    clock: u64,
    changes: Vec<Event>,
    flushes: Vec<Event>,
    /// Reads that decided which of several values a sector has: one sector each.
    seen: Vec<Event>,
}

impl Events {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    fn allowed(&self, place: usize, base: u64, settled: u64, log_end: usize) -> BTreeSet<u64> {
        let seen = match log_end {
            // After a power cut, what was seen may be gone.
            usize::MAX => &self.seen[..],
            _ => &[],
        };
        let here = self.changes.iter().chain(seen);
        let here: Vec<&Event> = here.filter(|e| e.places.contains(&place)).collect();
        let is_settled = |e: &Event| match log_end {
            usize::MAX => e.ended < settled,
            // After a power cut.
            _ => e.ended < settled || (e.durable && e.log_ended <= log_end),
        };
        let covers = |later: &&&Event| is_settled(later) && !later.optional;
        let is_gone = |ended: u64| here.iter().filter(covers).any(|l| ended < l.called);
        let mut values: BTreeSet<u64> = here
            .iter()
            .filter(|e| e.log_called <= log_end && !is_gone(e.ended))
            .map(|e| e.value)
            .collect();
        if !is_gone(0) {
            values.insert(base);
        }
        values
    }
}

/// All that was done to a disk.
#[derive(Debug, Default)]
pub(crate) struct History(Mutex<Events>);

/// An event under way. Unless [`done`](Recording::done), its change may have happened or not: it has failed, or was dropped.
#[derive(Debug)]
pub(crate) struct Recording<'a, L: Fn() -> usize> {
    history: &'a History,
    log_len: L,
    index: usize,
}

impl<L: Fn() -> usize> Recording<'_, L> {
    /// The change was made. With `is_hint`, or not.
    pub fn done(self, is_hint: bool) {
        self.history.lock().changes[self.index].optional = is_hint;
    }

    /// The change was made, and is durable.
    pub fn done_durably(self) {
        self.history.lock().changes[self.index].durable = true;
        self.done(false);
    }
}

impl<L: Fn() -> usize> Drop for Recording<'_, L> {
    fn drop(&mut self) {
        let mut events = self.history.lock();
        let now = events.tick();
        let event = &mut events.changes[self.index];
        // What is dropped comes before all that is asked for later (INV REQ-DROP-1), so it ends here as far as the order goes.
        (event.ended, event.log_ended) = (now, (self.log_len)());
    }
}

impl History {
    fn lock(&self) -> MutexGuard<'_, Events> {
        self.0.lock().unwrap()
    }

    /// The time. What is asked for later has a later one.
    pub fn now(&self) -> u64 {
        self.lock().tick()
    }

    /// A change of sectors begins.
    pub fn change<L: Fn() -> usize>(
        &self,
        places: Range<usize>,
        value: u8,
        log_len: L,
    ) -> Recording<'_, L> {
        self.begin(places, value.into(), log_len)
    }

    /// A change begins after which these places may hold anything.
    pub fn muddle<L: Fn() -> usize>(&self, places: Range<usize>, log_len: L) -> Recording<'_, L> {
        self.begin(places, ANYTHING, log_len)
    }

    /// A change of length begins.
    pub fn resize<L: Fn() -> usize>(&self, sectors: u64, log_len: L) -> Recording<'_, L> {
        self.begin(LENGTH..LENGTH + 1, sectors, log_len)
    }

    fn begin<L: Fn() -> usize>(
        &self,
        places: Range<usize>,
        value: u64,
        log_len: L,
    ) -> Recording<'_, L> {
        let mut events = self.lock();
        let event = Event {
            places,
            value,
            optional: true,
            durable: false,
            called: events.tick(),
            ended: u64::MAX,
            log_called: log_len(),
            log_ended: usize::MAX,
        };
        events.changes.push(event);
        Recording {
            history: self,
            log_len,
            index: events.changes.len() - 1,
        }
    }

    /// A flush that was called at the time `called` has ended well.
    pub fn flushed(&self, called: u64, log_len: usize) {
        let mut events = self.lock();
        let ended = events.tick();
        events.flushes.push(Event {
            places: 0..0,
            value: 0,
            optional: false,
            durable: false,
            called,
            ended,
            log_called: 0,
            log_ended: log_len,
        });
    }

    /// The values that a sector may read as while nothing is in flight.
    pub fn allowed_now(&self, sector: usize, base: u8) -> BTreeSet<u64> {
        let events = self.lock();
        events.allowed(sector, base.into(), u64::MAX, usize::MAX)
    }

    /// The values that a read may see that was called at the time `called` and has just ended.
    pub fn allowed_since(&self, sector: usize, base: u8, called: u64) -> BTreeSet<u64> {
        self.lock().allowed(sector, base.into(), called, usize::MAX)
    }

    /// A read that was called at the time `called` has just seen a value that is not the only possible one. What it has seen stays.
    pub fn saw(&self, sector: usize, value: u64, called: u64) {
        let mut events = self.lock();
        let ended = events.tick();
        events.seen.push(Event {
            places: sector..sector + 1,
            value,
            optional: false,
            durable: false,
            called,
            ended,
            log_called: 0,
            log_ended: 0,
        });
    }

    /// The values that a sector may read as after a power cut at `cut`.
    pub fn allowed_after_cut(&self, sector: usize, base: u8, cut: usize) -> BTreeSet<u64> {
        self.after_cut(sector, base.into(), cut)
    }

    /// The lengths in sectors that the disk may have after a power cut at `cut`.
    pub fn lengths_after_cut(&self, base: u64, cut: usize) -> BTreeSet<u64> {
        self.after_cut(LENGTH, base, cut)
    }

    /// The lengths in sectors that the disk may have while nothing is in flight.
    pub fn lengths_now(&self, base: u64) -> BTreeSet<u64> {
        self.lock().allowed(LENGTH, base, u64::MAX, usize::MAX)
    }

    fn after_cut(&self, place: usize, base: u64, cut: usize) -> BTreeSet<u64> {
        let events = self.lock();
        // What had ended when the last flush was called that ended before the cut is settled.
        let flushes = events.flushes.iter().filter(|f| f.log_ended <= cut);
        let settled = flushes.map(|f| f.called).max().unwrap_or(0);
        events.allowed(place, base, settled, cut)
    }
}
