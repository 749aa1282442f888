//! Times as people read and write them, in UTC.

use crate::domain::time::DAY_MS;
use crate::domain::time::Timestamp;
use crate::domain::time::parse_day;
use crate::domain::time::written_time;

const FORMS: &str = "a time is milliseconds since 1970, 2026-11-28, or 2026-11-28T09:30:00Z";

/// `2026-11-28 09:30:00.000Z`
pub fn shown(unix_ms: i64) -> String {
    written_time(Timestamp(unix_ms)).replacen('T', " ", 1)
}

/// Milliseconds since 1970 of what [`shown`] prints, of RFC 3339, of a day, or of milliseconds.
///
/// # Errors
/// It is none of these.
pub fn parse(text: &str) -> Result<i64, String> {
    if let Ok(unix_ms) = text.parse() {
        return if unix_ms >= 0 { Ok(unix_ms) } else { Err(FORMS.to_owned()) };
    }
    let (date, time) = text.split_once(['T', 't', ' ']).unwrap_or((text, "00:00:00Z"));
    let ms = parse_day(date).zip(time_ms(time)).map(|(day, time)| i64::from(day) * DAY_MS + time);
    ms.filter(|ms| *ms >= 0).ok_or_else(|| format!("{FORMS}, not {text:?}"))
}

/// Of a time of day with `Z`, `+01:00` or the like.
fn time_ms(time: &str) -> Option<i64> {
    let (clock, offset_ms) = match time.strip_suffix(['Z', 'z']) {
        Some(clock) => (clock, 0),
        None => {
            let at = time.rfind(['+', '-'])?;
            let [hours, minutes] = numbers(&time[at + 1..], ':', [2, 2])?;
            let offset_ms = (hours * 60 + minutes) * 60_000;
            (&time[..at], if time[at..].starts_with('-') { -offset_ms } else { offset_ms })
        }
    };
    let (clock, fraction) = clock.split_once('.').unwrap_or((clock, "0"));
    let [hour, minute, second] = numbers(clock, ':', [2, 2, 2])?;
    let is_time = hour < 24 && minute < 60 && second < 60 && fraction.bytes().all(|byte| byte.is_ascii_digit());
    let milli: i64 = format!("{fraction:0<3}").get(..3)?.parse().ok()?;
    is_time.then_some(((hour * 60 + minute) * 60 + second) * 1000 + milli - offset_ms)
}

/// Numbers of exactly so many digits.
fn numbers<const N: usize>(text: &str, between: char, digits: [usize; N]) -> Option<[i64; N]> {
    let parts: [&str; N] = text.split(between).collect::<Vec<_>>().try_into().ok()?;
    let is_number = |(part, digits): (&&str, usize)| part.len() == digits && part.bytes().all(|byte| byte.is_ascii_digit());
    if !parts.iter().zip(digits).all(is_number) {
        return None;
    }
    Some(parts.map(|part| part.parse().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_and_are_read_as_they_are_shown() {
        let check = |unix_ms: i64, want: &str| {
            assert_eq!(shown(unix_ms), want);
            assert_eq!(parse(want).ok(), Some(unix_ms).filter(|ms| *ms >= 0), "{want}");
        };
        check(0, "1970-01-01 00:00:00.000Z");
        check(-1, "1969-12-31 23:59:59.999Z");
        check(951_782_400_000, "2000-02-29 00:00:00.000Z");
        check(1_700_000_000_123, "2023-11-14 22:13:20.123Z");
        check(4_107_542_400_000, "2100-03-01 00:00:00.000Z");
    }

    #[test]
    fn a_time_may_be_written_in_several_ways() {
        let check = |text: &str, want: Option<&str>| {
            assert_eq!(parse(text).ok().map(shown), want.map(|want| format!("{want}Z")), "{text}");
        };
        check("1700000000123", Some("2023-11-14 22:13:20.123"));
        check("2026-11-28", Some("2026-11-28 00:00:00.000"));
        check("2026-11-28T09:30:00Z", Some("2026-11-28 09:30:00.000"));
        check("2026-11-28T09:30:00.5+01:00", Some("2026-11-28 08:30:00.500"));
        check("2026-11-28t09:30:00.123456789-00:30", Some("2026-11-28 10:00:00.123"));
        for wrong in
            ["", "-5", "now", "2026-02-30", "2026-1-1", "2026-11-28T25:00:00Z", "2026-11-28T09:30:00", "2026-11-28T09:30Z"]
        {
            check(wrong, None);
        }
    }
}
