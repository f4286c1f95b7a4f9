"""What we are measured against, the part that is other libraries: one function an engine.

Each is imported only when it is asked for; one that is not installed is missing, not an error.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from peers import Case, Missing, Peer, Ready
from torch import Tensor, nn

from mnet_kernels.timing import version

#: Of each engine, the distribution whose version says which it is.
DISTRIBUTIONS = {
    "ONNX Runtime": "onnxruntime",
    "OpenVINO": "openvino",
    "ncnn": "ncnn",
    "XNNPACK": "executorch",
}


def versions() -> dict[str, str | None]:
    return {name: version(distribution) for name, distribution in DISTRIBUTIONS.items()}


def _load(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise Missing(
            f"{name} is not installed" if version(name) is None
            else f"{name} cannot be imported: {error}"
        ) from None  # fmt: skip


def _float32_only(case: Case, engine: str) -> None:
    if case.dtype != torch.float32:
        raise Missing(f"{engine} has no {str(case.dtype).removeprefix('torch.')} convolutions here")


def onnx_runtime(case: Case) -> Ready:
    _float32_only(case, "ONNX Runtime")
    ort = _load("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Else its threads spin for tens of milliseconds after a call, on the cores of the next peer.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(case.onnx, options, providers=["CPUExecutionProvider"])
    y = ort.OrtValue.ortvalue_from_numpy(case.model(case.x).numpy())  # of the output's shape

    def take(x: Tensor) -> Any:
        binding = session.io_binding()
        binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x.numpy()))
        binding.bind_ortvalue_output("y", y)
        return binding

    def run(binding: Any) -> Any:
        session.run_with_iobinding(binding)
        return y

    return Ready(run, take, lambda y: torch.from_numpy(y.numpy().copy()))


def openvino(case: Case) -> Ready:
    """In the row's dtype; a module that keeps the map's form gets and gives NHWC."""
    ov = _load("openvino")
    core = ov.Core()
    model = core.read_model(case.onnx)
    types = {torch.float32: ov.Type.f32, torch.bfloat16: ov.Type.bf16}
    if case.dtype not in types:
        raise Missing(f"OpenVINO: not asked to run {case.dtype}")
    if case.dtype not in (torch.float32,) and "BF16" not in core.get_property(
        "CPU", "OPTIMIZATION_CAPABILITIES"
    ):
        raise Missing("OpenVINO has no bfloat16 on this processor")
    element = types[case.dtype]
    is_map = len(model.output().shape) == 4
    pre = ov.preprocess.PrePostProcessor(model)
    pre.input().tensor().set_element_type(element)
    pre.output().tensor().set_element_type(element)
    if is_map:
        pre.input().tensor().set_layout(ov.Layout("NHWC"))
        pre.input().model().set_layout(ov.Layout("NCHW"))
        pre.output().model().set_layout(ov.Layout("NCHW"))
        pre.output().tensor().set_layout(ov.Layout("NHWC"))
    request = core.compile_model(
        pre.build(), "CPU",
        {
            "INFERENCE_PRECISION_HINT": element.get_type_name(),
            "INFERENCE_NUM_THREADS": case.threads,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
        },
    ).create_infer_request()  # fmt: skip
    given: list[Any] = [None]

    def take(x: Tensor) -> Any:
        x = x.permute(0, 2, 3, 1).contiguous() if is_map else x
        shape = ov.Shape(list(x.shape))
        raw = x.view(torch.int16) if x.dtype == torch.bfloat16 else x
        return ov.Tensor(raw.numpy(), shape, element), x  # the tensor only points into x

    def run(taken: Any) -> Any:
        if given[0] is not taken:
            request.set_input_tensor(taken[0])
            given[0] = taken
        request.infer()
        return request

    def read(request: Any) -> Tensor:
        raw = request.get_output_tensor()
        y = torch.frombuffer(bytearray(raw.data.tobytes()), dtype=case.dtype).view(*raw.shape)
        return y.permute(0, 3, 1, 2) if is_map else y

    return Ready(run, take, read)


def ncnn(case: Case) -> Ready:
    """Converted by pnnx. One image at a time is all that it takes."""
    _float32_only(case, "ncnn")
    if len(case.x) > 1:
        raise Missing("ncnn takes one image at a time")
    engine, pnnx = _load("ncnn"), _load("pnnx")
    with tempfile.TemporaryDirectory() as folder, _silent():
        model = nn.Sequential()  # pnnx writes Python, where names cannot begin with a digit
        model.add_module("model", case.in_float32)
        pnnx.export(model.eval(), f"{folder}/m.pt", case.x, fp16=False)
        net = engine.Net()
        net.opt.num_threads = case.threads
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        if net.load_param(f"{folder}/m.ncnn.param") or net.load_model(f"{folder}/m.ncnn.bin"):
            raise Missing("ncnn cannot load what pnnx made of it")

    def run(x: Any) -> Any:
        extractor = net.create_extractor()
        extractor.input("in0", x)
        return extractor.extract("out0")[1]

    def take(x: Tensor) -> Any:
        return engine.Mat(x[0].numpy()).clone()

    def read(y: Any) -> Tensor:
        return torch.from_numpy(_array(y)).unsqueeze(0)

    return Ready(run, take, read)


def _array(mat: Any) -> Any:
    import numpy

    return numpy.array(mat)


def xnnpack(case: Case) -> Ready:
    """Through ExecuTorch."""
    _float32_only(case, "ExecuTorch")
    partitioner = _load("executorch.backends.xnnpack.partition.xnnpack_partitioner")
    exir, runtime = _load("executorch.exir"), _load("executorch.runtime")
    library = _load("executorch.extension.pybindings.portable_lib")
    with _silent():
        program = exir.to_edge_transform_and_lower(
            torch.export.export(case.model, (case.x,)),
            partitioner=[partitioner.XnnpackPartitioner()],
        ).to_executorch()
        library._unsafe_reset_threadpool(case.threads)
        loaded = runtime.Runtime.get().load_program(program.buffer)
        method = loaded.load_method("forward")

    def run(inputs: Any, kept: Any = (program, loaded)) -> Any:  # the method only points into them
        return method.execute(inputs)

    return Ready(run, lambda x: [x], lambda y: y[0].clone())


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Converters talk a lot, also from C++ and in processes of their own."""
    with open(os.devnull, "w") as nowhere:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(nowhere.fileno(), 1), os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            for number, old in enumerate(kept, 1):
                os.dup2(old, number)
                os.close(old)


ENGINES = [
    Peer("ONNX Runtime", "engine", onnx_runtime),
    Peer("OpenVINO", "engine", openvino),
    Peer("ncnn", "engine", ncnn, slow=True),
    Peer("XNNPACK", "engine", xnnpack, slow=True),
]
