# `make help` lists the targets. Everything that is built or downloaded goes to out/.
#
# Settings, as variables of make or of the environment:
#   RXVISION_ORT_LIBRARY=/path/to/libonnxruntime.so   your own ONNX Runtime; nothing is downloaded then
#   PKG=./oip/...                                      only these packages, for test, fuzz and bench
#   TESTFLAGS, TEST_TIMEOUT, FUZZTIME, BENCHFLAGS      passed to go test

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help

export RXVISION_ORT_LIBRARY ?= $(CURDIR)/out/lib/libonnxruntime.so.1

TEST_TIMEOUT ?= 20m
PKG ?= ./...
FUZZTIME ?= 20s
# What the tests need of Debian: race detector and cgo a C compiler.
TEST_PACKAGES := gcc libc6-dev
MODEL_PACKAGES := python3-torch python3-onnx python3-pil dataset-fashion-mnist libopenblas0-pthread

##@ Use
.PHONY: help
help: ## list the targets
	@awk 'BEGIN { FS = ":.*## " } \
	  /^##@ / { printf "\n%s\n", substr($$0, 5) } \
	  /^[a-z][a-zA-Z %-]*:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: run
run: build ort ## build, get ONNX Runtime and start the whole platform with a demonstration; Ctrl-C ends it
	@exec out/bin/rxvision dev --demo $(RUNFLAGS)

.PHONY: build
build: ## build out/bin/rxvision
	@tools/compile.sh out/bin/rxvision ./cmd/rxvision

##@ Check
# The tests find the pinned nomad on PATH and the program in out/bin.
with_nomad = nomad=$$(tools/server.sh nomad out/tools | tail -n 1) && export PATH="$${nomad%/*}:$$PATH"

.PHONY: test
test: debian build ort nomad out/tools/testreport ## run all tests with the race detector; gets what it needs by itself
	@go list -deps -test $(PKG) >/dev/null
	go vet $(PKG)
	cd tools/testreport && go vet . && go test .
	@$(with_nomad); set -x; go test -race -timeout $(TEST_TIMEOUT) $(TESTFLAGS) -json $(PKG) | out/tools/testreport -skips testdata/skips.txt
ifeq ($(PKG),./...)
	@# What the race detector cannot take: virtual time (golang.org/issue/78156), and raft where a server moves.
	@set -x; go test -timeout $(TEST_TIMEOUT) -json ./fleet | out/tools/testreport -skips testdata/skips.txt
	@set -x; go test -timeout $(TEST_TIMEOUT) -run TestRestartOfAll -json ./raftstore | out/tools/testreport -skips testdata/skips.txt
endif

.PHONY: test-long
test-long: export RXVISION_TEST_LONG := 1
test-long: TEST_TIMEOUT := 2h
test-long: test sim-planted ## the same with the long form of each test that has one

.PHONY: chaos
CHAOS_FOR ?= 30m
CHAOS_SEED ?= 0
chaos: build ## harm three servers in every way for CHAOS_FOR (30m); CHAOS_SEED repeats a run's faults
	go test -race -count=1 -timeout 24h ./e2e -run '^TestChaos$$' -v -chaos.duration $(CHAOS_FOR) -chaos.seed $(CHAOS_SEED) -chaos.clock

.PHONY: sim
sim: build ## simulate regions with faults, one seed after the other; SIMFLAGS="--seed 7 --duration 5m"
	@out/bin/rxvision sim $(SIMFLAGS)

.PHONY: sim-planted
sim-planted: ## plant a bug in the rules; the simulator must find it within 5 minutes
	go test -tags simbug -run TestPlanted -v ./sim

.PHONY: lint
lint: out/tools/golangci-lint ## check the code with golangci-lint, built from tools/lint
	out/tools/golangci-lint run ./...

.PHONY: fmt
fmt: out/tools/golangci-lint ## format the code as lint wants it
	out/tools/golangci-lint fmt ./...

