// SPDX-License-Identifier: MIT OR Apache-2.0
//! `open`, `reopen`, `truncate`, `sleep`, `sigraise`, and the commands that need a node of a kind this release has none of.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use blockcore::{
    Backend, BlockError, ErrorKind, NodeFlags, OpenOptions, OpenPolicy, Options, Preallocation,
    TruncateRequest, strerror,
};
use tempfile::{NamedTempFile, TempPath};
use toolkit::cache::{self, CacheMode};
use toolkit::getopt::Getopt;

use crate::command::Verb;
use crate::numbers::{size, size_shown_as, strtol};
use crate::session::{Call, Done, Failed, Ran, Session};

/// How an image is to be opened, by the command line or by `open`.
#[derive(Clone, Debug)]
pub struct OpenRequest {
    /// The file name, or the option string with `--image-opts`.
    pub path: Option<String>,
    /// The driver (`-f`).
    pub format: Option<String>,
    /// Driver options (`-o`).
    pub options: Options,
    /// Read-only (`-r`).
    pub read_only: bool,
    /// A temporary overlay takes the writes (`-s`).
    pub snapshot: bool,
    /// Cache mode.
    pub cache: CacheMode,
    /// Discards are passed on.
    pub unmap: bool,
    /// I/O engine (`-i`, `-k`).
    pub aio: Option<String>,
    /// No locks (`-U`).
    pub force_share: bool,
    /// Copy-on-read (`-C`).
    pub copy_on_read: bool,
}

impl Default for OpenRequest {
    fn default() -> OpenRequest {
        OpenRequest {
            path: None,
            format: None,
            options: Options::new(),
            read_only: false,
            snapshot: false,
            cache: CacheMode {
                direct: false,
                no_flush: false,
                write_through: true,
            },
            unmap: true,
            aio: None,
            force_share: false,
            copy_on_read: false,
        }
    }
}

impl OpenRequest {
    /// `-n`: only switches the host's cache and write-through off.
    pub fn no_cache(&mut self) {
        self.cache.direct = true;
        self.cache.write_through = false;
    }

    /// `-t`.
    pub fn set_cache(&mut self, name: &str) -> Result<(), String> {
        self.cache = cache::parse(name).ok_or_else(|| format!("Invalid cache option: {name}"))?;
        Ok(())
    }

    /// `-d`.
    pub fn set_discard(&mut self, name: &str) -> Result<(), String> {
        self.unmap = match name {
            "on" | "unmap" => true,
            "off" | "ignore" => false,
            _ => return Err(format!("Invalid discard option: {name}")),
        };
        Ok(())
    }

    /// `-i`.
    pub fn set_aio(&mut self, name: &str) -> Result<(), String> {
        if !matches!(name, "threads" | "native" | "io_uring") {
            return Err(format!("Invalid aio option: {name}"));
        }
        self.aio = Some(name.to_owned());
        Ok(())
    }
}

impl Session {
    pub(crate) async fn open(&mut self, c: Call<'_>) -> Ran {
        let (found, words) = self.options(&c, "snCro:ki:t:d:U");
        let mut request = OpenRequest::default();
        for option in found {
            let option = self.checked(&c, option)?;
            let arg = option.arg.as_str();
            let set = match option.value {
                's' => {
                    request.snapshot = true;
                    Ok(())
                }
                'n' => {
                    request.no_cache();
                    Ok(())
                }
                'C' => {
                    request.copy_on_read = true;
                    Ok(())
                }
                'r' => {
                    request.read_only = true;
                    Ok(())
                }
                'k' => request.set_aio("native"),
                'i' => request.set_aio(arg),
                't' => request.set_cache(arg),
                'd' => request.set_discard(arg),
                'U' => {
                    request.force_share = true;
                    Ok(())
                }
                _ if self.image_opts => {
                    self.output
                        .out("--image-opts and 'open -o' are mutually exclusive\n");
                    return Err(Failed::Refused);
                }
                _ => {
                    let options = self.option_string(arg)?;
                    request.options.merge(options);
                    Ok(())
                }
            };
            if let Err(text) = set {
                self.complain(&text);
                return Err(Failed::Refused);
            }
        }
        match words.as_slice() {
            [] => {}
            [path] => request.path = Some(path.clone()),
            _ => return self.usage(&c),
        }
        self.open_image(request).await
    }

