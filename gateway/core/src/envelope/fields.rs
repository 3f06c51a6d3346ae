//! Whether the fields of an envelope are what their readers may be sent: JSON of the right room.
//!
//! They are put into frames as they are, so that an entry costs no parsing where it is passed on. What
//! comes from a log or a link is checked once instead, where it enters. This runs for every entry that
//! a node receives, so it builds nothing: it walks over the bytes at some GB/s.

use uuid::{Uuid, fmt::Hyphenated};

use super::FrameType;

/// Members that stand in front of those of an envelope in a frame, and may not be there twice.
const RESERVED: [&[u8]; 4] = [b"type", b"epoch", b"seq", b"replay"];

/// What the fields have to be.
#[derive(Clone, Copy, Debug)]
pub(super) struct ExpectedFields<'a> {
    pub(super) frame: FrameType,
    pub(super) id: Uuid,
    /// The room whose messages they are of; `None` in an inbox.
    pub(super) room: Option<&'a str>,
    /// Whether the content stands apart.
    pub(super) binary: bool,
}

impl ExpectedFields<'_> {
    /// Whether `fields` are that.
    pub(super) fn matches(self, fields: &[u8]) -> bool {
        std::str::from_utf8(fields).is_ok() && self.matches_json(fields) == Some(true)
    }

    /// `None` where they are no JSON.
    fn matches_json(self, fields: &[u8]) -> Option<bool> {
        let mut id = [0; Hyphenated::LENGTH];
        let id = self.id.hyphenated().encode_lower(&mut id).as_bytes();
        let mut scanner = JsonScanner { bytes: fields, at: 0 };
        let mut seen = SeenFields::default();
        loop {
            let name = scanner.name()?;
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
                // Escaped, a name could be any other.
                name => !name.contains(&b'\\') && !RESERVED.contains(&name),
            };
            if !is_right {
                return Some(false);
            }
            scanner.space();
            match scanner.next() {
                None => return Some(self.is_complete(&seen)),
                Some(b',') => scanner.space(),
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

/// Which fields there are.
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
    /// Notes that a field is there. `false`: it is there twice.
    fn mark_seen(&mut self, field: &mut dyn FnMut(&mut Self) -> &mut bool) -> bool {
        !std::mem::replace(field(self), true)
    }
}

/// What stands between the quotes of a string that has no escapes to be looked at.
fn unquoted(value: &[u8]) -> Option<&[u8]> {
    value.strip_prefix(b"\"")?.strip_suffix(b"\"")
}

/// A place in JSON text. What it is asked for is `None` where something else stands there.
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

    fn take(&mut self, byte: u8) -> bool {
        let is_there = self.peek() == Some(byte);
        self.at += usize::from(is_there);
        is_there
    }

    fn space(&mut self) {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.peek() {
            self.at += 1;
        }
    }

    /// The name of a field, up to its value.
    fn name(&mut self) -> Option<&'a [u8]> {
        let name = self.string()?;
        self.space();
        if !self.take(b':') {
            return None;
        }
        self.space();
        Some(name)
    }

    /// A string, without its quotes.
    fn string(&mut self) -> Option<&'a [u8]> {
        if !self.take(b'"') {
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
                // Controls are written as escapes.
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

    /// A value, however deep: what clients send may be as deep as it is large.
    fn value(&mut self) -> Option<()> {
        // What closes that is open.
        let mut open = Vec::new();
        loop {
            match self.peek()? {
                b'"' => drop(self.string()?),
                b'{' => {
                    self.at += 1;
                    self.space();
                    if !self.take(b'}') {
                        open.push(b'}');
                        self.name()?;
                        continue;
                    }
                }
                b'[' => {
                    self.at += 1;
                    self.space();
                    if !self.take(b']') {
                        open.push(b']');
                        continue;
                    }
                }
                b't' => self.word(b"true")?,
                b'f' => self.word(b"false")?,
                b'n' => self.word(b"null")?,
                _ => self.number()?,
            }
            // Something has ended, and with it what it is the last of.
            loop {
                let Some(closer) = open.last().copied() else { return Some(()) };
                self.space();
                match self.next()? {
                    b',' => {
                        self.space();
                        if closer == b'}' {
                            self.name()?;
                        }
                        break;
                    }
                    byte if byte == closer => drop(open.pop()),
                    _ => return None,
                }
            }
        }
    }

    fn word(&mut self, word: &[u8]) -> Option<()> {
        self.bytes[self.at..].starts_with(word).then(|| self.at += word.len())
    }

    fn digits(&mut self) -> Option<()> {
        let begins = self.at;
        while self.peek().is_some_and(|byte| byte.is_ascii_digit()) {
            self.at += 1;
        }
        (self.at > begins).then_some(())
    }

    fn number(&mut self) -> Option<()> {
        self.take(b'-');
        if !self.take(b'0') {
            self.digits()?;
        }
        if self.take(b'.') {
            self.digits()?;
        }
        if self.take(b'e') || self.take(b'E') {
            if !self.take(b'+') {
                self.take(b'-');
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
    fn refuses(expected: ExpectedFields<'_>, from: &str, to: &str) {
        let fields = MESSAGE.replace(from, to);
        assert_ne!(fields, MESSAGE);
        assert!(!expected.matches(fields.as_bytes()), "{fields}");
    }

    #[test]
    fn members_of_a_message_are_those_of_its_room() {
        assert!(IN_ROOM.matches(MESSAGE.as_bytes()));
        refuses(IN_ROOM, r#""room":"r""#, r#""room":"s""#);
        refuses(IN_ROOM, r#""room":"r""#, r#""room":"r","room":"r""#);
        refuses(IN_ROOM, r#""room":"r","#, "");
        refuses(IN_ROOM, "7c10", "7c11");
        refuses(IN_ROOM, r#""from":{"id":"ann","name":"A"}"#, r#""from":"ann""#);
        refuses(IN_ROOM, r#""content":"x","#, "");
        refuses(IN_ROOM, r#""kind":"text""#, r#""seq":7"#);
        refuses(IN_ROOM, r#""kind":"text""#, r#""s\u0065q":7"#);
        refuses(IN_ROOM, r#""x""#, "bad");
        refuses(IN_ROOM, r#""x""#, r#""x"},{"a":1"#);
        let apart = ExpectedFields { binary: true, ..IN_ROOM };
        refuses(apart, r#""x""#, r#""y""#);
        assert!(apart.matches(MESSAGE.replace(r#""content":"x","#, "").as_bytes()));
        assert!(!ExpectedFields { room: None, ..IN_ROOM }.matches(MESSAGE.as_bytes()));
        assert!(!IN_ROOM.matches(b"") && !IN_ROOM.matches(b"\"a\":\"\xff\""));
    }

    #[test]
    fn members_of_an_inbox_name_no_room() {
        let direct = ExpectedFields { frame: FrameType::Direct, room: None, ..IN_ROOM };
        let fields = MESSAGE.replace(r#""room":"r""#, r#""to":"bob""#);
        assert!(direct.matches(fields.as_bytes()));
        assert!(!direct.matches(MESSAGE.as_bytes()));
        let notification = ExpectedFields { frame: FrameType::Notification, ..direct };
        let fields = fields.replace("content", "payload");
        assert!(notification.matches(fields.as_bytes()));
        assert!(!notification.matches(fields.replace("payload", "p").as_bytes()));
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

    /// Whether both readers say the same of `"a":<value>`.
    fn agree(value: &str) -> Result<(), TestCaseError> {
        let mut scanner = JsonScanner { bytes: value.as_bytes(), at: 0 };
        let scanned = scanner.value().is_some() && {
            scanner.space();
            scanner.at == value.len()
        };
        let known = serde_json::from_str::<IgnoredAny>(value).is_ok();
        // Space in front is the caller's.
        let is_space = value.starts_with([' ', '\t', '\n', '\r']);
        prop_assert!(scanned == known || is_space, "{value}");
        Ok(())
    }

    proptest! {
        #[test]
        fn what_serde_json_reads_is_json_here(value in json(), at: prop::sample::Index, byte: u8) {
            agree(&value)?;
            let mut broken = value.into_bytes();
            let at = at.index(broken.len());
            broken[at] = byte;
            if let Ok(broken) = String::from_utf8(broken) {
                agree(&broken)?;
            }
        }

        #[test]
        fn what_looks_like_json_is_read_as_serde_json_does(value in r#"[-\[\]{}":,0-9eE.\\u \ntruefalsn]{0,12}"#) {
            agree(&value)?;
        }
    }

    #[test]
    fn what_is_as_deep_as_it_is_large_is_read() {
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(IN_ROOM.matches(MESSAGE.replace(r#""x""#, &deep).as_bytes()));
    }
}
