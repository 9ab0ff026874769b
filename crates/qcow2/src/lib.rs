// SPDX-License-Identifier: MIT OR Apache-2.0
//! The qcow2 image format: versions 2 and 3.
//!
//! Reading order: `format` (what is on disk), `header`, `open`, `image` (one open image, its locks, lookup), `l2_table`, `l2_entry` and `l2_cache`, `read`, `write`,
//! `alloc` and `refcount`, `commit` (the order on disk), `epoch`, `remap` (zero writes, discards), `truncate` and `shrink`, `map`,
//! `overhaul` (changes of the whole image) with `snapshot_ops`, `amend` and `amend_version`, `write_compressed`, `data_file`, `vm_state`, `runtime` (options) and `cache_clean`, `check`, `create`.
//!
//! The driver knows its file and its backing node only as [`blockcore::Child`].

mod alloc;
mod amend;
mod amend_version;
mod bitmap;
mod bitmap_load;
mod bitmap_store;
mod cache_clean;
mod check;
mod commit;
mod compressed;
mod create;
mod crypto;
mod data_file;
mod driver;
mod epoch;
pub mod extension;
pub mod format;
pub mod header;
mod header_rewrite;
mod image;
mod inflated;
mod info;
mod l2_cache;
mod l2_entry;
mod l2_table;
mod map;
mod open;
mod overhaul;
mod read;
mod refcount;
mod remap;
mod runtime;
mod shrink;
pub mod snapshot;
mod snapshot_ops;
mod truncate;
mod vm_state;
mod write;
mod write_compressed;

pub use driver::Qcow2;
pub use open::Qcow2Factory;

#[cfg(test)]
mod tests;
