//! Parts that the load generator and the tests of the gateway share: delivery checking, fault
//! injection and precise timers.

pub mod clock;
pub mod timeline;
pub mod checker;
pub mod proxy;
