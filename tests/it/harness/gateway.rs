//! Gateways: clients that register, beat and bind; and one that is a process of its own, to be killed.

use std::io::BufRead;
use std::io::BufReader;
use std::process::Child;
use std::process::Command;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use im_presence::pb::BatchBindRouteReq;
use im_presence::pb::BatchQueryRouteReq;
use im_presence::pb::BindRouteReq;
use im_presence::pb::Code;
use im_presence::pb::DeregisterGatewayReq;
use im_presence::pb::HeartbeatReq;
use im_presence::pb::HeartbeatResp;
use im_presence::pb::ListGatewaysReq;
use im_presence::pb::ListGatewaysResp;
use im_presence::pb::RegisterGatewayReq;
use im_presence::pb::RegisterGatewayResp;
use im_presence::pb::UserRoute;
use im_presence::pb::admin_service_client::AdminServiceClient;
use im_presence::pb::gateway_service_client::GatewayServiceClient;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::Channel;
use tonic::transport::Endpoint;

use crate::harness::cluster::PHONE;
use crate::harness::cluster::a_bind;
use crate::harness::cluster::code;
use crate::harness::node::Node;
use crate::harness::process;

/// Tells a copy of the test program to be a gateway: address, then users, then the node's address.
const ROLE: &str = "IM_PRESENCE_TEST_GATEWAY";
const ROLE_TEST: &str = "harness::gateway::the_role_of_a_gateway";
const READY: &str = "gateway lives epoch ";
/// Longer than a node makes a gateway wait.
const BEAT_DEADLINE: Duration = Duration::from_secs(3);

pub type GatewayClient = GatewayServiceClient<Channel>;

impl Node {
    pub fn gateways(&self) -> GatewayClient {
        GatewayServiceClient::new(connect(&self.data.to_string()))
    }

    pub fn operator(&self) -> AdminServiceClient<Channel> {
        AdminServiceClient::new(connect(&self.admin.to_string()))
    }

    /// Begins a life of this gateway, and returns its epoch.
    pub async fn register(&self, addr: &str) -> u64 {
        let answer = self.try_register(addr, 0).await.expect("a registration");
        assert_eq!(code(&answer.result), Code::Ok, "{answer:?}");
        answer.gateway_epoch
    }

    pub async fn try_register(&self, addr: &str, epoch: u64) -> Result<RegisterGatewayResp, Status> {
        let request = RegisterGatewayReq { gateway_addr: addr.to_owned(), gateway_epoch: epoch, ..Default::default() };
        self.gateways().register_gateway(request).await.map(tonic::Response::into_inner)
    }

    pub async fn try_beat(&self, addr: &str, epoch: u64) -> Result<HeartbeatResp, Status> {
        self.gateways().heartbeat(a_beat(addr, epoch)).await.map(tonic::Response::into_inner)
    }

    /// Beats, and tells what the node says of it.
    pub async fn beat(&self, addr: &str, epoch: u64) -> Code {
        code(&self.try_beat(addr, epoch).await.expect("a heartbeat").result)
    }

    pub async fn deregister(&self, addr: &str, epoch: u64) -> Code {
        let request = DeregisterGatewayReq { gateway_addr: addr.to_owned(), gateway_epoch: epoch };
        code(&self.gateways().deregister_gateway(request).await.expect("an answer").into_inner().result)
    }

    pub async fn list_gateways(&self, include_dead: bool) -> ListGatewaysResp {
        self.operator().list_gateways(ListGatewaysReq { include_dead, ..Default::default() }).await.expect("a list").into_inner()
    }

    /// Binds a phone of each user to a life of a gateway, and insists that each was done.
    pub async fn bind_all(&self, users: impl IntoIterator<Item = i64>, addr: &str, epoch: u64) {
        let binds = users.into_iter().map(|user| on(addr, epoch, a_bind(user, PHONE, &format!("c-{user}")))).collect();
        let answer = self.presence().batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds").into_inner();
        assert!(answer.results.iter().all(|bound| code(&bound.result) == Code::Ok), "{answer:?}");
    }

    /// What any tier says of each user, with routes.
    pub async fn query_all(&self, users: impl IntoIterator<Item = i64>) -> Vec<UserRoute> {
        let request = BatchQueryRouteReq { user_ids: users.into_iter().collect(), with_routes: true, ..Default::default() };
        self.presence().batch_query_route(request).await.expect("queries").into_inner().users
    }

    /// How many of these users are online, as far as any tier says.
    pub async fn online(&self, users: impl IntoIterator<Item = i64>) -> usize {
        self.query_all(users).await.iter().filter(|user| user.is_online).count()
    }
}

/// A gateway in this process that beats by itself until it is told to be silent.
pub struct Gateway {
    pub addr: String,
    pub epoch: u64,
    beating: JoinHandle<()>,
    failed: Arc<Mutex<Vec<String>>>,
}

