import gc
import threading

import pytest
import torch

from pipeline.memory import Recycler


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_empty_is_writable_memory_of_the_shape(dtype: torch.dtype) -> None:
    tensor = Recycler().empty((2, 3, 5), dtype)
    assert (tensor.shape, tensor.dtype) == ((2, 3, 5), dtype)
    assert tensor.fill_(7).sum() == 210


def test_memory_serves_again_when_its_tensor_is_gone() -> None:
    recycler = Recycler()
    first = recycler.empty((1000,), torch.uint8)
    address = first.data_ptr()
    assert recycler.empty((1000,), torch.uint8).data_ptr() != address
    del first
    again = [recycler.empty((1000,), torch.uint8) for _ in range(2)]
    assert address in [tensor.data_ptr() for tensor in again]


def test_free_memory_is_counted_as_it_comes_and_goes() -> None:
    recycler = Recycler(max_free_bytes=1000)
    for _ in range(3):
        tensor = recycler.empty((1000,), torch.uint8)
        assert recycler._free_bytes == 0
        del tensor
        assert recycler._free_bytes == 1000


def test_memory_may_come_back_while_some_is_taken() -> None:
    """Garbage is collected at any time, in the thread that holds the lock as well."""
    recycler = Recycler()
    tensors = [recycler.empty((1000,), torch.uint8)]

    def collect() -> None:
        with recycler._lock:
            tensors.clear()

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    assert recycler._free_bytes == 1000


def test_views_numpy_arrays_and_gradients_keep_memory_alive() -> None:
    """Whatever can still read the memory keeps it from being given to another tensor."""
    recycler = Recycler()
    base = recycler.empty((8,), torch.float32).fill_(3)
    address = base.data_ptr()
    weight = torch.ones(8, requires_grad=True)
    product = (weight * base).sum()  # autograd saves `base`
    view, array = base[2:].view(2, 3), base.numpy()
    for name in ("base", "view", "array"):
        if name == "base":
            del base
        elif name == "view":
            del view
        else:
            del array
        gc.collect()
        assert recycler.empty((8,), torch.float32).fill_(9).data_ptr() != address, f"after {name}"
    product.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3] * 8
    del product
    found = [recycler.empty((8,), torch.float32) for _ in range(3)]
    assert address in [tensor.data_ptr() for tensor in found]


def test_free_memory_is_bounded() -> None:
    recycler = Recycler(max_free_bytes=2000)
    tensors = [recycler.empty((1000,), torch.uint8) for _ in range(5)]
    del tensors
    assert recycler._free_bytes == 2000
