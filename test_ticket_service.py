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
THREAD = "n7gqc3ru5pdr8y6ek4hhi1b3mo"
NO_PERMISSION = (403, "api.context.permissions.app_error")
STATUSES = ticket_service.STATUSES
OPEN = STATUSES["open"]
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


def cant_post(obstacle, after="command"):
    """Return what is said where the bot can't post."""
    return ticket_service.CANT_POST[obstacle][after].format(bot="ticket-bot")


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
    process = subprocess.Popen(
        [sys.executable, "-S", *arguments], cwd=HERE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, **details)
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

    def settings(self, **changes):
        environment = {"MATTERMOST_URL": self.mattermost.url, "BOT_TOKEN": BOT_TOKEN,
                       "SLASH_TOKEN": SLASH_TOKEN, "CALLBACK_URL": CALLBACK_URL, "PORT": "0"}
        return {**environment, **self.environment, **changes}

    def start_service(self, files=1024, threads=128, **changes):
        """Return a running server; the stand-in's people use the one that was started last."""
        settings = ticket_service.Settings.from_environment(self.settings(**changes))
        desk = ticket_service.Desk(settings)
        server = ticket_service.Server(
            desk, settings.listen_address, settings.port, files, threads)
        desk.tickets.wait_at_stop, desk.mattermost.pause, server.stop_within = 0, 0.01, 0.1
        desk.presses.first_look, server.look_every = 0.005, 0.005
        thread = threading.Thread(target=server.serve_forever, args=(0.001,))
        thread.start()
        self.mattermost.service = ("127.0.0.1", server.server_port)
        self.service = server
        self.addCleanup(self.stop_service, server, thread)
        return server

    def limit(self, timeout=5, patience=20, answer_within=24):
        """Change for how many seconds the service waits, or let it be as usual."""
        self.service.desk.mattermost.timeout = timeout
        self.service.desk.mattermost.patience = patience
        self.service.answer_within = answer_within

    def gate(self):
        """Return an event for what waits in the stand-in; it is set at the end, at the latest."""
        self.gates.append(threading.Event())
        return self.gates[-1]

    def start_with_form(self, form, **changes):
        """Return a running server whose form is another one, from a file."""
        folder = self.enterContext(tempfile.TemporaryDirectory())
        form_file = Path(folder) / "form.json"
        form_file.write_text(json.dumps(form), encoding="utf-8")
        return self.start_service(FORM_FILE=str(form_file), **changes)

    def stop_service(self, server, thread):
        """Stop a server, and look for what must not be in its log."""
        for gate in self.gates:
            gate.set()
        if thread.is_alive():
            server.shutdown()
            thread.join()
        server.desk.close()
        self.assert_nothing_private_logged()

    def assert_nothing_private_logged(self):
        private = [BOT_TOKEN, SLASH_TOKEN, "typed", "hookhookhook", *self.mattermost.hooks]
        private += [dialog.get("state", "-") for _, _, dialog in self.mattermost.dialogs]
        lines = "\n".join(self.log.lines)
        for text in private:
            self.assertNotIn(text, lines)
        self.assertNotRegex(lines, "[\x00-\x08\x0b-\x1f]")

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
        problem = next(e for e in dialog["elements"] if e["type"] == "textarea")
        self.assertEqual(problem["default"], "disk is full")
        self.assertEqual(self.mattermost.posts, {})
        self.assert_logged("INFO SLASH_TOKEN fits")

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
        self.assertEqual(ticket["nonce"], root["pending_post_id"])

        [reply] = self.replies()
        self.assertEqual((reply["root_id"], reply["message"]), (root["id"], ticket_service.REPLY))
        [(user, channel, text)] = self.mattermost.ephemeral
        self.assertEqual((user, channel), (ALICE, HELPDESK))
        self.assertEqual(text, ticket_service.CONFIRMATION.format(
            ticket_id=ticket_id, link=f"{self.mattermost.url}/_redirect/pl/{root['id']}"))
        self.assert_logged("INFO CALLBACK_URL works")
        self.assert_logged(f"ticket={ticket_id} user=alice channel={HELPDESK} post={root['id']}")

    def test_the_ticket_is_posted_exactly_like_this(self):
        form = {"title": "New ticket", "mention": "@helpdesk", "elements": [
            {"type": "select", "name": "cluster", "display_name": "Cluster", "options": [
                {"text": "Production", "value": "prod", "mention": "@vsphere-oncall"}]},
            {"type": "text", "name": "resource", "display_name": "VM / resource"},
            {"type": "textarea", "name": "problem", "display_name": "Problem description"},
            {"type": "textarea", "name": "network", "display_name": "Network information",
             "code": True}]}
        self.start_with_form(form)
        self.assertEqual(self.mattermost.run_command(root_id=THREAD), "")
        self.assertEqual(self.mattermost.submit_dialog({
            "cluster": "prod", "resource": "vm-042", "problem": "disk is full\nsince nine",
            "network": "10.0.0.4:443"}), {})
        [root] = self.mattermost.roots()
        link = f"{self.mattermost.url}/_redirect/pl/{THREAD}"
        self.assertEqual(root["message"], f"""\
#### #{root['props']['ticket_id']} · @alice
{ticket_service.STATUSES['open'].line}
{ticket_service.THREAD.format(link=link)}
{ticket_service.FOR.format(mention='@helpdesk')}
**Cluster:** `Production` @vsphere-oncall
**VM / resource:** `vm-042`
**Problem description:**
> disk is full
> since nine

**Network information:**
```
10.0.0.4:443
```""")

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

    def test_the_same_submission_a_minute_later_makes_no_second_ticket(self):
        self.file()
        self.replies()
        self.mattermost.pending.clear()  # Mattermost remembers for 30 seconds
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertEqual(len(self.mattermost.posts), 2)
        self.assertEqual(len(self.mattermost.ephemeral), 1)

    def test_two_dialogs_of_one_person_make_two_tickets(self):
        self.file()
        self.file()
        first, second = (root["props"]["ticket_id"] for root in self.mattermost.roots())
        self.assertLess(first, second)

    def test_a_dialog_that_is_cancelled_makes_no_ticket(self):
        self.mattermost.run_command()
        self.assertEqual(self.mattermost.submit_dialog({}, cancelled=True), {})
        self.assertEqual(self.mattermost.posts, {})

    def test_the_channel_is_the_one_where_the_command_was_typed(self):
        self.assertEqual(self.file(channel_id=QUIET, team_id="other"), {})
        self.assertEqual([root["channel_id"] for root in self.mattermost.roots()], [HELPDESK])

    def test_one_channel_can_get_all_tickets(self):
        self.start_service(TICKET_CHANNEL=QUIET)
        self.assertEqual(self.mattermost.run_command(channel_id=DIRECT), "")
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies()
        self.assertEqual({post["channel_id"] for post in self.mattermost.posts.values()}, {QUIET})
        self.assertEqual(self.mattermost.ephemeral[0][:2], (ALICE, DIRECT))

    def test_mattermost_can_be_at_a_sub_path(self):
        self.mattermost.sub_path = "/chat"
        self.start_service(MATTERMOST_URL=self.mattermost.url + "/chat/")
        self.assertEqual(self.file(), {})
        self.replies()
        self.assertEqual(len(self.mattermost.ephemeral), 1)

    def test_every_version_of_mattermost_is_understood(self):
        self.start_service(SLASH_TOKEN=", ".join(token for token, *_ in RECORDED.values()))
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
                problem = next(e for e in dialog["elements"] if e["type"] == "textarea")
                self.assertEqual(problem["default"],
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

# A slash command and a dialog submission as three versions sent them: (token, form, JSON)
RECORDED = {
    "9.4": (
        "xan3cywo9b85bpzhryd5t68cww",
        "channel_id=ys8tr9o6apng9qpmtshtc7cftc&channel_mentions=quiet&channel_mentions_ids=qnwb"
        "bjiuk7gf9dzdjkqgtkh11c&channel_name=helpdesk&command=%2Fticketrec&response_url=http%3A"
        "%2F%2Flocalhost%3A8064%2Fhooks%2Fcommands%2Ffyhkhcdbmbyri8uefsfj6ri1cc&team_domain=ops"
        "&team_id=qstu3tybh3fdupecsp9pfj548a&text=disk+is+full+on+%40bob+see+~quiet+%26+100%25+"
        "%22ok%22%0Asecond+line&token=xan3cywo9b85bpzhryd5t68cww&trigger_id=MWpzZjk1aXc3M3JrOXl"
        "lbnh3bWYzcWgxanc6dWV3aWUzYmRqN2czenJnM2Z0aTExY2NnaHc6MTc5NTQyNTAxMTU4NDpNRVlDSVFEU20zY"
        "UM2UjBRbjVTOEtOWC9UblVjSjI5OGZBRGZ4NHk3ZjBET0o2VWJZUUloQUtxeXpNRkFIWmYxV1BXYUkwWkthbSs"
        "yeitjbjhwRks5UHg0cE1tL0lGakQ%3D&user_id=uewie3bdj7g3zrg3fti11ccghw&user_mentions=bob&u"
        "ser_mentions_ids=dosdban4hbb97y6spgby5k6kjc&user_name=alice",
        '{"type":"dialog_submission","callback_id":"ticket","state":"STATE","user_id":"uewie3bd'
        'j7g3zrg3fti11ccghw","channel_id":"ys8tr9o6apng9qpmtshtc7cftc","team_id":"qstu3tybh3fdu'
        'pecsp9pfj548a","submission":{"cluster":"prod","network":"","problem":"disk is full\\nsi'
        'nce nine @all","resource":"vm-042"},"cancelled":false}'),
    "10.9": (
        "g5fyf8zqei81xmg87afk7hkq5a",
        "channel_id=5rnibntytjnmjc9tz4ofyru5jy&channel_mentions=quiet&channel_mentions_ids=yij3"
        "kf653j89pyf3qhjqioprxh&channel_name=helpdesk&command=%2Fticketrec&response_url=http%3A"
        "%2F%2Flocalhost%3A8065%2Fhooks%2Fcommands%2Ft7cok1r4pfy8fcogazduhdr56y&team_domain=ops"
        "&team_id=hh8sh175rty5ubpyuqapa1561e&text=disk+is+full+on+%40bob+see+~quiet+%26+100%25+"
        "%22ok%22%0Asecond+line&token=g5fyf8zqei81xmg87afk7hkq5a&trigger_id=YmlqMTM1anducGc3ZDh"
        "yNDdmeWU5a2Z4em86aTdwZ3BkdWFjZmI0aXlkZjk1eDZxbTZyZ3c6MTc5NTQyNTA0MzI1ODpNRVFDSUFDdVdMd"
        "kVlVE1wcDFyelZ6N283dzY3NG5BS2lYRHB2QlFnUEtSSk1zSlFBaUFqL0ljRGdGOEhIQUVoUVBDRDVKaVV2QzR"
        "aUVVDRDJuTU5zbVhra2QwdjRBPT0%3D&user_id=i7pgpduacfb4iydf95x6qm6rgw&user_mentions=bob&u"
        "ser_mentions_ids=zki51t9ba3y4byco38c8w1wr1w&user_name=alice",
        '{"type":"dialog_submission","callback_id":"ticket","state":"STATE","user_id":"i7pgpdua'
        'cfb4iydf95x6qm6rgw","channel_id":"5rnibntytjnmjc9tz4ofyru5jy","team_id":"hh8sh175rty5u'
        'bpyuqapa1561e","submission":{"cluster":"prod","network":"","problem":"disk is full\\nsi'
        'nce nine @all","resource":"vm-042"},"cancelled":false}'),
    "11.6": (
        "1nzmkfsnob8aijxsx1kpot1dwc",
        "channel_id=xy598dj81pnabe8p5ayj81sfya&channel_mentions=quiet&channel_mentions_ids=a89o"
        "8q346ib8tmwda66iacqita&channel_name=helpdesk&command=%2Fticketrec&response_url=http%3A"
        "%2F%2Flocalhost%3A8066%2Fhooks%2Fcommands%2Fuow574xjtigdb8aqgx9tqqqmme&root_id=&team_d"
        "omain=ops&team_id=5tkh6wrqyfbixqnt31178yty4r&text=disk+is+full+on+%40bob+see+~quiet+%2"
        "6+100%25+%22ok%22%0Asecond+line&token=1nzmkfsnob8aijxsx1kpot1dwc&trigger_id=bmhwYm1uNm"
        "00cDhpeHI3NmQzMTMzdXp3Z2E6cHh4aGN0cTcxcGduZmR6a2plYm5jazd4NHI6MTc5NTQyNTA3NTA5MjpNRVlD"
        "SVFEL1J2T2JMMDQrNmxxenNUeHRSdEhqQnhFQ0NRRmdPS2V1bEdWdUtmWjJLUUloQUl5TWJOa29PZ0xwNklvcW"
        "d2WFc0TlpXa0huaUk3OE9LS0wyaEJXVVRoOGg%3D&user_id=pxxhctq71pgnfdzkjebnck7x4r&user_menti"
        "ons=bob&user_mentions_ids=abe8mg4f97n15nhobuh4asuzse&user_name=alice",
        '{"type":"dialog_submission","callback_id":"ticket","state":"STATE","user_id":"pxxhctq7'
        '1pgnfdzkjebnck7x4r","channel_id":"xy598dj81pnabe8p5ayj81sfya","team_id":"5tkh6wrqyfbix'
        'qnt31178yty4r","submission":{"cluster":"prod","network":"","problem":"disk is full\\nsi'
        'nce nine @all","resource":"vm-042"},"cancelled":false}'),
}


# ----------------------------------------------------------------------- the stand-in Mattermost

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


def as_seen(post):
    """Return a post as the API shows it: without what its buttons carry."""
    post = json.loads(json.dumps(post))
    for attachment in post["props"].get("attachments", ()):
        for action in attachment["actions"]:
            del action["integration"]
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


class StandIn(http.server.ThreadingHTTPServer):
    """A Mattermost with one team, and the people who use it.

    Its API is in ROUTES. run_command(), submit_dialog() and press() are what its clients do.
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
            OTHERS: Channel("others", members=(ALICE,), team="another" + TEAM[7:]),
        }
        self.posts, self.pending = {}, {}
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
        trigger = base64.b64encode(f"{new_id()}:{user}:{time.time_ns()}".encode()).decode()
        self.hooks[hook] = [5, user, channel_id]
        self.triggers[trigger] = user
        form = {"channel_id": channel_id, "channel_name": self.channels[channel_id].name,
                "command": "/ticket",
                "response_url": f"http://elsewhere.invalid/hooks/commands/{hook}",
                "team_domain": "ops", "team_id": TEAM, "text": text, "token": SLASH_TOKEN,
                "trigger_id": trigger, "user_id": user, "user_name": USERS[user]}
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
        """Return the buttons of a post, by their names."""
        [attachment] = self.posts[post_id]["props"]["attachments"]
        return {action["name"]: action for action in attachment["actions"]}

    def press(self, post_id, button, user=BOB, /, action=None, **changes):
        """Let a person press a button of a post, or one that was there; return what they see.

        That is "" or an ephemeral text.
        """
        post = self.posts[post_id]
        action = action or self.buttons(post_id)[button]
        request = {
            "user_id": user, "user_name": USERS[user], "channel_id": post["channel_id"],
            "channel_name": self.channels[post["channel_id"]].name, "team_id": TEAM,
            "team_domain": "ops", "post_id": post_id, "trigger_id": new_id(), "type": "button",
            "data_source": "", "context": action["integration"]["context"], **changes}
        status, _, body = self.post_to_service(
            action["integration"]["url"], json.dumps(request).encode(), "application/json")
        if status != 200:
            return "Action integration error."
        answer = json.loads(body)
        if "update" in answer:
            self.update_post(post, answer["update"])
        return answer.get("ephemeral_text", "")

    def update_post(self, post, update):
        """Change a post as an action asks for; what the update leaves out is lost."""
        with self.lock:
            post["message"] = update.get("message", "")
            post["hashtags"] = hashtags(post["message"])
            post["props"] = update.get("props", post["props"])
            post["update_at"] = post["edit_at"] = time.time_ns() // 10**6
            self.check_buttons(post["props"])
            if post["props"].get("from_bot") != "true":
                self.complain("an update without from_bot takes the mark of the bot away")

    # What the service asks of it

    def user(self):
        return {"id": BOT, "username": "ticket-bot", "roles": self.roles,
                "is_bot": self.is_bot}

    def bot_may_post(self, channel_id):
        channel, roles = self.channels.get(channel_id), self.roles.split()
        if not channel:
            return False
        if BOT in channel.members:
            roles += ["team_user", "channel_user"]
        granted = {permission for role in roles for permission in self.permissions.get(role, ())}
        return "create_post" in granted or ("create_post_public" in granted
                                            and channel.kind == "O")

    def get_team_member(self, _, team_id):
        if team_id != TEAM:
            raise Failure(*NO_PERMISSION)
        return 200, {"team_id": TEAM, "user_id": BOT, "roles": "team_user", "delete_at": 0}

    def get_roles(self, names):
        known = [{"id": new_id(), "name": name, "permissions": self.permissions[name]}
                 for name in names if name in self.permissions]
        return 200, known or None

    def get_channel(self, _, channel_id):
        channel = self.channels.get(channel_id)
        if not channel:
            raise Failure(404, "app.channel.get.existing.app_error")
        if BOT not in channel.members and (channel.kind != "O" or channel.team != TEAM):
            raise Failure(*NO_PERMISSION)
        return 200, {"id": channel_id, "type": channel.kind, "delete_at": channel.delete_at,
                     "name": channel.name, "display_name": channel.display_name,
                     "team_id": "" if channel.kind in "DG" else channel.team}

    def get_member(self, _, channel_id, user_id):
        user_id = BOT if user_id == "me" else user_id
        members = getattr(self.channels.get(channel_id), "members", ())
        if BOT not in members:
            raise Failure(*NO_PERMISSION)
        if user_id not in members:
            raise Failure(404, "app.channel.get_member.missing.app_error")
        return 200, {"channel_id": channel_id, "user_id": user_id, "roles": "channel_user"}

    def get_user(self, _, user_id):
        if user_id not in USERS:
            raise Failure(404, "app.user.missing_account.const")
        return 200, {"id": user_id, "username": USERS[user_id], "delete_at": 0,
                     "is_bot": user_id == BOT}

    def join(self, body, channel_id):
        channel = self.channels.get(channel_id)
        if channel and channel.kind in "DG":
            raise Failure(400, "api.channel.add_user_to_channel.type.app_error")
        if not channel or channel.kind != "O" or channel.team != TEAM or body != {"user_id": BOT}:
            raise Failure(*NO_PERMISSION)
        channel.members.add(BOT)
        return 201, {"channel_id": channel_id, "user_id": BOT, "roles": "channel_user"}

    def create_post(self, body):
        channel_id, pending_id = body["channel_id"], body.get("pending_post_id", "")
        if not self.bot_may_post(channel_id):
            raise Failure(*NO_PERMISSION)
        if pending_id in self.pending:
            if not self.pending[pending_id]:
                raise Failure(500, "api.post.deduplicate_create_post.pending")
            made = {**as_seen(self.posts[self.pending[pending_id]]), "pending_post_id": ""}
            made.pop("metadata")
            return 201, made
        if self.channels[channel_id].delete_at:
            raise Failure(400, "api.post.create_post.can_not_post_to_deleted.error")
        if len(body["message"]) > 16383:
            raise Failure(400, "model.post.is_valid.message_length.app_error")
        root_id = body.get("root_id", "")
        if root_id and self.posts.get(root_id, {}).get("channel_id") != channel_id:
            raise Failure(400, "api.post.create_post.root_id.app_error")
        self.check_post(body)
        now = time.time_ns() // 10**6
        post = {"id": new_id(), "create_at": now, "update_at": now, "edit_at": 0, "delete_at": 0,
                "is_pinned": False, "user_id": BOT, "channel_id": channel_id, "root_id": root_id,
                "original_id": "", "message": body["message"], "type": "",
                "props": {**body.get("props", {}), "from_bot": "true"},
                "hashtags": hashtags(body["message"]),
                "file_ids": [], "pending_post_id": pending_id, "reply_count": 0, "metadata": {}}
        self.posts[post["id"]] = post
        if root_id:
            self.posts[root_id]["reply_count"] += 1
        if pending_id:
            self.pending[pending_id] = post["id"]
        return 201, as_seen(post)

    def check_post(self, body):
        """Complain of a post that Mattermost would take."""
        if not body.get("pending_post_id"):
            self.complain("a post without pending_post_id can't be repeated safely")
        if not isinstance(body.get("props", {}).get("attachments"), list):
            self.complain("a post without props.attachments loads previews and images")
        self.check_buttons(body.get("props", {}))

    def check_buttons(self, props):
        """Complain of a button that can't be seen or pressed."""
        for attachment in props.get("attachments", ()):
            for action in attachment["actions"]:
                if not re.fullmatch("[A-Za-z0-9]+", action["id"]) or not action["name"]:
                    self.complain(f"a button that can't be pressed: {action}")
                if not action.get("integration", {}).get("context"):
                    self.complain("a button that has lost its integration")

    def get_post(self, _, post_id):
        post = self.posts.get(post_id)
        if not post:
            raise Failure(404, "app.post.get.app_error")
        if BOT not in self.channels[post["channel_id"]].members:
            raise Failure(*NO_PERMISSION)
        return 200, as_seen(post)

    def get_posts(self, _, channel_id, query):
        if BOT not in self.channels[channel_id].members:
            raise Failure(*NO_PERMISSION)
        since = int(dict(urllib.parse.parse_qsl(query))["since"])
        found = {post_id: {**as_seen(post), "reply_count": 0}
                 for post_id, post in self.posts.items()
                 if post["channel_id"] == channel_id and post["update_at"] > since}
        return 200, {"order": list(found)[::-1], "posts": found}

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
                raise Failure(400, "api.context.invalid_body_param.app_error")


ROUTES = [
    ("GET", r"/api/v4/config/client\?format=old", lambda self, _: (200, {
        "Version": self.version, "BuildNumber": "", "SiteURL": self.site_url,
        "CollapsedThreads": self.threads})),
    ("GET", "/api/v4/users/me", lambda self, _: (200, self.user())),
    ("GET", "/api/v4/users/me/teams", lambda self, _: (200, self.teams)),
    ("GET", "/api/v4/channels/([a-z0-9]{26})", StandIn.get_channel),
    ("GET", "/api/v4/channels/([a-z0-9]{26})/members/(me|[a-z0-9]{26})", StandIn.get_member),
    ("GET", "/api/v4/users/([a-z0-9]{26})", StandIn.get_user),
    ("POST", "/api/v4/channels/([a-z0-9]{26})/members", StandIn.join),
    ("GET", r"/api/v4/channels/([a-z0-9]{26})/posts\?(since=\d+)", StandIn.get_posts),
    ("GET", "/api/v4/teams/([a-z0-9]{26})/members/me", StandIn.get_team_member),
    ("POST", "/api/v4/roles/names", StandIn.get_roles),
    ("POST", "/api/v4/posts", StandIn.create_post),
    ("GET", "/api/v4/posts/([a-z0-9]{26})", StandIn.get_post),
    ("POST", "/api/v4/posts/ephemeral", StandIn.create_ephemeral_post),
    ("POST", "/api/v4/actions/dialogs/open", StandIn.open_dialog),
    ("POST", "/hooks/commands/([A-Za-z0-9]+)", StandIn.use_hook),
]
WITHOUT_TOKEN = ("/api/v4/config/client", "/api/v4/actions/dialogs/open", "/hooks/commands/")


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
            known = self.headers["Authorization"] == f"Bearer {stand_in.bot_token}"
            if not known and not path.startswith(WITHOUT_TOKEN):
                raise Failure(401, "api.context.session_expired.app_error")
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    with stand_in.lock:
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
    """Do as asked, begin to answer, go on byte by byte, and give up when a gate is open."""
    def behave(handler, work):
        work()
        with contextlib.suppress(OSError):
            handler.write(beginning)
            while not gate.wait(0.01):
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
    "nesting": http_answer(200, b"[" * 90000),
    "no body": http_answer(200, b""),
    "no HTTP": says(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "half an answer": says(b"HTTP/1.1 201 X\r\nContent-Length: 99\r\n\r\n{"),
    "too much": http_answer(201, b" " * (2**20 + 1)),
    "no answer": hangs_up,
}


def sentence_after(what, again):
    """Return what a person reads after one of ODD_ANSWERS."""
    if what == "a redirect":
        return ticket_service.IN_BETWEEN.format(status=302)
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
        for token, hint in (
                ("", "none"), ("wrong", "5 characters"), (SLASH_TOKEN[:-1], "25 characters"),
                (SLASH_TOKEN.upper(), "another"), ("пароль", "12 characters"),
                (f'"{SLASH_TOKEN}"', "quotes"), (b"\xed\xa0\x80", "characters")):
            with self.subTest(token):
                self.log.lines.clear()
                status, answer, headers = self.post(
                    "/ticket", urllib.parse.urlencode({**form, "token": token}))
                self.assertEqual((status, list(answer)), (401, ["error"]))
                self.assertNotIn(hint, answer["error"])
                self.assertEqual(headers.get_content_type(), "application/json")
                self.assert_logged(f"WARNING .* 401 SLASH_TOKEN .*{hint}")
        del form["token"]
        self.assertEqual(self.post("/ticket", urllib.parse.urlencode(form))[0], 401)
        self.assertEqual(self.mattermost.calls, [])

    def test_a_command_without_its_fields_is_refused(self):
        form = self.mattermost.command_form(ALICE, HELPDESK, "")
        for field, value in (("user_id", "../x"), ("channel_id", ""), ("user_name", "a b\n"),
                             ("trigger_id", "")):
            with self.subTest(field):
                body = urllib.parse.urlencode({**form, field: value})
                self.assertEqual(self.post("/ticket", body)[0], 400)

    def test_the_bot_joins_a_public_channel_by_itself(self):
        self.assertEqual(self.mattermost.run_command(channel_id=QUIET), "")
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertIn(BOT, self.mattermost.channels[QUIET].members)
        self.assertEqual([root["channel_id"] for root in self.mattermost.roots()], [QUIET])

    def test_a_good_channel_is_looked_at_once(self):
        self.mattermost.run_command()
        self.mattermost.calls.clear()
        self.mattermost.run_command()
        self.assertEqual(self.mattermost.calls, ["POST /actions/dialogs/open"])

    def test_where_the_bot_can_t_post_it_says_so_before_the_form(self):
        for channel_id, obstacle in ((SECRET, "not a member"), (OTHERS, "not a member"),
                                     (DIRECT, "direct"), (ARCHIVED, "archived")):
            with self.subTest(self.mattermost.channels[channel_id].name):
                self.assert_given_back(self.mattermost.run_command(TYPED, channel_id=channel_id),
                                       cant_post(obstacle))
        self.mattermost.channels[DIRECT].members = {ALICE, BOT}  # nobody else would see a ticket
        self.assert_given_back(self.mattermost.run_command(TYPED, channel_id=DIRECT),
                               cant_post("direct"))
        self.assertEqual(self.mattermost.dialogs, [])

    def test_where_members_may_not_post_it_says_so_before_the_form(self):
        self.mattermost.permissions["channel_user"] = ["edit_post"]
        for channel_id in (HELPDESK, QUIET):
            self.assert_given_back(self.mattermost.run_command(TYPED, channel_id=channel_id),
                                   cant_post("read only"))
        self.assertEqual(self.mattermost.dialogs, [])
        self.mattermost.permissions["team_user"] = ["create_post"]
        self.assertEqual(self.mattermost.run_command(), "")
        self.mattermost.permissions["team_user"] = []
        self.mattermost.permissions["system_user"] = ["create_post_public"]
        self.assertEqual(self.mattermost.run_command(channel_id=QUIET), "")

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

    def test_after_the_invitation_it_works(self):
        self.mattermost.run_command(channel_id=SECRET)
        self.mattermost.channels[SECRET].members.add(BOT)
        self.assertEqual(self.mattermost.run_command(channel_id=SECRET), "")

    def test_a_bot_that_may_post_everywhere_needs_no_invitation(self):
        self.mattermost.roles = "system_user system_post_all"
        for channel_id in (SECRET, DIRECT):
            self.assertEqual(self.mattermost.run_command(channel_id=channel_id), "")
            self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertEqual([root["channel_id"] for root in self.mattermost.roots()],
                         [SECRET, DIRECT])
        self.assertEqual(self.mattermost.run_command(channel_id=QUIET), "")

    def test_a_bot_that_may_post_in_public_channels_needs_no_membership_there(self):
        self.mattermost.roles = "system_user system_post_all_public"
        self.mattermost.script("POST /channels/", fails(*NO_PERMISSION), fails(*NO_PERMISSION))
        self.assertEqual(self.mattermost.run_command(channel_id=QUIET), "")
        self.assertEqual(self.mattermost.run_command(channel_id=SECRET), cant_post("not a member"))

    def test_a_ticket_channel_that_is_no_good_is_told(self):
        self.mattermost.permissions["channel_user"] = []
        for channel_id, obstacle in (("x" * 26, "unknown"), (ARCHIVED, "archived"),
                                     (SECRET, "not a member"), (HELPDESK, "read only")):
            self.start_service(TICKET_CHANNEL=channel_id)
            self.assert_given_back(self.mattermost.run_command(TYPED),
                                   cant_post(obstacle, "ticket channel"))
            self.assert_logged(f"TICKET_CHANNEL: {re.escape(cant_post(obstacle, 'admin'))}$")

    def test_what_is_not_mattermost_is_not_taken_for_it(self):
        for path in ("/api/v4/x", "/x"):  # as its API answers, and as another program does
            self.start_service(MATTERMOST_URL=self.mattermost.url + path)
            self.mattermost.script("POST /x/api/v4/actions/", http_answer(404, b"<h1>Not found"))
            self.assert_given_back(self.mattermost.run_command(TYPED),
                                   ticket_service.IN_BETWEEN.format(status=404))
            self.assert_logged(r"127\.0\.0\.1:\d+ answered 404, but not as Mattermost")

    def test_a_bad_bot_token_is_told_although_a_dialog_could_be_opened(self):
        self.start_service(BOT_TOKEN="wrong")
        self.assert_given_back(self.mattermost.run_command(TYPED), ticket_service.BAD_TOKEN)
        self.assertEqual(self.mattermost.dialogs, [])

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

    def test_a_mattermost_that_is_down_gives_the_text_back(self):
        self.start_service(MATTERMOST_URL="http://127.0.0.1:9")
        self.assert_given_back(self.mattermost.run_command(TYPED), ticket_service.FORM_NOT_OPENED)
        self.assert_logged("WARNING .*no answer of 127.0.0.1:9: ConnectionRefusedError")

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
        self.limit(answer_within=0.04)
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
        for location, logged in (
                (f"{elsewhere.url}/login?next=typed#x", f"{elsewhere.url}/login: is MATTERMOST_U"),
                (f"https://me:typed@mm.test/chat{path}?typed=1",
                 f"https://mm.test/chat{path}, so MATTERMOST_URL may have to be "
                 "https://mm.test/chat$"),
                (path + "/", f"{self.mattermost.url}{path}/: is MATTERMOST_URL right"),
                (f"//mm.test:8443{path}",
                 f"http://mm.test:8443{path}, so MATTERMOST_URL may have to be "
                 "http://mm.test:8443$"),
                ("http://[", "but not as Mattermost does: is MATTERMOST_URL right"),
                *((to, "but not as Mattermost does: is MATTERMOST_URL right")
                  for to in ("", "?a=b", f"{self.mattermost.url}{path}", path)),
                (f"ftp://mm.test{path}", f"ftp://mm.test{path}: is MATTERMOST_URL right"),
                (f"http://mm.test/a b{path}", f"http://mm.test/a b{path}: is MATTERMOST_URL right"),
                ("https://mm.test/" + "x" * 9999, "but not as Mattermost does: it leads to")):
            with self.subTest(location[:50]):
                self.mattermost.script("POST /actions/", http_answer(
                    307, b"", f"Location: {location}\r\n".encode()))
                self.mattermost.run_command()
                self.assert_logged(f"307.*{re.escape(logged[:-1])}{logged[-1]}")
        self.assertLess(max(map(len, self.log.lines)), 600)
        self.assertEqual(elsewhere.calls, [])

    def test_where_a_redirect_of_a_hook_leads_is_not_logged(self):
        self.mattermost.script("POST /hooks/", http_answer(
            302, b"", b"Location: https://mm.test/hookhookhook\r\n"))
        self.file()
        self.assert_logged("response hook: .* answered 302")

    def test_a_bot_that_is_not_in_the_team_needs_more_than_an_invitation(self):
        self.mattermost.teams = []
        for channel_id in (OTHERS, SECRET):
            self.assert_given_back(self.mattermost.run_command(TYPED, channel_id=channel_id),
                                   cant_post("not in the team"))
        self.mattermost.script("GET /users/me/teams", fails(503))
        self.assert_given_back(self.mattermost.run_command(TYPED, channel_id=SECRET),
                               cant_post("not a member"))
        self.mattermost.teams = [{"id": TEAM, "name": "ops"}]
        self.mattermost.channels[SECRET].members.add(BOT)
        self.assertEqual(self.mattermost.run_command(channel_id=SECRET), "")
        self.mattermost.channels[SECRET].members.discard(BOT)
        self.mattermost.teams = []
        self.assertEqual(self.mattermost.submit_dialog(answers_to()),
                         {"error": cant_post("not in the team", "submission")})

    def default(self):
        """Return what stands in the first textarea of the dialog that was opened last."""
        _, _, dialog = self.mattermost.dialogs[-1]
        return next(element.get("default", "") for element in dialog["elements"]
                    if element["type"] == "textarea")

    def test_text_that_fits_into_the_form_stands_there_whole(self):
        for text in ("é" * 10_000, '"\n' * 4000 + "x", "\U0001f4be" * 10_000):
            with self.subTest(text[0]):
                self.assertEqual(self.mattermost.run_command(text), "")
                self.assertEqual(self.default(), text)

    def test_text_that_does_not_fit_into_the_form_is_given_back(self):
        wide = {"title": "T", "introduction_text": "i" * 280_000,
                "elements": [element("textarea", max_length=16_000)]}
        for form, text, least in ((ticket_service.FORM, "x" * 10_001, 10_000),
                                  (wide, '"' * 8000, 4900), (wide, "\U0001f4be" * 8000, 1200)):
            with self.subTest(text[0]):
                self.start_with_form(form)
                self.assertIn(f"```\n{text}\n```", self.mattermost.run_command(text))
                self.assertTrue(text.startswith(self.default()))
                self.assertGreaterEqual(len(self.default()), least)

    def test_text_that_is_given_back_stays_in_its_code_block(self):
        self.mattermost.script("POST /actions/", fails(500))
        text = "````\n<!channel> @all ```` ``"
        self.assertIn(f"\n`````\n{text}\n`````", self.mattermost.run_command(text))


class SubmissionTest(Case):
    """What goes wrong between the dialog and the ticket."""

    @classmethod
    def setUpClass(cls):
        """Begin what takes a second, for the test that is named here; it comes last."""
        case = cls("test_when_a_busy_mattermost_says_so_it_is_asked_again")
        case.setUp()

        def submit():
            began = time.monotonic()
            cls.answer = case.file()
            cls.seconds = time.monotonic() - began

        case.mattermost.script("POST /posts", fails(429, Retry_After="1"))
        cls.waiting = threading.Thread(target=submit)
        cls.waiting.start()
        cls.addClassCleanup(lambda: case.assertTrue(case.doCleanups()))
        cls.addClassCleanup(cls.waiting.join)

    def assert_refused(self, answer, sentence):
        self.assertEqual(list(answer), ["error"])
        self.assertEqual(answer["error"], sentence)

    def test_whatever_mattermost_answers_the_dialog_stays_open_and_a_second_press_works(self):
        self.mattermost.keeps = False
        self.limit(patience=0)
        for what, behave in ODD_ANSWERS.items():
            with self.subTest(what):
                before = len(self.mattermost.roots())
                self.mattermost.run_command()
                self.mattermost.script("POST /posts", behave)
                self.assert_refused(self.mattermost.submit_dialog(answers_to()), sentence_after(
                    what, ticket_service.NOT_REACHED))
                self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
                self.assertEqual(len(self.mattermost.roots()), before + 1)
                self.replies(before + 1)

    def test_who_refused_a_ticket_and_why_is_told(self):
        self.mattermost.run_command()
        waf = http_answer(403, b"<html>Forbidden: /etc/passwd")
        plugin = http_answer(400, json.dumps({
            "id": "Post rejected by plugin. No swearing", "status_code": 400,
            "message": "Post rejected by plugin. No\nswearing"}).encode())
        chatty = http_answer(400, json.dumps({"id": "x", "message": "no " * 500}).encode())
        for behave, sentence, logged in (
                (waf, ticket_service.IN_BETWEEN.format(status=403), "answered 403, but not as"),
                (http_answer(404, b""), ticket_service.IN_BETWEEN.format(status=404), "404, but"),
                (plugin, ticket_service.REJECTED.format(
                    reason="Post rejected by plugin. No swearing"), "400: Post rejected by plug"),
                (chatty, ticket_service.REJECTED.format(reason=("no " * 500)[:300]), "400 x: no"),
                (http_answer(400, b'{"id": "x", "message": 7}'), ticket_service.NOT_ACCEPTED,
                 "400 x")):
            with self.subTest(sentence):
                self.mattermost.script("POST /posts", behave)
                self.assert_refused(self.mattermost.submit_dialog(answers_to()), sentence)
                self.assert_logged(logged)
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})

    def start_behind_proxy(self, url, proxy):
        """Start a service that asks a proxy for a Mattermost at a URL."""
        scheme = url.partition(":")[0]
        ca_file = Path(self.enterContext(tempfile.TemporaryDirectory())) / "ca.pem"
        ca_file.write_text(CERTIFICATES)
        for name, value in ((f"{scheme}_proxy", proxy), ("no_proxy", "*.test")):
            os.environ[name] = value
            self.addCleanup(os.environ.pop, name, "")
        self.start_service(MATTERMOST_URL=url, SSL_CERT_FILE=str(ca_file))

    def test_a_proxy_that_was_asked_is_named(self):
        for url in ("http://mattermost.test", "https://mattermost.test"):
            self.start_behind_proxy(url, "http://me:secret@127.0.0.1:9")
            self.mattermost.run_command()
            self.assert_logged(
                r"mattermost\.test \(through the proxy 127\.0\.0\.1:9: is NO_PROXY meant\?\)")
        self.assertNotIn("secret", "".join(self.log.lines))

    def test_a_blank_proxy_is_none(self):
        self.start_behind_proxy(self.mattermost.url, " ")
        self.assertEqual(self.mattermost.run_command(), "")

    def test_a_proxy_that_refuses_is_told(self):
        for status, sentence in ((403, ticket_service.IN_BETWEEN.format(status=403)),
                                 (503, ticket_service.FORM_NOT_OPENED)):
            proxy = http.server.HTTPServer(("127.0.0.1", 0), type(
                "Refusing", (http.server.BaseHTTPRequestHandler,), {
                    "do_CONNECT": lambda self, status=status: self.send_error(status),
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

    def test_what_an_answer_means_is_what_it_may_have_done(self):
        self.mattermost.keeps = False
        self.limit(patience=0)
        page = b"<html>"
        for status, body, sentence, may_have_worked in (
                *[(status, page, ticket_service.NOT_REACHED, False) for status in (408, 429)],
                *[(status, page, ticket_service.NOT_REACHED, True)
                  for status in (500, 501, 502, 503, 504, 511, 520, 522, 530, 599)],
                (500, b'{"id": "", "message": "Internal Server Error"}',
                 ticket_service.NOT_REACHED, True),
                (500, b'{"id": "app.post.save.app_error"}', ticket_service.NOT_REACHED, True),
                *[(status, page, ticket_service.IN_BETWEEN.format(status=status), False)
                  for status in (301, 307, 400, 401, 403, 404, 418, 451)],
                (404, b'{"id": "api.context.404.app_error"}',
                 ticket_service.IN_BETWEEN.format(status=404), False),
                (400, b'{"id": "some.app_error"}', ticket_service.NOT_ACCEPTED, False),
                (401, b'{"id": "some.app_error"}', ticket_service.BAD_TOKEN, False),
                *[(status, page, ticket_service.IN_PLACE, True) for status in (200, 201)]):
            with self.subTest(status=status, body=body):
                self.mattermost.run_command()
                self.mattermost.script("POST /posts", http_answer(status, body))
                answer = self.mattermost.submit_dialog(answers_to())
                self.assert_refused(answer, sentence)
                self.mattermost.calls.clear()
                self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
                looks = f"GET /channels/{HELPDESK}/posts" in self.mattermost.calls
                self.assertEqual(looks, may_have_worked)
                self.replies(len(self.mattermost.roots()))

    def test_a_ticket_that_a_hardened_mattermost_is_still_making_is_waited_for(self):
        gate = self.gate()

        def opens_the_gate(handler, _):
            handler.reply(500, {"id": "", "message": "Internal Server Error"})
            gate.set()

        self.mattermost.run_command()
        self.limit(timeout=0.2)
        self.mattermost.script("POST /posts", waits(gate), opens_the_gate)
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies()
        self.assertEqual(len(self.mattermost.roots()), 1)

    def test_a_mattermost_that_comes_back_in_time_gets_the_ticket_at_the_first_press(self):
        pending = "api.post.deduplicate_create_post.pending"
        for what, behave in {"unavailable": fails(503), "no answer": hangs_up,
                             "busy": fails(429, Retry_After="0"), "at it": fails(500, pending),
                             "away": http_answer(522, b"<html>"), "idle": http_answer(408, b""),
                             "the answer is lost": loses_the_answer,
                             "the answer is cut": cuts_the_answer}.items():
            with self.subTest(what):
                before = len(self.mattermost.roots())
                self.mattermost.script("POST /posts", behave)
                self.assertEqual(self.file(), {})
                self.assertEqual(len(self.mattermost.roots()), before + 1)
                self.replies(before + 1)

    def test_when_a_busy_mattermost_says_so_it_is_asked_again(self):
        self.waiting.join()
        self.assertEqual(self.answer, {})
        self.assertGreaterEqual(self.seconds, 1)

    def test_whatever_retry_after_says_the_dialog_is_answered(self):
        for seconds in ("0", "-1", "9" * 400, "9" * 5000, "1e9", "nan", "inf", "\u0661",
                        "Fri, 31 Dec 1999 23:59:59 GMT", "", "soon"):
            with self.subTest(seconds[:40]):
                self.mattermost.run_command()
                self.mattermost.script("POST /posts", fails(429, Retry_After=seconds))
                answer = self.mattermost.submit_dialog(answers_to())
                if seconds.startswith("999"):
                    self.assert_refused(answer, ticket_service.NOT_REACHED)
                    continue
                self.assertEqual(answer, {})
                made = len(self.mattermost.roots())
                self.replies(made)

    def test_a_mattermost_that_is_down_is_told(self):
        self.limit(patience=0)
        self.mattermost.keeps = False
        self.mattermost.run_command()
        self.mattermost.server_close()
        self.assert_refused(self.mattermost.submit_dialog(answers_to()),
                            ticket_service.NOT_REACHED)
        self.assert_nothing_was_done()

    def assert_nothing_was_done(self):
        """Check that a call for which there is no connection is known to have done nothing."""
        with self.assertRaises(ticket_service.MattermostError) as failed:
            self.service.desk.mattermost.get_me()
        self.assertFalse(failed.exception.may_have_worked)

    def test_a_ticket_that_mattermost_made_before_it_went_down_is_found(self):
        def goes_down(handler, work):
            work()
            self.mattermost.shutdown()
            self.mattermost.server_close()
            handler.close_connection = True

        self.limit(patience=0)
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", goes_down)  # on a kept connection
        self.assert_refused(self.mattermost.submit_dialog(answers_to()),
                            ticket_service.NOT_REACHED)
        again = self.start_stand_in(port=self.mattermost.server_port)
        for name in ("service", "dialogs", "posts"):
            setattr(again, name, getattr(self.mattermost, name))
        self.mattermost = again
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertEqual(len(self.mattermost.roots()), 1)

    def test_a_ticket_whose_answer_was_lost_is_found_later(self):
        self.lose_the_ticket()
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies()
        [root] = self.mattermost.roots()
        self.assertIn(root["props"]["ticket_id"], self.mattermost.ephemeral[0][2])

    def test_a_ticket_whose_kept_connection_died_is_looked_for_before_it_is_made_again(self):
        def restarts(handler, work):
            loses_the_answer(handler, work)
            self.mattermost.pending.clear()

        self.mattermost.run_command()
        self.mattermost.script("POST /posts", restarts)
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertEqual(len(self.mattermost.roots()), 1)
        self.replies()

    def test_a_second_attempt_keeps_its_id(self):
        self.limit(patience=0)
        self.mattermost.keeps = False
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", hangs_up)
        self.mattermost.submit_dialog(answers_to())
        self.mattermost.submit_dialog(answers_to())
        ids = {body["props"]["ticket_id"] for body in self.mattermost.made("POST /posts")
               if not body["root_id"]}
        self.assertEqual(len(ids), 1)

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
        self.assertIn("typed at first, resource", root["message"])
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual(len(self.mattermost.replies()), 2)
        changed = self.mattermost.replies()[0]
        self.assertTrue(changed["message"].startswith(
            ticket_service.CHANGED.format(user_name="alice")))
        self.assertIn("typed then, resource", changed["message"])

    def test_a_ticket_is_made_after_a_restart_and_its_confirmation_falls_back(self):
        self.mattermost.run_command()
        self.start_service()
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies()
        self.assertEqual(len(self.mattermost.roots()), 1)
        self.assertEqual(self.mattermost.ephemeral, [])
        self.assert_logged("ticket=.* response hook: not known any more")
        self.assert_logged("WARNING ticket=.* user=alice.*403")

    def test_a_bot_that_left_the_team_before_a_restart_needs_more_than_an_invitation(self):
        self.mattermost.channels[SECRET].members.add(BOT)
        self.mattermost.run_command(channel_id=SECRET)
        self.mattermost.channels[SECRET].members.discard(BOT)
        self.mattermost.teams = []
        self.start_service()
        self.assert_refused(self.mattermost.submit_dialog(answers_to()),
                            cant_post("not in the team", "submission"))

    def test_a_privileged_bot_can_confirm_after_a_restart(self):
        self.mattermost.roles = "system_user system_admin"
        self.mattermost.run_command()
        self.start_service()
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.eventually(lambda: self.mattermost.ephemeral, "the confirmation")
        self.assertEqual(self.mattermost.ephemeral[0][:2], (ALICE, HELPDESK))

    def test_a_submission_that_is_repeated_after_a_restart_makes_no_second_ticket(self):
        self.file()
        self.replies()
        self.mattermost.pending.clear()
        self.start_service()
        in_threads(5, lambda _: self.assertEqual(self.mattermost.submit_dialog(answers_to()), {}))
        self.assertEqual(len(self.mattermost.posts), 2)

    def fill_channel(self, number, characters):
        """Let a channel have so many posts."""
        post = next(iter(self.mattermost.posts.values()))
        for index in range(number):
            post_id = f"{index:026}"
            self.mattermost.posts[post_id] = {
                **post, "id": post_id, "message": "a" * characters, "props": {}}

    def test_after_a_restart_a_ticket_is_looked_for_among_many_long_posts(self):
        lost = self.lose_the_ticket()
        self.fill_channel(100, 16_000)
        self.start_service()
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies()
        self.assertEqual(self.mattermost.replies()[0]["root_id"], lost["id"])

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
            self.assert_refused(
                self.mattermost.submit_dialog(answers_to()), ticket_service.NOT_KNOWN)
            self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
            self.assertEqual(len(self.mattermost.roots()), number)
            self.replies(number)

    def lose_the_ticket(self):
        """Submit a dialog whose ticket is made, but whose answer is lost for good."""
        self.limit(patience=0)
        self.mattermost.keeps = False
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", loses_the_answer)
        self.assert_refused(self.mattermost.submit_dialog(answers_to()),
                            ticket_service.NOT_REACHED)
        self.mattermost.pending.clear()
        return self.mattermost.roots()[0]

    def test_somebody_else_s_post_is_not_taken_for_the_ticket(self):
        self.lose_the_ticket()["user_id"] = ALICE
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertEqual([root["user_id"] for root in self.mattermost.roots()], [ALICE, BOT])

    def test_a_ticket_that_was_deleted_is_not_taken_for_the_one_to_come(self):
        self.lose_the_ticket()["delete_at"] = 1
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assertEqual(len(self.mattermost.roots()), 2)

    def test_a_mattermost_that_starts_anew_between_two_tries_has_one_ticket(self):
        def stores_and_dies(handler, work):
            work()
            self.mattermost.pending.clear()
            handler.close_connection = True

        for what, then in {"it is back": [], "not yet": [fails(502)],
                           "not for long": [fails(429, Retry_After="99")]}.items():
            with self.subTest(what):
                before = len(self.mattermost.roots())
                self.mattermost.keeps = False
                self.mattermost.run_command()
                self.mattermost.script("POST /posts", stores_and_dies)
                self.mattermost.script(f"GET /channels/{HELPDESK}/posts", *then)
                self.mattermost.submit_dialog(answers_to())
                self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
                self.assertEqual(len(self.mattermost.roots()), before + 1)

    def test_a_channel_that_is_gone_is_looked_at_again(self):
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", fails(404, "app.channel.get.existing.app_error"))
        self.mattermost.submit_dialog(answers_to())
        self.mattermost.calls.clear()
        self.mattermost.run_command()
        self.assertIn(f"GET /channels/{HELPDESK}", self.mattermost.calls)

    def test_a_copy_of_its_props_does_not_hide_the_ticket(self):
        lost = self.lose_the_ticket()
        for post_id in ("a" * 26, "z" * 26):
            self.mattermost.posts[post_id] = {**lost, "id": post_id, "user_id": BOB}
        self.mattermost.posts = dict(sorted(self.mattermost.posts.items()))
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies()
        self.assertEqual([root["id"] for root in self.mattermost.roots()
                          if root["user_id"] == BOT], [lost["id"]])
        self.assertEqual(self.mattermost.replies()[0]["root_id"], lost["id"])

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
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assert_logged("was not confirmed")
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual(len(self.mattermost.posts), before)

    def test_a_first_reply_that_is_on_its_way_is_not_made_again(self):
        self.mattermost.roles = "system_user system_post_all"  # which may not read there
        self.mattermost.run_command(channel_id=SECRET)
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies()
        self.mattermost.roots()[0]["reply_count"] = 0
        self.start_service()
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.service.shutdown()
        self.assertEqual(len(self.mattermost.posts), 2)

    def test_the_first_reply_is_made_once_even_if_its_answer_is_lost(self):
        self.mattermost.run_command()
        self.mattermost.script("POST /posts", closes, loses_the_answer)
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.assert_logged("ticket=.* post=")
        self.start_service()
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.service.shutdown()
        self.assertEqual(len(self.mattermost.replies()), 1)

    def test_nobody_who_reads_the_state_knows_the_pending_post_id(self):
        self.file()
        _, _, dialog = self.mattermost.dialogs[0]
        state = base64.urlsafe_b64decode(dialog["state"].partition(".")[0] + "==").decode()
        nonce = self.mattermost.roots()[0]["pending_post_id"]
        self.assertNotIn(nonce, state + dialog["state"])
        self.assertGreaterEqual(len(nonce), 22)

    def test_a_bot_that_was_removed_meanwhile_joins_again_or_asks_for_an_invitation(self):
        self.mattermost.channels[SECRET].members.add(BOT)
        for channel_id in (QUIET, SECRET):
            self.mattermost.run_command(channel_id=channel_id)
            self.mattermost.channels[channel_id].members.discard(BOT)
        self.assertEqual(self.mattermost.submit_dialog(answers_to(), 0), {})
        for _ in range(2):
            self.assert_refused(self.mattermost.submit_dialog(answers_to(), 1),
                                cant_post("not a member", "submission"))
        self.mattermost.channels[SECRET].members.add(BOT)
        self.assertEqual(self.mattermost.submit_dialog(answers_to(), 1), {})
        self.assertEqual([root["channel_id"] for root in self.mattermost.roots()], [QUIET, SECRET])

    def test_a_bot_that_may_not_post_any_more_says_so(self):
        self.mattermost.run_command()
        refused = "api.context.permissions.app_error"
        self.mattermost.script("POST /posts", fails(403, refused), fails(403, refused))
        self.assert_refused(self.mattermost.submit_dialog(answers_to()),
                            cant_post("read only", "submission"))

    def test_a_channel_that_was_archived_meanwhile_is_told(self):
        self.mattermost.run_command()
        self.mattermost.channels[HELPDESK].delete_at = 1
        self.assert_refused(self.mattermost.submit_dialog(answers_to()),
                            cant_post("archived", "submission"))
        self.assertEqual(self.mattermost.run_command(), cant_post("archived"))

    def test_what_mattermost_refuses_is_told(self):
        self.mattermost.run_command()
        for behave, sentence in (
                (fails(400, "model.post.is_valid.msg.app_error"), ticket_service.TOO_LONG_THERE),
                (fails(413, "api.context.request_body_too_large.app_error"),
                 ticket_service.TOO_LONG_THERE),
                (fails(401, "api.context.session_expired.app_error"), ticket_service.BAD_TOKEN)):
            with self.subTest(sentence):
                self.mattermost.script("POST /posts", behave)
                self.assert_refused(self.mattermost.submit_dialog(answers_to()), sentence)
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})

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
        ids, self.service.desk.tickets.ids = self.service.desk.tickets.ids, None
        self.assert_refused(self.mattermost.submit_dialog(answers_to()), ticket_service.OUR_FAULT)
        self.assert_logged("(?s)ERROR .*Traceback.*AttributeError")
        self.service.desk.tickets.ids = ids
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})

    def test_a_bug_while_a_request_is_read_does_not_close_the_dialog_either(self):
        self.mattermost.run_command()
        for inside in ("json_object", "token_fault"):
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
        self.assertEqual(self.mattermost.posts, {})
        nearly_a_day = changed("time", sent - 24 * 60 * 60 + 60)
        self.assertEqual(self.mattermost.submit_dialog(answers_to(), state=nearly_a_day), {})

    def test_a_new_bot_token_closes_no_dialog_and_a_new_slash_token_may_come_first(self):
        self.mattermost.run_command()
        self.mattermost.bot_token = "new" + BOT_TOKEN
        self.start_service(BOT_TOKEN="new" + BOT_TOKEN, SLASH_TOKEN=f"brandnew {SLASH_TOKEN}")
        self.assertEqual(self.mattermost.submit_dialog(answers_to()), {})
        self.replies()
        self.start_service(BOT_TOKEN="new" + BOT_TOKEN, SLASH_TOKEN="brandnew")
        self.assert_refused(self.mattermost.submit_dialog(answers_to()),
                            ticket_service.FORM_INVALID)

    def test_a_dialog_is_judged_by_the_form_that_was_opened(self):
        problem = {"type": "textarea", "name": "problem", "display_name": "Problem"}
        phone = {"type": "text", "name": "phone", "display_name": "Phone"}
        form = {"title": "T", "elements": [problem]}
        self.start_with_form(form)
        self.mattermost.run_command()
        for changed in ([problem, phone], [{**problem, "name": "text"}],
                        [{**problem, "optional": True}]):
            self.start_with_form({**form, "elements": changed})
            self.assert_refused(self.mattermost.submit_dialog({"problem": "typed"}),
                                ticket_service.FORM_INVALID)
        self.start_with_form({"elements": [dict(sorted(problem.items()))], "title": "T"})
        self.assertEqual(self.mattermost.submit_dialog({"problem": "typed"}), {})

    def test_a_body_that_is_no_submission_is_answered_without_a_ticket(self):
        for body in ("{}", '{"type": "dialog_submission"}', '{"submission": [1], "state": true}'):
            self.assertEqual(self.post("/ticket/submit", body)[:2],
                             (200, {"error": ticket_service.FORM_INVALID}))