    /// Reads `key=value,key=value`, and warns of keys without a value.
    fn option_string(&mut self, text: &str) -> Result<Options, Failed> {
        for (key, meaning) in Options::short_switches(text) {
            self.complain(&format!(
                "warning: short-form boolean option '{key}' deprecated\nPlease use {meaning} instead"
            ));
        }
        Options::from_dotted(text).map_err(|e| {
            self.complain(&e.text());
            Failed::Refused
        })
    }

    /// Opens an image.
    pub async fn open_image(&mut self, mut request: OpenRequest) -> Ran {
        if self.backend.is_some() {
            self.complain("file open already, try 'help close'");
            return Err(Failed::Refused);
        }
        if self.image_opts
            && let Some(text) = request.path.take()
        {
            let options = self.option_string(&text)?;
            request.options.merge(options);
        }
        if request.force_share && request.options.contains("force-share") {
            let on = request.options.take_bool("force-share");
            if !matches!(on, Ok(Some(true))) {
                self.complain("-U conflicts with image options");
                return Err(Failed::Refused);
            }
        }
        let before = match &request.path {
            Some(path) => format!("can't open device {path}: "),
            None => "can't open: ".to_owned(),
        };
        let opened = match request.copy_on_read {
            true if request.read_only => Err(BlockError::invalid(
                "Can't use copy-on-read on read-only device",
            )),
            true => Err(BlockError::unsupported("copy-on-read is not supported yet")),
            false => self.open_backend(request).await,
        };
        match opened {
            Ok(backend) => {
                self.print_warnings();
                self.backend = Some(Arc::new(backend));
                Ok(Done::Nothing)
            }
            Err(e) => self.complain_of(&before, &e),
        }
    }

    async fn open_backend(&self, mut request: OpenRequest) -> blockcore::Result<Backend> {
        if let Some(aio) = &request.aio {
            let driver = request
                .format
                .clone()
                .or_else(|| request.options.get_str("driver"));
            let key = match driver.as_deref() {
                Some("file" | "host_device") => "aio",
                _ => "file.aio",
            };
            request.options.set_default(key, aio.as_str());
        }
        // Once the overlay is open nobody needs its name: it goes at the end of this function, also when opening fails.
        let _overlay = match request.snapshot {
            true => Some(self.make_overlay(&mut request).await?),
            false => None,
        };
        let mut open = OpenOptions::new()
            .probe(true)
            .policy(OpenPolicy::Everything)
            .read_only(request.read_only)
            .direct(request.cache.direct)
            .no_flush(request.cache.no_flush)
            .write_through(request.cache.write_through)
            .unmap(request.unmap)
            .force_share(request.force_share)
            .options(request.options)
            .diagnostics(self.diagnostics.clone());
        if let Some(format) = request.format {
            open = open.format(format);
        }
        match &request.path {
            Some(path) => open.open(&self.registry, path).await,
            None => open.open_options(&self.registry).await,
        }
    }

    /// Makes a temporary overlay, and turns the request into one that opens it with the image behind it.
    async fn make_overlay(&self, request: &mut OpenRequest) -> blockcore::Result<TempPath> {
        let mut base = std::mem::take(&mut request.options);
        if let Some(format) = request.format.replace("qcow2".to_owned()) {
            base.set("driver", format);
        }
        if let Some(path) = request.path.take() {
            self.name_base(&mut base, &path)?;
        }
        if matches!(base.take_bool("read-only")?, Some(true)) && !request.read_only {
            return Err(BlockError::new(
                ErrorKind::ReadOnly,
                "Block node is read-only",
            ));
        }
        // How the image is to be opened is said of the image; the overlay is nobody else's, and need not outlive a crash.
        let cache = &mut request.cache;
        for (key, on) in [
            ("cache.direct", std::mem::replace(&mut cache.direct, false)),
            (
                "cache.no-flush",
                std::mem::replace(&mut cache.no_flush, true),
            ),
            ("force-share", std::mem::take(&mut request.force_share)),
        ] {
            base.set_default(key, on);
        }
        let look = OpenOptions::new()
            .probe(true)
            .policy(OpenPolicy::Everything)
            .read_only(true)
            .options(base.clone());
        let image = look.open_options(&self.registry).await?;
        let length = image.length();
        image.close().await?;
        let dir = std::env::var("TMPDIR").unwrap_or_else(|_| "/var/tmp".to_owned());
        let overlay = unused_name(&dir)?;
        let name = overlay.to_string_lossy().into_owned();
        let create = Options::new().with("size", length.to_string());
        self.registry
            .create("qcow2", &name, create, self.diagnostics.clone())
            .await?;
        for (key, value) in base.iter() {
            request
                .options
                .set(&format!("backing.{key}"), value.clone());
        }
        request.options.set("file.filename", name.as_str());
        Ok(overlay)
    }

