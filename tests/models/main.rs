//! Programs against models of them in plain Rust: packet by packet, and over the lives of connections.

#[path = "../common/mod.rs"]
mod common;
mod dsr_model;
mod fuzz;
mod nat_model;
mod parser_oracle;
mod fuzzing {
    pub(crate) mod dsr_balancer;
    pub(crate) mod fragments;
    pub(crate) mod nat_balancer;
    pub(crate) mod rate_limiter;
    pub(crate) mod tally;
    pub(crate) mod tunnel_decap;
}
