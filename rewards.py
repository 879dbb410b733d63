"""Answer formats, grading, and the reward functions of every recipe. Standard library only.

RL optimises what these functions say, mistakes included: numbers are compared exactly, never as
strings or floats; two answer blocks are a hedge and wrong; no regular expression can backtrack.
"""

import argparse
import difflib
import json
import os
import re
import shutil
import signal
import sys
import unicodedata
from collections import Counter
from contextlib import contextmanager, redirect_stdout, suppress
from decimal import Context, Decimal
from functools import partialmethod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, NoReturn


# ---- Formats and prompts: what the model is told, what a solution looks like ---------------------
class Format(NamedTuple):
    tags: tuple[str, str, str, str]  # reasoning open, reasoning close, answer open, answer close
    own_lines: bool  # strict format wants every tag alone on its line
    system_prompt: str

    def render(self, reasoning: str, answer: str) -> str:
        """Write a worked solution in this format."""
        r_open, r_close, a_open, a_close = self.tags
        nl = "\n" if self.own_lines else ""
        working = f"{r_open}{nl}{reasoning.strip()}{nl}{r_close}"
        return f"{working}\n{a_open}{nl}{answer.strip()}{nl}{a_close}"


FORMATS = {
    "xml": Format(
        ("<reasoning>", "</reasoning>", "<answer>", "</answer>"), own_lines=True,
        system_prompt="Respond in the following format:\n"
                      "<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>"),
    "cookbook": Format(
        ("<start_working_out>", "<end_working_out>", "<SOLUTION>", "</SOLUTION>"), own_lines=False,
        system_prompt="You are given a problem. Think about the problem and provide your working "
                      "out. Place it between <start_working_out> and <end_working_out>. Then, "
                      "provide your solution between <SOLUTION> and </SOLUTION>."),
}  # fmt: skip
SYSTEM_PROMPT = FORMATS["xml"].system_prompt


def build_prompt(question: str, fmt: str, shots=()) -> list[dict]:
    """The conversation to complete. `shots`: (question, rendered solution) pairs shown first."""
    messages = [{"role": "system", "content": FORMATS[fmt].system_prompt}]
    for shot, solution in shots:
        messages += [{"role": "user", "content": shot}, {"role": "assistant", "content": solution}]
    return [*messages, {"role": "user", "content": question}]


def render_prompts(tokenizer, prompts: list[list[dict]], template_kwargs=None) -> list[str]:
    """Conversations as the text the model is given, up to where its completion begins."""
    how = {"tokenize": False, "add_generation_prompt": True, **(template_kwargs or {})}
    return [tokenizer.apply_chat_template(prompt, **how) for prompt in prompts]


def fold_system(prompt: list[dict]) -> list[dict]:
    """The same conversation, its system text in front of the first user message."""
    system, first, *rest = prompt
    return [first | {"content": f"{system['content']}\n\n{first['content']}"}, *rest]


def refuses_system(tokenizer, template_kwargs=None) -> bool:
    """Whether the chat template raises on a system message, or drops it; other errors get out."""
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}
    try:
        return "Be brief." not in render_prompts(tokenizer, [[system, user]], template_kwargs)[0]
    except Exception:  # jinja2's TemplateError, and whatever a tokenizer makes of it
        render_prompts(tokenizer, [[user]], template_kwargs)
        return True


# ---- Finding the answer --------------------------------------------------------------------------
def completion_text(completion) -> str:
    """The text of a completion: a string, or a conversation's last message of the assistant."""
    if isinstance(completion, str):
        return completion
    said = [turn for turn in completion if turn.get("role", "assistant") == "assistant"]
    return message_text(said[-1]) if said else ""


def message_text(message: dict) -> str:
    """The text of one message: its content (ShareGPT's value), which may come in parts."""
    content = message.get("content", message.get("value"))
    if hasattr(content, "tolist"):  # pandas gives parts as an array
        content = content.tolist()
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def after_thinking(text: str) -> str:
    """What follows a leading `<think>...</think>`, opened in the prompt perhaps; "" if cut off."""
    thinking, closed, rest = text.partition("</think>")
    start = thinking.lstrip()
    if start.startswith("<think>"):
        return rest
    # What begins with a tag of ours is an answer: a later </think> makes none undone.
    ours = any(start.startswith(tag) for fmt in FORMATS.values() for tag in fmt.tags)
    return rest if closed and not ours else text


