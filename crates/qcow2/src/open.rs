// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening an image: [`Qcow2Factory`].
//!
//! Everything that is read is checked before it is used: the header by `header`, tables when they are loaded. Nothing is written until the first
//! change, but for what the specification wants a writer to do at once (`prepare_writing`).

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, RwLock};

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockError, Child, CreateContext, CreateOption, DebugEvent, DriverFactory,
    IoBufMut, OpenContext, Options, ReadFlags, Result, SECTOR_BYTES,
};

use crate::alloc::Meta;
use crate::commit::CommitState;
use crate::crypto::Crypto;
use crate::data_file::DataFile;
use crate::driver::Qcow2;
use crate::format::{L1E_OFFSET_MASK, MAGIC};
use crate::header::{AUTOCLEAR_BITMAPS, AUTOCLEAR_DATA_FILE_RAW, Header};
use crate::image::{Image, Owner, be_words};
use crate::l2_cache::L2Cache;
use crate::l2_entry::EntryFormat;
use crate::l2_table::L1Table;
use crate::refcount::Refcounts;
use crate::runtime::{OverlapChecks, RuntimeOptions};
use crate::{amend, bitmap_load, check, create, snapshot};

/// Byte offset of the autoclear feature bits in the header.
const AUTOCLEAR_OFFSET: u64 = 88;

/// Recognises, opens and creates qcow2 images.
#[derive(Clone, Copy, Debug, Default)]
pub struct Qcow2Factory;

#[async_trait]
impl DriverFactory for Qcow2Factory {
    fn format_name(&self) -> &'static str {
        "qcow2"
    }

    fn probe(&self, head: &[u8]) -> u32 {
        let word = |at: usize| {
            head.get(at..at + 4)
                .map(|b| u32::from_be_bytes(b.try_into().expect("four bytes")))
        };
        match (word(0), word(4)) {
            (Some(MAGIC), Some(version)) if version >= 2 => 100,
            _ => 0,
        }
    }

    async fn open(
        &self,
        ctx: &OpenContext<'_>,
        options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        if ctx.for_check() {
            return check::open(ctx, options).await;
        }
        let file = ctx.take_file()?;
        let writable = !ctx.flags().read_only;
        let header = Header::read(&file).await?;
        if writable {
            header.check_writable()?;
        }
        let mut runtime = RuntimeOptions::new(header.cluster_bits);
        runtime.take(options, &header)?;
        let encrypt = options.take_subtree("encrypt");
        let backing = ctx.open_backing(options, header.backing.as_ref()).await?;
        let data = DataFile::open(ctx, options, &header).await?;
        let diagnostics = ctx.diagnostics().clone();
        let mut image = open_with(file, backing, header, runtime, diagnostics).await?;
        image.data = data;
        image.crypto = Crypto::open(ctx, encrypt, &image).await?;
        if writable {
            image.prepare_writing().await?;
            image.writable.store(true, Ordering::Release);
        }
        Ok(Box::new(Qcow2 {
            image: Arc::new(image),
        }))
    }

    fn amend_options(&self) -> &'static [CreateOption] {
        amend::amend_options()
    }

    fn supports_compressed_writes(&self) -> bool {
        true
    }

    fn create_options(&self) -> &'static [CreateOption] {
        create::create_options()
    }

    async fn create(
        &self,
        ctx: &CreateContext<'_>,
        filename: &str,
        options: Options,
    ) -> Result<()> {
        create::create(ctx, filename, options).await
    }
}

/// Opens an image as it is opened where nothing else is said.
pub(crate) async fn open_image(
    file: Child,
    backing: Option<Child>,
    header: Header,
    diagnostics: blockcore::Diagnostics,
) -> Result<Image> {
    let runtime = RuntimeOptions::new(header.cluster_bits);
    open_with(file, backing, header, runtime, diagnostics).await
}

