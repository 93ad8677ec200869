//! Connections that end in silence, while no process calls `collect`: the data path alone makes room again. Traps: H2, L14.

use std::{net::SocketAddr, thread, time::Duration};

use crate::common::{
    nat::{Bench, at, ip, service},
    nat_talk::segment,
};
use xdpkit::{NatConfig, NatMode, NatService, NatTimeouts, Reason};

const CAPACITY: u32 = 200;
/// Longer than a round takes, on a slow machine too.
const IDLE: Duration = Duration::from_secs(3);

#[test]
fn h2_what_has_died_in_silence_makes_room_without_being_collected() {
    let mut timeouts = NatTimeouts::default();
    timeouts.udp = IDLE;
    let name = service("udp/10.0.0.100:53");
    let backends: Vec<_> = (11..21).map(|last| at(&format!("192.168.178.{last}:53"))).collect();
    let benches = [NatMode::Full, NatMode::Destination].map(|mode| {
        let bench = Bench::new(&NatConfig::default().capacity(CAPACITY).timeouts(timeouts));
        bench.balancer.insert(name, &NatService::new(backends.clone()).mode(mode)).unwrap();
        bench
    });
    let (mut clients, vip) = (0, at("10.0.0.100:53"));
    // Twice as many as there are records.
    for round in 0..4 {
        for _ in 0..CAPACITY / 2 {
            clients += 1;
            let client = SocketAddr::new(ip(&format!("10.0.0.{}", 20 + clients % 30)), 1024 + clients as u16);
            for (bench, mode) in benches.iter().zip(["full", "destination"]) {
                let asks = segment(&name, client, vip);
                assert_eq!(bench.client_sends(&asks).reason, Reason::Forwarded, "{mode}, round {round}: {client}");
                let found = bench.balancer.find(client, &name).unwrap().unwrap();
                let answer = segment(&name, found.backend, found.source);
                assert_eq!(bench.backend_sends(&answer).reason, Reason::Answered);
                assert_eq!(bench.client_sends(&asks).reason, Reason::Forwarded);
            }
        }
        let live = benches.each_ref().map(|bench| bench.balancer.counts().unwrap().total());
        assert_eq!(live, [u64::from(CAPACITY) / 2; 2], "round {round}");
        thread::sleep(IDLE + Duration::from_millis(100));
    }
    for bench in &benches {
        assert!(bench.balancer.collect().unwrap() > 0, "nobody else did");
        assert!(bench.balancer.is_empty().unwrap(), "and of none is anything left");
        assert_eq!(bench.balancer.evicted().unwrap(), 0);
    }
}
