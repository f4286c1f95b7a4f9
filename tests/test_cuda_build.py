"""The CUDA build and backend as far as they show without a GPU: found, refused, explained."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnet_kernels import backends
from mnet_kernels.nn import constants

ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda:0")

#: Runs setup.py up to the point where it would build.
SETUP = """
import setuptools
setuptools.setup = lambda **options: None
exec(compile(open("setup.py").read(), "setup.py", "exec"))
print("nvcc:", nvcc and nvcc.path)
print("why:", why_no_cuda)
if nvcc:
    print("libraries:", *nvcc.library_dirs)
    print("in place:", *nvcc.architectures(True))
    print("wheel:", *nvcc.architectures(False))
    print("flags:", *nvcc.architecture_flags(nvcc.architectures(False)))
"""


def setup_py(**variables: str) -> tuple[int, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("CUDA", "TORCH", "FORCE"))}
    done = subprocess.run(
        [sys.executable, "-c", SETUP],
        cwd=ROOT,
        env=kept | variables,
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


# ---- setup.py ----
needs_nvcc = pytest.mark.skipif(
    not (shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")),
    reason="there is no nvcc",
)


@needs_nvcc
def test_an_nvcc_outside_its_toolkit_is_enough(tmp_path):
    real = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    wrapper = tmp_path / "nvcc"
    wrapper.write_text(f'#!/bin/sh\nexec {os.path.realpath(real)} "$@"\n')
    wrapper.chmod(0o755)
    status, output = setup_py(PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert status == 0, output
    assert f"nvcc: {wrapper}\nwhy: None" in output
    libraries = output.partition("libraries: ")[2].splitlines()[0].split()
    assert any((Path(path) / "libcudart_static.a").exists() for path in libraries)
    assert "wheel: 8.0 8.6 8.9 9.0" in output and "+PTX\n" in output
    if not torch.cuda.is_available():
        assert "in place: 8.0+PTX" in output


@needs_nvcc
def test_architectures_are_the_users_choice():
    _, output = setup_py(TORCH_CUDA_ARCH_LIST="8.6;9.0a+PTX")
    assert "in place: 8.6 9.0a+PTX" in output
    assert (
        "flags: -gencode=arch=compute_86,code=sm_86 -gencode=arch=compute_90a,code=sm_90a "
        "-gencode=arch=compute_90a,code=compute_90a" in output
    ) or "got '9.0a+PTX'" in output
    status, output = setup_py(TORCH_CUDA_ARCH_LIST="Fermi")
    assert status != 0
    assert 'TORCH_CUDA_ARCH_LIST: expected numbers as in "8.0 9.0+PTX"' in output
    assert "got 'Fermi'" in output


def test_cuda_can_be_left_out():
    status, output = setup_py(FORCE_CUDA="0")
    assert status == 0
    assert "nvcc: None\nwhy: they were left out of this build (FORCE_CUDA=0)" in output


def test_an_nvcc_that_does_not_work_is_told_and_forcing_is_an_error(tmp_path):
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    lost = {"CUDA_HOME": str(tmp_path), "PATH": f"{broken.parent}:/usr/bin:/bin"}
    if shutil.which("/usr/local/cuda/bin/nvcc") or shutil.which("/usr/bin/nvcc"):
        status, output = setup_py(**lost)  # another one is found
        assert status == 0 and "nvcc: None" not in output
    else:
        status, output = setup_py(**lost)
        assert status == 0 and "why: nvcc did not work when this was built" in output
        status, output = setup_py(**lost, FORCE_CUDA="1")
        assert status != 0 and "mnet_kernels: FORCE_CUDA=1, but nvcc did not work" in output


#: An nvcc that notes what it compiles, and compiles nothing.
NOTING = """#!/bin/sh
for word; do
  case "$word" in
    -c) compiles=1 ;;
    *.cu) source="$word" ;;
  esac
  last="$word"
