// SPDX-License-Identifier: MIT OR Apache-2.0
//! The core of an async block layer: disks that are composed of nodes, each run by a driver.
//!
//! A program opens a [`Backend`] through a [`Registry`] of drivers and sends it requests; a driver implements [`BlockDriver`] and reaches its
//! children through [`Child`]. Between the two lies the request path: bounds, alignment, ordering, splitting. This crate names no driver
//! but those for tests, in [`testing`]; the crate `blocklayer` puts the standard ones together.
//!
//! ```
//! use blockcore::testing::MemoryFactory;
//! use blockcore::{IoBuf, OpenOptions, Options, Registry, WriteFlags};
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> blockcore::Result<()> {
//! let mut registry = Registry::new();
//! registry.register(MemoryFactory::default());
//! registry.create("memory", "memory:disk", Options::new().with("size", "1M"), Default::default()).await?;
//! let disk = OpenOptions::new().format("memory").open(&registry, "memory:disk").await?;
//! disk.pwritev(4096, IoBuf::from(vec![7; 512]), WriteFlags::empty()).await?;
//! assert_eq!(disk.read(4096, 512).await?.to_vec(), vec![7; 512]);
//! disk.flush().await?;
//! disk.close().await?;
//! # Ok(()) }
//! ```

pub mod backend;
mod bitmap_ops;
pub mod blocking;
pub mod buffer;
mod check;
pub mod child;
pub mod debug;
pub mod dirty_bitmap;
pub mod driver;
pub mod error;
mod full_name;
mod hbitmap;
pub mod limits;
pub mod name;
pub mod node;
pub mod open;
pub mod options;
pub mod orphan;
pub mod perm;
pub mod policy;
pub mod registry;
mod request;
pub mod secret;
pub mod size;
mod snapshot;
pub mod status;
pub mod testing;
pub mod tracked;
pub mod walk;
mod zeroes;

pub use backend::{Backend, InFlight, InFlightGuard, OwnedInFlightGuard};
pub use bitmap_ops::NewBitmap;
pub use buffer::{IoBuf, IoBufMut};
pub use check::CheckAborted;
pub use child::{Child, ChildRole};
pub use debug::DebugEvent;
pub use dirty_bitmap::{DirtyBitmap, DirtyBitmaps, FrozenBitmap};
pub use driver::{
    BackingName, BlockDriver, CheckFix, CheckResult, CreateOption, DriverFactory, DriverInfo,
    OptionKind, Preallocation, PreparedReopen, ReadFlags, ReopenRequest, SnapshotInfo,
    SpecificInfo, TruncateRequest, WriteFlags,
};
pub use error::{BlockError, ErrorKind, Op, Result, strerror};
pub use hbitmap::HBitmap;
pub use limits::{BlockLimits, MAX_LENGTH_BYTES, MAX_REQUEST_BYTES};
pub use node::{Node, NodeConfig, NodeFlags, SECTOR_BYTES};
pub use open::{CreateContext, OpenContext, OpenOptions};
pub use options::{OptionValue, Options};
pub use perm::{Perm, Permissions};
pub use policy::OpenPolicy;
pub use registry::{Diagnostics, Registry};
pub use secret::{Secret, Secrets};
pub use snapshot::{AmendProgress, SnapshotRequest, SnapshotSelector};
pub use status::{BlockStatus, ChainStatus, StatusFlags, StatusMode};
pub use walk::{chain_below, chain_is_zero, chain_status};
