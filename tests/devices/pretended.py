"""A device that says ``cuda`` and computes on the CPU, for the branches that no machine of the tests can reach.

A tensor "is on the device" when its storage is marked so. Inside :class:`PretendedDevice` a function mode answers
``x.device`` by that mark and turns ``.to("cuda")`` and ``device="cuda"`` into marked CPU tensors; a dispatch mode,
below autograd, carries the mark from inputs to outputs and does what a real device does and a CPU does not:

- an operation over tensors of two devices is an error;
- what makes the host wait for the device is written down in ``waits`` (reading a value, sizes that depend on values,
  copies that block), with the line of the package that asked for it;
- random numbers of the device come from a generator of its own, which ``torch.cuda.get_rng_state`` gives.

Variable-length attention, which has no CPU kernel, is computed sequence by sequence.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
_KINDS = ("cuda", "mps", "xpu")

# The size of the result depends on values: the host must read them first.
_SIZES = {
    aten.nonzero.default, aten.masked_select.default, aten.bincount.default, aten.unique_dim.default,
    aten._unique2.default, aten._unique.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
_READS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_RANDOM = {
    aten.native_dropout.default, aten.bernoulli_.float, aten.bernoulli.default, aten.rand.default, aten.randn.default,
    aten.rand_like.default, aten.randn_like.default, aten.uniform_.default, aten.normal_.default,
    aten.random_.default, aten.random_.to, getattr(aten.random_, "from"), aten.randint.default, aten.randint.low,
    aten.bernoulli_.Tensor,
    aten.bernoulli.p, aten.exponential_.default, aten._flash_attention_forward.default,
}  # fmt: skip


def is_on_device(tensor: Tensor) -> bool:
    """Whether the tensor's storage is marked."""
    return getattr(tensor.untyped_storage(), "pretended", False)


def _mark(tensor: Tensor, on: bool = True) -> Tensor:
    tensor.untyped_storage().pretended = on
    return tensor


def _is_pretended(value: Any) -> bool:
    """Whether ``value`` names a device that is not this machine's processor."""
    return isinstance(value, str | torch.device) and torch.device(value).type not in ("cpu", "meta")


