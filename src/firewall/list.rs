//! Lists of CIDRs in text files.

use std::{fs, net::IpAddr, path::Path};

use ipnet::IpNet;

use crate::{Error, Result, address::Unmapped as _};

/// How far something long has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// What is done, of `total`: rules of a list, or bytes of a file.
    pub done: u64,
    /// All there is.
    pub total: u64,
}

/// Lines and rules between two calls of a progress callback.
pub(super) const PROGRESS_STEP: usize = 4096;

/// Reads a list of prefixes: one address or CIDR a line, IPv4 and IPv6 mixed; `#` and `;` start a comment, blank
/// lines are passed over. Host bits are cleared, and prefixes of IPv4 addresses mapped into IPv6 are the IPv4 prefixes: beware
/// of `::ffff:0:0/96` in lists of IPv6 addresses that nobody may use, it is `0.0.0.0/0`. The order is kept, and so are
/// duplicates.
///
/// # Errors
/// [`Error::ListFile`] naming the file, and the line and its text where one is wrong.
pub fn read_prefix_list(path: impl AsRef<Path>) -> Result<Vec<IpNet>> {
    read_prefix_list_with_progress(path, |_| ())
}

/// As [`read_prefix_list`], telling every 4,096 lines, and at the end, how many of the file's bytes have been read.
///
/// # Errors
/// As [`read_prefix_list`].
pub fn read_prefix_list_with_progress(
    path: impl AsRef<Path>,
    mut progress: impl FnMut(Progress),
) -> Result<Vec<IpNet>> {
    let path = path.as_ref();
    let fail = |line, text: &str, problem: String| Error::ListFile {
        path: path.to_owned(),
        line,
        text: text.to_owned(),
        problem,
    };
    let text = fs::read_to_string(path).map_err(|error| fail(0, "", format!("cannot read it: {error}")))?;
    let (mut done, total) = (0, text.len() as u64);
    let mut prefixes = Vec::new();
    for (at, line) in text.split_inclusive('\n').enumerate() {
        if at > 0 && at % PROGRESS_STEP == 0 {
            progress(Progress { done, total });
        }
        done += line.len() as u64;
        let entry = line.split(['#', ';']).next().unwrap_or_default().trim();
        if entry.is_empty() {
            continue;
        }
        match parse_prefix(entry) {
            Some(prefix) => prefixes.push(prefix),
            None => return Err(fail(at + 1, line.trim(), "expected an address or CIDR".into())),
        }
    }
    progress(Progress { done, total });
    Ok(prefixes)
}

/// An address or CIDR with its host bits cleared; `None` when it is neither. What is mapped into IPv6 (`::ffff:192.0.2.7`,
/// `::ffff:192.0.2.0/120`) is IPv4.
#[must_use]
pub fn parse_prefix(text: &str) -> Option<IpNet> {
    let prefix = match text.parse::<IpNet>() {
        Ok(prefix) => prefix,
        Err(_) => text.parse::<IpAddr>().ok()?.into(),
    };
    Some(prefix.unmapped())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_take_comments_addresses_and_both_families() {
        let path = std::env::temp_dir().join(format!("xdpkit-list-{}", std::process::id()));
        fs::write(&path, "# bad\n10.9.9.9/8 # all of it\n\n 192.0.2.7\n2001:db8::1/32;x\n::1\n::ffff:c000:207\n")
            .unwrap();
        let read: Vec<String> = read_prefix_list(&path).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(read, ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32", "::1/128", "192.0.2.7/32"]);
        let long = "10.0.0.0/8\r\n".repeat(10_000);
        fs::write(&path, &long).unwrap();
        let mut told = Vec::new();
        let read =
            read_prefix_list_with_progress(&path, |progress| told.push((progress.done, progress.total))).unwrap();
        assert_eq!(read.len(), 10_000);
        assert_eq!(told, [4096, 8192, 10_000].map(|lines| (lines * 12, 120_000)));
        fs::write(&path, "10.0.0.0/8\n10.0.0.0/33\n").unwrap();
        let error = read_prefix_list(&path).unwrap_err().to_string();
        assert_eq!(error, format!("{}: line 2: `10.0.0.0/33`: expected an address or CIDR", path.display()));
        fs::remove_file(&path).unwrap();
        let error = read_prefix_list(&path).unwrap_err().to_string();
        assert!(error.contains("cannot read it: No such file"), "{error}");
    }
}
