// SPDX-License-Identifier: MIT OR Apache-2.0
//! Volumes: reading a header, unlocking it with a password, making a new one, adding and erasing passwords. Called by `driver` and qcow2, which say where
//! the header lies ([`HeaderStore`]).
//!
//! Keys are derived on the blocking pool, and that ends when the future is dropped. What has to be changed is written so that a power cut leaves every other
//! password as it was, and a half-made slot inactive.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blockcore::{BlockError, ErrorKind, Result, Secret, blocking};
use zeroize::Zeroizing;

use crate::af;
use crate::algorithm::{CipherSpec, HashAlg};
use crate::hash::Stopped;
use crate::header::{DIGEST_BYTES, HEADER_BYTES, Header, KeySlot, Payload, SLOTS, slot_offset};
use crate::random;
use crate::sector::SectorCipher;

/// The fewest rounds of PBKDF2 that a new slot or digest gets.
const ROUNDS_MIN: u64 = 1000;
/// The digest of the master key takes this part of the time of a slot: it is made for each slot that is tried.
const DIGEST_SHARE: u64 = 8;

/// Where a header and its key material lie: a file's beginning, a region of an image. Offsets count from the header's first byte.
#[async_trait]
pub trait HeaderStore: Send + Sync {
    /// Reads `bytes` bytes; what lies past the end of the file is zero.
    ///
    /// # Errors
    /// The file's; `InvalidImage` for what lies outside of the region.
    async fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>>;

    /// Writes.
    ///
    /// # Errors
    /// As [`read`](HeaderStore::read).
    async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<()>;

    /// Makes what was written durable.
    ///
    /// # Errors
    /// The file's.
    async fn flush(&self) -> Result<()>;
}

/// The key that sectors are encrypted with. It is wiped when it is dropped, and nothing prints it.
#[derive(Clone)]
pub struct MasterKey(Zeroizing<Vec<u8>>);

impl std::fmt::Debug for MasterKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("MasterKey")
    }
}

/// What a password has opened.
#[derive(Clone, Debug)]
pub struct Unlocked {
    /// The cipher of the payload.
    pub cipher: Arc<SectorCipher>,
    /// The key, which further passwords are to open.
    pub key: MasterKey,
}

impl Unlocked {
    /// The cipher of a key.
    ///
    /// # Errors
    /// As [`Header::cipher`].
    pub fn new(header: &Header, key: MasterKey) -> Result<Unlocked> {
        let cipher = Arc::new(header.cipher(&key)?);
        Ok(Unlocked { cipher, key })
    }
}

/// What a new volume is to be.
#[derive(Clone, Debug)]
pub struct NewVolume {
    /// How sectors are encrypted.
    pub spec: CipherSpec,
    /// The hash of PBKDF2 and of the splitter.
    pub hash: HashAlg,
    /// How long it is to take to try a password, on a machine like this.
    pub iter_time: Duration,
}

/// A new volume: its header, and what is to be written to the beginning of its place. Up to the payload's offset, the rest is zero.
#[derive(Clone, Debug)]
pub struct MadeVolume {
    /// The header.
    pub header: Header,
    /// Header and key material.
    pub bytes: Vec<u8>,
    /// The key.
    pub key: MasterKey,
}

impl NewVolume {
    /// Makes a volume with one password, in slot 0. Takes as long as `iter_time` says, and a little more.
    ///
    /// *If the future is dropped*: the work ends soon.
    ///
    /// # Errors
    /// `Unsupported`, `InvalidArgument` for combinations that make no sense; the host's, if it has no random bytes.
    pub async fn make(self, password: Secret) -> Result<MadeVolume> {
        self.spec.check()?;
        on_pool(move |stop| self.make_now(&password, stop)).await
    }

    fn make_now(&self, password: &Secret, stop: &AtomicBool) -> Work<MadeVolume> {
        let mut header = Header::new(self.spec, self.hash, random::array()?);
        let mut key = Zeroizing::new(vec![0; header.key_bytes()]);
        random::fill(&mut key)?;
        let key = MasterKey(key);
        let material = header.fill_slot(0, &key, password, self.iter_time, stop)?;
        header.slots[0].active = true;
        header.digest_salt = random::array()?;
        header.digest_iterations = rounds(self.hash, self.iter_time, DIGEST_BYTES, DIGEST_SHARE)?;
        header.digest = header.digest_of(&key, stop)?;
        let mut bytes = header.encode().to_vec();
        bytes.resize(header.slots[0].key_offset as usize, 0);
        bytes.extend(material);
        Ok(MadeVolume { header, bytes, key })
    }
}

