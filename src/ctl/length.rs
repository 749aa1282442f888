//! Lengths of time as operators write them: `90s`, `10m`, `2h`, `7d`. A bare number has the unit that its option names.

/// Milliseconds of a length; a bare number is milliseconds.
///
/// # Errors
/// It is no length, or longer than 49 days.
pub fn millis(text: &str) -> Result<u32, String> {
    parse(text, 1).and_then(|ms| u32::try_from(ms).ok()).ok_or_else(|| wrong(text, "milliseconds"))
}

/// Seconds of a length; a bare number is seconds.
///
/// # Errors
/// It is no length, or longer than 136 years.
pub fn seconds(text: &str) -> Result<u32, String> {
    let ms = parse(text, 1_000).filter(|ms| ms % 1_000 == 0);
    ms.and_then(|ms| u32::try_from(ms / 1_000).ok()).ok_or_else(|| wrong(text, "seconds"))
}

/// In milliseconds.
fn parse(text: &str, bare_ms: u64) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit_ms = match unit {
        "" => bare_ms,
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(unit_ms)
}

fn wrong(text: &str, unit: &str) -> String {
    format!("must be {unit}, or with a unit as in 90s, 10m, 2h, 7d, is {text:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_has_a_unit_or_the_one_of_its_option() {
        for (text, ms) in
            [("600000", 600_000), ("250ms", 250), ("90s", 90_000), ("10m", 600_000), ("10min", 600_000), ("2h", 7_200_000)]
        {
            assert_eq!(millis(text), Ok(ms), "{text}");
        }
        for (text, s) in [("0", 0), ("3600", 3_600), ("1h", 3_600), ("7d", 604_800), ("3650d", 315_360_000)] {
            assert_eq!(seconds(text), Ok(s), "{text}");
        }
    }

    #[test]
    fn what_is_no_length_is_refused_with_what_would_be_one() {
        for text in ["", "m", "-5", "1.5h", "10 m", "1y", "ten", "99999999999", "99999999999999999999d", "50d"] {
            assert_eq!(
                millis(text).expect_err(text),
                format!("must be milliseconds, or with a unit as in 90s, 10m, 2h, 7d, is {text:?}")
            );
        }
        assert!(seconds("250ms").is_err(), "a quarter of a second would be none");
    }
}
