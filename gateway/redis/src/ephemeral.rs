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
use skein_core::envelope::Envelope;
use skein_protocol::{
    ids::{ConnectionId, RoomId, UserId},
    position::SEQ_MAX,
    protocol::server_frame::{RoomClosedReason, UserInfo},
};
use uuid::Uuid;

use skein_core::bus::registry::{EphemeralEvent, PresenceChange, PresenceVersion};

/// A notice that a node passes on itself. Those of scripts are not made here.
pub(super) fn encode(notice: &EphemeralEvent) -> Vec<u8> {
    match notice {
        EphemeralEvent::Typing { user, is_typing } => {
            format!("!t {user} {}", u8::from(*is_typing)).into_bytes()
        }
        EphemeralEvent::Message(envelope) => [b"!m\n", &envelope.as_bytes()[..]].concat(),
        EphemeralEvent::Presence(_)
        | EphemeralEvent::Read { .. }
        | EphemeralEvent::Closed { .. }
        | EphemeralEvent::Replaced { .. }
        | EphemeralEvent::Emptied
        | EphemeralEvent::Status => unreachable!("scripts pass it on"),
    }
}

/// Reads a notice of a room; `None` where it is none.
pub(super) fn decode(payload: &Bytes, room: &RoomId) -> Option<EphemeralEvent> {
    let (kind, rest) = payload.strip_prefix(b"!")?.split_first()?;
    if *kind == b'm' {
        let envelope = payload.slice(payload.len() - rest.strip_prefix(b"\n")?.len()..);
        return Some(EphemeralEvent::Message(Envelope::parse_for_room(envelope, room).ok()?));
    }
    if *kind == b's' && rest.is_empty() {
        return Some(EphemeralEvent::Status);
    }
    if *kind == b'e' && rest.is_empty() {
        return Some(EphemeralEvent::Emptied);
    }
    let text = std::str::from_utf8(rest).ok()?.strip_prefix(' ')?;
    let mut words = text.split(' ');
    match kind {
        b't' => {
            let user = words.next()?.parse().ok()?;
            Some(EphemeralEvent::Typing { user, is_typing: words.next()? == "1" })
        }
        b'r' => {
            let user = words.next()?.parse().ok()?;
            let seq = words.next()?.parse().ok().filter(|seq| *seq <= SEQ_MAX)?;
            Some(EphemeralEvent::Read { user, seq, by: connection(words.next()?)? })
        }
        b'x' => {
            let session = words.next()?.parse().ok()?;
            Some(EphemeralEvent::Replaced { session, by: connection(words.next()?)? })
        }
        b'c' => {
            let by = words.nth(1).and_then(connection);
            Some(EphemeralEvent::Closed { reason: RoomClosedReason::Deleted, by })
        }
        b'p' => presence(text).map(EphemeralEvent::Presence),
        _ => None,
    }
}

fn connection(text: &str) -> Option<ConnectionId> {
    Uuid::try_parse(text).ok().map(ConnectionId)
}

fn presence(text: &str) -> Option<PresenceChange> {
    let mut lines = text.lines();
    let (epoch, number) = lines.next()?.split_once(' ')?;
    let version = PresenceVersion { epoch: epoch.parse().ok()?, number: number.parse().ok()? };
    let mut change = PresenceChange { version, joined: Vec::new(), left: Vec::new() };
    for line in lines {
        if let Some(user) = line.strip_prefix('-') {
            change.left.push(user.parse::<UserId>().ok()?);
        } else {
            let (id, name) = line.strip_prefix('+')?.split_once(' ')?;
            change.joined.push(UserInfo { id: id.parse().ok()?, name: name.parse().ok()? });
        }
    }
    Some(change)
}

#[cfg(test)]
mod tests {
    use skein_core::envelope::{AuthorHash, EnvelopeParts};

    use super::*;

    fn room() -> RoomId {
        "r".parse().unwrap()
    }

    #[track_caller]
    fn read(text: &str) -> EphemeralEvent {
        decode(&Bytes::copy_from_slice(text.as_bytes()), &room()).expect("a notice")
    }

    #[test]
    fn what_scripts_pass_on_is_read() {
        let EphemeralEvent::Presence(change) = read("!p 7 12\n+ann Ann Lee\n-bob\n-cat\n") else {
            panic!()
        };
        assert_eq!(change.version, PresenceVersion { epoch: 7, number: 12 });
        assert_eq!(change.joined[0].name.as_str(), "Ann Lee");
        assert_eq!(change.left.len(), 2);
        let id = "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10";
        let EphemeralEvent::Read { seq: 5, by, .. } = read(&format!("!r ann 5 {id}")) else {
            panic!()
        };
        assert_eq!(by.to_string(), id);
        assert!(matches!(read("!s"), EphemeralEvent::Status));
        assert!(matches!(read("!e"), EphemeralEvent::Emptied));
        let replaced = read(&format!("!x {id} {id}"));
        assert!(matches!(replaced, EphemeralEvent::Replaced { by, .. } if by.to_string() == id));
        assert!(matches!(
            read(&format!("!c deleted {id}")),
            EphemeralEvent::Closed { by: Some(_), .. }
        ));
        assert!(matches!(read("!c deleted "), EphemeralEvent::Closed { by: None, .. }));
    }

    #[test]
    fn what_a_node_passes_on_is_read_back() {
        let user: UserId = "ann".parse().unwrap();
        let packed = encode(&EphemeralEvent::Typing { user, is_typing: true });
        let read = decode(&packed.into(), &room());
        let Some(EphemeralEvent::Typing { is_typing: true, .. }) = read else { panic!() };
        let id = Uuid::from_u128(1);
        let members =
            format!(r#""room":"r","id":"{id}","from":{{"id":"ann","name":"A"}},"timestamp":"t""#);
        let envelope = Envelope::pack(EnvelopeParts {
            frame: Default::default(),
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: skein_protocol::ids::MessageId(id),
            sender: ConnectionId(Uuid::from_u128(2)),
            echo: true,
            fields: &members,
            binary_payload: Some(b"\n!"),
        });
        let packed = encode(&EphemeralEvent::Message(envelope.clone()));
        let packed = Bytes::from(packed);
        let Some(EphemeralEvent::Message(read)) = decode(&packed, &room()) else { panic!() };
        assert_eq!(read, envelope);
        assert!(decode(&packed, &"s".parse().unwrap()).is_none());
    }

    #[test]
    fn what_is_none_is_refused() {
        for text in [
            "",
            "!",
            "!p",
            "!m",
            "!r ann 9007199254740992 6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10",
            "!x y",
            "1-e:5:0",
            "!m\nno",
            "!t",
            "!r ann",
            "!p a b\n",
        ] {
            let payload = Bytes::copy_from_slice(text.as_bytes());
            assert!(decode(&payload, &room()).is_none(), "{text:?}");
        }
    }
}
