//! Reads options by key and collects every mistake.
//!
//! Values stay text until an option parses them. `serde` is not in between, since it stops at the
//! first mistake.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    path::PathBuf,
    str::FromStr,
};

use config::{Environment, File, FileFormat, Map, Value, ValueKind};

use super::{aliases, values::Bounds};

/// File that is read if it exists and no other file is named.
pub const DEFAULT_FILE: &str = "gateway.toml";

/// Sources of values besides the defaults.
#[derive(Clone, Debug, Default)]
pub struct ConfigSources {
    /// File that must exist. `None`: [`DEFAULT_FILE`] is read if it exists.
    pub file: Option<PathBuf>,
    /// Environment variables `GATEWAY__SECTION__KEY`. `None`: those of this process.
    pub environment: Option<Map<String, String>>,
    /// Keys and values of `--set`.
    pub flags: Vec<(String, String)>,
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

impl Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "invalid configuration, {} error(s):", self.0.len())?;
        for ConfigError { key, message } in &self.0 {
            let variable = key.to_uppercase().replace('.', "__");
            write!(f, "\n  {key} (GATEWAY__{variable}): {message}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Declaration of an option, and its value.
#[derive(Clone, Debug)]
pub(super) struct OptionDoc {
    pub(super) key: &'static str,
    pub(super) default: String,
    pub(super) text: &'static str,
    /// Effective value, for errors that name it.
    value: String,
    is_given: bool,
}

impl OptionDoc {
    /// Declares an option.
    pub(super) fn new(key: &'static str, default: impl Into<String>, text: &'static str) -> Self {
        let default = default.into();
        Self { key, value: default.clone(), default, text, is_given: false }
    }
}

/// Reads values by key and collects errors.
pub(super) struct OptionReader {
    values: BTreeMap<String, String>,
    /// Former names that the sources use, by their present names.
    former: BTreeMap<&'static str, &'static str>,
    pub(super) warnings: Vec<String>,
    errors: Vec<ConfigError>,
    pub(super) described: Vec<OptionDoc>,
}

impl OptionReader {
    /// Reads all sources.
    pub(super) fn new(sources: ConfigSources) -> Result<Self, ConfigErrors> {
        let mut builder = config::Config::builder();
        builder = match sources.file {
            Some(path) => builder.add_source(File::from(path).format(FileFormat::Toml)),
            None => builder.add_source(File::new(DEFAULT_FILE, FileFormat::Toml).required(false)),
        };
        // Values stay text until an option reads them: guessing types would turn the id `1e5`
        // into 100000.
        let environment = Environment::with_prefix("GATEWAY")
            .prefix_separator("__")
            .separator("__")
            .ignore_empty(true)
            .source(sources.environment);
        builder = builder.add_source(environment);
        let mut errors = Vec::new();
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
        match builder.build().and_then(config::Config::try_deserialize::<Map<String, Value>>) {
            Ok(tables) => flatten("", tables, &mut values),
            Err(error) => {
                let key = "the configuration file".to_owned();
                errors.push(ConfigError { key, message: error.to_string() });
            }
        }
        if errors.is_empty() { Ok(Self::of(values)) } else { Err(ConfigErrors(errors)) }
    }

    /// Reads options from `values`, by key.
    pub(super) fn of(mut values: BTreeMap<String, String>) -> Self {
        let aliases::Resolved { warnings, contradictions, former } = aliases::resolve(&mut values);
        let error = |(key, message)| ConfigError { key, message };
        let errors = contradictions.into_iter().map(error).collect();
        Self { values, former, warnings, errors, described: Vec::new() }
    }

    /// Reads an option.
    pub(super) fn value<T: FromStr<Err: Display>>(&mut self, option: OptionDoc) -> T {
        self.parse(option, |value, error| format!("`{value}`: {error}"))
    }

    /// Reads an option whose value does not appear in errors.
    pub(super) fn secret<T: FromStr<Err: Display>>(&mut self, option: OptionDoc) -> T {
        self.parse(option, |_, error: &T::Err| error.to_string())
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
        if let Some(text) = &given {
            match text.parse() {
                Ok(parsed) => value = Some(parsed),
                Err(error) => self.error(key, message(text, &error)),
            }
        }
        let value = value.unwrap_or_else(|| match option.default.parse() {
            Ok(value) => value,
            Err(error) => unreachable!("the default of {key} is {}: {error}", option.default),
        });
        let is_given = given.is_some();
        self.described.push(OptionDoc { value: given.unwrap_or(option.value), is_given, ..option });
        value
    }

    /// Reports an error unless `key` has its default, which contradicts no other option.
    pub(super) fn contradiction(&mut self, key: &str, other: &str, reason: &str) {
        let of = |key: &str| self.described.iter().find(|option| option.key == key);
        let (Some(option), Some(other)) = (of(key), of(other)) else { return };
        if option.is_given || key == "heartbeat.interval" {
            let (value, other, limit) = (&option.value, other.key, &other.value);
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

    /// Returns all errors, if there are any.
    pub(super) fn finish(mut self) -> Result<(), ConfigErrors> {
        let known: Vec<&str> = self.described.iter().map(|option| option.key).collect();
        for key in self.values.into_keys() {
            let message = match nearest(&key, &known) {
                Some(known) => format!("unknown option; did you mean `{known}`?"),
                None => "unknown option".to_owned(),
            };
            self.errors.push(ConfigError { key, message });
        }
        if self.errors.is_empty() { Ok(()) } else { Err(ConfigErrors(self.errors)) }
    }
}

/// Flattens tables to dotted keys, and lists to text separated by commas.
fn flatten(prefix: &str, table: Map<String, Value>, values: &mut BTreeMap<String, String>) {
    for (key, value) in table {
        let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value.kind {
            ValueKind::Table(table) => flatten(&key, table, values),
            ValueKind::Array(items) => {
                let items: Vec<String> = items.iter().map(ToString::to_string).collect();
                values.insert(key, items.join(","));
            }
            ValueKind::Nil => {}
            kind => {
                values.insert(key, kind.to_string());
            }
        }
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
