//! What operators ask of all users: who is online, how many, whom another policy would cost devices, and who does most.

use std::cmp::Reverse;
use std::sync::Arc;
use std::time::Duration;

use crate::api::convert;
use crate::api::fit::ROOM;
use crate::api::fit::bytes;
use crate::api::fit::fit;
use crate::domain::id::UserId;
use crate::domain::route::Platform;
use crate::domain::status::Status;
use crate::domain::top::Counted;
use crate::domain::top::Tally as Sketch;
use crate::domain::top::merged;
use crate::engine::messages::streams::Streams;
use crate::engine::presence::census::Kind;
use crate::engine::presence::census::Tallies;
use crate::engine::presence::census::Tally;
use crate::engine::presence::online::Filter;
use crate::engine::presence::online::Online;
use crate::engine::presence::preview::Previews;
use crate::engine::presence::watches::Watches;
use crate::engine::read::directory::Answer;
use crate::engine::read::lives::Lives;
use crate::engine::write::busiest::Busiest;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::pb;

/// Users of a page, if the caller does not say how many; and at most.
const PAGE: usize = 100;
const MAX_PAGE: usize = 1_000;
/// Items of a top list, in the same way.
const TOP: usize = 20;
const MAX_TOP: usize = 100;

pub struct Lists {
    pub online: Arc<Online>,
    pub tallies: Tallies,
    pub previews: Previews,
    pub lanes: Arc<Lanes>,
    pub lives: Arc<Lives>,
    pub watches: Arc<Watches>,
    pub streams: Arc<Streams>,
    pub node_id: String,
}

impl Lists {
    pub async fn online(&self, request: &pb::ListOnlineReq) -> Result<pb::ListOnlineResp, Error> {
        let (filter, after) = (filter(request)?, after(&request.page_token)?);
        convert::at_most("page_size", request.page_size as usize, MAX_PAGE, "users")?;
        let limit = if request.page_size == 0 { PAGE } else { request.page_size as usize };
        let page = self.online.list(&filter, after, limit).await?;
        let mut users: Vec<pb::OnlineUser> = page.users.iter().map(|(user, answer)| online_user(*user, answer)).collect();
        // Who alone has more routes than there is room for is listed without them.
        if let Some(first) = users.first_mut().filter(|first| bytes(*first) > ROOM) {
            first.routes.clear();
        }
        let last = if fit(&mut users, ROOM) == 0 { page.last } else { users.last().map(|user| user.user_id) };
        let next_page_token = last.map(|last| last.to_string()).unwrap_or_default();
        Ok(pb::ListOnlineResp { result: convert::result(pb::Code::Ok, ""), users, next_page_token })
    }

    pub async fn count(&self, request: &pb::CountOnlineReq) -> Result<pb::CountOnlineResp, Error> {
        let kind = match pb::CountBy::try_from(request.by) {
            Ok(pb::CountBy::Unspecified) => Kind::All,
            Ok(pb::CountBy::Region) => Kind::Region,
            Ok(pb::CountBy::Platform) => Kind::Platform,
            Ok(pb::CountBy::Status) => Kind::Status,
            Ok(pb::CountBy::Gateway) => {
                let (tally, age) = self.tallies.by_gateway().await?;
                return Ok(counted(&tally, age));
            }
            Err(_) => return Err(Error::Invalid { field: "by", reason: format!("must be 0 to 4, is {}", request.by) }),
        };
        Ok(match self.tallies.by(kind).await? {
            Some((tally, age)) => counted(&tally, age),
            None => pb::CountOnlineResp {
                result: convert::result(pb::Code::NotFound, "not counted yet: a node counts once a minute"),
                ..Default::default()
            },
        })
    }

    pub async fn preview(&self, request: &pb::PreviewPolicyReq) -> Result<pb::PreviewPolicyResp, Error> {
        let preview = self.previews.look(request.max_devices as usize, request.per_platform as usize).await?;
        Ok(pb::PreviewPolicyResp {
            result: convert::result(pb::Code::Ok, ""),
            users: preview.users,
            routes: preview.routes,
            users_seen: preview.seen,
            share_seen: preview.share,
            examples: preview.examples.into_iter().map(UserId::get).collect(),
        })
    }

