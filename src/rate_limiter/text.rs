//! Limits, tiers and policies as text, for files and command lines; and with feature `serde`, in configurations.

use std::{fmt, str::FromStr};

#[cfg(feature = "serde")]
use super::Scope;
use super::{Limit, Rate, TableFull, Tier};
use crate::{Error, Result, text::serde_as_text};

fn invalid(what: &'static str, text: &str, expected: &'static str) -> Error {
    Error::Invalid { what, value: text.to_owned(), expected }
}

/// `RATE [packets]`, `RATE bytes`, or both with `and` between, such as `100/s and 1000000/s bytes`.
impl FromStr for Limit {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        const EXPECTED: &str = "N/UNIT[:BURST] [packets], N/UNIT[:BURST] bytes, or both with `and` between";
        let (mut packets, mut bytes) = (None, None);
        for part in text.split(" and ") {
            let mut words = part.split_whitespace();
            let rate: Rate = words.next().unwrap_or_default().parse()?;
            let meter = match words.next() {
                None | Some("packets") => &mut packets,
                Some("bytes") => &mut bytes,
                Some(_) => return Err(invalid("limit", text, EXPECTED)),
            };
            if meter.replace(rate).is_some() || words.next().is_some() {
                return Err(invalid("limit", text, EXPECTED));
            }
        }
        Ok(match (packets, bytes) {
            (Some(packets), Some(bytes)) => Self::packets(packets).and_bytes(bytes),
            (Some(packets), None) => Self::packets(packets),
            (None, Some(bytes)) => Self::bytes(bytes),
            (None, None) => return Err(invalid("limit", text, EXPECTED)),
        })
    }
}

/// `exempt`, `blocked` or a [`Limit`].
impl FromStr for Tier {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "exempt" => Ok(Self::Exempt),
            "blocked" => Ok(Self::Blocked),
            _ => text.parse().map(Self::Limited),
        }
    }
}

/// `drop`, `pass` or `share RATE`.
impl FromStr for TableFull {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(' ') {
            None if text == "drop" => Ok(Self::Drop),
            None if text == "pass" => Ok(Self::Pass),
            Some(("share", rate)) => rate.trim().parse().map(Self::Share),
            _ => Err(invalid("policy of a full table", text, "drop, pass or share N/UNIT[:BURST]")),
        }
    }
}

impl fmt::Display for TableFull {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Drop => f.write_str("drop"),
            Self::Pass => f.write_str("pass"),
            Self::Share(rate) => write!(f, "share {rate}"),
        }
    }
}

serde_as_text!(Rate, "`N/UNIT[:BURST]`");
serde_as_text!(Scope, "a scope such as `tcp-syn`");
serde_as_text!(Limit, "a limit such as `100/s`");
serde_as_text!(Tier, "`exempt`, `blocked` or a limit such as `100/s`");
serde_as_text!(TableFull, "`drop`, `pass` or `share N/UNIT[:BURST]`");

/// Limits by scope as a map.
#[cfg(feature = "serde")]
pub(super) mod limits {
    use std::fmt;

    use serde::{Deserializer, Serializer, de};

    use super::{Limit, Scope};

    pub(in crate::rate_limiter) fn serialize<S: Serializer>(
        limits: &[(Scope, Limit)],
        serializer: S,
    ) -> Result<S::Ok, S::Error> {
        serializer.collect_map(limits.iter().map(|(scope, limit)| (scope, limit)))
    }

    pub(in crate::rate_limiter) fn deserialize<'de, D: Deserializer<'de>>(
        deserializer: D,
    ) -> Result<Vec<(Scope, Limit)>, D::Error> {
        struct Map;

        impl<'de> de::Visitor<'de> for Map {
            type Value = Vec<(Scope, Limit)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("limits by scope")
            }

            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut limits = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    limits.push(entry);
                }
                Ok(limits)
            }
        }

        deserializer.deserialize_map(Map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_round_trip_and_mistakes_are_named() {
        for text in ["100/s packets", "5/m:3 packets and 1000000/s bytes", "9000/s bytes"] {
            assert_eq!(text.parse::<Limit>().unwrap().to_string(), text);
            assert_eq!(text.parse::<Tier>().unwrap().to_string(), text);
        }
        assert_eq!("100/s".parse::<Limit>().unwrap(), Limit::packets(Rate::per_second(100)));
        for text in ["exempt", "blocked"] {
            assert_eq!(text.parse::<Tier>().unwrap().to_string(), text);
        }
        for text in ["drop", "pass", "share 10/s:2"] {
            assert_eq!(text.parse::<TableFull>().unwrap().to_string(), text);
        }
        for (text, problem) in [
            ("", "rate ``: expected N/UNIT[:BURST]"),
            ("100/s frames", "limit `100/s frames`: expected N/UNIT[:BURST] [packets]"),
            ("100/s and 5/s", "limit `100/s and 5/s`: expected"),
            ("100/s packets each", "limit `100/s packets each`: expected"),
        ] {
            let error = text.parse::<Limit>().unwrap_err().to_string();
            assert!(error.starts_with(problem), "{error}");
        }
        let error = "share".parse::<TableFull>().unwrap_err().to_string();
        assert_eq!(error, "policy of a full table `share`: expected drop, pass or share N/UNIT[:BURST]");
    }
}
