"""What rewards.py promises: `pytest test_rewards.py`. Its speed: `python test_rewards.py`.

Each row of a table is (input, expected, why it is there). The benchmark is not a test: it prints
completions a second for every reward, beside math-verify where that is installed.
"""

import doctest
import inspect
import itertools
import json
import math
import re
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rewards
from options import RECIPES
from rewards import (
    FORMATS, REWARD_FUNCS, explain, extract_hash_answer, extract_xml_answer, is_correct,
    last_number, parse_number,
)

GSM8K = Path(__file__).resolve().parent.parent / "shared" / "gsm8k"
MAXIMUM = {
    "correctness_reward_func": 1.0, "int_reward_func": 0.5, "strict_format_reward_func": 0.5,
    "soft_format_reward_func": 0.5, "xmlcount_reward_func": 0.5, "match_format_exactly": 3.0,
    "match_format_approximately": 2.0, "check_answer_correctness": 3.0,
    "check_numbers_extraction": 1.5,
}


def perfect(answer="72", reasoning="48 / 2 = 24\n48 + 24 = 72", fmt="xml") -> str:
    return FORMATS[fmt].render(reasoning, answer)


def value(name: str, text: str, gold: str = "72", fmt: str = "xml") -> float:
    return REWARD_FUNCS[name]([""], [text], answer=[gold], fmt=fmt)[0]


# ---- Numbers -------------------------------------------------------------------------------------
NUMBERS = [
    ("72", "72", "plain"), ("-7", "-7", "negative"), ("\u22127", "-7", "U+2212 minus"),
    ("+5", "5", "plus sign"), ("007", "7", "leading zeros"), ("0", "0", "zero"),
    ("-0", "0", "minus zero"), ("1,080", "1080", "thousands comma"),
    ("1,234,567", "1234567", "two commas"), ("1,080.50", "1080.5", "comma and decimals"),
    ("18.", "18", "trailing period"), ("18.00", "18", "trailing zeros"), ("72.0", "72", ".0"),
    (".5", "0.5", "no leading zero"), ("$18", "18", "dollar before"), ("72$", "72", "dollar after"),
    ("72 €", "72", "euro after"), ("£1,080", "1080", "pound and comma"), ("-$5", "-5", "sign, $"),
    ("$-5", "-5", "$, sign"), ("$ 72", "72", "dollar, space"), ("50%", "50", "percent"),
    ("50 %", "50", "space, percent"), ("72 km/h", "72", "unit with a slash"),
    ("72 dollars", "72", "unit"), ("72 miles-per-hour", "72", "hyphens in a unit"),
    ("3 quarters", "3", "coins, no fraction"), ("5 times", "5", "times as a unit"),
    ("72 apples, total", "72", "comma after a unit"), ("72km", "72", "unit without space"),
    ("**72**", "72", "bold"), ("**$72**", "72", "bold money"), ("`72`", "72", "code"),
    ("\\boxed{72}", "72", "boxed"), ("\\boxed{\\$72}", "72", "boxed money"),
    ("\\boxed{1{,}080\\text{ dollars}}", "1080", "LaTeX comma and text"), ("$72$", "72", "maths"),
    ("\\(72\\)", "72", "inline maths"), ("72\\%", "72", "LaTeX percent"),
    ("72\u00a0dollars", "72", "no-break space"), ("\n 72 \n", "72", "white space"),
    ("72" + " " * 999, "72", "spaces after are no prose"), ("72 piñatas", "72", "accented unit"),
    ("5 m", "5", "metres, not millions"), ("72 o’clock", "72", "typographic apostrophe"),
    ("$- 5$", "-5", "space after the sign"),
    ("72 dollars in one week", "72", "a number word that is no part of the value"),
    ("9" * 9999, "9" * 9999, "longer than int() reads"), ("0.30", "0.3", "no float between"),
    ("x = 5", "5", "right of ="), ("48 + 24 = 72", "72", "what follows the last ="),
    ("a = 3 = 4", "4", "the last of two ="), ("$x = 72$", "72", "equation in maths"),
    ("48+24", None, "does not evaluate"), ("72 = 48+24", None, "nor right of ="),
    ("7 2", None, "does not join digits"), ("7\u00a02", None, "nor over a no-break space"),
    ("72 or 73", None, "one of several"), ("72, 73", None, "a list"), ("2 2/3", None, "mixed"),
    ("1/2", None, "fraction"), ("½", None, "fraction sign"), ("7½", None, "digit, fraction sign"),
    ("2 and a half", None, "fraction in words"), ("72²", None, "superscript"),
    ("7**2", None, "power"), ("72^2", None, "power"), ("1e5", None, "scientific notation"),
    ("inf", None, "infinity"), ("NaN", None, "not a number"), ("", None, "empty"),
    ("seventy", None, "words"), ("1,08", None, "short group"), ("10,80", None, "short group"),
    ("1080,000", None, "long first group"), (",072", None, "no first group"),
    ("1.080.000", None, "points as separators"), ("1_000", None, "underscore"),
    ("12:30", None, "a time"), ("--5", None, "two signs"), ("-$-5", None, "two signs"),
    ("5 thousand", None, "scale word"), ("5k", None, "scale letter"), ("5M", None, "million"),
    ("2 dozen", None, "scale word"), ("72 or more", None, "hedge"), ("<= 72", None, "bound"),
    ("x != 72", None, "not equal"), ("~72", None, "about"), ("72!", None, "factorial"),
    ("٧٢", None, "other digits are not guessed at"), ("72" + " a" * 99, None, "prose, not a unit"),
    ("5 minus a bit", None, "arithmetic in words"), ("it is 72", None, "words before"),
    ("72 dollars and fifty cents", None, "the rest in words"), ("7 point five", None, "in words"),
    ("7 times two", None, "a product in words"), ("7 tens", None, "scale word"),
    ("36 pi", None, "a multiple of pi"), ("5 below zero", None, "a sign in words"),
    ("x = 71 or x = 72", None, "two equations are a hedge"), ("x =/= 72", None, "not equal"),
    ("0,072", None, "no group begins with 0"), ("1,080,50", None, "comma as decimal point"),
    ("72,", None, "an unfinished group"), ("7万", None, "a scale in another script"),
    ("4 10/3", None, "improper mixed number"), ("\\boxed{7}\\boxed{2}", None, "two boxes"),
    ("\\frac{1}{2}", None, "LaTeX fraction"), ("x^{72}", None, "exponent"),
    ("±5", None, "two values"),
]  # fmt: skip


