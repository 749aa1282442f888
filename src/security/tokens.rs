//! The tokens file, and how a token is made.
//!
//! A token has 256 bits of chance, so its plain SHA-256 in the file gives nothing away, and looking it up by that digest
//! compares no secrets.

use std::collections::HashMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use compact_str::CompactString;
use ring::digest;
use ring::rand::SecureRandom;
use ring::rand::SystemRandom;
use serde::Deserialize;

use crate::domain::caller::Caller;
use crate::domain::caller::GatewayPatterns;
use crate::domain::caller::Role;
use crate::domain::id::check_ascii;
use crate::security::files::Reloaded;
use crate::security::files::Unusable;

/// What every token begins with: scanners for leaked secrets look for it, and other credentials do not.
pub const PREFIX: &str = "imp_";
const ID_CHARS: usize = 8;
/// 62^43 is more than 2^256.
const SECRET_CHARS: usize = 43;
const ALPHABET: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
/// Longest name of a caller.
const MAX_NAME_BYTES: usize = 64;
const MAX_TOKENS: usize = 10_000;

pub type Digest = [u8; digest::SHA256_OUTPUT_LEN];

/// Who may come in with a token.
#[derive(Default)]
pub struct Tokens(HashMap<Digest, Arc<Caller>>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    token: Vec<Entry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    role: String,
    sha256: String,
    #[serde(default)]
    gateways: Vec<String>,
    expires: Option<String>,
    calls_per_s: Option<u32>,
}

/// # Errors
/// The file cannot be read, or an entry is wrong: then none of them counts.
pub fn load(file: PathBuf) -> Result<Arc<Reloaded<Tokens>>, Unusable> {
    Reloaded::new("tokens", vec![file], |contents| Tokens::parse(&contents.concat()))
}

impl Tokens {
    /// # Errors
    /// The first entry that is wrong, by its number and name, and why.
    pub fn parse(text: &[u8]) -> Result<Self, Unusable> {
        let text = std::str::from_utf8(text).map_err(|_| Unusable("is not UTF-8".to_owned()))?;
        let file = config::Config::builder().add_source(config::File::from_str(text, config::FileFormat::Toml)).build();
        // What the parser shows of the line it stumbled over is left out: it may be a token that was put in by mistake.
        let file = file.map_err(|_| Unusable("is no TOML".to_owned()))?.try_deserialize::<File>();
        let file = file.map_err(|error| Unusable(without_values(&error.to_string())))?;
        if file.token.len() > MAX_TOKENS {
            return Err(Unusable(format!("must be at most {MAX_TOKENS} tokens, is {}", file.token.len())));
        }
        let mut callers = HashMap::with_capacity(file.token.len());
        for (number, entry) in (1..).zip(file.token) {
            let wrong = |why: String| Unusable(format!("token {number} ({}): {why}", entry.name.escape_debug()));
            let (digest, caller) = entry.parse().map_err(wrong)?;
            if callers.insert(digest, Arc::new(caller)).is_some() {
                return Err(wrong("sha256 stands there twice".to_owned()));
            }
        }
        Ok(Self(callers))
    }

    pub fn find(&self, token: &[u8]) -> Option<&Arc<Caller>> {
        self.0.get(&digest_of(token))
    }
}

/// What is wrong, without a value or key that may be a token in the wrong place.
fn without_values(message: &str) -> String {
    match message.split_once(", expected ") {
        _ if message.contains(PREFIX) => "a token itself stands in it; only its sha256 belongs there".to_owned(),
        Some((wrong, right)) if !wrong.contains("unknown field") => format!("a value must be {right}"),
        _ => message.to_owned(),
    }
}

impl Entry {
    fn parse(&self) -> Result<(Digest, Caller), String> {
        check_ascii(&self.name, 1, MAX_NAME_BYTES).map_err(|why| format!("name {why}"))?;
        let roles = || Role::ALL.map(Role::name).join(", ");
        let role = Role::parse(&self.role).ok_or_else(|| format!("role must be one of {}", roles()))?;
        let digest =
            from_hex(&self.sha256).ok_or("sha256 must be 64 hexadecimal digits: the SHA-256 of the token, not the token")?;
        let gateways = GatewayPatterns::parse(&self.gateways).map_err(|why| format!("gateways {why}"))?;
        match (role, gateways.is_empty()) {
            (Role::Gateway, true) => return Err("gateways must name the addresses that it speaks for".to_owned()),
            (Role::Gateway, false) | (_, true) => {}
            (_, false) => return Err("gateways belong to the role gateway only".to_owned()),
        }
        let expires_s = self.expires.as_deref().map(time).transpose()?;
        if self.calls_per_s == Some(0) {
            return Err("calls_per_s must be at least 1".to_owned());
        }
        let gateways = Arc::new(gateways);
        Ok((digest, Caller { name: CompactString::new(&self.name), role, gateways, expires_s, calls_per_s: self.calls_per_s }))
    }
}

impl fmt::Display for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tokens", self.0.len())
    }
}

