//! See the whole: what SQL says of all nodes ([`survey`]), what has happened ([`events`], which [`observer`] finds out), and
//! readings that many ask for at once ([`kept`]).

pub mod kept;
pub mod survey;
