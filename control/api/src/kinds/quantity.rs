//! Quantities: fixed-point numbers with a suffix (`500m`, `1Gi`, `1e3`), as the API machinery's `resource.Quantity` documents them.
//!
//! The value is held in nano units, which is the finest scale the API keeps; anything finer is rounded up.

use std::fmt;

/// How a quantity was written, which is how it is printed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// `k`, `M`, `m`, … : powers of ten.
    Decimal,
    /// `Ki`, `Mi`, … : powers of two.
    Binary,
    /// `e3`: a written exponent.
    Exponent,
}

/// A parsed quantity. Ordering and equality are by value alone.
#[derive(Clone, Copy, Debug)]
pub struct Quantity {
    nanos: i128,
    form: Form,
}

const NANO: i128 = 1_000_000_000;
/// Largest magnitude: 2^63-1 units, beyond which the API caps.
const CAP: i128 = (i64::MAX as i128) * NANO;
const DECIMAL: [(&str, i32); 10] =
    [("n", -9), ("u", -6), ("m", -3), ("", 0), ("k", 3), ("M", 6), ("G", 9), ("T", 12), ("P", 15), ("E", 18)];
const BINARY: [(&str, u32); 6] = [("Ki", 10), ("Mi", 20), ("Gi", 30), ("Ti", 40), ("Pi", 50), ("Ei", 60)];
/// Digits beyond this many cannot change a capped, nano-rounded value.
const MAX_DIGITS: usize = 60;

/// The words of a refusal, as clients see them.
pub const FORMAT_ERROR: &str =
    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'";

impl Quantity {
    pub const ZERO: Quantity = Quantity { nanos: 0, form: Form::Decimal };

    /// A whole number of units.
    pub fn from_units(n: i64) -> Self {
        Quantity { nanos: i128::from(n) * NANO, form: Form::Decimal }
    }

    /// Parses the textual form; `None` when it is not a quantity.
    pub fn parse(s: &str) -> Option<Self> {
        let (neg, rest) = match s.as_bytes().first()? {
            b'-' => (true, &s[1..]),
            b'+' => (false, &s[1..]),
            _ => (false, s),
        };
        let end = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (number, suffix) = rest.split_at(end);
        let (whole, frac) = number.split_once('.').unwrap_or((number, ""));
        if frac.contains('.') || (whole.is_empty() && frac.is_empty()) || number.len() > MAX_DIGITS {
            return None;
        }
        let (exp10, exp2, form) = scale(suffix)?;
        // value = digits * 10^(exp10 - frac.len()) * 2^exp2, wanted in nanos.
        let mut digits: i128 = 0;
        for b in whole.bytes().chain(frac.bytes()) {
            digits = digits.checked_mul(10).and_then(|d| d.checked_add(i128::from(b - b'0'))).unwrap_or(i128::MAX);
        }
        let mut shift = exp10 + 9 - i32::try_from(frac.len()).ok()?;
        let mut v = digits;
        if exp2 > 0 {
            // Multiply before dividing, so that 0.5Gi is exact; saturation is the cap.
            v = v.saturating_mul(1i128 << exp2);
        }
        while shift > 0 && v < CAP {
            v = v.saturating_mul(10);
            shift -= 1;
        }
        while shift < 0 && v > 0 {
            let (mut div, mut n) = (1i128, 0);
            while shift + n < 0 && n < 30 {
                div *= 10;
                n += 1;
            }
            v = v / div + i128::from(v % div != 0);
            shift += n;
        }
        let v = v.min(CAP);
        Some(Quantity { nanos: if neg { -v } else { v }, form })
    }

    /// Reads a JSON string or number.
    pub fn from_value(v: &serde_json::Value) -> Option<Self> {
        match v {
            serde_json::Value::String(s) => Self::parse(s),
            serde_json::Value::Number(n) => Self::parse(&n.to_string()),
            _ => None,
        }
    }

    pub fn is_zero(self) -> bool {
        self.nanos == 0
    }

    pub fn is_negative(self) -> bool {
        self.nanos < 0
    }

    /// True if the value is a whole number of units.
    pub fn is_whole(self) -> bool {
        self.nanos % NANO == 0
    }

    /// Whole units, rounded up.
    pub fn units(self) -> i64 {
        i64::try_from(div_up(self.nanos, NANO)).unwrap_or(i64::MAX)
    }

    /// Thousandths, rounded up.
    pub fn millis(self) -> i128 {
        div_up(self.nanos, NANO / 1000)
    }

