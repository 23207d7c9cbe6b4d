//! Numbers as Redis reads and prints them: strict 64-bit integers, doubles as `%.17g`, and the 80-bit extended sums that INCRBYFLOAT shows with `%.17Lf`.

use bytes::{BufMut, BytesMut};
use num_bigint::{BigInt, BigUint, Sign};

/// A 64-bit integer in its one canonical form: no spaces, no plus, no leading zeros, no "-0".
pub(crate) fn parse_int(text: &[u8]) -> Option<i64> {
    let (neg, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        all => (false, all),
    };
    match digits {
        [] => return None,
        [b'0'] => return (!neg).then_some(0),
        [b'0', ..] => return None,
        _ if digits.len() > 19 => return None,
        _ => {}
    }
    let mut n: u64 = 0;
    for b in digits {
        let d = b.wrapping_sub(b'0');
        if d > 9 {
            return None;
        }
        n = n.checked_mul(10)?.checked_add(u64::from(d))?;
    }
    if neg {
        0i64.checked_sub_unsigned(n)
    } else {
        i64::try_from(n).ok()
    }
}

pub(crate) fn push_int(out: &mut BytesMut, n: i64) {
    out.put_slice(itoa::Buffer::new().format(n).as_bytes());
}

/// A hexadecimal number without its sign, `0x1.8p3`: the digits as an integer, and the power of two that they are multiplied by.
fn hexadecimal(text: &[u8]) -> Option<(BigUint, i64)> {
    let digits = text.strip_prefix(b"0x").or_else(|| text.strip_prefix(b"0X"))?;
    let (digits, exp) = match digits.iter().position(|b| b.eq_ignore_ascii_case(&b'p')) {
        Some(i) => {
            let e = std::str::from_utf8(&digits[i + 1..]).ok()?;
            (&digits[..i], e.parse::<i32>().ok()?)
        }
        None => (digits, 0),
    };
    let (whole, fraction) = match digits.iter().position(|b| *b == b'.') {
        Some(i) => (&digits[..i], &digits[i + 1..]),
        None => (digits, &[][..]),
    };
    let all: Vec<u8> = whole.iter().chain(fraction).copied().collect();
    if all.is_empty() || !all.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let exp = i64::from(exp) - 4 * fraction.len() as i64;
    let n = BigUint::parse_bytes(&all, 16)?;
    (exp.abs() <= 20_000).then_some((n, exp))
}

/// A double as strtod takes it whole: no leading space, infinities allowed, NaN and overflow not.
pub(crate) fn parse_double(text: &[u8]) -> Option<f64> {
    let (neg, magnitude) = match text {
        [b'-', rest @ ..] => (true, rest),
        [b'+', rest @ ..] => (false, rest),
        all => (false, all),
    };
    if let Some((n, exp)) = hexadecimal(magnitude) {
        // More than 53 bits of digits are rounded twice here; nobody writes such.
        let digits = n.to_u64_digits();
        let d = match digits.as_slice() {
            [] => 0.0,
            [low] => *low as f64 * 2f64.powi(i32::try_from(exp).ok()?),
            _ => return None,
        };
        return d.is_finite().then_some(if neg { -d } else { d });
    }
    let d: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    if d.is_nan() || (d.is_infinite() && text.iter().any(u8::is_ascii_digit)) {
        return None;
    }
    Some(d)
}

/// `%.17g`, with infinities as `inf` and `-inf`.
pub(crate) fn format_double(d: f64) -> String {
    if d.is_infinite() {
        return if d > 0.0 { "inf".into() } else { "-inf".into() };
    }
    if d == d.trunc() && d.abs() < 1e17 && !(d == 0.0 && d.is_sign_negative()) {
        return (d as i64).to_string();
    }
    let e = format!("{d:.16e}");
    let Some((mantissa, exp)) = e.split_once('e') else {
        return e;
    };
    let exp: i32 = exp.parse().unwrap_or(0);
    let strip = |s: &str| {
        if s.contains('.') {
            s.trim_end_matches('0').trim_end_matches('.').to_owned()
        } else {
            s.to_owned()
        }
    };
    if !(-4..17).contains(&exp) {
        return format!(
            "{}e{}{:02}",
            strip(mantissa),
            if exp < 0 { '-' } else { '+' },
            exp.abs()
        );
    }
    strip(&format!("{d:.*}", (16 - exp) as usize))
}

