//! See the whole: what SQL says of all nodes ([`survey`]), what has happened ([`events`], which [`observer`] finds out), what is
//! wrong ([`doctor`]), and readings that many ask for at once ([`kept`]).

pub mod check;
pub mod doctor;
pub mod events;
pub mod kept;
pub mod observer;
pub mod survey;
