# `make run` tells the story on this machine; `make test` proves it. Both install what is missing, and say what.

PREFIX ?= $(HOME)/.local
BIN := target/x86_64-unknown-linux-gnu/debug
# Only the lab needs root, for network namespaces; cargo does not.
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Lets cargo-nextest run the lab's tests with root's rights where it has none itself.
RUNNER := $(if $(SUDO),CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="sudo --preserve-env")

.PHONY: run lab lab-matrix sim fuzz stop web clean-lab test lint bench bench-mesh bench-vm install deps build help

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

run: deps build  ## two people, two computers, one clan; Ctrl-C ends it
	@$(SUDO) $(BIN)/clan-lab run

lab: deps build  ## five computers without virtual machines, behind routers; a table of how fast; Ctrl-C ends it
	@$(SUDO) $(BIN)/clan-lab five

lab-matrix: deps build  ## every kind of router against every other, twice; writes docs/reachability.md
	@$(SUDO) $(BIN)/clan-lab --prefix clan-matrix matrix --out docs/reachability.md

stop:  ## end what `make run` and `make lab` started, whatever state it is in
	@if [ -x $(BIN)/clan-lab ]; then $(SUDO) $(BIN)/clan-lab stop; else echo 'Nothing was built, so nothing runs.'; fi

web:  ## print a fresh link to the founder's web page
	@$(SUDO) $(BIN)/clan-lab web

clean-lab:  ## stop, and remove the lab's images, caches and logs too
	@$(SUDO) $(BIN)/clan-lab clean
	@$(SUDO) rm -rf "$$($(SUDO) $(BIN)/clan-lab where)-test"

test: deps build  ## dependency rules, formatting, lints, unit and property tests, the story with real VMs
	cargo xtask check-deps
	cargo xtask check-docs
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	cargo nextest run --workspace --locked
	$(RUNNER) cargo nextest run --workspace --locked --profile e2e

lint:  ## formatting, lints, dependency rules, licences and advisories
	cargo xtask check-deps
	cargo xtask check-docs
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings
	@if command -v cargo-deny >/dev/null; then cargo deny check; \
	else echo 'Licences and advisories were NOT checked: there is no cargo-deny (cargo install --locked cargo-deny).'; fi

SEEDS ?= 2000
SECONDS ?= 600

sim:  ## simulate clans in which everything goes wrong: SEEDS=2000 or SEEDS=5000..6000, then one of 200 machines
	cargo run --release --locked --package clan-sim -- --seeds $(SEEDS)
	cargo run --release --locked --package clan-sim -- --seed 1 --machines 200

fuzz:  ## throw garbage at everything that strangers can reach, SECONDS=600 each
	@./scripts/fuzz $(SECONDS)

bench:  ## measure the ledger; numbers are kept in target/bench
	cargo run --release --locked --package xtask -- bench

bench-mesh: deps  ## measure the mesh beside its rivals (10 min); ARGS="--rounds 1 --only cable,clan,wireguard-go"
	@./scripts/rivals target/rivals
	cargo build --release --locked --package clan-lab --package clan-cli
	@$(SUDO) $(BIN:debug=release)/clan-lab --prefix clan-mesh bench-mesh $(ARGS)

bench-vm: deps  ## measure VMs beside a plain Debian (20 min); ARGS="--rounds 2"
	@$(SUDO) ./scripts/plain-debian target/plain-debian
	cargo build --release --locked --package clan-lab --package clan-cli --package clan-agent
	@$(SUDO) $(BIN:debug=release)/clan-lab --prefix clan-vms bench-vm $(ARGS)

install: deps  ## build with optimisation and install to PREFIX (~/.local)
	cargo build --release --locked --package clan-cli --package clan-agent
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(BIN:debug=release)/clan $(BIN:debug=release)/clan-agent

deps:  ## install what building, running and testing needs
	@./scripts/deps

build:
	cargo build --workspace --bins --locked
