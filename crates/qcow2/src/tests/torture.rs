// SPDX-License-Identifier: MIT OR Apache-2.0
//! The engine of the tests that try to make an image lose data: a [`Plan`] is a disk and what is done to it, several requests at a time, with errors, with
//! requests that are dropped, with closing and opening in between; [`Plan::run`] does it and says what went wrong.
//!
//! # What has to hold
//!
//! * A request fails only if an error was injected, and an injected error makes a request fail (a hole that can't be punched aside).
//! * Every read, at any time, sees one of the values that its sectors may have (`history`).
//! * Afterwards the image can be used, is free of corruption, and without injected errors of leaks, too; opened again it reads the same; its snapshot is
//!   what it was.
//! * After a power cut at any place of the log: no corruption, every sector reads as one of the values since the last flush that had ended, the snapshot is
//!   what it was, and the image can be used.

mod afterwards;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use blockcore::testing::fault::{Event, Faults, Rule};
use blockcore::testing::{CrashDriver, DelayDriver, FaultDriver, Rng, given_up_after};
use blockcore::{
    BlockError, Child, ChildRole, ErrorKind, IoBufMut, Node, NodeFlags, Options, ReadFlags, Result,
    SnapshotRequest, SnapshotSelector, StatusMode, TruncateRequest, WriteFlags, chain_status,
};
use futures::FutureExt;

use super::bitmaps::with_bitmap;
use super::history::{History, SECTOR};
use super::kept::{self, Snapshots};
use super::{Backing, DataFileKind, forge, fresh_image, open_on, open_over, read_all};
use super::{Shape, set_data_file, try_read_all, write};
use crate::crypto::CryptMethod;
use crate::image::Image;

/// The name of the dirty bitmap.
const BITMAP: &str = "b";
/// How long a slow disk's request waits at most, before it takes effect and again after.
const DELAY_MILLIS: u64 = 100;

/// A request. Places and lengths are in sectors.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write(Range<usize>, u8),
    /// A write of the clusters that begin in the range, compressed.
    Pack(Range<usize>, u8),
    Zero(Range<usize>, WriteFlags),
    Discard(Range<usize>),
    Read(Range<usize>),
    Flush,
    /// Changes the length.
    Resize(usize),
    Status(Range<usize>),
    /// Takes the snapshot with this number.
    Snapshot(u32),
    /// Goes back to it, if it was taken.
    Goto(u32),
    Delete(u32),
    /// Gives refcounts so many bits.
    Width(u32),
    /// Makes the image one of version 2, if it can be one, and of version 3 again.
    Downgrade,
}

/// When a request is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Drop {
    Never,
    /// After so many rounds (see [`given_up_after`]).
    Rounds(u32),
    /// After so much of the disk's time.
    Millis(u64),
}

/// A request of one of the tasks.
#[derive(Clone, Debug)]
pub(crate) struct Step {
    pub task: usize,
    /// How often others get their turn before.
    pub pause: u32,
    pub op: Op,
    pub drop: Drop,
}

impl Step {
    /// A request of the first task.
    pub fn new(op: Op) -> Step {
        Step {
            task: 0,
            pause: 0,
            op,
            drop: Drop::Never,
        }
    }
}

/// A disk, and what is done to it.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub shape: Shape,
    pub backing: Backing,
    /// Written before all else.
    pub filled: Vec<(Range<usize>, u8)>,
    /// Guest clusters that are compressed ones, and their values.
    pub compressed: Vec<(u64, u8)>,
    pub snapshot: bool,
    /// With one outside, there are no snapshots and no compressed clusters.
    pub data_file: DataFileKind,
    /// It has a dirty bitmap, which is empty before all else.
    pub bitmap: bool,
    /// Discarded clusters keep their place: `discard-no-unref`.
    pub keeps_discarded: bool,
    /// Requests to the file take random times, from this seed.
    pub delays: Option<u64>,
    /// What requests to the file have to be aligned to, in bytes.
    pub file_alignment: u32,
    pub faults: Vec<Rule>,
    /// The steps between opening and closing.
    pub sessions: Vec<Vec<Step>>,
    /// What [`prepare`](Plan::prepare) has made.
    pub start: Option<Arc<Start>>,
}

