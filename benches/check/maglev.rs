//! How long a table of a hundred backends takes.

use std::time::Instant;

use xdpkit::maglev::{DEFAULT_SIZE, Share, table};
use xdpkit_lab::bench::Checks;

pub(crate) fn check(checks: &mut Checks) {
    checks.group("maglev/100-backends", |checks| {
        let names: Vec<String> = (0..100).map(|number| format!("backend {number}")).collect();
        let shares: Vec<_> = names.iter().map(|name| Share { name: name.as_bytes(), weight: 1 }).collect();
        let took = |_| {
            let start = Instant::now();
            assert_eq!(table(&shares, DEFAULT_SIZE, 0).unwrap().len(), DEFAULT_SIZE as usize);
            start.elapsed()
        };
        let quickest = (0..5).map(took).min().unwrap();
        checks.at_most("maglev/100-backends", "ms", quickest.as_secs_f64() * 1e3, 100.0);
    });
}
