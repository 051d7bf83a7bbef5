#!/usr/bin/env python3
"""Tests of ticket_service.py, from outside: over real sockets, against a stand-in Mattermost.

    python3 -m unittest

or try the service in a browser, with this stand-in instead of a Mattermost:

    python3 test_ticket_service.py --demo

The stand-in answers as Mattermost 9.4 to 11.6 do, and is stricter: it complains of what Mattermost
would let pass. A test makes it fail with script(); after each test, nothing that must not be logged
may be in the log.
"""

import argparse
import ast
import base64
import collections
import contextlib
import datetime
import gc
import http.client
import http.server
import io
import itertools
import json
import logging
import os
import random
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
import urllib.parse
from pathlib import Path

import ticket_service

HERE = Path(__file__).resolve().parent
BOT_TOKEN = "b" * 26
CALLBACK_URL = "http://tickets.example.com:8080/sub"
SLASH_TOKEN = "1nzmkfsnob8aijxsx1kpot1dwc"
ALICE = "pxxhctq71pgnfdzkjebnck7x4r"
BOB = "abe8mg4f97n15nhobuh4asuzse"
BOT = "mhzy9fx8pibi3jz7dwkwtzeazr"
USERS = {ALICE: "alice", BOB: "bob", BOT: "ticket-bot"}
TEAM = "5tkh6wrqyfbixqnt31178yty4r"
HELPDESK = "xy598dj81pnabe8p5ayj81sfya"
QUIET = "ih3dt6fqj3ys8buknt45s8beqc"
SECRET = "zudngrq4fb8jic1qx8pnbuexza"
DIRECT = "qfa7ohwi17r5uxpthn5gy63fwo"
ARCHIVED = "e7uq8rmkx3fq9gh4tmob1cnzaw"
OTHERS = "a89o8q346ib8tmwda66iacqita"
NO_PERMISSION = (403, "api.context.permissions.app_error")
STATUSES = ticket_service.STATUSES
OPEN = STATUSES["open"]
VARIABLES = [one.name for one in ticket_service.SETTINGS.values()]
ARCHIVED_ID = "api.post.patch_post.can_not_update_post_in_deleted.error"
TRIGGER_EXPIRED = "interactive_message.decode_trigger_id.expired"
TICKET_ID = r"^Ticket-\d{8}-[0-9A-HJKMNP-TV-Z]{4}$"


# -------------------------------------------------------------------------------- the base case

def in_threads(number, work):
    """Run work(0), work(1), … at the same time; raise what one of them raised."""
    trouble = []

    def run(index):
        try:
            work(index)
        except BaseException as error:
            trouble.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if trouble:
        raise trouble[0]


class LogLines(logging.Handler):
    """Keeps what the service logs."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(logging.Formatter("%(levelname)s %(message)s").format(record))


def pattern(sentence):
    """Return a regular expression for a sentence with {values} in it."""
    return re.sub(r"\\{\w+\\}", ".+", re.escape(sentence))


def cant_post(obstacle, reader="person"):
    """Return what is said where the bot can't post."""
    return getattr(ticket_service.CANT_POST[obstacle], reader).format(bot="ticket-bot")


def answers_to(form=ticket_service.FORM, mark="typed"):
    """Return answers that fit a form, whatever its elements are; each text holds the mark."""
    special = {"number": 42, "email": "alice@example.com", "url": "https://example.com/",
               "users": BOB, "channels": QUIET, "bool": True, "date": "2026-11-27",
               "datetime": "2026-11-27T10:00:00Z"}

    def answer_to(element):
        answer = next((special[element[key]] for key in ("subtype", "data_source", "type")
                       if element.get(key) in special), f"{mark} {element['name']}")
        if "options" in element:
            answer = element["options"][0]["value"]
        return [answer] if element.get("multiselect") else answer

    return {element["name"]: answer_to(element) for element in form["elements"]}


def start_python(add_cleanup, *arguments, **details):
    """Return a process of Python with nothing but its standard library, ended by a clean-up."""
    # Behind & in a shell, SIGINT is ignored, and the process would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-S", *arguments], cwd=HERE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **details)
    signal.signal(signal.SIGINT, before)
    for clean_up in (process.stdout.close, process.stderr.close, process.wait, process.kill):
        add_cleanup(clean_up)
    return process


class Case(unittest.TestCase):
    """A stand-in Mattermost, and a service that is made for it on demand."""

    environment: dict = {}

    def setUp(self):
        self.log = LogLines()
        ticket_service.log.addHandler(self.log)
        ticket_service.log.setLevel(logging.DEBUG)
        ticket_service.log.propagate = False
        self.addCleanup(ticket_service.log.removeHandler, self.log)
        self.gates = []
        self.mattermost = self.start_stand_in()
        self.start_service()

    def start_stand_in(self, **details):
        stand_in = StandIn(**details)
        thread = threading.Thread(target=stand_in.serve_forever, args=(0.001,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(stand_in.server_close)
        self.addCleanup(stand_in.shutdown)
        self.addCleanup(lambda: self.assertEqual(stand_in.complaints, []))
        return stand_in

    def start_again(self):
        """Return a stand-in that goes on where the one before it ended."""
        again = self.start_stand_in(port=self.mattermost.server_port)
        for name in ("service", "dialogs", "posts", "hooks"):
            setattr(again, name, getattr(self.mattermost, name))
        return again

    def settings(self, **changes):
        environment = {"MATTERMOST_URL": self.mattermost.url, "BOT_TOKEN": BOT_TOKEN,
                       "SLASH_TOKEN": SLASH_TOKEN, "CALLBACK_URL": CALLBACK_URL, "PORT": "0"}
        return {**environment, **self.environment, **changes}

    def start_service(self, files=1024, threads=128, **changes):
        """Return a running server; the stand-in's people use the one that was started last."""
        settings = ticket_service.Settings.from_environment(self.settings(**changes))
        service = ticket_service.TicketService(settings)
        server = ticket_service.Server(
            service, settings.listen_address, settings.port, files, threads)
        service.tickets.wait_at_stop, service.mattermost.pause = 0, 0.01
        service.changes.pauses_for_update = service.changes.pauses_for_silence = (0.01,) * 6
        server.stop_within, server.look_every = 0.1, 0.005
        thread = threading.Thread(target=server.serve_forever, args=(0.001,))
        thread.start()
        self.mattermost.service = ("127.0.0.1", server.server_port)
        self.service = server
        self.addCleanup(self.stop_service, server, thread)
        return server

    def limit(self, timeout=5, patience=20, haste=5, answer_within=24):
        """Change for how many seconds the service waits, or let it be as usual."""
        self.service.service.mattermost.patience_before_form = haste
        self.service.service.mattermost.timeout = timeout
        self.service.service.mattermost.patience = patience
        self.service.answer_within = answer_within

    def instead_of_pauses(self, do):
        """Let the service do something, with the number of seconds, where it would pause."""
        clock = types.SimpleNamespace(**{**vars(time), "sleep": do})
        self.enterContext(unittest.mock.patch.object(ticket_service, "time", clock))

    def gate(self):
        """Return an event for what waits in the stand-in; it is set at the end, at the latest."""
        self.gates.append(threading.Event())
        return self.gates[-1]

    def start_with_form(self, form, **changes):
        """Return a running server whose form is another one, from a file."""
        return self.start_service(FORM_FILE=self.form_file(form), **changes)

    def form_file(self, form):
        """Return the name of a file with a form."""
        path = Path(self.enterContext(tempfile.TemporaryDirectory())) / "form.json"
        path.write_text(json.dumps(form), encoding="utf-8")
        return str(path)

    def checked(self, form, **changes):
        """Return the status of --check, and its lines on a form, which a start has to log, too."""
        changes["FORM_FILE"] = self.form_file(form)
        server = self.start_service(**changes)
        ticket_service.log_checks(server.service, server.server_port)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            status = ticket_service.main(["--check"], self.settings(**changes))
        lines = [line for line in output.getvalue().splitlines() if " FORM_FILE: " in line]
        for level, sentence in (line.split(maxsplit=1) for line in lines):
            level = logging.getLevelName(ticket_service.LEVELS[level])
            self.assertIn(f"{level} {sentence}", self.log.lines)
        return status, lines

    def stop_service(self, server, thread):
        """Stop a server, and look for what must not be in its log."""
        for gate in self.gates:
            gate.set()
        if thread.is_alive():
            server.shutdown()
            thread.join()
        server.service.close()
        self.assert_nothing_private_logged()

    def assert_nothing_private_logged(self):
        private = [BOT_TOKEN, SLASH_TOKEN, "typed", "hookhookhook", *self.mattermost.hooks]
        private += [dialog.get("state", "-") for _, _, dialog in self.mattermost.dialogs]
        lines = "\n".join(self.log.lines)
        for text in private:
            self.assertNotIn(text, lines)
        self.assertNotRegex(lines, "[\x00-\x08\x0b-\x1f]")

    def assert_nothing_was_done(self):
        """Check that a call for which there is no connection is known to have done nothing."""
        with self.assertRaises(ticket_service.MattermostError) as failed:
            self.service.service.mattermost.get_me()
        self.assertFalse(failed.exception.may_have_worked)

    def post(self, path, body):
        """Return status, JSON and headers of the answer to a POST that is not Mattermost's."""
        connection = http.client.HTTPConnection("127.0.0.1", self.mattermost.service[1], timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", path, body)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers

    def health(self):
        """Return the JSON of the answer to a health check."""
        connection = http.client.HTTPConnection(*self.mattermost.service, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())

    def file(self, answers=None, **details):
        """Type /ticket, and submit the dialog; return what Mattermost's client is told."""
        self.assertEqual(self.mattermost.run_command(), "")
        return self.mattermost.submit_dialog(answers or answers_to(), **details)

    def prefilled(self):
        """Return what a client submits of the last dialog if nobody changes it."""
        _, _, dialog = self.mattermost.dialogs[-1]
        return {element["name"]: element.get("default") for element in dialog["elements"]}

    def replies(self, number=1):
        """Return the replies in threads, when there are so many."""
        self.eventually(lambda: len(self.mattermost.replies()) >= number, "the reply")
        return self.mattermost.replies()

    def assert_logged(self, pattern):
        self.eventually(lambda: any(re.search(pattern, line) for line in self.log.lines),
                        f"a log line with {pattern!r}")

    def eventually(self, condition, what="it"):
        """Wait until something that happens after the answer has happened."""
        ends = time.monotonic() + 5
        while not condition():
            self.assertLess(time.monotonic(), ends, f"{what} did not happen")
            time.sleep(0.002)


# ------------------------------------------------------------------------- the story of a ticket

class TicketTest(Case):
    def test_a_ticket_from_the_command_to_the_confirmation(self):
        self.assertEqual(self.mattermost.run_command("disk is full"), "")
        user, url, dialog = self.mattermost.dialogs[0]
        self.assertEqual((user, url), (ALICE, CALLBACK_URL + "/ticket/submit"))
        self.assertEqual(self.prefilled()["problem"], "disk is full")
        self.assert_logged("INFO SLASH_TOKEN fits")
        self.assertEqual(self.mattermost.submit_dialog({}, cancelled=True), {})
        self.assertEqual(self.mattermost.posts, {})

        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        [root] = self.mattermost.roots()
        ticket_id = root["props"]["ticket_id"]
        self.assertRegex(ticket_id, TICKET_ID)
        self.assertEqual(ticket_id[7:15], time.strftime("%Y%m%d", time.gmtime()))
        self.assertEqual(root["channel_id"], HELPDESK)
        self.assertEqual(root["hashtags"], f"#{ticket_id} {OPEN.tag}")
        self.assertIs(root["props"]["is_ticket"], True)
        ticket = root["props"]["ticket"]
        self.assertEqual((ticket["user_id"], ticket["user_name"]), (ALICE, "alice"))
        self.assertEqual(ticket["answers"], answers_to())
        self.assertAlmostEqual(ticket["created_at"], time.time() * 1000, delta=60_000)
        self.assertEqual(nonce := ticket["nonce"], root["pending_post_id"])
        state = base64.urlsafe_b64decode(dialog["state"].partition(".")[0] + "==").decode()
        self.assertNotIn(nonce, state + dialog["state"])  # nobody who reads it can forge a post
        self.assertGreaterEqual(len(nonce), 22)

        [reply] = self.replies()
        self.assertEqual((reply["root_id"], reply["message"]), (
            root["id"], ticket_service.FIRST_REPLY))
        [(user, channel, text)] = self.mattermost.ephemeral
        self.assertEqual((user, channel), (ALICE, HELPDESK))
        self.assertEqual(text, ticket_service.CONFIRMATION.format(
            ticket_id=ticket_id, link=f"{self.mattermost.url}/_redirect/pl/{root['id']}"))
        self.assert_logged("INFO CALLBACK_URL works")
        self.assert_logged(f"ticket={ticket_id} user=alice channel={HELPDESK} post={root['id']}")

        self.mattermost.pending.clear()  # a minute later: Mattermost remembers for 30 seconds
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual((len(self.mattermost.posts), len(self.mattermost.ephemeral)), (2, 1))

    def test_40_tickets_from_20_threads_have_40_ids(self):
        for _ in range(40):
            self.assertEqual(self.mattermost.run_command(), "")

        def submit_two(thread):
            for number in (2 * thread, 2 * thread + 1):
                self.assertEqual(self.mattermost.submit_dialog(answers_to(), number), {})

        in_threads(20, submit_two)
        ids = [root["props"]["ticket_id"] for root in self.mattermost.roots()]
        self.assertEqual((len(ids), len(set(ids))), (40, 40))
        for ticket_id in ids:
            self.assertRegex(ticket_id, TICKET_ID)

    def test_20_simultaneous_submissions_make_one_ticket_one_reply_one_confirmation(self):
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", slow(0.02))
        in_threads(20, lambda _: self.assertEqual(self.mattermost.submit_dialog(answers_to()), {}))
        self.replies()
        self.assertEqual(len(self.mattermost.posts), 2)
        self.assertEqual(len(self.mattermost.ephemeral), 1)
        self.assertEqual(len(self.mattermost.made("POST /posts")), 2)

    def test_the_channel_is_the_one_where_the_command_was_typed_or_one_for_all_tickets(self):
        self.assertEqual(self.file(channel_id=QUIET, team_id="other"), {})
        self.replies()
        self.start_service(TICKET_CHANNEL=QUIET)
        self.assertEqual(self.mattermost.run_command(channel_id=DIRECT), "")
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies(2)
        self.assertEqual([post["channel_id"] for post in self.mattermost.posts.values()],
                         [HELPDESK, HELPDESK, QUIET, QUIET])
        self.assertEqual(self.mattermost.ephemeral[-1][:2], (ALICE, DIRECT))

    def test_mattermost_can_be_at_a_sub_path(self):
        self.mattermost.sub_path = "/chat"
        self.start_service(MATTERMOST_URL=self.mattermost.url + "/chat/")
        self.assertEqual(self.file(), {})
        self.replies()
        self.assertEqual(len(self.mattermost.ephemeral), 1)

    def test_every_version_of_mattermost_is_understood(self):
        self.start_with_form(form_of(
            element("select", "cluster", options=[{"text": "Production", "value": "prod"}]),
            element("text", "resource"), element("textarea", "problem"),
            element("textarea", "network", optional=True)),
            SLASH_TOKEN=", ".join(token for token, *_ in RECORDED.values()))
        for version, (_, command, submission) in RECORDED.items():
            with self.subTest(version):
                fields = dict(urllib.parse.parse_qsl(command))
                channel_id, user = fields["channel_id"], fields["user_id"]
                hook = fields["response_url"].rpartition("/")[2]
                self.mattermost.channels[channel_id] = Channel("recorded", members=(user, BOT))
                self.mattermost.triggers[fields["trigger_id"]] = user
                self.mattermost.hooks[hook] = [5, user, channel_id]
                answer = self.post("/ticket", command)
                self.assertEqual(answer[:2], (200, {}))
                _, _, dialog = self.mattermost.dialogs[-1]
                self.assertEqual(self.prefilled()["problem"],
                                 'disk is full on @bob see ~quiet & 100% "ok"\nsecond line')
                answer = self.post("/ticket/submit", submission.replace("STATE", dialog["state"]))
                self.assertEqual(answer[:2], (200, {}))
                self.eventually(lambda: self.mattermost.hooks[hook][0] == 4, "the confirmation")
                root = self.mattermost.roots()[-1]
                self.assertEqual(root["channel_id"], channel_id)
                self.assertEqual(root["props"]["ticket"]["answers"], {
                    "cluster": "prod", "resource": "vm-042",
                    "problem": "disk is full\nsince nine @all"})


# ------------------------------------------------------------------------------------- recordings

# A certificate for 127.0.0.1, its key, and the CA that signed it: one without key usage, and whose
# basic constraints are not critical, as private CAs often are. The key is no secret: nobody else
# trusts that CA, whose own key is gone.
CERTIFICATES = """\
-----BEGIN CERTIFICATE-----
MIIBhDCCASugAwIBAgIBAjAKBggqhkjOPQQDAjAiMSAwHgYDVQQDDBd0ZXN0cyBv
ZiB0aWNrZXRfc2VydmljZTAgFw0yNjExMjUxNDU4NDlaGA8yMTI2MTEwMTE0NTg0
OVowFDESMBAGA1UEAwwJMTI3LjAuMC4xMFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcD
QgAEGIV+SgZx++3t4zMcUfQJ7WEJnYAzNKoYx/rWu4N48kLnC6xQHQ2bE4g61zQo
NTaWf5/KgHP7eJfgWg9R6LOPUaNeMFwwGgYDVR0RBBMwEYcEfwAAAYIJbG9jYWxo
b3N0MB0GA1UdDgQWBBSTSB95Gj0XCAd2W4B4CzLkTtomLzAfBgNVHSMEGDAWgBQR
A/5UUANAcWP7prN5LV9rkrWdozAKBggqhkjOPQQDAgNHADBEAiAsemTZbQ8l7+4t
8sOPj+n985Bo0AOASW3H8RrxAfF1CAIgVwqo7BZ1X2cp4tcMD9NjwfV07NlBmVx7
zBZMh3lV3kg=
-----END CERTIFICATE-----
-----BEGIN CERTIFICATE-----
MIIBZDCCAQqgAwIBAgIBATAKBggqhkjOPQQDAjAiMSAwHgYDVQQDDBd0ZXN0cyBv
ZiB0aWNrZXRfc2VydmljZTAgFw0yNjExMjUxNDU4NDhaGA8yMTI2MTEwMTE0NTg0
OFowIjEgMB4GA1UEAwwXdGVzdHMgb2YgdGlja2V0X3NlcnZpY2UwWTATBgcqhkjO
PQIBBggqhkjOPQMBBwNCAAQYqp4NVR724Pkc8JD2h6OGgrYChHdYlUu7QM7n+Zd2
RhcaRomP9bCiFce+qyIIk7vErYChVkgTFWKwZeeEc3YXoy8wLTAMBgNVHRMEBTAD
AQH/MB0GA1UdDgQWBBQRA/5UUANAcWP7prN5LV9rkrWdozAKBggqhkjOPQQDAgNI
ADBFAiEAgXOPintoSk+cs6yhxy7MX5Husj7SdcsEk5aI24lOSFsCIHTzCPEzSaoL
q7HwosgHR5bCJ9bNje9sXcNmKVx5AjBV
-----END CERTIFICATE-----
"""
PRIVATE_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQg08QKXEJlppNy+7t/
NAeustDMzQiE4WWF06yr2habYJehRANCAAQYhX5KBnH77e3jMxxR9AntYQmdgDM0
qhjH+ta7g3jyQucLrFAdDZsTiDrXNCg1NpZ/n8qAc/t4l+BaD1Hos49R
-----END PRIVATE KEY-----
"""

# A slash command and a dialog submission as two versions sent them, but for the long trigger_id:
# (token, form, JSON)
RECORDED = {
    "9.4": (
        "xan3cywo9b85bpzhryd5t68cww",
        "channel_id=ys8tr9o6apng9qpmtshtc7cftc&channel_mentions=quiet&channel_mentions_ids=qnwb"
        "bjiuk7gf9dzdjkqgtkh11c&channel_name=helpdesk&command=%2Fticketrec&response_url=http%3A"
        "%2F%2Flocalhost%3A8064%2Fhooks%2Fcommands%2Ffyhkhcdbmbyri8uefsfj6ri1cc&team_domain=ops"
        "&team_id=qstu3tybh3fdupecsp9pfj548a&text=disk+is+full+on+%40bob+see+~quiet+%26+100%25+"
        "%22ok%22%0Asecond+line&token=xan3cywo9b85bpzhryd5t68cww&trigger_id=dHJpZ2dlcg%3D%3D&us"
        "er_id=uewie3bdj7g3zrg3fti11ccghw&user_mentions=bob&user_mentions_ids=dosdban4hbb97y6sp"
        "gby5k6kjc&user_name=alice",
        '{"type":"dialog_submission","callback_id":"ticket","state":"STATE","user_id":"uewie3bd'
        'j7g3zrg3fti11ccghw","channel_id":"ys8tr9o6apng9qpmtshtc7cftc","team_id":"qstu3tybh3fdu'
        'pecsp9pfj548a","submission":{"cluster":"prod","network":"","problem":"disk is full\\nsi'
        'nce nine @all","resource":"vm-042"},"cancelled":false}'),
    "11.6": (
        "1nzmkfsnob8aijxsx1kpot1dwc",
        "channel_id=xy598dj81pnabe8p5ayj81sfya&channel_mentions=quiet&channel_mentions_ids=a89o"
        "8q346ib8tmwda66iacqita&channel_name=helpdesk&command=%2Fticketrec&response_url=http%3A"
        "%2F%2Flocalhost%3A8066%2Fhooks%2Fcommands%2Fuow574xjtigdb8aqgx9tqqqmme&root_id=&team_d"
        "omain=ops&team_id=5tkh6wrqyfbixqnt31178yty4r&text=disk+is+full+on+%40bob+see+~quiet+%2"
        "6+100%25+%22ok%22%0Asecond+line&token=1nzmkfsnob8aijxsx1kpot1dwc&trigger_id=dHJpZ2dlcg"
        "%3D%3D&user_id=pxxhctq71pgnfdzkjebnck7x4r&user_mentions=bob&user_mentions_ids=abe8mg4f"
        "97n15nhobuh4asuzse&user_name=alice",
        '{"type":"dialog_submission","callback_id":"ticket","state":"STATE","user_id":"pxxhctq7'
        '1pgnfdzkjebnck7x4r","channel_id":"xy598dj81pnabe8p5ayj81sfya","team_id":"5tkh6wrqyfbix'
        'qnt31178yty4r","submission":{"cluster":"prod","network":"","problem":"disk is full\\nsi'
        'nce nine @all","resource":"vm-042"},"cancelled":false}'),
}


# ----------------------------------------------------------------------- the stand-in Mattermost

CAROL = "nnpda96xgxz3nt89ayr9h9qtez"  # is in no channel
DAVE = "dio8pnm9qqts7xnjj4q7t61zky"  # has left
ADMIN = "9er1qcnxtk3gjcw57ypuho596j"
ANOTHER_TEAM = "another" + TEAM[7:]
ACCOUNTS = {**USERS, CAROL: "carol", DAVE: "dave", ADMIN: "admin"}
BAD_PARAMETER = (400, "api.context.invalid_body_param.app_error")
TOO_LONG = (400, "model.post.is_valid.message_length.app_error")


def new_id():
    """Return an ID as Mattermost makes them."""
    return "".join(random.choices("ybndrfg8ejkmcpqxot1uwisza345h769", k=26))


def is_call(wanted, call):
    """Return whether a call (METHOD path) is the one that is wanted, or begins like it."""
    return call.startswith(wanted) if wanted.endswith("/") else call == wanted


def hashtags(message):
    """Return what Mattermost finds by its hashtag search: the first 1,000 characters, code too."""
    found = " ".join(re.findall(r"(?<![^\s>])#[A-Za-z][\w.-]*\w", message))
    return found if len(found) <= 1000 else found[:1000].rpartition(" ")[0]


def actions_of(props):
    """Return the buttons and menus of a post with such props."""
    return [action for attachment in props.get("attachments", ())
            for action in attachment.get("actions", ())]


def as_seen(post):
    """Return a post as the API shows it: without what its buttons carry."""
    post = json.loads(json.dumps(post))
    for action in actions_of(post["props"]):
        action.pop("integration", None)
    return post


def is_readable(connection):
    """Return whether there is something to read, if only the end."""
    return bool(select.select([connection], [], [], 0)[0])


class Channel:
    def __init__(self, name, kind="O", members=(), archived=False, team=TEAM):
        self.name, self.kind, self.members, self.team = name, kind, set(members), team
        self.display_name = name.title()
        self.delete_at = 1795425075592 if archived else 0


class Failure(Exception):
    """An answer of Mattermost's other than success: status and id of its error object."""


DIALOG_KEYS = {
    "dialog": {"callback_id": str, "title": str, "introduction_text": str, "icon_url": str,
               "elements": list, "submit_label": str, "notify_on_cancel": bool, "state": str},
    "element": {"display_name": str, "name": str, "type": str, "subtype": str, "default": str,
                "placeholder": str, "help_text": str, "optional": bool, "min_length": int,
                "max_length": int, "data_source": str, "options": list, "multiselect": bool,
                "min_date": str, "max_date": str, "time_interval": int, "datetime_config": dict},
    "option": {"text": str, "value": str},
}
PATCH_KEYS = {"message": str, "props": dict}
COMMAND = {"team_id": "", "trigger": "", "method": "", "url": "", "username": "", "icon_url": "",
           "auto_complete": False, "auto_complete_desc": "", "auto_complete_hint": "",
           "display_name": "", "description": ""}


class StandIn(http.server.ThreadingHTTPServer):
    """A Mattermost with the bot in one team, and the people who use it.

    Its API is in ROUTES. run_command(), submit_dialog(), press() and say() are what its clients do.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, version="11.6.0", tls=None, port=0, handler=None):
        super().__init__(("127.0.0.1", port), handler or StandInHandler)
        self.version, self.tls = version, tls
        self.lock = threading.RLock()
        self.service = None  # host and port of what people know as CALLBACK_URL
        self.site_url = self.url
        self.sub_path = ""  # where its addresses begin
        self.bot_token, self.roles = BOT_TOKEN, "system_user"
        self.is_bot, self.threads = True, "always_on"
        self.permissions = {
            "system_user": ["create_team"], "team_user": ["list_team_channels"],
            "channel_user": ["edit_post", "create_post"],
            "system_post_all": ["create_post"], "system_post_all_public": ["create_post_public"],
            "system_admin": ["create_post", "create_post_ephemeral"]}
        self.teams = [{"id": TEAM, "name": "ops"}]
        self.channels = {
            HELPDESK: Channel("helpdesk", members=(ALICE, BOB, BOT)),
            QUIET: Channel("quiet", members=(ALICE, BOB)),
            SECRET: Channel("secret", "P", members=(ALICE, BOB)),
            DIRECT: Channel(f"{BOB}__{ALICE}", "D", members=(ALICE, BOB)),
            ARCHIVED: Channel("archived", members=(ALICE, BOB, BOT), archived=True),
            OTHERS: Channel("others", members=(ALICE,), team=ANOTHER_TEAM),
        }
        self.accounts = {user: {"id": user, "username": name, "delete_at": 0}
                         for user, name in ACCOUNTS.items()}
        self.accounts[BOT]["is_bot"] = True
        self.accounts[DAVE]["delete_at"] = 1795425075592
        self.posts, self.pending = {}, {}
        self.versions = collections.defaultdict(list)  # of a post: (when, JSON)
        self.last_time = 0
        self.read_lag = 0  # seconds by which what GET /posts/{id} reads is behind
        self.max_post_size = 16383
        self.edit_limit = None  # "9.4" or "11.6": how a post that is too old to edit is refused
        self.loses_big = False  # every second answer to a press of over 4 KB, as 9.4 does
        self.losses = itertools.cycle((True, False))
        self.hooks = {}  # ID: [uses left, user, channel]
        self.triggers = {}  # trigger_id: user
        self.dialogs = []  # (user, url, dialog), as opened
        self.ephemeral = []  # (user, channel, text)
        self.calls = []  # "METHOD path", as the service made them
        self.bodies = []  # of these calls
        self.wire = []  # all exchanges, in both directions: [way, call, body, answer]
        self.failure = None  # a call or the beginning of one, and what happens to it each time
        self.scripts = collections.defaultdict(collections.deque)
        self.complaints = []
        self.connections = 0  # that were accepted
        self.open = set()
        self.keeps = True  # connections, after an answer; on a fresh one, no call is tried again
        self.caller = ""  # whose call is being answered: BOT, ADMIN, or nobody known
        self.login_id, self.password, self.mfa_code = "admin", "correct horse", ""
        self.admin_roles = "system_user system_admin"
        self.session = ""  # the token of an admin who has signed in
        self.session_calls, self.session_lasts = 0, None  # None: for any number of calls
        self.config = {"ServiceSettings": {
            "EnableBotAccountCreation": False, "EnableCommands": True,
            "AllowedUntrustedInternalConnections": ""}}
        self.environment = {}  # what of it is set by environment variables, which a patch leaves
        self.write_restricted = set()  # names of settings that a patch leaves without a word
        self.all_teams = [{"id": TEAM, "name": "ops", "display_name": "Operations"},
                          {"id": ANOTHER_TEAM, "name": "another", "display_name": "Another"}]
        self.commands, self.tokens = [], {}  # slash commands; access tokens: token, its details

    @property
    def url(self):
        return f"{'https' if self.tls else 'http'}://127.0.0.1:{self.server_port}"

    def finish_request(self, request, client_address):
        self.connections += 1
        if self.tls:  # in the thread of the connection, so that a bad handshake stops nobody else
            request = self.tls.wrap_socket(request, server_side=True)
        self.open.add(request)
        try:
            with request:
                super().finish_request(request, client_address)
        finally:
            self.open.discard(request)

    def hang_up(self):
        """Close all connections, as a restart does."""
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.complain(f"bug in the stand-in: {error!r}")

    def script(self, call, *behaviours):
        """Let the next requests with this METHOD and path be answered otherwise."""
        self.scripts[call].extend(behaviours)

    def complain(self, what):
        self.complaints.append(what)

    def made(self, call):
        """Return the bodies of the requests with this METHOD and path."""
        return [body for made, body in zip(self.calls, self.bodies) if is_call(call, made)]

    def roots(self):
        return [post for post in self.posts.values() if not post["root_id"]]

    def replies(self):
        return [post for post in self.posts.values() if post["root_id"]]

    def now(self):
        """Return the time in milliseconds; no two things happen in the same one."""
        with self.lock:
            self.last_time = max(self.last_time + 1, time.time_ns() // 10**6)
            return self.last_time

    def new_trigger(self, user):
        """Return a trigger_id, with which a dialog can be opened for a person."""
        trigger = base64.b64encode(f"{new_id()}:{user}:{time.time_ns()}".encode()).decode()
        self.triggers[trigger] = user
        return trigger

    # What its clients do

    def post_to_service(self, url, body, content_type):
        """Return status, content type and body of the service's answer to Mattermost."""
        address, path = self.service, url.removeprefix(CALLBACK_URL)
        connection = http.client.HTTPConnection(*address, timeout=30)
        with contextlib.closing(connection):
            connection.request("POST", path, body, {
                "User-Agent": "Mattermost-Bot/1.1", "Accept": "application/json",
                "Content-Type": content_type, "Accept-Encoding": "gzip"})
            answer = connection.getresponse()
            status, kind, text = answer.status, answer.headers.get_content_type(), answer.read()
        self.wire.append(["Mattermost asks the service", f"POST {path}", body.decode(),
                          f"{status} {text.decode()}"])
        return status, kind, text

    def command_form(self, user, channel_id, text, **changes):
        """Return the fields of a slash command, and remember its trigger and hook."""
        hook = new_id()
        self.hooks[hook] = [5, user, channel_id]
        form = {"channel_id": channel_id, "channel_name": self.channels[channel_id].name,
                "command": "/ticket",
                "response_url": f"http://elsewhere.invalid/hooks/commands/{hook}",
                "team_domain": "ops", "team_id": TEAM, "text": text, "token": SLASH_TOKEN,
                "trigger_id": self.new_trigger(user), "user_id": user,
                "user_name": self.accounts[user]["username"]}
        if self.version >= "11":
            form["root_id"] = ""
        return {**form, **changes}

    def run_command(self, text="", user=ALICE, channel_id=HELPDESK, **changes):
        """Let a person type /ticket; return what they see at once: "" or an ephemeral text."""
        form = self.command_form(user, channel_id, text, **changes)
        status, kind, body = self.post_to_service(
            CALLBACK_URL + "/ticket", urllib.parse.urlencode(sorted(form.items())).encode(),
            "application/x-www-form-urlencoded")
        if status != 200:
            return f"Command with a trigger of 'ticket' returned response {status}."
        if kind != "application/json":
            return body.decode()
        answer = json.loads(body)  # fails for an empty body, as Mattermost does
        if answer.get("text"):
            if not answer.get("skip_slack_parsing") or answer.get("response_type") != "ephemeral":
                self.complain(f"an answer that everybody sees, or that is parsed: {answer}")
            self.ephemeral.append((user, channel_id, answer["text"]))
        elif answer:
            self.complain(f"an answer to a command that shows nothing: {answer}")
        return answer.get("text", "")

    def submit_dialog(self, answers, number=-1, user=ALICE, channel_id=HELPDESK, **changes):
        """Let a person submit a dialog; return what their client gets: {} closes it."""
        _, url, dialog = self.dialogs[number]
        submission = {
            "type": "dialog_submission", "callback_id": dialog.get("callback_id", ""),
            "state": dialog.get("state", ""), "user_id": user, "channel_id": channel_id,
            "team_id": TEAM, "submission": answers, "cancelled": False, **changes}
        # Go writes <, > and & like this
        body = re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", json.dumps(submission))
        status, _, body = self.post_to_service(url, body.encode(), "application/json")
        if status != 200:
            return {"closed": "and everything typed is lost"}
        answer = json.loads(body or b"{}")
        names = {element["name"] for element in dialog["elements"]}
        if not set(answer.get("errors", {})) <= names:
            self.complain(f"errors for fields that are not there: {answer}")
        return answer

    def buttons(self, post_id):
        """Return the buttons and menus of a post, by their names."""
        return {action["name"]: action for action in actions_of(self.posts[post_id]["props"])}

    def press(self, post_id, button, user=BOB, /, action=None, stale=False, selected_option="",
              **changes):
        """Let a person press a button of a post, or choose from a menu; return what they see.

        That is "" or an ephemeral text. An action that was there before is looked up by its ID in
        the post as it is now, but for a stale one, which was on its way when the post changed.
        """
        post = self.posts[post_id]
        action = action or self.buttons(post_id)[button]
        if not stale:
            present = {action["id"]: action for action in actions_of(post["props"])}
            action = present.get(action["id"], {})
        if "integration" not in action:
            return "Invalid action id."
        context = action["integration"]["context"]
        request = {
            "user_id": user, "user_name": self.accounts[user]["username"],
            "channel_id": post["channel_id"],
            "channel_name": self.channels[post["channel_id"]].name, "team_id": TEAM,
            "team_domain": "ops", "post_id": post_id, "trigger_id": self.new_trigger(user),
            "type": action["type"], "data_source": "", "context": context}
        if selected_option:
            request["context"] = {**context, "selected_option": selected_option}
            request["data_source"] = action.get("data_source", "")
        status, _, body = self.post_to_service(
            action["integration"]["url"], json.dumps({**request, **changes}).encode(),
            "application/json")
        if status != 200 or (self.loses_big and len(body) > 4096 and next(self.losses)):
            return "Action integration error."
        answer = json.loads(body)
        if "update" in answer:
            if len(answer["update"].get("message", "")) > self.max_post_size:
                return "Action integration error."
            self.update_post(post, answer["update"])
        return answer.get("ephemeral_text", "")

    def update_post(self, post, update):
        """Change a post as an action asks for; what the update leaves out is lost."""
        self.change(post, message=update.get("message", ""), edit_at=self.now(),
                    props=update.get("props", post["props"]))
        self.check_buttons(post["props"])
        if post["props"].get("from_bot") != "true":
            self.complain("an update without from_bot takes the mark of the bot away")

    def say(self, user, channel_id, message, root_id=""):
        """Let a person write a post; return its ID."""
        return self.add_post(user, channel_id, message, root_id)["id"]

    def add_post(self, user, channel_id, message, root_id="", props=None, pending_id=""):
        """Return a new post; its root is changed by it."""
        now = self.now()
        post = {"id": new_id(), "create_at": now, "edit_at": 0, "delete_at": 0,
                "is_pinned": False, "user_id": user, "channel_id": channel_id, "root_id": root_id,
                "original_id": "", "message": message, "type": "", "props": props or {},
                "file_ids": [], "pending_post_id": pending_id, "reply_count": 0,
                "last_reply_at": 0, "metadata": {}}
        with self.lock:
            self.posts[post["id"]] = post
            self.change(post, now)
            if root_id:
                root = self.posts[root_id]
                self.change(root, now, reply_count=root["reply_count"] + 1, last_reply_at=now)
        return post

    def change(self, post, now=0, **changes):
        """Change a post, and keep what it is then for reads that lag."""
        with self.lock:
            post.update(changes, update_at=now or self.now())
            post["hashtags"] = hashtags(post["message"])
            self.versions[post["id"]].append((time.monotonic(), json.dumps(post)))

    def as_read(self, post):
        """Return a post as a replica has it that is read_lag seconds behind."""
        versions = self.versions[post["id"]] if self.read_lag else ()
        old = [text for at, text in versions if at <= time.monotonic() - self.read_lag]
        return json.loads((old or [versions[0][1]])[-1]) if versions else post

    # What the service asks of it

    def who_has(self, authorization):
        """Return whose token a header holds: BOT, ADMIN, or "" for nobody's, or an old one."""
        kind, _, token = (authorization or "").partition(" ")
        if kind != "Bearer" or not token:
            return ""
        if token == self.bot_token or self.tokens.get(token, {}).get("user_id") == BOT:
            return BOT
        if token != self.session:
            return ""
        self.session_calls += 1
        ended = self.session_lasts is not None and self.session_calls > self.session_lasts
        return "" if ended else ADMIN

    def get_client_config(self, _):
        config = {"Version": self.version, "BuildNumber": "", "SiteURL": self.site_url,
                  "CollapsedThreads": self.threads}
        if self.caller:
            config["MaxPostSize"] = str(self.max_post_size)
        return 200, config

    def get_me(self, _):
        if self.caller == ADMIN:
            return 200, {**self.accounts[ADMIN], "roles": self.admin_roles}
        return 200, {"id": BOT, "username": "ticket-bot", "roles": self.roles,
                     "is_bot": self.is_bot}

    def bot_may(self, what, channel_id):
        channel, roles = self.channels.get(channel_id), self.roles.split()
        if not channel:
            return False
        if BOT in channel.members:
            roles += ["team_user", "channel_user"]
        granted = {permission for role in roles for permission in self.permissions.get(role, ())}
        return what in granted or (f"{what}_public" in granted and channel.kind == "O")

    def is_in(self, team_id):
        """Return whether the bot is in a team."""
        return team_id in [team["id"] for team in self.teams]

    def get_team_member(self, _, team_id):
        if not self.is_in(team_id):
            raise Failure(*NO_PERMISSION)
        return 200, {"team_id": team_id, "user_id": BOT, "roles": "team_user", "delete_at": 0}

    def get_roles(self, names):
        known = [{"id": new_id(), "name": name, "permissions": self.permissions[name]}
                 for name in names if name in self.permissions]
        return 200, known or None

    def get_channel(self, _, channel_id):
        channel = self.channels.get(channel_id)
        if not channel:
            raise Failure(404, "app.channel.get.existing.app_error")
        if BOT not in channel.members and (channel.kind != "O" or not self.is_in(channel.team)):
            raise Failure(*NO_PERMISSION)
        return 200, self.channel_as_seen(channel_id)

    def channel_as_seen(self, channel_id):
        channel = self.channels[channel_id]
        return {"id": channel_id, "type": channel.kind, "delete_at": channel.delete_at,
                "name": channel.name, "display_name": channel.display_name,
                "team_id": "" if channel.kind in "DG" else channel.team}

    def get_channels(self, _, user_id, team_id, query):
        """Return the bot's channels of a team, and its direct messages, as Mattermost does."""
        if user_id not in ("me", BOT) or not self.is_in(team_id):
            raise Failure(*NO_PERMISSION)
        found = [self.channel_as_seen(channel_id) for channel_id, channel in self.channels.items()
                 if BOT in channel.members and (channel.kind in "DG" or channel.team == team_id)
                 and (query or not channel.delete_at)]
        if not found:
            raise Failure(404, "app.channel.get_channels.not_found.app_error")
        return 200, found

    def get_member(self, _, channel_id, user_id):
        user_id = BOT if user_id == "me" else user_id
        members = getattr(self.channels.get(channel_id), "members", ())
        if BOT not in members:
            raise Failure(*NO_PERMISSION)
        if user_id not in members:
            raise Failure(404, "app.channel.get_member.missing.app_error")
        return 200, {"channel_id": channel_id, "user_id": user_id, "roles": "channel_user"}

    def get_user(self, _, user_id):
        if user_id not in self.accounts:
            raise Failure(404, "app.user.missing_account.const")
        return 200, self.accounts[user_id]

    def get_user_by_username(self, _, name):
        for account in self.accounts.values():
            if account["username"] == name:
                return 200, account
        raise Failure(404, "app.user.get_by_username.app_error")

    def join(self, body, channel_id):
        channel = self.channels.get(channel_id)
        if channel and channel.kind in "DG":
            raise Failure(400, "api.channel.add_user_to_channel.type.app_error")
        if not channel or channel.kind != "O" or not self.is_in(channel.team) or (
                body != {"user_id": BOT}):
            raise Failure(*NO_PERMISSION)
        channel.members.add(BOT)
        return 201, {"channel_id": channel_id, "user_id": BOT, "roles": "channel_user"}

    def create_post(self, body):
        channel_id, pending_id = body["channel_id"], body.get("pending_post_id", "")
        if not self.bot_may("create_post", channel_id):
            raise Failure(*NO_PERMISSION)
        if pending_id in self.pending:
            if not self.pending[pending_id]:
                raise Failure(500, "api.post.deduplicate_create_post.pending")
            made = {**as_seen(self.posts[self.pending[pending_id]]), "pending_post_id": ""}
            made.pop("metadata")
            return 201, made
        if self.channels[channel_id].delete_at:
            raise Failure(400, "api.post.create_post.can_not_post_to_deleted.error")
        if len(body["message"]) > self.max_post_size:
            raise Failure(*TOO_LONG)
        root_id = body.get("root_id", "")
        root = self.posts.get(root_id, {"root_id": "", "channel_id": "", "delete_at": 0})
        if root_id and (root["root_id"] or root["channel_id"] != channel_id or root["delete_at"]):
            raise Failure(400, "api.post.create_post.root_id.app_error")
        if not pending_id:
            self.complain("a post without pending_post_id can't be repeated safely")
        props = {**body.get("props", {}), "from_bot": "true"}
        self.check_buttons(props)
        post = self.add_post(BOT, channel_id, body["message"], root_id, props, pending_id)
        if pending_id:
            self.pending[pending_id] = post["id"]
        return 201, as_seen(post)

    def patch_post(self, body, post_id):
        post = self.posts.get(post_id)
        if not post or post["delete_at"] or post["user_id"] != BOT or not self.bot_may(
                "edit_post", post["channel_id"]):
            raise Failure(*NO_PERMISSION)
        if self.edit_limit == "11.6" or (self.edit_limit and "message" in body):
            raise Failure(400, "api.post.update_post.permissions_time_limit.app_error")
        if self.channels[post["channel_id"]].delete_at:
            raise Failure(400, "api.post.update_post.can_not_update_post_in_deleted.error")
        if any(type(value) is not PATCH_KEYS.get(key) for key, value in body.items()):
            raise Failure(*BAD_PARAMETER)
        changes = {**body}
        if "props" in body:
            self.check_buttons(body["props"])
            changes["props"] = {**body["props"], "from_bot": "true"}
        if body.get("message", post["message"]) != post["message"]:
            changes["edit_at"] = self.now()
        if len(body.get("message", "")) > self.max_post_size:
            raise Failure(*TOO_LONG)
        self.change(post, **changes)
        return 200, as_seen(post)

    def check_buttons(self, props):
        """Complain of props that show a link's preview, or a button that can't be pressed."""
        if not isinstance(props.get("attachments"), list):
            self.complain("a post without props.attachments loads previews and images")
        actions = actions_of(props)
        for action in actions:
            if not re.fullmatch("[A-Za-z0-9]+", action["id"]) or not action["name"]:
                self.complain(f"a button that can't be pressed: {action}")
            if not action.get("integration", {}).get("context"):
                self.complain("a button that has lost its integration")
            if (action["type"], action.get("data_source")) not in (
                    ("button", None), ("select", "users")):
                self.complain(f"neither a button nor a menu of people: {action}")
        for key in ("id", "name"):
            if len({action[key] for action in actions}) < len(actions):
                self.complain(f"two actions with the same {key}")

    def get_post(self, _, post_id):
        post = self.posts.get(post_id)
        if not post or post["delete_at"]:
            raise Failure(404, "app.post.get.app_error")
        if BOT not in self.channels[post["channel_id"]].members:
            raise Failure(*NO_PERMISSION)
        return 200, as_seen(self.as_read(post))

    def get_thread(self, _, post_id):
        root_id = self.get_post(None, post_id)[1]["root_id"] or post_id
        found = {post["id"]: as_seen(post) for post in self.posts.values()
                 if root_id in (post["id"], post["root_id"]) and not post["delete_at"]}
        return 200, {"order": list(found), "posts": found}

    def get_posts(self, _, channel_id, query):
        if BOT not in getattr(self.channels.get(channel_id), "members", ()):
            raise Failure(*NO_PERMISSION)
        query = dict(urllib.parse.parse_qsl(query))
        here = [post for post in self.posts.values() if post["channel_id"] == channel_id]
        if "since" not in query:
            return 200, self.page_of_roots(here, **query)
        found = {post["id"]: {**as_seen(post), "reply_count": 0} for post in here
                 if post["update_at"] > int(query["since"])}
        return 200, {"order": list(found)[::-1], "posts": found}

    def page_of_roots(self, posts, per_page="60", before="", **others):
        """Return the newest roots, or those from before a post."""
        if others != {"collapsedThreads": "true"} or not 0 < int(per_page) <= 200:
            self.complain(f"a list of posts that Mattermost shortens: {per_page} {others}")
        end = self.posts.get(before, {"create_at": 0})["create_at"] if before else float("inf")
        found = [post for post in posts if post["create_at"] < end
                 and not post["root_id"] and not post["delete_at"]]
        found.sort(key=lambda post: post["create_at"], reverse=True)
        page = {post["id"]: as_seen(post) for post in found[:min(int(per_page), 200)]}
        return {"order": list(page), "posts": page}

    def create_ephemeral_post(self, body):
        if "system_admin" not in self.roles:
            raise Failure(*NO_PERMISSION)
        post = body["post"]
        self.ephemeral.append((body["user_id"], post["channel_id"], post["message"]))
        return 201, post

    def use_hook(self, body, hook):
        if hook not in self.hooks:
            raise Failure(404, "web.command_webhook.general.app_error")
        if not self.hooks[hook][0]:
            raise Failure(400, "web.command_webhook.general.app_error")
        self.hooks[hook][0] -= 1
        _, user, channel_id = self.hooks[hook]
        self.ephemeral.append((user, channel_id, body["text"]))
        return 200, "ok"

    def open_dialog(self, body):
        user = self.triggers.get(body["trigger_id"])
        if not user:
            raise Failure(400, TRIGGER_EXPIRED)
        self.check_dialog(body["dialog"])
        self.dialogs.append((user, body["url"], body["dialog"]))
        return 200, {"status": "OK"}

    def check_dialog(self, dialog):
        """Complain of a dialog that people could not use, and refuse what Mattermost refuses."""
        self.check_keys(dialog, "dialog")
        for element in dialog["elements"]:
            self.check_keys(element, "element")
            if not (dialog["title"] and element["name"] and element["display_name"]):
                self.complain("something has no name")
            if element["type"] == "datetime" and not re.fullmatch(
                    r"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ)?", element.get("default", "")):
                self.complain(f"11.6's client refuses this default: {element}")
            for option in element.get("options", ()):
                self.check_keys(option, "option")
        if len({element["name"] for element in dialog["elements"]}) < len(dialog["elements"]):
            self.complain("two elements have the same name")

    def check_keys(self, thing, what):
        """Complain of a key that Mattermost does not know, and refuse a value of a wrong type."""
        for key, value in thing.items():
            if key not in DIALOG_KEYS[what]:
                self.complain(f"Mattermost knows no {key} of a {what}")
            elif not value:
                self.complain(f"{key} of a {what} says nothing")
            elif type(value) is not DIALOG_KEYS[what][key]:
                raise Failure(*BAD_PARAMETER)

    # What an admin asks of it

    def login(self, body):
        if (body["login_id"], body["password"]) != (self.login_id, self.password):
            raise Failure(401, "api.user.login.invalid_credentials_email_username")
        if self.mfa_code and body.get("token") != self.mfa_code:
            raise Failure(401, "mfa.validate_token.authenticate.app_error")
        self.session, self.session_calls = new_id(), 0  # which the handler sends as a header
        return 200, {**self.accounts[ADMIN], "roles": self.admin_roles}

    def logout(self, _):
        if self.caller == ADMIN:
            self.session = ""
        return 200, {"status": "OK"}

    def patch_config(self, body):
        settings = self.config["ServiceSettings"]
        locked = {*self.environment.get("ServiceSettings", ()), *self.write_restricted}
        for name, value in body["ServiceSettings"].items():
            if len(body) > 1 or type(value) is not type(settings.get(name)):
                raise Failure(*BAD_PARAMETER)
            if value == settings[name]:
                self.complain(f"{name} is {value!r} already")
            if name not in locked:
                settings[name] = value
        return 200, self.config

    def create_bot(self, body):
        """Make the bot if there is none of its ID, else another one."""
        if not self.config["ServiceSettings"]["EnableBotAccountCreation"]:
            raise Failure(403, "api.bot.create_disabled.app_error")
        name, user_id = body["username"], new_id() if BOT in self.accounts else BOT
        if name in [account["username"] for account in self.accounts.values()]:
            raise Failure(400, "app.user.save.username_exists.app_error")
        self.accounts[user_id] = {"id": user_id, "username": name, "delete_at": 0, "is_bot": True}
        return 201, {"user_id": user_id, "username": name, "owner_id": ADMIN, "delete_at": 0,
                     "display_name": body.get("display_name", "")}

    def create_token(self, body, user_id):
        if not body.get("description") or user_id not in self.accounts:
            raise Failure(*BAD_PARAMETER)
        if not self.accounts[user_id].get("is_bot"):
            self.complain("a token of a person's")
        token, details = new_id(), {"id": new_id(), "user_id": user_id, "is_active": True,
                                    "description": body["description"]}
        self.tokens[token] = details
        return 200, {**details, "token": token}

    def get_tokens(self, _, user_id):
        return 200, [details for details in self.tokens.values() if details["user_id"] == user_id]

    def get_team_by_name(self, _, name):
        for team in self.all_teams:
            if team["name"] == name:
                return 200, team
        raise Failure(404, "app.team.get_by_name.missing.app_error")

    def add_team_member(self, body, team_id):
        """Add the bot to a team: nobody else has to be added."""
        if body != {"team_id": team_id, "user_id": BOT} or BOT not in self.accounts:
            raise Failure(*BAD_PARAMETER)
        if not self.is_in(team_id):
            self.teams += [team for team in self.all_teams if team["id"] == team_id]
        return 201, {"team_id": team_id, "user_id": BOT, "roles": "team_user", "delete_at": 0}

    def get_commands(self, _, team_id):
        self.check_commands_enabled()
        return 200, [command for command in self.commands if command["team_id"] == team_id]

    def create_command(self, body):
        self.check_command(body)
        if (body["team_id"], body["trigger"]) in [
                (command["team_id"], command["trigger"]) for command in self.commands]:
            raise Failure(400, "api.command.duplicate_trigger.app_error")
        now = self.now()
        self.commands.append({**COMMAND, **body, "id": new_id(), "token": new_id(),
                              "creator_id": ADMIN, "create_at": now, "update_at": now,
                              "delete_at": 0})
        return 201, self.commands[-1]

    def update_command(self, body, command_id):
        """Change a command; what the body leaves out is lost, but for what is not to be changed."""
        old = next((command for command in self.commands if command["id"] == command_id), None)
        if not old or (body.get("id"), body.get("team_id")) != (command_id, old["team_id"]):
            raise Failure(*BAD_PARAMETER)
        kept = {key: value for key, value in old.items() if key not in COMMAND}
        self.check_command({key: value for key, value in body.items() if key not in kept})
        old.update({**COMMAND, **body, **kept, "update_at": self.now()})
        return 200, old

    def check_commands_enabled(self):
        if not self.config["ServiceSettings"]["EnableCommands"]:
            raise Failure(501, "api.command.disabled.app_error")

    def check_command(self, body):
        """Refuse a slash command as Mattermost does, and what it would drop or do without."""
        self.check_commands_enabled()
        if any(type(value) is not type(COMMAND.get(key)) for key, value in body.items()):
            raise Failure(*BAD_PARAMETER)
        lengths = {"trigger": 128, "display_name": 64, "description": 128, "url": 1024}
        for key, most in lengths.items():
            if not 0 < len(body.get(key, "").encode()) <= most:
                raise Failure(400, f"model.command.is_valid.{key}.app_error")
        if body.get("method") != "P":
            raise Failure(400, "model.command.is_valid.method.app_error")
        if not re.match("https?://", body["url"]) or re.match("/| ", body["trigger"]):
            raise Failure(400, "model.command.is_valid.url_http.app_error")
        if not (body.get("auto_complete") and body.get("username")):
            self.complain(f"a command that is not proposed, or answers as its creator: {body}")


def by_admin(answer):
    """Return what answers an admin's session, and nobody else."""
    def answer_if_admin(stand_in, *details):
        if stand_in.caller != ADMIN or "system_admin" not in stand_in.admin_roles.split():
            raise Failure(*NO_PERMISSION)
        return answer(stand_in, *details)
    return answer_if_admin


ROUTES = [
    ("GET", r"/api/v4/config/client\?format=old", StandIn.get_client_config),
    ("GET", "/api/v4/users/me", StandIn.get_me),
    ("GET", "/api/v4/users/me/teams", lambda self, _: (200, self.teams)),
    ("GET", "/api/v4/channels/([a-z0-9]{26})", StandIn.get_channel),
    ("GET", "/api/v4/channels/([a-z0-9]{26})/members/(me|[a-z0-9]{26})", StandIn.get_member),
    ("GET", "/api/v4/users/([a-z0-9]{26})", StandIn.get_user),
    ("GET", "/api/v4/users/username/([a-z0-9._-]+)", StandIn.get_user_by_username),
    ("GET", r"/api/v4/users/(me|[a-z0-9]{26})/teams/([a-z0-9]{26})/channels"
     r"(\?include_deleted=true)?", StandIn.get_channels),
    ("POST", "/api/v4/channels/([a-z0-9]{26})/members", StandIn.join),
    ("GET", r"/api/v4/channels/([a-z0-9]{26})/posts\?(.+)", StandIn.get_posts),
    ("GET", "/api/v4/teams/([a-z0-9]{26})/members/me", StandIn.get_team_member),
    ("POST", "/api/v4/roles/names", StandIn.get_roles),
    ("POST", "/api/v4/posts", StandIn.create_post),
    ("GET", "/api/v4/posts/([a-z0-9]{26})", StandIn.get_post),
    ("GET", "/api/v4/posts/([a-z0-9]{26})/thread", StandIn.get_thread),
    ("PUT", "/api/v4/posts/([a-z0-9]{26})/patch", StandIn.patch_post),
    ("POST", "/api/v4/posts/ephemeral", StandIn.create_ephemeral_post),
    ("POST", "/api/v4/actions/dialogs/open", StandIn.open_dialog),
    ("POST", "/hooks/commands/([A-Za-z0-9]+)", StandIn.use_hook),
    ("POST", "/api/v4/users/login", StandIn.login),
    ("POST", "/api/v4/users/logout", StandIn.logout),
]
ROUTES += [(method, pattern, by_admin(answer)) for method, pattern, answer in [
    ("GET", "/api/v4/config", lambda self, _: (200, self.config)),
    ("PUT", "/api/v4/config/patch", StandIn.patch_config),
    ("GET", "/api/v4/config/environment", lambda self, _: (200, self.environment)),
    ("POST", "/api/v4/bots", StandIn.create_bot),
    ("POST", "/api/v4/users/([a-z0-9]{26})/tokens", StandIn.create_token),
    ("GET", "/api/v4/users/([a-z0-9]{26})/tokens", StandIn.get_tokens),
    ("GET", "/api/v4/teams/name/([a-z0-9-]+)", StandIn.get_team_by_name),
    ("POST", "/api/v4/teams/([a-z0-9]{26})/members", StandIn.add_team_member),
    ("GET", r"/api/v4/commands\?team_id=([a-z0-9]{26})&custom_only=true", StandIn.get_commands),
    ("POST", "/api/v4/commands", StandIn.create_command),
    ("PUT", "/api/v4/commands/([a-z0-9]{26})", StandIn.update_command),
]]
WITHOUT_TOKEN = ("/api/v4/config/client", "/api/v4/actions/dialogs/open", "/hooks/commands/",
                 "/api/v4/users/login", "/api/v4/users/logout")
OF_ADMINS = ("/api/v4/users/", "/api/v4/config", "/api/v4/bots", "/api/v4/teams/",
             "/api/v4/commands")


class StandInHandler(http.server.BaseHTTPRequestHandler):
    """Answers on kept connections, as Mattermost does, each time in one write."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # as Go does; else each new TLS connection costs 40 ms
    timeout = 10

    def respond(self):
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.removeprefix(self.server.sub_path)
        call = f"{self.command} {path.partition('?')[0].removeprefix('/api/v4')}"
        stand_in = self.server
        with stand_in.lock:
            stand_in.calls.append(call)
            stand_in.bodies.append(self.body(text))
            self.exchange = ["the service asks Mattermost", call, stand_in.bodies[-1], "no answer"]
            stand_in.wire.append(self.exchange)
            behave = next((script.popleft() for wanted, script in stand_in.scripts.items()
                           if script and is_call(wanted, call)), None)
            if not behave and stand_in.failure and call.startswith(stand_in.failure[0]):
                behave = stand_in.failure[1]
        if behave:
            behave(self, lambda: self.work(path, text))
        else:
            self.reply(*self.work(path, text))

    do_GET = do_POST = do_PUT = respond

    def body(self, text):
        if len(text) > 300_000:
            return None
        if text and (b"\\u" in text or self.headers.get("Content-Type") != "application/json"):
            self.server.complain("a body that is not JSON in UTF-8 without escapes")
        if text and "Python" in self.headers.get("User-Agent", "Python"):
            self.server.complain("a User-Agent that bot lists refuse")
        return json.loads(text) if text else None

    def work(self, path, text):
        """Return status and payload of the real answer."""
        stand_in = self.server
        try:
            if len(text) > 300_000:
                raise Failure(413, "api.context.request_body_too_large.app_error")
            with stand_in.lock:
                stand_in.caller = stand_in.who_has(self.headers["Authorization"])
                if not stand_in.caller and not path.startswith(WITHOUT_TOKEN):
                    raise Failure(401, "api.context.session_expired.app_error")
                if stand_in.caller == ADMIN and not path.startswith(OF_ADMINS):
                    stand_in.complain("an admin's session is for what only an admin may do")
                for method, pattern, answer in ROUTES:
                    match = re.fullmatch(pattern, path)
                    if match and method == self.command:
                        return answer(stand_in, json.loads(text) if text else None, *match.groups())
            raise Failure(404, "api.context.404.app_error")
        except Failure as failure:
            return error_answer(*failure.args, self.exchange[1])

    def reply(self, status, payload, **headers):
        self.exchange[3] = status
        plain = isinstance(payload, str)
        body = (payload if plain else json.dumps(payload)).encode()
        lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}",
                 f"Content-Type: {'text/plain' if plain else 'application/json'}",
                 f"X-Version-Id: {self.server.version}"]
        if status == 200 and self.exchange[1] == "POST /users/login":
            headers["Token"] = self.server.session
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        lines += [] if self.server.keeps else ["Connection: close"]
        self.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

    def write(self, answer):
        self.close_connection = b"\r\nConnection: close\r\n" in answer
        self.wfile.write(answer)

    def log_message(self, *_):
        pass


def error_answer(status, error_id, call):
    """Return an answer with Mattermost's error object; only for a post may its words be logged."""
    words = "The post\nwas refused." if call == "POST /posts" else "Failed to handle hookhookhook."
    return status, {"id": error_id, "message": words, "detailed_error": "hookhookhook",
                    "request_id": new_id(), "status_code": status}


# What the stand-in can be scripted to do instead: each takes the handler and the real work

def fails(status, error_id="", **headers):
    """Answer with an error, and do nothing."""
    return lambda handler, _: handler.reply(
        *error_answer(status, error_id, handler.exchange[1]), **headers)


def says(answer):
    """Answer with these bytes, do nothing, and close the connection."""
    def behave(handler, _):
        handler.write(answer)
        handler.close_connection = True
    return behave


def http_answer(status, body, headers=b""):
    """Answer with this body, do nothing, and close the connection."""
    return says(b"HTTP/1.1 %d X\r\n%sConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                % (status, headers, len(body), body))


def slow(seconds):
    """Answer as usual, but later."""
    def behave(handler, work):
        time.sleep(seconds)
        handler.reply(*work())
    return behave


def waits(gate):
    """Answer as usual, but only when a gate is open."""
    def behave(handler, work):
        gate.wait(30)
        handler.reply(*work())
    return behave


def drips(gate, beginning=b"HTTP/1.1 201 X\r\nX: "):
    """Do as asked, begin to answer, go on byte by byte, and give up at last, or at an open gate."""
    def behave(handler, work):
        work()
        written = 0
        with contextlib.suppress(OSError):
            handler.write(beginning)
            while not gate.wait(0.01) and (written := written + 1) < 1000:
                handler.write(b"a")
        handler.close_connection = True
    return behave


def body_drips(gate):
    """Do the same, but for the head of the answer, which comes at once."""
    return drips(gate, b"HTTP/1.1 201 X\r\nContent-Length: 9999\r\n\r\n")


def resets(connection):
    """Close a connection so that the other side sees a reset."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def hangs_up(handler, _):
    """Close the connection without an answer, and do nothing."""
    handler.close_connection = True


def holds(gate, reached, does):
    """Do as asked, or do not; say so, and close the connection only when a gate is open."""
    def behave(handler, work):
        if does:
            work()
        reached.set()
        gate.wait(30)
        handler.close_connection = True
    return behave


def loses_the_answer(handler, work):
    """Do as asked, and close the connection without an answer."""
    work()
    handler.close_connection = True


def cuts_the_answer(handler, work):
    """Do as asked, and close the connection in the middle of the answer."""
    status, payload = work()
    body = json.dumps(payload).encode()
    handler.write(b"HTTP/1.1 %d X\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body[:-7]))
    handler.close_connection = True


def closes(handler, work):
    """Answer as usual, and close the connection."""
    handler.reply(*work(), Connection="close")


# --------------------------------------------------------------------- what can be in the way

TYPED = "typed: disk is full\non `vm-042`"
ODD_ANSWERS = {
    "an error": fails(500, "app.post.save.app_error"),
    "too many requests": fails(429, Retry_After="60"),
    "a proxy without a server": http_answer(502, b"<h1>Bad Gateway"),
    "a redirect": http_answer(302, b"", b"Location: http://127.0.0.1:9/\r\n"),
    "a page": http_answer(200, b"<html>"),
    "a list": http_answer(200, b"[]"),
    "nesting": http_answer(200, b"[" * 20_000),
    "nested words": http_answer(400, b'{"id":' * 20_000),
    "no body": http_answer(200, b""),
    "no HTTP": says(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "half an answer": says(b"HTTP/1.1 201 X\r\nContent-Length: 99\r\n\r\n{"),
    "too much": http_answer(201, b" " * (2**20 + 1)),
    "no answer": hangs_up,
}


def sentence_after(what, again):
    """Return what a person reads after one of ODD_ANSWERS."""
    if what in ("a redirect", "nested words"):
        return ticket_service.IN_BETWEEN.format(status=302 if what == "a redirect" else 400)
    if what in ("a page", "a list", "nesting", "no body"):
        return ticket_service.IN_PLACE
    return again


class CommandTest(Case):
    """What goes wrong between the command and the dialog."""

    def assert_given_back(self, text, sentence):
        given_back = ticket_service.given_back(sentence, TYPED)["text"]
        self.assertEqual(text, given_back)
        self.assertTrue(text.endswith(f"\n```\n{TYPED}\n```"), text)

    def test_a_wrong_token_is_refused_and_nothing_is_called(self):
        form = self.mattermost.command_form(ALICE, HELPDESK, "")
        del form["token"]
        for changes in ({}, *({"token": token} for token in (
                "", "wrong", SLASH_TOKEN[:-1], SLASH_TOKEN.upper(), "пароль", f'"{SLASH_TOKEN}"',
                b"\xed\xa0\x80"))):
            with self.subTest(changes):
                self.log.lines.clear()
                status, answer, headers = self.post(
                    "/ticket", urllib.parse.urlencode({**form, **changes}))
                self.assertEqual((status, list(answer)), (401, ["error"]))
                self.assertEqual(headers.get_content_type(), "application/json")
                self.assert_logged("WARNING .* 401 SLASH_TOKEN ")
        self.assertEqual(self.mattermost.calls, [])

    def test_a_command_without_its_fields_is_refused(self):
        form = self.mattermost.command_form(ALICE, HELPDESK, "")
        for field, value in (("user_id", "../x"), ("channel_id", ""), ("user_name", "a b\n"),
                             ("trigger_id", "")):
            with self.subTest(field):
                body = urllib.parse.urlencode({**form, field: value})
                self.assertEqual(self.post("/ticket", body)[0], 400)

    def test_a_good_channel_is_looked_at_once_and_again_when_it_is_gone(self):
        self.mattermost.run_command()
        self.mattermost.calls.clear()
        self.mattermost.run_command()
        self.assertEqual(self.mattermost.calls, ["POST /actions/dialogs/open"])
        self.mattermost.script("POST /posts", fails(404, "app.channel.get.existing.app_error"))
        self.mattermost.submit_dialog(answers_to())
        self.mattermost.run_command()
        self.assertIn(f"GET /channels/{HELPDESK}", self.mattermost.calls)

    def test_where_the_bot_can_t_post_it_says_so_before_the_form(self):
        unseen = "x" * 26
        self.mattermost.channels[unseen[:-1] + "d"] = Channel("its-own", "D", members=(ALICE, BOT))
        for channel_id, obstacle, elsewhere, changes in (
                (SECRET, "not a member", "not a member", {}),
                (OTHERS, "not a member", "not a member", {}),
                (DIRECT, "direct", "direct", {}), (unseen[:-1] + "d", "direct", "direct", {}),
                (ARCHIVED, "archived", "archived", {}), (unseen, "", "unknown", {}),
                (OTHERS, "not in the team", "not a member", {"teams": []}),
                (SECRET, "not in the team", "not a member", {"teams": []}),
                *((channel_id, "read only", "read only", {"permissions": {
                    "channel_user": ["edit_post"], "team_user": [], "system_user": []}})
                  for channel_id in (HELPDESK, QUIET))):
            changes = {"version": "11.6.0", **changes}  # for patch(), which wants at least one
            with (self.subTest(obstacle, channel_id=channel_id),
                  unittest.mock.patch.multiple(self.mattermost, **changes)):
                if obstacle:
                    self.start_service()
                    self.assert_given_back(self.mattermost.run_command(
                        TYPED, channel_id=channel_id), cant_post(obstacle))
                self.start_service(TICKET_CHANNEL=channel_id)
                self.assert_given_back(
                    self.mattermost.run_command(
                        TYPED, channel_id=QUIET if channel_id == HELPDESK else HELPDESK),
                    ticket_service.CANT_POST_ELSEWHERE.format(bot="ticket-bot"))
                self.assert_logged(f"TICKET_CHANNEL: {channel_id}: "
                                   f"{re.escape(cant_post(elsewhere, 'admin'))}$")
        self.start_service()
        self.mattermost.teams = []
        self.mattermost.script("GET /users/me/teams", fails(503))  # it may be in that team
        self.assert_given_back(self.mattermost.run_command(TYPED, channel_id=SECRET),
                               cant_post("not a member"))
        self.start_service(BOT_TOKEN="wrong")
        self.assert_given_back(self.mattermost.run_command(TYPED), ticket_service.BAD_TOKEN)
        self.assertEqual(self.mattermost.dialogs, [])

    def test_where_the_bot_can_post_the_form_opens(self):
        everywhere = {"roles": "system_user system_post_all"}
        in_public = {"roles": "system_user system_post_all_public"}
        no_member = {"channel_user": [], "system_user": [], "team_user": []}
        not_joined = [fails(*NO_PERMISSION)]
        for channel_id, changes, script in (
                (SECRET, everywhere, []), (DIRECT, everywhere, []), (QUIET, everywhere, not_joined),
                (QUIET, in_public, not_joined),
                (HELPDESK, {"permissions": {**no_member, "team_user": ["create_post"]}}, []),
                (QUIET, {"permissions": {**no_member, "system_user": ["create_post_public"]}}, [])):
            with (self.subTest(changes, channel_id=channel_id),
                  unittest.mock.patch.multiple(self.mattermost, **changes)):
                self.start_service()
                self.mattermost.script("POST /channels/", *script)
                self.assertEqual(self.mattermost.run_command(channel_id=channel_id), "")
        self.mattermost.roles = in_public["roles"]
        self.assertEqual(self.mattermost.run_command(channel_id=SECRET), cant_post("not a member"))

    def test_rights_that_can_t_be_read_are_no_false_alarm(self):
        role = {"name": "channel_user", "permissions": []}
        for what, behave in {
                "null": http_answer(200, b"null"), "nothing known": http_answer(200, b"[]"),
                "numbers": http_answer(200, b"[1]"), "no permission": fails(*NO_PERMISSION),
                "one of three": http_answer(200, json.dumps([role]).encode()),
                "odd permissions": http_answer(200, json.dumps([
                    {"name": name, "permissions": 7}
                    for name in ("channel_user", "system_user", "team_user")]).encode())}.items():
            with self.subTest(what):
                self.start_service()
                self.mattermost.script("POST /roles/names", behave)
                self.assertEqual(self.mattermost.run_command(), "")
        for call in ("GET /teams/", "GET /channels/"):
            self.start_service()
            self.mattermost.script(call, *[http_answer(200, b'{"roles": null}')] * 2)
            self.assertEqual(self.mattermost.run_command(), "")

    def test_after_an_invitation_it_works_and_a_public_channel_needs_none(self):
        self.mattermost.run_command(channel_id=SECRET)
        self.mattermost.channels[SECRET].members.add(BOT)
        for channel_id in (SECRET, QUIET):
            self.assertEqual(self.mattermost.run_command(channel_id=channel_id), "")
            self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
            self.assertIn(BOT, self.mattermost.channels[channel_id].members)
        self.assertEqual([root["channel_id"] for root in self.mattermost.roots()], [SECRET, QUIET])

    def test_what_is_not_mattermost_is_not_taken_for_it(self):
        for path in ("/api/v4/x", "/x"):  # as its API answers, and as another program does
            self.start_service(MATTERMOST_URL=self.mattermost.url + path)
            self.mattermost.script("POST /x/api/v4/actions/", http_answer(404, b"<h1>Not found"))
            self.assert_given_back(self.mattermost.run_command(TYPED),
                                   ticket_service.IN_BETWEEN.format(status=404))
            self.assert_logged(r"127\.0\.0\.1:\d+ answered 404, but not as Mattermost")

    def test_a_channel_that_can_t_be_looked_at_does_not_stop_the_form(self):
        self.mattermost.keeps = False
        for what, behave in ODD_ANSWERS.items():
            with self.subTest(what):
                self.mattermost.calls.clear()
                self.mattermost.script("GET /channels/", behave)
                self.assertEqual(self.mattermost.run_command(), "")
                self.assertEqual(self.mattermost.run_command(), "")  # and is looked at again
                self.assertEqual(self.mattermost.calls.count(f"GET /channels/{HELPDESK}"), 2)
                self.start_service()

    def test_a_dialog_that_can_t_be_opened_gives_the_text_back(self):
        for what, behave in ODD_ANSWERS.items():
            with self.subTest(what):
                self.mattermost.script("POST /actions/", behave)
                self.assert_given_back(self.mattermost.run_command(TYPED), sentence_after(
                    what, ticket_service.FORM_NOT_OPENED))
        self.mattermost.script("POST /actions/", fails(400, "api.context.invalid_body_param.app_e"))
        self.assert_given_back(self.mattermost.run_command(TYPED), ticket_service.FORM_REFUSED)
        self.mattermost.script("POST /actions/", fails(400, TRIGGER_EXPIRED))
        self.assert_given_back(self.mattermost.run_command(TYPED), ticket_service.FORM_LATE)
        self.mattermost.script("POST /actions/", fails(500))
        text = "````\n<!channel> @all ```` ``"
        self.assertIn(f"\n`````\n{text}\n`````", self.mattermost.run_command(text))

    def test_a_mattermost_that_is_down_gives_the_text_back(self):
        self.start_service(MATTERMOST_URL="http://127.0.0.1:9")
        self.limit(haste=0)
        self.assert_given_back(self.mattermost.run_command(TYPED), ticket_service.FORM_NOT_OPENED)
        self.assert_logged("WARNING .*no answer of 127.0.0.1:9: ConnectionRefusedError")
        self.assert_nothing_was_done()

    def look_up(self, look_up):
        """Start a service whose Mattermost has a name that is looked up like this."""
        # The only patch: a name server can't be stood in for without rights.
        known = socket.getaddrinfo
        socket.getaddrinfo = lambda host, *details, **more: (
            look_up if host == "mattermost.test" else known)(host, *details, **more)
        self.addCleanup(setattr, socket, "getaddrinfo", known)
        self.start_service(MATTERMOST_URL=f"http://mattermost.test:{self.mattermost.server_port}")

    def test_a_name_server_that_says_nothing_is_not_waited_for(self):
        gate = self.gate()

        def says_nothing(*_, **__):
            gate.wait(30)
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

        self.look_up(says_nothing)
        self.limit(haste=0, answer_within=0.04)
        self.assert_given_back(self.mattermost.run_command(TYPED), ticket_service.FORM_NOT_OPENED)
        self.service.follow_up_within = 0
        self.service.shutdown()  # which does not wait for it either
        self.assertFalse(gate.is_set())
        gate.set()
        self.assert_logged("WARNING POST /ticket, after a late answer: ")

    def test_a_mattermost_whose_first_address_is_dead_is_reached_at_the_next(self):
        silent = socket.create_server(("127.0.0.2", self.mattermost.server_port), backlog=0)
        self.addCleanup(silent.close)
        for _ in range(2):  # from then on, nobody is let in
            client = socket.socket()
            client.setblocking(False)
            self.addCleanup(client.close)
            client.connect_ex(silent.getsockname())
        self.look_up(lambda host, port, *_, **__: [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))
            for address in ("127.0.0.2", "127.0.0.1")])
        self.limit(timeout=0.2)
        for number in (1, 2):
            self.assertEqual(self.mattermost.run_command(), "")
            self.assertEqual(len(self.mattermost.dialogs), number)

    def test_a_redirect_is_not_followed_and_its_target_is_in_the_log(self):
        elsewhere = self.start_stand_in()
        path = "/api/v4/actions/dialogs/open"
        nowhere = "is MATTERMOST_URL right?$"
        for location, logged in (
                (f"{elsewhere.url}/login?next=typed#x", f"it leads to {elsewhere.url}/login$"),
                (f"https://me:typed@mm.test/chat{path}?typed=1",
                 f"it leads to https://mm.test/chat{path}$"),
                (path + "/", f"it leads to {self.mattermost.url}{path}/$"),
                (f"ftp://mm.test/a b{path}", f"it leads to ftp://mm.test/a b{path}$"),
                *((to, nowhere) for to in (
                    "http://[", "", "?a=b", f"{self.mattermost.url}{path}", path)),
                ("https://mm.test/" + "x" * 9999, "it leads to https://mm.test/xxx")):
            with self.subTest(location[:50]):
                self.log.lines.clear()
                self.mattermost.script("POST /actions/", http_answer(
                    307, b"", f"Location: {location}\r\n".encode()))
                self.mattermost.run_command()
                self.assert_logged("307, but not as Mattermost does: "
                                   f"{re.escape(logged[:-1])}{logged[-1]}")
                self.assertLess(max(map(len, self.log.lines)), 600)
        self.assertEqual(elsewhere.calls, [])
        self.mattermost.script("POST /hooks/", http_answer(
            302, b"", b"Location: https://mm.test/hookhookhook\r\n"))  # which is not logged
        self.file()
        self.assert_logged("response hook: .* answered 302")

    def test_text_that_fits_into_the_form_stands_there_whole(self):
        for text in ("é" * 10_000, '"\n' * 4000 + "x", "\U0001f4be" * 10_000):
            with self.subTest(text[0]):
                self.assertEqual(self.mattermost.run_command(text), "")
                self.assertEqual(self.prefilled()["problem"], text)

    def test_text_that_does_not_fit_into_the_form_is_given_back(self):
        wide = {"title": "T", "introduction_text": "i" * 280_000,
                "elements": [element("textarea", "problem", max_length=16_000)]}
        narrow = form_of(element("textarea", "problem", max_length=10_000))
        for form, text, least in ((narrow, "x" * 10_001, 10_000),
                                  (wide, '"' * 8000, 4900), (wide, "\U0001f4be" * 8000, 1200)):
            with self.subTest(text[0]):
                self.start_with_form(form)
                self.assertIn(f"```\n{text}\n```", self.mattermost.run_command(text))
                self.assertTrue(text.startswith(default := self.prefilled()["problem"]))
                self.assertGreaterEqual(len(default), least)


class SubmissionTest(Case):
    """What goes wrong between the dialog and the ticket."""

    def assert_refused(self, answer, sentence):
        self.assertEqual(list(answer), ["error"])
        self.assertEqual(answer["error"], sentence)

    def start_behind_proxy(self, url, proxy):
        """Start a service that asks a proxy for a Mattermost at a URL."""
        scheme = url.partition(":")[0]
        ca_file = Path(self.enterContext(tempfile.TemporaryDirectory())) / "ca.pem"
        ca_file.write_text(CERTIFICATES)
        for name, value in ((f"{scheme}_proxy", proxy), ("no_proxy", "*.test")):
            os.environ[name] = value
            self.addCleanup(os.environ.pop, name, "")
        self.start_service(MATTERMOST_URL=url, SSL_CERT_FILE=str(ca_file))
        self.limit(haste=0.05)

    def test_a_proxy_that_was_asked_is_named(self):
        for url in ("http://mattermost.test", "https://mattermost.test"):
            self.start_behind_proxy(url, "http://me:secret@127.0.0.1:9")
            self.mattermost.run_command()
            self.assert_logged(
                r"mattermost\.test \(through the proxy 127\.0\.0\.1:9: is NO_PROXY meant\?\)")
        self.assertNotIn("secret", "".join(self.log.lines))
        self.start_behind_proxy(self.mattermost.url, " ")  # which is none
        self.assertEqual(self.mattermost.run_command(), "")

    def test_a_proxy_that_refuses_is_told_and_gets_nothing_in_the_clear(self):
        for status, sentence in ((403, ticket_service.IN_BETWEEN.format(status=403)),
                                 (503, ticket_service.FORM_NOT_OPENED)):
            asked = []

            def refuse(handler, status=status, asked=asked):
                asked.append((handler.command, handler.headers["Authorization"]))
                handler.send_error(status)

            proxy = http.server.HTTPServer(("127.0.0.1", 0), type(
                "Refusing", (http.server.BaseHTTPRequestHandler,), {
                    "do_CONNECT": refuse, "do_GET": refuse, "do_POST": refuse,
                    "log_message": lambda *_: None}))
            self.addCleanup(proxy.server_close)
            thread = threading.Thread(target=proxy.serve_forever, args=(0.001,))
            thread.start()
            self.addCleanup(thread.join)
            self.addCleanup(proxy.shutdown)
            self.start_behind_proxy(
                "https://mattermost.test", f"http://127.0.0.1:{proxy.server_port}")
            self.assertEqual(self.mattermost.run_command(), sentence)
            self.assert_nothing_was_done()
            self.assertEqual(set(asked), {("CONNECT", None)})

    def test_what_an_answer_means_is_told_and_a_second_press_works(self):
        self.mattermost.keeps = False
        self.limit(patience=0)
        again, page = ticket_service.NOT_REACHED, b"<html>Forbidden: /etc/passwd"
        refused, in_between = ticket_service.NOT_ACCEPTED, ticket_service.IN_BETWEEN

        def error(error_id, message):
            return json.dumps({"id": error_id, "message": message}).encode()

        for behave, sentence, may_have_worked, logged in (
                *[(behave, sentence_after(what, again), what not in (
                    "too many requests", "a redirect", "nested words"), "")
                  for what, behave in ODD_ANSWERS.items()],
                *[(http_answer(status, page), again, status >= 500, f" answered {status}$")
                  for status in (408, 429, 500, 501, 502, 503, 504, 511, 520, 522, 530, 599)],
                *[(http_answer(status, page), in_between.format(status=status), False,
                   f" answered {status}, but not as")
                  for status in (301, 307, 400, 401, 403, 404, 418, 451)],
                *[(http_answer(status, page), ticket_service.IN_PLACE, True, ", but not as")
                  for status in (200, 201)],
                (http_answer(500, error("", "Internal Server Error")), again, True, "500"),
                (fails(500, "app.post.save.app_error"), again, True, "500 app.post.save.app_error"),
                (fails(404, "api.context.404.app_error"), in_between.format(status=404), False, ""),
                (fails(401, "api.context.session_expired.app_error"), ticket_service.BAD_TOKEN,
                 False, "401"),
                (http_answer(400, error("x", 7)), refused, False, "400 x$"),
                (http_answer(400, error("Rejected by plugin. No swearing", "No\nswearing")),
                 ticket_service.REJECTED.format(reason="No swearing"), False, "400: No swearing$"),
                (http_answer(400, error("x", "no " * 500)),
                 ticket_service.REJECTED.format(reason=("no " * 500)[:300]), False, "400 x: no"),
                *[(fails(*why), ticket_service.TOO_LONG_THERE, False, str(why[0])) for why in (
                    TOO_LONG, (400, "model.post.is_valid.msg.app_error"),
                    (413, "api.context.request_body_too_large.app_error"))]):
            with self.subTest(logged, sentence=sentence):
                before = len(self.mattermost.roots())
                self.log.lines.clear()
                self.mattermost.bodies.clear()
                self.mattermost.calls.clear()
                self.mattermost.run_command()
                self.mattermost.script("POST /posts", behave)
                self.assert_refused(self.mattermost.submit_dialog(answers_to()), sentence)
                self.assert_logged(f"WARNING .*{logged}")
                self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
                looks = f"GET /channels/{HELPDESK}/posts" in self.mattermost.calls
                self.assertEqual(looks, may_have_worked)
                self.assertEqual(len(self.mattermost.roots()), before + 1)
                self.replies(before + 1)
                self.assertEqual(len({body["props"]["ticket_id"] for body in self.mattermost.made(
                    "POST /posts") if not body["root_id"]}), 1)

    def test_a_mattermost_that_comes_back_in_time_gets_the_ticket_at_the_first_press(self):
        gate = self.gate()

        def opens_the_gate(handler, _):  # as one that is hardened, and still at it
            handler.reply(500, {"id": "", "message": "Internal Server Error"})
            gate.set()

        def restarts(handler, work):
            loses_the_answer(handler, work)
            self.mattermost.pending.clear()

        pending = fails(500, "api.post.deduplicate_create_post.pending")
        for behaviours in (
                [fails(503)], [hangs_up], [pending, pending], [http_answer(522, b"<html>")],
                [loses_the_answer], [cuts_the_answer], [restarts],
                [fails(429), restarts, fails(502)], [waits(gate), opens_the_gate]):
            with self.subTest(behaviours):
                before = len(self.mattermost.roots())
                self.mattermost.run_command()
                self.mattermost.script("POST /posts", *behaviours)
                self.limit(timeout=0.2 if opens_the_gate in behaviours else 5)
                self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
                self.assertEqual(len(self.mattermost.roots()), before + 1)
                self.replies(before + 1)

    def test_a_busy_mattermost_is_asked_again_when_it_says(self):
        waited = []
        self.instead_of_pauses(waited.append)
        for text, seconds in (
                ("7", 7), ("19", 19), ("21", None), ("9" * 400, None), ("9" * 5000, None),
                *[(odd, 0.01) for odd in (
                    "0", "-1", "1e9", "nan", "inf", "\u0661", "Fri, 31 Dec 1999 23:59:59 GMT", "",
                    "soon")]):
            with self.subTest(text[:40]):
                waited.clear()
                self.mattermost.run_command()
                self.mattermost.script("POST /posts", fails(429, Retry_After=text))
                answer = self.mattermost.submit_dialog(answers_to())
                if seconds:
                    self.replies(len(self.mattermost.roots()))  # else one got the 429
                    self.assertEqual((answer, waited), ({}, [seconds]))
                else:
                    self.assert_refused(answer, ticket_service.NOT_REACHED)

    def test_a_ticket_that_mattermost_made_before_it_went_down_is_found(self):
        def goes_down(handler, work):
            work()
            self.mattermost.shutdown()
            self.mattermost.server_close()
            handler.close_connection = True

        self.limit(patience=0)
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", goes_down)  # on a kept connection
        self.assert_refused(self.mattermost.submit_dialog(answers_to()), ticket_service.NOT_REACHED)
        self.mattermost = self.start_again()
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertEqual(len(self.mattermost.roots()), 1)

    def test_what_was_changed_after_a_lost_answer_is_not_lost(self):
        self.limit(patience=0)
        self.mattermost.keeps = False
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", loses_the_answer)
        self.mattermost.submit_dialog(answers_to(mark="typed at first,"))
        then = answers_to(mark="typed then,")
        self.mattermost.script("POST /posts", loses_the_answer)
        self.assert_refused(self.mattermost.submit_dialog(then), ticket_service.NOT_REACHED)
        [root] = self.mattermost.roots()
        self.mattermost.script("POST /posts", fails(400, "model.post.is_valid.props.app_error"))
        self.assert_refused(self.mattermost.submit_dialog(then), ticket_service.NOT_ADDED.format(
            ticket_id=root["props"]["ticket_id"]))
        for _ in range(2):
            self.assertEqual(self.mattermost.submit_dialog(then), {})
        [root] = self.mattermost.roots()
        self.assertEqual(root["props"]["ticket"]["answers"], answers_to(mark="typed at first,"))
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual(len(self.mattermost.replies()), 2)
        changed = self.mattermost.replies()[0]
        self.assertTrue(changed["message"].startswith(
            ticket_service.SUBMITTED_AGAIN.format(by="alice")))
        self.assertIn("typed then,", changed["message"])

    def test_a_ticket_is_made_after_a_restart_and_its_confirmation_falls_back(self):
        for roles, number in (("system_user", 0), ("system_user system_admin", 1)):
            self.mattermost.roles = roles
            self.mattermost.run_command()
            self.start_service()
            self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
            self.replies(number + 1)
            self.assertEqual([person for *person, _ in self.mattermost.ephemeral],
                             [[ALICE, HELPDESK]] * number)
        self.assertEqual(len(self.mattermost.roots()), 2)
        self.assert_logged("ticket=.* response hook: not known any more")
        self.assert_logged("WARNING ticket=.* user=alice.*403")

    def fill_channel(self, number, characters):
        """Let a channel have so many posts."""
        post = next(iter(self.mattermost.posts.values()))
        for index in range(number):
            post_id = f"{index:026}"
            self.mattermost.posts[post_id] = {
                **post, "id": post_id, "message": "a" * characters, "props": {}}

    def test_where_mattermost_may_not_list_all_posts_no_second_ticket_is_made(self):
        self.lose_the_ticket()
        self.fill_channel(1000, 10)
        self.mattermost.posts.pop(next(iter(self.mattermost.posts)))
        self.start_service()
        self.assert_refused(self.mattermost.submit_dialog(answers_to()), ticket_service.NOT_KNOWN)

    def test_a_bot_that_can_t_look_for_a_ticket_makes_no_second_one(self):
        for number, refuses in enumerate((
                fails(*NO_PERMISSION), fails(401, "api.context.session_expired.app_error"),
                http_answer(403, b"<html>"), http_answer(200, b"<html>"),
                http_answer(302, b"", b"Location: /login\r\n")), 1):
            self.mattermost.run_command()
            self.mattermost.script("POST /posts", loses_the_answer)
            self.mattermost.script(f"GET /channels/{HELPDESK}/posts", refuses)
            answer = self.mattermost.submit_dialog(answers_to())
            root = self.mattermost.roots()[-1]
            self.assert_refused(answer, ticket_service.NOT_KNOWN_BY_ID.format(
                ticket_id=root["props"]["ticket_id"]))
            self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
            self.assertEqual(len(self.mattermost.roots()), number)
            self.replies(number)

    def lose_the_ticket(self):
        """Submit a dialog whose ticket is made, but whose answer is lost for good."""
        self.limit(patience=0)
        self.mattermost.keeps = False
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", loses_the_answer)
        self.assert_refused(self.mattermost.submit_dialog(answers_to()), ticket_service.NOT_REACHED)
        self.mattermost.pending.clear()
        return self.mattermost.roots()[0]

    def test_a_ticket_whose_answer_was_lost_is_found_whatever_is_in_its_channel(self):
        def is_copied(lost):
            for post_id in ("a" * 26, "z" * 26):
                self.mattermost.posts[post_id] = {**lost, "id": post_id, "user_id": BOB}
            self.mattermost.posts = dict(sorted(self.mattermost.posts.items()))

        for what, happens, is_found in (
                ("nothing else", lambda lost: None, True), ("a copy of its props", is_copied, True),
                ("many long posts", lambda lost: self.fill_channel(100, 16_000), True),
                ("somebody else's", lambda lost: lost.update(user_id=ALICE), False),
                ("it was deleted", lambda lost: lost.update(delete_at=1), False)):
            for restarts in (False, True):
                with self.subTest(what, restarts=restarts):
                    self.mattermost.posts.clear()
                    lost = self.lose_the_ticket()
                    happens(lost)
                    if restarts:
                        self.start_service()
                    self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
                    [reply] = self.replies()
                    self.assertEqual(reply["root_id"] == lost["id"], is_found)
                    self.assertIn(self.mattermost.posts[reply["root_id"]]["props"]["ticket_id"],
                                  str(self.mattermost.ephemeral) + str(self.log.lines))

    def test_a_ticket_is_found_in_a_busy_channel_and_gets_no_second_first_reply(self):
        self.file()
        self.replies()
        for _ in range(250):
            self.mattermost.create_post({
                "channel_id": HELPDESK, "message": "news", "pending_post_id": new_id(),
                "props": {"attachments": []}})
        before = len(self.mattermost.posts)
        self.mattermost.pending.clear()
        self.start_service(SLASH_TOKEN=f"new,{SLASH_TOKEN}")  # which remembers nothing
        in_threads(5, lambda _: self.assertEqual(self.mattermost.submit_dialog(answers_to()), {}))
        self.assert_logged("was not confirmed")
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual(len(self.mattermost.posts), before)

    def test_a_first_reply_is_made_once_whatever_is_lost(self):
        self.mattermost.roles = "system_user system_post_all"  # which may not read in the 2nd one
        for channel_id, behaviours in ((HELPDESK, [closes, loses_the_answer]), (SECRET, [])):
            self.mattermost.posts.clear()
            self.start_service()
            self.mattermost.run_command(channel_id=channel_id)
            self.mattermost.script("POST /posts", *behaviours)
            self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
            self.service.shutdown()  # which waits for what is done after the answer
            self.mattermost.roots()[0]["reply_count"] = 0  # as in a list
            self.start_service()
            self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
            self.service.shutdown()
            self.assertEqual(len(self.mattermost.posts), 2)

    def test_what_was_surely_not_done_is_done_again(self):
        for behave in (fails(429), fails(429, Retry_After="0"), http_answer(408, b"")):
            self.start_service()
            for call in ("GET /users/me", "GET /channels/", "POST /actions/", "POST /posts",
                         "POST /hooks/", "GET /posts/", "PUT /posts/"):
                self.mattermost.script(call, behave)
            self.mattermost.ephemeral.clear()
            before = len(self.mattermost.replies())
            self.assertEqual(self.file(), {})
            self.replies(before + 1)
            self.assertEqual(len(self.mattermost.ephemeral), 1)
            root = self.mattermost.roots()[-1]
            self.assertEqual(self.mattermost.press(root["id"], OPEN.steps["closed"]), "")
            self.replies(before + 2)
            self.assertEqual([call for call, script in self.mattermost.scripts.items() if script],
                             [])

    def test_a_confirmation_for_which_there_is_no_connection_waits_for_one(self):
        self.service.service.mattermost.recent_config()  # so the hook is what is called next

        def goes_down(handler, work):
            answer = work()
            self.mattermost.shutdown()
            self.mattermost.server_close()
            closes(handler, lambda: answer)

        def comes_back(_):
            if self.mattermost.socket.fileno() < 0:
                self.mattermost = self.start_again()

        self.mattermost.run_command()
        self.mattermost.script("POST /posts", goes_down)
        self.instead_of_pauses(comes_back)
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.eventually(lambda: self.mattermost.replies(), "the reply")
        self.assertEqual(len(self.mattermost.ephemeral), 1)
        self.assertEqual(len(self.mattermost.made("POST /hooks/")), 1)

    def test_a_confirmation_of_which_nobody_knows_is_made_again_once(self):
        for behave, number in ((loses_the_answer, 2), (hangs_up, 1), (cuts_the_answer, 2)):
            self.mattermost.keeps = False
            self.mattermost.ephemeral.clear()
            before = len(self.mattermost.replies())
            self.mattermost.script("POST /hooks/", behave)
            self.assertEqual(self.file(), {})
            self.replies(before + 1)
            self.assertEqual(len(self.mattermost.ephemeral), number)

    def test_a_channel_where_the_bot_can_t_post_any_more_keeps_the_form_open(self):
        secret, helpdesk = self.mattermost.channels[SECRET], self.mattermost.channels[HELPDESK]
        secret.members.add(BOT)
        for obstacle, channel_id, happens in (
                ("not a member", SECRET, lambda: secret.members.discard(BOT)),
                ("not in the team", SECRET, self.mattermost.teams.clear),
                ("archived", HELPDESK, lambda: setattr(helpdesk, "delete_at", 1))):
            with self.subTest(obstacle):
                secret.members.add(BOT)
                self.mattermost.run_command(channel_id=channel_id)
                secret.members.discard(BOT)
                happens()
                for _ in range(2):
                    self.assert_refused(
                        self.mattermost.submit_dialog(answers_to()), cant_post(obstacle))
                    self.start_service()
        self.assertEqual(self.mattermost.run_command(), cant_post("archived"))
        helpdesk.delete_at = 0
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", *[fails(*NO_PERMISSION)] * 2)
        self.assert_refused(self.mattermost.submit_dialog(answers_to()), cant_post("read only"))

    def test_a_bot_that_was_removed_or_invited_meanwhile_posts(self):
        self.mattermost.channels[SECRET].members.add(BOT)
        for channel_id in (QUIET, SECRET):
            self.mattermost.run_command(channel_id=channel_id)
            self.mattermost.channels[channel_id].members.discard(BOT)
        self.assertEqual(self.mattermost.submit_dialog(answers_to(), 0), {})
        self.assert_refused(self.mattermost.submit_dialog(answers_to(), 1),
                            cant_post("not a member"))
        self.mattermost.channels[SECRET].members.add(BOT)
        self.assertEqual(self.mattermost.submit_dialog(answers_to(), 1), {})
        self.assertEqual([root["channel_id"] for root in self.mattermost.roots()], [QUIET, SECRET])

    def test_a_failed_reply_or_confirmation_does_not_undo_the_ticket(self):
        self.limit(patience=0)
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", closes, fails(500))
        self.mattermost.script("POST /hooks/", fails(400, "web.command_webhook.general.app_error"))
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assert_logged("WARNING ticket=.* response hook: .* answered 400")
        self.assert_logged("WARNING ticket=.* was not confirmed")
        self.assert_logged("WARNING ticket=.* reply")
        self.assertEqual(len(self.mattermost.posts), 1)

    def test_our_own_bug_is_a_calm_sentence_and_a_traceback_in_the_log(self):
        self.mattermost.run_command()
        ids, self.service.service.tickets.ids = self.service.service.tickets.ids, None
        self.assert_refused(self.mattermost.submit_dialog(answers_to()), ticket_service.OUR_FAULT)
        self.assert_logged("(?s)ERROR .*Traceback.*AttributeError")
        self.service.service.tickets.ids = ids
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})

    def test_a_bug_while_a_request_is_read_does_not_close_the_dialog_either(self):
        self.mattermost.run_command()
        for inside in ("json_object", "TOKEN_FIELD_RE"):
            self.addCleanup(setattr, ticket_service, inside, getattr(ticket_service, inside))
            setattr(ticket_service, inside, None)
        for path, answer in (("/ticket/submit", "error"), ("/ticket/action", "ephemeral_text"),
                             ("/ticket", "text")):
            with self.subTest(path):
                status, said, _ = self.post(path, b"{}")
                self.assertEqual((status, said[answer]), (200, ticket_service.OUR_FAULT))
        self.assert_logged("(?s)ERROR .*Traceback.*TypeError")

    def test_a_state_that_is_not_ours_is_refused(self):
        self.mattermost.run_command()
        state = self.mattermost.dialogs[0][2]["state"]
        payload, _, signature = state.partition(".")
        fields = json.loads(base64.urlsafe_b64decode(payload))
        sent = ticket_service.State(*fields).time
        own, other = (ticket_service.Seal([token]) for token in (SLASH_TOKEN.encode(), b"x"))

        def changed(name, value):
            state = ticket_service.State(*fields)._replace(**{name: value})
            return own.sign("state", *state)

        forged = base64.urlsafe_b64encode(json.dumps([BOB, *fields[1:]]).encode()).decode()
        for what, changes in {
                "none": {"state": ""}, "null": {"state": None}, "a number": {"state": 7},
                "an object": {"state": {"a": [1]}}, "not ASCII": {"state": "\ud800é"},
                "cut": {"state": state[:-1]}, "longer": {"state": state + "A"},
                "without signature": {"state": payload},
                "forged": {"state": f"{forged}.{signature}"},
                "another key": {"state": other.sign("state", *fields)},
                "another purpose": {"state": own.sign("action", *fields)},
                "another version's": {"state": own.sign("state", *fields[:3], *fields[5:])},
                "a day old": {"state": changed("time", sent - 24 * 60 * 60 - 1)},
                "another user's": {"user": BOB}, "nobody's": {"user_id": None},
                "a look-up": {"type": "dialog_lookup"}, "a refresh": {"type": "refresh"}}.items():
            with self.subTest(what):
                answer = self.mattermost.submit_dialog(answers_to(), **changes)
                self.assertEqual(answer, {"error": ticket_service.FORM_INVALID})
        for body in ("{}", '{"type": "dialog_submission"}', '{"submission": [1], "state": true}'):
            self.assertEqual(self.post("/ticket/submit", body)[:2],
                             (200, {"error": ticket_service.FORM_INVALID}))
        self.assertEqual(self.mattermost.posts, {})
        nearly_a_day = changed("time", sent - 24 * 60 * 60 + 60)
        self.assertEqual(self.mattermost.submit_dialog(answers_to(), state=nearly_a_day), {})

    def test_a_new_bot_token_closes_no_dialog_and_a_new_slash_token_may_come_first(self):
        self.file()
        self.replies()
        closed, _ = self.mattermost.roots()[0], self.mattermost.run_command()
        self.mattermost.bot_token = "new" + BOT_TOKEN
        self.start_service(BOT_TOKEN="new" + BOT_TOKEN, SLASH_TOKEN=f"brandnew {SLASH_TOKEN}")
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertEqual(self.mattermost.press(closed["id"], OPEN.steps["closed"]), "")
        self.assertEqual(closed["props"]["ticket"]["status"], "closed")
        self.replies(3)
        self.start_service(BOT_TOKEN="new" + BOT_TOKEN, SLASH_TOKEN="brandnew")
        reopen = STATUSES["closed"].steps["open"]  # whose button the second one has signed
        self.assertEqual(self.mattermost.press(closed["id"], reopen), "")
        self.assert_refused(self.mattermost.submit_dialog(answers_to()),
                            ticket_service.FORM_INVALID)

    def test_a_dialog_is_judged_by_the_form_that_was_opened(self):
        problem, phone = element("textarea", "problem"), element("text", "phone")
        form = form_of(problem)
        self.start_with_form(form)
        self.mattermost.run_command()
        for changed in ([problem, phone], [{**problem, "name": "text"}],
                        [{**problem, "optional": True}]):
            self.start_with_form({**form, "elements": changed})
            self.assert_refused(self.mattermost.submit_dialog({"problem": "typed"}),
                                ticket_service.FORM_INVALID)
        self.start_with_form({"elements": [dict(sorted(problem.items()))], "title": form["title"]})
        self.assertEqual(self.mattermost.submit_dialog({"problem": "typed"}), {})


# ------------------------------------------------------------------------------- the buttons

HAND_OVER, EDIT = ticket_service.HAND_OVER, ticket_service.EDIT


def field(kind, name, **details):
    """Return an element of a form that is called by its name."""
    return {"type": kind, "name": name, "display_name": name.title(), **details}


def choice(kind, name, options, **details):
    """Return a choice of options, by their values: what else there is to each."""
    return field(kind, name, **details, options=[
        {"text": value.title(), "value": value, **more} for value, more in options.items()])


def form_of(*elements, **more):
    return {"title": "New ticket", "elements": list(elements), **more}


def mentions(message):
    """Return the names of those whom a message mentions."""
    return set(re.findall(r"(?<!\w)@([a-z-]+)", message))


class LifeCase(Case):
    """People who file tickets, and work with them."""

    form = form_of(field("textarea", "problem"))

    def setUp(self):
        super().setUp()
        self.start_with_form(self.form)

    def ticket(self, answers, **command):
        """File a ticket; return its post, which changes with it, when it is confirmed."""
        self.assertEqual(self.mattermost.run_command(**command), "")
        self.assertEqual(self.mattermost.submit_dialog(answers), {})
        root = next(post for post in reversed(self.mattermost.roots()) if post["user_id"] == BOT)
        self.news(root, 0)
        link = f"/_redirect/pl/{root['id']})"
        self.eventually(lambda: link in str(self.mattermost.ephemeral), "the confirmation")
        return root

    def thread(self, root_id, number=1):
        """Return what the bot has replied in a thread, when that is so much."""
        def replies():
            return [post for post in self.mattermost.replies()
                    if (post["root_id"], post["user_id"]) == (root_id, BOT)]
        self.eventually(lambda: len(replies()) >= number, "the reply")
        return replies()

    def news(self, root, number):
        """Return the messages in a ticket's thread after the first one, when they are so many."""
        return [reply["message"] for reply in self.thread(root["id"], number + 1)[1:]]

    def press(self, root, wanted, user="", **changes):
        """Let a person press what leads to a status, a menu or a form; return what they see.

        If nobody is named, Alice edits her ticket, and Bob does all else.
        """
        label = STATUSES[root["props"]["ticket"]["status"]].steps[wanted]
        user = user or (ALICE if wanted == EDIT else BOB)
        return self.mattermost.press(root["id"], label, user, **changes)

    def edit(self, root, user=ALICE, **changes):
        """Let a person edit a ticket; return what their client gets."""
        self.assertEqual(self.press(root, EDIT, user), "")
        return self.mattermost.submit_dialog({**self.prefilled(), **changes}, user=user)

    def second_line(self, root, status, by="", edited=""):
        line = STATUSES[status].line.format(status_by=by)
        return f"#{root['props']['ticket_id']} · @alice · {line}{edited}"

    def top(self, root, subject, status, by=""):
        """Return how a ticket begins."""
        return f"##### {STATUSES[status].mark} {subject}\n{self.second_line(root, status, by)}"

    def state(self, root):
        """Return all that could have changed of a ticket."""
        return root["message"], json.dumps(root["props"]["ticket"]), self.news(root, 0)


class ButtonTest(LifeCase):
    """Take, close and reopen, in the thread itself."""

    form = ticket_service.FORM

    def setUp(self):
        super().setUp()
        self.new_ticket()

    def new_ticket(self, answers=None):
        """File a ticket, the one that is meant from now on."""
        self.root = self.ticket(answers or answers_to())
        self.message = self.root["message"]

    def action(self, wanted):
        """Return the button that leads to a status."""
        status = STATUSES[self.root["props"]["ticket"]["status"]]
        return self.mattermost.buttons(self.root["id"])[status.steps[wanted]]

    def press(self, wanted, user=BOB, action=None, **changes):
        """Let a person press the button that leads to a status; return what they see."""
        return self.mattermost.press(
            self.root["id"], "", user, action=action or self.action(wanted), **changes)

    def already(self, status, user):
        return STATUSES[status].already.format(status_by=USERS[user])

    def reply(self, status, user):
        """Return what the thread is told; nobody is mentioned for what they do themselves."""
        is_reporter, name = user == ALICE, USERS[user]
        told = STATUSES[status].reply.format(by=name, taker=name if is_reporter else f"@{name}")
        return told if is_reporter else ticket_service.TELL_REPORTER.format(
            reply=told, reporter="alice")

    def assert_news(self, *news):
        """Check what the thread was told since the ticket was made."""
        self.assertEqual(self.news(self.root, len(news)), list(news))

    def assert_status(self, status, user):
        """Check all that a ticket with a status shows."""
        top, _, below = self.message.partition(self.second_line(self.root, "open"))
        self.assertEqual(self.root["message"], top.replace(
            OPEN.mark, STATUSES[status].mark) + self.second_line(
                self.root, status, USERS[user]) + below)
        self.assertIn(STATUSES[status].tag, self.root["hashtags"].split())
        ticket = self.root["props"]["ticket"]
        self.assertEqual((ticket["status"], ticket["status_by"]), (status, USERS[user]))
        self.assertAlmostEqual(ticket["status_at"], time.time() * 1000, delta=60_000)
        self.assertEqual(ticket["history"][-1], {
            "status": status, "by": USERS[user], "at": ticket["status_at"]})
        self.assertIs(self.root["props"]["is_ticket"], True)
        [attachment] = self.root["props"]["attachments"]
        self.assertEqual(attachment["color"], STATUSES[status].color)
        self.assertEqual([(action["id"], action["name"]) for action in attachment["actions"]],
                         [(status + wanted, label)
                          for wanted, label in STATUSES[status].steps.items()])

    def assert_unchanged(self, seen, sentence):
        self.assertEqual(seen, sentence)
        self.assert_status("open", ALICE)
        self.assert_news()

    def test_every_button_of_every_status_leads_on(self):
        self.assert_status("open", ALICE)
        leads_to = {status: [one for one in STATUSES[status].steps if one in STATUSES]
                    for status in STATUSES}
        people, news, walked, chance = itertools.cycle((BOB, ALICE)), [], set(), random.Random(1)
        others = {"is_pinned": True, "file_ids": [new_id()], "metadata": {"reactions": [7]}}
        self.root.update(others)  # which stay
        self.root["props"]["of_a_plugin"], status = "kept", "open"
        while len(walked) < sum(map(len, leads_to.values())):
            user = next(people)
            wanted = chance.choice(leads_to[status])
            walked.add((status, wanted))
            self.assertEqual(self.press(wanted, user), "")
            self.assert_status(wanted, user)
            news.append(self.reply(wanted, user))
            self.assert_news(*news)
            self.assert_logged(f"INFO ticket=.* status={wanted} by={USERS[user]}")
            status = wanted
        self.assertEqual(len(self.root["props"]["ticket"]["history"]), len(news) + 1)
        self.assertEqual({key: self.root[key] for key in others}, others)
        self.assertEqual(self.root["props"]["of_a_plugin"], "kept")
        for patch in self.mattermost.made("PUT /posts/"):
            self.assertEqual(set(patch), {"message", "props"})

    def test_12_presses_at_once_make_one_change_and_one_reply(self):
        presses = [(status, user, self.action(status)) for user in (ALICE, BOB)
                   for status in ("taken", "closed")] * 3
        seen = []
        self.mattermost.script("GET /posts/", *[slow(0.02)] * 5)

        def press(number):
            status, user, action = presses[number]
            seen.append((self.press(status, user, action=action, stale=True), status, user))

        in_threads(12, press)
        [(status, user)] = {(status, user) for text, status, user in seen if not text}
        self.assertEqual(sorted(text for text, *_ in seen),
                         [""] + [self.already(status, user)] * 11)
        self.assert_status(status, user)
        self.service.shutdown()  # which waits for what is done after the answer
        self.assert_news(self.reply(status, user))
        self.assertEqual(len(self.mattermost.made("PUT /posts/")), 1)

    def test_a_ticket_of_the_version_before_keeps_its_look_and_its_buttons_work(self):
        made = {"user_id": ALICE, "user_name": "alice", "answers": answers_to(),
                "created_at": 1795425075592, "nonce": "x", "status": "open", "status_by": "alice",
                "status_at": 1795425075592}
        signed = {  # by that version, with SLASH_TOKEN
            "taken": "WyJUaWNrZXQtMjAyNjExMjMtN0szRiIsIDE3OTU0MjUwNzU1OTIsICJ0YWtlbiJd."
                     "5L8SKZsJooBOvAy89GsKnJ5tyRZin9bN1pUbUeyxaWQ=",
            "closed": "WyJUaWNrZXQtMjAyNjExMjMtN0szRiIsIDE3OTU0MjUwNzU1OTIsICJjbG9zZWQiXQ=="
                      ".TwANKkFe_r1OSr03L5XQgQRvNWbcpp2Ukdak8cuplSc="}
        actions = [{"id": status, "name": name, "type": "button", "integration": {
            "url": CALLBACK_URL + "/ticket/action", "context": {"signed": signed[status]}}}
            for status, name in (("taken", "Take"), ("closed", "Close"))]
        message = ("#### #Ticket-20261123-7K3F · @alice\n{}**Problem description:**\n"
                   "> disk 🔵 is full\n> #Ticket-20261123-0000 is #ticket-open-ended")
        line = "**Status:** #ticket-open\n"
        for first, leads_on in (("taken", ("closed", "open")), ("closed", ("open", "taken"))):
            self.root = self.mattermost.add_post(BOT, HELPDESK, message.format(line), props={
                "is_ticket": True, "ticket_id": "Ticket-20261123-7K3F", "from_bot": "true",
                "ticket": made, "attachments": [{"color": "#3db887", "actions": actions}]})
            for status in (first, *leads_on):
                self.assertEqual(self.press(status), "")
                line_now = f"**Status:** {STATUSES[status].line.format(status_by='bob')}\n"
                self.assertEqual(self.root["message"], message.format(line_now))
                self.assertEqual(list(self.mattermost.buttons(self.root["id"])), [
                    name for step, name in STATUSES[status].steps.items() if step != EDIT])
            history = self.root["props"]["ticket"]["history"]
            self.assertEqual([entry["status"] for entry in history], ["open", first, *leads_on])
            self.mattermost.change(self.root, message=message.format(""))  # by hand
            self.assertEqual(self.press(HAND_OVER, selected_option=ALICE), "")
            self.assertEqual(self.root["message"], message.format(
                f"**Status:** {STATUSES['taken'].line.format(status_by='alice')}\n"))

    def test_whatever_becomes_of_the_patch_what_is_told_is_true(self):
        again, page = ticket_service.PRESS_AGAIN, b"<html>"
        for what, behaviours, patience, seen, is_made in (
                ("500 three times", [fails(500)] * 3, 20, "", True),
                ("its answer is lost", [loses_the_answer], 20, "", True),
                ("its answer is cut", [cuts_the_answer], 20, "", True),
                ("its answer is lost for good", [loses_the_answer], 0, again, True),
                ("an error", [fails(500)], 0, again, False),
                ("away", [hangs_up], 0, again, False),
                ("refused", [fails(400, "x")], 20, ticket_service.NOT_CHANGED, False),
                ("gone", [fails(404, "x")], 20, ticket_service.TICKET_GONE, False),
                ("too long", [fails(*TOO_LONG)], 20, ticket_service.TOO_LONG_TO_CHANGE, False),
                ("too much", [fails(413, "x")], 20, ticket_service.TOO_LONG_TO_CHANGE, False),
                ("archived", [fails(400, ARCHIVED_ID)], 20, ticket_service.TICKET_ARCHIVED, False),
                ("no PUT gets through", [http_answer(403, page)], 20, "", True),
                ("a page", [http_answer(200, page)], 20, ticket_service.IN_PLACE, False)):
            with self.subTest(what):
                self.start_service()
                self.new_ticket()
                self.mattermost.keeps = False
                self.limit(patience=patience)
                self.mattermost.script("PUT /posts/", *behaviours)
                self.mattermost.script("POST /posts", *[fails(503)] * (is_made and patience > 0))
                self.assertEqual(self.press("closed"), seen)
                self.assert_status(*(("closed", BOB) if is_made else ("open", ALICE)))
                self.service.shutdown()  # which waits for what is done after the answer
                self.assert_news(*[self.reply("closed", BOB)] * is_made)
                self.start_service()
                self.assertEqual(self.press("open" if is_made else "closed"), "")

    def test_where_posts_may_not_be_edited_any_more_they_can_be_changed_all_the_same(self):
        limited = {**self.mattermost.permissions, "channel_user": ["create_post"]}
        for changes in ({"edit_limit": "9.4"}, {"edit_limit": "11.6"}, {"permissions": limited}):
            with self.subTest(changes), unittest.mock.patch.multiple(self.mattermost, **changes):
                self.new_ticket()
                news = []
                for status in ("taken", "closed", "open"):
                    self.assertEqual(self.press(status), "")
                    self.assert_status(status, BOB)
                    news.append(self.reply(status, BOB))
                    self.assert_news(*news)

    def test_the_thread_is_told_only_what_has_happened(self):
        self.mattermost.edit_limit = "11.6"
        update, self.mattermost.update_post = self.mattermost.update_post, lambda *_: None
        self.assertEqual(self.press("closed"), "")
        self.assert_logged("WARNING ticket=.* was not seen to change.*status=closed by=bob")
        self.assert_unchanged("", "")

        def later(*details):
            timer = threading.Timer(0.05, update, details)
            self.addCleanup(timer.join)
            timer.start()

        self.mattermost.update_post = later
        self.service.service.changes.pauses_for_update = (0.01,) * 500
        self.mattermost.script("GET /posts/", slow(0), hangs_up, *[fails(503)] * 2)
        self.assertEqual(self.press("closed", ALICE), "")
        self.assert_news()
        self.assert_news(self.reply("closed", ALICE))
        self.assert_status("closed", ALICE)

    def test_while_mattermost_hangs_in_the_patch_a_person_is_told_and_the_thread_afterwards(self):
        for limits in ({"answer_within": 0.04}, {"timeout": 0.2, "patience": 0}):
            with self.subTest(limits):
                gate = self.gate()
                self.new_ticket()
                self.service.service.changes.pauses_for_silence = (0.01,) * 500
                self.limit(**limits)
                self.mattermost.script("PUT /posts/", waits(gate))
                self.assert_unchanged(self.press("closed"), ticket_service.PRESS_AGAIN)
                self.limit()
                gate.set()
                self.assert_news(self.reply("closed", BOB))
                self.assert_status("closed", BOB)

    def test_reads_that_lag_do_not_hide_what_has_become_of_a_ticket(self):
        take = self.action("taken")
        self.assertEqual(self.press("closed"), "")
        for seconds, patience in ((60, 0.05), (0.2, 20)):
            self.limit(patience=patience)
            self.mattermost.read_lag = seconds
            self.assertEqual(self.press("", ALICE, action=take, stale=True),
                             self.already("closed", BOB))
        self.assert_status("closed", BOB)
        self.assert_news(self.reply("closed", BOB))
        self.mattermost.read_lag = 60
        self.limit(patience=0)
        self.assertEqual(self.press("open"), ticket_service.PRESS_AGAIN)
        self.assert_status("closed", BOB)
        self.mattermost.read_lag = 0
        self.assertEqual(self.press("open"), "")

    def test_a_clock_of_mattermost_s_that_goes_back_hides_no_change(self):
        self.limit(patience=0)
        root, = self.mattermost.roots()
        for number, status in enumerate(("taken", "closed", "open", "taken"), 1):
            self.assertEqual(self.press(status), "")
            self.news(root, number)
            root["update_at"] -= 3_600_000  # as a reply by another node does, less so
        self.assertEqual(self.mattermost.press(root["id"], "Edit", ALICE), "")
        self.assertEqual(len(self.mattermost.dialogs), 2)

    def test_what_is_seen_late_hides_nothing_that_came_after_it(self):
        self.limit(patience=0)
        self.service.service.changes.pauses_for_silence = (0,)
        root, = self.mattermost.roots()
        gate, reached, old = self.gate(), threading.Event(), []

        def is_late(handler, work):
            old.append(json.loads(json.dumps(work())))
            reached.set()
            gate.wait(30)
            handler.reply(*old[0])

        self.mattermost.script("GET /posts/", lambda handler, work: handler.reply(*work()), is_late)
        self.mattermost.script("PUT /posts/", lambda handler, work: (
            work(), fails(503)(handler, work)))
        self.assertEqual(self.press("taken"), ticket_service.PRESS_AGAIN)
        self.assertTrue(reached.wait(5))
        self.assertEqual(self.press("closed"), "")
        gate.set()
        self.news(root, 2)
        self.mattermost.script("GET /posts/", lambda handler, _: handler.reply(*old[0]))
        self.assertEqual(self.press("open"), ticket_service.PRESS_AGAIN)
        self.assertEqual(self.press("open"), "")

    def test_of_a_long_ticket_no_press_is_lost(self):
        self.start_with_form(form_of(element("textarea")))
        self.mattermost.loses_big = True
        self.new_ticket({"x": "disk is full\n" * 900})
        self.assertGreater(len(self.message), 12_000)
        news = []
        for status in ("taken", "closed", "open") * 8:
            self.assertEqual(self.press(status), "")
            self.assertEqual(self.root["props"]["ticket"]["status"], status)
            self.assertIn(STATUSES[status].tag, self.root["hashtags"].split())
            news.append(self.reply(status, BOB))
            self.assert_news(*news)  # else the next one might be told first

    def test_a_button_that_is_not_ours_changes_nothing(self):
        _, _, dialog = self.mattermost.dialogs[0]
        good = self.action("closed")["integration"]["context"]["signed"]
        payload, _, signature = good.partition(".")
        own, other = (ticket_service.Seal([token]) for token in (SLASH_TOKEN.encode(), b"x"))
        fields = own.open("action", good)
        for what, changes in {
                "no context": {"context": None}, "an empty one": {"context": {}},
                "a list": {"context": [good]}, "a number": {"context": {"signed": 7}},
                "a state": {"context": {"signed": dialog["state"]}},
                "cut": {"context": {"signed": good[:-1]}},
                "unsigned": {"context": {"signed": payload}},
                "forged": {"context": {"signed": f"{payload[:-4]}AAAA.{signature}"}},
                "another key": {"context": {"signed": other.sign("action", *fields)}},
                "another version's": {"context": {"signed": own.sign("action", *fields[:2])}},
                "another ticket's": {"context": {
                    "signed": own.sign("action", "Ticket-20260101-0000", *fields[1:])}},
                "no post": {"post_id": None}, "an odd post": {"post_id": "../users/me"},
                "an odd person": {"user_name": "bob\n@all"}, "nobody": {"user_id": ""}}.items():
            with self.subTest(what):
                self.assert_unchanged(self.press("closed", **changes),
                                      ticket_service.NOT_OUR_TICKET)
        state = self.mattermost.submit_dialog(answers_to(), state=good)
        self.assertEqual(state, {"error": ticket_service.FORM_INVALID})

    def test_a_post_that_is_not_the_bot_s_or_is_odd_is_not_changed(self):
        good = json.dumps(self.root)
        for what, changes in {
                "somebody else's": {"user_id": ALICE}, "another ticket": {"ticket_id": "x"},
                "no props": {"props": None}, "a list": {"ticket": []},
                "an unknown status": {"status": "on hold"}, "a list as status": {"status": []},
                "nobody": {"status_by": None}, "two lines": {"status_by": "bob\n@all"},
                "no time": {"status_at": "now"}, "no message": {"message": None},
                "no answers": {"answers": None}, "no channel": {"channel_id": "../x"}}.items():
            with self.subTest(what):
                post = json.loads(good)
                for part in (post, post["props"], post["props"]["ticket"]):
                    part.update({key: value for key, value in changes.items() if key in part})
                self.mattermost.script("GET /posts/", http_answer(200, json.dumps(post).encode()))
                self.assert_unchanged(
                    self.press("closed"), ticket_service.UNKNOWN_STATUS.format(status="`on hold`")
                    if what == "an unknown status" else ticket_service.NOT_OUR_TICKET)

    def test_a_ticket_that_can_t_be_read_stays_as_it_is(self):
        self.mattermost.keeps = False
        self.start_service()
        self.limit(patience=0)
        for what, behave in ODD_ANSWERS.items():
            with self.subTest(what):
                self.mattermost.script("GET /posts/", behave)
                self.assert_unchanged(self.press("closed"), sentence_after(
                    what, ticket_service.PRESS_AGAIN))
        self.mattermost.script("GET /posts/", http_answer(451, b'{"id": "some.app_error"}'))
        self.assert_unchanged(self.press("closed"), ticket_service.NOT_CHANGED)
        self.mattermost.script("GET /users/me", fails(503))
        self.assert_unchanged(self.press("closed"), ticket_service.PRESS_AGAIN)
        self.mattermost.channels[HELPDESK].members.discard(BOT)
        self.assert_unchanged(self.press("closed"), ticket_service.NOT_READABLE)

    def test_a_failed_reply_does_not_undo_the_change(self):
        self.limit(patience=0)
        self.mattermost.script("POST /posts", fails(500))
        self.assertEqual(self.press("closed"), "")
        self.assert_logged("WARNING ticket=.*: the thread was not told")
        self.assert_status("closed", BOB)


# ---------------------------------------------------------------------- what a ticket looks like

HEADINGS = (  # what was typed, and what a ticket is called then
    ("disk is full\nsince nine", "disk is full"), ("__init__.py breaks", "init .py breaks"),
    ("vm_042 down", "vm_042 down"), ("\n\n   printer  on   fire", "printer on fire"),
    ("```\na log\n```\nit broke", "it broke"), ("```\na log\n```", "New ticket"),
    ("~~~\nanother", "New ticket"), ("!!!\n@@@", "New ticket"), ("!!!\nit broke", "it broke"),
    ("**bold** [link](http://x.example/a)", "bold link (http://x.example/a)"),
    ("@all #ticket-closed", "all ticket-closed"),
    ("at 10.0.0.4:443 (eth0), 50 %", "at 10.0.0.4:443 (eth0), 50 %"),
    ("Диск переполнен", "Диск переполнен"), ("القرص ممتلئ", "القرص ممتلئ"),
    ("🔥 on fire 👩\u200d💻", "🔥 on fire 👩\u200d💻"),
    ("word " * 60, " ".join(["word"] * 16) + "…"), ("x" * 100, "x" * 80 + "…"),
)
AREA, LINE = field("textarea", "what"), field("text", "vm")
SUBJECTS = (  # elements and answers; the heading, and what stands below the second line
    ([AREA, LINE], {"what": "full", "vm": "full"}, "full", "**Vm:** `full`"),
    ([AREA], {"what": " disk  is full "}, "disk is full", ""),
    ([AREA], {"what": "disk is **full**"}, "disk is full", "> disk is **full**"),
    ([AREA], {"what": "disk is full\nsince nine"}, "disk is full", "> disk is full\n> since nine"),
    ([LINE, field("bool", "too"), AREA, field("textarea", "log"), field("text", "tel")],
     {"vm": "vm-042", "too": True, "what": "a", "log": "b", "tel": "1"},
     "a", "**Vm:** `vm-042` · **Too:** `yes`\n**Log:**\n> b\n\n**Tel:** `1`"),
    ([{**AREA, "optional": True}, field("textarea", "log")], {"log": "b\nc"}, "b", "> b\n> c"),
    ([field("bool", "too"), LINE, field("text", "tel")], {"too": True, "vm": "vm-042", "tel": "1"},
     "vm-042", "**Too:** `yes` · **Tel:** `1`"),
    ([{**LINE, "optional": True}, field("text", "x")], {"x": "1"}, "New ticket", "**X:** `1`"),
    ([AREA, {**LINE, "subject": True}], {"what": "a", "vm": "vm-042"}, "vm-042", "**What:**\n> a"),
    ([AREA, field("textarea", "log", subject=True)], {"what": "a", "log": "b\nc"},
     "b", "**What:**\n> a\n\n> b\n> c"),
    ([{**AREA, "code": True}], {"what": "a:1\n  eth0"}, "a:1", "```\na:1\n  eth0\n```"),
    ([{**AREA, "code": True}], {"what": "vm-042"}, "vm-042", "```\nvm-042\n```"),
    ([{**AREA, "code": True}], {"what": "```\nvm"}, "vm", "````\n```\nvm\n````"),
    ([AREA, field("bool", "may", optional=True), field("bool", "too", optional=True)],
     {"what": "a", "may": False, "too": True}, "a", "**Too:** `yes`"),
)
BY_HAND = (  # a message with its mark and line, and what it becomes if that is not the same
    ("##### {mark} disk\n{line}\n> body", None),
    ("##### 🔵 see #ticket-closed\n##### {mark} disk\n{line}\n> body", None),
    ("##### {mark} disk\nalso #ticket-taken\n{line}\nbelow #ticket-open\n##### 🔵 more", None),
    ("# {mark} The *printer*\n{line}\n> body", None),
    ("##### no mark\n{line}\n> 🔵 body", None),
    ("##### {mark} disk\n🔵 above\n{line} by hand\n> body",
     "##### {mark} disk\n🔵 above\n{line}\n> body"),
    *((f"##### {{mark}} disk\n{status}\n> body", "##### {mark} disk\n{line}\n> body")
      for status in ("Status: #ticket-open", "> #ticket-open", "- **#Ticket-Open** (again)")),
    ("# {mark}\n\\1 is typed", "# {mark}\n{line}\n\\1 is typed"),
    ("#ticket-open first\n{line}", None),
    ("but\nsee #ticket-open.log", "but\n{line}\nsee #ticket-open.log"),
    ("##### {mark} disk\n> body", "##### {mark} disk\n{line}\n> body"),
    ("note\n##### {mark} disk", "note\n##### {mark} disk\n{line}"),
    ("all is gone", "all is gone\n{line}"),
)


class LookTest(LifeCase):
    """A ticket is called by what it is about."""

    def test_a_ticket_is_called_by_its_subject(self):
        for typed, subject in HEADINGS:
            with self.subTest(typed[:40]):
                root = self.ticket({"problem": typed})
                self.assertEqual(root["message"].split("\n")[0], f"##### 🔵 {subject}")
        for title, subject in (("**New** #ticket_ @all", "New ticket all"), ("***", "Ticket-")):
            self.start_with_form({**self.form, "title": title})
            self.assertRegex(self.ticket({"problem": "!!!"})["message"], f"^##### 🔵 {subject}")

    def test_the_subject_of_anything_typed_is_safe_by_its_alphabet(self):
        chance, form = random.Random(27), ticket_service.Form(self.form, "FORM")
        marks = [mark for mark in map(chr, range(33, 127)) if not mark.isalnum()]
        directions = "\u061c\u200e\u200f\u202a\u202e\u2066\u2067\u2068\u2069"
        pieces = [*marks * 3, *"ab7яمé🔥 \t\n", *directions, "  ", "\xa0", "snake_case",
                  "@all", "#ticket-closed", "`", "![", "](", "\n```\n", "some words " * 5]
        asked = ticket_service.State(ALICE, "alice", HELPDESK, "", 0, "", "")
        for _ in range(2000):
            typed = "".join(chance.choices(pieces, k=chance.randint(1, 30))) + "\nend"
            answers = ticket_service.Answers(form.values_in({"problem": typed}, 0), {})
            message = ticket_service.new_ticket(
                "Ticket-20261129-0000", form, answers, asked, proof="", thread_link="").message
            mark, subject = message.split("\n")[0][:8], message.split("\n")[0][8:]
            self.assertEqual(mark, "##### 🔵 ")
            self.assertLessEqual(set(subject) & {*marks, *directions},
                                 set(""".,:;?()/%+=-'"_"""), typed)
            for before, after in re.findall("(.?)_(?=(.?))", subject):
                self.assertTrue(before.isalnum() and after.isalnum(), typed)
            self.assertEqual(subject, " ".join(subject.split()), typed)
            self.assertTrue(0 < len(subject) <= 81, typed)
            self.assertEqual(hashtags(message).split()[:2],
                             ["#Ticket-20261129-0000", "#ticket-open"], typed)

    def test_a_whole_ticket_looks_like_this(self):
        self.start_with_form(form_of(
            choice("select", "cluster", {"production": {"mention": "@vsphere-oncall"}}),
            field("text", "resource", display_name="VM / resource"),
            field("textarea", "problem", display_name="Problem description"),
            field("textarea", "network", display_name="Network information", code=True),
            field("bool", "again", optional=True), mention="@helpdesk"))
        asked = self.mattermost.say(BOB, HELPDESK, "look at this")
        root = self.ticket({
            "cluster": "production", "resource": "vm-042", "network": "10.0.0.4:443",
            "problem": "disk is full since nine:\n```\n/dev/sda1   40G   40G     0 100% /var\n```\n"
                       "it was at 60 % yesterday"}, root_id=asked)
        self.assertEqual(root["message"], f"""\
##### 🔵 disk is full since nine
#{root['props']['ticket_id']} · @alice · #ticket-open
**Thread:** [where it was asked]({self.mattermost.url}/_redirect/pl/{asked})
**For:** @helpdesk
**Cluster:** `Production` @vsphere-oncall · **VM / resource:** `vm-042`
> disk is full since nine:

```
/dev/sda1   40G   40G     0 100% /var
```

> it was at 60 % yesterday

**Network information:**
```
10.0.0.4:443
```""")
        self.assertIn(f"[#{root['props']['ticket_id']}](", self.mattermost.ephemeral[-1][2])

    def test_an_answer_that_the_heading_says_whole_is_not_repeated(self):
        for elements, answers, subject, rest in SUBJECTS:
            with self.subTest(answers):
                self.start_with_form(form_of(*elements))
                root = self.ticket(answers)
                top = self.top(root, subject, "open")
                self.assertEqual(root["message"], f"{top}\n{rest}".strip())

    def test_a_reply_leaves_nothing_out(self):
        self.start_with_form(form_of(AREA, field("bool", "may", optional=True)))
        root = self.ticket({"what": "disk", "may": True})
        self.assertEqual(self.mattermost.submit_dialog({"what": "fire", "may": False}), {})
        self.assertEqual(self.news(root, 1)[0].split("\n")[1:],
                         ["**What:**", "> fire", "", f"**May:** `{ticket_service.NO}`"])

    def test_a_change_of_status_changes_the_mark_and_the_line_only(self):
        for number, (before, after) in enumerate(BY_HAND):
            with self.subTest(before):
                root = self.ticket({"problem": f"disk {number}"})
                self.mattermost.change(root, message=before.format(
                    mark=OPEN.mark, line=self.second_line(root, "open")))
                for news, status in enumerate(("closed", "open", "taken"), 1):
                    self.assertEqual(self.press(root, status), "")
                    self.assertEqual(root["message"], (after or before).format(
                        mark=STATUSES[status].mark, line=self.second_line(root, status, "bob")))
                    self.news(root, news)

    def test_a_line_that_is_put_back_is_never_among_the_answers(self):
        root = self.ticket({"problem": "```\ndf -h\n```\nsince nine"})
        top, line, body = root["message"].split("\n", 2)
        self.assertIn("#ticket-open", line)
        self.mattermost.change(root, message=body)
        self.assertEqual(self.press(root, "taken"), "")
        self.assertEqual(root["message"], f"{self.second_line(root, 'taken', 'bob')}\n{body}")
        self.assertEqual(self.edit(root, problem="solved"), {})
        self.assertIn("> solved", root["message"])

    def test_a_reply_mentions_who_has_to_know_and_nobody_for_what_they_did(self):
        root = self.ticket({"problem": "disk"})
        self.mattermost.channels[HELPDESK].members.add(CAROL)
        for number, (user, wanted, to, told) in enumerate((
                (BOB, "taken", "", {"bob", "alice"}), (ALICE, "taken", "", set()),
                (BOB, "closed", "", {"alice"}), (ALICE, "open", "", set()),
                (ALICE, "closed", "", set()), (BOB, "open", "", {"alice"}),
                (ALICE, HAND_OVER, BOB, {"bob"}), (BOB, HAND_OVER, ALICE, {"alice"}),
                (BOB, HAND_OVER, CAROL, {"carol", "alice"}), (BOB, "taken", "", {"bob", "alice"}),
                (ALICE, HAND_OVER, ALICE, set()), (BOB, HAND_OVER, BOB, {"bob", "alice"})), 1):
            with self.subTest(number):
                self.assertEqual(self.press(root, wanted, user, selected_option=to), "")
                message = self.news(root, number)[-1]
                self.assertEqual(mentions(message), told)
                self.assertIn(USERS[user], message)
        self.assertIn(STATUSES["closed"].steps["open"], STATUSES["closed"].reply)

    def test_who_comes_too_late_is_told_what_the_ticket_is(self):
        root, old = self.ticket({"problem": "disk"}), []
        for number, (wanted, to, by) in enumerate((
                ("taken", "", "bob"), (HAND_OVER, ALICE, "alice"), ("closed", "", "bob"),
                ("open", "", "bob")), 1):
            old += self.mattermost.buttons(root["id"]).values()
            self.assertEqual(self.press(root, wanted, selected_option=to), "")
            if wanted == "taken":  # who has it does not take it again
                self.assertEqual(self.press(root, wanted),
                                 STATUSES["taken"].already.format(status_by="bob"))
            self.start_with_form(self.form)  # which remembers nothing: the post says so
            message, status = root["message"], root["props"]["ticket"]["status"]
            present = [action["id"] for action in self.mattermost.buttons(root["id"]).values()]
            for action in old:
                if action["id"] not in present:
                    self.assertEqual(self.mattermost.press(root["id"], "", ALICE, action),
                                     "Invalid action id.")
                seen = self.mattermost.press(root["id"], "", ALICE, action, stale=True,
                                             selected_option=BOB * (action["type"] == "select"))
                is_form = action["id"].endswith(EDIT) and status != "closed"
                self.assertEqual(seen, "" if is_form else
                                 STATUSES[status].already.format(status_by=by))
            self.assertEqual(root["message"], message)
            self.news(root, number)
        self.assertEqual(len(self.mattermost.made("PUT /posts/")), 4)


# ------------------------------------------------------------------- what is done with a ticket

EVERY_KIND = form_of(
    choice("select", "cluster", {"prod": {"mention": "@oncall"}, "test": {}}),
    choice("select", "tags", dict.fromkeys("abc", {}), multiselect=True, optional=True),
    choice("radio", "urgency", {"low": {"mention": "@helpdesk"}, "high": {}}),
    field("bool", "again", optional=True), field("bool", "sure"),
    field("select", "who", data_source="users"),
    field("select", "crew", data_source="users", multiselect=True, optional=True),
    field("select", "where", data_source="channels", optional=True),
    field("date", "day", default="today"), field("datetime", "hour", optional=True),
    field("text", "resource", default="vm-0"), field("text", "cores", subtype="number"),
    field("text", "tel", optional=True, max_length=9),
    field("textarea", "problem"), field("textarea", "log", code=True, optional=True),
    mention="@helpdesk")
FULL = {"cluster": "test", "tags": ["a", "c"], "urgency": "high", "again": True, "sure": True,
        "who": BOB, "crew": [BOB, ALICE], "where": QUIET, "day": "2026-12-24",
        "hour": "2026-12-24T10:00:00Z", "resource": "vm-`042`", "cores": "4",
        "problem": "disk is full\n```sh\ndf \"<&>\"\n```\n> I'm sure", "log": "  \\a\\*b\n```\n  c"}
PREFILLED = {**FULL, "tags": "a,c", "again": "true", "sure": "true", "who": None, "crew": None,
             "where": None, "tel": None}
SMALL = form_of(
    field("textarea", "problem", max_length=30_000), field("text", "vm", optional=True),
    field("select", "who", data_source="users", optional=True))


class EditTest(LifeCase):
    """The button Edit opens the form again."""

    form = SMALL

    def test_every_element_begins_with_its_answer_and_nothing_new_changes_nothing(self):
        self.start_with_form(EVERY_KIND)
        root = self.ticket(FULL)
        before = self.state(root)
        self.assertEqual(self.edit(root), {})
        user, url, dialog = self.mattermost.dialogs[-1]
        self.assertEqual((user, url, dialog["title"], dialog["submit_label"]), (
            ALICE, CALLBACK_URL + "/ticket/submit", root["props"]["ticket_id"],
            ticket_service.SAVE))
        self.assertEqual(self.prefilled(), PREFILLED)
        shown = [(element["placeholder"], element["optional"]) for element in dialog["elements"]
                 if "data_source" in element]
        self.assertEqual(shown, [("bob", True), ("bob, alice", True), ("quiet", True)])
        self.assertEqual(self.edit(root, **{**FULL, "crew": [], "who": ""}), {})
        self.assertEqual(self.state(root), before)
        root = self.ticket({**FULL, "tags": None, "again": False, "crew": [], "hour": ""})
        self.assertEqual(self.edit(root), {})
        self.assertEqual(self.prefilled(), {**PREFILLED, "tags": None, "again": None, "hour": None})
        self.assertEqual(self.mattermost.made("PUT /posts/"), [])

    def test_an_edit_changes_the_answers_and_nothing_else(self):
        self.start_with_form(EVERY_KIND)
        root = self.ticket(FULL)
        old, (head, body) = root["props"]["ticket"], root["message"].split("**Cluster:**")
        changes = {"tags": ["b"], "again": False, "resource": "v" * 101, "where": HELPDESK,
                   "problem": "fire", "tel": "+49", "hour": "2026-12-24T11:30:00Z"}
        self.assertEqual(self.edit(root, BOB, log="", **changes), {})
        head = head.replace("disk is full", "fire").replace("open\n", "open · edited by @bob\n")
        body = body.split("\n")[0]
        for one, other in (("`A`, `C`", "`B`"), (" · **Again:** `yes`", ""), ("10:00", "11:30"),
                           ("~quiet", "~helpdesk"), ("`` vm-`042` ``", f"`{'v' * 101}`")):
            self.assertIn(one, body)
            body = body.replace(one, other)
        self.assertEqual(root["message"], f"{head}**Cluster:**{body} · **Tel:** `+49`")
        new, answers = root["props"]["ticket"], {**FULL, **changes}
        del answers["log"]
        at, edited = new["history"][-1]["at"], sorted([*changes, "log"])
        self.assertAlmostEqual(at, time.time() * 1000, delta=60_000)
        self.assertEqual(new, {
            **old, "answers": answers, "body": new["body"],
            "names": {BOB: "bob", ALICE: "alice", HELPDESK: "helpdesk"}, "history": [
                *old["history"], {"status": "open", "by": "bob", "at": at, "edited": edited}]})
        [message] = self.news(root, 1)
        self.assertEqual(message.split("\n"), [
            ticket_service.TELL_REPORTER.format(
                reply=ticket_service.EDITED.format(by="bob"), reporter="alice"),
            "**Tags:** `B`", f"**Again:** `{ticket_service.NO}`", "**Where:** `helpdesk`",
            "**Hour:** `2026-12-24 11:30 UTC`", f"**Resource:** {ticket_service.LONG_ANSWER}",
            "**Tel:** `+49`", "**Problem:** `fire`",
            f"**Log:** {ticket_service.NO_ANSWER}"])
        reply = self.thread(root["id"])[1]
        self.assertEqual(reply["props"]["ticket_before"], old["answers"])

    def test_the_second_line_names_who_edited_last_if_it_was_not_the_reporter(self):
        root = self.ticket({"problem": "disk"})
        by_bob = " · edited by @bob"
        for number, (status, user, edited) in enumerate((
                ("open", ALICE, ""), ("open", BOB, by_bob), ("taken", "", by_bob),
                ("closed", "", by_bob), ("open", "", by_bob), ("open", ALICE, ""),
                ("open", BOB, by_bob), ("open", ALICE, "")), 1):
            if number == 8:
                self.mattermost.accounts[ALICE] = {"id": ALICE, "username": "alicia"}
            answer = self.edit(root, user, vm=str(number)) if user else self.press(root, status)
            self.assertIn(answer, ("", {}))
            self.assertEqual(root["message"].split("\n")[1],
                             self.second_line(root, status, "bob", edited))
            self.news(root, number)

    def test_a_history_is_bounded(self):
        for number, kept, names in ((60, 50, ["vm"]), (49, 10, ["x" * 800])):
            root = self.ticket({"problem": "disk"})
            ticket = {**root["props"]["ticket"], "history": [
                {"status": "open", "by": "bob", "at": at, "edited": names}
                for at in range(1, number)]}
            self.mattermost.change(root, props={**root["props"], "ticket": ticket})
            self.assertEqual(self.press(root, "closed"), "")
            history = root["props"]["ticket"]["history"]
            self.assertEqual((len(history), history[-1]["status"]), (kept, "closed"))
            self.assertLessEqual(len(json.dumps(history)), 8192)

    def test_who_edited_is_known_after_60_changes_of_status(self):
        root, bob = self.ticket({"problem": "disk"}), ticket_service.User(BOB, "bob")
        self.assertEqual(self.edit(root, BOB, vm="vm-7"), {})
        ticket = ticket_service.Ticket.from_post(root)
        for _ in range(60):
            ticket = ticket.with_status("closed", bob, bob)
            self.assertIn(" · edited by @bob\n", ticket.message)

    def test_wrong_answers_are_said_under_their_fields(self):
        self.start_with_form(EVERY_KIND)
        root = self.ticket(FULL)
        before = self.state(root)
        self.assertEqual(self.edit(
            root, cluster="gone", sure=False, day="soon", resource=" ", cores="many", problem="",
            tel="1" * 10, crew=["me"]), {"errors": {
                "cluster": ticket_service.NOT_AN_OPTION, "crew": ticket_service.NOT_AN_OPTION,
                "sure": ticket_service.NOT_TICKED, "day": ticket_service.NOT_A_DATE,
                "cores": ticket_service.NOT_A_NUMBER, "resource": ticket_service.REQUIRED,
                "problem": ticket_service.REQUIRED,
                "tel": ticket_service.TOO_LONG.format(limit=9, excess=1)}})
        self.assertEqual(self.edit(root, who="x" * 26), {"errors": {
            "who": ticket_service.PERSON_NOT_SEEN.format(bot="ticket-bot")}})
        self.assertEqual(self.state(root), before)

    def test_what_is_in_the_way_keeps_the_form_open_with_a_true_sentence(self):
        self.mattermost.keeps = False
        self.start_with_form(self.form)
        root = self.ticket({"problem": "disk"})
        before = self.state(root)
        self.press(root, EDIT)
        self.limit(patience=0, timeout=0.1)
        self.mattermost.script("GET /posts/", waits(self.gate()))
        self.assertEqual(self.mattermost.submit_dialog({"problem": "fire"}),
                         {"error": ticket_service.NOT_REACHED})
        self.limit(patience=0)
        archived = (400, "api.post.update_post.can_not_update_post_in_deleted.error")
        for call, behave, sentence in (
                ("GET /posts/", fails(503), ticket_service.NOT_REACHED),
                ("GET /posts/", fails(*NO_PERMISSION), ticket_service.NOT_READABLE),
                ("GET /posts/", fails(404, "app.post.get.app_error"), ticket_service.TICKET_GONE),
                ("PUT /posts/", fails(503), ticket_service.NOT_REACHED),
                ("PUT /posts/", fails(429), ticket_service.NOT_REACHED),
                ("PUT /posts/", hangs_up, ticket_service.NOT_REACHED),
                ("PUT /posts/", http_answer(302, b""), sentence_after("a redirect", "")),
                ("PUT /posts/", http_answer(200, b"<html>"), ticket_service.IN_PLACE),
                ("PUT /posts/", fails(401, "api.x.app_error"), ticket_service.BAD_TOKEN),
                ("PUT /posts/", fails(400, "some.app_error"), ticket_service.NOT_CHANGED),
                ("PUT /posts/", fails(*archived), ticket_service.TICKET_ARCHIVED),
                ("PUT /posts/", fails(*TOO_LONG), ticket_service.TOO_LONG_THERE),
                ("PUT /posts/", fails(*NO_PERMISSION), ticket_service.NO_EDITS),
                ("9.4", None, ticket_service.NO_EDITS), ("11.6", None, ticket_service.NO_EDITS)):
            with self.subTest(call=call, sentence=sentence):
                self.mattermost.edit_limit = None if behave else call
                self.mattermost.script(call, *[behave] * bool(behave))
                answer = self.mattermost.submit_dialog({"problem": "fire"})
                self.assertEqual(answer, {"error": sentence})
                self.assertEqual(self.state(root), before)
        self.mattermost.edit_limit = None
        self.assertEqual(self.mattermost.submit_dialog({"problem": "fire"}), {})
        self.assertEqual(root["props"]["ticket"]["answers"], {"problem": "fire"})

    def test_an_edit_whose_answer_is_lost_is_made_once(self):
        self.mattermost.keeps = False
        self.start_with_form(self.form)
        for patience, told in ((20, {}), (0, {"error": ticket_service.NOT_REACHED})):
            root = self.ticket({"problem": f"disk {patience}"})
            self.press(root, EDIT)
            self.limit(patience=patience)
            self.mattermost.script("PUT /posts/", loses_the_answer)
            answers = {"problem": "fire", "vm": "vm-7"}
            self.assertEqual(self.mattermost.submit_dialog(answers), told)
            self.news(root, 1)
            in_threads(5, lambda _, answers=answers: self.assertEqual(
                self.mattermost.submit_dialog(answers), {}))
            self.assertEqual(root["props"]["ticket"]["answers"], answers)
            self.assertEqual(len(root["props"]["ticket"]["history"]), 2)
        self.service.shutdown()
        self.assertEqual(len(self.mattermost.made("PUT /posts/")), 3)
        self.assertEqual(len(self.mattermost.replies()), 4)

    def test_somebody_else_s_edit_meanwhile_is_not_overwritten(self):
        root = self.ticket({"problem": "disk"})
        self.press(root, EDIT)
        self.assertEqual(self.edit(root, BOB, vm="vm-7"), {})
        self.news(root, 1)
        before = self.state(root)
        self.assertEqual(self.mattermost.submit_dialog({"problem": "fire"}, -2), {
            "error": ticket_service.EDITED_MEANWHILE.format(ticket_id=root["props"]["ticket_id"])})
        self.assertEqual(self.mattermost.submit_dialog(root["props"]["ticket"]["answers"], -2), {})
        self.assertEqual(self.state(root), before)

    def test_a_status_that_changes_meanwhile_stays(self):
        for status, self.mattermost.read_lag in (("closed", 0), ("taken", 0), ("taken", 0.1)):
            root = self.ticket({"problem": "disk"})
            self.press(root, EDIT)
            self.assertEqual(self.press(root, status), "")
            buttons = list(self.mattermost.buttons(root["id"]))
            self.assertEqual(self.mattermost.submit_dialog({"problem": "fire"}), {})
            self.assertEqual(root["message"], self.top(root, "fire", status, "bob"))
            self.assertEqual(root["props"]["ticket"]["status"], status)
            self.assertEqual(list(self.mattermost.buttons(root["id"])), buttons)

    def test_while_a_replica_lags_behind_nobody_s_edit_is_overwritten(self):
        root = self.ticket({"problem": "disk"})
        self.assertEqual(self.edit(root, BOB, problem="fire"), {})
        self.news(root, 1)
        before = self.state(root)
        self.press(root, EDIT)
        self.mattermost.read_lag = 60
        self.limit(patience=0)
        self.assertEqual(self.mattermost.submit_dialog({"problem": "ice"}),
                         {"error": ticket_service.NOT_REACHED})
        self.assertEqual(self.state(root), before)
        self.assertEqual(self.press(root, EDIT), ticket_service.PRESS_AGAIN)  # not the old answers

    def test_a_form_to_edit_outlives_a_restart_but_not_another_form(self):
        root = self.ticket({"problem": "disk"})
        before = self.state(root)
        self.press(root, EDIT)
        self.start_with_form({**SMALL, "title": "Another"})
        answer = self.mattermost.submit_dialog({"problem": "fire"})
        self.assertEqual((answer, self.state(root)),
                         ({"error": ticket_service.FORM_INVALID}, before))
        self.start_with_form(SMALL)
        self.assertEqual(self.mattermost.submit_dialog({"problem": "fire"}), {})
        self.news(root, 1)

    def test_a_ticket_that_does_not_fit_the_form_any_more_can_t_be_edited_but_closed(self):
        for name, other in (("what", field("text", "vm")), ("problem", field("bool", "vm")),
                            ("problem", field("date", "vm")),
                            ("problem", field("select", "vm", data_source="users"))):
            with self.subTest(name=name, other=other):
                self.start_with_form(SMALL)
                root = self.ticket({"problem": "disk", "vm": "vm-042"})
                self.start_with_form(form_of(field("textarea", name), other))
                opened = len(self.mattermost.dialogs)
                self.assertEqual(self.press(root, EDIT), ticket_service.NOT_EDITABLE)
                self.assertEqual(len(self.mattermost.dialogs), opened)
                self.assertEqual(self.press(root, "closed"), "")
                self.assertIn(self.top(root, "disk", "closed", "bob"), root["message"])

    def test_a_ticket_can_be_edited_though_words_and_names_are_others_now(self):
        zone = {"datetime_config": {"location_timezone": "Europe/Berlin"}}

        def form(first, **details):
            options = {"new": {}, "old": {"text": first}}
            return form_of(
                choice("select", "kind", {**options, "gone": {}}, display_name=first),
                choice("select", "tags", options if details else {**options, "gone": {}},
                       multiselect=True), *SMALL["elements"], field("datetime", "hour", **details),
                field("select", "where", data_source="channels"))

        there = self.mattermost.channels[OTHERS]
        there.display_name, there.members = "a #ticket-closed", {BOT}
        self.start_with_form(form("One"))
        root = self.ticket({"kind": "old", "tags": ["gone", "old"], "problem": "disk\nfull",
                            "who": CAROL, "hour": "2026-11-30T09:00:00Z", "where": OTHERS})
        self.mattermost.accounts[CAROL] = {"id": CAROL, "username": "caroline"}
        self.start_with_form(form("The first", **zone))
        self.assertEqual(self.edit(root), {})
        self.assertEqual((self.prefilled()["kind"], self.prefilled()["tags"]), ("old", "old"))
        hour = ticket_service.read_element(field("datetime", "x", **zone)).markdown(
            "2026-11-30T09:00:00Z", {})
        self.assertEqual(root["message"].split("\n")[2:], [
            "**The first:** `The first` · **Tags:** `The first`", "> disk", "> full", "",
            f"**Who:** @caroline · **Hour:** {hour} · **Where:** `a #\u2060ticket-closed`"])
        self.assertEqual(mentions(self.news(root, 1)[0]), set())
        del self.mattermost.accounts[CAROL]
        there.members.discard(BOT)  # from whom both are hidden now
        self.assertEqual(self.edit(root, problem="disk\nempty"), {})
        self.assertIn("**Who:** `caroline` · ", root["message"])
        self.assertIn("**Where:** `a #\u2060ticket-closed`", root["message"])

    def test_a_state_that_is_not_this_person_s_edit_of_this_ticket_is_refused(self):
        root = self.ticket({"problem": "disk"})
        before, seal = self.state(root), ticket_service.Seal([SLASH_TOKEN.encode()])
        new = self.mattermost.dialogs[-1][2]["state"]
        button = self.mattermost.buttons(root["id"])[OPEN.steps[EDIT]]["integration"]["context"]
        self.press(root, EDIT)
        good = self.mattermost.dialogs[-1][2]["state"]
        fields, invalid = seal.open("edit", good), ticket_service.FORM_INVALID
        other = self.mattermost.say(ALICE, HELPDESK, "no ticket")
        for what, state, user, sentence in (
                ("another person's", good, BOB, invalid),
                ("a button's", button["signed"], "", invalid),
                ("forged", good.replace(good[9], "AB"[good[9] == "A"], 1), "", invalid),
                ("signed for /ticket", good.partition(".")[0] + "." + new.partition(".")[2], "",
                 invalid),
                ("old", seal.sign("edit", *fields[:4], fields[4] - 86_401, *fields[5:]), "",
                 invalid),
                ("of another ticket", seal.sign("edit", *fields[:3], "Ticket-20260101-0000",
                                                *fields[4:]), "", ticket_service.NOT_OUR_TICKET),
                ("of no ticket", seal.sign("edit", *fields[:2], other, *fields[3:]), "",
                 ticket_service.NOT_OUR_TICKET)):
            with self.subTest(what):
                self.assertEqual(self.mattermost.submit_dialog(
                    {"problem": "fire"}, user=user or ALICE, state=state), {"error": sentence})
        self.assertEqual((seal.open("edit", new), seal.open("state", good)), (None, None))
        self.assertEqual(self.mattermost.submit_dialog({"problem": "fire"}, cancelled=True), {})
        self.assertEqual(self.state(root), before)

    def test_only_who_is_new_in_a_ticket_is_mentioned_and_named_if_they_don_t_see_it(self):
        self.start_with_form(EVERY_KIND)
        root = self.ticket({**FULL, "who": ALICE, "crew": []})
        outside = ticket_service.TO_EDITOR.format(
            by="bob", sentence=ticket_service.THEY_ARE_OUTSIDE.format(people="@carol"))
        for number, (user, changes, told) in enumerate((
                (ALICE, {"cluster": "prod"}, {"oncall"}), (ALICE, {"urgency": "low"}, set()),
                (ALICE, {"who": BOB}, {"bob"}),
                (ALICE, {"crew": [ALICE, BOT]}, {"alice", "ticket-bot"}),
                (ALICE, {"crew": [ALICE]}, set()), (ALICE, {"cluster": "test"}, set()),
                (BOB, {"cluster": "prod"}, {"alice", "oncall"}),
                (ALICE, {"who": ALICE, "crew": [BOB]}, set()),  # in each other's place
                (BOB, {"who": CAROL}, {"alice", "bob", "carol"}), (ALICE, {"tel": "1"}, set())), 1):
            with self.subTest(number):
                self.assertEqual(self.edit(root, user, **changes), {})
                message = self.news(root, number)[-1]
                self.assertEqual((mentions(message), outside in message.split("\n")),
                                 (told, "carol" in told))

    def test_what_an_admin_added_stays_and_what_was_changed_by_hand_is_told(self):
        self.start_with_form({**SMALL, "mention": "@helpdesk"})
        asked = self.mattermost.say(BOB, HELPDESK, "look")
        for problem in ("disk", "disk\nfull"):  # the first one stands in the heading only
            root = self.ticket({"problem": problem}, root_id=asked)
            lines = root["message"].split("\n")
            self.mattermost.change(root, message="\n".join(["see #ticket-closed", *lines, "below"]))
            self.assertEqual(self.edit(root, problem="fire\nsmoke", vm="vm-7"), {})
            self.assertEqual(root["message"].split("\n"), [
                "see #ticket-closed", "##### 🔵 fire", *lines[1:4], "> fire", "> smoke", "",
                "**Vm:** `vm-7`", "below"])
            self.mattermost.change(root, message=root["message"].replace("🔵 fire", "🔵 My *fire*"))
            self.assertEqual(self.edit(root, problem="rain\nsnow"), {})
            self.assertEqual(root["message"].split("\n")[1], "##### 🔵 My *fire*")
            self.news(root, 2)
            self.press(root, EDIT)
            by_hand = root["message"].replace("> snow", "> no snow")
            self.mattermost.change(root, message=by_hand)
            self.assertEqual(self.mattermost.submit_dialog({"problem": "rain"}),
                             {"error": ticket_service.NOT_EDITABLE})
            self.assertEqual(self.press(root, EDIT), ticket_service.NOT_EDITABLE)
            self.assertEqual(root["message"], by_hand)

    def test_an_answer_that_the_heading_does_not_say_any_more_stands_below_it(self):
        for heading, title in (("My *fire*", "New ticket"), ("New ticket", "Another")):
            self.start_with_form(SMALL)
            root = self.ticket({"problem": "!!!"})
            message = root["message"].replace("New ticket", heading)
            self.mattermost.change(root, message=f"{message}\nadded by hand")
            self.start_with_form({**SMALL, "title": title})
            self.assertEqual(self.edit(root, problem="rain"), {})
            self.assertEqual(root["message"].split("\n"), [
                f"##### 🔵 {heading}", self.second_line(root, "open"), "> rain", "",
                "added by hand"])

    def test_what_has_become_possible_in_a_form_is_nothing_new(self):
        kinds = {"net": {}, "disk": {}}
        for new in ([choice("select", "kind", kinds), field("bool", "again", optional=True)],
                    [choice("select", "kind", kinds, multiselect=True)]):
            self.start_with_form(form_of(choice("select", "kind", kinds), *SMALL["elements"]))
            root = self.ticket({"kind": "net", "problem": "disk"})
            before = self.state(root)
            self.start_with_form(form_of(*new, *SMALL["elements"]))
            self.assertEqual(self.edit(root), {})
            self.assertEqual((self.state(root), self.mattermost.made("PUT /posts/")), (before, []))

    def test_a_day_that_has_passed_can_stay(self):
        limits = {"min_date": "today", "max_date": "+1m"}
        self.start_with_form(form_of(
            field("date", "day", **limits), field("datetime", "hour", datetime_config={
                **limits, "manual_time_entry": True}), *SMALL["elements"]))
        tomorrow = time.strftime("%Y-%m-%d", time.gmtime(time.time() + 86_400))
        for day, shown in (("2020-01-01", {}), ("2099-12-31", {}), (tomorrow, limits)):
            answers = {"day": day, "hour": f"{day}T09:00:00Z"}
            root = self.ticket({**answers, "problem": "disk"})
            self.assertEqual(self.edit(root, problem="fire"), {})
            self.assertEqual(root["props"]["ticket"]["answers"], {**answers, "problem": "fire"})
            date, hour, *_ = self.mattermost.dialogs[-1][2]["elements"]
            self.assertEqual((date["default"], hour["default"]), (day, answers["hour"]))
            for one in (date, hour["datetime_config"]):
                self.assertEqual({key: one[key] for key in limits if key in one}, shown)

    def test_only_members_of_the_channel_get_the_form(self):
        root = self.ticket({"problem": "disk"})
        opened, look = len(self.mattermost.dialogs), f"GET /channels/{HELPDESK}/members/{BOB}"
        self.limit(patience=0)
        for user, call, behave, sentence in (
                (CAROL, "", [], ticket_service.NOT_FOR_YOU),
                (BOB, look, [fails(*NO_PERMISSION)], ticket_service.NOT_READABLE),
                (BOB, look, [fails(503)], ticket_service.PRESS_AGAIN),
                (BOB, "POST /actions/dialogs/open", [fails(400, TRIGGER_EXPIRED)],
                 ticket_service.FORM_LATE)):
            with self.subTest(sentence):
                self.mattermost.script(call, *behave)
                self.assertEqual(self.press(root, EDIT, user), sentence)
        self.assertEqual(len(self.mattermost.dialogs), opened)

    def test_what_is_too_long_is_told(self):
        root = self.ticket({"problem": "disk"})
        before = self.state(root)
        self.assertRegex(self.edit(root, problem="a" * 20_000)["error"],
                         pattern(ticket_service.TICKET_TOO_LONG))
        self.assertEqual(self.state(root), before)
        self.mattermost.max_post_size = 262_143
        form = form_of(field("textarea", "problem", max_length=200_000))
        self.start_with_form(form)
        root = self.ticket({"problem": "a\n" + "b" * 120_000})
        self.start_with_form({**form, "introduction_text": "c" * 180_000})
        self.assertEqual(self.press(root, EDIT), ticket_service.TOO_LONG_TO_EDIT)


class HandOverTest(LifeCase):
    """The menu Hand over to…"""

    def hand_over(self, root, to, user=BOB):
        return self.press(root, HAND_OVER, user, selected_option=to)

    def test_a_ticket_is_handed_over_to_somebody_who_is_told(self):
        root = self.ticket({"problem": "disk"})
        menu = self.mattermost.buttons(root["id"])[OPEN.steps[HAND_OVER]]
        self.assertEqual((menu["type"], menu["data_source"]), ("select", "users"))
        self.assertEqual(self.hand_over(root, ALICE), "")
        self.news(root, 1)
        self.assertEqual(self.hand_over(root, BOB, ALICE), "")
        self.assertEqual(root["message"], self.top(root, "disk", "taken", "bob"))
        self.assertEqual([(entry["status"], entry["by"], entry.get("to"))
                          for entry in root["props"]["ticket"]["history"]],
                         [("open", "alice", None), ("taken", "bob", "alice"),
                          ("taken", "alice", "bob")])
        self.assertEqual(self.news(root, 2), [
            ticket_service.HANDED_OVER.format(taker="@alice", by="bob"),
            ticket_service.HANDED_OVER.format(taker="@bob", by="alice")])
        already = STATUSES["taken"].already.format(status_by="bob")
        self.assertEqual(self.hand_over(root, BOB), already)
        self.assertEqual(self.hand_over(root, BOB, ALICE), already)
        self.press(root, "closed")
        self.assertEqual(list(self.mattermost.buttons(root["id"])),
                         list(STATUSES["closed"].steps.values()))
        self.assertNotIn(HAND_OVER, STATUSES["closed"].steps)

    def test_nobody_a_bot_and_somebody_who_has_left_get_no_ticket(self):
        root = self.ticket({"problem": "disk"})
        before, users = self.state(root), [ALICE, BOT, DAVE, "x" * 26]
        self.limit(patience=0)
        self.mattermost.script(f"GET /users/{ALICE}", fails(503))
        for chosen, sentence in (
                *((nobody, ticket_service.NOBODY) for nobody in (
                    "", "me", "x" * 3000, "x" * 25, "../users/me" + "x" * 15, "x" * 26)),
                (BOT, ticket_service.NOT_TO_A_BOT.format(user_name="ticket-bot")),
                (DAVE, ticket_service.HAS_LEFT.format(user_name="dave")),
                (ALICE, ticket_service.PRESS_AGAIN)):
            with self.subTest(chosen[:30]):
                self.assertEqual(self.hand_over(root, chosen), sentence)
        self.assertEqual({call for call in self.mattermost.calls if call.startswith("GET /users/")},
                         {f"GET /users/{user}" for user in ["me", *users]})
        self.assertEqual((self.state(root), self.mattermost.made("PUT /posts/")), (before, []))

    def test_who_is_not_in_the_channel_can_have_a_ticket(self):
        outside = ticket_service.THEY_ARE_OUTSIDE.format(people="@carol")
        for limit, behaviours, said in (
                (None, [], outside), ("9.4", [], outside), ("11.6", [], outside),
                (None, [fails(429)], outside), (None, [fails(429, Retry_After="60")], "")):
            root = self.ticket({"problem": "disk"})
            self.mattermost.edit_limit = limit  # then the response asks for the change
            self.mattermost.script(f"GET /channels/{HELPDESK}/members/{CAROL}", *behaviours)
            self.assertEqual(self.hand_over(root, CAROL), said)
            self.assertIn(self.second_line(root, "taken", "carol"), root["message"])
            self.assertEqual(mentions(self.news(root, 1)[0]), {"carol", "alice"})


NETOPS, STORAGE = "net" + QUIET[3:], "sto" + QUIET[3:]
KINDS = {"net": {"channel": NETOPS, "mention": "@netops"}, "disk": {"channel": STORAGE},
         "other": {}}


class RoutingTest(LifeCase):
    """The channel of a ticket's kind."""

    form = form_of(choice("select", "kind", KINDS), field("textarea", "problem"),
                   field("select", "who", data_source="users", optional=True))

    def setUp(self):
        super().setUp()
        self.mattermost.channels[NETOPS] = Channel("netops", members=(BOB,))
        self.mattermost.channels[STORAGE] = Channel("storage", "P", members=(ALICE, BOB, BOT))

    def submit(self, kind):
        return self.mattermost.submit_dialog({"kind": kind, "problem": "disk"})

    def places(self):
        return [root["channel_id"] for root in self.mattermost.roots()]

    def test_the_chosen_option_says_where_the_ticket_goes(self):
        one, several = choice("select", "kind", KINDS), choice("select", "kind", KINDS,
                                                               multiselect=True)
        radio = choice("radio", "more", KINDS, optional=True)
        for elements, answers, place in (
                ([one], {"kind": "net"}, NETOPS), ([one], {"kind": "other"}, HELPDESK),
                ([radio], {"more": "disk"}, STORAGE), ([radio], {}, HELPDESK),
                ([several], {"kind": ["other", "disk", "net"]}, STORAGE),
                ([several], {"kind": ["other"]}, HELPDESK),
                ([one, radio], {"kind": "other", "more": "net"}, NETOPS),
                ([one, radio], {"kind": "disk", "more": "net"}, STORAGE)):
            for settings in ({}, {"TICKET_CHANNEL": QUIET}):
                with self.subTest(answers=answers, **settings):
                    self.start_with_form(form_of(*elements, field("text", "vm")), **settings)
                    root = self.ticket({**answers, "vm": "vm-042"})
                    expected = QUIET if settings and place == HELPDESK else place
                    [reply] = self.thread(root["id"])
                    self.assertEqual({root["channel_id"], reply["channel_id"]}, {expected})

    def test_the_confirmation_leads_there_and_says_who_does_not_see_it(self):
        root = self.ticket({"kind": "net", "problem": "disk", "who": CAROL}, text="disk")
        confirmation = ticket_service.CONFIRMATION.format(
            ticket_id=root["props"]["ticket_id"],
            link=f"{self.mattermost.url}/_redirect/pl/{root['id']}")
        outside = ticket_service.THEY_ARE_OUTSIDE.format(people="@carol")
        self.assertEqual(self.mattermost.ephemeral, [(ALICE, HELPDESK, "\n".join(
            [confirmation, ticket_service.YOU_ARE_OUTSIDE, outside]))])
        self.assertIn("**Kind:** `Net` @netops · **Who:** @carol", root["message"])
        self.assertEqual(self.press(root, EDIT), ticket_service.NOT_FOR_YOU)
        root = self.ticket({"kind": "disk", "problem": "disk"})
        self.assertNotIn("\n", self.mattermost.ephemeral[-1][2])
        self.assertEqual(self.edit(root, kind="net"), {})  # which moves nothing
        self.assertEqual(self.places(), [NETOPS, STORAGE])
        self.assertEqual(mentions(self.news(root, 1)[0]), {"netops"})

    def test_a_form_opens_where_the_bot_can_t_post_if_no_ticket_goes_there(self):
        away = {value: more for value, more in KINDS.items() if more}
        for options, optional, opens in ((KINDS, {}, False), (away, {"optional": True}, False),
                                         (away, {}, True)):
            self.start_with_form(form_of(choice("select", "kind", options, **optional)))
            self.assertEqual(self.mattermost.run_command(channel_id=SECRET), "" if opens else (
                ticket_service.CANT_POST["not a member"].person.format(bot="ticket-bot")))

    def test_a_channel_that_can_t_be_posted_in_keeps_the_form_open(self):
        channel, permissions = self.mattermost.channels[STORAGE], self.mattermost.permissions
        elsewhere = {"error": ticket_service.CANT_POST_ELSEWHERE.format(bot="ticket-bot")}
        self.mattermost.run_command()
        channel.members.discard(BOT)
        self.assertEqual(self.submit("disk"), elsewhere)
        self.assert_logged(f"FORM_FILE: channel {STORAGE}: @ticket-bot is not a member")
        channel.members.add(BOT)
        channel.delete_at = 1
        self.assertEqual(self.submit("disk"), elsewhere)
        channel.delete_at, permissions["channel_user"] = 0, []
        self.assertEqual(self.submit("disk"), elsewhere)
        permissions["channel_user"] = ["create_post"]
        self.assertEqual(self.places(), [])
        self.assertEqual(self.submit("net"), {})  # nothing was made, so another one may be chosen
        self.assertEqual(self.places(), [NETOPS])

    def test_a_post_whose_answer_is_lost_is_one_ticket_whatever_is_chosen_then(self):
        again = ticket_service.SUBMITTED_AGAIN.format(by="alice")
        places = {"disk": STORAGE, "net": NETOPS, "other": HELPDESK}
        for has_restarted, first, then in itertools.product((False, True), places, places):
            with self.subTest(first=first, then=then, has_restarted=has_restarted):
                self.mattermost.posts.clear()
                self.mattermost.channels[NETOPS].members.add(BOT)
                self.mattermost.run_command()
                self.limit(patience=0)
                self.mattermost.script("POST /posts", loses_the_answer)
                self.assertEqual(self.submit(first), {"error": ticket_service.NOT_REACHED})
                if has_restarted:
                    self.mattermost.pending.clear()
                    self.start_with_form(self.form)
                self.assertEqual(self.submit(then), {})
                self.assertEqual(self.submit(then), {})
                self.assertEqual(self.places(), [places[first]])
                reply, *_ = self.replies(1 + (first != then))
                self.assertEqual(reply["message"].startswith(again), first != then)

    def test_after_a_restart_only_a_channel_that_the_bot_may_not_read_is_passed_over(self):
        self.mattermost.run_command()
        self.start_with_form(self.form)
        self.limit(patience=0)
        self.mattermost.script(f"GET /channels/{STORAGE}/posts", fails(503))
        self.assertEqual(self.submit("other"), {"error": ticket_service.NOT_REACHED})
        self.assertEqual(self.places(), [])
        self.mattermost.channels[STORAGE].members.discard(BOT)
        self.assertEqual(self.submit("other"), {})
        self.assertEqual(self.places(), [HELPDESK])

    def test_check_and_log_say_for_each_channel_whether_the_bot_can_post_there(self):
        status, _ = self.checked(form_of(choice("radio", "k", {"a": {"channel": NETOPS}})))
        self.assertEqual(status, 0)
        begins, bad = "FORM_FILE: channel", {
            "x" * 26: "unknown", OTHERS: "not a member", ARCHIVED: "archived", DIRECT: "direct"}
        options = {channel: {"channel": channel} for channel in (NETOPS, STORAGE, *bad)}
        for changes in ({}, {"TICKET_CHANNEL": QUIET}):
            status, lines = self.checked(form_of(
                choice("select", "kind", options), choice("radio", "more", options)), **changes)
            self.assertEqual(status, 1)
            self.assertEqual(lines, [
                f"ok      {begins} {NETOPS}: @ticket-bot can post there",
                f"note    {begins} {NETOPS}: who is not in it is not told of replies to a ticket: "
                "people have to join it",
                f"ok      {begins} {STORAGE}: @ticket-bot can post there",
                f"warning {begins} {STORAGE}: it is private: people who are not in it can't read "
                "their tickets, and are not told of replies",
                *(f"problem {begins} {channel}: " + ticket_service.CANT_POST[obstacle].admin.format(
                    bot="ticket-bot") for channel, obstacle in bad.items())])


class ThreadTest(LifeCase):
    """`/ticket`, typed in a thread."""

    form = form_of(field("text", "vm", optional=True), field("textarea", "problem"))

    def default(self, text="", **command):
        """Type /ticket; return what the form begins with."""
        self.assertEqual(self.mattermost.run_command(text, **command), "")
        return self.prefilled()["problem"]

    def assert_led_to(self, root_id, root):
        """Check that one reply of the bot's in a thread leads to a ticket."""
        link = f"{self.mattermost.url}/_redirect/pl/{root['id']}"
        self.assertEqual([reply["message"] for reply in self.thread(root_id)], [
            ticket_service.ASKED_HERE.format(ticket_id=root["props"]["ticket_id"], link=link)])

    def test_the_form_begins_with_the_thread_s_first_message(self):
        said = self.mattermost.say(BOB, HELPDESK, "disk\u200b is *full*\r\n  `df`\n")
        ours = self.mattermost.say(BOT, HELPDESK, "A ticket")
        self.assertEqual(self.default(root_id=said), "disk is *full*\n  `df`")
        self.assertEqual(self.default("my words", root_id=said), "my words")
        self.assertIsNone(self.default(root_id=ours))
        self.assertIsNone(self.default())
        self.start_with_form(form_of(field("textarea", "problem", max_length=7)))
        self.assertEqual(self.default(root_id=said), "disk is")

    def test_one_reply_in_that_thread_leads_to_the_ticket(self):
        for author, changes in itertools.product((BOB, BOT), ({}, {"TICKET_CHANNEL": QUIET})):
            with self.subTest(author=author, **changes):
                self.start_with_form(self.form, **changes)
                said = self.mattermost.say(author, HELPDESK, "disk is full")
                root = self.ticket({"problem": "typed"}, root_id=said)
                self.assertIn(ticket_service.THREAD.format(
                    link=f"{self.mattermost.url}/_redirect/pl/{said}"), root["message"])
                self.assertEqual(self.mattermost.submit_dialog({"problem": "typed"}), {})
                self.service.shutdown()
                self.mattermost.pending.clear()
                self.start_with_form(self.form, **changes)
                self.assertEqual(self.mattermost.submit_dialog({"problem": "typed"}), {})
                self.service.shutdown()
                self.assert_led_to(said, root)
                self.assertEqual(self.news(root, 0), [])

    def test_a_reply_that_the_last_process_did_not_make_is_made(self):
        said = self.mattermost.say(BOB, HELPDESK, "disk is full")
        self.default(root_id=said)
        self.limit(patience=0)
        self.mattermost.script("POST /posts", slow(0), fails(503), fails(503))
        self.assertEqual(self.mattermost.submit_dialog({"problem": "typed"}), {})
        self.service.shutdown()
        self.assertEqual(self.mattermost.replies(), [])
        self.start_with_form(self.form)
        self.assertEqual(self.mattermost.submit_dialog({"problem": "typed"}), {})
        root = self.mattermost.roots()[-1]
        self.assert_led_to(said, root)
        self.assertEqual(self.news(root, 0), [])

    def test_a_thread_that_is_not_believed_is_none(self):
        said = self.mattermost.say(BOB, HELPDESK, "typed, in the open")
        reply = self.mattermost.say(BOB, HELPDESK, "typed, below", said)
        elsewhere = self.mattermost.say(BOB, ARCHIVED, "typed, elsewhere")
        secret = self.mattermost.say(BOB, SECRET, "typed, in secret")
        deleted = self.mattermost.say(BOB, HELPDESK, "typed, and deleted")
        self.mattermost.change(self.mattermost.posts[deleted], delete_at=1)
        odd = (reply, elsewhere, secret, deleted, "x" * 26, "../users/me", "me")
        for root_id in odd:
            with self.subTest(root_id):
                root = self.ticket({"problem": "disk"}, root_id=root_id)
                self.assertIsNone(self.prefilled()["problem"])
                self.assertEqual(root["message"], self.top(root, "disk", "open"))
        self.mattermost.script(f"GET /posts/{said}", fails(500))
        self.assertIsNone(self.default(root_id=said))
        self.service.shutdown()
        self.assertEqual(len(self.mattermost.replies()), 1 + len(odd))


# ------------------------------------------------------------------------ what people met elsewhere

class ReportsTest(LifeCase):
    """What people who run such services reported, one of each kind."""

    def test_links_follow_the_site_url(self):
        self.assertLessEqual(ticket_service.Mattermost.config_is_kept, 60)
        for site_url, kept, expected in (
                ("http://old.test", 60, "http://old.test"),
                ("http://new.test", 60, "http://old.test"),
                ("http://new.test/chat/", 0, "http://new.test/chat")):
            self.mattermost.site_url = site_url
            self.service.service.mattermost.config_is_kept = kept
            self.ticket({"problem": "disk"})
            self.assertIn(f"({expected}/_redirect/pl/", self.mattermost.ephemeral[-1][2])

    def test_what_mattermost_takes_is_filed_and_just_under_its_limits_it_can_be_closed(self):
        self.mattermost.accounts[BOB]["username"] = "q" * 64
        form = form_of(field("textarea", "problem", max_length=2**20, code=True))
        for most, text, least in (
                (16_383, "b ", 16_000), (16_383, "𐍈", 16_000), (40_000, "b ", 39_700),
                (262_143, "c\n", 89_000), (262_143, "d", 130_500), (262_143, "ж", 65_000),
                (262_143, '"', 66_000), (262_143, "𐍈", 32_500), (262_143, 'aж€𐍈"\n', 30_000),
                (262_143, "a" * 50_000 + "𐍈ж" * 20_000, 30_000)):
            with self.subTest(text, most=most):
                self.mattermost.max_post_size = most
                self.start_with_form(form)
                self.mattermost.run_command()
                typed, excess, tries = text * (240_000 // len(text.encode())), 1, 0
                while excess:
                    answer = self.mattermost.submit_dialog({"problem": f"x{typed}."})
                    found = re.fullmatch(pattern(ticket_service.TICKET_TOO_LONG).replace(
                        ".+", "(.+)"), answer.get("error", ""))
                    self.assertEqual(not found, answer == {})
                    excess = int(found[1]) if found else 0
                    if excess and most < 50_000:  # where characters are counted, not bytes
                        self.assertEqual(self.mattermost.submit_dialog({
                            "problem": f"x{typed[:len(typed) - excess + 1]}."}), {
                                "error": ticket_service.TICKET_TOO_LONG.format(excess=1)})
                    typed, tries = typed[:len(typed) - excess], tries + 1
                root = self.mattermost.roots()[-1]
                self.news(root, 0)
                self.assertEqual(root["props"]["ticket"]["answers"], {"problem": f"x{typed}."})
                self.assertTrue(len(typed) > least and tries < 4, (len(typed), tries))
                self.assertEqual(self.press(root, "closed"), "")
                self.assertIn(f"#ticket-closed by @{'q' * 64}", root["message"])
                self.assertLessEqual(len(root["message"].encode()), 128 * 1024)
                self.news(root, 1)

    def test_a_default_time_is_made_absolute_when_the_form_opens(self):
        for default, expected in (
                ("today", "T00:00:00Z$"), ("+1d", "T00:00:00Z$"), ("+2H", "Z$"),
                ("2026-12-24", "^2026-12-24T00:00:00Z$"),
                ("2026-12-24T10:00+01:00", "^2026-12-24T09:00:00Z$")):
            with self.subTest(default):
                when = field("datetime", "when", default=default, optional=True)
                self.start_with_form(form_of(when, field("textarea", "problem")))
                self.mattermost.run_command()  # the stand-in complains of any other form
                answers = {**self.prefilled(), "problem": "disk"}
                self.assertRegex(answers["when"], expected)
                self.assertEqual(self.mattermost.submit_dialog(answers), {})
                self.assertEqual(self.mattermost.roots()[-1]["props"]["ticket"]["answers"], answers)

    def test_check_and_log_name_what_people_could_not_use(self):
        def zone(name):
            return {"datetime_config": {"location_timezone": name}}

        status, lines = self.checked(form_of(
            field("date", "early", default="today", min_date="tomorrow"),
            field("date", "late", default="+2w", max_date="2020-01-01"),
            field("date", "none", min_date="+3d", max_date="today"),
            field("datetime", "soon", min_date="+2H", max_date="+1H"),
            field("datetime", "nowhere", **zone("Europe/Berln")),
            field("datetime", "fine", default="+1d", min_date="today", max_date="+1w",
                  **zone("Europe/Berlin")),
            field("datetime", "other", default="today", datetime_config={"min_date": "+1d"}),
            choice("select", "kind", {name: {"mention": f"@{name}"} for name in (
                "Bob.", "nobody", "dave", "here")}),
            choice("radio", "more", {"a": {"mention": "@nobody"}}), mention="@alice"))
        self.assertEqual(status, 0)
        outside = ("default lies outside min_date and max_date: Mattermost 11 refuses the form "
                   "until people change it")
        self.assertEqual(lines, [
            f"note    FORM_FILE: element early: {outside}",
            f"note    FORM_FILE: element late: {outside}",
            *(f"note    FORM_FILE: element {name}: min_date lies after max_date: people can "
              "choose nothing" for name in ("none", "soon")),
            *["note    FORM_FILE: element nowhere: location_timezone: there is no 'Europe/Berln': "
              "people's own zone is taken instead"] * bool(
                  ticket_service.zoneinfo.available_timezones()),
            f"note    FORM_FILE: element other: {outside}",
            "warning FORM_FILE: mention @nobody: there is no such user (fine if it is a user "
            "group)",
            "warning FORM_FILE: mention @dave: this user is deactivated"])

    def test_a_time_is_shown_in_the_form_s_zone(self):
        if not ticket_service.zoneinfo.available_timezones():
            self.skipTest("this machine knows no zones")
        for zone, shown in (("Europe/Berlin", "2026-11-30 10:00 CET"),
                            ("Asia/Kolkata", "2026-11-30 14:30 IST"),
                            ("europe/BERLIN", "2026-11-30 10:00 CET"),
                            ("Europe/Berln", "2026-11-30 09:00 UTC")):
            self.start_with_form(form_of(
                field("datetime", "when", datetime_config={"location_timezone": zone})))
            root = self.ticket({"when": "2026-11-30T09:00:00Z"})
            self.assertEqual(root["message"].split("\n")[2], f"**When:** `{shown}`")
            self.assertEqual(root["props"]["ticket"]["answers"], {"when": "2026-11-30T09:00:00Z"})

    def test_isolates_that_belong_together_within_a_line_stay(self):
        for typed, kept in (
                *[(good, good) for good in ("\u2067שרת vm-042\u2069 down",
                                            "a \u2068b \u2066c\u2069 d\u2069 e")],
                ("a \u2067b", "a b"), ("a\u2069 b", "a b"), ("\u2069a\u2066 b", "a b"),
                ("a \u2067b\nc\u2069 d", "a b\nc d"),
                ("\u2066a\u2069\u2069 \u2067b", "\u2066a\u2069 b"),
                ("a\u202eb\u202c \u2067c\u2069", "ab \u2067c\u2069")):
            with self.subTest(ascii(typed)):
                root = self.ticket({"problem": f"{typed}\n."})
                self.assertEqual(root["props"]["ticket"]["answers"]["problem"], f"{kept}\n.")
                self.assertIn("\n> " + kept.replace("\n", "\n> ") + "\n> .", root["message"])

    def test_a_status_whose_key_mattermost_can_t_call_is_no_status(self):
        source = Path(ticket_service.__file__).read_text(encoding="utf-8")
        beginning = source.partition("class TicketService")[0]
        for key in ("waiting", "on_hold", "on-hold", "", "später"):
            changed = beginning.replace('"taken"', f'"{key}"')
            self.assertNotEqual(changed, beginning)
            with (contextlib.nullcontext() if key == "waiting"
                  else self.assertRaises(AssertionError)):
                exec(changed, {"__name__": "changed"})

    def test_windows_gets_one_sentence(self):
        code = ("import runpy, sys; sys.modules['resource'] = None; sys.argv[:] = sys.argv[1:]; "
                "runpy.run_path(sys.argv[0], run_name='__main__')")
        for process in [start_python(self.addCleanup, "-c", code, *arguments, env={})
                        for arguments in (["ticket_service.py"], ["ticket_service.py", "--help"],
                                          ["test_ticket_service.py", "--demo"])]:
            output, errors = process.communicate(timeout=20)
            self.assertEqual((process.returncode, output, errors.count("\n")), (2, "", 1), errors)
            self.assertIn("Windows", errors)

    def test_a_log_line_s_time_has_its_zone(self):
        process = start_python(self.addCleanup, "-m", "ticket_service",
                               env=self.settings(TZ="XXX-3:30"))
        self.assertRegex(process.stderr.readline(),
                         r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+0330 INFO listening on port \d+$")


# ----------------------------------------------------------------------------- the HTTP edge

FORM = urllib.parse.urlencode({
    "token": SLASH_TOKEN, "user_id": ALICE, "user_name": "alice", "channel_id": HELPDESK,
    "trigger_id": "x", "text": "typed"}).encode()
HOST = b"Host: tickets\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: smuggled\r\n\r\n"


def get(line=b"GET /health HTTP/1.1", headers=HOST):
    return line + b"\r\n" + headers + b"\r\n"


def length(body):
    return b"Content-Length: %d\r\n" % len(body)


def post(body=FORM, headers=None, path=b"/ticket"):
    headers = length(body) if headers is None else headers
    return b"POST " + path + b" HTTP/1.1\r\n" + HOST + headers + b"\r\n" + body


def submission(body):
    return post(body, path=b"/ticket/submit")


def mutated(chance, good):
    """Return a good request in which something is inserted, deleted, flipped or spliced."""
    raw = bytearray(chance.choice(good))
    for _ in range(chance.randint(1, 3)):
        at, end = sorted(chance.randrange(len(raw) + 1) for _ in range(2))
        what = chance.randrange(4)
        if what == 0:
            raw[at:at] = chance.choice([b"\r\n", b"\n", b"\0", b" ", b"\xff", b"[", b"%", b":"])
        elif what == 1:
            del raw[at:min(end, at + 20)]
        elif what == 2 and at < len(raw):
            raw[at] ^= 1 << chance.randrange(8)
        else:
            other = chance.choice(good)
            raw[at:] = other[chance.randrange(len(other)):]
    return bytes(raw)


GOOD_REQUESTS = {
    "curl": get(headers=HOST + b"User-Agent: curl/8.5.0\r\nAccept: */*\r\n"),
    "a query": get(b"GET /health?probe=1 HTTP/1.1"),
    "HTTP/1.0": get(b"GET /health HTTP/1.0", b""),
    "an empty line first": b"\r\n" + get(), "an empty Host": get(headers=b"Host:\r\n"),
    "odd case": get(headers=b"hOsT:x\r\n"),
    "bytes above ASCII in a value": get(headers=HOST + b"X: caf\xe9\r\n"),
    "a body with GET": get(headers=HOST + length(HEALTH)) + HEALTH,
    "a command": post(),
    "no need to continue": post(headers=length(FORM) + b"Expect: 100-continue\r\n"),
    "a request behind another": post() + HEALTH,
    "many people mentioned": post(FORM + b"&user_mentions=bob" * 900),
    "a long text in another alphabet": post(FORM + b"&text=" + b"%D0%B6" * 16_000),
    "a pasted JSON text": submission(b'{"a": "' + b'{\\"a\\": [1, {}]}, ' * 500 + b'"}'),
    "escaped characters": submission(b'{"a": "' + b"\\u003c" * 16_000 + b'"}'),
}
BAD_REQUESTS = [
    # the request line
    (400, "HTTP/0.9", b"GET /health\r\n\r\n"),
    (400, "one word", b"GET\r\n\r\n"),
    (400, "bare LF", b"GET /health HTTP/1.1\nHost: x\n\n"),
    (400, "TLS", b"\x16\x03\x01\x02\x00\x01\r\n\r\n"),
    (400, "a proxy's line", b"PROXY TCP4 10.0.0.1 10.0.0.2 1 2\r\n" + get()),
    *[(400, line, get(line)) for line in (
        b"GET /health HTTP/1.1 x", b"GET  /health HTTP/1.1", b" GET /health HTTP/1.1",
        b"GET\t/health HTTP/1.1", b"GET\r/health HTTP/1.1", b"GET\xa0/health\x85HTTP/1.1",
        b"GET /\0 HTTP/1.1", b"GET /\xff HTTP/1.1", b"GET /\x1b[31m HTTP/1.1",
        b"OPTIONS * HTTP/1.1", b"GET http://x/health HTTP/1.1", b"GET /health HTTP/2.0",
        b"GET /health HTTP/1.9", b"GET /health http/1.1", b"GET /health HTTP/01.1")],
    (431, "20 KB", get(b"GET /" + b"a" * 20_000 + b" HTTP/1.1")),
    (431, "70 KB", get(b"GET /" + b"a" * 70_000 + b" HTTP/1.1")),
    # headers
    (400, "no Host", get(headers=b"")),
    (400, "two Hosts", get(headers=HOST * 2)),
    (400, "a space before the colon", post(headers=b"Content-Length : 4\r\n")),
    *[(400, header, get(headers=header + b"\r\n" + HOST)) for header in (
        b"X", b": x", b" x: y", b"X: \0", b"X: a\rContent-Length: 5", b"X Y: 1", b"X\xdf: 1")],
    (400, "an odd Host", get(headers=b"Host: a b\r\n")),
    (431, "20 KB", get(headers=HOST + b"X: " + b"a" * 20_000 + b"\r\n")),
    (431, "1,000 headers", get(headers=HOST + b"X: aaaaaaaaaaaaaaaaaaaa\r\n" * 1000)),
    (417, "another expectation", post(headers=length(FORM) + b"Expect: x\r\n")),
    # how long the body is
    (411, "no length", post(headers=b"")),
    (400, "twice the same", post(headers=length(FORM) * 2)),
    (400, "twice, not the same", post(HEALTH, b"Content-Length: 0\r\n" + length(HEALTH))),
    *[(400, value, post(headers=b"Content-Length: %s\r\n" % value)) for value in (
        b"", b"-1", b"+4", b"4_6", b"0x2e", b"4.0", b"1e3", b"4, 4", b"4 4", b"\xb2")],
    (413, "a little too long", post(b"", b"Content-Length: 262145\r\n")),
    (413, "much too long", post(b"", b"Content-Length: " + b"9" * 5000 + b"\r\n")),
    *[(501, value, post(b"0\r\n\r\n" + HEALTH, more + b"Transfer-Encoding: %s\r\n" % value))
      for more in (b"", length(FORM))
      for value in (b"chunked", b"CHUNKED", b"identity", b"gzip, chunked", b"x", b"")],
    # paths and methods
    *[(404, path, get(b"GET " + path + b" HTTP/1.1")) for path in (
        b"/", b"/health/", b"//health", b"/./health", b"/%68ealth", b"/HEALTH", b"/health;x",
        b"/ticket%2fsubmit", b'/"-"200', b"/health%00", b"/health#x")],
    (404, "a request as body", post(HEALTH, path=b"/nope")),
    (405, "POST /health", post(path=b"/health")),
    *[(405, method, get(method + b" /ticket HTTP/1.1")) for method in (
        b"GET", b"OPTIONS", b"PUT", b"DELETE", b"PATCH", b"TRACE", b"CONNECT")],
    *[(405, method, get(method + b" /health HTTP/1.1")) for method in (
        b"get", b"BREW", b"__init__")],
    # forms and JSON
    (401, "an empty form", post(b"")),
    (401, "semicolons", post(FORM.replace(b"&", b";"))),
    (400, "not UTF-8", post(FORM + b"&x=\xff\xfe")),
    (400, "1,001 fields", post(FORM + b"&a=1" * 1000)),
    (400, "only the token", post(b"token=" + SLASH_TOKEN.encode())),
    *[(400, body[:20], submission(body)) for body in (
        b"", b"typed", b"[]", b"null", b'{"a":', b'"a"', b"[" * 50_000, b'{"a":' * 12_000,
        ('["\u2200", ' + "[" * 100_000).encode("utf-16-le"), b"\xef\xbb\xbf{}",
        ('{"a":' * 10_000).encode("utf-32-be"), '{"a": 1}'.encode("utf-16"),
        b'{"a": "\\"' * 50, b"9" * 5000, b'{"a": "caf\xe9"}', b'{"a": 1}x',
        b'{"a": "' + b'\\"' * 100_000)],
]


class WireCase(Case):
    """A client that sends whatever it likes."""

    def connect(self):
        connection = socket.create_connection(("127.0.0.1", self.service.server_port), 10)
        self.addCleanup(connection.close)
        return connection

    def start_busy(self, **details):
        """Start a service whose only thread waits for Mattermost; return the gate for that."""
        gate = self.gate()
        self.start_service(threads=1, **details)
        self.mattermost.script("POST /actions/", waits(gate))
        before = len(self.mattermost.made("POST /actions/"))
        self.connect().sendall(post())
        self.eventually(lambda: len(self.mattermost.made("POST /actions/")) > before, "the call")
        return gate

    def exchange(self, raw):
        """Return all that comes back until the connection is closed."""
        connection = self.connect()
        with contextlib.suppress(ConnectionError):  # refused while we still send
            connection.sendall(raw)
        return self.read_all(connection)

    def read_all(self, connection):
        with connection, connection.makefile("rb") as file:
            return file.read()

    def assert_answer(self, answer, status):
        """Expect one answer, in JSON, with nothing to tell who gives it; return its JSON."""
        head, _, body = answer.partition(b"\r\n\r\n")
        self.assertRegex(head, b"^HTTP/1\\.1 %d [A-Z]" % status)
        self.assertEqual(answer.count(b"HTTP/1.1 "), 1)
        self.assertIn(b"\r\nContent-Type: application/json\r\n", head)
        self.assertIn(b"\r\nContent-Length: %d\r\n" % len(body), head)
        self.assertIn(b"\r\nConnection: close", head)
        self.assertNotRegex(answer, b"(?i)python|<html|traceback|server:")
        return json.loads(body)


class EdgeTest(WireCase):
    def test_honest_requests_are_answered(self):
        for what, raw in GOOD_REQUESTS.items():
            with self.subTest(what):
                self.assert_answer(self.exchange(raw), 200)

    def test_bad_requests_get_one_refusal_and_one_log_line(self):
        for status, what, raw in BAD_REQUESTS:
            with self.subTest(what, status=status):
                self.log.lines.clear()
                self.assertEqual(list(self.assert_answer(self.exchange(raw), status)), ["error"])
                self.assert_logged(f"^WARNING .* {status} ")
                self.assertEqual(len(self.log.lines), 1)
                self.assertLess(len(self.log.lines[0]), 400)
        self.assertEqual(self.mattermost.posts, {})
        self.assertEqual(self.exchange(get())[-16:], b'{"status": "ok"}')

    def test_a_refusal_says_in_the_log_what_was_asked_for(self):
        for raw, line in ((get(b"GET /nope?x=1 HTTP/1.1"), "GET '/nope' 404 "),
                          (post(path=b"/health"), "POST '/health' 405 "),
                          (post(headers=b""), "POST '/ticket' 411 "), (b"NO\n", "no HTTP 400 "),
                          (b"\x16\x03\x01\x02", "no HTTP 400 this is TLS, ")):
            with self.subTest(line):
                self.exchange(raw)
                self.assert_logged(f"^WARNING 127.0.0.1 {line}")
        self.assertTrue(self.exchange(get(b"HEAD /nope HTTP/1.1")).endswith(b"\r\n\r\n"))

    def test_health_is_exactly_this_and_is_not_logged(self):
        self.log.lines.clear()
        answer = self.exchange(get())
        self.assertEqual(self.assert_answer(answer, 200), {"status": "ok"})
        self.assertTrue(answer.endswith(b'\r\n\r\n{"status": "ok"}'))
        head = self.exchange(get(b"HEAD /health HTTP/1.1"))
        self.assertTrue(head.endswith(b"Content-Length: 16\r\nConnection: close\r\n\r\n"), head)
        self.assertEqual(self.log.lines, [])
        self.assertEqual(self.mattermost.calls, [])

    def test_a_wrong_method_is_told_the_right_one(self):
        for path, allowed in ((b"/health", b"GET, HEAD"), (b"/ticket", b"POST")):
            answer = self.exchange(get(b"PUT " + path + b" HTTP/1.1"))
            self.assertIn(b"\r\nAllow: %s\r\n" % allowed, answer)

    def test_a_request_that_is_cut_short_is_not_acted_on(self):
        for raw in (b"", b"GET", get()[:-2], post()[:-1], submission(b"{}")[:-1]):
            with self.subTest(raw):
                connection = self.connect()
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                self.assertEqual(self.read_all(connection), b"")
        self.assertEqual(self.mattermost.calls, [])

    def test_a_good_request_that_was_changed_gets_one_whole_answer(self):
        chance = random.Random(20261125)
        good = [*GOOD_REQUESTS.values(), submission(json.dumps({
            "type": "dialog_submission", "state": "a.b", "user_id": ALICE,
            "submission": answers_to()}).encode())]
        good = [raw for raw in good if len(raw) < 5000]
        self.mattermost.triggers["x"] = ALICE
        for _ in range(300):
            raw = mutated(chance, good)
            with self.subTest(raw):
                connection = self.connect()
                with contextlib.suppress(OSError):  # refused and reset meanwhile
                    connection.sendall(raw)
                    connection.shutdown(socket.SHUT_WR)
                if answer := self.read_all(connection).removeprefix(CONTINUE):
                    status = int(answer[9:12])
                    self.assertLess(status, 502)
                    self.assertNotEqual(status, 500)
                    if not raw.startswith(b"HEAD"):
                        self.assert_answer(answer, status)
        self.assertEqual([line for line in self.log.lines if "Traceback" in line], [])

    def test_deep_nesting_is_survived_on_the_small_stack_of_a_thread(self):
        self.addCleanup(threading.stack_size, threading.stack_size(2**20))  # as Alpine's

        def read(_):
            for body in (b"[" * 20_000, b'{"a":' * 20_000, b"[" * 20_000 + b"]" * 20_000):
                with self.assertRaisesRegex(ValueError, "nested too deeply"):
                    ticket_service.foreign_json(body)
            most = ticket_service.MAX_DEPTH
            self.assertTrue(ticket_service.foreign_json(b"[" * most + b"]" * most))

        in_threads(1, read)

    def test_a_request_may_come_byte_by_byte(self):
        connection = self.connect()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in post():
            connection.send(bytes([byte]))
        self.assert_answer(self.read_all(connection), 200)

    def test_continue_is_said_before_the_body_but_not_for_one_that_is_refused(self):
        connection = self.connect()
        connection.sendall(post(b"", headers=length(FORM) + b"Expect: 100-continue\r\n"))
        self.assertEqual(connection.recv(100), CONTINUE)
        connection.sendall(FORM)
        self.assert_answer(self.read_all(connection), 200)
        for status, headers, path in ((413, b"Content-Length: 10000000\r\n", b"/ticket"),
                                      (404, length(FORM), b"/nope")):
            raw = post(b"", headers + b"Expect: 100-continue\r\n", path)
            self.assert_answer(self.exchange(raw), status)

    def test_a_refusal_reaches_a_client_that_is_still_sending(self):
        big = post(b"a" * 5_000_000)
        for _ in range(5):
            self.assert_answer(self.exchange(big), 413)

    def test_a_refused_client_that_expects_to_continue_may_go_on_sending_for_a_while(self):
        self.service.linger = 0.3
        connection = self.connect()
        connection.sendall(post(b"", headers=b"Content-Length: 9\r\nExpect: 100-continue\r\n",
                                path=b"/nothing"))
        while connection.recv(1000):  # the answer, and its end
            pass
        connection.sendall(b"a")
        time.sleep(0.02)
        connection.sendall(b"a")  # would fail if the first had been answered with a reset

    def test_a_client_that_goes_on_sending_is_left(self):
        self.service.linger = 0.05
        connection = self.connect()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.sendall(b"NO HTTP\n")
        began = time.monotonic()
        with self.assertRaises(ConnectionError):
            while time.monotonic() < began + 5:
                connection.sendall(b"a" * 1000)
                time.sleep(0.01)

    def test_the_whole_request_has_a_deadline(self):
        self.service.arrive_within = 0.1
        starts = (b"", b"GET /", get()[:-2] + b"X: ", post(b"", headers=b"Content-Length: 999\r\n"))

        def drip(number):
            connection = self.connect()
            connection.sendall(starts[number])
            began = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while not is_readable(connection):
                    self.assertLess(time.monotonic() - began, 5)
                    connection.sendall(b"a" if number else b"")
                    time.sleep(0.02)
                self.assertEqual(connection.recv(100), b"")

        in_threads(len(starts), drip)

    def test_a_client_that_resets_costs_no_log_line(self):
        self.log.lines.clear()
        for raw in (b"", b"POST /ticket HTTP/1.1\r\nHost", post()[:-1]):
            connection = self.connect()
            connection.sendall(raw)
            resets(connection)
        self.assert_answer(self.exchange(get()), 200)
        self.assertEqual(self.log.lines, [])

    def test_when_the_table_is_full_the_oldest_gives_way(self):
        self.service.most_requests, self.service.grace = 20, 0
        silent = [self.connect() for _ in range(30)]
        self.eventually(lambda: sum(map(is_readable, silent)) == 10, "hanging up")
        self.assertTrue(all(is_readable(connection) for connection in silent[:10]))
        self.assert_answer(self.exchange(get()), 200)
        silent[-1].sendall(get())
        self.assert_answer(self.read_all(silent[-1]), 200)

    def test_nobody_gives_way_before_he_has_had_his_time(self):
        self.service.most_requests, self.service.grace = 5, 0.5
        honest = [self.connect() for _ in range(5)]
        late = self.connect()
        late.sendall(get())
        time.sleep(0.05)
        for connection in honest:
            connection.sendall(get())
            self.assert_answer(self.read_all(connection), 200)
        self.assert_answer(self.read_all(late), 200)

    def test_requests_that_are_not_whole_take_no_threads(self):
        before = threading.active_count()
        half = [self.connect() for _ in range(50)]
        for connection in half:
            connection.sendall(post()[:-1])
        self.assert_answer(self.exchange(post()), 200)
        self.assertLessEqual(threading.active_count(), before + 3)  # ours, the stand-in's, a thread
        for connection in half[:5]:
            connection.sendall(FORM[-1:])
            self.assert_answer(self.read_all(connection), 200)

    def test_when_half_requests_take_too_much_memory_the_oldest_gives_way(self):
        size = self.service.budget.left = 400_000
        silent, *half = [self.connect() for _ in range(4)]
        for connection in half:
            connection.sendall(post(FORM + b"&x=" + b"a" * 120_000)[:-1])
            self.health_after_all_was_read()
        self.assertEqual(self.read_all(half[0]), b"")
        for connection in half[1:]:
            connection.sendall(b"a")
            self.assert_answer(self.read_all(connection), 200)
        silent.sendall(get())
        self.assert_answer(self.read_all(silent), 200)
        many = [self.connect() for _ in range(30)]
        for connection in many:
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(post(FORM + b"&x=" + b"a" * 120_000)[:-1])
            self.assertGreaterEqual(self.service.budget.left, 0)
        self.assertEqual(self.health(), {"status": "ok"})
        for connection in many:
            connection.close()
        self.eventually(lambda: self.service.budget.left == size, "giving all back")

    def health_after_all_was_read(self):
        """Ask for the health until what was sent before has been read, 64 KiB at a time."""
        for _ in range(4):
            self.assertEqual(self.health(), {"status": "ok"})

    def test_when_whole_requests_take_too_much_memory_the_oldest_is_answered_at_once(self):
        gate = self.start_busy()
        self.service.budget.left = 400_000
        waiting = [self.connect() for _ in range(3)]
        for connection in waiting:
            connection.sendall(post(FORM + b"&x=" + b"a" * 120_000))
            self.health_after_all_was_read()
        self.eventually(lambda: any(map(is_readable, waiting)), "answering early")
        [connection] = filter(is_readable, waiting)
        self.assertEqual(
            self.assert_answer(self.read_all(connection), 200)["text"],
            ticket_service.given_back(ticket_service.FORM_NOT_OPENED, "typed")["text"])
        gate.set()
        self.eventually(lambda: len(self.mattermost.made("POST /actions/")) == 3, "the others")

    def test_when_too_many_requests_wait_the_oldest_is_answered_at_once(self):
        self.start_busy(files=30)  # so ten connections
        waiting = []
        for _ in range(11):  # the oldest is always one that has sent all
            waiting.append(self.connect())
            waiting[-1].sendall(post())
        self.eventually(lambda: sum(map(is_readable, waiting)) == 2, "answering early")
        for connection in filter(is_readable, waiting):
            self.assertIn(ticket_service.FORM_NOT_OPENED,
                          self.assert_answer(self.read_all(connection), 200)["text"])

    def test_a_health_check_is_answered_even_if_all_threads_wait_for_mattermost(self):
        gate = self.start_busy()
        for raw in (get(), get(b"HEAD /health?x HTTP/1.1"), get(b"GET /health HTTP/1.0", b"")):
            self.assertIn(b"HTTP/1.1 200 OK", self.exchange(raw))
        self.assertFalse(gate.is_set())

    def test_300_connections_at_once_are_answered(self):
        in_threads(300, lambda _: self.assert_answer(self.exchange(get()), 200))

    def test_a_stop_answers_what_was_accepted_and_cuts_what_is_not_sent(self):
        gate = self.gate()
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", waits(gate))
        half, silent, late = self.connect(), self.connect(), self.connect()
        half.sendall(post()[:-5])
        late.sendall(get()[:-2])
        answers = []
        submitting = threading.Thread(
            target=lambda: answers.append(self.mattermost.submit_dialog(answers_to())))
        submitting.start()
        self.eventually(lambda: self.mattermost.made("POST /posts"), "the post")
        self.service.stop_within = 0.2
        stopping = threading.Thread(target=self.service.shutdown)
        stopping.start()
        with self.assertRaises(ConnectionError):  # as soon as nobody listens any more
            while True:
                self.connect().close()
        late.sendall(b"\r\n")
        self.assert_answer(self.read_all(late), 200)
        self.assertEqual((self.read_all(half), self.read_all(silent)), (b"", b""))
        self.assertEqual(answers, [])
        gate.set()
        stopping.join()
        submitting.join()
        self.assertEqual(answers, [{}])
        self.assertEqual(len(self.mattermost.posts), 2)

    def test_under_load_a_stop_leaves_nobody_without_an_answer(self):
        answered, stopping = [], threading.Event()

        def call(_):
            while not stopping.is_set():
                with contextlib.suppress(ConnectionError):
                    connection = self.connect()
                if not stopping.is_set():  # later ones may have come too late to be accepted
                    connection.sendall(get())
                    answered.append(self.read_all(connection)[-16:])

        stop = threading.Timer(0.05, lambda: (stopping.set(), self.service.shutdown()))
        stop.start()
        in_threads(8, call)
        stop.join()
        self.assertGreater(len(answered), 5)
        self.assertEqual(set(answered), {b'{"status": "ok"}'})


class ClockTest(WireCase):
    """Whatever Mattermost does, or does not do, a person is answered in time."""

    late = {"/ticket": ticket_service.given_back(ticket_service.FORM_NOT_OPENED, TYPED)["text"],
            "/ticket/submit": {"error": ticket_service.NOT_REACHED},
            "/ticket/action": ticket_service.PRESS_AGAIN}

    def setUp(self):
        super().setUp()
        self.start_service(threads=8)
        self.file()
        self.replies()
        [self.root] = self.mattermost.roots()

    def press(self):
        """Let who does not have the ticket take it, or take it over; return what they see."""
        ticket = self.root["props"]["ticket"]
        return self.mattermost.press(self.root["id"], STATUSES[ticket["status"]].steps["taken"],
                                     ALICE if ticket["status_by"] == "bob" else BOB)

    def changes(self):
        """Return how often the ticket has been changed."""
        return len(self.root["props"]["ticket"]["history"]) - 1

    def ask(self):
        """Use all three routes at once; return what people see, by route."""
        number, seen = len(self.mattermost.dialogs) - 1, {}
        what_to_do = {
            "/ticket": lambda: self.mattermost.run_command(TYPED), "/ticket/action": self.press,
            "/ticket/submit": lambda: self.mattermost.submit_dialog(answers_to(), number)}
        in_threads(3, lambda index: seen.update(
            {path: do() for path, do in list(what_to_do.items())[index:index + 1]}))
        return seen

    def test_however_slowly_mattermost_answers_a_person_is_answered_and_may_try_again(self):
        for number, behave in enumerate((waits, drips, body_drips), 2):
            with self.subTest(behave.__name__):
                gate, dialog = self.gate(), len(self.mattermost.dialogs)
                self.mattermost.run_command()
                self.limit(answer_within=0.04)
                self.mattermost.failure = ("", behave(gate))
                self.assertEqual(self.ask(), self.late)
                self.assertEqual(self.health(), {"status": "ok"})
                self.mattermost.failure = None
                gate.set()
                self.limit()
                self.assertEqual(self.mattermost.submit_dialog(answers_to(), dialog), {})
                self.eventually(lambda: any(
                    re.search("INFO ticket=.* status=taken|/ticket/action, after a late", line)
                    for line in self.log.lines), "what was pressed")
                self.assertEqual(self.press(), "")
                self.eventually(lambda: sum(
                    bool(re.fullmatch(pattern(ticket_service.CONFIRMATION), text))
                    for *_, text in self.mattermost.ephemeral) == number, "the confirmation")
                self.replies(number + self.changes())
                self.log.lines.clear()
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual((len(self.mattermost.roots()), len(self.mattermost.replies())),
                         (4, 4 + self.changes()))

    def test_who_waits_for_another_submission_of_the_same_dialog_is_answered_too(self):
        gate, answers = self.gate(), []
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", waits(gate))
        first = threading.Thread(
            target=lambda: answers.append(self.mattermost.submit_dialog(answers_to())))
        first.start()
        self.eventually(lambda: len(self.mattermost.made("POST /posts")) == 3, "the post")
        self.limit(answer_within=0.04)
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), self.late["/ticket/submit"])
        gate.set()
        first.join()
        self.assertEqual(answers, [{}])
        self.service.shutdown()
        self.assertEqual(len(self.mattermost.roots()), 2)

    def test_a_form_that_opens_after_its_late_answer_works(self):
        gate = self.gate()
        self.mattermost.script("POST /actions/", waits(gate))
        self.limit(answer_within=0.04)
        self.assertEqual(self.mattermost.run_command(TYPED), self.late["/ticket"])
        gate.set()
        self.eventually(lambda: len(self.mattermost.dialogs) == 2, "the form")
        self.limit()
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})

    def test_a_request_that_no_thread_has_begun_is_answered_in_time_and_not_begun_later(self):
        self.mattermost.run_command()
        gate = self.start_busy()
        self.limit(answer_within=0.04)
        called = list(self.mattermost.calls)
        self.assertEqual(self.ask(), self.late)
        for path in (b"/ticket/submit", b"/ticket/action"):  # of which it reads nothing
            self.assert_answer(self.exchange(post(b"[", path=path)), 200)
        gate.set()
        self.service.shutdown()
        self.assertEqual(self.mattermost.calls, called)

    def test_a_late_answer_lets_go_of_the_request(self):
        gate = self.gate()
        self.start_service(threads=3)
        self.mattermost.failure = ("", waits(gate))
        self.limit(answer_within=0.03)
        in_threads(60, lambda _: self.assert_answer(self.exchange(post(FORM + b"x" * 9999)), 200))
        alive = [one for one in gc.get_objects() if isinstance(one, ticket_service.Request)]
        self.assertLess(len(alive), 20)  # three of them are still worked on
        self.assertLess(sum(len(one.received) for one in alive), 9999)

    def test_late_or_not_what_was_pressed_happens_once_and_is_told_once(self):
        chance, told = random.Random(3), collections.Counter()
        for _ in range(20):
            self.limit(answer_within=chance.choice((24, chance.uniform(0, 0.02))))
            self.mattermost.script("GET /posts/", slow(0.01))
            told[self.press()] += 1
        self.service.shutdown()
        self.assertGreaterEqual(self.changes(), told[""])
        self.assertGreater(told[""], 0)
        self.assertEqual(len(self.mattermost.replies()), 1 + self.changes())

    def test_a_late_answer_does_not_wait_for_a_client_that_does_not_read(self):
        gate = self.gate()
        self.start_service(threads=1)
        self.service.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 5000)
        self.mattermost.script("POST /actions/", waits(gate))
        text = "x" * 200_000
        connections = [self.connect() for _ in range(3)]
        self.limit(answer_within=0.04)
        for connection in connections:  # the first one's thread waits for Mattermost
            connection.sendall(post(FORM + text.encode()))
        self.eventually(lambda: all(map(is_readable, connections)), "the late answers")
        self.assertEqual(self.health(), {"status": "ok"})
        for connection in connections:
            self.assertIn(text, self.assert_answer(self.read_all(connection), 200)["text"])

    def test_a_stop_does_not_wait_for_ever(self):
        gate, seen = self.gate(), []
        self.mattermost.run_command()
        self.mattermost.failure = ("", drips(gate))
        self.limit(answer_within=0.2)
        asking = threading.Thread(target=lambda: seen.append(self.ask()))
        before = len(self.mattermost.calls)
        asking.start()
        self.eventually(lambda: len(self.mattermost.calls) >= before + 3, "the calls")
        self.service.follow_up_within, began = 0, time.monotonic()
        self.service.shutdown()
        self.assertLess(time.monotonic() - began, 8)
        asking.join()
        self.assertEqual(seen, [self.late])
        self.assertFalse(gate.is_set())

    def test_why_an_answer_was_late_is_logged_when_it_is_known(self):
        gate = self.gate()
        self.mattermost.keeps = False
        self.mattermost.script("POST /actions/", waits(gate))
        self.limit(answer_within=0.05, timeout=0.2)
        self.assertEqual(self.mattermost.run_command(TYPED), self.late["/ticket"])
        self.assert_logged("WARNING 127.0.0.1 POST '/ticket' 200 there was no answer within 0 s")
        self.assert_logged("WARNING POST /ticket, after a late answer: no answer of .*timed out")


class KeptConnectionTest(Case):
    """Calls to Mattermost share connections, over http and https."""

    scheme = "http"

    def setUp(self):
        super().setUp()
        self.api = self.service.service.mattermost

    def call(self):
        return self.api.get_me()["username"]

    def test_one_connection_serves_one_call_after_the_other_till_it_is_closed_or_idle(self):
        for _ in range(5):
            self.assertEqual(self.call(), "ticket-bot")
        self.assertEqual(self.mattermost.connections, 1)
        self.mattermost.script("GET /users/me", closes)
        self.call()
        self.call()
        self.assertEqual(self.mattermost.connections, 2)
        self.api.connections.longest = 0
        self.call()
        self.assertEqual(self.mattermost.connections, 3)

    def test_a_connection_that_mattermost_has_closed_is_not_used(self):
        self.call()
        self.mattermost.hang_up()
        self.eventually(lambda: not self.mattermost.open, "hanging up")
        self.assertEqual(self.call(), "ticket-bot")
        self.assertEqual(len(self.mattermost.calls), 2)

    def test_a_call_whose_kept_connection_dies_is_made_again_once(self):
        for behave in (hangs_up, cuts_the_answer):
            self.call()
            self.mattermost.script("GET /users/me", behave)
            self.assertEqual(self.call(), "ticket-bot")
            self.mattermost.script("GET /users/me", behave, behave)
            with self.assertRaises(ticket_service.MattermostError):
                self.call()

    def test_a_failure_on_a_fresh_connection_is_the_caller_s(self):
        self.mattermost.keeps = False
        for behave in (hangs_up, cuts_the_answer):
            self.mattermost.script("GET /users/me", behave)
            with self.assertRaises(ticket_service.MattermostError):
                self.call()
        self.assertEqual(len(self.mattermost.calls), 2)

    def test_silence_is_not_waited_for_twice(self):
        gate = self.gate()
        self.call_at_once(2)
        self.limit(timeout=0.1)
        self.mattermost.script("GET /users/me", waits(gate))
        with self.assertRaises(ticket_service.MattermostError):
            self.call()
        self.assertEqual(len(self.mattermost.calls), 3)
        self.limit()
        self.call()  # on a new connection: the other one may be as dead
        self.assertEqual(self.mattermost.connections, 3)

    def call_at_once(self, number):
        """Make so many calls on so many connections."""
        gate = self.gate()
        before = len(self.mattermost.calls)
        self.mattermost.script("GET /users/me", *[waits(gate)] * number)
        calling = threading.Thread(target=in_threads, args=(number, lambda _: self.call()))
        calling.start()
        self.eventually(lambda: len(self.mattermost.calls) == before + number, "the calls")
        gate.set()
        calling.join()

    def test_only_some_connections_are_kept(self):
        self.api.connections.most = 2
        self.call_at_once(5)
        self.eventually(lambda: len(self.mattermost.open) == 2, "closing three of five")

    def test_a_restart_of_mattermost_goes_unnoticed(self):
        self.assertEqual(self.file(), {})
        self.replies()
        self.mattermost.shutdown()
        self.mattermost.server_close()
        self.mattermost.hang_up()
        self.mattermost = self.start_again()
        self.assertEqual(self.file(), {})


class KeptTlsConnectionTest(KeptConnectionTest):
    """The same over https, with a private CA."""

    scheme = "https"

    @classmethod
    def setUpClass(cls):
        cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
        cls.ca_file = Path(cls.folder) / "ca.pem"
        cls.ca_file.write_text(CERTIFICATES)
        key_file = Path(cls.folder) / "key.pem"
        key_file.write_text(PRIVATE_KEY)
        cls.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        cls.tls.load_cert_chain(cls.ca_file, key_file)

    def start_stand_in(self, **details):
        return super().start_stand_in(**{"tls": self.tls, **details})

    def settings(self, **changes):
        return super().settings(**{"SSL_CERT_FILE": str(self.ca_file), **changes})

    def test_a_certificate_of_an_unknown_ca_is_refused_and_nothing_is_sent(self):
        self.start_service(SSL_CERT_FILE="")
        self.assert_hopeless("CERTIFICATE_VERIFY.*: SSL_CERT_FILE names the CAs to trust$")

    def test_where_no_tls_is_spoken_it_is_said_so(self):
        self.mattermost.tls, url = None, self.mattermost.url
        self.start_service(MATTERMOST_URL=url)
        self.assert_hopeless("WRONG_VERSION.*is it http://\\?$")

    def assert_hopeless(self, why):
        mattermost = self.service.service.mattermost
        with self.assertRaisesRegex(ticket_service.MattermostError, why) as failed:
            mattermost.get_me()
        self.assertFalse(failed.exception.may_pass)  # "again in a moment" would not be true
        self.assertEqual(self.mattermost.run_command(), ticket_service.NOT_SECURE)
        self.assertEqual(self.mattermost.calls, [])


# ------------------------------------------------------------------------------------ the form

def element(kind="text", name="x", **details):
    return {"display_name": "X", "name": name, "type": kind, **details}


OPTIONS = [{"text": "One", "value": "1", "mention": "@first"}, {"text": "T`wo", "value": "2"}]
EVERY_TYPE = {"title": "All", "elements": [
    element("text", "called", subject=True, optional=True),
    element("text", "text", min_length=2, max_length=5), element("textarea", "area", optional=True),
    element("textarea", "code", code=True), element("text", "number", subtype="number"),
    element("text", "email", subtype="email"), element("text", "url", subtype="url"),
    element("text", "tel", subtype="tel", optional=True, options=OPTIONS),
    element("select", "select", options=OPTIONS), element("radio", "radio", options=OPTIONS),
    element("bool", "must"), element("bool", "may", optional=True)]}
GOOD = {"text": "abc", "code": "\\_archive\\*.bak\n- a", "number": 42, "email": "a@b",
        "url": "http://x", "select": "1", "radio": "2", "must": True}

# Elements of a form, and the first complaint about them
BAD_ELEMENTS: tuple = (
    ([], "elements is missing"), ({"a": 1}, "elements must be a list"),
    ([1], "element 1: must be a JSON object"),
    ([element("users")], "element x: type 'users' is not supported"),
    ([element("file")], "type 'file' is not supported: people put files into the ticket's thread"),
    ([{"name": "x", "display_name": "X"}], "element x: type is missing"),
    ([{"type": "text", "name": "x"}], "element x: display_name is missing"),
    ([{"type": "text", "display_name": "X"}], "element 1: name is missing"),
    ([element(), element()], "element x: another one has the same name"),
    ([element(display_name=" \u200b")], "display_name is blank"),
    ([element(optional="true")], "optional must be true or false"),
    ([element(default=7)], "default must be a text"),
    ([element(max_length="9")], "max_length must be a whole number"),
    ([element(min_length=True)], "min_length must be a whole number"),
    ([element(min_length=9, max_length=8)], "min_length must not be more than max"),
    ([element(min_length=-1)], "min_length must be from 1 to"),
    ([element(min_length=151)], "min_length"), ([element(min_length=2**31)], "min_length"),
    ([element(subtype="password")], "subtype must be one of text, email"),
    ([element(subtype="number", default="x")], "default 'x': "),
    ([element("bool", default="True")], 'must be "true" or "false"'),
    ([element("select")], "options is missing"), ([element("radio", options=[])], "options is mis"),
    ([element("select", options=["One"])], "option 1: must be a JSON object"),
    ([element("select", options=[{"text": "One"}])], "option 1: value is missing"),
    ([element("select", options=[{"text": "", "value": "1"}])], "option 1: text is missing"),
    ([element("select", options=OPTIONS, default="One")], "default 'One': "),
    ([element("select", options=[{"text": "A", "value": " "}])], "value is blank"),
    ([element("select", options=[{"text": "A", "value": "a"}, {"text": "B",
      "value": "a "}])], "option 2: another one has the same"),
    ([element("select", options=OPTIONS * 2)], "option 3: another one has the same"),
    ([element("select", options=OPTIONS, multiselect=True, default="1,3")], "default '1,3': "),
    ([element("select", options=[{"text": "A", "value": "a,b"}], multiselect=True)],
     "option 1: value must have no comma"),
    ([element("select", options=[{**OPTIONS[0], "mention": "first"}])],
     "option 1: mention must look like @team-or"),
    ([element("select", options=[{**OPTIONS[0], "mentoin": "@a"}])], "mentoin"),
    ([element("text", options=[{**OPTIONS[0], "mentoin": "@a"}])], "option 1: mentoin is not one"),
    ([element("select", data_source="people")], "data_source 'people' is not supported: only us"),
    ([element("select", data_source="dynamic")],
     "data_source 'dynamic' is not supported: let people choose from options, users or channels"),
    ([element("select", options=OPTIONS, refresh=True)],
     "refresh is not supported: show all elements from the beginning"),
    ([element("text", data_source_url="http://x")], "data_source_url is not supported: let people"),
    ([element("select", data_source="users", default="../x")], "default '../x': "),
    ([element("date", default="soon")], f"default 'soon': {ticket_service.NOT_A_DATE}"),
    ([element("date", default="2026-02-30")], "default '2026-02-30': "),
    ([element("date", min_date="2026-13-01")], "'2026-13-01' is no date"),
    ([element("datetime", max_date="+3y")], "'+3y' is no date"),
    ([element("datetime", default="2026-11-27T25:00:00Z")],
     f"default '2026-11-27T25:00:00Z': {ticket_service.NOT_A_TIME}"),
    ([element("datetime", datetime_config={"time_zone": "x"})],
     "datetime_config: time_zone is not one of"),
    ([element("datetime", datetime_config={"min_date": "x"})], "'x' is no date"),
    ([element(placehoder="x")], "element x: placehoder is not one of"),
    ([element(code=True)], "code is not for a text"),
    ([element("radio", options=OPTIONS, subject=True)], "subject is not for a radio"),
    ([element(subject="yes")], "element x: subject must be true or false"),
    ([element(subject=True), element(name="y", subject=True)], "only one element can be the subj"),
    ([element(channel="x" * 26)], "element x: channel is not"),
    *(([element("radio", options=[{**OPTIONS[0], "channel": channel}])],
       "element x: option 1: channel must be a channel's ID") for channel in (
           "netops", "~netops", "x" * 25, "x" * 27, "x" * 25 + "_", "../" + "x" * 23)),
)
GOOD_FORM = {"title": "T", "elements": [element()]}
BAD_FORMS: tuple = (
    (None, "JSON object"), ([], "JSON object"), ("x", "JSON object"),
    ({"title": "T"}, "elements is missing"),
    ({"elements": [element()]}, "title is missing"),
    ({**GOOD_FORM, "title": "  "}, "title is blank"),
    ({**GOOD_FORM, "icon_url": 7}, "icon_url must be a text"),
    ({**GOOD_FORM, "submit_lable": "x"}, "submit_lable is not one of"),
    ({**GOOD_FORM, "source_url": "http://x"}, "source_url is not supported: show all elements"),
    ({**GOOD_FORM, "mention": "helpdesk"}, "must look like @team-or-user"),
    ({**GOOD_FORM, "mention": "@a @b"}, "must look like @team-or-user"),
)
# What programs that make forms write everywhere, though it says nothing
SAYS_NOTHING = {
    "subtype": "", "default": None, "placeholder": "", "help_text": None, "optional": "",
    "min_length": 0, "max_length": 0, "data_source": "", "data_source_url": "", "options": None,
    "multiselect": False, "refresh": False, "datetime_config": None, "min_date": "",
    "max_date": "", "time_interval": 0}


class FormCase(Case):
    def message(self):
        """Return the message of the last ticket, without its heading and second line."""
        return "\n".join(self.mattermost.roots()[-1]["message"].split("\n")[2:])


class FormTest(FormCase):
    def setUp(self):
        super().setUp()
        self.start_with_form(EVERY_TYPE)

    def test_a_form_from_a_file_is_opened_as_it_is_but_for_our_keys(self):
        self.start_with_form({**EVERY_TYPE, "mention": "@helpdesk", "icon_url": "http://x/y"})
        self.mattermost.run_command()
        _, _, dialog = self.mattermost.dialogs[0]
        expected = json.loads(json.dumps(EVERY_TYPE["elements"]))
        for element in expected:
            element.pop("code", None)
            element.pop("subject", None)
            if element["type"] == "textarea":  # else clients would cut a text at 3,000
                element["max_length"] = 50_000
            for option in element.get("options", ()):
                option.pop("mention", None)
        self.assertEqual(dialog["elements"], expected)
        self.assertEqual((dialog["title"], dialog["icon_url"]), ("All", "http://x/y"))

    def test_every_type_has_its_line_in_the_ticket(self):
        answers = {**GOOD, "area": "a\n\n    b", "tel": "+49 `1`", "may": False}
        self.assertEqual(self.file(answers), {})
        self.assertEqual(self.message(), f"""\
**X:** `abc`
**X:**
> a
> \n>     b

**X:**
```
\\_archive\\*.bak
- a
```
**X:** `42` · **X:** `a@b` · **X:** `http://x` · **X:** `` +49 `1` `` · **X:** `One` @first · \
**X:** ``T`wo`` · **X:** `{ticket_service.YES}`""")
        self.assertEqual(self.mattermost.roots()[0]["props"]["ticket"]["answers"],
                         {**answers, "number": "42"})

    def test_the_built_in_form_is_a_good_one(self):
        self.start_service()
        self.mattermost.run_command()
        _, _, dialog = self.mattermost.dialogs[0]
        for element in dialog["elements"]:
            if element["type"] == "select":  # without, it is an empty box in Mattermost's clients
                self.assertTrue(element["placeholder"])
        answers = answers_to()
        for element in dialog["elements"]:
            if element["type"] == "textarea":
                answers[element["name"]] = "\n".join(["\tat com.example.Stack#trace"] * 259)
        self.assertEqual(self.mattermost.submit_dialog(answers), {})
        [root] = self.mattermost.roots()
        self.assertGreater(len(root["message"]), 7000)

    def test_numbers_and_booleans_may_arrive_as_texts_and_blanks_as_anything(self):
        for empty in ("", None, " \n", "\x07\u202e"):
            with self.subTest(empty):
                answers = {**GOOD, "number": "4.5", "must": "true", "area": empty, "tel": empty,
                           "unknown": "key"}
                self.assertEqual(self.file(answers), {})
                self.assertEqual(self.message().count("**X:**"), len(GOOD))

    def test_an_answer_that_breaks_a_rule_is_told_at_its_field(self):
        self.mattermost.run_command()
        required, tick = ticket_service.REQUIRED, ticket_service.NOT_TICKED
        option, number = ticket_service.NOT_AN_OPTION, ticket_service.NOT_A_NUMBER
        for name, value, sentence in (
                ("text", None, required), ("text", "   ", required),
                ("text", "a", ticket_service.TOO_SHORT.format(limit=2)),
                ("text", "abcdef", ticket_service.TOO_LONG.format(limit=5, excess=1)),
                ("text", ["a"], ticket_service.NOT_TEXT), ("text", {}, ticket_service.NOT_TEXT),
                ("area", "x" * 50_001, ticket_service.TOO_LONG.format(limit=50_000, excess=1)),
                ("number", "many", number), ("number", "1_0", number), ("number", True, number),
                ("number", float("inf"), number), ("email", "alice", ticket_service.NOT_AN_EMAIL),
                ("url", "example.com", ticket_service.NOT_A_URL),
                ("tel", "1" * 151, ticket_service.TOO_LONG.format(limit=150, excess=1)),
                ("select", "3", option), ("select", "", required), ("select", "One", option),
                ("select", 3, option), ("radio", None, required),
                ("must", False, tick), ("must", None, tick), ("may", "perhaps", option)):
            with self.subTest(name=name, value=value):
                answer = self.mattermost.submit_dialog({**GOOD, name: value})
                self.assertEqual(answer, {"errors": {name: sentence}})
        self.assertEqual(self.mattermost.submit_dialog({})["errors"].keys(), GOOD.keys())
        self.assertEqual(self.mattermost.posts, {})
        self.assertEqual(self.mattermost.submit_dialog(GOOD), {})

    def assert_shown(self, typed, shown):
        """Check what becomes of a text in a textarea."""
        self.assertEqual(self.file({**GOOD, "area": typed}), {})
        self.assertIn(f"**X:**\n{shown}\n\n**X:**\n```\n", self.message())

    def assert_quoted(self, typed, shown):
        """Check what becomes of prose in a textarea."""
        self.assert_shown(typed, "\n".join(f"> {line}" for line in shown.split("\n")))

    def test_nothing_that_is_typed_gets_out_of_its_place(self):
        for typed, shown in (
                ("---", "---"), ("a\r\nb\rc", "a\nb\nc"),
                ("a\u2424b\u2028c\u2029d\x85e\x0bf\x0cg", "a\nb\nc\nd\ne\nf\ng"), ("<!-- ", "<!--"),
                ("a\x00b\x1bc\u202ed\u2066e\ud800f", "abcdef"), ("\U0001f4be é", "\U0001f4be é"),
                (" \n\n  a:\n    b: c \n \n", "  a:\n    b: c"), ("  a  ", "a")):
            with self.subTest(typed):
                self.assert_quoted(typed, shown)
        for typed, shown in (
                ("``", "``` `` ```"), ("a`b", "``a`b``"), ("``a", "``` ``a ```"), ("a\nb", "`a b`"),
                ("@all", "`@all`"), ("![x]", "`![x]`"), ("  ab ", "`ab`")):
            with self.subTest(typed):
                self.assertEqual(self.file({**GOOD, "text": typed}), {})
                self.assertTrue(self.message().startswith(f"**X:** {shown}\n"), self.message())

    def test_prose_pings_no_channel_and_loads_no_image(self):
        for typed in (  # ⁂ is where the guard stands
                "@⁂all", "_@⁂channel_", "x.@⁂here", "@⁂all_", "@⁂all-x", '"@⁂all"', "`@⁂ALL`",
                "@⁂all\U0002ebf0", "www2.corp.com/a`b @⁂all c`", "[w@⁂all](u), [@⁂channelw](u)",
                "@allx @bob x@all 1@here é@all alice@example.com root@db01",
                "&⁂#64;all @&⁂#x61;ll &⁂commat;here &lt; &#64 `&⁂#64;all`",
                "!⁂[x](http://e/x.png) and vec!⁂[1], [link](u) and vec![1]", "!⁂[a\nb](u)",
                "!⁂[[\\]]u[]](http://e/x.png)", "[[!⁂\\[a](u)\\[a](u)", "`!⁂[a](u)`",
                "a`b !⁂[x](u)` c", "`a`\n \n`!⁂[a](http://e/x.png)`", "![x]\n\n[x]⁂: u",
                "![x]\n> 1. - [x]⁂: u", "- [ ] [x]⁂: u", "[a\n- [ ] [x]⁂: u", "[a\nb]⁂: u",
                "[a\\]b]⁂: u", "[a\\]⁂: u",
                "[a[b]⁂: u", "[@⁂all]⁂: u", "[INFO]⁂: started\n[2001:db8::1]⁂:443\nsshd[7]: hello",
                "**bold** [x](u) `code`"):
            with self.subTest(typed):
                self.assert_quoted(typed.replace("⁂", ""), typed.replace("⁂", "\u2060"))

    def test_what_is_between_fences_is_shown_as_typed(self):
        for typed, shown in (
                ("- one\n- two:\n  ```\n  @all\n    ![x](u)\n  ```\n- three\n",
                 "> - one\n> - two:\n\n```\n@all\n  ![x](u)\n```\n\n> - three"),
                ("1. do\n   ~~~sh\n   ls\n  -l\n   ~~~", "> 1. do\n\n```sh\nls\n-l\n```"),
                ("```\na\n```\n```\nb\n```", "```\na\n```\n\n```\nb\n```"),
                ("```\na\n```\n\n \n```\nb\n```", "```\na\n```\n\n```\nb\n```"),
                ("```\n[x]: u\n```\n\nthen\n\n```\n&#64;all\n```",
                 "```\n[x]: u\n```\n\n> then\n\n```\n&#64;all\n```"),
                ("a\n```\n```\n\n\n  b\nc", "> a\n\n```\n\n```\n\n>   b\n> c"),
                ("```\nopen\n\n> @all", "```\nopen\n\n> @all\n```"), ("```", "```\n\n```"),
                ("```c#\nx\n``` \ny", "```c#\nx\n```\n\n> y"),
                ("  k: 1\n```\nx\n```\n  k: 2", ">   k: 1\n\n```\nx\n```\n\n>   k: 2"),
                ("```vm-042\nx\n```", "```\nvm-042\nx\n```"),
                ("\xa0\xa0```\n\xa0\xa0@all\n\xa0```\nb", "```\n@all\n```\n\n> b"),
                ("``` disk is full\n  x\n```", "```\ndisk is full\n  x\n```"),
                ("~~~ a`b\n``` @all\n~~~~", "````\na`b\n``` @all\n````"),
                ("````\n```\n@all\n```\n````", "````\n```\n@all\n```\n````"),
                ("    ```\n    a:\n      b\n  c\n    ```", "```\na:\n  b\nc\n```"),
                ("\t```\n\ta\n    ```\nb", "```\na\n```\n\n> b"),
                ("```\n    ```\n\t```\na\n   ```", "````\n    ```\n\t```\na\n````"),
                ("```a``` `@all`", "> ```a``` `@\u2060all`"),
                ("- ```\n  @all\n  ```\n@all", "> - ```\n>   @\u2060all\n\n```\n@all\n```"),
                ("> ```\n> @all\n> ```\n@all", "> > ```\n> > @\u2060all\n> > ```\n> @\u2060all")):
            with self.subTest(typed):
                self.assert_shown(typed, shown)

    def test_whatever_is_typed_is_safe_in_prose_and_as_typed_in_code(self):
        pieces = ["a ", "b", "w", "_", "\n", "\n", "\n\n", "\n  ", "\n```\n", "\n~~~ c\n", "\n````",
                  "`", "@all ", "@here", "@Channel", "&#64;all", "&#X40;", "&commat;", "![",
                  "!\\[", "](u) ", "[", "]", "]: u",
                  "\n[x]: u", "\n> [", "!", "\\", "> ", "- ", "#ticket-open ", "\n- [ ] [y]: u"]
        block = re.compile(r"^(`{3,})[\w.+#\u2060-]*\n(.*?)\n\1\n\n", re.MULTILINE | re.DOTALL)
        area = next(one for one in self.service.service.form.elements if one.name == "area")
        chance = random.Random(20261126)
        for _ in range(3000):
            some = chance.sample(pieces, 9)
            typed = ticket_service.clean("".join(chance.choice(some) for _ in range(30)))
            shown = area.markdown(typed, {})
            self.assertEqual(*(re.sub("[^a-z]", "", text) for text in (typed, shown)))
            self.assertNotIn("#ticket", shown)
            for quote in re.findall(r"(?m)(?:^> .*\n)+", block.sub("\n", shown)):
                self.assertNotRegex(quote, r"(?s)!\\*\[.*\]\(")
                self.assertNotRegex(quote, r"(?i)(?<![a-vx-z])@(all|channel|here)(?![a-vx-z])")
                self.assertNotRegex(quote, "&(#64|#X40|commat);")
                self.assertNotRegex(quote, r"(?m)^[> -]*(\[ \] )*\[[^]]*\]:")
            for _, code in block.findall(shown):
                self.assertIn(*(re.sub("(?m)^[ `~]+|[ `~]+$", "", text.strip())
                                for text in (code.replace("\u2060", ""), typed)))

    def test_code_is_shown_as_typed(self):
        for typed in ("\\_archive\\*.bak", "* * * * * cmd", "- a\n+ a", "::d 00:0a:95:9d", "@all",
                      "![x](http://e)", "a ``` b\n````", "> quoted\n\n\n#x", "<b>&amp;"):
            with self.subTest(typed):
                self.assertEqual(self.file({**GOOD, "code": typed}), {})
                fence = "`````" if "````" in typed else "```"
                self.assertIn(f"\n**X:**\n{fence}\n{typed}\n{fence}\n**X:** `42` · ",
                              self.message())

    def test_typed_hashtags_do_not_touch_the_list_that_a_ticket_is_in(self):
        lines = "\n".join(f"#{word}Setting yes" for word in itertools.islice(
            map("".join, itertools.permutations("abcdef", 4)), 180))
        for name in ("area", "code"):
            self.assertEqual(self.file({**GOOD, name: lines[:3000]}), {})
            self.assertIn(OPEN.tag, self.mattermost.roots()[-1]["hashtags"].split())
        tags = [status.tag for status in STATUSES.values()]
        typed = " ".join([*tags, f"{tags[-1].title()}.", f"({tags[1]})", f"`{tags[-1]}`",
                          f"{tags[0]}²"])
        self.assertEqual(self.file({**GOOD, "area": typed, "code": typed, "tel": tags[-1]}), {})
        root = self.mattermost.roots()[-1]
        self.assertEqual(root["hashtags"], f"#{root['props']['ticket_id']} {OPEN.tag}")
        free = " ".join(["#Ticket-20261123-7K3F", *(f"{tag}down {tag}-2" for tag in tags)])
        self.assert_quoted(free, free)

    def test_a_submission_that_is_far_too_long_is_answered(self):
        self.start_with_form(form_of(*(field("textarea", x, max_length=10_000) for x in "abcde")))
        answer = self.file(dict.fromkeys("abcde", "<" * 10_000))  # six bytes each, from Mattermost
        self.assertRegex(answer["error"], pattern(ticket_service.TICKET_TOO_LONG))

    def test_a_very_long_text_is_looked_through_in_no_time(self):
        area = next(one for one in self.service.service.form.elements if one.name == "area")
        pieces = ("`", "```\n", "[", "![", "](", "]:", " ", "\n", "[\n", "\\]", "@all")
        began = time.process_time()
        for piece, other in itertools.product(pieces, repeat=2):
            area.markdown(ticket_service.clean((piece * 4000 + other * 4000)[:16_000]), {})
        self.assertLess(time.process_time() - began, 5)  # 121 texts, of 3 ms on an idle machine

    def problems_of(self, form):
        """Return what is said at start of a form in a file: a list of lines."""
        with self.assertRaises(ticket_service.SettingsError) as caught:
            self.start_with_form(form)
        lines = str(caught.exception).splitlines()
        for line in lines:
            self.assertTrue(line.startswith("FORM_FILE "), line)
        return lines

    def test_a_form_that_mattermost_would_not_show_is_refused_at_start(self):
        for elements, complaint in BAD_ELEMENTS:
            with self.subTest(complaint):
                self.assertIn(complaint, self.problems_of({"title": "T", "elements": elements})[0])
        for form, complaint in BAD_FORMS:
            with self.subTest(complaint):
                [line] = self.problems_of(form)
                self.assertIn(complaint, line)

    def test_all_that_is_wrong_with_a_form_is_named(self):
        options = [{"text": 1, "value": "1"}, {"text": "b", "value": "1", "x": 2}]
        lines = self.problems_of({"title": "", "elements": [
            element(default="abc", subtype="number", placehoder=1),
            element("select", optional="no", options=options, default="9")]})
        for what in ("title is missing", "element x: default", "element x: placehoder",
                     "element x: optional", "option 1: text", "option 2: x is",
                     "option 2: another", "default '9'", "element x: another one"):
            self.assertTrue(any(what in line for line in lines), (what, lines))
        self.assertEqual(len(lines), 9)
        many = [{"text": f"vm-{number:05}.example.com", "value": f"{number}"}
                for number in range(7000)]
        [problem] = self.problems_of(form_of(element("select", options=many)))
        self.assertIn("at most 290000 bytes", problem)

    def test_what_mattermost_takes_is_taken(self):
        label = "Опишите, пожалуйста, проблему"
        elements = [element(kind, kind, display_name=label, help_text="п" * 195, **more)
                    for kind, more in (
                        ("text", {"default": "д" * 200, "placeholder": "p" * 151}),
                        ("textarea", {"placeholder": "п" * 3001, "default": "п" * 8000}),
                        ("select", {"options": [{"text": "т" * 3001, "value": "v"}]}))]
        elements += [element(name="begun", default="INC-", min_length=8, optional=True),
                     element("textarea", "short", max_length=9)]
        self.start_with_form({"title": "Создать заявку в отдел поддержки", "elements": elements})
        self.assertEqual(self.mattermost.run_command(), "")
        _, _, dialog = self.mattermost.dialogs[-1]
        elements[1]["max_length"] = 50_000
        self.assertEqual(dialog["elements"], elements)
        answers = {"text": "д" * 200, "textarea": "a" * 12_013, "select": "v", "short": "b"}
        self.assertEqual(self.mattermost.submit_dialog({**answers, "begun": "INC-"}), {
            "errors": {"begun": ticket_service.TOO_SHORT.format(limit=8)}})
        self.assertEqual(self.mattermost.submit_dialog(answers), {})
        self.assertEqual(self.mattermost.roots()[0]["props"]["ticket"]["answers"], answers)

    def test_keys_that_say_nothing_are_not_there(self):
        elements = [element("select", "s", options=OPTIONS), element("date", "d", optional=True),
                    element("textarea", "t", code=True)]
        written = [{**SAYS_NOTHING, "code": False, **one} for one in elements]
        written[0]["options"] = [{**OPTIONS[0], "text": "One"}, {**OPTIONS[1], "mention": ""}]
        self.start_with_form({"title": "T", "elements": written, "introduction_text": "",
                              "icon_url": None, "source_url": "", "mention": "", "state": ""})
        self.mattermost.run_command()  # the stand-in complains of what says nothing
        _, _, dialog = self.mattermost.dialogs[-1]
        self.assertEqual([len(one) for one in dialog["elements"]], [4, 4, 4])
        self.assertEqual(self.mattermost.submit_dialog({"s": "2", "t": "x"}), {})

    def test_a_file_may_come_from_any_editor(self):
        form_file = Path(self.enterContext(tempfile.TemporaryDirectory())) / "form.json"
        text = json.dumps(EVERY_TYPE, indent=1).replace("\n", "\r\n")
        form_file.write_bytes(b"\xef\xbb\xbf" + text.encode())
        self.mattermost.run_command()
        self.start_service(FORM_FILE=str(form_file))  # the same form in another dress
        self.assertEqual(self.mattermost.submit_dialog(GOOD), {})
        for content, complaint in ((b"", ": is not JSON: line 1"), (b"{\r\n,}", "not JSON: line 2"),
                                   (b"\xff\xfe{\0", "not a text in UTF-8"),
                                   (b"[" * 100_000, "nested too deeply")):
            form_file.write_bytes(content)
            with self.assertRaisesRegex(ticket_service.SettingsError, f"^FORM_FILE .*{complaint}"):
                self.start_service(FORM_FILE=str(form_file))
        with self.assertRaisesRegex(ticket_service.SettingsError, "^FORM_FILE '/nowhere': can't"):
            self.start_service(FORM_FILE="/nowhere")


PEOPLE = {"title": "People", "elements": [
    element("select", "who", display_name="Who", data_source="users"),
    element("select", "where", display_name="Where", data_source="channels", optional=True),
    element("select", "all", display_name="All", data_source="users", multiselect=True,
            optional=True)]}


class ChoiceTest(FormCase):
    """People, channels, several things, and dates."""

    def assert_read(self, form, *rows):
        """Check for each row of answers what a ticket shows and keeps of them, or the errors."""
        self.start_with_form(form)
        for answers, expected, *kept in rows:
            with self.subTest(str(answers)[:99]):
                self.mattermost.run_command()
                answer = self.mattermost.submit_dialog(answers)
                if isinstance(expected, dict):
                    self.assertEqual(answer, {"errors": expected})
                    continue
                self.assertEqual(answer, {})
                self.assertEqual(self.message(), expected)
                self.assertEqual(self.ticket()["answers"], kept[0] if kept else answers)

    def ticket(self):
        return self.mattermost.roots()[-1]["props"]["ticket"]

    def test_people_and_channels_are_shown_by_their_names_or_told_at_their_fields(self):
        person = {"who": ticket_service.PERSON_NOT_SEEN.format(bot="ticket-bot")}
        channel = {"where": ticket_service.CHANNEL_NOT_SEEN.format(bot="ticket-bot")}
        others, direct = self.mattermost.channels[OTHERS], self.mattermost.channels[DIRECT]
        for one in others, direct:
            one.members.add(BOT)
        others.display_name = "@all `x`"
        self.mattermost.channels[QUIET].name = "~odd`\n@all"
        self.assert_read(PEOPLE, (
            {"who": BOB, "where": HELPDESK, "all": [BOT, BOB]},
            "**Who:** @bob · **Where:** ~helpdesk · **All:** @ticket-bot, @bob"))
        self.assertEqual(self.ticket()["names"], {  # for scripts
            BOB: "bob", HELPDESK: "helpdesk", BOT: "ticket-bot"})
        for call in (f"/users/{BOB}", f"/users/{BOT}"):  # once, whether in one field or in two
            self.assertEqual(self.mattermost.calls.count(f"GET {call}"), 1)
        self.assert_read(PEOPLE, (
            {"who": ALICE, "all": f"{BOB}, {ALICE},{BOB}"},
             "**Who:** @alice · **All:** @bob, @alice", {"who": ALICE, "all": [BOB, ALICE]}),
            ({"who": ALICE, "all": [], "where": None}, "**Who:** @alice", {"who": ALICE}),
            ({"who": BOB, "where": OTHERS}, "**Who:** @bob · **Where:** `` @all `x` ``"),
            *(({"who": who}, person) for who in ("x" * 26, HELPDESK)),
            *(({"who": who}, {"who": ticket_service.NOT_AN_OPTION})
              for who in ("../users/me", "me", {}, [BOB])),
            *(({"who": BOB, "where": where}, channel)
              for where in (QUIET, SECRET, DIRECT, "y" * 26, BOB)),
            ({"who": BOB, "all": ["x" * 26, BOB, "y" * 26]}, {"all": person["who"]}),
            ({"who": BOB, "all": [BOB, 7]}, {"all": ticket_service.NOT_AN_OPTION}),
            ({"who": BOB, "all": [new_id() for _ in range(51)]},
             {"all": ticket_service.TOO_MANY.format(limit=50)}))
        for others.display_name in (None, "", " ", "\u200b"):
            self.assert_read(PEOPLE, ({"who": BOB, "where": OTHERS},
                                      "**Who:** @bob · **Where:** `others`"))

    def test_a_mattermost_that_is_away_while_names_are_looked_up_loses_nothing(self):
        self.start_with_form(PEOPLE)
        self.mattermost.script("GET /users/", closes, fails(503))  # the first is /users/me
        self.assertEqual(self.file({"who": BOB}), {})
        self.limit(patience=0)
        self.mattermost.run_command()
        self.mattermost.script(f"GET /users/{BOB}", fails(503))
        self.assertEqual(self.mattermost.submit_dialog({"who": BOB}),
                         {"error": ticket_service.NOT_REACHED})
        self.assertEqual(self.mattermost.submit_dialog({"who": BOB}), {})

    def test_a_ticket_channel_may_not_be_readable(self):
        self.mattermost.roles = "system_user system_post_all"
        self.start_with_form(PEOPLE)
        self.mattermost.run_command(channel_id=SECRET)
        self.assertEqual(self.mattermost.submit_dialog({"who": BOB, "where": QUIET}), {})
        self.assertEqual(self.message(), "**Who:** @bob · **Where:** `Quiet`")

    def confirmation(self):
        self.replies(len(self.mattermost.roots()))
        return self.mattermost.ephemeral[-1][2].split("\n")[1:]

    def test_who_is_not_in_the_ticket_s_channel_is_named_in_the_confirmation(self):
        you = ticket_service.YOU_ARE_OUTSIDE
        for channel_id, members, answers, said in (
                ("", {BOT, ALICE, BOB}, {"who": BOB}, []),
                ("", {BOT, ALICE}, {"who": ALICE, "all": [BOB]}, ["@bob"]),
                (QUIET, {BOT, BOB}, {"who": BOB}, [you]),
                (SECRET, {BOT}, {"who": BOB, "all": [ALICE, BOT]}, [you, "@bob"]),
                (OTHERS, {BOT}, {"who": ALICE}, [you]),
                (QUIET, {BOT, ALICE}, {"who": BOB}, ["@bob"]),
                (QUIET, {BOT, BOB}, {"who": ALICE, "all": [BOT]}, [you])):
            with self.subTest(channel_id=channel_id, members=members):
                self.start_with_form(PEOPLE, TICKET_CHANNEL=channel_id)
                self.mattermost.channels[channel_id or HELPDESK].members = members
                self.assertEqual(self.file(answers), {})
                self.assertEqual(self.confirmation(), [
                    one if one == you else ticket_service.THEY_ARE_OUTSIDE.format(people=one)
                    for one in said])
                self.assertEqual(self.mattermost.channels[channel_id or HELPDESK].members, members)

    def test_where_membership_can_t_be_read_the_confirmation_is_plain(self):
        self.start_with_form(PEOPLE, TICKET_CHANNEL=QUIET)
        self.mattermost.channels[QUIET].members = {BOT, BOB}
        for user, behave, said in (
                (ALICE, fails(*NO_PERMISSION), []), (ALICE, http_answer(404, b"<html>"), []),
                (BOB, fails(*NO_PERMISSION), [ticket_service.YOU_ARE_OUTSIDE])):
            self.mattermost.script(f"GET /channels/{QUIET}/members/{user}", behave)
            self.assertEqual(self.file({"who": BOB}), {})
            self.assertEqual(self.confirmation(), said)

    def test_several_options_are_shown_with_commas_and_their_mentions_once(self):
        options = [{"text": "One", "value": "1", "mention": "@a"},
                   {"text": "Two", "value": "2", "mention": "@b"},
                   {"text": "A, B", "value": "a b", "mention": "@a"}]
        self.assert_read(
            form_of(
                element("select", options=options, multiselect=True, default="1,a b")),
            *(({"x": value}, f"**X:** {shown}", {"x": kept}) for value, shown, kept in (
                (["1"], "`One` @a", ["1"]), (["1", "2", "1"], "`One`, `Two` @a @b", ["1", "2"]),
                ("2", "`Two` @b", ["2"]), ("1,2", "`One`, `Two` @a @b", ["1", "2"]),
                ("1, a b", "`One`, `A, B` @a", ["1", "a b"]),
                ("1,,2,", "`One`, `Two` @a @b", ["1", "2"]))),
            *(({"x": value}, {"x": ticket_service.REQUIRED})
              for value in ([], "", ",", ["", " ", "\u200b", None])),
            *(({"x": value}, {"x": ticket_service.NOT_AN_OPTION}) for value in (
                ["1", "3"], "1,3", "3", "a, b", [["1"]], {}, "1,x" * 20_000)))

    def test_dates_and_times_are_shown_and_relative_ones_are_resolved(self):
        now = datetime.datetime.now(datetime.UTC)
        if now.hour == 23 and now.minute > 58:
            self.skipTest("today would be another day")
        near = {value: (now + datetime.timedelta(days)).date().isoformat() for value, days in (
            ("today", 0), ("tomorrow", 1), ("yesterday", -1), ("+3d", 3), ("-1w", -7))}
        for kind, at, kept_at, invalid, given in (
                ("date", "", "", ticket_service.NOT_A_DATE, {
                    "2026-11-27": "2026-11-27", "2026-11-27T10:00:00Z": "2026-11-27", "+2H": None}),
                ("datetime", " 00:00 UTC", "T00:00:00Z", ticket_service.NOT_A_TIME, {
                    "2026-11-27T10:00:00Z": "2026-11-27T10:00:00Z",
                    "2026-11-27T10:00": "2026-11-27T10:00:00Z",
                    "2026-11-27T10:00:00.5+02:00": "2026-11-27T08:00:00Z",
                    "2026-11-27": "2026-11-27T00:00:00Z", "2026-11-27T24:01Z": None})):
            kept = {**given, **{value: day + kept_at for value, day in near.items()}}
            no_dates = [value for value in kept if not kept[value]]
            self.assert_read(
                form_of(
                    element(kind, min_date="today", max_date="+1m", default="+3d")),
                *(({"x": value}, "**X:** `{}{}`".format(
                    *(is_kept[:10], at and f" {is_kept[11:16]} UTC")), {"x": is_kept})
                  for value, is_kept in kept.items() if is_kept),
                *(({"x": value}, {"x": invalid}) for value in (
                    *no_dates, "soon", "27.11.2026", "2026-02-30", "2026-11-27T", "+3y", "+3000d",
                    "3d", 7, "\u0662\u0660\u0662\u0666-11-27", "2026-11-27T25:00:00Z2", "20261127",
                    "2026-11-27T24:01:00Z", "2026-11-27T10:00:61Z", ["2026-11-27"])))

    def test_a_time_that_is_nowhere_in_the_form_s_zone_is_told_at_its_field(self):
        for zone, given in (("Asia/Tokyo", "9999-12-31T23:59:59Z"),
                            ("America/New_York", "0001-01-01T00:00:00Z"),
                            ("Asia/Tokyo", "0001-01-01T00:00:00+14:00")):
            if ticket_service.zoneinfo.available_timezones() or "+" in given:
                self.assert_read(
                    form_of(
                        element("datetime", datetime_config={"location_timezone": zone})),
                    ({"x": given}, {"x": ticket_service.NOT_A_TIME}))
        self.assertEqual({line.split()[0] for line in self.log.lines}, {"INFO"})

    def test_months_and_hours_are_counted_as_the_calendar_has_them(self):
        now = datetime.datetime(2027, 12, 31, 23, 30, tzinfo=datetime.UTC)
        for text, date in (("+1m", "2028-01-31"), ("+2m", "2028-02-29"), ("-1m", "2027-11-30"),
                           ("+999m", "2111-03-31"), ("+1d", "2028-01-01")):
            self.assertEqual(ticket_service.parse_day(text, now).isoformat(), date)
        for text, moment in (("+2H", "2028-01-01T01:30"), ("-30M", "2027-12-31T23:00"),
                             ("+90S", "2027-12-31T23:31"), ("tomorrow", "2028-01-01T00:00")):
            self.assertEqual(ticket_service.parse_time(text, now).isoformat()[:16], moment)

    def test_a_relative_date_means_the_same_when_it_is_submitted_again(self):
        self.start_with_form(form_of(element("datetime", default="+2H")))
        self.assertEqual(self.file({"x": "+2H"}), {})
        later = time.time() + 5
        moment = datetime.datetime.fromtimestamp(later, datetime.UTC)
        with (unittest.mock.patch.object(ticket_service.time, "time", lambda: later),
              unittest.mock.patch.object(ticket_service, "utc_now", lambda: moment)):
            self.assertEqual(self.mattermost.submit_dialog({"x": "+2H"}), {})
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual(len(self.mattermost.posts), 2)

    def test_a_form_may_have_hundreds_of_fields(self):
        form = form_of(*[element("select", f"x{number}", options=OPTIONS, multiselect=True)
                         for number in range(300)])
        self.start_with_form(form)
        self.assertEqual(self.file(answers_to(form)), {})

    def test_what_nobody_sees_goes_from_every_answer(self):
        unseen = "\u200b\u2060\ufeff\xad\u3164"
        self.start_with_form(form_of(
            element("text", "text"), element("textarea", "code", code=True),
            element("select", "one", options=OPTIONS), element("textarea", "area", optional=True)))
        self.assertEqual(self.mattermost.run_command(f"/etc{unseen}/fstab"), "")
        _, _, dialog = self.mattermost.dialogs[-1]
        self.assertEqual(dialog["elements"][1]["default"], "/etc/fstab")
        family = "\U0001f468\u200d\U0001f469\u200e"
        answers = {"text": f"vm{unseen}-1{unseen}", "code": f"{unseen}a{family}",
                   "one": f"1{unseen}", "area": f" {unseen}\n{unseen}"}
        self.assertEqual(self.mattermost.submit_dialog(answers), {})
        self.assertEqual(self.mattermost.roots()[0]["props"]["ticket"]["answers"],
                         {"text": "vm-1", "code": f"a{family}", "one": "1"})
        self.mattermost.run_command()
        self.assertEqual(self.mattermost.submit_dialog({**answers, "text": unseen}),
                         {"errors": {"text": ticket_service.REQUIRED}})

    def test_check_says_what_an_older_mattermost_does_not_know_and_what_is_odd(self):
        options = [{"text": "One", "value": "1"}]
        form = {"title": "T", "state": "x", "notify_on_cancel": True, "elements": [
            element("select", "several", options=options, multiselect=True),
            element("date", "day", optional=True), element("radio", options=options, default="1"),
            element("datetime", "time", datetime_config={"manual_time_entry": True}),
            element("text", "long", help_text="h" * 151, placeholder="п" * 150, time_interval=30)]}
        several = r"warning +FORM_FILE: element several: multiselect needs Mattermost 11\.0: with"
        day, time = (rf"problem +FORM_FILE: element {name}: a date needs Mattermost 11\.1: an older"
                     for name in ("day", "time"))
        config = r"warning +FORM_FILE: element time: datetime_config needs Mattermost 11\.6$"
        for version, expected in (("9.4.0", [several, day, time, config]),
                                  ("10.12.3", [several, day, time, config]),
                                  ("11.0.0", [day, time, config]), ("11.1.0", [config]),
                                  ("11.5.9", [config]), ("11.6.0", []), ("12.0.0", [])):
            with self.subTest(version):
                self.mattermost.version = version
                _, lines = self.checked(form)
                found = [line for line in lines if not line.startswith("note")]
                self.assertEqual(len(found), len(expected), found)
                for line, one in zip(found, expected):
                    self.assertRegex(line, one)
        for note in ("state is dropped: it is for the service", "notify_on_cancel is dropped",
                     "element x: default: Mattermost"):
            self.assertTrue(any(re.match(f"note +FORM_FILE: {note}", line) for line in lines), note)
        self.assertEqual(len(lines), 3)


# ---------------------------------------------------------------------------------- the settings

class SettingsTest(unittest.TestCase):
    required = {"MATTERMOST_URL": "http://localhost:8065", "BOT_TOKEN": "bot",
                "SLASH_TOKEN": "slash", "CALLBACK_URL": "http://localhost:8080"}

    def read(self, **changes):
        return ticket_service.Settings.from_environment({**self.required, **changes})

    def complaint(self, **changes):
        """Return what is said of settings that are not as they should be."""
        with self.assertRaises(ticket_service.SettingsError) as caught:
            self.read(**changes)
        return str(caught.exception)

    def test_four_settings_are_enough(self):
        settings = self.read()
        self.assertEqual((settings.port, settings.ticket_channel), (8080, ""))
        self.assertEqual((settings.listen_address, settings.tls), ("", None))
        self.assertEqual([element["name"] for element in settings.form.dialog()["elements"]],
                         [element["name"] for element in ticket_service.FORM["elements"]])
        self.assertNotIn("bot", repr(settings).replace("bot_token", ""))

    def test_everything_that_is_wrong_is_named_at_once(self):
        wrong = {**dict.fromkeys(self.required, " "), "PORT": "x", "TICKET_CHANNEL": "town-square",
                 "FORM_FILE": "/nowhere"}
        lines = self.complaint(**wrong).splitlines()
        self.assertEqual({line.split()[0] for line in lines}, set(wrong))
        self.assertEqual(len(lines), len(wrong))

    def test_what_can_t_be_right_is_refused(self):
        for name, values in {
                "MATTERMOST_URL": ("http://h/api/v4", "http://h/chat/api/v4/", '"http://h"',
                                   "'http://h'", "http://h'", "host", "ftp://host", "http://",
                                   "http:///x", "http://a b",
                                   "http://h:99999", "http://h:x", "http://h?q", "http://h/#f",
                                   "http://u:p@h", "http://h\u00f6st", "http://[::1", "http://h:0"),
                "CALLBACK_URL": ("tickets:8080", "http://h/?x=1", "http://h/ticket",
                                 "http://h/x/ticket/"),
                "BOT_TOKEN": ("a b", "tok\u00e9n", "a\x00b", '"quoted"', "'quoted'", "a.b"),
                "SLASH_TOKEN": (",", "\u00e9", "a,\x7f", '"a"', "a,'b'", self.required["BOT_TOKEN"],
                                f"other,{self.required['BOT_TOKEN']}"),
                "LISTEN_ADDRESS": ("localhost", "1.2.3", "::1::", "10.0.0.4:8080"),
                "PORT": ("-1", "65536", "80a", "\u0661", "1.5", "999999"),
                "TICKET_CHANNEL": ("town-square", "x" * 25, "x" * 27, "~" * 26)}.items():
            for value in values:
                with self.subTest(name=name, value=value):
                    hint = "quotes" if value.startswith('"') else ""
                    self.assertRegex(self.complaint(**{name: value}), f"^{name} .*{hint}")

    def test_what_is_no_secret_is_quoted(self):
        for name, value, complaint in (
                ("PORT", "many", "'many': must be a number"),
                ("LISTEN_ADDRESS", "x86_64-conda", "'x86_64-conda': must be an IP address"),
                ("TICKET_CHANNEL", "ops", "'ops': must be a channel's ID"),
                ("CALLBACK_URL", "tickets:8080", "'tickets:8080': must be a URL"),
                ("CALLBACK_URL", "http://tickets:", "'http://tickets:': must be a URL"),
                ("MATTERMOST_URL", "http://me:secret@h", "'http://…@h': must be a URL"),
                ("MATTERMOST_URL", "http://me:se/secret@h", "'http://…@h': "),
                ("MATTERMOST_URL", "me:secret@h", "'…@h': "),
                ("SSL_CERT_FILE", "/nowhere", "'/nowhere': can't be used: "),
                ("FORM_FILE", "/nowhere", "'/nowhere': can't be read: No such file")):
            with self.subTest(name):
                said = self.complaint(**{name: value})
                self.assertIn(f"{name} {complaint}", said)
                self.assertNotIn("secret", said)
        for name in ("BOT_TOKEN", "SLASH_TOKEN"):
            self.assertNotIn("s3cret", self.complaint(**{name: "s3cret!"}))
            self.assertRegex(self.complaint(**{name: "", f"{name}_FILE": "s3cret"}),
                             f"^{name} of {name}_FILE: can't be read")

    def test_a_blank_setting_is_not_set(self):
        optional = [name for name in VARIABLES if name not in self.required]
        blank = {**dict.fromkeys(optional, ""), "BOT_TOKEN_FILE": " ", "TICKET_CHANNEL_FILE": ""}
        self.assertEqual(self.read(**blank).port, 8080)
        for name in self.required:
            self.assertRegex(self.complaint(**{name: " "}), f"^{name} is missing")
        self.assertEqual(self.read(HOST="x86_64-conda-linux-gnu").listen_address, "")

    def test_a_blank_ca_file_leaves_the_system_s_certificates(self):
        variables = {"SSL_CERT_FILE": "", "SSL_CERT_DIR": " "}
        process = start_python(
            self.addCleanup, "-c", "import os, ticket_service as t\n"
            "t.Settings.from_environment(os.environ)\n"
            "print([name for name in os.environ if name.startswith('SSL_CERT')])",
            env={**self.required, **variables, "MATTERMOST_URL": "https://localhost"})
        output, errors = process.communicate(timeout=20)
        self.assertIn(output.strip(), ("[]", ""))
        if output == "":  # a system without certificates
            self.assertIn("SSL_CERT_FILE is needed", errors)

    def test_urls_may_have_capitals_a_sub_path_and_a_slash_at_the_end(self):
        settings = self.read(MATTERMOST_URL="HTTPS://h:80/chat/", CALLBACK_URL=" http://[::1]/t// ")
        self.assertEqual((settings.mattermost_url, settings.callback_url),
                         ("https://h:80/chat", "http://[::1]/t"))
        self.assertIsNotNone(settings.tls)

    def test_several_slash_tokens_are_separated_by_commas_or_white_space(self):
        self.assertEqual(self.read(SLASH_TOKEN="a,b c\n\td , e,").slash_tokens,
                         [b"a", b"b", b"c", b"d", b"e"])

    def test_a_setting_can_be_in_a_file(self):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "secret"
            for name in (*self.required, "TICKET_CHANNEL"):
                value = self.required.get(name, "c" * 26)
                file.write_bytes(f"\ufeff  {value}\r\n".encode())
                settings = self.read(**{name: "", f"{name}_FILE": str(file)})
                self.assertIn(value, str([settings.mattermost_url, settings.bot_token,
                                          settings.slash_tokens, settings.callback_url,
                                          settings.ticket_channel]))
            for changes, complaint in (
                    ({"BOT_TOKEN_FILE": str(file)}, "BOT_TOKEN is given twice"),
                    ({"BOT_TOKEN": "", "BOT_TOKEN_FILE": "/nowhere"}, "BOT_TOKEN of BOT_TOKEN_F"),
                    ({"BOT_TOKEN": "", "BOT_TOKEN_FILE": folder}, "BOT_TOKEN of BOT_TOKEN_FILE"),
                    ({"BOT_TOKEN": "", "BOT_TOKEN_FILE": os.devnull}, "is empty")):
                self.assertIn(complaint, self.complaint(**changes))
            file.write_bytes(b"\xff")
            self.assertRegex(self.complaint(SLASH_TOKEN="", SLASH_TOKEN_FILE=str(file)),
                             "SLASH_TOKEN .*UTF-8")

    def test_the_certificates_to_trust_must_be_there(self):
        for path in ("/nowhere", os.devnull, str(HERE)):
            for url in ("https://localhost", "http://localhost", "localhost"):
                with self.subTest(path=path, url=url):
                    self.assertRegex(self.complaint(MATTERMOST_URL=url, SSL_CERT_FILE=path),
                                     f"(?m)^SSL_CERT_FILE .*{path}")


# ------------------------------------------------------------------------------------- the IDs

def clock_at(text):
    """Return a clock that stands still; its return_value is in seconds since 1970."""
    return unittest.mock.Mock(return_value=datetime.datetime.fromisoformat(text).timestamp())


class TicketIdTest(unittest.TestCase):
    def test_an_id_tells_the_day_in_utc_and_the_time(self):
        for moment, ticket_id in (
                ("2026-11-23T00:00:00Z", "Ticket-20261123-0000"),
                ("2026-11-23T12:00:00Z", "Ticket-20261123-G000"),
                ("2026-11-23T12:00:00.5Z", "Ticket-20261123-G006"),
                ("2026-11-23T23:59:59.999Z", "Ticket-20261123-ZZZZ"),
                ("2026-11-23T23:00:00-05:00", "Ticket-20261124-5ANA")):
            with self.subTest(moment):
                self.assertEqual(ticket_service.TicketIds(clock_at(moment)).next(), ticket_id)

    def test_ids_rise_and_do_not_repeat_whatever_the_clock_does(self):
        clock = clock_at("2026-11-23T12:00:00Z")
        ids = ticket_service.TicketIds(clock)
        first, second = ids.next(), ids.next()
        self.assertEqual((first, second), ("Ticket-20261123-G000", "Ticket-20261123-G001"))
        clock.return_value = clock_at("2026-11-23T11:01:00Z")()
        self.assertEqual(ids.next(), "Ticket-20261123-G002")
        clock.return_value = clock_at("2026-11-24T00:00:01Z")()
        self.assertEqual(ids.next(), "Ticket-20261124-000C")
        clock.return_value = clock_at("2026-11-23T23:59:59Z")()
        self.assertEqual(ids.next(), "Ticket-20261124-000D")

    def test_one_wrong_reading_of_the_clock_does_not_stick(self):
        clock = clock_at("2027-01-17T23:59:59.99Z")
        ids = ticket_service.TicketIds(clock)
        self.assertEqual(ids.next(), "Ticket-20270117-ZZZZ")
        clock.return_value = clock_at("2026-11-23T12:00:00Z")()
        self.assertEqual(ids.ahead(), 0)
        self.assertEqual([ids.next(), ids.next()], ["Ticket-20261123-G000", "Ticket-20261123-G001"])

    def test_a_day_that_is_used_up_is_an_error_until_midnight(self):
        clock = clock_at("2026-11-23T23:59:59.99Z")
        ids = ticket_service.TicketIds(clock)
        ids.next()
        with self.assertRaisesRegex(ticket_service.Problem, re.escape(ticket_service.DAY_FULL)):
            ids.next()
        clock.return_value = clock_at("2026-11-24T00:00:00Z")()
        self.assertEqual(ids.next(), "Ticket-20261124-0000")

    def test_after_a_burst_the_clock_has_to_catch_up(self):
        clock = clock_at("2026-11-23T12:00:00Z")
        ids = ticket_service.TicketIds(clock)
        self.assertEqual(ids.ahead(), 0)
        for _ in range(121):
            last = ids.next()
        self.assertAlmostEqual(ids.ahead(), 121 * 86400 / 32 ** 4)
        clock.return_value += ids.ahead() + 0.001
        self.assertEqual(ids.ahead(), 0)
        self.assertGreater(ticket_service.TicketIds(clock).next(), last)
        clock.return_value = clock_at("2026-11-24T00:00:00Z")()
        self.assertEqual(ids.ahead(), 0)


# ---------------------------------------------------------------------------- the process itself

class CommandLineCase(Case):
    """Runs the program with an option, in this process or in one of its own."""

    encoding = "ascii"  # of the output, as where there is no locale
    command = ("-W", "error", "-m", "ticket_service")

    def setUp(self):
        super().setUp()
        self.enterContext(unittest.mock.patch.multiple(
            ticket_service.Mattermost, pause=0.01, patience=0.02))

    def run_main(self, *arguments, typed="", screen=None, **environment):
        """Return the exit status, the output, which is UTF-8, and what is said beside it."""
        # A service blocks signals, in this process, too; the next ones would inherit that.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        self.addCleanup(signal.pthread_sigmask, signal.SIG_SETMASK, blocked)
        output = io.TextIOWrapper(io.BytesIO(), self.encoding)
        lines = io.TextIOWrapper(io.BytesIO(typed.encode("utf-8", "surrogateescape")), "utf-8")
        with (contextlib.redirect_stdout(output), unittest.mock.patch("sys.stdin", lines),
              contextlib.redirect_stderr(screen or io.StringIO()) as said):
            try:
                status = ticket_service.main(arguments, environment)
            except SystemExit as end:
                status = end.code
        output.flush()
        return status, output.buffer.getvalue().decode(), said.getvalue()

    def read_until(self, stream, text):
        """Return what comes out of a process, up to a text."""
        found = ""
        while not found.endswith(text):
            self.assertTrue(select.select([stream], [], [], 10)[0], f"no {text!r} in {found!r}")
            piece = os.read(stream.fileno(), 4096).decode()
            self.assertTrue(piece, f"no {text!r} in {found!r}")
            found += piece

    def add_ticket(self, number, channel_id=HELPDESK, status="open", by="alice", age=0.0,
                   **answers):
        """Return the post of a ticket, in which nothing has happened for so many days."""
        fields = {"user_id": ALICE, "user_name": "alice", "answers": answers, "nonce": "n",
                  "names": {ALICE: "alice", BOB: "bob"}, "created_at": AT,
                  "status": status, "status_by": by, "status_at": AT + MINUTE}
        post = self.mattermost.add_post(BOT, channel_id, "", props={
            "attachments": [], "is_ticket": True, "ticket_id": f"Ticket-20261123-{number:04}",
            "ticket": fields})
        self.let_rest(post, age)
        return post

    def let_rest(self, post, days):
        """Let a post be so many days older, and nothing have happened to it since."""
        at = post["create_at"] - int(days * DAY)
        post.update(create_at=at, update_at=at, last_reply_at=0)


class ProcessTest(CommandLineCase):
    """What needs a process of its own: exit statuses, signals, the command line."""

    encoding = "utf-8"

    @classmethod
    def setUpClass(cls):
        """Start what takes long, for two tests."""
        nowhere = "http://127.0.0.1:9"
        environment = {"MATTERMOST_URL": nowhere, "BOT_TOKEN": BOT_TOKEN, "PORT": "0",
                       "SLASH_TOKEN": SLASH_TOKEN, "CALLBACK_URL": nowhere}
        cls.alone = start_python(cls.addClassCleanup, *cls.command, env=environment)
        cls.lost = start_python(  # whose name server says nothing
            cls.addClassCleanup, "-W", "error", "-c",
            "import os, socket, time, ticket_service\n"
            "socket.getaddrinfo = lambda *_, **__: time.sleep(600)\n"
            "ticket_service.Server.answer_within = ticket_service.Server.follow_up_within = 0.1\n"
            "ticket_service.end(ticket_service.main([], os.environ))",
            env={**environment, "MATTERMOST_URL": "http://mattermost.test"})

    def start_process(self, **changes):
        """Return a running service, which logs into a pipe, and let people use it."""
        process = start_python(self.addCleanup, *self.command, env=self.settings(**changes))
        port = re.search(r"listening on port (\d+)", process.stderr.readline())[1]
        self.mattermost.service = ("127.0.0.1", int(port))
        return process

    def test_bad_settings_are_all_named_and_end_with_status_2(self):
        status, output, errors = self.run_main(PORT="many")
        self.assertEqual((status, output), (2, ""))
        for name in ("MATTERMOST_URL", "BOT_TOKEN", "SLASH_TOKEN", "CALLBACK_URL", "PORT"):
            self.assertRegex(errors, f"(?m)^{name} ")

    def test_a_port_that_is_taken_is_told(self):
        status, _, _ = self.run_main(**self.settings(PORT=str(self.service.server_port)))
        self.assertEqual(status, 1)
        self.assert_logged(r"ERROR LISTEN_ADDRESS and PORT: .*\d+ can't be opened: .*in use")

    def test_help_lists_every_variable(self):
        status, output, _ = self.run_main("--help")
        self.assertEqual(status, 0)
        for name in VARIABLES:
            self.assertIn(name, output)

    def test_health_asks_the_running_service(self):
        port = str(self.service.server_port)
        os.environ["http_proxy"] = "http://127.0.0.1:9"
        self.addCleanup(os.environ.pop, "http_proxy")
        for host in ("", "127.0.0.1", "0.0.0.0"):
            self.assertEqual(self.run_main("--health", LISTEN_ADDRESS=host, PORT=port), (0, "", ""))
        for port in (str(self.mattermost.server_port), "9", "x"):
            status, _, errors = self.run_main("--health", PORT=port)
            self.assertEqual((status, errors.count("\n")), (1, 1))

    def is_well(self, address, port):
        """Return whether --health is satisfied."""
        status, _, _ = self.run_main("--health", LISTEN_ADDRESS=address, PORT=str(port))
        return status == 0

    def test_it_listens_on_one_address_if_it_is_told_so(self):
        for address, other in (("127.0.0.1", "127.0.0.2"), ("::1", "127.0.0.1")):
            with self.subTest(address):
                port = self.start_service(LISTEN_ADDRESS=address).server_port
                self.assertTrue(self.is_well(address, port))
                self.assertFalse(self.is_well(other, port))
        port = self.start_service().server_port
        for address in ("127.0.0.1", "::1"):
            self.assertTrue(self.is_well(address, port))

    def check(self, **changes):
        """Return the exit status and the lines of --check; each begins with its setting."""
        status, output, _ = self.run_main("--check", **self.settings(**changes))
        lines = output.splitlines()
        for line in lines:
            level, name = re.match(r"(\w+) +(\w+): ", line).groups()
            self.assertIn(level, ("ok", "note", "warning", "problem"))
            self.assertIn(name, VARIABLES)
        self.assertEqual(status, int("problem" in output))
        return status, lines

    def assert_checked(self, expected, **changes):
        """Check that --check prints a line; return whether all is fine."""
        status, lines = self.check(**changes)
        self.assertTrue(any(re.match(expected, line) for line in lines), (expected, lines))
        return not status

    def test_check_says_what_is_fine_and_what_it_can_t_see(self):
        self.mattermost.channels[SECRET].members.add(BOT)
        for line in (r"ok +MATTERMOST_URL: .*11\.6\.0", "ok +MATTERMOST_URL: .*SiteURL.*http://127",
                     "ok +BOT_TOKEN: .*@ticket-bot.* ops$", "ok +TICKET_CHANNEL: ",
                     "note +SLASH_TOKEN: .*can't be checked.*type /ticket"):
            self.assertTrue(self.assert_checked(line, TICKET_CHANNEL=QUIET))
        self.assertTrue(self.assert_checked(f"warning +TICKET_CHANNEL: {SECRET}: it is private",
                                            TICKET_CHANNEL=SECRET))
        self.assertTrue(self.assert_checked("note +TICKET_CHANNEL: .*people have to join it",
                                            TICKET_CHANNEL=QUIET))
        for threads, noted in (("disabled", True), ("default_off", True), ("default_on", False),
                               ("always_on", False), (7, False)):
            self.mattermost.threads = threads
            _, lines = self.check()
            self.assertEqual(any(re.match(f"note +MATTERMOST_URL: Collapsed.*{threads}", line)
                                 for line in lines), noted)
        self.mattermost.roles = "system_user system_post_all"  # which does not see the channel
        self.assertTrue(self.assert_checked("note +TICKET_CHANNEL: .*people have to join it",
                                            TICKET_CHANNEL=OTHERS))

    def test_check_says_what_is_wrong(self):
        self.mattermost.channels[SECRET].members.add(BOT)
        for changes, complaint in (
                ({"MATTERMOST_URL": "http://127.0.0.1:9"}, "problem +MATTERMOST_URL: no answer"),
                ({"MATTERMOST_URL": self.mattermost.url + "/x"},
                 "problem +MATTERMOST_URL: .*404, but not as Mattermost does"),
                ({"BOT_TOKEN": "wrong"}, "problem +BOT_TOKEN: .*401.*Token ID"),
                *(({"TICKET_CHANNEL": channel_id},
                   f"problem +TICKET_CHANNEL: {channel_id}: "
                   f"{re.escape(cant_post(obstacle, 'admin'))}$")
                  for channel_id, obstacle in ((OTHERS, "not a member"), (DIRECT, "direct"),
                                               (ARCHIVED, "archived"), ("x" * 26, "unknown")))):
            with self.subTest(complaint):
                self.assertFalse(self.assert_checked(complaint, **changes))
        self.mattermost.permissions["channel_user"] = []
        sentence = re.escape(cant_post("read only", "admin"))
        self.assertFalse(self.assert_checked(f"problem +TICKET_CHANNEL: {QUIET}: {sentence}$",
                                             TICKET_CHANNEL=QUIET))
        self.mattermost.teams = []
        self.assertFalse(self.assert_checked("problem +BOT_TOKEN: .*no team"))
        self.mattermost.is_bot = False
        self.assertFalse(self.assert_checked("problem +BOT_TOKEN: @ticket-bot is a person"))
        self.mattermost.script("GET /users/me", http_answer(403, b"<html>"))
        self.assertFalse(self.assert_checked("problem +MATTERMOST_URL: .*403, but not as"))
        self.mattermost.version = "11.6\n\x1b[2Jok      BOT_TOKEN: forged"
        self.assertFalse(self.assert_checked(r"ok +MATTERMOST_URL: Mattermost 11\.6 \[2Jok "))

    def test_check_warns_of_what_may_be_wrong(self):
        self.mattermost.version, self.mattermost.site_url = "8.1.0", ""
        elsewhere = "http://255.255.255.255:9"
        for expected, changes in (
                ("warning +MATTERMOST_URL: .*before 9.4", {}),
                ("warning +MATTERMOST_URL: .*no SiteURL", {}),
                ("warning +CALLBACK_URL: its port is 8080, but PORT is 8081", {"PORT": "8081"})):
            self.assertTrue(self.assert_checked(expected, **changes))
        for mattermost_url, callback_url, warned in (
                ("http://127.0.0.1:9", "http://localhost", False),
                (elsewhere, "https://tickets.test", False), (elsewhere, "http://localhost", True),
                (elsewhere, "http://127.tickets.test", False),
                *[(elsewhere, f"http://{host}", True) for host in (
                    "127.1.2.3", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "localhost.")]):
            _, lines = self.check(MATTERMOST_URL=mattermost_url, CALLBACK_URL=callback_url)
            self.assertEqual(lines[0].startswith("warning CALLBACK_URL"), warned, lines)
            self.assertTrue(any("note    CALLBACK_URL" in line for line in lines), lines)

    def test_a_running_service_is_asked_at_its_callback_url(self):
        port = self.service.server_port
        moved = self.start_stand_in()
        moved.failure = ("GET /health", http_answer(
            301, b"", b"Location: https://me:typed@tickets.test/health?x\r\n"))
        for callback_url, expected in (
                (f"http://127.0.0.1:{port}", "ok +CALLBACK_URL: the service answers"),
                (f"http://127.0.0.1:{port}/sub", "warning +CALLBACK_URL: .*answers .404"),
                (self.mattermost.url, "warning +CALLBACK_URL: .*another program answers .401.$"),
                (moved.url, "warning +CALLBACK_URL: .*another program answers .301., and leads "
                            "to https://tickets.test/health$"),
                ("http://127.0.0.1:9", "warning +CALLBACK_URL: .*refused"),
                (f"https://127.0.0.1:{port}", "warning +CALLBACK_URL: .*SSL")):
            self.assertTrue(self.assert_checked(expected, PORT=str(port),
                                                CALLBACK_URL=callback_url))

    def test_while_mattermost_is_down_it_runs_all_the_same(self):
        self.assertIn("listening on port", self.alone.stderr.readline())
        self.assertIn("WARNING CALLBACK_URL: ", self.alone.stderr.readline())
        while "ERROR MATTERMOST_URL: no answer" not in self.alone.stderr.readline():
            self.assertIsNone(self.alone.poll())
        self.alone.send_signal(signal.SIGINT)
        self.assertEqual(self.alone.wait(5), 0)

    def test_sigterm_during_a_submission_completes_it(self):
        process = self.start_process()
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", slow(0.05), slow(0.05))
        submitting = threading.Thread(
            target=lambda: self.assertEqual(self.mattermost.submit_dialog(answers_to()), {}))
        submitting.start()
        self.eventually(lambda: self.mattermost.made("POST /posts"), "the post")
        process.send_signal(signal.SIGTERM)
        self.assertEqual(process.wait(5), 0)
        submitting.join()
        self.assertEqual(len(self.mattermost.posts), 2)
        self.assertEqual(len(self.mattermost.ephemeral), 1)

    def test_kill_9_in_each_step_leaves_one_ticket_and_one_truth(self):
        stand_in, answers = self.mattermost, answers_to()
        process, closed = self.start_process(), STATUSES["closed"]

        def killed_in(call, work):
            """Kill the service while Mattermost has a call, which it does or does not."""
            nonlocal process
            gate, reached = self.gate(), threading.Event()
            stand_in.script(call, holds(gate, reached, does))
            person = threading.Thread(target=lambda: self.assertRaises(ConnectionError, work))
            person.start()
            self.assertTrue(reached.wait(20))
            process.kill()
            process.wait()
            gate.set()
            person.join()
            stand_in.pending.clear()  # Mattermost remembers for 30 seconds
            process = self.start_process()

        def submit():
            return stand_in.submit_dialog(answers)

        def close():
            return stand_in.press(root["id"], "", action=button, stale=True)

        for does in (False, True):
            with self.subTest(does=does):
                answers["network"] = "10.0.0.4"
                stand_in.posts.clear()
                stand_in.run_command()
                killed_in("POST /posts", submit)
                self.assertEqual((len(stand_in.posts), submit(), submit()), (does, {}, {}))
                [root] = stand_in.roots()
                message = root["message"]
                button = stand_in.buttons(root["id"])[OPEN.steps["closed"]]
                killed_in("PUT /posts/", close)
                already = closed.already.format(status_by="bob")
                self.assertEqual((close(), close()), (already if does else "", already))
                self.assertEqual(root["message"], message.replace(OPEN.mark, closed.mark).replace(
                    OPEN.line, closed.line.format(status_by="bob")))
                self.assertEqual(stand_in.press(root["id"], closed.steps["open"]), "")
                self.assertEqual(stand_in.press(root["id"], OPEN.steps[EDIT], ALICE), "")
                answers["network"] = "10.0.0.5"
                killed_in("PUT /posts/", submit)
                self.assertEqual((submit(), submit()), ({}, {}))
                self.assertEqual(root["message"], message.replace("10.0.0.4", "10.0.0.5"))
                self.assertEqual(root["props"]["ticket"]["answers"], answers)
                self.assertEqual([entry.get("edited", entry["status"])
                                  for entry in root["props"]["ticket"]["history"]],
                                 ["open", "closed", "open", ["network"]])
                self.assertEqual(stand_in.roots(), [root])
                told = [reply["message"] for reply in stand_in.replies()]
                self.assertLessEqual(told.count(ticket_service.FIRST_REPLY), 1)

    def test_sigterm_ends_the_process_though_a_thread_waits_for_a_name_server(self):
        port = re.search(r"listening on port (\d+)", self.lost.stderr.readline())[1]
        self.mattermost.service = ("127.0.0.1", int(port))
        self.assertIn(ticket_service.FORM_NOT_OPENED, self.mattermost.run_command(TYPED))
        self.lost.send_signal(signal.SIGTERM)
        self.assertEqual(self.lost.wait(8), 0)

    def test_no_id_is_given_again_after_a_restart(self):
        self.service.service.tickets.wait_at_stop = 1
        for _ in range(2):  # the IDs of a sixth of a second
            self.file()
        self.service.shutdown()
        self.service.service.close()
        self.start_service()
        self.file()
        ids = [root["props"]["ticket_id"] for root in self.mattermost.roots()]
        self.assertEqual(ids, sorted(set(ids)))
        self.assertEqual(len(ids), 3)


# ------------------------------------------------------------------ set up, export and remind

ON_TERMINAL = """if True:
    import os, sys, ticket_service
    os.close(os.open(os.ttyname(0), os.O_RDWR))  # so that it gets what Ctrl-C sends
    ticket_service.end(ticket_service.main(sys.argv[1:], os.environ))
"""
AT, CREATED, CHANGED = 1795425075592, "2026-11-23T09:11:15Z", "2026-11-23T09:12:15Z"
MINUTE, DAY = 60_000, 24 * 60 * 60_000  # milliseconds, like AT


class SetUpTest(CommandLineCase):
    def setUp(self):
        super().setUp()
        self.empty()

    def empty(self, **settings):
        """Let Mattermost be as it is at first, but for some settings."""
        self.mattermost.accounts.pop(BOT, None)
        self.mattermost.teams, self.mattermost.commands, self.mattermost.tokens = [], [], {}
        self.mattermost.config["ServiceSettings"] = {
            "EnableBotAccountCreation": False, "EnableCommands": True,
            "AllowedUntrustedInternalConnections": "", **settings}

    def set_up(self, *teams, typed=None, signs_out=True, **environment):
        """Return the exit status of --setup, the settings that it prints, and what it says."""
        person = self.mattermost
        secrets = "\n".join([person.login_id, person.password, person.mfa_code])
        person.calls.clear()
        person.bodies.clear()
        status, output, said = self.run_main(
            "--setup", *(teams or ("ops",)), typed=secrets if typed is None else typed,
            **{"MATTERMOST_URL": person.url, "CALLBACK_URL": CALLBACK_URL, **environment})
        self.assertNotRegex("\n".join([said, *self.log.lines]),
                            r"correct|(?<!\w)[a-z0-9]{26}(?!\w)|123456")
        settings = dict(line.split("=", 1) for line in output.splitlines())
        self.assertEqual(list(settings), [] if status else [
            "MATTERMOST_URL", "CALLBACK_URL", "BOT_TOKEN", "SLASH_TOKEN"], said)
        self.assertEqual(bool(person.session), not signs_out)
        return status, settings, said.splitlines()

    def changes(self):
        """Return the calls of the last --setup that may have changed something."""
        return [call for call in self.mattermost.calls if not call.startswith("GET")
                and call not in ("POST /users/login", "POST /users/logout")]

    def assert_nothing_done(self, sentence, *teams, **details):
        """Check that --setup ends with this sentence alone."""
        status, _, said = self.set_up(*teams, **details)
        self.assertEqual((status, len(said), self.changes()), (1, 1, []), said)
        self.assertRegex(said[0], sentence)

    def test_one_command_leads_from_an_empty_mattermost_to_the_first_ticket(self):
        stand_in, stand_in.mfa_code = self.mattermost, "123456"
        status, settings, said = self.set_up("ops", "another", "ops")
        self.assertEqual(status, 0)
        self.assertEqual([body["token"] for body in stand_in.made("POST /users/login")],
                         ["", "123456"])
        self.assertEqual(stand_in.config["ServiceSettings"], {
            "EnableBotAccountCreation": True, "EnableCommands": True,
            "AllowedUntrustedInternalConnections": "tickets.example.com"})
        for what in ("EnableBotAccountCreation", "tickets.example.com", "ops", "another"):
            self.assertTrue(any(what in line for line in said), said)
        self.assertEqual([team["id"] for team in stand_in.teams], [TEAM, ANOTHER_TEAM])
        self.assertEqual([(*map(command.get, (
            "team_id", "trigger", "method", "url", "username", "auto_complete")),)
            for command in stand_in.commands], [
                (team_id, "ticket", "P", f"{CALLBACK_URL}/ticket", "ticket-bot", True)
                for team_id in (TEAM, ANOTHER_TEAM)])
        tokens = [command["token"] for command in stand_in.commands]
        self.assertEqual(settings, {
            "MATTERMOST_URL": stand_in.url, "CALLBACK_URL": CALLBACK_URL,
            "BOT_TOKEN": next(iter(stand_in.tokens)), "SLASH_TOKEN": ",".join(tokens)})
        self.start_service(**settings)
        for token in tokens:
            self.assertEqual(stand_in.run_command(token=token), "")
            self.assertEqual(stand_in.submit_dialog(answers_to()), {})

    def test_what_is_there_is_used_and_only_the_bot_s_token_is_new(self):
        _, first, _ = self.set_up("ops", "another")
        status, again, said = self.set_up("another", "ops")
        self.assertEqual(status, 0)
        new_token = f"POST /users/{BOT}/tokens"
        self.assertEqual({*self.changes()}, {
            new_token, *(f"POST /teams/{team}/members" for team in (TEAM, ANOTHER_TEAM))})
        self.assertEqual(again["SLASH_TOKEN"].split(","), first["SLASH_TOKEN"].split(",")[::-1])
        self.assertTrue(any("older tokens" in line for line in said), said)
        for token in (first["BOT_TOKEN"], again["BOT_TOKEN"]):
            self.assertEqual(self.mattermost.who_has(f"Bearer {token}"), BOT)
        command = self.mattermost.commands[0]
        before = dict(command)
        for key, value in (("url", "http://old.test:9/sub/ticket"), ("method", "G")):
            command[key] = value
            self.assertEqual(self.set_up()[0], 0)
            self.assertEqual({**command, "update_at": before["update_at"]}, before)
        self.assertEqual(len(self.mattermost.commands), 2)

    def test_the_command_of_somebody_else_is_left_alone(self):
        self.set_up("ops", "another")
        for url in ("http://elsewhere.test/tickets", "http://old.test/ticket/", "ticket", ""):
            self.mattermost.commands[1]["url"] = url
            self.assert_nothing_done("another .*/ticket.* left alone", "ops", "another")
        self.mattermost.commands[1]["trigger"] = "tickets"
        self.assertEqual(self.set_up("another")[0], 0)

    def test_what_can_t_work_is_named_before_anything_is_changed(self):
        account = {"id": BOT, "username": "ticket-bot", "delete_at": 0}
        for sentence, teams, details, changes in (
                ("password", ["ops"], {"typed": "admin\nwrong\n"}, {}),
                ("password", ["ops"], {"typed": "admin"}, {}),
                ("standard input", ["ops"], {"typed": "admin\ncorrect\udcff\n"}, {}),
                ("code", ["ops"], {"typed": "admin\ncorrect horse\n654321\n"},
                 {"mfa_code": "123456"}),
                ("code", ["ops"], {"typed": "admin\ncorrect horse"}, {"mfa_code": "123456"}),
                ("System Admin", ["ops"], {}, {"admin_roles": "system_user system_manager"}),
                *((f"no team '{name}'", ["ops", name], {}, {})
                  for name in ("typo", "Our Team", "../ops", "")),
                ("ticket-bot.* person", ["ops"], {}, {"bot": account}),
                ("ticket-bot.* disabled", ["ops"], {},
                 {"bot": {**account, "is_bot": True, "delete_at": AT}})):
            with self.subTest(sentence, teams=teams, **details), unittest.mock.patch.multiple(
                    self.mattermost, create=True, **{"mfa_code": "", **changes}):
                self.mattermost.accounts.update({BOT: changes["bot"]} if "bot" in changes else {})
                self.assert_nothing_done(sentence, *teams, **details)

    def test_before_a_password_is_asked_for_it_is_a_mattermost_that_answers(self):
        self.enterContext(unittest.mock.patch.object(ticket_service, "asked_for", self.fail))
        for url, sentence in (("http://127.0.0.1:9", "MATTERMOST_URL: no answer of .*refused"),
                              (f"http://127.0.0.1:{self.service.server_port}",
                               "MATTERMOST_URL: .* answered 404, but not as Mattermost does")):
            self.assert_nothing_done(sentence, MATTERMOST_URL=url)

    def test_what_mattermost_may_connect_to_is_what_it_was_and_our_host(self):
        for before, callback_url, after in (
                ("", "http://tickets:8080", "tickets"),
                ("a.test", "http://tickets:8080/sub", "a.test tickets"),
                ("a.test,10.0.0.0/8", "https://tickets", "a.test,10.0.0.0/8 tickets"),
                ("tickets.test, x", "http://tickets", "tickets.test, x tickets"),
                ("a.test, tickets", "http://tickets:8080", None),
                ("a.test,tickets b.test", "http://tickets", None),
                ("tickets", "http://Tickets", "tickets Tickets"),
                ("", "http://[fd00::1]:8080", "fd00::1"), ("x", "http://[fd00::1]", "x fd00::1"),
                ("x fd00::1", "http://[fd00::1]:80", None)):
            with self.subTest(before, callback_url=callback_url):
                self.empty(EnableBotAccountCreation=True,
                           AllowedUntrustedInternalConnections=before)
                status, _, said = self.set_up(CALLBACK_URL=callback_url)
                self.assertEqual((status, "PUT /config/patch" in self.mattermost.calls),
                                 (0, bool(after)))
                self.assertEqual(after or before, self.mattermost.config["ServiceSettings"][
                    "AllowedUntrustedInternalConnections"])
                self.assertEqual(any("AllowedUntrustedInternalConnections" in line and after in line
                                     for line in said), bool(after))

    def test_a_setting_that_can_t_be_changed_is_named_and_the_rest_goes_on(self):
        hosts = "AllowedUntrustedInternalConnections"
        for name, value, by_environment, restricted, status in (
                (hosts, "a.test", {hosts: True}, set(), 0), (hosts, "a.test", {}, {hosts}, 0),
                ("EnableCommands", False, {}, set(), 0),
                ("EnableCommands", False, {"EnableCommands": True}, set(), 1),
                ("EnableBotAccountCreation", False, {"EnableBotAccountCreation": True}, set(), 1)):
            with self.subTest(name, by_environment=by_environment):
                self.empty(**{name: value})
                self.mattermost.environment = {"ServiceSettings": by_environment}
                self.mattermost.write_restricted = restricted
                found, _, said = self.set_up()
                self.assertEqual(found, status, said)
                for body in self.mattermost.made("PUT /config/patch"):
                    self.assertFalse({*body["ServiceSettings"]} & {*by_environment})
                warnings = [line for line in said if line.startswith("warning")]
                self.assertEqual(len(warnings), len(by_environment) + len(restricted))
                for line in warnings:
                    self.assertIn(name, line)
                    self.assertIn('"a.test tickets.example.com"' if value else "to true", line)

    def test_whatever_fails_in_the_middle_is_one_sentence(self):
        self.set_up()
        for call in dict.fromkeys(self.mattermost.calls):
            for behave in (hangs_up, fails(500, "x.app_error"), fails(403, "x.app_error"),
                           fails(401, "api.context.session_expired.app_error"),
                           http_answer(200, b"null"), http_answer(302, b"", b"Location: /\r\n")):
                with self.subTest(call, behave=behave):
                    self.empty()
                    self.mattermost.scripts.clear()
                    self.mattermost.script(call, behave, behave)
                    is_last = call == "POST /users/logout"
                    self.mattermost.session = ""
                    status, _, said = self.set_up(signs_out=not is_last)
                    self.assertEqual(status, 0 if is_last else 1)
                    if not is_last:
                        self.assertRegex(
                            said[-1], "127.0.0.1:|there is no team 'ops'|ended the session")

    def test_settings_that_can_t_be_in_the_file_are_refused(self):
        for name, value in (
                ("MATTERMOST_URL", ""), ("CALLBACK_URL", "tickets:8080"),
                *(("CALLBACK_URL", f"http://tickets/{mark}") for mark in "$`;&\\*(|<!"),
                ("MATTERMOST_URL", "http://$HOST"), ("SSL_CERT_FILE", "/nowhere.pem")):
            with self.subTest(value):
                status, _, said = self.set_up(**{name: value})
                self.assertEqual((status, len(said), self.mattermost.calls), (2, 1, []))
                self.assertTrue(said[0].startswith(name), said)

    def test_a_private_ca_is_trusted_if_it_is_named(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (folder / "ca.pem").write_text(CERTIFICATES)
        (folder / "key.pem").write_text(PRIVATE_KEY)
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        tls.load_cert_chain(folder / "ca.pem", folder / "key.pem")
        self.mattermost = self.start_stand_in(tls=tls)
        self.empty()
        self.assertEqual(self.set_up(SSL_CERT_FILE=str(folder / "ca.pem"))[0], 0)
        self.assert_nothing_done("MATTERMOST_URL: .*CERTIFICATE_VERIFY_FAILED")

    def test_the_file_is_read_alike_by_a_shell_systemd_and_podman(self):
        _, settings, _ = self.set_up(
            "ops", "another", CALLBACK_URL="http://[fd00::1]:8080/~sub/a%20b_c-d.e")
        for value in settings.values():  # no quotes, blanks, backslashes, comments, variables
            self.assertRegex(value, r"^[A-Za-z0-9:/.,_~%\[\]-]+$")
        text = "".join(f"{name}={value}\n" for name, value in settings.items())
        lines = subprocess.run(
            ["sh", "-c", "set -a; . /dev/stdin; set +a; exec env"], input=text, check=True,
            capture_output=True, text=True, env={"PATH": os.environ["PATH"], "HOME": "/x"}).stdout
        self.assertLessEqual({*text.splitlines()}, {*lines.splitlines()})
        ticket_service.Settings.from_environment(settings)

    def start_on_terminal(self):
        """Return a process of --setup on a terminal of its own, and the other side of that."""
        try:
            ours, its = os.openpty()
        except OSError as error:
            self.skipTest(f"no terminals here: {error}")
        self.addCleanup(os.close, ours)
        process = start_python(
            self.addCleanup, "-W", "error", "-c", ON_TERMINAL, "--setup", "ops", stdin=its,
            start_new_session=True,
            env={"MATTERMOST_URL": self.mattermost.url, "CALLBACK_URL": CALLBACK_URL})
        os.close(its)
        return process, ours

    @unittest.skipUnless(shutil.which("ps"), "no ps here")
    def test_on_a_terminal_the_password_is_seen_by_nobody_and_ctrl_c_ends_it(self):
        self.mattermost.mfa_code, gate = "123456", self.gate()
        started = [self.start_on_terminal() for _ in range(4)]
        for process, terminal in started:
            self.read_until(process.stderr, "ser name of the System Admin: ")
            os.write(terminal, b"admin\n")
            self.read_until(process.stderr, "assword of the System Admin: ")
        (asking, its), (leaving, other), (process, terminal), (waiting, last) = started
        os.write(its, b"\x03")
        os.write(other, b"\x04")
        self.mattermost.script("POST /users/login", waits(gate))
        os.write(terminal, b"correct horse\n")
        self.eventually(lambda: self.mattermost.made("POST /users/login"), "the sign-in")
        processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
        self.assertIn("--setup ops", processes)
        self.assertNotIn("correct horse", processes)
        gate.set()
        self.read_until(process.stderr, "code of the System Admin: ")
        os.write(terminal, b"123456\n")
        self.assertEqual(process.wait(10), 0)
        self.assertNotIn("correct", os.read(terminal, 4096).decode() + process.stderr.read())
        self.assertEqual(len(process.stdout.read().splitlines()), 4)
        self.mattermost.mfa_code = ""
        self.mattermost.script(f"POST /teams/{TEAM}/members", waits(self.gate()))
        os.write(last, b"correct horse\n")
        self.read_until(waiting.stderr, "\n")
        self.eventually(lambda: len(self.mattermost.made(
            f"POST /teams/{TEAM}/members")) == 2, "the second one")
        os.write(last, b"\x03")
        for stopped in (asking, leaving, waiting):
            self.assertEqual(stopped.wait(10), 1)
            self.assertNotRegex(stopped.stderr.read(), "Traceback|correct")
            self.assertEqual(stopped.stdout.read(), "")
        self.assertEqual(self.mattermost.session, "")


class ExportTest(CommandLineCase):
    columns = ["ticket", "status", "reporter", "created", "taken_by", "taken", "closed_by",
               "closed", "channel", "link"]

    def export(self, status=0, screen=None, **changes):
        """Return the rows of --export, the header first, and the sentences beside them."""
        found, text, said = self.run_main("--export", screen=screen, **self.settings(**changes))
        self.assertEqual(found, status, said)
        self.assertNotIn(BOT_TOKEN, text + said)
        rows = ticket_service.csv.reader(io.StringIO(text, newline=""), strict=True)
        return [*rows], said.splitlines()

    def exported(self, *columns, **details):
        """Return some cells of each ticket that --export prints."""
        (header, *rows), _ = self.export(**details)
        return [tuple(row[header.index(column)] for column in columns) for row in rows]

    def test_three_tickets_of_two_forms_in_two_channels_and_one_that_is_archived(self):
        options = [{"text": "Über, all", "value": "a"}, {"text": "Low", "value": "b"}]
        form_file = self.form_file(form_of(
            element("select", "level", options=options),
            element("select", "several", options=options, multiselect=True),
            element("select", "who", data_source="users"),
            element("select", "people", data_source="users", multiselect=True, optional=True),
            element("select", "where", data_source="channels"), element("bool", "sure"),
            element("date", "day"), element("datetime", "at"),
            element("textarea", "text", optional=True)))
        values = {"level": "a", "several": ["a", "b"], "who": BOB, "people": [ALICE, BOB],
                  "where": QUIET, "sure": True, "day": "2026-11-27",
                  "at": "2026-11-27T10:00:00Z", "text": 'She said "no",\nthen left'}
        stand_in = self.mattermost
        stand_in.channels[SECRET].members.add(BOT)
        self.start_service(FORM_FILE=form_file)
        self.assertEqual(self.file(values), {})
        stand_in.run_command(channel_id=SECRET)
        self.assertEqual(stand_in.submit_dialog(
            {**values, "people": [], "text": ""}, channel_id=SECRET), {})
        self.start_service(FORM_FILE=self.form_file(form_of(
            element(name="ticket"), element(name="level"), element("bool", "extra"))))
        self.assertEqual(self.file({"ticket": "T-1", "level": "high", "extra": True}), {})
        first, hidden, second = stand_in.roots()
        for post, button, user, *chosen in (
                (first, "Take", BOB), (first, "Hand over to…", BOB, ALICE), (first, "Close", ALICE),
                (first, "Reopen", ALICE), (first, "Close", BOB), (second, "Close", BOB),
                (second, "Reopen", BOB), (second, "Hand over to…", ALICE, BOB),
                (second, "Edit", ALICE)):
            self.assertEqual(stand_in.press(
                post["id"], button, user, selected_option="".join(chosen)), "")
        self.assertEqual(stand_in.submit_dialog({"ticket": "T", "level": "x", "extra": True}), {})
        stand_in.channels[SECRET].delete_at = stand_in.now()

        def cells(post, status, *steps):
            """Return the first cells of a ticket; a number stands for a step's time."""
            ticket = post["props"]["ticket"]
            for number, entry in enumerate(ticket["history"]):
                entry["at"] = AT + number * MINUTE
            ticket["created_at"] = AT
            return [post["props"]["ticket_id"], status, "alice", CREATED, *(
                f"2026-11-23T09:{11 + step}:15Z" if isinstance(step, int) else step
                for step in steps), f"{stand_in.url}/_redirect/pl/{post['id']}"]

        answers = ["Über, all", "Über, all, Low", "bob", "alice, bob", "quiet", "yes",
                   "2026-11-27", "2026-11-27T10:00:00Z"]
        expected = [
            [*self.columns, *values, "form.ticket", "extra"],
            [*cells(first, "closed", "alice", 1, "bob", 5, "ops/helpdesk"), *answers,
             values["text"], "", ""],
            [*cells(second, "taken", "bob", 3, "", "", "ops/helpdesk"), "x", *[""] * 8, "T", "yes"],
            [*cells(hidden, "open", "", "", "", "", "ops/secret"), *answers[:3], "", *answers[4:],
             "", "", ""]]
        self.assertEqual(self.export(FORM_FILE=form_file), (expected, []))

    def test_a_ticket_from_before_there_was_a_history_has_its_last_status_only(self):
        for number, (status, by, *_) in enumerate(old := (
                ("open", "alice", "", "", "", ""), ("taken", "bob", "bob", CHANGED, "", ""),
                ("closed", "bob", "", "", "bob", CHANGED))):
            self.add_ticket(number, status=status, by=by, cluster="prod", gone=BOB,
                            mixed=["x", 7, None, True])
        self.assertEqual(self.exported(*self.columns[:8], "cluster", "gone", "mixed"), [
            (f"Ticket-20261123-{number:04}", status, "alice", CREATED, *cells,
             "Production", "bob", "x, 7, null, true")
            for number, (status, _, *cells) in enumerate(old)])

    def test_what_looks_like_a_formula_is_text(self):
        texts = ["=1+1", "@cmd", "+1", "-1", "＝1", "＠x", "＋1", "－1", "\t=1", "\rx", "\tx",
                 " =1", "\u3000=1", "\xa0＝1", "\n=1", " \t @x"]
        plain = ["1+1", "a=b", "'x", '"', '"=1"', ",", "a\r\nb", "a\nb", "a\rb", "ä€😀", "", " ",
                 "x\t", "\ufeff"]
        for number, text in enumerate(texts + plain):
            self.add_ticket(number, problem=text, other=[text, "x"])
        self.assertEqual(self.exported("problem", "other"), [
            *((f"'{text}", f"'{text}, x") for text in texts),
            *((text, f"{text}, x") for text in plain)])
        self.add_ticket(99, **{"=name": "x", " @y": "z"})
        self.mattermost.teams = [{"id": TEAM, "name": "+ops"}]
        (header, *rows), _ = self.export()
        self.assertEqual(header[-2:], ["'=name", "' @y"])
        self.assertEqual(rows[-1][8], "'+ops/helpdesk")

    def test_the_table_is_rfc_4180_in_utf_8_without_a_mark(self):
        self.add_ticket(1, problem='a "b", c\nd\u20ac', resource="\ud800")
        form = form_of(element("text", "resource"), element("textarea", "problem"))
        status, text, _ = self.run_main("--export", **self.settings(FORM_FILE=self.form_file(form)))
        post, = self.mattermost.roots()
        self.assertEqual((status, text), (
            0, ",".join(self.columns) + ",resource,problem\r\nTicket-20261123-0001,open,alice,"
            f"{CREATED},,,,,ops/helpdesk,"
            f'{self.mattermost.url}/_redirect/pl/{post["id"]},?,"a ""b"", c\nd€"\r\n'))

    def test_of_600_posts_none_is_missed_or_found_twice_while_people_write(self):
        for number in range(600):
            if number % 100 == 50:
                self.add_ticket(number)
            else:
                self.mattermost.say(ALICE, HELPDESK, "typed")

        def writes(handler, work):
            answer = work()
            for _ in range(7):
                self.mattermost.say(ALICE, HELPDESK, "typed")
            handler.reply(*answer)

        self.mattermost.script(f"GET /channels/{HELPDESK}/posts", writes, writes, writes)
        self.assertEqual([one[-3:] for one, in self.exported("ticket")],
                         ["050", "150", "250", "350", "450", "550"])
        self.assertLess(len(self.mattermost.made(f"GET /channels/{HELPDESK}/posts")), 6)

    def test_a_list_that_is_too_long_is_asked_for_again_and_shorter(self):
        with unittest.mock.patch.object(ticket_service, "LIST_BYTES", 2**20):
            for number in range(200):
                self.add_ticket(number, problem="x" * 7000)
            screen = io.StringIO()
            screen.isatty = lambda: True  # so that the tickets are counted
            (_, *rows), said = self.export(screen=screen)
        self.assertEqual([int(row[0][-4:]) for row in rows], [*range(200)])
        self.assertIn("200 tickets", said[-1])
        self.assertLess(len(self.mattermost.made(f"GET /channels/{HELPDESK}/posts")), 8)

    def test_only_what_the_bot_made_is_a_ticket(self):
        post = self.add_ticket(1)
        forged = {**self.add_ticket(2), "user_id": ALICE}
        reply = {**self.add_ticket(3), "root_id": post["id"]}
        for changed in (forged, reply):
            self.mattermost.posts[changed["id"]] = changed
        for props in ({"ticket": None}, {"ticket": {}, "ticket_id": 1}, {"ticket": []}):
            self.mattermost.add_post(BOT, HELPDESK, "x", props=props)
        (header, row), said = self.export()
        self.assertEqual(
            header, self.columns + [one["name"] for one in ticket_service.FORM["elements"]])
        self.assertEqual((row[0], said), ("Ticket-20261123-0001", []))

    def test_where_tickets_can_be_is_what_the_settings_say(self):
        stand_in = self.mattermost
        for number, channel_id in enumerate((HELPDESK, QUIET, ARCHIVED, SECRET, DIRECT), 1):
            stand_in.channels[channel_id].members.add(BOT)
            self.add_ticket(number, channel_id)
        options = [{"text": "A", "value": "a", "channel": QUIET}, {"text": "B", "value": "b"}]
        form_file = self.form_file(form_of(element("select", "x", options=options)))
        for changes, channels in (
                ({}, ["archived", "helpdesk", "quiet", "secret"]),
                ({"FORM_FILE": form_file}, ["archived", "helpdesk", "quiet", "secret"]),
                ({"FORM_FILE": form_file, "TICKET_CHANNEL": ARCHIVED}, ["archived", "quiet"]),
                ({"TICKET_CHANNEL": HELPDESK}, ["helpdesk"])):
            with self.subTest(changes):
                self.assertEqual(sorted(self.exported("channel", **changes)),
                                 [(f"ops/{channel}",) for channel in channels])
        stand_in.channels[DIRECT].members.remove(BOT)
        stand_in.teams.append(stand_in.all_teams[1])  # where it is in no channel
        self.assertEqual(len(self.exported("channel")), 4)

    def test_a_channel_that_can_t_be_read_is_said_and_left_out(self):
        self.add_ticket(1)
        rows, said = self.export(status=1, TICKET_CHANNEL=SECRET)
        self.assertEqual((len(rows), len(said)), (1, 1))
        self.assertRegex(said[0], f"{SECRET} is left out: .*403")
        self.mattermost.channels[QUIET].members.add(BOT)
        self.add_ticket(2, QUIET)
        self.mattermost.script(f"GET /channels/{HELPDESK}/posts", fails(*NO_PERMISSION))
        rows, said = self.export(status=1)
        self.assertEqual([row[0] for row in rows[1:]], ["Ticket-20261123-0002"])
        self.assertRegex("\n".join(said), "^channel ops/helpdesk is left out: .*403[^\n]*$")

    def test_whatever_fails_in_the_middle_is_one_sentence(self):
        """So it is with --remind."""
        post, no_token = self.add_ticket(1), fails(401, "x.app_error")
        for arguments in (["--export"], ["--remind", "3"]):
            self.let_rest(post, 9)
            self.mattermost.calls.clear()
            self.assertEqual(self.run_main(*arguments, **self.settings())[0], 0)
            calls = {*self.mattermost.calls} - {"GET /config/client"}  # which is for links only
            for (call, behave), changes in [*((failure, {}) for failure in itertools.product(
                    calls, (hangs_up, fails(500, "x.app_error"), no_token,
                            http_answer(200, b"{}"), http_answer(302, b"")))),
                    (("-", None), {"MATTERMOST_URL": "http://127.0.0.1:9"})]:
                with self.subTest(arguments, call=call, behave=behave):
                    self.let_rest(post, 9)
                    self.mattermost.pending.clear()
                    self.mattermost.failure = (call, behave)
                    status, _, said = self.run_main(*arguments, **self.settings(**changes))
                    self.assertEqual((status, said.count("\n")), (1, 1), said)
                    self.assertRegex(said, r"127\.0\.0\.1:\d+")
                    self.assertEqual(said.startswith("BOT_TOKEN: "), " 401" in said)
                    self.assertEqual(" 401" in said, behave is no_token)
            self.mattermost.failure = None

    def test_a_mattermost_that_gets_slow_is_one_sentence(self):
        """So it is with all three."""
        for behave, timeout, whole, sentence in ((waits, 0.1, 60, "timed out"),
                                                 (body_drips, 30, 0.1, r"more than 0\.1 s")):
            self.enterContext(unittest.mock.patch.object(ticket_service, "COMMAND_WAITS", whole))
            self.enterContext(unittest.mock.patch.object(
                ticket_service.Mattermost, "timeout", timeout))
            for arguments, call in ((["--setup", "ops"], "GET /config/environment"),
                                    (["--export"], f"GET /channels/{HELPDESK}/posts"),
                                    (["--remind", "3"], f"GET /channels/{HELPDESK}/posts")):
                self.mattermost.failure = (call, behave(self.gate()))
                status, output, said = self.run_main(
                    *arguments, typed="admin\ncorrect horse\n", **self.settings())
                self.assertEqual((status, output), (1, ""))
                self.assertRegex(said, f"^MATTERMOST_URL: no answer of .*{sentence}.*\n$")

    def test_what_is_wrong_with_the_options_is_one_sentence(self):
        for arguments in (["--nope"], ["x"], ["--setup"], ["--remind"], ["--check", "--export"],
                          ["--export", "x"], ["--remind", "-x"]):
            with self.subTest(arguments):
                status, output, said = self.run_main(*arguments, **self.settings())
                self.assertEqual((status, output, said.count("\n")), (2, "", 1), said)
                self.assertRegex(said, "--")

    def test_a_stream_that_is_closed_at_the_start_leaves_no_traceback(self):
        self.add_ticket(1)
        settings = self.settings(PORT=str(self.service.server_port))
        serving = self.settings(TICKET_CHANNEL=SECRET, CALLBACK_URL="http://127.0.0.1:9")
        started = [(closed, status, lines, subprocess.Popen(
            ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-S", *self.command,
             *arguments.split()], cwd=HERE, env=settings if arguments else serving, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
            for closed, arguments, status, lines in (
                (">&-", "--health", 0, 0), (">&-", "--export", 0, 0), ("2>&-", "--export", 0, 2),
                ("<&-", "--setup ops", 1, 0), ("2>&-", "--setup ops", 0, 4),
                ("<&- >&- 2>&-", "", 0, 0))]
        for *_, process in started:
            self.addCleanup(process.communicate)
            self.addCleanup(process.kill)
        *_, (*_, running) = started
        self.eventually(lambda: f"GET /channels/{SECRET}" in self.mattermost.calls)
        running.send_signal(signal.SIGTERM)
        for closed, status, lines, process in started:
            with self.subTest(process.args, closed=closed):
                output, said = process.communicate("admin\ncorrect horse\n", timeout=20)
                self.assertEqual((process.returncode, output.count("\n")), (status, lines), said)
                self.assertEqual(said.count("\n"), status, said)

    def test_ctrl_c_a_closed_pipe_and_a_full_disk_leave_no_traceback(self):
        self.add_ticket(1, problem="x" * 100_000)
        self.mattermost.script(f"GET /channels/{HELPDESK}/posts", *[waits(self.gate())] * 2)
        processes = [start_python(self.addCleanup, *self.command, *arguments, env=self.settings())
                     for arguments in (["--export"], ["--remind", "3"])]
        self.eventually(lambda: len(self.mattermost.made(
            f"GET /channels/{HELPDESK}/posts")) == 2, "a list of posts")
        for process in processes:
            process.send_signal(signal.SIGINT)
        with open("/dev/full", "w") as full:
            processes.append(subprocess.Popen(
                [sys.executable, "-S", *self.command, "--export"], cwd=HERE, stdout=full,
                stderr=subprocess.PIPE, text=True, env=self.settings()))
        self.addCleanup(processes[-1].stderr.close)
        processes.append(start_python(
            self.addCleanup, *self.command, "--export", env=self.settings()))
        processes[-1].stdout.close()
        for process, lines in zip(processes, (1, 1, 1, 0)):
            with self.subTest(process.args):
                self.assertEqual(process.wait(10), 1)
                said = process.stderr.read()
                self.assertEqual(said.count("\n"), lines, said)


class RemindTest(CommandLineCase):
    def remind(self, days="3", status=0, **changes):
        """Return the IDs that --remind prints, and the sentences beside them."""
        found, text, said = self.run_main("--remind", days, **self.settings(**changes))
        self.assertEqual(found, status, said)
        return text.splitlines(), said.splitlines()

    def texts(self):
        return [post["message"] for post in self.mattermost.replies()]

    def test_who_has_a_silent_ticket_is_mentioned_in_its_thread(self):
        post = self.add_ticket(1, status="taken", by="bob", age=3.1)
        day = time.strftime("%Y-%m-%d", time.gmtime(post["update_at"] / 1000))
        self.assertEqual(self.remind(), (["Ticket-20261123-0001"], []))
        reply, = self.mattermost.replies()
        self.assertEqual((reply["root_id"], reply["user_id"]), (post["id"], BOT))
        self.assertEqual(reply["message"], ticket_service.REMINDER_TO.format(who="@bob", day=day))
        self.assertEqual(self.remind(), ([], []))  # the reminder is news
        self.assertEqual(len(self.mattermost.replies()), 1)

    def test_of_a_ticket_that_nobody_has_the_form_says_who_is_told(self):
        self.add_ticket(1, age=9)
        self.remind()
        self.assertNotIn("@", self.texts()[0])
        self.add_ticket(2, age=9)
        self.add_ticket(3, status="taken", by="bob", age=8)
        self.remind(FORM_FILE=self.form_file(form_of(element(), mention="@oncall")))
        self.assertTrue(self.texts()[1].startswith("@oncall: "))
        self.assertTrue(self.texts()[2].startswith("@bob: "))

    def test_what_has_news_or_is_closed_or_archived_is_passed_over(self):
        stand_in = self.mattermost
        stand_in.channels[DIRECT].members.add(BOT)
        self.add_ticket(1, age=2.9)
        self.add_ticket(2, status="closed", by="bob", age=9)
        self.add_ticket(3, ARCHIVED, age=9)
        self.add_ticket(4, DIRECT, age=9)
        self.add_ticket(5, status="waiting", by="bob", age=9)  # a status that we do not know
        stand_in.say(BOB, HELPDESK, "typed", self.add_ticket(6, age=9)["id"])
        stand_in.change(self.add_ticket(7, age=9), message="edited by hand")
        self.assertEqual(self.remind(), ([], []))
        self.assertEqual(self.remind(TICKET_CHANNEL=ARCHIVED), ([], []))
        self.file()
        root = stand_in.roots()[-1]
        self.let_rest(root, 9)
        self.assertEqual(stand_in.press(root["id"], "Take", BOB), "")
        self.replies(3)
        self.assertEqual(self.remind(), ([], []))
        self.let_rest(root, 0)
        self.assertEqual(self.remind()[0], [root["props"]["ticket_id"]])

    def test_days_may_be_parts_of_days_but_no_words(self):
        self.add_ticket(1, age=3.4)
        self.add_ticket(2, age=3.6)
        self.assertEqual(self.remind("3.5"), (["Ticket-20261123-0002"], []))
        self.mattermost.calls.clear()
        for days in ("0", "-1", "x", "nan", "inf", "", " ", "3d", "0.0", "1e999", "-0.5"):
            with self.subTest(days):
                found, said = self.remind(days, status=2)
                self.assertEqual((found, len(said)), ([], 1), said)
                self.assertRegex(said[0], "--remind .*number of days")
        self.assertEqual(self.mattermost.calls, [])

    def test_two_runs_at_once_make_one_reply(self):
        self.add_ticket(1, age=9)
        gate = self.gate()
        self.mattermost.script("POST /posts", waits(gate), waits(gate))
        opening = threading.Thread(target=lambda: (self.eventually(
            lambda: len(self.mattermost.made("POST /posts")) == 2, "both"), gate.set()))
        opening.start()
        self.addCleanup(opening.join)
        output, settings = io.StringIO(), self.settings()
        with contextlib.redirect_stdout(output):
            in_threads(2, lambda _: self.assertEqual(
                ticket_service.main(["--remind", "3"], settings), 0))
        self.assertEqual(output.getvalue(), "Ticket-20261123-0001\n" * 2)
        self.assertEqual(len(self.mattermost.replies()), 1)

    def test_of_sixty_the_fifty_oldest_are_reminded_of_and_that_is_said(self):
        ids = [self.add_ticket(number, age=70 - number)["props"]["ticket_id"]
               for number in range(60)]
        self.mattermost.channels[QUIET].members.add(BOT)
        ids.insert(0, self.add_ticket(99, QUIET, age=99)["props"]["ticket_id"])
        found, said = self.remind()
        self.assertEqual(found, ids[:50])
        self.assertEqual(len(said), 1)
        self.assertIn("11 more", said[0])
        self.assertEqual(len(self.mattermost.replies()), 50)
        self.assertEqual(self.remind(), (ids[50:], []))

    def test_what_can_t_be_written_in_is_said_and_keeps_nobody_else_waiting(self):
        stand_in = self.mattermost
        stand_in.channels[QUIET].members.add(BOT)
        for number in range(55):
            self.add_ticket(number, QUIET, age=99)
        self.add_ticket(99, age=9)
        stand_in.failure = ("POST /posts", lambda handler, work: handler.reply(*(
            work() if handler.exchange[2]["channel_id"] == HELPDESK
            else error_answer(*NO_PERMISSION, "POST /posts"))))
        found, said = self.remind(status=1)
        self.assertEqual(found, ["Ticket-20261123-0099"])
        self.assertRegex(said[0], "Ticket-20261123-0000 .*not reminded of: .*may not post")
        self.assertEqual(self.remind(status=1, TICKET_CHANNEL=SECRET)[0], [])

    def test_a_ticket_that_is_deleted_meanwhile_keeps_nobody_else_waiting(self):
        posts = [self.add_ticket(number, age=9 - number) for number in range(3)]

        def deletes(handler, work):
            self.mattermost.change(posts[1], delete_at=1)
            handler.reply(*work())

        self.mattermost.script("POST /posts", deletes)
        found, said = self.remind(status=1)
        self.assertEqual(found, ["Ticket-20261123-0000", "Ticket-20261123-0002"])
        self.assertRegex("\n".join(said), "^Ticket-20261123-0001 was not reminded of: .*404.*$")

    def test_what_happens_while_a_run_still_lists_is_news(self):
        posts = [self.add_ticket(number, age=9 - number) for number in range(3)]

        def goes_on(handler, work):
            answer = work()
            self.mattermost.change(posts[0], message="changed")
            self.mattermost.say(BOB, HELPDESK, "typed", posts[1]["id"])
            handler.reply(*answer)

        self.mattermost.script(f"GET /channels/{HELPDESK}/posts", goes_on)
        self.assertEqual(self.remind(), (["Ticket-20261123-0002"], []))


# ------------------------------------------------------------------------- the files beside it

class FilesTest(unittest.TestCase):
    """What README, Containerfile and unit say of the program is so."""

    program = HERE / "ticket_service.py"

    unit = (HERE / "ticket-service.container").read_text(encoding="utf-8")
    containerfile = (HERE / "Containerfile").read_text(encoding="utf-8")
    readme = (HERE / "README.md").read_text(encoding="utf-8")

    def test_an_older_python_says_so_in_one_line(self):
        source = self.program.read_text(encoding="utf-8")
        ast.parse(source, feature_version=(3, 8))
        first_imports = re.findall(r"(?m)^(?:import|from) .*", source.partition("sys.exit(2)")[0])
        self.assertEqual(first_imports, ["from __future__ import annotations", "import sys"])
        pythons = [python for minor in (8, 9, 10)
                   for python in (shutil.which(f"python3.{minor}"),
                                  *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
                   if python]
        started = [subprocess.Popen([python, self.program], stdout=subprocess.PIPE,
                                    stderr=subprocess.PIPE, text=True) for python in pythons]
        for process in started:
            output, errors = process.communicate(timeout=20)
            if process.returncode != 127:  # what pyenv puts into the path may lead nowhere
                self.assertEqual((process.returncode, output), (2, ""))
                self.assertRegex(errors, r"^Python 3\.11 .*this is 3\.(8|9|10)\.\d+\n$")

    def test_the_unit_sets_what_the_program_needs_and_knows(self):
        names = re.findall(r"(?m)^#?Environment=(\w+)=", self.unit)
        names += re.findall(r"(?m)^Secret=.*,target=(\w+)", self.unit)
        self.assertLessEqual(set(names), set(VARIABLES))
        self.assertLessEqual(set(SettingsTest.required), set(names))

    def test_the_containerfile_sets_only_what_python_knows(self):
        self.assertEqual(set(re.findall(r"(\w+)=1", self.containerfile)),
                         {"PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"})
        self.assertEqual(re.findall(r"(?m)^COPY .*? (\S+) /app/", self.containerfile),
                         ["ticket_service.py"])

    def test_a_container_is_stopped_by_a_signal_that_ends_the_service(self):
        name = re.search(r"(?m)^STOPSIGNAL (\w+)$", self.containerfile)[1]
        self.assertIn(signal.Signals[name], ticket_service.SIGNALS)

    def test_the_port_is_the_same_everywhere(self):
        self.assertEqual(SettingsTest().read().port, 8080)
        self.assertIn("PublishPort=8080:8080\n", self.unit)
        self.assertIn("EXPOSE 8080\n", self.containerfile)
        self.assertIn("| `PORT` | `8080` |", self.readme)

    def test_the_health_command_is_one_that_exists(self):
        *program, option = json.loads(re.search(r"(?m)^HealthCmd=(.*)", self.unit)[1])
        self.assertEqual(json.dumps(program), re.search(
            r"(?m)^ENTRYPOINT (.*)", self.containerfile)[1])
        self.assertEqual(option, "--health")

    def test_the_forms_of_the_readme_open_and_have_all_types_and_keys(self):
        types, keys = set(), set()
        for text in re.findall(r'(?m)^    (\{"title".*(?:\n     .*)*)', self.readme):
            form = ticket_service.Form(json.loads(text), "README")
            self.assertEqual(form.notes, [])
            types |= {type(element) for element in form.elements}
            keys |= {key for key in ticket_service.OUR_KEYS if f'"{key}":' in text}
            names = {one: ticket_service.Name("x", "@x", True) for one in (BOB, QUIET)}
            values = form.values_in(answers_to(json.loads(text)), time.time())
            lines = form.body(ticket_service.Answers(values, names))
            self.assertEqual("".join(lines).count("**"), 2 * len(form.elements))
        self.assertEqual(types, {*ticket_service.TYPES.values(),
                                 *ticket_service.DATA_SOURCES.values()})
        self.assertEqual(keys, set(ticket_service.OUR_KEYS))

    def test_the_readme_lists_every_setting_and_sets_what_the_program_knows(self):
        known = {*VARIABLES, "NO_PROXY", *(f"{name}_FILE" for name in VARIABLES)}
        named = re.findall(r"(?:-e |Environment=|export |name: |^ {10})([A-Z_]{4,})(?:[=,]|: )",
                           self.readme, re.MULTILINE)
        self.assertLessEqual(set(named), known)
        self.assertTrue(named)
        for name in VARIABLES:
            self.assertIn(f"\n| `{name}` |", self.readme)

    def test_the_readme_runs_what_exists(self):
        scripts = re.findall(r"python3 (\w+\.py)", self.readme)
        self.assertEqual(set(scripts), {"ticket_service.py", "test_ticket_service.py"})
        self.assertIn("`python3 -m unittest`", self.readme)
        secrets_made = set(re.findall(r"podman secret create --replace ([\w-]+)",
                                      self.readme))
        self.assertLessEqual(set(re.findall(r"(?m)^#?Secret=([\w-]+)", self.unit)), secrets_made)

    def test_the_readme_fits_a_sitting_and_what_it_points_to_is_there(self):
        shown = re.sub(r"(?s)<details.*?</details>", "", self.readme)
        self.assertLessEqual(len(shown.split()), 1900)
        places = {heading.lower().replace(" ", "-")
                  for heading in re.findall(r"(?m)^##+ (.*)", shown)}
        places |= set(re.findall(r'<details id="(.*)">', self.readme))
        self.assertLessEqual(set(re.findall(r"\]\(#(.*?)\)", self.readme)), places)
        [picture] = re.findall(r"!\[.+\]\((.*)\)", shown)
        image = (HERE / picture).read_bytes()
        self.assertTrue(image.startswith(b"\x89PNG"))
        self.assertLess(len(image), 80_000)


# ---------------------------------------------------------------------------------- the demo

# What the page's switches make of Mattermost: which calls fail, and how
FAILURES = {
    "well": None,
    "down": ("", hangs_up),
    "slow": ("", slow(6)),
    "refusing the post": ("POST /posts", fails(400, "api.post.rejected.app_error")),
    "losing the answer": ("POST /posts", loses_the_answer),
    "refusing edits": ("PUT /posts/", fails(*NO_PERMISSION)),
}

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Mattermost Ticket: demo</title>
<link rel="icon" href="data:,">
<style>
* { box-sizing: border-box; }
body { font: 15px/1.45 "Open Sans", sans-serif; max-width: 75rem; margin: 0 auto;
  padding: 0 1rem 1rem; color: #3f4350; overflow-wrap: anywhere; }
header, form.say, #root { display: flex; gap: .4rem .8rem; flex-wrap: wrap; align-items: center; }
header, #switch { background: #1e325c; color: #fff; }
header { margin: 0 -1rem; padding: .6rem 1rem; }
.note, small, time { color: #6b6e7a; }
summary { font-weight: bold; padding: .6rem 0; }
.thread { border-top: 1px solid #dfe3ec; padding: .4rem; max-height: 9rem; overflow: hidden; }
.thread:hover, .post.wanted, .post.ephemeral { background: #f3f5fb; }
.post { margin: 1rem 0; padding-left: 3rem; position: relative; scroll-margin-bottom: 7rem; }
.post::before { content: attr(data-letter); position: absolute; left: 0; top: .1rem; width: 2.2rem;
  height: 2.2rem; border-radius: 50%; background: #6f8bc4; color: #fff; font-weight: bold;
  text-align: center; line-height: 2.2rem; text-transform: uppercase; }
.post.bot::before { background: #1c58d9; }
.post.reply { margin: .6rem 0 .6rem 3rem; border-left: 3px solid #dfe3ec; padding-left: 3.6rem; }
.post.reply::before { left: .8rem; }
.badge { background: #e8eaef; border-radius: 3px; padding: 0 .25rem; font-size: .65rem;
  font-weight: bold; vertical-align: middle; }
p, ul, h1, h2, h3, h4, h5, h6 { margin: .2rem 0; font-size: inherit; }
.attachment { border: 1px solid #dfe3ec; border-left: 4px solid; border-radius: 4px;
  margin: .4rem 0; padding: .4rem; display: flex; flex-wrap: wrap; gap: .3rem; }
.attachment button { background: #fff; color: #1c58d9; border-color: #1c58d9; font-weight: bold; }
.attachment select { background: #fff; width: 7.3rem; padding: .3rem 0; font-size: .9em; }
button.link { border: 0; padding: 0; background: none; color: #1c58d9; font-size: .85em; }
blockquote { margin: .3rem 0; border-inline-start: 4px solid #ccd; padding-inline-start: .7rem; }
blockquote, pre { max-height: 25rem; overflow: auto; }
code, pre { background: #f0f1f4; border: 1px solid #e3e4e8; border-radius: 4px;
  padding: .05rem .3rem; font-size: .9em; }
pre { white-space: pre-wrap; margin: .3rem 0; padding: .4rem .6rem; }
pre code { border: 0; padding: 0; }
.mention, a { color: #1c58d9; text-decoration: none; }
.mention.me { background: #ffd470; border-radius: 3px; }
.bad { color: #d24b4e; }
input, textarea, select, button { font: inherit; padding: .3rem .5rem; border-radius: 4px;
  border: 1px solid #b9bdc9; max-width: 100%; }
button, .thread { cursor: pointer; }
button:disabled { opacity: .5; }
form.say { position: sticky; bottom: 0; background: #fff; padding: .6rem 0; }
form.say textarea { flex: 1; min-width: 8rem; max-height: 9rem; resize: none;
  field-sizing: content; }
#root { flex-basis: 100%; align-items: start; max-height: 3rem; overflow: hidden; }
dialog { width: 34rem; max-width: calc(100vw - 1rem); border: 1px solid #889; border-radius: 8px; }
dialog .field { margin: .9rem 0; }
dialog label.name { display: block; font-weight: bold; }
.field :is(select, textarea, input:not([type=checkbox], [type=radio])) { width: 100%; }
dialog #switch { display: block; margin: -1rem -1rem .8rem; padding: .6rem 1rem; }
dialog .buttons { display: flex; justify-content: end; gap: .5rem; }
dialog button.main { background: #1c58d9; color: #fff; border-color: #1c58d9; }
dialog button.main:disabled::after { content: " (waiting, up to 25 seconds)"; }
@media (min-width: 60rem) {
  .page { display: grid; grid-template-columns: 19rem minmax(0, 1fr); gap: 2rem; }
  #threads { position: sticky; top: 0; align-self: start; max-height: 100vh; overflow: auto; }
}
</style>
<header>
  <label>You are <select id="user"><option>alice<option>bob</select></label>
  <label>in <select id="channel"></select></label>
  <label id="switch">Mattermost is <select id="failure"></select></label>
</header>
<p class="note">A stand-in for Mattermost, with the real service behind it: type
  <code>/ticket disk is full</code>, be alice or bob, let Mattermost fail. While a form is open,
  that switch is above it; if Mattermost is down already, no form opens.
  This channel: <code id="where"></code></p>
<div class="page">
<details id="threads"><summary></summary><div></div></details>
<div>
<main id="posts" aria-live="polite"></main>
<form class="say">
  <div id="root"></div>
  <textarea id="text" rows="1" aria-label="Message" placeholder="/ticket"></textarea>
  <button>Send</button>
</form>
<p id="complaint" class="bad" role="alert"></p>
<details><summary>What went over the wire</summary><div id="wire"></div></details>
</div></div>
<dialog aria-labelledby="title"><form novalidate></form></dialog>
<script>
"use strict";
const $ = selector => document.querySelector(selector);
let state = null, opened = 0, wanted = location.pathname.split("/").pop();
let root = "", tag = "", newest = "";  // the open thread, the hashtag searched for, the last post

const escape = text => text.replace(/[&<>"]/g, mark => `&#${mark.charCodeAt(0)};`);

function inline(text) {
  const kept = [];
  const keep = html => `\u0001${kept.push(html) - 1}\u0002`;
  const restore = html => html.replace(/\u0001(\d+)\u0002/g, (_, index) => restore(kept[index]));
  const link = (url, label) => keep(`<a href="${url}">${label}</a>`);
  return restore(escape(text.replace(/[\u0001\u0002]/g, ""))
    .replace(/(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)/g, (_, ticks, code) =>
      keep(`<code>${code.trim()}</code>`))
    .replace(/\[([^\]]*)\]\((https?:\/\/[^\s)]+)\)/g, (_, label, url) => link(url, label))
    .replace(/https?:\/\/[^\s<\u0001]*[^\s<\u0001.,:;?!)]/g, url => link(url, url))
    .replace(/\*\*(.+?)\*\*/g, "<b>$1</b>")
    .replace(/(^|\s)(#[A-Za-z][\w-]*)/g, '$1<a href="#" data-tag="$2">$2</a>')
    .replace(/(^|\s)(~[a-z0-9_-]+)/g, '$1<span class="mention">$2</span>')
    .replace(/(^|[^\w@])(@\w[\w.-]*\b)/g, (_, before, name) => `${before}<span class="mention ${
      name === "@" + $("#user").value ? "me" : ""}">${name}</span>`));
}

// As Mattermost shows it, as far as a ticket needs that: each block takes its lines.
function markdown(text) {
  const lines = text.split("\n");
  const take = pattern => {
    const taken = [];
    while (lines.length && pattern.test(lines[0])) taken.push(lines.shift());
    return taken;
  };
  let html = "";
  while (lines.length) {
    const fence = /^(`{3,})[^`]*$/.exec(lines[0]);
    if (fence) {
      const end = lines.findIndex((line, index) => index && line.startsWith(fence[1]));
      const code = lines.splice(0, end < 0 ? Infinity : end + 1).slice(1, end < 0 ? Infinity : -1);
      html += `<pre><code>${escape(code.join("\n"))}</code></pre>`;
    } else if (/^>/.test(lines[0])) {
      html += `<blockquote>${markdown(take(/^>/).map(line => line.replace(/^> ?/, "")).join("\n"))}
        </blockquote>`;
    } else if (/^#{1,6} /.test(lines[0])) {
      const [, marks, heading] = /^(#+) (.*)/.exec(lines.shift()), level = marks.length;
      html += `<h${level}>${inline(heading)}</h${level}>`;
    } else if (/^([-*]|\d+\.) /.test(lines[0])) {
      const items = take(/^([-*]|\d+\.) /).map(line => line.replace(/^\S+ /, ""));
      html += `<ul>${items.map(item => `<li>${inline(item)}</li>`).join("")}</ul>`;
    } else if (!lines[0].trim()) {
      lines.shift();
    } else {
      const paragraph = [lines.shift(), ...take(/^(?!>|`{3}|#{1,6} |([-*]|\d+\.) )(?=.*\S)/)];
      html += `<p>${paragraph.map(inline).join("<br>")}</p>`;
    }
  }
  return html;
}

async function ask(what, body) {
  const answer = await fetch(`/demo/${what}`, {method: "POST", body: JSON.stringify(
    {user: $("#user").value, channel: $("#channel").value, root, ...body})});
  return answer.json();
}

// Nobody presses again what is on its way.
async function waiting(button, answer) {
  button.disabled = true;
  return answer.finally(() => { button.disabled = false; });
}

// What is as it was is left alone: somebody may just choose from a menu in it.
function show(place, html) {
  if (place.shown !== html) place.innerHTML = place.shown = html;
}

function showEach(place, things, toHtml) {
  things.forEach((thing, index) => {
    let box = place.children[index];
    if (!box || box.of !== thing.id)
      place.insertBefore(box = document.createElement("div"), place.children[index] || null);
    box.of = thing.id;
    show(box, toHtml(thing));
  });
  while (place.children.length > things.length) place.lastChild.remove();
}

const replies = ({reply_count: count}) =>
  count ? `${count} ${count === 1 ? "reply" : "replies"}` : "Reply";
const clock = moment => new Date(moment).toTimeString().slice(0, 5);
const optionsOf = ({data_source, options}) => ({users: state.people.map(
  ([id, name]) => [id, "@" + name]), channels: state.channels}[data_source]
  || (options || []).map(({text, value}) => [value, text])).map(pair => pair.map(escape));

function action(post, element) {
  const name = escape(element.name), pressed = `data-post="${post.id}" data-action="${name}"`;
  if (element.type !== "select") return `<button ${pressed}>${name}</button>`;
  return `<select ${pressed} aria-label="${name}">${[["", name], ...optionsOf(element)].map(
    ([value, label]) => `<option value="${value}">${label}`).join("")}</select>`;
}

function showPosts() {
  $("#where").textContent = $("#channel").value;
  showThreads();
  const here = state.posts.filter(post => post.channel_id === $("#channel").value
    && (!post.only || post.only === $("#user").value)
    && (!post.root_id || post.root_id === root));  // the others: only how many there are
  showEach($("#posts"), here, post => `
    <article id="${post.id}" data-letter="${post.author[0]}" class="post ${post.root_id && "reply"}
      ${post.bot} ${post.only && "ephemeral"} ${post.id === wanted ? "wanted" : ""}">
      <b>${post.author}</b> ${post.bot || post.only ? '<span class="badge">BOT</span>' : ""}
      <time>${clock(post.create_at)}</time> ${post.edit_at ? "<small>Edited</small>" : ""}
      ${post.only ? "<small>(Only visible to you)</small>" : ""}
      <div dir="auto">${markdown(post.message)}</div>
      ${(post.props.attachments || []).map(({color, actions}) => `
        <div class="attachment" style="border-left-color: ${escape(color)}">${
          actions.map(element => action(post, element)).join("")}</div>`).join("")}
      ${post.root_id || post.only ? "" : `<button class="link" data-go="${post.id}">${
        replies(post)}</button>`}
    </article>`);
  show($("#wire"), state.wire.map(([way, call, body, answer]) => `
    <p><b>${way}:</b> <code>${escape(call)}</code></p>
    <pre>${escape(body)}\n→ ${escape(answer)}</pre>`).join(""));
  const last = here.reduce((one, other) => one.create_at > other.create_at ? one : other, {});
  if (last.id && last.id !== newest)
    document.getElementById(last.id).scrollIntoView({block: "nearest"});
  newest = last.id;
}

// Of a root post, Mattermost shows here what comes up to its first heading's end.
const beginning = ({message}) =>
  `<div dir="auto">${markdown(message.split(/(?<=^#{1,6} .*\n)/m)[0])}</div>`;

function showThreads() {
  const names = Object.fromEntries(state.channels);
  const activity = post => post.last_reply_at || post.create_at;
  const threads = state.posts.filter(
    post => tag ? post.hashtags.split(" ").includes(tag) : post.reply_count);
  threads.sort((one, other) => activity(other) - activity(one));
  show($("#threads summary"), tag ? `${tag} <button class="link" data-tag="">All threads</button>`
    : "Threads");
  show($("#threads div"), threads.map(post => `<div class="thread" data-go="${post.id}">
    <b>${post.author}</b> <span class="badge">${names[post.channel_id].split(":")[0]}</span>
    <time>${clock(activity(post))}</time> ${beginning(post)}
    <button class="link">${replies(post)}</button></div>`).join(""));
  const open = state.posts.find(post => post.id === root);
  show($("#root"), open ? `<button type="button" class="link" data-go="">Leave thread</button>
    ${beginning(open)}` : "");
}

// Go to a post, and open its thread.
function go(id) {
  const post = state.posts.find(post => post.id === id);
  $("#threads").open = innerWidth > 900;
  wanted = id;
  root = post ? post.root_id || id : "";
  if (post) $("#channel").value = post.channel_id;
  showPosts();
  if (post) document.getElementById(id).scrollIntoView({block: "center"});
  $("#text").focus({preventScroll: true});
}

// A moment as an input wants it; and a day, which may be counted from today.
const local = time => new Date(time - new Date(time).getTimezoneOffset() * 60000).toISOString();

function dayOf(text = "") {
  const counted = {yesterday: "-1d", today: "+0d", tomorrow: "+1d"}[text] || text;
  const [, number, unit] = /^([+-]\d+)([dw])$/.exec(counted) || [];
  const days = number * (unit === "w" ? 7 : 1);
  return unit ? local(Date.now() + days * 86400000).slice(0, 10) : escape(text);
}

function field(element, index) {
  const id = `field-${index}`, text = key => escape(element[key] || "");
  const common = `id="${id}" name="${text("name")}" placeholder="${text("placeholder")}"
    aria-describedby="${id}-help"`;
  const most = element.max_length || (element.type === "textarea" ? 3000 : 150);
  const defaults = element.data_source ? []  // as in Mattermost
    : element.multiselect ? text("default").split(",") : [text("default")];
  const chosen = (value, word) => defaults.includes(value) ? word : "";
  const input = {
    text: () => `<input type="text" ${common} maxlength="${most}" value="${text("default")}">`,
    textarea: () => `<textarea ${common} rows="4" maxlength="${most}">
${text("default")}</textarea>`,
    bool: () => `<label><input type="checkbox" ${common} ${chosen("true", "checked")}>
      ${text("placeholder")}</label>`,
    date: () => `<input type="date" ${common} value="${dayOf(element.default)}"
      min="${dayOf(element.min_date)}" max="${dayOf(element.max_date)}">`,
    datetime: () => `<input type="datetime-local" ${common}
      value="${element.default ? local(Date.parse(element.default)).slice(0, 16) : ""}">`,
    select: () => `<select ${common} ${element.multiselect ? "multiple" : ""}>
      ${element.multiselect && !element.placeholder ? "" : `<option value=""
        ${element.multiselect ? "disabled" : ""}>${text("placeholder")}</option>`}
      ${optionsOf(element).map(([value, label]) =>
      `<option value="${value}" ${chosen(value, "selected")}>${label}`).join("")}</select>`,
    radio: () => optionsOf(element).map(([value, label], number) => `<label><input type="radio"
      ${number ? "" : `id="${id}"`} name="${text("name")}" value="${value}"
      ${chosen(value, "checked")}> ${label}</label>`).join(" "),
  }[element.type]();
  return `<div class="field">
    <label class="name" for="${id}">${text("display_name")}${element.optional
      ? " <small>(optional)</small>" : ' <span class="bad">*</span>'}</label>
    ${input}<small id="${id}-help">${text("help_text")}</small>
    <div class="bad" role="alert" data-error="${text("name")}"></div></div>`;
}

function showDialog({title, introduction_text, elements, submit_label}) {
  $("dialog form").innerHTML = `<h3 id="title">${escape(title)}</h3>
    ${markdown(introduction_text || "")}${elements.map(field).join("")}
    <p class="bad" role="alert" id="error"></p>
    <div class="buttons"><button type="button" onclick="$('dialog').close()">Cancel</button>
    <button class="main">${escape(submit_label || "Submit")}</button></div>`;
  $("dialog").prepend($("#switch"));
  $("dialog").showModal();
  $(".field :is(input, select, textarea)").focus();
}

function answers() {
  const data = new FormData($("dialog form"));
  return Object.fromEntries(state.dialog.elements.map(({name, type, subtype, multiselect}) => {
    const value = data.get(name) || "";
    if (type === "bool") return [name, data.has(name)];
    if (multiselect) return [name, data.getAll(name)];
    if (type === "datetime" && value)
      return [name, new Date(value).toISOString().slice(0, 19) + "Z"];
    return [name, subtype === "number" && value && !isNaN(value) ? Number(value) : value];
  }));
}

$("dialog form").onsubmit = async event => {
  event.preventDefault();
  const {error, errors} = await waiting($("dialog .main"),
    ask("submit", {number: state.number, answers: answers()}));
  if (!error && !errors) return $("dialog").close();
  $("#error").textContent = error || "";
  for (const place of document.querySelectorAll("[data-error]"))
    place.textContent = (errors || {})[place.dataset.error] || "";
  [...document.querySelectorAll("dialog .bad[role]")].find(place => place.textContent)
    .closest(".field, p").scrollIntoView({block: "nearest"});
};
$("dialog").onclose = () => {
  $("header").append($("#switch"));
  $("#text").focus();
};
$("form.say").onsubmit = async event => {
  event.preventDefault();
  const text = $("#text").value;
  if (!text.trim()) return;
  $("#text").value = "";
  const {complaint} = await waiting($("form.say button:not([type])"), ask("say", {text}));
  $("#complaint").textContent = complaint;
  if (complaint) $("#text").value = text;
};
$("#text").onkeydown = event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  event.target.form.requestSubmit();
};
$("#posts").onchange = ({target}) => {
  waiting(target, ask("press", {...target.dataset, selected: target.value}));
  target.value = "";
};
document.body.onclick = event => {
  const place = event.target.closest("a, button[data-action], [data-tag], [data-go]");
  if (!place) return;
  const {action, tag: word, go: id = (place.href || "").split("/_redirect/pl/")[1]} = place.dataset;
  if (action) waiting(place, ask("press", place.dataset));
  else if (id !== undefined) go(id);
  else if (word !== undefined) {  // as Mattermost's search; without a word, the threads again
    tag = word;
    showThreads();
    $("#threads").open = true;
    $("#threads").scrollIntoView({block: "nearest"});
  } else return;
  event.preventDefault();
};
$("#failure").onchange = () => ask("fail", {failure: $("#failure").value});
$("#channel").onchange = () => go("");
$("#user").onchange = connect;

let stream;
function connect() {
  stream?.close();
  opened = null;
  stream = new EventSource(`/demo/events?${$("#user").value}`);
  stream.onmessage = event => {
    state = JSON.parse(event.data);
    if (!$("#channel").options.length) {
      $("#channel").innerHTML = state.channels.map(([id, name]) =>
        `<option value="${id}">${name}`).join("");
      $("#failure").innerHTML = state.failures.map(name => `<option>${name}`).join("");
      go(wanted);
    }
    $("#failure").value = state.failure;
    showPosts();
    if (opened === null) opened = state.number;
    if (state.number > opened) { opened = state.number; showDialog(state.dialog); }
  };
}
connect();
</script>
"""


class DemoHandler(StandInHandler):
    """The page, and what it asks: a thin layer on what the clients of the stand-in do."""

    def respond(self):
        path, _, query = self.path.partition("?")
        if self.command == "GET" and (path == "/" or path.startswith("/_redirect/pl/")):
            page = PAGE.encode()
            self.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n%s"
                       % (len(page), page))
        elif path == "/demo/events":
            self.send_events(next(id for id, name in USERS.items() if name == query))
        elif path.startswith("/demo/"):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            user = next(id for id, name in USERS.items() if name == body["user"])
            self.exchange = [None] * 4  # the page's own are not shown
            self.reply(200, getattr(self.server, path.replace("/demo/", "on_"))(user, body) or {})
        else:
            super().respond()

    do_GET = do_POST = respond

    def send_events(self, user):
        """Send what a person sees, whenever it changes, until the page is closed."""
        self.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
                   b"Connection: close\r\n\r\n")
        shown = ""
        with contextlib.suppress(OSError):
            while not is_readable(self.connection):
                now = json.dumps(self.server.seen_by(user))
                if now != shown:
                    self.wfile.write(f"data: {now}\n\n".encode())
                    shown = now
                time.sleep(self.server.look_every)


class Demo(StandIn):
    """A stand-in with a page, where four kinds of channels and of failures can be tried."""

    look_every = 0.1  # seconds, for what is new

    def __init__(self, port=0):
        super().__init__(port=port, handler=DemoHandler)
        self.failing = "well"
        self.told_at = collections.defaultdict(self.now)  # when each ephemeral text came
        self.names = {
            HELPDESK: "helpdesk: the bot is in", QUIET: "quiet: public, the bot is not in",
            SECRET: "secret: private, the bot is not in",
            DIRECT: "alice and bob: a direct message"}

    def add_channels(self, form):
        """Let there be the channels to which a form's options send tickets."""
        for number, channel_id in enumerate(form.channels, 1):
            name = f"form-{number}"
            self.channels.setdefault(channel_id, Channel(name, members=(ALICE, BOB, BOT)))
            self.names.setdefault(channel_id, f"{name}: where an option sends tickets")

    def seen_by(self, user):
        """Return all that the page shows to a person."""
        with self.lock:
            posts = [{**as_seen(post), "author": USERS[post["user_id"]], "only": "",
                      "bot": "bot" if post["user_id"] == BOT else "",
                      "at": self.posts[post["root_id"] or post["id"]]["create_at"]}
                     for post in self.posts.values()
                     if post["channel_id"] in self.names]
            posts += [{"id": f"ephemeral{number}", "channel_id": channel, "author": USERS[to],
                       "only": USERS[to], "bot": "", "hashtags": "", "root_id": "",
                       "message": text, "props": {}, "create_at": self.told_at[number],
                       "at": self.told_at[number]}
                      for number, (to, channel, text) in enumerate(self.ephemeral)]
            numbers = [number for number, (to, *_) in enumerate(self.dialogs, 1) if to == user]
            number = max(numbers, default=0)
            wire = [[way, call, body if isinstance(body, str) else json.dumps(body), str(answer)]
                    for way, call, body, answer in self.wire[-50:]]
            return {
                "posts": sorted(posts, key=lambda post: post["at"]),
                "channels": list(self.names.items()),
                "people": [(user, account["username"]) for user, account in self.accounts.items()
                           if not account["delete_at"]],
                "number": number, "dialog": self.dialogs[number - 1][2] if number else None,
                "failure": self.failing, "failures": list(FAILURES),
                "wire": json.loads(json.dumps(wire).replace(SLASH_TOKEN, "\u2022\u2022\u2022")),
            }

    def on_say(self, user, body):
        """Do what a person typed: a command, or a message to everybody; root is their thread."""
        text, channel_id, root_id = body["text"].strip(), body["channel"], body["root"]
        word, _, rest = text.partition(" ")
        complaint = ""
        if word == "/ticket":
            answer = self.run_command(rest.strip(), user, channel_id, root_id=root_id)
            complaint = answer if answer.startswith("Command with") else ""
        elif text == "/invite @ticket-bot" and channel_id != DIRECT:
            self.channels[channel_id].members.add(BOT)
        elif word.startswith("/"):
            complaint = f"Command with a trigger of '{word[1:]}' not found."
        else:
            self.say(user, channel_id, text, root_id)
        return {"complaint": complaint}

    def on_submit(self, user, body):
        """Submit a dialog; return what the client is told."""
        return self.submit_dialog(body["answers"], body["number"] - 1, user, body["channel"])

    def on_press(self, user, body):
        """Press a button of a post, or choose somebody from its menu."""
        action = self.buttons(body["post"]).get(body["action"], {"id": "gone since"})
        if seen := self.press(body["post"], "", user, action=action,
                              selected_option=body.get("selected", "")):
            self.ephemeral.append((user, body["channel"], seen))

    def on_fail(self, _, body):
        """Let Mattermost fail from now on, or be well."""
        self.failing = body["failure"]
        self.failure = FAILURES[self.failing]


def run_demo(port):
    """Run the stand-in with its page, and the service, until Ctrl-C; return the exit status."""
    try:
        stand_in = Demo(port)
    except OSError as error:
        print(f"Port {port} can't be used ({error.strerror}), so another is.")
        stand_in = Demo()
    try:
        settings = ticket_service.Settings.from_environment({
            "MATTERMOST_URL": stand_in.url, "BOT_TOKEN": BOT_TOKEN, "SLASH_TOKEN": SLASH_TOKEN,
            "CALLBACK_URL": CALLBACK_URL, "PORT": "0",
            "FORM_FILE": os.environ.get("FORM_FILE", "")})
    except ticket_service.SettingsError as error:
        print(error, file=sys.stderr)
        stand_in.server_close()
        return 2
    stand_in.add_channels(settings.form)
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    service = ticket_service.Server(
        ticket_service.TicketService(settings), "127.0.0.1", settings.port)
    stand_in.service = ("127.0.0.1", service.server_port)
    for server in (stand_in, service):
        threading.Thread(target=server.serve_forever, args=(0.02,)).start()
    print(f"Open {stand_in.url}/ in a browser. Ctrl-C ends it.", flush=True)
    signal.sigwait(signals)
    service.shutdown()
    stand_in.shutdown()
    return 0


class DemoTest(Case):
    """The page's own endpoints."""

    @classmethod
    def setUpClass(cls):
        """Start what takes long, for test_the_command_takes_another_port()."""
        taken = socket.create_server(("127.0.0.1", 0))
        cls.addClassCleanup(taken.close)
        cls.demo = start_python(cls.addClassCleanup, "-m", "test_ticket_service", "--demo",
                                "--port", str(taken.getsockname()[1]))

    def start_stand_in(self, **_):
        demo = Demo()
        demo.look_every = 0.01
        thread = threading.Thread(target=demo.serve_forever, args=(0.005,))
        thread.start()
        self.addCleanup(thread.join)
        self.addCleanup(demo.server_close)
        self.addCleanup(demo.shutdown)
        return demo

    def ask(self, what, user="alice", channel=HELPDESK, **body):
        connection = http.client.HTTPConnection("127.0.0.1", self.mattermost.server_port)
        with contextlib.closing(connection):
            body = json.dumps({"user": user, "channel": channel, "root": "", **body})
            connection.request("POST", f"/demo/{what}", body)
            return json.loads(connection.getresponse().read())

    @contextlib.contextmanager
    def events(self, user="alice"):
        """Open the event stream; yield what waits for the next state that fits a condition."""
        connection = http.client.HTTPConnection("127.0.0.1", self.mattermost.server_port, timeout=5)
        with contextlib.closing(connection):
            connection.request("GET", f"/demo/events?{user}")
            stream = connection.getresponse()

            def wait_for(condition):
                while line := stream.readline():
                    if line.startswith(b"data: ") and condition(state := json.loads(line[6:])):
                        return state
                return self.fail("the stream has ended")

            with stream:
                yield wait_for

    def test_the_page_says_what_it_is_and_loads_nothing_else(self):
        for path in ("/", "/_redirect/pl/" + new_id()):
            connection = http.client.HTTPConnection("127.0.0.1", self.mattermost.server_port)
            with contextlib.closing(connection):
                connection.request("GET", path)
                page = connection.getresponse().read().decode()
            self.assertIn("stand-in for Mattermost", page)
            self.assertNotRegex(page, "(src|href)=.https?:")

    def test_a_ticket_is_filed_closed_and_seen_by_others(self):
        with self.events() as alice, self.events("bob") as bob:
            self.assertEqual(self.ask("say", text="/ticket disk is full"), {"complaint": ""})
            state = alice(lambda state: state["dialog"])
            self.assertIn('"default": "disk is full"', json.dumps(state["dialog"]))
            number = state["number"]
            self.assertIn("errors", self.ask("submit", number=number, answers={}))
            self.assertEqual(self.ask("submit", number=number, answers=answers_to()), {})
            state = alice(lambda state: len(state["posts"]) == 3)
            root, reply, confirmation = state["posts"]
            self.assertEqual((reply["root_id"], confirmation["only"]), (root["id"], "alice"))
            self.assertNotIn(SLASH_TOKEN, json.dumps(state["wire"]))
            for number, (user, button, status) in enumerate((
                    ("alice", "Take", "taken by @alice"), ("bob", "Take", "taken by @bob"),
                    ("bob", "Close", "closed by @bob"), ("bob", "Reopen", "open")), 4):
                names = [action["name"] for action in root["props"]["attachments"][0]["actions"]]
                action = next(name for name in names if name.startswith(button))
                self.ask("press", user=user, post=root["id"], action=action)
                state = bob(lambda state, number=number: len(state["posts"]) == number)
                root = state["posts"][0]
                self.assertIn("#ticket-" + status, root["message"])
            self.assertIsNone(state["dialog"])

    def test_a_thread_is_seen_by_others_and_can_have_a_ticket_of_its_own(self):
        with self.events("bob") as bob:
            self.ask("say", text="good morning")
            [root] = bob(lambda state: state["posts"])["posts"]
            self.ask("say", text="the same to you", root=root["id"])
            root, reply = bob(lambda state: len(state["posts"]) == 2)["posts"]
            self.assertEqual((root["reply_count"], reply["root_id"]), (1, root["id"]))
        self.ask("say", text="/ticket", root=root["id"])
        self.ask("submit", number=1, answers=answers_to())
        ticket = self.mattermost.roots()[1]
        self.assertIn("/_redirect/pl/" + root["id"], ticket["message"])
        self.ask("press", post=ticket["id"], action="Hand over to…", selected=BOB)
        self.assertIn("taken by @bob", ticket["message"])
        self.ask("press", post=ticket["id"], action="Take")  # which was there a moment ago
        self.assertEqual(self.mattermost.ephemeral[-1], (ALICE, HELPDESK, "Invalid action id."))

    def test_a_private_channel_asks_for_an_invitation_and_gets_it(self):
        self.ask("say", channel=SECRET, text="/ticket")
        self.assertEqual(self.mattermost.ephemeral[0][2], cant_post("not a member"))
        self.ask("say", channel=SECRET, text="/invite @ticket-bot")
        self.ask("say", channel=SECRET, text="/ticket")
        self.assertEqual(len(self.mattermost.dialogs), 1)
        self.assertEqual(self.ask("say", text="/nothing"),
                         {"complaint": "Command with a trigger of 'nothing' not found."})

    def test_the_channels_to_which_a_form_leads_are_there(self):
        self.start_with_form(RoutingTest.form)
        self.mattermost.add_channels(self.service.service.form)
        with self.events() as alice:
            self.ask("say", text="/ticket")
            self.assertEqual(self.ask("submit", number=1, answers={
                "kind": "net", "problem": "disk"}), {})
            state = alice(lambda state: len(state["posts"]) == 3)
            self.assertEqual(state["posts"][0]["channel_id"], NETOPS)
            self.assertLessEqual({NETOPS, STORAGE}, set(dict(state["channels"])))

    def test_each_failure_keeps_the_dialog_open_and_ends_with_its_switch(self):
        self.limit(patience=0, timeout=0.2)
        self.mattermost.keeps = False
        for failure in FAILURES:
            with self.subTest(failure):
                self.ask("say", text="/ticket")
                number, before = len(self.mattermost.dialogs), len(self.mattermost.roots())
                self.ask("fail", failure=failure)
                answer = self.ask("submit", number=number, answers=answers_to())
                self.ask("fail", failure="well")
                works = failure in ("well", "refusing edits")
                self.assertEqual(list(answer), [] if works else ["error"])
                self.assertEqual(self.ask("submit", number=number, answers=answers_to()), {})
                self.assertEqual(len(self.mattermost.roots()), before + 1)

    def test_the_command_takes_another_port(self):
        self.assertIn("can't be used", self.demo.stdout.readline())
        self.assertRegex(self.demo.stdout.readline(), r"Open http://127\.0\.0\.1:\d+/ in a browser")
        self.demo.send_signal(signal.SIGINT)
        self.assertEqual(self.demo.wait(5), 0)

    def test_the_command_says_what_is_wrong_with_a_form(self):
        os.environ["FORM_FILE"] = "/nowhere"
        self.addCleanup(os.environ.pop, "FORM_FILE")
        with contextlib.redirect_stderr(io.StringIO()) as errors:
            self.assertEqual(run_demo(0), 2)
        self.assertIn("FORM_FILE '/nowhere': can't be read", errors.getvalue())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Tests and demo of ticket_service.py.")
    parser.add_argument("--demo", action="store_true", help="try it in a browser")
    parser.add_argument("--port", type=int, default=8065, help="of the demo's page; default 8065")
    options, rest = parser.parse_known_args()
    if options.demo:
        sys.exit(run_demo(options.port))
    unittest.main(argv=[sys.argv[0], *rest])
