//! What this process takes of memory, itself and in the kernel's BPF maps.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;

use crate::error::{Context, Result};

/// Bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Memory {
    /// The most that was resident in memory until now.
    pub peak: u64,
    /// All BPF maps that this process holds a descriptor of.
    pub maps: u64,
}

impl Memory {
    /// Asks the kernel.
    pub fn now() -> Result<Self> {
        let status = fs::read_to_string("/proc/self/status").context(|| "read /proc/self/status".into())?;
        let peak = value(&status, "VmHWM:").unwrap_or(0) << 10;
        let mut maps = BTreeMap::new();
        let directory = fs::read_dir("/proc/self/fdinfo").context(|| "read /proc/self/fdinfo".into())?;
        for entry in directory.flatten() {
            // A descriptor may be closed by another thread meanwhile.
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            if let (Some(id), Some(bytes)) = (value(&text, "map_id:"), value(&text, "memlock:")) {
                maps.insert(id, bytes);
            }
        }
        Ok(Self { peak, maps: maps.into_values().sum() })
    }
}

impl fmt::Display for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: u64| bytes as f64 / 1e6;
        write!(f, "{:.0} MB in maps, {:.0} MB peak of the process", megabytes(self.maps), megabytes(self.peak))
    }
}

fn value(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_tells() {
        assert!(Memory::now().unwrap().peak > 1 << 20);
        assert_eq!(value("a:\t1\nmemlock:\t4096\n", "memlock:"), Some(4096));
    }
}
