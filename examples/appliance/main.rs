//! All functions on one host, operated like production software: a file says which interface has which chain of
//! functions; SIGHUP brings the running appliance to what the file says now; counters are served to Prometheus; with
//! pins, a restart takes over what is at work, and no packet passes unjudged meanwhile.
//!
//! ```sh
//! cargo run --example appliance --features serde,health,pcapng -- --config appliance.toml --metrics 127.0.0.1:9108 --pin /sys/fs/bpf/edge
//! ```
//!
//! `examples/appliance/appliance.toml` is a file with everything in it.

mod capture;
mod config;
mod dsr_balancer;
mod firewall;
mod health;
mod interfaces;
mod lacking;
mod metrics;
mod nat_balancer;
mod notify;
mod rate_limiter;
mod state;

#[path = "../common/mod.rs"]
mod common;

use std::{
    error::Error,
    fs::OpenOptions,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use capture::Capture;
use common::{Flags, Output, Usage};
use config::ConfigError;
use serde_json::{Value, json};
use state::Appliance;

const ABOUT: &str = "Runs the functions that a file names on the interfaces that it names.";
const OWN_FLAGS: &str = "  --config FILE          what to run (TOML); read again at SIGHUP
  --metrics ADDR:PORT    serve http://ADDR:PORT/metrics
  --pcapng FILE          append dropped packets that became events, for Wireshark; opened again at SIGHUP
  --pin DIR              survive restarts below this directory of a BPF file system
";

/// How often what is over is let go of. A balancer reads all its connections for it.
const TIDY: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    match run() {
        // What is wrong with the file at the start is a wrong argument.
        Err(error) if error.is::<ConfigError>() => common::exit(Err(Usage::text(error.to_string()).into())),
        other => common::exit(other),
    }
}

fn run() -> Result<(), Box<dyn Error>> {
    let (mut file, mut listen, mut pin, mut pcapng) = (None, None, None, None);
    let own = |flag: &str, value: &str| {
        match flag {
            "--config" => file = Some(PathBuf::from(value)),
            "--metrics" => {
                let address = value.parse::<SocketAddr>();
                listen = Some(address.map_err(|_| Usage::new(flag, value, "ADDR:PORT, such as 127.0.0.1:9108"))?);
            }
            "--pcapng" => pcapng = Some(PathBuf::from(value)),
            "--pin" => pin = Some(PathBuf::from(value)),
            _ => return Ok(false),
        }
        Ok(true)
    };
    let flags: Flags = common::parse_without_interface(ABOUT, own, OWN_FLAGS)?;
    let file = file.ok_or_else(|| Usage::text("--config: expected the path of a file".into()))?;

    let (stop, reload) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    signal_hook::flag::register(signal_hook::consts::SIGHUP, Arc::clone(&reload))?;

    let output = Output { json: flags.json };
    let plan = config::read(&file)?;
    if let Some(path) = &pcapng {
        // Before anything is attached.
        let opened = OpenOptions::new().create(true).append(true).open(path);
        opened.map_err(|error| format!("--pcapng: `{}`: {error}", path.display()))?;
    }
    // Before anything is attached, too; but who is to be taken over may still listen there.
    let cannot_listen = |address, error| format!("--metrics: `{address}`: cannot listen there: {error}");
    let mut listener = None;
    if let Some(address) = listen {
        match TcpListener::bind(address) {
            Ok(bound) => listener = Some(bound),
            Err(error) if error.kind() == ErrorKind::AddrInUse && pin.is_some() => {}
            Err(error) => return Err(cannot_listen(address, error).into()),
        }
    }
    lacking::tell(output, &plan)?;
    let appliance = Arc::new(Mutex::new(Appliance::start(plan, pin, output)?));
    lock(&appliance).ready()?;
    if let (Some(address), None) = (listen, &listener) {
        listener = Some(bind_again(address).map_err(|error| cannot_listen(address, error))?);
    }
    let mut capture = pcapng.as_ref().and_then(|path| open_capture(path, &lock(&appliance), output));
    if let Some(listener) = listener {
        let bound = listener.local_addr()?;
        metrics::serve(listener, Arc::clone(&appliance))?;
        output.line(&json!({"event": "metrics", "address": bound.to_string()}), || {
            format!("metrics at http://{bound}/metrics")
        });
    }
    ready(output, &lock(&appliance));
    notify::ready().map_err(|error| format!("NOTIFY_SOCKET: cannot tell that this is ready: {error}"))?;

    let start = Instant::now();
    let (mut tidied, mut looked) = (start, start);
    let mut next_stats = flags.stats_every.map(|every| start + every);
    while !stop.load(Ordering::Relaxed) && flags.duration.is_none_or(|length| start.elapsed() < length) {
        thread::sleep(Duration::from_millis(20));
        if looked.elapsed() >= interfaces::LOOK {
            looked = Instant::now();
            // An upgrade: the tables are another process's from now on, and two would undo each other's changes.
            if let Some(interface) = lock(&appliance).tend()? {
                output.line(&json!({"event": "superseded", "interface": interface}), || {
                    format!("another process has taken over {interface}")
                });
                break;
            }
        }
        if reload.swap(false, Ordering::Relaxed) {
            let read = config::read(&file).map_err(Box::from);
            match read.and_then(|plan| lock(&appliance).reload(plan)) {
                Ok(()) => {
                    output.line(&json!({"event": "reloaded"}), || "reloaded".into());
                    ready(output, &lock(&appliance));
                    // The events have one reader at a time.
                    drop(capture.take());
                    capture = pcapng.as_ref().and_then(|path| open_capture(path, &lock(&appliance), output));
                }
                Err(error) => output.line(&json!({"event": "reload_refused", "error": error.to_string()}), || {
                    format!("not reloaded: {error}")
                }),
            }
        }
        write_capture(&mut capture, pcapng.as_deref(), output);
        if tidied.elapsed() >= TIDY {
            lock(&appliance).tidy()?;
            tidied = Instant::now();
        }
        if let (Some(at), Some(every)) = (next_stats, flags.stats_every)
            && Instant::now() >= at
        {
            print_stats(output, &lock(&appliance))?;
            next_stats = Some(at + every);
        }
    }
    write_capture(&mut capture, pcapng.as_deref(), output);
    print_stats(output, &lock(&appliance))?;
    lock(&appliance).stop()?;
    output.line(&json!({"event": "stopped"}), || "stopped".into());
    Ok(())
}

