// SPDX-License-Identifier: MIT OR Apache-2.0
//! Passwords: any of the slots opens the volume, a wrong one opens none, and what is written on the way leaves the others alone, whatever part of it
//! reaches the disk.

use std::sync::Mutex;

use super::*;
use crate::algorithm::{CipherAlg, CipherMode, IvGen};

/// A write, or a flush.
pub(crate) type Step = Option<(u64, Vec<u8>)>;

/// A header in memory, with every write and flush that was made.
#[derive(Default)]
pub(crate) struct Memory {
    pub bytes: Mutex<Vec<u8>>,
    pub log: Mutex<Vec<Step>>,
}

fn put(bytes: &mut [u8], offset: u64, data: &[u8]) {
    bytes[offset as usize..offset as usize + data.len()].copy_from_slice(data);
}

#[async_trait]
impl HeaderStore for Memory {
    async fn read(&self, offset: u64, bytes: usize) -> Result<Vec<u8>> {
        let all = self.bytes.lock().unwrap();
        Ok(all[offset as usize..offset as usize + bytes].to_vec())
    }

    async fn write(&self, offset: u64, bytes: Vec<u8>) -> Result<()> {
        put(&mut self.bytes.lock().unwrap(), offset, &bytes);
        self.log.lock().unwrap().push(Some((offset, bytes)));
        Ok(())
    }

    async fn flush(&self) -> Result<()> {
        self.log.lock().unwrap().push(None);
        Ok(())
    }
}

const QUICK: Duration = Duration::from_millis(1);

pub(crate) fn spec(alg: CipherAlg, mode: CipherMode) -> CipherSpec {
    CipherSpec {
        alg,
        mode,
        iv_gen: IvGen::Plain64,
        iv_hash: None,
    }
}

fn password(text: &str) -> Secret {
    Secret::new(text)
}

pub(crate) async fn made(spec: CipherSpec, hash: HashAlg) -> (Memory, Header, MasterKey) {
    let new = NewVolume {
        spec,
        hash,
        iter_time: QUICK,
    };
    let made = new.make(password("first")).await.unwrap();
    let mut bytes = made.bytes;
    bytes.resize(made.header.payload_offset as usize, 0);
    let store = Memory {
        bytes: Mutex::new(bytes),
        ..Memory::default()
    };
    (store, made.header, made.key)
}

pub(crate) async fn opens(store: &Memory, text: &str) -> Option<usize> {
    let header = Header::read(store, Payload::Behind).await.unwrap();
    match header.unlock(store, &password(text)).await {
        Ok((slot, _)) => Some(slot),
        Err(e) => {
            assert_eq!(e.text(), "Invalid password, cannot unlock any keyslot");
            None
        }
    }
}

#[tokio::test]
async fn a_volume_is_opened_by_its_password_alone() {
    let combinations = [
        (CipherAlg::Aes256, CipherMode::Xts, HashAlg::Sha256),
        // 96,000 bytes of key material: no whole sectors.
        (CipherAlg::Aes192, CipherMode::Cbc, HashAlg::Sha1),
        (CipherAlg::Cast5, CipherMode::Ctr, HashAlg::Ripemd160),
        (CipherAlg::Serpent192, CipherMode::Xts, HashAlg::Sha512),
    ];
    for (alg, mode, hash) in combinations {
        let (store, header, key) = made(spec(alg, mode), hash).await;
        assert_eq!(Header::read(&store, Payload::Behind).await.unwrap(), header);
        let (slot, found) = header.unlock(&store, &password("first")).await.unwrap();
        assert_eq!((slot, &found.0), (0, &key.0));
        assert_eq!(opens(&store, "First").await, None);
        assert_eq!(opens(&store, "").await, None);
        assert!(header.digest_iterations >= 1000 && header.slots[0].iterations >= 1000);
    }
}

#[tokio::test]
async fn passwords_come_and_go() {
    let (store, mut header, key) =
        made(spec(CipherAlg::Aes128, CipherMode::Xts), HashAlg::Sha256).await;
    for slot in 1..SLOTS {
        let new = password(&format!("number {slot}"));
        let (store, key) = (&store as &dyn HeaderStore, &key);
        header.add_slot(store, slot, key, new, QUICK).await.unwrap();
    }
    for slot in 1..SLOTS {
        assert_eq!(opens(&store, &format!("number {slot}")).await, Some(slot));
    }
    let again = header.add_slot(&store, 3, &key, password("x"), QUICK).await;
    assert_eq!(again.unwrap_err().text(), "Keyslot 3 is in use");
    header.erase_slot(&store, 3).await.unwrap();
    assert_eq!(opens(&store, "number 3").await, None);
    assert_eq!(opens(&store, "number 6").await, Some(6));
    header
        .add_slot(&store, 3, &key, password("new"), QUICK)
        .await
        .unwrap();
    assert_eq!(opens(&store, "new").await, Some(3));
    assert_eq!(opens(&store, "first").await, Some(0));
}

