// SPDX-License-Identifier: MIT OR Apache-2.0
//! Encryption of guest data: LUKS, with its header in the image, and the old AES method. Called by `open`, `read`, `write` and `create`.
//!
//! Data clusters are encrypted, sector by sector; metadata is not, nor are compressed clusters, and so this writer makes none in encrypted images. With LUKS
//! a sector's number is that of its *host* offset, so that what is copied to another cluster is another ciphertext; with the old method that of its guest offset.
//!
//! INV QCOW2-CRYPT-1: data goes out through [`Image::encrypt`] and comes in through [`Image::decrypt`]. Zeroes of the host are noise to a reader, so nothing is left out that has to read as zero: COW writes all of a cluster, and preallocated clusters are
//! zero clusters.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use blockcore::{
    BlockError, ErrorKind, IoBuf, IoBufMut, OpenContext, Options, ReadFlags, Registry, Result,
    SECTOR_BYTES, Secret, Secrets,
};
use luks::{
    HeaderStore, MadeVolume, MasterKey, NewVolume, Payload, SectorCipher, SlotChange, Unlocked,
};
use serde_json::{Map, Value};

use crate::check;
use crate::extension::{self, Extension};
use crate::header::Header;
use crate::image::{Image, Owner};

/// The field `crypt_method` of a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CryptMethod {
    /// Nothing is encrypted.
    None,
    /// AES-128 with the password as the key.
    Aes,
    /// LUKS, with its header in the image.
    Luks,
}

impl CryptMethod {
    /// The method of a number in a header.
    pub fn from_number(number: u32) -> Option<CryptMethod> {
        Some(match number {
            0 => CryptMethod::None,
            1 => CryptMethod::Aes,
            2 => CryptMethod::Luks,
            _ => return None,
        })
    }

    /// Its number in a header.
    pub fn number(self) -> u32 {
        match self {
            CryptMethod::None => 0,
            CryptMethod::Aes => 1,
            CryptMethod::Luks => 2,
        }
    }

    /// Its name in options; `None` where nothing is encrypted.
    pub fn name(self) -> Option<&'static str> {
        match self {
            CryptMethod::None => None,
            CryptMethod::Aes => Some("aes"),
            CryptMethod::Luks => Some("luks"),
        }
    }
}

/// How the guest data of an open image is encrypted.
#[derive(Debug)]
pub(crate) struct Crypto {
    method: CryptMethod,
    /// The LUKS header.
    header: Option<Mutex<luks::Header>>,
    /// `None`: opened to be looked at, without a password.
    cipher: Option<Arc<SectorCipher>>,
    /// The key that the LUKS header has for passwords.
    key: Option<MasterKey>,
    /// Where `amend` finds new passwords.
    secrets: Secrets,
}

fn no_key() -> BlockError {
    BlockError::invalid("Parameter 'encrypt.key-secret' is required for cipher")
}

fn without_key() -> BlockError {
    let text = "The image was opened without its key";
    BlockError::new(ErrorKind::PermissionDenied, text)
}

fn password(registry: &Registry, key: Option<&str>) -> Result<Secret> {
    let id = key.ok_or_else(no_key)?;
    registry.secrets().password(id)
}

/// Refuses another format than that of the image.
fn check_format(format: Option<String>, method: CryptMethod) -> Result<()> {
    match (format, method.name()) {
        (Some(format), None) => Err(BlockError::invalid(format!(
            "No encryption in image header, but options specified format '{format}'"
        ))),
        (Some(format), Some(name)) if format != name => Err(BlockError::invalid(format!(
            "Header reported '{name}' encryption format but options specify '{format}'"
        ))),
        _ => Ok(()),
    }
}

/// Takes what a reopening may say of encryption without changing anything: the format, and of an image that isn't encrypted whatever it likes.
///
/// # Errors
/// `InvalidArgument` for another format than that of the image.
pub(crate) fn check_reopen(options: &mut Options, method: CryptMethod) -> Result<()> {
    check_format(options.take_str("encrypt.format"), method)?;
    if method == CryptMethod::None {
        options.take_subtree("encrypt");
    }
    Ok(())
}

