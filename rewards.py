"""Answer formats, grading, and the reward functions of every recipe. Standard library only.

    >>> from rewards import is_correct, explain
    >>> is_correct("<reasoning>\\n24 * 45\\n</reasoning>\\n<answer>\\n$1,080.\\n</answer>", "1080")
    True
    >>> explain("<answer>\\n70\\n</answer>", "72", "xml")["correctness_reward_func"]
    (0.0, 'the answer is 70, the gold is 72')

RL optimises what these functions say, their mistakes included. So: numbers are compared exactly,
never as strings or floats; two answer blocks are a hedge and count as wrong; no regular expression
here can backtrack; and every verdict can be asked for its reason (`explain`).

It does not evaluate arithmetic, read numbers written as words, or grade anything but numbers.
"""

import functools
import re
from decimal import Context, Decimal
from typing import NamedTuple


# ---- Formats: what the model is told, what a solution looks like, and what is read back ----------
class Format(NamedTuple):
    """One answer format. `tags`: reasoning open, reasoning close, answer open, answer close."""

    tags: tuple[str, str, str, str]
    own_lines: bool  # strict format wants every tag alone on its line
    system_prompt: str

    def render(self, reasoning: str, answer: str) -> str:
        """Write a worked solution in this format (warm start, few-shot examples, tests)."""
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
}
SYSTEM_PROMPT = FORMATS["xml"].system_prompt


# ---- Reading -------------------------------------------------------------------------------------
def extract_xml_answer(text: str) -> str:
    """The text of the last `<answer>` block, stripped; "" where there is none."""
    _, opened, rest = text.rpartition("<answer>")
    return rest.partition("</answer>")[0].strip() if opened else ""


def extract_hash_answer(text: str) -> str | None:
    """GSM8K's gold, the text after the last `####`; None where there is none.

    >>> extract_hash_answer("48 / 2 = 24 #### 1,080")
    '1,080'
    """
    _, mark, gold = text.rpartition("####")
    return gold.strip() if mark else None


# LaTeX and Markdown around a number carry no value.
_MARKUP = [
    ("\u2212", "-"), ("\\boxed{", " "), ("\\text{", " "), ("\\mathrm{", " "), ("\\$", "$"),
    ("\\%", "%"), ("\\,", " "), ("\\(", " "), ("\\)", " "), ("\\[", " "), ("\\]", " "),
    ("}", " "), ("**", " "), ("`", " "),
]  # fmt: skip
_CURRENCY = "$€£¥₹¢"
# One run of digits; more than 100 characters on a side of it are prose, not a sign or a unit.
_AROUND = re.compile(r"([^0-9.]{0,100}+)(\.?+[0-9](?:[0-9.,]++|\{,\})*+)([^0-9]{0,100}+)")
_NUMBER = re.compile(r"(?:[1-9][0-9]{0,2}(?:,[0-9]{3})++|[0-9]++)?+(?:\.[0-9]++)?+")
_PREFIX = re.compile(rf"\s*+([-+]?+)[{_CURRENCY}]?+\s*+[{_CURRENCY}]?+([-+]?+)\s*+")
_UNIT = re.compile(rf"(?:[\s.%°()'’{_CURRENCY}]|[A-Za-zÀ-ÖØ-öø-ÿ]++[-,/]?+|/(?=[A-Za-z]))*+")
# After a number these change or hedge its value: "5 thousand", "2 and a half", "72 or more", "5M".
_NOT_A_UNIT = re.compile(
    r"\b(?:(?:hundred|thousand|million|billion|trillion|dozen|third|fourth|fifth|sixth|seventh"
    r"|eighth|ninth|tenth|hundredth|thousandth)s?|tens|half|halves|and a|squared|cubed|pi|or|plus"
    r"|minus|not|below zero|k|bn|mn|(?-i:M|B)|(?:and|point|times|less|by)\s++(?:zero|one|two|three"
    r"|four|five|six|seven|eight|nine|ten|eleven|twelve"
    r"|(?:twen|thir|fou?r|fif|six|seven|eigh|nine)(?:ty|teen)))\b",
    re.IGNORECASE,
)


