//! Compiles `bpf/*.bpf.c`, the benchmarks' programs, as the library's own are compiled.
//!
//! `XDPKIT_CLANG` names the compiler (default `clang`, 14 or newer).

use std::{env, path::PathBuf};

const SOURCES: &[&str] =
    &["bench", "checksum", "flow_table", "live", "lpm", "rate", "token_bucket", "verdict", "yardstick"];

const CLANG_ARGS: &[&str] = &["-mcpu=v3", "-nostdinc", "-Wall", "-Wextra", "-Werror"];

fn main() {
    println!("cargo:rerun-if-changed=bpf");
    println!("cargo:rerun-if-changed=../bpf");
    println!("cargo:rerun-if-env-changed=XDPKIT_CLANG");

    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let clang = env::var("XDPKIT_CLANG").unwrap_or_else(|_| "clang".into());
    for name in SOURCES {
        let source = format!("bpf/{name}.bpf.c");
        let built = libbpf_cargo::SkeletonBuilder::new()
            .source(&source)
            .clang(&clang)
            .clang_args(CLANG_ARGS)
            // Nobody reads the result, and a minimal toolchain has no rustfmt.
            .rustfmt("cat")
            .reference_obj(true)
            .build_and_generate(out.join(format!("{name}.skel.rs")));
        if let Err(error) = built {
            panic!(
                "{source}: {error:?}\n(compiled with `{clang}`: clang 14 or newer is needed; XDPKIT_CLANG names another)"
            );
        }
    }
}
