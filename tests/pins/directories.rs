//! Directories of pins: where there can be none, and whose they have to be.

use std::{
    env,
    fs::{self, Permissions},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::Path,
};

use crate::common::pins::{firewall, monitor, options};
use xdpkit::{Error, Firewall, FirewallConfig, Pinned, Stage as _, pinned, pinned_stats, remove_pins};
use xdpkit_lab::{bpffs::BpfFs, topology::Pair};

/// Everything that opens or makes a directory of pins.
const CALLS: [&str; 6] = ["pinned", "pinned_stats", "adopt", "load_or_adopt", "attach", "remove_pins"];

fn call(name: &str, pair: &Pair, directory: &Path) -> Result<(), Error> {
    let config = FirewallConfig::default();
    match name {
        "pinned" => pinned(directory).map(drop),
        "pinned_stats" => pinned_stats(directory, "firewall").map(drop),
        "adopt" => Firewall::adopt(directory, "firewall").map(drop),
        "load_or_adopt" => Firewall::load_or_adopt(directory, &config).map(drop),
        "attach" => {
            let fresh = monitor("firewall");
            pair.server.run(|| fresh.attach(&options(directory))).map(drop)
        }
        _ => remove_pins(directory),
    }
}

#[test]
fn a_directory_outside_of_a_bpf_file_system_is_an_error_everywhere() {
    let pair = Pair::new().unwrap();
    let there = env::temp_dir().join(format!("xdpkit-no-bpffs-{}", std::process::id()));
    fs::create_dir_all(there.join("stages")).unwrap();
    let missing = there.join("missing/below");
    // As the place of the usual BPF file system looks where `ip netns exec` has put another /sys before it.
    let hidden = Path::new("/sys/kernel/xdpkit");
    for directory in [&there, &missing, hidden] {
        for what in CALLS {
            let error = call(what, &pair, directory).expect_err(what);
            assert!(matches!(&error, Error::NotBpfFs { path } if path == directory), "{what}: {error}");
            let text = error.to_string();
            assert!(text.contains("is not in a BPF file system: mount one with `mount -t bpf bpf DIR`"), "{text}");
            assert_eq!(text.contains("`ip netns exec` hides"), directory == hidden, "{text}");
            assert_eq!(text.contains("nsenter --net=/run/netns/NAME"), directory == hidden, "{text}");
        }
    }
    assert!(!missing.exists());
    fs::remove_dir_all(&there).unwrap();
}

#[test]
fn a_missing_directory_holds_nothing_and_is_made_for_this_user_alone() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let directory = bpffs.path().join("deep/down");
    assert_eq!(pinned(&directory).unwrap(), Pinned::default());
    assert!(matches!(Firewall::adopt(&directory, "firewall"), Err(Error::PinMissing { .. })));
    remove_pins(&directory).unwrap();
    assert!(!bpffs.path().join("deep").exists());
    let attachment = pair.server.run(|| firewall().attach(&options(&directory))).unwrap();
    for made in [bpffs.path().join("deep"), directory.clone(), directory.join("stages"), directory.join("interfaces")] {
        assert_eq!(fs::metadata(&made).unwrap().mode() & 0o777, 0o700, "{}", made.display());
    }
    attachment.detach().unwrap();
    remove_pins(&directory).unwrap();
}

#[test]
fn a_dot_in_a_name_is_what_is_wrong() {
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    for directory in [bpffs.path().join("edge.1"), bpffs.path().join("edge.1/below")] {
        for what in CALLS {
            let error = call(what, &pair, &directory).expect_err(what);
            assert!(matches!(&error, Error::Pin { .. }), "{what}: {error}");
            assert!(error.to_string().contains("names in a BPF file system take no dots"), "{what}: {error}");
        }
    }
}

#[test]
fn a_directory_that_others_own_or_may_write_to_is_refused_everywhere() {
    const NOBODY: u32 = 65_534;
    let pair = Pair::new().unwrap();
    let bpffs = BpfFs::new().unwrap();
    let above = bpffs.path().join("above");
    let directory = above.join("app");
    // What an earlier process left, whose firewall goes on.
    drop(pair.server.run(|| firewall().attach(&options(&directory))).unwrap());
    let index = pair.server.ifindex("eth0").unwrap().to_string();
    let refused = |path: &Path, callers: &[&str], text: &str| {
        for what in callers {
            let error = call(what, &pair, &directory).expect_err(what);
            assert!(matches!(&error, Error::PinsExposed { path: found, .. } if found == path), "{what}: {error}");
            assert!(error.to_string().contains(text), "{what}: {error}");
        }
    };
    let places: [(&Path, &[&str]); 6] = [
        (&above, &CALLS),
        (&directory, &CALLS),
        (&directory.join("stages"), &CALLS),
        (&directory.join("stages/firewall"), &["pinned", "pinned_stats", "adopt", "load_or_adopt", "attach"]),
        (&directory.join("interfaces"), &["pinned", "attach", "remove_pins"]),
        (&directory.join("interfaces").join(index), &["pinned", "attach"]),
    ];
    for (place, callers) in places {
        for mode in [0o770, 0o707, 0o702].into_iter().take(crate::common::times(3, 3, 1)) {
            fs::set_permissions(place, Permissions::from_mode(mode)).unwrap();
            refused(place, callers, &format!("may be written by others (mode {mode:04o})"));
        }
        fs::set_permissions(place, Permissions::from_mode(0o755)).unwrap();
        chown(place, Some(NOBODY), None).unwrap();
        refused(place, callers, "belongs to user 65534");
        chown(place, Some(0), None).unwrap();
    }
    // The sticky bit keeps others from renaming what is not theirs; a directory of pins is nobody else's all the same.
    fs::set_permissions(&directory, Permissions::from_mode(0o1777)).unwrap();
    refused(&directory, &CALLS, "may be written by others (mode 1777)");
    fs::set_permissions(&directory, Permissions::from_mode(0o700)).unwrap();
    for above in [bpffs.path(), &above] {
        fs::set_permissions(above, Permissions::from_mode(0o1777)).unwrap();
    }
    // Through all of this it was left alone.
    let adopted = Firewall::load_or_adopt(&directory, &FirewallConfig::default()).unwrap();
    let attachment = pair.server.run(|| adopted.attach(&options(&directory))).unwrap();
    assert!(attachment.adopted() && adopted.len().unwrap() == 2);
    attachment.detach().unwrap();
    remove_pins(&directory).unwrap();
}

#[test]
fn a_service_of_an_ordinary_user_has_pins_of_its_own() {
    let bpffs = BpfFs::new().unwrap();
    let directory = bpffs.path().join("edge");
    fs::create_dir(&directory).unwrap();
    chown(&directory, Some(4711), Some(4711)).unwrap();
    fs::set_permissions(&directory, Permissions::from_mode(0o700)).unwrap();
    let error = pinned(&directory).unwrap_err().to_string();
    assert!(error.contains("belongs to user 4711"), "{error}");
    assert!(error.contains("or the program run as its owner"), "{error}");
}
