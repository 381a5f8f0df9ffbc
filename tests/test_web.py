"""The web page's server: who may ask, what may be asked, and that its numbers are the planner's."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import parse_qsl, quote, urlencode

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bursar.errors import BadInput
from bursar.plan.search import AXES, enumerate_layouts, priced
from bursar.plan.usual import narrowed, usual
from bursar.report.bars import bar
from bursar.report.outlook import MEMORY, TIME
from bursar.step_time import PARTS
from bursar.web import server
from bursar.web.answers import answer, asked, found
from bursar.web.pages import changing, whole
from bursar.web.serve import listen
from bursar.web.state import BadField, Setup, State, form, parse, query, value, written
from command import ask
from page_server import served

SMALL = "model=gpt2&gpus=8&seq=1024&batch=524288&tokens=10B"
SETUP = parse(parse_qsl(SMALL)).first
NASTY = ["<img src=x onerror=alert(1)>", "two\nlines", "\x1b[31mred", "\u202egnp", "'\"><script>alert(1)</script>"]


@pytest.fixture(scope="module")
def page():
    with served() as running:
        yield running


@pytest.fixture(scope="module")
def small():
    return answer(SETUP)


# ---- the address


def values_of(field):
    if field.kind == "choice":
        known = st.sampled_from(field.choices)
    elif field.kind == "count":
        known = st.integers(int(field.low), int(field.high))
    else:
        known = st.floats(field.low, field.high)
    return known | st.none() if field.auto else known


setups = st.builds(Setup, **{f.name: values_of(f) for f in form()})


@given(setups, setups | st.none())
@settings(max_examples=60, deadline=None)
def test_an_address_says_its_state_and_nothing_is_lost_on_the_way(first, second):
    state = State(first, second)
    assert parse(parse_qsl(query(state))) == state
    assert len(query(state)) < server.LONGEST_QUERY


def test_the_default_has_the_shortest_address_and_a_copy_beside_it_says_only_that():
    assert query(State(Setup())) == ""
    assert query(State(Setup(), Setup())) == "compare=1"
    assert query(State(Setup(gpus=8), Setup(gpus=8, tp=2))) == "gpus=8&compare=1&b.tp=2"


def test_the_form_has_every_field_of_a_set_up_once():
    assert sorted(f.name for f in form()) == sorted(f.name for f in fields(Setup))


def test_what_a_browser_sends_from_the_form_untouched_is_the_default():
    sent = [(f.name, written(getattr(Setup(), f.name))) for f in form()]
    assert parse(sent) == State(Setup())
    assert parse([(name, "" if text == "auto" else text) for name, text in sent]) == State(Setup())


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("gpus", "0", "0 is out of range; give 1 to 262144"),
        ("gpus", "-8", "cannot read '-8'"),
        ("gpus", "1e30", "out of range"),
        ("gpus", "1e999999999", "cannot read"),
        ("gpus", "eight", "give a whole number such as 8, 16M or 15T"),
        ("gpus", "2.5", "cannot read '2.5'"),
        ("price", "nan", "nan is out of range"),
        ("price", "inf", "inf is out of range"),
        ("price", "$2", "give a number such as 2.5"),
        ("model", "../../etc/passwd", "no '../../etc/passwd'; known: gpt2"),
        ("model", "os:system", "no 'os:system'"),
        ("gpu", "local", "no 'local'; known: h100-sxm"),
        ("tp", "9" * 41, "41 letters are too many"),
        ("path", "x", "no field 'path'; known: model"),
        ("b.path", "x", "no field 'b.path'"),
        ("compare", "yes", "compare is 'yes'; give 1 or 0"),
    ],
)
def test_only_numbers_in_range_and_names_from_tables_are_read(name, text, says):
    with pytest.raises(BadField) as caught:
        parse([(name, text)])
    assert says in str(caught.value)
    assert caught.value.name == name


def test_a_field_given_twice_is_refused():
    with pytest.raises(BadField, match="gpus is given twice"):
        parse([("gpus", "8"), ("gpus", "16")])


def test_a_number_is_read_exactly_as_the_command_line_reads_it():
    field = next(f for f in form() if f.name == "tokens")
    assert value(field, "15T", "tokens") == 15 * 10**12
    assert [written(n) for n in (15 * 10**12, 16_500_000, 8192, None, 2.0, 2.5)] == [
        "15T", "16.5M", "8192", "auto", "2", "2.5",
    ]  # fmt: skip


# ---- who may ask


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", "", "[::1]"])
def test_a_host_that_is_not_this_page_is_refused(page, host):
    reply = page.ask("/", host=host)
    assert reply.status == 403
    assert b"gpus" not in reply.body


def test_this_machine_s_two_names_are_answered(page):
    assert page.ask(f"/api?{SMALL}").status == 200
    assert page.ask(f"/api?{SMALL}", host=f"localhost:{page.port}").status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:1"},
        {"sec_fetch_site": "cross-site", "sec_fetch_mode": "cors"},
        {"sec_fetch_site": "same-site", "sec_fetch_mode": "no-cors"},
    ],
)
def test_another_site_is_not_answered(page, headers):
    assert page.ask("/api", **headers).status == 403


def test_a_link_from_anywhere_leads_here_and_the_page_may_ask_itself(page):
    assert page.ask(f"/?{SMALL}", sec_fetch_site="cross-site", sec_fetch_mode="navigate").status == 200
    assert page.ask(f"/part?{SMALL}", origin=page.url, sec_fetch_site="same-origin").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
def test_the_page_only_reads(page, method):
    reply = page.ask("/", method)
    assert (reply.status, reply.headers.get("allow")) == (405, "GET, HEAD")


def test_head_has_the_headers_of_get_and_no_body(page):
    head, get = page.ask(f"/?{SMALL}", "HEAD"), page.ask(f"/?{SMALL}")
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(get.body))


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd", "/static/../serve.py", "/static/%2e%2e/serve.py", "/static/%2e%2e%2fserve.py",
        "/static/..%5cserve.py", "/static//etc/passwd", "/static/%2fetc%2fpasswd", "/static/style.css%00.svg",
        "/static/%252e%252e/serve.py", "/static/", "/static/STYLE.CSS", "/etc/passwd", "/templates/page.html", "//",
    ],
)  # fmt: skip
def test_no_address_names_a_file(page, path):
    reply = page.ask(path)
    assert (reply.status, reply.text) == (404, "no such page; the page is at /\n")


def test_a_file_of_the_table_is_found_and_not_sent_again(page):
    first = page.ask("/static/style.css")
    assert (first.status, first.headers["content-type"].split(";")[0]) == (200, "text/css")
    again = page.ask("/static/style.css", if_none_match=first.headers["etag"])
    assert (again.status, again.body) == (304, b"")


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/", "GET", 200), ("/?gpus=0", "GET", 422), ("/none", "GET", 404), ("/", "POST", 405), ("/api?x=1", "GET", 422)],
)
def test_every_reply_carries_the_headers_that_keep_a_page_to_itself(page, path, method, status):
    reply = page.ask(path if path != "/" else f"/?{SMALL}", method)
    assert reply.status == status
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
    assert policy["style-src"] == policy["script-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in reply.headers["content-security-policy"]
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert reply.headers["referrer-policy"] == "no-referrer"
    assert "server" not in reply.headers
    assert "access-control-allow-origin" not in reply.headers


def test_a_long_address_is_refused(page):
    assert page.ask("/?" + "x" * 4097).status == 414
    assert page.ask("/?" + "&".join(f"gpus={n}" for n in range(100))).status == 422
    assert page.ask("/?gpus=%ff").status == 422


# ---- what comes back


class Elements(HTMLParser):
    """Every element of a page, with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_nothing_stands_inline_that_the_policy_would_refuse(page):
    text = page.ask(f"/?{SMALL}&compare=1&b.gpus=4").text
    for tag, attributes in Elements(text).found:
        assert tag not in ("style", "iframe", "object", "embed", "base")
        assert tag != "script" or set(attributes) == {"src", "defer"}
        assert not [name for name in attributes if name == "style" or name.startswith("on")]
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("path", ["/", "/part"])
def test_markup_that_someone_sends_comes_back_as_text(page, path, text):
    plain = page.ask(f"{path}?model=x")
    for reply in (page.ask(f"{path}?model={quote(text)}"), page.ask(f"{path}?{urlencode({text: '1'})}")):
        assert reply.status == 422
        tags = [tag for tag, _ in Elements(reply.text).found if tag != "option"]
        assert tags == [tag for tag, _ in Elements(plain.text).found if tag != "option"]
        assert not set("\x1b\u202e") & set(reply.text)
        assert "<script>alert" not in reply.text


