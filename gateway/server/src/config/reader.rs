//! Reads options by key and collects every mistake.
//!
//! Values stay text until an option parses them. `serde` is not in between, since it stops at the
//! first mistake. Each value keeps its source, and no error repeats the value of a secret.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    path::PathBuf,
    str::FromStr,
};

use config::{
    ConfigError as SourceError, Environment, File, FileFormat, Map, Source as _, Value, ValueKind,
};

use super::{
    aliases,
    secrets::{SecretKind, SecretLines, check_regular, read_secret_file},
    values::Bounds,
};

/// File that is read if it exists and no other file is named.
pub const DEFAULT_FILE: &str = "gateway.toml";

/// Sources of values besides the defaults. They may have secrets.
#[derive(Clone, Default)]
pub struct ConfigSources {
    /// File that must exist. `None`: [`DEFAULT_FILE`] is read if it exists.
    pub file: Option<PathBuf>,
    /// Environment variables `GATEWAY__SECTION__KEY`. `None`: those of this process.
    pub environment: Option<Map<String, String>>,
    /// Keys and values of `--set`.
    pub flags: Vec<(String, String)>,
}

/// Source of the value of an option. A later one replaces an earlier one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum ValueSource {
    /// No source has the option.
    Default,
    /// The configuration file, by its path.
    File(String),
    /// The environment variable of the option.
    Environment,
    /// `--set`
    Flag,
}

/// A value that a source has for an option.
#[derive(Clone)]
pub(super) struct GivenValue {
    pub(super) text: String,
    pub(super) source: ValueSource,
    /// The file that the value was read from, for a secret in a file of its own.
    secret_file: Option<String>,
}

impl GivenValue {
    pub(super) fn new(text: impl Into<String>, source: ValueSource) -> Self {
        Self { text: text.into(), source, secret_file: None }
    }
}

/// Declares the options of a section: a struct with a field per option, and its `read`.
///
/// The comment of a field is the text in `docs/configuration.md`, the default is written as in a
/// configuration. After the default may stand the method of [`OptionReader`] that reads the option,
/// if it is not [`value`](OptionReader::value), and its argument.
macro_rules! options {
    (
        $(#[doc = $about:literal])+
        $name:ident in $section:literal {
            $(
                $(#[doc = $text:literal])+
                $key:ident: $type:ty = $default:expr $(, $method:ident $($argument:expr)?)?;
            )+
        }
    ) => {
        $(#[doc = $about])+
        pub(super) struct $name {
            $($(#[doc = $text])+ pub(super) $key: $type,)+
        }

        impl $name {
            /// Reads the options of the section.
            pub(super) fn read(reader: &mut $crate::config::reader::OptionReader) -> Self {
                $(
                    let key = concat!($section, ".", stringify!($key));
                    let text = concat!($($text),+).trim_start();
                    let option = $crate::config::reader::OptionDoc::new(key, $default, text);
                    let $key = options!(@read reader option $(, $method $($argument)?)?);
                )+
                Self { $($key),+ }
            }
        }
    };
    (@read $reader:ident $option:ident) => { $reader.value($option) };
    (@read $reader:ident $option:ident, $method:ident $($argument:expr)?) => {
        $reader.$method($option $(, $argument)?)
    };
}
pub(super) use options;

/// All errors of a configuration.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigErrors(Vec<ConfigError>);

#[derive(Debug, PartialEq, Eq)]
struct ConfigError {
    key: String,
    message: String,
}

impl ConfigErrors {
    /// An error of a source as a whole.
    pub fn one(source: &str, message: String) -> Self {
        Self(vec![ConfigError { key: source.to_owned(), message }])
    }

    /// The errors, one after the other.
    pub fn iter(&self) -> impl Iterator<Item = &(dyn Display + '_)> {
        self.0.iter().map(|error| error as &dyn Display)
    }
}

impl Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid configuration, {} error(s):", self.0.len())?;
        for error in &self.0 {
            write!(f, "\n  {error}")?;
        }
        Ok(())
    }
}

impl Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { key, message } = self;
        match key.contains(' ') {
            true => write!(f, "{key}: {message}"),
            false => write!(f, "{key} ({}): {message}", variable_of(key)),
        }
    }
}

/// The environment variable of an option.
fn variable_of(key: &str) -> String {
    format!("GATEWAY__{}", key.to_uppercase().replace('.', "__"))
}

impl std::error::Error for ConfigErrors {}

/// Declaration of an option, and its value.
#[derive(Clone)]
pub struct OptionDoc {
    pub(super) key: &'static str,
    pub(super) default: String,
    pub(super) text: &'static str,
    /// `None` if the value may be shown.
    pub(super) secret: Option<SecretKind>,
    value: GivenValue,
}

/// Keeps secrets out of logs.
impl fmt::Debug for OptionDoc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} = {} ({})", self.key, self.shown(), self.source())
    }
}

