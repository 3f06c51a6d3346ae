//! Checks the structure of the code: layers, module docs, restrictions on files, retired words.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The root of the repository.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// Every Rust file below `folder`, with its text.
pub(crate) fn sources(folder: &str) -> Vec<(String, String)> {
    let mut files = vec![];
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let name = path.strip_prefix(root()).unwrap().display().to_string();
                files.push((name, fs::read_to_string(&path).unwrap()));
            }
        }
    }
    files.sort();
    assert!(!files.is_empty(), "{folder}");
    files
}

fn all() -> Vec<(String, String)> {
    ["gateway", "shared", "loadtest"].into_iter().flat_map(sources).collect()
}

/// The layers of the core, lowest first, as `lib.rs` lists them.
fn layers() -> Vec<String> {
    let lib = fs::read_to_string(root().join("gateway/core/src/lib.rs")).unwrap();
    let layer = |line: &str| Some(line.strip_prefix("pub mod ")?.strip_suffix(';')?.to_owned());
    lib.lines().filter_map(layer).collect()
}

/// The modules of this crate that a file names.
fn uses(text: &str) -> Vec<String> {
    let mut names = vec![];
    for (at, _) in text.match_indices("crate::") {
        let rest = &text[at + "crate::".len()..];
        if let Some(list) = rest.strip_prefix('{') {
            // `use crate::{a::B, c::{d, e}};`: takes the names at the first level.
            let (mut depth, mut name) = (0, String::new());
            for c in list.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => names.push(std::mem::take(&mut name)),
                    c if depth == 0 && !c.is_whitespace() => name.push(c),
                    _ => {}
                }
            }
            names.push(name);
        } else {
            names.push(rest.to_owned());
        }
    }
    let first = |name: String| {
        name.split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or("").to_owned()
    };
    names.into_iter().map(first).filter(|name| !name.is_empty()).collect()
}

#[test]
fn core_modules_use_only_lower_layers() {
    let layers = layers();
    let place = |name: &str| layers.iter().position(|layer| layer == name);
    for (file, text) in sources("gateway/core/src") {
        let module = file.trim_start_matches("gateway/core/src/");
        let module = module.split(['/', '.']).next().unwrap();
        let Some(own) = place(module) else {
            assert!(module == "lib", "{file} is no layer of lib.rs");
            continue;
        };
        for used in uses(&text) {
            let used_at = place(&used).unwrap_or_else(|| panic!("{file} uses crate::{used}"));
            assert!(used_at <= own, "{file} is in `{module}` and uses `{used}`, which is above it");
        }
    }
}

#[test]
fn pure_modules_use_neither_io_nor_a_clock() {
    let pure = |file: &str| {
        file.starts_with("gateway/core/src/delivery/")
            || file.starts_with("gateway/core/src/limits/")
            || file.starts_with("shared/protocol/src/")
            || file.starts_with("shared/websocket/src/")
    };
    let of_code = |file: &str| pure(file) && !file.ends_with("/tests.rs");
    for (file, text) in all().into_iter().filter(|(file, _)| of_code(file)) {
        let code = text.split("#[cfg(test)]").next().unwrap();
        for banned in [
            "Instant::now",
            "SystemTime::now",
            "std::fs",
            "std::net::Tcp",
            "tokio::net",
            "async fn",
        ] {
            assert!(!code.contains(banned), "{file} has {banned}");
        }
    }
}

#[test]
fn the_architecture_page_names_the_files_of_the_message_path() {
    let map = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    assert!(map.lines().count() <= 180, "ARCHITECTURE.md has more than 180 lines");
    for file in [
        "gateway/server/src/transport/mod.rs",
        "gateway/core/src/session/mod.rs",
        "gateway/core/src/publisher.rs",
        "gateway/core/src/bus/mod.rs",
        "gateway/core/src/hub/mod.rs",
        "gateway/core/src/connection/outbox.rs",
    ] {
        assert!(root().join(file).exists(), "{file} does not exist");
        assert!(map.contains(file), "ARCHITECTURE.md does not name {file}");
    }
}