impl Gateway {
    /// Registers at the first of `nodes`, and beats through it. A beat that fails is repeated through the next one at once.
    pub async fn start(addr: &str, nodes: &[&Node], every: Duration) -> Self {
        Self::go_on(addr, nodes[0].register(addr).await, nodes, every)
    }

    /// Beats for a life that was registered before.
    pub fn go_on(addr: &str, epoch: u64, nodes: &[&Node], every: Duration) -> Self {
        let (clients, failed) = (nodes.iter().map(|node| node.gateways()).collect(), Arc::default());
        let beating = tokio::spawn(keep_beating(clients, a_beat(addr, epoch), every, Arc::clone(&failed)));
        Self { addr: addr.to_owned(), epoch, beating, failed }
    }

    /// No beat leaves it from now on.
    pub fn falls_silent(&self) {
        self.beating.abort();
    }

    /// What went wrong with its beats.
    pub fn failed(&self) -> Vec<String> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        self.beating.abort();
    }
}

async fn keep_beating(mut nodes: Vec<GatewayClient>, beat: HeartbeatReq, every: Duration, failed: Arc<Mutex<Vec<String>>>) {
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut node = 0;
    loop {
        ticks.tick().await;
        for _ in 0..nodes.len() {
            let mut request = tonic::Request::new(beat.clone());
            request.set_timeout(BEAT_DEADLINE);
            let what = match nodes[node].heartbeat(request).await {
                Ok(answer) if code(&answer.get_ref().result) == Code::Ok => break,
                Ok(answer) => format!("{:?}", answer.into_inner().result),
                Err(status) => format!("{:?}: {}", status.code(), status.message()),
            };
            failed.lock().unwrap_or_else(PoisonError::into_inner).push(what);
            node = (node + 1) % nodes.len();
        }
    }
}

/// A gateway that is a process of its own: registered, with its users bound, and beating.
pub struct GatewayProcess {
    child: Child,
    pub epoch: u64,
}

impl GatewayProcess {
    /// Runs it; it lives and all its users, 1 to `users`, are bound when this returns.
    pub fn start(addr: &str, users: i64, node: &Node) -> Self {
        let mut command = Command::new(std::env::current_exe().expect("this program"));
        command.args(["--exact", ROLE_TEST, "--nocapture"]).env(ROLE, format!("{addr} {users} {}", node.data));
        let mut child = process::spawn(command_with_output(command)).expect("start a gateway");
        let lines = BufReader::new(child.stdout.take().expect("its output")).lines().map_while(Result::ok);
        let epoch = lines.filter_map(|line| line.split_once(READY)?.1.trim().parse().ok()).next();
        Self { child, epoch: epoch.expect("the gateway lives") }
    }

    pub fn kill(&mut self) {
        let _ = self.child.kill(); // it may have ended by itself
        self.child.wait().expect("wait for the gateway");
    }
}

impl Drop for GatewayProcess {
    fn drop(&mut self) {
        self.kill();
    }
}

fn command_with_output(mut command: Command) -> Command {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// What [`GatewayProcess`] runs. In the test program itself it does nothing.
#[tokio::test]
async fn the_role_of_a_gateway() {
    let Ok(role) = std::env::var(ROLE) else { return };
    let [addr, users, node] = role.split(' ').collect::<Vec<_>>()[..] else { panic!("{ROLE}={role}") };
    let users: i64 = users.parse().expect("a number of users");
    let channel = connect(node);
    let mut gateway = GatewayServiceClient::new(channel.clone());
    let request = RegisterGatewayReq { gateway_addr: addr.to_owned(), ..Default::default() };
    let registered = gateway.register_gateway(request).await.expect("a registration").into_inner();
    let epoch = registered.gateway_epoch;
    let binds = (1..=users).map(|user| on(addr, epoch, a_bind(user, PHONE, &format!("c-{user}")))).collect();
    let mut presence = im_presence::pb::presence_service_client::PresenceServiceClient::new(channel);
    let bound = presence.batch_bind_route(BatchBindRouteReq { binds }).await.expect("binds").into_inner();
    assert!(bound.results.iter().all(|bound| code(&bound.result) == Code::Ok), "{bound:?}");
    println!("{READY}{epoch}");
    let every = Duration::from_millis(registered.heartbeat_interval_ms.into());
    keep_beating(vec![gateway], a_beat(addr, epoch), every, Arc::default()).await;
}

pub fn a_beat(addr: &str, epoch: u64) -> HeartbeatReq {
    HeartbeatReq { gateway_addr: addr.to_owned(), gateway_epoch: epoch, connections: 1, load: 0.5, ..Default::default() }
}

/// The same bind, on another gateway.
pub fn on(addr: &str, epoch: u64, bind: BindRouteReq) -> BindRouteReq {
    BindRouteReq { gateway_addr: addr.to_owned(), gateway_epoch: epoch, ..bind }
}

fn connect(addr: &str) -> Channel {
    Endpoint::from_shared(format!("http://{addr}")).expect("an address").connect_lazy()
}
