//! Ways in which other programs take the guard away, one test each: what was done, what a program that links the library is
//! told, what packets see. None is silent.
//!
//! | what was done | what the program is told | what packets see |
//! |---|---|---|
//! | the link is detached by another program | `Loss::Detached` | unguarded until `reattach` |
//! | a pinned link is detached by another program | `Loss::Detached` | unguarded until `reattach` |
//! | another program is put into the link | `Loss::Superseded`; edits: `Error::Superseded` | what that program does |
//! | an upgrade takes the chain over | `Loss::Superseded` | guarded |
//! | an upgrade is faster where the interface is back | `Error::Superseded` from `reattach` | guarded |
//! | another program is faster where the interface is back | `Error::ForeignProgram` from `reattach` | what that program does |
//! | the pins are removed | `Loss::Unpinned` | guarded while the process lives, and after `reattach` |
//! | another program wants the interface, in any mode | nothing: the kernel refuses it | guarded |

use std::time::Duration;

use crate::common::{
    guard::{PATIENCE, Packets, make_again, packets_of, refused, told},
    pins::{firewall, monitor, options},
};
use xdpkit::{AttachOptions, Error, Firewall, Loss, Pipeline, Position, Stage as _, XdpMode, pinned, remove_pins};
use xdpkit_lab::{bpffs::BpfFs, topology::Pair};

#[test]
fn the_link_is_detached_by_another_program() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let pair = Pair::new().unwrap();
        let firewall = firewall();
        let options = match &pins {
            Some(pins) => options(pins.path()),
            None => AttachOptions::new("eth0"),
        };
        let mut attachment = pair.server.run(|| firewall.attach(&options)).unwrap();
        let mut watch = attachment.watch().unwrap();
        pair.server.detach_link("eth0").unwrap();
        assert_eq!(told(watch.wait(PATIENCE).unwrap()), "detached");
        assert_eq!(packets_of(&pair), Packets::Unguarded);
        assert!(watch.wait_for_interface(Duration::ZERO).unwrap(), "it is there");
        pair.server.run(|| attachment.reattach()).unwrap();
        assert_eq!(packets_of(&pair), Packets::Guarded);
        drop(attachment);
        let expected = if pins.is_some() { Packets::Guarded } else { Packets::Unguarded };
        assert_eq!(packets_of(&pair), expected);
    }
}

#[test]
fn another_program_is_put_into_the_link() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let pair = Pair::new().unwrap();
        let options = match &pins {
            Some(pins) => options(pins.path()),
            None => AttachOptions::new("eth0"),
        };
        let mut chain = Pipeline::new(&[&monitor("a"), &monitor("b")]).unwrap();
        pair.server.run(|| chain.attach(&options)).unwrap();
        let mut watch = chain.watch().unwrap();
        pair.server.exchange_program("eth0", 2).unwrap();
        match watch.wait(PATIENCE).unwrap() {
            Some(Loss::Superseded { what }) => assert_eq!(what, "interface `eth0`"),
            other => panic!("{other:?}"),
        }
        assert!(chain.is_superseded().unwrap() && !chain.is_attached().unwrap() && chain.mode().is_none());
        let superseded = |error: &Error| matches!(error, Error::Superseded { what } if what == "interface `eth0`");
        refused(&mut chain, superseded);
        assert!(superseded(&pair.server.run(|| chain.reattach()).unwrap_err()), "nor is it won back");
        assert!(superseded(&pair.server.run(|| chain.attach(&options)).unwrap_err()));
    }
}

#[test]
fn an_upgrade_takes_the_chain_over() {
    let (pair, pins) = (Pair::new().unwrap(), BpfFs::new().unwrap());
    let old = firewall();
    let attachment = pair.server.run(|| old.attach(&options(pins.path()))).unwrap();
    let mut watch = attachment.watch().unwrap();
    let new = Firewall::adopt(pins.path(), "firewall").unwrap();
    let _new = pair.server.run(|| new.attach(&options(pins.path()))).unwrap();
    assert_eq!(told(watch.wait(PATIENCE).unwrap()), "superseded");
    assert_eq!(packets_of(&pair), Packets::Guarded);
}

