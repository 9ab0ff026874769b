// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`CheckOnly`]: an image that is open for a check and nothing else. So it may be too damaged for anything else, have features that this release can't
//! read or write, or say that it is corrupt; and a repair need not fear for what is in memory.

use async_trait::async_trait;
use blockcore::{
    BackingName, BlockDriver, BlockError, CheckFix, CheckResult, Child, IoBufMut, OpenContext,
    Options, ReadFlags, Result, SECTOR_BYTES,
};

use super::{check, extensions};
use crate::bitmap_load;
use crate::data_file::DataFile;
use crate::header::Header;
use crate::runtime::RuntimeOptions;

/// An image that is open for a check.
struct CheckOnly {
    file: Child,
    data: DataFile,
    backing: Option<Child>,
    length: u64,
    backing_name: Option<BackingName>,
}

/// Opens an image for a check, with its backing chain: one that is incomplete is told of first.
///
/// # Errors
/// `InvalidImage` where the header doesn't say enough for a check; those of the file and of the backing chain.
pub(crate) async fn open(
    ctx: &OpenContext<'_>,
    options: &mut Options,
) -> Result<Box<dyn BlockDriver>> {
    let file = ctx.take_file()?;
    let header = Header::read_for_check(&file).await?;
    extensions::encryption_header(&header)?;
    // Who uses the image could not do without them.
    bitmap_load::load(&file, &header, ctx.diagnostics()).await?;
    // How a writer works is of no use to a check, but has to make sense.
    RuntimeOptions::new(header.cluster_bits).take(options, &header)?;
    // Metadata is not encrypted.
    let _of_no_use = options.take_subtree("encrypt");
    // A data file is looked at only if options name it: that there is none is no damage.
    let is_given = options.contains("data-file") || options.has_subtree("data-file");
    let data = match is_given {
        true => DataFile::open(ctx, options, &header).await?,
        false => DataFile::NotOpened,
    };
    let backing = ctx.open_backing(options, header.backing.as_ref()).await?;
    Ok(Box::new(CheckOnly {
        file,
        data,
        backing,
        length: header.size / SECTOR_BYTES * SECTOR_BYTES,
        backing_name: header.backing,
    }))
}

#[async_trait]
impl BlockDriver for CheckOnly {
    fn format_name(&self) -> &'static str {
        "qcow2"
    }

    fn supports_backing(&self) -> bool {
        true
    }

    fn children(&self) -> Vec<&Child> {
        std::iter::once(&self.file)
            .chain(self.data.child())
            .chain(&self.backing)
            .collect()
    }

    fn backing(&self) -> Option<&Child> {
        self.backing.as_ref()
    }

    fn backing_name(&self) -> Option<BackingName> {
        self.backing_name.clone()
    }

    async fn length(&self) -> Result<u64> {
        Ok(self.length)
    }

    async fn preadv(&self, _offset: u64, _buf: IoBufMut, _flags: ReadFlags) -> Result<IoBufMut> {
        let text = "The image is open for a check only, and can't be read";
        Err(BlockError::unsupported(text))
    }

    async fn check(&self, fix: CheckFix) -> Result<CheckResult> {
        // A repair before may have changed what the header says.
        let header = Header::read_for_check(&self.file).await?;
        check(&header, &self.file, fix).await
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
