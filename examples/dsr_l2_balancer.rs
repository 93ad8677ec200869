//! The L2 DSR tutorial: clients' packets go to a backend on the same link with its MAC, and nothing else of them changes
//! but the hop limit. The backend holds the virtual address and answers the client itself.
//!
//! ```text
//!   client ──► gateway ──► balancer ─┐ MAC of the backend
//!     ▲           ▲                  ▼
//!     └───────────┴───────────── backend, VIP on lo
//! ```
//!
//! ```sh
//! cargo run --example dsr_l2_balancer -- --lab
//! cargo run --example dsr_l2_balancer -- --interface eth0 --service tcp/192.168.178.100:80=192.168.178.11,192.168.178.12@3
//! ```

mod common;

use std::process::ExitCode;

use common::dsr;
use xdpkit::Forwarding;

const ABOUT: &str = "Spreads packets for virtual addresses over neighbours, which answer the clients themselves.";
const OWN_FLAGS: &str =
    "  --service SERVICE      tcp/VIP:PORT=BACKEND[@WEIGHT],... or udp/...; `*` for any port; may be repeated\n";

fn main() -> ExitCode {
    common::exit(dsr::run(ABOUT, OWN_FLAGS, Forwarding::L2))
}
