//! Statements that both databases share, and the differences between the two.

use std::fmt::Write as _;

use skein_protocol::ids::{RoomId, RoomKind};

/// The database of a statement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dialect {
    Sqlite,
    Postgres,
}

/// The rooms, or the inboxes: each has a table of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Scope {
    Rooms,
    Inboxes,
}

impl Scope {
    pub(crate) const ALL: [Self; 2] = [Self::Rooms, Self::Inboxes];

    /// The scope of a room; `None` for the online state of a user, which has no log.
    pub(crate) fn of(room: &RoomId) -> Option<Self> {
        match room.kind() {
            RoomKind::Room => Some(Self::Rooms),
            RoomKind::Inbox => Some(Self::Inboxes),
            RoomKind::Status => None,
        }
    }

    /// The table of entries.
    pub(crate) fn table(self) -> &'static str {
        match self {
            Self::Rooms => "messages",
            Self::Inboxes => "inbox_entries",
        }
    }

    /// The column of the room's or the user's id.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Rooms => "room",
            Self::Inboxes => "\"user\"",
        }
    }

    /// The column that only this table has: the searchable text, or the type of the frame.
    pub(crate) fn extra(self) -> &'static str {
        match self {
            Self::Rooms => "text",
            Self::Inboxes => "type",
        }
    }

    /// The value of `kind` in the tables `heads` and `deletions`.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Rooms => "room",
            Self::Inboxes => "inbox",
        }
    }

    /// The columns of the table that an insert sets.
    pub(crate) fn columns(self) -> String {
        format!(
            "{}, epoch, ordinal, seq, author, id, connection, flags, sender, kind, time, message, \
             payload, {}, bytes",
            self.name(),
            self.extra()
        )
    }
}

/// A value of a statement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SqlValue {
    Int(i64),
    Text(String),
    Texts(Vec<String>),
}

/// A statement with its values.
#[derive(Clone, Debug)]
pub(crate) struct Sql {
    pub(crate) dialect: Dialect,
    pub(crate) text: String,
    pub(crate) values: Vec<SqlValue>,
}

impl Sql {
    pub(crate) fn new(dialect: Dialect) -> Self {
        Self { dialect, text: String::new(), values: Vec::new() }
    }

    pub(crate) fn push(&mut self, text: &str) -> &mut Self {
        self.text.push_str(text);
        self
    }

    /// Appends the placeholder of a value.
    pub(crate) fn value(&mut self, value: SqlValue) -> &mut Self {
        self.values.push(value);
        let _ = write!(self.text, "${}", self.values.len());
        self
    }

    pub(crate) fn int(&mut self, value: i64) -> &mut Self {
        self.value(SqlValue::Int(value))
    }

    pub(crate) fn text(&mut self, value: impl Into<String>) -> &mut Self {
        self.value(SqlValue::Text(value.into()))
    }

    /// Appends a time in milliseconds since 1970, as a value of the column `time`.
    pub(crate) fn time(&mut self, ms: i64) -> &mut Self {
        match self.dialect {
            Dialect::Sqlite => self.int(ms),
            Dialect::Postgres => self.push("to_timestamp(").int(ms).push("::bigint / 1000.0)"),
        }
    }

    /// Appends the relation with the column `value` of these texts.
    pub(crate) fn relation(&mut self, texts: Vec<String>, alias: &str) -> &mut Self {
        match self.dialect {
            Dialect::Sqlite => {
                let json = serde_json::to_string(&texts).unwrap_or_default();
                self.push("json_each(").text(json).push(&format!(") AS {alias}"))
            }
            Dialect::Postgres => self
                .push("unnest(")
                .value(SqlValue::Texts(texts))
                .push(&format!("::text[]) AS {alias}(value)")),
        }
    }
}

/// The columns of an entry in a result, from the table or subquery `source`. `found` counts the
/// rows that a page was taken from.
pub(crate) fn entry_columns(scope: Scope, source: &str) -> String {
    let frame = match scope {
        Scope::Rooms => "'message'".to_owned(),
        Scope::Inboxes => format!("{source}.type"),
    };
    format!(
        "{source}.{name} AS name, {source}.epoch AS epoch, {source}.seq AS seq, \
         {source}.author AS author, {source}.id AS id, {source}.connection AS connection, \
         CAST({source}.flags AS bigint) AS flags, {frame} AS frame, {source}.message AS message, \
         {source}.payload AS payload, sized.found AS found",
        name = scope.name(),
    )
}

/// The columns that the rows of a page are chosen by, and the source of the entries around them.
///
/// SQLite would copy whole messages while it sorts, so only their rows are sorted there, and the
/// entries joined.
pub(crate) fn page_source(dialect: Dialect, scope: Scope) -> (&'static str, &'static str, String) {
    match dialect {
        Dialect::Sqlite => {
            let join = format!(" JOIN {} AS source ON source.entry = sized.entry", scope.table());
            ("entries.entry", "source", join)
        }
        Dialect::Postgres => ("entries.*", "sized", String::new()),
    }
}
