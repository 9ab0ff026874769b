// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`SlotChange`]: putting a password into a key slot, and erasing slots, as `amend` asks for it. Called by `driver`, and by qcow2 for options below `encrypt.`.
//!
//! What would lock everybody out for good is refused unless it is forced. A slot that is overwritten by force has its new password in another slot first, so that
//! there is no moment at which neither the old nor the new one opens the volume.

use std::time::Duration;

use blockcore::{BlockError, Options, Result, Secret, Secrets};

use crate::create_options::ITER_TIME_MS;
use crate::header::{Header, SLOTS};
use crate::volume::{HeaderStore, MasterKey};

/// What is to happen to key slots. Secrets are their ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotChange {
    /// A new password.
    Activate {
        /// The password.
        new_secret: String,
        /// `None`: the first that is free.
        slot: Option<usize>,
        /// How long it is to take to try the password.
        iter_time: Duration,
    },
    /// Slots lose their passwords.
    Erase {
        /// The password of the slots that are erased, all of them if no slot is given.
        old_secret: Option<String>,
        /// The slot.
        slot: Option<usize>,
    },
}

fn invalid<T>(text: impl Into<String>) -> Result<T> {
    Err(BlockError::invalid(text))
}

impl SlotChange {
    /// Takes the options `state`, `new-secret`, `old-secret`, `keyslot` and `iter-time`.
    ///
    /// # Errors
    /// `InvalidArgument` for options that don't fit together.
    pub fn take(options: &mut Options) -> Result<SlotChange> {
        let new_secret = options.take_str("new-secret");
        let old_secret = options.take_str("old-secret");
        let slot = options.take_number("keyslot")?;
        let slot = slot.map(|n| usize::try_from(n).unwrap_or(usize::MAX));
        let iter_time = options.take_number("iter-time")?;
        match options.take_str("state").as_deref() {
            None => invalid("Parameter 'state' is missing"),
            Some("active") => {
                let Some(new_secret) = new_secret else {
                    return invalid("'new-secret' is required to activate a keyslot");
                };
                if old_secret.is_some() {
                    return invalid("'old-secret' must not be given when activating keyslots");
                }
                let iter_time = Duration::from_millis(iter_time.unwrap_or(ITER_TIME_MS));
                Ok(SlotChange::Activate {
                    new_secret,
                    slot,
                    iter_time,
                })
            }
            Some("inactive") => {
                if new_secret.is_some() {
                    return invalid("'new-secret' must not be given when erasing keyslots");
                }
                if iter_time.is_some() {
                    return invalid("'iter-time' must not be given when erasing keyslots");
                }
                Ok(SlotChange::Erase { old_secret, slot })
            }
            Some(other) => invalid(format!("Parameter 'state' does not accept value '{other}'")),
        }
    }

    /// Changes a volume. With `force` also what nobody can take back: erasing the last password, overwriting one.
    ///
    /// *If the future is dropped*, or an error ends it: every slot that the change is not about is as it was.
    ///
    /// # Errors
    /// `InvalidArgument` for what can't be done; `NotFound` for secrets that are none; the store's.
    pub async fn apply(
        self,
        header: &mut Header,
        store: &dyn HeaderStore,
        key: &MasterKey,
        secrets: &Secrets,
        force: bool,
    ) -> Result<()> {
        match self {
            SlotChange::Activate {
                new_secret,
                slot,
                iter_time,
            } => {
                let slot = slot_to_activate(header, slot, force)?;
                let password = secrets.password(&new_secret)?;
                activate(header, store, key, slot, password, iter_time).await
            }
            SlotChange::Erase { old_secret, slot } => {
                let password = old_secret.map(|id| secrets.password(&id)).transpose()?;
                for slot in slots_to_erase(header, store, password, slot, force).await? {
                    header.erase_slot(store, slot).await?;
                }
                Ok(())
            }
        }
    }
}

fn check_range(slot: usize) -> Result<usize> {
    if slot < SLOTS {
        return Ok(slot);
    }
    invalid(format!(
        "Invalid keyslot {slot} specified, must be between 0 and {}",
        SLOTS - 1
    ))
}

fn free_slot(header: &Header) -> Option<usize> {
    header.slots.iter().position(|s| !s.active)
}

fn slot_to_activate(header: &Header, slot: Option<usize>, force: bool) -> Result<usize> {
    let Some(slot) = slot else {
        let text = "Can't add a keyslot - all keyslots are in use";
        return free_slot(header).ok_or_else(|| BlockError::invalid(text));
    };
    if header.slots[check_range(slot)?].active && !force {
        return invalid(format!(
            "Refusing to overwrite active keyslot {slot} - please erase it first"
        ));
    }
    Ok(slot)
}

async fn activate(
    header: &mut Header,
    store: &dyn HeaderStore,
    key: &MasterKey,
    slot: usize,
    password: Secret,
    iter_time: Duration,
) -> Result<()> {
    if !header.slots[slot].active {
        return header.add_slot(store, slot, key, password, iter_time).await;
    }
    // If all others are in use, they open the volume meanwhile.
    let spare = free_slot(header);
    if let Some(spare) = spare {
        let password = password.clone();
        header
            .add_slot(store, spare, key, password, iter_time)
            .await?;
    }
    header.erase_slot(store, slot).await?;
    header
        .add_slot(store, slot, key, password, iter_time)
        .await?;
    match spare {
        Some(spare) => header.erase_slot(store, spare).await,
        None => Ok(()),
    }
}

async fn slots_to_erase(
    header: &Header,
    store: &dyn HeaderStore,
    password: Option<Secret>,
    slot: Option<usize>,
    force: bool,
) -> Result<Vec<usize>> {
    let active = header.slots.iter().filter(|s| s.active).count();
    match (slot, password) {
        (Some(slot), password) => {
            let slot = check_range(slot)?;
            if let Some(password) = password
                && header.unlock_slot(store, slot, &password).await?.is_none()
            {
                return invalid(format!(
                    "Given keyslot {slot} doesn't contain the given old password for erase operation"
                ));
            }
            if !header.slots[slot].active && !force {
                return invalid(format!(
                    "Given keyslot {slot} is already erased (inactive) "
                ));
            }
            if active == 1 && !force {
                return invalid(format!(
                    "Attempt to erase the only active keyslot {slot} which will erase all the data in the image irreversibly - refusing operation"
                ));
            }
            Ok(vec![slot])
        }
        (None, Some(password)) => {
            let mut found = Vec::new();
            for slot in 0..SLOTS {
                if header.unlock_slot(store, slot, &password).await?.is_some() {
                    found.push(slot);
                }
            }
            if found.is_empty() {
                return invalid("No keyslots match given (old) password for erase operation");
            }
            if found.len() == active && !force {
                return invalid(
                    "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image irreversibly - refusing operation",
                );
            }
            Ok(found)
        }
        (None, None) => invalid(
            "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given",
        ),
    }
}

#[cfg(test)]
mod tests;