/// Waits until the process that was taken over has ended.
fn bind_again(address: SocketAddr) -> io::Result<TcpListener> {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match TcpListener::bind(address) {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < end => {
                thread::sleep(Duration::from_millis(20));
            }
            answer => return answer,
        }
    }
}

fn open_capture(path: &Path, appliance: &Appliance, output: Output) -> Option<Capture> {
    let opened = Capture::open(path, appliance);
    opened.inspect_err(|error| tell_capture_failed(path, error, output)).ok()
}

fn write_capture(capture: &mut Option<Capture>, path: Option<&Path>, output: Output) {
    if let (Some(Err(error)), Some(path)) = (capture.as_mut().map(Capture::write), path) {
        tell_capture_failed(path, &error, output);
        *capture = None;
    }
}

/// A full disk is no reason to let packets go unjudged.
fn tell_capture_failed(path: &Path, error: &impl std::fmt::Display, output: Output) {
    let path = path.display().to_string();
    output.line(&json!({"event": "capture_failed", "path": path, "error": error.to_string()}), || {
        format!("{path}: {error}: no more packets are written until SIGHUP")
    });
}

fn lock(appliance: &Mutex<Appliance>) -> MutexGuard<'_, Appliance> {
    appliance.lock().unwrap_or_else(PoisonError::into_inner)
}

fn ready(output: Output, appliance: &Appliance) {
    for (interface, chain) in &appliance.chains {
        // What is, not what was: it may have gone a moment ago.
        if !chain.is_attached().unwrap_or(false) {
            appliance.tell_detached(interface, &appliance.why_lost(interface));
            continue;
        }
        let mode = interfaces::mode(chain);
        let (stages, adopted) = (chain.stages(), chain.adopted());
        let line = json!({"event": "ready", "interface": interface, "mode": mode, "chain": stages, "adopted": adopted});
        output.line(&line, || {
            let how = if adopted { "took over" } else { "attached to" };
            format!("{how} {interface} in {mode} mode: {}", stages.join(" -> "))
        });
    }
}

/// The sum over all functions of what ended there, and of what the last ones passed; then each function.
fn print_stats(output: Output, appliance: &Appliance) -> Result<(), Box<dyn Error>> {
    let mut functions = serde_json::Map::new();
    let (mut packets, mut bytes, mut passed, mut dropped) = (0, 0, 0, 0);
    let mut reasons = serde_json::Map::new();
    let mut text = Vec::new();
    for (name, function) in &appliance.functions {
        let stats = function.stage().stats()?;
        let ends = appliance.chains.values().any(|chain| chain.stages().last() == Some(&name.as_str()));
        for line in &stats.reasons {
            let goes_on = line.action == xdpkit::Action::Pass;
            if goes_on && !ends {
                continue;
            }
            packets += line.count.packets;
            bytes += line.count.bytes;
            match line.action {
                xdpkit::Action::Pass => passed += line.count.packets,
                xdpkit::Action::Drop | xdpkit::Action::Aborted => dropped += line.count.packets,
                _ => {}
            }
            let before = reasons.get(line.reason.name()).and_then(Value::as_u64).unwrap_or(0);
            reasons.insert(line.reason.name().into(), (before + line.count.packets).into());
        }
        text.push(format!(
            "    {name}: {} packets, {} passed, {} dropped",
            stats.total().packets,
            stats.passed().packets,
            stats.dropped().packets
        ));
        functions.insert(name.clone(), common::stats_json(&stats));
    }
    let line = json!({
        "event": "stats",
        "packets": packets,
        "bytes": bytes,
        "passed": passed,
        "dropped": dropped,
        "reasons": reasons,
        "functions": functions,
    });
    output.line(&line, || format!("{packets} packets: {passed} passed, {dropped} dropped\n{}", text.join("\n")));
    Ok(())
}
