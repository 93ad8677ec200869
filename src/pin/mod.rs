//! Where things are pinned, so that they survive the process.
//!
//! ```text
//! DIR/stages/NAME/abi                       fingerprint of the layouts, and the kind of stage
//! DIR/stages/NAME/MAP                       the tables of a value
//! DIR/stages/NAME/owner                     which process may change them, see `base/owner.rs`
//! DIR/stages/NAME+                          larger tables, or those whose place they have taken, see `place.rs`
//! DIR/interfaces/IFINDEX/link               the attachment
//! DIR/interfaces/IFINDEX/ID-NAME/program    an instance in the chain of that interface, by program id
//! DIR/interfaces/IFINDEX/ID-NAME/next       its slot: who comes next
//! DIR/interfaces/IFINDEX/ID-NAME/own_macs   the MAC addresses of its host there
//! DIR/interfaces/IFINDEX/last/ID            the caller's own program at the end, by program id
//! ```
//!
//! The order of a chain is written nowhere: the slots are the order, so that it is true at every moment, also
//! after a crash in the middle of an edit. Instances that no packet can reach are swept when the chain is next
//! taken over.

mod interface;
mod place;

use std::{
    fs,
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

pub(crate) use interface::InterfacePins;
pub(crate) use place::{make_ready, put_in_place};

use crate::{
    Error, Result,
    base::{
        STAGES,
        directory::{check_directory, failure, lock, names_in, remove_directory},
        pinned_stages,
    },
    sys::program::Program,
};

const INTERFACES: &str = "interfaces";
const LINK: &str = "link";
const LAST: &str = "last";
const PROGRAM: &str = "program";
const NEXT: &str = "next";

/// Removes everything that this crate pinned below a directory, and with it every attachment that no process
/// holds. What else lies in the directory stays.
///
/// # Errors
/// [`Error::Pin`] naming what could not be removed, [`Error::PinsLocked`]; [`Error::NotBpfFs`] when the directory is
/// an ordinary one, which is left alone; [`Error::PinsExposed`].
pub fn remove_pins(directory: impl AsRef<Path>) -> Result<()> {
    let directory = directory.as_ref();
    check_directory(directory, &[INTERFACES])?;
    check_directory(directory, &[STAGES])?;
    if !directory.exists() {
        return Ok(());
    }
    let _lock = lock(directory)?;
    // Links first: a program must not go on without its tables' names.
    remove_directory(&directory.join(INTERFACES))?;
    remove_directory(&directory.join(STAGES))
}

/// Opens an XDP program that is pinned, such as one of the caller's own for [`Pipeline::set_last`](crate::Pipeline::set_last).
///
/// # Errors
/// [`Error::PinMissing`]; [`Error::PinMismatch`] when something else is pinned there; [`Error::IncompatibleProgram`] for
/// a program of another type; [`Error::Pin`].
pub fn open_program(path: impl AsRef<Path>) -> Result<OwnedFd> {
    let path = path.as_ref();
    let program = Program::open_pinned(path)?.ok_or_else(|| Error::PinMissing { path: path.to_owned() })?;
    program.as_fd().try_clone_to_owned().map_err(failure(path, "open it"))
}

/// Pins made on the way to something: taken away again, unless it came about.
#[derive(Debug, Default)]
pub(crate) struct Undo(Vec<PathBuf>);

impl Undo {
    pub(crate) fn add(&mut self, path: PathBuf) {
        self.0.push(path);
    }

    pub(crate) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        for path in self.0.drain(..).rev() {
            // There is an error to report already, and what stays is swept by the next take-over.
            let _ = fs::remove_file(&path).or_else(|_| fs::remove_dir_all(&path));
        }
    }
}

/// What stands in a directory of pins.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pinned {
    /// Each stage's name and kind (`firewall`, `monitor`, ...), sorted by name.
    pub stages: Vec<(String, String)>,
    /// Each interface's index, with the names of the stages that its packets meet, in order.
    pub interfaces: Vec<(u32, Vec<String>)>,
}

/// Tells what is pinned in a directory: what a new process can adopt.
///
/// # Errors
/// [`Error::Pin`] or [`Error::PinMismatch`] naming the pin that could not be read; [`Error::NotBpfFs`] where nothing can be
/// pinned at all; [`Error::PinsExposed`]. A directory that is missing from a BPF file system holds nothing.
pub fn pinned(directory: impl AsRef<Path>) -> Result<Pinned> {
    let directory = directory.as_ref();
    check_directory(directory, &[INTERFACES])?;
    let mut pinned = Pinned { stages: pinned_stages(directory)?, interfaces: Vec::new() };
    for name in names_in(&directory.join(INTERFACES))? {
        let Ok(index) = name.parse() else { continue };
        check_directory(directory, &[INTERFACES, &name])?;
        let pins = InterfacePins::of(directory, &name);
        if let Some(link) = pins.link()? {
            let info = link.info().map_err(failure(&pins.path().join(LINK), "read it"))?;
            pinned.interfaces.push((index, pins.chain(info.program)?.stages));
        }
    }
    pinned.stages.sort_unstable();
    pinned.interfaces.sort_unstable();
    Ok(pinned)
}
