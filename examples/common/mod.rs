//! What all examples share: their flags, exit codes, output and life cycle.
#![allow(dead_code, reason = "not every example uses everything")]

pub(crate) mod dsr;
pub(crate) mod lab;

use std::{
    error::Error,
    fmt,
    net::IpAddr,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use lexopt::{Arg, ValueExt as _};
use serde_json::{Value, json};
use xdpkit::{
    AttachOptions, Attachment, Interface, Loss, Stage, Stats, Watch, XdpMode,
    preflight::{self, BalancerKind, BalancerSetup, Finding, FindingKind, Severity},
};
use xdpkit_lab::Namespace;

type Failure = Box<dyn Error>;

/// Bad arguments: one line that names the flag, the value and what is expected; exit code 2.
#[derive(Debug)]
pub(crate) struct Usage(String);

impl Usage {
    pub(crate) fn new(flag: &str, value: impl fmt::Display, expected: impl fmt::Display) -> Self {
        Self(format!("{flag}: `{value}`: expected {expected}"))
    }

    /// A line that says all of that in other words.
    pub(crate) fn text(line: String) -> Self {
        Self(line)
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Error for Usage {}

/// The flags of all examples.
#[derive(Debug, Default)]
pub(crate) struct Flags {
    pub(crate) interfaces: Vec<String>,
    pub(crate) mode: XdpMode,
    pub(crate) json: bool,
    pub(crate) duration: Option<Duration>,
    pub(crate) stats_every: Option<Duration>,
    pub(crate) lab: bool,
}

const FLAGS: &str = "\
  --interface IF         attach here; may be repeated
  --mode MODE            native (default), generic or auto
  --lab                  play the tutorial in network namespaces, instead of --interface
  --json                 one JSON object a line
  --stats-every SECONDS  print counters from time to time
  --duration SECONDS     stop after this time
  --help
";

/// Parses the command line. `own` takes an example's own flags, each with a value: it answers false for one it
/// does not know.
pub(crate) fn parse(
    about: &str,
    own: impl FnMut(&str, &str) -> Result<bool, Usage>,
    own_flags: &str,
) -> Result<Flags, Failure> {
    let flags = parse_flags(about, own, own_flags, FLAGS)?;
    match (flags.interfaces.is_empty(), flags.lab) {
        (true, false) => Err(Usage("--interface: expected the name of an interface, or --lab".into()).into()),
        (false, true) => Err(Usage::new("--interface", &flags.interfaces[0], "not to stand beside --lab").into()),
        _ => Ok(flags),
    }
}

/// Parses the command line of an example whose interfaces stand in a file.
pub(crate) fn parse_without_interface(
    about: &str,
    own: impl FnMut(&str, &str) -> Result<bool, Usage>,
    own_flags: &str,
) -> Result<Flags, Failure> {
    let of_interfaces = ["--interface", "--mode", "--lab"];
    let flags: String = FLAGS
        .split_inclusive('\n')
        .filter(|line| line.split_whitespace().next().is_none_or(|flag| !of_interfaces.contains(&flag)))
        .collect();
    parse_flags(about, own, own_flags, &flags)
}

fn parse_flags(
    about: &str,
    mut own: impl FnMut(&str, &str) -> Result<bool, Usage>,
    own_flags: &str,
    common_flags: &str,
) -> Result<Flags, Failure> {
    let listed = format!("{own_flags}{common_flags}");
    let known: Vec<&str> = listed.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let mut flags = Flags::default();
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next().map_err(|error| Usage(error.to_string()))? {
        let flag = match arg {
            Arg::Long(name) => format!("--{name}"),
            Arg::Short(name) => format!("-{name}"),
            Arg::Value(value) => {
                return Err(Usage(format!("`{}`: expected a flag; --help lists them", value.display())).into());
            }
        };
        if flag == "-h" || flag == "--help" {
            say(format_args!("{about}\n\n{}", listed.trim_end()));
            std::process::exit(0);
        }
        if !known.contains(&flag.as_str()) {
            return Err(Usage(format!("`{flag}`: expected one of {}", known.join(", "))).into());
        }
        match flag.as_str() {
            "--json" => flags.json = true,
            "--lab" => flags.lab = true,
            _ => {
                let value = parser.value().map_err(|_| Usage(format!("{flag}: expected a value")))?;
                let value = value.string().map_err(|error| Usage(format!("{flag}: {error}")))?;
                match flag.as_str() {
                    "--interface" => flags.interfaces.push(value),
                    "--mode" => flags.mode = mode(&value)?,
                    "--duration" => flags.duration = Some(seconds(&flag, &value)?),
                    "--stats-every" => flags.stats_every = Some(seconds(&flag, &value)?),
                    _ => {
                        let taken = own(&flag, &value)?;
                        assert!(taken, "{flag} is listed in the help");
                    }
                }
            }
        }
    }
    Ok(flags)
}

fn mode(value: &str) -> Result<XdpMode, Usage> {
    match value {
        "native" => Ok(XdpMode::Native),
        "generic" => Ok(XdpMode::Generic),
        "auto" => Ok(XdpMode::Auto),
        _ => Err(Usage::new("--mode", value, "native, generic or auto")),
    }
}

fn seconds(flag: &str, value: &str) -> Result<Duration, Usage> {
    const MOST: f64 = 1e9;
    let parsed = value.parse().ok().filter(|seconds: &f64| *seconds > 0.0 && *seconds <= MOST);
    let duration = parsed.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    duration.ok_or_else(|| Usage::new(flag, value, "seconds, more than 0 and at most a billion"))
}

/// Turns an example's result into its exit code, with one line on stderr.
pub(crate) fn exit(result: Result<(), Failure>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<Usage>() => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Prints either JSON or text, a line at a time.
#[derive(Clone, Copy)]
pub(crate) struct Output {
    pub(crate) json: bool,
}

impl Output {
    pub(crate) fn line(self, object: &Value, text: impl FnOnce() -> String) {
        use std::io::Write as _;
        let line = if self.json { object.to_string() } else { text() };
        // A closed pipe (`| head`) is not a failure: the next signal or the end of time stops us.
        let _ = writeln!(std::io::stdout().lock(), "{line}");
    }
}

/// Says what the host lacks, as far as packets suffer from it.
pub(crate) fn warn(output: Output, findings: impl IntoIterator<Item = Finding>) {
    for finding in findings.into_iter().filter(|finding| finding.severity > Severity::Advice) {
        let (severity, remedy) = (finding.severity.name(), finding.remedy.as_deref());
        warning(output, finding.kind.name(), severity, &finding.object, &finding.text, remedy);
    }
}

/// Says what is wrong, and how to mend it.
pub(crate) fn warning(output: Output, finding: &str, severity: &str, object: &str, text: &str, remedy: Option<&str>) {
    let line = json!({
        "event": "warning",
        "finding": finding,
        "severity": severity,
        "object": object,
        "text": text,
        "remedy": remedy,
    });
    output.line(&line, || match remedy {
        Some(remedy) => format!("{severity}: {object}: {text}: {remedy}"),
        None => format!("{severity}: {object}: {text}"),
    });
}

/// Says what the host lacks for a balancer on these interfaces, where they are.
pub(crate) fn warn_of_balancer(
    output: Output,
    place: Option<&Namespace>,
    kind: BalancerKind,
    names: &[&str],
    (vips, backends): (Vec<IpAddr>, Vec<IpAddr>),
) -> xdpkit::Result<()> {
    let check = || {
        let interfaces = names.iter().filter_map(|name| Interface::by_name(name).ok());
        let setup = BalancerSetup::new(kind, interfaces).vips(vips.iter().copied());
        preflight::balancer(&setup.backends(backends.iter().copied()))
    };
    let findings = match place {
        Some(namespace) => namespace.run(check)?,
        None => check()?,
    };
    warn(output, findings);
    Ok(())
}

/// What this process and interfaces of this namespace lack for programs in this mode. Of an interface that is not there,
/// attaching tells.
pub(crate) fn lacking<'n>(names: impl Iterator<Item = &'n str>, mode: XdpMode) -> Vec<Finding> {
    let mut findings = preflight::host();
    for interface in names.filter_map(|name| Interface::by_name(name).ok()) {
        findings.extend(preflight::interface(&interface).unwrap_or_default());
    }
    findings.retain(|finding| match finding.kind {
        FindingKind::NoNativeMode | FindingKind::LargeReceiveOffload => mode == XdpMode::Native,
        // It may be this one's, to be taken over; if not, attaching tells.
        FindingKind::ProgramAttached => false,
        _ => true,
    });
    findings
}

/// Prints a line. Nobody reads any more (`| head`): that is no failure, but the end.
pub(crate) fn say(text: std::fmt::Arguments<'_>) {
    use std::io::Write as _;
    if writeln!(std::io::stdout().lock(), "{text}").is_err() {
        std::process::exit(0);
    }
}

/// An attached stage, from "ready" to "stopped".
pub(crate) struct Session<'a> {
    flags: &'a Flags,
    stage: &'a dyn Stage,
    attachments: Vec<Attachment>,
    watches: Vec<Watch>,
    stop: Arc<AtomicBool>,
    output: Output,
}

impl<'a> Session<'a> {
    /// Attaches to every interface, and says so once all are attached. In the laboratory, that is `eth0` of `place`.
    pub(crate) fn start(flags: &'a Flags, stage: &'a dyn Stage, place: Option<&Namespace>) -> Result<Self, Failure> {
        Self::start_on(flags, stage, place, &["eth0"])
    }

    /// The same, where the laboratory has several interfaces.
    pub(crate) fn start_on(
        flags: &'a Flags,
        stage: &'a dyn Stage,
        place: Option<&Namespace>,
        interfaces: &[&str],
    ) -> Result<Self, Failure> {
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
            signal_hook::flag::register(signal, Arc::clone(&stop))?;
        }
        let output = Output { json: flags.json };
        if place.is_none() {
            warn(output, lacking(flags.interfaces.iter().map(String::as_str), flags.mode));
        }
        let attach = |name: &String| stage.attach(&AttachOptions::new(name).mode(flags.mode));
        let attachments: Vec<Attachment> = match place {
            Some(namespace) => namespace
                .run(|| interfaces.iter().map(|name| attach(&(*name).into())).collect::<xdpkit::Result<_>>())?,
            None => flags.interfaces.iter().map(attach).collect::<xdpkit::Result<_>>()?,
        };
        for attachment in &attachments {
            let interface = attachment.interface().name();
            let mode = attachment.mode().map_or_else(String::new, |mode| mode.to_string());
            let fallback = attachment.fallback().map(ToString::to_string);
            let mut line = json!({"event": "ready", "interface": interface, "mode": mode});
            if let Some(why) = &fallback {
                line["fallback"] = json!(why);
            }
            output.line(&line, || match &fallback {
                Some(why) => format!("attached to {interface} in {mode} mode: {why}"),
                None => format!("attached to {interface} in {mode} mode"),
            });
        }
        // A laboratory takes its interfaces away when its scenario is over.
        let watched = attachments.iter().filter(|_| place.is_none());
        let watches = watched.map(Attachment::watch).collect::<xdpkit::Result<_>>()?;
        Ok(Self { flags, stage, attachments, watches, stop, output })
    }

    /// What ends [`Session::run`] when it is set.
    pub(crate) fn stop(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.stop)
    }

    /// Calls `tick` again and again until it is time to stop, detaches, and then until it has nothing left to do.
    /// `extra` adds to the statistics. Fails when an interface is lost.
    pub(crate) fn run(
        mut self,
        mut tick: impl FnMut(Output) -> Result<bool, Failure>,
        extra: impl Fn() -> xdpkit::Result<Value>,
    ) -> Result<(), Failure> {
        let start = Instant::now();
        let mut next_stats = self.flags.stats_every.map(|every| start + every);
        while !self.stop.load(Ordering::Relaxed) && self.flags.duration.is_none_or(|length| start.elapsed() < length) {
            tick(self.output)?;
            for (watch, attachment) in self.watches.iter_mut().zip(&self.attachments) {
                if let Some(loss) = watch.wait(Duration::ZERO)? {
                    let interface = attachment.interface().name().to_owned();
                    let line = json!({"event": "detached", "interface": interface});
                    self.output.line(&line, || format!("{interface} is lost"));
                    self.print_stats(&extra()?)?;
                    return Err(format!("interface `{interface}`: {}", reason(&loss)).into());
                }
            }
            if let (Some(at), Some(every)) = (next_stats, self.flags.stats_every)
                && Instant::now() >= at
            {
                self.print_stats(&extra()?)?;
                next_stats = Some(at + every);
            }
        }
        let redirect_failed = self.redirect_failed()?;
        for attachment in self.attachments {
            attachment.detach()?;
        }
        while tick(self.output)? {}
        print_stats(self.output, &self.stage.stats()?, redirect_failed, &extra()?);
        self.output.line(&json!({"event": "stopped"}), || "stopped".into());
        Ok(())
    }

    fn print_stats(&self, extra: &Value) -> xdpkit::Result<()> {
        print_stats(self.output, &self.stage.stats()?, self.redirect_failed()?, extra);
        Ok(())
    }

    /// Frames that were sent and lost on the way out, where the kernel tells.
    fn redirect_failed(&self) -> xdpkit::Result<Option<u64>> {
        self.attachments.iter().map(Attachment::redirect_failed).sum()
    }
}

