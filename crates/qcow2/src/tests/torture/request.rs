// SPDX-License-Identifier: MIT OR Apache-2.0
//! The requests of a plan, each with what it says of the disk.

use std::ops::Range;
use std::sync::Arc;

use blockcore::{
    BlockError, CheckFix, ErrorKind, IoBufMut, Node, NodeFlags, Options, Preallocation, ReadFlags,
    Result, SnapshotRequest, SnapshotSelector, StatusFlags, StatusMode, TruncateRequest,
    WriteFlags, chain_status,
};

use super::super::bitmaps::stored;
use super::super::history::{ANYTHING, SECTOR, STATE};
use super::super::kept::{self, STATE_BYTES};
use super::super::write;
use super::{BITMAP, BitmapOp, Disk, NEW_BITMAP, OTHER_BITMAP, Op, uniform};

/// What a request has found, and should not have.
type Finding = Result<(), String>;

/// The places of a part of the VM state.
fn of_state(range: &Range<usize>) -> Range<usize> {
    STATE + range.start..STATE + range.end
}

async fn bitmap_request(node: &Node, op: BitmapOp) -> Result<()> {
    match op {
        BitmapOp::Add => drop(node.add_dirty_bitmap(stored(NEW_BITMAP)).await?),
        BitmapOp::Remove => node.remove_dirty_bitmap(OTHER_BITMAP).await?,
        BitmapOp::Clear => node.clear_dirty_bitmap(OTHER_BITMAP).await?,
        BitmapOp::Disable => node.enable_dirty_bitmap(OTHER_BITMAP, false).await?,
        BitmapOp::Merge => {
            let other = node.dirty_bitmap(OTHER_BITMAP)?;
            node.merge_dirty_bitmap(BITMAP, &other).await?;
        }
        BitmapOp::Freeze { is_done } => {
            let frozen = node.freeze_dirty_bitmap(OTHER_BITMAP).await?;
            tokio::task::yield_now().await;
            match is_done {
                true => frozen.done(),
                false => drop(frozen),
            }
        }
    }
    Ok(())
}

impl Disk {
    fn in_bytes(&self, range: &Range<usize>) -> (u64, u64) {
        let unit = self.plan.unit;
        ((range.start * unit) as u64, (range.len() * unit) as u64)
    }

    /// The places of the VM state.
    fn whole_state(&self) -> Range<usize> {
        of_state(&(0..STATE_BYTES / self.plan.unit))
    }

