//! Lengths of time as people type them: `90`, `60s`, `5m`, `2h30m`, `1d`.

/// Reads a length of time in seconds. A number without a unit counts seconds.
///
/// # Errors
/// What is wrong with the text, for a usage message.
pub fn seconds(text: &str) -> Result<u32, String> {
    let wrong = || format!("\"{text}\" is not a length of time; write 90, 60s, 5m, 2h30m or 1d");
    if text.is_empty() {
        return Err(wrong());
    }
    if text.bytes().all(|b| b.is_ascii_digit()) {
        return text.parse().map_err(|_| format!("\"{text}\" is too long a time"));
    }
    let mut total: u64 = 0;
    let mut rest = text;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        let (unit, after) = rest[digits..].split_at_checked(1).ok_or_else(wrong)?;
        let factor = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 24 * 3600,
            _ => return Err(wrong()),
        };
        total = number
            .checked_mul(factor)
            .and_then(|part| total.checked_add(part))
            .ok_or_else(wrong)?;
        rest = after;
    }
    u32::try_from(total).map_err(|_| format!("\"{text}\" is too long a time"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_people_write_them() {
        for (text, wanted) in [
            ("0", 0),
            ("90", 90),
            ("60s", 60),
            ("5m", 300),
            ("2h30m", 9000),
            ("1d", 86400),
        ] {
            assert_eq!(seconds(text), Ok(wanted), "{text}");
        }
        for wrong in [
            "",
            "s",
            "5x",
            "5m3",
            "-1",
            "1é",
            "99999999999",
            "9999999999999999999999s",
            "99999d99999999999999999d",
        ] {
            assert!(seconds(wrong).is_err(), "{wrong}");
        }
    }
}
