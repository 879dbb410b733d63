"""What rewards.py promises: `pytest test_rewards.py`. Its speed: `python test_rewards.py`.

Each row of a table is (input, expected, why it is there). The benchmark is not a test: it prints
completions a second for every reward.
"""

import doctest
import inspect
import json
import math
import re
import shutil
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
    assert render_prompts(Tokenizer(), [prompt[-1:]]) == ["[user]Q[assistant]"]


def test_a_system_text_goes_in_front_of_the_first_user_message():
    prompt = build_prompt("Q", "xml", [("q", "a")])
    assert fold_system(prompt) == [
        {"role": "user", "content": f"{rewards.SYSTEM_PROMPT}\n\nq"}, *prompt[2:]]
    assert prompt == build_prompt("Q", "xml", [("q", "a")])  # not changed in place
    assert render_prompts(Tokenizer("raises"), [fold_system(prompt)])[0].startswith("[user]Respond")


@pytest.mark.parametrize("system, refused", [("takes", False), ("raises", True), ("drops", True)])
def test_a_template_that_refuses_the_system_role_is_found_out(system, refused):
    assert refuses_system(Tokenizer(system)) is refused


def test_a_template_that_renders_nothing_lets_its_error_out():
    with pytest.raises(RuntimeError, match="not supported"):
        refuses_system(Tokenizer("broken"))


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
    ("72 dollars fifty cents", None, "two amounts"), ("5 feet six inches", None, "two measures"),
    ("5 out of six", None, "a fraction"), ("5 over six", None, "a fraction"),
    ("5 twelfths", None, "a fraction"), ("7 twentieths", None, "a fraction"),
    ("5 quadrillion", None, "scale word"), ("5 crore", None, "scale word"),
    ("72 miles one way", "72", "a unit and more"), ("5 canteens", "5", "a unit"),
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
    # What stands behind a number changes it only directly behind it, else it is a unit.
    ("193 newspapers to District B", "193", "B, no billion"), ("5 B", None, "a billion"),
    ("14,000 bars in the fourth week", "14000", "a week"), ("3 fourths", None, "a fraction"),
    ("250 customers on the third day", "250", "a day"), ("762 M&Ms", "762", "M, no million"),
    ("5 M students", None, "a million"), ("$5K", None, "K"), ('67"', "67", "inches"),
    ("5 (thousand)", None, "in brackets"), ("5 **thousand**", None, "in bold"),
    ("\\boxed{5}\\text{ million}", None, "in LaTeX"), ("5 cm squared", "5", "a unit's square"),
    ("25 m²", "25", "a unit's sign"), ("5 squared", None, "a square"), ('"72"', "72", "quotes"),
    ("72 apples or pears", "72", "no hedge of the number"), ("72 apples!", "72", "no factorial"),
    ("72 dollars or more", None, "a bound"), ("72 dollars or seventy", None, "a hedge in words"),
    ("2 hours and a half", None, "half an hour more"), ("5 times a hundred", None, "a product"),
    ("72, in thousands", None, "a comma first"), ("72 dollars in thousands", None, "a scale"),
    ("11,\\! 111,\\! 111,\\! 100", "11111111100", "LaTeX's thin spaces"),
    ("1\\,080", "1080", "LaTeX's thin space"), ("7\\,2", None, "which groups no thousands here"),
    ("72\\ \\text{cm}", "72", "LaTeX's space"),
    ("1{,}080{,}5", None, "nor a comma"), ("2:00 pm", "2", "a full hour is its hour"),
    ("14:00", "14", "of 24"), ("12:00:00", "12", "to the second"), ("2:30 pm", None, "no hour"),
    ("2:00 or 3:00", None, "two hours"), (18.0, "18", "JSON"), (1e20, "1" + "0" * 20, "JSON"),
    (float("nan"), None, "JSON's NaN"), (None, None, "null"), (True, None, "a bool"),
    ("*72*", "72", "emphasis"), ("***72***", "72", "emphasis"), ("_72_", "72", "emphasis"),
    ("__72__", "72", "emphasis"), ("'72'", "72", "quotes"), ("‘72’", "72", "quotes"),
    ("a*72", None, "a product"), ("72^\\circ", "72", "degrees"), ("72^{\\circ}", "72", "degrees"),
    ("\\mathbf{72}", "72", "bold"), ("72\\;\\textbf{km}", "72", "LaTeX's space"),
    ("₱72", "72", "pesos"), ("72 µm", "72", "a Greek unit"), ("72 isn't it", None, "a denial"),
    ("72 to seventy-five", None, "a range"), ("5 remainder two", None, "a remainder"),
    *((f"5 {one}{comma} two {more}", None, "two measures") for one, more in (
        ("dollars", "cents"), ("feet", "inches"), ("years", "months"), ("weeks", "days"),
        ("days", "hours"), ("kilograms", "grams")) for comma in ("", ",")),
    ("9 of ten", None, "a fraction"), ("72 of them", "72", "of what was counted before"),
    ("7 packs of ten", "7", "a unit: what is in each is not asked for"),
    # A term in a variable is no number: what it is depends on the variable.
    ("-7 x", None, "a term"), ("-7x", None, "a term"), ("6 i", None, "imaginary"),
    ("5 n", None, "a term"), ("5 XY", "5", "capitals are abbreviations"), ("5xy", None, "a term"),
    ("36π", None, "a multiple"), ("5 α", None, "a term"), ("72 𝑥", None, "a letter of maths"),
    ("5 cm x", None, "behind a unit"), ("3 a b", None, "a product"), ("5 x^2", None, "a square"),
    ("5 h", "5", "hours: a letter that units are written with is one, or 5 m would be none"),
    ("5 L", "5", "litres"), ("9 s", "9", "seconds"), ("25 °C", "25", "degrees"),
    ("50p", "50", "pence"), ("9 s^2", None, "no unit but metres is squared by itself"),
    ("$5 m$", None, "in maths a letter is a variable, a unit stands in \\text{}"),
    ("$5m", None, "... or it is millions"), ("$2ab$", None, "a product in maths"),
    ("$5 cm$", "5", "a unit in maths, in haste"), ("$5\\text{ m}$", "5", "set as it should be"),
    ("$5~\\mathrm{m}$", "5", "with LaTeX's tie"), ("$25\\mathrm{~m}^{2}$", "25", "and squared"),
    ("$25 m^2$", None, "the square of a variable"), ("72 a day", "72", "an article"),
    ("7 a.m.", "7", "an abbreviation"), ("3 x-rays", "3", "a word with a hyphen"),
    ("3 A's", "3", "grades"),
    ("8 D batteries", "8", "a kind"), ("5 D", None, "which needs a word"),
    ("72 y/o", "72", "years old"), ("5 x/y", None, "a quotient"),
    ("5 x-y", None, "a difference"), ("5x", None, "5x may be a product"),
    # Of an equation the right side counts where the left one needs no solving.
    ("9 z = 0", None, "z is asked for"), ("2x = 72", None, "x is 36"), ("-x = 5", None, "x is -5"),
    ("x + 5 = 72", None, "x is 67"), ("x/2 = 72", None, "x is 144"), ("x^2 = 72", None, "a root"),
    ("$x^{2}-5 x-6=0$", None, "two roots"), ("$3x+y+2=0$", None, "a line"),
    ("$y=4x$", None, "a term"), ("x + y = 72", "72", "a sum, nothing to be solved for"),
    ("f(3) = 72", "72", "a function's value"), ("Step 2: x = 72", "72", "a name"),
    ("P = 2l + 2w = 72", "72", "a formula between a name and its value"),
    ("5 x 3 = 15", "15", "x for times"), ("5 m * 3 m = 15 m^2", "15", "units in a product"),
    ("x = 1,080.0 = 1080", "1080", "a comma in a number"),
    ("x = 71, x = 72", None, "two equations are a hedge"), ("x=71,x=72", None, "the same"),
    ("x = 71; y = 72", None, "two values"), ("x = 71 and y = 72", None, "two values"),
    ("x = 71 x = 72", None, "the same with nothing between"),
    ("x = 71 | y = 72", None, "or a bar"), ("x = 71 → y = 72", None, "or an arrow"),
    ("7 + 4 = 11\n11 + 61 = 72", None, "a calculation, line by line, is no answer"),
    ("2 = " + "1 + 1 = " * 200 + "2", None, "1000 characters before the last = are prose"),
    # Ranges.
    ("3-5", None, "a range"), ("3–5", None, "a range, not minus 5"), ("3 to 5", None, "a range"),
    ("3 – 5", None, "a range"), ("3—5", None, "a range"), ("3 to five", None, "a range"),
    # Units and currencies in any script; numerals and scale words of others are refused.
    ("72元", "72", "yuan"), ("72元。", "72", "with a full stop"), ("72（元）", "72", "in brackets"),
    ("72 рублей", "72", "roubles"), ("72 रुपये।", "72", "rupees; vowel signs are no letters"),
    ("72 कि.मी.", "72", "kilometres"), ("72개", "72", "pieces"), ("72 メートル", "72", "metres"),
    ("72 pin\u0303atas", "72", "an accent by itself"), ("0.3\u0305", None, "0.333..."),
    ("5千克", "5", "kilograms"), ("5千", None, "a thousand"), ("5万円", None, "ten thousand"),
    ("72元五角", None, "and five tenths"), ("3米半", None, "and a half"),
    ("72多", None, "and more"), ("5만 원", None, "ten thousand"),
    ("5 тысяч", None, "thousand"), ("5 млн", None, "million"), ("5 миллиметров", "5", "mm"),
    ("5 millones", None, "million"), ("5 Millionen", None, "million"), ("5 लाख", None, "100,000"),
    ("5ⁿ", None, "a power"), ("72℃", "72", "degrees in one sign"), ("72㎡", "72", "m² in one"),
    ("72 cm^2", "72", "a unit's power"), ("72 cm²", "72", "the same"), ("72 m^{3}", "72", "LaTeX"),
    ("5 m^2", "5", "square metres"), ("5 м^2", "5", "in Russian"), ("5\\text{ m}^2", "5", "LaTeX"),
    ("5 m2", None, "is that m² or a second number?"), ("5 m^22", None, "no unit's power"),
    ("US$72", "72", "a country's dollar"), ("A$72", "72", "Australia's"), ("US $72", "72", "apart"),
    ("R$ 72", "72", "reais"),
    ("￥72", "72", "a wide sign"), ("CHF 1'080", "1080", "Swiss francs"),
    ("-US$5", "-5", "sign first"), ("US$-5", "-5", "sign last"), ("$\\$72$", "72", "in maths"),
    ("Rs. 72", "72", "rupees"), ("Rs.72", "72", "no decimal point"), ("₨72", "72", "in one sign"),
    ("72 USD", "72", "a code"), ("USD 72", "72", "a code"), ("SUM 72", None, "no currency"),
    # Signs, digits and groups that look alike. What is seen is read, if it can be one value only.
    ("–5", "-5", "an en dash at the number is a minus"), ("–€5", "-5", "or before its currency"),
    ("– 5", None, "else it opens a line"),
    ("—5", None, "an em dash does"), ("\u20115", "-5", "a hyphen that breaks no line"),
    ("\u200b72\u2060", "72", "zero-width characters around"), ("\ufeff72", "72", "a BOM"),
    ("7\u200b2", "72", "inside, where 72 is seen"), ("1\u00ad080", "1080", "a soft hyphen"),
    ("7\u20622", None, "an invisible times"), ("7\u20642", None, "an invisible plus"),
    ("７２", "72", "full-width digits are the same ones"),
    ("－１，０８０．５", "-1080.5", "and signs"), ("ｘ＝７２", "72", "and letters"),
    ("1,08,000", "108000", "India's groups, and no list has spaces left out"),
    ("12,34,567.5", "1234567.5", "the same"), ("1,08,00", None, "the last group has three"),
    ("1,080,00,000", None, "not both kinds"), ("0,08,000", None, "no group begins with 0"),
    ("1\u2009080", "1080", "a thin space only groups"), ("1\u202f080", "1080", "nor this one"),
    ("7\u20092", None, "but not so"), ("1 080", None, "a space may part two numbers"),
    ("1\u00a0080", None, "as may one that breaks no line: tokenizers write it for a space"),
    ("1'080", "1080", "Switzerland's groups"), ("1’080’000", "1080000", "the same"),
    ("5'10", None, "feet and inches"), ("7' 200", None, "feet, and another number"),
]  # fmt: skip


