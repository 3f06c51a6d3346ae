use super::*;
use crate::protocol::{META_BYTES_MAX, MessageKind, PASSWORD_BYTES_MAX, SESSION_BYTES_MAX};

#[track_caller]
fn rejected(text: &str, code: ErrorCode) -> ErrorFrame {
    let error_frame = *ClientFrame::from_text(text).expect_err("rejected");
    assert_eq!(error_frame.code, code, "{error_frame:?}");
    error_frame
}

#[test]
fn a_message_has_defaults_and_keeps_content_as_written() {
    let text = r#"{"type":"message","room":"r","content":{"a": 1.0},"ref":7,"more":[]}"#;
    let frame = ClientFrame::from_text(text).unwrap();
    assert_eq!(frame.reference, Some(FrameRef::number(7)));
    let FrameBody::Message(message) = frame.body else { panic!("{:?}", frame.body) };
    assert!(message.echo && message.id.is_none() && message.kind == MessageKind::Text);
    let RawContent::Json(content) = message.content else { panic!("binary") };
    assert_eq!(content.get(), r#"{"a": 1.0}"#);
}

#[test]
fn null_is_valid_content() {
    let text = r#"{"type":"message","room":"r","content":null}"#;
    let FrameBody::Message(message) = ClientFrame::from_text(text).unwrap().body else { panic!() };
    assert!(matches!(message.content, RawContent::Json(content) if content.get() == "null"));
}

#[test]
fn an_error_names_the_fields_that_could_be_read() {
    let id = "6f1c2a0e-93c4-4c59-a9f5-5f3f2d1b7c10";
    let text = format!(r#"{{"type":"message","room":"r","id":"{id}","ref":"x"}}"#);
    let error_frame = rejected(&text, ErrorCode::BadRequest);
    assert_eq!(error_frame.reference.unwrap().as_json(), r#""x""#);
    assert_eq!(error_frame.frame_type.as_deref(), Some("message"));
    assert_eq!(error_frame.room.unwrap().as_str(), "r");
    assert_eq!(error_frame.id.unwrap().to_string(), id);
    assert!(error_frame.message.contains("content"), "{}", error_frame.message);
}

#[test]
fn invalid_frames_are_rejected_with_their_code() {
    for text in
        ["", "x", "[]", "1", r#"["pong",1,null,null]"#, "{}", r#"{"type":1}"#, r#"{"type":"join"}"#]
    {
        rejected(text, ErrorCode::BadRequest);
    }
    rejected(r#"{"type":"nonsense"}"#, ErrorCode::UnknownType);
    rejected(r#"{"type":"join","room":"a b"}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"join","room":"r","history":1001}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"history","room":"r","limit":0}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"history","room":"r","limit":201}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"history","room":"r","before":1,"after":1}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"pong","ref":1.5}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"ping","timestamp":{}}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"message","room":"r","content":1,"meta":[]}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"message","room":"r","content":1,"kind":"x"}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"message","room":"r","content":1,"kind":"system"}"#, ErrorCode::BadRequest);
}

#[test]
fn frames_about_one_user_are_validated() {
    let FrameBody::Message(direct) =
        ClientFrame::from_text(r#"{"type":"direct","to":"bob","content":1}"#).unwrap().body
    else {
        panic!()
    };
    assert_eq!(direct.to, Recipient::User("bob".parse().unwrap()));
    for text in [
        r#"{"type":"direct","content":1}"#,
        r#"{"type":"direct","room":"r","content":1}"#,
        r#"{"type":"direct","to":"_api","content":1}"#,
        r#"{"type":"message","to":"bob","content":1}"#,
        r#"{"type":"ack"}"#,
        r#"{"type":"ack","seq":"1"}"#,
        r#"{"type":"watch"}"#,
        r#"{"type":"watch","users":["a b"]}"#,
        r#"{"type":"history"}"#,
        r#"{"type":"history","room":"r","with":"bob"}"#,
        r#"{"type":"session_set","data":[]}"#,
        r#"{"type":"session_set"}"#,
        r#"{"type":"refresh"}"#,
    ] {
        rejected(text, ErrorCode::BadRequest);
    }
    let users = vec!["bob"; WATCH_USERS_MAX + 1];
    let watch = serde_json::json!({"type": "watch", "users": users}).to_string();
    rejected(&watch, ErrorCode::BadRequest);
    let data = "y".repeat(SESSION_BYTES_MAX);
    let set = serde_json::json!({"type": "session_set", "data": {"x": data}}).to_string();
    rejected(&set, ErrorCode::TooLarge);
}

#[test]
fn content_that_would_break_recipients_is_rejected() {
    let deep = format!("{}{}", "[".repeat(101), "]".repeat(101));
    for content in [r#""\ud800""#, "1e999", &deep] {
        let text = format!(r#"{{"type":"message","room":"r","content":{content}}}"#);
        rejected(&text, ErrorCode::BadRequest);
    }
    let brackets =
        format!(r#"{{"type":"message","room":"r","content":["{}\""]}}"#, "[".repeat(200));
    assert!(ClientFrame::from_text(&brackets).is_ok());
    let emoji = r#"{"type":"message","room":"r","content":"\ud83d\udc27"}"#;
    assert!(ClientFrame::from_text(emoji).is_ok());
}

#[test]
fn a_meta_above_its_limit_is_too_large() {
    let meta = format!(r#"{{"x":"{}"}}"#, "y".repeat(META_BYTES_MAX));
    let text = format!(r#"{{"type":"message","room":"r","content":1,"meta":{meta}}}"#);
    rejected(&text, ErrorCode::TooLarge);
}

#[test]
fn create_room_accepts_what_its_limits_allow() {
    let text = r#"{"type":"create_room","room":"r","password":"p","meta":{"a": 1}}"#;
    let FrameBody::CreateRoom(room) = ClientFrame::from_text(text).unwrap().body else { panic!() };
    assert!(room.public && room.name.is_none() && room.max_members.is_none());
    assert_eq!((room.password.as_deref(), room.meta.unwrap().get()), (Some("p"), r#"{"a": 1}"#));
    let with = |more: &str| format!(r#"{{"type":"create_room","room":"r",{more}}}"#);
    rejected(&with(r#""max_members":0"#), ErrorCode::BadRequest);
    rejected(&with(r#""max_members":-1"#), ErrorCode::BadRequest);
    rejected(&with(r#""password":"""#), ErrorCode::BadRequest);
    rejected(&with(r#""name":"a\u0007""#), ErrorCode::BadRequest);
    rejected(&with(r#""meta":[]"#), ErrorCode::BadRequest);
    rejected(&with(&format!(r#""name":"{}""#, "n".repeat(65))), ErrorCode::TooLarge);
    rejected(&with(&format!(r#""password":"{}""#, "p".repeat(1025))), ErrorCode::TooLarge);
    let meta = format!(r#""meta":{{"x":"{}"}}"#, "y".repeat(META_BYTES_MAX));
    rejected(&with(&meta), ErrorCode::TooLarge);
}

#[test]
fn frames_about_typing_and_presence_are_validated() {
    rejected(r#"{"type":"typing","room":"r"}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"read","room":"r","seq":-1}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"read","room":"r"}"#, ErrorCode::BadRequest);
    rejected(r#"{"type":"presence","limit":201}"#, ErrorCode::BadRequest);
    let long = "x".repeat(129);
    rejected(&format!(r#"{{"type":"presence","cursor":"{long}"}}"#), ErrorCode::BadRequest);
    rejected(&format!(r#"{{"type":"rooms","prefix":"{long}"}}"#), ErrorCode::BadRequest);
    let long = "x".repeat(PASSWORD_BYTES_MAX + 1);
    let join = format!(r#"{{"type":"join","room":"r","password":"{long}"}}"#);
    rejected(&join, ErrorCode::BadRequest);
    let FrameBody::Presence(all) = ClientFrame::from_text(r#"{"type":"presence"}"#).unwrap().body
    else {
        panic!()
    };
    assert_eq!((all.room, all.cursor, all.limit), (None, None, 100));
}

#[test]
fn a_binary_frame_is_a_header_and_a_payload() {
    let header = br#"{"type":"message","room":"r","ref":"b"}"#;
    let length = (header.len() as u16).to_be_bytes();
    let frame = [&length[..], header, &[0, 255]].concat();
    let parsed = ClientFrame::from_binary(&frame).unwrap();
    let FrameBody::Message(message) = parsed.body else { panic!("{:?}", parsed.body) };
    assert!(matches!(message.content, RawContent::Binary([0, 255])));
    for bad in [&frame[..1], &frame[..9], b"\0\0", b"\0\x02{}", b"\xFF\xFFx"] {
        assert!(ClientFrame::from_binary(bad).is_err());
    }
}