def extract_xml_answer(text: str) -> str:
    """The text of the last `<answer>` block, stripped; "" where there is none."""
    _, opened, rest = after_thinking(text).rpartition("<answer>")
    return rest.partition("</answer>")[0].strip() if opened else ""


def extract_hash_answer(text: str) -> str | None:
    """GSM8K's gold, the rest of the line after the last `####`; None where there is none."""
    _, mark, rest = text.rpartition("####")
    return rest.partition("\n")[0].strip() if mark else None


def answer_block(text: str, fmt: str = "xml") -> str | None:
    """The text of the one closed answer block; None where there is none, or more than one."""
    opening, closing = FORMATS[fmt].tags[2:]
    before, _, rest = after_thinking(text).partition(opening)
    inside, closed, after = rest.partition(closing)
    once = closed and opening not in rest and closing not in before + after
    return inside.strip() if once else None


# ---- Reading numbers: first, what is written otherwise and means the same ------------------------
_SAME = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width forms; hyphens; what can't be seen
_SAME |= str.maketrans("\u2010\u2011\u2212", "---", "\xad\u200b\u200c\u200d\u200e\u2060\ufeff")
_REWRITTEN = [(re.compile(pattern), plain) for pattern, plain in (
    (r"(?<!\w)[‒–](?=\S)", "-"),  # "–5", but neither "3–5" nor "– 5"
    (r"(?<=[0-9])(?:(?:\{,\}|,?\\[,!])(?>(?:\\!|\s)*)|[\u2009\u202f'’])(?=[0-9])", ","),  # 1'080
    (r"(?<=[0-9])(?>(?::00)+)(?![0-9:])", ""),  # "2:00"
    (r"(?<=[^\W\d_])\}?+\^\{?+[23]\}?+(?![0-9])", "²"),  # "cm^3", "\text{m}^{2}": a unit's power
    (r"[<>!~/]=", "≠"), ("…", "⋯"),  # a bound is no equation, and "0.3…" no number
    ("千[克米]", " km"),  # else 千 is a thousand
    (r"\bRs\b\.?", "₹"))]  # fmt: skip


def _plain(text: str) -> str:
    if len(text) > 10_000:  # what is so long is digits, or no number
        return text
    text = text.translate(_SAME)
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    return text


# Then the number. More than 100 characters on a side of its digits are prose, no sign or unit.
_AROUND = re.compile(r"([^0-9.]{0,100}+)(\.?+[0-9][0-9.,]*+)([^0-9]{0,100}+)")
_GROUPS = r"[1-9][0-9]{0,2}(?>(?:,[0-9]{3})+)|[1-9][0-9]?+(?>(?:,[0-9]{2}(?=,))+),[0-9]{3}"
_NUMBER = re.compile(rf"(?>(?:{_GROUPS}|[0-9]++)?)(?>(?:\.[0-9]++)?)")  # India's, too: 1,08,000
# LaTeX, Markdown and quotes around a number carry no value; nor does the sign of degrees or inches.
_MARKUP = re.compile(r"""\\(?:boxed|text|textbf|mathrm|mathbf)\{|\\[,;! ()\[\]]|\\(?=[$%])|\*\*"""
                     r"""|[}`"“”″]|~(?=\\?[A-Za-z])|\^\{?+\\circ""")  # fmt: skip
_SIGN = "$¢£¥৳฿\u20a0-\u20c0￠￡￥￦"  # of a currency; a "$" may be maths, too
_CURRENCY = re.compile(rf"(?:US |[A-Z]{{0,3}})[{_SIGN}]|USD|EUR|GBP|INR|CNY|RMB|JPY|AUD|CAD|CHF")
# Behind them a unit: words of any script, whose vowel signs and accents are no letters.
_UNIT = re.compile(rf"(?>(?:[\s.。।%°()'’{_SIGN}]|/?+[^\W\d_]++[\u0300-\u1fff]*+[-,/&;:!23]?+)*)")
# But a letter alone is a variable, unless it is an article ("72 a day"), names a kind ("8 D
# batteries", but "5 M people" are millions) or a unit. Of these only metres are squared.
_ALONE = r"(?![A-Za-z0-9_'’&]|\.[A-Za-z]|-\w\w|/o\b)"
_LETTER = rf"(?!a\s++\w\w|[AC-JLN-SU-Z]\s++[a-z]{{3}})[A-Za-zΑ-ω]{_ALONE}"
_VARIABLE = rf"(?!m|[ghslLtdpcAVWJNCFΩμ](?![²³])){_LETTER}"
_TERM = re.compile(rf"\A\W*+{_VARIABLE}|(?<![\w.'’&-])[xyz]{{1,3}}+{_ALONE}")
# In maths any letter by itself, and two ("$2ab$"), but for units that are set so in haste.
_TERM_IN_MATHS = re.compile(
    rf"\A\s*+(?:{_LETTER}|(?!(?:[cdkm]m|[km]g|m[il]|ft|in|yd|oz|lb|hr)\b)[a-z]{{2}}\s*+\$)")
