#!/usr/bin/env bash
# Packs the program, the kernels and the GPU tests of build/ (see ./run build --cuda and ./run test
# --cuda), stripped, into one archive, to be carried to a machine that has a GPU but no build tools.
# bench/run_gpu.sh runs it there.
#   bench/pack_gpu.sh ARCHIVE.tar.xz
set -euo pipefail
cd "$(dirname "$0")/.."
archive=${1:?usage: bench/pack_gpu.sh ARCHIVE.tar.xz}

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
mkdir "$stage/build"
cp build/sarissa build/libsarissa.so build/libsarissa_cuda.so "$stage/build/"
for test in $(PATH="$PWD/.venv/bin:$PATH" ctest --test-dir build -N -L gpu | sed -n 's/.*: \(.*\)_gpu$/\1/p'); do
  cp "build/$test" "$stage/build/"
  echo "$test" >> "$stage/build/gpu_tests"
done
strip "$stage"/build/*_test "$stage"/build/*.so "$stage/build/sarissa"
mkdir -p "$(dirname "$archive")"
tar -C "$stage" -c build | xz -T2 -3 > "$archive"
ls -l "$archive"
