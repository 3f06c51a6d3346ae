#!/bin/sh
# Builds the gateway for a release, into dist/: the binary, its debug information beside it, and their checksums.
#
# Usage: package.sh [TARGET]; TARGET is a Rust target such as x86_64-unknown-linux-musl (static), by default this
# machine's. Needs `rustup target add TARGET`, and for musl a C compiler for it (Debian: musl-tools).
#
# dist/gateway keeps the names of functions, and the place of a panic is part of its message. dist/gateway.debug has the
# line numbers of backtraces: gdb, perf and RUST_BACKTRACE=1 find it if it lies beside the binary.
set -eu
cd "$(dirname "$0")/.."

target=${1:-}
directory=${CARGO_TARGET_DIR:-target}
SKEIN_COMMIT=${SKEIN_COMMIT:-$(git rev-parse HEAD 2> /dev/null || true)}
export SKEIN_COMMIT
case $target in
'') built=$directory/release/gateway ;;
*[!a-z0-9_-]*) echo "package.sh: '$target' is not a target" >&2; exit 2 ;;
*) built=$directory/$target/release/gateway ;;
esac

# The gateway is built alone: together with other packages it would have their features.
cargo build --locked --release -p gateway ${target:+--target "$target"}
mkdir -p dist
objcopy --only-keep-debug "$built" dist/gateway.debug
# The link names the file without its directory.
cp "$built" dist/gateway
(cd dist && objcopy --strip-debug --add-gnu-debuglink=gateway.debug gateway)
(cd dist && sha256sum gateway gateway.debug > SHA256SUMS)
ls -l dist
