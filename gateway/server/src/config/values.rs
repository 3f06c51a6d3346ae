//! Values with a syntax of their own, and bounds of values.

use std::{fmt::Display, ops::RangeInclusive, str::FromStr, time::Duration as StdDuration};

use humantime::Duration;

/// Number of bytes such as `262144`, `256KiB`, `16MiB`.
///
/// The crate `bytesize` would not do: it reads `0.5B` as 0, which is "no limit" for some options, and
/// a number that is too large as the largest one, and its errors do not name the units.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(super) struct ByteSize(pub(super) usize);

impl FromStr for ByteSize {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = match unit.trim().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "kib" => 1 << 10,
            "mib" => 1 << 20,
            "gib" => 1 << 30,
            "kb" => 1_000,
            "mb" => 1_000_000,
            _ => {
                return Err(
                    "a size is a number of bytes, or a number with KiB, MiB, GiB, kB or MB",
                );
            }
        };
        let number: usize = number.parse().map_err(|_| "a size starts with a number")?;
        number.checked_mul(unit).map(Self).ok_or("the size is too large")
    }
}

/// Values separated by commas.
pub(super) struct CommaList<T>(pub(super) Vec<T>);

impl<T: FromStr> FromStr for CommaList<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let items = text.split(',').map(str::trim).filter(|item| !item.is_empty());
        items.map(str::parse).collect::<Result<_, _>>().map(Self)
    }
}

/// Value, or `None` if the text is empty.
pub(super) struct Optional<T>(pub(super) Option<T>);

impl<T: FromStr> FromStr for Optional<T> {
    type Err = T::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text.is_empty() { Ok(Self(None)) } else { text.parse().map(Some).map(Self) }
    }
}

/// The values that an option may have.
pub(super) struct Bounds<T> {
    pub(super) range: RangeInclusive<T>,
    /// The range, as errors name it.
    pub(super) text: String,
}

impl<T> Bounds<T> {
    /// Bounds that errors name by `text`.
    pub(super) fn new(range: RangeInclusive<T>, text: &str) -> Self {
        Self { range, text: text.to_owned() }
    }
}

impl<T: Display> From<RangeInclusive<T>> for Bounds<T> {
    fn from(range: RangeInclusive<T>) -> Self {
        let text = format!("{} to {}", range.start(), range.end());
        Self { range, text }
    }
}

impl Bounds<Duration> {
    /// Bounds in seconds.
    pub(super) fn seconds(seconds: RangeInclusive<u64>, text: &str) -> Self {
        let (start, end) = seconds.into_inner();
        let duration = |seconds| StdDuration::from_secs(seconds).into();
        Self::new(duration(start)..=duration(end), text)
    }

    /// Bounds of timeouts and retentions.
    pub(super) fn usual_times() -> Self {
        let (ms, years) = (StdDuration::from_millis(1), StdDuration::from_secs(10 * 365 * 86_400));
        Self::new(ms.into()..=years.into(), "1ms to 10 years")
    }

    /// Bounds of short delays, which may be zero.
    pub(super) fn up_to_an_hour() -> Self {
        Self::seconds(0..=3600, "at most 1h")
    }
}

impl Bounds<ByteSize> {
    /// Bounds of sizes that hold a message or more.
    pub(super) fn usual_sizes() -> Self {
        Self::new(ByteSize(128)..=ByteSize(1 << 40), "128 bytes to 1 TiB")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        let bytes = |text: &str| text.parse::<ByteSize>().map(|bytes| bytes.0);
        assert_eq!(bytes("262144"), Ok(262_144));
        assert_eq!(bytes("256KiB"), Ok(262_144));
        assert_eq!(bytes("1 MB"), Ok(1_000_000));
        assert_eq!(bytes("1GiB "), Ok(1 << 30));
        for bad in ["x", "1x", "", "0.5", "0.5B", "99999999999999999999", "99999999999GiB"] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }
}
