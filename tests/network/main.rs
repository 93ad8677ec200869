//! The balancers on hosts as people run them: bridges, VLANs, bonds and VRFs, next hops that change, all compared with the
//! kernel's own forwarding in the same laboratory.

mod balancers;
mod bench;
#[path = "../common/mod.rs"]
mod common;
mod killed;
mod lab;
mod life;
mod live;
mod lost;
mod matrix;
mod mtu;
mod multipath;
mod stream;
