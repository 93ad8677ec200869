//! The candidates, each set up between the same hosts as its own documentation says, with as few settings as will do.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    sync::atomic::AtomicBool,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use xdpkit::{AttachOptions, Attachment, NatBalancer, NatConfig, NatService, ServiceAddr, Stage as _};
use xdpkit_lab::{Namespace, bench::LiveForward, process::Process};

use crate::{Place, Result};

/// The virtual address, which exists nowhere but for the proxies, which have to listen on it.
pub(crate) const VIP: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 10);
pub(crate) const HTTP: u16 = 80;
pub(crate) const IPERF3: u16 = 5201;
pub(crate) const UDP: u16 = 53;
/// Where the backends listen for HTTP.
pub(crate) const BACKEND_HTTP: u16 = 8080;

/// What is run, and the packages that have it.
pub(crate) const PROGRAMS: [(&str, &str); 5] =
    [("nft", "nftables"), ("haproxy", "haproxy"), ("nginx", "nginx"), ("wrk", "wrk"), ("iperf3", "iperf3")];

/// As many connections as the kernel's tracking has by default on a host of this size.
const CAPACITY: u32 = 1 << 18;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Candidate {
    /// The library's, in native mode on both interfaces.
    NatBalancer,
    /// The kernel's, DNAT and masquerade.
    Nftables,
    /// A proxy, by its stream module.
    Nginx,
    /// A proxy, in TCP mode.
    Haproxy,
    /// No balancer at all: the kernel routes between the client and one backend.
    Route,
    /// Packets alone only: a program that redirects whatever comes, unchanged. What veth and the sink cost.
    Redirect,
}

impl Candidate {
    /// In the order of the tables.
    pub(crate) const ALL: [Self; 6] =
        [Self::NatBalancer, Self::Nftables, Self::Nginx, Self::Haproxy, Self::Route, Self::Redirect];

    /// Those that real TCP goes through.
    pub(crate) fn carries_tcp(self) -> bool {
        self != Self::Redirect
    }

    /// Those that forward packets.
    pub(crate) fn forwards_packets(self) -> bool {
        !matches!(self, Self::Nginx | Self::Haproxy)
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::NatBalancer => "NatBalancer",
            Self::Nftables => "nftables",
            Self::Nginx => "nginx stream",
            Self::Haproxy => "HAProxy TCP",
            Self::Route => "routing alone",
            Self::Redirect => "redirect alone",
        }
    }

    /// Whether it is one to choose, or there to compare with.
    pub(crate) fn balances(self) -> bool {
        !matches!(self, Self::Route | Self::Redirect)
    }

    /// Where a client has to connect to: the balancer, or the backend itself.
    pub(crate) fn target(self, vip: SocketAddr, backend: SocketAddr) -> SocketAddr {
        if self.balances() { vip } else { backend }
    }
}

