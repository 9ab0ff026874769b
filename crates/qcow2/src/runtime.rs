// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options of an open image: [`RuntimeOptions`]. They change how this writer works, not what the image holds.
//!
//! Taken at opening, and when an image is reopened: then what was given before still holds unless something else is said of the same, and all of it is looked
//! at together.

use std::sync::atomic::Ordering;
use std::time::Duration;

use blockcore::{BlockError, OptionValue, Options, Result};

use crate::format::MIN_CLUSTER_BITS;
use crate::header::Header;
use crate::image::{Image, Owner};

/// What the L2 cache holds at most where nothing is said, in bytes: the tables of 256 GiB with the usual cluster size. Memory is used as slices are.
const L2_CACHE_BYTES: u64 = 32 << 20;
/// What the cache of refcount blocks holds beside changed ones where nothing is said, in bytes.
const REFCOUNT_CACHE_BYTES: u64 = 1 << 20;
/// Bytes in an L2 slice, as a power of two; a whole table where clusters are smaller.
const SLICE_BYTES_BITS: u32 = 12;
/// How long tables stay in memory that nobody uses, where nothing is said.
const CACHE_CLEAN_INTERVAL: Duration = Duration::from_secs(600);

bitflags::bitflags! {
    /// What guest data is kept from being written over (INV QCOW2-META-1).
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct OverlapChecks: u32 {
        const MAIN_HEADER = 1 << 0;
        const ACTIVE_L1 = 1 << 1;
        const ACTIVE_L2 = 1 << 2;
        const REFCOUNT_BLOCK = 1 << 3;
        const REFCOUNT_TABLE = 1 << 4;
        const SNAPSHOT_TABLE = 1 << 5;
        const INACTIVE_L1 = 1 << 6;
        const INACTIVE_L2 = 1 << 7;
        const BITMAP_DIRECTORY = 1 << 8;
    }
}

/// The options, but for the [`SWITCHES`].
const KEYS: [&str; 12] = [
    "cache-size",
    "l2-cache-size",
    "refcount-cache-size",
    "l2-cache-entry-size",
    "cache-clean-interval",
    "lazy-refcounts",
    "overlap-check",
    "overlap-check.template",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
];

/// The switches, each below `overlap-check.`.
const SWITCHES: [(&str, OverlapChecks); 9] = [
    ("main-header", OverlapChecks::MAIN_HEADER),
    ("active-l1", OverlapChecks::ACTIVE_L1),
    ("active-l2", OverlapChecks::ACTIVE_L2),
    ("refcount-block", OverlapChecks::REFCOUNT_BLOCK),
    ("refcount-table", OverlapChecks::REFCOUNT_TABLE),
    ("snapshot-table", OverlapChecks::SNAPSHOT_TABLE),
    ("inactive-l1", OverlapChecks::INACTIVE_L1),
    ("inactive-l2", OverlapChecks::INACTIVE_L2),
    ("bitmap-directory", OverlapChecks::BITMAP_DIRECTORY),
];

impl OverlapChecks {
    fn template(name: &str) -> Option<OverlapChecks> {
        let constant = OverlapChecks::MAIN_HEADER
            | OverlapChecks::ACTIVE_L1
            | OverlapChecks::REFCOUNT_TABLE
            | OverlapChecks::SNAPSHOT_TABLE
            | OverlapChecks::BITMAP_DIRECTORY;
        Some(match name {
            "none" => OverlapChecks::empty(),
            "constant" => constant,
            "cached" => OverlapChecks::all() - OverlapChecks::INACTIVE_L2,
            "all" => OverlapChecks::all(),
            _ => return None,
        })
    }

    fn take(options: &mut Options) -> Result<OverlapChecks> {
        let whole = options.take_str("overlap-check");
        let template = options.take_str("overlap-check.template");
        if let (Some(a), Some(b)) = (&whole, &template)
            && a != b
        {
            return Err(BlockError::invalid(format!(
                "Conflicting values for qcow2 options 'overlap-check' ('{a}') and 'overlap-check.template' ('{b}')"
            )));
        }
        let name = template.or(whole);
        let name = name.unwrap_or_else(|| "cached".to_owned());
        let Some(mut checks) = OverlapChecks::template(&name) else {
            return Err(BlockError::invalid(format!(
                "Unsupported value '{name}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all"
            )));
        };
        for (switch, bit) in SWITCHES {
            if let Some(on) = options.take_bool(&format!("overlap-check.{switch}"))? {
                checks.set(bit, on);
            }
        }
        Ok(checks)
    }

    /// Whether what lies there is among what is looked at.
    pub fn includes(self, owner: Owner) -> bool {
        let bit = match owner {
            Owner::Header => OverlapChecks::MAIN_HEADER,
            Owner::L1 => OverlapChecks::ACTIVE_L1,
            Owner::L2 => OverlapChecks::ACTIVE_L2,
            Owner::RefcountTable => OverlapChecks::REFCOUNT_TABLE,
            Owner::RefcountBlock => OverlapChecks::REFCOUNT_BLOCK,
            Owner::SnapshotTable => OverlapChecks::SNAPSHOT_TABLE,
            Owner::InactiveL1 => OverlapChecks::INACTIVE_L1,
            Owner::InactiveL2 => OverlapChecks::INACTIVE_L2,
            Owner::BitmapDirectory | Owner::BitmapTable | Owner::BitmapData => {
                OverlapChecks::BITMAP_DIRECTORY
            }
            Owner::EncryptionHeader | Owner::Disputed => {
                return self != OverlapChecks::empty();
            }
        };
        self.contains(bit)
    }
}