done
test -z "$compiles" && exec {real} "$@"
echo "$source" >> {notes}
touch "$last"
"""


@needs_nvcc
def test_objects_are_kept_for_as_long_as_nothing_that_they_read_changes(tmp_path):
    """Wherever torch's headers lie, which its version names."""
    real = os.path.realpath(shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    tree, notes, wrapper = tmp_path / "tree", tmp_path / "notes", tmp_path / "nvcc"
    shutil.copytree(ROOT / "csrc", tree / "csrc")
    (tree / "mnet_kernels").mkdir()
    for name in ("setup.py", "mnet_kernels/_version.py"):
        shutil.copy2(ROOT / name, tree / name)
    wrapper.write_text(NOTING.format(real=real, notes=notes))
    wrapper.chmod(0o755)
    steps = """
def compiled(architecture="8.0"):
    open(notes, "w").close()
    nvcc.compile(CUDA_SOURCES[:2], Path("objects"), [architecture])
    return len(open(notes).read().split())
counts = [compiled()]
include_paths = lambda: ["/elsewhere"]
counts.append(compiled())
with open("csrc/cuda/mma.cuh", "a") as file: file.write("// changed")
counts += [compiled(), compiled(), compiled("9.0")]
print("compiled:", counts)
"""
    done = subprocess.run(
        [sys.executable, "-c", f"notes = {str(notes)!r}\n{SETUP}{steps}"], cwd=tree,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CUDA_HOME": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "compiled: [2, 0, 2, 0, 2]" in done.stdout, done.stdout + done.stderr


# ---- the backend's predicate ----
def why_not(monkeypatch, *, reason=None, gpu=True, dtype=torch.float32, compiled="8.0+PTX"):
    monkeypatch.setattr(backends, "_why_no_cuda", reason)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "cuda_info", lambda: {"architectures": compiled})
    backends._compiled_for.cache_clear()
    told = backends.why_not("cuda", device=GPU, dtype=dtype)
    backends._compiled_for.cache_clear()
    return told


def test_each_refusal_has_its_sentence(monkeypatch):
    assert why_not(monkeypatch) is None
    assert why_not(monkeypatch, reason="no toolkit") == "no toolkit"
    assert why_not(monkeypatch, gpu=False) == "there is no CUDA GPU"
    refused = why_not(monkeypatch, dtype=torch.float64)
    assert refused == "the cuda backend serves float32, float16 and bfloat16, not float64"
    assert why_not(monkeypatch, dtype=torch.int32) == (
        "the cuda backend serves floating dtypes, not int32"
    )
    assert backends.why_not("cuda", device="cpu") == "the cuda backend serves CUDA tensors, not cpu"


@pytest.mark.parametrize(
    "compiled,runs",
    [
        ("9.0", True), ("8.0 9.0", True), ("9.0a", True), ("8.0+PTX", True), ("8.6 8.9+PTX", True),
        ("8.0 8.6", False), ("10.0 12.0+PTX", False), ("8.0", False), ("9.1", False),
        ("9.0a+PTX", True), ("8.0a+PTX", False),
    ],
)  # fmt: skip
def test_architectures_that_run_on_a_9_0(monkeypatch, compiled, runs):
    told = why_not(monkeypatch, compiled=compiled)
    assert (told is None) == runs
    if not runs:
        assert told == f"the CUDA kernels are compiled for {compiled}, this GPU has 9.0"


def test_what_fails_to_load_is_a_reason_and_no_error(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: x\n(and more)")

    monkeypatch.setattr(backends, "import_module", broken)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(backends._C, "build_info", lambda: {})
    assert backends._load_cuda() == (
        "the CUDA kernels cannot be loaded: undefined symbol: x (and more)"
    )
    monkeypatch.setattr(backends._C, "build_info", lambda: {"why_no_cuda": "no nvcc"})
    assert backends._load_cuda() == "the CUDA kernels are not there: no nvcc"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert backends._load_cuda() == f"this PyTorch ({torch.__version__}) has no CUDA"


# ---- the extension, loaded without a GPU ----
@pytest.fixture
def cuda():
    if backends._why_no_cuda is not None:
        pytest.skip(backends._why_no_cuda)
    from mnet_kernels import _cuda

    yield _cuda
    _cuda.force_variant("")


def test_the_operator_is_registered(cuda):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    assert has("mnet_kernels::dwconv_bn_act", "CUDA")


@pytest.mark.skipif(shutil.which("readelf") is None, reason="there is no readelf")
def test_it_links_to_nothing_that_a_torch_without_cuda_lacks(cuda):
    """CUDA's runtime is inside, and torch's stream is looked up when it is asked for: a CPU-only
    torch builds it too."""
    told = subprocess.run(
        ["readelf", "--dynamic", "--wide", cuda.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*?)\]", told)
    assert any(name.startswith("libtorch") for name in needed)
    assert not [name for name in needed if "cuda" in name], needed


def test_every_variant_serves_some_call_and_can_be_forced(cuda):
    calls = [
        ([2, 64, 28, 28], dtype, channels_last, [64, 1, k, k], [stride], [k // 2])
        for dtype in ("float32", "float16", "bfloat16")
        for channels_last in (False, True)
        for k in (3, 5, 7)
        for stride in (1, 2)
    ]
    seen = set()
    for call in calls:
        cuda.force_variant("")
        facts = cuda.facts_of_call(*call)
        assert facts.variant in facts.able
        assert facts.blocks > 0 and 32 <= facts.threads <= 1024
        for name in facts.able:
            cuda.force_variant(name)
            assert cuda.facts_of_call(*call).variant == name
            seen.add(name)
    assert seen == set(cuda.variants())


#: Beyond what 32 bits count somewhere: threads, planes, elements of an image.
HUGE = [
    ([1000, 1 << 24, 3, 1], True, 5, 1), ([3, 1 << 20, 1, 4096], False, 5, 2),
    ([70000, 40000, 3, 3], False, 3, 1), ([1, 3, 50000, 50000], False, 3, 1),
    ([1, 3, 50000, 50000], True, 3, 2), ([40000, 8, 112, 112], True, 3, 1),
]  # fmt: skip


@pytest.mark.parametrize("shape,channels_last,k,stride", HUGE, ids=str)
def test_what_one_kernel_cannot_count_another_can(cuda, shape, channels_last, k, stride):
    call = shape, "bfloat16", channels_last, [shape[1], 1, k, k], [stride], [k // 2]
    cuda.force_variant("")
    able = cuda.facts_of_call(*call).able
    assert "general" in able
    for name in able:
        cuda.force_variant(name)
        assert 0 < cuda.facts_of_call(*call).blocks < 2**31
    cuda.force_variant("")


def test_what_no_kernel_can_count_is_told(cuda):
    with pytest.raises(
        RuntimeError,
        match=r"conv_bn_act: x: expected rows, .* below 2\^31, got a convolution of 1 x 3 x 70000 "
        r"x 40000 to 8 x 70000 x 40000",
    ):
        cuda.facts_of_conv_call([1, 3, 70000, 40000], "bfloat16", [8, 3, 3, 3], [1], [1])
    with pytest.raises(
        RuntimeError,
        match=r"separable_conv: x: expected rows, columns and channels below 2\^31, got",
    ):
        cuda.facts_of_separable_call(
            [1, 8, 1, 8], "bfloat16", [8, 1, 1, 1], 8, [1], [0, 2**30, 0, 2**30]
        )


def test_facts_of_bad_calls(cuda):
    with pytest.raises(RuntimeError, match="dwconv_bn_act: weight: expected shape"):
        cuda.facts_of_call([1, 8, 5, 5], "float32", False, [7, 1, 3, 3])
    with pytest.raises(RuntimeError, match="x: expected float32, float16 or bfloat16 on a GPU"):
        cuda.facts_of_call([1, 8, 5, 5], "float64", False, [8, 1, 3, 3])
    with pytest.raises(RuntimeError, match="force_variant: there is no variant 'fastest'"):
        cuda.force_variant("fastest")
    cuda.force_variant(cuda.variants()[0])
    with pytest.raises(RuntimeError, match=r"dwconv_bn_act: .*cannot run this call"):
        cuda.facts_of_call([1, 7, 5, 5], "float32", False, [14, 1, 2, 3])


# ---- constants that a captured graph reads ----
def test_renewed_constants_stay_where_they_were():
    weight, scale, shift = torch.ones(4, 1, 3, 3), torch.ones(4), None
    kept = (weight.clone(), scale, shift)
    made = (weight * 2, scale * 3, torch.ones(4))
    now = constants.renewed(kept, made, [weight])
    assert now[0] is kept[0] and now[1] is kept[1]  # the same memory
    assert torch.equal(now[0], weight * 2) and now[1][0] == 3
    assert now[2] is made[2]  # there was none
    other = torch.zeros(4, 1, 3, 3)
    assert constants.renewed((weight, None, None), (other, None, None), [other])[0] is other
    assert weight.eq(1).all()  # the model's own is not written to
    wider = torch.ones(8)
    assert constants.renewed((weight, scale, None), (weight, wider, None), [weight])[1] is wider
