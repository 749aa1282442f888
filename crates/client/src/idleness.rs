//! Which devices nobody uses. Only of devices whose gateway says when they are used.

use std::collections::BTreeSet;
use std::collections::HashMap;
use std::time::Duration;
use std::time::Instant;

/// Between two changes of a device: a user who looks in now and then is not a flood of changes.
const MIN_INTERVAL: Duration = Duration::from_secs(10);

pub struct Idleness {
    idle_after: Duration,
    devices: HashMap<i64, HashMap<String, Device>>,
    /// When to look at a device again. One that was used since is looked at in vain, so that using it costs nothing here.
    due: BTreeSet<(Instant, i64, String)>,
}

struct Device {
    used: Instant,
    /// When its idleness was changed last.
    changed: Option<Instant>,
    /// A change has no answer yet.
    is_asked: bool,
    /// What stands in the list. None: it is idle, or its change has no answer yet.
    due: Option<Instant>,
}

/// A device has become idle, or is no more.
#[derive(Debug, PartialEq, Eq)]
pub struct Change {
    pub user_id: i64,
    pub device_id: String,
    pub idle: bool,
}

impl Idleness {
    /// Zero: no device becomes idle.
    pub fn new(idle_after: Duration) -> Self {
        Self { idle_after, devices: HashMap::new(), due: BTreeSet::new() }
    }

    /// Somebody uses a device. True: [`Idleness::due`] has changed.
    pub fn used(&mut self, user_id: i64, device_id: &str, now: Instant) -> bool {
        if self.idle_after.is_zero() {
            return false;
        }
        if let Some(has_changed) = self.connected(user_id, device_id, now) {
            return has_changed;
        }
        let device = Device { used: now, changed: None, is_asked: false, due: None };
        self.devices.entry(user_id).or_default().insert(device_id.to_owned(), device);
        self.schedule(user_id, device_id, now)
    }

    /// A device has connected anew, and so is used. None: its gateway does not say when it is used. Else as [`Idleness::used`].
    pub fn connected(&mut self, user_id: i64, device_id: &str, now: Instant) -> Option<bool> {
        self.device(user_id, device_id)?.used = now;
        Some(self.schedule(user_id, device_id, now))
    }

    /// A change is answered.
    pub fn answered(&mut self, user_id: i64, device_id: &str, now: Instant) {
        if let Some(device) = self.device(user_id, device_id) {
            device.is_asked = false;
            self.schedule(user_id, device_id, now);
        }
    }

    /// It has no connection any more.
    pub fn forget(&mut self, user_id: i64, device_id: &str) {
        let Some(devices) = self.devices.get_mut(&user_id) else { return };
        if let Some(Device { due: Some(due), .. }) = devices.remove(device_id) {
            self.due.remove(&(due, user_id, device_id.to_owned()));
        }
        if devices.is_empty() {
            self.devices.remove(&user_id);
        }
    }

    /// When [`Idleness::look`] has something to do.
    pub fn due(&self) -> Option<Instant> {
        self.due.first().map(|(due, ..)| *due)
    }

    /// What has changed. `said` is what nodes believe of a device; None: it is not connected.
    pub fn look(&mut self, now: Instant, said: impl Fn(i64, &str) -> Option<bool>) -> Vec<Change> {
        let (mut changes, idle_after) = (Vec::new(), self.idle_after);
        while self.due().is_some_and(|due| due <= now) {
            let Some((_, user_id, device_id)) = self.due.pop_first() else { break };
            let Some(said) = said(user_id, &device_id) else {
                self.forget(user_id, &device_id);
                continue;
            };
            let Some(device) = self.device(user_id, &device_id) else { continue };
            device.due = None;
            let idle_from = device.used + idle_after;
            let idle = idle_from <= now;
            if idle == said {
                if !idle {
                    self.put(idle_from, user_id, device_id);
                }
                continue;
            }
            match device.changed.map(|changed| changed + MIN_INTERVAL).filter(|soonest| *soonest > now) {
                Some(soonest) => self.put(soonest, user_id, device_id),
                None => {
                    (device.changed, device.is_asked) = (Some(now), true);
                    changes.push(Change { user_id, device_id, idle });
                }
            }
        }
        changes
    }

