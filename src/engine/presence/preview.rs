//! What another device policy would cost: all who are online are looked at, by the rule that a bind is judged by.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;
use std::time::Instant;

use futures_util::FutureExt;
use tokio::sync::Mutex;
use tokio::task::yield_now;

use crate::domain::gateway::Liveness;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::policy::DevicePolicy;
use crate::domain::policy::OnOverflow;
use crate::domain::route::Route;
use crate::engine::presence::online::Online;
use crate::error::Error;

/// How long a preview looks.
const MAX_TIME: Duration = Duration::from_secs(60);
/// Users at a time.
const PAGE: i64 = 2_000;
/// Users who are named.
const MAX_EXAMPLES: usize = 20;

/// Whom a policy would cost devices.
#[derive(Debug, Default)]
pub struct Preview {
    pub users: u64,
    pub routes: u64,
    /// Who were looked at.
    pub seen: u64,
    /// Of all; below 1: time was up.
    pub share: f32,
    pub examples: Vec<UserId>,
}

pub struct Previews {
    online: Arc<Online>,
    on_overflow: OnOverflow,
    /// Held by the one that looks.
    turn: Mutex<()>,
}

impl Previews {
    pub fn new(online: Arc<Online>, on_overflow: OnOverflow) -> Self {
        Self { online, on_overflow, turn: Mutex::default() }
    }

    /// Looks at everybody, for a minute at most. Dropping it ends that.
    ///
    /// # Errors
    /// [`Error::Overloaded`] while another one looks, [`Error::Unavailable`] if SQL cannot be read.
    pub async fn look(&self, max_devices: usize, per_platform: usize) -> Result<Preview, Error> {
        let Ok(_turn) = self.turn.try_lock() else {
            return Err(Error::overloaded("another preview is under way on this node"));
        };
        let policy = DevicePolicy { max_devices, per_platform, on_overflow: self.on_overflow };
        let (began, mut preview, mut after) = (Instant::now(), Preview::default(), 0);
        while began.elapsed() < MAX_TIME {
            let page = self.online.read(move |connection| connection.routes_by_user(after, PAGE).boxed()).await?;
            let Some((last, _)) = page.last() else {
                preview.share = 1.0;
                return Ok(preview);
            };
            after = last.get();
            // One device always has room.
            let several = page.iter().filter(|(_, routes)| *routes > 1).map(|(user, _)| *user).collect();
            let left = self.judge(several, &policy, began, &mut preview).await?;
            preview.seen += page.iter().take_while(|(user, _)| left.is_none_or(|left| *user < left)).count() as u64;
        }
        let all = u64::try_from(self.online.lives.users_online()).unwrap_or(0).max(preview.seen + 1);
        preview.share = preview.seen as f32 / all as f32;
        Ok(preview)
    }

    /// Returns at whom time was up, if it was. A user may have thousands of devices, so others have their turn after each.
    async fn judge(
        &self,
        users: Vec<UserId>,
        policy: &DevicePolicy,
        began: Instant,
        preview: &mut Preview,
    ) -> Result<Option<UserId>, Error> {
        for (user, answer) in self.online.answers(users).await? {
            if began.elapsed() >= MAX_TIME {
                return Ok(Some(user));
            }
            yield_now().await;
            let late: HashSet<Version> =
                answer.live_routes().filter(|live| live.suspect).map(|live| live.route.bound_version).collect();
            let is_late = |route: &Route| late.contains(&route.bound_version);
            let liveness = |route: &Route| if is_late(route) { Liveness::Late } else { Liveness::OnTime };
            let routes: Vec<Route> = answer.live_routes().map(|live| live.route.clone()).collect();
            let surplus = policy.surplus(&routes, liveness);
            if surplus > 0 {
                preview.users += 1;
                preview.routes += surplus as u64;
                if preview.examples.len() < MAX_EXAMPLES {
                    preview.examples.push(user);
                }
            }
        }
        Ok(None)
    }
}
