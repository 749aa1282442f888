use super::*;
use crate::event::result;
use im_presence_proto::Status;
use std::thread::sleep;

const IDLE_AFTER: Duration = Duration::from_millis(1);

/// A gateway's end of a stream, and what it was told.
struct Fixture {
    dialogue: Dialogue,
    usage: Usage,
    events: Arc<Mutex<Vec<Event>>>,
}

impl Fixture {
    fn new() -> Self {
        let (usage, events) = (Usage::new(IDLE_AFTER), Arc::<Mutex<Vec<Event>>>::default());
        let (calls, heard) = (mpsc::channel(1).0.downgrade(), events.clone());
        let on_event = move |event| heard.lock().expect("nobody panics").push(event);
        Self { dialogue: Dialogue::new(calls, usage.clone(), Box::new(on_event)), usage, events }
    }

    fn bind(&mut self, user_id: i64) {
        let connection = Connection { user_id, device_id: "phone".to_owned(), ..Connection::default() };
        self.dialogue.call(Call::Bind(connection, oneshot::channel().0));
    }

    fn set(&mut self, user_id: i64, status: Status) -> oneshot::Receiver<pb::SetStatusResp> {
        let (answer, answered) = oneshot::channel();
        let request = pb::SetStatusReq { user_id, status: status.into(), ..Default::default() };
        self.dialogue.call(Call::SetStatus(request, answer));
        answered
    }

    fn watch(&mut self, client: ClientKey, users: &[i64]) -> Result<(), WatchError> {
        let (answer, mut answered) = oneshot::channel();
        self.dialogue.call(Call::Watch(client, users.to_vec(), answer));
        answered.try_recv().expect("answered at once")
    }

    /// All that it says now.
    fn says(&mut self) -> Vec<(u64, Up)> {
        let mut said = Vec::new();
        while self.dialogue.has_frame() {
            let frame = self.dialogue.pop_frame().expect("a frame");
            said.extend(frame.body.map(|body| (frame.seq, body)));
        }
        said
    }

    /// Says how users want to be seen, and of which devices nobody is there.
    fn statuses(&mut self) -> Vec<(u64, pb::SetStatusReq)> {
        let status = |(seq, body)| if let Up::Status(request) = body { Some((seq, request)) } else { None };
        self.says().into_iter().filter_map(status).collect()
    }

    /// Users that it adds with the versions that are known, and users that it removes.
    fn watches(&mut self) -> (u64, Vec<(i64, u64)>, Vec<i64>) {
        let said = self.says();
        let [(seq, Up::Watch(request))] = &said[..] else { panic!("{said:?}") };
        (*seq, request.add.iter().map(|known| (known.user_id, known.version)).collect(), request.remove.clone())
    }

    fn status_answered(&mut self, seq: u64, code: Code) {
        let set = pb::SetStatusResp { result: crate::event::result(code, ""), ..Default::default() };
        assert_eq!(self.dialogue.take(pb::NodeFrame { seq, body: Some(Down::Status(set)) }), None);
    }

    fn watched(&mut self, body: Told) {
        let body = Some(Down::Watched(pb::WatchResp { body: Some(body) }));
        assert_eq!(self.dialogue.take(pb::NodeFrame { seq: 0, body }), None);
    }

    fn told(&mut self, user_id: i64, version: u64, status: Status) {
        let presence = pb::UserPresence { user_id, version, status: status.into(), devices: 1, ..Default::default() };
        self.watched(Told::Presence(presence));
    }

    /// What clients were told since: client, user, version, devices.
    fn hears(&self) -> Vec<(ClientKey, i64, u64, u32)> {
        let events = std::mem::take(&mut *self.events.lock().expect("nobody panics"));
        let presence = |event| match event {
            Event::Presence { client, presence } => Some((client, presence.user_id, presence.version, presence.devices)),
            _ => None,
        };
        events.into_iter().filter_map(presence).collect()
    }
}

#[test]
fn wishes_of_a_user_are_said_one_after_the_other_whatever_happens_to_the_first() {
    let mut gateway = Fixture::new();
    let (mut first, mut second, _other) =
        (gateway.set(1, Status::Busy), gateway.set(1, Status::Away), gateway.set(2, Status::Away));
    let said = gateway.statuses();
    assert_eq!(
        said.iter().map(|(_, request)| (request.user_id, request.status())).collect::<Vec<_>>(),
        [(1, Status::Busy), (2, Status::Away)]
    );
    gateway.status_answered(said[0].0, Code::Unavailable);
    assert!(gateway.statuses().is_empty() && first.try_recv().is_err(), "it is asked later");
    sleep(STATUS_RETRY_AFTER * 3 / 2);
    gateway.dialogue.look();
    assert_eq!(gateway.statuses()[0].1.status(), Status::Busy);
    gateway.dialogue.resume(false);
    let said = gateway.statuses();
    let busy = said.iter().find(|(_, request)| request.user_id == 1).expect("it had no answer");
    gateway.status_answered(busy.0, Code::Ok);
    first.try_recv().expect("answered");
    let said = gateway.statuses();
    assert_eq!(said[0].1.status(), Status::Away);
    gateway.status_answered(said[0].0, Code::NotFound);
    assert_eq!(second.try_recv().expect("answered").result.expect("a result").code(), Code::NotFound);
    assert!(gateway.dialogue.statuses.len() == 1, "only the other user's is left");
}

