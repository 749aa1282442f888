//! nginx as the fastest that an answer over HTTP/2 gets: one worker, no log, the same few bytes from memory for each request.

use std::net::SocketAddr;

use crate::harness::mariadb::free_port;
use crate::load::contender;
use crate::load::server::Server;

pub struct Nginx {
    _server: Server,
    pub addr: SocketAddr,
}

impl Nginx {
    /// It answers as many bytes as the daemon does.
    pub async fn start(core: usize) -> Self {
        let port = free_port();
        let server = Server::start("nginx", port, |directory| {
            std::fs::write(format!("{directory}/nginx.conf"), configuration(directory, port)).expect("write nginx.conf");
            let mut words = contender::on_core(Some(core), "nginx");
            words.extend(["-p", directory, "-c", "nginx.conf"].map(str::to_owned));
            words
        });
        Self { _server: server.await, addr: SocketAddr::from(([127, 0, 0, 1], port)) }
    }
}

/// It counts requests of a connection and closes it after so many, so that is set to more than a run makes.
fn configuration(directory: &str, port: u16) -> String {
    let answer = "a".repeat(contender::answer_bytes());
    let paths: String = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .iter()
        .map(|name| format!("{name}_temp_path {directory}/{name};\n"))
        .collect();
    format!(
        "daemon off; master_process off; pid {directory}/pid; error_log {directory}/error.log;\n\
         events {{ worker_connections 4096; }}\n\
         http {{ access_log off; keepalive_requests 1000000000; http2_max_concurrent_streams 1024; default_type application/grpc;\n\
         {paths}\
         server {{ listen 127.0.0.1:{port} http2; location / {{ return 200 {answer}; }} }} }}\n"
    )
}
