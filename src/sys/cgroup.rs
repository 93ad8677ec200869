//! The memory control group that this process is charged to.

use std::{fs, path::Path};

/// The group that limits the memory of this process most, and its limit in bytes; `None` when there is no limit. Maps are
/// charged to it.
pub(super) fn memory_limit() -> Option<(String, u64)> {
    let groups = fs::read_to_string("/proc/self/cgroup").ok()?;
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    groups.lines().filter_map(|line| limit_of(line, &mounts)).min_by_key(|(_, bytes)| *bytes)
}

/// Of a line of `/proc/self/cgroup`: `NUMBER:CONTROLLERS:PATH`.
fn limit_of(line: &str, mounts: &str) -> Option<(String, u64)> {
    let mut parts = line.splitn(3, ':').skip(1);
    let (controllers, path) = (parts.next()?, parts.next()?);
    let unified = controllers.is_empty();
    if !unified && !controllers.split(',').any(|name| name == "memory") {
        return None;
    }
    let file = if unified { "memory.max" } else { "memory.limit_in_bytes" };
    let root = mounts.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(' ').collect();
        let [_, directory, kind, options, ..] = fields[..] else { return None };
        let fits = if unified { kind == "cgroup2" } else { has_memory(kind, options) };
        fits.then_some(directory)
    })?;
    // A group's ancestors limit it, too.
    let ancestors = Path::new(path).ancestors();
    let limits = ancestors.filter_map(|group| {
        let inside = group.strip_prefix("/").ok()?;
        let text = fs::read_to_string(Path::new(root).join(inside).join(file)).ok()?;
        let bytes: u64 = text.trim().parse().ok()?;
        // The old hierarchy writes "none" as a number that no memory has.
        (bytes < 1 << 62).then(|| (group.display().to_string(), bytes))
    });
    limits.min_by_key(|(_, bytes)| *bytes)
}

fn has_memory(kind: &str, options: &str) -> bool {
    kind == "cgroup" && options.split(',').any(|option| option == "memory")
}
