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
mod request;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use blockcore::testing::fault::{Event, Faults, Rule};
use blockcore::testing::{CrashDriver, DelayDriver, FaultDriver, Rng, given_up_after};
use blockcore::{
    Backend, BlockError, CheckFix, Node, NodeFlags, Options, Preallocation, Result, WriteFlags,
};
use futures::FutureExt;

use super::bitmaps::with_bitmap;
use super::history::{History, SECTOR};
use super::kept::Snapshots;
use super::{Backing, DataFileKind, READ_ONLY, forge, fresh_image, open_on, open_over, read_all};
use super::{Shape, set_data_file, try_read_all, write};
use crate::crypto::CryptMethod;
use crate::image::Image;

/// The name of the dirty bitmap.
const BITMAP: &str = "b";
/// The name of another one, which is there together with it; and of one more, which isn't. They are what [`Op::Bitmap`] is about.
const OTHER_BITMAP: &str = "other";
const NEW_BITMAP: &str = "new";
/// How long a slow disk's request waits at most, before it takes effect and again after.
const DELAY_MILLIS: u64 = 100;

/// A request. Places and lengths are in the plan's unit ([`Plan::unit`]).
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Write(Range<usize>, u8),
    /// A write that is durable when it has ended.
    WriteDurably(Range<usize>, u8),
    /// A write of the clusters that begin in the range, compressed.
    Pack(Range<usize>, u8),
    Zero(Range<usize>, WriteFlags),
    Discard(Range<usize>),
    Read(Range<usize>),
    Flush,
    /// Changes the length.
    Resize(usize),
    /// The same, and what appears is allocated.
    Preallocate(usize, Preallocation),
    Status(Range<usize>),
    /// A write and a read of the VM state area.
    SaveState(Range<usize>, u8),
    LoadState(Range<usize>),
    /// Takes the snapshot with this number. Those with odd numbers take the VM state along.
    Snapshot(u32),
    /// Goes back to it, if it was taken.
    Goto(u32),
    Delete(u32),
    /// Gives refcounts so many bits.
    Width(u32),
    /// Makes the image one of this version.
    Version(u32),
    /// Changes another option that the image was made with.
    Amend(&'static str, &'static str),
    Check(CheckFix),
    Bitmap(BitmapOp),
    /// Gives tables in memory another size, or makes the disk one that can't be written. The caller has nothing in flight.
    Reopen {
        read_only: bool,
    },
}

/// What is done to the bitmaps that nobody looks into afterwards.
#[derive(Clone, Copy, Debug)]
pub(crate) enum BitmapOp {
    Add,
    Remove,
    Clear,
    Disable,
    /// Into the one that is looked into.
    Merge,
    /// As for a backup that comes to nothing, or to its end.
    Freeze {
        is_done: bool,
    },
}

