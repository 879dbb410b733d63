"""What rewards.py promises: `pytest test_rewards.py`. Its speed: `python test_rewards.py`.

Each row of a table is (input, expected, why it is there). The benchmark is not a test: it prints
completions a second for every reward, beside math-verify where that is installed.
"""

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
from rewards import (
    FORMATS, REWARD_FUNCS, explain, extract_hash_answer, extract_xml_answer, format_fault,
    is_correct, last_number, parse_number,
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
]  # fmt: skip


@pytest.mark.parametrize("text, number, why", LAST)
def test_last_number(text, number, why):
    assert last_number(text) == (None if number is None else Decimal(number)), why


# ---- Verdicts ------------------------------------------------------------------------------------
BLOCK = "<answer>{}</answer>".format
VERDICTS = [  # completion, gold, strict, flexible, why
    (perfect(), "72", True, True, "perfect"), (BLOCK("72"), "72", True, True, "no reasoning"),
    (BLOCK(" $1,080. "), "1080", True, True, "formatting of the completion"),
    (BLOCK("1080"), "1,080", True, True, "formatting of the gold"),
    (BLOCK("-5"), "\u22125", True, True, "sign of the gold"),
    (BLOCK("72"), "working #### 72", True, True, "a whole GSM8K solution as gold"),
    (BLOCK("18.00"), "18", True, True, "a string comparison would fail"),
    (BLOCK("12"), "2", False, False, "gold as a substring"),
    (BLOCK("70"), "72", False, False, "wrong"), (BLOCK("-72"), "72", False, False, "sign"),
    (BLOCK("72.0000000000000000001"), "72", False, False, "a float comparison would pass"),
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
    (perfect(), 0.5, 0.5, 0.5, "perfect earns strict and soft together"),
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
    ("<answer>", 0.0, 0.0, 0.125, "one tag"), ("", 0.0, 0.0, 0.0, "empty"),
    (perfect() + "x" * 10**4, 0.0, 0.5, 0.4, "the charge for trailing text is bounded"),
    (BLOCK("72") + "\n<reasoning>\na\n</reasoning>", 0.0, 0.0, 0.474, "wrong order"),
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


@pytest.mark.parametrize("text, expected, why", [
    (perfect(), 0.5, "integer"), (perfect("1,080"), 0.5, "comma"), (perfect("72.0"), 0.5, ".0"),
    (perfect("72.5"), 0.0, "decimals"), (perfect("many"), 0.0, "words"), ("72", 0.0, "no block"),
    (perfect() * 2, 0.0, "two blocks"), (perfect("9" * 99), 0.5, "longer than a float's digits"),
])
def test_int_reward(text, expected, why):
    assert value("int_reward_func", text) == expected, why


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", MAXIMUM)
def test_a_perfect_answer_earns_every_maximum(name, fmt):
    assert value(name, perfect(fmt=fmt), fmt=fmt) == MAXIMUM[name]
    assert set(MAXIMUM) == set(REWARD_FUNCS)


@pytest.mark.parametrize("name", MAXIMUM)
@pytest.mark.parametrize("completion", [
    perfect(), [{"role": "assistant", "content": perfect()}],
    [{"role": "assistant", "content": "no"}, {"role": "user", "content": "again"},
     {"role": "assistant", "content": perfect()}],
    [{"role": "assistant", "content": [{"type": "text", "text": perfect()}]}],
], ids=["string", "conversation", "last assistant message", "parts"])
def test_completions_as_strings_and_conversations(name, completion):
    assert value(name, completion) == MAXIMUM[name]


@pytest.mark.parametrize("answer", [["1"], ["1", "2", "3"], []])
def test_a_misaligned_answer_column_raises_with_both_lengths(answer):
    for name in ("correctness_reward_func", "check_answer_correctness", "check_numbers_extraction"):
        with pytest.raises(ValueError, match=f"2 completions but {len(answer)} answers"):
            REWARD_FUNCS[name](["", ""], ["a", "b"], answer=answer)
        with pytest.raises(ValueError, match="2 completions but 0 answers"):  # renamed column
            REWARD_FUNCS[name](["", ""], ["a", "b"], solution=["1", "2"])


def test_explain_gives_the_values_of_the_rewards_and_a_reason_each():
    for text in (perfect(), perfect("70"), "72", BLOCK("1") * 2, "<answer>x</answer>"):
        for name, (number, why) in explain(text, "72", "xml").items():
            assert number == value(name, text) and len(why) > 10, (name, text)
    assert explain(perfect("70"), "72")["correctness_reward_func"][1] == (
        "the answer is 70, the gold is 72")


# ---- What holds for every recipe -----------------------------------------------------------------
def total(recipe: dict, text: str, gold: str) -> float:
    fmt = recipe.get("format", "xml")
    pairs = zip(recipe["reward_funcs"], recipe["reward_weights"])
    return sum(weight * value(name, text, gold, fmt) for name, weight in pairs)


@pytest.mark.parametrize("name", ["qwen-3b", "qwen-0.5b-fp32", "small-models", "smollm2-135m",
                                  "cookbook"])
def test_no_wrong_answer_in_perfect_format_beats_a_right_one(name):
    from options import RECIPES

    recipe = RECIPES[name]
    fmt = recipe.get("format", "xml")
    r_open, r_close, a_open, a_close = FORMATS[fmt].tags
    bare = f"{a_open}72{a_close}"
    right = [perfect(fmt=fmt), bare, bare + "x" * 500, r_open * 2 + bare, bare + r_close + r_open]
    worst = min(total(recipe, text, "72") for text in right)
    assert total(recipe, perfect("9", fmt=fmt), "72") <= worst
    near = total(recipe, perfect("70", fmt=fmt), "72")
    if name == "cookbook":  # its near-miss credit, kept as that recipe states it
        assert (near, total(recipe, bare, "72"), total(recipe, right[0], "72")) == (6.5, 4.5, 9.5)
    else:
        assert near < worst


PIECES = st.sampled_from([tag for fmt in FORMATS.values() for tag in fmt.tags] + [
    "72", "70", "\n", " ", "####", "=", "$", "-", ",", ".", "\\boxed{", "1e9", "²", "text", "\x00"])
TEXT = st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=14).map("".join))


