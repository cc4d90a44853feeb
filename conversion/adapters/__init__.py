"""LoRA and DoRA adapters: converted between q, k, v and qkv, imported from SAMed, merged into their base."""