impl Op {
    /// Whether the answer is one that this request may have although nothing is wrong. `is_old`: the image may be of version 2.
    fn is_refused_with(&self, e: &BlockError, is_old: bool) -> bool {
        let is_invalid = e.errno() == libc::EINVAL;
        let is_unsupported = e.errno() == libc::ENOTSUP;
        match self {
            // Longer and shorter are told apart before it is the request's turn.
            Op::Preallocate(..) => is_invalid || (is_old && is_unsupported),
            Op::Resize(_) => is_old && is_unsupported,
            // A refcount that doesn't fit.
            Op::Snapshot(_) | Op::Goto(_) => is_invalid,
            Op::Width(_) => is_invalid,
            // Snapshots with zero clusters, or of another length.
            Op::Version(_) => is_invalid || is_unsupported,
            Op::Zero(_, flags) => is_unsupported && flags.contains(WriteFlags::NO_FALLBACK),
            _ => false,
        }
    }
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

impl Drop {
    /// `None`: it was dropped.
    async fn carry_out<T>(self, request: impl Future<Output = T>) -> Option<T> {
        match self {
            Drop::Never => Some(request.await),
            Drop::Rounds(rounds) => given_up_after(rounds, request).await,
            Drop::Millis(n) => {
                let patience = Duration::from_millis(n);
                tokio::time::timeout(patience, request).await.ok()
            }
        }
    }
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

/// What no test writes.
const NOISE: u8 = 0xa5;

/// A disk, and what is done to it.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub shape: Shape,
    pub backing: Backing,
    /// What places and lengths count, in bytes: sectors, or a part of one.
    pub unit: usize,
    /// Written before all else.
    pub filled: Vec<(Range<usize>, u8)>,
    /// Guest clusters that are compressed ones, and their values.
    pub compressed: Vec<(u64, u8)>,
    pub snapshot: bool,
    /// With one outside, there are no snapshots and no compressed clusters.
    pub data_file: DataFileKind,
    /// It has a dirty bitmap, which is empty before all else.
    pub bitmap: bool,
    /// Discarded clusters keep their place (`discard-no-unref`).
    pub keeps_places: bool,
    /// All that is freed gets holes (`pass-discard-other`).
    pub punches_all: bool,
    /// What appears when its files become longer is [`NOISE`], as when they lie encrypted in something else. Not for images that are encrypted themselves.
    pub noise: bool,
    /// Reads may be served without a wait.
    pub nowait: bool,
    /// Sessions follow each other in one opening, read-only in between.
    pub reopens: bool,
    /// When closing is given up. It is asked for once more then.
    pub close: Drop,
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
    /// The values of its places.
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
            unit: SECTOR,
            filled: Vec::new(),
            compressed: Vec::new(),
            snapshot: false,
            data_file: DataFileKind::Inside,
            bitmap: false,
            keeps_places: false,
            punches_all: false,
            noise: false,
            nowait: false,
            reopens: false,
            close: Drop::Never,
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
        let contents = read_all(&node).await;
        let value = |place: &[u8]| uniform(place).expect("places are uniform") as u8;
        Start {
            image,
            data,
            base: contents.chunks(self.unit).map(value).collect(),
            snapshot,
        }
    }

    fn grows_with(&self) -> u8 {
        // A raw data file that is still empty reads as the disk does because it grows by zeroes.
        let can_be_noise = self.shape.encryption == CryptMethod::None && !self.reads_raw();
        match self.noise && can_be_noise {
            true => NOISE,
            false => 0,
        }
    }

    fn drops(&self) -> bool {
        let mut steps = self.sessions.iter().flatten();
        self.close != Drop::Never || steps.any(|s| s.drop != Drop::Never)
    }

    /// Whether the disk may become shorter, and the file with it.
    fn shrinks(&self) -> bool {
        let mut steps = self.sessions.iter().flatten();
        steps.any(|s| matches!(s.op, Op::Resize(n) if n * self.unit < 1000 * SECTOR))
    }

    /// Whether the file may be made longer than it has to be: where it can't, it isn't.
    fn extends_ahead(&self) -> bool {
        let is_plain = self.shape.encryption == CryptMethod::None && !self.shape.extended_l2;
        is_plain && self.data_file == DataFileKind::Inside
    }

    /// Whether the image may be of version 2 at some time.
    fn is_old(&self) -> bool {
        let mut steps = self.sessions.iter().flatten();
        self.shape.version == 2 || steps.any(|s| matches!(s.op, Op::Version(2)))
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
        let disk = CrashDriver::new(bytes).growing_with(self.grows_with());
        let is_outside = self.data_file != DataFileKind::Inside;
        let backing = below(&self.backing, &disk, is_outside.then(Vec::new));
        let (node, _image) = open_on(disk.clone(), &backing).await;
        for (range, value) in &self.filled {
            let (offset, length) = (range.start * self.unit, range.len() * self.unit);
            write(&node, offset as u64, length, *value).await.unwrap();
        }
        node.driver().close().await.unwrap();
        let mut image = disk.snapshot();
        if self.snapshot {
            image = forge::snapshot(image).await;
        }
        if self.bitmap {
            image = with_bitmap(image, &backing, BITMAP).await;
            image = with_bitmap(image, &backing, OTHER_BITMAP).await;
        }
        (image, backing.data())
    }

