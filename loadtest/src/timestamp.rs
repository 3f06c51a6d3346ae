//! Send timestamps: each message of the load carries its sender and its due time in its content.
//!
//! Pure. A timestamp is found in any frame that a server puts around the content, because nothing
//! else in a frame contains its mark.

const MARK: u8 = b'~';
const SENDER_DIGITS: usize = 8;
const TIME_DIGITS: usize = 16;

/// Sender and due time of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SendTimestamp {
    /// Index of the sending connection.
    pub(crate) sender: u32,
    /// Due time, ns of [`skein_testkit::clock::monotonic_ns`] or of the bench's clock.
    pub(crate) due_ns: u64,
}

impl SendTimestamp {
    /// A content of `bytes` bytes, or the few more that the timestamp needs.
    pub(crate) fn content(self, bytes: usize) -> String {
        let Self { sender, due_ns } = self;
        let timestamp = format!("{}{sender:08x}{due_ns:016x}", char::from(MARK));
        format!("{timestamp:x<bytes$}")
    }

    /// Finds the timestamp in a frame; `None` if the frame carries no message of the load.
    pub(crate) fn find(frame: &[u8]) -> Option<Self> {
        let rest = &frame[memchr::memchr(MARK, frame)? + 1..];
        let (sender, rest) = rest.split_at_checked(SENDER_DIGITS)?;
        let time = rest.get(..TIME_DIGITS)?;
        Some(Self { sender: u32::try_from(hex(sender)?).ok()?, due_ns: hex(time)? })
    }

    /// Number of timestamps in a frame.
    pub(crate) fn count(frame: &[u8]) -> u64 {
        let marks = memchr::memchr_iter(MARK, frame);
        marks.filter(|mark| Self::find(&frame[*mark..]).is_some()).count() as u64
    }
}

/// Parses a number of lower-case hexadecimal digits.
fn hex(digits: &[u8]) -> Option<u64> {
    digits.iter().try_fold(0, |number: u64, digit| {
        let digit = match digit {
            b'0'..=b'9' => digit - b'0',
            b'a'..=b'f' => digit - b'a' + 10,
            _ => return None,
        };
        Some(number << 4 | u64::from(digit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timestamp_is_found_in_any_frame() {
        let timestamp = SendTimestamp { sender: 0x12_ABCD, due_ns: u64::MAX - 7 };
        let content = timestamp.content(128);
        assert_eq!(content.len(), 128);
        let frame = format!(r#"{{"type":"message","seq":7,"content":"{content}"}}"#);
        assert_eq!(SendTimestamp::find(frame.as_bytes()), Some(timestamp));
        assert_eq!(SendTimestamp::find(content.as_bytes()), Some(timestamp));
        assert_eq!(SendTimestamp::count(format!("{frame},~,{frame}").as_bytes()), 2);
    }

    #[test]
    fn other_frames_have_none() {
        for frame in [r#"{"type":"ack","seq":7}"#, "", "~", "~0000000g0000000000000000", "~12"] {
            assert_eq!(SendTimestamp::find(frame.as_bytes()), None, "{frame}");
        }
    }
}
