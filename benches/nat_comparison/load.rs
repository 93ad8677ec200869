//! The loads of real TCP, and the CPU time that the balancer takes for them.
//!
//! All offloads are off at every interface, so that every segment and its checksum are as they would be on the wire, with one
//! exception: the balancer's interfaces receive with GRO, as a kernel's do by default, which also lets veth
//! receive by NAPI. A thread of the kernel receives for each of them, kept on the balancer's CPU; and for the bridges' ports
//! that face them, kept on the others. So what the balancer takes is the time of those two threads, of the CPU's
//! `ksoftirqd`, and of the proxy.

use std::{
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use xdpkit_lab::{
    cpu,
    process::Process,
    topology::Nat,
    traffic::{Iperf3, Wrk, http_get},
};

use crate::{
    Place, Result, Sample,
    candidates::{BACKEND_HTTP, Candidate, HTTP, IPERF3, Running, Scratch, Services, VIP, web_server},
};

/// wrk's connections.
pub(crate) const CONNECTIONS: u32 = 64;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Load {
    /// A connection for each request.
    Connections,
    /// Requests one after the other over 64 connections.
    Requests,
    /// One TCP stream.
    Bulk,
    /// UDP packets of 1024 known flows, by live frames.
    Packets,
    /// The same of 32,768.
    ManyFlows,
}

/// Measures one candidate under all loads of TCP, between hosts that nothing was run on before.
pub(crate) fn measure(
    place: &Place,
    scratch: &Scratch,
    candidate: Candidate,
    note: &mut impl FnMut(Sample) -> Result<()>,
) -> Result<()> {
    let lab = Nat::new(1, 2)?;
    let http: Vec<SocketAddr> =
        lab.backend_addrs.iter().map(|host| (IpAddr::from(host.v4), BACKEND_HTTP).into()).collect();
    let iperf3: SocketAddr = (lab.backend_addrs[0].v4, IPERF3).into();
    let mut servers = Vec::new();
    for (number, ns) in lab.backends.iter().enumerate() {
        let mut server = Process::start(ns, &place.others, "nginx", &["-c", &web_server(scratch, number)?])?;
        server.wait_for_port(ns, BACKEND_HTTP)?;
        servers.push(server);
    }
    let mut bulk = Process::start(&lab.backends[0], &place.others, "iperf3", &["-s"])?;
    bulk.wait_for_port(&lab.backends[0], IPERF3)?;
    servers.push(bulk);

    let to_http = candidate.target((VIP, HTTP).into(), http[0]);
    let to_iperf3 = candidate.target((VIP, IPERF3).into(), iperf3);
    let threads = receive_by_threads(place, &lab)?;
    let services = Services { http, iperf3: Some(iperf3), udp: Vec::new() };
    let running = candidate.start(place, scratch, &lab.balancer, &services)?;
    for _ in 0..4 {
        // That it works, and that neighbours are known, before anything is measured.
        let page = http_get(&lab.clients[0], to_http, "/", Duration::from_secs(5));
        let page = page.map_err(|error| format!("{}: no page: {error}", candidate.name()))?;
        assert_eq!(page, b"hello, world\n");
    }

    let seconds = place.each.as_secs().to_string();
    let patience = place.each + Duration::from_secs(15);
    for load in [Load::Requests, Load::Connections, Load::Bulk] {
        let (host, url) = (to_iperf3.ip().to_string(), format!("http://{to_http}/"));
        let connections = CONNECTIONS.to_string();
        let wrk = ["-t1", "-c", &connections, "-d", &seconds, "--latency"];
        let (program, arguments) = match load {
            Load::Requests => ("wrk", [&wrk[..], &[&url]].concat()),
            Load::Connections => ("wrk", [&wrk[..], &["-H", "Connection: close", &url]].concat()),
            // The host's own congestion control may be another one, which paces.
            _ => ("iperf3", vec!["-c", &host, "-t", &seconds, "-i", "0", "-C", "cubic", "-J"]),
        };
        let (before, began) = (taken(&threads, &running)?, Instant::now());
        let client = Process::start(&lab.clients[0], &place.others, program, &arguments)?;
        let output = client.finish(patience, &place.stop)?;
        let (busy, passed) = (taken(&threads, &running)? - before, began.elapsed());
        let mut sample = read(candidate, load, &output)?;
        sample.busy = busy.as_secs_f64() / passed.as_secs_f64();
        sample.cpu = busy.as_secs_f64() * 1e6 / sample.cpu;
        note(sample)?;
    }
    Ok(())
}

/// A sample that has the number of things done where the CPU time for each will be.
fn read(candidate: Candidate, load: Load, output: &str) -> Result<Sample> {
    let mut sample = Sample { candidate, load, rate: 0.0, p50: 0.0, p99: 0.0, busy: 0.0, cpu: 0.0 };
    if load == Load::Bulk {
        let report = Iperf3::parse(output)?;
        (sample.rate, sample.cpu) = (report.bits_per_second, report.bytes as f64 * 8e-6);
        return Ok(sample);
    }
    let report = Wrk::parse(output).ok_or_else(|| format!("wrk has no results: {output}"))?;
    // Rates of what fails mean nothing.
    if report.requests == 0 || report.errors > report.requests / 1000 {
        let name = candidate.name();
        return Err(format!("{name}: {} of wrk's {} requests failed", report.errors, report.requests).into());
    }
    (sample.rate, sample.cpu) = (report.per_second, report.requests as f64);
    (sample.p50, sample.p99) = (report.p50.as_secs_f64() * 1e6, report.p99.as_secs_f64() * 1e6);
    Ok(sample)
}

/// Gives the balancer's interfaces threads on its CPU, and those that face them threads elsewhere. Answers all that
/// run on the balancer's CPU.
fn receive_by_threads(place: &Place, lab: &Nat) -> Result<Vec<u32>> {
    let mut threads = cpu::kernel_threads(&format!("ksoftirqd/{}", place.balancer))?;
    for dev in ["eth0", "eth1"] {
        lab.balancer.set_gro(dev, true)?;
        for thread in lab.balancer.thread_napi(dev)? {
            cpu::pin(thread, &[place.balancer])?;
            threads.push(thread);
        }
    }
    for port in ["frontp0", "backp0"] {
        for thread in lab.switch.thread_napi(port)? {
            cpu::pin(thread, &place.others)?;
        }
    }
    Ok(threads)
}

fn taken(threads: &[u32], running: &Running) -> Result<Duration> {
    let mut taken = running.proxy.as_ref().map_or(Ok(Duration::ZERO), Process::run_time)?;
    for thread in threads {
        taken += cpu::run_time(*thread)?;
    }
    Ok(taken)
}
