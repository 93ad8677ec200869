//! What the stack merged, in generic mode: frame by frame, and with real sockets.

#[path = "../common/mod.rs"]
mod common;
mod frames;
mod traffic;
