//! Parts that the load generator and the tests of the gateway share: delivery checking, fault
//! injection, server processes and precise timers.

pub mod clock;
pub mod timeline;
pub mod checker;
pub mod proxy;
pub mod servers;
