//! What is shown: medians over the rounds, as tables and as a chart, with where and how they were measured.

use std::{fmt::Write as _, fs, process::Command};

use xdpkit_lab::chart::{Bar, Chart, Panel};

use crate::{
    Place, Result, Sample,
    candidates::{Candidate, PROGRAMS},
    load::{CONNECTIONS, Load},
};

const LOADS: [Load; 5] = [Load::Connections, Load::Requests, Load::Bulk, Load::Packets, Load::ManyFlows];

pub(crate) struct Report {
    rows: Vec<Row>,
    machine: String,
    versions: String,
}

/// The medians of a candidate under a load.
struct Row {
    sample: Sample,
    /// How many there are, and the least and most CPU time of them.
    rounds: usize,
    cpu: (f64, f64),
}

/// What one thing is under a load, the factor from microseconds to the unit that its CPU time is told in, and the unit.
fn unit(load: Load) -> (&'static str, f64, &'static str) {
    match load {
        Load::Connections => ("short connection", 1.0, "µs"),
        Load::Requests => ("request", 1.0, "µs"),
        // Microseconds a megabit are milliseconds a gigabit.
        Load::Bulk => ("gigabit", 1.0, "ms"),
        Load::Packets => ("packet, 1,024 flows", 1000.0, "ns"),
        Load::ManyFlows => ("packet, 32,768 flows", 1000.0, "ns"),
    }
}

impl Report {
    pub(crate) fn new(samples: &[Sample], place: &Place) -> Result<Self> {
        let row = |(load, candidate)| {
            let of_row = |sample: &&Sample| sample.load == load && sample.candidate == candidate;
            let all: Vec<&Sample> = samples.iter().filter(of_row).collect();
            let median = |value: fn(&Sample) -> f64| median(all.iter().map(|sample| value(sample)).collect());
            let cpu = all.iter().map(|sample| sample.cpu);
            Some(Row {
                sample: Sample {
                    candidate,
                    load,
                    rate: median(|sample| sample.rate)?,
                    p50: median(|sample| sample.p50)?,
                    p99: median(|sample| sample.p99)?,
                    busy: median(|sample| sample.busy)?,
                    cpu: median(|sample| sample.cpu)?,
                },
                rounds: all.len(),
                cpu: cpu.fold((f64::MAX, 0.0), |(least, most), cpu| (least.min(cpu), most.max(cpu))),
            })
        };
        let all = LOADS.into_iter().flat_map(|load| Candidate::ALL.map(|candidate| (load, candidate)));
        Ok(Self { rows: all.filter_map(row).collect(), machine: machine(place)?, versions: versions()? })
    }

    fn row(&self, load: Load, candidate: Candidate) -> Option<&Row> {
        self.rows.iter().find(|row| row.sample.load == load && row.sample.candidate == candidate)
    }

    fn of(&self, load: Load) -> impl Iterator<Item = &Row> {
        self.rows.iter().filter(move |row| row.sample.load == load)
    }

    /// How many times NatBalancer's CPU time this is.
    fn ratio(&self, row: &Row) -> Option<f64> {
        Some(row.sample.cpu / self.row(row.sample.load, Candidate::NatBalancer)?.sample.cpu)
    }

    pub(crate) fn markdown(&self) -> String {
        let rounds = self.rows.iter().map(|row| row.rounds).min().unwrap_or(0);
        let mut text = format!(
            "# NatBalancer beside nftables, nginx and HAProxy

![CPU time of the balancer](nat-benchmark.svg)

The same hosts, the same load, one CPU for the balancer. {}. {}. Medians of {rounds} interleaved rounds.
`./x bench nat -- --out docs` writes this page anew.

## CPU time of the balancer

For each piece of work; in brackets how many times `NatBalancer`'s it is.

| | {} |
|---|---|---|---|---|---|
",
            self.machine,
            self.versions,
            LOADS.map(|load| unit(load).0).join(" | ")
        );
        for candidate in Candidate::ALL {
            let cell = |load| {
                let Some(row) = self.row(load, candidate) else { return String::new() };
                let (_, factor, unit) = unit(load);
                let ratio = self.ratio(row).filter(|_| candidate != Candidate::NatBalancer);
                let ratio = ratio.map(|ratio| format!(" ({ratio:.1}×)")).unwrap_or_default();
                format!("{} {unit}{ratio}", figure(row.sample.cpu * factor))
            };
            let _ = writeln!(text, "| {} | {} |", candidate.name(), LOADS.map(cell).join(" | "));
        }
        for load in LOADS {
            text += &self.details(load);
        }
        text + &method()
    }

