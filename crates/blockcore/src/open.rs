// SPDX-License-Identifier: MIT OR Apache-2.0
//! Opening: the [`Registry`] of drivers, [`OpenOptions`], and how a name becomes a chain of nodes. `QEMU: bdrv_open_inherit`.
//!
//! A name or a set of options becomes a *format* node over a *protocol* node; the format's header may name a backing file, and that becomes a
//! chain of its own. Names that come out of an image are somebody else's words: they are followed only as the [`OpenPolicy`] says, and the
//! format is guessed only where the caller allows it.

use std::sync::{Arc, Mutex};

use tokio::task::JoinSet;

use crate::backend::Backend;
use crate::buffer::IoBufMut;
use crate::child::{Child, ChildRole};
use crate::driver::{BackingName, DriverFactory, ReadFlags};
use crate::error::{BlockError, ErrorKind, Op, Result};
use crate::name::resolve_beside;
use crate::node::{Node, NodeConfig, NodeFlags, SECTOR_BYTES};
use crate::options::{OptionValue, Options};
use crate::perm::Permissions;
use crate::policy::OpenPolicy;
use crate::registry::{Diagnostics, Registry};

mod create;

pub use create::CreateContext;

/// How many bytes of an image the drivers see to recognise it: the first sector. `raw` refuses writes there that would make a guessed image look like
/// another format's, and what it can't see must not count.
pub const PROBE_BYTES: usize = SECTOR_BYTES as usize;

/// The longest backing chain that is opened.
pub const MAX_CHAIN_DEPTH: usize = 200;

/// How to open a disk. The defaults are those of a careful library: nothing that images name is opened, formats are not guessed, write-back.
///
/// ```no_run
/// # async fn f(registry: &blockcore::Registry) -> blockcore::Result<()> {
/// use blockcore::{OpenOptions, OpenPolicy};
/// let disk = OpenOptions::new()
///     .format("qcow2")
///     .policy(OpenPolicy::Beneath("/srv/images".into()))
///     .open(registry, "/srv/images/vm.qcow2")
///     .await?;
/// let sector = disk.read(0, 512).await?;
/// disk.close().await?;
/// # Ok(()) }
/// ```
#[derive(Clone, Debug, Default)]
pub struct OpenOptions {
    format: Option<String>,
    flags: NodeFlags,
    write_through: bool,
    options: Options,
    policy: OpenPolicy,
    probe: bool,
    no_backing: bool,
    no_io: bool,
    no_share: bool,
    for_check: bool,
    diagnostics: Diagnostics,
}

impl OpenOptions {
    /// The defaults.
    pub fn new() -> OpenOptions {
        OpenOptions::default()
    }

    /// The driver of the top node.
    pub fn format(mut self, name: impl Into<String>) -> Self {
        self.format = Some(name.into());
        self
    }

    /// Lets formats be guessed from what is in the files. A guest that can write to a raw image can make it look like any other.
    pub fn probe(mut self, allowed: bool) -> Self {
        self.probe = allowed;
        self
    }

    /// Opens read-only.
    pub fn read_only(mut self, on: bool) -> Self {
        self.flags.read_only = on;
        self
    }

    /// Bypasses the host's page cache.
    pub fn direct(mut self, on: bool) -> Self {
        self.flags.direct = on;
        self
    }

    /// Lets `flush` do nothing on the host.
    pub fn no_flush(mut self, on: bool) -> Self {
        self.flags.no_flush = on;
        self
    }

    /// Makes every write durable before it is done.
    pub fn write_through(mut self, on: bool) -> Self {
        self.write_through = on;
        self
    }

    /// Passes discards on to the host.
    pub fn unmap(mut self, on: bool) -> Self {
        self.flags.unmap = on;
        self
    }

    /// Takes no locks and respects none; read-only images only.
    pub fn force_share(mut self, on: bool) -> Self {
        self.flags.force_share = on;
        self
    }

    /// Sets the mode as a whole.
    pub fn flags(mut self, flags: NodeFlags) -> Self {
        self.flags = flags;
        self
    }

    /// One more driver option, with a dotted key for a child's (`file.aio`).
    pub fn option(mut self, key: &str, value: impl Into<OptionValue>) -> Self {
        self.options.set(key, value);
        self
    }

