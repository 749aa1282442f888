//! What a gateway may send on its stream, from bytes to what the engine is given.

#![no_main]

use im_presence::api::convert;
use im_presence::pb;
use im_presence::pb::gateway_frame::Body;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|data: &[u8]| {
    let Ok(frame) = pb::GatewayFrame::decode(data) else { return };
    match frame.body {
        Some(Body::Hello(hello)) => _ = convert::registration(hello),
        Some(Body::Heartbeat(beat)) => _ = convert::beat(&beat),
        Some(Body::Bind(bind)) => {
            if let Ok((user, _)) = convert::bind(&bind) {
                assert!(user.get() > 0);
            }
        }
        Some(Body::Unbind(unbind)) => _ = convert::unbind(&unbind, None),
        Some(Body::Ack(ack)) => {
            if let Ok(ack) = convert::ack(&ack) {
                assert_eq!(convert::ack(&convert::ack_to_pb(&ack)).expect("what was accepted once is again"), ack);
            }
        }
        None => {}
    }
});
