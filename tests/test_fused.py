"""The decoder's C code: as exact as torch's bfloat16, the same whatever is decoded together, and never used where it cannot be trusted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from ccpo.engines import fused, native
from ccpo.engines.base import make_engine
from ccpo.engines.fused import FusedLayers
from ccpo.engines.layers import TorchLayers
from ccpo.engines.sampling import Sampler
from ccpo.errors import RunFailure, UserError
from ccpo.kernels import compiled as loading
from ccpo.kernels.compiled import Unavailable, library, why_not
from ccpo.learner.fused import CTexts
from ccpo.types import Request
from test_engines import LLAMA3, mixed_requests, prompts
from tiny import tiny_model, tiny_tokenizer

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(library() is None, reason=f"no compiled code here: {why_not()}")
TOKENIZER = tiny_tokenizer(pad=False)
WIDE = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
VARIANTS = {
    "qwen2": ("qwen2", WIDE),
    "qwen2-all-heads": ("qwen2", {**WIDE, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "qwen3-wide-heads": ("qwen3", {**WIDE, "head_dim": 32}),
    "qwen3-one-key-head": ("qwen3", {"num_key_value_heads": 1, "attention_bias": True}),
    "qwen2-seven-a-key-head": ("qwen2", {"hidden_size": 224, "num_attention_heads": 14, "num_key_value_heads": 2}),
    "llama-odd-sizes": (
        "llama",
        {**WIDE, "hidden_size": 72, "head_dim": 16, "intermediate_size": 90, "mlp_bias": True},
    ),
    "llama-biases": ("llama", {**WIDE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama3-rope": ("llama", {**WIDE, "rope_parameters": LLAMA3}),
}


def engines(variant: str, monkeypatch):
    """The same model in float32, in C, and in torch in bfloat16."""
    family, overrides = VARIANTS[variant]
    model = tiny_model(family, **overrides)
    model.generation_config.eos_token_id = None
    exact = make_engine(model, TOKENIZER, kind="native", dtype=torch.float32)
    fast = make_engine(model, TOKENIZER, kind="native", dtype=torch.bfloat16)
    with monkeypatch.context() as patched:
        patched.setattr(native, "fits", lambda *_: False)
        plain = make_engine(model, TOKENIZER, kind="native", dtype=torch.bfloat16)
    assert [type(e.layers) for e in (exact, fast, plain)] == [TorchLayers, FusedLayers, TorchLayers]
    return exact, fast, plain


@pytest.fixture(params=["tiles", "vectors"])
def instructions(request):
    """AMX where there is one, and without it."""
    code = library()
    code.ccpo_begin(request.param == "tiles")
    yield request.param
    code.ccpo_begin(1)


def apart(engine, exact, asked) -> float:
    """The mean difference of log-probs after these prompts, over all tokens."""
    return (engine.logits(asked).float().log_softmax(-1) - exact.logits(asked).log_softmax(-1)).abs().mean().item()


@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_are_as_exact_as_in_torch(variant, instructions, monkeypatch):
    exact, fast, plain = engines(variant, monkeypatch)
    asked = prompts(1, 2, 15, 16, 17, 33, 90, 131)
    assert 0 < apart(fast, exact, asked) < 1.1 * apart(plain, exact, asked) < 0.1
    wrong = [p[:-2] + p[-1:] for p in asked[1:]]
    assert (exact.logits(wrong) - exact.logits(asked[1:])).abs().mean() > 0.2  # a token less is noticed


@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_as_exact_as_in_torch(variant, instructions, monkeypatch):
    """Log-probs of what was said, against the float32 logits after the same tokens as a prompt."""
    exact, fast, plain = engines(variant, monkeypatch)
    errors = {}
    asked = [
        Request(prompt_ids=p, seed=seed, max_tokens=40, temperature=temperature)
        for p in prompts(2, 17, 70)
        for seed, temperature in ((1, 1.0), (2, 0.7), (3, 0.0))
    ]
    for name, engine in (("fast", fast), ("plain", plain)):
        found = []
        for request, said in zip(asked, engine.generate(asked), strict=True):
            texts = [(*request.prompt_ids, *said.token_ids[:n]) for n in range(40)]
            logprobs = (exact.logits(texts) / (request.temperature or 1.0)).log_softmax(-1)
            want = logprobs.gather(1, torch.tensor(said.token_ids)[:, None])[:, 0]
            found.append((want - torch.tensor(said.logprobs)).abs())
        errors[name] = torch.cat(found).mean().item()
    assert 0 < errors["fast"] < 1.25 * errors["plain"] < 0.2


@pytest.mark.parametrize("variant", ["qwen2", "qwen3-wide-heads", "llama-odd-sizes"])
def test_what_is_decoded_together_does_not_matter(variant, instructions, monkeypatch):
    """To the last bit: alone, reversed, with other threads, other prompt batches, and rows that leave."""
    _, fast, _ = engines(variant, monkeypatch)
    asked = mixed_requests(24, seed=3)
    together = fast.generate(asked)
    assert len({c.token_ids for c in together}) > 8
    for request, want in zip(asked, together, strict=True):
        (alone,) = fast.generate([request])
        assert (alone.token_ids, alone.text, alone.finish) == (want.token_ids, want.text, want.finish)
        assert alone.logprobs == want.logprobs
    assert fast.generate(asked[::-1])[::-1] == together
    monkeypatch.setattr(fused, "PREFILL_TOKENS", 25)
    assert fast.generate(asked) == together
    for threads in (2, 3):
        torch.set_num_threads(threads)
        try:
            assert fast.generate(asked) == together
        finally:
            torch.set_num_threads(1)


def test_samples_share_a_prompt(monkeypatch):
    _, fast, _ = engines("qwen2", monkeypatch)
    asked = [Request(prompt_ids=p, seed=s, max_tokens=20) for p in prompts(100, 7) for s in range(9)]
    made: list[int] = []
    columns = fused.Columns
    monkeypatch.setattr(fused, "Columns", lambda w, slots, size: made.append(slots) or columns(w, slots, size))
    together = fast.generate(asked)
    assert made == [2, 18]  # prompts, and what is said
    assert fast.prefill_tokens == 107
    assert [fast.generate([r])[0] for r in asked] == together


def test_rows_leave_when_they_are_done(monkeypatch):
    _, fast, _ = engines("qwen2", monkeypatch)
    widths: list[int] = []
    step = FusedLayers.step
    monkeypatch.setattr(FusedLayers, "step", lambda *a: (widths.append(len(a[2])), step(*a))[1])
    fast.generate([Request(prompt_ids=p, seed=i, max_tokens=4 * i + 4) for i, p in enumerate(prompts(*range(4, 12)))])
    assert widths == [8] * 3 + [7] * 4 + [6] * 4 + [5] * 4 + [4] * 4 + [3] * 4 + [2] * 4 + [1] * 4


def test_refresh_writes_to_the_same_place(monkeypatch):
    exact, fast, _ = engines("qwen2-all-heads", monkeypatch)
    asked, w = prompts(5, 30), fast.weights
    at = [
        w.head.panels.data_ptr(),
        w.norm.data_ptr(),
        w.embed.data_ptr(),
        *(layer.qkv.panels.data_ptr() for layer in w.layers),
    ]
    before = fast.logits(asked)
    with torch.no_grad():
        for parameter in w.source.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    assert torch.equal(fast.logits(asked), before)
    for engine in (exact, fast):
        engine.refresh()
    assert apart(fast, exact, asked) < 0.05
    assert (fast.logits(asked) - before).abs().mean() > 0.2
    assert at == [
        w.head.panels.data_ptr(),
        w.norm.data_ptr(),
        w.embed.data_ptr(),
        *(layer.qkv.panels.data_ptr() for layer in w.layers),
    ]


def test_adapters_are_merged():
    model = tiny_model("qwen2", **WIDE)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "down_proj", "up_proj"], init_lora_weights=False)
    )
    exact, fast = (make_engine(wrapped, TOKENIZER, kind="native", dtype=d) for d in (torch.float32, torch.bfloat16))
    assert isinstance(fast.layers, FusedLayers)
    assert apart(fast, exact, prompts(5, 30)) < 0.05
    with wrapped.disable_adapter(), torch.no_grad():
        bare = torch.stack([wrapped(torch.tensor([p])).logits[0, -1] for p in prompts(5, 30)])
    assert (exact.logits(prompts(5, 30)) - bare).abs().mean() > 0.1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_broken_weights_are_a_failure_not_a_text(temperature):
    model = tiny_model("qwen2", **WIDE)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    engine = make_engine(model, TOKENIZER, dtype=torch.bfloat16)
    assert isinstance(engine.layers, FusedLayers)
    with pytest.raises(RunFailure, match="not finite"):
        engine.generate([Request(prompt_ids=(5, 6), seed=1, max_tokens=5, temperature=temperature)])


def test_a_spoilt_text_does_not_spoil_its_neighbours(monkeypatch):
    """A cache that is used again holds what it held; rows with numbers that are none stay alone with them."""
    model = tiny_model("qwen2", **{**WIDE, "tie_word_embeddings": False})
    asked = prompts(20, 21, 22)
    fast = make_engine(model, TOKENIZER, dtype=torch.bfloat16)
    want = fast.logits(asked)
    with torch.no_grad():
        model.model.embed_tokens.weight[asked[1][4]] = float("nan")
    fast.refresh()
    spoilt = [asked[1][4] in p for p in asked]
    found = fast.logits(asked)
    assert spoilt == found.isnan().all(1).tolist()
    assert torch.equal(found[~torch.tensor(spoilt)], want[~torch.tensor(spoilt)])


def test_two_threads_may_ask_one_engine(monkeypatch):
    _, fast, _ = engines("qwen2", monkeypatch)
    few, many = (
        [Request(prompt_ids=p, seed=3, max_tokens=12) for p in prompts(*sizes)] for sizes in ((5,) * 3, (90,) * 12)
    )
    want = {id(asked): fast.generate(asked) for asked in (few, many)}
    with ThreadPoolExecutor(4) as pool:
        for asked, found in pool.map(lambda asked: (asked, fast.generate(asked)), [few, many] * 12):
            assert found == want[id(asked)]


def test_defaults_that_somebody_has_set_do_not_reach_it(monkeypatch):
    """Buffers have the dtype that the C code writes, whatever torch's default is."""
    _, fast, _ = engines("qwen3-wide-heads", monkeypatch)
    asked = mixed_requests(12, seed=4)
    want = fast.generate(asked)
    for dtype in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            again = make_engine(fast.weights.source, TOKENIZER, kind="native", dtype=torch.bfloat16)
            assert again.generate(asked) == want == fast.generate(asked)
            assert loading._right(library())
        finally:
            torch.set_default_dtype(torch.float32)


