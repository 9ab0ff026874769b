// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`Image`]: an image as a command line names it, and opening it as the tools do: formats are guessed, backing files are followed.

use blockcore::{Backend, NodeFlags, OpenOptions, OpenPolicy, Options, Result};
use toolkit::cache::CacheMode;

use crate::Tool;
use crate::console::Outcome;

/// The cache mode where none is given.
pub(crate) const WRITEBACK: CacheMode = CacheMode {
    direct: false,
    no_flush: false,
    write_through: false,
};

/// An image as a command line names it, and how to open it.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    /// A file name; with `image_opts`, options.
    pub name: String,
    pub format: Option<String>,
    pub image_opts: bool,
    pub writable: bool,
    pub cache: CacheMode,
    pub force_share: bool,
    pub no_backing: bool,
    /// It is only looked at, so that no key is wanted.
    pub no_io: bool,
    /// Nobody else may write to it meanwhile.
    pub no_share: bool,
    /// It is opened for a check and nothing else.
    pub for_check: bool,
    /// Options beside those of the name.
    pub options: Options,
}

impl Image {
    /// Read-only, write-back, with its backing chain.
    pub fn new(name: impl Into<String>, format: Option<String>, image_opts: bool) -> Image {
        Image {
            name: name.into(),
            format,
            image_opts,
            writable: false,
            cache: WRITEBACK,
            force_share: false,
            no_backing: false,
            no_io: false,
            no_share: false,
            for_check: false,
            options: Options::new(),
        }
    }
}

/// The options of `--image-opts`. A first word without `=` is the value of `file`.
fn image_options(text: &str) -> Result<Options> {
    let first = text.split(',').next().unwrap_or_default();
    if first.is_empty() || first.contains('=') {
        return Options::from_dotted(text);
    }
    Options::from_dotted(&format!("file={text}"))
}

impl Tool {
    /// Refuses `--image-opts` together with a format.
    pub(crate) fn check_image_opts(&self, image_opts: bool, format: Option<&str>) -> Outcome {
        if image_opts && format.is_some() {
            let text = "--image-opts and --format are mutually exclusive";
            return Err(self.console.fail(text));
        }
        Ok(())
    }

    /// Opens an image; an error is printed.
    pub(crate) async fn open(&self, image: Image) -> Outcome<Backend> {
        let prefix = format!("Could not open '{}': ", image.name);
        let flags = NodeFlags {
            read_only: !image.writable,
            direct: image.cache.direct,
            no_flush: image.cache.no_flush,
            unmap: true,
            force_share: image.force_share,
        };
        let mut open = OpenOptions::new()
            .flags(flags)
            .write_through(image.cache.write_through)
            .probe(true)
            .policy(OpenPolicy::Everything)
            .no_backing(image.no_backing)
            .no_io(image.no_io)
            .no_share(image.no_share)
            .for_check(image.for_check)
            .diagnostics(self.console.diagnostics());
        if let Some(format) = image.format {
            open = open.format(format);
        }
        let opened = if image.image_opts {
            match image_options(&image.name) {
                Ok(options) => {
                    open.options(options)
                        .options(image.options)
                        .open_options(&self.registry)
                        .await
                }
                Err(e) => Err(e),
            }
        } else {
            open.options(image.options)
                .open(&self.registry, &image.name)
                .await
        };
        opened.map_err(|e| self.console.block_error(&prefix, &e))
    }

    /// Closes an image; an error is printed.
    pub(crate) async fn close(&self, disk: Backend) -> Outcome {
        let name = disk.root().filename().to_owned();
        disk.close().await.map_err(|e| {
            self.console
                .block_error(&format!("Could not close '{name}': "), &e)
        })
    }
}