def parse_number(text: str) -> Decimal | None:
    """Read one number exactly, or None. Time is linear in the length of `text`.

    Reads "1,080", "$72", "72 €", "-$5", "72.", "50%", "72 km/h", "**72**", "\\boxed{72}", "$72$",
    U+2212, no-break spaces, and of an equation what follows the last "=". Does not evaluate
    ("48+24"), join digits ("7 2"), choose among numbers ("72 or 73", "2 2/3"), or read scale words
    ("5 thousand"), scientific notation, superscripts, infinities or NaN.

    >>> parse_number("x = $1,080.50 per month"), parse_number("10,80")
    (Decimal('1080.50'), None)
    """
    before, equals, value = str(text).rpartition("=")
    if equals and (before[-1:] in ("<", ">", "!", "~", "/") or re.search(r"\bor\b", before[-100:])):
        return None  # a bound is not a value, "x = 71 or x = 72" not one
    around = _AROUND.fullmatch(value.strip())
    if around is None:
        return None
    before, unit = around[1], around[3]
    for mark, plain in _MARKUP:
        before, unit = before.replace(mark, plain), unit.replace(mark, plain)
    prefix = _PREFIX.fullmatch(before)
    number = _NUMBER.fullmatch(around[2].replace("{,}", ",").rstrip("."))
    if not (prefix and number and _UNIT.fullmatch(unit)) or _NOT_A_UNIT.search(unit):
        return None
    if prefix[1] and prefix[2]:
        return None
    return Decimal(("-" if "-" in prefix.groups() else "") + number[0].replace(",", ""))


def answer_block(text: str, fmt: str = "xml") -> str | None:
    """The text of the one closed answer block; None where there is none, or more than one."""
    _, _, opening, closing = FORMATS[fmt].tags
    if text.count(opening) != 1 or text.count(closing) != 1:
        return None
    _, _, rest = text.partition(opening)
    inside, closed, _ = rest.partition(closing)
    return inside.strip() if closed else None


# Read backwards, so that the last number of a long text is found without reading all of it.
_LAST_NUMBER = re.compile(r"[0-9]++(?:[,.][0-9]++)*+(?:\.(?![.\w]))?+\$?+-?+")


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in `text`, as lm-evaluation-harness' flexible-extract reads it."""
    found = re.search(_LAST_NUMBER, text.replace("\u2212", "-")[::-1])
    return parse_number(found[0][::-1]) if found else None


def is_correct(completion, gold: str, *, mode: str = "strict", fmt: str = "xml") -> bool:
    """Whether a completion's answer equals the gold number, exactly.

    strict: exactly one closed answer block, and its number is the gold's. flexible (for evaluation
    only, never a reward): the answer block if there is exactly one, else the last number of the
    text. `gold` may be a whole GSM8K solution ending in "#### n".
    """
    if mode not in ("strict", "flexible"):
        raise ValueError(f"mode must be 'strict' or 'flexible', not {mode!r}")
    text = completion_text(completion)
    block = answer_block(text, fmt)
    if block is not None:
        number = parse_number(block)
    else:
        number = last_number(text) if mode == "flexible" else None
    return number is not None and number == _gold_number(gold)


def format_fault(text: str, fmt: str = "xml", strict: bool = True) -> str | None:
    """The first reason why `text` breaks the format, or None if it follows it.

    Both want one reasoning block, then one answer block, neither empty. strict also wants nothing
    else in the completion, and every tag on its own line where the format says so.
    """
    spec = FORMATS[fmt]
    for tag in spec.tags:
        if (n := text.count(tag)) != 1:
            return f"{tag} occurs {n} times, not once"
    at = [text.index(tag) for tag in spec.tags]
    if at != sorted(at):
        return "the tags are out of order"
    ends = [start + len(tag) for start, tag in zip(at, spec.tags)]
    if not text[ends[0] : at[1]].strip():
        return "the reasoning is empty"
    if text[ends[1] : at[2]].strip():
        return "there is text between the two blocks"
    if not text[ends[2] : at[3]].strip():
        return "the answer is empty"
    if not strict:
        return None
    if text[: at[0]].strip() or text[ends[3] :].strip():
        return "there is text outside the two blocks"
    if spec.own_lines:
        for start, end, tag in zip(at, ends, spec.tags):
            line_start = text.rfind("\n", 0, start) + 1
            line_end = text.find("\n", end)
            if text[line_start : line_end if line_end >= 0 else None].strip() != tag:
                return f"{tag} is not alone on its line"
    return None


