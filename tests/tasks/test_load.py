"""The float model of a config: weights under the names of the model as it was built, and of its plain layers."""

import pytest
import safetensors.torch
import torch
from torch import nn

from jpq.tasks.load import load_plain_or_own
from jpq.tracing.decompose import decompose
from jpq.types import JpqError


class Net(nn.Module):
    """Attention and a GRU, both of which jpq replaces by plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.rnn, self.head = nn.GRU(8, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(self.attention(x, x, x)[0])[0][:, -1])


def new_net(seed):
    torch.manual_seed(seed)
    return Net().eval()


def test_weights_that_a_run_kept_fit_its_model_though_it_was_decomposed(tmp_path):
    x, path = torch.randn(2, 5, 8), tmp_path / "float.safetensors"
    trained = new_net(0)
    safetensors.torch.save_file(decompose(trained, x).state_dict(), path)
    plain, _ = load_plain_or_own(new_net(1), "mine:net", path, x)
    torch.testing.assert_close(plain(x), trained(x))


def test_weights_of_the_model_itself_are_loaded_into_it(tmp_path):
    x, path = torch.randn(2, 5, 8), tmp_path / "mine.safetensors"
    trained, model = new_net(0), new_net(1)
    safetensors.torch.save_file(trained.state_dict(), path)
    assert load_plain_or_own(model, "mine:net", path, x) == (None, ())
    assert torch.equal(model(x), trained(x))


def test_weights_of_neither_are_refused_by_the_names_of_the_model_itself(tmp_path):
    x, path = torch.randn(2, 5, 8), tmp_path / "other.safetensors"
    safetensors.torch.save_file(nn.Linear(8, 3).state_dict(), path)
    with pytest.raises(JpqError, match=r"do not fit the model.*in_proj_weight"):
        load_plain_or_own(new_net(0), "mine:net", path, x)
    with pytest.raises(JpqError, match="do not fit the model"):
        load_plain_or_own(new_net(0), "mine:net", path, torch.zeros(2, 3))
