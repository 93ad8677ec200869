//! Frames that were lost after a program had sent them, as the kernel's tracepoints tell: one set of programs for the process.

use std::{
    fs, io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd as _, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    sync::OnceLock,
};

use libbpf_rs::{
    MapHandle,
    skel::{OpenSkel as _, SkelBuilder as _},
};

use super::{
    io_error,
    map::{Map, TypedMap},
    print, skel,
};
use crate::Result;

#[derive(Debug)]
struct Tracepoints {
    lost: Map,
    /// As long as they are open, the programs run.
    _links: Vec<OwnedFd>,
}

/// An interface whose lost frames are counted from when this was made.
#[derive(Debug)]
pub(crate) struct Lost {
    /// Its index, and the inode of its network namespace above it.
    key: u64,
    before: u64,
}

impl Tracepoints {
    fn open() -> io::Result<Self> {
        let mut storage = MaybeUninit::uninit();
        let (opened, _said) =
            print::capture(|| skel::redirects::RedirectsSkelBuilder::default().open(&mut storage)?.load());
        let skeleton = opened.map_err(|error| io_error(&error))?;
        let programs = [
            (&skeleton.progs.redirect_err, "xdp_redirect_err"),
            (&skeleton.progs.devmap_xmit, "xdp_devmap_xmit"),
            (&skeleton.progs.bulk_tx, "xdp_bulk_tx"),
        ];
        let attach = |(program, name): &(&libbpf_rs::ProgramMut<'_>, &str)| {
            let link = program.attach_raw_tracepoint(name).map_err(|error| io_error(&error))?;
            link.as_fd().try_clone_to_owned()
        };
        let (links, _said) = print::capture(|| programs.iter().map(attach).collect::<io::Result<_>>());
        let lost = MapHandle::try_from(&skeleton.maps.lost).map_err(|error| io_error(&error))?;
        Ok(Self { lost: Map::new(lost, "lost"), _links: links? })
    }

    /// `None` where this process may not look (raw tracepoints need `CAP_PERFMON` and the kernel's BTF).
    fn get() -> Option<&'static Self> {
        static TRACEPOINTS: OnceLock<Option<Tracepoints>> = OnceLock::new();
        TRACEPOINTS.get_or_init(|| Self::open().ok()).as_ref()
    }

    fn counts(&self) -> TypedMap<'_, u64, u64> {
        TypedMap::new(&self.lost)
    }
}

impl Lost {
    /// Of an interface of the calling thread's network namespace; `None` where the kernel does not tell this process.
    pub(crate) fn of(interface: u32) -> Option<Self> {
        let key = fs::metadata("/proc/thread-self/ns/net").ok()?.ino() << 32 | u64::from(interface);
        let counts = Tracepoints::get()?.counts();
        let before = match counts.get(&key).ok()? {
            Some(before) => before,
            None => {
                counts.set(&key, &0).ok()?;
                0
            }
        };
        Some(Self { key, before })
    }

    /// How many there were.
    pub(crate) fn count(&self) -> Result<u64> {
        let tracepoints = Tracepoints::get().expect("it has counted this before");
        let now = tracepoints.counts().get(&self.key)?.unwrap_or(self.before);
        Ok(now.saturating_sub(self.before))
    }
}