/// An extended-precision number as x87 keeps it: `mant * 2^exp`, the top bit of `mant` set unless it is zero.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Extended {
    neg: bool,
    mant: u64,
    exp: i32,
}

/// What a text was as an extended number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum ParsedExtended {
    Finite(Extended),
    Infinite,
}

/// Exponents beyond this are outside an extended number's range whatever the digits; it bounds the work a short text can ask for.
const MAX_EXPONENT: i64 = 6000;
const MAX_TEXT: usize = 5 * 1024;

impl Extended {
    pub(crate) const ZERO: Self = Self {
        neg: false,
        mant: 0,
        exp: 0,
    };

    /// Reads decimal text whole.
    pub(crate) fn parse(text: &[u8]) -> Option<ParsedExtended> {
        if text.is_empty() || text.len() >= MAX_TEXT {
            return None;
        }
        let (neg, rest) = match text {
            [b'-', rest @ ..] => (true, rest),
            [b'+', rest @ ..] => (false, rest),
            all => (false, all),
        };
        if rest.eq_ignore_ascii_case(b"inf") || rest.eq_ignore_ascii_case(b"infinity") {
            return Some(ParsedExtended::Infinite);
        }
        if let Some((n, exp2)) = hexadecimal(rest) {
            let power = BigUint::from(1u8) << exp2.unsigned_abs() as usize;
            return Self::rounded(neg, n, power, exp2 < 0);
        }
        let (number, exp10) = match rest.iter().position(|b| b.eq_ignore_ascii_case(&b'e')) {
            Some(i) => {
                let e = &rest[i + 1..];
                let digits = e.strip_prefix(b"+").or_else(|| e.strip_prefix(b"-")).unwrap_or(e);
                if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
                    return None;
                }
                let magnitude = std::str::from_utf8(digits).ok()?.parse::<i64>().unwrap_or(i64::MAX / 4);
                (
                    &rest[..i],
                    if e.first() == Some(&b'-') {
                        -magnitude
                    } else {
                        magnitude
                    },
                )
            }
            None => (rest, 0),
        };
        let (whole, fraction) = match number.iter().position(|b| *b == b'.') {
            Some(i) => (&number[..i], &number[i + 1..]),
            None => (number, &[][..]),
        };
        if (whole.is_empty() && fraction.is_empty()) || !whole.iter().chain(fraction).all(u8::is_ascii_digit) {
            return None;
        }
        let digits: Vec<u8> = whole.iter().chain(fraction).copied().collect();
        let n = BigUint::parse_bytes(&digits, 10)?;
        let exp10 = exp10 - fraction.len() as i64;
        if exp10.abs() > MAX_EXPONENT && n != BigUint::ZERO {
            return None;
        }
        let exp10 = exp10.clamp(-MAX_EXPONENT, MAX_EXPONENT);
        let power = BigUint::from(10u8).pow(exp10.unsigned_abs() as u32);
        Self::rounded(neg, n, power, exp10 < 0)
    }

    /// `n * power`, or `n / power` when `divide`, as an extended number; `None` outside its range.
    fn rounded(neg: bool, n: BigUint, power: BigUint, divide: bool) -> Option<ParsedExtended> {
        if n == BigUint::ZERO {
            return Some(ParsedExtended::Finite(Self { neg, ..Self::ZERO }));
        }
        let (mant, exp) = if divide {
            round(n, power)
        } else {
            round(n * power, BigUint::from(1u8))
        };
        let top = i64::from(exp) + 64;
        (top <= 16384 && top > -16382).then_some(ParsedExtended::Finite(Self { neg, mant, exp }))
    }

    /// The sum, rounded once; `None` when it leaves the range.
    pub(crate) fn add(self, other: Self) -> Option<Self> {
        let low = self.exp.min(other.exp);
        let big = |x: Self| {
            let m = BigUint::from(x.mant) << (x.exp - low) as usize;
            BigInt::from_biguint(if x.neg { Sign::Minus } else { Sign::Plus }, m)
        };
        let sum = big(self) + big(other);
        if sum.sign() == Sign::NoSign {
            return Some(Self {
                neg: self.neg && other.neg,
                ..Self::ZERO
            });
        }
        let (mant, exp) = round(sum.magnitude().clone(), BigUint::from(1u8));
        let exp = exp + low;
        (exp + 64 <= 16384).then_some(Self {
            neg: sum.sign() == Sign::Minus,
            mant,
            exp,
        })
    }

    /// `%.17Lf` without trailing zeros.
    pub(crate) fn format(self) -> String {
        const DIGITS: usize = 17;
        let scaled = BigUint::from(self.mant) * BigUint::from(10u8).pow(DIGITS as u32);
        let n = if self.exp >= 0 {
            scaled << self.exp as usize
        } else {
            shift_right_rounded(scaled, (-self.exp) as usize, false)
        };
        let mut text = n.to_string();
        if text.len() <= DIGITS {
            text = format!("{}{text}", "0".repeat(DIGITS + 1 - text.len()));
        }
        text.insert(text.len() - DIGITS, '.');
        let text = text.trim_end_matches('0').trim_end_matches('.');
        if self.neg && text != "0" {
            format!("-{text}")
        } else {
            text.to_owned()
        }
    }
}