/// A directory for configurations, which goes with the value.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("xdpkit-nat-comparison-{}", std::process::id()));
        fs::create_dir_all(&path).map_err(|error| format!("cannot create {}: {error}", path.display()))?;
        Ok(Self(path))
    }

    /// Writes a file and answers its path.
    pub(crate) fn put(&self, name: &str, text: &str) -> Result<String> {
        let path = self.0.join(name);
        fs::write(&path, text).map_err(|error| format!("cannot write {}: {error}", path.display()))?;
        Ok(path.display().to_string())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is in the temporary directory.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A candidate at work. It ends when this is dropped.
pub(crate) struct Running {
    pub(crate) proxy: Option<Process>,
    _balancer: Option<(NatBalancer, Vec<Attachment>)>,
    _forward: Option<LiveForward>,
}

/// What is balanced, to which backends: iperf3, whose two connections have to meet, to one.
pub(crate) struct Services {
    pub(crate) http: Vec<SocketAddr>,
    pub(crate) iperf3: Option<SocketAddr>,
    pub(crate) udp: Vec<SocketAddr>,
}

impl Candidate {
    /// Sets the candidate up on a router with `eth0` to the clients and `eth1` to the backends.
    pub(crate) fn start(
        self,
        place: &Place,
        scratch: &Scratch,
        router: &Namespace,
        services: &Services,
    ) -> Result<Running> {
        let mut running = Running { proxy: None, _balancer: None, _forward: None };
        match self {
            Self::NatBalancer => running._balancer = Some(nat_balancer(router, services)?),
            Self::Nftables => {
                let rules = scratch.put("nftables.nft", &nftables(services))?;
                let load = Process::start(router, &place.others, "nft", &["-f", &rules])?;
                load.finish(Duration::from_secs(10), &AtomicBool::new(false))?;
            }
            Self::Nginx | Self::Haproxy => {
                router.add_address("lo", IpAddr::from(VIP).into())?;
                let mut proxy = if self == Self::Nginx {
                    let file = scratch.put("nginx.conf", &nginx(services, scratch))?;
                    Process::start(router, &[place.balancer], "nginx", &["-c", &file])?
                } else {
                    let file = scratch.put("haproxy.cfg", &haproxy(services))?;
                    Process::start(router, &[place.balancer], "haproxy", &["-db", "-f", &file])?
                };
                proxy.wait_for_port(router, HTTP)?;
                running.proxy = Some(proxy);
            }
            Self::Route => {}
            Self::Redirect => running._forward = Some(LiveForward::new(router, "eth0", "eth1")?),
        }
        Ok(running)
    }
}

fn nat_balancer(router: &Namespace, services: &Services) -> Result<(NatBalancer, Vec<Attachment>)> {
    let balancer = NatBalancer::load(&NatConfig::default().capacity(CAPACITY))?;
    if !services.http.is_empty() {
        balancer.insert(ServiceAddr::tcp(VIP, HTTP), &NatService::new(services.http.iter().copied()))?;
    }
    if let Some(backend) = services.iperf3 {
        balancer.insert(ServiceAddr::tcp(VIP, IPERF3), &NatService::new([backend]))?;
    }
    if !services.udp.is_empty() {
        balancer.insert(ServiceAddr::udp(VIP, UDP), &NatService::new(services.udp.iter().copied()))?;
    }
    let attach = |interface| router.run(|| balancer.attach(&AttachOptions::new(interface)));
    let attachments = vec![attach("eth0")?, attach("eth1")?];
    Ok((balancer, attachments))
}

fn nftables(services: &Services) -> String {
    let rule = |protocol, port, backends: &[SocketAddr]| {
        let backend = |(number, at): (usize, &SocketAddr)| format!("{number} : {} . {}", at.ip(), at.port());
        let map: Vec<_> = backends.iter().enumerate().map(backend).collect();
        let choice = format!("numgen inc mod {} map {{ {} }}", map.len(), map.join(", "));
        match backends {
            [] => String::new(),
            [at] => format!("ip daddr {VIP} {protocol} dport {port} dnat to {at}\n"),
            _ => format!("ip daddr {VIP} {protocol} dport {port} dnat ip addr . port to {choice}\n"),
        }
    };
    let iperf3: Vec<_> = services.iperf3.into_iter().collect();
    let rules = rule("tcp", HTTP, &services.http) + &rule("tcp", IPERF3, &iperf3) + &rule("udp", UDP, &services.udp);
    format!(
        "table ip nat {{
chain prerouting {{
type nat hook prerouting priority dstnat;
{rules}}}
chain postrouting {{
type nat hook postrouting priority srcnat;
oifname \"eth1\" masquerade
}}
}}
"
    )
}

fn haproxy(services: &Services) -> String {
    let list = |name: &str, port: u16, backends: &[SocketAddr]| {
        let server = |(number, at): (usize, &SocketAddr)| format!("  server s{number} {at}\n");
        let servers: String = backends.iter().enumerate().map(server).collect();
        format!("listen {name}\n  bind {VIP}:{port}\n  balance roundrobin\n{servers}")
    };
    let iperf3: Vec<_> = services.iperf3.into_iter().collect();
    format!(
        "global\n  nbthread 1\ndefaults\n  mode tcp\n  timeout connect 5s\n  timeout client 60s\n  timeout server 60s\n{}{}",
        list("http", HTTP, &services.http),
        list("iperf3", IPERF3, &iperf3)
    )
}

/// One process, so that there is none to be left behind.
const NGINX: &str = "daemon off;
master_process off;
error_log stderr crit;
events { worker_connections 16384; }
";

fn nginx(services: &Services, scratch: &Scratch) -> String {
    let balanced = |name: &str, port: u16, backends: &[SocketAddr]| {
        let servers: String = backends.iter().map(|at| format!("server {at}; ")).collect();
        format!("upstream {name} {{ {servers}}}\nserver {{ listen {VIP}:{port}; proxy_pass {name}; }}\n")
    };
    let iperf3: Vec<_> = services.iperf3.into_iter().collect();
    format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;\npid {}/proxy.pid;\n{NGINX}stream {{\n{}{}}}\n",
        scratch.0.display(),
        balanced("http", HTTP, &services.http),
        balanced("iperf3", IPERF3, &iperf3)
    )
}

/// The backends' web server: a short page from memory.
pub(crate) fn web_server(scratch: &Scratch, number: usize) -> Result<String> {
    let configuration = format!(
        "pid {}/backend{number}.pid;\n{NGINX}http {{
access_log off;
keepalive_requests 1000000000;
server {{ listen {BACKEND_HTTP} backlog=4096; return 200 \"hello, world\\n\"; }}
}}
",
        scratch.0.display()
    );
    scratch.put(&format!("backend{number}.conf"), &configuration)
}
