use secrecy::ExposeSecret as _;
use skein_core::{limits::Rate, session::auth::JwtSecret};

use super::*;
use crate::transport::echo::EchoMode;

fn load(environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, String> {
    let own = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect::<Vec<_>>()
    };
    let environment = own(environment).into_iter().collect();
    let sources = ConfigSources { file: None, environment: Some(environment), flags: own(flags) };
    Config::load(sources).map_err(|errors| errors.to_string())
}

#[test]
fn defaults_start_a_single_node_in_memory() {
    let config = load(&[], &[]).unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(config.listen.to_string(), "127.0.0.1:8080");
    assert!(config.redis.is_none() && config.warnings.is_empty());
}

#[test]
fn flags_replace_the_environment_and_both_replace_the_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let text = "[server]\nlisten = \"127.0.0.1:1\"\necho = \"off\"\n[node]\nid = \"1e5\"\n\
                [limits]\nmessages_per_second = 7\n";
    std::fs::write(file.path(), text).unwrap();
    let environment = [
        ("GATEWAY__SERVER__LISTEN", "127.0.0.1:2"),
        ("GATEWAY__ADMIN__LISTEN", "127.0.0.1:3"),
        ("GATEWAY__SERVER__ALLOWED_ORIGINS", ""),
        ("GATEWAY_PORT", "tcp://10.0.0.1:80"),
    ];
    let own = |(k, v): (&str, &str)| (k.to_owned(), v.to_owned());
    let config = Config::load(ConfigSources {
        file: Some(file.path().to_owned()),
        environment: Some(environment.into_iter().map(own).collect()),
        flags: vec![own(("admin.listen", "127.0.0.1:4"))],
    })
    .unwrap_or_else(|errors| panic!("{errors}"));
    assert_eq!(config.listen.port(), 2);
    assert_eq!(config.admin_listen.port(), 4);
    assert_eq!(config.http.echo, EchoMode::Off);
    assert_eq!(config.node.as_str(), "1e5");
    let seven = Rate::new(7, Duration::from_secs(1), 14);
    assert_eq!(config.client_limits.rates.messages, seven);
}

#[test]
fn all_errors_are_reported_at_once_with_their_keys() {
    let environment = [
        ("GATEWAY__SERVER__LISTEN", "nowhere"),
        ("GATEWAY__SERVER__ECHO", "loud"),
        ("GATEWAY__SERVER__LISTN", "127.0.0.1:1"),
        ("GATEWAY__SERVER__ALLOWED_ORIGINS", "https://a, b"),
        ("GATEWAY__CLUSTER__PARTITIONS", "0"),
        ("GATEWAY__AUTH__MODE", "jwt"),
        ("GATEWAY__LIMITS__MESSAGE_BYTES_MAX", "1"),
        ("GATEWAY__PUBLISH__TIMEOUT", "soon"),
    ];
    let Err(errors) = load(&environment, &[]) else { panic!("accepted") };
    for (key, _) in environment {
        let key = key.replace("AUTH__MODE", "AUTH__JWT_SECRET");
        assert!(errors.contains(&key), "{key} is missing in {errors}");
    }
    assert!(errors.contains("8 error(s)"), "{errors}");
    assert!(errors.contains("did you mean `server.listen`?"), "{errors}");
}

