//! Ways to lose the guard, one test each: what was done, what a program that links the library is told, what packets see.
//! None is silent. Here the interface itself changes; `others.rs` has what other programs do, `tests/appliance/guard.rs` and
//! `tests/examples/guard.rs` what the programs say.
//!
//! | what was done | what the program is told | what packets see |
//! |---|---|---|
//! | the interface is deleted, and made again | `Loss::Detached`; edits: `Error::Detached` | unguarded until `reattach` |
//! | the same, pinned | the same; the dead link's pins are replaced | the same |
//! | its peer is deleted | `Loss::Detached` | the interface is gone |
//! | it is moved to another network namespace, and back | `Loss::Moved`, then nothing | guarded there, and here again |
//! | it is moved, and another takes its name | `Loss::Moved` | the other is unguarded until `reattach` |
//! | it is renamed | nothing | guarded |
//! | it is renamed, and another takes its name | `Loss::Moved` | the other is unguarded until `reattach` |
//! | it is taken down, and up | nothing | guarded |
//! | it joins a bridge | nothing | guarded |
//! | its MTU is raised | nothing | guarded |
//! | the kernel's notices overflow | `Loss::Detached` | |
//! | a thread in another network namespace waits | `Loss::Detached` | |
//! | the pipeline that is watched is dropped | an error | unguarded, as it was told |

#[path = "../common/mod.rs"]
mod common;
mod others;

use std::time::Duration;

use common::{
    guard::{PATIENCE, Packets, attach, make_again, packets, packets_of, refused, told, until},
    pins::{firewall, monitor, options},
};
use xdpkit::{AttachOptions, Error, Pipeline, Position, Stage as _, XdpMode, pinned};
use xdpkit_lab::{Namespace, bpffs::BpfFs, topology::Pair, veth};

#[test]
fn the_interface_is_deleted_and_made_again() {
    let pair = Pair::new().unwrap();
    let firewall = firewall();
    let (mut attachment, mut watch) = attach(&pair, &firewall);
    assert_eq!((attachment.mode(), told(watch.wait(Duration::ZERO).unwrap())), (Some(XdpMode::Native), "nothing"));
    pair.server.delete_link("eth0").unwrap();
    assert_eq!(told(watch.wait(PATIENCE).unwrap()), "detached");
    assert_eq!(told(attachment.loss().unwrap()), "detached");
    assert_eq!((attachment.mode(), attachment.is_attached().unwrap()), (None, false));
    assert_eq!(attachment.interface().name(), "eth0");
    assert!(!watch.wait_for_interface(Duration::ZERO).unwrap());
    let error = pair.server.run(|| attachment.reattach()).unwrap_err();
    assert!(matches!(&error, Error::UnknownInterface { interface } if interface == "eth0"), "{error}");

    make_again(&pair);
    assert!(watch.wait_for_interface(PATIENCE).unwrap());
    assert_eq!(packets_of(&pair), Packets::Unguarded);
    assert_eq!(told(attachment.loss().unwrap()), "detached", "as long as nobody attaches it");
    let before = firewall.stats().unwrap().total().packets;
    pair.server.run(|| attachment.reattach()).unwrap();
    assert_eq!((attachment.mode(), told(attachment.loss().unwrap())), (Some(XdpMode::Native), "nothing"));
    assert_eq!(packets_of(&pair), Packets::Guarded);
    assert!(firewall.stats().unwrap().total().packets >= before + 2, "counters go on");
    assert!(watch.wait(Duration::ZERO).is_err(), "it is another attachment");
    pair.server.run(|| attachment.reattach()).unwrap();
    drop(attachment);
    assert_eq!(packets_of(&pair), Packets::Unguarded);
}

