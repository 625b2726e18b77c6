"""A batch norm of which neither half found a neighbour is put together again, whoever else reads its input."""

from __future__ import annotations

import pytest
import torch
from equivalence import relative_errors, training_step
from torch import Tensor, nn

import bnrestructure
from bnrestructure import ops
from bnrestructure.capture.regions import Options
from bnrestructure.plan.survey import take_survey


class _SharedInput(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        self.norm, self.conv, self.norm_first = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), norm_first

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(x)
        if self.norm_first:
            return torch.sigmoid(self.norm(x)), self.conv(x)
        y = self.conv(x)
        return torch.sigmoid(self.norm(x)), y


@pytest.mark.parametrize("norm_first", [True, False])
def test_with_another_reader_of_its_input(norm_first: bool) -> None:
    model = _SharedInput(norm_first)
    (region,) = take_survey(model, Options("reference")).regions
    targets = [node.target for node in region.after.graph.nodes]
    assert targets.count(ops.batch_norm) == 1
    assert ops.statistics not in targets
    assert ops.normalise not in targets
    (site,) = bnrestructure.explain(model, backend="reference").sites
    assert site.status == "kept"
    x = torch.randn(3, 4, 5, 5, dtype=torch.float64)
    restructured = bnrestructure.restructure(_SharedInput(norm_first).double(), backend="reference")
    restructured.load_state_dict(model.double().state_dict())
    assert max(relative_errors(training_step(restructured, x), training_step(model, x)).values()) < 1e-12
