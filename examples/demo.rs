//! The main jobs, one scene each, with real traffic between network namespaces: `./x demo`.
//!
//! Needs root, and leaves nothing behind. `XDPKIT_PREFIXES` names a list of real prefixes, one a line, plain or
//! gzipped; without one, a list of that size is made up.

mod common;

use std::{
    collections::BTreeMap,
    error::Error,
    process::ExitCode,
    time::{Duration, Instant},
};

use common::{
    dsr::Tutorial,
    lab::{Attempt, Balanced, Guarded, Limited, Pinged, Watched, attempts, pages},
};
use xdpkit::{
    AttachOptions, DsrBalancer, DsrConfig, DsrService, Firewall, FirewallConfig, Forwarding, MonitorConfig,
    NatBalancer, NatConfig, NatService, PacketMonitor, Pipeline, Rate, RateLimiter, RateLimiterConfig, Reason, Rule,
    Scope, Stage as _, ipnet::IpNet,
};
use xdpkit_lab::prefixes::Prefixes;

/// `println!` for a reader that may leave.
macro_rules! say {
    ($($text:tt)*) => { common::say(format_args!($($text)*)) };
}

type Outcome = Result<(), Box<dyn Error>>;
type Scene = fn() -> Outcome;

fn main() -> ExitCode {
    common::exit(play())
}

fn play() -> Outcome {
    let start = Instant::now();
    let scenes: [(&str, Scene); 6] = [
        ("PacketMonitor: watching a real connection", watch),
        ("RateLimiter: a client that pings too fast", limit),
        ("Firewall: cutting one client off", guard),
        ("NatBalancer: two web servers behind one address", translate),
        ("DsrBalancer: two neighbours behind one address", || balance(Forwarding::L2)),
        ("DsrBalancer and TunnelDecap: the same through tunnels", || balance(Forwarding::IpIp)),
    ];
    for (number, (title, scene)) in scenes.into_iter().enumerate() {
        say!("\n== Scene {}. {title}\n", number + 1);
        scene()?;
    }
    say!("\nAll as it should be, in {:.1} s. The namespaces are gone.", start.elapsed().as_secs_f32());
    Ok(())
}

/// A client pings the server and fetches a page, under the monitor's eyes.
fn watch() -> Outcome {
    let lab = Watched::build()?;
    let monitor = PacketMonitor::load(&MonitorConfig::default().sample(1))?;
    let mut events = monitor.events()?;
    let attachment = lab.pair.server.run(|| monitor.attach(&AttachOptions::new("eth0")))?;
    say!("A client and a server, each in a network namespace, joined by a veth pair.");
    say!(
        "The server's eth0 has an XDP program in {} mode, which reports what it sees:\n",
        attachment.mode().unwrap_or_default()
    );
    let _pages = pages(&lab.pair)?;
    let tried = attempts(&lab.pair.client, lab.pair.server_addr.both());
    show("client", &tried);
    say!("");
    let mut seen = 0;
    while let Some(packet) = events.next_within(Duration::from_millis(100))? {
        say!("    {packet}");
        seen += 1;
    }
    let counts = monitor.protocols()?;
    say!(
        "\nCounted: {} ARP, {} IPv4, {} IPv6; of these {} TCP, {} ICMP, {} ICMPv6. {} events lost.",
        counts.arp.packets,
        counts.ipv4.packets,
        counts.ipv6.packets,
        counts.tcp.packets,
        counts.icmp.packets,
        counts.icmpv6.packets,
        monitor.events_lost()?
    );
    check(tried.iter().all(|attempt| attempt.worked), "the client is answered")?;
    check(seen > 10 && counts.tcp.packets > 8 && counts.icmp.packets == 1, "the monitor sees it all")
}

