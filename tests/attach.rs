//! Attaching: what works, and what is refused with which error.

mod common;

use std::time::Duration;

use xdpkit::{
    Action, AttachOptions, Error, Firewall, FirewallConfig, Interface, MonitorConfig, PacketMonitor, Protocol, Reason,
    Stage as _, XdpMode,
    preflight::{self, Severity},
};
use xdpkit_lab::{Namespace, PacketSocket, capability, frame::Frame, topology::Pair, traffic::ping, veth};

fn monitor() -> PacketMonitor {
    PacketMonitor::load(&MonitorConfig::default()).unwrap()
}

fn pings(pair: &Pair) -> usize {
    let one = |address| ping(&pair.client, address, 1, Duration::ZERO, Duration::from_secs(2)).unwrap().received;
    pair.server_addr.both().into_iter().map(|address| usize::from(one(address))).sum()
}

#[test]
fn native_generic_and_auto_attach_and_dropping_detaches() {
    let pair = Pair::new().unwrap();
    for (mode, chosen) in
        [(XdpMode::Native, XdpMode::Native), (XdpMode::Generic, XdpMode::Generic), (XdpMode::Auto, XdpMode::Native)]
    {
        let monitor = monitor();
        let options = AttachOptions::new("eth0").mode(mode);
        let attachment = pair.server.run(|| monitor.attach(&options)).unwrap();
        assert_eq!(attachment.mode(), Some(chosen));
        assert_eq!(attachment.interface().name(), "eth0");
        assert_eq!(pings(&pair), 2, "{mode}");
        let counted = monitor.stats().unwrap().total().packets;
        assert!(counted >= 2, "{mode}: {counted}");
        drop(attachment);
        // Hosts send more than what we ask for, such as neighbour solicitations.
        let counted = monitor.stats().unwrap().total().packets;
        assert_eq!(pings(&pair), 2);
        assert_eq!(monitor.stats().unwrap().total().packets, counted, "{mode}: nothing is counted once detached");
    }
}

#[test]
fn auto_falls_back_to_generic_where_the_driver_cannot() {
    // The loopback driver has no XDP of its own.
    let alone = Namespace::new("alone").unwrap();
    let monitor = monitor();
    let native = alone.run(|| monitor.attach(&AttachOptions::new("lo"))).unwrap_err();
    assert!(matches!(&native, Error::ModeRefused { mode: XdpMode::Native, .. }), "{native}");
    assert!(native.to_string().starts_with("interface `lo` refuses XDP in native mode"), "{native}");
    assert!(
        native.to_string().contains("does not support XDP in native mode; generic mode, or auto, works"),
        "{native}"
    );
    let attachment = alone.run(|| monitor.attach(&AttachOptions::new("lo").mode(XdpMode::Auto))).unwrap();
    assert_eq!(attachment.mode(), Some(XdpMode::Generic));
    assert_eq!(attachment.fallback().map(ToString::to_string), Some(native.to_string()), "it says why");
    attachment.detach().unwrap();
    let offload = alone.run(|| monitor.attach(&AttachOptions::new("lo").mode(XdpMode::Offload))).unwrap_err();
    assert!(matches!(offload, Error::ModeRefused { mode: XdpMode::Offload, .. }), "{offload}");
}

#[test]
fn one_value_guards_two_interfaces_with_one_set_of_tables() {
    let (one, two) = (Pair::new().unwrap(), Pair::new().unwrap());
    let monitor = monitor();
    let _a = one.server.run(|| monitor.attach(&AttachOptions::new("eth0"))).unwrap();
    let b = two.server.run(|| monitor.attach(&AttachOptions::new("eth0"))).unwrap();
    let icmp = || monitor.protocols().unwrap().icmp.packets;
    assert_eq!((pings(&one), pings(&two)), (2, 2));
    assert_eq!(icmp(), 2, "one echo request at each");
    drop(b);
    assert_eq!((pings(&one), pings(&two)), (2, 2));
    assert_eq!(icmp(), 3, "the other attachment goes on");
}