#[test]
fn every_file_has_a_module_doc() {
    for (file, text) in all() {
        let of_tests = file.ends_with("/tests.rs");
        assert!(of_tests || text.starts_with("//! "), "{file} does not open with //!");
    }
}

#[test]
fn no_code_is_marked_unfinished_and_no_test_ignored() {
    // Concatenated here, so that this file does not match itself.
    let banned =
        [["TO", "DO"], ["FIX", "ME"], ["#[ign", "ore"], ["should_", "panic"]].map(|p| p.concat());
    // Tests that `cargo test` skips and `make test-full` runs.
    let long = ["#[ign", "ore = \"make test-full\"]"].concat();
    for (file, text) in all() {
        let text = text.replace(&long, "");
        for banned in &banned {
            assert!(!text.contains(banned.as_str()), "{file} has {banned}");
        }
    }
}

#[test]
fn no_test_sleeps_to_wait() {
    let sleep = ["time::", "sleep("].concat();
    for (file, text) in sources("gateway/server/tests") {
        for (number, line) in text.lines().enumerate() {
            // The pause of a poll and the interval of a load do not wait for a condition.
            let allowed = ["from_millis(10)", "from_millis(5)", "sleep_until"];
            let fine = allowed.iter().any(|allowed| line.contains(allowed));
            assert!(!line.contains(&sleep) || fine, "{file}:{}: {line}", number + 1);
        }
    }
}

#[test]
fn the_top_level_has_only_agreed_names() {
    let agreed = [
        ".ci",
        ".dockerignore",
        ".editorconfig",
        ".env.example",
        ".git",
        ".github",
        ".gitignore",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "Cargo.lock",
        "Cargo.toml",
        "LICENSE-APACHE",
        "LICENSE-MIT",
        "Makefile",
        "README.md",
        "clippy.toml",
        "deny.toml",
        "deploy",
        "docker-compose.yml",
        "docs",
        "gateway",
        "loadtest",
        "nginx",
        "rustfmt.toml",
        "shared",
    ];
    // Untracked files of a checkout: build output and private settings.
    let private = ["target", "dist", ".env", "gateway.toml", ".vscode", ".idea"];
    for entry in fs::read_dir(root()).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        let known = agreed.contains(&name.as_str()) || private.contains(&name.as_str());
        assert!(known, "{name} is not agreed on as a top-level name");
    }
}

/// Files that may contain retired words: the glossary, the history, the names that are still
/// accepted or exported for one release, and the keys in Redis, which do not change.
const MAY_NAME_RETIRED: [&str; 5] = [
    "docs/glossary.md",
    "CHANGELOG.md",
    "gateway/server/src/config/aliases.rs",
    "gateway/core/src/telemetry/legacy.rs",
    "gateway/redis/src/keyspace.rs",
];

#[test]
fn no_retired_word_comes_back() {
    let glossary = fs::read_to_string(root().join("docs/glossary.md")).unwrap();
    let formerly = glossary.lines().filter_map(|line| line.strip_suffix('|')?.rsplit('|').next());
    // Between backticks: every second piece.
    let retired: Vec<&str> =
        formerly.flat_map(|column| column.split('`').skip(1).step_by(2)).collect();
    let mut found = vec![];
    for (file, text) in tracked() {
        if MAY_NAME_RETIRED.contains(&file.as_str()) {
            continue;
        }
        for word in &retired {
            let in_word = |c: char| c.is_alphanumeric() || c == '_';
            for (at, _) in text.match_indices(word) {
                let after = &text[at + word.len()..];
                if !text[..at].ends_with(in_word) && !after.starts_with(in_word) {
                    let line = text[..at].matches('\n').count() + 1;
                    found.push(format!("{file}:{line}: {word}"));
                }
            }
        }
    }
    assert!(found.is_empty(), "retired by docs/glossary.md:\n{}", found.join("\n"));
}

/// Every text file that git knows, with its content.
fn tracked() -> Vec<(String, String)> {
    let listed = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .expect("git runs");
    let listed = String::from_utf8(listed.stdout).unwrap();
    let read = |file: &str| Some((file.to_owned(), fs::read_to_string(root().join(file)).ok()?));
    listed.lines().filter_map(read).collect()
}
