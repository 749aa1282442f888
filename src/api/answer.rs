//! Answers about users, written in protobuf straight from the records in memory: as `QueryRouteResp` and `BatchQueryRouteResp`
//! are, without making one. Queries come by the hundred thousand, and a message would need nine strings for each user.
//!
//! Field numbers stand in `proto/`; a test reads what is written here with the generated types.

use std::fmt::Display;
use std::io::Write;

use prost::encoding::WireType;
use prost::encoding::encode_varint;

use crate::api::convert;
use crate::api::status::item_code;
use crate::domain::id::UserId;
use crate::domain::status::Status;
use crate::engine::read::directory::Answer;
use crate::engine::read::directory::LiveRoute;
use crate::error::Error;
use crate::pb;

/// Most answers about a user with one device fit.
const USER_BYTES: usize = 256;
/// The same without its routes.
const SHORT_USER_BYTES: usize = 48;
/// The longest that says only a code.
const CODE_BYTES: usize = 14;

/// A message in the making.
struct Wire(Vec<u8>);

/// `QueryRouteResp`.
pub fn about_one(user: UserId, answer: &Answer) -> Vec<u8> {
    let mut wire = Wire(Vec::with_capacity(USER_BYTES));
    let (newest, shown) = standing(answer);
    wire.nested(1, |result| {
        if newest.is_none() {
            result.number(1, code(pb::Code::NotFound));
            result.text(2, "the user has no live route");
        }
    });
    wire.standing(newest.as_ref(), shown);
    wire.routes(user, answer);
    wire.number(6, answer.version().0);
    wire.signed(7, answer.last_seen().0);
    wire.number(8, code(convert::source_to_pb(answer.source)));
    wire.number(9, convert::millis(answer.age).into());
    wire.text(10, answer.text(shown));
    wire.signed(11, answer.status_since(shown).0);
    wire.0
}

/// `BatchQueryRouteResp`. `online_only`: users who are known not to be online are left out. From where it would be longer than
/// an answer may be, it says only that.
pub fn about_many(users: &[UserId], answers: &[Result<Answer, Error>], with_routes: bool, online_only: bool) -> Vec<u8> {
    let each = if with_routes { USER_BYTES } else { SHORT_USER_BYTES };
    let mut wire = Wire(Vec::with_capacity((users.len() * each).min(convert::MAX_ANSWER_BYTES)));
    wire.nested(1, |_ok| {});
    let mut is_full = false;
    for (i, (user, answer)) in users.iter().zip(answers).enumerate() {
        let (before, others) = (wire.0.len(), users.len() - i - 1);
        match answer {
            _ if is_full => {}
            Ok(answer) => wire.user(*user, answer, with_routes, online_only),
            Err(error) => wire.user_code(*user, item_code(error).0),
        }
        is_full |= wire.0.len() + others * CODE_BYTES > convert::MAX_ANSWER_BYTES;
        if is_full {
            wire.0.truncate(before);
            wire.user_code(*user, pb::Code::TooLarge);
        }
    }
    wire.0
}

/// The live route that was bound last, and what others are shown.
fn standing(answer: &Answer) -> (Option<LiveRoute<'_>>, Status) {
    let newest = answer.newest();
    let shown = answer.status();
    (newest, shown)
}

impl Wire {
    /// `UserRoute`.
    fn user(&mut self, user: UserId, answer: &Answer, with_routes: bool, online_only: bool) {
        let (newest, shown) = standing(answer);
        if online_only && shown == Status::Offline {
            return;
        }
        self.nested(2, |wire| {
            wire.signed(1, user.get());
            wire.standing(newest.as_ref(), shown);
            if with_routes {
                wire.routes(user, answer);
            }
            wire.number(6, code(if newest.is_some() { pb::Code::Ok } else { pb::Code::NotFound }));
            wire.signed(7, answer.last_seen().0);
            wire.text(8, answer.text(shown));
        });
    }

    /// `UserRoute` that says only why there is no more to say.
    fn user_code(&mut self, user: UserId, why: pb::Code) {
        self.nested(2, |wire| {
            wire.signed(1, user.get());
            wire.number(6, code(why));
        });
    }

    /// Fields 2 to 4 of both messages.
    fn standing(&mut self, newest: Option<&LiveRoute<'_>>, shown: Status) {
        self.text(2, newest.map_or("", |newest| newest.life.gateway.as_str()));
        self.number(3, (shown != Status::Offline).into());
        self.number(4, code(convert::status_to_pb(shown)));
    }

