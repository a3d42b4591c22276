# Coracle: every way to build, try and check it. `make` alone lists the targets.
CARGO ?= cargo
PREFIX ?= /usr/local
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
STATIC := -C target-feature=+crt-static
# Of its own profile, and at a fixed address: the less there is to load and relocate, the quicker a container starts.
CORUN := rustc --profile corun -p coracle-runtime --bin corun -- $(STATIC) -C relocation-model=static

.DEFAULT_GOAL := help
.PHONY: help build demo test unit lint fuzz-smoke bench install clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

build: ## Build coracle, corun and the example program, optimised
	$(CARGO) build --release -p coracle
	$(CARGO) $(CORUN)
	$(CARGO) rustc --release -p coracle-hello --bin hello -- $(STATIC)

demo: ## Install what is missing, build, and show a Deployment behind a Service on this host
	examples/demo.sh

test: ## Run every test (as root; installs the programs it needs)
	$(CARGO) test --workspace --no-fail-fast
	fuzz/smoke.sh

unit: ## Run the unit tests alone
	$(CARGO) test --workspace --lib --bins

lint: ## Check format, lints, licences and duplicate versions
	$(CARGO) fmt --all -- --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings
	$(CARGO) test -p coracle-testkit --test dependencies

fuzz-smoke: ## Run every fuzz target for a short time from its corpus
	fuzz/smoke.sh

bench: ## Measure us and the peers found on this host, interleaved
	$(CARGO) build --release -p coracle -p coracle-bench
	$(CARGO) $(CORUN)
	$(CARGO) rustc --release -p coracle-bench --bin floor -- $(STATIC)
	$(TARGET_DIR)/release/coracle-bench --corun $(TARGET_DIR)/corun/corun all

install: build ## Install coracle and corun under PREFIX (/usr/local)
	install -D -m 0755 $(TARGET_DIR)/release/coracle $(PREFIX)/bin/coracle
	install -D -m 0755 $(TARGET_DIR)/corun/corun $(PREFIX)/bin/corun

clean: ## Remove what was built
	$(CARGO) clean
