//! Network interfaces of the calling thread's network namespace.

use std::fmt;

use crate::{Error, Result, sys};

/// A network interface, by its index; the name is for messages.
///
/// Looked up in the network namespace of the calling thread, as every operation on it is carried out there.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Interface {
    index: u32,
    name: String,
}

impl Interface {
    /// The interface of this name.
    ///
    /// # Errors
    /// [`Error::UnknownInterface`] when there is none.
    pub fn by_name(name: &str) -> Result<Self> {
        match sys::net::index_of(name) {
            Some(index) => Ok(Self { index, name: name.to_owned() }),
            None => Err(Error::UnknownInterface { interface: name.to_owned() }),
        }
    }

    /// The interface of this index.
    ///
    /// # Errors
    /// [`Error::UnknownInterface`] when there is none.
    pub fn by_index(index: u32) -> Result<Self> {
        match sys::net::name_of(index) {
            Some(name) => Ok(Self { index, name }),
            None => Err(Error::UnknownInterface { interface: index.to_string() }),
        }
    }

    /// The kernel's index, unique in its network namespace.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The name at the time of the look-up.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
