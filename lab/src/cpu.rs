//! CPUs: who runs where, and for how long it has.

use std::fs;
use std::io;
use std::time::Duration;

use crate::error::{Context, Result};
use crate::sys;

/// One CPU for what is measured, the last one that this process may use, and all others for the rest.
///
/// # Errors
/// When there is only one.
pub fn divide() -> Result<(usize, Vec<usize>)> {
    let status = fs::read_to_string("/proc/self/status").context(|| "read /proc/self/status".into())?;
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
    let mut cpus = parse_list(list.trim());
    match cpus.pop() {
        Some(measured) if !cpus.is_empty() => Ok((measured, cpus)),
        _ => {
            let found = format!("this process may use CPUs {:?}; two are needed", list.trim());
            Err(io::Error::other(found)).context(|| "keep a CPU apart".into())
        }
    }
}

/// Lets a thread, of the kernel's too, run on these CPUs only; 0: the calling one, and what it starts from now on.
pub fn pin(thread: u32, cpus: &[usize]) -> Result<()> {
    sys::set_affinity(thread, &sys::cpu_set(cpus)).context(|| format!("keep thread {thread} on CPUs {cpus:?}"))
}

/// CPU time that all threads of a process have had. A kernel thread is a process of one.
pub fn run_time(process: u32) -> Result<Duration> {
    let about = || format!("read the CPU time of process {process}");
    let threads = fs::read_dir(format!("/proc/{process}/task")).context(about)?;
    let mut time = Duration::ZERO;
    for thread in threads {
        let path = thread.context(about)?.path().join("schedstat");
        let text = fs::read_to_string(path).context(about)?;
        let ran = text.split(' ').next().and_then(|first| first.parse().ok());
        time += Duration::from_nanos(ran.ok_or_else(|| io::Error::other(text)).context(about)?);
    }
    Ok(time)
}

/// The kernel's threads whose name begins like this.
pub fn kernel_threads(prefix: &str) -> Result<Vec<u32>> {
    let processes = fs::read_dir("/proc").context(|| "read /proc".into())?;
    let number = |entry: fs::DirEntry| entry.file_name().to_str()?.parse().ok();
    // A process may end meanwhile; a kernel thread has no command line, however a process may call itself.
    let matches = |process: &u32| {
        let read = |file| fs::read_to_string(format!("/proc/{process}/{file}"));
        read("comm").is_ok_and(|name| name.starts_with(prefix)) && read("cmdline").is_ok_and(|line| line.is_empty())
    };
    Ok(processes.flatten().filter_map(number).filter(matches).collect())
}

/// `0-2,4`
fn parse_list(list: &str) -> Vec<usize> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse().ok()?..=last.parse().ok()?)
    };
    list.split(',').filter_map(range).flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Namespace, veth};

    #[test]
    fn lists_of_cpus_are_read() {
        assert_eq!(parse_list("0-2,4"), [0, 1, 2, 4]);
        assert_eq!(parse_list("7"), [7]);
        assert_eq!(parse_list(""), Vec::<usize>::new());
    }

    #[test]
    fn an_interface_gets_a_thread_that_can_be_pinned_and_timed() {
        let (a, b) = (Namespace::new("a").unwrap(), Namespace::new("b").unwrap());
        veth((&a, "eth0"), (&b, "eth0")).unwrap();
        let told = a.thread_napi("eth0").unwrap_err().to_string();
        assert!(told.contains("eth0") && told.contains("by threads"), "veth receives without NAPI: {told}");
        a.set_gro("eth0", true).unwrap();
        let threads = a.thread_napi("eth0").unwrap();
        assert_eq!(threads.len(), 1);
        assert!(kernel_threads("napi/eth0-").unwrap().contains(&threads[0]));
        pin(threads[0], &[0]).unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", threads[0])).unwrap();
        assert!(status.contains("Cpus_allowed_list:\t0\n"), "{status}");

        let before = run_time(threads[0]).unwrap();
        a.add_address("eth0", "10.0.0.1/24".parse().unwrap()).unwrap();
        b.add_address("eth0", "10.0.0.2/24".parse().unwrap()).unwrap();
        let second = Duration::from_secs(1);
        crate::traffic::ping(&b, "10.0.0.1".parse().unwrap(), 3, Duration::ZERO, second).unwrap();
        assert!(run_time(threads[0]).unwrap() > before, "it handled the packets");
    }
}
