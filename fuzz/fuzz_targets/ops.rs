// SPDX-License-Identifier: MIT OR Apache-2.0
//! A sound image with damaged metadata, and requests on it.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| fuzzing::operations(bytes));
