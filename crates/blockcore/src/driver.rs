// SPDX-License-Identifier: MIT OR Apache-2.0
//! The driver contract: [`BlockDriver`] is one open image, [`DriverFactory`] opens and creates them.
//!
//! Drivers are reached only through a [`Node`](crate::Node), which checks every request before it calls the driver, and
//! every answer after. A driver reaches its own children only through [`Child`].
//!
//! # What holds for every method
//!
//! * Methods take `&self` and run concurrently, also for overlapping ranges. What must exclude what is the driver's to say.
//! * Futures are `Send` and run on any tokio runtime. No method waits for the disk on the calling thread.
//! * *If the future is dropped*: a read has no effect. A change is either done or not done, per sector, and that is settled
//!   *before any later request to the same bytes on the same node takes effect*: a driver that hands memory or work to
//!   somebody who goes on (the kernel, a spawned task) keeps later overlapping requests waiting for it. Nothing leaks for
//!   good, and `flush` and `close` wait for what is still going on.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use bitflags::bitflags;

use crate::buffer::{IoBuf, IoBufMut};
use crate::child::Child;
use crate::debug::DebugEvent;
use crate::dirty_bitmap::DirtyBitmaps;
use crate::error::{BlockError, Result};
use crate::limits::BlockLimits;
use crate::open::{CreateContext, OpenContext};
use crate::options::Options;
use crate::perm::Permissions;
use crate::snapshot::{AmendProgress, SnapshotRequest, SnapshotSelector};
use crate::status::{BlockStatus, StatusFlags, StatusMode};

bitflags! {
    /// How a read is to be done.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct ReadFlags: u8 {
        /// The buffer is registered with the engine; a hint.
        const REGISTERED_BUF = 1 << 0;
    }
}

bitflags! {
    /// How a write, a zero write or a discard is to be done.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
    pub struct WriteFlags: u8 {
        /// Durable when the request is done ("force unit access").
        const FUA = 1 << 0;
        /// A zero write may give storage back.
        const MAY_UNMAP = 1 << 1;
        /// A zero write fails with `Unsupported` where it would be no faster than writing zeroes.
        const NO_FALLBACK = 1 << 2;
        /// The buffer is registered with the engine; a hint.
        const REGISTERED_BUF = 1 << 3;
        /// Store the data compressed.
        const COMPRESSED = 1 << 4;
        /// The data are what the chain reads as already (copy-on-read).
        const UNCHANGED = 1 << 5;
    }
}

/// What `truncate` puts behind the old end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum Preallocation {
    /// Nothing.
    #[default]
    Off,
    /// Metadata is allocated, data is not.
    Metadata,
    /// Storage is reserved, but not written.
    Falloc,
    /// Zeroes are written.
    Full,
}

impl Preallocation {
    /// The mode's name in options and messages.
    pub fn name(self) -> &'static str {
        match self {
            Preallocation::Off => "off",
            Preallocation::Metadata => "metadata",
            Preallocation::Falloc => "falloc",
            Preallocation::Full => "full",
        }
    }

    /// The mode of a name.
    pub fn from_name(name: &str) -> Option<Preallocation> {
        [
            Preallocation::Off,
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ]
        .into_iter()
        .find(|p| p.name() == name)
    }
}

impl fmt::Display for Preallocation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How a node's length is to be changed.
#[derive(Clone, Copy, Debug, Default)]
pub struct TruncateRequest {
    /// The new length in bytes.
    pub bytes: u64,
    /// Whether a length that can't be met exactly (a device's) is an error.
    pub exact: bool,
    /// What to put behind the old end.
    pub preallocation: Preallocation,
    /// What is behind the old end must read as zero even where a longer backing node holds data there.
    pub zero_new_area: bool,
}

impl TruncateRequest {
    /// To `bytes` bytes, with no further wishes.
    pub fn to(bytes: u64) -> TruncateRequest {
        TruncateRequest {
            bytes,
            ..TruncateRequest::default()
        }
    }
}

