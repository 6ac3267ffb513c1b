"""Verifiers: what they read, what they call equal, and that no text takes them down."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ccpo.errors import UserError
from ccpo.tasks import Choice, Exact, ListTask, Math, choice_verdict, exact_verdict, limited, make_verifier, verify_all
from ccpo.tasks.extract import TAIL, after_marker, bare_latex, clean, last_boxed, number, tagged
from ccpo.tasks.sandbox import Sandbox, close_all, shared
from ccpo.tasks.sandbox_worker import _refuse
from ccpo.types import Problem, Verdict, VerdictStatus

SECONDS = 2.0


def problem(answer: str, **meta) -> Problem:
    return Problem(id=f"p-{answer}", text="?", answer=answer, meta=meta)


def box(text: str) -> str:
    return f"Therefore \\boxed{{{text}}}."


@pytest.fixture(scope="module", autouse=True)
def _end_processes():
    yield
    close_all()


# --- finding the answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"so \boxed{5}", "5"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} done", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{1,2\right.} x", r"\left\{1,2\right."),
        (r"\boxed {7}", "7"),
        (r"\boxed 7 is it", "7"),
        (r"\fbox{9}", "9"),
        (r"\boxed{3} and \boxed{\frac{1}{", "3"),  # the last was cut off
        (r"\boxed{\boxed{4}}", "4"),
        ("no box", None),
        (r"\boxed{", None),
        ("", None),
    ],
)
def test_last_boxed(text, found):
    assert last_boxed(text) == found


def test_markers_and_tags():
    assert after_marker("The answer is 4.\nFinal Answer: **17**.") == "17"
    assert after_marker("reasoning\n#### 1,234") == "1,234"
    assert after_marker("nothing of the kind") is None
    assert after_marker("The answer is:") is None
    assert tagged("<answer>1</answer> or <answer>\n2\n</answer>") == "2"
    assert tagged("<answer>1") is None
    assert tagged("<answer>a<answer>b</answer>") == "b"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1,000", Fraction(1000)),
        ("-.5", Fraction(-1, 2)),
        ("1/2", Fraction(1, 2)),
        (r"-\frac{3}{4}", Fraction(-3, 4)),
        (r"\frac12", Fraction(1, 2)),
        ("007", Fraction(7)),
    ],
)
def test_number_is_exact(text, value):
    assert number(bare_latex(text))[0] == value


@pytest.mark.parametrize("text", ["", "-", ".", "1/0", "12,34", "1 2", "1 1/2", "1e5", "x", "٣x", "1_000", "½x"])
def test_number_refuses(text):
    found = number(bare_latex(text))
    assert found is None, found


# --- exact --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "text", "score", "read"),
    [
        ("Paris", "paris ", 1.0, "paris"),
        ("New  York", "It is\nnew york", 1.0, "new york"),
        ("Paris", "The answer is Paris.", 1.0, "paris"),
        ("Paris", r"\boxed{London} not Paris", 0.0, "london"),
        ("7", "3\n7", 1.0, "7"),
        ("7", "8", 0.0, "8"),
    ],
)
def test_exact(answer, text, score, read):
    assert exact_verdict(problem(answer), text) == Verdict(score=score, answer=read)


def test_exact_reads_one_place_when_told():
    assert Exact(where="last_word")(problem("45"), "33 70 45").score == 1.0
    assert Exact(where="last_character")(problem("5"), "33 70 45 ").score == 1.0
    assert Exact(where="boxed")(problem("5"), "5").status is VerdictStatus.NO_ANSWER
    assert Exact(where="whole")(problem("a b"), "A\n b").score == 1.0
    assert Exact(where="last_line")(problem("b"), "b\nc").score == 0.0


def test_exact_abstains_on_nothing():
    assert exact_verdict(problem("5"), " \n\0") == Verdict(score=0.0, answer=None, status=VerdictStatus.NO_ANSWER)


# --- multiple choice ----------------------------------------------------------------------------------------------

CITIES = {"A": "Rome", "B": "Paris", "C": "A town", "D": "None of these"}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b.", "B"),
        (r"so \boxed{B}", "B"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\text{(B) Paris}}", "B"),
        (r"\boxed{Paris}", "B"),
        (r"A or B? \boxed{C}", "C"),
        ("Answer: B", "B"),
        ("**Answer:** B", "B"),
        ("The answer is (b).", "B"),
        ("The answer is Paris.", "B"),
        ("The answer is clear. I take (D)", "D"),
        ("(A) is wrong, so (C)", "C"),
        ("I would pick B.", "B"),
        ("it must be\nParis", "B"),
        ("it must be\nA town", "C"),  # the option's text, not the letter A
        ("B. Paris", "B"),
        (r"\boxed{A, B}", None),
        ("The answer is A or B. Perhaps (A).", None),
        (r"\boxed{E}", None),
        ("The answer is (E)", None),
        ("Answer: a town hall", None),
        ("I do not know", None),
        ("", None),
    ],
)
def test_choice_reads_the_letter(text, letter):
    verdict = choice_verdict(problem("B", choices=CITIES), text)
    assert verdict.answer == letter
    assert verdict.score == float(letter == "B")
    assert (verdict.status is VerdictStatus.NO_ANSWER) == (letter is None)


def test_choice_knows_only_its_own_letters():
    assert choice_verdict(problem("F", choices=dict.fromkeys("ABCDEF", "T&F")), "F").score == 1.0
    assert choice_verdict(problem("A"), "F").answer is None
    assert choice_verdict(problem("D"), "D").score == 1.0


# --- mathematics --------------------------------------------------------------------------------------------------

EQUAL = [
    ("1/2", "0.5"),
    ("1/2", r"\frac{1}{2}"),
    ("0.5", r"\dfrac12"),
    ("1/3", "0.3333333"),
    ("5", "x=5"),
    ("5", r"5\text{ cm}"),
    ("1000", "1,000"),
    ("30", r"30^\circ"),
    ("3/2", r"1\frac{1}{2}"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    ("x^2+2x+1", "(x+1)^2"),
    (r"\frac{1}{x-1}", r"\frac{x+1}{x^2-1}"),
    (r"\{1,2\}", r"\{2, 1\}"),
    ("(1,2)", r"\left( 1, \frac{4}{2} \right)"),
    (r"(-\infty, 2]", r"(-\infty,2]"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\text{Evelyn}", "evelyn"),
    ("3:1", "3 : 1"),
    ("2516_8", "2516_{8}"),
    ("p - q", "-q+p"),
    (r"\sqrt{2}+\sqrt{3}", r"\sqrt{5+2\sqrt{6}}"),
    ("0", r"\sqrt{2}\sqrt{3}-\sqrt{6}"),
    ("1", r"\sin^2 x+\cos^2 x"),
    ("5!", "120"),
    ("05:00", r"05\!:\!00"),
    (r"x \in [-2,7]", "[-2,7]"),
]
DIFFERENT = [
    ("1/2", "0.51"),
    ("5", "-5"),
    ("1/3", "0.333"),
    ("3:1", "3"),
    ("3:1", "1:3"),
    ("11_5", "11"),
    ("11", "1 1"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    (r"\sqrt{2}", "1.41"),
    ("x+1", "x-1"),
    (r"\text{Evelyn}", r"\text{Carla}"),
    (r"2\pi", "2"),
    ("2^{2009}", "2^{2009}+1"),
    ("5:00", r"05\!:\!01"),
    ("0", r"\frac{1}{0}"),
    ("1", r"\frac{0}{0}"),
]


def test_equal_answers_score_and_share_one_key():
    judge = Math(seconds=SECONDS)
    for left, right in EQUAL:
        forward, backward, own = (
            judge(problem(left), box(right)),
            judge(problem(right), box(left)),
            judge(problem(left), box(left)),
        )
        assert forward.score == backward.score == own.score == 1.0, (left, right, forward, backward)
        assert forward.answer == own.answer is not None, (left, right)


def test_different_answers_do_not():
    judge = Math(seconds=SECONDS)
    for left, right in DIFFERENT:
        wrong, own = judge(problem(left), box(right)), judge(problem(left), box(left))
        assert wrong.score == 0.0, (left, right, wrong)
        assert wrong.answer != own.answer, (left, right)


def test_wrong_answers_that_are_equal_are_one_vote():
    judge = Math(seconds=SECONDS)
    for ways in (
        ["1/2", "0.5", r"\frac{1}{2}"],
        [r"\sqrt8", r"2\sqrt{2}"],
        ["(x+1)^2", "x^2+2x+1"],
        ["x=7", "7", r"7^\circ"],
    ):
        assert len({judge(problem("99"), box(way)).answer for way in ways}) == 1, ways


def test_what_has_no_value_is_an_abstention():
    judge = Math(seconds=SECONDS)
    for text in (r"\frac{0}{0}", r"\frac{1}{0}", "", " "):
        verdict = judge(problem("1"), box(text))
        assert verdict.answer is None, text
        assert verdict.status is VerdictStatus.NO_ANSWER


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("#### 18", 1.0),
        ("The answer is 18.", 1.0),
        ("The answer is $18$ dollars", 1.0),
        ("The answer is 18 because I counted", 1.0),
        ("thinking\n18", 1.0),
        ("18 is what I thought, but no", 0.0),
        (r"18 \boxed{17}", 0.0),
    ],
)
def test_math_reads_other_places_than_a_box(text, score):
    assert Math(seconds=SECONDS)(problem("18"), text).score == score
    if "boxed" not in text:
        assert Math(boxed_only=True)(problem("18"), text).status is VerdictStatus.NO_ANSWER


@settings(max_examples=200, deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(1, 10**6), st.integers(-(10**9), 10**9), st.integers(1, 10**6))
def test_fractions_are_equal_exactly_when_their_values_are(a, b, c, d):
    verdict = Math()(problem(f"{a}/{b}"), box(f"\\frac{{{c}}}{{{d}}}"))
    equal = Fraction(a, b) == Fraction(c, d)
    assert verdict.score == float(equal)
    assert (verdict.answer == str(Fraction(a, b))) == equal
    assert verdict.answer == str(Fraction(c, d))


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=[]), max_size=60))
def test_inline_verifiers_never_raise(text):
    for judge in (Exact(), Choice()):
        verdict = judge(problem("B"), text)
        assert verdict.score in (0.0, 1.0)
        (verdict.answer or "").encode("utf-8")
    clean(text).encode("utf-8")
    last_boxed(text), after_marker(text), tagged(text), number(bare_latex(text))


# --- hostile text -------------------------------------------------------------------------------------------------

HOSTILE = {
    "parentheses": "(" * 10**6,
    "boxes": "\\boxed{" * 10**5,
    "closed boxes": "\\boxed{" * 10**4 + "}" * 10**4,
    "answer marks": "answer is " * 10**5,
    "tags": "<answer>" * 10**5,
    "python tower": box("9**9**9**9"),
    "tower": box("9^{9^{9^9}}"),
    "powers of powers": box("((9^{4999})^{4999})^{4999}"),
    "integrals": box("\\int " * 150 + "x dx"),
    "hard integral": box(r"\int_0^{\infty} e^{-x^2}\sin(x^3)\ln(x+\sqrt{x}) dx"),
    "NUL": box("\0\0"),
    "half a pair": box("\ud800"),
    "right to left": box("\u202e5\u202c"),
    "exponents": box("10^{10^{10}}"),
    "exponent": box("10^{99999999999}"),
    "factorial of a factorial": box("(10!)!"),
    "factorial": box("99999999!"),
    "binomial": box(r"\binom{1000000000}{500000000}"),
    "fractions": box("\\frac{1}{" * 100 + "2" + "}" * 100),
    "open fractions": box("\\frac1" * 150),
    "roots": box("\\sqrt{1+" * 100 + "2" + "}" * 100),
    "sines": box("\\sin(" * 100 + "1" + ")" * 100),
    "minus": box("-" * 900 + "1"),
    "sum": box(r"\sum_{k=1}^{10000000000} \frac{1}{k^3+1}"),
    "product": box(r"\prod_{k=1}^{99999999} k"),
    "polynomial": box("(x+y+z+w)^{4000}"),
    "digits": box("9" * 990),
    "float": box("1e999999999"),
    "code": box("__import__('os').system('true')"),
    "long": box("x" * 10**5),
    "commas": box("1," * 490 + "1"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_no_text_takes_the_verifier_down(name):
    text = HOSTILE[name]
    for judge in (Exact(), Choice(), Math(seconds=0.7)):
        began = time.monotonic()
        verdict = judge(problem(r"\frac{x}{3}"), text)
        assert time.monotonic() - began < 5.0
        assert verdict.score == 0.0
        (verdict.answer or "").encode("utf-8")
        assert verdict.answer is None or len(verdict.answer) <= 2000
    assert Math(seconds=SECONDS)(problem("x+2"), box("2+x")).score == 1.0  # the next verdict works


def test_a_time_out_costs_its_own_verdict_only():
    judge = Math(seconds=0.5)
    pairs = [(problem("x+1"), box("1+x")), (problem("5"), HOSTILE["hard integral"]), (problem("y+1"), box("1+y"))]
    judge.verify_many(pairs)  # the process is warm
    began = time.monotonic()
    verdicts = judge.verify_many(pairs)
    assert [v.score for v in verdicts] == [1.0, 0.0, 1.0]
    assert [v.status for v in verdicts] == [VerdictStatus.OK, VerdictStatus.TIMEOUT, VerdictStatus.OK]
    assert 0.5 <= time.monotonic() - began < 3.0


# --- the sandbox --------------------------------------------------------------------------------------------------


def test_the_process_comes_back_when_it_was_killed():
    sandbox = Sandbox("math")
    items = [{"reference": "x+1", "answer": "1+x"}]
    assert sandbox.run(items, SECONDS)[0].value == [1.0, "x + 1"]
    os.kill(sandbox.pid, signal.SIGKILL)
    time.sleep(0.1)
    assert sandbox.run(items, SECONDS)[0].value == [1.0, "x + 1"]
    sandbox.close()
    assert sandbox.pid is None
    assert sandbox.run(items, SECONDS)[0].value == [1.0, "x + 1"]
    sandbox.close()


def test_an_item_that_raises_is_an_error_and_the_next_is_served():
    sandbox = shared("math")
    bad, good = sandbox.run([{"nonsense": 1}, {"reference": "1", "answer": "1"}], SECONDS)
    assert bad.status is VerdictStatus.ERROR
    assert "KeyError" in bad.detail
    assert good.value == [1.0, "1"]


def test_threads_may_share_it():
    def ask(i: int) -> str:
        return shared("math").run([{"reference": "0", "answer": f"{i}x"}], SECONDS)[0].value[1]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(ask, range(2, 40))) == [f"{i}*x" for i in range(2, 40)]


def test_no_orphan_is_left_when_the_parent_is_killed():
    script = """
        import os, signal, sys, threading, time
        from ccpo.tasks.sandbox import Sandbox
        sandbox = Sandbox("math")
        sandbox.run([{"reference": "1", "answer": "1"}], 2.0)
        print(sandbox.pid, flush=True)
        slow = {"reference": "5", "answer": r"\\\\int_0^{\\\\infty} e^{-x^2}\\\\sin(x^3)\\\\ln(x+\\\\sqrt{x}) dx"}
        threading.Thread(target=sandbox.run, args=([slow], 1.0), daemon=True).start()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    source = Path(__file__).parents[1] / "src"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script).replace("\\\\", "\\")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
        timeout=60,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    group = int(done.stdout)
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        if not _alive(group):
            return
        time.sleep(0.05)
    pytest.fail("the sandbox outlived its parent")


