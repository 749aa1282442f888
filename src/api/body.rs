//! Bodies on their way in and out, so that memory follows what has arrived and what has not left yet, not what was announced.

use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::time::Duration;

use bytes::Buf;
use bytes::Bytes;
use bytes::BytesMut;
use http_body::Frame;
use tokio::time::Sleep;
use tokio::time::sleep;
use tonic::Status;
use tonic::body::Body;

use crate::api::status::status;
use crate::error::Error;
use crate::memory::Held;
use crate::memory::Memory;
use crate::memory::Share;

/// Largest message that is taken.
pub const MAX_MESSAGE_BYTES: usize = 4 * 1024 * 1024;
/// How long a message that has begun may take, and the one message of a call that has no other.
const MESSAGE_LIMIT: Duration = Duration::from_secs(10);
/// What a gRPC message begins with: whether it is compressed, and its length.
const HEAD_BYTES: usize = 5;
/// An answer leaves in pieces of this size, so that the connection takes no more than it can send.
const PIECE_BYTES: usize = 32 * 1024;

/// A request's body, of which only whole messages are passed on: whoever reads it may make room for one as soon as its head
/// is there.
pub struct Arriving {
    body: Body,
    /// Messages that have come in part, and what they take.
    part: BytesMut,
    part_held: Held,
    /// What the call takes as long as it is under way. None: it is over before it could be counted, or it is a stream.
    call: Option<Arc<Held>>,
    /// Largest message that it may have.
    max_bytes: usize,
    /// A message is waited for.
    is_due: bool,
    /// When it has to be there; set when there is something to wait for.
    limit: Option<Pin<Box<Sleep>>>,
}

impl Arriving {
    /// The body of a call that has one message. Its memory is taken from the `call`.
    pub fn message(body: Body, memory: &Arc<Memory>, call: Option<Arc<Held>>) -> Self {
        Self { is_due: true, call, ..Self::stream(body, memory) }
    }

    /// The body of a call that may have many.
    pub fn stream(body: Body, memory: &Arc<Memory>) -> Self {
        let part_held = memory.none(Share::Calls);
        let max_bytes = MAX_MESSAGE_BYTES;
        Self { body, part: BytesMut::new(), part_held, call: None, max_bytes, is_due: false, limit: None }
    }

    /// The same, whose messages may be as large as `max_bytes`.
    pub fn with_limit(self, max_bytes: usize) -> Self {
        Self { max_bytes, ..self }
    }

    /// Takes what has arrived. Returns the messages that are whole.
    fn take(&mut self, mut data: Bytes) -> Result<Option<Bytes>, Status> {
        if self.part.is_empty() {
            let whole = whole_messages(&data, self.max_bytes)?;
            if whole < data.len() {
                self.keep(&data.split_off(whole))?;
            }
            return self.pass_on(data);
        }
        self.keep(&data)?;
        let whole = whole_messages(&self.part, self.max_bytes)?;
        self.part_held.remove(whole);
        let messages = self.part.split_to(whole).freeze();
        self.pass_on(messages)
    }

    fn keep(&mut self, data: &[u8]) -> Result<(), Status> {
        self.is_due = true;
        if !self.part_held.add(data.len()) {
            return Err(out_of_memory());
        }
        self.part.extend_from_slice(data);
        Ok(())
    }

    fn pass_on(&mut self, messages: Bytes) -> Result<Option<Bytes>, Status> {
        if messages.is_empty() {
            return Ok(None);
        }
        if self.call.as_ref().is_some_and(|call| !call.add(messages.len())) {
            return Err(out_of_memory());
        }
        (self.is_due, self.limit) = (!self.part.is_empty(), None);
        Ok(Some(messages))
    }

    /// Nothing more has arrived.
    fn poll_limit(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if !self.is_due {
            return Poll::Pending;
        }
        let limit = self.limit.get_or_insert_with(|| Box::pin(sleep(MESSAGE_LIMIT)));
        limit.as_mut().poll(cx).map(|()| {
            let seconds = MESSAGE_LIMIT.as_secs();
            Some(Err(Status::deadline_exceeded(format!("the message did not arrive whole within {seconds} s"))))
        })
    }
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        loop {
            let frame = match Pin::new(&mut self.body).poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => frame,
                Poll::Pending => return self.poll_limit(cx),
                Poll::Ready(None) if !self.part.is_empty() => {
                    return Poll::Ready(Some(Err(Status::invalid_argument("the body ended in the middle of a message"))));
                }
                ended => return ended,
            };
            match frame.into_data().map(|data| self.take(data)) {
                Ok(Ok(None)) => {}
                Ok(Ok(Some(messages))) => return Poll::Ready(Some(Ok(Frame::data(messages)))),
                Ok(Err(status)) => return Poll::Ready(Some(Err(status))),
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.part.is_empty() && self.body.is_end_stream()
    }
}

/// How many bytes at the beginning of `data` are whole messages.
fn whole_messages(data: &[u8], max_bytes: usize) -> Result<usize, Status> {
    let mut left = data;
    while let Some((&[_, a, b, c, d], rest)) = left.split_first_chunk::<HEAD_BYTES>() {
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > max_bytes {
            return Err(Status::out_of_range(format!("a message has at most {max_bytes} bytes, is {length}")));
        }
        match rest.get(length..) {
            Some(rest) => left = rest,
            None => break,
        }
    }
    Ok(data.len() - left.len())
}

