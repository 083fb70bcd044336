"""adakv in other programs: found by CMake, called from C and C++, the same as in Python."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import adakv

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "embed_cpp"

cmake = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
# In one process of xdist: each would build the example for itself.
pytestmark = [
    pytest.mark.skipif(cmake is None, reason="no CMake"),
    pytest.mark.xdist_group("embedding"),
]


def run(*command: Any) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def built(source: Path, build: Path, package: Path) -> Path:
    run(cmake, "-S", source, "-B", build, f"-Dadakv_DIR={package}", "-DCMAKE_BUILD_TYPE=Release")
    run(cmake, "--build", build, "--parallel", 2)
    return build


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The CMake package of this adakv, be it installed or run from a build folder."""
    try:
        return Path(adakv.get_cmake_dir())
    except adakv.Error:
        prefix = tmp_path_factory.mktemp("prefix")
        run(cmake, "--install", Path(adakv._C.__file__).parents[2], "--prefix", prefix)
        (found,) = prefix.glob("lib*/**/adakvConfig.cmake")
        return found.parent


@pytest.fixture(scope="module")
def embed(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's executable."""
    return built(EXAMPLE, tmp_path_factory.mktemp("embed"), package) / "embed"


def compare() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare", EXAMPLE / "compare.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with random weights, and a prompt of several blocks and an odd rest."""
    from hf.families import LLAMA, VOCAB

    path = tmp_path_factory.mktemp("llama")
    LLAMA.model(max_position_embeddings=1024).save_pretrained(path)
    torch.manual_seed(1)
    tokens = torch.randint(3, VOCAB, (603,)).tolist()
    (path / "tokens.txt").write_text(" ".join(map(str, tokens)))
    return path


def test_embedding_from_c(package: Path, tmp_path: Path, device: torch.device):
    output = run(built(ROOT / "tests" / "consumer", tmp_path, package) / "consumer", device.type)
    assert output.startswith(f"adakv {adakv.__version__}: line 0")


@pytest.mark.model
@pytest.mark.parametrize("policy", ["ada_snapkv", "critical_ada_snapkv"])
@pytest.mark.parametrize("ratio", [0.1, 1.0])
def test_embedding_keeps_and_writes_what_python_does(
    embed: Path, folder: Path, tmp_path: Path, policy: str, ratio: float, device: torch.device
):
    args = argparse.Namespace(
        embed=embed,
        folder=folder,
        ratio=ratio,
        policy=policy,
        device=device.type,
        new_tokens=40,
        threads=1,
    )
    cpp = compare().in_cpp(args, tmp_path / "cpp.json")
    python = compare().run_python(args)
    assert cpp["kept"] == python["kept"]
    assert cpp["tokens"] == python["tokens"]
    assert sum(len(row) for row in cpp["kept"][0]) == (2 * 60 if ratio < 1 else 2 * 603)


@pytest.mark.model
def test_embedding_answers_from_a_book(
    embed: Path, folder: Path, tmp_path: Path, device: torch.device
):
    """A text that Python has read; the question comes behind it, in C++ and in Python."""
    from transformers import AutoModelForCausalLM

    from adakv.hf.saving import fingerprint

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = torch.tensor([[int(x) for x in (folder / "tokens.txt").read_text().split()]])
    question, written = text[:, 40:75], []
    with torch.inference_mode(), adakv.attach(model):
        cache = adakv.Cache(model, ratio=0.1)
        model(text, past_key_values=cache)
        cache.save(tmp_path / "book.kv")
        tokens = question
        while len(written) < 20:
            tokens = model(tokens, past_key_values=cache).logits[:, -1:].argmax(-1)
            written.append(int(tokens))
    (tmp_path / "question.txt").write_text(" ".join(map(str, question[0].tolist())))
    mine = tmp_path / "mine"
    shutil.copytree(folder, mine)
    (mine / "fingerprint.txt").write_text(fingerprint(model))
    command = [embed, mine, tmp_path / "question.txt", "--book", tmp_path / "book.kv"]
    output = run(*command, "--new-tokens", 20, "--threads", 1, "--device", device.type)
    assert [int(x) for x in output.split()] == written
    for name, text, message in (
        ("mine/fingerprint.txt", "0" * 64, "made for another model"),
        ("book.kv", "no cache", "is no safetensors file"),
    ):
        (tmp_path / name).write_text(text)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "tpu"], "--device must be cpu or cuda, got tpu"),
        (["--device"], "--device wants a value"),
        (["--budget", "31"], "--budget must be at least the window, 32"),
        (["--ratio", "0"], "--ratio must be above 0"),
        (["--what"], "unknown option --what"),
    ],
)
def test_embedding_refuses_options(embed: Path, folder: Path, options: list[str], message: str):
    done = subprocess.run(
        [embed, folder, folder / "tokens.txt", *options], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("embed: " + message)


@pytest.mark.skipif("cuda" in adakv.backends(), reason="there is a CUDA device")
def test_embedding_says_why_there_is_no_cuda(embed: Path, folder: Path):
    done = subprocess.run(
        [embed, folder, folder / "tokens.txt", "--device", "cuda"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == f"embed: --device cuda: {adakv.cuda_unavailable_reason()}\n"


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("policy", [[], ["--critical"]])
def test_embedding_under_the_sanitizer(embed: Path, folder: Path, policy: list[str]):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not installed")
    run(
        *[sanitizer, "--tool", "memcheck", "--leak-check", "full", "--error-exitcode", "9"],
        *[embed, folder, folder / "tokens.txt", "--device", "cuda", "--new-tokens", "20", *policy],
    )


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("config.json", '"llama"', '"gemma"', "model_type must be llama, got gemma"),
        ("config.json", '"hidden_size": 64', '"hidden_size": 32', "must be [32], got [64]"),
        ("config.json", "{", "", "JSON: "),
        ("tokens.txt", " ", " x", "must hold token ids"),
        ("tokens.txt", " ", " 97 ", "tokens must be 0 to 96, got 97"),
    ],
)
def test_embedding_says_what_is_wrong(
    embed: Path, folder: Path, tmp_path: Path, file: str, old: str, new: str, message: str
):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / file).read_text()
    assert old in text
    (tmp_path / file).write_text(text.replace(old, new, 1))
    done = subprocess.run(
        [embed, tmp_path, tmp_path / "tokens.txt"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("embed: ") and message in done.stderr


def test_embedding_library_of_a_wheel_has_a_name_of_its_own():
    """The flags of conda's compilers put PREFIX/lib first, where a libadakv.so may be installed."""
    library = Path(adakv._C.__file__).parent / "lib"
    if not library.is_dir():
        pytest.skip("adakv runs from a build folder")
    version = importlib.metadata.version("adakv")
    assert [path.name for path in library.glob("*.so*")] == [f"libadakv-{version}.so"]


@pytest.mark.slow
@pytest.mark.parametrize("shared", ["ON", "OFF"])
def test_embedding_from_a_source_install(tmp_path: Path, shared: str):
    build, prefix = tmp_path / "build", tmp_path / "prefix"
    options = ["-DADAKV_PYTHON=OFF", "-DADAKV_CUDA=OFF", f"-DBUILD_SHARED_LIBS={shared}"]
    run(cmake, "-S", ROOT, "-B", build, *options)
    run(cmake, "--build", build, "--parallel", 2)
    run(cmake, "--install", build, "--prefix", prefix)
    (config,) = prefix.glob("lib*/**/adakvConfig.cmake")
    assert list(prefix.glob(f"lib*/libadakv.{'so' if shared == 'ON' else 'a'}"))
    run(built(ROOT / "tests" / "consumer", tmp_path / "consumer", config.parent) / "consumer")
    embedded = built(EXAMPLE, tmp_path / "embed", config.parent) / "embed"
    done = subprocess.run([embedded], capture_output=True, text=True)
    assert done.returncode == 1 and "usage: embed MODEL TOKENS" in done.stderr