impl Crypto {
    /// Finds out how an image is encrypted, and unlocks it with the password that the options below `encrypt.` name, unless it is only looked at.
    ///
    /// # Errors
    /// `InvalidArgument` for options that don't fit the image, `PermissionDenied` for a wrong password; those of reading and checking the LUKS header.
    pub async fn open(
        ctx: &OpenContext<'_>,
        mut options: Options,
        image: &Image,
    ) -> Result<Option<Crypto>> {
        let method = image.header().crypt_method;
        check_format(options.take_str("format"), method)?;
        if method == CryptMethod::None {
            // Other options are of no use, and no harm.
            return Ok(None);
        }
        let key = options.take_str("key-secret");
        if let Some(other) = options.keys().next() {
            let text = format!("Parameter '{other}' is unexpected");
            return Err(BlockError::invalid(text));
        }
        let mut crypto = Crypto {
            secrets: ctx.registry().secrets().clone(),
            ..Crypto::locked(method)
        };
        if method == CryptMethod::Luks {
            let region = HeaderRegion::of(image)?;
            let header = luks::Header::read(&region, Payload::Behind).await?;
            crypto.header = Some(Mutex::new(header));
        }
        if !ctx.no_io() {
            let password = password(ctx.registry(), key.as_deref())?;
            crypto.unlock(image, &password).await?;
        }
        Ok(Some(crypto))
    }

    /// For an image that is being made: nothing of the guest is written to it yet.
    pub fn without_key(method: CryptMethod) -> Option<Crypto> {
        method.name().map(|_| Crypto::locked(method))
    }

    fn locked(method: CryptMethod) -> Crypto {
        Crypto {
            method,
            header: None,
            cipher: None,
            key: None,
            secrets: Secrets::new(),
        }
    }

    /// The LUKS header as it is now.
    fn header(&self) -> Option<luks::Header> {
        let header = self.header.as_ref()?.lock();
        Some(
            header
                .expect("no code panics while it holds this lock")
                .clone(),
        )
    }

    /// With a key that no password was needed for.
    #[cfg(test)]
    pub fn with_cipher(self, cipher: SectorCipher) -> Crypto {
        Crypto {
            cipher: Some(Arc::new(cipher)),
            ..self
        }
    }

    async fn unlock(&mut self, image: &Image, password: &Secret) -> Result<()> {
        let cipher = match self.header() {
            Some(header) => {
                let region = HeaderRegion::of(image)?;
                let (_slot, key) = header.unlock(&region, password).await?;
                let unlocked = Unlocked::new(&header, key)?;
                self.key = Some(unlocked.key);
                unlocked.cipher
            }
            None => Arc::new(SectorCipher::legacy(password)?),
        };
        self.cipher = Some(cipher);
        Ok(())
    }

    /// What the tools show of it.
    pub fn info(&self) -> Map<String, Value> {
        match (self.header(), self.method.name()) {
            (Some(header), name) => luks::header_info(&header, name),
            (None, name) => [("format".to_owned(), name.into())].into_iter().collect(),
        }
    }

    fn cipher(&self) -> Result<&Arc<SectorCipher>> {
        self.cipher.as_ref().ok_or_else(without_key)
    }

    /// The number of the first sector of `bytes` bytes that lie at a guest and a host offset.
    fn sector(&self, guest: u64, host: u64, bytes: usize) -> Result<u64> {
        let offset = match self.method {
            CryptMethod::Luks => host,
            _ => guest,
        };
        if !(offset | bytes as u64).is_multiple_of(SECTOR_BYTES) {
            // Only the VM state area is reached past the request path, which aligns requests.
            let text = "Encrypted data can only be read and written in whole sectors";
            return Err(BlockError::unsupported(text));
        }
        Ok(offset / SECTOR_BYTES)
    }
}

impl Image {
    /// Whether guest data is encrypted.
    pub fn is_encrypted(&self) -> bool {
        self.crypto.is_some()
    }

    /// What has to be written to a host offset so that a guest offset reads as `data`: a copy of it, or, where nothing is encrypted, `data` itself.
    ///
    /// # Errors
    /// `PermissionDenied` where there is no key; `Unsupported` for parts of sectors; `Cancelled` if the runtime ends.
    pub async fn encrypt(&self, guest: u64, host: u64, data: IoBuf) -> Result<IoBuf> {
        let Some(crypto) = &self.crypto else {
            return Ok(data);
        };
        let sector = crypto.sector(guest, host, data.len())?;
        crypto.cipher()?.encrypt_buf(sector, data).await
    }

    /// What a guest offset reads as where a host offset holds `data`.
    ///
    /// # Errors
    /// As [`encrypt`](Image::encrypt).
    pub async fn decrypt(&self, guest: u64, host: u64, data: IoBufMut) -> Result<IoBufMut> {
        let Some(crypto) = &self.crypto else {
            return Ok(data);
        };
        let sector = crypto.sector(guest, host, data.len())?;
        crypto.cipher()?.decrypt_buf(sector, data).await
    }

    /// As [`decrypt`](Image::decrypt), with `read` to fetch what the host offset holds, if that takes no time worth mentioning: `inline` is how many bytes may
    /// still be decrypted on the spot, in all pieces of one request.
    pub fn decrypt_nowait(
        &self,
        guest: u64,
        host: u64,
        data: &mut [u8],
        inline: &mut usize,
        read: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        let Some(crypto) = &self.crypto else {
            return read(data);
        };
        let sector = crypto.sector(guest, host, data.len());
        let left = inline.checked_sub(data.len());
        match (sector, &crypto.cipher, left) {
            (Ok(sector), Some(cipher), Some(left)) if read(data) => {
                *inline = left;
                cipher.decrypt(sector, data);
                true
            }
            _ => false,
        }
    }
}