# An equation: "2x = 72" says 36, "-x = 5" says -5; but "5 x 3 = 15" multiplies.
_ASKED = re.compile(rf"(?:[0-9²]\s*+[-+*/^·×]?+\s*+|\A[\s$(]*+-\s*+)(?![xX]\s*+[($0-9]){_VARIABLE}"
                    rf"|(?<![\w'’]){_VARIABLE}\s*+(?:[\^²³]|[-+*/·×÷]\s*+[0-9])|\bor\b")
# Several: "x = 71, y = 72", between whose "=" a value ends and a name begins.
_NEXT_EQUATION = re.compile(r",(?![0-9])|;|\n\s*+[^\s&]|\b(?:and|so|or)\b"
                            rf"|\A[-$]?+[0-9][0-9.,]*+[^\w+*·×/^-]++{_VARIABLE}\Z")
# Words change a number directly behind it: "5 thousand", "2 thirds", "72 or more", "9 of ten" ...
_COUNT = (r"(?:an?\s++(?:hundred|thousand|million|billion|dozen|half|third|quarter)|zero|one|two"
          r"|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
          r"|(?:twen|thir|fou?r|fif|six|seven|eigh|nine)(?:ty|teen))")  # fmt: skip
_NEXT_WORD = re.compile(
    r"(?i)\A\W*+(?:(?:(?:third|(?:four|fif|six|seven|eigh|nin|ten|twelf|[a-z]{1,9}(?:tie|teen))th"
    r"|(?:hundred|thousand|(?:b|tr|quadr|quint)illion)(?:th)?|lakh|crore|dozen)s?|tens|half|halves"
    rf"|and an?|squared|cubed|pi|or|plus|minus|not|bn|mn|of\s++{_COUNT}"
    r"|mil|mille|tausend|ribu|juta|oder|ou|или|сот(?:ен|ня|ни)?|трет(?:ь|и|ей))\b"
    r"|mil(?:l?iard|l?i?[oó]n|h[ãõ]|yo|ya)|тыс|млн|млрд|милли(?:он|ард)|дюжин|с половин"
    r"|[多余餘以或천만억백조반]|हज|लाख|करोड|सौ|ألف|آلاف|مليون|ملايين|مليار)|[半两]")
# ... and some anywhere: "72 dollars or more", "72 dollars and fifty cents", "2 hours and a half".
_LATER_WORD = re.compile(
    r"(?i)\b(?:(?:is|are)(?: not|n['’]t)|below zero|in (?:hundred|thousand|million|billion)s"
    r"|or (?:more|less|fewer|so)|(?:and|or|plus|minus|point|times|less|by|over|out of|to|remainder"
    r"|dollars?|cents?|feet|foot|inch(?:es)?|met(?:er|re)s?|pounds?|kilograms?|seconds?|minutes?"
    rf"|hours?|days?|weeks?|months?|years?)[,;]?+\s++{_COUNT})\b")