#[test]
fn a_wish_that_a_node_does_not_take_is_not_said_again() {
    let mut gateway = Fixture::new();
    let (mut first, _second) = (gateway.set(1, Status::Busy), gateway.set(1, Status::Away));
    gateway.statuses();
    gateway.dialogue.refuse_statuses("text is too long");
    let refused = first.try_recv().expect("answered").result.expect("a result");
    assert_eq!((refused.code(), refused.msg.as_str()), (Code::Invalid, "text is too long"));
    gateway.dialogue.resume(false);
    let said = gateway.statuses();
    assert!(said.len() == 1 && said[0].1.status() == Status::Away, "{said:?}");
}

#[test]
fn clients_are_told_what_nodes_say_and_a_new_stream_begins_with_the_versions() {
    let mut gateway = Fixture::new();
    gateway.watch(7, &[1, 2]).expect("not many");
    let (seq, added, _) = gateway.watches();
    assert_eq!(added, [(1, 0), (2, 0)]);
    gateway.told(1, 5, Status::Online);
    gateway.watched(Told::Done(pb::WatchDone { seq, ..Default::default() }));
    assert_eq!(gateway.hears(), [(7, 1, 5, 0)]);
    gateway.watch(8, &[1]).expect("not many");
    assert_eq!((gateway.hears(), gateway.dialogue.has_frame()), (vec![(8, 1, 5, 0)], false), "from memory");
    gateway.dialogue.resume(true);
    assert_eq!(gateway.watches().1, [(1, 5), (2, 0)]);
    gateway.told(1, 4, Status::Away);
    gateway.told(3, 9, Status::Away);
    assert_eq!(gateway.hears(), [(7, 1, 4, 0), (8, 1, 4, 0)], "the database was set back; nobody looks at 3");
}

#[test]
fn who_is_refused_is_told_to_each_client() {
    let mut gateway = Fixture::new();
    gateway.watch(7, &[1, 2]).expect("not many");
    gateway.watch(8, &[2]).expect("not many");
    let (seq, ..) = gateway.watches();
    gateway.watched(Told::Done(pb::WatchDone { seq, result: crate::event::result(Code::Refused, "too many"), delayed: false }));
    let events = gateway.events.lock().expect("nobody panics");
    let [Event::NotWatched { client: 7, users: both, why }, Event::NotWatched { client: 8, users: one, .. }] = &events[..] else {
        panic!("{events:?}")
    };
    assert_eq!((&both[..], &one[..], why.as_str()), (&[1, 2][..], &[2][..], "too many"));
}

#[test]
fn a_device_is_said_to_be_idle_and_is_bound_again_as_idle_as_it_is() {
    let mut gateway = Fixture::new();
    gateway.bind(1);
    gateway.bind(2);
    gateway.says();
    gateway.usage.used(1, "phone");
    sleep(IDLE_AFTER * 2);
    gateway.dialogue.look();
    let said = gateway.statuses();
    let [(seq, request)] = &said[..] else { panic!("{said:?}") };
    assert_eq!((request.user_id, &*request.device_id, request.idle, request.status), (1, "phone", Some(true), 0));
    gateway.status_answered(*seq, Code::Ok);
    gateway.dialogue.resume(true);
    let binds = gateway.says();
    let idle = |body: &Up| if let Up::Bind(request) = body { (request.user_id, request.idle) } else { panic!("{body:?}") };
    assert_eq!(binds.iter().map(|(_, body)| idle(body)).collect::<Vec<_>>(), [(1, true), (2, false)]);
}

