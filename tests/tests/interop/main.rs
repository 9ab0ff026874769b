// SPDX-License-Identifier: MIT OR Apache-2.0
//! Interoperation with the installed QEMU tools, both ways round: images made by one side and changed by the other must be sound
//! to both and hold what a byte-vector model says (`random_chain`), a real file system survives a chain of ours
//! (`file_system`), random scripts print the same on both (`twin`), the two sides shut each other out of an open image (`locks`), what one encrypts the other decrypts (`luks`, `encrypted`), what we
//! cannot use is refused (`refused`), images of a feature change hands (`subclusters`, `bitmaps`), and so do those of all features and pairs of them (`matrix`);
//! damaged images are repaired as well as QEMU does it (`repair`).
//!
//! The tests drive binaries. Without a QEMU 10 they are skipped with a line that says so. `BLOCKLAYER_SEED` sets the seed of
//! the random ones, which print the one they used.

mod bitmaps;
mod dirty;
mod encrypted;
mod file_system;
mod locks;
mod luks;
mod matrix;
mod random_chain;
mod refused;
mod repair;
mod subclusters;
mod support;
mod twin;
