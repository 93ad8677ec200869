//! Packets that a router or translator forwards from one interface to another, by test runs with live frames: they enter
//! through veth as from a driver, without the copies that packets of local sockets need.
//! Beside `sys` and `kernel.rs`, the only place with `unsafe`.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use ipnet::Ipv4Net;
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle, libbpf_sys as raw};

use super::kernel::{cpu_time, io_error};
use crate::error::{Context, Result};
use crate::namespace::Namespace;
use crate::sys;

#[allow(clippy::all, clippy::undocumented_unsafe_blocks, unreachable_pub, missing_docs, unused, reason = "generated")]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/live.skel.rs"));
}

/// Bytes of a frame.
const FRAME: usize = 64;
const LIVE_FRAMES: u32 = 1 << 1;
/// What a driver hands over at once.
const BATCH: u32 = 64;

/// Sends frames out of one interface, and counts what arrives at another one.
#[derive(Debug)]
pub struct LiveFrames {
    sender: OwnedFd,
    generator: OwnedFd,
    source: Namespace,
    arrived: MapHandle,
    echo: MapHandle,
    _sink: OwnedFd,
}

/// Forwards whatever comes in by an interface out of another one, unchanged: what the way itself costs. Ends when dropped.
#[derive(Debug)]
#[must_use = "dropping the value detaches the program"]
pub struct LiveForward {
    _link: OwnedFd,
}

impl LiveForward {
    /// Attaches it natively to the interface `from`.
    pub fn new(ns: &Namespace, from: &str, to: &str) -> Result<Self> {
        let (from, to) = (ns.ifindex(from)?, ns.ifindex(to)?);
        let attach = || {
            let mut storage = MaybeUninit::uninit();
            let mut open = skel::LiveSkelBuilder::default().open(&mut storage).map_err(io_error)?;
            open.maps.rodata_data.as_deref_mut().expect("the object has constants").egress = to;
            let loaded = open.load().map_err(io_error)?;
            let program = loaded.progs.live_forward.as_fd().try_clone_to_owned()?;
            ns.run(|| sys::bpf::attach_xdp_native(program.as_fd(), from))
        };
        Ok(Self { _link: attach().context(|| "forward live frames".into())? })
    }
}

impl LiveFrames {
    /// Puts the sink in place, on the interface `sink`; `source` is the interface out of which frames go, which must
    /// lead to one with GRO or a native program. There have to be 2^n frames of 64 bytes. Counted is what arrives
    /// for an address of the network `wanted`.
    pub fn new(
        source: (&Namespace, &str),
        sink: (&Namespace, &str),
        frames: &[[u8; FRAME]],
        wanted: Ipv4Net,
    ) -> Result<Self> {
        let (egress, at) = (source.0.ifindex(source.1)?, sink.0.ifindex(sink.1)?);
        let count = frames.len() as u32;
        let load = || {
            if !count.is_power_of_two() {
                return Err(io::Error::other(format!("{count} frames, not a power of two")));
            }
            let mut storage = MaybeUninit::uninit();
            let mut open = skel::LiveSkelBuilder::default().open(&mut storage).map_err(io_error)?;
            let constants = open.maps.rodata_data.as_deref_mut().expect("the object has constants");
            constants.frame_mask = count - 1;
            constants.egress = egress;
            constants.wanted = u32::from_ne_bytes(wanted.network().octets());
            constants.mask = u32::from_ne_bytes(wanted.netmask().octets());
            open.maps.frames.set_max_entries(count).map_err(io_error)?;
            let loaded = open.load().map_err(io_error)?;
            for (index, frame) in frames.iter().enumerate() {
                let key = (index as u32).to_ne_bytes();
                loaded.maps.frames.update(&key, frame, MapFlags::ANY).map_err(io_error)?;
            }
            let counter = loaded.progs.live_sink.as_fd().try_clone_to_owned()?;
            let attached = sink.0.run(|| sys::bpf::attach_xdp_native(counter.as_fd(), at))?;
            Ok(Self {
                sender: loaded.progs.live_send.as_fd().try_clone_to_owned()?,
                generator: loaded.progs.live_generate.as_fd().try_clone_to_owned()?,
                source: source.0.clone(),
                arrived: MapHandle::try_from(&loaded.maps.arrived).map_err(io_error)?,
                echo: MapHandle::try_from(&loaded.maps.echo).map_err(io_error)?,
                _sink: attached,
            })
        };
        load().context(|| "set up live frames".into())
    }

    /// Sends so many packets, and answers the CPU time. On its way a packet is handled where it is sent from, unless an
    /// interface receives by threads: in the same CPU time, of a kernel without CONFIG_IRQ_TIME_ACCOUNTING.
    pub fn send(&self, packets: u32) -> Result<Duration> {
        let source = &self.source;
        source.run(|| run(&self.sender, packets)).context(|| "send live frames".into())
    }

    /// Makes so many packets and drops them at once: the part of [`LiveFrames::send`] that is the generator's.
    pub fn generate(&self, packets: u32) -> Result<Duration> {
        let source = &self.source;
        source.run(|| run(&self.generator, packets)).context(|| "generate live frames".into())
    }

