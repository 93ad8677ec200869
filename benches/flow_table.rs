//! What a packet of a known and of a new flow costs in the flow table and in the kernel's LRU_HASH, for random flows.
//! Each adds one to a counter, by compare-and-swap; both tables hold twice as many flows as there are. New flows
//! meet full tables: something has to go for each.

mod common;
#[path = "../src/flow_table/mod.rs"]
#[allow(dead_code, unused_imports, reason = "it is private to the library, which uses all of it")]
mod flow_table;

use std::error::Error;

use flow_table::{FlowTable, Secret, Shape};
use xdpkit_lab::{
    bench::{FlowProbe, Harness, Random, Table, random_v4},
    frame::Frame,
};

fn main() -> Result<(), Box<dyn Error>> {
    let mut criterion = common::criterion();
    let mut random = Random::new(5);
    let mut table = Table::default();
    for (name, flows) in [("1k", 1 << 10), ("64k", 1 << 16), ("1M", 1 << 20)] {
        let shape = Shape::of_capacity(2 * flows);
        let probe = FlowProbe::load(shape.total(), 2 * flows)?;
        let [lines, header] = probe.memory()?;
        let made = FlowTable::create(lines, header, shape, Secret::draw(|| random.bits()));

        let sources = random_v4(flows as usize);
        let template = Frame::udp(sources[0], "198.51.100.1:53".parse()?).payload(&[0; 18]).build();
        let harness = Harness::new(&template, &sources)?;
        let group = format!("flow_table/{name}");
        // One after the other: interleaved, each would empty the caches for the other.
        for (row, program) in [("table", probe.known(false)), ("lru_hash", probe.known(true))] {
            harness.verdict(program, 2 * flows)?;
            table.extend(&group, common::measure(&mut criterion, &group, &harness, &[(row, program)], 100));
        }
        if !table.rows.is_empty() {
            assert!(made.len() as u32 > flows - flows / 100, "the known flows are in the table");
        }
        for (row, program) in [("table, new", probe.new_flows(false)), ("lru_hash, new", probe.new_flows(true))] {
            harness.verdict(program, 4 * flows)?;
            table.extend(&group, common::measure(&mut criterion, &group, &harness, &[(row, program)], 100));
        }
    }
    criterion.final_summary();
    if !table.rows.is_empty() {
        println!("\n{table}");
    }
    Ok(())
}
