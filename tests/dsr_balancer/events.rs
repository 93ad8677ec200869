//! What a DSR balancer's events tell: each change of the way to a backend, whatever it comes from, once on each CPU that has packets for it.

use std::{
    net::{IpAddr, SocketAddr},
    process::{Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::common::dsr::{Balancer, Host, arriving, client, mac, neighbour4, neighbour6, segment, service_text, vip};
use xdpkit::{
    Action, BackendState, DsrConfig, DsrEvent, DsrService, Error, Events, Interface, Reason, ServiceAddr, Way,
};
use xdpkit_lab::frame::Frame;

/// For how long at most a way is not asked for again: a second, and a bit.
const LIFE: Duration = Duration::from_millis(1100);
/// For how long a slow machine may take to send the packets that tell.
const PATIENCE: Duration = Duration::from_secs(60);

fn config() -> DsrConfig {
    DsrConfig::default().services(8).table_size(1021).flows(4096)
}

fn neighbour(family6: bool, number: u8) -> IpAddr {
    if family6 { neighbour6(number) } else { neighbour4(number) }
}

fn drain(events: &mut Events<DsrEvent>) -> Vec<DsrEvent> {
    std::iter::from_fn(|| events.try_next()).collect()
}

fn ip(host: &Host, family6: bool, arguments: &str) {
    let family = if family6 { "-6" } else { "-4" };
    let status = host.ns.command("ip").arg(family).args(arguments.split(' ')).status().unwrap();
    assert!(status.success(), "ip {family} {arguments}");
}

/// Keeps this thread, and those that it starts, on the first CPU: each CPU notices changes by itself.
fn stay_on_one_cpu() {
    let thread = std::fs::read_link("/proc/thread-self").unwrap();
    let thread = thread.file_name().unwrap();
    let status = Command::new("taskset").args(["-cp", "0"]).arg(thread).stdout(Stdio::null()).status();
    assert!(status.is_ok_and(|status| status.success()), "taskset (util-linux) binds a thread to a CPU");
}

/// Sends packets until one event tells of a change, which is soon enough; then nothing is told any more.
fn told(b: &Balancer<'_>, events: &mut Events<DsrEvent>, frame: &[u8], reason: Reason) -> DsrEvent {
    assert_eq!(drain(events), [], "nothing is told without a packet");
    let changed = Instant::now();
    let event = loop {
        let counted = b.run(frame).1;
        match drain(events)[..] {
            [] => assert!(changed.elapsed() < PATIENCE, "the change is not followed"),
            [event] => {
                assert_eq!(counted, reason);
                break event;
            }
            ref events => panic!("one packet, and {events:?}"),
        }
        thread::sleep(Duration::from_millis(10));
    };
    for _ in 0..20 {
        assert_eq!(b.run(frame).1, reason);
    }
    assert_eq!(drain(events), [], "a change is told once");
    event
}

#[test]
fn every_change_of_a_way_is_told_with_its_service_and_backend() {
    stay_on_one_cpu();
    let host = Host::new();
    let b = host.balancer(&config());
    let mut events = b.balancer.events().unwrap();
    let [eth0, eth1] = ["eth0", "eth1"].map(|name| host.ns.ifindex(name).unwrap());
    for family6 in [false, true] {
        let backend = neighbour(family6, 11);
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::l2(), &[backend]);
        let frame = arriving(&host, segment(family6, 0, 4000)).build();
        let mut next = |reason| {
            let event = told(&b, &mut events, &frame, reason);
            assert_eq!(event.backend, Some((service, backend)));
            event
        };
        let first = next(Reason::Forwarded);
        assert_eq!(first.way, Way::Found { mac: mac(11), interface: eth0 });
        let text = format!("{backend} of {service}: at 02:00:00:00:0b:0b on interface {eth0}");
        assert_eq!(first.to_string(), text);

        host.ns.add_neighbour("eth0", backend, [2, 0, 0, 0, 0xc, 1]).unwrap();
        let second = next(Reason::Forwarded);
        assert_eq!(second.way, Way::Found { mac: [2, 0, 0, 0, 0xc, 1], interface: eth0 });
        assert!(second.timestamp > first.timestamp);

        ip(&host, family6, &format!("neigh del {backend} dev eth0"));
        assert_eq!(next(Reason::Unresolved).way, Way::Unresolved { interface: eth0 });

        let length = if family6 { 128 } else { 32 };
        let router = neighbour(family6, 1);
        ip(&host, family6, &format!("route add {backend}/{length} via {router}"));
        assert_eq!(next(Reason::OffLink).way, Way::OffLink);

        ip(&host, family6, &format!("route replace unreachable {backend}/{length}"));
        let event = next(Reason::NoRoute);
        assert_eq!(event.way, Way::NoRoute);
        assert_eq!(event.to_string(), format!("{backend} of {service}: no route"));

        // Its host has moved to another link.
        ip(&host, family6, &format!("route del unreachable {backend}/{length}"));
        ip(&host, family6, &format!("route add {backend}/{length} dev eth1"));
        host.ns.add_neighbour("eth1", backend, mac(12)).unwrap();
        assert_eq!(next(Reason::Forwarded).way, Way::Found { mac: mac(12), interface: eth1 });
        ip(&host, family6, &format!("route del {backend}/{length} dev eth1"));
    }
}

#[test]
fn events_after_a_change_of_the_list_are_about_those_who_are_there() {
    let host = Host::new();
    let b = host.balancer(&config());
    let mut events = b.balancer.events().unwrap();
    let taken = b.balancer.events().unwrap_err();
    assert!(matches!(taken, Error::EventsTaken { .. }), "{taken}");
    for family6 in [false, true] {
        let [first, second] = [11, 12].map(|number| neighbour(family6, number));
        let service = b.service(&service_text("tcp", family6, "80"), DsrService::ipip(), &[first]);
        // A SYN: a new flow, which goes to whom the list has now.
        let syn = |number| arriving(&host, segment(family6, number, 4000).flags(xdpkit_lab::frame::tcp::SYN)).build();
        let send = |number| assert_eq!(b.run(&syn(number)).1, Reason::Forwarded);
        let about = |events: &mut Events<DsrEvent>| -> Vec<_> {
            drain(events).into_iter().map(|event| (event.backend, event.way)).collect()
        };
        let at = |number| Way::Found { mac: mac(number), interface: host.ns.ifindex("eth0").unwrap() };
        send(0);
        assert_eq!(about(&mut events), [(Some((service, first)), at(11))]);

        // Another takes its place: of the first one, nobody asks any more.
        host.ns.run(|| b.balancer.set_backends(service, [(second, 1)])).unwrap();
        send(1);
        assert_eq!(about(&mut events), [(Some((service, second)), at(12))]);

        // Back, the first is another backend: its way is found anew, and the record of the ring is not mistaken for it.
        host.ns.run(|| b.balancer.set_backends(service, [(first, 1)])).unwrap();
        send(2);
        let list = b.balancer.backends(service).unwrap();
        let states: Vec<_> = list.iter().map(|entry| (entry.address, entry.state)).collect();
        assert_eq!(
            states,
            [(first, BackendState::Killed), (second, BackendState::Leaving), (first, BackendState::Active)]
        );
        assert_eq!(about(&mut events), [(Some((service, first)), at(11))]);

        // Read when it is too late to tell whom it was about.
        thread::sleep(LIFE);
        host.ns.add_neighbour("eth0", first, mac(13)).unwrap();
        send(3);
        host.ns.run(|| b.balancer.remove_service(service)).unwrap();
        let late = drain(&mut events);
        assert!(late.len() == 1 && late[0].backend.is_none() && late[0].way == at(13), "{late:?}");
        assert!(late[0].to_string().starts_with("a backend that is gone: at 02:00:00:00:0b:0d"), "{}", late[0]);
    }
    drop(events);
    assert!(b.balancer.events().is_ok(), "another reader may come when the first one has gone");
}

#[test]
fn two_services_with_one_backend_are_told_apart() {
    let host = Host::new();
    let b = host.balancer(&config());
    let mut events = b.balancer.events().unwrap();
    let backend = neighbour4(11);
    let tcp = b.service(&service_text("tcp", false, "80"), DsrService::l2(), &[backend]);
    let udp = b.service(&service_text("udp", false, "*"), DsrService::ipip(), &[backend]);
    let query = Frame::udp(SocketAddr::new(client(false, 0), 4000), SocketAddr::new(vip(false), 53));
    let frames: [(ServiceAddr, Frame); 2] = [(tcp, segment(false, 0, 4000)), (udp, query)];
    for (service, frame) in frames {
        let frame = arriving(&host, frame).build();
        let (action, reason, _) = b.run(&frame);
        assert_eq!((action, reason), (Action::Tx, Reason::Forwarded));
        let [event] = drain(&mut events)[..] else { panic!("one event for one packet") };
        assert_eq!(event.backend, Some((service, backend)));
    }
    // By an interface that does not forward, the kernel finds no way: told, as packets are lost.
    let eth1 = host.ns.run(|| Interface::by_name("eth1")).unwrap();
    host.ns.sysctl("net.ipv4.conf.eth1.forwarding", "0").unwrap();
    thread::sleep(LIFE);
    let frame = arriving(&host, segment(false, 0, 4000)).build();
    assert_eq!(b.run_by(&eth1, &frame).1, Reason::NoRoute);
    let [event] = drain(&mut events)[..] else { panic!("one event for one packet") };
    assert_eq!((event.backend, event.way), (Some((tcp, backend)), Way::NoRoute));
}
