//! Validates the fields of an envelope, which are well-formed JSON that clients of the room may
//! receive, and finds a field in them.
//!
//! Frames copy the fields unchanged, so that delivery parses no JSON. Fields from a log or a
//! subscription are checked here instead, once, where they enter the process. This runs for every
//! entry that a node receives, so it builds nothing: it scans the bytes at some GB/s.

use std::str::FromStr;

use uuid::{Uuid, fmt::Hyphenated};

use super::FrameType;

/// Fields that a frame has before those of the envelope, and that must not occur twice.
const RESERVED: [&[u8]; 4] = [b"type", b"epoch", b"seq", b"replay"];

/// The requirements on the fields.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpectedFields<'a> {
    pub(super) frame: FrameType,
    pub(super) id: Uuid,
    /// The room of a message; `None` in an inbox.
    pub(super) room: Option<&'a str>,
    /// Whether the content is a binary payload beside the fields.
    pub(super) binary: bool,
}

impl ExpectedFields<'_> {
    /// Whether `fields` meet the requirements.
    pub(super) fn matches(self, fields: &[u8]) -> bool {
        std::str::from_utf8(fields).is_ok() && self.matches_json(fields) == Some(true)
    }

    /// `None` if the fields are not JSON.
    fn matches_json(self, fields: &[u8]) -> Option<bool> {
        let mut id = [0; Hyphenated::LENGTH];
        let id = self.id.hyphenated().encode_lower(&mut id).as_bytes();
        let mut scanner = JsonScanner { bytes: fields, at: 0 };
        let mut seen = SeenFields::default();
        loop {
            let name = scanner.field_name()?;
            let begins = scanner.at;
            scanner.value()?;
            let value = &fields[begins..scanner.at];
            let is_right = match name {
                b"id" => seen.mark_seen(&mut |seen| &mut seen.id) && unquoted(value) == Some(id),
                b"room" => {
                    let room = self.room.map(str::as_bytes);
                    seen.mark_seen(&mut |seen| &mut seen.room) && unquoted(value) == room
                }
                b"from" => seen.mark_seen(&mut |seen| &mut seen.from) && value[0] == b'{',
                b"to" => seen.mark_seen(&mut |seen| &mut seen.to) && value[0] == b'"',
                b"timestamp" => seen.mark_seen(&mut |seen| &mut seen.timestamp) && value[0] == b'"',
                b"content" | b"encoding" => {
                    seen.content = true;
                    !self.binary
                }
                b"payload" => seen.mark_seen(&mut |seen| &mut seen.payload),
                // With escapes, a name could equal any other.
                name => !name.contains(&b'\\') && !RESERVED.contains(&name),
            };
            if !is_right {
                return Some(false);
            }
            scanner.skip_whitespace();
            match scanner.next() {
                None => return Some(self.is_complete(&seen)),
                Some(b',') => scanner.skip_whitespace(),
                Some(_) => return None,
            }
        }
    }

    fn is_complete(self, seen: &SeenFields) -> bool {
        let has_all = match self.frame {
            FrameType::Message => seen.room && seen.from,
            FrameType::Direct => seen.to && seen.from,
            FrameType::Notification => seen.payload,
        };
        let has_content = self.binary || seen.content || self.frame == FrameType::Notification;
        has_all && has_content && seen.id && seen.timestamp
    }
}

/// The fields that were seen.
#[derive(Debug, Default)]
struct SeenFields {
    id: bool,
    room: bool,
    from: bool,
    to: bool,
    timestamp: bool,
    content: bool,
    payload: bool,
}

impl SeenFields {
    /// Marks a field as seen. Returns `false` if it was seen before.
    fn mark_seen(&mut self, field: &mut dyn FnMut(&mut Self) -> &mut bool) -> bool {
        !std::mem::replace(field(self), true)
    }
}

/// Finds the value of a field, and reads no fields behind it. `None` if there is none, or if the
/// fields before it are not JSON.
pub(super) fn value_of<'a>(fields: &'a [u8], wanted: &str) -> Option<&'a [u8]> {
    let mut scanner = JsonScanner { bytes: fields, at: 0 };
    loop {
        scanner.skip_whitespace();
        let name = scanner.field_name()?;
        let begins = scanner.at;
        scanner.value()?;
        if name == wanted.as_bytes() {
            return Some(&fields[begins..scanner.at]);
        }
        scanner.skip_whitespace();
        if !scanner.eat(b',') {
            return None;
        }
    }
}

/// The id in a JSON string. Ids have no characters that JSON escapes.
pub(super) fn id_in<T: FromStr>(value: &[u8]) -> Option<T> {
    std::str::from_utf8(unquoted(value)?).ok()?.parse().ok()
}