/// General facts about an open image. `QEMU: BlockDriverInfo`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DriverInfo {
    /// Bytes in an allocation unit; 0 where the format has none.
    pub cluster_size: u64,
    /// Bytes in the smallest part of a cluster with a state of its own; equals `cluster_size` without subclusters.
    pub subcluster_size: u64,
    /// The guest offset at which the VM state area begins, in bytes.
    pub vm_state_offset: u64,
    /// The image was not closed properly.
    pub is_dirty: bool,
    /// New, unwritten storage reads as zero.
    pub unallocated_reads_zero: bool,
}

/// What only one format knows about an image, in the words and the order of `qemu-img info`.
#[derive(Clone, Debug, PartialEq)]
pub struct SpecificInfo {
    /// The type tag: `qcow2`, `file` ...
    pub type_name: &'static str,
    /// The facts. Keys are QEMU's (`lazy-refcounts`), the order is that of printing.
    pub data: serde_json::Map<String, serde_json::Value>,
}

/// An internal snapshot of an image. `QEMU: QEMUSnapshotInfo`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The id, unique in the image.
    pub id: String,
    /// The name.
    pub name: String,
    /// Bytes of VM state.
    pub vm_state_size: u64,
    /// When it was made: seconds since 1970, UTC.
    pub date_sec: u32,
    /// When it was made: nanoseconds within the second.
    pub date_nsec: u32,
    /// How long the guest had been running, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Instructions the guest had executed, where they were counted.
    pub icount: Option<u64>,
}

/// The backing file that an image's own header names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The name as stored.
    pub filename: String,
    /// The format as stored, if any.
    pub format: Option<String>,
}

/// What `check` may repair.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub enum CheckFix {
    /// Nothing.
    #[default]
    None,
    /// Clusters that nobody uses.
    Leaks,
    /// Everything that can be.
    All,
}

/// What `check` found. `QEMU: BdrvCheckResult`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CheckResult {
    /// Places where the metadata contradicts itself.
    pub corruptions: u64,
    /// Clusters with a refcount but no user.
    pub leaks: u64,
    /// Checks that could not be made.
    pub check_errors: u64,
    /// Corruptions repaired.
    pub corruptions_fixed: u64,
    /// Leaks repaired.
    pub leaks_fixed: u64,
    /// The host offset of the image's end, in bytes; 0 where unknown.
    pub image_end_offset: u64,
    /// Guest clusters in all.
    pub total_clusters: u64,
    /// Guest clusters that are allocated.
    pub allocated_clusters: u64,
    /// Allocated guest clusters that do not lie behind their predecessor.
    pub fragmented_clusters: u64,
    /// Guest clusters that are stored compressed.
    pub compressed_clusters: u64,
    /// One line for each finding, in the words of the format's own tool.
    pub messages: Vec<String>,
}

/// What `reopen` is to change on one node.
#[derive(Clone, Debug)]
pub struct ReopenRequest {
    /// Whether the node is to be read-only.
    pub read_only: bool,
    /// Whether the host's page cache is to be bypassed.
    pub direct: bool,
    /// Options of the driver itself that are to change.
    pub options: Options,
}

/// A prepared reopen of one node: everything that can fail has been done. Dropping it undoes the preparation.
pub trait PreparedReopen: Send {
    /// Makes the change. Can't fail.
    fn commit(self: Box<Self>);
}

