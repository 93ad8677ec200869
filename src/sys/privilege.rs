//! What this thread may do, and what takes it away: capabilities, user namespaces, seccomp, security modules.

use std::{fs, io};

use crate::Error;

/// Capabilities that BPF asks for and this thread lacks, by name (capabilities(7)).
///
/// `CAP_SYS_ADMIN` stands in for `CAP_BPF` and `CAP_PERFMON`.
pub(crate) fn missing_capabilities() -> Vec<&'static str> {
    const NET_ADMIN: u32 = 12;
    const SYS_ADMIN: u32 = 21;
    const PERFMON: u32 = 38;
    const BPF: u32 = 39;
    let bits = status("CapEff").and_then(|hex| u64::from_str_radix(&hex, 16).ok()).unwrap_or(0);
    let has = |bit: u32| bits >> bit & 1 == 1;
    let mut missing = Vec::new();
    for (bit, name) in [(BPF, "CAP_BPF"), (PERFMON, "CAP_PERFMON")] {
        if !has(bit) && !has(SYS_ADMIN) {
            missing.push(name);
        }
    }
    if !has(NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    missing
}

/// What may confine this thread although it has every capability.
fn confinement() -> Vec<&'static str> {
    let mut found = Vec::new();
    if in_user_namespace() {
        found.push(USER_NAMESPACE);
    }
    if status("Seccomp").is_some_and(|mode| mode != "0") {
        found.push(SECCOMP);
    }
    found
}

/// What certainly keeps this thread from BPF although it has every capability.
pub(crate) fn forbidden() -> Vec<&'static str> {
    let mut found = confinement();
    found.retain(|by| *by != SECCOMP || bpf_is_denied());
    found
}

const USER_NAMESPACE: &str = "this process is in a user namespace, where capabilities do not count for BPF: run it in the \
                              host's (without `unshare --user`, rootless containers or user remapping)";
const SECCOMP: &str = "a seccomp filter is in force (/proc/self/status), as container runtimes and systemd's \
                       `SystemCallFilter=` install it: allow bpf(2) in its profile";

/// Whether bpf(2) is refused before the kernel looks at what is asked: this command there is not, and it would say so.
fn bpf_is_denied() -> bool {
    // SAFETY: the kernel is told that there are no attributes, so it follows no pointer.
    let answer = unsafe { libc::syscall(libc::SYS_bpf, -1, std::ptr::null::<u8>(), 0) };
    answer < 0 && matches!(io::Error::last_os_error().raw_os_error(), Some(libc::EPERM | libc::EACCES | libc::ENOSYS))
}

/// What a refusal means that comes from missing rights; `None` for others.
///
/// Most are EPERM; EACCES is the verifier's, mostly, when `CAP_PERFMON` is missing; seccomp may answer ENOSYS.
pub(crate) fn refusal(operation: impl Into<String>, cause: &io::Error) -> Option<Error> {
    let errno = cause.raw_os_error()?;
    let operation = operation.into();
    let confined = confinement();
    match errno {
        libc::EPERM | libc::EACCES => {}
        libc::ENOSYS if !confined.is_empty() => {}
        _ => return None,
    }
    let missing = missing_capabilities();
    // In a user namespace no capability helps; a filter may stand beside a capability that is missing.
    if !missing.is_empty() && !in_user_namespace() {
        return Some(Error::MissingCapability { operation, capability: missing.join(", ") });
    }
    if errno == libc::EACCES {
        return None;
    }
    let by = if confined.is_empty() { unknown_confinement() } else { confined.join("; ") };
    Some(Error::Forbidden { operation, by, cause: io::Error::from_raw_os_error(errno) })
}

fn unknown_confinement() -> String {
    let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    let active = lockdown.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map(|(mode, _)| mode);
    match active {
        Some(mode) if mode != "none" => format!("the kernel is locked down (`{mode}`)"),
        _ => "it has the capabilities, no seccomp filter and no user namespace of its own: look for a security module \
              (SELinux, AppArmor) in the kernel's log"
            .to_owned(),
    }
}

/// Whether user ids are mapped, as they are everywhere but in the first user namespace.
fn in_user_namespace() -> bool {
    let map = fs::read_to_string("/proc/thread-self/uid_map").unwrap_or_default();
    let numbers: Vec<&str> = map.split_whitespace().collect();
    // A kernel without user namespaces has no such file; before a namespace is given its map, it is empty.
    fs::exists("/proc/thread-self/uid_map").unwrap_or(false) && numbers != ["0", "0", "4294967295"]
}

/// A line of this thread's status in /proc.
fn status(key: &str) -> Option<String> {
    let status = fs::read_to_string("/proc/thread-self/status").ok()?;
    let value = status.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    Some(value.trim().to_owned())
}

/// The user that files are opened and made as.
pub(crate) fn user() -> u32 {
    // SAFETY: no pointers are involved, and it cannot fail.
    unsafe { libc::geteuid() }
}