@pytest.mark.parametrize("text, number, why", NUMBERS, ids=[f"{r[2]}: {r[0][:9]}" for r in NUMBERS])
def test_parse_number(text, number, why):
    assert parse_number(text) == (None if number is None else Decimal(number)), why


LAST = [
    ("so it is 72.", "72", "sentence end"), ("so 1,080 dollars.", "1080", "comma"),
    ("48 and then 24", "24", "the last of two"), ("costs $-5", "-5", "money"),
    ("wait... 72", "72", "dots before"), ("72km", "72", "unit"), ("x is .5", "0.5", "no zero"),
    ("\u22127 degrees", "-7", "U+2212"), ("12.5.2020", None, "a date"), ("none", None, "no digit"),
    ("", None, "empty"), ("10-5", "-5", "as lm-evaluation-harness reads it"),
    ("the sum is 234 ... so **73**.", "73", "bold"), ("(72)", "72", "in brackets"),
    ("\\boxed{840}. So \\boxed{004}", "4", "boxes are not joined"), ("72, or so", "72", "comma"),
    ("a total of $1,080.00!", "1080", "money"), ("10,80", None, "malformed groups are not joined"),
]  # fmt: skip


@pytest.mark.parametrize("text, number, why", LAST)
def test_last_number(text, number, why):
    assert last_number(text) == (None if number is None else Decimal(number)), why


