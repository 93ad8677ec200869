//! Network interfaces of the calling thread's network namespace.

use std::{
    fmt,
    hash::{Hash, Hasher},
};

use crate::{
    Error, Result,
    sys::{self, device::Device},
};

/// A network interface, by its index; the name is for messages.
///
/// Looked up in the network namespace of the calling thread, as every operation on it is carried out there.
#[derive(Clone, Debug)]
pub struct Interface {
    index: u32,
    name: String,
    mac: Option<[u8; 6]>,
}

impl PartialEq for Interface {
    fn eq(&self, other: &Self) -> bool {
        (self.index, &self.name) == (other.index, &other.name)
    }
}

impl Eq for Interface {}

impl Hash for Interface {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.index, &self.name).hash(state);
    }
}

impl Interface {
    /// The interface of this name.
    ///
    /// # Errors
    /// [`Error::UnknownInterface`] when there is none.
    pub fn by_name(name: &str) -> Result<Self> {
        match sys::net::index_of(name) {
            Some(index) => Ok(Self { index, name: name.to_owned(), mac: mac_of(index) }),
            None => Err(Error::UnknownInterface { interface: name.to_owned() }),
        }
    }

    /// The interface of this index.
    ///
    /// # Errors
    /// [`Error::UnknownInterface`] when there is none.
    pub fn by_index(index: u32) -> Result<Self> {
        match sys::net::name_of(index) {
            Some(name) => Ok(Self { index, name, mac: mac_of(index) }),
            None => Err(Error::UnknownInterface { interface: index.to_string() }),
        }
    }

    /// Refuses an interface whose frames programs would misread: they parse Ethernet headers.
    pub(crate) fn check_ethernet(&self) -> Result<()> {
        let device = self.describe()?;
        if device.is_ethernet() {
            return Ok(());
        }
        Err(Error::NotEthernet { interface: self.name.clone(), link_type: device.type_name() })
    }

    pub(crate) fn describe(&self) -> Result<Device> {
        sys::device::describe(self.index).map_err(|cause| match cause.raw_os_error() {
            Some(libc::ENODEV) => Error::UnknownInterface { interface: self.name.clone() },
            _ => Error::Interface { interface: self.name.clone(), operation: "read its link type", cause },
        })
    }

    /// The kernel's index, unique in its network namespace.
    #[must_use]
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The MAC address at the time of the look-up; `None` for a device without one.
    #[must_use]
    pub fn mac(&self) -> Option<[u8; 6]> {
        self.mac
    }

    /// The name at the time of the look-up.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }
}

/// An interface without one, or that is gone by now, has none.
fn mac_of(index: u32) -> Option<[u8; 6]> {
    sys::device::describe(index).ok()?.mac
}

impl fmt::Display for Interface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}
