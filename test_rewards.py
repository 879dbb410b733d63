"""What rewards.py promises: `pytest test_rewards.py`."""

import doctest
import json
import math
import re
import shutil
import subprocess
import sys
from decimal import Decimal
from functools import partial
from pathlib import Path
from timeit import timeit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from rewards import (
    FORMATS, REWARD_FUNCS, after_thinking, answer_fault, build_prompt, choose_backend, fold_system,
    format_fault, extract_hash_answer, extract_xml_answer, is_correct, last_number, parse_gold,
    parse_number, refuses_system, render_prompts, vote,
)

GSM8K = Path(__file__).resolve().parent.parent / "shared" / "gsm8k"
MAXIMUM = {
    "correctness_reward_func": 1.0, "int_reward_func": 0.5, "strict_format_reward_func": 0.5,
    "soft_format_reward_func": 0.5, "xmlcount_reward_func": 0.5, "match_format_exactly": 3.0,
    "match_format_approximately": 2.0, "check_answer_correctness": 3.0,
    "check_numbers_extraction": 1.5,
}
QUESTION = "Natalia sold 48 clips in April, and half as many in May. How many in all?"
BLOCK = "<answer>{}</answer>".format


def perfect(answer="72", reasoning="48 / 2 = 24\n48 + 24 = 72", fmt="xml") -> str:
    return FORMATS[fmt].render(reasoning, answer)


def value(name: str, text: str, gold: str = "72", fmt: str = "xml") -> float:
    return REWARD_FUNCS[name]([QUESTION], [text], answer=[gold], fmt=fmt)[0]


# ---- Prompts -------------------------------------------------------------------------------------
class Tokenizer:
    """A chat template that treats a system message as it was told: takes, raises or drops it."""

    def __init__(self, system="takes"):
        self.system = system

    def apply_chat_template(self, prompt, tokenize, add_generation_prompt, **more):
        roles = [message["role"] for message in prompt]
        if self.system == "broken" or self.system == "raises" and "system" in roles:
            raise RuntimeError("System role not supported")
        kept = [m for m in prompt if self.system != "drops" or m["role"] != "system"]
        assert add_generation_prompt and not tokenize
        return "".join(f"[{m['role']}]{m['content']}" for m in kept) + f"[assistant]{more or ''}"


def test_the_prompt_is_system_then_shots_then_the_question():
    prompt = build_prompt("Q", "xml", [("q", "a")])
    assert [m["role"] for m in prompt] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in prompt] == [rewards.SYSTEM_PROMPT, "q", "a", "Q"]
    rendered = render_prompts(Tokenizer(), [prompt, prompt[-1:]], {"enable_thinking": False})
    assert rendered[1] == "[user]Q[assistant]{'enable_thinking': False}"
    folded = fold_system(prompt)
    assert folded == [{"role": "user", "content": f"{rewards.SYSTEM_PROMPT}\n\nq"}, *prompt[2:]]
    assert prompt == build_prompt("Q", "xml", [("q", "a")])  # not changed in place


def test_a_template_that_refuses_the_system_role_is_found_out():
    for system, refused in [("takes", False), ("raises", True), ("drops", True)]:
        assert refuses_system(Tokenizer(system)) is refused, system
    with pytest.raises(RuntimeError, match="not supported"):  # it renders nothing at all
        refuses_system(Tokenizer("broken"))