/// A new token, to be shown once.
///
/// # Errors
/// The system gives no random numbers.
pub fn generate() -> Result<String, Unusable> {
    let random = SystemRandom::new();
    let mut token = PREFIX.to_owned();
    while token.len() < PREFIX.len() + ID_CHARS + 1 + SECRET_CHARS {
        let mut byte = [0];
        random.fill(&mut byte).map_err(|_| Unusable("the system gives no random numbers".to_owned()))?;
        // Bytes beyond the last whole multiple would make some characters more likely than others.
        let unbiased = usize::from(byte[0]) < ALPHABET.len() * (256 / ALPHABET.len());
        if token.len() == PREFIX.len() + ID_CHARS {
            token.push('_');
        } else if unbiased {
            token.push(char::from(ALPHABET[usize::from(byte[0]) % ALPHABET.len()]));
        }
    }
    Ok(token)
}

/// What stands in the file for a token.
pub fn to_hex(token: &str) -> String {
    digest_of(token.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digest_of(token: &[u8]) -> Digest {
    let mut digest = Digest::default();
    digest.copy_from_slice(digest::digest(&digest::SHA256, token).as_ref());
    digest
}

fn from_hex(text: &str) -> Option<Digest> {
    let (mut digest, digits) = (Digest::default(), text.as_bytes());
    if digits.len() != 2 * digest.len() {
        return None;
    }
    for (byte, pair) in digest.iter_mut().zip(digits.chunks_exact(2)) {
        let value = |digit: u8| char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok());
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(digest)
}

/// In Unix seconds.
fn time(text: &str) -> Result<u64, String> {
    let wrong = || "expires must be a time such as \"2027-01-01T00:00:00Z\"".to_owned();
    let time: prost_types::Timestamp = text.parse().map_err(|_| wrong())?;
    u64::try_from(time.seconds).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(more: &str) -> String {
        format!("[[token]]\nname = \"edge\"\nsha256 = \"{}\"\n{more}\n", to_hex("imp_a_b"))
    }

    #[test]
    fn a_token_is_found_by_its_digest() {
        let text = entry("role = \"gateway\"\ngateways = [\"gw-*:7000\"]\nexpires = \"2027-01-01T00:00:00Z\"\ncalls_per_s = 5");
        let tokens = Tokens::parse(text.as_bytes()).unwrap();
        let caller = tokens.find(b"imp_a_b").unwrap();
        assert_eq!((&*caller.name, caller.role, caller.calls_per_s), ("edge", Role::Gateway, Some(5)));
        assert_eq!(caller.expires_s, Some(1_798_761_600));
        assert!(tokens.find(b"imp_a_c").is_none());
        let native = entry("role = \"service\"\nexpires = 2027-01-01T00:00:00Z");
        assert!(Tokens::parse(native.as_bytes()).is_ok(), "a time need not be a string");
    }

    #[test]
    fn what_is_wrong_is_named_and_nothing_secret_is_shown() {
        for (more, part) in [
            ("role = \"king\"", "role must be one of gateway, service, viewer, operator, node"),
            ("role = \"gateway\"", "gateways must name"),
            ("role = \"service\"\ngateways = [\"gw-1:7\"]", "gateways belong to the role gateway only"),
            ("role = \"gateway\"\ngateways = [\"gw 1\"]", "gateways must be printable ASCII"),
            ("role = \"service\"\nexpires = \"tomorrow\"", "expires must be a time"),
            ("role = \"service\"\ncalls_per_s = 0", "calls_per_s must be at least 1"),
            ("role = \"service\"\ncolour = \"red\"", "colour"),
            ("", "missing"),
        ] {
            let why = Tokens::parse(entry(more).as_bytes()).err().expect(more).to_string();
            assert!(why.contains(part), "{more}: {why}");
        }
        let twice = entry("role = \"service\"").repeat(2);
        assert!(Tokens::parse(twice.as_bytes()).err().unwrap().to_string().contains("twice"));
        let raw = "[[token]]\nname = \"a\"\nrole = \"service\"\nsha256 = \"imp_s3cret\"";
        let (broken, key) = ("[[token]]\nimp_s3cret", "[[token]]\nimp_s3cret = 1");
        let value = "[[token]]\nname = \"a\"\nrole = \"service\"\nsha256 = \"\"\ncalls_per_s = \"s3cret\"";
        for text in [raw, broken, key, value] {
            let why = Tokens::parse(text.as_bytes()).err().unwrap().to_string();
            assert!(!why.contains("s3cret"), "{why}");
        }
        assert!(Tokens::parse(b"").is_ok_and(|tokens| tokens.0.is_empty()), "nobody may come in");
    }

    #[test]
    fn tokens_are_all_different_and_use_all_characters() {
        let tokens: Vec<String> = (0..200).map(|_| generate().unwrap()).collect();
        let chars: std::collections::BTreeSet<char> = tokens.iter().flat_map(|token| token[4..].chars()).collect();
        assert_eq!(chars.len(), ALPHABET.len() + 1);
        assert!(tokens.iter().all(|token| token.len() == 4 + 8 + 1 + 43 && token.as_bytes()[12] == b'_'));
        let distinct: std::collections::BTreeSet<&String> = tokens.iter().collect();
        assert_eq!(distinct.len(), tokens.len());
    }
}