/// How an open image works.
#[derive(Clone, Debug)]
pub(crate) struct RuntimeOptions {
    pub l2_cache_bytes: usize,
    /// Bytes in an L2 slice, as a power of two.
    pub slice_bytes_bits: u32,
    pub refcount_cache_bytes: usize,
    /// How long tables stay in memory that nobody uses; `None`: as long as there is room.
    pub cache_clean_interval: Option<Duration>,
    pub overlap_checks: OverlapChecks,
    /// Whether storage goes back to the host that a guest's discard, a snapshot's end, or anything else has freed.
    pub pass_discard_request: bool,
    pub pass_discard_snapshot: bool,
    pub pass_discard_other: bool,
    /// Discarded clusters keep their place in the file.
    pub discard_no_unref: bool,
    /// What was said.
    given: Options,
}

/// Takes out of what was given before what `new` says in another way. `QEMU: qcow2_join_options`.
fn drop_overridden(before: &mut Options, new: &Options) {
    let mut drop_all = |keys: &[&str]| {
        for key in keys {
            before.take(key);
        }
    };
    if new.contains("overlap-check") || new.contains("overlap-check.template") {
        drop_all(&["overlap-check", "overlap-check.template"]);
        let switches = SWITCHES.map(|(switch, _)| format!("overlap-check.{switch}"));
        drop_all(&switches.each_ref().map(String::as_str));
    }
    if new.contains("cache-size") {
        drop_all(&["l2-cache-size", "refcount-cache-size"]);
    } else if new.contains("l2-cache-size") || new.contains("refcount-cache-size") {
        drop_all(&["cache-size"]);
    }
}

impl RuntimeOptions {
    /// Where nothing is said.
    pub fn new(cluster_bits: u32) -> RuntimeOptions {
        RuntimeOptions {
            l2_cache_bytes: L2_CACHE_BYTES as usize,
            slice_bytes_bits: SLICE_BYTES_BITS.min(cluster_bits),
            refcount_cache_bytes: REFCOUNT_CACHE_BYTES as usize,
            cache_clean_interval: Some(CACHE_CLEAN_INTERVAL),
            overlap_checks: OverlapChecks::all() - OverlapChecks::INACTIVE_L2,
            pass_discard_request: true,
            pass_discard_snapshot: true,
            pass_discard_other: false,
            discard_no_unref: false,
            given: Options::new(),
        }
    }

    /// Takes what is given out of `options`. What was given before stays, unless `null` takes it back, or something else is said of the same.
    ///
    /// # Errors
    /// `InvalidArgument` for values that make no sense, alone or together, in QEMU's words.
    pub fn take(&mut self, options: &mut Options, header: &Header) -> Result<()> {
        let mut given = self.given.clone();
        drop_overridden(&mut given, options);
        let switches = SWITCHES.map(|(switch, _)| format!("overlap-check.{switch}"));
        let keys = KEYS.into_iter().chain(switches.iter().map(String::as_str));
        for key in keys {
            match options.take(key) {
                None => {}
                Some(OptionValue::Null) => drop(given.take(key)),
                Some(value) => given.set(key, value),
            }
        }
        let mut new = RuntimeOptions::new(header.cluster_bits);
        new.given = given.clone();
        new.take_all(given, header)?;
        *self = new;
        Ok(())
    }

    fn take_all(&mut self, mut options: Options, header: &Header) -> Result<()> {
        let options = &mut options;
        self.take_caches(options, header)?;
        // Only a permission to write refcounts late, and this writer never does.
        let lazy = options.take_bool("lazy-refcounts")?;
        if lazy == Some(true) && header.version < 3 {
            let text =
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
            return Err(BlockError::invalid(text));
        }
        self.overlap_checks = OverlapChecks::take(options)?;
        for (key, switch) in [
            ("pass-discard-request", &mut self.pass_discard_request),
            ("pass-discard-snapshot", &mut self.pass_discard_snapshot),
            ("pass-discard-other", &mut self.pass_discard_other),
            ("discard-no-unref", &mut self.discard_no_unref),
        ] {
            if let Some(on) = options.take_bool(key)? {
                *switch = on;
            }
        }
        if self.discard_no_unref && header.version < 3 {
            let text = "discard-no-unref is only supported since qcow2 version 3";
            return Err(BlockError::invalid(text));
        }
        Ok(())
    }

