//! What a host lacks to balance is found, each with the command that mends it; and the examples and the appliance say it.

use std::{
    net::IpAddr,
    process::{Command, Stdio},
};

use xdpkit::{
    Interface,
    preflight::{self, BalancerKind, BalancerSetup, Finding, FindingKind, Severity},
};
use xdpkit_lab::{Namespace, veth};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A host with clients behind `eth0` (10.0.0.1/24, fd00::1/64) and backends behind `eth1` (10.1.0.1/24, fd01::1/64).
fn host() -> Namespace {
    let (host, others) = (Namespace::new("host").unwrap(), Namespace::new("others").unwrap());
    for (name, v4, v6) in [("eth0", "10.0.0.1/24", "fd00::1/64"), ("eth1", "10.1.0.1/24", "fd01::1/64")] {
        veth((&host, name), (&others, name)).unwrap();
        host.add_address(name, v4.parse().unwrap()).unwrap();
        host.add_address(name, v6.parse().unwrap()).unwrap();
        let guard = others.xdp_pass(name).unwrap();
        std::mem::forget((others.clone(), guard));
    }
    host
}

fn setup(host: &Namespace, kind: BalancerKind, names: &[&str]) -> BalancerSetup {
    BalancerSetup::new(kind, names.iter().map(|name| host.run(|| Interface::by_name(name).unwrap())))
}

fn found(host: &Namespace, setup: &BalancerSetup) -> Vec<Finding> {
    host.run(|| preflight::balancer(setup).unwrap())
}

fn kinds(findings: &[Finding]) -> Vec<(FindingKind, &str)> {
    findings.iter().map(|finding| (finding.kind, finding.object.as_str())).collect()
}

/// Does what a finding says. Only `sysctl -w` and `ip address add`, which the commands of these tests are.
fn mend(host: &Namespace, finding: &Finding) {
    let remedy = finding.remedy.as_deref().unwrap_or_else(|| panic!("{finding}"));
    if let Some(settings) = remedy.strip_prefix("sysctl -w ") {
        for (key, value) in settings.split(' ').map(|setting| setting.split_once('=').unwrap()) {
            host.sysctl(key, value).unwrap();
        }
    } else {
        let rest = remedy.strip_prefix("ip address add ").unwrap_or_else(|| panic!("{finding}"));
        let (address, dev) = rest.split_once(" dev ").unwrap();
        host.add_address(dev, address.parse().unwrap()).unwrap();
    }
}

#[test]
fn a_host_that_lacks_nothing_has_no_findings() {
    let host = host();
    host.enable_forwarding().unwrap();
    let vips = [ip("192.0.2.1"), ip("2001:db8::1")];
    for (kind, names) in [
        (BalancerKind::Nat, &["eth0", "eth1"][..]),
        (BalancerKind::DsrL2, &["eth0"]),
        (BalancerKind::DsrIpip, &["eth0"]),
    ] {
        let setup = setup(&host, kind, names).vips(vips).backends([ip("10.1.0.11"), ip("fd01::11")]);
        let findings = found(&host, &setup);
        assert!(findings.iter().all(|finding| finding.severity == Severity::Advice), "{kind:?}: {findings:?}");
    }
}

#[test]
fn forwarding_that_is_off_is_found_by_family_and_interface() {
    let host = host();
    for (vip, backend, key) in [
        ("192.0.2.1", "10.1.0.11", "net.ipv4.conf.eth0.forwarding"),
        ("2001:db8::1", "fd01::11", "net.ipv6.conf.eth0.forwarding"),
    ] {
        let setup = setup(&host, BalancerKind::DsrIpip, &["eth0"]).vips([ip(vip)]).backends([ip(backend)]);
        let findings = found(&host, &setup);
        let off = &findings[0];
        assert_eq!((off.kind, off.severity), (FindingKind::ForwardingOff, Severity::Blocker), "{findings:?}");
        assert_eq!(off.remedy.as_deref(), Some(format!("sysctl -w {key}=1").as_str()));
        mend(&host, off);
        let left = kinds(&found(&host, &setup)).iter().filter(|(kind, _)| *kind == FindingKind::ForwardingOff).count();
        assert_eq!(left, 0, "{vip}");
    }
}