# ---- Verdicts ------------------------------------------------------------------------------------
BLOCK = "<answer>{}</answer>".format
VERDICTS = [  # completion, gold, strict, flexible, why
    (perfect(), "72", True, True, "perfect"), (BLOCK("72"), "72", True, True, "no reasoning"),
    (BLOCK("-5"), "\u22125", True, True, "sign of the gold"),
    (BLOCK("72"), "working #### 72", True, True, "a whole GSM8K solution as gold"),
    (perfect("70", "or 72?"), "72", False, False, "gold in the reasoning"),
    ("#### 72", "72", False, True, "a number outside every tag"),
    (BLOCK("70"), "72", False, False, "wrong"), (BLOCK("-72"), "72", False, False, "sign"),
    (BLOCK("72") + BLOCK("73"), "72", False, False, "two blocks are a hedge"),
    (BLOCK("73") + BLOCK("72"), "72", False, True, "flexible takes the last number then"),
    (BLOCK("72") * 2, "72", False, True, "two equal blocks are still two"),
    ("<answer>72", "72", False, True, "unclosed"), ("72</answer>", "72", False, True, "unopened"),
    ("</answer>72<answer>", "72", False, True, "reversed"), ("72", "72", False, True, "no block"),
    (BLOCK("72 or 73"), "72", False, False, "candidates in the block"),
    (BLOCK("") + " 72", "72", False, False, "an empty block is read, the text after is not"),
    ("The answer is 72.", "72", False, True, "prose"), ("", "72", False, False, "empty"),
    (BLOCK("72"), "none", False, False, "a gold that is no number is matched by nothing"),
    (BLOCK("none"), "none", False, False, "nor by itself"),
]  # fmt: skip


@pytest.mark.parametrize("text, gold, strict, flexible, why", VERDICTS,
                         ids=[row[-1] for row in VERDICTS])
def test_is_correct(text, gold, strict, flexible, why):
    assert (is_correct(text, gold), is_correct(text, gold, mode="flexible")) == (strict, flexible)
    assert value("correctness_reward_func", text, gold) == strict


def test_is_correct_reads_either_format_and_refuses_other_modes():
    assert is_correct(perfect(fmt="cookbook"), "72", fmt="cookbook")
    assert not is_correct(perfect(fmt="cookbook"), "72", fmt="xml")
    with pytest.raises(ValueError, match="'lenient'"):
        is_correct("72", "72", mode="lenient")


def test_extractors():
    assert extract_xml_answer("a <answer>\n72\n</answer> b") == "72"
    assert extract_xml_answer("<answer>1</answer><answer>2") == "2"
    assert extract_xml_answer("72") == ""
    assert extract_hash_answer("48 #### 24 #### 1,080") == "1,080"
    assert extract_hash_answer("72") is None
    assert FORMATS["xml"].system_prompt == rewards.SYSTEM_PROMPT


