//! Binding, unbinding and querying, on each engine.

use std::time::Duration;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::BindRouteReq;
use im_presence::pb::Code;
use im_presence::pb::Platform;
use im_presence::pb::RouteState;
use im_presence::pb::Source;
use im_presence::pb::Status;
use im_presence::pb::UnbindRouteReq;

use crate::harness::cluster::ALICE;
use crate::harness::cluster::BOB;
use crate::harness::cluster::CAROL;
use crate::harness::cluster::GATEWAY;
use crate::harness::cluster::LAPTOP;
use crate::harness::cluster::OTHER_GATEWAY;
use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::cluster::devices;
use crate::harness::cluster::each_engine;
use crate::harness::eventually;

/// A bind takes it far less time to come through, even on a loaded machine.
const MINUTE_MS: u32 = 60_000;

#[tokio::test]
async fn a_bound_user_is_found_where_they_were_bound() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let request = BindRouteReq {
            platform: Platform::Ios.into(),
            client_ip: "2001:db8::7".to_owned(),
            client_port: 65535,
            ..a_bind(ALICE, PHONE, "c-1")
        };
        let bound = node.bind(request).await;
        assert!(!bound.route_key.is_empty() && bound.version > 0 && bound.gateway_epoch > 0, "{bound:?}");
        assert!(bound.kicked.is_empty());

        for answer in [node.query(ALICE).await, node.query_sql(ALICE).await] {
            assert_eq!(code(&answer.result), Code::Ok);
            assert_eq!((answer.gateway_addr.as_str(), answer.is_online, answer.status()), (GATEWAY, true, Status::Online));
            assert_eq!(answer.version, bound.version);
            let [route] = &answer.routes[..] else { panic!("one route: {answer:?}") };
            assert_eq!((route.device_id.as_str(), route.conn_id.as_str(), route.platform()), (PHONE, "c-1", Platform::Ios));
            assert_eq!((route.gateway_addr.as_str(), route.gateway_epoch), (GATEWAY, bound.gateway_epoch));
            assert_eq!((route.client_ip.as_str(), route.client_port), ("2001:db8::7", 65535));
            assert_eq!((&route.route_key, route.state()), (&bound.route_key, RouteState::Live));
        }
        assert_eq!(node.query_sql(ALICE).await.source(), Source::Durable);
    })
    .await;
}

#[tokio::test]
async fn the_same_bind_again_changes_nothing() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let first = node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        let again = node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        assert_eq!((&again.route_key, again.version), (&first.route_key, first.version));
        assert_eq!(again.gateway_epoch, first.gateway_epoch);
        assert!(again.kicked.is_empty(), "{again:?}");
        assert_eq!(node.query_sql(ALICE).await.version, first.version);
    })
    .await;
}

#[tokio::test]
async fn a_new_connection_of_a_device_replaces_the_old_and_names_it() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let old = node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        let new = node.bind(BindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..a_bind(ALICE, PHONE, "c-2") }).await;
        assert!(new.version > old.version);
        let [kicked] = &new.kicked[..] else { panic!("one route is kicked: {new:?}") };
        assert_eq!((&kicked.route_key, kicked.conn_id.as_str()), (&old.route_key, "c-1"));
        assert_eq!((kicked.gateway_addr.as_str(), kicked.gateway_epoch), (GATEWAY, old.gateway_epoch));
        let answer = node.query_sql(ALICE).await;
        assert_eq!((answer.gateway_addr.as_str(), answer.routes.len()), (OTHER_GATEWAY, 1));
    })
    .await;
}

#[tokio::test]
async fn an_unbound_user_is_offline() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let bound = node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        let request = UnbindRouteReq { user_id: ALICE, route_key: bound.route_key, ..Default::default() };
        let unbound = node.unbind(request.clone()).await;
        assert!(unbound.unbound && unbound.version > bound.version, "{unbound:?}");
        for answer in [node.query(ALICE).await, node.query_sql(ALICE).await] {
            assert_eq!((code(&answer.result), answer.is_online, answer.status()), (Code::NotFound, false, Status::Offline));
            assert!(answer.routes.is_empty() && answer.last_seen_ms > 0, "{answer:?}");
        }
        let again = node.unbind(request).await;
        assert!(!again.unbound && again.version == unbound.version, "{again:?}");
    })
    .await;
}