def test_a_refusal_says_why_keeps_what_was_typed_and_is_json_to_a_program(page):
    reply = page.ask("/?gpus=0&seq=4096")
    assert reply.status == 422
    inputs = {a["name"]: a for tag, a in Elements(reply.text).found if tag == "input" and "name" in a}
    assert (inputs["gpus"]["value"], inputs["gpus"]["aria-invalid"], inputs["seq"]["value"]) == ("0", "true", "4096")
    assert "0 is out of range; give 1 to 262144" in reply.text
    assert page.ask("/api?gpus=0").json == {
        "schema_version": 1, "error": "How many: 0 is out of range; give 1 to 262144", "field": "gpus",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("model=gpt2&seq=8192", "gpt2 has 1024 positions and a sequence of 8192 needs more"),
        ("gpus=4&tp=8", "tp=8 needs a multiple of 8 accelerators, and there are 4"),
        ("gpu=a100-80g-sxm&precision=fp8", "a100-80g-sxm has no known peak in fp8"),
        ("batch=512", "less than one sequence of 8192"),
        ("tp=3&gpus=3072", "tp does not divide the heads"),
    ],
)
def test_a_question_without_an_answer_says_what_is_wrong(page, address, says):
    assert says in page.ask(f"/api?{address}").json["error"]
    assert page.ask(f"/?{address}").status == 422


