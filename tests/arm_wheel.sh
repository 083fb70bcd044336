#!/usr/bin/env bash
# Makes a wheel for 64-bit ARM on another Debian machine and runs it there, under QEMU: the compiler is
# this machine's, and Python and torch are those of ARM, unpacked into build/arm64. Nothing on the
# machine changes, and none of it needs root. Needs g++-aarch64-linux-gnu and qemu-user of Debian, its
# archive, PyPI, and the tools of `make setup` on PATH (`make test-arm-wheel` sees to that).
#
#   TORCH  what pip installs for torch, by default the last on PyPI that has a build for ARM without
#          CUDA's packages
#   TESTS  what pytest runs, by default a choice that takes minutes; emulation is slow
set -euo pipefail
TORCH=${TORCH:-torch==2.10.0}
cd "$(dirname "$0")/.."
root=$PWD
tests=${TESTS:-"
  tests/ops/test_attend.py::test_attend_over_everything_is_full_attention
  tests/ops/test_attend.py::test_attend_follows_logits_that_climb
  tests/ops/test_score.py::test_score_equals_definition
  tests/ops/test_shortlist.py
  tests/hf/test_hf.py::test_every_policy_generates"}
folder=$root/build/arm64
userland=$folder/userland
python=$folder/env/bin/python
say() { echo "== $1 ($SECONDS s)"; }
pip() { python -m pip --python "$python" "$@"; }

for tool in apt-get dpkg-deb qemu-aarch64 aarch64-linux-gnu-g++; do
  command -v $tool >/dev/null || {
    echo "$tool is missing: this needs Debian, with its packages g++-aarch64-linux-gnu and qemu-user" >&2
    exit 1
  }
done

if [ ! -e "$folder/.ready" ]; then
  say "Debian's Python for ARM"
  rm -rf "$folder"
  mkdir -p "$folder"/apt/{lists,archives}/partial "$userland"
  # apt as on an ARM machine where nothing is installed, with this machine's sources.
  : > "$folder/apt/status"
  apt() {
    apt-get -q -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o Dir::State="$folder/apt" \
      -o Dir::State::status="$folder/apt/status" -o Dir::Cache="$folder/apt" \
      -o APT::Sandbox::User="$(id -un)" "$@"
  }
  apt update > "$folder/apt.log"
  apt install -y --no-install-recommends --download-only python3 libpython3-dev libgomp1 libstdc++6 \
    >> "$folder/apt.log"
  for package in "$folder"/apt/archives/*.deb; do dpkg-deb -x "$package" "$userland"; done

  # A Python that starts itself again under QEMU when it starts `sys.executable`. The processor is one
  # that clouds have; QEMU's own has every extension, which some libraries then use, and slowly.
  real=$(readlink -f "$userland/usr/bin/python3")
  cat > "$userland/usr/bin/python-in-qemu" << END
#!/bin/sh
exec qemu-aarch64 -cpu neoverse-n1 -L "$userland" -0 "\$0" "$real" "\$@"
END
  chmod +x "$userland/usr/bin/python-in-qemu"
  "$userland/usr/bin/python-in-qemu" -m venv --without-pip "$folder/env"

  say "torch and others from PyPI"
  pip install -q --no-compile "$TORCH" numpy hypothesis pytest scikit-build-core pybind11
  touch "$folder/.ready"
fi

say "the wheel"
rm -rf "$folder/dist"
# Debian's header of Python includes the one of its architecture by a path in /usr/include.
CMAKE_TOOLCHAIN_FILE=$root/cmake/aarch64.cmake CXXFLAGS="-idirafter $userland/usr/include" \
  SKBUILD_CMAKE_DEFINE="ADAKV_CUDA=OFF;pybind11_DIR=$("$python" -m pybind11 --cmakedir)" \
  pip wheel -q --no-build-isolation --no-deps -w "$folder/dist" -C build-dir=build/arm-wheel .
ls "$folder/dist"
pip install -q --no-compile --force-reinstall --no-deps "$folder"/dist/*.whl
pip install -q --no-compile 'adakv[hf,cli]'

say "adakv info"
cd "$folder"
env/bin/adakv info

say "the tests"
read -ra chosen <<< "$(echo "$tests" | xargs)"
OMP_NUM_THREADS=1 env/bin/python -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" \
  --rootdir "$root" -m "not slow" "${chosen[@]/#/$root/}"
say "all of it"
