//! Statements over many rows. A prepared statement has a fixed number of rows, so rows go in chunks of a few sizes; the last
//! chunk is filled up by repeating its last row, which must not matter to the statement.

use crate::store::connection::Engine;

/// Rows of one statement: keeps an `IN` list below the size at which MariaDB turns it into a join.
pub const MAX_CHUNK: usize = 512;
/// Below this a chunk is filled up, above it is split: repeated rows cost less than round trips, up to a point.
const FILLED_UP: usize = 32;

/// Cuts `rows` into chunks whose sizes are powers of two, with the rows to repeat at the end of the last one.
pub fn chunks<T>(mut rows: &[T]) -> impl Iterator<Item = (&[T], usize)> {
    std::iter::from_fn(move || {
        if rows.is_empty() {
            return None;
        }
        let size = if rows.len() < FILLED_UP { rows.len().next_power_of_two() } else { prev_power_of_two(rows.len()) };
        let size = size.min(MAX_CHUNK);
        let (chunk, rest) = rows.split_at(size.min(rows.len()));
        rows = rest;
        Some((chunk, size - chunk.len()))
    })
}

/// The rows of a chunk, and its last one as often again as said.
pub fn filled<T>(chunk: &[T], fill: usize) -> impl Iterator<Item = &T> {
    chunk.iter().chain(std::iter::repeat_n(chunk.last(), fill).flatten())
}

fn prev_power_of_two(n: usize) -> usize {
    1 << n.ilog2()
}

/// `head`, then `row` as often as said, separated by commas, then `tail`.
pub fn repeated(head: &str, row: &str, times: usize, tail: &str) -> String {
    let mut sql = String::with_capacity(head.len() + times * (row.len() + 1) + tail.len());
    sql.push_str(head);
    for i in 0..times {
        if i > 0 {
            sql.push(',');
        }
        sql.push_str(row);
    }
    sql.push_str(tail);
    sql
}

/// What the greatest of several values is called.
pub fn greatest(engine: Engine) -> &'static str {
    match engine {
        Engine::MySql => "GREATEST",
        Engine::Sqlite => "MAX",
    }
}

/// The end of an insert that leaves a row that is there as it is. `column`: any of its own.
pub fn unless_there(engine: Engine, column: &str) -> String {
    match engine {
        Engine::MySql => format!(" ON DUPLICATE KEY UPDATE {column} = {column}"),
        Engine::Sqlite => " ON CONFLICT DO NOTHING".to_owned(),
    }
}

/// The end of an insert that changes `columns` of a row that is there, each into what `value` makes of its name and of what
/// would have been inserted.
pub fn or_update(engine: Engine, key: &str, columns: &[&str], value: impl Fn(&str, String) -> String) -> String {
    let (head, new) = match engine {
        Engine::MySql => (" ON DUPLICATE KEY UPDATE ".to_owned(), ("VALUES(", ")")),
        Engine::Sqlite => (format!(" ON CONFLICT ({key}) DO UPDATE SET "), ("excluded.", "")),
    };
    let set = |column: &&str| format!("{column} = {}", value(column, format!("{}{column}{}", new.0, new.1)));
    head + &columns.iter().map(set).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(rows: usize, want: &[(usize, usize)]) {
        let rows: Vec<usize> = (0..rows).collect();
        let got: Vec<(usize, usize)> = chunks(&rows).map(|(chunk, fill)| (chunk.len(), fill)).collect();
        assert_eq!(got, want);
        assert_eq!(chunks(&rows).flat_map(|(chunk, _)| chunk.to_vec()).collect::<Vec<_>>(), rows, "every row once, in order");
    }

    #[test]
    fn chunks_have_few_sizes() {
        check(0, &[]);
        check(1, &[(1, 0)]);
        check(3, &[(3, 1)]);
        check(300, &[(256, 0), (32, 0), (12, 4)]);
        check(1024, &[(512, 0), (512, 0)]);
    }

    #[test]
    fn a_statement_repeats_its_row() {
        assert_eq!(repeated("IN (", "?", 3, ")"), "IN (?,?,?)");
    }
}
