// SPDX-License-Identifier: MIT OR Apache-2.0
//! `qemu-img bitmap`, and the bitmaps that `convert --bitmaps` copies.
//!
//! Whatever is done to a bitmap gets into the image when that is closed.

use blockcore::{Backend, BlockError, NewBitmap, Node, Result};
use toolkit::getopt::{Arg, Long, long};

use crate::Tool;
use crate::console::Outcome;
use crate::image::Image;
use crate::options::{IMAGE_OPTS, OBJECT, OWN, Words};

const ADD: char = OWN as char;
const REMOVE: char = (OWN + 1) as char;
const CLEAR: char = (OWN + 2) as char;
const ENABLE: char = (OWN + 3) as char;
const DISABLE: char = (OWN + 4) as char;
const MERGE: char = (OWN + 5) as char;

const LONG: &[Long] = &[
    long("help", Arg::No, 'h'),
    long("format", Arg::Required, 'f'),
    long("image-opts", Arg::No, IMAGE_OPTS),
    long("add", Arg::No, ADD),
    long("granularity", Arg::Required, 'g'),
    long("remove", Arg::No, REMOVE),
    long("clear", Arg::No, CLEAR),
    long("enable", Arg::No, ENABLE),
    long("disable", Arg::No, DISABLE),
    long("merge", Arg::Required, MERGE),
    long("source-file", Arg::Required, 'b'),
    long("source-format", Arg::Required, 'F'),
    long("object", Arg::Required, OBJECT),
];

/// What is to be done to a bitmap.
#[derive(Debug, PartialEq, Eq)]
enum Action {
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    /// Merges the bitmap with this name into it.
    Merge(String),
}

impl Action {
    fn name(&self) -> &'static str {
        match self {
            Action::Add => "add",
            Action::Remove => "remove",
            Action::Clear => "clear",
            Action::Enable => "enable",
            Action::Disable => "disable",
            Action::Merge(_) => "merge",
        }
    }
}

/// What `convert` does with bitmaps.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct CopyBitmaps {
    /// They are copied.
    pub copy: bool,
    /// Inconsistent ones are left out; else they are an error.
    pub skip_broken: bool,
}

impl Tool {
    pub(crate) async fn bitmap(&self, args: &[String]) -> Outcome {
        let (mut format, mut image_opts) = (None, false);
        let (mut source, mut source_format, mut granularity) = (None, None, None);
        let mut actions = Vec::new();
        let mut words = Words::new(self, "bitmap", args, "b:f:F:g:h", LONG);
        while let Some(option) = words.next()? {
            let arg = option.arg;
            match option.value {
                'f' => format = Some(arg),
                IMAGE_OPTS => image_opts = true,
                'b' => source = Some(arg),
                'F' => source_format = Some(arg),
                'g' => granularity = Some(self.number("granularity", &arg, 0, i64::MAX as u64)?),
                ADD => actions.push(Action::Add),
                REMOVE => actions.push(Action::Remove),
                CLEAR => actions.push(Action::Clear),
                ENABLE => actions.push(Action::Enable),
                DISABLE => actions.push(Action::Disable),
                _ => actions.push(Action::Merge(arg)),
            }
        }
        let fail = |text: &str| Err(self.console.fail(text));
        // Nothing said and 0 are the same.
        let granularity = granularity.filter(|g| *g > 0);
        let merges = actions.iter().any(|a| matches!(a, Action::Merge(_)));
        if actions.is_empty() {
            return fail(
                "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
            );
        }
        if granularity.is_some() && !actions.contains(&Action::Add) {
            return fail("granularity only supported with --add");
        }
        if source_format.is_some() && source.is_none() {
            return fail("-F only supported with -b");
        }
        if source.is_some() && !merges {
            return fail("Merge bitmap source file only supported with --merge");
        }
        let [filename, bitmap] = &words.positionals()[..] else {
            return fail("Expecting filename and bitmap name");
        };
        self.check_image_opts(image_opts, format.as_deref())?;
        let image = Image {
            writable: true,
            ..Image::new(filename, format, image_opts)
        };
        let disk = self.open(image).await?;
        let done = match source {
            None => {
                self.bitmap_actions(&disk, &disk, bitmap, granularity, &actions)
                    .await
            }
            Some(name) => match self.open(Image::new(name, source_format, false)).await {
                Ok(source) => {
                    let done = self
                        .bitmap_actions(&disk, &source, bitmap, granularity, &actions)
                        .await;
                    done.and(self.close(source).await)
                }
                Err(failed) => Err(failed),
            },
        };
        done.and(self.close(disk).await)
    }

