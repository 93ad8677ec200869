//! A network namespace held by a file descriptor, and what is configured inside it.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::net::UdpSocket;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::process::{self, Command};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use ipnet::IpNet;

use crate::error::{Context, Error, Result};
use crate::netlink::Netlink;
use crate::sys;

/// A network namespace that exists as long as a clone of this value (or a process inside) does.
///
/// Nothing names it in the file system, so a killed process leaves nothing behind.
#[derive(Clone)]
pub struct Namespace(Arc<Inner>);

struct Inner {
    name: String,
    ns: File,
    netlink: Netlink,
    /// Any socket of the namespace: interface ioctls go through it.
    control: UdpSocket,
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Namespace").field(&self.0.name).finish()
    }
}

/// A new namespace takes its IPv4 settings from the host's present ones; these make it the same
/// everywhere. Router solicitations and redirects would be frames that no test sent.
const SETTINGS: &[(&str, &str)] = &[
    ("net.ipv4.ip_forward", "0"),
    ("net.ipv4.conf.all.rp_filter", "0"),
    ("net.ipv4.conf.default.rp_filter", "0"),
    ("net.ipv4.conf.all.arp_ignore", "0"),
    ("net.ipv4.conf.default.arp_ignore", "0"),
    ("net.ipv4.conf.all.arp_announce", "0"),
    ("net.ipv4.conf.default.arp_announce", "0"),
    ("net.ipv4.conf.all.send_redirects", "0"),
    ("net.ipv4.conf.default.send_redirects", "0"),
    ("net.ipv4.conf.all.accept_redirects", "0"),
    ("net.ipv4.conf.default.accept_redirects", "0"),
    ("net.ipv6.conf.all.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_dad", "0"),
    ("net.ipv6.conf.default.accept_ra", "0"),
    ("net.ipv6.conf.default.router_solicitations", "0"),
    ("net.ipv6.conf.default.accept_redirects", "0"),
];

impl Namespace {
    /// Creates a namespace with `lo` up, IPv6 duplicate address detection off and, where the
    /// host allows it, cubic as the TCP congestion control. `name` is a label for messages only.
    pub fn new(name: &str) -> Result<Self> {
        in_thread(name, || {
            sys::unshare_net().context(|| format!("create the network namespace {name}"))?;
            let ns = Self::current(name)?;
            for (key, value) in SETTINGS {
                write_sysctl(key, value).context(|| format!("namespace {name}: set {key} to {value}"))?;
            }
            // Refused where the host does not let other namespaces use cubic: `traffic` asks for it
            // socket by socket, which the host cannot refuse to root.
            let _ = write_sysctl("net.ipv4.tcp_congestion_control", "cubic");
            ns.set_up("lo")?;
            Ok(ns)
        })
    }

    /// The namespace in which the calling thread is, left as it is.
    pub fn current(name: &str) -> Result<Self> {
        let open = || {
            Ok(Inner {
                name: name.into(),
                ns: File::open("/proc/thread-self/ns/net")?,
                netlink: Netlink::open()?,
                control: UdpSocket::bind("0.0.0.0:0")?,
            })
        };
        Ok(Self(Arc::new(open().context(|| format!("open the network namespace {name}"))?)))
    }

