# One profile for everything (--release) and the same flags everywhere, so that RocksDB is compiled once: 25 minutes of
# two cores. It is kept outside of the tree; ccache, where present, keeps it even when the target folder goes.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

export CARGO_TARGET_DIR ?= $(HOME)/.cache/mainstem/target
export PATH := $(PATH):$(HOME)/.cargo/bin

ifneq (,$(shell command -v ccache 2>/dev/null))
# Unless they were set from outside: `make` has defaults of its own.
ifeq ($(origin CC),default)
export CC := ccache gcc
endif
ifeq ($(origin CXX),default)
export CXX := ccache g++
endif
endif

MAINSTEM := $(CARGO_TARGET_DIR)/release/mainstem
ROUNDS ?= 100
SCHEDULES ?= 200
SEEDS ?= 500
FIGURE ?=

.PHONY: help deps build demo test check tidy fix bench torture clean-data

help: ## These lines
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

deps: ## Check what is needed, install what is missing (as root on Debian), else say what to install
	@deploy/deps.sh

# Always the whole workspace: a part of it would have other features of its dependencies, and RocksDB another build.
build: deps ## The server and command line, the benchmark, and the preload library of the tests
	cargo build --release --locked --workspace

demo: build ## The main job on a real file, with a kill -9 on the way
	@deploy/demo.sh "$(MAINSTEM)"

test: build ## Everything that must pass
	cargo test --release --locked --workspace --no-fail-fast

check: deps ## Formatting, lints, rules of the house, documentation; changes nothing
	cargo fmt --all --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings
	cargo test --release --locked --workspace --quiet --test tidy
	RUSTDOCFLAGS="-D warnings" cargo doc --release --locked --workspace --no-deps --document-private-items

tidy: ## Only the rules of the house
	cargo test --release --locked --workspace --test tidy

fix: ## Format, and apply what clippy can
	cargo fmt --all
	cargo clippy --release --workspace --all-targets --fix --allow-dirty --allow-staged
	cargo fmt --all

bench: build ## All figures, or one: make bench FIGURE=name
	"$(CARGO_TARGET_DIR)/release/mainstem-bench" $(if $(FIGURE),--figure "$(FIGURE)")

torture: build ## Crash rounds, fault schedules of clusters, simulated clusters: make torture ROUNDS=100 SCHEDULES=200 SEEDS=500 SEED=7
	ROUNDS=$(ROUNDS) $(if $(SEED),SEED=$(SEED)) cargo test --release --locked --workspace --test torture -- --nocapture --test-threads=1
	ROUNDS=$(ROUNDS) $(if $(SEED),SEED=$(SEED)) cargo test --release --locked --workspace --test accidents -- --nocapture
	ROUNDS=$(SCHEDULES) $(if $(SEED),SEED=$(SEED)) cargo test --release --locked --workspace --test cluster_faults -- random_schedules --include-ignored --nocapture
	SEEDS=$(SEEDS) $(if $(SEED),SEED=$(SEED)) cargo test --release --locked --workspace --test simulation -- --nocapture --test-threads=1

clean-data: ## Remove what demos and tests that were cut short left in the temporary directory
	rm -rf -- "$${TMPDIR:-/tmp}"/mainstem-demo.* "$${TMPDIR:-/tmp}"/mainstem-test-*
