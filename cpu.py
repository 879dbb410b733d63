"""What makes a model faster on a CPU without changing what it computes. Nothing here is for a GPU.

Each share of time named below was measured with SmolLM2-135M on two cores.
"""

import ctypes
from contextlib import contextmanager, suppress
from functools import partial


def keep_freed_memory() -> None:
    """Have glibc keep what torch frees: else every step asks the kernel for the same pages again,
    which took a fifth of the time of an update."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # mmap_max, trim, top_pad
            mallopt(option, value)


def choose_attention(path: str) -> str:
    """`grouped_attention` where the family's is plain, else eager: torch's fused attention decodes
    here at 4.4 ms a layer, not 0.45."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)
    # Other families add to it what would be lost: sinks, caps on the scores.
    plain = {"llama", "mistral", "qwen2", "qwen3"}
    return "grouped" if AutoConfig.from_pretrained(path).model_type in plain else "eager"


def grouped_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Eager attention where query heads share key heads (GQA, arXiv:2305.13245), without copies.

    query (batch, heads, n, dim), key and value (batch, key heads, length, dim) -> (batch, n, heads,
    dim). The queries of a key head are rows of one product; transformers' eager attention copies
    the keys and values once a query head, a sixth of the time a batch of 64 takes to decode.
    """
    import torch
    from torch.nn import functional

    batch, heads, n, dim = query.shape
    rows = heads // key.shape[1] * n
    scores = query.reshape(batch, -1, rows, dim) @ key.mT * scaling
    if attention_mask is not None:
        scores = scores.view(batch, -1, rows // n, n, key.shape[2]) + attention_mask[:, None]
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, dropout, module.training)
    mixed = weights.view(batch, -1, rows, key.shape[2]) @ value
    return mixed.view(batch, heads, n, dim).transpose(1, 2).contiguous(), None


@contextmanager
def draw_by_inversion():
    """Within, torch.multinomial draws one random number a row and looks it up in the cumulative
    distribution. Its own way takes one a vocabulary entry: on an AMD processor, a sixth of the time
    of a rollout."""
    import torch

    multinomial = torch.multinomial

    def draw(probabilities, num_samples, *args, generator=None, **kwargs):
        if num_samples > 1:
            return multinomial(probabilities, num_samples, *args, generator=generator, **kwargs)
        cumulative = probabilities.cumsum(-1)
        number = torch.rand(*cumulative.shape[:-1], 1, generator=generator)
        point = cumulative[..., -1:] * number
        return torch.searchsorted(cumulative, point, right=True)  # never one of probability 0

    torch.multinomial = draw
    try:
        yield
    finally:
        torch.multinomial = multinomial


def read_prompts_once(model, generate, input_ids, attention_mask, **options):
    """`generate`, but a prompt that comes more than once, as in a group, is read once."""
    import torch
    from transformers import DynamicCache

    batch, row = torch.stack([input_ids, attention_mask], 1).unique(dim=0, return_inverse=True)
    if len(batch) < len(input_ids):  # all but the last token, whose logits generate needs
        ids, mask = batch[:, 0, :-1], batch[:, 1, :-1]
        options["past_key_values"] = cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                  past_key_values=cache, logits_to_keep=1)
        cache.batch_select_indices(row)
    return generate(input_ids=input_ids, attention_mask=attention_mask, **options)


def speed_up(model):
    """The model, just loaded; what it generates and learns stays the same."""
    # The hidden states cut to the completion are no contiguous block, and for such the CPU copies
    # the vocabulary matrix once a sequence: a third of a training step.
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, hidden: (hidden[0].contiguous(),))
    if model.config._attn_implementation == "grouped":  # families whose cache is known
        model.generate = partial(read_prompts_once, model, model.generate)
    model.generate = draw_by_inversion()(model.generate)
    return model


def autocast_adapter(model):
    """The model with an adapter on it, writing on a CPU in the bfloat16 of its weights, as in
    training; the adapter's own float32 would cost a quarter more."""
    import torch

    if model.device.type == "cpu" and model.dtype == torch.bfloat16:
        model.generate = torch.autocast("cpu", torch.bfloat16)(model.generate)
    return model