    /// One request. The outer error is the disk's, the inner one what it did wrong.
    pub(super) async fn request(&self, node: &Arc<Node>, op: &Op) -> Result<Finding> {
        // The disk may not have grown that far.
        let end = node.length() as usize / self.plan.unit;
        let clip = |range: &Range<usize>| range.start.min(end)..range.end.min(end);
        let log_len = || self.log_len();
        match op {
            Op::Write(range, value) => {
                let range = clip(range);
                let (offset, length) = self.in_bytes(&range);
                let recording = self.history.change(range, *value, log_len);
                write(node, offset, length as usize, *value).await?;
                recording.done(false);
            }
            Op::WriteDurably(range, value) => {
                let range = clip(range);
                let (offset, length) = self.in_bytes(&range);
                let recording = self.history.change(range, *value, log_len);
                let data = vec![*value; length as usize].into();
                node.pwritev(offset, data, WriteFlags::FUA).await?;
                recording.done_durably();
            }
            Op::Pack(range, value) => {
                let cluster = (1usize << self.plan.shape.cluster_bits) / self.plan.unit;
                let whole = |place: usize| place.next_multiple_of(cluster);
                let range = clip(&(whole(range.start)..whole(range.end)));
                let (offset, length) = self.in_bytes(&range);
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
                let (offset, length) = self.in_bytes(&range);
                let recording = self.history.change(range, 0, log_len);
                node.pwrite_zeroes(offset, length, *flags).await?;
                recording.done(false);
            }
            Op::Discard(range) => {
                let range = clip(range);
                let (offset, length) = self.in_bytes(&range);
                let recording = self.history.change(range, 0, log_len);
                node.pdiscard(offset, length).await?;
                recording.done(true);
            }
            Op::Read(range) => return self.read(node, &clip(range)).await,
            Op::Flush => {
                let called = self.history.now();
                node.flush().await?;
                self.history.flushed(called, self.log_len());
            }
            Op::Status(range) => return self.status(node, &clip(range)).await,
            Op::SaveState(range, value) => {
                let (offset, length) = self.in_bytes(range);
                let recording = self.history.change(of_state(range), *value, log_len);
                let data = vec![*value; length as usize].into();
                node.save_vmstate(offset, data).await?;
                recording.done(false);
            }
            Op::LoadState(range) => {
                let called = self.history.now();
                let (offset, length) = self.in_bytes(range);
                let buf = IoBufMut::zeroed(length as usize);
                let read = node.load_vmstate(offset, buf).await?;
                return Ok(self.check_read(&of_state(range), &read.to_vec(), called));
            }
            Op::Snapshot(_) | Op::Goto(_) | Op::Delete(_) => {
                return self.snapshot_request(node, op).await;
            }
            Op::Width(bits) => {
                let options = Options::new().with("refcount_bits", bits.to_string());
                node.amend(options).await?;
            }
            Op::Version(version) => {
                let compat = if *version == 2 { "0.10" } else { "1.1" };
                node.amend(Options::new().with("compat", compat)).await?;
            }
            Op::Amend(key, value) => node.amend(Options::new().with(key, *value)).await?,
            Op::Check(fix) => return self.check_in_use(node, *fix).await,
            Op::Bitmap(op) => bitmap_request(node, *op).await?,
            Op::Reopen { read_only } => self.reopen(*read_only).await?,
            Op::Resize(end) => self.resize(node, *end, Preallocation::Off).await?,
            Op::Preallocate(end, mode) => self.resize(node, *end, *mode).await?,
        }
        Ok(Ok(()))
    }

    async fn reopen(&self, read_only: bool) -> Result<()> {
        let flags = NodeFlags {
            read_only,
            ..NodeFlags::default()
        };
        let options = Options::new().with("l2-cache-entry-size", "512");
        let called = self.history.now();
        self.backend().reopen(flags, false, options).await?;
        self.history.flushed(called, self.log_len());
        Ok(())
    }

    async fn read(&self, node: &Node, range: &Range<usize>) -> Result<Finding> {
        let called = self.history.now();
        let (offset, length) = self.in_bytes(range);
        // Every byte has to be written to.
        let mut buf = IoBufMut::zeroed(length as usize);
        buf.fill(0xee);
        if let Some(slice) = buf.as_mut_slice()
            && node.read_nowait(offset, slice)
        {
            return Ok(self.check_read(range, &buf.to_vec(), called));
        }
        buf.fill(0xee);
        let read = node.preadv(offset, buf, ReadFlags::empty()).await?;
        Ok(self.check_read(range, &read.to_vec(), called))
    }

    /// What is said to be zero is.
    async fn status(&self, node: &Arc<Node>, range: &Range<usize>) -> Result<Finding> {
        let mut at = range.start;
        while at < range.end {
            let called = self.history.now();
            let (offset, length) = self.in_bytes(&(at..range.end));
            let found = chain_status(node, None, offset, length, StatusMode::Precise).await?;
            let places = found.status.bytes as usize / self.plan.unit;
            if found.status.flags.contains(StatusFlags::ZERO) {
                let zeroes = vec![0; places * self.plan.unit];
                if let Err(why) = self.check_read(&(at..at + places), &zeroes, called) {
                    return Ok(Err(format!("said to be zero: {why}")));
                }
            }
            if places == 0 {
                // It has become shorter.
                break;
            }
            at += places;
        }
        Ok(Ok(()))
    }

    async fn resize(&self, node: &Arc<Node>, places: usize, mode: Preallocation) -> Result<()> {
        // A disk has whole sectors.
        let end = places.next_multiple_of(SECTOR / self.plan.unit);
        let log_len = || self.log_len();
        let behind = self.history.change(end..STATE, 0, log_len);
        // The state lies behind the end: it stays where it is, or becomes a part of the disk.
        let state = self.history.muddle(self.whole_state(), log_len);
        let length = self.history.resize(end as u64, log_len);
        let request = TruncateRequest {
            preallocation: mode,
            ..TruncateRequest::to((end * self.plan.unit) as u64)
        };
        node.truncate(request).await?;
        behind.done(false);
        state.done(false);
        length.done(false);
        Ok(())
    }

