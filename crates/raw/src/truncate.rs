// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing the length of a file, with preallocation. `QEMU: handle_aiocb_truncate`, `raw_co_truncate`.

use std::io;

use blockcore::{BlockError, IoBuf, Preallocation, Result, TruncateRequest, strerror};

use crate::host::{HostFile, HostKind};

/// The most zeroes that one write of a full preallocation has, in bytes.
const FILL_BYTES: u64 = 1 << 20;
/// The most zeroes that are written so that a new file has a first block, in bytes.
const FIRST_BLOCK_BYTES: u64 = 4096;

fn failed(what: &str) -> impl Fn(io::Error) -> BlockError + '_ {
    move |e| {
        let err = BlockError::from_io(e);
        let text = format!("{what}: {}", strerror(err.errno()));
        err.message(text)
    }
}

/// Changes the length; blocks. `sync` makes durable what was written.
pub(crate) fn truncate(
    host: &HostFile,
    request: TruncateRequest,
    sync: &dyn Fn() -> Result<()>,
) -> Result<()> {
    let old = host.length().map_err(failed("Could not stat file"))?;
    if host.kind == HostKind::File {
        return truncate_file(host, old, request.bytes, request.preallocation, sync);
    }
    if request.preallocation != Preallocation::Off {
        let name = request.preallocation;
        let text = format!("Preallocation mode '{name}' unsupported for this non-regular file");
        return Err(BlockError::unsupported(text));
    }
    if request.bytes != old && request.exact {
        return Err(BlockError::unsupported("Cannot resize device files"));
    }
    if request.bytes > old {
        return Err(BlockError::invalid("Cannot grow device files"));
    }
    Ok(())
}

/// As [`truncate`], for a regular file that is `old` bytes long.
pub(crate) fn truncate_file(
    host: &HostFile,
    old: u64,
    new: u64,
    preallocation: Preallocation,
    sync: &dyn Fn() -> Result<()>,
) -> Result<()> {
    if new < old && preallocation != Preallocation::Off {
        return Err(BlockError::unsupported(
            "Cannot use preallocation for shrinking files",
        ));
    }
    let done = match preallocation {
        Preallocation::Off => host
            .set_length(new)
            .and_then(|()| first_block(host, old, new))
            .map_err(failed("Failed to resize file")),
        Preallocation::Falloc if new == old => Ok(()),
        Preallocation::Falloc => host
            .allocate(old, new - old)
            .and_then(|()| first_block(host, old, new))
            .map_err(failed("Could not preallocate data for the new file")),
        Preallocation::Full => fill(host, old, new, sync),
        Preallocation::Metadata => Err(BlockError::unsupported(format!(
            "Unsupported preallocation mode: {preallocation}"
        ))),
    };
    if done.is_err() && new > old {
        // The room that was got goes back; what went wrong first is what matters.
        if let Err(e) = host.set_length(old) {
            tracing::error!("Failed to restore old file length: {e}");
        }
    }
    done
}

/// A file whose first block is there shows by reads which alignment O_DIRECT wants; in a hole anything goes.
fn first_block(host: &HostFile, old: u64, new: u64) -> io::Result<()> {
    if old != 0 || new == 0 {
        return Ok(());
    }
    match host.direct {
        // Its blocks may be larger than ours.
        Some(d) if !d.is_aligned(new.min(FIRST_BLOCK_BYTES)) => Ok(()),
        _ => host.write(0, &IoBuf::zeroes(new.min(FIRST_BLOCK_BYTES) as usize)),
    }
}

fn fill(host: &HostFile, old: u64, new: u64, sync: &dyn Fn() -> Result<()>) -> Result<()> {
    let what = "Could not write zeros for preallocation";
    host.set_length(new)
        .map_err(failed("Failed to resize file"))?;
    // O_DIRECT writes whole blocks: the block that the old end lies in has storage already, the last one is cut off again.
    let align = host.direct.map_or(1, |d| d.request).into();
    let mut at = old.next_multiple_of(align);
    while at < new {
        let n = (new - at).next_multiple_of(align).min(FILL_BYTES);
        host.write(at, &IoBuf::zeroes(n as usize))
            .map_err(failed(what))?;
        at += n;
    }
    if at > new {
        host.set_length(new)
            .map_err(failed("Failed to resize file"))?;
    }
    sync().map_err(|e| {
        let text = format!("Could not flush file to disk: {}", strerror(e.errno()));
        e.message(text)
    })
}
