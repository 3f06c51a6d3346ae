//! Subcommands of the gateway, and what they say about secrets.

use std::{os::unix::fs::PermissionsExt as _, path::Path, process::Output};

use skein_client::{
    connection::ClientConnection,
    options::{ConnectOptions, TokenLocation},
};
use tempfile::TempDir;
use tokio::process::Command;

use crate::harness::{Node, closed, free_port, gateway_binary, http_raw, until, within};

/// A secret that must appear in no output.
const HUSH: &str = "hush-hush-hush-hush-hush-hush-hush-hush";

fn gateway(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(gateway_binary());
    command.current_dir(folder).args(arguments);
    command
}

/// Exit code, standard output and standard error.
fn told(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

async fn run(folder: &Path, arguments: &[&str]) -> (Option<i32>, String, String) {
    told(&within(gateway(folder, arguments).output()).await.unwrap())
}

#[tokio::test]
async fn check_config_exits_with_0_or_64_and_every_mistake() {
    let folder = TempDir::new().unwrap();
    let (code, out, err) = run(folder.path(), &["check-config"]).await;
    assert_eq!((code, err.as_str()), (Some(0), ""));
    assert!(out.contains("valid") && out.contains("anonymous"), "{out}");
    let file = folder.path().join("gateway.toml");
    std::fs::write(&file, "[auth]\nmode = \"jwt\"\n[server]\nlisten = \"x\"\n").unwrap();
    let more = ["--set", "log.level=loud", "check-config", "--set", "limits.rooms=1"];
    let (code, out, err) = run(folder.path(), &more).await;
    assert_eq!((code, out.as_str()), (Some(64), ""));
    for mistake in ["auth.jwt_secret", "server.listen", "limits.rooms", "3 error(s)"] {
        assert!(err.contains(mistake), "{mistake}: {err}");
    }
    // A file that Redis needs is missing: a start would fail.
    std::fs::write(&file, "").unwrap();
    let tls = [
        "--set",
        "cluster.redis_url=rediss://h",
        "--set",
        "auth.allow_anonymous=true",
        "--set",
        "cluster.redis_ca_file=/nonexistent.pem",
    ];
    let (code, _, err) = run(folder.path(), &[&["check-config"], &tls[..]].concat()).await;
    assert!(code == Some(64) && err.contains("/nonexistent.pem"), "{code:?} {err}");
    // As before: a missing file that is named.
    let (code, _, err) = run(folder.path(), &["--config", "none.toml", "check-config"]).await;
    assert!(code == Some(64) && err.contains("none.toml"), "{code:?} {err}");
}

#[tokio::test]
async fn print_config_names_values_and_sources_without_secrets() {
    let folder = TempDir::new().unwrap();
    let config = format!(
        "[auth]\nmode = \"jwt\"\njwt_secret = \"{HUSH}\"\n[limits]\nmessages_per_second = 7\n"
    );
    std::fs::write(folder.path().join("gateway.toml"), config).unwrap();
    std::fs::write(folder.path().join("keys"), format!("web:{HUSH}\nops:{HUSH}2\n")).unwrap();
    let mut command = gateway(folder.path(), &["print-config", "--set", "drain.delay=2s"]);
    command
        .env("GATEWAY__API__KEYS_FILE", "keys")
        .env("GATEWAY__LOG__LEVEL", "debug")
        .env("GATEWAY__AUTH__JWT_SECRETS", format!("k2:{HUSH}3,{HUSH}4"))
        .env("GATEWAY__CLUSTER__REDIS_URL", format!("redis://me:{HUSH}@redis/3"));
    let (code, out, err) = told(&within(command.output()).await.unwrap());
    assert_eq!((code, err.as_str()), (Some(0), ""));
    for line in [
        "auth.mode = \"jwt\"  # file gateway.toml",
        "auth.jwt_secret = \"(hidden)\"  # file gateway.toml",
        "auth.jwt_secrets = \"k2:(hidden),(hidden)\"  # environment variable \
         GATEWAY__AUTH__JWT_SECRETS",
        "api.keys = \"web:(hidden),ops:(hidden)\"  # secret file keys, named by environment \
         variable GATEWAY__API__KEYS_FILE",
        "cluster.redis_url = \"redis://me:…@redis:6379/3\"  # environment variable \
         GATEWAY__CLUSTER__REDIS_URL",
        "limits.messages_per_second = \"7\"  # file gateway.toml",
        "drain.delay = \"2s\"  # --set",
        "log.level = \"debug\"  # environment variable GATEWAY__LOG__LEVEL",
        "history.ttl = \"24h\"  # default",
    ] {
        assert!(out.lines().any(|printed| printed == line), "no line {line} in {out}");
    }
    assert!(!out.contains("hush"), "{out}");
}

#[tokio::test]
async fn init_writes_a_private_file_once_and_it_works() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("gateway.toml");
    let (code, out, err) = run(folder.path(), &["init"]).await;
    assert_eq!(code, Some(0), "{err}");
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let secret = |key: &str| {
        let line = text.lines().find(|line| line.starts_with(key)).unwrap();
        line.split('"').nth(1).unwrap().to_owned()
    };
    assert!(!out.contains(&secret("jwt_secret")), "{out}");
    let (code, out, err) = run(folder.path(), &["check-config"]).await;
    assert_eq!(code, Some(0), "{out} {err}");
    let (code, _, err) = run(folder.path(), &["init"]).await;
    assert!(code == Some(1) && err.contains("exists"), "{code:?} {err}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    let (code, ..) = run(folder.path(), &["init", "other.toml"]).await;
    assert_eq!(code, Some(0));
    let other = std::fs::read_to_string(folder.path().join("other.toml")).unwrap();
    assert!(!other.contains(&secret("jwt_secret")), "two files have one secret");

    let file = path.to_str().unwrap();
    let node = Node::run(gateway(folder.path(), &["--config", file]), &[]).await;
    let arguments = ["token", "--sub", "ann", "--name", "Ann", "--rooms", "lobby=rw,news-*=r"];
    let (code, token, err) = run(folder.path(), &arguments).await;
    assert_eq!((code, err.as_str()), (Some(0), ""));
    let url = format!("ws://{}/ws", node.address);
    let options = ConnectOptions::new(&url).token(token.trim(), TokenLocation::Header);
    let mut ann = ClientConnection::open(&options).await.unwrap();
    assert_eq!(ann.expect_connected().await.unwrap().user.name.as_str(), "Ann");
    ann.join(&"lobby".parse().unwrap()).await.unwrap();
    assert!(ann.join(&"secret".parse().unwrap()).await.is_err());
    let mut nobody = ClientConnection::open(&ConnectOptions::new(&url)).await.unwrap();
    assert_eq!(closed(&mut nobody).await.1, "token_missing");
    let key = secret("keys").strip_prefix("admin:").unwrap().to_owned();
    let call = format!(
        "GET /api/v1/nodes HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\n\
         Connection: close\r\n\r\n"
    );
    assert_eq!(http_raw(node.address, &call).await.status, 200);
}

#[tokio::test]
async fn a_token_needs_a_secret_and_is_one_that_a_gateway_accepts() {
    let folder = TempDir::new().unwrap();
    let (code, out, err) = run(folder.path(), &["token", "--sub", "ann"]).await;
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert!(err.contains("auth.mode = jwt"), "{err}");
    let keys = format!("auth.jwt_secrets=a:{HUSH},b:{HUSH}2");
    let jwt = ["--set", "auth.mode=jwt", "--set", &keys, "--set", "auth.audience=chat"];
    let token = async |more: &[&str]| run(folder.path(), &[&["token"], more, &jwt].concat()).await;
    let kid = |token: &str| {
        let header = jsonwebtoken::decode_header(token.trim());
        header.unwrap_or_else(|error| panic!("{token}: {error}")).kid
    };
    assert_eq!(kid(&token(&["--sub", "ann"]).await.1).as_deref(), Some("a"));
    assert_eq!(kid(&token(&["--sub", "ann", "--kid", "b"]).await.1).as_deref(), Some("b"));
    for (bad, told) in [
        (&["--sub", "a b"][..], "not a user id"),
        (&["--sub", "ann", "--kid", "c"], "no secret has the kid `c`"),
        (&["--sub", "ann", "--ttl", "0s"], "at least 1s"),
        (&["--sub", "ann", "--rooms", "a*b"], "ends in `*`"),
        (&["--sub", "ann", "--rooms", "a=x"], "`r` or `rw`"),
        (&[], "--sub"),
    ] {
        let (code, out, err) = token(bad).await;
        assert!(code != Some(0) && out.is_empty() && err.contains(told), "{bad:?}: {out} {err}");
    }
}

#[tokio::test]
async fn no_output_repeats_a_secret() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("two-lines"), format!("{HUSH}\n{HUSH}\n")).unwrap();
    std::fs::write(folder.path().join("open.toml"), format!("[auth]\njwt_secret = \"{HUSH}\n"))
        .unwrap();
    std::fs::write(folder.path().join("bare.toml"), format!("[auth]\njwt_secret = {HUSH}\n"))
        .unwrap();
    let list = format!("[auth]\njwt_secrets = [\"{HUSH},x\", {{ kid = \"{HUSH}\", x = 1 }}]\n");
    std::fs::write(folder.path().join("list.toml"), list).unwrap();
    let redis = format!("cluster.redis_url=redis://me:1/{HUSH}@h");
    let mistakes: &[&[&str]] = &[
        &["--set", HUSH],
        &["--set", &redis],
        &["--set", &format!("cluster.redis_url=http://me:{HUSH}@h")],
        &["--set", &format!("auth.jwt_secret={HUSH}")],
        &["--set", &format!("auth.jwt_secrets={HUSH},hush")],
        &["--set", "auth.mode=jwt", "--set", "auth.jwt_secrets=a:hush,a:hush"],
        &["--set", "api.keys=hush,web:hush"],
        &["--set", &format!("api.keys=a:{HUSH},b:{HUSH}")],
        &["--set", "auth.mode=jwt", "--set", "auth.jwt_secret_file=two-lines"],
        &["--set", "auth.jwt_secret=hush", "--set", "auth.jwt_secret_file=two-lines"],
        &["--set", &format!("telemetry.otlp_endpoint=http://me:{HUSH}@h:4318")],
        &["--config", "open.toml"],
        &["--config", "bare.toml"],
        &["--config", "list.toml"],
    ];
    for command in ["check-config", "print-config", "serve", "token"] {
        for mistake in mistakes {
            let sub = if command == "token" { &["--sub", "ann"][..] } else { &[] };
            let (code, out, err) = run(folder.path(), &[&[command], sub, *mistake].concat()).await;
            assert!(code != Some(0), "{command} {mistake:?}: {out} {err}");
            assert!(!out.contains("hush") && !err.contains("hush"), "{command}: {out} {err}");
        }
    }
}