def parse_number(text) -> Decimal | None:
    """Read one number exactly, or None. Nothing is evaluated, solved, joined or chosen.

    >>> parse_number("x = $1,080.50 per month"), parse_number("5 thousand"), parse_number("2x = 72")
    (Decimal('1080.50'), None, None)
    """
    if isinstance(text, float):  # a JSON number: 1e+20 is an exact notation there
        text = f"{Decimal(str(text)):f}"
    left, equals, value = _plain(str(text)).rpartition("=")
    name, *steps = left.split("=")
    several = len(left) > 1000 or any(_NEXT_EQUATION.search(step.strip()) for step in steps)
    around = _AROUND.fullmatch(value.strip())
    if around is None or equals and (several or _ASKED.search(name)):
        return None
    before, digits, unit = around.groups()
    while before and unit and before[-1] + unit[0] in ("**", "__", "''", "‘’"):
        before, unit = before[:-1], unit[1:]
    if "$" in before and _TERM_IN_MATHS.match(unit):
        return None  # "$5m" is five million, "$5 m$" a term: units stand in \text{} there
    for char in set(unit) - set("²³ℓ"):  # such as 万, ½, ⁿ and 𝑥
        if char.isnumeric() or unicodedata.decomposition(char).startswith(("<su", "<font>")):
            return None
    unit = _MARKUP.sub(" ", unit)
    changed = any(words.search(unit) for words in (_TERM, _NEXT_WORD, _LATER_WORD))
    sign = _CURRENCY.sub("", _MARKUP.sub(" ", before), count=2).strip()
    number = _NUMBER.fullmatch(digits.rstrip("."))
    spelt = _UNIT.fullmatch(unicodedata.normalize("NFKC", unit))  # ㎡ and ℃ as letters
    readable = number and sign in ("", "+", "-") and spelt and not changed
    return Decimal(sign + number[0].replace(",", "")) if readable else None


