// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing what an image was created with: version, passwords, refcount width, lazy refcounts, length. Called by `driver`.
//!
//! Options are all looked at before the first one takes effect. They take effect one after the other, in QEMU's order: what a newer version is needed for
//! comes after the upgrade, and a downgrade comes last. An error leaves those before it done.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use blockcore::{
    BlockError, CreateOption, ErrorKind, IoBuf, MAX_LENGTH_BYTES, OptionKind, Options, Result,
    TruncateRequest,
};

use luks::SlotChange;

use crate::bitmap_load::Stored;
use crate::create::option;
use crate::crypto;
use crate::extension::{self, Extension};
use crate::format::{L1E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_ZERO};
use crate::header::{Compatible, CompressionType, Header, Incompatible};
use crate::image::{Image, Intent};
use crate::l2_entry::L2Entry;
use crate::l2_table::Mapping;
use crate::overhaul::Overhaul;
use crate::remap::Remap;
use crate::snapshot::{self, Snapshot};

/// Byte offset of the compatible feature bits in the header.
const COMPATIBLE_OFFSET: u64 = 80;
/// The most zeroes that one write carries, in bytes.
const ZERO_WRITE_BYTES: u64 = 1 << 20;

/// What `amend` knows, in the order in which tools show it.
pub fn amend_options() -> &'static [CreateOption] {
    const OPTIONS: &[CreateOption] = &[
        option(
            "backing_file",
            OptionKind::String,
            "Can't be amended; see rebase",
            None,
        ),
        option(
            "backing_fmt",
            OptionKind::String,
            "Can't be amended; see rebase",
            None,
        ),
        option(
            "compat",
            OptionKind::String,
            "Format version: v2 (0.10) or v3 (1.1)",
            None,
        ),
        option(
            "data_file",
            OptionKind::String,
            "External data file (not supported yet)",
            None,
        ),
        option(
            "data_file_raw",
            OptionKind::Bool,
            "Keep the external data file valid as a raw image (not supported yet)",
            None,
        ),
        option(
            "encrypt.state",
            OptionKind::String,
            "What becomes of key slots: active or inactive",
            None,
        ),
        option(
            "encrypt.new-secret",
            OptionKind::String,
            "Id of the secret that is the password of a slot that becomes active",
            None,
        ),
        option(
            "encrypt.old-secret",
            OptionKind::String,
            "Id of the secret that is the password of slots that become inactive",
            None,
        ),
        option(
            "encrypt.keyslot",
            OptionKind::Number,
            "The slot, from 0 to 7",
            None,
        ),
        option(
            "encrypt.iter-time",
            OptionKind::Number,
            "Milliseconds that it takes to try the new password: 2000 if not given",
            None,
        ),
        option(
            "lazy_refcounts",
            OptionKind::Bool,
            "Let refcounts be written late",
            None,
        ),
        option(
            "refcount_bits",
            OptionKind::Number,
            "Bits in a refcount",
            None,
        ),
        option("size", OptionKind::Size, "Length of the disk", None),
    ];
    OPTIONS
}

/// Options that have been looked at; `None`: as it is.
#[derive(Debug)]
struct Request {
    version: u32,
    lazy: Option<bool>,
    refcount_order: u32,
    size: Option<u64>,
    slots: Option<SlotChange>,
}

impl Request {
    fn new(options: &mut Options, header: &Header) -> Result<Request> {
        let compat = options.take_str("compat");
        let version = match compat.as_deref() {
            None => header.version,
            Some("0.10" | "v2") => 2,
            Some("1.1" | "v3") => 3,
            Some(other) => {
                let text = format!("Unknown compatibility level {other}");
                return Err(BlockError::invalid(text));
            }
        };
        let size = options.take_size("size")?;
        let backing = options.take_str("backing_file").is_some();
        let backing = options.take_str("backing_fmt").is_some() || backing;
        let lazy = options.take_bool("lazy_refcounts")?;
        let bits = options.take_number("refcount_bits")?;
        let bits = bits.unwrap_or(1 << header.refcount_order);
        if !bits.is_power_of_two() || bits > 64 {
            let text = "Refcount width must be a power of two and may not exceed 64 bits";
            return Err(BlockError::invalid(text));
        }
        if options.take_str("data_file").is_some() {
            let text = "data-file can only be set for images that use an external data file";
            return Err(BlockError::invalid(text));
        }
        if options.take_bool("data_file_raw")? == Some(true) {
            let text = "data-file-raw cannot be set on existing images";
            return Err(BlockError::invalid(text));
        }
        if backing {
            let text = "Cannot amend the backing file";
            let hint = "You can use 'qemu-img rebase' instead.";
            return Err(BlockError::invalid(text).hint(hint));
        }
        if lazy == Some(true) && version < 3 {
            let text = "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)";
            return Err(BlockError::invalid(text));
        }
        if version < 3 && bits != 16 {
            let text = match header.version {
                2 => {
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)"
                }
                _ => "compat=0.10 requires refcount_bits=16",
            };
            return Err(BlockError::invalid(text));
        }
        let slots = crypto::take_slot_change(options, header.crypt_method)?;
        Ok(Request {
            version,
            slots,
            lazy,
            refcount_order: bits.trailing_zeros(),
            size,
        })
    }
}

