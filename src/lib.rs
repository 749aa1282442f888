pub mod app;
pub mod config;
pub mod ctl;
pub mod pb;
pub mod telemetry;