async fn open_with(
    file: Child,
    backing: Option<Child>,
    header: Header,
    runtime: RuntimeOptions,
    diagnostics: blockcore::Diagnostics,
) -> Result<Image> {
    let bits = header.cluster_bits;
    let l1 = read_table(&file, header.l1_table_offset, header.l1_size as usize).await?;
    file.debug_event(DebugEvent::ReftableLoad).await;
    let table_entries = (header.refcount_table_clusters as usize) << (bits - 3);
    let table = read_table(&file, header.refcount_table_offset, table_entries).await?;
    let bitmaps = bitmap_load::load(&file, &header, &diagnostics).await?;
    let end = file.length().div_ceil(1 << bits);
    let zero_from = match file.driver().grows_zeroed() {
        true => end << bits,
        false => u64::MAX,
    };
    let entries = EntryFormat {
        version: header.version,
        cluster_bits: bits,
        is_extended: header.has_extended_l2(),
        has_data_file: header.has_data_file(),
    };
    let slice_bits = entries.slice_bits(runtime.slice_bytes_bits);
    let order = header.refcount_order;
    let refcount_cache_bytes = Arc::new(AtomicUsize::new(runtime.refcount_cache_bytes));
    let meta = Meta {
        refcounts: Refcounts::new(
            order,
            bits,
            table,
            header.refcount_table_offset,
            header.refcount_table_clusters,
            refcount_cache_bytes.clone(),
        ),
        dirty_slices: Default::default(),
        dirty_l1: Default::default(),
        freed: Vec::new(),
        limbo: Default::default(),
        next_free: 0,
        fresh_from: end,
        packed: None,
        needed_length: 0,
        unwritten: Vec::new(),
        l1_offset: header.l1_table_offset,
        moving_table: None,
        growth: None,
    };
    Ok(Image {
        file,
        backing,
        data: DataFile::Inside,
        crypto: None,
        format_version: AtomicU32::new(header.version),
        cluster_bits: bits,
        entry_format: entries,
        // Whole sectors, as other readers have it.
        size: AtomicU64::new(header.size / SECTOR_BYTES * SECTOR_BYTES),
        l1: L1Table::new(l1),
        l2: L2Cache::new(runtime.l2_cache_bytes, slice_bits, entries.words()),
        refcount_cache_bytes,
        is_to_be_cleaned: AtomicBool::new(false),
        meta: tokio::sync::Mutex::new(meta),
        owned: Default::default(),
        changing: Default::default(),
        epochs: Default::default(),
        inflated: Default::default(),
        commits: CommitState::default(),
        tasks: Default::default(),
        orphans: Default::default(),
        corrupt: AtomicBool::new(header.is_corrupt()),
        corruption_said: AtomicBool::new(false),
        writable: AtomicBool::new(false),
        uncertain: AtomicBool::new(false),
        runtime: RwLock::new(runtime),
        shows_snapshot: AtomicBool::new(false),
        diagnostics,
        bitmaps,
        metadata_preallocated: OnceLock::new(),
        zero_from,
        extended_ahead: AtomicBool::new(false),
        header: Mutex::new(header),
    })
}

/// Tables are read in pieces of at most this many bytes, so that no more than one copy of a long one is in memory.
const TABLE_READ_BYTES: usize = 1 << 20;

/// Reads a table of 64-bit entries, whose place and length the header's validation has bounded.
pub(crate) async fn read_table(file: &Child, offset: u64, entries: usize) -> Result<Vec<u64>> {
    let mut table = Vec::with_capacity(entries);
    while table.len() < entries {
        let bytes = ((entries - table.len()) * 8).min(TABLE_READ_BYTES);
        let at = offset + table.len() as u64 * 8;
        let piece = file
            .preadv(at, IoBufMut::zeroed(bytes), ReadFlags::empty())
            .await?;
        table.extend(be_words(&piece.to_vec()));
    }
    Ok(table)
}

impl Image {
    /// Does what has to be done before the first change: finds out where metadata lies (for INV QCOW2-META-1), and clears the autoclear bits of features
    /// that this writer doesn't know, as the specification wants.
    ///
    /// # Errors
    /// Those of metadata I/O; `Corrupt`, `Unsupported` where the image must not be written.
    pub async fn prepare_writing(&self) -> Result<()> {
        let checks = self.runtime().overlap_checks;
        self.prepare_writing_with(checks).await
    }