    /// Says in options what a file name says.
    fn name_base(&self, base: &mut Options, path: &str) -> blockcore::Result<()> {
        if path.starts_with("json:") {
            let mut merged = Options::from_json(path)?;
            merged.merge(std::mem::take(base));
            *base = merged;
            return Ok(());
        }
        let protocol = self.registry.protocol_for(path)?;
        let prefix = format!("{}:", protocol.protocol_name().unwrap_or_default());
        let plain = path.strip_prefix(&prefix).unwrap_or(path);
        let own = base.get_str("driver");
        if own.is_some_and(|d| d == protocol.format_name()) {
            base.set_default("filename", plain);
        } else {
            base.set_default("file.driver", protocol.format_name());
            base.set_default("file.filename", plain);
        }
        Ok(())
    }

    pub(crate) async fn reopen(&mut self, c: Call<'_>) -> Ran {
        let (found, words) = self.options(&c, "c:o:rw");
        let backend = self.backend()?;
        let mut flags = backend.root().flags();
        let mut write_through = backend.is_write_through();
        let (mut mode, mut cache_given) = (None, false);
        let mut options = Options::new();
        for option in found {
            let option = self.checked(&c, option)?;
            match option.value {
                'c' => {
                    let Some(cache) = cache::parse(&option.arg) else {
                        self.complain(&format!("Invalid cache option: {}", option.arg));
                        return Err(Failed::Refused);
                    };
                    flags = NodeFlags {
                        direct: cache.direct,
                        no_flush: cache.no_flush,
                        ..flags
                    };
                    write_through = cache.write_through;
                    cache_given = true;
                }
                'o' => options.merge(self.option_string(&option.arg)?),
                letter => {
                    if mode.is_some() {
                        self.complain("Only one -r/-w option may be given");
                        return Err(Failed::Refused);
                    }
                    mode = Some(letter == 'r');
                }
            }
        }
        if !words.is_empty() {
            return self.usage(&c);
        }
        if mode.is_some() && options.contains("read-only") {
            self.complain("Cannot set both -r/-w and 'read-only'");
            return Err(Failed::Refused);
        }
        if cache_given && (options.contains("cache.direct") || options.contains("cache.no-flush")) {
            self.complain("Cannot set both -c and the cache options");
            return Err(Failed::Refused);
        }
        if !flags.read_only
            && mode.is_none()
            && matches!(options.get_str("read-only").as_deref(), Some("on"))
        {
            // Only -r gives the permission to write back first.
            let text = format!(
                "Read-only block node '{}' cannot support read-write users",
                backend.root().name()
            );
            self.complain(&text);
            return Err(Failed::Refused);
        }
        flags.read_only = mode.unwrap_or(flags.read_only);
        let taken = [
            ("read-only", &mut flags.read_only),
            ("cache.direct", &mut flags.direct),
            ("cache.no-flush", &mut flags.no_flush),
        ];
        for (key, flag) in taken {
            match options.take_bool(key) {
                Ok(value) => *flag = value.unwrap_or(*flag),
                Err(e) => return self.complain_of("", &e),
            }
        }
        match options.take_str("discard").as_deref() {
            None => {}
            Some("unmap" | "on") => flags.unmap = true,
            Some("ignore" | "off") => flags.unmap = false,
            Some(_) => {
                self.complain("Invalid discard option");
                return Err(Failed::Refused);
            }
        }
        self.finish_all().await;
        match backend.reopen(flags, write_through, options).await {
            Ok(()) => Ok(Done::Nothing),
            Err(e) => self.complain_of("", &e),
        }
    }

