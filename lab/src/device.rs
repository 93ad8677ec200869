//! Interfaces: veth pairs, bridges, their settings, and the XDP program that only passes.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use netlink_packet_route::link::LinkAttribute;

use crate::cpu::kernel_threads;
use crate::error::{Context, Result};
use crate::namespace::Namespace;
use crate::sys;

/// Creates a veth pair with both ends up and their offloads off (see [`Namespace::set_offload`]):
/// with checksum offload on, XDP sees packets whose checksum nobody has finished.
pub fn veth(a: (&Namespace, &str), b: (&Namespace, &str)) -> Result<()> {
    let created = a.0.netlink().add_veth(a.1, b.1, b.0.as_fd().as_raw_fd());
    created.context(|| format!("create the veth pair {}/{} - {}/{}", a.0.name(), a.1, b.0.name(), b.1))?;
    for (ns, dev) in [a, b] {
        ns.set_offload(dev, false)?;
        ns.set_up(dev)?;
    }
    Ok(())
}

/// The same with a number of queues at the first end, to send from and to receive at; one each at the other end.
pub fn veth_with_queues(a: (&Namespace, &str), b: (&Namespace, &str), transmit: u32, receive: u32) -> Result<()> {
    let created = a.0.netlink().add_veth_with_queues(a.1, b.1, b.0.as_fd().as_raw_fd(), transmit, receive);
    created.context(|| format!("create the veth pair {}/{} - {}/{}", a.0.name(), a.1, b.0.name(), b.1))?;
    a.0.set_up(a.1)?;
    b.0.set_up(b.1)
}

/// A `return XDP_PASS` program on an interface; dropping it detaches.
#[derive(Debug)]
#[must_use = "dropping the value detaches the program"]
pub struct XdpPass {
    _link: OwnedFd,
}

/// Programs are named so unless a test wants another name.
const NAME: &str = "lab_xdp_return";

/// Loads an XDP program that answers `action` to every packet, with or without the multi-buffer
/// flag (`xdp.frags`): a stranger's program, for tests.
pub fn xdp_program(action: u32, frags: bool) -> Result<OwnedFd> {
    let program = sys::bpf::load_xdp_return(NAME, action as i32, frags);
    program.context(|| "load an XDP program".into())
}

impl Namespace {
    /// Brings an interface up.
    pub fn set_up(&self, dev: &str) -> Result<()> {
        self.netlink().set_up(self.ifindex(dev)?, true).context(|| self.about(dev, "bring up"))
    }

    /// Takes an interface down.
    pub fn set_down(&self, dev: &str) -> Result<()> {
        self.netlink().set_up(self.ifindex(dev)?, false).context(|| self.about(dev, "take down"))
    }

    /// Sets the largest payload of a frame, in bytes.
    pub fn set_mtu(&self, dev: &str, mtu: u32) -> Result<()> {
        self.set_link(dev, LinkAttribute::Mtu(mtu)).context(|| self.about(dev, &format!("set MTU {mtu}")))
    }

    /// Sets an interface's Ethernet address.
    pub fn set_mac(&self, dev: &str, mac: [u8; 6]) -> Result<()> {
        let set = self.set_link(dev, LinkAttribute::Address(mac.to_vec()));
        set.context(|| self.about(dev, &format!("set the Ethernet address {mac:02x?}")))
    }

    /// Removes an interface; of a veth pair, both ends.
    pub fn delete_link(&self, dev: &str) -> Result<()> {
        self.netlink().delete_link(self.ifindex(dev)?).context(|| self.about(dev, "delete"))
    }

