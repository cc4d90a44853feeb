"""The image encoder's frozen first layers, computed once."""

import torch
from torch import nn

from .checks import check_layers


@torch.no_grad()
def prefix_hidden_states(model, pixel_values, layers):
    """Tokens (B, H, W, C) after the first `layers` layers of the image encoder, to be kept for `drop_prefix`."""
    encoder = model.vision_encoder
    check_layers(encoder, layers)
    hidden_states = encoder.patch_embed(pixel_values)
    if encoder.pos_embed is not None:
        hidden_states = hidden_states + encoder.pos_embed
    for layer in encoder.layers[:layers]:
        hidden_states, _ = layer(hidden_states)
    return hidden_states


class PassThrough(nn.Module):
    """Stands where a dropped layer was, so that the others keep their names."""

    def forward(self, hidden_states, output_attentions=False):
        return hidden_states, None


def drop_prefix(model, layers):
    """Take away, in place, what `prefix_hidden_states` computed: its tokens become the model's `pixel_values`.

    The layers that stay keep their numbers, so an adapter trained this way fits the whole model.
    """
    encoder = model.vision_encoder
    check_layers(encoder, layers)
    encoder.patch_embed, encoder.pos_embed = nn.Identity(), None
    for index in range(layers):
        encoder.layers[index] = PassThrough()
    return model
