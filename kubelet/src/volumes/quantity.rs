//! Resource quantities: `500m`, `1.5Gi`, `2e3`. Source: apimachinery `resource.Quantity`.

use std::str::FromStr;

/// A quantity in billionths of its unit, the finest that the API knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(i128);

/// Billionths in one.
const NANO: i128 = 1_000_000_000;
/// Digits that a quantity may have; more cannot be meant.
const MAX_DIGITS: usize = 36;

impl Quantity {
    /// The smallest integer not below the quantity: how the API rounds.
    pub fn ceil(self) -> i128 {
        self.divided_by(Self(NANO))
    }

    /// Thousandths, rounded up.
    pub fn milli(self) -> i128 {
        self.divided_by(Self(NANO / 1000))
    }

    /// A quantity of whole units.
    pub fn whole(value: i128) -> Self {
        Self(value.saturating_mul(NANO))
    }

    /// A quantity of thousandths.
    pub fn from_milli(value: i128) -> Self {
        Self(value.saturating_mul(NANO / 1000))
    }

    /// How often `divisor` goes into it, rounded up; a divisor of zero counts as one.
    pub fn divided_by(self, divisor: Self) -> i128 {
        let divisor = if divisor.0 == 0 { NANO } else { divisor.0 };
        self.0.div_euclid(divisor) + i128::from(self.0.rem_euclid(divisor) != 0)
    }
}

impl FromStr for Quantity {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let bad = || format!("{:?} is not a quantity", text.chars().take(64).collect::<String>());
        let text = text.trim();
        let end = text.find(|c: char| !(c.is_ascii_digit() || matches!(c, '.' | '+' | '-'))).unwrap_or(text.len());
        let (number, suffix) = text.split_at(end);
        let (negative, number) = match number.as_bytes().first() {
            Some(b'-') => (true, &number[1..]),
            Some(b'+') => (false, &number[1..]),
            _ => (false, number),
        };
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let digits = format!("{whole}{fraction}");
        if digits.is_empty() || digits.len() > MAX_DIGITS || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let (mut factor, mut divisor): (i128, i128) = match suffix {
            "n" => (1, 1),
            "u" => (1_000, 1),
            "m" => (1_000_000, 1),
            "" => (NANO, 1),
            "k" => (NANO * 1_000, 1),
            "M" => (NANO * 1_000_000, 1),
            "G" => (NANO * NANO, 1),
            "T" => (NANO * NANO * 1_000, 1),
            "P" => (NANO * NANO * 1_000_000, 1),
            "E" => (NANO * NANO * NANO, 1),
            "Ki" => (NANO << 10, 1),
            "Mi" => (NANO << 20, 1),
            "Gi" => (NANO << 30, 1),
            "Ti" => (NANO << 40, 1),
            "Pi" => (NANO << 50, 1),
            "Ei" => (NANO << 60, 1),
            _ => {
                let exponent = suffix.strip_prefix(['e', 'E']).and_then(|e| e.parse::<i32>().ok()).ok_or_else(bad)?;
                let power = 10i128.checked_pow(exponent.unsigned_abs()).ok_or_else(bad)?;
                if exponent >= 0 { (NANO.checked_mul(power).ok_or_else(bad)?, 1) } else { (NANO, power) }
            }
        };
        let places = u32::try_from(fraction.len()).map_err(|_| bad())?;
        divisor = divisor.checked_mul(10i128.checked_pow(places).ok_or_else(bad)?).ok_or_else(bad)?;
        let common = gcd(factor, divisor);
        (factor, divisor) = (factor / common, divisor / common);
        let value = digits.parse::<i128>().map_err(|_| bad())?.checked_mul(factor).ok_or_else(bad)?;
        // Finer than a billionth rounds up, away from zero.
        let value = value / divisor + i128::from(value % divisor != 0);
        Ok(Self(if negative { -value } else { value }))
    }
}

fn gcd(a: i128, b: i128) -> i128 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn usual_forms_are_read() {
        for (text, milli) in [
            ("1", 1000),
            ("500m", 500),
            ("0.1", 100),
            ("1.5Gi", 1_610_612_736_000),
            ("2e3", 2_000_000),
            ("1E", 1_000_000_000_000_000_000_000),
            ("100u", 1),
            ("-1", -1000),
            ("5e-1", 500),
        ] {
            assert_eq!(text.parse::<Quantity>().map(Quantity::milli), Ok(milli), "{text}");
        }
        for bad in ["", "m", "1x", "1.2.3", "--1", "1ki", "1e99999"] {
            assert!(bad.parse::<Quantity>().is_err(), "{bad}");
        }
    }

    #[test]
    fn division_rounds_up() {
        let quantity: Quantity = "1500m".parse().expect("valid");
        assert_eq!(quantity.divided_by("1".parse().expect("valid")), 2);
        assert_eq!(quantity.divided_by("1m".parse().expect("valid")), 1500);
        assert_eq!("-500m".parse::<Quantity>().expect("valid").ceil(), 0);
    }

    proptest! {
        #[test]
        fn reading_never_panics(text in "\\PC{0,50}") {
            let _outcome = text.parse::<Quantity>();
        }

        #[test]
        fn integers_survive(value in -1_000_000_000_000i64..1_000_000_000_000) {
            prop_assert_eq!(value.to_string().parse::<Quantity>().map(Quantity::ceil), Ok(i128::from(value)));
        }
    }
}
