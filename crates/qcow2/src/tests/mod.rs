// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of the format over test disks: a model, power cuts, and the rules of docs/INVARIANTS.md one by one.

mod bitmap_lengths;
mod bitmaps;
mod bounds;
mod corners;
mod crash;
mod dropped;
mod encryption;
mod failing;
mod faults;
mod forge;
mod growth;
mod history;
mod hostile;
mod kept;
mod model;
mod options;
mod overhaul;
mod packed;
mod parked;
mod repair;
mod repair_cuts;
mod repair_live;
mod repair_rules;
mod rules;
mod stress;
mod subclusters;
mod torture;
mod vm_state;

use std::sync::Arc;

use blockcore::testing::{CrashDriver, FaultDriver, Faults, MemoryDriver};
use blockcore::{
    CheckFix, CheckResult, Child, ChildRole, Diagnostics, Node, NodeConfig, NodeFlags, Result,
    Secret, WriteFlags,
};
use luks::SectorCipher;

use crate::crypto::{CryptMethod, Crypto};
use crate::data_file::DataFile;
use crate::driver::Qcow2;
use crate::extension;
use crate::format::{MIN_EXTENDED_CLUSTER_BITS, SUBCLUSTERS_BITS};
use crate::header::Header;
use crate::image::Image;
use crate::open::open_image;

/// What an image is made with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub size: u64,
    pub cluster_bits: u32,
    pub version: u32,
    pub refcount_order: u32,
    pub extended_l2: bool,
    pub encryption: CryptMethod,
}

impl Shape {
    /// Version 3 with clusters of 4 KiB, so that small disks have many.
    pub fn small(size: u64) -> Shape {
        Shape {
            size,
            cluster_bits: 12,
            version: 3,
            refcount_order: 4,
            extended_l2: false,
            encryption: CryptMethod::None,
        }
    }

    /// Extended L2 entries, with the smallest subclusters there are: 512 bytes.
    pub fn extended(size: u64) -> Shape {
        Shape {
            cluster_bits: MIN_EXTENDED_CLUSTER_BITS,
            extended_l2: true,
            ..Shape::small(size)
        }
    }

    /// Sectors in a subcluster, or without extended L2 entries in a cluster.
    pub fn subcluster_sectors(self) -> u64 {
        let bits = match self.extended_l2 {
            true => self.cluster_bits - SUBCLUSTERS_BITS,
            false => self.cluster_bits,
        };
        1 << (bits - 9)
    }
}

/// An empty image: header, refcount table, refcount block, L1 table, one cluster each (the L1 table as many as it needs), and what is called the LUKS header where the
/// shape wants it: there are no keys in it, [`image_over`] has one.
pub(crate) fn fresh_image(shape: Shape) -> Vec<u8> {
    let cluster = 1usize << shape.cluster_bits;
    let entry_bytes = 8 << u32::from(shape.extended_l2);
    let table_bytes = (cluster / entry_bytes * cluster) as u64;
    let l1_entries = shape.size.div_ceil(table_bytes).max(1);
    let l1_clusters = (l1_entries as usize * 8).div_ceil(cluster);
    let luks_at = cluster * (3 + l1_clusters);
    let is_luks = shape.encryption == CryptMethod::Luks;
    let luks_bytes = luks::HEADER_BYTES.next_multiple_of(cluster);
    let mut image = vec![0; luks_at + luks_bytes * usize::from(is_luks)];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &shape.version.to_be_bytes());
    put(20, &shape.cluster_bits.to_be_bytes());
    put(24, &shape.size.to_be_bytes());
    put(32, &shape.encryption.number().to_be_bytes());
    put(36, &(l1_entries as u32).to_be_bytes());
    put(40, &(3 * cluster as u64).to_be_bytes());
    put(48, &(cluster as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    if shape.version >= 3 {
        put(72, &(u64::from(shape.extended_l2) << 4).to_be_bytes());
        put(96, &shape.refcount_order.to_be_bytes());
        put(100, &104u32.to_be_bytes());
    }
    if is_luks {
        let at = if shape.version >= 3 { 104 } else { 72 };
        put(at, &extension::ENCRYPTION.to_be_bytes());
        put(at + 4, &16u32.to_be_bytes());
        put(at + 8, &(luks_at as u64).to_be_bytes());
        put(at + 16, &(luks_bytes as u64).to_be_bytes());
        put(luks_at, b"LUKS\xba\xbe\0\x01");
    }
    put(cluster, &(2 * cluster as u64).to_be_bytes());
    let image_clusters = image.len() / cluster;
    let block = &mut image[2 * cluster..3 * cluster];
    for i in 0..(image_clusters as u64) {
        crate::refcount::set_refcount(block, shape.refcount_order, i, 1);
    }
    image
}

/// Where the guest's clusters lie.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DataFileKind {
    #[default]
    Inside,
    Outside,
    /// Outside, in a file that reads as the disk does.
    Raw,
}

