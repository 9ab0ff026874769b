// SPDX-License-Identifier: MIT OR Apache-2.0
//! [`BlockError`]: what went wrong, where, and which errno a tool would print for it.
//!
//! Every fallible call of the block layer ends here. The kind says what a program may do about it, the errno is what
//! QEMU's tools print as text, the message is for people. A source is never repeated in the outer text.

use std::error::Error as StdError;
use std::fmt;
use std::io;

/// What a program may want to tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The host failed a read, a write, a flush ...
    Io,
    /// There is no room left on the host.
    NoSpace,
    /// The node, or the host's file, is read-only.
    ReadOnly,
    /// The image contradicts itself; it has been, or should be, marked corrupt.
    Corrupt,
    /// Somebody else holds a lock on the image.
    Locked,
    /// The driver, the format version or this release can't do it.
    Unsupported,
    /// What is there is no valid image of the format.
    InvalidImage,
    /// An argument or option makes no sense.
    InvalidArgument,
    /// The request reaches past the end of the disk, or can't be addressed.
    OutOfRange,
    /// The file, node or driver does not exist.
    NotFound,
    /// The host, or the [`OpenPolicy`](crate::OpenPolicy), does not allow it.
    PermissionDenied,
    /// The operation was cancelled.
    Cancelled,
}

/// The operation that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Op {
    Open,
    Close,
    Read,
    Write,
    WriteZeroes,
    Discard,
    BlockStatus,
    Flush,
    Truncate,
    Length,
    Lock,
    Create,
    Check,
    Reopen,
    CopyRange,
    Snapshot,
    Amend,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Open => "open",
            Op::Close => "close",
            Op::Read => "read",
            Op::Write => "write",
            Op::WriteZeroes => "zero write",
            Op::Discard => "discard",
            Op::BlockStatus => "block status",
            Op::Flush => "flush",
            Op::Truncate => "truncate",
            Op::Snapshot => "snapshot",
            Op::Amend => "amend",
            Op::Length => "length",
            Op::Lock => "lock",
            Op::Create => "create",
            Op::Check => "check",
            Op::Reopen => "reopen",
            Op::CopyRange => "copy range",
        })
    }
}

/// The result of every block-layer call.
pub type Result<T, E = BlockError> = std::result::Result<T, E>;

/// An error of the block layer. One machine word; the details are on the heap.
///
/// ```
/// use blockcore::{BlockError, ErrorKind};
/// let err = BlockError::from_errno(libc::ENOSPC).context("Could not resize image");
/// assert_eq!(err.kind(), ErrorKind::NoSpace);
/// assert_eq!(err.errno(), libc::ENOSPC);
/// assert_eq!(err.to_string(), "Could not resize image: No space left on device");
/// ```
#[derive(Debug)]
pub struct BlockError(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    errno: i32,
    op: Option<Op>,
    node: Option<String>,
    offset: Option<u64>,
    message: Option<String>,
    hint: Option<String>,
    source: Option<Box<dyn StdError + Send + Sync>>,
}