    /// More driver options.
    pub fn options(mut self, options: Options) -> Self {
        self.options.merge(options);
        self
    }

    /// Lets nobody else write to the disk or change its length while it is open, not even where its format would put up with it. `force_share`
    /// outdoes it.
    pub fn no_share(mut self, on: bool) -> Self {
        self.no_share = on;
        self
    }

    /// Opens no backing files, so that an image can be looked at alone. What it doesn't hold itself then reads as zero, and so it can't be opened for
    /// writing: copy-on-write would take those zeroes for the truth.
    pub fn no_backing(mut self, on: bool) -> Self {
        self.no_backing = on;
        self
    }

    /// Opens an image to look at it, and never at what it holds: encrypted ones are opened without their keys, and guest data can't be read. Read-only images only.
    pub fn no_io(mut self, on: bool) -> Self {
        self.no_io = on;
        self
    }

    /// Opens the disk for [`Node::check`] and nothing else, so that images can be checked and repaired that are too damaged for any other use. Its driver
    /// may refuse to read and write.
    pub fn for_check(mut self, on: bool) -> Self {
        self.for_check = on;
        self
    }

    /// What may be opened that images name.
    pub fn policy(mut self, policy: OpenPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// Where warnings go.
    pub fn diagnostics(mut self, diagnostics: Diagnostics) -> Self {
        self.diagnostics = diagnostics;
        self
    }

    /// Opens the disk of a file name, which may be a path, `protocol:name` or `json:{...}`.
    ///
    /// # Errors
    /// `NotFound`, `Locked`, `InvalidImage`, `Unsupported` ... with the text that QEMU's tools have for it.
    pub async fn open(self, registry: &Registry, filename: &str) -> Result<Backend> {
        self.open_as(registry, Some(filename.to_owned())).await
    }

    /// Opens the disk that the options alone describe (`driver`, `file.filename` ...).
    ///
    /// # Errors
    /// As [`open`](OpenOptions::open).
    pub async fn open_options(self, registry: &Registry) -> Result<Backend> {
        self.open_as(registry, None).await
    }

    async fn open_as(mut self, registry: &Registry, filename: Option<String>) -> Result<Backend> {
        if self.no_backing && !self.flags.read_only {
            return Err(BlockError::invalid(
                "Without its backing files an image can only be opened read-only",
            ));
        }
        if self.no_io && !self.flags.read_only {
            let text = "Without guest data an image can only be opened read-only";
            return Err(BlockError::invalid(text));
        }
        if let Some(format) = self.format {
            self.options.set("driver", format);
        }
        let shared = Arc::new(Shared {
            registry: registry.clone(),
            probe: self.probe,
            no_backing: self.no_backing,
            no_io: self.no_io,
            policy: self.policy,
            diagnostics: self.diagnostics,
        });
        let permissions = |writable| match Permissions::root(writable) {
            alone if self.no_share && !self.flags.force_share => Permissions {
                shared: Permissions::storage(writable).shared,
                ..alone
            },
            shared => shared,
        };
        let request = NodeRequest {
            filename,
            options: self.options,
            flags: self.flags,
            kind: NodeKind::Format,
            permissions: permissions(!self.flags.read_only),
            ancestors: Vec::new(),
            by_image: false,
            for_check: self.for_check,
        };
        let node = open_node(&shared, request)
            .await
            .map_err(|e| e.during(Op::Open))?;
        let backend = Backend::new(node, self.write_through);
        if backend.root().driver().is_protocol() {
            // No format has done it.
            let mut wanted = permissions(!backend.root().is_read_only());
            if self.flags.force_share {
                wanted = wanted.sharing_all();
            }
            if let Err(e) = backend.root().driver().set_permissions(wanted).await {
                backend.close().await?;
                return Err(e.during(Op::Open));
            }
        }
        if backend.root().is_read_only() && !self.flags.read_only {
            // The options say otherwise than the caller, who counts on being able to write.
            backend.close().await?;
            let err = BlockError::new(ErrorKind::ReadOnly, "Block node is read-only");
            return Err(err.errno_is(libc::EPERM));
        }
        Ok(backend)
    }
}

/// What all nodes of one opening have in common.
struct Shared {
    registry: Registry,
    probe: bool,
    no_backing: bool,
    no_io: bool,
    policy: OpenPolicy,
    diagnostics: Diagnostics,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum NodeKind {
    /// A format over a protocol.
    Format,
    /// A protocol alone: a format's file.
    Protocol,
}

struct NodeRequest {
    filename: Option<String>,
    options: Options,
    flags: NodeFlags,
    kind: NodeKind,
    permissions: Permissions,
    /// The file names of the overlays above, for finding loops.
    ancestors: Vec<String>,
    /// An image named it, so the policy has to allow it.
    by_image: bool,
    /// It is opened for a check alone.
    for_check: bool,
}

/// What a driver's `open` gets to know, and how it opens its children.
pub struct OpenContext<'a> {
    shared: &'a Arc<Shared>,
    flags: NodeFlags,
    filename: String,
    probed: bool,
    permissions: Permissions,
    ancestors: Vec<String>,
    /// An image named the node, or one above it: its options, too, are somebody else's words.
    by_image: bool,
    for_check: bool,
    /// The child `file`, opened before the driver was chosen.
    file: Mutex<Option<Child>>,
}

impl OpenContext<'_> {
    /// Mode of the node that is being opened.
    pub fn flags(&self) -> NodeFlags {
        self.flags
    }

