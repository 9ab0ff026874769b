// SPDX-License-Identifier: MIT OR Apache-2.0
//! Fresh images: that ours are what QEMU makes is shown by the golden scripts; here is what those can't see.

use blockcore::testing::MemoryFactory;
use blockcore::{Diagnostics, OpenOptions, Options, Registry};

use super::*;
use crate::open::Qcow2Factory;

fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.register(MemoryFactory::default());
    registry.register(Qcow2Factory);
    registry
}

async fn create(options: &str) -> Result<Vec<u8>> {
    let registry = registry();
    let options = Options::from_dotted(options)?;
    registry
        .create("qcow2", "memory:disk", options, Diagnostics::new(|_| {}))
        .await?;
    let disk = OpenOptions::new()
        .format("memory")
        .open(&registry, "memory:disk")
        .await?;
    let bytes = disk.read(0, disk.length() as usize).await?.to_vec();
    disk.close().await?;
    Ok(bytes)
}

async fn refusal(options: &str) -> String {
    match create(options).await {
        Ok(_) => format!("{options} was accepted"),
        Err(e) => e.text(),
    }
}

#[tokio::test]
async fn a_fresh_image_is_header_refcount_table_refcount_block_and_l1_table() {
    for (options, l1_entries) in [
        ("size=1M", 1),
        ("size=1T", 2048),
        ("size=512k,cluster_size=512", 16),
    ] {
        let image = create(options).await.unwrap();
        let long = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        let cluster = 1u64 << image[23];
        assert_eq!(
            u32::from_be_bytes(image[36..40].try_into().unwrap()),
            l1_entries,
            "{options}"
        );
        assert_eq!(long(40), 3 * cluster, "{options}: L1 table");
        assert_eq!(long(48), cluster, "{options}: refcount table");
        assert_eq!(
            long(cluster as usize),
            2 * cluster,
            "{options}: refcount block"
        );
        // The test disk grows by whole sectors.
        let end = (3 * cluster + u64::from(l1_entries) * 8).next_multiple_of(512);
        assert_eq!(image.len() as u64, end, "{options}");
        let has_names = image.windows(9).any(|w| w == b"dirty bit");
        assert_eq!(has_names, cluster > FEATURE_NAMES_ABOVE_BYTES, "{options}");
    }
}

#[tokio::test]
async fn every_shape_can_be_opened_and_checked() {
    for cluster_bits in [9, 12, 16, 21] {
        for refcount_bits in [1, 16, 64] {
            for preallocation in ["off", "metadata", "falloc", "full"] {
                let options = format!(
                    "size=300k,cluster_size={},refcount_bits={refcount_bits},preallocation={preallocation}",
                    1 << cluster_bits
                );
                let image = create(&options).await.unwrap();
                assert_eq!(crate::tests::findings(image).await, [""; 0], "{options}");
            }
        }
    }
}

#[tokio::test]
async fn of_several_mistakes_the_same_one_is_told_as_by_qemu() {
    for (options, text) in [
        (
            "size=1M,cluster_size=1000,compat=x",
            "Parameter 'version' does not accept value 'x'",
        ),
        (
            "size=1M,compat=x,preallocation=y",
            "Parameter 'version' does not accept value 'x'",
        ),
        (
            "size=1M,cluster_size=1000,refcount_bits=3",
            "Cluster size must be a power of two between 512 and 2048k",
        ),
        (
            "size=1M,compat=0.10,refcount_bits=8,compression_type=zstd",
            "Different refcount widths than 16 bits require compatibility level 1.1 or above (use version=v3 or greater)",
        ),
        (
            "size=1M,data_file_raw=on,backing_fmt=raw",
            "Backing format cannot be used without backing file",
        ),
        (
            "size=9223372036854775807",
            "Could not resize image: Image size cannot be negative",
        ),
        (
            "size=9223372036854774784,cluster_size=512",
            "Could not resize image: offset(9223372036854774784) exceeds maximum(9223372035781033984)",
        ),
        (
            "size=1P,cluster_size=512",
            "The image size is too large for file format 'qcow2' (try using a larger cluster size)",
        ),
    ] {
        assert_eq!(refusal(options).await, text, "{options}");
    }
}

#[tokio::test]
async fn a_name_that_no_reader_takes_is_refused() {
    let name = "n".repeat(1024);
    assert!(
        create(&format!(
            "size=1M,backing_file={},backing_fmt=raw",
            &name[1..]
        ))
        .await
        .is_ok()
    );
    assert_eq!(
        refusal(&format!("size=1M,backing_file={name},backing_fmt=raw")).await,
        format!("Could not assign backing file '{name}' with format 'raw': Invalid argument")
    );
    // 512 bytes less header, format extension and end mark.
    let small = "size=1M,cluster_size=512,backing_fmt=raw,backing_file";
    assert!(create(&format!("{small}={}", &name[..376])).await.is_ok());
    assert_eq!(
        refusal(&format!("{small}={}", &name[..377])).await,
        format!(
            "Could not assign backing file '{}' with format 'raw': No space left on device",
            &name[..377]
        )
    );
    let format = "f".repeat(16);
    assert_eq!(
        refusal(&format!("size=1M,backing_file=b,backing_fmt={format}")).await,
        format!("Parameter 'backing-fmt' does not accept value '{format}'")
    );
}