    pub(crate) async fn truncate(&mut self, c: Call<'_>) -> Ran {
        let (found, words) = self.options(&c, "m:");
        let mut preallocation = Preallocation::Off;
        for option in found {
            let option = self.checked(&c, option)?;
            let Some(mode) = Preallocation::from_name(&option.arg) else {
                self.complain(&format!("Invalid preallocation mode '{}'", option.arg));
                return Err(Failed::Refused);
            };
            preallocation = mode;
        }
        // A missing length is a wrong one; and the line names the first word behind the command, even where that is `-m`.
        let length = words.first().map_or("", String::as_str);
        let bytes = size_shown_as(length, &c.args[0]).or_else(|e| self.number_error(&e))?;
        let backend = self.backend()?;
        let request = TruncateRequest {
            bytes,
            exact: false,
            preallocation,
            zero_new_area: false,
        };
        match self.wait(async { backend.truncate(request).await }).await {
            Ok(()) => Ok(Done::Nothing),
            Err(e) => self.complain_of("", &e),
        }
    }

    pub(crate) async fn sleep(&mut self, c: Call<'_>) -> Ran {
        let Some(ms) = strtol(&c.args[0]).and_then(|n| u64::try_from(n).ok()) else {
            return self.fail(&format!("{} is not a valid number", c.args[0]));
        };
        self.wait(tokio::time::sleep(Duration::from_millis(ms)))
            .await;
        Ok(Done::Nothing)
    }

    pub(crate) fn sigraise(&mut self, c: Call<'_>) -> Ran {
        let text = &c.args[0];
        let number = size(text).or_else(|e| self.number_error(&e))?;
        if number > 65 {
            return self.fail(&format!(
                "signal argument '{text}' is too large to be a valid signal"
            ));
        }
        self.output.flush();
        crate::signal::raise(number as i32);
        Ok(Done::Nothing)
    }

    /// Breakpoints live in a node that this release doesn't have; without it the answers are these.
    pub(crate) fn breakpoint(&mut self, c: Call<'_>) -> Ran {
        let unsupported = strerror(libc::ENOTSUP);
        match c.command.verb {
            Verb::Break => self.fail(&format!("Could not set breakpoint: {unsupported}")),
            Verb::RemoveBreak => self.fail(&format!(
                "Could not remove breakpoint {}: {unsupported}",
                c.args[0]
            )),
            Verb::Resume => self.fail(&format!("Could not resume request: {unsupported}")),
            // Without breakpoints nothing ever gets suspended, and waiting for it would never end.
            _ => self.fail(&format!("Could not wait for a breakpoint: {unsupported}")),
        }
    }

    /// No node of this release has zones. What is wrong with the words is still said first.
    pub(crate) fn zone(&mut self, c: Call<'_>) -> Ran {
        let backend = self.backend()?;
        let mut errno = libc::ENOTSUP;
        if c.command.verb == Verb::ZoneAppend {
            self.zone_append_words(&c)?;
        } else {
            let offset = size(&c.args[0]).or_else(|e| self.number_error(&e))?;
            let count = size(&c.args[1]).or_else(|e| self.number_error(&e))?;
            let end = offset.saturating_add(count);
            if c.command.verb != Verb::ZoneReport && end > backend.length() {
                errno = libc::EIO;
            }
            if c.command.verb == Verb::ZoneReport && count > u64::from(u32::MAX) {
                return self.fail("Number of zones must be less than 2^32");
            }
        }
        let what = c.command.name.replace('_', " ");
        self.fail(&format!("{what} failed: {}", strerror(errno)))
    }

    /// Checks the words of `zone_append`. Any option is as good as `-p`, which asks for the sector that was written to.
    fn zone_append_words(&mut self, c: &Call<'_>) -> Result<(), Failed> {
        let mut options = Getopt::new(c.args, "p", &[]);
        if let Some(Err(e)) = options.next() {
            self.output.err(&format!("{}: {}", c.name, e.text()));
        }
        while options.next().is_some() {}
        let words = options.positionals();
        self.vector(c, &words).map(|_| ())
    }
}

/// An empty file in `dir` under a new name. It is removed when the name is dropped.
fn unused_name(dir: &str) -> blockcore::Result<TempPath> {
    let mut refused = None;
    let made = tempfile::Builder::new().prefix("vl.").make_in(dir, |path| {
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        file.inspect_err(|e| refused = Some((path.to_owned(), e.raw_os_error())))
    });
    made.map(NamedTempFile::into_temp_path).map_err(|e| {
        // What the host said: the library's own error has lost the number.
        let (path, errno) = refused.unwrap_or_else(|| (dir.into(), e.raw_os_error()));
        let what = format!("Could not open temporary file '{}'", path.display());
        BlockError::from_errno(errno.unwrap_or(libc::EIO)).context(what)
    })
}
