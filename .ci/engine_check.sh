#!/usr/bin/env bash
# Before a release: all that runs of a GPU's code on a pretended card, also what CI leaves out for
# time: 10 minutes of processor time, and 3 for the environment unless ENGINE_PYTHON names one.
set -euo pipefail
cd "$(dirname "$0")/.."
ENGINE_ALL=1 pytest -n 2 --dist loadgroup -m "slow or not slow" test_engine.py --durations=0 "$@"