def test_prompts_that_cannot_be_read_are_refused(monkeypatch):
    _, fast, _ = engines("qwen2", monkeypatch)
    for prompt, word in (((), "empty prompt"), ((5, 101), "token id 101"), ((-1,), "token id -1")):
        with pytest.raises(UserError, match=word):
            fast.logits([prompt])


# ---- samples ----


@pytest.mark.parametrize("vocab", [3, 16, 101, 5_000, 151_936])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.0])
def test_samples_are_those_of_torch(vocab, temperature):
    logits = 3 * torch.randn(40, vocab, generator=torch.Generator().manual_seed(vocab))
    asked = [Request(prompt_ids=(1,), seed=i, max_tokens=3, temperature=temperature) for i in range(40)]
    sampler = Sampler.of(asked, torch.device("cpu"))
    kept = logits.clone()
    for step in range(3):
        (a, p), (b, q) = sampler.draw(logits, step), sampler._draw(logits, step)
        assert (a == b).float().mean() >= (1 if vocab < 1_000 else 0.9)  # a draw at an edge may fall to either side
        assert torch.allclose(p[a == b], q[a == b], rtol=1e-4)
    assert torch.equal(logits, kept)


def test_a_weight_of_zero_is_never_drawn(monkeypatch):
    for vocab in (40, 5_000):
        logits = torch.full((200, vocab), float("-inf"))
        logits[:, [2, 17, vocab - 9]] = torch.tensor([0.0, 1.0, -80.0])
        asked = [Request(prompt_ids=(1,), seed=0, max_tokens=1)] * 200
        sampler = Sampler.of(asked, torch.device("cpu"))
        edges = torch.cat(
            (torch.linspace(0, 1, 190, dtype=torch.float64) * (1 - 2**-49), 1 - 2.0 ** -torch.arange(40, 50).double())
        )
        token, prob = fused_draw(sampler, logits, edges[:, None])
        assert set(token.tolist()) <= {2, 17, vocab - 9} and {2, 17} <= set(token.tolist())
        assert bool((prob > 0).all())


