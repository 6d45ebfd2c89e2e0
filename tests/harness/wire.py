"""Pickle between the test process and its ranks: tensors travel as plain bytes.

torch's own reducers send file descriptors of shared memory, and thousands of cells run out of them. Here a tensor is
copied: it arrives on the CPU, contiguous, detached, with its shape and dtype (bfloat16 included).
"""

import io
import pickle
from typing import Any

import torch


def _rebuild(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if not data:
        return torch.zeros(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        if type(obj) not in (torch.Tensor, torch.nn.Parameter):
            raise TypeError(f"a {type(obj).__name__} cannot leave its rank; send a plain tensor, e.g. its to_local()")
        values = obj.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        data = values.view(torch.uint8).numpy().tobytes() if values.numel() else b""
        return _rebuild, (data, obj.dtype, tuple(obj.shape))


def dumps(obj: Any) -> bytes:
    """Pickle `obj`; the tensors in it lose their graph, strides and sharing, and nothing else."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(obj)
    return buffer.getvalue()


def loads(data: bytes) -> Any:
    """The object that `dumps` pickled."""
    return pickle.loads(data)
