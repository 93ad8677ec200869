//! A limit on the memory of a process, by a control group.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::error::{Context, Result};
use crate::sys;

/// A control group whose processes get no more than so many bytes, the kernel's for them included. Dropping it removes it,
/// once they have ended.
#[derive(Debug)]
pub struct MemoryLimit {
    group: PathBuf,
    _mount: Option<OwnedFd>,
}

impl MemoryLimit {
    /// Creates a group without processes.
    pub fn new(bytes: u64) -> Result<Self> {
        Self::create(bytes).context(|| "create a control group with a memory limit".into())
    }

    /// Moves a process into it.
    pub fn add(&self, process: u32) -> Result<()> {
        let written = fs::write(self.group.join("cgroup.procs"), process.to_string());
        written.context(|| format!("move process {process} to {}", self.group.display()))
    }

    fn create(bytes: u64) -> io::Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("xdpkit-lab-{}-{}", process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let mounts = fs::read_to_string("/proc/self/mounts")?;
        let old = mounts.lines().find_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (fields.get(2) == Some(&"cgroup") && fields[3].split(',').any(|option| option == "memory"))
                .then(|| Path::new(fields[1]).join(&name))
        });
        if let Some(group) = old {
            fs::create_dir(&group)?;
            let new = Self { group, _mount: None };
            fs::write(new.group.join("memory.limit_in_bytes"), bytes.to_string())?;
            return Ok(new);
        }
        // Wherever it may be mounted: this is the same hierarchy.
        let mount = sys::mount::detached_cgroups()?;
        let root = PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd()));
        fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        let group = root.join(name);
        fs::create_dir(&group)?;
        let new = Self { group, _mount: Some(mount) };
        fs::write(new.group.join("memory.max"), bytes.to_string())?;
        Ok(new)
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Ended processes leave it a moment later; what stays is empty and harmless.
        for _ in 0..100 {
            match fs::remove_dir(&self.group) {
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                _ => return,
            }
        }
    }
}
