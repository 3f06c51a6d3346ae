//! The searchable text of a message, and the words of a search.

use serde_json::value::RawValue;

/// The most bytes of a message that a search looks at.
pub(crate) const TEXT_BYTES_MAX: usize = 8 * 1024;

/// The searchable text of `content`: a string, else the strings among its values in their order,
/// one a line. `None` if there are none. PostgreSQL has no NUL in text, so there is none here.
pub(crate) fn searchable(content: &RawValue) -> Option<String> {
    let mut text = String::new();
    for string in Strings::in_json(content.get()) {
        if text.len() >= TEXT_BYTES_MAX {
            break;
        }
        if !text.is_empty() {
            text.push('\n');
        }
        append(string, &mut text);
    }
    text.truncate(text.floor_char_boundary(TEXT_BYTES_MAX));
    (!text.is_empty()).then_some(text)
}

/// Appends the characters of a JSON string. A lone surrogate becomes U+FFFD.
fn append(string: &str, text: &mut String) {
    if !string.contains('\\') {
        text.push_str(string[1..string.len() - 1].trim_matches('\0'));
        return;
    }
    struct Bytes(Vec<u8>);
    impl<'de> serde::Deserialize<'de> for Bytes {
        fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;
            impl serde::de::Visitor<'_> for Visitor {
                type Value = Bytes;
                fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                    f.write_str("a string")
                }
                fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Bytes, E> {
                    Ok(Bytes(bytes.to_vec()))
                }
            }
            deserializer.deserialize_bytes(Visitor)
        }
    }
    if let Ok(Bytes(bytes)) = serde_json::from_str(string) {
        text.extend(String::from_utf8_lossy(&bytes).chars().filter(|c| *c != '\0'));
    }
}

/// The strings of a valid JSON text that are no names of fields, with their quotes. It needs no
/// stack, so that content may be of any depth.
struct Strings<'a> {
    json: &'a str,
    at: usize,
}

impl<'a> Strings<'a> {
    fn in_json(json: &'a str) -> Self {
        Self { json, at: 0 }
    }
}

impl<'a> Iterator for Strings<'a> {
    type Item = &'a str;

    fn next(&mut self) -> Option<&'a str> {
        let bytes = self.json.as_bytes();
        loop {
            let begins = self.at + bytes.get(self.at..)?.iter().position(|byte| *byte == b'"')?;
            let mut ends = begins + 1;
            while *bytes.get(ends)? != b'"' {
                ends += if bytes[ends] == b'\\' { 2 } else { 1 };
            }
            self.at = ends + 1;
            let next = bytes[self.at..].iter().find(|byte| !byte.is_ascii_whitespace());
            if next != Some(&b':') {
                return Some(&self.json[begins..self.at]);
            }
        }
    }
}

/// The words of a search: the pieces between spaces, without NUL.
pub(crate) fn words(text: &str) -> Vec<String> {
    let text = text.replace('\0', " ");
    text.split_whitespace().map(str::to_owned).collect()
}

/// Whether the index of trigrams finds a word.
pub(crate) fn has_trigrams(word: &str) -> bool {
    word.chars().nth(2).is_some()
}

/// The pattern of `LIKE … ESCAPE '\'` for texts that contain `word`.
pub(crate) fn like_pattern(word: &str) -> String {
    let mut pattern = String::from("%");
    for c in word.chars() {
        if matches!(c, '%' | '_' | '\\') {
            pattern.push('\\');
        }
        pattern.push(c);
    }
    pattern.push('%');
    pattern
}

/// A word in the spellings that SQLite's `LIKE` tells apart, which ignores the case of ASCII only:
/// each character in lower and in upper case. For words of at most two characters.
pub(crate) fn spellings(word: &str) -> Vec<String> {
    let mut spellings = vec![String::new()];
    for c in word.chars() {
        let mut variants = vec![c.to_string()];
        if !c.is_ascii() {
            variants.extend([c.to_lowercase().collect(), c.to_uppercase().collect()]);
        }
        variants.sort();
        variants.dedup();
        let longer = |start: &String| variants.iter().map(|c| format!("{start}{c}")).collect();
        spellings = spellings.iter().flat_map(|start| -> Vec<String> { longer(start) }).collect();
    }
    spellings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(content: &str, expected: Option<&str>) {
        let content = RawValue::from_string(content.to_owned()).unwrap();
        assert_eq!(searchable(&content).as_deref(), expected, "{content}");
    }

    #[test]
    fn the_text_is_the_string_or_the_strings_among_the_values() {
        check(r#""Hello 世界""#, Some("Hello 世界"));
        check(r#""a\u0000b\n\"c\" \ud83d\udc4d""#, Some("ab\n\"c\" 👍"));
        check(r#""\ud800x""#, Some("\u{FFFD}\u{FFFD}\u{FFFD}x"));
        check(r#"{"title":"A","list":["B",1,{"k" : "C\\"}],"n":null}"#, Some("A\nB\nC\\"));
        check("7", None);
        check(r#""""#, None);
        check("{}", None);
        let deep = format!("{}\"x\"{}", "[".repeat(100_000), "]".repeat(100_000));
        check(&deep, Some("x"));
    }

    #[test]
    fn the_text_is_bounded_and_ends_with_a_whole_character() {
        let content = format!("\"a{}\"", "世".repeat(TEXT_BYTES_MAX));
        let text = searchable(&RawValue::from_string(content).unwrap()).unwrap();
        assert!(text.len() <= TEXT_BYTES_MAX && text.len() > TEXT_BYTES_MAX - 4);
        let many = format!("[{}]", vec![r#""xy""#; TEXT_BYTES_MAX].join(","));
        let text = searchable(&RawValue::from_string(many).unwrap()).unwrap();
        assert!(text.len() <= TEXT_BYTES_MAX);
    }

    #[test]
    fn words_are_plain_text() {
        assert_eq!(words(" a\u{3000}NEAR(b \0 \"c* "), ["a", "NEAR(b", "\"c*"]);
        assert_eq!(like_pattern(r"5%_\"), r"%5\%\_\\%");
        assert!(has_trigrams("世界人") && !has_trigrams("世界") && !has_trigrams("👍"));
        assert_eq!(spellings("aB"), ["aB"]);
        assert_eq!(spellings("é"), ["É", "é"]);
        assert_eq!(spellings("世界"), ["世界"]);
        assert_eq!(spellings("Éà").len(), 4);
    }
}
