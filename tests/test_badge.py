"""The short line about a run, the list of backends, and the answers of the status routes; without a server and without
ComfyUI's models.
"""

import asyncio
import json
import re
import threading
import time
import types

import pytest
import torch

from flux2_pack.attention.status import badge, backends_here
from flux2_pack.attention.call import cards
from flux2_pack.attention import registry
from flux2_pack.attention.run_log import RunLog
from flux2_pack.attention.dispatch import USE_SDPA, Schedule, AttentionDispatcher


def tensors(dtype=torch.float32, tokens=8):
    return [torch.randn(1, tokens, 2, 64, generator=torch.Generator().manual_seed(n)).to(dtype) for n in range(3)]


def sampled(dispatcher, steps=2, calls=3, error=None):
    """A run as the sampler's hooks drive it."""
    run = dispatcher.begin_run(steps)
    for step in range(steps):
        with dispatcher.forward(step, steps):
            for index in range(calls):
                dispatcher.attend(*tensors(), block=("double", index))
    dispatcher.log.end(run, error=error)
    return run


def without_time(shown):
    """A badge's state with N for the seconds per step, which the machine decides."""
    return {**shown, "text": re.sub(r"[\d.e-]+ s/step", "N s/step", shown["text"])}


def line(dispatcher, run):
    return without_time(
        badge.badge_of(run, dispatcher.backend, dispatcher.schedule.backend if dispatcher.schedule else None)
    )


@pytest.mark.parametrize(
    "backend, text", [("auto", "auto → sdpa · N s/step (2 steps)"), ("sdpa-math", "sdpa-math · N s/step (2 steps)")]
)
def test_a_run_in_one_line(backend, text):
    chosen = AttentionDispatcher(backend)
    assert line(chosen, sampled(chosen)) == {"state": "ran", "text": text}


def test_a_single_step_is_no_plural():
    chosen = AttentionDispatcher("sdpa")
    assert line(chosen, sampled(chosen, 1, 1))["text"] == "sdpa · N s/step (1 step)"


def test_a_schedule_names_both_backends_with_their_calls():
    chosen = AttentionDispatcher("sdpa", schedule=Schedule("sdpa-math", first_steps=1, blocks=(("double", 3),)))
    assert line(chosen, sampled(chosen, steps=3)) == {
        "state": "ran",
        "text": "sdpa → sdpa 6 + sdpa-math 3 · N s/step (3 steps)",
    }


def test_calls_that_another_backend_computed_are_marked():
    chosen = AttentionDispatcher("flash4", unsupported=USE_SDPA)  # refuses every call on a CPU
    if not registry.unavailable("flash4", registry.describe("cpu")):
        pytest.skip("it runs here")
    assert line(chosen, sampled(chosen)) == {"state": "other", "text": "flash4 → sdpa · N s/step (2 steps)"}


def test_a_model_that_asks_for_no_attention():
    chosen = AttentionDispatcher("sdpa")
    assert line(chosen, sampled(chosen, calls=0)) == {"state": "nothing", "text": "sdpa · not asked by this model"}


@pytest.mark.parametrize(
    "error, state, text",
    [
        ("InterruptProcessingException", "cancelled", "sdpa · cancelled"),
        ("InterruptProcessingException: stop", "cancelled", "sdpa · cancelled"),
        ("RuntimeError: out of luck\nmore", "failed", "sdpa stopped: out of luck"),
        ("KeyError", "failed", "sdpa stopped: KeyError"),
        (
            (
                "AttentionRefused: Attention backend 'sdpa' cannot run here:\n- It needs a GPU.\n- It needs luck.\nBuy "
                "one."
            ),
            "failed",
            "sdpa refused: It needs a GPU.",
        ),
    ],
)
def test_a_run_that_stopped(error, state, text):
    chosen = AttentionDispatcher("sdpa")
    assert line(chosen, sampled(chosen, error=error)) == {"state": state, "text": text}