impl Image {
    /// Changes options of the image.
    ///
    /// # Errors
    /// `InvalidArgument` for options that make no sense or can't be changed, before anything is; those of metadata I/O.
    pub async fn amend(self: &Arc<Self>, mut options: Options) -> Result<()> {
        self.check_sound()?;
        let force = options.take_bool("force")?.unwrap_or(false);
        let request = Request::new(&mut options, &self.header())?;
        if let Some((key, _)) = options.iter().next() {
            let text = format!("Invalid parameter '{key}'");
            return Err(BlockError::invalid(text));
        }
        if request.version > self.version() {
            self.change_version(3).await?;
        }
        if let Some(change) = request.slots {
            self.change_slots(change, force).await?;
        }
        if request.refcount_order != self.header().refcount_order {
            let order = request.refcount_order;
            let work = move |image: Arc<Image>| async move { image.change_order(order).await };
            self.spawn_alone(0, MAX_LENGTH_BYTES, work).await?;
        }
        if let Some(lazy) = request.lazy {
            self.change_lazy(lazy).await?;
        }
        if let Some(size) = request.size {
            let mut resize = TruncateRequest::to(size);
            resize.exact = true;
            self.truncate(resize).await?;
        }
        if request.version < self.version() {
            self.change_version(2).await?;
        }
        Ok(())
    }

    /// Gives every refcount another width. The caller holds `changing` over all.
    async fn change_order(self: Arc<Self>, order: u32) -> Result<()> {
        let overhaul = Overhaul::begin_with_order(&self, order).await?;
        let mut header = self.header().clone();
        header.refcount_order = order;
        overhaul.finish(header, self.l1.to_vec()).await
    }

    async fn change_lazy(self: &Arc<Self>, lazy: bool) -> Result<()> {
        let mut features = self.header().compatible;
        if features.contains(Compatible::LAZY_REFCOUNTS) == lazy {
            return Ok(());
        }
        features.set(Compatible::LAZY_REFCOUNTS, lazy);
        let bytes = features.bits().to_be_bytes().to_vec();
        self.write_header_bytes(COMPATIBLE_OFFSET, bytes).await?;
        self.header().compatible = features;
        Ok(())
    }

    /// Makes the header that of another version.
    async fn change_version(self: &Arc<Self>, version: u32) -> Result<()> {
        let work = move |image: Arc<Image>| async move {
            match version {
                2 => {
                    image.check_downgrade().await?;
                    image.replace_zero_clusters().await?;
                }
                _ => image.complete_snapshots().await?,
            }
            image.commit().await?;
            let change = |header: &mut Header| {
                header.version = version;
                let names = |e: &Extension| e.kind == extension::FEATURE_NAMES;
                if version < 3 {
                    header.compatible = Compatible::empty();
                    header.incompatible.remove(Incompatible::COMPRESSION);
                    header.compression_type = CompressionType::Zlib;
                    header.autoclear = 0;
                    header.extensions.retain(|e| !names(e));
                    // Nor does it have bitmaps.
                    Stored::default().name_in(header);
                } else if !header.extensions.iter().any(names) {
                    header.extensions.push(extension::feature_names());
                }
            };
            image.rewrite_header(change).await?;
            image.format_version.store(version, Ordering::Release);
            match version {
                2 => image.free_unnamed_bitmaps().await,
                _ => Ok(()),
            }
        };
        self.spawn_alone(0, MAX_LENGTH_BYTES, work).await
    }