/// The characters between the quotes of a string. A string with escapes never equals an id or a
/// room.
fn unquoted(value: &[u8]) -> Option<&[u8]> {
    value.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

/// A position in JSON text. The readers return `None` if another token stands there.
struct JsonScanner<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> JsonScanner<'a> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let next = self.peek()?;
        self.at += 1;
        Some(next)
    }

    fn eat(&mut self, byte: u8) -> bool {
        let is_there = self.peek() == Some(byte);
        self.at += usize::from(is_there);
        is_there
    }

    fn skip_whitespace(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    /// The name of a field, and the colon after it.
    fn field_name(&mut self) -> Option<&'a [u8]> {
        let name = self.string()?;
        self.skip_whitespace();
        if !self.eat(b':') {
            return None;
        }
        self.skip_whitespace();
        Some(name)
    }

    /// A string, without its quotes.
    fn string(&mut self) -> Option<&'a [u8]> {
        if !self.eat(b'"') {
            return None;
        }
        let begins = self.at;
        loop {
            let rest = &self.bytes[self.at..];
            let ends = rest.iter().position(|byte| matches!(byte, b'"' | b'\\') || *byte < 0x20)?;
            self.at += ends + 1;
            match rest[ends] {
                b'"' => return Some(&self.bytes[begins..self.at - 1]),
                b'\\' => self.escape()?,
                // JSON allows control characters only as escapes.
                _ => return None,
            }
        }
    }

    fn escape(&mut self) -> Option<()> {
        match self.next()? {
            b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't' => Some(()),
            b'u' => {
                let digits = self.bytes.get(self.at..self.at + 4)?;
                self.at += 4;
                digits.iter().all(u8::is_ascii_hexdigit).then_some(())
            }
            _ => None,
        }
    }

    /// A value of any depth: a client's value can be as deep as it is large.
    fn value(&mut self) -> Option<()> {
        // The closing brackets of all open arrays and objects.
        let mut open = Vec::new();
        loop {
            match self.peek()? {
                b'"' => drop(self.string()?),
                b'{' => {
                    self.at += 1;
                    self.skip_whitespace();
                    if !self.eat(b'}') {
                        open.push(b'}');
                        self.field_name()?;
                        continue;
                    }
                }
                b'[' => {
                    self.at += 1;
                    self.skip_whitespace();
                    if !self.eat(b']') {
                        open.push(b']');
                        continue;
                    }
                }
                b't' => self.literal(b"true")?,
                b'f' => self.literal(b"false")?,
                b'n' => self.literal(b"null")?,
                _ => self.number()?,
            }
            // A value has ended, and with it each array or object that it closes.
            loop {
                let Some(closer) = open.last().copied() else { return Some(()) };
                self.skip_whitespace();
                match self.next()? {
                    b',' => {
                        self.skip_whitespace();
                        if closer == b'}' {
                            self.field_name()?;
                        }
                        break;
                    }
                    byte if byte == closer => drop(open.pop()),
                    _ => return None,
                }
            }
        }
    }

    fn literal(&mut self, literal: &[u8]) -> Option<()> {
        self.bytes[self.at..].starts_with(literal).then(|| self.at += literal.len())
    }

    fn digits(&mut self) -> Option<()> {
        let begins = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > begins).then_some(())
    }

    fn number(&mut self) -> Option<()> {
        self.eat(b'-');
        if !self.eat(b'0') {
            self.digits()?;
        }
        if self.eat(b'.') {
            self.digits()?;
        }
        if self.eat(b'e') || self.eat(b'E') {
            if !self.eat(b'+') {
                self.eat(b'-');
            }
            self.digits()?;
        }
        Some(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;

    use super::*;

    const ID: Uuid = Uuid::from_u128(0x6f1c_2a0e_93c4_4c59_a9f5_5f3f_2d1b_7c10);
    const IN_ROOM: ExpectedFields<'static> =
        ExpectedFields { frame: FrameType::Message, id: ID, room: Some("r"), binary: false };
    const MESSAGE: &str = concat!(
        r#""room":"r","id":"6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10","from":{"id":"ann","name":"A"},"#,
        r#""kind":"text","content":"x","timestamp":"2026-11-30T12:00:00.000Z""#,
    );

    #[track_caller]
    fn rejects(expected: ExpectedFields<'_>, from: &str, to: &str) {
        let fields = MESSAGE.replace(from, to);
        assert_ne!(fields, MESSAGE);
        assert!(!expected.matches(fields.as_bytes()), "{fields}");
    }

    #[test]
    fn a_message_must_have_the_fields_of_its_room() {
        assert!(IN_ROOM.matches(MESSAGE.as_bytes()));
        rejects(IN_ROOM, r#""room":"r""#, r#""room":"s""#);
        rejects(IN_ROOM, r#""room":"r""#, r#""room":"r","room":"r""#);
        rejects(IN_ROOM, r#""room":"r","#, "");
        rejects(IN_ROOM, "7c10", "7c11");
        rejects(IN_ROOM, r#""from":{"id":"ann","name":"A"}"#, r#""from":"ann""#);
        rejects(IN_ROOM, r#""content":"x","#, "");
        rejects(IN_ROOM, r#""kind":"text""#, r#""seq":7"#);
        rejects(IN_ROOM, r#""kind":"text""#, r#""s\u0065q":7"#);
        rejects(IN_ROOM, r#""x""#, "bad");
        rejects(IN_ROOM, r#""x""#, r#""x"},{"a":1"#);
        let binary = ExpectedFields { binary: true, ..IN_ROOM };
        rejects(binary, r#""x""#, r#""y""#);
        assert!(binary.matches(MESSAGE.replace(r#""content":"x","#, "").as_bytes()));
        assert!(!ExpectedFields { room: None, ..IN_ROOM }.matches(MESSAGE.as_bytes()));
        assert!(!IN_ROOM.matches(b"") && !IN_ROOM.matches(b"\"a\":\"\xff\""));
    }

    #[test]
    fn an_entry_of_an_inbox_names_no_room() {
        let direct = ExpectedFields { frame: FrameType::Direct, room: None, ..IN_ROOM };
        let fields = MESSAGE.replace(r#""room":"r""#, r#""to":"bob""#);
        assert!(direct.matches(fields.as_bytes()));
        assert!(!direct.matches(MESSAGE.as_bytes()));
        let notification = ExpectedFields { frame: FrameType::Notification, ..direct };
        let fields = fields.replace("content", "payload");
        assert!(notification.matches(fields.as_bytes()));
        assert!(!notification.matches(fields.replace("payload", "p").as_bytes()));
    }

    #[test]
    fn a_field_is_found_at_any_place() {
        let fields = br#" "a" : {"to":"x"} , "b":[1,"}"], "to":"bob","c":3"#;
        assert_eq!(value_of(fields, "to"), Some(&br#""bob""#[..]));
        assert_eq!(value_of(fields, "a"), Some(&br#"{"to":"x"}"#[..]));
        assert_eq!(value_of(fields, "c"), Some(&b"3"[..]));
        assert_eq!(value_of(fields, "x"), None);
        assert_eq!(value_of(br#""a":bad,"to":"bob""#, "to"), None);
        assert_eq!(value_of(br#""a":"#, "a"), None);
        assert_eq!(id_in::<Uuid>(br#""00000000-0000-0000-0000-000000000000""#), Some(Uuid::nil()));
        assert_eq!(id_in::<Uuid>(b"7"), None);
    }

    fn json() -> impl Strategy<Value = String> {
        let leaf = prop_oneof![
            any::<i64>().prop_map(|number| number.to_string()),
            any::<f64>()
                .prop_filter("JSON has no others", |number| number.is_finite())
                .prop_map(|number| format!("{number:e}")),
            ".{0,8}".prop_map(|text| serde_json::to_string(&text).unwrap_or_default()),
            Just(r#""\ud800 é""#.to_owned()),
            Just("true".to_owned()),
            Just("null".to_owned()),
        ];
        leaf.prop_recursive(5, 32, 4, |inner| {
            let list = prop::collection::vec(inner.clone(), 0..4);
            let object = prop::collection::vec(inner, 0..4).prop_map(|values| {
                let fields =
                    values.iter().enumerate().map(|(n, value)| format!("\"{n}\" : {value}"));
                format!("{{ {} }}", fields.collect::<Vec<_>>().join(", "))
            });
            prop_oneof![list.prop_map(|list| format!("[{}]", list.join(" ,"))), object]
        })
    }

    /// Whether the scanner and serde_json agree on `value`.
    fn agree(value: &str) -> Result<(), TestCaseError> {
        let mut scanner = JsonScanner { bytes: value.as_bytes(), at: 0 };
        let scanned = scanner.value().is_some() && {
            scanner.skip_whitespace();
            scanner.at == value.len()
        };
        let known = serde_json::from_str::<IgnoredAny>(value).is_ok();
        // The caller skips leading whitespace.
        let is_space = value.starts_with([' ', '\t', '\n', '\r']);
        prop_assert!(scanned == known || is_space, "{value}");
        Ok(())
    }

    proptest! {
        #[test]
        fn json_is_accepted_as_by_serde_json(value in json(), at: prop::sample::Index, byte: u8) {
            agree(&value)?;
            let mut broken = value.into_bytes();
            let at = at.index(broken.len());
            broken[at] = byte;
            if let Ok(broken) = String::from_utf8(broken) {
                agree(&broken)?;
            }
        }

        #[test]
        fn almost_json_is_accepted_as_by_serde_json(value in r#"[-\[\]{}":,0-9eE.\\u \ntruefalsn]{0,12}"#) {
            agree(&value)?;
        }
    }

    #[test]
    fn deeply_nested_content_is_accepted() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(IN_ROOM.matches(MESSAGE.replace(r#""x""#, &deep).as_bytes()));
    }
}