def test_the_listener_hears_the_kernel_after_the_first_forward_pass_and_the_end():
    chosen, heard = AttentionDispatcher("auto"), []
    chosen.log.listener = lambda run: heard.append(line(chosen, run))
    sampled(chosen, steps=4)
    assert [(h["state"], h["text"]) for h in heard] == [
        ("running", "auto → sdpa · running"),
        ("ran", "auto → sdpa · N s/step (4 steps)"),
    ]


def test_a_listener_that_fails_does_not_stop_the_sampling(caplog):
    chosen = AttentionDispatcher("sdpa")

    def broken(run):
        raise OSError("the page is gone")

    chosen.log.listener = broken
    assert sampled(chosen).calls == 6 and "could not be shown" in caplog.text


def test_forward_passes_outside_a_sampling_are_no_news():
    log = RunLog()
    log.forward()
    assert log.current is None


# --- backends on this machine


def test_every_backend_is_listed_once_with_a_reason_or_a_version():
    found = backends_here.list_backends(torch.device("cpu"))
    assert sorted(row["backend"] for row in found["backends"]) == sorted(registry.ROWS)
    for row in found["backends"]:
        assert (row["state"] == backends_here.HERE) == (not row["reasons"]) == bool(row["version"])
        assert bool(row["install"]) == (row["state"] == backends_here.MISSING)
    states = [row["state"] for row in found["backends"]]
    assert states[0] == backends_here.HERE and states == sorted(
        states, key=(backends_here.HERE, backends_here.MISSING, backends_here.ELSEWHERE).index
    )


def test_an_install_command_names_the_python_that_runs_this(monkeypatch):
    monkeypatch.setattr(registry.sys, "executable", "/opt/portable python/bin/python3")
    monkeypatch.setattr(registry, "_modules", {"flash4": (None, "ModuleNotFoundError: No module named 'flash_attn'")})
    row = backends_here.entry("flash4", registry.describe("cpu").__class__("nvidia", "sm90", "NVIDIA H200"))
    assert (
        row["state"] == backends_here.MISSING
        and row["command"] == '"/opt/portable python/bin/python3" -m pip install --pre flash-attn-4'
    )
    assert "No module named" in row["reasons"][0]
    assert backends_here.pip_command(registry.AITER_INSTALL) == "", "a sentence about sources is not a command"


@pytest.mark.parametrize("slug", registry.ROWS)
def test_hardware_reads_like_the_table_of_backends(slug):
    from pack import ROOT

    row = registry.row(slug)
    assert (
        f"| `{slug}` | {row.library}: {row.summary} | {backends_here.hardware_text(row.hardware)} |"
        in (ROOT / "docs" / "backends.md").read_text()
    )


def test_hardware_is_named_by_its_cards():
    here = registry.describe("cpu").__class__
    row = backends_here.entry("aiter-fp8", here("amd", "gfx90a", "AMD Instinct MI210"))
    assert row["cards"] == "AMD MI300, MI325X, MI350X, MI355X" and row["hardware"] == "AMD gfx942, gfx950"
    assert row["marks"][0] == "needs MI300 or MI325X or MI350X or MI355X"
    assert (
        "gfx942, gfx950 (MI300, MI325X, MI350X, MI355X), and this is AMD Instinct MI210 (gfx90a)." in row["reasons"][0]
    )
    flash = backends_here.cards_text(registry.row("flash4").hardware)
    assert flash.startswith("NVIDIA A100, RTX 30, Jetson Orin, RTX 40, L40S, H100, H200, B200") and "sm" not in flash
    assert backends_here.cards_text(registry.row("sdpa").hardware) == "any"
    assert "gfx1250" in backends_here.cards_text(registry.row("aiter-flydsl").hardware), "no card is known for it"


def test_every_architecture_of_a_backend_has_a_card_or_is_named():
    for slug, row in registry.ROWS.items():
        for platform, archs in row.hardware.archs.items():
            unknown = [arch for arch in archs if cards([arch]) == [arch]]
            assert unknown in ([], ["gfx1250"]), (slug, platform)