/// A disk before all else.
#[derive(Debug)]
pub(crate) struct Start {
    image: Vec<u8>,
    /// What its data file holds, if it has one.
    data: Option<Vec<u8>>,
    /// The values of its sectors.
    base: Vec<u8>,
    /// What its snapshot holds.
    snapshot: Option<Vec<u8>>,
}

impl Plan {
    /// A plan that does nothing.
    pub fn over(shape: Shape) -> Plan {
        Plan {
            shape,
            backing: Backing::default(),
            filled: Vec::new(),
            compressed: Vec::new(),
            snapshot: false,
            data_file: DataFileKind::Inside,
            bitmap: false,
            keeps_discarded: false,
            delays: None,
            file_alignment: 1,
            faults: Vec::new(),
            sessions: Vec::new(),
            start: None,
        }
    }

    /// The same in an encrypted image, which has no compressed clusters.
    pub fn encrypted(mut self, method: CryptMethod) -> Plan {
        self.shape.encryption = method;
        self.compressed.clear();
        for step in self.sessions.iter_mut().flatten() {
            if let Op::Pack(range, value) = &step.op {
                step.op = Op::Write(range.clone(), *value);
            }
        }
        self
    }

    /// Makes the image, once for many runs: from here on only what is done to it may be changed.
    pub async fn prepare(&mut self) {
        self.start = Some(Arc::new(self.begin().await));
    }

    async fn begin(&self) -> Start {
        let (image, data) = self.prepared_both().await;
        let snapshot = match self.snapshot {
            true => Some(forge::snapshot_contents(image.clone(), &self.backing).await),
            false => None,
        };
        let disk = CrashDriver::new(image.clone());
        let backing = below(&self.backing, &disk, data.clone());
        let (node, _image) = open_on(disk, &backing).await;
        let sectors = read_all(&node).await;
        let value = |sector: &[u8]| uniform(sector).expect("sectors are uniform") as u8;
        Start {
            image,
            data,
            base: sectors.chunks(SECTOR).map(value).collect(),
            snapshot,
        }
    }

    fn drops(&self) -> bool {
        let mut steps = self.sessions.iter().flatten();
        steps.any(|s| s.drop != Drop::Never)
    }

    /// Whether the disk may become shorter, and the file with it.
    fn shrinks(&self) -> bool {
        let mut steps = self.sessions.iter().flatten();
        steps.any(|s| matches!(s.op, Op::Resize(n) if n < 1000))
    }

    /// Whether the data file reads as the disk does.
    fn reads_raw(&self) -> bool {
        self.data_file == DataFileKind::Raw && self.shape.encryption == CryptMethod::None
    }

    /// The image before all else.
    pub async fn prepared(&self) -> Vec<u8> {
        self.prepared_both().await.0
    }

    /// The image, and what its data file holds.
    pub async fn prepared_both(&self) -> (Vec<u8>, Option<Vec<u8>>) {
        let mut bytes = fresh_image(self.shape);
        set_data_file(&mut bytes, self.data_file);
        for &(guest_cluster, value) in &self.compressed {
            bytes = forge::compressed(bytes, guest_cluster, value).await;
        }
        let disk = CrashDriver::new(bytes);
        let is_outside = self.data_file != DataFileKind::Inside;
        let backing = below(&self.backing, &disk, is_outside.then(Vec::new));
        let (node, _image) = open_on(disk.clone(), &backing).await;
        for (range, value) in &self.filled {
            let (offset, length) = (range.start * SECTOR, range.len() * SECTOR);
            write(&node, offset as u64, length, *value).await.unwrap();
        }
        node.driver().close().await.unwrap();
        let mut image = disk.snapshot();
        if self.snapshot {
            image = forge::snapshot(image).await;
        }
        if self.bitmap {
            image = with_bitmap(image, &backing, BITMAP).await;
        }
        (image, backing.data())
    }

