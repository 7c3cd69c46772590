"""What is compiled, and what a compiled forward pass draws."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.train.engine.test_step import draws, small_run, views
from tests.train.model.test_checkpointing import batch_of, task_of
from train.engine.step import TrainStep
from train.model.draws import Draws
from train.optim.optimizers import OptimConfig, build_optimizer
from train.processes.distributed import World


class Masked(nn.Module):
    def forward(self, view: torch.Tensor, draws: Draws) -> torch.Tensor:
        return torch.where(draws.uniform("mask", view.shape[1]) < 0.5, view, 0)


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


def test_dropped_paths_break_no_graph_and_a_step_is_none_of_its_own() -> None:
    graphs, counts = list[torch.fx.GraphModule](), []

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    vit = [
        "views.size=32",
        "encoder.name=timm:test_vit",
        "encoder.image_size=32",
        "encoder.stem=imagenet",
        "encoder.width=64",
    ]
    config, task = task_of("simclr", World(), *vit, "encoder.drop_path=0.5")
    compiled = torch.compile(task.method, backend=backend)
    for step in range(4):
        batch = batch_of(config, World(), step)
        draws = Draws(0, step, batch.ids)
        assert torch.equal(compiled(batch.views, draws).z, task.method(batch.views, draws).z), f"step {step}"
        counts.append(len(graphs))
    assert counts[0] == 2, "the method's, and one of the draws handed to its encoder"
    assert counts[1:] == [3] * 3, "the latter again, with the step as an input"


@pytest.mark.parametrize(("settings", "graphs"), [(["run.compile=true"], False), (["run.cuda_graphs=true"], True)])
def test_cuda_graphs_are_asked_for_where_no_number_changes(settings: list[str], graphs: bool) -> None:
    _, task = task_of("simclr", World(), *settings)
    compiled: Any = task.communication.module
    options = compiled.get_compiler_config()
    assert options["triton.cudagraphs"] == options["triton.cudagraph_skip_dynamic_graphs"] == graphs


def test_a_step_done_twice_is_compiled_as_others_are() -> None:
    """Its hooks would be compiled too, with a break at each."""
    graphs = list[torch.fx.GraphModule]()

    def backend(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    method, _ = small_run("sgd")
    optimizer = build_optimizer(OptimConfig(name="sgd"), method)
    step = TrainStep(method, torch.compile(method, backend=backend), optimizer, torch.float32)  # type: ignore[arg-type]
    for number in range(3):
        step(views(number), draws(number), 0.1, 0.1, twice=None if number == 1 else World())
    assert len(graphs) == 1


def test_nothing_is_compiled_by_default() -> None:
    _, task = task_of("simclr", World())
    assert task.communication.module is task.method
