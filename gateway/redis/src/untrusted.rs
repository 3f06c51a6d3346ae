//! Values read from Redis are untrusted: an operator, a restore or another program may have written
//! them.
//!
//! Each value is checked once, where it enters: entries by [`Envelope::parse_for_room`], values
//! that scripts read by the scripts themselves (`prelude.lua`), rows where they are parsed. A value
//! that no gateway wrote counts as absent, which every caller handles, and is counted and logged
//! here. It concerns only its room, user or process: a reply with many rows is never rejected for
//! one of them.
//!
//! [`Envelope::parse_for_room`]: skein_core::envelope::Envelope::parse_for_room

use std::fmt::Display;

use redis::{FromRedisValue, ParsingError, RedisError, RedisResult, Value};

use skein_core::telemetry::{
    log_limiter::LogLimiter,
    metrics::{InvalidValue, Label as _, Metrics},
};

/// Precedes the reply of a script that has found invalid values.
const REPORT: &[u8] = b"!bad";

/// Counts a value that no gateway wrote, and logs the first of its kind in a minute.
pub(super) fn report(metrics: &Metrics, kind: InvalidValue, subject: impl Display) {
    static LIMITER: [LogLimiter; InvalidValue::ALL.len()] =
        [const { LogLimiter::new() }; InvalidValue::ALL.len()];
    metrics.redis_invalid_values.of(kind).inc();
    if let Some(suppressed) = LIMITER[kind as usize].should_log() {
        tracing::error!(kind = kind.text(), %subject, suppressed,
            "Redis holds a value that no gateway wrote; it is skipped or repaired");
    }
}

/// The reply of a script, without its report of invalid values, which are counted and logged.
pub(super) fn strip_report(metrics: &Metrics, subject: impl Display, reply: Value) -> Value {
    match reply {
        Value::Array(mut parts)
            if parts.len() == 3
                && matches!(&parts[0], Value::BulkString(first) if first == REPORT) =>
        {
            let reply = parts.pop().unwrap_or(Value::Nil);
            let kinds = parts.pop().map(Lossy::of).unwrap_or_default();
            for kind in kinds.split(' ') {
                let known = InvalidValue::ALL.iter().find(|known| known.text() == kind);
                if let Some(kind) = known {
                    report(metrics, *kind, &subject);
                }
            }
            reply
        }
        reply => reply,
    }
}

/// As [`strip_report`], parsed.
pub(super) fn read<T: FromRedisValue>(
    metrics: &Metrics,
    subject: impl Display,
    reply: Value,
) -> RedisResult<T> {
    Ok(redis::from_redis_value(strip_report(metrics, subject, reply))?)
}

/// Whether a key has another type than gateways give it.
pub(super) fn is_wrong_type(error: &RedisError) -> bool {
    error.code() == Some("WRONGTYPE")
}

/// Text that may contain invalid UTF-8: an invalid name fails where it is parsed, and does not
/// affect other rows of a reply.
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

/// The texts of a list.
pub(super) fn texts(lossy: Vec<Lossy>) -> Vec<String> {
    lossy.into_iter().map(|Lossy(text)| text).collect()
}

/// The reply of one command of a pipeline that does not repair keys of another type: such a key
/// counts as absent.
pub(super) fn or_default<T: FromRedisValue + Default>(
    metrics: &Metrics,
    subject: impl Display,
    reply: RedisResult<Value>,
) -> RedisResult<T> {
    match reply {
        Ok(value) => Ok(redis::from_redis_value(value)?),
        Err(error) if is_wrong_type(&error) => {
            report(metrics, InvalidValue::KeyType, subject);
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
    fn invalid_values_are_counted_and_the_reply_is_read() {
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
    fn a_row_of_invalid_utf8_does_not_affect_others() {
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
    fn a_key_of_another_type_counts_as_absent() {
        let metrics = Metrics::new();
        let wrong = redis::make_extension_error("WRONGTYPE".to_owned(), None);
        let rows: RedisResult<Vec<String>> = or_default(&metrics, "r", Err(wrong));
        assert!(rows.unwrap().is_empty());
        assert_eq!(metrics.redis_invalid_values.of(InvalidValue::KeyType).get(), 1);
        let other = redis::make_extension_error("OOM".to_owned(), None);
        assert!(or_default::<Vec<String>>(&metrics, "r", Err(other)).is_err());
    }
}