#[test]
fn an_upgrade_is_faster_where_the_interface_is_back() {
    let (pair, pins) = (Pair::new().unwrap(), BpfFs::new().unwrap());
    let old = firewall();
    let mut attachment = pair.server.run(|| old.attach(&options(pins.path()))).unwrap();
    pair.server.delete_link("eth0").unwrap();
    make_again(&pair);
    let new = Firewall::adopt(pins.path(), "firewall").unwrap();
    let taken = pair.server.run(|| new.attach(&options(pins.path()))).unwrap();
    let error = pair.server.run(|| attachment.reattach()).unwrap_err();
    assert!(matches!(error, Error::Superseded { .. }), "{error}");
    assert!(taken.is_attached().unwrap());
    assert_eq!(packets_of(&pair), Packets::Guarded);
}

#[test]
fn another_program_is_faster_where_the_interface_is_back() {
    for pins in [None, Some(BpfFs::new().unwrap())] {
        let pair = Pair::new().unwrap();
        let firewall = firewall();
        let options = match &pins {
            Some(pins) => options(pins.path()),
            None => AttachOptions::new("eth0"),
        };
        let mut attachment = pair.server.run(|| firewall.attach(&options)).unwrap();
        pair.server.delete_link("eth0").unwrap();
        make_again(&pair);
        let foreign = pair.server.xdp_pass("eth0").unwrap();
        for _ in 0..2 {
            let error = pair.server.run(|| attachment.reattach()).unwrap_err();
            assert!(matches!(&error, Error::ForeignProgram { .. }), "{error}");
            assert_eq!(told(attachment.loss().unwrap()), "detached");
        }
        drop(foreign);
        pair.server.run(|| attachment.reattach()).unwrap();
        assert_eq!(packets_of(&pair), Packets::Guarded);
        attachment.detach().unwrap();
    }
}

#[test]
fn the_pins_are_removed() {
    let (pair, pins) = (Pair::new().unwrap(), BpfFs::new().unwrap());
    let (guard, monitor) = (firewall(), monitor("monitor"));
    let mut chain = Pipeline::new(&[&guard]).unwrap();
    pair.server.run(|| chain.attach(&options(pins.path()))).unwrap();
    let mut watch = chain.watch().unwrap();
    remove_pins(pins.path()).unwrap();
    match watch.wait(PATIENCE).unwrap() {
        Some(Loss::Unpinned { path, .. }) => assert!(path.starts_with(pins.path()), "{}", path.display()),
        other => panic!("{other:?}"),
    }
    assert!(chain.is_attached().unwrap(), "it goes on");
    assert_eq!(packets_of(&pair), Packets::Guarded);
    chain.insert(Position::First, &monitor).unwrap();
    chain.remove("monitor").unwrap();
    assert_eq!(packets_of(&pair), Packets::Guarded);
    chain.reattach().unwrap();
    assert_eq!(told(watch.wait(Duration::ZERO).unwrap()), "nothing");
    let index = pair.server.ifindex("eth0").unwrap();
    assert_eq!(pinned(pins.path()).unwrap().interfaces, [(index, vec!["firewall".to_owned()])]);
    drop((chain, guard));
    assert_eq!(packets_of(&pair), Packets::Guarded, "it lives on without the process");
    let adopted = Firewall::adopt(pins.path(), "firewall").unwrap();
    let attachment = pair.server.run(|| adopted.attach(&options(pins.path()))).unwrap();
    assert!(attachment.adopted() && adopted.len().unwrap() == 2);
    attachment.detach().unwrap();
}

#[test]
fn another_program_wants_the_interface() {
    let pair = Pair::new().unwrap();
    let firewall = firewall();
    for mode in [XdpMode::Native, XdpMode::Generic] {
        let attachment = pair.server.run(|| firewall.attach(&AttachOptions::new("eth0").mode(mode))).unwrap();
        assert!(pair.server.xdp_pass("eth0").is_err(), "the kernel refuses it");
        for other in [XdpMode::Native, XdpMode::Generic] {
            let second = monitor("second");
            let refused = pair.server.run(|| second.attach(&AttachOptions::new("eth0").mode(other))).unwrap_err();
            assert!(matches!(refused, Error::ForeignProgram { .. }), "{mode}, then {other}: {refused}");
        }
        assert_eq!((attachment.mode(), told(attachment.loss().unwrap())), (Some(mode), "nothing"));
        assert_eq!(packets_of(&pair), Packets::Guarded);
    }
}
