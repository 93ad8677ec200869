//! Packets alone: UDP of known flows, from one interface to the other, by live frames.
//!
//! All of it happens on the balancer's CPU, within the call that makes the packets: the generator's own part is measured
//! too, and taken away. What is left is veth at both interfaces, translation and forwarding, and the sink at the
//! backend's end, which counts what is translated.

use std::{
    net::{Ipv4Addr, SocketAddr},
    sync::atomic::Ordering,
    thread,
    time::{Duration, Instant},
};

use xdpkit_lab::{
    Namespace,
    bench::{LiveFrames, Random},
    cpu,
    frame::Frame,
    veth,
};

use crate::{
    Place, Result, Sample,
    candidates::{Candidate, Scratch, Services, UDP, VIP},
    load::Load,
};

/// Of one client address.
const PORTS: u32 = 1024;
/// Client addresses.
const CLIENTS: [(Load, u32); 2] = [(Load::Packets, 1), (Load::ManyFlows, 32)];
const FIRST_CLIENT: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 20);
const BACKENDS: u8 = 64;
/// The backends' network.
const NETWORK: &str = "192.168.178.0/24";
/// Packets of one call.
const CALL: u32 = 1 << 17;

/// Of packets that are sent, so many have to arrive.
const ARRIVE: f64 = 0.99;

pub(crate) fn measure(place: &Place, scratch: &Scratch, candidate: Candidate, load: Load) -> Result<Sample> {
    let mut arrived = 0.0;
    for _ in 0..3 {
        let (sample, part) = attempt(place, scratch, candidate, load)?;
        if part > ARRIVE {
            return Ok(sample);
        }
        arrived = part;
    }
    let (name, part) = (candidate.name(), arrived * 100.0);
    Err(format!("{name}: {part:.1} % of the packets arrived at the backend, three times less than 99 %").into())
}

/// Measures once. Answers too which part of the packets arrived: where some did not, another CPU received, and the figure
/// is wrong.
fn attempt(place: &Place, scratch: &Scratch, candidate: Candidate, load: Load) -> Result<(Sample, f64)> {
    let (_, addresses) = CLIENTS.into_iter().find(|(known, _)| *known == load).expect("packets are asked for");
    let (clients, router, backend) =
        (Namespace::new("clients")?, Namespace::new("balancer")?, Namespace::new("backend")?);
    for ns in [&clients, &router, &backend] {
        // Its announcements would come from other CPUs, which would then go on receiving all.
        ns.sysctl("net.ipv6.conf.default.disable_ipv6", "1")?;
    }
    veth((&clients, "eth0"), (&router, "eth0"))?;
    veth((&router, "eth1"), (&backend, "eth0"))?;
    router.add_address("eth0", "10.0.0.10/24".parse()?)?;
    router.add_address("eth1", "192.168.178.10/24".parse()?)?;
    router.enable_forwarding()?;
    let backends: Vec<SocketAddr> =
        (0..BACKENDS).map(|number| (Ipv4Addr::new(192, 168, 178, 20 + number), UDP).into()).collect();
    for number in 0..addresses {
        let client = Ipv4Addr::from(u32::from(FIRST_CLIENT) + number);
        router.add_neighbour("eth0", client.into(), clients.mac("eth0")?)?;
    }
    for at in &backends {
        router.add_neighbour("eth1", at.ip(), backend.mac("eth0")?)?;
    }
    let macs = (clients.mac("eth0")?, router.mac("eth0")?);
    let to = candidate.target((VIP, UDP).into(), backends[0]);
    let frame = |flow: u32| -> [u8; 64] {
        let client = Ipv4Addr::from(u32::from(FIRST_CLIENT) + flow / PORTS);
        let from: SocketAddr = (client, 20_000 + (flow % PORTS) as u16).into();
        let frame = Frame::udp(from, to).macs(macs.0, macs.1).payload(&[0; 22]).build();
        frame.try_into().expect("14 of Ethernet, 20 of IP, 8 of UDP and 22 of payload")
    };
    let mut frames: Vec<_> = (0..addresses * PORTS).map(frame).collect();
    Random::new(0).shuffle(&mut frames);

    router.set_gro("eth0", true)?;
    router.set_gro("eth1", true)?;
    let _receives = clients.xdp_pass("eth0")?;
    let services = Services { http: Vec::new(), iperf3: None, udp: backends };
    let _running = candidate.start(place, scratch, &router, &services)?;
    let live = LiveFrames::new((&clients, "eth0"), (&backend, "eth0"), &frames, NETWORK.parse()?)?;

    let softirq = cpu::kernel_threads(&format!("ksoftirqd/{}", place.balancer))?;
    // What the call leaves to it.
    let left_over = || softirq.iter().map(|thread| cpu::run_time(*thread)).sum::<xdpkit_lab::Result<Duration>>();
    let measured = || -> Result<(Duration, Duration, u64, u64)> {
        cpu::pin(0, &[place.balancer])?;
        // The flows become known: opened, answered, confirmed.
        live.set_echo(true)?;
        live.send(CALL)?;
        live.set_echo(false)?;
        let (mut taken, mut sent, began) = (Duration::ZERO, 0, Instant::now());
        let (arrived, deferred) = (live.arrived()?, left_over()?);
        // A third of the time of the other loads is plenty.
        while began.elapsed() < place.each / 3 {
            if place.stop.load(Ordering::Relaxed) {
                return Err("interrupted".into());
            }
            taken += live.send(CALL)?;
            taken = taken.saturating_sub(live.generate(CALL)?);
            sent += u64::from(CALL);
        }
        taken += left_over()? - deferred;
        Ok((taken, began.elapsed(), live.arrived()? - arrived, sent))
    };
    // On a thread of its own, which stays on that CPU.
    let (busy, passed, arrived, sent) =
        thread::scope(|scope| scope.spawn(|| measured().map_err(|error| error.to_string())).join())
            .expect("the sender does not panic")?;
    let (taken, arrived) = (busy.as_secs_f64(), arrived as f64);
    let sample = Sample {
        candidate,
        load,
        // What a CPU could do that did nothing else.
        rate: arrived / taken,
        p50: 0.0,
        p99: 0.0,
        busy: taken / passed.as_secs_f64(),
        cpu: taken * 1e6 / arrived,
    };
    Ok((sample, arrived / sent as f64))
}
