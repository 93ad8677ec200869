//! TUN devices: interfaces whose frames are bare IP packets, without an Ethernet header.

use std::fs::File;
use std::io::Write as _;

use crate::error::{Context, Result};
use crate::namespace::Namespace;
use crate::sys;

/// A TUN device. It ends when this value is dropped.
#[derive(Debug)]
#[must_use = "dropping the value removes the device"]
pub struct Tun {
    file: File,
    name: String,
}

impl Tun {
    /// Lets the device receive a packet.
    pub fn receive(&mut self, packet: &[u8]) -> Result<()> {
        self.file.write_all(packet).context(|| format!("interface {}: receive a packet", self.name))
    }
}

impl Namespace {
    /// Creates a TUN device, up.
    pub fn add_tun(&self, dev: &str) -> Result<Tun> {
        let open = || {
            let file = File::options().read(true).write(true).open("/dev/net/tun")?;
            sys::socket::make_tun(&file, dev)?;
            Ok(file)
        };
        let file = self.run(open).context(|| self.about(dev, "create the TUN device"))?;
        self.set_up(dev)?;
        Ok(Tun { file, name: dev.to_owned() })
    }
}