    /// The name the node was opened by; empty where there is none.
    pub fn filename(&self) -> &str {
        &self.filename
    }

    /// Whether the format was guessed.
    pub fn probed(&self) -> bool {
        self.probed
    }

    /// Whether the image is only looked at, so that no key is wanted: see [`OpenOptions::no_io`].
    pub fn no_io(&self) -> bool {
        self.shared.no_io
    }

    /// Whether nothing but a check follows ([`OpenOptions::for_check`]).
    pub fn for_check(&self) -> bool {
        self.for_check
    }

    /// What the parent will do with the node.
    pub fn permissions(&self) -> Permissions {
        self.permissions
    }

    /// Where warnings go, also later.
    pub fn diagnostics(&self) -> &Diagnostics {
        &self.shared.diagnostics
    }

    /// Whether only what the image says of itself is wanted: neither backing files nor external data files are opened.
    pub fn is_without_data(&self) -> bool {
        self.shared.no_backing
    }

    /// The drivers at hand.
    pub fn registry(&self) -> &Registry {
        &self.shared.registry
    }

    /// The child `file` that the options or the name describe.
    ///
    /// # Errors
    /// `InvalidArgument` if they describe none.
    pub fn take_file(&self) -> Result<Child> {
        let taken = self
            .file
            .lock()
            .expect("no code panics while it holds this lock")
            .take();
        taken.ok_or_else(|| BlockError::invalid("A block device must be specified for \"file\""))
    }

    /// Opens a further protocol child from the options below `name.`, or of the name `default`, which came out of the image.
    ///
    /// # Errors
    /// As for opening; `PermissionDenied` where the policy forbids `default`.
    pub async fn open_child(
        &self,
        name: &'static str,
        role: ChildRole,
        options: &mut Options,
        default: Option<&str>,
    ) -> Result<Option<Child>> {
        let own = options.take_subtree(name);
        if let Some(reference) = options.take_str(name) {
            let text = format!("Cannot find device='{reference}' nor node-name='{reference}'");
            return Err(BlockError::new(ErrorKind::NotFound, text));
        }
        let by_image = own.is_empty();
        let filename = if by_image {
            default.map(|d| resolve_beside(&self.filename, d))
        } else {
            None
        };
        if own.is_empty() && filename.is_none() {
            return Ok(None);
        }
        let permissions = match Permissions::storage(!self.flags.read_only) {
            storage if self.flags.force_share => storage.sharing_all(),
            storage => storage,
        };
        let request = NodeRequest {
            filename,
            options: own,
            flags: self.flags,
            kind: NodeKind::Protocol,
            permissions,
            ancestors: self.ancestors.clone(),
            by_image: by_image || self.by_image,
            for_check: false,
        };
        let node = Box::pin(open_node(self.shared, request)).await?;
        let child = Child::new(name, role, node);
        let usable = match child.node().is_read_only() && !self.flags.read_only {
            true => Err(BlockError::new(
                ErrorKind::ReadOnly,
                "Block node is read-only",
            )),
            false => child.driver().set_permissions(permissions).await,
        };
        if let Err(e) = usable {
            child.close().await?;
            return Err(e);
        }
        Ok(Some(child))
    }