    /// Gives an interface another name. Kernels before 6.2 want it down for that: there it is for a moment.
    pub fn rename_link(&self, dev: &str, name: &str) -> Result<()> {
        let set = || self.set_link(dev, LinkAttribute::IfName(name.into()));
        let renamed = match set() {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                self.set_down(dev)?;
                set()
            }
            other => other,
        };
        renamed.context(|| self.about(dev, &format!("rename it to {name}")))?;
        self.set_up(name)
    }

    /// Moves an interface to another namespace, where it is down and without addresses at first.
    pub fn move_link(&self, dev: &str, to: &Namespace) -> Result<()> {
        let set = self.set_link(dev, LinkAttribute::NetNsFd(to.as_fd().as_raw_fd()));
        set.context(|| self.about(dev, &format!("move it to {}", to.name())))
    }

    /// Turns checksum, segmentation and receive offloads on or off.
    ///
    /// Off, each frame arrives as it was sent: checksums complete, nothing merged or split.
    pub fn set_offload(&self, dev: &str, on: bool) -> Result<()> {
        for feature in sys::socket::OFFLOADS {
            let set = sys::socket::set_offload(self.control(), dev, feature, on);
            set.context(|| self.about(dev, &format!("turn offload {feature:#x} {}", if on { "on" } else { "off" })))?;
        }
        Ok(())
    }

    /// Turns the merging of received segments (GRO) on or off. On, a veth end receives by NAPI like a real card, without a
    /// program too.
    pub fn set_gro(&self, dev: &str, on: bool) -> Result<()> {
        let set = sys::socket::set_offload(self.control(), dev, sys::socket::GRO, on);
        set.context(|| self.about(dev, &format!("turn GRO {}", if on { "on" } else { "off" })))
    }

    /// Lets TCP hand frames of up to so many bytes to an interface, and the stack merge as many that come by it (BIG TCP: more
    /// than 64 kB; over IPv4 since Linux 6.3). Takes effect with segmentation offload and GRO.
    pub fn set_big_tcp(&self, dev: &str, bytes: u32) -> Result<()> {
        use LinkAttribute::{GroIpv4MaxSize, GroMaxSize, GsoIpv4MaxSize, GsoMaxSize};
        for attribute in [GsoMaxSize(bytes), GroMaxSize(bytes), GsoIpv4MaxSize(bytes), GroIpv4MaxSize(bytes)] {
            self.set_link(dev, attribute).context(|| self.about(dev, &format!("allow frames of {bytes} bytes")))?;
        }
        Ok(())
    }

    /// Lets threads of the kernel receive for an interface, one a queue, and answers which: they can be kept on a CPU, and
    /// tell how long they ran. A veth end needs GRO or a native program first. Not for two interfaces of one
    /// name at the same time.
    pub fn thread_napi(&self, dev: &str) -> Result<Vec<u32>> {
        let prefix = format!("napi/{dev}-");
        let before = kernel_threads(&prefix)?;
        let write = || {
            let sysfs = sys::mount::detached_sysfs()?;
            fs::write(format!("/proc/self/fd/{}/class/net/{dev}/threaded", sysfs.as_raw_fd()), "1")
        };
        self.run(write).context(|| self.about(dev, "receive by threads"))?;
        let mut threads = kernel_threads(&prefix)?;
        threads.retain(|thread| !before.contains(thread));
        if threads.is_empty() {
            return Err(io::Error::other("there is no thread: it does not receive by NAPI"))
                .context(|| self.about(dev, "receive by threads"));
        }
        Ok(threads)
    }

    /// Gives all packets of a flow to one CPU (receive packet steering), as a card with several queues does. A veth end leaves
    /// each on the CPU that sent it, so those of one flow may be looked at on two at a time; and while a connection is
    /// established, for an instant neither the half-open nor the open socket is found (Linux 6.18), and who is looked for is
    /// answered by an RST: of real connections, one in some hundred thousand.
    pub fn steer_flows(&self, dev: &str) -> Result<()> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from).min(32);
        let mask = format!("{:x}", u32::MAX >> (32 - cpus));
        let write = || {
            let sysfs = sys::mount::detached_sysfs()?;
            let queues = format!("/proc/self/fd/{}/class/net/{dev}/queues", sysfs.as_raw_fd());
            for queue in fs::read_dir(queues)? {
                let file = queue?.path().join("rps_cpus");
                if file.exists() {
                    fs::write(file, &mask)?;
                }
            }
            Ok(())
        };
        self.run(write).context(|| self.about(dev, "steer flows"))
    }

    /// Creates a bridge with the given ports, all up.
    pub fn add_bridge(&self, name: &str, ports: &[&str]) -> Result<()> {
        self.netlink().add_bridge(name).context(|| self.about(name, "create the bridge"))?;
        let bridge = self.ifindex(name)?;
        for port in ports {
            let set = self.set_link(port, LinkAttribute::Controller(bridge));
            set.context(|| self.about(port, &format!("join the bridge {name}")))?;
            self.set_up(port)?;
        }
        self.set_up(name)
    }

    /// Has a bridge send every frame to all of its ports, as a hub does.
    pub fn make_hub(&self, bridge: &str) -> Result<()> {
        let index = self.ifindex(bridge)?;
        self.netlink().forget_stations(bridge, index).context(|| self.about(bridge, "set the ageing time"))
    }

    /// Creates a macvlan on an interface, as keepalived does for a virtual router, and sets it up.
    pub fn add_macvlan(&self, name: &str, lower: &str, mac: [u8; 6]) -> Result<()> {
        let index = self.ifindex(lower)?;
        let added = self.netlink().add_macvlan(name, index, mac);
        added.context(|| self.about(name, &format!("create the macvlan on {lower}")))?;
        self.set_up(name)
    }

    /// Attaches a native XDP program that passes everything, multi-buffer frames included.
    ///
    /// A veth end delivers what the other end's program transmits or redirects only if it has a
    /// native program itself.
    pub fn xdp_pass(&self, dev: &str) -> Result<XdpPass> {
        self.xdp_pass_named(dev, NAME)
    }

    /// The same under a name of at most 15 bytes: somebody else's program.
    pub fn xdp_pass_named(&self, dev: &str, name: &str) -> Result<XdpPass> {
        let link = self.xdp_return(dev, name, sys::bpf::XDP_PASS)?;
        Ok(XdpPass { _link: link })
    }

    /// Attaches such a program in generic mode: what a function there is compared with.
    pub fn xdp_pass_generic(&self, dev: &str) -> Result<XdpPass> {
        let index = self.ifindex(dev)?;
        let attach = || {
            let program = sys::bpf::load_xdp_return(NAME, sys::bpf::XDP_PASS, true)?;
            sys::bpf::attach_xdp_generic(program.as_fd(), index)
        };
        let link = self.run(attach).context(|| self.about(dev, "attach an XDP program in generic mode"))?;
        Ok(XdpPass { _link: link })
    }

    fn xdp_return(&self, dev: &str, name: &str, action: i32) -> Result<OwnedFd> {
        let index = self.ifindex(dev)?;
        let attach = || {
            let program = sys::bpf::load_xdp_return(name, action, true)?;
            sys::bpf::attach_xdp_native(program.as_fd(), index)
        };
        self.run(attach).context(|| self.about(dev, "attach an XDP program"))
    }

    fn set_link(&self, dev: &str, attribute: LinkAttribute) -> io::Result<()> {
        let index = self.ifindex(dev)?;
        self.netlink().set_link(index, vec![attribute])
    }
}

