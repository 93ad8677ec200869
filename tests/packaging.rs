//! The crate as others get it: packed without the laboratory, and its README at work in a crate outside.

mod common;

use std::{
    env, fs,
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use xdpkit_lab::topology::Pair;

fn cargo(directory: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    let output = command.current_dir(directory).args(arguments).env_remove("CARGO_TARGET_DIR").output().unwrap();
    assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// README's example, with the interface of the laboratory.
fn ten_lines() -> String {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, rest) = readme.split_once("```rust,no_run\n").expect("README shows how to embed");
    rest.split_once("```").unwrap().0.to_owned()
}

#[test]
fn the_package_holds_the_library_and_the_programs_and_nothing_else() {
    assert!(ten_lines().lines().count() <= 15, "README says ten lines");
    if common::is_emulated() {
        // The host's cargo home cannot be written from inside the machine.
        return;
    }
    let list = cargo(root(), &["package", "--list", "--allow-dirty", "--offline"]);
    let files: Vec<&str> = list.lines().collect();
    for needed in
        ["build.rs", "bpf/firewall.bpf.c", "bpf/include/parse.h", "bpf/abi/reason.h", "src/lib.rs", "README.md"]
    {
        assert!(files.contains(&needed), "{needed} is missing: {list}");
    }
    let strangers = ["lab/", "tests/", "examples/", "benches/", "target/"];
    let stranger = files.iter().find(|file| strangers.iter().any(|stranger| file.starts_with(stranger)));
    assert_eq!(stranger, None);
}

#[test]
fn the_readme_runs_in_a_crate_outside() {
    if common::is_emulated() {
        assert!(ten_lines().contains("fn main()"), "README shows a whole program");
        return;
    }
    // Cargo builds there what it has not built for the workspace already.
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let workspace = fs::read_to_string(root().join("Cargo.toml")).unwrap();
    let profiles = &workspace[workspace.find("[profile.dev]").expect("the workspace has a profile")..];
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("outside");
    let _ = fs::remove_dir_all(&scratch);
    fs::create_dir_all(&scratch).unwrap();
    let packages = scratch.join("package-target");
    cargo(
        root(),
        &[
            "package",
            "-p",
            "xdpkit",
            "--allow-dirty",
            "--no-verify",
            "--offline",
            "--target-dir",
            packages.to_str().unwrap(),
        ],
    );
    let packed = find_crate(&packages.join("package"));
    // As files of now: those in a package are all as old, and what was built of an earlier one would do.
    let unpacked =
        Command::new("tar").args(["-xmzf", packed.to_str().unwrap(), "-C", scratch.to_str().unwrap()]).status();
    assert!(unpacked.unwrap().success());
    let source = scratch.join(packed.file_stem().unwrap());
    let pair = Pair::new().unwrap();
    let crate_directory = scratch.join("outside");
    fs::create_dir_all(crate_directory.join("src")).unwrap();
    let manifest = format!(
        "[package]\nname = \"outside\"\nedition = \"2024\"\n\n[workspace]\n\n[dependencies]\nxdpkit = {{ path = \"{}\" }}\n\n{profiles}",
        source.display()
    );
    fs::write(crate_directory.join("Cargo.toml"), manifest).unwrap();
    fs::copy(root().join("Cargo.lock"), crate_directory.join("Cargo.lock")).unwrap();
    fs::write(crate_directory.join("src/main.rs"), ten_lines()).unwrap();
    cargo(&crate_directory, &["build", "--offline", "--target-dir", target.to_str().unwrap()]);
    let lock = fs::read_to_string(crate_directory.join("Cargo.lock")).unwrap();
    assert!(!lock.contains("xdpkit-lab") && !lock.contains("criterion"), "nothing of the laboratory is needed");
    let mut child = pair.server.command(target.join("debug/outside")).stdout(Stdio::piped()).spawn().unwrap();
    let line = BufReader::new(child.stdout.take().unwrap()).lines().next().unwrap().unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(line.ends_with(" packets dropped"), "{line}");
    fs::remove_dir_all(&scratch).unwrap();
}

fn find_crate(directory: &Path) -> PathBuf {
    let mut entries = fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path());
    entries.find(|path| path.extension().is_some_and(|extension| extension == "crate")).expect("cargo made a package")
}
