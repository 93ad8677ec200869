//! What packets see of a guard, whether one from a denied source arrives; and what a program is told when it is lost.

use std::{
    net::{IpAddr, SocketAddr, UdpSocket},
    time::{Duration, Instant},
};

use xdpkit::{AttachOptions, Attachment, Error, Firewall, Loss, Pipeline, Position, Result, Stage as _, Watch};
use xdpkit_lab::{Namespace, PacketSocket, frame::Frame, topology::Pair, veth};

use super::{pins::monitor, traffic::DENIED};

/// How long something may take that has to happen: nothing here depends on how fast this machine is.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packets {
    /// Only what is allowed arrives.
    Guarded,
    /// What is denied arrives, too.
    Unguarded,
}

/// Sends denied and allowed frames by `from`, and tells which of them arrive at the other end, which is `to`'s.
pub(crate) fn packets(from: (&Namespace, &str), to: (&Namespace, &str)) -> Packets {
    const TO: &str = "10.0.0.1";
    let sink = to.0.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
    sink.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let port = sink.local_addr().unwrap().port();
    let out = PacketSocket::open(from.0, from.1).unwrap();
    let macs = (from.0.mac(from.1).unwrap(), to.0.mac(to.1).unwrap());
    let frame = |source: &str, payload: &[u8]| {
        let source: IpAddr = source.parse().unwrap();
        let to = SocketAddr::new(TO.parse().unwrap(), port);
        Frame::udp(SocketAddr::new(source, 9001), to).macs(macs.0, macs.1).payload(payload).build()
    };
    let end = Instant::now() + PATIENCE;
    // A link that has just come up may lose one of them: three in a row have to be without what is denied.
    let mut guarded = 0;
    while guarded < 3 {
        out.send(&frame(DENIED[0], b"denied")).unwrap();
        out.send(&frame("10.0.0.2", b"allowed")).unwrap();
        let mut buffer = [0; 16];
        match sink.recv(&mut buffer) {
            Ok(6) => return Packets::Unguarded,
            Ok(_) => guarded += 1,
            Err(error) => {
                guarded = 0;
                assert!(Instant::now() < end, "nothing arrives: {error}");
            }
        }
    }
    Packets::Guarded
}

/// The same between the ends of a pair.
pub(crate) fn packets_of(pair: &Pair) -> Packets {
    packets((&pair.client, "eth0"), (&pair.server, "eth0"))
}

/// Creates a veth pair, whose second end gets its name when all else is done: who waits for that name and attaches at once
/// is in nobody's way.
pub(crate) fn veth_at_once(a: (&Namespace, &str), b: (&Namespace, &str)) {
    veth(a, (b.0, "unnamed")).unwrap();
    b.0.rename_link("unnamed", b.1).unwrap();
}

/// Makes the link of a pair anew, which has gone.
pub(crate) fn make_again(pair: &Pair) {
    veth_at_once((&pair.client, "eth0"), (&pair.server, "eth0"));
    for (ns, addresses) in [(&pair.client, pair.client_addr), (&pair.server, pair.server_addr)] {
        ns.add_address("eth0", format!("{}/24", addresses.v4).parse().unwrap()).unwrap();
        ns.add_address("eth0", format!("{}/64", addresses.v6).parse().unwrap()).unwrap();
    }
}

/// Waits until something holds.
pub(crate) fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Attaches to `eth0` of the server, and watches.
pub(crate) fn attach(pair: &Pair, firewall: &Firewall) -> (Attachment, Watch) {
    let attachment = pair.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
    let watch = attachment.watch().unwrap();
    assert_eq!(attachment.loss().unwrap(), None);
    assert_eq!(packets_of(pair), Packets::Guarded);
    (attachment, watch)
}

/// What is told of a loss, in short.
pub(crate) fn told(loss: Option<Loss>) -> &'static str {
    match loss {
        None => "nothing",
        Some(Loss::Detached { interface }) if interface == "eth0" => "detached",
        Some(Loss::Moved { interface }) if interface == "eth0" => "moved",
        Some(Loss::Superseded { what }) if !what.is_empty() => "superseded",
        Some(Loss::Unpinned { interface, .. }) if interface == "eth0" => "unpinned",
        Some(other) => panic!("{other:?}"),
    }
}

/// Every edit of a chain of `a` and `b`, which must be refused and change nothing.
pub(crate) fn refused(chain: &mut Pipeline, is_it: impl Fn(&Error) -> bool) {
    let c = monitor("c");
    let stages = chain.stages().join(",");
    let (a, b) = (monitor("a"), monitor("b"));
    type Edit<'a> = &'a mut dyn FnMut(&mut Pipeline) -> Result<()>;
    let edits: [(&str, Edit<'_>); 9] = [
        ("insert first", &mut |chain| chain.insert(Position::First, &c)),
        ("insert last", &mut |chain| chain.insert(Position::Last, &c)),
        ("remove first", &mut |chain| chain.remove("a")),
        ("remove last", &mut |chain| chain.remove("b")),
        ("replace", &mut |chain| chain.replace("a", &c)),
        ("reorder", &mut |chain| chain.reorder(&["b", "a"])),
        ("set_stages", &mut |chain| chain.set_stages(&[&a, &b, &c])),
        ("set_last", &mut |chain| chain.set_last(Some(c.program_fd()))),
        ("set_last, none", &mut |chain| chain.set_last(None)),
    ];
    for (name, edit) in edits {
        let error = edit(chain).expect_err(name);
        assert!(is_it(&error), "{name}: {error}");
        assert_eq!(chain.stages().join(","), stages, "{name}");
    }
}
