// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: a repair never makes an image worse. The method: images of random shapes (version, refcount width, cluster size, backing, snapshot, compressed
//! clusters, subclusters, encryption, data file, dirty bitmap) with random damage to the words of their metadata. What could be read before, of the disk, of its
//! snapshots and of its bitmaps, reads the same afterwards; a second repair finds nothing more to do; and so it is after a power cut at any place of the repair,
//! and after an error of any of its requests.
//!
//! Tests of the rules INV QCOW2-REPAIR-1, INV QCOW2-REPAIR-2, INV QCOW2-REPAIR-3, INV QCOW2-REPAIR-4, INV QCOW2-REPAIR-5; see docs/TESTING.md for how each
//! was seen to fail.
//!
//! `BLOCKLAYER_REPAIR_SEEDS` makes it longer.

use blockcore::testing::fault::Rule;
use blockcore::testing::{CrashDriver, FaultDriver, MemoryDriver, Rng};
use blockcore::{
    CheckFix, CheckResult, Child, ChildRole, Diagnostics, IoBufMut, Node, NodeFlags, Result,
};

use super::torture::Plan;
use super::{Backing, DataFileKind, READ_ONLY, Shape, image_with, node_over, open_on, write};
use crate::bitmap_load;
use crate::check::check;
use crate::crypto::CryptMethod;
use crate::extension;
use crate::format::{L1E_OFFSET_MASK, OFLAG_COMPRESSED, OFLAG_COPIED, REFT_OFFSET_MASK};
use crate::header::Header;
use crate::snapshot::{self, Snapshot};

/// Cuts in each repair, and requests of it that fail.
const CUTS: u64 = 12;
const FAULTS: u64 = 6;
/// Repairs after which there is nothing more to do.
const REPAIRS_MAX: usize = 4;

fn word(image: &[u8], at: u64) -> u64 {
    let bytes = image.get(at as usize..at as usize + 8);
    bytes.map_or(0, |b| u64::from_be_bytes(b.try_into().unwrap()))
}

fn half(image: &[u8], at: u64) -> u64 {
    word(image, at) >> 32
}