    /// Whether the sink sends back what it counts, as an answer of the UDP port; at first it does not. On their way answers
    /// need interfaces that receive with GRO or a native program.
    pub fn set_echo(&self, on: bool) -> Result<()> {
        let set = self.echo.update(&0_u32.to_ne_bytes(), &u32::from(on).to_ne_bytes(), MapFlags::ANY);
        set.map_err(io_error).context(|| "let the sink answer".into())
    }

    /// Packets that have arrived until now.
    pub fn arrived(&self) -> Result<u64> {
        let read = || {
            let counts = self.arrived.lookup_percpu(&0_u32.to_ne_bytes(), MapFlags::ANY).map_err(io_error)?;
            let word = |bytes: Vec<u8>| bytes.try_into().map(u64::from_ne_bytes).unwrap_or(0);
            Ok(counts.unwrap_or_default().into_iter().map(word).sum())
        };
        read().context(|| "read what arrived".into())
    }
}

fn run(program: &OwnedFd, packets: u32) -> io::Result<Duration> {
    let frame = [0_u8; FRAME];
    let mut options = raw::bpf_test_run_opts {
        sz: size_of::<raw::bpf_test_run_opts>() as raw::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: FRAME as u32,
        repeat: i32::try_from(packets).map_err(io::Error::other)?,
        flags: LIVE_FRAMES,
        batch_size: BATCH,
        ..Default::default()
    };
    let before = cpu_time()?;
    // SAFETY: the only pointer in `options` is to a buffer that outlives the call and whose size stands beside it.
    match unsafe { raw::bpf_prog_test_run_opts(program.as_raw_fd(), &mut options) } {
        error if error < 0 => Err(io::Error::from_raw_os_error(-error)),
        _ => Ok(cpu_time()?.saturating_sub(before)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::thread;
    use std::time::Instant;

    use super::*;
    use crate::frame::Frame;
    use crate::packet::PacketSocket;
    use crate::veth;

    #[test]
    fn a_router_forwards_live_frames_and_only_those_that_are_wanted_count() {
        let [source, router, sink] = ["source", "router", "sink"].map(|name| Namespace::new(name).unwrap());
        veth((&source, "eth0"), (&router, "eth0")).unwrap();
        veth((&router, "eth1"), (&sink, "eth0")).unwrap();
        router.set_gro("eth0", true).unwrap();
        router.add_address("eth0", "10.0.0.1/24".parse().unwrap()).unwrap();
        router.add_address("eth1", "10.0.1.1/24".parse().unwrap()).unwrap();
        router.enable_forwarding().unwrap();
        for host in [2_u8, 3] {
            let to = Ipv4Addr::new(10, 0, 1, host);
            router.add_neighbour("eth1", to.into(), sink.mac("eth0").unwrap()).unwrap();
        }
        let macs = (source.mac("eth0").unwrap(), router.mac("eth0").unwrap());
        let frame = |number: u8| -> [u8; FRAME] {
            let to = format!("10.0.1.{}:53", 2 + number % 2);
            let frame = Frame::udp("10.0.0.2:1000".parse().unwrap(), to.parse().unwrap());
            frame.macs(macs.0, macs.1).payload(&[0; 22]).build().try_into().unwrap()
        };
        let frames: Vec<_> = (0..4).map(frame).collect();
        let wanted = "10.0.1.2/32".parse().unwrap();
        let live = LiveFrames::new((&source, "eth0"), (&sink, "eth0"), &frames, wanted).unwrap();
        assert_eq!(live.arrived().unwrap(), 0);
        // So few that none are lost.
        assert!(live.send(64).unwrap() > Duration::ZERO);
        assert!(live.generate(64).unwrap() > Duration::ZERO);
        let end = Instant::now() + Duration::from_secs(10);
        while live.arrived().unwrap() < 32 && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(live.arrived().unwrap(), 32, "half of them are for another address");
        let _forward = LiveForward::new(&router, "eth0", "eth1").unwrap();
        live.send(64).unwrap();
        while live.arrived().unwrap() < 64 && Instant::now() < end {
            thread::sleep(Duration::from_millis(5));
        }
        assert_eq!(live.arrived().unwrap(), 64, "the program forwards the same");

        // Its answer comes back to where the frames were sent from.
        let _back = LiveForward::new(&router, "eth1", "eth0").unwrap();
        let _receives = source.xdp_pass("eth0").unwrap();
        let client = PacketSocket::open(&source, "eth0").unwrap();
        live.set_echo(true).unwrap();
        live.send(64).unwrap();
        let mut answer = Frame::udp("10.0.1.2:53".parse().unwrap(), "10.0.0.2:1000".parse().unwrap());
        answer = answer.macs(macs.1, macs.0).payload(&[0; 22]);
        let answer = answer.build();
        let came = client.recv_matching(Duration::from_secs(10), |got| got == answer).unwrap();
        assert_eq!(came, Some(answer), "what was sent, turned round");

        let refused = LiveFrames::new((&source, "eth0"), (&sink, "eth0"), &frames[..3], wanted).unwrap_err();
        assert!(refused.to_string().contains("power of two"), "{refused}");
    }
}