#[tokio::test]
async fn a_late_unbind_changes_nothing_and_says_so() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let old = node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        let new = node.bind(a_bind(ALICE, PHONE, "c-2")).await;
        let by_key = UnbindRouteReq { user_id: ALICE, route_key: old.route_key.clone(), ..Default::default() };
        let by_device = |gateway: &str, conn: &str| UnbindRouteReq {
            user_id: ALICE,
            gateway_addr: gateway.to_owned(),
            device_id: PHONE.to_owned(),
            conn_id: conn.to_owned(),
            ..Default::default()
        };
        let another_life = UnbindRouteReq { gateway_epoch: new.gateway_epoch + 1, ..by_device(GATEWAY, "") };
        let key_of_another_conn =
            UnbindRouteReq { route_key: new.route_key.clone(), conn_id: "c-1".to_owned(), ..by_key.clone() };
        let late = [
            by_key.clone(),
            UnbindRouteReq { gateway_addr: OTHER_GATEWAY.to_owned(), ..by_key },
            by_device(GATEWAY, "c-1"),
            by_device(OTHER_GATEWAY, ""),
            by_device(OTHER_GATEWAY, "c-2"),
            key_of_another_conn,
        ];
        for request in late {
            let answer = node.unbind(request.clone()).await;
            assert!(!answer.unbound, "{request:?}: {answer:?}");
            assert!(!answer.result.expect("a result").msg.is_empty(), "the answer to {request:?} says why");
        }
        let fenced = node.presence().unbind_route(another_life).await.expect("an answer").into_inner();
        assert_eq!((code(&fenced.result), fenced.unbound), (Code::Fenced, false), "{fenced:?}");
        let answer = node.query_sql(ALICE).await;
        assert_eq!((answer.version, answer.routes.len()), (new.version, 1));
        assert!(node.unbind(by_device(GATEWAY, "c-2")).await.unbound);
    })
    .await;
}

#[tokio::test]
async fn a_bind_older_than_the_connection_that_holds_the_device_is_refused() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let holder = node.bind(BindRouteReq { connected_ms_ago: MINUTE_MS, ..a_bind(ALICE, PHONE, "newer") }).await;
        let older = BindRouteReq { connected_ms_ago: 2 * MINUTE_MS, ..a_bind(ALICE, PHONE, "older") };
        let refused = node.try_bind(older).await.expect("an answer");
        assert_eq!(code(&refused.result), Code::Refused, "{refused:?}");
        assert!(refused.kicked.is_empty() && refused.route_key.is_empty(), "{refused:?}");
        let answer = node.query_sql(ALICE).await;
        assert_eq!((answer.version, answer.routes[0].conn_id.as_str()), (holder.version, "newer"));
    })
    .await;
}

