//! Orders as they go to another node: a message to thousands of users is sent once, with what each of them has of their own.

use std::collections::HashMap;

use bytes::Bytes;

use crate::api::convert;
use crate::domain::id::Epoch;
use crate::engine::messages::streams::Envelope;
use crate::engine::messages::streams::ORDER_BYTES;
use crate::engine::messages::streams::Order;
use crate::pb;
use crate::pb::order::Body;

/// What one request may hold.
const PART_BYTES: usize = 3 * 1024 * 1024;
/// A shorter message costs less than to name it.
const WORTH_SHARING_BYTES: usize = 256;

/// As many of `orders`, from the first on, as go into one request, but one at least. `shares`: the node that is asked knows
/// shared contents.
pub fn next_part(orders: &[(Epoch, Order)], shares: bool) -> (Vec<pb::Order>, Vec<pb::Content>) {
    let (mut part, mut contents, mut bytes) = (Vec::new(), Vec::new(), 0);
    let mut known: HashMap<[usize; 2], usize> = HashMap::new();
    for (i, (epoch, order)) in orders.iter().enumerate() {
        // Orders with the same content stand beside each other, as one call has made them.
        let next = orders.get(i + 1).filter(|_| shares).and_then(|(_, next)| worth_sharing(next)).map(copy);
        let shared = worth_sharing(order).filter(|it| shares && (next == Some(copy(it)) || known.contains_key(&copy(it))));
        let place = shared.map(|envelope| *known.get(&copy(envelope)).unwrap_or(&contents.len()));
        let is_known = place.is_some_and(|place| place < contents.len());
        bytes += if is_known { ORDER_BYTES } else { order.bytes() };
        if bytes > PART_BYTES && !part.is_empty() {
            break;
        }
        if let Some(envelope) = shared.filter(|_| !is_known) {
            known.insert(copy(envelope), contents.len());
            contents.push(convert::content(envelope));
        }
        part.push(to_pb(*epoch, order, place));
    }
    (part, contents)
}

fn worth_sharing(order: &Order) -> Option<&Envelope> {
    match order {
        Order::Delivery(envelope) => Some(&**envelope).filter(|it| it.message.len() + it.payload.len() > WORTH_SHARING_BYTES),
        Order::Kick(_) => None,
    }
}

/// Where the one copy of its content stands.
fn copy(envelope: &Envelope) -> [usize; 2] {
    [&envelope.message, &envelope.payload].map(|bytes| if bytes.is_empty() { 0 } else { bytes.as_ptr().addr() })
}

fn to_pb(epoch: Epoch, order: &Order, content: Option<usize>) -> pb::Order {
    let content = content.and_then(|place| u32::try_from(place).ok());
    let body = match (order, content) {
        (Order::Delivery(envelope), None) => Body::Delivery(convert::delivery(envelope)),
        (Order::Delivery(envelope), Some(_)) => Body::Addressed(convert::addressed(envelope)),
        (Order::Kick(kick), _) => Body::Kick(convert::kick(kick)),
    };
    pb::Order { gateway_epoch: epoch.0, body: Some(body), content: content.unwrap_or_default() }
}

/// The orders of a request; None for those that this node does not understand.
pub fn orders(request: pb::ForwardReq) -> Vec<Option<(Epoch, Order)>> {
    let contents: Vec<(Bytes, Bytes)> =
        request.contents.into_iter().map(|content| (content.message.into(), content.payload)).collect();
    let order = |order: pb::Order| {
        let whole = match order.body? {
            Body::Delivery(delivery) => Order::Delivery(convert::envelope(delivery).into()),
            Body::Kick(kick) => Order::Kick(convert::kick_order(kick)),
            Body::Addressed(delivery) => {
                let (message, payload) = contents.get(order.content as usize)?.clone();
                Order::Delivery(Envelope { message, payload, ..convert::envelope(delivery) }.into())
            }
        };
        Some((Epoch(order.gateway_epoch), whole))
    };
    request.orders.into_iter().map(order).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use prost::Message;

    use super::*;
    use crate::engine::messages::streams::KickOrder;

    fn to(user: i64, message: &Bytes) -> (Epoch, Order) {
        let envelope = Envelope { user_id: user, message: message.clone(), wants_ack: true, ..Envelope::default() };
        (Epoch(user.unsigned_abs()), Order::Delivery(Arc::new(envelope)))
    }

    /// All that arrives, in how many requests, and their bytes.
    fn sent(orders: &[(Epoch, Order)], shares: bool) -> (Vec<(Epoch, Order)>, usize, usize) {
        let (mut arrived, mut requests, mut bytes) = (Vec::new(), 0, 0);
        while arrived.len() < orders.len() {
            let (orders, contents) = next_part(&orders[arrived.len()..], shares);
            let request = pb::ForwardReq { orders, contents, ..Default::default() };
            assert!(request.encoded_len() < 4 * 1024 * 1024, "{}", request.encoded_len());
            (requests, bytes) = (requests + 1, bytes + request.encoded_len());
            arrived.extend(self::orders(request).into_iter().flatten());
        }
        (arrived, requests, bytes)
    }

    #[test]
    fn a_message_to_many_goes_once_in_each_request_and_arrives_whole_at_each() {
        let (large, other, short) = (Bytes::from(vec![b'x'; 60_000]), Bytes::from(vec![b'y'; 60_000]), Bytes::from("short"));
        let mut all: Vec<_> = (0..1_000).map(|user| to(user, [&large, &other, &short][user as usize / 334])).collect();
        all.push((Epoch(7), Order::Kick(KickOrder::default())));
        let (arrived, requests, bytes) = sent(&all, true);
        assert!(arrived == all && requests == 1 && bytes < 200_000, "{requests} requests, {bytes} bytes");
        let (arrived, requests, _) = sent(&all, false);
        assert!(arrived == all && requests > 10, "{requests} requests to a node that does not know it");
    }

    #[test]
    fn a_content_that_is_not_there_makes_no_empty_message() {
        let large = Bytes::from(vec![b'x'; 1_000]);
        let (orders, contents) = next_part(&[to(1, &large), to(2, &large)], true);
        assert_eq!(contents.len(), 1);
        assert_eq!(self::orders(pb::ForwardReq { orders, ..Default::default() }), [None, None]);
    }
}