# ---- Numbers -------------------------------------------------------------------------------------
NUMBERS = [  # number, texts, what they show
    ("72", ["72", "72.", "72.0", "+72", "072", "\n 72 \n", "72" + " " * 999], "plain"),
    ("-7", ["-7", "\u22127", "\u20117", "–7", "$- 7$"], "minus, also as a dash at the number"),
    ("0.3", ["0.30", ".3"], "no float between"), ("0", ["0", "-0"], "zero"),
    ("9" * 9999, ["9" * 9999], "longer than int() reads"), ("18", [18.0], "JSON"),
    ("1" + "0" * 20, [1e20], "JSON"),
    ("1080", ["1,080", "1,080.00", "1{,}080", "1,\\!080", "1\\,080", "1'080", "1’080",
              "1\u2009080", "1\u202f080", "1\u00ad080"], "thousands"),
    ("11111111100", ["11,\\! 111,\\! 111,\\! 100", "11,11,11,11,100"], "LaTeX's, and India's"),
    ("72", ["$72", "72$", "72 €", "$ 72", "US$72", "US $72", "A$72", "R$ 72", "₱72", "￥72",
            "CHF 72", "USD 72", "72 USD", "Rs. 72", "Rs.72", "₨72", "$\\$72$"], "currencies"),
    ("-5", ["-$5", "$-5", "-US$5", "US$-5", "–€5"], "a sign before or behind the currency"),
    ("72", ["72%", "72 %", "72\\%", "72 km/h", "72km", "72 dollars", "72 miles-per-hour",
            "72 apples, total", "72\u00a0dollars", "72 piñatas", "72 o’clock", "72 µm", '72"',
            "72°", "72 °C", "72℃", "72^\\circ", "72^{\\circ}", "72 y/o", "72 a.m.", "72 a day",
            "72 M&Ms", "72 x-rays", "72 A's", "72 D batteries", "72p"], "units"),
    ("72", ["**72**", "**$72**", "*72*", "***72***", "_72_", "__72__", "`72`", '"72"', "'72'",
            "‘72’"], "Markdown and quotes"),
    ("72", ["\\boxed{72}", "\\boxed{\\$72\\text{ dollars}}", "$72$", "\\(72\\)", "\\mathbf{72}",
            "72\\ \\text{cm}", "72\\;\\textbf{km}", "$72\\text{ m}$", "$72~\\mathrm{m}$",
            "$72\\mathrm{~m}^{2}$", "$72 cm$"], "LaTeX; a unit in haste"),
    ("72", ["72 cm^2", "72 cm²", "72㎡", "72 m^{3}", "72 м^2", "72\\text{ m}^2", "72 cm squared"],
     "a unit's power"),
    ("72", ["72元", "72元。", "72（元）", "72개", "72千克", "72 メートル", "72 рублей",
            "72 रुपये।", "72 कि.मी.", "72 миллиметров", "72 pin\u0303atas"], "in any script"),
    ("72", ["\u200b72\u2060", "\ufeff72", "7\u200b2", "７２", "ｘ＝７２"], "zero and full width"),
    ("2", ["2:00 pm", "2:00", "2:00:00"], "a full hour is its hour"),
    ("72", ["72 bars in the fourth week", "72 newspapers to District B", "72 on the third day",
            "72 dollars in one week", "72 miles one way", "72 apples or pears", "72 apples!",
            "72 quarters", "72 times", "72 canteens", "72 of them", "72 packs of ten", "72 XY"],
     "what changes no value further on, or no other word"),
    ("5", ["5 m", "5 h", "5 L", "5 s", "5 m²"], "units of one letter"),
    ("72", ["x = 72", "$x = 72$", "48 + 24 = 72", "a = 3 = 72", "x + y = 72", "f(3) = 72",
            "Step 2: x = 72", "P = 2l + 2w = 72", "6 x 12 = 72", "9 m * 8 m = 72 m^2",
            "x = 72.0 = 72"], "right of the last ="),
    (None, ["", "seventy", "inf", "NaN", float("nan"), None, True, "٧٢", "it is 72"], "no number"),
    (None, ["48+24", "72 = 48+24", "7**2", "72^2", "72²", "5ⁿ", "72!", "1e5", "x^{72}", "a*72",
            "5 squared", "5 minus a bit", "7 times two", "5 times a hundred"], "not evaluated"),
    (None, ["72 or 73", "72, 73", "7 2", "7\u00a02", "7\\,2", "72\n73", "5 m2", "1 080", "7' 200",
            "1\u00a0080", "5'10", "\\boxed{7}\\boxed{2}", "4 10/3", "1_000", "7\u20622",
            "7\u20642"], "several numbers"),
    (None, ["1/2", "2 2/3", "½", "7½", "\\frac{1}{2}", "2 and a half", "2 hours and a half",
            "3 fourths", "5 twelfths", "7 twentieths", "5 out of six", "9 of ten", "5 over six",
            "7 point five", "0.3\u0305", "0.3…", "5 remainder two", "3米半"], "fractions"),
    (None, ["1,08", "10,80", "1080,000", ",072", "0,072", "1.080.000", "1,080,50", "72,",
            "1{,}080{,}5", "1,08,00", "1,080,00,000", "0,08,000", "7\u20092"], "malformed groups"),
    (None, ["3-5", "3–5", "3 – 5", "3—5", "3 to 5", "3 to five", "72 to seventy-five", "±5"],
     "ranges"),
    (None, ["--5", "-$-5", "– 5", "—5", "5 below zero", "SUM 72"], "signs"),
    (None, ["12:30", "2:30 pm", "2:00 or 3:00"], "times"),
    (None, ["72 or more", "72 dollars or more", "72 dollars or seventy", "~72", "<= 72", "x != 72",
            "x =/= 72", "72 isn't it", "72多", "72" + " a" * 99], "hedges, bounds and prose"),
    (None, ["72 dollars fifty cents", "72 dollars and fifty cents", "5 feet six inches",
            "5 weeks, two days", "5 years two months", "72元五角"], "two measures"),
    (None, ["5 thousand", "5 quadrillion", "5 crore", "2 dozen", "7 tens", "5k", "$5K", "5M",
            "$5m", "5 B", "5 bn", "5 M students", "5 (thousand)", "5 **thousand**",
            "72, in thousands", "\\boxed{5}\\text{ million}", "72 dollars in thousands"], "scales"),
    (None, ["7万", "5千", "5万円", "5만 원", "5 тысяч", "5 млн", "5 millones", "5 Millionen",
            "5 लाख", "2 с половиной", "5 juta", "5 مليون"], "in other languages"),
    (None, ["-7 x", "-7x", "6 i", "5 n", "5 D", "5xy", "36π", "36 pi", "5 α", "72 𝑥", "5 cm x",
            "3 a b", "5 x^2", "9 s^2", "5 x/y", "5 x-y", "$5 m$", "$2ab$", "$25 m^2$"], "terms"),
    (None, ["9 z = 0", "2x = 72", "-x = 5", "x + 5 = 72", "x/2 = 72", "x^2 = 72", "$y=4x$",
            "$x^{2}-5 x-6=0$", "$3x+y+2=0$", "5 m^2x = 7", "A^2 = 25"], "equations to be solved"),
    (None, ["x = 71 or x = 72", "x = 71, x = 72", "x=71,x=72", "x = 71; y = 72", "x = 71 x = 72",
            "x = 71 and y = 72", "x = 71 | y = 72", "7 + 4 = 11\n11 + 61 = 72",
            "72 or x = 73", "x = 71; so y = 72", "2 = " + "1 + 1 = " * 200 + "2"], "several"),
]  # fmt: skip
READ = [(number, text) for number, texts, _ in NUMBERS for text in texts]


