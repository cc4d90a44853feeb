"""ViT-B with quantised weights on a CPU: their memory, the error, and a LoRA step. `python -m benchmarks.quantised`.

Weights are seeded and random, so the error is that of no trained model. Each row is a process of its own.
"""

import subprocess
import sys
import tempfile

ROWS = {
    "float32": "",
    "torchao, 8 bits": "TorchAoConfig(Int8WeightOnlyConfig())",
    "bitsandbytes, 8 bits": "BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=['mask_decoder'])",
    "bitsandbytes, 4 bits": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
    "llm_int8_skip_modules=['mask_decoder'])",
}


def main():
    if len(sys.argv) > 1:
        return row(*sys.argv[1:])
    print("| weights | MB | embedding's error | LoRA step, s | peak, MB |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        import torch

        from sam_split import SamSplitConfig, SamSplitModel

        torch.manual_seed(0)
        model = SamSplitModel(SamSplitConfig())
        model.save_pretrained(folder)
        del model
        for name in ROWS:
            subprocess.run([sys.executable, "-m", "benchmarks.quantised", name, folder], check=True)


def row(name, folder):
    import torch
    from peft import LoraConfig, get_peft_model
    from torchao.quantization import Int8WeightOnlyConfig  # noqa: F401 - named in ROWS
    from transformers import AutoModel, BitsAndBytesConfig, TorchAoConfig  # noqa: F401

    import sam_split  # noqa: F401 - makes AutoModel know the model

    from .meters import CPU

    meter = CPU(threads=1)
    options = {"quantization_config": eval(ROWS[name]), "device_map": "cpu"} if ROWS[name] else {}
    model = AutoModel.from_pretrained(folder, **options)
    size = sum(_bytes(parameter) for parameter in model.parameters())
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["q", "v"])).train()
    pixels = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(0))
    box = torch.tensor([[[100.0, 100.0, 600.0, 700.0]]])

    def step():
        adapted(pixel_values=pixels, input_boxes=box, multimask_output=False).pred_masks.square().mean().backward()

    # Trained before it is evaluated: for inference bitsandbytes packs 4-bit weights in a way that has no gradient.
    measured = meter.measure(step, 0)
    error = "-"
    if ROWS[name]:
        with torch.no_grad(), adapted.disable_adapter():
            embedding = adapted.eval().get_base_model().get_image_embeddings(pixels)
            exact = AutoModel.from_pretrained(folder).eval().get_image_embeddings(pixels)
        error = f"{(embedding - exact).norm() / exact.norm():.1%}"
    print(f"| {name} | {size / 1e6:.0f} | {error} | {measured['seconds']:.0f} | {measured['peak']:,.0f} |", flush=True)


def _bytes(parameter):
    if not hasattr(parameter, "__tensor_flatten__"):
        return parameter.numel() * parameter.element_size()
    return sum(_bytes(getattr(parameter, name)) for name in parameter.__tensor_flatten__()[0])


if __name__ == "__main__":
    main()
