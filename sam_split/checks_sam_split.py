"""What the model refuses: inputs that it would misunderstand, and checkpoints that do not fill it.

This file is copied into each saved model folder. It imports torch, transformers and the standard library. By itself it
reads no file, network or environment: `from_pretrained` is transformers', its result is checked here.
"""

import copy
import difflib
import functools
import inspect
import operator
from collections.abc import Mapping

import torch
import transformers

# What SamProcessor returns beside the model's arguments.
PASSED_BESIDE = frozenset({"original_sizes", "reshaped_input_sizes"})


class InputCheck:
    """Checks the arguments of one call, each for itself and against the others.

    A shape is spelt as in the docstrings, ("B", "P", "N", 2): a letter stands for one size wherever it occurs.

    Args:
        image, name: the pixels or the embedding of the images, if there are any. All other arguments must be for the
            same number of images and on the same device.
    """

    def __init__(self, image=None, name=None):
        self.sizes = {} if image is None else {"B": (image.shape[0], name)}  # letter -> size, the argument it is from
        self.device = None if image is None else (image.device, name)

    def __call__(self, name, tensor, *shapes, floating=False, real=False, broadcast=False, hint=""):
        """The shape of `shapes` that `tensor` has; any that broadcasts to it, with `broadcast`.

        Raises:
            TypeError: if it is no tensor.
            ValueError: if it has another shape or device, integers where `floating` is asked for, or bools or complex
                numbers where `real` is.
        """
        verb = "broadcast to" if broadcast else "be"
        expected = " or ".join(f"({', '.join(map(str, shape))})" for shape in shapes)
        hint = f"; {hint}" if hint else ""
        if not isinstance(tensor, torch.Tensor):
            cure = "call model(**inputs)" if isinstance(tensor, Mapping) else "make one with torch.as_tensor"
            raise TypeError(f"{name} must be a torch.Tensor {expected}, got {type(tensor).__name__}; {cure}")
        if floating and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating-point, got {tensor.dtype}{hint}")
        if real and (tensor.is_complex() or tensor.dtype == torch.bool):
            raise ValueError(f"{name} must be real numbers, got {tensor.dtype}")
        fitting = [shape for shape in shapes if self._fits(tensor.shape, shape, broadcast)]
        if not fitting:
            raise ValueError(
                f"{name} must {verb} {expected}, got {tuple(tensor.shape)}{self._clash(tensor, shapes)}{hint}"
            )
        if self.device is not None and tensor.device != self.device[0]:
            raise ValueError(
                f"{name} must be where {self.device[1]} is, on {self.device[0]}, got {tensor.device}; move all inputs "
                "to model.device"
            )
        self.device = self.device or (tensor.device, name)
        for letter, size in zip(fitting[0], tensor.shape, strict=False):
            if isinstance(letter, str):
                self.sizes.setdefault(letter, (size, name))
        return fitting[0]

    def _fits(self, given, shape, broadcast):
        expected = [self.sizes.get(size, (None,))[0] if isinstance(size, str) else size for size in shape]
        if broadcast:
            pairs = zip(given[::-1], expected[::-1], strict=False)
            return len(given) <= len(expected) and all(one in (1, other) for one, other in pairs)
        pairs = zip(given, expected, strict=False)
        return len(given) == len(expected) and all(other is None or one == other for one, other in pairs)

    def _clash(self, tensor, shapes):
        """What earlier arguments have fixed, for the message."""
        shapes = [shape for shape in shapes if len(shape) == tensor.ndim]
        known = dict.fromkeys(letter for shape in shapes for letter in shape if letter in self.sizes)
        return "".join(f"; {letter} is {self.sizes[letter][0]} in {self.sizes[letter][1]}" for letter in known)


def check_device(name, tensor, weight):
    """Raise ValueError unless a tensor is on the device of the weight that uses it, or that is offloaded ("meta")."""
    if weight.device.type != "meta" and tensor.device != weight.device:
        raise ValueError(f"{name} is on {tensor.device} and the model on {weight.device}; move it to model.device")


def check_values(name, tensor, meanings):
    """Raise ValueError if a tensor holds a value without a meaning; a compiler's tensors hold none to look at."""
    if torch.compiler.is_compiling() or tensor.device.type == "meta":
        return
    known = functools.reduce(operator.or_, (tensor == value for value in meanings))
    if not known.all():
        allowed = ", ".join(f"{value} ({meaning})" for value, meaning in meanings.items())
        found = tensor[~known][0].item()
        hint = "; divide a mask read from a PNG by 255" if found == 255 else ""
        raise ValueError(f"{name} must be one of {allowed}, got {found}{hint}")