@pytest.mark.parametrize("number, texts, why", NUMBERS, ids=[row[-1] for row in NUMBERS])
def test_parse_number(number, texts, why):
    wanted = None if number is None else Decimal(number)
    assert [text for text in texts if parse_number(text) != wanted] == []


GOLDS = [  # a file's gold is a number, or its row is refused aloud
    ("72", ["72", "72.", "$72", "72%", "72 apples", "72 m", "$72$", "48 + 24 = 72 #### 72 clips"]),
    ("1080", ["1,080"]), ("0.0000020107", [2.0107e-06]), ("-5", ["\u22125"]),
    ("18", ["#### 18 \r\nThe answer is: 18"]),
    # Of an equation the question says which part is asked for, not the gold.
    (None, ["x = 5", "#### x = 5", "＝5", "48+24=72", "$x^{2}-5 x-6=0$", "$3x+y+2=0$", "$y=4x$"]),
    (None, ["$-7 x$", "$6 i$", "$5 n$", "-7x", "$5 m$", "#### 5 n"]),
    (None, ["3-5", "3–5", "3 to 5", "$3 \\sim 5$", "[3, 5]", "1/4"]),
    (None, ["seventy", "", None, True]),
]  # fmt: skip


@pytest.mark.parametrize("number, golds", GOLDS)
def test_parse_gold(number, golds):
    for gold in golds:
        assert parse_gold(gold) == (None if number is None else Decimal(number)), gold
        if number is None:
            fault = f"the gold {str(gold)[-30:]!r} is not one number"
            assert answer_fault(BLOCK("5"), gold) == fault
            assert not any(is_correct(BLOCK(answer), gold) for answer in ("5", "0", "-7", gold))


LAST = [
    ("so it is 72.", "72"), ("so 1,080 dollars.", "1080"), ("costs $-5", "-5"), ("10-5", "-5"),
    ("12.5.2020", None), ("none", None), ("", None), ("so **73**.", "73"), ("72, or so", "72"),
    ("\\boxed{840}. So \\boxed{004}", "4"), ("\\boxed{9{,}500}", "9500"), ("at 2:00: tea", "2"),
    ("from 9 to 12:00:00", "12"), ("pages 3–5", "5"), ("10^2", "2"), ("72" + " so" * 9999, "72"),
]  # fmt: skip


@pytest.mark.parametrize("text, number", LAST)
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


# ---- Verdicts ------------------------------------------------------------------------------------
VERDICTS = [  # completion, gold, strict, flexible, why
    (perfect(), "72", True, True, "perfect"), (BLOCK("72"), "72", True, True, "no reasoning"),
    (BLOCK("72"), "working #### 72\nThe answer is: 5", True, True, "a whole solution as gold"),
    (perfect("70", "or 72?"), "72", False, False, "gold in the reasoning"),
    (BLOCK("-72"), "72", False, False, "sign"), (BLOCK("00"), "2:00", False, False, "not 00"),
    (BLOCK("73") + BLOCK("72"), "72", False, True, "two blocks are a hedge; flexible reads on"),
    (BLOCK("72") * 2, "72", False, True, "two equal blocks are still two"),
    ("<answer>72", "72", False, True, "unclosed"), ("72</answer>", "72", False, True, "unopened"),
    ("</answer>72<answer>", "72", False, True, "reversed"), ("72", "72", False, True, "no block"),
    (BLOCK("72 or 73"), "72", False, False, "candidates in the block"),
    (BLOCK("") + " 72", "72", False, True, "an empty block holds no number"),
    (BLOCK("71") + " 72", "72", False, False, "a block that holds one is read, no text after it"),
    (perfect(fmt="cookbook"), "72", False, True, "another format"),
    ("", "72", False, False, "empty"),
    (BLOCK("none"), "none", False, False, "a gold that is no number is matched by nothing"),
    # What other graders stumble over.
    (BLOCK("1080"), "1,080", True, True, "a comma in the gold"),
    (BLOCK("18.00"), "18", True, True, "a string comparison fails"),
    (BLOCK("18.0000000000000001"), "18", False, False, "a float comparison passes"),
    (BLOCK("2 2/3"), "2", False, False, "a part of a mixed number"),
    (BLOCK("12"), "2", False, False, "gold as a substring"),
    (BLOCK("72"), "unknown", False, False, "an unreadable gold pays nobody"),
    (BLOCK("9" * 5000), "9" * 5000, True, True, "longer than int() reads"),
]  # fmt: skip


