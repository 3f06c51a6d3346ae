//! Version and commit of this gateway.

/// Version, as in `Cargo.toml`.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Commit that the gateway was built from, 12 digits; `unknown` outside a repository. A debug build
/// may be newer: it keeps the commit of its first build.
pub const COMMIT: &str = env!("SKEIN_COMMIT");

/// Version and commit, as `gateway --version` prints them.
pub const TEXT: &str = if cfg!(debug_assertions) {
    concat!(env!("CARGO_PKG_VERSION"), " (", env!("SKEIN_COMMIT"), " or later, debug)")
} else {
    concat!(env!("CARGO_PKG_VERSION"), " (", env!("SKEIN_COMMIT"), ")")
};