# ---- Reward functions ----------------------------------------------------------------------------
INLINE = "<reasoning>48 / 2 = 24</reasoning><answer>72</answer>"
FORMAT_ROWS = [  # text, strict, soft, tag count, why
    (perfect(), 0.5, 0.5, 0.5, "perfect, where some charge the whole text: no final newline"),
    (perfect() + "\n", 0.5, 0.5, 0.5, "final newline"), ("\n" + perfect(), 0.5, 0.5, 0.5, "first"),
    (perfect(reasoning="a\n\nb\nc"), 0.5, 0.5, 0.5, "multi-line reasoning, where . fails"),
    (perfect(answer="70"), 0.5, 0.5, 0.5, "format does not judge the answer"),
    (perfect().replace("\n", "\r\n"), 0.5, 0.5, 0.5, "Windows line ends"),
    (INLINE, 0.0, 0.5, 0.5, "tags not on their own lines"),
    (perfect() + " so 72", 0.0, 0.5, 0.495, "text after the end"),
    ("Well. " + perfect(), 0.0, 0.5, 0.5, "text before"),
    (perfect().replace("\n<answer>", "\nso\n<answer>"), 0.0, 0.0, 0.5, "text between"),
    (perfect(reasoning=" "), 0.0, 0.0, 0.5, "empty reasoning"),
    (perfect(answer=" "), 0.0, 0.0, 0.5, "empty answer"),
    (perfect() * 2, 0.0, 0.0, 0.0, "repeated blocks"),
    (BLOCK("72"), 0.0, 0.0, 0.25, "no reasoning"), ("72", 0.0, 0.0, 0.0, "no tags"),
    ("<answer>", 0.0, 0.0, 0.125, "one tag"),
    ("<answer>" * 9, 0.0, 0.0, 0.0, "a tag paid anew each time"), ("", 0.0, 0.0, 0.0, "empty"),
    (perfect() + "x" * 10**4, 0.0, 0.5, 0.4, "the charge for trailing text is bounded"),
    (BLOCK("72") + "\n<reasoning>\na\n</reasoning>", 0.0, 0.0, 0.5, "wrong order"),
    (BLOCK("72") + f"<reasoning>{'a' * 99}</reasoning>", 0.0, 0.0, 0.5, "its length is no matter"),
    ("<reasoning>\n" + "a" * 999, 0.0, 0.0, 0.125, "cut off in the reasoning"),
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
    (SOLUTION("100"), "100", 3.0, 1.5, 2.0, "exact"), (SOLUTION("$100"), "100", 3.0, 1.5, 2.0, "$"),
    (SOLUTION("110"), "100", 1.5, 0.0, 2.0, "10 % above"),
    (SOLUTION("90"), "100", 1.5, 0.0, 2.0, "10 % below"),
    (SOLUTION("110.001"), "100", 0.5, 0.0, 2.0, "a hair over 10 %"),
    (SOLUTION("120"), "100", 0.5, 0.0, 2.0, "20 % above"),
    (SOLUTION("120.001"), "100", -0.5, 0.0, 2.0, "a hair over 20 %"),
    (SOLUTION("-100"), "-100", 3.0, 1.5, 2.0, "negative"),
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


ANSWERS = [  # answer in perfect format, gold, right, integer, what other graders stumble over
    ("1,080", "1080", 1, 1, "a comma"), ("1080", "1,080", 1, 1, "a comma in the gold"),
    ("$72", "72", 1, 1, "a currency sign"), ("72.", "72", 1, 1, "a trailing period"),
    ("18.00", "18", 1, 1, "a string comparison fails"), ("-7", "-7", 1, 1, "a sign"),
    ("18.0000000000000001", "18", 0, 0, "a float comparison passes"),
    ("\u22127", "-7", 1, 1, "U+2212 for minus"), ("**73**", "73", 1, 1, "bold"),
    ("2 2/3", "2", 0, 0, "a part of a mixed number"), ("12", "2", 0, 1, "gold as a substring"),
    ("", "72", 0, 0, "the empty substring"), ("7\n2", "72", 0, 0, "two lines"),
    ("72", "unknown", 0, 1, "an unreadable gold pays nobody, some pay everybody"),
    ("72.5", "72.5", 1, 0, "no integer"), ("many", "many", 0, 0, "no number"),
    ("9" * 5000, "9" * 5000, 1, 1, "longer than int() reads"),
]  # fmt: skip


@pytest.mark.parametrize("answer, gold, right, integer, why", ANSWERS, ids=[r[-1] for r in ANSWERS])
def test_correctness_and_integer_rewards(answer, gold, right, integer, why):
    assert value("correctness_reward_func", perfect(answer), gold) == right
    assert value("int_reward_func", perfect(answer), gold) == 0.5 * integer


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("messages", [
    "{}", [("assistant", "{}")], [("assistant", [{"type": "text", "text": "{}"}])],
    [("assistant", "no"), ("user", "again"), ("assistant", "{}"), ("tool", "done")],
], ids=["string", "conversation", "parts", "last assistant message"])
def test_a_perfect_answer_earns_every_maximum(messages, fmt):
    dump = json.dumps(messages if isinstance(messages, str) else [
        {"role": role, "content": content} for role, content in messages])
    completion = json.loads(dump.replace('"{}"', json.dumps(perfect(fmt=fmt))))
    assert {name: value(name, completion, fmt=fmt) for name in REWARD_FUNCS} == MAXIMUM


@pytest.mark.parametrize("answer", [["1"], ["1", "2", "3"], []])
def test_a_misaligned_answer_column_raises_with_both_lengths(answer):
    for name in ("correctness_reward_func", "check_answer_correctness", "check_numbers_extraction"):
        with pytest.raises(ValueError, match=f"2 completions but {len(answer)} answers"):
            REWARD_FUNCS[name](["", ""], ["a", "b"], answer=answer)
        with pytest.raises(ValueError, match="2 completions but 0 answers"):  # renamed column
            REWARD_FUNCS[name](["", ""], ["a", "b"], solution=["1", "2"])


def test_a_fault_in_the_data_or_the_code_raises_instead_of_scoring_zero():
    for name in REWARD_FUNCS:
        with pytest.raises(KeyError, match="yaml"):
            value(name, "72", fmt="yaml")
        with pytest.raises(AttributeError):
            value(name, [72])


@pytest.mark.parametrize("fmt", FORMATS)
def test_the_prompt_names_the_tags_that_are_rewarded(fmt):
    prompt, tags = FORMATS[fmt].system_prompt, FORMATS[fmt].tags
    assert sorted(tags, key=prompt.index) == list(tags)


REASONS = [
    (perfect("70"), "correctness_reward_func", "the answer is 70, the gold is 72"),
    (BLOCK("7") * 2, "correctness_reward_func", "2 answer tags are a hedge"),
    ("<answer>72", "correctness_reward_func", "there is no closed answer block"),
    (BLOCK("many"), "int_reward_func", "the answer 'many' is not one number"),
    (INLINE, "strict_format_reward_func", "<reasoning> is not alone on its line"),
    (perfect(reasoning=""), "soft_format_reward_func", "the reasoning is empty"),
    (BLOCK("72") + "!", "xmlcount_reward_func",
     "2 of 4 tags occur once, 1 characters follow the last"),
    (perfect("70"), "check_answer_correctness", "the answer is 70, the gold is 72: within 10 %"),
    ("<answer>70", "check_numbers_extraction", "after <answer> stands 70, not the gold"),
]  # fmt: skip


@pytest.mark.parametrize("text, name, why", REASONS)
def test_explain_gives_the_values_of_the_rewards_and_a_reason_each(text, name, why):
    explained = explain([{"role": "assistant", "content": text}], "72", "xml")
    assert explained[name][1] == why
    for name, (number, why) in explained.items():
        assert number == value(name, text) and len(why) > 10, name


def test_examples_in_the_docstrings():
    assert doctest.testmod(rewards).failed == 0


# ---- What holds for every recipe -----------------------------------------------------------------
RECIPE_REWARDS = {
    name: list(zip(recipe["reward_funcs"], recipe["reward_weights"]))
    for name, recipe in RECIPES.items()
}
RECIPE_FORMATS = {name: recipe.get("format", "xml") for name, recipe in RECIPES.items()}


def total(recipe: str, text: str, gold: str) -> float:
    fmt = RECIPE_FORMATS[recipe]
    return sum(weight * value(name, text, gold, fmt) for name, weight in RECIPE_REWARDS[recipe])


WHOLE = "{0}\nw\n{1}\n{2}\n100\n{3}"
TOTALS = [  # gold 100; qwen-3b, qwen-0.5b-fp32, small-models, smollm2-135m, cookbook
    (WHOLE, 1.5, 3.5, 4.0, 3.5, 9.5, "right, perfect"),
    ("{2}100{3}", 1.0, 2.25, 2.75, 2.75, 4.5, "right, answer block only"),
    ("{0}w{1}{2}100{3}", 1.0, 3.0, 3.5, 3.0, 9.5, "right, tags not on their own lines"),
    (WHOLE + " I hope it helps.", 1.0, 2.984, 3.484, 2.984, 6.5, "right, text after the end"),
    (WHOLE.replace("100", "9"), 0.5, 1.5, 2.0, 1.5, 4.5, "far wrong, perfect format"),
    (WHOLE.replace("100", "95"), 0.5, 1.5, 2.0, 1.5, 6.5, "5 % off, perfect format"),
    (WHOLE + "\n{2}\n100\n{3}", 0.0, 0.25, 0.25, 0.25, -0.5, "two answer blocks"),
    ("w, so it is 100.", 0.0, 0.0, 0.0, 0.0, -2.5, "no tags, the right number"),
    (WHOLE.replace("w", ""), 1.0, 2.5, 3.0, 3.0, 6.5, "right, empty reasoning"),
    ("{0}\nw\n{1}\n{2}\n100", 0.0, 0.375, 0.375, 0.375, 2.0, "right, answer not closed"),
]  # fmt: skip


@pytest.mark.parametrize("row", TOTALS, ids=[row[-1] for row in TOTALS])
def test_what_each_recipe_gives(row):
    text, *totals, why = row
    for (name, fmt), expected in zip(RECIPE_FORMATS.items(), totals):
        assert total(name, text.format(*FORMATS[fmt].tags), "100") == pytest.approx(expected), name


@pytest.mark.parametrize("gold", ["100", "2.5"])
@pytest.mark.parametrize("name", RECIPES)
def test_no_wrong_answer_in_perfect_format_beats_a_right_one(name, gold):
    fmt = RECIPE_FORMATS[name]
    r_open, r_close, a_open, a_close = FORMATS[fmt].tags
    junk = ["", "x" * 500, r_open, r_close, r_open * 2, r_close * 2, r_close + r_open]
    right = [f"{before}{a_open}{gold}{a_close}{after}"
             for before, after in itertools.product(junk, junk)]
    assert all(is_correct(text, gold, fmt=fmt) for text in right)
    worst = min(total(name, text, gold) for text in right)
    assert total(name, perfect("9", fmt=fmt), gold) <= worst
    near = total(name, perfect(str(Decimal(gold) * 95 / 100), fmt=fmt), gold)
    assert (near > worst) == (name == "cookbook")  # its near-miss credit, as that recipe states it


PIECES = st.sampled_from([tag for fmt in FORMATS.values() for tag in fmt.tags] + [
    "72", "70", "\n", " ", "####", "=", "$", "-", ",", ".", "\\boxed{", "1e9", "²", "text", "\x00"])
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


SHAPES = [
    WHOLE, "{0}w{1}", "{0}w", "{2}100{3}{0}w{1}", "{0}w{1}{2}100", "{0}w{2}100{3}", "w{2}1{3}",
]  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="abc 123=+\n", max_size=300), st.sampled_from(SHAPES), FMT)
def test_no_value_depends_on_the_reasonings_length(reasoning, shape, fmt):
    short, long = (shape.replace("w", working).format(*FORMATS[fmt].tags)
                   for working in ("a", f"a{reasoning}b"))
    for name in REWARD_FUNCS:
        assert value(name, long, "100", fmt) == value(name, short, "100", fmt), name