@pytest.mark.parametrize("text, number, why", NUMBERS,
                         ids=[f"{row[2]}: {row[0]!s:.9}" for row in NUMBERS])
def test_parse_number(text, number, why):
    assert parse_number(text) == (None if number is None else Decimal(number)), why


GOLDS = [  # gold, number, why: a file's gold is a number, or its row is refused aloud
    ("72", "72", "plain"), ("1,080", "1080", "a comma"), ("72.", "72", "a full stop"),
    ("$72", "72", "money"), ("50%", "50", "percent"), ("72 apples", "72", "a word as a unit"),
    ("5 m", "5", "metres"), ("$72$", "72", "maths"), (2.0107e-06, "0.0000020107", "JSON"),
    ("48 + 24 = 72 #### 72 clips", "72", "the equation is no part of it"),
    ("x = 5", None, "an equation: which of its parts is asked for, the question says, not it"),
    ("#### x = 5", None, "marked or not"), ("＝5", None, "in any width"), ("48+24=72", None, "too"),
    *((gold, None, "an equation") for gold in ("$x^{2}-5 x-6=0$", "$3x+y+2=0$", "$y=4x$")),
    *((gold, None, "a term") for gold in ("$-7 x$", "$6 i$", "$5 n$", "-7x", "$5 m$", "#### 5 n")),
    *((gold, None, "a range") for gold in ("3-5", "3–5", "3 to 5", "$3 \\sim 5$", "[3, 5]")),
    ("seventy", None, "words"), ("", None, "empty"), (None, None, "null"), (True, None, "a bool"),
]  # fmt: skip


