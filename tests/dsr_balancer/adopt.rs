//! A balancer's tables survive the process that made them: services, lists, slots, recorded flows, counters.

use std::net::SocketAddr;

use crate::common::dsr::{Host, arriving, client, neighbour4, segment, vip};
use xdpkit::{
    Action, AttachOptions, BackendState, DsrBalancer, DsrConfig, DsrFlow, DsrService, Interface, PlacementReason,
    Reason, ServiceProtocol, Stage as _, TestRun,
};
use xdpkit_lab::{bpffs::BpfFs, frame::tcp};

#[test]
fn an_adopted_balancer_goes_on_where_the_last_one_ended() {
    let host = Host::new();
    let bpffs = BpfFs::new().unwrap();
    let directory = bpffs.path().join("app");
    let config = DsrConfig::default().services(8).table_size(1021).flows(4096).seed(7);
    let options = || AttachOptions::new("eth0").pin(&directory);
    let service = "tcp/192.168.178.100:80".parse().unwrap();
    let send = |balancer: &DsrBalancer, number: u32, flags: u8| {
        let frame = arriving(&host, segment(false, number, 9000).flags(flags)).build();
        let verdict = host.ns.run(|| {
            let eth0 = Interface::by_name("eth0").unwrap();
            balancer.run(&TestRun::new(&frame).ingress(&eth0, 0)).unwrap()
        });
        assert_eq!(verdict.action, Action::Tx);
        verdict.frame[5]
    };
    {
        let balancer = DsrBalancer::load(&config).unwrap();
        host.ns.run(|| {
            balancer.insert_service(service, DsrService::l2().by_source(false), [(neighbour4(11), 1)]).unwrap();
            balancer.insert_service("udp/[2001:db8:b::100]:*".parse().unwrap(), DsrService::l2(), []).unwrap();
            let _pinned = balancer.attach(&options()).unwrap();
            balancer.set_backends(service, [(neighbour4(12), 3)]).unwrap();
        });
        assert_eq!(
            (send(&balancer, 1, tcp::SYN), send(&balancer, 1, tcp::ACK), send(&balancer, 2, tcp::ACK)),
            (12, 12, 11)
        );
    }
    let balancer = host.ns.run(|| DsrBalancer::load_or_adopt(&directory, &config)).unwrap();
    let attachment = host.ns.run(|| balancer.attach(&options())).unwrap();
    assert!(attachment.adopted());
    assert_eq!(balancer.services().unwrap().len(), 2);
    let list = balancer.backends(service).unwrap();
    let list: Vec<_> =
        list.iter().map(|b| (b.address, b.weight, b.state, b.slots, b.stats.forwarded.packets)).collect();
    assert_eq!(
        list,
        [(neighbour4(11), 1, BackendState::Leaving, 0, 1), (neighbour4(12), 3, BackendState::Active, 1021, 2)]
    );
    let flow = |number| DsrFlow {
        protocol: ServiceProtocol::Tcp,
        client: SocketAddr::new(client(false, number), 9000),
        destination: SocketAddr::new(vip(false), 80),
        opens: false,
    };
    assert_eq!(balancer.place(flow(1)).unwrap().reason, PlacementReason::Recorded);
    // And it goes on: the flow that began stays, unknown ones are the earlier backend's, new ones the newest's.
    host.ns.run(|| balancer.set_backends(service, [(neighbour4(13), 1)])).unwrap();
    assert_eq!(
        (send(&balancer, 1, tcp::ACK), send(&balancer, 3, tcp::ACK), send(&balancer, 4, tcp::SYN)),
        (12, 11, 13)
    );
    let identities: Vec<_> = balancer.backends(service).unwrap().iter().map(|b| b.identity).collect();
    assert!(
        identities.is_sorted() && identities.len() == 3,
        "numbers and identities are not given twice: {identities:?}"
    );
    assert!(balancer.stats().unwrap().reason(Reason::Forwarded).packets >= 6);
    let error = host.ns.run(|| balancer.insert_service(service, DsrService::l2(), [])).unwrap_err().to_string();
    assert_eq!(error, "service `tcp/192.168.178.100:80` exists already");
    balancer.remove_service(service).unwrap();
    assert_eq!(balancer.services().unwrap().len(), 1);
}

#[test]
fn what_no_service_tells_of_outlives_the_process_too() {
    let host = Host::new();
    let bpffs = BpfFs::new().unwrap();
    // The size of tables has to be the same on all balancers that share flows: the nearest other one will not do.
    let config = DsrConfig::default().services(2).flows(64).check_on_link(false);
    let service = "tcp/192.168.178.100:80".parse().unwrap();
    {
        let balancer = DsrBalancer::load(&config).unwrap();
        drop(host.ns.run(|| balancer.attach(&AttachOptions::new("eth0").pin(bpffs.path()))).unwrap());
    }
    let balancer = host.ns.run(|| DsrBalancer::load_or_adopt(bpffs.path(), &config)).unwrap();
    let elsewhere = "203.0.113.11".parse().unwrap();
    host.ns.run(|| balancer.insert_service(service, DsrService::l2(), [(elsewhere, 1)])).unwrap();
    assert_eq!(balancer.service(service).unwrap().slots, 65_537);
    drop(balancer);
    let other = config.clone().table_size(65_539);
    let error = host.ns.run(|| DsrBalancer::load_or_adopt(bpffs.path(), &other)).unwrap_err().to_string();
    assert!(error.contains("table_size"), "{error}");
}