@pytest.mark.parametrize("text, gold, strict, flexible, why", VERDICTS,
                         ids=[row[-1] for row in VERDICTS])
def test_is_correct(text, gold, strict, flexible, why):
    assert (is_correct(text, gold), is_correct(text, gold, mode="flexible")) == (strict, flexible)
    assert value("correctness_reward_func", text, gold) == strict
    assert (answer_fault(text, gold) is None) == strict


def test_extractors():
    assert extract_xml_answer("a <answer>\n72\n</answer> b") == "72"
    assert extract_xml_answer("<answer>1</answer><answer>2") == "2"
    assert extract_xml_answer("72") == ""
    assert extract_hash_answer("48 #### 24 #### 1,080 \r\nThe answer is: 18") == "1,080"
    assert extract_hash_answer("72") is None


@pytest.mark.parametrize("text, why", [
    (perfect("70"), "the answer is 70, the gold is 72"), (perfect("72"), None),
    (BLOCK("7") * 2, "2 answer tags are a hedge"),
    ("<answer>72", "there is no closed answer block"), ("", "there is no closed answer block"),
    (BLOCK("many"), "the answer 'many' is not one number"),
    (BLOCK("9" * 99), f"the answer is {'1.' + '0' * 29}E+99, the gold is 72")])
def test_a_wrong_answer_has_a_reason(text, why):
    assert answer_fault(text, "72", "xml") == why


def test_the_vote_takes_the_most_frequent_number_and_the_first_on_a_tie():
    texts = [perfect("7"), perfect("8.0"), perfect("8"), "72", perfect("many"), BLOCK("7") * 2]
    assert vote(texts, "xml") == ("8.0", 2)
    assert vote([perfect("7"), perfect("8")], "xml") == ("7", 1)
    assert parse_number(vote([perfect("0.0000001")], "xml")[0]) == Decimal("1e-7")
    assert vote(["72"], "xml") == vote([], "xml") == (None, 0)


