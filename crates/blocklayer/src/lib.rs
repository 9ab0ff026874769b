// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an application depends on: the standard drivers in one [`registry()`], and the block layer's interface.
//!
//! Drivers are feature flags (`raw`, `qcow2`, `luks`, `filters`; all on by default), so that a program carries only what it uses.

pub use blockcore::*;

#[cfg(feature = "jobs")]
pub use blockjob as job;
#[cfg(feature = "filters")]
pub use filters;
#[cfg(feature = "luks")]
pub use luks;
#[cfg(feature = "qcow2")]
pub use qcow2;
#[cfg(feature = "raw")]
pub use raw;

/// A registry with the drivers that this build has.
pub fn registry() -> Registry {
    #[allow(unused_mut)]
    let mut registry = Registry::new();
    #[cfg(feature = "raw")]
    {
        registry.register(raw::FileFactory);
        registry.register(raw::HostDeviceFactory);
        registry.register(raw::RawFactory);
    }
    #[cfg(feature = "qcow2")]
    registry.register(qcow2::Qcow2Factory);
    #[cfg(feature = "luks")]
    registry.register(luks::LuksFactory);
    #[cfg(feature = "filters")]
    {
        registry.register(filters::NullFactory::CO);
        registry.register(filters::NullFactory::AIO);
    }
    registry
}