    /// Opens the backing chain: the one that the options describe (`backing.*`, or `backing=null` for none), else the one that the image names.
    /// It is opened read-only.
    ///
    /// # Errors
    /// Those of opening it, behind `Could not open backing file: `; `PermissionDenied` where the policy forbids the image's name.
    pub async fn open_backing(
        &self,
        options: &mut Options,
        header: Option<&BackingName>,
    ) -> Result<Option<Child>> {
        let mut own = options.take_subtree("backing");
        match options.take("backing") {
            None => {}
            Some(OptionValue::Null) => return Ok(None),
            Some(OptionValue::Str(s)) if s.is_empty() => {
                self.diagnostics().warn(
                    "warning: Use of \"backing\": \"\" is deprecated; use \"backing\": null instead",
                );
                return Ok(None);
            }
            Some(other) => {
                let text = format!("Cannot find device='{other}' nor node-name='{other}'");
                return Err(BlockError::unsupported(text).context("Could not open backing file"));
            }
        }
        if self.shared.no_backing {
            return Ok(None);
        }
        let named = own.contains("file.filename") || own.contains("file.driver");
        let (filename, by_image) = match header {
            Some(h) if !named && !h.filename.is_empty() => {
                if let Some(format) = &h.format {
                    own.set_default("driver", format.as_str());
                }
                (Some(resolve_beside(&self.filename, &h.filename)), true)
            }
            _ if own.is_empty() => return Ok(None),
            _ => (None, false),
        };
        let wrap = |e: BlockError| e.context("Could not open backing file");
        let mut ancestors = self.ancestors.clone();
        ancestors.push(self.filename.clone());
        if ancestors.len() > MAX_CHAIN_DEPTH {
            let text = format!("The backing chain is longer than {MAX_CHAIN_DEPTH} images");
            return Err(wrap(BlockError::new(ErrorKind::InvalidImage, text)));
        }
        if let Some(name) = &filename
            && ancestors.contains(name)
        {
            let text = format!("The backing chain loops: '{name}' is an overlay of itself");
            return Err(wrap(BlockError::new(ErrorKind::InvalidImage, text)));
        }
        let request = NodeRequest {
            filename,
            options: own,
            flags: NodeFlags {
                read_only: true,
                ..self.flags
            },
            kind: NodeKind::Format,
            // What shows through must not change, whatever format it has.
            permissions: Permissions::storage(false),
            ancestors,
            by_image: by_image || self.by_image,
            for_check: false,
        };
        let node = open_in_task(self.shared, request).await.map_err(wrap)?;
        Ok(Some(Child::new("backing", ChildRole::Backing, node)))
    }
}

/// Opens a node in a task of its own, which ends when the caller's future is dropped: so that the stack is deep enough for one image, whatever the
/// length of the chain that images describe.
async fn open_in_task(shared: &Arc<Shared>, request: NodeRequest) -> Result<Arc<Node>> {
    let shared = shared.clone();
    let mut task = JoinSet::new();
    task.spawn(async move { open_node(&shared, request).await });
    match task.join_next().await {
        Some(Ok(opened)) => opened,
        Some(Err(e)) if e.is_panic() => std::panic::resume_unwind(e.into_panic()),
        _ => Err(BlockError::from_errno(libc::ECANCELED)),
    }
}