def _alive(group: int) -> bool:
    """Whether a process of the group still runs (one that nobody has waited for does not)."""
    listed = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True).stdout.split()
    return any(not state.startswith("Z") for state in listed)


@pytest.mark.parametrize(
    ("event", "args"),
    [
        ("os.system", ("true",)),
        ("subprocess.Popen", ("true", [], None, None)),
        ("socket.connect", ()),
        ("os.remove", ("/x", -1)),
        ("ctypes.dlopen", ("libc",)),
        ("open", ("/tmp/x", "w", os.O_WRONLY | os.O_CREAT)),
        ("open", ("/tmp/x", None, os.O_RDWR)),
    ],
)
def test_the_process_touches_nothing(event, args):
    with pytest.raises(PermissionError):
        _refuse(event, args)
    _refuse("open", ("/tmp/x", "r", os.O_RDONLY))
    _refuse("import", ("json",))


# --- batches ------------------------------------------------------------------------------------------------------


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, problem: Problem, text: str) -> Verdict:
        self.calls += 1
        return Verdict(score=float(text == problem.answer), answer=text)


def test_the_same_text_is_judged_once_and_the_order_is_kept():
    judge = Counting()
    pairs = [(problem("1"), "1"), (problem("2"), "1"), (problem("1"), "1"), (problem("1"), "2")]
    assert [v.score for v in verify_all(judge, pairs)] == [1.0, 0.0, 1.0, 0.0]
    assert judge.calls == 3