#[test]
fn a_foreign_program_is_named_and_left_alone() {
    let pair = Pair::new().unwrap();
    let _foreign = pair.server.xdp_pass("eth0").unwrap();
    for mode in [XdpMode::Native, XdpMode::Generic, XdpMode::Auto] {
        let error = pair.server.run(|| monitor().attach(&AttachOptions::new("eth0").mode(mode))).unwrap_err();
        let Error::ForeignProgram { interface, program_id, program, member: None } = &error else {
            panic!("{mode}: {error}")
        };
        assert_eq!((interface.as_str(), program.as_str()), ("eth0", "lab_xdp_return"));
        assert!(*program_id > 0);
        let text = format!(
            "interface `eth0` already runs XDP program {program_id} (`lab_xdp_return`), which is not ours to replace"
        );
        assert_eq!(error.to_string(), text);
    }
    let findings = pair.server.run(|| preflight::interface(&Interface::by_name("eth0").unwrap())).unwrap();
    assert!(findings.iter().any(|f| f.severity == Severity::Blocker && f.text.contains("attached already")));
}

#[test]
fn the_dispatcher_of_libxdp_is_named_and_left_alone() {
    let pair = Pair::new().unwrap();
    let _dispatcher = pair.server.xdp_pass_named("eth0", "xdp_dispatcher").unwrap();
    let error = pair.server.run(|| monitor().attach(&AttachOptions::new("eth0"))).unwrap_err();
    assert!(matches!(&error, Error::ForeignProgram { program, .. } if program == "xdp_dispatcher"), "{error:?}");
    assert!(
        error.to_string().contains("it is libxdp's dispatcher, which we do not join; `xdp-loader unload`"),
        "{error}"
    );
    assert_eq!(pings(&pair), 2, "it is still there, and packets go on");
    // Without the right to look programs up by id, the number is all that there is.
    let nameless = std::thread::spawn({
        let ns = pair.server.clone();
        move || {
            ns.run(|| {
                let monitor = monitor();
                let (bpf, admin, perfmon) = (capability::BPF, capability::NET_ADMIN, capability::PERFMON);
                xdpkit_lab::keep_capabilities(&[bpf, admin, perfmon]).unwrap();
                monitor.attach(&AttachOptions::new("eth0")).unwrap_err()
            })
        }
    });
    let error = nameless.join().unwrap();
    assert!(matches!(&error, Error::ForeignProgram { program, .. } if program.is_empty()), "{error:?}");
}

#[test]
fn an_unknown_interface_is_named() {
    let error = monitor().attach(&AttachOptions::new("nope0")).unwrap_err();
    assert_eq!(error.to_string(), "no interface `nope0` in this network namespace");
    assert!(matches!(Interface::by_index(999_999), Err(Error::UnknownInterface { .. })));
}

#[test]
fn a_missing_capability_is_named() {
    // Capabilities are per thread, so this test can drop its own.
    let refused = std::thread::spawn(|| {
        xdpkit_lab::keep_capabilities(&[]).unwrap();
        let found = preflight::host();
        assert!(found.iter().any(|f| f.severity == Severity::Blocker && f.text.contains("CAP_BPF")), "{found:?}");
        Firewall::load(&FirewallConfig::default()).unwrap_err()
    });
    let error = refused.join().unwrap();
    assert!(matches!(&error, Error::MissingCapability { .. }), "{error:?}");
    assert!(error.to_string().contains("CAP_BPF, CAP_PERFMON, CAP_NET_ADMIN"), "{error}");
}

