//! The document of the server API before tools that share no code with this project: clients that
//! are generated of it, and a tester that sends what it allows and forbids. `make setup` installs
//! them.

use crate::{
    api::{KEY, OPTIONS, call_as, operations},
    harness::{Gateway, get},
};

/// The folder of a tool that `make setup` has installed.
pub fn tool(name: &str) -> String {
    let home = std::env::var("HOME").unwrap();
    let cache = std::env::var("XDG_CACHE_HOME").unwrap_or(format!("{home}/.cache"));
    format!("{cache}/skein/{name}")
}

/// Runs a command that must succeed, and returns its output.
async fn run(folder: &std::path::Path, program: &str, arguments: &[&str]) -> String {
    let output = tokio::process::Command::new(program)
        .current_dir(folder)
        .args(arguments)
        .output()
        .await
        .unwrap_or_else(|error| panic!("{program} is installed by `make setup`: {error}"));
    let output_text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {output_text}{errors}");
    output_text
}

/// Clients generated from the document (PyPI: openapi-python-client; npm: openapi-typescript) are
/// complete, compile, and call every operation.
#[tokio::test]
async fn generated_clients_call_every_operation() {
    let outside = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/outside");
    let (python, typescript) =
        (tool("openapi-python-client-0.29.1"), tool("openapi-typescript-7.13.0"));
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let start = async |name: &str| {
        let archive = format!("sqlite://{}/{name}.db", folder.display());
        Gateway::start(&[&OPTIONS[..], &[("archive.url", &archive)]].concat()).await
    };
    let [first, second] = [start("first").await, start("second").await];
    let document = get(first.address, "/api/openapi.json").await.body;
    std::fs::write(folder.join("openapi.json"), &document).unwrap();
    let operations = operations(&serde_json::from_str(&document).unwrap());

    let in_python = async {
        let generator = format!("{python}/bin/openapi-python-client");
        // Its formatter is in the same folder.
        let path = format!("PATH={python}/bin:{}", std::env::var("PATH").unwrap());
        let mut generate = vec![&*path, &*generator, "generate", "--path", "openapi.json"];
        generate.extend(["--meta", "none", "--output-path", "skein", "--fail-on-warning"]);
        run(folder, "env", &generate).await;
        let script = format!("{outside}/generated_client.py");
        let url = format!("http://{}", first.address);
        run(folder, &format!("{python}/bin/python"), &[&script, ".", &url, KEY]).await
    };
    let in_typescript = async {
        let bin = |name: &str| format!("{typescript}/node_modules/.bin/{name}");
        std::os::unix::fs::symlink(
            format!("{typescript}/node_modules"),
            folder.join("node_modules"),
        )
        .unwrap();
        let source = folder.join("generated_client.mts");
        std::fs::copy(format!("{outside}/generated_client.ts"), source).unwrap();
        run(folder, &bin("openapi-typescript"), &["openapi.json", "-o", "skein.ts"]).await;
        let strict = ["--strict", "--noUncheckedIndexedAccess", "--skipLibCheck"];
        let target = ["--module", "nodenext", "--target", "es2022", "--lib", "es2022,dom"];
        let source = ["generated_client.mts"];
        run(folder, &bin("tsc"), &[&strict[..], &target, &source].concat()).await;
        let url = format!("http://{}", second.address);
        run(folder, "node", &["generated_client.mjs", &url, KEY]).await
    };
    let (in_python, in_typescript) = tokio::join!(in_python, in_typescript);
    for called in [in_python, in_typescript] {
        assert_eq!(called.lines().collect::<Vec<_>>(), operations);
    }
}

/// Requests are generated from the document by an independent tool (PyPI: schemathesis): valid
/// ones, invalid ones, and sequences. The document must describe every response.
#[tokio::test]
async fn every_response_to_schemathesis_conforms_to_the_document() {
    let folder = tempfile::tempdir().unwrap();
    let archive = format!("sqlite://{}/archive.db", folder.path().display());
    let options = [&OPTIONS[..], &[("archive.url", &archive)]].concat();
    let gateway = Gateway::start(&options).await;
    let tool = tool("schemathesis-4.32.5/bin/schemathesis");
    let examples = if std::env::var("SKEIN_API").as_deref() == Ok("full") { "200" } else { "10" };
    let output = tokio::process::Command::new(&tool)
        .current_dir(folder.path())
        .arg("run")
        .arg(format!("http://{}/api/openapi.json", gateway.address))
        .args(["-H", &format!("Authorization: Bearer {KEY}"), "--max-examples", examples])
        // The schema cannot express some rules, such as that `before` and `after` exclude each
        // other.
        // A room needs no creation: the presence of a deleted one is an empty list.
        .args(["--checks", "all", "--seed", "1"])
        .args(["--exclude-checks", "positive_data_acceptance,use_after_free"])
        // It would make the node reject every later request.
        .args(["--exclude-path", "/api/v1/nodes/{id}/drain"])
        .output()
        .await
        .expect("schemathesis is installed by `make setup`");
    let output_text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output_text}");
    assert!(output_text.contains("Tested: 26"), "{output_text}");
    // The node still works.
    assert_eq!(call_as(Some(KEY), gateway.address, "GET /api/v1/online", None).await.status, 200);
}
