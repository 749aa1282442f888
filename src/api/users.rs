//! What operators do to users: take devices off, and keep them away for a while.

use std::time::Duration;

use tonic::Request;
use tonic::Status;
use tonic::codegen::http::Extensions;

use crate::api::access;
use crate::api::admin::Admin;
use crate::api::audited::audited;
use crate::api::binder::reason_label;
use crate::api::convert;
use crate::api::fit::ROOM;
use crate::api::fit::fit;
use crate::api::status::status;
use crate::domain::event::Ban;
use crate::domain::event::ForceOffline;
use crate::domain::event::Outcome;
use crate::domain::event::Which;
use crate::domain::id::DeviceId;
use crate::domain::id::UserId;
use crate::domain::id::Version;
use crate::domain::policy::Reason;
use crate::domain::route::Route;
use crate::domain::time::Timestamp;
use crate::engine::write::change::Change;
use crate::engine::write::lanes::Lanes;
use crate::error::Error;
use crate::metrics::ByReason;
use crate::pb;
use crate::security::audit::Entry;

/// Ten years.
const MAX_BAN_S: u32 = 10 * 365 * 86_400;
const MAX_REASON_BYTES: usize = 255;

const NO_ROUTE: &str = "the user has no such device";

/// What was done, or would be.
struct Forced {
    kicked: Vec<(Route, Reason)>,
    version: Version,
    banned_until: Timestamp,
}

impl Admin {
    pub(super) async fn kick(&self, request: Request<pb::KickDeviceReq>) -> Result<pb::KickDeviceResp, Status> {
        let (_, extensions, request) = request.into_parts();
        let (user, device, dry_run) = kick_of(&request).map_err(|error| status(&error))?;
        let args = format!("device {device}");
        let force = ForceOffline { which: Which::One(device), ban: Ban::Stays, dry_run };
        let entry = Entry { action: "KickDevice".to_owned(), args, reason: request.reason, ..Entry::default() };
        let Some(Forced { kicked, version, .. }) = self.change(&extensions, user, force, entry).await? else {
            let result = convert::result(pb::Code::NotFound, NO_ROUTE);
            return Ok(pb::KickDeviceResp { result, ..Default::default() });
        };
        let (result, kicked) = self.routes(user, &kicked);
        Ok(pb::KickDeviceResp { result, kicked, version: version.0 })
    }

    pub(super) async fn force(&self, request: Request<pb::ForceOfflineReq>) -> Result<pb::ForceOfflineResp, Status> {
        let (_, extensions, request) = request.into_parts();
        let (user, ban) = ban_of(&request).map_err(|error| status(&error))?;
        let args = match ban {
            Ban::Stays => String::new(),
            Ban::For(length) => format!("banned for {} s", length.as_secs()),
            Ban::Lifted => "ban lifted".to_owned(),
        };
        let force = ForceOffline { which: Which::All, ban, dry_run: request.dry_run };
        let entry = Entry { action: "ForceOffline".to_owned(), args, reason: request.reason, ..Entry::default() };
        let forced = self.change(&extensions, user, force, entry).await?;
        let Forced { kicked, version, banned_until } = forced.ok_or_else(|| status(&another_outcome()))?;
        let (result, kicked) = self.routes(user, &kicked);
        Ok(pb::ForceOfflineResp { result, kicked, version: version.0, banned_until_ms: banned_until.0 })
    }

    /// None: the device that is meant has no live route.
    async fn change(
        &self,
        extensions: &Extensions,
        user: UserId,
        force: ForceOffline,
        entry: Entry,
    ) -> Result<Option<Forced>, Status> {
        if force.dry_run {
            return force_offline(&self.lanes, user, force).await.map_err(|error| status(&error));
        }
        access::check_operator(extensions)?;
        let entry = Entry { target: format!("user {user}"), ..entry };
        let (lanes, metrics, is_ban) = (self.lanes.clone(), self.metrics.clone(), matches!(force.ban, Ban::For(_)));
        let forcing = async move {
            let forced = force_offline(&lanes, user, force).await?;
            for (_, reason) in forced.iter().flat_map(|forced| &forced.kicked) {
                metrics.kicks.get_or_create(&ByReason { reason: reason_label(*reason) }).inc();
            }
            metrics.presence.bans.inc_by(u64::from(is_ban));
            Ok(forced)
        };
        let refusal = |forced: &Option<Forced>| forced.is_none().then(|| NO_ROUTE.to_owned());
        audited(&self.audit, extensions, entry, refusal, forcing).await
    }

    /// As many as an answer has room for, and how many more there are.
    fn routes(&self, user: UserId, kicked: &[(Route, Reason)]) -> (Option<pb::Result>, Vec<pb::Route>) {
        let lives = self.lives.table();
        let mut routes = kicked.iter().map(|(route, _)| convert::kicked_route(user, route, &lives)).collect();
        let msg = match fit(&mut routes, ROOM) {
            0 => String::new(),
            left_out => format!("{left_out} more devices: there is no room to name them"),
        };
        (convert::result(pb::Code::Ok, msg), routes)
    }
}

/// None: the device that is meant has no live route.
async fn force_offline(lanes: &Lanes, user: UserId, force: ForceOffline) -> Result<Option<Forced>, Error> {
    match lanes.submit(user, Change::ForceOffline(force)).await? {
        Outcome::ForcedOffline { kicked, version, banned_until } => Ok(Some(Forced { kicked, version, banned_until })),
        Outcome::NoDevice => Ok(None),
        _ => Err(another_outcome()),
    }
}

fn kick_of(request: &pb::KickDeviceReq) -> Result<(UserId, DeviceId, bool), Error> {
    convert::at_most("reason", request.reason.len(), MAX_REASON_BYTES, "bytes")?;
    Ok((convert::user_id(request.user_id)?, convert::device_id(&request.device_id)?, request.dry_run))
}

fn ban_of(request: &pb::ForceOfflineReq) -> Result<(UserId, Ban), Error> {
    convert::at_most("reason", request.reason.len(), MAX_REASON_BYTES, "bytes")?;
    convert::at_most("ban_for_s", request.ban_for_s as usize, MAX_BAN_S as usize, "seconds")?;
    let ban = match (request.lift_ban, request.ban_for_s) {
        (true, 0) => Ban::Lifted,
        (true, _) => return Err(Error::Invalid { field: "lift_ban", reason: "cannot be with ban_for_s".to_owned() }),
        (false, 0) => Ban::Stays,
        (false, seconds) => Ban::For(Duration::from_secs(seconds.into())),
    };
    Ok((convert::user_id(request.user_id)?, ban))
}

fn another_outcome() -> Error {
    Error::internal("a user was to be forced offline, and had the outcome of another change")
}
