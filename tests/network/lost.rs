//! Frames that a program has sent and that nobody has taken are counted where the kernel finds that out.

use std::{net::SocketAddr, thread, time::Duration};

use xdpkit::{Action, AttachOptions, MonitorConfig, PacketMonitor, Protocol, Reason, Stage as _};
use xdpkit_lab::{Namespace, PacketSocket, frame::Frame, veth};

use crate::bench::patience;

const FRAMES: u64 = 20;

#[test]
fn frames_that_are_lost_after_the_program_are_counted() {
    let [here, there] = ["here", "there"].map(|name| Namespace::new(name).unwrap());
    veth((&here, "eth0"), (&there, "eth0")).unwrap();
    let monitor = PacketMonitor::load(&MonitorConfig::default()).unwrap();
    monitor.set_action(Protocol::Udp, Some(Action::Tx)).unwrap();
    let attachment = here.run(|| monitor.attach(&AttachOptions::new("eth0"))).unwrap();
    let lost = || attachment.redirect_failed().unwrap().expect("root may look at tracepoints");
    assert_eq!(lost(), 0);
    let (from, to): (SocketAddr, SocketAddr) = ("10.0.0.1:7".parse().unwrap(), "10.0.0.2:9".parse().unwrap());
    let frame = Frame::udp(from, to).macs(there.mac("eth0").unwrap(), here.mac("eth0").unwrap()).build();
    let wire = PacketSocket::open(&there, "eth0").unwrap();
    let send = || (0..FRAMES).for_each(|_| wire.send(&frame).unwrap());
    let sent = |count: u64| {
        let end = std::time::Instant::now() + patience();
        let seen = || monitor.stats().unwrap().reason(Reason::ProtocolAction).packets;
        while seen() < count && std::time::Instant::now() < end {
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(seen(), count);
        // The kernel sends when all that came at once has been seen.
        thread::sleep(Duration::from_millis(50));
    };
    // The other end of a veth takes frames from programs only with one of its own.
    send();
    sent(FRAMES);
    assert_eq!(lost(), FRAMES);
    let _taking = there.xdp_pass("eth0").unwrap();
    send();
    sent(2 * FRAMES);
    assert_eq!(lost(), FRAMES, "nothing is lost any more");
}
