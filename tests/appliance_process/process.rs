//! The appliance as a process: its file, and what it says.
#![allow(dead_code, reason = "not every test uses everything")]

use std::{
    collections::VecDeque,
    fs,
    io::{BufRead as _, BufReader, Lines, Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpStream},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use serde_json::Value;
use xdpkit_lab::{Namespace, topology::Pair, traffic::ping};

/// A directory for the appliance's file.
pub(crate) struct Place(pub(crate) PathBuf);

impl Place {
    pub(crate) fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("xdpkit-appliance-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub(crate) fn file(&self) -> PathBuf {
        self.0.join("appliance.toml")
    }

    pub(crate) fn write(&self, text: &str) {
        fs::write(self.file(), text).unwrap();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

pub(crate) fn example() -> PathBuf {
    let path = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().join("examples/appliance");
    assert!(
        path.exists(),
        "{}: build the examples first (cargo test --features serde,health,pcapng does)",
        path.display()
    );
    path
}

/// Whether an address of the pair's server answers a ping of its client.
pub(crate) fn answers(lab: &Pair, to: IpAddr) -> bool {
    ping(&lab.client, to, 1, Duration::ZERO, Duration::from_secs(1)).unwrap().received == 1
}

/// The metrics, as they are scraped.
pub(crate) fn scrape(place: &Namespace, address: &str) -> String {
    let address: SocketAddr = address.parse().unwrap();
    place.run(|| {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(answer.contains("Content-Type: application/openmetrics-text; version=1.0.0"), "{answer}");
        answer.split_once("\r\n\r\n").unwrap().1.to_owned()
    })
}

/// A running appliance, and what it says.
pub(crate) struct Running {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
    /// What was said before it was waited for.
    early: VecDeque<Value>,
}

impl Running {
    pub(crate) fn start(place: &Namespace, file: &Path, more: &[&str]) -> Self {
        let mut command = place.command(example());
        command.arg("--config").arg(file).arg("--json").args(more).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines, early: VecDeque::new() }
    }

    /// The next event, which must be of this kind. Checks of health begin before it is ready: what they find out meanwhile is
    /// still to be expected afterwards.
    pub(crate) fn expect(&mut self, event: &str) -> Value {
        if event == "ready" {
            return self.expect_ready();
        }
        let object = self.early.pop_front().unwrap_or_else(|| self.said());
        assert_eq!(object["event"], event, "{object}");
        object
    }

    /// What it says next, warnings about the test's hosts left out.
    fn said(&mut self) -> Value {
        loop {
            let line = self.lines.next().expect("it goes on").unwrap();
            let object: Value = serde_json::from_str(&line).unwrap();
            if object["event"] != "warning" {
                return object;
            }
        }
    }

    fn expect_ready(&mut self) -> Value {
        loop {
            let object = self.said();
            match object["event"].as_str() {
                Some("ready") => return object,
                Some("health") => self.early.push_back(object),
                _ => panic!("{object}"),
            }
        }
    }

    /// Waits until the second of two interfaces is ready, and answers what was said of the first.
    pub(crate) fn expect_both_ready(&mut self) -> Value {
        let first = self.expect("ready");
        self.expect("ready");
        first
    }

    /// Everything up to the next event of this kind, which comes last.
    pub(crate) fn until(&mut self, event: &str) -> Vec<Value> {
        let mut said = Vec::new();
        while said.last().is_none_or(|object: &Value| object["event"] != event) {
            let line = self.lines.next().unwrap_or_else(|| panic!("it ends before {event}: {said:?}")).unwrap();
            said.push(serde_json::from_str(&line).unwrap());
        }
        said
    }

    /// The next event of this kind, whatever comes before it.
    pub(crate) fn await_event(&mut self, event: &str) -> Value {
        self.until(event).pop().expect("it comes last")
    }

    pub(crate) fn signal(&self, name: &str) {
        // A bare system has no kill program, but every shell knows how.
        let line = format!("kill -{name} {}", self.child.id());
        assert!(Command::new("sh").args(["-c", &line]).status().unwrap().success());
    }

    /// The answer to a SIGHUP.
    pub(crate) fn reload(&mut self) -> Result<(), String> {
        self.reload_all(1)
    }

    /// The same where so many interfaces are ready afterwards.
    pub(crate) fn reload_all(&mut self, interfaces: usize) -> Result<(), String> {
        self.signal("HUP");
        let line: Value = serde_json::from_str(&self.lines.next().expect("it goes on").unwrap()).unwrap();
        match line["event"].as_str() {
            Some("reloaded") => {
                for _ in 0..interfaces {
                    self.expect("ready");
                }
                Ok(())
            }
            Some("reload_refused") => Err(line["error"].as_str().unwrap().to_owned()),
            _ => panic!("{line}"),
        }
    }

    /// A reload that goes well, with changes of health before and after it.
    pub(crate) fn reload_past_health(&mut self) {
        self.signal("HUP");
        for wanted in ["reloaded", "ready"] {
            while let line = self.lines.next().expect("it goes on").unwrap()
                && !line.contains(&format!("\"event\":\"{wanted}\""))
            {
                assert!(line.contains("\"event\":\"health\""), "{line}");
            }
        }
    }

    /// Ends it politely; answers the last statistics.
    pub(crate) fn stop(mut self) -> Value {
        self.signal("TERM");
        let stats = self.expect("stats");
        self.expect("stopped");
        assert!(self.lines.next().is_none());
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
        stats
    }

    /// What it says until it ends by itself, and its exit code.
    pub(crate) fn ended(&mut self) -> (Vec<String>, Option<i32>) {
        let said = self.lines.by_ref().map(Result::unwrap);
        let said = said.filter(|line| !line.contains("\"event\":\"warning\"")).collect();
        (said, self.child.wait().unwrap().code())
    }

    /// As `kill -9` does, wherever it is.
    pub(crate) fn kill(self) {
        drop(self);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Also when a test fails half-way: nothing stays behind.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A firewall that denies what `common::traffic::DENIED` sends, behind a monitor.
pub(crate) const FILE: &str = "
[interface.eth0]
chain = ['watch', 'edge']
[monitor.watch]
[firewall.edge]
settings.sample = 1
deny = ['10.0.0.66', 'fd00::66']
";
