//! What a DSR balancer costs a packet: established flows, by their number and forwarding; slots in transition; packets
//! for others. `adjust_head` is what any encapsulation costs before it has written a byte.

mod common;

use std::{
    error::Error,
    net::{IpAddr, SocketAddr},
};

use xdpkit::{DsrBalancer, DsrConfig, DsrService, Stage as _};
use xdpkit_lab::{
    Namespace,
    bench::{Harness, Table, random_v4, random_v6},
    frame::{Frame, tcp},
    veth,
};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
const COUNTS: [(&str, usize); 3] = [("1k", 1 << 10), ("64k", 1 << 16), ("1M", 1 << 20)];

fn main() -> Result<(), Box<dyn Error>> {
    // The routes and neighbours of this thread's namespace are the program's.
    let (ns, peer) = (Namespace::new("balancer")?, Namespace::new("peer")?);
    veth((&ns, "eth0"), (&peer, "eth0"))?;
    ns.add_address("eth0", "192.168.178.10/24".parse()?)?;
    ns.add_address("eth0", "2001:db8:b::10/64".parse()?)?;
    ns.enable_forwarding()?;
    for number in 0..10 {
        for address in backends(number) {
            ns.add_neighbour("eth0", address, MAC)?;
        }
    }
    ns.run(|| rows().map_err(|error| error.to_string()))?;
    Ok(())
}

fn rows() -> Result<(), Box<dyn Error>> {
    let mut criterion = common::criterion();
    let mut table = Table::default();
    for family6 in [false, true] {
        let family = if family6 { "ipv6" } else { "ipv4" };
        for (count, flows) in COUNTS {
            let flows = if family6 { random_v6(flows) } else { random_v4(flows) };
            let room = 2 * flows.len() as u32;
            let [l2, ipip, changed] = [DsrService::l2(), DsrService::ipip(), DsrService::ipip()]
                .map(|service| balancer(family6, service, room));
            let (l2, ipip, changed) = (l2?, ipip?, changed?);
            let harness = Harness::new(&packet(family6, vip(family6)), &flows)?;
            // Every slot goes to other backends; every flow is met once and recorded.
            let service = changed.services()?[0].address;
            changed.set_backends(service, (5..10).map(|number| (backends(number)[usize::from(family6)], 1)))?;
            harness.verdict(changed.program_fd(), flows.len() as u32)?;
            let entry = changed.service(service)?;
            assert_eq!(entry.slots_in_transition, entry.slots, "all slots are in transition");
            let programs = [
                ("adjust_head", harness.grow()),
                ("l2", l2.program_fd()),
                ("ipip", ipip.program_fd()),
                ("ipip-in-transition", changed.program_fd()),
            ];
            let group = format!("dsr_balancer/{family}/{count}");
            table.extend(&group, common::measure(&mut criterion, &group, &harness, &programs, 100));
            for (name, balancer) in [("l2", &l2), ("ipip", &ipip)] {
                let stats = balancer.stats()?;
                assert_eq!(stats.reason(xdpkit::Reason::Forwarded), stats.total(), "{name} forwarded all");
            }
        }
        let flows = if family6 { random_v6(1 << 16) } else { random_v4(1 << 16) };
        let harness = Harness::new(&packet(family6, backends(3)[usize::from(family6)]), &flows)?;
        let balancer = balancer(family6, DsrService::l2(), 1 << 16)?;
        let group = format!("dsr_balancer/{family}/no-vip");
        let programs = [("64k", balancer.program_fd())];
        table.extend(&group, common::measure(&mut criterion, &group, &harness, &programs, 100));
    }
    criterion.final_summary();
    if !table.rows.is_empty() {
        println!("\n{table}");
    }
    Ok(())
}

fn backends(number: u8) -> [IpAddr; 2] {
    [
        IpAddr::from([192, 168, 178, 20 + number]),
        IpAddr::from([0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x20 + u16::from(number)]),
    ]
}

fn vip(family6: bool) -> IpAddr {
    if family6 { IpAddr::from([0x2001, 0xdb8, 0xb, 0, 0, 0, 0, 0x100]) } else { IpAddr::from([192, 168, 178, 100]) }
}

fn balancer(family6: bool, service: DsrService, flows: u32) -> Result<DsrBalancer, Box<dyn Error>> {
    let config = DsrConfig::default().flows(flows).outer_v4("10.0.0.0/16".parse()?);
    let balancer = DsrBalancer::load(&config)?;
    let vip = vip(family6);
    let text = if family6 { format!("tcp/[{vip}]:80") } else { format!("tcp/{vip}:80") };
    let list = (0..5).map(|number| (backends(number)[usize::from(family6)], 1));
    balancer.insert_service(text.parse()?, service, list)?;
    Ok(balancer)
}

fn packet(family6: bool, destination: IpAddr) -> Vec<u8> {
    let source: IpAddr =
        if family6 { IpAddr::from([0x2001, 0, 0, 0, 0, 0, 0, 1]) } else { IpAddr::from([10, 0, 0, 1]) };
    let frame = Frame::tcp(SocketAddr::new(source, 1024), SocketAddr::new(destination, 80));
    frame.flags(tcp::ACK).payload(&[0; 18]).build()
}
