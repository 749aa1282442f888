//! What comes to an attached gateway by itself, in turn.

use tokio::sync::mpsc;
use tonic::Status;

use crate::api::convert;
use crate::domain::digest::asking::Query;
use crate::engine::gateways::digests::Holder;
use crate::engine::messages::streams::Attached;
use crate::engine::messages::streams::HeldBytes;
use crate::engine::messages::streams::Order;
use crate::engine::messages::streams::Queued;
use crate::engine::presence::watches::Told;
use crate::engine::presence::watches::Watch;
use crate::pb;
use crate::pb::node_frame::Body as Down;

/// What goes to the transport, with the room in the stream's queue that it takes until then.
pub type Written = (Result<pb::NodeFrame, Status>, Option<HeldBytes>);
pub type Outgoing = mpsc::Sender<Written>;

pub enum ToGateway {
    Order(Queued),
    Told(Told),
    Query(u64, Query),
}

/// The next of it, once it may be sent: orders and what clients watch in turn. None: the gateway is gone.
pub async fn next_for<'a>(
    out: &'a Outgoing,
    attached: Option<&mut Attached>,
    holder: Option<&mut Holder>,
    watch: Option<&Watch>,
) -> Option<(mpsc::Permit<'a, Written>, ToGateway)> {
    let (permit, attached, holder) = (out.reserve().await.ok()?, attached?, holder?);
    let told = async {
        match watch {
            Some(watch) => watch.next().await,
            None => std::future::pending().await,
        }
    };
    let next = tokio::select! {
        order = attached.next() => ToGateway::Order(order?),
        told = told => ToGateway::Told(told),
        Some((seq, query)) = holder.next() => ToGateway::Query(seq, query),
    };
    Some((permit, next))
}

pub fn order(order: Order) -> Down {
    match order {
        Order::Delivery(envelope) => Down::Delivery(convert::delivery(&envelope)),
        Order::Kick(kick) => Down::Kick(convert::kick(&kick)),
    }
}
