//! Positions in a log: an epoch, and a number within it.
//!
//! Entries are numbered 1, 2, 3 … within an epoch. With a new epoch, a client can no longer
//! continue its copy of the log by number. A position is all that a client needs to resume on any
//! node.

use std::{borrow::Cow, fmt, str::FromStr, sync::Arc};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// The number of an entry in its log: 1 to 2^53−1, so that JavaScript holds it; 0 means "no entry
/// yet".
pub type Seq = u64;

/// The largest [`Seq`]: 2^53−1, the largest integer that a JavaScript number holds exactly.
pub const SEQ_MAX: Seq = (1 << 53) - 1;

/// The epoch of a log: opaque to clients, compared for equality only.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Epoch(Arc<str>);

/// The text is not an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an epoch must be 1 to 32 of A-Z a-z 0-9 _ -")]
pub struct InvalidEpoch;

impl Epoch {
    /// The epoch as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The placeholder for the epoch of a room without a log.
    pub fn none() -> Self {
        Self(NO_EPOCH.into())
    }

    /// Whether this is [`Epoch::none`].
    pub fn is_none(&self) -> bool {
        &*self.0 == NO_EPOCH
    }
}

/// No log has this epoch: epochs begin with a digit.
const NO_EPOCH: &str = "-";

impl FromStr for Epoch {
    type Err = InvalidEpoch;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
        if text.is_empty() || text.len() > 32 || !text.bytes().all(allowed) {
            return Err(InvalidEpoch);
        }
        Ok(Self(text.into()))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Serialize for Epoch {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Epoch {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Cow::<str>::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// A position in a log. On the wire: `{"epoch":"…","seq":N}`; in a query: `<epoch>:<seq>`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Position {
    /// The epoch that `seq` counts in.
    pub epoch: Epoch,
    /// The last known entry, 0 for none.
    #[serde(deserialize_with = "seq_in_range")]
    pub seq: Seq,
}

/// The text is not a position, `<epoch>:<seq>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a position must be <epoch>:<seq>")]
pub struct InvalidPosition;

impl Position {
    /// The position of `seq` in `epoch`.
    pub fn new(epoch: Epoch, seq: Seq) -> Self {
        Self { epoch, seq }
    }
}

impl FromStr for Position {
    type Err = InvalidPosition;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (epoch, seq) = text.split_once(':').ok_or(InvalidPosition)?;
        let seq = seq.parse().ok().filter(|seq| *seq <= SEQ_MAX).ok_or(InvalidPosition)?;
        Ok(Self { epoch: epoch.parse().map_err(|_| InvalidPosition)?, seq })
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.epoch, self.seq)
    }
}

/// Deserializes a [`Seq`] and rejects numbers above [`SEQ_MAX`].
pub fn seq_in_range<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Seq, D::Error> {
    let seq = Seq::deserialize(deserializer)?;
    if seq > SEQ_MAX {
        return Err(D::Error::custom("a seq must be at most 2^53-1"));
    }
    Ok(seq)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_position_reads_back_what_it_prints() {
        let position: Position = "e-1_Z:42".parse().unwrap();
        assert_eq!(position.to_string(), "e-1_Z:42");
        assert_eq!(serde_json::to_string(&position).unwrap(), r#"{"epoch":"e-1_Z","seq":42}"#);
    }

    #[test]
    fn a_position_with_an_invalid_part_is_rejected() {
        for bad in ["", "e", "e:", ":1", "e:-1", "e:x", "e.f:1", "e:9007199254740992"] {
            assert!(bad.parse::<Position>().is_err(), "{bad:?}");
        }
    }
}
