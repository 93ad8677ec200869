//! How often tests repeat something, by how thorough the run is.

use std::env::var_os;

/// What `./x test --full` repeats, in usual runs, where `--long` has more.
const FULL: usize = 5;

/// How often something is repeated: usually, with `./x test --long`, and in an emulated machine. `./x test --full` comes to
/// an end in half an hour: it repeats at most five times what is usual, but does once what a usual run leaves out, and
/// without an end what has none.
pub fn times(usual: usize, long: usize, emulated: usize) -> usize {
    match (var_os("XDPKIT_EMULATED"), var_os("XDPKIT_LONG"), var_os("XDPKIT_FULL")) {
        (Some(_), ..) => emulated,
        (_, Some(_), _) => long,
        (.., Some(_)) if usual == 0 || long == usize::MAX => long,
        (.., Some(_)) => long.min(FULL * usual),
        _ => usual,
    }
}
