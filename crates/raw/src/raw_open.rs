// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`RawFactory`]: options, opening and creating of raw images. `QEMU: raw_open`, `raw_apply_options`.

use std::sync::Arc;

use async_trait::async_trait;
use blockcore::{
    BlockDriver, BlockError, Child, CreateContext, CreateOption, Diagnostics, DriverFactory,
    OpenContext, Options, Permissions, Result, SECTOR_BYTES,
};

use crate::file_open::CREATE_OPTIONS;
use crate::raw::{Range, RawDriver, file_permissions};

/// Opens and creates raw images.
#[derive(Clone, Copy, Debug, Default)]
pub struct RawFactory;

/// Checks what the options make of a file of `length` bytes.
pub(crate) fn check_range(offset: u64, size: Option<u64>, length: u64) -> Result<()> {
    if offset > length {
        return Err(BlockError::invalid(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({length})"
        )));
    }
    let Some(size) = size else {
        return Ok(());
    };
    if size > length - offset {
        return Err(BlockError::invalid(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the containing file ({length})"
        )));
    }
    if !size.is_multiple_of(SECTOR_BYTES) {
        return Err(BlockError::invalid("Specified size is not multiple of 512"));
    }
    Ok(())
}

fn warn_of_guess(diagnostics: &Diagnostics, filename: &str) {
    diagnostics.warn(&format!(
        "WARNING: Image format was not specified for '{filename}' and probing guessed raw."
    ));
    diagnostics.warn(
        "         Automatically detecting the format is dangerous for raw images, write operations on block 0 will be restricted.",
    );
    diagnostics.warn("         Specify the 'raw' format explicitly to remove the restrictions.");
}

/// Makes the driver; the caller closes the file if it can't be made.
async fn configure(
    ctx: &OpenContext<'_>,
    options: &mut Options,
    file: &Child,
) -> Result<(u64, Option<u64>)> {
    let offset = options.take_size("offset")?.unwrap_or(0);
    let size = options.take_size("size")?;
    check_range(offset, size, file.length())?;
    if (offset > 0 || size.is_some()) && !ctx.flags().force_share {
        let wanted = file_permissions(ctx.permissions(), true);
        file.driver().set_permissions(wanted).await?;
    }
    Ok((offset, size))
}

#[async_trait]
impl DriverFactory for RawFactory {
    fn format_name(&self) -> &'static str {
        "raw"
    }

    fn probe(&self, _head: &[u8]) -> u32 {
        1
    }

    /// Raw is what its parent makes of it.
    fn child_permissions(&self, parent: Permissions, _read_only: bool) -> Permissions {
        parent
    }

    async fn open(
        &self,
        ctx: &OpenContext<'_>,
        options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        let file = ctx.take_file()?;
        let (offset, fixed_size) = match configure(ctx, options, &file).await {
            Ok(range) => range,
            Err(e) => {
                file.close().await?;
                return Err(e);
            }
        };
        if ctx.probed() && !ctx.flags().read_only {
            warn_of_guess(ctx.diagnostics(), ctx.filename());
        }
        Ok(Box::new(RawDriver {
            file,
            range: Arc::new(Range::new(offset, fixed_size)),
            force_share: ctx.flags().force_share,
            probed_by: ctx.probed().then(|| ctx.registry().clone()),
        }))
    }

    fn create_options(&self) -> &'static [CreateOption] {
        CREATE_OPTIONS
    }

    async fn create(
        &self,
        ctx: &CreateContext<'_>,
        filename: &str,
        options: Options,
    ) -> Result<()> {
        let protocol = ctx.registry().find_protocol(filename).await?;
        protocol.create(ctx, filename, options).await
    }
}
