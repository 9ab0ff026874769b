// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Secrets`]: the passwords and keys that a program has, by id. Options name them (`key-secret=ID`), so that no option, name or message ever holds one.
//!
//! The [`Registry`](crate::Registry) carries them to whoever opens or creates. What they are good for is the drivers' business.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use zeroize::Zeroizing;

use crate::error::{BlockError, ErrorKind, Result};

/// The bytes of a password or key. They are wiped when the last clone is gone, and nothing prints them.
///
/// ```
/// let secret = blockcore::Secret::new(b"in the open".to_vec());
/// assert_eq!(format!("{secret:?}"), "Secret");
/// ```
#[derive(Clone)]
pub struct Secret(Arc<Zeroizing<Vec<u8>>>);

impl Secret {
    /// A secret of these bytes.
    pub fn new(bytes: impl Into<Vec<u8>>) -> Secret {
        Secret(Arc::new(Zeroizing::new(bytes.into())))
    }

    /// The bytes.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Secrets by id. Clones share them: what is added to one is there for all.
#[derive(Clone, Default)]
pub struct Secrets(Arc<RwLock<BTreeMap<String, Secret>>>);

impl Secrets {
    /// None.
    pub fn new() -> Secrets {
        Secrets::default()
    }

    /// Adds a secret.
    ///
    /// # Errors
    /// `InvalidArgument` if there is one of that id.
    pub fn add(&self, id: &str, secret: Secret) -> Result<()> {
        // A map that a panic left behind is whole: it is changed in one step.
        let mut map = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if map.contains_key(id) {
            // Objects are properties of a container, to those whose words these are.
            let text =
                format!("attempt to add duplicate property '{id}' to object (type 'container')");
            return Err(BlockError::invalid(text));
        }
        map.insert(id.to_owned(), secret);
        Ok(())
    }

    /// Takes a secret out again. Who has got it already keeps it.
    pub fn remove(&self, id: &str) -> Option<Secret> {
        let mut map = self.0.write().unwrap_or_else(PoisonError::into_inner);
        map.remove(id)
    }

    /// The secret of an id.
    ///
    /// # Errors
    /// `NotFound`: `No secret with id 'x'`.
    pub fn get(&self, id: &str) -> Result<Secret> {
        let map = self.0.read().unwrap_or_else(PoisonError::into_inner);
        map.get(id).cloned().ok_or_else(|| {
            BlockError::new(ErrorKind::NotFound, format!("No secret with id '{id}'"))
        })
    }

    /// The secret of an id, as a password: text without zero bytes.
    ///
    /// # Errors
    /// `NotFound`; `InvalidArgument` for one that is no text.
    pub fn password(&self, id: &str) -> Result<Secret> {
        let secret = self.get(id)?;
        let bytes = secret.as_bytes();
        if bytes.contains(&0) || std::str::from_utf8(bytes).is_err() {
            let text = format!("Data from secret {id} is not valid UTF-8");
            return Err(BlockError::invalid(text));
        }
        Ok(secret)
    }
}

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let map = self.0.read().unwrap_or_else(PoisonError::into_inner);
        f.debug_set().entries(map.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_prints_a_secret() {
        let secrets = Secrets::new();
        secrets.add("key0", Secret::new(*b"sesame")).unwrap();
        let again = secrets
            .add("key0", Secret::new(*b"open sesame"))
            .unwrap_err();
        let shown = format!("{secrets:?} {:?} {again:?} {again}", secrets.get("key0"));
        assert!(shown.contains("key0"), "{shown}");
        // Neither as text nor as numbers.
        assert!(
            !shown.contains("sesame") && !shown.contains("115"),
            "{shown}"
        );
    }

    #[test]
    fn a_password_is_text() {
        let secrets = Secrets::new();
        secrets.add("bytes", Secret::new(vec![0xff, 0xfe])).unwrap();
        secrets.add("zero", Secret::new(*b"a\0b")).unwrap();
        secrets.add("text", Secret::new("grün")).unwrap();
        assert!(secrets.get("bytes").is_ok());
        assert_eq!(
            secrets.password("bytes").unwrap_err().text(),
            "Data from secret bytes is not valid UTF-8"
        );
        assert!(secrets.password("zero").is_err());
        assert!(secrets.password("text").is_ok());
        assert_eq!(
            secrets.password("none").unwrap_err().text(),
            "No secret with id 'none'"
        );
    }

    #[test]
    fn clones_share_what_is_added_and_taken_out() {
        let secrets = Secrets::new();
        let other = secrets.clone();
        secrets.add("a", Secret::new(*b"x")).unwrap();
        assert_eq!(other.get("a").unwrap().as_bytes(), b"x");
        assert!(other.remove("a").is_some());
        assert!(secrets.get("a").is_err());
    }
}