def check_keywords(function, given):
    """Raise TypeError for a keyword that is no argument; those of processors, and None, mean nothing here."""
    unknown = [name for name, value in given.items() if value is not None and name not in PASSED_BESIDE]
    if unknown:
        known = [name for name in inspect.signature(function).parameters if name not in ("self", "kwargs")]
        close = difflib.get_close_matches(unknown[0], known, 1)
        cure = f"did you mean {close[0]!r}?" if close else f"it takes {', '.join(known)}"
        raise TypeError(f"{unknown[0]!r} is no argument of {function.__qualname__}; {cure}")


class CompleteLoading:
    """Loading that never leaves a weight random in silence; a base class that precedes `PreTrainedModel`."""

    def initialize_weights(self):
        """Initialise the weights, and note which ones changed.

        transformers calls this at the end of loading as well, for what the checkpoint lacks; 5.0.0 also initialised
        loaded weights that it did not recognise as loaded.
        """
        before = _samples(self)
        super().initialize_weights()
        after = _samples(self)
        self._initialised_tensors = [name for name in before if not torch.equal(before[name], after[name])]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Load a model as `PreTrainedModel.from_pretrained` does, and refuse a checkpoint that does not fill it.

        Raises:
            ValueError: if the checkpoint is a fused one, lacks a tensor, has one too many or one of another shape (the
                latter unless `ignore_mismatched_sizes=True`), or cannot be read; the message names tensor and cure.
            RuntimeError: if transformers replaced weights of the checkpoint by random ones.
        """
        with_info = kwargs.pop("output_loading_info", False)
        allow_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        quantization = kwargs.get("quantization_config")
        if getattr(quantization, "llm_int8_skip_modules", ...) is None:
            # bitsandbytes cannot pack the narrow layers of the mask decoder: they stay as they are by default.
            kwargs["quantization_config"] = copy.copy(quantization)
            kwargs["quantization_config"].llm_int8_skip_modules = ["mask_decoder"]
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            raise ValueError(
                f"the weights in {str(pretrained_model_name_or_path)!r} cannot be read ({error}); the file is damaged "
                "or cut short: download it again, or make it again with `sam-split convert SOURCE OUT`"
            ) from error
        _check_loading(model, str(pretrained_model_name_or_path), info, allow_mismatch)
        return (model, info) if with_info else model


def _samples(model):
    """Name -> the bits of the first eight elements of each tensor in memory; random initialisation changes them."""
    samples = {}
    for name, tensor in model.state_dict().items():
        tensor = getattr(tensor, "_local_tensor", tensor)  # a sharded tensor's part on this device
        if type(tensor) is torch.Tensor and tensor.device.type != "meta":  # quantised ones are never initialised
            samples[name] = tensor.flatten()[:8].clone().view(torch.uint8)
    return samples


def _check_loading(model, source, info, allow_mismatch):
    """Raise unless a model holds the tensors of a checkpoint, all of them and no others.

    Args:
        model: what was filled.
        source: what it was filled from, for the message.
        info: transformers' loading info: `missing_keys`, `unexpected_keys` and `mismatched_keys`.
        allow_mismatch: whether tensors of another shape are accepted.
    """
    fused = sorted(key for key in info["unexpected_keys"] if ".attn.qkv." in key)
    if fused:
        raise ValueError(
            f"{source!r} holds the fused {fused[0]!r}, and SamSplit has separate q, k and v; convert it once with "
            f"`sam-split convert {source} OUT` and load OUT"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source!r} lacks {len(missing)} of the model's tensors, the first is {missing[0]!r}; it is not a "
            "complete SamSplit model: make one with `sam-split convert SOURCE OUT`"
        )
    if info["mismatched_keys"] and not allow_mismatch:
        # transformers 5 lists (key, shape in the file, shape in the model), 4 the key alone.
        first = min(entry if isinstance(entry, tuple) else (entry,) for entry in info["mismatched_keys"])
        given = f" as {tuple(first[1])}" if len(first) > 1 else " in another shape"
        expected = tuple(model.state_dict()[first[0]].shape)
        raise ValueError(
            f"{source!r} holds {first[0]!r}{given}, and its config expects {expected}; make a folder in which the two "
            "agree with `sam-split convert SOURCE OUT`"
        )
    if info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        raise ValueError(
            f"{source!r} holds {len(extra)} tensors that its config has no place for, the first is {extra[0]!r}; make "
            "a folder in which the two agree with `sam-split convert SOURCE OUT`"
        )
    mismatched = {entry[0] if isinstance(entry, tuple) else entry for entry in info["mismatched_keys"]}
    if redrawn := sorted(set(model._initialised_tensors) - mismatched):
        raise RuntimeError(
            f"transformers {transformers.__version__} replaced {len(redrawn)} tensors of {source!r} by random ones, "
            f"the first is {redrawn[0]!r}; install another version"
        )