.PHONY: fuzz
fuzz: ## run each fuzz target for FUZZTIME (20s)
	tools/fuzz.sh $(FUZZTIME) $(PKG)

.PHONY: bench
bench: bench-serve bench-control bench-sched ## run all benchmarks of the platform; figures go to out/bench/*.json

.PHONY: bench-serve
bench-serve: build ort ## requests/s and latency through gateway and worker, beside ONNX Runtime alone
	@out/bin/rxvision bench serve --commit "$$(git rev-parse --short HEAD)" --out out/bench/serve.json $(BENCHFLAGS)

.PHONY: bench-control
bench-control: build ort nomad ## writes, failover and a large state on three servers, beside the real nomad
	@$(with_nomad); out/bin/rxvision bench control --nomad "$$(command -v nomad)" --commit "$$(git rev-parse --short HEAD)" --out out/bench/control.json $(BENCHFLAGS)

.PHONY: bench-sched
bench-sched: build ## jobs placed per second through the API, Raft and the agents' streams
	@out/bin/rxvision bench sched --commit "$$(git rev-parse --short HEAD)" --out out/bench/sched.json $(BENCHFLAGS)

.PHONY: bench-place
TRACE ?=
bench-place: build ## GPU allocation on a production trace, beside what was published (TRACE=folder with its lists)
	@test -n "$(TRACE)" || { echo 'say where the trace lies: make bench-place TRACE=DIR (github.com/alibaba/clusterdata, cluster-trace-gpu-v2023/csv)'; exit 2; }
	@out/bin/rxvision bench place --data "$(TRACE)" --commit "$$(git rev-parse --short HEAD)" --out out/bench/place.json $(BENCHFLAGS)

.PHONY: bench-day
bench-day: build ## a day of a production trace in virtual time: waits, preemption, tenants (TRACE=folder with its lists)
	@test -n "$(TRACE)" || { echo 'say where the trace lies: make bench-day TRACE=DIR (github.com/alibaba/clusterdata, cluster-trace-gpu-v2023/csv)'; exit 2; }
	@out/bin/rxvision bench day --data "$(TRACE)" --commit "$$(git rev-parse --short HEAD)" --out out/bench/day.json --plot out/bench/day.svg $(BENCHFLAGS)

.PHONY: bench-go
bench-go: ## run the benchmarks inside the packages
	@mkdir -p out/bench
	@go test -run '^$$' -bench . -benchmem -timeout 60m $(BENCHFLAGS) $(PKG) | awk '!/^(PASS|ok|\?) *\t?/' | tee out/bench/go.txt

##@ Make
.PHONY: model
model: ## train the sample model again, with Debian's torch
	@tools/debian.sh $(MODEL_PACKAGES)
	/usr/bin/python3 -B models/fashion/train.py

.PHONY: proto
proto: ## generate the Go code of every .proto file again
	@cd tools/proto && go build -o ../../out/tools/ . google.golang.org/protobuf/cmd/protoc-gen-go google.golang.org/grpc/cmd/protoc-gen-go-grpc
	@out/tools/proto -root . -plugins out/tools

##@ Get
.PHONY: ort
ort: ## get the pinned ONNX Runtime library into out/lib
	@tools/onnxruntime/get.sh out/lib

.PHONY: nomad
nomad: ## get the pinned nomad that the tests drive; built unless it is on PATH
	@tools/server.sh nomad out/tools

.PHONY: consul vault
consul vault: ## get the pinned consul or vault in the same way
	@tools/server.sh $@ out/tools

.PHONY: debian
debian:
	@tools/debian.sh $(TEST_PACKAGES)

.PHONY: clean
clean: ## remove everything that was built or downloaded here
	rm -rf out

out/tools/testreport: $(wildcard tools/testreport/*.go)
	@cd tools/testreport && go build -o ../../$@ .

out/tools/golangci-lint: tools/lint/go.mod tools/lint/go.sum
	@echo "lint: building golangci-lint from its pinned modules"
	@cd tools/lint && go build -o ../../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
	@touch $@