class _Functions(TorchFunctionMode):
    """Answers what Python asks of a tensor's device, and keeps ``cuda`` away from a torch that has none."""

    def __init__(self, device: PretendedDevice) -> None:
        self.device = device

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__ and is_on_device(args[0]):  # type: ignore[attr-defined]
            return self.device.device
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return is_on_device(args[0]) and self.device.device.type == "cuda"
        if func is torch._C._nn._parse_to:  # what a module's ``to`` was given
            named = {name: "cpu" if _is_pretended(value) else value for name, value in kwargs.items()}
            parsed = func(*("cpu" if _is_pretended(value) else value for value in args), **named)
            there = any(map(_is_pretended, (*args, *kwargs.values())))
            return (self.device.device if there else parsed[0], *parsed[1:])
        if func is Tensor.is_pinned:
            return getattr(args[0].untyped_storage(), "pinned", False)
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.untyped_storage().pinned = True
            return pinned
        if func in (Tensor.to, Tensor.cuda, Tensor.cpu):
            return self._moved(func, args, kwargs)
        if func in (Tensor.tolist, Tensor.numpy) and is_on_device(args[0]):
            self.device.wait(func.__name__)
        if func is F.one_hot and is_on_device(args[0]):  # on a real device it checks no values
            with self.device.silent():
                return _mark(func(*args, **kwargs))
        if func is Tensor.new_tensor and is_on_device(args[0]):
            self.device.wait("a tensor made of Python numbers")
            return _mark(func(*args, **kwargs))
        if _is_pretended(kwargs.get("device")):
            kwargs["device"] = "cpu"
            if func in (torch.tensor, torch.as_tensor):
                self.device.wait("a tensor made of Python numbers")
            with self.device.generator() if func in (torch.rand, torch.randn, torch.randint) else ExitStack():
                return _mark(func(*args, **kwargs))
        return func(*args, **kwargs)

    def _moved(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        tensor, rest = args[0], list(args[1:])
        target: Any = {Tensor.cuda: "cuda", Tensor.cpu: "cpu"}.get(func)  # type: ignore[call-overload]
        if func is not Tensor.to:
            rest = []
        elif isinstance(kwargs.get("device"), str | torch.device):
            target = kwargs.pop("device")
        elif rest and isinstance(rest[0], Tensor):
            target, rest[0] = (self.device.device if is_on_device(rest[0]) else torch.device("cpu")), rest[0].dtype
        else:
            for place, value in enumerate(rest):
                if isinstance(value, str | torch.device):
                    target = rest.pop(place)
                    break
            if target is not None:  # as a module calls it: device, dtype or None, non_blocking
                kwargs.setdefault("non_blocking", True in rest[-1:])
                rest = [value for value in rest if isinstance(value, torch.dtype)]
        non_blocking = kwargs.pop("non_blocking", False)
        result = tensor.to(*rest, **kwargs) if rest or kwargs else tensor
        if target is None or torch.device(target).type == "meta":
            return result if target is None else result.to(target)
        to_device, from_device = _is_pretended(target), is_on_device(tensor)
        if to_device == from_device:
            return result
        pinned = getattr(tensor.untyped_storage(), "pinned", False)
        if not non_blocking or (to_device and not pinned):
            self.device.wait(f"a blocking copy to {target}")
        with self.device.silent():
            return _mark(result.clone(), to_device)


class _Operations(TorchDispatchMode):
    """Carries the mark, counts the waits, and computes what has no CPU kernel."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if self.device.quiet or not any(map(is_on_device, tensors)):
            return func(*args, **kwargs)
        if func is aten.copy_.default:
            return self._copy(func, *args, **kwargs)
        self._count(func, args, kwargs)
        if func in (aten._to_copy.default, aten.cat.default):
            self.device.casts += [x.data_ptr() for x in tensors]
        if func not in _INDEXING:
            strangers = [x for x in tensors if x.dim() and x.numel() and not is_on_device(x)]
            if strangers:
                raise RuntimeError(f"{func}: expected all tensors on one device, {len(strangers)} are on the CPU")
        with self.device.generator() if func in _RANDOM else ExitStack():
            result = self._computed(func)(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                if self.device.memory is not None and value.numel() > self.device.memory:
                    raise torch.OutOfMemoryError(f"{func}: {value.numel()} numbers")
                _mark(value)
        return result

    def _count(self, func: Any, args: Any, kwargs: Any) -> None:
        if func in _READS or (func in _SIZES and kwargs.get("output_size") is None):
            self.device.wait(str(func))
        elif func in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
                self.device.wait(f"{func} with a mask")
            if any(not is_on_device(index) for index in indices):
                self.device.wait(f"{func} with numbers of the host")

    def _copy(self, func: Any, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if is_on_device(target) != is_on_device(source) and source.dim():
            host = source if is_on_device(target) else target
            if not (non_blocking and getattr(host.untyped_storage(), "pinned", False)):
                self.device.wait("a blocking copy_")
        return func(target, source, non_blocking)  # type: ignore[no-any-return]

    def _computed(self, func: Any) -> Callable[..., Any]:
        found = {
            aten._flash_attention_forward.default: self._attention,
            aten._flash_attention_backward.default: self._attention_backward,
        }.get(func)
        if found is None and str(func) == "torch_attn._varlen_attn.default":
            return self._varlen
        if found is None and str(func) == "torch_attn._varlen_attn_backward.default":
            return self._varlen_backward
        return found or func

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int,
                   dropout: float, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # fmt: skip
        seed = torch.tensor([torch.initial_seed(), int(torch.randint(2**40, ()))])
        state = torch.tensor([int(torch.randint(2**40, ()))]) if dropout else torch.zeros(1, dtype=torch.int64)
        self.device.kernels.append("flash" if dropout else "varlen")
        return _by_sequence(q, k, v, q_ends, k_ends, dropout, int(state)), q.new_zeros(1), state, seed, q.new_zeros(0)

    def _attention_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                            q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int, dropout: float, causal: bool,
                            state: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:  # fmt: skip
        return _by_sequence_backward(grad, q, k, v, q_ends, k_ends, dropout, int(state))

    def _varlen(
        self, q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        self.device.kernels.append("varlen")
        return _by_sequence(q, k, v, q_ends, k_ends, 0.0, 0), q.new_zeros(1), q.new_zeros(2)

    def _varlen_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                         q_ends: Tensor, k_ends: Tensor, most_q: int, most_k: int, causal: bool,
                         state: Tensor, *args: Any) -> tuple[Tensor, ...]:  # fmt: skip
        return self._attention_backward(
            grad, q, k, v, out, lse, q_ends, k_ends, most_q, most_k, 0.0, causal, torch.zeros(1)
        )


def _sequences(q_ends: Tensor, k_ends: Tensor) -> Iterator[tuple[slice, slice]]:
    for number in range(len(q_ends) - 1):
        yield slice(q_ends[number], q_ends[number + 1]), slice(k_ends[number], k_ends[number + 1])


def _weights(query: Tensor, key: Tensor, dropout: float, chance: torch.Generator) -> tuple[Tensor, Tensor]:
    """Softmax ``[H, a, b]`` and what dropout multiplies it by."""
    scores = torch.einsum("ahd,bhd->hab", query.float(), key.float()) * query.shape[-1] ** -0.5
    kept = torch.rand(scores.shape, generator=chance) >= dropout if dropout else torch.ones(scores.shape)
    return torch.softmax(scores, dim=-1), kept / (1 - dropout)


def _by_sequence(q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, dropout: float, seed: int) -> Tensor:
    """``[T, H, d]`` attention, one sequence after the other; dropout drawn from ``seed``."""
    results, chance = [], torch.Generator().manual_seed(seed)
    for asking, asked in _sequences(q_ends, k_ends):
        weights, kept = _weights(q[asking], k[asked], dropout, chance)
        results.append(torch.einsum("hab,bhd->ahd", weights * kept, v[asked].float()).to(q.dtype))
    return torch.cat(results)


def _by_sequence_backward(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, dropout: float, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`_by_sequence`, by hand: autograd lies above a dispatch mode."""
    results, chance = [], torch.Generator().manual_seed(seed)
    for asking, asked in _sequences(q_ends, k_ends):
        (query, key, value), d_out = (q[asking].float(), k[asked].float(), v[asked].float()), gradient[asking].float()
        weights, kept = _weights(query, key, dropout, chance)
        d_weights = torch.einsum("ahd,bhd->hab", d_out, value) * kept
        d_scores = weights * (d_weights - (d_weights * weights).sum(-1, keepdim=True)) * q.shape[-1] ** -0.5
        d_query, d_key = torch.einsum("hab,bhd->ahd", d_scores, key), torch.einsum("hab,ahd->bhd", d_scores, query)
        results.append((d_query, d_key, torch.einsum("hab,ahd->bhd", weights * kept, d_out)))
    d_q, d_k, d_v = (torch.cat(parts).to(q.dtype) for parts in zip(*results, strict=True))
    return d_q, d_k, d_v


class PretendedDevice:
    """The device, as a context manager.

    Args:
        kind: what the device calls itself: ``cuda``, ``mps``, ``xpu``.
        capability: what ``torch.cuda.get_device_capability`` says.
        bf16: what ``torch.cuda.is_bf16_supported`` says.
        memory: numbers that a single result may hold; one with more is out of memory.

    Attributes:
        waits: what made the host wait, one line each.
        kernels: the attention kernels that ran.
        casts: where what was copied into another dtype, or joined, lay in memory.
    """

    def __init__(
        self, kind: str = "cuda", capability: tuple[int, int] = (9, 0), bf16: bool = True, memory: int | None = None
    ) -> None:
        self.device = torch.device(kind, 0)
        self.capability, self.bf16, self.memory = capability, bf16, memory
        self.waits: list[str] = []
        self.kernels: list[str] = []
        self.casts: list[int] = []
        self.quiet = False
        self._state = torch.Generator().manual_seed(4321).get_state()
        self._entered = ExitStack()

    def wait(self, what: str) -> None:
        frames = [f for f in traceback.extract_stack() if "FlagEmbedding" in f.filename]
        self.waits.append(f"{what} at " + (f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "backward"))

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Nothing is counted or carried."""
        before, self.quiet = self.quiet, True
        try:
            yield
        finally:
            self.quiet = before

    @contextmanager
    def generator(self) -> Iterator[None]:
        """Random numbers of the device."""
        host = torch.random.default_generator.get_state()
        torch.random.default_generator.set_state(self._state)
        try:
            yield
        finally:
            self._state = torch.random.default_generator.get_state()
            torch.random.default_generator.set_state(host)

    def _get_state(self, device: Any = None) -> Tensor:
        return self._state.clone()

    def _set_state(self, state: Tensor, device: Any = None) -> None:
        self._state = state.clone()

    def __enter__(self) -> PretendedDevice:
        enter = self._entered.enter_context
        for name, value in {
            "is_available": lambda: True, "_initialized": True, "device_count": lambda: 1, "current_device": lambda: 0,
            "get_rng_state": self._get_state, "set_rng_state": self._set_state,
            "get_rng_state_all": lambda: [self._get_state()],
            "is_bf16_supported": lambda *args, **kwargs: self.bf16,
            "get_device_capability": lambda *args: self.capability,
            "synchronize": lambda *args: self.wait("synchronize"), "empty_cache": lambda: None,
            "set_sync_debug_mode": lambda mode: None, "max_memory_allocated": lambda *args: 3 << 30,
            "reset_peak_memory_stats": lambda *args: None, "mem_get_info": lambda *args: (8 << 30, 16 << 30),
            "device": lambda index: ExitStack(),
        }.items():  # fmt: skip
            enter(patch.object(torch.cuda, name, value))
        for name in ("is_autocast_enabled", "get_autocast_dtype", "set_autocast_enabled", "set_autocast_dtype"):
            enter(patch.object(torch, name, _on_cpu(getattr(torch, name))))
        enter(patch.object(torch.autocast, "__init__", _on_cpu(torch.autocast.__init__, place=1)))
        # Its own look at saved tensors asks for their device inside autograd, where no mode answers.
        look = {"default": lambda x: (x.shape, x.dtype)}
        enter(patch.dict(torch.utils.checkpoint._allowed_determinism_checks_to_fns, look))
        run = torch.autograd._engine_run_backward

        def backward(*args: Any, **kwargs: Any) -> Any:
            with _Functions(self):  # torch leaves it when backward begins; the package's own backwards need it
                return run(*args, **kwargs)

        enter(patch.object(torch.autograd, "_engine_run_backward", backward))
        enter(_Operations(self))
        enter(_Functions(self))
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.close()


def _on_cpu(function: Callable[..., Any], place: int = 0) -> Callable[..., Any]:
    """``function`` with a pretended device type in its ``place`` read as ``cpu``."""

    def call(*args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if i == place and value in _KINDS else value for i, value in enumerate(args))
        return function(*args, **{name: "cpu" if value in _KINDS else value for name, value in kwargs.items()})

    return call


def move(module: torch.nn.Module) -> torch.nn.Module:
    """The module's parameters and buffers on the device."""
    with _disable_current_modes():
        for tensor in (*module.parameters(), *module.buffers()):
            _mark(tensor.data)
    return module