@settings(max_examples=100, deadline=None)
@given(st.integers(-10**9, 10**9), st.sampled_from([
    "{}", "{}.", "{}.00", "${}", "{} cm", "**{}**", "\\boxed{{{}}}", "${}$", "x = {}", " {}\n"]))
def test_formatting_of_the_number_changes_no_verdict(number, template):
    for plain in (str(number), f"{number:,}", str(number).replace("-", "\u2212")):
        assert is_correct(perfect(template.format(plain)), str(number))
        assert is_correct(perfect(str(number)), template.format(plain))
        assert not is_correct(perfect(template.format(plain)), str(number + 1))


# ---- Golds graded against themselves -------------------------------------------------------------
def check_golds(rows: list[dict]) -> None:
    """100 % for the golds themselves, 0 % for a constant, every maximum for each solution."""
    golds = [extract_hash_answer(row["answer"]) for row in rows]
    for gold, row in zip(golds, rows):
        assert is_correct(BLOCK(gold), row["answer"]), gold
        assert is_correct(row["answer"], gold, mode="flexible")
        assert not is_correct(BLOCK("-123456789"), row["answer"])
    worked = [re.sub(r"<<[^<>]*>>", "", row["answer"].rpartition("####")[0]) for row in rows]
    for fmt in FORMATS:
        texts = [perfect(gold, solution, fmt) for gold, solution in zip(golds, worked)]
        for name, func in REWARD_FUNCS.items():
            assert set(func([""] * len(rows), texts, answer=golds, fmt=fmt)) == {MAXIMUM[name]}


