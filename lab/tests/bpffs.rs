//! The private bpffs, as seen from this process and from others.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use xdpkit_lab::bpffs::BpfFs;

/// Pins a map by a raw system call, as any BPF library would.
fn pin_a_map(path: &Path) {
    let c_path = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: both attributes are laid out as the kernel's, and the path outlives the call.
    unsafe {
        let create: [u32; 5] = [2, 4, 4, 1, 0];
        let map = libc::syscall(libc::SYS_bpf, 0, create.as_ptr(), size_of_val(&create));
        assert!(map >= 0, "{}", std::io::Error::last_os_error());
        let pin: [u64; 2] = [c_path.as_ptr() as u64, map as u64];
        let pinned = libc::syscall(libc::SYS_bpf, 6, pin.as_ptr(), size_of_val(&pin));
        assert_eq!(pinned, 0, "{}: {}", path.display(), std::io::Error::last_os_error());
        libc::close(map as i32);
    }
}

/// Not a test of its own: what the children of the tests below do.
#[test]
fn child() {
    if let Some(path) = std::env::var_os("LAB_PIN_AT") {
        pin_a_map(Path::new(&path));
        std::thread::sleep(Duration::from_secs(60));
    }
    if std::env::var_os("LAB_PRINT_BPFFS").is_some() {
        let bpffs = BpfFs::new().unwrap();
        pin_a_map(&bpffs.path().join("map"));
        std::thread::sleep(Duration::from_secs(60));
    }
}

fn start_child(key: &str, value: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "child"]).env(key, value).stdout(Stdio::null());
    command.spawn().unwrap()
}

fn wait_for(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < end, "waited in vain");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn pins_can_be_made_moved_and_removed_in_directories() {
    let bpffs = BpfFs::new().unwrap();
    let (old, new) = (bpffs.path().join("old"), bpffs.path().join("new"));
    fs::create_dir(&old).unwrap();
    pin_a_map(&old.join("map"));
    fs::rename(old.join("map"), old.join("moved")).unwrap();
    fs::rename(&old, &new).unwrap();
    assert_eq!(fs::read_dir(&new).unwrap().count(), 1);
    fs::remove_file(new.join("moved")).unwrap();
    fs::remove_dir(&new).unwrap();
    assert!(!bpffs.path().join("old").exists() && !new.exists());
}

#[test]
fn two_file_systems_share_nothing() {
    let (a, b) = (BpfFs::new().unwrap(), BpfFs::new().unwrap());
    pin_a_map(&a.path().join("map"));
    assert!(!b.path().join("map").exists());
}

#[test]
fn what_a_child_pinned_survives_its_kill() {
    let bpffs = BpfFs::new().unwrap();
    let dir = bpffs.path().join("child");
    fs::create_dir(&dir).unwrap();
    let mut child = start_child("LAB_PIN_AT", &dir.join("map"));
    wait_for(|| dir.join("map").exists());
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(dir.join("map").exists());
    fs::remove_file(dir.join("map")).unwrap();
}

#[test]
fn no_mount_is_left_when_the_owner_is_killed() {
    let mounts = || fs::read_to_string("/proc/self/mounts").unwrap();
    let mut child = start_child("LAB_PRINT_BPFFS", Path::new(""));
    let descriptors = format!("/proc/{}/fd", child.id());
    let pinned = || {
        let list = fs::read_dir(&descriptors).into_iter().flatten().flatten();
        list.into_iter().any(|fd| fd.path().join("map").exists())
    };
    wait_for(pinned);
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!mounts().contains(&format!("xdpkit-lab-bpffs-{}-", child.id())));
}
