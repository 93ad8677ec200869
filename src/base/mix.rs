//! The hash function that tables and programs share: `mix64` of `bpf/layout/service_hashes.h`.

/// The finaliser of MurmurHash3: every bit of the input moves every bit of the result.
pub(crate) fn mix64(mut x: u64) -> u64 {
    x ^= x >> 33;
    x = x.wrapping_mul(0xff51_afd7_ed55_8ccd);
    x ^= x >> 33;
    x = x.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ x >> 33
}
