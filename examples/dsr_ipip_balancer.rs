//! The IP-in-IP DSR tutorial: clients' packets go to a backend anywhere inside an outer IP header. The backend takes it
//! off, holds the virtual address, and answers the client itself.
//!
//! ```text
//!   client ──► gateway ──► balancer
//!     ▲        ▲  │  ▲        │ outer header: to the backend
//!     └────────┘  ▼  └────────┘
//!               backend: ipip device or TunnelDecap, VIP on lo
//! ```
//!
//! ```sh
//! cargo run --example dsr_ipip_balancer -- --lab
//! cargo run --example dsr_ipip_balancer -- --interface eth0 --service tcp/192.168.178.100:80=172.16.0.11,172.16.0.12@3
//! ```

mod common;

use std::process::ExitCode;

use common::dsr;
use xdpkit::Forwarding;

const ABOUT: &str = "Spreads packets for virtual addresses over hosts anywhere, which answer the clients themselves.";
const OWN_FLAGS: &str =
    "  --service SERVICE      tcp/VIP:PORT=BACKEND[@WEIGHT],... or udp/...; `*` for any port; may be repeated\n";

fn main() -> ExitCode {
    common::exit(dsr::run(ABOUT, OWN_FLAGS, Forwarding::IpIp))
}