#[test]
fn a_client_who_is_to_go_keeps_its_connection_until_it_has_gone_or_its_time_is_over() {
    let mut gateway = Fixture::new();
    for user in [1, 2, 3] {
        gateway.bind(user);
    }
    for (seq, body) in gateway.says() {
        let Up::Bind(bind) = body else { panic!("{body:?}") };
        let bound = pb::BindRouteResp { result: result(Code::Ok, ""), route_key: bind.user_id.to_string(), ..Default::default() };
        gateway.dialogue.take(pb::NodeFrame { seq, body: Some(Down::Bound(bound)) });
    }
    let kick = |user_id: i64, reason: pb::Reason, close_after_ms| {
        let (device_id, route_key, reconnect_to) = ("phone".to_owned(), user_id.to_string(), vec!["gw-2:7000".to_owned()]);
        let reason = reason.into();
        let kick = pb::Kick { user_id, device_id, route_key, reason, reconnect_to, close_after_ms, ..Default::default() };
        pb::NodeFrame { seq: 0, body: Some(Down::Kick(kick)) }
    };
    gateway.dialogue.take(kick(1, pb::Reason::Drain, 60_000));
    gateway.dialogue.take(kick(2, pb::Reason::Drain, 0));
    gateway.dialogue.take(kick(3, pb::Reason::Migrate, 60_000));
    gateway.dialogue.take(kick(3, pb::Reason::Replaced, 0)); // it is bound elsewhere
    assert_eq!(gateway.dialogue.connections(), 2);
    gateway.dialogue.look();
    let events = std::mem::take(&mut *gateway.events.lock().expect("nobody panics"));
    let told: Vec<_> = events
        .iter()
        .map(|event| match event {
            Event::Move(connection, kick) => (connection.user_id, "move", kick.reconnect_to.len()),
            Event::Kick(connection, kick) => (connection.user_id, kick.reason().as_str_name(), 0),
            other => panic!("{other:?}"),
        })
        .collect();
    let want = [(1, "move", 1), (2, "move", 1), (3, "move", 1), (3, "REASON_REPLACED", 0), (2, "REASON_DRAIN", 0)];
    assert_eq!(told, want);
    let said = gateway.says();
    let [(_, Up::Unbind(unbind))] = &said[..] else { panic!("{said:?}") };
    assert_eq!((unbind.user_id, &*unbind.route_key), (2, "2"), "only that one still has its route");
    assert_eq!(gateway.dialogue.connections(), 1);
}

#[test]
fn what_a_node_has_lost_is_bound_again_once_and_what_has_moved_is_told_as_lost() {
    let mut gateway = Fixture::new();
    [1, 2, 3].into_iter().for_each(|user| gateway.bind(user));
    let binds = gateway.says();
    let answer = |gateway: &mut Fixture, seq, code| {
        let bound = pb::BindRouteResp { result: crate::event::result(code, ""), ..Default::default() };
        assert_eq!(gateway.dialogue.take(pb::NodeFrame { seq, body: Some(Down::Bound(bound)) }), None);
    };
    binds[..2].iter().for_each(|(seq, _)| answer(&mut gateway, *seq, Code::Ok));
    assert_eq!(gateway.dialogue.digest().expect("nothing is repeated").1, 3, "who has no answer yet is held, too");
    let named = |user_id| pb::Bound { user_id, device_id: "phone".to_owned(), ..Default::default() };
    let bind_again = [1, 2, 3, 4].map(named).to_vec(); // 3 has no answer yet, 4 has gone
    let query = pb::NodeFrame { seq: 0, body: Some(Down::DigestQuery(pb::DigestQuery { bind_again, ..Default::default() })) };
    assert_eq!(gateway.dialogue.take(query.clone()), None);
    let said = gateway.says();
    let user = |body: &Up| if let Up::Bind(request) = body { request.user_id } else { panic!("{body:?}") };
    assert_eq!(said.iter().map(|(_, body)| user(body)).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(gateway.dialogue.take(query), None);
    assert!(gateway.says().is_empty(), "it is under way");
    assert_eq!(gateway.dialogue.digest(), None, "so it says nothing of what it holds");
    answer(&mut gateway, said[0].0, Code::Ok);
    answer(&mut gateway, said[1].0, Code::Refused);
    assert_eq!(gateway.dialogue.digest().expect("nothing is repeated").1, 2);
    let events = gateway.events.lock().expect("nobody panics");
    assert!(matches!(&events[..], [Event::Lost(Connection { user_id: 2, .. }, _)]), "{events:?}");
}

#[test]
fn what_is_held_is_listed_with_the_number_of_the_query() {
    let mut gateway = Fixture::new();
    [1, 2].into_iter().for_each(|user| gateway.bind(user));
    gateway.says();
    let query = pb::DigestQuery { buckets: vec![2], list: true, ..Default::default() };
    assert_eq!(gateway.dialogue.take(pb::NodeFrame { seq: 9, body: Some(Down::DigestQuery(query)) }), None);
    let said = gateway.says();
    let [(9, Up::Digest(answer))] = &said[..] else { panic!("{said:?}") };
    assert_eq!(answer.buckets.iter().flat_map(|of| &of.bound).map(|bound| bound.user_id).collect::<Vec<_>>(), [2]);
}
