//! What the calls of one kind came to.

use std::time::Duration;

use serde::Serialize;

const NAMES: [&str; 7] = ["", "CALLS", "ERRORS", "PER SECOND", "P50 MS", "P99 MS", "MAX MS"];
/// Of the first column, and of each other.
const WIDTHS: (usize, usize) = (10, 12);

/// Calls of one kind.
#[derive(Debug, Default, Serialize)]
pub struct Figures {
    pub calls: u64,
    pub errors: u64,
    pub per_second: f64,
    pub p50_ms: f64,
    pub p99_ms: f64,
    pub max_ms: f64,
    /// What the first call that failed was told; empty if none did.
    pub first_error: String,
    /// Of each call that was answered well.
    #[serde(skip)]
    times: Vec<Duration>,
}

impl Figures {
    pub fn add(&mut self, time: Duration, answered: Result<(), String>) {
        self.calls += 1;
        match answered {
            Ok(()) => self.times.push(time),
            Err(why) => {
                if self.errors == 0 {
                    self.first_error = why;
                }
                self.errors += 1;
            }
        }
    }

    /// All of them have ended, after so long.
    pub fn over(mut self, elapsed: Duration) -> Self {
        self.times.sort_unstable();
        // As many times at most as a part may have calls: the conversions are exact.
        self.per_second = rounded(self.times.len() as f64 / elapsed.as_secs_f64().max(f64::MIN_POSITIVE));
        (self.p50_ms, self.p99_ms, self.max_ms) = (self.quantile(50), self.quantile(99), self.quantile(100));
        self
    }

    /// In milliseconds: so many percent of the calls took no longer.
    fn quantile(&self, percent: usize) -> f64 {
        let place = (self.times.len() * percent).div_ceil(100).max(1) - 1;
        self.times.get(place).map_or(0.0, |time| rounded(time.as_secs_f64() * 1_000.0))
    }

    fn row(&self, name: &str) -> [String; 7] {
        let [rate, p50, p99, max] = [self.per_second, self.p50_ms, self.p99_ms, self.max_ms].map(|figure| format!("{figure:.2}"));
        [name.to_owned(), self.calls.to_string(), self.errors.to_string(), rate, p50, p99, max]
    }
}

/// A line for each kind, and one for each kind's first error.
pub fn table(all: &[(&str, &Figures)]) -> String {
    let rows = std::iter::once(NAMES.map(str::to_owned)).chain(all.iter().map(|(name, figures)| figures.row(name)));
    let line = |row: [String; 7]| {
        let [name, rest @ ..] = row;
        let cells: String = rest.iter().map(|cell| format!("{cell:>width$}", width = WIDTHS.1)).collect();
        format!("{name:<width$}{cells}", width = WIDTHS.0)
    };
    let failed = all.iter().filter(|(_, figures)| figures.errors > 0);
    let errors = failed.map(|(name, figures)| format!("{name}, the first error: {}", figures.first_error));
    rows.map(line).chain(errors).collect::<Vec<_>>().join("\n")
}

fn rounded(figure: f64) -> f64 {
    (figure * 1_000.0).round() / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_the_calls_are_as_fast_as_the_median() {
        let mut figures = Figures::default();
        (1..=100).rev().for_each(|ms| figures.add(Duration::from_millis(ms), Ok(())));
        let figures = figures.over(Duration::from_secs(4));
        assert_eq!((figures.p50_ms, figures.p99_ms, figures.max_ms), (50.0, 99.0, 100.0));
        assert_eq!((figures.calls, figures.per_second), (100, 25.0));
    }

    #[test]
    fn errors_are_counted_apart_and_the_first_one_is_told() {
        let mut figures = Figures::default();
        for answered in [Err("one".to_owned()), Ok(()), Err("two".to_owned())] {
            figures.add(Duration::from_millis(8), answered);
        }
        let figures = figures.over(Duration::from_secs(1));
        assert_eq!((figures.calls, figures.errors, figures.per_second), (3, 2, 1.0));
        let table = table(&[("queries", &figures), ("binds", &Figures::default().over(Duration::ZERO))]);
        assert!(table.contains("queries              3           2        1.00        8.00        8.00        8.00"), "{table}");
        assert!(table.ends_with("queries, the first error: one"), "{table}");
    }
}