#[cfg(test)]
mod tests {
    //! Whether what a program transmits arrives, for which the topologies' XDP_PASS are there.

    use std::net::{Ipv4Addr, Ipv6Addr};
    use std::time::Duration;

    use super::*;
    use crate::frame::Frame;
    use crate::packet::PacketSocket;
    use crate::topology::{DsrIpip, DsrL2, Nat, Pair};

    const VIPS: (Ipv4Addr, Ipv6Addr) = (Ipv4Addr::new(10, 99, 0, 1), Ipv6Addr::new(0xfd99, 0, 0, 0, 0, 0, 0, 1));

    /// Sends a broadcast from `from` to `balancer`, whose program sends it back; returns how often
    /// it arrives at `to`.
    fn echoed(from: (&Namespace, &str), balancer: (&Namespace, &str), to: (&Namespace, &str)) -> usize {
        let _tx = balancer.0.xdp_return(balancer.1, NAME, sys::bpf::XDP_TX).unwrap();
        let receiver = PacketSocket::open(to.0, to.1).unwrap();
        let frame = Frame::ethernet(0x88b5).macs([2, 0, 0, 0, 0, 9], [0xff; 6]).payload(&[7; 60]).build();
        PacketSocket::open(from.0, from.1).unwrap().send(&frame).unwrap();
        let next = || receiver.recv_matching(Duration::from_millis(200), |got| got == frame);
        std::iter::from_fn(|| next().unwrap()).count()
    }

    #[test]
    fn transmitted_frames_arrive_in_every_topology() {
        let pair = Pair::new().unwrap();
        let (client, server) = ((&pair.client, "eth0"), (&pair.server, "eth0"));
        assert_eq!(echoed(client, server, client), 1, "pair");

        // On a bridge the receiver sees the sender's broadcast and then the program's.
        let pair = Pair::with_clients(2).unwrap();
        let [first, second] = [0, 1].map(|i| (&pair.clients[i], "eth0"));
        assert_eq!(echoed(first, (&pair.server, "eth0"), second), 2, "pair with clients");

        let nat = Nat::new(2, 2).unwrap();
        let [first, second] = [0, 1].map(|i| (&nat.clients[i], "eth0"));
        assert_eq!(echoed(first, (&nat.balancer, "eth0"), second), 2, "NAT, front");
        let [first, second] = [0, 1].map(|i| (&nat.backends[i], "eth0"));
        assert_eq!(echoed(first, (&nat.balancer, "eth1"), second), 2, "NAT, back");

        let l2 = DsrL2::new(2, VIPS.0, VIPS.1).unwrap();
        let (gateway, balancer) = ((&l2.gateway, "eth1"), (&l2.balancer, "eth0"));
        assert_eq!(echoed(gateway, balancer, (&l2.backends[1], "eth0")), 2, "L2");

        let ipip = DsrIpip::new(2, VIPS.0, VIPS.1).unwrap();
        let gateway = (&ipip.gateway, "eth1");
        assert_eq!(echoed(gateway, (&ipip.balancer, "eth0"), gateway), 1, "IP-in-IP");
    }
}