/// One open image, device or filter.
#[async_trait]
pub trait BlockDriver: Send + Sync + 'static {
    /// The driver's name: `qcow2`, `raw`, `file` ...
    fn format_name(&self) -> &'static str;

    /// Whether the driver touches the host itself and has no children.
    fn is_protocol(&self) -> bool {
        false
    }

    /// Whether the driver passes requests on to its first child at the same offsets. `QEMU: is_filter`.
    fn is_filter(&self) -> bool {
        false
    }

    /// Whether ranges of the format can be absent, so that a backing node shows through, or zeroes where there is none.
    fn supports_backing(&self) -> bool {
        false
    }

    /// Whether what the node reads as lies encrypted in what is below it. `QEMU: BlockDriverState::encrypted`. *If omitted*: no.
    fn is_encrypted(&self) -> bool {
        false
    }

    /// Whether what appears when the node becomes longer reads as zero until it is written, whether by [`truncate`](BlockDriver::truncate) or by a write behind
    /// the end. Formats rely on it. *If omitted*: no.
    fn grows_zeroed(&self) -> bool {
        false
    }

    /// The nodes that this one is composed of: first the primary child, a backing node last.
    fn children(&self) -> Vec<&Child> {
        Vec::new()
    }

    /// The node that shows through where this one holds nothing.
    fn backing(&self) -> Option<&Child> {
        None
    }

    /// The child that holds this node's own bytes: what a format lies in, what a filter filters.
    fn primary(&self) -> Option<&Child> {
        self.children().into_iter().next()
    }

    /// The sizes and alignments the driver wants.
    ///
    /// *Called* once after open and after every reopen. *If omitted*: no wishes.
    fn limits(&self) -> BlockLimits {
        BlockLimits::default()
    }

    /// The length of the disk in bytes.
    ///
    /// *Called* after open, truncate, and a write past the end that failed or was given up; the node keeps the answer. *The driver must* settle what was given
    /// up first. *Errors*: the host's.
    async fn length(&self) -> Result<u64>;

    /// Reads without waiting, if that is possible, into memory that the caller keeps.
    ///
    /// *Called* first for every read, on the caller's thread. *The caller guarantees* what it does for `preadv`.
    /// *The driver must* either fill all of `buf` and return `true`, or return `false` (what it wrote to `buf` till then means
    /// nothing), within microseconds: no wait for a lock that is held over I/O, no disk wait. An error is `false`, too: the
    /// caller comes back with `preadv`, which tells. *If omitted*: never possible.
    fn read_nowait(&self, offset: u64, buf: &mut [u8]) -> bool {
        let _nothing = (offset, buf);
        false
    }

    /// Reads `buf.len()` bytes at `offset`.
    ///
    /// *The caller guarantees*: offset and length are multiples of `request_alignment`, the length is not 0 and not above
    /// `max_transfer`, and the range lies within the node's length (rounded up to the alignment).
    /// *The driver must* fill every byte; a short host file reads as zero. *Errors*: the host's, `Corrupt`.
    /// *If dropped*: the memory stays owned by whoever still writes to it.
    async fn preadv(&self, offset: u64, buf: IoBufMut, flags: ReadFlags) -> Result<IoBufMut>;

    /// Writes `buf` at `offset`.
    ///
    /// *The caller guarantees* what it does for `preadv`, and that the node is writable; a range past the end comes only to a
    /// protocol driver, which then grows. `FUA` comes only if [`supported_write_flags`](Self::supported_write_flags) has it.
    /// *The driver must* show the data to every later read when it returns `Ok`. *Errors*: the host's, `NoSpace`, `Corrupt`;
    /// what the range holds after one is old or new, per sector. *If omitted*: the node is read-only.
    async fn pwritev(&self, offset: u64, buf: IoBuf, flags: WriteFlags) -> Result<()> {
        let _nothing = (offset, buf, flags);
        Err(BlockError::unsupported(format!(
            "'{}' can't be written",
            self.format_name()
        )))
    }

    /// Makes `bytes` bytes at `offset` read as zero, without writing them if that can be helped.
    ///
    /// *The caller guarantees* what it does for `pwritev`; the range either is aligned to `pwrite_zeroes_alignment` or lies
    /// between two multiples of it. *The driver must* return `Unsupported` (errno ENOTSUP) where it would have to write zeroes: the
    /// caller then writes them, unless the request is `NO_FALLBACK`. *If omitted*: unsupported.
    async fn pwrite_zeroes(&self, offset: u64, bytes: u64, flags: WriteFlags) -> Result<()> {
        let _nothing = (offset, bytes, flags);
        Err(BlockError::from_errno(libc::ENOTSUP))
    }

    /// Says that what the range holds is no longer needed.
    ///
    /// *The caller guarantees* a range within the length that is aligned to `pdiscard_alignment`, or lies within one unit of it, and then may be aligned
    /// to nothing (`EINVAL` is as good an answer as `Unsupported` then). A hint: *the driver may* do nothing, and
    /// return `Unsupported` for parts it can't do. What the range reads as afterwards is the old data or what the format says (qcow2:
    /// zeroes, never older data of a backing node). *If omitted*: unsupported.
    async fn pdiscard(&self, offset: u64, bytes: u64) -> Result<()> {
        let _nothing = (offset, bytes);
        Err(BlockError::from_errno(libc::ENOTSUP))
    }

    /// Says what a range that starts at `offset` holds.
    ///
    /// *The caller guarantees* that the range is not empty and within the length. *The driver must* answer for at least one
    /// byte from `offset` and at most `bytes`. It says `DATA`, `ZERO` and `OFFSET_VALID`, or `RAW` (ask `file`), and nothing where the
    /// layer holds nothing. *If omitted*: data, at no known place.
    async fn block_status(&self, offset: u64, bytes: u64, mode: StatusMode) -> Result<BlockStatus> {
        let _nothing = (offset, mode);
        Ok(BlockStatus::new(StatusFlags::DATA, bytes))
    }

    /// Reserves storage for a range, so that writing to it later finds room. What the range reads as, and the length, stay.
    ///
    /// *Called* for ranges within the length. A hint: *the driver may* do nothing. *If omitted*: nothing.
    async fn reserve_storage(&self, offset: u64, bytes: u64) -> Result<()> {
        let _nothing = (offset, bytes);
        Ok(())
    }

    /// Makes every write that was done before the call durable, and what makes it reachable too.
    ///
    /// *Errors*: the host's; then nothing is known about what is durable, and the driver must not forget what it has yet to
    /// write. *If dropped*: it may go on. *If omitted*: all children are flushed.
    async fn flush(&self) -> Result<()> {
        for child in self.children() {
            child.flush().await?;
        }
        Ok(())
    }

    /// Write flags that the driver keeps itself; others are emulated or dropped. *If omitted*: none.
    fn supported_write_flags(&self) -> WriteFlags {
        WriteFlags::empty()
    }

    /// Zero-write flags that the driver keeps itself. *If omitted*: none.
    fn supported_zero_flags(&self) -> WriteFlags {
        WriteFlags::empty()
    }

    /// Changes the length of the disk.
    ///
    /// *The caller guarantees* that the node is writable and that no other request is beyond the new or the old end.
    /// *If omitted*: unsupported.
    async fn truncate(&self, request: TruncateRequest) -> Result<()> {
        let _nothing = request;
        Err(BlockError::unsupported(
            "Image format driver does not support resize",
        ))
    }

    /// Bytes that the image takes up on the host. *If omitted*: unknown.
    async fn allocated_size(&self) -> Result<Option<u64>> {
        Ok(None)
    }

    /// General facts. *If omitted*: unsupported, as for QEMU's drivers without `get_info`.
    async fn info(&self) -> Result<DriverInfo> {
        Err(BlockError::from_errno(libc::ENOTSUP))
    }

    /// Facts that only this format knows. *If omitted*: none.
    async fn specific_info(&self) -> Result<Option<SpecificInfo>> {
        Ok(None)
    }

    /// The internal snapshots. *If omitted*: none.
    async fn snapshots(&self) -> Result<Vec<SnapshotInfo>> {
        Ok(Vec::new())
    }

    /// Changes what the image was created with, and makes that durable. `QEMU: bdrv_amend_options`.
    ///
    /// *The caller guarantees* that no change of the node is in flight, and none begins meanwhile, and that the options are among the factory's
    /// [`amend_options`](DriverFactory::amend_options). *Errors*: `InvalidArgument` where they make no sense: then nothing has changed. *If omitted*:
    /// unsupported. *If the future is dropped*: it isn't; the caller has a task for it.
    ///
    /// One option is in no list: `force`, for what loses data for good, as the last password of an encrypted image. Whoever has no use for it leaves it.
    /// What takes long tells `progress` of its steps.
    async fn amend(&self, options: Options, progress: &AmendProgress) -> Result<()> {
        let _nothing = (options, progress);
        let text = format!(
            "Format driver '{}' does not support option amendment",
            self.format_name()
        );
        Err(BlockError::from_errno(libc::ENOTSUP).message(text))
    }

    /// Takes an internal snapshot, and makes it durable. `QEMU: bdrv_snapshot_create`.
    ///
    /// *The caller guarantees* that no change of the node is in flight, and none begins meanwhile. *Errors*: nothing has changed. *If omitted*:
    /// unsupported. *If the future is dropped*: it isn't; the caller has a task for it.
    async fn snapshot_create(&self, request: SnapshotRequest) -> Result<()> {
        let _nothing = request;
        Err(BlockError::from_errno(libc::ENOTSUP))
    }

    /// Makes the node what it was when a snapshot was taken, and that durable. `QEMU: bdrv_snapshot_goto`.
    ///
    /// As [`snapshot_create`](BlockDriver::snapshot_create); *errors* also: `NotFound`.
    async fn snapshot_goto(&self, which: &SnapshotSelector) -> Result<()> {
        let _nothing = which;
        Err(BlockError::from_errno(libc::ENOTSUP)
            .message("Block driver does not support snapshots"))
    }

    /// Deletes a snapshot, and makes that durable. `QEMU: bdrv_snapshot_delete`.
    ///
    /// As [`snapshot_goto`](BlockDriver::snapshot_goto).
    async fn snapshot_delete(&self, which: &SnapshotSelector) -> Result<()> {
        let _nothing = which;
        Err(BlockError::from_errno(libc::ENOTSUP)
            .message("Block driver does not support snapshots"))
    }

    /// Shows a snapshot instead of the active layer of an image that is open read-only. `QEMU: bdrv_snapshot_load_tmp`.
    ///
    /// *The caller guarantees* that no request is in flight. *Errors*: `NotFound`; those of reading metadata. *If omitted*: unsupported.
    async fn snapshot_load(&self, which: &SnapshotSelector) -> Result<()> {
        let _nothing = which;
        let text = format!(
            "Block format '{}' used by device '' does not support temporarily loading internal snapshots",
            self.format_name()
        );
        Err(BlockError::from_errno(libc::ENOTSUP).message(text))
    }

    /// The dirty bitmaps of a driver that can keep them in its image, those that are there already among them. The node shares the set.
    ///
    /// *Called* after open. *The driver must* store those that are persistent when it is closed or becomes read-only, and say with
    /// [`set_copies_are_current`](DirtyBitmaps::set_copies_are_current) whether the copies claim to be right. *If omitted*: bitmaps are never stored.
    fn dirty_bitmaps(&self) -> Option<Arc<DirtyBitmaps>> {
        None
    }

    /// Whether the image can store dirty bitmaps. *If omitted*: no.
    fn supports_persistent_bitmaps(&self) -> bool {
        false
    }

    /// Whether a new persistent bitmap could be stored. *If omitted*: as far as this driver knows.
    async fn check_bitmap(&self, name: &str, granularity: u64) -> Result<()> {
        let _nothing = (name, granularity);
        Ok(())
    }

    /// Makes it durable that the copies of bitmaps in the image are outdated.
    ///
    /// *Called* before the first change of the node, or of a bitmap, while the copies claim to be right; often by many at the same time. *Errors*: the
    /// change isn't made. *If dropped*: it may go on, and holds up nobody. *If omitted*: there are no copies.
    async fn outdate_bitmaps(&self) -> Result<()> {
        Ok(())
    }

    /// The backing file that the image names. *If omitted*: none.
    fn backing_name(&self) -> Option<BackingName> {
        None
    }

    /// The driver's own options that change what a guest sees; they are part of a node's [`full_name`](crate::Node::full_name). *If omitted*: none.
    fn strong_options(&self) -> &'static [&'static str] {
        &[]
    }

    /// The children beside the primary one that change what a guest sees, and that nothing but options names; they are part of a node's
    /// [`full_name`](crate::Node::full_name). *If omitted*: none.
    fn strong_children(&self) -> Vec<&Child> {
        Vec::new()
    }

    /// The one name that a driver without files has (`null-co://`). *If omitted*: the name the node was opened by.
    fn exact_filename(&self) -> Option<&'static str> {
        None
    }

    /// Checks the metadata, and repairs what `fix` allows.
    ///
    /// *The caller guarantees* that no change of the node is in flight, and none begins meanwhile; and for repairs that it is writable. *Errors*: the host's,
    /// with what was found till then ([`CheckAborted`](crate::CheckAborted)). *If the future is dropped*: it isn't; the caller has a task for it.
    /// *If omitted*: unsupported.
    async fn check(&self, fix: CheckFix) -> Result<CheckResult> {
        let _nothing = fix;
        Err(BlockError::from_errno(libc::ENOTSUP)
            .message("This image format does not support checks"))
    }

    /// Copies a range of `source`, a node that this driver can reach without reading (a file on the same host), to itself.
    ///
    /// *If omitted*: unsupported; the caller reads and writes.
    async fn copy_range_from(
        &self,
        source: &crate::Node,
        src_offset: u64,
        dst_offset: u64,
        bytes: u64,
    ) -> Result<()> {
        let _nothing = (source, src_offset, dst_offset, bytes);
        Err(BlockError::from_errno(libc::ENOTSUP))
    }

    /// Prepares a change of mode or options.
    ///
    /// *The caller guarantees* that no request is in flight until the preparation is committed or dropped. *The driver must*
    /// take the options it can change out of `request.options`; what it leaves is refused by the caller. *If omitted*: any
    /// read-only mode is fine, no option can be changed.
    async fn reopen_prepare(&self, request: &mut ReopenRequest) -> Result<Box<dyn PreparedReopen>> {
        struct Nothing;
        impl PreparedReopen for Nothing {
            fn commit(self: Box<Self>) {}
        }
        let _nothing = request;
        Ok(Box::new(Nothing))
    }

    /// Reads the VM state area. *If omitted*: unsupported.
    async fn load_vmstate(&self, offset: u64, buf: IoBufMut) -> Result<IoBufMut> {
        let _nothing = (offset, buf);
        Err(BlockError::from_errno(libc::ENOTSUP))
    }

    /// Writes the VM state area. *If omitted*: unsupported.
    async fn save_vmstate(&self, offset: u64, buf: IoBuf) -> Result<()> {
        let _nothing = (offset, buf);
        Err(BlockError::from_errno(libc::ENOTSUP))
    }

    /// Says what the parent does with the node, and what it lets others do; on a file, this takes and drops locks.
    ///
    /// *Called* once the parent's format is known and before its first request, and whenever that changes. *Errors*: `Locked`; then what held before
    /// holds on. *If omitted*: nothing to do.
    async fn set_permissions(&self, permissions: Permissions) -> Result<()> {
        let _nothing = permissions;
        Ok(())
    }

    /// Whether the driver wants to hear of the points that requests pass ([`debug_event`](Self::debug_event)).
    ///
    /// *Called* once, after open. *If omitted*: no. A driver that passes requests on unchanged says what its child says.
    fn wants_debug_events(&self) -> bool {
        false
    }

    /// A parent, or the request path, is about to do something to this node.
    ///
    /// *Called* only if [`wants_debug_events`](Self::wants_debug_events); *the driver may* take as long as it likes. *If omitted*: nothing.
    async fn debug_event(&self, event: DebugEvent) {
        let _nothing = event;
    }

    /// Ends all work: waits for what dropped futures left going on, writes what is not written yet, gives back what the host
    /// lent. Children are closed after it, by the node.
    ///
    /// *Called* once, with no request in flight; no method is called after it. *If omitted*: nothing to do.
    async fn close(&self) -> Result<()> {
        Ok(())
    }

    /// For tests and tools that know the driver: the driver as itself.
    fn as_any(&self) -> &dyn std::any::Any;
}

