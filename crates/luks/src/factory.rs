// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`LuksFactory`]: recognises, opens and creates images of the format `luks`.

use std::sync::Mutex;

use async_trait::async_trait;
use blockcore::{
    Backend, BlockDriver, BlockError, Child, ChildRole, CreateContext, CreateOption, DriverFactory,
    IoBuf, OpenContext, Options, Preallocation, Result, TruncateRequest, WriteFlags,
};

use crate::create_options::{AMEND_OPTIONS, CREATE_OPTIONS};
use crate::driver::LuksDriver;
use crate::header::{Header, Payload};
use crate::store::FileStore;
use crate::volume::{MadeVolume, NewVolume, Unlocked};

/// Recognises, opens and creates images of the format `luks`.
#[derive(Clone, Copy, Debug, Default)]
pub struct LuksFactory;

fn no_key() -> BlockError {
    BlockError::invalid("Parameter 'key-secret' is required for cipher")
}

#[async_trait]
impl DriverFactory for LuksFactory {
    fn format_name(&self) -> &'static str {
        "luks"
    }

    fn probe(&self, head: &[u8]) -> u32 {
        if Header::probe(head) { 100 } else { 0 }
    }

    async fn open(
        &self,
        ctx: &OpenContext<'_>,
        options: &mut Options,
    ) -> Result<Box<dyn BlockDriver>> {
        let file = ctx.take_file()?;
        let header_file = match ctx
            .open_child("header", ChildRole::File, options, None)
            .await
        {
            Ok(child) => child,
            Err(e) => {
                file.close().await?;
                return Err(e);
            }
        };
        match unlock(ctx, options, &file, header_file.as_ref()).await {
            Ok((header, unlocked)) => Ok(Box::new(LuksDriver {
                file,
                header_file,
                payload_offset: header.payload_offset,
                header: Mutex::new(header),
                unlocked,
                secrets: ctx.registry().secrets().clone(),
            })),
            Err(e) => {
                for child in std::iter::once(&file).chain(&header_file) {
                    child.close().await?;
                }
                Err(e)
            }
        }
    }

    fn create_options(&self) -> &'static [CreateOption] {
        CREATE_OPTIONS
    }

    fn amend_options(&self) -> &'static [CreateOption] {
        AMEND_OPTIONS
    }

    async fn create(
        &self,
        ctx: &CreateContext<'_>,
        filename: &str,
        mut options: Options,
    ) -> Result<()> {
        let size = options.take_size("size")?.unwrap_or(0);
        if options.take("detached-header").is_some() {
            // So it is with QEMU's tool, whose list of options has it too.
            let text = "Parameter 'detached-header' is unexpected";
            return Err(BlockError::invalid(text));
        }
        let preallocation = take_preallocation(&mut options)?;
        let key = options.take_str("key-secret");
        let new = NewVolume::take(&mut options)?;
        let password = ctx
            .registry()
            .secrets()
            .password(&key.ok_or_else(no_key)?)?;
        let made = new.make(password).await?;
        // What is left is the file's; it refuses what it doesn't know.
        options.set("size", "0");
        let file = ctx.create_file(filename, options).await?;
        let written = write_volume(&file, &made, size, preallocation).await;
        let created = written.and(file.close().await);
        if created.is_err() {
            ctx.delete_file(filename).await;
        }
        created
    }
}

/// Reads the header, and unlocks it unless the image is only looked at.
async fn unlock(
    ctx: &OpenContext<'_>,
    options: &mut Options,
    file: &Child,
    header_file: Option<&Child>,
) -> Result<(Header, Option<Unlocked>)> {
    let key = options.take_str("key-secret");
    let payload = match header_file {
        Some(_) => Payload::Elsewhere,
        None => Payload::Behind,
    };
    let store = FileStore(header_file.unwrap_or(file));
    let header = Header::read(&store, payload).await?;
    if ctx.no_io() {
        return Ok((header, None));
    }
    let password = ctx
        .registry()
        .secrets()
        .password(&key.ok_or_else(no_key)?)?;
    let (_slot, key) = header.unlock(&store, &password).await?;
    let unlocked = Unlocked::new(&header, key)?;
    Ok((header, Some(unlocked)))
}

fn take_preallocation(options: &mut Options) -> Result<Preallocation> {
    let Some(name) = options.take_str("preallocation") else {
        return Ok(Preallocation::Off);
    };
    Preallocation::from_name(&name).ok_or_else(|| {
        BlockError::invalid(format!(
            "Parameter 'preallocation' does not accept value '{name}'"
        ))
    })
}

async fn write_volume(
    file: &Backend,
    made: &MadeVolume,
    size: u64,
    preallocation: Preallocation,
) -> Result<()> {
    let Some(bytes) = made.header.payload_offset.checked_add(size) else {
        let text = "The requested file size is too large";
        return Err(BlockError::from_errno(libc::EFBIG).message(text));
    };
    let whole = TruncateRequest {
        preallocation,
        ..TruncateRequest::to(bytes)
    };
    file.truncate(whole).await?;
    let data = IoBuf::from(made.bytes.clone());
    file.pwritev(0, data, WriteFlags::empty()).await
}
