//! `gateway healthcheck`: for images without curl.

use std::{net::SocketAddr, process::ExitCode, time::Duration};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// Requests `/ready` of the gateway whose admin listener has this address.
pub(crate) async fn run(admin: SocketAddr) -> ExitCode {
    let ask = async {
        let mut socket = TcpStream::connect(admin).await?;
        let request = "GET /ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
        socket.write_all(request.as_bytes()).await?;
        let mut response = String::new();
        socket.read_to_string(&mut response).await?;
        std::io::Result::Ok(response)
    };
    match tokio::time::timeout(Duration::from_secs(2), ask).await {
        Ok(Ok(response)) if response.starts_with("HTTP/1.1 200") => ExitCode::SUCCESS,
        Ok(Ok(response)) => {
            eprintln!("not ready: {}", response.lines().last().unwrap_or_default());
            ExitCode::FAILURE
        }
        Ok(Err(error)) => {
            eprintln!("not ready: {admin}: {error}");
            ExitCode::FAILURE
        }
        Err(_) => {
            eprintln!("not ready: {admin}: no response within 2 s");
            ExitCode::FAILURE
        }
    }
}
