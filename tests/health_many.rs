//! Many health checks in one process: few threads, few descriptors; and what this host lacks is no fault of a
//! backend's.
#![cfg(feature = "health")]

mod common;

use std::{
    fs::File,
    net::{Ipv4Addr, SocketAddr},
    process::{Command, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use common::{limit_open_files, raise_open_files, times};
use socket2::{Domain, Socket, Type};
use xdpkit::{Error, Health, HealthChange, HealthCheck, HealthChecks, UnsentReason};
use xdpkit_lab::Namespace;

/// Limits of files are the process's: these tests run one after the other.
fn undisturbed() -> MutexGuard<'static, ()> {
    static ONE: Mutex<()> = Mutex::new(());
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// However slow the machine is.
const PATIENCE: Duration = Duration::from_secs(300);
const PORT: u16 = 8080;

/// Accepts whatever comes to any address of a namespace, in one thread.
struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(ns: &Namespace) -> Self {
        let socket = ns.run(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
            socket.set_reuse_address(true).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, PORT)).into()).unwrap();
            socket.listen(4096).unwrap();
            socket
        });
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let serve = move || {
            while !stopping.load(Ordering::Relaxed) {
                if socket.accept().is_err() {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        };
        Self { stop, thread: Some(thread::spawn(serve)) }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// An address of its own for each number, all of them this host's.
fn target(number: u32) -> SocketAddr {
    (Ipv4Addr::from(0x7f01_0000 + number), PORT).into()
}

fn threads() -> usize {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    text.lines().find_map(|line| line.strip_prefix("Threads:")).unwrap().trim().parse().unwrap()
}

fn wait_until(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn twenty_thousand_checks_take_two_threads_and_few_descriptors() {
    const FILES: usize = 256;
    let _alone = undisturbed();
    let ns = Namespace::new("many").unwrap();
    let server = Server::start(&ns);
    limit_open_files(FILES);
    let many = times(20_000, 20_000, 2_000) as u32;
    let threads_before = threads();
    let (told, most_threads, most_in_flight) = (Arc::new(AtomicUsize::new(0)), &mut 0, &mut 0);
    let telling = Arc::clone(&told);
    let checks = HealthChecks::new(move |_: HealthChange<u32>| {
        telling.fetch_add(1, Ordering::Relaxed);
    });
    ns.run(|| {
        for number in 0..many {
            let check = HealthCheck::tcp(target(number)).thresholds(1, 2);
            // Nothing is late that only waits for this machine.
            let check = check.interval(Duration::from_secs(1)).timeout(Duration::from_secs(60));
            assert_eq!(checks.insert(number, check).unwrap(), None);
        }
    });
    let mut all_are = |wanted: Health| {
        wait_until(&format!("all are {wanted}: {:?}", checks.stats()), || {
            *most_threads = (*most_threads).max(threads());
            *most_in_flight = (*most_in_flight).max(checks.stats().in_flight);
            checks.iter().all(|(_, _, health)| health == wanted)
        });
    };
    all_are(Health::Up);
    drop(server);
    all_are(Health::Down);
    let server = Server::start(&ns);
    all_are(Health::Up);
    wait_until("each change is told", || told.load(Ordering::Relaxed) == 3 * many as usize);
    drop(server);
    // Two for the checks, one of the server, one in which this test makes a server.
    assert!(*most_threads <= threads_before + 4, "{most_threads} threads after {threads_before}");
    assert!((1..=FILES / 2).contains(most_in_flight), "{most_in_flight} in flight");
    assert_eq!(checks.len(), many as usize);
    drop(checks);
    wait_until("its threads end with it", || threads() < threads_before);
    raise_open_files();
}

#[test]
fn without_descriptors_no_backend_goes_down() {
    let _alone = undisturbed();
    let ns = Namespace::new("files").unwrap();
    let server = Server::start(&ns);
    limit_open_files(200);
    let told = Arc::new(AtomicUsize::new(0));
    let telling = Arc::clone(&told);
    let checks = HealthChecks::new(move |_| {
        telling.fetch_add(1, Ordering::Relaxed);
    });
    for number in 0..50 {
        let check = HealthCheck::tcp(target(number)).interval(Duration::from_millis(10)).thresholds(1, 1);
        ns.run(|| checks.insert(number, check.timeout(Duration::from_secs(60)))).unwrap();
    }
    wait_until("all are up", || checks.iter().all(|(_, _, health)| health == Health::Up));
    let before = checks.stats();
    assert_eq!((before.failed, before.unsent, before.last_unsent), (0, 0, None));

    // Whatever a probe gives back, this takes.
    let mut files = Vec::new();
    wait_until("probes lack descriptors", || {
        while let Ok(file) = File::open("/dev/null") {
            files.push(file);
        }
        checks.stats().unsent >= 20
    });
    let stats = checks.stats();
    let unsent = stats.last_unsent.unwrap();
    assert_eq!(unsent.reason, UnsentReason::Descriptors);
    assert_eq!(
        unsent.to_string(),
        format!(
            "the probe of {} could not be sent: Too many open files (os error 24): raise the process's limit of open files \
             (RLIMIT_NOFILE)",
            unsent.target
        )
    );
    assert_eq!(stats.failed, 0);
    assert!(checks.iter().all(|(_, _, health)| health == Health::Up));
    // The first check of a namespace needs some, too.
    let more = HealthChecks::new(|_: HealthChange<u8>| ());
    let refused = ns.run(|| more.insert(1, HealthCheck::tcp(target(1)))).unwrap_err();
    assert!(matches!(refused, Error::Thread { .. }), "{refused:?}");
    assert_eq!(refused.to_string(), "cannot start threads for health checks: Too many open files (os error 24)");
    assert!(more.is_empty());

    drop(files);
    let sent = stats.succeeded;
    wait_until("probes go on", || checks.stats().succeeded > sent + 200);
    assert_eq!(told.load(Ordering::Relaxed), 50, "up, once each");
    assert_eq!(checks.stats().failed, 0);
    drop(server);
    wait_until("all are down", || checks.iter().all(|(_, _, health)| health == Health::Down));
    raise_open_files();
}

/// Set for a process that may have no second thread.
const LONELY: &str = "XDPKIT_TEST_LONELY";

#[test]
fn a_thread_that_cannot_be_made_is_an_error() {
    if std::env::var_os(LONELY).is_some() {
        let checks = HealthChecks::new(|_: HealthChange<u8>| ());
        let refused = checks.insert(1, HealthCheck::tcp(target(1))).unwrap_err();
        assert!(matches!(refused, Error::Thread { .. }), "{refused:?}");
        assert!(refused.to_string().starts_with("cannot start threads for health checks: Resource temporarily"));
        assert!(checks.is_empty() && checks.get(&1).is_none());
        println!("refused, and alive");
        return;
    }
    let _alone = undisturbed();
    // The limit binds nobody who may exceed it, so the child is a user that nobody else is. It may not enter this
    // directory.
    let program = File::open(std::env::current_exe().unwrap()).unwrap();
    let mut child = Command::new("setpriv");
    child.args(["--reuid=61234", "--regid=61234", "--clear-groups", "prlimit", "--nproc=1", "/proc/self/fd/0"]);
    child.args(["--exact", "a_thread_that_cannot_be_made_is_an_error", "--nocapture", "--test-threads=1"]);
    let output = child.env(LONELY, "1").current_dir("/").stdin(Stdio::from(program)).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("refused, and alive"), "{output:?}");
}
