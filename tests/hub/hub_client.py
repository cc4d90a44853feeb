"""A process with the Hub client's environment that runs `sam-split` commands for a test, one after another.

huggingface_hub reads its environment once, at import, so the test's own process cannot be that client. One process
serves many tests: its clock does not wait but notes how long it was asked to, and it skips the load in a fresh
interpreter, which has tests of its own, unless a test wants it.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]


def environment(hub, home, **variables: str) -> dict[str, str]:
    """The Hub client's environment, in which this checkout is found."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**hub.environment(home), **variables, "PYTHONPATH": paths}


@dataclass
class Outcome:
    code: int
    out: str
    err: str
    slept: list[float] = field(default_factory=list)

    @property
    def text(self) -> str:
        return self.out + self.err


class Client:
    """The process. `transcript` is all that it ever printed."""

    def __init__(self, hub, home, **variables: str):
        self.transcript, self.home = "", Path(home)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, __file__]
        self.process = subprocess.Popen(command, env=environment(hub, home, **variables), cwd=home, **pipes)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()

    def start(self, *arguments, load=False):
        """Begin a command; `load` keeps the load in a fresh interpreter."""
        request = {"arguments": [str(argument) for argument in arguments], "load": load}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def finish(self) -> Outcome:
        watchdog = threading.Timer(300, self.process.kill)  # a hung client fails its test, not the whole run
        watchdog.start()
        outcome = Outcome(**json.loads(self.process.stdout.readline()))
        watchdog.cancel()
        self.transcript += outcome.text
        return outcome

    def left_behind(self, token: str) -> list[Path]:
        """Files under the client's home, logs and caches included, that hold the token."""
        paths = [path for path in self.home.rglob("*") if path.is_file()]
        return [path for path in paths if token.encode() in path.read_bytes()]

    def run(self, *arguments, load=False) -> Outcome:
        self.start(*arguments, load=load)
        return self.finish()


def serve():
    from conversion.cli import main
    from hub_card import push

    answers, real_load, slept = sys.stdout, push.load_in_fresh_process, []
    time.sleep = slept.append
    for line in sys.stdin:
        request, out, err = json.loads(line), io.StringIO(), io.StringIO()
        push.load_in_fresh_process = real_load if request["load"] else lambda *_: "not loaded: the test said so"
        slept.clear()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = main(request["arguments"])
            except SystemExit as error:  # argparse
                code = error.code
            except BaseException:
                traceback.print_exc()
                code = -1  # no command may end in a traceback
        answer = {"code": code, "out": out.getvalue(), "err": err.getvalue(), "slept": slept}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
