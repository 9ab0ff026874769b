// SPDX-License-Identifier: MIT OR Apache-2.0
//! Any bytes as an image, opened read-only and looked at.

#![no_main]

mod bounded;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bounded::bounded(|| fuzzing::open(bytes)));
