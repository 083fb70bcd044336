#!/usr/bin/env bash
# Plays a newcomer without a GPU: in an empty folder, what README.md says, word for word. A clone of
# what is committed here is installed by pip, README's snippet runs as it stands and prints what README
# says, the command lines run, then `make demo`, and the snippets of the documents. Needs Python, a C++
# compiler, git and PyPI, but no hub: the model is the demo's, under the names that README has for it.
#
#   TORCH  what `pip install` gets for torch; README's line by default
set -euo pipefail
# As on a machine without nvcc: where it is, kernels for six architectures take most of an hour on two
# cores.
export SKBUILD_CMAKE_DEFINE=ADAKV_CUDA=OFF
TORCH=${TORCH:-"torch --index-url https://download.pytorch.org/whl/cpu"}
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
say() { echo "== $1 ($SECONDS s)"; }

say "clone"
git clone -q "$root" "$folder/adakv"
cd "$folder/adakv"

say "make demo"
make -s demo

say "pip install"
python3 -m venv "$folder/env"
# shellcheck source=/dev/null
. "$folder/env/bin/activate"
grep -qF "pip install torch --index-url https://download.pytorch.org/whl/cpu" README.md
grep -qF "pip install '.[hf,cli]'" README.md
# shellcheck disable=SC2086
pip install -q --no-compile $TORCH
pip install -q --no-compile '.[hf,cli]'
adakv info

say "the snippet"
mkdir -p "$folder/empty/HuggingFaceTB" && cd "$folder/empty"
model=$folder/adakv/demo/model/SmolLM2-135M-Instruct
ln -s "$model" HuggingFaceTB/SmolLM2-135M-Instruct
# shellcheck disable=SC2016
sed -n '/^```python$/,/^```$/{/^```/d;p}' "$folder/adakv/README.md" > snippet.py
python snippet.py | tee printed.txt
head -1 printed.txt | sed 's/^/    /' | grep -qxFf - "$folder/adakv/README.md"

say "the command lines"
ln -s "$model" MODEL
cp "$folder/adakv/python/adakv/cli/demo.txt" book.txt
sed -n 's/^    \(adakv .*\)/\1/p' "$folder/adakv/README.md" > commands.sh
grep -c . commands.sh
bash -eux commands.sh

say "the snippets of the documents"
cd "$folder/adakv"
make -s setup
OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q tests/test_docs.py
say "all of it"
