//! Histories made by hand: good ones, and for each rule one that breaks it.

use crate::check::Bounds;
use crate::check::check;
use crate::history::At;
use crate::history::Bind;
use crate::history::Bound;
use crate::history::History;
use crate::history::Life;
use crate::history::Message;
use crate::history::Outcome;
use crate::history::Query;
use crate::history::Received;
use crate::history::Seen;
use crate::history::Sent;
use crate::history::Span;
use crate::history::Told;
use crate::history::Unbind;

const ALICE: i64 = 1;
const EPOCH: u64 = 7;
const MS: At = 1_000;
const S: At = 1_000 * MS;
const BOUNDS: Bounds = Bounds { late: 10 * S, over: 4 * S, silent: 10 * S };
const ONLINE: i32 = 1;
const OFFLINE: i32 = 5;

/// What is broken, if anything: the names of the rules.
#[track_caller]
fn expect(history: &History, rules: &[&str]) {
    let violations = check(history, &BOUNDS);
    let mut broken: Vec<&str> = violations.iter().map(|violation| violation.rule).collect();
    broken.dedup();
    assert_eq!(broken, rules, "{violations:#?}");
}

fn at(ms: At) -> Span {
    Span { began: ms * MS, ended: (ms + 1) * MS }
}

/// Alice's phone, by a connection whose route has the same name in capitals.
fn bind(ms: At, conn: &str, version: u64, kicked: &[&str]) -> Bind {
    let kicked = kicked.iter().map(|key| (*key).to_owned()).collect();
    let outcome = Outcome::Done(Bound { version, key: conn.to_uppercase(), kicked });
    Bind { user: ALICE, device: "phone".to_owned(), epoch: EPOCH, conn: conn.to_owned(), node: 0, span: at(ms), outcome }
}

fn on(device: &str, bind: Bind) -> Bind {
    Bind { device: device.to_owned(), ..bind }
}

fn without_answer(bind: Bind) -> Bind {
    Bind { outcome: Outcome::Unknown, ..bind }
}

fn unbind(ms: At, key: &str, outcome: Outcome<Option<u64>>) -> Unbind {
    Unbind { user: ALICE, key: key.to_owned(), node: 0, span: at(ms), outcome }
}

/// An answer of SQL through node 0 with these connections of phones.
fn query(ms: At, version: u64, conns: &[&str]) -> Query {
    let seen = |conn: &&str| Seen {
        device: "phone".to_owned(),
        epoch: EPOCH,
        conn: (*conn).to_owned(),
        key: conn.to_uppercase(),
        is_suspect: false,
    };
    Query {
        user: ALICE,
        node: 0,
        span: at(ms),
        max_staleness_ms: Some(0),
        version,
        age_ms: 0,
        source: "SOURCE_DURABLE",
        status: if conns.is_empty() { OFFLINE } else { ONLINE },
        is_online: !conns.is_empty(),
        routes: conns.iter().map(seen).collect(),
    }
}

/// Through another node, that far behind.
fn cached(age_ms: u32, query: Query) -> Query {
    Query { node: 1, max_staleness_ms: None, age_ms, source: "SOURCE_LOCAL", ..query }
}

fn life() -> Life {
    Life { gateway: "gw".to_owned(), epoch: EPOCH, began: 0, last_beat: 100 * S, silent: None, over: None }
}

fn message(ms: At, sent: Sent) -> Message {
    Message { user: ALICE, text: "m".to_owned(), span: at(ms), sent }
}

fn received(ms: At, text: &str, seq: u64, is_acknowledged: bool) -> Received {
    Received { user: ALICE, text: text.to_owned(), seq, is_acknowledged, at: ms * MS }
}

fn told(watcher: usize, version: u64, is_online: bool) -> Told {
    Told { watcher, user: ALICE, version, status: if is_online { ONLINE } else { OFFLINE }, is_online, at: 0 }
}

fn history(binds: Vec<Bind>, queries: Vec<Query>) -> History {
    History { binds, queries, lives: vec![life()], ..History::default() }
}

#[test]
fn what_is_there_replaced_or_unbound_as_it_was_answered_is_no_complaint() {
    let binds = vec![bind(0, "a", 10, &[]), bind(10, "b", 20, &["A"])];
    let queries = vec![query(5, 10, &["a"]), query(15, 20, &["b"]), query(25, 30, &[]), cached(30, query(26, 20, &["b"]))];
    let unbinds = vec![unbind(20, "B", Outcome::Done(Some(30))), unbind(22, "A", Outcome::Done(None))];
    expect(&History { unbinds, ..history(binds, queries) }, &[]);
}

#[test]
fn an_acknowledged_bind_that_is_not_there_is_found() {
    expect(&history(vec![bind(0, "a", 10, &[])], vec![query(5, 10, &[])]), &["an acknowledged bind is gone"]);
    expect(&history(vec![bind(0, "a", 10, &[])], vec![query(5, 99, &[])]), &["an acknowledged bind is gone"]);
}