/// Says in the header of an empty image where the guest's clusters lie.
pub(crate) fn set_data_file(image: &mut [u8], kind: DataFileKind) {
    image[79] |= u8::from(kind != DataFileKind::Inside) << 2;
    image[95] |= u8::from(kind == DataFileKind::Raw) << 1;
}

/// What lies below an image: any number of disks, each over the one before, which are only read; and a data file.
#[derive(Clone, Debug, Default)]
pub(crate) struct Backing {
    /// The lowest disk.
    pub raw: Option<Vec<u8>>,
    /// Images over it.
    pub layers: Vec<Vec<u8>>,
    /// The image's external data file, and the faults that it has.
    pub data: Option<(CrashDriver, Faults)>,
    /// What requests to it have to be aligned to, in bytes; 0: nothing.
    pub data_alignment: u32,
}

impl From<Option<Vec<u8>>> for Backing {
    fn from(raw: Option<Vec<u8>>) -> Backing {
        Backing {
            raw,
            ..Backing::default()
        }
    }
}

impl From<&Backing> for Backing {
    fn from(backing: &Backing) -> Backing {
        backing.clone()
    }
}

impl Backing {
    /// The same with what a data file holds.
    fn with_data(&self, data: CrashDriver) -> Backing {
        Backing {
            data: Some((data, Faults::default())),
            ..self.clone()
        }
    }

    /// What the data file holds.
    fn data(&self) -> Option<Vec<u8>> {
        self.data.as_ref().map(|(disk, _)| disk.snapshot())
    }

    async fn open_data(&self) -> Result<DataFile> {
        match &self.data {
            None => Ok(DataFile::Inside),
            Some((disk, faults)) => {
                let file = FaultDriver::over(Box::new(disk.clone()), faults.clone());
                let file = file.aligned_to(self.data_alignment.max(1));
                let node = file.into_node(NodeFlags::default()).await?;
                let child = Child::new("data-file", ChildRole::Data, node);
                Ok(DataFile::Outside(child))
            }
        }
    }

    async fn open(self) -> Option<Child> {
        let mut top = match self.raw {
            None => None,
            Some(bytes) => Some(MemoryDriver::new(bytes).into_node(READ_ONLY).await.unwrap()),
        };
        for layer in self.layers {
            let file = MemoryDriver::new(layer).into_node(READ_ONLY).await.unwrap();
            let below = top.map(|node| Child::new("backing", ChildRole::Backing, node));
            top = Some(node_over(image_over(file, below).await.unwrap(), READ_ONLY).await);
        }
        top.map(|node| Child::new("backing", ChildRole::Backing, node))
    }
}

const READ_ONLY: NodeFlags = NodeFlags {
    read_only: true,
    direct: false,
    no_flush: false,
    unmap: true,
    force_share: false,
};

/// Opens the image on `disk` as a writable node, over what backs it.
pub(crate) async fn open_on(
    disk: CrashDriver,
    backing: impl Into<Backing>,
) -> (Arc<Node>, Arc<Image>) {
    let file = disk.into_node(NodeFlags::default()).await.unwrap();
    open_over(file, backing).await.unwrap()
}