# ---- flexible beside its outside oracle ----------------------------------------------------------
def harness(text: str, gold: str) -> bool:
    """flexible-extract and exact_match of lm-evaluation-harness' gsm8k.yaml."""
    found = re.findall(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", text)
    answer = next(filter(None, found[-1])).strip() if found else "[invalid]"
    for ignored in (",", r"\$", r"(?s).*#### ", r"\.$"):
        answer, gold = re.sub(ignored, "", answer), re.sub(ignored, "", gold)
    return answer.lower() == gold.lower()


PROSE = [
    "so it is {}", "a total of {}.", "12 and then {}", "({})", "**{}**", "{}%", "\\boxed{{{}}}",
    "the answer is {}!", "1 + 2 = {} eggs", "x={}\n", "{} dollars, in all", "<answer>{}",
    "{}</answer>", "<answer>1 or {}</answer>", "#### {}", "4 - {}", "{}km", "{}$", "72 of {}, so",
    "<answer>{}</answer><answer>{}</answer>", "at 7:{}", "<answer></answer> {}", "{} 'units'",
]  # fmt: skip
WRITTEN = ["72", "-5", "1,080", "$1,234,567", "0", "3.5", "$2.50", "$-5", "-$5"]
DIFFERENCES = [  # text, gold, harness, why ours differs; each is wrong by the other
    ("72.00", "72", False, "values are compared, no strings"), ("072", "72", False, "the same"),
    ("\u22125", "-5", False, "U+2212 is a minus"), ("9{,}500", "9500", False, "LaTeX's comma"),
    ("1,\\!080", "1080", False, "LaTeX's thin space"), ("2:00", "2", False, "00 is no answer"),
    ("it is 72, or ...", "72", False, "a run without a digit is no number"),
    ("wait...72...", "72", False, "ellipses are no points"), (".5", "0.5", False, "no zero before"),
    ("–5", "-5", False, "an en dash at a number is a minus"), ("Rs.72", "72", False, "no point"),
    ("1'080", "1080", False, "an apostrophe groups"), ("1\u202f080", "1080", False, "a thin space"),
    ("25 m^2", "25", False, "a unit's power is no answer"), ("7\u200b2", "72", False, "72 is seen"),
    ("it is ７２", "72", False, "full-width digits are digits"),
    ("10,80", "1080", True, "commas that group no thousands join nothing"),
    ("7,8,9", "789", True, "a list is no number"), ("$5,$6", "56", True, "two prices are none"),
    ("<think>72", "72", True, "a thought that is cut off has no answer"),
    ("<think>72</think> none", "72", True, "nor is the thought one"),
    (BLOCK("72") + " 5", "72", False, "a block that holds one number is the answer"),
    (BLOCK("72") + " 5", "5", True, "and the text after it none"),
]  # fmt: skip


@pytest.mark.parametrize("prose", PROSE)
def test_flexible_reads_as_the_harness_does(prose):
    for written in WRITTEN:
        plain = re.sub(r"[$,]", "", written)
        for gold in (plain, plain.replace("-", "") + "1", "72", "12", "1", "7", "5"):
            text = prose.format(written, written)
            assert is_correct(text, gold, mode="flexible") == harness(text, gold), (text, gold)


@pytest.mark.parametrize("text, gold, theirs, why", DIFFERENCES)
def test_flexible_differs_from_the_harness_where_it_says(text, gold, theirs, why):
    assert harness(text, gold) == theirs != is_correct(text, gold, mode="flexible"), why


# ---- Thinking ------------------------------------------------------------------------------------
DRAFT = "First <reasoning>a</reasoning><answer>71</answer>, no. "
THOUGHTS = [  # text, what follows its thinking, why
    (f"\n<think>hm</think>{perfect()}", perfect(), "a thought"),
    (f"</think>{perfect()}", perfect(), "the prompt opened it, and nothing was thought"),
    (f"<think>{DRAFT}</think>{perfect()}", perfect(), "tags in a thought do not count"),
    (f"{DRAFT}</think>{perfect()}", perfect(), "nor where the prompt opened it"),
    ("<think>" + perfect(), "", "cut off"), (perfect(), perfect(), "no thought"),
    (f"Well <think>a {perfect()}", f"Well <think>a {perfect()}", "no leading one"),
    (f"<think>a</think>b</think>{perfect()}", f"b</think>{perfect()}", "the first end counts"),
    ("<answer>71</think>72</answer>", "<answer>71</think>72</answer>",
     "an answer from its first word on is no thought"),
]  # fmt: skip


@pytest.mark.parametrize("text, follows, why", THOUGHTS, ids=[row[-1] for row in THOUGHTS])
def test_a_leading_thought_is_no_part_of_the_answer(text, follows, why):
    assert after_thinking(text) == follows
    if follows == perfect():
        assert {name: value(name, text) for name in REWARD_FUNCS} == MAXIMUM
        assert extract_xml_answer(text) == "72" and is_correct(text, "72", mode="flexible")
        assert format_fault(text) is answer_fault(text, "72") is None
    else:
        assert not value("strict_format_reward_func", text)


@pytest.mark.parametrize("first", ["", "hm ", "<think>", "<think></think>"])
def test_of_several_answers_round_a_thoughts_end_one_place_is_paid_at_most(first):
    for text in (f"{first}{BLOCK('71')}</think>{BLOCK('72')}",
                 f"{first}{BLOCK('71')}</think>{BLOCK('72')}</think>{BLOCK('73')}",
                 f"{first}<answer>71</think>{BLOCK('72')}"):
        for name in ("correctness_reward_func", "check_numbers_extraction"):
            paid = [gold for gold in ("71", "72", "73") if value(name, text, gold) > 0]
            assert paid in ([], ["72"]), (name, text)  # never the first, never two


# ---- Reward functions ----------------------------------------------------------------------------
FORMAT_ROWS = [  # text, strict, soft, tag count, why
    (perfect("70"), 0.5, 0.5, 0.5, "right or wrong, where some charge for a missing newline"),
    ("\n" + perfect(reasoning="a\n\nb") + "\n", 0.5, 0.5, 0.5, "more lines, where . fails"),
    (perfect().replace("\n", "\r\n"), 0.5, 0.5, 0.5, "Windows line ends"),
    ("<reasoning>a</reasoning><answer>72</answer>", 0.0, 0.5, 0.5, "tags not on their own lines"),
    (perfect() + " so 72", 0.0, 0.5, 0.495, "text after the end"),
    (perfect() + "x" * 10**4, 0.0, 0.5, 0.4, "the charge for trailing text is bounded"),
    ("Well. " + perfect(), 0.0, 0.5, 0.5, "text before"),
    (perfect().replace("\n<answer>", "\nso\n<answer>"), 0.0, 0.0, 0.5, "text between"),
    (perfect(reasoning=" "), 0.0, 0.0, 0.5, "empty reasoning"),
    (perfect(answer=" "), 0.0, 0.0, 0.5, "empty answer"),
    (perfect() * 2, 0.0, 0.0, 0.0, "repeated blocks"),
    (BLOCK("72"), 0.0, 0.0, 0.25, "no reasoning"), ("72", 0.0, 0.0, 0.0, "no tags"),
    ("<answer>", 0.0, 0.0, 0.125, "one tag"), ("<answer>" * 9, 0.0, 0.0, 0.0, "paid once"),
    (BLOCK("72") + f"<reasoning>{'a' * 99}</reasoning>", 0.0, 0.0, 0.5, "wrong order"),
    (perfect()[:-9], 0.0, 0.0, 0.375, "cut off before the last tag"),
    ("<reasoning>" + perfect() + "</answer>", 0.0, 0.0, 0.25, "nested"),
]  # fmt: skip


@pytest.mark.parametrize("text, strict, soft, count, why", FORMAT_ROWS,
                         ids=[row[-1] for row in FORMAT_ROWS])
def test_format_rewards(text, strict, soft, count, why):
    assert value("strict_format_reward_func", text) == strict
    assert value("soft_format_reward_func", text) == soft
    assert value("xmlcount_reward_func", text) == pytest.approx(count)
    assert value("match_format_exactly", text) == 6 * strict


SOLUTION = "<start_working_out>w<end_working_out><SOLUTION>{}</SOLUTION>".format
COOKBOOK_ROWS = [  # text, gold, correctness, extraction, approximate, why
    (SOLUTION("$100"), "100", 3.0, 1.5, 2.0, "exact"),
    (SOLUTION("110"), "100", 1.5, 0.0, 2.0, "10 % above"),
    (SOLUTION("90"), "100", 1.5, 0.0, 2.0, "10 % below"),
    (SOLUTION("110.001"), "100", 0.5, 0.0, 2.0, "a hair over 10 %"),
    (SOLUTION("120"), "100", 0.5, 0.0, 2.0, "20 % above"),
    (SOLUTION("120.001"), "100", -0.5, 0.0, 2.0, "a hair over 20 %"),
    (SOLUTION("-95"), "-100", 1.5, 0.0, 2.0, "near a negative gold"),
    (SOLUTION("0"), "0", 3.0, 1.5, 2.0, "zero"), (SOLUTION("0.01"), "0", -0.5, 0.0, 2.0, "near 0"),
    (SOLUTION("many"), "100", -0.5, 0.0, 2.0, "no number"),
    ("<SOLUTION>100", "100", -0.5, 1.5, -1.0, "unclosed: extraction only"),
    ("<SOLUTION>100</SOLUTION>", "100", 3.0, 1.5, 0.0, "right without reasoning"),
    ("100", "100", -0.5, 0.0, -2.0, "no element"),
    (SOLUTION("100") * 2, "100", -0.5, 0.0, -2.0, "everything twice"),
]  # fmt: skip


@pytest.mark.parametrize("text, gold, correctness, extraction, approximate, why", COOKBOOK_ROWS,
                         ids=[row[-1] for row in COOKBOOK_ROWS])
def test_cookbook_rewards(text, gold, correctness, extraction, approximate, why):
    names = "check_answer_correctness", "check_numbers_extraction", "match_format_approximately"
    assert [value(n, text, gold, "cookbook") for n in names] == [
        correctness, extraction, approximate]


@pytest.mark.parametrize("answer, integer", [
    ("$1,080", 0.5), ("-7", 0.5), ("18.00", 0.5), ("9" * 5000, 0.5), ("18.0000000000000001", 0.0),
    ("72.5", 0.0), ("many", 0.0), ("2 2/3", 0.0), ("7\n2", 0.0)])
def test_an_integer_is_paid(answer, integer):
    assert value("int_reward_func", perfect(answer)) == integer


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_perfect_answer_earns_every_maximum(fmt):
    said = {"role": "assistant", "content": perfect(fmt=fmt)}
    again = {"role": "user", "content": "again"}
    for completion in (
        perfect(fmt=fmt), [said], [{"role": "assistant", "content": "no"}, again, said, again],
        [said | {"content": [{"type": "text", "text": said["content"]}]}],
    ):
        assert {name: value(name, completion, fmt=fmt) for name in REWARD_FUNCS} == MAXIMUM


def test_a_misaligned_answer_column_raises_with_both_lengths():
    for name in ("correctness_reward_func", "check_answer_correctness", "check_numbers_extraction"):
        for column in ({"answer": ["1"]}, {"answer": []}, {"solution": ["1", "2"]}):  # renamed
            n = len(column.get("answer", ()))
            with pytest.raises(ValueError, match=f"2 completions but {n} answers"):
                REWARD_FUNCS[name](["", ""], ["a", "b"], **column)


def test_a_fault_in_the_data_or_the_code_raises_instead_of_scoring_zero():
    for name in REWARD_FUNCS:
        with pytest.raises(KeyError, match="yaml"):
            value(name, "72", fmt="yaml")
        with pytest.raises(AttributeError):
            value(name, [72])
    with pytest.raises(ValueError, match="'lenient'"):
        is_correct("72", "72", mode="lenient")


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_prompt_names_the_tags_that_are_rewarded(fmt):
    prompt, tags = FORMATS[fmt].system_prompt, FORMATS[fmt].tags
    assert sorted(tags, key=prompt.index) == list(tags)


def test_examples_in_the_docstrings():
    assert doctest.testmod(rewards).failed == 0


# ---- What holds for every text -------------------------------------------------------------------
PIECES = st.sampled_from([tag for fmt in FORMATS.values() for tag in fmt.tags] + [
    "72", "70", "\n", " ", "####", "=", "$", "-", ",", ".", "\\boxed{", "1e9", "²", "text", "\x00",
    "<think>", "</think>", "48 / 2 = 24", ":00", "\\!", "{,}", "\udc80"])
TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))
FMT = st.sampled_from(list(FORMATS))


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4).flatmap(
    lambda texts: st.tuples(st.just(texts), st.permutations(range(len(texts))))),
    st.sampled_from(["72", "-1,080", "0", "x", ""]) | TEXT, FMT)
