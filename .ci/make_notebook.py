"""Write reasoning_model_grpo.ipynb from the cells below: python .ci/make_notebook.py

The notebook only calls the scripts, so it has no code that could drift from them. A test compares
the checked-in file with what this makes, and runs its cells, but for those tagged `colab-only`
(they need Colab, Drive or the network), with the settings cell replaced by a tiny budget.
"""

from pathlib import Path

import nbformat

REPO = "https://github.com/OWNER/reasoning-grpo"
NAME = "reasoning_model_grpo.ipynb"
BADGE = (f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
         f"({REPO.replace('https://github.com', 'https://colab.research.google.com/github')}"
         f"/blob/main/{NAME})")

CELLS = [  # (kind, text): markdown, code, or code with a tag
    ("markdown", f"""
# Teach a small chat model to reason, with GRPO

{BADGE}

1. *Runtime → Change runtime type → T4 GPU* (or any other; without a GPU a small model is trained).
2. Put the address of the project into `REPO` below, if it is not there yet.
3. *Runtime → Run all.* Drive asks for permission once.
4. **After a disconnect: run all again.** The run is kept in Drive, and goes on where it was.

What you see at the end: accuracy on held-out questions before and after, a picture, an answer.
"""),
    ("settings", f"""
REPO = "{REPO}"
RUN = "/content/drive/MyDrive/reasoning-grpo/first-run"  # new options want a new name
OPTIONS = "--max-steps 60 --eval-questions 100 --save-steps 10"  # README.md has them all
"""),
    ("colab-only", """
import shutil
from google.colab import drive

drive.mount("/content/drive")
!test -d /content/reasoning-grpo || git clone -q {REPO} /content/reasoning-grpo
%cd /content/reasoning-grpo
gpu = shutil.which("nvidia-smi")
which = "requirements.txt" if gpu else "requirements-cpu.txt"
!pip install -q -r {which}
assert _exit_code == 0, "stopped: see the line above"
"""),
    ("markdown", """
## Train

The scripts run as processes of their own, so the GPU's memory is free again when they end, and this
notebook needs no restart after the install. (If you `import torch` here yourself and had done so
before the install, restart the session first.) If you interrupt the cell, or the session ends, run
it again: it goes on from the last checkpoint, one every `--save-steps`.
"""),
    ("code", """
import os

options = OPTIONS + " --resume" * os.path.isfile(f"{RUN}/args.json")
!python reasoning_model_grpo.py {options} --output-dir "{RUN}"
assert _exit_code == 0, "stopped: see the line above"
"""),
    ("markdown", "## Look"),
    ("code", """
import json
from IPython.display import Image, display

with open(f"{RUN}/evaluation.json") as file:
    evaluation = json.load(file)
for change in evaluation["changes"]:
    print(f"{change}: {evaluation['changes'][change]['words']}")
display(Image(f"{RUN}/progress.png"))
"""),
    ("markdown", """
## Ask

`--samples 8` votes over eight answers, `--compare` asks the untrained model, too, and `--file` asks
many questions while the model is loaded once.
"""),
    ("code", """
import shlex

QUESTION = "Anna has 3 boxes with 4 pens each. How many pens does she have?"
!python infer.py --adapter "{RUN}/grpo_saved_lora" {shlex.quote(QUESTION)}
"""),
    ("markdown", """
## Keep

The run is in Drive already. This downloads the adapter, too.
"""),
    ("colab-only", """
import shutil
from google.colab import files

files.download(shutil.make_archive("/content/adapter", "zip", f"{RUN}/grpo_saved_lora"))
"""),
    ("markdown", """
## Your own

Each with a new name for `RUN`; then *Run all*.

- Questions: put a file with the columns `question` and `answer` into Drive, and add
  `--dataset /content/drive/MyDrive/FILE.jsonl` to `OPTIONS`.
- A reward: write a function into a cell above *Train* that begins with `%%writefile my_rewards.py`,
  and add `--reward-funcs correctness_reward_func my_rewards.py:NAME`.
- A model: `--model Qwen/Qwen2.5-1.5B-Instruct`.
"""),
]


def build() -> str:
    """The notebook as text; the same text every time."""
    cells = []
    for i, (kind, text) in enumerate(CELLS, 1):
        new = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        tags = {"tags": [kind]} if kind in ("settings", "colab-only") else {}
        cells.append(new(text.strip(), id=f"cell-{i}", metadata=tags))
    metadata = {"accelerator": "GPU", "colab": {"gpuType": "T4", "provenance": []},
                "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    book = nbformat.v4.new_notebook(cells=cells, metadata=metadata)
    nbformat.validate(book)
    return nbformat.writes(book) + "\n"


if __name__ == "__main__":
    (Path(__file__).resolve().parents[1] / NAME).write_text(build(), encoding="utf-8")