#[test]
fn a_strict_reverse_path_filter_is_found() {
    let host = host();
    host.enable_forwarding().unwrap();
    host.sysctl("net.ipv4.conf.eth0.rp_filter", "1").unwrap();
    let of = |vip: &str| setup(&host, BalancerKind::Nat, &["eth0", "eth1"]).vips([ip(vip)]);
    assert_eq!(kinds(&found(&host, &of("2001:db8::1"))), [], "IPv6 has none");
    let findings = found(&host, &of("192.0.2.1"));
    assert_eq!(kinds(&findings), [(FindingKind::ReversePathFilter, "eth0")]);
    mend(&host, &findings[0]);
    assert_eq!(kinds(&found(&host, &of("192.0.2.1"))), []);
}

#[test]
fn backends_without_a_way_are_found() {
    let host = host();
    host.enable_forwarding().unwrap();
    host.add_route("203.0.113.0/24".parse().unwrap(), ip("10.1.0.254")).unwrap();
    let find = |kind, backend: &str| {
        let findings = found(&host, &setup(&host, kind, &["eth0", "eth1"]).backends([ip(backend)]));
        findings.iter().filter(|f| f.severity == Severity::Blocker).map(|f| f.kind).collect::<Vec<_>>()
    };
    for kind in [BalancerKind::Nat, BalancerKind::DsrL2, BalancerKind::DsrIpip] {
        assert_eq!(find(kind, "198.51.100.1"), [FindingKind::NoRoute], "{kind:?}");
        assert_eq!(find(kind, "2001:db8:5::1"), [FindingKind::NoRoute], "{kind:?}");
        assert_eq!(find(kind, "10.1.0.1"), [FindingKind::OwnBackend], "{kind:?}");
        assert_eq!(find(kind, "fd01::1"), [FindingKind::OwnBackend], "{kind:?}");
        assert_eq!(find(kind, "10.1.0.11"), [], "{kind:?}");
        let behind = if kind == BalancerKind::DsrL2 { vec![FindingKind::BackendOffLink] } else { vec![] };
        assert_eq!(find(kind, "203.0.113.9"), behind, "{kind:?}");
    }
}

#[test]
fn an_interface_that_replies_come_in_by_is_found_when_nat_is_not_attached_there() {
    let host = host();
    host.enable_forwarding().unwrap();
    for (kind, count) in [(BalancerKind::Nat, 1), (BalancerKind::DsrL2, 0), (BalancerKind::DsrIpip, 0)] {
        let setup = setup(&host, kind, &["eth0"]).backends([ip("10.1.0.11"), ip("fd01::11"), ip("10.0.0.11")]);
        let findings = found(&host, &setup);
        let missing: Vec<_> = findings.iter().filter(|finding| finding.kind == FindingKind::NotAttached).collect();
        assert_eq!(missing.len(), count, "{kind:?}");
        for finding in missing {
            assert!(finding.object == "eth1" && finding.text.contains("10.1.0.11, fd01::11"), "{finding}");
        }
    }
}

#[test]
fn devices_that_xdp_frames_cannot_leave_by_are_found() {
    let host = host();
    host.enable_forwarding().unwrap();
    host.add_bridge("br0", &["eth1"]).unwrap();
    host.add_address("br0", "10.2.0.1/24".parse().unwrap()).unwrap();
    let findings = found(&host, &setup(&host, BalancerKind::DsrL2, &["eth0"]).backends([ip("10.2.0.11")]));
    let lost = [FindingKind::NoXdpTransmit, FindingKind::PeerWithoutProgram];
    let found_at = |findings: &[Finding], object: &str| {
        findings.iter().any(|finding| lost.contains(&finding.kind) && finding.object == object)
    };
    assert!(!found_at(&findings, "br0") && !found_at(&findings, "eth1"), "frames leave by the port: {findings:?}");
    let alone = Namespace::new("alone").unwrap();
    veth((&host, "eth2"), (&alone, "eth2")).unwrap();
    host.add_address("eth2", "10.3.0.1/24".parse().unwrap()).unwrap();
    let findings = found(&host, &setup(&host, BalancerKind::DsrL2, &["eth0"]).backends([ip("10.3.0.11")]));
    assert!(found_at(&findings, "eth2"), "{findings:?}");
    host.add_bridge("br1", &["eth2"]).unwrap();
    host.add_address("br1", "10.4.0.1/24".parse().unwrap()).unwrap();
    let findings = found(&host, &setup(&host, BalancerKind::DsrL2, &["eth0"]).backends([ip("10.4.0.11")]));
    assert!(found_at(&findings, "eth2"), "by the port of a bridge: {findings:?}");
}

