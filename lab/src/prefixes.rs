//! Prefixes as they are announced on the Internet, for tests and benchmarks of big tables.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use flate2::read::GzDecoder;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::bench::Random;
use crate::error::{Context, Result};

/// How many prefixes are made up where no list is at hand: as many as the Internet has.
const MADE_UP: [usize; 2] = [900_000, 160_000];

/// Prefixes of both families, host bits clear, each once, in a random but always the same order.
#[derive(Debug)]
pub struct Prefixes {
    /// IPv4.
    pub v4: Vec<Ipv4Net>,
    /// IPv6.
    pub v6: Vec<Ipv6Net>,
    /// Where they come from: the name of a file, or that they are made up.
    pub origin: String,
}

impl Prefixes {
    /// Reads the list that `XDPKIT_PREFIXES` names, one prefix a line, plain or gzipped; else the one that lies beside the
    /// checkout; else makes one up.
    pub fn read() -> Result<Self> {
        let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/data/bgp-prefixes.txt.gz");
        let named = std::env::var_os("XDPKIT_PREFIXES").map(PathBuf::from);
        let Some(path) = named.or_else(|| beside.exists().then_some(beside)) else {
            return Ok(Self::made_up());
        };
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        let mut read = || {
            for line in lines(&path)? {
                let line = line?;
                match line.parse::<IpNet>().map_err(|error| io::Error::other(format!("`{line}`: {error}")))?.trunc() {
                    IpNet::V4(net) => v4.push(net),
                    IpNet::V6(net) => v6.push(net),
                }
            }
            Ok(())
        };
        read().context(|| format!("read the prefixes of {}", path.display()))?;
        let origin = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self::of(v4, v6, origin))
    }

    /// What tests take: with `./x test --full` and `--long` as [`Prefixes::read`], else made up, so that a short run finds
    /// the same everywhere, whatever lies beside the checkout.
    pub fn for_tests() -> Result<Self> {
        if std::env::var_os("XDPKIT_FULL").is_some() { Self::read() } else { Ok(Self::made_up()) }
    }

    fn made_up() -> Self {
        let mut random = Random::new(11);
        let v4 = (0..MADE_UP[0]).map(|_| net4(random.ipv4(), 24 - random.below(5) as u8)).collect();
        let v6 = (0..MADE_UP[1]).map(|_| net6(random.ipv6(), 48 - random.below(17) as u8)).collect();
        Self::of(v4, v6, "made up".into())
    }

    fn of(mut v4: Vec<Ipv4Net>, mut v6: Vec<Ipv6Net>, origin: String) -> Self {
        let mut random = Random::new(12);
        v4.sort_unstable();
        v4.dedup();
        random.shuffle(&mut v4);
        v6.sort_unstable();
        v6.dedup();
        random.shuffle(&mut v6);
        Self { v4, v6, origin }
    }

    /// Both families, one after the other.
    pub fn all(&self) -> impl Iterator<Item = IpNet> {
        let v4 = self.v4.iter().copied().map(IpNet::from);
        v4.chain(self.v6.iter().copied().map(IpNet::from))
    }
}

/// The lines of a file, plain or gzipped.
fn lines(path: &Path) -> io::Result<Box<dyn Iterator<Item = io::Result<String>>>> {
    let mut file = BufReader::new(File::open(path)?);
    Ok(match file.fill_buf()?.starts_with(&[0x1f, 0x8b]) {
        true => Box::new(BufReader::new(GzDecoder::new(file)).lines()),
        false => Box::new(file.lines()),
    })
}

fn net4(address: Ipv4Addr, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(address, length).trunc()
}

fn net6(address: Ipv6Addr, length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(address, length).trunc()
}

/// A random address inside a prefix.
pub fn inside(prefix: IpNet, random: &mut Random) -> IpAddr {
    let bits = u128::from(random.bits()) << 64 | u128::from(random.bits());
    match prefix {
        IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) | bits as u32 & u32::from(net.hostmask())).into(),
        IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()) | bits & u128::from(net.hostmask())).into(),
    }
}

/// An address that begins like a prefix, whether inside or not: a look-up has to go on behind the first bits.
pub fn near(prefix: IpNet, random: &mut Random) -> IpAddr {
    let bits = u128::from(random.bits()) << 64 | u128::from(random.bits());
    match prefix {
        IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) & 0xff00_0000 | bits as u32 >> 8).into(),
        IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()) >> 100 << 100 | bits >> 28).into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_are_canonical_and_there_once() {
        let prefixes = Prefixes::made_up();
        let mut sorted: Vec<IpNet> = prefixes.all().collect();
        assert!(!sorted.is_sorted());
        sorted.sort_unstable();
        assert!(sorted.windows(2).all(|pair| pair[0] < pair[1]) && sorted.iter().all(|net| *net == net.trunc()));
        assert!(prefixes.v4.len() > 700_000 && prefixes.v6.len() > 150_000);
    }

    #[test]
    fn addresses_are_inside() {
        let mut random = Random::new(1);
        for text in ["10.1.0.0/16", "0.0.0.0/0", "192.0.2.7/32", "2001:db8::/32", "::/0", "::1/128"] {
            let net: IpNet = text.parse().unwrap();
            assert!((0..100).all(|_| net.contains(&inside(net, &mut random))), "{text}");
        }
    }
}