#[test]
fn a_bind_may_be_gone_that_another_kicked_or_whose_gateway_was_not_heard_later() {
    let other = on("laptop", bind(10, "b", 20, &["A"]));
    let mut only_the_laptop = query(15, 20, &["b"]);
    only_the_laptop.routes[0].device = "laptop".to_owned();
    expect(&history(vec![bind(0, "a", 10, &[]), other], vec![only_the_laptop]), &[]);
    let silent = Life { last_beat: 2 * MS, ..life() };
    expect(&History { lives: vec![silent], ..history(vec![bind(0, "a", 10, &[])], vec![query(5, 20, &[])]) }, &[]);
}

#[test]
fn while_a_call_without_an_answer_may_act_nothing_is_asserted_and_afterwards_it_is() {
    let unknown = |ms| without_answer(on("laptop", bind(ms, "x", 0, &[])));
    expect(&history(vec![bind(0, "a", 10, &[]), unknown(3)], vec![query(5, 20, &[])]), &[]);
    // It is long over before the other began.
    let late = bind(20_000, "a", 10, &[]);
    expect(&history(vec![unknown(3), late], vec![query(20_005, 20, &[])]), &["an acknowledged bind is gone"]);
    let unbinds = vec![unbind(3, "A", Outcome::Unknown)];
    expect(&History { unbinds, ..history(vec![bind(0, "a", 10, &[])], vec![query(5, 20, &[])]) }, &[]);
    let of_another = vec![unbind(3, "B", Outcome::Unknown)];
    let gone = history(vec![bind(0, "a", 10, &[])], vec![query(5, 20, &[])]);
    expect(&History { unbinds: of_another, ..gone }, &["an acknowledged bind is gone"]);
}

#[test]
fn a_route_that_was_never_bound_refused_replaced_kicked_or_unbound_is_found() {
    const RULE: &[&str] = &["a route that must not be there"];
    expect(&history(Vec::new(), vec![query(5, 10, &["nobody"])]), RULE);
    let refused = Bind { outcome: Outcome::Refused, ..bind(0, "a", 0, &[]) };
    expect(&history(vec![refused], vec![query(5, 10, &["a"])]), RULE);
    expect(&history(vec![bind(0, "a", 10, &[]), bind(10, "b", 20, &[])], vec![query(15, 20, &["a", "b"])]), RULE);
    let kicked = vec![without_answer(bind(0, "a", 0, &[])), bind(10, "b", 20, &["A"])];
    expect(&history(kicked, vec![query(15, 20, &["a", "b"])]), RULE);
    let unbinds = vec![unbind(3, "A", Outcome::Done(Some(20)))];
    expect(&History { unbinds, ..history(vec![bind(0, "a", 10, &[])], vec![query(5, 20, &["a"])]) }, RULE);
    expect(&history(vec![Bind { epoch: 8, ..bind(0, "a", 10, &[]) }], vec![query(5, 20, &["a"])]), RULE);
}

#[test]
fn a_read_that_goes_back_is_found_unless_the_node_was_killed_meanwhile() {
    let read = |ms, version| cached(5_000, query(ms, version, &[]));
    let back = || history(Vec::new(), vec![read(0, 20), read(10, 10)]);
    expect(&back(), &["a node's answer is older than a former one of it"]);
    expect(&History { kills: vec![(1, 5 * MS)], ..back() }, &[]);
    expect(&History { kills: vec![(0, 5 * MS)], ..back() }, &["a node's answer is older than a former one of it"]);
}

#[test]
fn a_read_that_is_further_behind_than_it_says_or_than_was_asked_for_is_found() {
    let binds = || vec![bind(0, "a", 10, &[]), bind(1_000, "b", 20, &[])];
    let old = |age| cached(age, query(2_000, 10, &["a"]));
    expect(&history(binds(), vec![old(1_000)]), &[]);
    expect(&history(binds(), vec![old(900)]), &["an answer is further behind than it says"]);
    let limited = Query { max_staleness_ms: Some(500), ..old(1_000) };
    expect(&history(binds(), vec![limited]), &["an answer is older than was asked for"]);
    let durable = Query { node: 1, ..query(1_001, 10, &["a"]) };
    expect(&history(binds(), vec![durable]), &["a read of the database is older than what was acknowledged"]);
}

#[test]
fn versions_that_do_not_grow_are_found() {
    let binds = vec![bind(0, "a", 20, &[]), bind(10, "b", 10, &[])];
    expect(&history(binds, Vec::new()), &["the version of a change is not above that of one before"]);
    let at_once = vec![bind(0, "a", 20, &[]), bind(0, "b", 20, &[])];
    expect(&history(at_once, Vec::new()), &["two changes have one version"]);
}

