"""A GPU that computes nothing: PyTorch's fake tensors on "cuda" have a device, a dtype and a shape, but no memory.

Tensors on "cuda" and in pinned host memory are fake; all other tensors are real. As on a card, operations refuse
tensors of different devices and operands that their kernel does not accept. A wait of the host for the device raises,
as with `torch.cuda.set_sync_debug_mode("error")`.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model_server.compute import token_mask
from tests.support.cuda import FakeCuda

CUDA = torch.device("cuda", 0)
A10G_BYTES, CONTEXT_BYTES = 22_731 * 2**20, 450 * 2**20
TOKEN = 7
"""The token that every read of an integer gives."""
aten = torch.ops.aten


class GPUError(BaseException):
    """A GPU would fail or wait here. It is no `Exception`, because the engine survives those."""


class Generator(torch.Generator):
    """A generator of random numbers on the GPU, which this machine cannot make."""


class FakeGPU(TorchDispatchMode):
    """Runs operations of the GPU on fake tensors and counts the bytes that they allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.may_read = False
        self._computed: Any = None
        self.allocated_bytes = self.peak_bytes = 0
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Allow waits for the device, as at startup; see `_value` for what is read."""
        before, self.may_read = self.may_read, True
        yield
        self.may_read = before

    def reset_peak(self, device: torch.device | None = None) -> None:
        self.peak_bytes = self.allocated_bytes

    def free_bytes(self) -> int:
        return A10G_BYTES - CONTEXT_BYTES - self.allocated_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        on_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda" or kwargs.pop("pin_memory", False)
        if not on_gpu and not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            with no_dispatch():
                return func(*args, **kwargs)
        if func.namespace == "prim":
            return func(*args, **kwargs)
        if func not in (aten._to_copy.default, aten.copy_.default):
            with self:  # an operation that consists of others is checked by its parts
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if func in (aten._local_scalar_dense.default, aten.equal.default) and self.may_read:
            return self._value(func, args[0].dtype)
        if not self.may_read:
            self._refuse_waits(func, args, kwargs)
        if "generator" in kwargs:
            kwargs["generator"] = None
        try:
            out = func(*args, **kwargs)
        except Exception as error:
            raise GPUError(f"{func}: {error}") from error
        self._computed = func
        self._count(out)
        return out

    def _value(self, read: Any, dtype: torch.dtype) -> float | bool:
        """Return what a read gives: `TOKEN`, 0.0, or a condition: numbers are valid, and loops end."""
        if read is aten.equal.default or dtype == torch.bool:
            return read is aten.equal.default or any(
                name in str(self._computed) for name in (".all", "all_true", ".eq")
            )
        return 0.0 if dtype.is_floating_point else TOKEN

    def _refuse_waits(self, func: Any, args: Any, kwargs: Any) -> None:
        if func is aten._to_copy.default:
            source, target, non_blocking = args[0], kwargs.get("device") or args[0].device, kwargs.get("non_blocking")
            pinned = isinstance(source, FakeTensor) and source.device.type == "cpu"  # new host memory is not pinned
        elif func is aten.copy_.default:
            target, source, non_blocking = args[0].device, args[1], len(args) > 2 and args[2]
            pinned = isinstance(args[0], FakeTensor) and isinstance(source, FakeTensor)
        elif func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
            if any(isinstance(index, Tensor) and index.device.type == "cpu" for index in args[1]):
                raise GPUError(f"{func} copies an index to the device and waits for it")
            return
        else:
            return
        if torch.device(target).type != source.device.type and not (non_blocking and pinned):
            raise GPUError(f"a copy from {source.device} to {target} waits for the device")

    def _count(self, out: Any) -> None:
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
                storage = tensor.untyped_storage()
                if storage not in self._storages:
                    num_bytes = -(-storage.nbytes() // 512) * 512  # PyTorch's allocator rounds up
                    self._storages.add(storage)
                    weakref.finalize(storage, self._free, num_bytes)
                    self.allocated_bytes += num_bytes
                    self.peak_bytes = max(self.peak_bytes, self.allocated_bytes)

    def _free(self, num_bytes: int) -> None:
        self.allocated_bytes -= num_bytes


class _PinnedMemory(TorchFunctionMode):
    """Makes pinned host memory, and refuses a generator of another device, which the dispatcher does not pass on."""

    def __init__(self, gpu: FakeGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.pin_memory or (func is torch.tensor and kwargs.pop("pin_memory", False)):
            return self.gpu.fake.from_tensor(args[0] if func is torch.Tensor.pin_memory else func(*args, **kwargs))
        out = func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and isinstance(generator, Generator) != (out.device.type == "cuda"):
            raise GPUError("the generator is on another device")
        return out


@contextlib.contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGPU]:
    """Run the GPU's code in this thread on fake tensors, with an A10G's memory."""
    gpu, make_generator = FakeGPU(), torch.Generator
    FakeCuda(monkeypatch)
    monkeypatch.setattr(
        torch, "Generator", lambda device: Generator() if torch.device(device).type == "cuda" else make_generator()
    )
    for name, double in {
        "empty_cache": lambda: None,
        "get_device_capability": lambda device: (8, 6),
        "mem_get_info": lambda device: (gpu.free_bytes(), A10G_BYTES),
        "reset_peak_memory_stats": gpu.reset_peak,
        "memory_allocated": lambda device: gpu.allocated_bytes,
        "max_memory_allocated": lambda device: gpu.peak_bytes,
    }.items():
        monkeypatch.setattr(torch.cuda, name, double)
    token_mask._bias_of_byte.cache_clear()
    with gpu.fake, gpu, _PinnedMemory(gpu):
        with gpu.reading():
            token_mask._bias_of_byte(CUDA)  # the largest step has loaded it before the first request
        yield gpu
    token_mask._bias_of_byte.cache_clear()
