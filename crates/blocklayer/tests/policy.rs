// SPDX-License-Identifier: MIT OR Apache-2.0
//! The rule: the library opens nothing that the caller has not named, unless the policy says so; and it guesses no format unless asked to.
//! (Backing file names in images that strangers made have given away the host's files more than once.)

use blocklayer::{ErrorKind, OpenOptions, OpenPolicy, Options, registry};

async fn chain(dir: &std::path::Path) -> (String, String) {
    let (base, top) = (dir.join("base.raw"), dir.join("sub/top.qcow2"));
    std::fs::create_dir(dir.join("sub")).unwrap();
    std::fs::write(&base, vec![7u8; 65536]).unwrap();
    let options = Options::new()
        .with("size", "64k")
        .with("backing_file", "../base.raw")
        .with("backing_fmt", "raw");
    let top = top.to_str().unwrap().to_owned();
    registry()
        .create("qcow2", &top, options, Default::default())
        .await
        .unwrap();
    (base.to_str().unwrap().to_owned(), top)
}

#[tokio::test]
async fn backing_files_are_followed_only_as_the_policy_says() {
    let dir = tempfile::tempdir().unwrap();
    let (_base, top) = chain(dir.path()).await;
    let open = async |policy: OpenPolicy| {
        OpenOptions::new()
            .format("qcow2")
            .policy(policy)
            .read_only(true)
            .open(&registry(), &top)
            .await
    };
    let refused = [
        OpenPolicy::default(),
        OpenPolicy::Beneath(dir.path().join("sub")),
        OpenPolicy::Drivers(vec!["raw".to_owned()]),
        OpenPolicy::Drivers(vec!["file".to_owned()]),
    ];
    for policy in refused {
        let err = open(policy.clone()).await.unwrap_err();
        assert_eq!(err.kind(), ErrorKind::PermissionDenied, "{policy:?}: {err}");
    }
    let allowed = [
        OpenPolicy::Everything,
        OpenPolicy::Beneath(dir.path().to_path_buf()),
        OpenPolicy::Drivers(vec!["raw".to_owned(), "file".to_owned()]),
    ];
    for policy in allowed {
        let disk = open(policy.clone())
            .await
            .unwrap_or_else(|e| panic!("{policy:?}: {e}"));
        assert_eq!(disk.read(0, 512).await.unwrap().to_vec(), vec![7; 512]);
        disk.close().await.unwrap();
    }
}

#[tokio::test]
async fn an_image_can_be_looked_at_without_what_it_names() {
    let dir = tempfile::tempdir().unwrap();
    let (_base, top) = chain(dir.path()).await;
    let open = OpenOptions::new()
        .format("qcow2")
        .read_only(true)
        .option("backing", blocklayer::OptionValue::Null);
    let disk = open.open(&registry(), &top).await.unwrap();
    assert_eq!(
        disk.root().driver().backing_name().unwrap().filename,
        "../base.raw"
    );
    assert!(disk.read(0, 512).await.unwrap().is_zero());
    disk.close().await.unwrap();
}

#[tokio::test]
async fn a_format_is_guessed_only_when_that_was_allowed() {
    let dir = tempfile::tempdir().unwrap();
    let (base, _top) = chain(dir.path()).await;
    let err = OpenOptions::new()
        .open(&registry(), &base)
        .await
        .unwrap_err();
    assert!(err.to_string().contains("guessing is not allowed"), "{err}");
    OpenOptions::new()
        .probe(true)
        .open(&registry(), &base)
        .await
        .unwrap()
        .close()
        .await
        .unwrap();
}