async fn open_node(shared: &Arc<Shared>, mut request: NodeRequest) -> Result<Arc<Node>> {
    if request.by_image
        && let Some(name) = request.filename.take()
    {
        request.filename = Some(shared.policy.admit(&name).await?);
    }
    if let Some(json) = request.filename.take_if(|f| f.starts_with("json:")) {
        let mut merged = Options::from_json(&json)?;
        if request.by_image {
            shared.policy.admit_options(&merged)?;
        }
        merged.merge(std::mem::take(&mut request.options));
        request.options = merged;
    }
    let options = &mut request.options;
    let flags = take_node_flags(options, request.flags)?;
    let node_name = options.take_str("node-name");
    if let Some(name) = &node_name {
        check_node_name(name)?;
    }
    let driver_name = options.take_str("driver");
    let driver = driver_name
        .as_deref()
        .map(|n| shared.registry.driver(n).cloned())
        .transpose()?;
    let mut ctx = OpenContext {
        shared,
        flags,
        filename: String::new(),
        probed: false,
        permissions: request.permissions,
        ancestors: request.ancestors,
        by_image: request.by_image,
        for_check: request.for_check,
        file: Mutex::new(None),
    };
    let is_protocol = |d: &Arc<dyn DriverFactory>| d.protocol_name().is_some();
    // A format may lie in a format: only a file that says nothing of its driver is a protocol by its place.
    let on_protocol = driver
        .as_ref()
        .map_or(request.kind == NodeKind::Protocol, is_protocol);
    let driver = if on_protocol {
        protocol_driver(shared, driver, request.filename, options, &mut ctx).await?
    } else {
        let file = open_format_file(shared, request.filename, options, &ctx).await?;
        ctx.filename = file
            .as_ref()
            .map(|f| f.filename().to_owned())
            .unwrap_or_default();
        let driver = match (driver, &file) {
            (Some(driver), _) => driver,
            (None, None) => return Err(BlockError::invalid("Must specify either driver or file")),
            (None, Some(file)) => {
                ctx.probed = true;
                match probe_format(shared, file).await {
                    Ok(driver) => driver,
                    Err(e) => {
                        file.close().await?;
                        return Err(e);
                    }
                }
            }
        };
        if let Some(file) = &file {
            if file.node().is_read_only() && !flags.read_only {
                // Only options of its own can have made it so. The writes would all fail.
                file.close().await?;
                return Err(BlockError::new(
                    ErrorKind::ReadOnly,
                    "Block node is read-only",
                ));
            }
            let wanted = driver.child_permissions(request.permissions, flags.read_only);
            let wanted = if flags.force_share {
                wanted.sharing_all()
            } else {
                wanted
            };
            if let Err(e) = file.driver().set_permissions(wanted).await {
                file.close().await?;
                return Err(e);
            }
        }
        ctx.file = Mutex::new(file);
        driver
    };
    if request.by_image {
        shared.policy.admit_driver(driver.format_name())?;
    }
    let given = options.clone();
    let opened = driver.open(&ctx, options).await;
    let leftover = options.keys().next().map(str::to_owned);
    match (opened, leftover) {
        (Ok(open), None) => {
            let config = NodeConfig {
                name: node_name,
                filename: ctx.filename,
                options: given,
                flags,
            };
            Node::new(open, config).await
        }
        (Ok(open), Some(key)) => {
            let what = if is_protocol(&driver) {
                "protocol"
            } else {
                "format"
            };
            let does_not = if is_protocol(&driver) {
                "doesn't"
            } else {
                "does not"
            };
            let name = driver.format_name();
            let node = Node::new(open, NodeConfig::default()).await?;
            node.add_user();
            node.release().await?;
            Err(BlockError::invalid(format!(
                "Block {what} '{name}' {does_not} support the option '{key}'"
            )))
        }
        (Err(e), _) => {
            let file = ctx
                .file
                .lock()
                .expect("no code panics while it holds this lock")
                .take();
            if let Some(file) = file {
                file.close().await?;
            }
            Err(e)
        }
    }
}