#[test]
fn a_useless_setting_is_rejected_with_advice() {
    const REDIS: (&str, &str) = ("cluster.redis_url", "redis://127.0.0.1");
    const JWT: (&str, &str) = ("auth.mode", "jwt");
    const SECRET: (&str, &str) = ("auth.jwt_secret", "a secret of at least thirty-two bytes");
    const LONG: &str = "one more secret of at least thirty-two bytes";
    let rejected: &[(&[(&str, &str)], &str)] = &[
        (&[("log.level", "inof")], "a level is error, warn, info, debug, trace or off"),
        (&[("log.level", "skein_redis=debug")], "one level for everything"),
        (&[("log.level", "info,gateway=loud")], "a level is"),
        (&[("heartbeat.interval", "60s")], "every idle client is closed"),
        (&[("heartbeat.idle_timeout", "25s")], "heartbeat.idle_timeout = `25s`"),
        (&[("heartbeat.interval", "0s")], "must be 1ms to 10 years"),
        (&[JWT, ("auth.jwt_secret", "x")], "is 1 bytes long"),
        (&[JWT, ("auth.jwt_secret", &"x".repeat(31))], "at least 32"),
        (&[JWT], "openssl rand -base64 48"),
        (&[SECRET], "set auth.mode = jwt"),
        (&[JWT, ("auth.jwt_secrets", "a:short")], "entry 1 is 5 bytes long"),
        (&[JWT, ("auth.jwt_secrets", &format!("{LONG},x"))], "entry 2 is 1 bytes long"),
        (&[JWT, ("auth.jwt_secrets", &format!("a:{LONG},a:{LONG}"))], "the kid `a`"),
        (&[JWT, ("auth.jwt_secrets", &vec![LONG; 17].join(","))], "at most 16"),
        (&[JWT, SECRET, ("auth.jwt_secrets", "a:short")], "entry 1 is 5 bytes long"),
        (&[("auth.jwt_secrets", LONG)], "set auth.mode = jwt"),
        (&[JWT, ("auth.jwt_secret_file", "/nonexistent")], "No such file"),
        (&[JWT, SECRET, ("auth.jwt_secret_file", "/nonexistent")], "set one of them"),
        (&[JWT, SECRET, ("auth.leeway", "2h")], "must be at most 1h"),
        (&[("auth.cookie", "a b")], "a cookie name consists of"),
        (&[("auth.cookie", "")], "a cookie name consists of"),
        (&[("auth.cookie", "gw_node")], "nginx finds"),
        (&[("server.listen", "0.0.0.0:9100")], "use another port"),
        (&[("admin.listen", "127.0.0.1:8080")], "use another port"),
        (&[("server.trusted_proxies", "10.0.0.0/8,0.0.0.0/0")], "any client can forge its own"),
        (&[("server.trusted_proxies", "::/0")], "the networks of the proxies"),
        (&[("server.trusted_proxies", "nginx")], "write a network as 10.0.0.0/8"),
        (&[("api.keys", "web:short")], "16 characters or more"),
        (&[("api.keys", "a:0123456789abcdef,b:0123456789abcdef")], "contains a key twice"),
        (&[("api.keys", "a:0123456789abcdefä")], "in a header"),
        (&[("cluster.partitions", "0")], "must be 1 to 16384"),
        (&[("cluster.lease", "900ms")], "must be 1s to 1m"),
        (&[("cluster.lease", "61s")], "must be 1s to 1m"),
        (&[("cluster.redis_ca_file", "/ca.pem")], "is required by the options for TLS files"),
        (&[REDIS], "set auth.allow_anonymous = true"),
        (&[("rooms.ephemeral", "live:*:x")], "that ends in `*`"),
        (&[("rooms.ephemeral", "a b")], "is neither the name of a room"),
        (&[("limits.message_bytes_max", "1GiB")], "must be at most 16MiB"),
        (&[("history.max_bytes", "128")], "a log cannot hold one message"),
        (&[("history.memory_bytes_max", "1MiB")], "it bounds all logs together"),
        (&[("history.window", "2d")], "nothing is kept for longer"),
        (&[("presence.event_members_max", "2000")], "single events name their users"),
        (&[("presence.grace", "30d")], "must be at most 1h"),
        (&[("drain.window", "2h")], "must be at most 1h"),
        (&[("transport.deflate_bytes_min", "1GiB")], "transport.deflate = false"),
        (&[("node.id", "a b")], "node.id"),
    ];
    for (settings, expected) in rejected {
        let Err(text) = load(&[], settings) else { panic!("accepted: {settings:?}") };
        assert!(text.contains(expected) && text.contains("1 error(s)"), "{settings:?}: {text}");
    }
    let accepted: &[&[(&str, &str)]] = &[
        &[("log.level", "warn,skein_redis=trace,hyper=off")],
        &[("log.level", "off")],
        &[JWT, SECRET],
        &[JWT, ("auth.jwt_secrets", LONG)],
        &[JWT, SECRET, ("auth.jwt_secrets", &format!("2027:{LONG},:{LONG},{LONG}"))],
        &[("server.listen", "127.0.0.1:80"), ("admin.listen", "127.0.0.2:80")],
        &[("server.trusted_proxies", "10.0.0.1,fd00::/8")],
        &[("rooms.ephemeral", "live:*,cursors,*")],
        &[REDIS, ("auth.allow_anonymous", "true"), ("history.memory_bytes_max", "1MiB")],
        // A default does not contradict a setting.
        &[("history.ttl", "2s"), ("history.max_bytes", "1GiB"), ("presence.diff_members_max", "5")],
        &[("limits.outbox_bytes_max", "64KiB")],
        &[("api.keys", "web:0123456789abcdef,web:fedcba9876543210")],
    ];
    for settings in accepted {
        if let Err(text) = load(&[], settings) {
            panic!("rejected: {settings:?}: {text}");
        }
    }
}

