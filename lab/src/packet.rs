//! Raw frames in and out of an interface.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};
use crate::namespace::Namespace;
use crate::sys::socket;

/// Room for the largest frame, aggregates of jumbo size included.
const BUFFER: usize = 128 * 1024;
const TP_STATUS_VLAN_VALID: u32 = 1 << 4;
const TP_STATUS_VLAN_TPID_VALID: u32 = 1 << 6;

/// A packet socket on one interface: sends frames out of it and captures those that arrive.
///
/// It captures what the network stack is given, so what an XDP program on the same interface
/// drops, transmits or redirects is not seen. Frames that leave the interface are not captured.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    index: u32,
    about: String,
}

impl PacketSocket {
    /// Opens a socket on an interface; from now on arriving frames are kept for [`recv`](Self::recv).
    pub fn open(ns: &Namespace, dev: &str) -> Result<Self> {
        let index = ns.ifindex(dev)?;
        let open = || -> io::Result<OwnedFd> {
            // Protocol 0 receives nothing until bind, so no other interface's frames slip in.
            let packet = socket::open(libc::AF_PACKET, libc::SOCK_RAW, 0)?;
            socket::set_option(packet.as_fd(), libc::SOL_PACKET, libc::PACKET_AUXDATA, 1)?;
            socket::set_option(packet.as_fd(), libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, 1)?;
            // Bursts of a test should fit; above the host's limit, which binds other programs.
            socket::set_option(packet.as_fd(), libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 64 << 20)?;
            socket::bind_packet(packet.as_fd(), index)?;
            Ok(packet)
        };
        let about = ns.about(dev, "");
        let socket = ns.run(open).context(|| format!("{about}open a packet socket"))?;
        Ok(Self { socket, index, about })
    }

    /// Hands all frames that have arrived to `take`, as the kernel gives them, without waiting; answers how many. For
    /// captures that must keep up: no memory is taken for each, and VLAN tags are not put back.
    pub fn drain(&self, buffer: &mut Vec<u8>, mut take: impl FnMut(&[u8])) -> Result<usize> {
        buffer.resize(BUFFER, 0);
        let mut frames = 0;
        loop {
            match socket::recv_frame(self.as_fd(), buffer) {
                Ok((len, _)) => take(&buffer[..len.min(BUFFER)]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(frames),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Error::new(format!("{}receive a frame", self.about), error)),
            }
            frames += 1;
        }
    }

    /// Frames that arrived and found no room since this was last asked.
    pub fn lost(&self) -> Result<u32> {
        socket::packet_drops(self.as_fd()).context(|| format!("{}ask for lost frames", self.about))
    }

    /// Also receives frames for other Ethernet addresses, as long as the socket is open.
    pub fn set_promiscuous(&self) -> Result<()> {
        let request = libc::packet_mreq {
            mr_ifindex: self.index as i32,
            mr_type: libc::PACKET_MR_PROMISC as u16,
            mr_alen: 0,
            mr_address: [0; 8],
        };
        let (level, name) = (libc::SOL_PACKET, libc::PACKET_ADD_MEMBERSHIP);
        let set = socket::set_option(self.as_fd(), level, name, request);
        set.context(|| format!("{}receive promiscuously", self.about))
    }

    /// Sends past the interface's queueing discipline: faster, and dropped when the driver is busy.
    pub fn set_qdisc_bypass(&self, on: bool) -> Result<()> {
        let set = socket::set_option(self.as_fd(), libc::SOL_PACKET, libc::PACKET_QDISC_BYPASS, i32::from(on));
        set.context(|| format!("{}bypass the queueing discipline", self.about))
    }

    /// Sends one frame, from its Ethernet header on.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        self.send_many(&[frame])
    }

    /// Sends frames with as few system calls as possible.
    pub fn send_many(&self, mut frames: &[&[u8]]) -> Result<()> {
        while !frames.is_empty() {
            match socket::send_frames(self.as_fd(), frames) {
                Ok(sent) => frames = &frames[sent..],
                // With the qdisc bypassed the driver's ring may be full for a moment.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => std::thread::yield_now(),
                Err(error) => {
                    return Err(Error::new(format!("{}send a frame of {} bytes", self.about, frames[0].len()), error));
                }
            }
        }
        Ok(())
    }

    /// The next frame that arrived, as it was on the wire: a VLAN tag that the kernel took out is
    /// back in its place. `None` when none came within `timeout`.
    pub fn recv(&self, timeout: Duration) -> Result<Option<Vec<u8>>> {
        self.try_recv(timeout).context(|| format!("{}receive a frame", self.about))
    }

    /// Frames until one satisfies `wanted`, which is returned; others are thrown away.
    pub fn recv_matching(&self, timeout: Duration, mut wanted: impl FnMut(&[u8]) -> bool) -> Result<Option<Vec<u8>>> {
        let end = Instant::now() + timeout;
        loop {
            match self.recv(end.saturating_duration_since(Instant::now()))? {
                Some(frame) if !wanted(&frame) => {}
                other => return Ok(other),
            }
        }
    }

    fn try_recv(&self, timeout: Duration) -> io::Result<Option<Vec<u8>>> {
        let end = Instant::now() + timeout;
        let mut buffer = vec![0; BUFFER];
        loop {
            match socket::recv_frame(self.as_fd(), &mut buffer) {
                Ok((len, aux)) => {
                    buffer.truncate(len);
                    if let Some(aux) = aux.filter(|aux| aux.status & TP_STATUS_VLAN_VALID != 0) {
                        let known = aux.status & TP_STATUS_VLAN_TPID_VALID != 0;
                        let tpid = if known { aux.vlan_tpid } else { 0x8100 };
                        let [[a, b], [c, d]] = [tpid.to_be_bytes(), aux.vlan_tci.to_be_bytes()];
                        buffer.splice(12..12, [a, b, c, d]);
                    }
                    return Ok(Some(buffer));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            }
            let rest = end.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return Ok(None);
            }
            socket::wait_readable(self.as_fd(), rest)?;
        }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
