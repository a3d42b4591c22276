//! Resource quantities (`500m`, `1Gi`, `1e3`): exact values and their canonical text.
//!
//! Source: the API's serialization format for quantities. Values are kept in billionths and capped at 2^63 - 1, as there.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

const NANO: i128 = 1_000_000_000;
/// Largest whole value; anything beyond is read as this.
const MAX: i128 = i64::MAX as i128 * NANO;
/// Longest text that is read; longer ones cannot mean anything different.
const MAX_TEXT_BYTES: usize = 256;

/// A quantity and the family of suffixes it was written with.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    nano: i128,
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `m`, `k`, `M` …
    Decimal,
    /// `Ki`, `Mi` …
    Binary,
    /// `e3`
    Exponent,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QuantityError {
    #[error("quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'")]
    Format,
    #[error("unable to parse quantity's suffix")]
    Suffix,
}

impl Quantity {
    pub const ZERO: Self = Self { nano: 0, format: Format::Decimal };

    /// A whole number.
    pub const fn new(value: i64) -> Self {
        Self { nano: value as i128 * NANO, format: Format::Decimal }
    }

    /// Thousandths (millicores).
    pub const fn from_millis(value: i64) -> Self {
        Self { nano: value as i128 * (NANO / 1_000), format: Format::Decimal }
    }

    /// The value rounded up to a whole number.
    pub fn value(&self) -> i64 {
        saturate(div_up(self.nano, NANO))
    }

    /// The value in thousandths, rounded up.
    pub fn millis(&self) -> i64 {
        saturate(div_up(self.nano, NANO / 1_000))
    }

    pub fn as_f64(&self) -> f64 {
        self.nano as f64 / NANO as f64
    }

    /// The exact whole value, if it is one.
    pub fn as_i64(&self) -> Option<i64> {
        (self.nano % NANO == 0).then(|| saturate(self.nano / NANO))
    }

    pub const fn is_zero(&self) -> bool {
        self.nano == 0
    }

    /// -1, 0 or 1.
    pub const fn sign(&self) -> i128 {
        self.nano.signum()
    }

    /// The sum, in the format of `self` unless that is zero.
    #[must_use]
    pub fn plus(&self, other: &Self) -> Self {
        let format = if self.nano == 0 { other.format } else { self.format };
        Self { nano: (self.nano + other.nano).clamp(-MAX, MAX), format }
    }

    /// The difference, in the format of `self` unless that is zero.
    #[must_use]
    pub fn minus(&self, other: &Self) -> Self {
        let format = if self.nano == 0 { other.format } else { self.format };
        Self { nano: (self.nano - other.nano).clamp(-MAX, MAX), format }
    }

    pub const fn format(&self) -> Format {
        self.format
    }
}

fn div_up(value: i128, unit: i128) -> i128 {
    let floor = value.div_euclid(unit);
    if value.rem_euclid(unit) > 0 { floor + 1 } else { floor }
}

fn saturate(value: i128) -> i64 {
    i64::try_from(value).unwrap_or(if value < 0 { i64::MIN } else { i64::MAX })
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nano == other.nano
    }
}

impl Eq for Quantity {}

impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> Ordering {
        self.nano.cmp(&other.nano)
    }
}

impl FromStr for Quantity {
    type Err = QuantityError;

    fn from_str(text: &str) -> Result<Self, QuantityError> {
        if text.is_empty() || text.len() > MAX_TEXT_BYTES {
            return Err(QuantityError::Format);
        }
        let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
        let end = unsigned.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(unsigned.len());
        let (number, suffix) = unsigned.split_at(end);
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        if fraction.contains('.') || (whole.is_empty() && fraction.is_empty()) {
            return Err(QuantityError::Format);
        }
        let letters = suffix.trim_start_matches(|c: char| "eEinumkKMGTP".contains(c));
        let digits = letters.strip_prefix(['+', '-']).unwrap_or(letters);
        if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(QuantityError::Format);
        }
        let (base, exponent, format) = suffix_scale(suffix).ok_or(QuantityError::Suffix)?;
        let nano = scaled(whole, fraction, base, exponent);
        Ok(Self { nano: if text.starts_with('-') { -nano } else { nano }, format })
    }
}

