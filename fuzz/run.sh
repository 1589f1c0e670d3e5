#!/usr/bin/env bash
# Runs a fixed set of mutants per target without cargo-fuzz: `fuzz/run.sh [COUNT] [TARGET]`, 100,000 and all targets unless
# told. A finding is printed with the number of its mutant; the bytes are written to fuzz/artifacts/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export QUANT_MUTANTS="${1:-100000}" QUANT_MUTANT_TARGET="${2:-}"
exec "${CARGO:-cargo}" test -p quant --test mutants -- --nocapture
