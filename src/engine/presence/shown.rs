//! What watchers are shown of one user.

use std::time::Instant;

use smallvec::SmallVec;
use xxhash_rust::xxh3::Xxh3;

use crate::clock::CompactInstant;
use crate::domain::id::Epoch;
use crate::domain::id::Epochs;
use crate::domain::route::Platform;
use crate::domain::route::activity;
use crate::domain::status::Status;
use crate::domain::time::Timestamp;
use crate::engine::read::directory::Answer;

/// What watchers are shown of one user. There is one for each watched user, however many watch, so it is small.
#[derive(Clone, Debug)]
pub struct Shown {
    /// Grows with each change that others could see.
    pub token: u64,
    /// Equal for what looks the same.
    pub content: u64,
    pub last_seen: Timestamp,
    /// When the status became what it is.
    since: Timestamp,
    /// When this node first saw that.
    pub seen_at: CompactInstant,
    /// Most users say nothing, and so it takes one word.
    text: Option<Box<Box<str>>>,
    /// Lives that the record's routes are on, that of the newest live one first. Their end may change what is shown.
    epochs: SmallVec<[Epoch; 1]>,
    pub status: Status,
    devices: u16,
    /// A bit for each.
    platforms: u16,
}

impl Shown {
    /// `before`: what was shown last.
    pub fn of(answer: &Answer, before: Option<&Self>, now: Instant) -> Self {
        let believed = || answer.routes_on_lives();
        let status = answer.wanted().shown(activity(believed().map(|(route, _)| route)));
        let is_online = status != Status::Offline;
        let since = answer.status_since(status);
        let is_as_before = |before: &&Self| (before.status, before.since) == (status, since);
        let newest = believed().max_by_key(|(route, _)| route.bound_version).map(|(_, life)| life);
        let (first, others) = (newest.map(|life| life.epoch), answer.epochs());
        let visible = || believed().filter(|_| is_online);
        let mut shown = Self {
            token: answer.token(),
            content: 0,
            last_seen: answer.last_seen(),
            since,
            seen_at: before.filter(is_as_before).map_or_else(|| now.into(), |before| before.seen_at),
            text: Some(answer.text(status)).filter(|text| !text.is_empty()).map(|text| Box::new(Box::from(text))),
            epochs: first.into_iter().chain(others.filter(|epoch| Some(*epoch) != first)).collect(),
            status,
            devices: u16::try_from(visible().count()).unwrap_or(u16::MAX),
            platforms: visible().fold(0, |bits, (route, _)| bits | bit(route.platform)),
        };
        shown.content = shown.hash(newest.filter(|_| is_online).map_or("", |life| life.gateway.as_str()));
        shown
    }

    fn hash(&self, gateway: &str) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(&[self.status as u8]);
        hash.update(&self.devices.to_le_bytes());
        hash.update(&self.platforms.to_le_bytes());
        hash.update(gateway.as_bytes());
        hash.update(&[0]); // no address has it
        hash.update(self.text().as_bytes());
        hash.digest()
    }

    pub fn is_online(&self) -> bool {
        self.status != Status::Offline
    }

    pub fn text(&self) -> &str {
        self.text.as_ref().map_or("", |text| text)
    }

    pub fn devices(&self) -> u32 {
        self.devices.into()
    }

    pub fn platforms(&self) -> impl Iterator<Item = Platform> {
        PLATFORMS.into_iter().filter(|platform| self.platforms & bit(*platform) != 0)
    }

    /// The life of the gateway that was bound last.
    pub fn gateway(&self) -> Option<Epoch> {
        self.epochs.first().copied().filter(|_| self.is_online())
    }

    /// Whether the end of one of these lives may change it.
    pub fn is_on(&self, ended: &Epochs) -> bool {
        self.epochs.iter().any(|epoch| ended.contains(epoch))
    }
}

const PLATFORMS: [Platform; 9] = [
    Platform::Unspecified,
    Platform::Ios,
    Platform::Android,
    Platform::Windows,
    Platform::Macos,
    Platform::Linux,
    Platform::Web,
    Platform::Tablet,
    Platform::Other,
];

fn bit(platform: Platform) -> u16 {
    1 << platform as u16
}

#[cfg(test)]
impl Shown {
    /// A user with one device on life 1, or none.
    pub fn example(token: u64, status: Status, text: &str, seen_at: Instant) -> Self {
        let mut shown = Self {
            token,
            content: 0,
            last_seen: Timestamp(0),
            since: Timestamp(0),
            seen_at: seen_at.into(),
            text: Some(text).filter(|text| !text.is_empty()).map(|text| Box::new(Box::from(text))),
            epochs: SmallVec::from([Epoch(1)]),
            status,
            devices: 1,
            platforms: 1,
        };
        shown.content = shown.hash("gw-1:7000");
        shown
    }
}
