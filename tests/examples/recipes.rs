//! What docs/recipes.md shows, with traffic.

use std::time::Duration;

use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Builder,
    time::timeout,
};
use xdpkit::{AttachOptions, Firewall, FirewallConfig, Loss, Rule, Stage as _};
use xdpkit_lab::{topology::Pair, traffic::ping};

#[test]
fn an_async_runtime_waits_for_events() {
    let lab = Pair::new().unwrap();
    let firewall = Firewall::load(&FirewallConfig::default().sample(1)).unwrap();
    firewall.insert("10.0.0.2".parse().unwrap(), Rule::deny()).unwrap();
    let _attachment = lab.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let seen = runtime.block_on(async {
        let events = firewall.events().unwrap();
        // SAFETY: the descriptor is the reader's own and stays open as long as the reader, which moves in.
        let mut events = unsafe { AsyncFd::register_with_interest(events, Interest::READABLE) }.unwrap();
        let nothing = timeout(Duration::from_millis(50), events.readable_mut()).await.is_err();
        assert!(nothing, "it waits while there is none");
        let mut seen = 0;
        for round in 1..=3 {
            ping(&lab.client, lab.server_addr.v4.into(), 2, Duration::ZERO, Duration::from_millis(100)).unwrap();
            while seen < 2 * round {
                let mut ready = timeout(Duration::from_secs(10), events.readable_mut()).await.expect("events").unwrap();
                while let Some(event) = ready.get_inner_mut().try_next() {
                    assert_eq!(event.rule, Some("10.0.0.2".parse().unwrap()));
                    seen += 1;
                }
                ready.clear_ready();
            }
        }
        seen
    });
    assert_eq!(seen, 6);
}

#[test]
fn an_async_runtime_waits_for_a_loss() {
    let lab = Pair::new().unwrap();
    let firewall = Firewall::load(&FirewallConfig::default()).unwrap();
    let attachment = lab.server.run(|| firewall.attach(&AttachOptions::new("eth0"))).unwrap();
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let loss = runtime.block_on(async {
        let watch = attachment.watch().unwrap();
        // SAFETY: the descriptor is the watch's own and stays open as long as the watch, which moves in.
        let mut watch = unsafe { AsyncFd::register_with_interest(watch, Interest::READABLE) }.unwrap();
        let mut looks = 0;
        loop {
            let mut ready = timeout(Duration::from_secs(60), watch.readable_mut()).await.expect("it looks").unwrap();
            if let Some(loss) = ready.get_inner_mut().wait(Duration::ZERO).unwrap() {
                break loss;
            }
            ready.clear_ready();
            looks += 1;
            if looks == 3 {
                lab.server.delete_link("eth0").unwrap();
            }
        }
    });
    assert!(matches!(&loss, Loss::Detached { interface } if interface == "eth0"), "{loss:?}");
}