def test_the_test_call_of_every_backend_is_not_remembered(monkeypatch):
    monkeypatch.setattr(registry, "_passed", set())
    found = backends_here.test_all(torch.device("cpu"))
    assert found["tested"] == {"sdpa": [], "sdpa-flash": [], "sdpa-math": []} and registry._passed == set()
    text = backends_here.as_text(found)
    assert (
        all(slug in text for slug in registry.ROWS)
        and text.count("test call passed") == 3
        and torch.__version__ in text
    )


# --- the routes


@pytest.fixture
def routes(comfy, monkeypatch):
    """The handlers that the pack registers, by method and address, and the server that they see."""
    from flux2_pack.nodes import status

    handlers, sent = {}, []

    def register(method):
        return lambda path: lambda handler: handlers.setdefault((method, path), handler)

    server = types.SimpleNamespace(
        routes=types.SimpleNamespace(get=register("GET"), post=register("POST")),
        client_id="page",
        send_sync=lambda *message: sent.append(message),
        prompt_queue=types.SimpleNamespace(get_tasks_remaining=lambda: 0),
    )
    monkeypatch.setattr(status, "running_server", lambda: server)
    status.add_routes()
    return types.SimpleNamespace(status=status, handlers=handlers, server=server, sent=sent)


def ask(routes, method, path, **match):
    async def work():
        return await routes.handlers[method, path](types.SimpleNamespace(match_info=match))

    answer = asyncio.run(work())
    return answer.status, json.loads(answer.body)


def test_a_sampling_is_told_to_the_page_that_queued_it(routes):
    chosen = AttentionDispatcher("auto")
    token = routes.status.follow(chosen)
    assert ask(routes, "GET", routes.status.STATUS_ROUTE, token=token) == (
        200,
        {"token": token, "state": "waiting", "text": "", "report": ""},
    )
    sampled(chosen)
    assert [(event, without_time(data), to) for event, data, to in routes.sent] == [
        ("flux2_attention_status", {"token": token, "state": state, "text": f"auto → sdpa · {end}"}, "page")
        for state, end in (("running", "running"), ("ran", "N s/step (2 steps)"))
    ]
    code, answer = ask(routes, "GET", routes.status.STATUS_ROUTE, token=token)
    assert code == 200 and without_time(answer)["text"] == "auto → sdpa · N s/step (2 steps)"
    assert answer["report"] == chosen.log.current.as_text()


def test_without_a_page_nothing_is_sent(routes):
    routes.server.client_id = None
    chosen = AttentionDispatcher("auto")
    routes.status.follow(chosen)
    sampled(chosen)
    assert routes.sent == []


def test_a_selection_that_is_gone_is_not_found(routes):
    token = routes.status.follow(AttentionDispatcher("auto"))  # nobody holds it: the token must not keep it alive
    code, answer = ask(routes, "GET", routes.status.STATUS_ROUTE, token=token)
    assert code == 404 and answer["error"].endswith(".")
    assert ask(routes, "GET", routes.status.STATUS_ROUTE, token="../../etc/passwd")[0] == 404


def test_slow_libraries_do_not_block_the_server(routes, monkeypatch):
    """The list is made in another thread: the event loop goes on meanwhile."""
    monkeypatch.setattr(backends_here, "list_backends", lambda device: slow())
    seen = []

    def slow():
        seen.append(threading.current_thread() is threading.main_thread())
        time.sleep(0.4)
        return {"machine": {}, "backends": []}

    async def work():
        asking = asyncio.create_task(routes.handlers["GET", routes.status.BACKENDS_ROUTE](None))
        ticks = 0
        while not asking.done():
            await asyncio.sleep(0.02)
            ticks += 1
        return ticks

    assert asyncio.run(work()) > 2 and seen == [False]


def test_no_test_call_while_a_job_runs(routes):
    routes.server.prompt_queue.get_tasks_remaining = lambda: 1
    code, answer = ask(routes, "POST", routes.status.TEST_ROUTE)
    assert code == 409 and "queue is not empty" in answer["error"]


def test_the_list_over_http(routes):
    code, answer = ask(routes, "GET", routes.status.BACKENDS_ROUTE)
    assert (
        code == 200
        and len(answer["backends"]) == len(registry.ROWS)
        and "PyTorch" in answer["machine"]
        and "sdpa-math" in answer["text"]
    )
