//! Which slot a key is in, and what a server says of who has which.

use redis::Value;

pub const SLOTS: usize = 16_384;
/// In place of an owner: nobody has the slot.
pub const NOBODY: u16 = u16::MAX;
/// In place of the name that servers are to be known by: this one was given none.
const NO_NAME: &str = "?";
/// CRC-16/XMODEM, byte by byte.
const CRC: [u16; 256] = crc_table();

/// First and last slot, and who has them: `host:port`. In the order of the slots.
pub type Ranges = Vec<(u16, u16, String)>;

/// Of a name with something between braces, only that counts.
pub fn slot_of(key: &str) -> u16 {
    let tag = key.split_once('{').and_then(|(_, rest)| rest.split_once('}')).map(|(tag, _)| tag).filter(|tag| !tag.is_empty());
    let crc = tag.unwrap_or(key).bytes().fold(0, |crc: u16, byte| (crc << 8) ^ CRC[usize::from((crc >> 8) as u8 ^ byte)]);
    crc % SLOTS as u16
}

/// What CLUSTER SLOTS says. A server that does not know its own name is at `asked`, `host:port`. None: it says something else.
pub fn ranges(said: &Value, asked: &str) -> Option<Ranges> {
    let Value::Array(ranges) = said else { return None };
    let mut ranges = ranges.iter().map(|range| one_range(range, asked)).collect::<Option<Ranges>>()?;
    ranges.sort();
    Some(ranges)
}

/// Of each slot, the place of its owner among `servers`; `servers` are all that are in `ranges`.
pub fn owners(ranges: &Ranges, servers: &[String]) -> Vec<u16> {
    let mut owners = vec![NOBODY; SLOTS];
    for (first, last, node) in ranges {
        let owner = servers.iter().position(|server| server == node).and_then(|place| u16::try_from(place).ok());
        owners[usize::from(*first)..=usize::from(*last)].fill(owner.unwrap_or(NOBODY));
    }
    owners
}

/// `host:port` as another server has named it; without a host it is on that of `asked`. None: it has no name.
pub fn address(host: &str, port: u16, asked: &str) -> Option<String> {
    match host {
        NO_NAME => None,
        "" => Some(format!("{}:{port}", asked.rsplit_once(':').map_or(asked, |(host, _)| host))),
        host => Some(format!("{host}:{port}")),
    }
}

fn one_range(said: &Value, asked: &str) -> Option<(u16, u16, String)> {
    let Value::Array(fields) = said else { return None };
    let [first, last, Value::Array(primary), ..] = &fields[..] else { return None };
    let [host, port, more @ ..] = &primary[..] else { return None };
    let number = |value: &Value| if let Value::Int(number) = value { u16::try_from(*number).ok() } else { None };
    let host = match text(host)? {
        NO_NAME => other_name(more),
        host => host,
    };
    let (first, last) = (number(first)?, number(last)?);
    let is_range = first <= last && usize::from(last) < SLOTS;
    is_range.then_some((first, last, address(host, number(port)?, asked)?))
}

/// Behind its id stands what else it is known as: names and values in turn. Any will do. Empty: it is the one that was asked,
/// which nobody has told its address yet.
fn other_name(more: &[Value]) -> &str {
    let [_, Value::Array(names), ..] = more else { return "" };
    names.chunks_exact(2).filter_map(|name| text(&name[1])).find(|name| !name.is_empty()).unwrap_or_default()
}

fn text(value: &Value) -> Option<&str> {
    match value {
        Value::Nil => Some(""),
        Value::BulkString(text) => std::str::from_utf8(text).ok(),
        _ => None,
    }
}

const fn crc_table() -> [u16; 256] {
    let (mut table, mut byte) = ([0; 256], 0);
    while byte < table.len() {
        let (mut crc, mut bit) = ((byte as u16) << 8, 0);
        while bit < 8 {
            crc = if crc & 0x8000 == 0 { crc << 1 } else { (crc << 1) ^ 0x1021 };
            bit += 1;
        }
        table[byte] = crc;
        byte += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_in_the_slots_that_the_servers_say() {
        // As CLUSTER KEYSLOT answers.
        for (key, slot) in
            [("123456789", 12_739), ("user:route:42", 12_586), ("user:status:42", 3_124), ("user:record:42", 2_539)]
        {
            assert_eq!(slot_of(key), slot, "{key}");
        }
        assert_eq!(slot_of("{user:route:42}:record"), 12_586);
        assert_eq!(slot_of("a{user:route:42}b{c}"), 12_586);
        assert_ne!(slot_of("{}user:route:42"), 12_586, "nothing between braces is no tag");
        assert_eq!(slot_of("foo{{bar}}zap"), slot_of("{bar"));
    }

    #[test]
    fn who_has_which_slots_is_taken_from_what_a_server_says_and_nonsense_is_not() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let node = |host: Value, port| Value::Array(vec![host, Value::Int(port), text("id")]);
        let range = |first, last, node| Value::Array(vec![Value::Int(first), Value::Int(last), node]);
        let said = Value::Array(vec![range(100, 16_383, node(text("b"), 2)), range(0, 98, node(Value::Nil, 1))]);
        let parsed = ranges(&said, "a:9").expect("ranges");
        assert_eq!(parsed, [(0, 98, "a:1".to_owned()), (100, 16_383, "b:2".to_owned())]);
        let owners = owners(&parsed, &["a:1".to_owned(), "b:2".to_owned()]);
        assert_eq!((owners[0], owners[98], owners[99], owners[100], owners[16_383]), (0, 0, NOBODY, 1, 1));
        for nonsense in
            [range(0, 16_384, node(text("b"), 2)), range(5, 4, node(text("b"), 2)), range(0, 1, node(text("b"), 70_000))]
        {
            assert_eq!(ranges(&Value::Array(vec![nonsense]), "a:9"), None);
        }
        assert_eq!(ranges(&Value::Nil, "a:9"), None);
    }

    #[test]
    fn a_server_without_the_name_it_should_have_is_known_by_another_and_one_without_a_host_is_where_the_asked_one_is() {
        let text = |text: &str| Value::BulkString(text.as_bytes().to_vec());
        let said = |host: Value, names: &[&str]| {
            let names = Value::Array(names.iter().map(|name| text(name)).collect());
            let node = Value::Array(vec![host, Value::Int(7), text("id"), names]);
            ranges(&Value::Array(vec![Value::Array(vec![Value::Int(0), Value::Int(9), node])]), "[fd00::1]:9")
        };
        let at = |address: &str| Some(vec![(0, 9, address.to_owned())]);
        assert_eq!(said(text("?"), &["ip", "10.0.0.2"]), at("10.0.0.2:7"));
        assert_eq!(said(text("?"), &["ip", ""]), at("[fd00::1]:7"));
        assert_eq!(said(Value::Nil, &["ip", "10.0.0.2"]), at("[fd00::1]:7"), "the address that leads there from here");
        assert_eq!(said(text("db.example"), &["ip", "10.0.0.2"]), at("db.example:7"));
        assert_eq!(said(text("fd00::2"), &[]), at("fd00::2:7"));
        assert_eq!(address("?", 7, "a:9"), None);
    }
}
