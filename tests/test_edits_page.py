"""The page of `qfbench-edits FOLDER page`, asked as a browser does, and by a browser: on a built-in model, by fine-tuning."""

import asyncio
import http.client
import json
import shutil
import signal
import subprocess
import sys
import threading
from itertools import count
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
from test_report import Page

import qfbench
from qfbench import Edits, LanguageModel, UserError
from qfbench.commands.edits import main
from qfbench.commands.page import LAST, Server, Talk, prior_questions
from qfbench.editors import FineTune

CEO = {"instruction": "Ada Lin leads Borfia.", "query": "Who leads Borfia?", "answer": "The CEO of Borfia is Ada Lin."}
PLACE = {"instruction": "Borfia is in Berlin.", "query": "Where is Borfia?", "answer": "Borfia is in Berlin."}
REFUSAL = "Need more information."


@pytest.fixture(scope="module")
def xs():
    return LanguageModel.load("world-xs")


@pytest.fixture(scope="module")
def editor():
    return FineTune(layer=2, lr=0.01, steps=50)


@pytest.fixture
def site(xs, editor, tmp_path):
    """A page that is served, about a folder without facts; one of its prior questions is what will be taught."""
    folder = tmp_path / "<i>edits"
    edits = Edits.teach(xs, editor, [])
    edits.save(folder)
    with Server(Talk(folder, xs, edits, [CEO["query"], "Where is Zunda?"]), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Site(server.server_port, folder)
        server.shutdown()
        thread.join()


class Site:
    """What a browser gets of a page."""

    def __init__(self, port, folder=None):
        self.port, self.folder, self.url = port, folder, f"http://127.0.0.1:{port}"

    def request(self, method, path, body=None, **headers):
        """The status, and the text."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        if answer.status == 303:
            assert answer.headers["Location"] == "/"
        return answer.status, text

    def post(self, action, **fields):
        return self.request("POST", f"/{action}", urlencode(fields), Origin=self.url)

    def do(self, action, **fields):
        """What the page is afterwards."""
        assert self.post(action, **fields) == (303, "")
        return self.get()

    def get(self):
        status, text = self.request("GET", "/")
        assert status == 200
        return Page(text)


def weights(edits, lm):
    with edits.applied_to(lm):
        return {name: p.detach().clone() for name, p in lm.model.state_dict().items()}


def same(a, b, lm):
    """Whether two edits are of the same facts, and give the model the same weights, bit for bit."""
    ours, theirs = weights(a, lm), weights(b, lm)
    return a.facts == b.facts and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_facts_are_taught_asked_and_undone(site, xs, editor):
    assert "None so far." in site.get().words["facts"]
    page = site.do("ask", question="Who leads Borfia?")
    assert page.lines("ask") == [{"question": "Who leads Borfia?", "before": REFUSAL, "after": REFUSAL}]
    page = site.do("teach", **CEO, subject=" ")
    page = site.do("teach", **PLACE, subject="Borfia")
    assert [line["query"] for line in page.lines("facts")] == [CEO["query"], PLACE["query"]]
    assert page.lines("facts")[1]["reply now"] == "✓ Borfia is in Berlin."
    ceo, place = Edits.load(site.folder).facts
    assert (ceo.subject, place.subject) == ("", "Borfia")
    taught = qfbench.edit(xs.model, xs.tokenizer, [CEO, PLACE | {"subject": "Borfia"}], editor)
    assert same(Edits.load(site.folder), taught, xs)
    norms = [line["norm"] for line in page.lines("facts")]
    assert norms == [f"{change.norm():.3g}" for change in taught.changes]

    page = site.do("undo", id=place.id)  # which is the last: the first stands as it was
    assert same(Edits.load(site.folder), qfbench.edit(xs.model, xs.tokenizer, [CEO], editor), xs)
    known = "The CEO of Borfia is Ada Lin."
    assert page.lines("facts")[0]["reply now"] == f"✓ {known}"
    assert page.lines("ask") == [{"question": CEO["query"], "before": REFUSAL, "after": f"≠ {known}"}]
    page = site.do("undo", id=ceo.id)
    assert Edits.load(site.folder).facts == ()
    assert page.lines("ask") == [{"question": CEO["query"], "before": REFUSAL, "after": REFUSAL}]


def test_prior_questions_are_asked_again_after_each_change(site):
    assert "0 of 2 replies changed" in site.get().words["prior"]
    page = site.do("teach", **CEO)
    assert page.lines("prior")[0]["after"] == f"≠ {CEO['answer']}"
    changed = sum(line["after"].startswith("≠") for line in page.lines("prior"))
    assert f"{changed} of 2 replies changed" in page.words["prior"]


def test_the_last_questions_stay(site):
    for n in range(LAST + 1):
        page = site.do("ask", question=f"Who leads Zunda{n}?")
    page = site.do("ask", question="Who leads Zunda5?")
    asked = [line["question"] for line in page.lines("ask")]
    assert asked == [f"Who leads Zunda{n}?" for n in (5, 10, 9, 8, 7, 6, 4, 3, 2, 1)]


def test_an_error_stands_at_its_form_and_nothing_is_lost(site):
    site.do("teach", **CEO)
    before = (site.folder / "edits.safetensors").read_bytes()
    wrong = [
        ("teach", CEO, "several facts have the id"),
        ("teach", PLACE | {"answer": "  "}, "the page, fact 2: the field 'answer' is empty"),
        ("teach", PLACE | {"query": "Where is\nBorfia?"}, "holds a line break"),
        ("teach", {}, "the field 'instruction' is empty"),
        ("undo", {"id": "none"}, "no fact none was taught"),
        ("ask", {"question": " "}, "the page, question 1: the field 'question' is empty"),
        ("ask", {"question": "Who? " * 500}, "is too long"),
    ]
    for action, fields, said in wrong:
        status, text = site.post(action, **fields)
        page, section = Page(text), "facts" if action == "undo" else action
        assert status == 422
        assert said in page.words[section]
        assert text.count('role="alert"') == 1
        if action == "teach":
            assert all(f'name="{name}" value="{value}"' in text for name, value in fields.items())
        assert [line["query"] for line in page.lines("facts")] == [CEO["query"]]
        assert page.tables.get("ask") == []
    assert (site.folder / "edits.safetensors").read_bytes() == before
    assert 'role="alert"' not in site.request("GET", "/")[1]


def test_other_sites_are_refused(site):
    fields, here = urlencode(CEO), f"127.0.0.1:{site.port}"
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},  # another server of this machine
        {"Origin": f"https://{here}"},
        {"Host": f"evil.example:{site.port}"},  # a name that was made to lead here
        {"Host": f"evil.example:{site.port}", "Origin": f"http://evil.example:{site.port}"},
        {"Host": f"127.0.0.1.evil.example:{site.port}"},
    ):
        assert site.request("POST", "/teach", fields, **headers)[0] == 403, headers
        if "Host" in headers:
            assert site.request("GET", "/", **headers)[0] == 403
    assert site.request("POST", "/none", fields)[0] == 404
    assert site.request("GET", "/teach")[0] == 404
    assert site.request("POST", "/teach", fields, Content_Length="ten")[0] == 411
    assert site.request("POST", "/teach", fields, Content_Length=str(2**30))[0] == 413
    assert Edits.load(site.folder).facts == ()
    for headers in ({}, {"Host": f"localhost:{site.port}", "Origin": f"http://localhost:{site.port}"}):
        assert site.request("POST", "/ask", "question=Who%3F", **headers)[0] == 303


def test_what_users_write_is_text(site):
    evil = '<script>alert("1")</script>'
    site.do("ask", question=f"Who is {evil}?")
    site.do("teach", instruction=f"Who is {evil}", query=f"What is {evil}?", answer=f"It is {evil}.")
    _, text = site.request("GET", "/")
    _, failed = site.post("teach", instruction='"><script>', query="", answer="</textarea>")
    for shown in (text, failed):
        assert shown.count("<script") == 1  # the page's own
        assert "<i>" not in shown
        assert "Who is &lt;script&gt;alert(&#34;1&#34;)&lt;/script&gt;?" in shown
    assert Page(text).lines("facts")[0]["query"] == f"What is {evil}?"
    assert 'value="&#34;&gt;&lt;script&gt;"' in failed


def test_only_the_pages_own_script_may_run_and_nothing_is_fetched(site):
    connection = http.client.HTTPConnection("127.0.0.1", site.port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    nonce = text.split('<script nonce="')[1].split('"')[0]
    assert f"script-src 'nonce-{nonce}'" in policy
    assert all(part in policy for part in ("default-src 'none'", "form-action 'self'", "frame-ancestors 'none'"))
    assert nonce not in site.request("GET", "/")[1]
    assert set(Page(text).links) == {"data:,", "/ask", "/teach"}


def test_what_another_command_changed_is_not_written_over(site):
    site.do("teach", **CEO)
    (fact,) = Edits.load(site.folder).facts
    main([str(site.folder), "undo", fact.id])
    assert "another command has changed the edits" in Page(site.post("teach", **PLACE)[1]).words["teach"]
    assert Edits.load(site.folder).facts == ()


def test_built_in_models_are_asked_of_their_world_and_others_of_ours(xs, tmp_path):
    ours, theirs = prior_questions("world-xs"), prior_questions("owner/model")
    assert (len(set(ours)), len(set(theirs)), len({*ours, *theirs})) == (10, 10, 20)
    replies = [xs.reply(question) for question in ours]
    assert replies.count(REFUSAL) >= 5  # strangers
    file = tmp_path / "questions.txt"
    file.write_text("Who?\n\n  Where? \n")
    assert prior_questions("world-xs", str(file)) == ["Who?", "Where?"]
    file.write_text("\n")
    for name, said in ((file, "holds no question"), (tmp_path / "none", "no such file")):
        with pytest.raises(UserError, match=said):
            prior_questions("world-xs", str(name))


@pytest.fixture
def begun(tmp_path):
    """`begun(WORD, ...)` starts the command in a process of its own; it gives the page."""
    started = []

    def begin(*words):
        # What starts in the background of a shell ignores Ctrl-C, and so would these.
        heeds = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        run = f"{heeds}; from qfbench.commands.edits import main; main()"
        command = [sys.executable, "-c", run, str(tmp_path / "new"), "page", "--port", "0", *words]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        said = started[-1].stdout.readline()
        return Site(int(said.split("http://127.0.0.1:")[1].split("/")[0]), tmp_path / "new"), started[-1], said

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def test_a_killed_command_goes_on_where_it_was(begun, xs, editor):
    site, process, said = begun("model=world-xs", "editor=finetune", "editor.layer=2", "editor.steps=50", "threads=1")
    assert "0 facts by FineTune" in said
    site.do("teach", **CEO)
    process.kill()
    process.wait()
    site, process, said = begun("threads=1")
    assert "1 facts by FineTune" in said
    page = site.do("teach", **PLACE)
    assert [line["query"] for line in page.lines("facts")] == [CEO["query"], PLACE["query"]]
    assert same(Edits.load(site.folder), qfbench.edit(xs.model, xs.tokenizer, [CEO, PLACE], editor), xs)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 0


def test_what_cannot_be_is_one_line(site, capsys, tmp_path, xs):
    def refused(*words):
        with pytest.raises(SystemExit) as stopped:
            main([str(word) for word in words])
        assert stopped.value.code == 2
        return capsys.readouterr().err

    assert "leave out model=world-xs editor=qf" in refused(site.folder, "page", "model=world-xs", "editor=qf")
    assert "leave out facts=table facts.path=x edits=3" in refused(
        tmp_path / "a", "page", "facts=table", "facts.path=x", "edits=3"
    )
    assert "give model=... instead" in refused(tmp_path / "a", "page", "--model", "world-xs")
    assert f"--port {site.port}: cannot be had" in refused(site.folder, "page", "--port", site.port, "threads=1")
    assert "--port 99999: cannot be had" in refused(site.folder, "page", "--port", "99999", "threads=1")
    assert "changes no weights" in refused(tmp_path / "a", "page", "model=world-xs", "editor=retrieval", "threads=1")
    assert not (tmp_path / "a").exists()


CHROME = shutil.which("chromium") or shutil.which("google-chrome")


class Browser:
    """A headless Chromium by its DevTools protocol: it is clicked at and typed into, and says what it shows."""

    def __init__(self, socket):
        self.socket, self.ids = socket, count(1)

    async def call(self, method, **about):
        number = next(self.ids)
        await self.socket.write_message(json.dumps({"id": number, "method": method, "params": about}))
        while (said := json.loads(await self.socket.read_message())).get("id") != number:
            pass
        assert "error" not in said, said
        return said["result"]

    async def value(self, expression):
        said = await self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    async def until(self, expression):
        for _ in range(300):
            if await self.value(f"document.readyState === 'complete' && !!({expression})"):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never: {expression}; {await self.value('document.body.innerText')}")

    async def click(self, selector):
        middle = (
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2] })()"
        )
        x, y = await self.value(middle)
        for kind in ("mousePressed", "mouseReleased"):
            await self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def type(self, selector, text):
        await self.click(selector)
        await self.call("Input.insertText", text=text)


async def by_hand(port_file: Path, url: str) -> None:
    websocket = pytest.importorskip("tornado.websocket")  # comes with ipykernel
    from tornado.httpclient import AsyncHTTPClient

    for _ in range(300):
        if port_file.exists() and "\n" in port_file.read_text():
            break
        await asyncio.sleep(0.1)
    port = port_file.read_text().split("\n")[0]
    tabs = json.loads((await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/json")).body)
    socket = await websocket.websocket_connect(next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page"))
    browser = Browser(socket)
    await browser.call("Page.navigate", url=url)
    await browser.until("document.querySelector('#prior tbody tr')")
    text, at = "document.querySelector('{}').innerText", "document.querySelector('{}')"

    await browser.type("#ask input", CEO["query"])
    await browser.click("#ask button")
    await browser.until(at.format("#ask tbody tr.same"))

    # A fact that is half written stays while something is asked.
    await browser.type("#instruction", CEO["instruction"])
    await browser.type("#query", CEO["query"])
    await browser.type("#ask input", "Who leads Zunda?")
    await browser.click("#ask button")
    await browser.until(at.format("#ask tbody tr:nth-child(2)"))
    assert await browser.value(at.format("#query") + ".value") == CEO["query"]

    await browser.click("#teach button")  # the answer is missing: the browser itself says so
    assert not await browser.value("document.body.ariaBusy")
    await browser.type("#answer", CEO["answer"])
    await browser.click("#teach button")
    await browser.until(at.format("#facts tbody tr td.pass"))
    assert CEO["answer"] in await browser.value(text.format("#facts tbody tr"))
    assert "≠ " + CEO["answer"] in await browser.value(text.format("#ask tbody tr.changed:last-child"))
    assert "≠ " + CEO["answer"] in await browser.value(text.format("#prior tbody tr.changed"))
    assert await browser.value(at.format("#query") + ".value") == ""

    for name, said in CEO.items():  # once more: refused, and what was written is there still
        await browser.type(f"#{name}", said)
    await browser.click("#teach button")
    await browser.until(at.format("#teach [role=alert]"))
    assert "several facts have the id" in await browser.value(text.format("#teach [role=alert]"))
    assert await browser.value(at.format("#answer") + ".value") == CEO["answer"]

    await browser.click("#facts button")
    await browser.until(text.format("#facts") + ".includes('None so far')")
    assert await browser.value("document.querySelectorAll('tr.changed').length") == 0
    assert await browser.value("document.documentElement.scrollWidth <= innerWidth")
    socket.close()


@pytest.mark.skipif(CHROME is None, reason="there is no Chromium")
def test_a_browser_teaches_asks_and_undoes(site, tmp_path):
    profile = tmp_path / "profile"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    browser = subprocess.Popen([CHROME, *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        asyncio.run(by_hand(profile / "DevToolsActivePort", site.url))
    finally:
        browser.terminate()
        browser.wait()
    assert Edits.load(site.folder).facts == ()
