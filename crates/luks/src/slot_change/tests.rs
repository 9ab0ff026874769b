// SPDX-License-Identifier: MIT OR Apache-2.0
//! Tests of changes of key slots. Wording is compared with QEMU's by golden scripts; here it is what a power cut leaves.

use std::sync::Mutex;

use super::*;
use crate::HashAlg;
use crate::algorithm::{CipherAlg, CipherMode};
use crate::header::Payload;
use crate::volume::tests::{Memory, after_power_cuts, made, opens, spec};

fn secrets() -> Secrets {
    let secrets = Secrets::new();
    for text in ["first", "second", "third"] {
        secrets.add(text, Secret::new(text)).unwrap();
    }
    secrets
}

fn change(options: &[(&str, &str)]) -> SlotChange {
    let mut all = Options::new();
    all.set("iter-time", "1");
    for (key, value) in options {
        all.set(key, *value);
    }
    if all.get_str("state").as_deref() == Some("inactive") {
        all.take("iter-time");
    }
    SlotChange::take(&mut all).unwrap()
}

#[tokio::test]
async fn a_slot_that_is_overwritten_is_never_the_last_one() {
    let (store, mut header, key) =
        made(spec(CipherAlg::Aes128, CipherMode::Xts), HashAlg::Sha256).await;
    let (before, secrets) = (store.bytes.lock().unwrap().clone(), secrets());
    let new = change(&[
        ("state", "active"),
        ("new-secret", "second"),
        ("keyslot", "0"),
    ]);
    let refused = new
        .clone()
        .apply(&mut header, &store, &key, &secrets, false);
    assert_eq!(
        refused.await.unwrap_err().text(),
        "Refusing to overwrite active keyslot 0 - please erase it first"
    );
    let forced = new.apply(&mut header, &store, &key, &secrets, true);
    forced.await.unwrap();
    let log = std::mem::take(&mut *store.log.lock().unwrap());
    for state in after_power_cuts(&before, &log) {
        let store = Memory {
            bytes: Mutex::new(state),
            ..Memory::default()
        };
        let first = opens(&store, "first").await;
        assert!(first.or(opens(&store, "second").await).is_some());
    }
    assert_eq!(opens(&store, "first").await, None);
    assert_eq!(opens(&store, "second").await, Some(0));
    assert!(header.slots[1..].iter().all(|s| !s.active));
    assert_eq!(header, Header::read(&store, Payload::Behind).await.unwrap());
}

#[tokio::test]
async fn the_only_slot_is_erased_by_force_alone() {
    let (store, mut header, key) =
        made(spec(CipherAlg::Aes128, CipherMode::Xts), HashAlg::Sha256).await;
    let secrets = secrets();
    let by_number = change(&[("state", "inactive"), ("keyslot", "0")]);
    let by_both = [
        ("state", "inactive"),
        ("keyslot", "0"),
        ("old-secret", "first"),
    ];
    for erase in [by_number.clone(), change(&by_both)] {
        let refused = erase.apply(&mut header, &store, &key, &secrets, false);
        let text = refused.await.unwrap_err().text();
        assert!(text.starts_with("Attempt to erase the only active keyslot 0"));
        assert_eq!(opens(&store, "first").await, Some(0));
    }
    assert_eq!(store.log.lock().unwrap().len(), 0, "nothing was written");
    let forced = by_number.apply(&mut header, &store, &key, &secrets, true);
    forced.await.unwrap();
    assert_eq!(opens(&store, "first").await, None);
}

#[tokio::test]
async fn a_password_is_taken_out_of_every_slot_that_has_it_and_the_last_one_stays() {
    let (store, mut header, key) =
        made(spec(CipherAlg::Aes128, CipherMode::Xts), HashAlg::Sha256).await;
    let secrets = secrets();
    for (slot, secret) in [("3", "second"), ("6", "second"), ("7", "third")] {
        let new = change(&[
            ("state", "active"),
            ("new-secret", secret),
            ("keyslot", slot),
        ]);
        new.apply(&mut header, &store, &key, &secrets, false)
            .await
            .unwrap();
    }
    for gone in ["second", "first"] {
        let erase = change(&[("state", "inactive"), ("old-secret", gone)]);
        erase
            .apply(&mut header, &store, &key, &secrets, false)
            .await
            .unwrap();
        assert_eq!(opens(&store, gone).await, None);
    }
    let last = change(&[("state", "inactive"), ("old-secret", "third")]);
    let refused = last
        .clone()
        .apply(&mut header, &store, &key, &secrets, false);
    assert!(refused.await.is_err());
    assert_eq!(opens(&store, "third").await, Some(7));
    let forced = last.apply(&mut header, &store, &key, &secrets, true);
    forced.await.unwrap();
    assert_eq!(opens(&store, "third").await, None);
}
