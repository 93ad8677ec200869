//! The laboratory's error: which object, what was tried, what the system said.

use std::io;

/// What can go wrong while a laboratory is set up or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The process lacks the privileges a laboratory needs.
    #[error("cannot {action}: this needs root (CAP_SYS_ADMIN and CAP_NET_ADMIN): {source}")]
    Privilege {
        /// What was tried.
        action: String,
        /// The system's answer.
        source: io::Error,
    },
    /// No interface of that name in the namespace.
    #[error("namespace {namespace}: no interface named {device}")]
    NoSuchDevice {
        /// The namespace's label.
        namespace: String,
        /// The name that was looked up.
        device: String,
    },
    /// A system call or netlink request failed.
    #[error("cannot {action}: {source}")]
    System {
        /// What was tried, with the name of its object.
        action: String,
        /// The system's answer.
        source: io::Error,
    },
}

/// The laboratory's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether the kernel was built without what was asked for.
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::System { source, .. } if source.raw_os_error() == Some(libc::EOPNOTSUPP))
    }

    /// Sorts an OS error: a refused permission is a message about privileges.
    pub(crate) fn new(action: impl Into<String>, source: io::Error) -> Self {
        let action = action.into();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Privilege { action, source },
            _ => Self::System { action, source },
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Privilege { .. } => io::ErrorKind::PermissionDenied,
            Error::NoSuchDevice { .. } => io::ErrorKind::NotFound,
            Error::System { source, .. } => source.kind(),
        };
        io::Error::new(kind, error)
    }
}

/// Names what was tried when a result is an OS error.
pub(crate) trait Context<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::new(action(), source))
    }
}