#[test]
fn an_mtu_beyond_native_xdp_is_refused_and_jumbo_frames_are_taken_with_frags() {
    let pair = Pair::new().unwrap();
    for ns in [&pair.client, &pair.server] {
        ns.set_mtu("eth0", 9000).unwrap();
    }
    let monitor = monitor();
    let _attachment = pair.server.run(|| monitor.attach(&AttachOptions::new("eth0"))).unwrap();
    let server = xdpkit_lab::traffic::UdpEcho::start(&pair.server, (pair.server_addr.v4, 7).into()).unwrap();
    let payload = vec![1; 8000];
    let echo = xdpkit_lab::traffic::udp_echo(&pair.client, server.addr(), &payload, Duration::from_secs(2)).unwrap();
    assert_eq!(echo, payload);
    assert_eq!(monitor.protocols().unwrap().udp.bytes, 14 + 20 + 8 + 8000, "all buffers are counted");
}

#[test]
fn preflight_finds_what_cannot_receive_redirected_frames() {
    let (a, b) = (Namespace::new("a").unwrap(), Namespace::new("b").unwrap());
    veth((&a, "eth0"), (&b, "eth0")).unwrap();
    let found = |severity| {
        let findings = a.run(|| preflight::redirect_target(&Interface::by_name("eth0").unwrap())).unwrap();
        findings.iter().any(|finding| finding.severity == severity)
    };
    let tells = !common::kernel_older_than_6_3();
    assert_eq!(found(Severity::Blocker), tells, "the other end has no program");
    assert_eq!(found(Severity::Warning), !tells, "of a veth, that much is known everywhere");
    let pass = b.xdp_pass("eth0").unwrap();
    assert!(!found(Severity::Blocker) && !found(Severity::Warning));
    drop(pass);
    // A sender whose checksums are left to the device.
    a.set_offload("eth0", true).unwrap();
    let findings = a.run(|| preflight::interface(&Interface::by_name("eth0").unwrap())).unwrap();
    assert!(findings.iter().any(|finding| finding.remedy.as_deref() == Some("ethtool -K eth0 tx off")), "{findings:?}");
}

/// With GRO on, a veth end receives XDP frames, but not those that a program on the other end sends back.
#[test]
fn preflight_finds_that_frames_sent_back_are_lost_where_only_gro_is_on() {
    let (a, b) = (Namespace::new("a").unwrap(), Namespace::new("b").unwrap());
    // Whatever else arrives brings the frames along that lie in the ring: nobody may say anything.
    for ns in [&a, &b] {
        ns.sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
    }
    veth((&a, "eth0"), (&b, "eth0")).unwrap();
    a.set_gro("eth0", true).unwrap();
    let monitor = monitor();
    monitor.set_action(Protocol::Udp, Some(Action::Tx)).unwrap();
    let _attachment = b.run(|| monitor.attach(&AttachOptions::new("eth0"))).unwrap();
    let (here, there) = ([2, 0, 0, 0, 0, 1], b.mac("eth0").unwrap());
    let frame = Frame::udp("10.0.0.2:1".parse().unwrap(), "10.0.0.1:2".parse().unwrap()).macs(here, there).build();
    let sender = PacketSocket::open(&a, "eth0").unwrap();
    let mut sent = 0;
    let mut came_back = |patience| {
        let receiver = PacketSocket::open(&a, "eth0").unwrap();
        sender.send(&frame).unwrap();
        sent += 1;
        common::wait_for(|| monitor.stats().unwrap().reason(Reason::ProtocolAction).packets == sent);
        assert_eq!(monitor.stats().unwrap().reason(Reason::ProtocolAction).packets, sent, "it is counted as sent");
        let back = |got: &[u8]| got.len() == frame.len() && got[..6] == here && got[6..12] == there;
        receiver.recv_matching(patience, back).unwrap().is_some()
    };
    let warned = || {
        let findings = b.run(|| preflight::redirect_target(&Interface::by_name("eth0").unwrap())).unwrap();
        findings.iter().any(|finding| finding.severity == Severity::Warning && finding.text.contains("XDP_TX"))
    };
    assert!(!came_back(Duration::from_millis(500)), "this kernel delivers it: the warning is wrong there");
    assert!(warned());
    let _pass = a.xdp_pass("eth0").unwrap();
    assert!(came_back(Duration::from_secs(10)) && !warned());
}
