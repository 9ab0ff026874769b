// SPDX-License-Identifier: MIT OR Apache-2.0
//! Options of an open image: [`RuntimeOptions`]. They change how this writer works, not what the image holds.
//!
//! Taken at opening, and, but for `l2-cache-entry-size` and the template `all` (which would have to look at all that is cached already), when an image is
//! reopened. `cache-clean-interval` is refused: nothing here runs by the clock.

use std::sync::atomic::Ordering;

use blockcore::{BlockError, Options, Result};

use crate::format::MIN_CLUSTER_BITS;
use crate::header::Header;
use crate::image::{Image, Owner};

/// What the L2 cache holds at most where nothing is said, in bytes: the tables of 256 GiB with the usual cluster size. Memory is used as slices are.
const L2_CACHE_BYTES: u64 = 32 << 20;
/// What the cache of refcount blocks holds beside changed ones where nothing is said, in bytes.
const REFCOUNT_CACHE_BYTES: u64 = 1 << 20;
/// Bytes in an L2 slice, as a power of two; a whole table where clusters are smaller.
const SLICE_BYTES_BITS: u32 = 12;

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

    fn take(options: &mut Options) -> Result<Option<OverlapChecks>> {
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
        let mut is_given = name.is_some();
        let name = name.unwrap_or_else(|| "cached".to_owned());
        let Some(mut checks) = OverlapChecks::template(&name) else {
            return Err(BlockError::invalid(format!(
                "Unsupported value '{name}' for qcow2 option 'overlap-check'. Allowed are any of the following: none, constant, cached, all"
            )));
        };
        for (switch, bit) in SWITCHES {
            if let Some(on) = options.take_bool(&format!("overlap-check.{switch}"))? {
                checks.set(bit, on);
                is_given = true;
            }
        }
        Ok(is_given.then_some(checks))
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
    pub overlap_checks: OverlapChecks,
    /// Whether storage goes back to the host that a guest's discard, a snapshot's end, or anything else has freed.
    pub pass_discard_request: bool,
    pub pass_discard_snapshot: bool,
    pub pass_discard_other: bool,
    /// Discarded clusters keep their place in the file.
    pub discard_no_unref: bool,
}

impl RuntimeOptions {
    /// Where nothing is said.
    pub fn new(cluster_bits: u32) -> RuntimeOptions {
        RuntimeOptions {
            l2_cache_bytes: L2_CACHE_BYTES as usize,
            slice_bytes_bits: SLICE_BYTES_BITS.min(cluster_bits),
            refcount_cache_bytes: REFCOUNT_CACHE_BYTES as usize,
            overlap_checks: OverlapChecks::all() - OverlapChecks::INACTIVE_L2,
            pass_discard_request: true,
            pass_discard_snapshot: true,
            pass_discard_other: false,
            discard_no_unref: false,
        }
    }

    /// Takes what is given out of `options`; the rest stays as it is.
    ///
    /// # Errors
    /// `InvalidArgument` for values that make no sense, in QEMU's words; `Unsupported` for what isn't there.
    pub fn take(&mut self, options: &mut Options, header: &Header) -> Result<()> {
        self.take_caches(options)?;
        if let Some(bytes) = options.take_size("l2-cache-entry-size")? {
            let cluster = 1u64 << header.cluster_bits;
            if !bytes.is_power_of_two() || bytes < 1 << MIN_CLUSTER_BITS || bytes > cluster {
                return Err(BlockError::invalid(format!(
                    "L2 cache entry size must be a power of two between 512 and the cluster size ({cluster})"
                )));
            }
            self.slice_bytes_bits = bytes.trailing_zeros();
        }
        if options.take_number("cache-clean-interval")?.unwrap_or(0) > 0 {
            return Err(BlockError::unsupported(
                "cache-clean-interval is not supported",
            ));
        }
        // Only a permission to write refcounts late, and this writer never does.
        let lazy = options.take_bool("lazy-refcounts")?;
        if lazy == Some(true) && header.version < 3 {
            let text =
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level";
            return Err(BlockError::invalid(text));
        }
        if let Some(checks) = OverlapChecks::take(options)? {
            self.overlap_checks = checks;
        }
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

    /// Refuses what an open image can't change.
    ///
    /// # Errors
    /// `Unsupported`, with the name of the option.
    pub fn check_change(&self, before: &RuntimeOptions) -> Result<()> {
        let late = self.overlap_checks - before.overlap_checks;
        let option = if self.slice_bytes_bits != before.slice_bytes_bits {
            "l2-cache-entry-size"
        } else if late.contains(OverlapChecks::INACTIVE_L2) {
            "overlap-check.inactive-l2"
        } else {
            return Ok(());
        };
        let text = format!("The option '{option}' can only be set when the image is opened");
        Err(BlockError::unsupported(text))
    }

    fn take_caches(&mut self, options: &mut Options) -> Result<()> {
        let total = options.take_size("cache-size")?;
        let l2 = options.take_size("l2-cache-size")?;
        let refcount = options.take_size("refcount-cache-size")?;
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
        let rest = |part: Option<u64>| total.map(|t| t - part.unwrap_or(0));
        if let Some(bytes) = l2.or(rest(refcount)) {
            self.l2_cache_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        if let Some(bytes) = refcount.or(l2.and(rest(l2))) {
            self.refcount_cache_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        }
        Ok(())
    }
}

impl Image {
    /// Works in another way from now on.
    pub fn set_runtime(&self, runtime: RuntimeOptions) {
        self.l2.set_size(runtime.l2_cache_bytes);
        self.refcount_cache_bytes
            .store(runtime.refcount_cache_bytes, Ordering::Relaxed);
        *self
            .runtime
            .write()
            .expect("no code panics while it holds this lock") = runtime;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn templates_and_switches_say_what_is_looked_at() {
        let take = |text: &str| OverlapChecks::take(&mut Options::from_dotted(text).unwrap());
        assert_eq!(take("size=1").unwrap(), None);
        assert_eq!(
            take("overlap-check=none,overlap-check.active-l1=on").unwrap(),
            Some(OverlapChecks::ACTIVE_L1)
        );
        let all = take("overlap-check.template=all,overlap-check.main-header=off");
        let all = all.unwrap().unwrap();
        assert!(all.includes(Owner::InactiveL2) && !all.includes(Owner::Header));
        assert!(take("overlap-check=some").is_err());
        assert!(take("overlap-check=none,overlap-check.template=all").is_err());
    }
}
