// SPDX-License-Identifier: MIT OR Apache-2.0
//! `cache-clean-interval`: L2 slices and refcount blocks that nobody has used for so long leave the memory. `QEMU: cache_clean_timer_cb`.
//!
//! One thread for all images of the process looks at those whose time has come. It is no task, since the runtime in which an image was opened may end, or have
//! no clock. Images whose caches are empty are not on its list: loading a slice puts them there. Only locks that are held for nanoseconds are waited for.

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use crate::image::Image;

/// When an image's caches are to be looked at.
struct Due {
    at: Instant,
    image: Weak<Image>,
}

#[derive(Default)]
struct Cleaner {
    /// By the image's address.
    due: Mutex<HashMap<usize, Due>>,
    changed: Condvar,
}

/// `None`: the host has no thread to spare, and caches stay as large as they may get.
static CLEANER: OnceLock<Option<Arc<Cleaner>>> = OnceLock::new();

/// The cleaner, once there is one.
fn cleaner_now() -> Option<&'static Cleaner> {
    CLEANER.get()?.as_deref()
}

fn cleaner() -> Option<&'static Cleaner> {
    let start = || {
        let cleaner = Arc::new(Cleaner::default());
        let own = cleaner.clone();
        let thread = std::thread::Builder::new().name("qcow2-cache-clean".to_owned());
        thread.spawn(move || own.run()).ok().map(|_| cleaner)
    };
    CLEANER.get_or_init(start).as_deref()
}

impl Cleaner {
    fn due(&self) -> std::sync::MutexGuard<'_, HashMap<usize, Due>> {
        self.due
            .lock()
            .expect("no code panics while it holds this lock")
    }

    fn run(&self) {
        loop {
            let image = self.wait();
            image.clean();
        }
    }

    /// Waits until the time of an image has come.
    fn wait(&self) -> Arc<Image> {
        let mut due = self.due();
        loop {
            due.retain(|_, d| d.image.strong_count() > 0);
            let first = due.iter().min_by_key(|(_, d)| d.at);
            let Some((key, at)) = first.map(|(&key, d)| (key, d.at)) else {
                let woken = self.changed.wait(due);
                due = woken.expect("no code panics while it holds this lock");
                continue;
            };
            let left = at.saturating_duration_since(Instant::now());
            if left.is_zero() {
                if let Some(image) = due.remove(&key).and_then(|d| d.image.upgrade()) {
                    return image;
                }
                continue;
            }
            let woken = self.changed.wait_timeout(due, left);
            (due, _) = woken.expect("no code panics while it holds this lock");
        }
    }
}

impl Image {
    /// Something has come into the caches.
    pub(crate) fn note_cached(self: &Arc<Self>) {
        if !self.is_to_be_cleaned.swap(true, Ordering::AcqRel) {
            self.clean_later(self.runtime().cache_clean_interval);
        }
    }

    /// Has the caches cleaned once `interval` is over, instead of when they would have been; `None`: not at all.
    pub(crate) fn clean_later(self: &Arc<Self>, interval: Option<Duration>) {
        self.is_to_be_cleaned.store(true, Ordering::Release);
        match interval.and_then(|i| Instant::now().checked_add(i)) {
            None => self.clean_never(),
            Some(at) => {
                let image = Arc::downgrade(self);
                if let Some(cleaner) = cleaner() {
                    cleaner.due().insert(self.key(), Due { at, image });
                    cleaner.changed.notify_one();
                }
            }
        }
    }

    fn clean_never(&self) {
        if let Some(cleaner) = cleaner_now() {
            cleaner.due().remove(&self.key());
        }
    }

    fn key(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// Forgets what nobody has used since the last time.
    fn clean(self: &Arc<Self>) {
        self.is_to_be_cleaned.store(false, Ordering::Release);
        let blocks = match self.meta.try_lock() {
            Ok(mut meta) => meta.refcounts.clean(),
            // Somebody is at work; next time, then.
            Err(_) => 1,
        };
        if self.l2.clean() + blocks > 0 {
            self.note_cached();
        }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // Else the list keeps the memory until its time has come.
        if self.is_to_be_cleaned.load(Ordering::Acquire) {
            self.clean_never();
        }
    }
}