impl OptionDoc {
    /// Declares an option.
    pub(super) fn new(key: &'static str, default: impl Into<String>, text: &'static str) -> Self {
        let default = default.into();
        let value = GivenValue::new(default.clone(), ValueSource::Default);
        Self { key, value, default, text, secret: None }
    }

    /// Key of the option.
    pub fn key(&self) -> &'static str {
        self.key
    }

    /// The key and the value, if a source has the option.
    pub(super) fn given(&self) -> Option<(String, GivenValue)> {
        self.is_given().then(|| (self.key.to_owned(), self.value.clone()))
    }

    /// Whether the option has another value.
    pub fn differs(&self, other: &Self) -> bool {
        self.value.text != other.value.text
    }

    /// Whether the configuration file has the option.
    pub fn is_from_file(&self) -> bool {
        matches!(self.value.source, ValueSource::File(_))
    }

    /// Whether a source has the option.
    pub fn is_given(&self) -> bool {
        self.value.source != ValueSource::Default
    }

    /// Effective value; of a secret only what is not secret.
    pub fn shown(&self) -> String {
        match self.secret {
            Some(kind) => kind.shown(&self.value.text),
            None => without_login(&self.value.text).to_owned(),
        }
    }

    /// Source of the value, for people.
    pub fn source(&self) -> String {
        let source = match &self.value.source {
            ValueSource::Default => "default".to_owned(),
            ValueSource::File(path) => format!("file {path}"),
            ValueSource::Environment => {
                let file = if self.value.secret_file.is_some() { "_FILE" } else { "" };
                format!("environment variable {}{file}", variable_of(self.key))
            }
            ValueSource::Flag => "--set".to_owned(),
        };
        match &self.value.secret_file {
            Some(path) => format!("secret file {path}, named by {source}"),
            None => source,
        }
    }
}

/// Reads values by key and collects errors.
pub(super) struct OptionReader {
    values: BTreeMap<String, GivenValue>,
    /// Former names that the sources use, by their present names.
    former: BTreeMap<&'static str, &'static str>,
    pub(super) warnings: Vec<String>,
    errors: Vec<ConfigError>,
    /// Keys of secrets whose files cannot be read.
    unreadable: Vec<String>,
    pub(super) described: Vec<OptionDoc>,
}

impl OptionReader {
    /// Reads all sources.
    pub(super) fn new(sources: ConfigSources) -> Result<Self, ConfigErrors> {
        let path = sources.file.clone().unwrap_or_else(|| DEFAULT_FILE.into());
        if path.exists()
            && let Err(message) = check_regular(&path)
        {
            return Err(ConfigErrors::one(&path.display().to_string(), message));
        }
        let mut builder = config::Config::builder();
        builder = match sources.file {
            Some(path) => builder.add_source(File::from(path).format(FileFormat::Toml)),
            None => builder.add_source(File::new(DEFAULT_FILE, FileFormat::Toml).required(false)),
        };
        let mut errors = Vec::new();
        let environment = sources.environment.unwrap_or_else(|| variables(&mut errors));
        // Values stay text until an option reads them: guessing types would turn the id `1e5`
        // into 100000.
        let environment = Environment::with_prefix("GATEWAY")
            .prefix_separator("__")
            .separator("__")
            .ignore_empty(true)
            .source(Some(environment));
        builder = builder.add_source(environment);
        for (key, value) in sources.flags {
            builder = match builder.clone().set_override(&key, value) {
                Ok(builder) => builder,
                Err(error) => {
                    errors.push(ConfigError { key, message: error.to_string() });
                    builder
                }
            };
        }
        let mut values = BTreeMap::new();
        // Deserialization would lose the sources.
        match builder.build().and_then(|config| config.collect()) {
            Ok(tables) => flatten("", tables, &mut values, &mut errors),
            Err(error) => {
                let key = "the configuration file".to_owned();
                errors.push(ConfigError { key, message: without_excerpt(&error) });
            }
        }
        if errors.is_empty() { Ok(Self::of(values)) } else { Err(ConfigErrors(errors)) }
    }

    /// Reads options from `values`, by key.
    pub(super) fn of(mut values: BTreeMap<String, GivenValue>) -> Self {
        let aliases::Resolved { warnings, contradictions, former } = aliases::resolve(&mut values);
        let error = |(key, message)| ConfigError { key, message };
        let errors = contradictions.into_iter().map(error).collect();
        Self { values, former, warnings, errors, unreadable: Vec::new(), described: Vec::new() }
    }