#[test]
fn a_dead_chain_refuses_every_edit_and_goes_on_when_it_is_attached_again() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let pair = Pair::new().unwrap();
        let (a, b, guard) = (monitor("a"), monitor("b"), firewall());
        let mut chain = Pipeline::new(&[&a, &b]).unwrap();
        let options = match &pins {
            Some(pins) => options(pins.path()),
            None => AttachOptions::new("eth0"),
        };
        pair.server.run(|| chain.attach(&options)).unwrap();
        pair.server.delete_link("eth0").unwrap();
        until("the loss", || told(chain.loss().unwrap()) == "detached");
        assert!(!chain.is_attached().unwrap() && !chain.is_superseded().unwrap() && chain.mode().is_none());
        refused(&mut chain, |error| matches!(error, Error::Detached { interface } if interface == "eth0"));
        // Nothing to do is something to refuse, too.
        let error = chain.set_stages(&[&a, &b]).unwrap_err();
        assert!(error.to_string().starts_with("interface `eth0` is gone"), "{error}");
        make_again(&pair);
        pair.server.run(|| chain.reattach()).unwrap();
        assert_eq!(packets_of(&pair), Packets::Unguarded, "the monitors only look");
        chain.insert(Position::First, &guard).unwrap();
        assert_eq!(packets_of(&pair), Packets::Guarded);
        chain.reorder(&["b", "a", "firewall"]).unwrap();
        assert_eq!(packets_of(&pair), Packets::Guarded);
        chain.remove("b").unwrap();
        assert!(a.stats().unwrap().total().packets > 0 && b.stats().unwrap().total().packets > 0);
        if let Some(pins) = &pins {
            let index = pair.server.ifindex("eth0").unwrap();
            let expected = [(index, vec!["a".to_owned(), "firewall".to_owned()])];
            assert_eq!(pinned(pins.path()).unwrap().interfaces, expected, "the dead link's pins are gone");
            drop(chain);
            assert_eq!(packets_of(&pair), Packets::Guarded, "pinned again");
        } else {
            chain.detach().unwrap();
            assert_eq!(packets_of(&pair), Packets::Unguarded);
        }
    }
}

#[test]
fn a_dead_chain_can_be_detached_and_its_pins_go() {
    let (pair, pins) = (Pair::new().unwrap(), BpfFs::new().unwrap());
    let firewall = firewall();
    let attachment = pair.server.run(|| firewall.attach(&options(pins.path()))).unwrap();
    pair.server.delete_link("eth0").unwrap();
    attachment.detach().unwrap();
    assert_eq!(pinned(pins.path()).unwrap().interfaces, []);
}

#[test]
fn its_peer_is_deleted() {
    let pair = Pair::new().unwrap();
    let (_attachment, mut watch) = attach(&pair, &firewall());
    pair.client.delete_link("eth0").unwrap();
    assert_eq!(told(watch.wait(PATIENCE).unwrap()), "detached");
}

/// The link of a pair with its server's end under another name, or elsewhere: with the address that packets go to.
fn address(ns: &Namespace, dev: &str) {
    ns.set_up(dev).unwrap();
    ns.add_address(dev, "10.0.0.1/24".parse().unwrap()).unwrap();
}

#[test]
fn it_is_moved_to_another_namespace_and_back() {
    let (pair, elsewhere) = (Pair::new().unwrap(), Namespace::new("elsewhere").unwrap());
    let firewall = firewall();
    let mut chain = Pipeline::new(&[&monitor("monitor")]).unwrap();
    pair.server.run(|| chain.attach(&AttachOptions::new("eth0"))).unwrap();
    let mut watch = chain.watch().unwrap();
    pair.server.move_link("eth0", &elsewhere).unwrap();
    assert_eq!(told(watch.wait(PATIENCE).unwrap()), "moved");
    assert!(!chain.is_attached().unwrap());
    address(&elsewhere, "eth0");
    assert_eq!(packets((&pair.client, "eth0"), (&elsewhere, "eth0")), Packets::Unguarded);
    chain.insert(Position::Last, &firewall).unwrap();
    assert_eq!(
        packets((&pair.client, "eth0"), (&elsewhere, "eth0")),
        Packets::Guarded,
        "the chain has gone with it, and edits reach it there"
    );
    let error = pair.server.run(|| chain.reattach()).unwrap_err();
    assert!(matches!(error, Error::UnknownInterface { .. }), "{error}");
    elsewhere.move_link("eth0", &pair.server).unwrap();
    address(&pair.server, "eth0");
    assert!(watch.wait_for_interface(PATIENCE).unwrap());
    assert_eq!(told(watch.wait(Duration::ZERO).unwrap()), "nothing");
    pair.server.run(|| chain.reattach()).unwrap();
    assert_eq!(packets_of(&pair), Packets::Guarded);
}

