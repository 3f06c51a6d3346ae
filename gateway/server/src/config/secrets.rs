//! Secrets in the configuration: read from files of their own, and shown without what is secret.

use std::{
    fs::File,
    io::{self, Read as _},
    path::Path,
};

use skein_redis::topology::url::RedisUrl;

use super::auth::{JwtSecretEntry, NamedKey};

/// Largest file of a secret, in bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024;

/// The form of a secret, so that it can be shown without the secret part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SecretKind {
    /// A text.
    Text,
    /// A URL of Redis with a password.
    Url,
    /// A URL of a database with a password.
    DatabaseUrl,
    /// A list of secrets, some with a `kid`.
    JwtSecrets,
    /// A list of keys with names.
    ApiKeys,
}

/// How the lines of a file form a value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SecretLines {
    /// One line is the value.
    One,
    /// Each line is an entry, or several separated by commas.
    List,
}

impl SecretKind {
    /// How the lines of a file form a value.
    pub(super) fn lines(self) -> SecretLines {
        match self {
            Self::Text | Self::Url | Self::DatabaseUrl => SecretLines::One,
            Self::JwtSecrets | Self::ApiKeys => SecretLines::List,
        }
    }

    /// The value without what is secret.
    pub(super) fn shown(self, text: &str) -> String {
        const HIDDEN: &str = "(hidden)";
        let entries = || text.split(',').map(str::trim).filter(|entry| !entry.is_empty());
        let named = |name: Option<String>| match name {
            Some(name) => format!("{name}:{HIDDEN}"),
            None => HIDDEN.to_owned(),
        };
        let entries: Vec<String> = match self {
            _ if text.is_empty() => Vec::new(),
            Self::Text => vec![HIDDEN.to_owned()],
            Self::Url => {
                let url = text.parse::<RedisUrl>();
                vec![url.map_or(HIDDEN.to_owned(), |url| url.to_string())]
            }
            Self::DatabaseUrl => {
                vec![database_url(text).unwrap_or_else(|| HIDDEN.to_owned())]
            }
            Self::JwtSecrets => {
                let kid = |entry: &str| entry.parse::<JwtSecretEntry>().ok()?.kid;
                entries().map(|entry| named(kid(entry))).collect()
            }
            Self::ApiKeys => {
                let name = |entry: &str| Some(entry.parse::<NamedKey>().ok()?.name);
                entries().map(|entry| named(name(entry))).collect()
            }
        };
        entries.join(",")
    }
}

/// A URL of a database without its password; `None` if it has another form.
fn database_url(text: &str) -> Option<String> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return matches!(text, "auto" | "off").then(|| text.to_owned());
    };
    match scheme {
        "sqlite" => Some(text.to_owned()),
        // Options may have a password as well.
        "postgres" | "postgresql" if !rest.contains('?') => {
            let (login, place) = rest.rsplit_once('@').unwrap_or(("", rest));
            let shown = match login.split_once(':') {
                Some((user, _)) => format!("{user}:…@"),
                None if login.is_empty() => String::new(),
                None => format!("{login}@"),
            };
            Some(format!("{scheme}://{shown}{place}"))
        }
        _ => None,
    }
}

/// Reads a secret from a file. The line breaks at its end do not belong to it.
///
/// # Errors
///
/// A text that does not contain the secret.
pub(super) fn read_secret_file(path: &Path, lines: SecretLines) -> Result<String, String> {
    check_regular(path)?;
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|error| cannot_read(&error))?;
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|error| cannot_read(&error))?;
    if bytes.len() as u64 > FILE_BYTES_MAX {
        return Err(format!("the file is larger than {FILE_BYTES_MAX} bytes"));
    }
    let text = String::from_utf8(bytes).map_err(|_| "the file is not UTF-8")?;
    if text.starts_with('\u{feff}') {
        return Err(
            "the file begins with a byte order mark: save it as UTF-8 without one".to_owned()
        );
    }
    let text = text.trim_end_matches(['\r', '\n']);
    if text.is_empty() {
        return Err("the file is empty".to_owned());
    }
    match lines {
        SecretLines::One if text.contains('\n') => {
            Err("the file has more than one line".to_owned())
        }
        SecretLines::One => Ok(text.to_owned()),
        SecretLines::List => Ok(text.lines().collect::<Vec<_>>().join(",")),
    }
}