@pytest.mark.parametrize("gold, number, why", GOLDS, ids=[f"{r[2]}: {r[0]!s:.9}" for r in GOLDS])
def test_parse_gold(gold, number, why):
    assert parse_gold(gold) == (None if number is None else Decimal(number)), why
    if number is None:
        assert answer_fault(BLOCK("5"), gold) == f"the gold {str(gold)[-30:]!r} is not one number"
        assert not any(is_correct(BLOCK(answer), gold) for answer in ("5", "0", "-7", "6", gold))


LAST = [
    ("so it is 72.", "72", "sentence end"), ("so 1,080 dollars.", "1080", "comma"),
    ("48 and then 24", "24", "the last of two"), ("costs $-5", "-5", "money"),
    ("wait... 72", "72", "dots before"), ("72km", "72", "unit"), ("x is .5", "0.5", "no zero"),
    ("\u22127 degrees", "-7", "U+2212"), ("12.5.2020", None, "a date"), ("none", None, "no digit"),
    ("", None, "empty"), ("10-5", "-5", "as lm-evaluation-harness reads it"),
    ("the sum is 234 ... so **73**.", "73", "bold"), ("(72)", "72", "in brackets"),
    ("\\boxed{840}. So \\boxed{004}", "4", "boxes are not joined"), ("72, or so", "72", "comma"),
    ("a total of $1,080.00!", "1080", "money"), ("10,80", None, "malformed groups are not joined"),
    ("so $9{,}500.", "9500", "LaTeX"), ("\\boxed{9{,}500}", "9500", "LaTeX in a box"),
    ("at 2:00 pm", "2", "never 00"), ("from 9 to 12:00:00", "12", "never 00"),
    ("wait...72", "72", "an ellipsis is no point"), ("it is 72...", "72", "nor at the end"),
    ("pages 3–5", "5", "a range's end, not minus 5"), ("so ７２", "72", "full-width digits"),
    ("10^2", "2", "a number's power is what the harness reads"),
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
    (BLOCK("") + " 72", "72", False, True, "an empty block holds no number"),
    (BLOCK("71 or 72"), "72", False, True, "nor one of two: the last then"),
    (BLOCK("71") + " 72", "72", False, False, "a block that holds one is read, no text after it"),
    (BLOCK("2:00 pm"), "2", True, True, "the hour"), (BLOCK("00"), "2:00", False, False, "not 00"),
    (BLOCK("72"), "#### 72\nThe answer is: 5", True, True, "the gold ends with its line"),
    ("The answer is 72.", "72", False, True, "prose"), ("", "72", False, False, "empty"),
    (BLOCK("72"), "none", False, False, "a gold that is no number is matched by nothing"),
    (BLOCK("none"), "none", False, False, "nor by itself"),
]  # fmt: skip