# ------------------------------------------------------------------------------- the buttons

class ButtonTest(Case):
    """Take, close and reopen, in the thread itself."""

    def setUp(self):
        super().setUp()
        self.file()
        self.replies()
        [self.root] = self.mattermost.roots()
        self.message = self.root["message"]

    def press(self, status, user=BOB, **changes):
        """Let a person press the button that leads to a status; return what they see."""
        return self.mattermost.press(self.root["id"], STATUSES[status].button, user, **changes)

    def action(self, status):
        return self.mattermost.buttons(self.root["id"])[STATUSES[status].button]

    def context(self, status):
        return self.action(status)["integration"]["context"]

    def news(self):
        """Return what the thread was told since the ticket was made."""
        return [reply["message"] for reply in self.mattermost.replies()[1:]]

    def assert_status(self, status, user):
        """Check all that a ticket with a status shows."""
        line = STATUSES[status].line.format(user_name=USERS[user])
        self.assertEqual(self.root["message"], self.message.replace(OPEN.line, line))
        self.assertIn(STATUSES[status].tag, self.root["hashtags"].split())
        ticket = self.root["props"]["ticket"]
        self.assertEqual((ticket["status"], ticket["status_by"]), (status, USERS[user]))
        self.assertAlmostEqual(ticket["status_at"], time.time() * 1000, delta=60_000)
        self.assertEqual(ticket["answers"], answers_to())
        self.assertIs(self.root["props"]["is_ticket"], True)
        [attachment] = self.root["props"]["attachments"]
        self.assertEqual(attachment["color"], STATUSES[status].color)
        self.assertEqual([action["name"] for action in attachment["actions"]],
                         [STATUSES[next_one].button for next_one in STATUSES[status].leads_to])

    def assert_unchanged(self, seen, sentence):
        self.assertEqual(seen, sentence)
        self.assert_status("open", ALICE)
        self.assertEqual(self.news(), [])

    def test_every_button_of_every_status_leads_on(self):
        self.assert_status("open", ALICE)
        people, news, walked, chance = itertools.cycle((BOB, ALICE)), [], set(), random.Random(1)
        status = "open"
        while any((one, to) not in walked for one in STATUSES for to in STATUSES[one].leads_to):
            user = next(people)
            wanted = chance.choice(STATUSES[status].leads_to)
            walked.add((status, wanted))
            self.assertEqual(self.press(wanted, user), "")
            self.assert_status(wanted, user)
            news.append(STATUSES[wanted].reply.format(user_name=USERS[user]))
            self.eventually(lambda: self.news() == news, "the reply")
            self.assert_logged(f"INFO ticket=.* status={wanted} user={USERS[user]}")
            status = wanted

    def test_only_who_takes_a_ticket_is_mentioned(self):
        for status, texts in STATUSES.items():
            self.assertEqual("@" in texts.reply, status == "taken")

    def test_20_presses_at_once_make_one_change_and_one_reply(self):
        presses = [(status, user, self.action(status)) for user in (ALICE, BOB)
                   for status in OPEN.leads_to] * 5
        seen = []
        self.service.desk.presses.shown_within = 20
        self.mattermost.script("GET /posts/", *[slow(0.02)] * 5)

        def press(number):
            status, user, action = presses[number]
            seen.append((self.press(status, user, action=action), status, user))

        in_threads(20, press)
        self.eventually(self.news, "the reply")
        [(status, user)] = {(status, user) for text, status, user in seen if not text}
        already = STATUSES[status].already.format(user_name=USERS[user])
        self.assertEqual(sorted(text for text, *_ in seen), [""] + [already] * 19)
        self.assert_status(status, user)
        self.service.shutdown()
        self.assertEqual(self.news(), [STATUSES[status].reply.format(user_name=USERS[user])])

    def test_a_button_that_is_no_longer_true_changes_nothing(self):
        old = self.action("closed")
        self.press("taken")
        self.start_service()  # which remembers nothing: the post says so
        seen = self.press("closed", ALICE, action=old)
        self.assertEqual(seen, STATUSES["taken"].already.format(user_name="bob"))
        self.assert_status("taken", BOB)
        self.press("closed")
        self.eventually(lambda: len(self.news()) == 2, "the reply")
        self.press("open")
        self.eventually(lambda: len(self.news()) == 3, "the reply")
        seen = self.press("closed", ALICE, action=old)
        self.assertEqual(seen, OPEN.already.format(user_name="bob"))
        self.assert_status("open", BOB)

    def test_who_has_a_ticket_does_not_take_it_again_but_somebody_else_may(self):
        self.press("taken")
        self.eventually(self.news, "the reply")
        self.assertEqual(self.press("taken"), STATUSES["taken"].already.format(user_name="bob"))
        self.assertEqual(len(self.news()), 1)
        self.assertEqual(self.press("taken", ALICE), "")
        self.assert_status("taken", ALICE)

    def test_the_thread_is_told_only_what_has_happened(self):
        update, self.mattermost.update_post = self.mattermost.update_post, lambda *_: None
        self.service.desk.presses.shown_within = 0.1
        self.assertEqual(self.press("closed"), "")
        self.assertEqual(self.press("closed", ALICE),
                         STATUSES["closed"].already.format(user_name="bob"))
        self.assert_logged("WARNING ticket=.* was not seen to become closed by user=bob")
        self.assertEqual(self.news(), [])
        self.mattermost.update_post = update
        self.assertEqual(self.press("closed", ALICE), "")
        self.assert_status("closed", ALICE)
        self.eventually(self.news, "the reply")
        self.assertEqual(self.news(), [STATUSES["closed"].reply.format(user_name="alice")])

    def test_a_change_that_mattermost_makes_late_is_waited_for(self):
        update = self.mattermost.update_post
        self.service.desk.presses.shown_within = 5
        self.mattermost.script("GET /posts/", slow(0), hangs_up, *[fails(503)] * 2)

        def later(*details):
            timer = threading.Timer(0.05, update, details)
            self.addCleanup(timer.join)
            timer.start()

        self.mattermost.update_post = later
        self.press("closed")
        self.assertEqual(self.news(), [])
        self.eventually(self.news, "the reply")
        self.assert_status("closed", BOB)

    def test_what_an_admin_edited_stays(self):
        line = STATUSES["closed"].line.format(user_name="bob")
        for edited, expected in (
                (f"**Status:** #typed\nedited\n{OPEN.line} by hand\nbelow",
                 f"**Status:** #typed\nedited\n{line}\nbelow"),
                ("all is gone", f"all is gone\n{line}"),
                (f"but\nsee {OPEN.tag}.log", f"but\n{line}\nsee {OPEN.tag}.log"),
                *[(f"first\n{by_hand}\nlast", f"first\n{line}\nlast") for by_hand in (
                    f"> {OPEN.line}", f"Status: {OPEN.tag}", f"- **{OPEN.tag.title()}** (again)")],
                ("first\n\\1 is typed", f"first\n{line}\n\\1 is typed")):
            with self.subTest(edited):
                self.root["message"] = edited
                self.assertEqual(self.press("closed"), "")
                self.assertEqual(self.root["message"], expected)
                self.eventually(lambda: len(self.news()) % 2, "the reply")
                self.assertEqual(self.press("open"), "")
                self.eventually(lambda: not len(self.news()) % 2, "the reply")

    def test_the_buttons_outlive_a_new_bot_token_and_a_second_slash_token(self):
        self.mattermost.bot_token = "new" + BOT_TOKEN
        self.start_service(BOT_TOKEN="new" + BOT_TOKEN, SLASH_TOKEN=f"brandnew {SLASH_TOKEN}")
        self.assertEqual(self.press("closed"), "")
        self.assert_status("closed", BOB)
        self.eventually(self.news, "the reply")
        self.start_service(BOT_TOKEN="new" + BOT_TOKEN, SLASH_TOKEN="brandnew")
        self.assertEqual(self.press("open"), "")

    def test_a_button_that_is_not_ours_changes_nothing(self):
        _, _, dialog = self.mattermost.dialogs[0]
        good = self.context("closed")["signed"]
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
                "an odd person": {"user_name": "bob\n@all"}}.items():
            with self.subTest(what):
                self.assert_unchanged(self.press("closed", **changes),
                                      ticket_service.NOT_OUR_BUTTON)
        state = self.mattermost.submit_dialog(answers_to(), state=good)
        self.assertEqual(state, {"error": ticket_service.FORM_INVALID})

    def test_a_post_that_is_not_the_bot_s_or_is_odd_is_not_changed(self):
        good = json.dumps(self.root)
        for what, changes in {
                "somebody else's": {"user_id": ALICE}, "another ticket": {"ticket_id": "x"},
                "no props": {"props": None}, "a list": {"ticket": []},
                "an unknown status": {"status": "lost"}, "a list as status": {"status": []},
                "nobody": {"status_by": None}, "two lines": {"status_by": "bob\n@all"},
                "no time": {"status_at": "now"}, "no message": {"message": None},
                "no channel": {"channel_id": "../x"}}.items():
            with self.subTest(what):
                post = json.loads(good)
                for part in (post, post["props"], post["props"]["ticket"]):
                    part.update({key: value for key, value in changes.items() if key in part})
                self.mattermost.script("GET /posts/", http_answer(200, json.dumps(post).encode()))
                self.assert_unchanged(self.press("closed"), ticket_service.NOT_OUR_BUTTON)

    def test_a_ticket_that_can_t_be_read_stays_as_it_is(self):
        self.mattermost.keeps = False
        self.start_service()
        for what, behave in ODD_ANSWERS.items():
            with self.subTest(what):
                self.mattermost.script("GET /posts/", behave)
                self.assert_unchanged(self.press("closed"), sentence_after(
                    what, ticket_service.PRESS_AGAIN))
        self.mattermost.script("GET /posts/", http_answer(451, b'{"id": "some.app_error"}'))
        self.assert_unchanged(self.press("closed"), ticket_service.NOT_READ)
        self.mattermost.script("GET /users/me", fails(503))
        self.assert_unchanged(self.press("closed"), ticket_service.PRESS_AGAIN)
        self.mattermost.channels[HELPDESK].members.discard(BOT)
        self.assert_unchanged(self.press("closed"), ticket_service.NOT_READABLE)

    def test_a_press_that_has_read_the_post_before_it_changed_is_too_late(self):
        gate, presses, seen = self.gate(), self.service.desk.presses, []
        presses.first_look, presses.shown_within = 0.1, 20
        before, close = json.dumps(self.root).encode(), self.action("closed")
        self.assertEqual(self.press("taken"), "")
        self.mattermost.script("GET /posts/", http_answer(200, before))
        self.mattermost.script("GET /users/me", waits(gate))
        second = threading.Thread(
            target=lambda: seen.append(self.press("closed", ALICE, action=close)))
        second.start()
        self.eventually(lambda: self.mattermost.calls.count(f"GET /posts/{self.root['id']}") == 3,
                        "the second press has read the old post, and we the new one")
        gate.set()
        second.join()
        self.assertEqual(seen, [STATUSES["taken"].already.format(user_name="bob")])
        self.assert_status("taken", BOB)

    def test_a_failed_reply_does_not_undo_the_change(self):
        self.limit(patience=0)
        self.mattermost.script("POST /posts", fails(500))
        self.assertEqual(self.press("closed"), "")
        self.assert_logged("WARNING ticket=.*: the thread was not told")
        self.assert_status("closed", BOB)


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

    def test_who_has_sent_the_body_is_not_told_to_continue(self):
        self.assert_answer(self.exchange(post(
            headers=length(FORM) + b"Expect: 100-continue\r\n")), 200)

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
                          (post(headers=b""), "POST '/ticket' 411 "), (b"NO\n", "no HTTP 400 ")):
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

    def test_a_half_closed_connection_is_answered(self):
        connection = self.connect()
        connection.sendall(get())
        connection.shutdown(socket.SHUT_WR)
        self.assert_answer(self.read_all(connection), 200)

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
        starts = (b"", b"GET /", get()[:-2] + b"X: ",
                  post(b"", headers=b"Content-Length: 999\r\n"))

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
        self.let_memory_be_small()
        silent, *half = [self.connect() for _ in range(4)]
        for connection in half:
            connection.sendall(post(FORM + b"&x=" + b"a" * 120_000)[:-1])
            self.assert_answer(self.exchange(get()), 200)  # so it has been read
        self.assertEqual(self.read_all(half[0]), b"")
        for connection in half[1:]:
            connection.sendall(b"a")
            self.assert_answer(self.read_all(connection), 200)
        silent.sendall(get())
        self.assert_answer(self.read_all(silent), 200)

    def let_memory_be_small(self):
        limit, ticket_service.BYTES_LIMIT = ticket_service.BYTES_LIMIT, 300_000
        self.addCleanup(setattr, ticket_service, "BYTES_LIMIT", limit)

    def test_when_whole_requests_take_too_much_memory_the_oldest_is_answered_at_once(self):
        gate = self.gate()
        self.start_service(threads=1)
        self.let_memory_be_small()
        self.mattermost.script("POST /actions/", waits(gate))
        first, *waiting = [self.connect() for _ in range(4)]
        first.sendall(post(FORM + b"&x=" + b"a" * 120_000))
        self.eventually(lambda: self.mattermost.made("POST /actions/"), "the call")
        for connection in waiting:
            connection.sendall(post(FORM + b"&x=" + b"a" * 120_000))
            for _ in range(4):  # until all of it has been read, 64 KiB at a time
                self.health()
        self.eventually(lambda: any(map(is_readable, waiting)), "answering early")
        [connection] = filter(is_readable, waiting)
        self.assertEqual(
            self.assert_answer(self.read_all(connection), 200)["text"],
            ticket_service.given_back(ticket_service.FORM_NOT_OPENED, "typed")["text"])
        gate.set()
        self.eventually(lambda: len(self.mattermost.made("POST /actions/")) == 3, "the others")

    def test_when_too_many_requests_wait_the_oldest_is_answered_at_once(self):
        gate = self.gate()
        self.start_service(files=30, threads=1)  # so ten connections
        self.mattermost.script("POST /actions/", waits(gate))
        self.connect().sendall(post())
        self.eventually(lambda: self.mattermost.made("POST /actions/"), "the call")
        waiting = [self.connect() for _ in range(11)]
        for connection in waiting:
            connection.sendall(post())
        self.eventually(lambda: sum(map(is_readable, waiting)) == 2, "answering early")
        for connection in filter(is_readable, waiting):
            self.assertIn(ticket_service.FORM_NOT_OPENED,
                          self.assert_answer(self.read_all(connection), 200)["text"])

    def test_a_health_check_is_answered_even_if_all_threads_wait_for_mattermost(self):
        gate = self.gate()
        self.start_service(threads=1)
        self.mattermost.script("POST /actions/", waits(gate))
        waiting = threading.Thread(target=self.mattermost.run_command)
        waiting.start()
        self.eventually(lambda: self.mattermost.made("POST /actions/dialogs/open"), "the call")
        for raw in (get(), get(b"HEAD /health?x HTTP/1.1"), get(b"GET /health HTTP/1.0", b"")):
            self.assertIn(b"HTTP/1.1 200 OK", self.exchange(raw))
        self.assertTrue(waiting.is_alive())
        gate.set()
        waiting.join()

    def test_no_health_check_can_block_the_server(self):
        half = [self.connect() for _ in range(3)]
        half[0].sendall(get()[:-2])
        half[1].sendall(get(headers=HOST + b"content-Length: 5\r\n") + b"1234")
        half[2].sendall(get(headers=HOST + b"Transfer-Encoding: chunked\r\n") + b"5\r\n")
        self.assert_answer(self.exchange(get()), 200)
        self.assert_answer(self.read_all(half[2]), 501)
        half[0].sendall(b"\r\n")
        half[1].sendall(b"5")
        for connection in half[:2]:
            self.assert_answer(self.read_all(connection), 200)

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

    def press(self, user=BOB):
        return self.mattermost.press(self.root["id"], STATUSES["taken"].button, user)

    def confirmations(self):
        return sum(bool(re.fullmatch(pattern(ticket_service.CONFIRMATION), text))
                   for *_, text in self.mattermost.ephemeral)

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
                self.assertEqual(self.press((ALICE, BOB)[number % 2]), "")
                self.eventually(lambda: self.confirmations() == number, "the confirmation")
                self.replies(2 * number - 1)
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual((len(self.mattermost.roots()), len(self.mattermost.replies())), (4, 7))

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
        gate = self.gate()
        self.start_service(threads=1)
        self.mattermost.run_command()
        self.mattermost.script("POST /actions/", waits(gate))
        first = threading.Thread(target=self.mattermost.run_command)
        first.start()
        self.eventually(lambda: len(self.mattermost.made("POST /actions/")) == 3, "the call")
        self.limit(answer_within=0.04)
        called = list(self.mattermost.calls)
        self.assertEqual(self.ask(), self.late)
        gate.set()
        first.join()
        self.service.shutdown()
        self.assertEqual(self.mattermost.calls, called)

    def test_a_late_answer_reads_no_more_than_it_gives_back(self):
        gate = self.gate()
        self.start_service(threads=1)
        self.mattermost.failure = ("", waits(gate))
        self.limit(answer_within=0.03)
        for request in (post(), post(b"[", path=b"/ticket/submit"),
                        post(b"[", path=b"/ticket/action")):
            self.assert_answer(self.exchange(request), 200)

    def test_a_press_whose_answer_did_not_go_out_is_forgotten(self):
        gate = self.gate()
        self.mattermost.script("GET /posts/", waits(gate))
        action = self.mattermost.buttons(self.root["id"])[STATUSES["taken"].button]
        body = json.dumps({"user_name": "bob", "post_id": self.root["id"],
                           "context": action["integration"]["context"]}).encode()
        with socket.create_connection(self.mattermost.service) as client:
            client.sendall(post(body, path=b"/ticket/action"))
            self.eventually(lambda: self.mattermost.made("GET /posts/"), "the call")
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        gate.set()
        self.assert_logged("POST '/ticket/action' 200")
        self.assertEqual(self.press(ALICE), "")

    def test_a_late_answer_lets_go_of_the_request(self):
        gate = self.gate()
        self.start_service(threads=3)
        self.mattermost.failure = ("", waits(gate))
        self.limit(answer_within=0.03)
        in_threads(60, lambda _: self.assert_answer(self.exchange(post(FORM + b"x" * 9999)), 200))
        alive = [one for one in gc.get_objects() if isinstance(one, ticket_service.Request)]
        self.assertLess(len(alive), 20)  # three of them are still worked on
        self.assertLess(sum(len(one.received) for one in alive), 9999)

    def test_more_people_than_threads_are_served_one_after_the_other(self):
        self.start_service(threads=2)
        for _ in range(6):
            self.mattermost.run_command()
        self.mattermost.script("POST /posts", *[slow(0.02)] * 6)
        in_threads(6, lambda number: self.assertEqual(
            self.mattermost.submit_dialog(answers_to(), -1 - number), {}))

    def test_who_was_told_that_nothing_was_changed_is_told_the_truth(self):
        chance, told = random.Random(3), collections.Counter()
        for number in range(16):
            self.limit(answer_within=chance.uniform(0, 0.02))
            self.mattermost.script("GET /posts/", slow(0.01))
            before = self.root["props"]["ticket"]["status_at"]
            seen = self.press((ALICE, BOB)[number % 2])
            changed = self.root["props"]["ticket"]["status_at"] > before
            self.assertEqual(seen, "" if changed else ticket_service.PRESS_AGAIN)
            told[seen] += 1
            if not changed:
                self.limit()
                self.assertEqual(self.press((ALICE, BOB)[number % 2]), "")
        self.assertEqual(len(told), 2, told)
        self.service.shutdown()
        self.assertEqual(len(self.mattermost.replies()), 17)

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
        asking.start()
        self.eventually(lambda: [len(self.mattermost.made(call)) for call in (
            "POST /actions/", "POST /posts", "GET /posts/")] == [3, 3, 1], "the calls")
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
        self.desk = self.service.desk

    def call(self):
        return self.desk.mattermost.get_me()["username"]

    def test_one_connection_serves_one_call_after_the_other(self):
        for _ in range(5):
            self.assertEqual(self.call(), "ticket-bot")
        self.assertEqual(self.mattermost.connections, 1)

    def test_an_answer_that_closes_is_the_last_on_its_connection(self):
        self.mattermost.script("GET /users/me", closes)
        self.call()
        self.call()
        self.assertEqual(self.mattermost.connections, 2)

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

    def test_a_connection_that_was_idle_for_long_is_not_used(self):
        self.call()
        self.desk.mattermost.connections.longest = 0
        self.call()
        self.assertEqual(self.mattermost.connections, 2)

    def test_only_some_connections_are_kept(self):
        self.desk.mattermost.connections.most = 2
        self.call_at_once(5)
        self.eventually(lambda: len(self.mattermost.open) == 2, "closing three of five")

    def test_a_restart_of_mattermost_goes_unnoticed(self):
        port = self.mattermost.server_port
        self.assertEqual(self.file(), {})
        self.replies()
        self.mattermost.shutdown()
        self.mattermost.server_close()
        self.mattermost.hang_up()
        again = self.start_stand_in(port=port, tls=self.mattermost.tls)
        again.service, self.mattermost = self.mattermost.service, again
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
        other = self.start_service(SSL_CERT_FILE="")
        with self.assertRaisesRegex(ticket_service.MattermostError, "CERTIFICATE_VERIFY") as failed:
            other.desk.mattermost.get_me()
        self.assertFalse(failed.exception.may_pass)  # "again in a moment" would not be true
        self.assertEqual(self.mattermost.run_command(), ticket_service.NOT_SECURE)
        self.assertEqual(self.mattermost.calls, [])