    /// Field 5 of both: a `Route` for each that is live.
    fn routes(&mut self, user: UserId, answer: &Answer) {
        for live in answer.live_routes() {
            self.nested(5, |wire| wire.route(user, &live));
        }
    }

    fn route(&mut self, user: UserId, live: &LiveRoute<'_>) {
        let route = live.route;
        self.text(1, route.device.as_str());
        self.number(2, code(convert::platform_to_pb(route.platform)));
        self.text(3, live.life.gateway.as_str());
        self.number(4, route.epoch.0);
        self.text(5, route.conn.as_str());
        if let Some(ip) = route.client_ip {
            self.printed(6, ip);
        }
        self.number(7, route.client_port.into());
        self.signed(8, route.bound_at.0);
        self.printed(9, convert::route_key(user, route.bound_version));
        self.number(10, code(convert::state_to_pb(live)));
        self.number(11, route.idle.into());
    }

    fn number(&mut self, tag: u32, value: u64) {
        if value != 0 {
            self.key(tag, WireType::Varint);
            self.varint(value);
        }
    }

    fn signed(&mut self, tag: u32, value: i64) {
        self.number(tag, value.cast_unsigned());
    }

    fn text(&mut self, tag: u32, text: &str) {
        if !text.is_empty() {
            self.key(tag, WireType::LengthDelimited);
            self.varint(text.len() as u64);
            self.0.extend_from_slice(text.as_bytes());
        }
    }

    fn printed(&mut self, tag: u32, value: impl Display) {
        self.nested(tag, |wire| {
            let _ = write!(wire.0, "{value}"); // memory takes all that is written
        });
    }

    /// A field that is as long as what `write` puts into it.
    fn nested(&mut self, tag: u32, write: impl FnOnce(&mut Self)) {
        self.key(tag, WireType::LengthDelimited);
        let at = self.0.len();
        self.0.push(0);
        write(self);
        let length = self.0.len() - at - 1;
        match u8::try_from(length) {
            Ok(short @ ..0x80) => self.0[at] = short,
            _ => {
                let mut long = Vec::new();
                encode_varint(length as u64, &mut long);
                self.0.splice(at..=at, long);
            }
        }
    }

    fn key(&mut self, tag: u32, wire_type: WireType) {
        self.varint((tag << 3 | wire_type as u32).into());
    }

    fn varint(&mut self, value: u64) {
        match u8::try_from(value) {
            Ok(short @ ..0x80) => self.0.push(short), // as most are
            _ => encode_varint(value, &mut self.0),
        }
    }
}

fn code(value: impl Into<i32>) -> u64 {
    i64::from(value.into()).cast_unsigned()
}

#[cfg(test)]
mod tests {
    use prost::Message;

    use super::*;
    use crate::domain::gateway::Life;
    use crate::domain::gateway::LifeKind;
    use crate::domain::id::ConnId;
    use crate::domain::id::DeviceId;
    use crate::domain::id::Epoch;
    use crate::domain::id::GatewayAddr;
    use crate::domain::id::Version;
    use crate::domain::route::Platform;
    use crate::domain::route::Route;
    use crate::domain::time::Timestamp;

    #[test]
    fn a_route_that_was_written_by_hand_reads_as_the_message_it_is() {
        let gateway = GatewayAddr::parse("gw-1:7000").expect("an address");
        let life = Life::begun(Epoch(7), gateway, LifeKind::Managed, Timestamp(0));
        let route = Route {
            device: DeviceId::parse("phone").expect("an id"),
            platform: Platform::Tablet,
            epoch: life.epoch,
            conn: ConnId::parse(&"c".repeat(128)).expect("an id"),
            connected_at: Timestamp(1),
            client_ip: "2001:db8::1".parse().ok(),
            client_port: 65_535,
            bound_version: Version(u64::MAX),
            bound_at: Timestamp(-1),
            expires_at: Default::default(),
            idle: true,
        };
        let mut wire = Wire(Vec::new());
        let user = UserId::parse(i64::MAX).expect("an id");
        wire.nested(5, |wire| wire.route(user, &LiveRoute { route: &route, life: &life, suspect: true }));
        let read = pb::QueryRouteResp::decode(&*wire.0).expect("a message");
        let expected =
            pb::Route { state: pb::RouteState::Suspect.into(), ..convert::route(user, &route, life.gateway.to_string()) };
        assert_eq!(read.routes, [expected]);
    }
}
