// SPDX-License-Identifier: MIT OR Apache-2.0
//! What is left of a disk when a plan is done, or after a power cut: looks at it, and uses it on.

use std::collections::BTreeSet;
use std::sync::Arc;

use blockcore::testing::{CrashDriver, Rng};
use blockcore::{BlockError, CheckFix, IoBufMut, Node};

use super::super::bitmaps::covers;
use super::super::history::{ANYTHING, SECTOR, STATE};
use super::super::kept::STATE_BYTES;
use super::super::{DataFileKind, corruptions, findings, forge, open_on, write};
use super::{BITMAP, Disk, Op, all, below, uniform};
use crate::crypto::CryptMethod;

impl Disk {
    /// Uses the image, with no more errors, and looks at all of it.
    pub(super) async fn use_and_check(&mut self, leaks: bool) -> Result<(), String> {
        let told = |e: BlockError| format!("not usable afterwards: {e}");
        let (node, _image) = self.open().await.map_err(told)?;
        let places = node.length() as usize / self.plan.unit;
        let lengths = self.history.lengths_now(self.start.base.len() as u64);
        if !lengths.contains(&(places as u64)) {
            return Err(format!("{places} places long, and may be {lengths:?}"));
        }
        self.check_contents(&all(&node).await?, |s, base| {
            self.history.allowed_now(s, base)
        })?;
        let now = |s, base| self.history.allowed_now(s, base);
        self.check_state(&node, now).await?;
        let steps = [
            Op::Write(0..places.min(3), 251),
            Op::Write(places / 2..places, 252),
            Op::Flush,
        ];
        for op in &steps {
            self.request(&node, op).await.map_err(told)??;
        }
        node.driver().close().await.map_err(told)?;
        let image = self.disk.snapshot();
        self.check_secrecy(&image)?;
        self.check_secrecy(&self.plan.backing.data().unwrap_or_default())?;
        let found = match leaks {
            true => corruptions(image.clone()).await,
            false => findings(image.clone()).await,
        };
        if !found.is_empty() {
            return Err(format!("check says {found:?}"));
        }
        let (again, _image) = self.open().await.map_err(told)?;
        let contents = all(&again).await?;
        self.check_contents(&contents, |s, base| self.history.allowed_now(s, base))?;
        if let (Some(mut data), true) = (self.plan.backing.data(), self.plan.reads_raw()) {
            // After a growth that failed it may be longer than the disk.
            data.resize(contents.len(), 0);
            if data != contents {
                return Err("the raw data file reads otherwise".to_owned());
            }
        }
        if !self.check_bitmap(&again, &contents)? && self.faults.failed().is_empty() {
            return Err("the bitmap is in use in an image that was closed".to_owned());
        }
        self.snapshots
            .check(&image, &self.plan.backing, self.log_len())
            .await?;
        self.check_snapshot(image).await?;
        Ok(())
    }

    /// Looks at a disk that nobody can write: all is there, and nothing is left over.
    pub(super) async fn look_at_all(&self, node: &Arc<Node>) -> Result<(), String> {
        let now = |s, base| self.history.allowed_now(s, base);
        self.check_contents(&all(node).await?, now)?;
        self.check_state(node, now).await?;
        if write(node, 0, self.plan.unit, 1).await.is_ok() {
            return Err("written, though read-only".to_owned());
        }
        let image = self.disk.snapshot();
        let found = match self.faults.failed().is_empty() {
            true => findings(image.clone()).await,
            false => corruptions(image.clone()).await,
        };
        if !found.is_empty() {
            return Err(format!("read-only, and check says {found:?}"));
        }
        self.snapshots
            .check(&image, &self.plan.backing, self.log_len())
            .await
    }

    /// Looks at the VM state, where there can be any.
    async fn check_state(
        &self,
        node: &Node,
        allowed: impl Fn(usize, u8) -> BTreeSet<u64>,
    ) -> Result<(), String> {
        if self.plan.data_file != DataFileKind::Inside {
            return Ok(());
        }
        let buf = IoBufMut::zeroed(STATE_BYTES);
        let state = node.load_vmstate(0, buf).await;
        let state = state.map_err(|e| format!("the state can't be read: {e}"))?;
        for (bytes, place) in state.to_vec().chunks(self.plan.unit).zip(STATE..) {
            let allowed = allowed(place, 0);
            let value = uniform(bytes);
            if !allowed.contains(&ANYTHING) && !value.is_some_and(|v| allowed.contains(&v)) {
                let place = place - STATE;
                return Err(format!(
                    "place {place} of the state holds {value:?} and may hold {allowed:?}"
                ));
            }
        }
        Ok(())
    }