    /// Does it all, and cuts the power at `cuts` places chosen by `rng`.
    ///
    /// # Errors
    /// What went wrong.
    pub async fn run(&self, cuts: u64, rng: &mut Rng) -> Result<Seen, String> {
        let mut disk = Disk::prepare(self).await;
        let errors = match self.reopens {
            true => disk.sessions_in_one().await?,
            false => disk.sessions_apart().await?,
        };
        // A hole that can't be punched, or a file that can't be cut off, is no harm.
        let is_hole = |r: &&blockcore::testing::fault::Request| match r.event {
            Event::Discard => true,
            Event::Truncate | Event::Length => self.shrinks() || self.extends_ahead(),
            // What gives storage back that entries on disk may still name.
            Event::WriteZeroes => self.data_file == DataFileKind::Outside || self.keeps_places,
            _ => false,
        };
        let failed = disk.faults.failed();
        if failed.is_empty() && !errors.is_empty() {
            return Err(format!("errors that nobody injected: {errors:?}"));
        }
        let was_told = !errors.is_empty() || disk.past_end.load(Ordering::Relaxed) > 0;
        if !was_told && !self.drops() && !failed.iter().all(|r| is_hole(&r)) {
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
        let (node, image) = second.block_on(disk.open_for_use()).unwrap();
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
            match disk.close(&image).await? {
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
    /// Who uses the disk.
    backend: Option<Arc<Backend>>,
    dropped: AtomicU32,
    /// How many requests failed that reach past the disk's end.
    past_end: AtomicU32,
}

/// All that a disk holds.
async fn all(node: &Node) -> Result<Vec<u8>, String> {
    let read = try_read_all(node).await;
    read.map_err(|e| format!("can't be read: {e}"))
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
        let disk = disk.growing_with(plan.grows_with());
        let faults = Faults::default();
        let mut plan = plan.clone();
        plan.backing = below(&plan.backing, &disk, start.data.clone());
        if let Some(data) = &mut plan.backing.data {
            data.1 = faults.clone();
            plan.backing.data_alignment = plan.file_alignment;
        }
        Disk {
            plan,
            disk,
            faults,
            history: History::default(),
            start,
            snapshots: Snapshots::default(),
            backend: None,
            dropped: AtomicU32::new(0),
            past_end: AtomicU32::new(0),
        }
    }

    fn log_len(&self) -> usize {
        self.disk.log_len()
    }

    /// The value of a place before all else. What appears when the disk grows is zero.
    fn base(&self, place: usize) -> u8 {
        self.start.base.get(place).copied().unwrap_or(0)
    }

    /// Whether a change reaches past the end of the disk as it is now.
    fn is_past_end(&self, node: &Node, op: &Op) -> bool {
        let end = match op {
            Op::Write(range, _)
            | Op::WriteDurably(range, _)
            | Op::Pack(range, _)
            | Op::Zero(range, _)
            | Op::Discard(range) => range.end,
            _ => 0,
        };
        (end * self.plan.unit) as u64 > node.length()
    }

    async fn open(&self) -> Result<(Arc<Node>, Arc<Image>)> {
        let disk = self.disk.clone();
        let mut file = FaultDriver::over(Box::new(disk), self.faults.clone());
        file = file.aligned_to(self.plan.file_alignment);
        if self.plan.nowait {
            file = file.with_nowait();
        }
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
        let mut runtime = image.runtime().clone();
        runtime.discard_no_unref = self.plan.keeps_places;
        runtime.pass_discard_other = self.plan.punches_all;
        image.set_runtime(runtime);
        Ok((node, image))
    }

    /// The same for the steps of a session.
    async fn open_for_use(&mut self) -> Result<(Arc<Node>, Arc<Image>)> {
        let (node, image) = self.open().await?;
        self.backend = Some(Arc::new(Backend::new(node.clone(), false)));
        Ok((node, image))
    }

    fn backend(&self) -> Arc<Backend> {
        self.backend.clone().expect("it is open")
    }

    fn add_faults(&mut self) {
        for rule in std::mem::take(&mut self.plan.faults) {
            self.faults.add(rule);
        }
    }

    /// For each session opens the disk, has every task do its steps, closes it; gives back what failed on the way.
    async fn sessions_apart(&mut self) -> Result<Vec<BlockError>, String> {
        let mut errors = Vec::new();
        for steps in self.plan.sessions.clone() {
            self.add_faults();
            let (node, image) = match self.open_for_use().await {
                Ok(open) => open,
                Err(e) => {
                    errors.push(e);
                    continue;
                }
            };
            errors.extend(self.work_all(&node, &steps).await?);
            errors.extend(self.close(&image).await?);
        }
        Ok(errors)
    }

    /// The same without closing: between sessions the disk can't be written.
    async fn sessions_in_one(&mut self) -> Result<Vec<BlockError>, String> {
        self.add_faults();
        let (node, image) = match self.open_for_use().await {
            Ok(open) => open,
            Err(e) => return Ok(vec![e]),
        };
        let mut errors = Vec::new();
        for (i, steps) in self.plan.sessions.clone().iter().enumerate() {
            if i > 0 {
                errors.extend(self.stand_still(&image).await?);
            }
            errors.extend(self.work_all(&node, steps).await?);
        }
        errors.extend(self.close(&image).await?);
        Ok(errors)
    }

    /// Makes the disk read-only for a while, and looks at it; gives back what failed on the way.
    async fn stand_still(&self, image: &Image) -> Result<Option<BlockError>, String> {
        let backend = self.backend();
        let called = self.history.now();
        let failed = backend.root().flush().await.err();
        self.faults.clear();
        if image.uncertain.load(Ordering::Acquire) {
            return Ok(failed);
        }
        let reopened = backend.reopen(READ_ONLY, false, Options::new()).await;
        reopened.map_err(|e| format!("not made read-only: {e}"))?;
        self.history.flushed(called, self.log_len());
        self.look_at_all(backend.root()).await?;
        let writable = NodeFlags::default();
        let reopened = backend.reopen(writable, false, Options::new()).await;
        reopened.map_err(|e| format!("not made writable again: {e}"))?;
        Ok(failed)
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
    async fn close(&self, image: &Image) -> Result<Option<BlockError>, String> {
        let backend = self.backend();
        let called = self.history.now();
        let mut failed = None;
        if self.plan.close == Drop::Never {
            failed = backend.root().flush().await.err();
        }
        // What was not written stays to be written.
        self.faults.clear();
        let closed = match self.plan.close.carry_out(backend.close()).await {
            Some(closed) => closed,
            None => {
                self.dropped.fetch_add(1, Ordering::Relaxed);
                // If it had come so far, it goes on by itself, and nobody is told when it has ended. Time is paused: it passes when there is nothing else to do.
                tokio::time::sleep(Duration::from_secs(60)).await;
                backend.close().await
            }
        };
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
            let result = step.drop.carry_out(request).await;
            if result.is_none() {
                self.dropped.fetch_add(1, Ordering::Relaxed);
            }
            match result {
                None | Some(Ok(Ok(()))) => {}
                Some(Ok(Err(why))) => return Err(format!("{:?}: {why}", step.op)),
                // It waited for the way back to a shorter disk.
                // An injected error may have come before.
                Some(Err(e)) if e.errno() == libc::EIO && self.is_past_end(node, &step.op) => {
                    self.past_end.fetch_add(1, Ordering::Relaxed);
                }
                Some(Err(e)) if step.op.is_refused_with(&e, self.plan.is_old()) => {}
                Some(Err(e)) => errors.push(e),
            }
        }
        Ok(errors)
    }
}
