//! Generated packets through the balancer and through a model of it in plain Rust: same verdict, backend and bytes, while
//! the lists of backends change.

pub(crate) mod bytes;
pub(crate) mod frames;
pub(crate) mod model;
pub(crate) mod world;

use self::{frames::generate, world::World};
use crate::common::{dsr::Host, times};
use fastrand::Rng;

#[test]
fn generated_packets_get_what_the_model_says() {
    let seed = 2024;
    let mut random = Rng::with_seed(seed);
    let host = Host::new();
    let mut world = World::new(&host);
    let count = times(30_000, 1_000_000, 1_000);
    let batch = 500;
    for round in 0..count / batch {
        for _ in 0..if round == 0 { 40 } else { random.usize(..3) } {
            world.change(&mut random);
        }
        let generated: Vec<_> = (0..batch).map(|_| generate(&mut random, &host, (round / 50) as u32)).collect();
        world.compare(&generated, &format!("seed {seed}, round {round}"));
    }
    let reasons = world.compare_counters(&format!("seed {seed}"));
    assert!(reasons.len() >= 14, "all of them occur: {reasons:?}");
    assert!(world.b.balancer.recorded_flows() > 10 || crate::common::is_emulated());
}
