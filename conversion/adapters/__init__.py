"""LoRA and DoRA adapters: carried between q, k, v and qkv, and merged into their base."""
