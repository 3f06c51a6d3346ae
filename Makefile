# The commands of this project. CI calls nothing else.

.PHONY: help setup run build check test test-long test-full test-versions faults soak abuse sim sim-long sim-injected loadtest-injected fuzz fmt lint doc deny ci cluster bench bench-micro
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: ## install what the tests need (Debian packages, as root or with sudo)
	@deploy/setup.sh
	@deploy/schemathesis.sh
	@deploy/openapi-clients.sh
	@deploy/stack-tools.sh

run: ## one node on http://127.0.0.1:8080/ that needs nothing else
	cargo run --release -p gateway

# Each test target builds the whole workspace: a selection of packages would have other features,
# and be built once more.
CARGO_TEST := cargo test --locked --workspace
IT := $(CARGO_TEST) --test it --
SIM := $(CARGO_TEST) --test sim --

build: ## everything the tests start
	cargo build --locked --workspace --bins --examples

# The integration tests that need neither a Redis nor another program, on the backend in memory.
IN_MEMORY := api:: auth:: bus:: chat:: command_line:: directs:: docs:: hub:: managed:: presence:: reload::alone sse:: tidy::
# Most integration tests wait for other processes, so that many run at a time. Those that measure
# rates and times are run with as many as there are processors.
TEST_THREADS ?= 12
# At full length the trials load the machine more.
FAULTS_THREADS ?= 4
MEASURED := loadtest::

check: lint ## in 2 minutes: format, lints, unit tests, conformance in memory, 50 simulations
	$(CARGO_TEST) --lib --bins
	SKEIN_BACKENDS=memory $(IT) --test-threads $(TEST_THREADS) $(IN_MEMORY) --skip faults::
	SKEIN_SIM_SEEDS=50 $(SIM) promises_hold

test: setup lint build ## in 8 minutes: everything a change needs, with a real Redis, nginx and browser
	$(CARGO_TEST) --lib --bins
	$(SIM)
	$(IT) --test-threads $(TEST_THREADS) $(MEASURED:%=--skip %)
	$(IT) $(MEASURED)

test-full: test test-long ## in 40 minutes: all of it; make soak and make abuse take longer

# The part of `make test-full` beyond `make test`.
test-long: setup build doc deny sim-long
	SKEIN_FAULTS=full $(IT) --test-threads $(FAULTS_THREADS) --nocapture faults::
	$(IT) --test-threads 1 --nocapture --ignored injected:: versions:: monitoring::
	cargo build --locked --release -p gateway
	SKEIN_GATEWAY=$(CURDIR)/target/release/gateway $(IT) --test-threads 1 --nocapture --ignored release:: soak::
	SKEIN_GATEWAY=$(CURDIR)/target/release/gateway SKEIN_FAULTS=full $(IT) --nocapture loadtest::chaos_on

# Decided by its seeds alone, so that CI can run it on any machine.
sim-long: ## 2,000 simulations, and injected faults that they must find
	SKEIN_SIM_SEEDS=2000 $(SIM) --include-ignored --nocapture promises_hold injected::

faults: setup build ## the trials of docs/faults.md at full length
	SKEIN_FAULTS=full $(IT) --test-threads $(FAULTS_THREADS) --nocapture faults::

test-versions: setup build ## this version and the one before in one cluster, rolled forward and back under traffic
	$(IT) --test-threads 1 --nocapture --ignored versions::

soak: setup ## a million connections come and go, 15,000 leave at once; some 15 minutes
	cargo build --locked --release -p gateway
	SKEIN_GATEWAY=$(CURDIR)/target/release/gateway SKEIN_SOAK=full $(IT) --test-threads 1 --nocapture --include-ignored soak::

# The gateway is built alone: together with other packages it would have their features.
ATTACKS ?=
abuse: setup ## every attack of loadtest abuse, some 40 minutes; make abuse ATTACKS="a1 slow-link"
	cargo build --locked --release -p gateway
	cargo build --locked --release -p loadtest --bin loadtest
	target/release/loadtest abuse --html target/abuse.html $(ATTACKS)
	target/release/loadtest abuse --redis-maxmemory 64mb --seconds 30 --html target/abuse-64mb.html b

SEEDS ?= 10000
sim: ## the cluster under simulated faults: make sim SEEDS=10000
	SKEIN_SIM_SEEDS=$(SEEDS) cargo test --locked --profile sim --workspace --test sim -- --nocapture

sim-injected: ## the simulation finds each injected fault
	cargo test --locked --profile sim --workspace --test sim -- --ignored --nocapture injected::

loadtest-injected: setup build ## loadtest finds each injected fault, and none in twenty runs without one
	SKEIN_INJECTED=full $(IT) --test-threads 1 --include-ignored --nocapture injected::

N ?= 10000000
fuzz: ## mutated input for the parsers of what clients send: make fuzz N=100000000
	SKEIN_FUZZ=$(N) cargo test --locked --profile sim --workspace --lib -- --nocapture fuzz

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

ci: test doc deny sim-long ## the gate

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