    /// Does it all, and cuts the power at `cuts` places chosen by `rng`.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn run(&self, cuts: u64, rng: &mut Rng) -> Result<Seen, String> {
        let mut disk = Disk::prepare(self).await;
        let mut errors = Vec::new();
        for session in &self.sessions {
            errors.extend(disk.session(session).await?);
        }
        // A hole that can't be punched, or a file that can't be cut off, is no harm.
        let is_hole = |r: &&blockcore::testing::fault::Request| {
            let is_cut = matches!(r.event, Event::Truncate | Event::Length);
            r.event == Event::Discard || (is_cut && self.shrinks())
        };
        let failed = disk.faults.failed();
        if failed.is_empty() && !errors.is_empty() {
            return Err(format!("errors that nobody injected: {errors:?}"));
        }
        if errors.is_empty() && !self.drops() && !failed.iter().all(|r| is_hole(&r)) {
            return Err(format!("nobody was told of {failed:?}"));
        }
        disk.faults.clear();
        disk.use_and_check(!failed.is_empty()).await?;
        for _ in 0..cuts {
            let cut = rng.below(disk.disk.log_len() as u64 + 1) as usize;
            let keep = [0, 30, 50, 90, 100][rng.below(5) as usize];
            let what = |why| format!("power cut at {cut}, {keep}% kept: {why}");
            disk.cut(cut, keep, rng).await.map_err(what)?;
        }
        Ok(Seen {
            faults: disk.faults,
            errors,
            dropped: disk.dropped.into_inner(),
        })
    }

    /// Does the first session in a runtime that ends when the file's request number `nth` has begun, and goes on with the image in another one.
    ///
    /// Gives back whether there was such a request.
    ///
    /// # Errors
    /// What went wrong.
    pub fn run_in_a_runtime_that_ends(&self, nth: u32) -> Result<bool, String> {
        let runtime = || tokio::runtime::Builder::new_current_thread().build();
        let (first, second) = (runtime().unwrap(), runtime().unwrap());
        let mut disk = second.block_on(Disk::prepare(self));
        let (node, image) = second.block_on(disk.open()).unwrap();
        disk.faults.add(Rule::hang().only(nth));
        let ended = first.block_on(async {
            let mut work = std::pin::pin!(disk.work_all(&node, &self.sessions[0]));
            while disk.faults.hung() == 0 {
                if let Some(errors) = work.as_mut().now_or_never() {
                    return Some(errors);
                }
                tokio::task::yield_now().await;
            }
            None
        });
        drop(first);
        if let Some(errors) = ended {
            let errors = errors?;
            return match errors.is_empty() {
                true => Ok(false),
                false => Err(format!("errors that nobody injected: {errors:?}")),
            };
        }
        second.block_on(async {
            disk.faults.clear();
            match disk.close(&node, &image).await? {
                Some(e) if !image.uncertain.load(Ordering::Acquire) => {
                    return Err(format!("close: {e}"));
                }
                _ => {}
            }
            // What was allocated and not yet linked is lost with the runtime.
            disk.use_and_check(true).await
        })?;
        Ok(true)
    }
}

/// What an image on a disk needs besides: its backing disks, and its data file, which loses power together with it.
fn below(backing: &Backing, disk: &CrashDriver, data: Option<Vec<u8>>) -> Backing {
    match data {
        None => backing.clone(),
        Some(data) => backing.with_data(disk.beside(data, 1)),
    }
}

/// What a run met with.
#[derive(Debug)]
pub(crate) struct Seen {
    pub faults: Faults,
    pub errors: Vec<BlockError>,
    /// How many requests were dropped before they had ended.
    pub dropped: u32,
}

/// A disk while a plan is being carried out.
struct Disk {
    plan: Plan,
    disk: CrashDriver,
    faults: Faults,
    history: History,
    start: Arc<Start>,
    snapshots: Snapshots,
    dropped: AtomicU32,
}

/// All that a disk holds.
async fn all(node: &Node) -> Result<Vec<u8>, String> {
    let read = try_read_all(node).await;
    read.map_err(|e| format!("can't be read: {e}"))
}

/// Whether a change reaches past the end of the disk as it is now.
fn is_past_end(node: &Node, op: &Op) -> bool {
    let end = match op {
        Op::Write(range, _) | Op::Pack(range, _) | Op::Zero(range, _) | Op::Discard(range) => {
            range.end
        }
        _ => 0,
    };
    (end * SECTOR) as u64 > node.length()
}

