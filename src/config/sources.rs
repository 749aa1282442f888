//! Where each value was said.

use std::collections::BTreeMap;

/// By `section.key`; what is not in it has its default.
#[derive(Clone, Debug, Default)]
pub struct Sources(BTreeMap<String, String>);

/// Where something was said does not make it another configuration.
impl PartialEq for Sources {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Sources {
    pub fn note(&mut self, name: String, source: String) {
        self.0.insert(name, source);
    }

    /// The file and line, the variable, or the file with a secret. None: nobody said anything.
    pub fn of(&self, section: &str, key: &str) -> Option<&str> {
        let said = |key: String| self.0.get(&format!("{section}.{key}")).map(String::as_str);
        said(format!("secret {key}")).or_else(|| said(key.to_owned()))
    }

    /// A file with a secret was named for this key.
    pub fn note_secret_file(&mut self, section: &str, key: &str, file: &str) {
        self.note(format!("{section}.secret {key}"), format!("secret file {file}"));
    }
}

/// In which line of a TOML or INI file a key stands, or its table.
pub fn line_of(text: &str, section: &str, key: &str) -> Option<usize> {
    let mut current = String::new();
    for (number, line) in (1..).zip(text.lines().map(str::trim)) {
        if let Some(header) = line.strip_prefix('[') {
            header.trim_start_matches('[').split(']').next().unwrap_or_default().trim().clone_into(&mut current);
            if current == format!("{section}.{key}") {
                return Some(number);
            }
            continue;
        }
        let name = line.split(['=', '.', '{']).next().unwrap_or_default().trim().trim_matches('"');
        let is_dotted = current.is_empty() && line.starts_with(&format!("{section}.{key}"));
        if (current == section && name == key) || is_dotted {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_in_its_section_and_nowhere_else() {
        let text = "store.lanes = 1\n[tls]\ncert_file = \"a\"\n# cert_file\n[admin_tls]\ncert_file = \"b\"\n[allocation.regions]\neu = []\n\
            [[allocation.experiments]]\nname = \"x\"\n";
        for (section, key, want) in [
            ("store", "lanes", Some(1)),
            ("tls", "cert_file", Some(3)),
            ("admin_tls", "cert_file", Some(6)),
            ("allocation", "regions", Some(7)),
            ("allocation", "experiments", Some(9)),
            ("route", "l1_ttl", None),
        ] {
            assert_eq!(line_of(text, section, key), want, "{section}.{key}");
        }
    }
}
