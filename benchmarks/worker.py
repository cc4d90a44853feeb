"""One process that measures one peer in one case, a call at a time, as the parent asks on its standard input.

`python -m benchmarks.worker JOB` answers each line, "call", "flops", "profile" or "gemm", with one line of JSON.
"""

import json
import os
import sys
import traceback
from pathlib import Path

# How long a round lasts at least, in seconds; shorter calls are repeated.
ROUND = 1.0
# Values of an output that are sent back, to be compared with the other peers'.
SAMPLE = 512


def main():
    # Libraries print: their words go to standard error, and the parent reads answers only.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.argv[1])

    def answer(**fields):
        print(json.dumps(fields), file=answers)

    def attempt(function):
        try:
            return function()
        except Exception as error:
            traceback.print_exc()
            answer(error=": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]]))

    worker = attempt(lambda: Worker(job))
    if worker is None:
        sys.exit(1)
    answer(ready=True)
    for line in sys.stdin:
        fields = attempt(getattr(worker, line.strip()))
        if fields is not None:
            answer(**fields)


class Worker:
    def __init__(self, job: dict):
        if job["device"] == "cpu" and job["memory_limit"]:
            import resource  # not on Windows

            resource.setrlimit(resource.RLIMIT_DATA, (job["memory_limit"], job["memory_limit"]))
        import torch

        from . import meters

        self.torch, self.meters, self.job, self.device = torch, meters, job, job["device"]
        self.meter = meters.meter(self.device, job["threads"])
        self.at_least = ROUND * job["scale"]
        self.before = None
        if job["peer"] != "gemm":
            from .tasks import Tasks

            self.tasks = Tasks(job["case"], job["peer"], self.device, Path(job["folder"]))
        self.meter.rest()

    def call(self) -> dict:
        """One round. Added memory counts from what the process held before its first call."""
        first = self.before is None
        if first:
            self.before = self.meter.memory()
        for _ in range(self.meter.warm_ups * first):
            self.tasks.call()
        output = None

        def call():
            nonlocal output
            output = None  # the last call's must not count as memory of this one
            output = self.tasks.call()

        measured = self.meter.measure(call, self.at_least)
        if measured["peak"] is not None:
            measured["added"] = measured["peak"] - self.before
        if first:
            values = output.float().flatten()
            measured["sample"] = values[:: max(1, values.numel() // SAMPLE)][:SAMPLE].tolist()
        output = None
        self.meter.rest()
        return measured

    def flops(self) -> dict:
        """Counted on shapes alone where a call is slow. The model is gone afterwards."""
        if self.job["case"]["task"] in ("load", "convert", "everything"):
            return {"flops": None}
        if self.device == "cpu":
            # Meta's prompt encoder asks which labels are -1; all or none, the shapes are the same.
            self.torch.fx.experimental._config.meta_nonzero_assume_all_nonzero = True
            self.tasks.model.to("meta")
            self.tasks.make_inputs("meta")
        return {"flops": self.meters.flops(self.tasks.call)}

    def profile(self) -> dict:
        return {"profile": self.meters.profile(self.tasks.call, self.device)}

    def gemm(self) -> dict:
        dtype = getattr(self.torch, self.job["case"]["dtype"])
        return {"peak": self.meters.gemm_peak(self.device, dtype)}


if __name__ == "__main__":
    main()