    /// Does one action after the other, up to the first that fails. Those before it stay done.
    async fn bitmap_actions(
        &self,
        disk: &Backend,
        source: &Backend,
        bitmap: &str,
        granularity: Option<u64>,
        actions: &[Action],
    ) -> Outcome {
        for action in actions {
            let done = act(disk.root(), source.root(), bitmap, granularity, action).await;
            done.map_err(|e| {
                let what = action.name();
                let prefix = format!("Operation {what} on bitmap {bitmap} failed: ");
                self.console.block_error(&prefix, &e)
            })?;
        }
        Ok(())
    }

    /// What can be said before anything is copied: whether source and target can have bitmaps, and whether those of the source can be used.
    pub(crate) fn check_source_bitmaps(&self, sources: &[Backend], what: CopyBitmaps) -> Outcome {
        if !what.copy {
            return Ok(());
        }
        let [source] = sources else {
            let text = "Copying bitmaps only possible with single source";
            return Err(self.console.fail(text));
        };
        if !source.root().driver().supports_persistent_bitmaps() {
            return Err(self.console.fail("Source lacks bitmap support"));
        }
        let all = source.root().dirty_bitmaps();
        let broken = all.iter().rev().find(|b| b.is_inconsistent());
        if let Some(broken) = broken.filter(|_| !what.skip_broken) {
            let text = format!("Cannot copy inconsistent bitmap '{}'", broken.name());
            let hint = "Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it";
            return Err(self.console.fail(&format!("{text}\n{hint}")));
        }
        Ok(())
    }

    pub(crate) fn check_target_bitmaps(&self, target: &Backend) -> Outcome {
        let root = target.root();
        if !root.driver().supports_persistent_bitmaps() {
            let format = root.format_name();
            let text = format!("Format driver '{format}' does not support bitmaps");
            return Err(self.console.fail(&text));
        }
        Ok(())
    }

    /// Copies the persistent bitmaps of a source, the newest first.
    pub(crate) async fn copy_bitmaps(&self, source: &Backend, target: &Backend) -> Outcome {
        let all = source.root().dirty_bitmaps();
        for bitmap in all.iter().rev().filter(|b| b.is_persistent()) {
            let name = bitmap.name();
            if bitmap.is_inconsistent() {
                self.console
                    .error(&format!("warning: Skipping inconsistent bitmap '{name}'"));
                continue;
            }
            let failed = |what: &str, e: BlockError| {
                let prefix = format!("Failed to {what} bitmap {name}: ");
                self.console.block_error(&prefix, &e)
            };
            let new = NewBitmap {
                granularity: Some(bitmap.granularity()),
                persistent: true,
                enabled: bitmap.is_enabled(),
                ..NewBitmap::new(name)
            };
            let added = target.root().add_dirty_bitmap(new).await;
            added.map_err(|e| failed("create", e))?;
            if let Err(e) = target.root().merge_dirty_bitmap(name, bitmap).await {
                let failed = failed("populate", e);
                // A bitmap that says nothing is worse than none.
                let removed = target.root().remove_dirty_bitmap(name).await;
                removed.map_err(|e| self.console.block_error("", &e))?;
                return Err(failed);
            }
        }
        Ok(())
    }
}

async fn act(
    node: &Node,
    source: &Node,
    bitmap: &str,
    granularity: Option<u64>,
    action: &Action,
) -> Result<()> {
    match action {
        Action::Add => {
            let new = NewBitmap {
                granularity,
                persistent: true,
                ..NewBitmap::new(bitmap)
            };
            node.add_dirty_bitmap(new).await.map(drop)
        }
        Action::Remove => node.remove_dirty_bitmap(bitmap).await,
        Action::Clear => node.clear_dirty_bitmap(bitmap).await,
        Action::Enable => node.enable_dirty_bitmap(bitmap, true).await,
        Action::Disable => node.enable_dirty_bitmap(bitmap, false).await,
        Action::Merge(from) => {
            // Which of the two is missed first.
            node.dirty_bitmap(bitmap)?;
            let from = source.dirty_bitmap(from)?;
            node.merge_dirty_bitmap(bitmap, &from).await
        }
    }
}
