#!/bin/sh
# Compiles the product's own crates with coverage counters for libFuzzer; cargo calls it as RUSTC_WORKSPACE_WRAPPER, so that
# the dependencies are those of every other build. Address sanitizing would need a nightly compiler.
case " $* " in
*" --crate-type proc-macro "* | *" build_script_build "*) exec "$@" ;;
esac
exec "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares
