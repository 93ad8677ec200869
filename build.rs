//! Compiles `bpf/*.bpf.c` into skeletons and fingerprints what pinned maps hold.
//!
//! `XDPKIT_CLANG` names the compiler (default `clang`, 14 or newer). On docs.rs there is no clang:
//! the skeletons stay empty, which is enough for rustdoc.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
};

/// Every stage: the names of its C program, its ABI header and its Rust module.
const STAGES: &[&str] = &["dsr_balancer", "firewall", "monitor", "nat_balancer", "rate_limiter", "tunnel_decap"];

/// Programs that no stage has.
const HELPERS: &[&str] = &["redirects"];

const CLANG_ARGS: &[&str] = &["-mcpu=v3", "-nostdinc", "-Wall", "-Wextra", "-Werror"];

fn main() {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-env-changed=XDPKIT_CLANG");
    println!("cargo:rerun-if-env-changed=DOCS_RS");
    println!("cargo:rustc-check-cfg=cfg(xdpkit_docs)");
    let docs = env::var_os("DOCS_RS").is_some();
    if docs {
        println!("cargo:rustc-cfg=xdpkit_docs");
    }

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    for stage in STAGES {
        println!("cargo:rustc-env=XDPKIT_ABI_{}={}", stage.to_uppercase(), fingerprint(stage));
    }
    for program in STAGES.iter().chain(HELPERS) {
        let skeleton = out.join(format!("{program}.skel.rs"));
        if docs {
            fs::write(&skeleton, "").expect("OUT_DIR is writable");
        } else {
            compile(program, &skeleton);
        }
    }
}

fn compile(program: &str, skeleton: &Path) {
    let source = format!("bpf/{program}.bpf.c");
    let clang = env::var("XDPKIT_CLANG").unwrap_or_else(|_| "clang".into());
    let built = libbpf_cargo::SkeletonBuilder::new()
        .source(&source)
        .clang(&clang)
        .clang_args(CLANG_ARGS)
        // Nobody reads the result, and a minimal toolchain has no rustfmt.
        .rustfmt("cat")
        .reference_obj(true)
        .build_and_generate(skeleton);
    if let Err(error) = built {
        panic!(
            "{source}: {error:?}\n(compiled with `{clang}`: clang 14 or newer is needed; XDPKIT_CLANG names another)"
        );
    }
}

/// Changes when a struct changes that pinned maps hold, or where something stands in them, not when a comment does.
/// `reason.h` is append-only and its counters have room, so it is left out. FNV-1a: the same with every compiler.
fn fingerprint(stage: &str) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for header in pinned_headers(&format!("bpf/{stage}.bpf.c")) {
        for word in without_comments(&read(&header)).split_whitespace() {
            for byte in word.bytes().chain([b' ']) {
                hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
            }
        }
    }
    hash
}

/// The headers of structs and layouts that a file includes, by itself or through others; all but `reason.h`.
fn pinned_headers(path: &str) -> impl Iterator<Item = String> {
    let mut seen = BTreeSet::new();
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        for line in read(&path).lines() {
            let Some(name) = line.strip_prefix("#include \"").and_then(|rest| rest.strip_suffix('"')) else { continue };
            let included = match name.strip_prefix("../") {
                Some(name) => format!("bpf/{name}"),
                None => format!("{directory}/{name}"),
            };
            if seen.insert(included.clone()) {
                open.push(included);
            }
        }
    }
    seen.into_iter()
        .filter(|path| (path.starts_with("bpf/abi/") || path.starts_with("bpf/layout/")) && path != "bpf/abi/reason.h")
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn without_comments(text: &str) -> String {
    let mut kept = String::new();
    let mut rest = text;
    while let Some((before, comment)) = rest.split_once("/*") {
        kept.push_str(before);
        kept.push(' ');
        rest = comment.split_once("*/").expect("a comment ends").1;
    }
    kept + rest
}
