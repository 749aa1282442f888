//! A client of the REST API on a node's admin port.

use std::fs;
use std::io;
use std::time::Duration;

use http_body_util::BodyExt;
use http_body_util::Empty;
use hyper::Request;
use hyper::Response;
use hyper::body::Bytes;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::AUTHORIZATION;
use hyper::header::HOST;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::AsyncRead;
use tokio::io::AsyncWrite;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::BAD_USAGE;
use super::FAILED;
use super::Outcome;
use super::hint;
use crate::client::security::Security;
use crate::client::security::root_cause;

/// Much more than an answer has.
const MAX_ANSWER_BYTES: usize = 64 * 1024 * 1024;

pub struct Rest<'a> {
    pub addr: &'a str,
    pub security: Security,
    pub patience: Duration,
}

/// Lines of an answer that goes on.
pub struct Lines {
    body: Incoming,
    text: Vec<u8>,
}

impl Rest<'_> {
    /// What is answered, as JSON.
    ///
    /// # Errors
    /// Why there is no answer, for people.
    pub async fn get(&self, path: &str) -> Result<Value, Outcome> {
        let asked = timeout(self.patience, async {
            let mut body = self.ask(path, None).await?;
            self.whole(&mut body).await
        });
        let bytes = asked.await.map_err(|_| self.silent())??;
        serde_json::from_slice(&bytes).map_err(|_| self.failed(format!("{} does not answer as the REST API does", self.addr)))
    }

    /// An answer that goes on, after `last`.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub async fn lines(&self, path: &str, last: Option<&str>) -> Result<Lines, Outcome> {
        let body = timeout(self.patience, self.ask(path, last)).await.map_err(|_| self.silent())??;
        Ok(Lines { body, text: Vec::new() })
    }

    async fn ask(&self, path: &str, last: Option<&str>) -> Result<Incoming, Outcome> {
        let mut request = Request::get(path).header(HOST, self.addr);
        if let Some(file) = &self.security.token_file {
            let token = fs::read_to_string(file);
            let token = token.map_err(|error| Outcome { text: format!("{}: {error}", file.display()), exit: BAD_USAGE })?;
            request = request.header(AUTHORIZATION, format!("Bearer {}", token.trim_end()));
        }
        if let Some(last) = last {
            request = request.header("last-event-id", last);
        }
        let request = request.body(Empty::new());
        let request = request.map_err(|error| Outcome { text: format!("that cannot be asked: {error}"), exit: BAD_USAGE })?;
        let sent = match self.security.ca_file {
            Some(_) => match self.security.connect_tls(self.addr, b"http/1.1").await {
                Ok(stream) => send(stream, request).await,
                Err(error) => Err(error),
            },
            None => match TcpStream::connect(self.addr).await {
                Ok(stream) => send(stream, request).await,
                Err(error) => Err(error),
            },
        };
        let answer = sent.map_err(|error| {
            let (addr, why) = (self.addr, root_cause(&error));
            self.failed(format!("cannot reach {addr}: {why}; {}", hint(&self.security, "--admin")))
        })?;
        let (head, mut body) = answer.into_parts();
        if head.status.is_success() {
            return Ok(body);
        }
        let problem: Value = serde_json::from_slice(&self.whole(&mut body).await?).unwrap_or_default();
        let why = problem["detail"].as_str().unwrap_or("no reason was given").to_owned();
        let see = if head.status == 401 { "; see --token-file, --ca and --cert" } else { "" };
        let exit = if head.status == 400 { BAD_USAGE } else { FAILED };
        Err(Outcome { text: format!("{} answers {}: {why}{see}", self.addr, head.status.as_u16()), exit })
    }

    async fn whole(&self, body: &mut Incoming) -> Result<Vec<u8>, Outcome> {
        let mut bytes = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| self.failed(format!("{} broke off: {}", self.addr, root_cause(&error))))?;
            bytes.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            if bytes.len() > MAX_ANSWER_BYTES {
                return Err(self.failed(format!("{} answers more than {MAX_ANSWER_BYTES} bytes", self.addr)));
            }
        }
        Ok(bytes)
    }

    fn silent(&self) -> Outcome {
        self.failed(format!("no answer from {} within {} ms; see --timeout", self.addr, self.patience.as_millis()))
    }

    fn failed(&self, text: String) -> Outcome {
        Outcome { text, exit: FAILED }
    }
}

async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> io::Result<Response<Incoming>>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    tokio::spawn(connection); // ends with the answer, and with this program
    sender.send_request(request).await.map_err(io::Error::other)
}

impl Lines {
    /// The next line. None: there are no more.
    pub async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                return Some(String::from_utf8_lossy(&line).trim_end().to_owned());
            }
            let frame = self.body.frame().await?.ok()?;
            self.text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            if self.text.len() > MAX_ANSWER_BYTES {
                return None;
            }
        }
    }
}