@settings(max_examples=150, deadline=None)
@given(st.lists(TEXT, min_size=1, max_size=4), st.sampled_from(["72", "-1,080", "0", "x", ""]))
def test_never_raises_gives_one_finite_float_each_whatever_the_order(texts, gold):
    for name, func in REWARD_FUNCS.items():
        for fmt in FORMATS:
            values = func([""] * len(texts), texts, answer=[gold] * len(texts), fmt=fmt)
            assert len(values) == len(texts)
            assert all(isinstance(v, float) and math.isfinite(v) for v in values), name
            back = func([""] * len(texts), texts[::-1], answer=[gold] * len(texts), fmt=fmt)
            assert back == values[::-1]


@settings(max_examples=150, deadline=None)
@given(TEXT, st.sampled_from(["xml", "cookbook"]))
def test_nothing_appended_or_prepended_earns_more_than_the_honest_completion(extra, fmt):
    honest = perfect(fmt=fmt)
    for name in REWARD_FUNCS:
        best = value(name, honest, fmt=fmt)
        for text in (honest + extra, extra + honest, honest + "\n" + extra):
            assert value(name, text, fmt=fmt) <= best, name


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="abc 123=+\n", min_size=1, max_size=300).filter(str.strip))
def test_no_value_depends_on_the_reasoning(reasoning):
    for name in REWARD_FUNCS:
        assert value(name, perfect(reasoning=reasoning)) == MAXIMUM[name]