impl BlockError {
    /// An error of a kind, with a text for people and the kind's usual errno.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> BlockError {
        let mut err = BlockError::with_errno(kind, errno_of(kind));
        err.0.message = Some(message.into());
        err
    }

    /// An error that has an errno and no more.
    pub fn from_errno(errno: i32) -> BlockError {
        BlockError::with_errno(kind_of(errno), errno)
    }

    /// What the host's kernel answered.
    pub fn from_io(source: io::Error) -> BlockError {
        let errno = source.raw_os_error().unwrap_or(libc::EIO);
        let mut err = BlockError::with_errno(kind_of(errno), errno);
        err.0.source = Some(Box::new(source));
        err
    }

    /// Shorthand for [`ErrorKind::Unsupported`].
    pub fn unsupported(message: impl Into<String>) -> BlockError {
        BlockError::new(ErrorKind::Unsupported, message)
    }

    /// Shorthand for [`ErrorKind::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> BlockError {
        BlockError::new(ErrorKind::InvalidArgument, message)
    }

    /// Shorthand for [`ErrorKind::Corrupt`].
    pub fn corrupt(message: impl Into<String>) -> BlockError {
        BlockError::new(ErrorKind::Corrupt, message)
    }

    fn with_errno(kind: ErrorKind, errno: i32) -> BlockError {
        let (op, node, offset, message, hint, source) = (None, None, None, None, None, None);
        BlockError(Box::new(Inner {
            kind,
            errno,
            op,
            node,
            offset,
            message,
            hint,
            source,
        }))
    }

    /// Puts `outer: ` before the text.
    pub fn context(mut self, outer: impl fmt::Display) -> BlockError {
        self.0.message = Some(format!("{outer}: {}", self.text()));
        self
    }

    /// Replaces the text for people, keeping kind, errno and source.
    pub fn message(mut self, text: impl Into<String>) -> BlockError {
        self.0.message = Some(text.into());
        self
    }

    /// Says which operation failed, if that is not known yet.
    pub fn during(mut self, op: Op) -> BlockError {
        self.0.op.get_or_insert(op);
        self
    }

    /// Says which node the error comes from, if that is not known yet.
    pub fn on_node(mut self, node: &str) -> BlockError {
        if self.0.node.is_none() {
            self.0.node = Some(node.to_owned());
        }
        self
    }

    /// Says at which byte offset, if that is not known yet.
    pub fn at(mut self, offset: u64) -> BlockError {
        self.0.offset.get_or_insert(offset);
        self
    }

    /// Replaces the errno, keeping the kind.
    pub fn errno_is(mut self, errno: i32) -> BlockError {
        self.0.errno = errno;
        self
    }

    /// Says what caused it, or what else there is to know of it.
    pub fn caused_by(mut self, source: impl StdError + Send + Sync + 'static) -> BlockError {
        self.0.source = Some(Box::new(source));
        self
    }

    /// Adds a line that a tool prints below the error.
    pub fn hint(mut self, hint: impl Into<String>) -> BlockError {
        self.0.hint = Some(hint.into());
        self
    }

    /// What a program may do about it.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno that stands for the error, always positive.
    pub fn errno(&self) -> i32 {
        self.0.errno
    }

    /// The operation that failed, where known.
    pub fn op(&self) -> Option<Op> {
        self.0.op
    }

    /// The name of the node that failed, where known.
    pub fn node(&self) -> Option<&str> {
        self.0.node.as_deref()
    }

    /// The byte offset of the failure on that node, where known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// The line that a tool prints below the error, such as `Is another process using the image [f]?`.
    pub fn hint_text(&self) -> Option<&str> {
        self.0.hint.as_deref()
    }

    /// The C library's text of the errno: `No such file or directory`.
    pub fn strerror(&self) -> String {
        strerror(self.0.errno)
    }

    /// The message, or the errno's text where there is none. This is what the tools print.
    pub fn text(&self) -> String {
        self.0.message.clone().unwrap_or_else(|| self.strerror())
    }

    /// The same error once more, for a second waiter. The source becomes text.
    pub fn duplicate(&self) -> BlockError {
        let i = &*self.0;
        let source = i
            .source
            .as_ref()
            .map(|s| Box::<dyn StdError + Send + Sync>::from(s.to_string()));
        BlockError(Box::new(Inner {
            kind: i.kind,
            errno: i.errno,
            op: i.op,
            node: i.node.clone(),
            offset: i.offset,
            message: i.message.clone(),
            hint: i.hint.clone(),
            source,
        }))
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let i = &*self.0;
        match (&i.message, i.op) {
            (Some(message), _) => f.write_str(message),
            (None, None) => f.write_str(&self.strerror()),
            (None, Some(op)) => {
                write!(f, "{op} failed")?;
                if let Some(offset) = i.offset {
                    write!(f, " at {offset:#x}")?;
                }
                if let Some(node) = &i.node {
                    write!(f, " on {node}")?;
                }
                write!(f, ": {}", self.strerror())
            }
        }
    }
}

impl StdError for BlockError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0
            .source
            .as_ref()
            .map(|s| &**s as &(dyn StdError + 'static))
    }
}

impl From<io::Error> for BlockError {
    fn from(source: io::Error) -> BlockError {
        BlockError::from_io(source)
    }
}

/// The C library's text of an errno, without number.
pub fn strerror(errno: i32) -> String {
    let text = io::Error::from_raw_os_error(errno).to_string();
    match text.rfind(" (os error ") {
        Some(end) => text[..end].to_owned(),
        None => text,
    }
}

fn errno_of(kind: ErrorKind) -> i32 {
    match kind {
        ErrorKind::Io | ErrorKind::Corrupt | ErrorKind::OutOfRange => libc::EIO,
        ErrorKind::NoSpace => libc::ENOSPC,
        ErrorKind::ReadOnly => libc::EACCES,
        ErrorKind::Locked => libc::EAGAIN,
        ErrorKind::Unsupported => libc::ENOTSUP,
        ErrorKind::InvalidImage | ErrorKind::InvalidArgument => libc::EINVAL,
        ErrorKind::NotFound => libc::ENOENT,
        ErrorKind::PermissionDenied => libc::EPERM,
        ErrorKind::Cancelled => libc::ECANCELED,
    }
}

fn kind_of(errno: i32) -> ErrorKind {
    match errno {
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => ErrorKind::NoSpace,
        libc::EROFS => ErrorKind::ReadOnly,
        libc::EAGAIN => ErrorKind::Locked,
        libc::ENOTSUP | libc::ENOSYS => ErrorKind::Unsupported,
        libc::EINVAL => ErrorKind::InvalidArgument,
        libc::ENOENT => ErrorKind::NotFound,
        libc::EPERM | libc::EACCES => ErrorKind::PermissionDenied,
        libc::ECANCELED => ErrorKind::Cancelled,
        _ => ErrorKind::Io,
    }
}