#[tokio::test]
async fn a_thousand_users_are_bound_and_queried_in_one_call_each() {
    const USERS: i64 = 1_000;
    each_engine(&[], async |cluster| {
        let mut client = cluster.node().presence();
        // Not in the order of their numbers.
        let users: Vec<i64> = (0..USERS).map(|i| i * 7_919 % 10_007 + 1).collect();
        let binds = users.iter().map(|user| a_bind(*user, PHONE, &format!("c-{user}"))).collect();
        let bound = client.batch_bind_route(BatchBindRouteReq { binds }).await.expect("a batch of binds").into_inner();
        assert_eq!(bound.results.len(), users.len());
        assert!(bound.results.iter().all(|bind| code(&bind.result) == Code::Ok), "all were bound");
        for (user, bind) in users.iter().zip(&bound.results) {
            assert!(bind.route_key.contains(&format!(":{user}:")), "{} belongs to {user}", bind.route_key);
        }

        // Every other one asked for never existed.
        let asked: Vec<i64> = users.iter().flat_map(|user| [*user, user + 1_000_000]).collect();
        let all = BatchQueryRouteReq { user_ids: asked.clone(), with_routes: true, ..Default::default() };
        let online_only = BatchQueryRouteReq { online_only: true, ..all.clone() };
        let without_routes = BatchQueryRouteReq { with_routes: false, max_staleness_ms: Some(0), ..all.clone() };
        let answer = client.batch_query_route(all).await.expect("a batch of queries").into_inner();
        assert_eq!(answer.users.iter().map(|user| user.user_id).collect::<Vec<_>>(), asked);
        for (i, user) in answer.users.iter().enumerate() {
            let (want, routes) = if i % 2 == 0 { (Code::Ok, 1) } else { (Code::NotFound, 0) };
            assert_eq!((user.code(), user.is_online, user.routes.len()), (want, i % 2 == 0, routes), "{user:?}");
        }
        let answer = client.batch_query_route(online_only).await.expect("a batch of queries").into_inner();
        assert_eq!(answer.users.iter().map(|user| user.user_id).collect::<Vec<_>>(), users);
        let answer = client.batch_query_route(without_routes).await.expect("a batch of queries").into_inner();
        assert!(answer.users.iter().all(|user| user.routes.is_empty()), "routes were not asked for");
        assert_eq!(answer.users.iter().filter(|user| user.gateway_addr == GATEWAY).count(), users.len());
    })
    .await;
}

#[tokio::test]
async fn a_device_too_many_takes_the_place_of_the_oldest() {
    each_engine(&[("ROUTE__MAX_DEVICES", "2"), ("ROUTE__ON_OVERFLOW", "kick_oldest")], async |cluster| {
        let node = cluster.node();
        let oldest = node.bind(a_bind(ALICE, "a", "c-1")).await;
        node.bind(a_bind(ALICE, "b", "c-2")).await;
        let third = node.bind(a_bind(ALICE, "c", "c-3")).await;
        assert_eq!(third.kicked.iter().map(|route| &route.route_key).collect::<Vec<_>>(), [&oldest.route_key]);
        assert_eq!(devices(&node.query_sql(ALICE).await), ["b", "c"]);
    })
    .await;
}

#[tokio::test]
async fn a_device_too_many_is_refused_where_the_policy_says_so() {
    each_engine(&[("ROUTE__MAX_DEVICES", "2"), ("ROUTE__ON_OVERFLOW", "refuse_new")], async |cluster| {
        let node = cluster.node();
        node.bind(a_bind(ALICE, "a", "c-1")).await;
        let second = node.bind(a_bind(ALICE, "b", "c-2")).await;
        let third = node.try_bind(a_bind(ALICE, "c", "c-3")).await.expect("an answer");
        assert_eq!(code(&third.result), Code::Refused, "{third:?}");
        let answer = node.query_sql(ALICE).await;
        assert_eq!((devices(&answer), answer.version), (vec!["a", "b"], second.version));
        node.bind(a_bind(ALICE, "b", "c-4")).await; // a device that is there may connect anew
    })
    .await;
}

#[tokio::test]
async fn devices_of_one_platform_are_limited_apart_from_others() {
    each_engine(&[("ROUTE__PER_PLATFORM", "1")], async |cluster| {
        let node = cluster.node();
        let on = |platform: Platform, device: &str| BindRouteReq { platform: platform.into(), ..a_bind(ALICE, device, "c") };
        let phone = node.bind(on(Platform::Android, "phone-1")).await;
        assert!(node.bind(on(Platform::Windows, "desktop")).await.kicked.is_empty());
        assert!(node.bind(on(Platform::Unspecified, "x")).await.kicked.is_empty());
        assert!(node.bind(on(Platform::Unspecified, "y")).await.kicked.is_empty(), "unnamed platforms are not counted");
        let second_phone = node.bind(on(Platform::Android, "phone-2")).await;
        assert_eq!(second_phone.kicked.iter().map(|route| &route.route_key).collect::<Vec<_>>(), [&phone.route_key]);
        assert_eq!(devices(&node.query_sql(ALICE).await), ["desktop", "phone-2", "x", "y"]);
    })
    .await;
}

