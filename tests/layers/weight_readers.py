"""Modules that read the weights of their layers, each in a way of its own, plain and adapted."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers

E = 8


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(E, E)


class Attention(nn.Module):
    """Reads the weights of its layers in the way that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k = nn.Linear(E, E), nn.Linear(E, E)
        self.both = nn.Linear(E, 2 * E, bias=False)
        self.both_bias = nn.Parameter(torch.randn(2 * E))
        self.deep = Deep()
        self.several = nn.ModuleList([nn.Linear(E, E), nn.Linear(E, E)])
        self.out = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        ways = (
            self.linear_with_another_bias, self.linear_with_a_computed_bias, self.linear_without_a_bias,
            self.linear_with_its_own_bias, self.in_a_function, self.deeper_inside, self.of_a_variable,
            self.called_and_read, self.transposed, self.in_chunks, self.stacked, self.as_a_convolution,
            self.in_attention,
        )  # fmt: skip
        return self.out(torch.tanh(ways[WAYS.index(self.how)](x)))

    def linear_with_another_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.both.weight, bias=self.both_bias)[..., E:]

    def linear_with_a_computed_bias(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.q.weight, bias=torch.cat((self.k.bias[:4], self.q.bias[4:])))

    def linear_without_a_bias(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.q.weight.dtype), self.q.weight)

    def linear_with_its_own_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.weight, self.q.bias)

    def in_a_function(self, x: Tensor) -> Tensor:
        return project(self.q, x)

    def deeper_inside(self, x: Tensor) -> Tensor:
        return F.linear(x, self.deep.fc.weight)

    def of_a_variable(self, x: Tensor) -> Tensor:
        for layer in self.several:
            x = F.linear(x, layer.weight, layer.bias)
        return x

    def called_and_read(self, x: Tensor) -> Tensor:
        return self.q(x) + F.linear(self.k(x), self.q.weight)

    def transposed(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.q.weight.t()) + self.q.bias

    def in_chunks(self, x: Tensor) -> Tensor:
        parts = self.both.weight.chunk(2)
        return torch.einsum("...k,nk->...n", x, parts[1]) + torch.matmul(x, parts[0].t())

    def stacked(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.q.weight, self.k.weight]))[..., 4:-4]

    def as_a_convolution(self, x: Tensor) -> Tensor:
        return F.conv1d(x.transpose(-1, -2), self.q.weight.unsqueeze(-1), self.q.bias).transpose(-1, -2)

    def in_attention(self, x: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            x, x, x, E, 2, None, torch.cat([self.q.bias, self.k.bias, self.deep.fc.bias]), None, None, False, 0.0,
            self.several[0].weight, self.several[0].bias, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.deep.fc.weight,
        )[0]  # fmt: skip


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(E, E)


class Transposed(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.q.weight.T


WAYS = [name for name, value in vars(Attention).items() if callable(value) and name[0] != "_" and name != "forward"]


def model_of(how: str, **config: Any) -> nn.Sequential:
    return slora.inject(plain(how), slora.SelectiveLoRAConfig(**{"r": 2, "inactive": "exact", **config}))


def plain(how: str) -> nn.Sequential:
    torch.manual_seed(1)
    attention = Transposed() if how == "transposed_attribute" else Attention(how)
    return nn.Sequential(nn.Linear(E, E), attention)


def inputs() -> Tensor:
    return torch.randn(3, 5, E, requires_grad=True)


def randomised(model: nn.Module) -> nn.Module:
    for i, (_, layer) in enumerate(adapted_layers(model)):
        nn.init.normal_(layer.lora_B, std=0.3)
        with torch.no_grad():
            # Every third block is off.
            layer.gate.fill_(0.05 if i % 3 == 2 else 0.15)
    return model
