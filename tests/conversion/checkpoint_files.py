"""Transformers folders as people have them, and what a converted one holds."""

import json

import torch
from safetensors.torch import save_file

from conversion.key_map import DROPPED
from conversion.tensors import same_bits
from sam_split import CODE_FILES

FILES = {
    "LICENSE",
    "README.md",
    "config.json",
    *CODE_FILES,
    "model.safetensors",
    "preprocessor_config.json",
}


def stock_state(theirs):
    return {key: tensor for key, tensor in theirs.state_dict().items() if key not in DROPPED}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert same_bits(ours[key], theirs[key]), key


def as_is(folder, state):
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def with_duplicate(folder, state):
    (key, twin), *_ = DROPPED.items()
    as_is(folder, {**state, key: state[twin].clone()})


def as_bin(folder, state):
    torch.save(state, folder / "pytorch_model.bin")


def in_shards(folder, state, save=save_file, name="model-{:05d}-of-00003.safetensors", index="model.safetensors"):
    keys, weight_map = sorted(state), {}
    for number in range(3):
        shard = name.format(number + 1)
        save({key: state[key] for key in keys[number::3]}, folder / shard)
        weight_map |= dict.fromkeys(keys[number::3], shard)
    (folder / f"{index}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def in_bin_shards(folder, state):
    in_shards(folder, state, torch.save, "pytorch_model-{:05d}-of-00003.bin", "pytorch_model.bin")
