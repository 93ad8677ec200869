//! Network namespaces, topologies and traffic: the laboratory in which xdpkit's tests, examples
//! and benchmarks run against the real kernel.
//!
//! A [`Namespace`] is held by a file descriptor of this process and by nothing else, so a panic,
//! Ctrl-C or `kill -9` leaves nothing behind: with the last descriptor go the interfaces, routes
//! and attached programs inside. Interfaces are born in the namespaces where they belong, so any
//! number of tests may use the same names at once.
//!
//! ```no_run
//! use std::time::Duration;
//! use xdpkit_lab::{Namespace, traffic, veth};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (a, b) = (Namespace::new("a")?, Namespace::new("b")?);
//! veth((&a, "eth0"), (&b, "eth0"))?;
//! a.add_address("eth0", "10.0.0.1/24".parse()?)?;
//! b.add_address("eth0", "10.0.0.2/24".parse()?)?;
//! let report = traffic::ping(&a, "10.0.0.2".parse()?, 1, Duration::ZERO, Duration::from_secs(1))?;
//! assert_eq!(report.received, 1);
//! # Ok(())
//! # }
//! ```
//!
//! Everything here needs root (CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF); what is
//! missing is an error, never a skipped test.

pub mod audit;
pub mod bench;
pub mod bpffs;
pub mod chart;
pub mod counts;
pub mod cpu;
mod device;
mod error;
mod foreign;
pub mod frame;
mod memory;
mod namespace;
mod netlink;
pub mod packet;
pub mod prefixes;
pub mod process;
mod routing;
mod stacked;
mod sys;
pub mod topology;
pub mod traffic;
mod tun;
pub mod usage;

pub use audit::{Audit, AuditReport};
pub use device::{XdpPass, veth, veth_with_queues, xdp_program};
pub use error::{Error, Result};
pub use memory::MemoryLimit;
pub use namespace::Namespace;
pub use packet::PacketSocket;
pub use routing::{Route, Rule};
pub use stacked::{Membership, Tag};
pub use tun::Tun;

/// Capabilities by number, for [`keep_capabilities`].
pub mod capability {
    /// CAP_NET_ADMIN.
    pub const NET_ADMIN: u32 = 12;
    /// CAP_PERFMON.
    pub const PERFMON: u32 = 38;
    /// CAP_BPF.
    pub const BPF: u32 = 39;
}

/// Gives the calling thread a table of open files of its own, so that the limit of one process (`RLIMIT_NOFILE`) is that of
/// each such thread.
///
/// What is open now stays open here until the thread ends, whoever closes it elsewhere. What this thread opens from now on
/// must be closed by it, too: to other threads the numbers mean something else, so nothing that owns a descriptor may
/// be sent or returned.
pub fn own_open_files() -> Result<()> {
    use error::Context as _;
    sys::unshare_files().context(|| "unshare the table of open files".into())
}

/// Leaves the calling thread, and only it, with these capabilities, to see what others than root see.
pub fn keep_capabilities(kept: &[u32]) -> Result<()> {
    use error::Context as _;
    sys::keep_capabilities(kept).context(|| "drop capabilities".into())
}

/// A system call that can be refused.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    /// bpf(2).
    Bpf,
    /// reboot(2), which no test misses.
    Reboot,
}

/// Refuses a system call to the calling thread, and only it, with EPERM, as a container's seccomp profile does.
pub fn deny(call: Call) -> Result<()> {
    use error::Context as _;
    let number = match call {
        Call::Bpf => sys::BPF_CALL,
        Call::Reboot => sys::REBOOT_CALL,
    };
    sys::deny(number).context(|| "install a seccomp filter".into())
}
