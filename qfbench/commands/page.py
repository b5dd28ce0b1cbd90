"""Edits by hand: a page of this machine's own on which facts are taught, undone and asked about (`qfbench-edits FOLDER page`)."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import parse_qsl

from qfbench.editors.edits import FILE, Edits
from qfbench.errors import UserError
from qfbench.facts.everyday import everyday
from qfbench.facts.records import Record, existing, read_text
from qfbench.facts.table import facts_of
from qfbench.facts.world import world
from qfbench.models.lm import LanguageModel, Reply
from qfbench.models.loading import BUILT_IN, find
from qfbench.pages.html import filled

FIELDS = ("instruction", "query", "answer", "subject")  # of a fact, on the page
LAST = 10  # questions that stay on the page
MOST = 2**20  # bytes of a request


def prior_questions(model: str, file: str | None = None) -> list[str]:
    """What edits should leave as it is: the lines of a file, or ten questions. Built-in models are asked what they know and about
    subjects that they do not know, others common knowledge.

    Raises:
        UserError: the file cannot be read, or has no questions.
    """
    if file is not None:
        text = read_text(file, existing(file, "give a file with one question a line", "--prior"), "--prior")
        questions = [line.strip() for line in text.splitlines() if line.strip()]
        if not questions:
            raise UserError(f"--prior={file}: holds no question; give one a line")
        return questions
    if Path(find(model)).parent == BUILT_IN:
        facts = world(5, paraphrases=0, prior=1, unknown=1)
    else:
        facts = everyday(10, paraphrases=0, prior=1, unknown=0, locality=0)
    return [probe.query for fact in facts for probe in fact.probes if probe.always]


class Talk:
    """Edits in a folder, the model that they are of, and what is asked: each question before the edits and after them.

    What fails (`UserError`, `FloatingPointError`) leaves edits, replies and folder as they were.
    """

    def __init__(self, folder: str | Path, lm: LanguageModel, edits: Edits, prior: Sequence[str]) -> None:
        """`edits` are those that the folder holds, and of `lm`."""
        self.folder, self.lm, self.edits, self.prior = Path(folder), lm, edits, tuple(dict.fromkeys(prior))
        self.asked: list[str] = []  # the last first
        self.before: dict[str, Reply] = {}
        self.saved = self._time()
        self.after = self._replies(edits)

    def teach(self, fields: Mapping[str, str]) -> None:
        """One more fact, of the fields `FIELDS`."""
        said = {name: fields.get(name, "") for name in FIELDS}
        said = {name: text for name, text in said.items() if text.strip() or name != "subject"}
        self._become(self.edits.more(self.lm, facts_of(self._record(said, len(self.edits.facts) + 1, "fact"))))

    def undo(self, fields: Mapping[str, str]) -> None:
        """As if the fact with this `id` had never been taught."""
        self._become(self.edits.without(self.lm, [fields.get("id", "")]))

    def ask(self, fields: Mapping[str, str]) -> None:
        """A `question`, which is asked again after each change as long as it is among the last ones."""
        said = self._record({"question": fields.get("question", "")}, len(self.asked) + 1, "question")
        question = said.text("question")
        self.after |= self._replies(self.edits, [question])
        self.asked = [question, *(other for other in self.asked if other != question)][:LAST]

    def page(self, place: str = "", error: str = "", typed: Mapping[str, str] | None = None, nonce: str = "") -> str:
        """The page; at the form of the action `place` the `error` that it met, and what was `typed` there."""
        lines = [
            {"fact": fact, "norm": change.norm(), "reply": reply, "right": fact.edit.passes(reply.text)}
            for fact, change in zip(self.edits.facts, self.edits.changes, strict=True)
            for reply in [self.after[fact.query]]
        ]
        return filled(
            "edits.html.j2",
            folder=str(self.folder),
            model=self.lm.name,
            editor=self.edits.editor,
            lines=lines,
            asked=[self._both(question) for question in self.asked],
            prior=[self._both(question) for question in self.prior],
            place=place,
            error=error,
            typed=dict.fromkeys((*FIELDS, "question"), "") | dict(typed or {}),
            nonce=nonce,
        )

    def _become(self, edits: Edits) -> None:
        after = self._replies(edits)
        if self._time() != self.saved:
            raise UserError(f"{self.folder}: another command has changed the edits there; start the page again")
        edits.save(self.folder)
        self.edits, self.after, self.saved = edits, after, self._time()

    def _replies(self, edits: Edits, queries: Iterable[str] = ()) -> dict[str, Reply]:
        """What the model with these edits replies to queries, by default to all that the page shows. `before` is filled up."""
        queries = list(dict.fromkeys(queries or [*(fact.query for fact in edits.facts), *self.prior, *self.asked]))
        self.before |= self._said([query for query in queries if query not in self.before])
        # `edits.applied_to` would hash all weights again, which takes longer than a reply; nothing else changes this model.
        with edits.total.applied_to(self.lm):
            return self._said(queries)

    def _said(self, queries: Sequence[str]) -> dict[str, Reply]:
        return dict(zip(queries, self.lm.replies([self.lm.render(query) for query in queries]), strict=True))

    def _both(self, question: str) -> dict[str, Any]:
        before, after = self.before[question], self.after[question]
        return {"question": question, "before": before, "after": after, "changed": before.text != after.text}

    def _record(self, values: Mapping[str, str], number: int, unit: str) -> Record:
        return Record(values, "the page", number, unit=unit)

    def _time(self) -> int | None:
        """When the folder was written."""
        file = self.folder / FILE
        return file.stat().st_mtime_ns if file.exists() else None


class Server(ThreadingHTTPServer):
    """Serves a `Talk` to this machine alone, one request at a time.

    Connections have threads of their own, since browsers open some that say nothing.
    """

    daemon_threads = True

    def __init__(self, talk: Talk, port: int) -> None:
        """Port 0 is any that is free.

        Raises:
            UserError: the port cannot be had.
        """
        self.talk, self.one_at_a_time = talk, Lock()
        try:
            super().__init__(("127.0.0.1", port), Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot be had ({error}); give another, or 0 for any") from error

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):  # a browser that has gone is none
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """GET / is the page; POST /teach, /undo and /ask lead back to it, or show it with the error."""

    server: Server
    timeout = 60

    def do_GET(self) -> None:
        if not self._local():
            self.send_error(403, "Not from here")
        elif self.path != "/":
            self.send_error(404)
        else:
            self._show(200)

    def do_POST(self) -> None:
        talk, place = self.server.talk, self.path.removeprefix("/")
        action = {"teach": talk.teach, "undo": talk.undo, "ask": talk.ask}.get(place)
        length = self.headers.get("Content-Length", "")
        if not self._local():
            self.send_error(403, "Not from here")
        elif action is None:
            self.send_error(404)
        elif not length.isdecimal():
            self.send_error(411)
        elif int(length) > MOST:
            self.send_error(413)
        else:
            fields = dict(parse_qsl(self.rfile.read(int(length)).decode(errors="replace"), keep_blank_values=True))
            try:
                with self.server.one_at_a_time:
                    action(fields)
            except (UserError, FloatingPointError) as error:
                self._show(422, place, str(error), fields)
            else:
                self.send_response(303)
                self.send_header("Location", "/")
                self.send_header("Content-Length", "0")
                self.end_headers()

    def _local(self) -> bool:
        """Whether the page itself asks: no other site that posts here, and none whose name was made to lead here (DNS rebinding).

        Any port will do, since a tunnel may have another.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        return host.partition(":")[0] in ("127.0.0.1", "localhost") and origin in (None, f"http://{host}")

    def _show(self, status: int, place: str = "", error: str = "", typed: Mapping[str, str] | None = None) -> None:
        nonce = secrets.token_urlsafe()
        with self.server.one_at_a_time:
            body = self.server.talk.page(place, error, typed, nonce).encode()
        own = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; form-action 'self'"
        self.send_response(status)
        for name, value in (
            ("Content-Type", "text/html; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Content-Security-Policy", f"{own}; base-uri 'none'; frame-ancestors 'none'"),
            ("X-Content-Type-Options", "nosniff"),
            ("Cache-Control", "no-store"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the terminal has the address alone."""