#[test]
fn it_is_moved_and_another_takes_its_name() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let (pair, elsewhere) = (Pair::new().unwrap(), Namespace::new("elsewhere").unwrap());
        let firewall = firewall();
        let options = match &pins {
            Some(pins) => options(pins.path()),
            None => AttachOptions::new("eth0"),
        };
        let mut attachment = pair.server.run(|| firewall.attach(&options)).unwrap();
        let mut watch = attachment.watch().unwrap();
        pair.server.move_link("eth0", &elsewhere).unwrap();
        pair.client.rename_link("eth0", "old").unwrap();
        make_again(&pair);
        assert_eq!(told(watch.wait(PATIENCE).unwrap()), "moved");
        assert_eq!(packets_of(&pair), Packets::Unguarded);
        pair.server.run(|| attachment.reattach()).unwrap();
        assert_eq!(packets_of(&pair), Packets::Guarded);
        address(&elsewhere, "eth0");
        assert_eq!(packets((&pair.client, "old"), (&elsewhere, "eth0")), Packets::Unguarded, "that one is let go of");
        if let Some(pins) = &pins {
            let index = pair.server.ifindex("eth0").unwrap();
            assert_eq!(pinned(pins.path()).unwrap().interfaces, [(index, vec!["firewall".to_owned()])]);
        }
    }
}

#[test]
fn it_is_renamed() {
    let pair = Pair::new().unwrap();
    let (mut attachment, mut watch) = attach(&pair, &firewall());
    pair.server.rename_link("eth0", "wan").unwrap();
    assert_eq!(told(watch.wait(Duration::from_secs(3)).unwrap()), "nothing");
    assert!(attachment.is_attached().unwrap());
    pair.server.run(|| attachment.reattach()).unwrap();
    assert_eq!(packets((&pair.client, "eth0"), (&pair.server, "wan")), Packets::Guarded);
}

#[test]
fn it_is_renamed_and_another_takes_its_name() {
    let pair = Pair::new().unwrap();
    let (mut attachment, mut watch) = attach(&pair, &firewall());
    pair.server.rename_link("eth0", "wan").unwrap();
    pair.server.remove_address("wan", "10.0.0.1/24".parse().unwrap()).unwrap();
    pair.client.rename_link("eth0", "old").unwrap();
    veth((&pair.client, "eth0"), (&pair.server, "eth0")).unwrap();
    address(&pair.server, "eth0");
    assert_eq!(told(watch.wait(PATIENCE).unwrap()), "moved");
    assert_eq!(packets_of(&pair), Packets::Unguarded);
    pair.server.run(|| attachment.reattach()).unwrap();
    assert_eq!(packets_of(&pair), Packets::Guarded);
}

#[test]
fn it_is_taken_down_and_up() {
    let pair = Pair::new().unwrap();
    let (attachment, mut watch) = attach(&pair, &firewall());
    pair.server.set_down("eth0").unwrap();
    assert_eq!(told(watch.wait(Duration::from_secs(2)).unwrap()), "nothing");
    assert!(attachment.is_attached().unwrap());
    pair.server.set_up("eth0").unwrap();
    assert_eq!(packets_of(&pair), Packets::Guarded);
    assert_eq!(told(watch.wait(Duration::ZERO).unwrap()), "nothing");
}