    fn take_caches(&mut self, options: &mut Options, header: &Header) -> Result<()> {
        let size = |options: &mut Options, key| options.take_size_to(key, u64::MAX);
        let total = size(options, "cache-size")?;
        let l2 = size(options, "l2-cache-size")?;
        let refcount = size(options, "refcount-cache-size")?;
        let slice = size(options, "l2-cache-entry-size")?;
        let interval = options.take_number("cache-clean-interval")?;
        let over = |part: Option<u64>| part > total && total.is_some();
        let fault = match total {
            Some(_) if l2.is_some() && refcount.is_some() => {
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time"
            }
            Some(_) if over(l2) => "l2-cache-size may not exceed cache-size",
            Some(_) if over(refcount) => "refcount-cache-size may not exceed cache-size",
            _ => "",
        };
        if !fault.is_empty() {
            return Err(BlockError::invalid(fault));
        }
        let cluster = 1u64 << header.cluster_bits;
        if let Some(bytes) = slice {
            if !bytes.is_power_of_two() || bytes < 1 << MIN_CLUSTER_BITS || bytes > cluster {
                return Err(BlockError::invalid(format!(
                    "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
                )));
            }
            self.slice_bytes_bits = bytes.trailing_zeros();
        }
        let (l2, refcount) = match (total, l2, refcount) {
            (Some(total), Some(l2), _) => (Some(l2), Some(total - l2)),
            (Some(total), None, Some(refcount)) => (Some(total - refcount), Some(refcount)),
            (Some(total), None, None) => {
                let (l2, refcount) = self.share_cache(total, header);
                (Some(l2), Some(refcount))
            }
            (None, l2, refcount) => (l2, refcount),
        };
        if let Some(bytes) = l2 {
            self.l2_cache_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        if let Some(bytes) = refcount {
            if bytes >> header.cluster_bits > i32::MAX as u64 {
                return Err(BlockError::invalid("Refcount cache size too big"));
            }
            self.refcount_cache_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        if let Some(seconds) = interval {
            if u32::try_from(seconds).is_err() {
                return Err(BlockError::invalid("Cache clean interval too big"));
            }
            self.cache_clean_interval = (seconds > 0).then(|| Duration::from_secs(seconds));
        }
        Ok(())
    }
}

impl RuntimeOptions {
    /// What the caches of L2 tables and of refcount blocks get of `total` bytes: those of all L2 tables go first, and the other gets what is left, but four blocks
    /// at least.
    fn share_cache(&self, total: u64, header: &Header) -> (u64, u64) {
        let entry_bytes = 8 << u64::from(header.has_extended_l2());
        let tables = header.size.div_ceil(1 << header.cluster_bits) * entry_bytes;
        let tables = tables.next_multiple_of(1 << self.slice_bytes_bits);
        let blocks_min = 4 << header.cluster_bits;
        match total >= tables + blocks_min {
            true => (tables, total - tables),
            false => {
                let blocks = blocks_min.min(total);
                (total - blocks, blocks)
            }
        }
    }
}

impl Image {
    /// Does what is needed before [`set_runtime`](Image::set_runtime): nothing has changes any more, and what `new` looks at is known.
    ///
    /// # Errors
    /// Those of the commit, and of reading the tables of snapshots.
    pub async fn prepare_runtime(self: &std::sync::Arc<Self>, new: &RuntimeOptions) -> Result<()> {
        let before = self.runtime().clone();
        let is_writable = self.writable.load(Ordering::Acquire);
        if new.slice_bytes_bits != before.slice_bytes_bits {
            // Dropped requests may go on in tasks.
            self.tasks.wait_idle().await;
            if is_writable {
                self.commit().await?;
            }
        }
        let late = new.overlap_checks - before.overlap_checks;
        if is_writable && late.contains(OverlapChecks::INACTIVE_L2) {
            self.own_inactive_l2().await?;
        }
        Ok(())
    }

    /// Works in another way from now on. Nothing is in flight.
    pub fn set_runtime(self: &std::sync::Arc<Self>, runtime: RuntimeOptions) {
        let before = self.runtime().clone();
        if runtime.slice_bytes_bits != before.slice_bytes_bits {
            let bits = self.entries().slice_bits(runtime.slice_bytes_bits);
            self.l2.set_slice_bits(bits);
        }
        self.l2.set_size(runtime.l2_cache_bytes);
        self.refcount_cache_bytes
            .store(runtime.refcount_cache_bytes, Ordering::Relaxed);
        let interval = runtime.cache_clean_interval;
        *self
            .runtime
            .write()
            .expect("no code panics while it holds this lock") = runtime;
        if interval != before.cache_clean_interval {
            self.clean_later(interval);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_and_switches_say_what_is_looked_at() {
        let take = |text: &str| OverlapChecks::take(&mut Options::from_dotted(text).unwrap());
        assert_eq!(
            take("size=1").unwrap(),
            OverlapChecks::all() - OverlapChecks::INACTIVE_L2
        );
        assert_eq!(
            take("overlap-check=none,overlap-check.active-l1=on").unwrap(),
            OverlapChecks::ACTIVE_L1
        );
        let all = take("overlap-check.template=all,overlap-check.main-header=off");
        let all = all.unwrap();
        assert!(all.includes(Owner::InactiveL2) && !all.includes(Owner::Header));
        assert!(take("overlap-check=some").is_err());
        assert!(take("overlap-check=none,overlap-check.template=all").is_err());
    }
}
