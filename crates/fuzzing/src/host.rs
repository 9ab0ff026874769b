// SPDX-License-Identifier: MIT OR Apache-2.0
//! Disks in memory, and images on them.

use std::time::Duration;

use blocklayer::testing::{MemoryDriver, MemoryFactory};
use blocklayer::{
    Backend, BlockError, Diagnostics, OpenOptions, OpenPolicy, OptionValue, Registry, Result,
    Secret, luks::LuksFactory, qcow2::Qcow2Factory,
};

/// The password of every encrypted image here.
pub const PASSWORD: &str = "the password";
/// The ids of that password, and of another one.
pub(crate) const SECRETS: [&str; 2] = ["key", "another"];

/// The room on the disk under an image, in bytes: forged offsets beyond it meet with ENOSPC, as on a host that is full.
pub(crate) const ROOM_BYTES: u64 = 8 << 20;
/// What a header may ask for to try a password is bounded by its field alone (four billion rounds). So long anybody waits here; then the image can't be opened.
const PATIENCE: Duration = Duration::from_millis(500);

/// The bit of the header's incompatible features that says that the guest's clusters lie in another file.
const DATA_FILE_BIT: u8 = 4;

/// Runs a future on this thread.
pub(crate) fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    runtime.expect("a runtime needs nothing").block_on(future)
}

/// An image, and the file of its data if it has one.
pub(crate) struct Host {
    registry: Registry,
    pub disk: MemoryDriver,
    pub data: MemoryDriver,
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum How {
    Writable,
    ReadOnly,
    /// To be checked, and nothing else.
    ForCheck,
    /// To be repaired, and nothing else.
    ForRepair,
}

impl Host {
    pub fn new(image: Vec<u8>, data: Vec<u8>) -> Host {
        let memory = std::sync::Arc::new(MemoryFactory::with_room(ROOM_BYTES));
        let (disk, other) = (memory.disk("image"), memory.disk("data"));
        *disk.lock() = image;
        *other.lock() = data;
        let mut registry = Registry::new();
        registry.register_shared(memory);
        registry.register(blocklayer::raw::RawFactory);
        registry.register(Qcow2Factory);
        registry.register(LuksFactory);
        for (id, password) in SECRETS.iter().zip([PASSWORD, "another password"]) {
            let added = registry.secrets().add(id, Secret::new(password.as_bytes()));
            added.expect("the id is new");
        }
        let data = other;
        Host {
            registry,
            disk,
            data,
        }
    }

    /// Opens the image with everything that it asks for.
    pub async fn open(&self, how: How) -> Result<Backend> {
        let (is_luks, features, method) = {
            let bytes = self.disk.lock();
            let byte = |at: usize| bytes.get(at).copied().unwrap_or(0);
            (
                bytes.starts_with(b"LUKS"),
                byte(79),
                (32..36).fold(0u32, |n, at| n << 8 | u32::from(byte(at))),
            )
        };
        let mut open = OpenOptions::new()
            .format(if is_luks { "luks" } else { "qcow2" })
            .read_only(matches!(how, How::ReadOnly | How::ForCheck))
            .for_check(matches!(how, How::ForCheck | How::ForRepair))
            .policy(OpenPolicy::Deny)
            .diagnostics(Diagnostics::new(|_| {}));
        if is_luks {
            open = open.option("key-secret", SECRETS[0]);
        } else {
            open = open.option("backing", OptionValue::Null);
            if method != 0 {
                open = open.option("encrypt.key-secret", SECRETS[0]);
            }
            if features & DATA_FILE_BIT != 0 {
                open = open.option("data-file.driver", "memory");
                open = open.option("data-file.filename", "data");
            }
        }
        let opened = open.open(&self.registry, "memory:image");
        if !is_luks && method == 0 {
            return opened.await;
        }
        let opened = tokio::time::timeout(PATIENCE, opened).await;
        opened.unwrap_or_else(|_| Err(BlockError::invalid("It takes too long to try a password")))
    }

    pub fn snapshot(&self) -> (Vec<u8>, Vec<u8>) {
        (self.disk.snapshot(), self.data.snapshot())
    }
}
