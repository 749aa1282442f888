//! Which node is a user's: the same for every caller that knows the same nodes. A node that comes or goes moves only the users
//! that it takes or leaves.

/// The nodes, by their place in the list, in the order in which a user's calls try them.
pub fn order<'a>(user: i64, nodes: impl Iterator<Item = &'a str>) -> Vec<usize> {
    let mut ranked: Vec<(u64, usize)> = nodes.enumerate().map(|(place, addr)| (rank(user, addr), place)).collect();
    ranked.sort_unstable_by(|one, other| other.cmp(one));
    ranked.into_iter().map(|(_, place)| place).collect()
}

/// How much a user is drawn to a node: FNV-1a of its address, mixed with the user.
fn rank(user: i64, addr: &str) -> u64 {
    let hashed =
        addr.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    mixed(hashed ^ mixed(user.cast_unsigned()))
}

/// Spreads a number over all 64 bits.
fn mixed(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    const USERS: i64 = 100_000;

    fn homes(nodes: &[&str]) -> Vec<String> {
        (1..=USERS).map(|user| nodes[order(user, nodes.iter().copied())[0]].to_owned()).collect()
    }

    #[test]
    fn a_node_that_comes_or_goes_moves_only_its_own_part_of_the_users() {
        let all = ["n-1:6000", "n-2:6000", "n-3:6000", "n-4:6000", "n-5:6000"];
        let (five, four) = (homes(&all), homes(&all[..4]));
        let part = USERS as usize / 5;
        for node in all {
            let users = five.iter().filter(|home| *home == node).count();
            assert!(users.abs_diff(part) < part / 20, "{node}: {users} of about {part}");
        }
        for (before, after) in five.iter().zip(&four).filter(|(before, after)| before != after) {
            assert_eq!(before, "n-5:6000", "a user went from {before} to {after}, and both are there");
        }
    }

    #[test]
    fn the_order_of_the_list_does_not_matter() {
        let home = |nodes: [&'static str; 3]| nodes[order(42, nodes.into_iter())[0]];
        assert_eq!(home(["a:1", "b:1", "c:1"]), home(["c:1", "a:1", "b:1"]));
    }
}
