// SPDX-License-Identifier: MIT OR Apache-2.0
//! LUKS1: a header with a master key behind passwords, and sectors encrypted with it. A library that other formats use, and an image format of its own.
//!
//! Reading order: `algorithm` (names and what goes together), `block_cipher`, `modes`, `iv`, `sector` (what requests call), `hash` (PBKDF2), `af`, `header` (what
//! is on disk), `volume` (passwords), `slot_change`; then the format: `factory`, `driver`, `store`, `info`, `create_options`; apart from these: `secret_object`.
//!
//! ```
//! use luks::{CipherAlg, CipherMode, CipherSpec, IvGen, SectorCipher};
//! let spec = CipherSpec {
//!     alg: CipherAlg::Aes256,
//!     mode: CipherMode::Xts,
//!     iv_gen: IvGen::Plain64,
//!     iv_hash: None,
//! };
//! let cipher = SectorCipher::new(&spec, &[42; 64])?;
//! let mut sector = [0; 512];
//! cipher.encrypt(7, &mut sector);
//! assert_ne!(sector, [0; 512]);
//! cipher.decrypt(7, &mut sector);
//! assert_eq!(sector, [0; 512]);
//! # Ok::<(), blockcore::BlockError>(())
//! ```

mod af;
mod algorithm;
mod block_cipher;
mod create_options;
mod driver;
mod factory;
mod hash;
mod header;
mod info;
mod iv;
mod modes;
mod random;
pub mod secret_object;
mod sector;
mod slot_change;
mod store;
mod volume;

pub use algorithm::{CipherAlg, CipherMode, CipherSpec, HashAlg, IvGen};
pub use driver::LuksDriver;
pub use factory::LuksFactory;
pub use header::{HEADER_BYTES, Header, KeySlot, Payload, SLOTS};
pub use info::header_info;
pub use sector::{INLINE_BYTES_MAX, SECTOR_BYTES, SectorCipher};
pub use slot_change::SlotChange;
pub use volume::{HeaderStore, MadeVolume, MasterKey, NewVolume, Unlocked};
