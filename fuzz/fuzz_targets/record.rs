//! What stands in Redis, or in a row of the outbox, which others may have written.

#![no_main]

use im_presence::domain::id::Version;
use im_presence::store::codec::Envelope;
use im_presence::store::codec::Hint;
use im_presence::store::codec::KickOrder;
use im_presence::store::codec::OutboxBody;
use im_presence::store::codec::StoredRecord;
use libfuzzer_sys::fuzz_target;
use prost::Message;

fuzz_target!(|data: &[u8]| {
    if let Ok(stored) = StoredRecord::decode(data)
        && let Some(record) = stored.into_record(Version(7))
    {
        let again = StoredRecord::decode(&*StoredRecord::from(&record).encode_to_vec()).expect("what was written");
        assert_eq!(again.into_record(Version(7)), Some(record));
    }
    if let Ok(body) = OutboxBody::decode(data) {
        let _ = (body.users(), body.stored.iter().map(|notice| notice.as_json().len()).sum::<usize>());
    }
    if let Ok(kick) = KickOrder::decode(data) {
        let _ = kick.encode_to_vec();
    }
    let _ = Envelope::decode(data);
    let _ = Hint::decode(data);
});
