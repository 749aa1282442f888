//! How users want to be seen, and what others are shown of them.

use crate::domain::id::InvalidId;
use crate::domain::time::Timestamp;

/// Longest text that a user shows of themselves.
pub const MAX_TEXT_BYTES: usize = 256;

/// As a user wants to be seen, or is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Status {
    #[default]
    Online,
    Away,
    Busy,
    /// Only wanted: shown as offline; routes stay usable.
    Invisible,
    /// Only shown.
    Offline,
}

/// What a user's live devices do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// There is none.
    NoDevice,
    /// Somebody uses one of them.
    Active,
    AllIdle,
}

impl Activity {
    /// Of live devices, of each of which is known whether it is idle.
    pub fn of(mut idle: impl Iterator<Item = bool>) -> Self {
        match idle.next() {
            None => Self::NoDevice,
            Some(first) if first && idle.all(|idle| idle) => Self::AllIdle,
            Some(_) => Self::Active,
        }
    }
}

impl Status {
    /// What others are shown of a user who wants to be seen as `self`: the one table, looked at whenever somebody asks. Nothing
    /// is stored that could be wrong after a crash.
    pub fn shown(self, activity: Activity) -> Status {
        match (self, activity) {
            (_, Activity::NoDevice) | (Status::Invisible | Status::Offline, _) => Status::Offline,
            (Status::Online, Activity::AllIdle) => Status::Away,
            (wanted, Activity::Active | Activity::AllIdle) => wanted,
        }
    }
}

/// How a user wants to be seen. It survives log-out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wish {
    pub status: Status,
    pub text: StatusText,
    /// When it returns to the default. None: it stays.
    pub until: Option<Timestamp>,
}

/// What a user says of themselves: a few words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatusText(Box<str>);

impl StatusText {
    /// # Errors
    /// It is longer than `max_bytes`, or than any may be, or has control characters.
    pub fn parse(raw: &str, max_bytes: usize) -> Result<Self, InvalidId> {
        let max_bytes = max_bytes.min(MAX_TEXT_BYTES);
        if raw.len() > max_bytes {
            return Err(InvalidId::new(format!("must be at most {max_bytes} bytes, is {}", raw.len())));
        }
        if raw.chars().any(char::is_control) {
            return Err(InvalidId::new("must have no control characters".to_owned()));
        }
        Ok(Self(raw.into()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Activity::*;
    use Status::*;

    #[test]
    fn what_is_shown_follows_from_the_wish_and_the_live_devices() {
        for (wanted, want) in [
            (Online, [Offline, Online, Away]),
            (Away, [Offline, Away, Away]),
            (Busy, [Offline, Busy, Busy]),
            (Invisible, [Offline; 3]),
            (Offline, [Offline; 3]),
        ] {
            assert_eq!([NoDevice, Active, AllIdle].map(|activity| wanted.shown(activity)), want, "{wanted:?}");
        }
    }

    #[test]
    fn devices_are_idle_together_only_if_each_is() {
        for (idle, want) in
            [(&[][..], NoDevice), (&[false], Active), (&[true], AllIdle), (&[true, false], Active), (&[true, true], AllIdle)]
        {
            assert_eq!(Activity::of(idle.iter().copied()), want, "{idle:?}");
        }
    }

    #[test]
    fn a_text_is_short_and_has_no_control_characters() {
        let check = |raw: &str| StatusText::parse(raw, MAX_TEXT_BYTES).map(|_| ()).map_err(|error| error.to_string());
        assert_eq!(check(""), Ok(()));
        assert_eq!(check("im Urlaub 🌴"), Ok(()));
        assert_eq!(check(&"x".repeat(256)), Ok(()));
        assert_eq!(check(&"é".repeat(129)), Err("must be at most 256 bytes, is 258".to_owned()));
        for raw in ["two\nlines", "\u{1b}[31mred", "nul\0", "\u{85}"] {
            assert_eq!(check(raw), Err("must have no control characters".to_owned()), "{raw:?}");
        }
    }
}
