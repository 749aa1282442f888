//! Which database server a connection leads to. An address is no answer: behind it may be a primary today and its replica
//! tomorrow, and a connection may outlive the change.

use std::fmt;

/// One server, as it names itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Server {
    /// What no two servers of a system share.
    name: String,
    /// It is a replica, or was made ready to become one.
    pub is_read_only: bool,
    /// The Galera cluster it is a member of: each has what the others have acknowledged.
    cluster: Option<String>,
}

/// What [`Server::of`] reads. Not every kind of server has each.
pub(super) const VARIABLES: &str = "'hostname', 'port', 'server_id', 'aurora_server_id', 'read_only', 'super_read_only', \
    'innodb_read_only', 'wsrep_on', 'wsrep_cluster_name'";
/// How long a name may be.
const MAX_NAME: usize = 255;

impl Server {
    /// From names and values of the server's variables.
    pub(super) fn of(variables: &[(String, String)]) -> Self {
        let value = |name: &str| variables.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value);
        let is_on = |name: &str| !matches!(value(name), "" | "OFF" | "0");
        let named = [value("hostname"), ":", value("port"), " (server_id ", value("server_id"), ")"].concat();
        let name = [&named, value("aurora_server_id")].into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(" ");
        let cluster = is_on("wsrep_on").then(|| format!("Galera cluster {}", value("wsrep_cluster_name")));
        let is_read_only = ["read_only", "super_read_only", "innodb_read_only"].into_iter().any(is_on);
        Self { name: ascii(&name), is_read_only, cluster: cluster.map(|cluster| ascii(&cluster)) }
    }

    pub fn is(&self, other: &Self) -> bool {
        self.name == other.name
    }

    pub fn is_in_galera(&self) -> bool {
        self.cluster.is_some()
    }

    /// Of whom nothing that was acknowledged can be missing: this server, or its Galera cluster.
    pub fn branch(&self) -> &str {
        self.cluster.as_deref().unwrap_or(&self.name)
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// The table takes nothing else.
fn ascii(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).take(MAX_NAME).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(variables: &[(&str, &str)]) -> Server {
        Server::of(&variables.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect::<Vec<_>>())
    }

    #[test]
    fn a_server_is_known_by_its_host_its_port_and_its_number() {
        let one = server(&[("hostname", "db-1"), ("port", "3306"), ("server_id", "1"), ("read_only", "OFF")]);
        assert_eq!((one.to_string().as_str(), one.is_read_only), ("db-1:3306 (server_id 1)", false));
        for other in [("hostname", "db-2"), ("port", "3307"), ("server_id", "2")] {
            let mut variables = vec![other, ("hostname", "db-1"), ("port", "3306"), ("server_id", "1")];
            assert!(!server(&variables).is(&one), "{other:?}");
            variables.remove(0);
            assert!(server(&variables).is(&one));
        }
        let aurora = server(&[("hostname", "ip-10"), ("port", "3306"), ("server_id", "1"), ("aurora_server_id", "db-1")]);
        assert_eq!(aurora.to_string(), "ip-10:3306 (server_id 1) db-1");
    }

    #[test]
    fn each_kind_of_server_says_in_its_own_way_that_it_takes_no_writes() {
        for read_only in [("read_only", "ON"), ("read_only", "NO_LOCK"), ("super_read_only", "ON"), ("innodb_read_only", "1")] {
            assert!(server(&[("read_only", "OFF"), read_only][1..]).is_read_only, "{read_only:?}");
        }
        assert!(!server(&[("read_only", "OFF"), ("super_read_only", "OFF"), ("innodb_read_only", "0")]).is_read_only);
    }

    #[test]
    fn members_of_a_galera_cluster_are_servers_of_one_branch() {
        let member = |host| server(&[("hostname", host), ("wsrep_on", "ON"), ("wsrep_cluster_name", "im")]);
        assert!(!member("db-1").is(&member("db-2")));
        assert_eq!(member("db-1").branch(), member("db-2").branch());
        let alone = |host| server(&[("hostname", host), ("wsrep_on", "OFF"), ("wsrep_cluster_name", "im")]);
        assert_ne!(alone("db-1").branch(), alone("db-2").branch());
    }
}
