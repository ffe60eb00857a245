import pytest
import torch

from gsae.harvest.transfer import HostCopies


def test_on_a_cpu_a_tensor_is_its_own_copy():
    x = torch.randn(3, 4)
    (copy,), arrive = HostCopies(x.device).start([x])
    arrive()
    assert copy is x


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_from_a_gpu_hold_what_was_computed_before_them_and_wait_for_nothing():
    x = torch.randn(512, 4096, device="cuda")
    copies = HostCopies(x.device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        taken = []
        for number in range(20):  # the device's memory is given back and used again while copies are under way
            product = (x @ x.T + number).relu()
            taken.append(copies.start([product, product.sum(dim=0)]))
            del product
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for number, ((product, total), arrive) in enumerate(taken):
        arrive()
        assert product.is_pinned()
        wanted = (x @ x.T + number).relu().cpu()
        torch.testing.assert_close(product, wanted)
        torch.testing.assert_close(total, wanted.sum(dim=0))
