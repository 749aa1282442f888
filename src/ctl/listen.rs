//! `ctl listen`: subscribes to the channels of users, as a gateway would, and prints what comes.

use std::future::Future;
use std::io;
use std::io::Write;
use std::time::Duration;

use clap::Args;
use prost::Message;
use redis::Client;
use redis::Msg;
use redis::RedisError;
use redis::aio::PubSub;
use tokio::time::timeout;
use tokio_stream::StreamExt;

use super::BAD_USAGE;
use super::DONE;
use super::FAILED;
use super::Outcome;
use super::print;
use crate::client::security::root_cause;
use crate::clock::unix_ms;
use crate::config::Url;
use crate::domain::id::UserId;
use crate::pb;
use crate::store::keys::Channels;

#[derive(Args)]
pub struct Listen {
    /// The users' ids, above 0
    #[arg(value_name = "USER", required = true, value_parser = clap::value_parser!(i64).range(1..))]
    users: Vec<i64>,
    /// The Redis that the nodes have as [redis_queue]: redis://USER:PASSWORD@HOST:PORT
    #[arg(long, value_name = "URL", default_value = "redis://127.0.0.1:6379")]
    redis: String,
    /// What every channel's name begins with: redis_queue.channel_prefix of the nodes
    #[arg(long, value_name = "P", default_value = "", hide_default_value = true)]
    prefix: String,
    /// The nodes have delivery.payload = envelope: decode each message as a mpim.Delivery
    #[arg(long)]
    envelope: bool,
}

impl Listen {
    /// Prints each message until Ctrl-C.
    pub async fn until_interrupted(&self, json: bool, patience: Duration) -> Result<Outcome, Outcome> {
        let interrupted = async { tokio::signal::ctrl_c().await.map_err(|error| failed(format!("cannot hear Ctrl-C: {error}"))) };
        self.listen(json, patience, &mut io::stdout().lock(), interrupted).await
    }

    async fn listen(
        &self,
        json: bool,
        patience: Duration,
        out: &mut impl Write,
        stop: impl Future<Output = Result<(), Outcome>>,
    ) -> Result<Outcome, Outcome> {
        let shown = Url::from(self.redis.clone());
        let client = Client::open(&*self.redis).map_err(|error| Outcome {
            text: format!("--redis must be redis://HOST:PORT, not {shown}: {}", why(&error)),
            exit: BAD_USAGE,
        })?;
        let mut pubsub = match timeout(patience, self.subscribe(&client)).await {
            Ok(Ok(pubsub)) => pubsub,
            Ok(Err(error)) => return Err(failed(format!("cannot subscribe at {shown}: {}; see --redis", why(&error)))),
            Err(_) => return Err(failed(format!("no answer from {shown} within {} ms; see --timeout", patience.as_millis()))),
        };
        let channels = self.channels().map(|(_, channel)| channel).collect::<Vec<_>>().join(", ");
        let _ = writeln!(io::stderr(), "listening on {channels} at {shown}; Ctrl-C ends it"); // nobody has to read it
        let mut messages = pubsub.on_message();
        tokio::pin!(stop);
        loop {
            let message = tokio::select! {
                stopped = &mut stop => return stopped.map(|()| done()),
                message = messages.next() => message.ok_or_else(|| failed(format!("{shown} has ended the connection")))?,
            };
            match writeln!(out, "{}", self.shown(&message, json)).and_then(|()| out.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(done()),
                Err(error) => return Err(failed(format!("cannot print: {error}"))),
                Ok(()) => {}
            }
        }
    }

    /// When this returns, the server has confirmed it.
    async fn subscribe(&self, client: &Client) -> Result<PubSub, RedisError> {
        let mut pubsub = client.get_async_pubsub().await?;
        let channels: Vec<_> = self.channels().map(|(_, channel)| channel).collect();
        pubsub.subscribe(channels).await?;
        Ok(pubsub)
    }

    fn channels(&self) -> impl Iterator<Item = (i64, String)> {
        let channels = Channels::new(&self.prefix);
        self.users.iter().filter_map(move |user| Some((*user, channels.user(UserId::parse(*user).ok()?))))
    }

    fn shown(&self, message: &Msg, json: bool) -> String {
        let channel = message.get_channel_name();
        let user_id = self.channels().find(|(_, name)| name == channel).map_or(0, |(user, _)| user);
        let bytes = message.get_payload_bytes();
        let delivery = match self.envelope.then(|| pb::Delivery::decode(bytes)) {
            Some(Ok(delivery)) => delivery,
            Some(Err(error)) => return format!("{channel}: no mpim.Delivery ({error}); without --envelope it is shown as it is"),
            None => raw(user_id, bytes),
        };
        if json { print::json("Delivery", &delivery) } else { print::heard(&delivery) }
    }
}

/// What was published as it was given: text if it is UTF-8, else bytes.
fn raw(user_id: i64, bytes: &[u8]) -> pb::Delivery {
    let delivery = pb::Delivery { user_id, timestamp: unix_ms(), ..Default::default() };
    match std::str::from_utf8(bytes) {
        Ok(text) => pb::Delivery { message: text.to_owned(), ..delivery },
        Err(_) => pb::Delivery { payload: bytes.to_vec().into(), ..delivery },
    }
}

fn why(error: &RedisError) -> String {
    if error.is_io_error() { root_cause(error) } else { error.to_string() }
}

fn done() -> Outcome {
    Outcome { text: String::new(), exit: DONE }
}