    fn check_contents(
        &self,
        contents: &[u8],
        allowed: impl Fn(usize, u8) -> BTreeSet<u64>,
    ) -> Result<(), String> {
        for (place, bytes) in contents.chunks(self.plan.unit).enumerate() {
            let allowed = allowed(place, self.base(place));
            if !uniform(bytes).is_some_and(|v| allowed.contains(&v)) {
                let value = uniform(bytes);
                return Err(format!(
                    "place {place} holds {value:?} and may hold {allowed:?}"
                ));
            }
        }
        Ok(())
    }

    /// INV QCOW2-CRYPT-1: where the image is encrypted, no sector of the file is what a sector of the disk is: one value all over.
    fn check_secrecy(&self, image: &[u8]) -> Result<(), String> {
        let shape = &self.plan.shape;
        // Narrow refcounts that are all alike look the same.
        if shape.encryption == CryptMethod::None || shape.refcount_order < 4 {
            return Ok(());
        }
        let mut sectors = image.chunks(SECTOR);
        match sectors.position(|s| uniform(s).is_some_and(|v| v != 0)) {
            Some(at) => Err(format!("sector {at} of the file is not encrypted")),
            None => Ok(()),
        }
    }

    /// Says whether the bitmap can be used; what it says is right then.
    fn check_bitmap(&self, node: &Node, contents: &[u8]) -> Result<bool, String> {
        match self.plan.bitmap {
            true => {
                let values = self.start.base.iter();
                let base: Vec<u8> = values.flat_map(|v| vec![*v; self.plan.unit]).collect();
                covers(node, BITMAP, &base, contents)
            }
            false => Ok(true),
        }
    }

    async fn check_snapshot(&self, image: Vec<u8>) -> Result<(), String> {
        let Some(before) = &self.start.snapshot else {
            return Ok(());
        };
        let now = forge::snapshot_contents(image, &self.plan.backing).await;
        match before.iter().zip(&now).position(|(a, b)| a != b) {
            Some(at) => Err(format!("the snapshot has changed at {at:#x}")),
            None => Ok(()),
        }
    }

    /// Cuts the power after so many entries of the log, and looks at what is left.
    pub(super) async fn cut(&self, cut: usize, keep: u64, rng: &mut Rng) -> Result<(), String> {
        let image = self.disk.image_after(cut, keep, rng);
        self.check_secrecy(&image)?;
        self.check_secrecy(&self.plan.backing.data().unwrap_or_default())?;
        let found = corruptions(image.clone()).await;
        if !found.is_empty() {
            return Err(format!("check says {found:?}"));
        }
        let left = CrashDriver::new(image.clone()).growing_with(self.plan.grows_with());
        let data = self.plan.backing.data.as_ref();
        let data = data.map(|(data, _)| data.image_after(cut, keep, rng));
        let backing = below(&self.plan.backing, &left, data.clone());
        let (node, _image) = open_on(left.clone(), &backing).await;
        let places = node.length() / self.plan.unit as u64;
        let lengths = self
            .history
            .lengths_after_cut(self.start.base.len() as u64, cut);
        if !lengths.contains(&places) {
            return Err(format!("{places} places long, and may be {lengths:?}"));
        }
        let contents = all(&node).await?;
        let after_cut = |s, base| self.history.allowed_after_cut(s, base, cut);
        self.check_contents(&contents, after_cut)?;
        self.check_state(&node, after_cut).await?;
        if let (Some(mut data), true) = (data, self.plan.reads_raw()) {
            data.resize(node.length() as usize, 0);
            let raw = self.check_contents(&data, after_cut);
            raw.map_err(|why| format!("the raw data file: {why}"))?;
        }
        self.check_bitmap(&node, &contents)?;
        self.snapshots
            .check(&image, &self.plan.backing, cut)
            .await?;
        self.check_snapshot(image).await?;
        // Now and then: what is left can be repaired, though nothing is wrong, and used.
        if rng.chance(5) {
            let found = node.check(CheckFix::All).await;
            let found = found.map_err(|e| format!("not repaired: {e}"))?;
            if found.leaks > 0 || all(&node).await? != contents {
                return Err(format!("repaired: {:?}", found.messages));
            }
        }
        if rng.chance(10) {
            let length = node.length() as usize;
            write(&node, 0, length, 253).await.unwrap();
            node.driver().close().await.unwrap();
            let found = corruptions(left.snapshot()).await;
            if !found.is_empty() {
                return Err(format!("used again, and check says {found:?}"));
            }
        }
        Ok(())
    }
}