fn put(image: &mut [u8], at: u64, bytes: &[u8]) {
    if let Some(place) = image.get_mut(at as usize..at as usize + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

/// An image, and what lies below it.
#[derive(Clone)]
pub(super) struct Subject {
    pub shape: Shape,
    pub backing: Backing,
    pub bytes: Vec<u8>,
    /// What the file grows with, as in a LUKS one if it is not 0.
    pub grows_with: u8,
}

/// A shape for an image that is to be damaged.
fn some_shape(rng: &mut Rng) -> Shape {
    let version = if rng.chance(25) { 2 } else { 3 };
    let encryption = match rng.below(8) {
        0 => CryptMethod::Aes,
        1 => CryptMethod::Luks,
        _ => CryptMethod::None,
    };
    let refcount_order = if version == 2 { 4 } else { rng.below(7) as u32 };
    if version == 3 && rng.chance(20) {
        return Shape {
            refcount_order,
            encryption,
            ..Shape::extended((24 + rng.below(400)) * 512)
        };
    }
    Shape {
        size: (24 + rng.below(200)) * 512,
        cluster_bits: 9 + rng.below(4) as u32,
        version,
        refcount_order,
        extended_l2: false,
        encryption,
    }
}

impl Subject {
    pub async fn new(rng: &mut Rng) -> Subject {
        let shape = some_shape(rng);
        let sectors = shape.size / 512;
        let data_file = match rng.below(10) {
            0 if shape.version > 2 => DataFileKind::Outside,
            1 if shape.version > 2 => DataFileKind::Raw,
            _ => DataFileKind::Inside,
        };
        let is_inside = data_file == DataFileKind::Inside;
        let mut plan = Plan {
            snapshot: is_inside && shape.refcount_order > 0 && rng.chance(50),
            bitmap: shape.version > 2 && rng.chance(40),
            data_file,
            ..Plan::over(shape)
        };
        if data_file != DataFileKind::Raw && rng.chance(40) {
            let count = rng.below(sectors + 10);
            let raw = (0..count).flat_map(|s| [200 + (s % 40) as u8; 512]);
            plan.backing.raw = Some(raw.collect());
        }
        for value in 0..rng.below(6) as u8 {
            let first = rng.below(sectors) as usize;
            let end = (first + 1 + rng.below(40) as usize).min(sectors as usize);
            plan.filled.push((first..end, 120 + value));
        }
        let may_compress = is_inside && shape.encryption == CryptMethod::None;
        for value in 0..rng.below(3) as u8 {
            let cluster = rng.below((shape.size >> shape.cluster_bits).max(1));
            if may_compress
                && cluster < shape.size >> shape.cluster_bits
                && plan.compressed.iter().all(|c| c.0 != cluster)
            {
                plan.compressed.push((cluster, 150 + value));
            }
        }
        let has_bitmap = plan.bitmap;
        let (bytes, data) = plan.prepared_both().await;
        let mut subject = Subject {
            shape,
            bytes,
            backing: plan.backing,
            grows_with: if rng.chance(25) { 0xa5 } else { 0 },
        };
        if let Some(data) = data {
            // Damaged entries name places far away.
            let disk = CrashDriver::new(data).with_room(64 << 20);
            subject.backing = subject.backing.with_data(disk);
        }
        if has_bitmap {
            subject.mark_bitmap(rng).await;
        }
        subject
    }

    /// A disk with a state of the image.
    fn disk(&self, bytes: Vec<u8>) -> CrashDriver {
        CrashDriver::new(bytes).growing_with(self.grows_with)
    }

    /// Has the bitmap something to say.
    async fn mark_bitmap(&mut self, rng: &mut Rng) {
        let disk = CrashDriver::new(self.bytes.clone());
        let (node, _image) = open_on(disk.clone(), &self.backing).await;
        let sectors = self.shape.size / 512;
        for value in 0..1 + rng.below(3) as u8 {
            let first = rng.below(sectors);
            let count = 1 + rng.below(20).min(sectors - first - 1);
            write(&node, first * 512, count as usize * 512, 160 + value)
                .await
                .unwrap();
        }
        node.driver().close().await.unwrap();
        self.bytes = disk.snapshot();
    }

    pub fn cluster(&self) -> u64 {
        1 << self.shape.cluster_bits
    }

    /// Byte offsets of metadata words, each kind of table as likely as any other.
    fn some_word(&self, rng: &mut Rng) -> u64 {
        let image = &self.bytes;
        let l1 = word(image, 40);
        let snapshots = word(image, 64);
        let some_entry = |rng: &mut Rng, table: u64, words: u64| table + 8 * rng.below(words);
        let in_l2 = |rng: &mut Rng, l1: u64| {
            let table = word(image, l1) & L1E_OFFSET_MASK;
            some_entry(rng, table, (self.cluster() / 8).min(40))
        };
        let extensions = self.extensions();
        if !extensions.is_empty() && rng.chance(15) {
            let (kind, at) = extensions[rng.below(extensions.len() as u64) as usize];
            let directory = word(image, at + 16);
            return match rng.below(5) {
                _ if kind == extension::ENCRYPTION => some_entry(rng, at, 2),
                0 => some_entry(rng, at, 3),
                1 | 2 => some_entry(rng, directory, 4),
                _ => some_entry(rng, word(image, directory), 2),
            };
        }
        match rng.below(12) {
            0 => some_entry(rng, word(image, 48), 3),
            1..4 => {
                let block = word(image, word(image, 48)) & REFT_OFFSET_MASK;
                some_entry(rng, block, 12)
            }
            4 => some_entry(rng, l1, 2),
            5..9 => in_l2(rng, l1),
            9 if snapshots != 0 => in_l2(rng, word(image, snapshots)),
            10 if snapshots != 0 => some_entry(rng, word(image, snapshots), 2),
            11 if snapshots != 0 => some_entry(rng, snapshots, 8),
            _ => [48, 56, 64][rng.below(3) as usize],
        }
    }

    /// The extensions that name places in the file: what they are, and where.
    fn extensions(&self) -> Vec<(u32, u64)> {
        let mut at = match self.shape.version {
            2 => 72,
            _ => half(&self.bytes, 100),
        };
        let mut all = Vec::new();
        while half(&self.bytes, at) != 0 {
            let kind = half(&self.bytes, at) as u32;
            if kind == extension::BITMAPS || kind == extension::ENCRYPTION {
                all.push((kind, at + 8));
            }
            at = (at + 8 + half(&self.bytes, at + 4)).next_multiple_of(8);
        }
        all
    }

    /// Changes some words of metadata, or cuts the file short.
    pub fn damage(&mut self, rng: &mut Rng) {
        let cluster = self.cluster();
        for _ in 0..1 + rng.below(4) {
            let at = self.some_word(rng);
            let old = word(&self.bytes, at);
            let near_end = self.bytes.len() as u64 / cluster + 3;
            let place = cluster * rng.below(near_end);
            let new = match rng.below(16) {
                0..3 => 0,
                3..6 => old ^ 1 << rng.below(64),
                6..8 => place | OFLAG_COPIED,
                8 => place,
                9 => place | 1,
                10 => (place + 512) | OFLAG_COPIED,
                11 => (place + 512) | 1,
                12 => place | OFLAG_COMPRESSED,
                13 => word(&self.bytes, self.some_word(rng)),
                14 => old ^ OFLAG_COPIED,
                _ => rng.next_u64(),
            };
            put(&mut self.bytes, at, &new.to_be_bytes());
        }
        if self.shape.version > 2 && rng.chance(20) {
            self.bytes[79] |= 1 + rng.below(3) as u8;
        }
        if self.shape.version > 2 {
            // Where guest data lies is not for damage to decide: nobody opens an image with the wrong number of files.
            self.bytes[79] &= !4;
            self.bytes[79] |= u8::from(self.backing.data.is_some()) << 2;
        }
        if rng.chance(8) {
            let length = self.bytes.len() as u64;
            let mut left = length - rng.below(length / 2);
            if self.grows_with != 0 {
                // An encrypted file has whole sectors.
                left = left.next_multiple_of(512).min(length);
            }
            self.bytes.truncate(left as usize);
        }
    }

    /// What the disk holds, and each snapshot whose table entry makes sense: one value for each guest cluster, none where it can't be read.
    async fn readable(&self, bytes: &[u8]) -> Readable {
        let mut layers = vec![self.layer(bytes.to_vec()).await];
        // Where the header says that it is the table of snapshots, there are none.
        let is_header = word(bytes, 64) < self.cluster();
        let snapshots = match is_header {
            true => Vec::new(),
            false => snapshots(bytes).await,
        };
        for snapshot in snapshots {
            let mut active = bytes.to_vec();
            let size = snapshot.disk_size.unwrap_or(word(bytes, 24));
            put(&mut active, 24, &size.to_be_bytes());
            put(&mut active, 36, &snapshot.l1_size.to_be_bytes());
            put(&mut active, 40, &snapshot.l1_table_offset.to_be_bytes());
            put(&mut active, 60, &[0; 12]);
            layers.push(self.layer(active).await);
        }
        Readable {
            layers,
            bitmaps: bitmaps(bytes.to_vec()).await,
        }
    }

    /// Repairs until there is nothing more to do, and gives back the image and what is left of its damage; `None` where it can't be repaired at all.
    async fn repaired(&self, mut bytes: Vec<u8>) -> Result<(Vec<u8>, Option<Vec<String>>), String> {
        for round in 0..=REPAIRS_MAX {
            let disk = self.disk(bytes.clone());
            let result = repair_disk(disk.clone(), CheckFix::All).await;
            let after = disk.snapshot();
            let Ok(result) = result else {
                return Ok((after, None));
            };
            let found = match check_bytes(after.clone()).await {
                Ok(found) => found,
                Err(e) if result.corruptions == 0 => return Err(format!("after a repair: {e}")),
                Err(_) => result.clone(),
            };
            let is_clean = |r: &CheckResult| r.corruptions + r.check_errors == 0;
            if is_clean(&result) && !(is_clean(&found) && found.leaks == 0) {
                return Err(format!("told to be sound: {:#?}", found.messages));
            }
            // What was told as beyond repair may be gone with a table that moved; the next repair notices.
            let is_sound = is_clean(&result) && is_clean(&found);
            if is_sound && half(&after, 4) == 3 && after[79] & 3 != 0 {
                return Err("a sound image has marks".to_owned());
            }
            if result.corruptions_fixed + result.leaks_fixed == 0 {
                if after[..72] != bytes[..72] {
                    return Err("nothing was repaired, and the header changed".to_owned());
                }
                let left = match is_clean(&found) {
                    true => Vec::new(),
                    false => found.messages,
                };
                return Ok((after, Some(left)));
            }
            if round == REPAIRS_MAX {
                return Err(format!("repairs go on and on: {:#?}", result.messages));
            }
            bytes = after;
        }
        unreachable!("the last round returns")
    }

    async fn layer(&self, mut bytes: Vec<u8>) -> Option<Vec<Option<Vec<u8>>>> {
        if self.shape.version > 2 {
            bytes[79] &= !3;
        }
        let node = open_read_only(bytes, &self.backing).await.ok()?;
        let mut clusters = Vec::new();
        let mut at = 0;
        while at < node.length() {
            let n = self.cluster().min(node.length() - at);
            let read = node.preadv(at, IoBufMut::zeroed(n as usize), Default::default());
            clusters.push(read.await.ok().map(|b| b.to_vec()));
            at += n;
        }
        Some(clusters)
    }
}

/// The snapshots of an image, as far as they make sense.
async fn snapshots(bytes: &[u8]) -> Vec<Snapshot> {
    let file = MemoryDriver::new(bytes.to_vec()).into_node(READ_ONLY).await;
    let file = Child::new("file", ChildRole::File, file.unwrap());
    let Ok(header) = Header::read(&file).await else {
        return Vec::new();
    };
    let table = snapshot::read_entries(&header, &file).await;
    table.map(|t| t.snapshots).unwrap_or_default()
}

async fn open_read_only(bytes: Vec<u8>, backing: &Backing) -> Result<std::sync::Arc<Node>> {
    let file = MemoryDriver::new(bytes).into_node(READ_ONLY).await?;
    let data = backing.open_data().await?;
    let image = image_with(file, backing.clone().open().await, data).await?;
    Ok(node_over(image, READ_ONLY).await)
}

/// Name, what it says, whether it says anything.
type Bitmap = (String, Vec<std::ops::Range<u64>>, bool);

/// What the bitmaps of an image say, if they can be read.
async fn bitmaps(bytes: Vec<u8>) -> Option<Vec<Bitmap>> {
    let file = MemoryDriver::new(bytes).into_node(READ_ONLY).await.ok()?;
    let file = Child::new("file", ChildRole::File, file);
    let header = Header::read(&file).await.ok()?;
    let silent = Diagnostics::new(|_| {});
    let loaded = bitmap_load::load(&file, &header, &silent).await.ok()?;
    let says = |b: &std::sync::Arc<blockcore::DirtyBitmap>| {
        let ranges = b.bits().ranges().collect();
        (b.name().to_owned(), ranges, b.is_inconsistent())
    };
    Some(loaded.set.list().iter().map(says).collect())
}

/// The disk, then its snapshots.
struct Readable {
    layers: Vec<Option<Vec<Option<Vec<u8>>>>>,
    bitmaps: Option<Vec<Bitmap>>,
}

impl Readable {
    /// Where `after` has lost something that this has.
    fn lost_in(&self, after: &Readable) -> Option<String> {
        if self.bitmaps.is_some() && self.bitmaps != after.bitmaps {
            return Some(format!("{:?} became {:?}", self.bitmaps, after.bitmaps));
        }
        for (layer, before) in self.layers.iter().enumerate() {
            let Some(before) = before else { continue };
            let Some(Some(after)) = after.layers.get(layer) else {
                return Some(format!("layer {layer} can't be opened any more"));
            };
            for (i, cluster) in before.iter().enumerate() {
                let Some(cluster) = cluster else { continue };
                match after.get(i) {
                    Some(Some(now)) if now == cluster => {}
                    now => {
                        let same = |now: &[u8]| {
                            let both = cluster.iter().zip(now);
                            both.take_while(|(was, is)| was == is).count()
                        };
                        let at = now.and_then(|n| n.as_deref().map(same)).unwrap_or(0);
                        let part = |b: &[u8]| b[at..b.len().min(at + 16)].to_vec();
                        let now = now.map(|n| n.as_deref().map(part));
                        let was = part(cluster);
                        return Some(format!(
                            "layer {layer}, guest cluster {i}, byte {at}: {was:?} became {now:?}"
                        ));
                    }
                }
            }
        }
        None
    }
}

/// Checks the image in a file, as a tool does.
async fn check_file(file: std::sync::Arc<Node>, fix: CheckFix) -> Result<CheckResult> {
    let file = Child::new("file", ChildRole::File, file);
    let header = Header::read_for_check(&file).await?;
    check(&header, &file, fix).await
}

async fn repair_disk(disk: CrashDriver, fix: CheckFix) -> Result<CheckResult> {
    let file = disk.into_node(NodeFlags::default()).await.unwrap();
    check_file(file, fix).await
}

pub(super) async fn check_bytes(bytes: Vec<u8>) -> Result<CheckResult> {
    let file = MemoryDriver::new(bytes).into_node(READ_ONLY).await.unwrap();
    check_file(file, CheckFix::None).await
}

/// Everything that has to hold for one image.
async fn try_it(subject: &Subject, rng: &mut Rng) -> Result<Outcome, String> {
    let before = subject.readable(&subject.bytes).await;
    let keeps =
        async |bytes: &[u8], when: &str| match before.lost_in(&subject.readable(bytes).await) {
            None => Ok(()),
            Some(why) => Err(format!("{when}: {why}")),
        };
    let is_sound = |left: &Option<Vec<String>>| left.as_ref().is_some_and(Vec::is_empty);
    let (whole, left) = subject.repaired(subject.bytes.clone()).await?;
    keeps(&whole, "after repairs").await?;
    for fix in [CheckFix::Leaks, CheckFix::All] {
        let disk = subject.disk(subject.bytes.clone());
        let _any = repair_disk(disk.clone(), fix).await;
        keeps(&disk.snapshot(), "after a repair").await?;
        for _ in 0..CUTS {
            let cut = rng.below(disk.log_len() as u64 + 1) as usize;
            // What is written behind noise makes the file longer, and whoever looks sees it before what is written to the noise: nothing can be done about that.
            let keep = match subject.grows_with {
                0 => [0, 30, 50, 90, 100][rng.below(5) as usize],
                _ => 100,
            };
            let bytes = disk.image_after(cut, keep, rng);
            let when = format!("{fix:?}, power cut at {cut}, {keep}% kept");
            keeps(&bytes, &when).await?;
            let again = subject.repaired(bytes).await;
            let (bytes, left_then) = again.map_err(|why| format!("{when}: {why}"))?;
            keeps(&bytes, &format!("{when}, repaired again")).await?;
            if is_sound(&left) && !is_sound(&left_then) {
                return Err(format!("{when}: left: {left_then:#?}"));
            }
        }
        for _ in 0..FAULTS {
            let disk = subject.disk(subject.bytes.clone());
            let driver = FaultDriver::new(Box::new(disk.clone()));
            let nth = rng.below(40) as u32;
            let rule = Rule::fail_all([libc::EIO, libc::ENOSPC][rng.below(2) as usize]);
            let faults = driver.faults();
            let file = driver.into_node(NodeFlags::default()).await.unwrap();
            faults.add(match rng.chance(70) {
                true => rule.only(nth),
                false => rule.not_before(nth),
            });
            let _any = check_file(file, fix).await;
            let when = format!("{fix:?}, error at request {nth}");
            keeps(&disk.snapshot(), &when).await?;
            let again = subject.repaired(disk.snapshot()).await;
            let (bytes, left_then) = again.map_err(|why| format!("{when}: {why}"))?;
            keeps(&bytes, &format!("{when}, repaired again")).await?;
            if is_sound(&left) && !is_sound(&left_then) {
                return Err(format!("{when}: left: {left_then:#?}"));
            }
        }
    }
    Ok(match left {
        None => Outcome::Refused,
        Some(left) if left.is_empty() => Outcome::Sound,
        Some(_) => Outcome::Damaged,
    })
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Sound,
    Damaged,
    Refused,
}

#[tokio::test]
async fn a_repair_never_makes_an_image_worse() {
    let seed = Rng::seed_from_env();
    let seeds = std::env::var("BLOCKLAYER_REPAIR_SEEDS").ok();
    let seeds = seeds.and_then(|s| s.parse().ok()).unwrap_or(150);
    let mut outcomes = Vec::new();
    for i in 0..seeds {
        let seed = seed.wrapping_add(i);
        let mut rng = Rng::new(seed);
        let mut subject = Subject::new(&mut rng).await;
        assert_eq!(
            check_bytes(subject.bytes.clone())
                .await
                .unwrap()
                .corruptions,
            0
        );
        subject.damage(&mut rng);
        match try_it(&subject, &mut rng).await {
            Ok(outcome) => outcomes.push(outcome),
            Err(why) => {
                let found = check_bytes(subject.bytes.clone()).await;
                let mut lines = found.map(|f| f.messages).unwrap_or_default();
                lines.truncate(30);
                panic!(
                    "seed {seed}, {:?}, {} bytes that grow with {}: {why}\n{lines:#?}",
                    subject.shape,
                    subject.bytes.len(),
                    subject.grows_with
                );
            }
        }
    }
    for outcome in [Outcome::Sound, Outcome::Damaged, Outcome::Refused] {
        let count = outcomes.iter().filter(|o| **o == outcome).count();
        println!("{outcome:?}: {count}");
    }
}