def test_never_raises_gives_one_finite_float_each_whatever_the_order(batch, gold, fmt):
    texts, order = batch
    golds = [gold, "72", "70", "0"][: len(texts)]
    for name, func in REWARD_FUNCS.items():
        values = func([""] * len(texts), texts, answer=golds, fmt=fmt)
        assert len(values) == len(texts)
        assert all(isinstance(v, float) and math.isfinite(v) for v in values), name
        assert max(values) <= MAXIMUM[name]
        permuted = func([""] * len(texts), [texts[i] for i in order],
                        answer=[golds[i] for i in order], fmt=fmt)
        assert permuted == [values[i] for i in order], name
    for text in texts:
        assert is_correct(text, gold, fmt=fmt) in (True, False)
        assert is_correct(text, gold, mode="flexible", fmt=fmt) in (True, False)
        assert isinstance(extract_xml_answer(text), str)
        assert isinstance(extract_hash_answer(text), str | None)
        assert text.endswith(after_thinking(text)) and vote([text], fmt)[1] in (0, 1)
        assert (answer_fault(text, gold, fmt) is None) == is_correct(text, gold, fmt=fmt)
        for number in (parse_number(text), last_number(text)):
            assert number is None or number.is_finite()


@settings(max_examples=150, deadline=None)
@given(TEXT, FMT, st.sampled_from(["72", "70", "many", "72 or 73"]))
def test_nothing_added_to_a_finished_completion_earns_more(extra, fmt, answer):
    honest = perfect(answer, fmt=fmt)
    for name in REWARD_FUNCS:
        best = value(name, honest, fmt=fmt)
        for text in (honest + extra, extra + honest, honest + "\n" + extra):
            assert value(name, text, fmt=fmt) <= best, name


