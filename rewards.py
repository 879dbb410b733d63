"""Answer formats, grading, and the reward functions of every recipe. Standard library only.

    >>> from rewards import answer_fault, is_correct
    >>> is_correct("<answer>\\n$1,080.\\n</answer>", "1080")
    True
    >>> answer_fault("<answer>\\n70\\n</answer>", "72")
    'the answer is 70, the gold is 72'

RL optimises what these functions say, their mistakes included: numbers are compared exactly, never
as strings or floats; two answer blocks are a hedge and count as wrong; no regular expression can
backtrack. Only numbers are graded; arithmetic is not evaluated, and numbers in words are not read.
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
    """Whether the chat template raises on a system message, or leaves its text out in silence.

    What a template raises without one, too, is let out.
    """
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
    """What follows a leading `<think>...</think>`; "" where that is cut off before its end.

    Its opening tag may be in the prompt. The first `</think>` ends it, so that of several answers
    one place counts; but what begins with a tag of ours is an answer from its first word on.
    """
    thinking, closed, rest = text.partition("</think>")
    start = thinking.lstrip()
    if start.startswith("<think>"):
        return rest
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
    text = after_thinking(text)
    opening, closing = FORMATS[fmt].tags[2:]
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    inside, closed, _ = text.partition(opening)[2].partition(closing)
    return inside.strip() if closed else None


# ---- Reading numbers: first, what is written otherwise and means the same ------------------------
_SAME = {0xFF01 + i: 0x21 + i for i in range(94)}  # full-width forms
_SAME |= dict.fromkeys([0x2010, 0x2011, 0x2212], "-")  # hyphens, and the minus sign
# What can't be seen, but for the invisible times, plus and comma.
_SAME |= dict.fromkeys([0xAD, 0x200B, 0x200C, 0x200D, 0x200E, 0x2060, 0xFEFF])
_REWRITTEN = [(re.compile(pattern), plain) for pattern, plain in (
    (r"(?<!\w)[‒–](?=\S)", "-"),  # "–5", but neither "3–5" nor "– 5"
    (r"(?<=[0-9])(?:(?:\{,\}|,?\\[,!])(?>(?:\\!|\s)*)|[\u2009\u202f'’])(?=[0-9])", ","),  # 1'080
    (r"(?<=[0-9])(?>(?::00)+)(?![0-9:])", ""),  # "2:00"
    (r"(?<=[^\W\d_])\}?+\^\{?+[23]\}?+(?![0-9])", "²"),  # "cm^3", "\text{m}^{2}": a unit's power
    (r"\bRs\.", "Rs "),
    ("千[克米]", " km"),  # else 千 is a thousand
)]  # fmt: skip


def _plain(text: str) -> str:
    if len(text) > 10_000:  # what is so long is digits, or no number
        return text
    text = text.translate(_SAME)
    for pattern, plain in _REWRITTEN:
        text = pattern.sub(plain, text)
    return text


# Then the number. More than 100 characters on a side of its digits are prose, no sign or unit.
_AROUND = re.compile(r"([^0-9.]{0,100}+)(\.?+[0-9][0-9.,]*+)([^0-9]{0,100}+)")
_IN_THOUSANDS = "[1-9][0-9]{0,2}(?>(?:,[0-9]{3})+)"
_IN_LAKHS = "[1-9][0-9]?+(?>(?:,[0-9]{2}(?=,))+),[0-9]{3}"  # India's groups: 1,08,000
_NUMBER = re.compile(rf"(?>(?:{_IN_THOUSANDS}|{_IN_LAKHS}|[0-9]++)?)(?>(?:\.[0-9]++)?)")

# LaTeX, Markdown and quotes around a number carry no value; nor does the sign of degrees or inches.
_MARKUP = re.compile(r"""\\(?:boxed|text|textbf|mathrm|mathbf)\{|\\[,;! ()\[\]]|\\(?=[$%])|\*\*"""
                     r"""|[}`"“”″]|~(?=\\?[A-Za-z])|\^\{?+\\circ""")  # fmt: skip

# Before the digits may stand a sign and a currency; a "$" may be maths, too.
_SIGN = "$¢£¥৳฿\u20a0-\u20c0"
_CURRENCY = re.compile(rf"(?:US |[A-Z]{{0,3}})[{_SIGN}]|Rs|USD|EUR|GBP|INR|CNY|RMB|JPY|AUD|CAD|CHF")

# Behind them a unit: words of any script, whose vowel signs and accents are no letters.
_WORD = r"[^\W\d_](?>(?:[^\W\d_]|[\u0300-\u1fff])*)"
_UNIT = re.compile(rf"(?>(?:[\s.。।%°()'’{_SIGN}]|{_WORD}[-,/&;:!23]?+|/(?=[^\W\d_]))*)")

# But a letter by itself ("7 a.m.", "3 x-rays" and "762 M&Ms" hold none) is a variable, if it is no
# article ("72 a day"), names no kind ("8 D batteries", but "5 M people" are millions), and units
# aren't written so: metres, grams, hours, ... Of these only metres are squared.
_ALONE = r"(?![A-Za-z_'’&]|\.[A-Za-z]|-\w\w|/o\b)"
_LETTER = rf"(?!a\s++\w\w|[AC-JLN-SU-Z]\s++[a-z]{{3}})[A-Za-zΑ-ω]{_ALONE}"
_VARIABLE = rf"(?!m|[ghslLtdpcAVWJNCFΩμ](?![²³23])){_LETTER}"
_TERM = re.compile(rf"\A\W*+{_VARIABLE}|(?<![\w.'’&-])[xyz]{{1,3}}+{_ALONE}")
# In maths any letter by itself, and two ("$2ab$"), but for units that are set so in haste.
_HASTY_UNIT = r"(?:[cdkm]m|[km]g|m[il]|ft|in|yd|oz|lb|hr)\b"
_TERM_IN_MATHS = re.compile(rf"\A\s*+(?:{_LETTER}|(?!{_HASTY_UNIT})[a-z]{{2}}\s*+\$)")
# An equation: "2x = 72" says 36, "-x = 5" says -5; but "5 x 3 = 15" multiplies.
_TO_SOLVE = re.compile(
    rf"(?:[0-9]\s*+[-+*/^·×]?+\s*+|\A[\s$(]*+-\s*+)(?![xX]\s*+[($0-9]){_VARIABLE}"
    rf"|(?<![\w'’]){_VARIABLE}\s*+(?:[\^²³]|[-+*/·×÷]\s*+[0-9])")
# Several: "x = 71, y = 72", between whose "=" a value ends and a name begins.
_NEXT_EQUATION = re.compile(
    r",(?![0-9])|;|\n\s*+[^\s&]|\b(?:and|so)\b"
    rf"|\A[-$]?+[0-9][0-9.,]*+[^\w+*·×/^-]++{_VARIABLE}\Z")

# Words change a number directly behind it: "5 thousand", "2 thirds", "72 or more", "9 of ten"; in
# other languages those that are listed here.
_COUNT = (r"(?:an?\s++(?:hundred|thousand|million|billion|dozen|half|third|quarter)|zero|one|two"
          r"|three|four|five|six|seven|eight|nine|ten|eleven|twelve"
          r"|(?:twen|thir|fou?r|fif|six|seven|eigh|nine)(?:ty|teen))")  # fmt: skip
_NEXT_WORD = re.compile(
    r"\A\W*+(?:(?:(?:third|(?:four|fif|six|seven|eigh|nin|ten|twelf|[a-z]{1,9}(?:tie|teen))th"
    r"|(?:hundred|thousand|(?:b|tr|quadr|quint)illion)(?:th)?|lakh|crore|dozen)s?|tens|half|halves"
    rf"|and an?|squared|cubed|pi|or|plus|minus|not|bn|mn|of\s++{_COUNT}"
    r"|mil|mille|tausend|ribu|juta|oder|ou|или|сот(?:ен|ня|ни)?|трет(?:ь|и|ей))\b"
    r"|mil(?:l?iard|l?i?[oó]n|h[ãõ]|yo|ya)|тыс|млн|млрд|милли(?:он|ард)|дюжин|с половин"
    r"|[多余餘以或천만억백조반]|हज|लाख|करोड|सौ|ألف|آلاف|مليون|ملايين|مليار)|[半两]",
    re.IGNORECASE,
)
# And some anywhere: "72 dollars or more", "72 dollars and fifty cents", "2 hours and a half".
_LATER_WORD = re.compile(
    r"\b(?:(?:is|are)(?: not|n['’]t)|below zero|in (?:hundred|thousand|million|billion)s"
    r"|or (?:more|less|fewer|so)|(?:and|or|plus|minus|point|times|less|by|over|out of|to|remainder"
    r"|dollars?|cents?|feet|foot|inch(?:es)?|met(?:er|re)s?|pounds?|kilograms?|seconds?|minutes?"
    rf"|hours?|days?|weeks?|months?|years?)[,;]?+\s++{_COUNT})\b",
    re.IGNORECASE,
)


def parse_number(text) -> Decimal | None:
    """Read one number exactly, or None. Time is linear in the length of `text`.

    A sign, a currency, a unit, LaTeX and Markdown may stand around it, and what "=" it follows.
    Nothing is evaluated, solved, joined or chosen ("48+24", "2x = 72", "7 2", "72 or 73", "3-5",
    "2 2/3"), no scale words and no scientific notation are read.

    >>> parse_number("x = $1,080.50 per month"), parse_number("5 thousand"), parse_number("10,80")
    (Decimal('1080.50'), None, None)
    """
    if isinstance(text, float):  # a JSON number: 1e+20 is an exact notation there
        text = f"{Decimal(str(text)):f}"
    left, equals, value = _plain(str(text)).rpartition("=")
    around = _AROUND.fullmatch(value.strip())
    if around is None or equals and _gives_no_value(left):
        return None
    before, digits, unit = around.groups()
    while before and unit and before[-1] + unit[0] in ("**", "__", "''", "‘’"):
        before, unit = before[:-1], unit[1:]
    if "$" in before and _TERM_IN_MATHS.match(unit):
        return None  # "$5m" is five million, "$5 m$" a term: units stand in \text{} there
    sign = _CURRENCY.sub("", _without_markup(before), count=2).strip()
    number = _NUMBER.fullmatch(digits.rstrip("."))
    readable = number and sign in ("", "+", "-") and _is_unit(unit)
    return Decimal(sign + number[0].replace(",", "")) if readable else None


def _gives_no_value(left: str) -> bool:
    """Whether what is left of the last "=" makes it a bound, one of several, or to be solved."""
    if len(left) > 1000 or left.endswith(tuple("<>!~/")) or re.search(r"\bor\b", left):
        return True
    name, *steps = left.split("=")
    several = any(_NEXT_EQUATION.search(step.strip()) for step in steps)
    return several or _TO_SOLVE.search(name) is not None


def _without_markup(text: str) -> str:
    return unicodedata.normalize("NFKC", _MARKUP.sub(" ", text))  # ₨, ㎡ and ℃ as letters


def _is_unit(text: str) -> bool:
    """Whether `text` may stand behind a number and leave its value as it is."""
    for char in set(text) - set("²³ℓ"):  # such as 万, ½, ⁿ and 𝑥
        if char.isnumeric() or unicodedata.decomposition(char).startswith(("<su", "<font>")):
            return False
    text = _without_markup(text)
    changed = any(words.search(text) for words in (_TERM, _NEXT_WORD, _LATER_WORD))
    return not changed and _UNIT.fullmatch(text) is not None


def parse_gold(gold) -> Decimal | None:
    """Read a gold: one number, or the one after `####` in a whole solution. Equations are none.

    >>> parse_gold("48 + 24 = 72 #### 72 clips"), parse_gold("x = 72"), parse_gold("$-7 x$")
    (Decimal('72'), None, None)
    """
    marked = extract_hash_answer(gold) if isinstance(gold, str) else None
    text = gold if marked is None else marked
    return None if "=" in _plain(str(text)) else parse_number(text)


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in `text`, as lm-evaluation-harness' flexible-extract reads it, but
    as a value: "72.00" is 72, "72 ..." too, "2:00" is 2, and "10,80" is no number."""
    end = max(map(text.rfind, "0123456789０１２３４５６７８９")) + 2  # with the brace of "m^{2}"
    tail = _plain(text[max(0, end - 10_000) : end]).replace("$", "")
    runs = re.findall(r"-?+(?:(?<!\.)\.)?[0-9][0-9.,]*+", tail)  # "wait...72" is 72, ".5" a half
    return parse_number(runs[-1].rstrip(".,")) if runs else None


# ---- Grading -------------------------------------------------------------------------------------
def is_correct(completion, gold: str, *, mode: str = "strict", fmt: str = "xml") -> bool:
    """Whether a completion's answer equals the gold number, exactly.

    strict: exactly one closed answer block, and its number is the gold's. flexible (for evaluation
    only, never a reward): the same where that block holds one number, else the last number of the
    text. ValueError for other modes. `gold` may be a whole GSM8K solution ending in "#### n".
    """
    if mode not in ("strict", "flexible"):
        raise ValueError(f"mode must be 'strict' or 'flexible', not {mode!r}")
    text = completion_text(completion)
    number = _read_answer(text, fmt)
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
    """The first reason why `text` breaks the format, or None if it follows it.

    Both want one reasoning block, then one answer block, neither empty. strict also wants nothing
    else in the completion, and every tag on its own line where the format says so.
    """
    text, tags = after_thinking(text), FORMATS[fmt].tags
    for tag in tags:
        if text.count(tag) != 1:
            return f"{tag} occurs {text.count(tag)} times, not once"
    if sorted(tags, key=text.index) != list(tags):
        return "the tags are out of order"
    before, reasoning, between, answer, after = re.split("|".join(tags), text)
    if not reasoning.strip():
        return "the reasoning is empty"
    if between.strip():
        return "there is text between the two blocks"
    if not answer.strip():
        return "the answer is empty"
    if strict and (before.strip() or after.strip()):
        return "there is text outside the two blocks"
    if strict and FORMATS[fmt].own_lines:
        lines = [line.strip() for line in text.split("\n")]
        return next((f"{tag} is not alone on its line" for tag in tags if tag not in lines), None)
    return None


def vote(texts: list[str], fmt: str) -> tuple[str | None, int]:
    """The answer most samples give and how many do, first seen on a tie (arXiv:2203.11171).

    Answers that are no number don't vote; (None, 0) if none is.
    """
    numbers = [_read_answer(text, fmt) for text in texts]
    votes = Counter(number for number in numbers if number is not None).most_common(1)
    return (f"{votes[0][0]:f}", votes[0][1]) if votes else (None, 0)


def _read_answer(text: str, fmt: str) -> Decimal | None:
    return parse_number(answer_block(text, fmt) or "")


# ---- Reward functions: TRL's signature, one float a completion -----------------------------------
# TRL plots `rewards/{name}/mean`, so the names label curves. `completions` are conversations or
# strings, `answer` holds a gold each; where that column has another name TRL passes none.
def _with_golds(completions, answer) -> list[tuple[str, str]]:
    golds = () if answer is None else answer
    if len(golds) != len(completions):
        raise ValueError(f"{len(completions)} completions but {len(golds)} answers: the data set "
                         "needs a column 'answer' with one gold a question")  # fmt: skip
    return [(completion_text(c), gold) for c, gold in zip(completions, golds)]


def _tags_once(text: str, fmt: str) -> int:
    return sum(text.count(tag) == 1 for tag in FORMATS[fmt].tags)


def correctness_reward_func(prompts, completions, answer=(), fmt="xml", **kwargs) -> list[float]:
    """1.0 where exactly one closed answer block holds exactly the gold number, else 0.0."""
    pairs = _with_golds(completions, answer)
    return [1.0 if is_correct(text, gold, fmt=fmt) else 0.0 for text, gold in pairs]


def int_reward_func(prompts, completions, fmt="xml", **kwargs) -> list[float]:
    """0.5 where the one answer block holds an integer, else 0.0."""
    numbers = [_read_answer(completion_text(c), fmt) for c in completions]
    return [0.5 if n is not None and n == n.to_integral_value() else 0.0 for n in numbers]


def strict_format_reward_func(prompts, completions, fmt="xml", **kwargs) -> list[float]:
    """0.5 where the whole completion is one reasoning block, then one answer block, else 0.0."""
    return [0.0 if format_fault(completion_text(c), fmt) else 0.5 for c in completions]


def soft_format_reward_func(prompts, completions, fmt="xml", **kwargs) -> list[float]:
    """0.5 where both blocks are there in order, whatever stands around them, else 0.0."""
    faults = [format_fault(completion_text(c), fmt, strict=False) for c in completions]
    return [0.0 if fault else 0.5 for fault in faults]


def xmlcount_reward_func(prompts, completions, fmt="xml", **kwargs) -> list[float]:
    """0.125 a tag that occurs exactly once, less up to 0.1 for text after the last one; 0.0-0.5."""
    values, tags = [], FORMATS[fmt].tags
    for text in (after_thinking(completion_text(c)) for c in completions):
        _, closed, tail = text.rpartition(tags[3])
        trailing = len(tail.strip()) if closed and not any(tag in tail for tag in tags) else 0
        # Bounded below one tag's worth: a version in wide circulation charges the whole text when
        # the newline after the last tag is missing, -0.55 on a perfect answer.
        values.append(max(0.0, 0.125 * _tags_once(text, fmt) - min(0.1, 0.001 * trailing)))
    return values


def match_format_exactly(prompts, completions, fmt="cookbook", **kwargs) -> list[float]:
    """3.0 where the whole completion follows the format, else 0.0."""
    return [0.0 if format_fault(completion_text(c), fmt) else 3.0 for c in completions]


def match_format_approximately(prompts, completions, fmt="cookbook", **kwargs) -> list[float]:
    """+0.5 for each of the four elements that occurs exactly once, -0.5 for each other; -2 to 2."""
    return [_tags_once(after_thinking(completion_text(c)), fmt) - 2.0 for c in completions]


_EXACT = Context(prec=60, Emin=-(10**9), Emax=10**9, traps=[])  # long digit strings must not raise


def check_answer_correctness(prompts, completions, answer=(), fmt="cookbook", **kwargs):
    """3.0 exact, 1.5 within 10 %, 0.5 within 20 %, else -0.5.

    The credit for a near miss is the cookbook recipe's own: there, a near miss in perfect format
    (6.5) earns more than a right answer without its reasoning block (4.5).
    """
    values = []
    for text, gold in _with_golds(completions, answer):
        number, wanted, value = _read_answer(text, fmt), parse_gold(gold), -0.5
        if number is not None and number == wanted:
            value = 3.0
        elif number is not None and wanted:  # of zero there is no near
            miss = _EXACT.abs(_EXACT.divide(_EXACT.subtract(number, wanted), wanted))
            value = 1.5 if miss <= Decimal("0.1") else 0.5 if miss <= Decimal("0.2") else -0.5
        values.append(value)
    return values


def check_numbers_extraction(prompts, completions, answer=(), fmt="cookbook", **kwargs):
    """1.5 where the gold follows the one opening answer tag, closed or not, else 0.0."""
    _, _, opening, closing = FORMATS[fmt].tags
    values = []
    for text, gold in _with_golds(completions, answer):
        before, _, rest = after_thinking(text).partition(opening)
        number = None if opening in rest else parse_number(rest.partition(closing)[0])
        values.append(1.5 if number is not None and number == parse_gold(gold) else 0.0)
    return values


REWARD_FUNCS = {func.__name__: func for func in (
    correctness_reward_func, int_reward_func, strict_format_reward_func, soft_format_reward_func,
    xmlcount_reward_func, match_format_exactly, match_format_approximately,
    check_answer_correctness, check_numbers_extraction,
)}  # fmt: skip


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
        if not (low < value < below or inclusive and value == low):
            bound = f"at least {low}" if inclusive else f"above {low}"
            bound += f" and below {below}" * (below < float("inf"))
            raise argparse.ArgumentTypeError(f"{text} is not {bound}")
        return value

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
    """Whether the script `file` runs in a notebook's cell, where sys.argv is the kernel's; not with
    %run or Spyder's runfile, which set it."""
    own = file is not None and Path(sys.argv[0]).name == Path(file).name
    return "ipykernel" in sys.modules and not own


def take_any_terminal() -> None:
    """Show a question mark for what a terminal or a log that is not UTF-8 can't show."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):  # a notebook's takes all
            stream.reconfigure(errors="replace")


def end_at_ctrl_c(at_once: bool) -> None:
    """Whether Ctrl-C ends the process at once, as it must while libraries load: torch's start
    swallows the exception and leaves numpy broken. Otherwise it is a KeyboardInterrupt again."""
    ways = [signal.default_int_handler, signal.SIG_DFL]
    if signal.getsignal(signal.SIGINT) is ways[not at_once]:  # what the caller set stays
        signal.signal(signal.SIGINT, ways[at_once])


def max_lora_rank(path: str | Path, fresh: int = 16) -> int:
    """The smallest rank that vLLM has kernels for and that holds the adapter in the directory
    `path`, or a `fresh` one where there is none."""
    file = Path(path) / "adapter_config.json"
    record = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"r": fresh}
    rank = max(record["r"], *(record.get("rank_pattern") or {}).values(), 1)
    return next((size for size in (8, 16, 32, 64, 128, 256, 320) if size >= rank), 512)


def share_processors() -> None:
    """Have torch leave the processors to other programs while it waits. Call before its import.

    Its threads wait for each other at the end of every small operation, and spin meanwhile. Where
    one was put aside for another program, the others spin for its whole time slice: beside a single
    busy program a training step took eight times as long. This sets libgomp, which torch's Linux
    wheels bring; libiomp5md (Windows) and libomp (macOS) ignore it. What the user set stays.
    """
    if not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"} & set(os.environ):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def quiet():
    """A context in which banners go to a true file, as vLLM asks for its number. It stays open, for
    the loggers that take it for theirs."""
    return redirect_stdout(open(os.devnull, "w"))  # noqa: SIM115


def hide_loading_bars() -> None:
    """vLLM's, by its own option, which neither Unsloth nor TRL passes on; errors show as ever."""
    with suppress(ImportError):
        from vllm import LLM

        LLM.__init__ = partialmethod(LLM.__init__, use_tqdm_on_load=False)


@contextmanager
def adapter_naming(base: str, saved: Path | None):
    """What Unsloth is to load for the adapter in `saved` on `base`: its directory, copied, naming
    that base, for Unsloth loads the one that is named there; `base` where there is no adapter."""
    with TemporaryDirectory() as place:
        if saved:
            shutil.copytree(saved, place, dirs_exist_ok=True)
            file = Path(place, "adapter_config.json")
            record = json.loads(file.read_text(encoding="utf-8"))
            file.write_text(json.dumps(record | {"base_model_name_or_path": base}))
        yield place if saved else base


def choose_backend(wanted: str, vllm: str, gpu: bool, packages: set[str], *, alone: bool = True,
                   lora: bool = True) -> tuple[str, str, str]:  # fmt: skip
    """(backend, vllm mode, why) from what is asked for and what is there; stops where it can't be.

    `alone`: one process; `lora`: an adapter is trained. vLLM's mode is off, colocate or server.
    """
    if wanted == "unsloth" or vllm in ("colocate", "server"):
        asked = "--backend unsloth" if wanted == "unsloth" else f"--vllm {vllm}"
        if not gpu:
            stop(f"{asked} needs an NVIDIA GPU, and there is none; leave it out")
        for package in ("unsloth",) * (wanted == "unsloth") + ("vllm",) * (vllm != "off"):
            if package not in packages and not (package == "vllm" and vllm == "auto"):
                stop(f"{asked} needs {package}: pip install -r requirements.txt")
    if wanted == "unsloth" and not (alone and lora):
        stop("--backend unsloth trains a LoRA adapter on one GPU; take --backend transformers")
    if wanted == "unsloth" and vllm == "server":
        stop("--vllm server goes with --backend transformers")
    if not gpu:
        return "transformers", "off", "no GPU"
    mode = ("colocate" if "vllm" in packages else "off") if vllm == "auto" else vllm
    rollouts = {"off": "rollouts without vLLM", "server": "rollouts from a vLLM server",
                "colocate": "rollouts through vLLM"}[mode]
    if vllm == "auto" and mode == "off":
        rollouts += ", which is not installed"
    for reason, holds in (
        ("as asked", wanted == "transformers"),
        ("unsloth is not installed", "unsloth" not in packages),
        ("unsloth is not for several processes", not alone),
        ("unsloth is not for all weights", not lora),
        ("unsloth is not for a server", mode == "server"),
    ):
        if holds:
            return "transformers", mode, f"{reason}; {rollouts}"
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
        # Decoded as transformers' completions are, so that equal tokens are equal text.
        tokens, cut = list(output.token_ids), output.finish_reason == "length"
        text = tokenizer.decode(tokens if cut else tokens[:-1], skip_special_tokens=True)
        done.append(Completion(text, len(tokens), cut))
    return done