/// Checks that a path leads to a file, directly or by links: a pipe or a device would block the process
/// until another one writes.
///
/// # Errors
///
/// A text for the operator.
pub(super) fn check_regular(path: &Path) -> Result<(), String> {
    match std::fs::metadata(path) {
        Ok(found) if found.is_file() => Ok(()),
        Ok(_) => Err("it is not a regular file".to_owned()),
        Err(error) => Err(cannot_read(&error)),
    }
}

fn cannot_read(error: &io::Error) -> String {
    format!("cannot read the file with the secret: {error}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8], lines: SecretLines) -> Result<String, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        read_secret_file(file.path(), lines)
    }

    #[test]
    fn line_breaks_at_the_end_of_a_file_are_trimmed() {
        for text in ["s", "s\n", "s\r\n", "s\n\n"] {
            assert_eq!(read(text.as_bytes(), SecretLines::One).as_deref(), Ok("s"), "{text:?}");
        }
        assert_eq!(read(b" s \n", SecretLines::One).as_deref(), Ok(" s "));
        assert_eq!(read(b"a\nb,c\n", SecretLines::List).as_deref(), Ok("a,b,c"));
        for (bytes, expected) in [
            (&b""[..], "empty"),
            (b"\n", "empty"),
            (b"hush\nhush\n", "more than one line"),
            (b"hush\xFF", "not UTF-8"),
            (b"\xEF\xBB\xBFhush", "byte order mark"),
            (&[b'x'; 70_000], "larger than 65536"),
        ] {
            let error = read(bytes, SecretLines::One).unwrap_err();
            assert!(error.contains(expected) && !error.contains("hush"), "{error}");
        }
        let missing = read_secret_file("/nonexistent/secret".as_ref(), SecretLines::One);
        assert!(missing.unwrap_err().contains("No such file"));
        // A pipe without a writer would block for ever.
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().unwrap();
        assert!(made.success());
        for other in [&pipe, folder.path()] {
            let error = read_secret_file(other, SecretLines::One).unwrap_err();
            assert!(error.contains("not a regular file"), "{error}");
        }
    }

    #[test]
    fn a_shown_secret_has_names_and_nothing_secret() {
        let secret = "hush-hush-hush-hush-hush-hush-hush";
        for (kind, text, expected) in [
            (SecretKind::Text, secret.to_owned(), "(hidden)"),
            (SecretKind::Text, String::new(), ""),
            (SecretKind::Url, format!("redis://me:{secret}@h:1/2"), "redis://me:…@h:1/2"),
            (SecretKind::Url, format!("nonsense {secret}"), "(hidden)"),
            (SecretKind::DatabaseUrl, "auto".to_owned(), "auto"),
            (SecretKind::DatabaseUrl, "sqlite://a/b.db".to_owned(), "sqlite://a/b.db"),
            (SecretKind::DatabaseUrl, format!("postgres://me:{secret}@h/d"), "postgres://me:…@h/d"),
            (SecretKind::DatabaseUrl, format!("postgres://h/d?password={secret}"), "(hidden)"),
            (SecretKind::DatabaseUrl, format!("mysql://me:{secret}@h/d"), "(hidden)"),
            (SecretKind::JwtSecrets, format!("k2:{secret},{secret}"), "k2:(hidden),(hidden)"),
            (SecretKind::ApiKeys, format!("web:{secret}, {secret}"), "web:(hidden),(hidden)"),
        ] {
            assert_eq!(kind.shown(&text), expected);
        }
    }
}
