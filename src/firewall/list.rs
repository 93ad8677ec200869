//! Lists of CIDRs in text files.

use std::{fs, net::IpAddr, path::Path};

use ipnet::IpNet;

use crate::{Error, Result};

/// Reads a list of prefixes: one address or CIDR a line, IPv4 and IPv6 mixed; `#` and `;` start a comment, blank
/// lines are passed over. Host bits are cleared. The order is kept, and so are duplicates.
///
/// # Errors
/// [`Error::ListFile`] naming the file, and the line and its text where one is wrong.
pub fn read_prefix_list(path: impl AsRef<Path>) -> Result<Vec<IpNet>> {
    let path = path.as_ref();
    let fail = |line, text: &str, problem: String| Error::ListFile {
        path: path.to_owned(),
        line,
        text: text.to_owned(),
        problem,
    };
    let text = fs::read_to_string(path).map_err(|error| fail(0, "", format!("cannot read it: {error}")))?;
    let mut prefixes = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let entry = line.split(['#', ';']).next().unwrap_or_default().trim();
        if entry.is_empty() {
            continue;
        }
        match parse_prefix(entry) {
            Some(prefix) => prefixes.push(prefix),
            None => return Err(fail(at + 1, line.trim(), "expected an address or CIDR".into())),
        }
    }
    Ok(prefixes)
}

/// An address or CIDR with its host bits cleared; `None` when it is neither.
#[must_use]
pub fn parse_prefix(text: &str) -> Option<IpNet> {
    let prefix = match text.parse::<IpNet>() {
        Ok(prefix) => prefix,
        Err(_) => text.parse::<IpAddr>().ok()?.into(),
    };
    Some(prefix.trunc())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_take_comments_addresses_and_both_families() {
        let path = std::env::temp_dir().join(format!("xdpkit-list-{}", std::process::id()));
        fs::write(&path, "# bad\n10.9.9.9/8 # all of it\n\n 192.0.2.7\n2001:db8::1/32;x\n::1\n").unwrap();
        let read: Vec<String> = read_prefix_list(&path).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(read, ["10.0.0.0/8", "192.0.2.7/32", "2001:db8::/32", "::1/128"]);
        fs::write(&path, "10.0.0.0/8\n10.0.0.0/33\n").unwrap();
        let error = read_prefix_list(&path).unwrap_err().to_string();
        assert_eq!(error, format!("{}: line 2: `10.0.0.0/33`: expected an address or CIDR", path.display()));
        fs::remove_file(&path).unwrap();
        let error = read_prefix_list(&path).unwrap_err().to_string();
        assert!(error.contains("cannot read it: No such file"), "{error}");
    }
}
