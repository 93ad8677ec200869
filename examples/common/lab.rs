//! The tutorials' scenarios, played in network namespaces with real traffic.

use std::{
    error::Error,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use serde_json::json;
use xdpkit::{Rule, Selector, ServiceAddr, ipnet::IpNet};
use xdpkit_lab::{
    Namespace,
    topology::{Nat, Pair},
    traffic::{HttpServer, http_get, ping},
};

use super::Output;

const PATIENCE: Duration = Duration::from_millis(700);

/// A scenario that is being played. It sets the session's stop flag when it is over.
pub(crate) struct Scenario(JoinHandle<Result<(), String>>);

impl Scenario {
    pub(crate) fn start(stop: Arc<AtomicBool>, play: impl FnOnce() -> Result<(), String> + Send + 'static) -> Self {
        Self(std::thread::spawn(move || {
            let result = play();
            stop.store(true, Ordering::Relaxed);
            result
        }))
    }

    /// What came of it: an error when something did not happen as it should.
    pub(crate) fn finish(self) -> Result<(), Box<dyn Error>> {
        self.0.join().map_err(|_| "the scenario panicked")??;
        Ok(())
    }
}

/// What a client gets from the server: ping and a page over TCP, in both families.
pub(crate) struct Attempt {
    pub(crate) what: String,
    pub(crate) worked: bool,
}

/// Tries everything from one client. Pages are served on port 80 of `servers`.
pub(crate) fn attempts(client: &Namespace, servers: [IpAddr; 2]) -> Vec<Attempt> {
    let mut attempts = Vec::new();
    for server in servers {
        let pinged = ping(client, server, 1, Duration::ZERO, PATIENCE).is_ok_and(|report| report.received == 1);
        attempts.push(Attempt { what: format!("ping {server}"), worked: pinged });
        let address = SocketAddr::new(server, 80);
        let page = http_get(client, address, "/", PATIENCE);
        attempts.push(Attempt { what: format!("GET http://{address}/"), worked: page.is_ok() });
    }
    attempts
}

fn report(output: Output, who: &str, attempts: &[Attempt]) {
    for Attempt { what, worked } in attempts {
        output.line(&json!({"event": "lab", "client": who, "what": what, "worked": worked}), || {
            format!("{who}: {what}: {}", if *worked { "answered" } else { "no answer" })
        });
    }
}

/// Fails unless all attempts ended as they should.
fn expect(who: &str, attempts: &[Attempt], worked: bool) -> Result<(), String> {
    match attempts.iter().find(|attempt| attempt.worked != worked) {
        None => Ok(()),
        Some(attempt) => {
            let was = if attempt.worked { "was answered" } else { "was not answered" };
            Err(format!("{who}: {} {was}, and should {}have been", attempt.what, if worked { "" } else { "not " }))
        }
    }
}

pub(crate) fn pages(pair: &Pair) -> xdpkit_lab::Result<Vec<HttpServer>> {
    let page = |peer: SocketAddr| format!("hello, {}\n", peer.ip());
    pair.server_addr
        .both()
        .into_iter()
        .map(|address| HttpServer::start(&pair.server, (address, 80).into(), page))
        .collect()
}

/// Tutorial 1: one client, whose packets are watched.
pub(crate) struct Watched {
    pub(crate) pair: Pair,
}

impl Watched {
    pub(crate) fn build() -> xdpkit_lab::Result<Self> {
        Ok(Self { pair: Pair::new()? })
    }

    pub(crate) fn play(self, stop: Arc<AtomicBool>, output: Output) -> Scenario {
        Scenario::start(stop, move || {
            let _servers = pages(&self.pair).map_err(|error| error.to_string())?;
            report(output, "client", &attempts(&self.pair.client, self.pair.server_addr.both()));
            // The last packets of the connections are on their way.
            std::thread::sleep(Duration::from_millis(200));
            Ok(())
        })
    }
}

/// Tutorial 3: a network that is denied, and one client in it that is allowed.
pub(crate) struct Guarded {
    pub(crate) pair: Pair,
}

impl Guarded {
    pub(crate) fn build() -> xdpkit_lab::Result<Self> {
        Ok(Self { pair: Pair::with_clients(2)? })
    }

    /// Denies the network, and allows the first client in it: the longer prefix decides.
    pub(crate) fn rules(&self) -> Vec<(Selector, Rule)> {
        let [v4, v6] = self.pair.client_addr.both();
        let network = |address: IpAddr, length| IpNet::new(address, length).expect("the length fits").into();
        vec![
            (network(v4, 24), Rule::deny()),
            (network(v6, 64), Rule::deny()),
            (v4.into(), Rule::allow()),
            (v6.into(), Rule::allow()),
        ]
    }

    /// The first client and the second, each with what it gets.
    pub(crate) fn try_both(&self) -> xdpkit_lab::Result<[Vec<Attempt>; 2]> {
        let _servers = pages(&self.pair)?;
        let servers = self.pair.server_addr.both();
        Ok([attempts(&self.pair.clients[0], servers), attempts(&self.pair.clients[1], servers)])
    }

    /// `own_rules`: whether [`Guarded::rules`] are in force, so that we know what has to come of it.
    pub(crate) fn play(self, own_rules: bool, stop: Arc<AtomicBool>, output: Output) -> Scenario {
        Scenario::start(stop, move || {
            let [first, second] = self.try_both().map_err(|error| error.to_string())?;
            let names = self.pair.client_addrs.iter().map(|address| address.v4.to_string()).collect::<Vec<_>>();
            report(output, &names[0], &first);
            report(output, &names[1], &second);
            if !own_rules {
                return Ok(());
            }
            expect(&names[0], &first, true)?;
            expect(&names[1], &second, false)
        })
    }
}

/// The NAT tutorial: clients in one network, web servers in another, virtual addresses at the balancer between them.
pub(crate) struct Balanced {
    pub(crate) nat: Nat,
}

impl Balanced {
    pub(crate) const INTERFACES: [&'static str; 2] = ["eth0", "eth1"];

    pub(crate) fn build() -> xdpkit_lab::Result<Self> {
        Ok(Self { nat: Nat::new(2, 2)? })
    }

    /// What is balanced unless the command line says so: the virtual addresses exist nowhere else.
    pub(crate) fn services(&self) -> [(ServiceAddr, Vec<SocketAddr>); 2] {
        let of = |family: usize, vip: [u8; 4], vip6: [u16; 8]| {
            let vip: IpAddr = if family == 0 { vip.into() } else { vip6.into() };
            let backends = self.nat.backend_addrs.iter().map(|host| SocketAddr::new(host.both()[family], 8080));
            (ServiceAddr::tcp(vip, 80), backends.collect())
        };
        let (vip, vip6) = ([198, 51, 100, 10], [0x2001, 0xdb8, 0x99, 0, 0, 0, 0, 0x10]);
        [of(0, vip, vip6), of(1, vip, vip6)]
    }

    /// A page a backend, which says its name and who asked.
    pub(crate) fn pages(&self) -> xdpkit_lab::Result<Vec<HttpServer>> {
        let hosts = self.nat.backends.iter().zip(&self.nat.backend_addrs).enumerate();
        let pages = hosts.flat_map(|(number, (ns, host))| {
            host.both().map(|address| {
                let page = move |peer: SocketAddr| format!("backend{number} to {}", peer.ip());
                HttpServer::start(ns, (address, 8080).into(), page)
            })
        });
        pages.collect()
    }

    /// Each client fetches so many pages from each service.
    pub(crate) fn fetch(&self, pages: usize) -> Vec<(usize, SocketAddr, Option<String>)> {
        let mut fetched = Vec::new();
        for (number, client) in self.nat.clients.iter().enumerate() {
            for (service, _) in self.services() {
                let address = SocketAddr::new(service.address, 80);
                for _ in 0..pages {
                    let page = http_get(client, address, "/", 4 * PATIENCE).ok();
                    fetched.push((number, address, page.map(|page| String::from_utf8_lossy(&page).trim().to_owned())));
                }
            }
        }
        fetched
    }

    pub(crate) fn play(self, own_services: bool, stop: Arc<AtomicBool>, output: Output) -> Scenario {
        Scenario::start(stop, move || {
            let _servers = self.pages().map_err(|error| error.to_string())?;
            let fetched = self.fetch(4);
            for (client, address, page) in &fetched {
                let (who, what) = (format!("client{client}"), format!("GET http://{address}/"));
                output.line(
                    &json!({"event": "lab", "client": who, "what": what, "worked": page.is_some(), "page": page}),
                    || format!("{who}: {what}: {}", page.as_deref().unwrap_or("no answer")),
                );
            }
            match fetched.iter().find(|(.., page)| page.is_none()) {
                Some((client, address, _)) if own_services => Err(format!("client{client}: no answer from {address}")),
                _ => Ok(()),
            }
        })
    }
}