    /// Version 3 wants to know of each snapshot how long the disk was. In version 2 it can't have had another length than now. The caller holds `changing`
    /// over all.
    async fn complete_snapshots(self: &Arc<Self>) -> Result<()> {
        let mut header = self.header().clone();
        let mut table = snapshot::read_table(&header, &self.file).await?;
        if table.snapshots.iter().all(|s| s.is_complete) {
            return Ok(());
        }
        for s in &mut table.snapshots {
            s.disk_size.get_or_insert(self.size());
        }
        let mut overhaul = Overhaul::begin(self).await?;
        overhaul.write_snapshots(&mut header, &table).await?;
        overhaul.finish(header, self.l1.to_vec()).await
    }

    /// Version 2 has no zero clusters: where nothing is below they become unallocated, else data. The caller holds `changing` over all.
    async fn replace_zero_clusters(self: &Arc<Self>) -> Result<()> {
        let header = self.header().clone();
        for s in &snapshot::read_table(&header, &self.file).await?.snapshots {
            for &entry in self
                .snapshot_l1(s)
                .await?
                .iter()
                .filter(|&&e| e & L1E_OFFSET_MASK != 0)
            {
                let bytes = self.cluster_size() as usize;
                let table = self.read_words(entry & L1E_OFFSET_MASK, bytes).await?;
                if table
                    .iter()
                    .any(|e| e & (OFLAG_ZERO | OFLAG_COMPRESSED) == OFLAG_ZERO)
                {
                    let text = format!(
                        "Snapshot '{}' has zero clusters, which compat=0.10 has not",
                        s.name
                    );
                    return Err(BlockError::new(ErrorKind::Unsupported, text));
                }
            }
        }
        let _epoch = self.epochs.enter();
        let clusters = self.size().div_ceil(self.cluster_size());
        if self.backing.is_none() {
            return self
                .remap(0, clusters, false, |mapping, _| match mapping {
                    Mapping::ZeroPlain | Mapping::ZeroAllocated { .. } => {
                        Remap::Replace(L2Entry::default())
                    }
                    _ => Remap::Keep,
                })
                .await;
        }
        let mut at = 0;
        while at < self.size() {
            let (mapping, bytes) = self.run(at, self.size() - at, Intent::Write).await?;
            let mut done = 0;
            while done < bytes
                && matches!(mapping, Mapping::ZeroPlain | Mapping::ZeroAllocated { .. })
            {
                let n = (bytes - done).min(ZERO_WRITE_BYTES);
                done += self
                    .write_some(at + done, IoBuf::zeroes(n as usize))
                    .await?;
            }
            at += bytes;
        }
        Ok(())
    }

    /// What version 2 has no words for, in QEMU's order. The caller holds `changing` over all.
    async fn check_downgrade(self: &Arc<Self>) -> Result<()> {
        let unsupported = |text: String| Err(BlockError::new(ErrorKind::Unsupported, text));
        let header = self.header().clone();
        if header.refcount_order != 4 {
            return Err(BlockError::invalid("compat=0.10 requires refcount_bits=16"));
        }
        if header.incompatible.contains(Incompatible::DATA_FILE) {
            return unsupported("Cannot downgrade an image with a data file".to_owned());
        }
        let snapshots = snapshot::read_table(&header, &self.file).await?.snapshots;
        let is_new = |s: &Snapshot| {
            s.vm_state_size > u64::from(u32::MAX)
                || s.disk_size.is_some_and(|size| size != self.size())
        };
        if snapshots.iter().any(is_new) {
            return unsupported("Internal snapshots prevent downgrade of image".to_owned());
        }
        let others = header.incompatible - Incompatible::COMPRESSION;
        if !others.is_empty() {
            let bits = others.bits();
            return unsupported(format!(
                "Cannot downgrade an image with incompatible features {bits:#x} set"
            ));
        }
        if header.compression_type != CompressionType::Zlib {
            self.commit().await?;
            let mut has_compressed = self.has_compressed(&self.l1.to_vec()).await?;
            for s in &snapshots {
                has_compressed |= self.has_compressed(&self.snapshot_l1(s).await?).await?;
            }
            if has_compressed {
                return unsupported(
                    "Cannot downgrade an image with zstd compression type and existing compressed clusters"
                        .to_owned(),
                );
            }
        }
        Ok(())
    }

    /// Whether there are compressed clusters beneath an L1 table, which has no extended entries.
    async fn has_compressed(&self, l1: &[u64]) -> Result<bool> {
        for table in l1.iter().map(|entry| entry & L1E_OFFSET_MASK) {
            if table != 0 {
                let words = self.read_words(table, self.cluster_size() as usize).await?;
                if words.iter().any(|entry| entry & OFLAG_COMPRESSED != 0) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }
}