/// Two clients ping the server, each with a limit of five a second; one sends thirty at once.
fn limit() -> Outcome {
    let lab = Limited::build()?;
    // The clients are in one /64, which is a source by default.
    let config = RateLimiterConfig::default().prefix_v6(128).limit(Scope::IcmpEcho, Rate::per_second(5));
    let limiter = RateLimiter::load(&config)?;
    let mut events = limiter.events()?;
    let attachment = lab.pair.server.run(|| limiter.attach(&AttachOptions::new("eth0")))?;
    say!("Each source may send five echo requests a second, and five at once.\n");
    let pinged = lab.ping_both()?;
    for (address, pinged) in lab.pair.client_addrs.iter().zip(&pinged) {
        for Pinged { server, sent, answered } in pinged {
            say!("    {}: ping {server}: {answered} of {sent} answered", address.v4);
        }
    }
    say!("");
    while let Some(event) = events.try_next() {
        say!("    {event}");
    }
    for bucket in limiter.top(2)? {
        say!("    {} has used {:.0} % of its burst of {}", bucket.source, bucket.level * 100.0, bucket.scope);
    }
    attachment.detach()?;
    check(
        pinged[0].iter().all(|pinged| (5..pinged.sent).contains(&pinged.answered)),
        "the fast client gets what it may send",
    )?;
    check(pinged[1].iter().all(|pinged| pinged.answered == pinged.sent), "the other one loses nothing")
}

/// Two clients in a denied network; one is allowed by a longer prefix.
fn guard() -> Outcome {
    let lab = Guarded::build()?;
    let (mut rules, origin) = table()?;
    let count = rules.len();
    let firewall = Firewall::load(&FirewallConfig::default().capacity(u32::try_from(count)? + 4))?;
    let start = Instant::now();
    firewall.replace_all(rules.iter().map(|(prefix, rule)| ((*prefix).into(), *rule)))?;
    say!("{count} prefixes ({origin}), every other one denied, loaded in {:.1} s.", start.elapsed().as_secs_f32());
    let own = lab.rules();
    for (prefix, rule) in &own {
        say!("    {:<6} {prefix}", rule.decision.to_string());
        firewall.insert(*prefix, *rule)?;
    }
    rules.extend(own.into_iter().map(|(selector, rule)| (selector.source(), rule)));

    let before = lab.try_both()?;
    say!("\nBefore, without the firewall:\n");
    show(&lab.pair.client_addrs[0].v4.to_string(), &before[0]);
    show(&lab.pair.client_addrs[1].v4.to_string(), &before[1]);
    check(before.iter().flatten().all(|attempt| attempt.worked), "both clients are answered")?;

    let monitor = PacketMonitor::load(&MonitorConfig::default())?;
    let mut chain = Pipeline::new(&[&monitor, &firewall])?;
    lab.pair.server.run(|| chain.attach(&AttachOptions::new("eth0")))?;
    say!("\nWith the chain {}:\n", chain.stages().join(" -> "));
    let after = lab.try_both()?;
    show(&lab.pair.client_addrs[0].v4.to_string(), &after[0]);
    show(&lab.pair.client_addrs[1].v4.to_string(), &after[1]);
    let stats = firewall.stats()?;
    say!("\nThe firewall's counters:\n");
    for line in &stats.reasons {
        say!(
            "    {:<20} {:<5} {:>6} packets {:>8} bytes",
            line.reason,
            line.action,
            line.count.packets,
            line.count.bytes
        );
    }
    chain.detach()?;
    check(after[0].iter().all(|attempt| attempt.worked), "the allowed client goes on")?;
    check(after[1].iter().all(|attempt| !attempt.worked), "the denied client is cut off")?;
    check(
        stats.dropped().packets > 0 && stats.dropped() == stats.reason(Reason::Denied),
        "what was dropped was denied",
    )?;

    // The rules can be asked, too: what does the firewall say of an address in the table?
    if let Some(prefix) = rules.keys().nth(count / 2) {
        let address = prefix.network();
        if let Some(entry) = firewall.matching(address)? {
            say!("\nAsked about {address}: {} by {}.", entry.rule.decision, entry.selector);
        }
    }
    Ok(())
}

