//! What iperf3, the bulk load generator, reports.

/// The result of `iperf3 --json` of a client that sent TCP.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Iperf3 {
    /// What the other end received.
    pub bytes: u64,
    /// The same in a second.
    pub bits_per_second: f64,
}

impl Iperf3 {
    /// Reads iperf3's output: of its JSON the one object that is of use.
    ///
    /// # Errors
    /// What it says went wrong, or that it says nothing of use.
    pub fn parse(output: &str) -> Result<Self, String> {
        if let Some(error) = field(output, "error") {
            return Err(format!("iperf3: {}", error.trim_matches('"')));
        }
        let read = || {
            let (_, rest) = output.split_once("\"sum_received\"")?;
            let (object, _) = rest.split_once('}')?;
            let (bytes, rate) = (field(object, "bytes")?, field(object, "bits_per_second")?);
            Some(Self { bytes: bytes.parse().ok()?, bits_per_second: rate.parse().ok()? })
        };
        read().ok_or_else(|| "iperf3's report has no sum_received".into())
    }
}

/// What stands behind a name, up to the end of the line, a comma or a brace.
fn field<'t>(json: &'t str, name: &str) -> Option<&'t str> {
    let (_, rest) = json.split_once(&format!("\"{name}\":"))?;
    let value = rest.trim_start();
    let end = match value.strip_prefix('"') {
        Some(text) => text.find('"')? + 2,
        None => value.find([',', '}', '\n']).unwrap_or(value.len()),
    };
    Some(value[..end].trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_read() {
        let report = r#"{
	"start":	{ "version":	"iperf 3.12" },
	"intervals":	[],
	"end":	{
		"sum_sent":	{
			"bytes":	2000,
			"bits_per_second":	16000.5
		},
		"sum_received":	{
			"seconds":	1.0,
			"bytes":	1000,
			"bits_per_second":	8000.25,
			"sender":	true
		},
		"cpu_utilization_percent":	{ "bytes":	3 }
	}
}"#;
        let wanted = Ok(Iperf3 { bytes: 1000, bits_per_second: 8000.25 });
        assert_eq!(Iperf3::parse(report), wanted);
        let compact: String = report.split_whitespace().collect();
        assert_eq!(Iperf3::parse(&compact), wanted);
    }

    #[test]
    fn what_went_wrong_is_told() {
        let refused = r#"{ "start": {}, "end": {}, "error":	"unable to connect: Connection refused, or so" }"#;
        assert_eq!(Iperf3::parse(refused), Err("iperf3: unable to connect: Connection refused, or so".into()));
        for incomplete in ["", r#"{"end": {}}"#, r#"{"sum_received": {"bytes": 5}}"#, r#"{"sum_received": {"bytes": 5"#]
        {
            assert!(Iperf3::parse(incomplete).unwrap_err().contains("sum_received"), "{incomplete}");
        }
    }
}