#[test]
fn a_virtual_address_that_nobody_answers_for_is_found() {
    let host = host();
    host.enable_forwarding().unwrap();
    for (vip, proxy) in [("10.0.0.100", "net.ipv4.conf.eth0.proxy_arp"), ("fd00::100", "net.ipv6.conf.eth0.proxy_ndp")]
    {
        let setup = setup(&host, BalancerKind::Nat, &["eth0", "eth1"]).vips([ip(vip)]);
        let findings = found(&host, &setup);
        assert_eq!(kinds(&findings), [(FindingKind::VipUnanswered, "eth0")], "{vip}");
        host.sysctl(proxy, "1").unwrap();
        assert_eq!(kinds(&found(&host, &setup)), [], "a proxy answers for {vip}");
        host.sysctl(proxy, "0").unwrap();
        mend(&host, &findings[0]);
        // IPv6 waits until it is known that nobody else has it.
        let end = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !found(&host, &setup).is_empty() {
            assert!(std::time::Instant::now() < end, "{vip}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    }
}

#[test]
fn every_kind_has_a_name_of_its_own_and_findings_are_written_with_their_remedies() {
    assert_eq!(FindingKind::ForwardingOff.name(), "forwarding_off");
    let host = host();
    let findings = found(&host, &setup(&host, BalancerKind::DsrL2, &["eth0"]).vips([ip("192.0.2.1")]));
    assert_eq!(
        findings[0].to_string(),
        "blocker: eth0: it does not forward IPv4: the kernel names no next hop for what comes in by it: sysctl -w \
         net.ipv4.conf.eth0.forwarding=1"
    );
}

/// What an example says before it is ready.
fn warnings(host: &Namespace, example: &str, arguments: &[&str]) -> Vec<serde_json::Value> {
    let program = std::env::current_exe().unwrap();
    let program = program.parent().unwrap().parent().unwrap().join("examples").join(example);
    let mut command: Command = host.command(program);
    let output = command.args(arguments).args(["--json", "--duration", "1"]).stderr(Stdio::inherit()).output().unwrap();
    assert!(output.status.success(), "{example}: {output:?}");
    let lines = String::from_utf8(output.stdout).unwrap();
    let events = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    events.take_while(|event| event["event"] != "ready").filter(|event| event["event"] == "warning").collect()
}

#[test]
fn examples_say_what_the_host_lacks_before_they_are_ready() {
    let host = host();
    host.set_up("lo").unwrap();
    for (example, arguments) in [
        (
            "nat_balancer",
            &["--interface", "eth0", "--interface", "eth1", "--service", "tcp/192.0.2.1:80=10.1.0.11:8080"][..],
        ),
        ("dsr_l2_balancer", &["--interface", "eth0", "--service", "tcp/192.0.2.1:80=10.1.0.11"]),
        ("dsr_ipip_balancer", &["--interface", "eth0", "--service", "tcp/192.0.2.1:80=10.1.0.11"]),
    ] {
        host.sysctl("net.ipv4.ip_forward", "0").unwrap();
        let said = warnings(&host, example, arguments);
        let off = said.iter().find(|event| event["finding"] == "forwarding_off").unwrap_or_else(|| panic!("{said:?}"));
        assert_eq!(off["remedy"], "sysctl -w net.ipv4.conf.eth0.forwarding=1");
        assert!(off["severity"] == "blocker" && off["text"].as_str().unwrap().contains("IPv4"), "{off}");
        host.sysctl("net.ipv4.ip_forward", "1").unwrap();
        let left = warnings(&host, example, arguments);
        assert!(left.is_empty(), "{example}: {left:?}");
    }
}
