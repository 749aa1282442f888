//! Binds of users whom nobody has bound before: they kick nobody, and are never a no-op.

use std::time::Duration;

use im_presence::pb;
use im_presence::pb::gateway_frame::Body as Up;

use crate::harness::cluster::PHONE;
use crate::harness::node::Node;
use crate::harness::stream::hello;
use crate::load;
use crate::load::Done;
use crate::load::Stream;
use crate::load::on_core;

const BIND: &str = "/mpim.PresenceService/BindRoute";
const ATTACH: &str = "/mpim.GatewayService/Attach";

/// The bind of the n-th user. On a stream, the address is empty: the stream's own.
pub fn bind(n: u64, gateway_addr: &str) -> pb::BindRouteReq {
    pb::BindRouteReq {
        user_id: 1 + n as i64,
        gateway_addr: gateway_addr.to_owned(),
        client_ip: "192.0.2.17".to_owned(),
        client_port: 40_000,
        device_id: PHONE.to_owned(),
        platform: pb::Platform::Ios.into(),
        conn_id: n.to_string(),
        ..Default::default()
    }
}

/// Calls over so many connections, each with so many under way. Users from `first` on, a million for each connection.
pub async fn by_calls(node: &Node, addr: &'static str, (connections, in_flight): (u64, u64), first: u64, time: Duration) -> Done {
    let server = node.data;
    let request = move |c, n| bind(first + c * 1_000_000 + n, addr);
    let done = on_core(None, move || load::run(server, BIND, connections, in_flight, time, request)).await;
    assert_eq!(done.failed, 0, "failed calls");
    done
}

/// A stream of the gateway at `addr`, on which it says nothing yet.
pub async fn attach(node: &Node, addr: &str) -> Stream {
    let (server, first) = (node.data, pb::GatewayFrame { seq: 1, body: Some(hello(addr, 0)) });
    on_core(None, move || Stream::open(server, ATTACH, &first)).await
}

/// Frames on a stream, so many under way. Users from `first` on.
pub async fn by_frames(mut stream: Stream, in_flight: u64, first: u64, time: Duration) -> (Done, Stream) {
    let frame = move |n| pb::GatewayFrame { seq: n, body: Some(Up::Bind(bind(first + n, ""))) };
    on_core(None, move || (stream.run(in_flight, time, frame), stream)).await
}
