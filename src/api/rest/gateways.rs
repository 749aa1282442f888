//! Gateways, as operators see them.

use std::collections::BTreeMap;
use std::collections::HashMap;
use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::Deserialize;
use serde::Serialize;
use utoipa::IntoParams;
use utoipa::ToSchema;
use utoipa_axum::routes;

use crate::api::rest::Answer;
use crate::api::rest::Rest;
use crate::api::rest::Routes;
use crate::api::rest::ask::Caller;
use crate::api::rest::ask::Query;
use crate::api::rest::ask::limit;
use crate::api::rest::cursor::Cursor;
use crate::api::rest::drains::Drain;
use crate::api::rest::problem::Problem;
use crate::pb;
use crate::pb::admin_service_server::AdminService;

/// Lives that are looked at with one call, and by one request, when few of them are wanted.
const STEP: u32 = 1_000;
const MAX_LOOKED_AT: usize = 20_000;
/// Drains that are shown beside their gateways.
const MAX_DRAINS: u32 = 1_000;

/// How a life stands. The worst of what holds is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LifeState {
    Alive,
    /// It has missed beats.
    Late,
    /// Its lease is over, and a hold keeps it alive.
    Held,
    /// It is asked to let its users go.
    Draining,
    Over,
    /// It never registered: its routes end by themselves.
    Unmanaged,
}

/// One life of a gateway.
#[derive(Clone, Serialize, ToSchema)]
pub struct Gateway {
    gateway_addr: String,
    epoch: String,
    state: LifeState,
    /// Negative: it is over. Null: it has none.
    lease_left_ms: Option<i64>,
    /// Null: it sends none.
    last_beat_ms_ago: Option<u64>,
    began_ms: i64,
    region: String,
    capacity: u32,
    connections: u32,
    /// Routes that name it.
    routes: u64,
    load: f32,
    /// The node that has its stream; null: none.
    attached_node: Option<String>,
    labels: BTreeMap<String, String>,
    weight: u32,
    /// Where clients reach it.
    public_addr: String,
    /// Log-ins a second that it likes; 0: as configured.
    login_rate: u32,
    /// The drain that empties it.
    drain: Option<Drain>,
}

impl Gateway {
    pub fn of(life: pb::Life, drain: Option<Drain>) -> Self {
        let state = LifeState::of(&life);
        let has_lease = life.managed && life.alive;
        Self {
            epoch: life.epoch.to_string(),
            state,
            lease_left_ms: has_lease.then_some(life.lease_left_ms),
            last_beat_ms_ago: has_lease.then_some(life.last_beat_ms_ago),
            began_ms: life.began_ms,
            region: life.region,
            capacity: life.capacity,
            connections: life.connections,
            routes: life.routes,
            load: life.load,
            attached_node: Some(life.attached_node).filter(|node| !node.is_empty()),
            labels: life.labels.into_iter().collect(),
            weight: life.weight,
            public_addr: if life.public_addr.is_empty() { life.gateway_addr.clone() } else { life.public_addr },
            login_rate: life.login_rate,
            gateway_addr: life.gateway_addr,
            drain,
        }
    }
}

impl LifeState {
    pub fn of(life: &pb::Life) -> Self {
        match (life.alive, life.managed) {
            (false, _) => Self::Over,
            (true, false) => Self::Unmanaged,
            (true, true) if life.held => Self::Held,
            (true, true) if life.late => Self::Late,
            (true, true) if life.draining => Self::Draining,
            (true, true) => Self::Alive,
        }
    }
}

/// A time in which no gateway is declared dead.
#[derive(Serialize, ToSchema)]
pub struct HoldOn {
    until_ms: i64,
    left_ms: i64,
    reason: String,
}

#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Which {
    /// Only in this state. Not given: all but those that are over.
    #[param(inline)]
    state: Option<LifeState>,
    /// Only of this region.
    region: Option<String>,
    /// Only addresses that begin so.
    prefix: Option<String>,
    cursor: Option<String>,
    /// 100, if not given.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<u32>,
}

impl Which {
    /// Routes are counted of what is looked at: of no more than may be wanted.
    fn sought(&self, limit: u32) -> pb::ListGatewaysReq {
        let late_only = matches!(self.state, Some(LifeState::Late | LifeState::Held));
        let is_all = self.state.is_none() && self.region.is_none() && self.prefix.is_none();
        let include_dead = self.state == Some(LifeState::Over);
        pb::ListGatewaysReq { include_dead, late_only, page_size: if is_all { limit } else { STEP }, ..Default::default() }
    }

