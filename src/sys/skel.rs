//! The skeletons that libbpf-cargo made of `bpf/*.bpf.c`.

/// `bpf/dsr_balancer.bpf.c`
pub(crate) mod dsr_balancer {
    include!(concat!(env!("OUT_DIR"), "/dsr_balancer.skel.rs"));
}

/// `bpf/firewall.bpf.c`
pub(crate) mod firewall {
    include!(concat!(env!("OUT_DIR"), "/firewall.skel.rs"));
}

/// `bpf/monitor.bpf.c`
pub(crate) mod monitor {
    include!(concat!(env!("OUT_DIR"), "/monitor.skel.rs"));
}

/// `bpf/nat_balancer.bpf.c`
pub(crate) mod nat_balancer {
    include!(concat!(env!("OUT_DIR"), "/nat_balancer.skel.rs"));
}

/// `bpf/rate_limiter.bpf.c`
pub(crate) mod rate_limiter {
    include!(concat!(env!("OUT_DIR"), "/rate_limiter.skel.rs"));
}

/// `bpf/redirects.bpf.c`
pub(crate) mod redirects {
    include!(concat!(env!("OUT_DIR"), "/redirects.skel.rs"));
}

/// `bpf/tunnel_decap.bpf.c`
pub(crate) mod tunnel_decap {
    include!(concat!(env!("OUT_DIR"), "/tunnel_decap.skel.rs"));
}
