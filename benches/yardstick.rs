//! What the kernel's own tables cost on this machine: limits in nanoseconds are a ratio to that.

use xdpkit_lab::bench::Yardstick;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // As criterion's filter: only what contains it.
    if std::env::args().skip(1).any(|row| !row.starts_with('-') && !"yardstick".contains(&row)) {
        return Ok(());
    }
    for keys in [1 << 10, 1 << 16, 1 << 20] {
        println!("yardstick: {}", Yardstick::measure(keys, 200)?);
    }
    Ok(())
}
