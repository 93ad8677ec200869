//! Parts of error messages: what depends on the case, and what to do.

use std::{io, path::Path};

pub(super) fn above(member: &Option<String>) -> String {
    member.as_ref().map_or(String::new(), |member| format!(", which `{member}` belongs to,"))
}

pub(super) fn named(program: &str) -> String {
    if program.is_empty() { String::new() } else { format!(" (`{program}`)") }
}

/// What libxdp attaches for others.
const DISPATCHER: &str = "xdp_dispatcher";

pub(super) fn of_libxdp(program: &str) -> &'static str {
    match program {
        DISPATCHER => {
            ": it is libxdp's dispatcher, which we do not join; `xdp-loader unload` takes its programs off, and one of \
             section `xdp.frags` can stand at the end of our chain"
        }
        _ => "",
    }
}

pub(super) fn bytes_text(bytes: u64) -> String {
    match bytes {
        0..0x10_0000 => format!("{bytes} bytes"),
        0x10_0000..0x4000_0000 => format!("{} MiB", bytes >> 20),
        _ => format!("{}.{} GiB", bytes >> 30, ((bytes >> 20 & 0x3ff) * 10) >> 10),
    }
}

pub(super) fn of_setting(setting: &str) -> String {
    if setting.is_empty() { String::new() } else { format!(" (the configuration's `{setting}` sizes it)") }
}

pub(super) fn in_cgroup(limit: &Option<(String, u64)>) -> String {
    match limit {
        Some((group, bytes)) => format!(", or raise the memory limit of control group {group}, {}", bytes_text(*bytes)),
        None => String::new(),
    }
}

pub(super) fn lines(log: &str) -> String {
    if log.is_empty() { String::new() } else { format!("\n{log}") }
}

const IP_NETNS_EXEC: &str = "`ip netns exec` hides the one that is mounted on /sys/fs/bpf: use \
                             `nsenter --net=/run/netns/NAME` in its place";

pub(super) fn pin_advice(path: &Path, cause: &io::Error) -> String {
    let dots = path.file_name().is_some_and(|name| name.as_encoded_bytes().contains(&b'.'));
    match cause.raw_os_error() {
        Some(libc::EPERM) if dots => " (names in a BPF file system take no dots)".into(),
        Some(libc::EPERM) => " (without CAP_BPF, or outside of a BPF file system)".into(),
        Some(libc::EACCES) => " (pins belong to the user who made them: run as that user)".into(),
        Some(libc::ENOENT) => format!(" (a directory is missing: create it in a BPF file system; {IP_NETNS_EXEC})"),
        Some(libc::EROFS) => " (mounted read-only, as systemd's `ProtectKernelTunables=` and containers do)".into(),
        _ => String::new(),
    }
}

pub(super) fn hidden_bpffs(path: &Path) -> String {
    if path.starts_with("/sys") { format!("; {IP_NETNS_EXEC}") } else { String::new() }
}

pub(super) fn exposed(owner: u32, mode: u32, user: u32) -> String {
    if owner == user || owner == 0 {
        format!("may be written by others (mode {:04o})", mode & 0o7777)
    } else {
        format!("belongs to user {owner}")
    }
}

pub(super) fn place(line: usize, text: &str) -> String {
    if line == 0 { String::new() } else { format!("line {line}: `{text}`: ") }
}

pub(super) fn holder_of(holder: Option<u32>) -> String {
    holder.map_or_else(|| "a process that cannot be seen from here".into(), |pid| format!("process {pid}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_told_in_units_that_a_reader_compares_with_a_limit() {
        for (bytes, text) in [(4096, "4096 bytes"), (5 << 20, "5 MiB"), (1 << 30, "1.0 GiB"), (3 << 29, "1.5 GiB")] {
            assert_eq!(bytes_text(bytes), text);
        }
    }

    #[test]
    fn errors_about_pins_say_what_to_do() {
        let advice = |path: &str, errno| pin_advice(Path::new(path), &io::Error::from_raw_os_error(errno));
        assert!(advice("/sys/fs/bpf/a.b", libc::EPERM).contains("take no dots"));
        assert!(advice("/sys/fs/bpf/ab", libc::EPERM).contains("CAP_BPF"));
        assert!(advice("/sys/fs/bpf/ab", libc::EACCES).contains("run as that user"));
        assert!(advice("/sys/fs/bpf/ab", libc::EROFS).contains("ProtectKernelTunables"));
        let missing = advice("/sys/fs/bpf/ab", libc::ENOENT);
        assert!(missing.contains("a directory is missing") && missing.contains("nsenter --net="), "{missing}");
        assert_eq!(advice("/sys/fs/bpf/ab", libc::EIO), "");
    }
}
