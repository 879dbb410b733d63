"""What a run asks of vLLM's engine, as JSON lines in the file that ENGINE_LOG names.

    ENGINE_LOG=asked.jsonl python .ci/engine_log.py reasoning_model_grpo.py --max-steps 3

A line is one of: "engine" (how it was made), "adapter" (a LoRA request was made), "asked" (it wrote
completions), "sleep", "wake_up". Adapters are told by a checksum, the sum of |lora_B|: it is 0 in a
fresh adapter and moves with every step. ENGINE_FAULT=no-adapter drops the adapter of every request
behind the caller's back, no-weights those that TRL sends, so that checks can be seen to fail.
"""

import importlib.abc
import importlib.util
import json
import os
import runpy
import sys
import time
from pathlib import Path


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls what waits for a module once that is imported."""

    def __init__(self):
        self.waiting = {}

    def find_spec(self, name, path=None, target=None):
        if name not in self.waiting:
            return None
        actions = self.waiting.pop(name)  # first, or the search below would come here again
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_then_act(module):
            run(module)
            for action in actions:
                action(module)

        spec.loader.exec_module = run_then_act
        return spec


FINDER = AfterImport()
sys.meta_path.insert(0, FINDER)


def after_import(name: str):
    """Decorates what is to be done with the module `name` once it is imported."""
    def keep(action):
        FINDER.waiting.setdefault(name, []).append(action)
        return action

    return keep


def log(kind: str, **what) -> None:
    if file := os.environ.get("ENGINE_LOG"):
        with open(file, "a") as out:
            print(json.dumps({"kind": kind, "time": round(time.time(), 2)} | what), file=out)


def checksum(tensors) -> float:
    """The sum of |lora_B| over (name, tensor) pairs."""
    return sum(float(tensor.detach().double().abs().sum())
               for name, tensor in tensors if "lora_B" in name)


def checksum_of(request) -> float | None:
    """That of the adapter in a LoRA request: tensors of a model, or a directory."""
    if request is None:
        return None
    if getattr(request, "lora_tensors", None):
        return checksum(request.lora_tensors.items())
    from safetensors.torch import load_file

    return checksum(load_file(Path(request.lora_path) / "adapter_model.safetensors").items())


policy = None  # the model that trains, once Unsloth has asked the engine for its adapter


@after_import("unsloth_zoo.vllm_utils")
def log_adapters(module) -> None:
    build = module._build_lora_request

    def build_request(model, directory, load_tensors, *given, **how):
        global policy
        policy = model
        log("adapter", source="model" if load_tensors else str(directory))
        return build(model, directory, load_tensors, *given, **how)

    module._build_lora_request = build_request


@after_import("vllm.entrypoints.llm")
def log_engine(module) -> None:
    LLM = module.LLM
    make, ask = LLM.__init__, LLM.generate

    def __init__(self, *given, **how):
        make(self, *given, **how)
        config = self.llm_engine.vllm_config
        log("engine", dtype=str(config.model_config.dtype).removeprefix("torch."),
            quantization=config.model_config.quantization,
            max_model_len=config.model_config.max_model_len,
            sleeps=config.model_config.enable_sleep_mode,
            eager=config.model_config.enforce_eager,
            share=round(config.cache_config.gpu_memory_utilization, 3),
            asked_backend=str(getattr(config.attention_config.backend, "name", None)),
            lora_rank=getattr(config.lora_config, "max_lora_rank", None))

    def generate(self, prompts, sampling_params=None, *given, lora_request=None, **how):
        wanted = checksum_of(lora_request)
        sent = None if os.environ.get("ENGINE_FAULT") == "no-adapter" else lora_request
        done = ask(self, prompts, sampling_params, *given, lora_request=sent, **how)
        one = sampling_params[0] if isinstance(sampling_params, list) else sampling_params
        of_model = checksum(policy.state_dict().items()) if policy is not None else None
        log("asked", completions=sum(len(reply.outputs) for reply in done),
            for_training=one.logprobs is not None, temperature=one.temperature,
            in_request=wanted, sent=checksum_of(sent), of_model=of_model,
            tokens=[list(output.token_ids) for reply in done for output in reply.outputs])
        return done

    LLM.__init__, LLM.generate = __init__, generate


@after_import("vllm.v1.executor.abstract")
def log_sleep(module) -> None:
    """Only what changes: callers wake it more often than it sleeps."""
    Executor = module.Executor
    sleep, wake_up = Executor.sleep, Executor.wake_up

    def log_asleep(self, *given, **how):
        before = self.is_sleeping
        sleep(self, *given, **how)
        if self.is_sleeping and not before:
            log("sleep")

    def log_awake(self, *given, **how):
        before = self.is_sleeping
        wake_up(self, *given, **how)
        if before and not self.is_sleeping:
            log("wake_up")

    Executor.sleep, Executor.wake_up = log_asleep, log_awake


@after_import("trl.generation.vllm_generation")
def lose_weights(module) -> None:
    if os.environ.get("ENGINE_FAULT") == "no-weights":
        module.VLLMGeneration.sync_weights = lambda self: None


def run_script(argv: list[str]) -> None:
    """Run the script argv[0] as `python argv...` would."""
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).resolve().parent)
    runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    sys.modules["engine_log"] = sys.modules["__main__"]
    run_script(sys.argv[1:])
