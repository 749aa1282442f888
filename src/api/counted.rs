//! Counts each call on the data port: when its answer is there, or when it is given up.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Context;
use std::task::Poll;
use std::task::ready;
use std::time::Instant;

use tonic::Code;
use tonic::body::Body;
use tonic::codegen::BoxFuture;
use tonic::codegen::http;

use crate::metrics::calls::Call;
use crate::metrics::calls::Calls;

const STATUS: &str = "grpc-status";

/// A call under way.
pub struct Begun {
    calls: Arc<Calls>,
    call: Call,
    at: Instant,
}

/// The answer to a call, counted.
pub struct Counted {
    answer: BoxFuture<http::Response<Body>, Infallible>,
    /// None: it was counted.
    begun: Option<Begun>,
}

impl Begun {
    pub fn new(calls: &Arc<Calls>, path: &str) -> Self {
        Self { calls: calls.clone(), call: Call::of(path), at: Instant::now() }
    }

    pub fn counted(self, answer: BoxFuture<http::Response<Body>, Infallible>) -> Counted {
        Counted { answer, begun: Some(self) }
    }
}

impl Counted {
    fn count(&mut self, code: usize) {
        if let Some(Begun { calls, call, at }) = self.begun.take() {
            calls.count(call, code, at.elapsed());
        }
    }
}

impl Future for Counted {
    type Output = Result<http::Response<Body>, Infallible>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Ok(response) = ready!(self.answer.as_mut().poll(cx));
        // What failed has its code in front. What did not, tells it after its body.
        let code = response.headers().get(STATUS).map_or(Code::Ok, |value| Code::from_bytes(value.as_bytes()));
        self.count(code as usize);
        Poll::Ready(Ok(response))
    }
}

/// Whoever asked has gone, or its deadline has passed.
impl Drop for Counted {
    fn drop(&mut self) {
        self.count(Code::Cancelled as usize);
    }
}