#[test]
fn it_joins_a_bridge() {
    let pair = Pair::new().unwrap();
    let (attachment, mut watch) = attach(&pair, &firewall());
    pair.server.remove_address("eth0", "10.0.0.1/24".parse().unwrap()).unwrap();
    pair.server.add_bridge("br0", &["eth0"]).unwrap();
    pair.server.set_mac("br0", pair.server.mac("eth0").unwrap()).unwrap();
    address(&pair.server, "br0");
    assert_eq!(told(watch.wait(Duration::from_secs(2)).unwrap()), "nothing");
    assert!(attachment.is_attached().unwrap());
    assert_eq!(packets((&pair.client, "eth0"), (&pair.server, "br0")), Packets::Guarded);
}

#[test]
fn its_mtu_is_raised() {
    let pair = Pair::new().unwrap();
    let (attachment, _) = attach(&pair, &firewall());
    for ns in [&pair.server, &pair.client] {
        // What a driver refuses changes nothing; what it takes, our programs do.
        let _ = ns.set_mtu("eth0", 9000);
    }
    assert_eq!(told(attachment.loss().unwrap()), "nothing");
    assert_eq!(packets_of(&pair), Packets::Guarded);
}

#[test]
fn the_kernels_notices_overflow() {
    let pair = Pair::new().unwrap();
    let (_attachment, mut watch) = attach(&pair, &firewall());
    // More than a socket's buffer holds, while nobody waits.
    for round in 0..2000 {
        pair.server.set_mtu("lo", 1500 + round % 2).unwrap();
    }
    assert_eq!(told(watch.wait(Duration::ZERO).unwrap()), "nothing");
    for round in 0..2000 {
        pair.server.set_mtu("lo", 1500 + round % 2).unwrap();
    }
    pair.server.delete_link("eth0").unwrap();
    assert_eq!(told(watch.wait(PATIENCE).unwrap()), "detached");
}

#[test]
fn a_thread_in_another_namespace_waits() {
    let (pair, elsewhere) = (Pair::new().unwrap(), Namespace::new("elsewhere").unwrap());
    let firewall = firewall();
    let attachment = pair.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
    // Made and waited for there, where an interface of this name comes and goes that is another one.
    veth((&elsewhere, "eth0"), (&elsewhere, "eth1")).unwrap();
    elsewhere.run(|| {
        let mut watch = attachment.watch().unwrap();
        assert_eq!(told(watch.wait(Duration::ZERO).unwrap()), "nothing");
        elsewhere.delete_link("eth0").unwrap();
        assert_eq!(told(watch.wait(Duration::from_secs(2)).unwrap()), "nothing");
        pair.server.delete_link("eth0").unwrap();
        assert_eq!(told(watch.wait(PATIENCE).unwrap()), "detached");
    });
}

#[test]
fn two_threads_wait_and_both_learn_it() {
    let pair = Pair::new().unwrap();
    let (attachment, mut watch) = attach(&pair, &firewall());
    let mut second = attachment.watch().unwrap();
    std::thread::scope(|scope| {
        let waits = [&mut watch, &mut second].map(|watch| scope.spawn(|| told(watch.wait(PATIENCE).unwrap())));
        pair.server.delete_link("eth0").unwrap();
        assert_eq!(waits.map(|wait| wait.join().unwrap()), ["detached"; 2]);
    });
}

#[test]
fn the_pipeline_that_is_watched_is_dropped() {
    let pair = Pair::new().unwrap();
    let (attachment, mut watch) = attach(&pair, &firewall());
    drop(attachment);
    assert_eq!(packets_of(&pair), Packets::Unguarded, "a watch keeps nothing attached");
    let error = watch.wait(PATIENCE).unwrap_err();
    assert!(error.to_string().contains("has been dropped, detached or attached again"), "{error}");
    let chain = Pipeline::new(&[&monitor("a")]).unwrap();
    assert!(matches!(chain.watch(), Err(Error::Pipeline { .. })));
    let mut chain = chain;
    assert!(matches!(chain.reattach(), Err(Error::Pipeline { .. })));
}
