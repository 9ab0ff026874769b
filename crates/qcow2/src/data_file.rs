// SPDX-License-Identifier: MIT OR Apache-2.0
//! External data files: the clusters of the guest lie in a file of their own, each at its guest offset; the image has only metadata.
//!
//! A data cluster of such an image is not counted, and nobody shares it, so its entry always says `COPIED`; there are no compressed clusters and no snapshots.
//! Nothing is allocated in the data file and nothing freed: a cluster that becomes unused is only discarded. With `data_file_raw` the file reads as the disk
//! does at any time, so zero writes go there, too.
//!
//! The name comes out of the image, and so is followed only as the caller's policy allows (`OpenContext::open_child`).

use std::sync::Arc;

use blockcore::{
    BlockError, Child, ChildRole, ErrorKind, OpenContext, Options, Preallocation, Result,
    TruncateRequest, WriteFlags,
};

use crate::extension::{self, Extension};
use crate::header::{AUTOCLEAR_DATA_FILE_RAW, Header, Incompatible};
use crate::image::Image;
use crate::remap::make_hole;

/// Where the clusters of the guest lie.
#[derive(Debug)]
pub(crate) enum DataFile {
    /// In the image's own file.
    Inside,
    /// In another one.
    Outside(Child),
    /// In another one that was not opened, since only the image's header is of interest.
    NotOpened,
}

impl Header {
    /// The name of the external data file, as the image has it.
    pub fn data_file_name(&self) -> Option<String> {
        let name = self
            .extensions
            .iter()
            .find(|e| e.kind == extension::DATA_FILE)?;
        Some(String::from_utf8_lossy(&name.data).into_owned())
    }

    /// Says that the guest's clusters lie in another file.
    pub fn set_data_file(&mut self, name: &str, raw: bool) {
        self.incompatible |= Incompatible::DATA_FILE;
        if raw {
            self.autoclear |= AUTOCLEAR_DATA_FILE_RAW;
        }
        self.name_data_file(name);
    }

    /// Gives that file another name; with an empty one the image names none.
    pub fn name_data_file(&mut self, name: &str) {
        let is_name = |e: &Extension| e.kind == extension::DATA_FILE;
        let before = self.extensions.iter().position(is_name);
        self.extensions.retain(|e| !is_name(e));
        if name.is_empty() {
            return;
        }
        let extension = Extension {
            kind: extension::DATA_FILE,
            data: name.as_bytes().to_vec(),
        };
        match before {
            Some(at) => self.extensions.insert(at, extension),
            None => self.insert_before_feature_names(extension),
        }
    }

    /// Adds an extension. Names of features come last: they may be left out.
    pub(crate) fn insert_before_feature_names(&mut self, extension: Extension) {
        let names = |e: &Extension| e.kind == extension::FEATURE_NAMES;
        let at = self.extensions.iter().position(names);
        let at = at.unwrap_or(self.extensions.len());
        self.extensions.insert(at, extension);
    }

    /// Whether the guest's clusters lie in another file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible.contains(Incompatible::DATA_FILE)
    }

    /// Whether that file reads as the disk does.
    pub fn is_data_file_raw(&self) -> bool {
        self.has_data_file() && self.autoclear & AUTOCLEAR_DATA_FILE_RAW != 0
    }
}

impl DataFile {
    /// Opens the data file that the options describe (`data-file.*`), else the one that the image names.
    ///
    /// # Errors
    /// `InvalidArgument` where there is none, or must be none; those of opening it.
    pub async fn open(
        ctx: &OpenContext<'_>,
        options: &mut Options,
        header: &Header,
    ) -> Result<DataFile> {
        let is_given = options.contains("data-file") || options.has_subtree("data-file");
        if !header.has_data_file() {
            if is_given {
                // That it can't be opened is told first.
                ctx.open_child("data-file", ChildRole::Data, options, None)
                    .await?;
                let text = "'data-file' can only be set for images with an external data file";
                return Err(BlockError::invalid(text));
            }
            return Ok(DataFile::Inside);
        }
        if ctx.is_without_data() && !is_given {
            return Ok(DataFile::NotOpened);
        }
        // A plain file name, whatever it looks like: no protocol, no options.
        let name = header.data_file_name().map(|name| match name {
            name if name.contains(':') && !name.starts_with('/') => format!("./{name}"),
            name => name,
        });
        let role = ChildRole::Data;
        let child = ctx.open_child("data-file", role, options, name.as_deref());
        match child.await? {
            Some(child) => Ok(DataFile::Outside(child)),
            None => Err(BlockError::invalid(
                "'data-file' is required for this image",
            )),
        }
    }