/// A client fetches pages from a virtual address; then a backend is drained.
fn balance(forwarding: Forwarding) -> Outcome {
    let lab = Tutorial::build(forwarding)?;
    let balancer = DsrBalancer::load(&DsrConfig::default())?;
    let (service, what) = match forwarding {
        Forwarding::L2 => (DsrService::l2(), "with the backend's MAC"),
        Forwarding::IpIp => (DsrService::ipip(), "inside an outer IP header"),
    };
    let attachment = lab.balancer.run(|| {
        for (address, backends) in lab.services() {
            balancer.insert_service(address, service, backends)?;
        }
        balancer.attach(&AttachOptions::new("eth0"))
    })?;
    say!("A client behind a gateway, a balancer, two backends. Packets go on {what}:\n");
    let pages = lab.fetch()?;
    for page in &pages {
        say!("    {}: {}", page.vip, page.text);
    }
    lab.judge(&pages)?;
    let (address, backends) = lab.services().swap_remove(0);
    balancer.drain(address, backends[0].0)?;
    let entry = balancer.service(address)?;
    say!("\n{} is drained: {} of {} slots remember it.", backends[0].0, entry.slots_in_transition, entry.slots);
    for backend in balancer.backends(address)? {
        let stats = backend.stats;
        say!(
            "    {:<14} {:<8} {:>5} slots {:>4} packets {:>3} new flows",
            backend.address.to_string(),
            backend.state,
            backend.slots,
            stats.forwarded.packets,
            stats.new_flows
        );
    }
    let drained = || -> xdpkit::Result<u64> { Ok(balancer.backends(address)?[0].stats.new_flows) };
    let before = drained()?;
    lab.fetch()?;
    check(drained()? == before, "no new connection goes to a drained backend")?;
    say!("\nMore pages were fetched, none of them from there.");
    attachment.detach()?;
    Ok(())
}

/// Clients fetch pages from virtual addresses; then one of the two servers is drained.
fn translate() -> Outcome {
    let lab = Balanced::build()?;
    let balancer = NatBalancer::load(&NatConfig::default())?;
    for (service, backends) in lab.services() {
        say!("{service} is served by {} and {}.", backends[0], backends[1]);
        balancer.insert(service, &NatService::new(backends))?;
    }
    let attach = |name| lab.nat.balancer.run(|| balancer.attach(&AttachOptions::new(name)));
    let _attached = Balanced::INTERFACES.map(attach).into_iter().collect::<xdpkit::Result<Vec<_>>>()?;
    let _pages = lab.pages()?;
    let show = |title: &str| -> Result<Vec<String>, Box<dyn Error>> {
        say!("\n{title}:\n");
        let mut pages = Vec::new();
        for (client, service, page) in lab.fetch(8) {
            let page = page.ok_or_else(|| format!("client{client} got no answer from {service}"))?;
            pages.push(page);
        }
        for (page, count) in pages.iter().fold(BTreeMap::new(), |mut counts: BTreeMap<_, usize>, page| {
            *counts.entry(page).or_default() += 1;
            counts
        }) {
            say!("    {count:>2} x {page:?}");
        }
        Ok(pages)
    };
    let before = show("Each client fetches eight pages from each; servers see the virtual address as the client")?;
    for (service, backends) in lab.services() {
        balancer.drain(&service, backends[0])?;
    }
    let after = show("The first server drained, for maintenance")?;
    say!("\nThe last connections, as the balancer lists them:\n");
    for connection in balancer.connections()?.iter().take(4) {
        say!("    {connection}");
    }
    let of = |pages: &[String], name| pages.iter().filter(|page| page.starts_with(name)).count();
    check(of(&before, "backend0") > 0 && of(&before, "backend1") > 0, "both servers answer")?;
    check(of(&after, "backend0") == 0, "a drained server gets no new connections")
}

fn show(who: &str, attempts: &[Attempt]) {
    for attempt in attempts {
        say!("    {who}: {:<32} {}", attempt.what, if attempt.worked { "answered" } else { "no answer" });
    }
}

fn check(holds: bool, what: &str) -> Outcome {
    if holds { Ok(()) } else { Err(format!("this should hold, and does not: {what}").into()) }
}

/// Prefixes with alternating rules, and where they come from.
fn table() -> Result<(BTreeMap<IpNet, Rule>, String), Box<dyn Error>> {
    let prefixes = Prefixes::read()?;
    let rules = [Rule::deny(), Rule::allow()].into_iter().cycle();
    Ok((prefixes.all().zip(rules).collect(), prefixes.origin))
}
