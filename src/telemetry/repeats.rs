//! A warning in a loop is one line in half a minute, and a number.

use std::collections::HashMap;
use std::fmt;
use std::hash::DefaultHasher;
use std::hash::Hash;
use std::hash::Hasher;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;
use std::time::Instant;

use tracing::Event;
use tracing::Level;
use tracing::field::Field;
use tracing::field::Visit;

/// How often the same text is written.
const INTERVAL: Duration = Duration::from_secs(30);
/// Texts that are remembered. If there are more within the interval, further ones are written each time.
const MAX_TEXTS: usize = 1_024;

/// When each text was written last, and how often it was left out since.
#[derive(Default)]
pub(super) struct Repeats(Mutex<HashMap<u64, (Instant, u64)>>);

impl Repeats {
    /// Whether to write the event, and how many with the same text were left out since the last one. Only warnings and errors
    /// are counted: other levels tell each thing once.
    pub fn admit(&self, event: &Event<'_>) -> Option<u64> {
        if *event.metadata().level() > Level::WARN {
            return Some(0);
        }
        let mut text = Text(DefaultHasher::new());
        event.metadata().target().hash(&mut text.0);
        event.record(&mut text);
        self.admit_at(text.0.finish(), Instant::now())
    }

    fn admit_at(&self, text: u64, now: Instant) -> Option<u64> {
        let mut texts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((written, left_out)) = texts.get_mut(&text) {
            if now.saturating_duration_since(*written) < INTERVAL {
                *left_out += 1;
                return None;
            }
            *written = now;
            return Some(std::mem::take(left_out));
        }
        if texts.len() >= MAX_TEXTS {
            texts.retain(|_, (written, _)| now.saturating_duration_since(*written) < INTERVAL);
        }
        if texts.len() < MAX_TEXTS {
            texts.insert(text, (now, 0));
        }
        Some(0)
    }
}

/// The message alone: fields tell of this user and that error.
struct Text(DefaultHasher);

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            format!("{value:?}").hash(&mut self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_text_is_written_once_in_an_interval_and_then_with_what_was_left_out() {
        let (repeats, began) = (Repeats::default(), Instant::now());
        let at = |seconds| began + Duration::from_secs(seconds);
        assert_eq!(repeats.admit_at(1, at(0)), Some(0));
        assert_eq!(repeats.admit_at(2, at(0)), Some(0), "another text");
        assert_eq!((repeats.admit_at(1, at(1)), repeats.admit_at(1, at(29))), (None, None));
        assert_eq!(repeats.admit_at(1, at(30)), Some(2));
        assert_eq!(repeats.admit_at(1, at(31)), None);
    }

    #[test]
    fn texts_that_never_come_again_are_forgotten() {
        let (repeats, began) = (Repeats::default(), Instant::now());
        for text in 0..10 * MAX_TEXTS as u64 {
            assert_eq!(repeats.admit_at(text, began), Some(0));
        }
        assert_eq!(repeats.0.lock().unwrap().len(), MAX_TEXTS);
        repeats.admit_at(u64::MAX, began + INTERVAL);
        assert_eq!(repeats.0.lock().unwrap().len(), 1);
    }
}
