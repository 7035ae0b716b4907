#!/usr/bin/env bash
# Runs what only a GPU can show, from an archive of bench/pack_gpu.sh, in one call:
#   bench/run_gpu.sh ARCHIVE.tar.xz RESULTS_FOLDER [tests|sanitize|checks|train|all]
#   bench/run_gpu.sh ARCHIVE.tar.xz RESULTS_FOLDER bench [options of 'sarissa bench ops']
#   bench/run_gpu.sh ARCHIVE.tar.xz RESULTS_FOLDER peers [options of bench/peers/peers.py]
# python3 on PATH must have torch 2.11.0 (the CUDA 13.0 build). Writes logs and JSON to the folder
# (bench: ops.jsonl, peers: peers.jsonl) and one line per step; exits 1 when a step failed. `checks` are
# tests and sanitize, which run beside each other.
set -uo pipefail
cd "$(dirname "$0")/.."
archive=${1:?usage: bench/run_gpu.sh ARCHIVE.tar.xz RESULTS_FOLDER [tests|sanitize|checks|train|bench|peers|all]}
results=${2:?usage: bench/run_gpu.sh ARCHIVE.tar.xz RESULTS_FOLDER [tests|sanitize|checks|train|bench|peers|all]}
what=${3:-all}
options=("${@:4}")
mkdir -p "$results"
logs=$(mktemp -d)  # many small files: they come back as one archive
tar -xJf "$archive"
torch_libraries=$(python3 -c 'import torch, os
p = os.path.dirname(torch.__file__)
print(p + "/lib:" + ":".join(r for r, _, _ in os.walk(os.path.dirname(p) + "/nvidia") if r.endswith("/lib")))')
export LD_LIBRARY_PATH="$PWD/build:$torch_libraries"
export SARISSA_SOURCE_DIR="$PWD"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
build/sarissa --version

failures=$(mktemp)
step() {  # step NAME COMMAND...: runs the command, logs it, reports one line
  local name=$1 start=$SECONDS
  shift
  if "$@" > "$logs/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - start)) s)"
  else
    echo "FAILED  $name ($((SECONDS - start)) s)"
    grep -E "FAILED|Failure|error|ERROR SUMMARY|Race reported" "$logs/$name.log" |
      grep -v '"pass":true' | head -40
    echo "$name" >> "$failures"
  fi
}
beside() {  # a step beside up to 5 others
  step "$@" &
  while (($(jobs -rp | wc -l) >= 6)); do wait -n; done
}

# race_free LOG PROGRAM...: racecheck also reports torch's own attention kernels (cutlass, cuDNN),
# but only ours count.
race_free() {
  timeout 240 compute-sanitizer --tool racecheck "${@:2}" || return 1
  ! grep 'Race reported' "$logs/$1.log" | grep -v -e fmha_cutlass -e cudnn_
}
racecheck() {  # racecheck NAME PROGRAM...
  beside "racecheck_$1" race_free "racecheck_$1" "${@:2}"
}
selftest() { timeout 240 build/sarissa selftest --device cuda --json | tee "$results/selftest.json"; }
if [[ $what == sanitize || $what == checks || $what == all ]]; then  # first, since it takes longest
  racecheck selftest build/sarissa selftest --device cuda
  # What shapes as small as the self-test's do not reach: a CTA that takes several batch entries, and
  # all variants of the marching backward.
  racecheck modal build/hyena_modal_test --gtest_filter='*CudaBatchEntries*:*CudaSaves*'
  racecheck phalanx build/phalanx_test --gtest_filter='*Cuda.MarchingKernels'
  beside memcheck compute-sanitizer --tool memcheck --error-exitcode 1 \
    build/sarissa selftest --device cuda
fi
if [[ $what == tests || $what == checks || $what == all ]]; then
  while read -r test; do
    beside "$test" timeout 240 "build/$test" --gtest_filter='*Cuda*'
  done < build/gpu_tests
  beside selftest selftest
fi
wait
if [[ $what == train || $what == all ]]; then
  step train build/sarissa train configs/quickstart.toml --train.device=cuda \
    --train.output="$logs/run"
  cp "$logs/run/metrics.jsonl" "$results/" && tail -n 3 "$results/metrics.jsonl"
  rm -rf "$logs/run"
fi
if [[ $what == bench || $what == all ]]; then
  step bench build/sarissa bench ops --device cuda --json "$results/ops.jsonl" "${options[@]}"
  cat "$logs/bench.log"
fi
if [[ $what == peers || $what == all ]]; then
  [[ $what == peers ]] || options=()
  step peers python3 bench/peers/peers.py --device cuda --json "$results/peers.jsonl" "${options[@]}"
  cat "$logs/peers.log"
fi
tar -C "$logs" -czf "$results/logs.tar.gz" .
[[ ! -s $failures ]]