    /// Reads an option.
    pub(super) fn value<T: FromStr<Err: Display>>(&mut self, option: OptionDoc) -> T {
        self.parse(option, |value, error| format!("`{}`: {error}", without_login(value)))
    }

    /// Reads an option whose value appears neither in errors nor anywhere else. A file may hold it,
    /// which an option with the suffix `_file` names.
    pub(super) fn secret<T: FromStr<Err: Display>>(
        &mut self,
        option: OptionDoc,
        kind: SecretKind,
    ) -> T {
        self.take_secret_file(option.key, kind.lines());
        let option = OptionDoc { secret: Some(kind), ..option };
        self.parse(option, |_, error: &T::Err| error.to_string())
    }

    /// Replaces the path in `<key>_file` by the value of `key`, unless a later source has a value.
    fn take_secret_file(&mut self, key: &str, lines: SecretLines) {
        let file_key = format!("{key}_file");
        let Some(file) = self.values.remove(&file_key) else { return };
        match self.values.get(key) {
            Some(value) if value.source > file.source => return,
            Some(value) if file.source == value.source => {
                let text = format!("conflicts with {key}: set one of them");
                self.error(&file_key, text);
                return;
            }
            _ => {}
        }
        match read_secret_file(file.text.as_ref(), lines) {
            Ok(text) => {
                let value = GivenValue { text, secret_file: Some(file.text), ..file };
                self.values.insert(key.to_owned(), value);
            }
            Err(error) => {
                self.error(&file_key, format!("{}: {error}", file.text));
                // The value is unknown, which is no further mistake.
                self.unreadable.push(key.to_owned());
            }
        }
    }

    /// Whether a source names a file for the value of a secret, and it cannot be read.
    pub(super) fn is_unreadable(&self, key: &str) -> bool {
        self.unreadable.iter().any(|unreadable| unreadable == key)
    }

    /// Reads an option that has bounds.
    pub(super) fn within<T: FromStr<Err: Display> + PartialOrd>(
        &mut self,
        option: OptionDoc,
        bounds: impl Into<Bounds<T>>,
    ) -> T {
        let (key, Bounds { range, text }) = (option.key, bounds.into());
        let value = self.value(option);
        if !range.contains(&value) {
            self.error(key, format!("must be {text}"));
        }
        value
    }

    /// Reads an option whose value is one of several words.
    pub(super) fn one_of<T: Copy>(&mut self, option: OptionDoc, words: &[(&str, T)]) -> T {
        let key = option.key;
        let word: String = self.value(option);
        if let Some((_, value)) = words.iter().find(|(name, _)| *name == word) {
            return *value;
        }
        let names: Vec<_> = words.iter().map(|(name, _)| *name).collect();
        self.error(key, format!("`{word}` is not one of {}", names.join(", ")));
        words[0].1
    }

    fn parse<T: FromStr<Err: Display>>(
        &mut self,
        option: OptionDoc,
        message: impl Fn(&str, &T::Err) -> String,
    ) -> T {
        let key = option.key;
        let given = self.values.remove(key);
        let mut value = None;
        if let Some(GivenValue { text, .. }) = &given {
            match text.parse() {
                Ok(parsed) => value = Some(parsed),
                Err(error) => self.error(key, message(text, &error)),
            }
        }
        let value = value.unwrap_or_else(|| match option.default.parse() {
            Ok(value) => value,
            Err(error) => unreachable!("the default of {key} is {}: {error}", option.default),
        });
        self.described.push(OptionDoc { value: given.unwrap_or(option.value), ..option });
        value
    }

    /// Reports an error unless `key` has its default, which contradicts no other option.
    pub(super) fn contradiction(&mut self, key: &str, other: &str, reason: &str) {
        let of = |key: &str| self.described.iter().find(|option| option.key == key);
        let (Some(option), Some(other)) = (of(key), of(other)) else { return };
        if option.is_given() || key == "heartbeat.interval" {
            let (value, other, limit) = (option.shown(), other.key, other.shown());
            let message = format!("`{value}` contradicts {other} = `{limit}`: {key} {reason}");
            self.error(key, message);
        }
    }

    /// Adds a warning.
    pub(super) fn warn(&mut self, warning: impl Into<String>) {
        self.warnings.push(warning.into());
    }

    /// Adds an error.
    pub(super) fn error(&mut self, key: &str, message: impl Into<String>) {
        let message = message.into();
        let message = match self.former.get(key) {
            Some(old) => format!("{message} (set by its former name {old})"),
            None => message,
        };
        self.errors.push(ConfigError { key: key.to_owned(), message });
    }