def fused_draw(sampler, logits, noise):
    from dataclasses import replace

    return replace(sampler, noise_BT=noise.contiguous()).draw(logits, 0)


def test_a_row_that_is_not_a_number_tells():
    logits = torch.zeros(3, 70)
    logits[1, 5] = float("nan")
    for temperature in (0.0, 1.0):
        asked = [Request(prompt_ids=(1,), seed=i, max_tokens=1, temperature=temperature) for i in range(3)]
        _, prob = Sampler.of(asked, torch.device("cpu")).draw(logits, 0)
        assert prob.isnan().tolist() == [False, True, False]


def test_whole_numbers_are_temperatures_too():
    asked = [[Request(prompt_ids=(1,), seed=i, max_tokens=1, temperature=t) for i in range(9)] for t in (2, 2.0)]
    logits = torch.randn(9, 40)
    (a, p), (b, q) = (Sampler.of(some, torch.device("cpu")).draw(logits, 0) for some in asked)
    assert torch.equal(a, b) and torch.equal(p, q)


def test_padded_and_transposed_logits_are_read_as_they_lie():
    asked = [Request(prompt_ids=(1,), seed=i, max_tokens=1) for i in range(8)]
    sampler, logits = Sampler.of(asked, torch.device("cpu")), torch.randn(8, 50)
    want = sampler.draw(logits, 0)
    padded = torch.full((8, 64), 99.0)
    padded[:, :50] = logits
    for form in (padded[:, :50], logits.t().contiguous().t()):
        assert all(torch.equal(a, b) for a, b in zip(sampler.draw(form, 0), want, strict=True))