def parse_gold(gold) -> Decimal | None:
    """Read a gold: one number, or the one after `####` in a whole solution. Equations are none."""
    marked = extract_hash_answer(gold) if isinstance(gold, str) else None
    text = gold if marked is None else marked
    return None if "=" in _plain(str(text)) else parse_number(text)


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in `text`, as lm-evaluation-harness' flexible-extract reads it, but
    as a value: "72.00" is 72, "72 ..." too, "2:00" is 2, and "10,80" is no number."""
    end = max(map(text.rfind, "0123456789０１２３４５６７８９"))
    tail = _plain(text[max(0, end - 9_999) : end + 1]).replace("$", "")
    runs = re.findall(r"-?+(?:(?<!\.)\.)?[0-9][0-9.,]*+", tail)  # "wait...72" is 72, ".5" a half
    return parse_number(runs[-1].rstrip(".,")) if runs else None


# ---- Grading -------------------------------------------------------------------------------------
def is_correct(completion, gold: str, *, mode: str = "strict", fmt: str = "xml") -> bool:
    """Whether a completion's number equals the gold, exactly: strict in the one answer block,
    flexible (for evaluation, no reward) there or, if that holds none, the last one of the text."""
    if mode not in ("strict", "flexible"):
        raise ValueError(f"mode must be 'strict' or 'flexible', not {mode!r}")
    text = completion_text(completion)
    number = parse_number(answer_block(text, fmt))
    if number is None and mode == "flexible":
        number = last_number(after_thinking(text))
    return number is not None and number == parse_gold(gold)


def answer_fault(text: str, gold: str, fmt: str = "xml") -> str | None:
    """The first reason why the answer earns nothing, or None where it is right."""
    block = answer_block(text, fmt)
    if block is None:
        n = max(after_thinking(text).count(tag) for tag in FORMATS[fmt].tags[2:])
        return f"{n} answer tags are a hedge" if n > 1 else "there is no closed answer block"
    number, wanted = parse_number(block), parse_gold(gold)
    if number is None:
        return f"the answer {block[:30]!r} is not one number"
    if wanted is None:
        return f"the gold {str(gold)[-30:]!r} is not one number"
    return None if number == wanted else f"the answer is {number:.30}, the gold is {wanted:.30}"


def format_fault(text: str, fmt: str = "xml", strict: bool = True) -> str | None:
    """The first reason why `text` breaks the format, or None. Strict: own lines, nothing around."""
    text, tags = after_thinking(text), FORMATS[fmt].tags
    for tag in tags:
        if text.count(tag) != 1:
            return f"{tag} occurs {text.count(tag)} times, not once"
    if sorted(tags, key=text.index) != list(tags):
        return "the tags are out of order"
    before, reasoning, between, answer, after = re.split("|".join(tags), text)
    lines = {line.strip() for line in text.split("\n")} if FORMATS[fmt].own_lines else tags
    faults = {
        "the reasoning is empty": not reasoning.strip(),
        "there is text between the two blocks": between.strip(),
        "the answer is empty": not answer.strip(),
        "there is text outside the two blocks": strict and (before.strip() or after.strip()),
        **{f"{tag} is not alone on its line": strict and tag not in lines for tag in tags},
    }
    return next((fault for fault, holds in faults.items() if holds), None)


def vote(texts: list[str], fmt: str) -> tuple[str | None, int]:
    """The most frequent number, first on a tie, and its votes (arXiv:2203.11171), or (None, 0)."""
    numbers = [parse_number(answer_block(text, fmt)) for text in texts]
    votes = Counter(number for number in numbers if number is not None).most_common(1)
    return (f"{votes[0][0]:f}", votes[0][1]) if votes else (None, 0)


# ---- Reward functions: TRL's signature, one float a completion -----------------------------------
# Their names label TRL's curves. It passes no `answer` where that column has another name.
def _pairs(completions, answer) -> list[tuple[str, str]]:
    golds = () if answer is None else answer
    if len(golds) != len(completions):
        raise ValueError(f"{len(completions)} completions but {len(golds)} answers in 'answer'")
    return [(completion_text(c), gold) for c, gold in zip(completions, golds)]


def correctness_reward_func(prompts, completions, answer=(), fmt="xml", **kwargs) -> list[float]:
    """1.0 where exactly one closed answer block holds exactly the gold number, else 0.0."""
    return [float(is_correct(text, gold, fmt=fmt)) for text, gold in _pairs(completions, answer)]


def int_reward_func(prompts, completions, fmt="xml", **kwargs) -> list[float]:
    """0.5 where the one answer block holds an integer, else 0.0."""
    numbers = [parse_number(answer_block(completion_text(c), fmt)) for c in completions]
    return [0.5 if n is not None and n == n.to_integral_value() else 0.0 for n in numbers]


def strict_format_reward_func(prompts, completions, fmt="xml", **kwargs) -> list[float]:
    """0.5 where the whole completion is one reasoning block, then one answer block, else 0.0."""
    return [0.5 * (format_fault(completion_text(c), fmt) is None) for c in completions]


def soft_format_reward_func(prompts, completions, fmt="xml", **kwargs) -> list[float]:
    """0.5 where both blocks are there in order, whatever stands around them, else 0.0."""
    faults = [format_fault(completion_text(c), fmt, strict=False) for c in completions]
    return [0.5 * (fault is None) for fault in faults]


def xmlcount_reward_func(prompts, completions, fmt="xml", **kwargs) -> list[float]:
    """0.125 a tag that occurs exactly once, less up to 0.1 for text after the last one; 0.0-0.5."""
    values, tags = [], FORMATS[fmt].tags
    for text in (after_thinking(completion_text(c)) for c in completions):
        once = sum(text.count(tag) == 1 for tag in tags)
        _, closed, tail = text.rpartition(tags[3])
        trailing = len(tail.strip()) if closed and not any(tag in tail for tag in tags) else 0
        values.append(max(0.0, 0.125 * once - min(0.1, 0.001 * trailing)))
    return values


def match_format_exactly(prompts, completions, fmt="cookbook", **kwargs) -> list[float]:
    """3.0 where the whole completion follows the format, else 0.0."""
    return [3.0 * (format_fault(completion_text(c), fmt) is None) for c in completions]


def match_format_approximately(prompts, completions, fmt="cookbook", **kwargs) -> list[float]:
    """+0.5 for each of the four elements that occurs exactly once, -0.5 for each other; -2 to 2."""
    texts = [after_thinking(completion_text(c)) for c in completions]
    return [sum(text.count(tag) == 1 for tag in FORMATS[fmt].tags) - 2.0 for text in texts]


def check_answer_correctness(prompts, completions, answer=(), fmt="cookbook", **kwargs):
    """3.0 exact, 1.5 within 10 %, 0.5 within 20 %, else -0.5, the cookbook's own: there a near miss
    in perfect format (6.5) earns more than a right answer without its reasoning block (4.5)."""
    values = []
    exact = Context(prec=60, Emin=-(10**9), Emax=10**9, traps=[])  # no long digits may raise
    for text, gold in _pairs(completions, answer):
        number, wanted, value = parse_number(answer_block(text, fmt)), parse_gold(gold), -0.5
        if number is not None and number == wanted:
            value = 3.0
        elif number is not None and wanted:  # of zero there is no near
            miss = exact.abs(exact.divide(exact.subtract(number, wanted), wanted))
            value = 1.5 if miss <= Decimal("0.1") else 0.5 if miss <= Decimal("0.2") else -0.5
        values.append(value)
    return values


def check_numbers_extraction(prompts, completions, answer=(), fmt="cookbook", **kwargs):
    """1.5 where the gold follows the one opening answer tag, closed or not, else 0.0."""
    _, _, opening, closing = FORMATS[fmt].tags
    values = []
    for text, gold in _pairs(completions, answer):
        before, _, rest = after_thinking(text).partition(opening)
        number = None if opening in rest else parse_number(rest.partition(closing)[0])
        values.append(1.5 if number is not None and number == parse_gold(gold) else 0.0)
    return values


REWARD_FUNCS = {func.__name__: func for func in (
    correctness_reward_func, int_reward_func, strict_format_reward_func, soft_format_reward_func,
    xmlcount_reward_func, match_format_exactly, match_format_approximately,
    check_answer_correctness, check_numbers_extraction)}  # fmt: skip


# ---- What the scripts share: one-line errors, options, the choice of the backend -----------------
def printable(text: str) -> str:
    """Without control characters: a model's or a file's text must not steer the terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else " " for c in text)