    /// The label.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// A path by which other processes enter the namespace (`nsenter --net=PATH`) while this
    /// process holds it.
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", process::id(), self.0.ns.as_raw_fd()).into()
    }

    /// Runs `f` on a thread inside the namespace and returns what it returns; a panic goes on in
    /// the caller.
    pub fn run<R: Send>(&self, f: impl FnOnce() -> R + Send) -> R {
        in_thread(self.name(), || {
            self.enter();
            f()
        })
    }

    /// Starts `f` on a thread inside the namespace. The thread keeps the namespace alive.
    pub fn spawn<R: Send + 'static>(&self, f: impl FnOnce() -> R + Send + 'static) -> JoinHandle<R> {
        let ns = self.clone();
        let body = move || {
            ns.enter();
            f()
        };
        thread::Builder::new().name(self.name().into()).spawn(body).expect("cannot start a thread")
    }

    /// A command whose process starts inside the namespace.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        sys::setns_before_exec(&mut command, KeepOpen(self.clone()));
        command
    }

    fn enter(&self) {
        if let Err(error) = sys::setns_net(self.as_fd()) {
            panic!("cannot enter the network namespace {} (this needs root): {error}", self.name());
        }
    }

    /// Adds an address with its prefix route to an interface (`lo` too); IPv6 at once usable.
    pub fn add_address(&self, dev: &str, net: IpNet) -> Result<()> {
        let index = self.ifindex(dev)?;
        self.0.netlink.add_address(index, net).context(|| self.about(dev, &format!("add address {net}")))
    }

    /// Removes an address from an interface, with its prefix route.
    pub fn remove_address(&self, dev: &str, net: IpNet) -> Result<()> {
        let index = self.ifindex(dev)?;
        self.0.netlink.remove_address(index, net).context(|| self.about(dev, &format!("remove address {net}")))
    }

    /// How many RSTs the namespace's own TCP has sent so far, in both families.
    pub fn resets_sent(&self) -> Result<u64> {
        self.tcp_counter("OutRsts")
    }

    /// How many segments the namespace's own TCP has sent again so far, in both families.
    pub fn segments_repeated(&self) -> Result<u64> {
        self.tcp_counter("RetransSegs")
    }

    fn tcp_counter(&self, name: &str) -> Result<u64> {
        let text = self.run(|| std::fs::read_to_string("/proc/thread-self/net/snmp"));
        let text = text.context(|| format!("namespace {}: read /proc/net/snmp", self.name()))?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp:")).map(str::split_whitespace);
        let count = lines.next().zip(lines.next()).and_then(|(names, mut values)| {
            values.nth({ names }.position(|found| found == name)?).and_then(|value| value.parse().ok())
        });
        let missing = || std::io::Error::other(format!("it has no Tcp: {name}"));
        count.ok_or_else(missing).context(|| format!("namespace {}: /proc/net/snmp", self.name()))
    }

    /// Writes a sysctl of this namespace, for example `net.ipv4.ip_forward`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let written = self.run(|| write_sysctl(key, value));
        written.context(|| format!("namespace {}: set {key} to {value}", self.name()))
    }

    /// Makes the namespace a router, in both families.
    pub fn enable_forwarding(&self) -> Result<()> {
        self.run(|| {
            write_sysctl("net.ipv4.ip_forward", "1")?;
            write_sysctl("net.ipv6.conf.all.forwarding", "1")
        })
        .context(|| format!("namespace {}: enable forwarding", self.name()))
    }

    /// The index by which the kernel knows an interface inside this namespace.
    pub fn ifindex(&self, dev: &str) -> Result<u32> {
        Ok(self.link(dev)?.0)
    }

    /// An interface's Ethernet address.
    pub fn mac(&self, dev: &str) -> Result<[u8; 6]> {
        let mac = self.link(dev)?.1.try_into();
        mac.map_err(|_| {
            Error::new(self.about(dev, "read the Ethernet address"), std::io::ErrorKind::Unsupported.into())
        })
    }

    fn link(&self, dev: &str) -> Result<(u32, Vec<u8>)> {
        self.0.netlink.link(dev).map_err(|source| match source.raw_os_error() {
            Some(libc::ENODEV) => Error::NoSuchDevice { namespace: self.name().into(), device: dev.into() },
            _ => Error::new(self.about(dev, "look up"), source),
        })
    }

    pub(crate) fn netlink(&self) -> &Netlink {
        &self.0.netlink
    }

    pub(crate) fn control(&self) -> BorrowedFd<'_> {
        self.0.control.as_fd()
    }

    /// What was tried with an interface, for errors.
    pub(crate) fn about(&self, dev: &str, what: &str) -> String {
        format!("namespace {}, interface {dev}: {what}", self.name())
    }
}

impl AsFd for Namespace {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.ns.as_fd()
    }
}

/// Keeps the descriptor open for as long as a `Command` may be started.
struct KeepOpen(Namespace);

impl AsRawFd for KeepOpen {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

/// Runs `f` on a thread of its own, so that entering a namespace changes no other thread.
fn in_thread<R: Send>(name: &str, f: impl FnOnce() -> R + Send) -> R {
    let outcome = thread::scope(|scope| {
        let thread = thread::Builder::new().name(name.into()).spawn_scoped(scope, f);
        thread.expect("cannot start a thread").join()
    });
    outcome.unwrap_or_else(|panic| resume_unwind(panic))
}

/// Writes a sysctl of the calling thread's namespace (`/proc/sys/net` shows the reader's own).
fn write_sysctl(key: &str, value: &str) -> std::io::Result<()> {
    fs::write(format!("/proc/sys/{}", key.replace('.', "/")), value)
}