@pytest.mark.parametrize("text, gold, strict, flexible, why", VERDICTS,
                         ids=[row[-1] for row in VERDICTS])
def test_is_correct(text, gold, strict, flexible, why):
    assert (is_correct(text, gold), is_correct(text, gold, mode="flexible")) == (strict, flexible)
    assert value("correctness_reward_func", text, gold) == strict
    assert (answer_fault(text, gold) is None) == strict


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
    assert extract_hash_answer("a #### 18 \r\nThe answer is: 18") == "18"
    assert FORMATS["xml"].system_prompt == rewards.SYSTEM_PROMPT


FAULTS = [
    (perfect("70"), "the answer is 70, the gold is 72"), (perfect("72"), None),
    (BLOCK("7") * 2, "2 answer tags are a hedge"),
    ("<answer>72", "there is no closed answer block"), ("", "there is no closed answer block"),
    (BLOCK("many"), "the answer 'many' is not one number"),
    (BLOCK("9" * 99), f"the answer is {'1.' + '0' * 29}E+99, the gold is 72"),
]  # fmt: skip


@pytest.mark.parametrize("text, why", FAULTS)
def test_a_wrong_answer_has_a_reason(text, why):
    assert answer_fault(text, "72", "xml") == why


def test_a_gold_that_is_no_number_is_named():
    assert answer_fault(perfect(), "seventy") == "the gold 'seventy' is not one number"


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
    "so it is {}", "{} apples", "a total of {}.", "12 and then {}", "({})", "**{}**", "{}%",
    "\\boxed{{{}}}", "the answer is {}!", "1 + 2 = {} eggs", "x={}\n", "{} dollars, in all",
    "<answer>{}",
    "{}</answer>", "<answer>1 or {}</answer>", "#### {}", "4 - {}", "{}km", "{}$", "72 of {}, so",
    "<answer>{}</answer><answer>{}</answer>", "at 7:{}", "<answer></answer> {}", "{} 'units'",
]  # fmt: skip
WRITTEN = ["72", "-5", "1,080", "$18", "$1,234,567", "0", "7", "3.5", "$2.50", "-12", "$-5", "-$5"]
DIFFERENCES = [  # text, gold, harness, why ours differs; each is wrong by the other
    ("72.00", "72", False, "values are compared, no strings"), ("072", "72", False, "the same"),
    ("\u22125", "-5", False, "U+2212 is a minus"), ("9{,}500", "9500", False, "LaTeX's comma"),
    ("1,\\!080", "1080", False, "LaTeX's thin space"), ("2:00", "2", False, "00 is no answer"),
    ("it is 72, or ...", "72", False, "a run without a digit is no number"),
    ("it is 72...", "72", False, "an ellipsis is no part of it"),
    ("wait...72", "72", False, "nor before it"), (".5", "0.5", False, "no zero before the point"),
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
    (f"<think>hm</think>{perfect()}", perfect(), "a thought"),
    (f"\n<think>\n\n</think>\n\n{perfect()}", f"\n\n{perfect()}", "an empty thought"),
    (f"hm</think>{perfect()}", perfect(), "the prompt opened it"),
    (f"</think>{perfect()}", perfect(), "the prompt opened it, and nothing was thought"),
    (f"<think>{DRAFT}</think>{perfect()}", perfect(), "tags in a thought do not count"),
    (f"{DRAFT}</think>{perfect()}", perfect(), "nor where the prompt opened it"),
    ("<think>" + perfect(), "", "cut off"), ("<think>", "", "cut off at once"),
    (perfect(), perfect(), "no thought"), (f"So: {perfect()}", f"So: {perfect()}", "only prose"),
    (f"Well <think>a {perfect()}", f"Well <think>a {perfect()}", "no leading one"),
    (f"<think>a</think>b</think>{perfect()}", f"b</think>{perfect()}", "the first end counts"),
    (f"{perfect('71')}</think>{perfect()}", f"{perfect('71')}</think>{perfect()}",
     "an answer from its first word on is no thought"),
    (f"<answer>71</think>{BLOCK('72')}", f"<answer>71</think>{BLOCK('72')}", "the same, unclosed"),
    ("<answer>71</think>72</answer>", "<answer>71</think>72</answer>", "inside an answer block"),
]  # fmt: skip