/// The type of a creation option's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OptionKind {
    /// Text.
    String,
    /// `on` or `off`.
    Bool,
    /// A number.
    Number,
    /// A number of bytes, with an optional suffix.
    Size,
}

/// An option that [`DriverFactory::create`] knows.
#[derive(Clone, Copy, Debug)]
pub struct CreateOption {
    /// The name.
    pub name: &'static str,
    /// The type of value.
    pub kind: OptionKind,
    /// One line for `-o help`.
    pub help: &'static str,
    /// The value when it isn't given, as `-o help` shows it.
    pub default: Option<&'static str>,
}

/// A kind of driver: recognises, opens and creates its images.
#[async_trait]
pub trait DriverFactory: Send + Sync + 'static {
    /// The driver's name: the value of the option `driver` and of `-f`.
    fn format_name(&self) -> &'static str;

    /// For a protocol driver: the prefix of names that belong to it (`file` for `file:x`).
    fn protocol_name(&self) -> Option<&'static str> {
        None
    }

    /// Whether images can be opened without a file (a filter that takes only options, `null-co`).
    fn needs_filename(&self) -> bool {
        false
    }

    /// How sure the driver is that an image that begins with `head` is its own: 0 (no) to 100. Raw says 1.
    fn probe(&self, head: &[u8]) -> u32 {
        let _nothing = head;
        0
    }

    /// For a protocol driver: whether a plain path without prefix belongs to it, 0 to 100 (a device: 100; a file: 1).
    fn probe_path(&self, path: &str) -> u32 {
        let _nothing = path;
        0
    }

    /// What the driver does with its file and puts up with there, when its own parent does and puts up with `parent`.
    /// *If omitted*: nobody else may write to or resize what a format lies in.
    fn child_permissions(&self, parent: Permissions, read_only: bool) -> Permissions {
        let _same_for_all = parent;
        Permissions::storage(!read_only)
    }

    /// Opens an image. The driver takes its own options out of `options`; what is left is refused by the caller.
    async fn open(
        &self,
        ctx: &OpenContext<'_>,
        options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>>;

    /// What [`BlockDriver::amend`] takes, in the order in which tools show it. *If omitted*: nothing.
    fn amend_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// Whether images of this format can hold compressed data: [`WriteFlags::COMPRESSED`]. *If omitted*: no.
    fn supports_compressed_writes(&self) -> bool {
        false
    }

    /// What `create` knows. Empty: images can't be created.
    fn create_options(&self) -> &'static [CreateOption] {
        &[]
    }

    /// Creates an image. The option `size` is always there, in bytes.
    async fn create(
        &self,
        ctx: &CreateContext<'_>,
        filename: &str,
        options: Options,
    ) -> Result<()> {
        let _nothing = (ctx, filename, options);
        Err(BlockError::unsupported(format!(
            "Format driver '{}' does not support image creation",
            self.format_name()
        )))
    }

    /// Takes away what [`create`](DriverFactory::create) has just made and could not finish. *If omitted*: unsupported; the half-made image stays.
    async fn delete(&self, filename: &str) -> Result<()> {
        let _nothing = filename;
        Err(BlockError::from_errno(libc::ENOTSUP))
    }
}
