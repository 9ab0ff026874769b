// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`OpenPolicy`]: what may be opened that the caller has not named. Names that come out of an image are somebody else's words.

use std::path::PathBuf;

use crate::blocking;
use crate::error::{BlockError, ErrorKind, Result};
use crate::name::protocol_of;
use crate::options::Options;

/// What may be opened that the caller has not named: backing files and data files that images name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum OpenPolicy {
    /// Nothing. An image that names one is refused, unless the caller names a replacement or says `backing=null`.
    #[default]
    Deny,
    /// Plain files that lie in or below this directory once all symbolic links are followed.
    Beneath(PathBuf),
    /// Anything that these drivers alone can open.
    Drivers(Vec<String>),
    /// Everything, as QEMU's tools do.
    Everything,
}

impl OpenPolicy {
    /// The name to open for one that an image gave: what `Beneath` has looked at is what is opened.
    ///
    /// # Errors
    /// `PermissionDenied`; those of looking at the file.
    pub(crate) async fn admit(&self, name: &str) -> Result<String> {
        let denied = |why: &str| {
            let text =
                format!("The image names '{name}', which the open policy does not allow: {why}");
            Err(BlockError::new(ErrorKind::PermissionDenied, text))
        };
        let dir = match self {
            OpenPolicy::Everything | OpenPolicy::Drivers(_) => return Ok(name.to_owned()),
            OpenPolicy::Deny => return denied("nothing that an image names is opened"),
            OpenPolicy::Beneath(dir) => dir.clone(),
        };
        if protocol_of(name).is_some() {
            return denied("only plain files are");
        }
        let path = PathBuf::from(name);
        let resolve = move || std::io::Result::Ok((dir.canonicalize()?, path.canonicalize()?));
        let (dir, path) = blocking::run(resolve)
            .await?
            .map_err(|e| BlockError::from_io(e).context(format!("Could not open '{name}'")))?;
        if !path.starts_with(&dir) {
            return denied(&format!("it does not lie in '{}'", dir.display()));
        }
        match path.to_str() {
            Some(path) => Ok(path.to_owned()),
            None => denied("its path is no valid text"),
        }
    }

    /// Refuses options that an image gave (in a `json:` name) and that ask for writing. The files that an image names are no business of its maker, and
    /// opening one for writing may change it already: feature bits, refcounts. No policy allows that.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub(crate) fn admit_options(&self, options: &Options) -> Result<()> {
        let is_mode = |key: &str| key == "read-only" || key.ends_with(".read-only");
        for (key, value) in options.iter().filter(|(key, _)| is_mode(key)) {
            if !["true", "on"].contains(&value.to_string().as_str()) {
                let text = format!(
                    "The image names something with the option '{key}={value}', but that is opened read-only"
                );
                return Err(BlockError::new(ErrorKind::PermissionDenied, text));
            }
        }
        Ok(())
    }

    /// Refuses a driver for something that an image named.
    ///
    /// # Errors
    /// `PermissionDenied`.
    pub(crate) fn admit_driver(&self, driver: &str) -> Result<()> {
        match self {
            OpenPolicy::Drivers(allowed) if !allowed.iter().any(|a| a == driver) => {
                let text = format!(
                    "An image names something for the driver '{driver}', which the open policy does not allow"
                );
                Err(BlockError::new(ErrorKind::PermissionDenied, text))
            }
            _ => Ok(()),
        }
    }
}