#[test]
fn an_error_in_a_secret_does_not_show_it() {
    for (key, value) in [("api.keys", "web:hush"), ("api.keys", "hush")] {
        let Err(text) = load(&[], &[(key, value)]) else { panic!("accepted") };
        assert!(!text.contains("hush"), "{text}");
    }
}

/// The names of the secrets of a configuration file, with their kids.
fn secrets_of(file: &str, environment: &[(&str, &str)]) -> Vec<(String, Option<String>, String)> {
    let path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(path.path(), file).unwrap();
    let own = |(k, v): &(&str, &str)| ((*k).to_owned(), (*v).to_owned());
    let config = Config::load(ConfigSources {
        file: Some(path.path().to_owned()),
        environment: Some(environment.iter().map(own).collect()),
        flags: Vec::new(),
    })
    .unwrap_or_else(|errors| panic!("{errors}"));
    let Auth::Jwt(keys) = config.auth else { panic!("anonymous") };
    let secret = |secret: &JwtSecret| {
        let JwtSecret { name, kid, secret } = secret.clone();
        (name, kid, secret.expose_secret().to_owned())
    };
    keys.options().secrets.iter().map(secret).collect()
}

#[test]
fn secrets_of_tokens_come_from_tables_texts_and_files() {
    let [a, b, c] = ["a", "b", "c"].map(|letter| letter.repeat(32));
    let list = format!(
        "[auth]\nmode = \"jwt\"\njwt_secrets = [\"{a}\", {{ kid = \"k\", secret = \"{b}\" }}, \
         {{ secret = \"x:{c}\" }}]\n"
    );
    let entry = |name: &str, kid: Option<&str>, secret: &str| {
        (name.to_owned(), kid.map(str::to_owned), secret.to_owned())
    };
    let colon = format!("x:{c}");
    let expected = [
        entry("entry 1 of auth.jwt_secrets", None, &a),
        entry("k", Some("k"), &b),
        entry("entry 3 of auth.jwt_secrets", None, &colon),
    ];
    assert_eq!(secrets_of(&list, &[]), expected);
    let text = format!("{a}, k:{b},:{colon}");
    let jwt = "[auth]\nmode = \"jwt\"\n";
    assert_eq!(secrets_of(jwt, &[("GATEWAY__AUTH__JWT_SECRETS", &text)]), expected);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text.replace(',', "\n")).unwrap();
    let path = file.path().to_str().unwrap();
    assert_eq!(secrets_of(jwt, &[("GATEWAY__AUTH__JWT_SECRETS_FILE", path)]), expected);

    // The environment replaces the file, whichever of them names a file.
    std::fs::write(file.path(), format!("{c}\n")).unwrap();
    let (variable, of_file) = ("GATEWAY__AUTH__JWT_SECRET", "GATEWAY__AUTH__JWT_SECRET_FILE");
    let own = [entry("auth.jwt_secret", None, &c)];
    assert_eq!(secrets_of(&format!("{jwt}jwt_secret = \"{a}\""), &[(of_file, path)]), own);
    let named = format!("{jwt}jwt_secret_file = \"{path}\"");
    assert_eq!(secrets_of(&named, &[]), own);
    assert_eq!(secrets_of(&named, &[(variable, &a)])[0].2, a);
}

#[test]
fn an_anonymous_cluster_must_be_allowed() {
    let redis = ("GATEWAY__CLUSTER__REDIS_URL", "redis://127.0.0.1");
    assert!(load(&[redis], &[]).is_err());
    let allow = ("GATEWAY__AUTH__ALLOW_ANONYMOUS", "true");
    let Ok(config) = load(&[redis, allow], &[]) else { panic!("rejected") };
    assert!(config.http.warn_anonymous && !config.warnings.is_empty());
    let jwt = [("GATEWAY__AUTH__MODE", "jwt"), ("GATEWAY__AUTH__JWT_SECRET", &"x".repeat(32))];
    let Ok(config) = load(&[redis, allow, jwt[0], jwt[1]], &[]) else { panic!("rejected") };
    assert!(!config.http.warn_anonymous && config.warnings.is_empty());
}
