"""Every parameter and result of the public API has a type, so that `py.typed` promises something.

`nox -s lint` checks that the types are true; a call of a function without any would be an error under `mypy --strict`.
"""

import enum
import inspect

import pytest

import sam_split
import sam_split.training
from sam_split.training import finetuning

PUBLIC = {f"sam_split.{name}": getattr(sam_split, name) for name in sam_split.__all__}
PUBLIC |= {f"training.{name}": getattr(sam_split.training, name) for name in sam_split.training.__all__}
PUBLIC["finetuning.finetune"] = finetuning.finetune
# What transformers calls, with the signatures that it has there.
OVERRIDES = {"from_pretrained", "initialize_weights"}


def functions_of(thing):
    """A function itself; of a class its own public methods, its constructor, and what makes it a sequence."""
    if inspect.isfunction(thing):
        yield thing
    elif inspect.isclass(thing) and not issubclass(thing, enum.Enum):
        for name, member in vars(thing).items():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and name not in OVERRIDES:
                if not name.startswith("_") or name in ("__init__", "__call__", "__len__", "__getitem__"):
                    yield function


def untyped(function):
    """Names of the parameters without a type, and "return"."""
    signature = inspect.signature(function)
    names = [name for name, given in signature.parameters.items() if given.annotation is inspect.Parameter.empty]
    if signature.return_annotation is inspect.Signature.empty and function.__name__ != "__init__":
        names.append("return")
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions_are_typed(name):
    found = {function.__qualname__: untyped(function) for function in functions_of(PUBLIC[name])}
    assert {function: names for function, names in found.items() if names} == {}


def test_an_untyped_function_is_seen():
    def partly(given: int, missing, *more):
        return given

    assert untyped(partly) == ["missing", "more", "return"]
