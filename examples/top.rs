//! A live view of a pinned appliance: packets a second by function, reason and action, refreshed every second. It only
//! looks: the appliance goes on as it is. With `--metrics`, it shows what the appliance serves to Prometheus, too: rules,
//! services, backends, sources.
//!
//! ```sh
//! cargo run --example top -- --pin /sys/fs/bpf/edge --metrics 127.0.0.1:9108
//! ```
//!
//! `q` or Ctrl-C ends it. `--once` prints two looks a second apart as text, for scripts.

use std::{
    collections::BTreeMap,
    error::Error,
    fmt,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::ExitCode,
    thread,
    time::{Duration, Instant},
};

use lexopt::{Arg, ValueExt as _};
use prometheus_parse::{Scrape, Value};
use ratatui::{
    Frame,
    crossterm::event::{self, Event, KeyCode, KeyModifiers},
    layout::{Constraint, Layout},
    style::Style,
    widgets::{Block, Row, Table},
};
use xdpkit::{Count, Stats, pinned, pinned_stats};

const HELP: &str = "Shows what a pinned appliance does, second by second.

  --pin DIR              where it is pinned
  --metrics ADDR:PORT    where it serves its metrics, for more detail
  --once                 print one second as text, and end
  --help
";
const PERIOD: Duration = Duration::from_secs(1);
/// Shown already, out of the pins.
const COVERED: [&str; 2] = ["xdpkit_packets", "xdpkit_bytes"];

struct Flags {
    pin: PathBuf,
    metrics: Option<SocketAddr>,
    once: bool,
}

struct Usage(String);

fn main() -> ExitCode {
    let flags = match parse() {
        Ok(Some(flags)) => flags,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(Usage(line)) => {
            eprintln!("{line}");
            return ExitCode::from(2);
        }
    };
    let done = if flags.once { once(&flags) } else { live(&flags) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn parse() -> Result<Option<Flags>, Usage> {
    let (mut pin, mut metrics, mut once) = (None, None, false);
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next().map_err(|error| Usage(error.to_string()))? {
        let flag = match arg {
            Arg::Long(name) => format!("--{name}"),
            Arg::Short(name) => format!("-{name}"),
            Arg::Value(value) => value.display().to_string(),
        };
        match flag.as_str() {
            "--help" | "-h" => return Ok(None),
            "--once" => once = true,
            "--pin" | "--metrics" => {
                let value = parser.value().map_err(|_| Usage(format!("{flag}: expected a value")))?;
                let value = value.string().map_err(|error| Usage(format!("{flag}: {error}")))?;
                if flag == "--pin" {
                    pin = Some(PathBuf::from(value));
                } else {
                    let wrong = |_| Usage(format!("--metrics: `{value}`: expected ADDR:PORT, such as 127.0.0.1:9108"));
                    metrics = Some(value.parse().map_err(wrong)?);
                }
            }
            _ => return Err(Usage(format!("`{flag}`: expected one of --pin, --metrics, --once, --help"))),
        }
    }
    let pin = pin.ok_or_else(|| Usage("--pin: expected the directory that the appliance is pinned in".into()))?;
    Ok(Some(Flags { pin, metrics, once }))
}

/// By name and labels: the value, and whether it counts up.
type Metrics = BTreeMap<(String, String), (f64, bool)>;

/// All counters at one moment.
struct Look {
    at: Instant,
    /// By function; with its kind.
    functions: BTreeMap<String, (String, Stats)>,
    metrics: Metrics,
}

impl Look {
    fn take(flags: &Flags) -> Result<Self, Box<dyn Error>> {
        let mut functions = BTreeMap::new();
        for (name, kind) in pinned(&flags.pin)?.stages {
            let stats = pinned_stats(&flags.pin, &name)?;
            functions.insert(name, (kind, stats));
        }
        if functions.is_empty() {
            return Err(format!("nothing is pinned at {}", flags.pin.display()).into());
        }
        let metrics = flags.metrics.map_or_else(|| Ok(BTreeMap::new()), scrape)?;
        Ok(Self { at: Instant::now(), functions, metrics })
    }
}

fn scrape(address: SocketAddr) -> Result<Metrics, Box<dyn Error>> {
    let failed = |error: std::io::Error| format!("metrics at {address}: {error}");
    let mut stream = TcpStream::connect_timeout(&address, PERIOD).map_err(failed)?;
    stream.set_read_timeout(Some(5 * PERIOD)).map_err(failed)?;
    // Version 1.0: the answer ends with the connection.
    write!(stream, "GET /metrics HTTP/1.0\r\nHost: {address}\r\n\r\n").map_err(failed)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).map_err(failed)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    if !head.contains(" 200 ") {
        return Err(format!("metrics at {address}: {}", head.lines().next().unwrap_or("no answer")).into());
    }
    let scrape = Scrape::parse(body.lines().map(|line| Ok(line.to_owned())))?;
    let mut values = BTreeMap::new();
    for sample in scrape.samples {
        let (Value::Counter(value) | Value::Gauge(value) | Value::Untyped(value)) = sample.value else { continue };
        let name = sample.metric.trim_end_matches("_total").to_owned();
        if COVERED.contains(&name.as_str()) {
            continue;
        }
        let mut labels: Vec<_> = sample.labels.iter().map(|(label, value)| format!("{label}={value}")).collect();
        labels.sort_unstable();
        values.insert((name, labels.join(" ")), (value, sample.metric.ends_with("_total")));
    }
    Ok(values)
}

/// What is shown: a table of each kind, with a title, the columns' names and the lines.
struct View {
    title: String,
    columns: &'static [&'static str],
    lines: Vec<Vec<String>>,
}