# ---- Golds graded against themselves -------------------------------------------------------------
@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K's files are not beside this checkout")
def test_all_gsm8k_golds():
    """100 % for the golds themselves, 0 % for a constant, every maximum for each solution."""
    rows = [json.loads(line)["answer"] for name in ("train", "test")
            for line in (GSM8K / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == 8792
    golds = [extract_hash_answer(row) for row in rows]
    for gold, row in zip(golds, rows):
        assert is_correct(BLOCK(gold), row), gold
        assert is_correct(row, gold, mode="flexible")
        assert not is_correct(BLOCK("-123456789"), row)
    worked = [re.sub(r"<<[^<>]*>>", "", row.rpartition("####")[0]) for row in rows]
    for fmt in FORMATS:
        texts = [perfect(gold, solution, fmt) for gold, solution in zip(golds, worked)]
        for func in REWARD_FUNCS.values():
            assert set(func(rows, texts, answer=golds, fmt=fmt)) == {MAXIMUM[func.__name__]}


# ---- Cost ----------------------------------------------------------------------------------------
HOSTILE = [
    "<answer>", "</answer>", "<reasoning></reasoning><answer></answer>", "<reasoning><answer>",
    "<answer", "<think></think>", "9", "7 ", "1,", ",123", ".5", ".", "=", "-", "\u2212", "$", "a ",
    "a-", "\n", " ", "\u00a0", "\\boxed{", "\\", "{,}", "*", "#", "😀", "7+7=14 ", "7 + 7 = 14, ",
    "7+", "1{,}", "1\\!", "1:00 ", "1:00", "７", "\u200b", "1\u2009", "3–5", "m^2", "2x", "x = 1, ",
    "元", "\u0303", "Rs.",
]  # fmt: skip
FUNCTIONS = {
    **{name: lambda text, name=name: value(name, text) for name in REWARD_FUNCS},
    "answer_fault": lambda text: answer_fault(text, "72"), "parse_number": parse_number,
    "after_thinking": after_thinking, "vote": lambda text: vote([text], "xml"),
    "gold": lambda text: is_correct(BLOCK("72"), text), "strict": lambda t: is_correct(t, "72"),
    "flexible": lambda text: is_correct(text, "72", mode="flexible"), "last_number": last_number,
    "extract_xml_answer": extract_xml_answer, "extract_hash_answer": extract_hash_answer,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("piece", HOSTILE)
def test_a_hostile_megabyte_costs_under_a_tenth_of_a_second(piece):
    body = "1" + piece * (10**6 // len(piece))
    unclosed = f"<reasoning>w</reasoning><answer>{body}"
    for text in (body, unclosed, unclosed + "</answer>", perfect(reasoning=body), body + "72"):
        for name, func in FUNCTIONS.items():
            runs = (timeit(partial(func, text), number=1) for _ in range(3))
            assert any(seconds < 0.1 for seconds in runs), name  # a slow one measured other work


@pytest.mark.parametrize("python", ["/usr/bin/python3", "python3.11", "python3.12", "python3.13"])
def test_numbers_are_read_alike_by_every_python_there_is(python):
    """Possessive quantifiers, new in 3.11, had faults up to 3.11.4, which Debian 12 still has."""
    path = shutil.which(python)
    version = "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
    if path is None or subprocess.run([path, "-c", version]).returncode:
        pytest.skip(f"no {python} here that the scripts run on")
    code = ("import json, sys; from rewards import Decimal, parse_number; "
            "print([text for number, text in json.load(sys.stdin) "
            "if parse_number(text) != (number and Decimal(number))])")
    done = subprocess.run([path, "-c", code], cwd=Path(rewards.__file__).parent, text=True,
                          input=json.dumps(READ), capture_output=True)
    assert done.stdout.strip() == "[]", done.stdout[-500:] + done.stderr[-500:]


def test_import_is_quick_and_takes_the_standard_library_only():
    code = ("import sys; from timeit import timeit; before = set(sys.modules); "
            "print(timeit('import rewards', number=1), *set(sys.modules) - before)")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=Path(rewards.__file__).parent).stdout.split() for _ in range(5)]
    assert min(float(run[0]) for run in runs) < 0.15
    modules = {name.partition(".")[0] for name in runs[0][1:]}
    assert modules - {"rewards"} <= set(sys.stdlib_module_names)


# ---- The backend, chosen from plain values -------------------------------------------------------
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
    ("auto", "auto", True, BOTH, {"alone": False}, ("transformers", "colocate")),
    ("auto", "auto", True, BOTH, {"lora": False}, ("transformers", "colocate")),
])
def test_the_backend_follows_from_what_is_there(wanted, vllm, gpu, packages, more, chosen):
    *found, why = choose_backend(wanted, vllm, gpu, packages, **more)
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
    with pytest.raises(SystemExit, match="2"):
        choose_backend(wanted, vllm, gpu, packages, **more)
    assert says in one_error_line(capsys)