/// The region of an image in which its LUKS header lies.
pub(crate) struct HeaderRegion<'a> {
    image: &'a Image,
    offset: u64,
    bytes: u64,
}

impl<'a> HeaderRegion<'a> {
    /// # Errors
    /// `InvalidImage` where the header extension makes no sense.
    pub fn of(image: &'a Image) -> Result<HeaderRegion<'a>> {
        let place = check::encryption_header(&image.header())?;
        let missing = || {
            let text = "Missing CRYPTO header for crypt method 2";
            BlockError::new(ErrorKind::InvalidImage, text)
        };
        let (offset, bytes) = place.ok_or_else(missing)?;
        Ok(HeaderRegion {
            image,
            offset,
            bytes,
        })
    }

    fn place(&self, offset: u64, bytes: usize) -> Result<u64> {
        let end = offset.checked_add(bytes as u64);
        let at = self.offset.checked_add(offset);
        match (end, at) {
            (Some(end), Some(at)) if end <= self.bytes => Ok(at),
            _ => {
                let text = "Request for data outside of extension header";
                Err(BlockError::new(ErrorKind::InvalidImage, text))
            }
        }
    }
}

#[async_trait]
impl HeaderStore for HeaderRegion<'_> {
    async fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>> {
        let at = self.place(offset, bytes)?;
        let buf = IoBufMut::zeroed(bytes);
        let read = self.image.file.preadv(at, buf, ReadFlags::empty()).await;
        let read = read.map_err(|e| e.context("Could not read encryption header"))?;
        Ok(read.to_vec())
    }

    async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        let at = self.place(offset, bytes.len())?;
        let owner = Owner::EncryptionHeader;
        self.image.write_metadata(owner, at, bytes).await
    }

    async fn flush(&self) -> Result<()> {
        self.image.file.flush().await
    }
}

impl Header {
    /// Says that guest data is encrypted. Where the LUKS header lies is filled in later: [`set_encryption_header`](Header::set_encryption_header).
    pub(crate) fn set_crypt_method(&mut self, method: CryptMethod) {
        self.crypt_method = method;
        if method == CryptMethod::Luks {
            let pointer = Extension {
                kind: extension::ENCRYPTION,
                data: vec![0; 16],
            };
            self.insert_before_feature_names(pointer);
        }
    }

    /// Says where the LUKS header lies, in an image that has none yet.
    fn set_encryption_header(&mut self, offset: u64, bytes: u64) {
        let pointer = self
            .extensions
            .iter_mut()
            .find(|e| e.kind == extension::ENCRYPTION);
        if let Some(pointer) = pointer {
            pointer.data = [offset.to_be_bytes(), bytes.to_be_bytes()].concat();
        }
    }

    /// Checks that the method and the extension that names the LUKS header fit each other.
    ///
    /// # Errors
    /// `InvalidImage`.
    pub(crate) fn check_encryption(&self) -> Result<()> {
        let text = match (check::encryption_header(self)?, self.crypt_method) {
            (None, CryptMethod::Luks) => "Missing CRYPTO header for crypt method 2",
            (Some(_), CryptMethod::None | CryptMethod::Aes) => {
                "CRYPTO header extension only expected with LUKS encryption method"
            }
            _ => return Ok(()),
        };
        Err(BlockError::new(ErrorKind::InvalidImage, text))
    }
}

/// How a new image is to be encrypted.
#[derive(Debug)]
pub(crate) enum NewCrypto {
    Aes {
        key: Option<String>,
    },
    Luks {
        key: Option<String>,
        volume: NewVolume,
    },
}

impl NewCrypto {
    /// Takes the options `encryption` and those below `encrypt.`.
    ///
    /// # Errors
    /// `InvalidArgument` for what makes no sense, in QEMU's words.
    pub fn take(options: &mut Options) -> Result<Option<NewCrypto>> {
        let is_legacy = options.take_bool("encryption")?.unwrap_or(false);
        let mut own = options.take_subtree("encrypt");
        if own.is_empty() && !is_legacy {
            return Ok(None);
        }
        let format = match own.take_str("format") {
            Some(_) if is_legacy => {
                let text =
                    "'encrypt.format' and its alias 'encryption' can't be used at the same time";
                return Err(BlockError::invalid(text));
            }
            Some(format) => format,
            None if is_legacy => "aes".to_owned(),
            None => {
                let text = "Parameter 'encrypt.format' is missing";
                return Err(BlockError::invalid(text));
            }
        };
        let key = own.take_str("key-secret");
        let crypto = match format.as_str() {
            "aes" => NewCrypto::Aes { key },
            "luks" => {
                let volume = NewVolume::take(&mut own)?;
                NewCrypto::Luks { key, volume }
            }
            other => {
                let text = format!("Parameter 'format' does not accept value '{other}'");
                return Err(BlockError::invalid(text));
            }
        };
        match own.keys().next() {
            None => Ok(Some(crypto)),
            Some(other) => {
                let text = format!("Parameter 'encrypt.{other}' is unexpected");
                Err(BlockError::invalid(text))
            }
        }
    }

