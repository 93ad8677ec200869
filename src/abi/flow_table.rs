//! Mirror of `bpf/abi/flow_table.h`: the sizes that `src/flow_table/` counts on.

use crate::flow_table::{HEADER_WORDS, LINE_WORDS};

#[cfg(not(xdpkit_docs))]
const _: () = {
    use crate::sys::skel::rate_limiter::types::{flow_line, flow_table};
    use std::mem::offset_of;

    assert!(size_of::<flow_line>() == LINE_WORDS * 8 && offset_of!(flow_line, state) == LINE_WORDS * 4);
    assert!(size_of::<flow_table>() == HEADER_WORDS * 8 && offset_of!(flow_table, secret) == 16);
    assert!(offset_of!(flow_table, stash) == 4 && offset_of!(flow_table, stashed) == 8);
};
const _: () = assert!(LINE_WORDS == 8 && HEADER_WORDS == 26);