    /// As [`prepare_writing`](Image::prepare_writing), where these are the overlap checks from now on.
    ///
    /// # Errors
    /// As [`prepare_writing`](Image::prepare_writing).
    pub async fn prepare_writing_with(&self, checks: OverlapChecks) -> Result<()> {
        self.header().check_writable()?;
        // INV QCOW2-ORD-7
        self.file.node().flush_unseen().await?;
        self.repair_if_dirty().await?;
        let header = self.header().clone();
        self.find_owners(&header, &*self.meta.lock().await, checks)
            .await?;
        self.update_features(header).await
    }

    /// Clears what a writer that doesn't know a feature has to clear.
    async fn update_features(&self, header: Header) -> Result<()> {
        self.drop_stale_bitmaps().await?;
        let mut known = 0;
        if header.has_data_file() {
            known |= header.autoclear & AUTOCLEAR_DATA_FILE_RAW;
        }
        if bitmap_load::extension_data(&header).is_some() {
            known |= AUTOCLEAR_BITMAPS;
        }
        if self.version() < 3 || header.autoclear == known {
            return Ok(());
        }
        self.write_header_bytes(AUTOCLEAR_OFFSET, known.to_be_bytes().to_vec())
            .await?;
        self.header().autoclear = known;
        Ok(())
    }

    pub(crate) async fn find_owners(
        &self,
        header: &Header,
        meta: &Meta,
        checks: OverlapChecks,
    ) -> Result<()> {
        self.owned
            .write()
            .expect("no code panics while it holds this lock")
            .clear();
        let cluster = self.cluster_size();
        self.own(0, cluster, Owner::Header);
        let l1_entries = self.l1.len();
        if l1_entries > 0 {
            self.own(header.l1_table_offset, l1_entries as u64 * 8, Owner::L1);
        }
        let table_bytes = u64::from(header.refcount_table_clusters) << self.cluster_bits;
        self.own(
            header.refcount_table_offset,
            table_bytes,
            Owner::RefcountTable,
        );
        let aligned = |offset: u64| offset != 0 && offset & (cluster - 1) == 0;
        for offset in (0..l1_entries)
            .map(|i| self.l1.get(i) & L1E_OFFSET_MASK)
            .filter(|&o| aligned(o))
        {
            self.own(offset, cluster, Owner::L2);
        }
        self.own_bitmaps();
        for &offset in meta.refcounts.table().iter().filter(|&&o| aligned(o)) {
            self.own(offset, cluster, Owner::RefcountBlock);
        }
        self.own_encryption_header(header)?;
        if header.nb_snapshots > 0 {
            let table = snapshot::read_table(header, &self.file).await?;
            self.own(header.snapshots_offset, table.bytes, Owner::SnapshotTable);
            // Tables of different snapshots are different tables, so together they fit into the file. A forged header must not make this loop long.
            let total: u64 = table
                .snapshots
                .iter()
                .map(|s| u64::from(s.l1_size) * 8)
                .sum();
            if total > self.file.length() {
                let text = format!(
                    "The L1 tables of the snapshots have {total} bytes, more than the file"
                );
                return Err(BlockError::corrupt(text));
            }
            for s in &table.snapshots {
                self.own(
                    s.l1_table_offset,
                    u64::from(s.l1_size) * 8,
                    Owner::InactiveL1,
                );
            }
            if checks.contains(OverlapChecks::INACTIVE_L2) {
                self.find_inactive_l2(&table).await?;
            }
        }
        Ok(())
    }

    /// Says where the L2 tables are that only snapshots use, from now on.
    pub(crate) async fn own_inactive_l2(&self) -> Result<()> {
        let header = self.header().clone();
        let table = snapshot::read_table(&header, &self.file).await?;
        self.find_inactive_l2(&table).await
    }

    /// Says where the L2 tables are that only snapshots use.
    async fn find_inactive_l2(&self, table: &snapshot::SnapshotTable) -> Result<()> {
        for s in &table.snapshots {
            for entry in self.snapshot_l1(s).await? {
                let host = entry & L1E_OFFSET_MASK;
                let is_table = host != 0 && host & (self.cluster_size() - 1) == 0;
                if is_table && self.owner_in(host, 1).is_none() {
                    self.own(host, self.cluster_size(), Owner::InactiveL2);
                }
            }
        }
        Ok(())
    }
}