fn failed(text: String) -> Outcome {
    Outcome { text, exit: FAILED }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::future::pending;
    use tokio::io::AsyncBufReadExt;
    use tokio::io::AsyncReadExt;
    use tokio::io::AsyncWriteExt;
    use tokio::io::BufReader;
    use tokio::net::TcpListener;
    use tokio::net::TcpStream;

    const PATIENCE: Duration = Duration::from_secs(5);

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        listen: Listen,
    }

    /// Confirms one subscription and publishes `bodies` on it. Returns the channel, and the connection.
    async fn serve(server: TcpListener, bodies: Vec<Vec<u8>>) -> (String, BufReader<TcpStream>) {
        let (stream, _) = server.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        loop {
            let command = command(&mut stream).await;
            if command[0] != "SUBSCRIBE" {
                stream.write_all(b"+OK\r\n").await.unwrap();
                continue;
            }
            let channel = &command[1];
            let named = format!("${}\r\n{channel}\r\n", channel.len());
            stream.write_all(format!("*3\r\n$9\r\nsubscribe\r\n{named}:1\r\n").as_bytes()).await.unwrap();
            for body in bodies {
                let head = format!("*3\r\n$7\r\nmessage\r\n{named}${}\r\n", body.len());
                stream.write_all(&[head.as_bytes(), &body, b"\r\n"].concat()).await.unwrap();
            }
            return (channel.clone(), stream);
        }
    }

    /// An array of strings, as Redis takes its commands.
    async fn command(stream: &mut BufReader<TcpStream>) -> Vec<String> {
        let number = async |stream: &mut BufReader<TcpStream>| {
            let mut line = String::new();
            stream.read_line(&mut line).await.unwrap();
            line.trim_end()[1..].parse::<usize>().unwrap()
        };
        let mut words = Vec::new();
        for _ in 0..number(stream).await {
            let mut word = vec![0; number(stream).await + 2];
            stream.read_exact(&mut word).await.unwrap();
            words.push(String::from_utf8_lossy(&word[..word.len() - 2]).into_owned());
        }
        words
    }

    /// What was printed until the server ended the connection, how that was told, and what was subscribed to.
    async fn hear(words: &str, json: bool, bodies: Vec<Vec<u8>>) -> (String, Outcome, String) {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("redis://127.0.0.1:{}", server.local_addr().unwrap().port());
        let words = ["listen", "--redis", &url].into_iter().chain(words.split(' '));
        let listen = Cli::try_parse_from(words).unwrap_or_else(|error| panic!("{error}")).listen;
        let mut out = Vec::new();
        let (ended, channel) =
            tokio::join!(listen.listen(json, PATIENCE, &mut out, pending()), async { serve(server, bodies).await.0 });
        (String::from_utf8(out).unwrap(), ended.unwrap_or_else(|outcome| outcome), channel)
    }

    #[tokio::test]
    async fn each_message_is_a_line_with_its_user() {
        let (out, ended, channel) = hear("42", false, vec![b"hello".to_vec(), vec![0xff, 0]]).await;
        let lines: Vec<_> = out.lines().map(|line| line.split_once("Z ").unwrap().1).collect();
        assert_eq!((&*channel, &lines[..]), ("user:42", &["user 42: hello", "user 42: 0xff00"][..]));
        assert!(ended.exit == FAILED && ended.text.contains("has ended the connection"), "{}", ended.text);
    }

    #[tokio::test]
    async fn an_envelope_is_opened_and_what_is_none_is_named() {
        let delivery = pb::Delivery { user_id: 42, message: "hello".into(), message_id: "m-1".into(), ..Default::default() };
        let bodies = vec![delivery.encode_to_vec(), b"hello".to_vec()];
        let (out, _, channel) = hear("42 --prefix a: --envelope", false, bodies.clone()).await;
        let lines: Vec<_> = out.lines().collect();
        assert_eq!((&*channel, lines[0]), ("a:user:42", "1970-01-01 00:00:00.000Z user 42 (id m-1): hello"));
        assert!(lines[1].starts_with("a:user:42: no mpim.Delivery"), "{}", lines[1]);
        let (out, ..) = hear("42 --envelope", true, bodies).await;
        assert!(out.contains("\"user_id\":\"42\",\"message\":\"hello\""), "{out}");
    }

    #[tokio::test]
    async fn a_redis_that_cannot_be_reached_is_named_without_its_password() {
        let check = async |url: &str, exit: u8, part: &str| {
            let listen = Cli::try_parse_from(["listen", "42", "--redis", url]).unwrap_or_else(|error| panic!("{error}")).listen;
            let ended = listen.listen(false, Duration::from_millis(200), &mut Vec::new(), pending()).await;
            let Outcome { exit: got, text } = ended.unwrap_or_else(|outcome| outcome);
            assert!(got == exit && text.contains(part) && !text.contains("s3cret"), "{url}: {got}, {text}");
        };
        let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port(); // free again
        check(&format!("redis://app:s3cret@127.0.0.1:{closed}"), FAILED, "connection refused; see --redis").await;
        let mute = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("redis://:s3cret@127.0.0.1:{}", mute.local_addr().unwrap().port());
        check(&url, FAILED, "within 200 ms; see --timeout").await;
        check("http://127.0.0.1", BAD_USAGE, "must be redis://HOST:PORT").await;
    }

    #[tokio::test]
    async fn it_stops_when_it_is_asked_to() {
        let server = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("redis://127.0.0.1:{}", server.local_addr().unwrap().port());
        let listen = Cli::try_parse_from(["listen", "42", "--redis", &url]).unwrap_or_else(|error| panic!("{error}")).listen;
        tokio::spawn(async move {
            let _open = serve(server, Vec::new()).await;
            pending::<()>().await;
        });
        let mut out = Vec::new();
        let ended = listen.listen(false, PATIENCE, &mut out, std::future::ready(Ok(()))).await;
        assert!(ended.is_ok_and(|outcome| outcome.exit == DONE && outcome.text.is_empty()) && out.is_empty());
    }
}
