//! Mirrors of the structs in `bpf/abi/`: plain old data, layouts asserted against the skeletons.

pub(crate) mod dsr_balancer;
pub(crate) mod event;
pub(crate) mod firewall;
pub(crate) mod flow_table;
pub(crate) mod monitor;
pub(crate) mod nat_balancer;
pub(crate) mod next_hop;
pub(crate) mod packet;
pub(crate) mod rate_limiter;
pub(crate) mod reason;
pub(crate) mod service;
pub(crate) mod tunnel_decap;

/// Asserts at compile time that two structs have the same size and alignment, and the fields the same offsets.
#[cfg(not(xdpkit_docs))]
macro_rules! assert_same_layout {
    ($mirror:ty, $original:ty, $($field:ident),+) => {
        const _: () = {
            assert!(size_of::<$mirror>() == size_of::<$original>());
            $(assert!(std::mem::offset_of!($mirror, $field) == std::mem::offset_of!($original, $field));)+
        };
    };
}
#[cfg(xdpkit_docs)]
macro_rules! assert_same_layout {
    ($($anything:tt)*) => {};
}
pub(crate) use assert_same_layout;

/// The number in an environment variable that `build.rs` set.
pub(crate) const fn fingerprint(digits: &str) -> u64 {
    match u64::from_str_radix(digits, 10) {
        Ok(number) => number,
        Err(_) => panic!("build.rs writes a decimal number"),
    }
}
