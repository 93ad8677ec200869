//! Dropped packets as a capture that other programs read.
#![cfg(feature = "pcapng")]

mod common;

use std::{fs, process::Command, time::SystemTime};

use pcap_file::pcapng::{
    Block, PcapNgReader,
    blocks::{enhanced_packet::EnhancedPacketOption, interface_description::InterfaceDescriptionOption},
};
use xdpkit::{Action, Firewall, FirewallConfig, PcapngWriter, Reason, Rule, Stage as _, parse_prefix};
use xdpkit_lab::frame::Frame;

/// Three packets through a firewall that denies the first two, as a capture.
fn capture() -> (Vec<Vec<u8>>, Vec<u8>) {
    let firewall = Firewall::load(&FirewallConfig::default().sample(1)).unwrap();
    firewall.insert(parse_prefix("10.0.0.0/8").unwrap().into(), Rule::deny()).unwrap();
    firewall.insert(parse_prefix("2001:db8::/32").unwrap().into(), Rule::deny()).unwrap();
    let frames = vec![
        Frame::udp("10.1.2.3:4000".parse().unwrap(), "192.0.2.1:53".parse().unwrap()).payload(&[7; 300]).build(),
        Frame::tcp("[2001:db8::9]:4000".parse().unwrap(), "[2001:db8:1::1]:443".parse().unwrap()).build(),
        Frame::udp("172.16.0.1:4000".parse().unwrap(), "192.0.2.1:53".parse().unwrap()).build(),
    ];
    let mut events = firewall.events().unwrap();
    let mut capture = PcapngWriter::new(Vec::new()).unwrap();
    for frame in &frames {
        firewall.test_run(frame).unwrap();
        while let Some(event) = events.try_next() {
            assert_eq!((event.packet.action, event.packet.reason), (Action::Drop, Reason::Denied));
            let rule = event.rule.map_or_else(String::new, |rule| format!("by rule {rule}"));
            capture.write(&event.packet, rule).unwrap();
        }
    }
    (frames, capture.into_inner())
}

#[test]
fn drops_are_written_with_time_interface_and_comment() {
    let (frames, bytes) = capture();
    let mut reader = PcapNgReader::new(&bytes[..]).unwrap();
    let mut packets = Vec::new();
    let mut names = Vec::new();
    while let Some(block) = reader.next_block() {
        match block.unwrap().into_owned() {
            Block::InterfaceDescription(interface) => names.extend(interface.options),
            Block::EnhancedPacket(packet) => packets.push(packet),
            other => panic!("{other:?}"),
        }
    }
    assert!(
        names.contains(&InterfaceDescriptionOption::IfName("lo".into())),
        "test runs come in by the loopback: {names:?}"
    );
    assert_eq!(packets.len(), 2, "what passes is not in it");
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    for (packet, frame, rule) in [(&packets[0], &frames[0], "10.0.0.0/8"), (&packets[1], &frames[1], "2001:db8::/32")] {
        assert_eq!(packet.data[..], frame[..frame.len().min(128)]);
        assert_eq!(packet.original_len as usize, frame.len());
        assert!(now.abs_diff(packet.timestamp).as_secs() < 60, "{:?}, now {now:?}", packet.timestamp);
        assert_eq!(packet.options, [EnhancedPacketOption::Comment(format!("drop: denied, by rule {rule}").into())]);
    }
    if common::times(0, 1, 0) == 1 {
        tshark_agrees(&bytes);
    }
}

/// What tshark prints of the capture.
fn tshark_agrees(bytes: &[u8]) {
    let path = std::env::temp_dir().join(format!("xdpkit-{}.pcapng", std::process::id()));
    fs::write(&path, bytes).unwrap();
    let output = Command::new("tshark")
        .args(["-r", path.to_str().unwrap(), "-T", "fields", "-E", "separator=|"])
        .args(["-e", "frame.len", "-e", "frame.protocols", "-e", "frame.interface_name", "-e", "frame.comment"])
        .output()
        .expect("tshark is installed: ./x test --full does it");
    fs::remove_file(&path).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2, "{text}");
    assert!(lines[0].starts_with("342|eth:ethertype:ip:udp"), "{text}");
    assert!(lines[0].ends_with("|lo|drop: denied, by rule 10.0.0.0/8"), "{text}");
    assert!(lines[1].contains("ipv6:tcp"), "{text}");
    assert!(lines[1].ends_with("|lo|drop: denied, by rule 2001:db8::/32"), "{text}");
}
