//! How to come to a Redis whose address is known. Files are read again for each connection: whatever renews certificates and
//! passwords need not tell anybody.

use std::path::PathBuf;
use std::time::Duration;

use redis::AsyncConnectionConfig;
use redis::Client;
use redis::ClientTlsConfig;
use redis::ConnectionAddr;
use redis::ConnectionInfo;
use redis::IntoConnectionInfo;
use redis::TlsCertificates;
use redis::aio::MultiplexedConnection;

use crate::config;
use crate::store::link_error::LinkError;

/// Commands that may wait for the connection's driver.
const PIPELINE_BUFFER: usize = 1024;

/// Who asks to be let in.
#[derive(Clone, Copy)]
pub enum Login {
    Server,
    Sentinel,
}

pub async fn connect(client: &Client, limit: Duration) -> Result<MultiplexedConnection, LinkError> {
    let config = AsyncConnectionConfig::new()
        .set_connection_timeout(Some(limit))
        .set_response_timeout(Some(limit))
        .set_pipeline_buffer_size(PIPELINE_BUFFER);
    Ok(client.get_multiplexed_async_connection_with_config(&config).await?)
}

/// `node` is `host:port`.
pub fn client_at(redis: &config::Redis, node: &str, login: Login) -> Result<Client, LinkError> {
    let (host, port) = node.rsplit_once(':').ok_or(LinkError::Down)?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    open(redis, info(redis, host, port.parse().map_err(|_| LinkError::Down)?, login)?)
}

/// The one that the configuration names.
pub fn configured(redis: &config::Redis) -> Result<Client, LinkError> {
    match redis.read_url()? {
        Some(url) => open(redis, url.expose().into_connection_info()?),
        None => open(redis, info(redis, &redis.host, redis.port, Login::Server)?),
    }
}

fn open(redis: &config::Redis, info: ConnectionInfo) -> Result<Client, LinkError> {
    let tcp = info.tcp_settings().clone().set_nodelay(true).set_user_timeout(redis.timeout);
    let info = info.set_tcp_settings(tcp);
    if !matches!(info.addr(), ConnectionAddr::TcpTls { .. }) {
        return Ok(Client::open(info)?);
    }
    let read = |file: &Option<PathBuf>| file.as_ref().map(std::fs::read).transpose();
    let client_tls = match (read(&redis.cert_file)?, read(&redis.key_file)?) {
        (Some(client_cert), Some(client_key)) => Some(ClientTlsConfig { client_cert, client_key }),
        _ => None,
    };
    let root_cert = read(&redis.ca_file)?;
    Ok(Client::build_with_tls(info, TlsCertificates { client_tls, root_cert })?)
}

fn info(redis: &config::Redis, host: &str, port: u16, login: Login) -> Result<ConnectionInfo, LinkError> {
    let host = host.to_owned();
    let addr = match redis.tls {
        true => ConnectionAddr::TcpTls { host, port, insecure: false, tls_params: None },
        false => ConnectionAddr::Tcp(host, port),
    };
    let info = addr.into_connection_info()?;
    let (database, username, password) = match login {
        Login::Server => (redis.database, &redis.username, redis.read_password()?),
        Login::Sentinel => (0, &redis.sentinel_username, redis.read_sentinel_password()?),
    };
    let mut settings = info.redis_settings().clone().set_db(database.into());
    if let Some(username) = username {
        settings = settings.set_username(username);
    }
    if let Some(password) = password {
        settings = settings.set_password(password.expose());
    }
    Ok(info.set_redis_settings(settings))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_a_name_or_an_address_of_either_kind_with_or_without_brackets() {
        let config = crate::config::Config::from_text("im.toml", "[redis_cache]").expect("settings");
        let redis = config.redis_cache.expect("a cache").server;
        for (node, host) in [
            ("db-1.example:6380", "db-1.example"),
            ("10.0.0.1:6380", "10.0.0.1"),
            ("[fd00::1]:6380", "fd00::1"),
            ("fd00::1:6380", "fd00::1"), // as servers of a cluster and sentinels have it
        ] {
            let client = client_at(&redis, node, Login::Server).expect(node);
            assert_eq!(client.get_connection_info().addr(), &ConnectionAddr::Tcp(host.to_owned(), 6380));
        }
        for nonsense in ["db-1", "db-1:", "db-1:70000"] {
            assert!(client_at(&redis, nonsense, Login::Server).is_err(), "{nonsense}");
        }
    }
}