/// `n >> by`, to nearest, ties to even; `sticky` says that something non-zero was lost below already.
fn shift_right_rounded(n: BigUint, by: usize, sticky: bool) -> BigUint {
    if by == 0 {
        return n;
    }
    let q = &n >> by;
    let low = n - (&q << by);
    let half = BigUint::from(1u8) << (by - 1);
    let up = match low.cmp(&half) {
        std::cmp::Ordering::Greater => true,
        std::cmp::Ordering::Equal => sticky || q.bit(0),
        std::cmp::Ordering::Less => false,
    };
    if up { q + 1u8 } else { q }
}

/// `num / den` as 64 bits and a power of two.
fn round(num: BigUint, den: BigUint) -> (u64, i32) {
    let shift = 67 - (num.bits() as i64 - den.bits() as i64);
    let (num, den) = if shift >= 0 {
        (num << shift as usize, den)
    } else {
        (num, den << (-shift) as usize)
    };
    let q = &num / &den;
    let sticky = &q * &den != num;
    let extra = q.bits() as i64 - 64;
    let mut m = shift_right_rounded(q, extra as usize, sticky);
    let mut exp = extra - shift;
    if m.bits() > 64 {
        m >>= 1;
        exp += 1;
    }
    (m.to_u64_digits().first().copied().unwrap_or(0), exp as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_are_canonical() {
        assert_eq!(parse_int(b"-9223372036854775808"), Some(i64::MIN));
        assert_eq!(parse_int(b"9223372036854775807"), Some(i64::MAX));
        for bad in [
            &b"9223372036854775808"[..],
            b"",
            b"-",
            b"-0",
            b"01",
            b"+1",
            b" 1",
            b"1 ",
            b"1a",
            b"99999999999999999999",
        ] {
            assert_eq!(parse_int(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn doubles_print_as_seventeen_significant_digits() {
        for (d, text) in [
            (0.1, "0.10000000000000001"),
            (3.0, "3"),
            (-1.5, "-1.5"),
            (1e17, "1e+17"),
            (1e100, "1e+100"),
            (1.5e-7, "1.4999999999999999e-07"),
            (f64::NEG_INFINITY, "-inf"),
        ] {
            assert_eq!(format_double(d), text);
        }
    }

    #[test]
    fn extended_sums_print_as_redis_prints_them() {
        let sum = |a: &str, b: &str| match (Extended::parse(a.as_bytes()), Extended::parse(b.as_bytes())) {
            (Some(ParsedExtended::Finite(a)), Some(ParsedExtended::Finite(b))) => a.add(b).map(Extended::format),
            _ => None,
        };
        assert_eq!(sum("0.1", "0.2").as_deref(), Some("0.3"));
        assert_eq!(sum("10.5", "0.1").as_deref(), Some("10.6"));
        assert_eq!(sum("5.0e3", "200").as_deref(), Some("5200"));
        assert_eq!(sum("1.5", "-1.5").as_deref(), Some("0"));
        assert_eq!(Extended::parse(b"1e99999999999"), None);
        assert_eq!(Extended::parse(b"1.2.3"), None);
    }
}