def stop(message: str) -> NoReturn:
    """End in one line that says what is wrong and what to type instead; exit code 2."""
    print(f"error: {' '.join(printable(str(message)).split())}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def did_you_mean(word: str, known) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f", did you mean {near[0]}?" if near else ""


class OneLineParser(argparse.ArgumentParser):
    """argparse, but an error is one line and names the nearest flag."""

    def error(self, message):
        if message.startswith("unrecognized arguments:"):
            wrong = message.split()[2].split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings]
            message = f"unknown option {wrong}{did_you_mean(wrong, flags)}; --help lists all"
        stop(message)


def number(kind, low, inclusive=True, below=float("inf")):
    """An argparse type: a number from `low` (or above it) to `below`, exclusive."""
    def read(text: str):
        value = kind(text)
        if low < value < below or inclusive and value == low:
            return value
        bound = f"at least {low}" if inclusive else f"above {low}"
        bound += f" and below {below}" * (below < float("inf"))
        raise argparse.ArgumentTypeError(f"{text} is not {bound}")
    read.__name__ = kind.__name__
    return read


def file_path(text: str) -> str:
    """An argparse type: a name that a file can have, its ~ expanded as a shell does."""
    if not text or max(map(len, os.fsencode(text).split(b"/"))) > 255 or "\0" in text:
        raise argparse.ArgumentTypeError(f"{text[:40]!r}... is no name a file can have")
    return os.path.expanduser(text)


def existing_path(text: str) -> str:
    """The same; where it exists, as FILE:function too, as it holds from any directory."""
    text = file_path(text)
    file, colon, function = text.rpartition(":")
    if Path(text).exists():
        return str(Path(text).resolve())
    return f"{Path(file).resolve()}:{function}" if colon and Path(file).is_file() else text


def in_a_cell(file: str | None) -> bool:
    """Whether the script `file` is a notebook's cell, not run by %run: sys.argv is the kernel's."""
    own = file is not None and Path(sys.argv[0]).name == Path(file).name
    return "ipykernel" in sys.modules and not own


def take_any_terminal() -> None:
    """Show a question mark for what a terminal or a log that is not UTF-8 can't show."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a notebook's takes all
            stream.reconfigure(errors="replace")


def end_at_ctrl_c(at_once: bool) -> None:
    """Whether Ctrl-C ends the process at once, as it must while libraries load: torch's start
    swallows the exception and leaves numpy broken. Otherwise it is a KeyboardInterrupt again. In
    IPython always the latter: a kernel lives on."""
    ways = [signal.default_int_handler, signal.SIG_DFL]
    ours = signal.getsignal(signal.SIGINT) is ways[not at_once]  # what the caller set stays
    if ours and "IPython" not in sys.modules:
        signal.signal(signal.SIGINT, ways[at_once])


def max_lora_rank(path: str | Path, fresh: int = 16) -> int:
    """The smallest rank of vLLM's kernels for the adapter in `path`, or for a `fresh` one."""
    file = Path(path) / "adapter_config.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"r": fresh}
    rank = max(record["r"], *(record.get("rank_pattern") or {}).values(), 1)
    return next((size for size in (8, 16, 32, 64, 128, 256, 320) if size >= rank), 512)