fn uniform(sector: &[u8]) -> Option<u64> {
    let first = sector[0];
    sector.iter().all(|b| *b == first).then_some(first.into())
}

impl Disk {
    async fn prepare(plan: &Plan) -> Disk {
        let start = match &plan.start {
            Some(start) => start.clone(),
            None => Arc::new(plan.begin().await),
        };
        let disk = CrashDriver::new(start.image.clone());
        let faults = Faults::default();
        let mut plan = plan.clone();
        plan.backing = below(&plan.backing, &disk, start.data.clone());
        if let Some(data) = &mut plan.backing.data {
            data.1 = faults.clone();
        }
        Disk {
            plan,
            disk,
            faults,
            history: History::default(),
            start,
            snapshots: Snapshots::default(),
            dropped: AtomicU32::new(0),
        }
    }

    fn log_len(&self) -> usize {
        self.disk.log_len()
    }

    /// The value of a sector before all else. What appears when the disk grows is zero.
    fn base(&self, sector: usize) -> u8 {
        self.start.base.get(sector).copied().unwrap_or(0)
    }

    async fn open(&self) -> Result<(Arc<Node>, Arc<Image>)> {
        let disk = self.disk.clone();
        let mut file = FaultDriver::over(Box::new(disk), self.faults.clone());
        file = file.aligned_to(self.plan.file_alignment);
        let flags = NodeFlags::default();
        let file = match self.plan.delays {
            Some(seed) => {
                let longest = Duration::from_millis(DELAY_MILLIS);
                let slow = DelayDriver::new(Box::new(file), seed, longest);
                slow.into_node(flags).await?
            }
            None => file.into_node(flags).await?,
        };
        let (node, image) = open_over(file, &self.plan.backing).await?;
        if let Ok(mut runtime) = image.runtime.write() {
            runtime.discard_no_unref = self.plan.keeps_discarded;
        }
        Ok((node, image))
    }

    /// Opens the disk, has every task do its steps, closes it; gives back what failed on the way.
    async fn session(&mut self, steps: &[Step]) -> Result<Vec<BlockError>, String> {
        for rule in std::mem::take(&mut self.plan.faults) {
            self.faults.add(rule);
        }
        let (node, image) = match self.open().await {
            Ok(open) => open,
            Err(e) => return Ok(vec![e]),
        };
        let mut errors = self.work_all(&node, steps).await?;
        errors.extend(self.close(&node, &image).await?);
        Ok(errors)
    }

    /// Has every task do its steps; gives back what failed on the way.
    async fn work_all(&self, node: &Arc<Node>, steps: &[Step]) -> Result<Vec<BlockError>, String> {
        let tasks = 1 + steps.iter().map(|s| s.task).max().unwrap_or(0);
        let work = |task: usize| self.work(node, task, steps);
        let done = futures::future::join_all((0..tasks).map(work)).await;
        let mut errors = Vec::new();
        for result in done {
            errors.extend(result?);
        }
        Ok(errors)
    }

    /// Closes the disk; gives back what failed on the way.
    async fn close(&self, node: &Arc<Node>, image: &Image) -> Result<Option<BlockError>, String> {
        let called = self.history.now();
        let failed = node.flush().await.err();
        // What was not written stays to be written.
        self.faults.clear();
        let top = Child::new("top", ChildRole::File, node.clone());
        let closed = top.close().await;
        if image.uncertain.load(Ordering::Acquire) {
            // An error in the middle of an overhaul's last step, and in taking it back. It has to be opened again.
            return Ok(failed.or(closed.err()));
        }
        closed.map_err(|e| format!("closed, without errors from below: {e}"))?;
        self.history.flushed(called, self.log_len());
        if image.tasks.count() != 0 {
            return Err("closed, with tasks under way".to_owned());
        }
        Ok(failed)
    }

