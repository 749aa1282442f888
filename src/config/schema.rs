//! Which keys there are, and of what type: `config/default.toml` says it, and this reads it from there.

use ::config::File;
use ::config::FileFormat;
use ::config::Source;
use serde_json::Map;
use serde_json::Number;
use serde_json::Value;

use super::Config;
use super::rules;

const DEFAULTS: &str = include_str!("../../config/default.toml");
/// Enough for a slip or two of the finger; with more, a suggestion is a guess.
const MAX_SLIPS: usize = 3;

/// The built-in defaults, by section and key.
pub fn defaults() -> Value {
    parse(DEFAULTS, FileFormat::Toml).expect("compiled in: TOML").into()
}

/// Each section with each key, those that the defaults show as comments (`#key = value`) among them.
pub fn all() -> Value {
    let uncommented = |line: &'static str| match line.strip_prefix('#') {
        Some(code) if !code.starts_with(' ') => code,
        _ => line,
    };
    let text = DEFAULTS.lines().map(uncommented).collect::<Vec<_>>().join("\n");
    parse(&text, FileFormat::Toml).expect("compiled in: TOML").into()
}

/// The value, with the type its default has; or what is wrong with it. Without a key: whether there is such a section.
pub fn check(schema: &Value, section: &str, key: &str, value: &Value) -> Result<Value, String> {
    if key.is_empty() && value.is_null() && schema.get(section).is_some() {
        return Ok(Value::Null);
    }
    let like = schema.get(section).and_then(|keys| keys.get(key)).ok_or_else(|| unknown(schema, section, key))?;
    let value = coerce(value, like)?;
    if let (Some(range), Some(number)) = (rules::range(section, key), value.as_i64())
        && !u64::try_from(number).is_ok_and(|number| range.contains(&number))
    {
        return Err(format!("must be from {} to {}", range.start(), range.end()));
    }
    let mut alone = schema.clone();
    alone[section][key] = value.clone();
    serde_json::from_value::<Config>(alone).map_err(|error| without_value(&error.to_string()))?;
    Ok(value)
}

/// What is right, without what was wrong: a value may be a password that went to the wrong key.
fn without_value(message: &str) -> String {
    message
        .split_once(", expected ")
        .map_or_else(|| "has a form that it may not have".to_owned(), |(_, right)| format!("must be {right}"))
}

/// In an .ini file and in the environment every value is a string. A string stays one: a password may be `007`.
fn coerce(value: &Value, like: &Value) -> Result<Value, String> {
    let (converted, wanted) = match (value, like) {
        (Value::String(_), Value::String(_))
        | (Value::Bool(_), Value::Bool(_))
        | (Value::Array(_), Value::Array(_))
        | (Value::Object(_), Value::Object(_)) => (Some(value.clone()), ""),
        (Value::String(text), Value::Array(_)) => (inline(text).filter(Value::is_array), "a list, as in TOML"),
        (_, Value::Array(_)) => (None, "a list"),
        (Value::String(text), Value::Object(_)) => (inline(text).filter(Value::is_object), "a table, as in TOML"),
        (_, Value::Object(_)) => (None, "a table"),
        (_, Value::String(_)) => return Err("must be a string".into()), // may be a password: not shown
        (Value::String(text), Value::Bool(_)) => (boolean(text).map(Value::from), "true or false"),
        (Value::String(text), Value::Number(number)) if number.is_f64() => {
            (text.parse().ok().and_then(Number::from_f64).map(Value::from), "a number")
        }
        (Value::Number(_), Value::Number(number)) if number.is_f64() => (Some(value.clone()), ""),
        (Value::String(text), Value::Number(_)) => (text.parse::<i64>().ok().map(Value::from), "a whole number"),
        (Value::Number(number), Value::Number(_)) => (number.is_i64().then(|| value.clone()), "a whole number"),
        (_, Value::Bool(_)) => (None, "true or false"),
        _ => (None, "a number"),
    };
    converted.ok_or_else(|| format!("must be {wanted}"))
}

/// A list or a table on one line.
fn inline(text: &str) -> Option<Value> {
    parse(&format!("value = {text}"), FileFormat::Toml).ok()?.get("value").cloned()
}

fn boolean(text: &str) -> Option<bool> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "yes" | "on" | "1" => Some(true),
        "false" | "no" | "off" | "0" => Some(false),
        _ => None,
    }
}

fn unknown(schema: &Value, section: &str, key: &str) -> String {
    let (wrong_section, wanted_key) = (!schema[section].is_object(), key);
    let name = format!("{section}.{key}");
    let sections = schema.as_object().into_iter().flatten();
    let names = sections.flat_map(|(section, keys)| keys.as_object().into_iter().flatten().map(move |(key, _)| (section, key)));
    let nearest = names
        .map(|(section, key)| {
            let elsewhere = wrong_section && key == wanted_key;
            let full = format!("{section}.{key}");
            (if elsewhere { 1 } else { slips(&full, &name) }, full)
        })
        .min();
    match nearest {
        Some((distance, full)) if distance <= MAX_SLIPS => format!("there is no such key; did you mean {full}?"),
        _ => "there is no such key; config/default.toml has all of them".into(),
    }
}

/// How many characters have to be put in, taken out or changed to make `a` into `b`.
fn slips(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let changed = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = changed.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// Sections and keys of a file.
pub fn parse(text: &str, format: FileFormat) -> Result<Map<String, Value>, String> {
    if format == FileFormat::Ini
        && let Some(section) = repeated_section(text)
    {
        return Err(format!("{section} appears twice"));
    }
    let sections = File::from_str(text, format).collect().map_err(|error| without_source(&error.to_string()))?;
    let sections = sections.into_iter().map(|(section, value)| Ok((section, value.try_deserialize()?)));
    sections.collect::<Result<_, ::config::ConfigError>>().map_err(|error| error.to_string())
}

/// An .ini file's second section of one name would silently replace the first.
fn repeated_section(text: &str) -> Option<&str> {
    let headers: Vec<&str> = text.lines().map(str::trim).filter(|line| line.starts_with('[')).collect();
    headers.iter().enumerate().find(|(at, header)| headers[..*at].contains(header)).map(|(_, header)| *header)
}

/// The TOML parser shows the line it stumbled over, which may hold a password.
fn without_source(message: &str) -> String {
    let lines =
        message.lines().filter(|line| !line.trim_start_matches(|c: char| c.is_ascii_digit() || c == ' ').starts_with('|'));
    lines.map(str::trim).filter(|line| !line.is_empty()).collect::<Vec<_>>().join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_number_has_a_range_and_each_key_a_comment() {
        for (section, keys) in all().as_object().unwrap() {
            for (key, _) in keys.as_object().unwrap().iter().filter(|(_, value)| value.is_i64() || value.is_u64()) {
                assert!(rules::range(section, key).is_some(), "{section}.{key}");
            }
        }
        let lines: Vec<&str> = DEFAULTS.lines().collect();
        for pair in lines.windows(2).filter(|pair| pair[1].contains(" = ") && !pair[1].starts_with("# ")) {
            assert!(pair[0].starts_with("# "), "no comment above: {}", pair[1]);
        }
    }
}
