//! Times as people read and write them: UTC, by Howard Hinnant's `civil_from_days` and `days_from_civil`.

const DAY_MS: i64 = 24 * 3600 * 1000;
/// From 0000-03-01, where his years begin, to 1970-01-01.
const EPOCH_DAYS: i64 = 719_468;
const DAYS_OF_ERA: i64 = 146_097;
const FORMS: &str = "a time is milliseconds since 1970, 2026-11-28, or 2026-11-28T09:30:00Z";

/// `2026-11-28 09:30:00.000Z`
pub fn shown(unix_ms: i64) -> String {
    let (days, ms) = (unix_ms.div_euclid(DAY_MS) + EPOCH_DAYS, unix_ms.rem_euclid(DAY_MS));
    let (era, day_of_era) = (days.div_euclid(DAYS_OF_ERA), days.rem_euclid(DAYS_OF_ERA));
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    let (hour, minute, second, milli) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02}.{milli:03}Z")
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
    let ms = day_ms(date).zip(time_ms(time)).map(|(day, time)| day + time);
    ms.filter(|ms| *ms >= 0).ok_or_else(|| format!("{FORMS}, not {text:?}"))
}

fn day_ms(date: &str) -> Option<i64> {
    let [year, month, day] = numbers(date, '-', [4, 2, 2])?;
    let (month_from_march, year) = if month > 2 { (month - 3, year) } else { (month + 9, year - 1) };
    let (era, year_of_era) = (year.div_euclid(400), year.rem_euclid(400));
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    let ms = (era * DAYS_OF_ERA + day_of_era - EPOCH_DAYS) * DAY_MS;
    shown(ms).starts_with(date).then_some(ms) // there is no 30th of February
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