@pytest.mark.parametrize("text, follows, why", THOUGHTS, ids=[row[-1] for row in THOUGHTS])
def test_a_leading_thought_is_no_part_of_the_answer(text, follows, why):
    assert after_thinking(text) == follows
    if follows.strip() == perfect():
        assert {name: value(name, text) for name in REWARD_FUNCS} == MAXIMUM
        assert extract_xml_answer(text) == "72" and is_correct(text, "72", mode="flexible")
        assert format_fault(text) is answer_fault(text, "72") is None
    else:
        assert not value("strict_format_reward_func", text) or text == perfect()


@pytest.mark.parametrize("first", ["", "hm ", "<think>", "<think></think>"])
def test_of_several_answers_round_a_thoughts_end_one_place_is_paid_at_most(first):
    for text in (f"{first}{BLOCK('71')}</think>{BLOCK('72')}",
                 f"{first}{BLOCK('71')}</think>{BLOCK('72')}</think>{BLOCK('73')}",
                 f"{first}<answer>71</think>{BLOCK('72')}"):
        for name in ("correctness_reward_func", "check_numbers_extraction"):
            paid = [gold for gold in ("71", "72", "73") if value(name, text, gold) > 0]
            assert paid in ([], ["72"]), (name, text)  # never the first, never two


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


