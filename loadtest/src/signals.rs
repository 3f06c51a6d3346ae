//! Signals that end a run early.

use tokio::signal::unix::{SignalKind, signal};

/// Completes on SIGINT (Ctrl-C) or SIGTERM. Cancel-safe.
pub(crate) async fn interrupted() {
    let (interrupt, terminate) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()));
    let (Ok(mut interrupt), Ok(mut terminate)) = (interrupt, terminate) else {
        // Without handlers the signals have their default effect.
        return std::future::pending().await;
    };
    // Both arms are cancel-safe.
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}
