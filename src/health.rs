//! `im-presence health`: whether the node on this machine is ready, for container runtimes, without another program.

use std::io;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tokio::io::AsyncRead;
use tokio::io::AsyncReadExt;
use tokio::io::AsyncWrite;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::client::security::Security;
use crate::ctl::Credentials;

/// Much longer than an answer of `/readyz`.
const MAX_ANSWER_BYTES: u64 = 64 * 1024;

/// Ask a node whether it is ready: exits with 0 if it is, with 1 if it is not or does not answer
#[derive(Args)]
pub struct Health {
    /// The node's admin address
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:6001")]
    addr: String,
    /// How long to wait for the answer, in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 3000, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,
    #[command(flatten)]
    credentials: Credentials,
}

impl Health {
    /// Asks, and prints what the node says.
    pub fn run(self) -> ExitCode {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let asked = runtime.map_err(|error| format!("cannot start: {error}")).and_then(|runtime| runtime.block_on(self.ask()));
        let (_, exit) = match asked {
            Ok(answer) => (writeln!(io::stdout(), "{answer}"), ExitCode::SUCCESS),
            Err(why) => (writeln!(io::stderr(), "{why}"), ExitCode::FAILURE),
        };
        exit // what counts, whether anybody reads the text or not
    }

    async fn ask(&self) -> Result<String, String> {
        let (addr, limit) = (&self.addr, Duration::from_millis(self.timeout));
        let security = self.credentials.security(None)?;
        let answer = match timeout(limit, get_readyz(addr, &security)).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return Err(format!("cannot ask {addr}: {error}")),
            Err(_) => return Err(format!("no answer from {addr} within {} ms", self.timeout)),
        };
        let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
        match head.split(' ').nth(1) {
            Some("200") => Ok(body.to_owned()),
            Some(status) => Err(format!("{addr} answers {status}: {body}")),
            None => Err(format!("{addr} does not answer as the admin port does")),
        }
    }
}

async fn get_readyz(addr: &str, security: &Security) -> io::Result<String> {
    match security.ca_file {
        Some(_) => ask_for_readyz(addr, security.connect_tls(addr, b"http/1.1").await?).await,
        None => ask_for_readyz(addr, TcpStream::connect(addr).await?).await,
    }
}

async fn ask_for_readyz(addr: &str, mut stream: impl AsyncRead + AsyncWrite + Unpin) -> io::Result<String> {
    stream.write_all(format!("GET /readyz HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = Vec::new();
    stream.take(MAX_ANSWER_BYTES).read_to_end(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpListener;

    /// Asks a server that reads a request and then says `answer`.
    async fn ask(answer: &'static str) -> Result<String, String> {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let health = Health { addr: server.local_addr().unwrap().to_string(), timeout: 200, credentials: Credentials::default() };
        let serve = async {
            let (mut stream, _) = server.accept().await.unwrap();
            let mut request = [0; 512];
            let n = stream.read(&mut request).await.unwrap();
            assert!(request[..n].starts_with(b"GET /readyz HTTP/1.1\r\nHost: 127.0.0.1:"));
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let (asked, ()) = tokio::join!(health.ask(), serve);
        asked
    }

    #[tokio::test]
    async fn only_an_answer_of_200_is_health() {
        let ready = ask("HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n{\"ready\":true}").await;
        assert_eq!(ready, Ok("{\"ready\":true}".to_owned()));
        let draining = ask("HTTP/1.1 503 Service Unavailable\r\n\r\n{\"ready\":false}").await.unwrap_err();
        assert!(draining.contains("answers 503: {\"ready\":false}"), "{draining}");
        let stranger = ask("").await.unwrap_err();
        assert!(stranger.contains("does not answer as the admin port does"), "{stranger}");
    }

    #[tokio::test]
    async fn a_node_that_is_not_there_or_says_nothing_is_not_healthy() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let health = Health { addr: server.local_addr().unwrap().to_string(), timeout: 50, credentials: Credentials::default() };
        let mute = health.ask().await.unwrap_err();
        assert!(mute.contains("within 50 ms"), "{mute}");
        drop(server);
        let gone = health.ask().await.unwrap_err();
        assert!(gone.contains("cannot ask"), "{gone}");
    }
}