/// Every state that a power cut can leave: what was flushed, and any part of each later write up to a sector boundary, in any order.
pub(crate) fn after_power_cuts(before: &[u8], log: &[Step]) -> Vec<Vec<u8>> {
    let mut states = Vec::new();
    let mut durable = before.to_vec();
    for step in log.split(Option::is_none) {
        let writes: Vec<_> = step.iter().flatten().collect();
        let sectors: Vec<(u64, &[u8])> = writes
            .iter()
            .flat_map(|(at, data)| pieces(*at, data))
            .collect();
        // All but one sector, and one sector alone.
        for lone in 0..sectors.len() {
            for only in [true, false] {
                let mut state = durable.clone();
                for (i, (at, data)) in sectors.iter().enumerate() {
                    if (i == lone) == only {
                        put(&mut state, *at, data);
                    }
                }
                // Key material is long: one of its sectors in fifty will do.
                if sectors.len() < 50 || lone % 50 == 0 {
                    states.push(state);
                }
            }
        }
        for (at, data) in writes {
            put(&mut durable, *at, data);
        }
        states.push(durable.clone());
    }
    states
}

fn pieces(offset: u64, data: &[u8]) -> Vec<(u64, &[u8])> {
    let mut out = Vec::new();
    let (mut at, mut rest) = (offset, data);
    while !rest.is_empty() {
        let n = ((at / 512 + 1) * 512 - at).min(rest.len() as u64) as usize;
        let (now, later) = rest.split_at(n);
        out.push((at, now));
        (at, rest) = (at + n as u64, later);
    }
    out
}

#[tokio::test]
async fn a_power_cut_harms_no_other_password_and_activates_no_half_made_slot() {
    // INV LUKS-SLOT-1. Slot 6 lies in two sectors.
    for slot in [1, 6] {
        let (store, mut header, key) =
            made(spec(CipherAlg::Aes128, CipherMode::Cbc), HashAlg::Sha1).await;
        let before = store.bytes.lock().unwrap().clone();
        header
            .add_slot(&store, slot, &key, password("new"), QUICK)
            .await
            .unwrap();
        let log = std::mem::take(&mut *store.log.lock().unwrap());
        let states = after_power_cuts(&before, &log);
        assert!(states.len() > 5);
        for state in states {
            let store = Memory {
                bytes: Mutex::new(state),
                ..Memory::default()
            };
            let header = Header::read(&store, Payload::Behind).await.unwrap();
            assert_eq!(opens(&store, "first").await, Some(0));
            if header.slots[slot].active {
                assert_eq!(opens(&store, "new").await, Some(slot));
            }
        }
        // And erasing it again.
        let before = store.bytes.lock().unwrap().clone();
        header.erase_slot(&store, slot).await.unwrap();
        let log = std::mem::take(&mut *store.log.lock().unwrap());
        let place = header.slots[slot].key_offset as usize;
        let place = place..place + header.material_bytes();
        let old = before[place.clone()].chunks(512);
        for state in after_power_cuts(&before, &log) {
            let now = state[place.clone()].chunks(512);
            let is_left = old.clone().zip(now).any(|(old, now)| old == now);
            let store = Memory {
                bytes: Mutex::new(state),
                ..Memory::default()
            };
            let header = Header::read(&store, Payload::Behind).await.unwrap();
            assert_eq!(opens(&store, "first").await, Some(0));
            // Somebody may have a copy of the header, in which the slot is active.
            let is_told = !header.slots[slot].active;
            assert!(!(is_told && is_left), "called erased, and is still there");
        }
    }
}

#[tokio::test]
async fn a_slot_that_is_called_inactive_opens_nothing() {
    let (store, mut header, _) =
        made(spec(CipherAlg::Aes128, CipherMode::Xts), HashAlg::Sha256).await;
    header.slots[0].active = false;
    let first = password("first");
    assert!(
        header
            .unlock_slot(&store, 0, &first)
            .await
            .unwrap()
            .is_none()
    );
    assert!(header.unlock(&store, &first).await.is_err());
}

#[tokio::test]
async fn whoever_gives_up_waiting_ends_the_work() {
    let (store, mut header, _) =
        made(spec(CipherAlg::Aes128, CipherMode::Xts), HashAlg::Sha256).await;
    header.slots[0].iterations = u32::MAX;
    let password = password("first");
    let unlock = header.unlock(&store, &password);
    let in_time = tokio::time::timeout(Duration::from_millis(50), unlock).await;
    assert!(in_time.is_err());
    // The end of the runtime waits for what its pool does: the test would hang for minutes.
}

#[tokio::test]
async fn too_many_rounds_are_no_header() {
    let new = NewVolume {
        spec: spec(CipherAlg::Aes128, CipherMode::Xts),
        hash: HashAlg::Sha256,
        iter_time: Duration::from_secs(1 << 40),
    };
    let text = new.make(password("x")).await.unwrap_err().text();
    assert!(text.starts_with("PBKDF iterations "), "{text}");
    assert!(
        text.ends_with(" larger than 4294967295: Numerical result out of range"),
        "{text}"
    );
}
