//! Which way dependencies point: what all functions stand on knows nothing of what stands on it.

use std::{collections::BTreeSet, fs, path::Path};

/// Each folder below `src`, and the modules and types of the crate that it may name.
const MAY_NAME: [(&str, &[&str]); 6] = [
    ("sys", &["Error", "Result"]),
    ("lpm", &[]),
    ("flow_table", &[]),
    ("base", &["Error", "Result", "abi", "flow_table", "sys"]),
    ("host", &["abi", "base", "sys"]),
    ("pin", &["Error", "Interface", "Result", "base", "sys"]),
];

/// What a file names by `crate::`, at the first level, without its unit tests and comments.
fn named_in(text: &str) -> BTreeSet<String> {
    let code: String = text
        .split("#[cfg(test)]\nmod ")
        .next()
        .unwrap_or_default()
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .flat_map(|line| [line.trim(), " "])
        .collect();
    let mut names = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest.strip_prefix('{') {
            None => drop(names.insert(first_word(rest))),
            Some(list) => {
                let (mut depth, mut item) = (0, String::new());
                for c in list.chars() {
                    match c {
                        '}' if depth == 0 => break,
                        '{' => depth += 1,
                        '}' => depth -= 1,
                        ',' if depth == 0 => drop(names.insert(first_word(std::mem::take(&mut item).trim()))),
                        c if depth == 0 => item.push(c),
                        _ => {}
                    }
                }
                names.insert(first_word(item.trim()));
            }
        }
    }
    names.remove("");
    names
}

fn first_word(text: &str) -> String {
    text.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect()
}

#[test]
fn names_are_found_in_lists_and_paths() {
    let text = "use crate::{\n    Error, // of all\n    sys::{self, map::Map},\n    base,\n};\nfn f() -> crate::Result<()> {}\n";
    assert_eq!(named_in(text), ["Error", "Result", "base", "sys"].map(str::to_owned).into());
}

#[test]
fn dependencies_point_one_way() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    for (folder, allowed) in MAY_NAME {
        let files = fs::read_dir(source.join(folder)).unwrap().map(|entry| entry.unwrap().path());
        let files: Vec<_> = files.filter(|path| path.extension().is_some_and(|end| end == "rs")).collect();
        assert!(!files.is_empty(), "src/{folder}");
        for file in files.iter().filter(|path| !path.ends_with("tests.rs") && !path.ends_with("kernel_tests.rs")) {
            for name in named_in(&fs::read_to_string(file).unwrap()) {
                assert!(allowed.contains(&name.as_str()), "{} names crate::{name}", file.display());
            }
        }
    }
}
