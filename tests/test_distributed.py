"""Two processes compute what one does: DDP and FSDP2, tensor parallelism through transformers.

The processes talk through gloo, so no accelerator is needed; each script runs in fresh interpreters under torchrun.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import pixels, points, split_model, stock_model

TRAIN = """
import sys
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel

how, folder, inputs, out = sys.argv[1:]
# A batch uses the embeddings of its own kinds of prompt only; Trainer passes this by itself.
unused = DistributedDataParallelKwargs(find_unused_parameters=True)
accelerator = Accelerator(cpu=True, kwargs_handlers=[unused])
model = AutoModel.from_pretrained(folder, trust_remote_code=True).train()
if how == "ddp":
    model = accelerator.prepare(model)
else:  # accelerate's FSDP plugin wants an accelerator; this is the engine that it calls
    for part in (*model.vision_encoder.layers, model):
        fully_shard(part)
assert isinstance(model, {"ddp": DistributedDataParallel, "fsdp2": FSDPModule}[how]), type(model)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
rank = accelerator.process_index
mine = {name: value[rank : rank + 1] for name, value in torch.load(inputs).items()}
model(**mine).loss.backward()
optimizer.step()
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
if accelerator.is_main_process:
    torch.save(state, out)
accelerator.end_training()
"""

TENSOR_PARALLEL = """
import sys
import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModel

folder, inputs, out = sys.argv[2:]
model = AutoModel.from_pretrained(folder, trust_remote_code=True, tp_plan="auto", device_map=None).eval()
q = model.vision_encoder.layers[0].attn.q.weight
assert (q.to_local() if isinstance(q, DTensor) else q).shape[0] == 16, "each process holds half of the rows"
with torch.no_grad():
    outputs = model(**torch.load(inputs))
if torch.distributed.get_rank() == 0:
    torch.save({"pred_masks": outputs.pred_masks, "iou_scores": outputs.iou_scores}, out)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ours():
    return split_model(stock_model()).train()


@pytest.fixture
def run(ours, tmp_path):
    """What two processes of a script save, given the model's folder and `inputs`."""

    def run(script, how, inputs):
        ours.save_pretrained(tmp_path / "model")
        torch.save(inputs, tmp_path / "inputs.pt")
        (tmp_path / "script.py").write_text(script)
        arguments = "script.py", how, "model", "inputs.pt", "out.pt"
        torchrun = "torch.distributed.run", "--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"
        path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "ACCELERATE_USE_CPU": "1", "PYTHONPATH": path}
        command = [sys.executable, "-m", *torchrun, *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        return torch.load(tmp_path / "out.pt")

    return run


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_data_parallel(ours, run, how):
    """One step on two images, one each, moves the weights as the mean of both images' losses does."""
    torch.manual_seed(0)
    inputs = {"pixel_values": pixels(), **points(1, 0), "labels": (torch.rand(2, 3, 96, 96) > 0.5).long()}
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    after = run(TRAIN, how, inputs)
    halves = [ours(**{name: value[i : i + 1] for name, value in inputs.items()}).loss for i in (0, 1)]
    (sum(halves) / 2).backward()
    for name, parameter in ours.named_parameters():
        step = torch.zeros_like(parameter) if parameter.grad is None else 0.1 * parameter.grad
        torch.testing.assert_close(after[name], before[name] - step, rtol=1e-5, atol=1e-6)
    ours.zero_grad()
    moved = [name for name, value in before.items() if not torch.equal(after[name], value)]
    assert len(moved) > len(before) / 2


def test_tensor_parallel(ours, run):
    inputs = {"pixel_values": pixels(), **points(1, 0)}
    outputs = run(TENSOR_PARALLEL, "tensor", inputs)
    with torch.no_grad():
        expected = ours.eval()(**inputs)
    for name, value in outputs.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
