// SPDX-License-Identifier: MIT OR Apache-2.0
//! The [`Registry`] of drivers (and secrets) that a program works with, and [`Diagnostics`]: where warnings go that are no errors.

use std::fmt;
use std::sync::Arc;

use crate::blocking;
use crate::driver::DriverFactory;
use crate::error::{BlockError, ErrorKind, Result};
use crate::name::protocol_of;
use crate::open::CreateContext;
use crate::options::Options;
use crate::secret::Secrets;

/// Where warnings go that are no errors: lines for people, without a program's name, which a program may put in front of those that begin with `warning: `.
#[derive(Clone)]
pub struct Diagnostics(Arc<dyn Fn(&str) + Send + Sync>);

impl Diagnostics {
    /// Sends every line to `sink`.
    pub fn new(sink: impl Fn(&str) + Send + Sync + 'static) -> Diagnostics {
        Diagnostics(Arc::new(sink))
    }

    /// Says a line.
    pub fn warn(&self, line: &str) {
        (self.0)(line);
    }
}

impl Default for Diagnostics {
    fn default() -> Diagnostics {
        Diagnostics::new(|line| tracing::warn!("{line}"))
    }
}

impl fmt::Debug for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Diagnostics")
    }
}

/// The drivers that a program works with, and the secrets that they may ask for. A value, not a global: two registries can differ.
#[derive(Clone, Default)]
pub struct Registry {
    drivers: Vec<Arc<dyn DriverFactory>>,
    secrets: Secrets,
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.drivers.iter().map(|d| d.format_name()))
            .finish()
    }
}

impl Registry {
    /// No drivers.
    pub fn new() -> Registry {
        Registry::default()
    }

    /// Adds a driver.
    pub fn register(&mut self, driver: impl DriverFactory) {
        self.drivers.push(Arc::new(driver));
    }

    /// Adds a driver that somebody else holds, too: a test's disks in memory, say.
    pub fn register_shared(&mut self, driver: Arc<dyn DriverFactory>) {
        self.drivers.push(driver);
    }

    /// The drivers, in the order they were added.
    pub fn drivers(&self) -> impl Iterator<Item = &Arc<dyn DriverFactory>> {
        self.drivers.iter()
    }

    /// The passwords and keys that options name by id. Clones of a registry share them.
    pub fn secrets(&self) -> &Secrets {
        &self.secrets
    }

    /// The same drivers with other secrets: for a program whose disks must not see each other's.
    pub fn with_secrets(mut self, secrets: Secrets) -> Registry {
        self.secrets = secrets;
        self
    }

    /// The driver of a name.
    ///
    /// # Errors
    /// `NotFound`: `Unknown driver 'x'`.
    pub fn driver(&self, name: &str) -> Result<&Arc<dyn DriverFactory>> {
        let unknown = || {
            BlockError::new(ErrorKind::NotFound, format!("Unknown driver '{name}'"))
                .errno_is(libc::EINVAL)
        };
        self.drivers
            .iter()
            .find(|d| d.format_name() == name)
            .ok_or_else(unknown)
    }

    /// As [`protocol_for`](Registry::protocol_for), with the look at the host on a thread that may wait.
    ///
    /// # Errors
    /// `NotFound`: `Unknown protocol 'x'`.
    pub async fn find_protocol(&self, filename: &str) -> Result<Arc<dyn DriverFactory>> {
        let (registry, filename) = (self.clone(), filename.to_owned());
        let look = move || registry.protocol_for(&filename).cloned();
        blocking::run(look).await?
    }

    /// The protocol driver that a file name belongs to. Looks at the host (is it a device?), and may wait for it.
    ///
    /// # Errors
    /// `NotFound`: `Unknown protocol 'x'`.
    pub fn protocol_for(&self, filename: &str) -> Result<&Arc<dyn DriverFactory>> {
        let best = self
            .drivers
            .iter()
            .filter(|d| d.probe_path(filename) > 0)
            .max_by_key(|d| d.probe_path(filename));
        match protocol_of(filename) {
            // A device whose path has a colon in it stays a device.
            Some(_) if best.is_some_and(|d| d.probe_path(filename) == 100) => {}
            Some(prefix) => {
                let unknown =
                    || BlockError::new(ErrorKind::NotFound, format!("Unknown protocol '{prefix}'"));
                return self
                    .drivers
                    .iter()
                    .find(|d| d.protocol_name() == Some(prefix))
                    .ok_or_else(unknown);
            }
            None => {}
        }
        best.ok_or_else(|| {
            BlockError::new(
                ErrorKind::NotFound,
                format!("No driver for file name '{filename}'"),
            )
        })
    }

    /// The format driver that recognises an image by its first bytes.
    pub fn probe(&self, head: &[u8]) -> Option<&Arc<dyn DriverFactory>> {
        let best = self.drivers.iter().max_by_key(|d| d.probe(head))?;
        (best.probe(head) > 0).then_some(best)
    }

    /// What a new image is made with.
    ///
    /// # Errors
    /// The driver's; `Unknown driver`.
    pub async fn create(
        &self,
        format: &str,
        filename: &str,
        options: Options,
        diagnostics: Diagnostics,
    ) -> Result<()> {
        let driver = self.driver(format)?.clone();
        driver
            .create(&CreateContext::new(self, diagnostics), filename, options)
            .await
    }
}
