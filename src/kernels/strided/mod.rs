//! Distributions side by side: lanes run along rows or inner positions.
//!
//! For logits whose classes are not contiguous (`[N, C, d1..dk]`, a transposed matrix), and for rows so
//! short that lanes along classes would mostly be empty. Every lane has its own shift and sums, so nothing
//! is ever added across lanes, and a row's bits do not depend on its neighbours.
//!
//! Losses over class indices without further options go in [*strips*](strip) of up to 256 distributions,
//! with one sweep. Everything else goes in *tiles* of up to 64:
//!
//! ```text
//! for each chunk of 32 classes, which stays in the first level of cache:
//!     for each register of distributions:
//!         max over the classes                   first pass
//!         shift = integer nearest to L·max, if that is above the old one
//!         sum += Σ 2^(L·x - shift)               second pass, compensated: with so few terms every
//!                                                rounding would show, and over so many chunks the
//!                                                roundings would add up
//! gradient: 2^(L·x - shift)·factor - bias, lane by lane
//! ```
//!
//! The sums exclude the target's class, as in contiguous/. Where distributions lie side by side in
//! memory, in the lanes' own type, tiles are read and written in place. Everything else (halves, logits to
//! be scaled or capped, narrow rows, which are transposed) goes through a buffer of 32 classes.

pub mod gradient;
pub mod reduce;
pub mod row;
pub mod strip;
pub mod tile;
pub mod transpose;
