//! The system calls that std has no name for: the only place with `unsafe`.

pub(crate) mod bpf;
pub(crate) mod ethtool;
pub(crate) mod memory;
pub(crate) mod mount;
pub(crate) mod socket;

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Turns the C convention (-1 and errno) into a result.
pub(crate) fn check(ret: libc::c_int) -> io::Result<libc::c_int> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// The same for calls that return a length.
pub(crate) fn check_len(ret: isize) -> io::Result<usize> {
    usize::try_from(ret).map_err(|_| io::Error::last_os_error())
}

/// The same for raw system calls that return a new descriptor.
pub(crate) fn check_fd(ret: libc::c_long) -> io::Result<OwnedFd> {
    if ret < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor, so nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(ret as i32) })
}

/// Puts the calling thread, and only it, into a fresh network namespace.
pub(crate) fn unshare_net() -> io::Result<()> {
    // SAFETY: takes a plain integer; CLONE_NEWNET concerns the calling thread only.
    check(unsafe { libc::unshare(libc::CLONE_NEWNET) }).map(drop)
}

/// Gives the calling thread, and only it, a copy of the process's table of open files.
pub(crate) fn unshare_files() -> io::Result<()> {
    // SAFETY: takes a plain integer; CLONE_FILES concerns the calling thread only. Descriptors that it opens from now on
    // exist in no other thread, which the one caller says in its documentation.
    check(unsafe { libc::unshare(libc::CLONE_FILES) }).map(drop)
}

/// Puts the calling thread, and only it, into the namespace behind `ns`.
pub(crate) fn setns_net(ns: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: `ns` is open for the duration of the call.
    check(unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

/// Lets the child of `command` start inside the namespace behind `ns`, which it keeps open.
pub(crate) fn setns_before_exec(command: &mut Command, ns: impl AsRawFd + Send + Sync + 'static) {
    let enter = move || {
        // SAFETY: the closure owns `ns`, so the descriptor is open.
        check(unsafe { libc::setns(ns.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; setns is a bare
    // system call and reading errno does not allocate.
    unsafe { command.pre_exec(enter) };
}

/// A set of CPUs, by number; those that the type has no room for are left out.
pub(crate) fn cpu_set(cpus: &[usize]) -> libc::cpu_set_t {
    // SAFETY: cpu_set_t is plain data, for which zeroes are valid.
    let mut set: libc::cpu_set_t = unsafe { mem::zeroed() };
    for cpu in cpus.iter().filter(|cpu| **cpu < libc::CPU_SETSIZE as usize) {
        // SAFETY: the set has room for this CPU.
        unsafe { libc::CPU_SET(*cpu, &mut set) };
    }
    set
}

/// Lets a thread run on these CPUs only; 0: the calling one.
pub(crate) fn set_affinity(thread: u32, cpus: &libc::cpu_set_t) -> io::Result<()> {
    let thread = i32::try_from(thread).map_err(io::Error::other)?;
    // SAFETY: the set outlives the call, and its size is stated.
    check(unsafe { libc::sched_setaffinity(thread, size_of_val(cpus), cpus) }).map(drop)
}

/// Lets the child of `command` run on these CPUs only, and die with the thread that starts it.
pub(crate) fn tie_before_exec(command: &mut Command, cpus: libc::cpu_set_t) {
    let tie = move || {
        // SAFETY: takes plain integers.
        check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
        set_affinity(0, &cpus)
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed; both are bare system calls, and
    // the set was made before.
    unsafe { command.pre_exec(tie) };
}

/// Whether a process of that id exists (a zombie still does).
pub(crate) fn process_exists(pid: i32) -> bool {
    // SAFETY: signal 0 delivers nothing; it only asks.
    unsafe { libc::kill(pid, 0) == 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EPERM) }
}

/// Leaves the calling thread, and only it, with these capabilities.
pub(crate) fn keep_capabilities(kept: &[u32]) -> io::Result<()> {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let bits = kept.iter().fold(0_u64, |bits, capability| bits | 1 << capability);
    let (low, high) = (bits as u32, (bits >> 32) as u32);
    // Effective, permitted and inheritable, the lower 32 of each and then the upper ones.
    let sets = [low, low, 0, high, high, 0];
    // SAFETY: both arrays are laid out as capset(2) wants them in this version, and live through the call.
    check(unsafe { libc::syscall(libc::SYS_capset, header.as_ptr(), sets.as_ptr()) } as libc::c_int).map(drop)
}

pub(crate) const BPF_CALL: libc::c_long = libc::SYS_bpf;
pub(crate) const REBOOT_CALL: libc::c_long = libc::SYS_reboot;

/// Lets a system call fail with EPERM in the calling thread, and only it.
pub(crate) fn deny(number: libc::c_long) -> io::Result<()> {
    let statement = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut filter = [
        // The number of the system call is the first word of what a filter sees.
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        libc::sock_filter { jf: 1, ..statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, number as u32) },
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        statement(libc::BPF_RET | libc::BPF_K, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: takes plain integers.
    check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })?;
    // SAFETY: the program and its instructions live through the call.
    check(unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) }).map(drop)
}
