//! How what is no entry is passed on in a room's channel. It begins with `!`, and an entry with the
//! ordinal of its epoch.
//!
//! ```text
//! !p <epoch> <number>\n   who came and left, a line each: "+<user> <name>", "-<user>"; by scripts
//! !t <user> <0 or 1>      typing
//! !r <user> <seq> <connection>    read on; by a script
//! !c deleted <connection> the room is no more, and the connection that asked for it; by a script
//! !e                      the inbox was emptied; by a script
//! !s                      whether a user is connected has changed; by scripts, to a status
//! !x <session> <connection>  a connection has taken a session over; by a script, to an inbox
//! !m\n<envelope>          a message of a room without a log
//! ```

use bytes::Bytes;
use shared::{
    envelope::Envelope,
    ids::{ConnectionId, UserId},
    protocol::answer::{ClosedReason, Person},
};
use uuid::Uuid;

use crate::bus::registry::{Change, Notice, Version};

/// A notice that a node passes on itself. Those of scripts are not made here.
pub(super) fn pack(notice: &Notice) -> Vec<u8> {
    match notice {
        Notice::Typing { user, is_typing } => {
            format!("!t {user} {}", u8::from(*is_typing)).into_bytes()
        }
        Notice::Message(envelope) => [b"!m\n", &envelope.as_bytes()[..]].concat(),
        Notice::Presence(_)
        | Notice::Read { .. }
        | Notice::Closed { .. }
        | Notice::Replaced { .. }
        | Notice::Emptied
        | Notice::Status => unreachable!("scripts pass it on"),
    }
}

/// Reads a notice; `None` where it is none.
pub(super) fn unpack(payload: &Bytes) -> Option<Notice> {
    let (kind, rest) = payload.strip_prefix(b"!")?.split_first()?;
    if *kind == b'm' {
        let envelope = payload.slice(payload.len() - rest.len() + 1..);
        return Some(Notice::Message(Envelope::from_bytes(envelope).ok()?));
    }
    if *kind == b's' && rest.is_empty() {
        return Some(Notice::Status);
    }
    if *kind == b'e' && rest.is_empty() {
        return Some(Notice::Emptied);
    }
    let text = std::str::from_utf8(rest).ok()?.strip_prefix(' ')?;
    let mut words = text.split(' ');
    match kind {
        b't' => {
            let user = words.next()?.parse().ok()?;
            Some(Notice::Typing { user, is_typing: words.next()? == "1" })
        }
        b'r' => {
            let (user, seq) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            Some(Notice::Read { user, seq, by: connection(words.next()?)? })
        }
        b'x' => {
            let session = words.next()?.parse().ok()?;
            Some(Notice::Replaced { session, by: connection(words.next()?)? })
        }
        b'c' => {
            let by = words.nth(1).and_then(connection);
            Some(Notice::Closed { reason: ClosedReason::Deleted, by })
        }
        b'p' => presence(text).map(Notice::Presence),
        _ => None,
    }
}

fn connection(text: &str) -> Option<ConnectionId> {
    Uuid::try_parse(text).ok().map(ConnectionId)
}

fn presence(text: &str) -> Option<Change> {
    let mut lines = text.lines();
    let (epoch, number) = lines.next()?.split_once(' ')?;
    let version = Version { epoch: epoch.parse().ok()?, number: number.parse().ok()? };
    let mut change = Change { version, joined: Vec::new(), left: Vec::new() };
    for line in lines {
        if let Some(user) = line.strip_prefix('-') {
            change.left.push(user.parse::<UserId>().ok()?);
        } else {
            let (id, name) = line.strip_prefix('+')?.split_once(' ')?;
            change.joined.push(Person { id: id.parse().ok()?, name: name.parse().ok()? });
        }
    }
    Some(change)
}

#[cfg(test)]
mod tests {
    use shared::envelope::{Author, Parts};

    use super::*;

    #[track_caller]
    fn read(text: &str) -> Notice {
        unpack(&Bytes::copy_from_slice(text.as_bytes())).expect("a notice")
    }

    #[test]
    fn what_scripts_pass_on_is_read() {
        let Notice::Presence(change) = read("!p 7 12\n+ann Ann Lee\n-bob\n-cat\n") else {
            panic!()
        };
        assert_eq!(change.version, Version { epoch: 7, number: 12 });
        assert_eq!(change.joined[0].name.as_str(), "Ann Lee");
        assert_eq!(change.left.len(), 2);
        let id = "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10";
        let Notice::Read { seq: 5, by, .. } = read(&format!("!r ann 5 {id}")) else { panic!() };
        assert_eq!(by.to_string(), id);
        assert!(matches!(read("!s"), Notice::Status));
        assert!(matches!(read("!e"), Notice::Emptied));
        let replaced = read(&format!("!x {id} {id}"));
        assert!(matches!(replaced, Notice::Replaced { by, .. } if by.to_string() == id));
        assert!(matches!(read(&format!("!c deleted {id}")), Notice::Closed { by: Some(_), .. }));
        assert!(matches!(read("!c deleted "), Notice::Closed { by: None, .. }));
    }

    #[test]
    fn what_a_node_passes_on_is_read_back() {
        let user: UserId = "ann".parse().unwrap();
        let packed = pack(&Notice::Typing { user, is_typing: true });
        let Some(Notice::Typing { is_typing: true, .. }) = unpack(&packed.into()) else { panic!() };
        let envelope = Envelope::pack(Parts {
            frame: Default::default(),
            author: Author::of(&"ann".parse().unwrap()),
            id: shared::ids::MessageId(Uuid::from_u128(1)),
            sender: ConnectionId(Uuid::from_u128(2)),
            echo: true,
            members: r#""room":"r""#,
            binary: Some(b"\n!"),
        });
        let packed = pack(&Notice::Message(envelope.clone()));
        let Some(Notice::Message(read)) = unpack(&packed.into()) else { panic!() };
        assert_eq!(read, envelope);
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in ["", "!", "!p", "!x y", "1-e:5:0", "!m\nno", "!t", "!r ann", "!p a b\n"] {
            assert!(unpack(&Bytes::copy_from_slice(text.as_bytes())).is_none(), "{text:?}");
        }
    }
}
