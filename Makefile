# Verbs only; what they do stands in rootfs/, tests/ and the crates. `make help` lists them.
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
PREFIX ?= /usr
CMD ?= crictl version
FUZZ_SECONDS ?= 60
FLAVOUR ?= default
TARGET = $(or $(CARGO_TARGET_DIR),target)
CACHE = $(or $(PERICARP_CACHE),$(HOME)/.cache/pericarp)
VIRTIOFSD = $(firstword $(wildcard $(CACHE)/node/virtiofsd-*/virtiofsd))
NODE = cargo run --quiet --package pericarp-tests --bin node --

.PHONY: help
help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

.PHONY: packages
packages: ## install the Debian packages that building and testing need
	tests/setup

.PHONY: build
build: ## build shim, VMM and command for this machine
	cargo build --release --package containerd-shim-pericarp-v2 --package pericarp-vmm --package pericarp

.PHONY: kernel
kernel: ## build the guest kernel (FLAVOUR=passthrough adds drivers of passed-through devices)
	FLAVOUR=$(FLAVOUR) rootfs/kernel/build

.PHONY: guest-image
guest-image: ## compile the agent and make the guest image
	rootfs/image/build

.PHONY: test
test: packages ## install what is missing, build all, run every test
	tests/run all

.PHONY: check
check: ## format, clippy, tidy and unit tests: no root, no guest, minutes
	tests/run check

.PHONY: fuzz
fuzz: ## look for bytes that break a parser: FUZZ_SECONDS=60 of each target, or of TARGETS='...'
	tests/fuzz/run $(FUZZ_SECONDS) $(TARGETS)

.PHONY: node-deps
node-deps: ## build or install the components of the test node at their pinned versions
	$(NODE) deps

.PHONY: node-run
node-run: ## run CMD='...' in a fresh test node with containerd up
	$(NODE) run '$(CMD)'

.PHONY: node-shell
node-shell: ## an interactive shell in a fresh test node
	$(NODE) shell

.PHONY: kube-run
kube-run: ## run CMD='...' in a fresh test node with a Kubernetes API server and kubelet up
	$(NODE) kube-run '$(CMD)'

.PHONY: critest
critest: ## run the CRI conformance tests in a test node
	$(NODE) critest

.PHONY: bench
bench: ## measure what SPEC.md promises, beside runc
	$(NODE) bench

.PHONY: kubernetes
kubernetes: ## run a pod for each thing that a pod may ask of Kubernetes, and write docs/kubernetes.md
	$(NODE) kubernetes --memory 7168 --table docs/kubernetes.md

.PHONY: demo
demo: packages kernel guest-image build ## a pod in its own VM, step by step, in a test node
	$(NODE) demo

.PHONY: install
install: ## copy what was built to DESTDIR/PREFIX (PREFIX=/usr)
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/bin $(TARGET)/release/containerd-shim-pericarp-v2 $(TARGET)/release/pericarp
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/libexec/pericarp $(TARGET)/release/pericarp-vmm
	install -D -m 755 -t $(DESTDIR)$(PREFIX)/libexec/pericarp $(VIRTIOFSD)
	install -D -m 644 -t $(DESTDIR)$(PREFIX)/share/pericarp $(CACHE)/guest/vmlinux $(CACHE)/guest/guest.erofs
	cp -R deploy $(DESTDIR)$(PREFIX)/share/pericarp/

.PHONY: clean
clean: ## remove build outputs of the checkout
	cargo clean
	rm -rf out

.PHONY: clean-cache
clean-cache: ## remove built kernels, node components and logs outside the checkout
	rm -rf $(CACHE)