    /// Rounds up to thousandths, the finest a resource list keeps.
    #[must_use]
    pub fn round_up_milli(self) -> Self {
        Quantity { nanos: self.millis() * (NANO / 1000), form: self.form }
    }

    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        // A zero takes the other's form, so that a sum of bytes prints as bytes.
        let form = if self.is_zero() { other.form } else { self.form };
        Quantity { nanos: self.nanos.saturating_add(other.nanos), form }
    }

    #[must_use]
    pub fn minus(self, other: Self) -> Self {
        let form = if self.is_zero() { other.form } else { self.form };
        Quantity { nanos: self.nanos.saturating_sub(other.nanos), form }
    }
}

fn div_up(a: i128, b: i128) -> i128 {
    a.div_euclid(b) + i128::from(a.rem_euclid(b) != 0)
}

/// Suffix → (power of ten, power of two, form).
fn scale(suffix: &str) -> Option<(i32, u32, Form)> {
    if let Some((_, e)) = DECIMAL.iter().find(|(s, _)| *s == suffix) {
        return Some((*e, 0, Form::Decimal));
    }
    if let Some((_, e)) = BINARY.iter().find(|(s, _)| *s == suffix) {
        return Some((0, *e, Form::Binary));
    }
    let exp = suffix.strip_prefix(['e', 'E'])?;
    let n: i32 = exp.parse().ok().filter(|n: &i32| n.abs() <= 1000)?;
    Some((n, 0, Form::Exponent))
}

impl PartialEq for Quantity {
    fn eq(&self, other: &Self) -> bool {
        self.nanos == other.nanos
    }
}
impl Eq for Quantity {}
impl PartialOrd for Quantity {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Quantity {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.nanos.cmp(&other.nanos)
    }
}

impl fmt::Display for Quantity {
    /// The canonical form: the largest suffix that leaves a whole number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            return f.write_str("0");
        }
        if self.form == Form::Binary && self.nanos.abs() >= 1024 * NANO {
            let mut n = div_up(self.nanos, NANO);
            let mut step = 0usize;
            while n % 1024 == 0 && step < BINARY.len() {
                n /= 1024;
                step += 1;
            }
            return write!(f, "{n}{}", if step == 0 { "" } else { BINARY[step - 1].0 });
        }
        let mut n = self.nanos;
        let mut step = 0usize;
        while n % 1000 == 0 && step + 1 < DECIMAL.len() {
            n /= 1000;
            step += 1;
        }
        let (suffix, exp) = DECIMAL[step];
        match self.form {
            Form::Exponent if exp == 0 => write!(f, "{n}"),
            Form::Exponent => write!(f, "{n}e{exp}"),
            _ => write!(f, "{n}{suffix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn canonical_forms() {
        for (given, want) in [
            ("0.5", "500m"),
            ("1024Ki", "1Mi"),
            ("1Gi", "1Gi"),
            ("1.5Gi", "1536Mi"),
            ("1000m", "1"),
            ("1500m", "1500m"),
            ("0", "0"),
            ("0Gi", "0"),
            ("1000", "1k"),
            ("1e3", "1e3"),
            ("1E", "1E"),
            ("100Ki", "100Ki"),
            ("1023Ki", "1023Ki"),
            ("0.5Ki", "512"),
            ("-1", "-1"),
            ("4", "4"),
            (".5", "500m"),
            ("1.", "1"),
            ("12345678", "12345678"),
            ("0.0000000001", "1n"),
        ] {
            assert_eq!(Quantity::parse(given).map(|q| q.to_string()).as_deref(), Some(want), "{given}");
        }
        for bad in ["", "a", "1.2.3", "1 Gi", "1ki", "Gi", "-", "1e", "1KI", "0x1"] {
            assert!(Quantity::parse(bad).is_none(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn parsing_never_panics(s in "[-+]?[0-9.]{0,70}[a-zA-Z]{0,3}[-+]?[0-9]{0,5}") {
            let _ = Quantity::parse(&s).map(|q| q.to_string());
        }

        #[test]
        fn printing_is_stable(n in -1_000_000_000_000i64..1_000_000_000_000, unit in "(n|u|m|k|M||Ki|Mi|e3|e-3)") {
            let once = Quantity::parse(&format!("{n}{unit}")).expect("well formed");
            let twice = Quantity::parse(&once.to_string()).expect("canonical form parses");
            prop_assert_eq!(once.to_string(), twice.to_string());
            if !(once.form == Form::Binary) { prop_assert_eq!(once, twice); }
        }

        #[test]
        fn sums_agree_with_integers(a in -1_000_000i64..1_000_000, b in -1_000_000i64..1_000_000) {
            let sum = Quantity::parse(&format!("{a}m")).expect("a").plus(Quantity::parse(&format!("{b}m")).expect("b"));
            prop_assert_eq!(sum.millis(), i128::from(a + b));
        }
    }
}