    async fn work(
        &self,
        node: &Arc<Node>,
        task: usize,
        steps: &[Step],
    ) -> Result<Vec<BlockError>, String> {
        let mut errors = Vec::new();
        for step in steps.iter().filter(|s| s.task == task) {
            for _ in 0..step.pause {
                tokio::task::yield_now().await;
            }
            let request = self.request(node, &step.op);
            let result = match step.drop {
                Drop::Never => Some(request.await),
                Drop::Rounds(rounds) => given_up_after(rounds, request).await,
                Drop::Millis(n) => tokio::time::timeout(Duration::from_millis(n), request)
                    .await
                    .ok(),
            };
            if result.is_none() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            match result {
                None | Some(Ok(Ok(()))) => {}
                Some(Ok(Err(why))) => return Err(format!("{:?}: {why}", step.op)),
                // It waited for the way back to a shorter disk.
                Some(Err(e)) if e.errno() == libc::EIO && is_past_end(node, &step.op) => {}
                Some(Err(e)) => errors.push(e),
            }
        }
        Ok(errors)
    }

    /// One request. The outer error is the disk's, the inner one what it did wrong.
    async fn request(&self, node: &Arc<Node>, op: &Op) -> Result<Result<(), String>> {
        // The disk may not have grown that far.
        let sectors = node.length() as usize / SECTOR;
        let clip = |range: &Range<usize>| range.start.min(sectors)..range.end.min(sectors);
        let log_len = || self.log_len();
        let bytes = |r: &Range<usize>| ((r.start * SECTOR) as u64, (r.len() * SECTOR) as u64);
        match op {
            Op::Write(range, value) => {
                let range = clip(range);
                let (offset, length) = bytes(&range);
                let recording = self.history.change(range, *value, log_len);
                write(node, offset, length as usize, *value).await?;
                recording.done(false);
            }
            Op::Pack(range, value) => {
                let cluster = 1usize << (self.plan.shape.cluster_bits - 9);
                let whole = |sector: usize| sector.next_multiple_of(cluster);
                let range = clip(&(whole(range.start)..whole(range.end)));
                let (offset, length) = bytes(&range);
                if range.is_empty() {
                    return Ok(Ok(()));
                }
                let recording = self.history.change(range, *value, log_len);
                let data = vec![*value; length as usize].into();
                match node.pwritev_compressed(offset, data).await {
                    Ok(()) => recording.done(false),
                    // Something is there already, and compressed data never takes the place of other data; or the disk's end has moved meanwhile.
                    Err(e) if e.errno() == libc::EIO && self.faults.failed().is_empty() => {}
                    Err(e) if e.errno() == libc::EINVAL => {}
                    Err(e) => return Err(e),
                }
            }
            Op::Zero(range, flags) => {
                let range = clip(range);
                let (offset, length) = bytes(&range);
                let recording = self.history.change(range, 0, log_len);
                node.pwrite_zeroes(offset, length, *flags).await?;
                recording.done(false);
            }
            Op::Discard(range) => {
                let range = clip(range);
                let (offset, length) = bytes(&range);
                let recording = self.history.change(range, 0, log_len);
                node.pdiscard(offset, length).await?;
                recording.done(true);
            }
            Op::Read(range) => {
                let range = clip(range);
                let called = self.history.now();
                let (offset, length) = bytes(&range);
                // Every byte has to be written to.
                let mut buf = IoBufMut::zeroed(length as usize);
                buf.fill(0xee);
                let read = node.preadv(offset, buf, ReadFlags::empty()).await?;
                return Ok(self.check_read(&range, &read.to_vec(), called));
            }
            Op::Flush => {
                let called = self.history.now();
                node.flush().await?;
                self.history.flushed(called, self.log_len());
            }
            Op::Status(range) => {
                let (offset, length) = bytes(&clip(range));
                chain_status(node, None, offset, length, StatusMode::Precise).await?;
            }
            Op::Snapshot(_) | Op::Goto(_) | Op::Delete(_) => {
                return self.snapshot_request(node, op).await;
            }
            Op::Width(bits) => {
                let mut options = Options::new();
                options.set("refcount_bits", bits.to_string());
                node.amend(options).await?;
            }
            Op::Downgrade => {
                let compat = |text: &str| Options::new().with("compat", text);
                match node.amend(compat("0.10")).await {
                    Ok(()) => node.amend(compat("1.1")).await?,
                    // Snapshots of another length, other refcounts.
                    Err(e) if e.kind() == ErrorKind::Unsupported => {}
                    Err(e) if e.kind() == ErrorKind::InvalidArgument => {}
                    Err(e) => return Err(e),
                }
            }
            Op::Resize(sectors) => {
                let behind = self.history.change(*sectors..usize::MAX - 2, 0, log_len);
                let recording = self.history.resize(*sectors as u64, log_len);
                let request = TruncateRequest::to((sectors * SECTOR) as u64);
                node.truncate(request).await?;
                behind.done(false);
                recording.done(false);
            }
        }
        Ok(Ok(()))
    }

