//! `ctl forget-user`: erases a user, on the node's admin port.

use clap::Args;

use super::BAD_USAGE;
use super::Outcome;
use super::code;
use super::exit;
use super::print;
use crate::client::security::Link;
use crate::pb;
use crate::pb::Code;
use crate::pb::admin_service_client::AdminServiceClient;

#[derive(Args)]
pub struct ForgetUser {
    /// The user's id, above 0
    #[arg(value_parser = clap::value_parser!(i64).range(1..))]
    user: i64,
    /// Only say how much there is
    #[arg(long)]
    dry_run: bool,
    /// Really: it cannot be undone
    #[arg(long, conflicts_with = "dry_run")]
    yes: bool,
    /// The node's admin address
    #[arg(long, value_name = "HOST:PORT", env = "IM_PRESENCE_ADMIN", default_value = "127.0.0.1:6001")]
    admin: String,
}

impl ForgetUser {
    pub(super) fn addr(&self) -> &str {
        &self.admin
    }

    /// # Errors
    /// Nobody has said that it is meant.
    pub(super) fn is_meant(&self) -> Result<(), Outcome> {
        if self.yes || self.dry_run {
            return Ok(());
        }
        let user = self.user;
        let text = format!("to forget user {user} cannot be undone: say --yes, or --dry-run to see how much there is");
        Err(Outcome { text, exit: BAD_USAGE })
    }

    /// Makes the call.
    pub(super) async fn call(&self, link: Link, json: bool) -> Result<Outcome, tonic::Status> {
        let request = pb::ForgetUserReq { user_id: self.user, dry_run: self.dry_run };
        let answer = AdminServiceClient::new(link).forget_user(request).await?.into_inner();
        let text = if json { print::json("ForgetUserResp", &answer) } else { self.said(&answer) };
        Ok(Outcome { text, exit: exit(code(&answer.result), true) })
    }

    fn said(&self, answer: &pb::ForgetUserResp) -> String {
        let (user, rows) = (self.user, answer.rows);
        match code(&answer.result) {
            Code::Ok if self.dry_run => format!("{rows} rows are known of user {user}; nothing was erased"),
            Code::Ok => format!("user {user} is forgotten: {rows} rows are erased"),
            _ => format!("user {user} was not forgotten{}", print::refusal(&answer.result)),
        }
    }
}
