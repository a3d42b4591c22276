#!/usr/bin/env bash
# Runs each fuzz target for a short, bounded time from its checked-in corpus. What it finds on the way is not kept; a crash
# ends the run with the input that caused it. (`cargo fuzz run TARGET` goes on for longer.)
set -euo pipefail
cd "$(dirname "$0")"

seconds="${FUZZ_SECONDS:-2}"
target_dir="${CARGO_TARGET_DIR:-$PWD/../target}"
command -v c++ >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends g++; }
RUSTC_WORKSPACE_WRAPPER="$PWD/rustc.sh" CARGO_INCREMENTAL=0 cargo build -q -p coracle-fuzz --features libfuzzer --bins

found=$(mktemp -d)
trap 'rm -rf "$found"' EXIT
for file in fuzz_targets/*.rs; do
    target=$(basename "$file" .rs)
    mkdir -p "$found/$target"
    if ! "$target_dir/debug/$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -print_final_stats=1 \
        -artifact_prefix="$PWD/artifacts-$target-" "$found/$target" "corpus/$target" >"$found/log" 2>&1; then
        tail -n 40 "$found/log"
        echo "fuzz: $target failed; the input lies beside this script" >&2
        exit 1
    fi
    runs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$found/log")
    [ "${runs:-0}" -gt 0 ] || { echo "fuzz: $target ran nothing" >&2; exit 1; }
    echo "fuzz: $target: $runs inputs in $seconds s, no crash"
done
