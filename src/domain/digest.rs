//! What a gateway and the database believe to be bound, as one number each: if the numbers are equal, so are the beliefs.

use ring::digest::Context;
use ring::digest::SHA256;

use crate::domain::id::ConnId;
use crate::domain::id::DeviceId;
use crate::domain::id::UserId;

/// A connection's part in a digest: the first 8 bytes of SHA-256 of `<user_id>/<device_id>/<conn_id>`, which any language has at
/// hand. Parts are joined by XOR.
pub fn element(user: UserId, device: &DeviceId, conn: &ConnId) -> u64 {
    let mut hash = Context::new(&SHA256);
    hash.update(format!("{user}/{device}/{conn}").as_bytes());
    hash.finish().as_ref().iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_element_is_what_other_languages_compute() {
        let (device, conn) = (DeviceId::parse("phone").unwrap(), ConnId::parse("c-1").unwrap());
        // python3 -c 'import hashlib; print(hashlib.sha256(b"7/phone/c-1").hexdigest()[:16])'
        assert_eq!(format!("{:016x}", element(UserId::parse(7).unwrap(), &device, &conn)), "8efa2907bdda15e9");
    }
}
