"""A whole run with torch.compile, as a GPU has it, beside the same run without."""
import pytest
import torch

import train_gpt
from helpers import flat, losses, needs_compiler, train

# members with a teacher and without, two stages, a last batch that is not full, rows that remember;
# no decay that has the sign of an update of about 0
SETTINGS = ["--track=cpu", "--num_models=3", "--window_schedule=0:0.25:0.5,0.5:0.5:1",
            "--dropout=0", "--cautious=false", "--final_mixture=learned", "--row_memory=true"]

pytestmark = needs_compiler


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(the run without, the run with torch.compile, graphs compiled until each member's end)."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    graphs = []
    train_member = train_gpt.train_member

    def counted(*arguments):
        result = train_member(*arguments)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return result

    eager = train(folder, *SETTINGS)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    patch.setattr(train_gpt, "train_member", counted)
    compiled = train(folder, *SETTINGS, "--compile=true", "--compile_model=true")
    patch.undo()
    return eager, compiled, graphs


def test_compiled_run_has_the_losses_of_the_eager_one(runs):
    eager, compiled, _ = runs
    assert len(eager.steps) > 30
    assert flat(losses(compiled)) == pytest.approx(flat(losses(eager)), rel=1e-3,
                                                    abs=1e-3)


def test_it_is_compiled_and_says_so(runs):
    eager, compiled, graphs = runs
    assert "compile on" in compiled.log and "compile off" in eager.log
    assert compiled.result["compile_seconds"] > 0 and eager.result["compile_seconds"] == 0
    # the model in two stages, in training and in evaluation; loss; log p
    assert graphs[0] >= 4


def test_later_members_compile_the_teacher_only(runs):
    """Its forward and the loss with it: the third member compiles nothing."""
    _, _, graphs = runs
    assert graphs[0] < graphs[1] == graphs[2]


def test_no_function_fell_back_to_eager(runs):
    """Beyond a limit of recompilations dynamo gives up, and says so only in a warning."""
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and not counters["unimplemented"]