def test_a_batch_gives_what_single_calls_give():
    judge = Math(seconds=SECONDS)
    pairs = [(problem(left), box(right)) for left, right in EQUAL + DIFFERENT]
    assert judge.verify_many(pairs) == [judge(*pair) for pair in pairs]
    assert judge.verify_many(list(reversed(pairs))) == [judge(*pair) for pair in reversed(pairs)]


def test_a_verifier_of_the_users_own_that_raises_is_an_error_not_the_end():
    def fragile(problem: Problem, text: str) -> Verdict:
        return Verdict(score=1.0 / len(text), answer=text)

    with pytest.warns(UserWarning, match="fragile raised ZeroDivisionError"):
        verdicts = verify_all(fragile, [(problem("1"), ""), (problem("1"), "a")])
    assert [v.status for v in verdicts] == [VerdictStatus.ERROR, VerdictStatus.OK]


@pytest.mark.parametrize("returned", [1.0, Verdict(score=math.nan, answer="x"), Verdict(score=1.5, answer="x")])
def test_a_verifier_that_returns_no_score_is_the_users_mistake(returned):
    with pytest.raises(UserError, match=r"must return|lies in"):
        verify_all(lambda problem, text: returned, [(problem("1"), "1")])


def test_names_and_limits():
    assert make_verifier("math", seconds=3.0) == Math(seconds=3.0)
    assert make_verifier("choice") == Choice()
    with pytest.raises(UserError, match=r"no verifier 'maths'.*Did you mean 'math'"):
        make_verifier("maths")
    task = ListTask(name="t", problems=(problem("1"),), verifier=Math())
    assert limited(task, 1.5).verifier == Math(seconds=1.5)
    plain = replace(task, verifier=Exact())
    assert limited(plain, 1.5) is plain
    with pytest.raises(UserError, match="has no problems"):
        ListTask(name="t", problems=(), verifier=Exact())
    with pytest.raises(IndexError):
        task[-1]


def test_simple_answers_are_judged_fast():
    pairs = [(problem(str(i)), f"{'thought ' * 20} \\boxed{{{i % 7}}}") for i in range(3000)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        began = time.perf_counter()
        verdicts = Math().verify_many(pairs)
    assert time.perf_counter() - began < 3.0  # about 0.1 s
    assert sum(v.score for v in verdicts) == 7


def test_only_the_end_of_a_text_is_read():
    assert Exact()(problem("5"), r"\boxed{5}" + " " * (TAIL + 1)).answer is None
    assert Exact()(problem("5"), "x" * 10**6 + r"\boxed{5}").score == 1.0
