"""Two processes compute what one does: DDP and FSDP2, tensor parallelism through transformers.

The processes talk through gloo, so no accelerator is needed; they run one script, under torchrun.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import pixels, points, split_model, stock_model
from packaging.version import Version

FSDP2_ON_CPU = Version(torch.__version__) >= Version("2.13")  # that of torch 2.6 fails without an accelerator
SCRIPT = """
import sys
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModel

accelerator = Accelerator(cpu=True)  # DDP without a search for unused parameters
rank, inputs, results = accelerator.process_index, torch.load("inputs.pt"), {}


def load(**options):
    return AutoModel.from_pretrained("model", trust_remote_code=True, **options)


def train(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**{name: value[rank : rank + 1] for name, value in inputs.items()}).loss.backward()
    optimizer.step()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


results["ddp"] = train(accelerator.prepare(load().train()))

if "fsdp2" in sys.argv:
    # `prepare` shards on accelerators only, by this, which goes by our `_no_split_modules`.
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    model = fsdp2_prepare_model(accelerator, load().train())
    assert all(isinstance(part, FSDPModule) for part in (*model.vision_encoder.layers, model))
    results["fsdp2"] = train(model)

model = load(tp_plan="auto").eval()
weight = model.vision_encoder.layers[0].attn.q.weight
assert len(weight.to_local() if isinstance(weight, DTensor) else weight) == 16, "each process holds half of the rows"
with torch.no_grad():
    outputs = model(**inputs)
results["tensor"] = {"pred_masks": outputs.pred_masks, "iou_scores": outputs.iou_scores}
if accelerator.is_main_process:
    torch.save(results, "results.pt")
accelerator.end_training()
"""

pytestmark = pytest.mark.slow  # two processes that import torch and transformers


@pytest.fixture(scope="module")
def ours():
    return split_model(stock_model()).train()


@pytest.fixture(scope="module")
def inputs():
    labels = torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0)) > 0.5
    return {"pixel_values": pixels(), **points(1, 0), "labels": labels.long()}


@pytest.fixture(scope="module")
def results(ours, inputs, tmp_path_factory):
    work = tmp_path_factory.mktemp("distributed")
    ours.save_pretrained(work / "model")
    torch.save(inputs, work / "inputs.pt")
    (work / "script.py").write_text(SCRIPT)
    torchrun = "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": path}
    command = [sys.executable, "-m", *torchrun, "script.py", "fsdp2" if FSDP2_ON_CPU else ""]
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(work / "results.pt")


@pytest.mark.parametrize(
    "how",
    [
        "ddp",
        pytest.param("fsdp2", marks=pytest.mark.skipif(not FSDP2_ON_CPU, reason="torch 2.6 wants an accelerator")),
    ],
)
def test_data_parallel(ours, inputs, results, how):
    """One step on two images, one each, moves the weights as the mean of both images' losses does."""
    ours.zero_grad()
    halves = [ours(**{name: value[i : i + 1] for name, value in inputs.items()}).loss for i in (0, 1)]
    (sum(halves) / 2).backward()
    moved = 0
    for name, parameter in ours.named_parameters():
        if parameter.grad is not None:
            moved += 1
            step = -0.1 * parameter.grad
            torch.testing.assert_close(results[how][name] - parameter.detach(), step, rtol=1e-3, atol=1e-6)
    assert moved > 150


def test_tensor_parallel(ours, inputs, results):
    with torch.no_grad():
        expected = ours(**inputs)
    for name, value in results["tensor"].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
