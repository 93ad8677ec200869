//! What the kernel's log says while a test runs: a program that upsets the kernel has failed, whatever its verdicts.

use std::{
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Seek as _, SeekFrom},
    os::unix::fs::OpenOptionsExt as _,
};

/// Words of a kernel that found a mistake of its own, or in a program.
const COMPLAINTS: [&str; 8] =
    ["WARNING:", "BUG:", "Oops", "verifier", "soft lockup", "hung task", "general protection fault", "rcu_sched"];

/// The log from now on; `None` where it cannot be read, as in most containers.
pub(crate) struct KernelLog(Option<File>);

impl KernelLog {
    pub(crate) fn from_now() -> Self {
        let open = || {
            let mut log = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open("/dev/kmsg")?;
            log.seek(SeekFrom::End(0))?;
            Ok::<_, std::io::Error>(log)
        };
        let log = open();
        if let Err(error) = &log {
            println!("/dev/kmsg: {error}: nobody looks whether the kernel complains");
        }
        Self(log.ok())
    }

    /// Asserts that the kernel has not complained.
    pub(crate) fn assert_quiet(mut self) {
        let Some(log) = &mut self.0 else { return };
        let mut record = vec![0; 8192];
        loop {
            match log.read(&mut record) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&record[..length]);
                    assert!(!COMPLAINTS.iter().any(|word| text.contains(word)), "the kernel says: {text}");
                }
                // Records that were overwritten before they were read.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => panic!("/dev/kmsg: {error}"),
            }
        }
    }
}
