use std::time::Duration;
mod load;
use im_presence::pb;
fn main() {
    let addr = std::env::var("ADDR").unwrap().parse().unwrap();
    let conns: u64 = std::env::var("CONNS").unwrap_or("8".into()).parse().unwrap();
    let inflight: u64 = std::env::var("INFLIGHT").unwrap_or("64".into()).parse().unwrap();
    for _ in 0..3 {
        let done = load::run(addr, "/mpim.PresenceService/BindRoute", conns, inflight, Duration::from_secs(5), |c, n| {
            pb::BindRouteReq {
                user_id: 1 + ((c * 7919 + n * 31) % 100_000) as i64,
                gateway_addr: format!("gw-{}:7000", n % 16),
                client_ip: "10.0.0.1".into(),
                client_port: 4242,
                device_id: "phone".into(),
                platform: 1,
                gateway_epoch: 0,
                conn_id: format!("c{c}-{n}"),
                connected_ms_ago: 0,
            }
        });
        println!("{done:?} {:.0}/s", done.per_second());
    }
}