    /// Nothing is wrong with an image in use. What errors and dropped requests have left behind may be unused.
    async fn check_in_use(&self, node: &Arc<Node>, fix: CheckFix) -> Result<Finding> {
        let found = node.check(fix).await?;
        if found.check_errors > 0 && !self.faults.failed().is_empty() {
            // That is how a check tells of what it could not read.
            return Err(BlockError::from_errno(libc::EIO));
        }
        Ok(match found.corruptions + found.check_errors {
            0 => Ok(()),
            _ => Err(format!("{:?}", found.messages)),
        })
    }

    async fn snapshot_request(&self, node: &Arc<Node>, op: &Op) -> Result<Finding> {
        let none = |e: &BlockError| e.kind() == ErrorKind::NotFound;
        match op {
            Op::Snapshot(number) => return self.take_snapshot(node, *number).await,
            Op::Goto(number) => {
                let name = format!("s{number}");
                // One that was dropped or has failed may be there all the same, and nobody knows what it holds.
                let Some(kept) = self.snapshots.find(&name) else {
                    return Ok(Ok(()));
                };
                let log_len = || self.log_len();
                let (disk, state) = (&kept.contents.disk, &kept.contents.state);
                let unit = self.plan.unit;
                let places = disk.chunks(unit).zip(0..);
                let places = places.chain(state.chunks(unit).zip(STATE..));
                let mut recordings = Vec::new();
                for (bytes, place) in places {
                    recordings.push(self.history.change(place..place + 1, bytes[0], log_len));
                }
                let end = disk.len() / unit;
                recordings.push(self.history.change(end..STATE, 0, log_len));
                recordings.push(self.history.resize(end as u64, log_len));
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

    async fn take_snapshot(&self, node: &Arc<Node>, number: u32) -> Result<Finding> {
        let called = self.history.now();
        let name = format!("s{number}");
        let mut request = SnapshotRequest::now(&name);
        let mut state = None;
        if number % 2 == 1 {
            request.vm_state_size = STATE_BYTES as u64;
            let places = self.whole_state();
            state = Some(self.history.change(places, 0, || self.log_len()));
        }
        node.snapshot_create(request).await?;
        if let Some(state) = state {
            state.done(false);
        }
        let image = self.disk.snapshot();
        let Some(contents) = kept::contents(&image, &self.plan.backing, &name).await else {
            return Ok(Err("there is no such snapshot".to_owned()));
        };
        let unit = self.plan.unit;
        let places = contents.disk.chunks(unit).zip(0..);
        let places = places.chain(contents.state.chunks(unit).zip(STATE..));
        for (bytes, place) in places {
            let base = self.base(place);
            let allowed = self.history.allowed_since(place, base, called);
            let is_allowed = |v| allowed.contains(&v) || allowed.contains(&ANYTHING);
            if !uniform(bytes).is_some_and(is_allowed) {
                let value = uniform(bytes);
                return Ok(Err(format!(
                    "place {place} of it holds {value:?} and may hold {allowed:?}"
                )));
            }
        }
        self.snapshots.taken(&name, contents, self.log_len());
        self.history.flushed(called, self.log_len());
        Ok(Ok(()))
    }

    fn check_read(&self, range: &Range<usize>, read: &[u8], called: u64) -> Result<(), String> {
        for (place, bytes) in range.clone().zip(read.chunks(self.plan.unit)) {
            let allowed = self.history.allowed_since(place, self.base(place), called);
            match uniform(bytes) {
                Some(_) if allowed.contains(&ANYTHING) => {}
                Some(value) if allowed.contains(&value) => {
                    if allowed.len() > 1 {
                        self.history.saw(place, value, called);
                    }
                }
                value => {
                    return Err(format!(
                        "place {place} reads {value:?} and may read {allowed:?}"
                    ));
                }
            }
        }
        Ok(())
    }
}
