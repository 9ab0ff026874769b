// SPDX-License-Identifier: MIT OR Apache-2.0
//! Who makes the system calls: the blocking pool.

pub(crate) mod pool;
