//! How soon a backend that does not answer is down.

use std::{
    net::SocketAddr,
    sync::mpsc,
    time::{Duration, Instant},
};

use xdpkit::{Health, HealthChange, HealthCheck, HealthChecks};
use xdpkit_lab::{bench::Checks, topology::Pair};

pub(crate) fn check(checks: &mut Checks) {
    checks.group("health/three-timeouts", |checks| {
        let lab = Pair::new().unwrap();
        // Nobody answers for it, so the connection hangs until the time is up.
        let nobody = SocketAddr::from(([10, 0, 0, 99], 80));
        lab.client.add_neighbour("eth0", nobody.ip(), [2, 0, 0, 0, 0, 99]).unwrap();
        let (sender, changes) = mpsc::sync_channel(8);
        let probes = HealthChecks::new(move |change: HealthChange<()>| sender.send(change.health).unwrap_or_default());
        let patience = Duration::from_millis(100);
        let probe = HealthCheck::tcp(nobody).interval(Duration::from_millis(20)).timeout(patience).thresholds(1, 3);
        let start = Instant::now();
        lab.client.run(|| probes.insert((), probe)).unwrap();
        assert_eq!(changes.recv_timeout(Duration::from_secs(60)), Ok(Health::Down));
        checks.at_most("health/three-timeouts", "ms", start.elapsed().as_secs_f64() * 1e3, 3000.0);
    });
}