def test_generated_golds():
    from questions import generate_questions

    check_golds(generate_questions(400) + generate_questions(100, split="test"))


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K's files are not beside this checkout")
def test_all_gsm8k_golds():
    rows = [json.loads(line) for name in ("train", "test")
            for line in (GSM8K / f"{name}.jsonl").read_text().splitlines()]
    assert len(rows) == 8792
    check_golds(rows)


# ---- Cost ----------------------------------------------------------------------------------------
HOSTILE = {
    "opening tags": "<answer>", "closing tags": "</answer>",
    "all tags": "<reasoning></reasoning><answer></answer>", "nested": "<reasoning><answer>",
    "half tags": "<answer", "digits": "9", "numbers": "7 ", "commas": "1,", "groups": ",123",
    "decimals": ".5", "dots": ".", "equations": "=", "signs": "-", "minus signs": "\u2212",
    "currency": "$", "words": "a ", "hyphens": "a-", "newlines": "\n", "spaces": " ",
    "no-break spaces": "\u00a0", "boxes": "\\boxed{", "backslashes": "\\", "braces": "{,}",
    "stars": "*", "hashes": "#", "emoji": "😀",
}  # fmt: skip
FUNCTIONS = {
    **{name: lambda text, name=name: value(name, text) for name in REWARD_FUNCS},
    "explain": lambda text: explain(text, "72"), "parse_number": parse_number,
    "gold": lambda text: is_correct(BLOCK("72"), text), "strict": lambda t: is_correct(t, "72"),
    "flexible": lambda text: is_correct(text, "72", mode="flexible"), "last_number": last_number,
    "extract_xml_answer": extract_xml_answer, "extract_hash_answer": extract_hash_answer,
}  # fmt: skip