/// The driver of a protocol node, with the file name in the option `filename`.
async fn protocol_driver(
    shared: &Arc<Shared>,
    driver: Option<Arc<dyn DriverFactory>>,
    filename: Option<String>,
    options: &mut Options,
    ctx: &mut OpenContext<'_>,
) -> Result<Arc<dyn DriverFactory>> {
    if let Some(filename) = filename {
        let driver = match driver {
            Some(driver) => driver,
            None => shared.registry.find_protocol(&filename).await?,
        };
        if options.contains("filename") {
            return Err(BlockError::invalid(
                "Can't specify 'file' and 'filename' options at the same time",
            ));
        }
        let prefix = driver
            .protocol_name()
            .map(|p| format!("{p}:"))
            .unwrap_or_default();
        let plain = filename
            .strip_prefix(&prefix)
            .unwrap_or(&filename)
            .to_owned();
        options.set("filename", plain.as_str());
        ctx.filename = plain;
        return Ok(driver);
    }
    ctx.filename = options.get_str("filename").unwrap_or_default();
    match (driver, options.get_str("filename")) {
        (Some(driver), _) => Ok(driver),
        (None, Some(name)) => shared.registry.find_protocol(&name).await,
        (None, None) => Err(BlockError::invalid("Must specify either driver or file")),
    }
}

/// Opens the child `file` of a format node, if the name or the options describe one.
async fn open_format_file(
    shared: &Arc<Shared>,
    filename: Option<String>,
    options: &mut Options,
    ctx: &OpenContext<'_>,
) -> Result<Option<Child>> {
    let own = options.take_subtree("file");
    if let Some(reference) = options.take_str("file") {
        let text = format!("Cannot find device='{reference}' nor node-name='{reference}'");
        return Err(BlockError::new(ErrorKind::NotFound, text));
    }
    if own.is_empty() && filename.is_none() {
        return Ok(None);
    }
    if own.contains("filename") && filename.is_some() {
        return Err(BlockError::invalid(
            "Can't specify 'file' and 'filename' options at the same time",
        ));
    }
    let request = NodeRequest {
        filename,
        options: own,
        flags: ctx.flags,
        kind: NodeKind::Protocol,
        permissions: ctx.permissions,
        ancestors: ctx.ancestors.clone(),
        by_image: ctx.by_image,
        for_check: false,
    };
    let node = Box::pin(open_node(shared, request)).await?;
    Ok(Some(Child::new("file", ChildRole::File, node)))
}

async fn probe_format(shared: &Arc<Shared>, file: &Child) -> Result<Arc<dyn DriverFactory>> {
    if !shared.probe {
        let text = format!(
            "The format of '{}' is not given, and guessing is not allowed",
            file.filename()
        );
        return Err(BlockError::invalid(text));
    }
    let want = (file.length().min(PROBE_BYTES as u64)) as usize;
    let head = file
        .preadv(0, IoBufMut::zeroed(want), ReadFlags::empty())
        .await;
    let head = head.map_err(|e| e.context("Could not read image for determining its format"))?;
    let driver = shared.registry.probe(&head.to_vec()).cloned();
    driver.ok_or_else(|| {
        BlockError::invalid("Could not determine image format: No compatible driver found")
    })
}

/// A node's name is a letter, then letters, digits, `-`, `.` and `_`; 31 bytes at most. `QEMU: id_wellformed`.
fn check_node_name(name: &str) -> Result<()> {
    let is_good = name.starts_with(|c: char| c.is_ascii_alphabetic())
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b));
    if !is_good {
        return Err(BlockError::invalid(format!("Invalid node-name: '{name}'")));
    }
    if name.len() > 31 {
        return Err(BlockError::invalid("Node name too long"));
    }
    Ok(())
}

/// Takes the options that every node has.
fn take_node_flags(options: &mut Options, mut flags: NodeFlags) -> Result<NodeFlags> {
    flags.read_only = options.take_bool("read-only")?.unwrap_or(flags.read_only);
    flags.direct = options.take_bool("cache.direct")?.unwrap_or(flags.direct);
    flags.no_flush = options
        .take_bool("cache.no-flush")?
        .unwrap_or(flags.no_flush);
    flags.force_share = options
        .take_bool("force-share")?
        .unwrap_or(flags.force_share);
    if let Some(discard) = options.take_str("discard") {
        flags.unmap = match discard.as_str() {
            "unmap" | "on" => true,
            "ignore" | "off" => false,
            _ => return Err(BlockError::invalid("Invalid discard option")),
        };
    }
    if flags.force_share && !flags.read_only {
        return Err(BlockError::invalid(
            "force-share=on can only be used with read-only images",
        ));
    }
    Ok(flags)
}
