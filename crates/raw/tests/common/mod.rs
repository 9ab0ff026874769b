// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the tests of this crate share.
#![allow(dead_code)]

use std::path::PathBuf;

use blockcore::{Backend, OpenOptions, Options, Registry};

pub fn registry() -> Registry {
    let mut registry = Registry::new();
    registry.register(raw::FileFactory);
    registry.register(raw::HostDeviceFactory);
    registry.register(raw::RawFactory);
    registry
}

/// A directory with a file `disk.img` of `size` in it.
pub struct Disk {
    pub dir: tempfile::TempDir,
    pub path: PathBuf,
}

impl Disk {
    pub async fn create(size: &str) -> Disk {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.img");
        let options = Options::new().with("size", size);
        registry()
            .create("raw", path.to_str().unwrap(), options, Default::default())
            .await
            .unwrap();
        Disk { dir, path }
    }

    pub fn name(&self) -> &str {
        self.path.to_str().unwrap()
    }

    pub async fn open(&self, options: OpenOptions) -> Backend {
        options
            .format("raw")
            .open(&registry(), self.name())
            .await
            .unwrap()
    }
}

/// `qemu-io`, if it is installed and its locks work; says so where not.
pub fn qemu_io() -> Option<std::process::Command> {
    let found = std::process::Command::new("qemu-io")
        .arg("--version")
        .output()
        .is_ok();
    if !found {
        eprintln!("skipped: no qemu-io here");
        return None;
    }
    Some(std::process::Command::new("qemu-io"))
}
