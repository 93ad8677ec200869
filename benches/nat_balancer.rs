//! What a NAT balancer costs a packet: established connections in both directions, by their number; new ones. All tables are
//! made for a million connections. Figures are above the empty program.

mod common;
#[path = "common/nat.rs"]
mod nat;

use std::error::Error;

use nat::{balancer, establish};
use xdpkit::{NatMode, Stage as _};
use xdpkit_lab::bench::{Table, random_v4, random_v6};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const COUNTS: [(&str, usize); 3] = [("1k", 1 << 10), ("64k", 1 << 16), ("1M", 1 << 20)];

fn main() -> Result<()> {
    let (ns, _peer) = nat::host()?;
    ns.run(|| rows().map_err(|error| error.to_string()))?;
    Ok(())
}

fn rows() -> Result<()> {
    let mut criterion = common::criterion();
    let mut table = Table::default();
    for (mode, name) in [(NatMode::Full, "full"), (NatMode::Destination, "destination")] {
        for family6 in [false, true] {
            let family = if family6 { "ipv6" } else { "ipv4" };
            for (count, flows) in COUNTS {
                let group = format!("nat_balancer/{name}/{family}/{count}");
                if is_filtered_out(&group) {
                    continue;
                }
                let clients = if family6 { random_v6(flows) } else { random_v4(flows) };
                let balancer = balancer(family6, mode)?;
                let (there, back) = establish(&balancer, family6, &clients)?;
                for (row, harness) in [("to-backend", &there), ("to-client", &back)] {
                    let programs = [(row, balancer.program_fd())];
                    table.extend(&group, common::measure(&mut criterion, &group, harness, &programs, 100));
                }
                nat::has_translated(&balancer)?;
            }
        }
    }
    for family6 in [false, true] {
        let family = if family6 { "ipv6" } else { "ipv4" };
        if !is_filtered_out(&format!("nat_balancer/new/{family}")) {
            println!("nat_balancer/new/{family}: {:.1} ns a connection above the empty program", nat::new(family6)?);
        }
    }
    criterion.final_summary();
    if !table.rows.is_empty() {
        println!("\n{table}");
    }
    Ok(())
}

/// Whether the command line names rows, and none of this group's: what takes long to set up can be left out.
fn is_filtered_out(group: &str) -> bool {
    let mut names = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).peekable();
    names.peek().is_some() && !names.any(|name| group.contains(&name))
}