SHAPES = [
    "{0}\nw\n{1}\n{2}\n100\n{3}", "{0}w{1}",
    "{0}w", "{2}100{3}{0}w{1}", "{0}w{1}{2}100", "{0}w{2}100{3}", "w{2}1{3}",
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
        assert "=" in template or is_correct(perfect(str(number)), template.format(plain))
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
        for name in REWARD_FUNCS:
            values = REWARD_FUNCS[name]([""] * len(rows), texts, answer=golds, fmt=fmt)
            assert set(values) == {MAXIMUM[name]}


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
    "thoughts": "<think></think>", "sums": "7+7=14 ", "sum list": "7 + 7 = 14, ", "pluses": "7+",
    "LaTeX groups": "1{,}", "thin spaces": "1\\!", "hours": "1:00 ", "hour run": "1:00",
    "full-width": "７", "zero-width": "\u200b", "Unicode groups": "1\u2009", "ranges": "3–5",
    "powers": "m^2", "terms": "2x", "listed": "x = 1, ", "letters": "元",
    "marks": "\u0303", "rupees": "Rs.",
}  # fmt: skip
FUNCTIONS = {
    **{name: lambda text, name=name: value(name, text) for name in REWARD_FUNCS},
    "answer_fault": lambda text: answer_fault(text, "72"), "parse_number": parse_number,
    "after_thinking": after_thinking, "vote": lambda text: vote([text], "xml"),
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


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_megabyte_costs_under_a_tenth_of_a_second(kind):
    body = "1" + HOSTILE[kind] * (10**6 // len(HOSTILE[kind]))
    unclosed = f"<reasoning>w</reasoning><answer>{body}"
    for text in (body, unclosed, unclosed + "</answer>", perfect(reasoning=body), body + "72"):
        for name, func in FUNCTIONS.items():
            assert fastest(lambda f=func, t=text: f(t), enough=0.1) < 0.1, name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nested", "digits", "groups", "decimals", "hyphens", "spaces",
                                  "sums", "LaTeX groups", "hour run"])
