// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compressing and inflating clusters: raw deflate with a window of 4 KiB, or Zstandard. Called by `read` and `write_compressed`.
//!
//! The output is exactly one cluster, whatever the input says of itself: no input makes more of it, and less is an error. What follows the compressed data
//! in its last sector belongs to others and is not looked at. Inflating a cluster of 64 KiB takes a fraction of a millisecond, as long as a disk wait, so it
//! is done on the blocking pool.

use std::cell::RefCell;

use blockcore::{BlockError, IoBuf, Result, blocking};
use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use zstd::zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use crate::header::CompressionType;

/// Clusters up to this size are inflated on the spot: the way to another thread would take longer.
const INLINE_BYTES_MAX: usize = 4096;

/// The longest window that a Zstandard frame may ask for, as a power of two of bytes: it is memory, once for each request that is inflating. No encoder
/// needs one that is longer than a cluster (2 MiB at most), but those that don't know how much is to come take up to 8 MiB at their usual levels.
const ZSTD_WINDOW_BITS_MAX: u32 = 23;

/// Inflates `raw`, which may have bytes behind the compressed data, to one cluster of `cluster_size` bytes.
///
/// # Errors
/// `Corrupt` for data that is no cluster.
pub async fn decompress(
    kind: CompressionType,
    raw: Vec<u8>,
    cluster_size: usize,
) -> Result<Vec<u8>> {
    if cluster_size <= INLINE_BYTES_MAX {
        return inflate(kind, &raw, cluster_size);
    }
    blocking::run(move || inflate(kind, &raw, cluster_size)).await?
}

/// The window of the deflate streams of the format, as a power two of bytes: readers have no longer one.
const DEFLATE_WINDOW_BITS: u8 = 12;

/// Compresses a cluster of `cluster_size` bytes. What `cluster` lacks at the end is zero. `None`: it doesn't get shorter.
///
/// # Errors
/// As [`blocking::run`].
pub async fn compress(
    kind: CompressionType,
    cluster: IoBuf,
    cluster_size: usize,
) -> Result<Option<Vec<u8>>> {
    let work = move || {
        let mut bytes = vec![0; cluster_size];
        cluster.copy_to_slice(0, &mut bytes[..cluster.len()]);
        // Whatever is as long as the cluster is of no use.
        match kind {
            CompressionType::Zlib => deflate(&bytes, cluster_size - 1),
            CompressionType::Zstd => deflate_zstd(&bytes, cluster_size - 1),
        }
    };
    if cluster_size <= INLINE_BYTES_MAX {
        return Ok(work());
    }
    blocking::run(work).await
}

/// At most `max` bytes of raw deflate.
fn deflate(bytes: &[u8], max: usize) -> Option<Vec<u8>> {
    let level = flate2::Compression::default();
    let mut deflater = Compress::new_with_window_bits(level, false, DEFLATE_WINDOW_BITS);
    let mut out = vec![0; max];
    let status = deflater.compress(bytes, &mut out, FlushCompress::Finish);
    if !matches!(status, Ok(Status::StreamEnd)) {
        return None;
    }
    out.truncate(deflater.total_out() as usize);
    Some(out)
}

/// At most `max` bytes of Zstandard.
fn deflate_zstd(bytes: &[u8], max: usize) -> Option<Vec<u8>> {
    let mut out = vec![0; max];
    let n = zstd::bulk::compress_to_buffer(bytes, &mut out, zstd::DEFAULT_COMPRESSION_LEVEL);
    out.truncate(n.ok()?);
    Some(out)
}

fn inflate(kind: CompressionType, raw: &[u8], cluster_size: usize) -> Result<Vec<u8>> {
    let mut out = vec![0; cluster_size];
    let filled = match kind {
        CompressionType::Zlib => inflate_deflate(raw, &mut out),
        CompressionType::Zstd => inflate_zstd(raw, &mut out),
    };
    match filled {
        Some(n) if n == cluster_size => Ok(out),
        _ => Err(BlockError::corrupt(
            "A compressed cluster can't be decompressed",
        )),
    }
}

/// How many bytes of `out` were filled. A stream that would go on is cut off, as other readers do.
fn inflate_deflate(raw: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut inflater = Decompress::new(false);
    let done = inflater.decompress(raw, out, FlushDecompress::Finish);
    done.ok().map(|_| inflater.total_out() as usize)
}

/// What a thread keeps for the next cluster, in bytes: there are hundreds of threads.
const CONTEXT_BYTES_MAX: usize = 4 << 20;

thread_local! {
    // Making one costs more than inflating a small cluster.
    static CONTEXT: RefCell<DCtx<'static>> = RefCell::new(DCtx::create());
}

/// As [`inflate_deflate`].
fn inflate_zstd(raw: &[u8], out: &mut [u8]) -> Option<usize> {
    CONTEXT.with_borrow_mut(|context| {
        let filled = fill(context, raw, out);
        if context.sizeof() > CONTEXT_BYTES_MAX {
            *context = DCtx::create();
        }
        filled
    })
}