/// As [`open_on`], with faults between the image and its disk.
pub(crate) async fn open_with_faults(disk: CrashDriver) -> (Arc<Node>, Arc<Image>, Faults) {
    let driver = FaultDriver::new(Box::new(disk));
    let faults = driver.faults();
    let file = driver.into_node(NodeFlags::default()).await.unwrap();
    let (node, image) = open_over(file, None).await.unwrap();
    (node, image, faults)
}

/// Opens the image in `file` as a writable node.
pub(crate) async fn open_over(
    file: Arc<Node>,
    backing: impl Into<Backing>,
) -> Result<(Arc<Node>, Arc<Image>)> {
    let backing = backing.into();
    let data = backing.open_data().await?;
    let image = image_with(file, backing.open().await, data).await?;
    image.prepare_writing().await?;
    image
        .writable
        .store(true, std::sync::atomic::Ordering::Release);
    Ok((node_over(image.clone(), NodeFlags::default()).await, image))
}

/// Opens an image as a node that can't be written.
pub(crate) async fn open_image_read_only(bytes: Vec<u8>, backing: impl Into<Backing>) -> Arc<Node> {
    let file = MemoryDriver::new(bytes).into_node(READ_ONLY).await.unwrap();
    let backing = backing.into();
    let data = backing.open_data().await.unwrap();
    let image = image_with(file, backing.open().await, data).await;
    node_over(image.unwrap(), READ_ONLY).await
}

async fn image_over(file: Arc<Node>, backing: Option<Child>) -> Result<Arc<Image>> {
    image_with(file, backing, DataFile::Inside).await
}

async fn image_with(file: Arc<Node>, backing: Option<Child>, data: DataFile) -> Result<Arc<Image>> {
    let file = Child::new("file", ChildRole::File, file);
    let header = Header::read(&file).await?;
    let diagnostics = Diagnostics::new(|line| println!("{line}"));
    let method = header.crypt_method;
    let mut image = open_image(file, backing, header, diagnostics).await?;
    image.data = data;
    let cipher = SectorCipher::legacy(&Secret::new("a password"))?;
    image.crypto = Crypto::without_key(method).map(|c| c.with_cipher(cipher));
    Ok(Arc::new(image))
}

async fn node_over(image: Arc<Image>, flags: NodeFlags) -> Arc<Node> {
    let config = NodeConfig {
        flags,
        ..NodeConfig::default()
    };
    Node::new(Box::new(Qcow2 { image }), config).await.unwrap()
}

/// Reads the whole of a node.
pub(crate) async fn read_all(node: &Node) -> Vec<u8> {
    try_read_all(node).await.unwrap()
}

/// As [`read_all`], where that may fail.
pub(crate) async fn try_read_all(node: &Node) -> Result<Vec<u8>> {
    let length = node.length() as usize;
    let mut all = Vec::with_capacity(length);
    while all.len() < length {
        let n = (length - all.len()).min(1 << 20);
        let buf = blockcore::IoBufMut::zeroed(n);
        let read = node.preadv(all.len() as u64, buf, Default::default());
        all.extend(read.await?.to_vec());
    }
    Ok(all)
}

/// Writes one value all over a range.
pub(crate) async fn write(node: &Node, offset: u64, bytes: usize, value: u8) -> Result<()> {
    node.pwritev(offset, vec![value; bytes].into(), WriteFlags::empty())
        .await
}

async fn check_disk(bytes: Vec<u8>) -> CheckResult {
    let node = MemoryDriver::new(bytes).into_node(READ_ONLY).await.unwrap();
    let file = Child::new("file", ChildRole::File, node);
    let header = Header::read(&file).await.unwrap();
    let result = crate::check::check(&header, &file, CheckFix::None).await;
    result.unwrap()
}

/// Checks the image that lies on a disk, and gives back what is wrong with it beside leaks.
pub(crate) async fn corruptions(bytes: Vec<u8>) -> Vec<String> {
    let result = check_disk(bytes).await;
    if result.corruptions + result.check_errors > 0 {
        result.messages
    } else {
        Vec::new()
    }
}

/// As [`corruptions`], with leaks.
pub(crate) async fn findings(bytes: Vec<u8>) -> Vec<String> {
    check_disk(bytes).await.messages
}
