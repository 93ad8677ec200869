//! Features of an interface by their names, as `ethtool -K` knows them.

use std::io;
use std::os::fd::BorrowedFd;

use super::socket::ethtool;

const GSTRINGS: u32 = 0x1b;
const GSSET_INFO: u32 = 0x37;
const SFEATURES: u32 = 0x3b;
/// `ETH_SS_FEATURES`.
const FEATURE_NAMES: u32 = 4;
const NAME: usize = 32;

/// Turns a feature on or off.
pub(crate) fn set_feature(socket: BorrowedFd<'_>, dev: &str, name: &str, on: bool) -> io::Result<()> {
    // Command, reserved, the mask of the sets that are asked for, and the length of each.
    let mut info = [GSSET_INFO, 0, 1 << FEATURE_NAMES, 0, 0];
    ethtool(socket, dev, &mut info)?;
    let count = info[4];
    let mut names = vec![0_u32; 3 + count as usize * NAME / 4];
    names[..3].copy_from_slice(&[GSTRINGS, FEATURE_NAMES, count]);
    ethtool(socket, dev, &mut names)?;
    let bytes: Vec<u8> = names[3..].iter().flat_map(|word| word.to_ne_bytes()).collect();
    let is_it = |entry: &[u8]| entry.starts_with(name.as_bytes()) && entry.get(name.len()) == Some(&0);
    let bit = bytes.chunks(NAME).position(is_it);
    let bit = bit.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no feature {name}")))?;
    // Command, number of blocks, and of each block: which bits are meant, and what they are to be.
    let blocks = count.div_ceil(32);
    let mut set = vec![0; 2 + 2 * blocks as usize];
    set[..2].copy_from_slice(&[SFEATURES, blocks]);
    let at = 2 + 2 * (bit / 32);
    set[at] = 1 << (bit % 32);
    set[at + 1] = u32::from(on) << (bit % 32);
    ethtool(socket, dev, &mut set)
}