def fastest(func, runs: int = 3, enough: float = 0.0) -> float:
    """Seconds of the best of several runs; the others measured the machine's other work."""
    best = math.inf
    for _ in range(runs):
        begun = time.perf_counter()
        func()
        best = min(best, time.perf_counter() - begun)
        if best < enough:
            break
    return best


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_megabyte_costs_under_a_tenth_of_a_second(kind):
    body = "1" + HOSTILE[kind] * (10**6 // len(HOSTILE[kind]))
    unclosed = f"<reasoning>w</reasoning><answer>{body}"
    for text in (body, unclosed, unclosed + "</answer>", perfect(reasoning=body), body + "72"):
        for name, func in FUNCTIONS.items():
            assert fastest(lambda f=func, t=text: f(t), enough=0.1) < 0.1, name


@pytest.mark.parametrize("kind", ["nested", "digits", "groups", "decimals", "hyphens", "spaces"])
def test_twice_the_text_costs_less_than_four_times_the_time(kind):
    half = HOSTILE[kind] * (500_000 // len(HOSTILE[kind]))
    for name, func in FUNCTIONS.items():
        for one, two in ((half, half * 2), (BLOCK(half), BLOCK(half * 2))):
            limit = 4 * max(0.001, fastest(lambda f=func, t=one: f(t)))
            assert fastest(lambda f=func, t=two: f(t), 9, enough=limit) < limit, name


def test_import_is_quick_and_takes_the_standard_library_only():
    code = ("import sys, time; before = set(sys.modules); begun = time.perf_counter();"
            "import rewards; print(time.perf_counter() - begun);"
            "print(*sorted(set(sys.modules) - before))")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parent).stdout.split("\n") for _ in range(5)]
    assert min(float(run[0]) for run in runs) < 0.05
    modules = {name.partition(".")[0] for name in runs[0][1].split()}
    assert modules - {"rewards"} <= set(sys.stdlib_module_names)


# ---- Benchmark -----------------------------------------------------------------------------------
def benchmark(n: int = 400) -> None:
    """Completions a second, on perfect, wrong, inline and unformatted completions in turn."""
    from questions import generate_questions

    rows = generate_questions(n)
    golds = [extract_hash_answer(row["answer"]) for row in rows]
    texts = {fmt: [] for fmt in FORMATS}
    for i, (gold, row) in enumerate(zip(golds, rows)):
        worked = f"{row['question']} Step by step:\n{row['answer'].rpartition('####')[0]}"
        for fmt, made in texts.items():
            whole, wrong = perfect(gold, worked, fmt), perfect("7", worked, fmt)
            kinds = whole, wrong, whole.replace("\n", " "), f"{worked} So it is {gold}."
            made.append(kinds[i % len(kinds)])
    speeds = {}
    for name, func in REWARD_FUNCS.items():
        made = texts[inspect.signature(func).parameters["fmt"].default]
        speeds[name] = n / fastest(lambda f=func, t=made: f([""] * n, t, answer=golds), 5)
    try:
        from math_verify import parse, verify
    except ImportError:
        print("compared with math-verify where it is installed: pip install math-verify==0.9.0")
    else:
        speeds["math-verify (parse, verify)"] = n / fastest(lambda: [
            verify(parse(gold), parse(text)) for gold, text in zip(golds, texts["xml"])])
    print(f"{n} completions, {sum(map(len, texts['xml'])) // n} characters each on average")
    slowest = speeds.get("math-verify (parse, verify)")
    for name, speed in speeds.items():
        ratio = f"{speed / slowest:10,.0f} x math-verify" if slowest else ""
        print(f"{name:30}{speed:12,.0f} completions/s{ratio}")


if __name__ == "__main__":
    benchmark()