fn reason(loss: &Loss) -> &'static str {
    match loss {
        Loss::Moved { .. } => "it has left for another network namespace, or another interface has its name now",
        Loss::Superseded { .. } => "another program runs in the place of ours",
        _ => "it is gone, or another program has detached ours from it",
    }
}

/// The counters of a stage as JSON, without the event's name.
pub(crate) fn stats_json(stats: &Stats) -> Value {
    let mut reasons = serde_json::Map::new();
    for line in &stats.reasons {
        let before = reasons.get(line.reason.name()).and_then(Value::as_u64).unwrap_or(0);
        reasons.insert(line.reason.name().into(), (before + line.count.packets).into());
    }
    json!({
        "packets": stats.total().packets,
        "bytes": stats.total().bytes,
        "passed": stats.passed().packets,
        "dropped": stats.dropped().packets,
        "reasons": reasons,
    })
}

fn print_stats(output: Output, stats: &Stats, redirect_failed: Option<u64>, extra: &Value) {
    let mut object = json!({"event": "stats"});
    if let (Some(object), Some(stats), Some(extra)) =
        (object.as_object_mut(), stats_json(stats).as_object(), extra.as_object())
    {
        object.extend(stats.clone());
        object.extend(redirect_failed.map(|count| ("redirect_failed".to_owned(), count.into())));
        object.extend(extra.clone());
    }
    output.line(&object, || {
        let lines = stats.reasons.iter().map(|line| {
            format!(
                "    {:<24} {:<8} {:>10} packets {:>14} bytes",
                line.reason, line.action, line.count.packets, line.count.bytes
            )
        });
        let head = format!(
            "{} packets: {} passed, {} dropped",
            stats.total().packets,
            stats.passed().packets,
            stats.dropped().packets
        );
        std::iter::once(head).chain(lines).collect::<Vec<_>>().join("\n")
    });
}
