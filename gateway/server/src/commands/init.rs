//! `gateway init`: a new configuration file.

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    process::ExitCode,
};

use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use clap::Args;
use gateway::config::{Config, DEFAULT_FILE, FreshSecrets};

/// Arguments of `init`.
#[derive(Args)]
pub(crate) struct InitArguments {
    /// File to write. It must not exist.
    #[arg(default_value = DEFAULT_FILE)]
    file: PathBuf,
}

/// Writes a commented configuration file with fresh secrets that only its owner can read.
pub(crate) fn run(InitArguments { file: path }: &InitArguments) -> ExitCode {
    let secrets = FreshSecrets {
        jwt_secret: URL_SAFE_NO_PAD.encode(rand::random::<[u8; 48]>()),
        api_key: URL_SAFE_NO_PAD.encode(rand::random::<[u8; 24]>()),
    };
    let write = || -> io::Result<()> {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(Config::template(&secrets).as_bytes())?;
        file.sync_all()
    };
    let shown = path.display();
    match write() {
        Ok(()) => {
            println!(
                "wrote {shown}, which only you can read: users need tokens, and there is an API \
                 key `admin`\nnext: gateway --config {shown}; gateway --config {shown} token --sub \
                 NAME"
            );
            ExitCode::SUCCESS
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            eprintln!("gateway: {shown} exists: move it away, or name another file");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("gateway: cannot write {shown}: {error}");
            ExitCode::FAILURE
        }
    }
}