#[test]
fn an_epoch_given_twice_and_users_of_dead_gateways_are_found() {
    const GHOST: &[&str] = &["a route of a gateway that is dead"];
    expect(&History { lives: vec![life(), life()], ..History::default() }, &["an epoch was given twice"]);
    let over = || Life { over: Some(0), last_beat: 0, ..life() };
    let binds = || vec![bind(0, "a", 10, &[])];
    expect(&History { lives: vec![over()], ..history(binds(), vec![query(3_000, 10, &["a"])]) }, &[]);
    expect(&History { lives: vec![over()], ..history(binds(), vec![query(5_000, 10, &["a"])]) }, GHOST);
    let suspect = |ms| {
        let mut query = query(ms, 10, &["a"]);
        query.routes[0].is_suspect = true;
        query
    };
    expect(&History { lives: vec![over()], ..history(binds(), vec![suspect(5_000)]) }, &[]);
    expect(&History { lives: vec![over()], ..history(binds(), vec![suspect(11_000)]) }, GHOST);
    // Whoever dies while things are broken is dead some time after they are mended.
    let silent = || Life { silent: Some(0), last_beat: 0, ..life() };
    let broken = |ms| History { lives: vec![silent()], healed: 60 * S, ..history(binds(), vec![query(ms, 10, &["a"])]) };
    expect(&broken(69_000), &[]);
    expect(&broken(71_000), GHOST);
}

#[test]
fn messages_that_are_not_where_they_should_be_are_found() {
    let acknowledged =
        |received: Vec<Received>| History { messages: vec![message(0, Sent::Acknowledged)], received, ..History::default() };
    const ACKNOWLEDGED: &[&str] = &["a message counts as acknowledged, and no device has acknowledged it"];
    expect(&acknowledged(vec![received(0, "m", 0, true)]), &[]);
    expect(&acknowledged(vec![received(0, "m", 0, false)]), ACKNOWLEDGED);
    expect(&acknowledged(vec![received(10, "m", 0, true)]), ACKNOWLEDGED);

    let stored = || History { messages: vec![message(0, Sent::Stored)], ..History::default() };
    expect(&stored(), &["a message counts as stored, and nobody has it"]);
    expect(
        &History { received: vec![received(0, "m", 1, false)], ..stored() },
        &["a message counts as stored, and nobody has it"],
    );
    expect(&History { received: vec![received(9, "m", 1, true)], ..stored() }, &[]);
    expect(&History { left: vec![(ALICE, 1, "m".to_owned())], ..stored() }, &[]);

    let nobody = |binds| History { messages: vec![message(5, Sent::NotFound)], ..history(binds, Vec::new()) };
    expect(&nobody(Vec::new()), &[]);
    expect(&nobody(vec![bind(0, "a", 10, &[])]), &["a message found nobody, and its user was there"]);
    expect(&nobody(vec![bind(0, "a", 10, &[]), without_answer(bind(4, "b", 0, &[]))]), &[]);
}

#[test]
fn numbers_in_an_inbox_that_are_used_twice_are_found() {
    let of = |received: Vec<Received>| History { received, ..History::default() };
    expect(&of(vec![received(0, "m", 1, true), received(5, "m", 1, true), received(9, "n", 2, true)]), &[]);
    expect(&of(vec![received(0, "m", 1, true), received(5, "n", 1, true)]), &["a number of the inbox was used twice"]);
    expect(&of(vec![received(0, "m", 1, true), received(5, "m", 2, true)]), &["a message was stored twice"]);
    // Sent for the last time after the first was acknowledged, and before.
    let repeated = |ms| History {
        messages: vec![message(ms, Sent::Unknown)],
        ..of(vec![received(3, "m", 1, true), received(9, "m", 2, true)])
    };
    expect(&repeated(5), &[]);
    expect(&repeated(1), &["a message was stored twice"]);
}

#[test]
fn watchers_that_are_taken_back_or_end_wrong_are_found() {
    let watched = |told: Vec<Told>| History {
        told,
        watchers: vec![vec![ALICE]],
        last_queries: vec![query(9_000, 10, &["a"])],
        ..history(vec![bind(0, "a", 10, &[])], Vec::new())
    };
    expect(&watched(vec![told(0, 1, false), told(0, 2, true)]), &[]);
    expect(&watched(vec![told(0, 2, false), told(0, 1, true)]), &["a watcher was taken back"]);
    expect(&watched(vec![told(0, 1, true), told(0, 2, false)]), &["a watcher does not know what is true"]);
    expect(&watched(Vec::new()), &["a watcher does not know what is true"]);
}

#[test]
fn an_error_that_nobody_may_get_is_found() {
    expect(&History { errors: vec!["bind: Internal".to_owned()], ..History::default() }, &["an error nobody may get"]);
}