/// What a suffix multiplies by: base (2 or 10), exponent, family.
fn suffix_scale(suffix: &str) -> Option<(u32, i32, Format)> {
    Some(match suffix {
        "" => (10, 0, Format::Decimal),
        "n" => (10, -9, Format::Decimal),
        "u" => (10, -6, Format::Decimal),
        "m" => (10, -3, Format::Decimal),
        "k" => (10, 3, Format::Decimal),
        "M" => (10, 6, Format::Decimal),
        "G" => (10, 9, Format::Decimal),
        "T" => (10, 12, Format::Decimal),
        "P" => (10, 15, Format::Decimal),
        "E" => (10, 18, Format::Decimal),
        "Ki" => (2, 10, Format::Binary),
        "Mi" => (2, 20, Format::Binary),
        "Gi" => (2, 30, Format::Binary),
        "Ti" => (2, 40, Format::Binary),
        "Pi" => (2, 50, Format::Binary),
        "Ei" => (2, 60, Format::Binary),
        _ => (10, suffix.strip_prefix(['e', 'E'])?.parse().ok()?, Format::Exponent),
    })
}

/// `whole.fraction × base^exponent` in billionths, rounded up, capped.
fn scaled(whole: &str, fraction: &str, base: u32, exponent: i32) -> i128 {
    let digits: Vec<u8> =
        whole.bytes().chain(fraction.bytes()).map(|byte| byte - b'0').skip_while(|d| *d == 0).collect();
    if digits.is_empty() {
        return 0;
    }
    let fraction_digits = i64::try_from(fraction.len()).unwrap_or(i64::MAX);
    let mut shift = 9 - fraction_digits;
    let mut factor: i128 = 1;
    if base == 10 {
        shift += i64::from(exponent);
    } else {
        factor <<= exponent.clamp(0, 60);
    }
    // Digits that end up beyond the last kept place only say whether to round up.
    let kept = i64::try_from(digits.len()).unwrap_or(i64::MAX) + shift.min(0);
    let mut value: i128 = 0;
    let mut rest = false;
    for (at, digit) in digits.iter().enumerate() {
        let exact_binary = base == 2;
        if exact_binary || i64::try_from(at).unwrap_or(i64::MAX) < kept {
            value = value.saturating_mul(10).saturating_add(i128::from(*digit));
            if value > MAX << 10 && !exact_binary {
                return MAX;
            }
        } else {
            rest |= *digit != 0;
        }
    }
    if base == 2 {
        value = value.saturating_mul(factor);
        for _ in 0..(-shift).max(0) {
            rest |= value % 10 != 0;
            value /= 10;
        }
    }
    for _ in 0..shift.max(0) {
        value = value.saturating_mul(10);
        if value > MAX {
            return MAX;
        }
    }
    (value + i128::from(rest)).min(MAX)
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nano == 0 {
            return f.write_str("0");
        }
        let small = self.nano.abs() < 1024 * NANO;
        if self.format == Format::Binary && !small && self.nano % NANO == 0 {
            let mut value = self.nano / NANO;
            let mut steps = 0;
            while value % 1024 == 0 && steps < 6 {
                value /= 1024;
                steps += 1;
            }
            return write!(f, "{value}{}", ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"][steps]);
        }
        let mut value = self.nano;
        let mut exponent = -9;
        while value % 1000 == 0 && exponent < 18 {
            value /= 1000;
            exponent += 3;
        }
        if self.format == Format::Exponent {
            return if exponent == 0 { write!(f, "{value}") } else { write!(f, "{value}e{exponent}") };
        }
        let suffix = ["n", "u", "m", "", "k", "M", "G", "T", "P", "E"];
        write!(f, "{value}{}", suffix[usize::try_from(exponent / 3 + 3).unwrap_or(3)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn canonical_texts() {
        for (given, want) in [
            ("0.5", "500m"),
            ("1024Ki", "1Mi"),
            ("1000", "1k"),
            ("1500", "1500"),
            ("100m", "100m"),
            ("1.5Gi", "1536Mi"),
            ("0.1Ki", "102400m"),
            ("1000Ki", "1000Ki"),
            ("512", "512"),
            ("1e3", "1e3"),
            ("12e6", "12e6"),
            ("0", "0"),
            ("-1", "-1"),
            ("0.0000000001", "1n"),
            ("99999999999999999999E", "9223372036854775807"),
            ("0.5Mi", "512Ki"),
            ("1Ki", "1Ki"),
            ("1023", "1023"),
            (".5", "500m"),
            ("5.", "5"),
        ] {
            let quantity: Quantity = given.parse().unwrap_or_else(|error| panic!("{given}: {error}"));
            assert_eq!(quantity.to_string(), want, "{given}");
            let again: Quantity = want.parse().expect("canonical text parses");
            assert_eq!(again, quantity);
        }
        for bad in ["", "a", "1.2.3", "1x", "m", "1 ", "--1"] {
            assert_eq!(bad.parse::<Quantity>(), Err(QuantityError::Format), "{bad}");
        }
        assert_eq!("1ki".parse::<Quantity>(), Err(QuantityError::Suffix));
        assert_eq!("100m".parse::<Quantity>().map(|q| (q.millis(), q.value())), Ok((100, 1)));
    }
}
