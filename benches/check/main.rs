//! What the library promises of time, each promise a row: measured, limit and ratio. `./x bench --check [ROW]`. No test
//! depends on time; what is measured here is looked at by `tests/many_flows.rs` too, but for the time.

mod chain;
mod dsr_balancer;
mod firewall;
mod health;
mod maglev;
#[path = "../common/nat.rs"]
mod nat;
mod nat_balancer;
mod rate_limiter;

use std::{env, process::ExitCode};

use xdpkit_lab::bench::Checks;

fn main() -> ExitCode {
    // Cargo and `./x bench` say --bench to every benchmark.
    let row = env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    let mut checks = Checks::new(&row);
    chain::check(&mut checks);
    firewall::check(&mut checks);
    rate_limiter::check(&mut checks);
    nat_balancer::check(&mut checks);
    dsr_balancer::check(&mut checks);
    maglev::check(&mut checks);
    health::check(&mut checks);
    checks.finish()
}
