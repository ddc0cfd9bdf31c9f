#!/usr/bin/env bash
# Writes the image's locks: `make lock`. Versions are those of constraints.txt, with which the tests run; what it does
# not name stays as the lock has it (ARGS=--upgrade for the newest). Every file of a version has its hash in the lock,
# so that one lock does for every Python and processor that the package has a wheel for.
set -euo pipefail
cd "$(dirname "$0")/.."

lock() { # constraints on standard input, so that no path of them is in the lock
  local output=requirements/$1
  shift
  echo "$output"
  "${UV:-uv}" pip compile --quiet --universal --python-version 3.11 --generate-hashes --annotation-style line \
    --custom-compile-command "make lock" --constraints - --excludes requirements/cut.txt --output-file "$output" \
    ${ARGS:-} "$@" >/dev/null
}

lock uv.txt requirements/uv.in <constraints.txt &
lock build.txt requirements/build.in <constraints.txt &
# NIXL for CUDA 12 works with every driver, and with none.
lock cuda-none.txt pyproject.toml --extra daemon requirements/peers-12.in <constraints.txt &
# The tests run with the bindings of CUDA 13.
grep -v '^cuda-bindings==' constraints.txt |
  lock cuda-12.txt pyproject.toml --extra daemon --extra cuda12 requirements/peers-12.in &
lock cuda-13.txt pyproject.toml --extra daemon --extra cuda13 requirements/peers-13.in <constraints.txt &
for job in $(jobs -p); do
  wait "$job"
done