    async fn snapshot_request(&self, node: &Arc<Node>, op: &Op) -> Result<Result<(), String>> {
        let called = self.history.now();
        let log_len = || self.log_len();
        let none = |e: &BlockError| e.kind() == ErrorKind::NotFound;
        match op {
            Op::Snapshot(number) => {
                let name = format!("s{number}");
                let request = SnapshotRequest::now(&name);
                node.snapshot_create(request).await?;
                let image = self.disk.snapshot();
                let Some(contents) = kept::contents(&image, &self.plan.backing, &name).await else {
                    return Ok(Err("there is no such snapshot".to_owned()));
                };
                for (sector, bytes) in contents.chunks(SECTOR).enumerate() {
                    let allowed = self
                        .history
                        .allowed_since(sector, self.base(sector), called);
                    if !uniform(bytes).is_some_and(|v| allowed.contains(&v)) {
                        let value = uniform(bytes);
                        return Ok(Err(format!(
                            "sector {sector} of it holds {value:?} and may hold {allowed:?}"
                        )));
                    }
                }
                self.snapshots.taken(&name, contents, self.log_len());
                self.history.flushed(called, self.log_len());
            }
            Op::Goto(number) => {
                let name = format!("s{number}");
                let kept = self.snapshots.find(&name);
                // One that was dropped or has failed may be there all the same, and nobody knows what it holds.
                let Some(kept) = kept else {
                    return Ok(Ok(()));
                };
                let values = kept.contents.chunks(SECTOR);
                let mut recordings = Vec::new();
                for (sector, bytes) in values.enumerate() {
                    let value = bytes[0];
                    recordings.push(self.history.change(sector..sector + 1, value, log_len));
                }
                let sectors = kept.contents.len() / SECTOR;
                recordings.push(self.history.change(sectors..usize::MAX - 2, 0, log_len));
                recordings.push(self.history.resize(sectors as u64, log_len));
                match node.snapshot_goto(SnapshotSelector::name(&name)).await {
                    Ok(()) => recordings.into_iter().for_each(|r| r.done(false)),
                    // Deleted meanwhile, or never taken.
                    Err(e) if none(&e) => {}
                    Err(e) => return Err(e),
                }
            }
            Op::Delete(number) => {
                let name = format!("s{number}");
                if self.snapshots.find(&name).is_none() {
                    return Ok(Ok(()));
                }
                self.snapshots.deleting(&name, self.log_len());
                match node.snapshot_delete(SnapshotSelector::name(&name)).await {
                    Ok(()) => self.snapshots.deleted(&name, self.log_len()),
                    Err(e) if none(&e) => {}
                    Err(e) => return Err(e),
                }
            }
            _ => unreachable!("the caller has others"),
        }
        Ok(Ok(()))
    }

    fn check_read(&self, range: &Range<usize>, read: &[u8], called: u64) -> Result<(), String> {
        for (sector, bytes) in range.clone().zip(read.chunks(SECTOR)) {
            let allowed = self
                .history
                .allowed_since(sector, self.base(sector), called);
            match uniform(bytes) {
                Some(value) if allowed.contains(&value) => {
                    if allowed.len() > 1 {
                        self.history.saw(sector, value, called);
                    }
                }
                value => {
                    return Err(format!(
                        "sector {sector} reads {value:?} and may read {allowed:?}"
                    ));
                }
            }
        }
        Ok(())
    }
}
