//! `ctl gateway`: a gateway in the terminal. It attaches, binds the users it is given, prints what it is told, and acknowledges.

use std::io;
use std::io::Write;
use std::time::Duration;

use clap::Args;
use tokio::sync::mpsc;
use tokio::time::interval;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::Channel;

use super::DONE;
use super::FAILED;
use super::Outcome;
use super::channel;
use super::code;
use super::print;
use crate::pb;
use crate::pb::Code;
use crate::pb::gateway_frame::Body as Up;
use crate::pb::gateway_service_client::GatewayServiceClient;
use crate::pb::node_frame::Body as Down;

/// Before attaching again after the stream has ended.
const PAUSE: Duration = Duration::from_millis(500);
/// Frames that wait to be sent.
const QUEUE: usize = 1_024;

#[derive(Args)]
pub struct Gateway {
    /// The gateway's address, as queries will name it
    gateway: String,
    /// Users that are connected to it, above 0
    #[arg(value_name = "USER", required = true, value_parser = clap::value_parser!(i64).range(1..))]
    users: Vec<i64>,
    /// Which device of each user; without it, the user's one unnamed device
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    device: String,
    /// Do not acknowledge what asks for it
    #[arg(long)]
    silent: bool,
}

/// What goes on while attached.
struct Attached {
    frames: mpsc::Sender<pb::GatewayFrame>,
    answers: Streaming<pb::NodeFrame>,
    beat: Duration,
}

impl Gateway {
    /// Lives until Ctrl-C, then deregisters: its users are offline at once.
    pub(super) async fn live(&self, addr: &str, json: bool, patience: Duration) -> Result<Outcome, Outcome> {
        let mut client = GatewayServiceClient::new(channel(addr, patience, "--addr").await?);
        let mut epoch = 0;
        let ended = tokio::select! {
            ended = self.attach_again(&mut client, &mut epoch, json) => ended,
            stopped = tokio::signal::ctrl_c() => stopped.map_err(|error| failed(&format!("cannot hear Ctrl-C: {error}"))),
        };
        let request = pb::DeregisterGatewayReq { gateway_addr: self.gateway.clone(), gateway_epoch: epoch };
        if epoch != 0 && ended.is_ok() {
            client.deregister_gateway(request).await.map_err(|status| failed(status.message()))?;
        }
        ended.map(|()| Outcome { text: String::new(), exit: DONE })
    }

    /// Attaches whenever the stream has ended, with the epoch it has. One that is over is given up for a new one.
    async fn attach_again(&self, client: &mut GatewayServiceClient<Channel>, epoch: &mut u64, json: bool) -> Result<(), Outcome> {
        loop {
            let claimed = *epoch;
            match self.attach(client, epoch).await {
                Ok(mut attached) => {
                    say(&format!("attached as {} with epoch {epoch}; Ctrl-C ends it", self.gateway));
                    if claimed != *epoch {
                        self.bind(&attached).await;
                    }
                    let status = self.serve(&mut attached, json).await?;
                    say(&format!("the stream has ended: {}", status.message()));
                }
                Err(status) if status.code() == tonic::Code::Unavailable || *epoch != 0 => say(status.message()),
                Err(status) => return Err(failed(&format!("cannot attach: {}", status.message()))),
            }
            sleep(PAUSE).await;
        }
    }

    async fn attach(&self, client: &mut GatewayServiceClient<Channel>, epoch: &mut u64) -> Result<Attached, tonic::Status> {
        let (frames, queue) = mpsc::channel(QUEUE);
        let hello = pb::RegisterGatewayReq { gateway_addr: self.gateway.clone(), gateway_epoch: *epoch, ..Default::default() };
        send(&frames, 1, Up::Hello(hello)).await;
        let mut answers = client.attach(ReceiverStream::new(queue)).await?.into_inner();
        match answers.message().await?.and_then(|frame| frame.body) {
            Some(Down::Welcome(welcome)) if code(&welcome.result) == Code::Ok => {
                *epoch = welcome.gateway_epoch;
                let beat = Duration::from_millis(welcome.heartbeat_interval_ms.max(1).into());
                Ok(Attached { frames, answers, beat })
            }
            Some(Down::Welcome(welcome)) => {
                if code(&welcome.result) == Code::Fenced {
                    *epoch = 0;
                }
                Err(tonic::Status::unavailable(welcome.result.map(|result| result.msg).unwrap_or_default()))
            }
            _ => Err(tonic::Status::internal("the node did not begin with a welcome")),
        }
    }

    async fn bind(&self, attached: &Attached) {
        for (user, seq) in self.users.iter().zip(2..) {
            let device_id = self.device.clone();
            let bind = pb::BindRouteReq { user_id: *user, device_id, conn_id: format!("terminal-{user}"), ..Default::default() };
            send(&attached.frames, seq, Up::Bind(bind)).await;
        }
    }

    /// Prints and acknowledges until the stream ends.
    async fn serve(&self, attached: &mut Attached, json: bool) -> Result<tonic::Status, Outcome> {
        let mut beats = interval(attached.beat);
        loop {
            let frame = tokio::select! {
                frame = attached.answers.message() => frame,
                _ = beats.tick() => {
                    let connections = u32::try_from(self.users.len()).unwrap_or(u32::MAX);
                    send(&attached.frames, 0, Up::Heartbeat(pb::HeartbeatReq { connections, ..Default::default() })).await;
                    continue;
                }
            };
            match frame {
                Ok(Some(frame)) => self.take(attached, frame, json).await?,
                Ok(None) => return Ok(tonic::Status::unavailable("by the node")),
                Err(status) => return Ok(status),
            }
        }
    }

    async fn take(&self, attached: &Attached, frame: pb::NodeFrame, json: bool) -> Result<(), Outcome> {
        let text = match frame.body {
            Some(Down::Delivery(delivery)) => {
                let text = if json { print::json("Delivery", &delivery) } else { print::heard(&delivery) };
                if delivery.wants_ack && !self.silent {
                    let (delivery_id, user_id) = (delivery.delivery_id.clone(), delivery.user_id);
                    let ack = pb::DeliveryAck { delivery_id, user_id, device_id: self.device.clone(), not_here: false };
                    send(&attached.frames, 0, Up::Ack(ack)).await;
                }
                text
            }
            Some(Down::Kick(kick)) if json => print::json("Kick", &kick),
            Some(Down::Kick(kick)) => {
                let reason = pb::Reason::try_from(kick.reason).map_or("?", |reason| reason.as_str_name());
                format!("close the connection of user {}, device {:?} ({reason})", kick.user_id, kick.device_id)
            }
            Some(Down::Bound(bound)) if code(&bound.result) != Code::Ok => {
                say(&format!("a user was not bound{}", print::refusal(&bound.result)));
                return Ok(());
            }
            Some(Down::Drain(_)) => {
                say("this node stops");
                return Ok(());
            }
            _ => return Ok(()),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| failed(&format!("cannot print: {error}")))
    }
}

async fn send(frames: &mpsc::Sender<pb::GatewayFrame>, seq: u64, body: Up) {
    let _ = frames.send(pb::GatewayFrame { seq, body: Some(body) }).await; // the stream's end tells
}

fn say(text: &str) {
    eprintln!("{text}");
}

fn failed(text: &str) -> Outcome {
    Outcome { text: text.to_owned(), exit: FAILED }
}