    fn details(&self, load: Load) -> String {
        let (title, rate) = match load {
            Load::Connections => ("Short connections: one request each", "connections/s"),
            Load::Requests => ("Requests over open connections", "requests/s"),
            Load::Bulk => ("One stream of bytes", "Gbit/s"),
            Load::Packets => ("Packets alone, 64 bytes, one direction, 1,024 flows", "Mpacket/s"),
            Load::ManyFlows => ("Packets alone, 64 bytes, one direction, 32,768 flows", "Mpacket/s"),
        };
        let (thing, factor, unit) = unit(load);
        let way = self.row(load, Candidate::Redirect).map(|row| row.sample.cpu);
        let mut columns = vec![String::new(), rate.to_owned()];
        match load {
            Load::Connections | Load::Requests => columns.extend(["p50", "p99", "CPU used"].map(str::to_owned)),
            Load::Bulk => columns.push("CPU used".into()),
            Load::Packets | Load::ManyFlows => columns.push("above redirect alone".into()),
        }
        columns.extend([format!("CPU time for a {thing}"), "least to most".into()]);
        let mut text = format!("\n## {title}\n\n| {} |\n|{}\n", columns.join(" | "), "---|".repeat(columns.len()));
        for row in self.of(load) {
            let sample = &row.sample;
            let busy = format!("{:.0} %", sample.busy * 100.0);
            let mut cells = vec![sample.candidate.name().to_owned()];
            match load {
                Load::Connections | Load::Requests => {
                    cells.extend([format!("{:.0}", sample.rate), time(sample.p50), time(sample.p99), busy]);
                }
                Load::Bulk => cells.extend([format!("{:.2}", sample.rate / 1e9), busy]),
                Load::Packets | Load::ManyFlows => {
                    let above = way.map(|way| self.above(row, way, factor, unit)).unwrap_or_default();
                    cells.extend([format!("{:.2}", sample.rate / 1e6), above]);
                }
            }
            cells.push(format!("{} {unit}", figure(sample.cpu * factor)));
            cells.push(format!("{} to {} {unit}", figure(row.cpu.0 * factor), figure(row.cpu.1 * factor)));
            let _ = writeln!(text, "| {} |", cells.join(" | "));
        }
        text
    }

    /// What is left without the way, and how many times what NatBalancer's is.
    fn above(&self, row: &Row, way: f64, factor: f64, unit: &str) -> String {
        let above = row.sample.cpu - way;
        let ours = self.row(row.sample.load, Candidate::NatBalancer).map(|ours| ours.sample.cpu - way);
        match ours.filter(|ours| *ours > 0.0) {
            _ if row.sample.candidate == Candidate::Redirect => String::new(),
            Some(ours) if row.sample.candidate != Candidate::NatBalancer => {
                format!("{} {unit} ({:.1}×)", figure(above * factor), above / ours)
            }
            _ => format!("{} {unit}", figure(above * factor)),
        }
    }

    pub(crate) fn chart(&self) -> Chart {
        let panel = |load| {
            let (thing, factor, unit) = unit(load);
            let bar = |row: &Row| {
                let value = row.sample.cpu * factor;
                let ours = row.sample.candidate == Candidate::NatBalancer;
                let ratio = self.ratio(row).filter(|_| row.sample.candidate.balances() && !ours);
                let ratio = ratio.map(|ratio| format!(" · {ratio:.1}×")).unwrap_or_default();
                let label = row.sample.candidate.name().to_owned();
                Bar { label, value, text: format!("{} {unit}{ratio}", figure(value)), ours }
            };
            Panel { title: format!("for a {thing}, {unit}"), bars: self.of(load).map(bar).collect() }
        };
        Chart {
            title: "CPU time of the balancer; less is better".into(),
            note: format!("{}\n{}", self.machine, self.versions),
            panels: LOADS.map(panel).into(),
        }
    }
}