    /// The other file, if there is one and it is open.
    pub fn child(&self) -> Option<&Child> {
        match self {
            DataFile::Outside(child) => Some(child),
            _ => None,
        }
    }
}

impl Image {
    /// Whether the guest's clusters lie in another file.
    pub fn has_data_file(&self) -> bool {
        !matches!(self.data, DataFile::Inside)
    }

    /// The file in which the guest's clusters lie.
    ///
    /// # Errors
    /// `Io` where it was not opened.
    pub fn storage(&self) -> Result<&Child> {
        match &self.data {
            DataFile::Inside => Ok(&self.file),
            DataFile::Outside(child) => Ok(child),
            DataFile::NotOpened => {
                let text = "The external data file of the image is not open";
                Err(BlockError::new(ErrorKind::Io, text))
            }
        }
    }

    /// Whether what was never written where the guest's clusters lie reads as zero.
    pub fn holes_are_zero(&self) -> bool {
        let storage = self.data.child().unwrap_or(&self.file);
        !self.is_encrypted() && storage.driver().grows_zeroed()
    }

    /// Whether there is a data file that has to read as the disk does. One that is encrypted never does.
    pub fn reads_raw(&self) -> bool {
        self.has_data_file() && !self.is_encrypted() && self.header().is_data_file_raw()
    }

    /// Sees to it that a data file which has to read as the disk does reads as zero where the disk is about to. The caller holds `changing`.
    pub(crate) async fn zero_raw_data(
        &self,
        offset: u64,
        bytes: u64,
        flags: WriteFlags,
    ) -> Result<()> {
        // INV QCOW2-RAW-1: changes of the file and of the mapping are one, so writes of data wait for them in `changing`.
        // Where data is encrypted, zeroes would be noise until the mapping is durable.
        if !self.reads_raw() {
            return Ok(());
        }
        let may_unmap = flags & WriteFlags::MAY_UNMAP;
        self.storage()?
            .pwrite_zeroes(offset, bytes, may_unmap)
            .await
    }

    /// Gives back what the data file has for clusters that don't use it any more. The caller holds `changing`. That the mapping may be durable only later is
    /// no harm: the guest said that it needs nothing of this, and what the file has there instead is zero; so where data is encrypted, nothing is given back.
    /// A file that reads as the disk does has been [zeroed](Image::zero_raw_data) before.
    pub(crate) async fn discard_data(&self, offset: u64, bytes: u64) {
        let gives_back = !self.is_encrypted() && !self.reads_raw();
        if let Some(child) = self.data.child().filter(|_| gives_back) {
            make_hole(child, offset, bytes).await;
        }
    }

    /// Makes the data file as long as the disk is to be. What appears reads as zero. Where data is encrypted, the file keeps what it has of the cluster
    /// that the disk ends in: what was cut off would be noise after a growth. The caller holds `changing` over all behind the lesser end.
    pub(crate) async fn resize_data(
        self: &Arc<Self>,
        old: u64,
        new: u64,
        mode: Preallocation,
    ) -> Result<()> {
        let Some(child) = self.data.child() else {
            return Ok(());
        };
        let used_end = |disk_end: u64| match self.is_encrypted() {
            true => disk_end.next_multiple_of(self.cluster_size()),
            false => disk_end,
        };
        if child.length() > used_end(old) && new > old {
            // Something of another life of the file.
            let cut = TruncateRequest::to(used_end(old));
            child.node().truncate(cut).await?;
        }
        let mut request = TruncateRequest::to(new.max(child.length().min(used_end(new))));
        if mode != Preallocation::Metadata {
            request.preallocation = mode;
        }
        child.node().truncate(request).await?;
        let end = old.next_multiple_of(self.cluster_size()).min(new);
        if end > old && self.reads_raw() && !self.holes_are_zero() {
            // INV QCOW2-RAW-1: what appears of the cluster that the disk ended in reads as zero, whatever its mapping is.
            child
                .pwrite_zeroes(old, end - old, WriteFlags::empty())
                .await?;
        }
        Ok(())
    }

    /// Refuses what images with a data file can't have.
    pub(crate) fn check_no_data_file(&self) -> Result<()> {
        match self.has_data_file() {
            true => Err(BlockError::from_errno(libc::ENOTSUP)),
            false => Ok(()),
        }
    }
}
