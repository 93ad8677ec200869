//! What four stages that pass every packet cost above one, against the cost of parsing.

mod common;

use common::is_emulated;
use xdpkit::{Action, MonitorConfig, PacketMonitor, Pipeline, Reason, Stage};
use xdpkit_lab::{
    bench::{Harness, random_v4},
    frame::Frame,
};

/// Each round is one window of half a millisecond of each program. Fixed: to go on until the bound holds
/// would be to wait for luck.
const ROUNDS: u32 = 500;

const PACKETS: u32 = 1000;

#[test]
fn four_stages_cost_little_more_than_parsing_four_times() {
    let template =
        Frame::udp("192.0.2.1:1024".parse().unwrap(), "198.51.100.1:53".parse().unwrap()).payload(&[0; 18]).build();
    let harness = Harness::new(&template, &random_v4(1 << 16)).unwrap();
    let monitor = |n| PacketMonitor::load(&MonitorConfig::default().name(format!("monitor{n}"))).unwrap();
    let monitors = [1, 2, 3, 4].map(monitor);
    let one = Pipeline::new(&[&monitors[0]]).unwrap();
    let four = Pipeline::new(&monitors.each_ref().map(|monitor| monitor as &dyn Stage)).unwrap();

    // What is measured does its work.
    let (action, frame) = harness.verdict(four.program_fd(), PACKETS).unwrap();
    assert_eq!(action, Action::Pass as u32);
    for monitor in &monitors {
        let stats = monitor.stats().unwrap();
        assert_eq!(stats.reason(Reason::None), stats.total());
        assert_eq!(stats.passed().packets, PACKETS.into(), "{}", monitor.name());
        assert_eq!(stats.passed().bytes, u64::from(PACKETS) * frame.len() as u64, "{}", monitor.name());
    }
    if is_emulated() {
        println!("the machine is emulated: only verdicts and counters were compared, not times");
        return;
    }

    let programs = [harness.parse_only(), one.program_fd(), four.program_fd()];
    let costs = harness.costs_above_empty(&programs, ROUNDS).unwrap();
    let [parse, one, four] = [0, 1, 2].map(|row| costs[row].minimum);
    let (more, most) = (four - one, 4.0 * (parse + 3.0));
    println!("ns above an empty program: parse {parse:.1}, one stage {one:.1}, four stages {four:.1}");
    println!("four stages cost {more:.1} ns more than one; allowed are {most:.1}");
    assert!(more <= most, "{more:.1} ns more, {most:.1} are allowed (parse {parse:.1}, one stage {one:.1})");
}