/// One measurement, as it comes in.
pub(crate) fn line(sample: &Sample) -> String {
    let (thing, factor, unit) = unit(sample.load);
    let name = sample.candidate.name();
    format!("  {name:<14} {:>8} {unit} a {thing}, {:.0} in a second", figure(sample.cpu * factor), sample.rate)
}

/// What a candidate or tool is asked its version with.
pub(crate) fn version_flag(program: &str) -> &'static str {
    if matches!(program, "nft" | "iperf3") { "--version" } else { "-v" }
}

/// Three digits that matter.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// Of microseconds.
fn time(value: f64) -> String {
    if value >= 1000.0 { format!("{:.1} ms", value / 1000.0) } else { format!("{value:.0} µs") }
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some((lower + upper) / 2.0)
}

fn machine(place: &Place) -> Result<String> {
    let read = |path: &str| fs::read_to_string(path).map_err(|error| format!("cannot read {path}: {error}"));
    let processors = read("/proc/cpuinfo")?;
    let model = processors.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(": ")).map_or("unknown processor", |(_, model)| model);
    let kernel = read("/proc/sys/kernel/osrelease")?;
    let date = Command::new("date").args(["-u", "+%F"]).output()?;
    let date = String::from_utf8_lossy(&date.stdout).trim().to_owned();
    let (all, kernel) = (place.others.len() + 1, kernel.trim());
    Ok(format!("{model}, {all} CPUs, Linux {kernel}, {date}"))
}

/// What each program says of itself, cut down to a name and a number.
fn versions() -> Result<String> {
    let mut all = Vec::new();
    for (program, _) in PROGRAMS {
        let output = Command::new(program).arg(version_flag(program)).output()?;
        let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        let is_number =
            |word: &&str| word.trim_start_matches(['v', '(']).starts_with(|first: char| first.is_ascii_digit());
        let number = text.split([' ', '/', '\n']).find(is_number).unwrap_or("of unknown version");
        let number = number.split('-').next().unwrap_or(number);
        all.push(format!("{program} {}", number.trim_start_matches('v')));
    }
    Ok(all.join(", "))
}

fn method() -> String {
    format!(
        "
## How it was measured

One client and two backends (nginx, a page of 13 bytes) are network namespaces on two bridges, with the balancer between
them, joined by veth. The balancer has a CPU to itself; client, backends and bridges share the others, and limit
the rates: where the CPU is not used up, a rate says what the load could do. So compare CPU times. They are those of the
threads that receive for the balancer's two interfaces (threaded NAPI, kept on its CPU), of that CPU's `ksoftirqd`, and of
the proxy's process (`/proc/PID/schedstat`). Interrupts of an idle CPU are nobody's, and not in them. A machine that has
other work at the same time shows other figures, and smaller differences.

* Load: `wrk -t1 -c{CONNECTIONS}`, for short connections with `Connection: close`; `iperf3 -C cubic`, one stream. Latencies are
  wrk's, from a request to its answer, without the handshake.
* `NatBalancer`: native mode on both interfaces, full NAT, Maglev. nftables: `dnat` to a map by `numgen`, `masquerade`.
  HAProxy: `mode tcp`, one thread. nginx: `stream`, one process. Nothing else is set. \"Routing alone\" is the kernel's
  forwarding to one backend, without any balancer: what the laboratory itself costs.
* Checksum and segmentation offload are off at all interfaces; the balancer's receive with GRO. The kernel's ways therefore
  handle several segments of a stream at a time, XDP each frame.
* Packets of local sockets are copied before an XDP program on veth sees them, those of a network card are not. Packets
  alone therefore come from test runs with live frames: UDP of known flows in random order, generated on the balancer's
  CPU, counted and dropped at the backend's end of the link. The generator's time is taken away; \"redirect alone\", an XDP
  program that only redirects, shows what veth and the sink have of the rest.
"
    )
}
