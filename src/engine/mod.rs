//! The product: one write path ([`lanes`]), one read path ([`directory`]), and what keeps the two consistent ([`cache`]).
//!
//! Order of the files, each importing only those before it: `cache`, `lives`, `loader`, `directory`, `lane`, `lanes`, `expiry`.

pub mod cache;
pub mod directory;
pub mod expiry;
mod lane;
pub mod lanes;
pub mod lives;
pub mod loader;