def quiet():
    """A context for banners: vLLM asks for a true file's number, and loggers keep it open."""
    return redirect_stdout(open(os.devnull, "w"))  # noqa: SIM115


def hide_loading_bars() -> None:
    """vLLM's, by its own option, which neither Unsloth nor TRL passes on; errors show as ever."""
    with suppress(ImportError):
        from vllm import LLM
        LLM.__init__ = partialmethod(LLM.__init__, use_tqdm_on_load=False)


@contextmanager
def adapter_naming(base: str, saved: Path | None):
    """The adapter in `saved`, copied, naming `base`, as Unsloth loads the named one; or `base`."""
    with TemporaryDirectory() as place:
        if saved:
            shutil.copytree(saved, place, dirs_exist_ok=True)
            file = Path(place, "adapter_config.json")
            record = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(record | {"base_model_name_or_path": base}))
        yield place if saved else base


def choose_backend(wanted: str, vllm: str, gpu: bool, packages: set[str], *, alone: bool = True,
                   lora: bool = True) -> tuple[str, str, str]:  # fmt: skip
    """(backend, vLLM's mode, why) from what is asked for and there; stops where it can't be.
    `alone`: one process; `lora`: an adapter is trained; the mode: off, colocate or server."""
    asked = "--backend unsloth" if wanted == "unsloth" else f"--vllm {vllm}"
    engine = vllm in ("colocate", "server")
    for package in ["unsloth"] * (wanted == "unsloth") + ["vllm"] * engine:
        if not gpu:
            stop(f"{asked} needs an NVIDIA GPU, and there is none; leave it out")
        if package not in packages:
            stop(f"{asked} needs {package}: pip install -r requirements.txt")
    if wanted == "unsloth" and not (alone and lora):
        stop("--backend unsloth trains a LoRA adapter on one GPU; take --backend transformers")
    if wanted == "unsloth" and vllm == "server":
        stop("--vllm server goes with --backend transformers")
    if not gpu:
        return "transformers", "off", "no GPU"
    mode = ("colocate" if "vllm" in packages else "off") if vllm == "auto" else vllm
    how = {"off": "without vLLM", "server": "from a vLLM server", "colocate": "through vLLM"}
    rollouts = f"rollouts {how[mode]}"
    if vllm == "auto" and mode == "off":
        rollouts += ", which is not installed"
    reasons = [reason for reason, holds in (
        ("as asked", wanted == "transformers"),
        ("unsloth is not installed", "unsloth" not in packages),
        ("unsloth is not for several processes", not alone),
        ("unsloth is not for all weights", not lora),
        ("unsloth is not for a server", mode == "server")) if holds]  # fmt: skip
    if reasons:
        return "transformers", mode, f"{reasons[0]}; {rollouts}"
    return "unsloth", mode, f"a GPU and unsloth; {rollouts}"


class Completion(NamedTuple):
    text: str
    tokens: int
    truncated: bool  # it reached max_tokens before its end


def complete_with_vllm(generate, sampling_params, tokenizer, texts: list[str], max_tokens: int,
                       temperature: float, top_p: float, seed: int, lora) -> list[Completion]:
    """Rendered prompts completed by a vLLM engine: its `generate`, and vllm.SamplingParams."""
    ids = tokenizer(texts, add_special_tokens=False).input_ids
    params = [sampling_params(  # a seed each, or the samples of one question would be the same
        temperature=temperature, top_p=top_p, seed=seed + i, max_tokens=max_tokens,
        stop_token_ids=[tokenizer.eos_token_id], detokenize=False) for i in range(len(ids))]
    replies = generate([{"prompt_token_ids": one} for one in ids], params, lora_request=lora,
                       use_tqdm=False)
    done = []
    for output in (reply.outputs[0] for reply in replies):
        tokens, cut = list(output.token_ids), output.finish_reason == "length"
        # Decoded as transformers' completions are, so that equal tokens are equal text.
        text = tokenizer.decode(tokens if cut else tokens[:-1], skip_special_tokens=True)
        done.append(Completion(text, len(tokens), cut))
    return done
