// SPDX-License-Identifier: MIT OR Apache-2.0
//! Changing what an image was created with: version, passwords, refcount width, data file, lazy refcounts, length. Called by `driver`; `amend_version` is the
//! part that changes the version.
//!
//! Options are all looked at before the first one takes effect. They take effect one after the other, in QEMU's order: what a newer version is needed for
//! comes after the upgrade, and a downgrade comes last. An error leaves those before it done.

use std::sync::{Arc, Mutex, MutexGuard};

use blockcore::{
    AmendProgress, BlockError, CreateOption, MAX_LENGTH_BYTES, OptionKind, Options, Result,
    TruncateRequest,
};

use luks::SlotChange;

use crate::create::option;
use crate::crypto;
use crate::header::{AUTOCLEAR_DATA_FILE_RAW, Compatible, Header};
use crate::image::Image;
use crate::overhaul::Overhaul;

/// Byte offset of the compatible feature bits in the header.
const COMPATIBLE_OFFSET: u64 = 80;

/// What `amend` knows, in the order in which tools show it.
pub fn amend_options() -> &'static [CreateOption] {
    const OPTIONS: &[CreateOption] = &[
        option(
            "backing_file",
            OptionKind::String,
            "Name of the backing file; can't be changed here, see rebase",
            None,
        ),
        option(
            "backing_fmt",
            OptionKind::String,
            "Format of the backing file; can't be changed here, see rebase",
            None,
        ),
        option(
            "compat",
            OptionKind::String,
            "Format version: v2 (0.10) or v3 (1.1)",
            None,
        ),
        option(
            "data_file",
            OptionKind::String,
            "Name of the external data file",
            None,
        ),
        option(
            "data_file_raw",
            OptionKind::Bool,
            "Keep the external data file valid as a raw image; can only be turned off",
            None,
        ),
        option(
            "encrypt.state",
            OptionKind::String,
            "What becomes of key slots: active or inactive",
            None,
        ),
        option(
            "encrypt.new-secret",
            OptionKind::String,
            "Id of the secret that is the password of a slot that becomes active",
            None,
        ),
        option(
            "encrypt.old-secret",
            OptionKind::String,
            "Id of the secret that is the password of slots that become inactive",
            None,
        ),
        option(
            "encrypt.keyslot",
            OptionKind::Number,
            "The slot, from 0 to 7",
            None,
        ),
        option(
            "encrypt.iter-time",
            OptionKind::Number,
            "Milliseconds that it takes to try the new password: 2000 if not given",
            None,
        ),
        option(
            "lazy_refcounts",
            OptionKind::Bool,
            "Let refcounts be written late",
            None,
        ),
        option(
            "refcount_bits",
            OptionKind::Number,
            "Bits in a refcount",
            None,
        ),
        option("size", OptionKind::Size, "Length of the disk", None),
    ];
    OPTIONS
}

/// Options that have been looked at; `None`: as it is.
#[derive(Clone, Debug)]
struct Request {
    version: u32,
    lazy: Option<bool>,
    refcount_order: u32,
    size: Option<u64>,
    slots: Option<SlotChange>,
    /// The name of the external data file; empty: it has none in the image.
    data_file: Option<String>,
    data_file_raw: Option<bool>,
}

impl Request {
    fn new(options: &mut Options, header: &Header) -> Result<Request> {
        let version = take_version(options, header)?;
        // As QEMU has it, a length of 0 is no length.
        let size = options.take_size("size")?.filter(|size| *size > 0);
        let backing = (
            options.take_str("backing_file"),
            options.take_str("backing_fmt"),
        );
        let lazy = options.take_bool("lazy_refcounts")?;
        let refcount_order = take_refcount_order(options, header, version)?;
        let (data_file, data_file_raw) = take_data_file(options, header)?;
        check_same_backing(backing, header)?;
        let is_lazy = header.compatible.contains(Compatible::LAZY_REFCOUNTS);
        if lazy == Some(true) && !is_lazy && version < 3 {
            let text = "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)";
            return Err(BlockError::invalid(text));
        }
        let slots = crypto::take_slot_change(options, header.crypt_method)?;
        if version < 3 && refcount_order != 4 {
            return Err(BlockError::invalid("compat=0.10 requires refcount_bits=16"));
        }
        Ok(Request {
            version,
            slots,
            lazy,
            refcount_order,
            size,
            data_file,
            data_file_raw,
        })
    }
}

fn take_version(options: &mut Options, header: &Header) -> Result<u32> {
    let compat = options.take_str("compat");
    match compat.as_deref() {
        None => Ok(header.version),
        Some("0.10" | "v2") => Ok(2),
        Some("1.1" | "v3") => Ok(3),
        Some(other) => {
            let text = format!("Unknown compatibility level {other}");
            Err(BlockError::invalid(text))
        }
    }
}

fn take_refcount_order(options: &mut Options, header: &Header, version: u32) -> Result<u32> {
    let before = 1 << header.refcount_order;
    let bits = options.take_number("refcount_bits")?.unwrap_or(before);
    if !bits.is_power_of_two() || bits > 64 {
        let text = "Refcount width must be a power of two and may not exceed 64 bits";
        return Err(BlockError::invalid(text));
    }
    if version < 3 && bits != 16 && bits != before {
        let text = "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or greater)";
        return Err(BlockError::invalid(text));
    }
    Ok(bits.trailing_zeros())
}

