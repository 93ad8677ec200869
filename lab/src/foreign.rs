//! What other programs with the right to do so can do to an XDP program that is attached by a BPF link: find the link by its id,
//! detach it, exchange its program. That takes CAP_SYS_ADMIN, as `bpftool link detach id N` does.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use crate::error::{Context, Result};
use crate::namespace::Namespace;
use crate::sys;

impl Namespace {
    /// The id of the XDP program that an interface runs; `None` when it runs none.
    pub fn xdp_program(&self, dev: &str) -> Result<Option<u32>> {
        self.netlink().xdp_program(dev).context(|| self.about(dev, "look for its XDP program"))
    }

    /// Detaches the XDP link of an interface, whoever holds it.
    pub fn detach_link(&self, dev: &str) -> Result<()> {
        let detach = || sys::bpf::link_detach(self.xdp_link(dev)?.as_fd());
        detach().context(|| self.about(dev, "detach its XDP link"))
    }

    /// Exchanges the program of the XDP link of an interface for one that answers `action` to every packet.
    pub fn exchange_program(&self, dev: &str, action: u32) -> Result<()> {
        let exchange = || {
            let program = sys::bpf::load_xdp_return("stranger", action as i32, true)?;
            sys::bpf::link_update(self.xdp_link(dev)?.as_fd(), program.as_fd())
        };
        exchange().context(|| self.about(dev, "exchange the program of its XDP link"))
    }

    fn xdp_link(&self, dev: &str) -> io::Result<OwnedFd> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, "it has no XDP link");
        let program = self.netlink().xdp_program(dev)?.ok_or_else(missing)?;
        sys::bpf::xdp_link_of(program)?.ok_or_else(missing)
    }
}
