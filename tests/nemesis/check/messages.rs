//! Messages are where the answers to Deliver say.

use std::collections::HashMap;
use std::collections::HashSet;

use crate::check::Violation;
use crate::check::users::Users;
use crate::history::At;
use crate::history::History;
use crate::history::Message;
use crate::history::Sent;

pub fn complaints(history: &History, users: &Users) -> Vec<Violation> {
    let mut acknowledged: HashMap<(i64, &str), At> = HashMap::new();
    for received in history.received.iter().filter(|received| received.is_acknowledged) {
        let first = acknowledged.entry((received.user, &received.text)).or_insert(received.at);
        *first = received.at.min(*first);
    }
    let left: HashSet<(i64, &str)> = history.left.iter().map(|(user, _, text)| (*user, text.as_str())).collect();
    let wrong = |message: &&Message| {
        let name = (message.user, message.text.as_str());
        match message.sent {
            Sent::Acknowledged => acknowledged.get(&name).is_none_or(|at| *at > message.span.ended),
            Sent::Stored => !acknowledged.contains_key(&name) && !left.contains(&name),
            Sent::NotFound => users.surely_online(message).is_some(),
            Sent::Taken | Sent::Undelivered | Sent::Unknown => false,
        }
    };
    let rule = |message: &Message| match message.sent {
        Sent::Acknowledged => "a message counts as acknowledged, and no device has acknowledged it",
        Sent::Stored => "a message counts as stored, and nobody has it",
        _ => "a message found nobody, and its user was there",
    };
    let wrong = history.messages.iter().filter(wrong);
    let mut complaints: Vec<Violation> = wrong
        .map(|message| Violation { rule: rule(message), what: format!("{message:?}; {:?}", users.surely_online(message)) })
        .collect();
    complaints.extend(numbers(history));
    complaints
}

/// A number in an inbox is one message's, and a message has one number, unless it was sent again after a device had
/// acknowledged it: then it is not in the inbox any more.
fn numbers(history: &History) -> Vec<Violation> {
    let received = history.received.iter().filter(|received| received.seq > 0);
    let received = received.map(|received| (received.user, received.seq, received.text.as_str()));
    let left = history.left.iter().map(|(user, seq, text)| (*user, *seq, text.as_str()));
    let (mut texts, mut seqs, mut complaints) = (HashMap::new(), HashMap::new(), Vec::new());
    for (user, seq, text) in received.chain(left) {
        let first = *texts.entry((user, seq)).or_insert(text);
        if first != text {
            let what = format!("user {user}: {seq} is {first} and {text}");
            complaints.push(Violation { rule: "a number of the inbox was used twice", what });
        }
        let first = *seqs.entry((user, text)).or_insert(seq);
        if first != seq && !may_be_gone(history, (user, text), first.min(seq)) {
            let what = format!("user {user}: {text} is {first} and {seq}");
            complaints.push(Violation { rule: "a message was stored twice", what });
        }
    }
    complaints
}

/// Whether a device had acknowledged it under this number when it was sent for the last time.
fn may_be_gone(history: &History, (user, text): (i64, &str), seq: u64) -> bool {
    let sent = history.messages.iter().filter(|message| message.user == user && message.text == text);
    let last_sent = sent.map(|message| message.span.ended).max();
    let mut acknowledged = history.received.iter().filter(|received| received.is_acknowledged && received.seq == seq);
    acknowledged.any(|received| received.user == user && Some(received.at) <= last_sent)
}