    pub async fn top(&self, request: &pb::ListTopReq) -> Result<pb::ListTopResp, Error> {
        convert::at_most("count", request.count as usize, MAX_TOP, "items")?;
        let count = if request.count == 0 { TOP } else { request.count as usize };
        let busiest = self.lanes.busiest();
        let window = busiest.iter().map(|busiest| busiest.window).max().unwrap_or_default();
        let (items, window) = match pb::TopBy::try_from(request.by) {
            Ok(pb::TopBy::Changes) => (rates(&busiest, |busiest| &busiest.changes, window), window),
            Ok(pb::TopBy::Gateways) => (rates(&busiest, |busiest| &busiest.binds, window), window),
            Ok(pb::TopBy::Watched) => {
                let watched = self.watches.most_watched(count).await.into_iter();
                (watched.map(|(user, watches)| item(user.to_string(), watches, String::new())).collect(), Duration::ZERO)
            }
            Ok(pb::TopBy::Streams) => (self.fullest_streams(), Duration::ZERO),
            Ok(pb::TopBy::Unspecified) | Err(_) => {
                return Err(Error::Invalid { field: "by", reason: format!("must be 1 to 4, is {}", request.by) });
            }
        };
        let items = items.into_iter().take(count).collect();
        let window_s = u32::try_from(window.as_secs()).unwrap_or(u32::MAX);
        Ok(pb::ListTopResp { result: convert::result(pb::Code::Ok, ""), items, window_s, node_id: self.node_id.clone() })
    }

    fn fullest_streams(&self) -> Vec<pb::TopItem> {
        let table = self.lives.table();
        let named = |(epoch, depth)| {
            let gateway = table.get(epoch).map(|life| life.gateway.to_string()).unwrap_or_default();
            item(gateway, depth, format!("epoch {}", epoch.0))
        };
        let mut items: Vec<pb::TopItem> = self.streams.depths().into_iter().map(named).collect();
        items.sort_by_key(|item| Reverse(item.value));
        items
    }
}

fn item(name: String, value: usize, detail: String) -> pb::TopItem {
    pb::TopItem { name, value: value as u64, error: 0, detail }
}

/// What lanes have counted, together.
fn rates<K: Clone + Eq + std::hash::Hash + std::fmt::Display>(
    busiest: &[Arc<Busiest>],
    of: impl Fn(&Busiest) -> &Sketch<K>,
    window: Duration,
) -> Vec<pb::TopItem> {
    let sketches: Vec<Sketch<K>> = busiest.iter().map(|busiest| of(busiest).clone()).collect();
    let rate = |count: u64| format!("{:.1}/s", count as f64 / window.as_secs_f64().max(1.0));
    let item = |Counted { key, count, error }: Counted<K>| pb::TopItem {
        name: key.to_string(),
        value: count,
        error,
        detail: rate(count),
    };
    merged(&sketches).into_iter().map(item).collect()
}

fn filter(request: &pb::ListOnlineReq) -> Result<Filter, Error> {
    let gateway = if request.gateway_addr.is_empty() { None } else { Some(convert::gateway(&request.gateway_addr)?) };
    convert::at_most("region", request.region.len(), convert::MAX_REGION_BYTES, "bytes")?;
    let platform = Some(convert::platform(request.platform)?).filter(|platform| *platform != Platform::Unspecified);
    let status = match pb::Status::try_from(request.status) {
        Ok(pb::Status::Unspecified) => None,
        Ok(pb::Status::Online) => Some(Status::Online),
        Ok(pb::Status::Away) => Some(Status::Away),
        Ok(pb::Status::Busy) => Some(Status::Busy),
        Ok(pb::Status::Invisible) => Some(Status::Invisible),
        Ok(pb::Status::Offline) | Err(_) => {
            let reason = "must be ONLINE, AWAY, BUSY or INVISIBLE".to_owned();
            return Err(Error::Invalid { field: "status", reason });
        }
    };
    Ok(Filter { gateway, region: Some(request.region.clone()).filter(|region| !region.is_empty()), platform, status })
}

/// The last user who was looked at for the page before.
fn after(token: &str) -> Result<i64, Error> {
    let parsed = if token.is_empty() { Some(0) } else { token.parse().ok().filter(|after: &i64| *after > 0) };
    parsed.ok_or_else(|| Error::Invalid { field: "page_token", reason: "must be the next_page_token of an answer".to_owned() })
}

fn online_user(user: UserId, answer: &Answer) -> pb::OnlineUser {
    let shown = answer.status();
    let routes = answer.live_routes().map(|live| pb::Route {
        state: convert::state_to_pb(&live).into(),
        ..convert::route(user, live.route, live.gateway().to_string())
    });
    pb::OnlineUser {
        user_id: user.get(),
        shown: convert::status_to_pb(shown).into(),
        wanted: convert::status_to_pb(answer.wanted()).into(),
        routes: routes.collect(),
        status_since_ms: answer.status_since(shown).0,
    }
}

/// The greatest first; as many as there is room for.
fn counted(tally: &Tally, age: Duration) -> pb::CountOnlineResp {
    let count = |(name, users): (&String, &u64)| pb::Count { name: name.clone(), users: *users };
    let mut counts: Vec<pb::Count> = tally.counts.iter().map(count).collect();
    counts.sort_by_key(|count| Reverse(count.users));
    let msg = match fit(&mut counts, ROOM) {
        0 => String::new(),
        left_out => format!("the greatest {} of {}", counts.len(), counts.len() + left_out),
    };
    let result = convert::result(pb::Code::Ok, msg);
    pb::CountOnlineResp { result, counts, users: tally.users, age_ms: convert::millis(age) }
}
