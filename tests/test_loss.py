"""What is differentiated where a model says nothing, and weights that are not plain tensors."""

import pytest
import torch
from torch import nn

import bursar
from bursar.errors import BadInput
from bursar.workload.resolve import loss_of_output


class Returns(nn.Module):
    """A model that returns what ``shape`` makes of its output."""

    def __init__(self, shape):
        super().__init__()
        self.layer, self.shape = nn.Linear(4, 2), shape

    def forward(self, x, **more):
        return self.shape(self.layer(x))


class Output:
    def __init__(self, loss):
        self.loss = loss


X = torch.arange(12.0).view(3, 4)


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        (lambda y: y, torch.Tensor.mean),
        (lambda y: {"logits": y, "loss": y.sum()}, torch.Tensor.sum),
        (lambda y: Output(y.sum()), torch.Tensor.sum),
        (lambda y: (y, y.sum()), torch.Tensor.sum),  # the one scalar
        (lambda y: (y.detach().sum(), y), torch.Tensor.mean),  # a scalar without a gradient is none
        (lambda y: {"a": [y.argmax(), y]}, torch.Tensor.mean),
    ],
)
def test_the_loss_is_the_models_own_else_its_scalar_else_the_mean(shape, wanted):
    model = Returns(shape)
    for batch in (X, (X,), {"x": X}):
        torch.testing.assert_close(loss_of_output(model, batch), wanted(model.layer(X)))


def test_an_output_without_a_gradient_says_so():
    with pytest.raises(BadInput, match="is every parameter frozen"):
        loss_of_output(Returns(lambda y: y.detach()), X)


@pytest.mark.parametrize("on", [None, "cpu"])
def test_a_weight_that_torchao_quantised_is_its_codes_and_scales(on):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is an extra")
    B, n, r = 8, 64, 4

    class LoRA(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Sequential(nn.Linear(n, n, bias=False)).requires_grad_(False)
            quantization.quantize_(self.base, quantization.Int8WeightOnlyConfig())
            self.down, self.up = nn.Linear(n, r, bias=False), nn.Linear(r, n, bias=False)

        def forward(self, x):
            return self.base(x) + self.up(self.down(x))

    model = LoRA()
    weight = model.base[0].weight
    held = sum(t.nbytes for t in (getattr(weight, name) for name in weight.__tensor_flatten__()[0]))
    assert n * n < held < 2 * n * n  # a byte per weight, scales besides
    ledger = bursar.step(model, torch.randn(B, n), on=on)
    adapters = 2 * B * n * r
    assert ledger.flops.forward == 2 * B * n * n + 2 * adapters
    assert ledger.flops.backward == 3 * adapters  # the base is frozen and comes first: no gradient goes through it
    assert ledger.memory.between_steps["parameters"] == held + 4 * 2 * n * r
    assert not ledger.uncounted
    assert type(model.base[0].weight) is type(weight)