# ------------------------------------------------------------------------------------ the form

def element(kind="text", name="x", **details):
    return {"display_name": "X", "name": name, "type": kind, **details}


OPTIONS = [{"text": "One", "value": "1", "mention": "@first"}, {"text": "T`wo", "value": "2"}]
EVERY_TYPE = {"title": "All", "elements": [
    element("text", "text", min_length=2, max_length=5), element("textarea", "area", optional=True),
    element("textarea", "code", code=True), element("text", "number", subtype="number"),
    element("text", "email", subtype="email"), element("text", "url", subtype="url"),
    element("text", "tel", subtype="tel", optional=True),
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
    ([element(["text"])], "type must be a text"),
    ([{"type": "text", "name": "x"}], "element x: display_name is missing"),
    ([{"type": "text", "display_name": "X"}], "element 1: name is missing"),
    ([element(), element()], "element x: another one has the same name"),
    ([element(display_name=" \u200b")], "display_name is blank"),
    ([element(display_name="")], "display_name is missing"),
    ([element(optional="true")], "optional must be true or false"),
    ([element(default=7)], "default must be a text"),
    ([element(max_length="9")], "max_length must be a whole number"),
    ([element(max_length=9.5)], "max_length must be a whole number"),
    ([element(min_length=True)], "min_length must be a whole number"),
    ([element(min_length=9, max_length=8)], "min_length must not be more than max"),
    ([element(min_length=-1)], "min_length must be from 1 to"),
    ([element(min_length=151)], "min_length"), ([element(min_length=2**31)], "min_length"),
    ([element(subtype="password")], "subtype must be one of text, email"),
    ([element(subtype="number", default="x")], "default 'x': "),
    ([element("bool", default="True")], 'default must be "true" or "false"'),
    ([element("select")], "options is missing"), ([element("radio", options=[])], "options is mis"),
    ([element("select", options={"a": 1})], "options must be a list"),
    ([element("select", options=["One"])], "option 1: must be a JSON object"),
    ([element("select", options=[{"text": "One"}])], "option 1: value is missing"),
    ([element("select", options=[{"text": "", "value": "1"}])], "option 1: text is missing"),
    ([element("select", options=OPTIONS, default="One")], "default 'One': "),
    ([element("select", options=[{"text": "A", "value": " "}])], "value is blank"),
    ([element("select", options=[{"text": "A", "value": "a"}, {"text": "B",
      "value": "a "}])], "option 2: another one has the same"),
    ([element("select", options=OPTIONS * 2)], "option 3: another one has the same"),
    ([element("select", options=OPTIONS, multiselect=True, default="1,3")], "default '1,3': "),
    ([element("select", options=OPTIONS, multiselect="true")], "multiselect must be true or false"),
    ([element("radio", options=OPTIONS, multiselect=True)], "multiselect is not supported: only a"),
    ([element("text", multiselect=True)], "multiselect is not supported: only a select has it"),
    ([element("select", options=[{**OPTIONS[0], "mention": "first"}])],
     "option 1: mention must look like @team-or"),
    ([element("select", options=[{**OPTIONS[0], "mentoin": "@a"}])], "mentoin"),
    ([element("select", options=OPTIONS, data_source="users")],
     "options is not supported: only a select without data_source"),
    ([element("select", data_source="people")], "data_source 'people' is not supported: only us"),
    ([element("select", data_source=["users"])], "data_source"),
    ([element("select", data_source="dynamic", data_source_url="http://x")],
     "data_source 'dynamic' is not supported: let people choose from options, users or channels"),
    ([element("select", options=OPTIONS, refresh=True)],
     "refresh is not supported: show all elements from the beginning"),
    ([element("text", data_source_url="http://x")], "data_source_url is not supported: let people"),
    ([element("select", data_source="users", default="../x")], "default '../x': "),
    ([element("date", default="soon")], "default 'soon': Please choose a date, such as 2026"),
    ([element("date", default="2026-02-30")], "default '2026-02-30': "),
    ([element("date", min_date="2026-13-01")], "'2026-13-01' is no date"),
    ([element("datetime", max_date="+3y")], "'+3y' is no date"),
    ([element("datetime", default="2026-11-27T25:00:00Z")], "default '2026-11-27T25:00:00Z': Plea"),
    ([element("datetime", time_interval="30")], "time_interval must be a whole number"),
    ([element("datetime", datetime_config={"time_zone": "x"})],
     "datetime_config: time_zone is not one of"),
    ([element("datetime", datetime_config={"min_date": "x"})], "'x' is no date"),
    ([element(placehoder="x")], "element x: placehoder is not one of"),
    ([element(code=True)], "code is not one of"),
    ([element("textarea", code="yes")], "code must be true or false"),
)
GOOD_FORM = {"title": "T", "elements": [element()]}
BAD_FORMS: tuple = (
    (None, "JSON object"), ([], "JSON object"), ("x", "JSON object"),
    ({"title": "T"}, "elements is missing"),
    ({"elements": [element()]}, "title is missing"),
    ({**GOOD_FORM, "title": "  "}, "title is blank"),
    ({**GOOD_FORM, "title": 7}, "title must be a text"),
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
    def message(self, number=-1):
        """Return the message of a ticket, without its ID and status."""
        return self.mattermost.roots()[number]["message"].split("\n", 2)[2]


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
**X:** `42`
**X:** `a@b`
**X:** `http://x`
**X:** `` +49 `1` ``
**X:** `One` @first
**X:** ``T`wo``
**X:** `{ticket_service.YES}`
**X:** `{ticket_service.NO}`""")
        self.assertEqual(self.mattermost.roots()[0]["props"]["ticket"]["answers"],
                         {**answers, "number": "42"})

    def test_the_built_in_form_is_a_good_one(self):
        self.start_service()
        self.mattermost.run_command()
        _, _, dialog = self.mattermost.dialogs[0]
        for element in dialog["elements"]:
            if "options" in element:  # without one, it is an empty box in Mattermost's clients
                self.assertTrue(element["placeholder"])
        answers = answers_to()
        for element in dialog["elements"]:
            if element.get("max_length", 0) > 3000:  # where Mattermost's clients cut by default
                answers[element["name"]] = "\n".join(["\tat com.example.Stack#trace"] * 259)
        self.assertEqual(self.mattermost.submit_dialog(answers), {})
        [root] = self.mattermost.roots()
        self.assertGreater(len(root["message"]), 7000)
        for status in ("taken", "closed"):
            self.assertEqual(self.mattermost.press(root["id"], STATUSES[status].button), "")
            self.assertIn(STATUSES[status].tag, root["hashtags"])
            self.eventually(lambda: root["props"]["ticket"]["status"] == status)

    def test_numbers_and_booleans_may_arrive_as_texts_and_blanks_as_anything(self):
        for empty in ("", None, " \n", "\x07\u202e"):
            with self.subTest(empty):
                answers = {**GOOD, "number": "4.5", "must": "true", "area": empty, "tel": empty,
                           "unknown": "key"}
                self.assertEqual(self.file(answers), {})
                self.assertEqual(self.message().count("\n"), 12)

    def test_an_answer_that_breaks_a_rule_is_told_at_its_field(self):
        self.mattermost.run_command()
        required, tick = ticket_service.REQUIRED, ticket_service.NOT_TICKED
        option, number = ticket_service.NOT_AN_OPTION, ticket_service.NOT_A_NUMBER
        for name, value, sentence in (
                ("text", None, required), ("text", "   ", required),
                ("text", "a", ticket_service.TOO_SHORT.format(limit=2)),
                ("text", "abcdef", ticket_service.TOO_LONG.format(limit=5, excess=1)),
                ("text", ["a"], ticket_service.NOT_TEXT), ("text", {}, ticket_service.NOT_TEXT),
                ("area", "x" * 3001, ticket_service.TOO_LONG.format(limit=3000, excess=1)),
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
        area = next(one for one in self.service.desk.form.elements if one.name == "area")
        chance = random.Random(20261126)
        for _ in range(3000):
            some = chance.sample(pieces, 9)
            typed = ticket_service.clean("".join(chance.choice(some) for _ in range(30)))
            with self.subTest(typed):
                shown = area.markdown(typed, {}).removeprefix(f"{area.label}\n")
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
                self.assertIn(f"\n**X:**\n{fence}\n{typed}\n{fence}\n**X:** `42`\n",
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
        self.start_with_form({"title": "Long", "elements": [
            element("textarea", name, max_length=10_000) for name in "abcde"]})
        answer = self.file(dict.fromkeys("abcde", "<" * 10_000))  # six bytes each, from Mattermost
        self.assertRegex(answer["error"], pattern(ticket_service.TICKET_TOO_LONG))

    def test_a_very_long_text_is_looked_through_in_no_time(self):
        area = next(one for one in self.service.desk.form.elements if one.name == "area")
        pieces = ("`", "```\n", "[", "![", "](", "]:", " ", "\n", "[\n", "\\]", "@all")
        began = time.process_time()
        for piece, other in itertools.product(pieces, repeat=2):
            area.markdown(ticket_service.clean((piece * 4000 + other * 4000)[:16_000]), {})
        self.assertLess(time.process_time() - began, 5)  # 121 texts, of 3 ms on an idle machine

    def test_a_ticket_that_is_too_long_is_told_by_how_much(self):
        self.start_with_form({"title": "Long",
                              "elements": [element("textarea", max_length=20_000)]})
        self.mattermost.run_command()
        for extra in (1000, 1):
            answer = self.mattermost.submit_dialog({"x": "\U0001f4be" * (16_500 + extra)})
            self.assertRegex(answer["error"], pattern(ticket_service.TICKET_TOO_LONG))
        excess = int(re.search(r"\d+", answer["error"])[0])
        self.assertEqual(self.mattermost.submit_dialog({"x": "\U0001f4be" * (16_502 - excess)}),
                         {"error": ticket_service.TICKET_TOO_LONG.format(excess=1)})
        self.assertEqual(self.mattermost.submit_dialog({"x": "\U0001f4be" * (16_501 - excess)}), {})
        [root] = self.mattermost.roots()
        self.assertGreater(len(root["message"]), 16_200)
        for status in STATUSES:  # whoever presses: 64 characters are the longest name
            message = ticket_service.with_status(root["message"], status, "x" * 64)
            self.assertLessEqual(len(message), 16_383)

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
                self.assertIn(complaint,
                              self.problems_of({"title": "T", "elements": elements})[0])
        for form, complaint in BAD_FORMS:
            with self.subTest(complaint):
                [line] = self.problems_of(form)
                self.assertIn(complaint, line)

    def test_all_faults_of_a_form_are_named_and_its_size_is_one(self):
        two = self.problems_of({"title": "T", "elements": [element("users", name="")]})
        self.assertRegex("\n".join(two), "name is missing.*\n.*type 'users'")
        many = [{"text": f"vm-{number:05}.example.com", "value": f"{number}"}
                for number in range(7000)]
        [problem] = self.problems_of({"title": "T", "elements": [element("select", options=many)]})
        self.assertIn("at most 290000 bytes", problem)

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

    def test_what_mattermost_takes_is_taken(self):
        label = "Опишите, пожалуйста, проблему"
        elements = [element(kind, kind, display_name=label, help_text="п" * 195, **more)
                    for kind, more in (
                        ("text", {"default": "д" * 200, "placeholder": "p" * 151}),
                        ("textarea", {"placeholder": "п" * 3001, "default": "п" * 8000}),
                        ("select", {"options": [{"text": "т" * 3001, "value": "v"}]}))]
        elements.append(element(name="begun", default="INC-", min_length=8, optional=True))
        self.start_with_form({"title": "Создать заявку в отдел поддержки", "elements": elements})
        self.assertEqual(self.mattermost.run_command(), "")
        _, _, dialog = self.mattermost.dialogs[-1]
        self.assertEqual(dialog["elements"], elements)
        answers = {"text": "д" * 200, "textarea": "п" * 8000, "select": "v"}
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
        self.assertEqual([len(one) for one in dialog["elements"]], [4, 4, 3])
        self.start_with_form({"title": "T", "elements": elements})  # is the same form
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

    def assert_answered(self, form, answers, lines, kept=None):
        """Check what a ticket shows of answers, and keeps of them."""
        self.start_with_form(form)
        self.assertEqual(self.file(answers), {})
        self.assertEqual(self.message(), lines)
        ticket = self.mattermost.roots()[-1]["props"]["ticket"]
        self.assertEqual(ticket["answers"], kept or answers)
        return ticket

    def test_people_and_channels_are_shown_by_their_names(self):
        ticket = self.assert_answered(
            PEOPLE, {"who": BOB, "where": QUIET, "all": [BOT, BOB]},
            "**Who:** @bob\n**Where:** ~quiet\n**All:** @ticket-bot, @bob")
        self.assertEqual(self.mattermost.calls.count(f"GET /users/{BOB}"), 1)
        self.assertEqual(ticket["names"], {BOB: "bob", QUIET: "quiet", BOT: "ticket-bot"})
        self.assertEqual(self.mattermost.calls.count(f"GET /users/{BOT}"), 1)
        look_up = f"GET /channels/{HELPDESK}"
        before = self.mattermost.calls.count(look_up)
        self.assert_answered(PEOPLE, {"who": BOB, "where": HELPDESK},
                             "**Who:** @bob\n**Where:** ~helpdesk")
        # Once after /ticket, and once for the answer.
        self.assertEqual(self.mattermost.calls.count(look_up), before + 2)
        self.assert_answered(PEOPLE, {"who": ALICE, "all": f"{BOB}, {ALICE},{BOB}"},
                             "**Who:** @alice\n**All:** @bob, @alice",
                             {"who": ALICE, "all": [BOB, ALICE]})
        self.assert_answered(PEOPLE, {"who": ALICE, "all": [], "where": None}, "**Who:** @alice",
                             {"who": ALICE})

    def test_a_channel_of_another_team_is_shown_by_its_display_name(self):
        self.mattermost.channels[OTHERS].members.add(BOT)
        self.mattermost.channels[OTHERS].display_name = "@all `x`"
        self.mattermost.channels[QUIET].name = "~odd`\n@all"
        self.assert_answered(
            PEOPLE, {"who": BOB, "where": OTHERS}, "**Who:** @bob\n**Where:** `` @all `x` ``")
        self.mattermost.run_command()
        self.assertEqual(self.mattermost.submit_dialog({"who": BOB, "where": QUIET}), {
            "errors": {"where": ticket_service.CHANNEL_NOT_SEEN.format(bot="ticket-bot")}})

    def test_a_channel_that_has_no_name_that_can_be_seen_is_shown_by_its_handle(self):
        self.mattermost.channels[OTHERS].members.add(BOT)
        form = {**PEOPLE, "elements": [*PEOPLE["elements"], element("text")]}
        for display_name in (None, "", " ", "\u200b"):
            self.mattermost.channels[OTHERS].display_name = display_name
            self.assert_answered(
                form, {"who": BOB, "where": OTHERS, "x": "a` @all"},
                "**Who:** @bob\n**Where:** `others`\n**X:** ``a` @all``")

    def test_what_the_bot_can_t_see_is_told_at_its_field(self):
        person = ticket_service.PERSON_NOT_SEEN.format(bot="ticket-bot")
        channel = ticket_service.CHANNEL_NOT_SEEN.format(bot="ticket-bot")
        self.start_with_form(PEOPLE)
        self.mattermost.run_command()
        for answers, errors in (
                ({"who": "x" * 26}, {"who": person}), ({"who": HELPDESK}, {"who": person}),
                ({"who": "../users/me"}, {"who": ticket_service.NOT_AN_OPTION}),
                ({"who": "me"}, {"who": ticket_service.NOT_AN_OPTION}),
                ({"who": {}}, {"who": ticket_service.NOT_AN_OPTION}),
                ({"who": [BOB]}, {"who": ticket_service.NOT_AN_OPTION}),
                ({"who": BOB, "where": SECRET}, {"where": channel}),
                ({"who": BOB, "where": DIRECT}, {"where": channel}),
                ({"who": BOB, "where": "y" * 26}, {"where": channel}),
                ({"who": BOB, "where": BOB}, {"where": channel}),
                ({"who": BOB, "all": ["x" * 26, BOB, "y" * 26]}, {"all": person}),
                ({"who": BOB, "all": [BOB, 7]}, {"all": ticket_service.NOT_AN_OPTION}),
                ({"who": BOB, "all": [new_id() for _ in range(51)]},
                 {"all": ticket_service.TOO_MANY.format(limit=50)})):
            with self.subTest(answers):
                self.assertEqual(self.mattermost.submit_dialog(answers), {"errors": errors})
        self.assertEqual(self.mattermost.posts, {})
        self.mattermost.channels[DIRECT].members.add(BOT)
        self.assertEqual(self.mattermost.submit_dialog({"who": BOB, "where": DIRECT}),
                         {"errors": {"where": channel}})

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
        self.assertEqual(self.message(), "**Who:** @bob\n**Where:** `Quiet`")

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

    def test_one_membership_that_can_t_be_read_does_not_keep_the_reporter_s_from_being_told(self):
        self.start_with_form(PEOPLE, TICKET_CHANNEL=QUIET)
        self.mattermost.channels[QUIET].members = {BOT}
        self.mattermost.script(f"GET /channels/{QUIET}/members/{BOB}", fails(503))
        self.assertEqual(self.file({"who": BOB}), {})
        self.assertEqual(self.confirmation(), [ticket_service.YOU_ARE_OUTSIDE])

    def test_where_membership_can_t_be_read_the_confirmation_is_plain(self):
        self.start_with_form(PEOPLE, TICKET_CHANNEL=QUIET)
        for behave in (fails(*NO_PERMISSION), fails(500), http_answer(404, b"<html>")):
            self.mattermost.script(f"GET /channels/{QUIET}/members/{ALICE}", behave)
            self.assertEqual(self.file({"who": BOB}), {})
            self.assertEqual(self.confirmation(), [])

    def test_several_options_are_shown_with_commas_and_their_mentions_once(self):
        options = [{"text": "One", "value": "1", "mention": "@a"},
                   {"text": "Two", "value": "2", "mention": "@b"},
                   {"text": "A, B", "value": "a,b", "mention": "@a"},
                   {"text": "A", "value": "a"}, {"text": "C", "value": "b, c"}]
        form = {"title": "T", "elements": [
            element("select", options=options, multiselect=True, default="1,a,b")]}
        for value, shown, kept in (
                (["1"], "`One` @a", ["1"]), (["1", "2", "1"], "`One`, `Two` @a @b", ["1", "2"]),
                ("2", "`Two` @b", ["2"]), ("1,2", "`One`, `Two` @a @b", ["1", "2"]),
                ("a,b", "`A, B` @a", ["a,b"]), ("1, a,b", "`One`, `A, B` @a", ["1", "a,b"]),
                (["a,b", "a"], "`A, B`, `A` @a", ["a,b", "a"]), ("a,a", "`A`", ["a"]),
                ("b, c,a", "`C`, `A`", ["b, c", "a"]), ("1,,2,", "`One`, `Two` @a @b", ["1", "2"])):
            with self.subTest(value):
                self.assert_answered(form, {"x": value}, f"**X:** {shown}", {"x": kept})
        self.mattermost.run_command()
        for value, sentence in (
                ([], ticket_service.REQUIRED), ("", ticket_service.REQUIRED),
                (["", " ", "\u200b", None], ticket_service.REQUIRED),
                (["1", "3"], ticket_service.NOT_AN_OPTION),
                ("1,3", ticket_service.NOT_AN_OPTION), ("3", ticket_service.NOT_AN_OPTION),
                ([["1"]], ticket_service.NOT_AN_OPTION), ({}, ticket_service.NOT_AN_OPTION),
                ("1,x" * 20_000, ticket_service.NOT_AN_OPTION)):
            with self.subTest(str(value)[:20]):
                self.assertEqual(self.mattermost.submit_dialog({"x": value}),
                                 {"errors": {"x": sentence}})

    def test_dates_and_times_are_shown_and_relative_ones_are_resolved(self):
        def day(days):
            moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days)
            return moment.date().isoformat()

        for kind, value, shown, kept in (
                ("date", "2026-11-27", "2026-11-27", "2026-11-27"),
                ("date", "2026-11-27T10:00:00Z", "2026-11-27", "2026-11-27"),
                ("datetime", "2026-11-27T10:00:00Z", "2026-11-27 10:00 UTC",
                 "2026-11-27T10:00:00Z"),
                ("datetime", "2026-11-27T10:00", "2026-11-27 10:00 UTC", "2026-11-27T10:00:00Z"),
                ("datetime", "2026-11-27T10:00:00.5+02:00", "2026-11-27 10:00 UTC+02:00",
                 "2026-11-27T10:00:00+02:00"),
                ("datetime", "2026-11-27", "2026-11-27 00:00 UTC", "2026-11-27T00:00:00Z")):
            with self.subTest(kind=kind, value=value):
                form = {"title": "T", "elements": [element(kind)]}
                self.assert_answered(form, {"x": value}, f"**X:** `{shown}`", {"x": kept})
        for value, days in (("today", 0), ("tomorrow", 1), ("yesterday", -1), ("+3d", 3),
                            ("-1w", -7), ("+0d", 0)):
            for kind, rest, kept_rest in (("date", "", ""),
                                          ("datetime", " 00:00 UTC", "T00:00:00Z")):
                with self.subTest(kind=kind, value=value):
                    before = day(days)
                    form = {"title": "T", "elements": [element(
                        kind, min_date="today", max_date="+1m", default=value)]}
                    self.start_with_form(form)
                    self.assertEqual(self.file({"x": value}), {})
                    kept = self.mattermost.roots()[-1]["props"]["ticket"]["answers"]["x"]
                    self.assertIn(kept, (before + kept_rest, day(days) + kept_rest))
                    self.assertEqual(self.message(), f"**X:** `{kept[:10]}{rest}`")

    def test_months_and_hours_are_counted_as_the_calendar_has_them(self):
        now = datetime.datetime(2027, 12, 31, 23, 30, tzinfo=datetime.UTC)
        for text, date in (("+1m", "2028-01-31"), ("+2m", "2028-02-29"), ("-1m", "2027-11-30"),
                           ("+999m", "2111-03-31"), ("+1d", "2028-01-01")):
            self.assertEqual(ticket_service.day_meant(text, now).isoformat(), date)
        for text, moment in (("+2H", "2028-01-01T01:30"), ("-30M", "2027-12-31T23:00"),
                             ("+90S", "2027-12-31T23:31"), ("tomorrow", "2028-01-01T00:00")):
            self.assertEqual(ticket_service.time_meant(text, now).isoformat()[:16], moment)

    def test_a_relative_date_means_the_same_when_it_is_submitted_again(self):
        self.start_with_form({"title": "T", "elements": [element("datetime", default="+2H")]})
        self.assertEqual(self.file({"x": "+2H"}), {})
        later = time.time() + 5
        moment = datetime.datetime.fromtimestamp(later, datetime.UTC)
        with (unittest.mock.patch.object(ticket_service.time, "time", lambda: later),
              unittest.mock.patch.object(ticket_service, "utc_now", lambda: moment)):
            self.assertEqual(self.mattermost.submit_dialog({"x": "+2H"}), {})
        self.service.shutdown()  # which waits for what is done after the answer
        self.assertEqual(len(self.mattermost.posts), 2)

    def test_what_is_no_date_is_told_at_its_field(self):
        self.start_with_form({"title": "T", "elements": [
            element("date", "day"), element("datetime", "time")]})
        self.mattermost.run_command()
        for value in ("soon", "27.11.2026", "2026-02-30", "2026-11-27T", "+3y", "+3000d", "3d", 7,
                      "\u0662\u0660\u0662\u0666-11-27", "2026-11-27T25:00:00Z2", "20261127",
                      "2026-11-27T24:01:00Z", "2026-11-27T10:00:61Z", ["2026-11-27"]):
            with self.subTest(value):
                self.assertEqual(
                    self.mattermost.submit_dialog({"day": value, "time": value}), {"errors": {
                        "day": ticket_service.NOT_A_DATE, "time": ticket_service.NOT_A_TIME}})
        answer = self.mattermost.submit_dialog({"day": "+2H", "time": "2026-11-27T24:01Z"})
        self.assertEqual(answer, {"errors": {
            "day": ticket_service.NOT_A_DATE, "time": ticket_service.NOT_A_TIME}})

    def test_a_form_may_have_hundreds_of_fields(self):
        form = {"title": "T", "elements": [
            element("select", f"x{number}", options=OPTIONS, multiselect=True)
            for number in range(300)]}
        self.start_with_form(form)
        self.assertEqual(self.file(answers_to(form)), {})

    def test_what_nobody_sees_goes_from_every_answer(self):
        unseen = "\u200b\u2060\ufeff\xad\u3164"
        self.start_with_form({"title": "T", "elements": [
            element("text", "text"), element("textarea", "code", code=True),
            element("select", "one", options=OPTIONS), element("textarea", "area", optional=True)]})
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
        form = {"title": "t" * 25, "state": "x", "notify_on_cancel": True, "elements": [
            element("select", "several", options=OPTIONS, multiselect=True),
            element("date", "day", optional=True), element("radio", options=OPTIONS, default="1"),
            element("datetime", "time", datetime_config={"location_timezone": "Europe/Berlin"}),
            element("text", "long", help_text="h" * 151, placeholder="п" * 150, time_interval="x"),
            element("text", "begun", default="INC-", min_length=8)]}
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
                lines = self.check_lines(form)
                found = [line for line in lines if re.match(r"(warning|problem) +FORM_FILE", line)]
                self.assertEqual(len(found), len(expected), found)
                for line, one in zip(found, expected):
                    self.assertRegex(line, one)
        for note in ("state is dropped: it is for the service", "notify_on_cancel is dropped",
                     "title has 25 characters: .* logs more than 24",
                     "element x: default: Mattermost", "element long: help_text has 151 char",
                     "element long: time_interval is dropped: it says nothing about a text",
                     "element begun: default: people have to change it, to 8 characters at least"):
            self.assertTrue(any(re.match(f"note +FORM_FILE: {note}", line) for line in lines), note)
        self.assertEqual(sum("FORM_FILE" in line for line in lines), 7)

    def check_lines(self, form):
        """Return what --check prints, with a form."""
        form_file = Path(self.enterContext(tempfile.TemporaryDirectory())) / "form.json"
        form_file.write_text(json.dumps(form), encoding="utf-8")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            ticket_service.main(["--check"], self.settings(FORM_FILE=str(form_file)))
        return output.getvalue().splitlines()


# ---------------------------------------------------------------------------------- the settings

class SettingsTest(unittest.TestCase):
    required = {"MATTERMOST_URL": "http://localhost:8065", "BOT_TOKEN": "bot",
                "SLASH_TOKEN": "slash", "CALLBACK_URL": "http://localhost:8080"}

    def read(self, **changes):
        return ticket_service.Settings.from_environment({**self.required, **changes})

    def test_four_settings_are_enough(self):
        settings = self.read()
        self.assertEqual((settings.port, settings.ticket_channel), (8080, ""))
        self.assertEqual((settings.listen_address, settings.tls), ("", None))
        self.assertEqual([element["name"] for element in settings.form.dialog["elements"]],
                         [element["name"] for element in ticket_service.FORM["elements"]])
        self.assertNotIn("bot", repr(settings).replace("bot_token", ""))

    def test_everything_that_is_wrong_is_named_at_once(self):
        with self.assertRaises(ticket_service.SettingsError) as caught:
            ticket_service.Settings.from_environment(
                {"PORT": "x", "TICKET_CHANNEL": "town-square", "FORM_FILE": "/nowhere"})
        self.assertEqual(
            sorted(line.split()[0] for line in str(caught.exception).splitlines()),
            ["BOT_TOKEN", "CALLBACK_URL", "FORM_FILE", "MATTERMOST_URL", "PORT", "SLASH_TOKEN",
             "TICKET_CHANNEL"])

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
                with self.subTest(name=name, value=value), self.assertRaisesRegex(
                        ticket_service.SettingsError, f"^{name} "):
                    self.read(**{name: value})

    def test_the_scheme_of_a_url_may_be_in_capitals(self):
        settings = self.read(MATTERMOST_URL="HTTPS://mattermost.test")
        self.assertEqual(settings.mattermost_url, "https://mattermost.test")
        self.assertIsNotNone(settings.tls)

    def test_what_is_no_secret_is_quoted(self):
        for name, value, complaint in (
                ("PORT", "many", "'many': must be a number"),
                ("LISTEN_ADDRESS", "x86_64-conda", "'x86_64-conda': must be an IP address"),
                ("TICKET_CHANNEL", "ops", "'ops': must be a channel's ID"),
                ("CALLBACK_URL", "tickets:8080", "'tickets:8080': must be a URL"),
                ("MATTERMOST_URL", "http://me:secret@h", "'http://…@h': must be a URL"),
                ("MATTERMOST_URL", "http://me:se/secret@h", "'http://…@h': "),
                ("MATTERMOST_URL", "me:secret@h", "'…@h': "),
                ("SSL_CERT_FILE", "/nowhere", "'/nowhere': can't be used: "),
                ("FORM_FILE", "/nowhere", "'/nowhere': can't be read: No such file")):
            with self.subTest(name), self.assertRaises(ticket_service.SettingsError) as caught:
                self.read(**{name: value})
            self.assertIn(f"{name} {complaint}", str(caught.exception))
            self.assertNotIn("secret", str(caught.exception))
        for name in ("BOT_TOKEN", "SLASH_TOKEN"):
            with self.assertRaises(ticket_service.SettingsError) as caught:
                self.read(**{name: "s3cret!"})
            self.assertNotIn("s3cret", str(caught.exception))
            with self.assertRaises(ticket_service.SettingsError) as caught:
                self.read(**{name: "", f"{name}_FILE": "s3cret"})
            self.assertRegex(str(caught.exception), f"^{name} of {name}_FILE: can't be read")

    def test_a_blank_setting_is_not_set(self):
        optional = [name for name in ticket_service.SETTINGS if name not in self.required]
        blank = {**dict.fromkeys(optional, ""), "BOT_TOKEN_FILE": " ", "TICKET_CHANNEL_FILE": ""}
        self.assertEqual(self.read(**blank).port, 8080)
        for name in self.required:
            with self.assertRaisesRegex(ticket_service.SettingsError, f"^{name} is missing"):
                self.read(**{name: " "})
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

    def test_quotes_are_named(self):
        for name in ("BOT_TOKEN", "SLASH_TOKEN", "MATTERMOST_URL", "CALLBACK_URL"):
            with self.assertRaisesRegex(ticket_service.SettingsError, f"^{name} .*quotes"):
                self.read(**{name: f'"{self.required[name]}"'})

    def test_urls_may_have_a_sub_path_and_a_slash_at_the_end(self):
        settings = self.read(MATTERMOST_URL="http://h:80/chat/", CALLBACK_URL=" http://[::1]/t// ")
        self.assertEqual((settings.mattermost_url, settings.callback_url),
                         ("http://h:80/chat", "http://[::1]/t"))

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
                with self.subTest(complaint), self.assertRaisesRegex(
                        ticket_service.SettingsError, complaint):
                    self.read(**changes)
            file.write_bytes(b"\xff")
            with self.assertRaisesRegex(ticket_service.SettingsError, "SLASH_TOKEN .*UTF-8"):
                self.read(SLASH_TOKEN="", SLASH_TOKEN_FILE=str(file))

    def test_the_certificates_to_trust_must_be_there(self):
        for path in ("/nowhere", os.devnull, str(HERE)):
            for url in ("https://localhost", "http://localhost", "localhost"):
                with self.subTest(path=path, url=url), self.assertRaisesRegex(
                        ticket_service.SettingsError, f"(?m)^SSL_CERT_FILE .*{path}"):
                    self.read(MATTERMOST_URL=url, SSL_CERT_FILE=path)


# ------------------------------------------------------------------------------------- the IDs

class Clock:
    """A clock that is set by hand, in seconds since 1970."""

    def __init__(self, text):
        self.set(text)

    def set(self, text):
        self.now = datetime.datetime.fromisoformat(text).timestamp()

    def __call__(self):
        return self.now


class TicketIdTest(unittest.TestCase):
    def test_an_id_tells_the_day_in_utc_and_the_time(self):
        for moment, ticket_id in (
                ("2026-11-23T00:00:00Z", "Ticket-20261123-0000"),
                ("2026-11-23T12:00:00Z", "Ticket-20261123-G000"),
                ("2026-11-23T12:00:00.5Z", "Ticket-20261123-G006"),
                ("2026-11-23T23:59:59.999Z", "Ticket-20261123-ZZZZ"),
                ("2026-11-23T23:00:00-05:00", "Ticket-20261124-5ANA")):
            with self.subTest(moment):
                self.assertEqual(ticket_service.TicketIds(Clock(moment)).next(), ticket_id)

    def test_ids_rise_and_do_not_repeat_whatever_the_clock_does(self):
        clock = Clock("2026-11-23T12:00:00Z")
        ids = ticket_service.TicketIds(clock)
        first, second = ids.next(), ids.next()
        self.assertEqual((first, second), ("Ticket-20261123-G000", "Ticket-20261123-G001"))
        clock.set("2026-11-23T11:01:00Z")
        self.assertEqual(ids.next(), "Ticket-20261123-G002")
        clock.set("2026-11-24T00:00:01Z")
        self.assertEqual(ids.next(), "Ticket-20261124-000C")
        clock.set("2026-11-23T23:59:59Z")
        self.assertEqual(ids.next(), "Ticket-20261124-000D")

    def test_one_wrong_reading_of_the_clock_does_not_stick(self):
        clock = Clock("2027-01-17T23:59:59.99Z")
        ids = ticket_service.TicketIds(clock)
        self.assertEqual(ids.next(), "Ticket-20270117-ZZZZ")
        clock.set("2026-11-23T12:00:00Z")
        self.assertEqual(ids.ahead(), 0)
        self.assertEqual([ids.next(), ids.next()],
                         ["Ticket-20261123-G000", "Ticket-20261123-G001"])

    def test_a_day_that_is_used_up_is_an_error_until_midnight(self):
        clock = Clock("2026-11-23T23:59:59.99Z")
        ids = ticket_service.TicketIds(clock)
        ids.next()
        with self.assertRaisesRegex(ticket_service.Sorry, re.escape(ticket_service.DAY_FULL)):
            ids.next()
        clock.set("2026-11-24T00:00:00Z")
        self.assertEqual(ids.next(), "Ticket-20261124-0000")

    def test_after_a_burst_the_clock_has_to_catch_up(self):
        clock = Clock("2026-11-23T12:00:00Z")
        ids = ticket_service.TicketIds(clock)
        self.assertEqual(ids.ahead(), 0)
        for _ in range(121):
            last = ids.next()
        self.assertAlmostEqual(ids.ahead(), 121 * 86400 / 32 ** 4)
        clock.now += ids.ahead() + 0.001
        self.assertEqual(ids.ahead(), 0)
        self.assertGreater(ticket_service.TicketIds(clock).next(), last)
        clock.set("2026-11-24T00:00:00Z")
        self.assertEqual(ids.ahead(), 0)


# ---------------------------------------------------------------------------- the process itself

class ProcessTest(Case):
    """What needs a process of its own: exit statuses, signals, the command line."""

    command = ("-W", "error", "-m", "ticket_service")

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

    def run_service(self, *arguments, **environment):
        """Return exit status, output and errors of a service that ends by itself."""
        with (contextlib.redirect_stdout(io.StringIO()) as output,
              contextlib.redirect_stderr(io.StringIO()) as errors):
            try:
                status = ticket_service.main(arguments, environment)
            except SystemExit as end:
                status = end.code
        return status, output.getvalue(), errors.getvalue()

    def start_process(self, **changes):
        """Return a running service, which logs into a pipe, and let people use it."""
        process = start_python(self.addCleanup, *self.command, env=self.settings(**changes))
        port = re.search(r"listening on port (\d+)", process.stderr.readline())[1]
        self.mattermost.service = ("127.0.0.1", int(port))
        return process

    def test_bad_settings_are_all_named_and_end_with_status_2(self):
        status, output, errors = self.run_service(PORT="many")
        self.assertEqual((status, output), (2, ""))
        for name in ("MATTERMOST_URL", "BOT_TOKEN", "SLASH_TOKEN", "CALLBACK_URL", "PORT"):
            self.assertRegex(errors, f"(?m)^{name} ")

    def test_a_port_that_is_taken_is_told(self):
        status, _, _ = self.run_service(**self.settings(PORT=str(self.service.server_port)))
        self.assertEqual(status, 1)
        self.assert_logged(r"ERROR LISTEN_ADDRESS and PORT: .*\d+ can't be opened: .*in use")

    def test_help_lists_every_variable(self):
        status, output, _ = self.run_service("--help")
        self.assertEqual(status, 0)
        for name in ticket_service.SETTINGS:
            self.assertIn(name, output)

    def test_health_asks_the_running_service(self):
        port = str(self.service.server_port)
        os.environ["http_proxy"] = "http://127.0.0.1:9"
        self.addCleanup(os.environ.pop, "http_proxy")
        for host in ("", "127.0.0.1", "0.0.0.0"):
            self.assertEqual(
                self.run_service("--health", LISTEN_ADDRESS=host, PORT=port), (0, "", ""))
        for port in (str(self.mattermost.server_port), "9", "x"):
            status, _, errors = self.run_service("--health", PORT=port)
            self.assertEqual((status, errors.count("\n")), (1, 1))

    def is_well(self, address, port):
        """Return whether --health is satisfied."""
        status, _, _ = self.run_service("--health", LISTEN_ADDRESS=address, PORT=str(port))
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
        status, output, _ = self.run_service("--check", **self.settings(**changes))
        lines = output.splitlines()
        for line in lines:
            level, name = re.match(r"(\w+) +(\w+): ", line).groups()
            self.assertIn(level, ("ok", "note", "warning", "problem"))
            self.assertIn(name, ticket_service.SETTINGS)
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
        self.assertTrue(self.assert_checked("warning +TICKET_CHANNEL: it is private",
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

    def test_sigterm_ends_the_process_though_a_thread_waits_for_a_name_server(self):
        port = re.search(r"listening on port (\d+)", self.lost.stderr.readline())[1]
        self.mattermost.service = ("127.0.0.1", int(port))
        self.assertIn(ticket_service.FORM_NOT_OPENED, self.mattermost.run_command(TYPED))
        self.lost.send_signal(signal.SIGTERM)
        self.assertEqual(self.lost.wait(8), 0)

    def test_no_id_is_given_again_after_a_restart(self):
        self.service.desk.tickets.wait_at_stop = 1
        for _ in range(2):  # the IDs of a sixth of a second
            self.file()
        self.service.shutdown()
        self.service.desk.close()
        self.start_service()
        self.file()
        ids = [root["props"]["ticket_id"] for root in self.mattermost.roots()]
        self.assertEqual(ids, sorted(set(ids)))
        self.assertEqual(len(ids), 3)


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
        self.assertEqual(first_imports, ["import sys"])
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
        self.assertLessEqual(set(names), set(ticket_service.SETTINGS))
        self.assertLessEqual(set(SettingsTest.required), set(names))

    def test_the_containerfile_sets_only_what_python_knows(self):
        self.assertEqual(set(re.findall(r"(\w+)=1", self.containerfile)),
                         {"PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"})
        self.assertEqual(re.findall(r"(?m)^COPY .*? (\S+) /app/", self.containerfile),
                         ["ticket_service.py"])

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

    def test_the_readme_lists_every_setting(self):
        for name in ticket_service.SETTINGS:
            self.assertIn(f"\n| `{name}` |", self.readme)

    def test_the_form_of_the_readme_opens_and_has_one_of_each_type(self):
        [text] = re.findall(r'(?m)^    (\{"title".*(?:\n     .*)*)', self.readme)
        form = ticket_service.Form(json.loads(text), "README")
        self.assertEqual(form.notes, [])
        self.assertEqual({type(element) for element in form.elements}, {
            *ticket_service.TYPES.values(), *ticket_service.DATA_SOURCES.values()})
        names = {one: ticket_service.Name("x", "@x", True) for one in (BOB, QUIET)}
        answers, errors = form.answers_in(answers_to(json.loads(text)), time.time())
        self.assertEqual(errors, {})
        self.assertEqual(form.markdown(answers, names).count("**"), 2 * len(form.elements))

    def test_the_readme_sets_what_the_program_knows(self):
        known = {*ticket_service.SETTINGS, "NO_PROXY",
                 *(f"{name}_FILE" for name in ticket_service.SETTINGS)}
        named = re.findall(r"(?:-e |Environment=|export |name: |^ {10})([A-Z_]{4,})(?:[=,]|: )",
                           self.readme, re.MULTILINE)
        self.assertLessEqual(set(named), known)
        self.assertGreater(len(named), 12)

    def test_the_readme_runs_what_exists(self):
        scripts = re.findall(r"python3 (\w+\.py)", self.readme)
        self.assertEqual(set(scripts), {"ticket_service.py", "test_ticket_service.py"})
        self.assertIn("python3 -m unittest\n", self.readme)
        secrets_made = set(re.findall(r"podman secret create ([\w-]+)", self.readme))
        self.assertLessEqual(set(re.findall(r"(?m)^#?Secret=([\w-]+)", self.unit)), secrets_made)


# ---------------------------------------------------------------------------------- the demo

# What the page's switches make of Mattermost: which calls fail, and how
FAILURES = {
    "well": None,
    "down": ("", hangs_up),
    "slow": ("", slow(6)),
    "refusing the post": ("POST /posts", fails(400, "api.post.rejected.app_error")),
    "losing the answer": ("POST /posts", loses_the_answer),
}

PAGE = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Mattermost Ticket: demo</title>
<link rel="icon" href="data:,">
<style>
* { box-sizing: border-box; }
body { font: 15px/1.45 "Open Sans", sans-serif; max-width: 50rem; margin: 0 auto;
  padding: 0 1rem 1rem; color: #3f4350; }
header, form.say { display: flex; gap: .4rem .8rem; flex-wrap: wrap; align-items: center; }
header { background: #1e325c; color: #fff; margin: 0 -1rem; padding: .6rem 1rem; }
.note, small, time { color: #6b6e7a; }
.post { margin: 1rem 0; padding-left: 3rem; position: relative; overflow-wrap: anywhere; }
.post::before { content: attr(data-letter); position: absolute; left: 0; top: .1rem; width: 2.2rem;
  height: 2.2rem; border-radius: 50%; background: #6f8bc4; color: #fff; font-weight: bold;
  text-align: center; line-height: 2.2rem; text-transform: uppercase; }
.post.bot::before { background: #1c58d9; }
.post.reply { margin: .6rem 0 .6rem 3rem; border-left: 3px solid #dfe3ec; padding-left: 3.6rem; }
.post.reply::before { left: .8rem; }
.post.ephemeral { background: #f6f7fa; }
.badge { background: #e8eaef; border-radius: 3px; padding: 0 .25rem; font-size: .65rem;
  font-weight: bold; vertical-align: middle; }
.post p, .post h4 { margin: .2rem 0; }
.post h4 { font-size: 1.1rem; }
.attachment { border: 1px solid #dfe3ec; border-left: 4px solid; border-radius: 4px;
  margin: .5rem 0; padding: .6rem; display: flex; gap: .5rem; }
.attachment button { background: #fff; color: #1c58d9; border-color: #1c58d9; font-weight: bold; }
blockquote { margin: .3rem 0; border-left: 4px solid #ccd; padding-left: .7rem; }
code, pre { background: #f0f1f4; border: 1px solid #e3e4e8; border-radius: 4px;
  padding: .05rem .3rem; font-size: .9em; }
pre { overflow: auto; white-space: pre-wrap; margin: .3rem 0; padding: .4rem .6rem; }
pre code { border: 0; padding: 0; }
.mention, .tag, a { color: #1c58d9; text-decoration: none; }
.bad { color: #d24b4e; }
input, textarea, select, button { font: inherit; padding: .3rem .5rem; border-radius: 4px;
  border: 1px solid #b9bdc9; max-width: 100%; }
button { cursor: pointer; }
form.say { position: sticky; bottom: 0; background: #fff; padding: .6rem 0; }
form.say input { flex: 1; min-width: 8rem; }
dialog { width: 34rem; max-width: calc(100vw - 1rem); border: 1px solid #889; border-radius: 8px; }
dialog .field { margin: .9rem 0; }
dialog label.name { display: block; font-weight: bold; }
dialog input:not([type=checkbox], [type=radio]), dialog textarea, dialog select { width: 100%; }
dialog .buttons { display: flex; justify-content: end; gap: .5rem; }
dialog button.main { background: #1c58d9; color: #fff; border-color: #1c58d9; }
</style>
<header>
  <label>You are <select id="user"><option>alice<option>bob</select></label>
  <label>in <select id="channel"></select></label>
  <label>Mattermost is <select id="failure"></select></label>
</header>
<p class="note">This page is a stand-in for Mattermost; the service behind it is the real one.
  Type <code>/ticket disk is full</code>, and be alice or bob.</p>
<main id="posts" aria-live="polite"></main>
<form class="say">
  <input id="text" aria-label="Message" autocomplete="off" autofocus placeholder="/ticket">
  <button>Send</button>
</form>
<p id="complaint" class="bad" role="alert"></p>
<details><summary>What went over the wire</summary><div id="wire"></div></details>
<dialog aria-labelledby="title"><form novalidate></form></dialog>
<script>
"use strict";
const $ = selector => document.querySelector(selector);
let state = null, opened = 0, wanted = location.pathname.split("/").pop();

const escape = text => text.replace(/[&<>"]/g, mark => `&#${mark.charCodeAt(0)};`);

function inline(text) {
  const kept = [];
  const keep = html => `\u0001${kept.push(html) - 1}\u0002`;
  const restore = html => html.replace(/\u0001(\d+)\u0002/g, (_, index) => restore(kept[index]));
  const link = (url, label) => keep(`<a href="${url}">${label}</a>`);
  return restore(escape(text)
    .replace(/(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)/g, (_, ticks, code) =>
      keep(`<code>${code.trim()}</code>`))
    .replace(/\[([^\]]*)\]\((https?:\/\/[^\s)]+)\)/g, (_, label, url) => link(url, label))
    .replace(/https?:\/\/[^\s<\u0001]+/g, url => link(url, url))
    .replace(/\*\*(.+?)\*\*/g, "<b>$1</b>")
    .replace(/(^|\s)(#[A-Za-z][\w-]*)/g, '$1<span class="tag">$2</span>')
    .replace(/(^|\s)(~[a-z0-9_-]+)/g, '$1<span class="mention">$2</span>')
    .replace(/(^|[^\w@])(@\w[\w.-]*)/g, '$1<span class="mention">$2</span>'));
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
      lines.shift();
      const end = lines.findIndex(line => line.startsWith(fence[1]));
      const code = lines.splice(0, end < 0 ? lines.length : end + 1);
      const text = escape(code.slice(0, end < 0 ? undefined : -1).join("\n"));
      html += `<pre><code>${text}</code></pre>`;
    } else if (/^>/.test(lines[0])) {
      html += `<blockquote>${markdown(take(/^>/).map(line => line.replace(/^> ?/, "")).join("\n"))}
        </blockquote>`;
    } else if (/^#{1,6} /.test(lines[0])) {
      html += `<h4>${inline(lines.shift().replace(/^#+ /, ""))}</h4>`;
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
    {user: $("#user").value, channel: $("#channel").value, ...body})});
  return answer.json();
}

function showPosts() {
  const here = state.posts.filter(post => post.channel === $("#channel").value
    && (!post.only || post.only === $("#user").value));
  $("#posts").innerHTML = here.map(post => `
    <article id="${post.id}" data-letter="${post.author[0]}" class="post ${post.root && "reply"}
      ${post.bot && "bot"} ${post.only && "ephemeral"}">
      <b>${post.author}</b> ${post.bot || post.only ? '<span class="badge">BOT</span>' : ""}
      <time>${new Date(post.made).toTimeString().slice(0, 5)}</time>
      ${post.only ? "<small>(Only visible to you)</small>" : ""}
      ${markdown(post.message)}
      ${post.attachments.map(({color, buttons}) => `
        <div class="attachment" style="border-left-color: ${color}">${buttons.map(name =>
          `<button data-post="${post.id}">${name}</button>`).join("")}</div>`).join("")}
    </article>`).join("");
  $("#wire").innerHTML = state.wire.map(([way, call, body, answer]) => `
    <p><b>${way}:</b> <code>${escape(call)}</code></p>
    <pre>${escape(body)}\n→ ${escape(answer)}</pre>`).join("");
}

// A date as its input wants it; of what is counted from now, only days and weeks.
function dateOf(text) {
  const days = {yesterday: -1, today: 0, tomorrow: 1}[text];
  const [, number, unit] = /^([+-]\d+)([dw])$/.exec(text) || [];
  if (days === undefined && !unit) return text;
  const moment = new Date();
  moment.setDate(moment.getDate() + (unit ? number * (unit === "w" ? 7 : 1) : days));
  return moment.toISOString().slice(0, 10);
}

// A moment as its input wants it, in the browser's time.
function timeOf(text) {
  const [, number, unit] = /^([+-]\d+)([HMS])$/.exec(text) || [];
  const moment = unit ? new Date(Date.now() + number * {H: 3600, M: 60, S: 1}[unit] * 1000)
    : new Date(dateOf(text));
  if (isNaN(moment)) return "";
  moment.setMinutes(moment.getMinutes() - moment.getTimezoneOffset());
  return moment.toISOString().slice(0, 16);
}

function field(element, index) {
  const id = `field-${index}`, text = key => escape(element[key] || "");
  const common = `id="${id}" name="${text("name")}" placeholder="${text("placeholder")}"
    aria-describedby="${id}-help"`;
  const most = element.max_length || (element.type === "textarea" ? 3000 : 150);
  const defaults = element.multiselect ? (element.default || "").split(",") : [element.default];
  const chosen = (value, word) => defaults.includes(value) ? word : "";
  const choice = {users: state.people, channels: state.channels}[element.data_source]
    || (element.options || []).map(({text, value}) => [value, text]);
  const options = choice.map(([value, text]) => [escape(text), escape(value)]);
  const limits = `min="${dateOf(text("min_date"))}" max="${dateOf(text("max_date"))}"`;
  const input = {
    text: () => `<input type="text" ${common} maxlength="${most}" value="${text("default")}">`,
    textarea: () => `<textarea ${common} rows="4" maxlength="${most}">
${text("default")}</textarea>`,
    bool: () => `<label><input type="checkbox" ${common} ${chosen("true", "checked")}>
      ${text("placeholder")}</label>`,
    date: () => `<input type="date" ${common} ${limits} value="${dateOf(text("default"))}">`,
    datetime: () => `<input type="datetime-local" ${common}
      value="${timeOf(text("default"))}">`,
    select: () => `<select ${common} ${element.multiselect ? "multiple"
      : `><option value="">${text("placeholder")}</option`}>
      ${options.map(([label, value]) =>
      `<option value="${value}" ${chosen(value, "selected")}>${label}`).join("")}</select>`,
    radio: () => options.map(([label, value], number) => `<label><input type="radio"
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
    <div class="buttons"><button type="button" id="cancel">Cancel</button>
    <button class="main">${escape(submit_label || "Submit")}</button></div>`;
  $("dialog").showModal();
  $("dialog input, dialog select, dialog textarea").focus();
}

function answers() {
  return Object.fromEntries(state.dialog.elements.map(({name, type, subtype}) => {
    const inputs = [...$("dialog form").elements].filter(input => input.name === name);
    if (type === "bool") return [name, inputs[0].checked];
    if (type === "radio") return [name, (inputs.find(input => input.checked) || {value: ""}).value];
    if (inputs[0].multiple) return [name, [...inputs[0].selectedOptions].map(one => one.value)];
    const value = inputs[0].value;
    if (type === "datetime" && value)
      return [name, new Date(value).toISOString().slice(0, 19) + "Z"];
    return [name, subtype === "number" && value && !isNaN(value) ? Number(value) : value];
  }));
}

$("dialog form").onsubmit = async event => {
  event.preventDefault();
  const {error, errors} = await ask("submit", {number: state.number, answers: answers()});
  if (!error && !errors) return $("dialog").close();
  $("#error").textContent = error || "";
  for (const place of document.querySelectorAll("[data-error]"))
    place.textContent = (errors || {})[place.dataset.error] || "";
};
$("dialog").onclick = event => { if (event.target.id === "cancel") $("dialog").close(); };
$("dialog").onclose = () => $("#text").focus();
$("form.say").onsubmit = async event => {
  event.preventDefault();
  const text = $("#text").value;
  if (!text.trim()) return;
  const {complaint} = await ask("say", {text});
  $("#complaint").textContent = complaint;
  if (!complaint) $("#text").value = "";
};
$("#posts").onclick = event => {
  const {dataset: {post}, textContent: button} = event.target;
  if (post) ask("press", {post, button});
};
$("#failure").onchange = () => ask("fail", {failure: $("#failure").value});
$("#channel").onchange = showPosts;
$("#user").onchange = connect;

let stream = null;
function connect() {
  if (stream) stream.close();
  opened = null;
  stream = new EventSource(`/demo/events?${$("#user").value}`);
  stream.onmessage = event => {
    state = JSON.parse(event.data);
    if (!$("#channel").options.length) {
      $("#channel").innerHTML = state.channels.map(([id, name]) =>
        `<option value="${id}">${name}`).join("");
      $("#failure").innerHTML = state.failures.map(name => `<option>${name}`).join("");
      const linked = state.posts.find(post => post.id === wanted);
      if (linked) $("#channel").value = linked.channel;
    }
    $("#failure").value = state.failure;
    showPosts();
    if (opened === null) opened = state.number;
    if (state.number > opened) { opened = state.number; showDialog(state.dialog); }
    (document.getElementById(wanted) || $("form.say")).scrollIntoView({block: "nearest"});
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
            self.reply(200, PAGE_ASKS[path](self.server, user, body))
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
        self.told_at = []  # when each ephemeral text came, in milliseconds

    def seen_by(self, user):
        """Return all that the page shows to a person."""
        with self.lock:
            while len(self.told_at) < len(self.ephemeral):
                self.told_at.append(time.time_ns() // 10**6)
            posts = [{
                "id": post["id"], "channel": post["channel_id"], "author": USERS[post["user_id"]],
                "bot": "bot" if post["user_id"] == BOT else "",
                "root": post["root_id"], "message": post["message"], "only": "",
                "attachments": [
                    {"color": attachment["color"],
                     "buttons": [action["name"] for action in attachment["actions"]]}
                    for attachment in post["props"].get("attachments", ())],
                "made": post["create_at"],
                "at": self.posts[post["root_id"] or post["id"]]["create_at"],
            } for post in self.posts.values()]
            posts += [{"id": f"ephemeral{number}", "channel": channel, "author": USERS[to],
                       "bot": "", "root": "", "message": text, "only": USERS[to],
                       "attachments": [], "made": at, "at": at}
                      for at, (number, (to, channel, text)) in zip(
                          self.told_at, enumerate(self.ephemeral))]
            numbers = [number for number, (to, *_) in enumerate(self.dialogs, 1) if to == user]
            number = max(numbers, default=0)
            wire = [[way, call, body if isinstance(body, str) else json.dumps(body), str(answer)]
                    for way, call, body, answer in self.wire[-50:]]
            return {
                "posts": sorted(posts, key=lambda post: post["at"]),
                "channels": list(CHANNELS_OF_THE_PAGE.items()), "people": list(USERS.items()),
                "number": number, "dialog": self.dialogs[number - 1][2] if number else None,
                "failure": self.failing, "failures": list(FAILURES),
                "wire": json.loads(json.dumps(wire).replace(SLASH_TOKEN, "\u2022\u2022\u2022")),
            }

    def on_say(self, user, body):
        """Do what a person typed: a command, or a message to everybody."""
        text, channel_id = body["text"].strip(), body["channel"]
        word, _, rest = text.partition(" ")
        complaint = ""
        if word == "/ticket":
            answer = self.run_command(rest.strip(), user, channel_id)
            complaint = answer if answer.startswith("Command with") else ""
        elif word == "/invite":
            complaint = self.invite(rest.strip(), channel_id)
        elif word.startswith("/"):
            complaint = f"Command with a trigger of '{word}' not found."
        else:
            with self.lock:
                now = time.time_ns() // 10**6
                post = {"id": new_id(), "create_at": now, "user_id": user, "root_id": "",
                        "channel_id": channel_id, "message": text, "props": {}}
                self.posts[post["id"]] = post
        return {"complaint": complaint}

    def invite(self, name, channel_id):
        """Make the bot a member of a channel; return what is wrong with that."""
        channel = self.channels[channel_id]
        if name != "@ticket-bot" or channel.kind == "D":
            return "Nobody of this name can be invited here."
        channel.members.add(BOT)
        return ""

    def on_submit(self, user, body):
        """Submit a dialog; return what the client is told."""
        return self.submit_dialog(body["answers"], body["number"] - 1, user, body["channel"])

    def on_press(self, user, body):
        """Press a button of a post."""
        if seen := self.press(body["post"], body["button"], user):
            self.ephemeral.append((user, body["channel"], seen))
        return {}

    def on_fail(self, _, body):
        """Let Mattermost fail from now on, or be well."""
        self.failing = body["failure"]
        self.failure = FAILURES[self.failing]
        return {}


CHANNELS_OF_THE_PAGE = {
    HELPDESK: "helpdesk: the bot is in", QUIET: "quiet: public, the bot is not in",
    SECRET: "secret: private, the bot is not in", DIRECT: "alice and bob: a direct message"}
PAGE_ASKS = {"/demo/say": Demo.on_say, "/demo/submit": Demo.on_submit,
             "/demo/press": Demo.on_press, "/demo/fail": Demo.on_fail}


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
    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    service = ticket_service.Server(ticket_service.Desk(settings), "127.0.0.1", settings.port)
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
            body = json.dumps({"user": user, "channel": channel, **body})
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
        def shown_as(status):
            return [{"color": STATUSES[status].color,
                     "buttons": [STATUSES[to].button for to in STATUSES[status].leads_to]}]

        with self.events() as alice, self.events("bob") as bob:
            self.assertEqual(self.ask("say", text="/ticket disk is full"), {"complaint": ""})
            state = alice(lambda state: state["dialog"])
            defaults = [element.get("default") for element in state["dialog"]["elements"]]
            self.assertIn("disk is full", defaults)
            number = state["number"]
            self.assertIn("errors", self.ask("submit", number=number, answers={}))
            self.assertEqual(self.ask("submit", number=number, answers=answers_to()), {})
            state = alice(lambda state: len(state["posts"]) == 3)
            root, reply, confirmation = state["posts"]
            self.assertEqual((reply["root"], confirmation["only"]), (root["id"], "alice"))
            self.assertNotIn(SLASH_TOKEN, json.dumps(state["wire"]))
            shown = shown_as("open")
            for number, (user, status) in enumerate(
                    (("alice", "taken"), ("bob", "taken"), ("bob", "closed")), 4):
                self.assertEqual(root["attachments"], shown)
                self.ask("press", user=user, post=root["id"], button=STATUSES[status].button)
                state = bob(lambda state, number=number: len(state["posts"]) == number)
                root, shown = state["posts"][0], shown_as(status)
            self.assertEqual(root["attachments"], shown)
            self.assertIsNone(state["dialog"])

    def test_a_private_channel_asks_for_an_invitation_and_gets_it(self):
        self.ask("say", channel=SECRET, text="/ticket")
        self.assertEqual(self.mattermost.ephemeral[0][2], cant_post("not a member"))
        self.assertEqual(self.ask("say", channel=SECRET, text="/invite @ticket-bot"),
                         {"complaint": ""})
        self.ask("say", channel=SECRET, text="/ticket")
        self.assertEqual(len(self.mattermost.dialogs), 1)
        self.assertIn("not found", self.ask("say", text="/nothing")["complaint"])
        self.assertIn("can be invited", self.ask("say", text="/invite @x")["complaint"])
        self.ask("say", text="good morning")
        self.assertEqual([post["message"] for post in self.mattermost.posts.values()],
                         ["good morning"])

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
                self.assertEqual(list(answer), [] if failure == "well" else ["error"])
                answer = self.ask("submit", number=number, answers=answers_to())
                self.assertEqual(answer, {})
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
