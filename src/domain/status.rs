//! What a user shows of themselves.

/// As a user wants to be seen, or is seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    #[default]
    Online,
    Away,
    Busy,
    /// Connected, but shown as offline; routes stay usable.
    Invisible,
    Offline,
}

impl Status {
    /// What others see of a user who wants to be seen as `self`.
    pub fn shown(self, has_live_route: bool) -> Status {
        match self {
            Status::Invisible | Status::Offline => Status::Offline,
            wanted if has_live_route => wanted,
            _ => Status::Offline,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Status;
    use super::Status::Away;
    use super::Status::Invisible;
    use super::Status::Offline;
    use super::Status::Online;

    #[test]
    fn nobody_is_seen_online_without_a_live_route() {
        for (wanted, live, want) in [
            (Online, true, Online),
            (Online, false, Offline),
            (Away, true, Away),
            (Away, false, Offline),
            (Invisible, true, Offline),
            (Invisible, false, Offline),
        ] {
            assert_eq!(Status::shown(wanted, live), want, "{wanted:?}, live: {live}");
        }
    }
}
