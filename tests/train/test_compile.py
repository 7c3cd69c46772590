"""What is compiled, and what a compiled forward pass draws."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.train.model.test_checkpointing import task_of
from train.model.draws import Draws
from train.processes.distributed import World


class Masked(nn.Module):
    def forward(self, view: torch.Tensor, draws: Draws) -> torch.Tensor:
        return torch.where(draws.uniform("mask", view.shape[1]) < 0.5, view, 0)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace the builtin `zlib.crc32")
def test_the_number_of_a_step_is_an_input_of_a_compiled_forward() -> None:
    """Were it a constant, all steps would draw what the first one drew, or each would be compiled."""
    graphs = list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    view, ids, counts = torch.arange(1.0, 65).view(4, 16), torch.arange(4), []
    compiled = torch.compile(Masked(), backend=backend)
    for step in range(6):
        assert torch.equal(compiled(view, Draws(0, step, ids)), Masked()(view, Draws(0, step, ids))), f"step {step}"
        counts.append(len(graphs))
    assert counts[2:] == [counts[2]] * 4, counts


@pytest.mark.parametrize(("settings", "graphs"), [(["run.compile=true"], False), (["run.cuda_graphs=true"], True)])
def test_cuda_graphs_are_asked_for_where_no_number_changes(settings: list[str], graphs: bool) -> None:
    _, task = task_of("simclr", World(), *settings)
    compiled: Any = task.communication.module
    options = compiled.get_compiler_config()
    assert options["triton.cudagraphs"] == options["triton.cudagraph_skip_dynamic_graphs"] == graphs


def test_nothing_is_compiled_by_default() -> None:
    _, task = task_of("simclr", World())
    assert task.communication.module is task.method
