//! What a chain costs: the empty program, the parser alone, and 1, 2 and 4 stages that pass every packet.

mod common;

use xdpkit::{MonitorConfig, PacketMonitor, Pipeline, Stage};
use xdpkit_lab::{
    bench::{Harness, random_v4},
    frame::Frame,
};

/// What a stage may cost besides parsing, in nanoseconds.
const STAGE: f64 = 3.0;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let template = Frame::udp("192.0.2.1:1024".parse()?, "198.51.100.1:53".parse()?).payload(&[0; 18]).build();
    let harness = Harness::new(&template, &random_v4(1 << 16))?;
    let [one, two, four] = [chain(1)?, chain(2)?, chain(4)?];
    let rows = [
        ("empty", harness.empty()),
        ("parse_only", harness.parse_only()),
        ("chain/1", one.program_fd()),
        ("chain/2", two.program_fd()),
        ("chain/4", four.program_fd()),
    ];
    let mut criterion = common::criterion();
    let table = common::measure(&mut criterion, "pass", &harness, &rows, 400);
    criterion.final_summary();

    if !table.rows.is_empty() {
        println!("\n{table}");
    }
    if let [Some(parse), Some(one), Some(four)] = ["parse_only", "chain/1", "chain/4"].map(|name| table.get(name)) {
        let (more, most) = (four.minimum - one.minimum, 4.0 * (parse.minimum + STAGE));
        println!("chain/4 - chain/1: {more:.1} ns, {:.0} % of 4 x (parse_only + {STAGE} ns)", 100.0 * more / most);
    }
    Ok(())
}

/// Monitors that report nothing: each parses, counts and passes.
fn chain(length: usize) -> Result<Pipeline, xdpkit::Error> {
    let monitor = |n| PacketMonitor::load(&MonitorConfig::default().name(format!("monitor{n}")));
    let monitors = (0..length).map(monitor).collect::<Result<Vec<_>, _>>()?;
    let stages: Vec<&dyn Stage> = monitors.iter().map(|monitor| monitor as &dyn Stage).collect();
    Pipeline::new(&stages)
}
