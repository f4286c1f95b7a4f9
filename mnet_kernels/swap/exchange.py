"""Exchange convolution + BatchNorm + activation for one pass, in any model, and give it back.

::

    fast = swap(model)      # the given model is untouched, parameters are shared
    print(explain(fast))    # what was exchanged, what was not, and why
    model = restore(fast)
"""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from mnet_kernels.nn import FusedConv2d, Fusion, PixelConv2d
from mnet_kernels.nn.fused import check_backend
from mnet_kernels.runs.forwards import sequenced
from mnet_kernels.runs.pairs import runners
from mnet_kernels.swap.decisions import load, measure
from mnet_kernels.swap.explanation import Explanation
from mnet_kernels.swap.find import find
from mnet_kernels.swap.plan import Plan, Site
from mnet_kernels.swap.tracing import Shortened


@dataclass
class Swapped:
    """What a swapped model remembers."""

    original: nn.Module
    plan: Plan
    #: Every module of it when it was made, and that of ``original`` that it is a copy of.
    twins: list[tuple[nn.Module, nn.Module]]


def swap(
    model: nn.Module,
    backend: str | None = None,
    example_inputs: Tensor | tuple[Any, ...] | None = None,
    decisions: str | PathLike[str] | None = None,
    pairs: bool | None = None,
) -> nn.Module:
    """A copy of ``model`` whose convolutions do the normalisation and activation after them.

    The copy shares parameters and buffers with ``model``, which stays as it is, and has the same
    state_dict keys. In eval mode, or where norms were frozen, a site is one pass over memory; while
    a norm uses the batch's statistics, depthwise sites are one operator that keeps little but its
    input for backward, 1x1 convolutions in float32 on the CPU one that keeps its convolution too,
    and all others run as before (``explain`` tells). What is done later to
    parameters, statistics or modes is honoured; after changing which modules the model is made of
    (``convert_sync_batchnorm``, say), swap anew.
    Modules that a convolution took over hand their input on: what passes between the two can no
    longer be seen, by forward hooks for instance.

    Args:
        model: any Module. Already swapped: its original is swapped anew.
        backend: "cpu", "cuda", "triton" or "native"; None: the best there is for each call.
        example_inputs: arguments for the model. Every site is timed, fused and native, on the
            input that it gets from them, and stays native where that is faster.
        pairs: whether a depthwise and the 1x1 convolution after it, in one run (see ``explain``),
            go in one pass; None: as a cost model says, or the faster way where ``example_inputs``
            are given. The results are the same bits on the CPU; on a GPU, where it is done only
            without gradients, they are rounded differently.
        decisions: a file written by ``explain(fast).save(path)``, instead of measuring.

    Returns:
        A model of the same class. It can be copied, pickled, compiled and exported.

    Raises:
        TypeError: ``model`` is not a Module, or is scripted or compiled, or has lazy parameters.
        ValueError: unknown backend; unreadable or foreign decisions; both ``example_inputs`` and
            ``decisions``.
    """
    given, model = model, _checked(model)
    check_backend("swap", backend)
    if example_inputs is not None and decisions is not None:
        raise ValueError("swap: expected example_inputs or decisions, got both")
    inputs = _arguments(example_inputs)
    plan = find(_twin(model))
    fast = _twin(model)
    twins = list(zip(fast.modules(), model.modules(), strict=True))
    for module, now in zip(fast.modules(), given.modules(), strict=True):
        module.training = now.training  # a swapped model has modes of its own
    _apply(plan, fast, backend)
    fast.__dict__["_mnet_swapped"] = Swapped(original=model, plan=plan, twins=twins)
    fused = dict(sites(fast))
    for module in fused.values():
        module.fusion.pair = pairs
    if decisions is not None:
        load(decisions, plan, fused)
    if inputs is not None:
        measure(fast, fused, inputs, pairs is None)
    return fast


def restore(fast: nn.Module) -> nn.Module:
    """The model that was given to :func:`swap`.

    It has the parameters, buffers and modules that ``fast`` has now, even if they were exchanged
    meanwhile (``fast.to(...)`` makes new buffers), and settings such as ``eps``.

    Raises:
        TypeError: ``fast`` was not made by :func:`swap`.
    """
    record = record_of(fast, "restore")
    originals = {id(twin): module for twin, module in record.twins}
    for twin, module in record.twins:
        if isinstance(module, torch.jit.ScriptModule):
            continue
        children = {name: _restored(child, originals) for name, child in twin._modules.items()}
        held: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (module._parameters, twin._parameters),
            (module._buffers, twin._buffers),
            (module._modules, children),
        ]
        for own, now in held:
            own.clear()
            own.update(now)
        for name, value in vars(twin).items():
            if name in vars(module) and name != "training" and isinstance(value, _SETTINGS):
                module.__dict__[name] = value
    return record.original


_SETTINGS = (bool, int, float, str, tuple)


def _restored(module: nn.Module | None, originals: dict[int, nn.Module]) -> nn.Module | None:
    """The original of a swapped model's module; a new module, with originals inside."""
    if module is None or id(module) in originals:
        return module and originals[id(module)]
    if any(id(inner) in originals for inner in module.modules()):
        module = copy.copy(module)
        children = {n: _restored(m, originals) for n, m in module._modules.items()}
        module.__dict__["_modules"] = children
    return module