/// How many rounds take `time`.
fn rounds(hash: HashAlg, time: Duration, key_bytes: usize, share: u64) -> Result<u32> {
    let rounds = hash.rounds_in(time, key_bytes) / share;
    u32::try_from(rounds.max(ROUNDS_MIN)).map_err(|_| {
        let text = format!("PBKDF iterations {rounds} larger than {}", u32::MAX);
        let range = BlockError::from_errno(libc::ERANGE);
        range.context(text)
    })
}

/// Why work on the pool has no result.
enum Halt {
    Stopped,
    Failed(BlockError),
}

type Work<T> = Result<T, Halt>;

impl From<Stopped> for Halt {
    fn from(_: Stopped) -> Halt {
        Halt::Stopped
    }
}

impl From<BlockError> for Halt {
    fn from(e: BlockError) -> Halt {
        Halt::Failed(e)
    }
}

/// Does work on the blocking pool, which looks at its argument to see whether anybody still wants it.
async fn on_pool<T: Send + 'static>(
    work: impl FnOnce(&AtomicBool) -> Work<T> + Send + 'static,
) -> Result<T> {
    struct StopOnDrop(Arc<AtomicBool>);
    impl Drop for StopOnDrop {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let stop = StopOnDrop(Arc::default());
    let looked_at = stop.0.clone();
    let done = blocking::run(move || work(&looked_at)).await?;
    done.map_err(|halt| match halt {
        Halt::Failed(e) => e,
        Halt::Stopped => BlockError::from_errno(libc::ECANCELED),
    })
}

impl Header {
    /// Reads and checks the header of a volume.
    ///
    /// # Errors
    /// As [`Header::parse`]; the store's.
    pub async fn read(store: &dyn HeaderStore, payload: Payload) -> Result<Header> {
        let bytes = store.read(0, HEADER_BYTES).await?;
        let Ok(bytes) = bytes.as_slice().try_into() else {
            let text = "The place of the LUKS header is shorter than a header";
            return Err(BlockError::new(ErrorKind::InvalidImage, text));
        };
        Header::parse(bytes, payload)
    }

    /// Tries a password with every active slot, and says the slot that it opened.
    ///
    /// *If the future is dropped*: the work ends soon.
    ///
    /// # Errors
    /// `PermissionDenied` if the password opens none; the store's.
    pub async fn unlock(
        &self,
        store: &dyn HeaderStore,
        password: &Secret,
    ) -> Result<(usize, MasterKey)> {
        for slot in 0..SLOTS {
            if let Some(key) = self.unlock_slot(store, slot, password).await? {
                return Ok((slot, key));
            }
        }
        let text = "Invalid password, cannot unlock any keyslot";
        Err(BlockError::new(ErrorKind::PermissionDenied, text).errno_is(libc::EPERM))
    }

    /// Tries a password with one slot.
    ///
    /// # Errors
    /// The store's.
    pub async fn unlock_slot(
        &self,
        store: &dyn HeaderStore,
        slot: usize,
        password: &Secret,
    ) -> Result<Option<MasterKey>> {
        if !self.slots[slot].active {
            return Ok(None);
        }
        let material = store
            .read(self.slots[slot].key_offset, self.material_bytes())
            .await?;
        let material = Zeroizing::new(material);
        let (header, password) = (self.clone(), password.clone());
        on_pool(move |stop| header.open_material(slot, material, &password, stop)).await
    }

    /// The cipher of the payload.
    ///
    /// # Errors
    /// `InvalidArgument` for a key of another volume that has another length.
    pub fn cipher(&self, key: &MasterKey) -> Result<SectorCipher> {
        SectorCipher::new(&self.spec, &key.0)
    }

    /// Puts a password into a slot that is not active.
    ///
    /// *If the future is dropped*: the slot is as it was, or inactive with other key material, or active.
    ///
    /// # Errors
    /// `InvalidArgument` for an active slot; the store's, and then the slot stays inactive.
    pub async fn add_slot(
        &mut self,
        store: &dyn HeaderStore,
        slot: usize,
        key: &MasterKey,
        password: Secret,
        iter_time: Duration,
    ) -> Result<()> {
        if self.slots[slot].active {
            return Err(BlockError::invalid(format!("Keyslot {slot} is in use")));
        }
        let (mut header, key) = (self.clone(), key.clone());
        let work = move |stop: &AtomicBool| {
            let material = header.fill_slot(slot, &key, &password, iter_time, stop)?;
            Ok((header, material))
        };
        let (mut header, material) = on_pool(work).await?;
        // INV LUKS-SLOT-1
        let filled = &header.slots[slot];
        store.write(filled.key_offset, material).await?;
        // The fields of a slot may lie in two sectors, and its state is in the first: it becomes active only when the others are there.
        store.write(slot_offset(slot), filled.encode()).await?;
        store.flush().await?;
        header.slots[slot].active = true;
        let active = header.slots[slot].encode();
        store.write(slot_offset(slot), active).await?;
        store.flush().await?;
        *self = header;
        Ok(())
    }

    /// Makes a slot's password useless, by destroying its key material. The caller has made sure that another slot can be opened.
    ///
    /// *If the future is dropped*: the slot is as it was, or its password is useless though it may be called active.
    ///
    /// # Errors
    /// The store's; as if the future were dropped.
    pub async fn erase_slot(&mut self, store: &dyn HeaderStore, slot: usize) -> Result<()> {
        // INV LUKS-SLOT-1
        let place = self.slots[slot].key_offset;
        // Twice, so that it is gone although the first may have been but a note in a journal.
        for _ in 0..2 {
            let mut noise = vec![0; self.material_bytes()];
            random::fill(&mut noise)?;
            store.write(place, noise).await?;
            store.flush().await?;
        }
        let erased = KeySlot {
            active: false,
            iterations: 0,
            salt: Default::default(),
            key_offset: place,
        };
        store.write(slot_offset(slot), erased.encode()).await?;
        store.flush().await?;
        self.slots[slot] = erased;
        Ok(())
    }

    /// What the master key is known by.
    fn digest_of(&self, key: &MasterKey, stop: &AtomicBool) -> Result<[u8; DIGEST_BYTES], Stopped> {
        let mut digest = [0; DIGEST_BYTES];
        let (salt, rounds) = (&self.digest_salt, self.digest_iterations);
        self.hash.pbkdf2(&key.0, salt, rounds, &mut digest, stop)?;
        Ok(digest)
    }

    /// The cipher of a slot's key material.
    fn slot_cipher(&self, slot: usize, password: &Secret, stop: &AtomicBool) -> Work<SectorCipher> {
        let mut key = Zeroizing::new(vec![0; self.key_bytes()]);
        let (salt, rounds) = (&self.slots[slot].salt, self.slots[slot].iterations);
        self.hash
            .pbkdf2(password.as_bytes(), salt, rounds, &mut key, stop)?;
        Ok(SectorCipher::new(&self.spec, &key)?)
    }

    /// The master key, if the password is that of the slot with this key material.
    fn open_material(
        &self,
        slot: usize,
        mut material: Zeroizing<Vec<u8>>,
        password: &Secret,
        stop: &AtomicBool,
    ) -> Work<Option<MasterKey>> {
        self.slot_cipher(slot, password, stop)?
            .decrypt(0, &mut material);
        let key = MasterKey(af::merge(self.hash, &material, self.key_bytes()));
        let digest = self.digest_of(&key, stop)?;
        // All of it is looked at, so that the time tells nothing.
        let differs = digest
            .iter()
            .zip(&self.digest)
            .fold(0, |d, (a, b)| d | (a ^ b));
        Ok((differs == 0).then_some(key))
    }

    /// Gives a slot salt and rounds, and makes its key material. The slot does not become active by that.
    fn fill_slot(
        &mut self,
        slot: usize,
        key: &MasterKey,
        password: &Secret,
        iter_time: Duration,
        stop: &AtomicBool,
    ) -> Work<Vec<u8>> {
        self.slots[slot].salt = random::array()?;
        self.slots[slot].iterations = rounds(self.hash, iter_time, self.key_bytes(), 1)?;
        let mut material = af::split(self.hash, &key.0, self.material_bytes())?;
        self.slot_cipher(slot, password, stop)?
            .encrypt(0, &mut material);
        // Encrypted, it is no secret any more.
        Ok(std::mem::take(&mut *material))
    }
}

#[cfg(test)]
pub(crate) mod tests;