/// What a call is told that finds no memory.
pub fn out_of_memory() -> Status {
    status(&Error::overloaded("the calls under way take all the memory they may (limits.memory_bytes)"))
}

/// An answer's body, counted until it has left.
pub struct Leaving {
    body: Body,
    left: Bytes,
    held: Arc<Held>,
    is_counted: bool,
}

impl Leaving {
    pub fn new(body: Body, held: Arc<Held>) -> Self {
        Self { body, left: Bytes::new(), held, is_counted: false }
    }

    /// As [`Leaving::new`], where `held` has counted the answer already.
    pub fn counted(body: Body, held: Arc<Held>) -> Self {
        Self { is_counted: true, ..Self::new(body, held) }
    }
}

impl http_body::Body for Leaving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if self.left.is_empty() {
            match std::task::ready!(Pin::new(&mut self.body).poll_frame(cx)).map(|frame| frame.map(Frame::into_data)) {
                Some(Ok(Ok(data))) => {
                    if !self.is_counted {
                        self.held.add_anyway(data.len());
                    }
                    self.left = data;
                }
                Some(Ok(Err(trailers))) => return Poll::Ready(Some(Ok(trailers))),
                Some(Err(status)) => return Poll::Ready(Some(Err(status))),
                None => return Poll::Ready(None),
            }
        }
        let piece = self.left.len().min(PIECE_BYTES);
        Poll::Ready(Some(Ok(Frame::data(self.left.copy_to_bytes(piece)))))
    }

    fn is_end_stream(&self) -> bool {
        self.left.is_empty() && self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use http_body_util::StreamBody;
    use tokio_stream::StreamExt;

    use super::*;

    fn message(length: u32, bytes: usize) -> Vec<u8> {
        [&[0][..], &length.to_be_bytes(), &vec![7; bytes]].concat()
    }

    fn body(chunks: Vec<Vec<u8>>) -> Body {
        let frames = tokio_stream::iter(chunks).map(|chunk| Ok::<_, Status>(Frame::data(chunk.into())));
        Body::new(StreamBody::new(frames))
    }

    async fn passed_on(arriving: &mut Arriving) -> Option<Result<usize, Status>> {
        let frame = arriving.frame().await?;
        Some(frame.map(|frame| frame.into_data().expect("data").len()))
    }

    #[tokio::test]
    async fn only_whole_messages_are_passed_on() {
        let (memory, all) = (Memory::new(1 << 20), [message(10, 10), message(0, 0), message(3, 3), message(40, 40)].concat());
        for size in 1..=all.len() {
            let chunks = all.chunks(size).map(<[u8]>::to_vec).collect();
            let (mut arriving, mut seen) = (Arriving::stream(body(chunks), &memory), 0);
            while let Some(length) = passed_on(&mut arriving).await {
                seen += length.expect("messages");
                assert!([0, 15, 20, 28, 73].contains(&seen), "{seen} bytes end within a message");
            }
            assert_eq!((seen, memory.taken()), (all.len(), 0));
        }
    }

    #[tokio::test]
    async fn what_has_arrived_is_counted_and_not_what_was_announced() {
        let memory = Memory::new(1 << 20);
        let announced = body(vec![message(4_000_000, 0), vec![7; 1000], vec![7; 1000]]);
        let mut arriving = Arriving::message(announced, &memory, None);
        let status = passed_on(&mut arriving).await.expect("a frame").expect_err("it never comes");
        assert_eq!((status.code(), memory.taken()), (tonic::Code::InvalidArgument, 2005));
        drop(arriving);
        let whole = vec![message(500_000, 500_000); 2];
        let call = Arc::new(memory.none(Share::Calls));
        let mut arriving = Arriving::message(body(whole), &memory, Some(call.clone()));
        assert_eq!(passed_on(&mut arriving).await.expect("a frame").expect("a message"), 500_005);
        let status = passed_on(&mut arriving).await.expect("a frame").expect_err("too much in sum");
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        drop(arriving);
        assert_eq!(memory.taken(), 500_005, "the call works on it");
        drop(call);
        assert_eq!(memory.taken(), 0);
    }

    #[tokio::test]
    async fn an_answer_leaves_in_pieces_and_is_counted_until_then() {
        let memory = Memory::new(1 << 20);
        let held = Arc::new(memory.none(Share::Calls));
        let mut leaving = Leaving::new(body(vec![vec![7; 100_000]]), held);
        let mut pieces = Vec::new();
        while let Some(frame) = leaving.frame().await {
            pieces.push(frame.expect("a piece").into_data().expect("data").len());
            assert_eq!(memory.taken(), 100_000);
        }
        assert_eq!(pieces, [PIECE_BYTES, PIECE_BYTES, PIECE_BYTES, 100_000 - 3 * PIECE_BYTES]);
        drop(leaving);
        assert_eq!(memory.taken(), 0);
    }
}
