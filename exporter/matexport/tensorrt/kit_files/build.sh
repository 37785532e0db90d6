#!/usr/bin/env bash
# Builds model.engine with trtexec, on the machine that it is for: @MACHINE@ (compute capability @CAPABILITY@).
# Options go on to trtexec: ./build.sh --timingCacheFile=timing.cache
set -euo pipefail
cd "$(dirname "$0")"

@TRTEXEC@

capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 || true)
if [ -n "$capability" ] && [ "$capability" != @CAPABILITY@ ]; then
  echo "note: this GPU has compute capability $capability; the kit was written for @CAPABILITY@" >&2
fi

@PLUGIN@options=(
@OPTIONS@
)
"$trtexec" "${options[@]}" "$@"
mv model.engine.part model.engine
echo "model.engine is built. Check it: ./verify.sh"
