//! The skeletons that libbpf-cargo made of `bpf/*.bpf.c`.

/// `bpf/firewall.bpf.c`
pub(crate) mod firewall {
    include!(concat!(env!("OUT_DIR"), "/firewall.skel.rs"));
}

/// `bpf/monitor.bpf.c`
pub(crate) mod monitor {
    include!(concat!(env!("OUT_DIR"), "/monitor.skel.rs"));
}

/// `bpf/rate_limiter.bpf.c`
pub(crate) mod rate_limiter {
    include!(concat!(env!("OUT_DIR"), "/rate_limiter.skel.rs"));
}