def one_error_line(capsys) -> str:
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err[-1:] == "\n" and err[:-1].isprintable()
    return err


def test_errors_are_one_line_and_name_the_nearest_option(capsys):
    parser = rewards.OneLineParser()
    parser.add_argument("--steps", type=rewards.number(int, 1, below=9))
    assert parser.parse_args(["--steps", "8"]).steps == 8
    for typed, says in [(["--setps", "1"], "did you mean --steps?"),
                        (["--steps", "0"], "0 is not at least 1 and below 9"),
                        (["--steps", "9"], "below 9"), (["--steps", "x"], "invalid int value")]:
        with pytest.raises(SystemExit, match="2"):
            parser.parse_args(typed)
        assert says in one_error_line(capsys)
    with pytest.raises(SystemExit, match="2"):
        rewards.stop("a\x1b[31m\r\nb\udc80  c")
    assert one_error_line(capsys) == "error: a [31m b c\n"


@pytest.mark.parametrize("record, rank", [
    (None, 64), ({"r": 8}, 8), ({"r": 64, "rank_pattern": {}}, 64), ({"r": 65}, 128),
    ({"r": 300}, 320), ({"r": 16, "rank_pattern": {"q_proj": 24}}, 32), ({"r": 400}, 512)])
def test_the_engine_holds_the_adapter_that_is_there(record, rank, tmp_path):
    if record:
        (tmp_path / "adapter_config.json").write_text(json.dumps(record))
    assert rewards.max_lora_rank(str(tmp_path), fresh=50) == rank