fn fill(context: &mut DCtx<'_>, raw: &[u8], out: &mut [u8]) -> Option<usize> {
    context.reset(ResetDirective::SessionOnly).ok()?;
    let limit = DParameter::WindowLogMax(ZSTD_WINDOW_BITS_MAX);
    context.set_parameter(limit).ok()?;
    let len = out.len();
    let mut input = InBuffer::around(raw);
    let mut output = OutBuffer::around(out);
    while output.pos() < len {
        let before = (input.pos, output.pos());
        let rest = context.decompress_stream(&mut output, &mut input).ok()?;
        let is_stuck = (input.pos, output.pos()) == before;
        // Nothing is left of the frame, or of the input.
        if rest == 0 || is_stuck {
            break;
        }
    }
    Some(output.pos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn deflate(bytes: &[u8]) -> Vec<u8> {
        let mut deflater =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        deflater.write_all(bytes).unwrap();
        deflater.finish().unwrap()
    }

    #[tokio::test]
    async fn a_cluster_comes_back_whole_and_nothing_else_does() {
        for size in [512usize, 65536, 2 << 20] {
            let cluster: Vec<u8> = (0..size as u32).map(|i| (i / 7) as u8).collect();
            let zstd = zstd::encode_all(&cluster[..], 1).unwrap();
            for (kind, raw) in [
                (CompressionType::Zlib, deflate(&cluster)),
                (CompressionType::Zstd, zstd),
            ] {
                let mut padded = raw.clone();
                padded.extend([0xee; 300]);
                assert_eq!(decompress(kind, padded, size).await.unwrap(), cluster);
                for broken in [
                    raw[..raw.len() / 2].to_vec(),
                    vec![0xff; 100],
                    vec![0; 100],
                    vec![],
                ] {
                    let err = decompress(kind, broken, size).await.unwrap_err();
                    assert_eq!(err.kind(), blockcore::ErrorKind::Corrupt);
                }
            }
        }
    }

    #[tokio::test]
    async fn data_of_another_length_than_a_cluster_never_makes_more_or_less() {
        let huge = vec![7; 32 << 20];
        for (kind, raw) in [
            (CompressionType::Zlib, deflate(&huge)),
            (
                CompressionType::Zstd,
                zstd::encode_all(&huge[..], 1).unwrap(),
            ),
        ] {
            assert_eq!(decompress(kind, raw, 65536).await.unwrap(), huge[..65536]);
        }
        for (kind, raw) in [
            (CompressionType::Zlib, deflate(&huge[..65535])),
            (
                CompressionType::Zstd,
                zstd::encode_all(&huge[..65535], 1).unwrap(),
            ),
        ] {
            assert!(decompress(kind, raw, 65536).await.is_err());
        }
    }

    // A frame may ask for a long window, whatever it holds.
    #[test]
    fn no_thread_keeps_the_memory_that_a_frame_asked_for() {
        let cluster = vec![7; 65536];
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(ZSTD_WINDOW_BITS_MAX).unwrap();
        encoder.write_all(&cluster).unwrap();
        let wide = encoder.finish().unwrap();
        let plain = zstd::encode_all(&cluster[..], 1).unwrap();
        let mut broken = wide[..8].to_vec();
        broken.extend([0xff; 100]);
        for (raw, is_sound) in [(wide, true), (plain, true), (broken, false)] {
            let inflated = inflate(CompressionType::Zstd, &raw, 65536);
            assert_eq!(inflated.ok(), is_sound.then(|| cluster.clone()));
            let kept = CONTEXT.with_borrow(|context| context.sizeof());
            assert!(kept <= CONTEXT_BYTES_MAX, "{kept}");
        }
    }

    // A frame may ask for a window of 128 MiB to make a few bytes.
    #[test]
    fn a_window_that_is_longer_than_any_cluster_is_refused() {
        let frame = |window_bits: u8| {
            // Magic, no content size, no checksum, the window's size; then one block: raw, the last one, 4096 bytes.
            let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (window_bits - 10) << 3];
            frame.extend(&((4096u32 << 3) | 1).to_le_bytes()[..3]);
            frame.extend([7; 4096]);
            frame
        };
        let short = inflate(CompressionType::Zstd, &frame(23), 4096);
        assert_eq!(short.unwrap(), vec![7; 4096]);
        let long = inflate(CompressionType::Zstd, &frame(24), 4096);
        assert_eq!(long.unwrap_err().kind(), blockcore::ErrorKind::Corrupt);
    }

    #[test]
    fn noise_never_panics() {
        let mut noise = 1u64;
        for _ in 0..2000 {
            let mut raw = Vec::new();
            for _ in 0..64 {
                noise = noise
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                raw.push((noise >> 33) as u8);
            }
            let _either = inflate(CompressionType::Zlib, &raw, 4096);
            raw.splice(0..4, [0x28, 0xb5, 0x2f, 0xfd]);
            let _either = inflate(CompressionType::Zstd, &raw, 4096);
        }
    }
}