def completion_text(completion) -> str:
    """The text of a completion: a string, or a conversation's last assistant message."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role", "assistant") == "assistant":
            content = message.get("content") or ""
            if isinstance(content, str):
                return content
            return "".join(part.get("text") or "" for part in content)
    return ""


# ---- Reward functions ----------------------------------------------------------------------------
REWARD_FUNCS = {}  # name -> reward function


def _reward(fmt: str, needs_gold: bool):
    """Turn a judgement, (text, gold, fmt) -> (value, one plain sentence why), into a reward.

    That is, into TRL's (prompts, completions, answer, **kwargs) -> one float a completion, where
    completions are strings or conversations and `answer` holds one gold each. TRL plots
    `rewards/{name}/mean`, so the names label curves. Raises ValueError on a missing `answer`.
    """
    def register(judge, default_fmt=fmt):
        @functools.wraps(judge)
        def reward_func(prompts, completions, answer=(), fmt=default_fmt, **kwargs) -> list[float]:
            golds = (answer or ()) if needs_gold else [""] * len(completions)
            if len(golds) != len(completions):
                raise ValueError(f"{len(completions)} completions but {len(golds)} answers: the "
                                 "data set needs a column 'answer' with one gold a question")
            return [judge(completion_text(c), gold, fmt)[0] for c, gold in zip(completions, golds)]

        del reward_func.__wrapped__  # its signature is its own
        reward_func.judge = judge
        REWARD_FUNCS[judge.__name__] = reward_func
        return reward_func

    return register


@_reward("xml", needs_gold=True)
def correctness_reward_func(text, gold, fmt):
    """1.0 where exactly one closed answer block holds exactly the gold number, else 0.0."""
    number, fault = _read_answer(text, fmt)
    wanted = _gold_number(gold)
    if fault or number != wanted:
        return 0.0, fault or f"the answer is {_short(number)}, the gold is {_short(wanted)}"
    return 1.0, f"the answer is {_short(number)}, as the gold"


@_reward("xml", needs_gold=False)
def int_reward_func(text, gold, fmt):
    """0.5 where the one answer block holds an integer, else 0.0."""
    number, fault = _read_answer(text, fmt)
    if fault or number != number.to_integral_value():
        return 0.0, fault or f"{_short(number)} is not an integer"
    return 0.5, f"{_short(number)} is an integer"


@_reward("xml", needs_gold=False)
def strict_format_reward_func(text, gold, fmt):
    """0.5 where the whole completion is one reasoning block, then one answer block, else 0.0."""
    fault = format_fault(text, fmt)
    return (0.0, fault) if fault else (0.5, "the whole completion follows the format")


@_reward("xml", needs_gold=False)
def soft_format_reward_func(text, gold, fmt):
    """0.5 where both blocks are there in order, whatever the white space around, else 0.0."""
    fault = format_fault(text, fmt, strict=False)
    return (0.0, fault) if fault else (0.5, "both blocks are there, in order")


@_reward("xml", needs_gold=False)
def xmlcount_reward_func(text, gold, fmt):
    """0.125 a tag that occurs exactly once, less up to 0.1 for text after the last one; 0.0-0.5."""
    tags = FORMATS[fmt].tags
    once = sum(text.count(tag) == 1 for tag in tags)
    # Bounded below one tag's worth: a version in wide circulation charges the whole text when the
    # newline after the last tag is missing, -0.55 on a perfect answer.
    tail = text.rpartition(tags[3])[2].strip() if tags[3] in text else ""
    trailing = 0 if any(tag in tail for tag in tags) else len(tail)
    value = max(0.0, 0.125 * once - min(0.1, 0.001 * trailing))
    return value, f"{once} of 4 tags occur once, {trailing} characters follow the last"


@_reward("cookbook", needs_gold=False)
def match_format_exactly(text, gold, fmt):
    """3.0 where the whole completion follows the format, else 0.0."""
    fault = format_fault(text, fmt)
    return (0.0, fault) if fault else (3.0, "the whole completion follows the format")


@_reward("cookbook", needs_gold=False)
def match_format_approximately(text, gold, fmt):
    """+0.5 for each of the four elements that occurs exactly once, -0.5 for each other; -2 to 2."""
    once = sum(text.count(tag) == 1 for tag in FORMATS[fmt].tags)
    return 0.5 * once - 0.5 * (4 - once), f"{once} of 4 elements occur exactly once"


_EXACT = Context(prec=60, Emin=-(10**9), Emax=10**9, traps=[])  # long digit strings must not raise


@_reward("cookbook", needs_gold=True)
def check_answer_correctness(text, gold, fmt):
    """3.0 exact, 1.5 within 10 %, 0.5 within 20 %, else -0.5.

    The credit for a near miss is the cookbook recipe's own: there, a near miss in perfect format
    (6.5) earns more than a right answer without its reasoning block (4.5).
    """
    number, fault = _read_answer(text, fmt)
    wanted = _gold_number(gold)
    if fault or number == wanted:
        return (-0.5, fault) if fault else (3.0, f"the answer is {_short(number)}, as the gold")
    why = f"the answer is {_short(number)}, the gold is {_short(wanted)}"
    if not wanted:  # of zero there is no near
        return -0.5, why
    miss = _EXACT.divide(_EXACT.abs(_EXACT.subtract(number, wanted)), _EXACT.abs(wanted))
    for value, limit in ((1.5, "10"), (0.5, "20")):
        if miss <= Decimal(f"0.{limit}"):
            return value, f"{why}: within {limit} %"
    return -0.5, why


@_reward("cookbook", needs_gold=True)
def check_numbers_extraction(text, gold, fmt):
    """1.5 where the gold follows the one opening answer tag, closed or not, else 0.0."""
    _, _, opening, closing = FORMATS[fmt].tags
    if (n := text.count(opening)) != 1:
        return 0.0, f"{opening} occurs {n} times, not once"
    number = parse_number(text.partition(opening)[2].partition(closing)[0])
    if number is None or number != _gold_number(gold):
        return 0.0, f"after {opening} stands {_short(number)}, not the gold"
    return 1.5, f"after {opening} stands the gold, closed or not"


def explain(completion, gold: str, fmt: str = "xml") -> dict[str, tuple[float, str]]:
    """Per reward function, its value for one completion and one plain sentence why."""
    text = completion_text(completion)
    return {name: func.judge(text, gold, fmt) for name, func in REWARD_FUNCS.items()}


@functools.lru_cache(maxsize=1)  # explain asks for the same answer in turn
def _read_answer(text: str, fmt: str) -> tuple[Decimal | None, str | None]:
    """The number in the one closed answer block, or the reason why there is none."""
    block = answer_block(text, fmt)
    if block is None:
        n = max(text.count(tag) for tag in FORMATS[fmt].tags[2:])
        return None, f"{n} answer tags are a hedge" if n > 1 else "there is no closed answer block"
    number = parse_number(block)
    return number, f"the answer {block[:30]!r} is not one number" if number is None else None


def _gold_number(gold: str) -> Decimal | None:
    return parse_number(str(gold).rpartition("####")[2])


def _short(number: Decimal | None) -> str:
    text = "no number" if number is None else str(number)
    return text if len(text) <= 30 else f"{text[:27]}..."