    /// Returns all options, and all errors.
    pub(super) fn finish(mut self) -> (Vec<OptionDoc>, Result<(), ConfigErrors>) {
        let known: Vec<&str> = self.described.iter().map(|option| option.key).collect();
        for key in self.values.into_keys() {
            let message = match nearest(&key, &known) {
                Some(known) => format!("unknown option; did you mean `{known}`?"),
                None => "unknown option".to_owned(),
            };
            self.errors.push(ConfigError { key, message });
        }
        let result = if self.errors.is_empty() { Ok(()) } else { Err(ConfigErrors(self.errors)) };
        (self.described, result)
    }
}

/// The environment variables of this process that are options.
fn variables(errors: &mut Vec<ConfigError>) -> Map<String, String> {
    let mut variables = Map::new();
    for (name, value) in std::env::vars_os() {
        let Ok(name) = name.into_string() else { continue };
        if !name.to_uppercase().starts_with("GATEWAY__") {
            continue;
        }
        match value.into_string() {
            Ok(value) => drop(variables.insert(name, value)),
            // The value may be a secret.
            Err(_) => errors.push(ConfigError {
                key: format!("the environment variable {name}"),
                message: "its value is not UTF-8".to_owned(),
            }),
        }
    }
    variables
}

/// The text, unless it is a URL with what may be a user and a password.
fn without_login(text: &str) -> &str {
    let is_url = text.split_once("://").is_some_and(|(_, rest)| rest.contains('@'));
    if is_url { "…" } else { text }
}

/// The text of an error without the line of the file that it concerns, which may be a secret.
fn without_excerpt(error: &SourceError) -> String {
    let is_excerpt = |line: &str| {
        let line = line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ');
        line.starts_with('|')
    };
    let text = error.to_string();
    text.lines().filter(|line| !is_excerpt(line)).collect::<Vec<_>>().join(": ")
}

/// Flattens tables to dotted keys, and lists to text separated by commas.
fn flatten(
    prefix: &str,
    table: Map<String, Value>,
    values: &mut BTreeMap<String, GivenValue>,
    errors: &mut Vec<ConfigError>,
) {
    for (key, value) in table {
        let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        let source = match value.origin() {
            None => ValueSource::Flag,
            Some(ENVIRONMENT) => ValueSource::Environment,
            Some(path) => ValueSource::File(path.to_owned()),
        };
        match value.kind {
            ValueKind::Table(table) => flatten(&key, table, values, errors),
            ValueKind::Array(items) => {
                let items: Result<Vec<String>, _> = items.into_iter().map(list_item).collect();
                match items {
                    Ok(items) => {
                        values.insert(key, GivenValue::new(items.join(","), source));
                    }
                    Err(message) => errors.push(ConfigError { key, message: message.to_owned() }),
                }
            }
            ValueKind::Nil => {}
            kind => {
                values.insert(key, GivenValue::new(kind.to_string(), source));
            }
        }
    }
}

/// How [`Environment`] names itself as the origin of a value.
const ENVIRONMENT: &str = "the environment";

/// The text of an item of a list. A table `{ kid = "a", secret = "b" }` or `{ name = "a", key =
/// "b" }` becomes `a:b`.
fn list_item(item: Value) -> Result<String, &'static str> {
    const SHAPE: &str =
        "an entry that is a table consists of `kid` and `secret`, or `name` and `key`";
    let text = match item.kind {
        ValueKind::Table(mut table) => {
            let mut take = |key: &str| table.remove(key).map(|value| value.to_string());
            let entry = match (take("secret"), take("kid"), take("key"), take("name")) {
                (Some(secret), kid, None, None) => (kid.unwrap_or_default(), secret),
                (None, None, Some(key), Some(name)) => (name, key),
                _ => return Err(SHAPE),
            };
            if !table.is_empty() {
                return Err(SHAPE);
            }
            format!("{}:{}", entry.0, entry.1)
        }
        ValueKind::Array(_) => return Err("an entry of a list must not be a list"),
        kind => kind.to_string(),
    };
    match text.contains(',') {
        true => Err("an entry of a list must not contain a comma"),
        false => Ok(text),
    }
}

/// Returns a known key that is similar to `key`.
fn nearest<'a>(key: &str, known: &[&'a str]) -> Option<&'a str> {
    let same = |known: &str| {
        let ends = |text: &str| text.rsplit('.').next().map(str::to_owned);
        let common = key.bytes().zip(known.bytes()).take_while(|(a, b)| a == b).count();
        let longest = key.len().max(known.len());
        ends(key) == ends(known) || common * 4 >= longest * 3
    };
    known.iter().copied().find(|known| same(known))
}
