//! `NatBalancer` beside nftables, nginx and HAProxy: the same hosts, the same load, one CPU for the balancer.
//!
//! Real TCP: short connections, requests over open ones, and one bulk stream, between namespaces joined by veth. What is
//! compared is the CPU time that the balancer's CPU spends on a connection, since load and backends share the other CPUs
//! and limit the rates. Then packets alone, by live frames. See `candidates.rs` for what is set up, `load.rs` for what is
//! measured, `report.rs` for what is made of it.
//!
//! `./x bench nat` installs what is needed and runs this.

mod candidates;
mod load;
mod packets;
mod report;

use std::{
    error::Error,
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, ExitCode},
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};

use lexopt::{Arg, ValueExt as _};
use serde::{Deserialize, Serialize};
use xdpkit_lab::cpu;

use candidates::{Candidate, Scratch};
use load::Load;

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const USAGE: &str = "\
nat_comparison: NatBalancer beside nftables, nginx and HAProxy, on one CPU

  --rounds N       every candidate under every load so many times; medians are shown (3)
  --seconds N      of each load, 1 to 600 (3)
  --only NAME      this candidate, by a part of its name; may be repeated
  --samples FILE   add what is measured to this file, and show all that there is in it
  --out DIR        write nat-benchmark.md and nat-benchmark.svg there
";

/// What everything measured has in common.
struct Place {
    /// The balancer's CPU.
    balancer: usize,
    /// Those of load and backends.
    others: Vec<usize>,
    each: Duration,
    stop: Arc<AtomicBool>,
}

/// One candidate under one load.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Sample {
    candidate: Candidate,
    load: Load,
    /// Connections, requests, bits or packets a second.
    rate: f64,
    /// Of a request, in microseconds; 0 where there are none.
    p50: f64,
    p99: f64,
    /// CPU time of the balancer by the time that passed.
    busy: f64,
    /// CPU time of the balancer for one connection, request, million bits or packet, in microseconds.
    cpu: f64,
}

struct Options {
    rounds: u32,
    seconds: u64,
    candidates: Vec<Candidate>,
    samples: Option<PathBuf>,
    out: Option<PathBuf>,
}

fn main() -> ExitCode {
    match options().map_err(|error| (2, error.into())).and_then(|o| o.map_or(Ok(()), |o| run(&o).map_err(|e| (1, e)))) {
        Ok(()) => ExitCode::SUCCESS,
        Err((code, error)) => {
            eprintln!("nat_comparison: {error}");
            ExitCode::from(code)
        }
    }
}

/// `None`: there is nothing left to do.
fn options() -> std::result::Result<Option<Options>, lexopt::Error> {
    let mut options = Options { rounds: 3, seconds: 3, candidates: Vec::new(), samples: None, out: None };
    let mut arguments = lexopt::Parser::from_env();
    while let Some(argument) = arguments.next()? {
        match argument {
            Arg::Long("rounds") => options.rounds = number(&mut arguments, "--rounds", 0..=1000)?,
            Arg::Long("seconds") => options.seconds = number(&mut arguments, "--seconds", 1..=600)?.into(),
            Arg::Long("only") => options.candidates.push(candidate(&arguments.value()?.string()?)?),
            Arg::Long("samples") => options.samples = Some(arguments.value()?.into()),
            Arg::Long("out") => options.out = Some(arguments.value()?.into()),
            // Cargo says so to every benchmark.
            Arg::Long("bench") => {}
            Arg::Long("help") => {
                print!("{USAGE}");
                return Ok(None);
            }
            other => return Err(other.unexpected()),
        }
    }
    if options.rounds == 0 && options.samples.is_none() {
        return Err("--rounds: `0`: expected 1 to 1000, or --samples beside it".into());
    }
    Ok(Some(options))
}

fn candidate(part: &str) -> std::result::Result<Candidate, lexopt::Error> {
    let found = Candidate::ALL.into_iter().find(|known| known.name().to_lowercase().contains(&part.to_lowercase()));
    let all = Candidate::ALL.map(Candidate::name).join(", ");
    found.ok_or_else(|| format!("--only: `{part}`: expected a part of one of {all}").into())
}

fn number(
    arguments: &mut lexopt::Parser,
    flag: &str,
    range: std::ops::RangeInclusive<u32>,
) -> std::result::Result<u32, lexopt::Error> {
    let value = arguments.value()?;
    let wrong =
        || format!("{flag}: `{}`: expected a number from {} to {}", value.display(), range.start(), range.end());
    value.parse::<u32>().ok().filter(|number| range.contains(number)).ok_or_else(|| wrong().into())
}

fn run(options: &Options) -> Result<()> {
    for (program, package) in candidates::PROGRAMS {
        let version = Command::new(program).arg(report::version_flag(program)).output();
        version.map_err(|error| format!("cannot run {program} (Debian's package {package}): {error}"))?;
    }
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&stop))?;
    }
    let (balancer, others) = cpu::divide()?;
    let place = Place { balancer, others, each: Duration::from_secs(options.seconds), stop };

    let mut samples = match &options.samples {
        Some(path) if path.exists() => earlier(path)?,
        _ => Vec::new(),
    };
    let mut keep = match &options.samples {
        Some(path) => Some(File::options().create(true).append(true).open(path)?),
        None => None,
    };
    let mut note = |sample: Sample| -> Result<()> {
        println!("{}", report::line(&sample));
        if let Some(file) = &mut keep {
            writeln!(file, "{}", serde_json::to_string(&sample)?)?;
        }
        samples.push(sample);
        Ok(())
    };
    let scratch = Scratch::new()?;
    for round in 1..=options.rounds {
        println!("round {round} of {}", options.rounds);
        let asked = |candidate: &Candidate| options.candidates.is_empty() || options.candidates.contains(candidate);
        let candidates = || Candidate::ALL.into_iter().filter(asked);
        for candidate in candidates().filter(|candidate| candidate.carries_tcp()) {
            load::measure(&place, &scratch, candidate, &mut note)?;
        }
        for load in [Load::Packets, Load::ManyFlows] {
            for candidate in candidates().filter(|candidate| candidate.forwards_packets()) {
                note(packets::measure(&place, &scratch, candidate, load)?)?;
            }
        }
    }

    let report = report::Report::new(&samples, &place)?;
    println!("\n{}", report.markdown());
    if let Some(directory) = &options.out {
        write(directory, "nat-benchmark.md", &report.markdown())?;
        write(directory, "nat-benchmark.svg", &report.chart().svg())?;
    }
    Ok(())
}

fn earlier(path: &Path) -> Result<Vec<Sample>> {
    let text = fs::read_to_string(path)?;
    let read = |line| serde_json::from_str(line).map_err(|error| format!("{}: {error}: {line}", path.display()).into());
    text.lines().map(read).collect()
}

/// Writes a file that belongs to whom the directory does.
fn write(directory: &Path, name: &str, text: &str) -> Result<()> {
    use std::os::unix::fs::{MetadataExt as _, chown};
    let path = directory.join(name);
    let written = fs::write(&path, text)
        .and_then(|()| fs::metadata(directory))
        .and_then(|owner| chown(&path, Some(owner.uid()), Some(owner.gid())));
    written.map_err(|error| format!("cannot write {}: {error}", path.display()).into())
}
