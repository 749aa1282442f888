//! `ctl gateway`: a gateway in the terminal. It attaches, binds the users it is given, prints what it is told, and acknowledges.

use std::io;
use std::io::Write;
use std::time::Duration;

use clap::Args;
use tokio::sync::mpsc;

use super::DONE;
use super::FAILED;
use super::Outcome;
use super::code;
use super::link;
use super::print;
use crate::client::gateway;
use crate::client::gateway::Connection;
use crate::client::gateway::Event;
use crate::client::gateway::Options;
use crate::client::gateway::Stopped;
use crate::client::security::Security;
use crate::pb;
use crate::pb::Code;

#[derive(Args, Clone)]
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

impl Gateway {
    /// Lives until Ctrl-C, then deregisters: its users are offline at once.
    pub(super) async fn live(&self, addr: &str, json: bool, patience: Duration, security: Security) -> Result<Outcome, Outcome> {
        link(addr, patience, "--addr", &security).await?; // if nobody is there, that is said at once
        let (nodes, gateway_addr) = (vec![addr.to_owned()], self.gateway.clone());
        let options = Options { nodes, gateway_addr, security, ..Options::default() };
        let (this, (end, mut ended)) = (self.clone(), mpsc::channel(1));
        let on_event = move |event| {
            if let Err(why) = this.take(event, json) {
                let _ = end.try_send(why); // full: it ends already
            }
        };
        let gateway = gateway::Gateway::start(options, on_event).map_err(|error| failed(&error.to_string()))?;
        let ended = tokio::select! {
            Some(why) = ended.recv() => Err(why),
            Err(Stopped) = self.bind(&gateway) => Err(failed("the gateway has stopped")),
            stopped = tokio::signal::ctrl_c() => stopped.map_err(|error| failed(&format!("cannot hear Ctrl-C: {error}"))),
        };
        if ended.is_ok() {
            gateway.stop().await.map_err(|status| failed(status.message()))?;
        }
        ended.map(|()| Outcome { text: String::new(), exit: DONE })
    }

    /// Binds all users, and goes on for ever.
    async fn bind(&self, gateway: &gateway::Gateway) -> Result<(), Stopped> {
        for user_id in self.users.iter().copied() {
            let (device_id, conn_id) = (self.device.clone(), format!("terminal-{user_id}"));
            let bound = gateway.bind(Connection { user_id, device_id, conn_id, ..Connection::default() }).await?;
            if code(&bound.result) != Code::Ok {
                say(&format!("user {user_id} was not bound{}", print::refusal(&bound.result)));
            }
        }
        std::future::pending().await
    }

    fn take(&self, event: Event, json: bool) -> Result<(), Outcome> {
        let text = match event {
            Event::Delivery(delivery, acker) => {
                if !self.silent {
                    acker.taken(&self.device);
                }
                if json { print::json("Delivery", &delivery) } else { print::heard(&delivery) }
            }
            Event::Kick(_, kick) if json => print::json("Kick", &kick),
            Event::Kick(_, kick) => {
                let reason = pb::Reason::try_from(kick.reason).map_or("?", |reason| reason.as_str_name());
                format!("close the connection of user {}, device {:?} ({reason})", kick.user_id, kick.device_id)
            }
            Event::Move(_, kick) if json => print::json("Kick", &kick),
            Event::Move(_, kick) => {
                let to = if kick.reconnect_to.is_empty() { "elsewhere".to_owned() } else { kick.reconnect_to.join(" or ") };
                let (user, device, after) = (kick.user_id, &kick.device_id, kick.reconnect_after_ms);
                format!("send user {user}, device {device:?}, to {to} after {after} ms; close in {} ms", kick.close_after_ms)
            }
            Event::Draining(is_drained) => {
                say(if is_drained { "this gateway is drained: take no new clients" } else { "this gateway may take clients" });
                return Ok(());
            }
            Event::Lost(connection, bound) => {
                say(&format!("user {} was not bound again{}", connection.user_id, print::refusal(&bound.result)));
                return Ok(());
            }
            Event::Presence { .. } | Event::NotWatched { .. } => return Ok(()), // nobody here watches
            Event::Attached { epoch } => {
                say(&format!("attached as {} with epoch {epoch}; Ctrl-C ends it", self.gateway));
                return Ok(());
            }
            Event::Detached(status) => {
                say(&format!("not attached: {}", status.message()));
                return Ok(());
            }
            Event::Superseded => return Err(failed(&format!("another process is {}", self.gateway))),
        };
        let mut out = io::stdout().lock();
        writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| failed(&format!("cannot print: {error}")))
    }
}

fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}"); // nobody has to read it
}

fn failed(text: &str) -> Outcome {
    Outcome { text: text.to_owned(), exit: FAILED }
}