#[tokio::test]
async fn a_user_nobody_has_heard_of_is_not_found() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        for answer in [node.query(BOB).await, node.query(BOB).await, node.query_sql(BOB).await] {
            assert_eq!((code(&answer.result), answer.is_online, answer.version), (Code::NotFound, false, 0));
            assert!(answer.routes.is_empty() && answer.gateway_addr.is_empty(), "{answer:?}");
        }
        assert_eq!(cluster.db.number("SELECT COUNT(*) FROM users").await, 0, "asking leaves nothing behind");
    })
    .await;
}

#[tokio::test]
async fn device_names_that_look_alike_are_different_devices() {
    each_engine(&[("ROUTE__MAX_DEVICES", "10")], async |cluster| {
        let node = cluster.node();
        for device in ["007", "7", "Bob", "bob", ""] {
            assert!(node.bind(a_bind(ALICE, device, "c")).await.kicked.is_empty(), "{device:?} is a device of its own");
        }
        assert_eq!(devices(&node.query_sql(ALICE).await), ["", "007", "7", "Bob", "bob"]);
    })
    .await;
}

#[tokio::test]
async fn a_route_on_an_unregistered_gateway_ends_by_itself_and_is_removed() {
    each_engine(&[("ROUTE__ROUTE_TTL", "1")], async |cluster| {
        let node = cluster.node();
        cluster.db.clock_was_steady().await;
        node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        let renewed = node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        assert!(node.query(ALICE).await.is_online);
        eventually("the route is over", Duration::from_secs(3), async || !node.query(ALICE).await.is_online).await;
        assert_eq!(code(&node.query(ALICE).await.result), Code::NotFound);
        let rows = async || cluster.db.number("SELECT COUNT(*) FROM routes").await;
        eventually("the row is gone", Duration::from_secs(10), async || rows().await == 0).await;
        let swept = node.query_sql(ALICE).await;
        assert!(swept.version > renewed.version, "removing a route is a change: {swept:?}");
    })
    .await;
}

#[tokio::test]
async fn a_repeated_bind_keeps_the_route_alive() {
    each_engine(&[("ROUTE__ROUTE_TTL", "2")], async |cluster| {
        let node = cluster.node();
        node.bind(a_bind(ALICE, PHONE, "kept")).await;
        node.bind(a_bind(BOB, PHONE, "left")).await;
        eventually("a route that is not bound again ends", Duration::from_secs(6), async || {
            node.bind(a_bind(ALICE, PHONE, "kept")).await;
            assert!(node.query(ALICE).await.is_online, "a route that is bound again does not");
            !node.query(BOB).await.is_online
        })
        .await;
    })
    .await;
}

#[tokio::test]
async fn a_bind_on_a_life_that_no_gateway_has_is_fenced() {
    each_engine(&[], async |cluster| {
        let node = cluster.node();
        let bound = node.bind(a_bind(ALICE, PHONE, "c-1")).await;
        let nobodys = BindRouteReq { gateway_epoch: bound.gateway_epoch + 1_000, ..a_bind(BOB, PHONE, "c-1") };
        let anothers = BindRouteReq {
            gateway_epoch: bound.gateway_epoch,
            gateway_addr: OTHER_GATEWAY.to_owned(),
            ..a_bind(CAROL, LAPTOP, "c-1")
        };
        for request in [nobodys, anothers] {
            let user = request.user_id;
            let answer = node.try_bind(request).await.expect("an answer");
            assert_eq!(code(&answer.result), Code::Fenced, "{answer:?}");
            assert_eq!(code(&node.query_sql(user).await.result), Code::NotFound);
        }
    })
    .await;
}

#[tokio::test]
async fn a_commit_leaves_nothing_to_show_once_it_was_shown() {
    each_engine(&[], async |cluster| {
        let binds = (1..=100).map(|user| a_bind(user, PHONE, "c")).collect();
        cluster.node().presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds");
        let rows = async || cluster.db.number("SELECT COUNT(*) FROM outbox").await;
        eventually("the outbox is empty", Duration::from_secs(5), async || rows().await == 0).await;
    })
    .await;
}
