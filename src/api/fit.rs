//! Answers that are no larger than clients take.

use prost::Message;

use crate::api::convert::MAX_ANSWER_BYTES;

/// What an answer says beside its items.
const BESIDE_BYTES: usize = 1_024;
/// For items, if an answer has nothing else of any length.
pub const ROOM: usize = MAX_ANSWER_BYTES - BESIDE_BYTES;
/// Key and length of an item.
const HEAD_BYTES: usize = 1 + 5;

/// What an item takes.
pub fn bytes<M: Message>(item: &M) -> usize {
    HEAD_BYTES + item.encoded_len()
}

/// Leaves out the last items, as far as they have no room in so many bytes. Returns how many.
pub fn fit<M: Message>(items: &mut Vec<M>, room: usize) -> usize {
    let (mut used, all) = (0, items.len());
    let fits = |item: &&M| {
        used += bytes(*item);
        used <= room
    };
    let fitting = items.iter().take_while(fits).count();
    items.truncate(fitting);
    all - fitting
}
