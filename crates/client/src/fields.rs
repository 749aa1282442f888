//! What no node would take. A request that is kept until a node has answered it would never end if none could.
//!
//! The limits are those of the `.proto` files; a test of the daemon holds both against each other.

use std::net::IpAddr;

use im_presence_proto as pb;

/// Longest device id and connection id.
const MAX_NAME_BYTES: usize = 128;
/// Longest gateway address.
const MAX_ADDR_BYTES: usize = 255;
/// Longest text of a status.
const MAX_TEXT_BYTES: usize = 256;
/// How long a status may hold that ends by itself: 31 days.
const MAX_EXPIRE_S: u32 = 31 * 24 * 3_600;

/// Why nodes would refuse this bind. The gateway's address is not part of it.
pub fn check_bind(request: &pb::BindRouteReq) -> Result<(), String> {
    check_user(request.user_id)?;
    check_name("device_id", &request.device_id)?;
    check_name("conn_id", &request.conn_id)?;
    if pb::Platform::try_from(request.platform).is_err() {
        return Err(format!("platform must be one of the enum Platform, is {}", request.platform));
    }
    if !request.client_ip.is_empty() && request.client_ip.parse::<IpAddr>().is_err() {
        return Err("client_ip must be an IP address".to_owned());
    }
    if u16::try_from(request.client_port).is_err() {
        return Err(format!("client_port must be 0 to 65535, is {}", request.client_port));
    }
    Ok(())
}

/// Why nodes would refuse this unbind of a device.
pub fn check_unbind(request: &pb::UnbindRouteReq) -> Result<(), String> {
    check_user(request.user_id)?;
    check_name("device_id", &request.device_id)?;
    check_name("conn_id", &request.conn_id)?;
    check_addr("gateway_addr", &request.gateway_addr)
}

/// Why nodes would refuse this status.
pub fn check_status(request: &pb::SetStatusReq) -> Result<(), String> {
    check_user(request.user_id)?;
    check_name("device_id", &request.device_id)?;
    match pb::Status::try_from(request.status) {
        Ok(pb::Status::Offline) | Err(_) => {
            return Err(format!("status must be ONLINE, AWAY, BUSY, INVISIBLE or unset, is {}", request.status));
        }
        Ok(_) => {}
    }
    let text = request.text.as_deref().unwrap_or_default();
    if text.len() > MAX_TEXT_BYTES || text.chars().any(char::is_control) {
        return Err(format!("text must be 0 to {MAX_TEXT_BYTES} bytes without control characters"));
    }
    if request.expire_after_s > MAX_EXPIRE_S {
        return Err(format!("expire_after_s must be 0 to {MAX_EXPIRE_S}, is {}", request.expire_after_s));
    }
    let says_how = request.status != pb::Status::Unspecified as i32 || request.text.is_some();
    if !says_how && (request.idle.is_none() || request.expire_after_s > 0) {
        return Err("status or text must be given, or idle alone".to_owned());
    }
    Ok(())
}

/// A device id or a connection id; it may be empty.
pub fn check_name(field: &str, name: &str) -> Result<(), String> {
    check_ascii(field, name, 0, MAX_NAME_BYTES)
}

/// The address of a gateway.
pub fn check_addr(field: &str, addr: &str) -> Result<(), String> {
    check_ascii(field, addr, 1, MAX_ADDR_BYTES)
}

fn check_user(user_id: i64) -> Result<(), String> {
    if user_id > 0 { Ok(()) } else { Err(format!("user_id must be above 0, is {user_id}")) }
}

fn check_ascii(field: &str, text: &str, min: usize, max: usize) -> Result<(), String> {
    if text.len() < min || text.len() > max {
        return Err(format!("{field} must be {min} to {max} bytes, is {}", text.len()));
    }
    if !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("{field} must be printable ASCII without spaces"));
    }
    Ok(())
}