#[tokio::test]
async fn a_node_logs_no_secret_at_any_level() {
    let folder = TempDir::new().unwrap();
    std::fs::write(folder.path().join("jwt"), format!("{HUSH}\n")).unwrap();
    // No Redis listens there.
    let redis = format!("redis://me:{HUSH}@127.0.0.1:{}/", free_port());
    let mut command =
        gateway(folder.path(), &["--set", "log.level=trace", "--set", "api.docs=false"]);
    command
        .env("GATEWAY__AUTH__MODE", "jwt")
        .env("GATEWAY__AUTH__JWT_SECRET_FILE", "jwt")
        .env("GATEWAY__AUTH__JWT_SECRETS", format!("k2:{HUSH}2"))
        .env("GATEWAY__API__KEYS", format!("web:{HUSH}3"))
        .env("GATEWAY__CLUSTER__REDIS_URL", &redis)
        .args(["--set", &format!("server.listen=127.0.0.1:{}", free_port())]);
    let admin = std::net::SocketAddr::from(([127, 0, 0, 1], free_port()));
    let child = command
        .args(["--set", &format!("admin.listen={admin}")])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    until("the admin listener answers", async || {
        tokio::net::TcpStream::connect(admin).await.is_ok()
    })
    .await;
    let ready = crate::harness::get(admin, "/ready").await;
    let metrics = crate::harness::get(admin, "/metrics").await;
    assert!(!ready.body.contains("hush") && !metrics.body.contains("hush"));
    let pid = child.id().unwrap();
    let ended = std::process::Command::new("sh").args(["-c", &format!("kill {pid}")]).status();
    assert!(ended.unwrap().success());
    let (code, out, err) = told(&within(child.wait_with_output()).await.unwrap());
    assert_eq!(code, Some(0), "{err}");
    assert!(err.contains("redis") && !err.contains("hush") && !out.contains("hush"), "{err}");
}

#[tokio::test]
async fn the_version_has_a_commit_and_completions_every_command() {
    let folder = TempDir::new().unwrap();
    let (code, version, _) = run(folder.path(), &["--version"]).await;
    assert_eq!(code, Some(0));
    let expected = format!("gateway {}\n", gateway::version::TEXT);
    assert_eq!(version, expected);
    let is_commit = |text: &str| text.len() >= 7 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let commit = gateway::version::COMMIT;
    assert!(is_commit(commit) || commit == "unknown" || std::env::var("SKEIN_COMMIT").is_ok());
    for shell in ["bash", "zsh", "fish"] {
        let (code, script, err) = run(folder.path(), &["completions", shell]).await;
        assert_eq!(code, Some(0), "{err}");
        for command in [
            "serve",
            "check-config",
            "print-config",
            "init",
            "token",
            "healthcheck",
            "options",
            "completions",
        ] {
            assert!(script.contains(command), "{shell}: no {command}");
        }
    }
    let (code, options, _) = run(folder.path(), &["options"]).await;
    assert_eq!((code, options), (Some(0), gateway::config::Config::describe()));
    assert_eq!(run(folder.path(), &["--options"]).await.0, Some(0));
}
