//! The configuration file that `gateway init` writes.

use std::fmt::Write as _;

use super::{Config, OptionDoc};

/// Longest line of a comment, in characters.
const LINE_CHARS_MAX: usize = 100;

/// Fresh secrets for a new configuration file.
pub struct FreshSecrets {
    /// Key that signs tokens.
    pub jwt_secret: String,
    /// Key of the server API.
    pub api_key: String,
}

impl Config {
    /// Returns a configuration file with all options: `auth.mode = "jwt"` and the secrets are set,
    /// the others are comments with their defaults.
    pub fn template(secrets: &FreshSecrets) -> String {
        let mut file = String::from(
            "# Configuration of a Skein gateway. Every option that is not set here has the default that is\n\
             # written in its comment. Environment variables (GATEWAY__SECTION__KEY) and `--set` replace\n\
             # values of this file. `gateway check-config` finds mistakes, `gateway print-config` shows what\n\
             # holds. This file has secrets: keep its mode 0600.\n",
        );
        let mut section = "";
        for OptionDoc { key, default, text, .. } in Self::defaults() {
            let (of, name) = key.split_once('.').unwrap_or(("", key));
            if of != section {
                section = of;
                let _ = writeln!(file, "\n[{section}]");
            }
            write_comment(&mut file, text);
            let _ = match key {
                "auth.mode" => writeln!(file, "mode = \"jwt\""),
                "auth.jwt_secret" => writeln!(file, "jwt_secret = \"{}\"", secrets.jwt_secret),
                "api.keys" => writeln!(file, "keys = [\"admin:{}\"]", secrets.api_key),
                _ => writeln!(file, "#{name} = \"{default}\""),
            };
        }
        file
    }
}

/// Writes a text as comment lines.
fn write_comment(file: &mut String, text: &str) {
    let mut line = String::from("#");
    for word in text.split_whitespace() {
        if line.chars().count() + 1 + word.chars().count() > LINE_CHARS_MAX {
            let _ = writeln!(file, "{line}");
            line.truncate(1);
        }
        let _ = write!(line, " {word}");
    }
    let _ = writeln!(file, "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ConfigSources;

    #[test]
    fn the_template_is_a_valid_file_with_and_without_comments() {
        let secrets = FreshSecrets {
            jwt_secret: "s".repeat(48),
            api_key: "0123456789abcdef0123456789abcdef".to_owned(),
        };
        let template = Config::template(&secrets);
        assert!(template.lines().all(|line| line.chars().count() <= LINE_CHARS_MAX), "{template}");
        // An option begins directly behind the `#`, a text with a space.
        let is_option = |line: &str| {
            line.strip_prefix('#').is_some_and(|line| line.starts_with(|c: char| c.is_lowercase()))
        };
        let all = template.lines().map(|line| if is_option(line) { &line[1..] } else { line });
        let all: String = all.map(|line| format!("{line}\n")).collect();
        for (text, options) in [(&template, 3), (&all, Config::defaults().len())] {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), text).unwrap();
            let (given, config) = Config::explain(ConfigSources {
                file: Some(file.path().to_owned()),
                environment: Some(Default::default()),
                flags: Vec::new(),
            });
            assert!(config.is_ok(), "{:?}", config.err());
            assert_eq!(given.iter().filter(|option| option.is_given()).count(), options);
        }
    }
}
