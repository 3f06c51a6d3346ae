//! The encoding of ephemeral events in a room's channel. An event begins with `!`, an entry with
//! the ordinal of its epoch.
//!
//! ```text
//! !p <epoch> <number>\n   presence, a change a line: "+<user> <name>", "-<user>"; by scripts
//! !t <user> <0 or 1>      typing
//! !r <user> <seq> <connection>    a read mark; by a script
//! !c deleted <connection> the room was deleted, by this connection; by a script
//! !e                      the log of the inbox was deleted; by a script
//! !s                      the user has come online or gone offline; by scripts, to a status room
//! !x <session> <connection>  a connection has taken over a session; by a script, to an inbox
//! !m\n<envelope>          a message of an ephemeral room
//! ```

use bytes::Bytes;
use skein_core::envelope::Envelope;
use skein_protocol::{
    ids::{ConnectionId, RoomId, UserId},
    position::SEQ_MAX,
    protocol::server_frame::{RoomClosedReason, UserInfo},
};
use uuid::Uuid;

use skein_core::bus::presence_store::{EphemeralEvent, PresenceChange, PresenceVersion};

/// Encodes an event that a node publishes itself. Scripts encode all others.
pub(super) fn encode(event: &EphemeralEvent) -> Vec<u8> {
    match event {
        EphemeralEvent::Typing { user, is_typing } => {
            format!("!t {user} {}", u8::from(*is_typing)).into_bytes()
        }
        EphemeralEvent::Message(envelope) => [b"!m\n", &envelope.as_bytes()[..]].concat(),
        EphemeralEvent::Presence(_)
        | EphemeralEvent::Read { .. }
        | EphemeralEvent::Closed { .. }
        | EphemeralEvent::Replaced { .. }
        | EphemeralEvent::LogDeleted
        | EphemeralEvent::Status => unreachable!("scripts publish it"),
    }
}

/// Decodes an event of a room; `None` if the payload is not one.
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
        return Some(EphemeralEvent::LogDeleted);
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
    fn decoded(text: &str) -> EphemeralEvent {
        decode(&Bytes::copy_from_slice(text.as_bytes()), &room()).expect("an event")
    }

    #[test]
    fn events_of_scripts_are_decoded() {
        let EphemeralEvent::Presence(change) = decoded("!p 7 12\n+ann Ann Lee\n-bob\n-cat\n")
        else {
            panic!()
        };
        assert_eq!(change.version, PresenceVersion { epoch: 7, number: 12 });
        assert_eq!(change.joined[0].name.as_str(), "Ann Lee");
        assert_eq!(change.left.len(), 2);
        let id = "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10";
        let EphemeralEvent::Read { seq: 5, by, .. } = decoded(&format!("!r ann 5 {id}")) else {
            panic!()
        };
        assert_eq!(by.to_string(), id);
        assert!(matches!(decoded("!s"), EphemeralEvent::Status));
        assert!(matches!(decoded("!e"), EphemeralEvent::LogDeleted));
        let replaced = decoded(&format!("!x {id} {id}"));
        assert!(matches!(replaced, EphemeralEvent::Replaced { by, .. } if by.to_string() == id));
        assert!(matches!(
            decoded(&format!("!c deleted {id}")),
            EphemeralEvent::Closed { by: Some(_), .. }
        ));
        assert!(matches!(decoded("!c deleted "), EphemeralEvent::Closed { by: None, .. }));
    }

    #[test]
    fn events_of_a_node_are_decoded_as_encoded() {
        let user: UserId = "ann".parse().unwrap();
        let encoded = encode(&EphemeralEvent::Typing { user, is_typing: true });
        let decoded = decode(&encoded.into(), &room());
        let Some(EphemeralEvent::Typing { is_typing: true, .. }) = decoded else { panic!() };
        let id = Uuid::from_u128(1);
        let fields =
            format!(r#""room":"r","id":"{id}","from":{{"id":"ann","name":"A"}},"timestamp":"t""#);
        let envelope = Envelope::pack(EnvelopeParts {
            frame: Default::default(),
            author: AuthorHash::of(&"ann".parse().unwrap()),
            id: skein_protocol::ids::MessageId(id),
            sender: ConnectionId(Uuid::from_u128(2)),
            echo: true,
            fields: &fields,
            binary_payload: Some(b"\n!"),
        });
        let encoded = encode(&EphemeralEvent::Message(envelope.clone()));
        let encoded = Bytes::from(encoded);
        let Some(EphemeralEvent::Message(decoded)) = decode(&encoded, &room()) else { panic!() };
        assert_eq!(decoded, envelope);
        assert!(decode(&encoded, &"s".parse().unwrap()).is_none());
    }

    #[test]
    fn invalid_payloads_are_rejected() {
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
