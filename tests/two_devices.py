"""Two devices that are not there: their tensors lie in memory, but an operation on tensors of both is refused, as on two GPUs."""

from contextlib import contextmanager

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

aten = torch.ops.aten
INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
MOVES = (aten.copy_.default, aten._to_copy.default)


class There(Tensor):
    """A tensor that says it is on `device`; its numbers are `here`."""

    @staticmethod
    def __new__(cls, here, device):
        there = Tensor._make_wrapper_subclass(
            cls, here.size(), here.stride(), here.storage_offset(), dtype=here.dtype, device="cpu", dispatch_device=True
        )
        there.here, there.home = here, device
        return there

    is_meta = False

    def tolist(self):
        return self.cpu().tolist()

    def data_ptr(self):
        return self.here.data_ptr()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, dict(kwargs or {}))


def _run(func, args, kwargs):
    if func is torch.ops.prim.device.default:
        return args[0].home
    tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    devices = {t.device for t in tensors if t.dim() or t.device.type != "cpu"}
    if func in INDEXING:  # positions may be in memory
        devices -= {t.device for t in args[1] if t is not None and t.device.type == "cpu"} - {args[0].device}
    home = tensors[0].device if func in MOVES else next(iter(devices), torch.device("cpu"))
    if len(devices) > 1 and func not in MOVES:
        raise RuntimeError(f"{func}: tensors on {', '.join(map(str, devices))}")
    if kwargs.get("device") is not None:
        home, kwargs["device"] = torch.device(kwargs["device"]), torch.device("cpu")
    known = {id(t.here): t for t in tensors if isinstance(t, There)}
    args, kwargs = tree_map(lambda x: x.here if isinstance(x, There) else x, (args, kwargs))
    out = func(*args, **kwargs)

    def placed(t):
        if not isinstance(t, Tensor) or home.type == "cpu":
            return t
        return known[id(t)] if id(t) in known else There(t, home)

    return tree_map(placed, out)


class _Operations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, dict(kwargs or {}))


class _Numbers(TorchFunctionMode):
    """The two are named after "meta", on which PyTorch would make tensors of lists without their numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.tensor and (device := kwargs.pop("device", None)) is not None:
            return func(*args, **kwargs).to(device)
        if func is Tensor.__getitem__:
            at = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(torch.tensor(i) if isinstance(i, list) else i for i in at))
        return func(*args, **kwargs)


@contextmanager
def two_devices():
    with _Operations(), _Numbers():
        yield torch.device("meta:0"), torch.device("meta:1")
