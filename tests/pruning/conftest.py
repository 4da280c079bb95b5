import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors of these tests are too small for threads to pay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