def explain(fast: nn.Module) -> Explanation:
    """What became of every convolution: ``print`` it, read ``.rows``, or ``.save`` it.

    Raises:
        TypeError: ``fast`` was not made by :func:`swap`.
    """
    plan = record_of(fast, "explain").plan
    order = [path for path, _ in fast.named_modules()]
    return Explanation(plan, dict(sites(fast)), order, list(runners(fast)))


def sites(fast: nn.Module) -> Iterator[tuple[str, FusedConv2d]]:
    """Path and module of every convolution that was exchanged.

    Raises:
        TypeError: ``fast`` was not made by :func:`swap`.
    """
    modules = dict(fast.named_modules())
    for site in record_of(fast, "sites").plan.sites:
        module = modules.get(site.conv)
        if isinstance(module, FusedConv2d):  # and was not replaced since
            yield site.conv, module


def record_of(fast: object, operator: str) -> Swapped:
    """The record of a swapped model.

    Raises:
        TypeError: it is none.
    """
    record = fast.__dict__.get("_mnet_swapped") if isinstance(fast, nn.Module) else None
    if record is None:
        got = f"{type(fast).__module__}.{type(fast).__qualname__}"
        raise TypeError(f"{operator}: expected a model made by swap, got {got} that was not")
    return record


def _checked(model: object) -> nn.Module:
    got = f"{type(model).__module__}.{type(model).__qualname__}"
    if not isinstance(model, nn.Module):
        raise TypeError(f"swap: model: expected a torch.nn.Module, got {got}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"swap: model: expected a Module in Python, got {got}: swap, then trace")
    if "_orig_mod" in model._modules:
        raise TypeError(
            f"swap: model: expected one not yet compiled, got {got}: swap, then compile"
        )
    tensors = list(chain(model.parameters(), model.buffers()))
    if any(isinstance(tensor, FakeTensor) for tensor in tensors):
        raise TypeError(
            "swap: model: expected tensors with memory, got fake ones: swap outside FakeTensorMode"
        )
    if any(map(nn.parameter.is_lazy, tensors)):
        raise TypeError(
            "swap: model: expected parameters with shapes, got lazy ones: call it first"
        )
    if "_mnet_swapped" in model.__dict__:
        return restore(model)
    return model


def _arguments(example_inputs: object) -> tuple[Any, ...] | None:
    if example_inputs is None:
        return None
    arguments = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not arguments or not any(isinstance(a, Tensor) for a in arguments):
        raise TypeError(
            "swap: example_inputs: expected a Tensor, or a tuple of arguments with one in it, "
            f"got {type(example_inputs).__name__}"
        )
    return arguments


def _twin(model: nn.Module) -> nn.Module:
    """A copy of the tree of modules that shares all they hold but modules and containers.

    References from one module to another, also as bound methods or in lists, lead to the copy.
    """
    memo: dict[int, Any] = {}
    copied = (nn.Module, Fusion, types.MethodType, dict, list, tuple, set)
    for module in model.modules():
        hooks = [getattr(module, name) for name in vars(module) if name.endswith("_hooks")]
        for held in (module._parameters, module._buffers, vars(module), *filter(None, hooks)):
            for value in held.values():
                if not isinstance(value, copied) or held in hooks:
                    memo[id(value)] = value
    return copy.deepcopy(model, memo)


def _apply(plan: Plan, fast: nn.Module, backend: str | None) -> None:
    """Carry the plan out on a copy of the model that it was made for."""
    removed: dict[str, set[int]] = {}
    for site in plan.sites:
        conv = cast(nn.Conv2d, fast.get_submodule(site.conv))
        FusedConv2d.fuse(conv, _fusion(site, fast, backend))
        for path in site.absorbed:
            fast.get_submodule(path).__dict__["forward"] = absorbed
        for owner, position in site.removed:
            removed.setdefault(owner, set()).add(position)
    for owner, positions in removed.items():
        module = fast.get_submodule(owner)
        module.__dict__["forward"] = Shortened(module, frozenset(positions))
    for path, runs in plan.runs.items():
        module = fast.get_submodule(path)
        module.__dict__["forward"] = sequenced(module, runs, fast)
    if backend in (None, "cpu"):
        for module in fast.modules():
            PixelConv2d.take(module)


def absorbed(x: Tensor) -> Tensor:
    """The forward of a module whose work a FusedConv2d does: it hands its input on."""
    return x


def _fusion(site: Site, fast: nn.Module, backend: str | None) -> Fusion:
    act = fast.get_submodule(site.act) if isinstance(site.act, str) else site.act
    return Fusion(
        pad=site.pad,
        norm=None if site.norm is None else fast.get_submodule(site.norm),
        batch_statistics=site.batch_statistics,
        native_training=site.native_training,
        act=act,
        activation=site.activation.name,
        slope=site.activation.slope,
        backend=backend,
        free_layout=site.free_layout,
    )