# ---- where it is not used ----


def test_what_does_not_fit_runs_in_torch():
    assert isinstance(
        make_engine(tiny_model("qwen2"), TOKENIZER, dtype=torch.bfloat16).layers, TorchLayers
    )  # 8 channels a head
    assert isinstance(make_engine(tiny_model("qwen2", **WIDE), TOKENIZER, dtype=torch.float32).layers, TorchLayers)


@pytest.fixture
def reloaded(tmp_path, monkeypatch):
    """A cache folder of its own, and nothing loaded yet."""
    monkeypatch.setenv("CCPO_CACHE", str(tmp_path / "cache"))
    return tmp_path


def test_it_is_compiled_once(reloaded, monkeypatch):
    loading._load()
    (made,) = (reloaded / "cache" / "compiled").iterdir()
    assert made.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
    loading._load()


def compiler(folder: Path, script: str) -> str:
    path = folder / "cc"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("echo 'error: no such target' >&2; exit 1", "could not compile kernels: error: no such target"),
        ("sleep 30", "could not run"),
    ],
)
def test_a_compiler_that_fails_is_named(reloaded, monkeypatch, script, sentence):
    monkeypatch.setenv("CC", compiler(reloaded, script))
    monkeypatch.setattr(loading, "SECONDS", 0.5)
    with pytest.raises(Unavailable, match=sentence):
        loading._load()
    assert not list((reloaded / "cache" / "compiled").iterdir())


