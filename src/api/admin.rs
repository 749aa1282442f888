//! `AdminService`: for operators, on the admin port. Every call answers UNIMPLEMENTED yet.

use crate::pb::admin_service_server::AdminService;

pub struct Admin;

impl AdminService for Admin {}