def test_the_page_and_what_it_asks_for_are_small(page):
    whole = page.ask("/")
    named = re.findall(r'(?:src|href)="(/static/[^"]+)"', whole.text)
    files = [page.ask(path) for path in named]
    assert {f.status for f in files} == {200}
    assert 1 + len(files) <= 6
    assert len(whole.body) + sum(len(f.body) for f in files) < 150_000
    assert len(page.ask("/?compare=1&b.gpu=b200").body) < 150_000


def test_the_page_s_process_is_light_and_needs_no_torch(page):
    page.ask("/")
    held = Path(f"/proc/{page.process.pid}/status").read_text()
    assert int(re.search(r"VmHWM:\s+(\d+) kB", held)[1]) * 1024 < 120e6
    loaded = Path(f"/proc/{page.process.pid}/maps").read_text()
    assert "numpy" in loaded
    assert "libtorch" not in loaded


# ---- the numbers


def test_the_parts_add_up_to_the_whole(small):
    assert sum(p.value for p in small.memory) == pytest.approx(small.figures["memory"].value)
    assert sum(p.value for p in small.time) == pytest.approx(small.figures["step"].value)
    assert sum(p.share for p in small.memory) == pytest.approx(1)
    assert small.searched - sum(small.rejected.values()) == small.feasible


