//! Points in time as the database's clock tells them. The wall clock of a node is for log lines only.

use std::num::NonZero;
use std::time::Duration;

use time::Date;
use time::Month;

/// What is later than it can be by more than this was written when the clock was wrong.
pub const CLOCK_SLACK: Duration = Duration::from_secs(1);

/// Of UTC: there are no others here.
pub const DAY_MS: i64 = 86_400_000;

/// Milliseconds since 1970 on the database's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    pub fn plus(self, by: Duration) -> Self {
        Self(self.0.saturating_add(millis(by)))
    }

    /// How long ago `earlier` was; zero if it is later.
    pub fn since(self, earlier: Self) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }

    pub fn minus(self, by: Duration) -> Self {
        Self(self.0.saturating_sub(millis(by)))
    }

    /// The day of UTC, since 1970.
    pub fn day(self) -> i32 {
        i32::try_from(self.0.div_euclid(DAY_MS)).unwrap_or(i32::MAX)
    }
}

/// When something ends, or that it does not by itself, in eight bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expiry(Option<NonZero<i64>>);

impl Expiry {
    /// None: never.
    pub fn at(self) -> Option<Timestamp> {
        self.0.map(|at| Timestamp(at.get()))
    }
}

impl From<Option<Timestamp>> for Expiry {
    fn from(at: Option<Timestamp>) -> Self {
        Self(at.and_then(|at| NonZero::new(at.0)))
    }
}

fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Of 1970-01-01.
const FIRST_JULIAN_DAY: i32 = 2_440_588;

/// The day of UTC that is written so, since 1970: `2026-11-26`.
pub fn parse_day(raw: &str) -> Option<i32> {
    let mut parts = raw.split('-');
    let is_number = |part: &&str| part.bytes().all(|byte| byte.is_ascii_digit());
    let mut part = |digits: usize| parts.next().filter(|part| part.len() == digits).filter(is_number)?.parse::<u16>().ok();
    let (year, month, day) = (part(4)?, part(2)?, part(2)?);
    let month = Month::try_from(u8::try_from(month).ok()?).ok()?;
    let date = Date::from_calendar_date(year.into(), month, u8::try_from(day).ok()?).ok()?;
    parts.next().is_none().then(|| date.to_julian_day() - FIRST_JULIAN_DAY)
}

/// How a day since 1970 is written.
pub fn written_day(day: i32) -> String {
    match Date::from_julian_day(day.saturating_add(FIRST_JULIAN_DAY)) {
        Ok(date) => format!("{:04}-{:02}-{:02}", date.year(), u8::from(date.month()), date.day()),
        Err(_) => day.to_string(), // beyond the year 9999
    }
}

/// How a point in time is written in RFC 3339: `2026-11-28T09:30:00.000Z`.
pub fn written_time(at: Timestamp) -> String {
    let ms = at.0.rem_euclid(DAY_MS);
    let (hour, minute, second, milli) = (ms / 3_600_000, ms / 60_000 % 60, ms / 1000 % 60, ms % 1000);
    format!("{}T{hour:02}:{minute:02}:{second:02}.{milli:03}Z", written_day(at.day()))
}

/// `250 ms`, `90 s`, `10 min`, `2 h 5 min`, `3 d 4 h`: as exact as people want to know it.
pub fn span(of: Duration) -> String {
    let s = of.as_secs();
    match s {
        0 => format!("{} ms", of.as_millis()),
        1..120 => format!("{s} s"),
        120..7_200 => format!("{} min", s / 60),
        7_200..172_800 => format!("{} h {} min", s / 3_600, s / 60 % 60),
        _ => format!("{} d {} h", s / 86_400, s / 3_600 % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_as_exact_as_people_want_it() {
        let cases = [
            (250, "250 ms"),
            (4_999, "4 s"),
            (119_000, "119 s"),
            (3_599_000, "59 min"),
            (7_500_000, "2 h 5 min"),
            (273_600_000, "3 d 4 h"),
        ];
        for (ms, want) in cases {
            assert_eq!(span(Duration::from_millis(ms)), want);
        }
    }

    #[test]
    fn days_are_written_as_dates_and_read_again() {
        for (raw, day) in [("1970-01-01", 0), ("2024-02-29", 19_782), ("2026-11-26", 20_783), ("1969-12-31", -1)] {
            assert_eq!((parse_day(raw), written_day(day).as_str()), (Some(day), raw));
        }
        for raw in ["", "2026-11", "2026-11-26-1", "2026-02-29", "26-11-26", "2026-13-01", "2026-1-1", "+026-11-26", "today"] {
            assert_eq!(parse_day(raw), None, "{raw}");
        }
    }
}