fn views(before: &Look, now: &Look) -> Vec<View> {
    let seconds = now.at.duration_since(before.at).as_secs_f64().max(1e-3);
    let none = Stats::default();
    let mut functions = Vec::new();
    let mut reasons = Vec::new();
    for (name, (kind, stats)) in &now.functions {
        let since = stats.since(before.functions.get(name).map_or(&none, |(_, stats)| stats));
        let rate = |count: Count| short(count.packets as f64 / seconds);
        functions.push(vec![
            name.clone(),
            kind.clone(),
            rate(since.total()),
            short(since.total().bytes as f64 * 8.0 / seconds),
            rate(since.passed()),
            rate(since.dropped()),
            stats.total().packets.to_string(),
        ]);
        for line in &stats.reasons {
            let moved = since.reasons.iter().find(|l| (l.reason, l.action) == (line.reason, line.action));
            let moved = moved.map_or(Count::default(), |line| line.count);
            reasons.push((
                moved.packets,
                vec![
                    name.clone(),
                    line.reason.to_string(),
                    line.action.to_string(),
                    rate(moved),
                    line.count.packets.to_string(),
                ],
            ));
        }
    }
    // The busiest first.
    reasons.sort_by_key(|(packets, _)| std::cmp::Reverse(*packets));
    let mut all = vec![
        View {
            title: "functions".into(),
            columns: &["function", "kind", "packets/s", "bit/s", "passed/s", "dropped/s", "packets"],
            lines: functions,
        },
        View {
            title: "reasons".into(),
            columns: &["function", "reason", "action", "packets/s", "packets"],
            lines: reasons.into_iter().map(|(_, line)| line).collect(),
        },
    ];
    if !now.metrics.is_empty() {
        let lines = now.metrics.iter().map(|(key, (value, counts))| {
            let moved = value - before.metrics.get(key).map_or(*value, |(value, _)| *value);
            let rate = if *counts { short(moved / seconds) } else { String::new() };
            vec![key.0.trim_start_matches("xdpkit_").to_owned(), key.1.clone(), rate, format!("{value}")]
        });
        all.push(View {
            title: "metrics".into(),
            columns: &["metric", "of", "a second", "value"],
            lines: lines.collect(),
        });
    }
    all
}

/// Three digits and a unit.
fn short(value: f64) -> String {
    let units = ["", " k", " M", " G", " T"];
    let mut scaled = value;
    let mut unit = 0;
    while scaled >= 1000.0 && unit < units.len() - 1 {
        scaled /= 1000.0;
        unit += 1;
    }
    let digits = if scaled >= 100.0 || value.fract() == 0.0 && unit == 0 { 0 } else { 1 };
    format!("{scaled:.digits$}{}", units[unit])
}

fn once(flags: &Flags) -> Result<(), Box<dyn Error>> {
    let before = Look::take(flags)?;
    thread::sleep(PERIOD);
    for view in views(&before, &Look::take(flags)?) {
        println!("{view}");
    }
    Ok(())
}

impl fmt::Display for View {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let widths: Vec<usize> = (0..self.columns.len()).map(|column| self.width(column)).collect();
        writeln!(f, "{}", self.title)?;
        let names = self.columns.iter().map(|name| (*name).to_owned()).collect();
        for line in std::iter::once(&names).chain(&self.lines) {
            for (cell, width) in line.iter().zip(&widths) {
                write!(f, "  {cell:<width$}")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl View {
    fn width(&self, column: usize) -> usize {
        let cells = self.lines.iter().map(|line| line[column].chars().count());
        cells.chain([self.columns[column].len()]).max().unwrap_or(0)
    }

    fn table(&self) -> Table<'_> {
        let rows = self.lines.iter().map(|line| Row::new(line.iter().map(String::as_str)));
        let widths = (0..self.columns.len()).map(|column| Constraint::Length(self.width(column) as u16));
        Table::new(rows, widths)
            .header(Row::new(self.columns.iter().copied()).style(Style::new().bold()))
            .column_spacing(2)
            .block(Block::bordered().title(self.title.as_str()))
    }
}

fn live(flags: &Flags) -> Result<(), Box<dyn Error>> {
    let mut before = Look::take(flags)?;
    let mut shown = views(&before, &before);
    let mut terminal = ratatui::try_init()?;
    let result = (|| -> Result<(), Box<dyn Error>> {
        loop {
            terminal.draw(|frame| draw(frame, &shown))?;
            let end = Instant::now() + PERIOD;
            while event::poll(end.saturating_duration_since(Instant::now()))? {
                if let Event::Key(key) = event::read()? {
                    let interrupted = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
                    if key.code == KeyCode::Char('q') || interrupted {
                        return Ok(());
                    }
                }
            }
            let now = Look::take(flags)?;
            shown = views(&before, &now);
            before = now;
        }
    })();
    ratatui::restore();
    result
}

/// Each table gets the lines that it needs, the last what is left.
fn draw(frame: &mut Frame<'_>, views: &[View]) {
    let heights = views.iter().map(|view| Constraint::Max(view.lines.len() as u16 + 3));
    let areas = Layout::vertical(heights).split(frame.area());
    for (view, area) in views.iter().zip(areas.iter()) {
        frame.render_widget(view.table(), *area);
    }
}
