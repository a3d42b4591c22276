#!/usr/bin/env bash
# Runs each fuzz target for a short, bounded time from its checked-in corpus. What it finds on the way is not kept; a crash
# ends the run with the input that caused it. (`cargo fuzz run TARGET` goes on for longer.)
set -euo pipefail
cd "$(dirname "$0")"

seconds="${FUZZ_SECONDS:-4}"
# Coverage counters for libFuzzer with the stable compiler; address sanitizing needs a nightly one.
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$PWD/../target}/fuzz"
# The triple keeps the flags away from build scripts and macros.
triple=$(rustc -vV | sed -n 's/^host: //p')
command -v c++ >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends g++; }
cargo build -q --target "$triple" --bins

found=$(mktemp -d)
trap 'rm -rf "$found"' EXIT
for file in fuzz_targets/*.rs; do
    target=$(basename "$file" .rs)
    mkdir -p "$found/$target"
    if ! "$CARGO_TARGET_DIR/$triple/debug/$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
        -artifact_prefix="$PWD/artifacts-$target-" "$found/$target" "corpus/$target" >"$found/log" 2>&1; then
        tail -n 40 "$found/log"
        echo "fuzz: $target failed; the input lies beside this script" >&2
        exit 1
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$found/log")
    [ "${runs:-0}" -gt 0 ] || { echo "fuzz: $target ran nothing" >&2; exit 1; }
    echo "fuzz: $target: $runs inputs in $seconds s, no crash"
done
