//! A BPF file system of one's own, for pins that vanish with the process.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Context, Result};
use crate::sys;

/// Where fallback mounts are made, one directory each: `xdpkit-lab-bpffs-PID-NUMBER`.
const PREFIX: &str = "xdpkit-lab-bpffs-";

/// A private bpffs. It ends, with every pin in it, when this value is dropped or the process dies,
/// however it dies; the death of a child that pinned there changes nothing.
///
/// Normally it is mounted nowhere and its path leads through this process's descriptors, so other
/// processes can use it but must not canonicalise it: the link's text is `/`. Where the kernel
/// refuses that, it is a mount on a temporary directory, removed by the next use after a `kill -9`.
#[derive(Debug)]
pub struct BpfFs {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Detached { _mount: OwnedFd },
    Mounted,
}

/// Pins an array map of one value of `value_size` zero bytes at `path`, which must lie in a bpffs:
/// something that does not fit, for tests.
pub fn pin_array(path: &Path, value_size: u32) -> Result<()> {
    let about = || format!("pin an array at {}", path.display());
    let name = CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other).context(about)?;
    let map = sys::bpf::create_array_of_one(value_size).context(about)?;
    sys::bpf::pin(&name, map.as_fd()).context(about)
}

impl BpfFs {
    /// Creates a bpffs without pins and checks that objects can be pinned in it.
    pub fn new() -> Result<Self> {
        Self::detached().or_else(|_| Self::mounted())
    }

    /// Its root directory. Some kernels put `maps.debug` and `progs.debug` there, which cannot be
    /// removed; no other name in a bpffs may contain a dot.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn detached() -> Result<Self> {
        let mount = sys::mount::detached_bpffs().context(|| "create a detached bpffs".into())?;
        let path = format!("/proc/{}/fd/{}", process::id(), mount.as_raw_fd()).into();
        let new = Self { path, kind: Kind::Detached { _mount: mount } };
        new.probe().context(|| "pin in a detached bpffs".into())?;
        Ok(new)
    }

    fn mounted() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        sweep();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("{PREFIX}{}-{number}", process::id()));
        let about = || format!("mount a bpffs on {}", path.display());
        fs::create_dir(&path).context(about)?;
        if let Err(error) = c_path(&path).and_then(|path| sys::mount::mount_bpffs(&path)) {
            let _ = fs::remove_dir(&path);
            return Err(error).context(about);
        }
        let new = Self { path, kind: Kind::Mounted };
        new.probe().context(|| format!("pin in {}", new.path.display()))?;
        Ok(new)
    }

    /// Pins a map, to see whether that works, and removes it. The root is for everybody to write in when it is new; pins are
    /// not accepted there.
    fn probe(&self) -> io::Result<()> {
        fs::set_permissions(&self.path, fs::Permissions::from_mode(0o700))?;
        let path = self.path.join("probe");
        sys::bpf::pin(&c_path(&path)?, sys::bpf::create_array_of_one(4)?.as_fd())?;
        fs::remove_file(&path)
    }
}

impl Drop for BpfFs {
    fn drop(&mut self) {
        if let Kind::Mounted = self.kind {
            remove(&self.path);
        }
    }
}

/// Removes the mounts of processes that no longer exist.
fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok());
        if owner.is_some_and(|pid: i32| !sys::process_exists(pid)) {
            remove(&entry.path());
        }
    }
}

/// Best effort: what fails here is tried again by the next sweep.
fn remove(path: &Path) {
    if let Ok(path) = c_path(path) {
        let _ = sys::mount::unmount(&path);
    }
    let _ = fs::remove_dir(path);
}

fn c_path(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_detached_bpffs_takes_pins() {
        BpfFs::detached().unwrap();
    }

    #[test]
    fn the_fallback_mount_is_gone_after_drop_and_swept_after_its_owner_died() {
        let mounted = BpfFs::mounted().unwrap();
        let path = mounted.path().to_owned();
        drop(mounted);
        assert!(!path.exists());

        let mut child = process::Command::new("true").spawn().unwrap();
        let dead = std::env::temp_dir().join(format!("{PREFIX}{}-0", child.id()));
        child.wait().unwrap();
        fs::create_dir(&dead).unwrap();
        sys::mount::mount_bpffs(&c_path(&dead).unwrap()).unwrap();
        sweep();
        assert!(!dead.exists());
    }
}