/// The name of the data file, and whether it reads as the disk does.
fn take_data_file(
    options: &mut Options,
    header: &Header,
) -> Result<(Option<String>, Option<bool>)> {
    let name = options.take_str("data_file");
    let raw = options.take_bool("data_file_raw")?;
    if name.is_some() && !header.has_data_file() {
        let text = "data-file can only be set for images that use an external data file";
        return Err(BlockError::invalid(text));
    }
    if raw == Some(true) && !header.is_data_file_raw() {
        let text = "data-file-raw cannot be set on existing images";
        return Err(BlockError::invalid(text));
    }
    Ok((name, raw))
}

/// The backing file stays what it is: only its own name is as good as none.
fn check_same_backing(wanted: (Option<String>, Option<String>), header: &Header) -> Result<()> {
    let is = header.backing.as_ref();
    let name = is.map(|backing| backing.filename.clone());
    let is = (name, is.and_then(|backing| backing.format.clone()));
    if wanted == (None, None) || wanted == is {
        return Ok(());
    }
    let text = "Cannot amend the backing file";
    let hint = "You can use 'qemu-img rebase' instead.";
    Err(BlockError::invalid(text).hint(hint))
}

/// How far an amending is in which one thing with many steps is done after the other. `QEMU: qcow2_amend_helper_cb`: what comes later counts for as many steps
/// as what is being done.
#[derive(Clone)]
pub(crate) struct Steps(Arc<Mutex<StepCount>>);

struct StepCount {
    progress: AmendProgress,
    /// So many things are still to be done after this one.
    later: u64,
    /// Steps of what is done.
    before: u64,
    /// Steps of what is being done.
    current: u64,
}

impl Steps {
    fn new(progress: AmendProgress, things: u64) -> Steps {
        Steps(Arc::new(Mutex::new(StepCount {
            progress,
            later: things.saturating_sub(1),
            before: 0,
            current: 0,
        })))
    }

    fn count(&self) -> MutexGuard<'_, StepCount> {
        self.0
            .lock()
            .expect("no code panics while it holds this lock")
    }

    /// How far it is with what is being done.
    pub fn tell(&self, done: u64, total: u64) {
        let mut count = self.count();
        count.current = total;
        let all = count.before + total * (1 + count.later);
        count.progress.tell(count.before + done, all);
    }

    /// The next thing begins.
    fn next(&self) {
        let mut count = self.count();
        if count.current > 0 {
            count.before += std::mem::take(&mut count.current);
            count.later = count.later.saturating_sub(1);
        }
    }
}

impl Image {
    /// Changes options of the image, and tells how far it is.
    ///
    /// # Errors
    /// `InvalidArgument` for options that make no sense or can't be changed, before anything is; those of metadata I/O.
    pub async fn amend(
        self: &Arc<Self>,
        mut options: Options,
        progress: &AmendProgress,
    ) -> Result<()> {
        self.check_sound()?;
        let force = options.take_bool("force")?.unwrap_or(false);
        let header = self.header().clone();
        let request = Request::new(&mut options, &header)?;
        if let Some((key, _)) = options.iter().next() {
            let text = format!("Invalid parameter '{key}'");
            return Err(BlockError::invalid(text));
        }
        let things = u64::from(request.version != header.version)
            + u64::from(request.refcount_order != header.refcount_order)
            + u64::from(request.slots.is_some());
        let steps = Steps::new(progress.clone(), things);
        if request.version > header.version {
            self.change_version(3, &steps).await?;
            steps.next();
        }
        if let Some(change) = request.slots {
            self.change_slots(change, force).await?;
        }
        if request.refcount_order != header.refcount_order {
            let (order, told) = (request.refcount_order, steps.clone());
            let work =
                move |image: Arc<Image>| async move { image.change_order(order, &told).await };
            self.spawn_alone(0, MAX_LENGTH_BYTES, work).await?;
            steps.next();
        }
        self.change_data_file(request.data_file, request.data_file_raw)
            .await?;
        if let Some(lazy) = request.lazy.filter(|_| request.version >= 3) {
            self.change_lazy(lazy).await?;
        }
        if let Some(size) = request.size {
            let mut resize = TruncateRequest::to(size);
            resize.exact = true;
            self.truncate(resize).await?;
        }
        if request.version < header.version {
            self.change_version(2, &steps).await?;
        }
        Ok(())
    }

    /// Gives every refcount another width. The caller holds `changing` over all.
    async fn change_order(self: Arc<Self>, order: u32, steps: &Steps) -> Result<()> {
        let overhaul = Overhaul::begin_with_order(&self, order, steps).await?;
        let mut header = self.header().clone();
        header.refcount_order = order;
        overhaul.finish(header, self.l1.to_vec()).await
    }

    /// Gives the external data file another name, an empty one for none, or says whether it reads as the disk does. The file that is open stays open.
    async fn change_data_file(
        self: &Arc<Self>,
        name: Option<String>,
        raw: Option<bool>,
    ) -> Result<()> {
        if name.is_none() && raw.is_none() {
            return Ok(());
        }
        let work = move |image: Arc<Image>| async move {
            let change = |header: &mut Header| {
                if let Some(name) = name {
                    header.name_data_file(&name);
                }
                if raw == Some(false) {
                    header.autoclear &= !AUTOCLEAR_DATA_FILE_RAW;
                }
            };
            image.rewrite_header(change).await
        };
        self.spawn_alone(0, MAX_LENGTH_BYTES, work).await
    }

    async fn change_lazy(self: &Arc<Self>, lazy: bool) -> Result<()> {
        let mut features = self.header().compatible;
        if features.contains(Compatible::LAZY_REFCOUNTS) == lazy {
            return Ok(());
        }
        features.set(Compatible::LAZY_REFCOUNTS, lazy);
        let bytes = features.bits().to_be_bytes().to_vec();
        self.write_header_bytes(COMPATIBLE_OFFSET, bytes).await?;
        self.header().compatible = features;
        Ok(())
    }
}