def test_twice_the_text_costs_less_than_four_times_the_time(kind):
    half = HOSTILE[kind] * (500_000 // len(HOSTILE[kind]))
    for name, func in FUNCTIONS.items():
        for one, two in ((half, half * 2), (BLOCK(half), BLOCK(half * 2))):
            limit = 4 * max(0.005, fastest(lambda f=func, t=one: f(t)))
            assert fastest(lambda f=func, t=two: f(t), 9, enough=limit) < limit, name


@pytest.mark.parametrize("python", ["/usr/bin/python3", "python3.11", "python3.12", "python3.13"])
def test_numbers_are_read_alike_by_every_python_there_is(python, tmp_path):
    """Possessive quantifiers, new in 3.11, had faults up to 3.11.4, which Debian 12 still has."""
    path = shutil.which(python)
    version = "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
    if path is None or subprocess.run([path, "-c", version]).returncode:
        pytest.skip(f"no {python} here that the scripts run on")
    (tmp_path / "rows.json").write_text(json.dumps([row[:2] for row in NUMBERS]))
    code = ("import json, sys; sys.path.insert(0, sys.argv[1]); import rewards; "
            "rows = json.load(open(sys.argv[2])); number = rewards.parse_number; "
            "print([t for t, n in rows if number(t) != (n and rewards.Decimal(n))])")
    done = subprocess.run([path, "-c", code, str(Path(rewards.__file__).parent),
                           str(tmp_path / "rows.json")], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout[-500:] + done.stderr[-500:]


def test_import_is_quick_and_takes_the_standard_library_only():
    code = ("import sys, time; before = set(sys.modules); begun = time.perf_counter();"
            "import rewards; print(time.perf_counter() - begun);"
            "print(*sorted(set(sys.modules) - before))")
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           cwd=Path(__file__).parent).stdout.split("\n") for _ in range(5)]
    assert min(float(run[0]) for run in runs) < 0.15
    modules = {name.partition(".")[0] for name in runs[0][1].split()}
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
    ("unsloth", "auto", True, BOTH, {}, ("unsloth", "colocate")),
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
    for typed, says in [(["--step=x", "1"], "8"), (["--setps", "1"], "did you mean --steps?"),
                        (["--steps", "0"], "0 is not at least 1 and below 9"),
                        (["--steps", "9"], "below 9"), (["--steps", "x"], "invalid int value")][1:]:
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


# ---- Benchmark -----------------------------------------------------------------------------------
def benchmark(n: int = 400) -> None:
    """Completions a second, on perfect, wrong, inline and unformatted completions in turn."""
    for name, func in REWARD_FUNCS.items():
        fmt = inspect.signature(func).parameters["fmt"].default
        whole, wrong = perfect(fmt=fmt), perfect("7", fmt=fmt)
        texts = [whole, wrong, whole.replace("\n", " "), "48 + 24 is 72. So it is 72."] * (n // 4)
        best = fastest(lambda f=func, t=texts: f([QUESTION] * n, t, answer=["72"] * n), 5)
        print(f"{name:30}{n / best:12,.0f} completions/s")


if __name__ == "__main__":
    benchmark()