def test_the_run_is_its_steps_and_the_cost_is_its_hours():
    priced = answer(replace(SETUP, price=2.0))
    figure = {key: f.value for key, f in priced.figures.items()}
    steps = -(-10 * 10**9 // 524_288)
    assert figure["time"] == pytest.approx(steps * figure["step"])
    assert figure["hours"] == pytest.approx(8 * figure["time"] / 3600)
    assert figure["usd"] == pytest.approx(2 * figure["hours"])
    assert figure["rate"] == pytest.approx(524_288 / figure["step"] / 8)


def test_an_interval_is_around_its_figure(small):
    for f in small.figures.values():
        assert f.low <= f.value <= f.high, f.key


def test_every_figure_can_be_asked_why(small):
    for f in small.figures.values():
        assert f.formula, f.key
        assert f.inputs, f.key
        assert all(i.name and i.value for i in f.inputs)
    nameless = answer(replace(SETUP, gpu="trainium1"))
    assert nameless.figures["usd"].value is None
    assert nameless.figures["usd"].missing == "the catalogue has no price for trainium1; give yours"


def test_the_usual_layouts_are_some_of_every_layout_at_the_same_price():
    question, where = asked(SETUP)
    few, space = usual(question, where, 50), enumerate_layouts(question, where.count)
    every = set(zip(*(space.columns[a].tolist() for a in AXES), strict=True))
    assert len(few.plan.layouts) > 10
    for choice in few.plan.layouts:
        job = choice.job
        assert (*(getattr(job.layout, a) for a in AXES[:10]), job.micro_batch, job.micro_batches) in every
        same = priced(question, job, where)
        assert choice.step_seconds == pytest.approx(same.step_seconds, rel=1e-9)
        assert choice.device_bytes == pytest.approx(same.device_bytes, rel=1e-9)
        assert (choice.usd, choice.steps) == (pytest.approx(same.usd), same.steps)
    assert len(every) > 1000
    assert narrowed(question, where).fixed["tp"] == (1, 2, 4, 8)


def test_searching_every_layout_finds_none_worse_in_a_process_of_its_own(small):
    every = answer(replace(SETUP, search="every"))
    assert every.searched > small.searched
    assert every.figures["time"].value <= small.figures["time"].value
    assert every == found(replace(SETUP, search="every"))


def test_a_row_s_link_leads_to_its_own_figures(small):
    row = small.rows[1]
    taken = answer(row.setup)
    assert taken.figures["step"].value == pytest.approx(row.figures["step"].value)
    assert taken.layout == row.words
    assert parse(parse_qsl(query(State(row.setup)))).first == row.setup


def test_where_nothing_fits_the_nearest_is_shown_with_what_it_lacks():
    big = answer(Setup(gpus=8))
    assert (big.fits, big.rows, big.feasible) == ("no", (), 0)
    held, usable = big.figures["memory"].value, big.usable_bytes
    assert held > usable
    assert f"{(held - usable) / 1e9:.1f} GB too much" in big.verdict
    assert "Does not fit" in changing(State(Setup(gpus=8)), big, None)


def test_the_page_shows_the_same_as_the_json(page):
    json, text = page.ask(f"/api?{SMALL}").json, page.ask(f"/?{SMALL}").text
    assert f"{json['figures']['mfu']['value'] * 100:.1f} %" in text
    assert json["verdict"] in text
    assert f"{json['searched']:,}" in text
    assert json["address"] in page.ask(f"/part?{SMALL}").headers["hx-replace-url"]


def test_two_set_ups_stand_side_by_side(page):
    reply = page.ask(f"/api?{SMALL}&compare=1&b.gpus=4").json
    assert reply["second"]["address"] == "/?" + query(State(replace(SETUP, gpus=4)))
    text = page.ask(f"/?{SMALL}&compare=1&b.gpus=4").text
    first, second = reply["figures"]["time"]["value"], reply["second"]["figures"]["time"]["value"]
    assert f"{second / first:.3g} ×" in text
    assert text.count('<section class="set"') == 2


def test_levers_are_asked_for_apart_as_a_part_and_as_a_page(page):
    part, alone = page.ask(f"/levers?{SMALL}", hx_request="true"), page.ask(f"/levers?{SMALL}")
    assert (part.status, alone.status) == (200, 200)
    assert part.text.startswith("<div")
    assert alone.text.startswith("<!DOCTYPE html>")
    assert "8bit-states" in part.text
    assert part.text in alone.text


def test_a_bar_is_to_one_scale_and_escapes_its_words():
    drawn = bar([("a", 30, "<a>"), ("b", 10, "b")], "t", capacity=80, interval=(20, 100))
    assert 'class="a" x="0.00%" y="0" width="30.00%"' in drawn
    assert 'class="b" x="30.00%" y="0" width="10.00%"' in drawn
    assert 'class="capacity" x1="80.00%"' in drawn
    assert 'class="whisker" x1="20.00%" x2="100.00%"' in drawn
    assert "&lt;a&gt;" in drawn
    assert "<a>" not in drawn


# ---- not one for the other


def held_up(small, slow_setups, threads_free):
    """Whether a quick question is answered while ``slow_setups`` are being worked on, which end when it was."""
    gate = threading.Event()

    def work(setup):
        if setup in slow_setups:
            assert gate.wait(30)
        return small

    async def run():
        desk = server.Desk(work)
        slow = [asyncio.ensure_future(desk.ask(State(s))) for s in slow_setups]
        await asyncio.sleep(0)
        try:
            await asyncio.wait_for(desk.ask(State(SETUP)), 30 if threads_free else 0.2)
            return False
        except TimeoutError:
            return True
        finally:
            gate.set()
            await asyncio.gather(*slow)
            desk.close()

    return asyncio.run(run())


def test_a_slow_question_does_not_hold_up_the_others(small):
    assert not held_up(small, [replace(SETUP, gpus=1)], True)
    assert not held_up(small, [replace(SETUP, gpus=n, search="every") for n in (1, 2, 4, 8, 16)], True)


def test_that_check_would_see_one_that_is_held_up(small):
    assert held_up(small, [replace(SETUP, gpus=n) for n in range(1, server.THREADS + 1)], False)


def test_a_question_is_worked_out_once_and_who_waits_too_long_is_told(small):
    calls, gate = [], threading.Event()

    def work(setup):
        calls.append(setup)
        gate.wait(30)
        return small

    async def run():
        desk = server.Desk(work, seconds=0.05)
        for _ in range(3):
            with pytest.raises(server.Busy, match="ask again"):
                await desk.ask(State(SETUP))
        gate.set()
        desk.seconds = 30
        assert (await desk.ask(State(SETUP, SETUP)))[1] == small
        desk.close()

    asyncio.run(run())
    assert calls == [SETUP]


def test_too_many_questions_at_once_are_put_off(small, monkeypatch):
    monkeypatch.setattr(server, "WAITING", 2)
    gate = threading.Event()

    async def run():
        desk = server.Desk(lambda setup: gate.wait(30) and small)
        waiting = [asyncio.ensure_future(desk.ask(State(replace(SETUP, gpus=n)))) for n in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(server.Busy, match="too many"):
            await desk.ask(State(replace(SETUP, gpus=3)))
        gate.set()
        await asyncio.gather(*waiting)
        desk.close()

    asyncio.run(run())


def test_an_error_is_not_remembered():
    fails = [True]

    def work(setup):
        if fails.pop():
            raise BadInput("once")
        return "well"

    async def run():
        desk = server.Desk(work)
        with pytest.raises(BadInput, match="once"):
            await desk.ask(State(SETUP))
        fails.append(False)
        assert (await desk.ask(State(SETUP)))[0] == "well"
        desk.close()

    asyncio.run(run())


# ---- the command


def test_a_port_that_is_taken_is_refused_and_nothing_else_is_done(capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, out, err = ask(capsys, "ui", "--port", str(port))
    assert (code, out) == (2, "")
    assert (
        err == f"bursar: port {port} is taken, perhaps by another bursar ui; give another with --port, or 0 for any\n"
    )


@pytest.mark.parametrize("port", ["70000", "-1"])
def test_a_port_that_cannot_be_is_refused(capsys, port):
    code, _, err = ask(capsys, "ui", "--port", port)
    assert code == 2
    assert f"no port {port}; give one from 1 to 65535" in err


def test_it_listens_to_this_machine_only():
    with listen(0) as sock:
        assert sock.getsockname()[0] == "127.0.0.1"


def test_without_its_extra_it_says_how_to_get_it(capsys, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else find(name, *a))
    code, _, err = ask(capsys, "ui", "--port", "0")
    assert code == 3
    assert "pip install 'bursar[web]'" in err


def test_ctrl_c_ends_it_cleanly():
    with served() as running:
        running.ask(f"/?{SMALL}")
        running.process.send_signal(signal.SIGINT)
        out, err = running.process.communicate(timeout=30)
        assert (running.process.returncode, out, err) == (0, "", "Ctrl-C ends it\n")


def test_the_page_s_modules_load_neither_torch_nor_polars():
    script = (
        "import sys, bursar.web.server, bursar.web.apart; assert not {'torch', 'polars', 'rich'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_a_page_is_titled_by_its_set_up(small):
    text = whole(State(SETUP), small, None)
    assert "<title>gpt2 on 8 × NVIDIA H100 SXM5 80GB · bursar</title>" in text
    assert len(re.findall(r"<h1", text)) == 1


def test_every_part_of_memory_and_time_has_its_words_and_its_colour(small):
    style = server.static()["style.css"].body.decode()
    moe = answer(replace(SETUP, model="mixtral-8x7b", gpus=64, seq=4096, batch=4_000_000, recompute="none"))
    for answered in (small, moe):
        assert {p.name for p in answered.memory} <= set(MEMORY)
        assert {p.name for p in answered.time} <= set(TIME)
    assert set(PARTS) <= set(TIME)
    for name in (*(f"m-{part}" for part in MEMORY), *(f"t-{part}" for part in TIME)):
        assert re.search(rf"\.{name}\b", style), name


def test_a_reply_does_not_wait_for_the_acknowledgement_of_its_head():
    with listen(0) as sock:
        assert sock.proto == socket.IPPROTO_TCP  # asyncio turns Nagle's algorithm off for such sockets alone