@settings(max_examples=100, deadline=None)
@given(st.integers(-10**9, 10**9), st.sampled_from([
    "{}", "{}.", "{}.00", "${}", "{} cm", "**{}**", "\\boxed{{{}}}", "${}$", "x = {}", " {}\n"]))
def test_formatting_of_the_number_changes_no_verdict(number, template):
    for plain in (str(number), f"{number:,}", str(number).replace("-", "\u2212")):
        assert is_correct(perfect(template.format(plain)), str(number))
        assert not is_correct(perfect(template.format(plain)), str(number + 1))


# ---- Golds graded against themselves -------------------------------------------------------------
def check_golds(rows: list[dict]) -> None:
    """100 % for the golds themselves, 0 % for a constant, every maximum for each solution."""
    for row in rows:
        gold = extract_hash_answer(row["answer"])
        worked = re.sub(r"<<[^<>]*>>", "", row["answer"].rpartition("####")[0])
        assert is_correct(BLOCK(gold), row["answer"]), gold
        assert not is_correct(BLOCK("-123456789"), row["answer"])
        assert is_correct(row["answer"], gold, mode="flexible")
        for fmt in FORMATS:
            assert format_fault(perfect(gold, worked, fmt), fmt) is None
            assert is_correct(perfect(gold, worked, fmt), gold, fmt=fmt)


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
MEGABYTE = 10**6
HOSTILE = {
    "opening tags": "<answer>" * (MEGABYTE // 8), "closing tags": "</answer>" * (MEGABYTE // 9),
    "nested": "<reasoning><answer>" * (MEGABYTE // 19), "digits": "9" * MEGABYTE,
    "numbers": "7 " * (MEGABYTE // 2), "commas": "1," * (MEGABYTE // 2), "dots": "." * MEGABYTE,
    "equations": "=" * MEGABYTE, "signs": "-" * MEGABYTE, "currency": "$" * MEGABYTE,
    "words": "5 " + "a " * (MEGABYTE // 2), "hyphens": "5 " + "a-" * (MEGABYTE // 2),
    "newlines": "\n" * MEGABYTE, "boxes": "\\boxed{" * (MEGABYTE // 7),
}


def fastest(func, runs: int = 3) -> float:
    """Seconds of the best of several runs; the others measured the machine's other work."""
    times = []
    for _ in range(runs):
        begun = time.perf_counter()
        func()
        times.append(time.perf_counter() - begun)
    return min(times)


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_megabyte_costs_under_a_tenth_of_a_second(kind):
    for text in (HOSTILE[kind], perfect(HOSTILE[kind]), perfect(reasoning=HOSTILE[kind])):
        for name in REWARD_FUNCS:
            assert fastest(lambda t=text, n=name: value(n, t)) < 0.1, name
        assert fastest(lambda t=text: is_correct(t, "72", mode="flexible")) < 0.1


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
def benchmark() -> None:
    from questions import generate_questions

    rows = generate_questions(300)
    golds = [extract_hash_answer(row["answer"]) for row in rows]
    texts = [perfect(g, row["answer"].rpartition("####")[0]) for g, row in zip(golds, rows)]
    speeds = {
        name: len(texts) / fastest(lambda f=func: f([""] * len(texts), texts, answer=golds), 5)
        for name, func in REWARD_FUNCS.items()
    }
    try:
        from math_verify import parse, verify
    except ImportError:
        print("math-verify is not installed, so not compared: pip install math-verify")
        reference = None
    else:
        def judge():
            for text, gold in zip(texts, golds):
                verify(parse(gold), parse(extract_xml_answer(text)))

        reference = speeds["math-verify (parse and verify)"] = len(texts) / fastest(judge)
    for name, speed in speeds.items():
        ratio = f"{speed / reference:8.1f} x math-verify" if reference else ""
        print(f"{name:32}{speed:12,.0f} completions/s{ratio}")


if __name__ == "__main__":
    benchmark()