def test_no_compiler(reloaded, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(loading.shutil, "which", lambda name: None)
    with pytest.raises(Unavailable, match="no C compiler"):
        loading._load()
    monkeypatch.setenv("CC", str(reloaded / "nowhere"))
    with pytest.raises(Unavailable, match="could not run"):
        loading._load()


def test_a_processor_or_system_without_it(reloaded, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
        with pytest.raises(Unavailable, match="AVX-512"):
            loading._load()
    monkeypatch.setattr(loading.platform, "system", lambda: "Darwin")
    with pytest.raises(Unavailable, match="not on Darwin"):
        loading._load()


def test_code_that_others_can_write_is_not_loaded(reloaded):
    loading._load()
    (made,) = (reloaded / "cache" / "compiled").iterdir()
    for path in (made, made.parent, made.parent.parent):
        path.chmod(0o777)
        with pytest.raises(Unavailable, match="can be written by others"):
            loading._load()
        path.chmod(0o700)


def test_a_file_that_cannot_be_loaded_is_named(reloaded, monkeypatch):
    made = reloaded / "kernels.so"
    made.write_bytes(b"of another system")
    monkeypatch.setattr(loading, "_built", lambda: made)
    with pytest.raises(Unavailable, match=r"cannot be loaded: .*remove it, or set CCPO_CACHE"):
        loading._load()


def test_a_machine_without_a_home_or_room(reloaded, monkeypatch):
    monkeypatch.setenv("CCPO_CACHE", "/proc/nowhere")
    with pytest.raises(Unavailable, match="cache folder cannot be used"):
        loading._load()
    monkeypatch.delenv("CCPO_CACHE")
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    with pytest.raises(Unavailable, match="cache folder cannot be used: Could not determine home"):
        loading._load()


def test_torchs_own_threads_are_used(reloaded):
    """One OpenMP in the process, whatever it is called."""
    loading._load()
    maps = Path("/proc/self/maps").read_text()
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


def test_wrong_code_is_found_out(reloaded, monkeypatch, tmp_path):
    wrong = Path(shutil.copytree(loading.SOURCES, tmp_path / "kernels")) / "product.c"
    source = wrong.read_text()
    assert "k += 32" in source and "k += 2)" in source
    wrong.write_text(source.replace("k += 32", "k += 64").replace("k += 2)", "k += 4)"))
    monkeypatch.setattr(loading, "SOURCES", wrong.parent)
    with pytest.raises(Unavailable, match="multiplies wrongly"):
        loading._load()


def test_it_can_be_switched_off():
    code = "import torch; from ccpo.kernels.compiled import library, why_not; print(library(), why_not())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "CCPO_COMPILED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "None CCPO_COMPILED is 0\n"


@pytest.mark.parametrize(
    ("file", "name", "made"),
    [
        ("decode.c", "Layer", fused.CLayer),
        ("decode.c", "Model", fused.CModel),
        ("decode.c", "Cache", fused.CCache),
        ("decode.c", "Batch", fused.CBatch),
        ("attend.c", "Texts", CTexts),
    ],
)
def test_the_structures_are_those_of_the_c_code(file, name, made):
    """Fields and their order, read from the source."""
    source = re.sub(r"/\*.*?\*/", "", (loading.SOURCES / file).read_text(), flags=re.S)
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", source).group(1)
    wanted = []
    for line in filter(None, map(str.strip, body.split(";"))):
        kind, rest = re.fullmatch(r"(?:const )?(\w+) (.*)", line, flags=re.S).groups()
        for field in map(str.strip, rest.split(",")):
            wanted.append((field.strip("*"), "pointer" if field.startswith("*") else kind))
    names = {"c_void_p": "pointer", "c_int": "int32_t", "c_float": "float"}
    assert [(field.replace("origin", "from"), names[kind.__name__]) for field, kind in made._fields_] == wanted


def test_every_function_has_the_types_of_the_c_code():
    """Arguments and results, read from the sources."""
    letters = {"int": "i", "int32_t": "i", "int64_t": "l", "long": "l", "size_t": "l", "float": "f", "void": ""}
    found = {}
    for path in loading.sources(".c"):
        text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.S)
        for gives, name, takes in re.findall(r"^(\w+) (ccpo_\w+)\(([^)]*)\) \{", text, flags=re.M):
            kinds = ["p" if "*" in one else letters[one.replace("const ", "").split()[0]] for one in takes.split(",")]
            found[name] = "".join(kinds) + (f" -> {letters[gives]}" if letters[gives] else "")
    assert found == loading.FUNCTIONS