    fn wants(&self, life: &pb::Life) -> bool {
        self.state.is_none_or(|state| state == LifeState::of(life))
            && self.region.as_ref().is_none_or(|region| *region == life.region)
            && self.prefix.as_ref().is_none_or(|prefix| life.gateway_addr.starts_with(prefix))
    }
}

/// A page of gateways. It may be short, or empty, and not the last.
#[derive(Serialize, ToSchema)]
struct Gateways {
    items: Vec<Gateway>,
    /// Null: there are no more.
    next_cursor: Option<String>,
    as_of_ms: i64,
    /// Null: none is on.
    hold: Option<HoldOn>,
}

pub fn routes() -> Routes {
    Routes::new().routes(routes!(list_gateways))
}

/// Who lives, by address.
#[utoipa::path(get, path = "/api/v1/gateways", tag = "gateways", params(Which), responses((status = 200, body = Gateways)))]
async fn list_gateways(State(rest): State<Arc<Rest>>, caller: Caller, Query(which): Query<Which>) -> Answer<Gateways> {
    let cursor = Cursor::of("gateways", &(which.state, &which.region, &which.prefix));
    let limit = limit(which.limit)?;
    let sought = which.sought(limit);
    let limit = limit as usize;
    let (mut found, mut looked_at, mut after) = (Vec::new(), 0, cursor.read(which.cursor.as_deref())?);
    let hold = loop {
        let page = page(&rest, &caller, &sought, after).await?;
        looked_at += page.lives.len();
        let hold = hold_on(&rest, &page);
        after = page.next_page_token;
        for life in page.lives {
            if found.len() == limit {
                break;
            }
            if which.wants(&life) {
                found.push(life);
                if found.len() == limit {
                    after = page_token(found.last());
                }
            }
        }
        if after.is_empty() || found.len() == limit || looked_at >= MAX_LOOKED_AT {
            break hold;
        }
    };
    let items = with_drains(&rest, &caller, found).await?;
    Ok(Json(Gateways { items, next_cursor: cursor.next(&after), as_of_ms: rest.now_ms(), hold }))
}

/// Lives after `after`, which is a page token.
pub async fn page(
    rest: &Rest,
    caller: &Caller,
    sought: &pb::ListGatewaysReq,
    after: String,
) -> Result<pb::ListGatewaysResp, Problem> {
    let request = pb::ListGatewaysReq { page_token: after, ..sought.clone() };
    let listed = rest.admin.list_gateways(caller.asks(request)).await;
    Ok(listed.map_err(|status| super::list_problem(status, "prefix"))?.into_inner())
}

/// Goes on after this life.
fn page_token(last: Option<&pb::Life>) -> String {
    last.map_or_else(String::new, |life| format!("{}@{}", life.epoch, life.gateway_addr))
}

pub fn hold_on(rest: &Rest, page: &pb::ListGatewaysResp) -> Option<HoldOn> {
    let (left_ms, reason) = (page.hold_left_ms, page.hold_reason.clone());
    page.hold.then(|| HoldOn { until_ms: rest.now_ms() + left_ms, left_ms, reason })
}

/// All that are late, up to a bound, and the hold that is on.
pub async fn late(rest: &Rest, caller: &Caller) -> Result<(Vec<pb::Life>, Option<HoldOn>), Problem> {
    let sought = pb::ListGatewaysReq { late_only: true, page_size: STEP, ..Default::default() };
    let (mut late, mut after) = (Vec::new(), String::new());
    loop {
        let page = page(rest, caller, &sought, after).await?;
        let hold = hold_on(rest, &page);
        late.extend(page.lives.into_iter().filter(|life| life.late));
        after = page.next_page_token;
        if after.is_empty() || late.len() >= MAX_LOOKED_AT {
            return Ok((late, hold));
        }
    }
}

/// Lives with the drains that run on them.
pub async fn with_drains(rest: &Rest, caller: &Caller, lives: Vec<pb::Life>) -> Result<Vec<Gateway>, Problem> {
    let mut drains = HashMap::new();
    if lives.iter().any(|life| life.draining) {
        let request = pb::ListDrainsReq { active_only: true, page_size: MAX_DRAINS, ..Default::default() };
        let running = rest.admin.list_drains(caller.asks(request)).await?.into_inner().drains;
        drains.extend(running.into_iter().map(|drain| (drain.epoch, Drain::from(drain))));
    }
    let with_drain = |life: pb::Life| {
        let drain = drains.remove(&life.epoch);
        Gateway::of(life, drain)
    };
    Ok(lives.into_iter().map(with_drain).collect())
}