    /// Puts a device into the list that has no place in it. True: it had none.
    fn schedule(&mut self, user_id: i64, device_id: &str, now: Instant) -> bool {
        let device = self.device(user_id, device_id);
        let Some(device) = device.filter(|device| device.due.is_none() && !device.is_asked) else { return false };
        let soonest = device.changed.map_or(now, |changed| now.max(changed + MIN_INTERVAL));
        self.put(soonest, user_id, device_id.to_owned());
        true
    }

    fn put(&mut self, due: Instant, user_id: i64, device_id: String) {
        if let Some(device) = self.device(user_id, &device_id) {
            device.due = Some(due);
            self.due.insert((due, user_id, device_id));
        }
    }

    fn device(&mut self, user_id: i64, device_id: &str) -> Option<&mut Device> {
        self.devices.get_mut(&user_id)?.get_mut(device_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const SECOND: Duration = Duration::from_secs(1);

    /// The device of user 1, and what nodes believe of it.
    struct Fixture {
        idleness: Idleness,
        began: Instant,
        said: Option<bool>,
    }

    impl Fixture {
        fn new() -> Self {
            Self { idleness: Idleness::new(MINUTE), began: Instant::now(), said: Some(false) }
        }

        fn used(&mut self, at: Duration) {
            self.idleness.used(1, "phone", self.began + at);
        }

        /// Looks, and insists on what is said.
        #[track_caller]
        fn check(&mut self, at: Duration, want: Option<bool>) {
            let (now, said) = (self.began + at, self.said);
            let changes = self.idleness.look(now, |user, device| said.filter(|_| (user, device) == (1, "phone")));
            assert_eq!(changes.first().map(|change| change.idle), want, "after {at:?}");
            if let Some(change) = changes.first() {
                self.said = Some(change.idle);
                self.idleness.answered(1, "phone", now);
            }
        }
    }

    #[test]
    fn a_device_is_idle_after_a_while_and_active_at_once() {
        let mut device = Fixture::new();
        device.used(Duration::ZERO);
        device.check(Duration::ZERO, None);
        device.used(30 * SECOND);
        device.check(MINUTE, None);
        device.check(89 * SECOND, None);
        device.check(90 * SECOND, Some(true));
        device.check(100 * SECOND, None);
        assert!(device.idleness.due().is_none(), "nothing is to be done until it is used");
        device.used(200 * SECOND);
        device.check(200 * SECOND, Some(false));
        device.check(259 * SECOND, None);
        device.check(260 * SECOND, Some(true));
    }

    #[test]
    fn between_two_changes_there_is_a_while() {
        let mut device = Fixture::new();
        device.used(Duration::ZERO);
        device.check(MINUTE, Some(true));
        device.used(61 * SECOND);
        device.check(69 * SECOND, None);
        device.check(70 * SECOND, Some(false));
        device.check(80 * SECOND, None);
    }

    #[test]
    fn a_change_without_an_answer_is_not_followed_by_another() {
        let mut device = Fixture::new();
        device.used(Duration::ZERO);
        let now = device.began + MINUTE;
        assert_eq!(device.idleness.look(now, |_, _| Some(false)).len(), 1);
        device.used(2 * MINUTE);
        assert_eq!(device.idleness.look(now + MINUTE, |_, _| Some(true)), []);
        device.idleness.answered(1, "phone", now + MINUTE);
        assert_eq!(device.idleness.look(now + MINUTE, |_, _| Some(true)).len(), 1, "it was used meanwhile");
    }

    #[test]
    fn who_connects_anew_is_active_and_who_is_gone_is_forgotten() {
        let mut device = Fixture::new();
        assert_eq!(device.idleness.connected(1, "phone", device.began), None, "nobody says when it is used");
        device.used(Duration::ZERO);
        device.check(MINUTE, Some(true));
        device.said = Some(false); // of the new connection
        device.idleness.connected(1, "phone", device.began + 2 * MINUTE);
        device.check(2 * MINUTE, None);
        device.check(3 * MINUTE, Some(true));
        device.used(4 * MINUTE);
        device.said = None;
        device.check(4 * MINUTE, None);
        assert!(device.idleness.devices.is_empty() && device.idleness.due.is_empty());
        device.used(5 * MINUTE);
        device.idleness.forget(1, "phone");
        assert!(device.idleness.devices.is_empty() && device.idleness.due.is_empty());
    }

    #[test]
    fn with_no_time_given_no_device_becomes_idle() {
        let mut idleness = Idleness::new(Duration::ZERO);
        assert!(!idleness.used(1, "phone", Instant::now()) && idleness.due().is_none() && idleness.devices.is_empty());
    }
}
