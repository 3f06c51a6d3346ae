# The commands of this project. CI calls nothing else.

.PHONY: help setup run build check test test-full test-long injected faults soak abuse sim sim-injected loadtest-injected fuzz fmt lint doc deny ci cluster bench bench-micro
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## install what the tests need (Debian packages, as root or with sudo)
	@deploy/setup.sh
	@deploy/schemathesis.sh
	@deploy/openapi-clients.sh

run: ## one node on http://127.0.0.1:8080/ that needs nothing else
	cargo run --release -p gateway

# Always the whole workspace: a part of it would have other features, and be built once more.
build: ## everything the tests start
	cargo build --locked --workspace --bins --examples

check: lint ## the quick tier, some 2 minutes warm: lints, unit tests, one node, 50 seeds
	cargo test --locked --workspace --lib --bins
	SKEIN_SIM_SEEDS=50 cargo test --locked --workspace --test sim
	cargo test --locked --workspace --test it -- --test-threads 8 tidy:: docs:: hub:: rfc:: chat::

# Most trials wait: for leases, time-outs and other processes. Those that measure, or load the
# machine, come last and few at a time.
ALONE := soak:: loadtest::
test: setup build ## all tests, against a real Redis, nginx and browser, some 8 minutes warm
	cargo test --locked --workspace --lib --bins
	cargo test --locked --workspace --test sim
	cargo test --locked --workspace --test it -- --test-threads 12 $(addprefix --skip ,$(ALONE))
	cargo test --locked --workspace --test it -- --test-threads 2 $(ALONE)

test-full: test test-long ## all tiers, some 40 minutes

test-long: setup build injected faults ## what test-full has beyond test
	$(MAKE) sim sim-injected SEEDS=2000

injected: setup build ## loadtest finds each fault that is injected into a gateway
	cargo test --locked --workspace --test it injected:: -- --include-ignored

faults: setup build ## the trials of docs/faults.md at full length, some 15 minutes
	SKEIN_FAULTS=full cargo test --locked --workspace --test it faults:: -- --nocapture

soak: setup ## a million connections come and go, 15,000 leave at once; some 15 minutes
	cargo build --locked --release -p gateway
	SKEIN_GATEWAY=$(CURDIR)/target/release/gateway SKEIN_SOAK=full \
		cargo test --locked --workspace --test it soak:: -- --nocapture --test-threads 1

# The gateway is built alone: together with other packages it would have their features.
ATTACKS ?=
abuse: setup ## every attack of loadtest abuse, some 40 minutes; make abuse ATTACKS="a1 slow-link"
	cargo build --locked --release -p gateway
	cargo build --locked --release -p loadtest --bin loadtest
	target/release/loadtest abuse --html target/abuse.html $(ATTACKS)
	target/release/loadtest abuse --redis-maxmemory 64mb --seconds 30 --html target/abuse-64mb.html b

SEEDS ?= 10000
sim: ## the cluster under simulated faults: make sim SEEDS=10000
	SKEIN_SIM_SEEDS=$(SEEDS) cargo test --locked --profile sim -p gateway --test sim -- --nocapture

sim-injected: ## the simulation finds each injected fault
	cargo test --locked --profile sim -p gateway --test sim injected:: -- --include-ignored --nocapture

loadtest-injected: setup build ## loadtest finds each injected fault, and none in twenty runs without one
	SKEIN_INJECTED=full cargo test --locked --workspace --test it injected:: -- --include-ignored --nocapture

N ?= 10000000
fuzz: ## mutated input for the parsers of what clients send: make fuzz N=100000000
	SKEIN_FUZZ=$(N) cargo test --locked --profile sim -p skein-protocol -p skein-websocket fuzz -- --nocapture

fmt: ## format
	cargo fmt --all

lint: ## format and lints, as CI wants them
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

doc: ## the documentation of the code
	RUSTDOCFLAGS="-D warnings" cargo doc --locked --workspace --no-deps

deny: ## licences, sources and unused dependencies
	@command -v cargo-deny > /dev/null || cargo install --locked cargo-deny@0.20.2
	@command -v cargo-machete > /dev/null || cargo install --locked cargo-machete@0.9.2
	cargo deny check bans licenses sources
	cargo machete

ci: setup lint doc test deny ## the gate

cluster: ## Redis, three gateways and nginx as processes of this machine
	@deploy/setup.sh redis-server nginx
	cargo build --release -p gateway
	@deploy/cluster.sh

# The gateway is built alone: together with examples and tests it would have their features.
ROWS ?=
bench: ## speed and size beside a baseline and a naive chat, some 10 minutes; make bench ROWS="fanout idle"
	@deploy/setup.sh redis-server
	cargo build --locked --release -p gateway
	cargo build --locked --release -p loadtest --bins --examples
	target/release/loadtest bench --json target/bench.json $(ROWS)

bench-micro: ## encode, decode, fan-out in memory
	cargo bench --locked -p skein-core --bench codec --bench fan_out
