//! Programs of others, run inside namespaces: they stay on their CPUs and end with us.

use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::cpu;
use crate::error::{Context, Result};
use crate::namespace::Namespace;
use crate::sys;

/// A running program. Dropping it kills it; so does the end of the thread that started it, `kill -9` included.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    output: File,
    errors: File,
}

impl Process {
    /// Starts a program inside a namespace, on these CPUs only.
    pub fn start(ns: &Namespace, cpus: &[usize], program: &str, arguments: &[&str]) -> Result<Self> {
        let start = || {
            let (output, errors) = (unnamed_file()?, unnamed_file()?);
            let mut command: Command = ns.command(program);
            command.args(arguments).stdin(Stdio::null()).stdout(output.try_clone()?).stderr(errors.try_clone()?);
            sys::tie_before_exec(&mut command, sys::cpu_set(cpus));
            Ok(Self { name: program.into(), child: command.spawn()?, output, errors })
        };
        start().context(|| format!("start {program} {}", arguments.join(" ")))
    }

    /// CPU time until now.
    pub fn run_time(&self) -> Result<Duration> {
        cpu::run_time(self.child.id())
    }

    /// Waits until it listens on a TCP port of its namespace.
    ///
    /// # Errors
    /// When it ends instead, with what it said, or when it takes longer than 10 s.
    pub fn wait_for_port(&mut self, ns: &Namespace, port: u16) -> Result<()> {
        let end = Instant::now() + Duration::from_secs(10);
        let about = format!("wait for {} to listen on port {port}", self.name);
        loop {
            let mut wait = || -> io::Result<bool> {
                if self.child.try_wait()?.is_some() {
                    return Err(io::Error::other(self.told()?));
                }
                if Instant::now() > end {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                listens(ns, port)
            };
            if wait().context(|| about.clone())? {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for its end and answers what it wrote to its standard output.
    ///
    /// # Errors
    /// When it fails, with what it said; when it takes longer than this; when `stop` is set meanwhile.
    pub fn finish(mut self, within: Duration, stop: &AtomicBool) -> Result<String> {
        let end = Instant::now() + within;
        let mut wait = || -> io::Result<String> {
            loop {
                if stop.load(Ordering::Relaxed) {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                match self.child.try_wait()? {
                    Some(status) if status.success() => return contents(&mut self.output),
                    Some(status) => return Err(io::Error::other(format!("{status}: {}", self.told()?))),
                    None if Instant::now() > end => return Err(io::ErrorKind::TimedOut.into()),
                    None => thread::sleep(Duration::from_millis(5)),
                }
            }
        };
        let answer = wait();
        answer.context(|| format!("run {}", self.name))
    }

    /// Its last words.
    fn told(&mut self) -> io::Result<String> {
        let text = contents(&mut self.errors)? + &contents(&mut self.output)?;
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        Ok(lines[lines.len().saturating_sub(5)..].join("; "))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file that nobody else can open and that nobody has to remove.
fn unnamed_file() -> io::Result<File> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = std::env::temp_dir().join(format!("xdpkit-lab-output-{}-{number}", std::process::id()));
    let file = File::options().read(true).append(true).create_new(true).open(&path)?;
    fs::remove_file(path)?;
    Ok(file)
}

fn contents(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn listens(ns: &Namespace, port: u16) -> io::Result<bool> {
    let sockets = ns.run(|| {
        let read = |table| fs::read_to_string(format!("/proc/thread-self/net/{table}"));
        // Without IPv6 there is no second table.
        read("tcp").map(|text| text + &read("tcp6").unwrap_or_default())
    })?;
    let listening = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        fields.len() > 3 && fields[3] == "0A" && fields[1].ends_with(&format!(":{port:04X}"))
    };
    Ok(sockets.lines().any(listening))
}

#[cfg(test)]
mod tests {
    use super::*;

    static NEVER: AtomicBool = AtomicBool::new(false);
    const PATIENCE: Duration = Duration::from_secs(10);

    #[test]
    fn output_and_failures_are_told() {
        let ns = Namespace::new("tools").unwrap();
        let run = |script: &str, within, stop: &AtomicBool| {
            Process::start(&ns, &[0], "sh", &["-c", script]).unwrap().finish(within, stop)
        };
        assert_eq!(run("echo hello", PATIENCE, &NEVER).unwrap(), "hello\n");
        let told = run("echo wrong flag >&2; exit 3", PATIENCE, &NEVER).unwrap_err().to_string();
        assert!(told.contains("sh") && told.contains("3") && told.contains("wrong flag"), "{told}");
        let told = run("sleep 60", Duration::from_millis(20), &NEVER).unwrap_err().to_string();
        assert!(told.contains("timed out"), "{told}");
        let told = run("sleep 60", PATIENCE, &AtomicBool::new(true)).unwrap_err().to_string();
        assert!(told.contains("interrupted"), "{told}");
        let missing = Process::start(&ns, &[0], "no-such-program", &[]).unwrap_err().to_string();
        assert!(missing.contains("no-such-program"), "{missing}");
    }

    #[test]
    fn a_dropped_process_is_gone_and_it_ran_where_it_should() {
        let ns = Namespace::new("tools").unwrap();
        let process = Process::start(&ns, &[0], "sleep", &["60"]).unwrap();
        let id = process.child.id();
        let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
        assert!(status.contains("Cpus_allowed_list:\t0\n"), "{status}");
        assert!(process.run_time().unwrap() < Duration::from_secs(1));
        drop(process);
        assert!(!sys::process_exists(id as i32));
    }

    #[test]
    fn a_process_ends_with_the_thread_that_started_it() {
        let ns = Namespace::new("tools").unwrap();
        let starter = thread::spawn(move || {
            let process = Process::start(&ns, &[0], "sleep", &["60"]).unwrap();
            let id = process.child.id();
            std::mem::forget(process);
            id
        });
        let id = starter.join().unwrap();
        let end = Instant::now() + PATIENCE;
        // Nobody waits for it, so its remains stay, as a zombie.
        let state = || fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
        while !state().contains("State:\tZ") {
            assert!(Instant::now() < end, "it lives on: {}", state());
            thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn listening_is_noticed_and_so_is_an_early_end() {
        let ns = Namespace::new("tools").unwrap();
        assert!(!listens(&ns, 8080).unwrap());
        let listener = ns.run(|| std::net::TcpListener::bind("127.0.0.1:8080").unwrap());
        assert!(listens(&ns, 8080).unwrap());
        drop(listener);
        let mut process = Process::start(&ns, &[0], "sh", &["-c", "echo cannot bind >&2; exit 1"]).unwrap();
        let told = process.wait_for_port(&ns, 8080).unwrap_err().to_string();
        assert!(told.contains("cannot bind") && told.contains("8080"), "{told}");
    }
}
