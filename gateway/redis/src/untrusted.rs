//! What is read from Redis is not trusted: an operator, a restore or another program may have written it.
//!
//! Each value is checked once, where it enters: entries by [`Envelope::of_room`], what scripts read by the
//! scripts themselves (`prelude.lua`), rows where they are parsed. One that no gateway wrote is taken for
//! absent, which every part knows what to do about, and is counted and logged here. It concerns only the
//! room, user or process whose it is: an answer with many rows is never refused for one of them.
//!
//! [`Envelope::of_room`]: skein_core::envelope::Envelope::of_room

use std::fmt::Display;

use redis::{FromRedisValue, ParsingError, RedisError, RedisResult, Value};

use skein_core::telemetry::{
    log_limiter::LogLimiter,
    metrics::{InvalidValue, Label as _, Metrics},
};

/// In front of a reply of a script that found something.
const BAD: &[u8] = b"!bad";

/// Counts a value that no gateway wrote, and logs the first of its kind in a minute.
pub(super) fn report(metrics: &Metrics, kind: InvalidValue, place: impl Display) {
    static LIMITER: [LogLimiter; InvalidValue::ALL.len()] =
        [const { LogLimiter::new() }; InvalidValue::ALL.len()];
    metrics.redis_invalid_values.of(kind).inc();
    if let Some(suppressed) = LIMITER[kind as usize].should_log() {
        tracing::error!(kind = kind.text(), %place, suppressed,
            "Redis holds a value that no gateway wrote; it is skipped or repaired");
    }
}

/// The reply of a script, without what it found.
pub(super) fn strip_report(metrics: &Metrics, place: impl Display, reply: Value) -> Value {
    match reply {
        Value::Array(mut parts)
            if parts.len() == 3
                && matches!(&parts[0], Value::BulkString(first) if first == BAD) =>
        {
            let reply = parts.pop().unwrap_or(Value::Nil);
            let kinds = parts.pop().map(Lossy::of).unwrap_or_default();
            for kind in kinds.split(' ') {
                let known = InvalidValue::ALL.iter().find(|known| known.text() == kind);
                if let Some(kind) = known {
                    report(metrics, *kind, &place);
                }
            }
            reply
        }
        reply => reply,
    }
}

/// As [`strip_report`], read as a script answers.
pub(super) fn read<T: FromRedisValue>(
    metrics: &Metrics,
    place: impl Display,
    reply: Value,
) -> RedisResult<T> {
    Ok(redis::from_redis_value(strip_report(metrics, place, reply))?)
}

/// Whether a key is of another type than a gateway gives it.
pub(super) fn is_wrong_type(error: &RedisError) -> bool {
    error.code() == Some("WRONGTYPE")
}

/// Text of which not all bytes may be UTF-8: what is no name is found out where it is parsed, and the
/// other rows of an answer do not suffer from it.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Lossy(pub(super) String);

impl Lossy {
    fn of(value: Value) -> String {
        match value {
            Value::BulkString(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Value::SimpleString(text) => text,
            Value::Int(number) => number.to_string(),
            _ => String::new(),
        }
    }
}

impl FromRedisValue for Lossy {
    fn from_redis_value(value: Value) -> Result<Self, ParsingError> {
        match value {
            Value::BulkString(_) | Value::SimpleString(_) | Value::Int(_) => {
                Ok(Self(Self::of(value)))
            }
            other => String::from_redis_value(other).map(Self),
        }
    }
}

/// Texts out of a list of them.
pub(super) fn texts(lossy: Vec<Lossy>) -> Vec<String> {
    lossy.into_iter().map(|Lossy(text)| text).collect()
}

/// The answer of one command of a pipeline that may have found a key of another type, where nothing is
/// to be repaired: as if the key were not there.
pub(super) fn or_default<T: FromRedisValue + Default>(
    metrics: &Metrics,
    place: impl Display,
    answer: RedisResult<Value>,
) -> RedisResult<T> {
    match answer {
        Ok(value) => Ok(redis::from_redis_value(value)?),
        Err(error) if is_wrong_type(&error) => {
            report(metrics, InvalidValue::KeyType, place);
            Ok(T::default())
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bulk(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn what_a_script_found_is_counted_and_its_reply_is_read() {
        let metrics = Metrics::new();
        let reply =
            Value::Array(vec![bulk("!bad"), bulk("log_meta key_type log_meta ?"), Value::Int(7)]);
        assert_eq!(strip_report(&metrics, "r", reply), Value::Int(7));
        assert_eq!(metrics.redis_invalid_values.of(InvalidValue::LogMeta).get(), 2);
        assert_eq!(metrics.redis_invalid_values.sum(), 3);
        let plain = Value::Array(vec![bulk("a"), bulk("b"), bulk("c")]);
        assert_eq!(strip_report(&metrics, "r", plain.clone()), plain);
    }

    #[test]
    fn a_row_that_is_no_text_spoils_no_others() {
        let rows = Value::Array(vec![bulk("ann"), Value::BulkString(vec![0xFF])]);
        let rows: Vec<Lossy> = redis::from_redis_value(rows).unwrap();
        assert_eq!(texts(rows), ["ann", "\u{FFFD}"]);
        assert!(
            redis::from_redis_value::<Vec<String>>(Value::Array(vec![Value::BulkString(vec![
                0xFF
            ])]))
            .is_err()
        );
    }

    #[test]
    fn a_key_of_another_type_is_as_none() {
        let metrics = Metrics::new();
        let wrong = redis::make_extension_error("WRONGTYPE".to_owned(), None);
        let rows: RedisResult<Vec<String>> = or_default(&metrics, "r", Err(wrong));
        assert!(rows.unwrap().is_empty());
        assert_eq!(metrics.redis_invalid_values.of(InvalidValue::KeyType).get(), 1);
        let other = redis::make_extension_error("OOM".to_owned(), None);
        assert!(or_default::<Vec<String>>(&metrics, "r", Err(other)).is_err());
    }
}
