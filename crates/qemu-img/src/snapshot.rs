// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img snapshot`, and the snapshot of a source that `convert -l` names.

use blockcore::{Backend, BlockError, ErrorKind, Options, SnapshotRequest, SnapshotSelector};
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::Outcome;
use crate::image::Image;
use crate::options::{IMAGE_OPTS, OBJECT, Words};
use crate::snapshot_list;

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("quiet", Arg::No, 'q'),
    long("format", Arg::Required, 'f'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("force-share", Arg::No, 'U'),
    long("list", Arg::No, 'l'),
    long("apply", Arg::Required, 'a'),
    long("create", Arg::Required, 'c'),
    long("delete", Arg::Required, 'd'),
    long("object", Arg::Required, OBJECT),
];

/// Names are cut off behind so many bytes.
const NAME_BYTES_MAX: usize = 255;

/// What is to be done.
enum Action {
    List,
    Create(String),
    Apply(String),
    Delete(String),
}

impl Tool {
    pub(crate) async fn snapshot(&self, args: &[String]) -> Outcome {
        let (mut format, mut image_opts, mut force_share) = (None, false, false);
        let mut action = None;
        let mut words = Words::new(self, "snapshot", args, "hqf:Ula:c:d:", LONG);
        while let Some(option) = words.next()? {
            let arg = option.arg;
            let wanted = match option.value {
                'q' => continue,
                'f' => {
                    format = Some(arg);
                    continue;
                }
                IMAGE_OPTS => {
                    image_opts = true;
                    continue;
                }
                'U' => {
                    force_share = true;
                    continue;
                }
                'a' => Action::Apply(arg),
                'c' => Action::Create(arg),
                'd' => Action::Delete(arg),
                _ => Action::List,
            };
            if action.replace(wanted).is_some() {
                let text = "Cannot mix '-l', '-a', '-c', '-d'";
                return Err(self.console.usage_error("snapshot", text));
            }
        }
        let name = words.one_positional()?;
        self.check_image_opts(image_opts, format.as_deref())?;
        let action = action.unwrap_or(Action::List);
        let image = Image {
            writable: !matches!(action, Action::List),
            force_share,
            ..Image::new(name, format, image_opts)
        };
        let disk = self.open(image).await?;
        let done = self.snapshot_action(&disk, action).await;
        let closed = self.close(disk).await;
        done.and(closed)
    }

    async fn snapshot_action(&self, disk: &Backend, action: Action) -> Outcome {
        let root = disk.root();
        let failed = |what: &str, name: &str, e: &BlockError| {
            let prefix = format!("Could not {what} snapshot '{name}': ");
            self.console.block_error(&prefix, e)
        };
        match action {
            Action::List => {
                let all = root.snapshots().await;
                let all = all.map_err(|e| self.console.block_error("", &e))?;
                if !all.is_empty() {
                    self.console.line("Snapshot list:");
                    for line in snapshot_list::lines(&all) {
                        self.console.line(&line);
                    }
                }
                Ok(())
            }
            Action::Create(name) => {
                let mut cut = name.len().min(NAME_BYTES_MAX);
                while !name.is_char_boundary(cut) {
                    cut -= 1;
                }
                let request = SnapshotRequest::now(&name[..cut]);
                let created = root.snapshot_create(request).await;
                created.map_err(|e| failed("create", &name, &e))
            }
            Action::Apply(name) => {
                let which = SnapshotSelector::IdOrName(name.clone());
                let applied = root.snapshot_goto(which).await;
                applied.map_err(|e| match e.kind() {
                    ErrorKind::Unsupported => failed("apply", &name, &e),
                    // Refused before anything was looked for.
                    _ if e.errno() == libc::EBUSY => failed("apply", &name, &e),
                    _ => failed("apply", &name, &e.context("Failed to load snapshot")),
                })
            }
            Action::Delete(name) => {
                let all = root.snapshots().await;
                let all = all.map_err(|e| failed("delete", &name, &e))?;
                if !all.iter().any(|s| s.name == name) {
                    let text = format!("Could not delete snapshot '{name}': snapshot not found");
                    return Err(self.console.fail(&text));
                }
                let deleted = root
                    .snapshot_delete(SnapshotSelector::name(name.clone()))
                    .await;
                deleted.map_err(|e| failed("delete", &name, &e))
            }
        }
    }

    /// The argument of `convert -l`: an id or a name, or `snapshot.id=...,snapshot.name=...`.
    pub(crate) fn source_snapshot(&self, arg: &str) -> Outcome<SnapshotSelector> {
        if !arg.starts_with("snapshot.") {
            return Ok(SnapshotSelector::IdOrName(arg.to_owned()));
        }
        for (key, meaning) in Options::short_switches(arg) {
            self.console.error(&format!(
                "warning: short-form boolean option '{key}' deprecated\nPlease use {meaning} instead"
            ));
        }
        let parsed = Options::from_dotted(arg).and_then(|mut options| {
            let selector = SnapshotSelector::Fields {
                id: options.take_str("snapshot.id"),
                name: options.take_str("snapshot.name"),
            };
            match options.iter().next() {
                Some((key, _)) => Err(BlockError::invalid(format!("Invalid parameter '{key}'"))),
                None => Ok(selector),
            }
        });
        parsed.map_err(|e| {
            self.console.block_error("", &e);
            let text = format!("Failed in parsing snapshot param '{arg}'");
            self.console.fail(&text)
        })
    }

    /// Shows a snapshot of the only source instead of its active layer.
    pub(crate) async fn load_source_snapshot(
        &self,
        sources: &[Backend],
        which: &SnapshotSelector,
    ) -> Outcome {
        let [source] = sources else {
            let text = "No support for concatenating multiple snapshot";
            return Err(self.console.fail(text));
        };
        let loaded = source.root().snapshot_load(which.clone()).await;
        loaded.map_err(|e| {
            let prefix = "Failed to load snapshot: ";
            match e.kind() {
                ErrorKind::NotFound => self.console.fail(&format!("{prefix}Can't find snapshot")),
                _ => self.console.block_error(prefix, &e),
            }
        })
    }
}
