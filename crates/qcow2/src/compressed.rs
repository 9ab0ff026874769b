// SPDX-License-Identifier: MIT OR Apache-2.0
//! Inflating compressed clusters: raw deflate with a window of 4 KiB, or Zstandard.
//!
//! The output is exactly one cluster, whatever the input says of itself: no input makes more of it.
//! Inflating a cluster of 64 KiB takes a fraction of a millisecond, as long as a disk wait, so it is done on the blocking pool.

use std::io::Read;

use blockcore::{BlockError, Result};
use flate2::{Decompress, FlushDecompress, Status};

use crate::header::CompressionType;

/// Clusters up to this size are inflated on the spot: the way to another thread would take longer.
const INLINE_BYTES_MAX: usize = 4096;

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
    let task = tokio::task::spawn_blocking(move || inflate(kind, &raw, cluster_size));
    task.await
        .unwrap_or_else(|_| Err(BlockError::from_errno(125)))
}

fn inflate(kind: CompressionType, raw: &[u8], cluster_size: usize) -> Result<Vec<u8>> {
    let broken = || BlockError::corrupt("A compressed cluster can't be decompressed");
    let mut out = vec![0; cluster_size];
    match kind {
        CompressionType::Zlib => {
            let mut inflater = Decompress::new(false);
            let status = inflater
                .decompress(raw, &mut out, FlushDecompress::Finish)
                .map_err(|_| broken())?;
            // A stream that would go on is as wrong as one that ends early.
            let full = inflater.total_out() == cluster_size as u64;
            if !full || !matches!(status, Status::StreamEnd | Status::BufError | Status::Ok) {
                return Err(broken());
            }
        }
        CompressionType::Zstd => {
            let mut decoder = zstd::Decoder::new(raw)
                .map_err(|_| broken())?
                .single_frame();
            decoder.read_exact(&mut out).map_err(|_| broken())?;
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[tokio::test]
    async fn a_cluster_comes_back_whole_and_nothing_else_does() {
        let cluster: Vec<u8> = (0..65536u32).map(|i| (i / 7) as u8).collect();
        let mut deflater =
            flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
        deflater.write_all(&cluster).unwrap();
        let mut raw = deflater.finish().unwrap();
        raw.extend([0xee; 300]);
        assert_eq!(
            decompress(CompressionType::Zlib, raw.clone(), 65536)
                .await
                .unwrap(),
            cluster
        );
        assert!(
            decompress(CompressionType::Zlib, raw[..50].to_vec(), 65536)
                .await
                .is_err()
        );
        assert!(
            decompress(CompressionType::Zlib, vec![0xff; 100], 65536)
                .await
                .is_err()
        );

        let mut raw = zstd::encode_all(&cluster[..], 1).unwrap();
        raw.extend([0xee; 300]);
        assert_eq!(
            decompress(CompressionType::Zstd, raw, 65536).await.unwrap(),
            cluster
        );
        assert!(
            decompress(CompressionType::Zstd, vec![0; 100], 65536)
                .await
                .is_err()
        );
    }
}
