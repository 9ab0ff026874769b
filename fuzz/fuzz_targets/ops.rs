// SPDX-License-Identifier: MIT OR Apache-2.0
//! A sound image with damaged metadata, and requests on it.

#![no_main]

mod bounded;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| bounded::bounded(|| fuzzing::operations(bytes)));
