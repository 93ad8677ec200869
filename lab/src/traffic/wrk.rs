//! What wrk, the HTTP load generator, reports.

use std::time::Duration;

/// The result of `wrk --latency`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Wrk {
    /// Answered requests.
    pub requests: u64,
    /// The same in a second.
    pub per_second: f64,
    /// From a request's first byte until its answer is complete, half of them; without the connection's handshake.
    pub p50: Duration,
    /// 99 of 100.
    pub p99: Duration,
    /// Connections, reads and writes that failed, requests without an answer in time or with one that is not 2xx or 3xx.
    pub errors: u64,
}

impl Wrk {
    /// Reads wrk's output; `None` when it is not complete.
    pub fn parse(output: &str) -> Option<Self> {
        let after = |label: &str| output.lines().find_map(|line| line.trim().strip_prefix(label)).map(str::trim);
        let percentile = |label: &str| after(label).and_then(duration);
        let (requests, _) = output.lines().find_map(|line| line.split_once(" requests in "))?;
        let sockets = after("Socket errors:").unwrap_or_default();
        let wrong = after("Non-2xx or 3xx responses:").unwrap_or_default();
        let numbers = sockets.split([' ', ',']).chain([wrong]).filter_map(|word| word.parse::<u64>().ok());
        Some(Self {
            requests: requests.trim().parse().ok()?,
            per_second: after("Requests/sec:")?.parse().ok()?,
            p50: percentile("50%")?,
            p99: percentile("99%")?,
            errors: numbers.sum(),
        })
    }
}

/// `250.00us`, `5.80ms`, `1.02s`, `1.00m`
fn duration(text: &str) -> Option<Duration> {
    let unit = text.find(|letter: char| letter.is_ascii_alphabetic())?;
    let (number, unit) = text.split_at(unit);
    let seconds = match unit {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "Running 2s test @ http://198.51.100.10:80/
  1 threads and 64 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   635.91us    0.89ms  12.92ms   93.69%
    Req/Sec    56.20k     8.07k   62.00k    86.54%
  Latency Distribution
     50%  250.00us
     75%  491.00us
     90%  700.00us
     99%    5.80ms
  22464 requests in 2.00s, 17.76MB read
Requests/sec:  11232.50
Transfer/sec:      8.88MB
";

    #[test]
    fn a_report_is_read() {
        let wanted = Wrk {
            requests: 22464,
            per_second: 11232.5,
            p50: Duration::from_micros(250),
            p99: Duration::from_micros(5800),
            errors: 0,
        };
        assert_eq!(Wrk::parse(OUTPUT), Some(wanted));
    }

    #[test]
    fn errors_of_all_kinds_are_added_up() {
        let errors =
            "  Socket errors: connect 1, read 20, write 300, timeout 4000\n  Non-2xx or 3xx responses: 50000\n";
        let output = OUTPUT.replace("Requests/sec:", &format!("{errors}Requests/sec:"));
        assert_eq!(Wrk::parse(&output).unwrap().errors, 54321);
    }

    #[test]
    fn what_is_cut_off_is_no_report() {
        assert_eq!(Wrk::parse("unable to connect to 198.51.100.10:80 Connection refused\n"), None);
        let lines: Vec<&str> = OUTPUT.lines().collect();
        for until in 0..lines.len() - 2 {
            assert_eq!(Wrk::parse(&lines[..until].join("\n")), None, "{until} lines");
        }
    }

    #[test]
    fn every_unit_is_known() {
        let all = [("1.50us", 1.5e-6), ("2.00ms", 2e-3), ("1.02s", 1.02), ("1.00m", 60.0), ("2.00h", 7200.0)];
        for (text, seconds) in all {
            assert_eq!(duration(text), Some(Duration::from_secs_f64(seconds)), "{text}");
        }
        assert_eq!([duration("5"), duration("ms"), duration("-1.00ms"), duration("5.00ks")], [None; 4]);
    }
}
