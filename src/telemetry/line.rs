//! How an event becomes a line: exactly one, whatever is in it.

use std::fmt;

use tracing::Event;
use tracing::Subscriber;
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::FormatEvent;
use tracing_subscriber::fmt::FormatFields;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::registry::LookupSpan;

use crate::telemetry::repeats::Repeats;

pub(super) struct Line<F> {
    format: F,
    is_json: bool,
    repeats: Repeats,
}

impl<F> Line<F> {
    pub fn json(format: F) -> Self {
        Self { format, is_json: true, repeats: Repeats::default() }
    }

    /// What others wrote, such as an operator's reason for a hold, is escaped: it can neither begin a line of its own nor
    /// speak to a terminal.
    pub fn text(format: F) -> Self {
        Self { format, is_json: false, repeats: Repeats::default() }
    }
}

impl<S, N, F> FormatEvent<S, N> for Line<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut out: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let Some(left_out) = self.repeats.admit(event) else { return Ok(()) };
        let mut line = String::new();
        self.format.format_event(context, Writer::new(&mut line), event)?;
        let line = line.trim_end_matches('\n');
        match (self.is_json, left_out) {
            (true, 0) => writeln!(out, "{line}"),
            (true, _) => writeln!(out, "{},\"left_out\":{left_out}}}", line.strip_suffix('}').unwrap_or(line)),
            (false, 0) => writeln!(out, "{}", escaped(line)),
            (false, _) => writeln!(out, "{} left_out={left_out}", escaped(line)),
        }
    }
}

/// Without characters that move a cursor, end a line or change the direction of text.
fn escaped(text: &str) -> String {
    let ends_line_or_turns = |c| matches!(c, '\u{2028}' | '\u{2029}' | '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let is_plain = |c: char| !(c.is_control() || ends_line_or_turns(c));
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if is_plain(c) {
            out.push(c);
        } else {
            out.extend(c.escape_default());
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_wrote_stays_within_its_line() {
        assert_eq!(
            escaped("a\nINFO b\r\x1b[31mred\u{9b}\u{202e}\u{200f}ü"),
            "a\\nINFO b\\r\\u{1b}[31mred\\u{9b}\\u{202e}\\u{200f}ü"
        );
    }
}