    pub fn method(&self) -> CryptMethod {
        match self {
            NewCrypto::Aes { .. } => CryptMethod::Aes,
            NewCrypto::Luks { .. } => CryptMethod::Luks,
        }
    }

    /// Looks for the secret, and makes a LUKS volume if there is to be one.
    ///
    /// # Errors
    /// `NotFound`, `InvalidArgument` for the secret; as [`NewVolume::make`].
    pub async fn make(self, registry: &Registry) -> Result<Option<MadeVolume>> {
        match self {
            NewCrypto::Aes { key } => password(registry, key.as_deref()).map(|_| None),
            NewCrypto::Luks { key, volume } => {
                let password = password(registry, key.as_deref())?;
                volume.make(password).await.map(Some)
            }
        }
    }
}

/// What `amend` is to do with passwords, out of the options below `encrypt.`.
///
/// # Errors
/// `InvalidArgument` for options that make no sense, or for an image that has no passwords of this kind.
pub(crate) fn take_slot_change(
    options: &mut Options,
    method: CryptMethod,
) -> Result<Option<SlotChange>> {
    let mut own = options.take_subtree("encrypt");
    if own.is_empty() {
        return Ok(None);
    }
    match method {
        CryptMethod::Luks => SlotChange::take(&mut own).map(Some),
        CryptMethod::Aes => Err(BlockError::invalid(
            "Only LUKS encryption options can be amended",
        )),
        CryptMethod::None => Err(BlockError::invalid(
            "Can't amend encryption options - encryption not present",
        )),
    }
}

impl Image {
    /// Adds or erases passwords. That is durable at once, whatever becomes of other changes.
    ///
    /// # Errors
    /// As [`SlotChange::apply`].
    pub(crate) async fn change_slots(&self, change: SlotChange, force: bool) -> Result<()> {
        let crypto = self.crypto.as_ref().ok_or_else(without_key)?;
        let (Some(mut header), Some(key)) = (crypto.header(), &crypto.key) else {
            return Err(without_key());
        };
        let region = HeaderRegion::of(self)?;
        let changed = change.apply(&mut header, &region, key, &crypto.secrets, force);
        let changed = changed.await;
        if let Some(known) = &crypto.header {
            *known
                .lock()
                .expect("no code panics while it holds this lock") = header;
        }
        changed
    }

    /// Says where the LUKS header is, so that nothing is written over the keys.
    ///
    /// # Errors
    /// `Corrupt` for one that reaches past the end of the file: a forged length must not make this long.
    pub(crate) fn own_encryption_header(&self, header: &Header) -> Result<()> {
        let Some((offset, bytes)) = check::encryption_header(header)? else {
            return Ok(());
        };
        let file_end = self.file.length().next_multiple_of(self.cluster_size());
        // A new image has none yet.
        if bytes > 0 && offset.checked_add(bytes).is_none_or(|end| end > file_end) {
            let text = "The encryption header reaches past the end of the file";
            return Err(BlockError::corrupt(text));
        }
        self.own(offset, bytes, Owner::EncryptionHeader);
        Ok(())
    }

    /// Writes the LUKS header of a new image to new clusters, and names it in the image's header.
    ///
    /// # Errors
    /// Those of the file; `NoSpace`.
    pub(crate) async fn write_encryption_header(
        self: &Arc<Self>,
        volume: &MadeVolume,
    ) -> Result<()> {
        let bytes = volume.header.payload_offset;
        let clusters = bytes.div_ceil(self.cluster_size());
        let run = self
            .alloc_run(&mut *self.meta.lock().await, clusters)
            .await?;
        let host = run.cluster << self.cluster_bits;
        let whole = clusters << self.cluster_bits;
        self.own(host, whole, Owner::EncryptionHeader);
        let mut data = volume.bytes.clone();
        data.resize(whole as usize, 0);
        self.write_metadata(Owner::EncryptionHeader, host, data)
            .await?;
        self.commit().await?;
        self.header().set_encryption_header(host, bytes);
        let header = self.header().encode()?;
        self.write_metadata(Owner::Header, 0, header).await
    }
}
