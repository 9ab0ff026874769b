// SPDX-License-Identifier: MIT OR Apache-2.0
//! The memory that a case takes is counted by the allocator and bounded. (libFuzzer's own limit of what is allocated at once needs a sanitizer.)

use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Runs one case.
pub fn bounded(case: impl FnOnce()) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    case();
    let used = MEMORY.peak_usage().saturating_sub(before);
    assert!(used <= fuzzing::MEMORY_BYTES, "{used} bytes of memory");
}
